"""Puts everything on the page."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pudnet._version import __version__
from pudnet.checkpoint import find
from pudnet.data import ImageSource
from pudnet.data.source import open_images
from pudnet.descent import CurvePoint, accuracy
from pudnet.errors import InputError, message, one_line
from pudnet.evaluation.rows import SCRATCH
from pudnet.evaluation.scratch import train_from_scratch
from pudnet.files import atomic_path
from pudnet.predicted import PredictedModel
from pudnet.predictor import Predictor
from pudnet.report import charts
from pudnet.report.embedding_map import PART_IMAGES, PARTS, embedding_map, load_embeddings
from pudnet.report.measure import Measurement, Sample, measure
from pudnet.sketch import sketch
from pudnet.stages import STAGES

WHERE = "pudnet report"
TEMPLATE = Path(__file__).parent / "page.html"
MOST_CELLS = 16  # classes of a confusion matrix with numbers in it
MOST_CLASS_ROWS = 20  # before the table is folded up
CONFUSIONS = 8
SCRATCH_EPOCHS = max(SCRATCH)
PICTURE_COLOUR = (36, 110, 185)  # of a confusion matrix too large for numbers; seen on white and on black
STAGE_TITLES = {
    "reading": "reading the images",
    "sketch": "drawing the sketch",
    "weights": "predicting the weights",
    "directions": "directions of the data",
    "calibration": "calibrating BatchNorm",
    "head": "fitting the classifier",
}


@dataclass(frozen=True)
class Scratch:
    """Training the same network from scratch.

    Attributes:
        points: of its curve; the last is the finished network.
        cut_short: whether the time ran out before the last epoch.
        reached: seconds after which it was as accurate as the prediction, if ever.
    """

    points: list[CurvePoint]
    cut_short: bool
    reached: float | None


def write_report(
    path: str | os.PathLike[str],
    model: PredictedModel,
    source: Any,
    labels: Any = None,
    *,
    split: str | None = None,
    title: str = "",
    predictor: Predictor | None = None,
    training: Any = None,
    scratch_seconds: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Write a page about a model: one HTML file that needs nothing else.

    Args:
        path: where the page goes.
        model: measured where it is.
        source, labels: labelled images it has not seen, in any form ``Predictor.predict`` takes.
        split: which part of a source that has several; None: ``"test"``, or what there is.
        title: of the page; None for the name of ``source``, where that is a path.
        predictor: the hypernetwork the model is from, for the map of embeddings; None: the one its report names, if
            that can be loaded.
        training: the images the model was made from, for training from scratch; None: the part ``"train"`` of
            ``source``.
        scratch_seconds: train the same network from scratch for at most so long and show its curve; 0: do not.
        seed: of everything random.

    Returns:
        ``top1``, ``expected_accuracy``, ``n``, and with training from scratch ``scratch_top1``.

    Raises:
        InputError: the images do not fit the model, ``path`` cannot be written, or jinja2, matplotlib or Pillow is
            missing.
    """
    if scratch_seconds < 0:
        raise InputError(message(WHERE, "scratch_seconds", "0 or more", scratch_seconds))
    with atomic_path(path, WHERE) as claimed:
        opened, missing = _test_source(model, source, labels, split)
        measured = measure(model, opened, seed=seed)
        trained = None
        if scratch_seconds:
            images = _training_images(model, source, labels, training)
            trained = _scratch(model, images, opened.tensors(), measured.top1, scratch_seconds, seed)
        name = _name(source)
        text = _render(
            {
                "title": title or f"A predicted classifier of {name}",
                "pudnet": __version__,
                **_facts(model, measured),
                **_pictures(model.network, measured),
                **_map(*_hypernetwork(model, predictor), name, opened, seed),
                **_time(model, measured, trained),
                "notes": [*missing, *_notes(model, measured), *opened.warnings],
            }
        )
        claimed.write_text(text, encoding="utf-8")
    result = {"top1": measured.top1, "expected_accuracy": model.report.get("expected_accuracy"), "n": measured.n}
    return result | ({"scratch_top1": trained.points[-1].top1} if trained else {})


def _name(source: Any) -> str:
    return Path(source).name if isinstance(source, (str, os.PathLike)) else "the given images"


def _render(values: Mapping[str, Any]) -> str:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        hint = "Type: pip install 'pudnet[cli]'"
        raise InputError(message(WHERE, "jinja2", "installed", str(error), hint)) from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda share, digits=1: f"{100 * share:.{digits}f} %"
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(values)


# ---- parts of the page ------------------------------------------------------------------------------------------


def _facts(model: PredictedModel, measured: Measurement) -> dict[str, Any]:
    """Numbers, and tables of them."""
    k = len(measured.classes)
    shares = measured.confusion.double() / measured.confusion.sum(1, keepdim=True).clamp_min(1)
    return {
        "measured": measured,
        "expected": model.report.get("expected_accuracy"),
        "classes": k,
        "per_class": sorted(measured.per_class, key=lambda row: row.top1),
        "fold_classes": k > MOST_CLASS_ROWS,
        "confusions": measured.confusions(CONFUSIONS),
        "cells": _cells(measured, shares) if k <= MOST_CELLS else None,
        "provenance": _provenance(model),
    }


def _cells(measured: Measurement, shares: Tensor) -> list[tuple[str, list[tuple[int, float]]]]:
    """Rows of the confusion matrix: class, then the count of every answer and its share."""
    counts = measured.confusion.tolist()
    rows = zip(measured.classes, counts, shares.tolist(), strict=True)
    return [(name, list(zip(row, part, strict=True))) for name, row, part in rows]


