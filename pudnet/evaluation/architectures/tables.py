"""Accuracy on unseen architectures as Markdown and as a picture, from the JSON document alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pudnet.evaluation.architectures.measure import EPOCHS, METHODS, SPLITS, UNTRAINED
from pudnet.evaluation.harness import Record, mean_and_error
from pudnet.files import atomic_path

TITLES = {
    "ghn2": "GHN-2",
    "ghn1": "GHN-1",
    "mlp": "MLP",
    UNTRAINED: "default initialisation",
    **{method: f"SGD, {epochs} epoch{'s' * (epochs > 1)}" for method, epochs in EPOCHS.items()},
}
COLOURS = dict(zip(METHODS, ("blue", "cyan", "green", "grey", "orange", "red"), strict=True))
# Differences worth stating, network by network: (plus, minus, of networks with BatchNorm alone).
DIFFERENCES = (
    ("ghn2", "ghn1", False),
    ("ghn1", "mlp", False),
    ("ghn2", "mlp", False),
    ("ghn2", UNTRAINED, False),
    *(("ghn2", method, norm) for method in EPOCHS for norm in (False, True)),
)


def markdown(document: Mapping[str, Any], picture: str) -> list[str]:
    """The generated section of the page.

    Args:
        document: what ``__main__.py`` wrote.
        picture: path of the picture relative to the page.
    """
    found = _by_split(document)
    return [
        *_setting(document),
        "",
        *_networks(document, found),
        "",
        *_all_networks(found),
        "",
        f"The first {document['trained']} networks of each split, which SGD has trained as well:",
        "",
        *_accuracy(found, list(METHODS), document["trained"]),
        "",
        *_differences(found),
        *_ranks(found, document["trained"]),
        f"![Accuracy on unseen architectures]({picture})",
    ]


def card(document: Mapping[str, Any]) -> list[str]:
    """The generated section of the model card."""
    return [*_setting(document), "", *_all_networks(_by_split(document))]


Found = dict[str, dict[str, dict[int, Record]]]  # split -> method -> number of the network


def _by_split(document: Mapping[str, Any]) -> Found:
    found: Found = {}
    for split in SPLITS:
        for method in document["methods"]:
            chosen = {r["number"]: r for r in document["records"] if (r["split"], r["method"]) == (split, method)}
            if chosen:
                found.setdefault(split, {})[method] = chosen
    return found


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _setting(document: Mapping[str, Any]) -> list[str]:
    found, sgd = document["environment"], document["sgd"]
    rates = ", ".join(f"{rate:g} for {EPOCHS[name]} epoch(s)" for name, rate in document["rates"].items())
    widths, stems = (", ".join(map(str, document["limits"]["test"][name])) for name in ("widths", "stems"))
    tried = ", ".join(f"{rate:g}" for rate in sgd["rates"])
    lines = [
        f"Made by `{document['command']}` on {found['date']} ({found['processor']}, pudnet {found['pudnet']}, torch "
        f"{found['torch']}) from `{document['json']}`.",
        "",
        f"- Images: {document['test_images']} of the test part of `{document['images']}` (seed {document['seed']}), "
        "which no training and no tuning reads. BatchNorm on the statistics of the batch for every row, "
        f"{document['batch']} images in each.",
        f"- Networks: seed {document['seed']}, number 0 and up of each split; initial channels {widths} (four "
        f"times as many in wide), stem types {stems}, and the limits of the table: those of "
        f"`{document['recipe']}`, or where the split cannot obey them, the smallest that it can.",
    ]
    if document["rates"]:
        lines.append(
            f"- SGD: {sgd['images']} images of the training part, batches of {sgd['batch']}, from the default "
            f"initialisation; momentum {sgd['momentum']} (Nesterov), weight decay {sgd['weight_decay']:g}, gradients "
            f"clipped to norm {sgd['clip']:g}, the rate up for {100 * sgd['warmup']:.0f} % of the steps and down to "
            f"zero along a cosine. Peak rate {rates}: the best of {tried} on {document['tuning']} networks of "
            "the split val and other training images."
        )
    for method, one in document["checkpoints"].items():
        began = f", from `{one['start']}` on" if one.get("start") else ""
        lines.append(
            f"- {TITLES[method]}: {one['steps']} steps of {one['architectures']} architecture(s), seed {one['seed']}"
            f"{began}, sha256 `{one['sha256'][:16]}`."
        )
    return lines


def _networks(document: Mapping[str, Any], found: Found) -> list[str]:
    rows = []
    for split, methods in found.items():
        records = list(max(methods.values(), key=len).values())
        nodes, parameters = [r["nodes"] for r in records], [r["parameters"] for r in records]
        limits = document["limits"][split]
        rows.append([
            split,
            str(len(records)),
            str(limits["most_cells"]),
            f"{limits['most_parameters'] * (4 if split == 'wide' else 1):,}",
            f"{statistics.fmean(nodes):.0f} ({min(nodes)} to {max(nodes)})",
            f"{statistics.fmean(parameters):,.0f} ({min(parameters):,} to {max(parameters):,})",
        ])  # fmt: skip
    return _table(["split", "networks", "cells at most", "parameters at most", "nodes", "parameters"], rows)


def _all_networks(found: Found) -> list[str]:
    title = "Top-1 in per cent, mean over all networks ± standard error (best network):"
    return [title, "", *_accuracy(found, [method for method in METHODS if method not in EPOCHS])]


def _accuracy(found: Found, methods: Sequence[str], first: int | None = None) -> list[str]:
    rows = []
    for method in methods:
        cells, seconds = [], []
        for of in found.values():
            records = [r for r in of.get(method, {}).values() if first is None or r["number"] < first]
            cells.append(_cell([r["top1"] for r in records]))
            seconds += [r["seconds"] for r in records]
        if seconds:
            rows.append([TITLES[method], *cells, f"{statistics.fmean(seconds):.2g}"])
    return _table(["parameters from", *found, "processor s to make them"], rows)


def _cell(tops: Sequence[float]) -> str:
    if not tops:
        return ""
    mean, error = mean_and_error([100 * top for top in tops])
    return f"{mean:.1f}" + (f" ± {error:.1f}" if error is not None else "") + f" ({100 * max(tops):.1f})"


def _differences(found: Found) -> list[str]:
    rows = []
    for plus, minus, norm in DIFFERENCES:
        cells = []
        for of in found.values():
            first, second = of.get(plus, {}), of.get(minus, {})
            both = [n for n in sorted(set(first) & set(second)) if first[n]["batch_norm"] or not norm]
            if not both:
                cells.append("")
                continue
            mean, error = mean_and_error([100 * (first[n]["top1"] - second[n]["top1"]) for n in both])
            cells.append(f"{mean:+.1f}" + (f" ± {error:.1f}" if error is not None else "") + f" ({len(both)})")
        if any(cells):
            where = ", networks with BatchNorm" if norm else ""
            rows.append([f"{TITLES[plus]} minus {TITLES[minus]}{where}", *cells])
    if not rows:
        return []
    title = "Difference in points, network by network, mean ± standard error (number of networks):"
    return [title, "", *_table(["difference", *found], rows), ""]


def _ranks(found: Found, first: int) -> list[str]:
    """Whether predicted parameters rank networks as training does: Kendall's tau with the longest SGD."""
    longest = max(EPOCHS, key=lambda method: EPOCHS[method])
    rows = []
    for method in (m for m in METHODS if m not in EPOCHS):
        taus = {split: _tau(of.get(method, {}), of.get(longest, {})) for split, of in found.items()}
        known = [tau for tau in taus.values() if tau is not None]
        if known:
            cells = ["" if tau is None else f"{tau:+.2f}" for tau in taus.values()]
            rows.append([TITLES[method], *cells, f"{statistics.fmean(known):+.2f}"])
    if not rows:
        return []
    title = f"Kendall's tau between the accuracies of these {first} networks and theirs after {TITLES[longest]}:"
    return [title, "", *_table(["parameters from", *found, "mean"], rows), ""]


