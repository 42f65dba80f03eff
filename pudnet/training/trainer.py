"""The training loop of the hypernetwork: one process or several, resumable to the bit on one machine."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pudnet import checkpoint
from pudnet.data.episodes import ClassPool, sample_episode
from pudnet.data.source import open_images
from pudnet.errors import CheckpointError, InputError, message
from pudnet.models.pudnet import PudNet
from pudnet.training.config import DataSource, TrainingConfig
from pudnet.training.losses import class_means, cosine_logits, group_losses

logger = logging.getLogger("pudnet")

Callback = Callable[[int, dict[str, float]], None]
VALIDATION_TASKS, VALIDATION_WAYS, VALIDATION_IMAGES = 20, 5, 35


class Trainer:
    """Holds the hypernetwork, the auxiliary classifier and the optimiser; ``step`` makes one update.

    Under ``torchrun`` every process computes its share of a step's groups and the gradients are summed: the result does
    not depend on the number of processes, but for rounding.

    Args:
        config: the run.
        device: where to train.

    Raises:
        InputError: the data cannot be read or does not fit the settings.
    """

    def __init__(self, config: TrainingConfig, device: str = "cpu") -> None:
        self.config, self.device = config, torch.device(device)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        if config.episodes.groups % self.world:
            rule = f"a multiple of the {self.world} processes"
            raise InputError(message("Trainer", "episodes.groups", rule, config.episodes.groups))
        self.net = PudNet(config.target, config.preset, seed=config.seed, **config.model).to(self.device).train()
        self.pools, self.held_out = self._read(config.data)
        weights = np.array([source.weight for source in config.data])
        self.shares = weights / weights.sum()
        self.first_class = np.cumsum([0, *(len(pool.classes) for pool in self.pools)])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.auxiliary = nn.Linear(self._feature_width(), int(self.first_class[-1])).to(self.device)
        self.named = {f"net.{name}": value for name, value in self.net.named_parameters()}
        self.named |= {f"auxiliary.{name}": value for name, value in self.auxiliary.named_parameters()}
        self.optimiser = torch.optim.Adam(self.named.values(), lr=config.optimiser.lr, betas=config.optimiser.betas)
        self.buffers = [value for value in self.net.buffers() if value.is_floating_point()]
        self.steps_done = 0

    def _read(self, sources: tuple[DataSource, ...]) -> tuple[list[ClassPool], list[ClassPool]]:
        train, held_out = [], []
        for source in sources:
            images, labels = [], []
            names: list[str] = []
            for path in source.paths:
                opened = open_images(path, size=self.net.config.image_size)
                part_images, part_labels = opened.tensors()
                images.append(part_images)
                labels.append(part_labels + len(names))
                names += list(opened.classes)
            if len(set(names)) < len(names):
                raise InputError(message("Trainer", "data.paths", "files of different classes", "a name twice"))
            if unknown := sorted(set(source.held_out) - set(names)):
                raise InputError(message("Trainer", "data.held_out", "names of classes", unknown[:3]))
            joined = torch.cat(images), torch.cat(labels)
            pool = ClassPool.build(*joined, names, [name for name in names if name not in set(source.held_out)])
            self._check_episodes(pool)
            train.append(pool)
            unseen = ClassPool.build(*joined, names, source.held_out)
            if len(unseen.classes) >= VALIDATION_WAYS and unseen.smallest > 1:
                held_out.append(unseen)
        return train, held_out

    def _check_episodes(self, pool: ClassPool) -> None:
        """Refuse now what would fail at some later step."""
        wanted = self.config.episodes
        if wanted.classes > len(pool.classes):
            rule = f"at most {len(pool.classes)}, the training classes of every [[data]]"
            raise InputError(message("Trainer", "episodes.classes", rule, wanted.classes))
        if pool.smallest < wanted.support + wanted.query:
            rule = f"at most {pool.smallest}, the images of the smallest class"
            raise InputError(message("Trainer", "episodes.support + query", rule, wanted.support + wanted.query))
        side, crop = self.net.config.image_size, self.config.augment.crop
        if crop >= side:
            raise InputError(message("Trainer", "augment.crop", f"less than the image size, {side}", crop))

    def _feature_width(self) -> int:
        features = self.net.try_target(lambda network, images: network(images))
        if not isinstance(features, Tensor) or features.dim() != 2:
            got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise InputError(message("Trainer", "target", "a network that gives features [n, F]", got))
        return int(features.shape[1])

    def rate(self, step: int) -> float:
        """Learning rate of step ``step`` (from 0)."""
        settings = self.config.optimiser
        up = min(1.0, (step + 1) / max(settings.warmup, 1))
        down = min(1.0, (settings.steps - step) / max(settings.decay, 1))
        return settings.lr * up * down

    def _group(self, number: int) -> dict[str, Tensor]:
        """Loss of group ``number`` of the current step; all randomness comes from (seed, step, group)."""
        config = self.config
        rng = np.random.default_rng([config.seed, self.steps_done, number])
        source = int(rng.choice(len(self.pools), p=self.shares))
        episode = sample_episode(
            self.pools[source],
            rng,
            self.net.preprocess,
            classes=config.episodes.classes,
            support=config.episodes.support,
            query=config.episodes.query,
            **dataclasses.asdict(config.augment),
        )
        images, labels = episode.images.to(self.device), episode.labels.to(self.device)
        flat = self.net(images[: episode.support], [episode.support])  # [1, P]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.run.amp):
            features = self.net.call(self.net.layout.views(flat[0]), images)
        features = features.float()
        classes = (episode.classes + int(self.first_class[source])).to(self.device)
        return group_losses(
            features, labels, episode.support, self.net.temperature, self.auxiliary(features), classes
        )

    def step(self) -> dict[str, float]:
        """One optimiser step over all groups; returns the losses and the accuracy, averaged over the groups."""
        config = self.config
        groups = config.episodes.groups
        before = [value.clone() for value in self.buffers]
        after = [torch.zeros_like(value) for value in self.buffers]
        totals = torch.zeros(5, device=self.device)
        self.optimiser.zero_grad(set_to_none=True)
        for number in range(self.rank, groups, self.world):
            # Every group starts from the same running statistics, so that their mean is independent of who ran which.
            for value, start in zip(self.buffers, before, strict=True):
                value.copy_(start)
            terms = self._group(number)
            loss = sum((getattr(config.loss, name) * terms[name] for name in ("cosine", "auxiliary", "agreement")),
                       start=torch.zeros((), device=self.device))  # fmt: skip
            (loss / groups).backward()
            totals += torch.stack([loss, *terms.values()]).detach() / groups
            for total, value in zip(after, self.buffers, strict=True):
                total += value / groups
        gradients = [value.grad if value.grad is not None else torch.zeros_like(value) for value in self.named.values()]
        self._sum_over_processes([*gradients, *after, totals])
        for value, mean in zip(self.buffers, after, strict=True):
            value.copy_(mean)
        for value, gradient in zip(self.named.values(), gradients, strict=True):
            value.grad = gradient
        norm = nn.utils.clip_grad_norm_(self.named.values(), config.optimiser.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate(self.steps_done)
        self.optimiser.step()
        self.steps_done += 1
        metrics = dict(zip(("loss", "cosine", "auxiliary", "agreement", "accuracy"), totals.tolist(), strict=True))
        return {**metrics, "gradient_norm": float(norm), "lr": self.rate(self.steps_done - 1)}

    def _sum_over_processes(self, tensors: list[Tensor]) -> None:
        if self.world == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    @torch.no_grad()
    def unseen_accuracy(self) -> float | None:
        """Accuracy of the cosine classifier on tasks of held-out classes, always the same ones; None without any."""
        if not self.held_out:
            return None
        self.net.eval()
        correct = []
        for number in range(VALIDATION_TASKS):
            rng = np.random.default_rng([VALIDATION_TASKS, number])
            pool = self.held_out[number % len(self.held_out)]
            images_a_class = min(VALIDATION_IMAGES, pool.smallest)
            query = max(1, images_a_class * 3 // 7)
            support = images_a_class - query
            episode = sample_episode(
                pool, rng, self.net.preprocess, classes=VALIDATION_WAYS, support=support, query=query
            )
            images, labels = episode.images.to(self.device), episode.labels.to(self.device)
            flat = self.net(images[: episode.support], [episode.support])
            features = self.net.call(self.net.layout.views(flat[0]), images)
            means = class_means(features[: episode.support], labels[: episode.support], VALIDATION_WAYS)
            logits = cosine_logits(features[episode.support :], means, self.net.temperature)
            correct.append((logits.argmax(dim=1) == labels[episode.support :]).float().mean())
        self.net.train()
        return float(torch.stack(correct).mean())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything needed to go on exactly from here."""
        tensors = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        tensors |= {f"auxiliary.{name}": value for name, value in self.auxiliary.state_dict().items()}
        for name, value in self.named.items():
            if state := self.optimiser.state.get(value):
                tensors[f"optimiser.exp_avg.{name}"] = state["exp_avg"]
                tensors[f"optimiser.exp_avg_sq.{name}"] = state["exp_avg_sq"]
        checkpoint.save(path, "training", {"step": self.steps_done, "run": self.config.to_dict()}, tensors)

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Go on from what ``save`` wrote.

        Raises:
            CheckpointError: the file is damaged, or was written by a run with other settings.
        """
        saved, tensors = checkpoint.load(path, "training")
        now = json.loads(json.dumps(self.config.to_dict()))
        changeable = {"run", "optimiser"}  # length and bookkeeping may change, the trunk of the run may not
        differing = sorted(key for key in now if key not in changeable and saved["run"].get(key) != now[key])
        if differing:
            got, hint = f"other {differing}", "Restore the settings, or start a new run in another folder."
            raise CheckpointError(message("Trainer.restore", "config", "the one of the run", got, hint))

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        self.net.load_state_dict(part("net."))
        self.auxiliary.load_state_dict(part("auxiliary."))
        self.steps_done = int(saved["step"])
        first, second = part("optimiser.exp_avg."), part("optimiser.exp_avg_sq.")
        for name, value in self.named.items():
            if name in first:
                self.optimiser.state[value] = {
                    "step": torch.tensor(float(self.steps_done)),
                    "exp_avg": first[name].to(self.device),
                    "exp_avg_sq": second[name].to(self.device),
                }


@contextmanager
def _stop_request() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into a flag, so that a step is never cut in half; restores the handlers at the end."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    previous = {number: signal.signal(number, lambda *_: asked.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _processes(device: str) -> Iterator[None]:
    """Join the other processes where ``torchrun`` started this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def train(
    config: TrainingConfig,
    *,
    resume: bool = False,
    device: str = "cpu",
    on_step: Callback | None = None,
    on_validation: Callback | None = None,
) -> Path:
    """Train a hypernetwork and write ``predictor.safetensors`` into the run's folder.

    ``checkpoint.safetensors`` there is renewed every few minutes and when the run is interrupted; ``log.jsonl`` and, if
    tensorboard is installed, an event file get the losses.

    Args:
        config: the run.
        resume: go on from the checkpoint in the folder; without one, start.
        device: where to train.
        on_step: called with (steps done, losses) after every step.
        on_validation: called with (steps done, {"unseen_accuracy": ...}).

    Returns:
        The path of the finished predictor.

    Raises:
        InputError: bad settings or data, or a folder that holds another run and ``resume`` is not set.
        KeyboardInterrupt: SIGINT or SIGTERM came; the checkpoint has been written.
    """
    with _processes(device):
        return _train(config, resume, device, on_step, on_validation)


