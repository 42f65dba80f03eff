"""Wrong arguments for ``torch.ops.pudnet.*``: always an exception or the right answer, never a crash."""

from __future__ import annotations

import random
import resource
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pudnet.ops
from pudnet.ops import reference
from stress import Figures, part

MIB_LIMIT = 1000
ADDRESS_SPACE = 2**33  # bytes beyond what is in use: sizes that overflow must fail, not fill the machine
INTEGERS = (-(2**63), -(2**31), -3, -1, 0, 1, 2, 3, 5, 2**40, 2**62, 2**63 - 1)
FLOATS = (0.0, -1.0, 1e-40, 1e40, float("nan"), float("inf"))
EXTREMES: dict[torch.dtype, tuple[float, ...]] = {
    torch.float32: (0.0, 1e-40, 1e30, -3e38, float("nan"), float("inf")),
    torch.int64: (-1, 0, 2, 100, -(2**63), 2**62, 2**31),
}
WORDS = ("native", "triton", "reference", "", "x" * 100)
DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
)


@part("operators", "calls of torch.ops.pudnet.* with none to three wrong arguments", full=10_000, quick=400)
def run(count: int, seed: int) -> Figures:
    """Each case takes a right call of one op and spoils some arguments; answers are compared with the reference."""
    torch.set_num_threads(1)
    failures, outcomes, by_op = [], Counter(), Counter()
    calls = _calls()
    start = _peak()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + ADDRESS_SPACE, hard))
    try:
        for case in range(count):
            rng = random.Random(f"{seed}/{case}")
            name = rng.choice(sorted(calls))
            arguments = calls[name](rng)
            for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
                place = rng.randrange(len(arguments))
                arguments[place] = _spoiled(arguments[place], rng)
            by_op[name] += 1
            try:
                answer = getattr(torch.ops.pudnet, name)(*arguments)
            except Exception as error:
                outcomes[type(error).__name__] += 1
                continue
            outcomes["answered"] += 1
            try:
                wrong = _differs(name, arguments, answer)
            except Exception as error:
                wrong = f"the reference refuses it: {type(error).__name__}: {error}"
            if wrong:
                failures.append(f"case {case} ({name}): {wrong}"[:300])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    grown = _peak() - start
    if grown > MIB_LIMIT:
        failures.append(f"memory grew by {grown} MiB, more than {MIB_LIMIT}")
    return {
        "failures": failures,
        "outcomes": dict(sorted(outcomes.items())),
        "calls_by_op": dict(sorted(by_op.items())),
        "mib_grown_at_most": grown,
    }


