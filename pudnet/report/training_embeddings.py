"""Embeddings of what a checkpoint was trained on, in a JSON file beside it: the map of every report shows them.

    python -m pudnet.report.training_embeddings pudnet/pretrained/convnet3.safetensors --data ../shared/data

writes ``convnet3.embeddings.json`` from the classes of Tiny-ImageNet that the checkpoint's card does not hold out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pudnet.errors import InputError
from pudnet.evaluation.tasks import NATURAL, Images, draw, per_class, read
from pudnet.files import atomic_path
from pudnet.models.pudnet import PudNet
from pudnet.report.embedding_map import SUFFIX

TITLE = "Tiny-ImageNet, training classes"
POINTS = 8  # of each half
CLASSES, IMAGES = 20, 5  # of each: groups like those of the training
DIGITS = 4


@torch.no_grad()
def embed_training(net: PudNet, data: Path, seed: int = 0) -> dict[str, Tensor]:
    """Embed random groups of the training classes of both halves of Tiny-ImageNet.

    Raises:
        InputError: a file is missing from ``data``.
    """
    held_out = {name for part in net.card["held_out"] for name in ([part] if isinstance(part, str) else part)}
    groups = []
    for name in NATURAL:
        whole = read(data, name, "train", net.preprocess.size)
        known = [label for label, title in enumerate(whole.classes) if title not in held_out]
        groups += [_group(whole, known, seed, name, number) for number in range(POINTS)]
    return {TITLE: net.embed(groups).flatten(1)}


def _group(whole: Images, known: Sequence[int], seed: int, *names: object) -> Tensor:
    generator = draw(seed, *names)
    chosen = torch.tensor(known)[torch.randperm(len(known), generator=generator)[:CLASSES]]
    rows = torch.isin(whole.labels, chosen).nonzero().flatten()
    return whole.images[rows[per_class(whole.labels[rows], IMAGES, generator)]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; exit status 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m pudnet.report.training_embeddings")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        net = PudNet.load(options.checkpoint)
        found = embed_training(net, options.data, options.seed)
        document = {
            "sha256": hashlib.sha256(options.checkpoint.read_bytes()).hexdigest(),
            "seed": options.seed,
            "embeddings": {name: [[round(x, DIGITS) for x in row] for row in rows.tolist()]
                           for name, rows in found.items()},
        }  # fmt: skip
        with atomic_path(options.checkpoint.with_suffix(SUFFIX), "training_embeddings") as temporary:
            temporary.write_text(json.dumps(document, separators=(",", ":")) + "\n")
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
