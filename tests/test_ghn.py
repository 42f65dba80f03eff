"""GHN: the released numbers, the plain version, and what a user relies on."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent / "fixtures"))

import plain_ghn
from torchvision_nets import NETWORKS, VGG, BasicBlock, Bottleneck, MobileNetV2, ResNet

import pudnet
from pudnet import checkpoint
from pudnet.errors import CheckpointError, DtypeError, InputError, ShapeError
from pudnet.graphs import trace
from pudnet.interop import import_released_ghn2
from pudnet.models.ghn import GHN, fingerprint
from pudnet.nn.decoder import fan_in_scale
from pudnet.nn.graph_encoder import channel_vocabulary, kernel_vocabulary

PARITY = Path(__file__).resolve().parents[2] / "shared" / "parity"


def _error(out: Tensor | np.ndarray, reference: Tensor | np.ndarray) -> float:
    out, reference = torch.as_tensor(out).double(), torch.as_tensor(reference).double()
    assert out.shape == reference.shape
    return ((out - reference).norm() / reference.norm()).item()


@pytest.fixture(scope="module")
def released() -> GHN:
    if not (PARITY / "ghn2_state_dict.npz").is_file():
        pytest.skip(f"the released numbers are not in {PARITY}")
    with np.load(PARITY / "ghn2_state_dict.npz") as state:
        return import_released_ghn2(state, max_shape=(64, 64, 11, 11), num_classes=10)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_agrees_with_the_released_numbers(name: str, released: GHN) -> None:
    with np.load(PARITY / f"ghn2_{name}.npz") as file:
        reference = {key: file[key] for key in file.files}
    with torch.device("meta"):
        module = NETWORKS[name]()
    graph = released.graph(module)
    shaped = [node for node in graph.nodes if node.shape is not None]
    assert [node.primitive for node in graph.nodes] == reference["node_primitive"].tolist()
    assert [node.primitive for node in shaped] == reference["node_name"].tolist()
    named = [(node.label, old) for node, old in zip(shaped, reference["node_param"], strict=True) if "." in old]
    assert all(label == old for label, old in named)
    edges = reference["edges_src_dst_dist"]
    assert np.array_equal(graph.virtual_edges(50), edges[np.lexsort((edges[:, 1], edges[:, 0]))])
    with torch.no_grad():
        assert _error(released.node_states(released.prepare([graph])), reference["node_states"]) < 1e-4
    network = released.predict(module)
    parameters = dict(network.named_parameters())
    assert list(parameters) == reference["param_name"].tolist()
    for k, value in enumerate(parameters.values()):
        flat = value.detach().flatten()
        assert _error(flat[torch.from_numpy(reference["sample_index"][k])], reference["sample_value"][k]) < 1e-4
        if name != "vgg11_bn":  # its 128 million parameters in double take seconds
            statistics = [flat.double().mean(), flat.double().std(correction=0), flat.double().norm()]
            assert np.allclose(statistics, reference["param_mean_std_l2"][k], rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        assert _error(network(torch.from_numpy(reference["input"])), reference["logits"]) < 1e-3
    del network, parameters
    gc.collect()


def small_networks() -> dict[str, nn.Module]:
    return {
        "resnet": ResNet(BasicBlock, (1, 1), width=12),
        "bottleneck": ResNet(Bottleneck, (1, 2), width=20),
        "mobilenet": MobileNetV2(width=0.25),
        "vgg": VGG((7, "M", 18, "M"), hidden=40, pooled=2),
    }


@pytest.mark.parametrize("variant", ["ghn2", "ghn1", "mlp"])
@pytest.mark.parametrize(("width", "s", "classes"), [(8, 11, 10), (12, 16, 37)])
def test_import_agrees_with_the_plain_version(variant: str, width: int, s: int, classes: int) -> None:
    """Needs no released file: random parameters of the released format, and the oracle."""
    state = plain_ghn.released_state(3, width, s, classes, variant)
    ghn = import_released_ghn2(state, max_shape=(2 * width, 2 * width, s, s), num_classes=classes)
    for module in (ResNet(Bottleneck, (1, 2), classes, width=12), VGG((7, "M", 18), classes, hidden=40, pooled=2)):
        graph = trace(module)
        with torch.no_grad():
            expected = plain_ghn.predict(state, graph, s, classes)
        predicted = ghn.generate(module)
        assert list(predicted) == [name for name, _ in module.named_parameters()] == list(expected)
        for name, value in predicted.items():
            assert _error(value, expected[name]) < 1e-5, name


def test_import_refuses_what_does_not_fit() -> None:
    state = plain_ghn.released_state(0)
    with pytest.raises(CheckpointError, match=r"missing \[decoder.fc.0.bias\]"):
        import_released_ghn2({k: v for k, v in state.items() if k != "decoder.fc.0.bias"}, max_shape=(16, 16, 11, 11))
    with pytest.raises(CheckpointError, match="bias_class"):
        import_released_ghn2(state, max_shape=(16, 16, 11, 11), num_classes=20)
    with pytest.raises(InputError, match="max_shape"):
        import_released_ghn2(state, max_shape=(16, 8, 11, 11))


def test_vocabularies() -> None:
    channels, kernels = channel_vocabulary(10), kernel_vocabulary(11)
    assert channels.dummy == 391 and kernels.dummy == 8  # as many rows as the released tables, with the dummy

    def channel(size: int) -> int:
        return channels.sizes[channels.row(size)]

    sizes = [2, 3, 4, 7, 8, 9, 10, 12, 60, 61, 72, 73, 4088, 4089, 20000]
    assert [channel(size) for size in sizes] == [1, 3, 8, 8, 8, 8, 10, 10, 56, 64, 64, 80, 4080, 4096, 8192]
    assert [kernels.sizes[kernels.row(size)] for size in (1, 2, 4, 6, 12, 13, 40)] == [1, 3, 3, 5, 11, 14, 16]


def test_scale_of_the_normalisation() -> None:
    assert fan_in_scale((8, 4, 3, 3)) == pytest.approx((2 / 36) ** 0.5)
    assert fan_in_scale((8, 1, 3, 3)) == pytest.approx((1 / 9) ** 0.5)
    assert fan_in_scale((8, 4, 1, 7)) == pytest.approx((1 / 28) ** 0.5)
    assert fan_in_scale((8, 4, 7, 1)) == pytest.approx((2 / 28) ** 0.5)


@pytest.fixture(scope="module")
def ghn() -> GHN:
    return GHN(width=8, seed=1).eval()


@pytest.mark.parametrize("preset", ["ghn2", "ghn1", "mlp"])
def test_a_batch_equals_its_graphs_one_by_one(preset: str) -> None:
    ghn = GHN(preset, width=8, seed=1)
    graphs = [trace(module) for module in small_networks().values()]
    embedding = torch.randn(len(graphs), 8, generator=torch.Generator().manual_seed(0))
    together = ghn(graphs, embedding)
    for k, graph in enumerate(graphs):
        alone = ghn.generate(graph, embedding=embedding[k : k + 1])
        plain = ghn.generate(graph)
        assert list(together[k]) == list(alone) == [parameter.name for parameter in graph.parameters]
        for name, value in alone.items():
            assert _error(together[k][name].detach(), value) < 1e-5, name
        assert any(_error(plain[name], alone[name]) > 1e-3 for name in plain)  # the embedding matters


def test_gradients_reach_every_parameter_of_the_hypernetwork(ghn: GHN) -> None:
    embedding = torch.zeros(2, 8, requires_grad=True)
    modules = [ResNet(BasicBlock, (1,), width=8), small_networks()["vgg"]]
    losses = []
    for module, parameters in zip(modules, ghn([trace(m) for m in modules], embedding), strict=True):
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        losses.append(torch.func.functional_call(module, parameters, (images,)).square().mean())
    sum(losses).backward()
    try:
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in ghn.parameters())
        assert embedding.grad is not None and bool((embedding.grad.abs().sum(dim=1) > 0).all())
    finally:
        ghn.zero_grad()


def test_out_is_written_in_place(ghn: GHN) -> None:
    module, other = small_networks()["resnet"], GHN(width=8, seed=2)
    first = ghn.generate(module)
    kept = {name: value.clone() for name, value in first.items()}
    addresses = [value.data_ptr() for value in first.values()]
    second = other.generate(module, out=first)
    assert [value.data_ptr() for value in second.values()] == addresses
    assert all(second[name] is first[name] for name in first)
    assert any(not torch.equal(first[name], kept[name]) for name in first)
    ghn.generate(module, out=first)
    assert all(torch.equal(first[name], kept[name]) for name in first)
    strided = {name: torch.zeros(*value.shape, 2)[..., 0] for name, value in kept.items()}
    ghn.generate(module, out=strided)
    assert all(torch.allclose(strided[name], kept[name], rtol=1e-5) for name in kept)


def test_a_result_is_float32_without_leftovers_whatever_the_default(ghn: GHN) -> None:
    module = small_networks()["resnet"]
    wanted = ghn.generate(module)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = ghn.generate(module)
    finally:
        torch.set_default_dtype(before)
    assert {x.dtype for x in found.values()} == {torch.float32}
    ghn.generate(module, out=found)
    storage = next(iter(found.values())).untyped_storage()
    whole = torch.tensor([], dtype=torch.float32).set_(storage)
    assert sum(x.numel() for x in found.values()) < len(whole)
    assert sum(x.count_nonzero() for x in found.values()) == whole.count_nonzero()  # gaps between tensors are zero
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_out_is_checked(ghn: GHN) -> None:
    module = small_networks()["resnet"]
    out = ghn.generate(module)
    name = next(iter(out))
    with pytest.raises(InputError, match="names"):
        ghn.generate(module, out={k: v for k, v in out.items() if k != name})
    with pytest.raises(ShapeError, match=name):
        ghn.generate(module, out={**out, name: out[name].flatten()})
    with pytest.raises(DtypeError, match=name):
        ghn.generate(module, out={**out, name: out[name].double()})


class Vit(nn.Module):
    """Kernels larger than s, position tables, a class token, tables stored as maps, stored transposes."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.zeros(1, 12, 2, 2))
        self.patch = nn.Conv2d(3, 12, 16, 16)
        self.token, self.table = nn.Parameter(torch.zeros(1, 1, 12)), nn.Parameter(torch.zeros(1, 5, 12))
        self.norm, self.out = nn.LayerNorm(12), nn.Parameter(torch.zeros(12, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = (self.patch(x) + self.map).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.table
        return self.norm(x)[:, 0] @ self.out


def test_unusual_parameters_agree_between_the_two_paths(ghn: GHN) -> None:
    module = Vit()
    graph = trace(module)
    fast, plain = ghn.generate(module), ghn([graph])[0]
    assert {name: value.shape for name, value in fast.items()} == {n: p.shape for n, p in module.named_parameters()}
    for name in fast:
        assert _error(plain[name].detach(), fast[name]) < 1e-5, name
    assert float(fast["patch.weight"].std()) > 0
    assert torch.isfinite(ghn.predict(module)(torch.randn(2, 3, 32, 32))).all()


def test_transposed_convolutions_are_decoded_as_convolutions(ghn: GHN) -> None:
    """With kernels of one pixel both are the same map, and both graphs are the same: so must the outputs be."""
    x = torch.randn(2, 6, 4, 4)
    for groups in (1, 2, 6):
        down, up = (layer(6, 12, 1, groups=groups) for layer in (nn.Conv2d, nn.ConvTranspose2d))
        outputs = []
        for layer in (down, up):
            net = nn.Sequential(layer, nn.PReLU())
            for parameters in (ghn.generate(net), ghn([trace(net, (6, 4, 4))])[0]):
                assert {name: value.shape for name, value in parameters.items()} == {
                    name: value.shape for name, value in net.named_parameters()
                }
                outputs.append(torch.func.functional_call(net, parameters, (x,)).detach())
        assert float(outputs[0].std()) > 0
        for other in outputs[1:]:
            torch.testing.assert_close(other, outputs[0])


def test_predict_makes_an_independent_copy(ghn: GHN) -> None:
    module = small_networks()["resnet"].train()
    module.conv1.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    network = ghn.predict(module)
    assert module.training and not network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    expected = ghn.generate(module)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network.named_parameters())
    assert [p.requires_grad for p in network.parameters()] == [p.requires_grad for p in module.parameters()]
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert not torch.allclose(network(images)[:4], network(images[:4]))  # batch statistics
        calibrated = ghn.predict(module, "calibrated", images)
        assert torch.allclose(calibrated(images), network(images), rtol=1e-3, atol=1e-4)
        assert torch.allclose(calibrated(images)[:4], calibrated(images[:4]), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="images"):
        ghn.predict(module, "calibrated")
    with torch.device("meta"):
        unallocated = small_networks()["resnet"]
    with torch.no_grad():
        assert torch.allclose(ghn.predict(unallocated)(images), network(images), rtol=1e-4, atol=1e-5)


def test_one_trace_for_modules_built_alike(ghn: GHN, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("pudnet.models.ghn.trace", lambda *a: calls.append(a) or trace(*a))
    ghn = GHN(width=8)
    first, second = ghn.graph(small_networks()["resnet"]), ghn.graph(small_networks()["resnet"])
    assert first is second and len(calls) == 1
    wider = ResNet(BasicBlock, (1, 1), width=16)
    assert ghn.graph(wider) is not first and len(calls) == 2


class Branching(nn.Module):
    def __init__(self, option: object) -> None:
        super().__init__()
        self.conv, self.option = nn.Conv2d(3, 3, 1), option

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x if self.option else self.conv(x)


def test_an_attribute_that_steers_the_forward_makes_another_graph(ghn: GHN) -> None:
    assert len(ghn.graph(Branching(True)).nodes) == 4 and len(ghn.graph(Branching(False)).nodes) == 3
    assert fingerprint(Branching([1])) is None  # a list may change unseen: traced anew
    with_parameter, with_buffer = nn.Module(), nn.Module()
    with_parameter.register_parameter("scale", nn.Parameter(torch.ones(2)))
    with_buffer.register_buffer("scale", torch.ones(2))
    assert fingerprint(with_parameter) != fingerprint(with_buffer)
    module = Branching([1])
    assert len(ghn.graph(module).nodes) == 4
    module.option.clear()  # type: ignore[attr-defined]
    assert len(ghn.graph(module).nodes) == 3


def test_parameters_the_forward_does_not_use() -> None:
    class Spare(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](x)

    module, ghn = Spare(nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)), GHN(width=8)
    with pytest.raises(InputError, match=r"no use of 1.weight, 1.bias"):
        ghn.generate(module)
    assert list(ghn.generate(module, partial=True)) == ["0.weight", "0.bias"]
    network = ghn.predict(module, partial=True)
    assert torch.equal(network[1].weight, module[1].weight) and not torch.equal(network[0].weight, module[0].weight)


def test_classifiers_of_another_size_are_ordinary_weights(ghn: GHN) -> None:
    ten, other = (nn.Sequential(nn.Flatten(), nn.Linear(3072, classes)) for classes in (10, 12))
    graph = trace(other)
    assert ghn.decoder.plan([trace(ten)]).classifiers and not ghn.decoder.plan([graph]).classifiers
    assert ghn.generate(other)["1.weight"].shape == (12, 3072)


def test_save_and_load(ghn: GHN, tmp_path: Path) -> None:
    module, path = small_networks()["mobilenet"], tmp_path / "ghn.safetensors"
    ghn.save(path, card={"note": "x"})
    loaded = GHN.from_pretrained(path)
    assert loaded.config == ghn.config and loaded.card == {"note": "x"} and not loaded.training
    expected, found = ghn.generate(module), loaded.generate(module)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    ghn.save(path, half=True)
    half = GHN.load(path).generate(module)
    assert all(_error(half[name], expected[name]) < 2e-2 for name in expected)
    checkpoint.save(path, "predictor", {}, {"x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="ghn"):
        GHN.load(path)
    with pytest.raises(InputError, match=r"GHN\.from_pretrained"):
        GHN.from_pretrained("no-such-name")


@pytest.mark.parametrize(
    "make",
    [
        lambda: GHN("ghn9"),
        lambda: GHN(depth=3),
        lambda: GHN(width=6),
        lambda: GHN(largest=12),
        lambda: GHN(encoder="rnn"),
        lambda: GHN(virtual_edges=0),
        lambda: GHN(width=8).prepare([]),
        lambda: GHN(width=8)([trace(nn.Conv2d(3, 8, 1))], torch.zeros(2, 8)),
    ],
)
def test_bad_settings(make: Callable[[], object]) -> None:
    with pytest.raises(InputError):
        make()


def test_seed_decides_and_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    a, b, c = GHN(width=8, seed=3), GHN(width=8, seed=3), GHN(width=8, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.decoder.fc_weight, c.decoder.fc_weight)
    assert pudnet.GHN is GHN
