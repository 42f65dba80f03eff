"""The op ``tile_weights``: blocks of generated weights -> whole parameters, written into memory that is there."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pudnet import backends
from pudnet.errors import ShapeError, message
from pudnet.ops import _native_graphs, reference

backends.register_op("tile_weights", reference.tile_weights)
backends.register(
    "tile_weights",
    "native",
    _native_graphs.tile_weights,
    devices=("cpu",),
    why_not=_native_graphs.why_not_tile_weights,
)


def tile_weights(
    blocks: Sequence[Tensor],  # each [kH * kW, o, i]
    scales: Sequence[float],
    sizes: Sequence[tuple[int, int]],  # O, I of each target
    targets: Sequence[Tensor],  # each of O * I * kH * kW elements, dense
    *,
    backend: str | None = None,
) -> None:
    """Repeat each block over both its channel dimensions, times a factor, and cut; meaning: ``reference.tile_weights``.

    Raises:
        ShapeError: the four sequences differ in length, or a target in elements from what its block makes.
        BackendUnavailableError: the backend asked for cannot run this call.
    """
    if not len(blocks) == len(scales) == len(sizes) == len(targets):
        lengths = [len(blocks), len(scales), len(sizes), len(targets)]
        raise ShapeError(message("tile_weights", "all sequences", "of one length", lengths))
    if not blocks:
        return
    for block, (out, inputs), target in zip(blocks, sizes, targets, strict=True):
        if target.numel() != out * inputs * block.shape[0]:
            rule = f"{out} x {inputs} x {block.shape[0]} elements"
            raise ShapeError(message("tile_weights", "targets", rule, list(target.shape)))
    backends.call("tile_weights", targets[0].device, backend, list(blocks), list(scales), list(sizes), list(targets))
