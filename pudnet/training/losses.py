"""The losses of PudNet's classification training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean feature of each class: ``[n, F], [n] -> [K, F]``."""
    members = F.one_hot(labels, num_classes).to(features.dtype)  # [n, K]
    return (members.T @ features) / members.sum(dim=0)[:, None]


def cosine_logits(query: Tensor, means: Tensor, temperature: Tensor) -> Tensor:
    """Cosine classifier (PudNet): ``[n, F], [K, F] -> [n, K]``, no parameters but the temperature."""
    return temperature * F.normalize(query, dim=1) @ F.normalize(means, dim=1).T


def ridge_logits(support: Tensor, labels: Tensor, query: Tensor, num_classes: int, penalty: float) -> Tensor:
    """Answers of ridge regression to centred one-hot targets, differentiable: ``[n, F], [n], [m, F] -> [m, K]``.

    Args:
        penalty: in units of the mean squared norm of the centred support features.
    """
    mean = support.mean(dim=0)
    x, targets = support - mean, F.one_hot(labels, num_classes).to(support.dtype)
    gram = x @ x.T  # [n, n]
    eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
    root = torch.linalg.cholesky(gram + penalty * gram.diagonal().mean() * eye)
    return (query - mean) @ x.T @ torch.cholesky_solve(targets - targets.mean(dim=0), root) + targets.mean(dim=0)


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
