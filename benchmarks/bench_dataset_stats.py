"""Dataset statistics on the CPU, one thread: native against the reference and against unfold + matmul.

    OMP_NUM_THREADS=1 python -m pytest benchmarks/bench_dataset_stats.py --benchmark-json=dataset_stats.json

takes about 20 s. Correctness first: no timing without agreement. Times are CPU times of the one thread that works; the
ratios, of medians of one run, are in `extra_info` and in the table's last lines.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pudnet import _extension, ops

ROUNDS = 31
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux

pytestmark = [
    pytest.mark.benchmark(timer=time.thread_time, warmup=False),
    pytest.mark.skipif(bool(_extension.why_not()), reason="; ".join(_extension.why_not()) or "has the extension"),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(
    benchmark: Any, work: Callable[[], object], other: Callable[[], object], name: str, rounds: int, at_least: float
) -> None:
    """Time ``work``, and ``other`` beside it; the ratio is noted with the ratio that is asked for."""
    benchmark.pedantic(work, rounds=ROUNDS, warmup_rounds=3)
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        other()
        times.append(time.thread_time() - start)
    median = statistics.median(times)
    benchmark.extra_info[f"{name}, ms"] = round(median * 1e3, 2)
    benchmark.extra_info[f"{name} / native"] = round(median / benchmark.stats.stats.median, 1)
    benchmark.extra_info["asked for"] = at_least
    print(f"\n{benchmark.name}: {benchmark.extra_info}")


def agree(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_image_stats(benchmark: Any) -> None:
    """1,000 images of 32 x 32 in 10 classes; the reference adds rows by torch's index_add."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1000, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (1000,), generator=generator)

    def work(backend: str) -> ops.ImageStats:
        return ops.image_stats(images, labels, 10, [0.5] * 3, [0.25] * 3, backend=backend)

    agree(work("native"), work("reference"))
    run(benchmark, lambda: work("native"), lambda: work("reference"), "reference", 11, at_least=20)


def test_class_stats(benchmark: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5000, 512, generator=generator)
    labels = torch.randint(0, 10, (5000,), generator=generator)

    def work(backend: str) -> ops.ClassStats:
        return ops.class_stats(features, labels, 10, backend=backend)

    agree(work("native"), work("reference"))
    run(benchmark, lambda: work("native"), lambda: work("reference"), "reference", 11, at_least=1)


def unfold_and_multiply(images: Tensor) -> tuple[Tensor, Tensor]:
    """The fastest of several ways in plain PyTorch: one copy of the patches [n * positions, P], and one product."""
    patches = images.unfold(2, 3, 1).unfold(3, 3, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, images.shape[1] * 9)
    means = patches.mean(dim=0)
    patches -= means
    return means, patches.t() @ patches / len(patches)


def peak_memory(work: Callable[[], object]) -> float:
    """MB that ``work`` adds to the memory of the process at its highest, its result included."""

    def read(name: str) -> int:
        return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name))

    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not to be used again
    CLEAR.write_text("5")  # the highest mark starts anew
    before = read("VmRSS")
    work()
    return (read("VmHWM") - before) / 1024


@pytest.mark.parametrize("size", [(500, 64, 16, 16), (500, 3, 32, 32), (50, 256, 8, 8)], ids=str)
def test_patch_covariance(benchmark: Any, size: tuple[int, ...]) -> None:
    images = torch.randn(size, generator=torch.Generator().manual_seed(0)) + 1

    def work() -> tuple[Tensor, Tensor]:
        return ops.patch_covariance(images, backend="native")[:2]

    agree(work(), unfold_and_multiply(images))
    if CLEAR.exists():
        memory = {"native": peak_memory(work), "unfold + matmul": peak_memory(lambda: unfold_and_multiply(images))}
        benchmark.extra_info |= {f"{name}, MB": round(value, 1) for name, value in memory.items()}
    run(benchmark, work, lambda: unfold_and_multiply(images), "unfold + matmul", 3, at_least=2)
