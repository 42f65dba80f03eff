"""The parts of the package depend on each other in one direction, as docs/design.md states it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE, KERNELS = ROOT / "pudnet", ROOT / "kernels"
BASE = {"errors", "files", "memory", "_version"}
OPS = {"ops", "backends", "_extension", "specs"} | BASE
DATA = {"data", "sketch"} | BASE | {"ops"}
MODELS = {
    *("nn", "models", "bind", "targets", "graphs", "checkpoint", "hub", "batchnorm"),
    *("directions", "features", "heads"),
    *OPS,
    *DATA,
}
USERS = {
    "predictor",
    "predicted",
    "stages",
    "export",
    "provenance",
    "serving",
    "shards",
    "optimised",
    "heads",
    "features",
    "directions",
    "descent",
    "familiarity",
    "finetuning",
    "training",
    "evaluation",
    "interop",
    "demo",
    "info",
} | MODELS

# Each part of pudnet/ (a module, or a folder and all in it), and the parts it may import.
ALLOWED = {
    "errors": set(),
    "memory": set(),
    "_version": set(),
    "files": {"errors"},
    "specs": {"errors"},
    "_extension": {"errors", "_version"},
    "backends": {"errors", "_extension"},
    "ops": OPS | {"kernels"},
    "nn": {"ops", "specs", "errors", "graphs"},
    "bind": {"specs", "errors"},
    "targets": {"errors"},
    "graphs": {"targets"} | BASE,
    "checkpoint": BASE,
    "hub": {"checkpoint"} | BASE,
    "export": {"checkpoint", "data"} | BASE,
    "provenance": {"sketch"} | BASE,
    "data": {"ops"} | BASE,
    "sketch": {"data", "ops"} | BASE,
    "features": {"errors"},
    "directions": {"ops", "errors", "features", "heads"},
    "familiarity": {"errors"},
    "heads": {"features", "ops", "errors"},
    "batchnorm": {"errors"},
    "models": MODELS,
    "optimised": MODELS,
    "interop": MODELS,
    "serving": {"data", "errors"},
    "stages": {"serving", "data"},
    "predicted": {
        *("batchnorm", "checkpoint", "data", "errors", "export", "features", "heads"),
        *("hub", "provenance", "serving", "sketch", "stages", "targets"),
    },
    "descent": {"data", "errors"},
    "finetuning": {
        *("predicted", "batchnorm", "checkpoint", "data", "descent", "errors", "features", "heads"),
        *("provenance", "serving"),
    },
    "shards": {"predictor", "predicted", "stages", "heads", "serving", "sketch", "data", "errors"},
    "predictor": USERS - {"training", "evaluation", "demo"},
    "training": USERS - {"evaluation", "demo"},
    "evaluation": USERS - {"training"},
    "demo": USERS - {"training"},
    "report": USERS - {"training", "demo"},
    "info": OPS | {"data"},
    "cli": USERS | {"cli", "report"},
    "__main__": {"cli"},
}

# What is not as stated yet, each with its reason; an entry that is no longer needed fails the test.
EXCEPTIONS: set[tuple[str, str]] = set()

HEAVY = (
    "onnx",
    "onnxruntime",
    "onnxscript",
    "PIL",
    "cv2",
    "typer",
    "rich",
    "matplotlib",
    "safetensors",
    "triton",
    "huggingface_hub",
    "sklearn",
    "tensorboard",
    "jinja2",
)


def imports(path: Path) -> list[tuple[str, bool]]:
    """Full names that a file imports, and whether inside a function or for type checkers only."""
    tree = ast.parse(path.read_text())
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        or (isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in late) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: a relative import"
            # `from pudnet import checkpoint` names a part, `from pudnet.files import atomic_path` is in one.
            names = [f"pudnet.{alias.name}" for alias in node.names] if node.module == "pudnet" else [node.module]
            found += [(name, id(node) in late) for name in names]
    return found


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_part_has_a_place() -> None:
    assert {part_of(path) for path in FILES} == set(ALLOWED)


def test_imports_go_one_way() -> None:
    used, wrong = set(), []
    for path in FILES:
        part = part_of(path)
        for name, _ in imports(path):
            inner = name.split(".")[1] if name.startswith("pudnet.") else None
            if inner is None or inner == part or inner in ("_C", "__version__"):
                continue
            if (part, inner) in EXCEPTIONS:
                used.add((part, inner))
            elif inner not in ALLOWED[part]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong
    assert used == EXCEPTIONS


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.name)
def test_kernels_know_nothing_of_the_package(path: Path) -> None:
    names = [name for name, _ in imports(path) if name.startswith("pudnet.") and not name.startswith("pudnet.kernels")]
    assert names == []


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in FILES
        for name, late in imports(path)
        if not late and name.split(".")[0] in HEAVY and part_of(path) != "cli"
    ]
    assert wrong == []


def test_every_module_imports_without_heavy_packages() -> None:
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES if part_of(path) != "__main__"]
    modules = [name.removesuffix(".__init__") for name in modules if not name.startswith("pudnet.cli")]
    modules = [name for name in modules if not name.endswith("__main__")]
    script = f"""
import importlib, sys
for name in {HEAVY!r}:
    sys.modules[name] = None
for name in {modules!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
