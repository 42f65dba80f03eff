"""Feature taps: images -> the feature maps of a network -> one pooled feature vector per image, read by the heads.

n images, C channels, H x W pixels, g pooling grid, F features.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet.errors import InputError, ShapeError, message

Layers = Literal["all", "last"]

# At most this many features per map, so that a head over many layers stays small.
MAX_FEATURES_PER_MAP = 1024
# Maps, spread over the layers, and channels of each whose covariances are read: 2016 for each map at most.
COVARIANCE_MAPS, COVARIANCE_CHANNELS = 3, 64
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


class View(NamedTuple):
    """A copy of an image: moved down and to the right, in 32nds of its sides, its border repeated; then mirrored."""

    down: int = 0
    right: int = 0
    mirrored: bool = False

    def of(self, x: Tensor) -> Tensor:
        """The copies of images ``[n, C, H, W]``, each moved by a pixel at least where it is moved at all."""
        for dim, steps in ((2, self.down), (3, self.right)):
            if steps:
                x = _moved(x, dim, steps * max(1, round(x.shape[dim] / 32)))
        return x.flip(-1) if self.mirrored else x


def _moved(x: Tensor, dim: int, by: int) -> Tensor:
    """``x`` moved along ``dim``, by at most its size, its border repeated."""
    side, sizes = x.shape[dim], [-1] * x.dim()
    sizes[dim] = abs(by)
    if by > 0:
        return torch.cat([x.narrow(dim, 0, 1).expand(sizes), x.narrow(dim, 0, side - by)], dim)
    return torch.cat([x.narrow(dim, -by, side + by), x.narrow(dim, side - 1, 1).expand(sizes)], dim)


# In how many copies an image is read, by name.
VIEWS: dict[str, tuple[View, ...]] = {
    "single": (View(),),
    "mirrored": (View(), View(mirrored=True)),
    "shifted": (View(), View(down=1, right=1), View(down=-1, right=-1)),
}


def check_views(where: str, views: str | None) -> None:
    """Raise InputError, listing the views there are, unless ``views`` is one of them or None."""
    if views is not None and views not in VIEWS:
        raise InputError(message(where, "views", f"None or one of {', '.join(map(repr, VIEWS))}", repr(views)))


@dataclass(frozen=True)
class Reading:
    """What is read of feature maps: statistics of each map, each L2-normalised, side by side.

    Each map gives its averages over a g x g grid, g the largest of 4, 2, 1 that gives at most 1024 features and is no
    larger than the map. Vectors ``[n, F]`` are only normalised.

    Attributes:
        layers: ``"all"`` maps, or the ``"last"`` one.
        spread: what the kernel and ridge heads read: the averages' signed square roots (a few strong responses no
            longer drown the rest), and each channel's standard deviation over the map. On the validation classes the
            two are worth 2 to 3 points, most of it the deviation. False for the averages alone, as they are: what the
            papers' cosine classifier compares.
        covariances: what the kernel head reads besides: the signed square roots of the covariances, over the map, of
            any two of its channels (at most 64, spread over all), of three layers at most. Where they are estimated
            from few places they count less: places / (places + channels). They are worth 0.8 points on the mean of nine
            kinds of data, 3.3 on textures (docs/results.md).
    """

    layers: Layers = "all"
    spread: bool = True
    covariances: bool = False

    def __post_init__(self) -> None:
        if self.layers not in ("all", "last"):
            raise InputError(message("Reading", "layers", "'all' or 'last'", repr(self.layers)))

    def __call__(self, module: nn.Module, x: Tensor, views: str = "single") -> Tensor:
        """Images -> features, one of ``VIEWS`` at a time.

        Args:
            module: see ``feature_maps``.
            x: ``[n, 3, H, W]``.
            views: the statistics are averaged over these copies of each image, before they are normalised.

        Returns:
            ``[n, F]``.

        Raises:
            InputError, ShapeError: as for ``feature_maps`` and ``pool``.
        """
        return _joined(functools.reduce(_summed, (self._seen(module, x, view) for view in VIEWS[views])))

    def in_all_views(self, module: nn.Module, x: Tensor) -> dict[str, Tensor]:
        """What the call gives for each of ``VIEWS``; every copy of the images is read once."""
        copies = dict.fromkeys(view for views in VIEWS.values() for view in views)
        seen = {view: self._seen(module, x, view) for view in copies}
        return {name: _joined(functools.reduce(_summed, map(seen.__getitem__, views))) for name, views in VIEWS.items()}

    def _seen(self, module: nn.Module, x: Tensor, view: View) -> list[_Part]:
        return self._parts(feature_maps(module, view.of(x).contiguous(memory_format=torch.channels_last)))

    def pool(self, maps: Sequence[Tensor]) -> Tensor:
        """The features of images that were seen once. Traceable by ``torch.export`` with a dynamic n.

        Args:
            maps: ``[n, C, h, w]`` or ``[n, F]`` each.

        Returns:
            ``[n, F]``.

        Raises:
            InputError: no maps.
            ShapeError: a map is neither 4-D nor 2-D.
        """
        return _joined(self._parts(maps))

    def _parts(self, maps: Sequence[Tensor]) -> list[_Part]:
        if not maps:
            raise InputError(message("Reading.pool", "maps", "at least one feature map", "none"))
        read = maps if self.layers == "all" else maps[-1:]
        last = len(read) - 1
        paired = {round(i * last / (COVARIANCE_MAPS - 1)) for i in range(COVARIANCE_MAPS)} if self.covariances else ()
        parts = []
        for number, one in enumerate(read):
            means = _means(one)
            if not self.spread or one.dim() != 4:
                parts.append(_Part(means))
                continue
            parts += [_Part(_root(means)), *_second_moments(one, number in paired)]
        return parts


class _Part(NamedTuple):
    """Some of an image's features ``[n, f]``, and how much they count."""

    values: Tensor
    weight: float = 1.0


