"""Families that fill the whole image: textures, scenes, colours."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pudnet.data.families.drawing import (
    COLUMNS,
    ROWS,
    SIDE,
    Kind,
    band,
    colours,
    ellipse,
    ground,
    noise,
    normal,
    paint,
    uniform,
)
from pudnet.errors import InputError, message

Field = Callable[[int, np.random.Generator], Tensor]  # n random fields [n, 32, 32], about 0

# ---- textures ---------------------------------------------------------------------------------------------------


def _waves(rng: np.random.Generator, n: int, angle: float, cycles: float) -> Tensor:
    turned = angle + 0.06 * normal(rng, n)[:, None, None]
    scaled = math.pi * cycles * (1 + 0.04 * normal(rng, n)[:, None, None])
    return torch.sin(scaled * (COLUMNS * turned.cos() + ROWS * turned.sin()) + uniform(rng, 0, 2 * math.pi, n, 1, 1))


def _grating(rng: np.random.Generator) -> Field:
    angle, cycles = rng.uniform(0, math.pi), rng.uniform(2, 9)
    return lambda n, rng: _waves(rng, n, angle, cycles)


def _checks(rng: np.random.Generator) -> Field:
    angle, cycles, between = rng.uniform(0, math.pi), rng.uniform(2, 6), rng.uniform(0.8, math.pi - 0.8)
    together = [torch.mul, torch.maximum, torch.minimum][rng.integers(3)]
    return lambda n, rng: together(_waves(rng, n, angle, cycles), _waves(rng, n, angle + between, cycles))


def _spots(rng: np.random.Generator) -> Field:
    angle = rng.uniform(0, math.pi) if rng.random() < 0.5 else None
    amplitude = band(rng.uniform(1.5, 9), rng.uniform(0.5, 2), angle, rng.uniform(0.15, 0.5))
    ridges = bool(rng.random() < 0.4)

    def field(n: int, rng: np.random.Generator) -> Tensor:
        found = noise(rng, n, amplitude)
        return 0.7 - found.abs() if ridges else found

    return field


def _cells(rng: np.random.Generator) -> Field:
    count, norm = int(rng.integers(5, 40)), (1.0, 2.0, math.inf)[rng.integers(3)]
    stretch = torch.tensor([1.0, rng.uniform(0.4, 1)]) if rng.random() < 0.5 else torch.ones(2)
    style = ("flat", "cone", "wall")[rng.integers(3)]
    pixels = torch.stack([COLUMNS, ROWS], dim=-1).view(1, -1, 2) * stretch

    def field(n: int, rng: np.random.Generator) -> Tensor:
        points = uniform(rng, -1.1, 1.1, n, count, 2) * stretch
        distance = torch.cdist(pixels.expand(n, -1, -1), points, p=norm)
        nearest, which = distance.min(dim=2)
        if style == "flat":
            found = (normal(rng, n, count)).gather(1, which)
        elif style == "cone":
            found = 1 - 2.5 * nearest * math.sqrt(count) / 2
        else:
            second = distance.scatter(2, which[:, :, None], math.inf).amin(dim=2)
            found = 1 - (second - nearest) * math.sqrt(count)
        return found.view(n, SIDE, SIDE)

    return field


def _marble(rng: np.random.Generator) -> Field:
    angle, cycles, strength = rng.uniform(0, math.pi), rng.uniform(1, 5), rng.uniform(1, 3)
    amplitude = band(0.0, rng.uniform(1.5, 4))
    turn = uniform(rng, 0, 2 * math.pi)

    def field(n: int, rng: np.random.Generator) -> Tensor:
        along = math.pi * cycles * (COLUMNS * math.cos(angle) + ROWS * math.sin(angle))
        return torch.sin(along + strength * noise(rng, n, amplitude) + turn + uniform(rng, 0, 2 * math.pi, n, 1, 1))

    return field


def _rings(rng: np.random.Generator) -> Field:
    cycles, squash, strength = rng.uniform(2, 7), rng.uniform(0.3, 1), rng.uniform(0, 1.2)
    angle, amplitude = rng.uniform(0, math.pi), band(0.0, 2.0)

    def field(n: int, rng: np.random.Generator) -> Tensor:
        x, y = COLUMNS - uniform(rng, -1, 1, n, 1, 1), ROWS - uniform(rng, -1, 1, n, 1, 1)
        along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
        return torch.sin(math.pi * cycles * torch.hypot(along, across * squash) + strength * noise(rng, n, amplitude))

    return field


def _texture_kind(name: str, field: Field, sharpness: float, level: float) -> Kind:
    def images(n: int, rng: np.random.Generator) -> Tensor:
        mask = torch.sigmoid(sharpness * (field(n, rng) - level))
        bright, dark = colours(rng, n, contrast=0.25)
        return paint(mask, bright, dark)

    return Kind(name, images)


def textures(count: int, rng: np.random.Generator) -> list[Kind]:
    """Procedural textures; phase and colours differ from image to image, so only the texture tells the class."""
    makers = {
        "grating": _grating,
        "checks": _checks,
        "spots": _spots,
        "cells": _cells,
        "marble": _marble,
        "rings": _rings,
    }
    kinds = []
    for number in range(count):
        name, maker = list(makers.items())[rng.integers(len(makers))]
        sharpness, level = math.exp(rng.uniform(0.7, 2.7)), rng.uniform(-0.5, 0.5)
        kinds.append(_texture_kind(f"{name} {number}", maker(rng), sharpness, level))
    return kinds


# ---- scenes -----------------------------------------------------------------------------------------------------

BLOBS = 5


def _scene_kind(name: str, palette: Tensor, rng: np.random.Generator) -> Kind:
    centres = uniform(rng, -0.75, 0.75, BLOBS, 2)

    def images(n: int, rng: np.random.Generator) -> Tensor:
        picture = ground(rng, n, uniform(rng, 0.2, 0.8, n, 1, 1, 3), 0.15)
        moved = centres + uniform(rng, -0.25, 0.25, n, 1, 2) + 0.12 * normal(rng, n, BLOBS, 2)
        soft = uniform(rng, 0.05, 0.5, n)
        for blob in rng.permutation(BLOBS):
            colour = palette[blob] + 0.1 * normal(rng, n, 1, 1, 3)
            mask = ellipse(moved[:, blob], uniform(rng, 0.15, 0.4, n, 2), uniform(rng, 0, math.pi, n), soft)
            picture = paint(mask, colour, picture)
        for _ in range(3):
            colour = palette[torch.from_numpy(rng.integers(BLOBS, size=n))][:, None, None]
            mask = ellipse(uniform(rng, -1, 1, n, 2), uniform(rng, 0.1, 0.3, n, 2), 0.0, soft)
            picture = paint(mask, colour, picture)
        return picture

    return Kind(name, images)


def scenes(count: int, rng: np.random.Generator) -> list[Kind]:
    """The same five colours in every class: what lies where tells the class."""
    palette = uniform(rng, 0, 1, BLOBS, 3)
    return [_scene_kind(f"scene {number}", palette, rng) for number in range(count)]


# ---- colours ----------------------------------------------------------------------------------------------------

PALETTE, SHARES = 10, (0.5, 0.32, 0.18)


def _colour_kind(name: str, palette: Tensor) -> Kind:
    def images(n: int, rng: np.random.Generator) -> Tensor:
        fields = torch.stack([noise(rng, n, band(0.0, rng.uniform(1.5, 6))) for _ in SHARES], dim=1)
        fields += 1.2 * torch.tensor(SHARES).log()[:, None, None]
        chosen = fields.argmax(dim=1)  # [n, 32, 32]
        hues = palette + 0.09 * normal(rng, n, len(SHARES), 3)
        picture = hues[torch.arange(n)[:, None, None], chosen]
        light = uniform(rng, 0.6, 1.25, n, 1, 1, 1) * (1 + 0.08 * normal(rng, n, 1, 1, 3))
        return picture * light

    return Kind(name, images)


def colour_sets(count: int, rng: np.random.Generator) -> list[Kind]:
    """A class is three of ten colours, one of them frequent and one rare; where they lie is random."""
    orders = list(itertools.permutations(range(PALETTE), len(SHARES)))
    if count > len(orders):
        raise InputError(message("families.draw", "classes", f"at most {len(orders)} of colours", count))
    palette = uniform(rng, 0.05, 0.95, PALETTE, 3)
    chosen = [orders[place] for place in rng.permutation(len(orders))[:count]]
    return [_colour_kind(" ".join(map(str, order)), palette[list(order)]) for order in chosen]
