"""Files: nothing half-written is ever seen under its final name, and what is read costs no more than it holds."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pudnet.errors import CheckpointError, InputError, PudnetError, message, one_line

if TYPE_CHECKING:
    from torch import Tensor

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
LOCK = "lock"  # the file in a temporary folder whose lock says that its writer lives
HEADER_LIMIT = 2**25  # bytes: JSON of this size takes up to 20 times as much in memory


@contextmanager
def atomic_path(path: str | os.PathLike[str], where: str = "save") -> Iterator[Path]:
    """Yield a path in a temporary folder beside ``path``; what the block wrote there is renamed to ``path`` at its end.

    Whatever else a writer leaves goes with the folder: safetensors writes to a temporary file of its own. Folders that
    killed processes left behind are removed by the next writer: each has a lock that is held as long as its writer
    lives.

    Raises:
        InputError: the folder does not exist or cannot be written, ``path`` is a folder, a device or a pipe, the disk
            is full, in the block or after it, or nothing was written.
    """
    final = Path(path)
    if final.is_dir():
        raise InputError(message(where, "path", "a file name", f"the folder {str(final)!r}"))
    if final.exists() and not final.is_file():  # renaming onto /dev/null would replace it for the whole machine
        raise InputError(message(where, "path", "a regular file or a new one", f"the device or pipe {str(final)!r}"))
    try:
        _remove_abandoned(final)
        handle, folder = _locked_folder(final)
    except OSError as error:
        hint = "Create the folder first, or choose a folder you may write to."
        got = f"{str(path)!r} ({error.strerror})"
        raise InputError(message(where, "path", "in a folder that exists and can be written", got, hint)) from error
    temporary = folder / "new"
    try:
        finished = False
        yield temporary
        finished = True
        # The umask says who may read, as for the lock's file; one of safetensors is closed to all but its owner.
        os.chmod(temporary, stat.S_IMODE(os.fstat(handle).st_mode))
        _sync(temporary)
        os.replace(temporary, final)
        with suppress(OSError):  # the file is there; not every folder can be opened
            _sync(final.parent)
    except OSError as error:
        if isinstance(error, PudnetError) or not (finished or error.errno in DISK_ERRORS):
            raise
        got = f"{str(path)!r} ({error.strerror})"
        raise InputError(message(where, "path", "where a file can be written", got)) from error
    finally:
        with suppress(OSError):
            _remove(folder)
        os.close(handle)
        with suppress(OSError):  # network file systems keep what is open until it is closed
            folder.rmdir()


def _locked_folder(final: Path) -> tuple[int, Path]:
    """A new temporary folder beside ``final``, and the handle that holds its lock."""
    while True:
        folder = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
        # Not mkdtemp: the umask that says who may read a file cannot be looked up without changing it for a moment, for
        # all threads.
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        try:
            mode = stat.S_IMODE(folder.stat().st_mode)
            if mode & stat.S_IRWXU != stat.S_IRWXU:  # a umask for files may close folders to their owner
                folder.chmod(mode | stat.S_IRWXU)
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except OSError as error:
            with suppress(OSError):
                folder.rmdir()
            if isinstance(error, FileNotFoundError) and final.parent.is_dir():  # another writer took it for abandoned
                continue
            raise
        if _lock(handle) is not False and (folder / LOCK).exists():
            return handle, folder
        os.close(handle)  # another writer is removing it, or has


def _remove_abandoned(final: Path) -> None:
    """Remove temporary folders for ``final`` that no living process has locked."""
    left = re.compile(rf"\.{re.escape(final.name)}\.[0-9a-f]{{8}}\.tmp")
    try:
        folders = [path for path in final.parent.iterdir() if left.fullmatch(path.name) and not path.is_symlink()]
    except PermissionError:  # it may still be written to
        return
    for folder in folders:
        with suppress(OSError):
            try:
                handle = os.open(folder / LOCK, os.O_RDWR)
            except FileNotFoundError:  # killed before the lock was made, or about to make it
                folder.rmdir()
                continue
            try:
                if _lock(handle):
                    _remove(folder)
            finally:
                os.close(handle)


def _remove(folder: Path) -> None:
    """Remove a temporary folder, its lock last: without one nobody knows that it is abandoned."""
    for path in folder.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.rmtree(folder)


def _lock(handle: int) -> bool | None:
    """Lock an open file for this process until it is closed; False where another has it, None without locks."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # not every system and file system has locks
        return None
    return True


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], key: str, header: Mapping[str, Any], where: str
) -> None:
    """Write a safetensors file in one atomic step, with ``header`` as JSON under ``key`` of its metadata.

    Raises:
        InputError: the path cannot be written, the disk is full, or names and header are too long to be read back.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    text = json.dumps(header)
    with atomic_path(path, where) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata={key: text})
            if _header_size(temporary) > HEADER_LIMIT:
                got = f"{len(text)} bytes of JSON, {len(tensors)} tensors"
                raise InputError(message(where, "the header", f"at most {HEADER_LIMIT} bytes long", got))
        except (SafetensorError, OSError) as error:
            got = f"{str(path)!r} ({one_line(error)})"
            raise InputError(message(where, "path", "where a file can be written", got)) from error


@contextmanager
def open_tensors(
    path: str | os.PathLike[str], key: str, where: str
) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Tensor]]]]:
    """Open what ``write_tensors`` wrote: yields its header and a function that reads the tensors.

    Memory is bounded by the size of the file. The tensors are copies: a file that is overwritten in place would change
    those that safetensors maps, and one that is cut would end the process.

    Raises:
        InputError: there is no such file, or it may not be read.
        CheckpointError: the file is damaged, or has no JSON object under ``key``.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise InputError(message(where, "path", "an existing file", repr(str(path))))
    try:
        if _header_size(path) > HEADER_LIMIT:
            raise ValueError(f"a header of more than {HEADER_LIMIT} bytes")
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(key, "null"))
            if not isinstance(header, dict):
                raise CheckpointError(message(where, "path", "a file written by pudnet", repr(str(path))))
            yield header, lambda: {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except PudnetError:
        raise
    except OSError as error:
        raise InputError(message(where, "path", "a readable file", f"{str(path)!r} ({error})")) from error
    except (SafetensorError, ValueError, RecursionError, AttributeError, KeyError) as error:
        got = f"{str(path)!r} ({one_line(error)})"
        hint = "The file is damaged or not safetensors; get it again."
        raise CheckpointError(message(where, "path", "a whole safetensors file", got, hint)) from error


def _header_size(path: str | os.PathLike[str]) -> int:
    """What the first eight bytes of a safetensors file say of its header."""
    with open(path, "rb") as file:
        return int.from_bytes(file.read(8), "little")
