"""From uint8 images of any size to the normalised float input of a network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pudnet.errors import DtypeError, InputError, ShapeError, message

WHERE = "preprocess"
LARGEST_SIDE = 1024  # a batch of 32 takes 0.4 GB, and some times as much in a network: what a file asks for is bounded


@dataclass(frozen=True)
class Preprocess:
    """Size and normalisation constants of a network's input; they are stored in its checkpoint.

    Attributes:
        size: side of the square input, in pixels.
        mean: mean of each RGB channel, in units of 0..1.
        std: standard deviation of each RGB channel, in units of 0..1.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or not 1 <= self.size <= LARGEST_SIDE:
            raise InputError(message("Preprocess", "size", f"an integer from 1 to {LARGEST_SIDE}", repr(self.size)))
        for name in ("mean", "std"):
            try:
                values = tuple(float(value) for value in getattr(self, name))
            except (TypeError, ValueError, OverflowError):
                values = ()
            if len(values) != 3 or not all(math.isfinite(value) for value in values):
                raise InputError(message("Preprocess", name, "three finite numbers", repr(getattr(self, name))))
            object.__setattr__(self, name, values)
        if min(self.std) <= 0:
            raise InputError(message("Preprocess", "std", "positive", repr(self.std)))

    def resize(self, images: Any) -> Tensor:
        """Bring images to RGB and to ``size``: the shorter side becomes ``size``, then the centre is cut out.

        Grey images become three equal channels; transparent ones are laid on white, as a viewer would show them (the
        colours hidden under full transparency are arbitrary). Images that are right already come back uncopied.

        Args:
            images: uint8 [n, H, W, C] with C 1 (grey), 3 (RGB) or 4 (RGBA), or [n, H, W] (grey); numpy or torch.
                A list of single images [H, W, C] or [H, W] may mix sizes and channels.

        Returns:
            uint8 [n, size, size, 3], on the device of ``images``.

        Raises:
            ShapeError, DtypeError: the images are not as said above.
        """
        if isinstance(images, (list, tuple)):
            if not images:
                return torch.empty(0, self.size, self.size, 3, dtype=torch.uint8)
            return torch.cat([self.resize(uint8_image(image, WHERE)) for image in images])
        batch = uint8_batch(images, WHERE)
        if batch.shape[3] == 4:
            batch = _on_white(batch)
        batch = _resize(batch, self.size)
        return batch if batch.shape[3] == 3 else batch.expand(-1, -1, -1, 3).contiguous()

    def normalise(self, images: Any) -> Tensor:
        """Scale uint8 RGB [n, H, W, 3] to 0..1, subtract ``mean``, divide by ``std``: float32 [n, 3, H, W]."""
        batch = uint8_batch(images, WHERE)
        if batch.shape[3] != 3:
            raise ShapeError(message(WHERE, "images", "RGB [n, H, W, 3]", tuple(batch.shape), "Call resize first."))
        # One multiplication and one addition per value: x / (255 std) - mean / std.
        std = torch.tensor(self.std, dtype=torch.float64)
        shift = -torch.tensor(self.mean, dtype=torch.float64) / std
        scale = (1 / (255 * std)).to(batch.device, torch.float32).view(3, 1, 1)
        planes = batch.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)  # [n, 3, H, W]
        return planes.mul_(scale).add_(shift.to(batch.device, torch.float32).view(3, 1, 1))

    def __call__(self, images: Any) -> Tensor:
        """uint8 images of any size -> float32 [n, 3, size, size]; see :meth:`resize` and :meth:`normalise`."""
        return self.normalise(self.resize(images))

    def to_dict(self) -> dict[str, Any]:
        """The constants as plain numbers and lists, fit for JSON."""
        return {"size": self.size, "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """The inverse of :meth:`to_dict`.

        Raises:
            InputError: a key is missing or a value is not allowed.
        """
        missing = [key for key in ("size", "mean", "std") if key not in values]
        if missing:
            raise InputError(message("Preprocess.from_dict", "values", "a dict of size, mean and std", sorted(values)))
        return cls(size=values["size"], mean=values["mean"], std=values["std"])


def uint8_batch(images: Any, where: str) -> Tensor:
    """Check a batch of uint8 images and give it as a tensor [n, H, W, C], uncopied where possible.

    Raises:
        ShapeError: not [n, H, W] or [n, H, W, C] with C 1, 3 or 4, or an empty side.
        DtypeError: neither a numpy array nor a tensor, or not uint8.
    """
    if not isinstance(images, (np.ndarray, Tensor)):
        raise DtypeError(message(where, "images", "a numpy array or a torch tensor", type(images).__name__))
    if images.dtype not in (np.uint8, torch.uint8):
        hint = "Scale values to 0..255, round them and convert them to uint8."
        raise DtypeError(message(where, "images", "uint8", images.dtype, hint))
    shape = tuple(images.shape)
    if len(shape) == 3 and shape[2] in (1, 3, 4):
        hint = "For a single image add the batch axis: images[None]."
        raise ShapeError(message(where, "images", "[n, H, W, C] or grey [n, H, W]", list(shape), hint))
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3, 4)) or 0 in shape[1:]:
        rule = "[n, H, W, C] with C 1, 3 or 4, or grey [n, H, W], without an empty side"
        raise ShapeError(message(where, "images", rule, list(shape)))
    batch = images.detach() if isinstance(images, Tensor) else array_tensor(images)
    return batch if batch.ndim == 4 else batch.unsqueeze(3)


def uint8_image(image: Any, where: str) -> Any:
    """Add the batch axis to one image [H, W] or [H, W, C]; :func:`uint8_batch` checks the rest."""
    if isinstance(image, (np.ndarray, Tensor)) and image.ndim not in (2, 3):
        raise ShapeError(message(where, "each image of a list", "[H, W, C] or [H, W]", list(image.shape)))
    if not isinstance(image, (np.ndarray, Tensor)):
        return image
    return image[None, :, :, None] if image.ndim == 2 else image[None]


def array_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """A tensor that shares the array's memory, or a copy where torch cannot share it (read-only, reversed axes)."""
    shareable = array.flags.writeable and all(stride >= 0 for stride in array.strides)
    return torch.from_numpy(array if shareable else array.copy())


def _on_white(images: Tensor) -> Tensor:
    """Lay uint8 RGBA [n, H, W, 4] on white: uint8 [n, H, W, 3], rounded to nearest."""
    colour, alpha = images[..., :3].int(), images[..., 3:].int()
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).to(torch.uint8)


