"""Memory that is used again."""

from __future__ import annotations

import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pudnet import memory

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


@pytest.mark.parametrize("size", [0, 1, 5000, 1 << 25])
@pytest.mark.parametrize("offset", [0, 1])
def test_huge_pages_change_nothing_that_is_there(size: int, offset: int) -> None:
    numbers = torch.arange(offset + size, dtype=torch.uint8)
    memory.prefer_huge_pages(numbers.data_ptr() + offset, size)
    assert torch.equal(numbers, torch.arange(offset + size, dtype=torch.uint8))


@pytest.mark.skipif(not os.path.exists("/sys/kernel/mm/transparent_hugepage"), reason="Linux with huge pages only")
def test_huge_pages_are_asked_for() -> None:
    pages = mmap.mmap(-1, 1 << 23, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = torch.frombuffer(pages, dtype=torch.uint8).data_ptr()

    def asked_for() -> bool:
        inside = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            head = line.split()[0]
            if "-" in head:
                start, end = (int(x, 16) for x in head.split("-"))
                inside = start <= address + (1 << 22) < end
            elif inside and head == "VmFlags:":
                return "hg" in line.split()
        raise AssertionError("no such memory")

    assert not asked_for()
    memory.prefer_huge_pages(address, 1 << 23)
    assert asked_for()
