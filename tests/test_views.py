"""Images read in several copies: only where it helps, and alike in all that follows a prediction."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_predictor import coloured, logits_of, tiny_net
from torch import Tensor

import pudnet
from pudnet import checkpoint
from pudnet.data import open_images
from pudnet.errors import CheckpointError, InputError
from pudnet.features import VIEWS
from pudnet.heads import HEADS
from pudnet.predicted import _best_views, finish
from pudnet.targets import ConvNet3


@pytest.fixture(scope="module")
def predictor() -> pudnet.Predictor:
    return pudnet.Predictor(tiny_net())


def sided(n: int) -> tuple[Tensor, Tensor]:
    """A bright upper or lower half and a slope to the right, of the second half of the images to the left."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 2
    images = torch.randint(0, 120, (n, 32, 32, 3), generator=generator)
    images += torch.linspace(0, 100, 32).long().view(1, 1, 32, 1)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[16 * label : 16 * label + 16] += 8
    images[n // 2 :] = images[n // 2 :].flip(2)
    return images.to(torch.uint8), labels


@pytest.mark.parametrize("head", ["kernel", "ridge", "cosine"])
@pytest.mark.parametrize("views", ["mirrored", "shifted"])
def test_a_model_with_views_goes_everywhere(predictor: pudnet.Predictor, views: str, head: str, tmp_path: Path) -> None:
    images, labels = coloured(40)
    model = predictor.predict(images, labels, views=views, head=head, growable=True)
    assert model.views == model.report["views"] == views
    expected = logits_of(model, images)
    if views == "mirrored":
        torch.testing.assert_close(logits_of(model, images.flip(2)), expected, atol=1e-4, rtol=1e-4)
    model.save(tmp_path / "model.safetensors")
    loaded = pudnet.load(tmp_path / "model.safetensors")
    assert loaded.views == views and torch.equal(logits_of(loaded, images), expected)
    assert loaded.add(images, labels).views == views
    tuned = pudnet.finetune(model, images, labels, epochs=1, validation=0.0)
    assert tuned.views == views
    assert predictor.remake(model.report, images, labels).views == views


@pytest.mark.parametrize("head", ["kernel", "ridge"])
def test_the_sketch_decides(head: str) -> None:
    torch.manual_seed(0)
    network, reading = ConvNet3().eval(), HEADS[head].reading
    answers = []
    for labels_are_sides in (False, True):
        images, labels = sided(200)
        labels = (torch.arange(200) >= 100).long() if labels_are_sides else labels
        x = images.permute(0, 3, 1, 2).float() / 128 - 1
        views, features = _best_views(network, x, labels, head, reading)
        if views == "single":
            assert features is None
        else:
            assert features is not None and torch.allclose(features, reading(network, x, views), atol=1e-6)
        answers.append(views)
    assert answers[0] != "single" and answers[1] != "mirrored"
    assert _best_views(network, x, torch.zeros(200).long(), head, reading) == ("single", None)


def test_the_papers_heads_read_single_images(predictor: pudnet.Predictor) -> None:
    images, labels = coloured(40)
    assert predictor.predict(images, labels, head="cosine").views == "single"
    assert predictor.predict(images, labels, head="kernel", batchnorm="batch").views == "single"


def test_unknown_views_are_refused(predictor: pudnet.Predictor, tmp_path: Path) -> None:
    images, labels = coloured(40)
    with pytest.raises(InputError, match="views must be None or one of 'single'"):
        predictor.predict(images, labels, views="both")
    sketch = predictor.sketch(images, labels)
    with pytest.raises(InputError, match="finish: views must be None or one of 'single'"):
        source = open_images(images, labels, size=32)
        finish(predictor.net.network(sketch), source, sketch, predictor.net.preprocess, views="both")
    model = predictor.predict(images, labels)
    model.views = "both"
    model.save(tmp_path / "model")
    with pytest.raises(CheckpointError, match="views must be one of"):
        pudnet.load(tmp_path / "model")


@pytest.mark.parametrize("mirrored", [True, False, None])
def test_files_of_before_read_as_they_did(predictor: pudnet.Predictor, mirrored: bool | None, tmp_path: Path) -> None:
    images, labels = coloured(40)
    views = "mirrored" if mirrored else "single"
    model = predictor.predict(images, labels, head="ridge", views=views)
    path = tmp_path / "model"
    model.save(path)
    config, tensors = checkpoint.load(path, "model")
    del config["views"], config["head"]["reading"]
    if mirrored is not None:
        config["mirrored"] = mirrored
    checkpoint.save(path, "model", config, tensors)
    loaded = pudnet.load(path)
    assert loaded.views == views and not loaded.head.reading.covariances
    assert torch.equal(logits_of(loaded, images), logits_of(model, images))
    record = model.report["provenance"]
    del record["views"]
    if mirrored is not None:
        record["mirror"] = mirrored
    assert predictor.remake(record, images, labels).views == views


def test_a_kernel_head_of_before_reads_no_covariances(predictor: pudnet.Predictor) -> None:
    images, labels = coloured(40)
    head = predictor.predict(images, labels, head="kernel", growable=True).head
    config = head.config()
    assert config["reading"]["covariances"]
    del config["reading"]
    assert not pudnet.heads.head_from_config(config, head.state).reading.covariances
    config["reading"] = {"layers": "first"}
    with pytest.raises(CheckpointError, match="reading must be one of this version"):
        pudnet.heads.head_from_config(config, head.state)


def test_every_view_has_the_image_itself_first() -> None:
    assert all(views[0] == (0, 0, False) for views in VIEWS.values())


def test_a_quick_prediction_tries_nothing(predictor: pudnet.Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = coloured(20)
    sketch = predictor.sketch(images, labels)
    usual = predictor.predict(images, labels)

    def refuse(*arguments: object) -> None:
        raise AssertionError("something was tried")

    monkeypatch.setattr("pudnet.models.pudnet.try_directions", refuse)
    monkeypatch.setattr("pudnet.predicted._best_views", refuse)
    with pytest.raises(AssertionError, match="tried"):
        predictor.predict(images, labels)
    (batched,) = predictor.predict_batch([(images, labels)], quick=True)
    (threaded,) = predictor.predict_many([(images, labels)], quick=True)
    for model in (predictor.predict(images, labels, quick=True), batched, threaded):
        assert model.views == "single" and not model.report["directions"]["helps"]
        assert model.report["provenance"]["quick"] and not usual.report["provenance"]["quick"]
        weights = dict(model.network.named_parameters())
        for name, weight in predictor.generate(sketch).items():
            assert torch.allclose(weights[name], weight)
        assert predictor.remake(model.report, images, labels).views == "single"
    assert predictor.predict(images, labels, quick=True, views="shifted").views == "shifted"
    record = dict(usual.report["provenance"])
    del record["quick"]  # of models of before
    monkeypatch.undo()
    assert torch.equal(logits_of(predictor.remake(record, images, labels), images), logits_of(usual, images))
