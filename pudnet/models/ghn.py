"""GHN-2: an architecture in, all its parameters out, for a dataset fixed in training (arXiv 2110.13100).

It has the shape of PudNet: a GRU walks the layers (here: the nodes of a graph), a generator turns each state into
weights. ``GHN.forward`` is the data path.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from pudnet import checkpoint, hub
from pudnet.batchnorm import set_policy
from pudnet.checkpoint import HubOptions
from pudnet.errors import CheckpointError, DtypeError, InputError, ShapeError, message, one_line
from pudnet.graphs import ArchGraph, trace
from pudnet.memory import prefer_huge_pages
from pudnet.nn.decoder import Plan, TilingDecoder
from pudnet.nn.graph_encoder import GraphBatch, GraphEncoder

KIND = "ghn"
LARGEST_SIZE = 2**16  # of what a checkpoint may ask
GRAPHS_KEPT = 64  # traced graphs remembered, the least recently used is forgotten first


@dataclass(frozen=True)
class GHNConfig:
    """Everything that determines a GHN: saved with every checkpoint.

    Attributes:
        width: D; decoded blocks are [2D, 2D, s, s].
        largest: s, the largest kernel decoded without stretching.
        num_classes: of the dataset; classifiers with another number of outputs are decoded like any other weight.
        encoder: ``"gnn"`` or ``"mlp"`` (the baseline without message passing).
        virtual_edges: longest shortest path that becomes an edge; 1 for no virtual edges.
        layer_norm: LayerNorm on the node states.
        normalise: scale weights by their fan-in, squash norm weights and biases.
        input_shape: of one input of the networks.
        mean, std: normalisation of images in 0..1 that the networks expect.
    """

    width: int = 32
    largest: int = 11
    num_classes: int = 10
    encoder: str = "gnn"
    virtual_edges: int = 50
    layer_norm: bool = True
    normalise: bool = True
    input_shape: tuple[int, ...] = (3, 32, 32)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name in ("width", "num_classes", "virtual_edges"):
            if not _is_size(getattr(self, name)):
                rule = f"an integer from 1 to {LARGEST_SIZE}"
                raise InputError(message("GHN", name, rule, repr(getattr(self, name))))
        for name in ("layer_norm", "normalise"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(message("GHN", name, "True or False", repr(getattr(self, name))))
        if self.width % 4:
            raise InputError(message("GHN", "width", "a multiple of 4", self.width))
        if self.encoder not in ("gnn", "mlp"):
            raise InputError(message("GHN", "encoder", "'gnn' or 'mlp'", repr(self.encoder)))
        for name in ("input_shape", "mean", "std"):  # a checkpoint has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.input_shape) != 3 or not all(map(_is_size, self.input_shape)):
            rule = f"channels, height and width, integers from 1 to {LARGEST_SIZE}"
            raise InputError(message("GHN", "input_shape", rule, list(self.input_shape)))
        for name in ("mean", "std"):
            if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in getattr(self, name)):
                raise InputError(message("GHN", name, "finite numbers", list(getattr(self, name))))


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_SIZE


PRESETS: dict[str, dict[str, Any]] = {
    "ghn2": {},
    "ghn1": {"virtual_edges": 1, "layer_norm": False, "normalise": False},
    "mlp": {"encoder": "mlp"},
}


@dataclass(frozen=True)
class Prepared:
    """Graphs ready to be predicted for: what depends on the architectures and not on the GHN's parameters."""

    batch: GraphBatch
    plan: Plan

    def to(self, device: torch.device) -> Prepared:
        """Itself on ``device``."""
        return Prepared(self.batch.to(device), self.plan.to(device))


