"""The command line: thin commands over the library. Bad input is one line on stderr and exit code 2."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

from pudnet import memory
from pudnet._version import __version__
from pudnet.errors import InputError, PudnetError, message

try:
    import typer
except ImportError:
    # This module is the command line and nothing else, so it may end the program.
    sys.exit("pudnet: the command line needs a few packages more. Type: pip install 'pudnet[cli]'")

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.table import Table
    from torch import nn

F = TypeVar("F", bound=Callable[..., None])

MOST_CLASS_ROWS = 30
LARGEST_SEED = 2**63 - 1  # of torch's generators

app = typer.Typer(
    name="pudnet",
    help="A ConvNet for your images, its weights predicted in one forward pass instead of trained.",
    epilog="Example:\n\n    pudnet predict flowers/ -o model.safetensors",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Data = Annotated[Path, typer.Argument(help="Folder with one sub-folder per class, or .npz file.", show_default=False)]
Model = Annotated[Path, typer.Argument(help="Model written by `pudnet predict`.", show_default=False)]
Checkpoint = Annotated[str, typer.Option(help="The hypernetwork: path, bundled name or Hub id.")]
HeadName = Annotated[
    str,
    typer.Option(
        "--head",
        help="Classifier: kernel, ridge, ridge-last, cosine; auto: kernel for few images (up to 5,120), else ridge.",
    ),
]
Network = Annotated[
    str,
    typer.Argument(
        help="FILE.py:factory, a function of your own file without arguments that returns the network; [bold]the file "
        "is imported, so its code is run[/bold]. Or a preset: resnet50, vit, resnet18, ...; or a network of "
        "DeepNets-1M: test-3.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of everything random.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; the tables go to stderr.")]


def main() -> None:
    """Run the command line; the console entry point."""
    memory.keep_freed()
    try:
        app(prog_name="pudnet")
    except KeyboardInterrupt:  # before a command has begun
        sys.exit(130)


def _command(example: str, name: str | None = None) -> Callable[[F], F]:
    """Register a command whose errors become exit codes: 2 bad input, 1 other errors of ours, 130 interrupted.

    ``name`` is for a command that is not called like its function.
    """

    def register(function: F) -> F:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except KeyboardInterrupt:
                _fail("interrupted", 130)
            except InputError as error:
                _fail(str(error), 2)
            except PudnetError as error:
                _fail(str(error), 1)

        app.command(name, epilog=f"Example:\n\n    {example}")(guarded)
        return function

    return register


def _fail(text: str, code: int) -> NoReturn:
    typer.echo(f"pudnet: {' '.join(text.split())}", err=True)
    raise typer.Exit(code)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"pudnet {__version__}")
        raise typer.Exit


@_command("pudnet demo")
def demo(
    checkpoint: Checkpoint = "convnet3",
    head: HeadName = "auto",
    folder: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("demo"),
    max_seconds: Annotated[float, typer.Option(min=0, help="Longest training from scratch.")] = 60.0,
    device: Device = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Predict a digit classifier and train one from scratch; compare accuracy and time."""
    import pudnet.demo

    console = _console(as_json)
    with console.status("Predicting, then training from scratch for comparison ..."):
        result = pudnet.demo.run(
            checkpoint, head=head, seed=seed, device=_device(device), folder=folder, max_seconds=max_seconds
        )
    predicted, scratch = result["predicted"], result["scratch"]
    console.print(f"Digits: {result['train']} images to learn from, {result['test']} others to test on")
    table = _table("", "accuracy", "seconds", "ratio")
    rows = (("predicted weights", predicted), ("random weights", result["random"]), ("trained from scratch", scratch))
    for name, row in rows:
        ratio = row["seconds"] / predicted["seconds"]
        table.add_row(name, f"{100 * row['top1']:.2f} %", f"{row['seconds']:.2f}", f"{ratio:.1f} x")
    console.print(table)
    if not scratch["reached"]:
        console.print(
            f"Training from scratch was not as accurate after {scratch['seconds']:.0f} s "
            f"({scratch['epochs']:.0f} epochs), where it was stopped."
        )
    console.print(f"Picture: {result['picture']}", soft_wrap=True)
    _emit(result, as_json)


