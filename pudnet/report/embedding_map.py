"""Where a dataset lies among others, as the hypernetwork sees it: dataset embeddings in their first two components.

S images of a sketch, G GRU layers of width D: an embedding has G * D values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pudnet.models.pudnet import PudNet

SUFFIX = ".embeddings.json"  # of the file beside a checkpoint, from ``training_embeddings.py``
PARTS = 4  # points of every dataset, each of its own images
PART_IMAGES = 50
SIDE = 64  # of the references, before they are resized
KNOWN = "The hollow circles are groups of classes that the hypernetwork was trained on."
UNKNOWN = "The checkpoint carries no embeddings of the datasets it was trained on."
MADE_UP = "The other datasets are references: what comes with scikit-learn, and made-up images."


@dataclass(frozen=True)
class Cloud:
    """One dataset on the map: ``points [m, 2]``, one for each part of it.

    ``kind``: ``"own"``, ``"training"`` (the checkpoint was trained on it) or ``"reference"``.
    """

    name: str
    points: Tensor
    kind: str


@dataclass(frozen=True)
class EmbeddingMap:
    """Datasets in the plane of the two principal components of all their embeddings.

    Attributes:
        explained: share of the variance that the two components have.
        nearest: name of the dataset whose mean is nearest to this one's, in all G * D dimensions.
        origin: what the references are, in words.
    """

    clouds: list[Cloud]
    explained: float
    nearest: str
    origin: str


def load_embeddings(checkpoint: Path, digest: str) -> dict[str, Tensor]:
    """Embeddings ``[m, G * D]`` by the name of their image set; none where no file belongs to this very checkpoint.

    Args:
        checkpoint: the file beside which they are.
        digest: its sha256.
    """
    try:
        found = json.loads(checkpoint.with_suffix(SUFFIX).read_text())
    except (OSError, ValueError):
        return {}
    if found.get("sha256") != digest:
        return {}
    return {name: torch.tensor(rows) for name, rows in found["embeddings"].items()}


@torch.no_grad()
def embedding_map(
    net: PudNet, name: str, images: Tensor, training: Mapping[str, Tensor] | None = None, *, seed: int = 0
) -> EmbeddingMap:
    """Embed a dataset and the references.

    Args:
        name: of the dataset.
        images: a sample of it, uint8 ``[S, H, W, 3]``.
        training: embeddings ``[m, G * D]`` of what ``net`` was trained on, by name, where they are known.
        seed: of everything random.
    """
    generator = torch.Generator().manual_seed(seed)
    images = images[torch.randperm(len(images), generator=generator)]
    parts = [part for part in images.tensor_split(PARTS) if len(part)]
    named = [(name, "own", _embed(net, parts))]
    named += [(title, "training", known) for title, known in (training or {}).items()]
    for title, references in REFERENCES.items():
        found = references(PARTS * PART_IMAGES, generator)
        if found is not None:
            named.append((title, "reference", _embed(net, list(found.tensor_split(PARTS)))))
    embedded = [points for _, _, points in named]
    means = torch.stack([one.mean(0) for one in embedded])
    distances = (means[1:] - means[0]).norm(dim=1)
    everything = torch.cat(embedded)
    everything = everything - everything.mean(0)
    _, values, components = torch.linalg.svd(everything, full_matrices=False)
    flat = everything @ components[:2].T  # [m, 2]
    places = flat.split([len(one) for one in embedded])
    clouds = [Cloud(title, points, kind) for (title, kind, _), points in zip(named, places, strict=True)]
    explained = float(values[:2].square().sum() / values.square().sum())
    nearest = clouds[1 + int(distances.argmin())].name
    return EmbeddingMap(clouds, explained, nearest, " ".join([KNOWN if training else UNKNOWN, MADE_UP]))


def _embed(net: PudNet, parts: list[Tensor]) -> Tensor:
    """``[m, G * D]`` on the CPU."""
    return net.embed(parts).flatten(1).cpu()


# ---- references -------------------------------------------------------------------------------------------------


def _noise(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (count, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)


def _clouds(count: int, generator: torch.Generator) -> Tensor:
    """Smooth colours."""
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    smooth = F.interpolate(coarse, (SIDE, SIDE), mode="bicubic", align_corners=True).clamp(0, 1)
    return (255 * smooth).to(torch.uint8).permute(0, 2, 3, 1)


def _stripes(count: int, generator: torch.Generator) -> Tensor:
    """Two colours in waves of a random direction and width."""
    angle, width, phase = torch.rand(3, count, 1, 1, generator=generator)
    line = torch.arange(SIDE, dtype=torch.float32) / SIDE
    across = line[:, None] * torch.cos(math.pi * angle) + line[None] * torch.sin(math.pi * angle)  # [count, S, S]
    wave = 0.5 + 0.5 * torch.sin(2 * math.pi * ((2 + 8 * width) * across + phase))
    first, second = torch.rand(2, count, 1, 1, 3, generator=generator)
    return (255 * (first + (second - first) * wave[..., None])).to(torch.uint8)


def _outlines(count: int, generator: torch.Generator) -> Tensor:
    """Light ellipses on black, grey like drawings."""
    place = torch.arange(SIDE, dtype=torch.float32) / SIDE
    x, y, wide, high = torch.rand(4, count, 1, 1, generator=generator)
    radius = ((place[:, None] - 0.3 - 0.4 * y) / (0.1 + 0.3 * high)).square()
    radius = radius + ((place[None] - 0.3 - 0.4 * x) / (0.1 + 0.3 * wide)).square()
    light = torch.exp(-20 * (radius - 1).square())
    return (255 * light[..., None]).to(torch.uint8).expand(-1, -1, -1, 3)


def _digits(count: int, generator: torch.Generator) -> Tensor | None:
    try:
        from sklearn import datasets
    except ImportError:
        return None
    found = torch.from_numpy(datasets.load_digits().images)
    chosen = found[torch.randperm(len(found), generator=generator)[:count]]
    grey = (chosen * (255 / 16)).round().to(torch.uint8)
    return grey[..., None].expand(-1, -1, -1, 3)


def _photographs(count: int, generator: torch.Generator) -> Tensor | None:
    """Pieces of the two photographs that scikit-learn brings: a temple and a flower."""
    try:
        from sklearn import datasets

        wholes = datasets.load_sample_images().images
    except ImportError:  # scikit-learn, or Pillow, which it reads them with
        return None
    pieces = []
    for number in range(count):
        whole = torch.from_numpy(wholes[number % len(wholes)].copy())
        side = int(torch.randint(SIDE, 4 * SIDE, (), generator=generator))
        top, left = (int(torch.randint(length - side, (), generator=generator)) for length in whole.shape[:2])
        piece = whole[top : top + side, left : left + side].permute(2, 0, 1)[None]
        pieces.append(F.interpolate(piece, (SIDE, SIDE), mode="bilinear", antialias=True))
    return torch.cat(pieces).permute(0, 2, 3, 1)


# Name -> (number of images, generator) -> uint8 [n, H, W, 3], or None where what it takes is not installed.
REFERENCES: dict[str, Callable[[int, torch.Generator], Tensor | None]] = {
    "handwritten digits": _digits,
    "pieces of photographs": _photographs,
    "smooth colours": _clouds,
    "stripes": _stripes,
    "outlines": _outlines,
    "noise": _noise,
}
