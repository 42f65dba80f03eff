"""Write docs/performance.md and its pictures from the JSON files in benchmarks/results; nothing in it is typed by hand.

    python benchmarks/report.py

A section whose files are not there says which command makes them. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from compare import LEAST_MS, THRESHOLD, agreement, agrees, ratio, rows_of

from pudnet.evaluation import training_time
from pudnet.files import atomic_path

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"
AGAIN = "-again"  # ends the name of a second run's file
NOISY = " ~"

Document = dict[str, Any]
Section = Callable[[Path, Path], list[str]]  # folder of results, folder of the page -> lines


def documents(results: Path, pattern: str) -> dict[Path, Document]:
    """Files that match, second runs left out."""
    return {
        path: json.loads(path.read_text()) for path in sorted(results.glob(pattern)) if not path.stem.endswith(AGAIN)
    }


def table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> list[str]:
    """Markdown; all but the first columns are numbers."""
    rules = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return ["| " + " | ".join(cells) + " |" for cells in (header, rules, *rows)] + [""]


def provenance(environment: Document, commit: str | None = None) -> list[str]:
    """One line: hardware, versions, commit, date."""
    names = ("gpu", "cuda", "driver", "processor", "cpu", "cores", "threads_per_process", "threads", "instruction_set",
             "extension", "python", "torch", "triton", "opencv", "pudnet", "load_average", "clock",
             "allocator", "date")  # fmt: skip
    shown = [f"{name.replace('_', ' ')} {environment[name]}" for name in names if environment.get(name) is not None]
    commit = commit or environment.get("commit")
    return [f"Measured with: {', '.join(shown)}, commit {commit or 'unknown'}.", ""]


def number(value: float | None, digits: int = 3) -> str:
    """With so many significant digits, and thousands apart."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def percent(share: float | None) -> str:
    return "" if share is None else number(100 * share, 2)


# ---- prediction against training --------------------------------------------------------------------------------


def training_section(results: Path, page: Path) -> list[str]:
    lines = []
    for path, document in documents(results, "training-time-*.json").items():
        lines += provenance(document["environment"], document["commit"])
        lines += [*training_time.markdown(document), "", *left_out(document["skipped"])]
        lines += picture(path.with_suffix(".svg"), page, "Accuracy against seconds of training")
    return lines


# ---- make bench -------------------------------------------------------------------------------------------------


def bench_section(results: Path, page: Path) -> list[str]:
    lines = []
    for path, document in documents(results, "bench-*.json").items():
        second = path.with_stem(path.stem + AGAIN)
        again = json.loads(second.read_text()) if second.is_file() else None
        lines += provenance(document["environment"])
        lines += repeatability(document, again)
        drawn = draw_ratios(document, path.with_suffix(".svg"))
        lines += picture(drawn, page, "Times faster than the reference")
        kinds: dict[str, list[Document]] = collections.defaultdict(list)
        for row in document["benchmarks"]:
            kinds[row["group"].partition(":")[0]].append(row)
        cold = kinds.pop("cold start", [])
        steady = noisy_rows(document, again)
        for kind, rows in kinds.items():
            lines += [f"### {kind}", "", *row_table(rows, steady)]
        lines += cold_table(cold)
        lines += left_out(document["left_out"])
    return lines


def noisy_rows(document: Document, again: Document | None) -> set[str]:
    """Names of the rows whose ratio two runs, or two halves of one, do not agree on."""
    rows = rows_of(document)
    noisy = {name for name, info in rows.items() if info["noisy"]}
    if again is not None:
        other = rows_of(again)
        noisy |= {name for name in rows if name in other and not agrees(ratio(name, rows, other))}
    return noisy


def repeatability(document: Document, again: Document | None) -> list[str]:
    if again is None:
        text = "One run; a ratio that differs between the halves of it by more than"
        return [f"{text} {THRESHOLD - 1:.0%} is marked `{NOISY.strip()}`.", ""]
    same, count = agreement(rows_of(document), rows_of(again))
    share = f" ({100 * same // count}%)" if count else ""  # rounded down: nine tenths are asked for
    text = f"Two runs: {same} of {count} ratios{share} of rows above {LEAST_MS:g} ms agree within {THRESHOLD - 1:.0%}."
    return [f"{text} A ratio that differs more, between runs or the halves of one, is marked `{NOISY.strip()}`.", ""]


