"""Native ``generate_weights`` and ``layer_recurrence`` on the CPU: against the reference and against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pudnet import _extension, backends, ops
from pudnet.errors import BackendUnavailableError, DtypeError, InputError, ShapeError
from pudnet.ops import _native_generation as native
from pudnet.ops import reference

pytestmark = pytest.mark.skipif(bool(_extension.why_not()), reason="; ".join(_extension.why_not()))

# O, I, kH, kW: odd sizes, rows that do not fill a tile, whole tiles, more positions than registers.
SHAPES = [5, 3, 3, 3, 7, 16, 1, 1, 4, 32, 7, 7, 2, 5, 2, 3, 33, 48, 3, 3, 16, 24, 3, 3]
SETS = ["avx512", "avx2", "portable"]


def make(
    batch: int, shapes: list[int] = SHAPES, width: int = 20, hidden: int = 8, seed: int = 0
) -> tuple[list[Tensor], list[int]]:
    """Codes and parameters of a generator."""
    generator = torch.Generator().manual_seed(seed)
    layers = len(shapes) // 4
    spatial = sum(a * b for a, b in zip(shapes[2::4], shapes[3::4], strict=True))
    rows = sum(a * b for a, b in zip(shapes[0::4], shapes[1::4], strict=True))
    sizes = [(batch, layers, width), (hidden * spatial, width), (hidden * spatial,), (layers, 2 * hidden, hidden),
             (layers, 2 * hidden), (rows, 2 * hidden), (rows,)]  # fmt: skip
    return [torch.randn(size, generator=generator) for size in sizes], shapes


def truth(tensors: list[Tensor], shapes: list[int]) -> Tensor:
    return reference.generate_weights(*(x.double() for x in tensors), shapes)


def error(found: Tensor, expected: Tensor) -> float:
    """Largest deviation relative to the largest value."""
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PUDNET_INSTRUCTION_SET", request.param)
    tensors, shapes = make(1, [1, 1, 1, 1])
    try:
        ops.generate_weights(*tensors, shapes, backend="native")
    except InputError as refusal:
        pytest.skip(str(refusal))
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("hidden", [8, 3])  # 2h = 16 is the vector code's usual case
def test_agrees_with_float64(instruction_set: str, batch: int, hidden: int) -> None:
    tensors, shapes = make(batch, hidden=hidden)
    expected = truth(tensors, shapes)
    assert error(ops.generate_weights(*tensors, shapes, backend="native"), expected) < 1e-6
    codes, *maps, row_weight, row_bias = tensors
    packed = native.pack_rows(row_weight, row_bias, shapes)
    assert error(native.generate(codes, *maps, packed, shapes), expected) < 1e-6


def test_many_datasets_are_those_of_one_each() -> None:
    tensors, shapes = make(64)
    together = ops.generate_weights(*tensors, shapes, backend="native")
    alone = [ops.generate_weights(tensors[0][b : b + 1], *tensors[1:], shapes, backend="native") for b in (0, 31, 63)]
    assert torch.equal(together[[0, 31, 63]], torch.cat(alone))
    assert error(together, truth(tensors, shapes)) < 1e-6
    assert ops.generate_weights(tensors[0][:0], *tensors[1:], shapes, backend="native").shape == (0, together.shape[1])


def test_streamed_past_the_caches() -> None:
    tensors, shapes = make(1, [512, 512, 3, 3], width=8)  # 9 MB
    assert error(ops.generate_weights(*tensors, shapes, backend="native"), truth(tensors, shapes)) < 1e-6
    several, shapes = make(3, [300, 260, 3, 3, 64, 64, 3, 3], width=8)  # as large; rows of the result not aligned
    assert error(ops.generate_weights(*several, shapes, backend="native"), truth(several, shapes)) < 1e-6


@pytest.mark.parametrize("hidden", [8, 3])
def test_bfloat16_rows_and_weights(instruction_set: str, hidden: int) -> None:
    (codes, *maps, row_weight, row_bias), shapes = make(2, hidden=hidden)
    rounded = [row_weight.bfloat16(), row_bias.bfloat16()]
    expected = truth([codes, *maps, *rounded], shapes)
    packed = native.pack_rows(row_weight, row_bias, shapes, torch.bfloat16)
    assert error(native.generate(codes, *maps, packed, shapes), expected) < 1e-6  # the only rounding is the rows'
    assert error(ops.generate_weights(codes, *maps, *rounded, shapes, backend="native"), expected) < 1e-6
    found = ops.generate_weights(codes, *maps, *rounded, shapes, dtype=torch.bfloat16, backend="native")
    exact = ops.generate_weights(codes, *maps, *rounded, shapes, backend="native")
    assert torch.equal(found, exact.bfloat16())  # rounded as PyTorch rounds


def test_bfloat16_keeps_nan_and_infinity() -> None:
    (codes, *maps, row_weight, row_bias), shapes = make(1)
    row_bias[0], row_bias[1] = float("nan"), float("inf")
    found = ops.generate_weights(codes, *maps, row_weight, row_bias, shapes, dtype=torch.bfloat16, backend="native")
    exact = ops.generate_weights(codes, *maps, row_weight, row_bias, shapes, backend="native")
    assert torch.equal(found.isnan(), exact.isnan()) and exact.isnan().sum() == 9
    assert torch.equal(found.isinf(), exact.isinf()) and exact.isinf().sum() == 9


def test_inputs_may_be_strided_and_offset() -> None:
    tensors, shapes = make(3)
    expected = ops.generate_weights(*tensors, shapes, backend="native")
    strided = [torch.empty(*x.shape, 2)[..., 0].copy_(x) for x in tensors]
    offset = [torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x) for x in tensors]
    permuted = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in tensors]
    for variant in (strided, offset, permuted):
        assert torch.equal(ops.generate_weights(*variant, shapes, backend="native"), expected)


def test_writes_where_told_and_only_there() -> None:
    (codes, *maps, row_weight, row_bias), shapes = make(2)
    rows = native.pack_rows(row_weight, row_bias, shapes)
    expected = native.generate(codes, *maps, rows, shapes)
    guarded = torch.full((4, expected.shape[1]), 7.0)
    result = native.generate(codes, *maps, rows, shapes, out=guarded[1:3])
    assert result.data_ptr() == guarded[1].data_ptr()
    assert torch.equal(guarded[1:3], expected) and (guarded[[0, 3]] == 7).all()
    with pytest.raises(ShapeError, match="out must be contiguous"):
        native.generate(codes, *maps, rows, shapes, out=guarded)
    with pytest.raises(DtypeError, match="float16"):
        native.generate(codes, *maps, rows, shapes, out=guarded[1:3].half())


def test_inputs_are_not_modified_and_runs_are_bit_equal(threads: None) -> None:
    tensors, shapes = make(3)
    before = [x.clone() for x in tensors]
    first = ops.generate_weights(*tensors, shapes, backend="native")
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        assert torch.equal(ops.generate_weights(*tensors, shapes, backend="native"), first)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_gradients_are_those_of_the_reference() -> None:
    tensors, shapes = make(3, SHAPES[:16])
    weight = torch.randn(3, native.flat_size(shapes), generator=torch.Generator().manual_seed(1))
    gradients = {}
    for backend in ("native", "reference"):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = ops.generate_weights(*leaves, shapes, backend=backend)
        gradients[backend] = torch.autograd.grad((out * weight).sum(), leaves)
    for found, expected in zip(gradients["native"], gradients["reference"], strict=True):
        assert error(found, expected) < 2e-6


def test_gradients_of_bfloat16_rows_are_bfloat16() -> None:
    (codes, *maps, row_weight, row_bias), shapes = make(1, SHAPES[:8])
    leaf = row_weight.bfloat16().requires_grad_()
    ops.generate_weights(codes, *maps, leaf, row_bias.bfloat16(), shapes, backend="native").sum().backward()
    assert leaf.grad is not None and leaf.grad.dtype == torch.bfloat16 and leaf.grad.abs().sum() > 0


def test_operator_is_registered_right() -> None:
    tensors, shapes = make(2, [5, 3, 3, 3, 7, 16, 1, 1])
    leaves = [x.requires_grad_() for x in tensors]
    torch.library.opcheck(torch.ops.pudnet.generate_weights.default, (*leaves, shapes, torch.float32, "native"))


def test_refusals_say_why() -> None:
    tensors, shapes = make(1, SHAPES[:4])
    with pytest.raises(BackendUnavailableError, match=r"native: .*float32 codes; got torch\.float64"):
        ops.generate_weights(*(x.double() for x in tensors), shapes, backend="native")
    automatic = ops.generate_weights(*(x.double() for x in tensors), shapes)  # the reference takes over
    assert torch.equal(automatic, truth(tensors, shapes))


def test_an_instruction_set_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUDNET_INSTRUCTION_SET", "avx1024")
    tensors, shapes = make(1, SHAPES[:4])
    with pytest.raises(InputError, match=r"portable.*got 'avx1024'"):
        ops.generate_weights(*tensors, shapes, backend="native")
    monkeypatch.delenv("PUDNET_INSTRUCTION_SET")
    with pytest.raises(DtypeError, match=r"pack_rows: dtype must be torch\.float32 or torch\.bfloat16"):
        native.pack_rows(*tensors[5:], shapes, torch.float16)


def recurrence_inputs(batch: int, steps: int, width: int, layers: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    gates = (layers, 3 * width)
    sizes = [(batch, layers, width), (width,), (*gates, width), (*gates, width), gates, gates, (width, width), (width,),
             (width,), (width,), (steps, width), (steps, width)]  # fmt: skip
    return [torch.randn(size, generator=generator) / (width**0.5 if len(size) > 1 else 1) for size in sizes]


@pytest.mark.parametrize("normalise_state", [True, False])
@pytest.mark.parametrize(
    ("batch", "steps", "width", "layers"),
    [(1, 20, 128, 2), (3, 1, 7, 1), (11, 2, 17, 2), (12, 60, 16, 2), (64, 3, 33, 3), (77, 2, 9, 1)],
)
def test_recurrence_agrees_with_float64(
    instruction_set: str, batch: int, steps: int, width: int, layers: int, normalise_state: bool, threads: None
) -> None:
    tensors = recurrence_inputs(batch, steps, width, layers)
    options = {"alpha": 0.1, "normalise_state": normalise_state}
    expected = reference.layer_recurrence(*(x.double() for x in tensors), *options.values())
    found = ops.layer_recurrence(*tensors, **options, backend="native")
    assert error(found, expected) < 1e-5
    torch.set_num_threads(2)
    assert torch.equal(ops.layer_recurrence(*tensors, **options, backend="native"), found)
    # Other datasets make no difference, but that twelve and more are worked on in another order.
    few = 12 if batch >= 12 else 1
    some = ops.layer_recurrence(tensors[0][-few:], *tensors[1:], **options, backend="native")
    assert torch.equal(found[-few:], some)


def test_recurrence_with_large_values_stays_finite() -> None:
    tensors = recurrence_inputs(1, 4, 16, 2)
    tensors[4] = tensors[4] * 1e4  # gates far outside what e^x can hold
    found = ops.layer_recurrence(*tensors, alpha=0.1, normalise_state=True, backend="native")
    expected = reference.layer_recurrence(*(x.double() for x in tensors), 0.1, True)
    assert error(found, expected) < 1e-5


def test_recurrence_with_gradient_goes_to_another_backend() -> None:
    tensors = recurrence_inputs(1, 2, 8, 1)
    tensors[1].requires_grad_()
    with pytest.raises(BackendUnavailableError, match="has no gradient"):
        ops.layer_recurrence(*tensors, alpha=0.1, normalise_state=True, backend="native")
    ops.layer_recurrence(*tensors, alpha=0.1, normalise_state=True).sum().backward()
    assert tensors[1].grad is not None
    with torch.no_grad():
        ops.layer_recurrence(*tensors, alpha=0.1, normalise_state=True, backend="native")
    torch.library.opcheck(torch.ops.pudnet.layer_recurrence_native.default, (*(x.detach() for x in tensors), 0.1, True))


def test_native_is_offered_for_cpu_tensors() -> None:
    answers = backends.explain("cpu")
    assert answers["generate_weights"]["native"] == [] and answers["layer_recurrence"]["native"] == []
