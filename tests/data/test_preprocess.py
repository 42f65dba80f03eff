import json

import numpy as np
import pytest
import torch

from pudnet.data import Preprocess
from pudnet.errors import DtypeError, InputError, ShapeError

PLAIN = Preprocess(16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("shape", [(40, 30), (30, 47), (16, 23), (5, 8), (9, 9), (200, 17), (16, 16)])
@pytest.mark.parametrize("channels", [1, 3])
def test_resize_equals_pillows_shorter_side_and_centre_crop(shape: tuple[int, int], channels: int) -> None:
    image_module = pytest.importorskip("PIL.Image")
    height, width = shape
    images = noise(3, height, width, channels)
    got = PLAIN.resize(images).numpy().astype(int)
    crop_h, crop_w = min(height, 2 * min(shape)), min(width, 2 * min(shape))
    top, left = (height - crop_h) // 2, (width - crop_w) // 2
    new_h, new_w = (max(16, round(side * 16 / min(shape))) for side in (crop_h, crop_w))
    for image, result in zip(images, got, strict=True):
        part = image[top : top + crop_h, left : left + crop_w].squeeze()
        want = np.asarray(image_module.fromarray(part).resize((new_w, new_h), image_module.BILINEAR)).astype(int)
        want = want.reshape(new_h, new_w, channels)[(new_h - 16) // 2 :, (new_w - 16) // 2 :][:16, :16]
        assert np.abs(result - want).max() <= 1


def test_resize_does_not_depend_on_the_batch_or_the_memory_layout() -> None:
    images = noise(7, 33, 50, 3)
    together = PLAIN.resize(images)
    assert torch.equal(together, torch.cat([PLAIN.resize(images[i : i + 1]) for i in range(7)]))
    assert torch.equal(together, PLAIN.resize(torch.from_numpy(images)))
    planes = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())  # NCHW memory seen as NHWC
    assert torch.equal(together, PLAIN.resize(planes.permute(0, 2, 3, 1)))
    assert torch.equal(together.flip(0), PLAIN.resize(images[::-1]))  # negative strides


def test_right_images_are_not_copied_and_inputs_never_change() -> None:
    tensor = torch.from_numpy(noise(2, 16, 16, 3))
    assert PLAIN.resize(tensor).data_ptr() == tensor.data_ptr()
    array = noise(2, 16, 16, 3)
    assert np.shares_memory(PLAIN.resize(array).numpy(), array)
    before = array.copy()
    PLAIN(array)
    assert (array == before).all()
    frozen = noise(2, 16, 16, 3)
    frozen.flags.writeable = False
    assert torch.equal(PLAIN.resize(frozen), tensor)


def test_grey_becomes_three_equal_channels() -> None:
    images = noise(4, 20, 24)
    flat, deep = PLAIN.resize(images), PLAIN.resize(images[..., None])
    assert flat.shape == (4, 16, 16, 3)
    assert torch.equal(flat, deep)
    assert torch.equal(flat[..., 0], flat[..., 1]) and torch.equal(flat[..., 0], flat[..., 2])


def test_alpha_is_laid_on_white() -> None:
    images = np.zeros((1, 16, 16, 4), dtype=np.uint8)
    images[0, :, :8] = (10, 20, 30, 0)
    images[0, :, 8:] = (10, 20, 30, 255)
    images[0, 0, 15, 3] = 127
    result = PLAIN.resize(images)
    assert result[0, 3, 2].tolist() == [255, 255, 255]
    assert result[0, 3, 12].tolist() == [10, 20, 30]
    assert result[0, 0, 15].tolist() == [round(c * 127 / 255 + 255 * 128 / 255) for c in (10, 20, 30)]


def test_lists_may_mix_sizes_and_channels() -> None:
    result = PLAIN.resize([noise(9, 20, 3), noise(40, 33), noise(16, 16, 4), torch.zeros(5, 5, 1, dtype=torch.uint8)])
    assert result.shape == (4, 16, 16, 3)
    assert torch.equal(result[1:2], PLAIN.resize(noise(40, 33)[None]))
    assert PLAIN.resize([]).shape == (0, 16, 16, 3)
    assert PLAIN(noise(0, 9, 9, 3)).shape == (0, 3, 16, 16)


def test_a_very_long_image_stays_small() -> None:
    image = np.zeros((1, 1, 300_000, 3), dtype=np.uint8)
    image[0, 0, 149_999:150_001] = 255
    assert PLAIN.resize(image).max() == 255  # the centre is what remains


def test_normalise() -> None:
    constants = Preprocess(8, (0.1, 0.5, 0.9), (0.2, 0.3, 0.4))
    images = torch.from_numpy(noise(3, 8, 11, 3))
    want = (images.double() / 255 - torch.tensor(constants.mean).double()) / torch.tensor(constants.std).double()
    got = constants.normalise(images)
    assert got.dtype == torch.float32 and got.is_contiguous()
    torch.testing.assert_close(got.double(), want.permute(0, 3, 1, 2), rtol=0, atol=1e-6)
    torch.testing.assert_close(constants(images), constants.normalise(constants.resize(images)), rtol=0, atol=0)


def test_constants_travel_as_json() -> None:
    constants = Preprocess(32, (0.482, 0.446, 0.396), (0.264, 0.257, 0.270))
    assert Preprocess.from_dict(json.loads(json.dumps(constants.to_dict()))) == constants
    with pytest.raises(InputError, match="size, mean and std"):
        Preprocess.from_dict({"size": 3})


@pytest.mark.parametrize(
    ("images", "error", "text"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), DtypeError, "uint8"),
        (torch.zeros(2, 8, 8, 3), DtypeError, "uint8"),
        (np.zeros((2, 8, 8, 3), np.int64), DtypeError, "uint8"),
        ("cat.png", DtypeError, "numpy array or a torch tensor"),
        ([np.zeros((2, 8, 8, 3), np.uint8)], ShapeError, "each image of a list"),
        (np.zeros((8, 8, 3), np.uint8), ShapeError, r"images\[None\]"),
        (np.zeros((2, 8, 8, 5), np.uint8), ShapeError, r"\[2, 8, 8, 5\]"),
        (np.zeros((8, 8), np.uint8), ShapeError, r"\[8, 8\]"),
        (np.zeros((2, 0, 8, 3), np.uint8), ShapeError, "empty side"),
    ],
)
def test_bad_images(images: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        PLAIN.resize(images)
    assert isinstance(caught.value, InputError)


@pytest.mark.parametrize(
    "values",
    [(0, (0, 0, 0), (1, 1, 1)), (1.5, (0, 0, 0), (1, 1, 1)), (8, (0, 0), (1, 1, 1)), (8, (0, 0, 0), (1, 0, 1)),
     (8, (0, 0, float("nan")), (1, 1, 1)), (8, "abc", (1, 1, 1)), (True, (0, 0, 0), (1, 1, 1))],
)  # fmt: skip
def test_bad_constants(values: tuple) -> None:
    with pytest.raises(InputError, match="Preprocess"):
        Preprocess(*values)


def test_normalise_wants_rgb() -> None:
    with pytest.raises(ShapeError, match="resize"):
        PLAIN.normalise(np.zeros((2, 8, 8), np.uint8))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_differs_by_one_grey_level_at_most() -> None:
    images = torch.from_numpy(noise(5, 40, 31, 3))
    got = PLAIN.resize(images.cuda())
    assert got.is_cuda and PLAIN(images.cuda()).is_cuda
    assert (got.cpu().int() - PLAIN.resize(images).int()).abs().max() <= 1
