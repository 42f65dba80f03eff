"""Training goes on exactly where it was stopped, however it was stopped, and on however many processes."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from pudnet import checkpoint
from pudnet.errors import CheckpointError, InputError
from pudnet.models.pudnet import PudNet
from pudnet.training import Trainer, TrainingConfig, train

torch.set_num_threads(1)

RUNNER = """
import sys
import torch
from pudnet.training import TrainingConfig, train
torch.set_num_threads(1)
train(TrainingConfig.from_toml(sys.argv[1]), resume=len(sys.argv) > 2)
"""


@pytest.fixture
def settings(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 12
    colours = rng.integers(0, 255, (12, 1, 1, 3))
    images = (colours[labels] + rng.integers(-20, 20, (120, 32, 32, 3))).clip(0, 255).astype(np.uint8)
    np.savez(tmp_path / "data.npz", x_train=images, y_train=labels.astype(np.uint8))
    names = [str(k) for k in range(12)]
    return {
        "target": "convnet3",
        "data": [{"paths": [str(tmp_path / "data.npz")], "held_out": names[:5]}],
        "model": {"width": 32},
        "episodes": {"classes": 3, "support": 2, "query": 2, "groups": 2},
        "optimiser": {"steps": 12, "warmup": 2, "decay": 4},
        "run": {"output": str(tmp_path / "run"), "checkpoint_minutes": 0.0, "validate_every": 500, "amp": False},
    }


def config_of(settings, **run):
    return TrainingConfig.from_dict({**settings, "run": {**settings["run"], **run}})


def write_toml(settings, path, output):
    lines = [f'target = "{settings["target"]}"']
    for section in ("model", "episodes", "optimiser"):
        lines += [f"[{section}]", *(f"{key} = {value}" for key, value in settings[section].items())]
    lines += ["[run]", f'output = "{output}"', "checkpoint_minutes = 0.0", "log_every = 1", "amp = false"]
    data = settings["data"][0]
    lines += ["[[data]]", f"paths = {json.dumps(data['paths'])}", f"held_out = {json.dumps(data['held_out'])}"]
    path.write_text("\n".join(lines))
    return path


def tensors(path):
    return PudNet.load(path).state_dict()


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_learns_and_reports(settings):
    seen, validated = [], []
    settings["optimiser"]["steps"] = 30
    result = train(
        config_of(settings, validate_every=30),
        on_step=lambda step, losses: seen.append(losses["loss"]),
        on_validation=lambda step, values: validated.append((step, values["unseen_accuracy"])),
    )
    assert np.mean(seen[-5:]) < np.mean(seen[:5])
    assert validated[0][0] == 30
    assert validated[0][1] > 0.5  # five classes, told apart by colour
    net = PudNet.load(result)
    assert net.card["held_out"] == [settings["data"][0]["held_out"]]


def test_stopped_and_resumed_equals_undisturbed(settings, tmp_path):
    straight = train(config_of(settings, output=str(tmp_path / "straight")))

    class Stop(Exception):
        pass

    def stop(step, losses):
        if step == 5:
            raise Stop

    with pytest.raises(Stop):
        train(config_of(settings), on_step=stop)
    assert_equal(tensors(train(config_of(settings), resume=True)), tensors(straight))


def test_killed_and_resumed_equals_undisturbed(settings, tmp_path):
    """SIGKILL at an arbitrary moment of a real process, then --resume."""
    settings["optimiser"]["steps"] = 25
    toml = write_toml(settings, tmp_path / "killed.toml", tmp_path / "killed")
    process = subprocess.Popen([sys.executable, "-c", RUNNER, str(toml)])
    saved = tmp_path / "killed" / "checkpoint.safetensors"
    deadline = time.monotonic() + 60
    while not saved.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    subprocess.run([sys.executable, "-c", RUNNER, str(toml), "resume"], check=True)
    straight = train(config_of(settings, output=str(tmp_path / "straight")))
    assert_equal(tensors(tmp_path / "killed" / "predictor.safetensors"), tensors(straight))


def test_interrupt_keeps_a_checkpoint(settings):
    def interrupt(step, losses):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(config_of(settings, checkpoint_minutes=100.0), on_step=interrupt)
    trainer = Trainer(config_of(settings))
    trainer.restore(os.path.join(settings["run"]["output"], "checkpoint.safetensors"))
    assert trainer.steps_done == 3


def test_two_processes_give_the_same_run(settings, tmp_path):
    losses = []
    single = config_of(settings, output=str(tmp_path / "single"))
    train(single, on_step=lambda step, values: losses.append(values["loss"]))
    toml = write_toml(settings, tmp_path / "double.toml", tmp_path / "double")
    script = tmp_path / "runner.py"
    script.write_text(RUNNER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launch, str(script), str(toml)], check=True, capture_output=True)
    log = [json.loads(line) for line in (tmp_path / "double" / "log.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([line["loss"] for line in log if "loss" in line], losses, rtol=1e-3)


def test_longer_run_begins_like_a_shorter_one(settings):
    short, long = config_of(settings), config_of({**settings, "optimiser": {"steps": 900, "warmup": 2, "decay": 4}})
    first, second = Trainer(short), Trainer(long)
    assert [first.rate(step) for step in range(8)] == [second.rate(step) for step in range(8)]
    assert first.step() == second.step()


def test_made_up_families_as_data(settings):
    family = {"family": "colours", "classes": 9, "images": 6, "seed": 3, "weight": 2.0}
    trainer = Trainer(config_of({**settings, "data": [family, *settings["data"]], "augment": {"transform": 0.5}}))
    assert [len(pool.classes) for pool in trainer.pools] == [9, 7]
    assert trainer.pools[0].images.shape == (54, 32, 32, 3)
    assert trainer.pools[0].smallest == 6
    assert np.isfinite(trainer.step()["loss"])


def test_a_run_goes_on_where_settings_were_added_since(settings):
    trainer = Trainer(config_of(settings))
    trainer.step()
    path = os.path.join(settings["run"]["output"], "checkpoint.safetensors")
    os.makedirs(settings["run"]["output"])
    trainer.save(path)
    saved, values = checkpoint.load(path, trainer.kind)
    del saved["run"]["augment"]["transform"], saved["run"]["data"][0]["family"]
    checkpoint.save(path, trainer.kind, saved, values)
    resumed = Trainer(config_of(settings))
    resumed.restore(path)
    assert resumed.steps_done == 1
    saved["run"]["data"][0]["unheard of"] = 1
    checkpoint.save(path, trainer.kind, saved, values)
    with pytest.raises(CheckpointError, match="unheard of"):
        resumed.restore(path)


def test_errors(settings, tmp_path):
    train(config_of(settings))
    with pytest.raises(InputError, match="a folder without a run"):
        train(config_of(settings))
    with pytest.raises(CheckpointError, match="seed"):
        train(config_of({**settings, "seed": 1}), resume=True)
    for name, value in (("classes", 8), ("query", 9)):
        with pytest.raises(InputError, match=f"episodes.*{name} must be at most"):
            Trainer(config_of({**settings, "episodes": {**settings["episodes"], name: value}}))
    for change, words in (
        ({"augment": {"crop": 32}}, "augment.crop must be less than the image size"),
        ({"model": {"directions": [40]}}, "0 to 32, half the kernels"),
        ({"start": "convnet3", "model": {"width": 16}}, "start must be a checkpoint of the same hypernetwork"),
        ({"model": {"image_size": 4}}, "network that reads .*3, 4, 4"),
    ):
        with pytest.raises(InputError, match=words):
            Trainer(config_of({**settings, "augment": {"crop": 0}, **change}))
    settings["data"][0]["held_out"] = ["unheard of"]
    with pytest.raises(InputError, match="unheard of"):
        Trainer(config_of(settings))
    blocked = tmp_path / "a file"
    blocked.write_text("")
    settings["data"][0]["held_out"] = []
    with pytest.raises(InputError, match="can be written"):
        train(config_of(settings, output=str(blocked / "run")))


def test_deterministic_algorithms_are_respected(settings, tmp_path):
    settings["optimiser"] |= {"steps": 4, "warmup": 1, "decay": 1}
    usual = tensors(train(config_of(settings)))
    torch.use_deterministic_algorithms(True)  # memory that nobody wrote is NaN then
    try:
        again = tensors(train(config_of(settings, output=str(tmp_path / "again"))))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_equal(again, usual)


def test_ridge_loss_and_directions(settings, tmp_path):
    more = {"model": {"width": 32, "directions": [4, 8]}, "loss": {"ridge": 1.0}}
    trainer = Trainer(config_of({**settings, **more, "episodes": {**settings["episodes"], "directions": 1.0}}))
    metrics = trainer.step()
    assert metrics["ridge"] > 0 and 0 <= metrics["ridge_accuracy"] <= 1
    assert {"unseen_accuracy", "unseen_ridge"} == set(trainer.validate())

    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6) % 3
    generated = trainer.net.layout.views(trainer.net(images, [6])[0])
    weights = trainer.net.with_directions(generated, images, labels)
    before, middle, last = weights.values()
    first, _, third = generated.values()
    assert torch.equal(before, first)
    assert torch.equal(middle[56:60], -middle[60:]) and torch.equal(last[48:56], -last[56:])
    assert torch.equal(last[:48, :56], third[:48, :56]) and not last[:48, 56:].any()
    last.square().sum().backward()
    assert any(value.grad is not None for value in trainer.net.generators.parameters())

    started = Trainer(config_of({**settings, "start": str(saved(trainer, tmp_path))}))
    assert_equal(trainer.net.state_dict(), started.net.state_dict())


def saved(trainer, folder):
    trainer.write_result(folder / "result.safetensors")
    return folder / "result.safetensors"
