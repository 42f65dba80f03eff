"""Prediction against training: how long the same network must be trained to be as accurate as a predicted one.

``python -m pudnet.evaluation.training_time`` (``make bench-train``) compares on every dataset, with the peers of
``rows.py`` in the same run, and writes one JSON file and one picture for the machine.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pudnet.descent import accuracy, native_bfloat16
from pudnet.errors import InputError, message
from pudnet.evaluation import harness
from pudnet.evaluation.rows import ROWS, SCRATCH, Bench
from pudnet.evaluation.scratch import ScratchResult, train_from_scratch
from pudnet.evaluation.tasks import GROUPS, Group, Images, Material, Task, available, validation_classes
from pudnet.files import atomic_path
from pudnet.memory import keep_freed
from pudnet.predictor import Predictor
from pudnet.stages import STAGES

FORMAT = 2
POINTS, POINTS_PER_EPOCH = 32, 2  # of every curve at most
OPTIMIZERS = {"adam": "Adam", "sgd": "SGD"}
# Longer schedules are run only while no shorter one was as accurate as the predictions.
ALWAYS = 20
SHIFTED_FROM = max(SCRATCH)  # epochs from which moving the images helps (see ``rows.SCRATCH``)
PEERS = (
    "random-kernel",
    "pca-kernel",
    "pixels-kernel",
    "pixels-mean",
    "pixels-logistic",
    "pixels-forest",
    "finetune-5",
)
# Options of ``Predictor.predict`` for the predictions of each dataset, by their names in tables.
PREDICTIONS: dict[str, dict[str, Any]] = {"full": {}, "quick": {"quick": True}}
RATIOS = {
    "weights": "generated weights alone",
    "directed": "weights with the dataset's directions",
    "classifier": "weights, calibration, head",
    "files": "everything from files",
}

DATASETS: dict[str, Group] = {
    "digits": GROUPS["digits"],
    "mnist": GROUPS["mnist"],
    "fashion": GROUPS["fashion"],
    "unseen": GROUPS["unseen"],
    "validation": Group("All unseen classes of Tiny-ImageNet", validation_classes, GROUPS["unseen"].files),
}


@dataclass(frozen=True)
class Settings:
    """One comparison.

    Attributes:
        checkpoint: what ``Predictor.from_pretrained`` takes.
        data: folder with the image sets, or None.
        datasets: keys of ``DATASETS``.
        head: of the predicted network.
        device: of the prediction and of the training; the peers run on the CPU.
        repeats: predictions timed; their medians count.
        epochs: schedules to train with, each from the start, with each optimizer.
        budget: seconds of training, measuring included; every dataset gets an equal share of what is left, and what
            would not fit into it is left out.
        peers: keys of ``ROWS``.
        ways: classes of the 5-way task.
        seed: of every draw.
    """

    checkpoint: str = "convnet3"
    data: Path | None = None
    datasets: tuple[str, ...] = tuple(DATASETS)
    head: str = "auto"
    device: str = "cpu"
    repeats: int = 5
    epochs: tuple[int, ...] = (2, 5, 20, 80)
    budget: float = 1650.0
    peers: tuple[str, ...] = PEERS
    ways: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Prediction:
    """A predicted classifier, measured.

    Attributes:
        top1: accuracy on the test images; the one that training is compared at.
        expected: leave-one-out accuracy that the head reported.
        seconds: median of each stage, of their ``total``, and of ``open``: loading the checkpoint.
        first: the same of the first prediction, with everything that happens once.
    """

    top1: float
    expected: float
    seconds: dict[str, float]
    first: dict[str, float]

    def ways_to_count(self) -> dict[str, float]:
        """Seconds by key of ``RATIOS``."""
        spent = self.seconds
        return {
            "weights": spent["weights"],
            "directed": spent["weights"] + spent["directions"],
            "classifier": sum(spent[stage] for stage in STAGES if stage != "reading"),
            "files": spent["open"] + spent["total"],
        }


@dataclass(frozen=True)
class Run:
    """One training from scratch: its seconds, and its curve of (epoch, seconds, top1)."""

    optimizer: str
    epochs: int
    shift: int
    seconds: float
    curve: list[tuple[float, float, float]] = field(repr=False)


@dataclass(frozen=True)
class Winner:
    """What counts as the time of training.

    Attributes:
        reached: whether any run was as accurate as the prediction.
        optimizer, epochs: of the run that was first; else of the longest one.
        seconds: until it was; else all of its seconds, a lower bound.
    """

    reached: bool
    optimizer: str
    epochs: int
    seconds: float


def predict(settings: Settings, folder: Path, task: Task, **options: Any) -> Prediction:
    """Predict from the image files in ``folder``, several times; measure the accuracy on the test images once.

    Args:
        options: of ``Predictor.predict``.
    """
    opened, spent = [], []
    for _ in range(settings.repeats):
        start = time.perf_counter()
        predictor = open_predictor(settings)
        opened.append(time.perf_counter() - start)
    for _ in range(settings.repeats + 1):
        model = predictor.predict(folder, head=settings.head, seed=settings.seed, **options)
        spent.append(model.report["seconds"])
    first, *others = spent
    seconds = {stage: statistics.median(one[stage] for one in others) for stage in (*STAGES, "total")}
    top1 = accuracy(model, task.test.images, task.test.labels, model.preprocess)
    whole = {"open": statistics.median(opened), **seconds}
    return Prediction(top1, model.report["expected_accuracy"], whole, {"open": opened[0], **first})


def open_predictor(settings: Settings) -> Predictor:
    """The predictor of a production program."""
    return Predictor.from_pretrained(settings.checkpoint, device=settings.device, optimize=True)


def write_images(part: Images, folder: Path) -> Path:
    """Images as PNG files, one sub-folder per class, in the order of the labels."""
    from PIL import Image

    for label in range(len(part.classes)):
        (folder / f"{label:04}").mkdir(parents=True)
    for number, (image, label) in enumerate(zip(part.images.numpy(), part.labels.tolist(), strict=True)):
        Image.fromarray(image).save(folder / f"{label:04}" / f"{number:06}.png")
    return folder


def train(
    settings: Settings, bench: Bench, task: Task, target: float, budget: float, progress: Callable[[Run], None]
) -> tuple[list[Run], list[str]]:
    """Train from scratch, with short schedules first, for ``budget`` seconds at most.

    Args:
        target: no longer schedules than ``ALWAYS`` are run once a run was as accurate as this.
        progress: called with every run.

    Returns:
        The runs, and those left out for want of time: ``"adam, 80 epochs"``.
    """
    runs: list[Run] = []
    left_out: list[str] = []
    left, measuring = budget, 0.0
    for epochs in sorted(settings.epochs):
        if epochs > ALWAYS and winner(runs, target).reached:
            break
        for optimizer in OPTIMIZERS:
            per_epoch = max((run.seconds / run.epochs for run in runs[-1:]), default=0.0)
            if epochs * per_epoch + measuring > left:
                left_out.append(f"{optimizer}, {epochs} epochs")
                continue
            start = time.perf_counter()
            shift = SCRATCH[SHIFTED_FROM] if epochs >= SHIFTED_FROM else 0
            run = _run(_train_once(settings, bench, task, optimizer, epochs, shift), optimizer, epochs, shift)
            wall = time.perf_counter() - start
            left, measuring = left - wall, wall - run.seconds
            runs.append(run)
            progress(run)
    return runs, left_out


def _train_once(settings: Settings, bench: Bench, task: Task, optimizer: str, epochs: int, shift: int) -> ScratchResult:
    return train_from_scratch(
        bench.architecture,
        task.train.images,
        task.train.labels,
        len(task.train.classes),
        bench.preprocess,
        optimizer=optimizer,
        epochs=epochs,
        flip=task.flip,
        shift=shift,
        seed=settings.seed,
        test=(task.test.images, task.test.labels),
        points=min(POINTS, POINTS_PER_EPOCH * epochs),
        device=settings.device,
    )


def _run(result: ScratchResult, optimizer: str, epochs: int, shift: int) -> Run:
    curve = [(point.epoch, point.seconds, point.top1) for point in result.curve]
    return Run(optimizer, epochs, shift, result.seconds, curve)


def first_reached(curve: Sequence[tuple[float, float, float]], target: float) -> float | None:
    """Seconds at which a curve of (epoch, seconds, top1) first is at ``target``, on the line between two points."""
    before, lower = 0.0, 0.0
    for _, at, top1 in curve:
        if top1 >= target:
            share = (target - lower) / (top1 - lower) if top1 > lower else 1.0
            return before + share * (at - before)
        before, lower = at, top1
    return None


def winner(runs: Sequence[Run], target: float) -> Winner:
    """The run that was first as accurate as ``target``; the longest where none was."""
    reached = [(first_reached(run.curve, target), run) for run in runs]
    arrived = [(seconds, run) for seconds, run in reached if seconds is not None]
    if arrived:
        seconds, first = min(arrived, key=lambda pair: pair[0])
        return Winner(True, first.optimizer, first.epochs, seconds)
    longest = max(runs, key=lambda run: run.seconds)
    return Winner(False, longest.optimizer, longest.epochs, longest.seconds)


def ratios(prediction: Prediction, found: Winner) -> dict[str, float]:
    """Seconds of training over seconds of prediction, by key of ``RATIOS``.

    Training starts from images in memory, even where the prediction reads them from files and loads its checkpoint.
    """
    return {way: found.seconds / seconds for way, seconds in prediction.ways_to_count().items()}


def compare(
    settings: Settings, bench: Bench, name: str, task: Task, budget: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """One dataset: predictions, ``budget`` seconds of training, ratios and peers, JSON-able."""
    with tempfile.TemporaryDirectory(prefix="pudnet-") as folder:
        files = write_images(task.train, Path(folder) / "train")
        predictions = {key: predict(settings, files, task, **options) for key, options in PREDICTIONS.items()}
    for key, prediction in predictions.items():
        say(f"{name}: predicted ({key}) {100 * prediction.top1:.1f} % in {prediction.seconds['total']:.2f} s")
    target = max(prediction.top1 for prediction in predictions.values())

    def progress(run: Run) -> None:
        reached = first_reached(run.curve, target)
        when = "never as accurate" if reached is None else f"as accurate after {reached:.1f} s"
        say(
            f"{name}: {run.optimizer}, {run.epochs} epochs, {run.seconds:.1f} s, {100 * run.curve[-1][2]:.1f} %; {when}"
        )

    start = time.perf_counter()
    runs, left_out = train(settings, bench, task, target, budget, progress)
    spent = time.perf_counter() - start
    if not runs:
        raise InputError(message("training_time", "--budget", "enough for the shortest schedule", settings.budget))
    peers = {}
    for key in settings.peers:
        if bench.can_run(ROWS[key], task):
            peers[key] = ROWS[key].run(bench, task).to_json()
            say(f"{name}: {key} {100 * peers[key]['top1']:.1f} %, {peers[key]['seconds']['total']:.2f} s")
    return {
        "dataset": name,
        "title": DATASETS[name].title.format(ways=settings.ways),
        "n_train": len(task.train.labels),
        "n_test": len(task.test.labels),
        "classes": len(task.train.classes),
        "predictions": {key: _compared(prediction, runs) for key, prediction in predictions.items()},
        "training": {"runs": [asdict(run) for run in runs], "left_out": left_out, "seconds": spent},
        "peers": peers,
    }


def _compared(prediction: Prediction, runs: Sequence[Run]) -> dict[str, Any]:
    found = winner(runs, prediction.top1)
    return {
        **asdict(prediction),
        "ways_to_count": prediction.ways_to_count(),
        "training": asdict(found),
        "ratios": ratios(prediction, found),
    }


# ---- the report -------------------------------------------------------------------------------------------------


def file_stem(device: str) -> str:
    """Name of this machine's results, without an extension."""
    name = harness.processor_name()
    if torch.device(device).type == "cuda":
        name = f"cuda {torch.cuda.get_device_name(torch.device(device))}"
    return re.sub(r"[^a-z0-9]+", "-", f"training-time-{name}".lower()).strip("-")


