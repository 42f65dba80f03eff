"""``layer_recurrence`` on CPU tensors through ``pudnet._C``, forward only."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from pudnet import _extension
from pudnet.errors import InputError

_NAMES = (
    "state", "start", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "out_weight", "out_bias",
    "state_norm_weight", "state_norm_bias", "code_norm_weight", "code_norm_bias",
)  # fmt: skip


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
