"""What a user holds: ``Predictor`` turns a dataset into a ``PredictedModel``; ``load`` reads a saved one.

``Predictor.predict`` is the whole path from images to a classifier; each stage is timed under its name.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pudnet import backends, checkpoint, export, hub, provenance
from pudnet.batchnorm import BATCH_SIZE, POLICIES, set_policy
from pudnet.checkpoint import HubOptions
from pudnet.data import ImageSource, Preprocess, open_images
from pudnet.data.source import channels_last
from pudnet.errors import CheckpointError, DtypeError, InputError, ShapeError, message, one_line
from pudnet.features import feature_maps
from pudnet.heads import Head, HeadFitter, check_head, head_from_config
from pudnet.models.pudnet import PudNet
from pudnet.optimised import OptimisedPudNet
from pudnet.serving import Halves, Token, Watched, all_or_errors, attempt, check, in_threads, is_out_of_memory
from pudnet.sketch import Sketch, SketchBuilder
from pudnet.targets import build_target

T = TypeVar("T")

STAGES = ("reading", "sketch", "weights", "calibration", "head")
SKETCH_SIZE = 500
BATCH = 256
HEAD_PREFIX, FITTER_PREFIX = f"{checkpoint.OWN_PREFIX}head.", f"{checkpoint.OWN_PREFIX}fitter."
CPU_BATCH = 32  # activations that stay in the cache: half the time of batches of 256 (convnet3)


class StageClock:
    """Seconds per stage. Stages may nest: time counts for the innermost one only.

    Args:
        device: waits for this one, where it is a GPU, before it looks at the time.
        cancel: looked at between stages and items; once it is set, Cancelled is raised.
    """

    def __init__(self, device: torch.device | None = None, cancel: Token | None = None) -> None:
        self._cancel = cancel
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._cuda = device is not None and device.type == "cuda"
        self._open: list[str] = []
        self._started = self._since = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time in this block for stage ``name``."""
        self.check()
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def iterate(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """The same items; the time it takes to get each counts for stage ``name``."""
        iterator = iter(items)
        while True:
            with self.stage(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def check(self) -> None:
        """Raise Cancelled where that was asked for."""
        check(self._cancel, "Predictor")

    def total(self) -> float:
        """Seconds since the clock was made."""
        self._switch()
        return self._since - self._started

    def _switch(self) -> None:
        if self._cuda:  # kernels run on after the call that started them
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


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
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images ``[n, 3, size, size]`` -> logits ``[n, K]``; their softmax are calibrated probabilities."""
        if x.dim() != 4 or x.shape[1] != 3:
            hint = "Turn images into it with model.preprocess(images)."
            raise ShapeError(message("PredictedModel", "x", "[n, 3, H, W]", list(x.shape), hint))
        if not x.is_floating_point():
            hint = "Turn images into it with model.preprocess(images)."
            raise DtypeError(message("PredictedModel", "x", "floating point", x.dtype, hint))
        logits: Tensor = self.head(feature_maps(self.network, x.contiguous(memory_format=torch.channels_last)))
        return logits

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
        self, images: Any, labels: Any = None, *, new_classes: Sequence[str] = (), split: str = "train"
    ) -> PredictedModel:
        """A model that also knows these images, and more classes: the head is fitted anew, the network stays.

        The earlier images are not read again. The head is the one that all images at once would have given on this
        network, up to rounding (see ``HeadFitter``). This model goes on as it is; both share the network.

        Args:
            images, labels, split: in any form ``Predictor.predict`` takes; one class is enough.
            new_classes: names of classes that come behind those of this model.

        Raises:
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
        clock = StageClock(self._device)
        source = open_images(images, labels, size=self.preprocess.size, split=split, classes=classes)
        fitter = copy.deepcopy(self.fitter).to(self._device)
        fitter.add_classes(len(new_classes))
        halves = Halves()
        with clock.stage("head"):
            fitter.add(
                _mapped(self.network, self.preprocess, clock.iterate("reading", source), self.batchnorm, clock, halves)
            )
            head = fitter.fit()
        grown = PredictedModel(
            self.network, head, self.preprocess, classes,
            batchnorm=self.batchnorm, target_name=self.target_name, report=self.report, fitter=fitter,
        )  # fmt: skip
        grown._report_added(source, new_classes, split, [*_memory_warnings(None, halves.limit)], clock)
        return grown

    def _report_added(
        self, source: ImageSource, new_classes: Sequence[str], split: str, warnings: list[str], clock: StageClock
    ) -> None:
        """Bring the report up to date with images that were added."""
        report, counts = self.report, dict(zip(source.classes, source.counts or (), strict=True))
        old = report["class_counts"]
        entry = {"n": sum(counts.values()), "new_classes": list(new_classes), "split": split}
        found = report.get("provenance", {})
        self.report = {
            **report,
            "seconds": {**report["seconds"], "added": report["seconds"].get("added", 0.0) + clock.total()},
            "expected_accuracy": self.head.expected_accuracy,
            "n": report["n"] + entry["n"],
            "class_counts": {name: old.get(name, 0) + counts[name] for name in self.classes},
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
        cls, name: str | os.PathLike[str], *, target: nn.Module | None = None, **options: Unpack[HubOptions]
    ) -> PredictedModel:
        """Read a model: a file, a folder with ``model.safetensors``, or a repository of the Hugging Face Hub.

        Args:
            target: see ``pudnet.load``.
            options: of huggingface_hub, for a repository: revision, cache_dir, local_files_only, force_download, token.

        Raises:
            InputError: there is no such file or repository.
            CheckpointError: the file is damaged, of another version or kind, or does not fit ``target``.
        """
        return load(checkpoint.find(name, "PredictedModel.from_pretrained", cls.hub_file, **options), target)

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
        )
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RuntimeError) as error:
        got = f"{str(path)!r} ({one_line(error)})"
        hint = "It was made for another target network or another version."
        raise CheckpointError(message(where, "path", "a model that fits", got, hint)) from error


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


