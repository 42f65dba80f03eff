"""Small PNG files of grey or RGB images, by OpenCV where it is installed: 0.6 of Pillow's time, the same pixels."""

from __future__ import annotations

import functools
import struct
import sys
import zlib
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB = 0, 2  # colour types
MOST_PIXELS = 2**16  # beyond, decompression takes most of the time, and OpenCV starts threads of its own
# Chunks that change neither the pixels that Pillow gives nor how a picture is turned, and how long they are.
HARMLESS = {b"IHDR": 13, b"IEND": 0, b"sRGB": 1, b"gAMA": 4, b"cHRM": 32, b"pHYs": 9, b"tIME": 7}
WORTH = 500  # files that have to be read for OpenCV to be imported, which takes as long as so many save


@functools.cache
def opencv() -> Any | None:
    """OpenCV's module, imported; None where it is not installed or does not work."""
    try:
        import cv2

        return cv2 if callable(cv2.imdecode) and callable(cv2.cvtColor) and issubclass(cv2.error, Exception) else None
    except Exception:  # mixed or half removed installations raise nearly anything
        return None


def decode_plain_png(file: bytes, most_pixels: int | None = None) -> Array | None:
    """Pixels of a file, uint8 ``[H, W, 1]`` or ``[H, W, 3]``, exactly as Pillow gives them; None for Pillow to read.

    Only where OpenCV has been imported, and only PNG files of 8 bits, grey or RGB, not interlaced, with at most 2^16
    pixels (and ``most_pixels``), right checksums, and without transparency, EXIF data, frames, text or else.
    A damaged stream with a right checksum is left to Pillow too, after libpng wrote a line about it to stderr.
    """
    most = MOST_PIXELS if most_pixels is None else min(most_pixels, MOST_PIXELS)
    if "cv2" not in sys.modules or not _is_plain(file, most) or (cv2 := opencv()) is None:
        return None
    try:
        pixels: Array | None = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    if pixels is None:
        return None
    return pixels[..., None] if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def _is_plain(file: bytes, most_pixels: int) -> bool:
    if not file.startswith(SIGNATURE):
        return False
    at, name = len(SIGNATURE), b""
    try:
        while name != b"IEND":
            begins = at == len(SIGNATURE)
            length, name = struct.unpack_from(">I4s", file, at)
            end = at + 8 + length
            if (name != b"IDAT" and HARMLESS.get(name) != length) or begins != (name == b"IHDR"):
                return False
            if zlib.crc32(file[at + 4 : end]) != struct.unpack_from(">I", file, end)[0]:
                return False
            if begins:
                width, height, *kind = struct.unpack_from(">IIBBBBB", file, at + 8)
                if kind not in ([8, GREY, 0, 0, 0], [8, RGB, 0, 0, 0]) or not 0 < width * height <= most_pixels:
                    return False
            at = end + 4
    except struct.error:  # the file ends too soon
        return False
    return True
