"""Triton kernels: numerics in the interpreter (and on a GPU), resources by compiling ahead of time; own processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def _run_tests(file: str, **variables: str) -> None:
    """Run a file of tests in a process of its own; fail with its output, also where it skipped what it must not."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PUDNET_BACKEND")}
    paths = [str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), **variables}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    done = subprocess.run(
        [*command, str(HERE / file)], env=environment, cwd=HERE, capture_output=True, text=True, timeout=560
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout


def test_numerics_in_the_interpreter() -> None:
    versions = [tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy")]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.7 cannot loop over a count with NumPy 2.4 or later")
    _run_tests("numerics.py", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.cuda
def test_numerics_on_the_gpu() -> None:
    _run_tests("numerics.py")


def test_resources_ahead_of_time() -> None:
    _run_tests("resources.py")


def test_counts_are_not_specialised() -> None:
    """A second batch size, number of layers or network must compile nothing new: no count is part of the cache key."""
    code = (
        "from pudnet.kernels import generate_weights, graph_recurrence, layer_recurrence, tile_weights\n"
        "for module in (generate_weights, graph_recurrence, layer_recurrence, tile_weights):\n"
        "    for name, kernel in vars(module).items():\n"
        "        if name.endswith('_kernel'):\n"
        "            for p in kernel.params:\n"
        "                count = not p.is_constexpr and not p.name.startswith('p_')\n"
        "                assert not count or p.do_not_specialize, (name, p.name)\n"
        "                print(name, p.name)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "generate_rows_fwd_kernel batch" in done.stdout and "layer_recurrence_bwd_kernel steps" in done.stdout
