"""The one door through which labelled images come in: folders, .npz files, arrays, and torch datasets."""

from __future__ import annotations

import os
import struct
import sys
import tempfile
import tokenize
import weakref
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pudnet.data.base import WHERE, ImageSource, check_counts
from pudnet.data.labels import index_labels, label_array
from pudnet.data.preprocess import Preprocess, uint8_batch
from pudnet.errors import DtypeError, InputError, ShapeError, message

__all__ = ["ImageSource", "open_images"]

Array = np.ndarray[Any, Any]
CHANNELS = (1, 3, 4)
BOMB_BYTES, BOMB_RATIO = 2**28, 200  # images compress 2 to 10 times
# What numpy and zipfile raise at damaged files, the most surprising at lengths and methods that bytes were flipped in.
DAMAGED_NPZ = (
    OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, SyntaxError, OverflowError, MemoryError,
    RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError,
)  # fmt: skip
KINDS = "a folder, an .npz file, an array or tensor with labels, or a Dataset, DataLoader or iterable of (image, label)"


def open_images(
    source: Any,
    labels: Any = None,
    *,
    size: int,
    split: str = "train",
    classes: Sequence[str] | None = None,
    batch_size: int = 256,
    cache_bytes: int = 2**30,
    follow_symlinks: bool = False,
) -> ImageSource:
    """Open labelled images of any kind as batches of uint8 RGB images of one size.

    Kinds of ``source``:

    - a folder with one sub-folder per class, holding any images Pillow reads. If it has ``train/`` and ``test/`` (or
      ``val/``) with class folders inside, ``split`` chooses between them. Hidden files are ignored; files that cannot
      be read are skipped and listed in ``skipped``;
    - a path to an ``.npz`` with ``x_train, y_train[, x_test, y_test, class_names]``, x uint8 [n, H, W, C] (or
      ``x_train_d2``: the planes G, R-G, B-G, differenced along both axes modulo 256, [3, n, H, W]);
    - an array or tensor [n, H, W, C], [n, C, H, W] or grey [n, H, W], uint8 or float in 0..1, with ``labels`` [n];
    - a torch ``Dataset``, a ``DataLoader``, or any iterable of (image, label), single or in batches; images are Pillow
      images, arrays or tensors ([H, W, C] or [C, H, W]). It is read once, here; what exceeds ``cache_bytes`` goes to an
      unnamed temporary file. A list of images of different sizes with ``labels`` is read the same way;
    - what this function returned: so the options that only it has reach ``Predictor.predict`` and its like.

    Labels: with class names (``class_names``, folder names, a dataset's ``classes``) an integer label is a position in
    them. Without, the classes are the distinct labels in sorted order, named ``str(label)``. With ``classes`` given (a
    model is evaluated), labels are matched to those names; unnamed integers are positions in them, unless the names
    are integers themselves.

    Args:
        source: see above.
        labels: integers (0 or more) or strings [n], for arrays and lists of images only.
        size: side of the images that come out.
        split: "train" or "test"; matters for folders and .npz files that have both.
        classes: the class names to map to, or None to take those of the source, which must then be two or more, none
            of them without images.
        batch_size: images per batch at most.
        cache_bytes: memory for images that would have to be decoded again.
        follow_symlinks: follow links that lead out of the folder.

    Raises:
        InputError: the source is missing, empty, damaged or of no known kind, has one class only, an empty class,
            labels that do not fit, or classes that are not among those of its training part or of ``classes``.
    """
    preprocess = Preprocess(size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    if split not in ("train", "test"):
        raise InputError(message(WHERE, "split", "'train' or 'test'", repr(split)))
    if batch_size < 1:
        raise InputError(message(WHERE, "batch_size", "at least 1", batch_size))
    names = None if classes is None else tuple(str(name) for name in classes)
    if isinstance(source, ImageSource):
        return _opened(source, labels, size, names)
    if isinstance(source, (str, os.PathLike)):
        if labels is not None:
            raise InputError(message(WHERE, "labels", "None for a path", "labels", "The path's content has them."))
        path = Path(source)
        if path.is_dir():
            from pudnet.data.folder import FolderSource

            return FolderSource(
                path,
                preprocess=preprocess,
                split=split,
                classes=names,
                batch_size=batch_size,
                cache_bytes=cache_bytes,
                follow_symlinks=follow_symlinks,
            )
        return _open_npz(path, split, names, preprocess, batch_size)
    if isinstance(source, (np.ndarray, Tensor)):
        if labels is None:
            raise InputError(message(WHERE, "labels", "given with an array of images", "None"))
        values = label_array(labels)
        return ArraySource(source, values, None, names, None, preprocess, batch_size)
    class_names = _dataset_classes(source)
    if labels is not None:
        source = _pairs(source, labels)
    return StreamSource(items_of(source), class_names, names, preprocess, batch_size, cache_bytes)


def _opened(source: ImageSource, labels: Any, size: int, classes: tuple[str, ...] | None) -> ImageSource:
    """A source that was opened before, if it was opened as is asked for now."""
    if labels is not None:
        raise InputError(message(WHERE, "labels", "None for a source that has them", "labels"))
    if source.size != size:
        raise InputError(message(WHERE, "source", f"opened with size={size}", f"size={source.size}"))
    if classes is not None and source.classes != classes:
        raise InputError(message(WHERE, "source", f"opened with classes={list(classes)}", list(source.classes)))
    return source


class ArraySource(ImageSource):
    """Images of one array; those of the right size and kind are handed out without a copy."""

    def __init__(
        self,
        images: Array | Tensor,
        values: Array,
        class_names: Sequence[str] | None,
        classes: Sequence[str] | None,
        known: Array | None,
        preprocess: Preprocess,
        batch_size: int,
    ) -> None:
        if images.ndim == 0 or len(images) == 0:
            raise InputError(message(WHERE, "images", "at least one image", f"shape {list(images.shape)}"))
        channels_last(images[:1], WHERE)  # shape and dtype are checked before the labels
        if len(images) != len(values):
            raise ShapeError(message(WHERE, "labels", f"as many as the images ({len(images)})", len(values)))
        self._labels, self.classes, self.counts = index_labels(values, class_names, classes, known)
        if classes is None and known is None:
            self.warnings = check_counts(self.classes, self.counts)
        self._preprocess = preprocess
        self.size = preprocess.size
        self._batch_size = batch_size
        if images.dtype not in (np.uint8, torch.uint8):  # checked to be float; bytes take a quarter of the memory
            parts = range(0, len(images), batch_size)
            images = torch.cat([channels_last(images[start : start + batch_size], WHERE).cpu() for start in parts])
        self._images = images

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self._labels), self._batch_size):
            part = slice(start, start + self._batch_size)
            yield self._preprocess.resize(channels_last(self._images[part], WHERE)).cpu(), self._labels[part]

    def tensors(self) -> tuple[Tensor, Tensor]:
        if tuple(self._images.shape[1:]) == (self.size, self.size, 3):
            return uint8_batch(self._images, WHERE).cpu(), self._labels
        return super().tensors()


