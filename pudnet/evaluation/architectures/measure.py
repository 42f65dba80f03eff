"""Accuracy of predicted parameters on architectures that no GHN has seen.

Networks of the splits of DeepNets-1M get their parameters from trained GHNs, from PyTorch's default initialisation, and
(a few of each split) from SGD; all are measured on the same test images, BatchNorm on the statistics of the batch.
"""

from __future__ import annotations

import hashlib
import json
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet import checkpoint
from pudnet.batchnorm import set_policy
from pudnet.data import Preprocess
from pudnet.data.source import open_images
from pudnet.errors import InputError, message
from pudnet.evaluation.harness import Record, spread
from pudnet.graphs import DeepNet, deepnets
from pudnet.graphs.deepnets1m import cell_range
from pudnet.models.ghn import GHN

FORMAT = 1
WHERE = "evaluation.architectures"
SPLITS = ("test", "wide", "deep", "dense", "bnfree")
GHNS = ("ghn2", "ghn1", "mlp")
UNTRAINED = "default"
EPOCHS = {"sgd-1": 1, "sgd-5": 5}
METHODS = (*GHNS, UNTRAINED, *EPOCHS)

BATCH = 64  # BatchNorm sees as many images as in training
SGD_IMAGES = 3000
SGD_BATCH = 32
SGD_RATES = (0.01, 0.03, 0.1)  # peaks to choose from, for each number of epochs, on networks of the split val
SGD = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
SGD_WARMUP = 0.2  # share of the steps in which the rate rises to its peak; then it falls to zero along a cosine
SGD_CLIP = 5.0

Job = tuple[str, int, tuple[str, ...]]  # split, number of the network, methods (those of SGD with "@rate")


@dataclass(frozen=True)
class Checkpoint:
    """A trained GHN's file; once it is gone, records made with it are still known by its ``sha256``."""

    path: Path
    sha256: str

    @classmethod
    def find(cls, name: str, earlier: str | None = None) -> Checkpoint:
        """What ``GHN.from_pretrained`` takes, or a path that is gone, of the sum ``earlier``."""
        if earlier is not None and not Path(name).exists() and name not in checkpoint.list_pretrained():
            return cls(Path(name), earlier)
        path = checkpoint.find(name, WHERE)
        return cls(path, hashlib.sha256(path.read_bytes()).hexdigest())


@dataclass(frozen=True)
class Settings:
    """One evaluation.

    Attributes:
        recipe: TOML file of a training of the GHNs: image set, normalisation, limits of the networks.
        images: the image set, in place of the recipe's.
        checkpoints: of each GHN, by method.
        splits, methods: of ``SPLITS`` and ``METHODS``.
        networks: of each split.
        trained: of these, how many are trained by SGD as well.
        tuning: networks of the split val that the rates of SGD are chosen on.
        test_images: taken at random from the test part.
        seed: of every draw, the networks' as well.
    """

    recipe: Path
    images: Path | None = None
    checkpoints: Mapping[str, Checkpoint] = field(default_factory=dict)
    splits: tuple[str, ...] = SPLITS
    methods: tuple[str, ...] = METHODS
    networks: int = 50
    trained: int = 8
    tuning: int = 4
    test_images: int = 1024
    seed: int = 0


