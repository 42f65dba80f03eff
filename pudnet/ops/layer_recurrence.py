"""The op ``layer_recurrence``: dataset embedding -> one code per layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pudnet.ops._schemas  # noqa: F401 - defines torch.ops.pudnet
from pudnet import backends
from pudnet.ops import _native_recurrence, reference
from pudnet.ops._native_recurrence import check


def layer_recurrence(
    state: Tensor,  # [B, G, D]
    start: Tensor,  # [D]
    weight_ih: Tensor,  # [G, 3D, D]
    weight_hh: Tensor,  # [G, 3D, D]
    bias_ih: Tensor,  # [G, 3D]
    bias_hh: Tensor,  # [G, 3D]
    out_weight: Tensor,  # [D, D]
    out_bias: Tensor,  # [D]
    state_norm_weight: Tensor,  # [D]
    state_norm_bias: Tensor,  # [D]
    code_norm_weight: Tensor,  # [L, D]
    code_norm_bias: Tensor,  # [L, D]
    *,
    alpha: float,
    normalise_state: bool,
    backend: str | None = None,
) -> Tensor:
    """Walk the layers of the target network; meaning and formulas: ``reference.layer_recurrence``.

    Args:
        alpha: share of the dataset embedding mixed into every code.
        normalise_state: whether the hidden state passes a LayerNorm after every step.
        backend: a name of ``pudnet.backends.BACKENDS``; by default chosen as described there.

    Returns:
        Codes ``[B, L, D]``.

    Raises:
        ShapeError: the tensors do not fit each other.
        BackendUnavailableError: the backend asked for cannot run this call.
    """
    check(
        state, start, weight_ih, weight_hh, bias_ih, bias_hh, out_weight, out_bias,
        state_norm_weight, state_norm_bias, code_norm_weight, code_norm_bias,
    )  # fmt: skip
    codes: Tensor = backends.call(
        "layer_recurrence", state.device, backend,
        state, start, weight_ih, weight_hh, bias_ih, bias_hh, out_weight, out_bias,
        state_norm_weight, state_norm_bias, code_norm_weight, code_norm_bias, alpha, normalise_state,
    )  # fmt: skip
    return codes


@torch.library.impl("pudnet::layer_recurrence", ("cpu", "cuda"))
def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from pudnet.kernels.layer_recurrence import launch_layer_recurrence_fwd

    check(*arguments[:12])
    outputs: tuple[Tensor, Tensor, Tensor] = launch_layer_recurrence_fwd(*arguments)
    return outputs


@torch.library.impl("pudnet::layer_recurrence_backward", ("cpu", "cuda"))
def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    from pudnet.kernels.layer_recurrence import launch_layer_recurrence_bwd

    return tuple(launch_layer_recurrence_bwd(*arguments))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.alpha, ctx.normalise_state, _ = inputs
    _, saved, saved_e = output
    ctx.mark_non_differentiable(saved, saved_e)
    ctx.save_for_backward(saved, saved_e, *tensors)


def _gradients(ctx: Any, d_codes: Tensor, d_saved: None, d_saved_e: None) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.pudnet.layer_recurrence_backward(d_codes, *ctx.saved_tensors, ctx.alpha, ctx.normalise_state)
    return (*gradients, None, None, None)


torch.library.register_autograd("pudnet::layer_recurrence", _gradients, setup_context=_save_for_backward)


def _run_triton(*arguments: Any) -> Tensor:
    save = torch.is_grad_enabled() and any(x.requires_grad for x in arguments[:12])
    codes: Tensor = torch.ops.pudnet.layer_recurrence(*arguments, save)[0]
    return codes


def why_not_triton(state: Tensor, *rest: Any) -> list[str]:
    """What keeps Triton from running this call."""
    *parameters, _, _ = rest
    dtypes = tuple(str(x.dtype) for x in (state, *parameters))
    return _why_not_triton(state.shape[2], state.shape[1], dtypes, state.device.type, state.device.index)


def _why_not_triton(width: int, layers: int, dtypes: tuple[str, ...], device: str, index: int | None) -> list[str]:
    from pudnet.kernels.layer_recurrence import why_not

    processors = torch.cuda.get_device_properties(index).multi_processor_count if device == "cuda" else None
    reasons: list[str] = why_not(width, layers, dtypes, processors)
    return reasons


_why_not_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in backends.py

backends.register_op("layer_recurrence", reference.layer_recurrence)
backends.register("layer_recurrence", "triton", _run_triton, devices=("cpu", "cuda"), why_not=why_not_triton)
backends.register(
    "layer_recurrence",
    "native",
    torch.ops.pudnet.layer_recurrence_native.default,
    devices=("cpu",),
    why_not=_native_recurrence.why_not,
)
