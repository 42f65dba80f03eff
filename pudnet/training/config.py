"""The settings of a training run: one TOML file, checked when it is read."""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from pudnet.data import families
from pudnet.errors import InputError, message

T = TypeVar("T")


@dataclass(frozen=True)
class DataSource:
    """One kind of images to draw datasets from: files, those of disjoint classes joined, or a made-up family.

    Attributes:
        paths: folders or ``.npz`` files; empty for a family.
        held_out: class names that are never trained on; the unseen-class accuracy is measured on them.
        weight: how often a dataset is drawn from this source, relative to the others.
        family: one of ``pudnet.data.families.NAMES``; empty for files.
        classes, images, seed: of a family: how many classes, images of each, and the seed of both.
    """

    paths: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    weight: float = 1.0
    family: str = ""
    classes: int = 100
    images: int = 100
    seed: int = 0


@dataclass(frozen=True)
class Episodes:
    """One step sees ``groups`` datasets of ``classes`` random classes, ``support + query`` images each.

    The sketch is the support part; the loss is taken on the query part. ``directions`` is the chance that a dataset's
    own directions are put in, where the model has some: both with and without them the network is to be good.
    """

    classes: int = 20
    support: int = 5
    query: int = 10
    groups: int = 2
    directions: float = 0.5


@dataclass(frozen=True)
class Augment:
    """``crop`` pixels of random shift, ``flip`` left to right, and what is done to a dataset as a whole.

    Attributes:
        colour: chance of a colour map.
        transform: chance of the changes of ``pudnet.data.families.transform``; PudNet only.
    """

    crop: int = 4
    flip: bool = True
    colour: float = 0.3
    transform: float = 0.0


@dataclass(frozen=True)
class Loss:
    """Weights of the losses: PudNet's cosine classifier, auxiliary linear classifier and their agreement; ridge.

    Attributes:
        ridge: of the closed-form ridge head on all layers, fitted to the support images and asked for the query images.
        ridge_lambda: its regularisation, in units of the mean squared norm of the centred features.
    """

    cosine: float = 1.0
    auxiliary: float = 1.0
    agreement: float = 0.5
    ridge: float = 0.0
    ridge_lambda: float = 0.1


@dataclass(frozen=True)
class Optimiser:
    """Adam with a linear warm-up, a constant rate, and a linear decay to zero over the last ``decay`` steps.

    The rate is divided by 10 at each share of all steps in ``drops``. Until the decay or a drop nothing depends on
    ``steps``: a longer run begins exactly like a shorter one.
    """

    steps: int = 20_000
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = 200
    decay: int = 5_000
    clip: float = 5.0
    weight_decay: float = 0.0
    drops: tuple[float, ...] = ()


@dataclass(frozen=True)
class GHNOptimiser(Optimiser):
    """The same with the settings published for GHN-2."""

    warmup: int = 0
    decay: int = 0
    weight_decay: float = 1e-5
    drops: tuple[float, ...] = (2 / 3, 5 / 6)


@dataclass(frozen=True)
class Images:
    """The one dataset a GHN is trained for.

    Attributes:
        path: a folder or an ``.npz`` file; its training part is used.
        classes: names of the classes to use; all of them if empty.
        batch: images of one step; every architecture of the step sees the same ones.
        validation: images, drawn once, that are never trained on.
    """

    path: str
    classes: tuple[str, ...] = ()
    batch: int = 64
    validation: int = 1000


@dataclass(frozen=True)
class Networks:
    """The architectures (``pudnet.graphs.deepnets``): one step sees ``batch`` of the split ``train``.

    Attributes:
        batch: architectures of one step.
        choose: only the first so many of the split are used; those seen lately are kept, as drawing one takes time.
        widths, most_parameters, most_cells, stems: see ``deepnets``.
        validation: architectures of the split ``val`` that the accuracy is measured on; 0 for none.
    """

    batch: int = 8
    choose: int = 1_000_000
    widths: tuple[int, ...] = (16, 32, 64)
    most_parameters: int = 10_000_000
    most_cells: int = 18
    stems: tuple[int, ...] = (0, 1)
    validation: int = 8


