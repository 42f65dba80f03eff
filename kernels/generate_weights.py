"""Codes -> all generated weights of a network, for all datasets, in two launches; and the gradient in four.

Forward. ``generate_features_fwd_kernel``: one program per kernel position of each layer turns the codes into features
``[B, N, C]`` (N positions of all layers together, C = 2h). ``generate_rows_fwd_kernel``, the bulk of the work: one
program per tile of BM generator rows reads its rows once, keeps them in registers, and loops over all (dataset,
position) pairs in blocks of 16. A row is one (output channel, input channel) pair, so that neighbouring rows are
neighbours in the channels-last output ``[O, kH, kW, I]`` and stores are 16 bytes wide. That needs I, the layer's offset
and P to be multiples of the store width; they are kept in the table divided by it, so that the compiler can see it.
Layers where it does not hold take the other branch of the same launch.

Backward. Everything that is summed over rows or datasets has one place that sums it, in a fixed order:
``generate_rows_bwd_kernel`` owns a tile of rows and writes each tile's share of the feature gradient,
``generate_shares_bwd_kernel`` adds the shares, ``generate_features_bwd_kernel`` owns one position and
``generate_codes_bwd_kernel`` one (layer, dataset).

Sums are float32 whatever the dtypes. A float32 product is 3xTF32, exact to float32 rounding. Where the rows are
bfloat16 the float32 features are split into two bfloat16 parts, so that hardly anything is rounded but the stored
parameters.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pudnet.kernels.blocks import dot, gelu, gelu_slope, on_device, ready

ROWS_PER_TILE = 128
PAIRS_PER_BLOCK = 16
TILES_PER_BLOCK = 32
TILE_COLUMNS = 9
POSITION_COLUMNS = 6
ROWS_FWD_WARPS, ROWS_BWD_WARPS, FEATURES_BWD_WARPS = 4, 8, 4


@triton.jit(do_not_specialize=["batch", "layers", "positions"])
def generate_features_fwd_kernel(
    p_codes,  # [B, L, D]
    p_fc_weight,  # [sum of h * kH * kW, D]
    p_fc_bias,
    p_mix_weight,  # [L, 2h, h]
    p_mix_bias,  # [L, 2h]
    p_table,  # [N, POSITION_COLUMNS]
    p_features,  # out [B, N, 2h] float32
    batch,
    layers,
    positions,
    D: tl.constexpr,
    H: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    BC: tl.constexpr,
):
    i_position = tl.program_id(0)
    layer = tl.load(p_table + i_position * 6)
    spatial = tl.load(p_table + i_position * 6 + 1)
    fc_row = tl.load(p_table + i_position * 6 + 2)
    o_d, o_h, o_c = tl.arange(0, BD), tl.arange(0, BH), tl.arange(0, BC)
    in_h, in_c = o_h < H, o_c < 2 * H
    o_fc = fc_row + o_h * spatial  # [BH]
    o_mix = (layer * 2 * H + o_c[:, None]) * H + o_h[None, :]  # [BC, BH]
    in_fc = in_h[:, None] & (o_d < D)[None, :]
    fc = tl.load(p_fc_weight + o_fc.to(tl.int64)[:, None] * D + o_d[None, :], mask=in_fc, other=0).to(tl.float32)
    fc_bias = tl.load(p_fc_bias + o_fc, mask=in_h, other=0).to(tl.float32)
    mix = tl.load(p_mix_weight + o_mix, mask=in_c[:, None] & in_h[None, :], other=0).to(tl.float32)
    mix_bias = tl.load(p_mix_bias + layer * 2 * H + o_c, mask=in_c, other=0).to(tl.float32)
    for b in range(tl.program_id(1), batch, tl.num_programs(1)):
        code = tl.load(p_codes + (b * layers + layer) * D + o_d, mask=o_d < D, other=0).to(tl.float32)
        inner = gelu(tl.sum(fc * code[None, :], axis=1) + fc_bias)  # [BH]
        feature = gelu(tl.sum(mix * inner[None, :], axis=1) + mix_bias)  # [BC]
        tl.store(p_features + (b * positions + i_position) * (2 * H) + o_c, feature, mask=in_c)


@triton.jit
def _tile(p_table, i_tile, BM: tl.constexpr, VECTOR: tl.constexpr):
    """(rows [BM] in the layer, which of them exist, their offsets in the output, I) of a tile.

    The table holds sizes divided by VECTOR; the multiplication tells the compiler what is a multiple of it.
    """
    row = tl.load(p_table + i_tile * 9) * BM + tl.arange(0, BM)  # [BM]
    rows = tl.load(p_table + i_tile * 9 + 1) * VECTOR
    inputs = tl.load(p_table + i_tile * 9 + 2) * VECTOR
    offset = tl.load(p_table + i_tile * 9 + 3) * VECTOR
    spatial = tl.load(p_table + i_tile * 9 + 4)
    return row, row < rows, offset + row + row // inputs * ((spatial - 1) * inputs), inputs


@triton.jit
def _pairs(p_table, p_features, i_tile, start, batch, positions, C: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr):
    """(features [BP, BC], dataset [BP], position in the kernel [BP], which exist [BP]) of a block of pairs."""
    spatial = tl.load(p_table + i_tile * 9 + 4)
    first = tl.load(p_table + i_tile * 9 + 5)
    o_pair, o_c = start + tl.arange(0, BP), tl.arange(0, BC)
    b = o_pair // spatial
    k = o_pair - b * spatial
    exists = o_pair < batch * spatial
    o_feature = (b * positions + first + k)[:, None] * C + o_c[None, :]
    feature = tl.load(p_features + o_feature, mask=exists[:, None] & (o_c < C)[None, :], other=0)
    return feature, b, k, exists


@triton.jit
def _rows_fwd(
    p_features, p_row_weight, p_row_bias, p_table, p_out, i_tile, batch, positions, out_stride,
    C: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row, in_rows, o_out, inputs = _tile(p_table, i_tile, BM, VECTOR)
    spatial = tl.load(p_table + i_tile * 9 + 4)
    o_row = tl.load(p_table + i_tile * 9 + 6) + row
    o_c = tl.arange(0, BC)
    o_weight = o_row.to(tl.int64)[:, None] * C + o_c[None, :]
    weight = tl.load(p_row_weight + o_weight, mask=in_rows[:, None] & (o_c < C)[None, :], other=0)  # [BM, BC]
    bias = tl.load(p_row_bias + o_row, mask=in_rows, other=0).to(tl.float32)
    weight = tl.trans(weight)
    for start in range(0, batch * spatial, BP):
        feature, b, k, exists = _pairs(p_table, p_features, i_tile, start, batch, positions, C, BC, BP)
        out = tl.zeros([BP, BM], tl.float32) + bias[None, :]
        if weight.dtype == tl.bfloat16:
            high = feature.to(tl.bfloat16)
            low = (feature - high.to(tl.float32)).to(tl.bfloat16)
            out = dot(high, weight, out)
            out = dot(low, weight, out)
        else:
            out = dot(feature, weight, out)
        o_start = b.to(tl.int64) * (out_stride * VECTOR) + k * inputs  # [BP]
        mask = exists[:, None] & in_rows[None, :]
        tl.store(p_out + o_start[:, None] + o_out[None, :], out.to(p_out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["batch", "positions", "out_stride", "wide_stride"])
def generate_rows_fwd_kernel(
    p_features,  # [B, N, C] float32
    p_row_weight,  # [R, C]
    p_row_bias,  # [R]
    p_table,  # [tiles, TILE_COLUMNS]
    p_out,  # out [B, P]
    batch,
    positions,
    out_stride,  # P
    wide_stride,  # P // VECTOR
    C: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
    BP: tl.constexpr,
    VECTOR: tl.constexpr,
):
    i_tile = tl.program_id(0)
    if tl.load(p_table + i_tile * 9 + 7) != 0:
        _rows_fwd(
            p_features, p_row_weight, p_row_bias, p_table, p_out, i_tile, batch, positions, wide_stride,
            C, BC, BM, BP, VECTOR,
        )  # fmt: skip
    else:
        _rows_fwd(
            p_features, p_row_weight, p_row_bias, p_table, p_out, i_tile, batch, positions, out_stride,
            C, BC, BM, BP, 1,
        )  # fmt: skip


@triton.jit
def _rows_bwd(
    p_d_out, p_features, p_row_weight, p_table, p_shares, p_d_row_weight, p_d_row_bias,
    i_tile, batch, positions, out_stride,
    C: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row, in_rows, o_out, inputs = _tile(p_table, i_tile, BM, VECTOR)
    spatial = tl.load(p_table + i_tile * 9 + 4)
    o_row = tl.load(p_table + i_tile * 9 + 6) + row
    o_c = tl.arange(0, BC)
    in_c = o_c < C
    o_weight = o_row.to(tl.int64)[:, None] * C + o_c[None, :]
    weight = tl.load(p_row_weight + o_weight, mask=in_rows[:, None] & in_c[None, :], other=0).to(tl.float32)
    # Shares of a layer are [tiles, B * kH * kW, C]; the table counts kH * kW over the tiles of the layers before.
    first_share = (tl.load(p_table + i_tile * 9 + 8) + tl.load(p_table + i_tile * 9) * spatial).to(tl.int64) * batch
    d_weight = tl.zeros([BM, BC], tl.float32)
    d_bias = tl.zeros([BM], tl.float32)
    for start in range(0, batch * spatial, BP):
        feature, b, k, exists = _pairs(p_table, p_features, i_tile, start, batch, positions, C, BC, BP)
        o_start = b.to(tl.int64) * (out_stride * VECTOR) + k * inputs  # [BP]
        mask = exists[:, None] & in_rows[None, :]
        d_out = tl.load(p_d_out + o_start[:, None] + o_out[None, :], mask=mask, other=0).to(tl.float32)  # [BP, BM]
        d_weight = dot(tl.trans(d_out), feature, d_weight)
        d_bias += tl.sum(d_out, axis=0)
        share = dot(d_out, weight, tl.zeros([BP, BC], tl.float32))
        o_share = (first_share + start + tl.arange(0, BP)) * C
        tl.store(p_shares + o_share[:, None] + o_c[None, :], share, mask=exists[:, None] & in_c[None, :])
    mask = in_rows[:, None] & in_c[None, :]
    tl.store(p_d_row_weight + o_weight, d_weight.to(p_d_row_weight.dtype.element_ty), mask=mask)
    tl.store(p_d_row_bias + o_row, d_bias.to(p_d_row_bias.dtype.element_ty), mask=in_rows)


@triton.jit(do_not_specialize=["batch", "positions", "out_stride", "wide_stride"])
def generate_rows_bwd_kernel(
    p_d_out,  # [B, P]
    p_features,  # [B, N, C] float32
    p_row_weight,  # [R, C]
    p_table,  # [tiles, TILE_COLUMNS]
    p_shares,  # out [sum over tiles of B * kH * kW, C]: what each tile adds to the gradient of the features
    p_d_row_weight,  # out [R, C]
    p_d_row_bias,  # out [R]
    batch,
    positions,
    out_stride,
    wide_stride,
    C: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
    BP: tl.constexpr,
    VECTOR: tl.constexpr,
):
    i_tile = tl.program_id(0)
    if tl.load(p_table + i_tile * 9 + 7) != 0:
        _rows_bwd(
            p_d_out, p_features, p_row_weight, p_table, p_shares, p_d_row_weight, p_d_row_bias,
            i_tile, batch, positions, wide_stride, C, BC, BM, BP, VECTOR,
        )  # fmt: skip
    else:
        _rows_bwd(
            p_d_out, p_features, p_row_weight, p_table, p_shares, p_d_row_weight, p_d_row_bias,
            i_tile, batch, positions, out_stride, C, BC, BM, BP, 1,
        )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "positions"])
def generate_shares_bwd_kernel(
    p_shares,  # [sum over tiles of B * kH * kW, C]
    p_table,  # [N, POSITION_COLUMNS]
    p_d_features,  # out [B, N, C]
    batch,
    positions,
    C: tl.constexpr,
    BC: tl.constexpr,
    BT: tl.constexpr,
):
    i_position, b = tl.program_id(0), tl.program_id(1)
    spatial = tl.load(p_table + i_position * 6 + 1)
    k = tl.load(p_table + i_position * 6 + 3)
    tiles = tl.load(p_table + i_position * 6 + 4)
    first = tl.load(p_table + i_position * 6 + 5)
    o_c = tl.arange(0, BC)
    total = tl.zeros([BT, BC], tl.float32)
    for start in range(0, tiles, BT):
        tile = start + tl.arange(0, BT)
        o_share = (first + tile * spatial).to(tl.int64) * batch + b * spatial + k
        mask = (tile < tiles)[:, None] & (o_c < C)[None, :]
        total += tl.load(p_shares + o_share[:, None] * C + o_c[None, :], mask=mask, other=0)
    tl.store(p_d_features + (b * positions + i_position) * C + o_c, tl.sum(total, axis=0), mask=o_c < C)


@triton.jit(do_not_specialize=["batch", "layers", "positions"])
def generate_features_bwd_kernel(
    p_d_features,  # [B, N, 2h]
    p_codes,  # [B, L, D]
    p_fc_weight,
    p_fc_bias,
    p_mix_weight,
    p_mix_bias,
    p_table,  # [N, POSITION_COLUMNS]
    p_d_inner,  # out [B, N, h]: gradient of the first map's output, before its GELU
    p_d_fc_weight,  # out, as fc_weight
    p_d_fc_bias,
    p_d_mix_weight,  # out [N, 2h, h]: the share of each position
    p_d_mix_bias,  # out [N, 2h]
    batch,
    layers,
    positions,
    D: tl.constexpr,
    H: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    BC: tl.constexpr,
):
    i_position = tl.program_id(0)
    layer = tl.load(p_table + i_position * 6)
    spatial = tl.load(p_table + i_position * 6 + 1)
    fc_row = tl.load(p_table + i_position * 6 + 2)
    o_d, o_h, o_c = tl.arange(0, BD), tl.arange(0, BH), tl.arange(0, BC)
    in_h, in_c = o_h < H, o_c < 2 * H
    o_fc = fc_row + o_h * spatial  # [BH]
    o_fc_weight = o_fc.to(tl.int64)[:, None] * D + o_d[None, :]
    o_mix = o_c[:, None] * H + o_h[None, :]  # [BC, BH]
    in_fc, in_mix = in_h[:, None] & (o_d < D)[None, :], in_c[:, None] & in_h[None, :]
    fc = tl.load(p_fc_weight + o_fc_weight, mask=in_fc, other=0).to(tl.float32)
    fc_bias = tl.load(p_fc_bias + o_fc, mask=in_h, other=0).to(tl.float32)
    mix = tl.load(p_mix_weight + layer * 2 * H * H + o_mix, mask=in_mix, other=0).to(tl.float32)
    mix_bias = tl.load(p_mix_bias + layer * 2 * H + o_c, mask=in_c, other=0).to(tl.float32)
    d_fc = tl.zeros([BH, BD], tl.float32)
    d_fc_bias = tl.zeros([BH], tl.float32)
    d_mix = tl.zeros([BC, BH], tl.float32)
    d_mix_bias = tl.zeros([BC], tl.float32)
    for b in range(batch):
        code = tl.load(p_codes + (b * layers + layer) * D + o_d, mask=o_d < D, other=0).to(tl.float32)
        d_feature = tl.load(p_d_features + (b * positions + i_position) * (2 * H) + o_c, mask=in_c, other=0)
        before = tl.sum(fc * code[None, :], axis=1) + fc_bias  # [BH]
        inner = gelu(before)
        d_outer = d_feature * gelu_slope(tl.sum(mix * inner[None, :], axis=1) + mix_bias)  # [BC]
        d_inner = tl.sum(mix * d_outer[:, None], axis=0) * gelu_slope(before)  # [BH]
        d_mix += d_outer[:, None] * inner[None, :]
        d_mix_bias += d_outer
        d_fc += d_inner[:, None] * code[None, :]
        d_fc_bias += d_inner
        tl.store(p_d_inner + (b * positions + i_position) * H + o_h, d_inner, mask=in_h)
    tl.store(p_d_fc_weight + o_fc_weight, d_fc.to(p_d_fc_weight.dtype.element_ty), mask=in_fc)
    tl.store(p_d_fc_bias + o_fc, d_fc_bias.to(p_d_fc_bias.dtype.element_ty), mask=in_h)
    tl.store(p_d_mix_weight + i_position * 2 * H * H + o_mix, d_mix, mask=in_mix)
    tl.store(p_d_mix_bias + i_position * 2 * H + o_c, d_mix_bias, mask=in_c)


@triton.jit(do_not_specialize=["batch", "layers", "positions"])
def generate_codes_bwd_kernel(
    p_d_inner,  # [B, N, h]
    p_shares_mix_weight,  # [N, 2h, h]
    p_shares_mix_bias,  # [N, 2h]
    p_fc_weight,
    p_table,  # [L, 3]
    p_d_codes,  # out [B, L, D]
    p_d_mix_weight,  # out [L, 2h, h]
    p_d_mix_bias,  # out [L, 2h]
    batch,
    layers,
    positions,
    D: tl.constexpr,
    H: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    BC: tl.constexpr,
):
    layer, b = tl.program_id(0), tl.program_id(1)
    spatial = tl.load(p_table + layer * 3)
    first = tl.load(p_table + layer * 3 + 1)
    fc_row = tl.load(p_table + layer * 3 + 2)
    o_d, o_h, o_c = tl.arange(0, BD), tl.arange(0, BH), tl.arange(0, BC)
    in_h, in_c = o_h < H, o_c < 2 * H
    if b < batch:
        d_code = tl.zeros([BD], tl.float32)
        in_fc = in_h[:, None] & (o_d < D)[None, :]
        for k in range(spatial):
            d_inner = tl.load(p_d_inner + (b * positions + first + k) * H + o_h, mask=in_h, other=0)
            o_fc_weight = (fc_row + k + o_h * spatial).to(tl.int64)[:, None] * D + o_d[None, :]
            fc = tl.load(p_fc_weight + o_fc_weight, mask=in_fc, other=0).to(tl.float32)
            d_code += tl.sum(fc * d_inner[:, None], axis=0)
        tl.store(p_d_codes + (b * layers + layer) * D + o_d, d_code.to(p_d_codes.dtype.element_ty), mask=o_d < D)
    else:  # one program per layer more than datasets: it adds up the shares of the positions
        o_mix = o_c[:, None] * H + o_h[None, :]
        in_mix = in_c[:, None] & in_h[None, :]
        d_mix = tl.zeros([BC, BH], tl.float32)
        d_mix_bias = tl.zeros([BC], tl.float32)
        for k in range(spatial):
            d_mix += tl.load(p_shares_mix_weight + (first + k) * 2 * H * H + o_mix, mask=in_mix, other=0)
            d_mix_bias += tl.load(p_shares_mix_bias + (first + k) * 2 * H + o_c, mask=in_c, other=0)
        p_mix = p_d_mix_weight + layer * 2 * H * H + o_mix
        tl.store(p_mix, d_mix.to(p_d_mix_weight.dtype.element_ty), mask=in_mix)
        tl.store(p_d_mix_bias + layer * 2 * H + o_c, d_mix_bias.to(p_d_mix_bias.dtype.element_ty), mask=in_c)


class Tables(NamedTuple):
    """What the kernels need to know about a network; depends on nothing else."""

    # [tiles, 9] int32: tile in its layer; rows, I, output offset (divided by the vector where wide); kH * kW, first
    # position of the layer, first row of the layer, wide or not, sum of kH * kW over the tiles of the layers before.
    tiles: Tensor
    positions: Tensor  # [N, 6] int32: layer, kH * kW, first fc row, k, tiles of the layer, the sum as in ``tiles``
    layers: Tensor  # [L, 3] int32: kH * kW, first position, first fc row
    shares: int  # sum over tiles of kH * kW
    size: int  # P


@functools.lru_cache(maxsize=64)
def tables(shapes: tuple[int, ...], hidden: int, vector: int, device: torch.device) -> Tables:
    """Build the tables for layers of sizes ``shapes`` (O, I, kH, kW of each), stores of ``vector`` elements."""
    tile_rows: list[Tensor] = []
    position_rows: list[Tensor] = []
    layer_rows: list[list[int]] = []
    sizes = [shapes[i] * shapes[i + 1] * shapes[i + 2] * shapes[i + 3] for i in range(0, len(shapes), 4)]
    total = sum(sizes)
    row = offset = position = shares = 0
    for layer, size in enumerate(sizes):
        o, i, kh, kw = shapes[4 * layer : 4 * layer + 4]
        spatial, rows = kh * kw, o * i
        count = triton.cdiv(rows, ROWS_PER_TILE)
        wide = all(number % vector == 0 for number in (i, offset, total))
        unit = vector if wide else 1
        columns = [rows // unit, i // unit, offset // unit, spatial, position, row, int(wide), shares]
        tile = torch.arange(count, dtype=torch.int32)
        tile_rows.append(torch.cat([tile[:, None], torch.tensor(columns, dtype=torch.int32).expand(count, -1)], dim=1))
        k = torch.arange(spatial, dtype=torch.int32)
        fixed = torch.tensor([layer, spatial, count, shares], dtype=torch.int32).expand(spatial, -1)
        fc_rows = hidden * position + k
        position_rows.append(torch.cat([fixed[:, :2], fc_rows[:, None], k[:, None], fixed[:, 2:]], dim=1))
        layer_rows.append([spatial, position, hidden * position])
        row, offset, position, shares = row + rows, offset + size, position + spatial, shares + count * spatial
    return Tables(
        torch.cat(tile_rows).contiguous().to(device),
        torch.cat(position_rows).to(torch.int32).contiguous().to(device),
        torch.tensor(layer_rows, dtype=torch.int32).to(device),
        shares,
        total,
    )


def why_not(width: int, hidden: int, dtypes: tuple[str, ...]) -> list[str]:
    """Reasons not to run generators of D = ``width`` and h = ``hidden`` with tensors of these dtypes."""
    reasons = []
    if width > 1024:
        reasons.append(f"the Triton kernel takes codes of at most 1024 numbers; these have {width}")
    if hidden > 32:
        reasons.append(f"the Triton kernel takes generators at most 32 wide; this one is {hidden} wide")
    other = sorted(set(dtypes) - {"torch.float32", "torch.bfloat16"})
    if other:
        reasons.append(f"the Triton kernel takes float32 and bfloat16; got {', '.join(other)}")
    return reasons


def sizes(width: int, hidden: int) -> tuple[dict[str, int], dict[str, int]]:
    """The block sizes of the feature kernels and of the row kernels."""
    channels = triton.next_power_of_2(2 * hidden)
    features = {"D": width, "H": hidden, "BD": triton.next_power_of_2(width), "BH": triton.next_power_of_2(hidden)}
    features["BC"] = channels
    # tl.dot wants at least 16 channels.
    rows = {"C": 2 * hidden, "BC": max(channels, 16), "BM": ROWS_PER_TILE, "BP": PAIRS_PER_BLOCK}
    return features, rows


def launch_features_fwd(
    codes: Tensor, fc_weight: Tensor, fc_bias: Tensor, mix_weight: Tensor, mix_bias: Tensor, table: Tables
) -> Tensor:
    """Features ``[B, N, 2h]`` float32 of ``codes [B, L, D]``."""
    batch, layers, width = codes.shape
    hidden = mix_weight.shape[2]
    positions = len(table.positions)
    features = torch.empty(batch, positions, 2 * hidden, dtype=torch.float32, device=codes.device)
    grid = (positions, min(batch, 8))
    generate_features_fwd_kernel[grid](
        ready(codes), ready(fc_weight), ready(fc_bias), ready(mix_weight), ready(mix_bias), table.positions, features,
        batch, layers, positions, **sizes(width, hidden)[0], num_warps=1,
    )  # fmt: skip
    return features


@on_device
def launch_generate_weights_fwd(
    codes: Tensor,  # [B, L, D]
    fc_weight: Tensor,
    fc_bias: Tensor,
    mix_weight: Tensor,
    mix_bias: Tensor,
    row_weight: Tensor,  # [R, 2h]
    row_bias: Tensor,  # [R]
    shapes: tuple[int, ...],
    out_dtype: torch.dtype,
) -> Tensor:
    """All generated weights ``[B, P]``, each layer in the order ``[O, kH, kW, I]``.

    Args:
        shapes: O, I, kH, kW of each layer; the other arguments are those of the op of this name.
        out_dtype: float32 or bfloat16.
    """
    batch, width, hidden = codes.shape[0], codes.shape[2], mix_weight.shape[2]
    vector = 16 // out_dtype.itemsize
    table = tables(shapes, hidden, vector, codes.device)
    features = launch_features_fwd(codes, fc_weight, fc_bias, mix_weight, mix_bias, table)
    out = torch.empty(batch, table.size, dtype=out_dtype, device=codes.device)
    generate_rows_fwd_kernel[(len(table.tiles),)](
        features, ready(row_weight), ready(row_bias), table.tiles, out, batch, features.shape[1], table.size,
        table.size // vector, **sizes(width, hidden)[1], VECTOR=vector, num_warps=ROWS_FWD_WARPS,
    )  # fmt: skip
    return out


class GeneratorGradients(NamedTuple):
    """Gradients of all tensor arguments, in their order, each in the dtype of its argument."""

    d_codes: Tensor
    d_fc_weight: Tensor
    d_fc_bias: Tensor
    d_mix_weight: Tensor
    d_mix_bias: Tensor
    d_row_weight: Tensor
    d_row_bias: Tensor


@on_device
def launch_generate_weights_bwd(
    d_out: Tensor,  # [B, P]
    codes: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    mix_weight: Tensor,
    mix_bias: Tensor,
    row_weight: Tensor,
    row_bias: Tensor,
    shapes: tuple[int, ...],
) -> GeneratorGradients:
    """Gradients of all tensor arguments of ``launch_generate_weights_fwd``; the features are computed again."""
    batch, layers, width = codes.shape
    hidden = mix_weight.shape[2]
    device = codes.device
    vector = 16 // d_out.dtype.itemsize
    table = tables(shapes, hidden, vector, device)
    positions = len(table.positions)
    codes, d_out = ready(codes), ready(d_out)
    fc_weight, fc_bias, mix_weight, mix_bias = (ready(x) for x in (fc_weight, fc_bias, mix_weight, mix_bias))
    feature_sizes, row_sizes = sizes(width, hidden)
    features = launch_features_fwd(codes, fc_weight, fc_bias, mix_weight, mix_bias, table)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    shares = empty(table.shares * batch, 2 * hidden)
    d_row_weight = torch.empty_like(row_weight, memory_format=torch.contiguous_format)
    d_row_bias = torch.empty_like(row_bias, memory_format=torch.contiguous_format)
    generate_rows_bwd_kernel[(len(table.tiles),)](
        d_out, features, ready(row_weight), table.tiles, shares, d_row_weight, d_row_bias, batch, positions, table.size,
        table.size // vector, **row_sizes, VECTOR=vector, num_warps=ROWS_BWD_WARPS,
    )  # fmt: skip
    d_features = empty(batch, positions, 2 * hidden)
    generate_shares_bwd_kernel[(positions, batch)](
        shares, table.positions, d_features, batch, positions,
        C=2 * hidden, BC=row_sizes["BC"], BT=TILES_PER_BLOCK, num_warps=1,
    )  # fmt: skip
    d_inner = empty(batch, positions, hidden)
    mix_shares, mix_bias_shares = empty(positions, 2 * hidden, hidden), empty(positions, 2 * hidden)
    d_fc_weight, d_fc_bias = torch.empty_like(fc_weight), torch.empty_like(fc_bias)
    generate_features_bwd_kernel[(positions,)](
        d_features, codes, fc_weight, fc_bias, mix_weight, mix_bias, table.positions, d_inner, d_fc_weight, d_fc_bias,
        mix_shares, mix_bias_shares, batch, layers, positions, **feature_sizes, num_warps=FEATURES_BWD_WARPS,
    )  # fmt: skip
    d_codes = torch.empty_like(codes)
    d_mix_weight, d_mix_bias = torch.empty_like(mix_weight), torch.empty_like(mix_bias)
    generate_codes_bwd_kernel[(layers, batch + 1)](
        d_inner, mix_shares, mix_bias_shares, fc_weight, table.layers, d_codes, d_mix_weight, d_mix_bias, batch, layers,
        positions, **feature_sizes, num_warps=1,
    )  # fmt: skip
    return GeneratorGradients(d_codes, d_fc_weight, d_fc_bias, d_mix_weight, d_mix_bias, d_row_weight, d_row_bias)
