"""The space of random architectures: reproducible, valid, of the published sizes."""

from __future__ import annotations

import itertools

import pytest
import torch

from pudnet.errors import InputError
from pudnet.graphs import deepnets, statistics
from pudnet.graphs.deepnets1m import CONVOLUTIONS, LARGE, SIZES


def test_a_network_is_a_function_of_split_seed_and_index() -> None:
    state = torch.get_rng_state()
    stream = [net.genotype for net in deepnets("test", 3, seed=3)]
    assert [net.genotype for net in deepnets("test", 1, seed=3, start=2)] == stream[2:3]
    assert [net.genotype for net in deepnets("test", 3, seed=4)] != stream
    assert [net.genotype for net in deepnets("val", 3, seed=3)] != stream
    assert torch.equal(torch.get_rng_state(), state)
    assert len(list(itertools.islice(deepnets("train"), 2))) == 2  # streamed, not a million at once


@pytest.mark.parametrize("split", sorted(set(SIZES) - {"predefined"}))
def test_networks_obey_the_rules_and_run(split: str) -> None:
    most = 300_000
    for net in deepnets(split, 2, widths=(8,), most_parameters=most):
        g = net.genotype
        assert g is not None
        assert (10 if split == "deep" else 4) <= g.cells <= (36 if split == "deep" else 18)
        assert (2 if split == "dense" else 1) <= len(g.normal) <= (10 if split == "dense" else 4)
        assert g.channels == (32 if split == "wide" else 8)
        assert g.batch_norm or split == "bnfree" or g.cells <= 10
        for cell in (g.normal, g.reduction):
            names = [edge.operation for node in cell for edge in node]
            assert names.count("cse") <= 1 and sum(name in LARGE for name in names) <= 1
            assert "cse" not in names or CONVOLUTIONS & set(names)
        assert net.graph.num_parameters <= most * (4 if split == "wide" else 1)
        module = net.build(seed=1).eval()
        assert net.graph.unpredicted == () and net.module.state_dict().keys() == module.state_dict().keys()
        assert ("bn" in {node.primitive for node in net.graph.nodes}) == g.batch_norm
        with torch.no_grad():
            out = module(torch.zeros(2, 3, 32, 32))
        assert out.shape == (2, 10) and bool(torch.isfinite(out).all())
    first, second = (next(deepnets(split, 1, widths=(8,), most_parameters=most)).build(seed=5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_predefined_networks() -> None:
    resnet, vit = deepnets("predefined", classes=7)
    assert resnet.graph.num_parameters == 23_520_842 - 3 * 2049 and "msa" in {n.primitive for n in vit.graph.nodes}
    assert sum(node.primitive == "msa" for node in vit.graph.nodes) == 12
    assert resnet.graph.unpredicted == vit.graph.unpredicted == ()


def test_statistics_are_near_the_published_ones() -> None:
    found = statistics("bnfree", 20)
    assert 90 < found["nodes"] < 220 and found["published nodes"] == 135
    assert found["nodes min"] <= found["nodes"] <= found["nodes max"]


@pytest.mark.parametrize("arguments", [("tests", 1), ("deep", 101), ("deep", -1), ("test", 1, 0)])
def test_bad_arguments(arguments: tuple[object, ...]) -> None:
    with pytest.raises(InputError, match=r"graphs\.deepnets"):
        deepnets(*arguments[:2], start=500 if len(arguments) == 3 else 0)  # type: ignore[arg-type]


def test_light_networks_keep_the_limits() -> None:
    drawn = list(deepnets("train", 6, widths=(8, 12), most_parameters=100_000, most_cells=5, stems=(1,)))
    settings = [network.genotype for network in drawn]
    assert all(g is not None and g.cells in (4, 5) and g.channels in (8, 12) and g.stem_type == 1 for g in settings)
    assert all(network.graph.num_parameters <= 100_000 for network in drawn)
    for limit in ({"most_cells": 3}, {"stems": ()}, {"stems": (2,)}):
        with pytest.raises(InputError, match=next(iter(limit))):
            deepnets("train", 1, **limit)  # type: ignore[arg-type]


def test_limits_no_network_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pudnet.graphs.deepnets1m.MOST_DRAWS", 8)
    with pytest.raises(InputError, match="most_parameters"):
        next(deepnets("bnfree", 1, widths=(64,), most_parameters=10))
