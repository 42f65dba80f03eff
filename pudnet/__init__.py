"""pudnet: network parameters in one forward pass instead of a training run."""

from __future__ import annotations

import importlib
from typing import Any

from pudnet._version import __version__

_PUBLIC = {
    "PudNet": "pudnet.models.pudnet",
    "GHN": "pudnet.models.ghn",
    "Sketch": "pudnet.sketch",
    "SketchBuilder": "pudnet.sketch",
    "Predictor": "pudnet.predictor",
    "PredictedModel": "pudnet.predicted",
    "load": "pudnet.predicted",
    "finetune": "pudnet.finetuning",
    "list_pretrained": "pudnet.checkpoint",
    "use_backend": "pudnet.backends",
    "PudnetError": "pudnet.errors",
    "InputError": "pudnet.errors",
    "CheckpointError": "pudnet.errors",
    "Cancelled": "pudnet.errors",
    "DatasetErrors": "pudnet.errors",
    "BackendUnavailableError": "pudnet.errors",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'pudnet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
