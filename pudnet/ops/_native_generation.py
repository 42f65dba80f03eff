"""``generate_weights`` on CPU tensors through ``pudnet._C``: the op, its gradient, and rows prepared once."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pudnet import _extension
from pudnet.errors import DtypeError, InputError, ShapeError, message

TILE_ROWS = 16  # kTileRows in csrc/generate_weights.h
ALIGNMENT = 64  # bytes: a cache line, and the widest store
DTYPES = (torch.float32, torch.bfloat16)


def aligned_memory(size: int) -> np.ndarray[Any, Any]:
    """Memory for ``size`` bytes, uint8, that begins on a cache line.

    From NumPy, which asks for huge pages where it is large: the first write to 45 MB in small pages takes several times
    as long as generating what is written.
    """
    memory = np.empty(size + ALIGNMENT, dtype=np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size]


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """``torch.empty`` in such memory."""
    return torch.from_numpy(aligned_memory(math.prod(shape) * dtype.itemsize)).view(dtype).view(shape)


def flat_size(shapes: list[int]) -> int:
    """P, of the four sizes of every layer."""
    return sum(o * i * kh * kw for o, i, kh, kw in _layers(shapes))


def _layers(shapes: list[int]) -> list[tuple[int, int, int, int]]:
    return list(zip(shapes[0::4], shapes[1::4], shapes[2::4], shapes[3::4], strict=True))


@dataclass(frozen=True)
class Rows:
    """The generator rows in the order they are read: ``[R, 2h]`` as they are, or packed in tiles by ``pack_rows``."""

    weight: Tensor
    bias: Tensor
    packed: bool


def pack_rows(row_weight: Tensor, row_bias: Tensor, shapes: list[int], dtype: torch.dtype = torch.float32) -> Rows:
    """Copy the rows into tiles that vector code reads straight through; for parameters used many times.

    Args:
        row_weight: ``[R, 2h]``.
        row_bias: ``[R]``.
        shapes: O, I, kH, kW of each layer.
        dtype: of the copy, float32 or bfloat16.

    Raises:
        DtypeError: another dtype.
    """
    if dtype not in DTYPES:
        raise DtypeError(message("pack_rows", "dtype", "torch.float32 or torch.bfloat16", dtype))
    features, bfloat16 = row_weight.shape[1], dtype == torch.bfloat16
    tiles = sum(-(-o * i // TILE_ROWS) for o, i, _, _ in _layers(shapes))
    stored = features + features % 2 if bfloat16 else features  # bfloat16 features are stored in pairs
    weight, bias = empty(tiles, stored * TILE_ROWS, dtype=dtype), empty(tiles, TILE_ROWS, dtype=dtype)
    row_weight, row_bias = (x.detach().to("cpu", torch.float32).contiguous() for x in (row_weight, row_bias))
    _extension.load().pack_rows_cpu(
        row_weight=row_weight.data_ptr(),
        row_bias=row_bias.data_ptr(),
        features=features,
        shapes=shapes,
        bfloat16=bfloat16,
        packed_weight=weight.data_ptr(),
        packed_bias=bias.data_ptr(),
    )
    return Rows(weight, bias, packed=True)


def generate(
    codes: Tensor,  # [B, L, D]
    fc_weight: Tensor,
    fc_bias: Tensor,
    mix_weight: Tensor,
    mix_bias: Tensor,
    rows: Rows,
    shapes: list[int],
    out: Tensor | None = None,  # [B, P]
) -> Tensor:
    """Generate all weights of all datasets in one pass over the rows; not differentiable.

    ``PUDNET_INSTRUCTION_SET`` (``avx512``, ``avx2`` or ``portable``) overrides the choice of vector code.

    Args:
        codes: ``[B, L, D]`` float32, and so are the parameters but the rows.
        rows: float32 or bfloat16; sums are float32.
        out: where to write, contiguous ``[B, P]``, float32 or bfloat16; a new float32 tensor by default.

    Raises:
        ShapeError, DtypeError: ``out`` does not fit.
    """
    batch, size = codes.shape[0], flat_size(shapes)
    if out is None:
        out = empty(batch, size, dtype=torch.float32)
    if tuple(out.shape) != (batch, size) or not out.is_contiguous():
        raise ShapeError(message("generate_weights", "out", f"contiguous [{batch}, {size}]", list(out.shape)))
    if out.dtype not in DTYPES or out.device.type != "cpu":
        rule = "torch.float32 or torch.bfloat16 on the CPU"
        raise DtypeError(message("generate_weights", "out", rule, f"{out.dtype} on {out.device}"))
    # Held in variables: a temporary copy must live until the call is over.
    parts = {"codes": codes, "fc_weight": fc_weight, "fc_bias": fc_bias, "mix_weight": mix_weight, "mix_bias": mix_bias}
    dense = {name: x.contiguous() for name, x in parts.items()}
    weight, bias = rows.weight.contiguous(), rows.bias.contiguous()
    try:
        _extension.load().generate_weights_cpu(
            **{name: x.data_ptr() for name, x in dense.items()},
            batch=batch,
            width=codes.shape[2],
            hidden=mix_weight.shape[2],
            shapes=shapes,
            row_weight=weight.data_ptr(),
            row_bias=bias.data_ptr(),
            packed=rows.packed,
            bfloat16=weight.dtype == torch.bfloat16,
            out=out.data_ptr(),
            out_bfloat16=out.dtype == torch.bfloat16,
            threads=torch.get_num_threads(),
            instruction_set=os.environ.get("PUDNET_INSTRUCTION_SET", ""),
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    return out


def why_not(codes: Tensor, *rest: Any) -> list[str]:
    """What keeps native from running a call of the op, whose arguments these are."""
    row_weight, row_bias, dtype = rest[4], rest[5], rest[7]
    reasons = []
    if codes.dtype != torch.float32:
        reasons.append(f"native generate_weights takes float32 codes; got {codes.dtype}")
    if row_weight.dtype not in DTYPES or row_bias.dtype != row_weight.dtype:
        got = f"{row_weight.dtype}, {row_bias.dtype}"
        reasons.append(f"native generate_weights takes float32 or bfloat16 rows; got {got}")
    if dtype not in DTYPES:
        reasons.append(f"native generate_weights gives float32 or bfloat16 weights, not {dtype}")
    return reasons


def forward(*arguments: Any) -> Tensor:
    """The op: its tensors, shapes, dtype -> weights ``[B, P]``."""
    *maps, row_weight, row_bias, shapes, dtype = arguments
    codes, fc_weight, fc_bias, mix_weight, mix_bias = (x.to(torch.float32) for x in maps)
    out = empty(codes.shape[0], flat_size(shapes), dtype=dtype)
    rows = Rows(row_weight, row_bias, packed=False)
    return generate(codes, fc_weight, fc_bias, mix_weight, mix_bias, rows, shapes, out)


def backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The gradient: that of the weights, the op's tensors, shapes -> gradients of these tensors.

    By the chain rule, layer by layer; what is cheap (the features) is computed again, not kept.
    """
    d_flat, *tensors, shapes = arguments
    codes, fc_weight, fc_bias, mix_weight, mix_bias, row_weight, _ = (x.float() for x in tensors)
    batch, hidden = codes.shape[0], mix_weight.shape[2]
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
    d_codes, d_fc_weight, d_fc_bias, d_mix_weight, d_mix_bias, d_row_weight, d_row_bias = gradients
    fc_start = row_start = out_start = 0
    for t, (o, i, kh, kw) in enumerate(_layers(shapes)):
        spatial, rows = kh * kw, o * i
        fc, row = slice(fc_start, fc_start + hidden * spatial), slice(row_start, row_start + rows)
        # Forward again: code -> inner -> feature.
        inner_in = F.linear(codes[:, t], fc_weight[fc], fc_bias[fc])  # [B, h * S]
        inner = F.gelu(inner_in).view(batch, hidden, spatial)
        feature_in = mix_weight[t] @ inner + mix_bias[t, :, None]  # [B, 2h, S]
        stacked = F.gelu(feature_in).transpose(1, 2).reshape(batch * spatial, 2 * hidden)
        # Backward: kernel -> feature -> inner -> code.
        d_kernel = d_flat[:, out_start : out_start + rows * spatial].reshape(batch, o, spatial, i).float()
        d_kernel = d_kernel.transpose(1, 2).reshape(batch * spatial, rows)  # [B * S, O * I]
        d_row_weight[row] = d_kernel.t() @ stacked
        d_row_bias[row] = d_kernel.sum(0)
        d_feature = (d_kernel @ row_weight[row]).view(batch, spatial, 2 * hidden).transpose(1, 2)  # [B, 2h, S]
        d_feature_in = torch.ops.aten.gelu_backward(d_feature, feature_in)
        d_mix_weight[t] = (d_feature_in @ inner.transpose(1, 2)).sum(0)
        d_mix_bias[t] = d_feature_in.sum((0, 2))
        d_inner = (mix_weight[t].t() @ d_feature_in).reshape(batch, hidden * spatial)
        d_inner_in = torch.ops.aten.gelu_backward(d_inner, inner_in)  # [B, h * S]
        d_fc_weight[fc] = d_inner_in.t() @ codes[:, t]
        d_fc_bias[fc] = d_inner_in.sum(0)
        d_codes[:, t] = d_inner_in @ fc_weight[fc]
        fc_start += hidden * spatial
        row_start += rows
        out_start += rows * spatial
    return tuple(gradients)
