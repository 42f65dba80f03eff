"""Every kernel, in every configuration the package launches, compiled for three GPUs. Run by test_kernels.py.

No spill, no local memory, no more shared memory than there is, and 16-byte stores in the kernel that writes the
weights.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aot import ARCHITECTURES, compile_kernel, problems

from pudnet.kernels import generate_weights as generators
from pudnet.kernels import graph_recurrence as graphs
from pudnet.kernels import layer_recurrence as recurrence
from pudnet.kernels import tile_weights as tiles

ROOT = Path(__file__).parent.parent.parent
# label, kernel, types of the arguments, constants, options
Configuration = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]


def _bfloat16(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "bf16")


def _recurrence() -> Iterator[Configuration]:
    matrices = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "out_weight", "out_bias")
    matrices += ("state_norm_weight", "state_norm_bias", "code_norm_weight", "code_norm_bias", "start")
    fwd, bwd = recurrence.layer_recurrence_fwd_kernel, recurrence.layer_recurrence_bwd_kernel
    types = {"words": "i64", "alpha": "fp32"}
    for width, normalise, save, low in (
        (128, True, False, ()),
        (128, True, True, ()),
        (128, False, False, ()),
        (128, True, False, matrices),
        (256, True, True, ()),
        (256, True, False, ()),
    ):
        constants = {**recurrence.sizes(width), "NORMALISE": normalise, "SAVE": save}
        label = f"recurrence forward D={width} normalise={normalise} save={save} {'bf16' if low else 'fp32'}"
        yield label, fwd, {**types, **_bfloat16(*low)}, constants, recurrence.OPTIONS
    for width, normalise, low in ((128, True, ()), (128, True, matrices), (128, False, ()), (256, True, ())):
        constants = {**recurrence.sizes(width), "NORMALISE": normalise}
        label = f"recurrence backward D={width} normalise={normalise} {'bf16' if low else 'fp32'}"
        yield label, bwd, {"words": "i64", **_bfloat16(*low)}, constants, recurrence.OPTIONS


def _generators() -> Iterator[Configuration]:
    features, rows = generators.sizes(128, 8)
    small = ("codes", "fc_weight", "fc_bias", "mix_weight", "mix_bias")
    for dtype in ("fp32", "bf16"):
        types = {"table": "i32", **dict.fromkeys(small, dtype)}
        yield f"features forward {dtype}", generators.generate_features_fwd_kernel, types, features, {"num_warps": 1}
        types |= dict.fromkeys(("d_fc_weight", "d_fc_bias"), dtype)
        kernel = generators.generate_features_bwd_kernel
        yield f"features backward {dtype}", kernel, types, features, {"num_warps": generators.FEATURES_BWD_WARPS}
        types = {"table": "i32", **dict.fromkeys(("fc_weight", "d_codes", "d_mix_weight", "d_mix_bias"), dtype)}
        yield f"codes backward {dtype}", generators.generate_codes_bwd_kernel, types, features, {"num_warps": 1}
    constants = {"C": rows["C"], "BC": rows["BC"], "BT": generators.TILES_PER_BLOCK}
    yield "shares backward", generators.generate_shares_bwd_kernel, {"table": "i32"}, constants, {"num_warps": 1}
    for weight in ("fp32", "bf16"):
        for out in ("fp32", "bf16"):
            constants = {**rows, "VECTOR": 8 if out == "bf16" else 4}
            types = {"table": "i32", "row_weight": weight, "row_bias": weight, "out": out}
            kernel = generators.generate_rows_fwd_kernel
            yield f"rows forward {weight} -> {out}", kernel, types, constants, {"num_warps": generators.ROWS_FWD_WARPS}
            types |= {"d_out": out, "d_row_weight": weight, "d_row_bias": weight}
            kernel = generators.generate_rows_bwd_kernel
            yield f"rows backward {weight} <- {out}", kernel, types, constants, {"num_warps": generators.ROWS_BWD_WARPS}


def _graphs() -> Iterator[Configuration]:
    types = {"starts": "i32", "words": "i64"}
    for width, kinds, save in (
        (32, 2, True),
        (32, 2, False),
        (32, 1, True),
        (48, 2, True),
        (64, 2, True),
        (64, 1, True),
    ):
        sizes = graphs.sizes(width, kinds, width // kinds)
        label = f"graph recurrence D={width} V={kinds}"
        constants = {**sizes, "SAVE": save}
        yield f"{label} forward save={save}", graphs.graph_recurrence_fwd_kernel, types, constants, graphs.OPTIONS
        if save:
            yield f"{label} backward", graphs.graph_recurrence_bwd_kernel, types, sizes, graphs.OPTIONS


def _tiles() -> Iterator[Configuration]:
    options = {"num_warps": tiles.WARPS}
    constants = {"BM": tiles.BAND_FWD, "VECTOR": tiles.VECTOR}
    yield "tiles forward", tiles.tile_weights_fwd_kernel, {"table": "i64"}, constants, options
    constants = {"BM": tiles.BAND_BWD, "BR": tiles.REPEATS_BWD, "VECTOR": tiles.VECTOR}
    yield "tiles backward", tiles.tile_weights_bwd_kernel, {"table": "i64"}, constants, options


CONFIGURATIONS = [*_recurrence(), *_generators(), *_graphs(), *_tiles()]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=[c[0].replace(" ", "-") for c in CONFIGURATIONS])
def test_kernel(configuration: Configuration, architecture: int) -> None:
    label, kernel, types, constants, options = configuration
    compiled = compile_kernel(kernel, types, constants, architecture, **options)
    assert not problems(compiled, architecture), f"{label}, sm_{architecture}: {compiled.registers} registers"
    if label.startswith("rows forward"):
        # 16 pairs x 128 rows over 128 threads: 16 numbers of each thread, all in 16-byte stores; the other branch of
        # the launch, for layers that cannot have them, stores one by one.
        expected = 2 if label.endswith("bf16") else 4
        assert compiled.sass.count("STG.E.128") == expected, label
    if label == "tiles forward":  # 8 numbers of each thread
        assert compiled.sass.count("STG.E.128") == 2
    if "recurrence" in label:
        assert re.search(r"LDG\.E\.(64|128)\.STRONG", compiled.sass), "exchanged words must be read whole"


def test_the_check_sees_spills() -> None:
    """The recurrence with one warp cannot hold its rows in registers."""
    constants = {**recurrence.sizes(128), "NORMALISE": True}
    compiled = compile_kernel(recurrence.layer_recurrence_bwd_kernel, {"words": "i64"}, constants, 90, num_warps=1)
    assert problems(compiled, 90)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here: the CUDA sources cannot be compiled")
@pytest.mark.parametrize("source", sorted((ROOT / "csrc").glob("*.cu")), ids=lambda path: path.name)
def test_cuda_source(source: Path, tmp_path: Path) -> None:
    """What ptxas says of each CUDA kernel of the extension."""
    command = ["nvcc", "-O3", "-std=c++17", "-DPUDNET_WITH_CUDA", "-Xptxas=-v", "-cubin", "-o", str(tmp_path / "out")]
    used = 0
    for architecture in ARCHITECTURES:
        done = subprocess.run([*command, f"-arch=sm_{architecture}", str(source)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for stack, stores, loads in re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr
        ):
            assert (stack, stores, loads) == ("0", "0", "0"), f"sm_{architecture}: {done.stderr}"
            used += 1
        for shared in re.findall(r"(\d+) bytes smem", done.stderr):
            assert int(shared) <= 49_152, f"sm_{architecture}: {shared} bytes of static shared memory"
    assert used or "__global__" not in source.read_text()