@_command("pudnet predict flowers/ -o model.safetensors")
def predict(
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the model goes.")] = Path("model.safetensors"),
    checkpoint: Checkpoint = "convnet3",
    head: HeadName = "auto",
    batchnorm: Annotated[str, typer.Option(help="BatchNorm statistics: calibrated, batch or shared.")] = "calibrated",
    sketch_size: Annotated[int, typer.Option(min=1, help="Images the weights are predicted from.")] = 1000,
    split: Annotated[str, typer.Option(help="Part of the data: train or test.")] = "train",
    growable: Annotated[
        bool,
        typer.Option("--growable", help="Keep what `pudnet add` needs; a larger file. The head auto is ridge then."),
    ] = False,
    views: Annotated[
        str | None,
        typer.Option(
            help="Copies every image is read in: single, mirrored (twice as slow) or shifted (three times); "
            "by default what clearly helps.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Faster: directions of the dataset and copies of its images are not tried.")
    ] = False,
    page: Annotated[
        Path | None,
        typer.Option(
            "--report", help="Also write a page about the model, as `pudnet report` does.", show_default=False
        ),
    ] = None,
    device: Device = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Predict a classifier for DATA and save it."""
    from pudnet.files import atomic_path
    from pudnet.predictor import Predictor
    from pudnet.stages import STAGES

    console = _console(as_json)
    # The output is claimed first, so that a path that cannot be written costs no work.
    with atomic_path(output, "pudnet predict") as claimed, console.status("Predicting ..."):
        predictor = Predictor.from_pretrained(checkpoint, device=_device(device))
        model = predictor.predict(
            data, head=head, batchnorm=batchnorm, sketch_size=sketch_size, split=split, seed=seed, growable=growable,
            views=views, quick=quick,
        )  # fmt: skip
        model.save(claimed)
    if page is not None:
        from pudnet.report import write_report

        with console.status("Writing the report ..."):
            write_report(page, model, data, predictor=predictor, seed=seed)
    report = model.report
    seconds = report["seconds"]
    console.print(f"{report['n']} images of {len(model.classes)} classes")
    table = _table("stage", "seconds", "share")
    for name in (*STAGES, "total"):
        table.add_row(name, f"{seconds[name]:.3f}", f"{100 * seconds[name] / seconds['total']:.0f} %")
    console.print(table)
    console.print(f"Expected accuracy on new images: {100 * report['expected_accuracy']:.1f} %")
    _notes(console, report)
    console.print(f"Model: {output}", soft_wrap=True, markup=False)
    _emit({"model": str(output), **report}, as_json)


@_command("pudnet evaluate model.safetensors flowers/")
def evaluate(
    model: Model,
    data: Data,
    split: Annotated[str, typer.Option(help="Part of the data, where it has several: train or test.")] = "test",
    device: Device = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure the accuracy of MODEL on the labelled images of DATA."""
    from pudnet.predicted import load

    console = _console(as_json)
    result = load(model).to(_device(device)).evaluate(data, split=split, seed=seed)
    console.print(f"top-1 {100 * result['top1']:.2f} % of {result['n']} images")
    if "top5" in result:
        console.print(f"top-5 {100 * result['top5']:.2f} %")
    per_class = result["per_class"]
    if len(per_class) <= MOST_CLASS_ROWS:
        table = _table("class", "images", "top-1")
        for name, row in per_class.items():
            table.add_row(_plain(name), str(row["n"]), f"{100 * row['top1']:.1f} %")
        console.print(table)
    _notes(console, result)
    _emit(result, as_json)


@_command("pudnet add model.safetensors more-flowers/ --new-class lily -o larger.safetensors")
def add(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the larger model goes.", show_default=False)],
    new_class: Annotated[
        list[str] | None, typer.Option(help="A class that MODEL does not have yet; once for each.", show_default=False)
    ] = None,
    split: Annotated[str, typer.Option(help="Part of the data: train or test.")] = "train",
    device: Device = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Accepted by every command; MODEL has its own.")] = 0,
    as_json: Json = False,
) -> None:
    """Add images and classes to MODEL, which `pudnet predict --growable` made, without its earlier images."""
    from pudnet.files import atomic_path
    from pudnet.predicted import load

    console = _console(as_json)
    with atomic_path(output, "pudnet add") as claimed, console.status("Adding ..."):
        grown = load(model).to(_device(device)).add(data, new_classes=new_class or (), split=split)
        grown.save(claimed)
    report = grown.report
    console.print(f"{report['n']} images of {len(grown.classes)} classes now")
    console.print(f"Expected accuracy on new images: {100 * report['expected_accuracy']:.1f} %")
    _notes(console, report)
    console.print(f"Model: {output}", soft_wrap=True, markup=False)
    _emit({"model": str(output), **report}, as_json)


@_command("pudnet finetune model.safetensors flowers/ --epochs 5 --flip -o tuned.safetensors")
def finetune(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the tuned model goes.", show_default=False)],
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the images.")] = 1,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate. Without: a tuned one.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=2, help="Images in a step.")] = 32,
    shift: Annotated[int, typer.Option(min=0, help="Move images at random by up to so many pixels.")] = 1,
    flip: Annotated[
        bool, typer.Option("--flip", help="Mirror images at random: where a mirrored image keeps its class.")
    ] = False,
    validation: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of the images held out to decide what is kept; 0: the end.")
    ] = 0.2,
    test: Annotated[
        Path | None, typer.Option(help="Data whose test part measures the curve.", show_default=False)
    ] = None,
    split: Annotated[str, typer.Option(help="Part of the data: train or test.")] = "train",
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run to the same OUTPUT stopped.")] = False,
    device: Device = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train MODEL further on DATA, from exactly what was predicted. Ctrl-C keeps a checkpoint to --resume from."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from pudnet.errors import Cancelled
    from pudnet.files import atomic_path
    from pudnet.finetuning import LR
    from pudnet.finetuning import finetune as tune
    from pudnet.predicted import load
    from pudnet.serving import stop_request

    console = _console(as_json)
    saved = output.with_name(f"{output.name}.checkpoint")
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=_console(True))
    task = progress.add_task("", total=None)

    def show(done: int, total: int) -> None:
        progress.start()  # only now, so that bad input is one line; it may be started again
        progress.update(task, completed=done, total=total)

    try:
        with atomic_path(output, "pudnet finetune") as claimed, stop_request() as asked:
            tuned = tune(
                load(model).to(_device(device)), data, epochs=epochs, lr=LR if lr is None else lr,
                batch_size=batch_size, shift=shift, flip=flip, seed=seed, split=split, validation=validation,
                test=test, checkpoint=saved, resume=resume, cancel=asked, on_step=show,
            )  # fmt: skip
            tuned.save(claimed)
    except Cancelled:
        _fail("interrupted; go on with the same command and --resume", 130)
    finally:
        progress.stop()
    saved.unlink(missing_ok=True)
    report = tuned.report["finetuning"]
    if report["curve"]:
        table = _table("epoch", "seconds", "top-1")
        for epoch, seconds, top1 in report["curve"]:
            table.add_row(f"{epoch:g}", f"{seconds:.1f}", f"{100 * top1:.2f} %")
        console.print(table)
        console.print(f"Measured on {'test' if test else 'held-out'} images")
    kept = f"after epoch {report['kept']}" if report["kept"] else "as it was: no epoch was better on held-out images"
    console.print(
        f"{report['epochs']} epochs of {report['n']} images in {report['seconds']:.1f} s; the network is {kept}"
    )
    console.print(f"Expected accuracy on new images: {100 * tuned.report['expected_accuracy']:.1f} %")
    _notes(console, tuned.report)
    console.print(f"Model: {output}", soft_wrap=True, markup=False)
    _emit({"model": str(output), **tuned.report}, as_json)


