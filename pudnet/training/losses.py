"""The losses of PudNet's classification training."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean feature of each class: ``[n, F], [n] -> [K, F]``."""
    members = F.one_hot(labels, num_classes).to(features.dtype)  # [n, K]
    return (members.T @ features) / members.sum(dim=0)[:, None]


def cosine_logits(query: Tensor, means: Tensor, temperature: Tensor) -> Tensor:
    """Cosine classifier (PudNet): ``[n, F], [K, F] -> [n, K]``, no parameters but the temperature."""
    return temperature * F.normalize(query, dim=1) @ F.normalize(means, dim=1).T


def group_losses(
    features: Tensor,  # [n, F], support images first
    labels: Tensor,  # [n] within the group
    support: int,
    temperature: Tensor,
    auxiliary_logits: Tensor,  # [n, all training classes]
    classes: Tensor,  # [K] which training classes the group's are
) -> dict[str, Tensor]:
    """The three losses on one group, and the accuracy of the cosine classifier on its query images.

    The published form fixes neither direction nor weights of the agreement term; here the auxiliary classifier's
    opinion, restricted to the group's classes, teaches the cosine classifier (and gets no gradient from it).
    """
    means = class_means(features[:support].detach(), labels[:support], len(classes))
    logits = cosine_logits(features[support:], means, temperature)
    truth = labels[support:]
    teacher = auxiliary_logits[support:, classes].detach().log_softmax(dim=1)
    return {
        "cosine": F.cross_entropy(logits, truth),
        "auxiliary": F.cross_entropy(auxiliary_logits, classes[labels]),
        "agreement": F.kl_div(logits.log_softmax(dim=1), teacher, log_target=True, reduction="batchmean"),
        "accuracy": (logits.argmax(dim=1) == truth).float().mean(),
    }
