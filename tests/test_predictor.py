"""Predictor and PredictedModel: from images in any form to a saved, reloaded classifier."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pudnet
from pudnet import checkpoint, heads
from pudnet.checkpoint import PRETRAINED
from pudnet.errors import CheckpointError, DtypeError, InputError, ShapeError
from pudnet.predicted import Classification
from pudnet.stages import STAGES, StageClock

SIDE = 16


def coloured(per_class: int, classes: int = 3, seed: int = 0, side: int = SIDE) -> tuple[Tensor, Tensor]:
    """Noise around one colour per class, in class order: uint8 [n, side, side, 3], int64 [n]."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(60, 196, (classes, 3), generator=torch.Generator().manual_seed(99))
    labels = torch.arange(classes).repeat_interleave(per_class)
    noise = torch.randint(-50, 51, (len(labels), side, side, 3), generator=generator)
    return (colours[labels][:, None, None] + noise).clamp(0, 255).to(torch.uint8), labels


def tiny_net(target: str | nn.Module = "convnet3") -> pudnet.PudNet:
    return pudnet.PudNet(target, image_size=SIDE, width=8, generator_width=2)


class Plain(nn.Module):
    """A network without a method feature_maps, with a weight that two layers share and a learned last layer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width, track_running_stats=False)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.third = nn.Conv2d(width, width, 3, padding=1)
        self.third.weight = self.second.weight
        self.last = nn.Linear(width, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = self.third(self.second(x).relu())
        return self.last(x.mean((2, 3)))


@pytest.fixture(scope="module")
def predictor() -> pudnet.Predictor:
    return pudnet.Predictor(tiny_net())


@pytest.fixture(scope="module")
def model(predictor: pudnet.Predictor) -> pudnet.PredictedModel:
    return predictor.predict(*coloured(20))


def logits_of(model: pudnet.PredictedModel, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(model.preprocess(images))


# ---- predict ----------------------------------------------------------------------------------------------------


def test_predicts_a_classifier_that_works(model: pudnet.PredictedModel) -> None:
    images, labels = coloured(10, seed=1)
    result = model.evaluate(images, labels)
    assert result["top1"] > 0.9 and result["n"] == 30
    assert {name: row["n"] for name, row in result["per_class"].items()} == {"0": 10, "1": 10, "2": 10}
    assert model.report["expected_accuracy"] > 0.9
    assert not model.training and logits_of(model, images).shape == (30, 3)


@pytest.mark.parametrize("head", ["cosine", "ridge", "ridge-last", "kernel"])
def test_every_head(predictor: pudnet.Predictor, head: str) -> None:
    model = predictor.predict(*coloured(8), head=head)
    assert model.report["head"]["name"] == head
    assert model.evaluate(*coloured(4, seed=2))["top1"] > 0.8


def test_the_head_follows_from_the_images(predictor: pudnet.Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = coloured(20)
    model = predictor.predict(images, labels)
    assert model.head.name == model.report["head"]["name"] == "kernel"
    assert model.report["provenance"]["head"] == "auto"
    assert predictor.remake(model.report, images, labels).head.name == "kernel"
    assert predictor.predict(images, labels, growable=True).head.name == "ridge"
    assert predictor.predict_batch([(images, labels)])[0].head.name == "kernel"
    monkeypatch.setattr(heads, "KERNEL_ROWS", 59)
    assert predictor.predict(images, labels).head.name == "ridge"
    with pytest.raises(InputError, match=r"at most 59 images; got 60.*ridge"):
        predictor.predict(images, labels, head="kernel")


def test_all_forms_of_input_give_the_same_model(predictor: pudnet.Predictor, tmp_path: Path) -> None:
    images, labels = coloured(6)
    np.savez(tmp_path / "set.npz", x_train=images.numpy(), y_train=labels.numpy())
    pairs = torch.utils.data.TensorDataset(images.permute(0, 3, 1, 2), labels)  # [3, H, W] each
    sources: list[tuple[Any, ...]] = [
        (images, labels),
        (images.numpy(), labels.numpy()),
        (tmp_path / "set.npz",),
        (str(tmp_path / "set.npz"),),
        (pairs,),
        (torch.utils.data.DataLoader(pairs, batch_size=5),),
    ]
    outputs = [logits_of(predictor.predict(*source), images) for source in sources]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=0, atol=1e-5)


def test_folder(predictor: pudnet.Predictor, tmp_path: Path) -> None:
    from PIL import Image

    images, labels = coloured(5, side=23)
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        folder = tmp_path / f"class {label}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(image.numpy()).save(folder / f"{number:03}.png")
    (tmp_path / "class 1" / "broken.jpg").write_bytes(b"no image")
    model = predictor.predict(tmp_path)
    assert model.classes == ("class 0", "class 1", "class 2")
    assert model.report["n"] == 15 and model.report["class_counts"] == dict.fromkeys(model.classes, 5)
    assert [Path(file).name for file, _ in model.report["skipped"]] == ["broken.jpg"]
    result = model.evaluate(tmp_path)
    assert result["n"] == 15 and len(result["skipped"]) == 1
    json.dumps([model.report, result])
    (tmp_path / "outside" / "in").mkdir(parents=True)
    (tmp_path / "class 0").rename(tmp_path / "outside" / "in" / "class 0")
    (tmp_path / "linked").mkdir()
    for number in range(3):
        goal = tmp_path / ("outside/in" if number == 0 else ".") / f"class {number}"
        (tmp_path / "linked" / f"class {number}").symlink_to(goal)
    opened = pudnet.data.open_images(tmp_path / "linked", size=SIDE, follow_symlinks=True)
    followed = predictor.predict(opened, cancel=threading.Event())
    assert torch.equal(logits_of(followed, images), logits_of(model, images))
    assert len(followed.report["skipped"]) == 1


def test_seed_decides_everything(predictor: pudnet.Predictor) -> None:
    images, labels = coloured(20)
    first, again = (predictor.predict(images, labels, seed=3, sketch_size=12) for _ in range(2))
    other = predictor.predict(images, labels, seed=4, sketch_size=12)
    assert torch.equal(logits_of(first, images), logits_of(again, images))
    assert not torch.equal(logits_of(first, images), logits_of(other, images))


def test_nothing_of_the_caller_changes() -> None:
    net = tiny_net().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    images, labels = coloured(6)
    copies = images.clone(), labels.clone()
    state = torch.get_rng_state()
    model = pudnet.Predictor(net).predict(images, labels)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert net.training and all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(images, copies[0]) and torch.equal(labels, copies[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_predicted_model_can_be_trained_further(model: pudnet.PredictedModel) -> None:
    ours = copy.deepcopy(model)
    images, labels = coloured(2)
    nn.functional.cross_entropy(ours(ours.preprocess(images)), labels).backward()
    weight = next(iter(ours.network.parameters()))
    assert weight.grad is not None and bool(weight.grad.abs().sum() > 0)


def test_report(predictor: pudnet.Predictor) -> None:
    images, labels = coloured(4)
    report = predictor.predict(images[:-3], labels[:-3], sketch_size=7, seed=5).report  # one image of the last class
    assert list(report["seconds"]) == [*STAGES, "total"]
    stages = sum(report["seconds"][name] for name in STAGES)
    assert 0.5 * report["seconds"]["total"] <= stages <= report["seconds"]["total"] + 1e-6
    assert report["n"] == 9 and report["class_counts"] == {"0": 4, "1": 4, "2": 1}
    assert any("'2'" in text for text in report["warnings"])
    provenance = report["provenance"]
    assert provenance["seed"] == 5 and provenance["sketch_images"] == 7 and provenance["target"] == "convnet3"
    assert provenance["pudnet"] == pudnet.__version__
    json.dumps(report)


def test_stages_count_exclusively(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("pudnet.stages.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slow() -> Any:
        for _ in range(2):
            now[0] += 10
            yield 0

    clock = StageClock()
    with clock.stage("head"):
        now[0] += 1
        for _ in clock.iterate("reading", slow()):
            now[0] += 3
    now[0] += 100
    assert clock.seconds == {"reading": 20, "sketch": 0, "weights": 0, "directions": 0, "calibration": 0, "head": 7}
    assert clock.total() == 127


# ---- BatchNorm --------------------------------------------------------------------------------------------------


def test_calibrated_answers_do_not_depend_on_the_batch(model: pudnet.PredictedModel) -> None:
    images, _ = coloured(4, seed=3)
    torch.testing.assert_close(logits_of(model, images)[:2], logits_of(model, images[:2]), rtol=0, atol=1e-4)


def test_policies_survive_saving(predictor: pudnet.Predictor, tmp_path: Path) -> None:
    images, labels = coloured(6)
    outputs = {}
    for policy in ("calibrated", "batch", "shared"):
        model = predictor.predict(images, labels, batchnorm=policy)
        model.save(tmp_path / policy)
        loaded = pudnet.load(tmp_path / policy)
        outputs[policy] = logits_of(model, images)
        assert torch.equal(outputs[policy], logits_of(loaded, images)) and loaded.batchnorm == policy
        depends = not torch.allclose(outputs[policy][:3], logits_of(loaded, images[:3]), atol=1e-3)
        assert depends == (policy == "batch")
    assert not torch.equal(outputs["calibrated"], outputs["shared"])


def test_batch_statistics_are_those_of_mixed_batches(predictor: pudnet.Predictor) -> None:
    """Batches of a single class would have its colour normalised away, in training and in evaluation."""
    images, labels = coloured(256, classes=2)
    model = predictor.predict(images, labels, batchnorm="batch", sketch_size=50)
    order = torch.randperm(512, generator=torch.Generator().manual_seed(1))
    answers = model.classify(images[order]).labels
    right = [int(answer) == label for answer, label in zip(answers, labels[order].tolist(), strict=True)]
    assert sum(right) > 0.98 * 512
    assert model.evaluate(images, labels)["top1"] > 0.95


# ---- sketches ---------------------------------------------------------------------------------------------------


def test_own_sketch_and_merged_sketches(predictor: pudnet.Predictor) -> None:
    images, labels = coloured(20)
    whole = predictor.sketch(images, labels, size=12, seed=1)
    given = predictor.predict(images, labels, sketch=whole)
    own = predictor.predict(images, labels, sketch_size=12, seed=1)
    assert torch.equal(next(given.network.parameters()), next(own.network.parameters()))

    parts = [predictor.sketch(images[part::2], labels[part::2], size=12, seed=1, stream=part) for part in range(2)]
    merged = pudnet.Sketch.merge(*parts)
    assert len(merged) == 12 and predictor.predict(images, labels, sketch=merged).evaluate(images, labels)["n"] == 60


def test_foreign_sketch_decides_the_weights_alone(predictor: pudnet.Predictor) -> None:
    images, labels = coloured(20)
    foreign = predictor.sketch(255 - images, labels)
    model = predictor.predict(images, labels, sketch=foreign)
    norm = next(layer for layer in model.network.modules() if isinstance(layer, torch.nn.BatchNorm2d))
    before = model.network.get_submodule("convs.0")(model.preprocess(images))  # what the norm was calibrated on
    torch.testing.assert_close(norm.running_mean, before.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimize", [False, True])
def test_batch_equals_one_at_a_time(predictor: pudnet.Predictor, optimize: bool) -> None:
    several = pudnet.Predictor(predictor.net, optimize=optimize)
    first, second = coloured(20), coloured(12, side=20)
    models = several.predict_batch([first, second], sketch_size=12, seed=3)
    for model, (images, labels) in zip(models, (first, second), strict=True):
        alone = predictor.predict(images, labels, sketch_size=12, seed=3)
        x = model.preprocess(images)
        torch.testing.assert_close(model(x), alone(x), rtol=1e-3, atol=1e-3)
        seconds = model.report["seconds"]
        assert seconds["weights"] > 0 and math.isclose(seconds["total"], sum(seconds[name] for name in STAGES))


def test_batch_refuses(predictor: pudnet.Predictor) -> None:
    with pytest.raises(InputError, match="at least one"):
        predictor.predict_batch([])
    with pytest.raises(InputError, match="head"):
        predictor.predict_batch([coloured(4)], head="tree")
    with pytest.raises(InputError, match="optimize=True"):
        predictor.generate(coloured(4)[0], out=torch.empty(3))


def test_sketch_without_labels(predictor: pudnet.Predictor) -> None:
    images, labels = coloured(10, side=20)
    sketch = predictor.sketch(images, size=9)
    assert sketch.labels is None and tuple(sketch.images.shape) == (9, SIDE, SIDE, 3)
    predictor.predict(images, labels, sketch=sketch)


# ---- use --------------------------------------------------------------------------------------------------------


def test_classify(model: pudnet.PredictedModel) -> None:
    images, labels = coloured(15, seed=4, side=21)
    answers = model.classify(images)
    assert isinstance(answers, Classification)
    assert answers.probabilities.shape == (45, 3)
    torch.testing.assert_close(answers.probabilities.sum(1), torch.ones(45))
    assert answers.labels == [model.classes[index] for index in answers.probabilities.argmax(1).tolist()]
    assert sum(answer == str(label) for answer, label in zip(answers.labels, labels.tolist(), strict=True)) > 40
    one = model.classify(images.numpy()[:1])
    torch.testing.assert_close(one.probabilities, answers.probabilities[:1], rtol=0, atol=1e-4)
    mixed = model.classify([images[0], torch.zeros(40, 9, dtype=torch.uint8)])
    assert len(mixed.labels) == 2
    assert model.classify(images[:0]).probabilities.shape == (0, 3)


def test_wrong_images(model: pudnet.PredictedModel) -> None:
    with pytest.raises(DtypeError, match="uint8"):
        model.classify(torch.rand(2, SIDE, SIDE, 3))
    with pytest.raises(ShapeError, match="preprocess"):
        model(torch.zeros(2, SIDE, SIDE, 3))
    with pytest.raises(DtypeError, match="preprocess"):
        model(torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8))


def test_evaluate_counts(predictor: pudnet.Predictor) -> None:
    images, labels = coloured(5, classes=6)
    model = predictor.predict(images, labels)
    few = model.evaluate(images[:7], labels[:7])
    assert few["n"] == 7 and set(few["per_class"]) == {"0", "1"} and few["top5"] >= few["top1"]
    probabilities = model.classify(images[:7]).probabilities
    right = (probabilities.argmax(1) == labels[:7]).double().mean().item()
    own = probabilities[torch.arange(7), labels[:7]]
    assert few["top1"] == pytest.approx(right) and few["nll"] == pytest.approx(-own.log().mean().item(), abs=1e-5)
    with pytest.raises(InputError, match="classes"):
        model.evaluate(images[:2], torch.tensor([0, 6]))


# ---- saving -----------------------------------------------------------------------------------------------------


def test_save_and_load(model: pudnet.PredictedModel, tmp_path: Path) -> None:
    images, _ = coloured(5, seed=7)
    model.save(tmp_path / "model.safetensors")
    state = torch.get_rng_state()
    loaded = pudnet.load(tmp_path / "model.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits_of(loaded, images), logits_of(model, images))
    assert loaded.classes == model.classes and loaded.report == model.report
    assert loaded.preprocess == model.preprocess and not loaded.training


def test_any_module_as_target(tmp_path: Path) -> None:
    net = tiny_net(Plain())
    images, labels = coloured(8)
    model = pudnet.Predictor(net).predict(images, labels)
    model.save(tmp_path / "model")
    target = Plain()
    loaded = pudnet.load(tmp_path / "model", target=target)
    assert torch.equal(logits_of(loaded, images), logits_of(model, images))
    assert loaded.network is not target and target.norm.running_mean is None
    with pytest.raises(CheckpointError, match="target"):
        pudnet.load(tmp_path / "model")
    with pytest.raises(CheckpointError, match="fits"):
        pudnet.load(tmp_path / "model", target=Plain(width=4))


def test_load_refuses_other_files(model: pudnet.PredictedModel, tmp_path: Path) -> None:
    path = tmp_path / "model"
    model.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError):
        pudnet.load(path)
    tiny_net().save(path)
    with pytest.raises(CheckpointError, match="model"):
        pudnet.load(path)
    with pytest.raises(InputError, match="missing"):
        pudnet.load(tmp_path / "missing")
    with pytest.raises(InputError, match="folder"):
        model.save(tmp_path / "no folder" / "model")


def test_load_refuses_a_model_whose_parts_do_not_fit(model: pudnet.PredictedModel, tmp_path: Path) -> None:
    path = tmp_path / "model"
    model.save(path)
    config, tensors = checkpoint.load(path, "model")
    name = "norms.1.running_mean"
    changes: list[tuple[dict[str, Any], dict[str, Tensor]]] = [
        (config, {key: tensor for key, tensor in tensors.items() if key != name}),
        (config, {**tensors, name: torch.zeros(5)}),
        ({**config, "classes": ["a"]}, tensors),
        ({**config, "classes": "abc"}, tensors),
        ({**config, "report": "text"}, tensors),
    ]
    for wrong_config, wrong_tensors in changes:
        checkpoint.save(path, "model", wrong_config, wrong_tensors)
        with pytest.raises(CheckpointError, match="fits"):
            pudnet.load(path)


# ---- where hypernetworks come from ------------------------------------------------------------------------------


def test_from_pretrained_path(tmp_path: Path) -> None:
    path = tmp_path / "predictor.safetensors"
    tiny_net().save(path)
    for name in (path, str(path), tmp_path):
        provenance = pudnet.Predictor.from_pretrained(name).predict(*coloured(2)).report["provenance"]
        assert provenance["checkpoint"] == str(name)
        assert provenance["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_path_then_bundled_name_then_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundled, hub = tmp_path / "bundled", tmp_path / "hub"
    for number, folder in enumerate((bundled, hub)):
        folder.mkdir()
        net = pudnet.PudNet("convnet3", image_size=SIDE, width=8 * (number + 1), generator_width=2)
        net.save(folder / ("owner-name.safetensors" if folder == bundled else "predictor.safetensors"))
    monkeypatch.setattr("pudnet.checkpoint.PRETRAINED", bundled)
    asked = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(hub / file)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=download))
    monkeypatch.chdir(tmp_path)
    assert pudnet.list_pretrained() == ["owner-name"]
    assert pudnet.Predictor.from_pretrained("owner-name").net.config.width == 8
    assert not asked
    assert pudnet.Predictor.from_pretrained("owner/name").net.config.width == 16
    assert asked == [("owner/name", "predictor.safetensors")]
    pudnet.PudNet("convnet3", image_size=SIDE, width=4, generator_width=2).save(tmp_path / "owner-name")
    assert pudnet.Predictor.from_pretrained("owner-name").net.config.width == 4


def test_from_pretrained_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_net().save(tmp_path / "known.safetensors")
    monkeypatch.setattr("pudnet.checkpoint.PRETRAINED", tmp_path)
    for name in ("nonesuch", "a/b/c", tmp_path, "folder/missing.safetensors", ""):
        with pytest.raises(InputError, match="known"):
            pudnet.Predictor.from_pretrained(name)

    def unreachable(repository: str, file: str) -> str:
        raise OSError("no network\nat all")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=unreachable))
    with pytest.raises(InputError, match="no network at all"):
        pudnet.Predictor.from_pretrained("owner/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="pip install huggingface_hub"):
        pudnet.Predictor.from_pretrained("owner/name")


def test_bad_arguments(predictor: pudnet.Predictor) -> None:
    images, labels = coloured(2)
    with pytest.raises(InputError, match="'ridge'"):
        predictor.predict(images, labels, head="forest")
    with pytest.raises(InputError, match="calibrated"):
        predictor.predict(images, labels, batchnorm="none")
    with pytest.raises(InputError, match="Sketch"):
        predictor.predict(images, labels, sketch=images)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="labels"):
        predictor.predict(images)
    with pytest.raises(InputError, match="PudNet"):
        pudnet.Predictor("convnet3")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="capacity"):
        predictor.predict(images, labels, sketch_size=0)


@pytest.mark.skipif(
    not (PRETRAINED / "convnet3.safetensors").is_file(), reason="the bundled checkpoint is not there yet"
)
def test_bundled_checkpoint() -> None:
    assert "convnet3" in pudnet.list_pretrained()
    assert (PRETRAINED / "convnet3.safetensors").stat().st_size <= 8e6
    from pudnet.demo import load_digits

    digits = load_digits()
    model = pudnet.Predictor.from_pretrained("convnet3").predict(*digits.train)
    top1 = model.evaluate(*digits.test)["top1"]
    assert top1 > 0.96 and abs(top1 - model.report["expected_accuracy"]) < 0.02


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (nn.Sequential(nn.Conv2d(1, 4, 3)), "1 channels"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(5, 2)), "shapes cannot be multiplied"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)).double(), "double"),
    ],
)
def test_a_target_that_cannot_read_the_images_is_refused_at_once(target: nn.Module, words: str) -> None:
    with pytest.raises(InputError, match=rf"network that reads .*3, {SIDE}, {SIDE}.*{words}"):
        pudnet.Predictor(tiny_net(target))


def test_sketch_without_labels_takes_every_form_of_array(predictor: pudnet.Predictor) -> None:
    images, _ = coloured(100)
    wanted = predictor.sketch(images, size=9).images
    for given in (images.numpy(), images.permute(0, 3, 1, 2), images.float() / 255, images.double().numpy() / 255):
        assert torch.equal(predictor.sketch(given, size=9).images, wanted)
