"""Node states -> parameters: decode a block per weight, tile it to the weight's size (GHN-2's decoder)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet import ops
from pudnet.graphs.graph import ArchGraph, GraphParameter, Shape4


@dataclass(frozen=True)
class Slot:
    """One parameter: ``index`` among all of the plan, and how its block becomes it.

    Attributes:
        stored: shape as the module stores it.
        decoded: shape to tile to: (O, I, kH, kW), or (1, c, 1, 1) for what has one dimension.
        kernel: height and width of its block.
        is_sequence: a position table stored (n, c) or (1, n, c).
    """

    index: int
    stored: tuple[int, ...]
    decoded: Shape4
    kernel: tuple[int, int]
    kind: str
    transposed: bool
    is_sequence: bool

    @property
    def simple(self) -> bool:
        """Stored as it is tiled."""
        return not (self.transposed or self.is_sequence or self.kernel != self.decoded[2:])


@dataclass(frozen=True)
class Group:
    """Weights whose blocks have one size."""

    kernel: tuple[int, int]
    nodes: Tensor  # [n]
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class Plan:
    """How all parameters of a batch of graphs are decoded; it depends on shapes only.

    Attributes:
        names: of the parameters of each graph, in ``named_parameters()`` order; they are numbered through.
        shapes: of all parameters, as stored.
        families: weights and position tables, by the channels (o, i) of their blocks, at most (2D, 2D).
        vector_nodes: nodes that own one-dimensional parameters ``[n]``.
        vectors: those parameters, each with its row among the ``2n`` decoded from these nodes.
        classifier_nodes: nodes of the classifiers' weights and of their biases ``[n, 2]``.
        classifiers: their (weight, bias).
    """

    names: tuple[tuple[str, ...], ...]
    shapes: tuple[tuple[int, ...], ...]
    families: dict[tuple[int, int], tuple[Group, ...]]
    vector_nodes: Tensor
    vectors: tuple[tuple[Slot, int], ...]
    classifier_nodes: Tensor
    classifiers: tuple[tuple[Slot, Slot], ...]

    def to(self, device: torch.device) -> Plan:
        """Itself on ``device``."""
        if self.vector_nodes.device == device:
            return self
        families = {
            channels: tuple(Group(group.kernel, group.nodes.to(device), group.slots) for group in groups)
            for channels, groups in self.families.items()
        }
        vector_nodes, classifier_nodes = self.vector_nodes.to(device), self.classifier_nodes.to(device)
        return dataclasses.replace(
            self, families=families, vector_nodes=vector_nodes, classifier_nodes=classifier_nodes
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
        grouped: dict[tuple[int, int], dict[tuple[int, int], list[tuple[int, Slot]]]] = {}
        rows: dict[int, int] = {}
        vectors, classifiers, classifier_nodes = [], [], []
        offset = index = 0
        for graph in graphs:
            classifier = self._classifier(graph)
            ends = {}
            for parameter in graph.parameters:
                node, slot = offset + parameter.node, self._slot(graph, parameter, index)
                index += 1
                if parameter in classifier:
                    ends[parameter.kind] = (node, slot)
                elif parameter.kind in ("weight", "table"):
                    channels = (min(slot.decoded[0], most), min(slot.decoded[1], most))
                    grouped.setdefault(channels, {}).setdefault(slot.kernel, []).append((node, slot))
                else:
                    row = 2 * rows.setdefault(node, len(rows)) + (parameter.kind == "bias")
                    vectors.append((slot, row))
            if ends:
                classifier_nodes.append([ends["weight"][0], ends["bias"][0]])
                classifiers.append((ends["weight"][1], ends["bias"][1]))
            offset += len(graph.nodes)
        families = {
            channels: tuple(
                Group(kernel, torch.tensor([node for node, _ in members]), tuple(slot for _, slot in members))
                for kernel, members in kernels.items()
            )
            for channels, kernels in grouped.items()
        }
        return Plan(
            tuple(tuple(parameter.name for parameter in graph.parameters) for graph in graphs),
            tuple(parameter.shape for graph in graphs for parameter in graph.parameters),
            families,
            torch.tensor(list(rows), dtype=torch.int64),
            tuple(vectors),
            torch.tensor(classifier_nodes, dtype=torch.int64).view(-1, 2),
            tuple(classifiers),
        )

    def _slot(self, graph: ArchGraph, parameter: GraphParameter, index: int) -> Slot:
        shape = graph.nodes[parameter.node].shape
        assert shape is not None  # a node that owns a parameter has one
        stored, kind = parameter.shape, parameter.kind
        if kind in ("scale", "bias"):
            shape = (1, math.prod(stored), 1, 1)
        kernel = (min(shape[2], self.largest), min(shape[3], self.largest))
        is_sequence = kind == "table" and (len(stored) == 2 or (len(stored) == 3 and stored[0] == 1))
        return Slot(index, stored, shape, kernel, kind, parameter.transposed, is_sequence)

    def _classifier(self, graph: ArchGraph) -> tuple[GraphParameter, ...]:
        """Weight and bias of the classifier: the last two nodes, where these are a linear map to the classes."""
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

    def forward(self, states: Tensor, plan: Plan) -> list[Tensor]:
        """Decode all parameters of ``plan`` from node states ``[N, D]``; in its order and shapes; differentiable."""
        found: dict[int, Tensor] = {}
        tiled = []
        for slot, block, scale in self._decoded(states, plan):
            if slot.simple:
                tiled.append((slot, block, scale))
            else:
                found[slot.index] = _placed(slot, block * scale)
        for (slot, _, _), weight in zip(tiled, _tile_all(tiled), strict=True):
            found[slot.index] = weight.reshape(slot.stored)
        return [found[index] for index in range(len(plan.shapes))]

    def write(self, states: Tensor, plan: Plan, out: Sequence[Tensor]) -> None:
        """As ``forward``, into ``out``; without gradient."""
        tiled = []
        for slot, block, scale in self._decoded(states, plan):
            if slot.simple and out[slot.index].is_contiguous():
                tiled.append((slot, block, scale))
            else:
                out[slot.index].copy_(_placed(slot, block * scale))
        _tile_all(tiled, [out[slot.index] for slot, _, _ in tiled])

    def _decoded(self, states: Tensor, plan: Plan) -> Iterator[tuple[Slot, Tensor, float]]:
        """Each parameter's block ``[kH * kW, o, i]``, and the factor it still needs."""
        for (o, i), groups in plan.families.items():
            features = [self._features(states[group.nodes], *group.kernel) for group in groups]
            # One product for all kernel sizes: the last map is nearly all of the work.
            weight, bias = self.block_weight[:o, :i].flatten(0, 1), self.block_bias[:o, :i].flatten()
            blocks = F.linear(torch.cat(features), weight, bias).view(-1, o, i)
            positions = [math.prod(group.kernel) for group in groups for _ in group.slots]
            slots = [slot for group in groups for slot in group.slots]
            for slot, block in zip(slots, blocks.split(positions), strict=True):
                yield slot, block, self._scale(slot)
        if plan.vectors:
            rows = self._vectors(states[plan.vector_nodes])  # [n, 2, 2D]
            if self.normalise:
                rows = torch.stack([2 * torch.sigmoid(0.5 * rows[:, 0]), torch.tanh(0.2 * rows[:, 1])], dim=1)
            parts = rows.view(-1, 1, 1, rows.shape[2]).unbind()  # 2n of [1, 1, 2D]
            for slot, row in plan.vectors:
                yield slot, parts[row], 1.0
        if plan.classifiers:
            weights, biases = self._classifiers(states[plan.classifier_nodes])
            for (weight_slot, bias_slot), matrix, vector in zip(plan.classifiers, weights, biases, strict=True):
                yield weight_slot, matrix[None], self._scale(weight_slot)
                yield bias_slot, vector[None, None], 1.0

    def _features(self, states: Tensor, height: int, width: int) -> Tensor:
        """What the last map reads at each position of a kernel: ``[n, D] -> [n * kH * kW, 8D]``.

        Positions that the crop drops are never computed, and a 1x1 convolution is a matrix product over positions.
        """
        weight = self.fc_weight[:, :height, :width].permute(1, 2, 0, 3).flatten(0, 2)  # [kH * kW * 4D, D]
        bias = self.fc_bias[:, :height, :width].permute(1, 2, 0).flatten()
        hidden = F.relu(F.linear(states, weight, bias)).view(-1, self.mix_weight.shape[1])
        return F.relu(F.linear(hidden, self.mix_weight, self.mix_bias))

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


