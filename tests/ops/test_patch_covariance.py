"""patch_covariance: every backend against numpy in float64, gradients, layouts, accuracy, bad input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pudnet import _extension, ops
from pudnet.errors import BackendUnavailableError, DtypeError, InputError, ShapeError
from pudnet.ops import patch_covariance, reference

RUNS = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("native", "cpu"), id="native"),
    pytest.param(("reference", "cuda"), marks=pytest.mark.cuda, id="reference-cuda"),
    pytest.param(("native", "cuda"), marks=pytest.mark.cuda, id="native-cuda"),
]
SIZES = [  # n, C, H, W, kernel_size, padding, classes
    (1, 1, 1, 1, 1, 0, 1),
    (1, 2, 3, 3, 3, 0, 1),  # a single patch
    (7, 3, 6, 5, 3, 0, 3),
    (9, 17, 4, 7, 3, 1, 4),
    (5, 33, 3, 5, 2, 0, 2),
    (3, 4, 4, 5, 4, 0, 2),  # as many positions as one row gives
    (6, 3, 2, 3, 5, 2, 2),  # the kernel larger than the image
    (4, 40, 9, 8, 1, 0, 2),
    (2, 19, 50, 60, 3, 1, 1),  # an image larger than a chunk
    (0, 3, 4, 4, 3, 0, 2),
]


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    backend, device = request.param
    if backend == "native" and _extension.why_not():
        pytest.skip(_extension.why_not()[0])
    yield backend, device


def make(n: int, channels: int, height: int, width: int, classes: int = 1) -> tuple[Tensor, Tensor]:
    """Images of correlated channels, and labels; some are -1, and the last of several classes is empty."""
    generator = torch.Generator().manual_seed(n + 10 * channels)
    images = torch.randn(n, channels, height, width, generator=generator)
    images = images + 0.5 * images.roll(1, dims=1) + 0.5 * images.roll(1, dims=3) + 3
    return images, torch.randint(-1, max(classes - 1, 1), (n,), generator=generator)


def oracle(images: Tensor, kernel: int, padding: int) -> tuple[np.ndarray, np.ndarray, int]:
    """One patch after another, in float64."""
    values = np.pad(images.cpu().numpy().astype(np.float64), ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2))
    windows = np.lib.stride_tricks.sliding_window_view(values, (kernel, kernel), axis=(2, 3))  # [n, C, h, w, k, k]
    patches = windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, images.shape[1] * kernel**2)
    if not len(patches):
        return np.zeros(patches.shape[1]), np.zeros((patches.shape[1],) * 2), 0
    mean = patches.mean(axis=0)
    return mean, (patches - mean).T @ (patches - mean) / len(patches), len(patches)


def check(means: Tensor, covariance: Tensor, count: Tensor, images: Tensor, kernel: int, padding: int) -> None:
    """Errors of a covariance are judged by how far the values of its row and column lie from their channel's mean."""
    mean, expected, number = oracle(images, kernel, padding)
    assert int(count) == number
    centre = images.double().mean(dim=(0, 2, 3)).repeat_interleave(kernel**2).cpu().numpy() if number else 0.0
    scale = np.sqrt(np.diag(expected) + (mean - centre) ** 2) + 1e-3
    np.testing.assert_allclose(means.detach().cpu().numpy(), mean, rtol=2e-6, atol=2e-6)
    error = np.abs(covariance.detach().cpu().numpy() - expected) / np.outer(scale, scale)
    assert error.max() < 5e-6, error.max()
    assert torch.equal(covariance, covariance.t())


@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_numpy(size: tuple[int, ...], run: tuple[str, str]) -> None:
    backend, device = run
    n, channels, height, width, kernel, padding, classes = size
    images, labels = (x.to(device) for x in make(n, channels, height, width, classes))
    options: dict[str, Any] = {"kernel_size": kernel, "padding": padding, "backend": backend}
    whole = patch_covariance(images, **options)
    check(*whole, images, kernel, padding)
    got = patch_covariance(images, labels, classes, **options)
    assert got.means.shape == (classes, channels * kernel**2)
    for k in range(classes):
        check(got.means[k], got.covariances[k], got.counts[k], images[labels == k], kernel, padding)


