"""A small share of every part of `make stress`; the full counts are its business."""

from __future__ import annotations

import pytest
from stress import PARTS, load

load()


@pytest.mark.parametrize("name", PARTS)
def test_a_small_share(name: str) -> None:
    assert PARTS[name].run(PARTS[name].quick, 1)["failures"] == []
