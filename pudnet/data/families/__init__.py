"""Made-up kinds of images: labelled datasets of any size from a name and a seed, without any data.

A family is a kind of images (``NAMES``); ``draw`` takes classes of it and images of these. ``transform`` changes a
whole dataset, of any kind, in one random way.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pudnet.data.families.drawing import SIDE, Kind, normal, uniform
from pudnet.data.families.fields import colour_sets, scenes, textures
from pudnet.data.families.figures import glyphs, objects, shapes, strokes
from pudnet.data.families.transforms import transform
from pudnet.errors import InputError, message

__all__ = ["NAMES", "SIDE", "Drawn", "draw", "transform"]

# (how many classes, generator of the classes) -> the classes; the first ones do not depend on how many there are.
_FAMILIES: dict[str, Callable[[int, np.random.Generator], list[Kind]]] = {
    "glyphs": glyphs,
    "textures": textures,
    "shapes": shapes,
    "strokes": strokes,
    "scenes": scenes,
    "colours": colour_sets,
    "objects": objects,
}
NAMES = tuple(_FAMILIES)


@dataclass(frozen=True)
class Drawn:
    """Labelled images: uint8 ``[n, 32, 32, 3]``, int64 ``[n]`` in ``0..K-1`` in class order, and K class names."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]


def draw(name: str, classes: int, per_class: int, seed: int, part: int = 0) -> Drawn:
    """Draw a dataset; the same arguments give the same images.

    Args:
        name: one of ``NAMES``.
        classes: how many; class ``k`` is the same one whatever their number.
        per_class: images of each class.
        seed: of the classes and the images.
        part: another part has other images of the same classes.

    Raises:
        InputError: an unknown name, a number out of range, or Pillow (glyphs, shapes) or matplotlib (glyphs, for its
            fonts) is not installed.
    """
    if name not in _FAMILIES:
        raise InputError(message("families.draw", "name", f"one of {', '.join(NAMES)}", repr(name)))
    for argument, value, least in (
        ("classes", classes, 1),
        ("per_class", per_class, 1),
        ("seed", seed, 0),
        ("part", part, 0),
    ):
        if value < least:
            raise InputError(message("families.draw", argument, f"at least {least}", value))
    tag = zlib.crc32(name.encode())
    kinds = _FAMILIES[name](classes, np.random.default_rng([seed, tag]))
    images = torch.empty(classes, per_class, SIDE, SIDE, 3, dtype=torch.uint8)
    for number, kind in enumerate(kinds):
        rng = np.random.default_rng([seed, tag, part, number])
        images[number] = _photographed(kind.images(per_class, rng), rng)
    labels = torch.arange(classes).repeat_interleave(per_class)
    return Drawn(images.flatten(0, 1), labels, tuple(kind.name for kind in kinds))


def _photographed(images: Tensor, rng: np.random.Generator) -> Tensor:
    """With noise, as uint8."""
    n = len(images)
    return (
        ((images + uniform(rng, 0, 0.06, n, 1, 1, 1) * normal(rng, *images.shape)) * 255).round().clamp(0, 255).byte()
    )