def _tau(predicted: Mapping[int, Record], trained: Mapping[int, Record]) -> float | None:
    from scipy.stats import kendalltau  # type: ignore[import-untyped]

    both = sorted(set(predicted) & set(trained))
    if len(both) < 3:
        return None
    tau = float(kendalltau([predicted[n]["top1"] for n in both], [trained[n]["top1"] for n in both]).statistic)
    return None if tau != tau else tau  # undefined where all are equal


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Mean accuracy by split and method as SVG, with standard errors and the best network."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    found = _by_split(document)
    methods = [method for method in METHODS if any(method in of for of in found.values())]
    with rc_context({"svg.hashsalt": "pudnet", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(7.2, 2.8))
        axis = figure.subplots()
        for place, method in enumerate(methods):
            tops = {at: [100 * r["top1"] for r in of[method].values()]
                    for at, of in enumerate(found.values()) if method in of}  # fmt: skip
            means, errors = zip(*map(mean_and_error, tops.values()), strict=True)
            at = [split + (place - (len(methods) - 1) / 2) * 0.8 / len(methods) for split in tops]
            colour = f"tab:{COLOURS[method]}"
            spread = [error or 0.0 for error in errors]
            axis.bar(at, means, 0.76 / len(methods), yerr=spread, color=colour, label=TITLES[method])
            axis.plot(at, [max(values) for values in tops.values()], "_", color=colour)
        axis.axhline(10, color="black", linewidth=0.5, linestyle=":")
        axis.set_xticks(range(len(found)), list(found))
        axis.set_ylabel("top-1 %, mean and best")
        figure.legend(loc="upper center", ncols=len(methods), frameon=False)
        with atomic_path(path, "evaluation") as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None}, bbox_inches="tight")
