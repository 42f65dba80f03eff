"""Many requests to one predictor: threads, memory, bad and slow datasets, memory that runs out, cancellation."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import pudnet
from pudnet import predicted as predicted_module
from pudnet.features import feature_maps
from pudnet.targets.convnet import ConvNet3
from stress import Figures, part

SIDE, CLASSES, DATASETS, THREADS = 8, 3, 16, 8
MIB_GROWTH = 8  # of 10,000 predictions that each hold several: what the allocator keeps may wander this much

Dataset = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def small_predictor(optimize: bool = False) -> pudnet.Predictor:
    net = pudnet.PudNet(ConvNet3(8), image_size=SIDE, width=8, generator_width=2)
    return pudnet.Predictor(net, optimize=optimize)


def small_dataset(number: int, seed: int = 0) -> Dataset:
    """Noise about one colour per class; 12 to 27 images."""
    rng = np.random.default_rng([seed, number])
    labels = np.arange(12 + number % 16) % CLASSES
    colours = rng.integers(60, 196, (CLASSES, 1, 1, 3))
    noise = rng.integers(-50, 51, (len(labels), SIDE, SIDE, 3))
    return (colours[labels] + noise).astype(np.uint8), labels


def answers(model: pudnet.PredictedModel) -> Tensor:
    """Logits ``[8, K]`` of images that are always the same."""
    images = np.random.default_rng(7).integers(0, 256, (8, SIDE, SIDE, 3), dtype=np.uint8)
    with torch.no_grad():
        return model(model.preprocess(images))


@part("threads", f"predictions by {THREADS} threads that share a predictor, against one thread's", full=4000, quick=48)
def threads(count: int, seed: int) -> Figures:
    failures = []
    datasets = [small_dataset(number, seed) for number in range(DATASETS)]
    for optimize in (False, True):
        shared = small_predictor(optimize)
        alone = [answers(shared.predict(*dataset)) for dataset in datasets]

        def differs(number: int, shared: pudnet.Predictor = shared, alone: list[Tensor] = alone) -> bool:
            found = answers(shared.predict(*datasets[number % DATASETS]))
            return not torch.equal(found, alone[number % DATASETS])

        with ThreadPoolExecutor(THREADS) as pool:
            wrong = list(pool.map(differs, range(count // 2)))
        failures += [f"optimize={optimize}, prediction {number}" for number, bad in enumerate(wrong) if bad]
    return {"threads": THREADS, "failures": failures}


@part("in a row", "predictions in a row, one process, plain and optimised in turn", full=10_000, quick=60)
def in_a_row(count: int, seed: int) -> Figures:
    predictors = [small_predictor(), small_predictor(optimize=True)]
    datasets = [small_dataset(number, seed) for number in range(DATASETS)]
    marks = {count * share // 100: f"{share} %" for share in (10, 25, 50, 75, 100)}
    resident = {}
    for number in range(count):
        predictors[number % 2].predict(*datasets[number % DATASETS])
        if number + 1 in marks:
            resident[marks[number + 1]] = round(resident_mib(), 1)
    growth = resident["100 %"] - resident["10 %"]
    failures = [f"{growth:.1f} MiB more than after a tenth of the predictions"] if growth > MIB_GROWTH else []
    return {"resident_mib_after": resident, "failures": failures}


def resident_mib() -> float:
    """MiB of memory this process holds."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


class Slow:
    """A stream of (image, label) that takes its time."""

    def __init__(self, dataset: Dataset, pause: float) -> None:
        self.items, self.pause = list(zip(*dataset, strict=True)), pause

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            time.sleep(self.pause)
            yield item


class Endless(Slow):
    """A stream that never ends."""

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from super().__iter__()


class Broken(Slow):
    """A stream that breaks in the middle, as a bug of the caller's does."""

    def __iter__(self) -> Iterator[Any]:
        yield from itertools.islice(super().__iter__(), 5)
        raise ZeroDivisionError


REQUESTS: dict[str, tuple[int, Callable[[Dataset], Any], type[Exception] | None]] = {
    # kind: (of a hundred requests, dataset -> what is asked for, the error that is right)
    "good": (84, lambda dataset: dataset, None),
    "slow": (4, lambda dataset: Slow(dataset, 0.01), None),
    "broken": (5, lambda dataset: Broken(dataset, 0.0), ZeroDivisionError),
    "bad": (5, lambda dataset: (dataset[0], dataset[1][:-1]), pudnet.InputError),
    "endless": (2, lambda dataset: Endless(dataset, 0.01), pudnet.Cancelled),
}
TIMEOUT = 10.0  # seconds; many times what a good request takes on a busy machine


