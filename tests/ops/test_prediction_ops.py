"""``generate_weights`` and ``layer_recurrence``: bad input, refusals, user code under torch.compile, gradients."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pudnet import backends, ops
from pudnet.errors import BackendUnavailableError, DtypeError, ShapeError

sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))
from cases import generator_arguments, gradients, recurrence_arguments

SHAPES = [6, 3, 3, 3, 4, 6, 1, 1]


def generate(*tensors: Tensor, backend: str | None = None) -> Tensor:
    return ops.generate_weights(*tensors, SHAPES, backend=backend)


def walk(*tensors: Tensor, backend: str | None = None) -> Tensor:
    return ops.layer_recurrence(*tensors, alpha=0.1, normalise_state=True, backend=backend)


CASES = [(generate, generator_arguments(SHAPES, 2, 16, 4)), (walk, recurrence_arguments(2, 3, 16))]


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize(("op", "tensors"), CASES, ids=["generate_weights", "layer_recurrence"])
def test_user_code_compiles_without_a_graph_break(
    op: Callable[..., Tensor], tensors: list[Tensor], backend: str | None
) -> None:
    def scaled(*arguments: Tensor) -> Tensor:
        return 2 * op(*arguments, backend=backend) + 1

    out, grads = gradients(scaled, tensors)
    traced, traced_grads = gradients(torch.compile(scaled, fullgraph=True, backend="aot_eager"), tensors)
    torch.testing.assert_close(traced, out)
    torch.testing.assert_close(traced_grads, grads)


@pytest.mark.parametrize(("op", "tensors"), CASES, ids=["generate_weights", "layer_recurrence"])
def test_gradients_in_float64(op: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    leaves = [x.double().requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(op, leaves, fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize(("op", "tensors"), CASES, ids=["generate_weights", "layer_recurrence"])
def test_compiled_by_name(op: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    if reasons := backends.explain()["generate_weights" if op is generate else "layer_recurrence"]["compiled"]:
        pytest.skip("; ".join(reasons))
    out, grads = gradients(lambda *a: op(*a, backend="compiled"), tensors)
    expected, expected_grads = gradients(lambda *a: op(*a, backend="reference"), tensors)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grads, expected_grads, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("op", "tensors"), CASES, ids=["generate_weights", "layer_recurrence"])
def test_every_tensor_that_does_not_fit_is_refused(op: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    for i, x in enumerate(tensors):
        wrong = [*tensors]
        wrong[i] = torch.cat([x, x], dim=-1)
        with pytest.raises(ShapeError, match="must be"):
            op(*wrong)


def test_shapes_and_dtype_are_checked() -> None:
    tensors = CASES[0][1]
    with pytest.raises(ShapeError, match="shapes must be"):
        ops.generate_weights(*tensors, SHAPES[:5])
    with pytest.raises(ShapeError, match="row_weight must be"):
        ops.generate_weights(*tensors, [6, 4, *SHAPES[2:]])
    with pytest.raises(DtypeError, match="floating-point"):
        ops.generate_weights(*tensors, SHAPES, dtype=torch.int32)
    for place, name in enumerate(("codes", "fc_weight", "fc_bias", "mix_weight", "mix_bias", "row_weight", "row_bias")):
        for dtype in (torch.complex64, torch.int64):  # a cast to the codes' dtype would drop what they say
            wrong = [*tensors]
            wrong[place] = wrong[place].to(dtype)
            with pytest.raises(DtypeError, match=name):
                ops.generate_weights(*wrong, SHAPES)
    d_weights = torch.zeros_like(ops.generate_weights(*tensors, SHAPES)).to(torch.complex64)
    with pytest.raises(DtypeError, match="d_weights must be of a floating-point type"):
        torch.ops.pudnet.generate_weights_backward(d_weights, *tensors, SHAPES, "native")


def test_low_precision_parameters_are_taken_in_the_dtype_of_the_codes() -> None:
    tensors = CASES[0][1]
    low = [tensors[0], *(x.bfloat16() for x in tensors[1:])]
    expected = generate(low[0], *(x.float() for x in low[1:]), backend="reference")
    assert torch.equal(generate(*low, backend="reference"), expected)
    out = ops.generate_weights(*low, SHAPES, dtype=torch.bfloat16, backend="reference")
    assert torch.equal(out, expected.bfloat16())


@pytest.mark.parametrize(("op", "tensors"), CASES, ids=["generate_weights", "layer_recurrence"])
def test_triton_says_why_it_does_not_run_here(
    op: Callable[..., Tensor], tensors: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailableError, match="triton: Triton") as caught:
        op(*tensors, backend="triton")
    assert "reference: can run it" in str(caught.value)


def test_the_recurrence_kernel_names_what_it_refuses() -> None:
    kernels = pytest.importorskip("pudnet.kernels.layer_recurrence")
    assert kernels.why_not(128, 2, ("torch.float32", "torch.bfloat16"), 132) == []
    assert "2 GRU layers" in kernels.why_not(128, 3, ("torch.float32",), 132)[0]
    assert "float64" in kernels.why_not(128, 2, ("torch.float64",), 132)[0]
    assert "512" in kernels.why_not(512, 2, ("torch.float32",), 200)[0]
    assert "multiprocessors" in kernels.why_not(256, 2, ("torch.float32",), 14)[0]
