"""Training the hypernetworks."""

from pudnet.training.config import GHNTrainingConfig, TrainingConfig, read_config
from pudnet.training.ghn_trainer import GHNTrainer
from pudnet.training.start import train
from pudnet.training.trainer import Trainer

__all__ = ["GHNTrainer", "GHNTrainingConfig", "Trainer", "TrainingConfig", "read_config", "train"]
