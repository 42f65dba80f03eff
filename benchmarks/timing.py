"""What the benchmarks share: check first, then time candidate and reference in turn; memory, bandwidth, file names.

Times of the CPU are CPU times of the one thread that works (page faults included), so that a busy neighbour costs
little but cache and memory bandwidth; those of a GPU are wall times up to a synchronisation. Times of machines that
are shared scatter all the same: what is compared between runs are ratios of neighbours, see ``Paired``.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pudnet import _extension
from pudnet.evaluation import harness

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DEVICE = torch.device(os.environ.get("PUDNET_BENCH_DEVICE", "cpu"))
SECONDS = float(os.environ.get("PUDNET_BENCH_SECONDS", "1.5"))  # of timing for one case, more or less
COMPILE = os.environ.get("PUDNET_BENCH_COMPILE") == "1"  # torch.compile wherever it can run, not only where it is quick
# Neighbours take bandwidth for seconds or minutes, and a reference that needs it slows down more than a candidate that
# does not: a case is timed in many such phases, for a short time in each. GPUs are not shared.
SITTINGS = 22 if DEVICE.type == "cpu" else 1
MOST_ROUNDS = 150 // SITTINGS  # of a sitting
QUICK = 0.6  # cases of which a round takes no more seconds have one more in a sitting, to warm caches and memory up
SLOW, SLOW_EVERY = 1.0, 2  # cases of which a round takes more seconds sit in every second sitting only
QUIET = 1 / 3  # of the rounds: those that count, the quickest
NOISE = 1.1  # ratios of the same thing may differ by this factor
PIECE = 2**18  # numbers that are compared at once: they stay in the cache
COPY_BYTES = 70 << 20  # as much as ResNet-18's generation reads and writes, half each; far more than a CPU's caches
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux

Run = Callable[[], Any]


def clock() -> float:
    """Seconds, of a clock that fits the device."""
    return time.thread_time() if DEVICE.type == "cpu" else time.perf_counter()


def machine() -> str:
    """Name of the processor or GPU."""
    return harness.processor_name() if DEVICE.type == "cpu" else torch.cuda.get_device_name(DEVICE)


def file_name(kind: str, suffix: str = "") -> str:
    """Of the results of this machine."""
    return re.sub(r"[^a-z0-9]+", "-", f"{kind}-{machine()}{suffix}".lower()).strip("-") + ".json"


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    extension = "none" if _extension.why_not() else _extension.load().build_info()["instruction_set"]
    return {
        **harness.environment(torch.get_num_threads(), str(DEVICE)),
        "extension": extension,
        "commit": harness.commit(),
        "load_average": round(os.getloadavg()[0], 1),
        "clock": "CPU time of the thread" if DEVICE.type == "cpu" else "wall",
        "allocator": os.environ.get("GLIBC_TUNABLES", "as it is"),
    }


def synchronise() -> None:
    """Wait for the GPU, where there is one at work."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(run: Run) -> tuple[float, Any]:
    """Time of one call, and its result."""
    start = clock()
    result = run()
    synchronise()
    return clock() - start, result


def median_seconds(run: Run, budget: float = SECONDS, least: int = 3, most: int = 50) -> float:
    """Median over as many calls as ``budget`` seconds allow, within limits, after one that warms up."""
    once, _ = seconds(run)
    rounds = max(least, min(most, int(budget / max(once, 1e-6))))
    return statistics.median(seconds(run)[0] for _ in range(rounds))


def tensors(tree: Any) -> list[Tensor]:
    """All tensors in nested containers."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def bytes_of(tree: Any) -> int:
    """Bytes of all tensors in nested containers."""
    return sum(x.numel() * x.element_size() for x in tensors(tree))


def in_float64(tree: Any) -> Any:
    """The same with float64 tensors instead of float32 ones, and the dtype instead of the dtype."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf.double()
        return torch.float64 if leaf is torch.float32 else leaf

    return pytree.tree_map(convert, tree)


