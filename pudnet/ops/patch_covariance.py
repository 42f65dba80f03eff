"""``patch_covariance``: mean and covariance of the k x k patches of images or activations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pudnet import _extension, backends
from pudnet.errors import DtypeError, InputError, ShapeError, message
from pudnet.ops import reference
from pudnet.ops._checks import require_no, require_rank
from pudnet.ops._schemas import empty_patch_covariance

_BACKWARD_ELEMENTS = 2**22  # of the temporary arrays of the gradient, which takes images in pieces


class PatchCovariance(NamedTuple):
    """Statistics of patches of P = C * k * k values, in the order (channel, row, column) of ``torch.nn.Unfold``.

    The axis B is there for images with five axes, the axis K where labels were given.
    """

    means: Tensor  # [B, K, P]
    covariances: Tensor  # [B, K, P, P], of the population
    counts: Tensor  # [B, K] int64, patches


def patch_covariance(
    images: Tensor,  # [n, C, H, W] or [B, n, C, H, W]
    labels: Tensor | None = None,  # [n] or [B, n] int64
    num_classes: int | None = None,
    *,
    kernel_size: int = 3,
    padding: int = 0,
    backend: str | None = None,
) -> PatchCovariance:
    """Mean and covariance of all k x k patches, per dataset or per class, without writing the patches out.

    Patches are taken at every valid position: stride 1, ``padding`` zeros around the image, as in ``torch.nn.Unfold``.
    A class without images has mean and covariance 0. Means and covariances are differentiable with respect to
    ``images`` on every backend. Native multiplies deviations from the mean of each channel, in float32 over a few
    thousand pixels and in float64 beyond: errors are near 1e-6 of the mean squares of these deviations.

    Args:
        images: ``[n, C, H, W]``, or ``[B, n, C, H, W]`` for B datasets; float32 or float64; any strides.
        labels: ``[n]`` or ``[B, n]`` int64 in ``0..num_classes-1``, or -1 for an image of no class. Without labels the
            statistics are of all images of a dataset, and the axis K is left out.
        num_classes: K; given if and only if labels are.
        kernel_size: k.
        padding: zeros added on each side; 0 keeps to patches inside the image.
        backend: a name of ``pudnet.backends.BACKENDS``; by default chosen as described there. Native needs memory for
            P * P / 2 float64 numbers beside the result on the CPU, and at most 256 MB or P * P * B * K float64 numbers,
            whichever is more, on CUDA.

    Raises:
        InputError: an argument of the wrong type, shape or dtype, an image smaller than the kernel, or a label out of
            range; on CUDA native marks the latter instead: counts are -1, statistics NaN.
        BackendUnavailableError: the backend asked for cannot run this call.
    """
    if not isinstance(images, Tensor):
        raise DtypeError(message("patch_covariance", "images", "a torch.Tensor", type(images).__name__))
    if images.dtype not in (torch.float32, torch.float64):
        raise DtypeError(message("patch_covariance", "images", "float32 or float64", images.dtype))
    if images.ndim not in (4, 5) or 0 in images.shape[-3:]:
        rule = "of shape [n, C, H, W] or [B, n, C, H, W] without empty axes C, H, W"
        raise ShapeError(message("patch_covariance", "images", rule, list(images.shape)))
    _check_kernel(images, kernel_size, padding)
    if (labels is None) != (num_classes is None):
        raise InputError(message("patch_covariance", "num_classes", "given if and only if labels are", num_classes))
    rows = images.shape[:-3]
    if labels is None:
        classes, index = 1, torch.zeros(rows, dtype=torch.int64, device=images.device)
    else:
        classes, index = _require_labels(labels, images, num_classes), labels
    batched = images.ndim == 5
    if not batched:
        images, index = images[None], index[None]
    arguments = (images, index, classes, kernel_size, padding)
    means, covariances, counts = backends.call("patch_covariance", images.device, backend, *arguments)
    if labels is None:
        means, covariances, counts = means[:, 0], covariances[:, 0], counts[:, 0]
    if not batched:
        means, covariances, counts = means[0], covariances[0], counts[0]
    return PatchCovariance(means, covariances, counts)


def _check_kernel(images: Tensor, kernel_size: int, padding: int) -> None:
    if padding < 0:
        raise InputError(message("patch_covariance", "padding", "at least 0", padding))
    largest = min(images.shape[-2:]) + 2 * padding
    if not 1 <= kernel_size <= largest:
        rule = f"from 1 to {largest}, the size of an image with its padding"
        raise InputError(message("patch_covariance", "kernel_size", rule, kernel_size))


def _require_labels(labels: object, images: Tensor, num_classes: int | None) -> int:
    """Check labels against images; return K."""
    if not isinstance(labels, Tensor):
        raise DtypeError(message("patch_covariance", "labels", "a torch.Tensor", type(labels).__name__))
    if labels.dtype != torch.int64:
        raise DtypeError(message("patch_covariance", "labels", "int64", labels.dtype))
    if labels.shape != images.shape[:-3]:
        rule = f"of shape {list(images.shape[:-3])}"
        raise ShapeError(message("patch_covariance", "labels", rule, list(labels.shape)))
    if labels.device != images.device:
        raise InputError(message("patch_covariance", "labels", f"on {images.device}, as the images", labels.device))
    if num_classes is None or num_classes < 1:
        raise InputError(message("patch_covariance", "num_classes", "at least 1", num_classes))
    return num_classes


def why_not_native(images: Tensor, labels: Tensor, num_classes: int, kernel_size: int, padding: int) -> list[str]:
    """What keeps native from running this call."""
    if images.dtype != torch.float32:
        return [f"native patch_covariance takes float32 images; got {images.dtype}"]
    return []


@torch.library.impl("pudnet::patch_covariance", ("cpu", "cuda"))
def _native(
    images: Tensor, labels: Tensor, num_classes: int, kernel_size: int, padding: int, instruction_set: str = ""
) -> tuple[Tensor, Tensor, Tensor]:
    require_rank("patch_covariance", "images", images, 5)
    classes = _require_labels(labels, images, num_classes)
    _check_kernel(images, kernel_size, padding)
    require_no("patch_covariance", why_not_native(images, labels, classes, kernel_size, padding))
    module = _extension.load()
    batch, n = labels.shape
    groups = batch * num_classes
    outputs = empty_patch_covariance(images, labels, num_classes, kernel_size, padding)
    means, covariances, counts = outputs
    if batch == 0:
        return outputs
    index = reference.group_by_dataset("patch_covariance", labels, num_classes, nobody=-1)  # [B * n]
    flat = images.reshape(batch * n, *images.shape[2:])  # a copy only where datasets and images do not share a stride
    arguments: dict[str, Any] = {
        "images": flat.data_ptr(),
        "groups": index.data_ptr(),
        "sizes": list(flat.shape),
        "strides": list(flat.stride()),
        "group_count": groups,
        "kernel": kernel_size,
        "padding": padding,
        "means": means.data_ptr(),
        "covariances": covariances.data_ptr(),
        "counts": counts.data_ptr(),
    }
    if images.device.type == "cpu":
        try:
            module.patch_covariance_cpu(**arguments, threads=torch.get_num_threads(), instruction_set=instruction_set)
        except ValueError as error:
            raise InputError(str(error)) from error
        return outputs
    size = module.patch_covariance_workspace(len(flat), flat.shape[1], groups, means.shape[2])
    workspace = torch.empty(size, dtype=torch.uint8, device=images.device)
    module.patch_covariance_cuda(
        **arguments,
        workspace=workspace.data_ptr(),
        device=images.device.index,
        stream=torch.cuda.current_stream(images.device).cuda_stream,
    )
    return outputs


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    images, labels, _, ctx.kernel_size, ctx.padding = inputs
    means, _, counts = output
    ctx.mark_non_differentiable(counts)
    ctx.save_for_backward(images, labels, means, counts)


def _backward(
    ctx: Any, d_means: Tensor, d_covariances: Tensor, d_counts: Tensor | None
) -> tuple[Tensor, None, None, None, None]:
    """For a patch p of a class of N: dp = (d_mean + (d_cov + d_cov^T) (p - mean)) / N; patches are then folded back."""
    images, labels, means, counts = ctx.saved_tensors
    batch, n, channels, height, width = images.shape
    patch = means.shape[2]
    share = 1 / counts.clamp(min=1).to(means.dtype)[:, :, None]  # [B, K, 1]
    d_mean = (d_means * share).view(-1, patch)  # [B * K, P]
    d_product = ((d_covariances + d_covariances.transpose(2, 3)) * share[..., None]).view(-1, patch, patch)
    means = means.view(-1, patch)
    dataset = torch.arange(batch, device=labels.device)[:, None]
    index = (labels.clamp(min=0) + counts.shape[1] * dataset).reshape(-1)  # [B * n]
    labelled = (labels >= 0).reshape(-1, 1, 1)  # [B * n, 1, 1]
    kernel, padding = ctx.kernel_size, ctx.padding
    positions = (height + 2 * padding - kernel + 1) * (width + 2 * padding - kernel + 1)
    size = max(1, _BACKWARD_ELEMENTS // max(patch**2, patch * positions))
    pieces = []
    flat = images.reshape(batch * n, channels, height, width)
    for piece, at, known in zip(flat.split(size), index.split(size), labelled.split(size), strict=True):
        deviations = F.unfold(piece, kernel, padding=padding) - means[at][:, :, None]  # [m, P, positions]
        d_patches = torch.where(known, d_mean[at][:, :, None] + d_product[at] @ deviations, 0)
        pieces.append(F.fold(d_patches, (height, width), kernel, padding=padding))
    return torch.cat(pieces).view_as(images), None, None, None, None


torch.library.register_autograd("pudnet::patch_covariance", _backward, setup_context=_save_for_backward)
backends.register_op("patch_covariance", reference.patch_covariance)
backends.register(
    "patch_covariance",
    "native",
    torch.ops.pudnet.patch_covariance.default,
    devices=("cpu", "cuda"),
    why_not=why_not_native,
)
