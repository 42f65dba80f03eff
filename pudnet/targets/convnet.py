"""ConvNet-3: three 3x3 convolutions, each followed by BatchNorm, ReLU and 2x2 max-pooling."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pudnet.targets.folding import conv_norm, max_pool


class ConvNet3(nn.Module):
    """Three blocks of conv 3x3, BatchNorm, ReLU, max-pool.

    Args:
        width: channels of every block.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(i, width, 3, padding=1, bias=False) for i in (3, width, width))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """The output of every block: ``[n, width, H/2, W/2]``, ``[n, width, H/4, W/4]``, ``[n, width, H/8, W/8]``."""
        maps = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            # The same as after ReLU, which has a quarter of the work here.
            x = F.relu(max_pool(conv_norm(conv, norm, x)))
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """Features of the last block, flattened: ``[n, 3, H, W] -> [n, width * H/8 * W/8]``."""
        return self.feature_maps(x)[-1].flatten(1)
