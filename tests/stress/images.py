"""Damaged and hostile images: a folder of them is read, with a reason for each that is not, or refused cleanly."""

from __future__ import annotations

import io
import os
import random
import resource
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pudnet.data import open_images
from pudnet.data.pillow import UnreadableImageError, decode_file
from pudnet.errors import PudnetError
from stress import Figures, part

# More than before: an image of 89 million pixels, Pillow's limit, is read (4 bytes each, in Pillow, as bytes and as an
# array), two at a time where a folder is read with two threads; a larger one is refused before it is decoded.
MIB_LIMIT = 3000
MANY = 20_000  # files of one folder
FORMATS = {
    "PNG": ("L", "RGB", "RGBA", "P", "1", "I;16", "LA"),
    "JPEG": ("L", "RGB", "CMYK"),
    "GIF": ("L", "P", "RGB"),
    "BMP": ("L", "RGB", "P", "1"),
    "TIFF": ("L", "RGB", "RGBA", "I;16", "F", "CMYK", "LAB", "YCbCr", "1", "I"),
    "WEBP": ("RGB", "RGBA"),
    "PPM": ("L", "RGB", "1"),
    "ICO": ("RGBA",),
    "TGA": ("L", "RGB", "RGBA"),
    "DDS": ("RGB", "RGBA"),
    "PCX": ("L", "RGB", "P"),
    "JPEG2000": ("L", "RGB", "RGBA"),
    "SGI": ("L", "RGB"),
}


@part("images", "damaged or hostile image files, and archives of arrays", full=3_000, quick=100)
def run(count: int, seed: int) -> Figures:
    """Each case is one file, decoded alone; every so many of them are read as a folder, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of damaged files
        return _run(count, seed)


def _run(count: int, seed: int) -> Figures:
    failures, outcomes = [], Counter()
    torch.set_num_threads(1)
    start = _peak()
    good = _good_files()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for label in "ab":
            (folder / "mixed" / label).mkdir(parents=True)
            Image.new("RGB", (9, 9)).save(folder / "mixed" / label / "good.png")
        for case in range(count):
            rng = random.Random(f"{seed}/{case}")
            ending = rng.choice([".png", ".jpg", ".gif", ".tif", ".webp", "", ".txt", ".exe", ".JPEG"])
            path = folder / "mixed" / rng.choice("ab") / f"{case % 50}{ending}"
            kind = _write(path, good, rng)
            try:
                array = decode_file(path)
                right = array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] in (1, 3, 4)
                outcomes["read" if right else "wrong"] += 1
                if not right:
                    failures.append(f"case {case} ({kind}): {array.dtype} {array.shape}")
            except UnreadableImageError as error:
                outcomes["refused"] += 1
                if "\n" in str(error) or len(str(error)) > 500:
                    failures.append(f"case {case} ({kind}): a reason of {len(str(error))} characters")
            except BaseException as error:
                failures.append(f"case {case} ({kind}): {type(error).__name__}: {error}"[:300])
            if case % 50 == 49:
                failures += _folder_is_read(folder / "mixed", case)
                outcomes["folders"] += 1
            if case % 5 == 0:
                failures += _archive_is_refused(folder / "case.npz", good, rng, case)
                outcomes["archives"] += 1
        links = _links(folder / "links")
        failures += links
        many, more = _many_files(folder / "many", min(MANY, 4 * count))
        failures += more
    grown = _peak() - start
    if grown > MIB_LIMIT:
        failures.append(f"memory grew by {grown} MiB, more than {MIB_LIMIT}")
    return {
        "failures": failures,
        "outcomes": dict(sorted(outcomes.items())),
        "good_files_by_format_and_mode": len(good),
        "files_of_the_largest_folder": many,
        "mib_grown_at_most": grown,
    }


def _good_files() -> list[tuple[str, bytes]]:
    """One small file of each format and mode that this Pillow can write."""
    draws = np.random.default_rng(0)
    pixels = Image.fromarray(draws.integers(0, 256, (13, 11, 4), dtype=np.uint8))
    files = []
    for format_name, modes in FORMATS.items():
        for mode in modes:
            image = pixels.convert("L").convert("I").convert(mode) if mode == "I;16" else _converted(pixels, mode)
            buffer = io.BytesIO()
            try:
                image.save(buffer, format_name)
            except (OSError, KeyError, ValueError):  # a codec that this Pillow was built without
                continue
            files.append((f"{format_name} {mode}", buffer.getvalue()))
    frames = [pixels.convert("P"), pixels.convert("P").rotate(90), pixels.convert("P").rotate(180)]
    for format_name in ("GIF", "PNG", "WEBP", "TIFF"):
        buffer = io.BytesIO()
        frames[0].save(buffer, format_name, save_all=True, append_images=frames[1:])
        files.append((f"{format_name} animated", buffer.getvalue()))
    return files


def _converted(image: Image.Image, mode: str) -> Image.Image:
    return image.convert("RGB").convert(mode) if mode in ("CMYK", "LAB", "YCbCr") else image.convert(mode)


def _write(path: Path, good: list[tuple[str, bytes]], rng: random.Random) -> str:
    """Write one file of the case; returns what it is."""
    name, data = rng.choice(good)
    way = rng.randrange(8)
    if path.is_symlink() or path.exists():
        path.unlink()
    if way == 0:
        path.write_bytes(data)
        return name
    if way == 1:
        path.write_bytes(data[: rng.randrange(len(data))])
        return f"{name} cut"
    if way == 2:
        side = rng.choice([2**14, 2**16, 2**31 - 1])
        path.write_bytes(_png(side, rng.choice([1, side]), b""))
        return "a bomb"
    if way == 3:
        path.write_bytes(rng.choice([b"", rng.randbytes(200), b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x80\x04.", b"<svg/>"]))
        return "no image"
    if way == 4 and rng.random() < 0.02:
        path.write_bytes(_png(13_000, 6_000, zlib.compress(bytes(6_000 * (13_000 // 8 + 1)), 9)))
        return "a large bitmap"
    changed = bytearray(data)
    for _ in range(rng.choice([1, 2, 8, 40])):
        changed[rng.randrange(rng.choice([32, len(changed)])) % len(changed)] = rng.randrange(256)
    path.write_bytes(bytes(changed))
    return f"{name} changed"


def _png(width: int, height: int, pixels: bytes) -> bytes:
    """A PNG of one bit a pixel that says it has this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _folder_is_read(folder: Path, case: int) -> list[str]:
    """Every file of a folder is read or listed as skipped."""
    files = sum(path.is_file() for path in folder.rglob("*"))
    try:
        source = open_images(folder, size=8)
        images, labels = source.tensors()
    except PudnetError as error:
        return [f"folder at case {case}: {error}"]
    if len(images) + len(source.skipped) != files or images.shape[1:] != (8, 8, 3) or len(labels) != len(images):
        return [f"folder at case {case}: {len(images)} read and {len(source.skipped)} skipped of {files}"]
    return []