def _calls() -> dict[str, Callable[[random.Random], list[Any]]]:
    """Right arguments of every op that runs on the CPU, small and of random sizes."""

    def tensor(rng: random.Random, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(rng.randrange(2**31)))

    def image_stats(rng: random.Random) -> list[Any]:
        n, side, channels, classes = rng.randrange(1, 20), rng.randrange(1, 9), rng.choice([1, 3, 4, 16]), 3
        draws = np.random.default_rng(rng.randrange(2**31))
        images = torch.from_numpy(draws.integers(0, 256, (n, side, side, channels), dtype=np.uint8))
        labels = torch.from_numpy(draws.integers(-1, classes, n))
        return [images, labels, classes, [0.5] * channels, [0.25] * channels]

    def class_stats(rng: random.Random) -> list[Any]:
        n = rng.randrange(1, 20)
        return [tensor(rng, n, rng.randrange(1, 40)), torch.arange(n) % 4 - 1, 3]

    def patch_covariance(rng: random.Random) -> list[Any]:
        batch, n, channels, side = rng.randrange(1, 3), rng.randrange(1, 5), rng.randrange(1, 4), rng.randrange(3, 9)
        labels = torch.arange(batch * n).view(batch, n) % 3 - 1
        return [tensor(rng, batch, n, channels, side, side), labels, 2, rng.choice([1, 2, 3]), rng.choice([0, 1])]

    def generate_weights(rng: random.Random) -> list[Any]:
        batch, layers, width, hidden = (
            rng.randrange(1, 4),
            rng.randrange(1, 4),
            rng.randrange(1, 20),
            rng.randrange(1, 9),
        )
        shapes = [rng.randrange(1, 6) for _ in range(4 * layers)]
        rows = sum(o * i for o, i in zip(shapes[0::4], shapes[1::4], strict=True))
        spatial = sum(kh * kw for kh, kw in zip(shapes[2::4], shapes[3::4], strict=True))
        sizes = [
            (batch, layers, width), (hidden * spatial, width), (hidden * spatial,), (layers, 2 * hidden, hidden),
            (layers, 2 * hidden), (rows, 2 * hidden), (rows,),
        ]  # fmt: skip
        return [*(tensor(rng, *size) for size in sizes), shapes, torch.float32, "native"]

    def generate_weights_backward(rng: random.Random) -> list[Any]:
        *tensors, shapes, _, backend = generate_weights(rng)
        size = sum(shapes[k] * shapes[k + 1] * shapes[k + 2] * shapes[k + 3] for k in range(0, len(shapes), 4))
        return [tensor(rng, len(tensors[0]), size), *tensors, shapes, backend]

    def layer_recurrence_native(rng: random.Random) -> list[Any]:
        batch, layers, width, steps = (
            rng.randrange(1, 4),
            rng.randrange(1, 3),
            rng.randrange(1, 40),
            rng.randrange(1, 5),
        )
        sizes = [
            (batch, layers, width), (width,), (layers, 3 * width, width), (layers, 3 * width, width),
            (layers, 3 * width), (layers, 3 * width), (width, width), (width,), (width,), (width,),
            (steps, width), (steps, width),
        ]  # fmt: skip
        return [*(tensor(rng, *size) for size in sizes), 0.1, rng.random() < 0.5]

    def graph_recurrence_native(rng: random.Random) -> list[Any]:
        nodes, width, kinds, hidden = rng.randrange(1, 8), rng.choice([4, 8, 16]), 2, rng.choice([2, 4, 8])
        edges = torch.tril(torch.ones(nodes, nodes), -1).repeat(kinds, 1, 1)
        sizes = [
            (kinds, hidden, width), (kinds, hidden), (kinds, width, hidden), (kinds, width), (3 * width, width),
            (3 * width, width), (3 * width,), (3 * width,),
        ]  # fmt: skip
        return [tensor(rng, nodes, width), edges, [1] * nodes, *(tensor(rng, *size) for size in sizes)]

    def tile_weights(rng: random.Random) -> list[Any]:
        count = rng.randrange(1, 4)
        blocks = [tensor(rng, rng.choice([1, 9]), rng.randrange(1, 5), rng.randrange(1, 5)) for _ in range(count)]
        return [blocks, [0.5] * count, [rng.randrange(1, 12) for _ in range(2 * count)], "native"]

    def tile_weights_out(rng: random.Random) -> list[Any]:
        blocks, scales, sizes, backend = tile_weights(rng)
        ends = zip(blocks, sizes[::2], sizes[1::2], strict=True)
        return [blocks, scales, sizes, [torch.zeros(o, i, block.shape[0]) for block, o, i in ends], backend]

    found = locals()
    return {name: value for name, value in found.items() if name != "tensor" and hasattr(torch.ops.pudnet, name)}


def _spoiled(value: Any, rng: random.Random) -> Any:
    """A wrong value of the same kind, or of another."""
    if rng.random() < 0.03:
        return rng.choice([None, "text", 3, [], torch.zeros(2)])
    if isinstance(value, Tensor):
        return _spoiled_tensor(value, rng)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(INTEGERS)
    if isinstance(value, float):
        return rng.choice(FLOATS)
    if isinstance(value, str):
        return rng.choice(WORDS)
    if isinstance(value, torch.dtype):
        return rng.choice(DTYPES)
    if value is None:
        return value
    changed = list(value)
    way = rng.randrange(3)
    if way == 0 and changed:
        changed.pop(rng.randrange(len(changed)))
    elif way == 1 and changed:
        changed.append(changed[0])
    elif changed:
        place = rng.randrange(len(changed))
        changed[place] = _spoiled(changed[place], rng)
    return changed


