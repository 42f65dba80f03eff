"""Weights without a hypernetwork: random ones, and principal components of the dataset's own patches."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet.directions import RANK_TOLERANCE, normalising_by_batch
from pudnet.errors import InputError, ShapeError, message
from pudnet.specs import GENERATED_MODULES

MOST_PATCHES = 32_768  # per layer; more no longer move the leading components


def random_weights(module: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of ``module``, initialised anew: convolutions by He's normal distribution, the rest as torch does."""
    fresh = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for child in fresh.modules():
            reset = getattr(child, "reset_parameters", None)
            if callable(reset):
                reset()
    for child in fresh.modules():
        if isinstance(child, GENERATED_MODULES):
            nn.init.normal_(child.weight, std=_he_std(child), generator=generator)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
    return fresh.requires_grad_(True)


def _he_std(conv: nn.Conv2d | nn.ConvTranspose2d) -> float:
    """sqrt(2 / fan_in): ReLU halves the second moment."""
    kernel = conv.kernel_size[0] * conv.kernel_size[1]
    return float((2 / (conv.in_channels // conv.groups * kernel)) ** 0.5)


def pca_weights(module: nn.Module, images: Tensor, *, seed: int = 0) -> nn.Module:
    """Untrained weights made from a dataset by construction: layer-wise principal components of its patches.

    Layer by layer, in the order the network calls them: take the patches a convolution reads from ``images``; its
    kernels are the leading eigenvectors of their covariance at unit norm and the negatives of these (ReLU would lose
    the half of each that is below the mean); where the patches have fewer dimensions than half the output channels,
    the remaining kernels are random at unit norm. BatchNorm is calibrated on the same images before the next layer is
    made. One forward pass does it all, whatever lies between the convolutions.

    Args:
        module: the architecture, with 2-D convolutions; copied, its own weights play no part.
        images: normalised ``[n, 3, H, W]``, a few hundred: a sketch of the dataset.
        seed: of the random kernels and of the sample of patches.

    Returns:
        The network in eval mode, its BatchNorm statistics those of ``images``.

    Raises:
        InputError: no convolution, or a transposed one: its kernels read no patches.
        ShapeError: ``images`` is not as said above.
    """
    where = "pca_weights"
    if images.dim() != 4 or len(images) < 2:
        raise ShapeError(message(where, "images", "[n, 3, H, W] with n of at least 2", list(images.shape)))
    network = random_weights(module, seed)
    convolutions = [child for child in network.modules() if isinstance(child, nn.Conv2d)]
    if not convolutions or any(isinstance(child, nn.ConvTranspose2d) for child in network.modules()):
        rule = "a network of ordinary 2-D convolutions"
        raise InputError(message(where, "module", rule, type(module).__name__))
    generator = torch.Generator().manual_seed(seed)
    made: set[nn.Module] = set()

    def make(conv: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(conv, nn.Conv2d) and conv not in made:  # a layer called twice keeps the kernels of its first call
            made.add(conv)
            conv.weight.copy_(_pca_kernels(conv, inputs[0], generator))

    handles = [conv.register_forward_pre_hook(make) for conv in convolutions]
    try:
        with torch.no_grad(), normalising_by_batch(network):
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    return network


def _pca_kernels(conv: nn.Conv2d, x: Tensor, generator: torch.Generator) -> Tensor:
    """Kernels ``[O, I, kH, kW]`` from the input ``x [n, I * groups, H, W]`` of a convolution."""
    patches = _patches(conv, x, generator)  # [m, d]
    centred = patches - patches.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))  # ascending
    outputs, dimensions = conv.out_channels, len(values)
    rank = int((values > RANK_TOLERANCE * values[-1]).sum())
    pairs = min(outputs // 2, rank)
    leading = vectors.flip(1)[:, :pairs].T  # [pairs, d]
    rest = torch.randn(outputs - 2 * pairs, dimensions, generator=generator, dtype=x.dtype)
    kernels = torch.cat([leading, -leading, F.normalize(rest, dim=1)])
    return kernels.view(conv.weight.shape)


def _patches(conv: nn.Conv2d, x: Tensor, generator: torch.Generator) -> Tensor:
    """At most ``MOST_PATCHES`` of the patches inside ``x`` that ``conv`` reads: ``[m, I * kH * kW]``."""
    if x.shape[2] < _reach(conv, 0) or x.shape[3] < _reach(conv, 1):  # no patch fits inside: pad as the layer does
        padding = conv.padding if isinstance(conv.padding, tuple) else tuple(size - 1 for size in conv.kernel_size)
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    grouped = x.reshape(-1, x.shape[1] // conv.groups, *x.shape[2:])  # [n * groups, I, H, W]
    positions = _positions(conv, grouped)
    share = max(1, MOST_PATCHES // len(grouped))  # patches taken from each image
    found = []
    for chunk in grouped.split(32):
        unfolded = F.unfold(chunk, conv.kernel_size, conv.dilation, 0, conv.stride)  # [c, d, positions]
        if share < positions:
            unfolded = unfolded[:, :, torch.randperm(positions, generator=generator)[:share]]
        found.append(unfolded.transpose(1, 2).flatten(0, 1))
    return torch.cat(found)


def _reach(conv: nn.Conv2d, axis: int) -> int:
    return conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1


def _positions(conv: nn.Conv2d, x: Tensor) -> int:
    down, across = ((x.shape[2 + axis] - _reach(conv, axis)) // conv.stride[axis] + 1 for axis in (0, 1))
    return down * across
