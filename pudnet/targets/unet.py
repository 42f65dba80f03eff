"""The denoising U-Net of the PudNet paper's image denoising experiment (arXiv 2310.11862), as in its released code."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet.errors import ShapeError, message


class UNet(nn.Module):
    """A U-Net of 3x3 convolutions without bias, each followed by BatchNorm and ReLU, the last one included.

    The encoder has two convolutions a level and average pooling between levels. The decoder has as many transposed
    convolutions of stride 1 and goes back up by nearest up-sampling, each time concatenating [skip, up-sampled].

    Args:
        width: channels of the top level; they double from level to level.
        depth: number of poolings; 4 in the paper: 9 convolutions and 9 transposed ones.
    """

    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.depth = depth
        widths = [width * 2**level for level in range(depth + 1)]
        down: list[tuple[int, int]] = [(3, width)]
        up: list[tuple[int, int]] = []
        for narrow, wide in pairwise(widths):
            down += [(narrow, narrow), (narrow, wide)]
            # The second one reads the concatenation of skip and up-sampled, narrow channels each.
            up = [(wide, narrow), (wide, narrow), *up]
        up.append((width, 3))
        self.encoder = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o in down)
        self.encoder_norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o in down)
        self.decoder = nn.ModuleList(nn.ConvTranspose2d(i, o, 3, padding=1, bias=False) for i, o in up)
        self.decoder_norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o in up)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, 3, H, W] -> [n, 3, H, W]``.

        Raises:
            ShapeError: H or W is not a multiple of ``2**depth``.
        """
        step = 2**self.depth
        if x.shape[-2] % step or x.shape[-1] % step:
            raise ShapeError(message("UNet", "x", f"of a height and width that are multiples of {step}", list(x.shape)))
        skips = []
        for k, (conv, norm) in enumerate(zip(self.encoder, self.encoder_norms, strict=True)):
            x = F.relu(norm(conv(x)))
            if k % 2 == 1:
                skips.append(x)
                x = F.avg_pool2d(x, 2)
        for k, (conv, norm) in enumerate(zip(self.decoder, self.decoder_norms, strict=True)):
            x = F.relu(norm(conv(x)))
            if k % 2 == 0 and skips:
                x = torch.cat([skips.pop(), F.interpolate(x, scale_factor=2, mode="nearest")], dim=1)
        return x
