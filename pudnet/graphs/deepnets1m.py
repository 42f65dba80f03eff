"""The space of random architectures DeepNets-1M, drawn one by one instead of read from a file.

A network is a stem, a chain of cells of two kinds (normal; reduction at 1/3 and 2/3 of the depth), pooling, and a
classifier. A cell sums the outputs of two random operations on earlier states in each of its nodes and concatenates the
nodes (DARTS). Network ``index`` of a split is a function of (split, seed, index) alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet.errors import InputError, message
from pudnet.graphs.graph import ArchGraph
from pudnet.graphs.predefined import ResNet50, SelfAttention, ViT
from pudnet.graphs.tracing import trace

OPERATIONS = (
    "none", "max_pool_3x3", "avg_pool_3x3", "skip", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5",
    "conv_1x1", "conv_7x1_1x7", "conv_3x3", "conv_5x5", "conv_7x7", "msa", "cse",
)  # fmt: skip
LARGE = frozenset({"conv_5x5", "conv_7x7"})
WITHOUT_WEIGHTS = frozenset({"none", "max_pool_3x3", "avg_pool_3x3", "skip"})
CONVOLUTIONS = frozenset(name for name in OPERATIONS if "conv" in name)
MOST_PARAMETERS = 10_000_000
MOST_DRAWS = 500  # most settings need fewer than 20
SHALLOW = 10  # cells, at most, of a network without BatchNorm
WIDTHS = (16, 32, 64)
STEMS = (0, 1)

# Nodes per network as published (mean, standard deviation), and networks in the split.
PUBLISHED = {"train": (192, 95), "deep": (391, 177), "dense": (355, 182), "bnfree": (135, 78)}
SIZES = {"train": 1_000_000, "val": 500, "test": 500, "wide": 100, "deep": 100, "dense": 100, "bnfree": 100,
         "predefined": 2}  # fmt: skip


@dataclass(frozen=True)
class Edge:
    """One operation of a cell's node, on an earlier state (0 and 1 are the outputs of the two cells before)."""

    operation: str
    source: int


Cell = tuple[tuple[Edge, Edge], ...]


@dataclass(frozen=True)
class Genotype:
    """Everything that determines a network but its classes and image size."""

    normal: Cell
    reduction: Cell
    cells: int
    channels: int
    growth: int  # channels are multiplied by it at each reduction
    stem_kernel: int
    stem_type: int  # 0: a convolution; 1: with stride 2 and a max-pool
    fc_layers: int
    global_pooling: bool
    batch_norm: bool


@dataclass(frozen=True)
class Choices:
    """What may be restricted to get light networks; see ``deepnets``."""

    widths: tuple[int, ...]
    most_cells: int
    stems: tuple[int, ...]


