"""Training from scratch."""

from __future__ import annotations

import pytest
import torch

from pudnet.data import Preprocess
from pudnet.descent import CurvePoint, accuracy
from pudnet.errors import InputError, ShapeError
from pudnet.evaluation import train_from_scratch
from pudnet.targets.convnet import ConvNet3

PREPROCESS = Preprocess(8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def colours(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that are mainly red, green or blue."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=generator)
    images = torch.randint(0, 160, (n, 10, 10, 3), generator=generator, dtype=torch.uint8)
    images[torch.arange(n), :, :, labels] += 90
    return images, labels


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_learns_and_follows_the_seed(optimizer: str) -> None:
    net, train, test = ConvNet3(width=8), colours(160), colours(90, seed=1)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = torch.get_rng_state()
    points: list[CurvePoint] = []
    results = [
        train_from_scratch(
            net, *train, 3, PREPROCESS, optimizer=optimizer, epochs=6, batch_size=16, test=test, progress=points.append
        )
        for _ in range(2)
    ]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    first, second = results
    assert first.curve[-1].top1 > 0.95
    assert [point.epoch for point in first.curve] == [1, 2, 3, 4, 5, 6]
    assert points[:6] == list(first.curve)
    assert 0 < first.curve[0].seconds < first.curve[-1].seconds <= first.seconds
    assert [point.top1 for point in first.curve] == [point.top1 for point in second.curve]
    assert not first.model.training
    assert accuracy(first.model, *test, PREPROCESS) == first.curve[-1].top1


def test_stops_at_the_target_and_at_the_time_limit() -> None:
    train, test = colours(160), colours(90, seed=1)
    module = ConvNet3(width=8)
    early = train_from_scratch(
        module, *train, 3, PREPROCESS, epochs=50, test=test, target_accuracy=0.9, batch_size=16, flip=True
    )
    assert early.reached and early.epochs < 50 and early.curve[-1].top1 >= 0.9
    never = train_from_scratch(module, *train, 3, PREPROCESS, epochs=2, test=test, target_accuracy=1.1)
    assert never.reached is False and never.epochs == 2
    timed = train_from_scratch(module, *train, 3, PREPROCESS, epochs=100_000, max_seconds=0.2)
    assert timed.epochs < 100_000 and timed.reached is None and timed.curve == ()


def test_fewer_images_than_a_batch() -> None:
    result = train_from_scratch(ConvNet3(width=8), *colours(7), 3, PREPROCESS, epochs=3)
    assert result.epochs == 3
    assert result.model(torch.zeros(2, 3, 8, 8)).shape == (2, 3)


def test_bad_input() -> None:
    images, labels = colours(8)
    module = ConvNet3(width=8)
    with pytest.raises(InputError, match="optimizer"):
        train_from_scratch(module, images, labels, 3, PREPROCESS, optimizer="lion")
    with pytest.raises(InputError, match="epochs"):
        train_from_scratch(module, images, labels, 3, PREPROCESS, epochs=0)
    with pytest.raises(InputError, match="labels"):
        train_from_scratch(module, images, labels + 1, 3, PREPROCESS)
    with pytest.raises(ShapeError, match="images and labels"):
        train_from_scratch(module, images, labels[:-1], 3, PREPROCESS)
    with pytest.raises(InputError, match="test"):
        train_from_scratch(module, images, labels, 3, PREPROCESS, target_accuracy=0.5)
