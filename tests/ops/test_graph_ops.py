"""The ops for graphs: the meaning of each against the plainest loop, and its backends against each other."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pudnet import backends, ops
from pudnet.errors import BackendUnavailableError, ShapeError

sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))
from cases import TILES, gradients, graph_arguments, scattered, shifted, tile_arguments


def _needs(op: str, backend: str) -> None:
    reasons = backends.explain()[op][backend]
    if reasons:
        pytest.skip(f"{backend}: {reasons[0]}")


def _case(seed: int, nodes: int, width: int, kinds: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """A random graph (nodes in topological order) and random parameters."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) * 0.5

    hidden = width // 2 if kinds == 2 else width
    present = torch.rand(kinds, nodes, nodes, generator=g) < 3 / nodes
    weights = torch.rand(kinds, nodes, nodes, generator=g, dtype=torch.float64).to(dtype)
    return {
        "states": normal(nodes, width),
        "edges": (weights * present).tril(-1),
        "message_in_weight": normal(kinds, hidden, width),
        "message_in_bias": normal(kinds, hidden),
        "message_out_weight": normal(kinds, width, hidden),
        "message_out_bias": normal(kinds, width),
        "weight_ih": normal(3 * width, width),
        "weight_hh": normal(3 * width, width),
        "bias_ih": normal(3 * width),
        "bias_hh": normal(3 * width),
    }


def _levels(edges: Tensor) -> list[int]:
    """Level of each node: the longest path to it."""
    levels: list[int] = []
    for node in range(edges.shape[1]):
        sources = edges[:, node].any(dim=0).nonzero().flatten().tolist()
        levels.append(max((levels[source] + 1 for source in sources), default=0))
    return levels


def _node_by_node(case: dict[str, Tensor]) -> Tensor:
    """The oracle: one node after the other, as the released code goes."""
    cell = torch.nn.GRUCell(case["states"].shape[1], case["states"].shape[1], dtype=case["states"].dtype)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(cell, name).data = case[name]
    states = case["states"].clone()
    for node in range(len(states)):
        incoming = torch.zeros_like(states[0])
        for kind in range(len(case["edges"])):
            for source in case["edges"][kind, node].nonzero().flatten().tolist():
                inner = F.relu(case["message_in_weight"][kind] @ states[source] + case["message_in_bias"][kind])
                outer = F.relu(case["message_out_weight"][kind] @ inner + case["message_out_bias"][kind])
                incoming = incoming + case["edges"][kind, node, source] * outer
        states[node] = cell(incoming[None], states[node][None])[0].detach()
    return states


def _by_level(case: dict[str, Tensor], backend: str) -> Tensor:
    levels = _levels(case["edges"])
    order = sorted(range(len(levels)), key=lambda node: levels[node])
    sizes = [levels.count(level) for level in range(max(levels) + 1)]
    sorted_case = {**case, "states": case["states"][order], "edges": case["edges"][:, order][:, :, order]}
    result = ops.graph_recurrence(**sorted_case, level_sizes=sizes, backend=backend)
    return torch.empty_like(result).index_copy(0, torch.tensor(order), result)


@pytest.mark.parametrize("kinds", [1, 2])
def test_level_by_level_equals_node_by_node(kinds: int) -> None:
    for seed in range(100):
        case = _case(seed, nodes=1 + seed % 23, width=4, kinds=kinds)
        with torch.no_grad():
            torch.testing.assert_close(_by_level(case, "reference"), _node_by_node(case), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("nodes", "width", "kinds"), [(1, 4, 2), (9, 12, 1), (40, 32, 2), (7, 20, 2)])
