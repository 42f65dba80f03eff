"""What the allocator of the C library does with freed memory, and the system with fresh memory."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

# Of glibc's malloc.h; the values are ints.
_TRIM_THRESHOLD, _MMAP_MAX, _MOST = -1, -4, 2**31 - 1


def keep_freed() -> bool:
    """Let this process keep what it frees and use it again, in place of giving large blocks back to the system.

    For programs that predict or train on a CPU; the command line does it. Fresh memory is cleared page by page, which
    is up to a quarter of a prediction's time. The process stays as large as it was at its largest. The GNU C library
    only; elsewhere nothing happens.

    Returns:
        Whether the allocator took the settings.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # TypeError: no such thing on Windows
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, _MOST))


def prefer_huge_pages(address: int, size: int) -> None:
    """Ask for huge pages where ``size`` bytes at ``address`` are not in memory yet; a hint, heard on Linux only.

    Clearing fresh memory by 2 MB in place of 4 KB saves most of what it takes to write much for the first time.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None:
        return
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
