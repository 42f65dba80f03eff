"""Binding generated weights to modules."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet import bind
from pudnet.errors import InputError
from pudnet.specs import WeightLayout
from pudnet.targets import UNet, build_target


class Tied(nn.Module):
    """Two convolutions that share their kernel, a transposed one, biases, a norm and an own linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 3, 3, padding=1)
        self.b = nn.Conv2d(3, 3, 3, padding=1)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm2d(3)
        self.up = nn.ConvTranspose2d(3, 4, 2, stride=2)
        self.head = nn.Linear(4, 2)

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        x = F.relu(self.norm(self.b(F.relu(self.a(x)))))
        return [x, self.up(x)]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.feature_maps(x)[-1].mean(dim=(2, 3)))


MODULES = {
    "tied": Tied,
    "grouped": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), nn.Conv2d(6, 4, 3, dilation=2, stride=2)),
    "convnet3": lambda: build_target("convnet3")[0],
    "unet": lambda: UNet(4, 2),
}


def _make(name: str, batch: int | None = None) -> tuple[nn.Module, WeightLayout, dict[str, Tensor], Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        module = MODULES[name]()
        for child in module.modules():
            if isinstance(child, nn.BatchNorm2d):  # running statistics that show when they are not used
                child.running_mean.uniform_(-0.5, 0.5)
                child.running_var.uniform_(0.5, 2)
        module = module.eval()
        layout = WeightLayout.from_module(module)
        leading = () if batch is None else (batch,)
        weights = layout.views(torch.randn(*leading, layout.size) * 0.2)
        x = torch.randn(*leading, 5, 3, 16, 16)
    return module, layout, weights, x


def _with_weights(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """The oracle: a copy of ``module`` with its kernels overwritten in place, which keeps ties."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        for name, weight in weights.items():
            module.get_parameter(name).copy_(weight)
    return module


@pytest.mark.parametrize("name", MODULES)
def test_call_and_materialise_equal_the_module_with_its_kernels_overwritten(name: str) -> None:
    module, layout, weights, x = _make(name)
    stripped = bind.strip(module, layout)
    expected = _with_weights(module, weights)(x)
    for got in (bind.call(stripped, layout, weights, x), bind.materialise(stripped, layout, weights)(x)):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, module(x))  # the weights matter


@pytest.mark.parametrize("name", MODULES)
def test_the_callers_module_is_never_edited(name: str) -> None:
    module, layout, weights, x = _make(name)
    before = copy.deepcopy(module.state_dict())
    names = [parameter_name for parameter_name, _ in module.named_parameters()]
    stripped = bind.strip(module, layout)
    bind.call(stripped.train(), layout, weights, x)
    bind.materialise(stripped, layout, weights).requires_grad_(False).zero_grad()
    assert [parameter_name for parameter_name, _ in module.named_parameters()] == names
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert not module.training


def test_strip_keeps_what_is_learned_and_drops_every_generated_name() -> None:
    module, layout, _, _ = _make("tied")
    left = {name for name, _ in bind.strip(module, layout).named_parameters()}
    assert left == {"a.bias", "b.bias", "norm.weight", "norm.bias", "up.bias", "head.weight", "head.bias"}


def test_materialised_modules_are_ordinary_and_independent() -> None:
    module, layout, weights, x = _make("tied")
    stripped = bind.strip(module, layout)
    made = bind.materialise(stripped, layout, weights)
    assert made.state_dict().keys() == module.state_dict().keys()
    assert made.a.weight is made.b.weight and made.a.weight.is_leaf and made.a.weight.requires_grad
    fresh = MODULES["tied"]().eval()
    fresh.load_state_dict(made.state_dict())
    expected = made(x)
    torch.testing.assert_close(fresh(x), expected)
    with torch.no_grad():
        for weight in weights.values():
            weight.zero_()
        stripped.head.weight.zero_()
    assert torch.equal(made(x), expected)


def test_call_runs_other_methods() -> None:
    module, layout, weights, x = _make("tied")
    maps = bind.call(bind.strip(module, layout), layout, weights, x, method="feature_maps")
    expected = _with_weights(module, weights).feature_maps(x)
    assert [tuple(part.shape) for part in maps] == [(5, 3, 16, 16), (5, 4, 32, 32)]
    for part, reference in zip(maps, expected, strict=True):
        torch.testing.assert_close(part, reference)


def test_call_is_differentiable_in_weights_and_learned_parameters() -> None:
    module, layout, _, x = _make("tied")
    stripped = bind.strip(module, layout)
    flat = torch.randn(layout.size, generator=torch.Generator().manual_seed(1)).requires_grad_()
    bind.call(stripped, layout, layout.views(flat), x).square().sum().backward()
    assert flat.grad is not None and (flat.grad != 0).all()
    assert all(parameter.grad is not None for parameter in stripped.parameters())


def test_training_mode_updates_running_statistics_of_the_stripped_module() -> None:
    module, layout, weights, x = _make("tied")
    stripped = bind.strip(module, layout)
    before = stripped.norm.running_mean.clone()
    bind.call(stripped, layout, weights, x)
    assert torch.equal(stripped.norm.running_mean, before)
    bind.call(stripped.train(), layout, weights, x)
    assert not torch.equal(stripped.norm.running_mean, before)


@pytest.mark.parametrize("name", MODULES)
def test_several_networks_together_equal_one_at_a_time(name: str) -> None:
    module, layout, weights, x = _make(name, batch=3)
    stripped = bind.strip(module, layout)
    together = bind.call_together(stripped, layout, weights, x)
    for b in range(3):
        one = bind.call(stripped, layout, {key: weight[b] for key, weight in weights.items()}, x[b])
        torch.testing.assert_close(together[b], one, atol=1e-4, rtol=1e-4)


def test_several_networks_need_evaluation_mode() -> None:
    module, layout, weights, x = _make("tied", batch=2)
    with pytest.raises(InputError, match="eval"):
        bind.call_together(bind.strip(module, layout).train(), layout, weights, x)


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_wrong_names_are_refused(change: str) -> None:
    module, layout, weights, x = _make("tied")
    stripped = bind.strip(module, layout)
    if change == "missing":
        del weights["up.weight"]
    else:
        weights["up.other"] = weights["up.weight"]
    for use in (lambda: bind.call(stripped, layout, weights, x), lambda: bind.materialise(stripped, layout, weights)):
        with pytest.raises(InputError, match=r"up\."):
            use()