def markdown(document: Mapping[str, Any]) -> list[str]:
    """Two tables: times and ratios of every dataset, and the peers beside them."""
    lines = [
        f"| dataset | top-1 % | training needs, s | {' | '.join(f'{title}, s | x' for title in RATIOS.values())} |",
        "| --- | ---: | ---: |" + " ---: | ---: |" * len(RATIOS),
    ]
    for record in document["datasets"]:
        for key, prediction in record["predictions"].items():
            found = prediction["training"]
            bound = "" if found["reached"] else "> "
            training = f"{bound}{found['seconds']:.1f} ({OPTIMIZERS[found['optimizer']]}, {found['epochs']} epochs)"
            cells = [f"{record['title']}, {key}", f"{100 * prediction['top1']:.1f}", training]
            for way in RATIOS:
                cells += [f"{prediction['ways_to_count'][way]:.3g}", f"{bound}{prediction['ratios'][way]:,.3g}"]
            lines.append("| " + " | ".join(cells) + " |")
    titles = [record["title"] for record in document["datasets"]]
    lines += ["", "| top-1 % (seconds) | " + " | ".join(titles) + " |", "| --- |" + " ---: |" * len(titles)]
    for key in PREDICTIONS:
        cells = [_prediction_cell(record["predictions"][key]) for record in document["datasets"]]
        lines.append(f"| predicted weights, {key} | " + " | ".join(cells) + " |")
    for key in ROWS:
        cells = [_cell(record["peers"].get(key)) for record in document["datasets"]]
        if any(cells):
            lines.append(f"| {ROWS[key].title} | " + " | ".join(cells) + " |")
    for optimizer, title in OPTIMIZERS.items():
        cells = [_longest_cell(record, optimizer) for record in document["datasets"]]
        lines.append(f"| {title} from scratch, longest run | " + " | ".join(cells) + " |")
    return lines