@_command("pudnet export model.safetensors model.onnx")
def export(
    model: Model,
    output: Annotated[Path, typer.Argument(help="Ends in .onnx, .pt2 or .safetensors.", show_default=False)],
    device: Annotated[str, typer.Option(help="Accepted by every command; files are for the CPU.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Accepted by every command; nothing is random here.")] = 0,
    as_json: Json = False,
) -> None:
    """Write MODEL for use without pudnet; ONNX files are checked with onnxruntime."""
    import logging
    import warnings

    from pudnet.predicted import load

    console = _console(as_json)
    loaded = load(model)
    # What torch's exporters say is not for users.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"), console.status("Exporting ..."):
        loaded.export(output)
    size, side = output.stat().st_size, loaded.preprocess.size
    console.print(f"Input: uint8 RGB [n, {side}, {side}, 3]; class names and how to resize are inside", markup=False)
    console.print(f"Written: {output} ({size:,} bytes)", soft_wrap=True, markup=False)
    _emit({"output": str(output), "bytes": size, "classes": list(loaded.classes), "size": side}, as_json)


@_command("pudnet remake model.safetensors flowers/ -o again.safetensors")
def remake(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the model goes.", show_default=False)],
    checkpoint: Annotated[
        str | None, typer.Option(help="The hypernetwork; without: where MODEL says it was.", show_default=False)
    ] = None,
    added: Annotated[
        list[Path] | None, typer.Option(help="Data that was added; once for each, in order.", show_default=False)
    ] = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Accepted by every command; MODEL has its own.")] = 0,
    as_json: Json = False,
) -> None:
    """Make MODEL again from its record and the same DATA; fail unless it is equal to the last bit."""
    import torch

    from pudnet.files import atomic_path
    from pudnet.predicted import load
    from pudnet.predictor import Predictor

    console = _console(as_json)
    where, report = "pudnet remake", load(model).report
    record = report.get("provenance", {})
    name = checkpoint or record.get("checkpoint")
    if name is None:
        raise InputError(message(where, "--checkpoint", "given for a model that does not say where it was", name))
    dtype = torch.bfloat16 if record.get("dtype") == "bfloat16" else torch.float32
    with atomic_path(output, where) as claimed, console.status("Predicting ..."):
        predictor = Predictor.from_pretrained(
            name, device=_device(device), optimize=bool(record.get("optimize")), dtype=dtype
        )
        again = predictor.remake(report, data, added=[(path, None) for path in added or ()])
        again.save(claimed)
    digest = again.report["provenance"]["model_sha256"]
    console.print(f"Equal to the last bit (SHA-256 {digest}): {output}", soft_wrap=True, markup=False)
    _emit({"model": str(output), "sha256": digest}, as_json)