class StreamSource(ImageSource):
    """Images of an iterable, read once when opened, so that later passes cannot differ."""

    def __init__(
        self,
        items: Iterable[Any],
        class_names: Sequence[str] | None,
        classes: Sequence[str] | None,
        preprocess: Preprocess,
        batch_size: int,
        cache_bytes: int,
    ) -> None:
        self._store = _Store(cache_bytes)
        found: list[Any] = []
        self.size = size = preprocess.size
        batch, filled = torch.empty(batch_size, size, size, 3, dtype=torch.uint8), 0
        for number, item in enumerate(items):
            images, labels = _item_batch(item, f"{WHERE}: item {number}", preprocess)
            found.extend(labels)
            while len(images):
                count = min(len(images), batch_size - filled)
                batch[filled : filled + count] = images[:count]  # a copy: the iterable may reuse its buffers
                images, filled = images[count:], filled + count
                if filled == batch_size:
                    self._store.append(batch)
                    batch, filled = torch.empty_like(batch), 0
        if not found:
            raise InputError(message(WHERE, "source", "at least one (image, label)", "an empty iterable"))
        if filled:
            self._store.append(batch[:filled].clone())
        values = label_array(found)
        if class_names is not None and values.dtype.kind != "U" and values.max() < len(class_names):
            used, values = np.unique(values, return_inverse=True)  # a Subset may hold a part of the named classes
            class_names = [class_names[index] for index in used]
        self._labels, self.classes, self.counts = index_labels(values, class_names, classes)
        if classes is None:
            self.warnings = check_counts(self.classes, self.counts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        start = 0
        for images in self._store:
            yield images, self._labels[start : start + len(images)]
            start += len(images)


class _Store:
    """Image batches in memory up to a limit, the rest in an unnamed temporary file."""

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._batches: list[Tensor | tuple[int, tuple[int, ...]]] = []  # in memory, or (offset, shape) in the file
        self._file: Any = None

    def append(self, batch: Tensor) -> None:
        if batch.numel() <= self._left:
            self._left -= batch.numel()
            self._batches.append(batch)
            return
        self._left = 0
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - lives as long as the store
                weakref.finalize(self, self._file.close)
            offset = self._file.seek(0, os.SEEK_END)
            rest = batch.contiguous().numpy().reshape(-1).data
            while len(rest):
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            rule = "one whose images fit into memory and the folder for temporary files"
            raise InputError(message(WHERE, "source", rule, error.strerror, "Set TMPDIR, or free space.")) from error
        self._batches.append((offset, tuple(batch.shape)))

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._batches:
            if isinstance(batch, Tensor):
                yield batch
                continue
            offset, shape = batch
            buffer = bytearray(int(np.prod(shape)))
            self._file.seek(offset)
            self._file.readinto(buffer)
            yield torch.frombuffer(buffer, dtype=torch.uint8).view(shape)


def channels_last(images: Array | Tensor, where: str) -> Tensor:
    """A batch uint8 or float in 0..1, [n, H, W, C], [n, C, H, W] or [n, H, W], as uint8 [n, H, W, C].

    The last axis is taken for the channels if it has 1, 3 or 4 entries, else the second one.

    Raises:
        ShapeError, DtypeError: another shape or dtype.
        InputError: float values that are NaN or outside 0..1.
    """
    if images.ndim == 4 and images.shape[3] not in CHANNELS and images.shape[1] in CHANNELS:
        images = images.permute(0, 2, 3, 1) if isinstance(images, Tensor) else images.transpose(0, 2, 3, 1)
    floating = images.is_floating_point() if isinstance(images, Tensor) else images.dtype.kind == "f"
    if not floating:
        return uint8_batch(images, where)
    values = images.detach() if isinstance(images, Tensor) else torch.from_numpy(images.astype(np.float32))
    low, high = (float(value) for value in values.float().aminmax())
    if not (low >= -1e-3 and high <= 1.001):  # a little is left to interpolation; NaN fails any comparison
        got = "NaN" if low != low or high != high else f"values from {low:g} to {high:g}"
        hint = "Give 0..255 as uint8, or undo a normalisation: the model does its own."
        raise InputError(message(where, "float images", "finite and in 0..1", got, hint))
    return uint8_batch((values.float() * 255).round().clamp(0, 255).to(torch.uint8), where)


def _item_batch(item: Any, where: str, preprocess: Preprocess) -> tuple[Tensor, list[Any]]:
    """One (image, label) or one batch of them as uint8 [n, size, size, 3] and n labels."""
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise InputError(message(where, "each item", "a pair (image, label)", type(item).__name__))
    images, label = item
    if isinstance(label, (np.ndarray, Tensor)):
        labels = [label] if label.ndim == 0 else list(label)
    else:
        labels = list(label) if isinstance(label, (list, tuple)) else [label]
    if isinstance(images, (list, tuple)):
        batch = torch.cat([preprocess.resize(_single(image, where)).cpu() for image in images])
    elif isinstance(images, (np.ndarray, Tensor)) and (images.ndim == 4 or (images.ndim == 3 and len(labels) > 1)):
        batch = preprocess.resize(channels_last(images, where)).cpu()
    else:
        batch = preprocess.resize(_single(images, where)).cpu()
    if len(batch) != len(labels):
        raise ShapeError(message(where, "labels", f"as many as the images ({len(batch)})", len(labels)))
    return batch, labels


def _single(image: Any, where: str) -> Tensor:
    """One Pillow image, array or tensor as uint8 [1, H, W, C]."""
    pillow = sys.modules.get("PIL.Image")  # an image of Pillow exists only where Pillow was imported
    if pillow is not None and isinstance(image, pillow.Image):
        from pudnet.data.pillow import rgb_array

        image = rgb_array(image)
    if not isinstance(image, (np.ndarray, Tensor)):
        rule = "a Pillow image, an array or a tensor"
        raise DtypeError(message(where, "image", rule, type(image).__name__))
    if image.ndim not in (2, 3):
        raise ShapeError(message(where, "image", "[H, W], [H, W, C] or [C, H, W]", list(image.shape)))
    return channels_last(image[None, :, :, None] if image.ndim == 2 else image[None], where)


def _pairs(images: Any, labels: Any) -> Iterator[tuple[Any, Any]]:
    """(image, label) of a list of images and its labels."""
    if not hasattr(images, "__len__") or not hasattr(images, "__getitem__"):
        raise InputError(message(WHERE, "source", "an array or a list where labels are given", type(images).__name__))
    values = label_array(labels)
    if len(images) != len(values):
        raise ShapeError(message(WHERE, "labels", f"as many as the images ({len(images)})", len(values)))
    return zip((images[index] for index in range(len(images))), values.tolist(), strict=True)


def items_of(source: Any) -> Iterable[Any]:
    """Iterate an iterable, or a map-style dataset by its indices."""
    if isinstance(source, (dict, bytes)):
        raise InputError(message(WHERE, "source", KINDS, type(source).__name__))
    if hasattr(source, "__iter__"):
        items: Iterable[Any] = source
        return items
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        return (source[index] for index in range(len(source)))
    raise InputError(message(WHERE, "source", KINDS, type(source).__name__))


def _dataset_classes(source: Any) -> list[str] | None:
    """The class names a dataset carries (``classes``, as torchvision's), looked up through loaders and subsets."""
    while source is not None:
        names = getattr(source, "classes", None)
        if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
            return list(names)
        source = getattr(source, "dataset", None)
    return None


def _open_npz(
    path: Path, split: str, classes: Sequence[str] | None, preprocess: Preprocess, batch_size: int
) -> ArraySource:
    """The training or test part of an .npz file."""
    if not path.exists():
        raise InputError(message(WHERE, "source", "an existing folder or .npz file", repr(str(path))))
    rule = "a folder, or an .npz file with x_train and y_train"
    try:
        with open(path, "rb") as start:
            if start.read(2) not in (b"PK", b"\x93N"):  # numpy would take it for a pickle, and advise to trust it
                raise ValueError("neither")
        if zipfile.is_zipfile(path):
            _refuse_bomb(path)
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("a single array")
        with loaded as file:
            keys = list(file.files)
            arrays: dict[str, Array] = {key: file[key] for key in keys if key in ("y_train", "y_test", "class_names")}
            images = _npz_images(file, keys, split, path)
    except DAMAGED_NPZ as error:
        if isinstance(error, InputError):
            raise
        got = f"{str(path)!r} ({' '.join(str(error).split()) or type(error).__name__})"
        raise InputError(message(WHERE, "source", rule, got)) from error
    if f"y_{split}" not in arrays:
        raise InputError(message(WHERE, "source", f"an .npz with y_{split}", f"{str(path)!r} with {_listed(keys)}"))
    values = {key: label_array(array, key) for key, array in arrays.items()}
    names = [str(name) for name in values["class_names"]] if "class_names" in values else None
    known = values.get("y_train")
    own = known if split == "test" else None
    source = ArraySource(images, values[f"y_{split}"], names, classes, own, preprocess, batch_size)
    if known is not None and "y_test" in values:
        index_labels(values["y_test"], names, None, known)  # the parts must agree, whichever is read
    return source


def _refuse_bomb(path: Path) -> None:
    """Raise ValueError where an archive grows so much that no images can be in it."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.file_size > BOMB_BYTES and member.file_size > BOMB_RATIO * member.compress_size:
                raise ValueError(f"a decompression bomb: {member.compress_size} bytes become {member.file_size}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "nothing"


def _npz_images(file: Any, keys: Sequence[str], split: str, path: Path) -> Array:
    if f"x_{split}" in keys:
        return np.asarray(file[f"x_{split}"])
    if f"x_{split}_d2" not in keys:
        raise InputError(message(WHERE, "source", f"an .npz with x_{split}", f"{str(path)!r} with {_listed(keys)}"))
    planes = np.asarray(file[f"x_{split}_d2"])
    if planes.ndim != 4 or planes.shape[0] != 3 or planes.dtype != np.uint8:
        got = f"{planes.dtype} {list(planes.shape)}"
        raise ShapeError(message(WHERE, f"x_{split}_d2", "uint8 [3, n, H, W]", got))
    # Running sums undo the differences, modulo 256 by uint8 overflow; then R = (R-G) + G and B = (B-G) + G.
    green, red, blue = planes.cumsum(axis=2, dtype=np.uint8).cumsum(axis=3, dtype=np.uint8)
    return np.stack([red + green, green, blue + green], axis=-1)
