"""The single pass, end to end: uint8 images of B datasets in memory -> all weights of B networks.

    python -m pytest benchmarks/bench_passes.py

Backends: the reference; `automatic`, what runs when nobody asks; `compiled`, torch.compile of the reference; and the
optimised predictor, whose parameters are prepared once, in float32 and bfloat16. Every row is checked against the
reference and timed in turn with it. What does not fit in memory or would take minutes is left out, and the JSON file
says so; so is torch.compile of all but the smallest case (PUDNET_BENCH_COMPILE=1 runs it for every network with B = 1).

The rows of the group `cold start` are whole processes: import, model, first and second pass.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timing import COMPILE, DEVICE, ROOT, clock
from torch import Tensor
from workloads import SKETCH, TARGETS, hypernetwork, images

from pudnet import PudNet, backends
from pudnet.optimised import OptimisedPudNet

pytestmark = pytest.mark.benchmark(timer=clock, warmup=False)

Weights = dict[str, Tensor]  # [B, O, I, kH, kW] each

MOST_WEIGHTS_ON_CPU = 1e8  # 0.4 GB a result, as much again for each temporary of the reference, and a second or two
TOLERANCES = {"optimised bfloat16": 1e-2}  # of all others: 1e-5
BATCHES = (1, 8, 64)
WAYS = ("reference", "automatic", "compiled", "optimised float32", "optimised bfloat16")
ALL = [(target, batch, way) for target in TARGETS for batch in BATCHES for way in WAYS]


@functools.lru_cache(maxsize=1)
def reference(target: str, batch: int) -> Weights:
    return generated(hypernetwork(target), target, batch, "reference")


@functools.cache
def datasets(target: str, batch: int) -> list[Tensor]:
    side = hypernetwork(target).config.image_size
    return [images(side, seed=seed) for seed in range(batch)]


def generated(net: PudNet, target: str, batch: int, backend: str) -> Weights:
    with backends.use_backend(backend):
        return net.generate(datasets(target, batch))


def left_out(target: str, batch: int, way: str) -> str:
    """Why a row is not timed; empty where it is."""
    weights = batch * hypernetwork(target).layout.size
    most = MOST_WEIGHTS_ON_CPU if DEVICE.type == "cpu" else torch.cuda.mem_get_info(DEVICE)[0] / 20
    if weights > most:
        size = f"{weights / 1e6:,.0f} million weights of {batch} networks ({4 * weights / 1e9:.1f} GB)"
        return f"{size}: at most {most / 1e6:,.0f} million, for time and for the memory of the reference"
    if way == "compiled":
        if reasons := backends.explain(DEVICE)["generate_weights"]["compiled"]:
            return reasons[0]
        if batch > 1 or not (COMPILE or target == "convnet3"):
            return "torch.compile takes up to a minute; PUDNET_BENCH_COMPILE=1 runs it for every network with B = 1"
    return ""


def candidate(target: str, batch: int, way: str) -> Callable[[], Weights]:
    net = hypernetwork(target)
    if way == "compiled":
        with backends.use_backend("reference"):
            forward = torch.compile(net, fullgraph=True)

        def compiled() -> Weights:
            with backends.use_backend("reference"):
                return net.layout.views(forward(net.preprocess(datasets(target, batch)[0]), [SKETCH]))

        return compiled
    if way.startswith("optimised"):
        fast = OptimisedPudNet(net, dtype=getattr(torch, way.partition(" ")[2]))
        return lambda: fast.generate_batch(datasets(target, batch))
    return lambda: generated(net, target, batch, way)


@pytest.mark.parametrize(("target", "batch", "way"), ALL, ids=lambda value: str(value).replace(" ", "-"))
def test_pass(timed: Callable[..., None], target: str, batch: int, way: str) -> None:
    if reason := left_out(target, batch, way):
        pytest.skip(reason)
    net = hypernetwork(target)
    timed(
        candidate(target, batch, way),
        lambda: generated(net, target, batch, "reference"),
        group=f"pass: {target} B={batch}",
        backend=way,
        expected=reference(target, batch),
        tolerance=TOLERANCES.get(way, 1e-5),
        reads=(datasets(target, batch), list(net.parameters())),
    )


COLD = """
import json, sys, time
began = time.perf_counter()
marks = {}
def mark(name):
    global began
    marks[name] = time.perf_counter() - began
    began = time.perf_counter()
import numpy, torch
torch.set_num_threads(1)
mark("import_torch_s")
import pudnet
mark("import_pudnet_s")
net = pudnet.PudNet(sys.argv[1]).to(sys.argv[2]).eval().requires_grad_(False)
mark("make_model_s")
images = numpy.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), dtype=numpy.uint8)
for name in ("first_pass_s", "second_pass_s"):
    weights = net.generate(images)
    if sys.argv[2] != "cpu":
        torch.cuda.synchronize()
    mark(name)
assert all(bool(torch.isfinite(x).all()) for x in weights.values())
print(json.dumps(marks))
"""


@pytest.mark.benchmark(timer=time.perf_counter)
@pytest.mark.parametrize("target", ["convnet3", "resnet18"])
def test_cold_start(benchmark: Any, target: str) -> None:
    """Wall time of a process that predicts once, and of its parts."""
    found: list[dict[str, float]] = []

    usual = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}

    def run() -> None:
        command = [sys.executable, "-c", COLD, target, str(DEVICE)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=usual, check=True)
        found.append(json.loads(done.stdout))

    benchmark.group = "cold start"
    benchmark.pedantic(run, rounds=3)
    benchmark.extra_info["backend"] = "automatic"
    benchmark.extra_info |= {name: statistics.median(row[name] for row in found) for name in found[0]}
