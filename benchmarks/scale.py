"""Fill in the tables of docs/scale.md from the committed measurements: `python benchmarks/scale.py`.

Nothing here is measured: it is arithmetic on results/evaluation.json and results/shards-*.json, and on the sizes of
ImageNet-21K. Lines between a table's markers are replaced.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pudnet.files import atomic_path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "scale.md"

IMAGES, PHOTO_BYTES = 14_197_122, 110_000  # ImageNet-21K, and about what a file of it takes
CORES = (16, 64, 256)
LOO_ROWS = 2048
LAMBDAS = 4  # that are tried, about
GIGABIT = 1e9 / 8  # bytes a second
NETWORK = 10 * GIGABIT
DAY, DATASETS = 86_400, 1_000_000


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit, least in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= least:
            return f"{count / least:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def duration(seconds: float) -> str:
    for unit, length in (("d", DAY), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"


def memory(measured: dict[str, Any]) -> str:
    """What one process holds for the head, by part."""
    rows, classes = [], measured["classes"]
    for name, target in measured["targets"].items():
        for head, width in target["features"].items():
            kept = max(width, LOO_ROWS)
            parts = [8 * width * width, 8 * classes * width, 4 * kept * width, 8 * 3 * LOO_ROWS * classes]
            weights = 4 * classes * width
            rows.append([f"{name}, {head}", f"{width:,}", *map(size, parts), size(sum(parts)), size(weights)])
    header = [
        "target, head",
        "features F",
        "F x F sums",
        "K x F sums",
        "rows kept",
        "leave-one-out",
        "together",
        "head in the file",
    ]
    return table(header, rows)


def passes(measured: dict[str, Any]) -> str:
    """Seconds of both passes and of what is between the processes."""
    rows = []
    first = IMAGES * (1 / measured["photos_decoded_a_second"] + 1 / measured["images_sketched_a_second"])
    for name, target in measured["targets"].items():
        width, sums = target["features"][target["head"]], target["sums"]
        read = 1 / measured["photos_decoded_a_second"]
        second = IMAGES * (read + 1 / target["images_a_second"] + 1 / sums["images_a_second"])
        travels = 8 * width * width + 8 * measured["classes"] * width + 4 * max(width, LOO_ROWS) * width
        for cores in CORES:
            rounds = math.ceil(math.log2(cores))
            merging = rounds * (sums["merge_seconds"] + travels / NETWORK) + rounds * travels / NETWORK
            solving = LAMBDAS * (sums["factor_seconds"] + sums["solve_seconds"])
            total = (first + second) / cores + merging + solving
            shown = map(duration, (first / cores, second / cores, merging, solving, total))
            rows.append([f"{name}, {target['head']}", cores, *shown, size(travels)])
    header = ["target, head", "cores", "sketching", "sums", "merging", "solving", "all", "travels per merge"]
    return table(header, rows)


def small(evaluation: dict[str, Any], measured: dict[str, Any]) -> str:
    """Cores for a million small datasets a day."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in evaluation["records"]:
        if record["row"] in ("predicted-ridge", "predicted-cosine"):
            found.setdefault((record["group"], record["row"]), []).append(record)
    rows = []
    for (group, row), records in found.items():
        images = statistics.mean(record["n_train"] for record in records)
        seconds = statistics.mean(record["seconds"]["total"] for record in records)
        weights = statistics.mean(record["seconds"]["weights"] for record in records)
        decoding = images / measured["photos_decoded_a_second"]
        cores, with_decoding = (DATASETS * each / DAY for each in (seconds, seconds + decoding))
        arriving = DATASETS * images * PHOTO_BYTES / DAY
        name = f"{group}, {row.removeprefix('predicted-')}"
        figures = (f"{images:,.0f}", f"{seconds:.2f}", f"{weights / seconds:.0%}", f"{cores:,.0f}")
        rows.append([name, *figures, f"{with_decoding:,.0f}", size(arriving) + "/s"])
    header = [
        "datasets like, head",
        "images",
        "core seconds",
        "of them weights",
        "cores",
        "cores with decoding",
        "comes in as photos",
    ]
    return table(header, rows)


def main() -> None:
    paths = sorted(RESULTS.glob("shards-*.json"))
    measured = json.loads(paths[0].read_text())
    evaluation = json.loads((RESULTS / "evaluation.json").read_text())
    rates = [
        ["photos decoded and made 32 x 32", f"{measured['photos_decoded_a_second']:,.0f}"],
        ["images of 32 x 32 sketched", f"{measured['images_sketched_a_second']:,.0f}"],
    ]
    for name, target in measured["targets"].items():
        width = target["features"][target["head"]]
        rates.append([f"{name}: pixels to features", f"{target['images_a_second']:,.1f}"])
        rates.append(
            [
                f"{name}: features into sums (F = {width:,}, K = {measured['classes']:,})",
                f"{target['sums']['images_a_second']:,.0f}",
            ]
        )
    text = PAGE.read_text()
    tables = {
        "rates": table(["one core, images a second", paths[0].name], rates),
        "memory": memory(measured),
        "passes": passes(measured),
        "small": small(evaluation, measured),
    }
    for name, content in tables.items():
        pattern = re.compile(f"(<!-- {name}:.*?-->\n).*?(<!-- end -->)", re.DOTALL)
        text, replaced = pattern.subn(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text)
        assert replaced == 1, name
    with atomic_path(PAGE, "scale") as path:
        path.write_text(text)


if __name__ == "__main__":
    main()
