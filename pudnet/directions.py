"""Data in the weights by construction: kernels that are leading directions of the dataset's own patches.

n images, C channels, k x k kernels, P = C * k * k values of a patch, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet import ops
from pudnet.errors import InputError, ShapeError, message

RANK_TOLERANCE = 1e-5  # a direction with a smaller share of the largest variance is numerical noise
SHRINKAGE = 0.1  # of the scatter within classes towards its mean variance


def principal_directions(x: Tensor, count: int, kernel_size: int) -> Tensor:
    """Leading eigenvectors of the covariance of all patches (principal components).

    Args:
        x: ``[n, C, H, W]``, what a convolution reads.
        count: at most so many; fewer where the patches have no more dimensions.
        kernel_size: k.

    Returns:
        ``[m, C, k, k]`` of unit norm, m <= count, the leading one first.
    """
    covariance = ops.patch_covariance(x, kernel_size=kernel_size).covariances.double()
    values, vectors = torch.linalg.eigh(covariance)  # ascending
    rank = int((values > RANK_TOLERANCE * values[-1]).sum())
    return _kernels(vectors.flip(1)[:, : min(count, rank)].T, x, kernel_size)


def fisher_directions(
    x: Tensor, labels: Tensor, count: int, kernel_size: int, *, shrinkage: float = SHRINKAGE
) -> Tensor:
    """Directions in which patches at one place differ most between classes, against their scatter within a class.

    Fisher's linear discriminant with the class means taken per position and both scatters summed over positions: there
    are then many more directions than classes, and "a bar on the left" and "a bar on the right" are different means.
    The scatter between classes has the rank of its few mean maps, so it costs one pass over the images.

    Args:
        x: ``[n, C, H, W]``, what a convolution reads.
        labels: int64 ``[n]``.
        count: at most so many.
        kernel_size: k.
        shrinkage: added to the scatter within classes, in units of its mean variance, on the diagonal.

    Returns:
        ``[m, C, k, k]`` of unit norm, m <= count, the leading one first.

    Raises:
        ShapeError: not one label for every image. InputError: a single class.
    """
    where = "fisher_directions"
    if labels.shape != x.shape[:1]:
        raise ShapeError(message(where, "labels", f"[{len(x)}], one per image", list(labels.shape)))
    members = F.one_hot(labels).to(x.dtype)  # [n, K]
    sizes = members.sum(0)
    if int((sizes > 0).sum()) < 2:
        raise InputError(message(where, "labels", "of at least two classes", "one"))
    mean = x.mean(0)  # [C, H, W]
    class_means = torch.einsum("nk,nchw->kchw", members, x) / sizes.clamp_min(1.0).view(-1, 1, 1, 1)
    shares = (sizes / len(x)).sqrt().view(-1, 1, 1, 1)
    between = len(sizes) * _second_moment((class_means - mean) * shares, kernel_size)  # [P, P]
    within = _second_moment(x - mean, kernel_size) - between
    within.diagonal().add_(shrinkage * within.diagonal().mean())
    inverse = torch.linalg.inv(torch.linalg.cholesky(within))
    _, vectors = torch.linalg.eigh(inverse @ between @ inverse.T)  # ascending
    return _kernels(vectors.flip(1)[:, :count].T @ inverse, x, kernel_size)


def _second_moment(x: Tensor, kernel_size: int) -> Tensor:
    """Mean outer product of all patches, float64 ``[P, P]``."""
    means, covariances, _ = ops.patch_covariance(x, kernel_size=kernel_size)
    return covariances.double() + torch.outer(means, means).double()


def _kernels(rows: Tensor, x: Tensor, kernel_size: int) -> Tensor:
    return F.normalize(rows, dim=1).to(x.dtype).view(-1, x.shape[1], kernel_size, kernel_size)


@torch.no_grad()
def insert_directions(
    network: nn.Module,
    images: Tensor,
    pairs: Mapping[nn.Conv2d, int],
    find: Callable[[Tensor, int, int], Tensor],
) -> None:
    """Replace the last kernels of some convolutions by directions of what these read, layer by layer in one pass.

    Each direction comes with its negative (ReLU would lose the half of each that is below the mean), at the mean norm
    of the kernels that stay (unit norm where none does). A layer that is called twice keeps the kernels of its first
    call. BatchNorm normalises by the statistics of ``images`` on the way and keeps them.

    Args:
        network: changed in place; in eval mode afterwards.
        images: ``[n, 3, H, W]``, as the network reads them: a random sample of the dataset.
        pairs: directions to put into each convolution; where fewer are found, the kernels in excess stay.
        find: ``(x, count, kernel_size) -> [m, C, k, k]``, one of the functions above.

    Raises:
        InputError: a convolution with groups, dilation or an oblong kernel, or with fewer than ``2 * pairs`` kernels.
    """
    for conv, count in pairs.items():
        _require_plain("insert_directions", conv, count)
    made: set[nn.Module] = set()

    def before(conv: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(conv, nn.Conv2d) and conv not in made:
            made.add(conv)
            found = find(inputs[0], pairs[conv], conv.kernel_size[0])
            kept = conv.weight[: conv.out_channels - 2 * len(found)]
            norm = kept.flatten(1).norm(dim=1).mean() if len(kept) else 1.0
            conv.weight[len(kept) :] = norm * torch.cat([found, -found])

    handles = [conv.register_forward_pre_hook(before) for conv, count in pairs.items() if count]
    try:
        with normalising_by_batch(network):
            network(images)
    finally:
        for handle in handles:
            handle.remove()


def _require_plain(where: str, conv: nn.Conv2d, count: int) -> None:
    plain = conv.groups == 1 and set(conv.dilation) == {1} and len(set(conv.kernel_size)) == 1
    if count and not plain:
        rule = "0 for a convolution with groups, dilation or an oblong kernel"
        raise InputError(message(where, "pairs", rule, count))
    if not 0 <= 2 * count <= conv.out_channels:
        raise InputError(message(where, "pairs", f"0 to {conv.out_channels // 2}, half the kernels", count))


@contextmanager
def normalising_by_batch(network: nn.Module) -> Iterator[None]:
    """While open, every BatchNorm uses its batch's statistics, and keeps exactly those of the last batch; then eval."""
    norms = [child for child in network.eval().modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        network.eval()
