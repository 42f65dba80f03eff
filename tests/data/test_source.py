import io
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from pudnet.data import ImageSource, open_images
from pudnet.errors import DtypeError, InputError, ShapeError

Image = pytest.importorskip("PIL.Image")
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(path: Path, colour: tuple[int, ...] | int = (10, 200, 30), size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(colour, int) else "RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label, name in enumerate(("ant", "bee", "cow")):
        for number in range(4 + label):
            write(tmp_path / "root" / name / f"{number}.png", (50 * label, 10 * number, 7))
    return tmp_path / "root"


def check_passes(source: ImageSource, size: int, count: int, batch: int = 256) -> tuple[Tensor, Tensor]:
    """Two interleaved passes and tensors() agree; shapes and dtypes are as promised."""
    pairs = list(zip(source, source, strict=True))
    for (images, labels), (again, labels_again) in pairs:
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert images.shape == (len(labels), size, size, 3) and 0 < len(labels) <= batch
        assert torch.equal(images, again) and torch.equal(labels, labels_again)
    images, labels = source.tensors()
    assert torch.equal(images, torch.cat([pair[0][0] for pair in pairs]))
    assert torch.equal(labels, torch.cat([pair[0][1] for pair in pairs]))
    assert len(labels) == count
    assert source.counts == tuple(torch.bincount(labels, minlength=len(source.classes)).tolist())
    return images, labels


# Folders


@pytest.mark.parametrize("cache_bytes", [0, 700, 2**20])
@pytest.mark.parametrize("batch", [1, 4, 256])
def test_folder(folder: Path, cache_bytes: int, batch: int) -> None:
    source = open_images(folder, size=8, batch_size=batch, cache_bytes=cache_bytes)
    assert source.classes == ("ant", "bee", "cow") and source.counts is None
    images, labels = check_passes(source, 8, 15, batch)
    assert source.counts == (4, 5, 6) and source.skipped == () and source.warnings == ()
    assert labels.tolist() == [0] * 4 + [1] * 5 + [2] * 6
    assert images[6, 3, 3].tolist() == [50, 20, 7]
    assert torch.equal(open_images(str(folder), size=8).tensors()[0], images)


@pytest.mark.parametrize("quick", [0.0, 1e9])
def test_files_are_decoded_one_by_one_or_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: float
) -> None:
    monkeypatch.setattr("pudnet.data.folder.QUICK", quick)
    for number in range(70):
        write(tmp_path / f"{number % 2}" / f"{number:02}.png", (number, 0, 255 - number), (8, 8))
    (tmp_path / "1" / "07.png").write_text("no image")
    source = open_images(tmp_path, size=8, batch_size=32)
    images, _ = check_passes(source, 8, 69, 32)
    assert images[:, 0, 0, 0].tolist() == [*range(0, 70, 2), *(number for number in range(1, 70, 2) if number != 7)]
    assert [Path(path).name for path, _ in source.skipped] == ["07.png"]


def test_files_of_many_shapes_are_resized_as_each_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pudnet.data.folder.QUICK", 1e9)
    monkeypatch.setattr("pudnet.data.folder.TOGETHER", 2500)
    shapes = [(20, 31, 3)] * 3 + [(30, 18)] + [(16, 16, 3)] * 9 + [(64, 64, 3), (20, 31, 3)]
    images = [noise(*shapes[number % len(shapes)], seed=number) for number in range(70)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "ab"[number >= 35] / f"{number:02}.png")
    found = open_images(tmp_path, size=16).tensors()[0]
    assert torch.equal(found, open_images(images, [0] * 35 + [1] * 35, size=16).tensors()[0])


def test_an_abandoned_pass_does_no_harm(folder: Path) -> None:
    source = open_images(folder, size=8, batch_size=2)
    next(iter(source))
    assert source.counts is None
    check_passes(source, 8, 15, 2)


def test_files_and_arrays_are_resized_alike(tmp_path: Path) -> None:
    images = [noise(33, 50, 3), noise(64, 64, 3, seed=1)]
    for name, image in zip("ab", images, strict=True):
        (tmp_path / name).mkdir()
        Image.fromarray(image).save(tmp_path / name / "x.png")
    from_files = open_images(tmp_path, size=16).tensors()[0]
    assert torch.equal(from_files, open_images(images, [0, 1], size=16).tensors()[0])
    assert torch.equal(from_files[:1], open_images(images[0][None], ["a"], size=16, classes=["a", "b"]).tensors()[0])


