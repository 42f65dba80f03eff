"""The training settings are checked when they are read."""

import json

import pytest

from pudnet.errors import InputError
from pudnet.training import TrainingConfig

GOOD = 'target = "convnet3"\n[[data]]\npaths = ["a.npz"]\n'

FAMILY = 'target = "convnet3"\n[[data]]\nfamily = "glyphs"\n'


def read(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return TrainingConfig.from_toml(path)


def test_defaults_and_round_trip(tmp_path):
    config = read(tmp_path, GOOD)
    assert config.episodes.classes == 20
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("target = 3\n" + GOOD.split("\n", 1)[1], "target"),
        ('target = "convnet3"', "data"),
        (GOOD + "[episodes]\nclases = 3\n", "clases"),
        (GOOD + '[episodes]\nclasses = "many"\n', "episodes.classes"),
        (GOOD + "[episodes]\nclasses = 1\n", "at least 2"),
        (GOOD + "[optimiser]\nsteps = 0\n", "optimiser.steps"),
        ('target = "convnet3"\n[[data]]\npaths = "a.npz"\n', "data.paths"),
        ("target = \n", "a TOML file"),
        ('target = "convnet3"\n[[data]]\npaths = []\n', "data.paths"),
        (GOOD + "weight = -1\n", "data.weight"),
        ("seed = -1\n" + GOOD, "seed"),
        (GOOD + "[augment]\ncrop = -1\n", "augment.crop"),
        (GOOD + "[optimiser]\nlr = nan\n", "optimiser.lr"),
        (GOOD + "[optimiser]\nbetas = [0.9]\n", "optimiser.betas"),
        (GOOD + '[optimiser]\nbetas = [0.9, "a"]\n', "optimiser.betas"),
        (GOOD + "[optimiser]\nwarmup = -1\n", "optimiser.warmup"),
        (GOOD + '[model]\ntarget = "resnet18"\n', "model"),
        ("model = [1]\n" + GOOD, "model"),
        (GOOD + "[augment]\ntransform = -0.1\n", "augment.transform"),
        (GOOD + "[loss]\nridge_lambda = 0.0\n", "loss.ridge_lambda"),
        (FAMILY + 'paths = ["a.npz"]\n', "data.paths"),
        (FAMILY.replace("glyphs", "flowers"), "data.family"),
        (FAMILY + "classes = 1\n", "data.classes"),
        (FAMILY + "images = 0\n", "data.images"),
        (FAMILY + "seed = -1\n", "data.seed"),
    ],
)
def test_mistakes_are_named(tmp_path, text, says):
    with pytest.raises(InputError, match=says):
        read(tmp_path, text)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="a readable file"):
        TrainingConfig.from_toml(tmp_path / "none.toml")


def test_bundled_recipe_is_valid():
    from importlib.resources import files

    config = TrainingConfig.from_toml(str(files("pudnet") / "pretrained" / "convnet3.toml"))
    assert len(config.data[0].held_out) == 32
