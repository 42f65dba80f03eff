"""PudNet as a whole: data path, gradients, randomness, saving, errors."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet import PudNet
from pudnet.errors import CheckpointError, DtypeError, InputError
from pudnet.ops import reference
from pudnet.sketch import SketchBuilder
from pudnet.targets import ConvNet3


class Own(nn.Module):
    """A user's network: a biased convolution, a transposed one, and a classifier of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 5, 2, stride=2)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(F.relu(self.norm(self.conv(x)))).mean(dim=(2, 3)))


SMALL = {"width": 12, "generator_width": 4}


def _images(count: int, size: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def _own(preset: str = "default", **options: object) -> PudNet:
    return PudNet(Own(), preset, image_size=16, **{**SMALL, **options})


@pytest.mark.parametrize("recurrence", ["ahru", "gru"])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_a_batch_of_datasets_equals_one_at_a_time(preset: str, recurrence: str) -> None:
    net = _own(preset, recurrence=recurrence).eval()
    sketches = [_images(5), _images(2, seed=1), _images(9, size=21, seed=2)]  # unequal numbers and sizes
    together = net.generate(sketches)
    for b, one in enumerate(sketches):
        for name, weight in net.generate(one).items():
            torch.testing.assert_close(together[name][b], weight)
    assert not torch.allclose(together["conv.weight"][0], together["conv.weight"][1])


def test_layer_norm_embedding_keeps_datasets_of_a_batch_apart_in_training_too() -> None:
    net = _own().train()
    sketches = [_images(5), _images(2, seed=1)]
    together = net.generate(sketches)
    torch.testing.assert_close(together["conv.weight"][1], net.generate(sketches[1])["conv.weight"])


def test_generated_shapes_are_the_modules() -> None:
    net = _own()
    shapes = {name: tuple(weight.shape) for name, weight in net.generate([_images(3)] * 2).items()}
    assert shapes == {"conv.weight": (2, 4, 3, 3, 3), "up.weight": (2, 4, 5, 2, 2)}
    assert {name: weight.ndim for name, weight in net.generate(_images(3)).items()} == dict.fromkeys(shapes, 4)


def test_arrays_tensors_and_sketches_are_the_same() -> None:
    net, images = _own().eval(), _images(6)
    builder = SketchBuilder(6)
    builder.update(torch.from_numpy(images))
    expected = net.generate(images)
    for other in (torch.from_numpy(images), builder.finish()):
        for name, weight in net.generate(other).items():
            torch.testing.assert_close(weight, expected[name])


def test_a_larger_image_is_shrunk_for_the_sketch() -> None:
    net = _own(sketch_size=8).eval()
    small = F.interpolate(net.preprocess(_images(3)), (8, 8), mode="bilinear", antialias=True, align_corners=False)
    flat = net(net.preprocess(_images(3)), [3])
    torch.testing.assert_close(flat, net(small, [3]))


def test_the_gradient_reaches_every_parameter_through_the_target() -> None:
    net = _own().train()
    weights = net.generate([_images(4), _images(4, seed=1)])
    x = net.preprocess(_images(3, seed=2))
    loss = sum(net.call({k: w[b] for k, w in weights.items()}, x).square().sum() for b in range(2))
    (loss * net.temperature).backward()
    without = [name for name, part in net.named_parameters() if part.grad is None or not part.grad.abs().sum() > 0]
    assert without == ["target.conv.bias"] or without == []  # BatchNorm takes a bias before it away


def test_the_plain_gru_has_no_use_for_the_state_norm() -> None:
    net = _own(recurrence="gru").train()
    sum(weight.sum() for weight in net.generate(_images(4)).values()).backward()
    unused = {name for name, part in net.recurrence.named_parameters() if part.grad is None or not part.grad.any()}
    assert unused == {"state_norm_weight", "state_norm_bias"}


def test_the_users_module_is_copied_and_its_own_parts_are_shared() -> None:
    module = Own()
    before = copy.deepcopy(module.state_dict())
    net = PudNet(module, image_size=16, **SMALL)
    assert torch.equal(net.target.head.weight, module.head.weight) and net.target.head.weight is not module.head.weight
    assert {"target.head.weight", "target.norm.bias"} <= {name for name, _ in net.named_parameters()}
    assert "target.conv.weight" not in net.state_dict()
    made = net.materialise(net.generate(_images(3)))
    made.head.weight.data.zero_()
    assert isinstance(made, Own) and made(torch.zeros(2, 3, 16, 16)).shape == (2, 2)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert torch.equal(net.target.head.weight, before["head.weight"])


def test_building_is_seeded_and_leaves_the_global_generators_alone() -> None:
    module = Own()
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, again = (PudNet("convnet3", seed=1, **SMALL) for _ in range(2))
    net = PudNet(module, image_size=16, seed=2, **SMALL).eval()
    net.generate(_images(2))
    assert torch.equal(torch.get_rng_state(), before[0]) and np.array_equal(np.random.get_state()[1], before[1])
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    different = PudNet("convnet3", seed=2, **SMALL)
    assert not torch.equal(first.generators.row_weight, different.generators.row_weight)


def test_an_unconditioned_network_gives_every_dataset_the_same_weights(tmp_path: Path) -> None:
    net = _own("default", conditioned=False)
    net.save(tmp_path / "blank.safetensors")
    net = PudNet.load(tmp_path / "blank.safetensors", target=Own())
    one, other = (net.layout.flatten(net.generate(_images(count))) for count in (3, 5))
    assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)
    conditioned = _own("default")
    assert [value.shape for value in net.parameters()] == [value.shape for value in conditioned.parameters()]
    one, other = (conditioned.layout.flatten(conditioned.generate(_images(count))) for count in (3, 5))
    assert not torch.allclose(one, other, rtol=1e-3)


