"""Results as Markdown and as pictures, from the JSON document alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pudnet.evaluation.budgets import leads
from pudnet.evaluation.harness import Record, binomial_error, mean_and_error
from pudnet.evaluation.rows import ROWS
from pudnet.evaluation.tasks import GROUPS
from pudnet.files import atomic_path

# Differences worth stating, with the standard error of the difference task by task: (what, row, minus this row).
DIFFERENCES = (
    ("predicted, kernel, minus Adam 20 epochs", "predicted-kernel", "adam-20"),
    ("predicted, kernel, minus random weights, kernel", "predicted-kernel", "random-kernel"),
    ("predicted, kernel, minus PCA kernels, kernel", "predicted-kernel", "pca-kernel"),
    ("conditioning gain (own sketch minus another's), kernel", "predicted-kernel", "predicted-kernel-other"),
    ("predicted, kernel, minus predicted from noise, kernel", "predicted-kernel", "predicted-kernel-noise"),
    ("predicted, kernel, minus predicted from the mean embedding", "predicted-kernel", "predicted-kernel-mean"),
    ("predicted, kernel, minus unconditioned network", "predicted-kernel", "unconditioned-kernel"),
    (
        "predicted, kernel, minus unconditioned network with directions",
        "predicted-kernel",
        "unconditioned-directions-kernel",
    ),
    ("directions (predicted, kernel, minus the same without)", "predicted-kernel", "undirected-kernel"),
    ("covariances (predicted, kernel, minus the same without)", "predicted-kernel", "predicted-kernel-plain"),
    ("further views (predicted, kernel, minus every image once)", "predicted-kernel", "predicted-kernel-single"),
    ("kernel head minus ridge head", "predicted-kernel", "predicted-ridge"),
    ("predicted, ridge, minus Adam 20 epochs", "predicted-ridge", "adam-20"),
    ("predicted, cosine, minus Adam 5 epochs", "predicted-cosine", "adam-5"),
    ("predicted, ridge, minus random weights, ridge", "predicted-ridge", "random-ridge"),
    ("predicted, ridge, minus PCA kernels, ridge", "predicted-ridge", "pca-ridge"),
    ("predicted, ridge, minus fine-tuning", "predicted-ridge", "finetune-5"),
    ("predicted, ridge, bfloat16 minus float32 parameters", "predicted-ridge-bfloat16", "predicted-ridge"),
    ("conditioning gain (own sketch minus another's), predicted, ridge", "predicted-ridge", "predicted-ridge-other"),
    ("predicted, ridge, minus predicted from noise, ridge", "predicted-ridge", "predicted-ridge-noise"),
    ("directions (predicted, ridge, minus the same without)", "predicted-ridge", "undirected-ridge"),
    ("predicted and fine-tuned 1 epoch minus Adam 20 epochs", "predicted-finetune-1", "adam-20"),
    ("conditioning gain, predicted, cosine", "predicted-cosine", "predicted-cosine-other"),
    ("conditioning gain, PCA kernels, ridge", "pca-ridge", "pca-ridge-other"),
)
# Columns of the overview: heading, row, and what is taken off it.
OVERVIEW = (
    ("predicted", "predicted-kernel", None),
    ("minus Adam, 20 epochs", "predicted-kernel", "adam-20"),
    ("minus PCA kernels", "predicted-kernel", "pca-kernel"),
    ("conditioning gain", "predicted-kernel", "predicted-kernel-other"),
    ("minus noise", "predicted-kernel", "predicted-kernel-noise"),
    ("minus mean embedding", "predicted-kernel", "predicted-kernel-mean"),
    ("minus unconditioned", "predicted-kernel", "unconditioned-kernel"),
    ("ridge head", "predicted-ridge", None),
    ("ridge: conditioning gain", "predicted-ridge", "predicted-ridge-other"),
)
CURVES = ("adam-5", "adam-20", "sgd-5", "sgd-20")
POINTS = ("predicted-kernel", "predicted-ridge", "predicted-cosine", "pca-kernel", "random-kernel", "finetune-5")


def markdown(document: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """The whole page.

    Args:
        document: what ``harness.save`` wrote.
        pictures: title of each picture and its path relative to the page.
    """
    records: list[Record] = document["records"]
    lines = ["# Results", "", f"Made by `{document['command']}`; do not edit.", "", *_setting(document), ""]
    lines += [*_overview(records, document), ""]
    lines += [*_budget_table(records, document), ""]
    for group, chosen in _groups(records).items():
        lines += [f"## {_title(group, document)}", "", *_caption(group, chosen, document), ""]
        lines += [*_accuracy_table(chosen), ""]
        lines += [*_difference_table(chosen), ""]
    for group, reason in document["skipped"].items():
        lines += [f"## {_title(group, document)}", "", f"Left out: {reason}.", ""]
    for title, path in pictures.items():
        lines += [f"![{title}]({path})", ""]
    return "\n".join(lines).rstrip() + "\n"


def _overview(records: Sequence[Record], document: Mapping[str, Any]) -> list[str]:
    """Every kind of task in a line, and the mean of the kinds."""
    lines = [
        "## Overview",
        "",
        "Top-1 in per cent and differences in points, with the kernel head where nothing else is said; ± where several "
        "tasks allow it.",
        "",
        f"| | {' | '.join(heading for heading, _, _ in OVERVIEW)} |",
        "| --- |" + " ---: |" * len(OVERVIEW),
    ]
    columns: list[list[float]] = [[] for _ in OVERVIEW]
    for group, members in _groups(records).items():
        tops = {key: {record["number"]: record["top1"] for record in chosen} for key, chosen in _rows(members)}
        cells = []
        for (_, plus, minus), column in zip(OVERVIEW, columns, strict=True):
            if plus not in tops or (minus is not None and minus not in tops):
                cells.append("")
                continue
            taken = tops[minus] if minus is not None else dict.fromkeys(tops[plus], 0.0)
            mean, error = mean_and_error([100 * (tops[plus][task] - taken[task]) for task in sorted(tops[plus])])
            column.append(mean)
            cells.append(_signed(mean, minus is not None) + (f" ± {error:.1f}" if error is not None else ""))
        lines.append(f"| {_title(group, document)} | {' | '.join(cells)} |")
    means = [
        _signed(statistics.fmean(column), minus is not None) if column else ""
        for (_, _, minus), column in zip(OVERVIEW, columns, strict=True)
    ]
    return [*lines, f"| mean of these kinds | {' | '.join(means)} |"]


def _budget_table(records: Sequence[Record], document: Mapping[str, Any]) -> list[str]:
    """Whether a prediction, fine-tuned from then on, is ahead of training from scratch all the time."""
    lines = [
        "## At every budget of seconds",
        "",
        "A prediction, from when it is ready, and its fine-tuning, against training from scratch with the best of Adam "
        "and SGD, 5 and 20 epochs, until the longest of these ends: points by which the prediction's side is ahead.",
        "",
        "| | ready after, s | ahead then | least ahead | after, s | ahead at the end | always ahead |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    always = 0
    found = {group: chosen for group, members in _groups(records).items() if (chosen := leads(members))}
    for group, chosen in found.items():
        least = min(chosen, key=lambda lead: lead.ahead)
        always += least.ahead >= 0
        ahead = [_signed(100 * lead.ahead, True) for lead in (chosen[0], least, chosen[-1])]
        cells = [f"{chosen[0].seconds:.1f}", ahead[0], ahead[1], f"{least.seconds:.0f}", ahead[2]]
        lines.append(f"| {_title(group, document)} | {' | '.join(cells)} | {'yes' if least.ahead >= 0 else 'no'} |")
    return [*lines, "", f"Always ahead on {always} of {len(found)}."] if found else []


def _signed(value: float, signed: bool) -> str:
    return f"{value:+.1f}" if signed else f"{value:.1f}"


def _setting(document: Mapping[str, Any]) -> list[str]:
    found = document["environment"]
    versions = f"pudnet {found['pudnet']}, torch {found['torch']}, Python {found['python']}, {found['system']}"
    hardware = f"{found['processor']}, {found['cores']} cores, {found['threads_per_process']} thread(s) per process"
    return [
        f"- Checkpoint: `{document['checkpoint']}` (sha256 of its weights `{document['checkpoint_sha256']}`); "
        f"seed {document['seed']}; {found['date']}",
        *_unconditioned(document),
        f"- Hardware: {hardware}, {document['processes']} process(es) at a time",
        f"- Versions: {versions}",
        "- Accuracy: top-1 in per cent on the test images, ± standard error (over the tasks; for a single task, of the "
        "choice of test images). *Expected*: the leave-one-out accuracy the head reports without any test image.",
        "- Seconds: *weights* for making the weights (with sketch and directions), *finish* for calibration and head, "
        "*training* for gradient steps; *total* is everything from uint8 images in memory to the finished classifier. "
        "Means over the tasks. Finished rows are kept from run to run: on a machine that others use, seconds of "
        "different rows may come from busier and quieter hours.",
        "- Training from scratch uses the same network, images and preprocessing, with a linear classifier; each "
        "number of epochs has its own learning-rate schedule, tuned on classes that appear in no table.",
    ]


def _unconditioned(document: Mapping[str, Any]) -> list[str]:
    """Where the rows of the network that was trained on blank sketches come from."""
    path, digest = document.get("unconditioned"), document.get("unconditioned_sha256")
    return [f"- Rows *unconditioned*: `{path}` (sha256 `{digest}`)"] if digest else []


def _caption(group: str, records: Sequence[Record], document: Mapping[str, Any]) -> list[str]:
    tasks = len({record["number"] for record in records})
    train, test = records[0]["n_train"], records[0]["n_test"]
    drawn = f"{tasks} tasks, each with" if tasks > 1 else "One task with"
    other = {"natural": "the held-out Tiny-ImageNet classes"}.get(GROUPS[group].other, GROUPS[group].other)
    return [f"{drawn} {train} training and {test} test images. Another dataset's sketch: {other}."]


def _accuracy_table(records: Sequence[Record]) -> list[str]:
    lines = [
        "| row | top-1 % | expected % | weights s | finish s | training s | total s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for key, chosen in _rows(records):
        expected = [record["expected"] for record in chosen if record["expected"] is not None]
        cells = [
            ROWS[key].title,
            accuracy_cell(chosen),
            f"{100 * statistics.fmean(expected):.1f}" if expected else "",
            *(_seconds_cell(chosen, part) for part in ("weights", "finish", "training", "total")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _difference_table(records: Sequence[Record]) -> list[str]:
    lines = ["| difference, in points | mean ± standard error, task by task |", "| --- | ---: |"]
    tops = {key: {record["number"]: record["top1"] for record in chosen} for key, chosen in _rows(records)}
    for title, plus, minus in DIFFERENCES:
        if plus in tops and minus in tops:
            both = sorted(set(tops[plus]) & set(tops[minus]))
            mean, error = mean_and_error([100 * (tops[plus][task] - tops[minus][task]) for task in both])
            lines.append(f"| {title} | {mean:+.1f}" + (f" ± {error:.1f} |" if error is not None else " |"))
    return lines if len(lines) > 2 else []


def accuracy_cell(records: Sequence[Record]) -> str:
    """Mean accuracy and standard error of one row, in per cent."""
    mean, error = _accuracy(records)
    return f"{100 * mean:.1f} ± {100 * error:.1f}"


def _accuracy(records: Sequence[Record]) -> tuple[float, float]:
    mean, error = mean_and_error([record["top1"] for record in records])
    return mean, binomial_error(mean, records[0]["n_test"]) if error is None else error


def _seconds_cell(records: Sequence[Record], part: str) -> str:
    values = [record["seconds"][part] for record in records if part in record["seconds"]]
    if not values:
        return ""
    mean = statistics.fmean(values)
    return f"{mean:.3f}" if mean < 1 else f"{mean:.1f}"


def _title(group: str, document: Mapping[str, Any]) -> str:
    return GROUPS[group].title.format(ways=document["ways"])


def _groups(records: Sequence[Record]) -> dict[str, list[Record]]:
    found = {key: [record for record in records if record["group"] == key] for key in GROUPS}
    return {key: chosen for key, chosen in found.items() if chosen}


def _rows(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    found = [(key, [record for record in records if record["row"] == key]) for key in ROWS]
    return [(key, chosen) for key, chosen in found if chosen]


# ---- pictures ---------------------------------------------------------------------------------------------------


def draw_pictures(document: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Two SVG files in ``folder``: accuracy of every row and group; accuracy against seconds, one panel per group."""
    from matplotlib import rc_context

    files = {
        "Accuracy of every row": (folder / "accuracy.svg", _draw_bars),
        "Accuracy against seconds": (folder / "accuracy_seconds.svg", _draw_seconds),
    }
    # Same results, same bytes: fixed identifiers, no date.
    with rc_context({"svg.hashsalt": "pudnet", "svg.fonttype": "none", "font.size": 8}):
        for path, plot in files.values():
            figure = plot(document)
            with atomic_path(path, "evaluation") as temporary:
                figure.savefig(temporary, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return {title: path for title, (path, _) in files.items()}


def _panels(groups: int, width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    figure = Figure(figsize=(width * groups, height))
    return figure, figure.subplots(1, groups, squeeze=False)[0]


def _draw_bars(document: Mapping[str, Any]) -> Any:
    records = document["records"]
    groups = _groups(records)
    figure, axes = _panels(len(groups), 2.4, 3.6)
    for axis, (group, members) in zip(axes, groups.items(), strict=True):
        rows = _rows(members)
        means, errors = zip(*(_accuracy(chosen) for _, chosen in rows), strict=True)
        places = range(len(rows))
        colours = [_colour(key) for key, _ in rows]
        axis.barh(places, [100 * mean for mean in means], xerr=[100 * error for error in errors], color=colours)
        axis.set_yticks(places, [ROWS[key].title for key, _ in rows] if axis is axes[0] else [""] * len(rows))
        axis.invert_yaxis()
        axis.set_title(_title(group, document), fontsize=8)
        axis.set_xlabel("top-1 %")
    return figure


def _draw_seconds(document: Mapping[str, Any]) -> Any:
    records = document["records"]
    groups = _groups(records)
    figure, axes = _panels(len(groups), 2.8, 2.8)
    for axis, (group, members) in zip(axes, groups.items(), strict=True):
        rows = dict(_rows(members))
        for key in (key for key in CURVES if key in rows):
            curves = [record["curve"] for record in rows[key]]
            points = list(zip(*curves, strict=True))  # the same epoch of all tasks
            seconds = [statistics.fmean(point[1] for point in epoch) for epoch in points]
            tops = [100 * statistics.fmean(point[2] for point in epoch) for epoch in points]
            axis.plot(seconds, tops, label=ROWS[key].title, color=_colour(key), linestyle="-" if "20" in key else ":")
        for key, marker in zip((key for key in POINTS if key in rows), "*o^sDv", strict=False):
            seconds = [statistics.fmean(record["seconds"]["total"] for record in rows[key])]
            tops = [100 * statistics.fmean(record["top1"] for record in rows[key])]
            axis.plot(seconds, tops, marker, label=ROWS[key].title, color=_colour(key))
        axis.set_xscale("log")
        axis.set_xlabel("seconds, one thread")
        axis.set_title(_title(group, document), fontsize=8)
    axes[0].set_ylabel("top-1 %")
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=4, frameon=False)
    return figure


def _colour(row: str) -> str:
    families = {
        "predicted": "blue",
        "pca": "green",
        "random": "grey",
        "undirected": "cyan",
        "unconditioned": "pink",
        "directions": "olive",
        "adam": "red",
        "sgd": "orange",
        "pixels": "brown",
        "finetune": "purple",
    }
    return "tab:" + families[row.partition("-")[0]]
