"""What predicting the weights of an architecture costs on one CPU thread: `python benchmarks/bench_ghn.py`.

In one run: pudnet the first time it sees an architecture (trace, states, weights into fresh memory), pudnet with the
graph known and memory used again, and a plain PyTorch version (node by node, parameter by parameter), with and
without the graph known; outputs are compared. Then the cost against the number of nodes and of parameters.

Every time is a median, in each of some sittings in turn. On a machine that others use too the sittings differ: the
smallest of their medians counts, of the plain version too, and the largest is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "fixtures"))

import plain_ghn
from torchvision_nets import NETWORKS, BasicBlock, ResNet

from pudnet.graphs import trace
from pudnet.interop import import_released_ghn2


def seconds(run: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    """Median over ``repeats`` runs."""
    run()
    taken = []
    for _ in range(repeats):
        start = clock()
        run()
        taken.append(clock() - start)
    return statistics.median(taken)


def compare(name: str, repeats: int, sittings: int, clock: Callable[[], float]) -> dict[str, Any]:
    """One of the networks of the parity tests against the plain version."""
    state = plain_ghn.released_state(0, width=32)
    ghn = import_released_ghn2(state)
    module = NETWORKS[name]()

    def first() -> object:
        ghn._graphs.clear()
        ghn._prepared.clear()
        return ghn.generate(module)

    with torch.no_grad():
        graph, out = ghn.graph(module), ghn.generate(module)
        plain = plain_ghn.predict(state, graph)
        error = max(float((out[key] - plain[key]).norm() / plain[key].norm()) for key in plain)
        del plain
        few = max(3, repeats // 5)
        runs: dict[str, tuple[Callable[[], object], int]] = {
            "trace": (lambda: trace(module), repeats),
            "first time": (first, repeats),
            "graph known": (lambda: ghn.generate(module), repeats),
            "graph known, memory reused": (lambda: ghn.generate(module, out=out), repeats),
            "plain, first time": (lambda: plain_ghn.predict(state, trace(module)), few),
            "plain, graph known": (lambda: plain_ghn.predict(state, graph), few),
        }
        medians: dict[str, list[float]] = {key: [] for key in runs}
        for _ in range(sittings):
            for key, (run, count) in runs.items():
                medians[key].append(seconds(run, count, clock))
    least = {key: min(values) for key, values in medians.items()}
    return {
        "network": name,
        "parameters": graph.num_parameters,
        "nodes": len(graph.nodes),
        "largest relative error": error,
        **least,
        "medians": medians,
        "times faster, first time": least["plain, first time"] / least["first time"],
        "times faster, graph known": least["plain, graph known"] / least["graph known, memory reused"],
    }


class Chain(nn.Module):
    """``blocks`` residual blocks of ``width`` channels: 5 nodes each."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, bias=False)
        self.blocks = nn.Sequential(*(BasicBlock(width, width, 1, None) for _ in range(blocks)))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)))


def scaling(repeats: int, clock: Callable[[], float]) -> dict[str, list[dict[str, Any]]]:
    """Cost against nodes (narrow chains) and against parameters (a ResNet-18 of several widths)."""
    ghn = import_released_ghn2(plain_ghn.released_state(0, width=32))
    makers = {
        "nodes": [lambda blocks=blocks: Chain(8, blocks) for blocks in (9, 19, 49, 99, 199)],
        "parameters": [
            lambda width=width: ResNet(BasicBlock, (2, 2, 2, 2), width=width) for width in (19, 42, 105, 192)
        ],
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for kind, members in makers.items():
        found[kind] = []
        for make in members:
            module = make()
            graph, out = ghn.graph(module), ghn.generate(module)

            def first(module: nn.Module = module) -> object:
                ghn._graphs.clear()
                ghn._prepared.clear()
                return ghn.generate(module)

            found[kind].append({
                "nodes": len(graph.nodes),
                "parameters": graph.num_parameters,
                "first time": seconds(first, repeats, clock),
                "graph known, memory reused": seconds(
                    lambda module=module, out=out: ghn.generate(module, out=out), repeats, clock
                ),
            })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["resnet50"], help=f"among {', '.join(sorted(NETWORKS))}")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--sittings", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a machine others use too")
    parser.add_argument("--scaling", action="store_true", help="cost against nodes and parameters as well")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.perf_counter if options.clock == "wall" else time.thread_time
    results: dict[str, Any] = {"clock": options.clock, "torch": torch.__version__, "networks": []}
    for name in options.networks:
        found = compare(name, options.repeats, options.sittings, clock)
        results["networks"].append(found)
        print(f"{name}: {found['parameters'] / 1e6:.1f} M parameters, {found['nodes']} nodes")
        print(
            f"  largest relative error {found['largest relative error']:.1g}; ms, the smallest and the largest median"
        )
        for key, values in found["medians"].items():
            print(f"  {key:<28}{1e3 * min(values):9.2f} {1e3 * max(values):9.2f}")
        for key in ("first time", "graph known"):
            print(f"  times faster, {key:<14}{found[f'times faster, {key}']:9.1f}")
    if options.scaling:
        results["scaling"] = scaling(max(3, options.repeats // 3), clock)
        for kind, rows in results["scaling"].items():
            print(f"against {kind}")
            for row in rows:
                times = (
                    f"{1e3 * row['first time']:9.2f} ms first {1e3 * row['graph known, memory reused']:9.2f} ms reused"
                )
                print(f"  {row['nodes']:6d} nodes {row['parameters'] / 1e6:8.2f} M parameters {times}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
