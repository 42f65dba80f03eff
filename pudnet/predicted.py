"""``PredictedModel``, the classifier that a prediction gives; ``load`` reads a saved one, ``finish`` makes one.

``finish`` is the second half of a prediction: a network that has its weights, and images -> a classifier.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pudnet import checkpoint, export, hub, provenance
from pudnet.batchnorm import BATCH_SIZE, POLICIES, set_policy
from pudnet.checkpoint import HubOptions
from pudnet.data import ImageSource, Preprocess, open_images
from pudnet.errors import CheckpointError, DtypeError, InputError, ShapeError, message, one_line
from pudnet.features import VIEWS, Reading, check_views, feature_maps
from pudnet.heads import HEADS, Head, HeadFitter, choose_head, fit_head, head_from_config
from pudnet.serving import Halves, Token, is_out_of_memory
from pudnet.sketch import Sketch
from pudnet.stages import StageClock
from pudnet.targets import build_target

BATCH = 256
# Images that a CPU reads at once: at least so many, and more where they are small, for fewer calls. Activations should
# stay near the cache: with 32 x 32 pixels batches of 96 take 0.9 of the time of 32 (convnet3), those of 256 twice.
CPU_BATCH, CPU_PIXELS = 32, 96 * 32 * 32
VIEWS_TRIAL = 300  # images on which views are tried
VIEW_GAIN = 0.02  # share of the negative log-likelihood that every further view must save: each makes answers slower
REUSE_BYTES = 2**28  # of the sketch's feature maps at most, where calibration keeps them for the head
VIEWED = ("kernel", "ridge")  # heads that views are tried for
HEAD_PREFIX, FITTER_PREFIX = f"{checkpoint.OWN_PREFIX}head.", f"{checkpoint.OWN_PREFIX}fitter."


class Classification(NamedTuple):
    """Answers for n images: the class name of each, and the probability of every class ``[n, K]``."""

    labels: list[str]
    probabilities: Tensor


class PredictedModel(hub.Shared, nn.Module):
    """A finished classifier: a network with predicted weights and a head. A plain module, in eval mode.

    Attributes:
        preprocess: uint8 images of any size -> the network's normalised input.
        classes: class names, in the order of the logits.
        report: how it was made: seconds per stage, accuracy to expect, counts, warnings, provenance. JSON-able.
        target_name: name of the target network; None where it was a module of the caller's.
        batchnorm: the BatchNorm policy.
        fitter: what the head remembers of its images, so that ``add`` can give it more; None without ``growable``.
        views: in how many copies every image is read, one of ``pudnet.features.VIEWS``.
    """

    hub_file = "model.safetensors"

    def __init__(
        self,
        network: nn.Module,
        head: Head,
        preprocess: Preprocess,
        classes: Sequence[str],
        *,
        batchnorm: str = "calibrated",
        target_name: str | None = None,
        report: Mapping[str, Any] | None = None,
        fitter: HeadFitter | None = None,
        views: str = "single",
    ) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.head = head
        self.preprocess = preprocess
        self.classes = tuple(classes)
        self.batchnorm = batchnorm
        self.target_name = target_name
        self.report: dict[str, Any] = dict(report or {})
        self.fitter = fitter
        self.views = views
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images ``[n, 3, size, size]`` -> logits ``[n, K]``; their softmax are calibrated probabilities."""
        if x.dim() != 4 or x.shape[1] != 3:
            hint = "Turn images into it with model.preprocess(images)."
            raise ShapeError(message("PredictedModel", "x", "[n, 3, H, W]", list(x.shape), hint))
        if not x.is_floating_point():
            hint = "Turn images into it with model.preprocess(images)."
            raise DtypeError(message("PredictedModel", "x", "floating point", x.dtype, hint))
        return self.head.logits(self.head.reading(self.network, x, self.views))

    @torch.no_grad()
    def classify(self, images: Any) -> Classification:
        """Classify images.

        Args:
            images: uint8 ``[n, H, W, C]`` or ``[n, H, W]`` of any size, or a list of single images.

        Returns:
            Class names, n of them, and probabilities ``[n, K]`` on the CPU.
        """
        probabilities = self._probabilities(self.preprocess.resize(images))
        return Classification([self.classes[label] for label in probabilities.argmax(1).tolist()], probabilities)

    def _probabilities(self, resized: Tensor) -> Tensor:
        """uint8 ``[n, size, size, 3]`` -> probabilities ``[n, K]`` on the CPU."""

        def probabilities(piece: Tensor) -> Tensor:
            return torch.softmax(self(self.preprocess.normalise(piece)), dim=1).cpu()

        halves = Halves(self.batchnorm != "batch")
        pieces = _pieces(resized, self.batchnorm, self._device)
        found = [part for piece in pieces for part, _ in halves.run(probabilities, piece)]
        return torch.cat(found) if found else torch.empty(0, len(self.classes))

    @property
    def _device(self) -> torch.device:
        return _device_of(self.network)

    @torch.no_grad()
    def evaluate(self, source: Any, labels: Any = None, *, split: str = "test", seed: int = 0) -> dict[str, Any]:
        """Measure the accuracy on labelled images, given in any form ``Predictor.predict`` takes.

        Args:
            split: which part of a source that has several.
            seed: of the order of the images, which matters to the BatchNorm policy ``"batch"`` alone.

        Returns:
            ``top1`` (0..1), ``top5`` where there are more than five classes, ``n``, ``per_class``
            ``{name: {"n", "top1"}}``, ``nll`` (mean negative log-probability of the right class), ``skipped``
            ``[[file, reason]]``, ``warnings``, ``seconds``.

        Raises:
            InputError: there are no images, or classes the model does not know.
        """
        start = time.perf_counter()
        opened = open_images(source, labels, size=self.preprocess.size, split=split, classes=self.classes)
        k = len(self.classes)
        n, right, right5 = torch.zeros(k).long(), torch.zeros(k).long(), 0
        nll = 0.0
        for images, truth in ordered(opened, self.batchnorm, seed):
            probabilities = self._probabilities(images)  # [b, K]
            hit = probabilities.argmax(1) == truth
            n += torch.bincount(truth, minlength=k)
            right += torch.bincount(truth[hit], minlength=k)
            right5 += int((probabilities.topk(min(5, k)).indices == truth[:, None]).any(1).sum())
            own = probabilities.gather(1, truth[:, None]).double()
            nll -= float(own.clamp_min(torch.finfo(torch.float32).tiny).log().sum())
        total = int(n.sum())
        counted = zip(self.classes, n.tolist(), right.tolist(), strict=True)
        return {
            "top1": int(right.sum()) / total,
            **({"top5": right5 / total} if k > 5 else {}),
            "n": total,
            "nll": nll / total,
            "per_class": {name: {"n": of, "top1": hits / of} for name, of, hits in counted if of},
            "skipped": [list(entry) for entry in opened.skipped],
            "warnings": list(opened.warnings),
            "seconds": time.perf_counter() - start,
        }

    @torch.no_grad()
    def add(
        self,
        images: Any,
        labels: Any = None,
        *,
        new_classes: Sequence[str] = (),
        split: str = "train",
        cancel: Token | None = None,
    ) -> PredictedModel:
        """A model that also knows these images, and more classes: the head is fitted anew, the network stays.

        The earlier images are not read again. The head is the one that all images at once would have given on this
        network, up to rounding (see ``HeadFitter``). This model goes on as it is; both share the network.

        Args:
            images, labels, split: in any form ``Predictor.predict`` takes; one class is enough.
            new_classes: names of classes that come behind those of this model.
            cancel: as for ``Predictor.predict``.

        Raises:
            Cancelled: ``cancel`` was set.
            InputError: the model was predicted without ``growable`` or with BatchNorm ``"batch"``; bad images; a class
                that is neither the model's nor new, or a new one that is not new or has no images.
        """
        where = "PredictedModel.add"
        if self.fitter is None:
            hint = "Predict it with growable=True."
            raise InputError(message(where, "the model", "one that keeps what its head needs", "another", hint))
        if self.batchnorm == "batch":
            rule = "'calibrated' or 'shared'"
            raise InputError(message(where, "batchnorm", rule, "'batch'", "Answers depend on the other images there."))
        classes = (*self.classes, *new_classes)
        if len(set(classes)) < len(classes):
            raise InputError(message(where, "new_classes", "new and different from each other", list(new_classes)))
        clock = StageClock(self._device, cancel)
        images = clock.watched(images, labels)
        source = open_images(images, labels, size=self.preprocess.size, split=split, classes=classes)
        fitter = copy.deepcopy(self.fitter).to(self._device)
        fitter.add_classes(len(new_classes))
        halves = Halves()
        with clock.stage("head"):
            fitter.add(
                _read(
                    self.network, self.preprocess, clock.iterate("reading", source), self.batchnorm, clock, halves,
                    self.head.reading, self.views,
                )
            )  # fmt: skip
            head = fitter.fit()
        grown = PredictedModel(
            self.network, head, self.preprocess, classes,
            batchnorm=self.batchnorm, target_name=self.target_name, report=self.report, fitter=fitter,
            views=self.views,
        )  # fmt: skip
        grown._report_added(source, new_classes, split, [*_memory_warnings(None, halves.limit)], clock)
        return grown

    def _report_added(
        self, source: ImageSource, new_classes: Sequence[str], split: str, warnings: list[str], clock: StageClock
    ) -> None:
        """Bring the report up to date with images that were added."""
        report, counts = self.report, dict(zip(source.classes, source.counts or (), strict=True))
        old = report["class_counts"]
        merged = {name: old.get(name, 0) + counts[name] for name in self.classes}
        entry = {"n": sum(counts.values()), "new_classes": list(new_classes), "split": split}
        found = report.get("provenance", {})
        self.report = {
            **report,
            "seconds": {**report["seconds"], "added": report["seconds"].get("added", 0.0) + clock.total()},
            "expected_accuracy": expected_accuracy(self.head, {**report, "class_counts": merged}),
            "n": report["n"] + entry["n"],
            "class_counts": merged,
            "skipped": report["skipped"] + [list(one) for one in source.skipped],
            "warnings": report["warnings"] + list(source.warnings) + warnings,
            "head": {"name": self.head.name, **self.head.info},
            "provenance": {
                **found,
                "added": [*found.get("added", ()), entry],
                "model_sha256": provenance.digest_model(self.network, self.head),
            },
        }

    def export(self, path: str | os.PathLike[str]) -> None:
        """Write the model for use without pudnet; the suffix of ``path`` says how.

        - ``.onnx`` and ``.pt2``: the whole model, with a free number of images: ``images`` uint8 RGB
          ``[n, size, size, 3]`` -> ``logits`` and ``probabilities`` ``[n, K]``. Normalisation is inside; resizing is
          not (``preprocess.resize``, or docs/production.md). ONNX files are checked with onnxruntime.
        - ``.safetensors``: what ``save`` writes.

        Class names, sizes and the report travel with each: ``pudnet.export.describe`` says where.

        Raises:
            InputError: another suffix, a path that cannot be written, or packages that are not installed.
            PudnetError: onnxruntime gives other outputs than this model.
        """
        if os.fspath(path).endswith(".safetensors"):
            return self.save(path)
        # Neither what only `add` needs nor what is on a GPU.
        plain = copy.deepcopy(self, {id(self.fitter): None}).cpu().requires_grad_(False)
        return export.export(plain, self.preprocess, self._config(), path)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        target: nn.Module | None = None,
        device: str | torch.device | None = None,
        **options: Unpack[HubOptions],
    ) -> PredictedModel:
        """Read a model: a file, a folder with ``model.safetensors``, or a repository of the Hugging Face Hub.

        Args:
            target: see ``pudnet.load``.
            device: where it goes; None for the CPU.
            options: of huggingface_hub, for a repository: revision, cache_dir, local_files_only, force_download, token.

        Raises:
            InputError: there is no such file or repository.
            CheckpointError: the file is damaged, of another version or kind, or does not fit ``target``.
        """
        model = load(checkpoint.find(name, "PredictedModel.from_pretrained", cls.hub_file, **options), target)
        return model if device is None else model.to(device)

    def card_parts(self, name: str) -> dict[str, Any]:
        """See ``pudnet.hub.Shared``."""
        return hub.model_card(name, self._config())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one file that ``pudnet.load`` reads back to equal outputs.

        The network's tensors have their own names, the rest of them start with ``pudnet.``: without those, any module
        of the same architecture loads the file's as its state dict.

        Raises:
            InputError: the path cannot be written.
        """
        config = self._config()
        # Clones: a weight that two layers share would otherwise be refused.
        tensors = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        tensors |= {f"{HEAD_PREFIX}{name}": tensor for name, tensor in self.head.state.items()}
        if self.fitter is not None:
            config["fitter"], remembered = self.fitter.state()
            tensors |= {f"{FITTER_PREFIX}{name}": tensor for name, tensor in remembered.items()}
        checkpoint.save(path, "model", config, tensors)

    def _config(self) -> dict[str, Any]:
        return {
            "target": self.target_name,
            "preprocess": self.preprocess.to_dict(),
            "classes": list(self.classes),
            "batchnorm": self.batchnorm,
            "views": self.views,
            "head": self.head.config(),
            "report": self.report,
        }


def load(path: str | os.PathLike[str], target: nn.Module | None = None) -> PredictedModel:
    """Read a model written by ``PredictedModel.save``; its outputs equal those of the saved one.

    Args:
        target: a module of the target's architecture, where it was a module and not a name; copied.

    Raises:
        InputError: there is no such file.
        CheckpointError: the file is damaged, of another version or kind, or does not fit ``target``.
    """
    where = "pudnet.load"
    config, tensors = checkpoint.load(path, "model")
    name = config.get("target")
    if name is None and target is None:
        raise CheckpointError(message(where, "target", "the module the model was made for", None))
    try:
        if target is not None:
            network = copy.deepcopy(target)
        else:
            with torch.random.fork_rng(devices=[]):
                network, _ = build_target(str(name))
        weights = {name: tensor for name, tensor in tensors.items() if not name.startswith(checkpoint.OWN_PREFIX)}
        _match_batch_norms(network, weights)
        checkpoint.fill(network, weights)
        head, classes = head_from_config(config["head"], _part(tensors, HEAD_PREFIX)), config["classes"]
        if config["batchnorm"] not in POLICIES:
            raise CheckpointError(message(where, "batchnorm", f"one of {POLICIES}", repr(config["batchnorm"])))
        strings = isinstance(classes, list) and all(isinstance(label, str) for label in classes)
        if not strings or len(classes) != head.num_classes:
            raise CheckpointError(message(where, "classes", f"a list of {head.num_classes} names", repr(classes)))
        fitter = None
        if "fitter" in config:
            remembered = _part(tensors, FITTER_PREFIX)
            fitter = HeadFitter.from_state(head.name, head.num_classes, config["fitter"], remembered)
        return PredictedModel(
            network,
            head,
            Preprocess.from_dict(config["preprocess"]),
            classes,
            batchnorm=config["batchnorm"],
            target_name=name,
            report=config["report"],
            fitter=fitter,
            views=_views_from(config),
        )
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RuntimeError) as error:
        got = f"{str(path)!r} ({one_line(error)})"
        hint = "It was made for another target network or another version."
        raise CheckpointError(message(where, "path", "a model that fits", got, hint)) from error


def _views_from(config: Mapping[str, Any]) -> str:
    # Files of before have none, or whether it was mirrored.
    views = config.get("views", "mirrored" if config.get("mirrored") is True else "single")
    if views not in VIEWS:
        raise CheckpointError(message("pudnet.load", "views", f"one of {', '.join(VIEWS)}", repr(views)))
    return str(views)


def expected_accuracy(head: Head, report: Mapping[str, Any]) -> float:
    """The head's leave-one-out accuracy, less what labels in the weights flatter it by.

    Directions come from some of the head's images, and their labels. On those its leave-one-out error is too small, by
    a share that the trial of the directions measured (``pudnet.directions.Trial``) and that falls as their number
    grows; the error on the head's other images is fair. Hence the same correction however many are among them. The
    larger the share, the less leave-one-out says, and the more counts the error of the trial itself.

    No less than what guessing gives, each class as often as there are images of it: where labels mean nothing, an image
    that is left out makes its own class the rarer one, and leave-one-out is wrong far more often than new images are.
    """
    error, trial = 1 - head.expected_accuracy, report.get("directions")
    if trial and trial["helps"]:
        share = trial["optimism"] * trial["images"] / head.info["images"]
        mixed = error + min(1.0, share) * (trial["error"] - error)
        error = min(1.0, max(error * (1 + share), mixed))
    counts = report["class_counts"].values()
    return max(1 - error, sum(count * count for count in counts) / sum(counts) ** 2)


def _device_of(module: nn.Module) -> torch.device:
    return next(tensor.device for tensor in module.parameters())


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _match_batch_norms(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give every BatchNorm running statistics exactly where ``weights`` has some: the policy decided that."""
    for prefix, norm in network.named_modules():
        if not isinstance(norm, _BatchNorm):
            continue
        norm.track_running_stats = f"{prefix}.running_mean" in weights or f"{prefix}.running_var" in weights
        if norm.track_running_stats:
            norm.running_mean, norm.running_var = torch.zeros(norm.num_features), torch.ones(norm.num_features)
            norm.num_batches_tracked = torch.tensor(0)
        else:
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None


