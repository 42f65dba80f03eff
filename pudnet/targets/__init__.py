"""Target networks: the ordinary networks whose weights get predicted, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from pudnet.errors import InputError, message
from pudnet.targets.convnet import ConvNet3
from pudnet.targets.resnet import ResNet, resnet18, resnet34
from pudnet.targets.unet import UNet


@dataclass(frozen=True)
class Target:
    """A named target network: how to build it, and the side of the square images it reads."""

    build: Callable[[], nn.Module]
    image_size: int


TARGETS: dict[str, Target] = {
    "convnet3": Target(ConvNet3, 32),
    "resnet18": Target(resnet18, 32),
    "resnet18-224": Target(partial(resnet18, stem=224), 224),
    "resnet34": Target(resnet34, 32),
    "resnet34-224": Target(partial(resnet34, stem=224), 224),
    "unet": Target(UNet, 128),
}


def build_target(name: str) -> tuple[nn.Module, int]:
    """Build the target network called ``name``; returns it and its image size.

    Raises:
        InputError: there is no such target.
    """
    if name not in TARGETS:
        raise InputError(message("build_target", "name", f"one of {sorted(TARGETS)}", repr(name)))
    target = TARGETS[name]
    return target.build(), target.image_size


__all__ = ["TARGETS", "ConvNet3", "ResNet", "Target", "UNet", "build_target", "resnet18", "resnet34"]
