"""How cost grows: sketching, prediction, heads and GHNs against the sizes of what they are given, on one thread.

    OMP_NUM_THREADS=1 python benchmarks/bench_scaling.py          # or: make bench-scaling; 15 minutes

Writes results/scaling-<machine>.json after every part, where curves of other parts stay, each with its date and commit,
with the exponent b of a fit  time = a * size^b  over all sizes and over the larger half of them (on the logarithmic
axis), where what does not depend on the size weighs less.
`python benchmarks/report.py` draws it. Times are medians (see timing.py), memory is what one run adds at its highest.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import bench_ghn
import torch
import torch.nn.functional as F
from timing import DEVICE, RESULTS, clock, environment, file_name, median_seconds, peak_memory, seconds
from torch import Tensor
from workloads import Plain, images

from pudnet import PudNet
from pudnet.heads import fit_head
from pudnet.sketch import sketch

BATCH = 256
POOL = 4096  # different images or rows that a generator repeats
FEATURES = 256


class Part(NamedTuple):
    """One curve: what grows, the sizes, and what is run for a size, made outside of the timing."""

    title: str
    axis: str
    settings: str
    sizes: Sequence[int]
    make: Callable[[int], Callable[[], Any]]


def fit(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Exponent b of the least-squares fit  value = a * size^b; None of fewer than two different sizes."""
    if len(set(sizes)) < 2:
        return None
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    return statistics.linear_regression(x, y).slope


def exponents(sizes: Sequence[float], values: Sequence[float]) -> dict[str, float | None]:
    """Over all sizes, and over those from the geometric middle on."""
    middle = math.sqrt(min(sizes) * max(sizes))
    upper = [(size, value) for size, value in zip(sizes, values, strict=True) if size >= middle]
    return {"all": fit(sizes, values), "upper_half": fit(*zip(*upper, strict=True))}


@functools.cache
def image_pool() -> Tensor:
    return images(32, POOL).cpu()


@functools.cache
def row_pool() -> Tensor:
    return F.normalize(torch.randn(POOL, FEATURES, generator=torch.Generator().manual_seed(0)), dim=1).to(DEVICE)


def stream(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``count`` images of 32 x 32 in 1,000 classes, batch by batch; slices of one pool, which cost nothing."""
    pool = image_pool()
    for start in range(0, count, BATCH):
        size, at = min(BATCH, count - start), start % (POOL - BATCH)
        yield pool[at : at + size], (torch.arange(start, start + size) * 7919) % 1000


def rows(count: int, classes: int) -> Iterator[tuple[list[Tensor], Tensor]]:
    """``count`` random vectors with labels, batch by batch, from one pool."""
    pool = row_pool()
    for start in range(0, count, 1024):
        size, at = min(1024, count - start), start % (POOL - 1024)
        yield [pool[at : at + size]], (torch.arange(start, start + size) % classes).to(DEVICE)


def prediction(net: PudNet, datasets: list[Tensor]) -> Callable[[], Any]:
    net = net.to(DEVICE).eval().requires_grad_(False)
    return lambda: net.generate(datasets)


def plain(layers: int, width: int) -> PudNet:
    return PudNet(Plain(layers, width), image_size=32)


def parameters(count: int) -> Callable[[], Any]:
    layers = 10
    width = round((-3 + math.sqrt(9 + 4 * (layers - 1) * count / 9)) / (2 * (layers - 1)))
    return prediction(plain(layers, width), [images(32, 10)])


PARTS = {
    "sketch": Part(
        "sketching a stream", "images in the stream", "32 x 32, 1,000 classes, 500 kept",
        (1_000, 10_000, 100_000, 1_280_000), lambda n: lambda: sketch(stream(n)),
    ),
    "sketch size": Part(
        "prediction", "images in the sketch", "convnet3, one dataset",
        (1, 3, 10, 30, 100, 300, 1000), lambda n: prediction(PudNet("convnet3"), [images(32, n)]),
    ),
    "parameters": Part(
        "prediction", "generated parameters", "10 layers of 3 x 3, 10 images",
        (10**5, 10**6, 10**7, 10**8), parameters,
    ),
    "layers": Part(
        "prediction", "layers", "16 channels, 10 images",
        (3, 6, 12, 25, 50, 100, 200), lambda n: prediction(plain(n, 16), [images(32, 10)]),
    ),
    "datasets": Part(
        "prediction", "datasets in a batch", "convnet3, 20 images each",
        (1, 4, 16, 64, 256), lambda n: prediction(PudNet("convnet3"), [images(32, 20)] * n),
    ),
    "classes": Part(
        "ridge head", "classes", f"10,000 images, {FEATURES} features",
        (2, 10, 30, 100, 300, 1000), lambda n: lambda: fit_head("ridge", rows(10_000, n), n),
    ),
    "images": Part(
        "ridge head", "images", f"{FEATURES} features, 10 classes, by accumulation",
        (1_000, 10_000, 100_000, 1_000_000), lambda n: lambda: fit_head("ridge", rows(n, 10), 10),
    ),
}  # fmt: skip


def curve(part: Part, sizes: Sequence[int], budget: float) -> dict[str, Any]:
    """Time and memory at every size, and the exponents of time."""
    points = []
    for size in sizes:
        run = part.make(size)
        once, _ = seconds(run)
        taken = once if once > budget else median_seconds(run, budget)
        points.append({"size": size, "seconds": taken, "peak_memory_bytes": peak_memory(run)})
        print(f"{part.title}, {size:,} {part.axis}: {1e3 * taken:,.2f} ms", flush=True)
    found = exponents([p["size"] for p in points], [p["seconds"] for p in points])
    return {"title": part.title, "axis": part.axis, "settings": part.settings, "points": points, "exponents": found}


def ghn_curves(repeats: int) -> dict[str, dict[str, Any]]:
    """GHN-2 against nodes and against parameters, from bench_ghn.py."""
    found = {}
    for kind, members in bench_ghn.scaling(repeats, clock).items():
        points = [
            {"size": row[kind], "seconds": row["first time"], "reused_seconds": row["graph known, memory reused"]}
            for row in members
        ]
        slopes = exponents([p["size"] for p in points], [p["seconds"] for p in points])
        settings = "first time: trace, states, weights" + (", 8 channels" if kind == "nodes" else ", ResNet-18")
        names = {"title": "GHN-2", "axis": f"{kind} of the network", "settings": settings}
        found[f"GHN {kind}"] = {**names, "points": points, "exponents": slopes}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=(*PARTS, "GHN"), default=[*PARTS, "GHN"], metavar="PART")
    parser.add_argument("--most", type=float, default=math.inf, help="largest size, for a short try")
    parser.add_argument("--seconds", type=float, default=5, help="of timing for one size; what takes longer runs once")
    parser.add_argument("--output", type=Path, default=RESULTS / file_name("scaling"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    document: dict[str, Any] = {"environment": environment(), "command": "make bench-scaling", "curves": {}}
    if options.output.exists():
        document["curves"] = json.loads(options.output.read_text())["curves"]
    with torch.no_grad():
        for name in options.only:
            if name == "GHN":
                found = ghn_curves(max(3, int(options.seconds)))
            else:
                sizes = [size for size in PARTS[name].sizes if size <= options.most]
                found = {name: curve(PARTS[name], sizes, options.seconds)}
            measured = {key: document["environment"][key] for key in ("date", "commit", "load_average")}
            document["curves"] |= {key: value | {"measured": measured} for key, value in found.items()}
            options.output.parent.mkdir(exist_ok=True)
            options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
