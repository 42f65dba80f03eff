"""image_stats and class_stats: every backend against numpy in float64, gradients, layouts, accuracy, bad input."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from pudnet import _extension, ops
from pudnet.errors import BackendUnavailableError, DtypeError, InputError, ShapeError
from pudnet.ops import reference

RUNS = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("native", "cpu"), id="native"),
    pytest.param(("reference", "cuda"), marks=pytest.mark.cuda, id="reference-cuda"),
    pytest.param(("native", "cuda"), marks=pytest.mark.cuda, id="native-cuda"),
]
IMAGE_SIZES = [  # n, H, W, C, K
    (1, 1, 1, 1, 1),
    (7, 5, 3, 3, 4),
    (30, 33, 41, 3, 5),  # more pixels than one task takes
    (9, 40, 30, 1, 2),
    (11, 3, 7, 4, 3),
    (4, 6, 5, 16, 2),
    (0, 2, 2, 3, 3),
]


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    backend, device = request.param
    if backend == "native" and _extension.why_not():
        pytest.skip(_extension.why_not()[0])
    yield backend, device


def make_images(n: int, height: int, width: int, channels: int, classes: int) -> tuple[Tensor, Tensor]:
    """Images and labels; some labels are -1, and the last of several classes is empty."""
    generator = torch.Generator().manual_seed(n + 10 * channels)
    images = torch.randint(0, 256, (n, height, width, channels), dtype=torch.uint8, generator=generator)
    return images, torch.randint(-1, max(classes - 1, 1), (n,), generator=generator)


def class_oracle(rows: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    members = [rows[labels == k].astype(np.float64) for k in range(classes)]
    empty = np.zeros(rows.shape[1])
    means = np.stack([m.mean(axis=0) if len(m) else empty for m in members])
    variances = np.stack([m.var(axis=0) if len(m) else empty for m in members])
    return np.array([len(m) for m in members]), means, variances


def close(actual: Tensor, expected: np.ndarray, tolerance: float = 2e-6) -> None:
    np.testing.assert_allclose(actual.detach().cpu().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", IMAGE_SIZES)
def test_image_stats_agree_with_numpy(size: tuple[int, ...], run: tuple[str, str]) -> None:
    backend, device = run
    images, labels = make_images(*size)
    n, height, width, channels, classes = size
    mean, std = [0.4 + 0.01 * c for c in range(channels)], [0.2 + 0.01 * c for c in range(channels)]
    got = ops.image_stats(images.to(device), labels.to(device), classes, mean, std, backend=backend)
    pixels = images.numpy() / 255
    counts, means, variances = class_oracle(pixels.reshape(n, height * width * channels), labels.numpy(), classes)
    close(got.sketch, ((pixels - mean) / std).transpose(0, 3, 1, 2))
    assert got.sketch.is_contiguous()
    assert got.counts.tolist() == counts.tolist()
    close(got.means, means)
    close(got.variances, variances)
    flat = pixels.reshape(-1, channels)
    close(got.channel_mean, flat.mean(axis=0) if n else np.zeros(channels))
    close(got.channel_var, flat.var(axis=0) if n else np.zeros(channels))


@pytest.mark.parametrize("size", [(1, 1, 1), (5, 3, 2), (64, 700, 7), (257, 33, 4), (0, 3, 2)])  # n, F, K
def test_class_stats_agree_with_numpy(size: tuple[int, int, int], run: tuple[str, str]) -> None:
    backend, device = run
    n, width, classes = size
    generator = torch.Generator().manual_seed(n)
    features = torch.randn(n, width, generator=generator) * 3 + 1
    labels = torch.randint(-1, max(classes - 1, 1), (n,), generator=generator)
    got = ops.class_stats(features.to(device), labels.to(device), classes, backend=backend)
    counts, means, variances = class_oracle(features.numpy(), labels.numpy(), classes)
    assert got.counts.tolist() == counts.tolist()
    close(got.means, means)
    close(got.variances, variances)


IMAGE_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(1, 2),
    "channels first in memory": lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "sliced": lambda x: x[::2, 1:, ::3],
    "offset": lambda x: x[3:],
    "expanded": lambda x: x[:1].expand(6, -1, -1, -1),
}


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
def test_image_stats_of_any_layout(layout: str, run: tuple[str, str]) -> None:
    backend, device = run
    images = IMAGE_LAYOUTS[layout](make_images(12, 9, 8, 3, 3)[0].to(device))
    labels = (torch.arange(2 * len(images), device=device) % 3)[::2]
    got = ops.image_stats(images, labels, 3, [0.5] * 3, [0.2] * 3, backend=backend)
    plain = ops.image_stats(
        images.clone(memory_format=torch.contiguous_format), labels.clone(), 3, [0.5] * 3, [0.2] * 3
    )
    for name, a, b in zip(got._fields, got, plain, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


FEATURE_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t(),
    "rows apart": lambda x: x[:, 3:9],
    "every second": lambda x: x[1::2, ::2],
    "expanded": lambda x: x[:1].expand(7, -1),
    "one column": lambda x: x[:, 2:3],
}


@pytest.mark.parametrize("layout", FEATURE_LAYOUTS)
def test_class_stats_of_any_layout(layout: str, run: tuple[str, str]) -> None:
    backend, device = run
    features = FEATURE_LAYOUTS[layout](torch.randn(13, 12, generator=torch.Generator().manual_seed(0)).to(device))
    labels = torch.arange(len(features), device=device) % 3
    got = ops.class_stats(features, labels, 3, backend=backend)
    _, means, variances = class_oracle(features.cpu().numpy(), labels.cpu().numpy(), 3)
    close(got.means, means)
    close(got.variances, variances)


def test_bytes_are_summed_exactly_beyond_32_bits(run: tuple[str, str]) -> None:
    """70,000 squares of 255 in one class do not fit an accumulator of 32 bits."""
    backend, device = run
    images = torch.full((70_001, 1, 2, 1), 255, dtype=torch.uint8, device=device)
    images[-1, 0, 1] = 0
    labels = torch.zeros(len(images), dtype=torch.int64, device=device)
    got = ops.image_stats(images, labels, 1, [0.0], [1.0], backend=backend)
    share = 1 / len(images)
    close(got.means[0], np.array([1, 1 - share]), 1e-7)
    np.testing.assert_allclose(got.variances[0].cpu(), [0, share * (1 - share)], rtol=1e-6)


@pytest.mark.parametrize("first", [None, 1e9])
def test_a_million_rows_far_from_zero(first: float | None, run: tuple[str, str]) -> None:
    """Mean 1e4, deviation 1: plain float32 sums would lose the variance; so would a shift by a first row far away."""
    backend, device = run
    features = torch.randn(1_000_000, 2, generator=torch.Generator().manual_seed(0)) + 1e4
    labels = torch.zeros(len(features), dtype=torch.int64)
    if first is not None:
        features[0] = first
    got = ops.class_stats(features.to(device), labels.to(device), 1, backend=backend)
    exact = features.numpy().astype(np.float64)
    np.testing.assert_allclose(got.means[0].cpu(), exact.mean(axis=0), rtol=1e-7)
    np.testing.assert_allclose(got.variances[0].cpu(), exact.var(axis=0), rtol=1e-6)


def test_nan_stays_in_its_class_and_column(run: tuple[str, str]) -> None:
    backend, device = run
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    features[8, 2] = torch.nan
    got = ops.class_stats(features.to(device), (torch.arange(40) % 4).to(device), 4, backend=backend)
    for statistic in (got.means, got.variances):
        assert statistic.isnan().nonzero().tolist() == [[0, 2]]


def test_two_runs_and_any_number_of_threads_are_equal_to_the_last_bit(run: tuple[str, str]) -> None:
    backend, device = run
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20_000, 40, generator=generator).to(device)
    labels = torch.randint(0, 3, (20_000,), generator=generator).to(device)
    images, image_labels = (x.to(device) for x in make_images(40, 30, 30, 3, 4))
    threads = torch.get_num_threads()
    results = []
    for count in (1, 1, 2):
        torch.set_num_threads(count)
        try:
            results.append(
                [
                    *ops.class_stats(features, labels, 3, backend=backend),
                    *ops.image_stats(images, image_labels, 4, [0.5] * 3, [0.2] * 3, backend=backend),
                ]
            )
        finally:
            torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_reference_gradients_are_right() -> None:
    features = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([0, 1, 1, -1, 0, 3, 1, -1, 0])
    assert torch.autograd.gradcheck(lambda x: reference.class_stats(x, labels, 4)[:2], features)


def test_gradients_agree_with_the_reference(run: tuple[str, str]) -> None:
    backend, device = run
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 4, (31,), generator=generator)
    features = torch.randn(31, 5, generator=generator)
    weights = [torch.randn(5, 5, generator=generator) for _ in range(2)]

    def gradient(backend: str, device: str, dtype: torch.dtype) -> Tensor:
        leaf = features.to(device, dtype).requires_grad_()
        stats = ops.class_stats(leaf, labels.to(device), 5, backend=backend)
        w_mean, w_var = (w.to(device, dtype) for w in weights)
        (stats.means * w_mean + stats.variances * w_var).sum().backward()
        assert leaf.grad is not None
        return leaf.grad.cpu()

    expected = gradient("reference", "cpu", torch.float64).float()
    torch.testing.assert_close(gradient(backend, device, torch.float32), expected, rtol=1e-5, atol=1e-6)
    assert (expected[labels == -1] == 0).all()


@pytest.mark.skipif(bool(_extension.why_not()), reason="needs the extension")
def test_operators_keep_the_rules_of_torch() -> None:
    images, labels = make_images(6, 4, 5, 3, 3)
    constants = ([0.5] * 3, [0.2] * 3)
    torch.library.opcheck(torch.ops.pudnet.image_stats.default, (images, labels, 3, *constants))
    torch.library.opcheck(torch.ops.pudnet.image_stats.default, (images.transpose(1, 2), labels, 3, *constants))
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    torch.library.opcheck(torch.ops.pudnet.class_stats.default, (features, labels, 3))
    dense = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), requires_grad=True).t()
    torch.library.opcheck(torch.ops.pudnet.class_stats.default, (dense, labels, 3))


def test_compiles_without_a_graph_break(run: tuple[str, str]) -> None:
    backend, device = run
    labels = (torch.arange(10) % 3).to(device)
    features = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)).to(device)

    def loss(x: Tensor) -> Tensor:
        return ops.class_stats(x.sin(), labels, 3, backend=backend).variances.square().sum()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = features.clone().requires_grad_()
        function(leaf).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_labels_out_of_range(run: tuple[str, str]) -> None:
    backend, device = run
    if device == "cuda":
        pytest.skip("nothing is thrown from a GPU; see test_labels_out_of_range_on_cuda")
    for label in (3, -2):
        labels = torch.tensor([0, label, 1])
        expected = rf"labels must be in 0\.\.2, or -1 for a row of no class; got {label} in row 1\."
        with pytest.raises(InputError, match="class_stats: " + expected):
            ops.class_stats(torch.zeros(3, 2), labels, 3, backend=backend)
        with pytest.raises(InputError, match="image_stats: " + expected):
            ops.image_stats(torch.zeros(3, 1, 1, 1, dtype=torch.uint8), labels, 3, [0.5], [0.5], backend=backend)


@pytest.mark.cuda
def test_labels_out_of_range_on_cuda() -> None:
    labels = torch.tensor([0, 3, 1], device="cuda")
    got = ops.class_stats(torch.zeros(3, 2, device="cuda"), labels, 3, backend="native")
    assert got.counts.tolist() == [-1, -1, -1]
    assert got.means.isnan().all() and got.variances.isnan().all()


IMAGES, LABELS = torch.zeros(3, 2, 2, 3, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)
RGB = ([0.5] * 3, [0.2] * 3)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((IMAGES.float(), LABELS, 2, *RGB), DtypeError, "images must be uint8; got torch.float32"),
        ((IMAGES.numpy(), LABELS, 2, *RGB), DtypeError, "images must be a torch.Tensor; got ndarray"),
        ((IMAGES[0], LABELS, 2, *RGB), ShapeError, r"of shape \[n, H, W, C\]"),
        ((IMAGES[:, :0], LABELS, 2, *RGB), ShapeError, "without empty axes"),
        ((IMAGES, LABELS.int(), 2, *RGB), DtypeError, "labels must be int64"),
        ((IMAGES, [0, 1, 2], 2, *RGB), DtypeError, "labels must be a torch.Tensor; got list"),
        ((IMAGES, LABELS[:2], 2, *RGB), ShapeError, r"labels must be of shape \[3\]; got \[2\]"),
        ((IMAGES, LABELS, 0, *RGB), InputError, "num_classes must be at least 1; got 0"),
        ((IMAGES, LABELS, 2, [0.5], [0.2] * 3), ShapeError, r"mean must be one number per channel \(3\)"),
        ((IMAGES, LABELS, 2, [0.5] * 3, [0.2, 0.0, 1.0]), InputError, "std must be positive"),
    ],
)
def test_bad_input(arguments: tuple[object, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match="image_stats: .*" + text):
        ops.image_stats(*arguments)  # type: ignore[arg-type]


def test_class_stats_refuses_what_native_cannot_run_only_when_asked_by_name() -> None:
    features, labels = torch.zeros(3, 2, dtype=torch.float64), LABELS
    assert ops.class_stats(features, labels, 1).means.dtype == torch.float64
    with pytest.raises(BackendUnavailableError, match="reference: can run it"):
        ops.class_stats(features, labels, 1, backend="native")
    with pytest.raises(DtypeError, match="float32 or float64"):
        ops.class_stats(features.half(), labels, 1)


@pytest.mark.skipif(bool(_extension.why_not()), reason="needs the extension")
@pytest.mark.parametrize(
    "size", [(7, 5, 7, 3, 3), (9, 33, 41, 3, 2), (6, 8, 8, 1, 2), (5, 6, 7, 4, 2), (400, 32, 32, 3, 3)]
)
def test_every_instruction_set_of_this_machine(size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The last size is large enough for stores past the caches."""
    images, labels = make_images(*size)
    constants = ([0.5] * size[3], [0.25] * size[3])
    expected = ops.image_stats(images, labels, size[4], *constants, backend="reference")
    native = _extension.load()
    used = []
    for name in ("portable", "avx2", "avx512"):
        chosen = types.SimpleNamespace(image_stats_cpu=functools.partial(native.image_stats_cpu, instruction_set=name))
        monkeypatch.setattr(_extension, "load", lambda chosen=chosen: chosen)
        try:
            got = torch.ops.pudnet.image_stats(images, labels, size[4], *constants)
        except InputError as error:
            assert "instruction_set must be one of" in str(error)
            continue
        used.append(name)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    assert "portable" in used


@pytest.mark.skipif(bool(_extension.why_not()), reason="needs the extension")
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"features": 0}, "features must not be a null pointer"),
        ({"features": 2}, "features must be aligned"),
        ({"n": -1}, "n must be at least 0; got -1"),
        ({"classes": 0}, "classes must be at least 1"),
        ({"width": 2**62}, "the sizes overflow"),
    ],
)
def test_the_extension_checks_its_arguments(changes: dict[str, int], text: str) -> None:
    features, counts, out = torch.zeros(2, 3), torch.zeros(1, dtype=torch.int64), torch.zeros(2, 3)
    arguments = {
        "features": features.data_ptr(),
        "labels": counts.data_ptr(),
        "n": 1,
        "width": 3,
        "row_stride": 3,
        "classes": 1,
        "counts": counts.data_ptr(),
        "means": out[0].data_ptr(),
        "variances": out[1].data_ptr(),
        "threads": 1,
    }
    with pytest.raises(ValueError, match=text):
        _extension.load().class_stats_cpu(**(arguments | changes))