@dataclass(frozen=True)
class DeepNet:
    """One architecture of the space.

    Attributes:
        name: split and index.
        genotype: None for the predefined ones.
    """

    name: str
    genotype: Genotype | None
    make: Callable[[], nn.Module]
    image_size: int

    @cached_property
    def module(self) -> nn.Module:
        """The network on the meta device: shapes without numbers."""
        with torch.device("meta"):
            return self.make()

    @cached_property
    def graph(self) -> ArchGraph:
        return trace(self.module, (3, self.image_size, self.image_size))

    def build(self, seed: int = 0) -> nn.Module:
        """The network with PyTorch's default initialisation."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make()


def deepnets(
    split: str,
    n: int | None = None,
    seed: int = 0,
    *,
    start: int = 0,
    classes: int = 10,
    image_size: int = 32,
    widths: Sequence[int] = WIDTHS,
    most_parameters: int = MOST_PARAMETERS,
    most_cells: int | None = None,
    stems: Sequence[int] = STEMS,
) -> Iterator[DeepNet]:
    """Yield architectures ``start`` .. ``start + n - 1`` of a split.

    Args:
        split: one of ``SIZES``: ``"train"``, ``"val"``, ``"test"``, ``"wide"``, ``"deep"``, ``"dense"``, ``"bnfree"``,
            ``"predefined"``.
        n: how many; None for all up to the published size of the split.
        seed: of the whole space.
        start: index of the first; any network can be had alone.
        classes: outputs of the networks.
        image_size: side of the square images.
        widths: initial channels to choose from (times four in ``"wide"``); fewer make light networks.
        most_parameters: larger networks are rejected.
        most_cells: networks have no more cells; None for the split's own limit.
        stems: stem types to choose from; only 1 (a quarter of the side from the start) makes networks cheap to run.

    Raises:
        InputError: no split has that name; ``n`` or ``start`` is negative; the split has fewer networks; ``most_cells``
            is below the least of the split; no ``stems``, or unknown ones; while iterating: ``most_parameters`` rejects
            every network.
    """
    where = "graphs.deepnets"
    if split not in SIZES:
        raise InputError(message(where, "split", f"one of {sorted(SIZES)}", repr(split)))
    n = SIZES[split] - start if n is None else n
    if n < 0 or start < 0:
        raise InputError(message(where, "n and start", "not negative", (n, start)))
    if start + n > SIZES[split]:
        raise InputError(message(where, "n", f"at most {SIZES[split] - start} for {split!r}", n))
    least, most = cell_range(split)
    most_cells = most if most_cells is None else most_cells
    if most_cells < least:
        raise InputError(message(where, "most_cells", f"at least {least} for {split!r}", most_cells))
    if not stems or not set(stems) <= set(STEMS):
        raise InputError(message(where, "stems", f"some of {list(STEMS)}", list(stems)))
    choices = Choices(tuple(widths), min(most, most_cells), tuple(stems))
    return _networks(split, n, seed, start, classes, image_size, choices, most_parameters)


def _networks(
    split: str, n: int, seed: int, start: int, classes: int, size: int, choices: Choices, most: int
) -> Iterator[DeepNet]:
    for index in range(start, start + n):
        if split == "predefined":
            kind = (ResNet50, ViT)[index]
            yield DeepNet(kind.__name__, None, partial(kind, classes=classes, image_size=size), size)
            continue
        yield _first_valid(split, seed, index, classes, size, choices, most)


def _first_valid(split: str, seed: int, index: int, classes: int, size: int, choices: Choices, most: int) -> DeepNet:
    draw = random.Random(f"deepnets/{split}/{seed}/{index}")
    for _ in range(MOST_DRAWS):
        genotype = sample(split, draw, choices)
        if not _is_valid(genotype.normal, genotype.reduction):
            continue
        found = DeepNet(f"{split}-{index}", genotype, partial(Network, genotype, classes, size), size)
        count = sum(p.numel() for p in found.module.parameters())
        # A cell that no later one reads is disconnected: its parameters do not reach the output.
        if count <= most * (4 if split == "wide" else 1) and not found.graph.unpredicted:
            return found
    rule = f"large enough for networks of widths {list(choices.widths)}"
    raise InputError(message("graphs.deepnets", "most_parameters", rule, most))


def cell_range(split: str) -> tuple[int, int]:
    """Fewest and most cells of a split's networks."""
    return (10, 36) if split == "deep" else (4, 18)


def sample(split: str, draw: random.Random, choices: Choices) -> Genotype:
    """Draw a genotype; it may be one that the space rejects."""
    least_nodes, most_nodes = (2, 10) if split == "dense" else (1, 4)
    cells = draw.randint(cell_range(split)[0], choices.most_cells)
    nodes = draw.randint(least_nodes, most_nodes)
    batch_norm = split != "bnfree" and (cells > SHALLOW or draw.random() < 0.8)
    return Genotype(
        normal=_cell(draw, nodes),
        reduction=_cell(draw, nodes),
        cells=cells,
        channels=draw.choice(choices.widths) * (4 if split == "wide" else 1),
        growth=draw.choice((1, 2)),
        stem_kernel=draw.choice((3, 5, 7)),
        stem_type=draw.choice(choices.stems),
        fc_layers=draw.choice((1, 2)),
        global_pooling=draw.random() < 0.9,
        batch_norm=batch_norm,
    )


