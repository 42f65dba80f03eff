"""What the training of every hypernetwork shares: one process or several, resumable to the bit on one machine."""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pudnet import checkpoint
from pudnet.errors import CheckpointError, InputError, message, one_line
from pudnet.files import atomic_path
from pudnet.models.ghn import GHN
from pudnet.models.pudnet import PudNet
from pudnet.serving import stop_request
from pudnet.training.config import Settings

logger = logging.getLogger("pudnet")

Callback = Callable[[int, dict[str, float]], None]


class BaseTrainer(ABC):
    """Modules under one Adam; ``step`` makes one update.

    A step is made of groups (datasets, architectures). Under ``torchrun`` every process computes its share of them and
    the gradients are summed: the result does not depend on the number of processes, but for rounding.

    A subclass calls ``_start`` at the end of its constructor and says what a step computes (``_backward``,
    ``_metrics``), how it is validated, and what the run results in (``write_result``).

    Args:
        config: the run.
        device: where to train.
    """

    kind: ClassVar[str]  # of its checkpoints

    def __init__(self, config: Settings, device: str) -> None:
        self.settings, self.device = config, torch.device(device)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.steps_done = 0

    def _start_from(self, name: str, model: PudNet | GHN) -> None:
        """Give ``model`` the parameters of a trained hypernetwork, if the run names one."""
        if not name:
            return
        try:
            model.load_state_dict(type(model).from_pretrained(name).state_dict())
        except RuntimeError as error:
            rule = "a checkpoint of the same hypernetwork: its target or preset, and its model's options"
            where = type(self).__name__
            raise InputError(message(where, "start", rule, f"{name!r} ({one_line(error)})")) from error

    def _start(self, modules: Mapping[str, nn.Module], buffers: list[Tensor]) -> None:
        """Take what is trained, by name; ``buffers`` are running statistics that change in a step."""
        self.modules, self.buffers = dict(modules), buffers
        self.named = {
            f"{name}.{inner}": value for name, module in modules.items() for inner, value in module.named_parameters()
        }
        settings = self.settings.optimiser
        self.optimiser = torch.optim.Adam(
            self.named.values(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
        )

    def _check_groups(self, name: str, groups: int) -> None:
        if groups % self.world:
            rule = f"a multiple of the {self.world} processes"
            raise InputError(message(type(self).__name__, name, rule, groups))

    @abstractmethod
    def _backward(self) -> Tensor:
        """Add the gradients of this process's groups to the parameters.

        All randomness comes from (seed, step, group). Gradients and buffers are left as this process's part of a sum
        over processes.

        Returns:
            Numbers ``[m]`` to sum over processes, for ``_metrics``.
        """

    @abstractmethod
    def _metrics(self, totals: list[float]) -> dict[str, float]:
        """What to report of a step, from the summed numbers of ``_backward``."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Measure on data that is never trained on, always the same; empty where there is none."""

    @abstractmethod
    def write_result(self, path: Path) -> None:
        """Write the trained hypernetwork as users load it."""

    def rate(self, step: int) -> float:
        """Learning rate of step ``step`` (from 0)."""
        settings = self.settings.optimiser
        up = min(1.0, (step + 1) / max(settings.warmup, 1))
        down = min(1.0, (settings.steps - step) / max(settings.decay, 1))
        drops = sum(step >= share * settings.steps for share in settings.drops)
        return float(settings.lr * up * down * 0.1**drops)

    def step(self) -> dict[str, float]:
        """One optimiser step over all groups; returns what ``_metrics`` says, the gradient's norm and the rate."""
        self.optimiser.zero_grad(set_to_none=True)
        totals = self._backward()
        gradients = [value.grad if value.grad is not None else torch.zeros_like(value) for value in self.named.values()]
        self._sum_over_processes([*gradients, *self.buffers, totals])
        for value, gradient in zip(self.named.values(), gradients, strict=True):
            value.grad = gradient
        norm = nn.utils.clip_grad_norm_(self.named.values(), self.settings.optimiser.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate(self.steps_done)
        self.optimiser.step()
        self.steps_done += 1
        metrics = self._metrics(totals.tolist())
        return {**metrics, "gradient_norm": float(norm), "lr": self.rate(self.steps_done - 1)}

    def _sum_over_processes(self, tensors: list[Tensor]) -> None:
        if self.world == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything needed to go on exactly from here."""
        tensors = {
            f"{name}.{inner}": value for name, module in self.modules.items()
            for inner, value in module.state_dict().items()
        }  # fmt: skip
        for name, value in self.named.items():
            if state := self.optimiser.state.get(value):
                tensors[f"optimiser.exp_avg.{name}"] = state["exp_avg"]
                tensors[f"optimiser.exp_avg_sq.{name}"] = state["exp_avg_sq"]
        checkpoint.save(path, self.kind, {"step": self.steps_done, "run": self.settings.to_dict()}, tensors)

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Go on from what ``save`` wrote.

        Raises:
            CheckpointError: the file is damaged, or was written by a run with other settings.
        """
        saved, tensors = checkpoint.load(path, self.kind)
        where = f"{type(self).__name__}.restore"
        run, step, now = saved.get("run"), saved.get("step"), json.loads(json.dumps(self.settings.to_dict()))
        if not isinstance(run, dict) or isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**53:
            raise CheckpointError(message(where, "path", "a run's checkpoint", f"{str(path)!r} without run or step"))
        try:
            run = json.loads(json.dumps(type(self.settings).from_dict(run).to_dict()))  # with settings that came later
        except InputError as error:
            raise CheckpointError(message(where, "path", "one with known settings", one_line(error))) from error
        changeable = {"run", "optimiser"}  # length and bookkeeping may change, the trunk of the run may not
        differing = sorted(key for key in now if key not in changeable and run.get(key) != now[key])
        if differing:
            got, hint = f"other {differing}", "Restore the settings, or start a new run in another folder."
            raise CheckpointError(message(where, "config", "the one of the run", got, hint))

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        first, second = part("optimiser.exp_avg."), part("optimiser.exp_avg_sq.")
        try:
            for name, module in self.modules.items():
                checkpoint.fill(module, part(f"{name}."))
            for name in first | second:
                owner, moments = self.named[name], {"exp_avg": first[name], "exp_avg_sq": second[name]}
                if any(moment.shape != owner.shape for moment in moments.values()):
                    raise RuntimeError(f"moments of another shape at {name!r}")
                moved = {key: moment.to(owner) for key, moment in moments.items()}
                self.optimiser.state[owner] = {"step": torch.tensor(float(step)), **moved}
        except (KeyError, RuntimeError) as error:
            got = f"{str(path)!r} ({one_line(error)})"
            raise CheckpointError(message(where, "path", "a checkpoint of this run", got)) from error
        self.steps_done = step


def fit(
    make: Callable[[], BaseTrainer],
    config: Settings,
    *,
    resume: bool,
    device: str,
    on_step: Callback | None,
    on_validation: Callback | None,
) -> Path:
    """Run the trainer that ``make`` gives to the end, as ``pudnet.training.train`` describes.

    ``make`` is called when the processes of a run have joined.
    """
    with _processes(device):
        return _fit(make, config, resume, on_step, on_validation)


def _fit(
    make: Callable[[], BaseTrainer],
    config: Settings,
    resume: bool,
    on_step: Callback | None,
    on_validation: Callback | None,
) -> Path:
    folder = Path(config.run.output)
    saved = folder / "checkpoint.safetensors"
    if saved.exists() and not resume:
        hint = "Resume it, or choose another folder."
        raise InputError(message("train", "run.output", "a folder without a run", repr(str(folder)), hint))
    trainer = make()
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
    log = _Log(folder, trainer.steps_done) if chief else None
    last_save = time.monotonic()
    with stop_request() as stop_asked, closing(log) if log else nullcontext():
        while trainer.steps_done < config.optimiser.steps:
            metrics = trainer.step()
            done = trainer.steps_done
            if on_step and chief:
                on_step(done, metrics)
            if log and done % config.run.log_every == 0:
                log.write(done, metrics)
            if chief and (done % config.run.validate_every == 0 or done == config.optimiser.steps):
                measured = trainer.validate()
                if log and measured:
                    log.write(done, measured)
                if on_validation and measured:
                    on_validation(done, measured)
            stopping = _any_process(stop_asked.is_set(), trainer)
            if chief and (stopping or time.monotonic() - last_save > 60 * config.run.checkpoint_minutes):
                trainer.save(saved)
                last_save = time.monotonic()
            if stopping:
                raise KeyboardInterrupt
    result = folder / "predictor.safetensors"
    if chief:
        trainer.save(saved)
        trainer.write_result(result)
    if trainer.world > 1:
        dist.barrier()  # torchrun ends all processes when one fails as it leaves: not before the result is written
    return result


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


def _any_process(flag: bool, trainer: BaseTrainer) -> bool:
    """Whether any process has the flag set: all must stop at the same step."""
    if trainer.world == 1:
        return flag
    votes = torch.tensor(float(flag), device=trainer.device)  # NCCL reduces tensors of its devices alone
    dist.all_reduce(votes)
    return bool(votes > 0)


class _Log:
    """Losses to ``log.jsonl`` and, where installed, to tensorboard. A resumed run's log goes on from step ``steps``."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.path = folder / "log.jsonl"
        self.started = time.time()
        self.board: Any = None
        if self.path.exists():
            self._forget_after(steps)
        try:
            from torch.utils.tensorboard import SummaryWriter

            with self._writing():
                self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=steps + 1 if steps else None)
        except ImportError:
            logger.info("tensorboard is not installed: losses go to %s only", self.path)

    def _forget_after(self, steps: int) -> None:
        """Drop what a killed run wrote after its last checkpoint: steps that are made again, perhaps half a line."""
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        with atomic_path(self.path, "train") as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines if _step_of(line) <= steps), encoding="utf-8")

    def write(self, step: int, values: dict[str, float]) -> None:
        seconds = round(time.time() - self.started, 1)
        with self._writing():
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, "seconds": seconds, **values}) + "\n")
            if self.board is not None:
                for name, value in values.items():
                    self.board.add_scalar(name, value, step)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            got = f"{str(self.path.parent)!r} ({error.strerror})"
            raise InputError(message("train", "run.output", "a folder that can be written", got)) from error

    def close(self) -> None:
        """End tensorboard's writing thread, which must not live on while the interpreter goes."""
        if self.board is not None:
            with suppress(OSError):  # said before, where it was found; the losses are in the other file
                self.board.close()


def _step_of(line: str) -> float:
    """Step of a line of the log; infinity where the line is no whole one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf
