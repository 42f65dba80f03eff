"""Predicting a classifier from image files, as pytest-benchmark times it, beside the time that training took.

    python -m pytest benchmarks/bench_training_time.py

takes about three minutes; the second half of `make bench-train`, whose first half (pudnet.evaluation.training_time)
trains and writes results/training-time-<machine>.json. A row's extra_info has the seconds of every stage in this run,
the seconds of training from that file, and the ratios of the two; a lower bound where training was never as accurate.
No timing without agreement: the accuracy must be the one in the file. PUDNET_BENCH_DEVICE and PUDNET_BENCH_DATA choose
the device and the folder of the image sets.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pudnet.descent import accuracy
from pudnet.evaluation import training_time
from pudnet.evaluation.rows import Bench
from pudnet.evaluation.tasks import Material, available
from pudnet.evaluation.training_time import DATASETS, PREDICTIONS, RATIOS, Prediction, Settings, Winner

DEVICE = os.environ.get("PUDNET_BENCH_DEVICE", "cpu")
DATA = Path(os.environ.get("PUDNET_BENCH_DATA", Path(__file__).parents[2] / "shared" / "data"))
ROUNDS = 3


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    path = Path(__file__).parent / "results" / f"{training_time.file_stem(DEVICE)}.json"
    if not path.is_file():
        pytest.skip(f"no {path.name}: it is what `make bench-train` writes first")
    return dict(json.loads(path.read_text()))


@pytest.fixture(scope="module")
def bench(document: dict[str, Any]) -> Bench:
    return Bench.open(document["settings"]["checkpoint"])


@pytest.mark.parametrize("key", PREDICTIONS)
@pytest.mark.parametrize("name", DATASETS)
def test_predict_from_files(
    benchmark: Any, document: dict[str, Any], bench: Bench, name: str, key: str, tmp_path: Path
) -> None:
    record = next((record for record in document["datasets"] if record["dataset"] == name), None)
    settings = Settings(**{**document["settings"], "data": DATA, "device": DEVICE})
    material = Material(DATA, bench.preprocess.size, bench.held_out, settings.ways)
    if record is None or (reason := available(DATASETS[name], material)):
        pytest.skip("not in the JSON file" if record is None else reason)
    task = DATASETS[name].build(material, 0, settings.seed)
    folder = training_time.write_images(task.train, tmp_path / "train")
    predictor = training_time.open_predictor(settings)

    def predict() -> Any:
        return predictor.predict(folder, head=settings.head, seed=settings.seed, **PREDICTIONS[key])

    model = benchmark.pedantic(predict, rounds=ROUNDS, warmup_rounds=1)
    top1 = accuracy(model, task.test.images, task.test.labels, model.preprocess)
    written = record["predictions"][key]
    assert abs(top1 - written["top1"]) < 0.005
    # The stages are those of the last round: their sum is that round's time.
    seconds = {**model.report["seconds"], "open": written["seconds"]["open"]}
    expected = model.report["expected_accuracy"]
    found = Winner(**written["training"])
    ratios = training_time.ratios(Prediction(top1, expected, seconds, seconds), found)
    benchmark.group = "everything from files"
    benchmark.extra_info |= {
        "top1": top1,
        "seconds": seconds,
        "training_seconds": found.seconds,
        "training_reached_it": found.reached,
        **{f"ratio: {title}": round(ratios[way], 2) for way, title in RATIOS.items()},
    }
