"""What an operator checks before memory is read by address. The ops can be called past the public functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pudnet.errors import DtypeError, InputError, ShapeError, message


def require_shapes(op: str, expected: Iterable[tuple[str, Tensor, Sequence[int]]]) -> None:
    """Raise ShapeError unless every tensor has the shape beside it."""
    for name, tensor, shape in expected:
        if tuple(tensor.shape) != tuple(shape):
            raise ShapeError(message(op, name, str(list(shape)), list(tensor.shape)))


def require_rank(op: str, name: str, tensor: Tensor, rank: int) -> None:
    """Raise ShapeError unless the tensor has ``rank`` axes."""
    if tensor.ndim != rank:
        raise ShapeError(message(op, name, f"of {rank} axes", list(tensor.shape)))


def require_floating(op: str, name: str, dtype: torch.dtype) -> None:
    """Raise DtypeError unless the dtype is a floating-point one."""
    if not dtype.is_floating_point:
        raise DtypeError(message(op, name, "of a floating-point type", dtype))


def require_together(op: str, tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> None:
    """Raise InputError unless all tensors are on one device and, where one is given, of ``dtype``."""
    device = tensors[0].device
    if any(tensor.device != device for tensor in tensors):
        got = sorted({str(tensor.device) for tensor in tensors})
        raise InputError(message(op, "the tensors", "on one device", got))
    if dtype is not None and any(tensor.dtype != dtype for tensor in tensors):
        got = sorted({str(tensor.dtype) for tensor in tensors})
        raise DtypeError(message(op, "the tensors", str(dtype), got))


def require_no(op: str, reasons: Sequence[str]) -> None:
    """Raise InputError with the reasons why a backend cannot run a call, if there are any."""
    if reasons:
        raise InputError(message(op, "the arguments", "what the backend runs", "; ".join(reasons)))
