"""The second half of a prediction: what calibration has computed of the sketch is not computed again for the head."""

from __future__ import annotations

import pytest
import torch
from test_predictor import Plain, coloured, logits_of, tiny_net
from torch import Tensor, nn

import pudnet
from pudnet import features, predicted
from pudnet.batchnorm import calibrate
from pudnet.features import feature_maps
from pudnet.predicted import _Known


@pytest.mark.parametrize("target", ["convnet3", Plain()])
@pytest.mark.parametrize("head", ["ridge", "cosine"])
def test_features_of_the_sketch_are_computed_once(
    target: str | nn.Module, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = pudnet.Predictor(tiny_net(target))
    images, labels = coloured(40)
    read: list[int] = []

    def counting(network: nn.Module, x: Tensor) -> list[Tensor]:
        read.append(len(x))
        return feature_maps(network, x)

    monkeypatch.setattr(predicted, "feature_maps", counting)
    monkeypatch.setattr(features, "feature_maps", counting)
    model = predictor.predict(images, labels, head=head, sketch_size=30, views="single")
    assert read[1] == 30 and sum(read[1:]) == len(images)
    read.clear()
    monkeypatch.setattr(predicted, "REUSE_BYTES", 0)
    again = predictor.predict(images, labels, head=head, sketch_size=30, views="single")
    assert sum(read[1:]) == len(images) and 30 not in read
    assert model.report["expected_accuracy"] == again.report["expected_accuracy"]
    torch.testing.assert_close(logits_of(model, images), logits_of(again, images), rtol=1e-3, atol=1e-3)


def test_known_features_belong_to_equal_pixels() -> None:
    pixels = torch.arange(12, dtype=torch.uint8).view(6, 1, 1, 2)
    known = _Known(torch.tensor([5, 1, 3]), pixels[[5, 0, 3]], torch.tensor([[5.0], [1.0], [3.0]]))
    new, at, features = known.find(2, pixels[2:])
    assert new.tolist() == [True, False, True, False]
    assert (at.tolist(), features.tolist()) == ([3, 1], [[5.0], [3.0]])
    new, at, features = known.find(0, pixels[:2])  # number 1 has other pixels
    assert new.all() and not len(at) and features.shape == (0, 1)


def test_layers_that_run_leaves_out_are_calibrated_too() -> None:
    module = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    images = 3 + torch.randn(20, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    calibrate(module, images, run=module[0])
    for norm, mean in zip(module, (images.mean((0, 2, 3)), torch.zeros(3)), strict=True):
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-4)
        assert not torch.equal(norm.running_var, torch.ones(3))
