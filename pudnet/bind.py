"""Stage 5, weights -> module: call a network with generated weights, or write them into a copy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pudnet.errors import InputError, message
from pudnet.specs import WeightLayout

Method = str | Callable[[nn.Module, Tensor], Any]


def strip(module: nn.Module, layout: WeightLayout) -> nn.Module:
    """A copy of ``module`` without its generated weights: what remains is learned and shared by all datasets."""
    stripped = copy.deepcopy(module)
    for entry in layout.entries:
        for name in (entry.name, *entry.aliases):
            owner, _, attribute = name.rpartition(".")
            stripped.get_submodule(owner).register_parameter(attribute, None)
    return stripped


def _all_names(layout: WeightLayout, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    expected = {entry.name for entry in layout.entries}
    if set(weights) != expected:
        wrong = sorted(expected ^ set(weights))[:3]
        rule = f"one tensor for each of the {len(expected)} generated names"
        raise InputError(message("bind", "weights", rule, f"a difference at {wrong}"))
    return {name: weights[entry.name] for entry in layout.entries for name in (entry.name, *entry.aliases)}


def call(
    stripped: nn.Module, layout: WeightLayout, weights: Mapping[str, Tensor], x: Tensor, method: Method = "forward"
) -> Any:
    """Run ``stripped`` on ``x`` with ``weights`` ``{name: [O, I, kH, kW]}``; differentiable in both.

    BatchNorm follows the module's mode: in training mode it uses batch statistics and updates its running ones.

    Args:
        method: name of the method to run, or a function of the module and ``x``.
    """
    return torch.func.functional_call(_Method(stripped, method), _prefixed(_all_names(layout, weights)), (x,))


class _Method(nn.Module):
    """Makes any method or function callable through ``functional_call``."""

    def __init__(self, inner: nn.Module, method: Method) -> None:
        super().__init__()
        self.inner, self.method = inner, method

    def forward(self, x: Tensor) -> Any:
        return getattr(self.inner, self.method)(x) if isinstance(self.method, str) else self.method(self.inner, x)


def _prefixed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"inner.{name}": weight for name, weight in weights.items()}


def call_together(stripped: nn.Module, layout: WeightLayout, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Run B predicted networks at once (``torch.func.vmap``), in the module's evaluation mode.

    Args:
        weights: ``{name: [B, O, I, kH, kW]}``.
        x: ``[B, n, 3, H, W]``, images of each network's own dataset.

    Returns:
        ``[B, n, ...]``.
    """
    if stripped.training:
        raise InputError(message("call_together", "stripped", "in eval mode", "train mode", "Call .eval() first."))
    return torch.func.vmap(lambda one, images: call(stripped, layout, one, images))(dict(weights), x)


def materialise(stripped: nn.Module, layout: WeightLayout, weights: Mapping[str, Tensor]) -> nn.Module:
    """An ordinary, independent module that holds a copy of ``weights`` ``{name: [O, I, kH, kW]}``."""
    module = copy.deepcopy(stripped)
    held: dict[int, nn.Parameter] = {}
    for name, weight in _all_names(layout, weights).items():
        owner, _, attribute = name.rpartition(".")
        parameter = held.setdefault(id(weight), nn.Parameter(weight.detach().clone()))
        module.get_submodule(owner).register_parameter(attribute, parameter)
    return module
