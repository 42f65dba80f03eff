"""The op ``graph_recurrence``: one gated message-passing traversal of graphs -> new node states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pudnet.ops._schemas  # noqa: F401 - defines torch.ops.pudnet
from pudnet import backends
from pudnet.ops import _native_graphs, reference
from pudnet.ops._checks import require_together
from pudnet.ops._native_graphs import check_graph


def graph_recurrence(
    states: Tensor,  # [N, D], level by level
    edges: Tensor,  # [V, N, N] weight of the edge into row from column
    level_sizes: list[int],
    message_in_weight: Tensor,  # [V, M, D]
    message_in_bias: Tensor,  # [V, M]
    message_out_weight: Tensor,  # [V, D, M]
    message_out_bias: Tensor,  # [V, D]
    weight_ih: Tensor,  # [3D, D]
    weight_hh: Tensor,  # [3D, D]
    bias_ih: Tensor,  # [3D]
    bias_hh: Tensor,  # [3D]
    *,
    backend: str | None = None,
) -> Tensor:
    """Visit the nodes level by level; meaning and formulas: ``reference.graph_recurrence``.

    Returns:
        New states ``[N, D]``, in the order of ``states``.

    Raises:
        ShapeError: the tensors do not fit each other or ``level_sizes``.
        BackendUnavailableError: the backend asked for cannot run this call.
    """
    check_graph(
        states, edges, level_sizes, message_in_weight, message_in_bias,
        message_out_weight, message_out_bias, weight_ih, weight_hh, bias_ih, bias_hh,
    )  # fmt: skip
    result: Tensor = backends.call(
        "graph_recurrence", states.device, backend, states, edges, level_sizes, message_in_weight, message_in_bias,
        message_out_weight, message_out_bias, weight_ih, weight_hh, bias_ih, bias_hh,
    )  # fmt: skip
    return result


@torch.library.impl("pudnet::graph_recurrence", ("cpu", "cuda"))
def _forward(states: Tensor, edges: Tensor, level_sizes: list[int], *rest: Any) -> tuple[Tensor, Tensor]:
    from pudnet.kernels.graph_recurrence import launch_graph_recurrence_fwd

    check_graph(states, edges, level_sizes, *rest[:-1])
    require_together("graph_recurrence", (states, edges, *rest[:-1]), torch.float32)
    outputs: tuple[Tensor, Tensor] = launch_graph_recurrence_fwd(states, edges, tuple(level_sizes), *rest)
    return outputs


@torch.library.impl("pudnet::graph_recurrence_backward", ("cpu", "cuda"))
def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    from pudnet.kernels.graph_recurrence import launch_graph_recurrence_bwd

    *known, level_sizes, a, b, c, d, weight_ih, weight_hh = arguments
    return tuple(launch_graph_recurrence_bwd(*known, tuple(level_sizes), a, b, c, d, weight_ih, weight_hh))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    states, edges, ctx.level_sizes, *maps, _, _, _ = inputs
    out, saved = output
    ctx.mark_non_differentiable(saved)
    ctx.save_for_backward(out, saved, states, edges, *maps)


def _gradients(ctx: Any, d_out: Tensor, d_saved: None) -> tuple[Tensor | None, ...]:
    out, saved, states, edges, *maps = ctx.saved_tensors
    d_states, *d_parameters = torch.ops.pudnet.graph_recurrence_backward(
        d_out, out, saved, states, edges, ctx.level_sizes, *maps
    )
    return (d_states, None, None, *d_parameters, None)


torch.library.register_autograd("pudnet::graph_recurrence", _gradients, setup_context=_save_for_backward)


def _run_triton(states: Tensor, edges: Tensor, level_sizes: list[int], *parameters: Tensor) -> Tensor:
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (states, *parameters))
    result: Tensor = torch.ops.pudnet.graph_recurrence(states, edges, level_sizes, *parameters, save)[0]
    return result


def why_not_triton(states: Tensor, edges: Tensor, level_sizes: list[int], *parameters: Tensor) -> list[str]:
    """What keeps Triton from running this call."""
    kinds, hidden, width = parameters[0].shape
    dtypes = tuple(str(x.dtype) for x in (states, edges, *parameters))
    return _why_not_triton(width, kinds, hidden, dtypes, torch.is_grad_enabled() and edges.requires_grad)


def _why_not_triton(
    width: int, kinds: int, hidden: int, dtypes: tuple[str, ...], edges_have_gradient: bool
) -> list[str]:
    from pudnet.kernels.graph_recurrence import why_not

    reasons: list[str] = why_not(width, kinds, hidden, dtypes, edges_have_gradient)
    return reasons


_why_not_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in backends.py

backends.register_op("graph_recurrence", reference.graph_recurrence)
backends.register("graph_recurrence", "triton", _run_triton, devices=("cpu", "cuda"), why_not=why_not_triton)
backends.register(
    "graph_recurrence",
    "native",
    torch.ops.pudnet.graph_recurrence_native.default,
    devices=("cpu",),
    why_not=_native_graphs.why_not_graph_recurrence,
)
