"""``python tests/sanitize.py``: build the extension with AddressSanitizer and UndefinedBehaviorSanitizer, and test it.

The build goes to ``build/sanitize`` and leaves the installed extension alone. The sanitizers end the process at the
first error they find. For the CPU code, with gcc on Linux.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
TESTS = ("dataset_stats", "patch_covariance", "generate_weights_native", "graph_ops", "prediction_ops")
FUZZED = 2000

RUN = f"""
import sys
import pudnet
pudnet.__path__.insert(0, {str(BUILD / "lib" / "pudnet")!r})
from pudnet import _extension
assert "sanitize" in _extension.load().__file__, _extension.load().__file__
import pytest
tests = [f"tests/ops/test_{{name}}.py" for name in {TESTS!r}]
if pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-m", "not slow and not cuda", *tests]):
    sys.exit("a test failed under the sanitizers")
sys.path.insert(0, "tests")
from stress import load
figures = load()["operators"].run({FUZZED}, 2)
print("fuzzed under the sanitizers:", figures)
sys.exit("\\n".join(figures["failures"]))
"""


def library(name: str) -> str:
    """Full path of a library of the compiler."""
    answer = subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
    return answer.strip()


def main() -> int:
    jobs = {"MAX_JOBS": os.environ.get("MAX_JOBS", "1"), "OMP_NUM_THREADS": "1"}
    build = {**os.environ, **jobs, "PUDNET_BUILD": "cpu", "CXX": f"c++ {FLAGS}", "CXXFLAGS": "-g1 -O1"}
    command = ["build_ext", "--build-lib", str(BUILD / "lib"), "--build-temp", str(BUILD / "temp")]
    subprocess.run([sys.executable, "setup.py", *command], cwd=ROOT, env=build, check=True)
    run = {
        **os.environ,
        **jobs,
        # libstdc++ too, as the sanitizer looks for its throw function when it starts. Python does not free all it has.
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    return subprocess.run([sys.executable, "-c", RUN], cwd=ROOT, env=run).returncode


if __name__ == "__main__":
    sys.exit(main())
