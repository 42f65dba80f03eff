"""One model from shards: the sums and samples of heads merge, and processes make the model that one makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stress.serving import small_dataset, small_predictor
from test_tutorials import python_blocks
from torch import Tensor

import pudnet
from pudnet import shards
from pudnet.errors import InputError
from pudnet.heads import HEADS, HeadFitter
from pudnet.serving import AnyToken
from pudnet.targets.convnet import ConvNet3

CLASSES, WORLD = 3, 3
NAMES = [str(number) for number in range(CLASSES)]


# ---- heads ------------------------------------------------------------------------------------------------------


def rows(count: int, seed: int, width: int = 12) -> tuple[list[Tensor], Tensor]:
    """Feature maps and labels that depend on each other; the first rows have one of each class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % CLASSES
    return [torch.randn(count, width, generator=generator) + 2 * torch.eye(CLASSES, width)[y]], y


def fitter(name: str, parts: list[tuple[list[Tensor], Tensor]], loo_rows: int) -> HeadFitter:
    made = HeadFitter(name, CLASSES, loo_rows=loo_rows)
    made.add(parts)
    return made


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("loo_rows", [30, 2048])  # fewer than a shard has, and more than all have
def test_merged_heads_are_the_head_of_all_images(name: str, loo_rows: int) -> None:
    parts = [rows(count, count) for count in (40, 5, 90)]
    shares = [fitter(name, [part], loo_rows) for part in parts]
    before = [json.dumps({key: value.tolist() for key, value in one.state()[1].items()}) for one in shares[1:]]
    whole, wanted = shares[0], fitter(name, parts, loo_rows)
    for share in (HeadFitter(name, CLASSES, loo_rows=loo_rows), *shares[1:]):
        whole.merge(share)
    found, expected = whole.fit(), wanted.fit()
    assert found.info["images"] == 135
    if loo_rows == 2048:  # all images are in the sample: the same choice of lambda, the same estimate
        torch.testing.assert_close(found.weight, expected.weight, rtol=1e-4, atol=1e-6)
        assert found.expected_accuracy == pytest.approx(expected.expected_accuracy, abs=1e-12)
    else:
        assert found.expected_accuracy == pytest.approx(expected.expected_accuracy, abs=0.25)
        kept = 135 if name == "kernel" else 30
        assert whole._sample is not None and len(whole._sample.rows()[1]) == kept
    config, tensors = whole.state()
    again = HeadFitter.from_state(name, CLASSES, json.loads(json.dumps(config)), tensors)
    assert torch.equal(again.fit().weight, found.weight)
    again.add([rows(7, 1)])
    assert again.fit().info["images"] == 142
    assert before == [json.dumps({key: value.tolist() for key, value in one.state()[1].items()}) for one in shares[1:]]


def test_an_empty_head_takes_the_other_over() -> None:
    full, empty = fitter("ridge", [rows(20, 0)], 2048), HeadFitter("ridge", CLASSES)
    empty.merge(full)
    empty.add([rows(20, 1)])
    assert empty.fit().info["images"] == 40 and full.fit().info["images"] == 20


def test_a_merged_sample_is_uniform() -> None:
    """Chi-square over which of 20 + 60 rows are kept, 10 at a time."""
    counts = torch.zeros(80)
    for seed in range(600):
        shares = [HeadFitter("cosine", 80, seed=seed + number, loo_rows=10) for number in range(2)]
        for share, labels in zip(shares, (torch.arange(20), torch.arange(20, 80)), strict=True):
            share.add([([torch.ones(len(labels), 2)], labels)])
        shares[0].merge(shares[1])
        assert shares[0]._sample is not None
        counts[shares[0]._sample.rows()[1]] += 1
    expected = 600 * 10 / 80
    assert ((counts - expected).square() / expected).sum() < 129  # 79 degrees of freedom: 1 in 3,000 above


def test_merge_refuses_another_kind() -> None:
    whole = fitter("ridge", [rows(20, 0)], 2048)
    for other in (
        fitter("ridge-last", [rows(20, 0)], 2048),
        fitter("ridge", [rows(20, 0)], 30),
        fitter("ridge", [rows(20, 0, width=13)], 2048),
    ):
        with pytest.raises(InputError, match=r"HeadFitter\.merge: other must be"):
            whole.merge(other)