def test_building_leaves_the_batch_statistics_of_the_embedding_alone() -> None:
    norm = _own("paper").embedding.norm
    assert isinstance(norm, nn.BatchNorm1d) and norm.num_batches_tracked == 0 and not norm.running_mean.any()


@pytest.fixture(scope="module")
def resnet() -> PudNet:
    return PudNet("resnet18", "paper")


def _variance_ratios(net: PudNet) -> Tensor:
    """Mean squares of the weights that 64 sketches of noise make, times fan_in / 2: ``[L, 64]``.

    From at most 512 rows a layer, generated one layer at a time as a kernel ``[rows, 1, kH, kW]``.
    """
    images = torch.randn(256, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    entries, generators = net.layout.entries, net.generators
    with torch.no_grad():
        codes = net.recurrence(copy.deepcopy(net.embedding)(images, [4] * 64))
        rows = generators.row_weight.split([entry.rows for entry in entries])
        fc_weight, fc_bias = (
            part.split([net.config.generator_width * entry.spatial for entry in entries])
            for part in (generators.fc_weight, generators.fc_bias)
        )
        ratios = []
        for t, entry in enumerate(entries):
            few = rows[t][:512]
            kernel = reference.generate_weights(
                codes[:, t : t + 1],
                fc_weight[t],
                fc_bias[t],
                generators.mix_weight[t : t + 1],
                generators.mix_bias[t : t + 1],
                few,
                torch.zeros(len(few)),
                [len(few), 1, *entry.shape[2:]],
            )
            ratios.append(kernel.square().mean(dim=1) * entry.fan_in / 2)
    return torch.stack(ratios)


def test_weights_start_with_the_variance_their_fan_in_asks_for(resnet: PudNet) -> None:
    """Over many sketches; a 1x1 kernel has one position to average over, and differs more from sketch to sketch."""
    for net in (PudNet("convnet3"), PudNet("convnet3", "paper"), resnet):
        ratios = _variance_ratios(net)
        for entry, mean in zip(net.layout.entries, ratios.mean(dim=1).tolist(), strict=True):
            assert mean == pytest.approx(1, abs=0.3 if entry.spatial == 1 else 0.2), entry.name
        assert ratios.median(dim=1).values.min() > 0.4


def test_sizes_of_the_published_network(resnet: PudNet) -> None:
    def count(*stages: nn.Module) -> int:
        return sum(part.numel() for stage in stages for part in stage.parameters())

    assert resnet.layout.size == pytest.approx(11.2e6, rel=0.005)
    assert count(resnet.generators) == pytest.approx(23.8e6, rel=0.005)
    assert count(resnet.generators, resnet.embedding, resnet.recurrence) == pytest.approx(24.2e6, rel=0.005)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_save_and_load_are_exact(tmp_path: Path, preset: str) -> None:
    net = PudNet("convnet3", preset, seed=3, alpha=0.25, mean=(0.1, 0.2, 0.3), **SMALL)
    net.generate(_images(4, size=32))  # moves the running statistics of the paper's BatchNorm
    net.save(tmp_path / "net.safetensors", card={"note": "a test"})
    loaded = PudNet.load(tmp_path / "net.safetensors")
    assert loaded.config == net.config and loaded.target_name == "convnet3" and loaded.card == {"note": "a test"}
    assert loaded.state_dict().keys() == net.state_dict().keys()
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert not loaded.training
    expected = net.eval().generate(_images(5, size=32))
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.generate(_images(5, size=32)).items())


