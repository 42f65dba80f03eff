"""Memory that is used again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from pudnet import memory
if sys.argv[1] == "keep":
    assert memory.keep_freed()
for _ in range(20):
    torch.ones(16 << 20)  # 64 MiB: 16,384 pages
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the GNU C library only")
def test_freed_memory_is_used_again() -> None:
    usual = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}

    def faults(how: str) -> int:
        return int(subprocess.check_output([sys.executable, "-c", FAULTS, how], env=usual, text=True))

    fresh, kept = faults("leave"), faults("keep")
    if fresh < 10 * 16_384:
        pytest.skip("the system hands out huge pages")
    assert fresh - kept > 10 * 16_384  # of nineteen tensors
