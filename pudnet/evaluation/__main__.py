"""``python -m pudnet.evaluation``: every table and picture of the documentation."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from pudnet.errors import InputError, message
from pudnet.evaluation import harness, tables
from pudnet.evaluation.rows import ROWS, Bench
from pudnet.evaluation.tasks import GROUPS
from pudnet.files import atomic_path

QUICK_REPEATS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; exit status 2 for bad input, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the finished tasks are kept and not computed again", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pudnet.evaluation",
        description="Evaluate a checkpoint beside all baselines; finished rows are kept in --json and not run again.",
        epilog="example: python -m pudnet.evaluation --checkpoint convnet3 --data ../shared/data -o docs/results.md",
    )
    parser.add_argument("--checkpoint", default="convnet3", help="bundled name, path or Hub id (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the .npz image sets")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results.md"), help="the Markdown page")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/evaluation.json"), help="the numbers")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP",
                        help=f"of {', '.join(GROUPS)}")  # fmt: skip
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW",
                        help=f"of {', '.join(ROWS)}")  # fmt: skip
    parser.add_argument("--tasks", type=int, default=20, help="tasks of unseen classes (default: %(default)s)")
    parser.add_argument("--ways", type=int, default=5, help="classes of such a task (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_REPEATS} tasks of unseen classes, and the digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread; 0: this one")
    parser.add_argument("--fresh", action="store_true", help="compute every row again")
    return parser


def _run(options: argparse.Namespace) -> int:
    for name, value, least in (("--tasks", options.tasks, 1), ("--ways", options.ways, 2), ("--seed", options.seed, 0)):
        if value < least:
            raise InputError(message("evaluation", name, f"at least {least}", value))
    known = [] if options.fresh else harness.load_records(options.json)
    data = options.data if options.data.is_dir() else None
    if data is None:
        print(
            f"{options.data} is no folder: only scikit-learn's digits and made-up families are evaluated",
            file=sys.stderr,
        )
    settings = harness.Settings(
        checkpoint=options.checkpoint,
        data=data,
        groups=("unseen", "digits") if options.quick else tuple(options.groups),
        rows=tuple(options.rows),
        repeats=QUICK_REPEATS if options.quick else options.tasks,
        ways=options.ways,
        seed=options.seed,
    )
    bench = Bench.open(options.checkpoint)
    document = {
        "format": harness.FORMAT,
        "command": _command(options),
        "checkpoint": options.checkpoint,
        "checkpoint_sha256": bench.digest,
        "seed": options.seed,
        "ways": options.ways,
        "processes": max(1, options.workers),
        "environment": harness.environment(1 if options.workers else torch.get_num_threads()),
        "skipped": {},
    }
    done: list[harness.Record] = []

    def progress(records: list[harness.Record], tasks: int, of: int) -> None:
        # Everything known stays in the file until the run is complete, so that an interrupted one loses nothing.
        done.extend(records)
        keys = {record["key"] for record in done}
        kept = [record for record in known if record["key"] not in keys]
        harness.save(options.json, {**document, "records": done + kept})
        tops = ", ".join(f"{record['row']} {100 * record['top1']:.1f}" for record in records)
        print(f"[{tasks}/{of}] {records[0]['group']} {records[0]['number']}: {tops}", file=sys.stderr, flush=True)

    for path in (options.json, options.output):
        harness.make_folder(path.parent, "evaluation")
    # The page is claimed first, so that a path that cannot be written costs no work.
    with atomic_path(options.output, "evaluation") as page:
        records, skipped = harness.run(settings, known=known, workers=options.workers, progress=progress)
        complete = {**document, "skipped": skipped, "records": records}
        harness.save(options.json, complete)
        pictures = tables.draw_pictures(complete, options.json.parent)
        relative = {title: os.path.relpath(path, options.output.parent) for title, path in pictures.items()}
        page.write_text(tables.markdown(complete, relative))
    print(f"{options.output}, {options.json} and {len(pictures)} pictures beside it", file=sys.stderr)
    return 0


def _command(options: argparse.Namespace) -> str:
    parts = [f"python -m pudnet.evaluation --checkpoint {options.checkpoint} --data {options.data} -o {options.output}"]
    parts += [f"--seed {options.seed} --tasks {options.tasks} --ways {options.ways} --workers {options.workers}"]
    parts += ["--quick"] if options.quick else []
    for name, table in (("groups", GROUPS), ("rows", ROWS)):
        chosen = getattr(options, name)
        parts += [] if chosen == list(table) else [f"--{name} {' '.join(chosen)}"]
    return " ".join(parts)


if __name__ == "__main__":
    raise SystemExit(main())