def test_half_precision_files_are_half_as_large_and_nearly_the_same(tmp_path: Path) -> None:
    net = PudNet("convnet3", **SMALL)
    net.save(tmp_path / "full.safetensors")
    net.save(tmp_path / "half.safetensors", half=True)
    full, half = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("full", "half"))
    assert half < 0.55 * full
    loaded = PudNet.load(tmp_path / "half.safetensors")
    for name, value in net.state_dict().items():
        got = loaded.state_dict()[name]
        assert got.dtype == value.dtype
        torch.testing.assert_close(got, value.half().to(value.dtype) if value.is_floating_point() else value)


def test_a_users_module_loads_with_the_module(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    net = _own(seed=4).eval()
    net.save(path)
    loaded = PudNet.load(path, target=Own())
    assert torch.equal(loaded.target.head.weight, net.target.head.weight)
    assert torch.equal(loaded.generate(_images(3))["up.weight"], net.generate(_images(3))["up.weight"])
    with pytest.raises(CheckpointError, match="module the checkpoint was made for"):
        PudNet.load(path)
    with pytest.raises(CheckpointError, match="another target"):
        PudNet.load(path, target=ConvNet3(7))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"target": "resnet19"}, "resnet18"),
        ({"target": nn.Linear(3, 3), "image_size": 8}, "at least one Conv2d"),
        ({"target": ConvNet3()}, "image_size"),
        ({"target": ConvNet3}, "nn.Module"),
        ({"target": "convnet3", "preset": "papers"}, "preset"),
        ({"target": "convnet3", "widht": 64}, "widht"),
        ({"target": "convnet3", "recurrence": "lstm"}, "ahru"),
        ({"target": "convnet3", "embedding_norm": "none"}, "layer"),
        ({"target": "convnet3", "conditioned": 1}, "conditioned"),
        ({"target": "convnet3", "width": 0}, "width"),
        ({"target": "convnet3", "layers": 1.5}, "layers"),
        ({"target": "convnet3", "alpha": float("nan")}, "alpha"),
        ({"target": "convnet3", "std": (0.0, 1.0, 1.0)}, "std"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        PudNet(**arguments)


@pytest.mark.parametrize(
    "images",
    [
        [],
        np.zeros((0, 16, 16, 3), np.uint8),
        [_images(2), _images(0)],
        np.zeros((2, 16, 16, 3), np.float32),
        np.zeros((2, 16, 16, 5), np.uint8),
    ],
)
def test_bad_sketches_are_refused(images: object) -> None:
    with pytest.raises(InputError):
        _own().generate(images)


@pytest.mark.parametrize("images", [None, 3, "folder"])
def test_what_is_no_sketch_is_refused(images: object) -> None:
    net = PudNet("convnet3", image_size=16, width=8, generator_width=2)
    for given in (images, [images]):
        with pytest.raises(DtypeError, match="a numpy array or a torch tensor"):
            net.generate(given)


def test_one_image_in_training_mode_is_refused_where_batchnorm_needs_two() -> None:
    net = PudNet("convnet3", preset="paper", image_size=16, width=8, generator_width=2)
    image = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    with pytest.raises(InputError, match=r"two or more.*net\.eval"):
        net.generate(image)
    assert len(net.generate([image, image])) == len(net.eval().generate(image)) == 3
