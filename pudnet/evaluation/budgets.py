"""Prediction, then fine-tuning, beside training from scratch: who is more accurate after how many seconds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from pudnet.evaluation.harness import Record

Curve = Sequence[Sequence[float]]  # of (epoch, seconds, top1)

PREDICTED = ("predicted-finetune-1", "predicted-finetune-5")  # their curves begin with the prediction
SCRATCH = ("adam-5", "adam-20", "sgd-5", "sgd-20")


class Lead(NamedTuple):
    """By how much what a prediction leads to is ahead of training after ``seconds``; accuracies from 0 to 1."""

    seconds: float
    ahead: float


def leads(records: Sequence[Record]) -> list[Lead]:
    """At every moment at which a curve changes, from when every task's prediction is ready; means over the tasks.

    On either side the best counts that any schedule has reached by then; before the first epoch of training from
    scratch that is nothing.

    Args:
        records: of one group.

    Returns:
        Ascending in seconds; empty where one side has no curve.
    """
    sides = []
    for rows in (PREDICTED, SCRATCH):
        tasks: dict[int, list[Curve]] = {}
        for record in records:
            if record["row"] in rows and record["curve"]:
                tasks.setdefault(record["number"], []).append(record["curve"])
        sides.append(tasks)
    ours, theirs = sides
    both = sorted(set(ours) & set(theirs))
    if not both:
        return []
    ready = max(min(curve[0][1] for curve in ours[task]) for task in both)
    moments = {point[1] for task in both for curve in (*ours[task], *theirs[task]) for point in curve}
    return [
        Lead(seconds, statistics.fmean(_best(ours[task], seconds) - _best(theirs[task], seconds) for task in both))
        for seconds in sorted(moments)
        if seconds >= ready
    ]


def _best(curves: Sequence[Curve], seconds: float) -> float:
    """The last accuracy of each curve up to then, and the best of these."""
    reached = ([top1 for _, at, top1 in curve if at <= seconds] for curve in curves)
    return max((tops[-1] for tops in reached if tops), default=0.0)
