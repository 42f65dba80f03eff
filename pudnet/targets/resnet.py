"""ResNet-18 and ResNet-34 without their classifier (arXiv 1512.03385), with torchvision's parameter names."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pudnet.targets.folding import conv_norm

WIDTHS = (64, 128, 256, 512)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the shortcut is a 1x1 convolution where the shape changes.

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        stride: of the first convolution and the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``[n, inputs, H, W] -> [n, outputs, H/stride, W/stride]``."""
        shortcut = x if self.downsample is None else conv_norm(self.downsample[0], self.downsample[1], x)
        x = F.relu(conv_norm(self.conv1, self.bn1, x))
        return F.relu(conv_norm(self.conv2, self.bn2, x) + shortcut)


class ResNet(nn.Module):
    """Four stages of basic blocks behind a stem.

    Args:
        blocks: number of blocks in each stage.
        stem: 32 for small images (3x3, stride 1, no pooling), 224 for large ones (7x7, stride 2, then max-pooling).
    """

    def __init__(self, blocks: tuple[int, int, int, int], stem: int) -> None:
        super().__init__()
        self.stem = stem
        if stem == 224:
            self.conv1 = nn.Conv2d(3, WIDTHS[0], 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        inputs = WIDTHS[0]
        for stage, (count, outputs) in enumerate(zip(blocks, WIDTHS, strict=True), start=1):
            stride = 1 if stage == 1 else 2
            parts = [BasicBlock(inputs, outputs, stride)]
            parts += [BasicBlock(outputs, outputs, 1) for _ in range(count - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(*parts))
            inputs = outputs
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # for networks trained from scratch; as in the paper, fan-out variance
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """The stem's output, then every block's: ``[n, 64, H', W']`` to ``[n, 512, H'/8, W'/8]``.

        H' is H behind the small stem and H/4 behind the large one.
        """
        x = F.relu(conv_norm(self.conv1, self.bn1, x))
        if self.stem == 224:
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        maps = [x]
        for stage in range(1, 5):
            for block in self.get_submodule(f"layer{stage}").children():
                maps.append(block(maps[-1]))
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """Features of the last block, averaged over the positions: ``[n, 3, H, W] -> [n, 512]``."""
        return self.feature_maps(x)[-1].mean(dim=(2, 3))


def resnet18(stem: int = 32) -> ResNet:
    """ResNet-18: 20 convolutions."""
    return ResNet((2, 2, 2, 2), stem)


def resnet34(stem: int = 32) -> ResNet:
    """ResNet-34: 36 convolutions."""
    return ResNet((3, 4, 6, 3), stem)