@torch.no_grad()
def finish(
    network: nn.Module,
    source: ImageSource,
    sketch: Sketch,
    preprocess: Preprocess,
    *,
    head: str = "auto",
    batchnorm: str = "calibrated",
    seed: int = 0,
    growable: bool = False,
    views: str | None = None,
    reading: Reading | None = None,
    clock: StageClock | None = None,
    reduce: Callable[[HeadFitter], HeadFitter] | None = None,
) -> PredictedModel:
    """Turn a network that has its convolution weights into a classifier of ``source``: BatchNorm statistics and head.

    Args:
        network: with weights from anywhere; it becomes part of the model and is changed.
        source: the training images.
        sketch: a random sample of them; BatchNorm is calibrated on at most 500 of its images.
        head: one of ``pudnet.heads.HEADS``; ``"auto"`` for ``"kernel"`` where the images are few (``choose_head``) and
            the model is not growable, else ``"ridge"``.
        growable: the model keeps what ``PredictedModel.add`` needs.
        views: in how many copies to read every image, one of ``pudnet.features.VIEWS``; None: in several where the
            sketch says that it helps, and the head is one of ``VIEWED``.
        reading: what the head reads of feature maps; None for what heads of its kind do.
        clock: to go on counting on; None for a new one.
        reduce: what the head remembers of ``source`` -> what it remembers of all shards.
    """
    check_views("finish", views)
    device = _device_of(network)
    clock = clock or StageClock(device)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    halves = Halves(batchnorm != "batch")
    # As many as one batch has: a random part, as the images of a small sketch may be in the order of their classes.
    part = torch.randperm(len(sketch.images), generator=torch.Generator().manual_seed(seed))[:BATCH_SIZE].sort().values
    sketched = preprocess.resize(sketch.images[part])
    with clock.stage("calibration"):
        images = _prepared(preprocess, sketched, device)
        if head == "auto" and growable:
            head = "ridge"
        elif head == "auto":
            width = (reading or HEADS["kernel"].reading)(network.eval(), images[:2]).shape[1]
            head = choose_head(int(sketch.seen.sum()), width)
        reading = reading or HEADS[head].reading
        calibrated_on, features = _set_policy(network, batchnorm, images, seed, reading)
        rows = torch.arange(len(part))  # of `part`, whose features are known
        if views is None:
            views = "single"
            if head in VIEWED and batchnorm != "batch" and sketch.labels is not None:
                tried = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))[:VIEWS_TRIAL]
                views, found = _best_views(network, images[tried], sketch.labels[part[tried]], head, reading)
                if views != "single":
                    rows, features = tried, found
        elif views != "single":
            features = None
        known = None
        if features is not None and len(sketch.streams) == 1:
            known = _Known(sketch.indices[part[rows]], sketched[rows], features)
    fitter = HeadFitter(head, len(source.classes), seed=seed, reading=reading)
    with clock.stage("head"):
        batches = clock.iterate("reading", ordered(source, batchnorm, seed))
        fitter.add(_read(network, preprocess, batches, batchnorm, clock, halves, reading, views, known))
        fitter = reduce(fitter) if reduce else fitter
        fitted = fitter.fit()
    kept = fitter if growable else None
    model = PredictedModel(network, fitted, preprocess, source.classes, batchnorm=batchnorm, fitter=kept, views=views)
    total = clock.total()
    model.report = {
        "seconds": {**clock.seconds, "total": total},
        "expected_accuracy": fitted.expected_accuracy,
        "n": sum(source.counts or ()),
        "class_counts": dict(zip(source.classes, source.counts or (), strict=True)),
        "skipped": [list(entry) for entry in source.skipped],
        "warnings": [*source.warnings, *_memory_warnings(calibrated_on, halves.limit)],
        "head": {"name": head, **fitted.info},
        "batchnorm": batchnorm,
        "views": views,
    }
    return model


