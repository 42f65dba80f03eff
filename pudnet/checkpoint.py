"""Checkpoints: safetensors with one JSON object in the header; never pickle, never a config guessed from shapes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pudnet._version import __version__
from pudnet.errors import CheckpointError, InputError, message, one_line
from pudnet.files import atomic_path

FORMAT_VERSION = 1
HEADER_KEY = "pudnet"
PRETRAINED = Path(__file__).parent / "pretrained"
HUB_FILE = "predictor.safetensors"


def save(path: str | os.PathLike[str], kind: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors`` and ``config`` (JSON-able) to ``path`` in one atomic step.

    Args:
        kind: what the file holds (``"predictor"``, ``"model"``, ``"training"``, ...); ``load`` asks for it again.

    Raises:
        InputError: the path cannot be written, or the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    header = {"format": FORMAT_VERSION, "kind": kind, "version": __version__, "config": dict(config)}
    # Copies, as safetensors refuses tensors that share memory: tied parameters, views.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    with atomic_path(path) as temporary:
        try:
            save_file(copies, temporary, metadata={HEADER_KEY: json.dumps(header)})
        except (SafetensorError, OSError) as error:
            got = f"{str(path)!r} ({error})"
            raise InputError(message("checkpoint.save", "path", "where a file can be written", got)) from error


def load(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what ``save`` wrote; returns ``(config, tensors)``.

    Raises:
        InputError: there is no such file, or it may not be read.
        CheckpointError: the file is truncated, of another version or kind, or not ours.
    """
    from safetensors import SafetensorError, safe_open

    where = "checkpoint.load"
    if not Path(path).is_file():
        raise InputError(message(where, "path", "an existing file", repr(str(path))))
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER_KEY, "null"))
            if not isinstance(header, dict) or not isinstance(header.get("config"), dict):
                raise CheckpointError(message(where, "path", "a file written by pudnet", repr(str(path))))
            if header.get("format") != FORMAT_VERSION:
                got = f"format {header.get('format')!r} in {str(path)!r}, written by pudnet {header.get('version')}"
                hint = f"This is pudnet {__version__}; install the version that wrote the file."
                raise CheckpointError(message(where, "format", f"{FORMAT_VERSION}", got, hint))
            if header.get("kind") != kind:
                got = f"a {header.get('kind')!r} file, {str(path)!r}"
                raise CheckpointError(message(where, "path", f"a {kind!r} file", got))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except OSError as error:
        raise InputError(message(where, "path", "a readable file", f"{str(path)!r} ({error})")) from error
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        got = f"{str(path)!r} ({error})"
        hint = "The file is damaged or not safetensors; get it again."
        raise CheckpointError(message(where, "path", "a whole safetensors file", got, hint)) from error
    return header["config"], tensors


def list_pretrained() -> list[str]:
    """Names of the bundled hypernetworks, for ``from_pretrained``."""
    return sorted(path.stem for path in PRETRAINED.glob("*.safetensors"))


def find(name: str | os.PathLike[str], where: str) -> Path:
    """The file behind a path, a bundled name or a Hub id, tried in this order.

    Raises:
        InputError: there is none; ``where`` is who says so.
    """
    text = os.fspath(name)
    path = Path(text)
    if path.is_dir() and (path / HUB_FILE).is_file():
        return path / HUB_FILE
    if path.is_file():
        return path
    if text in list_pretrained():
        return PRETRAINED / f"{text}.safetensors"
    bundled = ", ".join(list_pretrained()) or "none"
    if path.is_dir() or path.suffix == ".safetensors" or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text):
        rule = f"an existing file, a bundled name ({bundled}) or a Hub id (owner/name)"
        raise InputError(message(where, "name", rule, repr(text)))
    return _download(text, where, bundled)


def _download(repository: str, where: str, bundled: str) -> Path:
    rule = f"an existing file, a bundled name ({bundled}) or a Hub id with {HUB_FILE}"
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        hint = "For a Hub id, type: pip install huggingface_hub"
        raise InputError(message(where, "name", rule, repr(repository), hint)) from error
    try:
        return Path(hf_hub_download(repository, HUB_FILE))
    except Exception as error:  # its errors share no base class: HTTP, missing repository or file, no network
        got = f"{repository!r} ({type(error).__name__}: {one_line(error)})"
        raise InputError(message(where, "name", rule, got)) from error
