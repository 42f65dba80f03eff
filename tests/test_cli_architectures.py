"""`pudnet predict-arch` and `pudnet graph`: what they write, and how they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner, Result

import pudnet
from pudnet.checkpoint import PRETRAINED
from pudnet.cli import app
from pudnet.graphs import make_network
from pudnet.training import read_config
from pudnet.training.config import GHNTrainingConfig

NETS = """
import torch
from torch import nn
from layers import block

print("noise of the file")

class Net(nn.Sequential):
    pass

def good():
    print("noise of the factory")
    return Net(block(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

def spare():
    net = good()
    net.extra = nn.Linear(2, 2)
    net.forward = lambda x: net[3](net[2](net[1](net[0](x))))
    return net

class Odd(nn.Module):
    def forward(self, x):
        return torch.fft.fft(x)

def unknown():
    return Odd()

def raising():
    raise RuntimeError("out of\\nideas")

def leaving():
    raise SystemExit(0)

def number():
    return 5

def wants(argument):
    return Net()

ready = nn.Conv2d(3, 4, 3)
text = "not a factory"
"""
LAYERS = """
from torch import nn

def block(inputs, out):
    return nn.Sequential(nn.Conv2d(inputs, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU())
"""


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nets")
    (folder / "layers.py").write_text(LAYERS)
    (folder / "broken.py").write_text("import nothing_of_this_name\n")
    (folder / "notes.txt").write_text("")
    path = folder / "nets.py"
    path.write_text(NETS)
    return path


@pytest.fixture(scope="module")
def ghn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ghn") / "ghn.safetensors"
    pudnet.GHN("ghn2", width=8).save(path)
    return path


def test_weights_load_as_a_state_dict(nets: Path, ghn: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = tmp_path / "weights.safetensors"
    result = run("predict-arch", f"{nets}:good", "--checkpoint", ghn, "-o", path, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)  # what the user's file prints is not in it
    assert "noise of the file" in result.stderr and "noise of the factory" in result.stderr
    assert (found["tensors"], found["left_out"]) == (6, [])
    network = make_network(f"{nets}:good")
    weights = load_file(path)
    expected = pudnet.GHN.load(ghn).generate(network)
    assert list(expected) == [name for name, _ in network.named_parameters()]
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert found["parameters"] == sum(weight.numel() for weight in weights.values())
    assert network.load_state_dict(weights, strict=False).unexpected_keys == []


def test_the_bundled_ghn_is_the_default(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = tmp_path / "weights.safetensors"
    result = run("predict-arch", "test-3", "-o", path, "--json")
    assert result.exit_code == 0, result.stderr
    ghn = pudnet.GHN.from_pretrained("ghn2-fashion")
    expected, weights = ghn.generate(make_network("test-3")), load_file(path)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    recipe = read_config(PRETRAINED / "ghn2-fashion.toml").to_dict()
    made = GHNTrainingConfig.from_dict(ghn.card["training"]).to_dict()  # settings added since then have their defaults
    assert {**made, "run": None} == {**recipe, "run": None}


def test_parameters_without_use_are_left_out_on_request(nets: Path, ghn: Path, tmp_path: Path) -> None:
    arguments = ("predict-arch", f"{nets}:spare", "--checkpoint", ghn, "-o", tmp_path / "weights")
    assert_bad_input(run(*arguments), "extra.weight")
    result = run(*arguments, "--partial", "--json")
    assert json.loads(result.stdout)["left_out"] == ["extra.weight", "extra.bias"]


def test_presets_and_random_architectures(ghn: Path, tmp_path: Path) -> None:
    for name in ("vit", "convnet3", "test-3"):
        path = tmp_path / f"{name}.svg"
        result = run("graph", name, "-o", path, "--json")
        assert result.exit_code == 0, result.stderr
        found = json.loads(result.stdout)
        drawn = ElementTree.parse(path).getroot()
        titles = [element for element in drawn.iter() if element.tag.endswith("title")]
        assert len(titles) == found["nodes"] == sum(found["operations"].values())
    result = run("predict-arch", "resnet18", "--checkpoint", ghn, "-o", tmp_path / "weights")
    assert result.exit_code == 0 and "parameters" in result.stdout and str(tmp_path) in result.stdout


def test_the_input_decides_about_the_network(tmp_path: Path) -> None:
    def parameters(size: str) -> int:
        result = run("graph", "vit", "-o", tmp_path / "graph.svg", "--input", size, "--json")
        count = json.loads(result.stdout)["parameters"]
        assert isinstance(count, int)
        return count

    assert parameters("3X64x64") - parameters("3x32x32") == 128 * 3 * (8**2 - 4**2)  # its patches grow with the image


def assert_bad_input(result: Result, *words: str) -> None:
    """One readable line at the end of stderr, exit code 2."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.strip().splitlines() if "noise" not in line]
    assert len(lines) == 1 and lines[0].startswith("pudnet: "), result.stderr
    for word in words:
        assert word in lines[0], lines[0]


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ("{folder}/absent.py:good", ["absent.py", "existing"]),
        ("{folder}:good", ["existing"]),
        ("{folder}/notes.txt:good", ["ends in .py"]),
        ("{folder}/broken.py:good", ["ModuleNotFoundError", "nothing_of_this_name", "running it"]),
        ("{folder}/nets.py:absent", ["nets.py", "'absent'"]),
        ("{folder}/nets.py:raising", ["RuntimeError", "calling raising()", "out of ideas"]),
        ("{folder}/nets.py:leaving", ["SystemExit"]),
        ("{folder}/nets.py:wants", ["TypeError", "argument"]),
        ("{folder}/nets.py:number", ["a int", "torch.nn.Module"]),
        ("{folder}/nets.py:text", ["a str"]),
        ("{folder}/nets.py:Net.good", ["FILE.py:factory"]),
        ("{folder}/nets.py", ["FILE.py:factory", "resnet50"]),
        ("{folder}/nets.py:unknown", ["fft"]),
        ("resnet51", ["FILE.py:factory", "'resnet51'"]),
        ("test-500", ["'test'"]),
        ("", ["FILE.py:factory"]),
    ],
)
@pytest.mark.parametrize("command", ["graph", "predict-arch"])
def test_networks_that_cannot_be_made(
    command: str, network: str, words: list[str], nets: Path, ghn: Path, tmp_path: Path
) -> None:
    more: list[Any] = ["--checkpoint", ghn] if command == "predict-arch" else []
    before = list(sys.path), set(sys.modules)
    result = run(command, network.format(folder=nets.parent), "-o", tmp_path / "out", *more)
    assert_bad_input(result, *words)
    assert list(tmp_path.iterdir()) == []
    assert sys.path == before[0] and not any(name.startswith("_pudnet_user") for name in sys.modules)


@pytest.mark.parametrize("text", ["3x0x32", "3x32x", "threex32", "3,32,32", "-3x32x32", "²x3", "3x9999999"])
def test_sizes_that_are_none(text: str, nets: Path, ghn: Path, tmp_path: Path) -> None:
    for command, more in (("graph", []), ("predict-arch", ["--checkpoint", ghn])):
        assert_bad_input(run(command, "vit", "-o", tmp_path / "out", "--input", text, *more), "--input", "3x32x32")


def test_checkpoints_and_outputs_that_do_not_fit(ghn: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    pudnet.PudNet("convnet3", image_size=16, width=8, generator_width=2).save(other)
    start = ("predict-arch", "convnet3", "-o")
    assert_bad_input(run(*start, tmp_path / "w", "--checkpoint", other), "ghn")
    assert_bad_input(run(*start, tmp_path / "w", "--checkpoint", tmp_path / "none.safetensors"), "none.safetensors")
    assert_bad_input(run(*start, tmp_path, "--checkpoint", ghn), "folder")
    assert_bad_input(run(*start, tmp_path / "no" / "w", "--checkpoint", ghn), "folder that exists")
    assert_bad_input(run("graph", "convnet3", "-o", tmp_path / "no" / "g.svg"), "folder that exists")
    assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]


@pytest.mark.parametrize("command", ["graph", "predict-arch"])
def test_help_warns_that_the_file_is_run(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    text = " ".join(result.stdout.replace("│", " ").split())
    assert "the file is imported, so its code is run" in text
    assert f"pudnet {command}" in text.partition("Example:")[2]


def test_interrupt(nets: Path, ghn: Path, tmp_path: Path) -> None:
    """Ctrl-C while the user's file runs: exit code 130, nothing left behind."""
    (tmp_path / "stop.py").write_text("raise KeyboardInterrupt\n")
    command = [sys.executable, "-m", "pudnet", "graph", f"{tmp_path}/stop.py:net", "-o", str(tmp_path / "out.svg")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "pudnet: interrupted\n")
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ""] == ["stop.py"]