def test_unreadable_files_are_skipped_and_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = io.BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(whole, "JPEG")
    (folder / "ant" / "cut.jpg").write_bytes(whole.getvalue()[:1500])
    png = io.BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(png, "PNG")
    (folder / "ant" / "cut.png").write_bytes(png.getvalue()[:5000])
    (folder / "bee" / "notes.txt").write_text("no image")
    (folder / "bee" / "empty.jpg").write_bytes(b"")
    (folder / "cow" / "drawing.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    (folder / "labels.csv").write_text("a,b")
    (folder / "cow" / ".hidden.png").write_text("x")
    (folder / ".cache").mkdir()
    write(folder / "cow" / "huge.png", 3, (60, 60))
    os.mkfifo(folder / "cow" / "pipe")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 500)
    with pytest.warns(Image.DecompressionBombWarning):
        source = open_images(folder, size=8, batch_size=3)
        check_passes(source, 8, 15, 3)
    assert source.counts == (4, 5, 6) and source.classes == ("ant", "bee", "cow")
    reasons = {str(Path(path).relative_to(folder)): reason for path, reason in source.skipped}
    assert set(reasons) == {"ant/cut.jpg", "ant/cut.png", "bee/notes.txt", "bee/empty.jpg", "cow/drawing.eps",
                            "labels.csv", "cow/huge.png", "cow/pipe"}  # fmt: skip
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    again = open_images(folder, size=8)
    with pytest.warns(Image.DecompressionBombWarning):
        again.tensors()
    reasons.update({str(Path(path).relative_to(folder)): reason for path, reason in again.skipped})
    assert "limit" in reasons["cow/huge.png"]  # beyond the limit, and twice the limit, below
    assert "limit" in reasons["ant/cut.png"]
    assert reasons["bee/notes.txt"] == reasons["bee/empty.jpg"] == "not an image that Pillow can read"
    assert reasons["cow/drawing.eps"] == "PostScript is not read"
    assert all("\n" not in reason for reason in reasons.values())


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png"])
def test_truncated_files(folder: Path, name: str) -> None:
    data = io.BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(data, "JPEG" if name.endswith("jpg") else "PNG")
    (folder / "ant" / name).write_bytes(data.getvalue()[: len(data.getvalue()) // 2])
    source = open_images(folder, size=8)
    check_passes(source, 8, 15)
    assert [Path(path).name for path, _ in source.skipped] == [name] and "truncated" in source.skipped[0][1]


def test_a_class_without_readable_images(folder: Path) -> None:
    (folder / "dog").mkdir()
    with pytest.raises(InputError, match="none of 'dog'"):
        open_images(folder, size=8)
    (folder / "dog" / "x.jpg").write_text("no image")
    source = open_images(folder, size=8)
    for _ in range(2):
        with pytest.raises(InputError, match="none of 'dog'"):
            source.tensors()
    assert len(source.skipped) == 1


def test_a_class_with_one_image_is_a_warning(folder: Path) -> None:
    write(folder / "dog" / "only.png")
    source = open_images(folder, size=8)
    source.tensors()
    assert len(source.warnings) == 1 and "'dog'" in source.warnings[0]
    values = open_images(noise(5, 8, 8, 3), [0, 0, 1, 2, 2], size=8)
    assert len(values.warnings) == 1 and "'1'" in values.warnings[0]


def test_missing_empty_and_flat_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="existing folder"):
        open_images(tmp_path / "none", size=8)
    with pytest.raises(InputError, match="sub-folder"):
        open_images(tmp_path, size=8)
    write(tmp_path / "loose.png")
    with pytest.raises(InputError, match="sub-folder"):
        open_images(tmp_path, size=8)
    write(tmp_path / "ant" / "a.png")
    with pytest.raises(InputError, match="at least 2 classes"):
        open_images(tmp_path, size=8)


def test_symlinks(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    write(outside / "o.png", (1, 2, 3))
    (folder / "ant" / "o.png").symlink_to(outside / "o.png")
    (folder / "dog").symlink_to(outside)
    (folder / "bee" / "inner.png").symlink_to(folder / "cow" / "0.png")
    (folder / "bee" / "loop").symlink_to(folder / "bee")
    (folder / "bee" / "self").symlink_to(folder / "bee" / "self")
    (folder / "bee" / "broken.png").symlink_to(folder / "bee" / "gone.png")
    source = open_images(folder, size=8)
    check_passes(source, 8, 16)
    assert source.classes == ("ant", "bee", "cow")
    reasons = {Path(path).name: reason for path, reason in source.skipped}
    assert set(reasons) == {"o.png", "dog", "loop", "self", "broken.png"}
    assert "leaves" in reasons["o.png"] and "leaves" in reasons["dog"] and "lies in" in reasons["loop"]
    followed = open_images(folder, size=8, follow_symlinks=True)
    check_passes(followed, 8, 18)
    assert followed.classes == ("ant", "bee", "cow", "dog")
    # The folder itself may be a link.
    (tmp_path / "link").symlink_to(folder)
    check_passes(open_images(tmp_path / "link", size=8), 8, 16)
    only = tmp_path / "only"
    only.mkdir()
    (only / "dog").symlink_to(outside)
    with pytest.raises(InputError, match="follow_symlinks"):
        open_images(only, size=8)


def test_what_was_opened_is_taken_as_it_is(folder: Path) -> None:
    source = open_images(folder, size=8)
    assert open_images(source, size=8) is source and open_images(source, size=8, classes=source.classes) is source
    with pytest.raises(InputError, match="size=9"):
        open_images(source, size=9)
    with pytest.raises(InputError, match="classes"):
        open_images(source, size=8, classes=["ant", "bee"])
    with pytest.raises(InputError, match="labels"):
        open_images(source, [0], size=8)


def test_images_in_deeper_folders(folder: Path) -> None:
    write(folder / "ant" / "2024" / "may" / "x.png")
    write(folder / "ant" / ".thumbs" / "x.png")
    check_passes(open_images(folder, size=8), 8, 16)


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_folder_with_splits(tmp_path: Path, test_name: str) -> None:
    for part, count in (("train", 3), (test_name, 2)):
        for name in ("a", "b", "c"):
            for number in range(count):
                write(tmp_path / part / name / f"{number}.png")
    assert open_images(tmp_path, size=8).tensors()[1].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert open_images(tmp_path, size=8, split="test").tensors()[1].tolist() == [0, 0, 1, 1, 2, 2]
    write(tmp_path / test_name / "d" / "0.png")
    for split in ("train", "test"):
        with pytest.raises(InputError, match=r"training|train'.*also 'd'"):
            open_images(tmp_path, size=8, split=split)


def test_unlabelled_test_folder_gives_way_to_val(tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "val/b"):
        write(tmp_path / name / "0.png")
    write(tmp_path / "test" / "unlabelled.png")
    source = open_images(tmp_path, size=8, split="test", classes=["a", "b"])
    assert source.tensors()[1].tolist() == [1]
    (tmp_path / "val" / "b" / "0.png").unlink()
    (tmp_path / "val" / "b").rmdir()
    with pytest.raises(InputError, match="split='train'"):
        open_images(tmp_path, size=8, split="test")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("train", "test", "plane"):
        write(tmp_path / name / "0.png")
    assert open_images(tmp_path, size=8).classes == ("plane", "test", "train")


def test_folder_against_the_classes_of_a_model(folder: Path) -> None:
    source = open_images(folder, size=8, split="test", classes=["cow", "ant", "bee", "dog"])
    _, labels = check_passes(source, 8, 15)
    assert source.classes == ("cow", "ant", "bee", "dog") and source.counts == (6, 4, 5, 0) and source.warnings == ()
    assert labels.tolist() == [1] * 4 + [2] * 5 + [0] * 6
    with pytest.raises(InputError, match="also 'cow'"):
        open_images(folder, size=8, classes=["ant", "bee"])


def test_a_file_that_vanishes_between_passes_is_an_error(folder: Path) -> None:
    source = open_images(folder, size=8, cache_bytes=0)
    source.tensors()
    (folder / "ant" / "1.png").unlink()
    with pytest.raises(InputError, match="left alone"):
        source.tensors()


# Pillow's modes


def one(tmp_path: Path, image: Image.Image, name: str, **options: object) -> Tensor:
    """Save an image and read it back as the first of two classes: uint8 [8, 8, 3]."""
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / name, **options)
    write(tmp_path / "b" / "x.png")
    source = open_images(tmp_path, size=8)
    images = source.tensors()[0]
    assert source.skipped == ()
    return images[0]


@pytest.mark.parametrize(
    ("mode", "name", "colour", "want"),
    [
        ("1", "x.png", 1, (255, 255, 255)),
        ("L", "x.png", 77, (77, 77, 77)),
        ("P", "x.png", 0, None),
        ("RGB", "x.png", (10, 20, 30), (10, 20, 30)),
        ("RGB", "x.gif", (10, 20, 30), (10, 20, 30)),
        ("RGB", "x.webp", (10, 20, 30), (10, 20, 30)),
        ("RGBA", "x.png", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", "x.png", (10, 20, 30, 0), (255, 255, 255)),
        ("LA", "x.png", (40, 255), (40, 40, 40)),
        ("LA", "x.png", (40, 0), (255, 255, 255)),
        ("CMYK", "x.jpg", (255, 0, 0, 0), (0, 255, 255)),
        ("CMYK", "x.tif", (0, 0, 0, 255), (0, 0, 0)),
        ("YCbCr", "x.jpg", (128, 128, 128), (128, 128, 128)),
        ("LAB", "x.tif", (255, 128, 128), (255, 255, 255)),
        ("I;16", "x.png", 0x8042, (0x80, 0x80, 0x80)),
        ("I;16", "x.tif", 65535, (255, 255, 255)),
        ("I", "x.tif", 0x4000, (0x40, 0x40, 0x40)),
        ("I", "y.tif", 2**30, (255, 255, 255)),
        ("F", "x.tif", 0.5, (128, 128, 128)),
        ("F", "y.tif", 130.0, (130, 130, 130)),
    ],
)
def test_modes(tmp_path: Path, mode: str, name: str, colour: object, want: tuple[int, ...] | None) -> None:
    image = Image.new(mode, (9, 11), colour)
    if mode == "P":
        image.putpalette([200, 100, 50] * 256)
        want = (200, 100, 50)
    pixels = one(tmp_path, image, name).int()
    assert (pixels - torch.tensor(want)).abs().max() <= (
        3 if name.endswith(("jpg", "webp", "gif")) or mode == "LAB" else 0
    )


@pytest.mark.parametrize("mode", ["P", "L", "1", "RGB"])
def test_transparent_colour_becomes_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGB" if mode == "RGB" else "L", (8, 8), 0)
    image.paste((9, 9, 9) if mode == "RGB" else 255, (0, 0, 4, 8))
    image = image.convert(mode)
    transparent = {"P": image.getpixel((7, 0)), "L": 0, "1": 0, "RGB": (0, 0, 0)}[mode]
    pixels = one(tmp_path, image, "x.png", transparency=transparent)
    assert pixels[2, 6].tolist() == [255, 255, 255]
    assert pixels[2, 1].tolist() == ([9, 9, 9] if mode == "RGB" else [255, 255, 255])


@pytest.mark.parametrize("mode", ["HSV", "RGBX", "RGBa", "La", "PA", "I;16B", "I;16L"])
def test_modes_without_a_file_format_come_in_as_objects(mode: str) -> None:
    image = Image.new(mode, (9, 11))
    source = open_images([image, image], ["a", "b"], size=8)
    check_passes(source, 8, 2)


def test_float_files_with_nan_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "a" / "nan.tif")
    write(tmp_path / "a" / "x.png")
    write(tmp_path / "b" / "x.png")
    source = open_images(tmp_path, size=8)
    check_passes(source, 8, 2)
    assert "NaN" in source.skipped[0][1]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    upright = Image.new("L", (8, 8))
    upright.paste(255, (0, 0, 4, 4))
    upright.paste(128, (4, 0, 8, 4))
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
            7: "TRANSVERSE", 8: "ROTATE_270"}  # fmt: skip
    stored = upright.transpose(Image.Transpose[undo[orientation]]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = one(tmp_path, stored, "x.png", exif=exif)
    assert pixels[..., 0].tolist() == np.asarray(upright).tolist()


def test_first_frame_of_animations(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    assert one(tmp_path, frames[0], "x.gif", save_all=True, append_images=frames[1:])[0, 0].tolist() == [255, 0, 0]


# .npz files


def save_npz(path: Path, **changes: object) -> Path:
    values = {
        "x_train": noise(12, 9, 9, 3),
        "y_train": (np.arange(12) % 3).astype(np.uint8),
        "x_test": noise(6, 9, 9, 3, seed=1),
        "y_test": (np.arange(6) % 3).astype(np.uint8),
        "class_names": np.array(["x", "y", "z"]),
    }
    values = {key: value for key, value in {**values, **changes}.items() if value is not None}
    np.savez(path, **values)
    return path


def test_npz(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "d.npz")
    train, test = (open_images(path, size=9, split=split, batch_size=5) for split in ("train", "test"))
    assert train.classes == test.classes == ("x", "y", "z")
    images, labels = check_passes(train, 9, 12, 5)
    assert (images.numpy() == noise(12, 9, 9, 3)).all() and labels.tolist() == [0, 1, 2] * 4
    images, labels = check_passes(test, 9, 6, 5)
    assert (images.numpy() == noise(6, 9, 9, 3, seed=1)).all()
    for_model = open_images(path, size=16, split="test", classes=["z", "w", "x", "y"])
    assert check_passes(for_model, 16, 6)[1].tolist() == [2, 3, 0] * 2


def test_npz_without_names_uses_the_classes_of_the_training_part(tmp_path: Path) -> None:
    changes = {"y_train": np.array([30, 7, 5] * 4), "y_test": np.array([7, 30, 7, 30, 7, 30]), "class_names": None}
    source = open_images(save_npz(tmp_path / "d.npz", **changes), size=9, split="test")
    assert source.classes == ("5", "7", "30") and source.tensors()[1].tolist() == [1, 2] * 3
    assert source.counts == (0, 3, 3)


def test_npz_with_differenced_planes(tmp_path: Path) -> None:
    images = noise(12, 9, 7, 3)
    planes = np.stack([images[..., 1], images[..., 0] - images[..., 1], images[..., 2] - images[..., 1]])
    for axis in (3, 2):
        planes = np.diff(planes, axis=axis, prepend=np.uint8(0))
    path = save_npz(tmp_path / "d.npz", x_train=None, x_train_d2=planes.astype(np.uint8))
    got = open_images(path, size=7).tensors()[0]
    assert torch.equal(got, open_images(images, np.arange(12) % 3, size=7).tensors()[0])
    with pytest.raises(ShapeError, match="x_train_d2"):
        open_images(save_npz(path, x_train=None, x_train_d2=planes[:2]), size=7)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"x_train": None}, "x_train"),
        ({"y_train": None}, "y_train"),
        ({"y_train": np.arange(12) % 4}, "class names"),
        ({"y_train": np.arange(12) % 2}, "class"),
        ({"y_train": np.arange(11) % 3}, "as many as"),
        ({"y_train": np.zeros(12, int), "y_test": np.zeros(6, int), "class_names": None}, "2 classes"),
        ({"y_train": np.arange(12) % 3 - 1}, "at least 0"),
        ({"y_train": (np.arange(12) % 3).astype(float)}, "integers"),
        ({"y_train": np.eye(3)[np.arange(12) % 3].astype(int)}, "argmax"),
        ({"y_test": np.arange(6), "class_names": None}, "test part"),
        ({"x_train": np.full((12, 9, 9, 3), np.nan, np.float32)}, "NaN"),
        ({"x_train": noise(12, 9, 9, 3).astype(np.int32)}, "uint8"),
        ({"x_train": noise(12, 9, 9, 2)}, "must be"),
        ({"x_train": noise(0, 9, 9, 3), "y_train": np.arange(0)}, "at least one image"),
        ({"x_train": np.array([1, "a", None], dtype=object)}, "allow_pickle"),
        ({"class_names": np.array(["x", "x", "z"])}, "different"),
    ],
)
def test_bad_npz(tmp_path: Path, changes: dict, text: str) -> None:
    with pytest.raises(InputError, match=text):
        open_images(save_npz(tmp_path / "d.npz", **changes), size=9)


