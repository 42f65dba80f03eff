"""A folder of image files with one sub-folder per class."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pudnet.data import png
from pudnet.data.base import WHERE, ImageSource, check_counts, quoted
from pudnet.data.pillow import UnreadableImageError, decode_file
from pudnet.data.png import Array
from pudnet.data.preprocess import Preprocess, array_tensor
from pudnet.errors import InputError, message

TEST_FOLDERS = ("test", "val", "validation")
THREADS = min(8, os.cpu_count() or 1)
# Files that take fewer seconds are decoded by one thread, batch by batch: most of that time is the interpreter's, and
# several threads that take turns with it are slower than one.
QUICK = 1e-3
TRIED, MANY = 3, 64  # files by which that is found out, in folders of so many
TOGETHER = 2**20  # values of images that are resized at once: much less overhead where they are small


class FolderSource(ImageSource):
    """Images of a folder, in the order of classes and file names.

    Every pass decodes with a few threads, or with one where files are small, a batch ahead of the reader; what was
    resized is kept up to ``cache_bytes``. Files that cannot be read are skipped and listed; the first complete pass
    knows the counts and checks the classes.
    """

    def __init__(
        self,
        root: Path,
        *,
        preprocess: Preprocess,
        split: str,
        classes: Sequence[str] | None,
        batch_size: int,
        cache_bytes: int,
        follow_symlinks: bool,
    ) -> None:
        self._preprocess = preprocess
        self.size = preprocess.size
        self._root = root
        self._real_root = Path(os.path.realpath(root))
        self._follow = follow_symlinks
        self._reasons: dict[str, str] = {}
        self._given = classes is not None
        files = self._list_classes(split)
        self.classes = tuple(classes) if classes is not None else tuple(files)
        strange = [name for name in files if name not in self.classes]
        if strange:
            rule = f"among the model's {len(self.classes)} classes ({quoted(self.classes)})"
            raise InputError(message(WHERE, "the class folders", rule, f"also {quoted(strange)}"))
        if not self._given:
            check_counts(self.classes, [len(files.get(name, [])) for name in self.classes])
        self.counts = None
        self.skipped = tuple(self._reasons.items())
        labelled = [(path, self.classes.index(name)) for name, paths in files.items() for path in paths]
        if len(labelled) >= png.WORTH and labelled[0][0].suffix.lower() == ".png":
            png.opencv()
        self._chunks = [labelled[start : start + batch_size] for start in range(0, len(labelled), batch_size)]
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}
        self._cache_left = cache_bytes

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        counts = torch.zeros(len(self.classes), dtype=torch.int64)
        together = self._quick()
        pool = ThreadPoolExecutor(1 if together else THREADS, thread_name_prefix="pudnet-decode")
        try:
            ahead = self._start(pool, 0, together)
            for number in range(len(self._chunks)):
                futures, ahead = ahead, self._start(pool, number + 1, together)
                images, labels = self._collect(number, futures)
                if len(labels):
                    counts += torch.bincount(labels, minlength=len(counts))
                    yield images, labels
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        if self.counts is None:
            self._finish_first_pass(tuple(counts.tolist()))

    def _quick(self) -> bool:
        """Whether the files that have to be decoded take little time each, as the first ones do."""
        if sum(map(len, self._chunks)) < MANY:
            return False
        left = (path for number, chunk in enumerate(self._chunks) if number not in self._cache for path, _ in chunk)
        seconds = []
        for path in itertools.islice(left, TRIED):
            start = time.perf_counter()
            self._decode(path)
            seconds.append(time.perf_counter() - start)
        return min(seconds, default=0.0) < QUICK

    def _start(self, pool: ThreadPoolExecutor, number: int, together: bool) -> list[Future[list[Tensor | str]]]:
        """Begin to decode one batch of files, in one task or one each; no task if it is cached or beyond the end."""
        if number >= len(self._chunks) or number in self._cache:
            return []
        paths = [path for path, _ in self._chunks[number]]
        return [pool.submit(self._decode_all, part) for part in ([paths] if together else [[path] for path in paths])]

    def _decode_all(self, paths: list[Path]) -> list[Tensor | str]:
        """For each file uint8 [1, size, size, 3], or why there is none; neighbours of one shape are resized together.

        Files known to be unreadable are not tried again.
        """
        found: list[Tensor | str] = []
        alike: list[Array] = []

        def resize() -> None:
            if alike:
                images = np.stack(alike) if len(alike) > 1 else alike[0][None]
                found.extend(self._preprocess.resize(array_tensor(images)).split(1))
                alike.clear()

        for one in map(self._decode, paths):
            if isinstance(one, str):
                resize()
                found.append(one)
                continue
            if alike and (one.shape != alike[0].shape or (len(alike) + 1) * one.size > TOGETHER):
                resize()
            alike.append(one)
        resize()
        return found

    def _decode(self, path: Path) -> Array | str:
        if str(path) in self._reasons:
            return self._reasons[str(path)]
        try:
            return decode_file(path)
        except UnreadableImageError as error:
            return str(error)

    def _collect(self, number: int, futures: list[Future[list[Tensor | str]]]) -> tuple[Tensor, Tensor]:
        """Images uint8 [n, size, size, 3] and labels int64 [n] of one batch; notes the files that were skipped."""
        if number in self._cache:
            return self._cache[number]
        images, labels = [], []
        results = itertools.chain.from_iterable(future.result() for future in futures)
        for (path, label), result in zip(self._chunks[number], results, strict=True):
            if isinstance(result, Tensor):
                images.append(result)
                labels.append(label)
            elif self.counts is not None and str(path) not in self._reasons:
                raise InputError(message(WHERE, "files", "left alone while they are read", f"{str(path)!r} ({result})"))
            else:
                self._reasons[str(path)] = result
        self.skipped = tuple(self._reasons.items())
        size = self._preprocess.size
        stacked = torch.cat(images) if images else torch.empty(0, size, size, 3, dtype=torch.uint8)
        batch = (stacked, torch.tensor(labels, dtype=torch.int64))
        if stacked.numel() <= self._cache_left:
            self._cache[number] = batch
            self._cache_left -= stacked.numel()
        return batch

    def _finish_first_pass(self, counts: tuple[int, ...]) -> None:
        if self._given:
            if not sum(counts):
                raise InputError(message(WHERE, "the folder", "of readable images", f"none in {str(self._root)!r}"))
        else:
            self.warnings = check_counts(self.classes, counts)
        self.counts = counts

    def _list_classes(self, split: str) -> dict[str, list[Path]]:
        """Files per class of the wanted split, sorted; a class of the training part without files has an empty list."""
        parts = self._split_folders()
        if parts is None:
            files = self._class_files(self._root)
            if not files:
                links = any("symlink" in reason for reason in self._reasons.values())
                hint = "Symlinks out of it: open_images(folder, follow_symlinks=True)." if links else ""
                rule = "a folder with one sub-folder of images per class"
                raise InputError(message(WHERE, "source", rule, f"{str(self._root)!r} without any sub-folder", hint))
            return files
        train, test = parts
        names = self._visible_folders(train)
        if test is not None:
            strange = [name for name in self._visible_folders(test) if name not in names]
            if strange:
                rule = f"a part of the classes in {str(train)!r}"
                raise InputError(message(WHERE, f"classes in {str(test)!r}", rule, f"also {quoted(strange)}"))
        if split == "train":
            return self._class_files(train)
        if test is None:
            rule = f"a folder with {' or '.join(TEST_FOLDERS)} beside train, each with one sub-folder per class"
            raise InputError(message(WHERE, "source", rule, repr(str(self._root)), "Or use split='train'."))
        found = self._class_files(test)
        return {name: found.get(name, []) for name in names}

    def _split_folders(self) -> tuple[Path, Path | None] | None:
        """The folders of the training and the test part, or None where the folder is not divided into parts."""
        names = self._visible_folders(self._root)
        if "train" not in names or not self._visible_folders(self._root / "train"):
            return None
        if names != ["train"] and not set(names) & set(TEST_FOLDERS):
            return None  # a class that happens to be called train
        tests = [self._root / name for name in TEST_FOLDERS if name in names]
        return self._root / "train", next((path for path in tests if self._visible_folders(path)), None)

    def _class_files(self, folder: Path) -> dict[str, list[Path]]:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if not entry.name.startswith(".") and not os.path.isdir(entry.path):
                self._reasons[entry.path] = "not in the sub-folder of a class"
        names = self._visible_folders(folder, note=True)
        return {name: list(self._walk(folder / name, (os.path.realpath(folder),))) for name in names}

    def _visible_folders(self, folder: Path, note: bool = False) -> list[str]:
        """Names of the sub-folders that are neither hidden nor forbidden symlinks, sorted."""
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            got = f"{str(folder)!r} ({error.strerror})"
            raise InputError(message(WHERE, "source", "a folder that can be read", got)) from error
        folders = [entry for entry in entries if not entry.name.startswith(".") and os.path.isdir(entry.path)]
        return [entry.name for entry in folders if self._allowed(entry, note)]

    def _allowed(self, entry: os.DirEntry[str], note: bool = True) -> bool:
        """Whether an entry may be read: symlinks that leave the folder only when asked for."""
        if self._follow or not entry.is_symlink() or Path(os.path.realpath(entry.path)).is_relative_to(self._real_root):
            return True
        if note:
            self._reasons[entry.path] = "a symlink that leaves the folder"
        return False

    def _walk(self, folder: Path, ancestors: tuple[str, ...]) -> Iterator[Path]:
        """Files below a folder, sorted by name; links back to a folder they lie in are not followed."""
        real = os.path.realpath(folder)
        if real in ancestors:
            self._reasons[str(folder)] = "a symlink to a folder it lies in"
            return
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            self._reasons[str(folder)] = error.strerror or "a folder that cannot be read"
            return
        for entry in entries:
            if entry.name.startswith(".") or not self._allowed(entry):
                continue
            if os.path.isdir(entry.path):
                yield from self._walk(folder / entry.name, (*ancestors, real))
            elif os.path.isfile(entry.path):
                yield folder / entry.name
            else:
                self._reasons[entry.path] = "a broken symlink" if entry.is_symlink() else "not a regular file"
