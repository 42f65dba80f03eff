"""Features of sketch images on the CPU through ``pudnet._C``, from parameters packed once; forward only."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_linear_bn_eval

from pudnet import _extension
from pudnet.errors import InputError
from pudnet.ops._native_generation import empty

COLUMNS = 16  # kColumns in csrc/embed_images.h
KERNEL, STRIDE, PADDING, EPSILON = (5, 5), (2, 2), (2, 2), 1e-5  # what the vector code is written for


@dataclass(frozen=True)
class PackedEncoder:
    """Maps by 16 outputs, ``[O / 16, inputs, 16]``, inputs channels last, and their biases; made by ``pack``."""

    weights: list[Tensor]
    biases: list[Tensor]
    norm: tuple[Tensor, Tensor] | None
    scale: list[float]
    shift: list[float]


def why_not(convs: list[nn.Conv2d], linear: nn.Linear, norm: nn.Module) -> list[str]:
    """What keeps native from running an encoder of these layers; empty where nothing does."""
    reasons = _extension.why_not()
    if len(convs) != 3 or any((c.kernel_size, c.stride, c.padding) != (KERNEL, STRIDE, PADDING) for c in convs):
        reasons = [*reasons, "native embed_images takes three 5 x 5 convolutions of stride 2 and padding 2"]
    if any(layer.bias is None for layer in (*convs, linear)):
        reasons = [*reasons, "native embed_images takes layers with a bias"]
    if any(size % COLUMNS for size in (*(c.out_channels for c in convs), linear.out_features)):
        reasons = [*reasons, f"native embed_images takes maps whose outputs are multiples of {COLUMNS}"]
    if not isinstance(norm, nn.BatchNorm1d) and not (isinstance(norm, nn.LayerNorm) and norm.eps == EPSILON):
        reasons = [*reasons, f"native embed_images takes BatchNorm1d or LayerNorm with epsilon {EPSILON}"]
    return reasons


@torch.no_grad()
def pack(
    convs: list[nn.Conv2d], linear: nn.Linear, norm: nn.Module, scale: list[float], shift: list[float]
) -> PackedEncoder:
    """Copy an encoder's parameters into the order they are read; BatchNorm, as in evaluation, goes into the linear map.

    Args:
        convs, linear, norm: layers for which ``why_not`` has no reason.
        scale, shift: of the bytes of each channel.
    """
    after = None
    if isinstance(norm, nn.BatchNorm1d):
        linear = fuse_linear_bn_eval(linear, norm)
    elif isinstance(norm, nn.LayerNorm):
        after = (norm.weight.detach().clone(), norm.bias.detach().clone())
    channels = convs[-1].out_channels
    by_pixel = linear.weight.view(len(linear.weight), channels, -1).transpose(1, 2)  # [F, H * W, C]
    matrices = [*(conv.weight.permute(0, 2, 3, 1).flatten(1) for conv in convs), by_pixel.flatten(1)]
    packed = []
    for matrix in matrices:
        tiles = matrix.view(-1, COLUMNS, matrix.shape[1]).transpose(1, 2)  # [O / 16, inputs, 16]
        packed.append(empty(*tiles.shape, dtype=torch.float32).copy_(tiles))
    layers: list[nn.Conv2d | nn.Linear] = [*convs, linear]
    biases = [layer.bias.detach().clone() for layer in layers if layer.bias is not None]
    return PackedEncoder(packed, biases, after, scale, shift)


def image_features(pixels: Tensor, encoder: PackedEncoder) -> Tensor:
    """Features of single images: uint8 ``[n, S, S, 3]`` -> ``[n, F]``.

    ``PUDNET_INSTRUCTION_SET`` (``avx512``, ``avx2`` or ``portable``) overrides the choice of vector code.
    """
    dense = pixels.contiguous()
    outputs = [len(bias) for bias in encoder.biases]
    features = torch.empty(len(dense), outputs[-1])
    norm = [x.data_ptr() for x in encoder.norm] if encoder.norm else [0, 0]
    try:
        _extension.load().embed_images_cpu(
            pixels=dense.data_ptr(),
            images=len(dense),
            side=dense.shape[1],
            scale=encoder.scale,
            shift=encoder.shift,
            weights=[x.data_ptr() for x in encoder.weights],
            biases=[x.data_ptr() for x in encoder.biases],
            outputs=outputs,
            norm_weight=norm[0],
            norm_bias=norm[1],
            features=features.data_ptr(),
            threads=torch.get_num_threads(),
            instruction_set=os.environ.get("PUDNET_INSTRUCTION_SET", ""),
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    return features
