"""Fine-tuning: a predicted model's network, trained on from where the prediction left it.

The head becomes a linear layer on the pooled features of all layers, its temperature folded in, so that the first step
starts from exactly the predicted answers; a kernel head, which has next to nothing to learn from images that it keeps,
is first replaced by a ridge head. All of it learns by gradient descent; then the head is solved again, in closed form,
on what has become of the features. n images, K classes, F features.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pudnet import checkpoint as checkpoints
from pudnet import provenance
from pudnet.batchnorm import BATCH_SIZE, calibrate
from pudnet.data import ImageSource, open_images
from pudnet.data.base import quoted
from pudnet.descent import (
    BATCH,
    WARMUP,
    Clock,
    CurvePoint,
    Recipe,
    Run,
    accuracy,
    channels_last,
    check_training,
    load_optimisers,
    native_bfloat16,
)
from pudnet.errors import CheckpointError, InputError, message, one_line
from pudnet.features import Reading
from pudnet.heads import KERNEL_ROWS, Head, HeadFitter
from pudnet.predicted import PredictedModel
from pudnet.serving import Token, check

WHERE = "finetune"
KIND = "finetuning"  # of its checkpoints
LR = 5e-3  # peak, of convolutions and BatchNorm; chosen with the following on validation classes: docs/experiments.md
HEAD_LR = 1.0  # times that of the convolutions
SHIFT = 1
VALIDATION = 0.2  # share
BEST = "best."  # of names in a checkpoint
CHECKPOINT_SECONDS = 30.0
FIT_BATCH = 256  # images that a head reads at once


def finetune(
    model: PredictedModel,
    images: Any,
    labels: Any = None,
    *,
    epochs: int = 1,
    lr: float = LR,
    batch_size: int = BATCH,
    shift: int = SHIFT,
    flip: bool = False,
    seed: int = 0,
    split: str = "train",
    validation: float = VALIDATION,
    test: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    on_step: Callable[[int, int], None] | None = None,
    progress: Callable[[CurvePoint], None] | None = None,
    cancel: Token | None = None,
) -> PredictedModel:
    """Train a predicted model further: network and head, by Adam, from what was predicted.

    Convolutions, BatchNorm's scales and shifts, and the head as a linear layer learn together by Adam; at the end of an
    epoch BatchNorm is calibrated and the head solved again on the features as they are now. The network of an epoch is
    kept if it is better than what was kept on images that were held out, by more than one standard error of the
    difference; where none is, the model that came is returned (with a ridge head of all images, where there are more
    than its kernel head can keep). The report gets ``finetuning``: settings, the curve (its first point is the model as
    it came), ``kept`` (the epoch that was best, 0 for none) and ``held_out`` (the accuracy
    that decided, after each epoch: none higher is expected of an epoch's network). ``Predictor.remake`` refuses the
    result.

    Args:
        model: stays as it is.
        images, labels, split: in any form ``Predictor.predict`` takes; the model's classes, some images of each.
        epochs: passes over the images; the learning rate rises, then falls to zero within them.
        lr: its peak.
        batch_size: images in a step.
        shift: move images at random by up to so many pixels along both axes.
        flip: mirror images at random; only where a mirrored image keeps its class.
        seed: of everything random.
        validation: share of the images, 0 to below 1, that is held out to decide; the head at the end has all of them.
            With 0 the model is what the last epoch made, better or not.
        test: images that measure the curve and decide nothing: a source whose part ``"test"`` is read, or a pair
            (images, labels). Without, the curve is the best of ``held_out`` so far.
        checkpoint: a file, renewed every half minute and when ``cancel`` is set, to resume from. It stays at the end.
        resume: go on from ``checkpoint``, if it is there: with the same arguments, to the same model to the bit.
        on_step: called with (steps done, steps in all).
        progress: called with every point of the curve.
        cancel: a ``threading.Event`` or alike, looked at before each step.

    Raises:
        InputError: bad images or settings, a class without images, or a checkpoint is there and ``resume`` is not set.
        CheckpointError: the checkpoint is damaged, or of other images, another model or other settings.
        Cancelled: ``cancel`` was set; the checkpoint has been written.
    """
    settings = Settings(epochs, lr, batch_size, shift, flip, seed, validation, split)
    settings.check()
    path = None if checkpoint is None else Path(checkpoint)
    going_on = path is not None and path.exists()
    if going_on and not resume:
        hint = "Resume the run it is of, or remove it."
        raise InputError(message(WHERE, "checkpoint", "a path without a file", repr(str(path)), hint))
    source = open_images(images, labels, size=model.preprocess.size, split=split, classes=model.classes)
    tuning = _Tuning(model, source, test, settings)
    if path is not None and going_on:
        tuning.restore(path)
    else:
        tuning.measure(progress)
    saved = time.monotonic()
    while tuning.run.done < tuning.run.total:
        if path is not None and cancel is not None and cancel.is_set():
            tuning.save(path)
        check(cancel, WHERE)
        if tuning.step():
            tuning.end_epoch()
            tuning.measure(progress)
        done, total = tuning.run.done, tuning.run.total
        if path is not None and (done == total or time.monotonic() - saved > CHECKPOINT_SECONDS):
            tuning.save(path)
            saved = time.monotonic()
        if on_step is not None:
            on_step(done, total)
    return tuning.result(source)


def finetuning_settings() -> str:
    """The defaults that decide a result, as one line: results of others are not mixed with these."""
    return (
        f"lr={LR} head={HEAD_LR} shift={SHIFT} validation={VALIDATION} batch={BATCH} warmup={WARMUP} "
        f"bf16={native_bfloat16()}"
    )


@dataclass(frozen=True)
class Settings:
    """The options of ``finetune`` that decide its result."""

    epochs: int
    lr: float
    batch_size: int
    shift: int
    flip: bool
    seed: int
    validation: float
    split: str

    def check(self) -> None:
        """Raise InputError where one is out of range that nothing else checks."""
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(message(WHERE, "lr", "positive and finite", self.lr))
        if self.shift < 0:
            raise InputError(message(WHERE, "shift", "at least 0", self.shift))
        if not 0 <= self.validation < 1:
            raise InputError(message(WHERE, "validation", "at least 0 and below 1", self.validation))


class _Tunable(nn.Module):
    """Network and a linear head under gradients; the logits are at first those of network and head as they come.

    But shifted copies are not read as well: training moves images at random as it is.
    """

    def __init__(self, network: nn.Module, head: Head, views: str) -> None:
        super().__init__()
        self.views = "single" if views == "shifted" else views
        self.network = copy.deepcopy(network).requires_grad_(True)
        self.reading = head.reading
        scaled = {name: tensor * head.temperature for name, tensor in head.state.items() if name != "temperature"}
        self.head = nn.ParameterDict(scaled)  # weight [K, F], bias [K]

    def forward(self, x: Tensor) -> Tensor:
        features = self.reading(self.network, x, self.views)
        weight = self.head["weight"]
        return F.linear(features.to(weight.dtype), weight, getattr(self.head, "bias", None))


class _Tuning:
    """A fine-tuning between its first step and its last: the run, its time, its curve, and what is best so far."""

    def __init__(self, model: PredictedModel, source: ImageSource, test: Any, settings: Settings) -> None:
        load_optimisers()
        self.model, self.settings = model, settings
        device = next(model.network.parameters()).device
        self.clock = Clock(device)
        images, labels = source.tensors()
        _require_every_class(labels, model.classes)
        self.images, self.labels = images.to(device), labels.to(device)
        self.trained, self.held = (rows.to(device) for rows in _split(labels, settings.validation, settings.seed))
        if settings.validation and not len(self.held):
            rule = "0, or a share of some class that makes an image"
            raise InputError(message(WHERE, "validation", rule, settings.validation, "Give more images."))
        self.test = _test_images(model, test)
        used = self.images[self.trained], self.labels[self.trained]
        check_training(WHERE, *used, len(model.classes), settings.epochs, settings.batch_size)
        # Which head the tuned network gets: that of the model, if it takes so many images.
        many = model.head.name == "kernel" and len(labels) > KERNEL_ROWS
        self.head_name = "ridge" if many else model.head.name
        head = self._fitted(model.network, self.trained).fit() if settings.validation else model.head
        linear = head
        if head.name == "kernel":
            linear = self._fitted(model.network, self.trained, "ridge").fit()
        self.tunable = _Tunable(model.network, linear, model.views)
        recipe = Recipe(settings.epochs, settings.batch_size, settings.flip, settings.shift, settings.seed)
        self.run = Run(self.tunable, self._optimiser(), *used, model.preprocess, recipe)
        self.kept = 0  # the epoch whose network is the best
        self.network = model.network  # that one
        # It under a head of all images, once that was needed.
        self.finished: PredictedModel | None = None if many else model
        self.right = self._right(model.network, head)  # [held] what that network, with the trained images, gets right
        self.held_out = [_mean(self.right)] if settings.validation else []  # after each epoch
        self.curve: list[CurvePoint] = []

    def _optimiser(self) -> torch.optim.Optimizer:
        lr = self.settings.lr
        groups = [
            {"params": list(self.tunable.network.parameters()), "lr": lr},
            {"params": list(self.tunable.head.parameters()), "lr": HEAD_LR * lr},
        ]
        return torch.optim.AdamW(groups, lr, weight_decay=0.0, fused=True)

    def step(self) -> bool:
        """Make one update; whether it was the last of an epoch."""
        self.tunable.train()
        if self.model.batchnorm == "shared":  # its statistics are constants
            for norm in self.tunable.network.modules():
                if isinstance(norm, _BatchNorm):
                    norm.eval()
        self.run.step()
        return self.run.done % self.run.steps_per_epoch == 0

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Keep the network as it is now, if it is better than what was kept."""
        network = copy.deepcopy(self.model.network)
        network.load_state_dict(self.tunable.network.state_dict())
        if self.model.batchnorm == "calibrated":
            calibrate(network, self._prepared(self.trained[:BATCH_SIZE]))
        if self.settings.validation:
            right = self._right(network, self._fitted(network, self.trained).fit())
            self.held_out.append(_mean(right))
            if not _better(right, self.right):
                return
            self.right = right
        self.kept, self.network, self.finished = int(self.run.epoch), network, None

    def measure(self, progress: Callable[[CurvePoint], None] | None) -> None:
        """Add what would be returned now to the curve; time spent on test images does not count."""
        self.clock.stop()
        seconds = self.clock.seconds
        if self.test is not None:
            start = time.perf_counter()
            model = self._finish()
            seconds += time.perf_counter() - start  # to be had, the model has to be finished
            top1 = accuracy(model, *self.test, model.preprocess)
        elif self.held_out:
            top1 = _mean(self.right)
        else:
            self.clock.start()
            return
        point = CurvePoint(self.run.epoch, seconds, top1)
        self.curve.append(point)
        if progress is not None:
            progress(point)
        self.clock.start()

    @torch.no_grad()
    def _finish(self) -> PredictedModel:
        """The best network so far, under a head fitted to all images."""
        if self.finished is None:
            everything = torch.cat([self.trained, self.held])  # mixed: a batch of one class would leak it (see ordered)
            fitter = self._fitted(self.network, everything)
            self.finished = PredictedModel(
                self.network, fitter.fit(), self.model.preprocess, self.model.classes,
                batchnorm=self.model.batchnorm, target_name=self.model.target_name,
                fitter=None if self.model.fitter is None else fitter, views=self.model.views,
            )  # fmt: skip
        return self.finished

    def result(self, source: ImageSource) -> PredictedModel:
        """The model that this run made, with its report."""
        done = self._finish()
        self.clock.stop()
        network = copy.deepcopy(done.network) if done.network is self.model.network else done.network
        tuned = PredictedModel(
            network, done.head, done.preprocess, done.classes,
            batchnorm=done.batchnorm, target_name=done.target_name, fitter=done.fitter, views=done.views,
        )  # fmt: skip
        tuned.report = self._report(tuned, source)
        return tuned

    def _report(self, tuned: PredictedModel, source: ImageSource) -> dict[str, Any]:
        before, head = self.model.report, tuned.head
        entry = {**asdict(self.settings), "n": len(self.labels), "kept": self.kept}
        record = before.get("provenance", {})
        return {
            **before,
            "seconds": {**before.get("seconds", {}), "finetuning": self.clock.seconds},
            "expected_accuracy": self._expected(head),
            "skipped": [*before.get("skipped", ()), *(list(one) for one in source.skipped)],
            "warnings": [*before.get("warnings", ()), *source.warnings],
            "head": {"name": head.name, **head.info},
            "finetuning": {
                **entry,
                "seconds": self.clock.seconds,
                "measured_on": "test" if self.test is not None else "validation" if self.held_out else None,
                "curve": [[point.epoch, point.seconds, point.top1] for point in self.curve],
                "held_out": self.held_out,
            },
            "provenance": {
                **record,
                "finetuned": [*record.get("finetuned", ()), entry],
                "model_sha256": provenance.digest_model(tuned.network, head),
            },
        }

    def _expected(self, head: Head) -> float:
        """The accuracy to expect: in a network that learned labels, leave-one-out flatters; held-out images do not."""
        if not self.kept:
            return float(self.model.report.get("expected_accuracy", head.expected_accuracy))
        return min([head.expected_accuracy, *self.held_out[self.kept :][:1]])

    @torch.no_grad()
    def _fitted(self, network: nn.Module, rows: Tensor, name: str | None = None) -> HeadFitter:
        """What a head remembers of these images; by default the one that the result gets."""
        fitter = HeadFitter(name or self.head_name, len(self.model.classes), seed=self.settings.seed)
        parts = rows.split(FIT_BATCH)
        fitter.add((self._read(network, part, fitter.reading), self.labels[part]) for part in parts)
        return fitter

    @torch.no_grad()
    def _right(self, network: nn.Module, head: Head) -> Tensor:
        """Which of the images that are held out are classified right: bool ``[m]``."""
        found = [
            head.logits(self._read(network, part, head.reading)).argmax(1) == self.labels[part]
            for part in self.held.split(FIT_BATCH)
            if len(part)
        ]
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.bool)

    def _read(self, network: nn.Module, rows: Tensor, reading: Reading) -> Tensor:
        return reading(network, self._prepared(rows), self.model.views)

    def _prepared(self, rows: Tensor) -> Tensor:
        return channels_last(self.model.preprocess.normalise(self.images[rows]))

    def save(self, path: Path) -> None:
        """Write everything needed to go on exactly from here."""
        run, tensors = self.run.state()
        tensors |= {f"{BEST}{name}": value for name, value in self.network.state_dict().items()} | {"right": self.right}
        self.clock.stop()
        config = {
            **self._of(),
            "run": run,
            "kept": self.kept,
            "held_out": self.held_out,
            "curve": [asdict(point) for point in self.curve],
            "seconds": self.clock.seconds,
        }
        self.clock.start()
        checkpoints.save(path, KIND, config, tensors)

    def restore(self, path: Path) -> None:
        """Go on from what ``save`` wrote.

        Raises:
            CheckpointError: the file is damaged, or of another model, other images or other settings.
        """
        config, tensors = checkpoints.load(path, KIND)
        for name, ours in json.loads(json.dumps(self._of())).items():
            if config.get(name) != ours:
                hint = "Start from the same, or remove the checkpoint."
                raise CheckpointError(message(WHERE, name, f"that of the checkpoint ({config.get(name)})", ours, hint))
        best = {name.removeprefix(BEST): tensors.pop(name) for name in list(tensors) if name.startswith(BEST)}
        try:
            self.run.restore(config["run"], tensors)
            self.right = tensors["right"].to(self.right.device)
            self.kept, self.held_out = config["kept"], config["held_out"]
            self.curve = [CurvePoint(**point) for point in config["curve"]]
            self.clock.seconds = float(config["seconds"])
            if self.kept:
                self.network, self.finished = copy.deepcopy(self.model.network), None
                self.network.load_state_dict(best)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            got = f"{str(path)!r} ({one_line(error)})"
            raise CheckpointError(message(WHERE, "checkpoint", "a checkpoint of this run", got)) from error
        self.clock.start()

    def _of(self) -> dict[str, Any]:
        """What a checkpoint has to be of."""
        return {
            "settings": asdict(self.settings),
            "model": provenance.digest_model(self.model.network, self.model.head),
            "images": provenance.digest({"images": self.images, "labels": self.labels}),
        }


