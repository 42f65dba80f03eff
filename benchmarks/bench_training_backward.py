"""Training on the CPU, one thread: the native ops with their backward against the reference under autograd.

    OMP_NUM_THREADS=1 python benchmarks/bench_training_backward.py

writes results/training-cpu-<model>.json, in about a minute. Two parts. Time: codes -> weights -> gradients of all
generator parameters, medians of the CPU time of the one thread. Loss curve: the same 200 steps of a small PudNet, with
the backends chosen automatically, with the reference, and, as the measure of float32 noise, with the reference from
parameters one unit in the last place larger.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import RESULTS, file_name, machine

import pudnet
from pudnet import PudNet
from pudnet.training import Trainer, TrainingConfig

STEPS = 200
SIZES = [("convnet3", 1), ("convnet3", 4), ("convnet3", 16), ("resnet18", 1), ("resnet18", 4)]
BACKENDS = ("automatic", "reference")


def median_ms(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """CPU time of each, taken in turn, so that a busy neighbour meets all of them."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds + 2):
        for name, run in runs.items():
            start = time.thread_time()
            run()
            if round_number >= 2:  # the first two warm up
                taken[name].append(1e3 * (time.thread_time() - start))
    return {name: statistics.median(values) for name, values in taken.items()}


def generation(target: str, batch: int) -> dict[str, Any]:
    """Codes -> weights -> gradients, on each backend."""
    net = PudNet(target)
    generators = net.generators
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(batch, len(net.layout.entries), net.config.width, generator=generator)
    d_weights = torch.randn(batch, net.layout.size, generator=generator)
    found: dict[str, list[torch.Tensor]] = {}

    def run(backend: str) -> None:
        leaf = codes.clone().requires_grad_()
        generators.zero_grad(set_to_none=True)
        with pudnet.use_backend(backend):
            generators(leaf).backward(d_weights)
        found[backend] = [leaf.grad, *(parameter.grad for parameter in generators.parameters())]

    rounds = max(7, min(60, round(120 / (batch * net.layout.size / 75_456))))
    ms = median_ms({backend: lambda backend=backend: run(backend) for backend in BACKENDS}, rounds)
    error = max(
        float((one - other).abs().max() / other.abs().max())
        for one, other in zip(found["automatic"], found["reference"], strict=True)
    )
    assert error < 1e-4, f"the gradients differ by {error:.1e}"
    return {
        "target": target,
        "batch": batch,
        "median_ms": {name: round(value, 3) for name, value in ms.items()},
        "reference over automatic": round(ms["reference"] / ms["automatic"], 2),
        "largest relative difference of a gradient": float(f"{error:.1e}"),
    }


def loss_curve(folder: Path, backend: str, nudge: bool = False) -> tuple[list[float], float]:
    """Losses of all steps, and the median CPU time of a step in ms."""
    config = TrainingConfig.from_dict(
        {
            "target": "convnet3",
            "data": [{"paths": [str(folder / "data.npz")]}],
            "model": {"image_size": 16},
            "episodes": {"classes": 5, "support": 3, "query": 3, "groups": 1},
            "augment": {"crop": 2},
            "optimiser": {"steps": STEPS, "warmup": 20, "decay": 50},
            "run": {"output": str(folder / "run"), "amp": False},
        }
    )
    trainer = Trainer(config)
    with torch.no_grad():
        for parameter in trainer.net.parameters() if nudge else ():
            parameter.copy_(torch.nextafter(parameter, torch.full_like(parameter, torch.inf)))
    losses, taken = [], []
    with contextlib.nullcontext() if backend == "automatic" else pudnet.use_backend(backend):
        for _ in range(STEPS):
            start = time.thread_time()
            losses.append(trainer.step()["loss"])
            taken.append(1e3 * (time.thread_time() - start))
    return losses, statistics.median(taken)


def curves(folder: Path) -> dict[str, Any]:
    """The three loss curves, compared."""
    rng = np.random.default_rng(0)
    labels = np.arange(600) % 20
    pictures = rng.integers(40, 216, (20, 16, 16, 3))[labels] + rng.integers(-40, 41, (600, 16, 16, 3))
    np.savez(folder / "data.npz", x_train=pictures.clip(0, 255).astype(np.uint8), y_train=labels)
    fast, fast_ms = loss_curve(folder, "automatic")
    plain, plain_ms = loss_curve(folder, "reference")
    nudged, _ = loss_curve(folder, "reference", nudge=True)

    def difference(one: list[float], steps: int) -> float:
        pairs = zip(one[:steps], plain[:steps], strict=True)
        return float(f"{max(abs(a - b) / abs(b) for a, b in pairs):.1e}")

    return {
        "steps": STEPS,
        "loss": {"first": plain[0], "last, reference": plain[-1], "last, automatic": fast[-1]},
        "largest relative difference of a loss": {
            f"first {steps} steps": {
                "automatic and reference": difference(fast, steps),
                "reference and reference from nudged parameters": difference(nudged, steps),
            }
            for steps in (1, 20, 50, STEPS)
        },
        "median_ms of a step": {"automatic": round(fast_ms, 2), "reference": round(plain_ms, 2)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / file_name("training-cpu"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "cpu": machine(),
            "threads": 1,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pudnet": pudnet.__version__,
            "load_average": round(os.getloadavg()[0], 1),
            "generation, forward and backward": [generation(target, batch) for target, batch in SIZES],
            "training": curves(Path(folder)),
        }
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