def test_datasets_are_kept_apart(run: tuple[str, str]) -> None:
    backend, device = run
    images, labels = (x.to(device) for x in make(12, 3, 5, 5, 4))
    images, labels = images.view(3, 4, 3, 5, 5), labels.view(3, 4)
    together = patch_covariance(images, labels, 4, backend=backend)
    assert together.covariances.shape == (3, 4, 27, 27)
    for b in range(3):
        alone = patch_covariance(images[b], labels[b], 4, backend=backend)
        for x, y in zip(alone, together, strict=True):
            torch.testing.assert_close(x, y[b])
    assert patch_covariance(images, backend=backend).covariances.shape == (3, 27, 27)
    assert patch_covariance(images[:0], backend=backend).means.shape == (0, 27)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
    "sliced": lambda x: x[1::2, 1:, ::2, 1::2],
    "offset": lambda x: x[3:, :, 1:-1, 2:],
    "expanded": lambda x: x[:1].expand(6, -1, -1, -1),
    "one colour": lambda x: x[:, :1].expand(-1, 3, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str, run: tuple[str, str]) -> None:
    backend, device = run
    images = LAYOUTS[layout](make(10, 18, 9, 11)[0].to(device))
    before = images.clone()
    check(*patch_covariance(images, backend=backend), images, 3, 0)
    assert torch.equal(images, before)


def test_far_from_zero(run: tuple[str, str]) -> None:
    """Mean 1e4, deviation 1, and one image far away: sums of plain squares would lose everything."""
    backend, device = run
    images = torch.randn(200, 2, 8, 8, generator=torch.Generator().manual_seed(0)) + 1e4
    check(*patch_covariance(images.to(device), backend=backend), images, 3, 0)
    images[0] = 1e7
    expected = oracle(images, 3, 0)[1]
    got = patch_covariance(images.to(device), backend=backend)
    # All other values are the same beside it, so that roundings do not average out.
    np.testing.assert_allclose(got.covariances.cpu(), expected, rtol=5e-5)


def test_constant_images_have_no_covariance(run: tuple[str, str]) -> None:
    backend, device = run
    images = torch.full((5, 3, 6, 6), 0.1, device=device)
    got = patch_covariance(images, backend=backend)
    assert got.covariances.abs().max() < 1e-12 and (got.covariances.diagonal() >= 0).all()
    torch.testing.assert_close(got.means, torch.full((27,), 0.1, device=device))


def test_nan_stays_in_its_class_and_channel(run: tuple[str, str]) -> None:
    backend, device = run
    images, labels = make(20, 4, 5, 5)[0].to(device), (torch.arange(20) % 4).to(device)
    images[6, 1] = torch.nan
    got = patch_covariance(images, labels, 4, backend=backend)
    nan = got.covariances.isnan().view(4, 4, 9, 4, 9).all(dim=4).all(dim=2)  # [K, C, C]
    assert nan[2, 1].all() and nan[2, :, 1].all() and int(nan.sum()) == 7
    assert int(got.covariances.isnan().sum()) == 7 * 81


@pytest.mark.skipif(bool(_extension.why_not()), reason="needs the extension")
def test_every_instruction_set_of_this_machine() -> None:
    used = []
    images = make(6, 37, 7, 9)[0]
    for name in ("portable", "avx2", "avx512"):
        try:
            got = patch_covariance_native(images, name)
        except ValueError as error:
            assert "instruction_set must be one of" in str(error)
            continue
        used.append(name)
        check(*got, images, 3, 1)
    assert "portable" in used


