"""Checkpoints: safetensors with one JSON object in the header; never pickle, never a config guessed from shapes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pudnet._version import __version__
from pudnet.errors import CheckpointError, InputError, message, one_line
from pudnet.files import open_tensors, write_tensors

FORMAT_VERSION = 2
OWN_PREFIX = "pudnet."  # of tensors that are not the network's own, in the file of a model
HEADER_KEY = "pudnet"
PRETRAINED = Path(__file__).parent / "pretrained"
HUB_FILE = "predictor.safetensors"
READERS = {  # kind -> what reads it
    "predictor": "pudnet.Predictor.from_pretrained",
    "ghn": "pudnet.GHN.from_pretrained",
    "model": "pudnet.load",
}


def save(path: str | os.PathLike[str], kind: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors`` and ``config`` (JSON-able) to ``path`` in one atomic step.

    Args:
        kind: what the file holds (``"predictor"``, ``"model"``, ``"training"``, ...); ``load`` asks for it again.

    Raises:
        InputError: the path cannot be written, or the disk is full.
    """
    header = {"format": FORMAT_VERSION, "kind": kind, "version": __version__, "config": dict(config)}
    # Copies, as safetensors refuses tensors that share memory: tied parameters, views.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    write_tensors(path, copies, HEADER_KEY, header, "checkpoint.save")


def load(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what ``save`` wrote; returns ``(config, tensors)``. Memory is bounded by the size of the file.

    Raises:
        InputError: there is no such file, or it may not be read.
        CheckpointError: the file is truncated, of another version or kind, or not ours.
    """
    where = "checkpoint.load"
    with open_tensors(path, HEADER_KEY, where) as (header, tensors):
        if not isinstance(header.get("config"), dict):
            raise CheckpointError(message(where, "path", "a file written by pudnet", repr(str(path))))
        written = header.get("format")
        if type(written) is not int or written not in (*MIGRATIONS, FORMAT_VERSION):
            got = f"format {written!r} in {str(path)!r}, written by pudnet {header.get('version')}"
            hint = f"This is pudnet {__version__}; install the version that wrote the file."
            raise CheckpointError(message(where, "format", f"from {min(MIGRATIONS)} to {FORMAT_VERSION}", got, hint))
        if header.get("kind") != kind:
            got = f"a {header.get('kind')!r} file, {str(path)!r}"
            reader = READERS.get(str(header.get("kind")))
            hint = f"Read it with {reader}." if reader else ""
            raise CheckpointError(message(where, "path", f"a {kind!r} file", got, hint))
        config, found = header["config"], tensors()
        for version in range(written, FORMAT_VERSION):
            config, found = MIGRATIONS[version](kind, config, found)
        return config, found


Content = tuple[dict[str, Any], dict[str, Tensor]]


def _plain_names(kind: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> Content:
    """Format 1 -> 2: in the file of a model the network's tensors have their own names."""
    if kind != "model":
        return config, tensors
    plain = {name.removeprefix("network."): x for name, x in tensors.items() if name.startswith("network.")}
    rest = {f"{OWN_PREFIX}{name}": x for name, x in tensors.items() if not name.startswith("network.")}
    return config, plain | rest


# Format -> what brings a file's (kind, config, tensors) to the next format. A change of the format adds one.
MIGRATIONS: dict[int, Callable[[str, dict[str, Any], dict[str, Tensor]], Content]] = {1: _plain_names}


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules made in this block have shapes and no values (they are on the meta device); ``fill`` gives them some."""
    with _ShapesOnly(), torch.device("meta"):
        yield


class _ShapesOnly(TorchFunctionMode):
    """Leaves out drawing and scaling of initial values: on the meta device they would import torch's compiler (8 s)."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.normal_, Tensor.mul, Tensor.div, Tensor.__mul__, Tensor.__truediv__):
            return args[0]
        return (torch.empty if func is torch.randn else func)(*args, **(kwargs or {}))


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load ``tensors`` into a module that was made ``without_memory``, in whole or in part.

    Memory is taken only when names and shapes are those of the module: what a file claims about sizes costs nothing
    until the file is seen to hold as much.

    Raises:
        CheckpointError: names or shapes differ, or numbers are not of the same kind (another precision is).
    """
    where, expected = "checkpoint.fill", module.state_dict()
    wrong = sorted(expected.keys() ^ tensors.keys())
    wrong += [name for name in expected if name in tensors and not _fits(tensors[name], expected[name])]
    if wrong:
        rule = f"the {len(expected)} tensors of a {type(module).__name__}"
        got = ", ".join(
            f"{tensors[name].dtype} {list(tensors[name].shape)} at {name!r}" if name in tensors else f"no {name!r}"
            for name in wrong[:3]
        )
        raise CheckpointError(message(where, "tensors", rule, got))
    made: dict[int, Tensor] = {}  # what two layers share stays shared
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor.is_meta:
                    held[name] = made.setdefault(id(tensor), _like(tensor))  # type: ignore[assignment]
    module.load_state_dict(dict(tensors))


def _fits(tensor: Tensor, place: Tensor) -> bool:
    kinds = tensor.is_floating_point(), tensor.is_complex()
    return tensor.shape == place.shape and kinds == (place.is_floating_point(), place.is_complex())


def _like(tensor: Tensor) -> Tensor:
    """Memory on the CPU for a tensor or parameter of the meta device."""
    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def list_pretrained() -> list[str]:
    """Names of the bundled hypernetworks, for ``from_pretrained`` of ``Predictor`` and ``GHN`` (those with ``ghn``)."""
    return sorted(path.stem for path in PRETRAINED.glob("*.safetensors"))


class HubOptions(TypedDict, total=False):
    """What ``huggingface_hub.hf_hub_download`` may be told."""

    revision: str | None
    cache_dir: str | Path | None
    force_download: bool
    local_files_only: bool
    token: str | bool | None


def find(name: str | os.PathLike[str], where: str, file: str = HUB_FILE, **hub: Unpack[HubOptions]) -> Path:
    """The file behind a path, a bundled name or a Hub id, tried in this order.

    Args:
        name: what is looked for; in a folder or repository, ``file``.
        where: who says that there is none.
        hub: for a Hub id. Without network, what is in the cache is found.

    Raises:
        InputError: there is none.
    """
    text = os.fspath(name)
    path = Path(text)
    if path.is_dir() and (path / file).is_file():
        return path / file
    if path.is_file():
        return path
    known = list_pretrained() if file == HUB_FILE else []
    if text in known:
        return PRETRAINED / f"{text}.safetensors"
    bundled = ", ".join(known) or "none"
    if path.is_dir() or path.suffix == ".safetensors" or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text):
        rule = f"an existing file, a bundled name ({bundled}) or a Hub id (owner/name)"
        raise InputError(message(where, "name", rule, repr(text)))
    return _download(text, file, where, f"an existing file, a bundled name ({bundled}) or a Hub id with {file}", hub)


def _download(repository: str, file: str, where: str, rule: str, hub: HubOptions) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        hint = "For a Hub id, type: pip install huggingface_hub"
        raise InputError(message(where, "name", rule, repr(repository), hint)) from error
    try:
        return Path(hf_hub_download(repository, file, **hub))
    except Exception as error:  # its errors share no base class: HTTP, missing repository or file, no network
        version = f" at {hub['revision']!r}" if hub.get("revision") else ""
        got = f"{repository!r}{version} ({type(error).__name__}: {one_line(error)})"
        raise InputError(message(where, "name", rule, got)) from error
