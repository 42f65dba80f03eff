"""The released PudNet: its numbers, and its format."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pudnet.errors import CheckpointError, DtypeError, ShapeError
from pudnet.interop import import_released_pudnet

PARITY = Path(__file__).resolve().parents[2] / "shared" / "parity"


def _error(out: Tensor, reference: Tensor) -> float:
    assert out.shape == reference.shape
    return ((out - reference).norm() / reference.norm()).item()


def test_agrees_with_the_released_numbers() -> None:
    if not (PARITY / "pudnet_unet_forward.npz").is_file():
        pytest.skip(f"the released numbers are not in {PARITY}")
    with (
        np.load(PARITY / "pudnet_unet_state_dict.npz") as state,
        np.load(PARITY / "pudnet_unet_forward.npz") as forward,
    ):
        result = import_released_pudnet(state).run(forward["input"])
        reference = {name: torch.from_numpy(forward[name]) for name in forward.files}
    for name in ("embedding", "codes", "output"):
        assert _error(result[name], reference[name]) < 1e-4, name
    assert len(result["kernels"]) == 18
    for t, kernel in enumerate(result["kernels"]):
        assert _error(kernel, reference[f"kernel_{t:02d}"]) < 1e-4, t


def _released(
    seed: int = 0, base: int = 2, depth: int = 2, side: int = 24, width: int = 12, layers: int = 3, h: int = 4
) -> dict[str, Tensor]:
    """Random parameters in the released format, written down from its description."""
    g = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {"temp": torch.tensor(7.0), "dec_in_for0": torch.randn(1, width, generator=g)}

    def linear(name: str, *shape: int) -> None:
        state[f"{name}.weight"] = (
            torch.randn(*shape, generator=g) / (shape[1] * (shape[2] if len(shape) > 2 else 1)) ** 0.5
        )
        state[f"{name}.bias"] = torch.randn(shape[0], generator=g) * 0.1

    def norm(name: str, size: int, statistics: bool = True) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(size, generator=g)
        state[f"{name}.bias"] = 0.1 * torch.randn(size, generator=g)
        if statistics:
            state[f"{name}.running_mean"] = 0.1 * torch.randn(size, generator=g)
            state[f"{name}.running_var"] = 0.5 + torch.rand(size, generator=g)
            state[f"{name}.num_batches_tracked"] = torch.tensor(3)

    for k, (i, o) in enumerate(((3, 16), (16, 32), (32, 32))):
        linear(f"denoise.{2 * k}", o, i, 5, 5)
    linear("denotmp.0", layers * width, 32 * (side // 8) ** 2)
    norm("denotmp.1", layers * width)
    for layer in range(layers):
        for kind in ("ih", "hh"):
            state[f"ahru.rnn.weight_{kind}_l{layer}"] = torch.randn(3 * width, width, generator=g) / width**0.5
            state[f"ahru.rnn.bias_{kind}_l{layer}"] = torch.randn(3 * width, generator=g) * 0.1
    linear("ahru.fc_out.0", width, width)
    norm("ahru.ln_hid", width, statistics=False)
    for t, (kind, k, first, second) in enumerate(_plan(base, depth)):
        norm(f"unet_{kind}.{k}.bn.norm", first if kind == "enc" else second)
        norm(f"lns.{t}", width, statistics=False)
        linear(f"hyper_unet.{t}.fc.0", h * 9, width)
        linear(f"hyper_unet.{t}.conv1.0", 2 * h, h, 1, 1)
        linear(f"hyper_unet.{t}.conv2", first * second, 2 * h, 1, 1)
    return state


def _plan(base: int, depth: int) -> list[tuple[str, int, int, int]]:
    """(part, index in it, stored first size, stored second size) of every kernel."""
    down, up = [(base, 3)], []
    for level in range(depth):
        down += [(base * 2**level, base * 2**level), (base * 2 ** (level + 1), base * 2**level)]
    for level in reversed(range(depth)):
        up += [(base * 2 ** (level + 1), base * 2**level)] * 2
    up += [(base, 3)]
    return [("enc", k, *pair) for k, pair in enumerate(down)] + [("dec", k, *pair) for k, pair in enumerate(up)]


def _oracle(state: dict[str, Tensor], images: Tensor, alpha: float, base: int, depth: int) -> dict[str, object]:
    """The released computation, written out on the state dict alone."""
    s = {name: value.double() for name, value in state.items()}
    x = images.double()
    width = s["dec_in_for0"].shape[1]
    layers = sum(name.startswith("ahru.rnn.weight_ih") for name in s)

    def batch_norm(x: Tensor, name: str) -> Tensor:
        return F.batch_norm(
            x, s[f"{name}.running_mean"], s[f"{name}.running_var"], s[f"{name}.weight"], s[f"{name}.bias"]
        )

    y = x
    for k in (0, 2, 4):
        y = F.gelu(F.conv2d(y, s[f"denoise.{k}.weight"], s[f"denoise.{k}.bias"], stride=2, padding=2))
    y = F.linear(y.flatten(1), s["denotmp.0.weight"], s["denotmp.0.bias"])
    embedding = F.gelu(batch_norm(y, "denotmp.1")).mean(dim=0)
    h0 = embedding.view(layers, width)
    h, e, codes, kernels = h0, s["dec_in_for0"][0], [], []
    plan = _plan(base, depth)
    for t, (_, _, first, second) in enumerate(plan):
        states, o = [], e
        for layer in range(layers):
            gx = s[f"ahru.rnn.weight_ih_l{layer}"] @ o + s[f"ahru.rnn.bias_ih_l{layer}"]
            gh = s[f"ahru.rnn.weight_hh_l{layer}"] @ h[layer] + s[f"ahru.rnn.bias_hh_l{layer}"]
            r, z = (gx[:width] + gh[:width]).sigmoid(), (gx[width : 2 * width] + gh[width : 2 * width]).sigmoid()
            n = (gx[2 * width :] + r * gh[2 * width :]).tanh()
            o = (1 - z) * n + z * h[layer]
            states.append(o)
        e = (s["ahru.fc_out.0.weight"] @ o + s["ahru.fc_out.0.bias"]).relu()
        h = F.layer_norm(torch.stack(states), (width,), s["ahru.ln_hid.weight"], s["ahru.ln_hid.bias"])
        code = (1 - alpha) * e + alpha * h0.mean(dim=0)
        code = F.layer_norm(code, (width,), s[f"lns.{t}.weight"], s[f"lns.{t}.bias"])
        p = f"hyper_unet.{t}"
        feature = F.gelu(s[f"{p}.fc.0.weight"] @ code + s[f"{p}.fc.0.bias"]).view(1, -1, 3, 3)
        feature = F.gelu(F.conv2d(feature, s[f"{p}.conv1.0.weight"], s[f"{p}.conv1.0.bias"]))
        kernel = F.conv2d(feature, s[f"{p}.conv2.weight"], s[f"{p}.conv2.bias"])
        codes.append(code)
        kernels.append(kernel.view(first, second, 3, 3))
    skips = []
    for t, (kind, k, _, _) in enumerate(plan):
        convolve = F.conv2d if kind == "enc" else F.conv_transpose2d
        x = batch_norm(convolve(x, kernels[t], padding=1), f"unet_{kind}.{k}.bn.norm").relu()
        if kind == "enc" and k % 2 == 1:
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        if kind == "dec" and k % 2 == 0 and skips:
            x = torch.cat([skips.pop(), x.repeat_interleave(2, 2).repeat_interleave(2, 3)], dim=1)
    return {"embedding": embedding, "codes": torch.stack(codes), "kernels": kernels, "output": x}


@pytest.mark.parametrize(
    ("sizes", "alpha"),
    [
        ({}, 0.1),
        ({"seed": 1, "base": 3, "depth": 1, "side": 40, "width": 8, "layers": 1, "h": 8}, 0.6),
        ({"seed": 2, "depth": 4, "side": 16, "layers": 2}, 0.0),
    ],
)
def test_any_size_of_the_format_imports_and_computes_the_same(sizes: dict[str, int], alpha: float) -> None:
    sizes = {"base": 2, "depth": 2, "side": 24, **sizes}
    state = _released(**sizes)
    images = torch.rand(3, 3, sizes["side"], sizes["side"], generator=torch.Generator().manual_seed(5))
    released = import_released_pudnet(state, alpha=alpha)
    released.net.double()  # so that the comparison sees the wiring alone
    result = released.run(images)
    expected = _oracle(state, images, alpha, sizes["base"], sizes["depth"])
    for name in ("embedding", "codes", "output"):
        assert _error(result[name], expected[name]) < 1e-9, name
    assert [tuple(kernel.shape) for kernel in result["kernels"]] == [tuple(k.shape) for k in expected["kernels"]]
    for kernel, reference in zip(result["kernels"], expected["kernels"], strict=True):
        assert _error(kernel, reference) < 1e-9
    assert released.net.temperature == 7 and released.net.config.image_size == sizes["side"]


def test_every_parameter_is_read_from_the_file() -> None:
    state = _released()
    released = import_released_pudnet({name: torch.full_like(value, 5) for name, value in state.items()})
    assert all((value == 5).all() for value in released.net.state_dict().values())


def test_arrays_and_half_precision_are_read_exactly_and_never_written() -> None:
    half = {
        name: value.half().numpy() if value.is_floating_point() else value.numpy()
        for name, value in _released().items()
    }
    for value in half.values():
        value.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = import_released_pudnet(half).net
    second = import_released_pudnet({name: torch.tensor(value).float() for name, value in half.items()}).net
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert first.temperature.dtype == torch.float32


def test_evaluation_mode_does_not_move_statistics() -> None:
    released = import_released_pudnet(_released())
    before = {name: value.clone() for name, value in released.net.state_dict().items()}
    result = released.run(np.random.default_rng(0).random((4, 3, 24, 24), dtype=np.float32))
    assert not result["output"].requires_grad
    assert all(torch.equal(before[name], value) for name, value in released.net.state_dict().items())


@pytest.mark.parametrize(
    "name",
    ["temp", "dec_in_for0", "denotmp.0.weight", "ahru.rnn.bias_hh_l1", "unet_enc.4.bn.norm.weight", "lns.9.bias"],
)
def test_missing_names_are_named(name: str) -> None:
    state = _released()
    del state[name]
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        import_released_pudnet(state)


def test_unknown_names_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"1 unknown \[fc\.weight\]"):
        import_released_pudnet({**_released(), "fc.weight": torch.zeros(1)})


def test_nothing_and_something_else_are_refused() -> None:
    for state in ({}, {"conv1.weight": torch.zeros(3, 3)}):
        with pytest.raises(CheckpointError, match="unet_enc"):
            import_released_pudnet(state)


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("denotmp.0.weight", (36, 280), r"denotmp\.0\.weight.*280"),
        ("denotmp.0.weight", (36,), r"2 dimensions at 'denotmp\.0\.weight'"),
        ("unet_enc.4.bn.norm.weight", (9,), r"doubling from unet_enc\.0 to unet_enc\.4"),
        ("hyper_unet.0.conv1.0.weight", (8, 4), r"4 dimensions at 'hyper_unet\.0"),
        ("hyper_unet.3.conv2.weight", (15, 8, 1, 1), r"hyper_unet\.3\.conv2\.weight \[15, 8, 1, 1\]"),
        ("lns.9.bias", (11,), r"lns\.9\.bias \[11\] instead of \[12\]"),
        ("dec_in_for0", (12,), r"dec_in_for0 \[12\] instead of \[1, 12\]"),
        ("ahru.rnn.weight_ih_l0", (36, 0), "nowhere empty"),
    ],
)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        import_released_pudnet({**_released(), name: torch.zeros(shape)})


def test_a_size_the_unet_cannot_halve_is_refused() -> None:
    with pytest.raises(CheckpointError, match="multiple of 16"):
        import_released_pudnet(_released(depth=4, side=24))


def test_values_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(CheckpointError, match="temp"):
        import_released_pudnet({**_released(), "temp": np.array("ten")})


@pytest.mark.parametrize(
    ("images", "error"),
    [
        (torch.zeros(2, 3, 32, 32), ShapeError),
        (torch.zeros(3, 24, 24), ShapeError),
        (torch.zeros(0, 3, 24, 24), ShapeError),
        (torch.zeros(2, 3, 24, 24, dtype=torch.uint8), DtypeError),
    ],
)
def test_images_that_do_not_fit_are_refused(images: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="images"):
        import_released_pudnet(_released()).run(images)
