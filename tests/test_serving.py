"""Many requests: errors of some datasets, threads, cancellation, memory that runs out."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stress.serving import SIDE, Countdown, Endless, memory_for, small_dataset, small_predictor
from torch import Tensor

import pudnet
from pudnet import features as features_module
from pudnet import predicted as predicted_module
from pudnet.errors import InputError
from pudnet.features import feature_maps
from pudnet.serving import AnyToken, Halves, is_out_of_memory

GOOD = [small_dataset(number) for number in range(4)]


@pytest.fixture(scope="module")
def predictor() -> pudnet.Predictor:
    return small_predictor()


def same(first: pudnet.PredictedModel, second: pudnet.PredictedModel, tolerance: float = 1e-3) -> bool:
    with torch.no_grad():
        x = first.preprocess(GOOD[3][0])
        return torch.allclose(first(x), second(x), rtol=tolerance, atol=tolerance)


# ---- errors of some ---------------------------------------------------------------------------------------------


def test_many_are_those_of_predict_in_order(predictor: pudnet.Predictor) -> None:
    ready: dict[int, Any] = {}
    models = predictor.predict_many(GOOD, workers=3, on_result=ready.__setitem__, seed=5)
    assert sorted(ready) == [0, 1, 2, 3] and all(ready[number] is models[number] for number in ready)
    for dataset, model in zip(GOOD, models, strict=True):
        assert same(model, predictor.predict(*dataset, seed=5), 0.0)


@pytest.mark.parametrize("method", ["predict_many", "predict_batch"])
def test_bad_datasets_do_not_disturb_the_others(predictor: pudnet.Predictor, method: str) -> None:
    images, labels = GOOD[1]
    given = [GOOD[0], (images, labels[:-1]), GOOD[2], "no such folder"]
    with pytest.raises(pudnet.DatasetErrors, match=f"{method}: 2 of 4 datasets failed") as caught:
        getattr(predictor, method)(given)
    errors = caught.value
    assert isinstance(errors, pudnet.PudnetError)
    assert [type(result) for result in errors.results[::2]] == [pudnet.PredictedModel] * 2
    assert same(errors.results[2], predictor.predict(*GOOD[2]))
    assert [errors.results[1], errors.results[3]] == list(errors.exceptions)
    assert errors.exceptions[1].__notes__ == ["in dataset 3 of 4, counted from 0"]
    assert "no such folder" in "".join(traceback.format_exception(errors))
    bad_shapes, rest = errors.split(pudnet.errors.ShapeError)
    assert bad_shapes is not None and len(bad_shapes.exceptions) == 1 and bad_shapes.results is errors.results
    assert rest is not None and isinstance(rest, pudnet.DatasetErrors)


def test_all_may_be_bad(predictor: pudnet.Predictor) -> None:
    for method in (predictor.predict_many, predictor.predict_batch):
        with pytest.raises(pudnet.DatasetErrors, match="1 of 1"):
            method(["no such folder"])


def test_many_refuses(predictor: pudnet.Predictor) -> None:
    with pytest.raises(InputError, match="datasets must be a list of at least one"):
        predictor.predict_many([])
    with pytest.raises(InputError, match="workers must be at least 1; got 0"):
        predictor.predict_many(GOOD, workers=0)
    with pytest.raises(InputError, match="head"):
        predictor.predict_many(GOOD, head="tree")


# ---- stopping ---------------------------------------------------------------------------------------------------


def test_cancelled_in_the_middle_of_a_stream(predictor: pudnet.Predictor) -> None:
    token = threading.Event()
    threading.Timer(0.1, token.set).start()
    with pytest.raises(pudnet.Cancelled):
        predictor.predict(Endless(GOOD[0], 0.005), cancel=token)
    with pytest.raises(pudnet.Cancelled):
        predictor.predict_batch(GOOD, cancel=Countdown(20))


def test_adding_is_cancelled(predictor: pudnet.Predictor) -> None:
    model = predictor.predict(*GOOD[0], growable=True)
    with pytest.raises(pudnet.Cancelled):
        model.add(Endless(GOOD[1], 0.0), cancel=Countdown(20))
    assert same(model.add(*GOOD[1], cancel=threading.Event()), model.add(*GOOD[1]), 0.0)


def test_many_are_cancelled_together(predictor: pudnet.Predictor) -> None:
    token, ready, threads = threading.Event(), [], threading.active_count()

    def first_is_ready(number: int, result: object) -> None:
        ready.append(number)
        token.set()

    with pytest.raises(pudnet.Cancelled):
        predictor.predict_many([GOOD[0], *[Endless(GOOD[1], 0.005)] * 3], cancel=token, on_result=first_is_ready)
    assert ready == [0] and threading.active_count() <= threads


def test_out_of_time_is_an_error_of_one(predictor: pudnet.Predictor) -> None:
    with pytest.raises(pudnet.DatasetErrors) as caught:
        predictor.predict_many([Endless(GOOD[0], 0.005), GOOD[1]], timeout=1.0)
    late, model = caught.value.results
    assert isinstance(late, pudnet.Cancelled) and isinstance(model, pudnet.PredictedModel)


class Interrupted(Endless):
    """Ctrl-C after a few items."""

    def __iter__(self) -> Iterator[Any]:
        for number, item in enumerate(super().__iter__()):
            if number == 20:
                os.kill(os.getpid(), signal.SIGINT)
            yield item


def test_interrupt_ends_it_and_leaves_nothing(
    predictor: pudnet.Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    threads = threading.active_count()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs
    try:
        with pytest.raises(KeyboardInterrupt):
            predictor.predict(Interrupted(GOOD[0], 0.001)).save("model.safetensors")
        with pytest.raises(KeyboardInterrupt):
            predictor.predict_many([Interrupted(GOOD[0], 0.001), *[Endless(GOOD[1], 0.005)] * 3])
    finally:
        signal.signal(signal.SIGINT, before)
    assert threading.active_count() <= threads and list(tmp_path.iterdir()) == []


def test_tokens() -> None:
    first, second = threading.Event(), threading.Event()
    either = AnyToken(first, None, second)
    assert not either.is_set()
    second.set()
    assert either.is_set()
    assert AnyToken(seconds=-1.0).is_set() and not AnyToken(seconds=100.0).is_set()


# ---- memory -----------------------------------------------------------------------------------------------------


def test_halves_give_every_item_once_in_order() -> None:
    for memory in (1, 3, 8, 100):
        tried: list[int] = []

        def limited(part: Sequence[object], memory: int = memory, tried: list[int] = tried) -> list[object]:
            tried.append(len(part))
            if len(part) > memory:
                raise MemoryError
            return list(part)

        halves = Halves()
        for _ in range(2):
            parts = list(halves.run(limited, list(range(21))))
            assert [item for part, _ in parts for item in part] == list(range(21))
            assert [len(part) for part, _ in parts] == [count for _, count in parts]
        assert len([size for size in tried if size > memory]) <= 5  # what failed once is not tried again
        assert halves.limit is None if memory == 100 else halves.limit <= memory


def test_other_errors_are_not_tried_again() -> None:
    tried = []

    def fails(part: list[int]) -> None:
        tried.append(part)
        raise MemoryError if len(part) == 1 else RuntimeError("shapes differ")

    for batch, error in (([1, 2], RuntimeError), ([1], MemoryError)):
        with pytest.raises(error):
            list(Halves().run(fails, batch))
    assert tried == [[1, 2], [1]]


def test_knows_how_memory_runs_out() -> None:
    for allocate in (lambda: torch.empty(10**15), lambda: np.empty(10**15)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(ValueError())


@pytest.fixture
def memory_for_ten(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (predicted_module, features_module):
        monkeypatch.setattr(module, "feature_maps", memory_for(10))


def test_images_are_read_in_halves(predictor: pudnet.Predictor, memory_for_ten: None) -> None:
    model = predictor.predict(*GOOD[3])
    assert model.report["warnings"] == ["memory ran out: 7 images were read at a time"]  # of 15
    assert model.evaluate(*GOOD[3])["n"] == 15
    with pytest.raises(torch.OutOfMemoryError):  # halves would have other statistics
        predictor.predict(*GOOD[3], batchnorm="batch")


def test_calibration_in_halves(predictor: pudnet.Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    many = np.concatenate([GOOD[3][0]] * 10), np.concatenate([GOOD[3][1]] * 10)
    expected, forward = predictor.predict(*many), type(predictor.net.target).feature_maps
    monkeypatch.setattr("pudnet.predicted.CPU_PIXELS", 0)  # batches of 32 later on

    def limited(self: Any, x: Tensor) -> list[Tensor]:
        if len(x) > 50:
            raise torch.OutOfMemoryError
        return forward(self, x)

    monkeypatch.setattr(type(predictor.net.target), "feature_maps", limited)
    model = predictor.predict(*many)
    assert model.report["warnings"] == ["memory ran out: BatchNorm is calibrated on batches of 37 images"]  # 150 / 4
    assert same(model, expected, 0.3)


def test_weights_of_a_batch_in_halves(predictor: pudnet.Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, generate, asked = predictor.predict_batch(GOOD[:3]), predictor.net.generate, []

    def limited(sketches: list[Any]) -> dict[str, Tensor]:
        asked.append(len(sketches))
        if len(sketches) > 1:
            raise torch.OutOfMemoryError
        return generate(sketches)

    monkeypatch.setattr(predictor.net, "generate", limited)
    models = predictor.predict_batch(GOOD[:3])
    assert asked == [3, 1, 1, 1]
    assert all(same(model, wanted) for model, wanted in zip(models, expected, strict=True))


def test_answers_in_halves(predictor: pudnet.Predictor, memory_for_ten: None) -> None:
    model = predictor.predict(*GOOD[0])
    images = np.zeros((25, SIDE, SIDE, 3), dtype=np.uint8)
    found = model.classify(images).probabilities
    assert found.shape == (25, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features_module, "feature_maps", feature_maps)
        torch.testing.assert_close(found, model.classify(images).probabilities)
