"""Node states -> parameters: decode a block per weight, tile it to the weight's size (GHN-2's decoder)."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet.graphs.graph import ArchGraph, GraphParameter, Shape4


@dataclass(frozen=True)
class Slot:
    """One parameter: ``index`` among all of the plan, shape as stored, and the shape (O, I, kH, kW) it is decoded in."""

    index: int
    stored: tuple[int, ...]
    decoded: Shape4
    kind: str
    transposed: bool


@dataclass(frozen=True)
class Group:
    """Weights whose blocks have one size, so that they are decoded together."""

    block: Shape4  # o, i, kh, kw: at most 2D, 2D, s, s
    nodes: Tensor  # [n]
    scale: Tensor  # [n] of the normalisation
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class Plan:
    """How all parameters of a batch of graphs are decoded; it depends on shapes only.

    Attributes:
        names: of the parameters of each graph, in ``named_parameters()`` order; they are numbered through.
        shapes: of all parameters, as stored.
        groups: weights and position tables.
        vector_nodes: nodes that own one-dimensional parameters ``[n]``.
        vectors: those parameters, each with the row of its node.
        classifier_nodes: nodes of the classifiers' weights and of their biases ``[n, 2]``.
        classifiers: their (weight, bias).
    """

    names: tuple[tuple[str, ...], ...]
    shapes: tuple[tuple[int, ...], ...]
    groups: tuple[Group, ...]
    vector_nodes: Tensor
    vectors: tuple[tuple[Slot, int], ...]
    classifier_nodes: Tensor
    classifiers: tuple[tuple[Slot, Slot], ...]

    def to(self, device: torch.device) -> Plan:
        """Itself on ``device``."""
        if self.vector_nodes.device == device:
            return self
        groups = tuple(
            Group(group.block, group.nodes.to(device), group.scale.to(device), group.slots) for group in self.groups
        )
        vector_nodes, classifier_nodes = self.vector_nodes.to(device), self.classifier_nodes.to(device)
        return dataclasses.replace(
            self, groups=groups, vector_nodes=vector_nodes, classifier_nodes=classifier_nodes
        )


def fan_in_scale(shape: Shape4) -> float:
    """sqrt(beta / fan_in) of a weight (O, I per group, kH, kW)."""
    _, inputs, height, width = shape
    beta = 1 if inputs == 1 or height < width else 2
    return math.sqrt(beta / (inputs * height * width))


def tile(block: Tensor, shape: Sequence[int]) -> Tensor:
    """Repeat a block ``[o, i, ...]`` over its first two dimensions and cut to ``shape``; differentiable."""
    out, inputs = shape[0], shape[1]
    repeats = (-(-out // block.shape[0]), -(-inputs // block.shape[1]), *[1] * (block.ndim - 2))
    tiled = block.repeat(repeats) if max(repeats) > 1 else block
    return tiled[:out, :inputs]


def tile_into(target: Tensor, block: Tensor) -> None:
    """``target.copy_(tile(block, target.shape))`` in long runs: one band of rows first, then copies of the band.

    Args:
        target: ``[O, I, kH, kW]``, contiguous.
        block: ``[o, i, kH, kW]``, contiguous; not larger than ``target``.
    """
    rows, inputs = block.shape[:2]
    spatial = block.shape[2] * block.shape[3]
    run = inputs * spatial
    flat = target.view(target.shape[0], -1)  # [O, I * kH * kW]
    band, source = flat[:rows], block.view(rows, run)
    whole, rest = divmod(flat.shape[1], run)
    if whole == 1:
        band[:, :run] = source
    else:
        band[:, : whole * run].unflatten(1, (whole, run)).copy_(source[:, None])
    if rest:
        band[:, whole * run :] = source[:, :rest]
    whole, rest = divmod(len(flat), rows)
    if whole > 1:
        flat[rows : whole * rows].unflatten(0, (whole - 1, rows)).copy_(band)
    if rest:
        flat[whole * rows :] = band[:rest]


class TilingDecoder(nn.Module):
    """The parameters of the decoder: blocks up to [2D, 2D, s, s], vectors, and the classifier.

    Args:
        width: D.
        largest: s.
        num_classes: outputs of the classifier's own maps.
        normalise: scale weights by their fan-in and squash norm weights and biases.
    """

    def __init__(self, width: int, largest: int, num_classes: int, normalise: bool) -> None:
        super().__init__()
        self.width, self.largest, self.num_classes, self.normalise = width, largest, num_classes, normalise
        double = 2 * width

        def linear(*shape: int) -> nn.Parameter:
            bound = 1 / math.sqrt(shape[-1])
            return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape))

        self.fc_weight = linear(2 * double, largest, largest, width)
        self.fc_bias = zeros(2 * double, largest, largest)
        self.mix_weight, self.mix_bias = linear(4 * double, 2 * double), zeros(4 * double)
        self.block_weight, self.block_bias = linear(double, double, 4 * double), zeros(double, double)
        self.class_weight, self.class_bias = linear(num_classes, double), zeros(num_classes)
        self.vector_in_weight, self.vector_in_bias = linear(double, width), zeros(double)
        self.vector_out_weight, self.vector_out_bias = linear(2, double, double), zeros(2, double)
        self.class_vector_weight, self.class_vector_bias = linear(num_classes, double), zeros(num_classes)

    def plan(self, graphs: Sequence[ArchGraph]) -> Plan:
        """Sort the parameters of ``graphs`` into groups that are decoded together."""
        most = 2 * self.width
        grouped: dict[Shape4, list[tuple[int, Slot]]] = defaultdict(list)
        rows: dict[int, int] = {}
        vectors, classifiers, classifier_nodes = [], [], []
        offset = index = 0
        for graph in graphs:
            classifier = self._classifier(graph)
            ends = {}
            for parameter in graph.parameters:
                node = offset + parameter.node
                shape = graph.nodes[parameter.node].shape
                assert shape is not None  # a node that owns a parameter has one
                slot = Slot(index, parameter.shape, shape, parameter.kind, parameter.transposed)
                index += 1
                if parameter in classifier:
                    ends[parameter.kind] = (node, slot)
                elif parameter.kind in ("weight", "table"):
                    o, i, kh, kw = shape
                    block = (min(o, most), min(i, most), min(kh, self.largest), min(kw, self.largest))
                    grouped[block].append((node, slot))
                else:
                    vectors.append((slot, rows.setdefault(node, len(rows))))
            if ends:
                classifier_nodes.append([ends["weight"][0], ends["bias"][0]])
                classifiers.append((ends["weight"][1], ends["bias"][1]))
            offset += len(graph.nodes)
        groups = []
        for block, members in grouped.items():
            nodes, slots = zip(*members, strict=True)
            scale = [self._scale(slot) for slot in slots]
            groups.append(Group(block, torch.tensor(nodes), torch.tensor(scale), slots))
        return Plan(
            tuple(tuple(parameter.name for parameter in graph.parameters) for graph in graphs),
            tuple(parameter.shape for graph in graphs for parameter in graph.parameters),
            tuple(groups),
            torch.tensor(list(rows), dtype=torch.int64),
            tuple(vectors),
            torch.tensor(classifier_nodes, dtype=torch.int64).view(-1, 2),
            tuple(classifiers),
        )

    def _classifier(self, graph: ArchGraph) -> tuple[GraphParameter, ...]:
        """Weight and bias of the classifier: the last two nodes, where the graph ends in a linear map to the classes."""
        last = len(graph.nodes) - 1
        weight = next((p for p in graph.parameters if p.node == last - 1 and p.kind == "weight"), None)
        bias = next((p for p in graph.parameters if p.node == last and p.kind == "bias"), None)
        if weight is None or bias is None or (last - 1, last) not in graph.edges:
            return ()
        shape = graph.nodes[weight.node].shape
        assert shape is not None
        return (weight, bias) if shape[0] == self.num_classes and shape[2:] == (1, 1) else ()

    def _scale(self, slot: Slot) -> float:
        return fan_in_scale(slot.decoded) if self.normalise and slot.kind == "weight" else 1.0

    def forward(self, states: Tensor, plan: Plan, out: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Decode all parameters of ``plan`` from node states ``[N, D]``; in its order, in their stored shapes.

        Args:
            out: tensors of these shapes to write into (then without gradient); None for new ones.
        """
        found: list[Tensor | None] = list(out) if out is not None else [None] * len(plan.shapes)

        def put(slot: Slot, block: Tensor) -> None:
            found[slot.index] = _placed(slot, block, found[slot.index])

        for group in plan.groups:
            for slot, block in zip(group.slots, self._blocks(states, group), strict=True):
                put(slot, block)
        if plan.vectors:
            pair = self._vectors(states[plan.vector_nodes])  # [n, 2, 2D]
            if self.normalise:
                pair = torch.stack([2 * torch.sigmoid(0.5 * pair[:, 0]), torch.tanh(0.2 * pair[:, 1])], dim=1)
            for slot, row in plan.vectors:
                put(slot, pair[row, 0 if slot.kind == "scale" else 1].view(-1, 1, 1, 1))
        if plan.classifiers:
            weights, biases = self._classifiers(states[plan.classifier_nodes])
            for (weight, bias), matrix, vector in zip(plan.classifiers, weights, biases, strict=True):
                put(weight, (matrix * self._scale(weight))[:, :, None, None])
                put(bias, vector.view(-1, 1, 1, 1))
        return [tensor for tensor in found if tensor is not None]

    def _features(self, states: Tensor, height: int, width: int) -> Tensor:
        """What the last map reads at each position of a kernel: ``[n, D] -> [n * kH * kW, 8D]``.

        Positions that the crop drops are never computed, and a 1x1 convolution is a matrix product over positions.
        """
        weight = self.fc_weight[:, :height, :width].permute(1, 2, 0, 3).flatten(0, 2)  # [kH * kW * 4D, D]
        bias = self.fc_bias[:, :height, :width].permute(1, 2, 0).flatten()
        hidden = F.relu(F.linear(states, weight, bias)).view(-1, self.mix_weight.shape[1])
        return F.relu(F.linear(hidden, self.mix_weight, self.mix_bias))

    def _blocks(self, states: Tensor, group: Group) -> Tensor:
        """Blocks of one group, normalised ``[n, o, i, kH, kW]``."""
        o, i, height, width = group.block
        features = self._features(states[group.nodes], height, width)
        weight, bias = self.block_weight[:o, :i].flatten(0, 1), self.block_bias[:o, :i].flatten()
        blocks = F.linear(features, weight, bias).view(-1, height * width, o, i)
        blocks = blocks.permute(0, 2, 3, 1) * group.scale[:, None, None, None]  # [n, o, i, kH * kW]
        return blocks.unflatten(3, (height, width))

    def _vectors(self, states: Tensor) -> Tensor:
        """``[n, D] -> [n, 2, 2D]``: raw weights of norms, raw biases."""
        hidden = F.relu(F.linear(states, self.vector_in_weight, self.vector_in_bias))
        weight, bias = self.vector_out_weight.flatten(0, 1), self.vector_out_bias.flatten()
        return F.linear(hidden, weight, bias).unflatten(1, (2, -1))

    def _classifiers(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """``[n, 2, D]`` -> weights ``[n, classes, 2D]``, biases ``[n, classes]``."""
        features = self._features(states[:, 0], 1, 1)  # [n, 8D]
        blocks = F.linear(features, self.block_weight.flatten(0, 1), self.block_bias.flatten())
        blocks = F.relu(blocks).unflatten(1, self.block_bias.shape)  # [n, 2D, 2D]
        weights = self.class_weight @ blocks + self.class_bias[:, None]
        hidden = F.relu(self._vectors(states[:, 1])[:, 1])  # [n, 2D]
        biases = F.linear(hidden, self.class_vector_weight, self.class_vector_bias)
        return weights, torch.tanh(0.2 * biases) if self.normalise else biases


def _placed(slot: Slot, block: Tensor, out: Tensor | None) -> Tensor:
    """The parameter of ``slot`` from its block ``[o, i, kH, kW]``, in ``out`` where there is one."""
    if block.shape[2:] != slot.decoded[2:]:  # a kernel larger than s is stretched
        block = F.interpolate(block, slot.decoded[2:], mode="bilinear", align_corners=False)
    table = slot.kind == "table" and (len(slot.stored) == 2 or (len(slot.stored) == 3 and slot.stored[0] == 1))
    if out is not None and not table and not slot.transposed and out.is_contiguous():
        o, i = slot.decoded[:2]
        tile_into(out.view(slot.decoded), block[:o, :i].contiguous())
        return out
    tiled = tile(block, slot.decoded)
    if table:  # (1, c, h, w) -> (n, c)
        tiled = tiled.flatten(2)[0, :, : slot.stored[-2]].t()
    elif slot.transposed:
        tiled = tiled.flatten(1).t()
    tiled = tiled.reshape(slot.stored)
    return tiled if out is None else out.copy_(tiled)
