"""Writing files so that nothing half-written is ever seen under its final name."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pudnet.errors import InputError, message


@contextmanager
def atomic_path(path: str | os.PathLike[str], where: str = "save") -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` when the block ends without an error.

    Raises:
        InputError: the folder does not exist or cannot be written, or ``path`` is a folder, a device or a pipe.
    """
    final = Path(path)
    if final.is_dir():
        raise InputError(message(where, "path", "a file name", f"the folder {str(final)!r}"))
    if final.exists() and not final.is_file():  # renaming onto /dev/null would replace it for the whole machine
        raise InputError(message(where, "path", "a regular file or a new one", f"the device or pipe {str(final)!r}"))
    try:
        handle, name = tempfile.mkstemp(dir=final.parent, prefix=f".{final.name}.", suffix=".tmp")
    except OSError as error:
        hint = "Create the folder first, or choose a folder you may write to."
        got = f"{str(path)!r} ({error.strerror})"
        raise InputError(message(where, "path", "in a folder that exists and can be written", got, hint)) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)
