"""Stage 2, sketch -> dataset embedding: the mean of per-image features over the sketch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet.errors import InputError, message

CHANNELS = (16, 32, 32)
NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


class DatasetEmbedding(nn.Module):
    """Three strided 5x5 convolutions and a linear map per image, then the mean over the images (PudNet, embedding).

    Args:
        image_size: side of the square sketch images.
        layers: G, GRU layers to initialise.
        width: D, their width.
        norm: ``"batch"`` (BatchNorm1d, the published core) or ``"layer"`` (LayerNorm: an image's features do not depend
            on what else is in the sketch, and datasets stay distinguishable while training on one at a time).
        conditioned: False: it sees blank images in place of the sketch's, so that all datasets have one embedding.
    """

    def __init__(self, image_size: int, layers: int, width: int, norm: str, conditioned: bool = True) -> None:
        super().__init__()
        if norm not in NORMS:
            raise InputError(message("DatasetEmbedding", "norm", f"one of {sorted(NORMS)}", repr(norm)))
        self.layers, self.width, self.conditioned = layers, width, conditioned
        sizes = (3, *CHANNELS)
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 5, stride=2, padding=2) for i, o in pairwise(sizes))
        side = image_size
        for _ in CHANNELS:
            side = (side + 1) // 2
        self.linear = nn.Linear(CHANNELS[-1] * side * side, layers * width)
        self.norm = NORMS[norm](layers * width)

    def image_features(self, images: Tensor) -> Tensor:
        """Features of single images: ``[n, 3, H, W] -> [n, G * D]``."""
        x = images if self.conditioned else torch.zeros_like(images)
        for conv in self.convs:
            x = F.gelu(conv(x))
        return F.gelu(self.norm(self.linear(x.flatten(1))))

    def forward(self, images: Tensor, counts: list[int]) -> Tensor:
        """Embed several sketches at once.

        Args:
            images: the images of all sketches, one sketch after the other, ``[sum(counts), 3, H, W]``.
            counts: images of each sketch, B of them.

        Returns:
            ``[B, G, D]``, the initial state H_0 of the recurrence.
        """
        return self.pool(self.image_features(images), counts)

    def pool(self, features: Tensor, counts: list[int]) -> Tensor:
        """Means over the images of each sketch: ``[sum(counts), G * D] -> [B, G, D]``."""
        means = torch.stack([part.mean(dim=0) for part in torch.split(features, counts)])  # [B, G * D]
        return means.view(len(counts), self.layers, self.width)
