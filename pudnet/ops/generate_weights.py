"""The op ``generate_weights``: one code per layer -> all generated weights in one flat row."""

from __future__ import annotations

from torch import Tensor

from pudnet.errors import ShapeError, message
from pudnet.ops import reference


def generate_weights(
    codes: Tensor,  # [B, L, D]
    fc_weight: Tensor,  # [sum over layers of h * kH * kW, D]
    fc_bias: Tensor,  # [the same]
    mix_weight: Tensor,  # [L, 2h, h]
    mix_bias: Tensor,  # [L, 2h]
    row_weight: Tensor,  # [R, 2h]
    row_bias: Tensor,  # [R]
    shapes: list[int],  # O, I, kH, kW of each layer
) -> Tensor:
    """Generate the weights of all layers; meaning and formulas: ``reference.generate_weights``.

    Returns:
        Flat weights ``[B, P]``, each layer in channels-last order ``[O, kH, kW, I]``.

    Raises:
        ShapeError: ``codes`` does not fit the parameters.
    """
    layers, width = mix_weight.shape[0], fc_weight.shape[1]
    if codes.ndim != 3 or tuple(codes.shape[1:]) != (layers, width):
        raise ShapeError(message("generate_weights", "codes", f"[B, {layers}, {width}]", list(codes.shape)))
    return reference.generate_weights(
        codes, fc_weight, fc_bias, mix_weight, mix_bias, row_weight, row_bias, shapes
    )
