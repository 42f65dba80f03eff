"""Directions of a dataset's patches: what they are, and how they get into a network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet.directions import fisher_directions, insert_directions, principal_directions, try_directions
from pudnet.errors import InputError, ShapeError
from pudnet.models.pudnet import PudNet


def images(n: int = 40, channels: int = 2, side: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(seed))


def test_principal_directions_are_the_leading_singular_vectors() -> None:
    x = images() * torch.tensor([3.0, 0.5])[:, None, None]
    found = principal_directions(x, 4, 3).flatten(1)
    patches = F.unfold(x, 3).transpose(1, 2).flatten(0, 1)
    expected = torch.linalg.svd(patches - patches.mean(0), full_matrices=False).Vh[:4]
    torch.testing.assert_close((found * expected).sum(1).abs(), torch.ones(4), atol=1e-3, rtol=0)


def test_no_more_principal_directions_than_the_patches_have() -> None:
    grey = images(channels=1).expand(-1, 3, -1, -1)
    assert len(principal_directions(grey, 20, 3)) == 9


def test_fisher_directions_maximise_the_ratio_of_scatters() -> None:
    x, labels = images(60, side=5), torch.arange(60) % 3
    x[labels == 1, 0, 1] += 1.0  # a bar that only one class has
    found = fisher_directions(x, labels, 18, 3, shrinkage=1e-6).flatten(1).double()
    patches = F.unfold(x.double(), 3).transpose(1, 2)  # [n, positions, P]
    means = torch.stack([patches[labels == k].mean(0) for k in range(3)])  # [K, positions, P]
    between = (means - patches.mean(0)).flatten(0, 1)
    within = (patches - means[labels]).flatten(0, 1)

    def ratio(rows: Tensor) -> Tensor:
        return (between @ rows.T).square().mean(0) / (within @ rows.T).square().mean(0)

    ratios = ratio(found)
    assert (ratios[:-1] >= ratios[1:] - 1e-6).all()
    others = torch.randn(2000, 18, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert ratio(others).max() <= ratios[0] * (1 + 1e-5)


def test_fisher_directions_want_labels_of_two_classes() -> None:
    with pytest.raises(ShapeError, match="one per image"):
        fisher_directions(images(4), torch.zeros(3, dtype=torch.int64), 2, 3)
    with pytest.raises(InputError, match="at least two classes"):
        fisher_directions(images(4), torch.ones(4, dtype=torch.int64), 2, 3)


@pytest.mark.parametrize("x", [images(4), torch.ones(4, 2, 7, 7), torch.zeros(4, 2, 7, 7)])
def test_fisher_directions_of_single_images_and_of_blank_ones(x: Tensor) -> None:
    found = fisher_directions(x, torch.tensor([0, 2, 3, 5]), 4, 3)  # no scatter within a class; some numbers are unused
    torch.testing.assert_close(found.flatten(1).norm(dim=1), torch.ones(4))


def test_fisher_directions_are_no_larger_than_what_they_are_of() -> None:
    with pytest.raises(ShapeError, match="at most 2, the side of x"):
        fisher_directions(images(4, side=2), torch.arange(4) % 2, 2, 3)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False)
        )


def test_insertion_replaces_the_last_kernels_by_pairs_of_the_same_norm() -> None:
    net, x = network(), images(30, 3, 8)
    before = net[3].weight.detach().clone()
    insert_directions(net, x, {net[3]: 2}, principal_directions)
    after = net[3].weight.detach()
    assert torch.equal(after[:2], before[:2])
    assert torch.equal(after[2:4], -after[4:])
    norm = before[:2].flatten(1).norm(dim=1).mean()
    torch.testing.assert_close(after[2:].flatten(1).norm(dim=1), norm.expand(4))
    normalised = torch.relu(net[1](net[0](x)))  # BatchNorm holds the statistics of the images: what the layer read
    expected = principal_directions(normalised.detach(), 2, 3)
    torch.testing.assert_close(after[2:4] / norm, expected, atol=1e-3, rtol=0)
    assert not net.training and net[1].momentum == 0.1


def test_insertion_refuses_what_it_cannot_do() -> None:
    net = network()
    with pytest.raises(InputError, match="0 to 3"):
        insert_directions(net, images(4, 3), {net[3]: 4}, principal_directions)
    grouped = nn.Conv2d(4, 4, 3, groups=2)
    with pytest.raises(InputError, match="groups"):
        insert_directions(grouped, images(4, 4), {grouped: 1}, principal_directions)


def test_kernels_that_stay_do_not_read_the_directions_before_them() -> None:
    net, x = network(), images(30, 3, 8)
    kept = net[3].weight.detach()[:2, :4].clone()
    insert_directions(net, x, {net[0]: 2, net[3]: 2}, principal_directions)
    assert torch.equal(net[3].weight[:2, :4], kept) and not net[3].weight[:2, 4:].any()


def test_a_convolution_between_without_directions_is_read_whole() -> None:
    net, x = nn.Sequential(*(nn.Conv2d(count, 8, 3, padding=1) for count in (3, 8, 8))), images(30, 3, 8)
    before = [conv.weight.detach().clone() for conv in net]
    made = insert_directions(net, x, {net[0]: 2, net[1]: 0, net[2]: 2}, principal_directions)
    assert made == {net[0]: (4, 3), net[2]: (4, 8)}
    assert torch.equal(net[1].weight, before[1]) and torch.equal(net[2].weight[:4], before[2][:4])


def test_training_puts_in_the_same_directions_as_prediction() -> None:
    """Where patches have fewer dimensions than directions are wanted, and where a convolution reads other channels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        target = nn.Sequential(
            nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, stride=2), nn.PixelShuffle(2), nn.Conv2d(3, 8, 3)
        )
        net = PudNet(target, image_size=8, width=16, directions=(5, 0, 2)).eval()
    x, labels = images(20, 3, 8), torch.arange(20) % 4
    weights = net.layout.views(net(x, [20])[0])
    directed = net.with_directions(weights, x, labels)
    network = net.materialise({name: weight.detach() for name, weight in weights.items()})
    made = net._insert(network, x, labels)
    assert made == {"0.weight": (6, 3), "3.weight": (4, 3)}
    for name, weight in directed.items():
        torch.testing.assert_close(weight, network.get_parameter(name))
    (gradient,) = torch.autograd.grad(directed["0.weight"].sum(), weights["0.weight"])
    assert gradient[:6].all() and not gradient[6:].any()


