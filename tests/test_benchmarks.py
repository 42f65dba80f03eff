"""The benchmarks notice a slow and a wrong backend, and docs/performance.md is what the committed numbers give."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pudnet import _extension

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench_scaling
import compare
import report
import timing
from bench_scaling import exponents

ROOT = Path(__file__).resolve().parents[1]

SABOTAGE = """
import dataclasses

from pudnet import backends, ops


def replace(op, change):
    known = backends._implementations[op]["native"]
    backends._implementations[op]["native"] = dataclasses.replace(known, run=change(known.run))


def slowed(run):
    return lambda *arguments: [run(*arguments) for _ in range(4)][-1]


def wrong(run):
    def work(*arguments):
        means, *rest = run(*arguments)
        return means * 1.001, *rest

    return work


replace("layer_recurrence", slowed)
replace("class_stats", wrong)
"""


def bench(output: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run two rows of the suite in a process of their own."""
    rows = "(native or reference) and ((class_stats and 64) or (layer_recurrence and convnet3))"
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_ops.py", "-k", rows, f"--benchmark-json={output}"]
    variables = {name: value for name, value in os.environ.items() if "XDIST" not in name}  # it would time nothing
    variables |= {"PUDNET_BENCH_SECONDS": "0.2", "PYTHONPATH": str(output.parent)}
    done = subprocess.run([*command, *options], cwd=ROOT, env=variables, capture_output=True, text=True)
    return done, json.loads(output.read_text())


