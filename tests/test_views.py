"""Images read together with their mirror images: only where it helps, and alike in all that follows a prediction."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_predictor import coloured, logits_of, tiny_net
from torch import Tensor

import pudnet
from pudnet.errors import InputError
from pudnet.features import feature_maps, mirrored_maps, pool_features
from pudnet.predicted import _mirroring_helps
from pudnet.targets import ConvNet3


@pytest.fixture(scope="module")
def predictor() -> pudnet.Predictor:
    return pudnet.Predictor(tiny_net())


def sided(n: int, mirrored: bool) -> tuple[Tensor, Tensor]:
    """A bright upper or lower half and a slope to the right; ``mirrored``: of every second image to the left."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 2
    images = torch.randint(0, 120, (n, 32, 32, 3), generator=generator)
    images += torch.linspace(0, 100, 32).long().view(1, 1, 32, 1)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[16 * label : 16 * label + 16] += 30
    if mirrored:
        images[n // 2 :] = images[n // 2 :].flip(2)
    return images.to(torch.uint8), labels


def test_mirrored_maps_are_the_same_for_mirror_images_and_those_of_symmetric_ones() -> None:
    network, x = ConvNet3().eval(), torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(mirrored_maps(network, x), mirrored_maps(network, x.flip(-1)))
    assert len(pool_features(mirrored_maps(network, x))) == 3
    assert pool_features(mirrored_maps(network, x)).shape == pool_features(feature_maps(network, x)).shape


def test_a_mirrored_model_goes_everywhere(predictor: pudnet.Predictor, tmp_path: Path) -> None:
    images, labels = coloured(40)
    model = predictor.predict(images, labels, mirror=True, growable=True)
    assert model.mirrored and model.report["mirrored"]
    expected = logits_of(model, images)
    torch.testing.assert_close(logits_of(model, images.flip(2)), expected, atol=1e-4, rtol=1e-4)
    model.save(tmp_path / "model.safetensors")
    loaded = pudnet.load(tmp_path / "model.safetensors")
    assert loaded.mirrored and torch.equal(logits_of(loaded, images), expected)
    assert loaded.add(images, labels).mirrored
    tuned = pudnet.finetune(model, images, labels, epochs=1, validation=0.0)
    assert tuned.mirrored
    assert predictor.remake(model.report, images, labels).mirrored


def test_the_sketch_decides() -> None:
    network = ConvNet3().eval()
    answers = []
    for labels_are_sides in (False, True):
        images, labels = sided(200, mirrored=True)
        labels = (torch.arange(200) >= 100).long() if labels_are_sides else labels
        x = images.permute(0, 3, 1, 2).float() / 128 - 1
        answers.append(_mirroring_helps(network, x, None, labels, 0))
        known = head_features(network, x)
        assert _mirroring_helps(network, x, known, labels, 0) == answers[-1]
    assert answers == [True, False]
    for nothing in (None, torch.zeros(200).long()):
        assert not _mirroring_helps(network, x, None, nothing, 0)


def head_features(network: ConvNet3, x: torch.Tensor) -> torch.Tensor:
    return pool_features(feature_maps(network, x))


def test_only_heads_of_all_layers_can(predictor: pudnet.Predictor) -> None:
    images, labels = coloured(40)
    assert not predictor.predict(images, labels, head="cosine").mirrored
    with pytest.raises(InputError, match="mirror must be None or False"):
        predictor.predict(images, labels, head="cosine", mirror=True)


def test_models_of_before_are_made_again_without(predictor: pudnet.Predictor) -> None:
    images, labels = coloured(40)
    record = predictor.predict(images, labels, mirror=False).report["provenance"]
    del record["mirror"]
    assert not predictor.remake(record, images, labels).mirrored