def _best_views(
    network: nn.Module, images: Tensor, labels: Tensor, head: str, reading: Reading
) -> tuple[str, Tensor | None]:
    """With which views the head's leave-one-out likelihood of the images is best; more only where it is clear.

    Returns:
        The views, and what is read of the images with them, where they are several.
    """
    classes, answers = labels.unique(return_inverse=True)
    if len(classes) < 2:
        return "single", None

    def trial(views: str) -> tuple[float, float]:
        """Negative log-likelihood, with what further views have to save on top of it, and squared error."""
        info = fit_head(head, [(features[views], answers)], len(classes)).info
        return info["loo_nll"] / (1 - VIEW_GAIN * (len(VIEWS[views]) - 1)), info["loo_squared_error"]

    try:
        read = [reading.in_all_views(network, part) for part in images.split(_cpu_batch(images.shape[2:]))]
        features = {views: torch.cat([some[views] for some in read]) for views in VIEWS}
        trials = {views: trial(views) for views in VIEWS}
    except Exception as problem:
        if not is_out_of_memory(problem):
            raise
        return "single", None
    # Where nearly all is right already the likelihood hangs on a few images; the squared error on all of them.
    better = [views for views in VIEWS if trials[views][1] <= trials["single"][1]]
    best = min(better, key=lambda views: trials[views][0])
    return best, features[best] if best != "single" else None


