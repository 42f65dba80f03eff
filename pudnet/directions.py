"""Data in the weights by construction: kernels that are leading directions of the dataset's own patches.

n images, C channels, k x k kernels, P = C * k * k values of a patch, K classes.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet import ops
from pudnet.errors import InputError, ShapeError, message
from pudnet.features import feature_maps
from pudnet.heads import Head, fit_head

RANK_TOLERANCE = 1e-5  # a direction with a smaller share of the largest variance is numerical noise
SHRINKAGE = 0.5  # of the scatter within classes towards its mean variance
TRIAL = 500  # images at most on which directions are tried
# By which share they must lower the negative log-likelihood there: with meaningless labels it changes by up to 0.4 %.
HELPS = 0.005
SAMPLES = 12  # patches that a scatter is estimated from, in units of their dimension P, where there are more


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
        shrinkage: added to the scatter within classes, in units of its mean variance, on the diagonal. Where there is
            hardly any, as with one image of each class, a little of the scatter between classes is.

    Returns:
        ``[m, C, k, k]`` of unit norm, m <= count, the leading one first.

    Raises:
        ShapeError: not one label for every image, or kernels larger than ``x``. InputError: a single class.
    """
    where = "fisher_directions"
    if labels.shape != x.shape[:1]:
        raise ShapeError(message(where, "labels", f"[{len(x)}], one per image", list(labels.shape)))
    if kernel_size > min(x.shape[2:]):
        raise ShapeError(message(where, "kernel_size", f"at most {min(x.shape[2:])}, the side of x", kernel_size))
    members = F.one_hot(labels).to(x.dtype)  # [n, K]
    sizes = members.sum(0)
    if int((sizes > 0).sum()) < 2:
        raise InputError(message(where, "labels", "of at least two classes", "one"))
    mean = x.mean(0)  # [C, H, W]
    class_means = torch.einsum("nk,nchw->kchw", members, x) / sizes.clamp_min(1.0).view(-1, 1, 1, 1)
    shares = (sizes / len(x)).sqrt().view(-1, 1, 1, 1)
    between = len(sizes) * _second_moment((class_means - mean) * shares, kernel_size)  # [P, P]
    within = _second_moment(x - class_means[labels], kernel_size)
    least = (RANK_TOLERANCE * between.diagonal().mean()).clamp_min(torch.finfo(x.dtype).tiny)
    within.diagonal().add_(torch.maximum(shrinkage * within.diagonal().mean(), least))
    root = torch.linalg.cholesky(within)
    inverse = torch.linalg.solve_triangular(root, torch.eye(len(root)).to(root), upper=False)
    _, vectors = torch.linalg.eigh(inverse @ between @ inverse.T)  # ascending
    return _kernels(vectors.flip(1)[:, :count].T @ inverse, x, kernel_size)


