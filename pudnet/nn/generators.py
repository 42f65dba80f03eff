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
        if not self.row_weight.is_meta:
            self.scale_to_fan_in(torch.randn(64, num_layers, width))

    @torch.no_grad()
    def scale_to_fan_in(self, codes: Tensor) -> None:
        """Scale each layer's rows so that, over ``codes [n, L, D]``, its kernel has the mean square 2 / fan_in.

        The features' second moment M is measured, not derived, as GELU has no simple one. A row ``r`` makes weights of
        mean square r' M r, so no kernel has to be generated.
        """
        inner = self.row_weight.shape[1]
        entries = self.layout.entries
        features = reference.generate_weights(
            codes,
            self.fc_weight,
            self.fc_bias,
            self.mix_weight,
            self.mix_bias,
            torch.eye(inner).repeat(len(entries), 1),  # rows that pass the features on
            torch.zeros(inner * len(entries)),
            [size for entry in entries for size in (inner, 1, *entry.shape[2:])],
        )
        parts = torch.split(features, [inner * entry.spatial for entry in entries], dim=1)
        row_parts = torch.split(self.row_weight, [entry.rows for entry in entries])
        for rows, part, entry in zip(row_parts, parts, entries, strict=True):
            feature = part.view(len(codes), inner, entry.spatial)
            moment = torch.einsum("nck,ndk->cd", feature, feature) / (len(codes) * entry.spatial)  # [2h, 2h]
            power = ((rows @ moment) * rows).sum(dim=1).mean()
            rows *= (2 / (entry.fan_in * power)).sqrt()

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
