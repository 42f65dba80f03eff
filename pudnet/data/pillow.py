"""Image files and Pillow images of every mode as uint8 RGB arrays."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

import numpy as np

from pudnet.data.png import Array, decode_plain_png
from pudnet.errors import InputError, message

if TYPE_CHECKING:
    from PIL.Image import Image

SMALL_FILE = 2**20  # bytes


def rgb_array(image: Image) -> Array:
    """One Pillow image of any mode as uint8 [H, W, 3] or, where it has transparency, [H, W, 4]; grey as [H, W, 1].

    The first frame is taken, turned upright by its EXIF orientation. 16-bit grey keeps its upper 8 bits (as Pillow does
    with 16-bit colour); float grey counts as 0..1 if nothing exceeds 1, as 0..255 otherwise.

    Raises:
        ValueError: a float image holds NaN or infinity.
        OSError: the pixels cannot be decoded.
    """
    from PIL import ExifTags, ImageOps

    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # it would copy an upright image
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.array(image)  # changed in place: large images take much memory as it is
        if image.mode == "F":
            if not np.isfinite(values).all():
                raise ValueError("float pixels that are NaN or infinite")
            if values.max() <= 1:
                values *= 255
            np.rint(values, out=values)
        else:  # "I" is 32-bit, in practice a 16-bit file
            values >>= 8
        grey: Array = values.clip(0, 255, out=values).astype(np.uint8)[..., None]
        return grey
    plain = "transparency" not in image.info
    if image.mode in ("1", "L") and plain:
        return np.array(image if image.mode == "L" else image.convert("L"))[..., None]
    if image.mode == "RGB" and plain:
        return np.array(image)
    transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or not plain
    if image.mode == "La":  # Pillow converts premultiplied grey to LA only
        image = image.convert("LA")
    return np.array(image.convert("RGBA" if transparent else "RGB"))


class UnreadableImageError(ValueError):
    """An image file cannot be read; the text is the reason, in one line."""


def decode_file(path: str | os.PathLike[str]) -> Array:
    """Decode one image file to uint8 [H, W, C]; see :func:`rgb_array`.

    Raises:
        UnreadableImageError: the file is missing, truncated, no image, or beyond Pillow's decompression bomb limit.
    """
    from PIL import Image, UnidentifiedImageError

    limit = Image.MAX_IMAGE_PIXELS
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > SMALL_FILE:  # which may be no image
                image = Image.open(file)
            else:
                content = file.read()
                if (pixels := decode_plain_png(content, limit)) is not None:
                    return pixels
                image = Image.open(io.BytesIO(content))  # Pillow reads in small pieces: a fifth faster from memory
            if image.format == "EPS":  # Pillow would hand it to an external PostScript interpreter
                raise ValueError("PostScript is not read")
            if limit is not None and image.width * image.height > limit:
                raise ValueError(f"{image.width} x {image.height} pixels, more than Pillow's limit of {limit}")
            return rgb_array(image)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError("not an image that Pillow can read") from error
    except Exception as error:  # decoders of damaged files raise nearly anything
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableImageError(" ".join(text.split())) from error


def read_image(path: str | os.PathLike[str]) -> Array:
    """Read one image file as uint8 [H, W, C], C 1, 3 or 4; see :func:`rgb_array`.

    Raises:
        InputError: the file cannot be read as an image.
    """
    try:
        return decode_file(path)
    except UnreadableImageError as error:
        raise InputError(message("read_image", "path", "an image file", f"{os.fspath(path)!r} ({error})")) from error