class Bench:
    """What every process works with: recipe, images, GHNs, and the networks as they are asked for."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.recipe = _read(settings.recipe)
        model = self.recipe["model"]
        self.preprocess = Preprocess(model["input_shape"][2], tuple(model["mean"]), tuple(model["std"]))
        self.network = lru_cache(2)(self._network)
        self.ghn = lru_cache(None)(self._ghn)

    @property
    def path(self) -> Path:
        """The image set."""
        return self.settings.images or Path(self.recipe["images"]["path"])

    @cached_property
    def test(self) -> tuple[Tensor, Tensor]:
        """Test images ``[n, 3, S, S]`` and labels ``[n]``; no GHN was trained on this part of the set."""
        return self._part("test", 0, self.settings.test_images)

    @cached_property
    def train(self) -> tuple[Tensor, Tensor]:
        """What SGD trains on."""
        return self._part("train", 0, SGD_IMAGES)

    @cached_property
    def held_out(self) -> tuple[Tensor, Tensor]:
        """What the rates of SGD are chosen on: of the training part, but not those SGD trains on."""
        return self._part("train", SGD_IMAGES, self.settings.test_images)

    def _part(self, split: str, start: int, count: int) -> tuple[Tensor, Tensor]:
        images, labels = open_images(self.path, size=self.preprocess.size, split=split).tensors()
        if start + count > len(labels):
            raise InputError(message(WHERE, "images", f"at least {start + count} in the {split} part", len(labels)))
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.settings.seed))
        chosen = order[start : start + count]
        return self.preprocess(images[chosen]), labels[chosen]

    @cached_property
    def classes(self) -> int:
        return len(open_images(self.path, size=self.preprocess.size).classes)

    def limits(self, split: str) -> dict[str, Any]:
        """Arguments of ``deepnets``: the recipe's, or the least that the split allows."""
        wanted = self.recipe["networks"]
        return {
            "image_size": self.preprocess.size,
            "widths": tuple(wanted["widths"]),
            "most_parameters": wanted["most_parameters"],
            "most_cells": max(wanted["most_cells"], cell_range(split)[0]),
            "stems": tuple(wanted["stems"]),
        }

    def _network(self, split: str, number: int) -> DeepNet:
        seed = self.settings.seed
        found = next(deepnets(split, 1, seed, start=number, classes=self.classes, **self.limits(split)))
        assert found.graph.num_parameters  # traced before the network is changed
        set_policy(found.module, "batch")
        return found

    def _ghn(self, method: str) -> GHN:
        ghn = GHN.load(self.settings.checkpoints[method].path)
        model, config = self.recipe["model"], ghn.config
        found = {
            "input_shape": config.input_shape,
            "mean": config.mean,
            "std": config.std,
            "classes": config.num_classes,
        }
        wanted = {**{key: tuple(model[key]) for key in ("input_shape", "mean", "std")}, "classes": self.classes}
        if found != wanted:
            raise InputError(message(WHERE, method, f"of input shape, mean, std and classes {wanted}", found))
        return ghn


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise InputError(message(WHERE, "recipe", "a TOML file", f"{str(path)!r} ({error})")) from error


# ---- one network ------------------------------------------------------------------------------------------------


class Runner:
    """Computes the records of a job, but for those that are known."""

    def __init__(self, settings: Settings, known: Mapping[str, Record]) -> None:
        self.bench, self.known = Bench(settings), known

    def __call__(self, job: Job) -> list[Record]:
        split, number, methods = job
        return [self._record(split, number, method) for method in methods]

    def _record(self, split: str, number: int, method: str) -> Record:
        key = self._key(split, number, method)
        if key in self.known:
            return self.known[key]
        bench = self.bench
        network = bench.network(split, number)
        start = time.thread_time()
        parameters = self._parameters(network, number, method)
        seconds = time.thread_time() - start
        name, _, rate = method.partition("@")
        return {
            "key": key,
            "split": split,
            "number": number,
            "method": name,
            "rate": float(rate) if rate else None,
            "top1": top1(network, parameters, *(bench.held_out if split == "val" else bench.test)),
            "seconds": round(seconds, 4),
            "nodes": len(network.graph.nodes),
            "parameters": network.graph.num_parameters,
            "batch_norm": any(node.primitive == "bn" for node in network.graph.nodes),
        }

    def _key(self, split: str, number: int, method: str) -> str:
        """A record is computed again when network, images, method or checkpoint are others."""
        bench = self.bench
        settings = (bench.settings.seed, bench.settings.test_images, bench.path.name, bench.preprocess.to_dict())
        source: Any = bench.settings.checkpoints[method].sha256 if method in GHNS else None
        if method.partition("@")[0] in EPOCHS:
            source = (SGD_IMAGES, SGD_BATCH, SGD, SGD_WARMUP, SGD_CLIP)
        parts = (FORMAT, split, number, bench.settings.seed, bench.limits(split), settings, BATCH, method, source)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def _parameters(self, network: DeepNet, number: int, method: str) -> dict[str, Tensor]:
        if method in GHNS:
            return self.bench.ghn(method).generate(network.graph)
        built = network.build(number)
        if method != UNTRAINED:
            name, _, rate = method.partition("@")
            train(built, *self.bench.train, epochs=EPOCHS[name], rate=float(rate), seed=number)
        return dict(built.named_parameters())


