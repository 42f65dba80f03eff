"""``graph_recurrence`` and ``tile_weights`` on CPU tensors through ``pudnet._C``, forward only."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from pudnet import _extension
from pudnet.errors import InputError


def _reasons(op: str, tensors: list[Tensor]) -> list[str]:
    reasons = []
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        reasons.append(f"native {op} has no gradient, and this call needs one")
    if any(x.dtype != torch.float32 for x in tensors):
        reasons.append(f"native {op} takes float32 tensors")
    if torch.compiler.is_compiling():
        reasons.append(f"native {op} cannot be traced")
    return reasons


def why_not_graph_recurrence(states: Tensor, edges: Tensor, level_sizes: list[int], *parameters: Tensor) -> list[str]:
    """What keeps native from running a call of ``graph_recurrence``."""
    return _reasons("graph_recurrence", [states, edges, *parameters])


def why_not_tile_weights(
    blocks: list[Tensor], scales: list[float], sizes: list[tuple[int, int]], targets: list[Tensor]
) -> list[str]:
    """What keeps native from running a call of ``tile_weights``."""
    reasons = _reasons("tile_weights", [*blocks, *targets])
    if not all(x.is_contiguous() for x in targets):
        reasons.append("native tile_weights writes into contiguous tensors")
    return reasons


def graph_recurrence(
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
) -> Tensor:
    """The op, node by node in order: ``[N, D]``.

    ``PUDNET_INSTRUCTION_SET`` (``avx512``, ``avx2`` or ``portable``) overrides the choice of vector code.
    """
    updated = states.clone(memory_format=torch.contiguous_format)
    dense = {
        "edges": edges.contiguous(),
        "message_in_weight": message_in_weight.contiguous(),
        "message_in_bias": message_in_bias.contiguous(),
        "message_out_weight": message_out_weight.contiguous(),
        "message_out_bias": message_out_bias.contiguous(),
        "weight_ih": weight_ih.contiguous(),
        "weight_hh": weight_hh.contiguous(),
        "bias_ih": bias_ih.contiguous(),
        "bias_hh": bias_hh.contiguous(),
    }
    kinds, hidden, width = message_in_weight.shape
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


def tile_weights(
    blocks: list[Tensor], scales: list[float], sizes: list[tuple[int, int]], targets: list[Tensor]
) -> None:
    """The op: fills ``targets``."""
    dense = [block.contiguous() for block in blocks]
    _extension.load().tile_weights_cpu(
        blocks=[block.data_ptr() for block in dense],
        targets=[target.data_ptr() for target in targets],
        sizes=[(*size, *block.shape) for size, block in zip(sizes, dense, strict=True)],
        scales=scales,
    )
