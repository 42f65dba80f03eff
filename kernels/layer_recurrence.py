"""Dataset embedding -> one code per layer: the whole recurrence, all L steps, in one launch; and its gradient in one.

At D = 128 the matrices take 850 KB in float32, more than one multiprocessor holds, and reading them anew in each of up
to 60 steps would take longer than everything else. So D / UNITS programs, a *team*, share the work on one dataset: each
keeps the rows of its own UNITS hidden units in registers through all steps, in float32, so that sums need neither
tensor cores nor TF32. A team works on its datasets one after another.

What a program computes for its units the others need at once. They exchange it through the words of ``gru.py``; the
number of teams leaves all programs room to run at the same time.

Per step there are three exchanges: one per GRU layer and one for the output map. LayerNorms are computed by everyone,
from the exchanged vectors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pudnet.kernels.blocks import INTERPRET, on_device, ready
from pudnet.kernels.gru import cell, cell_slope, gate_bias, gate_rows, matvec, post, receive

WARPS = 8
LARGEST_WIDTH = 256
# Without maxnreg, ptxas spills a little to fit two programs on a multiprocessor, which nothing here needs.
OPTIONS = {"num_warps": WARPS, "maxnreg": 224, "launch_cooperative_grid": True}
EPSILON = 1e-5  # of torch.nn.functional.layer_norm


@triton.jit
def moments(x, D: tl.constexpr, BD: tl.constexpr):
    """(mean, 1 / standard deviation) of the D numbers of ``x [BD]``, as LayerNorm takes them."""
    mean = tl.sum(x, axis=0) / D
    centred = tl.where(tl.arange(0, BD) < D, x - mean, 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / D + 1e-5)


@triton.jit(do_not_specialize=["batch", "steps", "first_slice", "slices", "alpha"])
def layer_recurrence_fwd_kernel(
    p_state,  # [B, 2, D]
    p_start,  # [D]
    p_weight_ih,  # [2, 3D, D]
    p_weight_hh,
    p_bias_ih,  # [2, 3D]
    p_bias_hh,
    p_out_weight,  # [D, D]
    p_out_bias,  # [D]
    p_state_norm_weight,  # [D]
    p_state_norm_bias,
    p_code_norm_weight,  # [L, D]
    p_code_norm_bias,
    p_words,  # [B, L, 3, D] int64, zero
    p_saved,  # out [B, L, 2, 5, D]: r, z, n, hidden part of n, new hidden value; if SAVE
    p_saved_e,  # out [B, L, D]; if SAVE
    p_codes,  # out [B, L, D]
    batch,
    steps,  # L
    slices,  # programs of a team, ceil(D / UNITS)
    first_slice,  # that of program 0
    alpha,
    D: tl.constexpr,
    BD: tl.constexpr,
    UNITS: tl.constexpr,
    COPIES: tl.constexpr,
    NORMALISE: tl.constexpr,
    SAVE: tl.constexpr,
):
    i_program = tl.program_id(0) + first_slice
    i_team = i_program // slices
    teams = tl.cdiv(tl.num_programs(0), slices)
    i_slice = i_program - i_team * slices
    o_d = tl.arange(0, BD)
    in_d = o_d < D
    unit = i_slice * UNITS + tl.arange(0, UNITS)
    in_unit = unit < D

    wr_x0, wr_h0 = gate_rows(p_weight_ih, 0, unit, D, BD), gate_rows(p_weight_hh, 0, unit, D, BD)
    wz_x0, wz_h0 = gate_rows(p_weight_ih, 1, unit, D, BD), gate_rows(p_weight_hh, 1, unit, D, BD)
    wn_x0, wn_h0 = gate_rows(p_weight_ih, 2, unit, D, BD), gate_rows(p_weight_hh, 2, unit, D, BD)
    wr_x1, wr_h1 = gate_rows(p_weight_ih, 3, unit, D, BD), gate_rows(p_weight_hh, 3, unit, D, BD)
    wz_x1, wz_h1 = gate_rows(p_weight_ih, 4, unit, D, BD), gate_rows(p_weight_hh, 4, unit, D, BD)
    wn_x1, wn_h1 = gate_rows(p_weight_ih, 5, unit, D, BD), gate_rows(p_weight_hh, 5, unit, D, BD)
    br0 = gate_bias(p_bias_ih, 0, unit, D) + gate_bias(p_bias_hh, 0, unit, D)
    bz0 = gate_bias(p_bias_ih, 1, unit, D) + gate_bias(p_bias_hh, 1, unit, D)
    br1 = gate_bias(p_bias_ih, 3, unit, D) + gate_bias(p_bias_hh, 3, unit, D)
    bz1 = gate_bias(p_bias_ih, 4, unit, D) + gate_bias(p_bias_hh, 4, unit, D)
    bn_x0, bn_h0 = gate_bias(p_bias_ih, 2, unit, D), gate_bias(p_bias_hh, 2, unit, D)
    bn_x1, bn_h1 = gate_bias(p_bias_ih, 5, unit, D), gate_bias(p_bias_hh, 5, unit, D)
    out_weight = gate_rows(p_out_weight, 0, unit, D, BD)
    out_bias = gate_bias(p_out_bias, 0, unit, D)
    norm_weight = tl.load(p_state_norm_weight + o_d, mask=in_d, other=0).to(tl.float32)
    norm_bias = tl.load(p_state_norm_bias + o_d, mask=in_d, other=0).to(tl.float32)
    own_norm_weight = tl.load(p_state_norm_weight + unit, mask=in_unit, other=0).to(tl.float32)
    own_norm_bias = tl.load(p_state_norm_bias + unit, mask=in_unit, other=0).to(tl.float32)

    for b in range(i_team, batch, teams):
        p_initial = p_state + b * 2 * D
        h0 = tl.load(p_initial + o_d, mask=in_d, other=0).to(tl.float32)  # [BD], every hidden value of layer 0
        h1 = tl.load(p_initial + D + o_d, mask=in_d, other=0).to(tl.float32)
        own_h0 = tl.load(p_initial + unit, mask=in_unit, other=0).to(tl.float32)  # [UNITS], those of this program
        own_h1 = tl.load(p_initial + D + unit, mask=in_unit, other=0).to(tl.float32)
        pooled = 0.5 * (h0 + h1)
        e = tl.load(p_start + o_d, mask=in_d, other=0).to(tl.float32)  # [BD]
        for t in range(steps):
            i_step = b * steps + t
            p_word = p_words + i_step * 3 * D
            p_save = p_saved + i_step * 10 * D
            x0 = cell(
                p_save,
                matvec(wr_x0, e) + matvec(wr_h0, h0) + br0,
                matvec(wz_x0, e) + matvec(wz_h0, h0) + bz0,
                matvec(wn_x0, e) + bn_x0,
                matvec(wn_h0, h0) + bn_h0,
                own_h0, unit, D, SAVE,
            )  # fmt: skip
            post(p_word + unit, x0, in_unit)
            # What the second layer takes from its own past does not wait for the first.
            r1, z1, n1 = matvec(wr_h1, h1) + br1, matvec(wz_h1, h1) + bz1, matvec(wn_h1, h1) + bn_h1
            h0 = receive(p_word, D, BD, COPIES)
            x1 = cell(
                p_save + 5 * D, matvec(wr_x1, h0) + r1, matvec(wz_x1, h0) + z1, matvec(wn_x1, h0) + bn_x1, n1,
                own_h1, unit, D, SAVE,
            )  # fmt: skip
            post(p_word + D + unit, x1, in_unit)
            if SAVE:
                tl.store(p_save + 4 * D + unit, x0, mask=in_unit)
                tl.store(p_save + 9 * D + unit, x1, mask=in_unit)
            own_h0, own_h1 = x0, x1
            if NORMALISE:
                mean, scale = moments(h0, D, BD)
                own_h0 = (x0 - mean) * scale * own_norm_weight + own_norm_bias
                h0 = tl.where(in_d, (h0 - mean) * scale * norm_weight + norm_bias, 0.0)
            h1 = receive(p_word + D, D, BD, COPIES)
            post(p_word + 2 * D + unit, tl.maximum(matvec(out_weight, h1) + out_bias, 0.0), in_unit)
            if NORMALISE:
                mean, scale = moments(h1, D, BD)
                own_h1 = (x1 - mean) * scale * own_norm_weight + own_norm_bias
                h1 = tl.where(in_d, (h1 - mean) * scale * norm_weight + norm_bias, 0.0)
            e = receive(p_word + 2 * D, D, BD, COPIES)
            if t % slices == i_slice:  # the programs of a team take turns at the codes
                mixed = (1.0 - alpha) * e + alpha * pooled
                mean, scale = moments(mixed, D, BD)
                weight = tl.load(p_code_norm_weight + t * D + o_d, mask=in_d, other=0).to(tl.float32)
                bias = tl.load(p_code_norm_bias + t * D + o_d, mask=in_d, other=0).to(tl.float32)
                code = (mixed - mean) * scale * weight + bias
                tl.store(p_codes + i_step * D + o_d, code.to(p_codes.dtype.element_ty), mask=in_d)
                if SAVE:
                    tl.store(p_saved_e + i_step * D + o_d, e, mask=in_d)


@triton.jit
def _norm_slope(d_out, x, weight, D: tl.constexpr, BD: tl.constexpr):
    """Gradient through LayerNorm: of its input ``x [BD]`` from that of its output."""
    mean, scale = moments(x, D, BD)
    unit_x = tl.where(tl.arange(0, BD) < D, (x - mean) * scale, 0.0)
    d_unit = d_out * weight
    return scale * (d_unit - tl.sum(d_unit, axis=0) / D - unit_x * (tl.sum(d_unit * unit_x, axis=0) / D))


@triton.jit
def _before(
    p_state, p_saved, t, o_d, norm_weight, norm_bias, D: tl.constexpr, BD: tl.constexpr, NORMALISE: tl.constexpr
):
    """Hidden values ``[BD]`` that step ``t`` started from; ``p_saved`` is that of the layer at this step."""
    in_d = o_d < D
    initial = tl.load(p_state + o_d, mask=in_d & (t == 0), other=0).to(tl.float32)
    x = tl.load(p_saved - 6 * D + o_d, mask=in_d & (t > 0), other=0)  # the new hidden value, one step earlier
    if NORMALISE:
        mean, scale = moments(x, D, BD)
        x = tl.where(in_d & (t > 0), (x - mean) * scale * norm_weight + norm_bias, 0.0)
    return initial + x


@triton.jit
def _gate_columns(p_weight, layer, gate, unit, D: tl.constexpr, BD: tl.constexpr):
    """Columns of one gate for the given units, from matrices stored as ``[2, D, 3D]``: ``[UNITS, BD]`` float32."""
    o_d = tl.arange(0, BD)
    mask = (unit < D)[:, None] & (o_d < D)[None, :]
    offsets = (layer * D + unit)[:, None] * (3 * D) + gate * D + o_d[None, :]
    return tl.load(p_weight + offsets, mask=mask, other=0).to(tl.float32)


@triton.jit(do_not_specialize=["batch", "steps", "slices", "first_slice"])
def layer_recurrence_bwd_kernel(
    p_d_e,  # [B, L, D] gradient of each e_t through its code
    p_state,  # [B, 2, D]
    p_weight_ih,  # [2, D, 3D], transposed
    p_weight_hh,  # [2, D, 3D], transposed
    p_out_weight,  # [D, D], transposed
    p_state_norm_weight,  # [D]
    p_state_norm_bias,
    p_saved,  # [B, L, 2, 5, D]
    p_saved_e,  # [B, L, D]
    p_words,  # [B, L, 5, D] int64, zero
    p_d_gates,  # out [B, L, 2, 4, D]: of the sums of r, z, n and of the hidden part of n
    p_d_hidden,  # out [B, L, 2, D]: of the normalised hidden values after each step
    p_d_out,  # out [B, L, D]: of the output map, before its ReLU
    p_d_state,  # out [B, 2, D]
    p_d_start,  # out [B, D]
    batch,
    steps,
    slices,
    first_slice,
    D: tl.constexpr,
    BD: tl.constexpr,
    UNITS: tl.constexpr,
    COPIES: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    i_program = tl.program_id(0) + first_slice
    i_team = i_program // slices
    teams = tl.cdiv(tl.num_programs(0), slices)
    i_slice = i_program - i_team * slices
    o_d = tl.arange(0, BD)
    in_d = o_d < D
    unit = i_slice * UNITS + tl.arange(0, UNITS)
    in_unit = unit < D

    wr_x0, wr_h0 = _gate_columns(p_weight_ih, 0, 0, unit, D, BD), _gate_columns(p_weight_hh, 0, 0, unit, D, BD)
    wz_x0, wz_h0 = _gate_columns(p_weight_ih, 0, 1, unit, D, BD), _gate_columns(p_weight_hh, 0, 1, unit, D, BD)
    wn_x0, wn_h0 = _gate_columns(p_weight_ih, 0, 2, unit, D, BD), _gate_columns(p_weight_hh, 0, 2, unit, D, BD)
    wr_x1, wr_h1 = _gate_columns(p_weight_ih, 1, 0, unit, D, BD), _gate_columns(p_weight_hh, 1, 0, unit, D, BD)
    wz_x1, wz_h1 = _gate_columns(p_weight_ih, 1, 1, unit, D, BD), _gate_columns(p_weight_hh, 1, 1, unit, D, BD)
    wn_x1, wn_h1 = _gate_columns(p_weight_ih, 1, 2, unit, D, BD), _gate_columns(p_weight_hh, 1, 2, unit, D, BD)
    out_weight = gate_rows(p_out_weight, 0, unit, D, BD)
    norm_weight = tl.load(p_state_norm_weight + o_d, mask=in_d, other=0).to(tl.float32)
    norm_bias = tl.load(p_state_norm_bias + o_d, mask=in_d, other=0).to(tl.float32)

    for b in range(i_team, batch, teams):
        d_h0 = tl.zeros([BD], tl.float32)
        d_h1 = tl.zeros([BD], tl.float32)
        d_e = tl.zeros([BD], tl.float32)
        for back in range(steps):
            t = steps - 1 - back
            i_step = b * steps + t
            mine = t % slices == i_slice
            p_word = p_words + i_step * 5 * D
            p_save = p_saved + i_step * 10 * D
            e = tl.load(p_saved_e + i_step * D + o_d, mask=in_d, other=0)
            d_e += tl.load(p_d_e + i_step * D + o_d, mask=in_d, other=0)
            d_out = tl.where(e > 0, d_e, 0.0)
            post(p_word + unit, matvec(out_weight, d_out), in_unit)
            tl.store(p_d_out + i_step * D + o_d, d_out, mask=in_d & mine)
            tl.store(p_d_hidden + i_step * 2 * D + o_d, d_h0, mask=in_d & mine)
            tl.store(p_d_hidden + (i_step * 2 + 1) * D + o_d, d_h1, mask=in_d & mine)
            if NORMALISE:
                d_h0 = _norm_slope(d_h0, tl.load(p_save + 4 * D + o_d, mask=in_d, other=0), norm_weight, D, BD)
                d_h1 = _norm_slope(d_h1, tl.load(p_save + 9 * D + o_d, mask=in_d, other=0), norm_weight, D, BD)
            p_initial = p_state + b * 2 * D

            hidden = _before(p_initial + D, p_save + 5 * D, t, o_d, norm_weight, norm_bias, D, BD, NORMALISE)
            d_x1 = d_h1 + receive(p_word, D, BD, COPIES)
            p_gate = p_d_gates + i_step * 8 * D
            d_r, d_z, d_n, d_nh, d_h1 = cell_slope(d_x1, hidden, p_save + 5 * D, p_gate + 4 * D, o_d, mine, D)
            post(p_word + D + unit, matvec(wr_x1, d_r) + matvec(wz_x1, d_z) + matvec(wn_x1, d_n), in_unit)
            post(p_word + 2 * D + unit, matvec(wr_h1, d_r) + matvec(wz_h1, d_z) + matvec(wn_h1, d_nh), in_unit)

            hidden = _before(p_initial, p_save, t, o_d, norm_weight, norm_bias, D, BD, NORMALISE)
            d_x0 = d_h0 + receive(p_word + D, D, BD, COPIES)
            d_r, d_z, d_n, d_nh, d_h0 = cell_slope(d_x0, hidden, p_save, p_gate, o_d, mine, D)
            post(p_word + 3 * D + unit, matvec(wr_x0, d_r) + matvec(wz_x0, d_z) + matvec(wn_x0, d_n), in_unit)
            post(p_word + 4 * D + unit, matvec(wr_h0, d_r) + matvec(wz_h0, d_z) + matvec(wn_h0, d_nh), in_unit)
            d_h1 += receive(p_word + 2 * D, D, BD, COPIES)
            d_e = receive(p_word + 3 * D, D, BD, COPIES)
            d_h0 += receive(p_word + 4 * D, D, BD, COPIES)
        mask = in_d & (i_slice == 0)
        tl.store(p_d_state + b * 2 * D + o_d, d_h0, mask=mask)
        tl.store(p_d_state + b * 2 * D + D + o_d, d_h1, mask=mask)
        tl.store(p_d_start + b * D + o_d, d_e, mask=mask)


def why_not(width: int, layers: int, dtypes: tuple[str, ...], processors: int | None) -> list[str]:
    """Reasons not to run a recurrence of D = ``width`` and G = ``layers`` with tensors of these dtypes.

    ``processors`` is the number of multiprocessors of the GPU, None in the interpreter.
    """
    reasons = []
    if layers != 2:
        reasons.append(f"the Triton kernel is for 2 GRU layers; this recurrence has {layers}")
    if width > LARGEST_WIDTH:
        reasons.append(f"the Triton kernel is for widths up to {LARGEST_WIDTH}, which fit in registers; got {width}")
    other = sorted(set(dtypes) - {"torch.float32", "torch.bfloat16"})
    if other:
        reasons.append(f"the Triton kernel takes float32 and bfloat16; got {', '.join(other)}")
    needed = triton.cdiv(width, sizes(width)["UNITS"])
    if processors is not None and needed > processors:
        reasons.append(f"the Triton kernel needs {needed} multiprocessors at width {width}; this GPU has {processors}")
    return reasons


def sizes(width: int) -> dict[str, int]:
    """The block sizes: constexpr arguments that both kernels take."""
    block = max(triton.next_power_of_2(width), 16)
    return {
        "D": width,
        "BD": block,
        # The interpreter runs programs one after another: alone, a program is its own team.
        "UNITS": block if INTERPRET.value else 8 if block <= 128 else 4,
        "COPIES": max(WARPS * 64 // block, 1),  # 32 lanes, each up to 2 words in one load
    }


def grid_size(batch: int, width: int, device: torch.device) -> tuple[int, int]:
    """(programs of a launch, programs of a team)."""
    slices = triton.cdiv(width, sizes(width)["UNITS"])
    if INTERPRET.value:
        return slices, slices
    teams = max(torch.cuda.get_device_properties(device).multi_processor_count // slices, 1)
    return slices * min(batch, teams), slices


@on_device
def launch_layer_recurrence_fwd(
    state: Tensor,  # [B, 2, D]
    start: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    state_norm_weight: Tensor,
    state_norm_bias: Tensor,
    code_norm_weight: Tensor,
    code_norm_bias: Tensor,
    alpha: float,
    normalise_state: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes ``[B, L, D]`` in the dtype of ``state``, what the gradient needs: ``[B, L, 2, 5, D]``, ``[B, L, D]``).

    The last two are empty without ``save``. The other arguments are those of the op of this name.
    """
    batch, _, width = state.shape
    steps = code_norm_weight.shape[0]
    device = state.device
    words = torch.zeros(batch, steps, 3, width, dtype=torch.int64, device=device)
    saved = torch.empty(batch if save else 0, steps, 2, 5, width, dtype=torch.float32, device=device)
    saved_e = torch.empty(batch if save else 0, steps, width, dtype=torch.float32, device=device)
    codes = torch.empty(batch, steps, width, dtype=state.dtype, device=device)
    programs, slices = grid_size(batch, width, device)
    parameters = (start, weight_ih, weight_hh, bias_ih, bias_hh, out_weight, out_bias, state_norm_weight)
    parameters += (state_norm_bias, code_norm_weight, code_norm_bias)
    layer_recurrence_fwd_kernel[(programs,)](
        ready(state), *(ready(x) for x in parameters), words, saved, saved_e, codes, batch, steps, slices, 0, alpha,
        **sizes(width), NORMALISE=normalise_state, SAVE=save, **OPTIONS,
    )  # fmt: skip
    return codes, saved, saved_e