def _provenance(model: PredictedModel) -> list[tuple[str, str]]:
    report = model.report
    origin, head = report.get("provenance", {}), report.get("head", {})
    parameters = sum(weight.numel() for weight in model.network.parameters())
    rows = {
        "network": f"{model.target_name or type(model.network).__name__}, {parameters:,} parameters",
        "input": f"{model.preprocess.size} x {model.preprocess.size} pixels",
        "made from": f"{report['n']:,} images" if "n" in report else None,
        "sketch": f"{origin['sketch_images']} of them" if "sketch_images" in origin else None,
        "classifier": head.get("name"),
        "BatchNorm": model.batchnorm,
        "hypernetwork": origin.get("checkpoint"),
        "its sha256": origin.get("sha256"),
        "seed": origin.get("seed"),
        "device": origin.get("device"),
        "versions": f"pudnet {origin['pudnet']}, torch {origin['torch']}" if "pudnet" in origin else None,
    }
    return [(name, str(value)) for name, value in rows.items() if value is not None]


def _pictures(network: nn.Module, measured: Measurement) -> dict[str, Any]:
    kernels = next((layer.weight for layer in network.modules() if isinstance(layer, nn.Conv2d)), None)
    picture, across = (None, 0) if kernels is None else charts.kernel_picture(kernels)
    large = len(measured.classes) > MOST_CELLS
    return {
        "samples": [_shown(sample) for sample in measured.samples],
        "mistakes": [_shown(sample) for sample in measured.mistakes],
        "bins": charts.draw_bins(measured.bins),
        "kernels": picture,
        "kernels_across": across,
        "kernel_shape": None if kernels is None else list(kernels.shape),
        "confusion_picture": charts.confusion_picture(measured.confusion, PICTURE_COLOUR) if large else None,
    }


def _shown(sample: Sample) -> dict[str, Any]:
    return {**sample._asdict(), "right": sample.right, "image": charts.png(sample.image)}


def _hypernetwork(model: PredictedModel, predictor: Predictor | None) -> tuple[Predictor | None, str]:
    """The hypernetwork that made ``model``, or why there is none."""
    if predictor is not None:
        return predictor, ""
    origin = model.report.get("provenance", {})
    if not origin.get("checkpoint"):
        return None, "The model does not say which checkpoint its weights are from."
    try:
        found = Predictor.from_pretrained(origin["checkpoint"])
    except InputError as error:
        return None, one_line(error)
    if found.origin["sha256"] != origin["sha256"]:
        return None, f"The checkpoint {origin['checkpoint']} is not the one the weights are from: it has changed since."
    return found, ""


def _map(predictor: Predictor | None, reason: str, name: str, source: ImageSource, seed: int) -> dict[str, Any]:
    if predictor is None:
        return {"map": None, "map_reason": reason}
    origin = predictor.origin
    known = load_embeddings(find(origin["checkpoint"], WHERE), origin["sha256"]) if origin["checkpoint"] else {}
    images = sketch(source, PARTS * PART_IMAGES, seed=seed).images
    found = embedding_map(predictor.net, name, images, known, seed=seed)
    return {"map": found, "map_chart": charts.draw_map(found), "parts": PARTS}


def _time(model: PredictedModel, measured: Measurement, trained: Scratch | None) -> dict[str, Any]:
    seconds = model.report.get("seconds", {})
    total = seconds.get("total", 0.0)
    stages = [(STAGE_TITLES[stage], seconds[stage], seconds[stage] / total) for stage in STAGES] if total else []
    values = {"stages": stages, "total": total, "scratch": trained, "epochs": SCRATCH_EPOCHS}
    if trained is not None:
        values["curve"] = charts.draw_curve(trained.points, total, measured.top1, 1 / len(measured.classes))
    return values


def _notes(model: PredictedModel, measured: Measurement) -> list[str]:
    counts = {row.name: row.n for row in measured.per_class}
    if counts != model.report.get("class_counts"):
        return []
    return [
        "These images are as many in every class as the ones the model was made from, and are probably the same. "
        "Accuracy on images a model was made from says little about new ones: trust the estimate."
    ]


def _test_source(model: PredictedModel, source: Any, labels: Any, split: str | None) -> tuple[ImageSource, list[str]]:
    """The images to test on, and what to say about them."""

    def opened(part: str) -> ImageSource:
        return open_images(source, labels, size=model.preprocess.size, split=part, classes=model.classes)

    if split is not None:
        return opened(split), []
    try:
        return opened("test"), []
    except InputError as error:
        try:
            return opened("train"), [f"These are training images: there is no test part. {one_line(error)}"]
        except InputError:
            raise error from None


# ---- training from scratch --------------------------------------------------------------------------------------


def _training_images(model: PredictedModel, source: Any, labels: Any, training: Any) -> tuple[Tensor, Tensor]:
    images, values = (source, labels) if training is None else (training, None)
    return open_images(images, values, size=model.preprocess.size, split="train", classes=model.classes).tensors()


def _scratch(
    model: PredictedModel,
    images: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    target: float,
    seconds: float,
    seed: int,
) -> Scratch:
    result = train_from_scratch(
        model.network,
        *images,
        len(model.classes),
        model.preprocess,
        epochs=SCRATCH_EPOCHS,
        shift=SCRATCH[SCRATCH_EPOCHS],
        seed=seed,
        test=test,
        points=2 * SCRATCH_EPOCHS,
        max_seconds=seconds,
        device=next(model.network.parameters()).device,
    )
    last = CurvePoint(result.epochs, result.seconds, accuracy(result.model, *test, model.preprocess))
    points = [*(point for point in result.curve if point.epoch < last.epoch), last]
    reached = next((point.seconds for point in points if point.top1 >= target), None)
    return Scratch(points, result.epochs < SCRATCH_EPOCHS, reached)
