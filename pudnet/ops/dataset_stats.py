"""Statistics of a labelled dataset: ``image_stats`` of uint8 images, ``class_stats`` of float features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pudnet import _extension, backends
from pudnet.errors import DtypeError, InputError, ShapeError, message
from pudnet.ops import reference
from pudnet.ops._checks import require_no
from pudnet.ops._schemas import empty_class_stats, empty_image_stats

_NATIVE_CHANNELS = 16  # kMaxChannels in csrc/dataset_stats.h


class ImageStats(NamedTuple):
    """Statistics of n images of H x W pixels and C channels in K classes; pixel values are scaled to 0..1."""

    sketch: Tensor  # [n, C, H, W] float32, (pixel - mean) / std
    channel_mean: Tensor  # [C] float32, over every pixel of every image
    channel_var: Tensor  # [C] float32
    means: Tensor  # [K, H * W * C] float32
    variances: Tensor  # [K, H * W * C] float32
    counts: Tensor  # [K] int64


class ClassStats(NamedTuple):
    """Statistics of rows of F features in K classes."""

    means: Tensor  # [K, F]
    variances: Tensor  # [K, F]
    counts: Tensor  # [K] int64


def image_stats(
    images: Tensor,  # [n, H, W, C] uint8
    labels: Tensor,  # [n] int64
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    backend: str | None = None,
) -> ImageStats:
    """Read uint8 images once: the normalised sketch, moments per channel, and statistics per class and pixel.

    Variances are those of the population. A class without images has mean and variance 0. Not differentiable.

    Args:
        images: ``[n, H, W, C]`` uint8.
        labels: ``[n]`` int64 in ``0..num_classes-1``, or -1 for an image of no class: it has its place in the sketch
            and the channel moments, and no part in the class statistics.
        num_classes: K.
        mean: C numbers; the sketch is ``(pixel / 255 - mean) / std``.
        std: C positive numbers.
        backend: a name of ``pudnet.backends.BACKENDS``; by default chosen as described there.

    Raises:
        InputError: an argument of the wrong type, shape or dtype, or a label out of range. On CUDA, where checking the
            labels would wait for the GPU, native marks such a call instead: counts are -1, class statistics NaN.
        BackendUnavailableError: the backend asked for cannot run this call.
    """
    _check_image_stats(images, labels, num_classes, mean, std)
    arguments = (images, labels, num_classes, [float(x) for x in mean], [float(x) for x in std])
    return ImageStats(*backends.call("image_stats", images.device, backend, *arguments))


def class_stats(
    features: Tensor,  # [n, F] float
    labels: Tensor,  # [n] int64
    num_classes: int,
    *,
    backend: str | None = None,
) -> ClassStats:
    """Mean and population variance of the features of every class, and its count; a class without rows has 0.

    Means and variances are differentiable with respect to ``features`` on every backend.

    Args:
        features: ``[n, F]``, float32 or float64.
        labels: ``[n]`` int64 in ``0..num_classes-1``, or -1 for a row of no class.
        num_classes: K.
        backend: a name of ``pudnet.backends.BACKENDS``; by default chosen as described there.

    Raises:
        InputError: as for ``image_stats``.
        BackendUnavailableError: the backend asked for cannot run this call.
    """
    _check_class_stats(features, labels, num_classes)
    return ClassStats(*backends.call("class_stats", features.device, backend, features, labels, num_classes))


def _check_image_stats(
    images: Tensor, labels: Tensor, num_classes: int, mean: Sequence[float], std: Sequence[float]
) -> None:
    _require_tensor("image_stats", "images", images, 4, "[n, H, W, C]")
    if images.dtype != torch.uint8:
        raise DtypeError(message("image_stats", "images", "uint8", images.dtype))
    _require_labels("image_stats", labels, images, num_classes)
    channels = images.shape[3]
    for name, constants in (("mean", mean), ("std", std)):
        if len(constants) != channels:
            raise ShapeError(message("image_stats", name, f"one number per channel ({channels})", list(constants)))
    if min(std) <= 0:
        raise InputError(message("image_stats", "std", "positive", list(std)))


def _check_class_stats(features: Tensor, labels: Tensor, num_classes: int) -> None:
    _require_tensor("class_stats", "features", features, 2, "[n, F]")
    if features.dtype not in (torch.float32, torch.float64):
        raise DtypeError(message("class_stats", "features", "float32 or float64", features.dtype))
    _require_labels("class_stats", labels, features, num_classes)


def _require_tensor(op: str, name: str, value: object, rank: int, shape: str) -> None:
    if not isinstance(value, Tensor):
        raise DtypeError(message(op, name, "a torch.Tensor", type(value).__name__))
    if value.ndim != rank or 0 in value.shape[1:]:
        raise ShapeError(message(op, name, f"of shape {shape} without empty axes after the first", list(value.shape)))


def _require_labels(op: str, labels: Tensor, rows: Tensor, num_classes: int) -> None:
    if not isinstance(labels, Tensor):
        raise DtypeError(message(op, "labels", "a torch.Tensor", type(labels).__name__))
    if labels.dtype != torch.int64:
        raise DtypeError(message(op, "labels", "int64", labels.dtype))
    if labels.ndim != 1 or labels.shape[0] != rows.shape[0]:
        raise ShapeError(message(op, "labels", f"of shape [{rows.shape[0]}]", list(labels.shape)))
    if labels.device != rows.device:
        raise InputError(message(op, "labels", f"on {rows.device}, as the data", labels.device))
    if num_classes < 1:
        raise InputError(message(op, "num_classes", "at least 1", num_classes))


def why_not_native_image_stats(
    images: Tensor, labels: Tensor, num_classes: int, mean: list[float], std: list[float]
) -> list[str]:
    """What keeps native from running this call."""
    if images.shape[3] > _NATIVE_CHANNELS:
        return [f"native image_stats takes up to {_NATIVE_CHANNELS} channels; got {images.shape[3]}"]
    return []


def why_not_native_class_stats(features: Tensor, labels: Tensor, num_classes: int) -> list[str]:
    """What keeps native from running this call."""
    if features.dtype != torch.float32:
        return [f"native class_stats takes float32 features; got {features.dtype}"]
    return []


def _launch(op: str, workspace_sizes: tuple[int, int, int], rows: Tensor, arguments: dict[str, Any]) -> None:
    """Call the extension on the device of ``rows``; tensors among the arguments are passed by address."""
    native = _extension.load()
    plain = {name: x.data_ptr() if isinstance(x, Tensor) else x for name, x in arguments.items()}
    try:
        if rows.device.type == "cpu":
            getattr(native, f"{op}_cpu")(**plain, threads=torch.get_num_threads())
            return
        size = getattr(native, f"{op}_workspace")(*workspace_sizes)
        workspace = torch.empty(size, dtype=torch.uint8, device=rows.device)
        getattr(native, f"{op}_cuda")(
            **plain,
            workspace=workspace.data_ptr(),
            device=rows.device.index,
            stream=torch.cuda.current_stream(rows.device).cuda_stream,
        )
    except ValueError as error:
        raise InputError(str(error)) from error


@torch.library.impl("pudnet::image_stats", ("cpu", "cuda"))
def _image_stats_native(
    images: Tensor, labels: Tensor, num_classes: int, mean: list[float], std: list[float]
) -> tuple[Tensor, ...]:
    _check_image_stats(images, labels, num_classes, mean, std)
    require_no("image_stats", why_not_native_image_stats(images, labels, num_classes, mean, std))
    images, labels = images.contiguous(), labels.contiguous()  # a copy where they are not dense already
    n, height, width, channels = images.shape
    sketch, channel_mean, channel_var, means, variances, counts = outputs = empty_image_stats(
        images, labels, num_classes, mean, std
    )
    arguments = {
        "images": images,
        "labels": labels,
        "n": n,
        "pixels": height * width,
        "channels": channels,
        "classes": num_classes,
        "mean": mean,
        "std": std,
        "sketch": sketch,
        "channel_mean": channel_mean,
        "channel_var": channel_var,
        "counts": counts,
        "means": means,
        "variances": variances,
    }
    _launch("image_stats", (n, height * width * channels, num_classes), images, arguments)
    return outputs


@torch.library.impl("pudnet::class_stats", ("cpu", "cuda"))
def _class_stats_native(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, ...]:
    _check_class_stats(features, labels, num_classes)
    require_no("class_stats", why_not_native_class_stats(features, labels, num_classes))
    labels = labels.contiguous()
    if features.stride(1) != 1:
        features = features.contiguous()  # rows may lie apart, the features of a row may not
    n, width = features.shape
    means, variances, counts = outputs = empty_class_stats(features, labels, num_classes)
    arguments = {
        "features": features,
        "labels": labels,
        "n": n,
        "width": width,
        "row_stride": features.stride(0),
        "classes": num_classes,
        "counts": counts,
        "means": means,
        "variances": variances,
    }
    _launch("class_stats", (n, width, num_classes), features, arguments)
    return outputs


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    features, labels, ctx.num_classes = inputs
    means, _, counts = output
    ctx.mark_non_differentiable(counts)
    ctx.save_for_backward(features, labels, counts, means)


def _class_stats_backward(
    ctx: Any, d_means: Tensor, d_variances: Tensor, d_counts: Tensor | None
) -> tuple[Tensor, None, None]:
    """For a row x of a class of n rows: dx = (d_mean + 2 (x - mean) d_variance) / n."""
    features, labels, counts, means = ctx.saved_tensors
    share = 1 / counts.clamp(min=1).to(features.dtype)[:, None]  # [K, 1]
    labelled = (labels >= 0)[:, None]  # [n, 1]
    index = labels.clamp(min=0)
    d_features = (d_means * share)[index] + 2 * (features - means[index]) * (d_variances * share)[index]  # [n, F]
    return torch.where(labelled, d_features, 0), None, None


torch.library.register_autograd("pudnet::class_stats", _class_stats_backward, setup_context=_save_for_backward)

backends.register_op("image_stats", reference.image_stats)
backends.register_op("class_stats", reference.class_stats)
backends.register(
    "image_stats",
    "native",
    torch.ops.pudnet.image_stats.default,
    devices=("cpu", "cuda"),
    why_not=why_not_native_image_stats,
)
backends.register(
    "class_stats",
    "native",
    torch.ops.pudnet.class_stats.default,
    devices=("cpu", "cuda"),
    why_not=why_not_native_class_stats,
)
