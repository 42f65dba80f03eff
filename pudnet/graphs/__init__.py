"""Networks as graphs: capture from any module, the space of random architectures, drawings."""

from pudnet.graphs.deepnets1m import DeepNet, deepnets, statistics
from pudnet.graphs.drawing import draw
from pudnet.graphs.graph import PRIMITIVES, ArchGraph, GraphNode, GraphParameter
from pudnet.graphs.networks import make_network, preset_networks
from pudnet.graphs.tracing import trace

__all__ = [
    "PRIMITIVES",
    "ArchGraph",
    "DeepNet",
    "GraphNode",
    "GraphParameter",
    "deepnets",
    "draw",
    "make_network",
    "preset_networks",
    "statistics",
    "trace",
]
