"""What the families are drawn with: random numbers as tensors, noise fields, templates under affine maps, colours."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 32  # pixels
ROWS, COLUMNS = torch.meshgrid(*[(torch.arange(SIDE) + 0.5) * 2 / SIDE - 1] * 2, indexing="ij")  # [32, 32], in -1..1


@dataclass(frozen=True)
class Kind:
    """A class: its name, and how ``n`` images of it are drawn, float ``[n, 32, 32, 3]`` in 0..1 or a little beyond."""

    name: str
    images: Callable[[int, np.random.Generator], Tensor]


def uniform(rng: np.random.Generator, low: float, high: float, *shape: int) -> Tensor:
    return torch.from_numpy(rng.random(shape, dtype=np.float32)) * (high - low) + low


def normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def band(centre: float, width: float, angle: float | None = None, spread: float = 0.3) -> Tensor:
    """Amplitudes ``[32, 32]`` of a noise of about ``centre`` cycles per image, in all directions or about one."""
    cycles = torch.fft.fftfreq(SIDE) * SIDE
    vertical, horizontal = torch.meshgrid(cycles, cycles, indexing="ij")
    amplitude = torch.exp(-0.5 * ((torch.hypot(vertical, horizontal) - centre) / width) ** 2)
    if angle is not None:
        off = torch.sin(torch.atan2(vertical, horizontal) - angle)
        amplitude = amplitude * torch.exp(-0.5 * (off / spread) ** 2)
    amplitude[0, 0] = 0
    return amplitude


def noise(rng: np.random.Generator, n: int, amplitude: Tensor) -> Tensor:
    """Random fields ``[n, 32, 32]`` of mean 0 and standard deviation 1 with the given spectrum."""
    spectrum = torch.fft.rfft2(normal(rng, n, SIDE, SIDE)) * amplitude[:, : SIDE // 2 + 1]
    field = torch.fft.irfft2(spectrum, s=(SIDE, SIDE))
    return field / field.std(dim=(1, 2), keepdim=True)


def affine(
    rng: np.random.Generator, n: int, *, turn: float, scale: tuple[float, float], shear: float = 0.0, shift: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Random maps ``x -> M x + t`` of the plane: ``[n, 2, 2]`` and ``[n, 2]``.

    Args:
        turn: largest angle, in radians.
        scale: bounds of the size; both sides differ by up to 15 % more.
        shear: largest shear.
        shift: largest shift, in half images.
    """
    angle = uniform(rng, -turn, turn, n)
    size = uniform(rng, *scale, n)[:, None] * uniform(rng, 0.85, 1.0, n, 2)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(n, 2, 2)
    sheared = torch.eye(2).repeat(n, 1, 1)
    sheared[:, 0, 1] = uniform(rng, -shear, shear, n)
    return rotation @ sheared * size[:, None, :], uniform(rng, -shift, shift, n, 2)


def warp(templates: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """Pictures ``[n, T, T]`` under affine maps: ``[n, 32, 32]``, 0 outside."""
    inverse = torch.linalg.inv(matrix)
    theta = torch.cat([inverse, -inverse @ shift[:, :, None]], dim=2)
    where = F.affine_grid(theta, [len(theta), 1, SIDE, SIDE], align_corners=False)
    return F.grid_sample(templates[:, None], where, align_corners=False)[:, 0]


def colours(rng: np.random.Generator, n: int, contrast: float = 0.35) -> tuple[Tensor, Tensor]:
    """Bright and dark colours ``[n, 1, 1, 3]``: every channel of the bright one is brighter, by ``contrast`` on average
    or more."""
    dark = uniform(rng, 0, 0.5, n, 1, 1, 3)
    room = uniform(rng, contrast, 1, n, 1, 1, 1) * uniform(rng, 0.5, 1, n, 1, 1, 3)
    return dark + room * (1 - dark), dark


def paint(mask: Tensor, front: Tensor, back: Tensor) -> Tensor:
    """``front`` where ``mask`` ``[n, 32, 32]`` is 1, ``back`` where it is 0: ``[n, 32, 32, 3]``."""
    return back + mask[..., None] * (front - back)


def ground(rng: np.random.Generator, n: int, colour: Tensor, strength: float) -> Tensor:
    """A background that varies slowly about ``colour`` ``[n, 1, 1, 3]``: ``[n, 32, 32, 3]``."""
    field = noise(rng, n, band(0.0, 1.5))[..., None]
    return colour + field * strength * normal(rng, n, 1, 1, 3)


def ellipse(centre: Tensor, radii: Tensor, angle: Tensor | float = 0.0, soft: Tensor | float = 0.1) -> Tensor:
    """Masks ``[n, 32, 32]`` of ellipses: centre and radii ``[n, 2]`` (x, y), angle ``[n]``, blur as a share of them."""
    angle = torch.as_tensor(angle).expand(len(centre))[:, None, None]
    x, y = COLUMNS - centre[:, 0, None, None], ROWS - centre[:, 1, None, None]
    along = (x * angle.cos() + y * angle.sin()) / radii[:, 0, None, None]
    across = (y * angle.cos() - x * angle.sin()) / radii[:, 1, None, None]
    softness = torch.as_tensor(soft).expand(len(centre))[:, None, None]
    return torch.sigmoid((1 - torch.hypot(along, across)) / softness)


def radians(degrees: float) -> float:
    return math.radians(degrees)
