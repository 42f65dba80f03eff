"""Fine-tuning a predicted model: where it starts, what it changes, and runs that are stopped and resumed."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_predictor import coloured, logits_of, tiny_net
from torch import Tensor

import pudnet
from pudnet import checkpoint, finetuning
from pudnet.descent import CurvePoint
from pudnet.errors import Cancelled, CheckpointError, InputError


@pytest.fixture(scope="module")
def predictor() -> pudnet.Predictor:
    return pudnet.Predictor(tiny_net())


@pytest.fixture(scope="module")
def model(predictor: pudnet.Predictor) -> pudnet.PredictedModel:
    return predictor.predict(*coloured(20), growable=True)


def hard(per_class: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images whose class is a faint tint, and not easy to see."""
    images, labels = coloured(per_class, seed=seed)
    generator = torch.Generator().manual_seed(100 + seed)
    noise = torch.randint(0, 256, images.shape, generator=generator)
    return ((images.long() + 7 * noise) // 8).to(torch.uint8), labels


def assert_equal(first: pudnet.PredictedModel, second: pudnet.PredictedModel) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("head", ["ridge", "ridge-last", "cosine"])
def test_starts_from_what_was_predicted(predictor: pudnet.Predictor, head: str) -> None:
    model, test = predictor.predict(*hard(20), head=head, views="single"), hard(30, seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tunable = finetuning._Tunable(model.network, model.head, model.views).eval()
    x = model.preprocess(test[0])
    with torch.no_grad():
        torch.testing.assert_close(tunable(x), model(x), atol=1e-4, rtol=1e-4)
    tuned = pudnet.finetune(model, *hard(20), lr=1e-9, batch_size=16, test=test, validation=0)
    torch.testing.assert_close(logits_of(tuned, test[0]), logits_of(model, test[0]), atol=0.05, rtol=0.05)
    (first, began, top1), (last, ended, _) = tuned.report["finetuning"]["curve"]
    assert (first, top1, last) == (0, model.evaluate(*test)["top1"], 1)
    assert 0 < began < ended
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_kernel_head_is_replaced_for_training_and_comes_back(
    predictor: pudnet.Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = predictor.predict(*hard(20))
    assert model.head.name == "kernel"
    tuned = pudnet.finetune(model, *hard(20), lr=1e-9, batch_size=16, validation=0)
    assert tuned.head.name == "kernel" and tuned.report["finetuning"]["kept"] == 1
    torch.testing.assert_close(logits_of(tuned, hard(30)[0]), logits_of(model, hard(30)[0]), atol=0.05, rtol=0.05)
    monkeypatch.setattr(finetuning, "KERNEL_ROWS", 59)  # more images than the head could keep
    assert pudnet.finetune(model, *hard(20), batch_size=16, validation=0).head.name == "ridge"
    monkeypatch.setattr(finetuning, "_better", lambda *_: False)
    same = pudnet.finetune(model, *hard(20), batch_size=16)  # what was kept is what the curve began with
    assert same.report["finetuning"]["kept"] == 0 and same.head.name == "ridge"
    ours, theirs = same.network.state_dict(), model.network.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_changes_everything_and_says_so(model: pudnet.PredictedModel, tmp_path: Path) -> None:
    images, labels = hard(20)
    tuned = pudnet.finetune(model, images, labels, epochs=4, lr=3e-3, batch_size=16, validation=0)
    assert not tuned.training and tuned.fitter is not None
    before = dict(model.network.named_parameters())
    assert not any(torch.equal(weight, before[name]) for name, weight in tuned.network.named_parameters())
    assert tuned.evaluate(images, labels)["nll"] < model.evaluate(images, labels)["nll"]
    report = json.loads(json.dumps(tuned.report))
    entry = report["finetuning"]
    assert (entry["epochs"], entry["n"], entry["kept"]) == (4, 60, 4)
    assert (entry["curve"], entry["held_out"], entry["measured_on"]) == ([], [], None)
    assert report["seconds"]["finetuning"] == entry["seconds"] > 0
    assert report["expected_accuracy"] == tuned.head.expected_accuracy
    assert "finetuning" not in model.report
    tuned.save(tmp_path / "tuned.safetensors")
    assert_equal(tuned, pudnet.load(tmp_path / "tuned.safetensors"))
    again = pudnet.finetune(tuned, images, labels)
    assert len(again.report["provenance"]["finetuned"]) == 2


def test_a_fine_tuned_model_grows_but_is_not_made_again(predictor: pudnet.Predictor) -> None:
    images, labels = coloured(10)
    tuned = pudnet.finetune(predictor.predict(images, labels, growable=True), images, labels, validation=0)
    assert tuned.add(images, labels).report["n"] == 60
    with pytest.raises(InputError, match="fine-tuned"):
        predictor.remake(tuned.report, images, labels)


def test_held_out_images_decide_what_is_returned(model: pudnet.PredictedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = hard(20)
    counts = iter([5, 4, 9, 9, 3])  # of 15: before, after each epoch
    monkeypatch.setattr(finetuning._Tuning, "_right", lambda *_: torch.arange(15) < next(counts))
    tuned = pudnet.finetune(model, images, labels, epochs=4, batch_size=15, validation=0.25)
    entry = tuned.report["finetuning"]
    assert entry["kept"] == 2 and entry["measured_on"] == "validation"
    assert [round(15 * top1) for top1 in entry["held_out"]] == [5, 4, 9, 9, 3]
    assert [round(15 * top1) for _, _, top1 in entry["curve"]] == [5, 5, 9, 9, 9]
    assert tuned.fitter is not None and tuned.head.info["images"] == 60
    assert tuned.report["expected_accuracy"] == min(tuned.head.expected_accuracy, 9 / 15)
    counts = iter([5, 4, 5])
    same = pudnet.finetune(model, images, labels, epochs=2, batch_size=15, validation=0.25)
    assert same.report["finetuning"]["kept"] == 0
    assert same.report["expected_accuracy"] == model.report["expected_accuracy"]
    assert_equal(same, model)


def test_something_has_to_be_held_out(model: pudnet.PredictedModel) -> None:
    with pytest.raises(InputError, match="validation must be 0, or"):
        pudnet.finetune(model, *hard(2))
    assert pudnet.finetune(model, *hard(2), batch_size=4, validation=0).report["finetuning"]["kept"] == 1


def test_better_is_by_more_than_a_standard_error() -> None:
    def right(*positions: int) -> Tensor:
        return torch.zeros(30, dtype=torch.bool).index_fill(0, torch.tensor(positions), True)

    assert finetuning._better(right(1, 2, 3, 4), right(1, 2))  # 2 more, 2 differ
    assert not finetuning._better(right(1, 2, 3), right(1, 2))  # 1 more, 1 differs
    assert not finetuning._better(right(1, 2, 3, 4), right(5, 6))  # 2 more, 6 differ
    assert not finetuning._better(right(1), right(1))


def test_what_is_held_out_is_not_seen_and_some_of_each_class_stays() -> None:
    labels = torch.tensor([0] * 10 + [1] * 5 + [2])
    kept, held = finetuning._split(labels, 0.4, seed=0)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(16))
    assert torch.bincount(labels[held], minlength=3).tolist() == [4, 2, 0]
    everything, nothing = finetuning._split(labels, 0.0, seed=0)
    assert len(everything) == 16 and len(nothing) == 0


@pytest.mark.parametrize("batchnorm", ["calibrated", "batch", "shared"])
def test_every_policy(predictor: pudnet.Predictor, batchnorm: str) -> None:
    images, labels = coloured(20)
    model = predictor.predict(images, labels, batchnorm="calibrated" if batchnorm == "shared" else batchnorm)
    model.batchnorm = batchnorm
    tuned = pudnet.finetune(model, images, labels, epochs=2, batch_size=16, validation=0)
    before, after = (
        {name: value for name, value in one.network.named_buffers() if "running" in name} for one in (model, tuned)
    )
    assert before.keys() == after.keys() and bool(before) == (batchnorm != "batch")
    same = [torch.equal(before[name], after[name]) for name in before]
    assert all(same) if batchnorm == "shared" else not any(same)
    assert tuned.evaluate(images, labels)["top1"] > 0.9


# ---- stopped and resumed ------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What nothing catches."""


def stop_at(step: int, stop: Callable[[], None]) -> Callable[[int, int], None]:
    def on_step(done: int, total: int) -> None:
        if done == step:
            stop()

    return on_step


def die() -> None:
    raise Killed


@pytest.mark.parametrize("validation", [0.0, 0.25])
def test_a_killed_and_resumed_run_equals_an_unbroken_one(
    model: pudnet.PredictedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, validation: float
) -> None:
    monkeypatch.setattr(finetuning, "CHECKPOINT_SECONDS", 0.0)
    path, data = tmp_path / "run.checkpoint", hard(20)
    options: dict[str, Any] = {"epochs": 3, "batch_size": 16, "flip": True, "seed": 2, "lr": 3e-3}
    options |= {"validation": validation, "test": hard(10, seed=1)}
    whole = pudnet.finetune(model, *data, **options)
    with pytest.raises(Killed):
        pudnet.finetune(model, *data, **options, checkpoint=path, on_step=stop_at(5, die))
    points: list[CurvePoint] = []
    steps: list[int] = []
    resumed = pudnet.finetune(
        model, *data, **options, checkpoint=path, resume=True, progress=points.append,
        on_step=lambda done, _: steps.append(done),
    )  # fmt: skip
    assert steps[0] == 6
    assert_equal(whole, resumed)
    first, second = (one.report["finetuning"]["curve"] for one in (whole, resumed))
    assert [[epoch, top1] for epoch, _, top1 in first] == [[epoch, top1] for epoch, _, top1 in second]
    assert [point.epoch for point in points] == [epoch for epoch, _, _ in second if epoch > 5 / (steps[-1] / 3)]
    assert_equal(whole, pudnet.finetune(model, *data, **options, checkpoint=path, resume=True))  # nothing is left to do


def test_cancelling_keeps_a_checkpoint(model: pudnet.PredictedModel, tmp_path: Path) -> None:
    path, data, asked = tmp_path / "run.checkpoint", hard(20), threading.Event()
    with pytest.raises(Cancelled):
        pudnet.finetune(
            model, *data, epochs=2, batch_size=16, checkpoint=path, cancel=asked, on_step=stop_at(2, asked.set)
        )
    assert checkpoint.load(path, finetuning.KIND)[0]["run"]["done"] == 2
    resumed = pudnet.finetune(model, *data, epochs=2, batch_size=16, checkpoint=path, resume=True)
    assert_equal(resumed, pudnet.finetune(model, *data, epochs=2, batch_size=16))


def test_refuses_to_resume_another_run(model: pudnet.PredictedModel, tmp_path: Path) -> None:
    path, (images, labels) = tmp_path / "run.checkpoint", hard(10)
    pudnet.finetune(model, images, labels, checkpoint=path)
    with pytest.raises(InputError, match="without a file"):
        pudnet.finetune(model, images, labels, checkpoint=path)
    for changed in ({"epochs": 2}, {"lr": 0.1}, {"seed": 1}):
        with pytest.raises(CheckpointError, match="settings"):
            pudnet.finetune(model, images, labels, checkpoint=path, resume=True, **changed)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="images"):
        pudnet.finetune(model, 255 - images, labels, checkpoint=path, resume=True)
    other = pudnet.finetune(model, images, labels, validation=0)
    with pytest.raises(CheckpointError, match="model"):
        pudnet.finetune(other, images, labels, checkpoint=path, resume=True)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="whole"):
        pudnet.finetune(model, images, labels, checkpoint=path, resume=True)


def test_bad_input(model: pudnet.PredictedModel) -> None:
    images, labels = coloured(4)
    for wrong, word in (
        ({"epochs": 0}, "epochs"),
        ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"batch_size": 1}, "batch_size"),
        ({"shift": -1}, "shift"),
        ({"validation": 1.0}, "validation"),
    ):
        with pytest.raises(InputError, match=word):
            pudnet.finetune(model, images, labels, **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="every class"):
        pudnet.finetune(model, images[labels > 0], labels[labels > 0])
    with pytest.raises(InputError):
        pudnet.finetune(model, "nowhere")
