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

TASKS, QUICK_TASKS, FULL_TASKS = 4, 2, 12
# What a run of less than half an hour on two cores leaves out.
SLOW_ROWS = ("sgd-5", "sgd-20", "adam-20", "finetune-5", "predicted-finetune-1", "predicted-finetune-5")
SLOW_GROUPS = ("many",)


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
    parser.add_argument("--unconditioned", type=Path, default=Path("checkpoints/convnet3-unconditioned.safetensors"),
                        help="checkpoint of the same target, trained on blank sketches")  # fmt: skip
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the .npz image sets")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results.md"), help="the Markdown page")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/evaluation.json"), help="the numbers")
    parser.add_argument("--full", action="store_true",
                        help=f"every group and row, and {FULL_TASKS} tasks of unseen classes: hours; otherwise less "
                        "than half an hour")  # fmt: skip
    parser.add_argument("--groups", nargs="+", choices=GROUPS, metavar="GROUP",
                        help=f"of {', '.join(GROUPS)} (default: without {', '.join(SLOW_GROUPS)})")  # fmt: skip
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW",
                        help=f"of {', '.join(ROWS)} (default: without {', '.join(SLOW_ROWS)})")  # fmt: skip
    parser.add_argument("--tasks", type=int, help=f"tasks of unseen classes (default: {TASKS})")
    parser.add_argument("--ways", type=int, default=5, help="classes of such a task (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_TASKS} tasks of unseen classes, and the digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread; 0: this one")
    parser.add_argument("--fresh", action="store_true", help="compute every row again")
    return parser


def _place(record: harness.Record) -> tuple[str, int, str]:
    return record["group"], record["number"], record["row"]


def _settle(options: argparse.Namespace) -> None:
    """Fill in what was not asked for."""
    if options.groups is None:
        usual = ["unseen", "digits"] if options.quick else [key for key in GROUPS if key not in SLOW_GROUPS]
        options.groups = list(GROUPS) if options.full else usual
    if options.rows is None:
        options.rows = [key for key in ROWS if options.full or key not in SLOW_ROWS]
    if options.tasks is None:
        options.tasks = FULL_TASKS if options.full else QUICK_TASKS if options.quick else TASKS


def _run(options: argparse.Namespace) -> int:
    command = _command(options)
    _settle(options)
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
        groups=tuple(options.groups),
        rows=tuple(options.rows),
        repeats=options.tasks,
        ways=options.ways,
        seed=options.seed,
        unconditioned=options.unconditioned,
    )
    bench = Bench.open(options.checkpoint, options.unconditioned)
    document = {
        "format": harness.FORMAT,
        "command": command,
        "checkpoint": options.checkpoint,
        "checkpoint_sha256": bench.digest,
        "unconditioned": str(options.unconditioned),
        "unconditioned_sha256": bench.weights(ROWS["unconditioned-kernel"]),
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
        # What was not asked for stays in the file for another run; the page and its pictures leave it out.
        asked = {_place(record) for record in records}
        others = [record for record in known if _place(record) not in asked]
        harness.save(options.json, {**complete, "records": records + others})
        pictures = tables.draw_pictures(complete, options.json.parent)
        relative = {title: os.path.relpath(path, options.output.parent) for title, path in pictures.items()}
        page.write_text(tables.markdown(complete, relative))
    print(f"{options.output}, {options.json} and {len(pictures)} pictures beside it", file=sys.stderr)
    return 0


def _command(options: argparse.Namespace) -> str:
    parts = [f"python -m pudnet.evaluation --checkpoint {options.checkpoint} --data {options.data} -o {options.output}"]
    parts += [f"--seed {options.seed} --ways {options.ways} --workers {options.workers}"]
    parts += [f"--{name}" for name in ("quick", "full") if getattr(options, name)]
    parts += [f"--tasks {options.tasks}"] if options.tasks is not None else []
    parts += [f"--{name} {' '.join(chosen)}" for name in ("groups", "rows") if (chosen := getattr(options, name))]
    return " ".join(parts)


if __name__ == "__main__":
    raise SystemExit(main())
