"""SIGKILL at random moments of training and of prediction: nothing corrupt, nothing lost but the last step."""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load
from torch import _dynamo  # noqa: F401 - Adam and the log would import these two in every forked process
from torch.utils import tensorboard  # noqa: F401

import pudnet
from pudnet import Predictor, _extension, checkpoint
from pudnet.errors import PudnetError
from pudnet.files import atomic_path
from pudnet.training import TrainingConfig, train
from stress import Figures, part
from stress.processes import DONE, TINY, kill_after, start, temporaries, tiny_net, wait

STEPS = 12
RUN = Path("run")


@part("kills-training", "SIGKILLs during training, each followed by a resumption", full=100, quick=4)
def training(count: int, seed: int) -> Figures:
    """Kill a run, look at its files, resume it, kill it again, until it ends; then the next run."""
    torch.set_num_threads(1)
    _extension.why_not()  # loaded once, here: every process then computes with the same code
    rng, failures, home = random.Random(seed), [], Path.cwd()
    kills = runs = most_left = most_lost = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        usual, seconds = _undisturbed(folder)
        while kills < count:
            place = folder / f"run{runs}"
            place.mkdir()
            ended, begun = None, 0
            while ended != DONE and not failures:
                begun += 1
                os.chdir(place)
                child, begin = start(lambda: _train(folder), place / "output"), time.monotonic()
                os.chdir(home)
                ended = kill_after(child, rng.uniform(0, 1.2 * seconds)) if kills < count else wait(child)
                kills += ended < 0
                if ended == DONE and begun == 1:  # the machine may be less busy than it was
                    seconds = min(seconds, time.monotonic() - begin)
                wrong, lost, left = _looked_over(place, ended)
                failures += wrong
                most_lost, most_left = max(most_lost, lost), max(most_left, left)
            if failures:
                break
            for file, expected in usual.items():
                if _bytes(place / RUN / file) != expected:
                    failures.append(f"run {runs}: {file} differs, {_difference(place / RUN / file, expected)}")
            failures += [f"run {runs}: {path.name} is left" for path in temporaries(place / RUN)]
            runs += 1
    return {
        "failures": failures,
        "runs": runs,
        "steps_of_a_run": STEPS,
        "steps_lost_at_most": most_lost,
        "temporary_files_at_most": most_left,
        "seconds_of_the_shortest_run": round(seconds, 2),
    }


