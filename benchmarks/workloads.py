"""The named cases: networks, hypernetworks and the arguments that ops meet in them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from timing import DEVICE, ROOT
from torch import Tensor, nn

from pudnet import PudNet, backends

sys.path.insert(0, str(ROOT / "tests" / "fixtures"))
import plain_ghn
import plain_heads
from torchvision_nets import NETWORKS

__all__ = ["NETWORKS", "TARGETS", "Plain", "arguments_of", "hypernetwork", "images", "plain_ghn", "plain_heads"]

SKETCH = 100  # images of a dataset


class Plain(nn.Module):
    """L convolutions of 3 x 3 with w channels each and nothing else: P = 9 w (3 + (L - 1) w)."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(width if i else 3, width, 3, padding=1, bias=False) for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x))
        return x.mean(dim=(2, 3))


TARGETS = {"convnet3": "convnet3", "resnet18-32": "resnet18", "resnet18-224": "resnet18-224", "plain-24M": None}


@functools.cache
def hypernetwork(name: str) -> PudNet:
    """A PudNet with random parameters for one of ``TARGETS``, in evaluation mode."""
    target = TARGETS[name]
    net = PudNet(target) if target else PudNet(Plain(layers=11, width=516), image_size=32)
    return net.to(DEVICE).eval().requires_grad_(False)


def images(side: int, count: int = SKETCH, seed: int = 0) -> Tensor:
    """uint8 noise ``[count, side, side, 3]``."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return torch.from_numpy(pixels).to(DEVICE)


def arguments_of(op: str, run: Callable[[], object]) -> tuple[Any, ...]:
    """What ``op`` is first called with in ``run``."""
    found: list[tuple[Any, ...]] = []
    call = backends.call

    def record(name: str, device: torch.device, backend: str | None, *arguments: Any) -> Any:
        if name == op:
            found.append(arguments)
        return call(name, device, backend, *arguments)

    with mock.patch.object(backends, "call", record), torch.no_grad():
        run()
    return found[0]
