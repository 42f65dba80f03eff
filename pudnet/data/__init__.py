"""Reading images into uint8 batches. Importing this package needs torch and numpy only."""

from pudnet.data.base import ImageSource
from pudnet.data.preprocess import Preprocess
from pudnet.data.source import open_images

__all__ = ["ImageSource", "Preprocess", "open_images"]
