"""Graphs as SVG: one box per node, levels from top to bottom; needs no other tool."""

from __future__ import annotations

from collections import defaultdict
from html import escape

from pudnet.graphs.graph import ArchGraph, GraphNode

BOX, GAP, ROW, MARGIN = 190, 24, 46, 20  # pixels
HEIGHT = 26
COLOURS = {
    "conv": "#cfe2f3", "sep_conv": "#9fc5e8", "dil_conv": "#6fa8dc", "bias": "#eeeeee", "bn": "#d9ead3",
    "ln": "#d9ead3", "sum": "#fff2cc", "concat": "#ffe599", "msa": "#ead1dc", "cse": "#f4cccc", "max_pool": "#fce5cd",
    "avg_pool": "#fce5cd", "glob_avg": "#f9cb9c", "pos_enc": "#d9d2e9", "input": "#ffffff",
}  # fmt: skip


def draw(graph: ArchGraph) -> str:
    """The graph as the text of an SVG file."""
    levels: dict[int, list[int]] = defaultdict(list)
    for node, level in enumerate(graph.levels.tolist()):
        levels[level].append(node)
    columns = max(map(len, levels.values()), default=1)
    width = 2 * MARGIN + columns * (BOX + GAP) - GAP
    height = 2 * MARGIN + max(len(levels) - 1, 0) * ROW + HEIGHT
    centre: dict[int, tuple[float, float]] = {}
    for level, nodes in levels.items():
        left = (width - len(nodes) * (BOX + GAP) + GAP) / 2
        for place, node in enumerate(nodes):
            centre[node] = (left + place * (BOX + GAP) + BOX / 2, MARGIN + level * ROW + HEIGHT / 2)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="10" text-anchor="middle">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for source, destination in graph.edges:
        lines.append(_edge(centre[source], centre[destination], graph.levels[destination] - graph.levels[source] > 1))
    lines += [_box(node, *centre[number]) for number, node in enumerate(graph.nodes)]
    return "\n".join([*lines, "</svg>", ""])


def _edge(start: tuple[float, float], end: tuple[float, float], long: bool) -> str:
    """A line from box to box; one that passes other levels bends around them."""
    (x0, y0), (x1, y1) = (start[0], start[1] + HEIGHT / 2), (end[0], end[1] - HEIGHT / 2)
    if not long:
        return f'<path d="M{x0:g} {y0:g} L{x1:g} {y1:g}" stroke="#555" fill="none"/>'
    side = max(x0, x1) + BOX / 2 + GAP / 2
    bend = f"C{side:g} {start[1]:g} {side:g} {end[1]:g} {x1 + BOX / 2:g} {end[1]:g}"
    return f'<path d="M{x0 + BOX / 2:g} {start[1]:g} {bend}" stroke="#a55" fill="none"/>'


def _box(node: GraphNode, x: float, y: float) -> str:
    shape = "" if node.shape is None else " " + "x".join(map(str, node.shape))
    label = node.label if len(node.label) <= 36 else f"...{node.label[-33:]}"
    return (
        f'<g><title>{escape(node.label)}</title><rect x="{x - BOX / 2:g}" y="{y - HEIGHT / 2:g}" width="{BOX}" '
        f'height="{HEIGHT}" rx="4" fill="{COLOURS[node.primitive]}" stroke="#333"/>'
        f'<text x="{x:g}" y="{y - 2:g}" font-weight="bold">{node.primitive}{shape}</text>'
        f'<text x="{x:g}" y="{y + 9:g}" font-size="8" fill="#555">{escape(label)}</text></g>'
    )
