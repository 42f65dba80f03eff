"""Records of what made a model, models made again from them, images added later, and deterministic algorithms."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_predictor import coloured, logits_of, tiny_net
from torch import Tensor

import pudnet
from pudnet import checkpoint
from pudnet.errors import CheckpointError, InputError, PudnetError
from pudnet.provenance import digest_model


@pytest.fixture(scope="module")
def predictor() -> pudnet.Predictor:
    return pudnet.Predictor(tiny_net())


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def state_of(model: pudnet.PredictedModel) -> dict[str, Tensor]:
    return model.state_dict()


def assert_equal(first: pudnet.PredictedModel, second: pudnet.PredictedModel) -> None:
    ours, theirs = state_of(first), state_of(second)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


# ---- records ------------------------------------------------------------------------------------------------------


def test_a_record_says_what_made_the_model(tmp_path: Path) -> None:
    tiny_net().save(tmp_path / "net.safetensors")
    predictor = pudnet.Predictor.from_pretrained(tmp_path / "net.safetensors")
    images, labels = coloured(20)
    model = predictor.predict(images, labels, seed=3, sketch_size=7, head="cosine")
    record = json.loads(json.dumps(model.report))["provenance"]
    assert record["checkpoint"].endswith("net.safetensors") and len(record["sha256"]) == 64
    assert record["torch"] == torch.__version__ and record["numpy"] == np.__version__
    assert record["threads"] == torch.get_num_threads() and record["device"] == "cpu"
    assert (record["seed"], record["sketch_size"], record["head"], record["batchnorm"]) == (
        3,
        7,
        "cosine",
        "calibrated",
    )
    assert set(record["backends"]) == {"layer_recurrence", "generate_weights"}
    sketch = predictor.sketch(images, labels, size=7, seed=3)
    assert record["sketch"]["indices"] == sketch.indices.tolist()
    assert torch.equal(images[record["sketch"]["indices"]], sketch.images)
    assert record["model_sha256"] == digest_model(model.network, model.head)


def test_a_record_names_the_backends_that_ran(predictor: pudnet.Predictor) -> None:
    with pudnet.use_backend("reference"):
        found = predictor.predict(*coloured(4)).report["provenance"]["backends"]
    assert found == {"layer_recurrence": "reference", "generate_weights": "reference"}
    fast = pudnet.Predictor(tiny_net(), optimize=True)
    record = fast.predict(*coloured(4)).report["provenance"]
    assert record["optimize"] and record["backends"]["generate_weights"] == fast._fast.backend  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"head": "cosine", "batchnorm": "shared", "seed": 5, "sketch_size": 9},
        {"head": "ridge-last", "batchnorm": "batch", "classes": ["2", "1", "0"]},
    ],
)
def test_a_model_is_made_again_from_its_record(
    predictor: pudnet.Predictor, options: dict[str, Any], tmp_path: Path
) -> None:
    images, labels = coloured(20)
    model = predictor.predict(images, labels, **options)
    model.save(tmp_path / "model")
    again = pudnet.Predictor(tiny_net()).remake(pudnet.load(tmp_path / "model").report, images, labels)
    assert_equal(again, model)
    assert again.classes == model.classes
    assert again.report["provenance"] == model.report["provenance"]


def test_a_model_with_its_own_sketch_and_added_images_is_made_again(predictor: pudnet.Predictor) -> None:
    (images, labels), more, last = coloured(20), coloured(3, classes=4, seed=1), coloured(2, seed=2)
    halves = (predictor.sketch(images[i::2], labels[i::2], size=8, stream=i) for i in range(2))
    sketch = pudnet.Sketch.merge(*halves)
    model = predictor.predict(images, labels, sketch=sketch, growable=True).add(*more, new_classes=["3"]).add(*last)
    again = predictor.remake(model.report, images, labels, sketch=sketch, added=[more, last])
    assert_equal(again, model)
    with pytest.raises(InputError, match="those of the record"):
        predictor.remake(model.report, images, labels, added=[more, last])
    with pytest.raises(InputError, match="the 2 datasets that were added"):
        predictor.remake(model.report, images, labels, sketch=sketch, added=[more])


def test_what_is_not_the_same_is_refused(predictor: pudnet.Predictor) -> None:
    images, labels = coloured(20)
    report = predictor.predict(images, labels, sketch_size=9).report
    with pytest.raises(CheckpointError, match="parameters of the record"):
        pudnet.Predictor(pudnet.PudNet("convnet3", image_size=16, width=8, generator_width=2, seed=1)).remake(
            report, images, labels
        )
    with pytest.raises(InputError, match="those of the record"):
        predictor.remake(report, images.flip(0), labels)
    changed = images.clone()
    changed[next(i for i in range(60) if i not in report["provenance"]["sketch"]["indices"])] += 1
    with pytest.raises(PudnetError, match="nothing that is recorded, so images that are not sketched"):
        predictor.remake(report, changed, labels)
    older = copy.deepcopy(report)
    older["provenance"] |= {"torch": "1.0", "model_sha256": "0"}
    with pytest.raises(PudnetError, match=r"torch was '1\.0' and is"):
        predictor.remake(older, images, labels)
    with pytest.raises(InputError, match="without batchnorm"):
        predictor.remake({}, images, labels)
    with pytest.raises(InputError, match="made in one process"):
        predictor.remake({**report["provenance"], "shards": 3}, images, labels)


def test_copies_and_state_dicts_hold_the_whole_model(predictor: pudnet.Predictor) -> None:
    images, labels = coloured(20)
    model = predictor.predict(images, labels, growable=True)
    twin = copy.deepcopy(model)
    assert torch.equal(logits_of(twin, images), logits_of(model, images))
    other = predictor.predict(*coloured(20, seed=8), head=model.head.name, seed=8)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(other, images), logits_of(model, images))
    grown = twin.add(*coloured(5, seed=9))
    assert_equal(twin.add(*coloured(5, seed=9)), grown)
    assert grown.report["n"] == 75 and twin.report["n"] == model.report["n"] == 60
    assert torch.equal(logits_of(twin, images), logits_of(model, images))


# ---- images and classes added later -------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["cosine", "ridge", "ridge-last", "kernel"])
@pytest.mark.parametrize("reload", [False, True])
def test_a_model_that_grows_is_the_model_made_at_once(
    predictor: pudnet.Predictor, head: str, reload: bool, tmp_path: Path
) -> None:
    images, labels = coloured(24, classes=4)
    first = predictor.predict(images[:48], labels[:48], head=head, growable=True)
    if reload:
        first.save(tmp_path / "model")
        first = pudnet.load(tmp_path / "model")
    grown = first.add(images[48:60], labels[48:60], new_classes=["2"])
    grown = grown.add(images[60:], labels[60:], new_classes=["3"])
    # At once: the same network, whose BatchNorm is calibrated on the first images, and one fit of the head.
    from pudnet.heads import fit_head

    with torch.no_grad():
        features = first.head.reading(first.network, first.preprocess(images), first.views)
        wanted = fit_head(head, [(features, labels)], 4)
    torch.testing.assert_close(grown.head.logits(features), wanted.logits(features), rtol=1e-3, atol=1e-3)
    if head != "kernel":  # whose weights are in the order of the images
        torch.testing.assert_close(grown.head.weight, wanted.weight, rtol=1e-3, atol=1e-5)
    assert grown.report["expected_accuracy"] == pytest.approx(wanted.expected_accuracy, abs=1 / 96)
    assert grown.classes == ("0", "1", "2", "3") and grown.evaluate(images, labels)["top1"] > 0.95
    assert grown.report["class_counts"] == dict.fromkeys("0123", 24) and grown.report["n"] == 96
    assert grown.report["provenance"]["added"][0] == {"n": 12, "new_classes": ["2"], "split": "train"}
    assert first.classes == ("0", "1") and first.head.num_classes == 2


def test_what_cannot_be_added(predictor: pudnet.Predictor) -> None:
    images, labels = coloured(8)
    with pytest.raises(InputError, match="growable=True"):
        predictor.predict(images, labels).add(images, labels)
    with pytest.raises(InputError, match="depend on the other images"):
        predictor.predict(images, labels, batchnorm="batch", growable=True).add(images, labels)
    model = predictor.predict(images, labels, growable=True)
    for names in (["2"], ["x", "x"]):
        with pytest.raises(InputError, match="different from each other"):
            model.add(images, labels, new_classes=names)
    with pytest.raises(InputError, match="model's 3 classes"):
        model.add(images, labels + 1)
    with pytest.raises(InputError, match="images of every class"):
        model.add(images, labels, new_classes=["x"])
    assert model.add(images, labels).report["n"] == 48


def test_a_damaged_record_of_the_head_is_refused(predictor: pudnet.Predictor, tmp_path: Path) -> None:
    path = tmp_path / "model"
    predictor.predict(*coloured(8), growable=True).save(path)
    config, tensors = checkpoint.load(path, "model")
    for wrong in (
        {**tensors, "pudnet.fitter.rows": torch.zeros(2, 2)},
        {**tensors, "pudnet.fitter.more": torch.zeros(1)},
    ):
        checkpoint.save(path, "model", config, wrong)
        with pytest.raises(CheckpointError, match="fits"):
            pudnet.load(path)


# ---- deterministic algorithms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("head", ["cosine", "ridge"])
def test_predicting_respects_deterministic_algorithms(
    optimize: bool, head: str, request: pytest.FixtureRequest
) -> None:
    """Nothing raises, memory that is not written (filled with NaN then) is not read, runs and the usual are equal."""
    images, labels = coloured(20)
    predictor = pudnet.Predictor(tiny_net(), optimize=optimize)
    usual = predictor.predict(images, labels, head=head, growable=True)
    request.getfixturevalue("deterministic")
    first, second = (predictor.predict(images, labels, head=head, growable=True) for _ in range(2))
    assert first.report["provenance"]["deterministic_algorithms"]
    assert_equal(first, second)
    assert_equal(first, usual)
    assert torch.equal(first.classify(images).probabilities, usual.classify(images).probabilities)
    assert_equal(first.add(images, labels), usual.add(images, labels))
    batch = predictor.predict_batch([(images, labels), (images.flip(0), labels)], head=head)
    assert all(bool(torch.isfinite(x).all()) for model in batch for x in model.state_dict().values())


@pytest.mark.parametrize("backend", ["reference", "automatic"])
def test_gradients_respect_deterministic_algorithms(backend: str, request: pytest.FixtureRequest) -> None:
    images = coloured(4)[0]

    def gradients() -> list[Tensor]:
        net = tiny_net().train()
        with pudnet.use_backend(backend):
            sum(weight.square().sum() for weight in net.generate([images, images[:5]]).values()).backward()  # type: ignore[union-attr]
        return [p.grad for p in net.parameters() if p.grad is not None]

    usual = gradients()
    request.getfixturevalue("deterministic")
    for ours, first, second in zip(usual, gradients(), gradients(), strict=True):
        assert torch.equal(first, second) and torch.equal(first, ours) and bool(torch.isfinite(first).all())


def test_graph_hypernetworks_respect_deterministic_algorithms(request: pytest.FixtureRequest) -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())

    def weights() -> dict[str, Tensor]:
        return pudnet.GHN(width=8, num_classes=4).eval().generate(network)

    usual = weights()
    request.getfixturevalue("deterministic")
    first, second = weights(), weights()
    assert all(torch.equal(first[name], second[name]) and torch.equal(first[name], usual[name]) for name in usual)
    assert all(bool(torch.isfinite(x).all()) for x in first.values())
