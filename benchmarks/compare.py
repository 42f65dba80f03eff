"""Two runs of the benchmarks, or two commits, row by row.

    python benchmarks/compare.py before.json after.json          # files of `make bench`
    python benchmarks/compare.py main HEAD [-k PART] [FILE ...]  # commits: the benchmarks as they are here run on both

What is compared is `times faster than the reference`: candidate and reference ran in turn, so what slows the whole
machine cancels. Exit status 1 where a row became slower by more than 10 % (--threshold; twice where a run marks it as
noisy), or where a row that was there is gone: it failed its check, or nobody measures it any more. Commits are checked
out beside each other in a temporary folder, their extension is built where the one here has other sources, and `-k`
goes to pytest.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FILES = ("bench_ops.py", "bench_passes.py", "bench_stages.py")
THRESHOLD = 1.1
NOISY_THRESHOLD = 2.0
LEAST_MS = 1.0  # rows below are compared, but do not count for the agreement
EXTENSION_SOURCES = ("csrc", "setup.py")

Rows = dict[str, dict[str, Any]]


def rows_of(document: dict[str, Any]) -> Rows:
    """Name -> extra_info of every row that has a ratio."""
    return {
        row["fullname"].rpartition("/")[2]: row["extra_info"]
        for row in document["benchmarks"]
        if "times_faster" in row["extra_info"]
        and row["extra_info"]["backend"] != "reference"  # which once had one, of 1
    }


def ratio(name: str, before: Rows, after: Rows) -> float:
    """How many times faster the row became."""
    return float(after[name]["times_faster"] / before[name]["times_faster"])


def agrees(factor: float, threshold: float = THRESHOLD) -> bool:
    """Whether a ratio of ratios is as good as 1."""
    return 1 / threshold <= factor <= threshold


def agreement(before: Rows, after: Rows, threshold: float = THRESHOLD) -> tuple[int, int]:
    """(rows that agree, rows) among those above 1 ms in both runs."""
    common = [name for name in before if name in after]
    common = [name for name in common if min(rows[name]["median_ms"] for rows in (before, after)) > LEAST_MS]
    return sum(agrees(ratio(name, before, after), threshold) for name in common), len(common)


def table(before: Rows, after: Rows, threshold: float) -> Iterator[tuple[str, bool]]:
    """A line for each row, and whether it is a reason to fail."""
    width = max(map(len, before | after), default=0)
    yield f"{'row':{width}s} {'ms':>10s} {'ms':>10s} {'x ref.':>8s} {'x ref.':>8s} {'change':>7s}", False
    for name in before | after:
        if name not in before or name not in after:
            gone = name not in after
            yield f"{name:{width}s} {'is gone' if gone else 'is new'}", gone
            continue
        old, new, factor = before[name], after[name], ratio(name, before, after)
        noisy = old["noisy"] or new["noisy"]
        verdict = "" if agrees(factor, threshold) else "faster" if factor > 1 else "SLOWER"
        times = f"{old['median_ms']:10.3f} {new['median_ms']:10.3f}"
        ratios = f"{old['times_faster']:8.2f} {new['times_faster']:8.2f} {factor:6.2f}x"
        fails = factor < 1 / (max(threshold, NOISY_THRESHOLD) if noisy else threshold)
        yield f"{name:{width}s} {times} {ratios} {verdict}{' (noisy)' * noisy}", fails


def run_commit(commit: str, folder: Path, files: list[str], options: list[str]) -> dict[str, Any]:
    """Check a commit out, run the benchmarks as they are here on its package, and remove it again."""
    tree, result = folder / "tree", folder / "result.json"
    git("worktree", "add", "--detach", "--force", str(tree), commit)
    try:
        for part in ("benchmarks", "tests/fixtures"):
            shutil.copytree(ROOT / part, tree / part, dirs_exist_ok=True)
        extensions = list((ROOT / "pudnet").glob("_C.*.so"))
        if extensions and not git("diff", "--name-only", commit, "--", *EXTENSION_SOURCES):
            shutil.copy(extensions[0], tree / "pudnet")
        else:
            subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=tree, check=True)
        paths = [str(Path("benchmarks") / file) for file in files]
        command = [sys.executable, "-m", "pytest", *paths, f"--benchmark-json={result}", "-q", *options]
        # What fails is missing in the JSON file, which the table then says. Huge pages: as in `make bench`.
        variables = {"PYTHONPATH": str(tree), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        subprocess.run(command, cwd=tree, env={**os.environ, **variables})
        return dict(json.loads(result.read_text()))
    finally:
        git("worktree", "remove", "--force", str(tree))


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="a JSON file, or a commit")
    parser.add_argument("after", help="the same")
    parser.add_argument("files", nargs="*", default=list(FILES), help="benchmarks to run on commits (%(default)s)")
    parser.add_argument("-k", default="", metavar="PART", help="only rows whose name matches, as for pytest")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="factor that is noise (%(default)s)")
    options = parser.parse_args(arguments)
    documents, chosen = [], ["-k", options.k] if options.k else []
    for source in (options.before, options.after):
        if Path(source).is_file():
            documents.append(json.loads(Path(source).read_text()))
        else:
            with tempfile.TemporaryDirectory() as folder:
                documents.append(run_commit(source, Path(folder), options.files, chosen))
    before, after = map(rows_of, documents)
    reasons = 0
    for line, fails in table(before, after, options.threshold):
        print(line)
        reasons += fails
    known = {name.partition("::")[2] for name in before}
    for name in set(documents[1]["failed"]) - set(documents[0]["failed"]) - known:  # the reference itself, for one
        print(f"{name} failed its check")
        reasons += 1
    agreeing, count = agreement(before, after)
    print(f"{agreeing} of {count} ratios of rows above {LEAST_MS:g} ms agree within {THRESHOLD - 1:.0%}")
    if reasons:
        print(f"{reasons} rows are slower, wrong or gone", file=sys.stderr)
    return int(reasons > 0)


if __name__ == "__main__":
    raise SystemExit(main())