def row_table(rows: Sequence[Document], noisy: set[str]) -> list[str]:
    """One line for each row of ``make bench``; on a GPU with host and device apart."""
    cuda = any("host_ms" in row["extra_info"] for row in rows)
    header = ["case", "backend", "ms", "times faster than reference"]
    header += ["% of copy", "MB moved", "peak MB", "first call ms", *["host ms", "device ms"] * cuda]
    lines = []
    for row in rows:
        info = row["extra_info"]
        mark = NOISY if row["fullname"].rpartition("/")[2] in noisy else ""
        memory = info["peak_memory_bytes"]
        cells = [
            row["group"].partition(": ")[2],
            info["backend"],
            number(info["median_ms"]),
            number(info.get("times_faster")) + mark,
            percent(info["share_of_copy"]),
            number(info["bytes_moved"] / 1e6),
            number(None if memory is None else memory / 1e6),
            number(info["first_call_ms"]),
        ]
        lines.append(cells + [number(info.get(name)) for name in ("host_ms", "device_ms")] * cuda)
    return table(header, lines, text_columns=2)


def cold_table(rows: Sequence[Document]) -> list[str]:
    """Whole processes."""
    if not rows:
        return []
    header = ["seconds", "whole process", "import torch", "import pudnet", "make model", "first pass", "second pass"]
    names = ("import_torch_s", "import_pudnet_s", "make_model_s", "first_pass_s", "second_pass_s")
    lines = [
        [row["param"], number(row["stats"]["median"]), *(number(row["extra_info"][name]) for name in names)]
        for row in rows
    ]
    return ["### Cold start", "", *table(header, lines)]


def left_out(reasons: dict[str, str]) -> list[str]:
    """What was not measured, by reason."""
    if not reasons:
        return []
    by_reason: dict[str, list[str]] = collections.defaultdict(list)
    for name, reason in reasons.items():
        by_reason[reason].append(name)
    lines = ["Left out:", ""]
    for reason, names in by_reason.items():
        listed = ", ".join(f"`{name}`" for name in names[:3])
        lines.append(f"- {reason}: {listed}{f' and {len(names) - 3} more' if len(names) > 3 else ''}")
    return [*lines, ""]


# ---- the rest ---------------------------------------------------------------------------------------------------


def scaling_section(results: Path, page: Path) -> list[str]:
    lines = []
    for path, document in documents(results, "scaling-*.json").items():
        lines += provenance(document["environment"])
        drawn = draw_scaling(document, path.with_suffix(".svg"))
        lines += picture(drawn, page, "Seconds against sizes")
        header = [
            "cost of",
            "against",
            "with",
            "sizes",
            "seconds",
            "peak MB",
            "exponent",
            "exponent, larger half",
            "commit",
        ]
        rows = []
        for curve in document["curves"].values():
            first, last = curve["points"][0], curve["points"][-1]
            memory = [point.get("peak_memory_bytes") for point in (first, last)]
            rows.append([
                curve["title"], curve["axis"], curve["settings"],
                f"{first['size']:,} to {last['size']:,}",
                f"{number(first['seconds'])} to {number(last['seconds'])}",
                "" if None in memory else " to ".join(number(m / 1e6) for m in memory),
                *(number(curve["exponents"][name], 2) for name in ("all", "upper_half")),
                f"{curve['measured']['commit']}, load {number(curve['measured']['load_average'])}",
            ])  # fmt: skip
        lines += table(header, rows, text_columns=3)
    return lines


def cpu_section(results: Path, page: Path) -> list[str]:
    lines = []
    for document in documents(results, "cpu-*.json").values():
        lines += provenance(document)
        lines += table(["what", "ms"], [[name, number(ms)] for name, ms in document["median_ms"].items()])
        lines += table(["ratio", "times"], [[name, number(value)] for name, value in document["ratios"].items()])
    return lines


def backward_section(results: Path, page: Path) -> list[str]:
    lines = []
    for document in documents(results, "training-cpu-*.json").values():
        lines += provenance(document)
        rows = [
            [row["target"], str(row["batch"]), *(number(row["median_ms"][name]) for name in ("reference", "automatic")),
             number(row["reference over automatic"])]
            for row in document["generation, forward and backward"]
        ]  # fmt: skip
        lines += table(["target", "B", "reference, ms", "automatic, ms", "times faster"], rows)
    return lines


def gpu_section(results: Path, page: Path) -> list[str]:
    lines = []
    for document in documents(results, "nvidia-*.json").values():
        lines += provenance(document["environment"])
        rows = [
            [
                row["name"],
                number(row["median_us"]),
                number(100 * row["share_of_copy"] if "share_of_copy" in row else None),
            ]
            for row in document["rows"]
            if "median_us" in row
        ]
        lines += table(["what", "us", "% of copy"], rows)
    return lines


