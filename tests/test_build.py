"""setup.py: what it decides to build, what it says, and what ends up in sdist and wheel."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import setuptools

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module that sets nothing up, on a machine with a compiler and nvcc."""
    monkeypatch.setattr(setuptools, "setup", lambda **keywords: None)
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    spec = importlib.util.spec_from_file_location("recipe", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "recipe", module)  # its dataclass looks there
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "find_compiler", lambda: "c++")
    monkeypatch.setattr(module, "find_nvcc", lambda: "/cuda/bin/nvcc")
    monkeypatch.delenv("PUDNET_BUILD", raising=False)
    return module


@pytest.mark.parametrize(
    ("asked", "compiler", "nvcc", "target"),
    [
        ("auto", "c++", "nvcc", "cuda"),
        ("", "c++", "nvcc", "cuda"),
        ("auto", "c++", "", "cpu"),
        ("auto", "", "nvcc", "none"),
        ("cpu", "c++", "nvcc", "cpu"),
        ("cuda", "c++", "nvcc", "cuda"),
        ("none", "c++", "nvcc", "none"),
    ],
)
def test_plan(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, asked: str, compiler: str, nvcc: str, target: str
) -> None:
    monkeypatch.setattr(recipe, "find_compiler", lambda: compiler)
    monkeypatch.setattr(recipe, "find_nvcc", lambda: nvcc)
    monkeypatch.setenv("PUDNET_BUILD", asked)
    plan = recipe.make_plan()
    assert plan.target == target
    assert plan.reason


@pytest.mark.parametrize(
    ("asked", "missing", "text"),
    [
        ("cuda", "find_nvcc", "CUDA_HOME=/usr/local/cuda PUDNET_BUILD=cuda pip install ."),
        ("cuda", "find_compiler", "PUDNET_BUILD=none pip install ."),
        ("cpu", "find_compiler", "apt-get install"),
        ("gpu", "", "PUDNET_BUILD must be one of auto, cpu, cuda, none; got 'gpu'"),
    ],
)
def test_what_cannot_be_built_says_what_to_type(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, asked: str, missing: str, text: str
) -> None:
    if missing:
        monkeypatch.setattr(recipe, missing, lambda: "")
    monkeypatch.setenv("PUDNET_BUILD", asked)
    with pytest.raises(SystemExit, match=text):
        recipe.make_plan()


def test_without_a_compiler_it_says_so(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "find_compiler", lambda: "")
    assert "no C++ compiler was found; pudnet works without the extension" in recipe.make_plan().reason


def test_paths_with_spaces_survive(recipe: ModuleType) -> None:
    assert recipe.escape("/a b/c:d$e") == "/a$ b/c$:d$$e"
    assert recipe.arguments(['-DX="1"', "-I/a b"]) == """'-DX="1"' '-I/a b'"""


def test_torch_is_no_build_requirement() -> None:
    head = (ROOT / "pyproject.toml").read_text().split("[project]")[0]
    assert "torch" not in "".join(line for line in head.splitlines() if not line.startswith("#"))


def build(source: Path, kind: str, out: Path) -> list[Path]:
    """Run ``python -m build`` for one kind of distribution without the extension's CUDA part."""
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(out)]
    environment = os.environ | {"PUDNET_BUILD": kind, "MAX_JOBS": "1"}
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted(out.iterdir())


@pytest.fixture(scope="module")
def unpacked_sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources as a user of the sdist has them: nothing that git or the working tree adds."""
    folder = tmp_path_factory.mktemp("sdist")
    tree = folder / "tree with a space"
    ignore = shutil.ignore_patterns(".git", "build", "runs", "*.so", "*.egg-info", ".*_cache", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=ignore)
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(folder)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder)
    (unpacked,) = (path for path in folder.iterdir() if path.is_dir() and path != tree)
    for name in ("csrc/module.cpp", "csrc/dataset_stats.cu", "csrc/device.cuh", "kernels/__init__.py", "LICENSE"):
        assert (unpacked / name).exists(), f"{name} is missing from the sdist"
    return unpacked


@pytest.mark.slow
def test_wheel_from_sdist_works_elsewhere(unpacked_sdist: Path, tmp_path: Path) -> None:
    (wheel,) = build(unpacked_sdist, "cpu", tmp_path / "wheels")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"pudnet"}, "no top-level `kernels` or `csrc`"
    assert "pudnet/kernels/__init__.py" in names
    assert "pudnet/py.typed" in names
    assert [name for name in names if name.endswith(".so") and name.startswith("pudnet/_C.")]
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".h", ".pyc")) or "__pycache__" in name]
    shipped = {name.removeprefix("pudnet/pretrained/") for name in names if name.startswith("pudnet/pretrained/")}
    kept = {
        path.name for suffix in ("safetensors", "md", "toml") for path in ROOT.glob(f"pudnet/pretrained/*.{suffix}")
    }
    assert kept <= shipped

    # Installed elsewhere and started from elsewhere, the extension answers; -I keeps the checkout out of the way.
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    script = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import torch, pudnet, pudnet.kernels\n"
        "from pudnet import ops, _extension\n"
        f"assert pudnet.__file__.startswith({str(site)!r}), pudnet.__file__\n"
        "assert not _extension.why_not(), _extension.why_not()\n"
        "assert _extension.load().build_info()['cuda'] is None\n"
        "stats = ops.class_stats(torch.eye(3), torch.tensor([0, 1, 1]), 2, backend='native')\n"
        "assert stats.counts.tolist() == [1, 2], stats\n"
    )
    subprocess.run([sys.executable, "-I", "-c", script], check=True, cwd=tmp_path)


@pytest.mark.slow
def test_wheel_without_the_extension_is_complete(unpacked_sdist: Path, tmp_path: Path) -> None:
    (wheel,) = build(unpacked_sdist, "none", tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "pudnet/ops/reference.py" in names
    assert not [name for name in names if name.endswith(".so")]
