"""Atomic writing: all or nothing, and never in place of what is no file."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from pudnet.errors import InputError
from pudnet.files import atomic_path


def test_a_device_or_pipe_is_refused_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="regular file"), atomic_path(pipe):
        pytest.fail("the block must not run")
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    with pytest.raises(InputError, match="/dev/null"), atomic_path(os.devnull):
        pytest.fail("the block must not run")


def test_the_old_file_stays_when_the_block_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    with atomic_path(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]
