"""What made a model: enough to make it again, and to say why a second one differs."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pudnet._version import __version__
from pudnet.errors import CheckpointError, InputError, PudnetError, message
from pudnet.sketch import Sketch


def environment(device: torch.device) -> dict[str, Any]:
    """What decides the last bits of a result besides its inputs: versions, device, instruction set, threads."""
    return {
        "pudnet": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "processor": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
    }


def describe_sketch(sketch: Sketch) -> dict[str, Any]:
    """Which images decided the weights: their positions in the dataset, and a hash of their pixels and labels."""
    return {
        "capacity": sketch.capacity,
        "seed": sketch.seed,
        "streams": list(sketch.streams),
        "stream_ids": sketch.stream_ids.tolist() if len(sketch.streams) > 1 else None,
        "indices": sketch.indices.tolist(),
        "sha256": digest({"images": sketch.images} | ({} if sketch.labels is None else {"labels": sketch.labels})),
    }


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, in the order of the names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def digest_model(network: nn.Module, head: nn.Module) -> str:
    """SHA-256 of everything a predicted model computes with."""
    parts = {"network": network, "head": head}
    return digest({f"{part}.{name}": x for part, module in parts.items() for name, x in module.state_dict().items()})


def require_net(record: Mapping[str, Any], net_sha256: str) -> None:
    """Refuse to make a model again with another hypernetwork than the recorded one.

    Raises:
        CheckpointError: their parameters differ.
    """
    if record["net_sha256"] != net_sha256:
        hint = f"The record names {record['checkpoint']!r}, a file of SHA-256 {record['sha256']}."
        rule = f"one with the parameters of the record (SHA-256 {record['net_sha256']})"
        raise CheckpointError(message("Predictor.remake", "the predictor", rule, net_sha256, hint))


def require_untrained(record: Mapping[str, Any]) -> None:
    """Refuse to make a model again that was trained after it was predicted.

    Raises:
        InputError: it was fine-tuned.
    """
    if record.get("finetuned"):
        hint = "Predict it again and fine-tune it with the same arguments, and compare model_sha256."
        rule, got = "of a model that was not fine-tuned", f"one fine-tuned {len(record['finetuned'])} times"
        raise InputError(message("Predictor.remake", "report", rule, got, hint))


def require_sketch(record: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    """Refuse images that give another sketch than the recorded one.

    Raises:
        InputError: positions or pixels of the sketched images differ.
    """
    if made["sketch"]["sha256"] != record["sketch"]["sha256"]:
        hint = "Give the same images with the same labels in the same order; and the sketch, where there was one."
        got = f"sketched images of SHA-256 {made['sketch']['sha256']}"
        rule = f"those of the record ({record['sketch']['sha256']})"
        raise InputError(message("Predictor.remake", "images", rule, got, hint))


def require_equal(record: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    """Refuse a model that is not the recorded one to the last bit.

    Raises:
        PudnetError: it differs; the message lists what else does.
    """
    if made["model_sha256"] == record["model_sha256"]:
        return
    ignored = {"model_sha256", "checkpoint", "sketch", "added"}
    differing = [
        f"{name} was {record[name]!r} and is {made.get(name)!r}"
        for name in record
        if name not in ignored and record[name] != made.get(name)
    ]
    rule = f"the recorded one (SHA-256 {record['model_sha256']})"
    hint = (
        f"What differs besides: {'; '.join(differing) or 'nothing that is recorded, so images that are not sketched'}."
    )
    raise PudnetError(message("Predictor.remake", "the model", rule, made["model_sha256"], hint))