class GHN(hub.Shared, nn.Module):
    """A graph hypernetwork.

    Args:
        preset: ``"ghn2"``, ``"ghn1"`` or ``"mlp"``.
        seed: of the initial parameters.
        options: fields of ``GHNConfig``.

    Raises:
        InputError: an unknown preset or option, or a value out of range.
    """

    def __init__(self, preset: str = "ghn2", *, seed: int = 0, **options: Any) -> None:
        super().__init__()
        if preset not in PRESETS:
            raise InputError(message("GHN", "preset", f"one of {sorted(PRESETS)}", repr(preset)))
        known = {field.name for field in dataclasses.fields(GHNConfig)}
        if unknown := sorted(set(options) - known):
            raise InputError(message("GHN", "options", f"among {sorted(known)}", unknown))
        self.config = config = GHNConfig(**{**PRESETS[preset], **options})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = GraphEncoder(
                config.width, config.num_classes, config.largest, config.encoder, config.virtual_edges,
                config.layer_norm,
            )  # fmt: skip
            self.decoder = TilingDecoder(config.width, config.largest, config.num_classes, config.normalise)
        self.card: dict[str, Any] = {}  # how the checkpoint was made, where it came from one
        self._graphs: OrderedDict[Hashable, ArchGraph] = OrderedDict()
        self._prepared: OrderedDict[int, tuple[ArchGraph, Prepared]] = OrderedDict()

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.decoder.class_bias.device

    def prepare(self, graphs: Sequence[ArchGraph]) -> Prepared:
        """The tensors and the plan of a batch of graphs, for ``forward``; they do not depend on the parameters."""
        if not graphs:
            raise InputError(message("GHN.prepare", "graphs", "at least one graph", "an empty sequence"))
        return Prepared(self.encoder.batch(graphs), self.decoder.plan(graphs)).to(self.device)

    def forward(
        self, graphs: Sequence[ArchGraph] | Prepared, embedding: Tensor | None = None
    ) -> list[dict[str, Tensor]]:
        """Predict the parameters of B networks; differentiable in the hypernetwork's parameters and the embedding.

        Args:
            graphs: of ``pudnet.graphs.trace``, or what ``prepare`` made of them.
            embedding: ``[B, D]``, added to all node features of each graph: what else the weights should depend on.

        Returns:
            For each network ``{name: tensor}`` in ``named_parameters()`` order; without the parameters that
            ``ArchGraph.unpredicted`` lists.
        """
        prepared = graphs if isinstance(graphs, Prepared) else self.prepare(graphs)
        states = self.node_states(prepared, embedding)
        return self._named(prepared, self.decoder(states, prepared.plan))

    def node_states(self, prepared: Prepared, embedding: Tensor | None = None) -> Tensor:
        """Final node states ``[N, D]``, the nodes of all graphs one after the other."""
        count, width = len(prepared.batch.graphs), self.config.width
        if embedding is not None and tuple(embedding.shape) != (count, width):
            raise ShapeError(message("GHN", "embedding", f"[{count}, {width}]", list(embedding.shape)))
        states: Tensor = self.encoder(prepared.batch, embedding)
        return states

    @staticmethod
    def _named(prepared: Prepared, tensors: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        remaining = iter(tensors)
        return [{name: next(remaining) for name in names} for names in prepared.plan.names]

    def graph(self, module: nn.Module) -> ArchGraph:
        """The graph of ``module``: traced at its first sight, remembered for every module built alike."""
        key = fingerprint(module)
        if key is None:
            return trace(module, self.config.input_shape)
        if key in self._graphs:
            self._graphs.move_to_end(key)
        else:
            self._graphs[key] = trace(module, self.config.input_shape)
            if len(self._graphs) > GRAPHS_KEPT:
                self._graphs.popitem(last=False)
        return self._graphs[key]

    def _prepare_one(self, graph: ArchGraph) -> Prepared:
        known = self._prepared.get(id(graph))
        if known is None or known[1].batch.primitives.device != self.device:
            known = self._prepared[id(graph)] = (graph, self.prepare([graph]))
            if len(self._prepared) > GRAPHS_KEPT:
                self._prepared.popitem(last=False)
        return known[1]

    @torch.no_grad()
    def generate(
        self,
        module: nn.Module | ArchGraph,
        out: Mapping[str, Tensor] | None = None,
        *,
        embedding: Tensor | None = None,
        partial: bool = False,
    ) -> dict[str, Tensor]:
        """Predict the parameters of one network; without gradients (``forward`` has them).

        Args:
            module: the network, not changed; or its graph.
            out: an earlier result for the same architecture, whose memory is used again.
            embedding: ``[1, D]``, see ``forward``.
            partial: leave out parameters the network's forward does not use, instead of refusing.

        Returns:
            ``{name: tensor}`` in ``named_parameters()`` order.

        Raises:
            InputError: ``module`` cannot be traced, has parameters that its forward does not use, or ``out`` is of
                another architecture.
        """
        graph = module if isinstance(module, ArchGraph) else self.graph(module)
        if graph.unpredicted and not partial:
            listed = ", ".join(graph.unpredicted[:5]) + (", ..." if len(graph.unpredicted) > 5 else "")
            rule = "a network whose forward uses all its parameters"
            hint = "partial=True predicts the others."
            raise InputError(message("GHN.generate", "module", rule, f"no use of {listed}", hint))
        prepared = self._prepare_one(graph)
        plan = prepared.plan
        memory = _allocate(plan.shapes, self.device) if out is None else self._checked(plan, out)
        states = self.node_states(prepared, embedding)
        self.decoder.write(states, plan, memory)
        return self._named(prepared, memory)[0]

    def _checked(self, plan: Plan, out: Mapping[str, Tensor]) -> list[Tensor]:
        where, names = "GHN.generate", plan.names[0]
        if tuple(out) != names:
            wrong = sorted(set(out) ^ set(names))[:3] or "another order"
            raise InputError(message(where, "out", f"a result for this network ({len(names)} names)", wrong))
        device = self.device
        for (name, tensor), shape in zip(out.items(), plan.shapes, strict=True):
            if tuple(tensor.shape) != shape:
                raise ShapeError(message(where, f"out[{name!r}]", f"{list(shape)}", list(tensor.shape)))
            if tensor.dtype != torch.float32 or tensor.device != device:
                rule = f"float32 on {device}"
                raise DtypeError(message(where, f"out[{name!r}]", rule, f"{tensor.dtype} on {tensor.device}"))
        return list(out.values())

    @torch.no_grad()
    def predict(
        self,
        module: nn.Module,
        batchnorm: str = "batch",
        images: Tensor | None = None,
        *,
        embedding: Tensor | None = None,
        partial: bool = False,
    ) -> nn.Module:
        """A finished copy of ``module`` with predicted parameters, in evaluation mode.

        Args:
            module: not changed; where it is on the meta device, the copy is on the GHN's.
            batchnorm: ``"batch"`` (batch statistics, as in the paper), ``"calibrated"`` (running statistics measured
                on ``images``) or ``"shared"`` (those the module came with).
            images: ``[n, 3, H, W]`` as the network reads them, for ``"calibrated"``.

        Raises:
            InputError: see ``generate`` and ``pudnet.batchnorm.set_policy``.
        """
        parameters = self.generate(module, embedding=embedding, partial=partial)
        network = copy.deepcopy(module)
        if any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers())):
            network = network.to_empty(device=self.device)
            for layer in network.modules():
                if isinstance(layer, nn.modules.batchnorm._NormBase):
                    layer.reset_running_stats()
        for name, tensor in parameters.items():
            owner, _, attribute = name.rpartition(".")
            holder = network.get_submodule(owner)
            old = holder._parameters[attribute]
            assert old is not None
            holder._parameters[attribute] = nn.Parameter(tensor.to(old), requires_grad=old.requires_grad)
        set_policy(network, batchnorm, images)
        return network

    def save(self, path: str | os.PathLike[str], *, card: Mapping[str, Any] | None = None, half: bool = False) -> None:
        """Write a checkpoint that ``GHN.load`` reads.

        Args:
            card: anything JSON-able about how it was made.
            half: store float16.
        """
        config = {"ghn": dataclasses.asdict(self.config), "card": dict(card if card is not None else self.card)}
        tensors = {name: tensor.half() if half else tensor for name, tensor in self.state_dict().items()}
        checkpoint.save(path, KIND, config, tensors)

    def card_parts(self, name: str) -> dict[str, Any]:
        """See ``pudnet.hub.Shared``."""
        kind = "A graph hypernetwork: an architecture in, all of its parameters out."
        usage = "network = pudnet.GHN.from_pretrained({name}).predict(module)  # any nn.Module"
        return hub.hypernetwork_card(name, kind, usage, dataclasses.asdict(self.config), self.card)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GHN:
        """Read a checkpoint written by ``save``, in evaluation mode.

        Raises:
            CheckpointError: the file is not a GHN's, or not of this version.
        """
        config, tensors = checkpoint.load(path, KIND)
        try:
            with checkpoint.without_memory():
                ghn = cls(**config["ghn"])
            checkpoint.fill(ghn, tensors)
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            got = f"{str(path)!r} ({one_line(error)})"
            raise CheckpointError(message("GHN.load", "path", "a checkpoint that fits", got)) from error
        ghn.card = config.get("card", {})
        return ghn.eval()

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        **options: Unpack[HubOptions],
    ) -> GHN:
        """Load a trained GHN: an existing file or folder, a bundled name, or a Hub id, in this order.

        Args:
            device: where it goes; None for the CPU.
            options: of huggingface_hub, for a repository: revision, cache_dir, local_files_only, force_download, token.

        Raises:
            InputError: there is no such file, name or repository. CheckpointError: it is not a GHN.
        """
        ghn = cls.load(checkpoint.find(name, "GHN.from_pretrained", **options))
        return ghn if device is None else ghn.to(device)