class Predictor(hub.Shared):
    """Predicts a classifier from a dataset with a trained hypernetwork.

    Args:
        net: the hypernetwork; copied.
        device: where everything runs; None for where ``net`` is.
        optimize: generate weights on the fast path (``pudnet.optimised``), prepared here once.
        dtype: of the generators' parameters there; bfloat16 halves the memory to read and changes weights by 0.2 %.
        origin: what reports say about where the hypernetwork came from.

    Attributes:
        net: the copy, in eval mode. With ``optimize``, later changes of it do not reach the weights.

    Raises:
        InputError: the target network cannot read images of its input size.
    """

    def __init__(
        self,
        net: PudNet,
        *,
        device: str | torch.device | None = None,
        optimize: bool = False,
        dtype: torch.dtype = torch.float32,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        _require(net, (PudNet,), "Predictor", "net", "Use Predictor.from_pretrained for a name or path.")
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        if device is not None:
            self.net.to(device)
        self.net.try_target(feature_maps)
        self.origin = dict(origin or {"checkpoint": None, "sha256": None})
        if not optimize and dtype != torch.float32:
            hint = "Pass optimize=True."
            raise DtypeError(message("Predictor", "dtype", "torch.float32 without optimize", dtype, hint))
        self._fast = OptimisedPudNet(self.net, dtype=dtype) if optimize else None

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        target: nn.Module | None = None,
        device: str | torch.device | None = None,
        optimize: bool = False,
        dtype: torch.dtype = torch.float32,
        **options: Unpack[HubOptions],
    ) -> Predictor:
        """Load a trained hypernetwork.

        Args:
            name: an existing file (or a folder with ``predictor.safetensors``); else a bundled name, see
                ``pudnet.list_pretrained()``; else a repository of the Hugging Face Hub, ``owner/name``.
            target: the target network, where the checkpoint was made for a module and not a name.
            device: where to run; None for the CPU.
            optimize, dtype: as for ``Predictor``.
            options: of huggingface_hub, for a repository: revision, cache_dir, local_files_only, force_download, token.

        Raises:
            InputError: there is no such file, name or repository.
            CheckpointError: the file is damaged, of another version, or not a hypernetwork.
        """
        path = checkpoint.find(name, "Predictor.from_pretrained", **options)
        net = PudNet.load(path, target=target)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        origin = {"checkpoint": str(name), "sha256": digest}
        return cls(net, device=device, optimize=optimize, dtype=dtype, origin=origin)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the hypernetwork; see ``PudNet.save``."""
        self.net.save(path, card=self.net.card)

    def card_parts(self, name: str) -> dict[str, Any]:
        """See ``pudnet.hub.Shared``."""
        return self.net.card_parts(name)

    @property
    def device(self) -> torch.device:
        return self.net.temperature.device

    def to(self, device: str | torch.device) -> Predictor:
        """Move to ``device``; returns itself."""
        self.net.to(device)
        if self._fast is not None and self._fast.device != self.device:
            self._fast = OptimisedPudNet(self.net, dtype=self._fast.dtype)
        return self

    @torch.no_grad()
    def generate(self, images: Any, *, out: Tensor | None = None, stream: Any = None) -> dict[str, Tensor]:
        """Predict weights alone, of one dataset or of several in one pass; several threads may do so at once.

        Args:
            images: uint8 ``[S, H, W, C]``, a ``Sketch``, or a list of these.
            out: with ``optimize``, where to write: contiguous ``[P]``, for a list ``[B, P]``.
            stream: with ``optimize`` on CUDA, the ``torch.cuda.Stream`` to run on; nothing waits for the GPU.

        Returns:
            ``{parameter name: [O, I, kH, kW]}``; for a list of B, ``{parameter name: [B, O, I, kH, kW]}``.

        Raises:
            InputError: images of another kind, or none; ``out`` or ``stream`` without ``optimize``.
        """
        if self._fast is None:
            if out is not None or stream is not None:
                hint = "Make the predictor with optimize=True."
                raise InputError(message("Predictor.generate", "out and stream", "None without optimize", "one", hint))
            return self.net.generate(images)
        if isinstance(images, (list, tuple)):
            return self._fast.generate_batch(images, out=out, stream=stream)
        return self._fast.generate(images, out=out, stream=stream)

    def sketch(
        self,
        images: Any,
        labels: Any = None,
        *,
        size: int = SKETCH_SIZE,
        seed: int = 0,
        stream: int = 0,
        split: str = "train",
        classes: Sequence[str] | None = None,
    ) -> Sketch:
        """Sample a dataset, or a part of one: sketches of parts merge (``Sketch.merge``) into a sketch of the whole.

        Args:
            images: anything ``predict`` takes; arrays may also come without labels.
            size: images in the sketch at most.
            seed: of the sample.
            stream: a different number for each part that will be merged.
            classes: class names in label order; parts of one dataset need the same.
        """
        builder = SketchBuilder(size, seed=seed, stream=stream)
        if isinstance(images, (np.ndarray, Tensor)) and labels is None:
            for start in range(0, len(images), BATCH):
                part = channels_last(images[start : start + BATCH], "Predictor.sketch")
                builder.update(self.net.preprocess.resize(part), None)
            return builder.finish()
        side = self.net.config.image_size
        for batch, batch_labels in open_images(images, labels, size=side, split=split, classes=classes):
            builder.update(batch, batch_labels)
        return builder.finish()

    @torch.no_grad()
    def predict(
        self,
        images: Any,
        labels: Any = None,
        *,
        head: str = "ridge",
        batchnorm: str = "calibrated",
        sketch: Sketch | None = None,
        sketch_size: int = SKETCH_SIZE,
        seed: int = 0,
        split: str = "train",
        classes: Sequence[str] | None = None,
        growable: bool = False,
        cancel: Token | None = None,
    ) -> PredictedModel:
        """Predict a classifier for a dataset: read, sketch, weights, BatchNorm statistics, head.

        Where memory runs out, images are read in halves, quarters and so on. Several threads may predict at once.

        Args:
            images: a folder with one sub-folder per class, an ``.npz`` file, uint8 images ``[n, H, W, C]`` (array or
                tensor) with ``labels``, or a torch ``Dataset`` or ``DataLoader`` of (image, label).
            labels: ``[n]`` integers or names, for arrays.
            head: ``"ridge"``, ``"ridge-last"`` or ``"cosine"``.
            batchnorm: ``"calibrated"``, ``"batch"`` or ``"shared"``.
            sketch: decides the weights instead of the one drawn here; BatchNorm is calibrated on the given images.
            sketch_size: images in the one drawn here, at most.
            seed: of everything random.
            split: which part of a source that has several.
            classes: class names in label order; None for those of the source.
            growable: keep what ``PredictedModel.add`` needs, in the model and in its file: up to max(F, 2048) rows of
                F features and, beyond so many images, an F x F matrix (``convnet3``: 43 and 85 MB at most).
            cancel: a ``threading.Event`` or alike; looked at between stages and between batches of images.

        Raises:
            InputError: bad images or labels (see ``pudnet.data.open_images``), or an unknown head or policy.
            Cancelled: ``cancel`` was set.
        """
        where = "Predictor.predict"
        _check_choices(where, head, batchnorm)
        _require(sketch, (Sketch, type(None)), where, "sketch", "Make one with predictor.sketch(images, labels).")
        source, sample, clock = self._sample(images, labels, sketch_size, seed, split, classes, cancel)
        seen = sample if sketch is None else sketch
        with clock.stage("weights"), self._recording() as ran:
            network = self.net.materialise(self.generate(seen))
        settings = {
            "head": head,
            "batchnorm": batchnorm,
            "sketch_size": sketch_size,
            "seed": seed,
            "split": split,
            "classes": None if classes is None else list(classes),
            "growable": growable,
            "together": 1,
            "backends": ran,
        }
        return self._finish(network, source, sample, seen, settings, clock)

    def remake(
        self,
        report: Mapping[str, Any],
        images: Any,
        labels: Any = None,
        *,
        sketch: Sketch | None = None,
        added: Sequence[tuple[Any, Any]] = (),
    ) -> PredictedModel:
        """Make a model again from its record: the same to the last bit on the same machine, or an error.

        Args:
            report: ``report`` of the model, or its ``report["provenance"]``.
            images, labels, sketch: what the model was predicted from.
            added: (images, labels) of each ``PredictedModel.add`` since then.

        Raises:
            CheckpointError: this predictor is of another checkpoint than the recorded one.
            InputError: other images than the recorded ones, or a report without a record.
            PudnetError: the model differs from the recorded one; the message lists what else does.
        """
        record = report.get("provenance", report)
        steps = record.get("added", ())
        names = ("head", "batchnorm", "sketch_size", "seed", "split", "classes", "growable")
        needed = {*names, "checkpoint", "sha256", "net_sha256", "sketch", "model_sha256"}
        if not needed <= set(record) or len(steps) != len(added):
            rule = f"of a model that was predicted by pudnet, and to which {len(added)} datasets were added"
            raise InputError(message("Predictor.remake", "report", rule, f"{sorted(record)}, {len(steps)} added"))
        provenance.require_net(record, self._net_sha256)
        model = self.predict(images, labels, sketch=sketch, **{name: record[name] for name in names})
        provenance.require_sketch(record, model.report["provenance"])
        for (more, more_labels), step in zip(added, steps, strict=True):
            model = model.add(more, more_labels, new_classes=step["new_classes"], split=step["split"])
        provenance.require_equal(record, model.report["provenance"])
        return model

    @functools.cached_property
    def _net_sha256(self) -> str:
        return provenance.digest(self.net.state_dict())

    @contextmanager
    def _recording(self) -> Iterator[dict[str, str]]:
        """Within the block, note which backend each op ran on."""
        with backends.recording() as ran:
            yield ran
        if self._fast is not None:
            ran["generate_weights"] = self._fast.backend

    @torch.no_grad()
    def predict_batch(
        self,
        datasets: Sequence[Any],
        *,
        head: str = "ridge",
        batchnorm: str = "calibrated",
        sketch_size: int = SKETCH_SIZE,
        seed: int = 0,
        split: str = "train",
        cancel: Token | None = None,
    ) -> list[PredictedModel]:
        """Predict a classifier for each of several datasets; all weights are generated in one pass.

        A dataset that fails does not disturb the others. Where memory runs out, the pass is made in halves.

        Args:
            datasets: each what ``predict`` takes: a folder, a file, a ``Dataset``, or a pair ``(images, labels)``.
            head, batchnorm, sketch_size, seed, split, cancel: as for ``predict``, the same for all.

        Returns:
            One model for each; its ``report["seconds"]["weights"]`` is its share of the common pass.

        Raises:
            InputError: no datasets, or an unknown head or policy.
            DatasetErrors: some failed, which its ``exceptions`` tell; its ``results`` has the models of the others.
            Cancelled: ``cancel`` was set.
        """
        where = "Predictor.predict_batch"
        _check_choices(where, head, batchnorm)
        pairs = _pairs(where, datasets)

        def sampled(pair: tuple[Any, Any]) -> tuple[ImageSource, Sketch, StageClock]:
            return self._sample(*pair, sketch_size, seed, split, None, cancel)

        def finished(ready: tuple[ImageSource, Sketch, StageClock], weights: dict[str, Tensor]) -> PredictedModel:
            source, sample, clock = ready
            clock.seconds["weights"] += share
            network = self.net.materialise(weights)
            settings = {
                "head": head,
                "batchnorm": batchnorm,
                "sketch_size": sketch_size,
                "seed": seed,
                "split": split,
                "classes": None,
                "growable": False,
                "together": len(sketches),
                "backends": ran,
            }
            model = self._finish(network, source, sample, sample, settings, clock)
            seconds = model.report["seconds"]
            seconds["total"] = sum(seconds[stage] for stage in STAGES)  # the clock also saw the other datasets
            return model

        ready = [attempt(sampled, pair) for pair in pairs]
        sketches = [one[1] for one in ready if not isinstance(one, Exception)]
        start = time.perf_counter()
        with self._recording() as ran:
            parts = list(Halves().run(self.generate, sketches)) if sketches else []  # {name: [b, O, I, kH, kW]}, b
        share = (time.perf_counter() - start) / max(1, len(sketches))
        weights = ({name: several[row] for name, several in part.items()} for part, b in parts for row in range(b))
        results = [one if isinstance(one, Exception) else attempt(finished, one, next(weights)) for one in ready]
        return all_or_errors(where, results)

    def predict_many(
        self,
        datasets: Sequence[Any],
        *,
        workers: int = 4,
        head: str = "ridge",
        batchnorm: str = "calibrated",
        sketch_size: int = SKETCH_SIZE,
        seed: int = 0,
        split: str = "train",
        timeout: float | None = None,
        cancel: Token | None = None,
        on_result: Callable[[int, PredictedModel | Exception], None] | None = None,
    ) -> list[PredictedModel]:
        """Predict a classifier for each of many datasets, several at a time in threads.

        A dataset that fails or is slow does not disturb the others.

        Args:
            datasets: each what ``predict`` takes: a folder, a file, a ``Dataset``, or a pair ``(images, labels)``.
            workers: how many at a time; with ``OMP_NUM_THREADS=1`` as many as there are cores.
            head, batchnorm, sketch_size, seed, split: as for ``predict``, the same for all.
            timeout: seconds for each dataset. One that takes longer fails with Cancelled at the next batch of images;
                a read that never returns cannot be ended.
            cancel: a ``threading.Event`` or alike, looked at between stages and between batches of images.
            on_result: called in the calling thread with (position, model or error) as each is ready.

        Returns:
            One model for each, in order; equal to those of ``predict``.

        Raises:
            InputError: no datasets, no workers, or an unknown head or policy.
            DatasetErrors: some failed, which its ``exceptions`` tell; its ``results`` has the models of the others.
            Cancelled: ``cancel`` was set.
        """
        where = "Predictor.predict_many"
        _check_choices(where, head, batchnorm)
        if workers < 1:
            raise InputError(message(where, "workers", "at least 1", workers))

        def predicted(pair: tuple[Any, Any], token: Token) -> PredictedModel:
            return self.predict(
                *pair, head=head, batchnorm=batchnorm, sketch_size=sketch_size, seed=seed, split=split, cancel=token
            )

        results = in_threads(
            predicted, _pairs(where, datasets), workers,
            where=where, timeout=timeout, cancel=cancel, on_result=on_result,
        )  # fmt: skip
        return all_or_errors(where, results)

    def _sample(
        self,
        images: Any,
        labels: Any,
        size: int,
        seed: int,
        split: str,
        classes: Sequence[str] | None,
        cancel: Token | None,
    ) -> tuple[ImageSource, Sketch, StageClock]:
        """Open a dataset and draw its sketch."""
        clock = StageClock(self.device, cancel)
        with clock.stage("reading"):
            if cancel is not None and labels is None and not isinstance(images, (str, os.PathLike, np.ndarray, Tensor)):
                images = Watched(images, clock.check)
            source = open_images(images, labels, size=self.net.config.image_size, split=split, classes=classes)
        builder = SketchBuilder(size, seed=seed)
        for batch, batch_labels in clock.iterate("reading", source):
            with clock.stage("sketch"):
                builder.update(batch, batch_labels)
        with clock.stage("sketch"):
            sample = builder.finish()
        return source, sample, clock

    def _finish(
        self,
        network: nn.Module,
        source: ImageSource,
        sample: Sketch,
        seen: Sketch,
        settings: Mapping[str, Any],
        clock: StageClock,
        reduce: Callable[[HeadFitter], HeadFitter] | None = None,
    ) -> PredictedModel:
        """``finish``, and what made the model; ``seen`` is the sketch that decided the weights."""
        options = {name: settings[name] for name in ("head", "batchnorm", "seed", "growable")}
        model = finish(network, source, sample, self.net.preprocess, clock=clock, reduce=reduce, **options)
        model.target_name = self.net.target_name
        model.report["provenance"] = {
            **self.origin,
            "net_sha256": self._net_sha256,
            "target": self.net.target_name,
            **provenance.environment(self.device),
            "optimize": self._fast is not None,
            "dtype": str(torch.float32 if self._fast is None else self._fast.dtype).removeprefix("torch."),
            **settings,
            "sketch_images": len(seen.images),
            "sketch": provenance.describe_sketch(seen),
            "model_sha256": provenance.digest_model(model.network, model.head),
        }
        return model


def _pairs(where: str, datasets: Any) -> list[tuple[Any, Any]]:
    """(images, labels) of each dataset."""
    if not isinstance(datasets, (list, tuple)) or not datasets:
        raise InputError(message(where, "datasets", "a list of at least one", type(datasets).__name__))
    return [one if isinstance(one, tuple) and len(one) == 2 else (one, None) for one in datasets]


def _check_choices(where: str, head: str, batchnorm: str) -> None:
    check_head(head)
    if batchnorm not in POLICIES:
        raise InputError(message(where, "batchnorm", f"one of {', '.join(POLICIES)}", repr(batchnorm)))


@torch.no_grad()
def finish(
    network: nn.Module,
    source: ImageSource,
    sketch: Sketch,
    preprocess: Preprocess,
    *,
    head: str = "ridge",
    batchnorm: str = "calibrated",
    seed: int = 0,
    growable: bool = False,
    clock: StageClock | None = None,
    reduce: Callable[[HeadFitter], HeadFitter] | None = None,
) -> PredictedModel:
    """Turn a network that has its convolution weights into a classifier of ``source``: BatchNorm statistics and head.

    Args:
        network: with weights from anywhere; it becomes part of the model and is changed.
        source: the training images.
        sketch: the random sample of them that BatchNorm is calibrated on.
        growable: the model keeps what ``PredictedModel.add`` needs.
        clock: to go on counting on; None for a new one.
        reduce: what the head remembers of ``source`` -> what it remembers of all shards.
    """
    device = _device_of(network)
    clock = clock or StageClock(device)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    halves = Halves(batchnorm != "batch")
    images = _prepared(preprocess, preprocess.resize(sketch.images), device)
    fitter = HeadFitter(head, len(source.classes), seed=seed)
    with clock.stage("calibration"):
        calibrated_on = _set_policy(network, batchnorm, images, seed)
    with clock.stage("head"):
        batches = clock.iterate("reading", ordered(source, batchnorm, seed))
        fitter.add(_mapped(network, preprocess, batches, batchnorm, clock, halves))
        fitter = reduce(fitter) if reduce else fitter
        fitted = fitter.fit()
    kept = fitter if growable else None
    model = PredictedModel(network, fitted, preprocess, source.classes, batchnorm=batchnorm, fitter=kept)
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
    }
    return model


def _prepared(preprocess: Preprocess, images: Tensor, device: torch.device) -> Tensor:
    """Resized uint8 images -> what the network reads."""
    return preprocess.normalise(images.to(device)).contiguous(memory_format=torch.channels_last)


def _mapped(
    network: nn.Module,
    preprocess: Preprocess,
    batches: Iterable[tuple[Tensor, Tensor]],
    batchnorm: str,
    clock: StageClock,
    halves: Halves,
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Feature maps and labels of every image."""
    device = _device_of(network)

    def maps_of(piece: Tensor) -> list[Tensor]:
        clock.check()
        return feature_maps(network, _prepared(preprocess, piece, device))

    for images, labels in batches:
        done = 0
        for piece in _pieces(images, batchnorm, device):
            for maps, count in halves.run(maps_of, piece):
                yield maps, labels[done : done + count]
                done += count


def _set_policy(network: nn.Module, batchnorm: str, images: Tensor, seed: int) -> int | None:
    """``set_policy``; where memory runs out, in smaller batches, whose size is returned."""
    size = most = min(BATCH_SIZE, len(images))
    while True:
        try:
            set_policy(network, batchnorm, images, batch_size=size, seed=seed)
        except Exception as error:
            if not is_out_of_memory(error) or size <= CPU_BATCH:
                raise
        else:
            return None if size == most else size
        size //= 2


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
    size = CPU_BATCH if device.type == "cpu" and batchnorm != "batch" else BATCH
    return (part.to(device) for part in torch.split(images, size) if len(part))


def _require(value: object, kinds: tuple[type, ...], where: str, argument: str, hint: str) -> None:
    if not isinstance(value, kinds):
        raise DtypeError(message(where, argument, f"a {kinds[0].__name__}", type(value).__name__, hint))
