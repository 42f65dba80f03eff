"""Predicted models for use without pudnet: ONNX files and ``torch.export`` programs."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pudnet import checkpoint
from pudnet._version import __version__
from pudnet.data import Preprocess
from pudnet.errors import InputError, PudnetError, message, one_line
from pudnet.files import atomic_path

if TYPE_CHECKING:
    from torch.export import ExportedProgram

INPUT, OUTPUTS = "images", ("logits", "probabilities")
KEY = checkpoint.HEADER_KEY
PT2_MEMBER = f"{KEY}.json"
TOLERANCE = 1e-3  # of onnxruntime's outputs, in units of the largest logit above 1; rounding makes up to 2e-4
CHECKED = (1, 2, 5)  # numbers of images onnxruntime is tried with


class Deployed(nn.Module):
    """A predicted model with its normalisation: uint8 RGB ``[n, size, size, 3]`` -> logits, probabilities ``[n, K]``.

    Args:
        model: normalised images -> logits, on the CPU.
        preprocess: its normalisation.
    """

    def __init__(self, model: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        self.model = model
        self.preprocess = preprocess

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Resized images -> what the model says of them."""
        logits = self.model(self.preprocess.normalise(images))
        return logits, torch.softmax(logits, dim=1)


def export(model: nn.Module, preprocess: Preprocess, config: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write ``model`` as the suffix of ``path`` says, ``.onnx`` or ``.pt2``.

    Args:
        model: in evaluation mode, on the CPU: normalised images -> logits.
        preprocess: its normalisation, which becomes a part of what is written.
        config: JSON-able, travels with the model.

    Raises:
        InputError: another suffix, a path that cannot be written, a network that ``torch.export`` cannot take, or
            packages that are not installed.
        PudnetError: onnxruntime gives other outputs than ``model``.
    """
    where, suffix = "export", Path(path).suffix
    writers: dict[str, Callable[[ExportedProgram, Deployed, str, Path], None]] = {".onnx": _onnx, ".pt2": _pt2}
    if suffix not in writers:
        rule = f"a file name that ends in .safetensors, {' or '.join(writers)}"
        raise InputError(message(where, "path", rule, repr(os.fspath(path))))
    if suffix == ".onnx":
        _require_onnx()
    header = json.dumps(describe(preprocess, config))
    deployed = Deployed(model, preprocess).eval()
    with atomic_path(path, where) as temporary:
        writers[suffix](_trace(deployed), deployed, header, temporary)


def describe(preprocess: Preprocess, config: Mapping[str, Any]) -> dict[str, Any]:
    """What travels with an exported model, as one JSON object.

    In an ONNX file it is under ``"pudnet"`` of the metadata (``session.get_modelmeta().custom_metadata_map``), in a
    ``.pt2`` file it is the extra file ``"pudnet.json"`` (``torch.export.load(path, extra_files={"pudnet.json": ""})``).
    """
    side = preprocess.size
    return {
        "format": checkpoint.FORMAT_VERSION,
        "kind": "exported",
        "version": __version__,
        "input": {
            "name": INPUT,
            "dtype": "uint8",
            "shape": ["batch", side, side, 3],
            "colour": "RGB; grey as three equal channels, transparent laid on white",
            "resize": f"shorter side to {side} (bilinear, antialiased, rounded to uint8), then the centre cut out",
            "normalisation": "inside the model",
        },
        "output": {OUTPUTS[0]: ["batch", "classes"], OUTPUTS[1]: ["batch", "classes"]},
        "config": dict(config),
    }


def _example(deployed: Deployed, n: int) -> Tensor:
    side = deployed.preprocess.size
    return torch.randint(0, 256, (n, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


@torch.no_grad()
def _trace(deployed: Deployed) -> ExportedProgram:
    """The program of ``deployed`` with a free number of images."""
    free = {INPUT: {0: torch.export.Dim("batch", min=1)}}
    try:
        return torch.export.export(deployed, (_example(deployed, 3),), dynamic_shapes=free, strict=False)
    except Exception as error:  # the errors of tracing share no base class
        hint = "Its forward must not depend on the values or the number of the images."
        rule = "one whose network torch.export can take"
        raise InputError(message("export", "the model", rule, one_line(error), hint)) from error


def _pt2(program: ExportedProgram, deployed: Deployed, header: str, path: Path) -> None:
    # The example that was traced with would be the one pickled part of the file.
    program._example_inputs = None
    buffer = io.BytesIO()  # to a path, torch ends the process where the disk is full
    torch.export.save(program, buffer, extra_files={PT2_MEMBER: header})
    path.write_bytes(buffer.getbuffer())


def _require_onnx() -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        hint = "Type: pip install 'pudnet[onnx]'"
        raise InputError(message("export", "path", "of a kind whose packages are installed", error, hint)) from error


def _onnx(program: ExportedProgram, deployed: Deployed, header: str, path: Path) -> None:
    import onnxruntime

    # Not optimised: the optimiser takes the 1e-8 under the roots of `Reading` for zero, and outputs become NaN
    # (onnxscript 0.7.2). onnxruntime optimises for itself.
    exported = torch.onnx.export(
        program,
        (_example(deployed, 3),),
        input_names=[INPUT],
        output_names=OUTPUTS,
        dynamic_shapes={INPUT: {0: torch.export.Dim("batch", min=1)}},
        dynamo=True,
        external_data=False,
        optimize=False,
        verbose=False,
    )
    assert exported is not None
    exported.model.metadata_props[KEY] = header
    exported.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for n in CHECKED:
        _compare(session, deployed, _example(deployed, n))


@torch.no_grad()
def _compare(session: Any, deployed: Deployed, images: Tensor) -> None:
    for name, ours, theirs in zip(
        OUTPUTS, deployed(images), session.run(OUTPUTS, {INPUT: images.numpy()}), strict=True
    ):
        largest = float((ours - torch.from_numpy(theirs)).abs().max())
        allowed = TOLERANCE * max(1.0, float(ours.abs().max()))
        if not largest <= allowed:  # nor NaN
            rule = f"within {allowed:.1e} of the model's"
            raise PudnetError(message("export", f"onnxruntime's {name} of {len(images)} images", rule, largest))