SECTIONS: dict[str, tuple[str, Section]] = {
    "Prediction against training": ("make bench-train", training_section),
    "Ops, passes, sketching, heads, GHN-2": ("make bench", bench_section),
    "How cost grows": ("make bench-scaling", scaling_section),
    "Prepared generation on the CPU": ("python -m pytest benchmarks/bench_cpu_generation.py", cpu_section),
    "Training on the CPU: codes to gradients": ("python benchmarks/bench_training_backward.py", backward_section),
    "On a GPU": ("make gpu", gpu_section),
}


# ---- pictures ---------------------------------------------------------------------------------------------------


def picture(path: Path, page: Path, title: str) -> list[str]:
    """A link from the page, where there is a picture."""
    return [f"![{title}]({os.path.relpath(path, page).replace(os.sep, '/')})", ""] if path.is_file() else []


def save(figure: Any, path: Path) -> Path:
    with atomic_path(path, "report") as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return path


def style() -> Any:
    """The same picture for the same numbers, in letters that stay text."""
    from matplotlib import rc_context

    return rc_context({"svg.hashsalt": "pudnet", "svg.fonttype": "none", "font.size": 8})


def draw_scaling(document: Document, path: Path) -> Path:
    """Seconds (left) and peak memory (right) against size, one panel for each curve."""
    from matplotlib.figure import Figure

    curves = list(document["curves"].values())
    columns = min(3, len(curves))
    lines = -(-len(curves) // columns)
    with style():
        figure = Figure(figsize=(3.4 * columns, 2.7 * lines), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).flatten()
        for axis, curve in zip(axes, curves, strict=False):
            points = curve["points"]
            sizes = [point["size"] for point in points]
            axis.loglog(sizes, [point["seconds"] for point in points], "o-", ms=3, color="tab:blue")
            if "reused_seconds" in points[0]:
                axis.loglog(sizes, [point["reused_seconds"] for point in points], "s--", ms=3, color="tab:green")
            if points[0].get("peak_memory_bytes"):
                memory = axis.twinx()
                memory.loglog(sizes, [p["peak_memory_bytes"] / 1e6 for p in points], "^:", ms=3, color="tab:orange")
                memory.set_ylabel("MB", color="tab:orange")
            slopes = [number(curve["exponents"][name], 2) for name in ("all", "upper_half")]
            axis.set_title(f"{curve['title']}: exponent {slopes[0]}, larger half {slopes[1]}", fontsize=8)
            axis.set_xlabel(f"{curve['axis']} ({curve['settings']})", fontsize=6)
            axis.set_ylabel("seconds", color="tab:blue")
        for axis in axes[len(curves) :]:
            axis.set_axis_off()
        return save(figure, path)


def draw_ratios(document: Document, path: Path) -> Path:
    """Times faster than the reference, a bar for each row that has such a ratio."""
    from matplotlib.figure import Figure

    rows = [row for row in document["benchmarks"] if row["extra_info"].get("times_faster")]
    with style():
        figure = Figure(figsize=(7, 0.6 + 0.16 * len(rows)))
        axis = figure.subplots()
        names = [f"{row['group']}, {row['extra_info']['backend']}" for row in rows]
        axis.barh(range(len(rows)), [row["extra_info"]["times_faster"] for row in rows], color="tab:blue")
        axis.set_yticks(range(len(rows)), names, fontsize=6)
        axis.invert_yaxis()
        axis.axvline(1, color="black", linewidth=0.5)
        axis.set_xscale("log")
        axis.set_xlabel("times faster than the reference, in turn with it")
        return save(figure, path)


def write(results: Path, page: Path) -> str:
    """The page's text, written to ``page``; the pictures are drawn beside the JSON files."""
    lines = [
        "# Performance",
        "",
        "Written by `python benchmarks/report.py` from the JSON files in `benchmarks/results`: edit neither. How the",
        "numbers are taken and how a row is read: [benchmarks/README.md](../benchmarks/README.md).",
        "",
    ]
    for title, (command, section) in SECTIONS.items():
        found = section(results, page.parent)
        lines += [f"## {title}", "", f"`{command}`", "", *(found or ["Not measured yet.", ""])]
    text = "\n".join(lines).rstrip() + "\n"
    with atomic_path(page, "report") as temporary:
        temporary.write_text(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=PAGE)
    options = parser.parse_args()
    write(options.results, options.output)
    print(options.output)


if __name__ == "__main__":
    main()