def _second_moment(x: Tensor, kernel_size: int) -> Tensor:
    """Mean outer product of all patches, or of many: float64 ``[P, P]``."""
    n, channels, height, width = x.shape
    rows, columns = height - kernel_size + 1, width - kernel_size + 1
    dimension = channels * kernel_size**2
    if n * rows * columns <= SAMPLES * dimension:
        patches = F.unfold(x, kernel_size).transpose(1, 2).reshape(-1, dimension)
    else:
        places = rows * columns
        chosen = torch.randint(n * places, (SAMPLES * dimension,), generator=torch.Generator().manual_seed(0))
        image, place = chosen.to(x.device) // places, chosen.to(x.device) % places
        windows = x.unfold(2, kernel_size, 1).unfold(3, kernel_size, 1)  # [n, C, rows, columns, k, k], a view
        patches = windows[image, :, place // columns, place % columns].flatten(1)
    return (patches.T @ patches / len(patches)).double()


def _kernels(rows: Tensor, x: Tensor, kernel_size: int) -> Tensor:
    return F.normalize(rows, dim=1).to(x.dtype).view(-1, x.shape[1], kernel_size, kernel_size)


@torch.no_grad()
def insert_directions(
    network: nn.Module,
    images: Tensor,
    pairs: Mapping[nn.Module, int],
    find: Callable[[Tensor, int, int], Tensor],
) -> dict[nn.Module, tuple[int, int]]:
    """Replace the last kernels of some convolutions by directions of what these read, layer by layer in one pass.

    The kernels that stay do not read the directions of the convolution before: they were made without them.

    Each direction comes with its negative (ReLU would lose the half of each that is below the mean), at the mean norm
    of the kernels that stay (unit norm where none does). A layer that is called twice keeps the kernels of its first
    call. BatchNorm normalises by the statistics of ``images`` on the way and keeps them.

    Args:
        network: changed in place; in eval mode afterwards.
        images: ``[n, 3, H, W]``, as the network reads them: a random sample of the dataset.
        pairs: directions to put into each convolution, in the order in which they read each other; where fewer are
            found, the kernels in excess stay.
        find: ``(x, count, kernel_size) -> [m, C, k, k]``, one of the functions above.

    Returns:
        For each convolution that was changed, how many kernels stay, and how many channels, the first ones, these read.

    Raises:
        InputError: a convolution with groups, dilation or an oblong kernel, or with fewer than ``2 * pairs`` kernels.
    """
    for conv, count in pairs.items():
        require_plain("insert_directions", conv, count)
    made: dict[nn.Module, tuple[int, int]] = {}
    previous = dict(itertools.pairwise(reversed(list(pairs))))

    def before(conv: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(conv, nn.Conv2d) and conv not in made:
            found = find(inputs[0], pairs[conv], conv.kernel_size[0])
            kept = conv.weight[: conv.out_channels - 2 * len(found)]
            read, before_it = conv.in_channels, previous.get(conv)
            if before_it in made and read == before_it.out_channels:
                read = made[before_it][0]
                kept[:, read:] = 0
            made[conv] = len(kept), read
            norm = kept.flatten(1).norm(dim=1).mean() if len(kept) else 1.0
            conv.weight[len(kept) :] = norm * torch.cat([found, -found])

    handles = [conv.register_forward_pre_hook(before) for conv, count in pairs.items() if count]
    try:
        with normalising_by_batch(network):
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    return made


def require_plain(where: str, conv: nn.Module, count: int) -> None:
    """Refuse ``count`` pairs for a convolution that cannot take them."""
    if not count:
        return
    if not isinstance(conv, nn.Conv2d) or conv.groups > 1 or {*conv.dilation} != {1} or len({*conv.kernel_size}) > 1:
        rule = "0 for a convolution that is transposed, or has groups, dilation or an oblong kernel"
        raise InputError(message(where, "directions", rule, count))
    if not 0 <= 2 * count <= conv.out_channels:
        raise InputError(message(where, "directions", f"0 to {conv.out_channels // 2}, half the kernels", count))


class Trial(NamedTuple):
    """What directions did to a part of a dataset.

    Attributes:
        helps: whether a ridge head does better with them on images that they were not made from.
        optimism: by which share of it the leave-one-out error is larger on such images than on those that they were
            made from; 0 where they do not help.
        error: the leave-one-out error, 0 to 1, on images that they were not made from.
        images: from how many they were made here; made from m images, they flatter these by about images / m of that.
    """

    helps: bool
    optimism: float = 0.0
    error: float = 0.0
    images: int = 0


@torch.no_grad()
def try_directions(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    insert: Callable[[nn.Module, Tensor, Tensor], object],
) -> Trial:
    """Whether a ridge head does better on a network with the dataset's directions than on the network as it is.

    Better is a negative log-likelihood of the images, each left out, that is clearly lower.

    Cross-fitted: the directions come from one half of the images, the leave-one-out error of the head from the other.
    On the same images directions look better than they are, as they were made with these labels. How much better is
    measured where they help: by directions from the other half, on the same half.

    Args:
        network: stays as it is.
        images: ``[n, 3, H, W]``, a random sample of the dataset; at most ``TRIAL`` of them are used.
        labels: int64 ``[n]``.
        insert: puts directions of such images into a network.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:TRIAL].to(images.device)
    first, second = order[: len(order) // 2], order[len(order) // 2 :]
    classes, answers = labels[second].unique(return_inverse=True)
    if len(classes) < 2 or len(labels[first].unique()) < 2:
        return Trial(False)

    def fitted(trial: nn.Module) -> Head:
        with normalising_by_batch(trial):
            maps = feature_maps(trial, images[second])
        return fit_head("ridge", [(maps, answers)], len(classes))

    def directed(rows: Tensor) -> Head:
        trial = copy.deepcopy(network)
        insert(trial, images[rows], labels[rows])
        return fitted(trial)

    fair = directed(first)
    if not fair.info["loo_nll"] < (1 - HELPS) * fitted(copy.deepcopy(network)).info["loo_nll"]:
        return Trial(False)
    ratio = fair.info["loo_squared_error"] / max(directed(second).info["loo_squared_error"], 1e-12)
    return Trial(True, max(0.0, ratio - 1), 1 - fair.expected_accuracy, len(second))


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