# ---- processes --------------------------------------------------------------------------------------------------


def shard(rank: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The images of one process; the last one has none of the last class."""
    images, labels = small_dataset(15 - rank)
    few = labels < CLASSES - (rank == WORLD - 1)
    return images[few], labels[few]


# argv: where the result goes, and the folder of this file.
SCRIPT = """
import json, sys
sys.path[:0] = [sys.argv[2], sys.argv[2] + "/.."]
import torch
import torch.distributed as dist
from test_shards import NAMES, shard
from stress.serving import small_predictor
from pudnet import shards
from pudnet.heads import HEADS

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
for head in HEADS:
    model = shards.predict(small_predictor(), *shard(rank), classes=NAMES, head=head)
    model.save(f"{sys.argv[1]}/{head}-{rank}.safetensors")
dist.destroy_process_group()
"""


def torchrun(script: Path, world: int, *arguments: str) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={world}",
            script,
            *arguments,
        ],
        cwd=script.parent,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[pudnet.PredictedModel]]:
    """What each of three processes made, for every head."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "script.py").write_text(SCRIPT)
    torchrun(folder / "script.py", WORLD, str(folder), str(Path(__file__).parent))
    target = ConvNet3(8)
    return {
        head: [pudnet.load(folder / f"{head}-{rank}.safetensors", target=target) for rank in range(WORLD)]
        for head in HEADS
    }


@pytest.mark.parametrize("head", HEADS)
def test_processes_make_the_model_of_one(models: dict[str, list[pudnet.PredictedModel]], head: str) -> None:
    images, labels = (np.concatenate(both) for both in zip(*map(shard, range(WORLD)), strict=True))
    # All images fit into the sketch, which is then the same set however the images were cut.
    alone = small_predictor().predict(images, labels, classes=NAMES, head=head)
    x = alone.preprocess(images)
    with torch.no_grad():
        answers = [model(x) for model in (*models[head], alone)]
    assert all(torch.equal(answers[0], other) for other in answers[1:WORLD])
    torch.testing.assert_close(answers[0], answers[WORLD], rtol=1e-3, atol=1e-3)
    for model in models[head]:
        assert model.report["n"] == len(labels) and model.report["class_counts"] == alone.report["class_counts"]
        assert model.report["expected_accuracy"] == pytest.approx(alone.report["expected_accuracy"], abs=1e-12)
        assert model.report["provenance"]["shards"] == WORLD


def test_a_single_process_is_predict() -> None:
    predictor, (images, labels) = small_predictor(), small_dataset(3)
    model, alone = shards.predict(predictor, images, labels, classes=NAMES), predictor.predict(images, labels)
    with torch.no_grad():
        x = alone.preprocess(images)
        assert torch.equal(model(x), alone(x))
    with pytest.raises(InputError, match="batchnorm"):
        shards.predict(predictor, images, labels, classes=NAMES, batchnorm="batch")
    with pytest.raises(pudnet.Cancelled):
        token = AnyToken(seconds=-1.0)
        shards.predict(predictor, images, labels, classes=NAMES, cancel=token)


def test_the_documented_script(tmp_path: Path) -> None:
    page = Path(__file__).parent.parent / "docs" / "scale.md"
    (tmp_path / "predict_shards.py").write_text(python_blocks(page.read_text()))
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    for rank in range(2):
        images, labels = small_dataset(rank)
        np.savez(tmp_path / f"shard-{rank}.npz", x_train=images, y_train=labels)
    torchrun(tmp_path / "predict_shards.py", 2)
    both = (np.concatenate(parts) for parts in zip(small_dataset(0), small_dataset(1), strict=True))
    alone = pudnet.Predictor.from_pretrained("convnet3").predict(*both)
    model = pudnet.load(tmp_path / "model.safetensors")
    with torch.no_grad():
        x = alone.preprocess(small_dataset(2)[0])
        torch.testing.assert_close(model(x), alone(x), rtol=1e-2, atol=1e-2)
