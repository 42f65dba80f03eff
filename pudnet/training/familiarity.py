"""What ``pudnet.familiarity`` has to know of the training data, put into a checkpoint that has none of it.

    python -m pudnet.training.familiarity pudnet/pretrained/convnet3.safetensors --data ../shared/data

reads the data that the checkpoint's card names and writes the file anew: the same tensors, and a longer card. New
trainings write it themselves.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pudnet import checkpoint
from pudnet.errors import InputError, message
from pudnet.training.config import TrainingConfig
from pudnet.training.trainer import Trainer


def known_datasets(path: Path, data: Path) -> dict[str, Any]:
    """Draw datasets as the training of a checkpoint drew them, and embed them.

    Args:
        path: the checkpoint.
        data: the folder that has the files its card names.

    Raises:
        InputError: the card does not tell of a training, or a file is missing. CheckpointError: a damaged file.
    """
    config, tensors = checkpoint.load(path, "predictor")
    told = config.get("card", {}).get("training")
    if told is None:
        raise InputError(message("known_datasets", "path", "a checkpoint whose card has its training", str(path)))
    run = TrainingConfig.from_dict(told)
    sources = tuple(
        dataclasses.replace(source, paths=tuple(str(data / Path(name).name) for name in source.paths))
        for source in run.data
    )
    trainer = Trainer(dataclasses.replace(run, data=sources, start=""))
    checkpoint.fill(trainer.net, tensors)
    return trainer.familiarity()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; exit status 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m pudnet.training.familiarity")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    options = parser.parse_args(arguments)
    try:
        found = known_datasets(options.checkpoint, options.data)
        config, tensors = checkpoint.load(options.checkpoint, "predictor")
        config["card"]["familiarity"] = found
        checkpoint.save(options.checkpoint, "predictor", config, tensors)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
