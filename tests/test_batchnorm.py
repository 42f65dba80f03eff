from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pudnet.batchnorm import calibrate, set_policy
from pudnet.errors import DtypeError, InputError, ShapeError


def network() -> nn.Sequential:
    g = torch.Generator().manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6, momentum=0.3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(6, 5, 3, padding=1),
        nn.BatchNorm2d(5, momentum=None),
        nn.InstanceNorm2d(5, track_running_stats=True),
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    return net


def images(n: int, seed: int = 0, size: int = 6) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 3 + 5


def without_dropout(net: nn.Module) -> nn.Module:
    net = copy.deepcopy(net).eval()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.train()
    return net


def test_calibrated_equals_train_mode_on_the_sample() -> None:
    net, sample = network(), images(37)
    expected = without_dropout(net)(sample)
    calibrate(net, sample)
    torch.testing.assert_close(net(sample), expected, rtol=1e-4, atol=1e-4)


def test_batches_pool_to_the_whole_sample() -> None:
    net, sample = network(), images(50)
    whole = copy.deepcopy(net)
    calibrate(whole, sample)
    calibrate(net, sample, batch_size=16)  # 4 batches of 12 or 13
    torch.testing.assert_close(net[1].running_mean, whole[1].running_mean)
    torch.testing.assert_close(net[1].running_var, whole[1].running_var)
    torch.testing.assert_close(net[5].running_var, whole[5].running_var, rtol=0.1, atol=0.0)


def test_class_order_does_not_matter_over_several_batches() -> None:
    ordered = torch.cat([images(100) * 0.1, images(100, seed=1) * 10])
    net, whole = network(), network()
    calibrate(whole, ordered)
    calibrate(net, ordered, batch_size=100)
    torch.testing.assert_close(net[5].running_var, whole[5].running_var, rtol=0.1, atol=0.0)


def test_flags_and_other_modules_are_left_alone() -> None:
    net = network().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    calibrate(net, images(10))
    assert not any(layer.training for layer in net.modules())
    assert net[1].momentum == 0.3 and net[5].momentum is None and net[3].p == 0.5
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in net.modules())
    for key, value in net.state_dict().items():
        changed = key.startswith(("1.", "5.")) and key.endswith(("running_mean", "running_var", "tracked"))
        assert torch.equal(value, before[key]) != changed, key


def test_previous_statistics_do_not_matter() -> None:
    net, other = network(), network()
    other.train()(images(20, seed=5))
    calibrate(net, images(10))
    calibrate(other, images(10))
    assert torch.equal(net[5].running_var, other[5].running_var)


@pytest.mark.parametrize("policy", ["calibrated", "shared", "batch"])
def test_only_batch_depends_on_the_rest_of_the_batch(policy: str) -> None:
    net = network()
    set_policy(net, policy, images(20))
    one = images(1, seed=7)
    alone = net(one)
    among = net(torch.cat([one, images(9, seed=8)]))[:1]
    assert torch.allclose(alone, among, atol=1e-4) == (policy != "batch")


def test_shared_keeps_the_statistics() -> None:
    net = network()
    net[1].running_mean.fill_(2.0)
    set_policy(net, "shared")
    assert torch.equal(net[1].running_mean, torch.full((6,), 2.0)) and not net.training


def test_batch_policy_can_be_calibrated_later() -> None:
    net, sample = network(), images(10)
    set_policy(net, "batch")
    expected = net(sample)
    assert not any("1.running" in key for key in net.state_dict())
    with pytest.raises(InputError, match="shared"):
        set_policy(net, "shared")
    set_policy(net, "calibrated", sample)
    torch.testing.assert_close(net(sample), expected, rtol=1e-4, atol=1e-4)


def test_works_without_batchnorm() -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 1)).train()
    set_policy(net, "calibrated", images(1))
    assert not net.training


def test_bad_input() -> None:
    with pytest.raises(InputError, match="'calibrated', 'batch', 'shared'"):
        set_policy(network(), "frozen")
    with pytest.raises(InputError, match="images"):
        set_policy(network(), "calibrated")
    with pytest.raises(InputError, match="two values per channel"):
        calibrate(network()[:2], images(1, size=1))
    with pytest.raises(InputError, match="at least one image"):
        calibrate(network(), images(0))
    with pytest.raises(InputError, match="batch_size"):
        calibrate(network(), images(4), batch_size=0)
    with pytest.raises(ShapeError):
        calibrate(network(), images(4)[0])
    with pytest.raises(DtypeError):
        calibrate(network(), images(4).byte())
    broken = images(4)
    broken[2, 1, 0, 0] = torch.nan
    with pytest.raises(InputError, match="finite"):
        calibrate(network(), broken)


def test_one_image_with_several_pixels_is_enough_and_flags_survive_an_error() -> None:
    net = network()
    calibrate(net, images(1))
    with pytest.raises(InputError):
        calibrate(net[:2], images(1, size=1))
    assert net[1].momentum == 0.3 and not net[1].training and not net[1]._forward_hooks