def _cell(draw: random.Random, nodes: int) -> Cell:
    def edge(node: int) -> Edge:
        return Edge(draw.choice(OPERATIONS), draw.randrange(node + 2))

    return tuple((edge(node), edge(node)) for node in range(nodes))


def _is_valid(*cells: Cell) -> bool:
    for cell in cells:
        operations = [edge.operation for node in cell for edge in node]
        if sum(name == "cse" for name in operations) > 1 or sum(name in LARGE for name in operations) > 1:
            return False
        if "cse" in operations and not CONVOLUTIONS.intersection(operations):
            return False
        if any(all(edge.operation == "none" for edge in node) for node in cell):  # a node without inputs
            return False
    return any(edge.operation not in WITHOUT_WEIGHTS for cell in cells for node in cell for edge in node)


def _norm(channels: int, batch_norm: bool) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels)] if batch_norm else []


def _relu_conv(
    channels: int, out: int, kernel: int | tuple[int, int], stride: int | tuple[int, int] = 1, dilation: int = 1,
    groups: int = 1,
) -> list[nn.Module]:  # fmt: skip
    sides = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (dilation * (sides[0] // 2), dilation * (sides[1] // 2))
    return [nn.ReLU(), nn.Conv2d(channels, out, sides, stride, padding, dilation, groups, bias=False)]


def _operation(name: str, c: int, stride: int, batch_norm: bool) -> nn.Module:
    """One operation that keeps the channels and divides the side by ``stride``."""
    norm = partial(_norm, c, batch_norm)
    kind, _, size = name.rpartition("_")
    kernel = int(size[0]) if "x" in size else 0
    if name == "skip":
        return nn.Identity() if stride == 1 else FactorizedReduce(c, c, batch_norm)
    if kind == "max_pool":
        return nn.MaxPool2d(3, stride, 1)
    if kind == "avg_pool":
        return nn.AvgPool2d(3, stride, 1, count_include_pad=False)
    if kind in ("sep_conv", "dil_conv"):
        depthwise = _relu_conv(c, c, kernel, stride, dilation=2 if kind == "dil_conv" else 1, groups=c)
        return nn.Sequential(*depthwise, nn.Conv2d(c, c, 1, bias=False), *norm())
    if name == "conv_7x1_1x7":
        across = nn.Conv2d(c, c, (1, 7), (1, stride), (0, 3), bias=False)
        return nn.Sequential(nn.ReLU(), across, nn.Conv2d(c, c, (7, 1), (stride, 1), (3, 0), bias=False), *norm())
    if kind == "conv":
        return nn.Sequential(*_relu_conv(c, c, kernel, stride), *norm())
    return Attention2d(c, stride) if name == "msa" else ChannelExcitation(c, stride)


class FactorizedReduce(nn.Module):
    """Half the side by two 1x1 convolutions on shifted grids."""

    def __init__(self, inputs: int, out: int, batch_norm: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, out // 2, 1, 2, bias=False)
        self.second = nn.Conv2d(inputs, out - out // 2, 1, 2, bias=False)
        self.norm = nn.Sequential(*_norm(out, batch_norm))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        shifted = F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
        return self.norm(torch.cat([self.first(x), self.second(shifted)], dim=1))


class Attention2d(nn.Module):
    """Self-attention over positions."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride, self.norm = stride, nn.LayerNorm(channels)
        self.attention = SelfAttention(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = F.max_pool2d(x, self.stride, ceil_mode=True)
        tokens = self.attention(self.norm(x.flatten(2).transpose(1, 2)))
        return tokens.transpose(1, 2).reshape(x.shape)


class ChannelExcitation(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride, hidden = stride, max(4, channels // 4)
        self.down, self.up = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = F.max_pool2d(x, self.stride, ceil_mode=True)
        gate = F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))
        return x * torch.sigmoid(self.up(gate))


class CellModule(nn.Module):
    """One cell.

    Args:
        inputs: channels of the outputs of the two cells before.
        channels: of each node.
        halved: the cell before the last was twice as large.
    """

    def __init__(
        self, cell: Cell, inputs: tuple[int, int], channels: int, reduction: bool, halved: bool, batch_norm: bool
    ) -> None:
        super().__init__()
        used = {edge.source for node in cell for edge in node if edge.operation != "none"}
        self.sources = tuple(tuple(e.source for e in node if e.operation != "none") for node in cell)
        self.entry = nn.ModuleList()
        for k in (0, 1):  # only those that are read, so that every parameter is used
            layers: list[nn.Module] = []
            if k in used:
                reduce = halved and k == 0
                layers = (
                    [FactorizedReduce(inputs[k], channels, batch_norm)]
                    if reduce
                    else [*_relu_conv(inputs[k], channels, 1), *_norm(channels, batch_norm)]
                )
            self.entry.append(nn.Sequential(*layers))
        self.operations = nn.ModuleList(
            nn.ModuleList(
                _operation(edge.operation, channels, 2 if reduction and edge.source < 2 else 1, batch_norm)
                for edge in node
                if edge.operation != "none"
            )
            for node in cell
        )

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        states = [self.entry[0](before), self.entry[1](last)]
        for sources, operations in zip(self.sources, self.operations, strict=True):
            assert isinstance(operations, nn.ModuleList)
            parts = [operation(states[source]) for source, operation in zip(sources, operations, strict=True)]
            states.append(parts[0] + parts[1] if len(parts) == 2 else parts[0])
        return torch.cat(states[2:], dim=1)


class Network(nn.Module):
    """The network of a genotype."""

    def __init__(self, genotype: Genotype, classes: int, image_size: int) -> None:
        super().__init__()
        g, channels = genotype, genotype.channels
        stem = [
            nn.Conv2d(3, channels, g.stem_kernel, 1 + g.stem_type, g.stem_kernel // 2, bias=False),
            *_norm(channels, g.batch_norm),
        ]
        side = image_size
        if g.stem_type == 1:
            stem += [nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
            side = -(-side // 4)
        self.stem = nn.Sequential(*stem)
        self.cells = nn.ModuleList()
        inputs, halved = (channels, channels), False
        for k in range(g.cells):
            reduction = k in (g.cells // 3, 2 * g.cells // 3)
            if reduction:
                channels *= g.growth
                side = -(-side // 2)
            cell = g.reduction if reduction else g.normal
            self.cells.append(CellModule(cell, inputs, channels, reduction, halved, g.batch_norm))
            inputs, halved = (inputs[1], channels * len(cell)), reduction
        features = inputs[1] * (1 if g.global_pooling else side * side)
        self.global_pooling = g.global_pooling
        hidden = [nn.Linear(features, inputs[1]), nn.ReLU()] if g.fc_layers == 2 else []
        self.classifier = nn.Sequential(*hidden, nn.Linear(inputs[1] if hidden else features, classes))

    def forward(self, x: Tensor) -> Tensor:
        before = last = self.stem(x)
        for cell in self.cells:
            before, last = last, cell(before, last)
        last = F.adaptive_avg_pool2d(last, 1) if self.global_pooling else last
        return self.classifier(last.flatten(1))


def statistics(split: str, n: int, seed: int = 0) -> dict[str, Any]:
    """Nodes and parameters of ``n`` networks of a split, beside the published numbers where there are any."""
    graphs = [network.graph for network in deepnets(split, n, seed)]
    nodes = np.array([len(graph.nodes) for graph in graphs])
    parameters = np.array([graph.num_parameters for graph in graphs])
    mean, deviation = PUBLISHED.get(split, (None, None))
    return {
        "split": split,
        "networks": n,
        "nodes": float(nodes.mean()),
        "nodes deviation": float(nodes.std()),
        "nodes min": int(nodes.min()),
        "nodes max": int(nodes.max()),
        "published nodes": mean,
        "published deviation": deviation,
        "parameters": float(parameters.mean()),
        "parameters min": int(parameters.min()),
        "parameters max": int(parameters.max()),
    }
