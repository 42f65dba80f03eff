"""What a graph hypernetwork sees of a network: operations, how they follow each other, who owns which parameter."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

# In the order of the rows of the released type embedding.
PRIMITIVES = (
    "max_pool", "avg_pool", "sep_conv", "dil_conv", "conv", "msa", "cse", "sum", "concat", "input", "bias", "bn", "ln",
    "pos_enc", "glob_avg",
)  # fmt: skip

Shape4 = tuple[int, int, int, int]


@dataclass(frozen=True)
class GraphNode:
    """One operation.

    Attributes:
        primitive: one of ``PRIMITIVES``.
        label: its parameter's name, or the path of the module it is in; for people to read.
        shape: (c_out, c_in, kH, kW) as the node features take it; None where the operation has no shape.
    """

    primitive: str
    label: str
    shape: Shape4 | None


@dataclass(frozen=True)
class GraphParameter:
    """One parameter of the network and the node it is decoded from.

    Attributes:
        name: as in ``named_parameters()``.
        shape: as the module stores it.
        node: index of the node.
        kind: ``"weight"`` (convolution or linear), ``"scale"`` (a norm's weight, or any per-channel factor),
            ``"bias"`` (whatever is added per channel, and slopes), or ``"table"`` (of positions).
        transposed: a weight stored with its inputs first: ``[I, O]``, ``[I, O / groups, kH, kW]``.
    """

    name: str
    shape: tuple[int, ...]
    node: int
    kind: str
    transposed: bool = False


@dataclass(frozen=True)
class ArchGraph:
    """A network as a directed acyclic graph.

    Attributes:
        nodes: N nodes by topological level (longest path from a source), then by order of call.
        edges: (source, destination), both indices into ``nodes``; sorted.
        parameters: every parameter some node owns, in ``named_parameters()`` order.
        unpredicted: names of the parameters that no node on the way to the output uses.
        num_parameters: elements of ``parameters``.
    """

    nodes: tuple[GraphNode, ...]
    edges: tuple[tuple[int, int], ...]
    parameters: tuple[GraphParameter, ...]
    unpredicted: tuple[str, ...] = ()

    @property
    def num_parameters(self) -> int:
        return sum(int(np.prod(parameter.shape)) for parameter in self.parameters)

    @cached_property
    def predecessors(self) -> tuple[tuple[int, ...], ...]:
        found: list[list[int]] = [[] for _ in self.nodes]
        for source, destination in self.edges:
            found[destination].append(source)
        return tuple(map(tuple, found))

    @cached_property
    def successors(self) -> tuple[tuple[int, ...], ...]:
        found: list[list[int]] = [[] for _ in self.nodes]
        for source, destination in self.edges:
            found[source].append(destination)
        return tuple(map(tuple, found))

    @cached_property
    def levels(self) -> NDArray[np.int64]:
        """Longest path from a source to each node ``[N]``."""
        return longest_paths(self.predecessors, range(len(self.nodes)))

    @cached_property
    def heights(self) -> NDArray[np.int64]:
        """Longest path from each node to a sink ``[N]``: the levels of the reversed graph."""
        return longest_paths(self.successors, range(len(self.nodes) - 1, -1, -1))

    @cached_property
    def distances(self) -> NDArray[np.float32]:
        """Shortest directed path from each node to each node ``[N, N]``; inf where there is none."""
        n = len(self.nodes)
        found = np.full((n, n), np.inf, dtype=np.float32)
        for node in range(n - 1, -1, -1):
            row = found[node]
            for successor in self.successors[node]:
                np.minimum(row, found[successor], out=row)
            row += 1
            row[node] = 0
        return found

    def virtual_edges(self, limit: int = 50) -> NDArray[np.int64]:
        """Rows (source, destination, distance) of all pairs with a shortest path of 1 to ``limit``: ``[M, 3]``."""
        source, destination = np.nonzero((self.distances >= 1) & (self.distances <= limit))
        distance = self.distances[source, destination].astype(np.int64)
        return np.stack([source, destination, distance], axis=1)


def longest_paths(neighbours: Sequence[Collection[int]], order: Sequence[int]) -> NDArray[np.int64]:
    """1 + the largest value among a node's ``neighbours``, 0 without any, for nodes visited in ``order``."""
    found = [0] * len(neighbours)
    for node in order:
        found[node] = max((found[neighbour] + 1 for neighbour in neighbours[node]), default=0)
    return np.array(found, dtype=np.int64)


def assemble(
    nodes: Sequence[GraphNode],
    predecessors: Sequence[Collection[int]],
    parameters: Sequence[GraphParameter],
    unpredicted: Sequence[str],
    output: Sequence[int],
) -> ArchGraph:
    """Keep what leads to the nodes ``output``, and put it into the order of ``ArchGraph``.

    Args:
        nodes: in order of call: a node's predecessors come before it.
        predecessors: of each node.
        parameters: whose ``node`` is an index into ``nodes``.
        unpredicted: names of parameters already known to have no node.
        output: nodes that the network's output depends on directly.
    """
    kept, pending = set(output), list(output)
    while pending:
        for node in predecessors[pending.pop()]:
            if node not in kept:
                kept.add(node)
                pending.append(node)
    levels = longest_paths(predecessors, range(len(nodes)))
    order = sorted(kept, key=lambda node: (levels[node], node))
    index = {node: place for place, node in enumerate(order)}
    edges = sorted((index[source], index[node]) for node in order for source in set(predecessors[node]))
    owned = tuple(
        GraphParameter(p.name, p.shape, index[p.node], p.kind, p.transposed) for p in parameters if p.node in index
    )
    lost = [p.name for p in parameters if p.node not in index]
    return ArchGraph(tuple(nodes[node] for node in order), tuple(edges), owned, (*unpredicted, *lost))
