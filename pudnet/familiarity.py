"""Whether a dataset is like those that a hypernetwork was trained on: distances between dataset embeddings.

E training datasets, S images in one of them, d = G * D values of an embedding.

The squared distance of two datasets is the mean over the d values of their squared difference, each in units of its
standard deviation over the training datasets. Part of the difference is chance: each embedding is a mean over a sample
of images. That part, known from the spread of single images and their number, is taken off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pudnet.errors import CheckpointError, message, one_line

KNOWN = 64  # training datasets that a checkpoint remembers
QUANTILE = 0.99  # of other training datasets are nearer to one of these than the threshold
DIGITS = 3  # of what the card holds
LEAST_SCALE = 0.1  # of the mean standard deviation; values that hardly vary in training would outweigh all others


class Familiarity(NamedTuple):
    """How far a dataset is from the nearest training dataset, and from which distance on it is unlike them."""

    distance: float
    threshold: float

    @property
    def unlike(self) -> bool:
        return self.distance > self.threshold


def describe(features: Sequence[Tensor]) -> dict[str, Any]:
    """What a checkpoint's card tells of the datasets of its training.

    Args:
        features: of each dataset the embeddings of its single images, ``[S, d]``. The first ``KNOWN`` are remembered;
            how near the others are to them decides the threshold.
    """
    known, others = features[:KNOWN], features[KNOWN:]
    found = {
        "images": [len(part) for part in known],
        "spread": _rounded(torch.stack([part.var(0) for part in known]).mean(0).sqrt()),
        "embeddings": [_rounded(part.mean(0)) for part in known],
    }
    distances = torch.tensor([nearest(found, part.mean(0), len(part)) for part in others])
    return {**found, "threshold": round(float(distances.quantile(QUANTILE)), DIGITS)}


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]


def familiarity(known: Mapping[str, Any], embedding: Tensor, images: int) -> Familiarity:
    """Compare a dataset with those of the training.

    Args:
        known: what ``describe`` gave.
        embedding: of the dataset, ``[d]``.
        images: how many it is the mean of.

    Raises:
        CheckpointError: ``known`` is not of that form, or of another hypernetwork.
    """
    try:
        return Familiarity(nearest(known, embedding, images), float(known["threshold"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        rule = f"what describe gave of embeddings of {len(embedding)} values"
        raise CheckpointError(message("familiarity", "known", rule, one_line(error))) from error


def nearest(known: Mapping[str, Any], embedding: Tensor, images: int) -> float:
    """Distance to the nearest training dataset; 0 where chance explains all of it. Arguments as above."""
    rows = torch.tensor(known["embeddings"], dtype=torch.float64)  # [E, d]
    counts = torch.tensor(known["images"], dtype=torch.float64)  # [E]
    spread = torch.tensor(known["spread"], dtype=torch.float64)  # [d]
    scale = rows.std(0)
    scale = scale.clamp_min(LEAST_SCALE * float(scale.mean())).clamp_min(torch.finfo(torch.float32).tiny)
    squares = ((rows - embedding.double().cpu()) / scale).square().mean(1)  # [E]
    chance = (spread / scale).square().mean() * (1 / images + 1 / counts)  # [E]
    return float((squares - chance).min().clamp_min(0).sqrt())
