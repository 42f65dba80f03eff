"""A run on two processes is the run on one: the same losses, and either goes on from the other's checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from pudnet import checkpoint
from pudnet.training import TrainingConfig, train

torch.set_num_threads(1)
STEPS, STOPPED_AFTER = 10, 4

# argv: the settings as JSON, the step to be interrupted after (0: none), and whether to resume.
RUNNER = """
import json, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[4])
from test_processes import run_here
run_here(json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "resume")
"""


def run_here(settings: dict[str, Any], stop: int, resume: bool) -> None:
    def on_step(step: int, losses: dict[str, float]) -> None:
        if step == stop:
            os.kill(os.getpid(), signal.SIGINT)  # one process is told; all have to agree on the step they stop after

    expected = pytest.raises(KeyboardInterrupt) if stop else nullcontext()
    with expected:
        train(TrainingConfig.from_dict(settings), resume=resume, on_step=on_step)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 9
    images = (rng.integers(0, 255, (9, 1, 1, 3))[labels] + rng.integers(-20, 20, (90, 32, 32, 3))).clip(0, 255)
    np.savez(folder / "data.npz", x_train=images.astype(np.uint8), y_train=labels.astype(np.uint8))
    return {
        "target": "convnet3",
        "data": [{"paths": [str(folder / "data.npz")]}],
        "model": {"width": 16},
        "episodes": {"classes": 3, "support": 2, "query": 2, "groups": 4},
        "optimiser": {"steps": STEPS, "warmup": 2, "decay": 4},
        "run": {"checkpoint_minutes": 100.0, "log_every": 1, "validate_every": 500, "amp": False},
    }


@pytest.fixture(scope="module")
def undisturbed(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on one process."""
    folder = tmp_path_factory.mktemp("one")
    train(TrainingConfig.from_dict(within(settings, folder)))
    return folder


def within(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {**settings, "run": {**settings["run"], "output": str(folder)}}


def run(settings: dict[str, Any], folder: Path, processes: int, stop: int, resume: bool) -> None:
    settings = within(settings, folder)
    if processes == 1:
        run_here(settings, stop, resume)
        return
    script = folder.parent / "runner.py"
    script.write_text(RUNNER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    arguments = [json.dumps(settings), str(stop), "resume" if resume else "start", str(Path(__file__).parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, str(script), *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def losses(folder: Path) -> dict[int, list[float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: [line["loss"], line["accuracy"], line["gradient_norm"]] for line in lines if "loss" in line}


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_goes_on_with_another_number_of_processes(
    settings: dict[str, Any], undisturbed: Path, tmp_path: Path, first: int, then: int
) -> None:
    folder = tmp_path / "run"
    run(settings, folder, first, STOPPED_AFTER, resume=False)
    assert checkpoint.load(folder / "checkpoint.safetensors", "training")[0]["step"] == STOPPED_AFTER
    run(settings, folder, then, 0, resume=True)
    found, wanted = losses(folder), losses(undisturbed)
    assert list(found) == list(wanted) == list(range(1, STEPS + 1))
    assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-3)
    _, tensors = checkpoint.load(folder / "predictor.safetensors", "predictor")
    for name, tensor in checkpoint.load(undisturbed / "predictor.safetensors", "predictor")[1].items():
        if tensor.is_floating_point():  # BatchNorm's counts of batches are of one process, and of no use
            # Adam divides by the gradients' size: where that is small, rounding moves a parameter by more.
            assert_allclose(tensors[name], tensor, rtol=0, atol=1e-2 * float(tensor.abs().max()), err_msg=name)
