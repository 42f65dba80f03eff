"""Graph capture: what networks become, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet.errors import DtypeError, InputError, ShapeError
from pudnet.graphs import ArchGraph, trace
from pudnet.targets.unet import UNet


class Net(nn.Module):
    """Layers by name, and the forward given."""

    def __init__(self, forward: Callable[..., object], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = forward

    def forward(self, x: Tensor) -> object:
        return self.run(self, x)


def primitives(graph: ArchGraph) -> list[str]:
    return [node.primitive for node in graph.nodes]


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))


def head(features: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, 10))


def test_a_chain() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.MaxPool2d((2, 3)), head()
    )
    graph = trace(net)
    assert primitives(graph) == ["input", "conv", "bn", "max_pool", "glob_avg", "conv", "bias"]
    assert graph.edges == tuple((k, k + 1) for k in range(6))
    assert [node.shape for node in graph.nodes] == [
        None, (8, 3, 3, 3), (8, 1, 1, 1), (1, 1, 2, 3), None, (10, 8, 1, 1), (10, 1, 1, 1),
    ]  # fmt: skip
    assert [p.name for p in graph.parameters] == [name for name, _ in net.named_parameters()]
    assert [(p.kind, p.node) for p in graph.parameters] == [
        ("weight", 1), ("scale", 2), ("bias", 2), ("weight", 5), ("bias", 6),
    ]  # fmt: skip
    assert graph.num_parameters == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("conv", "primitive"),
    [
        (nn.Conv2d(8, 8, 3), "conv"),
        (nn.Conv2d(8, 8, 3, dilation=2), "conv"),
        (nn.Conv2d(8, 8, 3, groups=4), "sep_conv"),
        (nn.Conv2d(8, 8, 3, groups=8, dilation=2), "dil_conv"),
        (nn.Linear(8, 8), "conv"),
        (nn.ConvTranspose2d(8, 8, 3), "conv"),
        (nn.ConvTranspose2d(8, 8, 3, groups=2), "sep_conv"),
    ],
)
def test_kinds_of_convolution(conv: nn.Module, primitive: str) -> None:
    assert primitives(trace(conv, (8, 16, 16))) == ["input", primitive, "bias"]


def test_functional_calls_give_the_same_graph_as_modules() -> None:
    def functional(net: Net, x: Tensor) -> Tensor:
        x = F.relu(F.batch_norm(F.conv2d(x, net.w), None, None, net.g, net.b, training=True))
        x = F.avg_pool2d(F.max_pool2d(x, 2), kernel_size=2)
        return F.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1), net.v, bias=net.c)

    net = Net(functional, w=parameter(8, 3, 3, 3), g=parameter(8), b=parameter(8), v=parameter(10, 8), c=parameter(10))
    modules = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.MaxPool2d(2), nn.AvgPool2d(2), head())
    graph, reference = trace(net), trace(modules)
    assert primitives(graph) == primitives(reference) and graph.edges == reference.edges
    assert [node.shape for node in graph.nodes] == [node.shape for node in reference.nodes]
    assert [(p.kind, p.node) for p in graph.parameters] == [(p.kind, p.node) for p in reference.parameters]


def test_a_mean_over_positions_is_a_pooling_and_one_over_channels_is_not() -> None:
    for reduce in (lambda x: x.mean([2, 3]), lambda x: x.mean((-2, -1)), lambda x: torch.mean(x, dim=(2, 3))):
        net = Net(lambda net, x, reduce=reduce: reduce(net.c(x)), c=nn.Conv2d(3, 8, 3))
        assert primitives(trace(net)) == ["input", "conv", "bias", "glob_avg"]
    convs = {name: nn.Conv2d(3, 8, 3) for name in ("c", "d")}
    channels = Net(lambda net, x: net.c(x) - net.d(x).mean(1, keepdim=True), **convs)
    assert "glob_avg" not in primitives(trace(channels))


def test_sums_and_concatenations() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        x = x + net.b(F.relu(x))
        x += x  # the same place twice: nothing meets
        return torch.cat([x, net.b2(x), x], dim=1)

    convs = {name: nn.Conv2d(3 if name == "a" else 8, 8, 1, bias=False) for name in ("a", "b", "b2")}
    graph = trace(Net(forward, **convs))
    assert primitives(graph) == ["input", "conv", "conv", "sum", "conv", "concat"]
    assert graph.edges == ((0, 1), (1, 2), (1, 3), (2, 3), (3, 4), (3, 5), (4, 5))


def test_nodes_are_ordered_by_level_and_then_by_call() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        long = net.b(net.a(x))
        return long + net.c(x)

    convs = {name: nn.Conv2d(3, 3, 1, bias=False) for name in "abc"}
    graph = trace(Net(forward, **convs))
    assert [node.label for node in graph.nodes] == ["input", "a.weight", "c.weight", "b.weight", ""]
    assert graph.levels.tolist() == [0, 1, 1, 2, 3] and graph.heights.tolist() == [3, 2, 1, 1, 0]
    edges = graph.virtual_edges(50)
    assert sorted(map(tuple, edges.tolist())) == [
        (0, 1, 1), (0, 2, 1), (0, 3, 2), (0, 4, 2), (1, 3, 1), (1, 4, 2), (2, 4, 1), (3, 4, 1),
    ]  # fmt: skip
    assert graph.virtual_edges(1)[:, 2].tolist() == [1] * 5


def test_squeeze_and_excitation() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        gate = torch.sigmoid(net.up(F.relu(net.down(x.mean((2, 3), keepdim=True)))))
        return x * gate

    graph = trace(Net(forward, down=nn.Conv2d(8, 2, 1), up=nn.Conv2d(2, 8, 1)), (8, 4, 4))
    assert primitives(graph) == ["input", "glob_avg", "conv", "bias", "conv", "bias", "cse"]
    assert (0, 6) in graph.edges and (5, 6) in graph.edges


def test_gates_made_of_the_same_place_are_activations() -> None:
    graph = trace(Net(lambda net, x: (y := net.c(x)) * torch.sigmoid(y), c=nn.Conv2d(3, 8, 1, bias=False)))
    assert primitives(graph) == ["input", "conv"]


class Attention(nn.Module):
    def __init__(self, width: int, fused: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.heads, self.fused = nn.Linear(width, 3 * width), nn.Linear(width, width), 2, fused

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = ((q @ k.transpose(-2, -1)) * (width // self.heads) ** -0.5).softmax(dim=-1) @ v
        return self.out(x.transpose(1, 2).reshape(n, tokens, width))


@pytest.mark.parametrize("fused", [True, False])
def test_attention_however_it_is_written(fused: bool) -> None:
    graph = trace(Attention(8, fused), (5, 8))
    assert primitives(graph) == ["input", "conv", "bias", "msa", "conv", "bias"]
    assert graph.edges == tuple((k, k + 1) for k in range(5))
    net = Net(lambda net, x: net.a(x, x, x, need_weights=False)[0], a=nn.MultiheadAttention(8, 2, batch_first=True))
    module = trace(net, (5, 8))
    assert primitives(module) == primitives(graph)
    assert [p.name for p in module.parameters] == [name for name, _ in net.named_parameters()]


def test_position_tables_and_class_tokens() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.patch(x).flatten(2).transpose(1, 2)  # [n, 16, 8]
        x = torch.cat([net.token.expand(x.shape[0], -1, -1), x], dim=1) + net.table
        return net.head(net.norm(x)[:, 0])

    net = Net(
        forward, patch=nn.Conv2d(3, 8, 8, 8, bias=False), token=parameter(1, 1, 8), table=parameter(1, 17, 8),
        norm=nn.LayerNorm(8), head=nn.Linear(8, 10),
    )  # fmt: skip
    graph = trace(net)
    assert sorted(primitives(graph)) == sorted(["input", "pos_enc", "conv", "concat", "pos_enc", "ln", "conv", "bias"])
    shapes = {node.label: node.shape for node in graph.nodes}
    assert shapes["table"] == (1, 8, 5, 5) and shapes["token"] == (1, 8, 1, 1)


def test_factors_biases_and_stored_transposes() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return (net.scale[:, None, None] * x + net.shift.view(1, -1, 1, 1)).mean((2, 3)) @ net.w

    graph = trace(Net(forward, scale=parameter(3), shift=parameter(3), w=parameter(3, 10)))
    assert primitives(graph) == ["input", "ln", "bias", "glob_avg", "conv"]
    assert [(p.name, p.kind, p.transposed) for p in graph.parameters] == [
        ("scale", "scale", False), ("shift", "bias", False), ("w", "weight", True),
    ]  # fmt: skip
    assert graph.nodes[4].shape == (10, 3, 1, 1)


def test_transposed_convolutions_have_the_shape_of_convolutions() -> None:
    up = nn.ConvTranspose2d(6, 4, (2, 5), stride=2, groups=2, bias=False)
    forward = lambda net, x: F.conv_transpose2d(x, net.up.weight, None, 2, 0, 0, 2)  # noqa: E731
    for net in (Net(lambda net, x: net.up(x), up=up), Net(forward, up=up)):
        graph = trace(net, (6, 8, 8))
        assert primitives(graph) == ["input", "sep_conv"]
        assert graph.nodes[1].shape == (4, 3, 2, 5)
        assert (graph.parameters[0].shape, graph.parameters[0].transposed) == ((6, 2, 2, 5), True)
    both = Net(lambda net, x: F.conv_transpose2d(net.c(x), net.c.weight), c=nn.Conv2d(3, 3, 3))
    with pytest.raises(InputError, match=r"whose weight or bias|used both"):
        trace(both)


def test_the_unet_preset() -> None:
    graph = trace(UNet(width=4, depth=2))
    assert graph.unpredicted == ()
    assert sum(parameter.transposed for parameter in graph.parameters) == 5
    assert primitives(graph).count("concat") == 2


def test_learned_slopes_are_decoded_like_biases() -> None:
    for layer, size in ((nn.PReLU(), 1), (nn.PReLU(8), 8)):
        by_hand = Net(lambda net, x: F.prelu(net.c(x), net.a.weight), c=nn.Conv2d(3, 8, 3, bias=False), a=layer)
        for net in (by_hand, nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), layer)):
            graph = trace(net)
            assert primitives(graph) == ["input", "conv", "bias"]
            assert graph.parameters[1].kind == "bias"
            assert graph.nodes[2].shape == (size, 1, 1, 1)


def test_one_module_called_twice_is_two_nodes_and_one_parameter() -> None:
    graph = trace(Net(lambda net, x: net.c(F.relu(net.c(x))), c=nn.Conv2d(3, 3, 3, bias=False)))
    assert primitives(graph) == ["input", "conv", "conv"]
    assert [(p.name, p.node) for p in graph.parameters] == [("c.weight", 1)]


def test_shapes_may_steer_the_forward() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        n, _, h, _ = x.shape
        if h > 16 and x.size(1) == 3 and x.ndim == 4 and len(x) > 1:
            x = net.big(x)
        a, b = x.chunk(2, dim=1)
        return (a + b).view(n, -1)

    assert primitives(trace(Net(forward, big=nn.Conv2d(3, 8, 3)))) == ["input", "conv", "bias"]
    assert primitives(trace(Net(forward, big=nn.Conv2d(3, 8, 3)), (4, 8, 8))) == ["input"]


def test_shapes_are_worked_out_once_each() -> None:
    """Sixty sums in a row have 2^60 paths."""

    def forward(net: Net, x: Tensor) -> Tensor:
        for _ in range(60):
            x = x + net.c(F.relu(x))
        return x.reshape(x.shape[0], -1)

    graph = trace(Net(forward, c=nn.Conv2d(3, 3, 1, bias=False)))
    assert primitives(graph).count("sum") == 60


def test_unused_parameters_are_named() -> None:
    net = Net(lambda net, x: net.a(x), a=nn.Conv2d(3, 8, 1, bias=False), b=nn.Conv2d(3, 8, 1, bias=False))
    assert trace(net).unpredicted == ("b.weight",)


def test_the_module_is_not_changed_and_may_be_on_the_meta_device() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), head()).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    call, get = nn.Module.__call__, nn.Module.__getattr__
    with torch.no_grad():
        graph = trace(net)
    assert nn.Module.__call__ is call and nn.Module.__getattr__ is get
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items()) and net.training
    assert trace(net.to("meta")) == graph
    assert not torch.is_grad_enabled() or trace(net) == graph


def test_distances_agree_with_breadth_first_search() -> None:
    graph = trace(Net(
        lambda net, x: (y := net.a(x)) + net.c(net.b(y)) + net.d(x), **{k: nn.Conv2d(3, 3, 1) for k in "abcd"}
    ))  # fmt: skip
    n = len(graph.nodes)
    for source in range(n):
        reached, frontier, steps = {source: 0}, [source], 0
        while frontier:
            steps += 1
            frontier = sorted({d for s, d in graph.edges if s in frontier} - set(reached))
            reached |= {node: steps for node in frontier}
        expected = [reached.get(node, np.inf) for node in range(n)]
        assert graph.distances[source].tolist() == expected


# Refusals.


def test_every_unknown_operation_is_listed_with_its_place() -> None:
    inner = Net(lambda net, x: torch.cumsum(x, 1))
    net = Net(lambda net, x: torch.fft.fft(net.inner(x)).real, inner=inner)
    with pytest.raises(InputError, match=r"cumsum in 'inner'.*fft_fft") as error:
        trace(net)
    assert str(error.value).startswith("graphs.trace: ")
    with pytest.raises(InputError, match="conv3d in '0'"):
        trace(nn.Sequential(nn.Conv3d(3, 8, 3)), (3, 4, 4, 4))
    with pytest.raises(InputError, match="embedding in 'words'"):
        trace(Net(lambda net, x: net.words(x.long()), words=nn.Embedding(5, 8)), (7,))


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: x if x.sum() > 0 else -x,
        lambda net, x: x * float(x.mean()),
        lambda net, x: x * x.max().item() if x.sum().item() else x,
        lambda net, x: sum([x] * int(x.sum())),
    ],
)
def test_control_flow_on_numbers(forward: Callable[..., object]) -> None:
    with pytest.raises(InputError, match="numbers"):
        trace(Net(lambda net, x: net.inner(x), inner=Net(forward)))


@pytest.mark.parametrize(
    "forward", [lambda net, x: (x, x), lambda net, x: {"out": x}, lambda net, x: 3, lambda net, x: x.chunk(3, 1)]
)
def test_outputs_that_are_not_a_tensor(forward: Callable[..., object]) -> None:
    with pytest.raises(InputError, match="returns one tensor"):
        trace(Net(forward))


def test_bad_parameters_and_arguments() -> None:
    tied = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False))
    tied[1].weight = tied[0].weight
    with pytest.raises(InputError, match=r"'0.weight' and '1.weight'"):
        trace(tied)
    viewed = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False))
    viewed[1].weight = nn.Parameter(viewed[0].weight.detach())
    with pytest.raises(InputError, match=r"'0.weight' and '1.weight'"):
        trace(viewed)
    with pytest.warns(UserWarning), pytest.raises(InputError, match="at least one element"):
        trace(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Linear(0, 8)))
    with pytest.raises(DtypeError, match="floating"):
        trace(Net(lambda net, x: x, w=nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)))
    with pytest.raises(DtypeError, match="floating"):
        trace(Net(lambda net, x: x, w=nn.Parameter(torch.zeros(3, dtype=torch.complex64))))
    with pytest.raises(InputError, match="lazy"):
        trace(nn.Sequential(nn.LazyConv2d(8, 3)))
    with pytest.raises(DtypeError, match=r"nn\.Module"):
        trace(torch.relu)  # type: ignore[arg-type]
    for shape in ((), (3, 0, 32), (3.0, 32, 32)):
        with pytest.raises(ShapeError, match="input_shape"):
            trace(nn.Conv2d(3, 8, 1), shape)  # type: ignore[arg-type]


def test_two_inputs_and_reparametrised_weights() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    with pytest.raises(InputError, match="forward takes one tensor"):
        trace(Two())
    with pytest.raises(InputError, match="not one parameter"):
        trace(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))))


def test_an_error_inside_the_forward_tells_where() -> None:
    inner = Net(lambda net, x: x[{"a": 1}] + undefined)  # type: ignore[name-defined]  # noqa: F821
    with pytest.raises(InputError, match="in 'inner'"):
        trace(Net(lambda net, x: net.inner(x), inner=inner))
