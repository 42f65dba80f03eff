"""Gradient descent on a classifier: augmentation, the schedule, and runs that stop and go on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pudnet.data import Preprocess
from pudnet.descent import WARMUP, Recipe, Run, augmented, schedule
from pudnet.errors import CheckpointError


def test_augmentation_mirrors_and_moves_each_image_by_itself() -> None:
    one = torch.arange(6 * 6 * 3, dtype=torch.uint8).view(1, 6, 6, 3)
    images = one.expand(60, -1, -1, -1)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(augmented(images, False, 0, generator), images)
    flipped = augmented(images, True, 0, generator)
    assert {bool(torch.equal(image, one[0])) for image in flipped} == {True, False}
    assert all(torch.equal(image, one[0]) or torch.equal(image, one[0].flip(1)) for image in flipped)
    moved = augmented(images, False, 1, generator)
    places = {(dy, dx): one[0, 1 + dy : 5 + dy, 1 + dx : 5 + dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
    found = [[place for place, part in places.items() if torch.equal(image[1:5, 1:5], part)] for image in moved]
    assert all(len(place) == 1 for place in found)
    assert len({place[0] for place in found}) == 9


def test_the_rate_rises_then_falls_to_zero() -> None:
    shares = [schedule(step / 100) for step in range(1, 101)]
    peak = round(100 * WARMUP) - 1
    assert shares[peak] == 1 and shares[-1] == pytest.approx(0, abs=1e-12)
    assert shares[:peak] == sorted(shares[:peak]) and shares[peak:] == sorted(shares[peak:], reverse=True)


def make_run(recipe: Recipe, lr: float = 0.01) -> Run:
    """A small convolution in two parameter groups."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (22, 6, 6, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(3, (22,), generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    groups = [{"params": model[:2].parameters()}, {"params": model[3].parameters(), "lr": 2 * lr}]
    preprocess = Preprocess(6, (0.5,) * 3, (0.25,) * 3)
    return Run(model, torch.optim.AdamW(groups, lr, fused=True), images, labels, preprocess, recipe)


def test_a_restored_run_goes_on_to_the_bit() -> None:
    recipe = Recipe(3, 8, flip=True, shift=1, seed=4)
    whole, first, second = make_run(recipe), make_run(recipe), make_run(recipe)
    assert (whole.steps_per_epoch, whole.total) == (2, 6)
    for _ in range(whole.total):
        whole.step()
    for _ in range(3):  # in the middle of an epoch
        first.step()
    config, tensors = first.state()
    second.restore(
        config, {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    )
    assert second.epoch == 1.5
    while second.done < second.total:
        second.step()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    assert not torch.equal(whole.model[0].weight, first.model[0].weight)  # type: ignore[index]


def test_groups_keep_the_ratio_of_their_rates() -> None:
    run = make_run(Recipe(2, 8))
    run.step()
    small, large = (group["lr"] for group in run.optimiser.param_groups)
    assert small == pytest.approx(0.01 * schedule(1 / 4)) and large == pytest.approx(2 * small)


def test_refuses_what_is_of_another_run() -> None:
    config, tensors = make_run(Recipe(1, 8)).state()
    with pytest.raises(CheckpointError, match="settings"):
        make_run(Recipe(1, 8, seed=1)).restore(config, tensors)
    for damaged in ({**tensors, "model.0.weight": torch.zeros(2)}, {name: tensors[name] for name in ("order",)}):
        with pytest.raises(CheckpointError, match="checkpoint of this run"):
            make_run(Recipe(1, 8)).restore(config, damaged)
