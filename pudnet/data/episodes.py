"""Groups (episodes): small datasets of random classes, made on the fly from large ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pudnet.data import families
from pudnet.data.preprocess import Preprocess
from pudnet.errors import InputError, message


@dataclass(frozen=True)
class ClassPool:
    """The images of one source, by class.

    Attributes:
        images: uint8 ``[N, H, W, 3]``.
        members: for each class, the indices of its images.
        classes: their names.
    """

    images: Tensor
    members: tuple[np.ndarray, ...]
    classes: tuple[str, ...]

    @property
    def smallest(self) -> int:
        """Images of the smallest class."""
        return min(map(len, self.members), default=0)

    @classmethod
    def build(cls, images: Tensor, labels: Tensor, classes: Sequence[str], keep: Sequence[str]) -> ClassPool:
        """Collect the classes named in ``keep``, in that order."""
        label_of = {name: label for label, name in enumerate(classes)}
        numbers = labels.numpy()
        members = tuple(np.flatnonzero(numbers == label_of[name]) for name in keep)
        return cls(images, members, tuple(keep))


@dataclass(frozen=True)
class Episode:
    """One small dataset: support images first, then query images, both in class order.

    Attributes:
        images: normalised ``[K * (support + query), 3, H, W]``.
        labels: class within the episode, ``[K * (support + query)]``.
        classes: which classes of the pool these are, ``[K]``.
        support: how many of the images are support images.
    """

    images: Tensor
    labels: Tensor
    classes: Tensor
    support: int


def sample_episode(
    pool: ClassPool,
    rng: np.random.Generator,
    preprocess: Preprocess,
    *,
    classes: int,
    support: int,
    query: int,
    crop: int = 0,
    flip: bool = False,
    colour: float = 0.0,
    transform: float = 0.0,
) -> Episode:
    """Draw ``classes`` classes and ``support + query`` different images of each; augment and normalise them.

    With a chance of ``transform`` all of them undergo the same changes (``families.transform``), with one of ``colour``
    the same colour map.

    Raises:
        InputError: the pool has too few classes, or a class too few images.
    """
    where = "sample_episode"
    if classes > len(pool.members):
        raise InputError(message(where, "classes", f"at most {len(pool.members)}, the classes there are", classes))
    chosen = rng.choice(len(pool.members), classes, replace=False)
    drawn = []
    for label in chosen:
        members = pool.members[label]
        if len(members) < support + query:
            rule = f"classes of at least {support + query} images"
            raise InputError(message(where, "pool", rule, f"{len(members)} in {pool.classes[label]!r}"))
        drawn.append(rng.choice(members, support + query, replace=False))
    table = np.stack(drawn)  # [K, support + query]
    index = np.concatenate([table[:, :support].ravel(), table[:, support:].ravel()])
    labels = np.concatenate([np.repeat(np.arange(classes), support), np.repeat(np.arange(classes), query)])
    picked = pool.images[torch.from_numpy(index)]
    if transform and rng.random() < transform:  # without it, the draws are those there were before it existed
        picked = families.transform(picked, rng)
    images = augmented(picked, rng, preprocess, crop=crop, flip=flip, colour=colour)
    return Episode(images, torch.from_numpy(labels), torch.from_numpy(chosen), classes * support)


def augmented(
    images: Tensor, rng: np.random.Generator, preprocess: Preprocess, *, crop: int, flip: bool, colour: float
) -> Tensor:
    """Augment and normalise uint8 images: ``[n, H, W, 3] -> [n, 3, H, W]``; one colour map for all of them."""
    images = images.permute(0, 3, 1, 2).float() / 255
    if crop:
        images = _shift(images, crop, rng)
    if flip:
        mirrored = torch.from_numpy(rng.random(len(images)) < 0.5)
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    if rng.random() < colour:
        images = _colour_map(images, rng)
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocess.mean, preprocess.std))
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def _shift(images: Tensor, pixels: int, rng: np.random.Generator) -> Tensor:
    """Move each image by up to ``pixels`` in both directions, reflecting at the border."""
    n, _, height, width = images.shape
    padded = F.pad(images, (pixels,) * 4, mode="reflect")
    top, left = (torch.from_numpy(rng.integers(0, 2 * pixels + 1, n)) for _ in range(2))
    rows = top[:, None] + torch.arange(height)  # [n, H]
    columns = left[:, None] + torch.arange(width)  # [n, W]
    batch = torch.arange(n)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _colour_map(images: Tensor, rng: np.random.Generator) -> Tensor:
    """One random linear colour map for a whole dataset: grey, mixed or exchanged channels, perhaps inverted."""
    kind = rng.integers(3)
    if kind == 0:
        matrix = np.tile(rng.dirichlet((2, 2, 2)), (3, 1))
    elif kind == 1:
        matrix = np.eye(3)[rng.permutation(3)]
    else:
        matrix = np.eye(3) + 0.4 * rng.standard_normal((3, 3))
        matrix /= np.abs(matrix).sum(axis=1, keepdims=True)
    if rng.random() < 0.5:
        matrix = -matrix
    mapped = torch.einsum("ij,njhw->nihw", torch.from_numpy(matrix).float(), images - 0.5)
    return (mapped * float(rng.uniform(0.7, 1.3)) + 0.5).clamp(0, 1)
