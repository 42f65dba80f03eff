"""Small PNG files by OpenCV: exactly what Pillow gives, and Pillow's word on everything out of the ordinary."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pudnet.data import pillow, png
from pudnet.info import info

pytestmark = pytest.mark.skipif(png.opencv() is None, reason="OpenCV is not installed: pip install 'pudnet[opencv]'")

PLAIN = [("L", 1, 1), ("RGB", 1, 1), ("L", 7, 5), ("RGB", 7, 5), ("RGB", 64, 64), ("L", 28, 28)]


def written(mode: str, width: int = 7, height: int = 5, **options: object) -> bytes:
    """A file of noise."""
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "LA": (2,)}[mode]
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels, mode).save(stream, "PNG", **options)
    return stream.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_chunk(name: bytes, data: bytes, file: bytes) -> bytes:
    """Behind the header."""
    return file[:33] + chunk(name, data) + file[33:]


def with_header(index: int, value: int, file: bytes) -> bytes:
    """With another byte in the header, and the right checksum."""
    header = bytearray(file[16:29])
    header[index] = value
    return file[:8] + chunk(b"IHDR", bytes(header)) + file[33:]


def outcome(path: Path) -> object:
    """Pixels, or why there are none."""
    try:
        return pillow.decode_file(path).tolist()
    except pillow.UnreadableImageError as error:
        return str(error)


def by_pillow(path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    with monkeypatch.context() as patch:
        patch.setattr(png, "opencv", lambda: None)
        return outcome(path)


@pytest.mark.parametrize(("mode", "width", "height"), PLAIN)
def test_pixels_are_those_of_pillow(mode: str, width: int, height: int) -> None:
    file = written(mode, width, height)
    pixels = png.decode_plain_png(file)
    assert pixels is not None and pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, pillow.rgb_array(Image.open(io.BytesIO(file))))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        (b"gAMA", struct.pack(">I", 100_000)),
        (b"cHRM", struct.pack(">8I", *[31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000])),
        (b"sRGB", b"\0"),
        (b"pHYs", struct.pack(">IIB", 1, 2, 0)),
        (b"tIME", bytes([7, 230, 1, 1, 0, 0, 0])),
    ],
)
def test_notes_that_change_no_pixel_do_not_matter(name: bytes, data: bytes) -> None:
    file = with_chunk(name, data, written("RGB"))
    pixels = png.decode_plain_png(file)
    assert pixels is not None
    np.testing.assert_array_equal(pixels, np.array(Image.open(io.BytesIO(file))))


def flipped(file: bytes, at: int) -> bytes:
    return file[:at] + bytes([file[at] ^ 255]) + file[at + 1 :]


def palette() -> bytes:
    stream = io.BytesIO()
    Image.open(io.BytesIO(written("RGB"))).convert("P").save(stream, "PNG")
    return stream.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[274] = 6
    return written("RGB", exif=exif)


OTHERS = {
    "alpha": written("RGBA"),
    "grey and alpha": written("LA"),
    "palette": palette(),
    "16 bits": with_header(8, 16, written("L")),
    "interlaced": with_header(12, 1, written("L")),
    "transparent colour": with_chunk(b"tRNS", bytes(6), written("RGB")),
    "turned": turned(),
    "text, which may be EXIF": with_chunk(b"tEXt", b"Raw profile type exif\0x", written("RGB")),
    "colour profile": with_chunk(b"iCCP", b"x\0\0" + zlib.compress(b"x"), written("RGB")),
    "too many pixels": written("L", 257, 256),
    "a chunk too short for Pillow": with_chunk(b"gAMA", b"\0\0", written("L")),
    "two headers": written("L")[:33] + written("L")[8:],
    "background": with_chunk(b"bKGD", bytes(6), written("RGB")),
    "no pixels": with_header(3, 0, written("L")),
    "wrong checksum": flipped(written("L"), 45),  # in the data of a chunk
    "cut off": written("L")[:-5],
    "no header": png.SIGNATURE + chunk(b"IEND", b""),
    "no picture": b"not an image",
    "nothing": b"",
    "too few pixels in it": with_header(7, 9, written("L")),
    "no stream": png.SIGNATURE + written("L")[8:33] + chunk(b"IDAT", b"?") + chunk(b"IEND", b""),
}


@pytest.mark.parametrize("name", OTHERS)
def test_everything_else_is_left_to_pillow(name: str) -> None:
    assert png.decode_plain_png(OTHERS[name]) is None


def test_a_limit_of_pixels_holds() -> None:
    assert png.decode_plain_png(written("L", 7, 5), most_pixels=35) is not None
    assert png.decode_plain_png(written("L", 7, 5), most_pixels=34) is None


def test_damaged_files_have_the_same_outcome_as_with_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_ = random.Random(0)
    path = tmp_path / "image.png"
    outcomes = set()
    for _ in range(300):
        file = bytearray(written(random_.choice(["L", "RGB"])))
        for _ in range(random_.randrange(3)):
            file[random_.randrange(len(file))] = random_.randrange(256)
        path.write_bytes(file[: random_.choice([len(file), random_.randrange(len(file))])])
        found = outcome(path)
        assert found == by_pillow(path, monkeypatch)
        outcomes.add(type(found))
    assert outcomes == {list, str}


def test_damaged_streams_with_right_checksums_have_the_same_outcome_as_with_pillow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_ = random.Random(0)
    path = tmp_path / "image.png"
    outcomes = set()
    for trial in range(300):
        file = written(random_.choice(["L", "RGB"]))
        stream = bytearray(zlib.decompress(file[41:-16]))
        kind = trial % 3
        if kind == 0:  # other bytes, among them the filters of the lines
            for _ in range(random_.randrange(4)):
                stream[random_.randrange(len(stream))] = random_.randrange(8)
        if kind == 1:  # more or less of it
            stream = (stream + stream)[: random_.randrange(2 * len(stream))]
        packed = bytearray(zlib.compress(stream, random_.randrange(10)))
        if kind == 2:  # damaged after it was packed
            packed[random_.randrange(len(packed))] = random_.randrange(256)
            packed = packed[: random_.choice([len(packed), random_.randrange(len(packed))])]
        cut = random_.randrange(len(packed) + 1)
        parts = [packed] if trial % 2 else [packed[:cut], packed[cut:]]
        data = b"".join(chunk(b"IDAT", bytes(part)) for part in parts)
        path.write_bytes(file[:33] + data + file[-12:])
        found = outcome(path)
        assert found == by_pillow(path, monkeypatch), f"trial {trial}"
        outcomes.add(type(found))
    assert outcomes == {list, str}


@pytest.mark.parametrize("broken", [types.ModuleType("cv2"), None])
def test_a_broken_opencv_is_none(monkeypatch: pytest.MonkeyPatch, broken: types.ModuleType | None) -> None:
    monkeypatch.setitem(sys.modules, "cv2", broken)
    assert png.opencv.__wrapped__() is None


def test_it_is_imported_for_many_files_only(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pudnet.data import open_images\n"
        "open_images(sys.argv[1], size=8).tensors()\nprint('cv2' in sys.modules)"
    )
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    for count in (20, png.WORTH):
        for number in range(count):
            (tmp_path / "ab"[number % 2] / f"{number}.png").write_bytes(written("L"))
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
        assert done.stdout.strip() == str(count == png.WORTH), done.stderr


def test_info_tells_who_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert info()["small_png_files"].startswith("OpenCV")
    monkeypatch.setattr(png, "opencv", lambda: None)
    assert "pip install" in info()["small_png_files"]
