"""What a user holds: ``Predictor`` turns a dataset into a ``PredictedModel``.

``Predictor.predict`` is the whole path from images to a classifier; each stage is timed under its name.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from pudnet import backends, checkpoint, hub, provenance
from pudnet.batchnorm import POLICIES
from pudnet.checkpoint import HubOptions
from pudnet.data import ImageSource, open_images
from pudnet.data.source import channels_last
from pudnet.directions import Trial
from pudnet.errors import DtypeError, InputError, message
from pudnet.familiarity import familiarity
from pudnet.features import check_views, feature_maps
from pudnet.heads import HeadFitter, check_head
from pudnet.models.pudnet import PudNet
from pudnet.optimised import OptimisedPudNet
from pudnet.predicted import (
    BATCH,
    Classification,
    PredictedModel,
    expected_accuracy,
    finish,
    load,
)
from pudnet.serving import Halves, Token, all_or_errors, attempt, in_threads
from pudnet.sketch import Sketch, SketchBuilder
from pudnet.stages import STAGES, StageClock

__all__ = ["Classification", "PredictedModel", "Predictor", "finish", "load"]

SKETCH_SIZE = 1000


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
        """Where everything runs."""
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
        head: str = "auto",
        batchnorm: str = "calibrated",
        sketch: Sketch | None = None,
        sketch_size: int = SKETCH_SIZE,
        seed: int = 0,
        split: str = "train",
        classes: Sequence[str] | None = None,
        growable: bool = False,
        views: str | None = None,
        quick: bool = False,
        cancel: Token | None = None,
    ) -> PredictedModel:
        """Predict a classifier for a dataset: read, sketch, weights, BatchNorm statistics, head.

        Where memory runs out, images are read in halves, quarters and so on. Several threads may predict at once.

        Args:
            images: a folder with one sub-folder per class, an ``.npz`` file, uint8 images ``[n, H, W, C]`` (array or
                tensor) with ``labels``, a torch ``Dataset`` or ``DataLoader`` of (image, label), or what
                ``pudnet.data.open_images`` opened, with options that only it has (``follow_symlinks``).
            labels: ``[n]`` integers or names, for arrays.
            head: ``"kernel"``, ``"ridge"``, ``"ridge-last"`` or ``"cosine"``; ``"auto"`` is ``"kernel"`` for at most
                5,120 images, as long as the features that it keeps of them are few, and else ``"ridge"``
                (``report["head"]["name"]`` says which).
            batchnorm: ``"calibrated"``, ``"batch"`` or ``"shared"``.
            sketch: decides the weights instead of the one drawn here; BatchNorm is calibrated on the given images.
            sketch_size: images in the one drawn here, at most.
            seed: of everything random.
            split: which part of a source that has several.
            classes: class names in label order; None for those of the source.
            growable: keep what ``PredictedModel.add`` needs, in the model and in its file: up to max(F, 2048) rows of
                F features and, beyond so many images, an F x F matrix (``convnet3``: 43 and 85 MB at most). The head
                ``"auto"`` is then ``"ridge"``.
            views: in how many copies every image is read, one of ``pudnet.features.VIEWS``: answers then take so many
                times as long. None: what clearly helps a part of the sketch (``report["views"]`` says which).
            quick: leave out what is tried on the sketch: the generated weights stay as they are, without directions of
                the dataset, and every image is read once unless ``views`` says otherwise.
            cancel: a ``threading.Event`` or alike; looked at between stages and between batches of images.

        Raises:
            InputError: bad images or labels (see ``pudnet.data.open_images``), or an unknown head or policy.
            Cancelled: ``cancel`` was set.
        """
        where = "Predictor.predict"
        _check_choices(where, head, batchnorm, views)
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
            "views": views,
            "quick": quick,
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
            InputError: other images than the recorded ones, a report without a record, or a model made from shards.
            PudnetError: the model differs from the recorded one; the message lists what else does.
        """
        where = "Predictor.remake"
        record = dict(report.get("provenance", report))
        if "views" not in record:  # models of before have none, or whether they are mirrored: None where that was tried
            record["views"] = {True: "mirrored", False: "single", None: None}[record.get("mirror", False)]
        record.setdefault("quick", False)
        steps = record.get("added", ())
        names = ("head", "batchnorm", "sketch_size", "seed", "split", "classes", "growable", "views", "quick")
        missing = {*names, "checkpoint", "sha256", "net_sha256", "sketch", "model_sha256"} - set(record)
        if missing:
            rule = "of a model that Predictor.predict made"
            raise InputError(message(where, "report", rule, f"one without {', '.join(sorted(missing))}"))
        if record.get("shards", 1) > 1:
            hint = "Call pudnet.shards.predict again in as many processes, and compare model_sha256."
            raise InputError(message(where, "report", "of a model made in one process", record["shards"], hint))
        if len(steps) != len(added):
            rule = f"the {len(steps)} datasets that were added to the model, in order"
            raise InputError(message(where, "added", rule, len(added)))
        provenance.require_untrained(record)
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
        head: str = "auto",
        batchnorm: str = "calibrated",
        sketch_size: int = SKETCH_SIZE,
        seed: int = 0,
        split: str = "train",
        quick: bool = False,
        cancel: Token | None = None,
    ) -> list[PredictedModel]:
        """Predict a classifier for each of several datasets; all weights are generated in one pass.

        A dataset that fails does not disturb the others. Where memory runs out, the pass is made in halves.

        Args:
            datasets: each what ``predict`` takes: a folder, a file, a ``Dataset``, or a pair ``(images, labels)``.
            head, batchnorm, sketch_size, seed, split, quick, cancel: as for ``predict``, the same for all.

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
                "views": None,
                "quick": quick,
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
        head: str = "auto",
        batchnorm: str = "calibrated",
        sketch_size: int = SKETCH_SIZE,
        seed: int = 0,
        split: str = "train",
        quick: bool = False,
        timeout: float | None = None,
        cancel: Token | None = None,
        on_result: Callable[[int, PredictedModel | Exception], None] | None = None,
    ) -> list[PredictedModel]:
        """Predict a classifier for each of many datasets, several at a time in threads.

        A dataset that fails or is slow does not disturb the others.

        Args:
            datasets: each what ``predict`` takes: a folder, a file, a ``Dataset``, or a pair ``(images, labels)``.
            workers: how many at a time; with ``OMP_NUM_THREADS=1`` as many as there are cores.
            head, batchnorm, sketch_size, seed, split, quick: as for ``predict``, the same for all.
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
                *pair, head=head, batchnorm=batchnorm, sketch_size=sketch_size, seed=seed, split=split, quick=quick,
                cancel=token,
            )  # fmt: skip

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
            images = clock.watched(images, labels)
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
        """Directions and ``finish``, and what made the model; ``seen`` is the sketch that decided the weights."""
        quick = settings["quick"]
        with clock.stage("directions"):
            trial = Trial(False) if quick else self.net.insert_directions(network, seen)
        options = {name: settings[name] for name in ("head", "batchnorm", "seed", "growable", "views")}
        if quick:
            options["views"] = options["views"] or "single"
        model = finish(network, source, sample, self.net.preprocess, clock=clock, reduce=reduce, **options)
        model.target_name = self.net.target_name
        model.report["directions"] = trial._asdict()
        model.report["expected_accuracy"] = expected_accuracy(model.head, model.report)
        self._judge(model.report, seen)
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

    def _judge(self, report: dict[str, Any], seen: Sketch) -> None:
        """Say in the report how far the dataset is from those of the training, where the checkpoint knows these."""
        known = self.net.card.get("familiarity")
        if known is None:
            return
        found = familiarity(known, self.net.embed(seen).flatten(), len(seen))
        report["familiarity"] = found._asdict()
        if found.unlike:
            report["warnings"].append(
                "the images are unlike those that the hypernetwork was trained on: a distance of "
                f"{found.distance:.2f} to the nearest training dataset, and few are beyond {found.threshold:.2f}; "
                "try how well a network trained from scratch does"
            )


def _pairs(where: str, datasets: Any) -> list[tuple[Any, Any]]:
    """(images, labels) of each dataset."""
    if not isinstance(datasets, (list, tuple)) or not datasets:
        raise InputError(message(where, "datasets", "a list of at least one", type(datasets).__name__))
    return [one if isinstance(one, tuple) and len(one) == 2 else (one, None) for one in datasets]


def _check_choices(where: str, head: str, batchnorm: str, views: str | None = None) -> None:
    check_head(head, "auto")
    check_views(where, views)
    if batchnorm not in POLICIES:
        raise InputError(message(where, "batchnorm", f"one of {', '.join(POLICIES)}", repr(batchnorm)))


def _require(value: object, kinds: tuple[type, ...], where: str, argument: str, hint: str) -> None:
    if not isinstance(value, kinds):
        raise DtypeError(message(where, argument, f"a {kinds[0].__name__}", type(value).__name__, hint))
