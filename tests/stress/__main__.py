"""``PYTHONPATH=tests python -m stress``: run parts, each in a process of its own, and write the report.

The figures go to ``benchmarks/results/stress.json`` and, as a table, to ``docs/stress.md``. Parts that are not run keep
their figures of the last time. The exit status is 1 where a part failed.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pudnet import __version__
from pudnet.files import atomic_path
from stress import Figures, Part, load

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "stress.json"
PAGE = ROOT / "docs" / "stress.md"


def measured(part: Part, count: int, seed: int) -> Figures:
    """Figures of one part, run here, with its time and memory."""
    before, start = _resident(), time.monotonic()
    figures = part.run(count, seed)
    return {
        "title": part.title,
        "count": count,
        "seed": seed,
        "seconds": round(time.monotonic() - start, 1),
        "mib_start": before,
        "mib_end": _resident(),
        "mib_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        **figures,
    }


def apart(part: Part, count: int, seed: int) -> Figures:
    """The same in a process of its own: one that dies is a failure like others."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "stress", part.name, "--count", str(count), "--seed", str(seed)]
        done = subprocess.run([*command, "--here", str(answer)])
        if done.returncode or not answer.exists():
            died = f"the process ended with {done.returncode}"
            return {"title": part.title, "count": count, "seed": seed, "failures": [died]}
        return json.loads(answer.read_text())


def table(document: dict) -> str:
    """The page: one row for each part, then its own figures."""
    lines = [
        "# Stress report",
        "",
        "Written by `make stress` (`tests/stress/`). `make test` runs small shares.",
        "",
        "| part | what is counted | cases | failures | seconds | MiB at start, end, peak | pudnet, Python |",
        "|---|---|---:|---:|---:|---|---|",
    ]
    for name, figures in document.items():
        memory = ", ".join(str(figures.get(f"mib_{when}", "-")) for when in ("start", "end", "peak"))
        lines.append(
            f"| {name} | {figures['title']} | {figures['count']:,} | {len(figures['failures'])} | "
            f"{figures.get('seconds', '-')} | {memory} | {figures['made_with']} |"
        )
    usual = {"title", "count", "seed", "seconds", "mib_start", "mib_end", "mib_peak", "failures", "made_with"}
    for name, figures in document.items():
        own = {key: value for key, value in figures.items() if key not in usual}
        if own:
            lines += ["", f"## {name}", "", "| figure | value |", "|---|---|"]
            lines += [f"| {key.replace('_', ' ')} | {_plain(value)} |" for key, value in own.items()]
    return "\n".join(lines) + "\n"


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _resident() -> int:
    """MiB of memory this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20


def _report(parts: dict[str, Part], name: str, figures: Figures) -> None:
    """Renew the figures of one part; the others' stay."""
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    document[name] = figures
    ordered = {name: document[name] for name in parts if name in document}
    with atomic_path(RESULTS, "stress") as temporary:
        temporary.write_text(json.dumps(ordered, indent=1) + "\n")
    with atomic_path(PAGE, "stress") as temporary:
        temporary.write_text(table(ordered))


def main() -> int:
    parts = load()
    parser = argparse.ArgumentParser(prog="stress", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; all by default")
    parser.add_argument("--count", type=int, help="instead of each part's own full count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--here", type=Path, metavar="FILE", help="run one part in this process, figures to FILE")
    parser.add_argument("--dry", action="store_true", help="print the figures, write no report")
    options = parser.parse_args()
    if unknown := sorted(set(options.parts) - set(parts)):
        parser.error(f"unknown parts: {', '.join(unknown)}")
    chosen = [parts[name] for name in options.parts or parts]
    if options.here:
        faulthandler.enable()
        figures = measured(chosen[0], options.count or chosen[0].full, options.seed)
        options.here.write_text(json.dumps(figures))
        return 0
    failed = False
    for part in chosen:
        figures = apart(part, options.count or part.full, options.seed)
        figures["made_with"] = f"{__version__}, {platform.python_version()}"
        failed = failed or bool(figures["failures"])
        print(json.dumps({part.name: figures}, indent=1), flush=True)
        if not options.dry:
            _report(parts, part.name, figures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
