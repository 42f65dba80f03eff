"""The op ``generate_weights``: one code per layer -> all generated weights in one flat row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pudnet.ops._schemas  # noqa: F401 - defines torch.ops.pudnet
from pudnet import backends
from pudnet.errors import InputError, ShapeError, message
from pudnet.ops import _native_generation, reference
from pudnet.ops._checks import require_floating, require_no, require_rank, require_shapes, require_together


def generate_weights(
    codes: Tensor,  # [B, L, D]
    fc_weight: Tensor,  # [sum over layers of h * kH * kW, D]
    fc_bias: Tensor,  # [the same]
    mix_weight: Tensor,  # [L, 2h, h]
    mix_bias: Tensor,  # [L, 2h]
    row_weight: Tensor,  # [R, 2h]
    row_bias: Tensor,  # [R]
    shapes: list[int],  # O, I, kH, kW of each layer
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Generate the weights of all layers; meaning and formulas: ``reference.generate_weights``.

    The parameters may be of another dtype than the codes, and are taken in that of the codes: bfloat16 rows halve the
    memory that has to be read.

    Args:
        dtype: of the result; that of ``codes`` by default.
        backend: a name of ``pudnet.backends.BACKENDS``; by default chosen as described there.

    Returns:
        Flat weights ``[B, P]``, each layer in channels-last order ``[O, kH, kW, I]``.

    Raises:
        ShapeError: the tensors do not fit each other or ``shapes``.
        DtypeError: ``dtype`` or a tensor's is not a floating-point type.
        BackendUnavailableError: the backend asked for cannot run this call.
    """
    dtype = dtype or codes.dtype
    check(codes, fc_weight, fc_bias, mix_weight, mix_bias, row_weight, row_bias, shapes, dtype)
    weights: Tensor = backends.call(
        "generate_weights", codes.device, backend,
        codes, fc_weight, fc_bias, mix_weight, mix_bias, row_weight, row_bias, shapes, dtype,
    )  # fmt: skip
    return weights


def check(
    codes: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    mix_weight: Tensor,
    mix_bias: Tensor,
    row_weight: Tensor,
    row_bias: Tensor,
    shapes: list[int],
    dtype: torch.dtype,
) -> None:
    """Raise ShapeError or DtypeError unless the arguments of ``generate_weights`` fit each other."""
    op = "generate_weights"
    require_rank(op, "mix_weight", mix_weight, 3)
    require_rank(op, "fc_weight", fc_weight, 2)
    require_rank(op, "codes", codes, 3)
    layers, _, hidden = mix_weight.shape
    width = fc_weight.shape[1]
    if len(shapes) != 4 * layers or any(size < 1 for size in shapes):
        raise ShapeError(message(op, "shapes", f"O, I, kH, kW of {layers} layers, positive", shapes))
    rows = sum(o * i for o, i in zip(shapes[0::4], shapes[1::4], strict=True))
    fc_rows = hidden * sum(kh * kw for kh, kw in zip(shapes[2::4], shapes[3::4], strict=True))
    expected = (
        ("codes", codes, (codes.shape[0], layers, width)),
        ("fc_weight", fc_weight, (fc_rows, width)),
        ("fc_bias", fc_bias, (fc_rows,)),
        ("mix_weight", mix_weight, (layers, 2 * hidden, hidden)),
        ("mix_bias", mix_bias, (layers, 2 * hidden)),
        ("row_weight", row_weight, (rows, 2 * hidden)),
        ("row_bias", row_bias, (rows,)),
    )
    require_shapes(op, expected)
    for name, tensor, _ in expected:
        require_floating(op, name, tensor.dtype)
    require_floating(op, "dtype", dtype)


def _chosen(table: dict[str, Callable[..., Any]], backend: str) -> Callable[..., Any]:
    if backend not in table:
        raise InputError(message("generate_weights", "backend", f"one of {sorted(table)}", repr(backend)))
    return table[backend]


def _forward_triton(*arguments: Any) -> Tensor:
    from pudnet.kernels.generate_weights import launch_generate_weights_fwd

    *tensors, shapes, dtype = arguments
    weights: Tensor = launch_generate_weights_fwd(*tensors, tuple(shapes), dtype)
    return weights


def _backward_triton(*arguments: Any) -> tuple[Tensor, ...]:
    from pudnet.kernels.generate_weights import launch_generate_weights_bwd

    *tensors, shapes = arguments
    return tuple(launch_generate_weights_bwd(*tensors, tuple(shapes)))


# By backend. Forward: tensors, shapes, dtype -> weights. Backward: d_weights, the same tensors, shapes -> gradients.
_FORWARD: dict[str, Callable[..., Tensor]] = {"triton": _forward_triton, "native": _native_generation.forward}
_BACKWARD: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "triton": _backward_triton,
    "native": _native_generation.backward,
}


@torch.library.impl("pudnet::generate_weights", ("cpu", "cuda"))
def _forward(*arguments: Any) -> Tensor:
    *rest, backend = arguments
    run = _chosen(_FORWARD, backend)
    check(*rest)
    require_together("generate_weights", rest[:7])
    if backend == "native":
        require_no("generate_weights", _native_generation.why_not(*rest))
    return run(*rest)


@torch.library.impl("pudnet::generate_weights_backward", ("cpu", "cuda"))
def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    d_weights, *tensors, shapes, backend = arguments
    run = _chosen(_BACKWARD, backend)
    forward: list[Any] = [*tensors, shapes, tensors[0].dtype]
    check(*forward)
    require_together("generate_weights", [d_weights, *tensors])
    size = _native_generation.flat_size(shapes)
    require_shapes("generate_weights", [("d_weights", d_weights, (len(tensors[0]), size))])
    require_floating("generate_weights", "d_weights", d_weights.dtype)
    return run(d_weights, *tensors, shapes)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.shapes, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, d_weights: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.pudnet.generate_weights_backward(d_weights, *ctx.saved_tensors, ctx.shapes, ctx.backend)
    return (*gradients, None, None, None)


torch.library.register_autograd("pudnet::generate_weights", _gradients, setup_context=_save_for_backward)


def why_not_triton(codes: Tensor, *rest: Any) -> list[str]:
    """What keeps Triton from running this call."""
    *parameters, _, dtype = rest
    dtypes = tuple(str(x) for x in (codes.dtype, *(x.dtype for x in parameters), dtype))
    return _why_not_triton(codes.shape[2], parameters[2].shape[2], dtypes)


def _why_not_triton(width: int, hidden: int, dtypes: tuple[str, ...]) -> list[str]:
    from pudnet.kernels.generate_weights import why_not

    reasons: list[str] = why_not(width, hidden, dtypes)
    return reasons


_why_not_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in backends.py

backends.register_op("generate_weights", reference.generate_weights)
backends.register(
    "generate_weights",
    "triton",
    lambda *arguments: torch.ops.pudnet.generate_weights(*arguments, "triton"),
    devices=("cpu", "cuda"),
    why_not=why_not_triton,
)
backends.register(
    "generate_weights",
    "native",
    lambda *arguments: torch.ops.pudnet.generate_weights(*arguments, "native"),
    devices=("cpu",),
    why_not=_native_generation.why_not,
)
