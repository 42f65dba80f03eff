"""Compile Triton kernels ahead of time, without a GPU, and read what they need of one."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes one block can have
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Compiled:
    """What one kernel in one configuration needs on one architecture."""

    registers: int
    stack: int
    local: int
    shared: int
    sass: str


def compile_kernel(
    kernel: Any, pointers: dict[str, str], constants: dict[str, Any], architecture: int, **options: Any
) -> Compiled:
    """Compile as the JIT does for aligned pointers.

    Args:
        kernel: a JITFunction.
        pointers: type of the pointer arguments, by name without ``p_``; those not named are ``fp32``.
        constants: the constexpr arguments; every other one is an int32 that is not specialised.
        options: ``num_warps`` and the like.
    """
    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("p_"):
            signature[name] = "*" + pointers.get(name[2:], "fp32")
            attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = pointers.get(name, "i32")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _run("cuobjdump", "-sass", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(numbers["REG"], numbers["STACK"], numbers["LOCAL"], compiled.metadata.shared, sass)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def problems(compiled: Compiled, architecture: int) -> list[str]:
    """What keeps a kernel from running well, or at all; empty when nothing does."""
    found = []
    if compiled.stack:
        found.append(f"{compiled.stack} bytes of stack: registers spill")
    if compiled.local:
        found.append(f"{compiled.local} bytes of local memory")
    if compiled.shared > SHARED_LIMIT[architecture]:
        found.append(f"{compiled.shared} bytes of shared memory, more than {SHARED_LIMIT[architecture]}")
    return found
