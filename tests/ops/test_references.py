"""The references against torch's own layers, step by step, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet import ops
from pudnet.errors import ShapeError
from pudnet.nn.generators import WeightGenerators
from pudnet.nn.recurrence import LayerRecurrence
from pudnet.ops import reference
from pudnet.specs import WeightLayout


def _recurrence_arguments(num_layers: int, layers: int, width: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) * 0.5

    return [
        random(width),
        *(random(layers, 3 * width, width) for _ in range(2)),
        *(random(layers, 3 * width) for _ in range(2)),
        random(width, width),
        random(width),
        *(random(width) for _ in range(2)),
        *(random(num_layers, width) for _ in range(2)),
    ]


def _recurrence_oracle(state: Tensor, arguments: list[Tensor], alpha: float, normalise_state: bool) -> Tensor:
    """The published unit from torch's modules, one dataset and one step at a time."""
    start, w_ih, w_hh, b_ih, b_hh, w_out, b_out, state_w, state_b, code_w, code_b = arguments
    _, layers, width = state.shape
    gru = nn.GRU(width, width, num_layers=layers).double()
    for g in range(layers):
        for name, values in (("weight_ih", w_ih), ("weight_hh", w_hh), ("bias_ih", b_ih), ("bias_hh", b_hh)):
            getattr(gru, f"{name}_l{g}").data.copy_(values[g])
    batch = []
    for h0 in state:
        e, h, codes = start.view(1, 1, width), h0[:, None].contiguous(), []
        for t in range(len(code_w)):
            out, h = gru(e, h)
            e = torch.relu(out @ w_out.t() + b_out)
            if normalise_state:
                h = F.layer_norm(h, (width,), state_w, state_b)
            code = (1 - alpha) * e[0, 0] + alpha * h0.mean(dim=0)
            codes.append(F.layer_norm(code, (width,), code_w[t], code_b[t]))
        batch.append(torch.stack(codes))
    return torch.stack(batch).detach()


@pytest.mark.parametrize(("num_layers", "layers", "width", "batch"), [(5, 2, 7, 3), (1, 1, 4, 1), (4, 3, 6, 2)])
@pytest.mark.parametrize(("alpha", "normalise_state"), [(0.1, True), (0.0, False), (0.7, True)])
def test_layer_recurrence_equals_torchs_gru(
    num_layers: int, layers: int, width: int, batch: int, alpha: float, normalise_state: bool
) -> None:
    arguments = _recurrence_arguments(num_layers, layers, width)
    state = torch.randn(batch, layers, width, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    got = reference.layer_recurrence(state, *arguments, alpha, normalise_state)
    assert got.shape == (batch, num_layers, width)
    torch.testing.assert_close(got, _recurrence_oracle(state, arguments, alpha, normalise_state))


@pytest.mark.parametrize("normalise_state", [True, False])
def test_layer_recurrence_gradients(normalise_state: bool) -> None:
    inputs = [part.requires_grad_() for part in _recurrence_arguments(2, 2, 3)]
    state = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *parts: reference.layer_recurrence(*parts, 0.3, normalise_state), [state, *inputs], fast_mode=True
    )


def test_plain_gru_ignores_alpha_and_the_state_norm() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = LayerRecurrence(4, 2, 6, "gru", 0.5).double()
        state = torch.randn(2, 2, 6, dtype=torch.float64)
    arguments = list(plain.parameters())
    torch.testing.assert_close(plain(state), _recurrence_oracle(state, arguments, 0.0, False))


SHAPES = [(4, 3, 3, 3), (5, 4, 1, 1), (2, 1, 1, 5), (6, 2, 2, 3)]


def _generator_arguments(hidden: int, width: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) * 0.5

    fc = sum(hidden * kh * kw for _, _, kh, kw in SHAPES)
    rows = sum(o * i for o, i, _, _ in SHAPES)
    n = len(SHAPES)
    return [
        random(fc, width),
        random(fc),
        random(n, 2 * hidden, hidden),
        random(n, 2 * hidden),
        random(rows, 2 * hidden),
        random(rows),
    ]


