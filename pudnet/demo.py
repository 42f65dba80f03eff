"""The demonstration: scikit-learn's handwritten digits, by predicted weights and by training from scratch."""

from __future__ import annotations

import importlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pudnet.data import open_images
from pudnet.descent import CurvePoint, accuracy
from pudnet.errors import InputError, message
from pudnet.evaluation.baselines import random_weights
from pudnet.evaluation.scratch import ScratchResult, train_from_scratch
from pudnet.files import atomic_path
from pudnet.predicted import PredictedModel, finish
from pudnet.predictor import Predictor

MOST_SECONDS = 60.0
# The learning rate rises and falls over so many epochs; the most that 60 seconds allow on a slow machine, about.
EPOCHS = 40
GRID = (5, 8)  # samples in the picture


@dataclass(frozen=True)
class Digits:
    """Two halves of the digits: uint8 images ``[n, 8, 8]``, int64 labels ``[n]``."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_digits(seed: int = 0) -> Digits:
    """scikit-learn's 1,797 scans of handwritten digits (bundled with it), split in two at random.

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        hint = "Type: pip install scikit-learn"
        raise InputError(message("pudnet demo", "scikit-learn", "installed", str(error), hint)) from error
    found = datasets.load_digits()
    images = (torch.from_numpy(found.images) * (255 / 16)).round().to(torch.uint8)  # [n, 8, 8], given as 0..16
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    first, second = order[: len(order) // 2], order[len(order) // 2 :]
    return Digits((images[first], labels[first]), (images[second], labels[second]))


def run(
    checkpoint: str | os.PathLike[str] = "convnet3",
    *,
    head: str = "auto",
    seed: int = 0,
    device: str | torch.device = "cpu",
    folder: str | os.PathLike[str] = "demo",
    max_seconds: float = MOST_SECONDS,
) -> dict[str, Any]:
    """Predict a network for one half of the digits, test it on the other, and compare.

    Training from scratch goes on until it is as accurate as the prediction, or until ``max_seconds``; it may look at
    the test images to know, and measuring them is not counted as its time.

    Args:
        checkpoint: the hypernetwork: path, bundled name or Hub id.
        head: of the predicted and of the random network.
        seed: of the split, the sketch, the random weights and the training.
        device: of the prediction; training from scratch runs on the CPU.
        folder: where the picture goes; made if missing.

    Returns:
        ``predicted``, ``random`` and ``scratch``, each with ``top1`` and ``seconds``; ``scratch`` also with
        ``reached``, ``epochs`` and ``curve``; ``ratio`` (training time over prediction time); ``train`` and ``test``
        (images); ``picture`` (its path).

    Raises:
        InputError: no such checkpoint, the folder cannot be written, or scikit-learn is missing.
    """
    importlib.import_module("torch._dynamo")  # torch.optim imports it when first used: seconds that are no training

    digits = load_digits(seed)
    predictor = Predictor.from_pretrained(checkpoint, device=device)
    preprocess = predictor.net.preprocess
    with atomic_path(_folder(folder) / "demo.png", "pudnet demo") as picture:
        model = predictor.predict(*digits.train, head=head, seed=seed)
        predicted = {"top1": model.evaluate(*digits.test)["top1"], "seconds": model.report["seconds"]["total"]}

        start = time.perf_counter()
        source = open_images(*digits.train, size=preprocess.size)
        sketch = predictor.sketch(*digits.train, seed=seed)
        # The weights are about to be drawn anew: which ones fill the module until then does not matter.
        architecture = predictor.net.materialise(predictor.net.generate(sketch)).cpu()
        network = random_weights(architecture, seed).to(predictor.device)
        drawn = finish(network, source, sketch, preprocess, head=head, seed=seed)
        seconds = time.perf_counter() - start
        random = {"top1": drawn.evaluate(*digits.test)["top1"], "seconds": seconds}

        result = train_from_scratch(
            architecture,
            *digits.train,
            len(model.classes),
            preprocess,
            epochs=EPOCHS,
            seed=seed,
            test=digits.test,
            target_accuracy=predicted["top1"],
            max_seconds=max_seconds,
        )
        top1 = accuracy(result.model, *digits.test, preprocess)
        draw(picture, model, digits.test, predicted, result)
    return {
        "predicted": predicted,
        "random": random,
        "scratch": {
            "top1": top1,
            "seconds": result.seconds,
            "reached": bool(result.reached),
            "epochs": result.epochs,
            "curve": [[point.seconds, point.top1] for point in result.curve],
        },
        "ratio": result.seconds / predicted["seconds"],
        "train": len(digits.train[1]),
        "test": len(digits.test[1]),
        "picture": str(Path(folder) / "demo.png"),
    }


def _folder(folder: str | os.PathLike[str]) -> Path:
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        got = f"{str(path)!r} ({error.strerror})"
        raise InputError(message("pudnet demo", "folder", "a folder that can be written", got)) from error
    return path


def draw(
    path: Path, model: PredictedModel, test: tuple[Tensor, Tensor], predicted: dict[str, Any], scratch: ScratchResult
) -> None:
    """Write a picture: samples under their predicted labels, and accuracy against time.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        hint = "Type: pip install matplotlib"
        raise InputError(message("pudnet demo", "matplotlib", "installed", str(error), hint)) from error
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)

    rows, columns = GRID
    images, truth = test[0][: rows * columns], test[1][: rows * columns].tolist()
    answers = model.classify(images).labels
    side = images.shape[1]
    tiles = F.pad(images, (1, 1, 4, 1))  # room for the label above each
    height, width = tiles.shape[1:]
    mosaic = tiles.view(rows, columns, height, width).transpose(1, 2).reshape(rows * height, columns * width)
    left.imshow(mosaic.numpy(), cmap="gray_r")
    for index, (answer, label) in enumerate(zip(answers, truth, strict=True)):
        row, column = divmod(index, columns)
        colour = "tab:blue" if answer == model.classes[label] else "tab:red"
        left.text(column * width + side / 2 + 0.5, row * height + 3, answer, color=colour, ha="center", size=8)
    left.set_title("held-out digits under their predicted labels (wrong ones red)", size=9)
    left.set_axis_off()

    start = CurvePoint(0.0, 0.0, 1 / len(model.classes))
    points = [start, *scratch.curve]
    right.plot([p.seconds for p in points], [100 * p.top1 for p in points], label="training from scratch")
    right.plot(predicted["seconds"], 100 * predicted["top1"], "o", label="predicted weights")
    right.axhline(100 * predicted["top1"], linewidth=0.5, color="grey")
    right.set(xlabel="seconds", ylabel="test accuracy, %", ylim=(0, 101))
    right.legend(loc="lower right")
    figure.savefig(path, format="png", dpi=120)