def _archive_is_refused(path: Path, good: list[tuple[str, bytes]], rng: random.Random, case: int) -> list[str]:
    """An .npz that is damaged, claims too much or holds pickled objects gives an error of pudnet, or its images."""
    buffer = io.BytesIO()
    images = np.zeros((4, 8, 8, 3), np.uint8)
    np.savez_compressed(buffer, x_train=images, y_train=np.arange(4) % 2)
    data = bytearray(buffer.getvalue())
    way = rng.randrange(4)
    if way == 0:
        data = data[: rng.randrange(len(data))]
    elif way == 1:
        for _ in range(4):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif way == 2:
        buffer = io.BytesIO()
        np.savez(buffer, x_train=images, y_train=np.array([print, open, eval, exec], dtype=object))
        data = bytearray(buffer.getvalue())
    else:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**3, 10**3, 3)}
        )
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("x_train.npy", header.getvalue() + bytes(100))
            archive.writestr("y_train.npy", header.getvalue() + bytes(100))
        data = bytearray(buffer.getvalue())
    path.write_bytes(data)
    try:
        open_images(path, size=8).tensors()
    except PudnetError:
        pass
    except BaseException as error:
        return [f"archive of case {case} (way {way}): {type(error).__name__}: {error}"[:300]]
    return [f"archive of case {case}: objects were read"] if way == 2 and not path.exists() else []


def _links(folder: Path) -> list[str]:
    """Symlinks: out of the folder, to themselves, to a folder above, to nothing, to a device; files without rights."""
    outside = folder / "outside"
    outside.mkdir(parents=True)
    Image.new("RGB", (9, 9), "red").save(outside / "secret.png")
    inside = folder / "inside"
    for label in "ab":
        (inside / label).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(inside / label / "own.png")
    for name, goal in {
        "out.png": outside / "secret.png",
        "folder": outside,
        "loop": inside / "a" / "loop",
        "up": inside,
        "none.png": folder / "nothing",
        "zero": Path("/dev/zero"),
        "own2.png": inside / "b" / "own.png",
        "relative.png": Path("../../outside/secret.png"),
    }.items():
        (inside / "a" / name).symlink_to(goal)
    os.mkfifo(inside / "b" / "pipe.png")
    failures = []
    for follow, expected in ((False, 3), (True, 6)):
        source = open_images(inside, size=8, follow_symlinks=follow)
        images, _ = source.tensors()
        red = int((images[:, 0, 0, 0] > 200).sum())
        if len(images) < expected or (red > 0) != follow:
            failures.append(f"links with follow_symlinks={follow}: {len(images)} images, {red} from outside")
    return failures


def _many_files(folder: Path, count: int) -> tuple[int, list[str]]:
    """A folder of very many files, all links to one, is read with bounded memory."""
    for label in "ab":
        (folder / label).mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(folder / "a" / "0.png")
    for number in range(1, count):
        os.link(folder / "a" / "0.png", folder / "ab"[number % 2] / f"{number}.png")
    source = open_images(folder, size=8, cache_bytes=2**20)
    read = sum(len(labels) for _, labels in source)
    return count, [] if read == count else [f"{read} of {count} files read"]


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
