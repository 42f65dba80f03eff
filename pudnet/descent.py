"""Gradient descent on a classifier of uint8 images: what training from scratch and fine-tuning share.

A ``Run`` makes one update at a time and can be saved between two of them; one that is restored goes on to the bit as if
it had never stopped. n images, K classes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet.data.preprocess import Preprocess
from pudnet.errors import CheckpointError, InputError, ShapeError, message, one_line

BATCH = 32
WARMUP = 0.2  # share of the steps in which the learning rate rises to its peak; it falls to zero in the rest
EVALUATION_BATCH = 32  # activations stay in the cache: 2.6 times as fast as 256 (convnet3, one thread)


@dataclass(frozen=True)
class CurvePoint:
    """Test accuracy after ``seconds`` of training (time spent on measuring it is not counted)."""

    epoch: float
    seconds: float
    top1: float


@dataclass
class Clock:
    """Counts the time between ``start`` and ``stop``."""

    device: torch.device
    seconds: float = 0.0
    _since: float = field(default_factory=time.perf_counter)

    def stop(self) -> None:
        if self.device.type == "cuda":  # kernels run on after the call that started them
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - self._since

    def start(self) -> None:
        self._since = time.perf_counter()

    def now(self) -> float:
        return self.seconds + time.perf_counter() - self._since


@dataclass(frozen=True)
class Recipe:
    """What determines a run, beside its start, its optimiser and its images.

    Attributes:
        epochs: passes over the images; the schedule of the learning rate spans them.
        batch_size: images in a step; a smaller last batch of an epoch is left out, as usual with BatchNorm.
        flip: mirror images at random.
        shift: move images at random by up to so many pixels along both axes; edge pixels are repeated.
        seed: of order and augmentation.
        smoothing: share of each label that is spread over all classes.
    """

    epochs: int
    batch_size: int = BATCH
    flip: bool = False
    shift: int = 0
    seed: int = 0
    smoothing: float = 0.0


class Run:
    """A model in training, step by step.

    The learning rate of each parameter group rises linearly to the one it came with, then falls to zero along a cosine.

    Args:
        model: normalised images ``[b, 3, size, size]`` -> logits ``[b, K]``; changed. Its mode is the caller's.
        optimiser: of the model's parameters, before its first step.
        images: uint8 ``[n, size, size, 3]``. labels: int64 ``[n]``. Both where the model is.
        preprocess: of the images.
        recipe: the rest.

    Attributes:
        done: steps made so far, of ``total``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        images: Tensor,
        labels: Tensor,
        preprocess: Preprocess,
        recipe: Recipe,
    ) -> None:
        self.model, self.optimiser, self.recipe = model, optimiser, recipe
        self._images, self._labels, self._preprocess = images, labels, preprocess
        self._peaks = [group["lr"] for group in optimiser.param_groups]
        self._random = torch.Generator().manual_seed(recipe.seed)
        self._order = torch.empty(0, dtype=torch.long)
        self.steps_per_epoch = max(1, len(images) // recipe.batch_size)
        self.total = self.steps_per_epoch * recipe.epochs
        self.done = 0

    @property
    def epoch(self) -> float:
        """Epochs made so far."""
        return self.done / self.steps_per_epoch

    def step(self) -> Tensor:
        """Make one update; returns the loss ``[]``."""
        recipe, place = self.recipe, self.done % self.steps_per_epoch
        if place == 0:
            self._order = torch.randperm(len(self._images), generator=self._random)
        chosen = self._order[place * recipe.batch_size :][: recipe.batch_size].to(self._images.device)
        images = augmented(self._images[chosen], recipe.flip, recipe.shift, self._random)  # [b, size, size, 3]
        share = schedule((self.done + 1) / self.total)
        for group, peak in zip(self.optimiser.param_groups, self._peaks, strict=True):
            group["lr"] = peak * share
        self.optimiser.zero_grad()
        x = channels_last(self._preprocess.normalise(images))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda or native_bfloat16()):
            logits = self.model(x)
        loss = F.cross_entropy(logits.float(), self._labels[chosen], label_smoothing=recipe.smoothing)
        loss.backward()
        self.optimiser.step()
        self.done += 1
        return loss.detach()

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What ``restore`` needs: a JSON-able part, and tensors (not copied)."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for number, held in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{name}": value for name, value in held.items()}
        tensors |= {"random": self._random.get_state(), "order": self._order}
        return {"done": self.done, "recipe": asdict(self.recipe)}, tensors

    def restore(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from what ``state`` gave.

        Raises:
            CheckpointError: it is of a run with another recipe, or does not fit the model.
        """
        where = "Run.restore"
        if config.get("recipe") != asdict(self.recipe):
            rule, hint = f"the run's ({config.get('recipe')})", "Restore the settings, or start anew."
            raise CheckpointError(message(where, "settings", rule, asdict(self.recipe), hint))
        moments: dict[int, dict[str, Tensor]] = {}
        try:
            for name, value in tensors.items():
                if name.startswith("optimiser."):
                    _, number, entry = name.split(".")
                    moments.setdefault(int(number), {})[entry] = value
            model = {name.removeprefix("model."): x for name, x in tensors.items() if name.startswith("model.")}
            self.model.load_state_dict(model)
            self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": moments})
            for parameter, held in self.optimiser.state.items():  # fused updates read both in the order of the memory
                for entry, value in held.items():
                    if value.shape == parameter.shape:
                        held[entry] = torch.empty_like(parameter).copy_(value)
            self._random.set_state(tensors["random"])
            self._order, self.done = tensors["order"], int(config["done"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            rule = "a checkpoint of this run"
            raise CheckpointError(message(where, "the checkpoint", rule, one_line(error))) from error


def augmented(images: Tensor, flip: bool, shift: int, generator: torch.Generator) -> Tensor:
    """Each of ``images [b, H, W, 3]`` mirrored or not, and moved; the draws are the same on every device."""
    count, height, width = images.shape[:3]
    device = images.device
    if flip:
        mirrored = (torch.rand(count, generator=generator) < 0.5).to(device)
        images = torch.where(mirrored[:, None, None, None], images.flip(2), images)
    if shift:
        down, across = torch.randint(-shift, shift + 1, (2, count, 1), generator=generator).to(device)
        rows = (torch.arange(height, device=device) + down).clamp(0, height - 1)  # [b, H]
        columns = (torch.arange(width, device=device) + across).clamp(0, width - 1)  # [b, W]
        which = torch.arange(count, device=device)
        images = images[which[:, None, None], rows[:, :, None], columns[:, None, :]]
    return images


def schedule(progress: float) -> float:
    """Share of the peak learning rate at ``progress`` in 0..1: up linearly, then down along a cosine."""
    if progress < WARMUP:
        return progress / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, preprocess: Preprocess) -> float:
    """Share of uint8 ``images [n, H, W, C]`` that ``model`` (put into eval mode) labels as ``labels [n]`` says."""
    model.eval()
    device = next(model.parameters()).device
    right = 0
    with torch.inference_mode():
        for x, y in zip(images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True):
            right += int((model(channels_last(preprocess(x.to(device)))).argmax(1) == y.to(device)).sum())
    return right / len(labels)


def channels_last(x: Tensor) -> Tensor:
    """``x [n, C, H, W]`` in the layout that convolutions on the CPU are fastest with."""
    return x.contiguous(memory_format=torch.channels_last)


def native_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware; elsewhere autocast to it would slow training down."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported is not None and supported())


def load_optimisers() -> None:
    """The first step of any torch optimiser imports half of torch (seconds): that is no part of training."""
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1).step()


def check_training(where: str, images: Tensor, labels: Tensor, num_classes: int, epochs: int, batch_size: int) -> None:
    """Raise InputError or ShapeError unless there is something to train on."""
    if epochs < 1:
        raise InputError(message(where, "epochs", "at least 1", epochs))
    if batch_size < 2:
        raise InputError(message(where, "batch_size", "at least 2", batch_size))
    if len(images) < 2 or len(images) != len(labels):
        got = f"{len(images)} images, {len(labels)} labels"
        raise ShapeError(message(where, "images and labels", "two or more, as many of one as of the other", got))
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        got = f"{int(labels.min())}..{int(labels.max())}"
        raise InputError(message(where, "labels", f"in 0..{num_classes - 1}", got))