def _prediction_cell(prediction: Mapping[str, Any]) -> str:
    return f"{100 * prediction['top1']:.1f} ({prediction['ways_to_count']['classifier']:.1f})"


def _cell(outcome: Mapping[str, Any] | None) -> str:
    return "" if outcome is None else f"{100 * outcome['top1']:.1f} ({outcome['seconds']['total']:.1f})"


def _longest_cell(record: Mapping[str, Any], optimizer: str) -> str:
    runs = [run for run in record["training"]["runs"] if run["optimizer"] == optimizer]
    longest = max(runs, key=lambda run: run["seconds"], default=None)
    return "" if longest is None else f"{100 * longest['curve'][-1][2]:.1f} ({longest['seconds']:.1f})"


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Accuracy against seconds as SVG, one panel per dataset."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    records = document["datasets"]
    with rc_context({"svg.hashsalt": "pudnet", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(max(7.0, 2.9 * len(records)), 3.6), layout="constrained")
        axes = figure.subplots(1, len(records), squeeze=False)[0]
        for axis, record in zip(axes, records, strict=True):
            _draw_panel(axis, record)
        axes[0].set_ylabel("top-1 %")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        with atomic_path(path, "training_time") as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


def _draw_panel(axis: Any, record: Mapping[str, Any]) -> None:
    colours = {"adam": "tab:red", "sgd": "tab:orange"}
    for run in record["training"]["runs"]:
        _, seconds, tops = zip(*run["curve"], strict=True)
        label = f"{OPTIMIZERS[run['optimizer']]} from scratch" if run["epochs"] == _shortest(record) else None
        colour = colours[run["optimizer"]]
        axis.plot(seconds, [100 * top for top in tops], color=colour, linewidth=0.8, alpha=0.8, label=label)
    for (key, prediction), colour in zip(record["predictions"].items(), ("tab:blue", "tab:cyan"), strict=True):
        top1 = 100 * prediction["top1"]
        axis.axhline(top1, color=colour, linewidth=0.5)
        for (way, title), marker in zip(RATIOS.items(), "o*^s", strict=True):
            axis.plot(prediction["ways_to_count"][way], top1, marker, color=colour, label=f"{key}: {title}")
    for key, marker in zip(record["peers"], "xv+1D<>", strict=False):
        outcome = record["peers"][key]
        axis.plot(
            outcome["seconds"]["total"], 100 * outcome["top1"], marker, color="tab:grey", label=ROWS[key].title, ms=4
        )
    axis.set_xscale("log")
    axis.set_xlabel("seconds")
    axis.set_title(record["title"], fontsize=8)


def _shortest(record: Mapping[str, Any]) -> int:
    """Epochs of the shortest run."""
    return min(run["epochs"] for run in record["training"]["runs"])


# ---- the command ------------------------------------------------------------------------------------------------


def run(settings: Settings, folder: Path, command: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Compare on every dataset; the JSON file in ``folder`` grows with each, the picture comes last.

    Raises:
        InputError: an unknown dataset or peer, no such checkpoint, or ``folder`` cannot be written.
    """
    for name, keys, table in (("datasets", settings.datasets, DATASETS), ("peers", settings.peers, ROWS)):
        if unknown := sorted(set(keys) - set(table)):
            raise InputError(message("training_time", name, f"among {sorted(table)}", unknown))
    harness.make_folder(folder, "training_time")
    bench = Bench.open(settings.checkpoint)
    material = Material(settings.data, bench.preprocess.size, bench.held_out, settings.ways)
    path = folder / f"{file_stem(settings.device)}.json"
    document: dict[str, Any] = {
        "format": FORMAT,
        "command": command,
        "commit": harness.commit(),
        "checkpoint_sha256": bench.digest,
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()},
        "environment": harness.environment(torch.get_num_threads(), settings.device),
        "training_autocast": bool(torch.device(settings.device).type == "cuda" or native_bfloat16()),
        "skipped": {},
        "datasets": [],
    }
    for name in settings.datasets:
        if reason := available(DATASETS[name], material):
            document["skipped"][name] = reason
            say(f"{name}: left out: {reason}")
    there = [name for name in settings.datasets if name not in document["skipped"]]
    if not there:
        raise InputError(message("training_time", "datasets", "at least one that is there", document["skipped"]))
    left = settings.budget
    for number, name in enumerate(there):
        task = DATASETS[name].build(material, 0, settings.seed)
        record = compare(settings, bench, name, task, left / (len(there) - number), say)
        left -= record["training"]["seconds"]
        document["datasets"].append(record)
        harness.save(path, document)
    draw(document, path.with_suffix(".svg"))
    say(f"{path} and {path.with_suffix('.svg').name} beside it")
    return document


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; exit status 2 for bad input, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    keep_freed()  # as the command line does, here for the prediction and the training alike
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start:6.0f} s] {text}", file=sys.stderr, flush=True)

    if options.threads:
        torch.set_num_threads(options.threads)
    settings = Settings(
        checkpoint=options.checkpoint,
        data=options.data if options.data.is_dir() else None,
        datasets=tuple(options.datasets),
        head=options.head,
        device=options.device,
        repeats=options.repeats,
        epochs=tuple(options.epochs),
        budget=options.budget,
        peers=tuple(options.peers),
        seed=options.seed,
    )
    command = " ".join(["python -m pudnet.evaluation.training_time", *arguments])
    try:
        document = run(settings, options.output, command, say)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the datasets that were finished are in the JSON file", file=sys.stderr)
        return 130
    print("\n".join(markdown(document)))
    return 0


def _parser() -> argparse.ArgumentParser:
    usual = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m pudnet.evaluation.training_time",
        description="How long must the same network be trained to be as accurate as a predicted one?",
        epilog="example: python -m pudnet.evaluation.training_time --data ../shared/data --device cuda",
    )
    parser.add_argument("--checkpoint", default=usual.checkpoint, help="bundled name, path or Hub id (%(default)s)")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the .npz image sets")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS), metavar="NAME",
                        help=f"of {', '.join(DATASETS)}")  # fmt: skip
    parser.add_argument("--peers", nargs="*", choices=ROWS, default=list(PEERS), metavar="ROW",
                        help=f"of {', '.join(ROWS)}")  # fmt: skip
    parser.add_argument("--head", default=usual.head, help="of the predicted network (%(default)s)")
    parser.add_argument("--device", default=usual.device, help="of prediction and training (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads of everything; default: as many as torch takes")
    parser.add_argument("--repeats", type=int, default=usual.repeats, help="predictions to time (%(default)s)")
    parser.add_argument("--epochs", type=int, nargs="+", default=list(usual.epochs), metavar="N",
                        help="schedules to train with; more than 20 only while shorter ones fail")  # fmt: skip
    parser.add_argument("--budget", type=float, default=usual.budget,
                        help="seconds of training for all datasets (%(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=usual.seed)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