def _prepared(preprocess: Preprocess, images: Tensor, device: torch.device) -> Tensor:
    """Resized uint8 images -> what the network reads."""
    return preprocess.normalise(images.to(device)).contiguous(memory_format=torch.channels_last)


def _read(
    network: nn.Module,
    preprocess: Preprocess,
    batches: Iterable[tuple[Tensor, Tensor]],
    batchnorm: str,
    clock: StageClock,
    halves: Halves,
    reading: Reading,
    views: str,
    known: _Known | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and labels of every image."""
    device = _device_of(network)

    def read(piece: Tensor) -> Tensor:
        clock.check()
        return reading(network, _prepared(preprocess, piece, device), views)

    start = 0
    for images, labels in batches:
        if known is not None:
            new, at, features = known.find(start, images)
            yield features, labels[at]
            start += len(images)
            images, labels = images[new], labels[new]
        done = 0
        for piece in _pieces(images, batchnorm, device):
            for features, count in halves.run(read, piece):
                yield features, labels[done : done + count]
                done += count


class _Known(NamedTuple):
    """Images whose features are known: positions in the source ``[S]``, pixels ``[S, ...]``, features ``[S, F]``."""

    positions: Tensor
    images: Tensor
    features: Tensor

    def find(self, start: int, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the ``images [b, ...]`` from ``start`` on: which are new ``[b]``, where the others are, their features."""
        rows = torch.nonzero((self.positions >= start) & (self.positions < start + len(images)))[:, 0]
        at = self.positions[rows] - start
        same = (images[at] == self.images[rows]).flatten(1).all(1)  # a sketch may be of something else
        new = torch.ones(len(images), dtype=torch.bool)
        new[at[same]] = False
        return new, at[same], self.features[rows[same].to(self.features.device)]


def _set_policy(
    network: nn.Module, batchnorm: str, images: Tensor, seed: int, reading: Reading
) -> tuple[int | None, Tensor | None]:
    """``set_policy``; where memory runs out, in smaller batches, whose size is returned.

    Calibration on one batch has already computed what ``reading`` makes of the images: returned too, unless large.
    """
    size = most = min(BATCH_SIZE, len(images))
    pooled: list[Tensor] = []

    def run(batch: Tensor) -> None:
        pooled[:] = [reading(network, batch)]

    network.eval()
    reuse = batchnorm == "calibrated" and size == len(images) and _maps_fit(network, images)
    while True:
        try:
            set_policy(network, batchnorm, images, batch_size=size, seed=seed, run=run if reuse else None)
        except Exception as error:
            if not is_out_of_memory(error) or (size <= CPU_BATCH and not reuse):
                raise
        else:
            return None if size == most else size, pooled[0] if reuse and pooled else None  # without BatchNorm none ran
        if not reuse:  # less memory is needed without
            size //= 2
        reuse = False


def _maps_fit(network: nn.Module, images: Tensor) -> bool:
    """Whether the feature maps of all images take at most REUSE_BYTES."""
    few = images[:2]
    try:
        taken = sum(found.numel() * found.element_size() for found in feature_maps(network, few))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    return taken / len(few) * len(images) <= REUSE_BYTES


def _memory_warnings(calibrated_on: int | None, read: int | None) -> list[str]:
    """What a report says where memory ran out."""
    found = []
    if calibrated_on is not None:
        found.append(f"memory ran out: BatchNorm is calibrated on batches of {calibrated_on} images")
    if read is not None:
        found.append(f"memory ran out: {read} images were read at a time")
    return found


def ordered(source: ImageSource, batchnorm: str, seed: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Batches of ``source``, in a random order where batches share statistics: one of a single class would leak it."""
    if batchnorm != "batch":
        return source
    images, labels = source.tensors()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = order.tensor_split(-(-len(order) // BATCH))  # nearly equal: a small last batch has poor statistics
    return ((images[part], labels[part]) for part in parts)


def _pieces(images: Tensor, batchnorm: str, device: torch.device) -> Iterator[Tensor]:
    """Cut a batch into what the network reads at once; not where the images of a batch share statistics."""
    size = _cpu_batch(images.shape[1:3]) if device.type == "cpu" and batchnorm != "batch" else BATCH
    return (part.to(device) for part in torch.split(images, size) if len(part))


def _cpu_batch(sides: Sequence[int]) -> int:
    """How many images of such height and width a CPU reads at once."""
    return min(BATCH, max(CPU_BATCH, CPU_PIXELS // math.prod(sides)))
