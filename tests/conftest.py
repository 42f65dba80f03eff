"""What every test shares: the random state is put back, and tests marked ``cuda`` need a GPU."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def restore_random_state() -> Iterator[None]:
    """A test that draws from a global generator must not change what the next one sees."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked ``cuda`` where there is no GPU; with PUDNET_REQUIRE_CUDA=1 that is a failure."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        if os.environ.get("PUDNET_REQUIRE_CUDA") == "1":
            pytest.fail("PUDNET_REQUIRE_CUDA=1, and no CUDA device is available", pytrace=False)
        pytest.skip("needs a CUDA device")
