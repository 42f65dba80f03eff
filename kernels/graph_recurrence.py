"""Node states -> node states: one gated message-passing traversal of graphs in one launch; and its gradient in one.

Real networks are nearly chains, so the time goes into dependent steps, one per level. The parameters that a step needs
take 20 KB at D = 32: a program holds them in registers through all levels and works on whole nodes. The nodes of a
level are shared out to the programs, so that the graphs of a batch and the branches of a graph go on side by side. No
level waits for another as a whole: a program waits for the messages of the nodes that its node has edges from, which
travel through the words of ``gru.py``. It takes its nodes in order, and every edge leads from an earlier level, so that
the first node not done can always be worked on.

What the gates take from the old states needs no order: one matrix product of PyTorch before the launch.

Notation: V kinds of edge, each with an MLP for its messages; M hidden width of these.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pudnet.kernels.blocks import INTERPRET, on_device, ready
from pudnet.kernels.gru import cell, cell_slope, gate_bias, gate_rows, matvec, post, wait_for

LARGEST_WIDTH = 64
# maxnreg as in layer_recurrence.py.
OPTIONS = {"num_warps": 8, "maxnreg": 224, "launch_cooperative_grid": True}
WORDS_PER_BLOCK = 4096  # read at once


@triton.jit
def _message_maps(
    p_in_weight, p_out_weight, V: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    BV: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The MLPs' first maps ``[BV, BM, BD]`` and second maps ``[BV, BD, BM]``."""
    kind = tl.arange(0, BV)[:, None, None]
    d, m = tl.arange(0, BD), tl.arange(0, BM)
    row, column = m[None, :, None], d[None, None, :]
    mask = (kind < V) & (row < M) & (column < D)
    in_weight = tl.load(p_in_weight + (kind * M + row) * D + column, mask=mask, other=0)
    row, column = d[None, :, None], m[None, None, :]
    mask = (kind < V) & (row < D) & (column < M)
    return in_weight, tl.load(p_out_weight + (kind * D + row) * M + column, mask=mask, other=0)


@triton.jit(do_not_specialize=["nodes", "levels", "programs", "first_program"])
def graph_recurrence_fwd_kernel(
    p_states,  # [N, D]
    p_gates,  # [N, 3D] what the gates take from the states
    p_edges,  # [V, N, N]
    p_message_in_weight,  # [V, M, D]
    p_message_in_bias,  # [V, M]
    p_message_out_weight,  # [V, D, M]
    p_message_out_bias,  # [V, D]
    p_weight_ih,  # [3D, D]
    p_bias_ih,  # [3D]
    p_starts,  # [levels + 1] int32: first node of each level, and N
    p_words,  # [N, V, D] int64, zero: messages
    p_saved,  # out [N, 5, D]: r, z, n, hidden part of n, incoming messages; if SAVE
    p_out,  # out [N, D]
    nodes,  # N
    levels,
    programs,
    first_program,  # that of program 0
    V: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BV: tl.constexpr,
    SAVE: tl.constexpr,
    BN: tl.constexpr,
):
    i_program = tl.program_id(0) + first_program
    o_d, o_m, kind = tl.arange(0, BD), tl.arange(0, BM), tl.arange(0, BV)
    o_inner, o_sent = kind[:, None] * M + o_m[None, :], kind[:, None] * D + o_d[None, :]  # [BV, BM], [BV, BD]
    in_d = o_d < D
    in_inner, in_sent = (kind < V)[:, None] & (o_m < M)[None, :], (kind < V)[:, None] & in_d[None, :]
    wr, br = gate_rows(p_weight_ih, 0, o_d, D, BD), gate_bias(p_bias_ih, 0, o_d, D)
    wz, bz = gate_rows(p_weight_ih, 1, o_d, D, BD), gate_bias(p_bias_ih, 1, o_d, D)
    wn, bn = gate_rows(p_weight_ih, 2, o_d, D, BD), gate_bias(p_bias_ih, 2, o_d, D)
    in_weight, out_weight = _message_maps(p_message_in_weight, p_message_out_weight, V, D, M, BV, BD, BM)
    in_bias = tl.load(p_message_in_bias + o_inner, mask=in_inner, other=0)  # [BV, BM]
    out_bias = tl.load(p_message_out_bias + o_sent, mask=in_sent, other=0)  # [BV, BD]

    for level in range(levels):
        start = tl.load(p_starts + level)
        stop = tl.load(p_starts + level + 1)
        for node in range(start + i_program, stop, programs):
            hidden = tl.load(p_states + node * D + o_d, mask=in_d, other=0)
            p_gate = p_gates + node * 3 * D + o_d
            r, z = tl.load(p_gate, mask=in_d, other=0), tl.load(p_gate + D, mask=in_d, other=0)
            n = tl.load(p_gate + 2 * D, mask=in_d, other=0)
            incoming = tl.zeros([BD], tl.float32)
            for first in range(0, start * V, BN):
                row = first + tl.arange(0, BN)  # the messages of all kinds, source by source
                source = row // V
                o_edge = ((row - source * V) * nodes + node) * nodes.to(tl.int64) + source
                edge = tl.load(p_edges + o_edge, mask=source < start, other=0)  # [BN]
                if tl.max(tl.abs(edge), axis=0) > 0:
                    p_word = p_words + row[:, None] * D + o_d[None, :]
                    sent = wait_for(p_word, (edge != 0)[:, None] & in_d[None, :])  # [BN, BD]
                    incoming += tl.sum(edge[:, None] * sent, axis=0)
            p_save = p_saved + node * 5 * D
            r += matvec(wr, incoming) + br
            z += matvec(wz, incoming) + bz
            state = cell(p_save, r, z, matvec(wn, incoming) + bn, n, hidden, o_d, D, SAVE)
            inner = tl.maximum(tl.sum(in_weight * state[None, None, :], axis=2) + in_bias, 0.0)  # [BV, BM]
            sent = tl.maximum(tl.sum(out_weight * inner[:, None, :], axis=2) + out_bias, 0.0)  # [BV, BD]
            post(p_words + node * V * D + o_sent, sent, in_sent)
            tl.store(p_out + node * D + o_d, state, mask=in_d)
            if SAVE:
                tl.store(p_save + 4 * D + o_d, incoming, mask=in_d)