def _allocate(shapes: Sequence[tuple[int, ...]], device: torch.device) -> list[Tensor]:
    """Float32 tensors of ``shapes``, in one piece of memory; on a CPU in huge pages, where the system has them."""
    counts = [math.prod(shape) for shape in shapes]
    sizes = [-(-count // 16) * 16 for count in counts]  # each starts on a cache line
    total = max(sum(sizes), 1)
    flat = torch.empty(total, dtype=torch.float32, device=device)
    if device.type == "cpu":
        prefer_huge_pages(flat.data_ptr(), flat.nbytes)
    found = []
    for part, count, shape in zip(flat.split(sizes), counts, shapes, strict=True):
        if count < len(part):
            part[count:].zero_()  # the gap is saved with the tensors
        found.append(part[:count].view(shape))
    return found


_PLAIN = (int, float, str, bool, bytes, type(None), type, FunctionType, BuiltinFunctionType, torch.dtype)
_EXACTLY_PLAIN = frozenset(_PLAIN)  # nearly all attributes there are: known at a glance


def fingerprint(module: nn.Module) -> Hashable | None:
    """What a traced graph depends on: classes, plain attributes, and the shapes of what is held; None if unknowable.

    Two modules with equal fingerprints run the same code with the same settings. An attribute of any other kind (an
    object, a list) could change the forward unseen: then nothing is remembered.
    """
    found: list[Any] = []
    for path, child in module.named_modules(remove_duplicate=False):
        found += (path, type(child))
        for name, value in child.__dict__.items():
            if name in _HELD:
                continue
            if type(value) not in _EXACTLY_PLAIN and not _is_plain(value):
                return None
            found += (name, value)
        for tensors in (child._parameters, child._buffers):
            found.append(None)  # in place of a name: here another list begins
            for name, tensor in tensors.items():
                found += (name, None) if tensor is None else (name, tensor.dtype, *tensor.shape)
        found.append(None)
    return tuple(found)  # flat: thousands of small tuples would bring on full garbage collections


_HELD = frozenset(nn.Module().__dict__) - {"training"}  # containers every module has; hooks do not shape a graph


def _is_plain(value: Any) -> bool:
    if type(value) in (tuple, torch.Size):
        return _EXACTLY_PLAIN.issuperset(map(type, value)) or all(map(_is_plain, value))
    return isinstance(value, _PLAIN)
