"""The op ``graph_recurrence``: one gated message-passing traversal of graphs -> new node states."""

from __future__ import annotations

from torch import Tensor

from pudnet import backends
from pudnet.errors import ShapeError, message
from pudnet.ops import _native_graphs, reference

backends.register_op("graph_recurrence", reference.graph_recurrence)
backends.register(
    "graph_recurrence",
    "native",
    _native_graphs.graph_recurrence,
    devices=("cpu",),
    why_not=_native_graphs.why_not_graph_recurrence,
)


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
        ShapeError: ``states``, ``edges`` and ``level_sizes`` do not fit together or do not fit the parameters.
        BackendUnavailableError: the backend asked for cannot run this call.
    """
    kinds, width = message_in_weight.shape[0], message_in_weight.shape[2]
    if states.ndim != 2 or states.shape[1] != width:
        raise ShapeError(message("graph_recurrence", "states", f"[N, {width}]", list(states.shape)))
    count = states.shape[0]
    if tuple(edges.shape) != (kinds, count, count):
        raise ShapeError(message("graph_recurrence", "edges", f"[{kinds}, {count}, {count}]", list(edges.shape)))
    if sum(level_sizes) != count or any(size < 1 for size in level_sizes):
        raise ShapeError(message("graph_recurrence", "level_sizes", f"positive with the sum {count}", level_sizes))
    result: Tensor = backends.call(
        "graph_recurrence", states.device, backend, states, edges, level_sizes, message_in_weight, message_in_bias,
        message_out_weight, message_out_bias, weight_ih, weight_hh, bias_ih, bias_hh,
    )  # fmt: skip
    return result