def _spoiled_tensor(value: Tensor, rng: random.Random) -> Tensor:
    """Another shape, dtype, layout, device or content."""
    axis = rng.randrange(value.ndim) if value.ndim else 0
    way = rng.randrange(10)
    if way == 0 and value.ndim:
        sizes = list(value.shape)
        sizes[axis] = rng.choice([0, 1, max(sizes[axis] - 1, 0), sizes[axis] + 1, 2 * sizes[axis]])
        return torch.ones(sizes, dtype=value.dtype)
    if way == 1:
        return value[None]
    if way == 2 and value.ndim:
        return value.select(axis, 0) if value.shape[axis] else value
    if way == 3:
        return value.to(rng.choice(DTYPES))
    if way == 4 and value.ndim:  # the same numbers, lying elsewhere
        wide = value.repeat_interleave(2, dim=axis)
        return wide[(slice(None),) * axis + (slice(0, None, 2),)]
    if way == 5 and value.ndim:
        return value.select(axis, 0).unsqueeze(axis).expand_as(value) if value.shape[axis] else value
    if way == 6:
        return value.transpose(0, -1).contiguous().transpose(0, -1) if value.ndim else value
    if way == 7:
        return value.to("meta") if rng.random() < 0.3 else value.new_empty(0)
    if way == 8 and value.numel() and value.dtype in EXTREMES:
        changed = value.detach().clone(memory_format=torch.contiguous_format)
        changed.view(-1)[rng.randrange(changed.numel())] = rng.choice(EXTREMES[value.dtype])
        return changed
    if value.is_floating_point() and rng.random() < 0.3:
        return value.detach().clone().requires_grad_()
    return value.flip(0) if value.ndim else value


def _differs(name: str, arguments: list[Any], answer: Any) -> str:
    """How an answer of native differs from that of the reference; empty where it does not."""
    plain = name.removesuffix("_native")
    if plain in ("generate_weights_backward", "tile_weights_out"):
        return ""
    tensors = [one for argument in arguments for one in (argument if isinstance(argument, list) else [argument])]
    if any(isinstance(one, Tensor) and (one.is_meta or _is_extreme(one)) for one in tensors):
        return ""
    if plain == "tile_weights":
        blocks, scales, sizes, _ = arguments
        pairs = list(zip(sizes[::2], sizes[1::2], strict=True))
        expected = torch.cat([one.flatten() for one in reference.tile_weights(blocks, scales, pairs, None)])
    else:
        known = arguments[:-1] if plain == "generate_weights" else arguments
        expected = getattr(reference, plain)(*known)
    pairs = [(answer, expected)] if isinstance(answer, Tensor) else list(zip(answer, expected, strict=True))
    for ours, theirs in pairs:
        if ours.shape != theirs.shape:
            return f"{list(ours.shape)} for {list(theirs.shape)}"
        known = theirs.isfinite() & ours.isfinite()
        bound = 0.02 if ours.dtype in (torch.bfloat16, torch.float16) else 1e-3
        if not torch.allclose(ours[known].double(), theirs[known].double(), rtol=bound, atol=bound):
            return f"off by {float((ours[known].double() - theirs[known].double()).abs().max()):g}"
    return ""


def _is_extreme(tensor: Tensor) -> bool:
    """Whether the order of a sum decides what is left of it."""
    return tensor.is_floating_point() and tensor.numel() > 0 and not bool((tensor.abs() < 1e6).all())


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


assert pudnet.ops  # defines torch.ops.pudnet
