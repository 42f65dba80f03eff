"""Damaged and hostile checkpoints: every one loads or is refused with an error of pudnet, in bounded memory."""

from __future__ import annotations

import copy
import json
import random
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pudnet
from pudnet import PudNet, checkpoint
from pudnet.errors import PudnetError
from pudnet.heads import fit_head
from pudnet.models.ghn import GHN
from pudnet.predicted import PredictedModel
from pudnet.sketch import Sketch, sketch
from pudnet.targets import ConvNet3
from pudnet.training import Trainer, TrainingConfig
from stress import Figures, part

MIB_LIMIT = 600  # more than the process held before; the largest header that is read takes most of it
SECONDS_LIMIT = 10  # of the processor, for one case
MESSAGE_LIMIT = 2000  # characters of an error

NUMBERS = (0, -1, 1, 2, 7, 2**31, 2**63 - 1, 2**63, 2**64, 10**400, 1.5, 1e308, float("nan"), float("inf"))
NAMES = (
    "",
    "..",
    "../../etc/passwd",
    "/dev/null",
    "C:\\x",
    "a\0b",
    "%s{0}",
    "__class__",
    "network.__init__",
    "\ud800",
    "é" * 9,
)
JSON_VALUES: tuple[Any, ...] = (*NUMBERS, *NAMES, None, True, [], {}, [[]], {"": 0}, "x" * 100_000, list(range(10_000)))


@part("checkpoints", "damaged or hostile checkpoints, sketches and training states", full=10_000, quick=150)
def run(count: int, seed: int) -> Figures:
    """Each case damages one of six kinds of files in one of eight ways."""
    failures, outcomes, slowest, longest = [], Counter(), (0.0, ""), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds = good_files(folder)
        start = _peak()
        for case in range(count):
            rng = random.Random(f"{seed}/{case}")
            kind, way = rng.choice(sorted(kinds)), rng.choice(WAYS)
            good, load = kinds[kind]
            path = folder / "case.safetensors"
            path.write_bytes(way(good, rng))
            begin = time.process_time()
            try:
                load(path)
                outcomes["loaded"] += 1
            except PudnetError as error:
                outcomes[type(error).__name__] += 1
                longest = max(longest, len(str(error)))
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a panic of Rust is no Exception
                failures.append(f"case {case} ({kind}, {way.__name__}): {type(error).__name__}: {error}"[:300])
            slowest = max(slowest, (time.process_time() - begin, f"case {case} ({kind}, {way.__name__})"))
        grown = _peak() - start
    if grown > MIB_LIMIT:
        failures.append(f"memory grew by {grown} MiB, more than {MIB_LIMIT}")
    if slowest[0] > SECONDS_LIMIT:
        failures.append(f"{slowest[1]} took {slowest[0]:.1f} s")
    if longest > MESSAGE_LIMIT:
        failures.append(f"an error of {longest} characters")
    return {
        "failures": failures,
        "outcomes": dict(sorted(outcomes.items())),
        "mib_grown_at_most": grown,
        "slowest_case_cpu_seconds": round(slowest[0], 2),
        "slowest_case": slowest[1],
        "longest_error_characters": longest,
    }


def good_files(folder: Path) -> dict[str, tuple[bytes, Callable[[Path], object]]]:
    """By kind: the bytes of a good file, and the function that reads one."""
    files: dict[str, tuple[bytes, Callable[[Path], object]]] = {}
    rng = np.random.default_rng(0)

    def keep(kind: str, save: Callable[[Path], object], load: Callable[[Path], object]) -> None:
        path = folder / kind
        save(path)
        load(path)
        files[kind] = path.read_bytes(), load

    small = {"sketch_size": 8, "layers": 1, "width": 4, "generator_width": 1}
    keep("named", PudNet("convnet3", **small).save, PudNet.load)
    own = ConvNet3(4)
    keep("module", PudNet(own, image_size=8, **small).save, lambda path: PudNet.load(path, target=own))
    maps, labels = [torch.randn(20, 4, 2, 2)], torch.arange(20) % 3
    head = fit_head("ridge", [(maps, labels)], 3)
    preprocess = PudNet(own, image_size=8, **small).preprocess
    model = PredictedModel(own, head, preprocess, ["a", "b", "c"], report={"warnings": ["none"]})
    keep("model", model.save, lambda path: pudnet.load(path, target=own))
    keep("ghn", GHN(width=4, num_classes=2).save, GHN.load)
    pixels = rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    keep("sketch", sketch([(pixels, np.arange(12) % 3)], 9).save, Sketch.load)
    np.savez(folder / "data.npz", x_train=pixels, y_train=np.arange(12) % 3)
    trainer = Trainer(
        TrainingConfig.from_dict(
            {
                "target": "convnet3",
                "data": [{"paths": [str(folder / "data.npz")]}],
                "episodes": {"classes": 2, "support": 1, "query": 1, "groups": 1},
                "augment": {"crop": 1},
                "model": {"image_size": 8, **small},
                "run": {"amp": False},
            }
        )
    )
    trainer.step()
    keep("training", trainer.save, trainer.restore)
    return files


def truncated(good: bytes, rng: random.Random) -> bytes:
    return good[: rng.choice([rng.randrange(len(good)), rng.randrange(64), len(good) - 1])]


