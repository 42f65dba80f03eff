"""What the allocator of the C library does with freed memory."""

from __future__ import annotations

import ctypes

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
