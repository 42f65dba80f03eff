"""pudnet add, export and remake."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import SIDE, assert_bad_input, run, run_json, write_images
from test_predictor import logits_of

import pudnet


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hypernetwork, two datasets of images, and a model of the first that can grow."""
    folder = tmp_path_factory.mktemp("shipping")
    pudnet.PudNet("convnet3", image_size=SIDE, width=8, generator_width=2).save(folder / "net")
    write_images(folder / "first", {"red": 8, "blue": 8})
    write_images(folder / "more", {"red": 2, "green": 5})
    made = run("predict", folder / "first", "--growable", "--checkpoint", folder / "net", "-o", folder / "model")
    assert made.exit_code == 0, made.stderr
    return folder


def test_images_and_classes_are_added(folder: Path) -> None:
    result = run_json("add", folder / "model", folder / "more", "--new-class", "green", "-o", folder / "larger")
    assert result["class_counts"] == {"blue": 8, "red": 10, "green": 5} and result["n"] == 23
    assert pudnet.load(folder / "larger").classes == ("blue", "red", "green")
    refused = run("add", folder / "model", folder / "more", "-o", folder / "x")
    assert_bad_input(refused, "model's 2 classes", "'green'")
    run("predict", folder / "first", "--checkpoint", folder / "net", "-o", folder / "fixed")
    assert_bad_input(run("add", folder / "fixed", folder / "more", "-o", folder / "x"), "growable=True")
    assert not (folder / "x").exists()


def test_a_model_is_made_again(folder: Path) -> None:
    run("add", folder / "model", folder / "more", "--new-class", "green", "-o", folder / "larger")
    result = run_json("remake", folder / "larger", folder / "first", "--added", folder / "more", "-o", folder / "again")
    first, again = pudnet.load(folder / "larger"), pudnet.load(folder / "again")
    assert result["sha256"] == first.report["provenance"]["model_sha256"]
    images = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
    assert torch.equal(logits_of(first, torch.from_numpy(images)), logits_of(again, torch.from_numpy(images)))
    assert_bad_input(run("remake", folder / "model", folder / "more", "-o", folder / "x"), "those of the record")
    assert not (folder / "x").exists()


def test_export(folder: Path) -> None:
    result = run_json("export", folder / "model", folder / "program.pt2")
    assert result["classes"] == ["blue", "red"] and result["bytes"] == (folder / "program.pt2").stat().st_size
    images = torch.zeros(2, SIDE, SIDE, 3, dtype=torch.uint8)
    logits, _ = torch.export.load(folder / "program.pt2").module()(images)
    model = pudnet.load(folder / "model")
    assert torch.equal(logits, model(model.preprocess(images)))  # with gradients: the modules themselves
    torch.testing.assert_close(logits, logits_of(model, images), rtol=1e-4, atol=1e-4)
    assert_bad_input(run("export", folder / "model", folder / "program.bin"), "ends in .safetensors, .onnx or .pt2")
    assert_bad_input(run("export", folder / "model", folder / "no" / "x.pt2"), "folder that exists")
