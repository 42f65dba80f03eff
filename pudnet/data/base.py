"""What every source of labelled images offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pudnet.errors import InputError, message

WHERE = "open_images"


class ImageSource(ABC):
    """Labelled images of one size, in batches. Several passes give the same images in the same order.

    Batches are on the CPU and may share memory with the source or its cache: read them, do not write into them.

    Attributes:
        size: side of the images.
        classes: class names, in label order.
        counts: images per class, in label order; None while they are not known (a folder before its first pass).
        skipped: (file, reason) of each file that was not read; filled while reading.
        warnings: what a user should know but that is no error; filled while reading.
    """

    size: int
    classes: tuple[str, ...]
    counts: tuple[int, ...] | None
    skipped: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images uint8 [n, size, size, 3] and labels int64 [n], n at least 1 and at most the batch size."""

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All images uint8 [n, size, size, 3] and all labels int64 [n] at once."""
        images, labels = zip(*self, strict=True)
        return torch.cat(images), torch.cat(labels)


def check_counts(classes: Sequence[str], counts: Sequence[int], where: str = WHERE) -> tuple[str, ...]:
    """Check that images can teach their classes: two classes or more, none of them empty.

    Returns:
        Warnings: which classes have a single image.

    Raises:
        InputError: fewer than two classes, or a class without an image.
    """
    if len(classes) < 2:
        hint = "A classifier needs at least two classes."
        raise InputError(message(where, "the images", "of at least 2 classes", f"only {quoted(classes)}", hint))
    empty = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if empty:
        rule, hint = "given at least one readable image", "Add images to it, or remove the class."
        raise InputError(message(where, "every class", rule, f"none of {quoted(empty)}", hint))
    single = [name for name, count in zip(classes, counts, strict=True) if count == 1]
    return (f"one image only of {quoted(single)}: its accuracy cannot be estimated",) if single else ()


def quoted(names: Sequence[str], most: int = 5) -> str:
    """A few names for a message: ``'a', 'b' and 3 more``."""
    shown = ", ".join(repr(name) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown or "nothing"
