"""Prediction against training: what counts as the time of each, and one small comparison from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from pudnet import PudNet
from pudnet.evaluation import training_time
from pudnet.evaluation.rows import Bench
from pudnet.evaluation.tasks import Images, Task
from pudnet.evaluation.training_time import (
    Prediction,
    Run,
    Settings,
    Winner,
    first_reached,
    main,
    ratios,
    train,
    winner,
)

SECONDS = {
    "open": 0.5,
    "reading": 1.0,
    "sketch": 0.1,
    "weights": 0.01,
    "directions": 0.09,
    "calibration": 0.2,
    "head": 0.7,
    "total": 2.1,
}


def made_run(optimizer: str, epochs: int, seconds: float, *tops: float) -> Run:
    """A run measured at equal distances."""
    parts = [((number + 1) / len(tops), top) for number, top in enumerate(tops)]
    return Run(optimizer, epochs, 0, seconds, [(epochs * part, seconds * part, top) for part, top in parts])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("checkpoint") / "untrained.safetensors"
    PudNet("convnet3", image_size=8, width=8, generator_width=2).save(path)
    return str(path)


def colours(n: int, seed: int) -> Images:
    """Images that are mainly red, green or blue."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    images = torch.randint(0, 160, (n, 8, 8, 3), generator=generator, dtype=torch.uint8)
    images[torch.arange(n), :, :, labels] += 90
    return Images(images, labels, ("red", "green", "blue"))


def test_the_run_that_is_first_counts_and_else_the_longest() -> None:
    runs = [made_run("adam", 2, 2.0, 0.5), made_run("sgd", 20, 20.0, 0.6, 0.9), made_run("adam", 20, 22.0, 0.6, 0.95)]
    assert winner(runs, 0.6) == Winner(True, "sgd", 20, 10.0)
    assert winner(runs, 0.9) == Winner(True, "sgd", 20, 20.0)
    assert winner(runs, 0.95) == Winner(True, "adam", 20, 22.0)
    assert winner([runs[0], made_run("sgd", 80, 70.0, 0.7)], 0.8) == Winner(False, "sgd", 80, 70.0)


def test_time_of_an_accuracy_lies_between_the_points() -> None:
    curve = [(1.0, 2.0, 0.4), (2.0, 4.0, 0.3), (3.0, 6.0, 0.7), (4.0, 8.0, 0.6), (5.0, 10.0, 0.9)]
    assert first_reached(curve, 0.5) == pytest.approx(5)
    assert first_reached(curve, 0.7) == pytest.approx(6)
    assert first_reached(curve, 0.1) == pytest.approx(0.5)  # from nothing at the start
    assert first_reached(curve, 0.75) == pytest.approx(9)
    assert first_reached(curve, 0.95) is None


def test_ratios_by_hand() -> None:
    found = ratios(Prediction(0.9, 0.9, SECONDS, SECONDS), Winner(True, "adam", 5, 10.04))
    assert found["weights"] == pytest.approx(1004)
    assert found["directed"] == pytest.approx(100.4)
    assert found["classifier"] == pytest.approx(10.04 / 1.1)  # sketch, weights, directions, calibration, head
    assert found["files"] == pytest.approx(10.04 / 2.6)


def test_schedules_go_on_until_one_is_as_accurate_or_the_budget_is_spent(checkpoint: str) -> None:
    bench, task = Bench.open(checkpoint), Task("made up", 0, 0, colours(64, 0), colours(30, 1))
    settings = Settings(checkpoint, epochs=(1, 40, 30))
    runs, left_out = train(settings, bench, task, 0.0, 1e9, lambda run: None)
    assert [(run.optimizer, run.epochs) for run in runs] == [("adam", 1), ("sgd", 1)] and left_out == []
    assert all(first_reached(run.curve, 0.0) == 0 for run in runs)
    assert len(runs[0].curve) == 2  # two steps: no more points than steps
    poor = Settings(checkpoint, epochs=(1, 10**6))
    runs, left_out = train(poor, bench, task, 1.1, 60, lambda run: None)
    assert len(runs) == 2 and left_out == ["adam, 1000000 epochs", "sgd, 1000000 epochs"]
    assert not winner(runs, 1.1).reached


def test_images_become_files_in_the_order_of_their_labels(tmp_path: Path) -> None:
    part = colours(7, 0)
    folder = training_time.write_images(part, tmp_path / "train")
    assert sorted(path.name for path in folder.iterdir()) == ["0000", "0001", "0002"]
    second = sorted((folder / "0001").iterdir())
    assert [path.name for path in second] == ["000001.png", "000004.png"]
    assert torch.equal(torch.tensor(list(Image.open(second[1]).tobytes())), part.images[4].flatten())


def test_command(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        training_time.DATASETS,
        "digits",
        training_time.Group("Colours", lambda *_: Task("made up", 0, 0, colours(90, 0), colours(30, 1))),
    )
    common = ["--checkpoint", checkpoint, "--data", str(tmp_path / "none"), "-o", str(tmp_path / "results")]
    command = [*common, "--datasets", "digits", "mnist", "--repeats", "2", "--epochs", "1", "2"]
    assert main([*command, "--peers", "pixels-mean", "random-ridge", "finetune-5"]) == 0
    shown = capsys.readouterr()
    assert (
        "| Colours, full |" in shown.out
        and "| Colours, quick |" in shown.out
        and "nearest class mean" in shown.out
        and "mnist: left out" in shown.err
    )
    (numbers,) = (tmp_path / "results").glob("training-time-*.json")
    assert "<svg" in numbers.with_suffix(".svg").read_text()
    document = json.loads(numbers.read_text())
    (record,) = document["datasets"]
    assert list(document["skipped"]) == ["mnist"] and record["n_train"] == 90
    assert set(record["peers"]) == {"pixels-mean", "random-ridge"}  # fine-tuning needs another dataset
    assert list(record["predictions"]) == ["full", "quick"]
    for prediction in record["predictions"].values():
        seconds, spent = prediction["seconds"], prediction["ways_to_count"]
        assert spent["weights"] == seconds["weights"] <= spent["directed"] < spent["classifier"] < spent["files"]
        counted = prediction["training"]["seconds"]
        assert prediction["ratios"] == pytest.approx({way: counted / value for way, value in spent.items()})
    assert main([*common, "--datasets", "mnist"]) == 2
    assert "mnist.npz" in capsys.readouterr().err
