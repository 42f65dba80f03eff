"""The settings of a training run: one TOML file, checked when it is read."""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pudnet.errors import InputError, message

T = TypeVar("T")


@dataclass(frozen=True)
class DataSource:
    """One kind of images to draw datasets from; several files of disjoint classes are joined.

    Attributes:
        paths: folders or ``.npz`` files.
        held_out: class names that are never trained on; the unseen-class accuracy is measured on them.
        weight: how often a dataset is drawn from this source, relative to the others.
    """

    paths: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    weight: float = 1.0


@dataclass(frozen=True)
class Episodes:
    """One step sees ``groups`` datasets of ``classes`` random classes, ``support + query`` images each.

    The sketch is the support part; the loss is taken on the query part.
    """

    classes: int = 20
    support: int = 5
    query: int = 10
    groups: int = 2


@dataclass(frozen=True)
class Augment:
    """``crop`` pixels of random shift, ``flip`` left to right, ``colour``: chance of a dataset-wide colour map."""

    crop: int = 4
    flip: bool = True
    colour: float = 0.3


@dataclass(frozen=True)
class Loss:
    """Weights of PudNet's three losses: cosine classifier, auxiliary linear classifier, their agreement."""

    cosine: float = 1.0
    auxiliary: float = 1.0
    agreement: float = 0.5


@dataclass(frozen=True)
class Optimiser:
    """Adam with a linear warm-up, a constant rate, and a linear decay to zero over the last ``decay`` steps.

    Until the decay starts nothing depends on ``steps``: a longer run begins exactly like a shorter one.
    """

    steps: int = 20_000
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = 200
    decay: int = 5_000
    clip: float = 5.0


@dataclass(frozen=True)
class Run:
    """What does not change the numbers: where things go and how often."""

    output: str = "runs/pudnet"
    checkpoint_minutes: float = 3.0
    validate_every: int = 1_000
    log_every: int = 50
    amp: bool = True


@dataclass(frozen=True)
class TrainingConfig:
    """A whole training run. ``from_toml`` reads it; every section but ``data`` may be left out."""

    target: str
    data: tuple[DataSource, ...]
    seed: int = 0
    preset: str = "default"
    model: Mapping[str, Any] = field(default_factory=dict)
    episodes: Episodes = Episodes()
    augment: Augment = Augment()
    loss: Loss = Loss()
    optimiser: Optimiser = Optimiser()
    run: Run = Run()

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> TrainingConfig:
        """Read and check a TOML file.

        Raises:
            InputError: no such file, not TOML, an unknown or missing key, a wrong type or value.
        """
        where = "TrainingConfig"
        try:
            raw = tomllib.loads(Path(path).read_text())
        except OSError as error:
            raise InputError(message(where, "path", "a readable file", f"{str(path)!r} ({error.strerror})")) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(message(where, "path", "a TOML file", f"{str(path)!r} ({error})")) from error
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> TrainingConfig:
        """The same from plain dictionaries, as ``to_dict`` gives them."""
        values = dict(raw)
        sections = {"episodes": Episodes, "augment": Augment, "loss": Loss, "optimiser": Optimiser, "run": Run}
        for name, section in sections.items():
            values[name] = _build(section, values.get(name, {}), name)
        data = values.get("data", [])
        if not isinstance(data, (list, tuple)) or not data:
            raise InputError(message("TrainingConfig", "data", "at least one [[data]] section", data))
        values["data"] = tuple(_build(DataSource, source, "data") for source in data)
        config = _build(cls, values, "the file")
        config._check()
        return config

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return dataclasses.asdict(self)

    def _check(self) -> None:
        positive = {
            "episodes.support": self.episodes.support,
            "episodes.query": self.episodes.query,
            "episodes.groups": self.episodes.groups,
            "optimiser.steps": self.optimiser.steps,
            "optimiser.lr": self.optimiser.lr,
            "optimiser.clip": self.optimiser.clip,
            "run.validate_every": self.run.validate_every,
            "run.log_every": self.run.log_every,
        }
        positive |= {"data.weight": min(source.weight for source in self.data)}
        for name, value in positive.items():
            if not 0 < value < math.inf:  # NaN fails any comparison
                raise InputError(message("TrainingConfig", name, "positive", value))
        not_negative = {
            "seed": self.seed,
            "augment.crop": self.augment.crop,
            "optimiser.warmup": self.optimiser.warmup,
            "optimiser.decay": self.optimiser.decay,
        }
        for name, value in not_negative.items():
            if value < 0:
                raise InputError(message("TrainingConfig", name, "at least 0", value))
        if self.episodes.classes < 2:
            raise InputError(message("TrainingConfig", "episodes.classes", "at least 2", self.episodes.classes))
        betas = self.optimiser.betas
        if len(betas) != 2 or not all(isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in betas):
            raise InputError(message("TrainingConfig", "optimiser.betas", "two numbers from 0 to below 1", betas))
        for source in self.data:
            if not source.paths or not all(isinstance(path, str) for path in source.paths):
                rule = "a list of at least one folder or .npz file"
                raise InputError(message("TrainingConfig", "data.paths", rule, list(source.paths)))
        if not isinstance(self.model, Mapping):
            raise InputError(message("TrainingConfig", "model", "a table", repr(self.model)))
        if elsewhere := sorted({"target", "preset", "seed"} & set(self.model)):
            raise InputError(message("TrainingConfig", "model", "without what the file's top level says", elsewhere))


def _build(kind: type[T], values: Any, section: str) -> T:
    where = "TrainingConfig"
    if not isinstance(values, Mapping):
        raise InputError(message(where, section, "a table", repr(values)))
    fields = {one.name: one for one in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(fields)):
        raise InputError(message(where, section, f"made of {sorted(fields)}", f"the unknown {unknown}"))
    missing = [
        name
        for name, one in fields.items()
        if name not in values and one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(message(where, section, f"given with {missing}", "a file without"))
    checked = {}
    for name, value in values.items():
        expected = str(fields[name].type)
        if isinstance(value, list):
            value = tuple(value)
        if expected == "float" and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        plain = {"int": int, "float": float, "bool": bool, "str": str}.get(expected)
        if plain is not None and (not isinstance(value, plain) or (plain is int and isinstance(value, bool))):
            raise InputError(message(where, f"{section}.{name}", f"of type {expected}", repr(value)))
        if expected.startswith("tuple") and not isinstance(value, tuple):
            raise InputError(message(where, f"{section}.{name}", "a list", repr(value)))
        checked[name] = value
    return kind(**checked)
