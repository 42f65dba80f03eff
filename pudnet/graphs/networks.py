"""Networks by name: presets, architectures of DeepNets-1M, and factories in a user's own Python file."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from pathlib import Path

import torch
from torch import nn

from pudnet.errors import InputError, message
from pudnet.graphs.deepnets1m import SIZES, deepnets
from pudnet.graphs.predefined import ResNet50, ViT
from pudnet.targets import TARGETS

WHERE = "make_network"
PREDEFINED = {"resnet50": ResNet50, "vit": ViT}


def preset_networks() -> list[str]:
    """Names that ``make_network`` knows, without those of DeepNets-1M."""
    return sorted([*PREDEFINED, *TARGETS])


def make_network(name: str, *, classes: int = 10, image_size: int = 32, seed: int = 0) -> nn.Module:
    """Build the network called ``name``.

    Args:
        name: a preset (``"resnet50"``); a network of DeepNets-1M by split and index (``"test-3"``); or
            ``"FILE.py:factory"``, where ``factory`` takes no arguments and returns a module. **The file is run.**
        classes: outputs of a network with a classifier; not for a file's.
        image_size: side of the images of a network that depends on it; not for a file's.
        seed: of the initial parameters, and of the space of DeepNets-1M.

    Raises:
        InputError: no such name, file or factory; the file or the factory fails, or what it makes is not a module.
    """
    split, _, index = name.rpartition("-")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in PREDEFINED:
            return PREDEFINED[name](classes, image_size)
        if name in TARGETS:
            return TARGETS[name].build()
        if split in SIZES and re.fullmatch(r"\d{1,9}", index):
            return next(deepnets(split, 1, seed, start=int(index), classes=classes, image_size=image_size)).build(seed)
        path, colon, factory = name.rpartition(":")
        if not colon or not factory.isidentifier():
            known = ", ".join(preset_networks())
            rule = f"FILE.py:factory, a network of DeepNets-1M as test-3, or one of {known}"
            raise InputError(message(WHERE, "network", rule, repr(name)))
        return _from_file(Path(path), factory)


def _from_file(path: Path, factory: str) -> nn.Module:
    """Run the file and call its factory; what they print goes to stderr, and their errors become InputError."""
    if not path.is_file():
        raise InputError(message(WHERE, "network", "FILE.py:factory of an existing file", repr(str(path))))
    name = f"_pudnet_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(message(WHERE, "network", "a file that ends in .py", repr(str(path))))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look their module up
    sys.path.insert(0, str(path.resolve().parent))  # a file may import its neighbours, as with `python FILE.py`
    doing = "running it"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
            made = getattr(module, factory, None)
            doing = f"calling {factory}()"
            if callable(made) and not isinstance(made, nn.Module):
                made = made()
    except (Exception, SystemExit) as error:
        got = f"{type(error).__name__} while {doing}: {error}"
        raise InputError(message(WHERE, str(path), "a file that runs and makes a network", got)) from error
    finally:
        sys.path.remove(str(path.resolve().parent))
        del sys.modules[name]
    if not hasattr(module, factory):
        raise InputError(message(WHERE, str(path), f"a file with {factory!r} in it", "one without"))
    if not isinstance(made, nn.Module):
        rule = "a function without arguments that returns a torch.nn.Module"
        raise InputError(message(WHERE, factory, rule, f"a {type(made).__name__}"))
    return made