def _tile_all(parts: list[tuple[Slot, Tensor, float]], targets: list[Tensor] | None = None) -> list[Tensor]:
    """The parameters that are stored as they are tiled, all at once."""
    slots, blocks, scales = zip(*parts, strict=True) if parts else ((), (), ())
    return ops.tile_weights(blocks, scales, [slot.decoded[:2] for slot in slots], targets)


def _placed(slot: Slot, block: Tensor) -> Tensor:
    """The parameter of ``slot`` from its block ``[kH * kW, o, i]``; differentiable."""
    kernel = block.permute(1, 2, 0).unflatten(2, slot.kernel)  # [o, i, kH, kW]
    if slot.kernel != slot.decoded[2:]:  # a kernel larger than s is stretched
        kernel = F.interpolate(kernel, slot.decoded[2:], mode="bilinear", align_corners=False)
    tiled = tile(kernel, slot.decoded)
    if slot.is_sequence:
        tiled = tiled.flatten(2)[0, :, : slot.stored[-2]].t()  # (1, c, h, w) -> (n, c)
    elif slot.transposed:  # (O, I / groups, ...) -> (I, O / groups, ...), group by group
        tiled = tiled.unflatten(0, (slot.decoded[0] // slot.stored[1], -1)).transpose(1, 2)
    return tiled.reshape(slot.stored)
