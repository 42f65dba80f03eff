"""``graph_recurrence`` (forward only) and ``tile_weights`` on CPU tensors through ``pudnet._C``."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from pudnet import _extension
from pudnet.errors import InputError, ShapeError, message
from pudnet.ops._checks import require_rank, require_shapes, require_together


def why_not_graph_recurrence(states: Tensor, edges: Tensor, level_sizes: list[int], *parameters: Tensor) -> list[str]:
    """What keeps native from running a call of ``graph_recurrence``."""
    tensors = (states, edges, *parameters)
    reasons = []
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        reasons.append("native graph_recurrence has no gradient, and this call needs one")
    if any(x.dtype != torch.float32 for x in tensors):
        reasons.append("native graph_recurrence takes float32 tensors")
    return reasons


# The parameters of ``graph_recurrence`` in the order of its schema.
PARAMETERS = (
    "message_in_weight",
    "message_in_bias",
    "message_out_weight",
    "message_out_bias",
    "weight_ih",
    "weight_hh",
    "bias_ih",
    "bias_hh",
)


@torch.library.impl("pudnet::graph_recurrence_native", "cpu")
def graph_recurrence(states: Tensor, edges: Tensor, level_sizes: list[int], *parameters: Tensor) -> Tensor:
    """The op, node by node in order: ``[N, D]``.

    ``PUDNET_INSTRUCTION_SET`` (``avx512``, ``avx2`` or ``portable``) overrides the choice of vector code.
    """
    check_graph(states, edges, level_sizes, *parameters)
    require_together("graph_recurrence", (states, edges, *parameters), torch.float32)
    updated = states.clone(memory_format=torch.contiguous_format)
    named = zip(("edges", *PARAMETERS), (edges, *parameters), strict=True)
    dense = {name: tensor.contiguous() for name, tensor in named}
    kinds, hidden, width = parameters[0].shape
    try:
        _extension.load().graph_recurrence_cpu(
            **{name: tensor.data_ptr() for name, tensor in dense.items()},
            states=updated.data_ptr(),
            nodes=len(updated),
            width=width,
            kinds=kinds,
            hidden=hidden,
            instruction_set=os.environ.get("PUDNET_INSTRUCTION_SET", ""),
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    return updated


def check_graph(
    states: Tensor,
    edges: Tensor,
    level_sizes: list[int],
    message_in_weight: Tensor,
    message_in_bias: Tensor,
    message_out_weight: Tensor,
    message_out_bias: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
) -> None:
    """Raise ShapeError unless the arguments of ``graph_recurrence`` fit each other."""
    op = "graph_recurrence"
    require_rank(op, "states", states, 2)
    require_rank(op, "message_in_weight", message_in_weight, 3)
    count, (kinds, hidden, width) = len(states), message_in_weight.shape
    expected = (
        ("states", states, (count, width)),
        ("edges", edges, (kinds, count, count)),
        ("message_in_bias", message_in_bias, (kinds, hidden)),
        ("message_out_weight", message_out_weight, (kinds, width, hidden)),
        ("message_out_bias", message_out_bias, (kinds, width)),
        ("weight_ih", weight_ih, (3 * width, width)),
        ("weight_hh", weight_hh, (3 * width, width)),
        ("bias_ih", bias_ih, (3 * width,)),
        ("bias_hh", bias_hh, (3 * width,)),
    )
    require_shapes(op, expected)
    if sum(level_sizes) != count or any(size < 1 for size in level_sizes):
        raise ShapeError(message(op, "level_sizes", f"positive with the sum {count}", level_sizes))


def tile_weights(blocks: list[Tensor], scales: list[float], sizes: list[int], targets: list[Tensor]) -> None:
    """Fill ``targets`` of the sizes O, I, O, I, ..."""
    dense = [block.contiguous() for block in blocks]
    _extension.load().tile_weights_cpu(
        blocks=[block.data_ptr() for block in dense],
        targets=[target.data_ptr() for target in targets],
        sizes=[(*size, *block.shape) for *size, block in zip(sizes[::2], sizes[1::2], dense, strict=True)],
        scales=scales,
    )


def check_tiles(blocks: list[Tensor], scales: list[float], sizes: list[int], targets: list[Tensor]) -> None:
    """Raise ShapeError or InputError unless each target is memory for what its block makes."""
    op = "tile_weights"
    lengths = [len(blocks), len(scales), len(targets), len(sizes)]
    if not blocks or lengths != [len(blocks), len(blocks), len(blocks), 2 * len(blocks)]:
        raise ShapeError(message(op, "blocks, scales, targets and sizes", "n, n, n and 2 n of them", lengths))
    device, kind = blocks[0].device, torch.float32
    for block, out, inputs, target in zip(blocks, sizes[::2], sizes[1::2], targets, strict=True):
        if block.ndim != 3 or not block.numel() or out < 1 or inputs < 1:
            got = [*block.shape, out, inputs]
            raise ShapeError(message(op, "blocks and sizes", "[S, o, i] and O, I, all positive", got))
        if target.numel() != out * inputs * len(block) or not target.is_contiguous():
            rule = f"contiguous, of {out} x {inputs} x {len(block)} elements"
            raise ShapeError(message(op, "targets", rule, list(target.shape)))
        if not (block.dtype is target.dtype is kind and block.device == target.device == device):
            require_together(op, [*blocks, *targets], kind)


def tile_weights_backward(d_out: Tensor, scales: list[float], shapes: list[int]) -> Tensor:
    """Gradient of all blocks, one after the other, from that of all targets; S, o, i, O, I of each in ``shapes``."""
    parts = []
    start = 0
    for k, scale in enumerate(scales):
        spatial, rows, inputs, out, target_inputs = shapes[5 * k : 5 * k + 5]
        stop = start + out * target_inputs * spatial
        d_target = d_out[start:stop].view(out, target_inputs, spatial)
        if out % rows or target_inputs % inputs:
            d_target = F.pad(d_target, (0, 0, 0, -target_inputs % inputs, 0, -out % rows))
        repeats = d_target.unflatten(1, (-1, inputs)).unflatten(0, (-1, rows))  # [., o, ., i, S]
        parts.append((repeats.sum(dim=(0, 2)) * scale).permute(2, 0, 1).flatten())
        start = stop
    return torch.cat(parts)
