"""Everything a GPU is needed for, in one command: build in place, run every GPU test, time everything, write a file.

    python benchmarks/gpu.py                # or: make gpu

takes less than 8 minutes on an H200 and downloads nothing. It needs torch with CUDA, triton, numpy, pybind11, ninja,
pytest and nvcc. A skipped GPU test counts as a failure. The result, benchmarks/results/<gpu>.json, is written anew
after every measurement, so that what was measured is kept whatever happens later.

Times are medians of GPU time between CUDA events, in microseconds, with the quartiles; the L2 cache is overwritten
before every run unless a row says `warm`. `graph` rows replay a CUDA graph, others include the launches of Python.
Options: --no-build, --no-tests, --no-autotune (the slowest compile), --only PART (rows whose name contains it),
--out FILE.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 470  # seconds, for everything
FLUSH_BYTES = 256 << 20  # several times any L2 cache
Run = Callable[[], Any]


def build() -> None:
    """Compile the extension into the checkout."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "PUDNET_BUILD": "cuda"})


def run_tests() -> None:
    """Run the GPU tests; exit where one fails or is skipped."""
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-rs", "tests"]
    environment = {**os.environ, "PUDNET_REQUIRE_CUDA": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    print(done.stdout[-8000:], done.stderr[-2000:], flush=True)
    if done.returncode:
        raise SystemExit("gpu.py: a GPU test failed, see above")
    if re.search(r"\b\d+ skipped", done.stdout):
        raise SystemExit("gpu.py: a GPU test was skipped, which counts as a failure; see above")


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    import numpy
    import triton

    def first_line(*command: str) -> str:
        try:
            lines = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip().splitlines()
        except FileNotFoundError:
            return ""
        return lines[-1] if lines else ""

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "clocks": first_line("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm", "--format=csv,noheader"),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "numpy": numpy.__version__,
        "nvcc": first_line("nvcc", "--version"),
        "commit": first_line("git", "rev-parse", "HEAD"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


class Timer:
    """Times functions and keeps the rows in a file."""

    def __init__(self, out: Path, only: str) -> None:
        self.out, self.only = out, only
        self.result: dict[str, Any] = {"environment": environment(), "rows": []}
        self.failed: list[str] = []
        self.copy_rate = 0.0  # bytes a second, read and write counted
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def row(self, name: str, make: Callable[[], Run], *, moved: int = 0, warm: bool = False, repeats: int = 50) -> None:
        """Time ``make()``.

        Args:
            name: what is timed, with its backend.
            make: prepares (compiles, captures) and returns what is timed.
            moved: bytes the run has to read and write at least; gives the share of the copy rate.
            warm: leave the L2 cache as the last run left it.
        """
        if self.only not in name:
            return
        began = time.perf_counter()
        try:
            run = make()
            for _ in range(3):
                run()
            torch.cuda.synchronize()
            prepared = time.perf_counter() - began
            times = self._times(run, warm, repeats)
        except Exception as error:  # the other rows are still worth measuring; the exit status tells
            self.failed.append(name)
            self.result["rows"].append({"name": name, "error": repr(error)[:500]})
            print(f"{name:70s} failed: {error!r}"[:300], flush=True)
        else:
            low, median, high = statistics.quantiles(times, n=4)
            found = {"name": name, "median_us": round(median, 2), "quartiles_us": [round(low, 2), round(high, 2)]}
            found |= {"prepared_s": round(prepared, 2), "warm": warm}
            if moved:
                rate = moved / median * 1e6
                found |= {"bytes": moved, "gb_per_s": round(rate / 1e9, 1)}
                if self.copy_rate:
                    found["share_of_copy"] = round(rate / self.copy_rate, 3)
            self.result["rows"].append(found)
            print(f"{name:70s} {median:10.1f} us  {found.get('share_of_copy', '')}", flush=True)
        self.write()

    def _times(self, run: Run, warm: bool, repeats: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            if not warm:
                self.flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [1000 * start.elapsed_time(end) for start, end in events]

    def measure_copy(self) -> None:
        """The rate that all shares are of: copying 1 GiB."""
        source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        self.row("copy 1 GiB", lambda: lambda: target.copy_(source), moved=2 << 30)
        times = self._times(lambda: target.copy_(source), False, 20)
        self.copy_rate = (2 << 30) / statistics.median(times) * 1e6
        self.result["copy_gb_per_s"] = round(self.copy_rate / 1e9, 1)

    def ratio(self, name: str, to: str | float) -> float | None:
        """Median of a row, in terms of another's or of a number; None where one is missing."""
        found = {row["name"]: row["median_us"] for row in self.result["rows"] if "median_us" in row}
        below = found.get(to) if isinstance(to, str) else to
        return round(found[name] / below, 3) if below and name in found else None

    def write(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.result, indent=1) + "\n")


def graphed(run: Run) -> Run:
    """The same as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def tuned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile at its best: autotuned, with CUDA graphs."""
    torch._dynamo.reset()
    compiled = torch.compile(function, mode="max-autotune", fullgraph=True)

    def run(*arguments: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*arguments)

    return run


def time_ops(timer: Timer, net: Any) -> None:
    """Both prediction ops at the sizes of ``net`` (ResNet-18), forward and backward."""
    from pudnet import ops

    shapes, width = net.layout.shapes, net.config.width
    maps = list(net.generators.parameters())
    layers = len(net.layout.entries)
    parameters = dict(net.recurrence.named_parameters())
    order = ("start", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "out_weight", "out_bias", "state_norm_weight")
    order += ("state_norm_bias", "code_norm_weight", "code_norm_bias")
    cell = [parameters[name] for name in order]

    def walk(state: Tensor, backend: str) -> Tensor:
        return ops.layer_recurrence(state, *cell, alpha=0.1, normalise_state=True, backend=backend)

    def generate(codes: Tensor, rows: list[Tensor], dtype: torch.dtype, backend: str) -> Tensor:
        return ops.generate_weights(codes, *maps[:4], *rows, shapes, dtype=dtype, backend=backend)

    for batch in (1, 64):
        state = torch.randn(batch, 2, width, device="cuda")
        for backend in ("triton", "reference"):
            name = f"layer_recurrence L={layers} B={batch} {backend}"
            timer.row(f"{name} graph", lambda b=backend, s=state: graphed(lambda: walk(s, b)))
            timer.row(name, lambda b=backend, s=state: lambda: walk(s, b))
    numbers = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    rows_read = sum(p.numel() for p in maps[:4]) * 4
    for batch in (1, 64):
        codes = torch.randn(batch, layers, width, device="cuda")
        for row_dtype, dtype in (
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.bfloat16, torch.bfloat16),
        ):
            rows = [p.detach().to(row_dtype) for p in maps[4:]]
            moved = rows_read + sum(p.numel() for p in rows) * row_dtype.itemsize
            moved += batch * net.layout.size * dtype.itemsize
            name = f"generate_weights {numbers[row_dtype]}->{numbers[dtype]} B={batch}"
            for backend in ("triton", "reference"):
                if backend == "reference" and row_dtype != torch.float32:
                    continue

                def run(c: Tensor = codes, r: list[Tensor] = rows, d: torch.dtype = dtype, b: str = backend) -> Tensor:
                    return generate(c, r, d, b)

                timer.row(f"{name} {backend} graph", lambda run=run: graphed(run), moved=moved)
                timer.row(f"{name} {backend}", lambda run=run: run, moved=moved)
            if batch == 1:

                def warm(c: Tensor = codes, r: list[Tensor] = rows, d: torch.dtype = dtype) -> Tensor:
                    return generate(c, r, d, "triton")

                timer.row(f"{name} triton graph warm", lambda run=warm: graphed(run), moved=moved, warm=True)


def time_training(timer: Timer, net: Any) -> None:
    """Forward and backward through both ops, as a training step meets them."""
    from pudnet import use_backend

    for batch in (1, 8):
        state = torch.randn(batch, 2, net.config.width, device="cuda")
        for backend in ("triton", "reference"):

            def step(s: Tensor = state, b: str = backend) -> None:
                net.zero_grad(set_to_none=True)
                with use_backend(b, "layer_recurrence", "generate_weights"):
                    flat = net.generators(net.recurrence(s))
                flat.backward(torch.ones_like(flat))

            timer.row(f"forward and backward B={batch} {backend}", lambda step=step: step, repeats=20)


def time_prediction(timer: Timer, net: Any) -> None:
    """100 images in memory -> all weights."""
    from pudnet import use_backend
    from pudnet.optimised import OptimisedPudNet

    side = net.config.sketch_size
    images = torch.randn(100, 3, side, side, device="cuda")
    pixels = torch.randint(0, 256, (100, side, side, 3), dtype=torch.uint8, device="cuda")

    def predict(backend: str) -> Tensor:
        with use_backend(backend, "layer_recurrence", "generate_weights"):
            return net(images, [100])

    for backend in ("triton", "reference"):
        timer.row(f"sketch -> weights B=1 {backend} graph", lambda b=backend: graphed(lambda: predict(b)))
        timer.row(f"sketch -> weights B=1 {backend}", lambda b=backend: lambda: predict(b))
    timer.row("embedding B=1 graph", lambda: graphed(lambda: net.embedding(images, [100])))
    many = pixels.repeat(64, 1, 1, 1).split(100)
    for dtype in (torch.float32, torch.bfloat16):
        fast = OptimisedPudNet(net, dtype=dtype, out_dtype=dtype)
        label = "bf16" if dtype == torch.bfloat16 else "fp32"
        timer.row(f"OptimisedPudNet {label} B=1", lambda fast=fast: lambda: fast.generate(pixels))
        timer.row(
            f"OptimisedPudNet {label} B=64",
            lambda fast=fast: lambda: fast.generate_batch(list(many)),
            repeats=10,
        )


def time_autotuned(timer: Timer, net: Any) -> None:
    """The same by torch.compile at its best; last, because compiling takes longer than everything else."""
    from pudnet import use_backend

    images = torch.randn(100, 3, net.config.sketch_size, net.config.sketch_size, device="cuda")
    with use_backend("reference"):
        function = tuned(lambda x: net(x, [100]))
        timer.row("sketch -> weights B=1 max-autotune", lambda: lambda: function(images))


def time_statistics(timer: Timer) -> None:
    """Dataset statistics: native against the reference."""
    from pudnet import ops

    images = torch.randint(0, 256, (1000, 32, 32, 3), dtype=torch.uint8, device="cuda")
    features = torch.randn(10_000, 512, device="cuda")
    labels = torch.randint(0, 10, (10_000,), device="cuda")
    mean, std = [0.5] * 3, [0.25] * 3
    for backend in ("native", "reference"):
        timer.row(
            f"image_stats 1000x32x32x3 {backend}",
            lambda b=backend: lambda: ops.image_stats(images, labels[:1000], 10, mean, std, backend=b),
            moved=images.numel() * 5,
        )
        timer.row(
            f"class_stats 10000x512 {backend}",
            lambda b=backend: lambda: ops.class_stats(features, labels, 10, backend=b),
            moved=features.numel() * 4,
        )


def time_architectures(timer: Timer) -> None:
    """GHN-2 and ResNet-50: one traversal of the graph, the tiling of 94 MB, a graph -> all weights, and training."""
    from pudnet import GHN, ops, use_backend
    from pudnet.graphs import make_network

    ghn = GHN("ghn2", num_classes=1000).cuda()
    graph = ghn.graph(make_network("resnet50", classes=1000))
    prepared = ghn.prepare([graph])
    traversal = prepared.batch.traversals[0]
    with torch.no_grad():
        states, out = ghn.node_states(prepared), ghn.generate(graph)
        parts = [part for part in ghn.decoder._decoded(states, prepared.plan) if part[0].simple]
    slots, blocks, scales = zip(*parts, strict=True)
    sizes, memory = [slot.decoded[:2] for slot in slots], list(out.values())
    targets = [memory[slot.index] for slot in slots]
    moved = 4 * sum(x.numel() for x in (*blocks, *targets))

    def walk(backend: str) -> Tensor:
        with torch.no_grad(), use_backend(backend, "graph_recurrence"):
            return ghn.encoder.walk(states, traversal)

    def tile(backend: str) -> list[Tensor]:
        return ops.tile_weights(blocks, scales, sizes, targets, backend=backend)

    def generate(backend: str) -> dict[str, Tensor]:
        with use_backend(backend, "graph_recurrence", "tile_weights"):
            return ghn.generate(graph, out=out)

    def step(backend: str) -> None:
        ghn.zero_grad(set_to_none=True)
        with use_backend(backend, "graph_recurrence", "tile_weights"):
            weights = list(ghn(prepared)[0].values())
        torch.autograd.backward(weights, memory)

    for backend in ("triton", "reference"):
        for name, run, size in (("graph_recurrence", walk, 0), ("tile_weights", tile, moved)):
            timer.row(f"{name} resnet50 {backend} graph", lambda b=backend, r=run: graphed(lambda: r(b)), moved=size)
            timer.row(f"{name} resnet50 {backend}", lambda b=backend, r=run: lambda: r(b), moved=size, repeats=20)
        timer.row(f"GHN resnet50 -> weights {backend}", lambda b=backend: lambda: generate(b), repeats=10)
        timer.row(f"GHN resnet50 forward and backward {backend}", lambda b=backend: lambda: step(b), repeats=10)


def compare(timer: Timer) -> None:
    """The ratios that are asked for, as far as their rows are there."""
    best = "sketch -> weights B=1 triton graph"
    shares = {row["name"]: row.get("share_of_copy") for row in timer.result["rows"]}
    timer.result["targets"] = {
        "sketch to weights in a graph, at most 100 us": timer.ratio(best, 1.0),
        "times faster than eager, at least 15": timer.ratio("sketch -> weights B=1 reference", best),
        "times faster than max-autotune, at least 3": timer.ratio("sketch -> weights B=1 max-autotune", best),
        "generate_weights, share of copy, at least 0.75": shares.get("generate_weights fp32->fp32 B=1 triton graph"),
        "B=64, us per dataset, at most 20": timer.ratio("OptimisedPudNet fp32 B=64", 64.0),
        "training step, times faster than eager, at least 1": timer.ratio(
            "forward and backward B=8 reference", "forward and backward B=8 triton"
        ),
    }
    timer.write()
    print(json.dumps(timer.result["targets"], indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description="Build, test and time everything that needs a GPU.")
    for option in ("build", "tests", "autotune"):
        parser.add_argument(f"--no-{option}", action="store_true")
    parser.add_argument("--only", default="", metavar="PART")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu.py: no CUDA device is available")
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    began = time.perf_counter()
    if not options.no_build:
        build()
    if not options.no_tests:
        run_tests()
    sys.path.insert(0, str(ROOT))
    from pudnet import PudNet

    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    timer = Timer(options.out or ROOT / "benchmarks" / "results" / f"{name}.json", options.only)
    timer.result["seconds_to_build_and_test"] = round(time.perf_counter() - began, 1)
    timer.measure_copy()
    net = PudNet("resnet18").cuda().eval()
    time_training(timer, net)
    net.requires_grad_(False)
    time_ops(timer, net)
    time_statistics(timer)
    time_architectures(timer)
    time_prediction(timer, net)
    compare(timer)
    if not options.no_autotune:
        time_autotuned(timer, net)
    timer.result["seconds"] = round(time.perf_counter() - began, 1)
    compare(timer)
    if timer.failed:
        raise SystemExit(f"gpu.py: not measured: {', '.join(timer.failed)}")


if __name__ == "__main__":
    main()
