"""Atomic writing: all or nothing, and never in place of what is no file."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import stat
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from stress.processes import DONE, give_up_rights, start, wait

from pudnet.errors import InputError
from pudnet.files import HEADER_LIMIT, atomic_path, write_tensors


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


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "file"
    left = tmp_path / ".file.abcd1234.tmp"
    left.mkdir()
    for name in ("lock", "new", ".tmpAbC123"):  # the last is of a library that the writer used
        (left / name).write_text("half")
    (left / "parts").mkdir()
    (left / "parts" / "1").write_text("half")
    (tmp_path / ".file.00000000.tmp").mkdir()  # killed before it made its lock
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("lock", "new"):
        (mine / name).write_text("mine")
    link = tmp_path / ".file.abcd5678.tmp"
    link.symlink_to(mine, target_is_directory=True)
    others = {"file.abcd1234.tmp", ".file2.abcd1234.tmp", ".file.tmp", ".file.abcd1234.tmp.bak", ".file.abcd9876.tmp"}
    for name in others:  # the last is no folder
        (tmp_path / name).write_text("mine")
    with atomic_path(path) as first, atomic_path(path) as second:  # the first writer lives
        second.write_text("second")
        first.write_text("first")
    assert path.read_text() == "first"
    assert set(os.listdir(tmp_path)) == {"file", "mine", link.name, *others} and len(os.listdir(mine)) == 2


def test_a_writer_killed_within_safetensors_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    """safetensors writes to a temporary file of a name of its own, in the folder of the path it is given."""
    place = tmp_path / "place"
    place.mkdir()
    path = place / "file"
    write_tensors(path, {"a": torch.zeros(8)}, "key", {}, "here")
    before = path.read_bytes()

    def killed() -> None:  # by the kernel, where a file grows beyond the limit
        torch.set_num_threads(1)  # OpenMP's threads are not forked
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
        write_tensors(path, {"a": torch.ones(2**16)}, "key", {}, "here")

    assert wait(start(killed, tmp_path / "output")) == -signal.SIGXFSZ
    assert path.read_bytes() == before and len(os.listdir(place)) == 2
    write_tensors(path, {"a": torch.ones(8)}, "key", {}, "here")
    assert os.listdir(place) == ["file"]


def test_writers_of_one_file_at_once_leave_one_of_theirs(tmp_path: Path) -> None:
    """Each looks for abandoned folders while the others make theirs."""
    path = tmp_path / "file"

    def write(number: int) -> None:
        for _ in range(50):
            with atomic_path(path) as temporary:
                temporary.write_text(str(number))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert path.read_text() in "01234567" and os.listdir(tmp_path) == ["file"]


def test_a_writer_on_another_host_tells_a_living_one_from_a_killed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS locks folders on one host only, and files across hosts, where the handle may write."""
    flock = fcntl.flock

    def of_another_host(handle: int, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            return
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(handle, operation)

    path = tmp_path / "file"
    with atomic_path(path) as first:
        first.write_text("first")
        left = tmp_path / ".file.00000000.tmp"
        left.mkdir()
        (left / "lock").touch()
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", of_another_host)
            with atomic_path(path) as second:
                second.write_text("second")
        assert first.exists() and not left.exists()
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["file"]


def test_nothing_written_is_an_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(InputError, match="where a file can be written"), atomic_path(path):
        pass
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("umask", [0o111, 0o177])
def test_a_umask_that_closes_folders_to_their_owner(tmp_path: Path, umask: int) -> None:
    """Services may have one: all it takes from files is leave to run them. Nothing stops root, so not as root."""
    with tempfile.TemporaryDirectory() as name:  # those of pytest are closed to other users
        os.chmod(name, 0o777)

        def write() -> None:
            give_up_rights()
            os.umask(umask)
            with atomic_path(Path(name) / "file") as temporary:
                temporary.write_text("x")

        output = tmp_path / "output"
        assert wait(start(write, output)) == DONE, output.read_text()
        assert os.listdir(name) == ["file"]
        assert stat.S_IMODE((Path(name) / "file").stat().st_mode) == 0o666 & ~umask


def test_a_disk_that_is_full_in_the_block_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No space left"), atomic_path(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "file"):  # not of the disk: the block's own affair
        raise FileNotFoundError(errno.ENOENT, "another file")
    assert os.listdir(tmp_path) == []


def test_a_header_that_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="header"):
        write_tensors(tmp_path / "file", {}, "key", {"long": "x" * HEADER_LIMIT}, "here")
    assert os.listdir(tmp_path) == []


def test_the_umask_decides_who_may_read_and_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking it up means changing it for a moment, and threads that do so at once may leave it changed."""
    umask, before = os.umask, os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.delattr(os, "umask")
            with atomic_path(tmp_path / "file") as temporary:
                temporary.write_text("x")
            write_tensors(tmp_path / "tensors", {}, "key", {}, "here")
    finally:
        umask(before)
    for name in ("file", "tensors"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640