def disagreement(found: Any, expected: Any) -> float:
    """Largest difference in a tensor, relative to its largest number expected; infinite for other shapes or NaN."""
    ours, theirs = tensors(found), tensors(expected)
    if [x.shape for x in ours] != [x.shape for x in theirs]:
        return math.inf
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if not b.numel():
            continue
        off, largest = [], []
        for some, wanted in zip(a.reshape(-1).split(PIECE), b.reshape(-1).split(PIECE), strict=True):
            off.append((some.double() - wanted.double()).abs_().max())
            largest.append(wanted.double().abs().max())
        error = float(torch.stack(off).max() / torch.stack(largest).max().clamp(min=1e-30))
        worst = math.inf if math.isnan(error) else max(worst, error)
    return worst


def check(found: Any, expected: Any, tolerance: float, name: str = "the result") -> float:
    """Return the disagreement; refuse, with an AssertionError, where it is too large: nothing wrong gets a time."""
    error = disagreement(found, expected)
    if not error <= tolerance:
        rule = f"agree with the reference within {tolerance:.0e}"
        raise AssertionError(f"{name} must {rule}; it differs by {error:.1e}. It is not timed.")
    return error


def give_back_freed() -> bool:
    """Hand freed memory back to the system; False where the C library cannot."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # TypeError: no such thing on Windows
        return False
    return True


def peak_memory(run: Run) -> int | None:
    """Bytes that ``run`` adds to the memory in use at its highest, its result included; None where nothing tells."""
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated(DEVICE)
        torch.cuda.reset_peak_memory_stats(DEVICE)
        run()
        return torch.cuda.max_memory_allocated(DEVICE) - before

    def read(name: str) -> int:
        return next(1024 * int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name))

    gc.collect()
    if not give_back_freed():  # what was freed before is not to be used again
        return None
    try:
        CLEAR.write_text("5")  # the highest mark starts anew
        before = read("VmRSS")
    except (OSError, AttributeError, StopIteration):
        return None
    run()
    return max(0, read("VmHWM") - before)


class Copy:
    """Copying memory: the rate that all shares of bandwidth are of."""

    def __init__(self) -> None:
        size = COPY_BYTES if DEVICE.type == "cpu" else 1 << 30
        self.source = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
        self.target = self.source.clone()

    def rate(self) -> float:
        """Bytes a second, those read and those written."""
        taken = [seconds(lambda: self.target.copy_(self.source))[0] for _ in range(6)]
        return 2 * len(self.source) / statistics.median(taken[1:])


@dataclass(frozen=True)
class Paired:
    """Times of a candidate and of the reference that ran shortly before it, round by round.

    A neighbour that slows the machine for a while meets both, so the median of the rounds' ratios is much steadier
    than a ratio of times taken apart. One that takes bandwidth still meets the one that needs more of it harder, and
    can only add time: the rounds that count are those that it disturbed least.
    """

    candidate: list[float]
    reference: list[float]

    def ratio(self, first: int = 0, last: int | None = None) -> float:
        """Times faster than the reference: the median over the quickest third of the rounds from ``first`` to ``last``.

        Rounds are ordered by candidate times reference, which favours neither.
        """
        pairs = [*zip(self.candidate[first:last], self.reference[first:last], strict=True)]
        pairs.sort(key=lambda pair: pair[0] * pair[1])
        return statistics.median(slow / max(fast, 1e-9) for fast, slow in pairs[: math.ceil(len(pairs) * QUIET)])

    def add(self, candidate: float, reference: float) -> None:
        """One more round."""
        self.candidate.append(candidate)
        self.reference.append(reference)

    @property
    def noisy(self) -> bool:
        """Whether the two halves of the run tell different ratios; a single round tells nothing."""
        half = len(self.candidate) // 2
        if not half:
            return True
        halves = self.ratio(0, half), self.ratio(half)
        return max(halves) > NOISE * min(halves)


def rounds_of(round_seconds: float) -> int:
    """How many rounds of a case a sitting has."""
    return max(1, min(MOST_ROUNDS, int(SECONDS / SITTINGS / max(round_seconds, 1e-6))))


@dataclass
class Row:
    """What a row runs, how long that took in all rounds so far, and where its columns go."""

    candidate: Run | None  # None: the row is the reference's own
    reference: Run
    paired: Paired
    columns: dict[str, Any]
    moved: int  # bytes
    rate: float  # of copying, bytes a second

    def tell(self) -> None:
        """Write what all sittings together say."""
        median = statistics.median(self.paired.candidate)
        self.columns |= {
            "median_ms": 1e3 * median,
            "rounds": len(self.paired.candidate),
            "share_of_copy": self.moved / median / self.rate,
        }
        if self.candidate is not None:
            self.columns |= {
                "reference_ms": 1e3 * statistics.median(self.paired.reference),
                "times_faster": self.paired.ratio(),
                "noisy": self.paired.noisy,
            }


def sit(rows: Sequence[Row], sitting: int = 0) -> None:
    """Time the rows of a case, where it takes part in this sitting: in turn, the reference once for all of them."""

    def one_round() -> list[float]:
        return [seconds(rows[0].reference)[0], *(seconds(row.candidate)[0] for row in rows if row.candidate)]

    once = statistics.median(rows[0].paired.reference)
    once += sum(statistics.median(row.paired.candidate) for row in rows if row.candidate)
    if once > SLOW and sitting % SLOW_EVERY:
        return
    if once <= QUICK:
        one_round()
    for _ in range(rounds_of(once)):
        reference, *candidates = one_round()
        for row in rows:
            row.paired.add(candidates.pop(0) if row.candidate else reference, reference)
    for row in rows:
        row.tell()


def measure(
    benchmark: Any,
    copy: Copy,
    candidate: Run,
    reference: Run | None,
    *,
    expected: Any,
    tolerance: float,
    reads: Any = (),
    kept: bool = False,
) -> Row | None:
    """Check ``candidate``, then time one round of ``reference`` and it, as one row of pytest-benchmark.

    Args:
        benchmark: pytest-benchmark's fixture.
        copy: measured before the row, for the share of the bandwidth.
        candidate, reference: what is timed; no reference where the candidate is it, as a ratio would say nothing.
        expected: what the candidate has to return.
        tolerance: of ``disagreement``.
        reads: the tensors the candidate has to read at least once; what it returns is what it has to write.
        kept: whether the candidate returns memory it uses again, which the check must not leave to be found there.

    Returns:
        What the sittings need; None with --benchmark-disable.

    Raises:
        AssertionError: the candidate's result is wrong.
    """
    first_call, found = seconds(candidate)
    error = check(found, expected, tolerance, benchmark.name)
    if kept:  # what wrote nothing would have returned what an earlier run left
        for x in tensors(found):
            x.fill_(torch.nan)
        error = check(candidate(), expected, tolerance, benchmark.name)
    moved = bytes_of(reads) + bytes_of(found)
    del found, expected
    memory = peak_memory(candidate)
    gc.freeze()  # rows stay: the next collection need not look at them, which takes 0.3 s
    rate = copy.rate()
    if reference and DEVICE.type == "cuda":  # one sitting only: its first call must not say how long that is
        seconds(reference)
    references: list[float] = []

    def before() -> None:
        if reference:
            references.append(seconds(reference)[0])

    def run() -> Any:
        result = candidate()
        synchronise()
        return result

    benchmark.pedantic(run, setup=before)
    if benchmark.stats is None:  # --benchmark-disable: the check was all
        return None
    benchmark.extra_info |= {
        "first_call_ms": 1e3 * first_call,
        "error": error,
        "bytes_moved": moved,
        "copy_gb_s": rate / 1e9,
        "peak_memory_bytes": memory,
    }
    times = benchmark.stats.stats.data  # pytest-benchmark's own columns are of all sittings, too
    if reference:
        row = Row(candidate, reference, Paired(times, references), benchmark.extra_info, moved, rate)
    else:
        row = Row(None, candidate, Paired(times, list(times)), benchmark.extra_info, moved, rate)
    row.tell()
    if DEVICE.type == "cuda":
        benchmark.extra_info |= host_and_device(candidate)
    return row


def host_and_device(run: Run, repeats: int = 20) -> dict[str, float]:
    """Medians in ms: until the call returns, and of the GPU between two events."""
    host, device = [], []
    for _ in range(repeats):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda.synchronize()
        start = time.perf_counter()
        events[0].record()
        run()
        events[1].record()
        host.append(1e3 * (time.perf_counter() - start))
        torch.cuda.synchronize()
        device.append(events[0].elapsed_time(events[1]))
    return {"host_ms": statistics.median(host), "device_ms": statistics.median(device)}


if __name__ == "__main__":  # where `make bench` writes: timing.py KIND [SUFFIX]
    print(RESULTS / file_name(*sys.argv[1:]))
