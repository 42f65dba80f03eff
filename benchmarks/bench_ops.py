"""Every op on every backend that runs here, on arguments as the models call it with; against the reference.

    python -m pytest benchmarks/bench_ops.py

A row is checked against the reference in float64, then timed in turn with the reference (float32). torch.compile runs
on the first case of an op alone, since its first call takes seconds, and nowhere for graphs, whose levels it unrolls;
PUDNET_BENCH_COMPILE=1 runs it everywhere else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from timing import COMPILE, DEVICE, clock, in_float64
from torch import Tensor
from workloads import NETWORKS, arguments_of, hypernetwork, plain_ghn

from pudnet import backends, ops
from pudnet.interop import import_released_ghn2

pytestmark = pytest.mark.benchmark(timer=clock, warmup=False)

TOLERANCE = 1e-4  # of float32 against float64, for sums of up to some thousand terms


def recurrence(target: str, batch: int) -> tuple[Any, ...]:
    net = hypernetwork(target)
    embedding = normal(batch, net.config.layers, net.config.width)
    return arguments_of("layer_recurrence", lambda: net.recurrence(embedding))


def generation(target: str, batch: int) -> tuple[Any, ...]:
    net = hypernetwork(target)
    codes = normal(batch, len(net.layout.entries), net.config.width)
    return arguments_of("generate_weights", lambda: net.generators(codes))


def graph(op: str, network: str) -> tuple[Any, ...]:
    ghn = import_released_ghn2(plain_ghn.released_state(0, width=32)).to(DEVICE)
    return arguments_of(op, lambda: ghn.generate(NETWORKS[network]()))


def image_stats(count: int, side: int) -> tuple[Any, ...]:
    pixels = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=seeded()).to(DEVICE)
    mean, std = [0.5] * 3, [0.25] * 3
    return arguments_of("image_stats", lambda: ops.image_stats(pixels, classes(count), 10, mean, std))


def class_stats(count: int, width: int) -> tuple[Any, ...]:
    features = normal(count, width)
    return arguments_of("class_stats", lambda: ops.class_stats(features, classes(count), 10))


def patch_covariance(*size: int) -> tuple[Any, ...]:
    pictures = normal(*size) + 1
    return arguments_of("patch_covariance", lambda: ops.patch_covariance(pictures))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def normal(*size: int) -> Tensor:
    return torch.randn(size, generator=seeded()).to(DEVICE)


def classes(count: int) -> Tensor:
    return torch.randint(0, 10, (count,), generator=seeded()).to(DEVICE)


# Op -> name of the case -> what makes the arguments.
CASES: dict[str, dict[str, Callable[[], tuple[Any, ...]]]] = {
    "layer_recurrence": {
        "convnet3 B=1": lambda: recurrence("convnet3", 1),
        "resnet18 B=1": lambda: recurrence("resnet18-32", 1),
        "resnet18 B=64": lambda: recurrence("resnet18-32", 64),
    },
    "generate_weights": {
        "convnet3 B=1": lambda: generation("convnet3", 1),
        "convnet3 B=64": lambda: generation("convnet3", 64),
        "resnet18 B=1": lambda: generation("resnet18-32", 1),
        "resnet18 B=8": lambda: generation("resnet18-32", 8),
    },
    "graph_recurrence": {name: lambda name=name: graph("graph_recurrence", name) for name in ("resnet18", "resnet50")},
    "tile_weights": {name: lambda name=name: graph("tile_weights", name) for name in ("resnet18", "resnet50")},
    "image_stats": {"1000 images of 32x32": lambda: image_stats(1000, 32)},
    "class_stats": {"5000 rows of 512": lambda: class_stats(5000, 512), "100 rows of 64": lambda: class_stats(100, 64)},
    "patch_covariance": {
        "500 x 3 x 32 x 32": lambda: patch_covariance(500, 3, 32, 32),
        "50 x 64 x 16 x 16": lambda: patch_covariance(50, 64, 16, 16),
        "20 x 128 x 8 x 8": lambda: patch_covariance(20, 128, 8, 8),
    },
}  # fmt: skip
UNROLLED = ("graph_recurrence",)
ALL = [(op, case, backend) for op, named in CASES.items() for case in named for backend in backends.BACKENDS]


class Case(NamedTuple):
    """Arguments of an op, and the reference's result for them in float64."""

    arguments: tuple[Any, ...]
    expected: Any
    kept: bool  # whether the arguments hold the memory of the result


@functools.lru_cache(maxsize=1)
def prepared(op: str, case: str) -> Case:
    arguments = CASES[op][case]()
    expected = call(op, "reference", in_float64(arguments))
    return Case(arguments, expected, op == "tile_weights" and arguments[3] is not None)


def call(op: str, backend: str, arguments: tuple[Any, ...]) -> Any:
    return backends.call(op, DEVICE, backend, *arguments)


@pytest.mark.parametrize(("op", "case", "backend"), ALL, ids=["-".join(row) for row in ALL])
def test_op(timed: Callable[..., None], op: str, case: str, backend: str) -> None:
    if reasons := backends.explain(DEVICE)[op][backend]:
        pytest.skip(reasons[0])
    if backend == "compiled" and op in UNROLLED:
        pytest.skip("torch.compile unrolls every level of the graph, which takes minutes")
    if backend == "compiled" and not COMPILE and case != next(iter(CASES[op])):
        pytest.skip("torch.compile runs on the first case of an op; PUDNET_BENCH_COMPILE=1 runs it on every one")
    arguments, expected, kept = prepared(op, case)
    timed(
        lambda: call(op, backend, arguments),
        lambda: call(op, "reference", arguments),
        group=f"{op}: {case}",
        backend=backend,
        expected=expected,
        tolerance=TOLERANCE,
        reads=arguments[:3] if kept else arguments,
        kept=kept,
    )


def unfold_and_multiply(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """The fastest of several ways in plain PyTorch: one copy of the patches [n * positions, P], and one product."""
    patches = pictures.unfold(2, 3, 1).unfold(3, 3, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, pictures.shape[1] * 9)
    means = patches.mean(dim=0)
    patches -= means
    return means, patches.t() @ patches / len(patches)


@pytest.mark.parametrize("case", CASES["patch_covariance"])
def test_patch_covariance_in_plain_pytorch(timed: Callable[..., None], case: str) -> None:
    """What a user would write, where the reference (float64, in pieces) is written to be right."""
    (pictures, *rest), (means, covariances, _), _ = prepared("patch_covariance", case)
    timed(
        lambda: unfold_and_multiply(pictures[0]),
        lambda: call("patch_covariance", "reference", (pictures, *rest)),
        group=f"patch_covariance: {case}",
        backend="unfold + matmul",
        expected=(means[0, 0], covariances[0, 0]),
        tolerance=TOLERANCE,
        reads=pictures,
    )
