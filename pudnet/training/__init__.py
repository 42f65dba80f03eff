"""Training the hypernetwork."""

from pudnet.training.config import TrainingConfig
from pudnet.training.trainer import Trainer, train

__all__ = ["Trainer", "TrainingConfig", "train"]
