"""A fixed-size, class-balanced random sample of a stream of images, in one pass and mergeable.

Every image draws a uniform key. Within a class the images with the smallest keys are kept, so that each class keeps a
uniform sample of what was seen of it; whenever more than S images are kept, the largest key of the fullest class goes
(of several equally full classes, the one with the largest key). What remains in the end are the S images that come
first when ordered by (rank of the key within its class, key). That set depends on the keys alone, not on how the stream
was cut into batches or parts: an image that was dropped once can never belong to it later, because ranks only grow and
the number kept per class only shrinks. Hence merging is the same step on the union of two sketches.

This is bottom-k sampling: Cohen and Kaplan, "Summarizing data using bottom-k sketches", PODC 2007.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pudnet.data.preprocess import array_tensor
from pudnet.errors import CheckpointError, DtypeError, InputError, ShapeError, message
from pudnet.files import open_tensors, write_tensors

Array = np.ndarray[Any, Any]
VERSION = 1
MAX_CLASSES = 2**20  # a larger label is a mistake rather than a class, and would cost memory per class


@dataclass(frozen=True, eq=False)
class Sketch:
    """A class-balanced uniform sample of one or several streams of images.

    Attributes:
        images: uint8 [S', H, W, 3], S' at most ``capacity``, in random order.
        labels: int64 [S'], or None for unlabelled streams.
        seen: int64 [K], images that went by per class ([1] without labels); a class may have 0.
        indices: int64 [S'], position of each image in its stream.
        stream_ids: int64 [S'], the stream of each image: one of ``streams``.
        keys: float64 [S'], the random key of each image.
        thresholds: float64 [K], the smallest key dropped per class, 1 where none was: of each class exactly the images
            with smaller keys are here.
        capacity: S, the most images that are kept.
        seed: the seed all keys come from.
        streams: the merged streams, sorted; their keys are independent of each other.
    """

    images: Tensor
    labels: Tensor | None
    seen: Tensor
    indices: Tensor
    stream_ids: Tensor
    keys: Tensor
    thresholds: Tensor
    capacity: int
    seed: int
    streams: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def merge(cls, *sketches: Sketch) -> Sketch:
        """The sketch of all streams together, as if they had been one; the order of the arguments does not matter.

        Labels must mean the same classes in all parts. The smallest capacity counts.

        Raises:
            InputError: nothing to merge, different seeds, a common stream, or labelled and unlabelled parts.
            ShapeError: images of different sizes.
        """
        where = "Sketch.merge"
        if not sketches:
            raise InputError(message(where, "sketches", "at least one", 0))
        seeds = sorted({part.seed for part in sketches})
        if len(seeds) > 1:
            raise InputError(message(where, "sketches", "made with one seed", seeds, "Give all parts the same seed."))
        streams = sorted(stream for part in sketches for stream in part.streams)
        if len(set(streams)) < len(streams):
            twice = sorted({stream for stream in streams if streams.count(stream) > 1})
            hint = "Make each part with its own number: sketch(..., stream=0), sketch(..., stream=1), and so on."
            raise InputError(message(where, "streams", "different from each other", f"stream {twice} twice", hint))
        if len({part.labels is None for part in sketches}) > 1:
            raise InputError(message(where, "sketches", "all labelled or all unlabelled", "some of each"))
        shapes = sorted({tuple(part.images.shape[1:]) for part in sketches})
        if len(shapes) > 1:
            raise ShapeError(message(where, "images", "of one size", shapes, "Resize them before sketching."))
        classes = max(len(part.seen) for part in sketches)
        seen = torch.stack([_padded(part.seen, classes, 0) for part in sketches]).sum(0)
        thresholds = torch.stack([_padded(part.thresholds, classes, 1) for part in sketches]).amin(0)
        first = sketches[0]
        union = Sketch(
            images=torch.cat([part.images for part in sketches]),
            labels=None if first.labels is None else torch.cat([_labels(part) for part in sketches]),
            seen=seen,
            indices=torch.cat([part.indices for part in sketches]),
            stream_ids=torch.cat([part.stream_ids for part in sketches]),
            keys=torch.cat([part.keys for part in sketches]),
            thresholds=thresholds,
            capacity=min(part.capacity for part in sketches),
            seed=first.seed,
            streams=tuple(streams),
        )
        labels = _labels(union).numpy()
        kept = _select(labels, union.keys.numpy(), union.stream_ids.numpy(), union.indices.numpy(), union.capacity)
        _lower_thresholds(thresholds.numpy(), labels, union.keys.numpy(), kept)
        return _take(union, torch.from_numpy(kept))

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything as a dict of tensors and a dict fit for JSON, for whatever carries the sketch elsewhere."""
        tensors = {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}
        meta = {"version": VERSION, "capacity": self.capacity, "seed": self.seed, "streams": list(self.streams)}
        return tensors, meta

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Sketch:
        """The inverse of :meth:`to_tensors`.

        Raises:
            CheckpointError: another version, or tensors that are missing or do not fit together.
        """
        where = "Sketch.from_tensors"
        if meta.get("version") != VERSION:
            raise CheckpointError(message(where, "version", str(VERSION), repr(meta.get("version"))))
        missing = sorted({name for name in _TENSORS if name != "labels"} - set(tensors))
        missing += sorted({"capacity", "seed", "streams"} - set(meta))
        if missing:
            raise CheckpointError(message(where, "the sketch", "complete", f"one without {', '.join(missing)}"))
        capacity, seed, streams = meta["capacity"], meta["seed"], meta["streams"]
        if not (_is_count(capacity) and _is_count(seed) and isinstance(streams, list) and all(map(_is_count, streams))):
            got = f"{capacity!r}, {seed!r}, {streams!r}"
            raise CheckpointError(message(where, "capacity, seed and streams", "integers of at least 0", got))
        images, seen = tensors["images"], tensors["seen"]
        if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:]:
            raise CheckpointError(message(where, "images", "[S, H, W, 3]", list(images.shape)))
        for name, dtype in _TENSORS.items():
            rows = seen.numel() if name in ("seen", "thresholds") else len(images)
            tensor, shape = tensors.get(name), images.shape if name == "images" else (rows,)
            if tensor is not None and (tensor.dtype != dtype or tensor.shape != shape):
                got = f"{tensor.dtype} {list(tensor.shape)}"
                raise CheckpointError(message(where, name, f"{dtype} with {rows} rows", got))
        labels = tensors.get("labels")
        if labels is not None and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(seen):
            got = f"{int(labels.min())}..{int(labels.max())}"
            raise CheckpointError(message(where, "labels", f"in 0..{len(seen) - 1}", got))
        values = {name: tensors.get(name) for name in _TENSORS}
        return cls(**values, capacity=capacity, seed=seed, streams=tuple(streams))  # type: ignore[arg-type]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the sketch as a safetensors file.

        Raises:
            InputError: the path cannot be written, or the disk is full.
        """
        tensors, meta = self.to_tensors()
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_tensors(path, contiguous, "pudnet.sketch", meta, "Sketch.save")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sketch:
        """Read a file that :meth:`save` wrote.

        Raises:
            InputError: there is no such file.
            CheckpointError: the file is truncated, of another version, or no sketch.
        """
        with open_tensors(path, "pudnet.sketch", "Sketch.load") as (meta, tensors):
            return cls.from_tensors(tensors(), meta)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_TENSORS = {
    "images": torch.uint8,
    "labels": torch.int64,
    "seen": torch.int64,
    "indices": torch.int64,
    "stream_ids": torch.int64,
    "keys": torch.float64,
    "thresholds": torch.float64,
}


class SketchBuilder:
    """Builds the sketch of one stream batch by batch, in memory O(capacity + classes).

    Args:
        capacity: S, the most images that are kept.
        seed: of all keys.
        stream: number of this stream; parts that will be merged need different numbers and the same seed.
    """

    def __init__(self, capacity: int = 500, *, seed: int = 0, stream: int = 0) -> None:
        for name, value, least in (("capacity", capacity, 1), ("seed", seed, 0), ("stream", stream, 0)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
                raise InputError(message("SketchBuilder", name, f"an integer of at least {least}", repr(value)))
        self._capacity, self._seed, self._stream = int(capacity), int(seed), int(stream)
        self._draws = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(0, stream))))
        self._labelled: bool | None = None  # known with the first batch
        self._images = torch.empty(0)  # [slots, H, W, 3], slots grow up to the capacity
        self._slots = np.empty(0, dtype=np.int64)  # where each kept image lies in self._images; all below: [S']
        self._labels = np.empty(0, dtype=np.int64)
        self._keys = np.empty(0, dtype=np.float64)
        self._indices = np.empty(0, dtype=np.int64)
        self._seen = np.zeros(0, dtype=np.int64)  # [K]
        self._thresholds = np.ones(0, dtype=np.float64)  # [K]
        self._total = 0

    def update(self, images: Tensor | Array, labels: Tensor | Array | None = None) -> None:
        """Show the next images of the stream.

        Args:
            images: uint8 [n, H, W, 3], of one size throughout the stream.
            labels: integers [n] of at least 0, in every batch or in none.

        Raises:
            ShapeError, DtypeError, InputError: the batch is not as said above; the sketch is then unchanged.
        """
        batch = self._checked_images(images)
        count = len(batch)
        classes = self._checked_labels(labels, count)
        self._labelled = labels is not None
        if count == 0:
            return
        if len(self._images) == 0:
            self._images = torch.empty(0, *batch.shape[1:], dtype=torch.uint8)
        self._grow_classes(int(classes.max()) + 1)
        self._seen += np.bincount(classes, minlength=len(self._seen))
        keys = self._draws.random(count)  # one draw per image, so batches of any size draw the same keys
        rows = np.flatnonzero(keys < self._thresholds[classes])
        if len(rows):
            self._insert(batch, classes[rows], keys[rows], rows)
        self._total += count

    def finish(self) -> Sketch:
        """The sketch of what was shown so far; more may be shown afterwards.

        Raises:
            InputError: no image was shown.
        """
        if self._total == 0:
            raise InputError(message("SketchBuilder.finish", "the stream", "at least one image long", "no image"))
        everything = Sketch(
            images=self._images[torch.from_numpy(self._slots)],
            labels=torch.from_numpy(self._labels.copy()) if self._labelled else None,
            seen=torch.from_numpy(self._seen.copy()),
            indices=torch.from_numpy(self._indices.copy()),
            stream_ids=torch.full((len(self._slots),), self._stream, dtype=torch.int64),
            keys=torch.from_numpy(self._keys.copy()),
            thresholds=torch.from_numpy(self._thresholds.copy()),
            capacity=self._capacity,
            seed=self._seed,
            streams=(self._stream,),
        )
        return _take(everything, torch.arange(len(everything)))

    def _insert(self, batch: Tensor, labels: Array, keys: Array, rows: Array) -> None:
        """Add candidates (rows of the batch), drop what is too much, and copy only the images that stay."""
        old = len(self._slots)
        all_labels = np.concatenate([self._labels, labels])
        all_keys = np.concatenate([self._keys, keys])
        all_indices = np.concatenate([self._indices, self._total + rows])
        same_stream = np.zeros(len(all_keys), dtype=np.int64)
        kept = _select(all_labels, all_keys, same_stream, all_indices, self._capacity)
        _lower_thresholds(self._thresholds, all_labels, all_keys, kept)
        stay, come = kept[kept < old], kept[kept >= old]
        if len(kept) > len(self._images):
            room = min(self._capacity, max(2 * len(self._images), len(kept)))
            grown = torch.empty(room, *self._images.shape[1:], dtype=torch.uint8)
            grown[: len(self._images)] = self._images
            self._images = grown
        free = np.ones(len(self._images), dtype=np.bool_)
        free[self._slots[stay]] = False
        new_slots = np.flatnonzero(free)[: len(come)]
        # By numpy: torch would start its threads, which take the processor from those that decode images.
        chosen = rows[come - old]
        found = (
            batch.numpy()[chosen] if batch.is_cpu else batch[torch.from_numpy(chosen).to(batch.device)].cpu().numpy()
        )
        self._images.numpy()[new_slots] = found
        self._slots = np.concatenate([self._slots[stay], new_slots])
        order = np.concatenate([stay, come])
        self._labels, self._keys, self._indices = all_labels[order], all_keys[order], all_indices[order]

    def _grow_classes(self, classes: int) -> None:
        more = classes - len(self._seen)
        if more > 0:
            self._seen = np.concatenate([self._seen, np.zeros(more, dtype=np.int64)])
            self._thresholds = np.concatenate([self._thresholds, np.ones(more)])

    def _checked_images(self, images: Tensor | Array) -> Tensor:
        where = "SketchBuilder.update"
        if isinstance(images, np.ndarray) and images.dtype == np.uint8:
            images = array_tensor(images)
        if not isinstance(images, Tensor) or images.dtype != torch.uint8:
            got = getattr(images, "dtype", type(images).__name__)
            raise DtypeError(message(where, "images", "a uint8 tensor or array", got))
        if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:]:
            raise ShapeError(message(where, "images", "[n, H, W, 3]", list(images.shape)))
        if self._total and images.shape[1:] != self._images.shape[1:]:
            rule = f"of one size in all batches, {list(self._images.shape[1:])}"
            raise ShapeError(message(where, "images", rule, list(images.shape[1:]), "Resize them before sketching."))
        return images.detach()

    def _checked_labels(self, labels: Tensor | Array | None, count: int) -> Array:
        """Labels int64 [n]; zeros for an unlabelled stream, which is treated as one class."""
        where = "SketchBuilder.update"
        if self._labelled is not None and self._labelled != (labels is not None):
            raise InputError(message(where, "labels", "given with every batch or with none", "some of each"))
        if labels is None:
            return np.zeros(count, dtype=np.int64)
        values = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
        if values.dtype.kind not in "iu":
            raise DtypeError(message(where, "labels", "integers", values.dtype))
        if values.shape != (count,):
            raise ShapeError(message(where, "labels", f"[{count}], one per image", list(values.shape)))
        if count and (int(values.min()) < 0 or int(values.max()) >= MAX_CLASSES):
            got = int(values.min()) if int(values.min()) < 0 else int(values.max())
            raise InputError(message(where, "labels", f"in 0..{MAX_CLASSES - 1}", got))
        return values.astype(np.int64)


def sketch(batches: Iterable[Any], capacity: int = 500, *, seed: int = 0, stream: int = 0) -> Sketch:
    """Sketch a stream of batches in one pass.

    Args:
        batches: (images, labels) pairs or images alone; uint8 [n, H, W, 3], int64 [n]. An ``ImageSource`` is one.
        capacity: the most images that are kept.
        seed: of the random choice.
        stream: number of this stream; parts that will be merged need different numbers and the same seed.

    Raises:
        InputError: an empty stream, or a batch that does not fit; see :meth:`SketchBuilder.update`.
    """
    builder = SketchBuilder(capacity, seed=seed, stream=stream)
    for batch in batches:
        images, labels = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
        builder.update(images, labels)
    return builder.finish()


def _select(
    labels: Array,
    keys: Array,
    streams: Array,
    indices: Array,
    capacity: int,
) -> Array:
    """Rows that stay: the first ``capacity`` by (rank of the key within its class, key). Inputs [n], result [n']."""
    if len(keys) <= capacity:
        return np.arange(len(keys))
    by_class = np.lexsort((indices, streams, keys, labels))  # stream and index decide between equal keys
    sorted_labels = labels[by_class]
    starts = np.flatnonzero(np.diff(sorted_labels, prepend=-1))  # first row of each class
    sizes = np.diff(starts, append=len(labels))
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[by_class] = np.arange(len(labels)) - np.repeat(starts, sizes)
    return np.sort(np.lexsort((indices, streams, keys, ranks))[:capacity])


def _lower_thresholds(thresholds: Array, labels: Array, keys: Array, kept: Array) -> None:
    """Lower each class's threshold, in place, to the smallest key dropped of it."""
    dropped = np.ones(len(keys), dtype=np.bool_)
    dropped[kept] = False
    np.minimum.at(thresholds, labels[dropped], keys[dropped])


def _take(sketch: Sketch, rows: Tensor) -> Sketch:
    """Some images of a sketch in their final order: random, but fixed by the seed, the streams and the set itself."""
    indices, streams = sketch.indices[rows].numpy(), sketch.stream_ids[rows].numpy()
    draws = np.random.Generator(np.random.PCG64(np.random.SeedSequence(sketch.seed, spawn_key=(1, *sketch.streams))))
    order = rows[torch.from_numpy(np.lexsort((indices, streams))[draws.permutation(len(rows))])]
    return replace(
        sketch,
        images=sketch.images[order],
        labels=None if sketch.labels is None else sketch.labels[order],
        indices=sketch.indices[order],
        stream_ids=sketch.stream_ids[order],
        keys=sketch.keys[order],
    )


def _labels(sketch: Sketch) -> Tensor:
    """Labels of a sketch; an unlabelled one is a single class."""
    return torch.zeros(len(sketch), dtype=torch.int64) if sketch.labels is None else sketch.labels


def _padded(values: Tensor, length: int, fill: float) -> Tensor:
    """[K] extended to [length]."""
    return torch.cat([values, values.new_full((length - len(values),), fill)])
