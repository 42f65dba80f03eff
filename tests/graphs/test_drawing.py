"""Drawings: well-formed, one box per node, one line per edge, whatever the names."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from torch import Tensor, nn

from pudnet.graphs import draw, trace

SVG = "{http://www.w3.org/2000/svg}"


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.add_module("a<&>" + "long" * 20, nn.Conv2d(3, 3, 1))
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(next(self.children())(x))


def test_drawing() -> None:
    graph = trace(Skip())
    root = ElementTree.fromstring(draw(graph))
    assert len(root.findall(f"{SVG}g")) == len(graph.nodes) == 5
    assert len(root.findall(f"{SVG}path")) == len(graph.edges) == 5
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for box in root.iter(f"{SVG}rect"):
        if "x" in box.attrib:
            assert 0 <= float(box.attrib["x"]) <= width - float(box.attrib["width"])
            assert 0 <= float(box.attrib["y"]) <= height - float(box.attrib["height"])
    assert any("a<&>" in (title.text or "") for title in root.iter(f"{SVG}title"))
