"""Feature taps: images -> the feature maps of a network -> one pooled feature vector per image, read by the heads.

n images, C channels, H x W pixels, g pooling grid, F features.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet.errors import InputError, ShapeError, message

Layers = Literal["all", "last"]

# At most this many features per map, so that a head over many layers stays small.
MAX_FEATURES_PER_MAP = 1024
TINY = 1e-8  # keeps the gradient of a square root finite at 0

_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def feature_maps(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Feature maps of every layer of ``module`` for the images ``x [n, 3, H, W]``, in call order.

    Several threads may ask one module at once.

    A module with its own method ``feature_maps(x)`` decides itself. Any other is tapped with forward hooks (removed
    again): the output of every normalisation layer that reads a convolution's output, and of every convolution that no
    such layer reads, with ReLU applied.

    Returns:
        Maps ``[n, C, h, w]``; a module's own method may also give vectors ``[n, F]``.

    Raises:
        InputError: the module has no ``feature_maps`` and calls no ``Conv2d`` or ``ConvTranspose2d``.
    """
    own = getattr(module, "feature_maps", None)
    if own is not None:
        return list(own(x))
    return _tap(module, x)


def _tap(module: nn.Module, x: Tensor) -> list[Tensor]:
    maps: dict[int, Tensor] = {}  # call number -> map
    convolved: list[tuple[int, weakref.ref[Tensor]]] = []  # call number and raw output of each convolution
    thread = threading.get_ident()  # hooks also see what other threads run through the module

    # ReLU is applied at once, into a new tensor: what follows may overwrite the output in place (`out += identity`).
    def after_convolution(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if threading.get_ident() != thread:
            return
        call = len(convolved)
        convolved.append((call, weakref.ref(output)))
        maps[call] = F.relu(output)

    def after_norm(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if threading.get_ident() != thread:
            return
        for call, raw in convolved:
            if inputs and raw() is inputs[0]:
                maps[call] = F.relu(output)

    handles = []
    try:
        for layer in module.modules():
            if isinstance(layer, _CONVOLUTIONS):
                handles.append(layer.register_forward_hook(after_convolution))
            elif isinstance(layer, _NORMS):
                handles.append(layer.register_forward_hook(after_norm))
        module(x)
    finally:
        for handle in handles:
            handle.remove()
    if not maps:
        got = f"{type(module).__name__}, which calls none"
        hint = "Give the module a method feature_maps(x) that returns a list of [n, C, h, w]."
        raise InputError(message("feature_maps", "module", "a network that calls 2-D convolutions", got, hint))
    return [maps[call] for call in sorted(maps)]


def pool_features(maps: Sequence[Tensor], layers: Layers = "all", *, spread: bool = True) -> Tensor:
    """Pool maps to one vector per image: statistics of each map, L2-normalised, side by side.

    Each map gives its averages over a g x g grid, g the largest of 4, 2, 1 that gives at most 1024 features and is no
    larger than the map. With ``spread``, what the kernel and ridge heads read, the averages' signed square roots are
    taken (a few strong responses no longer drown the rest), and each channel's standard deviation over the map joins
    them: on the validation classes the two are worth 2 to 3 points, most of it the deviation. Vectors ``[n, F]`` are
    only normalised. Traceable by ``torch.export`` with a dynamic n.

    Args:
        maps: ``[n, C, h, w]`` or ``[n, F]`` each.
        layers: ``"all"`` maps, or the ``"last"`` one.
        spread: False for the averages alone, as they are: what the papers' cosine classifier compares.

    Returns:
        ``[n, F]``.

    Raises:
        InputError: no maps, or ``layers`` is neither.
        ShapeError: a map is neither 4-D nor 2-D.
    """
    if layers not in ("all", "last"):
        raise InputError(message("pool_features", "layers", "'all' or 'last'", repr(layers)))
    if not maps:
        raise InputError(message("pool_features", "maps", "at least one feature map", "none"))
    read = maps if layers == "all" else maps[-1:]
    statistics = [one for feature_map in read for one in _statistics(feature_map, spread)]
    return torch.cat([F.normalize(one, dim=1) for one in statistics], dim=1)


def mirrored_maps(module: nn.Module, x: Tensor) -> list[Tensor]:
    """What the kernel and ridge heads read of images where left and right mean nothing; in place of ``feature_maps``.

    Returns:
        The statistics of every layer's map as ``pool_features`` takes them, before their normalisation, averaged over
        each image and its mirror image: vectors ``[n, F]``.
    """
    straight, turned = (feature_maps(module, images) for images in (x, x.flip(-1)))
    both = ((_statistics(one, True), _statistics(other, True)) for one, other in zip(straight, turned, strict=True))
    return [(a + b) / 2 for pair in both for a, b in zip(*pair, strict=True)]


def maps_reader(mirrored: bool) -> Callable[[nn.Module, Tensor], list[Tensor]]:
    """``mirrored_maps`` or ``feature_maps``."""
    return mirrored_maps if mirrored else feature_maps


def _statistics(feature_map: Tensor, spread: bool) -> list[Tensor]:
    """What is told of one map: ``[n, C * g * g]``, and with ``spread`` ``[n, C]``."""
    means = _means(feature_map)
    return [_root(means), _deviations(feature_map)] if spread and feature_map.dim() == 4 else [means]


def last_features(maps: Sequence[Tensor]) -> Tensor:
    """Averages of the last map over the grid that ``pool_features`` uses, as they are: ``[n, F]``."""
    return _means(maps[-1])


def _means(feature_map: Tensor) -> Tensor:
    if feature_map.dim() == 2:
        return feature_map
    if feature_map.dim() != 4:
        raise ShapeError(message("pool_features", "maps", "[n, C, h, w] or [n, F] each", list(feature_map.shape)))
    channels, height, width = feature_map.shape[1:]
    fits = [g for g in (4, 2) if channels * g * g <= MAX_FEATURES_PER_MAP and g <= min(height, width)]
    g = fits[0] if fits else 1
    if height == width == g:
        return feature_map.flatten(1)
    if height % g == 0 and width % g == 0:  # the same numbers; plain average pooling exports everywhere
        return F.avg_pool2d(feature_map, (height // g, width // g)).flatten(1)  # [n, C * g * g]
    return F.adaptive_avg_pool2d(feature_map, g).flatten(1)


def _deviations(feature_map: Tensor) -> Tensor:
    """Standard deviation of each channel over its map: ``[n, C, h, w] -> [n, C]``."""
    centred = feature_map - feature_map.mean(dim=(2, 3), keepdim=True)
    return _root(centred.square().mean(dim=(2, 3)))


def _root(x: Tensor) -> Tensor:
    """Signed square root; exactly 0 at 0."""
    return x * torch.rsqrt(x.abs() + TINY)
