"""What the package never does: unpickle, or write a file under its final name before it is whole."""

from __future__ import annotations

import ast
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from stress.checkpoints import good_files

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "pudnet").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])

PICKLING = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "copyreg"}
PICKLING_CALLS = {"torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "pandas.read_pickle", "yaml.load"}
WRITERS = {"write_text", "write_bytes", "save_file", "savefig", "savez", "savez_compressed", "dump", "to_csv", "tofile"}

# Writing that needs no temporary name, and why.
ALLOWED = {
    ("training/loop.py", "write"): "the log grows by a line at a time; a resumed run mends it",
    ("demo.py", "draw"): "is given the path by atomic_path",
    ("export.py", "_pt2"): "is given the path by atomic_path",
    ("report/charts.py", "svg"): "into memory",
}


def calls(node: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Call):
            yield inner, ast.unparse(inner.func)


def unsafe(tree: ast.AST) -> list[str]:
    """Imports and calls that read or write pickles, or run text as code."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in names if name.split(".")[0] in PICKLING]
    for call, name in calls(tree):
        if name in PICKLING_CALLS or name in ("eval", "exec"):
            found.append(name)
        if name in ("np.load", "numpy.load"):
            options = {option.arg: option.value for option in call.keywords}
            given = options.get("allow_pickle")
            if not (isinstance(given, ast.Constant) and given.value is False):
                found.append("np.load without allow_pickle=False")
    return found


def bare_writes(tree: ast.AST) -> list[tuple[str, str]]:
    """(function, call) of every call that writes a file outside a block of ``with atomic_path(...)``."""
    found: list[tuple[str, str]] = []

    def look(node: ast.AST, function: str, safe: bool) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = node.name
        if isinstance(node, ast.With):
            safe = safe or any("atomic_path(" in ast.unparse(item.context_expr) for item in node.items)
        if isinstance(node, ast.Call) and not safe and writes(node):
            found.append((function, ast.unparse(node.func)))
        for child in ast.iter_child_nodes(node):
            look(child, function, safe)

    look(tree, "", False)
    return found


def writes(call: ast.Call) -> bool:
    name = ast.unparse(call.func).split(".")[-1]
    if name == "open":
        values = [*call.args, *(option.value for option in call.keywords if option.arg == "mode")]
        texts = [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]
        return any(set(text) <= set("rwaxbt+") and set(text) & set("wax+") for text in texts)
    return name in WRITERS


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle_and_no_code_from_text(path: Path) -> None:
    assert unsafe(ast.parse(path.read_text())) == []


def test_files_are_written_under_a_temporary_name() -> None:
    found = {
        (path.relative_to(ROOT).as_posix().removeprefix("pudnet/"), function): call
        for path in FILES
        for function, call in bare_writes(ast.parse(path.read_text()))
    }
    assert {place: call for place, call in found.items() if place not in ALLOWED} == {}
    assert ALLOWED.keys() <= found.keys(), "an exception that is no longer needed"


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(x)",
        "np.load(x)",
        "np.load(x, allow_pickle=True)",
        "eval(x)",
    ],
)
def test_the_first_rule_finds(text: str) -> None:
    assert unsafe(ast.parse(text))


@pytest.mark.parametrize("text", ["open(p, 'w')", "p.write_text('')", "p.open(mode='ab')", "save_file(x, p)"])
def test_the_second_rule_finds(text: str) -> None:
    assert bare_writes(ast.parse(text))
    assert not bare_writes(ast.parse(f"with atomic_path(q) as p:\n    {text}"))


def test_our_files_hold_a_header_and_tensors_and_nothing_else(tmp_path: Path) -> None:
    for kind, (data, _) in good_files(tmp_path).items():
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        own = json.loads(next(iter(header.pop("__metadata__").values())))
        assert isinstance(own, dict), kind
        ends = sorted(entry["data_offsets"] for entry in header.values() if np.prod(entry["shape"]) > 0)
        assert ends[0][0] == 0 and ends[-1][1] == len(data) - 8 - size, kind
        assert all(one[1] == other[0] for one, other in itertools.pairwise(ends)), kind