@pytest.mark.skipif(bool(_extension.why_not()), reason="the saboteur changes the native backend, which is not there")
def test_a_slow_and_a_wrong_backend_are_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sabotage.py").write_text(SABOTAGE)
    good, before = bench(tmp_path / "before.json")
    assert good.returncode == 0, good.stdout
    bad, after = bench(tmp_path / "after.json", "-p", "sabotage")
    assert len(before["benchmarks"]) == 4 and before["failed"] == []
    for row in before["benchmarks"]:
        info = row["extra_info"]
        assert {"median_ms", "share_of_copy", "peak_memory_bytes", "first_call_ms"} <= info.keys()
        assert ({"times_faster", "reference_ms", "noisy"} <= info.keys()) == (info["backend"] == "native")
        assert info["rounds"] == row["stats"]["rounds"] > timing.SITTINGS

    assert bad.returncode == 1 and "agree with the reference within 1e-04; it differs by" in bad.stdout
    assert [name for name in after["failed"] if "class_stats" in name]
    timed = [row["group"] for row in after["benchmarks"] if row["extra_info"]["backend"] == "native"]
    assert timed == ["layer_recurrence: convnet3 B=1"], "a wrong row has a time"

    assert compare.main([str(tmp_path / "before.json"), str(tmp_path / "after.json")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any("layer_recurrence" in line and "SLOWER" in line for line in lines)
    assert any("class_stats" in line and "is gone" in line for line in lines)
    assert compare.main([str(tmp_path / "before.json")] * 2) == 0
    before["failed"] = ["test_op[class_stats-100 rows of 64-reference]"]
    (tmp_path / "wrong.json").write_text(json.dumps(before))
    assert compare.main([str(tmp_path / "before.json"), str(tmp_path / "wrong.json")]) == 1
    assert "64-reference] failed its check" in capsys.readouterr().out


def test_disagreement() -> None:
    x = torch.arange(4.0)
    assert timing.disagreement({"a": x}, {"a": x.double()}) == 0
    assert timing.disagreement([x + 0.03], [x]) == pytest.approx(0.01)
    assert timing.disagreement([x], [x[None]]) == math.inf
    assert timing.disagreement([x * torch.nan], [x]) == math.inf
    long = -torch.arange(3.0 * timing.PIECE, dtype=torch.float64) - 1  # in several pieces
    other, copied = long.clone(), long.clone()
    other[-1] *= 1.5
    assert timing.disagreement([other], [long]) == pytest.approx(0.5)
    assert torch.equal(long, copied)  # nothing is written into what is compared
    assert timing.disagreement([x[:0]], [x[:0]]) == 0
    with pytest.raises(AssertionError, match="not timed"):
        timing.check(x * torch.nan, x, 1.0)


def test_a_machine_that_slows_down_changes_no_ratio() -> None:
    drift = [1 + 0.2 * i for i in range(20)]
    paired = timing.Paired([1 * factor for factor in drift], [3 * factor for factor in drift])
    assert paired.ratio() == pytest.approx(3) and not paired.noisy
    noisy = timing.Paired([1.0] * 20, [3.0] * 10 + [4.0] * 10)
    assert noisy.noisy
    assert timing.Paired([1.0], [3.0]).noisy  # nobody knows


def test_a_neighbour_that_slows_one_more_than_the_other_in_most_rounds_changes_no_ratio() -> None:
    disturbed = [i % 5 > 1 for i in range(20)]  # three rounds of five
    candidate = [1.2 if slow else 1.0 for slow in disturbed]
    reference = [4.5 if slow else 3.0 for slow in disturbed]
    assert timing.Paired(candidate, reference).ratio() == pytest.approx(3)
    assert timing.Paired(reference, candidate).ratio() == pytest.approx(1 / 3)  # whichever is disturbed more


def test_rows_of_a_case_share_the_rounds_of_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(timing, "clock", lambda: now[0])
    calls = []

    def taking(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            calls.append(name)
            now[0] += seconds

        return run

    def case(scale: float) -> list[timing.Row]:
        reference = taking("reference", 4 * scale)
        runs = (None, taking("a", 2 * scale), taking("b", scale))
        times = (4 * scale, 2 * scale, scale)
        return [
            timing.Row(run, reference, timing.Paired([time], [4 * scale]), {}, moved=1, rate=1.0)
            for run, time in zip(runs, times, strict=True)
        ]

    # Seconds of a round, rounds counted in six sittings, rounds in all.
    for seconds, counted, made in ((7e-4, 36, 42), (0.35, 6, 12), (0.7, 6, 6), (7.0, 3, 3)):
        rows = case(seconds / 7)
        calls.clear()
        for sitting in range(6):
            timing.sit(rows, sitting)
        assert calls == ["reference", "a", "b"] * made
        own, *others = (row.columns for row in rows)
        assert [row["times_faster"] for row in others] == pytest.approx([2, 4])
        assert own["median_ms"] == pytest.approx(4e3 * seconds / 7) and not {"times_faster", "noisy"} & own.keys()
        assert {row.columns["rounds"] for row in rows} == {1 + counted}


def test_exponents() -> None:
    sizes = [10, 100, 1000, 10_000]
    found = exponents(sizes, [1 if size < 100 else 1e-3 * size**1.5 for size in sizes])
    assert found["upper_half"] == pytest.approx(1.5) and found["all"] < 1.3
    assert exponents([10], [1.0])["all"] is None


def test_the_report_says_what_is_not_measured(tmp_path: Path) -> None:
    text = report.write(tmp_path, tmp_path / "performance.md")
    assert text.count("Not measured yet.") == len(report.SECTIONS)


def test_curves_not_measured_again_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = bench_scaling.Part("nothing", "size", "none", (1, 2), lambda size: lambda: None)
    monkeypatch.setattr(bench_scaling, "PARTS", {"one": part, "other": part})
    output = tmp_path / "scaling.json"
    for name in ("one", "other"):
        monkeypatch.setattr(sys, "argv", ["", "--only", name, "--seconds", "0", "--output", str(output)])
        bench_scaling.main()
    assert set(json.loads(output.read_text())["curves"]) == {"one", "other"}


def test_two_runs_mark_what_they_do_not_agree_on(tmp_path: Path) -> None:
    def row(name: str, ratio: float) -> dict[str, Any]:
        info = {"backend": "native", "median_ms": 2.0, "times_faster": ratio, "noisy": False, "share_of_copy": 0.5,
                "bytes_moved": 1, "peak_memory_bytes": None, "first_call_ms": 3.0}  # fmt: skip
        return {"group": f"op: {name}", "fullname": f"benchmarks/x.py::{name}", "extra_info": info}

    rest = {"environment": {"torch": "2"}, "left_out": {"test_op[a]": "too large"}}
    for suffix, second in (("", 2.0), ("-again", 2.5)):
        rows = [row("steady", 4.0), row("shaky", second)]
        (tmp_path / f"bench-x{suffix}.json").write_text(json.dumps({"benchmarks": rows, **rest}))
    text = report.write(tmp_path, tmp_path / "performance.md")
    assert "1 of 2 ratios (50%)" in text and "- too large: `test_op[a]`" in text
    assert "| steady | native | 2 | 4 |" in text and "| shaky | native | 2 | 2 ~ |" in text
    assert (tmp_path / "bench-x.svg").is_file()


def test_the_page_is_what_the_committed_numbers_give(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    (tmp_path / "docs").mkdir()
    text = report.write(tmp_path / "benchmarks" / "results", tmp_path / "docs" / "performance.md")
    assert text == (ROOT / "docs" / "performance.md").read_text(), "run `python benchmarks/report.py`, commit the page"
