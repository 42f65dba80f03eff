"""Builds the optional extension ``pudnet._C`` from ``csrc/`` with pybind11 and ninja. Metadata is in pyproject.toml.

``PUDNET_BUILD`` chooses what is built:

- ``auto`` (default): CPU and CUDA when nvcc is found, the CPU alone otherwise, nothing when there is no C++ compiler.
- ``cpu`` or ``cuda``: exactly that, or an error that says what to type.
- ``none``: no extension; the package is complete without it and runs on its PyTorch reference.

``MAX_JOBS`` bounds the number of compilers that run at once; ``CXX``, ``CXXFLAGS`` and ``CUDA_HOME`` are honoured.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_ARCHITECTURES = (80, 90, 100)  # the newest one also as PTX, which later GPUs compile for themselves
BUILD_COMMANDS = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}


@dataclass(frozen=True)
class Plan:
    """What will be built, and the sentence that says why."""

    target: str  # "cuda", "cpu" or "none"
    reason: str
    cxx: str = ""
    nvcc: str = ""


def find_compiler() -> str:
    """The C++ compiler to use, or an empty string."""
    if sys.platform == "win32":
        return ""  # The build rules below speak the command line of gcc and clang only.
    asked = os.environ.get("CXX")
    if asked:
        return asked if shutil.which(shlex.split(asked)[0]) else ""
    return next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), "")


def find_nvcc() -> str:
    """Path of nvcc, or an empty string."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if variable in os.environ:
            found = shutil.which("nvcc", path=str(Path(os.environ[variable], "bin")))
            if found:
                return found
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin") or ""


def make_plan() -> Plan:
    """Decide what to build from ``PUDNET_BUILD`` and the compilers found."""
    asked = os.environ.get("PUDNET_BUILD", "auto") or "auto"
    if asked not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"pudnet: PUDNET_BUILD must be one of auto, cpu, cuda, none; got {asked!r}.")
    if asked == "none":
        return Plan("none", "PUDNET_BUILD=none")
    cxx = find_compiler()
    nvcc = "" if asked == "cpu" else find_nvcc()
    if not cxx:
        if asked == "auto":
            return Plan("none", "no C++ compiler was found; pudnet works without the extension, only slower")
        raise SystemExit(
            f"pudnet: PUDNET_BUILD={asked} needs a C++ compiler, and none was found. Install one "
            "(for example: apt-get install g++), name it in CXX, or build without it: PUDNET_BUILD=none pip install ."
        )
    if asked == "cuda" and not nvcc:
        raise SystemExit(
            "pudnet: PUDNET_BUILD=cuda needs nvcc, and none was found. If a CUDA toolkit is installed, type: "
            "CUDA_HOME=/usr/local/cuda PUDNET_BUILD=cuda pip install . ; for the CPU alone: "
            "PUDNET_BUILD=cpu pip install ."
        )
    if nvcc:
        return Plan("cuda", f"nvcc found: {nvcc}", cxx, nvcc)
    return Plan("cpu", "PUDNET_BUILD=cpu" if asked == "cpu" else "no nvcc was found", cxx)


