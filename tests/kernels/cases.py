"""Random arguments for the ops, and how far a result is from the reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def generator_arguments(shapes: Sequence[int], batch: int, width: int, hidden: int, seed: int = 0) -> list[Tensor]:
    """Tensor arguments of ``generate_weights``, of the sizes that training meets."""
    g = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=g)

    layers = len(shapes) // 4
    fc_rows = hidden * sum(a * b for a, b in zip(shapes[2::4], shapes[3::4], strict=True))
    rows = sum(a * b for a, b in zip(shapes[0::4], shapes[1::4], strict=True))
    return [
        random(batch, layers, width),
        random(fc_rows, width) / width**0.5,
        random(fc_rows) / 10,
        random(layers, 2 * hidden, hidden) / hidden**0.5,
        random(layers, 2 * hidden) / 10,
        random(rows, 2 * hidden),
        random(rows),
    ]


def recurrence_arguments(batch: int, steps: int, width: int, layers: int = 2, seed: int = 0) -> list[Tensor]:
    """Tensor arguments of ``layer_recurrence``."""
    g = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=g)

    scale = width**-0.5
    return [
        random(batch, layers, width),
        random(width),
        *(random(layers, 3 * width, width) * scale for _ in range(2)),
        *(random(layers, 3 * width) / 10 for _ in range(2)),
        random(width, width) * scale,
        random(width) / 10,
        1 + random(width) / 10,
        random(width) / 10,
        1 + random(steps, width) / 10,
        random(steps, width) / 10,
    ]


def graph_arguments(
    level_sizes: Sequence[int], width: int, kinds: int, seed: int = 0
) -> tuple[Tensor, list[Tensor], list[int]]:
    """Edges, other tensors and level sizes of ``graph_recurrence``; a third of the edges that may be are there."""
    g = torch.Generator().manual_seed(seed)
    levels = torch.repeat_interleave(torch.arange(len(level_sizes)), torch.tensor(level_sizes))
    nodes, hidden = len(levels), width // kinds
    allowed = (levels[:, None] > levels[None, :]) & (torch.rand(kinds, nodes, nodes, generator=g) < 1 / 3)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=g) / size[-1] ** 0.5

    tensors = [
        random(nodes, width),
        random(kinds, hidden, width),
        random(kinds, hidden),
        random(kinds, width, hidden),
        random(kinds, width),
        *(random(3 * width, width) for _ in range(2)),
        *(random(3 * width) for _ in range(2)),
    ]
    return torch.rand(kinds, nodes, nodes, generator=g) * allowed, tensors, list(level_sizes)


# (S, o, i, O, I) of targets: repeated and cut both ways; exact; sizes that are no multiples of 4, and offsets after it;
# a block larger than its target; more than one program per band and per share of its repeats.
TILES = [
    (9, 8, 4, 20, 12),
    (1, 8, 8, 8, 8),
    (1, 1, 8, 1, 20),
    (5, 3, 3, 7, 5),
    (2, 4, 4, 12, 8),
    (1, 8, 12, 5, 7),
    (9, 16, 16, 32, 160),
]


def tile_arguments(shapes: Sequence[tuple[int, ...]] = TILES, seed: int = 0) -> tuple[list[Tensor], list[float], Any]:
    """Blocks, scales and sizes of ``tile_weights``."""
    g = torch.Generator().manual_seed(seed)
    blocks = [torch.randn(*shape[:3], generator=g) for shape in shapes]
    return blocks, [0.5 + k / 3 for k in range(len(shapes))], [shape[3:] for shape in shapes]


def error(result: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest number expected."""
    if not expected.numel():
        return 0.0
    return float((result.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def gradients(function: Callable[..., Tensor], tensors: list[Tensor], d_out: Tensor | None = None) -> tuple[Any, ...]:
    """(result, gradients of all tensors) for a fixed random gradient of the result."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    if d_out is None:
        d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out.detach(), torch.autograd.grad(out, leaves, d_out.to(out), allow_unused=True)


def scattered(x: Tensor) -> Tensor:
    """The same numbers, in every second place of a larger tensor and 4 bytes past a 16-byte boundary."""
    room = torch.full((2 * x.numel() + 1,), float("nan"), dtype=x.dtype, device=x.device)
    view = room[1:].view(*x.shape[:-1], 2 * x.shape[-1])[..., ::2]
    view.copy_(x)
    return view


def shifted(x: Tensor) -> Tensor:
    """The same numbers, contiguous, off the 16-byte boundary."""
    view = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape)
    view.copy_(x)
    return view
