"""``layer_recurrence`` on CPU tensors through ``pudnet._C``, forward only."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from pudnet import _extension
from pudnet.errors import InputError
from pudnet.ops._checks import require_rank, require_shapes, require_together

_NAMES = (
    "state", "start", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "out_weight", "out_bias",
    "state_norm_weight", "state_norm_bias", "code_norm_weight", "code_norm_bias",
)  # fmt: skip


def check(
    state: Tensor,
    start: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    state_norm_weight: Tensor,
    state_norm_bias: Tensor,
    code_norm_weight: Tensor,
    code_norm_bias: Tensor,
) -> None:
    """Raise ShapeError unless the tensors of ``layer_recurrence`` fit each other."""
    op = "layer_recurrence"
    require_rank(op, "bias_hh", bias_hh, 2)
    require_rank(op, "start", start, 1)
    require_rank(op, "code_norm_weight", code_norm_weight, 2)
    require_rank(op, "state", state, 3)
    layers, width, steps = bias_hh.shape[0], start.shape[0], code_norm_weight.shape[0]
    expected = (
        ("state", state, (state.shape[0], layers, width)),
        ("weight_ih", weight_ih, (layers, 3 * width, width)),
        ("weight_hh", weight_hh, (layers, 3 * width, width)),
        ("bias_ih", bias_ih, (layers, 3 * width)),
        ("bias_hh", bias_hh, (layers, 3 * width)),
        ("out_weight", out_weight, (width, width)),
        ("out_bias", out_bias, (width,)),
        ("state_norm_weight", state_norm_weight, (width,)),
        ("state_norm_bias", state_norm_bias, (width,)),
        ("code_norm_weight", code_norm_weight, (steps, width)),
        ("code_norm_bias", code_norm_bias, (steps, width)),
    )
    require_shapes(op, expected)


def why_not(*arguments: Any) -> list[str]:
    """What keeps native from running a call of the op, whose arguments these are."""
    tensors = arguments[: len(_NAMES)]
    reasons = []
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        reasons.append("native layer_recurrence has no gradient, and this call needs one")
    if any(x.dtype != torch.float32 for x in tensors):
        reasons.append(f"native layer_recurrence takes float32 tensors; the state is {tensors[0].dtype}")
    return reasons


@torch.library.impl("pudnet::layer_recurrence_native", "cpu")
def forward(*arguments: Any) -> Tensor:
    """The op: its tensors, alpha, normalise_state -> codes ``[B, L, D]``.

    ``PUDNET_INSTRUCTION_SET`` (``avx512``, ``avx2`` or ``portable``) overrides the choice of vector code.
    """
    *tensors, alpha, normalise_state = arguments
    check(*tensors)
    require_together("layer_recurrence", tensors, torch.float32)
    dense = dict(zip(_NAMES, (x.contiguous() for x in tensors), strict=True))
    batch, layers, width = dense["state"].shape
    steps = dense["code_norm_weight"].shape[0]
    codes = torch.empty(batch, steps, width)
    try:
        _extension.load().layer_recurrence_cpu(
            **{name: x.data_ptr() for name, x in dense.items()},
            batch=batch,
            layers=layers,
            width=width,
            steps=steps,
            alpha=alpha,
            normalise_state=normalise_state,
            codes=codes.data_ptr(),
            threads=torch.get_num_threads(),
            instruction_set=os.environ.get("PUDNET_INSTRUCTION_SET", ""),
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    return codes
