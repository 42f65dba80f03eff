"""``python -m pudnet.evaluation.architectures``: tables and picture of docs/architectures.md, numbers of the card."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pudnet.errors import InputError, message
from pudnet.evaluation import harness, pages
from pudnet.evaluation.architectures import measure, tables
from pudnet.models.ghn import GHN

SECTION = "unseen architectures"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; exit status 2 for bad input, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        _run(_parser().parse_args(arguments), " ".join(["python -m pudnet.evaluation.architectures", *arguments]))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the finished networks are kept and not computed again", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    usual = measure.Settings(Path("checkpoints/ghn2-fashion-second.toml"))
    parser = argparse.ArgumentParser(
        prog="python -m pudnet.evaluation.architectures",
        description="Accuracy of predicted parameters on networks no GHN has seen; finished ones are kept in --json.",
    )
    parser.add_argument(
        "--recipe",
        type=Path,
        default=usual.recipe,
        help="a recipe of the GHNs' training, with the limits of the networks (%(default)s)",
    )
    parser.add_argument("--images", type=Path, help="the image set, where it is not at the recipe's path")
    parser.add_argument("--ghn2", default="ghn2-fashion", help="bundled name or path (%(default)s)")
    for method in ("ghn1", "mlp"):
        parser.add_argument(f"--{method}", default=f"checkpoints/{method}-fashion.safetensors",
                            help="path (%(default)s); once it is gone, its finished rows still count")  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=measure.METHODS, default=list(measure.METHODS),
                        metavar="METHOD", help=f"of {', '.join(measure.METHODS)}")  # fmt: skip
    parser.add_argument("--networks", type=int, default=usual.networks, help="of each split (%(default)s)")
    parser.add_argument("--trained", type=int, default=usual.trained, help="of these, trained by SGD (%(default)s)")
    parser.add_argument("--tuning", type=int, default=usual.tuning, help="networks to tune SGD on (%(default)s)")
    parser.add_argument("--test-images", type=int, default=usual.test_images, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=usual.seed)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread; 0: this one")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/architectures.json"), help="the numbers")
    parser.add_argument("--page", type=Path, default=Path("docs/architectures.md"), help="the page with the markers")
    parser.add_argument("--card", type=Path, default=Path("pudnet/pretrained/ghn2-fashion.md"), help="the model card")
    return parser


def _run(options: argparse.Namespace, command: str) -> None:
    for name in ("networks", "trained", "tuning", "test_images"):
        if getattr(options, name) < 1:
            raise InputError(message("evaluation", f"--{name}", "at least 1", getattr(options, name)))
    known, earlier = harness.load_records(options.json), _earlier(options.json)
    ghns = [method for method in measure.GHNS if method in options.methods]
    settings = measure.Settings(
        recipe=options.recipe,
        images=options.images,
        checkpoints={
            method: measure.Checkpoint.find(getattr(options, method), earlier.get(method, {}).get("sha256"))
            for method in ghns
        },
        methods=tuple(options.methods),
        networks=options.networks,
        trained=min(options.trained, options.networks),
        tuning=options.tuning,
        test_images=options.test_images,
        seed=options.seed,
    )
    document = _document(settings, options, command, earlier)
    harness.make_folder(options.json.parent, "evaluation")
    done: list[harness.Record] = []

    def progress(records: list[harness.Record], jobs: int, of: int) -> None:
        # Everything known stays in the file until the run is complete, so that an interrupted one loses nothing.
        done.extend(records)
        keys = {record["key"] for record in done}
        harness.save(options.json, {**document, "records": done + [r for r in known if r["key"] not in keys]})
        tops = ", ".join(f"{r['method']} {100 * r['top1']:.1f}" for r in records)
        print(f"[{jobs}/{of}] {records[0]['split']}-{records[0]['number']}: {tops}", file=sys.stderr, flush=True)

    records = measure.run(settings, known=known, workers=options.workers, progress=progress)
    # Rows of methods that were not asked for stay in the file for another run; the tables leave them out.
    others = [record for record in known if record["method"] not in options.methods]
    complete = {**document, "rates": measure.rates(records), "records": records + others}
    harness.save(options.json, complete)
    picture = options.json.with_suffix(".svg")
    tables.draw(complete, picture)
    pages.write_section(options.page, SECTION, tables.markdown(complete, os.path.relpath(picture, options.page.parent)))
    pages.write_section(options.card, SECTION, tables.card(complete))
    print(
        f"{options.json}, {picture} and the section {SECTION!r} of {options.page} and {options.card}", file=sys.stderr
    )


def _earlier(path: Path) -> dict[str, Any]:
    """What an earlier run's file says of its checkpoints."""
    document = harness.load(path)
    return {} if document is None else dict(document["checkpoints"])


def _document(
    settings: measure.Settings, options: argparse.Namespace, command: str, earlier: dict[str, Any]
) -> dict[str, Any]:
    bench = measure.Bench(settings)
    return {
        "format": harness.FORMAT,
        "command": command,
        "json": str(options.json),
        "recipe": str(settings.recipe),
        "images": bench.path.name,
        "environment": harness.environment(1),
        "seed": settings.seed,
        "limits": {split: bench.limits(split) for split in settings.splits},
        "methods": list(settings.methods),
        "networks": settings.networks,
        "trained": settings.trained,
        "tuning": settings.tuning,
        "test_images": settings.test_images,
        "batch": measure.BATCH,
        "sgd": {**measure.SGD, "images": measure.SGD_IMAGES, "batch": measure.SGD_BATCH, "rates": measure.SGD_RATES,
                "warmup": measure.SGD_WARMUP, "clip": measure.SGD_CLIP},
        "checkpoints": {
            method: _described(one) if one.path.is_file() else earlier[method]
            for method, one in settings.checkpoints.items()
        },
    }  # fmt: skip


def _described(checkpoint: measure.Checkpoint) -> dict[str, Any]:
    training = GHN.load(checkpoint.path).card.get("training", {})
    return {
        "sha256": checkpoint.sha256,
        "start": training.get("start"),
        "steps": training.get("optimiser", {}).get("steps"),
        "architectures": training.get("networks", {}).get("batch"),
        "seed": training.get("seed"),
    }


if __name__ == "__main__":
    raise SystemExit(main())