def _split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Positions to train on and to hold out, in random order; of every class about ``share`` is held out, never all."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        own = order[labels[order] == label]
        held[own[: min(round(share * len(own)), len(own) - 1)]] = True
    return order[~held[order]], order[held[order]]


def _mean(right: Tensor) -> float:
    return float(right.double().mean())


def _better(first: Tensor, second: Tensor) -> bool:
    """Whether ``first [m]`` has more right than ``second [m]``, by more than one standard error of the difference."""
    difference = first.long() - second.long()  # its variance is that of the images on which the two differ
    return int(difference.sum()) > math.sqrt(int(difference.abs().sum()))


def _test_images(model: PredictedModel, test: Any) -> tuple[Tensor, Tensor] | None:
    """Images and labels to measure on, in random order: where a batch has statistics of its own, it has to be mixed."""
    if test is None:
        return None
    source, labels = test if isinstance(test, tuple) else (test, None)
    opened = open_images(source, labels, size=model.preprocess.size, split="test", classes=model.classes)
    images, truth = opened.tensors()
    order = torch.randperm(len(truth), generator=torch.Generator().manual_seed(0))
    return images[order], truth[order]


def _require_every_class(labels: Tensor, classes: Sequence[str]) -> None:
    counts = torch.bincount(labels, minlength=len(classes))
    empty = [name for name, count in zip(classes, counts.tolist(), strict=True) if not count]
    if empty:
        hint = "The model would forget a class that it does not see."
        raise InputError(message(WHERE, "images", "of every class of the model", f"none of {quoted(empty)}", hint))
