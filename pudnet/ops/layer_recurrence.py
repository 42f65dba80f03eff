"""The op ``layer_recurrence``: dataset embedding -> one code per layer."""

from __future__ import annotations

from torch import Tensor

from pudnet.errors import ShapeError, message
from pudnet.ops import reference


def layer_recurrence(
    state: Tensor,  # [B, G, D]
    start: Tensor,  # [D]
    weight_ih: Tensor,  # [G, 3D, D]
    weight_hh: Tensor,  # [G, 3D, D]
    bias_ih: Tensor,  # [G, 3D]
    bias_hh: Tensor,  # [G, 3D]
    out_weight: Tensor,  # [D, D]
    out_bias: Tensor,  # [D]
    state_norm_weight: Tensor,  # [D]
    state_norm_bias: Tensor,  # [D]
    code_norm_weight: Tensor,  # [L, D]
    code_norm_bias: Tensor,  # [L, D]
    *,
    alpha: float,
    normalise_state: bool,
) -> Tensor:
    """Walk the layers of the target network; meaning and formulas: ``reference.layer_recurrence``.

    Returns:
        Codes ``[B, L, D]``.

    Raises:
        ShapeError: ``state`` does not fit the parameters.
    """
    layers, width = bias_hh.shape[0], start.shape[0]
    if state.ndim != 3 or tuple(state.shape[1:]) != (layers, width):
        raise ShapeError(message("layer_recurrence", "state", f"[B, {layers}, {width}]", list(state.shape)))
    return reference.layer_recurrence(
        state, start, weight_ih, weight_hh, bias_ih, bias_hh, out_weight, out_bias,
        state_norm_weight, state_norm_bias, code_norm_weight, code_norm_bias, alpha, normalise_state,
    )  # fmt: skip