def _resize(images: Tensor, size: int) -> Tensor:
    """Resize uint8 [n, H, W, C] to [n, size, size, C]: shorter side to ``size``, then the centre.

    Antialiased bilinear interpolation, as Pillow's ``BILINEAR``.
    """
    height, width = images.shape[1:3]
    if height == size and width == size:
        return images
    if len(images) == 0:
        return images.new_empty(0, size, size, images.shape[3])
    short = min(height, width)
    # What lies beyond twice the shorter side cannot reach the centre; a 1 x 100000 image must not become 32 x 3200000.
    images = _centre(images, min(height, 2 * short), min(width, 2 * short))
    height, width = images.shape[1:3]
    target = [max(size, round(side * size / short)) for side in (height, width)]
    planes = images.permute(0, 3, 1, 2)  # [n, C, H, W]
    if planes.device.type == "cpu":
        planes = F.interpolate(planes, size=target, mode="bilinear", antialias=True)
    else:  # only the CPU interpolates uint8 directly; the two differ by one grey level at most
        planes = F.interpolate(planes.float(), size=target, mode="bilinear", antialias=True)
        planes = planes.round_().clamp_(0, 255).to(torch.uint8)
    return _centre(planes.permute(0, 2, 3, 1), size, size).contiguous()


def _centre(images: Tensor, height: int, width: int) -> Tensor:
    """The centre ``height`` x ``width`` of [n, H, W, C], as a view."""
    top, left = (images.shape[1] - height) // 2, (images.shape[2] - width) // 2
    return images[:, top : top + height, left : left + width]
