"""Blocks of generated weights -> all parameters of a network, scaled and tiled, in one launch; the gradient in one.

Writing is nearly all the work: ResNet-50 is 94 MB out of blocks that take 11 MB. In the order of the target, which is
``[O, I, S]`` (S positions of a kernel), a block ``[S, o, i]`` is a band of o rows of i * S numbers, and the target
repeats the band along its rows and its columns. A program reads BM neighbouring numbers of one band, keeps them in
registers and writes them to some of the repeats: the divisions that find an element's place are done once per program.

Stores are 16 bytes wide where i * S, I * S and the target's address allow it; sizes are then kept divided by 4, which
shows it to the compiler, and other targets take the other branch of the same launch (as in generate_weights.py).

Targets are anywhere: the table has their distances from the first one.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from pudnet.kernels.blocks import on_device, ready

BAND_FWD, BAND_BWD = 1024, 128  # numbers of a band that a program holds
REPEATS_FWD, REPEATS_BWD = 16, 8  # of a program; at once
VECTOR = 4  # float32 of a wide store
COLUMNS = 14
WARPS = 4


@triton.jit
def _band(p_entry, BM: tl.constexpr, VECTOR: tl.constexpr):
    """Of a program's numbers ``[BM]``: offset in the block, row and column in the band, offset in the target.

    Then the sizes: rows of the band and their length, length of the target's rows.
    """
    length = tl.load(p_entry + 2).to(tl.int32) * VECTOR  # i * S
    target_length = tl.load(p_entry + 3).to(tl.int32) * VECTOR  # I * S
    spatial = tl.load(p_entry + 4).to(tl.int32)
    rows = tl.load(p_entry + 5).to(tl.int32)
    inputs = tl.load(p_entry + 6).to(tl.int32)
    number = tl.load(p_entry + 8).to(tl.int32) * BM + tl.arange(0, BM)
    row = number // length
    column = number - row * length
    i = column // spatial
    o_block = ((column - i * spatial) * rows + row) * inputs + i
    return o_block, row, column, number + row * (target_length - length), rows, length, target_length


@triton.jit
def _tile_fwd(p_blocks, p_entry, p_out, BM: tl.constexpr, VECTOR: tl.constexpr):
    o_block, row, column, o_out, rows, length, target_length = _band(p_entry, BM, VECTOR)
    target_rows = tl.load(p_entry + 7).to(tl.int32)
    across = tl.load(p_entry + 11).to(tl.int32)
    scale = tl.load(p_entry + 13).to(tl.int32).to(tl.float32, bitcast=True)
    p_target = p_out + tl.load(p_entry + 1) * VECTOR
    value = tl.load(p_blocks + tl.load(p_entry) + o_block, mask=row < rows, other=0) * scale
    for repeat in range(tl.load(p_entry + 9).to(tl.int32), tl.load(p_entry + 10).to(tl.int32)):
        down = repeat // across
        right = (repeat - down * across) * length
        below = down * rows
        mask = (row < rows) & (row < target_rows - below) & (column < target_length - right)
        tl.store(p_target + (below * target_length + right) + o_out, value, mask=mask)


@triton.jit
def tile_weights_fwd_kernel(
    p_blocks,  # all blocks, one after the other
    p_table,  # [programs, COLUMNS] int64
    p_out,  # out: the first target
    BM: tl.constexpr,
    VECTOR: tl.constexpr,
):
    p_entry = p_table + tl.program_id(0) * 14
    if tl.load(p_entry + 12) != 0:
        _tile_fwd(p_blocks, p_entry, p_out, BM, VECTOR)
    else:
        _tile_fwd(p_blocks, p_entry, p_out, BM, 1)


@triton.jit
def _tile_bwd(p_d_out, p_entry, p_d_blocks, BM: tl.constexpr, BR: tl.constexpr, VECTOR: tl.constexpr):
    o_block, row, column, o_out, rows, length, target_length = _band(p_entry, BM, VECTOR)
    target_rows = tl.load(p_entry + 7).to(tl.int32)
    across = tl.load(p_entry + 11).to(tl.int32)
    scale = tl.load(p_entry + 13).to(tl.int32).to(tl.float32, bitcast=True)
    p_target = p_d_out + tl.load(p_entry + 1) * VECTOR
    total = tl.zeros([BR, BM], tl.float32)
    for first in range(0, tl.load(p_entry + 10).to(tl.int32), BR):
        repeat = first + tl.arange(0, BR)
        down = repeat // across
        right = (repeat - down * across) * length
        below = down * rows
        mask = (row < rows)[None, :] & (row[None, :] < (target_rows - below)[:, None])
        mask = mask & (column[None, :] < (target_length - right)[:, None])
        total += tl.load(p_target + (below * target_length + right)[:, None] + o_out[None, :], mask=mask, other=0)
    tl.store(p_d_blocks + tl.load(p_entry) + o_block, tl.sum(total, axis=0) * scale, mask=row < rows)


@triton.jit
def tile_weights_bwd_kernel(
    p_d_out,
    p_table,
    p_d_blocks,  # out: as ``p_blocks``
    BM: tl.constexpr,
    BR: tl.constexpr,
    VECTOR: tl.constexpr,
):
    p_entry = p_table + tl.program_id(0) * 14
    if tl.load(p_entry + 12) != 0:
        _tile_bwd(p_d_out, p_entry, p_d_blocks, BM, BR, VECTOR)
    else:
        _tile_bwd(p_d_out, p_entry, p_d_blocks, BM, BR, 1)


@functools.lru_cache(maxsize=64)
def table(
    shapes: tuple[int, ...],  # S, o, i, O, I of each target
    scales: tuple[float, ...],
    offsets: tuple[int, ...] | None,  # of each target from the first; by default they follow each other
    band: int,
    repeats: int | None,
    device: torch.device,
) -> Tensor:
    """What each program does: ``[programs, COLUMNS]`` int64.

    Offset of the block; offset of the target, i * S and I * S (divided by VECTOR where wide); S, o, i, O; which part of
    the band; its repeats, from, to; repeats along a row; wide or not; the bits of the scale. A program has ``band``
    numbers and ``repeats`` repeats of them, by default all.
    """
    spatial, rows, inputs, target_rows, target_inputs = np.array(shapes, dtype=np.int64).reshape(-1, 5).T
    ends = np.cumsum(target_rows * target_inputs * spatial)
    offset = np.array([0, *ends[:-1]] if offsets is None else offsets, dtype=np.int64)
    length, target_length = inputs * spatial, target_inputs * spatial
    across = -(-target_inputs // inputs)
    total = -(-target_rows // rows) * across
    share = total if repeats is None else np.minimum(total, repeats)
    shares = -(-total // share)
    programs = -(-rows * length // band) * shares
    wide = (length % VECTOR == 0) & (target_length % VECTOR == 0) & (offset % VECTOR == 0)
    unit = np.where(wide, VECTOR, 1)
    sizes = rows * length
    bits = np.array(scales, dtype=np.float32).view(np.int32).astype(np.int64)
    which = np.repeat(np.arange(len(programs)), programs)
    number = np.arange(len(which)) - np.repeat(np.cumsum(programs) - programs, programs)
    first = number % shares[which] * share[which]
    fixed = [np.cumsum(sizes) - sizes, offset // unit, length // unit, target_length // unit, spatial, rows, inputs]
    columns = [x[which] for x in (*fixed, target_rows)]
    columns += [number // shares[which], first, np.minimum(first + share[which], total[which])]
    columns += [x[which] for x in (across, wide, bits)]
    return torch.from_numpy(np.stack(columns, axis=1)).to(device)


@on_device
def launch_tile_weights_fwd(
    blocks: Tensor,  # [sum of S * o * i], one after the other
    out: Tensor,  # the first target
    shapes: tuple[int, ...],
    scales: tuple[float, ...],
    offsets: tuple[int, ...],
) -> None:
    """Write all targets; ``shapes``, ``scales``, ``offsets`` as in ``table``."""
    entries = table(shapes, scales, offsets, BAND_FWD, REPEATS_FWD, blocks.device)
    tile_weights_fwd_kernel[(len(entries),)](ready(blocks), entries, out, BM=BAND_FWD, VECTOR=VECTOR, num_warps=WARPS)


@on_device
def launch_tile_weights_bwd(d_out: Tensor, shapes: tuple[int, ...], scales: tuple[float, ...]) -> Tensor:
    """Gradient of the blocks ``[sum of S * o * i]`` from that of the targets, which follow each other in ``d_out``."""
    count = sum(shapes[k] * shapes[k + 1] * shapes[k + 2] for k in range(0, len(shapes), 5))
    d_blocks = d_out.new_empty(count)
    entries = table(shapes, scales, None, BAND_BWD, None, d_out.device)
    tile_weights_bwd_kernel[(len(entries),)](
        ready(d_out), entries, d_blocks, BM=BAND_BWD, BR=REPEATS_BWD, VECTOR=VECTOR, num_warps=WARPS
    )
    return d_blocks