def test_more_classes_in_the_test_part(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "d.npz", y_train=np.arange(12) % 2, y_test=np.arange(6) % 3, class_names=None)
    for split in ("train", "test"):
        with pytest.raises(InputError, match=r"classes of the test part.*also '2'"):
            open_images(path, size=9, split=split)
    path = save_npz(tmp_path / "e.npz")
    with pytest.raises(InputError, match=r"model.*also 'z'"):
        open_images(path, size=9, split="test", classes=["x", "y"])


def test_damaged_npz(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "d.npz")
    data = path.read_bytes()
    for broken in (data[: len(data) // 2], data[:10], b"", b"hello world", data[:200] + b"\0" * 300 + data[500:]):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=r"d\.npz"):
            open_images(path, size=9)
    np.save(tmp_path / "e.npy", noise(3, 9, 9, 3))
    with pytest.raises(InputError, match="single array"):
        open_images(tmp_path / "e.npy", size=9)


def test_another_file_is_refused_without_advice_to_unpickle_it(tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    path.write_bytes(b"\x89PNG\r\n" + bytes(100))
    with pytest.raises(InputError, match=r"an \.npz file with x_train.*cat\.png") as caught:
        open_images(path, size=9)
    assert "pickle" not in str(caught.value)
    np.savez(tmp_path / "empty.npz")
    with pytest.raises(InputError, match="with nothing"):
        open_images(tmp_path / "empty.npz", size=9)


def test_npz_without_a_test_part(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "d.npz", x_test=None, y_test=None)
    assert open_images(path, size=9).counts == (4, 4, 4)
    with pytest.raises(InputError, match="x_test"):
        open_images(path, size=9, split="test")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared image sets are not on this machine")
def test_shared_sets() -> None:
    letters = open_images(SHARED / "omniglot28_8alphabets.npz", size=28)
    images, _ = letters.tensors()
    assert images.shape == (3630, 28, 28, 3) and len(letters.classes) == 242 and set(letters.counts) == {15}


# Arrays


def test_arrays_of_every_kind_agree() -> None:
    images, labels = noise(10, 8, 8, 3), np.arange(10) % 2
    want = open_images(images, labels, size=8)
    assert want.classes == ("0", "1")
    check_passes(want, 8, 10)
    assert np.shares_memory(want.tensors()[0].numpy(), images)
    kinds = [
        torch.from_numpy(images),
        torch.from_numpy(images).permute(0, 3, 1, 2),
        images.transpose(0, 3, 1, 2),
        images / 255,
        (images / 255).astype(">f4"),
        torch.from_numpy(images).permute(0, 3, 1, 2) / 255,
        torch.from_numpy(images / 255).requires_grad_(),
        list(images),
        [Image.fromarray(image) for image in images],
    ]
    for kind in kinds:
        for given in (labels, torch.from_numpy(labels), labels.tolist(), labels.astype(bool), labels.astype(np.uint8)):
            source = open_images(kind, given, size=8, batch_size=3)
            images_got, labels_got = check_passes(source, 8, 10, 3)
            assert torch.equal(images_got, want.tensors()[0]) and torch.equal(labels_got, want.tensors()[1])
    grey = noise(6, 12, 9)
    for kind in (grey, grey[..., None], grey[:, None], grey / 255, list(grey)):
        got = open_images(kind, [0, 1] * 3, size=8).tensors()[0]
        assert torch.equal(got, open_images(grey, [0, 1] * 3, size=8).tensors()[0])


def test_label_rules() -> None:
    images = noise(4, 8, 8, 3)

    def labels_of(labels: object, classes: list[str] | None = None) -> tuple[tuple[str, ...], list[int]]:
        source = open_images(images, labels, size=8, classes=classes)
        return source.classes, source.tensors()[1].tolist()

    assert labels_of([12, 3, 12, 100]) == (("3", "12", "100"), [1, 0, 1, 2])
    assert labels_of(["dog", "cat", "dog", "cat"]) == (("cat", "dog"), [1, 0, 1, 0])
    assert labels_of(np.array(["dog", "cat"] * 2, dtype=object)) == (("cat", "dog"), [1, 0, 1, 0])
    assert labels_of(np.array([b"dog", b"cat"] * 2)) == (("cat", "dog"), [1, 0, 1, 0])
    assert labels_of([0, 2, 1, 0], ["a", "b", "c", "d"]) == (("a", "b", "c", "d"), [0, 2, 1, 0])
    assert labels_of([5, 7, 5, 5], ["7", "5", "9"]) == (("7", "5", "9"), [1, 0, 1, 1])
    assert labels_of(["b", "a", "b", "b"], ["b", "c", "a"]) == (("b", "c", "a"), [0, 2, 0, 0])
    for labels, classes in (([0, 1, 2, 3], ["a", "b"]), ([0, 1, 2, 3], ["0", "1", "2"]), (list("abca"), ["a", "b"])):
        with pytest.raises(InputError, match=r"classes|class names"):
            labels_of(labels, classes)


@pytest.mark.parametrize(
    ("images", "labels", "error", "text"),
    [
        (noise(4, 8, 8, 3), None, InputError, "labels must be given"),
        (noise(4, 8, 8, 3), [0, 1, 0], ShapeError, "as many"),
        (list(noise(4, 8, 8, 3)), [0, 1, 0], ShapeError, "as many"),
        (noise(4, 8, 8, 3), [0.0, 1.0, 0.5, 1.0], DtypeError, "integers"),
        (noise(4, 8, 8, 3), [0, 1, float("nan"), 1], DtypeError, "integers"),
        (noise(4, 8, 8, 3), [0, 1, "a", 1], DtypeError, "mixture"),
        (noise(4, 8, 8, 3), [0, 1, None, 1], DtypeError, "integers"),
        (noise(4, 8, 8, 3), [[0], [1], [1, 2], [1]], ShapeError, "one value"),
        (noise(4, 8, 8, 3), torch.eye(4, dtype=torch.int64), ShapeError, "argmax"),
        (noise(4, 8, 8, 3), 3, ShapeError, "one value"),
        (noise(4, 8, 8, 3), [0, 1, -1, 1], InputError, "at least 0"),
        (noise(4, 8, 8, 3), [1, 1, 1, 1], InputError, "2 classes"),
        (noise(4, 8, 8, 5), [0, 1, 0, 1], ShapeError, "must be"),
        (noise(4, 8), [0, 1, 0, 1], ShapeError, "must be"),
        (noise(0, 8, 8, 3), [], InputError, "at least one image"),
        (np.array(3.0), [0], InputError, "at least one image"),
        (noise(4, 8, 8, 3).astype(np.int16), [0, 1, 0, 1], DtypeError, "uint8"),
        (noise(4, 8, 8, 3).astype(object), [0, 1, 0, 1], DtypeError, "uint8"),
        (torch.full((4, 3, 8, 8), float("inf")), [0, 1, 0, 1], InputError, "finite"),
        (
            torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
            [0, 1, 0, 1],
            InputError,
            "normalisation",
        ),
        (noise(4, 8, 8, 3).astype(np.float32), [0, 1, 0, 1], InputError, r"0\.\.1"),
        ({"x": 1}, None, InputError, "dict"),
        (3, None, InputError, "int"),
        (None, None, InputError, "NoneType"),
        ([], None, InputError, "empty"),
        ([1, 2, 3], None, InputError, "item 0.*pair"),
        ([(noise(8, 8, 3), 0), ("x.png", 1)], None, DtypeError, "item 1.*str"),
        ([(noise(8, 8, 3), 0), (noise(2, 8, 8, 3), [0, 1, 1])], None, ShapeError, "item 1"),
        ([(noise(8, 8, 3), 0), (noise(8), 1)], None, ShapeError, "item 1"),
        ([(noise(8, 8, 3), 0), (np.full((8, 8), np.nan), 1)], None, InputError, "item 1.*NaN"),
        ([(noise(8, 8, 3), 0), (noise(8, 8, 3), "a")], None, DtypeError, "mixture"),
        (iter([noise(8, 8, 3)]), [0], InputError, "a list"),
    ],
)
def test_bad_arrays_and_items(images: object, labels: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        open_images(images, labels, size=8)
    assert isinstance(caught.value, InputError)


@pytest.mark.parametrize("options", [{"size": 0}, {"split": "val"}, {"batch_size": 0}, {"classes": ["a", "a"]}])
def test_bad_options(options: dict) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        open_images(noise(4, 8, 8, 3), [0, 1, 0, 1], **{"size": 8, **options})


def test_labels_beside_a_path(folder: Path) -> None:
    with pytest.raises(InputError, match="labels"):
        open_images(folder, [0, 1], size=8)


# Datasets


class Augmented(Dataset):
    """A map-style dataset whose images change each time they are read, as random augmentation does."""

    classes = ("left", "none", "right")

    def __init__(self, kind: str, count: int = 23) -> None:
        self.kind, self.count, self.reads = kind, count, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[object, int]:
        if index >= self.count:
            raise RuntimeError("read beyond the end")
        self.reads += 1
        image = noise(11, 9, 3, seed=self.reads)
        kinds = {
            "pillow": Image.fromarray,
            "array": lambda x: x,
            "chw": lambda x: torch.from_numpy(x).permute(2, 0, 1) / 255,
        }
        return kinds[self.kind](image), 2 * (index % 2)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, str]]:
        for index in range(9):
            yield torch.from_numpy(noise(1, 8, 8, seed=index)), "odd" if index % 2 else "even"


def test_a_full_folder_for_temporary_files_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    full = lambda buffering: open("/dev/full", "r+b", buffering=buffering)  # noqa: E731, SIM115
    monkeypatch.setattr("pudnet.data.source.tempfile.TemporaryFile", full)
    items = [(np.zeros((8, 8, 3), np.uint8), label % 2) for label in range(6)]
    with pytest.raises(InputError, match="TMPDIR"):
        open_images(items, size=8, batch_size=2, cache_bytes=0)


@pytest.mark.parametrize("kind", ["pillow", "array", "chw"])
@pytest.mark.parametrize("cache_bytes", [0, 600, 2**20])
def test_dataset_is_read_once(kind: str, cache_bytes: int) -> None:
    dataset = Augmented(kind)
    source = open_images(dataset, size=8, batch_size=4, cache_bytes=cache_bytes)
    assert source.classes == ("left", "right") and source.counts == (12, 11)  # "none" has no image
    images, _ = check_passes(source, 8, 23, 4)
    assert dataset.reads == 23
    assert torch.equal(
        images, open_images([noise(11, 9, 3, seed=s + 1) for s in range(23)], [0, 1] * 11 + [0], size=8).tensors()[0]
    )


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_shuffling_data_loader(batch_size: int) -> None:
    images, labels = torch.from_numpy(noise(30, 3, 8, 8)) / 255, torch.arange(30) % 3
    loader = DataLoader(TensorDataset(images, labels), batch_size, shuffle=True)
    source = open_images(loader, size=8, batch_size=7)
    got, order = check_passes(source, 8, 30, 7)
    want = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert sorted(map(bytes, got.numpy())) == sorted(map(bytes, want.contiguous().numpy()))
    assert order.tolist() != labels.tolist()


def test_other_iterables() -> None:
    source = open_images(Stream(), size=8)
    assert source.classes == ("even", "odd") and check_passes(source, 8, 9)[1].tolist() == [0, 1] * 4 + [0]
    loader = DataLoader(Stream(), 4)  # string labels come in lists
    assert torch.equal(open_images(loader, size=8).tensors()[0], source.tensors()[0])
    pairs = ((noise(8 + i, 9, 3, seed=i), np.array([i % 2])) for i in range(6))  # labels of shape [1]
    assert open_images(pairs, size=8).counts == (3, 3)
    part = Subset(Augmented("array"), [0, 1, 2])
    assert open_images(part, size=8).classes == ("left", "right")
    grey = DataLoader([(torch.from_numpy(noise(8, 8, seed=i)), i % 2) for i in range(6)], 3)  # [3, 8, 8] is a batch
    check_passes(open_images(grey, size=8), 8, 6)
    again = open_images(source, size=8)  # a source is an iterable of batches
    assert again.classes == source.classes and torch.equal(again.tensors()[0], source.tensors()[0])
    for_model = open_images(Augmented("array"), size=8, classes=["right", "up", "left"])
    assert for_model.tensors()[1].tolist()[:4] == [2, 0, 2, 0]
    with pytest.raises(InputError, match="also 'right'"):
        open_images(Augmented("array"), size=8, classes=["left", "up"])


def test_buffers_reused_by_the_iterable_do_no_harm() -> None:
    def reuse() -> Iterator[tuple[Tensor, Tensor]]:
        buffer = torch.empty(5, 8, 8, 3, dtype=torch.uint8)
        for value in range(4):
            yield buffer.fill_(value), torch.arange(5) % 2

    images, _ = open_images(reuse(), size=8, batch_size=5).tensors()
    assert images[:, 0, 0, 0].tolist() == [value for value in range(4) for _ in range(5)]


def test_folder_pass_without_cache_is_small(folder: Path) -> None:
    source = open_images(folder, size=64, batch_size=2, cache_bytes=0)
    list(source)
    tracemalloc.start()
    for _ in source:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20 and not source._cache
