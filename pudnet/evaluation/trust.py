"""How far the accuracy that ``predict`` says to expect can be trusted: on many small datasets, beside the measured one.

    python -m pudnet.evaluation.trust --checkpoint convnet3 --data ../shared/data -o docs/trust.md

writes the generated section of the page, the numbers (``--json``) and a picture beside them. Some minutes, one thread.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pudnet.data import families
from pudnet.errors import InputError, message
from pudnet.evaluation import harness, tasks
from pudnet.evaluation.pages import write_section
from pudnet.evaluation.rows import Bench
from pudnet.evaluation.tasks import NATURAL, Images
from pudnet.files import atomic_path
from pudnet.predictor import Predictor

SECTION = "trust"
TEST = 1000  # images of a dataset at most that the accuracy is measured on
UNSEEN = ((5, 250), (5, 60), (10, 100), (5, 20))  # classes, images of each
TRANSFORMED = ((5, 60), (10, 40))
MADE_UP = ((5, 40), (10, 100), (20, 20))
DIGITS = (10, 30, 90)  # images of each class
LARGE = (10, 30, 100, 200)
CHARACTERS = (5, 10, 20, 40)  # classes, of 10 images each
MEAN_ABSOLUTE = math.sqrt(2 / math.pi)  # of a normal variable, in standard deviations


@dataclass(frozen=True)
class Case:
    """One small dataset: what is predicted from, and what the prediction is measured on."""

    kind: str
    train: Images
    test: Images


@dataclass(frozen=True)
class Material:
    """What datasets are drawn from; see ``tasks.Material``. ``trained``: the families the checkpoint knows."""

    data: Path
    size: int
    held_out: tuple[str, ...]
    trained: tuple[str, ...]
    seed: int

    def has(self, *names: str) -> bool:
        return all((self.data / f"{name}.npz").exists() for name in names)


def _case(kind: str, whole: Images, classes: int, images: int, seed: int, test: Images | None = None) -> Case:
    """``images`` images of each of ``classes`` random classes; measured on ``test``, or on the images that are left."""
    generator = tasks.draw(seed, "trust", kind, classes, images)
    chosen = torch.randperm(len(whole.classes), generator=generator)[:classes].tolist()
    part = tasks.only(whole, chosen)
    rows = tasks.per_class(part.labels, images, generator)
    left = torch.ones(len(part.labels), dtype=torch.bool)
    left[rows] = False
    others = part.take(left.nonzero().flatten()) if test is None else tasks.only(test, chosen)
    measured = torch.randperm(len(others.labels), generator=generator)[:TEST]
    return Case(kind, part.take(rows), others.take(measured))


def _unseen(material: Material) -> Iterator[Case]:
    train, test = tasks.held_out_parts(material.data, material.size, material.held_out)
    whole = Images(torch.cat([train.images, test.images]), torch.cat([train.labels, test.labels]), train.classes)
    for number in range(3 * len(UNSEEN)):
        ways, images = UNSEEN[number % len(UNSEEN)]
        yield _case("unseen classes of photographs", whole, ways, images, material.seed + number)


def _transformed(material: Material) -> Iterator[Case]:
    train, _ = tasks.held_out_parts(material.data, material.size, material.held_out)
    for number in range(4 * len(TRANSFORMED)):
        ways, images = TRANSFORMED[number % len(TRANSFORMED)]
        kind, rng = "the same, transformed", np.random.default_rng([material.seed, number])
        case = _case(kind, train, ways, images, material.seed + number)
        count = len(case.train.labels)
        changed = families.transform(torch.cat([case.train.images, case.test.images]), rng)
        parts = zip((case.train, case.test), (changed[:count], changed[count:]), strict=True)
        yield Case(kind, *(Images(pixels, part.labels, part.classes) for part, pixels in parts))


def _made_up(material: Material, known: bool) -> Iterator[Case]:
    kind = "made up, a family of the training" if known else "made up, a new family"
    for name in families.NAMES:
        if (name in material.trained) != known:
            continue
        for classes, images in MADE_UP:
            own = int(torch.randint(10**6, 2**31, (), generator=tasks.draw(material.seed, "trust", name, classes)))
            drawn = families.draw(name, classes, images + TEST // classes, own)
            yield _case(kind, tasks.as_images(drawn.images, drawn.labels, material.size), classes, images, own)


def _digits(material: Material) -> Iterator[Case]:
    from sklearn.datasets import load_digits

    found = load_digits()
    grey = torch.from_numpy(found.images * (255 / 16)).round().to(torch.uint8)[..., None]
    whole = tasks.as_images(grey, torch.from_numpy(found.target).long(), material.size)
    for images in DIGITS:
        yield _case("digits", whole, 10, images, material.seed)


def _set(name: str, kind: str, material: Material) -> Iterator[Case]:
    train, test = (tasks.read(material.data, name, split, material.size) for split in ("train", "test"))
    for images in LARGE:
        yield _case(kind, train, len(train.classes), images, material.seed, test)


def _characters(material: Material) -> Iterator[Case]:
    parts = [tasks.read(material.data, "omniglot28_8alphabets", split, material.size) for split in ("train", "test")]
    images, labels = torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])
    for classes in CHARACTERS:
        yield _case("Omniglot", Images(images, labels, parts[0].classes), classes, 10, material.seed)


def _noise(material: Material) -> Iterator[Case]:
    """Labels without meaning."""
    for classes in (2, 10):
        generator = tasks.draw(material.seed, "trust", "noise", classes)
        shape = (TEST + 50 * classes, material.size, material.size, 3)
        pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        whole = Images(pixels, torch.arange(len(pixels)) % classes, tuple(map(str, range(classes))))
        yield _case("noise", whole, classes, 50, material.seed)


# Files that are needed, and the datasets.
SOURCES: tuple[tuple[tuple[str, ...], Callable[[Material], Iterator[Case]]], ...] = (
    (NATURAL, _unseen),
    (NATURAL, _transformed),
    ((), partial(_made_up, known=True)),
    ((), partial(_made_up, known=False)),
    ((), _digits),
    (("fashion_mnist",), partial(_set, "fashion_mnist", "Fashion-MNIST")),
    (("mnist",), partial(_set, "mnist", "MNIST")),
    (("omniglot28_8alphabets",), _characters),
    ((), _noise),
)


def cases(material: Material, most: int | None = None) -> Iterator[Case]:
    """All datasets whose files are there, at most ``most`` from each source."""
    for files, source in SOURCES:
        if material.has(*files) and (material.held_out or files != NATURAL):
            yield from islice(source(material), most)


def measure(predictor: Predictor, case: Case) -> dict[str, Any]:
    """Predict, and compare what the report says with the accuracy on test images."""
    model = predictor.predict(case.train.images, case.train.labels)
    top1 = model.evaluate(case.test.images, case.test.labels)["top1"]
    report, n, n_test = model.report, len(case.train.labels), len(case.test.labels)
    near = report.get("familiarity")
    return {
        "kind": case.kind,
        "classes": len(case.train.classes),
        "n": n,
        "n_test": n_test,
        "expected": report["expected_accuracy"],
        "leave_one_out": model.head.expected_accuracy,
        "measured": top1,
        "error": harness.binomial_error(top1, n_test),
        "chance": MEAN_ABSOLUTE * math.sqrt(top1 * (1 - top1) * (1 / n + 1 / n_test)),
        "directions": report["directions"],
        "familiarity": near,
        "warned": near is not None and near["distance"] > near["threshold"],
        "seconds": report["seconds"]["total"],
    }


# ---- the page ---------------------------------------------------------------------------------------------------


def section(document: Mapping[str, Any], picture: str) -> list[str]:
    """The generated lines of the page, from the document alone; ``picture`` is its path from the page."""
    records, found = document["records"], document["environment"]
    total = _errors(records)
    lines = [
        f"Made by `{document['command']}` with the checkpoint `{document['checkpoint']}` (sha256 "
        f"`{document['checkpoint_sha256']}`), seed {document['seed']}, {found['date']}, pudnet {found['pudnet']}, "
        f"torch {found['torch']}.",
        "",
        f"**Over {len(records)} datasets the mean absolute error of the expected accuracy is "
        f"{100 * total['absolute']:.1f} points; {100 * total['chance']:.1f} points would be left of a perfect "
        "estimate: both accuracies are of a few images only.**",
        "",
        f"![Expected against measured accuracy]({picture})",
        "",
        "| kind | datasets | mean absolute error | of a perfect estimate | expected minus measured "
        "| the same, uncorrected | warnings |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind in dict.fromkeys(record["kind"] for record in records):
        lines.append(_row(kind, [record for record in records if record["kind"] == kind]))
    lines.append(_row("**all**", records))
    for title, warned in (("with a warning", True), ("without a warning", False)):
        chosen = [record for record in records if record["warned"] == warned]
        lines += [_row(title, chosen)] if chosen else []
    return lines


def _errors(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    gaps = [record["expected"] - record["measured"] for record in records]
    return {
        "absolute": statistics.fmean(map(abs, gaps)),
        "chance": statistics.fmean(record["chance"] for record in records),
        "signed": statistics.fmean(gaps),
        "uncorrected": statistics.fmean(record["leave_one_out"] - record["measured"] for record in records),
    }


def _row(title: str, records: Sequence[Mapping[str, Any]]) -> str:
    found = {name: 100 * value for name, value in _errors(records).items()}
    numbers = f"{found['absolute']:.1f} | {found['chance']:.1f} | {found['signed']:+.1f} | {found['uncorrected']:+.1f}"
    return f"| {title} | {len(records)} | {numbers} | {sum(record['warned'] for record in records)} |"


def draw_picture(document: Mapping[str, Any], path: Path) -> None:
    """Expected against measured accuracy, one point a dataset; a ring where the warning fired."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    records = document["records"]
    with rc_context({"svg.hashsalt": "pudnet", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(6.4, 4.2))
        axis = figure.subplots()
        least = 100 * min(min(record["expected"], record["measured"] - record["error"]) for record in records) - 2
        axis.plot([least, 100], [least, 100], color="lightgrey", zorder=0)
        for number, kind in enumerate(dict.fromkeys(record["kind"] for record in records)):
            chosen = [record for record in records if record["kind"] == kind]
            columns = [[100 * record[name] for record in chosen] for name in ("measured", "expected", "error")]
            axis.errorbar(
                columns[0], columns[1], xerr=columns[2], fmt="o", markersize=3.5, linewidth=0.8,
                color=f"C{number}", label=kind,
            )  # fmt: skip
        warned = [record for record in records if record["warned"]]
        if warned:
            places = [[100 * record[name] for record in warned] for name in ("measured", "expected")]
            axis.plot(*places, "o", markersize=8, fillstyle="none", color="black", markeredgewidth=0.7,
                      label="unlike the training: warning")  # fmt: skip
        axis.set(xlabel="measured on test images, %", ylabel="expected, %", aspect="equal")
        figure.legend(*axis.get_legend_handles_labels(), loc="center left", bbox_to_anchor=(0.9, 0.5), frameon=False)
        with atomic_path(path, "evaluation.trust") as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None}, bbox_inches="tight")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; exit status 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m pudnet.evaluation.trust", description=__doc__)
    parser.add_argument("--checkpoint", default="convnet3", help="bundled name, path or Hub id (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the .npz image sets")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/trust.md"), help="the Markdown page")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/trust.json"), help="the numbers")
    parser.add_argument("--most", type=int, help="datasets from each source at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    if options.most is not None and options.most < 1:
        raise InputError(message("evaluation.trust", "--most", "at least 1", options.most))
    bench = Bench.open(options.checkpoint)
    sources = bench.predictor.net.card.get("training", {}).get("data", [])
    trained = tuple(source["family"] for source in sources if source.get("family"))
    material = Material(options.data, bench.preprocess.size, bench.held_out, trained, options.seed)
    records = []
    for case in cases(material, options.most):
        records.append(measure(bench.predictor, case))
        told = {name: f"{100 * records[-1][name]:.1f}" for name in ("expected", "measured")}
        print(f"[{len(records)}] {case.kind}, {len(case.train.labels)} images: {told}", file=sys.stderr, flush=True)
    command = f"python -m pudnet.evaluation.trust --checkpoint {options.checkpoint} --data {options.data}"
    document = {
        "command": command + (f" --most {options.most}" if options.most else ""),
        "checkpoint": options.checkpoint,
        "checkpoint_sha256": bench.digest,
        "seed": options.seed,
        "environment": harness.environment(torch.get_num_threads()),
        "records": records,
    }
    harness.make_folder(options.json.parent, "evaluation.trust")
    harness.save(options.json, document)
    picture = options.json.with_suffix(".svg")
    draw_picture(document, picture)
    write_section(options.output, SECTION, section(document, os.path.relpath(picture, options.output.parent)))


if __name__ == "__main__":
    raise SystemExit(main())
