"""The rates that a plan for a large dataset needs, on one core: decoding, sketching, features, sums, merging, solving.

    OMP_NUM_THREADS=1 python benchmarks/bench_shards.py     # a minute; writes results/shards-<processor>.json

Times are of the processor (`time.process_time`), not of the clock on the wall: other programs on the machine disturb
them little. The best of a few runs counts.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timing import RESULTS, file_name, machine

import pudnet
from pudnet.data import open_images
from pudnet.features import Reading
from pudnet.files import atomic_path
from pudnet.heads import RidgeAccumulator
from pudnet.targets import build_target

CLASSES = 21_841  # of ImageNet-21K
PHOTO = (500, 375)  # the usual size of its images
RUNS = 2


def best(run: Callable[[], object], runs: int = RUNS) -> float:
    """Seconds of the processor, of the fastest run; one more goes before."""
    found = []
    for _ in range(runs + 1):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found[1:])


def decoding(folder: Path, count: int = 48) -> float:
    """Photos a second: JPEG files as Pillow writes them, read and made 32 x 32."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / str(number % 2) / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(
            PHOTO, Image.Resampling.BICUBIC
        )
        grain = rng.normal(0, 6, (PHOTO[1], PHOTO[0], 3))
        Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return count / best(lambda: [None for _ in open_images(folder, size=32)])


def sketching(count: int = 4096) -> float:
    """Images of 32 x 32 a second."""
    images = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8)
    labels = torch.arange(count) % 100

    def run() -> None:
        builder = pudnet.SketchBuilder(500)
        for start in range(0, count, 256):
            builder.update(images[start : start + 256], labels[start : start + 256])

    return count / best(run)


@torch.no_grad()
def features(target: str, count: int, batch: int) -> tuple[float, dict[str, int]]:
    """Images a second from pixels to pooled features, and how many features the heads read."""
    network, size = build_target(target)
    network = network.eval().to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    widths = {
        "ridge": Reading()(network, images[:2]).shape[1],
        "ridge-last": Reading("last")(network, images[:2]).shape[1],
    }
    seconds = best(lambda: [Reading()(network, images) for _ in range(count // batch)])
    return count / seconds, widths


def sums(width: int) -> dict[str, float]:
    """Images a second into the sums of a ridge head with ImageNet-21K's classes, and seconds to merge and solve."""
    rows, some = 1024, 512
    first, second = (RidgeAccumulator(width, CLASSES) for _ in range(2))
    x, y = torch.randn(rows, width), torch.randint(0, CLASSES, (rows,))
    update = best(lambda: first.update(x, y), 1)
    second.update(x, y)
    merge = best(lambda: first.merge(second), 1)
    few = RidgeAccumulator(width, some)
    few.update(x, y % some)
    lam = float(few.scatter.diagonal().mean())
    factor = torch.linalg.cholesky(few.penalised(lam, torch.float64))
    return {
        "images_a_second": rows / update,
        "merge_seconds": merge,
        "factor_seconds": best(lambda: torch.linalg.cholesky(few.penalised(lam, torch.float64)), 1),
        # Proportional to the number of classes.
        "solve_seconds": best(lambda: few.weights(factor), 1) * CLASSES / some,
    }


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        photos = decoding(Path(folder))
    found: dict[str, Any] = {
        "command": "OMP_NUM_THREADS=1 python benchmarks/bench_shards.py",
        "date": datetime.date.today().isoformat(),
        "processor": machine(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pudnet": pudnet.__version__,
        "classes": CLASSES,
        "photos_decoded_a_second": photos,
        "images_sketched_a_second": sketching(),
        "targets": {},
    }
    for target, count, batch in (("convnet3", 1024, 32), ("resnet18", 8, 8)):
        rate, widths = features(target, count, batch)
        head = "ridge" if target == "convnet3" else "ridge-last"  # all layers of a ResNet are too wide
        found["targets"][target] = {
            "images_a_second": rate,
            "features": widths,
            "head": head,
            "sums": sums(widths[head]),
        }
    with atomic_path(RESULTS / file_name("shards"), "bench_shards") as path:
        path.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
