"""Graphs -> one state per node: node features, then gated message passing (GHN-2) or an MLP (the baseline)."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pudnet import ops
from pudnet.errors import InputError, message
from pudnet.graphs.graph import PRIMITIVES, ArchGraph

KERNELS = {11: (1, 3, 5, 7, 9, 11, 14, 16), 16: (1, 3, 5, 7, 9, 11, 13, 14, 15, 16)}  # vocabulary by decoder size s


class Vocabulary:
    """Sizes that have an embedding row; the row after the last is the dummy, for what has no size."""

    def __init__(self, sizes: Sequence[int], moved: dict[int, int]) -> None:
        self.sizes = sorted(set(sizes))
        self.moved = moved  # sizes that do not go to the nearest

    @property
    def dummy(self) -> int:
        return len(self.sizes)

    def row(self, size: int) -> int:
        """The nearest entry, ties to the lower, the largest for anything above it."""
        size = self.moved.get(size, size)
        above = bisect.bisect_left(self.sizes, size)
        if above == len(self.sizes):
            return above - 1
        if above and size - self.sizes[above - 1] <= self.sizes[above] - size:
            return above - 1
        return above


def channel_vocabulary(num_classes: int) -> Vocabulary:
    sizes = [1, 3, num_classes, *range(8, 57, 8), *range(64, 4081, 16), *range(4096, 8193, 32)]
    return Vocabulary(sizes, {size: 8 for size in range(4, 8) if size != num_classes})


def kernel_vocabulary(largest: int) -> Vocabulary:
    if largest not in KERNELS:
        raise InputError(message("kernel_vocabulary", "largest", f"one of {sorted(KERNELS)}", largest))
    return Vocabulary(KERNELS[largest], {2: 3})


@dataclass(frozen=True)
class Traversal:
    """What one traversal of a batch of graphs needs: nodes level by level, and the edges between them."""

    order: Tensor  # [N] node at each place
    place: Tensor  # [N] place of each node: the inverse of order
    level_sizes: list[int]
    edges: Tensor  # [V, N, N] over places


@dataclass(frozen=True)
class GraphBatch:
    """Graphs as tensors; nodes of all graphs one after the other."""

    graphs: tuple[ArchGraph, ...]
    primitives: Tensor  # [N] rows of the type embedding
    sizes: Tensor  # [N, 4] rows of the shape embeddings: c_out, c_in, kH, kW
    owner: Tensor  # [N] which graph
    traversals: tuple[Traversal, ...]  # forward, backward

    def to(self, device: torch.device) -> GraphBatch:
        """Itself on ``device``."""
        if self.primitives.device == device:
            return self
        moved = tuple(
            Traversal(t.order.to(device), t.place.to(device), t.level_sizes, t.edges.to(device))
            for t in self.traversals
        )
        sizes = self.sizes.to(device)
        return GraphBatch(self.graphs, self.primitives.to(device), sizes, self.owner.to(device), moved)


class GraphEncoder(nn.Module):
    """Node features and what refines them.

    Args:
        width: D; a multiple of 4.
        num_classes: part of the channel vocabulary.
        largest: s, the decoder's kernel size; it chooses the kernel vocabulary.
        encoder: ``"gnn"`` or ``"mlp"``.
        virtual_edges: longest shortest path that becomes an edge; 1 for no virtual edges.
        layer_norm: LayerNorm on the final states.
    """

    def __init__(
        self, width: int, num_classes: int, largest: int, encoder: str, virtual_edges: int, layer_norm: bool
    ) -> None:
        super().__init__()
        self.channels, self.kernels = channel_vocabulary(num_classes), kernel_vocabulary(largest)
        self.virtual_edges = virtual_edges
        self.primitive_embedding = nn.Parameter(torch.randn(len(PRIMITIVES), width))
        self.channel_embedding = nn.Parameter(torch.randn(self.channels.dummy + 1, width // 4))
        self.kernel_embedding = nn.Parameter(torch.randn(self.kernels.dummy + 1, width // 4))
        self.walk = MessagePassing(width, 1 if virtual_edges == 1 else 2) if encoder == "gnn" else None
        self.mlp = (
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
            if encoder == "mlp"
            else None
        )
        self.norm = nn.LayerNorm(width) if layer_norm else None

    def batch(self, graphs: Sequence[ArchGraph]) -> GraphBatch:
        """Turn graphs into the tensors ``forward`` takes."""
        primitives, owner = [], []
        sizes: list[int] = []
        for k, graph in enumerate(graphs):
            for node in graph.nodes:
                primitives.append(PRIMITIVES.index(node.primitive))
                sizes += self._rows(node.shape)
                owner.append(k)
        traversals: tuple[Traversal, ...] = ()
        if self.walk is not None:
            edges = [self._edges(graph) for graph in graphs]
            traversals = (self._traversal(graphs, edges, False), self._traversal(graphs, edges, True))
        rows = torch.tensor(sizes).view(-1, 4)
        return GraphBatch(tuple(graphs), torch.tensor(primitives), rows, torch.tensor(owner), traversals)

    def _rows(self, shape: tuple[int, int, int, int] | None) -> tuple[int, int, int, int]:
        channel, kernel = self.channels, self.kernels
        if shape is None:
            return channel.dummy, channel.dummy, kernel.dummy, kernel.dummy
        return channel.row(shape[0]), channel.row(shape[1]), kernel.row(shape[2]), kernel.row(shape[3])

    def _edges(self, graph: ArchGraph) -> NDArray[np.float32]:
        """Weight of the edge from row to column, for each kind of edge: ``[V, N, N]``."""
        distances = graph.distances
        near = (distances == 1).astype(np.float32)
        if self.virtual_edges == 1:
            return near[None]
        with np.errstate(divide="ignore"):
            far = 1 / distances  # 0 where there is no path
        far[(distances < 1) | (distances > self.virtual_edges)] = 0
        return np.stack([near, far])

    def _traversal(self, graphs: Sequence[ArchGraph], edges: list[NDArray[np.float32]], reverse: bool) -> Traversal:
        levels = np.concatenate([graph.heights if reverse else graph.levels for graph in graphs])
        order = np.argsort(levels, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        # Here edges lead into rows: forward, that is the transpose.
        parts = edges if reverse else [part.transpose(0, 2, 1) for part in edges]
        if len(parts) == 1:
            joined = parts[0][:, order][:, :, order] if reverse else np.ascontiguousarray(parts[0])
        else:
            joined = np.zeros((len(edges[0]), len(order), len(order)), dtype=np.float32)
            offset = 0
            for part in parts:
                index = place[offset : offset + part.shape[1]]
                joined[:, index[:, None], index] = part
                offset += part.shape[1]
        _, sizes = np.unique(levels, return_counts=True)
        return Traversal(torch.from_numpy(order), torch.from_numpy(place), sizes.tolist(), torch.from_numpy(joined))

    def forward(self, batch: GraphBatch, embedding: Tensor | None = None) -> Tensor:
        """Node states ``[N, D]``.

        Args:
            embedding: ``[B, D]``, added to the features of every node of the graph it belongs to.
        """
        c, k = self.channel_embedding, self.kernel_embedding
        rows = batch.sizes
        shape = torch.cat([c[rows[:, 0]], c[rows[:, 1]], k[rows[:, 2]], k[rows[:, 3]]], dim=1)
        states = self.primitive_embedding[batch.primitives] + shape  # [N, D]
        if embedding is not None:
            states = states + embedding[batch.owner]
        if self.walk is not None:
            for traversal in batch.traversals:
                states = self.walk(states[traversal.order], traversal)[traversal.place]
        if self.mlp is not None:
            states = self.mlp(states)
        return states if self.norm is None else self.norm(states)


class MessagePassing(nn.Module):
    """The parameters of the gated message passing: V message MLPs (1-hop, virtual), one GRU cell for both directions.

    Args:
        width: D.
        kinds: V; with virtual edges 2, and the MLPs are D -> D/2 -> D; without 1, and D -> D -> D.
    """

    def __init__(self, width: int, kinds: int) -> None:
        super().__init__()
        hidden = width // 2 if kinds == 2 else width

        def uniform(bound: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))

        inner, outer = 1 / math.sqrt(width), 1 / math.sqrt(hidden)
        self.message_in_weight, self.message_in_bias = (
            uniform(inner, kinds, hidden, width),
            uniform(inner, kinds, hidden),
        )
        self.message_out_weight, self.message_out_bias = (
            uniform(outer, kinds, width, hidden),
            uniform(outer, kinds, width),
        )
        self.weight_ih, self.weight_hh = uniform(inner, 3 * width, width), uniform(inner, 3 * width, width)
        self.bias_ih, self.bias_hh = uniform(inner, 3 * width), uniform(inner, 3 * width)

    def forward(self, states: Tensor, traversal: Traversal) -> Tensor:
        """``[N, D] -> [N, D]``, both in the order of the traversal."""
        return ops.graph_recurrence(
            states, traversal.edges, traversal.level_sizes, self.message_in_weight, self.message_in_bias,
            self.message_out_weight, self.message_out_bias, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh,
        )  # fmt: skip
