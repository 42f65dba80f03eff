"""Every tutorial runs: its fenced Python blocks, in order, in an empty folder."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIALS = sorted((Path(__file__).parent.parent / "docs" / "tutorials").glob("*.md"))
MOST_SECONDS = 20.0  # of one core


def python_blocks(text: str) -> str:
    """The fenced Python blocks of a page as one program, each line where it stands on the page."""
    lines, inside = [], False
    for line in text.splitlines():
        fence = re.match("```(.*)", line)
        lines.append(line if inside and not fence else "")
        if fence:
            inside = fence[1] == "python"
    return "\n".join(lines) + "\n"


def test_blocks_keep_their_lines() -> None:
    page = "text\n```python\nx = 1\n```\nmore\n```sh\nrm -r /\n```\n```python\nprint(x)\n```\n"
    assert python_blocks(page) == "\n\nx = 1\n\n\n\n\n\n\nprint(x)\n\n"


def test_there_are_tutorials() -> None:
    assert len(TUTORIALS) == 3


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_runs(page: Path, tmp_path: Path) -> None:
    (tmp_path / page.stem).with_suffix(".py").write_text(python_blocks(page.read_text()))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, f"{page.stem}.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < MOST_SECONDS
