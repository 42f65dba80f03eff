"""Episodes are what they say they are, and depend on nothing but their generator."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pudnet.data.episodes import ClassPool, sample_episode
from pudnet.data.preprocess import Preprocess
from pudnet.errors import InputError

PLAIN = Preprocess(8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.fixture
def pool():
    labels = torch.arange(60) % 6
    images = (labels * 40).to(torch.uint8)[:, None, None, None].expand(60, 8, 8, 3).contiguous()
    return ClassPool.build(images, labels, [f"c{k}" for k in range(6)], [f"c{k}" for k in (5, 3, 1, 0)])


def draw(pool, seed=0, **options):
    return sample_episode(pool, np.random.default_rng(seed), PLAIN, classes=3, support=2, query=4, **options)


def test_support_then_query_of_the_chosen_classes(pool):
    episode = draw(pool)
    assert episode.images.shape == (18, 3, 8, 8)
    assert episode.support == 6
    assert episode.labels.tolist() == [0, 0, 1, 1, 2, 2, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    original = [(5, 3, 1, 0)[int(label)] for label in episode.classes[episode.labels]]
    assert torch.allclose(episode.images[:, 0, 0, 0] * 255, torch.tensor(original) * 40.0)


def test_same_generator_same_episode(pool):
    options = {"crop": 2, "flip": True, "colour": 1.0}
    assert torch.equal(draw(pool, 4, **options).images, draw(pool, 4, **options).images)
    assert not torch.equal(draw(pool, 4, **options).images, draw(pool, 5, **options).images)


def test_a_whole_episode_is_transformed(pool):
    pixels = np.random.default_rng(0).integers(0, 256, pool.images.shape, dtype=np.uint8)
    pool = replace(pool, images=torch.from_numpy(pixels))
    plain, changed = draw(pool, 4), draw(pool, 4, transform=1.0)
    assert not torch.equal(plain.images, changed.images)
    assert torch.equal(plain.labels, changed.labels)
    assert torch.equal(changed.images, draw(pool, 4, transform=1.0).images)
    seldom = sum(not torch.equal(draw(pool, seed).images, draw(pool, seed, transform=0.2).images) for seed in range(40))
    assert 2 < seldom < 15


def test_no_image_twice():
    images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 8, 8, 3).contiguous()
    pool = ClassPool.build(images, torch.arange(40) % 2, ["a", "b"], ["a", "b"])
    episode = sample_episode(pool, np.random.default_rng(1), PLAIN, classes=2, support=10, query=10)
    assert len(episode.images[:, 0, 0, 0].unique()) == 40


def test_shift_keeps_the_pixels_of_the_neighbourhood():
    ramp = torch.arange(8, dtype=torch.uint8)[None, None, :, None].expand(4, 8, 8, 3).contiguous()
    pool = ClassPool.build(ramp, torch.tensor([0, 0, 1, 1]), ["a", "b"], ["a", "b"])
    episode = sample_episode(pool, np.random.default_rng(2), PLAIN, classes=2, support=1, query=1, crop=3)
    columns = (episode.images * 255).round()
    assert ((columns[:, 0, 0, 1:] - columns[:, 0, 0, :-1]).abs() == 1).all()


def test_too_few_classes_or_images(pool):
    with pytest.raises(InputError, match="at most 4"):
        sample_episode(pool, np.random.default_rng(0), PLAIN, classes=5, support=1, query=1)
    with pytest.raises(InputError, match="at least 20 images"):
        sample_episode(pool, np.random.default_rng(0), PLAIN, classes=2, support=10, query=10)
