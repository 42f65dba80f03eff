"""Weight generation on the CPU, one thread: reference, torch.compile, native. Writes results/cpu-<processor>.json.

    OMP_NUM_THREADS=1 python -m pytest benchmarks/bench_cpu_generation.py

takes about 20 s; with PUDNET_BENCH_COMPILE=1 torch.compile is timed as well (up to a minute more). Correctness first:
no timing without agreement. Times are CPU times of the one thread that works, page faults included, so that a busy
neighbour costs little but cache and memory bandwidth. Ratios are of medians of one run.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from timing import COPY_BYTES, RESULTS, check, file_name, machine
from torch import Tensor

import pudnet
from pudnet import PudNet, _extension, ops
from pudnet.ops import _native_generation as native
from pudnet.optimised import OptimisedPudNet

ROUNDS = 25

pytestmark = pytest.mark.benchmark(timer=time.thread_time, warmup=False)
compiled = pytest.mark.skipif(os.environ.get("PUDNET_BENCH_COMPILE") != "1", reason="PUDNET_BENCH_COMPILE is not 1")


class Case:
    """ResNet-18 and what its generation takes, and the medians of this run in ms."""

    def __init__(self) -> None:
        self.medians: dict[str, float] = {}
        self.net = PudNet("resnet18").eval().requires_grad_(False)
        self.images = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
        self.shapes = self.net.layout.shapes
        self.parameters = list(self.net.generators.parameters())
        generator = torch.Generator().manual_seed(0)
        self.codes = torch.randn(1, len(self.net.layout.entries), self.net.config.width, generator=generator)

    def bytes_moved(self, row_size: int) -> int:
        """Generator parameters read and weights written, for rows of ``row_size`` bytes a number."""
        *maps, row_weight, row_bias = (x.numel() for x in self.parameters)
        return 4 * sum(maps) + row_size * (row_weight + row_bias) + 4 * self.net.layout.size

    def run(self, benchmark: Any, name: str, work: Callable[[], object], rounds: int = ROUNDS) -> None:
        benchmark.pedantic(work, rounds=rounds, warmup_rounds=3)
        self.medians[name] = benchmark.stats.stats.median * 1e3


@pytest.fixture(scope="module")
def case() -> Iterator[Case]:
    if _extension.why_not():
        pytest.skip("; ".join(_extension.why_not()))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = Case()
    yield found
    torch.set_num_threads(before)
    write(found)


def write(case: Case) -> None:
    """Medians, ratios and the environment as JSON."""
    ms = case.medians
    ratios = {}
    for name, numerator, denominator in (
        ("generate: native float32 over reference", "generate reference", "generate native float32"),
        ("generate: native bfloat16 over reference", "generate reference", "generate native bfloat16"),
        ("generate: native op, nothing prepared, over reference", "generate reference", "generate native op"),
        ("generate: native float32 over compiled", "generate compiled", "generate native float32"),
        ("whole pass: optimised over reference", "pass reference", "pass optimised float32"),
        ("whole pass: optimised over compiled", "pass compiled", "pass optimised float32"),
        ("convnet3: B = 1 over a dataset of B = 64", "convnet3 B=1", "convnet3 B=64, per dataset"),
        (
            "convnet3, prepared: B = 1 over a dataset of B = 64",
            "convnet3 prepared B=1",
            "convnet3 prepared B=64, per dataset",
        ),
    ):
        if numerator in ms and denominator in ms:
            ratios[name] = round(ms[numerator] / ms[denominator], 2)
    if "copy" in ms:
        bandwidth = {"copy": 2 * COPY_BYTES / ms["copy"] / 1e6}
        for dtype, size in (("float32", 4), ("bfloat16", 2)):
            if f"generate native {dtype}" in ms:
                bandwidth[dtype] = case.bytes_moved(size) / ms[f"generate native {dtype}"] / 1e6
        ratios |= {f"bandwidth: native {name} of copy": round(x / bandwidth["copy"], 2)
                   for name, x in bandwidth.items() if name != "copy"}  # fmt: skip
    else:
        bandwidth = {}
    result = {
        "cpu": machine(),
        "instruction_set": _extension.load().build_info()["instruction_set"],
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pudnet": pudnet.__version__,
        "load_average": round(os.getloadavg()[0], 1),
        "median_ms": {name: round(value, 3) for name, value in ms.items()},
        "gigabytes_per_second": {name: round(value, 1) for name, value in bandwidth.items()},
        "ratios": ratios,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / file_name("cpu")).write_text(json.dumps(result, indent=2) + "\n")


def test_copy(benchmark: Any, case: Case) -> None:
    source, target = (native.empty(COPY_BYTES, dtype=torch.uint8).fill_(0) for _ in range(2))
    case.run(benchmark, "copy", lambda: target.copy_(source))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generate_native(benchmark: Any, case: Case, dtype: str) -> None:
    """Rows packed once, memory of the result kept: what the optimised predictor does."""
    fc_weight, fc_bias, mix_weight, mix_bias, row_weight, row_bias = case.parameters
    rows = native.pack_rows(row_weight, row_bias, case.shapes, getattr(torch, dtype))
    out = native.empty(1, case.net.layout.size, dtype=torch.float32)

    def work() -> Tensor:
        return native.generate(case.codes, fc_weight, fc_bias, mix_weight, mix_bias, rows, case.shapes, out)

    expected = ops.generate_weights(case.codes, *case.parameters, case.shapes, backend="reference")
    check(work(), expected, 1e-5 if dtype == "float32" else 1e-2)
    case.run(benchmark, f"generate native {dtype}", work)


@pytest.mark.parametrize("backend", ["native", "reference", pytest.param("compiled", marks=compiled)])
def test_generate_op(benchmark: Any, case: Case, backend: str) -> None:
    """The op as it is called anywhere: fresh memory for the result."""

    def work() -> Tensor:
        return ops.generate_weights(case.codes, *case.parameters, case.shapes, backend=backend)

    check(work(), ops.generate_weights(case.codes, *case.parameters, case.shapes, backend="reference"), 1e-5)
    name = "generate native op" if backend == "native" else f"generate {backend}"
    case.run(benchmark, name, work, ROUNDS if backend == "native" else 10)


def reference_pass(case: Case) -> Tensor:
    with torch.no_grad(), pudnet.use_backend("reference"):
        return case.net.layout.flatten(case.net.generate(case.images))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pass_optimised(benchmark: Any, case: Case, dtype: str) -> None:
    fast = OptimisedPudNet(case.net, dtype=getattr(torch, dtype))
    found = case.net.layout.flatten(fast.generate(case.images))
    check(found, reference_pass(case), 1e-5 if dtype == "float32" else 1e-2)
    case.run(benchmark, f"pass optimised {dtype}", lambda: fast.generate(case.images))


def test_pass_reference(benchmark: Any, case: Case) -> None:
    with torch.no_grad(), pudnet.use_backend("reference"):
        case.run(benchmark, "pass reference", lambda: case.net.generate(case.images), 10)


@compiled
def test_pass_compiled(benchmark: Any, case: Case) -> None:
    net = case.net
    with torch.no_grad(), pudnet.use_backend("reference"):
        forward = torch.compile(net, fullgraph=True)

        def work() -> Tensor:
            return forward(net.preprocess(case.images), [len(case.images)])

        check(work()[0], net(net.preprocess(case.images), [len(case.images)])[0], 1e-5)
        case.run(benchmark, "pass compiled", work, 10)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("batch", [1, 64])
def test_convnet3_embedding_to_weights(benchmark: Any, case: Case, batch: int, prepared: bool) -> None:
    """The modules as anybody calls them, and the generator rows packed once, as the optimised predictor has them."""
    net = PudNet("convnet3").eval().requires_grad_(False)
    generators, shapes = net.generators, net.layout.shapes
    maps = (generators.fc_weight, generators.fc_bias, generators.mix_weight, generators.mix_bias)
    rows = native.pack_rows(generators.row_weight, generators.row_bias, shapes)
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(batch, net.config.layers, net.config.width, generator=generator)
    out = native.empty(batch, net.layout.size, dtype=torch.float32)

    def work() -> Tensor:
        codes = net.recurrence(embedding)
        return native.generate(codes, *maps, rows, shapes, out) if prepared else generators(codes)

    with torch.inference_mode():
        found = work().clone()
        with pudnet.use_backend("reference"):
            check(found, net.generators(net.recurrence(embedding)), 1e-5)
        name = f"convnet3{' prepared' if prepared else ''} B={batch}" + (", per dataset" if batch > 1 else "")
        case.run(benchmark, name, work, 400 if batch == 1 else ROUNDS)
    case.medians[name] /= batch
