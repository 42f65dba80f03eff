"""Every operator ``torch.ops.pudnet.*``: its signature and its fake kernel, on one screen.

They exist whether the extension is there or not; the implementations are beside the public functions, in
``pudnet/ops/<op>.py``. Outputs are contiguous, in the fakes as in the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

torch.library.define(
    "pudnet::image_stats",
    "(Tensor images, Tensor labels, SymInt num_classes, float[] mean, float[] std) -> "
    "(Tensor sketch, Tensor channel_mean, Tensor channel_var, Tensor means, Tensor variances, Tensor counts)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "pudnet::class_stats",
    "(Tensor features, Tensor labels, SymInt num_classes) -> (Tensor means, Tensor variances, Tensor counts)",
    tags=torch.Tag.pt2_compliant_tag,
)


def empty_image_stats(
    images: Tensor, labels: Tensor, num_classes: int, mean: list[float], std: list[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs of ``image_stats``, not filled."""
    n, height, width, channels = images.shape
    return (
        images.new_empty((n, channels, height, width), dtype=torch.float32),
        images.new_empty(channels, dtype=torch.float32),
        images.new_empty(channels, dtype=torch.float32),
        images.new_empty((num_classes, height * width * channels), dtype=torch.float32),
        images.new_empty((num_classes, height * width * channels), dtype=torch.float32),
        images.new_empty(num_classes, dtype=torch.int64),
    )


def empty_class_stats(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of ``class_stats``, not filled."""
    return (
        features.new_empty((num_classes, features.shape[1])),
        features.new_empty((num_classes, features.shape[1])),
        features.new_empty(num_classes, dtype=torch.int64),
    )


torch.library.register_fake("pudnet::image_stats", empty_image_stats)
torch.library.register_fake("pudnet::class_stats", empty_class_stats)
