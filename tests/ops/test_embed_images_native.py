"""The native encoder of sketch images: against the module in float64, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pudnet import _extension
from pudnet.errors import InputError
from pudnet.nn.embedding import DatasetEmbedding
from pudnet.ops import _native_embedding as native

pytestmark = pytest.mark.skipif(bool(_extension.why_not()), reason="; ".join(_extension.why_not()))
SCALE, SHIFT = [0.017, 0.018, 0.019], [-2.1, -2.0, -1.8]


def encoder(side: int, norm: str) -> DatasetEmbedding:
    torch.manual_seed(side)
    made = DatasetEmbedding(side, 2, 24, norm)
    if norm == "batch":  # statistics and affine parameters that matter
        made(torch.randn(64, 3, side, side), [64])
    with torch.no_grad():
        for parameter in made.norm.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made.eval().requires_grad_(False)


def layers(module: DatasetEmbedding) -> tuple[list[nn.Conv2d], nn.Linear, nn.Module]:
    return list(module.convs), module.linear, module.norm


def features(module: DatasetEmbedding, pixels: Tensor) -> Tensor:
    assert native.why_not(*layers(module)) == []
    return native.image_features(pixels, native.pack(*layers(module), SCALE, SHIFT))


def images(count: int, side: int) -> Tensor:
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize(("side", "count"), [(1, 3), (7, 1), (17, 50), (32, 5)])
@pytest.mark.parametrize("instruction_set", ["avx512", "avx2", "portable"])
def test_same_as_the_module(
    monkeypatch: pytest.MonkeyPatch, instruction_set: str, side: int, count: int, norm: str
) -> None:
    monkeypatch.setenv("PUDNET_INSTRUCTION_SET", instruction_set)
    module, pixels = encoder(side, norm), images(count, side)
    try:
        found = features(module, pixels)
    except InputError as error:
        pytest.skip(str(error))
    planes = pixels.permute(0, 3, 1, 2) * torch.tensor(SCALE).view(3, 1, 1) + torch.tensor(SHIFT).view(3, 1, 1)
    expected = module.double().image_features(planes.double())
    assert found.shape == expected.shape
    assert float((found - expected).abs().max() / expected.abs().max()) < 3e-6


def test_images_and_threads_do_not_matter_to_each_other() -> None:
    module, pixels = encoder(12, "layer"), images(101, 12)
    found = features(module, pixels)
    assert torch.equal(features(module, pixels[60:61]), found[60:61])
    assert torch.equal(features(module, pixels.flip(0)), found.flip(0))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(features(module, pixels), found)
    finally:
        torch.set_num_threads(before)


def test_refuses_what_it_is_not_written_for(monkeypatch: pytest.MonkeyPatch) -> None:
    convs, linear, norm = layers(encoder(8, "layer"))
    assert "multiples of 16" in native.why_not(convs, nn.Linear(32, 40), norm)[0]
    assert "three 5 x 5" in native.why_not(convs[:2], linear, norm)[0]
    assert "epsilon" in native.why_not(convs, linear, nn.LayerNorm(48, eps=1e-3))[0]
    monkeypatch.setenv("PUDNET_INSTRUCTION_SET", "mmx")
    with pytest.raises(InputError, match="instruction_set must be one of"):
        features(encoder(8, "layer"), images(1, 8))