def bits_flipped(good: bytes, rng: random.Random) -> bytes:
    data = bytearray(good)
    reach = rng.choice([8, 8 + int.from_bytes(good[:8], "little"), len(good)])
    for _ in range(rng.choice([1, 1, 2, 16])):
        data[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    return bytes(data)


def other_bytes(good: bytes, rng: random.Random) -> bytes:
    """Bytes put in, doubled, or replaced as a whole."""
    at = rng.randrange(len(good))
    noise = rng.randbytes(rng.choice([1, 8, 1000]))
    return rng.choice(
        [good[:at] + noise + good[at:], good + noise, good + good, noise, b"", bytes(5000), b"\x80\x04" + good]
    )


def huge_header(good: bytes, rng: random.Random) -> bytes:
    """A header that says it is long, or is."""
    size = int.from_bytes(good[:8], "little")
    if rng.random() < 0.9:
        claimed = rng.choice([0, 1, size - 1, size + 1, len(good), 10**8, 2**31, 2**63 - 1, 2**64 - 1])
        return claimed.to_bytes(8, "little") + good[8:]
    header, tensors = _parts(good)
    filler = rng.choice(
        ["[" * 2**20, "[" + "[]," * 2**18 + "0]", " " * 2**25, json.dumps({str(i): i for i in range(10**5)})]
    )
    header["__metadata__"][_key(header)] = filler
    return _joined(header, tensors)


def other_table(good: bytes, rng: random.Random) -> bytes:
    """Names, types, shapes and offsets of the table of tensors."""
    header, tensors = _parts(good)
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    change = rng.randrange(6)
    if change == 0:
        header[rng.choice(NAMES)] = header.pop(name)
    elif change == 1:
        del header[name]
    elif change == 2:
        entry["shape"] = rng.choice([[], [0], [2**62, 4], [-1], [1] * 200, [10**9, 10**9], *JSON_VALUES])
    elif change == 3:
        entry["dtype"] = rng.choice(
            ["F32", "F64", "BF16", "I64", "U8", "BOOL", "C64", "F8_E4M3", "F4", "X", *JSON_VALUES]
        )
    elif change == 4:
        first = rng.choice([0, 1, 2**63, len(tensors)])
        entry["data_offsets"] = rng.choice([[first, first + 4], [4, 0], [0], [-4, 0], *JSON_VALUES])
    else:
        header[rng.choice(NAMES)] = rng.choice([entry, *JSON_VALUES])
    return _joined(header, tensors)


def other_json(good: bytes, rng: random.Random) -> bytes:
    """Values of wrong types, missing and unknown keys in the JSON object of ours."""
    header, tensors = _parts(good)
    key = _key(header)
    ours = json.loads(header["__metadata__"][key])
    for _ in range(rng.choice([1, 1, 1, 3])):
        owner, place = rng.choice(_places(ours))
        if rng.random() < 0.2:
            del owner[place]
            if not ours:
                break
        elif rng.random() < 0.1 and isinstance(owner, dict):
            owner[rng.choice(NAMES)] = owner.pop(place)
        else:
            owner[place] = copy.deepcopy(rng.choice(JSON_VALUES))
    text = json.dumps(ours)
    if rng.random() < 0.1:
        text = rng.choice([text[:-1], "[" * 10**5 + text, text + text, "9" * 5000, '"\\ud800"', "NaN"])
    header["__metadata__"][key] = text
    return _joined(header, tensors)


def large_claims(good: bytes, rng: random.Random) -> bytes:
    """Plausible sizes that the tensors do not have; versions that do not exist."""
    header, tensors = _parts(good)
    key = _key(header)
    ours = json.loads(header["__metadata__"][key])
    numbers = [
        (owner, at) for owner, at in _places(ours) if isinstance(owner[at], int) and not isinstance(owner[at], bool)
    ]
    owner, place = rng.choice(numbers)
    owner[place] = owner[place] * rng.choice([2, 8, 100, 10**4, 10**6]) + rng.choice([0, 1])
    header["__metadata__"][key] = json.dumps(ours)
    return _joined(header, tensors)


def other_tensors(good: bytes, rng: random.Random) -> bytes:
    """A well-formed file with a tensor of another shape or type."""
    header, tensors = _parts(good)
    meta = header.pop("__metadata__")
    chosen = rng.choice(sorted(header))
    dtype = rng.choice([("F32", 4), ("F64", 8), ("I64", 8), ("U8", 1), ("F16", 2), ("BOOL", 1), ("C64", 8)])
    shape = rng.choice([[], [0], [1], [3, 1], [0, 7], header[chosen]["shape"][::-1], [*header[chosen]["shape"], 1]])
    table: dict[str, Any] = {"__metadata__": meta}
    data = b""
    for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
        entry = header[name]
        piece = tensors[slice(*entry["data_offsets"])]
        if name == chosen:
            entry = {"dtype": dtype[0], "shape": shape}
            piece = bytes(int(np.prod(shape, dtype=np.int64)) * dtype[1])
        table[name] = {**entry, "data_offsets": [len(data), len(data) + len(piece)]}
        data += piece
    return _joined(table, data)


WAYS = (truncated, bits_flipped, other_bytes, huge_header, other_table, other_json, large_claims, other_tensors)


def _parts(good: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(good[:8], "little")
    return json.loads(good[8 : 8 + size]), good[8 + size :]


def _joined(header: dict[str, Any], tensors: bytes) -> bytes:
    text = json.dumps(header, ensure_ascii=False).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + tensors


def _key(header: dict[str, Any]) -> str:
    return next(key for key in header["__metadata__"] if key.startswith(checkpoint.HEADER_KEY))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [found for key in keys for found in _places(value[key])]


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