@_command("pudnet report model.safetensors flowers-test/ -o report.html", "report")
def write_page(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the page goes.")] = Path("report.html"),
    split: Annotated[
        str | None,
        typer.Option(help="Part of the data, where it has several: train or test. Without: test.", show_default=False),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="The hypernetwork, for the map. Without: the one MODEL names.", show_default=False),
    ] = None,
    scratch: Annotated[
        float, typer.Option(min=0, help="Seconds of training from scratch to show beside it; 0: none.")
    ] = 0.0,
    training: Annotated[
        Path | None,
        typer.Option(help="Images to train from scratch on. Without: the training part of DATA.", show_default=False),
    ] = None,
    device: Device = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Write one HTML page about MODEL on the labelled images of DATA: answers, accuracy, embedding, kernels, time."""
    from pudnet.predicted import load
    from pudnet.predictor import Predictor
    from pudnet.report import write_report

    console = _console(as_json)
    with console.status("Writing the report ..."):
        predictor = None if checkpoint is None else Predictor.from_pretrained(checkpoint)
        loaded = load(model).to(_device(device))
        result = write_report(
            output,
            loaded,
            data,
            split=split,
            predictor=predictor,
            training=training,
            scratch_seconds=scratch,
            seed=seed,
        )
    console.print(f"top-1 {100 * result['top1']:.2f} % of {result['n']} images")
    if "scratch_top1" in result:
        console.print(f"Trained from scratch: {100 * result['scratch_top1']:.2f} %")
    console.print(f"Page: {output}", soft_wrap=True, markup=False)
    _emit({"report": str(output), **result}, as_json)


@_command("pudnet classify model.safetensors rose.jpg tulip.png")
def classify(
    model: Model,
    images: Annotated[list[Path], typer.Argument(help="Image files.", metavar="IMAGE...", show_default=False)],
    device: Device = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Accepted by every command; nothing is random here.")] = 0,
    as_json: Json = False,
) -> None:
    """Say what MODEL sees on each IMAGE, and how probable it is."""
    import torch

    from pudnet.data.pillow import read_image
    from pudnet.predicted import load

    console = _console(as_json)
    loaded = load(model).to(_device(device))
    resized = [loaded.preprocess.resize([torch.from_numpy(read_image(path))]) for path in images]
    answers = loaded.classify(torch.cat(resized))
    table = _table("image", "class", "probability")
    results = []
    for path, label, row in zip(images, answers.labels, answers.probabilities.tolist(), strict=True):
        table.add_row(_plain(path), _plain(label), f"{100 * max(row):.1f} %")
        probabilities = dict(zip(loaded.classes, row, strict=True))
        results.append({"image": str(path), "label": label, "probability": max(row), "probabilities": probabilities})
    console.print(table)
    _emit({"results": results}, as_json)


@_command("pudnet train pudnet/pretrained/convnet3.toml")
def train(
    config: Annotated[Path, typer.Argument(help="TOML file of the run.", show_default=False)],
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in the output folder stopped.")] = False,
    device: Device = "auto",
    seed: Annotated[
        int | None, typer.Option(min=0, max=LARGEST_SEED, help="Instead of the seed in CONFIG.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a hypernetwork as CONFIG says. Ctrl-C keeps a checkpoint to --resume from.

    A CONFIG with `target` trains PudNet, one with `ghn` a GHN.
    """
    import dataclasses
    import os
    import time

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from pudnet import training

    chief = os.environ.get("RANK", "0") == "0"  # torchrun starts one process per device; one of them reports
    settings = training.read_config(config)
    if seed is not None:
        settings = dataclasses.replace(settings, seed=seed)
    latest: dict[str, float] = {}
    last_step = 0
    start = time.monotonic()
    losses = TextColumn("{task.description}")
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), losses)
    progress = Progress(*columns, console=_console(True), disable=not chief)
    task = progress.add_task("", total=settings.optimiser.steps)

    def show(step: int, values: Mapping[str, float]) -> None:
        nonlocal last_step
        if not last_step:
            progress.start()
        last_step = step
        latest.update(values)
        names = ("loss", "cosine", "auxiliary", "agreement", "accuracy", "unseen_accuracy")
        text = "  ".join(f"{name.replace('_', ' ')} {latest[name]:.3f}" for name in names if name in latest)
        progress.update(task, completed=step, description=text)

    try:
        path = training.train(settings, resume=resume, device=str(_device(device)), on_step=show, on_validation=show)
    except KeyboardInterrupt:
        saved = Path(settings.run.output) / "checkpoint.safetensors"
        kept = f"; go on with: pudnet train {config} --resume" if saved.exists() else ""
        _fail(f"interrupted after step {last_step}{kept}", 130)
    finally:
        if last_step:
            progress.stop()
    seconds = time.monotonic() - start
    if chief:
        _console(as_json).print(f"Hypernetwork: {path}", soft_wrap=True, markup=False)
        _emit({"predictor": str(path), "steps": settings.optimiser.steps, "seconds": seconds, **latest}, as_json)