def write_data(folder: Path) -> None:
    """Images to train on."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "data.npz", x_train=pixels, y_train=np.arange(24) % 4)


def train_tiny(folder: Path, output: Path, on_step: Callable[[int, object], None] | None = None) -> None:
    """Train on the images in ``folder``, or go on with the run in ``output``; a checkpoint after every step."""
    config = TrainingConfig.from_dict(
        {
            "target": "convnet3",
            "data": [{"paths": [str(folder / "data.npz")]}],
            "episodes": {"classes": 2, "support": 2, "query": 2, "groups": 1},
            "augment": {"crop": 1},
            "optimiser": {"steps": STEPS, "decay": 4, "warmup": 2},
            "model": {"image_size": 8, **TINY},
            "run": {
                "output": str(output),
                "amp": False,
                "checkpoint_minutes": 0.0,
                "log_every": 1,
                "validate_every": 5,
            },
        }
    )
    train(config, resume=True, on_step=on_step)


def _train(folder: Path) -> None:
    with open("begun", "w", buffering=1) as begun:
        train_tiny(folder, RUN, lambda done, _: print(done, file=begun))


def _undisturbed(folder: Path) -> tuple[dict[str, bytes], float]:
    """Files of a run that nobody kills, and its seconds."""
    place, home = folder / "undisturbed", Path.cwd()
    place.mkdir()
    os.chdir(place)
    begin = time.monotonic()
    ended = wait(start(lambda: _train(folder), place / "output"))
    seconds = time.monotonic() - begin
    os.chdir(home)
    assert ended == DONE, (place / "output").read_text()
    return {file: _bytes(place / RUN / file) for file in ("checkpoint.safetensors", "predictor.safetensors")}, seconds


def _looked_over(place: Path, ended: int) -> tuple[list[str], int, int]:
    """What is wrong after a kill, steps lost, temporary files left."""
    wrong, lost = [], 0
    begun = (place / "begun").read_text().split() if (place / "begun").exists() else []
    saved = place / RUN / "checkpoint.safetensors"
    done = 0
    try:
        done = checkpoint.load(saved, "training")[0]["step"] if saved.exists() else 0
        result = place / RUN / "predictor.safetensors"
        if result.exists():
            pudnet.PudNet.load(result)
    except PudnetError as error:
        wrong.append(f"{place.name}: {error}")
    if begun:
        lost = int(begun[-1]) - done
        if lost > 1:
            wrong.append(f"{place.name}: {lost} steps lost")
    log = place / RUN / "log.jsonl"
    if log.exists():
        steps = [json.loads(line)["step"] for line in log.read_text().splitlines() if line.endswith("}")]
        if len(set(steps)) < len(steps) - len([step for step in steps if step % 5 == 0 or step == STEPS]):
            wrong.append(f"{place.name}: the log tells of a step twice")
    if ended not in (DONE, -9):
        wrong.append(f"{place.name}: ended with {ended}: {(place / 'output').read_text()[-200:]}")
    left = temporaries(place / RUN) if (place / RUN).is_dir() else []
    if len(left) > 3:
        wrong.append(f"{place.name}: {len(left)} temporary files")
    return wrong, lost, len(left)


@part("kills-predict", "SIGKILLs during prediction and saving over an earlier model", full=100, quick=10)
def predicting(count: int, seed: int) -> Figures:
    """The file is the earlier model or the new one, whole; the next prediction removes what is left."""
    torch.set_num_threads(1)
    rng, failures = random.Random(seed), []
    kills = most_left = 0
    found = {"earlier": 0, "new": 0, "none": 0}
    with tempfile.TemporaryDirectory() as name:
        folder, images = Path(name), Path(name) / "images"
        draws = np.random.default_rng(0)
        for number in range(16):
            path = images / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draws.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(path)
        predictors = [Predictor(tiny_net(number)) for number in (0, 1)]
        models = [_weights(predictor, images, folder / f"model{n}") for n, predictor in enumerate(predictors)]
        place = folder / "place"
        place.mkdir()
        path = place / "model.safetensors"

        def work(number: int, claimed: bool) -> None:
            model = predictors[number].predict(images)
            if not claimed:
                model.save(path)
                return
            with atomic_path(path) as temporary:  # as the command line does
                model.save(temporary)

        begin = time.monotonic()
        wait(start(lambda: work(0, True), folder / "output"))
        seconds = time.monotonic() - begin
        number = 0
        while kills < count and not failures:
            number += 1
            if rng.random() < 0.2:
                path.unlink(missing_ok=True)
            before = _which(path, models)
            later, claimed = rng.randrange(2), rng.random() < 0.5
            left = set(temporaries(place))
            child = start(lambda later=later, claimed=claimed: work(later, claimed), folder / "output")
            if rng.random() < 0.5:
                ended = kill_after(child, rng.uniform(0.3, 1.1) * seconds)
            else:
                ended = kill_after(child, rng.uniform(0, 0.01), lambda left=left: bool({*temporaries(place)} - left))
            kills += ended < 0
            if ended not in (DONE, -9):
                failures.append(f"trial {number} ended with {ended}: {(folder / 'output').read_text()[-200:]}")
            after = _which(path, models)
            if after not in (before, later) or (ended == DONE and after != later):
                failures.append(f"trial {number}: {after} where {before} was and {later} was written")
            if ended < 0:
                found["none" if after is None else "new" if after != before else "earlier"] += 1
            most_left = max(most_left, len(temporaries(place)))
        work(0, True)
        if len(list(place.iterdir())) > 1:
            failures.append(f"left in the folder: {[one.name for one in place.iterdir()]}")
    return {
        "failures": failures,
        "trials": number,
        "model_found_after_a_kill": found,
        "temporary_files_at_most": most_left,
    }


def _weights(predictor: Predictor, images: Path, path: Path) -> dict[str, torch.Tensor]:
    predictor.predict(images).save(path)
    return pudnet.load(path).state_dict()


def _which(path: Path, models: list[dict[str, torch.Tensor]]) -> int | str | None:
    """Number of the model in a file, None without a file, what is wrong with it otherwise."""
    if not path.exists():
        return None
    try:
        state = pudnet.load(path).state_dict()
    except PudnetError as error:
        return str(error)
    for number, model in enumerate(models):
        if all(torch.equal(state[name], model[name]) for name in model):
            return number
    return "another model"


def _difference(path: Path, expected: bytes) -> str:
    """Where two files of tensors differ."""
    if not path.exists():
        return "it is missing"
    ours, theirs = load(path.read_bytes()), load(expected)
    differing = [name for name in theirs if name not in ours or not torch.equal(ours[name], theirs[name])]
    if not differing:
        return "in the header"
    name = differing[0]
    return f"{len(differing)} of {len(theirs)} tensors, {name} by {(ours[name] - theirs[name]).abs().max():g}"


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""
