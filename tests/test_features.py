from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet.errors import InputError, ShapeError
from pudnet.features import VIEWS, Reading, View, feature_maps


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        first = F.relu(self.conv(x))
        return [first, F.max_pool2d(first, 2)]

    def forward(self, x: Tensor) -> Tensor:
        return self.feature_maps(x)[-1]


class Residual(nn.Module):
    """Overwrites the second norm's output in place, as torchvision's blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.free_norm = nn.BatchNorm2d(4)  # follows no convolution
        self.relu = nn.ReLU(inplace=True)
        self.bare = nn.Conv2d(4, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.relu(self.norm1(self.conv1(x)))
        b = self.norm2(self.conv2(a))
        b += a
        return self.bare(self.free_norm(self.relu(b)))


def images(n: int = 5, size: int = 9) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_a_modules_own_method_is_used() -> None:
    module, x = Own(), images()
    assert [list(m.shape) for m in feature_maps(module, x)] == [[5, 8, 9, 9], [5, 8, 4, 4]]


def test_norms_that_follow_convolutions_are_tapped_before_in_place_changes() -> None:
    module, x = Residual().eval(), images()
    maps = feature_maps(module, x)
    first = F.relu(module.norm1(module.conv1(x)))
    second = module.norm2(module.conv2(first))
    torch.testing.assert_close(maps[0], first)
    torch.testing.assert_close(maps[1], F.relu(second))
    torch.testing.assert_close(maps[2], F.relu(module(x)))
    assert len(maps) == 3


def test_threads_that_share_a_module_get_their_own_maps() -> None:
    module = Residual().eval()
    given = [images(n) for n in range(1, 5)]
    alone = [feature_maps(module, x) for x in given]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: feature_maps(module, given[number % 4]), range(200)))
    for number, maps in enumerate(found):
        assert [m.shape for m in maps] == [m.shape for m in alone[number % 4]]
        assert all(torch.equal(m, wanted) for m, wanted in zip(maps, alone[number % 4], strict=True))


def test_norms_after_several_convolutions_keep_call_order() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.late, self.early = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 5, 1)
            self.norm_late, self.norm_early = nn.BatchNorm2d(2), nn.BatchNorm2d(5)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.early(x), self.late(x)
            return torch.cat([self.norm_early(a), self.norm_late(b)], 1)

    module, x = Branches().eval(), images()
    early, late = feature_maps(module, x)
    torch.testing.assert_close(early, F.relu(module.norm_early(module.early(x))))
    torch.testing.assert_close(late, F.relu(module.norm_late(module.late(x))))


def test_hooks_are_removed_after_success_and_failure() -> None:
    module = Residual().eval()
    feature_maps(module, images())
    with pytest.raises(RuntimeError):
        feature_maps(module, torch.zeros(1, 7, 9, 9))
    assert not any(layer._forward_hooks for layer in module.modules())


def test_a_module_without_convolutions_is_an_error() -> None:
    with pytest.raises(InputError, match="calls none"):
        feature_maps(nn.Flatten(), images())


@pytest.mark.parametrize(
    ("shape", "features"),
    [
        ((64, 16, 16), 1024),
        ((64, 4, 4), 1024),
        ((65, 16, 16), 65 * 4),
        ((128, 8, 8), 512),
        ((256, 3, 3), 1024),
        ((512, 4, 4), 512),
        ((2000, 7, 7), 2000),
        ((8, 3, 5), 8 * 4),
        ((8, 1, 9), 8),
        ((8, 7, 5), 8 * 16),
    ],
)
def test_pooling_grid(shape: tuple[int, int, int], features: int) -> None:
    x = torch.rand(3, *shape)
    assert Reading().pool([x]).shape == (3, features + shape[0])
    pooled = Reading(spread=False).pool([x])
    assert pooled.shape == (3, features)
    g = round((features / shape[0]) ** 0.5)
    torch.testing.assert_close(pooled, F.normalize(F.adaptive_avg_pool2d(x, g).flatten(1), dim=1))


def test_each_map_is_normalised_and_the_last_can_be_had_alone() -> None:
    maps = [torch.rand(4, 8, 6, 6) * 100, torch.rand(4, 10), torch.zeros(4, 2, 2, 2)]
    pooled = Reading(spread=False).pool(maps)
    assert pooled.shape == (4, 128 + 10 + 8)
    torch.testing.assert_close(pooled[:, :128].norm(dim=1), torch.ones(4))
    torch.testing.assert_close(pooled[:, 128:138], F.normalize(maps[1], dim=1))
    assert torch.equal(pooled[:, 138:], torch.zeros(4, 8))
    torch.testing.assert_close(Reading("last").pool(maps[:2]), F.normalize(maps[1], dim=1))


def test_spread_adds_root_means_and_deviations() -> None:
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    means = F.adaptive_avg_pool2d(x, 4).flatten(1)
    roots = F.normalize(means.sign() * means.abs().sqrt(), dim=1)
    deviations = F.normalize(x.std(dim=(2, 3), correction=0), dim=1)
    torch.testing.assert_close(Reading().pool([x]), torch.cat([roots, deviations], dim=1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("channels", [1, 2, 5, 70])
def test_covariances_are_those_of_any_two_channels_and_count_less_where_places_are_few(channels: int) -> None:
    x = torch.randn(4, channels, 3, 7, dtype=torch.float64)
    usual, pooled = Reading().pool([x]), Reading(covariances=True).pool([x])
    torch.testing.assert_close(pooled[:, : usual.shape[1]], usual, rtol=1e-6, atol=1e-9)
    used = [i * channels // 64 for i in range(64)] if channels > 64 else list(range(channels))
    pairs = [(i, j) for n, i in enumerate(used) for j in used[n + 1 :]]
    assert pooled.shape[1] == usual.shape[1] + len(pairs)
    if not pairs:
        return
    for image, found in zip(x, pooled[:, usual.shape[1] :], strict=True):
        covariance = torch.cov(image.flatten(1), correction=0)
        wanted = torch.stack([covariance[pair] for pair in pairs])
        wanted = F.normalize(wanted.sign() * wanted.abs().sqrt(), dim=0) * 21 / (21 + len(used))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_covariances_come_from_the_first_the_middle_and_the_last_of_many_maps() -> None:
    maps = [torch.rand(2, 3, 4, 4) for _ in range(9)]
    usual, pooled = Reading().pool(maps), Reading(covariances=True).pool(maps)
    assert pooled.shape[1] == usual.shape[1] + 3 * 3
    for one in maps:  # each would be read, alone
        assert Reading(covariances=True).pool([one]).shape[1] == Reading().pool([one]).shape[1] + 3
    width = usual.shape[1] // 9
    for number, place in ((0, width), (4, 5 * width + 3), (8, 9 * width + 6)):
        own = Reading(covariances=True).pool([maps[number]])[:, width:]
        torch.testing.assert_close(pooled[:, place : place + 3], own)


def test_views_move_repeat_the_border_and_mirror() -> None:
    x = torch.arange(12.0).view(1, 1, 3, 4)
    assert View(down=1).of(x)[0, 0].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7]]
    assert View(right=-1).of(x)[0, 0, 0].tolist() == [1, 2, 3, 3]
    assert View(right=1, mirrored=True).of(x)[0, 0, 0].tolist() == [2, 1, 0, 0]
    assert View().of(x) is x
    large = torch.rand(1, 1, 224, 224)
    assert torch.equal(View(down=-1).of(large)[:, :, :217], large[:, :, 7:])


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("reading", [Reading(covariances=True), Reading("last", spread=False)])
def test_statistics_are_averaged_over_views_before_they_are_normalised(views: str, reading: Reading) -> None:
    network, x = Own(), images(3)
    seen = [feature_maps(network, view.of(x)) for view in VIEWS[views]]
    parts = [reading._parts(maps) for maps in seen]
    means = [torch.stack([part.values for part in same]).mean(0) for same in zip(*parts, strict=True)]
    units = [F.normalize(mean, dim=1) * part.weight for mean, part in zip(means, parts[0], strict=True)]
    torch.testing.assert_close(reading(network, x, views), torch.cat(units, dim=1))


def test_spread_is_finite_and_has_finite_gradients_where_nothing_varies() -> None:
    x = torch.zeros(2, 3, 4, 4)
    x[1] = 1.0
    x.requires_grad_()
    pooled = Reading(covariances=True).pool([x])
    assert torch.equal(pooled[0], torch.zeros(54))
    assert torch.equal(pooled[1, 48:], torch.zeros(6))
    pooled.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


class Mapless(nn.Module):
    def feature_maps(self, x: Tensor) -> list[Tensor]:
        return []


def test_bad_input() -> None:
    with pytest.raises(InputError, match="'all' or 'last'"):
        Reading("first")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least one feature map"):
        Reading().pool([])
    with pytest.raises(InputError, match="at least one feature map"):
        Reading()(Mapless(), images(2))
    with pytest.raises(ShapeError):
        Reading().pool([torch.rand(2, 3, 4)])


def test_exports_with_a_dynamic_batch() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Own()

        def forward(self, x: Tensor) -> Tensor:
            maps = feature_maps(self.body, x)  # 9 x 9 and 4 x 4
            return Reading(covariances=True).pool([*maps, x[:, :, :8, :8]])

    module = Pooled().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(module, (images(5),), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(images(3)), module(images(3)))
