"""At least 60 networks of at least eight families: traced, every parameter predicted, finite outputs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))

from families import FAMILIES

from pudnet.models.ghn import GHN

EXPECTED = {
    "ResNet": {"conv", "bn", "sum", "glob_avg"},
    "VGG": {"conv", "bias", "bn", "max_pool", "glob_avg"},
    "MobileNet": {"sep_conv"},
    "EfficientNet": {"sep_conv", "cse", "sum"},
    "DenseNet": {"concat", "avg_pool"},
    "SqueezeNet": {"concat", "max_pool"},
    "RegNet": {"sep_conv", "sum"},
    "ConvNeXt": {"sep_conv", "ln", "sum"},
    "ViT": {"msa", "ln", "pos_enc"},
    "ShuffleNet and Inception": {"concat"},
}


def test_there_are_enough() -> None:
    assert len(FAMILIES) >= 8 and sum(map(len, FAMILIES.values())) >= 60


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_family(family: str) -> None:
    ghn = GHN(width=8).eval()
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for name, make in FAMILIES[family].items():
        module: nn.Module = make().eval()
        graph = ghn.graph(module)
        assert graph.unpredicted == (), name
        assert EXPECTED[family] <= {node.primitive for node in graph.nodes}, name
        network = ghn.predict(module)
        changed = {
            key for key, value in network.named_parameters() if not torch.equal(value, module.get_parameter(key))
        }
        assert changed == {key for key, _ in module.named_parameters()}, name
        with torch.no_grad():
            out = network(images)
        assert out.shape == (8, 10) and bool(torch.isfinite(out).all()), name