def _train(
    config: TrainingConfig, resume: bool, device: str, on_step: Callback | None, on_validation: Callback | None
) -> Path:
    folder = Path(config.run.output)
    saved = folder / "checkpoint.safetensors"
    if saved.exists() and not resume:
        hint = "Resume it, or choose another folder."
        raise InputError(message("train", "run.output", "a folder without a run", repr(str(folder)), hint))
    trainer = Trainer(config, device)
    if resume and saved.exists():
        trainer.restore(saved)
    chief = trainer.rank == 0
    if chief:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()  # an existing folder may still not be writable
        except OSError as error:
            got = f"{str(folder)!r} ({error.strerror})"
            raise InputError(message("train", "run.output", "a folder that can be written", got)) from error
    log = _Log(folder) if chief else None
    last_save = time.monotonic()
    with _stop_request() as stop_asked:
        while trainer.steps_done < config.optimiser.steps:
            metrics = trainer.step()
            done = trainer.steps_done
            if on_step and chief:
                on_step(done, metrics)
            if log and done % config.run.log_every == 0:
                log.write(done, metrics)
            if chief and (done % config.run.validate_every == 0 or done == config.optimiser.steps):
                accuracy = trainer.unseen_accuracy()
                if accuracy is not None:
                    if log:
                        log.write(done, {"unseen_accuracy": accuracy})
                    if on_validation:
                        on_validation(done, {"unseen_accuracy": accuracy})
            stopping = _any_process(stop_asked(), trainer.world)
            if chief and (stopping or time.monotonic() - last_save > 60 * config.run.checkpoint_minutes):
                trainer.save(saved)
                last_save = time.monotonic()
            if stopping:
                raise KeyboardInterrupt
    result = folder / "predictor.safetensors"
    if chief:
        trainer.save(saved)
        card = {"held_out": [list(source.held_out) for source in config.data], "training": config.to_dict()}
        trainer.net.save(result, card=card)
    return result


def _any_process(flag: bool, world: int) -> bool:
    """Whether any process has the flag set: all must stop at the same step."""
    if world == 1:
        return flag
    votes = torch.tensor(float(flag))
    dist.all_reduce(votes)
    return bool(votes > 0)


class _Log:
    """Losses to ``log.jsonl`` and, where installed, to tensorboard."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "log.jsonl"
        self.started = time.time()
        self.board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"))
        except ImportError:
            logger.info("tensorboard is not installed: losses go to %s only", self.path)

    def write(self, step: int, values: dict[str, float]) -> None:
        seconds = round(time.time() - self.started, 1)
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, "seconds": seconds, **values}) + "\n")
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
