"""A convolution and the BatchNorm behind it, as one convolution where the BatchNorm is an affine map by now."""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


def conv_norm(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(conv(x))``, the same but for rounding; on a CPU a quarter less time for ConvNet-3.

    Where the norm's statistics are fixed and nobody asks for gradients the maps are walked through once less. Modules
    are called where someone replaced them or watches them with hooks, and where ``x`` is followed through the network:
    a compiler does this by itself.
    """
    if _is_followed(x) or not _is_affine(norm) or not _is_usual(conv):
        return norm(conv(x))
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, mean, variance, norm.eps, norm.weight, norm.bias)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def max_pool(x: Tensor) -> Tensor:
    """``F.max_pool2d(x, 2)``, to the bit; on a CPU half the time where ``x`` is not followed through the network."""
    if _is_followed(x) or not x.is_cpu or min(x.shape[2:]) < 2:
        return F.max_pool2d(x, 2)
    height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    rows = torch.maximum(x[:, :, 0:height:2], x[:, :, 1:height:2])
    return torch.maximum(rows[..., 0:width:2], rows[..., 1:width:2])


def _is_followed(x: Tensor) -> bool:
    """Whether a tape, a tracer or a compiler looks at what happens to ``x``."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return torch.is_grad_enabled() or torch.compiler.is_compiling() or tracing or type(x) is not Tensor


def _is_affine(norm: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    return type(norm) is nn.BatchNorm2d and not (norm.training or norm.running_mean is None or _watched(norm))


def _is_usual(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    return type(conv) is nn.Conv2d and not _watched(conv)


def _watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