@triton.jit(do_not_specialize=["nodes", "levels", "programs", "first_program"])
def graph_recurrence_bwd_kernel(
    p_d_out,  # [N, D]
    p_states,  # [N, D]
    p_edges,  # [V, N, N]
    p_message_in_weight,  # [V, M, D]
    p_message_out_weight,  # [V, D, M]
    p_weight_ih,  # [3D, D]
    p_inner,  # [N, V, M] the MLPs' hidden values
    p_sent,  # [N, V, D] messages
    p_saved,  # [N, 5, D]
    p_starts,  # [levels + 1] int32
    p_words,  # [N, D] int64, zero: gradients of incoming messages
    p_d_inner,  # out [N, V, M], before the ReLU
    p_d_sent,  # out [N, V, D], before the ReLU
    p_d_gates,  # out [N, 4, D]: of the sums of r, z, n and of the hidden part of n
    p_d_states,  # out [N, D]: what does not pass the gates
    nodes,
    levels,
    programs,
    first_program,
    V: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BV: tl.constexpr,
    BN: tl.constexpr,
):
    i_program = tl.program_id(0) + first_program
    o_d, o_m, kind = tl.arange(0, BD), tl.arange(0, BM), tl.arange(0, BV)
    o_inner, o_sent = kind[:, None] * M + o_m[None, :], kind[:, None] * D + o_d[None, :]  # [BV, BM], [BV, BD]
    in_d = o_d < D
    in_inner, in_sent = (kind < V)[:, None] & (o_m < M)[None, :], (kind < V)[:, None] & in_d[None, :]
    wr, wz = gate_rows(p_weight_ih, 0, o_d, D, BD), gate_rows(p_weight_ih, 1, o_d, D, BD)
    wn = gate_rows(p_weight_ih, 2, o_d, D, BD)
    in_weight, out_weight = _message_maps(p_message_in_weight, p_message_out_weight, V, D, M, BV, BD, BM)

    for back in range(levels):
        level = levels - 1 - back
        start = tl.load(p_starts + level)
        stop = tl.load(p_starts + level + 1)
        for node in range(start + i_program, stop, programs):
            d_sent = tl.zeros([BV, BD], tl.float32)
            for first in range(stop, nodes, BN):
                target = first + tl.arange(0, BN)
                o_edge = (kind[None, :] * nodes + target[:, None]) * nodes.to(tl.int64) + node
                edge = tl.load(p_edges + o_edge, mask=(target < nodes)[:, None] & (kind < V)[None, :], other=0)
                linked = tl.max(tl.abs(edge), axis=1) > 0  # [BN]
                if tl.max(linked.to(tl.int32), axis=0) > 0:
                    mask = linked[:, None] & in_d[None, :]
                    d_incoming = wait_for(p_words + target[:, None] * D + o_d[None, :], mask)  # [BN, BD]
                    d_sent += tl.sum(edge[:, :, None] * d_incoming[:, None, :], axis=0)
            d_sent = tl.where(tl.load(p_sent + node * V * D + o_sent, mask=in_sent, other=0) > 0, d_sent, 0.0)
            inner = tl.load(p_inner + node * V * M + o_inner, mask=in_inner, other=0)
            d_inner = tl.where(inner > 0, tl.sum(out_weight * d_sent[:, :, None], axis=1), 0.0)  # [BV, BM]
            d_state = tl.sum(tl.sum(in_weight * d_inner[:, :, None], axis=1), axis=0)
            d_state += tl.load(p_d_out + node * D + o_d, mask=in_d, other=0)
            hidden = tl.load(p_states + node * D + o_d, mask=in_d, other=0)
            d_r, d_z, d_n, _, d_hidden = cell_slope(
                d_state, hidden, p_saved + node * 5 * D, p_d_gates + node * 4 * D, o_d, in_d, D
            )
            d_incoming = tl.sum(wr * d_r[:, None] + wz * d_z[:, None] + wn * d_n[:, None], axis=0)
            post(p_words + node * D + o_d, d_incoming, in_d)
            tl.store(p_d_sent + node * V * D + o_sent, d_sent, mask=in_sent)
            tl.store(p_d_inner + node * V * M + o_inner, d_inner, mask=in_inner)
            tl.store(p_d_states + node * D + o_d, d_hidden, mask=in_d)


