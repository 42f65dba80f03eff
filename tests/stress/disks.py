"""Full disks, lost permissions and folders that vanish: an error of pudnet, the earlier file whole, nothing left."""

from __future__ import annotations

import functools
import os
import random
import resource
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import _dynamo  # noqa: F401 - Adam and the log would import these two in every forked process
from torch.utils import tensorboard  # noqa: F401

from pudnet import Predictor
from pudnet.files import atomic_path
from pudnet.models.ghn import GHN
from pudnet.sketch import sketch
from stress import Figures, part
from stress.kills import train_tiny, write_data
from stress.processes import DONE, REFUSED, give_up_rights, start, temporaries, tiny_net, wait


@part("disks", "writes to full disks, without permission, or into folders that vanish", full=300, quick=12)
def run(count: int, seed: int) -> Figures:
    """Each trial writes one kind of file under one fault, in a process of its own."""
    torch.set_num_threads(1)
    failures, outcomes, faults = [], Counter(), Counter()
    with tempfile.TemporaryDirectory() as name, _small_disk(Path(name) / "disk") as disk:
        folder = Path(name)
        folder.chmod(0o755)
        write_data(folder)
        writers = _writers(folder)
        (folder / "unhindered").mkdir()
        for kind, write in writers.items():  # also imports what a process without rights could not read
            write(folder / "unhindered" / kind)
        possible = [file_size_limit, *([full_disk] if disk else []), read_only_folder, vanished_folder]
        for trial in range(count):
            rng = random.Random(f"{seed}/{trial}")
            fault, kind = rng.choice(possible), rng.choice(sorted(writers))
            place = (disk if fault is full_disk and disk else folder) / f"place{trial}"
            place.mkdir()
            path = place / "file"
            before = b"earlier" if rng.random() < 0.5 and kind != "training" else None
            if before:
                path.write_bytes(before)
            os.chmod(place, 0o777)
            output = folder / "output"
            child = start(functools.partial(_hindered, fault, rng, writers[kind], path), output)
            ended = wait(child)
            for filler in disk.glob("filler*") if disk else ():
                filler.unlink()
            faults[fault.__name__] += 1
            outcomes[{DONE: "written", REFUSED: "refused"}.get(ended, "broken")] += 1
            found = f"trial {trial} ({kind}, {fault.__name__})"
            if ended not in (DONE, REFUSED):
                failures.append(f"{found}: {output.read_text(errors='replace')[-250:]}")
            if place.is_dir():
                os.chmod(place, 0o777)
                kept = path.read_bytes() if path.is_file() else None
                if ended == REFUSED and before and kept != before:
                    failures.append(f"{found}: the earlier file changed")
                left = temporaries(place) + (temporaries(path) if path.is_dir() else [])
                if left:
                    failures.append(f"{found}: {left[0].name} is left")
            subprocess.run(["rm", "-rf", str(place), f"{place}-moved"], check=True)
    return {
        "failures": failures,
        "outcomes": dict(sorted(outcomes.items())),
        "faults": dict(sorted(faults.items())),
        "kinds_of_files": sorted(writers),
    }


def _writers(folder: Path) -> dict[str, Callable[[Path], object]]:
    draws = np.random.default_rng(0)
    pixels = draws.integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
    net = tiny_net()
    model = Predictor(net).predict(pixels, np.arange(24) % 3)

    def claimed(path: Path) -> None:
        with atomic_path(path) as temporary:  # as the command line does
            model.save(temporary)

    def text(path: Path) -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("x" * 200_000)

    return {
        "predictor": net.save,
        "model": model.save,
        "claimed model": claimed,
        "ghn": GHN(width=4, num_classes=2).save,
        "sketch": sketch([(pixels, np.arange(24) % 3)], 20).save,
        "text": text,
        "training": lambda path: train_tiny(folder, path),
    }


def _hindered(
    fault: Callable[[Path, random.Random], None], rng: random.Random, write: Callable[[Path], object], path: Path
) -> None:
    fault(path.parent, rng)
    write(path)


def file_size_limit(place: Path, rng: random.Random) -> None:
    """No file may grow beyond so many bytes; Python ignores the signal and gets EFBIG, as with a quota."""
    limit = rng.choice([0, 1, 100, rng.randrange(400_000), rng.randrange(4_000_000)])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def full_disk(place: Path, rng: random.Random) -> None:
    """A file system with little or no room left."""
    room = rng.choice([0, 4096, rng.randrange(400_000)])
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    (place.parent / f"filler{place.name}").write_bytes(bytes(max(free - room, 0)))


def read_only_folder(place: Path, rng: random.Random) -> None:
    """A folder that may not be written to, by a user who is not root."""
    os.chmod(place, 0o555)
    give_up_rights()


def vanished_folder(place: Path, rng: random.Random) -> None:
    """A folder that is moved away."""
    place.rename(f"{place}-moved")


@contextmanager
def _small_disk(place: Path) -> Iterator[Path | None]:
    """A file system of 2 MB, where this user may mount one."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=777", "none", str(place)]
    if subprocess.run(command, capture_output=True).returncode:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)
