"""A missing, stale or foreign ``pudnet._C`` is one readable sentence, and importing pudnet touches none of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import pudnet
from pudnet import _extension, backends, ops
from pudnet.errors import BackendUnavailableError


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Forget what was learned about the extension, before and after."""
    for cache in (_extension._attempt, backends._backend_reasons):
        cache.cache_clear()
    yield
    for cache in (_extension._attempt, backends._backend_reasons):
        cache.cache_clear()


def stub(**info: object) -> ModuleType:
    module = ModuleType("pudnet._C")
    module.__file__ = "/somewhere/_C.so"
    module.build_info = lambda: info  # type: ignore[attr-defined]
    return module


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder, the only place where submodules of pudnet are looked for."""
    monkeypatch.delitem(sys.modules, "pudnet._C", raising=False)
    monkeypatch.delattr(pudnet, "_C", raising=False)
    monkeypatch.setattr(pudnet, "__path__", [str(tmp_path)])
    # The finder of an editable install knows the checkout whatever __path__ says.
    finders = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
    monkeypatch.setattr(sys, "meta_path", finders)
    return tmp_path


def sentence() -> str:
    """The one reason given, which the package survives."""
    (reason,) = _extension.why_not()
    assert "\n" not in reason
    with pytest.raises(BackendUnavailableError) as caught:
        _extension.load()
    assert str(caught.value) == reason
    labels = torch.tensor([0, 1])
    assert ops.class_stats(torch.ones(2, 3), labels, 2).counts.tolist() == [1, 1]
    with pytest.raises(BackendUnavailableError, match="native: "):
        ops.class_stats(torch.ones(2, 3), labels, 2, backend="native")
    return reason


def test_missing(installed: Path) -> None:
    assert "installed without its extension" in sentence()
    assert str(installed) in sentence()


def test_built_for_another_python(installed: Path) -> None:
    (installed / "_C.cpython-37m-x86_64-linux-gnu.so").touch()
    assert "was built for cpython-37m-x86_64-linux-gnu and this Python is " in sentence()


def test_not_a_library(installed: Path) -> None:
    (installed / "_C.abi3.so").write_bytes(b"half a file")
    assert sentence().startswith("pudnet._C does not load: ")


@pytest.mark.parametrize(("version", "interface"), [("0.0.1", _extension.INTERFACE), (pudnet.__version__, -1)])
def test_stale(monkeypatch: pytest.MonkeyPatch, version: str, interface: int) -> None:
    monkeypatch.setitem(sys.modules, "pudnet._C", stub(version=version, interface=interface))
    text = sentence()
    assert f"was built for pudnet {version} (interface {interface})" in text
    assert f"this is pudnet {pudnet.__version__} (interface {_extension.INTERFACE})" in text


def test_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pudnet._C", ModuleType("pudnet._C"))
    assert "is not pudnet's extension" in sentence()
    _extension._attempt.cache_clear()
    backends._backend_reasons.cache_clear()
    monkeypatch.setitem(sys.modules, "pudnet._C", stub(compiler="another"))
    assert "found at /somewhere/_C.so is not pudnet's extension" in sentence()


def test_import_is_light() -> None:
    """Neither Triton, the extension nor what only commands need; importing the ops adds nothing to that."""
    heavy = ["triton", "pudnet._C", "PIL", "typer", "rich", "matplotlib", "safetensors", "huggingface_hub", "sklearn"]
    script = (
        "import sys, pudnet, pudnet.ops, pudnet.backends\n"
        f"heavy = [name for name in {heavy!r} if name in sys.modules]\n"
        "assert not heavy, heavy\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
