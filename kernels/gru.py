"""What the recurrences share: the GRU cell, its gradient, and the exchange between programs of one launch.

A program that needs what others compute reads it from 64-bit words in global memory, each a float32 and a flag: one
program posts its words, the others read them until all flags are set. A word is written once per launch (the launcher
clears them), carries its own flag, and is read and written whole, so no fence or counter is needed. This spins: all
programs of a launch must run at the same time, which a cooperative launch guarantees.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pudnet.kernels.blocks import tanh


@triton.jit
def post(p_words, value, mask):
    """Publish ``value`` (float32): one word each, with the flag set."""
    word = (value.to(tl.int32, bitcast=True).to(tl.int64) << 32) | 1
    tl.atomic_xchg(p_words, word, mask=mask, sem="relaxed")


@triton.jit
def wait_for(p_words, mask):
    """Wait until all words that ``mask`` selects are posted: their values, 0 elsewhere.

    No two threads may hold the same element: a thread that read a word before the flag was set would otherwise keep its
    stale copy while another thread's copy ends the wait. So there must be at least as many words as threads.
    """
    word = tl.load(p_words, mask=mask, other=1, volatile=True)
    while tl.min(word & 1) == 0:
        word = tl.load(p_words, mask=mask, other=1, volatile=True)
    return (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def receive(p_words, D: tl.constexpr, BD: tl.constexpr, COPIES: tl.constexpr):
    """Wait until all D words are posted: ``[BD]``, zero beyond D. Each is read COPIES times, see ``wait_for``."""
    o_d = tl.arange(0, BD)[None, :] + tl.zeros([COPIES, 1], tl.int32)  # [COPIES, BD]
    return tl.max(wait_for(p_words + o_d, o_d < D), axis=0)


@triton.jit
def matvec(weight, x):
    """``weight [rows, BD] @ x [BD]``."""
    return tl.sum(weight * x[None, :], axis=1)


@triton.jit
def gate_rows(p_weight, gate, unit, D: tl.constexpr, BD: tl.constexpr):
    """Rows of one gate for the given units: ``[UNITS, BD]`` float32."""
    o_d = tl.arange(0, BD)
    mask = (unit < D)[:, None] & (o_d < D)[None, :]
    return tl.load(p_weight + (gate * D + unit)[:, None] * D + o_d[None, :], mask=mask, other=0).to(tl.float32)


@triton.jit
def gate_bias(p_bias, gate, unit, D: tl.constexpr):
    """Biases of one gate for the given units: ``[UNITS]`` float32."""
    return tl.load(p_bias + gate * D + unit, mask=unit < D, other=0).to(tl.float32)


@triton.jit
def cell(p_saved, gates_r, gates_z, gates_nx, gates_nh, hidden, unit, D: tl.constexpr, SAVE: tl.constexpr):
    """New hidden values ``[UNITS]`` from the gates' sums; keeps r, z, n and the hidden part of n for the gradient."""
    r = tl.sigmoid(gates_r)
    z = tl.sigmoid(gates_z)
    n = tanh(gates_nx + r * gates_nh)
    if SAVE:
        mask = unit < D
        tl.store(p_saved + unit, r, mask=mask)
        tl.store(p_saved + D + unit, z, mask=mask)
        tl.store(p_saved + 2 * D + unit, n, mask=mask)
        tl.store(p_saved + 3 * D + unit, gates_nh, mask=mask)
    return (1.0 - z) * n + z * hidden


@triton.jit
def cell_slope(d_x, hidden, p_saved, p_d_gates, o_d, mine, D: tl.constexpr):
    """Gradients of the gates' sums and, directly, of the old hidden value, from that of the new one; all ``[BD]``.

    Stores those of r, z, n and of the hidden part of n where ``mine``.
    """
    in_d = o_d < D
    r = tl.load(p_saved + o_d, mask=in_d, other=0)
    z = tl.load(p_saved + D + o_d, mask=in_d, other=0)
    n = tl.load(p_saved + 2 * D + o_d, mask=in_d, other=0)
    n_hidden = tl.load(p_saved + 3 * D + o_d, mask=in_d, other=0)
    d_n = d_x * (1.0 - z) * (1.0 - n * n)
    d_z = d_x * (hidden - n) * z * (1.0 - z)
    d_r = d_n * n_hidden * r * (1.0 - r)
    d_n_hidden = d_n * r
    mask = in_d & mine
    tl.store(p_d_gates + o_d, d_r, mask=mask)
    tl.store(p_d_gates + D + o_d, d_z, mask=mask)
    tl.store(p_d_gates + 2 * D + o_d, d_n, mask=mask)
    tl.store(p_d_gates + 3 * D + o_d, d_n_hidden, mask=mask)
    return d_r, d_z, d_n, d_n_hidden, d_x * z