@part(
    "load",
    f"requests, {THREADS} threads; some are slow, wrong, break or never end",
    full=4000,
    quick=40,
)
def load(count: int, seed: int) -> Figures:
    shared = small_predictor(optimize=True)
    datasets = [small_dataset(number, seed) for number in range(DATASETS)]
    expected = [answers(shared.predict(*dataset)) for dataset in datasets]
    shares = [share for share, _, _ in REQUESTS.values()]
    kinds = random.Random(seed).choices(list(REQUESTS), shares, k=count - len(REQUESTS)) + list(REQUESTS)
    asked = [REQUESTS[kind][1](datasets[number % DATASETS]) for number, kind in enumerate(kinds)]
    start = time.monotonic()
    try:
        shared.predict_many(asked, workers=THREADS, timeout=TIMEOUT)
        results: list[Any] = []
    except pudnet.DatasetErrors as errors:
        results = list(errors.results)
    seconds = time.monotonic() - start
    failures = []
    for number, (kind, result) in enumerate(zip(kinds, results, strict=True)):
        error = REQUESTS[kind][2]
        right = isinstance(result, pudnet.PredictedModel if error is None else error)
        if not right or (error is None and not torch.equal(answers(result), expected[number % DATASETS])):
            failures.append(f"request {number}, {kind}: {result!r:.200}")
    models = [result for kind, result in zip(kinds, results, strict=True) if kind == "good" and not failures]
    good = [model.report["seconds"]["total"] for model in models] or [float("nan")]
    percentiles = zip((50, 90, 99, 100), np.percentile(good, (50, 90, 99, 100)), strict=True)
    return {
        "threads": THREADS,
        "requests_of_each_kind": {kind: kinds.count(kind) for kind in REQUESTS},
        "requests_a_second": round(count / seconds, 1),
        "latency_ms_of_good_requests_percentiles": {f"p{of}": round(1e3 * value, 1) for of, value in percentiles},
        "failures": failures,
    }


def memory_for(images: int) -> Callable[[nn.Module, Tensor], list[Tensor]]:
    """``feature_maps`` on a machine whose memory is used up by more than so many images."""

    def limited(network: nn.Module, x: Tensor) -> list[Tensor]:
        if len(x) > images:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return feature_maps(network, x)

    return limited


@part("memory", "predictions while memory holds only so many images, drawn at random", full=400, quick=12)
def memory(count: int, seed: int) -> Figures:
    draws = random.Random(seed)
    shared = small_predictor()
    failures, halved = [], 0
    for number in range(count):
        dataset = small_dataset(number, seed)
        limit = draws.randint(1, 24)
        expected = answers(shared.predict(*dataset))
        with mock.patch.object(predicted_module, "feature_maps", memory_for(limit)):
            model = shared.predict(*dataset)
        halved += bool(model.report["warnings"])
        # Fewer rows at once are multiplied in another order: the same numbers but for rounding.
        if not torch.allclose(answers(model), expected, rtol=1e-3, atol=1e-3):
            failures.append(f"prediction {number}, memory for {limit} images")
    return {"predictions_that_ran_out": halved, "failures": failures}


class Countdown:
    """A token that is set when it has been looked at so many times."""

    def __init__(self, looks: int) -> None:
        self.left = looks

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


@part("cancel", "predictions cancelled at a random moment; the next one must be as ever", full=2000, quick=24)
def cancel(count: int, seed: int) -> Figures:
    draws = random.Random(seed)
    shared = small_predictor(optimize=True)
    dataset = small_dataset(0, seed)
    expected = answers(shared.predict(*dataset))
    whole = Countdown(1000)
    shared.predict(*dataset, cancel=whole)
    looks = 1000 - whole.left
    failures = []
    for number in range(count):
        given: Any = dataset if number % 2 else (Slow(dataset, 0.0),)
        try:
            shared.predict(*given, cancel=Countdown(draws.randrange(looks)))
            failures.append(f"prediction {number} was not cancelled")
        except pudnet.Cancelled:
            pass
        if number % 10 == 0 and not torch.equal(answers(shared.predict(*dataset)), expected):
            failures.append(f"the prediction after number {number} differs")
    return {"moments": looks, "threads_left": threading.active_count() - 1, "failures": failures}
