"""Predicted models outside pudnet: ONNX, torch.export programs, and weights in an ordinary network."""

from __future__ import annotations

import json
import pickletools
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_predictor import SIDE, Plain, coloured, tiny_net
from torch import Tensor, nn

import pudnet
from pudnet.data import Preprocess
from pudnet.errors import InputError, PudnetError
from pudnet.export import TOLERANCE, Deployed, _compare

FORMATS = ("onnx", "pt2", "safetensors")


@pytest.fixture(scope="module")
def model() -> pudnet.PredictedModel:
    return pudnet.Predictor(tiny_net()).predict(*coloured(12), classes=["rose", "tulip", "lily"])


@pytest.fixture(scope="module")
def folder(model: pudnet.PredictedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    for suffix in FORMATS:
        model.export(folder / f"model.{suffix}")
    return folder


def expected(model: pudnet.PredictedModel, images: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        logits = model(model.preprocess(images))
    return logits, torch.softmax(logits, 1)


def onnx_outputs(path: Path, images: Tensor) -> list[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(found) for found in session.run(["logits", "probabilities"], {"images": images.numpy()})]


@pytest.mark.parametrize("n", [1, 2, 7, 60])
def test_onnx_gives_the_same_outputs_for_any_number_of_images(
    model: pudnet.PredictedModel, folder: Path, n: int
) -> None:
    images = coloured(20, seed=3)[0][:n]
    for found, wanted in zip(onnx_outputs(folder / "model.onnx", images), expected(model, images), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE * max(1.0, float(wanted.abs().max())))


def test_the_program_gives_equal_outputs_for_any_number_of_images(model: pudnet.PredictedModel, folder: Path) -> None:
    program = torch.export.load(folder / "model.pt2").module()
    for n in (1, 2, 7, 60):
        images = coloured(20, seed=3)[0][:n]
        for found, wanted in zip(program(images), expected(model, images), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE * max(1.0, float(wanted.abs().max())))
        logits = model(model.preprocess(images))  # with gradients: the modules themselves, nothing folded
        for found, wanted in zip(program(images), (logits, torch.softmax(logits, 1)), strict=True):
            assert torch.equal(found, wanted)


def test_normalisation_sizes_and_class_names_travel_with_each(model: pudnet.PredictedModel, folder: Path) -> None:
    import onnxruntime

    extra = {"pudnet.json": ""}
    torch.export.load(folder / "model.pt2", extra_files=extra)
    metadata = onnxruntime.InferenceSession(folder / "model.onnx").get_modelmeta().custom_metadata_map
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        headers = [json.loads(text) for text in (extra["pudnet.json"], metadata["pudnet"], file.metadata()["pudnet"])]
    for header in headers:
        config = header["config"]
        assert config["classes"] == ["rose", "tulip", "lily"]
        assert Preprocess.from_dict(config["preprocess"]) == model.preprocess
        assert config["report"]["provenance"] == model.report["provenance"]
    for header in headers[:2]:
        assert header["input"]["shape"] == ["batch", SIDE, SIDE, 3] and "centre" in header["input"]["resize"]


def test_no_file_holds_a_pickle(folder: Path) -> None:
    with zipfile.ZipFile(folder / "model.pt2") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    assert any(name.endswith("model.json") for name in members)
    for name, content in members.items():
        assert not content.startswith((b"\x80", b"PK")), name  # pickle protocol 2 and later; torch.save's archive
        if name.endswith(".pt"):
            assert content == b""
    for suffix in ("onnx", "safetensors"):
        with pytest.raises(ValueError, match=r"pickle|opcode|unicode|decode|digit"):
            list(pickletools.genops((folder / f"model.{suffix}").read_bytes()))


class Ordinary(nn.Module):
    """The network as somebody without pudnet would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(i, 64, 3, padding=1, bias=False) for i in (3, 64, 64))
        self.norms = nn.ModuleList(nn.BatchNorm2d(64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nn.functional.max_pool2d(norm(conv(x)).relu(), 2)
        return x.flatten(1)


def test_the_backbone_loads_into_an_ordinary_network(model: pudnet.PredictedModel, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    network = Ordinary().eval()
    network.load_state_dict({name: x for name, x in tensors.items() if not name.startswith("pudnet.")})
    x = model.preprocess(coloured(4)[0])
    with torch.no_grad():
        torch.testing.assert_close(network(x), model.network(x), rtol=0, atol=1e-5)


def test_the_saved_file_is_the_exported_one(model: pudnet.PredictedModel, folder: Path, tmp_path: Path) -> None:
    model.save(tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("head", "batchnorm"), [("cosine", "batch"), ("ridge-last", "shared")])
def test_a_network_of_the_callers_is_exported(head: str, batchnorm: str, tmp_path: Path) -> None:
    target = Plain() if batchnorm == "batch" else nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    images, labels = coloured(12)
    model = pudnet.Predictor(tiny_net(target)).predict(images, labels, head=head, batchnorm=batchnorm, growable=True)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model.export(tmp_path / "model.onnx")
    for found, wanted in zip(onnx_outputs(tmp_path / "model.onnx", images), expected(model, images), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE * max(1.0, float(wanted.abs().max())))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items()) and model.fitter is not None


@pytest.mark.parametrize("wrong", [2e-3, float("nan")])
def test_outputs_of_onnxruntime_that_differ_are_an_error(model: pudnet.PredictedModel, wrong: float) -> None:
    deployed, images = Deployed(model, model.preprocess), coloured(1)[0]

    def run(names: Any, feeds: dict[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        logits, probabilities = (x.detach().numpy().copy() for x in deployed(torch.from_numpy(feeds["images"])))
        probabilities[0, 0] += wrong
        return [logits, probabilities]

    with pytest.raises(PudnetError, match=r"onnxruntime's probabilities of 3 images must be within"):
        _compare(SimpleNamespace(run=run), deployed, images)


def test_what_cannot_be_exported(model: pudnet.PredictedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("model.pth", "model", "onnx"):
        with pytest.raises(InputError, match=r"ends in \.safetensors, \.onnx or \.pt2"):
            model.export(tmp_path / name)
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"pip install 'pudnet\[onnx\]'"):
        model.export(tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_cannot_be_traced_is_refused(tmp_path: Path) -> None:
    class Moody(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if bool(x.sum() > -1e9) else x

    model = pudnet.Predictor(tiny_net(Moody(nn.Conv2d(3, 4, 3)))).predict(*coloured(4))
    with pytest.raises(InputError, match=r"torch\.export can take"):
        model.export(tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


# ---- docs/production.md -------------------------------------------------------------------------------------------


def block(name: str) -> str:
    """The code of docs/production.md behind the mark ``<!-- test: name -->``."""
    text = (Path(__file__).parent.parent / "docs" / "production.md").read_text()
    return text.partition(f"<!-- test: {name} -->\n```python\n")[2].partition("```")[0]


def test_the_documented_ways_to_use_the_files(
    model: pudnet.PredictedModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    from pudnet.data.pillow import read_image

    monkeypatch.chdir(tmp_path)
    for suffix in FORMATS:
        (tmp_path / f"model.{suffix}").symlink_to(folder / f"model.{suffix}")
    rng = np.random.default_rng(0)
    for name, shape in {"rose": (40, 23, 4), "tulip": (33, 61)}.items():
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(f"{name}.png")
    names: dict[str, Any] = {"network": Ordinary()}
    for part in ("prepare", "program", "backbone"):
        exec(block(part), names)
    ours = model.preprocess.resize([torch.from_numpy(read_image(Path(f"{name}.png"))) for name in ("rose", "tulip")])
    assert np.abs(names["images"].astype(int) - ours.numpy().astype(int)).max() <= 1
    torch.testing.assert_close(names["probabilities"], expected(model, torch.from_numpy(names["images"]))[1])
    assert names["classes"] == ["rose", "tulip", "lily"] and set(names["answers"]) <= set(names["classes"])
    torch.testing.assert_close(names["network"].convs[0].weight, model.network.convs[0].weight)  # type: ignore[index,union-attr]


def test_the_documented_preparation_is_within_one_grey_level(tmp_path: Path) -> None:
    from PIL import Image

    from pudnet.data.pillow import read_image

    names: dict[str, Any] = {}
    exec(block("prepare").partition("session =")[0], names)
    rng = np.random.default_rng(0)
    preprocess = Preprocess(32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    for shape in [*rng.integers(1, 90, (30, 2)).tolist(), [500, 333, 3], [40, 40, 4], [9, 50], [1, 300]]:
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / "x.png")
        ours = preprocess.resize([torch.from_numpy(read_image(tmp_path / "x.png"))])[0].numpy()
        assert np.abs(names["prepare"](tmp_path / "x.png", 32).astype(int) - ours).max() <= 1, shape