def _summed(first: Sequence[_Part], second: Sequence[_Part]) -> list[_Part]:
    return [_Part(a.values + b.values, a.weight) for a, b in zip(first, second, strict=True)]


def _joined(parts: Sequence[_Part]) -> Tensor:
    return torch.cat([weight * F.normalize(values, dim=1) for values, weight in parts], dim=1)


def last_features(maps: Sequence[Tensor]) -> Tensor:
    """Averages of the last map over the grid that a ``Reading`` uses, as they are: ``[n, F]``."""
    return _means(maps[-1])


def _means(feature_map: Tensor) -> Tensor:
    if feature_map.dim() == 2:
        return feature_map
    if feature_map.dim() != 4:
        raise ShapeError(message("Reading.pool", "maps", "[n, C, h, w] or [n, F] each", list(feature_map.shape)))
    channels, height, width = feature_map.shape[1:]
    fits = [g for g in (4, 2) if channels * g * g <= MAX_FEATURES_PER_MAP and g <= min(height, width)]
    g = fits[0] if fits else 1
    if height == width == g:
        return feature_map.flatten(1)
    if height % g == 0 and width % g == 0:  # the same numbers; plain average pooling exports everywhere
        return F.avg_pool2d(feature_map, (height // g, width // g)).flatten(1)  # [n, C * g * g]
    return F.adaptive_avg_pool2d(feature_map, g).flatten(1)


def _second_moments(feature_map: Tensor, paired: bool) -> list[_Part]:
    """Of ``[n, C, h, w]`` over the map: standard deviations of the channels ``[n, C]``; with ``paired`` also the
    covariances of any two of them, of 64 at most, ``[n, C (C - 1) / 2]``.
    """
    n, channels, height, width = feature_map.shape
    places = height * width
    seen = feature_map.permute(0, 2, 3, 1).reshape(n, places, channels)  # as it lies in memory
    centred = seen - seen.mean(dim=1, keepdim=True)
    used = min(channels, COVARIANCE_CHANNELS)
    if not paired or used < 2:
        return [_Part(_root(centred.square().mean(dim=1)))]
    some = centred
    if used < channels:
        some = centred.index_select(2, torch.arange(used, device=seen.device) * channels // used)
    covariances = some.transpose(1, 2) @ some / places  # [n, used, used]
    variances = covariances.diagonal(dim1=1, dim2=2) if used == channels else centred.square().mean(dim=1)
    row, column = torch.triu_indices(used, used, 1, device=seen.device)
    pairs = covariances.flatten(1).index_select(1, row * used + column)
    return [_Part(_root(variances)), _Part(_root(pairs), places / (places + used))]


def _root(x: Tensor) -> Tensor:
    """Signed square root; exactly 0 at 0."""
    return x * torch.rsqrt(x.abs() + TINY)
