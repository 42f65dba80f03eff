"""``Predictor(net, optimize=True)``: the reference's numbers, shared by threads, moved, and used by ``predict``."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pudnet
from pudnet.errors import DtypeError, InputError

SIDE = 16


def images(count: int, seed: int = 0, side: int = SIDE) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=["default", "paper"])
def net(request: pytest.FixtureRequest) -> pudnet.PudNet:
    return pudnet.PudNet("convnet3", request.param, image_size=SIDE, width=32).eval()


def reference(net: pudnet.PudNet, sketches: Any) -> dict[str, Tensor]:
    with torch.no_grad(), pudnet.use_backend("reference"):
        return net.generate(sketches)


def largest_error(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Relative to the largest weight of each layer."""
    assert list(found) == list(wanted)
    assert all(found[name].shape == wanted[name].shape for name in wanted)
    return max(float((found[name] - wanted[name]).abs().max() / wanted[name].abs().max()) for name in wanted)


@pytest.mark.parametrize("optimize", [False, True])
def test_generates_the_numbers_of_the_reference(net: pudnet.PudNet, optimize: bool) -> None:
    predictor = pudnet.Predictor(net, optimize=optimize)
    sketch = predictor.sketch(images(30), np.arange(30) % 3, size=9)
    several = [images(4, 1), sketch, images(3, 2, side=21)]
    for given in (images(10), torch.from_numpy(images(1)), sketch, several, several[:1]):
        found = predictor.generate(given)
        assert largest_error(found, reference(net, given)) < 1e-5
        assert not any(weight.requires_grad for weight in found.values())


@pytest.mark.parametrize("optimize", [False, True])
def test_refuses_what_is_no_sketch(net: pudnet.PudNet, optimize: bool) -> None:
    predictor = pudnet.Predictor(net, optimize=optimize)
    for wrong in (images(0), [], images(2).astype(np.float32), images(2)[..., :2], [images(2), images(0)]):
        with pytest.raises(InputError):
            predictor.generate(wrong)


def test_eight_threads_share_one(net: pudnet.PudNet) -> None:
    predictor = pudnet.Predictor(net, optimize=True)
    sketches = [images(2 + n % 3, seed=n) for n in range(24)]
    alone = [predictor.generate(sketch) for sketch in sketches]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(predictor.generate, sketches * 4))
    for n, found in enumerate(together):
        assert all(torch.equal(found[name], alone[n % 24][name]) for name in found)


def test_predict_makes_its_weights_there(net: pudnet.PudNet, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast = pudnet.Predictor(net), pudnet.Predictor(net, optimize=True)
    labels = np.arange(40) % 4
    expected = plain.predict(images(40), labels)
    monkeypatch.setattr(pudnet.PudNet, "generate", None)
    model = fast.predict(images(40), labels)
    with torch.no_grad():
        x = model.preprocess(images(8, 1))
        assert torch.allclose(model(x), expected(x), rtol=1e-3, atol=1e-3)
    before = model(x)
    for seed in range(4):  # the model's weights are its own
        fast.generate(images(5, seed))
    assert torch.equal(model(x), before)


def test_moves_and_keeps_its_parameters_dtype(net: pudnet.PudNet) -> None:
    predictor = pudnet.Predictor(net, optimize=True, dtype=torch.bfloat16)
    before = predictor.generate(images(6))
    assert 1e-6 < largest_error(before, reference(net, images(6))) < 2e-2
    after = predictor.to("cpu").generate(images(6))
    assert all(torch.equal(before[name], after[name]) for name in before)
    if torch.cuda.is_available():
        moved = predictor.to("cuda").generate(images(6))
        assert all(weight.is_cuda for weight in moved.values())
        assert largest_error({name: x.cpu() for name, x in moved.items()}, before) < 1e-2
    assert predictor.to("meta").device.type == "meta"


def test_loads_optimised(net: pudnet.PudNet, tmp_path: Path) -> None:
    net.save(tmp_path / "net.safetensors")
    predictor = pudnet.Predictor.from_pretrained(tmp_path / "net.safetensors", optimize=True)
    assert largest_error(predictor.generate(images(6)), reference(net, images(6))) < 1e-5
    with pytest.raises(DtypeError, match=r"dtype must be torch\.float32 without optimize; got torch\.bfloat16"):
        pudnet.Predictor(net, dtype=torch.bfloat16)
    with pytest.raises(DtypeError, match="dtype"):
        pudnet.Predictor(net, optimize=True, dtype=torch.float16)