def patch_covariance_native(images: Tensor, instruction_set: str) -> tuple[Tensor, Tensor, Tensor]:
    patch = images.shape[1] * 9
    means, covariance, counts = torch.empty(patch), torch.empty(patch, patch), torch.empty(1, dtype=torch.int64)
    groups = torch.zeros(len(images), dtype=torch.int64)
    _extension.load().patch_covariance_cpu(
        **arguments_of(images, groups, means, covariance, counts), threads=1, instruction_set=instruction_set
    )
    return means, covariance, counts[0]


def arguments_of(images: Tensor, groups: Tensor, means: Tensor, covariance: Tensor, counts: Tensor) -> dict[str, Any]:
    return {
        "images": images.data_ptr(),
        "groups": groups.data_ptr(),
        "sizes": list(images.shape),
        "strides": list(images.stride()),
        "group_count": 1,
        "kernel": 3,
        "padding": 1,
        "means": means.data_ptr(),
        "covariances": covariance.data_ptr(),
        "counts": counts.data_ptr(),
    }


@pytest.mark.skipif(bool(_extension.why_not()), reason="needs the extension")
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"images": 0}, "images must be an aligned, non-null address"),
        ({"means": 2}, "means must be an aligned"),
        ({"sizes": [1, 0, 4, 4]}, "sizes must be from 1"),
        ({"strides": [1, 1, 1]}, "must have four numbers"),
        ({"strides": [1, 1, -1, 1]}, "strides must not be negative"),
        ({"kernel": 7}, "kernel must be from 1 to the size of a padded image"),
        ({"padding": -1}, "padding must be from 0"),
        ({"group_count": 0}, "group_count must be at least 1"),
    ],
)
def test_the_extension_checks_its_arguments(changes: dict[str, Any], text: str) -> None:
    images, counts = torch.zeros(1, 1, 4, 4), torch.zeros(1, dtype=torch.int64)
    arguments = arguments_of(images, counts, torch.zeros(9), torch.zeros(9, 9), counts)
    with pytest.raises(ValueError, match=text):
        _extension.load().patch_covariance_cpu(**(arguments | changes), threads=1, instruction_set="")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_two_runs_and_any_number_of_threads_are_equal_to_the_last_bit(device: str) -> None:
    if _extension.why_not():
        pytest.skip(_extension.why_not()[0])
    images, labels = (x.to(device) for x in make(60, 20, 10, 10, 3))
    threads = torch.get_num_threads()
    results = []
    for count in (1, 1, 2):
        torch.set_num_threads(count)
        try:
            results.append(patch_covariance(images, labels, 3, backend="native"))
        finally:
            torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("kernel", "padding"), [(2, 0), (3, 1)])
def test_reference_gradients_are_right(kernel: int, padding: int) -> None:
    images, labels = make(4, 1, 3, 2, 3)
    leaf = images.double()[None].requires_grad_()
    labels = labels[None]
    assert torch.autograd.gradcheck(lambda x: reference.patch_covariance(x, labels, 3, kernel, padding)[:2], leaf)


@pytest.mark.parametrize("padding", [0, 1])
def test_gradients_agree_with_the_reference(padding: int, run: tuple[str, str]) -> None:
    backend, device = run
    images, labels = (x.view(2, 6, *x.shape[1:]) for x in make(12, 3, 5, 4, 3))
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(2, 3, 27, generator=generator), torch.randn(2, 3, 27, 27, generator=generator)]

    def gradient(backend: str, device: str, dtype: torch.dtype) -> Tensor:
        leaf = images.to(device, dtype).requires_grad_()
        got = patch_covariance(leaf, labels.to(device), 3, padding=padding, backend=backend)
        w_mean, w_covariance = (w.to(device, dtype) for w in weights)
        ((got.means * w_mean).sum() + (got.covariances * w_covariance).sum()).backward()
        assert leaf.grad is not None
        return leaf.grad.cpu()

    expected = gradient("reference", "cpu", torch.float64).float()
    torch.testing.assert_close(gradient(backend, device, torch.float32), expected, rtol=1e-4, atol=1e-5)
    assert (expected[labels == -1] == 0).all() and (expected != 0).any()