@torch.no_grad()
def top1(network: DeepNet, parameters: Mapping[str, Tensor], images: Tensor, labels: Tensor) -> float:
    """Share of ``images [n, 3, S, S]`` labelled right, in batches of ``BATCH``; NaN counts as the first class."""
    logits = [
        torch.func.functional_call(network.module, dict(parameters), (part,))
        for part in images.tensor_split(-(-len(images) // BATCH))
    ]
    return float((torch.cat(logits).argmax(dim=1) == labels).double().mean())


def train(network: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, rate: float, seed: int) -> None:
    """SGD on normalised ``images [n, 3, S, S]`` and ``labels [n]``, in place; ``rate`` is the peak."""
    generator = torch.Generator().manual_seed(seed)
    steps = len(images) // SGD_BATCH  # a smaller last batch is left out, as usual with BatchNorm
    optimiser = torch.optim.SGD(network.parameters(), rate, **SGD)  # type: ignore[arg-type]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, rate, epochs * steps, pct_start=SGD_WARMUP, cycle_momentum=False
    )
    network.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for chosen in order[: steps * SGD_BATCH].split(SGD_BATCH):
            optimiser.zero_grad()
            F.cross_entropy(network(images[chosen]), labels[chosen]).backward()
            nn.utils.clip_grad_norm_(network.parameters(), SGD_CLIP)
            optimiser.step()
            schedule.step()


# ---- all of them ------------------------------------------------------------------------------------------------

Progress = Callable[[list[Record], int, int], None]


def run(
    settings: Settings, *, known: Iterable[Record] = (), workers: int = 0, progress: Progress | None = None
) -> list[Record]:
    """Compute all methods on all networks; the rates of SGD are chosen first, on networks of the split val.

    Args:
        known: records of earlier runs, taken over where nothing they depend on has changed.
        workers: processes of one thread each; 0: this process.
        progress: called after each job with its records, the number of jobs done, and of all jobs of this stage.

    Returns:
        The records in the order of the splits (val first), methods and networks.

    Raises:
        InputError: an unknown split or method, too few networks or images, a file that cannot be read.
    """
    for name, keys, table in (("splits", settings.splits, SPLITS), ("methods", settings.methods, METHODS)):
        if unknown := sorted(set(keys) - set(table)):
            raise InputError(message(WHERE, name, f"among {list(table)}", unknown))
    bench = Bench(settings)
    for method in settings.methods:
        if method in GHNS and settings.checkpoints[method].path.is_file():
            bench.ghn(method)  # read now, so that a bad file costs no work
    make = partial(Runner, settings, {record["key"]: record for record in known})
    sgd = [method for method in settings.methods if method in EPOCHS]
    tuning = [
        ("val", number, (f"{method}@{rate}",))
        for method in sgd
        for number in range(settings.tuning)
        for rate in SGD_RATES
    ]
    records = _all(make, tuning, workers, progress)
    chosen = rates(records)
    trained = [f"{method}@{chosen[method]}" for method in sgd]
    quick = tuple(method for method in settings.methods if method not in EPOCHS)
    # Network by network, so that an interrupted run has as many of each split.
    jobs: list[Job] = [
        (split, n, (method,)) for method in trained for n in range(settings.trained) for split in settings.splits
    ]
    jobs += [(split, n, quick) for split in settings.splits for n in range(settings.networks) if quick]
    return records + _all(make, jobs, workers, progress)


def _all(make: Callable[[], Runner], jobs: Sequence[Job], workers: int, progress: Progress | None) -> list[Record]:
    records: list[Record] = []
    for done, (_, found) in enumerate(spread(make, jobs, workers), 1):
        records += found
        if progress is not None:
            progress(found, done, len(jobs))
    places = {name: place for place, name in enumerate(("val", *SPLITS, *METHODS))}
    return sorted(records, key=lambda r: (places[r["split"]], places[r["method"]], r["rate"] or 0, r["number"]))


def rates(records: Iterable[Record]) -> dict[str, float]:
    """The rate of each number of epochs that is best on the split val, on average over its networks."""
    tops: dict[str, dict[float, list[float]]] = {}
    for record in records:
        if record["split"] == "val":
            tops.setdefault(record["method"], {}).setdefault(record["rate"], []).append(record["top1"])
    return {method: max(of, key=lambda rate: sum(of[rate]) / len(of[rate])) for method, of in tops.items()}
