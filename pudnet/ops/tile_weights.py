"""The op ``tile_weights``: blocks of generated weights -> whole parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pudnet import backends
from pudnet.errors import InputError, ShapeError, message
from pudnet.ops import _native_graphs, reference
from pudnet.ops._checks import require_shapes
from pudnet.ops._native_graphs import check_tiles
from pudnet.ops._schemas import empty_tiles


def tile_weights(
    blocks: Sequence[Tensor],  # each [kH * kW, o, i]
    scales: Sequence[float],
    sizes: Sequence[tuple[int, int]],  # O, I of each target
    targets: Sequence[Tensor] | None = None,  # each of O * I * kH * kW elements, dense
    *,
    backend: str | None = None,
) -> list[Tensor]:
    """Repeat each block over both its channel dimensions, times a factor, and cut; meaning: ``reference.tile_weights``.

    Args:
        targets: memory to write to; new memory by default, and only then differentiable on every backend.

    Returns:
        ``targets``, or new tensors ``[O, I, kH * kW]``.

    Raises:
        ShapeError: the sequences differ in length, or a target in elements from what its block makes.
        BackendUnavailableError: the backend asked for cannot run this call.
    """
    given = [blocks, scales, sizes] if targets is None else [blocks, scales, sizes, targets]
    if len({len(sequence) for sequence in given}) > 1:
        lengths = [len(sequence) for sequence in given]
        raise ShapeError(message("tile_weights", "all sequences", "of one length", lengths))
    if not blocks:
        return []
    result: list[Tensor] = backends.call(
        "tile_weights", blocks[0].device, backend, list(blocks), list(scales), list(sizes),
        None if targets is None else list(targets),
    )  # fmt: skip
    return result


def _fill_triton(blocks: list[Tensor], scales: list[float], sizes: list[int], targets: list[Tensor]) -> None:
    from pudnet.kernels.tile_weights import launch_tile_weights_fwd

    first = targets[0]
    offsets = tuple((target.data_ptr() - first.data_ptr()) // first.itemsize for target in targets)
    flat = torch.cat([block.flatten() for block in blocks])
    launch_tile_weights_fwd(flat, first, tuple(_shapes(blocks, sizes)), tuple(scales), offsets)


def _backward_triton(d_out: Tensor, scales: list[float], shapes: list[int]) -> Tensor:
    from pudnet.kernels.tile_weights import launch_tile_weights_bwd

    d_blocks: Tensor = launch_tile_weights_bwd(d_out, tuple(shapes), tuple(scales))
    return d_blocks


_FILL: dict[str, Callable[..., None]] = {"triton": _fill_triton, "native": _native_graphs.tile_weights}
_BACKWARD: dict[str, Callable[..., Tensor]] = {
    "triton": _backward_triton,
    "native": _native_graphs.tile_weights_backward,
}


@torch.library.impl("pudnet::tile_weights_out", ("cpu", "cuda"))
def _fill(blocks: list[Tensor], scales: list[float], sizes: list[int], targets: list[Tensor], backend: str) -> None:
    fill = _chosen(_FILL, backend)
    check_tiles(blocks, scales, sizes, targets)
    fill(blocks, scales, sizes, targets)
    torch.autograd.graph.increment_version(targets)


@torch.library.impl("pudnet::tile_weights", ("cpu", "cuda"))
def _forward(blocks: list[Tensor], scales: list[float], sizes: list[int], backend: str) -> Tensor:
    fill = _chosen(_FILL, backend)
    flat = empty_tiles(blocks, scales, sizes, backend)
    targets = _parts(flat, blocks, sizes)
    check_tiles(blocks, scales, sizes, targets)
    fill(blocks, scales, sizes, targets)
    return flat


@torch.library.impl("pudnet::tile_weights_backward", ("cpu", "cuda"))
def _backward(d_out: Tensor, scales: list[float], shapes: list[int], backend: str) -> Tensor:
    run = _chosen(_BACKWARD, backend)
    size = sum(shapes[k] * shapes[k + 3] * shapes[k + 4] for k in range(0, 5 * len(scales), 5))
    require_shapes("tile_weights", [("d_out", d_out, (size,))])
    return run(d_out, scales, shapes)


def _chosen(table: dict[str, Callable[..., Any]], backend: str) -> Callable[..., Any]:
    if backend not in table:
        raise InputError(message("tile_weights", "backend", f"one of {sorted(table)}", repr(backend)))
    return table[backend]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    blocks, ctx.scales, sizes, ctx.backend = inputs
    ctx.blocks = [block.shape for block in blocks]
    ctx.shapes = _shapes(blocks, sizes)


def _gradients(ctx: Any, d_out: Tensor) -> tuple[list[Tensor] | None, ...]:
    flat = torch.ops.pudnet.tile_weights_backward(d_out, ctx.scales, ctx.shapes, ctx.backend)
    parts = flat.split([shape.numel() for shape in ctx.blocks])
    return [part.view(shape) for part, shape in zip(parts, ctx.blocks, strict=True)], None, None, None


torch.library.register_autograd("pudnet::tile_weights", _gradients, setup_context=_save_for_backward)


def _shapes(blocks: list[Tensor], sizes: list[int]) -> list[int]:
    """S, o, i, O, I of each."""
    ends = zip(blocks, sizes[::2], sizes[1::2], strict=True)
    return [number for block, out, inputs in ends for number in (*block.shape, out, inputs)]


def _parts(flat: Tensor, blocks: list[Tensor], sizes: list[int]) -> list[Tensor]:
    """Each target ``[O, I, S]``, a view of ``flat``."""
    shapes = [(o, i, block.shape[0]) for block, o, i in zip(blocks, sizes[::2], sizes[1::2], strict=True)]
    parts = flat.split([o * i * positions for o, i, positions in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _run(
    backend: str, blocks: list[Tensor], scales: list[float], sizes: list[tuple[int, int]], targets: list[Tensor] | None
) -> list[Tensor]:
    flat_sizes = [number for size in sizes for number in size]
    if targets is None:
        return _parts(torch.ops.pudnet.tile_weights(blocks, scales, flat_sizes, backend), blocks, flat_sizes)
    torch.ops.pudnet.tile_weights_out(blocks, scales, flat_sizes, targets, backend)
    return targets


def _why_not(
    blocks: list[Tensor], scales: list[float], sizes: list[tuple[int, int]], targets: list[Tensor] | None
) -> list[str]:
    """What keeps Triton and native from running this call."""
    tensors = [*blocks, *(targets or ())]
    device = blocks[0].device
    reasons = []
    if not all(x.dtype is torch.float32 and x.device == device for x in tensors):
        reasons.append("this tile_weights takes float32 tensors on one device")
    if targets is not None:
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            reasons.append("this tile_weights has no gradient through memory it is given, and this call needs one")
        if not all(x.is_contiguous() for x in targets):
            reasons.append("this tile_weights writes into contiguous tensors")
    if any(out * inputs * block.shape[0] >= 2**31 for block, (out, inputs) in zip(blocks, sizes, strict=True)):
        reasons.append("this tile_weights makes parameters of less than 2^31 elements")
    return reasons


backends.register_op("tile_weights", reference.tile_weights)
for _backend, _devices in (("triton", ("cpu", "cuda")), ("native", ("cpu",))):
    backends.register("tile_weights", _backend, functools.partial(_run, _backend), devices=_devices, why_not=_why_not)
