"""A small share of every part of `make stress`; the full counts are its business."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from stress import PARTS, load

load()


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    """Parts that fork compute with one thread; the tests behind them need not."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", PARTS)
def test_a_small_share(name: str) -> None:
    assert PARTS[name].run(PARTS[name].quick, 1)["failures"] == []
