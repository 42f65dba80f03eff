"""Stage 4, codes -> weights: one small generator per layer, all of them in a few flat tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pudnet import ops
from pudnet.ops import reference
from pudnet.specs import WeightLayout


class WeightGenerators(nn.Module):
    """The generators of all L layers (PudNet, weight generator): D -> h x kH x kW, then 1x1 maps h -> 2h -> O * I.

    The last map, nearly all of the parameters, is one matrix ``row_weight [R, 2h]`` over all layers, so that one launch
    can generate everything.

    Args:
        layout: the weights to generate.
        width: D, width of the codes.
        hidden: h, channels inside a generator.
    """

    def __init__(self, layout: WeightLayout, width: int, hidden: int) -> None:
        super().__init__()
        self.layout = layout
        num_layers = len(layout.entries)
        fc_rows = sum(hidden * entry.spatial for entry in layout.entries)
        self.fc_weight = nn.Parameter(torch.randn(fc_rows, width) / width**0.5)
        self.fc_bias = nn.Parameter(torch.zeros(fc_rows))
        self.mix_weight = nn.Parameter(torch.randn(num_layers, 2 * hidden, hidden) * (2 / hidden) ** 0.5)
        self.mix_bias = nn.Parameter(torch.zeros(num_layers, 2 * hidden))
        self.row_weight = nn.Parameter(torch.randn(layout.rows, 2 * hidden))
        self.row_bias = nn.Parameter(torch.zeros(layout.rows))
        self._scale_to_fan_in()

    @torch.no_grad()
    def _scale_to_fan_in(self) -> None:
        """Scale each layer's rows so that, for standard-normal codes, its kernel has variance 2 / fan_in.

        The feature power is measured, not derived: GELU has no simple second moment.
        """
        codes = torch.randn(64, len(self.layout.entries), self.fc_weight.shape[1])
        weights = self.layout.views(
            reference.generate_weights(codes, *(p.detach() for p in self.parameters()), self.layout.shapes)
        )
        start = 0
        for entry in self.layout.entries:
            power = weights[entry.name].square().mean().sqrt()
            self.row_weight[start : start + entry.rows] *= (2 / entry.fan_in) ** 0.5 / power
            start += entry.rows

    def forward(self, codes: Tensor) -> Tensor:
        """``[B, L, D] -> flat weights [B, P]``, laid out as ``layout`` says."""
        return ops.generate_weights(
            codes,
            self.fc_weight,
            self.fc_bias,
            self.mix_weight,
            self.mix_bias,
            self.row_weight,
            self.row_bias,
            self.layout.shapes,
        )
