"""WeightLayout: names, shapes and places of generated weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pudnet.errors import InputError, ShapeError
from pudnet.specs import WeightLayout


class Odd(nn.Module):
    """One of everything: odd kernels, groups, depthwise, dilation, transposed, tied twice, and modules left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, (1, 5), padding=(0, 2))
        self.grouped = nn.Conv2d(6, 4, 3, groups=2, padding=1, bias=False)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, padding=2, dilation=2), nn.BatchNorm2d(4), nn.ReLU())
        self.up = nn.ConvTranspose2d(4, 10, (2, 3), stride=2, groups=2)  # stored [4, 10 / groups, 2, 3]
        self.tied = nn.Conv2d(3, 6, (1, 5), padding=(0, 2))
        self.tied.weight = self.first.weight
        self.again = self.block  # the same module under a second name
        self.line = nn.Conv1d(10, 5, 1)
        self.head = nn.Linear(5, 2)


ODD_SHAPES = {
    "first.weight": (6, 3, 1, 5),
    "grouped.weight": (4, 3, 3, 3),
    "block.0.weight": (4, 1, 3, 3),
    "up.weight": (4, 5, 2, 3),
}


@pytest.fixture
def odd() -> Odd:
    return Odd()


def test_names_and_shapes_are_those_of_the_modules_parameters(odd: Odd) -> None:
    layout = WeightLayout.from_module(odd)
    assert {entry.name: entry.shape for entry in layout.entries} == ODD_SHAPES
    parameters = dict(odd.named_parameters())
    assert all(tuple(parameters[entry.name].shape) == entry.shape for entry in layout.entries)


def test_order_is_that_of_the_modules(odd: Odd) -> None:
    names = [entry.name for entry in WeightLayout.from_module(odd).entries]
    assert names == [name for name, _ in odd.named_parameters() if name in ODD_SHAPES]


def test_offsets_leave_no_gap(odd: Odd) -> None:
    layout = WeightLayout.from_module(odd)
    offset = 0
    for entry in layout.entries:
        assert entry.offset == offset
        offset += entry.size
    assert layout.size == offset == 6 * 15 + 4 * 27 + 4 * 9 + 20 * 6
    assert layout.rows == 18 + 12 + 4 + 20
    assert layout.shapes == [size for shape in ODD_SHAPES.values() for size in shape]


def test_tied_weights_are_generated_once(odd: Odd) -> None:
    entries = {entry.name: entry for entry in WeightLayout.from_module(odd).entries}
    assert entries["first.weight"].aliases == ("tied.weight",)
    assert entries["block.0.weight"].aliases == ()  # one module under two names is one module


def test_fan_in_counts_the_inputs_of_one_output(odd: Odd) -> None:
    fan_ins = {entry.name: entry.fan_in for entry in WeightLayout.from_module(odd).entries}
    assert fan_ins["first.weight"] == 3 * 5
    assert fan_ins["grouped.weight"] == 3 * 9
    assert fan_ins["block.0.weight"] == 9
    assert fan_ins["up.weight"] == 2 * 6  # stride aside: 2 of the 4 inputs are in an output's group


def test_a_bare_convolution_is_a_module_too() -> None:
    assert [entry.name for entry in WeightLayout.from_module(nn.Conv2d(2, 3, 1)).entries] == ["weight"]


@pytest.mark.parametrize("module", [nn.Linear(3, 3), nn.Sequential(), nn.Conv1d(3, 3, 3)])
def test_a_module_without_2d_convolutions_is_refused(module: nn.Module) -> None:
    with pytest.raises(InputError, match="at least one Conv2d"):
        WeightLayout.from_module(module)


def test_kernels_that_are_computed_are_refused() -> None:
    module = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))
    with pytest.raises(InputError, match=r"0\.weight"):
        WeightLayout.from_module(module)


def test_kernels_of_unknown_shape_are_refused() -> None:
    with pytest.raises(InputError, match=r"1\.weight"):
        WeightLayout.from_module(nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyConv2d(4, 3)))


@pytest.mark.parametrize("leading", [(), (3,), (0,)])
def test_views_and_flatten_are_inverse(odd: Odd, leading: tuple[int, ...]) -> None:
    layout = WeightLayout.from_module(odd)
    flat = torch.randn(*leading, layout.size, generator=torch.Generator().manual_seed(0))
    views = layout.views(flat)
    assert {name: tuple(view.shape) for name, view in views.items()} == {
        name: (*leading, *shape) for name, shape in ODD_SHAPES.items()
    }
    assert torch.equal(layout.flatten(views), flat)


def test_views_share_memory_in_channels_last_order() -> None:
    layout = WeightLayout.from_module(nn.Sequential(nn.Conv2d(3, 2, (2, 1)), nn.Conv2d(2, 5, 1)))
    flat = torch.arange(float(layout.size))
    weight = layout.views(flat)["0.weight"]
    assert weight.data_ptr() == flat.data_ptr()
    for o in range(2):
        for i in range(3):
            for k in range(2):
                assert weight[o, i, k, 0] == o * 6 + k * 3 + i
    assert layout.views(flat)["1.weight"][0, 0, 0, 0] == 12


def test_views_of_a_wrong_length_are_refused() -> None:
    layout = WeightLayout.from_module(nn.Conv2d(3, 2, 3))
    with pytest.raises(ShapeError, match="54"):
        layout.views(torch.zeros(2, 53))
