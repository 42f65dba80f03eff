"""The optimised predictor: the numbers of the reference, results that stay, threads, and CUDA graphs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

import pudnet
from pudnet import PudNet, _extension
from pudnet.errors import DtypeError, InputError, ShapeError
from pudnet.optimised import BufferPool, OptimisedPudNet


def images(count: int, seed: int = 0, side: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=["default", "paper"])
def net(request: pytest.FixtureRequest) -> PudNet:
    target = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3),
        torch.nn.Conv2d(16, 32, 3),
        torch.nn.Conv2d(32, 5, 1),
        torch.nn.ConvTranspose2d(5, 4, 2),
    )
    return PudNet(target, request.param, image_size=16, width=32).eval()


def expected(net: PudNet, sketches: object) -> Tensor:
    with torch.no_grad(), pudnet.use_backend("reference"):
        return net.layout.flatten(net.generate(sketches))


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found.float() - wanted).abs().max() / wanted.abs().max())


def test_same_numbers_as_the_reference(net: PudNet) -> None:
    fast = OptimisedPudNet(net)
    for count, side in ((1, 16), (12, 16), (5, 23)):  # also images that must be resized
        sketch = images(count, count, side)
        weights = fast.generate(sketch)
        assert list(weights) == [entry.name for entry in net.layout.entries]
        assert error(net.layout.flatten(weights), expected(net, sketch)) < 1e-5
    sketches = [images(4, 1), images(9, 2), images(1, 3)]
    assert error(net.layout.flatten(fast.generate_batch(sketches)), expected(net, sketches)) < 1e-5


def test_unconditioned() -> None:
    net = PudNet("convnet3", image_size=16, width=32, conditioned=False).eval()
    assert error(net.layout.flatten(OptimisedPudNet(net).generate(images(3))), expected(net, images(5, 1))) < 1e-5


@pytest.mark.skipif(bool(_extension.why_not()), reason="; ".join(_extension.why_not()))
def test_native_where_there_is_an_extension(net: PudNet) -> None:
    assert OptimisedPudNet(net).backend == "native"


def test_without_extension_the_reference_runs(net: PudNet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "why_not", lambda: ["not built"])
    fast = OptimisedPudNet(net)
    assert fast.backend == "reference"
    found = net.layout.flatten(fast.generate(images(6)))
    assert error(found, expected(net, images(6))) < 1e-5 and not found.is_inference()
    half = OptimisedPudNet(net, dtype=torch.bfloat16, out_dtype=torch.bfloat16)
    found = net.layout.flatten(half.generate(images(6)))
    assert found.dtype == torch.bfloat16 and error(found, expected(net, images(6))) < 2e-2


def test_bfloat16_rows_and_results(net: PudNet) -> None:
    wanted = expected(net, images(6))
    found = net.layout.flatten(OptimisedPudNet(net, dtype=torch.bfloat16).generate(images(6)))
    assert found.dtype == torch.float32 and 1e-6 < error(found, wanted) < 1e-2
    found = net.layout.flatten(OptimisedPudNet(net, out_dtype=torch.bfloat16).generate(images(6)))
    assert found.dtype == torch.bfloat16 and error(found, wanted) < 1e-2
    with pytest.raises(DtypeError, match=r"dtype must be torch\.float32 or torch\.bfloat16; got torch\.float16"):
        OptimisedPudNet(net, dtype=torch.float16)


def test_later_changes_of_the_net_do_not_reach_it(net: PudNet) -> None:
    fast = OptimisedPudNet(net)
    wanted = expected(net, images(6))
    saved = {name: x.clone() for name, x in net.state_dict().items()}
    try:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(2)
        net.train()
        assert error(net.layout.flatten(fast.generate(images(6))), wanted) < 1e-5
    finally:
        net.load_state_dict(saved)
        net.eval()


def test_results_belong_to_the_caller(net: PudNet) -> None:
    fast = OptimisedPudNet(net)
    name = net.layout.entries[1].name
    kept = fast.generate(images(6, 0))[name]  # one view of the result is enough to keep it
    copy = kept.clone()
    others = [fast.generate(images(6, seed)) for seed in range(1, 6)]
    assert torch.equal(kept, copy)
    assert len({weights[name].untyped_storage().data_ptr() for weights in [{name: kept}, *others]}) == 6


@pytest.mark.skipif(bool(_extension.why_not()), reason="; ".join(_extension.why_not()))
def test_memory_is_used_again_once_nobody_has_it(net: PudNet) -> None:
    fast = OptimisedPudNet(net)
    name = net.layout.entries[0].name
    places = set()
    for seed in range(5):
        places.add(fast.generate(images(2, seed))[name].untyped_storage().data_ptr())
    assert len(places) == 1


def test_pool_gives_every_living_tensor_its_own_memory() -> None:
    pool = BufferPool(spare=2)
    held = [pool.take((3, 5), torch.float32) for _ in range(4)]
    assert len({x.data_ptr() for x in held}) == 4 and all(x.data_ptr() % 64 == 0 for x in held)
    addresses = [x.data_ptr() for x in held]
    view = held[0][1:, 2]
    array = held[1].numpy()  # keeps the memory through another library
    del held
    again = pool.take((3, 5), torch.float32)
    assert again.data_ptr() in addresses[2:]
    assert pool.take((4,), torch.bfloat16).shape == (4,)  # another size: memory of its own
    assert view.shape == (2,) and array.shape == (3, 5)


def test_results_work_with_autograd(net: PudNet) -> None:
    weights = OptimisedPudNet(net).generate(images(3))
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    torch.nn.functional.conv2d(x, weights["0.weight"]).sum().backward()  # inference tensors would refuse
    assert x.grad is not None


def test_writes_into_out(net: PudNet) -> None:
    fast = OptimisedPudNet(net)
    out = torch.empty(net.layout.size)
    weights = fast.generate(images(3), out=out)
    assert weights["0.weight"].untyped_storage().data_ptr() == out.data_ptr()
    assert error(out, expected(net, images(3))) < 1e-5
    batch = torch.empty(2, net.layout.size)
    fast.generate_batch([images(3), images(2, 1)], out=batch)
    assert error(batch, expected(net, [images(3), images(2, 1)])) < 1e-5
    with pytest.raises(ShapeError, match="out must be contiguous"):
        fast.generate(images(3), out=batch)
    with pytest.raises(DtypeError, match=r"out must be torch\.float32 on cpu; got torch\.float64"):
        fast.generate(images(3), out=out.double())


def test_several_threads_share_it(net: PudNet) -> None:
    fast = OptimisedPudNet(net)
    wanted = [expected(net, images(3, seed)) for seed in range(4)]
    start = threading.Barrier(4)

    def work(seed: int) -> float:
        start.wait()
        found = [net.layout.flatten(fast.generate(images(3, seed))) for _ in range(5)]
        return max(error(x, wanted[seed]) for x in found)

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(work, range(4))) < 1e-5


def test_bad_input(net: PudNet) -> None:
    fast = OptimisedPudNet(net)
    for bad in ([], images(2)):
        with pytest.raises(InputError, match="images must be a list of at least one sketch"):
            fast.generate_batch(bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least one image"):
        fast.generate(images(0))
    with pytest.raises(InputError, match="uint8"):
        fast.generate(images(2).astype(np.float32))
    with pytest.raises(InputError, match="stream must be None"):
        fast.generate(images(2), stream=object())


@pytest.mark.cuda
def test_graphs_give_the_numbers_of_the_reference() -> None:
    device = PudNet("convnet3").eval().cuda()
    fast = OptimisedPudNet(device)
    assert fast.backend == "cuda graph"
    kept = []
    for seed in range(3):
        sketches = [torch.from_numpy(images(3, seed)).cuda(), torch.from_numpy(images(5, seed)).cuda()]
        with torch.no_grad(), pudnet.use_backend("reference"):
            kept.append((fast.generate_batch(sketches), device.layout.flatten(device.generate(sketches))))
    for weights, wanted in kept:  # later replays have not overwritten earlier results
        assert error(device.layout.flatten(weights), wanted) < 1e-5


@pytest.mark.cuda
def test_graphs_on_a_stream_and_beyond_the_limit() -> None:
    device = PudNet("convnet3").eval().cuda()
    fast = OptimisedPudNet(device)
    stream = torch.cuda.Stream()
    out = torch.empty(device.layout.size, device="cuda")
    for count in range(1, 12):  # more sizes than graphs are kept
        sketch = torch.from_numpy(images(count, side=32)).cuda()
        torch.cuda.synchronize()
        fast.generate(sketch, out=out, stream=stream)
        stream.synchronize()
        with torch.no_grad(), pudnet.use_backend("reference"):
            assert error(out, device.layout.flatten(device.generate(sketch))) < 1e-5


@pytest.mark.cuda
def test_a_replay_never_waits_for_the_gpu() -> None:
    device = PudNet("convnet3").eval().cuda()
    fast = OptimisedPudNet(device)
    sketch = torch.from_numpy(images(10, side=32)).cuda()
    fast.generate(sketch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fast.generate(sketch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