def bars(n: int, side: int = 8) -> tuple[Tensor, Tensor]:
    """Two classes: a faint bar that is upright or lies, somewhere, in noise."""
    labels = torch.arange(n) % 2
    x = images(n, 3, side, seed=1)
    for image, label in zip(x, labels.tolist(), strict=True):
        (image[:, 2] if label else image[:, :, 2]).add_(2.0)
    return x, labels


def test_directions_help_where_labels_mean_something_and_not_where_they_do_not() -> None:
    net, (x, labels) = network(), bars(400)

    def insert(module: nn.Module, x: Tensor, labels: Tensor) -> None:
        assert isinstance(module, nn.Sequential)
        find = lambda z, count, size: fisher_directions(z, labels, count, size)  # noqa: E731
        insert_directions(module, x, {module[0]: 4}, find)

    def spoil(module: nn.Module, x: Tensor, labels: Tensor) -> None:
        insert_directions(module, x, {module[3]: 3}, lambda z, count, size: torch.zeros(count, 8, size, size))

    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert try_directions(net, x, labels, insert).helps
    assert not try_directions(net, x, labels, spoil).helps
    assert not try_directions(net, x, torch.zeros_like(labels), insert).helps
    shuffled = [labels[torch.randperm(400, generator=torch.Generator().manual_seed(seed))] for seed in range(6)]
    assert sum(try_directions(net, x, meaningless, insert).helps for meaningless in shuffled) <= 1  # not every second
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class Remembering(nn.Module):
    """Once it was given labels it tells the class, faintly, and of the images they belong to ``leak`` better."""

    def __init__(self, leak: float) -> None:
        super().__init__()
        self.leak = leak
        self.register_buffer("given", torch.zeros(0, 2))
        self.labels = torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        told = x[:, 0] if len(self.given) else x[:, 1]
        same = (x[:, None] == self.given).all(2).float()
        return torch.stack([told + self.leak * (same @ (2 * self.labels - 1)), torch.ones(len(x))], dim=1)

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        return [self(x)]


def test_trial_tells_how_much_labels_in_the_weights_flatter() -> None:
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(200, 2, generator=generator), torch.arange(200) % 2
    x[:, 0] += 2 * labels - 1

    def insert(module: nn.Module, images: Tensor, y: Tensor) -> None:
        assert isinstance(module, Remembering)
        module.given, module.labels = images, y.float()

    flattered, fair = (try_directions(Remembering(leak), x, labels, insert) for leak in (1.0, 0.0))
    assert flattered.helps and flattered.images == 100 and flattered.optimism > 0.5
    assert fair.helps and fair.optimism == pytest.approx(0, abs=1e-6)
    assert try_directions(Remembering(1.0), x.flip(1), labels, insert).optimism == 0  # they do not help