class RecurrenceGradients(NamedTuple):
    """Gradients of all tensor arguments, in their order, each in the dtype of its argument."""

    d_state: Tensor
    d_start: Tensor
    d_weight_ih: Tensor
    d_weight_hh: Tensor
    d_bias_ih: Tensor
    d_bias_hh: Tensor
    d_out_weight: Tensor
    d_out_bias: Tensor
    d_state_norm_weight: Tensor
    d_state_norm_bias: Tensor
    d_code_norm_weight: Tensor
    d_code_norm_bias: Tensor


def _standardise(x: Tensor) -> tuple[Tensor, Tensor]:
    """(``x`` with mean 0 and variance 1 along its last dimension, 1 / standard deviation)."""
    variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    scale = torch.rsqrt(variance + EPSILON)
    return (x - mean) * scale, scale


@on_device
def launch_layer_recurrence_bwd(
    d_codes: Tensor,  # [B, L, D]
    saved: Tensor,  # [B, L, 2, 5, D]
    saved_e: Tensor,  # [B, L, D]
    state: Tensor,
    start: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    state_norm_weight: Tensor,
    state_norm_bias: Tensor,
    code_norm_weight: Tensor,
    code_norm_bias: Tensor,
    alpha: float,
    normalise_state: bool,
) -> RecurrenceGradients:
    """Gradients of all tensor arguments of ``launch_layer_recurrence_fwd`` called with ``save``.

    One launch walks the steps backwards. What needs no order of steps is done for all of them together, by PyTorch: the
    codes' LayerNorms before it, the parameters' gradients (matrix products over B * L) after it.
    """
    batch, steps, width = saved_e.shape
    initial = state.float()
    pooled = initial.mean(dim=1, keepdim=True)  # [B, 1, D]
    unit_code, scale = _standardise((1 - alpha) * saved_e + alpha * pooled)  # [B, L, D]
    d_codes = d_codes.float()
    d_unit = d_codes * code_norm_weight.float()
    d_mixed = d_unit - d_unit.mean(-1, keepdim=True) - unit_code * (d_unit * unit_code).mean(-1, keepdim=True)
    d_mixed = d_mixed * scale

    device = state.device
    words = torch.zeros(batch, steps, 5, width, dtype=torch.int64, device=device)
    d_gates = torch.empty(batch, steps, 2, 4, width, dtype=torch.float32, device=device)
    d_hidden = torch.empty(batch, steps, 2, width, dtype=torch.float32, device=device)
    d_out = torch.empty_like(saved_e)
    d_state = torch.empty(batch, 2, width, dtype=torch.float32, device=device)
    d_start = torch.empty(batch, width, dtype=torch.float32, device=device)
    programs, slices = grid_size(batch, width, device)
    layer_recurrence_bwd_kernel[(programs,)](
        ready((1 - alpha) * d_mixed), ready(state), weight_ih.mT.contiguous(), weight_hh.mT.contiguous(),
        out_weight.mT.contiguous(), ready(state_norm_weight), ready(state_norm_bias), saved, saved_e, words, d_gates,
        d_hidden, d_out, d_state, d_start, batch, steps, slices, 0,
        **sizes(width), NORMALISE=normalise_state, **OPTIONS,
    )  # fmt: skip

    x = saved[:, :, :, 4]  # [B, L, 2, D]
    after, _ = _standardise(x) if normalise_state else (x, x)
    d_norm_weight = (d_hidden * after).sum((0, 1, 2)) if normalise_state else torch.zeros_like(d_start[0])
    d_norm_bias = d_hidden.sum((0, 1, 2)) if normalise_state else torch.zeros_like(d_start[0])
    if normalise_state:
        after = after * state_norm_weight.float() + state_norm_bias.float()
    before = torch.cat([initial[:, None], after[:, :-1]], dim=1)  # [B, L, 2, D]
    first = start.float().expand(batch, 1, width)
    inputs = torch.stack([torch.cat([first, saved_e[:, :-1]], dim=1), x[:, :, 0]], dim=2)  # [B, L, 2, D]
    d_gates_h = d_gates[:, :, :, [0, 1, 3]]  # [B, L, 2, 3, D]

    def by_layer(values: Tensor) -> Tensor:
        return values.flatten(3).permute(2, 0, 1, 3).flatten(1, 2)  # [2, B * L, ...]

    d_sums_x, d_sums_h = by_layer(d_gates[:, :, :, :3]), by_layer(d_gates_h)  # [2, B * L, 3D]
    return RecurrenceGradients(
        (d_state + alpha / 2 * d_mixed.sum(dim=1, keepdim=True)).to(state.dtype),
        d_start.sum(dim=0).to(start.dtype),
        (d_sums_x.mT @ by_layer(inputs)).to(weight_ih.dtype),
        (d_sums_h.mT @ by_layer(before)).to(weight_hh.dtype),
        d_sums_x.sum(dim=1).to(bias_ih.dtype),
        d_sums_h.sum(dim=1).to(bias_hh.dtype),
        (d_out.flatten(0, 1).mT @ x[:, :, 1].flatten(0, 1)).to(out_weight.dtype),
        d_out.sum((0, 1)).to(out_bias.dtype),
        d_norm_weight.to(state_norm_weight.dtype),
        d_norm_bias.to(state_norm_bias.dtype),
        (d_codes * unit_code).sum(dim=0).to(code_norm_weight.dtype),
        d_codes.sum(dim=0).to(code_norm_bias.dtype),
    )
