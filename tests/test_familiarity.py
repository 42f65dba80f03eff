"""Whether a dataset is like those of the training, and what predictions say of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pudnet
from pudnet.errors import CheckpointError
from pudnet.familiarity import KNOWN, describe, familiarity
from pudnet.heads import fit_head
from pudnet.predicted import expected_accuracy

WIDTH = 12


def single(number: int, images: int = 40, shift: float = 0.0) -> Tensor:
    """Embeddings [S, d] of the images of one dataset: datasets differ by 1, images by 3."""
    generator = torch.Generator().manual_seed(number)
    return shift + torch.randn(WIDTH, generator=generator) + 3 * torch.randn(images, WIDTH, generator=generator)


@pytest.fixture(scope="module")
def known() -> dict[str, object]:
    return describe([single(number) for number in range(KNOWN + 150)])


def far(known: dict[str, object], images: int, shift: float = 0.0) -> float:
    """Share of new datasets that are called unlike."""
    drawn = [single(1000 + number, images, shift) for number in range(100)]
    return sum(familiarity(known, one.mean(0), images).unlike for one in drawn) / len(drawn)


@pytest.mark.parametrize("images", [10, 40, 1000])
def test_few_false_alarms_whatever_the_size_of_the_sample(known: dict[str, object], images: int) -> None:
    assert far(known, images) <= 0.06


def test_other_datasets_are_told(known: dict[str, object]) -> None:
    assert far(known, 40, shift=4.0) > 0.95


def test_distance_is_the_root_mean_square_in_standard_deviations() -> None:
    alike = [torch.zeros(5, 2), torch.tensor([[2.0, 20.0]]).expand(5, 2), torch.tensor([[1.0, 10.0]]).expand(5, 2)]
    known = {**describe([*alike, *[alike[0]] * KNOWN]), "images": [5] * 3}
    known["embeddings"] = [part.mean(0).tolist() for part in alike]  # standard deviations 1 and 10
    assert familiarity(known, torch.tensor([-3.0, 0.0]), 5).distance == pytest.approx((9 / 2) ** 0.5)
    assert familiarity(known, torch.tensor([0.0, -30.0]), 5).distance == pytest.approx((9 / 2) ** 0.5)


def test_numbers_of_another_network_are_refused(known: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="embeddings of 3 values"):
        familiarity(known, torch.zeros(3), 10)
    with pytest.raises(CheckpointError, match="threshold"):
        familiarity({name: known[name] for name in known if name != "threshold"}, torch.zeros(WIDTH), 10)


def test_predictions_report_it_where_the_checkpoint_knows() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 60, (60, 8, 8, 3), generator=generator, dtype=torch.uint8)
    labels = torch.arange(60) % 2
    net = pudnet.PudNet("convnet3", image_size=8, width=8, generator_width=2).eval()
    assert "familiarity" not in pudnet.Predictor(net).predict(images, labels).report
    with torch.no_grad():
        drawn = [images[torch.randperm(60, generator=generator)[:20]] for _ in range(90)]
        groups = [net.image_embeddings(net.preprocess(one)) for one in drawn]
    net.card = {"familiarity": describe(groups)}
    predictor = pudnet.Predictor(net)
    dark, light = predictor.predict(images, labels).report, predictor.predict(255 - images, labels).report
    assert dark["familiarity"]["distance"] <= dark["familiarity"]["threshold"] and dark["warnings"] == []
    assert light["familiarity"]["distance"] > 3 * dark["familiarity"]["threshold"]
    assert "unlike" in light["warnings"][0]


def test_expected_accuracy_takes_off_what_directions_flatter() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 2
    features = torch.randn(80, 5, generator=generator) + labels[:, None]
    head = fit_head("ridge", [(features, labels)], 2)
    counts = dict.fromkeys("0123456789", 8)
    assert expected_accuracy(head, {"class_counts": counts}) == pytest.approx(head.expected_accuracy)

    def expected(optimism: float, error: float) -> float:
        trial = {"helps": True, "optimism": optimism, "error": error, "images": 40}
        return expected_accuracy(head, {"directions": trial, "class_counts": counts})

    error = 1 - head.expected_accuracy
    assert error > 0
    assert expected(0.5, error) == pytest.approx(1 - 1.25 * error)
    assert expected(1000.0, 0.5) == pytest.approx(0.1)  # what guessing gives
    counts["0"] = 100
    assert expected(1000.0, 0.5) == pytest.approx((100**2 + 9 * 8**2) / 172**2)
    counts["0"] = 8
    assert expected(2.0, 0.5) == pytest.approx(1 - max(2 * error, 0.5))  # leave-one-out says nothing any more