def toolkit(nvcc: str) -> tuple[Path, str, list[int]]:
    """Ask nvcc for its toolkit: (root folder, version, those of our architectures it can compile for).

    nvcc may be a wrapper elsewhere on the disk, so only its own dry run tells where its libraries are.
    """
    dry_run = subprocess.run([nvcc, "-v", "-x", "cu", "--dryrun", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", dry_run, re.MULTILINE)
    release = re.search(r"release ([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    codes = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    known = {int(number) for number in re.findall(r"sm_(\d+)", codes)}
    architectures = [number for number in CUDA_ARCHITECTURES if number in known]
    if top is None or release is None or not architectures:
        raise SystemExit(
            f"pudnet: {nvcc} does not answer as nvcc does. To build for the CPU: PUDNET_BUILD=cpu pip install ."
        )
    return Path(top.group(1).strip()).resolve(), release.group(1), architectures


def accepts(cxx: str, flag: str, folder: Path) -> bool:
    """Whether the compiler can compile and link an empty program with ``flag``."""
    source = folder / "empty.cpp"
    source.write_text("int main() { return 0; }\n")
    command = [*shlex.split(cxx), flag, str(source), "-o", str(folder / "empty")]
    return subprocess.run(command, capture_output=True).returncode == 0


def escape(path: object) -> str:
    """A path as ninja writes it."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def arguments(words: list[str]) -> str:
    """Command-line words, quoted for the shell and then for ninja."""
    return shlex.join(words).replace("$", "$$")


def ninja_file(plan: Plan, folder: Path, output: Path, version: str) -> str:
    """The text of build.ninja: three rules, one line per source, one link."""
    import pybind11

    includes = ["-I" + pybind11.get_include(), "-I" + sysconfig.get_path("include")]
    openmp = ["-fopenmp"] if accepts(plan.cxx, "-fopenmp", folder) else []
    defines = [f'-DPUDNET_VERSION="{version}"']
    link = ["-shared", *openmp]
    if sys.platform == "darwin":
        link += ["-undefined", "dynamic_lookup"]
    else:
        link += ["-Wl,--strip-all"]
    nvcc_flags: list[str] = []
    if plan.nvcc:
        top, release, architectures = toolkit(plan.nvcc)
        newest = architectures[-1]
        names = " ".join([*(f"sm_{number}" for number in architectures), f"compute_{newest}"])
        defines += [
            "-DPUDNET_WITH_CUDA",
            f'-DPUDNET_CUDA_VERSION="{release}"',
            f'-DPUDNET_CUDA_ARCHITECTURES="{names}"',
        ]
        nvcc_flags = ["-DPUDNET_WITH_CUDA", "-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        if "CXX" in os.environ:
            nvcc_flags += ["-ccbin", shlex.split(plan.cxx)[-1]]  # of "ccache g++" the compiler itself
        nvcc_flags += [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
        nvcc_flags += [f"-gencode=arch=compute_{newest},code=compute_{newest}"]
        # The static runtime: the binary then loads where no CUDA is installed, and calls say that no driver was found.
        libraries = [top / "lib64", top / "lib", *top.glob("targets/*/lib")]
        link += [f"-L{path}" for path in libraries if path.is_dir()]
        link += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    cxx_flags = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra", *openmp]
    cxx_flags += [*shlex.split(os.environ.get("CXXFLAGS", "")), *defines, *includes]

    lines = [
        f"builddir = {escape(folder)}",  # ninja keeps its own logs there, not in the current folder
        f"cxx = {plan.cxx}",
        f"nvcc = {arguments([plan.nvcc])}",
        f"cxx_flags = {arguments(cxx_flags)}",
        f"nvcc_flags = {arguments(nvcc_flags)}",
        f"link_flags = {arguments(link)}",
        "rule cxx",
        "  command = $cxx $cxx_flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",
        "  command = $nvcc $nvcc_flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx $in -o $out $link_flags",
    ]
    objects = []
    for source in sorted((ROOT / "csrc").glob("*.c*")):
        rule = {".cpp": "cxx", ".cu": "nvcc"}.get(source.suffix)
        if rule is None or (rule == "nvcc" and not plan.nvcc):
            continue
        objects.append(escape(folder / (source.name + ".o")))
        lines.append(f"build {objects[-1]}: {rule} {escape(source)}")
    lines.append(f"build {escape(output)}: link {' '.join(objects)}")
    lines.append(f"default {escape(output)}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """Writes build.ninja and runs it, in place of the compiler calls of setuptools."""

    def build_extension(self, ext: Extension) -> None:
        folder = Path(self.build_temp).resolve() / "pudnet_C"
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        recipe = folder / "build.ninja"
        recipe.write_text(ninja_file(PLAN, folder, output, self.distribution.get_version()))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        command = [find_ninja(), "-f", str(recipe), *jobs, *(["-v"] if self.verbose > 1 else [])]
        if subprocess.run(command).returncode:
            raise SystemExit(
                "pudnet: the extension did not compile (messages above). To leave out the CUDA part: PUDNET_BUILD=cpu "
                "pip install . ; to install without the extension: PUDNET_BUILD=none pip install ."
            )


def find_ninja() -> str:
    """The ninja of the build environment, or the one on the path."""
    beside = Path(sysconfig.get_path("scripts"), "ninja")
    try:
        from ninja import BIN_DIR
    except ImportError:
        found = str(beside) if beside.exists() else shutil.which("ninja")
    else:
        found = shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja")
    if not found:
        raise SystemExit("pudnet: ninja was not found. Type: pip install ninja 'pybind11>=3.0'")
    return found


BUILDING = bool(BUILD_COMMANDS.intersection(sys.argv))
PLAN = make_plan() if BUILDING else Plan("none", "nothing is built now")
if BUILDING:
    print(f"pudnet: building the extension pudnet._C for {PLAN.target} ({PLAN.reason})", file=sys.stderr, flush=True)

setup(
    # kernels/ lives at the top level of the repository and is installed as pudnet.kernels, never as `kernels`.
    package_dir={"pudnet": "pudnet", "pudnet.kernels": "kernels"},
    packages=[
        *find_namespace_packages(include=["pudnet", "pudnet.*"], exclude=["*.__pycache__", "pudnet.kernels"]),
        "pudnet.kernels",
    ],
    ext_modules=[] if PLAN.target == "none" else [Extension("pudnet._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