@pytest.mark.skipif(bool(_extension.why_not()), reason="needs the extension")
def test_the_operator_keeps_the_rules_of_torch() -> None:
    images, labels = make(4, 2, 4, 5, 3)
    leaf = images.transpose(2, 3)[None].requires_grad_()
    torch.library.opcheck(torch.ops.pudnet.patch_covariance.default, (leaf, labels[None], 3, 2, 1))


def test_compiles_without_a_graph_break(run: tuple[str, str]) -> None:
    backend, device = run
    images, labels = (x.to(device) for x in make(6, 2, 4, 5, 3))

    def loss(x: Tensor) -> Tensor:
        return patch_covariance(x.sin(), labels, 3, backend=backend).covariances.square().sum()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = images.clone().requires_grad_()
        function(leaf).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_labels_out_of_range(run: tuple[str, str]) -> None:
    backend, device = run
    if device == "cuda":
        pytest.skip("nothing is thrown from a GPU; see test_labels_out_of_range_on_cuda")
    for label in (3, -2):
        text = rf"patch_covariance: labels must be in 0\.\.2, or -1 .* got {label} in row 1"
        with pytest.raises(InputError, match=text):
            patch_covariance(torch.zeros(3, 1, 3, 3), torch.tensor([0, label, 1]), 3, backend=backend)


@pytest.mark.cuda
@pytest.mark.parametrize("label", [3, -2])
def test_labels_out_of_range_on_cuda(label: int) -> None:
    labels = torch.tensor([[0, label], [1, 0]], device="cuda")
    got = patch_covariance(torch.zeros(2, 2, 1, 3, 3, device="cuda"), labels, 3, backend="native")
    assert (got.counts == -1).all() and got.means.isnan().all() and got.covariances.isnan().all()


IMAGES, LABELS = torch.zeros(3, 2, 4, 5), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((IMAGES.numpy(),), {}, DtypeError, "images must be a torch.Tensor; got ndarray"),
        ((IMAGES.half(),), {}, DtypeError, "images must be float32 or float64"),
        ((IMAGES[0],), {}, ShapeError, r"of shape \[n, C, H, W\]"),
        ((IMAGES[:, :, :0],), {}, ShapeError, "without empty axes"),
        ((IMAGES,), {"kernel_size": 5}, InputError, "kernel_size must be from 1 to 4"),
        ((IMAGES,), {"kernel_size": 0}, InputError, "kernel_size must be from 1 to 4"),
        ((IMAGES,), {"padding": -1}, InputError, "padding must be at least 0"),
        ((IMAGES, LABELS), {}, InputError, "num_classes must be given if and only if labels are"),
        ((IMAGES, None, 3), {}, InputError, "num_classes must be given if and only if labels are"),
        ((IMAGES, LABELS.int(), 3), {}, DtypeError, "labels must be int64"),
        ((IMAGES, [0, 1, 2], 3), {}, DtypeError, "labels must be a torch.Tensor; got list"),
        ((IMAGES, LABELS[:2], 3), {}, ShapeError, r"labels must be of shape \[3\]; got \[2\]"),
        ((IMAGES, LABELS, 0), {}, InputError, "num_classes must be at least 1; got 0"),
    ],
)
def test_bad_input(arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match="patch_covariance: .*" + text):
        patch_covariance(*arguments, **options)


def test_refuses_what_native_cannot_run_only_when_asked_by_name() -> None:
    images = IMAGES.double()
    assert ops.patch_covariance(images).covariances.dtype == torch.float64
    with pytest.raises(BackendUnavailableError, match="takes float32 images"):
        patch_covariance(images, backend="native")
