"""What is installed and what runs where, as one dictionary; ``pudnet info`` prints it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

import pudnet
from pudnet import _extension, backends
from pudnet.data import png


def info() -> dict[str, Any]:
    """Describe this installation.

    Returns:
        ``versions`` (of pudnet, Python and the packages it uses; None where not installed), ``cpu``, ``gpus``,
        ``extension`` (its build, or the reason why it is not used), ``small_png_files`` (what reads them), and
        ``backends``: device -> op -> backend -> reasons why it cannot run, empty where it can.
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "versions": {
            "pudnet": pudnet.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            **{name: _version(name) for name in ("numpy", "triton", "safetensors")},
        },
        "platform": platform.platform(),
        "cpu": {
            "model": _cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
        },
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "extension": _extension_info(),
        "small_png_files": _png_reader(),
        "backends": {device: backends.explain(device) for device in devices},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def _png_reader() -> str:
    module = png.opencv()
    if module is None:
        return "Pillow; OpenCV, which takes 0.6 of the time, is not installed: pip install 'pudnet[opencv]'"
    return f"OpenCV {module.__version__}, in folders of {png.WORTH} or more; else Pillow"


def _extension_info() -> dict[str, Any]:
    reasons = _extension.why_not()
    if reasons:
        return {"available": False, "reason": reasons[0]}
    module = _extension.load()
    return {"available": True, "path": module.__file__, **module.build_info()}
