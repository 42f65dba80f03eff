"""Stateless functions on tensors: each has one reference that defines it and several backends."""

from pudnet.ops.dataset_stats import ClassStats, ImageStats, class_stats, image_stats
from pudnet.ops.generate_weights import generate_weights
from pudnet.ops.graph_recurrence import graph_recurrence
from pudnet.ops.layer_recurrence import layer_recurrence
from pudnet.ops.patch_covariance import PatchCovariance, patch_covariance
from pudnet.ops.tile_weights import tile_weights

__all__ = [
    "ClassStats",
    "ImageStats",
    "PatchCovariance",
    "class_stats",
    "generate_weights",
    "graph_recurrence",
    "image_stats",
    "layer_recurrence",
    "patch_covariance",
    "tile_weights",
]
