"""Checkpoints: what comes back, and every way a file can be wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pudnet import PudNet, checkpoint
from pudnet.errors import CheckpointError, InputError

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3), "empty": torch.zeros(0, 2)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    checkpoint.save(path, "predictor", {"x": [1, "two"], "y": None}, TENSORS)
    return path


def _header(path: Path, header: object) -> None:
    save_file(TENSORS, path, metadata={checkpoint.HEADER_KEY: json.dumps(header)})


def test_config_and_tensors_come_back(path: Path) -> None:
    config, tensors = checkpoint.load(path, "predictor")
    assert config == {"x": [1, "two"], "y": None}
    assert tensors.keys() == TENSORS.keys()
    assert all(
        torch.equal(tensors[name], value) and tensors[name].dtype == value.dtype for name, value in TENSORS.items()
    )


def test_strided_and_shared_tensors_can_be_saved(tmp_path: Path) -> None:
    base = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tensors = {"transposed": base.t(), "row": base[0], "same": base}
    checkpoint.save(tmp_path / "x", "predictor", {}, tensors)
    loaded = checkpoint.load(tmp_path / "x", "predictor")[1]
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_truncated_file_is_refused(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(path, "predictor")


def test_a_file_that_is_no_safetensors_is_refused(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + bytes(500))
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(path, "predictor")


def test_another_version_is_refused(path: Path) -> None:
    _header(path, {"format": checkpoint.FORMAT_VERSION + 1, "kind": "predictor", "version": "9.9", "config": {}})
    with pytest.raises(CheckpointError, match=r"written by pudnet 9\.9"):
        checkpoint.load(path, "predictor")


def test_another_kind_is_refused(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'predictor' file.*Predictor\.from_pretrained"):
        checkpoint.load(path, "model")


@pytest.mark.parametrize("header", [None, [], {"format": 1}, {"format": 1, "kind": "predictor", "config": 3}])
def test_a_file_of_someone_else_is_refused(path: Path, header: object) -> None:
    _header(path, header)
    with pytest.raises(CheckpointError, match="written by pudnet"):
        checkpoint.load(path, "predictor")


def test_a_file_without_metadata_is_refused(path: Path) -> None:
    save_file(TENSORS, path)
    with pytest.raises(CheckpointError, match="written by pudnet"):
        checkpoint.load(path, "predictor")


def test_metadata_that_is_no_json_is_refused(path: Path) -> None:
    save_file(TENSORS, path, metadata={checkpoint.HEADER_KEY: "{"})
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(path, "predictor")


@pytest.mark.parametrize("name", ["missing.safetensors", "."])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="existing file"):
        checkpoint.load(tmp_path / name, "predictor")


def test_unwritable_places_are_refused_and_leave_nothing_behind(tmp_path: Path) -> None:
    for place in (tmp_path / "no" / "folder", tmp_path):
        with pytest.raises(InputError, match="path"):
            checkpoint.save(place, "predictor", {}, TENSORS)
    assert os.listdir(tmp_path) == []


def test_a_failed_save_keeps_the_old_file(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(TypeError):
        checkpoint.save(path, "predictor", {"not": object()}, TENSORS)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target": "convnet3"},
        {"target": "convnet3", "pudnet": {"image_size": 32}},
        {"target": "convnet3", "pudnet": {"image_size": 32, "sketch_size": 32, "new_option": 1}},
        {"target": "convnet9", "pudnet": {"image_size": 32, "sketch_size": 32}},
        {"target": "convnet3", "pudnet": {"image_size": 32, "sketch_size": 32, "width": "wide"}},
        {"target": "convnet3", "pudnet": [1, 2]},
        {"target": 3, "pudnet": {"image_size": 32, "sketch_size": 32}},
    ],
)
def test_a_config_that_does_not_fit_is_a_checkpoint_error(tmp_path: Path, config: dict[str, object]) -> None:
    checkpoint.save(tmp_path / "x", "predictor", config, TENSORS)
    with pytest.raises(CheckpointError):
        PudNet.load(tmp_path / "x")


@pytest.mark.parametrize("text", ["[" * 10**5, "9" * 5000, '{"config": ' + "[" * 10**5])
def test_json_that_python_refuses_is_damage(path: Path, text: str) -> None:
    save_file(TENSORS, path, metadata={checkpoint.HEADER_KEY: text})
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(path, "predictor")


def test_claimed_sizes_cost_no_memory(tmp_path: Path) -> None:
    PudNet("convnet3", width=8).save(tmp_path / "x")
    config, tensors = checkpoint.load(tmp_path / "x", "predictor")
    config["pudnet"]["width"] = 2**16  # its recurrence alone would take 200 GB
    checkpoint.save(tmp_path / "x", "predictor", config, tensors)
    with pytest.raises(CheckpointError, match="tensors must be the"):
        PudNet.load(tmp_path / "x")


def test_loaded_tensors_do_not_change_with_the_file(path: Path) -> None:
    tensors = checkpoint.load(path, "predictor")[1]
    path.write_bytes(bytes(path.stat().st_size))  # in place, as a careless copy does
    assert torch.equal(tensors["a"], TENSORS["a"])


def test_tensors_of_another_shape_are_a_checkpoint_error(tmp_path: Path) -> None:
    net = PudNet("convnet3", width=8)
    net.save(tmp_path / "x")
    config, tensors = checkpoint.load(tmp_path / "x", "predictor")
    tensors["recurrence.start"] = torch.zeros(9)
    checkpoint.save(tmp_path / "x", "predictor", config, tensors)
    with pytest.raises(CheckpointError, match=r"recurrence\.start"):
        PudNet.load(tmp_path / "x")


def test_a_full_disk_is_bad_input_and_keeps_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()
    for error in (OSError(28, "No space left on device"), SafetensorError("I/O error: no space left")):

        def full(*arguments: object, error: Exception = error, **options: object) -> None:
            raise error

        monkeypatch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(InputError, match=r"(?i)no space left"):
            checkpoint.save(path, "predictor", {}, TENSORS)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_a_file_that_may_not_be_read_is_bad_input(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("safetensors.safe_open", forbidden)
    with pytest.raises(InputError, match="Permission denied"):
        checkpoint.load(path, "predictor")