@_command("pudnet predict-arch mynets.py:make_net --checkpoint ghn2-fashion --input 3x32x32", "predict-arch")
def predict_arch(
    network: Network,
    checkpoint: Annotated[str, typer.Option(help="The GHN: path, bundled name or Hub id.")] = "ghn2-fashion",
    shape: Annotated[str, typer.Option("--input", help="One input, as 3x32x32. Without: the GHN's own.")] = "",
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the weights go.")] = Path("weights.safetensors"),
    partial: Annotated[bool, typer.Option("--partial", help="Leave out parameters the network does not use.")] = False,
    device: Device = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Predict all parameters of NETWORK and save them; `safetensors.torch.load_file` reads them as a state dict."""
    import time

    from pudnet import checkpoint as checkpoints
    from pudnet.files import atomic_path
    from pudnet.graphs import trace
    from pudnet.models.ghn import GHN

    console = _console(as_json)
    where = "pudnet predict-arch"
    size = _input_shape(shape, where) if shape else None
    with atomic_path(output, where) as claimed:
        ghn = GHN.from_pretrained(checkpoint, device=_device(device))
        size = size or ghn.config.input_shape
        module = _network(network, size, ghn.config.num_classes, seed)
        start = time.perf_counter()
        graph = trace(module, size)
        traced = time.perf_counter()
        weights = ghn.generate(graph, partial=partial)
        done = time.perf_counter()
        checkpoints.save(claimed, "weights", {"network": network, "ghn": checkpoint, "input": list(size)}, weights)
    if graph.unpredicted:
        console.print(f"Left out, as the network does not use them: {', '.join(graph.unpredicted)}", soft_wrap=True)
    console.print(
        f"{graph.num_parameters:,} parameters in {len(weights)} tensors, from a graph of {len(graph.nodes)} nodes: "
        f"{1000 * (traced - start):.0f} ms for the graph, {1000 * (done - traced):.0f} ms for the weights"
    )
    console.print(f"Weights: {output}", soft_wrap=True, markup=False)
    result = {
        "weights": str(output),
        "nodes": len(graph.nodes),
        "tensors": len(weights),
        "parameters": graph.num_parameters,
        "left_out": list(graph.unpredicted),
        "seconds": {"graph": traced - start, "weights": done - traced},
    }
    _emit(result, as_json)


@_command("pudnet graph resnet50 -o resnet50.svg")
def graph(
    network: Network,
    shape: Annotated[str, typer.Option("--input", help="One input of NETWORK.")] = "3x32x32",
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the drawing goes.")] = Path("graph.svg"),
    device: Annotated[str, typer.Option(help="Accepted by every command; nothing is computed here.")] = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Draw the graph of NETWORK, as a GHN sees it, as SVG."""
    from collections import Counter

    from pudnet.files import atomic_path
    from pudnet.graphs import draw, trace

    console = _console(as_json)
    size = _input_shape(shape, "pudnet graph")
    with atomic_path(output, "pudnet graph") as claimed:
        found = trace(_network(network, size, 10, seed), size)
        claimed.write_text(draw(found), encoding="utf-8")
    kinds = dict(Counter(node.primitive for node in found.nodes).most_common())
    table = _table("operation", "nodes")
    for name, count in kinds.items():
        table.add_row(name, str(count))
    console.print(table)
    console.print(f"{len(found.nodes)} nodes, {len(found.edges)} edges, {found.num_parameters:,} parameters")
    console.print(f"Drawing: {output}", soft_wrap=True, markup=False)
    counts = {"nodes": len(found.nodes), "edges": len(found.edges), "parameters": found.num_parameters}
    _emit({"drawing": str(output), **counts, "operations": kinds}, as_json)


@_command("pudnet info --json")
def info(
    device: Device = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Accepted by every command; nothing is random here.")] = 0,
    as_json: Json = False,
) -> None:
    """Show versions, devices and backends: what this installation can do."""
    from pudnet.checkpoint import list_pretrained
    from pudnet.info import info as collect

    console = _console(as_json)
    found = {**collect(), "pretrained": list_pretrained(), "chosen_device": str(_device(device))}
    table = _table("", "")
    for name, value in _flat(found):
        table.add_row(_plain(name), _plain(value))
    console.print(table)
    _emit(found, as_json)


def _input_shape(text: str, where: str) -> tuple[int, ...]:
    """``"3x32x32"`` as (3, 32, 32)."""
    sides = text.lower().split("x")
    if not all(side.isascii() and side.isdigit() and 0 < int(side) < 10**6 for side in sides):
        raise InputError(message(where, "--input", "positive sizes of one input, as 3x32x32", repr(text)))
    return tuple(map(int, sides))


def _network(name: str, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    from pudnet.graphs import make_network

    return make_network(name, classes=classes, image_size=shape[-1], seed=seed)


def _device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is the GPU if there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        rule = "a device of this machine (auto, cpu, cuda, ...)"
        raise InputError(message("pudnet", "--device", rule, f"{name!r} ({reason})")) from error
    if device.type == "meta":
        raise InputError(message("pudnet", "--device", "a device that holds numbers", repr(name)))
    return device


def _console(to_stderr: bool) -> Console:
    from rich.console import Console

    return Console(stderr=to_stderr, highlight=False)


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(show_header=any(columns))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number and len(columns) > 2 else "left", overflow="fold")
    return table


def _plain(value: object) -> str:
    """Text for a table: nothing in a class or file name is taken for markup."""
    from rich.markup import escape

    return escape(str(value))


def _notes(console: Console, report: Mapping[str, Any]) -> None:
    """Warnings and skipped files."""
    for text in report["warnings"]:
        console.print(f"Warning: {text}", soft_wrap=True, markup=False)
    skipped = report["skipped"]
    if skipped:
        count = "1 file was" if len(skipped) == 1 else f"{len(skipped)} files were"
        text = f"{count} skipped, the first: {skipped[0][0]} ({skipped[0][1]})"
        console.print(text, soft_wrap=True, markup=False)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    """Nested dictionaries as rows."""
    rows: list[tuple[str, object]] = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value))
    return rows


def _emit(result: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result, default=str))
