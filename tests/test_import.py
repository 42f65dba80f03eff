"""Importing the package needs torch and numpy alone."""

from __future__ import annotations

import subprocess
import sys

import pudnet

OPTIONAL = (
    *("PIL", "cv2", "typer", "rich", "matplotlib", "safetensors", "triton", "huggingface_hub", "sklearn"),
    "tensorboard",
)


def test_library_works_without_optional_packages() -> None:
    """None of them can be imported, and a model is predicted all the same."""
    script = f"""
import sys
before = set(sys.modules)
for name in {OPTIONAL!r}:
    sys.modules[name] = None
import pudnet
for name in pudnet.__all__:
    getattr(pudnet, name)
import torch
images = torch.randint(0, 256, (40, 16, 16, 3), dtype=torch.uint8)
net = pudnet.PudNet("convnet3", image_size=16, width=8, generator_width=2)
model = pudnet.Predictor(net).predict(images, torch.arange(40) % 2)
assert model(model.preprocess(images)).shape == (40, 2)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_import_is_light() -> None:
    """Not even torch is imported before it is needed."""
    script = "import sys, pudnet; print('torch' in sys.modules, 'typer' in sys.modules, pudnet.__version__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False", pudnet.__version__]


def test_public_names() -> None:
    assert set(pudnet.__all__) <= set(dir(pudnet))
    for name in pudnet.__all__:
        assert getattr(pudnet, name) is not None
