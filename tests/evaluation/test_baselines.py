"""Random and PCA weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pudnet.errors import InputError, ShapeError
from pudnet.evaluation import pca_weights, random_weights
from pudnet.targets.convnet import ConvNet3


def images(n: int = 40, side: int = 16, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """Smooth random images, so that patches have a spectrum."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(n, channels, side // 2, side // 2, generator=generator)
    return nn.functional.interpolate(small, (side, side), mode="bilinear")


def kernels(module: nn.Module) -> list[torch.Tensor]:
    return [conv.weight.detach().flatten(1) for conv in module.modules() if isinstance(conv, nn.Conv2d)]


def test_kernels_are_orthonormal_and_come_with_their_negatives() -> None:
    network = pca_weights(ConvNet3(width=16), images())
    for weight in kernels(network):  # 27 or 144 dimensions, so 8 pairs
        positive, negative = weight[:8], weight[8:]
        torch.testing.assert_close(positive @ positive.T, torch.eye(8), atol=1e-4, rtol=0)
        torch.testing.assert_close(positive, -negative)


def test_first_kernel_is_the_direction_of_largest_variance() -> None:
    x = images()
    weight = kernels(pca_weights(ConvNet3(width=16), x))[0][0]
    patches = nn.functional.unfold(x, 3).transpose(1, 2).flatten(0, 1)
    centred = patches - patches.mean(0)
    along = (centred @ weight).var()
    directions = nn.functional.normalize(torch.randn(200, 27, generator=torch.Generator().manual_seed(0)), dim=1)
    assert along > (centred @ directions.T).var(0).max()


def test_grey_images_have_nine_pairs_and_random_rest_at_unit_norm() -> None:
    grey = images(channels=1).expand(-1, 3, -1, -1)
    first = kernels(pca_weights(ConvNet3(width=64), grey))[0]
    torch.testing.assert_close(first[:9], -first[9:18])
    rest = first[18:]
    assert not torch.allclose(rest[:23], -rest[23:], atol=0.1)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(64))


def test_kernels_depend_on_the_dataset_and_the_module_is_left_alone() -> None:
    module = ConvNet3(width=8)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    x = images(seed=1)
    one, two, again = pca_weights(module, images()), pca_weights(module, x.flip(1)), pca_weights(module, images())
    assert not torch.allclose(kernels(one)[0].abs(), kernels(two)[0].abs(), atol=1e-2)
    for first, second in zip(kernels(one), kernels(again), strict=True):
        assert torch.equal(first, second)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_batch_norm_is_calibrated_on_the_images() -> None:
    network = pca_weights(ConvNet3(width=8), images())
    assert not network.training
    with torch.no_grad():
        out = network.norms[0](network.convs[0](images()))  # type: ignore[index]
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(8), atol=1e-3, rtol=0)
    torch.testing.assert_close(out.var((0, 2, 3)), torch.ones(8), atol=1e-2, rtol=0)


def test_strides_groups_and_small_maps() -> None:
    target = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=3),
        nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Conv2d(6, 5, 3, padding="same"), nn.Conv2d(5, 4, 1),
    )  # fmt: skip
    network = pca_weights(target, images(side=9 * 2))
    assert all(torch.isfinite(weight).all() for weight in kernels(network))
    assert network(images(3)).shape == (3, 4, 2, 2)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="convolutions"):
        pca_weights(nn.Sequential(nn.Flatten(), nn.Linear(3, 3)), images())
    with pytest.raises(InputError, match="convolutions"):
        pca_weights(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ConvTranspose2d(3, 3, 3)), images())
    with pytest.raises(ShapeError):
        pca_weights(ConvNet3(8), images()[0])


def test_random_weights_have_hes_variance_and_follow_the_seed() -> None:
    module = ConvNet3(width=64)
    with torch.no_grad():
        module.norms[0].weight.fill_(3)
    state = torch.get_rng_state()
    one, same, other = (random_weights(module, seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    second = one.convs[1].weight  # type: ignore[union-attr, index]
    assert abs(float(second.detach().std()) / (2 / (64 * 9)) ** 0.5 - 1) < 0.02
    assert torch.equal(one.norms[0].weight, torch.ones(64))  # type: ignore[union-attr, index]
    assert all(torch.equal(a, b) for a, b in zip(kernels(one), kernels(same), strict=True))
    assert not torch.equal(kernels(one)[0], kernels(other)[0])
