"""What `make stress` runs at full counts, and the tests in small shares: fuzzers, injected faults, load.

A part is a function ``(count, seed) -> figures`` under the decorator ``part`` in a module named in ``MODULES``. The
same count and seed try the same cases. ``figures`` is fit for JSON; its ``"failures"`` is a list of one line for each
case that went wrong, with what is needed to try it again. Everything else in it is reported as it is.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Figures = dict[str, Any]
Run = Callable[[int, int], Figures]

# Of this folder, in the order of the report.
MODULES = ("checkpoints", "images", "operators", "disks", "kills", "serving")


@dataclass(frozen=True)
class Part:
    """``title`` names what is counted; ``full`` is the count of `make stress`, ``quick`` that of `make test`."""

    name: str
    title: str
    full: int
    quick: int
    run: Run


PARTS: dict[str, Part] = {}


def part(name: str, title: str, *, full: int, quick: int) -> Callable[[Run], Run]:
    """Register a function as the part ``name``."""

    def register(run: Run) -> Run:
        PARTS[name] = Part(name, title, full, quick, run)
        return run

    return register


def load() -> dict[str, Part]:
    """Every part by name."""
    for module in MODULES:
        importlib.import_module(f"{__name__}.{module}")
    return PARTS
