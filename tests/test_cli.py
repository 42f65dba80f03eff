"""The command line: what it prints, and which exit code bad input gets."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import pudnet
from pudnet import checkpoint
from pudnet.cli import app

COMMANDS = ("demo", "predict", "add", "finetune", "export", "remake", "evaluate", "classify", "train", "info")
SIDE = 16


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def run_json(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def assert_bad_input(result: Result, *words: str) -> None:
    """One readable line on stderr, exit code 2."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("pudnet: "), result.stderr
    for word in words:
        assert word in lines[0], lines[0]


def write_images(folder: Path, counts: dict[str, int], side: int = SIDE) -> Path:
    """A folder of one sub-folder per class; every class has its own colour."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            noise = rng.integers(-30, 31, (side, side, 3))
            colour = np.array([40 + 50 * number, 200 - 60 * number, 120])
            Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


def arrays(**changes: Any) -> dict[str, Any]:
    """What a good .npz of three classes holds, with changes."""
    rng = np.random.default_rng(0)
    y_train, y_test = np.repeat(np.arange(3), 8), np.repeat(np.arange(3), 4)

    def images(labels: Any) -> Any:
        noise = rng.integers(0, 40, (len(labels), SIDE, SIDE, 3))
        return (noise + 60 * labels[:, None, None, None]).astype(np.uint8)

    good = {"x_train": images(y_train), "y_train": y_train, "x_test": images(y_test), "y_test": y_test}
    return {name: value for name, value in {**good, **changes}.items() if value is not None}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained hypernetwork."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    pudnet.PudNet("convnet3", image_size=SIDE, width=8, generator_width=2).save(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "set.npz"
    np.savez(path, **arrays())
    return path


@pytest.fixture(scope="module")
def model(tiny: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    assert run("predict", data, "-o", path, "--checkpoint", tiny).exit_code == 0
    return path


# ---- good input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_and_the_common_options(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"pudnet {command}" in result.stdout.partition("Example:")[2]
    for option in ("--json", "--device", "--seed"):
        assert option in result.stdout


def test_predict_prints_what_each_stage_cost(tiny: Path, data: Path, tmp_path: Path) -> None:
    result = run("predict", data, "-o", tmp_path / "m", "--checkpoint", tiny)
    assert result.exit_code == 0
    for word in ("reading", "sketch", "weights", "calibration", "head", "total", "Expected accuracy", str(tmp_path)):
        assert word in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_predict_json(tiny: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    found = run_json(
        "predict", data, "-o", out, "--checkpoint", tiny, "--head", "cosine", "--seed", 7, "--device", "cpu"
    )
    assert {"reading", "sketch", "weights", "directions", "calibration", "head", "total"} == set(found["seconds"])
    assert found["n"] == 24 and found["head"]["name"] == "cosine" and found["provenance"]["seed"] == 7
    assert found["model"] == str(out) and pudnet.load(out).report["provenance"] == found["provenance"]


def test_predict_quick(tiny: Path, data: Path, tmp_path: Path) -> None:
    found = run_json("predict", data, "-o", tmp_path / "m.safetensors", "--checkpoint", tiny, "--quick")
    assert found["provenance"]["quick"] and found["views"] == "single" and not found["directions"]["helps"]


def test_evaluate_is_repeatable(model: Path, data: Path) -> None:
    first, again = (run_json("evaluate", model, data) for _ in range(2))
    assert first["n"] == 12 and first["top1"] > 0.9
    assert (first["top1"], first["nll"]) == (again["top1"], again["nll"])
    assert run_json("evaluate", model, data, "--split", "train")["n"] == 24
    text = run("evaluate", model, data)
    assert f"{100 * first['top1']:.2f} %" in text.stdout and "12 images" in text.stdout


def test_folder_predict_evaluate_classify(tiny: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", {"red [x]": 8, "blue": 8}, side=20)
    (folder / "blue" / "torn.png").write_bytes((folder / "blue" / "0.png").read_bytes()[:100])
    found = run_json("predict", folder, "-o", tmp_path / "m", "--checkpoint", tiny)
    assert found["n"] == 16 and len(found["skipped"]) == 1
    assert run_json("evaluate", tmp_path / "m", folder)["top1"] == 1
    files = [folder / "blue" / "1.png", folder / "red [x]" / "1.png"]
    results = run_json("classify", tmp_path / "m", *files)["results"]
    assert [row["label"] for row in results] == ["blue", "red [x]"]
    assert all(row["probability"] == max(row["probabilities"].values()) > 0.5 for row in results)
    text = run("classify", tmp_path / "m", *files)
    assert "red [x]" in text.stdout and str(files[0]) in text.stdout
    assert "1 file was skipped" in run("evaluate", tmp_path / "m", folder).stdout


def test_classify_takes_images_of_any_size_and_mode(model: Path, tmp_path: Path) -> None:
    from PIL import Image

    files = []
    for mode, size in (("L", (5, 90)), ("RGBA", (40, 7)), ("CMYK", (16, 16)), ("1", (1, 1))):
        files.append(tmp_path / f"{mode}.tif")
        Image.new(mode, size).save(files[-1])
    together = run_json("classify", model, *files)["results"]
    alone = [run_json("classify", model, file)["results"][0] for file in files]
    assert [row["label"] for row in together] == [row["label"] for row in alone]


def test_single_image_class_is_a_warning(tiny: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", {"red": 6, "blue": 6, "lone": 1})
    result = run("predict", folder, "-o", tmp_path / "m", "--checkpoint", tiny)
    assert result.exit_code == 0 and "Warning" in result.stdout and "lone" in result.stdout


def test_info() -> None:
    found = run_json("info")
    assert found["versions"]["pudnet"] == pudnet.__version__ and found["pretrained"] == pudnet.list_pretrained()
    assert pudnet.__version__ in run("info").stdout
    assert run("--version").stdout.strip() == f"pudnet {pudnet.__version__}"


def test_demo(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    found = run_json("demo", "--checkpoint", tiny, "--folder", tmp_path / "demo", "--max-seconds", 0.2)
    for name in ("predicted", "scratch", "random"):
        assert 0 < found[name]["top1"] <= 1 and found[name]["seconds"] > 0
    assert found["predicted"]["top1"] > 0.8
    assert found["train"] + found["test"] == 1797
    assert found["ratio"] == pytest.approx(found["scratch"]["seconds"] / found["predicted"]["seconds"])
    assert found["scratch"]["reached"] == (found["scratch"]["top1"] >= found["predicted"]["top1"])
    assert Path(found["picture"]).read_bytes().startswith(b"\x89PNG")


def test_module_entry_point() -> None:
    done = subprocess.run([sys.executable, "-m", "pudnet", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and "nonsense" in done.stderr and "Traceback" not in done.stderr


# ---- training ---------------------------------------------------------------------------------------------------


def write_config(tmp_path: Path, data: Path, steps: int) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(
        f"""
        target = "convnet3"
        [model]
        image_size = {SIDE}
        width = 8
        generator_width = 2
        [[data]]
        paths = ["{data}"]
        [episodes]
        classes = 2
        support = 2
        query = 2
        groups = 1
        [augment]
        crop = 0
        [optimiser]
        steps = {steps}
        warmup = 1
        decay = 1
        [run]
        output = "{tmp_path / "run"}"
        amp = false
        log_every = 1
        """
    )
    return path


def test_train_then_predict(data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, data, steps=3)
    found = run_json("train", config, "--seed", 3)
    assert found["steps"] == 3 and found["loss"] > 0
    assert run_json("predict", data, "-o", tmp_path / "m", "--checkpoint", found["predictor"])["n"] == 24
    assert_bad_input(run("train", config), "Resume")


def test_interrupted_training_keeps_a_checkpoint(data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, data, steps=10**6)
    process = subprocess.Popen(
        [sys.executable, "-m", "pudnet", "train", str(config)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "log.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume" in errors and "Traceback" not in errors
    saved, _ = checkpoint.load(tmp_path / "run" / "checkpoint.safetensors", "training")
    assert saved["step"] >= 1


def test_finetune(model: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "tuned.safetensors"
    found = run_json("finetune", model, data, "--epochs", 2, "--batch-size", 4, "--test", data, "-o", output)
    entry = found["finetuning"]
    assert [epoch for epoch, _, _ in entry["curve"]] == [0, 1, 2] and entry["measured_on"] == "test"
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    assert run_json("evaluate", output, data)["top1"] == entry["curve"][-1][2]
    assert_bad_input(run("remake", output, data, "-o", tmp_path / "again.safetensors"), "fine-tuned")
    assert_bad_input(run("finetune", model, data, "--lr", 0, "-o", output), "lr")
    assert_bad_input(run("finetune", model, data, "-o", tmp_path / "missing" / "x.safetensors"), "folder")


def test_interrupted_fine_tuning_goes_on(model: Path, data: Path, tmp_path: Path) -> None:
    output, whole = tmp_path / "tuned.safetensors", tmp_path / "whole.safetensors"
    saved = tmp_path / "tuned.safetensors.checkpoint"
    arguments = ["finetune", model, data, "--epochs", 30, "--batch-size", 4, "--validation", 0]
    process = subprocess.Popen(
        [sys.executable, "-m", "pudnet", *map(str, arguments), "-o", str(output)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "FORCE_COLOR": "1"},
    )
    assert process.stderr is not None
    seen = ""
    while process.poll() is None and not re.search(r"\b[1-9][0-9]*/", seen):  # the bar shows a step
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, seen + errors
    assert "--resume" in errors and "Traceback" not in errors
    assert saved.exists() and not output.exists()
    assert_bad_input(run(*arguments, "-o", output), "without a file")
    assert run(*arguments, "-o", output, "--resume").exit_code == 0 and not saved.exists()
    assert run(*arguments, "-o", whole).exit_code == 0
    first, second = (dict(pudnet.load(path).state_dict()) for path in (output, whole))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


# ---- bad input --------------------------------------------------------------------------------------------------


def test_missing_and_empty_sources(tiny: Path, tmp_path: Path) -> None:
    def predict(source: Path) -> Result:
        return run("predict", source, "-o", tmp_path / "m", "--checkpoint", tiny)

    assert_bad_input(predict(tmp_path / "missing"), "missing")
    (tmp_path / "empty").mkdir()
    assert_bad_input(predict(tmp_path / "empty"), "empty")
    assert_bad_input(predict(write_images(tmp_path / "one", {"red": 3})), "2 classes", "red")
    folder = write_images(tmp_path / "hollow", {"red": 3, "blue": 1})
    (folder / "blue" / "0.png").write_bytes(b"no image at all")
    assert_bad_input(predict(folder), "blue")
    assert not (tmp_path / "m").exists()
    assert not list(tmp_path.glob(".*"))


BAD_ARRAYS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "NaN": (lambda: arrays(x_train=np.full((24, SIDE, SIDE, 3), np.nan, np.float32)), "NaN"),
    "dtype": (lambda: arrays(x_train=np.zeros((24, SIDE, SIDE, 3), np.int32)), "uint8"),
    "shape": (lambda: arrays(x_train=np.zeros((24, SIDE, 3, 5), np.uint8)), "[n, H, W"),
    "length": (lambda: arrays(y_train=np.zeros(5, np.int64)), "24"),
    "float labels": (lambda: arrays(y_train=np.zeros(24)), "integers"),
    "out of range": (lambda: arrays(class_names=np.array(["a", "b"])), "0..1"),
    "negative": (lambda: arrays(y_train=np.repeat([-1, 0, 1], 8)), "-1"),
    "one class": (lambda: arrays(y_train=np.zeros(24, np.int64), y_test=None, x_test=None), "2 classes"),
    "more classes in the test part": (lambda: arrays(y_test=np.repeat([0, 1, 3], 4)), "training part"),
    "no images": (lambda: arrays(x_train=None), "x_train"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays(case: str, tiny: Path, tmp_path: Path) -> None:
    make, word = BAD_ARRAYS[case]
    np.savez(tmp_path / "bad.npz", **make())
    assert_bad_input(run("predict", tmp_path / "bad.npz", "-o", tmp_path / "m", "--checkpoint", tiny), word)


def test_more_classes_than_the_model_knows(model: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", {"0": 1, "1": 1, "9": 1})
    assert_bad_input(run("evaluate", model, folder), "'9'")


def test_bad_checkpoints(tiny: Path, model: Path, data: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    def predict(path: Path) -> Result:
        return run("predict", data, "-o", tmp_path / "m", "--checkpoint", path)

    (tmp_path / "torn.safetensors").write_bytes(tiny.read_bytes()[:-100])
    assert_bad_input(predict(tmp_path / "torn.safetensors"), "torn")
    (tmp_path / "text").write_text("hello")
    assert_bad_input(predict(tmp_path / "text"), "damaged")
    save_file({"a": torch.zeros(2)}, tmp_path / "other")
    assert_bad_input(predict(tmp_path / "other"), "written by pudnet")
    header = json.dumps({"format": 99, "kind": "predictor", "version": "9.0", "config": {}})
    save_file({"a": torch.zeros(2)}, tmp_path / "later", metadata={"pudnet": header})
    assert_bad_input(predict(tmp_path / "later"), "99", "9.0")
    assert_bad_input(predict(model), "predictor")
    assert_bad_input(predict(tmp_path / "absent.safetensors"), "bundled name")
    assert_bad_input(run("evaluate", tiny, data), "model")
    assert_bad_input(run("evaluate", tmp_path / "absent", data), "absent")


def test_bad_output(tiny: Path, data: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for output in (tmp_path / "absent" / "m", tmp_path, data / "m", tmp_path / "pipe", Path("/dev/null")):
        result = run("predict", data, "-o", output, "--checkpoint", tiny)
        assert_bad_input(result, str(output))
    assert_bad_input(run("demo", "--checkpoint", tiny, "--folder", data), str(data))


def test_bad_options(tiny: Path, model: Path, data: Path, tmp_path: Path) -> None:
    predict = ("predict", data, "-o", tmp_path / "m", "--checkpoint", tiny)
    assert_bad_input(run(*predict, "--head", "forest"), "forest", "ridge")
    assert_bad_input(run(*predict, "--batchnorm", "no"), "calibrated")
    assert_bad_input(run(*predict, "--device", "abacus"), "abacus")
    assert_bad_input(run(*predict, "--device", "meta"), "meta")
    assert_bad_input(run(*predict, "--split", "half"), "half")
    for seed in ("one", "-1", str(2**64)):
        assert run(*predict, "--seed", seed).exit_code == 2
    assert run("predict").exit_code == 2
    (tmp_path / "not an image.png").write_bytes(b"?")
    assert_bad_input(run("classify", model, tmp_path / "not an image.png"), "not an image.png")
    assert_bad_input(run("classify", model, tmp_path / "gone.png"), "gone.png")
    assert_bad_input(run("train", tmp_path / "gone.toml"), "gone.toml")
    (tmp_path / "bad.toml").write_text("target = [")
    assert_bad_input(run("train", tmp_path / "bad.toml"), "TOML")


def test_interrupt_anywhere_is_130(model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pudnet.predicted.open_images", interrupt)
    result = run("evaluate", model, data)
    assert result.exit_code == 130 and "interrupted" in result.stderr
