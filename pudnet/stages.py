"""Where the time of a prediction goes, stage by stage."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch

from pudnet.data import ImageSource
from pudnet.serving import Token, Watched, check

T = TypeVar("T")

STAGES = ("reading", "sketch", "weights", "directions", "calibration", "head")


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

    def watched(self, images: Any, labels: Any) -> Any:
        """``images`` for ``open_images``; where it reads items one by one, ``cancel`` is looked at before each."""
        at_once = (str, os.PathLike, np.ndarray, torch.Tensor, ImageSource)
        if self._cancel is None or labels is not None or isinstance(images, at_once):
            return images
        return Watched(images, self.check)

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
