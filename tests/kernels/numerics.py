"""The Triton kernels against the reference in float64: in the interpreter where TRITON_INTERPRET=1, else on the GPU.

Not collected by itself: tests/kernels/test_kernels.py runs it in a process of its own, because Triton reads the
variable once.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    TILES,
    error,
    generator_arguments,
    gradients,
    graph_arguments,
    recurrence_arguments,
    scattered,
    shifted,
    tile_arguments,
)
from torch import Tensor

from pudnet import ops
from pudnet.kernels import graph_recurrence as graph_kernels
from pudnet.kernels import layer_recurrence as recurrence_kernels
from pudnet.ops import reference

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRET else "cuda"
MIXED = [8, 3, 3, 3, 8, 8, 3, 3, 5, 8, 1, 1, 4, 4, 7, 7]  # I = 3, and offsets that are no multiples of 4 after it
ALIGNED = [20, 12, 2, 3, 20, 16, 2, 2, 8, 16, 1, 1]  # 16-byte stores; more than one tile; a tile that is not full
PLAIN = [8, 4, 1, 2, 4, 8, 1, 1]


def generate(*tensors: Tensor, shapes: list[int], backend: str = "triton", **options: Any) -> Tensor:
    return ops.generate_weights(*tensors, shapes, backend=backend, **options)


def walk(*tensors: Tensor, backend: str = "triton", normalise_state: bool = True) -> Tensor:
    return ops.layer_recurrence(*tensors, alpha=0.1, normalise_state=normalise_state, backend=backend)


def traverse(states: Tensor, *parameters: Tensor, edges: Tensor, sizes: list[int], backend: str = "triton") -> Tensor:
    return ops.graph_recurrence(states, edges, sizes, *parameters, backend=backend)


def graph(level_sizes: list[int], width: int, kinds: int) -> tuple[Callable[..., Tensor], list[Tensor], Tensor]:
    """(the op as a function of all tensors but the edges, these tensors, the edges)."""
    edges, tensors, sizes = graph_arguments(level_sizes, width, kinds)
    edges = edges.to(DEVICE)
    return functools.partial(traverse, edges=edges, sizes=sizes), [x.to(DEVICE) for x in tensors], edges


def tile(*blocks: Tensor, scales: list[float], sizes: Any, backend: str = "triton") -> Tensor:
    return torch.cat([x.flatten() for x in ops.tile_weights(blocks, scales, sizes, backend=backend)])


def tiling(shapes: Any = TILES) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """(the op as a function of the blocks, these)."""
    blocks, scales, sizes = tile_arguments(shapes)
    return functools.partial(tile, scales=scales, sizes=sizes), [x.to(DEVICE) for x in blocks]


@pytest.mark.parametrize(
    ("shapes", "batch", "width", "hidden"),
    [(MIXED, 1, 32, 8), (ALIGNED, 3, 48, 8), (PLAIN, 64, 16, 4), ([7, 3, 1, 1], 2, 16, 12)],
)
def test_generate_weights(shapes: list[int], batch: int, width: int, hidden: int) -> None:
    tensors = [x.to(DEVICE) for x in generator_arguments(shapes, batch, width, hidden)]
    d_out = torch.randn(batch, reference.generate_weights(*tensors, shapes).shape[1])
    out, grads = gradients(lambda *a: generate(*a, shapes=shapes), tensors, d_out)
    doubles = [x.double() for x in tensors]
    expected, expected_grads = gradients(lambda *a: reference.generate_weights(*a, shapes), doubles, d_out)
    assert out.dtype == torch.float32 and out.is_contiguous()
    assert error(out, expected) < 1e-6
    for got, want in zip(grads, expected_grads, strict=True):
        assert error(got, want) < 2e-6


def test_two_runs_are_equal_to_the_bit() -> None:
    tensors = [x.to(DEVICE) for x in generator_arguments(ALIGNED, 2, 16, 8)]
    (out, grads), (again, grads_again) = (gradients(lambda *a: generate(*a, shapes=ALIGNED), tensors) for _ in range(2))
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))
    tensors = [x.to(DEVICE) for x in recurrence_arguments(2, 4, 32)]
    traversal, graph_tensors, _ = graph([1, 2, 3], 16, 2)
    for op, arguments in ((walk, tensors), (traversal, graph_tensors), tiling(TILES[:4])):
        (out, grads), (again, grads_again) = (gradients(op, arguments) for _ in range(2))
        assert torch.equal(out, again)
        assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_weights_from_bfloat16_rows(dtype: torch.dtype) -> None:
    tensors = [x.to(DEVICE) for x in generator_arguments(ALIGNED, 2, 16, 8)]
    tensors[5], tensors[6] = tensors[5].bfloat16(), tensors[6].bfloat16()
    out, grads = gradients(lambda *a: generate(*a, shapes=ALIGNED, dtype=dtype), tensors)
    expected, expected_grads = gradients(
        lambda *a: reference.generate_weights(*a, ALIGNED), [x.double() for x in tensors]
    )
    assert out.dtype == dtype
    assert error(out, expected) < (2e-5 if dtype == torch.float32 else 2**-7)  # the interpreter truncates bfloat16
    for got, want, x in zip(grads, expected_grads, tensors, strict=True):
        assert got.dtype == x.dtype
        assert error(got, want) < (2e-5 if dtype == torch.float32 == x.dtype else 2**-7)


def test_generate_weights_takes_any_strides() -> None:
    tensors = [x.to(DEVICE) for x in generator_arguments(ALIGNED, 2, 16, 8)]
    expected = generate(*tensors, shapes=ALIGNED)
    assert torch.equal(generate(*(scattered(x) for x in tensors), shapes=ALIGNED), expected)
    assert torch.equal(generate(*(shifted(x) for x in tensors), shapes=ALIGNED), expected)
    d_out = torch.randn(2, expected.shape[1]).to(DEVICE)
    _, grads = gradients(lambda *a: generate(*a, shapes=ALIGNED), tensors, d_out)
    _, grads_again = gradients(lambda *a: generate(*a, shapes=ALIGNED), tensors, scattered(d_out))
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))


def test_a_dataset_does_not_depend_on_its_batch() -> None:
    # To the bit on a GPU; the interpreter multiplies with NumPy, where the order of a sum depends on the shapes.
    tolerance = 0.0 if torch.device(DEVICE).type == "cuda" else 2e-6
    tensors = [x.to(DEVICE) for x in generator_arguments(MIXED, 5, 16, 8)]
    together, alone = generate(*tensors, shapes=MIXED), generate(tensors[0][3:4], *tensors[1:], shapes=MIXED)
    torch.testing.assert_close(alone, together[3:4], rtol=0.0, atol=tolerance)
    tensors = [x.to(DEVICE) for x in recurrence_arguments(3, 4, 16)]
    torch.testing.assert_close(walk(tensors[0][2:], *tensors[1:]), walk(*tensors)[2:], rtol=0.0, atol=tolerance)


@pytest.mark.parametrize(
    ("batch", "steps", "width", "normalise_state"),
    [(1, 60, 16, True), (64, 1, 16, True), (2, 3, 128, True), (2, 5, 48, False), (1, 2, 144, True)],
)
def test_layer_recurrence(batch: int, steps: int, width: int, normalise_state: bool) -> None:
    tensors = [x.to(DEVICE) for x in recurrence_arguments(batch, steps, width)]
    out, grads = gradients(lambda *a: walk(*a, normalise_state=normalise_state), tensors)
    doubles = [x.double() for x in tensors]
    expected, expected_grads = gradients(lambda *a: reference.layer_recurrence(*a, 0.1, normalise_state), doubles)
    assert error(out, expected) < 5e-6
    for got, want in zip(grads, expected_grads, strict=True):
        if want is None or not want.any():  # one step never uses the normalised state: its gradient is exactly zero
            assert not got.any()
        else:
            assert error(got, want) < 2e-5


def test_layer_recurrence_takes_bfloat16_and_any_strides() -> None:
    tensors = [x.to(DEVICE) for x in recurrence_arguments(2, 3, 32)]
    expected = walk(*tensors)
    assert torch.equal(walk(*(scattered(x) for x in tensors)), expected)
    assert torch.equal(walk(*(shifted(x) for x in tensors)), expected)
    tensors[1:] = [x.bfloat16() for x in tensors[1:]]
    assert error(walk(*tensors), reference.layer_recurrence(*(x.double() for x in tensors), 0.1, True)) < 5e-6


def test_without_gradients_nothing_is_kept() -> None:
    tensors = [x.to(DEVICE) for x in recurrence_arguments(1, 2, 16)]
    codes, saved, saved_e = torch.ops.pudnet.layer_recurrence(*tensors, 0.1, True, False)
    assert saved.numel() == saved_e.numel() == 0
    assert torch.equal(codes, torch.ops.pudnet.layer_recurrence(*tensors, 0.1, True, True)[0])


@pytest.mark.parametrize(
    ("level_sizes", "width", "kinds"),
    [([1], 16, 2), ([1, 2, 1, 3, 1], 20, 2), ([2, 1, 1, 1], 32, 1), ([3, 5, 4], 12, 2), ([1, 2, 2], 64, 2)],
)
def test_graph_recurrence(level_sizes: list[int], width: int, kinds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRET:  # several blocks of messages, in a graph small enough for the interpreter
        monkeypatch.setattr(graph_kernels, "WORDS_PER_BLOCK", 128)
    traversal, tensors, edges = graph(level_sizes, width, kinds)
    out, grads = gradients(traversal, tensors)
    exact = functools.partial(traverse, edges=edges.double(), sizes=level_sizes, backend="reference")
    expected, expected_grads = gradients(exact, [x.double() for x in tensors])
    assert error(out, expected) < 2e-6
    for got, want in zip(grads, expected_grads, strict=True):
        if want is None:  # a single level sends no messages
            assert not got.any()
        else:
            assert error(got, want) < 5e-6


def test_graph_recurrence_takes_any_strides_and_keeps_nothing_without_gradients() -> None:
    traversal, tensors, edges = graph([2, 1, 2], 16, 2)
    expected = traversal(*tensors)
    assert torch.equal(traversal(*(shifted(x) for x in tensors)), expected)
    sizes = [2, 1, 2]
    assert torch.equal(traverse(*(scattered(x) for x in tensors), edges=scattered(edges), sizes=sizes), expected)
    out, saved = torch.ops.pudnet.graph_recurrence(tensors[0], edges, sizes, *tensors[1:], False)
    assert saved.numel() == 0 and torch.equal(out, expected)


def test_edges_within_a_level_do_not_count() -> None:
    """And nobody waits for them."""
    traversal, tensors, edges = graph([1, 2, 2], 16, 1)
    more = edges.clone()
    more[0, 2, 1] = more[0, 1, 2] = more[0, 0, 4] = more[0, 3, 3] = 1
    op = functools.partial(traverse, edges=more, sizes=[1, 2, 2])
    (out, grads), (expected, expected_grads) = gradients(op, tensors), gradients(traversal, tensors)
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


@pytest.mark.skipif(not INTERPRET, reason="on a GPU the programs run at the same time anyway")
def test_programs_exchange_messages() -> None:
    """Three programs on one graph, each in a process of its own, as they run on a GPU."""
    edges, tensors, level_sizes = graph_arguments([2, 4, 1, 3], 16, 2)
    states, *maps, weight_ih, weight_hh, bias_ih, bias_hh = tensors
    nodes, width = states.shape
    expected, saved = graph_kernels.launch_graph_recurrence_fwd(states, edges, tuple(level_sizes), *tensors[1:], True)
    starts = graph_kernels.starts(tuple(level_sizes), states.device)
    sizes = graph_kernels.sizes(width, 2, width // 2)

    def run(kernel: Any, inputs: list[Tensor], shapes: list[tuple[int, ...]], **constants: bool) -> list[Tensor]:
        """Outputs of ``shapes`` by three programs; the first shape is that of the words."""
        outputs = [torch.zeros(shapes[0], dtype=torch.int64)]
        outputs += [torch.full(shape, float("nan")) for shape in shapes[1:]]
        _run_programs(kernel, [*inputs, starts, *outputs, nodes, 4, 3], 3, (), {**sizes, **constants})
        return outputs[1:]

    gates = torch.addmm(bias_hh, states, weight_hh.T)
    got = run(
        graph_kernels.graph_recurrence_fwd_kernel,
        [states, gates, edges, *maps, weight_ih, bias_ih],
        [(nodes, 2, width), (nodes, 5, width), (nodes, width)],
        SAVE=True,
    )
    assert error(got[0], saved.double()) < 1e-6 and error(got[1], expected.double()) < 1e-6

    # Backward: the same by three programs and by one.
    inner = torch.rand(nodes, 2, width // 2) - 0.3
    sent = torch.rand(nodes, 2, width) - 0.3
    inputs = [torch.randn(nodes, width), states, edges, maps[0], maps[2], weight_ih, inner, sent, saved]
    shapes = [(nodes, width), inner.shape, sent.shape, (nodes, 4, width), (nodes, width)]
    alone = [torch.zeros(shapes[0], dtype=torch.int64), *(torch.full(shape, float("nan")) for shape in shapes[1:])]
    kernel = graph_kernels.graph_recurrence_bwd_kernel
    kernel[(1,)](*inputs, starts, *alone, nodes, 4, 1, 0, **sizes)
    for one, several in zip(alone[1:], run(kernel, inputs, shapes), strict=True):
        assert error(several, one.double()) < 1e-6


def test_tile_weights() -> None:
    op, blocks = tiling()
    out, grads = gradients(op, blocks)
    expected, expected_grads = gradients(functools.partial(op, backend="reference"), [x.double() for x in blocks])
    assert error(out, expected) < 1e-7
    for got, want in zip(grads, expected_grads, strict=True):
        assert error(got, want) < 1e-6


def test_tile_weights_into_memory_that_is_there() -> None:
    blocks, scales, sizes = tile_arguments(TILES[:5])
    blocks = [x.to(DEVICE) for x in blocks]
    expected = ops.tile_weights(blocks, scales, sizes, backend="triton")
    for place in (torch.empty_like, shifted):  # each in memory of its own, on a 16-byte boundary and off it
        targets = [place(x).fill_(float("nan")) for x in expected]
        assert ops.tile_weights([scattered(x) for x in blocks], scales, sizes, targets, backend="triton") == targets
        assert all(torch.equal(a, b) for a, b in zip(targets, expected, strict=True))
    room = torch.full((sum(x.numel() for x in expected) + 2,), -7.0, device=DEVICE)
    parts = room[1:-1].split([x.numel() for x in expected])
    ops.tile_weights(blocks, scales, sizes, parts, backend="triton")
    assert torch.equal(room, torch.cat([room[:1], *(x.flatten() for x in expected), room[-1:]]))
    assert room[0] == room[-1] == -7


@pytest.mark.skipif(not INTERPRET, reason="on a GPU the programs of a team run at the same time anyway")
def test_programs_of_a_team_exchange_their_units() -> None:
    """Two teams of three programs, each program in a process of its own, as they run on a GPU."""
    batch, steps, width, units = 3, 4, 20, 8
    tensors = recurrence_arguments(batch, steps, width)
    expected, saved, saved_e = recurrence_kernels.launch_layer_recurrence_fwd(*tensors, 0.1, True, True)
    slices = -(-width // units)
    sizes = {**recurrence_kernels.sizes(width), "UNITS": units, "NORMALISE": True}
    words = torch.zeros(batch, steps, 3, width, dtype=torch.int64)
    outputs = [torch.full_like(x, float("nan")) for x in (saved, saved_e, expected)]
    arguments = [*tensors, words, *outputs, batch, steps, slices]
    _run_programs(recurrence_kernels.layer_recurrence_fwd_kernel, arguments, slices, (0.1,), {**sizes, "SAVE": True})
    for got, want in zip(outputs, (saved, saved_e, expected), strict=True):
        assert error(got, want.double()) < 1e-6

    d_e = torch.randn(batch, steps, width)
    state, _, weight_ih, weight_hh, _, _, out_weight, _, norm_weight, norm_bias, _, _ = tensors
    inputs = [d_e, state, weight_ih.mT.contiguous(), weight_hh.mT.contiguous(), out_weight.mT.contiguous()]
    inputs += [norm_weight, norm_bias, saved, saved_e]

    def outputs_bwd() -> list[Tensor]:
        shapes = [(batch, steps, 2, 4, width), (batch, steps, 2, width), (batch, steps, width), (batch, 2, width)]
        words = torch.zeros(batch, steps, 5, width, dtype=torch.int64)
        return [words, *(torch.full(shape, float("nan")) for shape in (*shapes, (batch, width)))]

    alone, team = outputs_bwd(), outputs_bwd()
    kernel = recurrence_kernels.layer_recurrence_bwd_kernel
    kernel[(1,)](*inputs, *alone, batch, steps, 1, 0, **recurrence_kernels.sizes(width), NORMALISE=True)
    _run_programs(kernel, [*inputs, *team, batch, steps, slices], slices, (), sizes)
    for got, want in zip(team[1:], alone[1:], strict=True):
        assert error(got, want.double()) < 1e-5


def _run_programs(kernel: Any, arguments: list[Any], count: int, last: tuple[Any, ...], sizes: dict[str, Any]) -> None:
    for x in arguments:
        if isinstance(x, Tensor):
            x.share_memory_()
    fork = multiprocessing.get_context("fork")
    workers = [
        fork.Process(target=lambda i=i: kernel[(1,)](*arguments, i, *last, **sizes), daemon=True) for i in range(count)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0  # None: it waits for a word that nobody posts


def _check_op(op: Any, arguments: tuple[Any, ...], *only: str) -> None:
    result = torch.library.opcheck(op, arguments, **({"test_utils": only} if only else {}))
    assert set(result.values()) == {"SUCCESS"}


def test_opcheck_and_compile() -> None:
    tensors = [x.to(DEVICE).requires_grad_() for x in generator_arguments(PLAIN, 1, 16, 4)]
    _check_op(torch.ops.pudnet.generate_weights.default, (*tensors, PLAIN, torch.float32, "triton"))
    _, eager = gradients(lambda *a: generate(*a, shapes=PLAIN), tensors)
    traced = torch.compile(lambda *a: generate(*a, shapes=PLAIN), fullgraph=True, backend="aot_eager")
    _, compiled = gradients(traced, tensors)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))

    tensors = [x.to(DEVICE).requires_grad_() for x in recurrence_arguments(1, 2, 16)]
    _check_op(torch.ops.pudnet.layer_recurrence.default, (*tensors, 0.1, True, True))
    permuted = [x.detach().mT.contiguous().mT.requires_grad_() if x.ndim > 1 else x for x in tensors]
    _check_op(torch.ops.pudnet.layer_recurrence.default, (*permuted, 0.1, True, True), "test_faketensor")
    _, eager = gradients(walk, tensors)
    _, compiled = gradients(torch.compile(walk, fullgraph=True, backend="aot_eager"), tensors)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def test_opcheck_and_compile_of_the_graph_ops() -> None:
    traversal, tensors, edges = graph([1, 2], 16, 2)
    leaves = [x.requires_grad_() for x in tensors]
    arguments = (leaves[0], edges, [1, 2], *leaves[1:], True)
    _check_op(torch.ops.pudnet.graph_recurrence.default, arguments)
    permuted = [x.detach().mT.contiguous().mT.requires_grad_() if x.ndim > 1 else x for x in leaves]
    arguments = (permuted[0], edges, [1, 2], *permuted[1:], True)
    _check_op(torch.ops.pudnet.graph_recurrence.default, arguments, "test_faketensor")

    blocks, scales, sizes = tile_arguments(TILES[2:4])
    leaves = [x.to(DEVICE).requires_grad_() for x in blocks]
    numbers = [number for size in sizes for number in size]
    _check_op(torch.ops.pudnet.tile_weights.default, (leaves, scales, numbers, "triton"))
    targets = [torch.zeros(o * i * x.shape[0], device=DEVICE) for x, (o, i) in zip(blocks, sizes, strict=True)]
    detached = [x.detach() for x in leaves]
    _check_op(torch.ops.pudnet.tile_weights_out.default, (detached, scales, numbers, targets, "triton"))

    for op, inputs in ((traversal, tensors), tiling(TILES[2:4])):
        _, eager = gradients(op, inputs)
        _, compiled = gradients(torch.compile(op, fullgraph=True, backend="aot_eager"), inputs)
        assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


@pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing")
def test_a_second_shape_compiles_nothing_new() -> None:
    from pudnet.kernels import generate_weights as generator_kernels
    from pudnet.kernels import tile_weights as tile_kernels

    kernels = [
        value
        for module in (recurrence_kernels, generator_kernels, graph_kernels, tile_kernels)
        for name, value in vars(module).items()
        if name.endswith("_kernel")
    ]

    def run(shapes: list[int], batch: int, steps: int, tiles: Any) -> int:
        tensors = [x.to(DEVICE) for x in generator_arguments(shapes, batch, 128, 8)]
        gradients(lambda *a: generate(*a, shapes=shapes), tensors)
        gradients(walk, [x.to(DEVICE) for x in recurrence_arguments(batch, steps, 128)])
        traversal, graph_tensors, _ = graph([batch, 1, steps], 32, 2)
        gradients(traversal, graph_tensors)
        gradients(*tiling(tiles))
        return sum(len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels)

    before = run(ALIGNED, 1, 1, TILES[:1])
    assert before >= len(kernels)
    assert run(MIXED, 64, 16, TILES) == before
    assert run(PLAIN, 3, 60, TILES[2:4]) == before
