"""Stage 3, embedding -> one code per layer: a GRU that walks the layers of the target network."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pudnet import ops
from pudnet.errors import InputError, message

RECURRENCES = ("ahru", "gru")


class LayerRecurrence(nn.Module):
    """The parameters of the recurrence over L layers.

    Args:
        num_layers: L, layers of the target network.
        layers: G, GRU layers.
        width: D, their width and the codes'.
        recurrence: ``"ahru"`` (PudNet's adaptive hyper-recurrent unit) or ``"gru"`` (the earlier paper's plain shared
            GRU: no LayerNorm on the state, no re-injection of the sketch).
        alpha: share of the dataset embedding mixed into every code (``"ahru"`` only).
    """

    def __init__(self, num_layers: int, layers: int, width: int, recurrence: str, alpha: float) -> None:
        super().__init__()
        if recurrence not in RECURRENCES:
            raise InputError(message("LayerRecurrence", "recurrence", f"one of {list(RECURRENCES)}", repr(recurrence)))
        self.normalise_state = recurrence == "ahru"
        self.alpha = alpha if recurrence == "ahru" else 0.0
        bound = 1 / math.sqrt(width)

        def uniform(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))

        self.start = nn.Parameter(torch.randn(width))
        self.weight_ih, self.weight_hh = uniform(layers, 3 * width, width), uniform(layers, 3 * width, width)
        self.bias_ih, self.bias_hh = uniform(layers, 3 * width), uniform(layers, 3 * width)
        self.out_weight, self.out_bias = uniform(width, width), uniform(width)
        self.state_norm_weight, self.state_norm_bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.code_norm_weight = nn.Parameter(torch.ones(num_layers, width))
        self.code_norm_bias = nn.Parameter(torch.zeros(num_layers, width))

    def forward(self, embedding: Tensor) -> Tensor:
        """``[B, G, D] -> codes [B, L, D]``."""
        return ops.layer_recurrence(
            embedding,
            self.start,
            self.weight_ih,
            self.weight_hh,
            self.bias_ih,
            self.bias_hh,
            self.out_weight,
            self.out_bias,
            self.state_norm_weight,
            self.state_norm_bias,
            self.code_norm_weight,
            self.code_norm_bias,
            alpha=self.alpha,
            normalise_state=self.normalise_state,
        )
