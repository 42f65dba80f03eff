"""Classifiers of raw pixels, and fine-tuning."""

from __future__ import annotations

import pytest
import torch

from pudnet.data import Preprocess
from pudnet.descent import accuracy
from pudnet.errors import InputError, ShapeError
from pudnet.evaluation.peers import CLASSIFIERS, fit_pixels
from pudnet.evaluation.scratch import fine_tune, train_from_scratch
from pudnet.targets.convnet import ConvNet3


def blobs(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three clouds of points, 12 values each."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=generator)
    centres = 3 * torch.eye(3, 12)
    return centres[labels] + torch.randn(n, 12, generator=generator), labels


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifies_clouds(name: str) -> None:
    classify = fit_pixels(name, *blobs(150, 0), seed=1)
    x, labels = blobs(100, 1)
    answers = classify(x)
    assert answers.shape == labels.shape
    assert (answers == labels).double().mean() > 0.85


def test_nearest_class_mean_by_hand() -> None:
    x = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
    classify = fit_pixels("mean", x, torch.tensor([1, 1, 0, 0]))
    assert classify(torch.tensor([[5.9], [6.1]])).tolist() == [1, 0]  # the means are 1 and 11


def test_bad_input() -> None:
    x, labels = blobs(9, 0)
    with pytest.raises(InputError, match="forest"):
        fit_pixels("svm", x, labels)
    with pytest.raises(ShapeError):
        fit_pixels("mean", x, labels[1:])


def test_fine_tuning_starts_from_the_given_weights_and_leaves_them_alone() -> None:
    preprocess = Preprocess(8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (96,), generator=generator)
    images = torch.randint(0, 200, (96, 8, 8, 3), generator=generator, dtype=torch.uint8)
    images[torch.arange(96), :, :, labels] += 55
    trained = train_from_scratch(ConvNet3(width=8), images, labels, 3, preprocess, epochs=8).model.network
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    # Almost no learning rate: what comes out is what went in, under a new classifier.
    same = fine_tune(trained, images, labels, 3, preprocess, epochs=1, lr=1e-9, test=(images, labels))
    for name, weight in same.model.network.named_parameters():
        torch.testing.assert_close(weight.data, before[name], atol=1e-5, rtol=0)
    tuned = fine_tune(trained, images, labels, 3, preprocess, epochs=6, lr=1e-2)
    assert accuracy(tuned.model, images, labels, preprocess) > max(0.8, same.curve[-1].top1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())
    assert any(weight.requires_grad for weight in tuned.model.network.parameters())