@pytest.mark.parametrize("instructions", ["", "portable"])
def test_native_recurrence(
    nodes: int, width: int, kinds: int, instructions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _needs("graph_recurrence", "native")
    monkeypatch.setenv("PUDNET_INSTRUCTION_SET", instructions)
    case = _case(5, nodes, width, kinds, torch.float32)
    before = case["states"].clone()
    out = _by_level(case, "native")
    torch.testing.assert_close(out, _by_level(case, "reference"), rtol=1e-4, atol=1e-5)
    assert torch.equal(case["states"], before)


def test_gradients_of_the_recurrence() -> None:
    case = _case(3, nodes=6, width=4, kinds=2)
    names = [name for name in case if name != "edges"]
    levels = _levels(case["edges"])
    order = sorted(range(6), key=lambda node: levels[node])
    edges = case["edges"][:, order][:, :, order]
    sizes = [levels.count(level) for level in range(max(levels) + 1)]

    def run(*values: Tensor) -> Tensor:
        return ops.graph_recurrence(edges=edges, level_sizes=sizes, **dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(run, [case[name].requires_grad_() for name in names])


def test_native_refuses_what_needs_a_gradient() -> None:
    _needs("graph_recurrence", "native")
    case = _case(0, 5, 4, 1, torch.float32)
    case["weight_ih"].requires_grad_()
    with pytest.raises(BackendUnavailableError, match="gradient"):
        _by_level(case, "native")
    with torch.no_grad():
        _by_level(case, "native")


def test_recurrence_checks_shapes() -> None:
    case = _case(0, 5, 4, 1)
    with pytest.raises(ShapeError, match="level_sizes"):
        ops.graph_recurrence(**case, level_sizes=[1, 1])
    with pytest.raises(ShapeError, match="states"):
        ops.graph_recurrence(**{**case, "states": case["states"][:, :3]}, level_sizes=[5])
    with pytest.raises(ShapeError, match="edges"):
        ops.graph_recurrence(**{**case, "edges": case["edges"][:, :4]}, level_sizes=[5])


SIZES = [(8, 8), (5, 3), (16, 24), (19, 21), (8, 1), (1, 50), (1, 3), (300, 300)]


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("spatial", [1, 9, 5])
def test_tiles(backend: str, spatial: int) -> None:
    _needs("tile_weights", backend)
    g = torch.Generator().manual_seed(0)
    blocks = [torch.randn(spatial, min(o, 8), min(i, 8), generator=g) for o, i in SIZES]
    scales = [0.5 + k for k in range(len(SIZES))]
    memory = torch.full((sum(o * i for o, i in SIZES) * spatial + 1,), -7.0)
    targets, start = [], 1  # from 1 on: not aligned
    for o, i in SIZES:
        targets.append(memory[start : start + o * i * spatial])
        start += o * i * spatial
    ops.tile_weights(blocks, scales, SIZES, targets, backend=backend)
    assert memory[0] == -7
    for block, scale, (o, i), target in zip(blocks, scales, SIZES, targets, strict=True):
        a = torch.arange(o)[:, None, None] % block.shape[1]
        b = torch.arange(i)[None, :, None] % block.shape[2]
        expected = block[torch.arange(spatial)[None, None], a, b] * scale
        torch.testing.assert_close(target.view(o, i, spatial), expected, rtol=1e-6, atol=0)


def test_tiles_check_shapes() -> None:
    block = torch.zeros(1, 4, 4)
    with pytest.raises(ShapeError, match="elements"):
        ops.tile_weights([block], [1.0], [(4, 5)], [torch.zeros(16)])
    with pytest.raises(ShapeError, match="one length"):
        ops.tile_weights([block], [], [(4, 4)], [torch.zeros(16)])
    ops.tile_weights([], [], [], [])


def traverse(states: Tensor, *parameters: Tensor, edges: Tensor, backend: str | None = None) -> Tensor:
    return ops.graph_recurrence(states, edges, LEVELS, *parameters, backend=backend)


def tile(*blocks: Tensor, scales: list[float], sizes: Any, backend: str | None = None) -> Tensor:
    return torch.cat([x.flatten() for x in ops.tile_weights(blocks, scales, sizes, backend=backend)])


LEVELS = [1, 2, 1]
EDGES, TENSORS, _ = graph_arguments(LEVELS, 12, 2)
SHAPES = TILES[:4]
BLOCKS, SCALES, TILE_SIZES = tile_arguments(SHAPES)
NUMBERS = [number for size in TILE_SIZES for number in size]
OPS = {
    "graph_recurrence": (functools.partial(traverse, edges=EDGES), TENSORS),
    "tile_weights": (functools.partial(tile, scales=SCALES, sizes=TILE_SIZES), BLOCKS),
}
both_ops = pytest.mark.parametrize(("op", "tensors"), OPS.values(), ids=OPS)


@both_ops
def test_user_code_compiles_without_a_graph_break(op: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    def scaled(*arguments: Tensor) -> Tensor:
        return 2 * op(*arguments) + 1

    traced = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(traced(*tensors), scaled(*tensors))
    out, grads = gradients(scaled, tensors)
    traced_out, traced_grads = gradients(traced, tensors)
    torch.testing.assert_close(traced_out, out)
    torch.testing.assert_close(traced_grads, grads)


def test_user_code_that_writes_compiles_without_a_graph_break() -> None:
    def fill(targets: list[Tensor]) -> Tensor:
        ops.tile_weights(BLOCKS, SCALES, TILE_SIZES, targets)
        return targets[0] + 1

    expected = ops.tile_weights(BLOCKS, SCALES, TILE_SIZES, backend="reference")
    targets = [torch.zeros_like(x) for x in expected]
    out = torch.compile(fill, fullgraph=True, backend="aot_eager")(targets)
    torch.testing.assert_close(targets, expected)
    torch.testing.assert_close(out, expected[0] + 1)


@both_ops
def test_gradients_in_float64(op: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    if "edges" in op.keywords:  # type: ignore[attr-defined]
        op = functools.partial(op, edges=EDGES.double())
    assert torch.autograd.gradcheck(op, [x.double().requires_grad_() for x in tensors], fast_mode=True)


@both_ops
def test_layouts(op: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    with torch.no_grad():
        expected = op(*tensors)
        assert torch.equal(op(*tensors), expected)
        assert torch.equal(op(*(scattered(x) for x in tensors)), expected)
        assert torch.equal(op(*(shifted(x) for x in tensors)), expected)


@pytest.mark.slow
@both_ops
def test_compiled_by_name(op: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    if reasons := backends.explain()["tile_weights"]["compiled"]:
        pytest.skip("; ".join(reasons))
    out, grads = gradients(functools.partial(op, backend="compiled"), tensors)
    expected, expected_grads = gradients(functools.partial(op, backend="reference"), tensors)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grads, expected_grads, atol=1e-4, rtol=1e-4)


def test_gradients_of_native_tiles() -> None:
    _needs("tile_weights", "native")
    op, tensors = OPS["tile_weights"]
    (out, grads), (expected, expected_grads) = (
        gradients(functools.partial(op, backend=backend), tensors) for backend in ("native", "reference")
    )
    assert torch.equal(out, expected)
    torch.testing.assert_close(grads, expected_grads)


def test_native_ops_follow_their_schemas() -> None:
    _needs("tile_weights", "native")
    checks = [
        (torch.ops.pudnet.graph_recurrence_native.default, (TENSORS[0], EDGES, LEVELS, *TENSORS[1:])),
        (
            torch.ops.pudnet.tile_weights.default,
            ([x.clone().requires_grad_() for x in BLOCKS], SCALES, NUMBERS, "native"),
        ),
        (
            torch.ops.pudnet.tile_weights_out.default,
            (BLOCKS, SCALES, NUMBERS, [torch.zeros(o * i * s) for s, _, _, o, i in SHAPES], "native"),
        ),
    ]
    for op, arguments in checks:
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


def test_autograd_sees_that_targets_are_written() -> None:
    _needs("tile_weights", "native")
    (target,) = ops.tile_weights(BLOCKS[:1], SCALES[:1], TILE_SIZES[:1])
    factor = torch.ones_like(target).requires_grad_()
    product = (factor * target).sum()
    ops.tile_weights(BLOCKS[:1], SCALES[:1], TILE_SIZES[:1], [target])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_tiles_are_refused_with_reasons() -> None:
    _needs("tile_weights", "native")
    fill = functools.partial(ops.tile_weights, BLOCKS[:1], SCALES[:1], TILE_SIZES[:1], backend="native")
    size = 20 * 12 * 9
    with pytest.raises(BackendUnavailableError, match="float32 tensors on one device"):
        fill([torch.empty(size, dtype=torch.float64)])
    with pytest.raises(BackendUnavailableError, match="contiguous"):
        fill([torch.empty(2 * size)[::2]])
    with pytest.raises(BackendUnavailableError, match="no gradient through memory"):
        fill([torch.empty(size, requires_grad=True)])
    with pytest.raises(BackendUnavailableError, match="less than 2\\^31"):
        ops.tile_weights(BLOCKS[:1], SCALES[:1], [(2**16, 2**15)], backend="native")


@both_ops
def test_triton_says_why_it_does_not_run_here(
    op: Callable[..., Tensor], tensors: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailableError, match="triton: Triton") as caught:
        op(*tensors, backend="triton")
    assert "reference: can run it" in str(caught.value)


def test_the_graph_kernel_names_what_it_refuses() -> None:
    kernels = pytest.importorskip("pudnet.kernels.graph_recurrence")
    assert kernels.why_not(32, 2, 16, ("torch.float32",), False) == []
    assert "D = 128" in kernels.why_not(128, 2, 64, ("torch.float32",), False)[0]
    assert "V = 3" in kernels.why_not(32, 3, 16, ("torch.float32",), False)[0]
    assert "float64" in kernels.why_not(32, 2, 16, ("torch.float32", "torch.float64"), False)[0]
    assert "edges" in kernels.why_not(32, 2, 16, ("torch.float32",), True)[0]
