"""What surrounds the pass: sketching a stream, fitting heads, and GHN-2's prediction for an architecture.

    python -m pytest benchmarks/bench_stages.py

The references are the plainest programs that give the same result: all keys of the stream at once for the sketch; the
normal equations at the lambda that was found, without the search for it and without leave-one-out, for the ridge and
kernel heads; node by node and parameter by parameter for GHN-2 (tests/fixtures/plain_ghn.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timing import DEVICE, clock
from torch import Tensor
from workloads import NETWORKS, images, plain_ghn, plain_heads

from pudnet.graphs import trace
from pudnet.heads import KERNEL_WIDTH, Head, fit_head
from pudnet.interop import import_released_ghn2
from pudnet.sketch import sketch

pytestmark = pytest.mark.benchmark(timer=clock, warmup=False)

CAPACITY, CLASSES = 500, 10


@functools.cache
def stream(count: int) -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, CLASSES, (count,), generator=torch.Generator().manual_seed(0))
    return images(32, count).cpu(), labels


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    pictures, labels = stream(count)
    return list(zip(pictures.split(256), labels.split(256), strict=True))


def all_keys_at_once(count: int) -> Tensor:
    """The images ``[500, 32, 32, 3]`` of the sketch, in the order of the stream."""
    pictures, labels = stream(count)
    keys = np.random.Generator(np.random.PCG64(np.random.SeedSequence(0, spawn_key=(0, 0)))).random(count)
    ranks = np.empty(count, dtype=np.int64)
    for label in range(CLASSES):
        members = np.flatnonzero(labels.numpy() == label)
        ranks[members[np.argsort(keys[members])]] = np.arange(len(members))
    return pictures[torch.from_numpy(np.sort(np.lexsort((keys, ranks))[:CAPACITY]))]


@pytest.mark.parametrize("count", [1000, 20_000])
def test_sketch(timed: Callable[..., None], count: int) -> None:
    parts = batches(count)

    def run() -> Tensor:
        found = sketch(parts, CAPACITY)
        return found.images[found.indices.argsort()]

    timed(
        run,
        lambda: all_keys_at_once(count),
        group=f"sketch: {count} images of 32x32",
        backend="stream",
        expected=all_keys_at_once(count),
        tolerance=0,
        reads=stream(count),
    )


@functools.cache
def features(count: int, width: int) -> tuple[Tensor, Tensor]:
    """Vectors of ten overlapping classes, and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    centres = torch.randn(CLASSES, width, generator=generator)
    rows = centres[labels] + 4 * torch.randn(count, width, generator=generator)
    return F.normalize(rows, dim=1).to(DEVICE), labels.to(DEVICE)


def plain_head(name: str, lam: float, rows: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Class means of unit vectors, or (kernel) ridge regression of one-hot targets by its equations, in float64."""
    x, targets = rows.double(), F.one_hot(labels, CLASSES).double()
    if name == "cosine":
        return {"weight": F.normalize(targets.T @ x, dim=1)}
    mean, share = x.mean(dim=0), targets.mean(dim=0)
    centred = x - mean
    if name == "kernel":
        centred = centred.half().double()  # as the head keeps its images
        rate = 1 / (KERNEL_WIDTH * float(torch.cdist(centred, centred).square().mean()))
        dual, bias = plain_heads.kernel_refit(centred, labels, CLASSES, lam, rate)
        return {"bias": bias, "weight": dual.T}
    scatter = centred.T @ centred + lam * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weight = torch.linalg.solve(scatter, centred.T @ (targets - share)).T
    return {"bias": share - weight @ mean, "weight": weight}


@pytest.mark.parametrize(
    ("name", "count", "width"),  # of one vector per image, ridge-last is ridge
    [
        *((name, count, 512) for name in ("cosine", "ridge") for count in (1000, 10_000)),
        ("kernel", 1000, 512),
    ],
)
def test_head(timed: Callable[..., None], name: str, count: int, width: int) -> None:
    rows, labels = features(count, width)

    def fit() -> Head:
        return fit_head(name, [([rows], labels)], CLASSES)

    lam = fit().info.get("lambda", 0.0)
    wanted = ("weight",) if name == "cosine" else ("bias", "weight")
    timed(
        lambda: {key: fit().state[key] for key in wanted},
        lambda: plain_head(name, lam, rows, labels),
        group=f"head: {name}, {count} images, {width} features",
        backend="fit_head",
        expected=plain_head(name, lam, rows, labels),
        tolerance=1e-3,
        reads=(rows, labels),
    )


WAYS = ("first time", "graph known", "graph known, memory reused")


@functools.lru_cache(maxsize=1)
def architecture(name: str) -> tuple[Any, ...]:
    """(GHN, network, its graph, the plain version's parameters, its result by name)."""
    state = plain_ghn.released_state(0, width=32)
    module = NETWORKS[name]()
    graph = trace(module)
    with torch.no_grad():
        expected = dict(sorted(plain_ghn.predict(state, graph).items()))
    return import_released_ghn2(state).to(DEVICE), module, graph, state, expected


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("network", ["resnet18", "resnet50"])
def test_ghn(timed: Callable[..., None], network: str, way: str) -> None:
    """`first time` traces the network; the plain version beside it does so too."""
    ghn, module, graph, state, expected = architecture(network)
    out = ghn.generate(module) if way.endswith("reused") else None

    def run() -> dict[str, Tensor]:
        if way == "first time":
            ghn._graphs.clear()
            ghn._prepared.clear()
        return dict(sorted(ghn.generate(module, out=out).items()))

    timed(
        run,
        lambda: plain_ghn.predict(state, trace(module) if way == "first time" else graph),
        group=f"GHN-2: {network}, {way}",
        backend="automatic",
        expected=expected,
        tolerance=1e-3,
        reads=list(ghn.parameters()),
        kept=out is not None,
    )
