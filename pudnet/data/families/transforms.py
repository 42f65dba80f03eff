"""Random changes of a whole dataset: every image is changed alike, so the classes stay what they are."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Each takes float images [n, 3, H, W] in 0..1 and gives such images of the same size.
Change = Callable[[Tensor, np.random.Generator], Tensor]


def _mixed(images: Tensor, rng: np.random.Generator) -> Tensor:
    matrix = np.eye(3)[rng.permutation(3)] + 0.5 * rng.standard_normal((3, 3))
    matrix /= np.abs(matrix).sum(axis=1, keepdims=True)
    return torch.einsum("ij,njhw->nihw", torch.from_numpy(matrix).float(), images - 0.5) + 0.5


def _inverted(images: Tensor, rng: np.random.Generator) -> Tensor:
    return 1 - images


def _grey(images: Tensor, rng: np.random.Generator) -> Tensor:
    shares = torch.from_numpy(rng.dirichlet((2, 2, 2))).float()
    return torch.einsum("j,njhw->nhw", shares, images)[:, None].expand_as(images)


def _quarter_turned(images: Tensor, rng: np.random.Generator) -> Tensor:
    turned = torch.rot90(images, int(rng.integers(1, 4)), (2, 3))
    return turned.flip(3) if rng.random() < 0.5 else turned


def _turned(images: Tensor, rng: np.random.Generator) -> Tensor:
    angle = rng.uniform(0, 2 * math.pi)
    cosine, sine = math.cos(angle), math.sin(angle)
    theta = torch.tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]]).expand(len(images), 2, 3)
    where = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, where, padding_mode="reflection", align_corners=False)


def _blurred(images: Tensor, rng: np.random.Generator) -> Tensor:
    offsets = torch.arange(-3, 4, dtype=torch.float32)
    weights = torch.exp(-0.5 * (offsets / rng.uniform(0.6, 1.6)) ** 2)
    kernel = torch.outer(weights, weights) / weights.sum() ** 2
    return F.conv2d(F.pad(images, (3,) * 4, mode="replicate").flatten(0, 1)[:, None], kernel[None, None]).view_as(
        images
    )


def _noisy(images: Tensor, rng: np.random.Generator) -> Tensor:
    added = torch.from_numpy(rng.standard_normal(tuple(images.shape), dtype=np.float32))
    return images + float(rng.uniform(0.03, 0.15)) * added


def _coarse(images: Tensor, rng: np.random.Generator) -> Tensor:
    size = max(4, round(images.shape[2] * rng.uniform(0.3, 0.65)))
    small = F.adaptive_avg_pool2d(images, size)
    return F.interpolate(small, images.shape[2:], mode="nearest" if rng.random() < 0.5 else "bilinear")


def _edges(images: Tensor, rng: np.random.Generator) -> Tensor:
    padded = F.pad(images, (1,) * 4, mode="replicate")
    vertical = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    horizontal = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    if rng.random() < 0.5:
        return 1.5 * torch.hypot(vertical, horizontal)
    angle = rng.uniform(0, 2 * math.pi)
    return 0.5 + math.cos(angle) * horizontal + math.sin(angle) * vertical


def _faint(images: Tensor, rng: np.random.Generator) -> Tensor:
    contrast = rng.uniform(0.2, 0.6)
    return (images - 0.5) * contrast + rng.uniform(contrast / 2, 1 - contrast / 2)


def _bent(images: Tensor, rng: np.random.Generator) -> Tensor:
    gamma = rng.uniform(1.4, 2.5)
    return images ** (gamma if rng.random() < 0.5 else 1 / gamma)


CHANGES: tuple[Change, ...] = (
    _mixed, _inverted, _grey, _quarter_turned, _turned, _blurred, _noisy, _coarse, _edges, _faint, _bent
)  # fmt: skip
MOST = 3


def transform(images: Tensor, rng: np.random.Generator) -> Tensor:
    """One to three random changes, the same for all images: uint8 ``[n, H, W, 3]`` to uint8 ``[n, H, W, 3]``.

    Colours mixed, inverted or made grey; turned by quarters or by any angle; blur, noise, lower resolution, edges, low
    contrast, another gamma.
    """
    changed = images.permute(0, 3, 1, 2).float() / 255
    for number in rng.choice(len(CHANGES), int(rng.integers(1, MOST + 1)), replace=False):
        changed = CHANGES[number](changed, rng).clamp(0, 1)
    return (changed * 255).round().byte().permute(0, 2, 3, 1).contiguous()
