"""Runs every row on every task, in one process or several, and keeps what is computed in one JSON file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from pudnet._version import __version__
from pudnet.data import png
from pudnet.errors import InputError, message
from pudnet.evaluation.rows import ROWS, Bench, Row
from pudnet.evaluation.tasks import GROUPS, Material, available
from pudnet.files import atomic_path

FORMAT = 1
Record = dict[str, Any]
Job = TypeVar("Job")


@dataclass(frozen=True)
class Settings:
    """One run of the harness.

    Attributes:
        checkpoint: what ``Predictor.from_pretrained`` takes.
        data: folder with the image sets, or None.
        groups, rows: keys of ``GROUPS`` and ``ROWS``.
        repeats: tasks of each repeated group.
        ways: classes of an unseen-class task.
        seed: of every draw.
        held_out: classes the checkpoint was not trained on; None: as its card says.
        unconditioned: checkpoint of the same target, trained on blank sketches; its rows are left out without.
    """

    checkpoint: str
    data: Path | None
    groups: tuple[str, ...] = tuple(GROUPS)
    rows: tuple[str, ...] = tuple(ROWS)
    repeats: int = 20
    ways: int = 5
    seed: int = 0
    held_out: tuple[str, ...] | None = None
    unconditioned: Path | None = None


def run(
    settings: Settings,
    *,
    known: Iterable[Record] = (),
    workers: int = 0,
    progress: Callable[[list[Record], int, int], None] | None = None,
) -> tuple[list[Record], dict[str, str]]:
    """Compute all rows of all tasks.

    Args:
        known: records of earlier runs; those whose images, settings and weights have not changed are taken over.
        workers: processes of one thread each; 0: this process, with the threads it has.
        progress: called after each task with all its records, the number of tasks done, and of all tasks.

    Returns:
        The records, in the order of the groups, tasks and rows, and the reason for each group that was left out.

    Raises:
        InputError: an unknown group or row, a checkpoint or file that cannot be read.
    """
    for name, keys, table in (("groups", settings.groups, GROUPS), ("rows", settings.rows, ROWS)):
        if unknown := sorted(set(keys) - set(table)):
            raise InputError(message("evaluation", name, f"among {sorted(table)}", unknown))
    runner = _Runner(settings, {record["key"]: record for record in known})
    skipped = {key: reason for key in settings.groups if (reason := available(GROUPS[key], runner.material))}
    # The tasks of whole datasets take longest, so they go first.
    jobs = [(key, number) for key in settings.groups if key not in skipped for number in range(runner.repeats(key))]
    ordered = sorted(jobs, key=lambda job: GROUPS[job[0]].repeated)
    found: dict[tuple[str, int], list[Record]] = {}
    for job, records in spread(partial(_Runner, settings, runner.known), ordered, workers):
        found[job] = records
        if progress is not None:
            progress(records, len(found), len(jobs))
    return [record for job in jobs for record in found[job]], skipped


class _Runner:
    """Computes one task at a time; every process has its own."""

    def __init__(self, settings: Settings, known: Mapping[str, Record]) -> None:
        self.settings, self.known = settings, known
        self.bench = Bench.open(settings.checkpoint, settings.unconditioned)
        held_out = self.bench.held_out if settings.held_out is None else settings.held_out
        sources = self.bench.predictor.net.card.get("training", {}).get("data", [])
        seen = tuple(source["family"] for source in sources if source.get("family"))
        self.material = Material(settings.data, self.bench.preprocess.size, held_out, settings.ways, seen)

    def repeats(self, group: str) -> int:
        chosen = GROUPS[group]
        wanted = self.settings.repeats if chosen.repeated else 1
        return min(wanted, chosen.most) if chosen.most else wanted

    def __call__(self, job: tuple[str, int]) -> list[Record]:
        group, number = job
        task = GROUPS[group].build(self.material, number, self.settings.seed)
        records = []
        for key in self.settings.rows:
            row = ROWS[key]
            if not self.bench.can_run(row, task):
                continue
            identity = _identity(task.fingerprint, row, self.bench)
            record = self.known.get(identity)
            if record is None:
                sizes = {"n_train": len(task.train.labels), "n_test": len(task.test.labels)}
                outcome = row.run(self.bench, task).to_json()
                record = {"key": identity, "group": group, "number": number, "row": key, **sizes, **outcome}
            records.append(record)
        return records


def _identity(fingerprint: str, row: Row, bench: Bench) -> str:
    """A row of a task is computed again when its images, its settings or the weights it reads change."""
    parts = [FORMAT, fingerprint, row.key, row.settings, bench.describe(), bench.weights(row)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def spread(
    make: Callable[[], Callable[[Job], list[Record]]], jobs: Sequence[Job], workers: int
) -> Iterator[tuple[Job, list[Record]]]:
    """Yield every job and its records, in the order in which they are finished.

    Args:
        make: what a process works with; called once in each, so it must be picklable.
        workers: processes of one thread each; 0: this process, with the threads it has.
    """
    if workers == 0:
        work = make()
        for job in jobs:
            yield job, work(job)
        return
    # Fresh processes: forking one that has already run torch's threads can hang.
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (make,)) as pool:
        try:
            futures = {pool.submit(_work, job): job for job in jobs}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_worker: Callable[[Any], list[Record]] | None = None  # of a worker process


def _start_worker(make: Callable[[], Callable[[Any], list[Record]]]) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = make()


def _work(job: Any) -> list[Record]:
    assert _worker is not None
    return _worker(job)


# ---- numbers ----------------------------------------------------------------------------------------------------


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of the tasks and its standard error; None where there is one task."""
    if len(values) < 2:
        return values[0], None
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def binomial_error(top1: float, n: int) -> float:
    """Standard error of an accuracy measured on ``n`` images: of the choice of test images only."""
    return math.sqrt(top1 * (1 - top1) / n)


# ---- the file ---------------------------------------------------------------------------------------------------


def environment(threads: int, device: str = "cpu") -> dict[str, Any]:
    """Hardware and versions, for the head of every table."""
    cuda = torch.device(device).type == "cuda"
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "processor": processor_name(),
        **({"gpu": torch.cuda.get_device_name(torch.device(device)), "cuda": torch.version.cuda} if cuda else {}),
        "cores": os.cpu_count(),
        "threads_per_process": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "opencv": getattr(png.opencv(), "__version__", None),  # reads small PNG files
        "pudnet": __version__,
    }


def processor_name() -> str:
    """The processor's name, from the system where it tells, and its vectors: virtual machines share a name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def commit() -> str | None:
    """The commit of the working tree this package is in, with a ``+`` where files differ from it; None elsewhere."""
    folder = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def make_folder(path: Path, where: str) -> None:
    """Make a folder and those above it.

    Raises:
        InputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        got = f"{str(path)!r} ({error.strerror})"
        raise InputError(message(where, "the folder", "one that can be made", got)) from error


def save(path: Path, document: Mapping[str, Any]) -> None:
    """Write the results as JSON."""
    with atomic_path(path, "evaluation") as temporary:
        temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")


def load(path: Path) -> dict[str, Any] | None:
    """The document of an earlier run; None where there is no file of this format."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) and document.get("format") == FORMAT else None


def load_records(path: Path) -> list[Record]:
    """The records of an earlier run; none where there is no file of this format."""
    document = load(path)
    return [] if document is None else list(document["records"])
