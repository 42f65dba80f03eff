"""Target networks: shapes, names and arithmetic."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet.errors import InputError, ShapeError
from pudnet.specs import WeightLayout
from pudnet.targets import TARGETS, ConvNet3, UNet, build_target, resnet18, resnet34
from pudnet.targets.folding import max_pool


def _images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "size", "layers", "weights"),
    [
        ("convnet3", 32, 3, 75_456),
        ("resnet18", 32, 20, 11_159_232),
        ("resnet18-224", 224, 20, 11_166_912),
        ("resnet34", 32, 36, 21_259_968),
        ("resnet34-224", 224, 36, 21_267_648),
        ("unet", 128, 18, 21_937_536),
    ],
)
def test_registered_targets_have_the_published_sizes(name: str, size: int, layers: int, weights: int) -> None:
    with torch.device("meta"):
        module, image_size = build_target(name)
    layout = WeightLayout.from_module(module)
    assert (image_size, len(layout.entries), layout.size) == (size, layers, weights)


def test_every_target_is_tested_above() -> None:
    assert set(TARGETS) == {"convnet3", "resnet18", "resnet18-224", "resnet34", "resnet34-224", "unet"}


def test_an_unknown_target_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="resnet18-224"):
        build_target("resnet50")


def test_resnets_carry_torchvisions_names() -> None:
    expected = {"conv1.weight"} | {f"bn1.{field}" for field in _norm_fields()}
    for stage in range(1, 5):
        for block in range(2):
            prefix = f"layer{stage}.{block}"
            expected |= {f"{prefix}.conv{k}.weight" for k in (1, 2)}
            expected |= {f"{prefix}.bn{k}.{field}" for k in (1, 2) for field in _norm_fields()}
            if stage > 1 and block == 0:
                expected |= {f"{prefix}.downsample.0.weight"}
                expected |= {f"{prefix}.downsample.1.{field}" for field in _norm_fields()}
    with torch.device("meta"):
        assert set(resnet18().state_dict()) == expected
        shapes = {name: tuple(value.shape) for name, value in resnet18(224).state_dict().items()}
    assert shapes["conv1.weight"] == (64, 3, 7, 7)
    assert shapes["layer3.0.conv1.weight"] == (256, 128, 3, 3)
    assert shapes["layer3.0.downsample.0.weight"] == (256, 128, 1, 1)


def _norm_fields() -> tuple[str, ...]:
    return ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize(("stem", "size", "side"), [(32, 11, 11), (224, 45, 12)])
def test_resnet_feature_maps(stem: int, size: int, side: int) -> None:
    net = resnet18(stem).eval()
    x = _images(1, 3, size, size)
    with torch.no_grad():
        maps, features = net.feature_maps(x), net(x)
    sides = [side, side, side]
    for _ in range(3):
        side = (side + 1) // 2
        sides += [side, side]
    assert [tuple(part.shape[1:]) for part in maps] == [
        (channels, s, s) for channels, s in zip((64, 64, 64, 128, 128, 256, 256, 512, 512), sides, strict=True)
    ]
    torch.testing.assert_close(features, F.adaptive_avg_pool2d(maps[-1], 1).flatten(1))


@pytest.mark.parametrize("stem", [32, 224])
def test_resnet_follows_the_published_wiring(stem: int) -> None:
    """Against the network written out by hand from its state dict alone."""
    net = resnet18(stem).eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(1))
                module.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
        state = net.state_dict()

        def conv_norm(x: Tensor, conv: str, norm: str, stride: int) -> Tensor:
            weight = state[f"{conv}.weight"]
            x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
            mean, var, gamma, beta = (
                state[f"{norm}.{field}"][:, None, None] for field in ("running_mean", "running_var", "weight", "bias")
            )
            return (x - mean) / (var + 1e-5).sqrt() * gamma + beta

        x = images = _images(1, 3, 16, 16)
        x = F.relu(conv_norm(x, "conv1", "bn1", 2 if stem == 224 else 1))
        if stem == 224:
            x = F.max_pool2d(x, 3, 2, 1)
        for stage in range(1, 5):
            for block in range(2):
                p = f"layer{stage}.{block}"
                stride = 2 if stage > 1 and block == 0 else 1
                y = F.relu(conv_norm(x, f"{p}.conv1", f"{p}.bn1", stride))
                y = conv_norm(y, f"{p}.conv2", f"{p}.bn2", 1)
                if stride == 2:
                    x = conv_norm(x, f"{p}.downsample.0", f"{p}.downsample.1", 2)
                x = F.relu(x + y)
        torch.testing.assert_close(net(images), x.mean(dim=(2, 3)), atol=1e-4, rtol=1e-4)


def test_resnet34_has_three_four_six_three_blocks() -> None:
    with torch.device("meta"):
        net = resnet34()
    assert [len(net.get_submodule(f"layer{stage}")) for stage in range(1, 5)] == [3, 4, 6, 3]


def test_convnet3_feature_maps() -> None:
    net = ConvNet3(width=5).eval()
    x = _images(2, 3, 17, 17)
    with torch.no_grad():
        maps = net.feature_maps(x)
        assert [tuple(part.shape) for part in maps] == [(2, 5, 8, 8), (2, 5, 4, 4), (2, 5, 2, 2)]
        assert torch.equal(net(x), maps[-1].flatten(1))


def test_unet_has_the_published_channels() -> None:
    net = UNet(8)
    assert [tuple(conv.weight.shape[:2]) for conv in net.encoder] == [
        (8, 3), (8, 8), (16, 8), (16, 16), (32, 16), (32, 32), (64, 32), (64, 64), (128, 64),
    ]  # fmt: skip
    assert [tuple(conv.weight.shape[:2]) for conv in net.decoder] == [
        (128, 64), (128, 64), (64, 32), (64, 32), (32, 16), (32, 16), (16, 8), (16, 8), (8, 3),
    ]  # fmt: skip


@pytest.mark.parametrize(("depth", "height", "width"), [(4, 16, 48), (2, 4, 12), (0, 5, 7)])
def test_unet_keeps_the_size(depth: int, height: int, width: int) -> None:
    out = UNet(2, depth).eval()(_images(2, 3, height, width))
    assert out.shape == (2, 3, height, width)
    assert (out >= 0).all()  # the last layer has its ReLU too


def test_unet_uses_every_skip_connection() -> None:
    """The gradient reaches every convolution also where the path through the bottom is cut."""
    net = UNet(4).eval()
    with torch.no_grad():
        net.encoder[8].weight.zero_()
        for norm in net.encoder_norms:
            norm.bias.fill_(0.1)
    net(_images(1, 3, 16, 16)).sum().backward()
    assert all(conv.weight.grad.abs().sum() > 0 for conv in net.encoder[:8])


@pytest.mark.parametrize("shape", [(1, 3, 24, 32), (1, 3, 32, 24)])
def test_unet_refuses_sizes_it_cannot_halve(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="multiples of 16"):
        UNet(2)(_images(*shape))


def _with_statistics(name: str) -> nn.Module:
    torch.manual_seed(0)
    network, _ = build_target(name)
    for norm in (one for one in network.modules() if isinstance(one, nn.BatchNorm2d)):
        assert norm.running_mean is not None and norm.running_var is not None
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        nn.init.normal_(norm.weight)  # of both signs
        nn.init.normal_(norm.bias)
    return network.eval()


@pytest.mark.parametrize("name", ["convnet3", "resnet18"])
def test_batch_norms_are_part_of_the_convolutions_where_no_gradient_is_asked(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, images = _with_statistics(name), _images(3, 3, 32, 32)
    expected = network(images)  # with gradients the modules themselves are called
    called: list[Tensor] = []
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda norm, x: called.append(x))
    with torch.inference_mode():
        folded = network(images)
    assert called == []  # none of them
    assert (folded - expected).norm() < 1e-5 * expected.norm()
    with torch.no_grad():
        double = network.double()(images.double())
    assert (folded.double() - double).norm() < 1e-5 * double.norm()


@pytest.mark.parametrize("shape", [(2, 3, 8, 6), (2, 5, 7, 9), (1, 1, 2, 3), (0, 3, 4, 4)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_maxima_are_those_of_torch(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    x = _images(*shape).contiguous(memory_format=layout)
    if x.numel():
        x[0, 0, 0, 0] = torch.nan
    with torch.no_grad():
        found, expected = max_pool(x), F.max_pool2d(x, 2)
    assert torch.equal(found.nan_to_num(9.0), expected.nan_to_num(9.0))
    assert not x.numel() or found.is_contiguous(memory_format=layout)
    x = _images(*shape).zero_().requires_grad_()
    max_pool(x).sum().backward()  # of equal values one has the gradient
    assert x.grad is not None and set(x.grad.unique().tolist()) <= {0.0, 1.0}
    with torch.no_grad(), pytest.raises(RuntimeError, match="too small"):
        max_pool(_images(1, 2, 1, 8))


@pytest.mark.parametrize("name", ["convnet3", "resnet18"])
def test_a_watched_layer_and_batch_statistics_are_not_folded(name: str) -> None:
    network, images = _with_statistics(name), _images(3, 3, 32, 32)
    seen: list[Tensor] = []
    norm = next(one for one in network.modules() if isinstance(one, nn.BatchNorm2d))
    with torch.no_grad():
        handle = norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
        network(images)
        handle.remove()
        assert len(seen) == 1
        before = norm.running_mean.clone()  # type: ignore[union-attr]
        network.train()(images)
        assert not torch.equal(before, norm.running_mean)  # type: ignore[arg-type]
