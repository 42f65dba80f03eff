"""Memory that is used again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

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


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="Linux only")
def test_huge_pages_are_asked_for() -> None:
    numbers = torch.empty(1 << 27)
    memory.prefer_huge_pages(numbers.data_ptr(), 4 << 27)
    middle, inside = numbers.data_ptr() + (4 << 26), False
    with open("/proc/self/smaps") as file:
        for line in file:
            head = line.split()[0]
            if "-" in head:
                start, end = (int(x, 16) for x in head.split("-"))
                inside = start <= middle < end
            elif inside and head == "VmFlags:":
                assert "hg" in line.split()
                return
    raise AssertionError("no such memory")
