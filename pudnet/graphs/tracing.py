"""Capture a network's graph by running its forward on stand-in values.

``stand_ins.py`` is the machinery, ``operations.py`` the table of what is understood.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pudnet.errors import DtypeError, ShapeError, message
from pudnet.graphs.graph import ArchGraph
from pudnet.graphs.operations import FUNCTIONS, module_handler
from pudnet.graphs.stand_ins import WHERE, Tracer


def trace(module: nn.Module, input_shape: Sequence[int] = (3, 32, 32)) -> ArchGraph:
    """Capture the graph of ``module`` for one input; the module is not changed and no number is computed.

    Args:
        module: any module whose forward takes one tensor and returns one; on any device, meta included. It is traced
            in the mode it is in (train or eval).
        input_shape: of one input, without the batch: (C, H, W) for images.

    Raises:
        InputError: operations that are not understood (all of them, with their module paths); control flow that depends
            on numbers; an output that is not one tensor; a tensor held by two modules; an empty parameter.
        DtypeError: a parameter that is not of a real floating type.
        ShapeError: ``input_shape`` is not a sequence of positive integers.
    """
    if not isinstance(module, nn.Module):
        raise DtypeError(message(WHERE, "module", "a torch.nn.Module", type(module).__name__))
    shape = tuple(input_shape)
    if not shape or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ShapeError(message(WHERE, "input_shape", "positive integers, as (3, 32, 32)", shape))
    return Tracer(module, shape, FUNCTIONS, module_handler).run()  # type: ignore[arg-type]  # a type is hashable
