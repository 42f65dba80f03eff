"""Made-up images: the same arguments give the same ones, classes differ, and a dataset is changed as a whole."""

import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from pudnet.data import families
from pudnet.data.families import transforms
from pudnet.errors import InputError


@pytest.mark.parametrize("name", families.NAMES)
class TestFamily:
    def test_shapes(self, name):
        drawn = families.draw(name, 3, 4, seed=0)
        assert drawn.images.shape == (12, 32, 32, 3)
        assert drawn.images.dtype == torch.uint8
        assert drawn.images.is_contiguous()
        assert drawn.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert len(set(drawn.classes)) == 3

    def test_same_arguments_same_images(self, name):
        first, second = (families.draw(name, 4, 3, seed=5) for _ in range(2))
        assert torch.equal(first.images, second.images)
        assert first.classes == second.classes
        assert not torch.equal(first.images, families.draw(name, 4, 3, seed=6).images)

    def test_the_first_classes_do_not_depend_on_their_number(self, name):
        few, many = (families.draw(name, count, 3, seed=1) for count in (3, 5))
        assert torch.equal(few.images, many.images[:9])
        assert few.classes == many.classes[:3]

    def test_images_of_a_part_differ(self, name):
        parts = [families.draw(name, 3, 4, seed=1, part=part) for part in (0, 1)]
        assert parts[0].classes == parts[1].classes
        everything = torch.cat([part.images for part in parts]).flatten(1)
        assert len(everything.unique(dim=0)) == 24

    def test_classes_are_told_apart_by_their_statistics(self, name):
        """Nearest class mean on a few statistics that see form, texture, place and colour, far from chance."""
        classes, count = 8, 60
        drawn = families.draw(name, classes, count, seed=2)
        seen = statistics(drawn.images).view(classes, count, -1)
        train, test = seen[:, :40], seen[:, 40:].flatten(0, 1)
        within = (train - train.mean(dim=1, keepdim=True)).flatten(0, 1)
        scatter = within.T @ within / len(within) + 0.01 * torch.eye(within.shape[1])
        whiten = torch.linalg.inv(torch.linalg.cholesky(scatter)).T
        nearest = torch.cdist(test @ whiten, train.mean(dim=1) @ whiten).argmin(dim=1)
        accuracy = (nearest == torch.arange(classes).repeat_interleave(count - 40)).float().mean()
        assert accuracy > 0.35

    def test_fast_enough(self, name):
        families.draw(name, 10, 5, seed=0)  # renders what is kept
        start = time.process_time()
        families.draw(name, 10, 50, seed=0)
        assert 500 / (time.process_time() - start) > 200  # images a second; ten times as many are usual


def statistics(images):
    """Standardised [n, d]: a small image, sizes of its gradients in place, colours, spectrum."""
    x = images.permute(0, 3, 1, 2).float() / 255
    grey = x.mean(dim=1)
    edges = torch.stack([grey.diff(dim=1)[:, :, 1:].abs(), grey.diff(dim=2)[:, 1:].abs()], dim=1)
    spectrum = torch.fft.rfft2(grey - grey.mean(dim=(1, 2), keepdim=True)).abs().log1p()
    parts = [
        torch.nn.functional.adaptive_avg_pool2d(x, 4),
        torch.nn.functional.adaptive_avg_pool2d(edges, 4),
        torch.nn.functional.adaptive_avg_pool2d(spectrum[:, None], 6),
        torch.stack([torch.histc(one, 4, 0, 1) for one in x.flatten(0, 1)]).view(len(x), -1) / 256,
    ]
    found = torch.cat([part.flatten(1) for part in parts], dim=1)
    return (found - found.mean(dim=0)) / (found.std(dim=0) + 1e-6)


def test_hundreds_of_classes():
    for maker in families._FAMILIES.values():
        assert len({kind.name for kind in maker(200, np.random.default_rng(0))}) == 200


def test_every_character_is_drawn_by_several_fonts():
    from pudnet.data.families import figures

    pictures = [figures._renderings(character) for character in figures.CHARACTERS]
    assert min(map(len, pictures)) >= 3
    assert max(map(len, pictures)) > 20
    assert all((picture.amax(dim=(1, 2)) > 0.5).all() for picture in pictures)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("flowers", 2, 2, 0), "glyphs"),
        (("glyphs", 0, 2, 0), "classes"),
        (("glyphs", 5000, 2, 0), "at most"),
        (("colours", 5000, 2, 0), "at most"),
        (("glyphs", 2, 0, 0), "per_class"),
        (("glyphs", 2, 2, -1), "seed"),
    ],
)
def test_mistakes_are_named(arguments, says):
    with pytest.raises(InputError, match=says):
        families.draw(*arguments)


def test_what_is_not_installed_is_named():
    script = """
import sys
sys.modules["PIL"] = sys.modules["matplotlib"] = None
from pudnet.data import families
from pudnet.errors import InputError
families.draw("strokes", 2, 2, 0)
for name, package in (("shapes", "Pillow"), ("glyphs", "matplotlib")):
    try:
        families.draw(name, 2, 2, 0)
    except InputError as error:
        assert package in str(error) and "pip install 'pudnet[cli]'" in str(error), error
    else:
        raise SystemExit(f"{name}: no error")
    del sys.modules["PIL"]
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- changes of whole datasets ----------------------------------------------------------------------------------


@pytest.fixture
def photographs():
    return families.draw("objects", 3, 4, seed=0).images


@pytest.mark.parametrize("change", transforms.CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_change_changes_every_image_but_not_its_size(change, seed, photographs):
    x = photographs.permute(0, 3, 1, 2).float() / 255
    y = change(x, np.random.default_rng(seed))
    assert y.shape == x.shape
    assert y.isfinite().all()
    assert ((y - x).abs().amax(dim=(1, 2, 3)) > 0.01).all()


@pytest.mark.parametrize("change", [one for one in transforms.CHANGES if one is not transforms._noisy])
def test_every_image_is_changed_alike(change, photographs):
    x = photographs.permute(0, 3, 1, 2).float() / 255
    whole = change(x, np.random.default_rng(3))
    alone = change(x[5:6], np.random.default_rng(3))
    assert torch.allclose(whole[5:6], alone, atol=1e-5)


def test_transform_is_drawn_from_its_generator(photographs):
    before = photographs.clone()
    first, second, other = (families.transform(photographs, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(photographs, before)
    assert first.dtype == torch.uint8 and first.shape == photographs.shape
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