@dataclass(frozen=True)
class Run:
    """What does not change the numbers: where things go and how often."""

    output: str = "runs/pudnet"
    checkpoint_minutes: float = 3.0
    validate_every: int = 1_000
    log_every: int = 50
    amp: bool = True


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every training run has. Each section with a default may be left out.

    Attributes:
        seed: of everything random.
        start: a checkpoint of the same hypernetwork to begin with in place of random parameters: a bundled name, or a
            path.
        model: options of the hypernetwork.
    """

    seed: int = 0
    start: str = ""
    model: Mapping[str, Any] = field(default_factory=dict)
    augment: Augment = Augment()
    optimiser: Optimiser = Optimiser()
    run: Run = Run()

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> Self:
        """Read and check a TOML file.

        Raises:
            InputError: no such file, not TOML, an unknown or missing key, a wrong type or value.
        """
        return cls.from_dict(_read_toml(path, cls.__name__))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """The same from plain dictionaries, as ``to_dict`` gives them."""
        values = dict(raw)
        for one in dataclasses.fields(cls):
            if dataclasses.is_dataclass(one.default):
                values[one.name] = _build(type(one.default), values.get(one.name, {}), one.name, cls.__name__)
        config = _build(cls, values, "the file", cls.__name__)
        config._check()
        return config

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return dataclasses.asdict(self)

    def _positive(self) -> dict[str, float]:
        return {
            "optimiser.steps": self.optimiser.steps,
            "optimiser.lr": self.optimiser.lr,
            "optimiser.clip": self.optimiser.clip,
            "run.validate_every": self.run.validate_every,
            "run.log_every": self.run.log_every,
        }

    def _not_negative(self) -> dict[str, float]:
        return {
            "seed": self.seed,
            "augment.crop": self.augment.crop,
            "augment.transform": self.augment.transform,
            "optimiser.warmup": self.optimiser.warmup,
            "optimiser.decay": self.optimiser.decay,
            "optimiser.weight_decay": self.optimiser.weight_decay,
        }

    def _check(self) -> None:
        where = type(self).__name__
        for name, value in self._positive().items():
            if not 0 < value < math.inf:  # NaN fails any comparison
                raise InputError(message(where, name, "positive", value))
        for name, value in self._not_negative().items():
            if not value >= 0:
                raise InputError(message(where, name, "at least 0", value))
        betas = self.optimiser.betas
        if len(betas) != 2 or not all(isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in betas):
            raise InputError(message(where, "optimiser.betas", "two numbers from 0 to below 1", betas))
        drops = self.optimiser.drops
        if not all(isinstance(share, (int, float)) and 0 < share < 1 for share in drops):
            raise InputError(message(where, "optimiser.drops", "shares of all steps between 0 and 1", drops))
        if not isinstance(self.model, Mapping):
            raise InputError(message(where, "model", "a table", repr(self.model)))
        if elsewhere := sorted({"target", "preset", "ghn", "seed"} & set(self.model)):
            raise InputError(message(where, "model", "without what the file's top level says", elsewhere))


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Settings):
    """A whole training run of PudNet: ``target`` and ``data`` are needed."""

    target: str
    data: tuple[DataSource, ...]
    preset: str = "default"
    episodes: Episodes = Episodes()
    loss: Loss = Loss()

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """See ``Settings``."""
        data = raw.get("data", [])
        if not isinstance(data, (list, tuple)) or not data:
            raise InputError(message(cls.__name__, "data", "at least one [[data]] section", data))
        sources = tuple(_build(DataSource, source, "data", cls.__name__) for source in data)
        return super().from_dict({**raw, "data": sources})

    def _positive(self) -> dict[str, float]:
        return {
            **super()._positive(),
            "episodes.support": self.episodes.support,
            "episodes.query": self.episodes.query,
            "episodes.groups": self.episodes.groups,
            "loss.ridge_lambda": self.loss.ridge_lambda,
            "data.weight": min(source.weight for source in self.data),
        }

    def _check(self) -> None:
        super()._check()
        where = type(self).__name__
        if self.episodes.classes < 2:
            raise InputError(message(where, "episodes.classes", "at least 2", self.episodes.classes))
        for source in self.data:
            _check_source(source, where)


def _check_source(source: DataSource, where: str) -> None:
    if not source.family and not (source.paths and all(isinstance(path, str) for path in source.paths)):
        rule = "a list of at least one folder or .npz file, where there is no family"
        raise InputError(message(where, "data.paths", rule, list(source.paths)))
    if not source.family:
        return
    if source.paths:
        raise InputError(message(where, "data.paths", "left out beside a family", list(source.paths)))
    if source.family not in families.NAMES:
        raise InputError(message(where, "data.family", f"one of {list(families.NAMES)}", repr(source.family)))
    for name, value, least in (("classes", source.classes, 2), ("images", source.images, 1), ("seed", source.seed, 0)):
        if value < least:
            raise InputError(message(where, f"data.{name}", f"at least {least}", value))


@dataclass(frozen=True, kw_only=True)
class GHNTrainingConfig(Settings):
    """A whole training run of a GHN: ``ghn`` (its preset) and ``images`` are needed."""

    ghn: str
    images: Images
    networks: Networks = Networks()
    optimiser: Optimiser = GHNOptimiser()

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """See ``Settings``."""
        return super().from_dict({**raw, "images": _build(Images, raw.get("images", {}), "images", cls.__name__)})

    def _positive(self) -> dict[str, float]:
        return {
            **super()._positive(),
            "images.validation": self.images.validation,
            "networks.batch": self.networks.batch,
            "networks.choose": self.networks.choose,
            "networks.most_parameters": self.networks.most_parameters,
        }

    def _not_negative(self) -> dict[str, float]:
        return {**super()._not_negative(), "networks.validation": self.networks.validation}

    def _check(self) -> None:
        super()._check()
        where = type(self).__name__
        if self.augment.transform:
            raise InputError(message(where, "augment.transform", "0: there is one dataset", self.augment.transform))
        if "num_classes" in self.model:
            raise InputError(message(where, "model", "without num_classes", "one", "The images have the classes."))
        if self.images.batch < 2:  # BatchNorm has no variance of a single image
            raise InputError(message(where, "images.batch", "at least 2", self.images.batch))
        widths = self.networks.widths
        if not widths or not all(isinstance(width, int) and width > 0 and width % 4 == 0 for width in widths):
            raise InputError(message(where, "networks.widths", "multiples of 4", list(widths)))


def read_config(path: str | os.PathLike[str]) -> TrainingConfig | GHNTrainingConfig:
    """Read a TOML file of either kind: with a key ``ghn`` it trains a GHN, else PudNet.

    Raises:
        InputError: see ``Settings.from_toml``.
    """
    raw = _read_toml(path, "read_config")
    return GHNTrainingConfig.from_dict(raw) if "ghn" in raw else TrainingConfig.from_dict(raw)


def _read_toml(path: str | os.PathLike[str], where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise InputError(message(where, "path", "a readable file", f"{str(path)!r} ({error.strerror})")) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(message(where, "path", "a TOML file", f"{str(path)!r} ({error})")) from error


def _build(kind: type[T], values: Any, section: str, where: str) -> T:
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
