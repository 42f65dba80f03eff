"""Start or resume a run of either kind."""

from __future__ import annotations

from pathlib import Path

from pudnet.training.config import GHNTrainingConfig, TrainingConfig
from pudnet.training.ghn_trainer import GHNTrainer
from pudnet.training.loop import BaseTrainer, Callback, fit
from pudnet.training.trainer import Trainer


def train(
    config: TrainingConfig | GHNTrainingConfig,
    *,
    resume: bool = False,
    device: str = "cpu",
    on_step: Callback | None = None,
    on_validation: Callback | None = None,
) -> Path:
    """Train a hypernetwork and write ``predictor.safetensors`` into the run's folder.

    ``checkpoint.safetensors`` there is renewed every few minutes and when the run is interrupted; ``log.jsonl`` and, if
    tensorboard is installed, an event file get the losses.

    Args:
        config: the run; its type says whether it is PudNet's or a GHN's.
        resume: go on from the checkpoint in the folder; without one, start.
        device: where to train.
        on_step: called with (steps done, losses) after every step.
        on_validation: called with (steps done, {"unseen_accuracy": ...}).

    Returns:
        The path of the finished predictor.

    Raises:
        InputError: bad settings or data, or a folder that holds another run and ``resume`` is not set.
        KeyboardInterrupt: SIGINT or SIGTERM came; the checkpoint has been written.
    """

    def make() -> BaseTrainer:
        return Trainer(config, device) if isinstance(config, TrainingConfig) else GHNTrainer(config, device)

    return fit(make, config, resume=resume, device=device, on_step=on_step, on_validation=on_validation)