def why_not(width: int, kinds: int, hidden: int, dtypes: tuple[str, ...], edges_have_gradient: bool) -> list[str]:
    """Reasons not to run a recurrence of D = ``width``, V = ``kinds``, M = ``hidden`` with tensors of these dtypes."""
    reasons = []
    if max(width, kinds * hidden) > LARGEST_WIDTH or kinds > 2:
        rule = f"one or two kinds of edge, D and V * M up to {LARGEST_WIDTH}, which fit in registers"
        reasons.append(f"the Triton kernel is for {rule}; got D = {width}, V = {kinds}, M = {hidden}")
    if other := sorted(set(dtypes) - {"torch.float32"}):
        reasons.append(f"the Triton kernel takes float32; got {', '.join(other)}")
    if edges_have_gradient:
        reasons.append("the Triton kernel has no gradient of the edges, and this call needs one")
    return reasons


def sizes(width: int, kinds: int, hidden: int) -> dict[str, int]:
    """The block sizes: constexpr arguments that both kernels take."""
    block, block_kinds = max(triton.next_power_of_2(width), 16), triton.next_power_of_2(kinds)
    sizes = {"V": kinds, "D": width, "M": hidden, "BV": block_kinds, "BD": block}
    return sizes | {"BM": triton.next_power_of_2(hidden), "BN": WORDS_PER_BLOCK // block}


@functools.lru_cache(maxsize=256)
def starts(level_sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """First node of each level, and N: ``[levels + 1]`` int32."""
    return torch.tensor([0, *itertools.accumulate(level_sizes)], dtype=torch.int32, device=device)


def grid_size(level_sizes: tuple[int, ...], device: torch.device) -> int:
    """Programs of a launch: what the widest level can use, and the GPU run at once."""
    if INTERPRET.value:  # one after another: alone, a program waits for nobody
        return 1
    return min(max(level_sizes), torch.cuda.get_device_properties(device).multi_processor_count)


@on_device
def launch_graph_recurrence_fwd(
    states: Tensor,  # [N, D]
    edges: Tensor,  # [V, N, N]
    level_sizes: tuple[int, ...],
    message_in_weight: Tensor,  # [V, M, D]
    message_in_bias: Tensor,
    message_out_weight: Tensor,  # [V, D, M]
    message_out_bias: Tensor,
    weight_ih: Tensor,  # [3D, D]
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """(new states ``[N, D]``, what the gradient needs: ``[N, 5, D]``, empty without ``save``).

    The other arguments are those of the op of this name.
    """
    nodes, width = states.shape
    kinds, hidden, _ = message_in_weight.shape
    words = torch.zeros(nodes, kinds, width, dtype=torch.int64, device=states.device)
    saved = states.new_empty(nodes if save else 0, 5, width)
    out = torch.empty_like(states, memory_format=torch.contiguous_format)
    programs = grid_size(level_sizes, states.device)
    gates = torch.addmm(bias_hh, states, weight_hh.mT)
    parameters = (message_in_weight, message_in_bias, message_out_weight, message_out_bias, weight_ih, bias_ih)
    graph_recurrence_fwd_kernel[(programs,)](
        ready(states), gates, ready(edges), *(ready(x) for x in parameters), starts(level_sizes, states.device), words,
        saved, out, nodes, len(level_sizes), programs, 0, **sizes(width, kinds, hidden), SAVE=save, **OPTIONS,
    )  # fmt: skip
    return out, saved


class GraphGradients(NamedTuple):
    """Gradients of all tensor arguments but the edges, in their order."""

    d_states: Tensor
    d_message_in_weight: Tensor
    d_message_in_bias: Tensor
    d_message_out_weight: Tensor
    d_message_out_bias: Tensor
    d_weight_ih: Tensor
    d_weight_hh: Tensor
    d_bias_ih: Tensor
    d_bias_hh: Tensor


@on_device
def launch_graph_recurrence_bwd(
    d_out: Tensor,  # [N, D]
    out: Tensor,  # [N, D]
    saved: Tensor,  # [N, 5, D]
    states: Tensor,
    edges: Tensor,
    level_sizes: tuple[int, ...],
    message_in_weight: Tensor,
    message_in_bias: Tensor,
    message_out_weight: Tensor,
    message_out_bias: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
) -> GraphGradients:
    """Gradients of ``launch_graph_recurrence_fwd`` called with ``save``; ``out`` and ``saved`` are its results.

    One launch walks the levels backwards. What needs no order is done for all nodes together, by PyTorch: the messages
    again before it, the parameters' gradients (matrix products over N) after it.
    """
    nodes, width = states.shape
    kinds, hidden, _ = message_in_weight.shape
    inner = torch.baddbmm(message_in_bias[:, None], out.expand(kinds, -1, -1), message_in_weight.mT).relu_()
    sent = torch.baddbmm(message_out_bias[:, None], inner, message_out_weight.mT).relu_()  # [V, N, D]
    words = torch.zeros(nodes, width, dtype=torch.int64, device=states.device)
    d_inner, d_sent = states.new_empty(nodes, kinds, hidden), states.new_empty(nodes, kinds, width)
    d_gates, d_hidden = states.new_empty(nodes, 4, width), states.new_empty(nodes, width)
    programs = grid_size(level_sizes, states.device)
    graph_recurrence_bwd_kernel[(programs,)](
        ready(d_out), ready(states), ready(edges), ready(message_in_weight), ready(message_out_weight),
        ready(weight_ih), inner.transpose(0, 1).contiguous(), sent.transpose(0, 1).contiguous(), saved,
        starts(level_sizes, states.device), words, d_inner, d_sent, d_gates, d_hidden, nodes, len(level_sizes),
        programs, 0, **sizes(width, kinds, hidden), **OPTIONS,
    )  # fmt: skip
    d_sums_x, d_sums_h = d_gates[:, :3].flatten(1), d_gates[:, [0, 1, 3]].flatten(1)  # [N, 3D]
    d_inner, d_sent = d_inner.transpose(0, 1), d_sent.transpose(0, 1)  # [V, N, M], [V, N, D]
    return GraphGradients(
        torch.addmm(d_hidden, d_sums_h, weight_hh),
        d_inner.mT @ out,
        d_inner.sum(dim=1),
        d_sent.mT @ inner,
        d_sent.sum(dim=1),
        d_sums_x.mT @ saved[:, 4],
        d_sums_h.mT @ states,
        d_sums_x.sum(dim=0),
        d_sums_h.sum(dim=0),
    )
