"""Pieces that several kernels share: products, activations, and what a launcher asks of its tensors."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

# Read once, as @triton.jit itself does: the interpreter holds bfloat16 as integers and its tl.dot multiplies those.
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def dot(a, b, acc):
    """``acc + a @ b`` for blocks of one dtype, summed in float32; float32 factors keep their precision (3xTF32)."""
    if INTERPRET:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def gelu(x):
    """Exact GELU."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_slope(x):
    """Derivative of the exact GELU."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def tanh(x):
    """tanh without libdevice, which the interpreter lacks; exact to float32 rounding, no overflow."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


def on_device(launch: Callable[P, T]) -> Callable[P, T]:
    """Make the device of the first tensor current for a launcher: Triton launches on the current one."""

    @functools.wraps(launch)
    def launch_there(*args: P.args, **kwargs: P.kwargs) -> T:
        first = args[0]
        assert isinstance(first, Tensor)
        with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
            return launch(*args, **kwargs)

    return launch_there


def ready(x: Tensor) -> Tensor:
    """``x`` contiguous and on a 16-byte boundary, as the kernels are compiled to expect; copied only if it is not."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
