"""Which implementation of an op runs: names, probes that give reasons, and one selection for all ops.

Every op has a ``reference`` (plain PyTorch, which defines the op) and with it ``compiled`` (``torch.compile`` of the
reference); it may have ``triton`` (kernels/) and ``native`` (csrc/, CPU or CUDA by the tensor's device).

Order of authority: the argument ``backend=`` of the op, then ``with use_backend(...)``, then the environment variable
``PUDNET_BACKEND``, then automatic: the first of ``AUTOMATIC`` that no probe objects to. A backend named by any of the
first three never gives way to another one: if it cannot run the call, BackendUnavailableError tells what each backend
lacks.

To add an implementation: ``register(op, backend, run, why_not)`` in ``pudnet/ops/<op>.py``. Probes return a list of
plain-language reasons, look only at device, dtype and shape, and never raise.

Inside ``torch.compile`` the choice is made while tracing and stays as it was then.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from pudnet import _extension
from pudnet.errors import BackendUnavailableError, InputError, message

BACKENDS = ("reference", "compiled", "triton", "native")
# By device type; any other takes that of "cpu". `compiled` runs on the CPU by name only: its first call can take 25 s.
AUTOMATIC = {"cpu": ("native", "reference"), "cuda": ("triton", "native", "compiled", "reference")}

Run = Callable[..., Any]
Probe = Callable[..., list[str]]

_logger = logging.getLogger("pudnet")
# What use_backend asks for: op name -> backend; the key "" stands for every op.
_asked: ContextVar[dict[str, str] | None] = ContextVar("pudnet_backend", default=None)
_announced: set[tuple[str, str, str]] = set()
_record: ContextVar[dict[str, str] | None] = ContextVar("pudnet_backend_record", default=None)


@dataclass(frozen=True)
class Implementation:
    """One op on one backend: what runs, on which device types, and the probe of a single call."""

    run: Run
    devices: tuple[str, ...] | None  # None: any
    why_not: Probe


_implementations: dict[str, dict[str, Implementation]] = {}


def _no_objection(*arguments: object) -> list[str]:
    return []


def register_op(op: str, reference: Run) -> None:
    """Make ``op`` known by its reference, and ``compiled`` with it."""

    @functools.cache
    def build() -> Run:
        return torch.compile(reference)

    def compiled(*arguments: Any) -> Any:
        # Somebody else's torch.compile is at work already: it takes the reference as it is.
        return reference(*arguments) if torch.compiler.is_compiling() else build()(*arguments)

    _implementations[op] = {
        "reference": Implementation(reference, None, _no_objection),
        "compiled": Implementation(compiled, None, _no_objection),
    }


def register(op: str, backend: str, run: Run, *, devices: tuple[str, ...], why_not: Probe = _no_objection) -> None:
    """Add the implementation of ``op`` on ``backend``.

    Args:
        op: an op known by ``register_op``.
        backend: one of ``BACKENDS``.
        run: takes what the reference takes, returns what it returns.
        devices: device types of the tensors it accepts.
        why_not: probe of one call: the same arguments -> reasons not to run it, empty when it can run.
    """
    _implementations[op][_backend_name("register", backend)] = Implementation(run, devices, why_not)


def call(op: str, device: torch.device, backend: str | None, *arguments: Any) -> Any:
    """Run ``op`` on the backend that the order of authority gives; ``device`` is that of its tensors.

    Raises:
        BackendUnavailableError: the backend asked for by name cannot run this call.
        InputError: no backend has that name.
    """
    named, candidates = _candidates(op, device.type, device.index, backend)
    table = _implementations[op]
    for name, reasons in candidates:
        if name == "compiled" and not named and torch.compiler.is_compiling():
            continue
        if not reasons and not _call_reasons(table[name], arguments):
            if not torch.compiler.is_compiling():
                _announce(op, name, device.type)
                if (record := _record.get()) is not None:
                    record[op] = name
            return table[name].run(*arguments)
    raise BackendUnavailableError(_refusal(op, candidates[0][0], device, arguments))


@contextmanager
def use_backend(name: str, *ops: str) -> Iterator[None]:
    """Within the block, run the named ops (without names: every op) on backend ``name``, in this thread or task only.

    ``use_backend("automatic")`` takes back what an outer block or ``PUDNET_BACKEND`` asked for.

    Raises:
        InputError: no backend or no op has that name.
    """
    _backend_name("use_backend", name)
    _require_ops("use_backend", ops)
    outer = _asked.get() or {}
    token = _asked.set({**outer, **dict.fromkeys(ops, name)} if ops else {"": name})
    try:
        yield
    finally:
        _asked.reset(token)


@contextmanager
def recording() -> Iterator[dict[str, str]]:
    """Within the block, note which backend ran each op in this thread or task: op -> backend."""
    ran: dict[str, str] = {}
    token = _record.set(ran)
    try:
        yield ran
    finally:
        _record.reset(token)


def explain(device: str | torch.device = "cpu") -> dict[str, dict[str, list[str]]]:
    """For tensors on ``device``: op -> backend -> reasons why it cannot run, empty where it can."""
    importlib.import_module("pudnet.ops")  # The ops register themselves when they are imported.
    device = torch.device(device)
    return {
        op: {name: list(_standing_reasons(op, name, device.type, device.index)) for name in BACKENDS}
        for op in sorted(_implementations)
    }


def why_not_reference(device_type: str, index: int | None) -> list[str]:
    """The reference runs wherever PyTorch does."""
    return []


def why_not_compiled(device_type: str, index: int | None) -> list[str]:
    """``torch.compile`` needs a C++ compiler for CPU tensors and Triton for CUDA tensors."""
    if device_type == "cuda":
        return [] if importlib.util.find_spec("triton") else ["torch.compile needs Triton for CUDA tensors"]
    compiler = os.environ.get("CXX", "g++")
    return [] if shutil.which(compiler) else [f"torch.compile needs a C++ compiler, and {compiler} was not found"]


def why_not_triton(device_type: str, index: int | None) -> list[str]:
    """Triton must be installed, and needs a GPU it supports or its interpreter."""
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("Triton is not installed: pip install triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return reasons
    if device_type != "cuda":
        reasons.append(f"Triton kernels run on CUDA tensors; these are on {device_type}")
    elif not torch.cuda.is_available():
        reasons.append("no CUDA device is available")
    elif torch.cuda.get_device_capability(index) < (8, 0):
        reasons.append(f"Triton kernels need compute capability 8.0; {torch.cuda.get_device_name(index)} has less")
    return reasons


def why_not_native(device_type: str, index: int | None) -> list[str]:
    """The extension must load and, for CUDA tensors, have code for this GPU and a driver new enough."""
    reasons = _extension.why_not()
    if reasons or device_type != "cuda":
        return reasons
    module = _extension.load()
    info = module.build_info()
    if info["cuda"] is None:
        return ["this pudnet._C was built without CUDA"]
    if not torch.cuda.is_available():
        return ["no CUDA device is available"]
    driver, needed = module.cuda_driver_version() // 1000, int(info["cuda"].split(".")[0])
    if driver < needed:
        reasons.append(f"pudnet._C needs a driver for CUDA {needed}; the installed one is for CUDA {driver}")
    major, minor = torch.cuda.get_device_capability(index)
    names = info["cuda_architectures"].split()
    built = [divmod(int(name.removeprefix("sm_")), 10) for name in names if name.startswith("sm_")]
    portable = max(built)  # also there as PTX, which later GPUs compile for themselves
    if not any(a == major and b <= minor for a, b in built) and (major, minor) < portable:
        reasons.append(f"pudnet._C has code for {', '.join(names)}; this GPU is sm_{major}{minor}")
    return reasons


_PROBES = {
    "reference": why_not_reference,
    "compiled": why_not_compiled,
    "triton": why_not_triton,
    "native": why_not_native,
}


@functools.cache
def _backend_reasons(backend: str, device_type: str, index: int | None) -> tuple[str, ...]:
    """What keeps a backend from running anything on a device; asked once, since nothing of it changes in a process."""
    try:
        return tuple(_PROBES[backend](device_type, index))
    except Exception as error:  # a probe answers, whatever the machine is like
        return (f"its probe failed: {error!r}",)


def _standing_reasons(op: str, backend: str, device_type: str, index: int | None) -> tuple[str, ...]:
    """What keeps a backend from running ``op`` on a device, whatever the arguments."""
    found = _implementations[op].get(backend)
    if found is None:
        return (f"{op} has no {backend} implementation",)
    if found.devices is not None and device_type not in found.devices:
        return (f"{backend} {op} runs on {' and '.join(found.devices)} tensors; these are on {device_type}",)
    return _backend_reasons(backend, device_type, index)


def _candidates(
    op: str, device_type: str, index: int | None, backend: str | None
) -> tuple[bool, tuple[tuple[str, tuple[str, ...]], ...]]:
    """(whether a backend was asked for by name, the backends to try in order with their standing reasons)."""
    name = _requested(op, backend)
    order = AUTOMATIC.get(device_type, AUTOMATIC["cpu"]) if name == "automatic" else (name,)
    return name != "automatic", tuple((each, _standing_reasons(op, each, device_type, index)) for each in order)


# Context variables, the environment and the loading of the extension cannot be traced. This is what
# torch.compiler.assume_constant_result does; calling that would import torch._dynamo, which takes seconds.
_candidates._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _requested(op: str, backend: str | None) -> str:
    """The backend asked for, by the order of authority; ``"automatic"`` when nobody asked."""
    if backend is not None:
        return _backend_name(op, backend)
    for asked in (_asked.get() or {}, _asked_by_environment()):
        if op in asked or "" in asked:
            return asked.get(op) or asked[""]
    return "automatic"


def _asked_by_environment() -> dict[str, str]:
    """``PUDNET_BACKEND``: one backend for every op, or ``op=backend`` pairs separated by commas."""
    asked: dict[str, str] = {}
    for part in filter(None, os.environ.get("PUDNET_BACKEND", "").split(",")):
        op, _, name = part.strip().rpartition("=")
        _require_ops("PUDNET_BACKEND", (op,) if op else ())
        asked[op] = _backend_name("PUDNET_BACKEND", name)
    return asked


def _backend_name(where: str, name: str) -> str:
    if name not in (*BACKENDS, "automatic"):
        raise InputError(message(where, "backend", f"one of {[*BACKENDS, 'automatic']}", repr(name)))
    return name


def _require_ops(where: str, ops: tuple[str, ...]) -> None:
    if not ops:
        return
    importlib.import_module("pudnet.ops")  # The ops register themselves when they are imported.
    for op in ops:
        if op not in _implementations:
            raise InputError(message(where, "op", f"one of {sorted(_implementations)}", repr(op)))


def _call_reasons(implementation: Implementation, arguments: tuple[Any, ...]) -> list[str]:
    """What keeps an implementation from running one call."""
    try:
        return implementation.why_not(*arguments)
    except Exception as error:  # a probe answers, whatever the arguments are
        return [f"its probe failed: {error!r}"]


def _announce(op: str, name: str, device_type: str) -> None:
    """Log a choice once."""
    if (op, name, device_type) not in _announced:
        _announced.add((op, name, device_type))
        _logger.info("%s runs on the %s backend for %s tensors", op, name, device_type)


def _refusal(op: str, asked: str, device: torch.device, arguments: tuple[Any, ...]) -> str:
    """The message of BackendUnavailableError: what was asked for, and what every backend says to this call."""
    lines = [f"{op}: the backend {asked!r} was asked for and cannot run this call. Each backend's answer:"]
    for name in BACKENDS:
        reasons = list(_standing_reasons(op, name, device.type, device.index))
        if not reasons:
            reasons = _call_reasons(_implementations[op][name], arguments)
        lines.append(f"  {name}: {'; '.join(reasons) or 'can run it'}")
    return "\n".join(lines)