def _generator_oracle(codes: Tensor, arguments: list[Tensor], hidden: int) -> list[Tensor]:
    """One nn.Linear and two 1x1 nn.Conv2d per layer, as published: L kernels ``[B, O, I, kH, kW]``."""
    fc_w, fc_b, mix_w, mix_b, row_w, row_b = arguments
    kernels, fc_start, row_start = [], 0, 0
    for t, (o, i, kh, kw) in enumerate(SHAPES):
        fc_stop, row_stop = fc_start + hidden * kh * kw, row_start + o * i
        fc = nn.Linear(codes.shape[-1], hidden * kh * kw).double()
        mix, rows = nn.Conv2d(hidden, 2 * hidden, 1).double(), nn.Conv2d(2 * hidden, o * i, 1).double()
        fc.weight.data, fc.bias.data = fc_w[fc_start:fc_stop], fc_b[fc_start:fc_stop]
        mix.weight.data, mix.bias.data = mix_w[t, :, :, None, None], mix_b[t]
        rows.weight.data, rows.bias.data = row_w[row_start:row_stop, :, None, None], row_b[row_start:row_stop]
        feature = F.gelu(fc(codes[:, t])).view(len(codes), hidden, kh, kw)
        kernels.append(rows(F.gelu(mix(feature))).view(len(codes), o, i, kh, kw).detach())
        fc_start, row_start = fc_stop, row_stop
    return kernels


@pytest.mark.parametrize("batch", [1, 3])
def test_generate_weights_equals_torchs_layers(batch: int) -> None:
    module = nn.Sequential(*(nn.Conv2d(i, o, (kh, kw)) for o, i, kh, kw in SHAPES))
    layout = WeightLayout.from_module(module)
    arguments = _generator_arguments(hidden=3, width=7)
    codes = torch.randn(batch, 4, 7, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    flat = reference.generate_weights(codes, *arguments, [size for shape in SHAPES for size in shape])
    for got, expected in zip(layout.views(flat).values(), _generator_oracle(codes, arguments, 3), strict=True):
        torch.testing.assert_close(got, expected)


def test_generate_weights_gradients() -> None:
    inputs = [part.requires_grad_() for part in _generator_arguments(hidden=2, width=3)]
    codes = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64, requires_grad=True)
    shapes = [size for shape in SHAPES for size in shape]
    assert torch.autograd.gradcheck(
        lambda *parts: reference.generate_weights(*parts, shapes), [codes, *inputs], fast_mode=True
    )


def test_ops_equal_their_references() -> None:
    arguments = [part.float() for part in _generator_arguments(hidden=3, width=7)]
    codes = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(9))
    shapes = [size for shape in SHAPES for size in shape]
    torch.testing.assert_close(
        ops.generate_weights(codes, *arguments, shapes), reference.generate_weights(codes, *arguments, shapes)
    )
    arguments = [part.float() for part in _recurrence_arguments(5, 2, 7)]
    state = torch.randn(3, 2, 7, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(
        ops.layer_recurrence(state, *arguments, alpha=0.1, normalise_state=True),
        reference.layer_recurrence(state, *arguments, 0.1, True),
    )


@pytest.mark.parametrize("shape", [(2, 7), (2, 3, 7), (2, 4, 8)])
def test_generate_weights_refuses_codes_that_do_not_fit(shape: tuple[int, ...]) -> None:
    arguments = [part.float() for part in _generator_arguments(hidden=3, width=7)]
    with pytest.raises(ShapeError, match="codes"):
        ops.generate_weights(torch.zeros(shape), *arguments, [size for s in SHAPES for size in s])


@pytest.mark.parametrize("shape", [(2, 7), (2, 3, 7), (2, 2, 8)])
def test_layer_recurrence_refuses_a_state_that_does_not_fit(shape: tuple[int, ...]) -> None:
    arguments = [part.float() for part in _recurrence_arguments(5, 2, 7)]
    with pytest.raises(ShapeError, match="state"):
        ops.layer_recurrence(torch.zeros(shape), *arguments, alpha=0.1, normalise_state=True)


def test_generators_start_with_variance_two_over_fan_in() -> None:
    """For the codes they were scaled by, exactly; no kernel is generated to find out."""
    module = nn.Sequential(nn.Conv2d(3, 8, 5), nn.Conv2d(8, 4, 1), nn.ConvTranspose2d(4, 6, 3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generators = WeightGenerators(WeightLayout.from_module(module), 16, 4)
        codes = torch.randn(10, 3, 16)
    generators.scale_to_fan_in(codes)
    for entry, weight in zip(
        generators.layout.entries, generators.layout.views(generators(codes)).values(), strict=True
    ):
        assert weight.square().mean().item() == pytest.approx(2 / entry.fan_in, rel=1e-4)
