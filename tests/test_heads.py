from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "fixtures"))

from plain_heads import kernel_refit

from pudnet import heads
from pudnet.errors import CheckpointError, DtypeError, InputError, ShapeError
from pudnet.features import Reading
from pudnet.heads import (
    HEADS,
    Head,
    HeadFitter,
    RidgeAccumulator,
    _best_lambda,
    _dual_solver,
    _primal_solver,
    _Reservoir,
    _Solution,
    choose_head,
    fit_head,
    fit_temperature,
    head_from_config,
)

ALL = pytest.mark.parametrize("name", list(HEADS))


def data(n: int, classes: int, features: int, noise: float = 1.0, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Two vector maps per image: Gaussian classes whose centres do not depend on ``seed``."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 2 * features, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(n) % classes
    x = centres[labels] + noise * torch.randn(n, 2 * features, generator=g)
    return [x[:, :features], x[:, features:]], labels


def batched(maps: list[Tensor], labels: Tensor, size: int) -> Iterator[tuple[list[Tensor], Tensor]]:
    for i in range(0, len(labels), size):
        yield [m[i : i + size] for m in maps], labels[i : i + size]


def refit(x: Tensor, y: Tensor, classes: int, lam: float) -> tuple[Tensor, Tensor]:
    """Ridge regression with an unpenalised intercept, straight from its normal equations."""
    x, targets = x.double(), F.one_hot(y, classes).double()
    xc, yc = x - x.mean(0), targets - targets.mean(0)
    weight = torch.linalg.solve(xc.T @ xc + lam * torch.eye(x.shape[1], dtype=torch.float64), xc.T @ yc).T
    return weight, targets.mean(0) - weight @ x.mean(0)


def leave_one_out(x: Tensor, y: Tensor, classes: int, lam: float) -> Tensor:
    rows = []
    for i in range(len(y)):
        rest = torch.arange(len(y)) != i
        weight, bias = refit(x[rest], y[rest], classes, lam)
        rows.append(weight @ x[i].double() + bias)
    return torch.stack(rows)


def accumulated(x: Tensor, y: Tensor, classes: int) -> RidgeAccumulator:
    whole = RidgeAccumulator(x.shape[1], classes)
    whole.update(x, y)
    return whole


# ---- ridge against refitting ------------------------------------------------------------------------------------


# 1e-3, the least of the grid here, for each form where fit_head uses it.
@pytest.mark.parametrize(
    ("form", "n", "features", "lam"),
    [
        *(
            (form, n, features, lam)
            for form in ("dual", "primal")
            for n, features in ((40, 15), (37, 60))
            for lam in (0.1, 1.0, 30.0)
        ),
        ("dual", 37, 60, 1e-3),
        ("primal", 40, 15, 1e-3),
    ],
)
def test_ridge_and_its_leave_one_out_equal_refitting(form: str, n: int, features: int, lam: float) -> None:
    maps, y = data(n, 3, features)
    y = torch.where(y == 2, y * (torch.arange(n) % 2), y)  # unbalanced
    x = maps[0] + 2.0  # far from centred
    if form == "dual":
        solve, _ = _dual_solver(x, y, torch.bincount(y))
    else:
        solve, _ = _primal_solver(accumulated(x, y, 3), x, y)
    solution = solve(0, lam)
    assert solution is not None
    expected = leave_one_out(x, y, 3, lam)
    torch.testing.assert_close(solution.loo_scores.double(), expected, rtol=2e-3, atol=2e-3)
    assert solution.error == pytest.approx((F.one_hot(y, 3) - expected).square().mean().item(), rel=2e-3)
    weight, bias = solution.weights()
    weight_ref, bias_ref = refit(x, y, 3, lam)
    torch.testing.assert_close(weight, weight_ref, rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(bias, bias_ref, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("noise", [0.3, 2.0])
def test_the_kernel_head_and_its_leave_one_out_equal_refitting(noise: float) -> None:
    maps, y = data(40, 3, 12, noise)
    y = torch.where(y == 2, y * (torch.arange(40) % 2), y)  # unbalanced
    head = fit_head("kernel", batched(maps, y, 16), 3)
    x, rate, lam = head.rows.double(), float(head.rate), head.info["lambda"]
    assert torch.equal(head.rows, (Reading(covariances=True).pool(maps) - head.centre).half().float())
    assert rate == pytest.approx(1 / (4 * torch.cdist(x, x).square().mean().item()), rel=1e-4)
    dual, bias = kernel_refit(x, y, 3, lam, rate)
    torch.testing.assert_close(head.weight.double(), dual.T, rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(head.bias.double(), bias, rtol=2e-3, atol=1e-4)
    test, _ = data(7, 3, 12, noise, seed=1)
    near = torch.exp(-rate * torch.cdist((Reading(covariances=True).pool(test) - head.centre).double(), x).square())
    torch.testing.assert_close(
        head(test).double(), head.temperature.double() * (near @ dual + bias), rtol=1e-3, atol=1e-3
    )
    errors, right = [], 0
    for i in range(40):
        rest = torch.arange(40) != i
        dual, bias = kernel_refit(x[rest], y[rest], 3, lam, rate)
        score = torch.exp(-rate * torch.cdist(x[i : i + 1], x[rest]).square())[0] @ dual + bias
        errors.append((F.one_hot(y[i], 3) - score).square().mean().item())
        right += int(score.argmax() == y[i])
    assert head.info["loo_squared_error"] == pytest.approx(sum(errors) / 40, rel=2e-3)
    assert head.expected_accuracy == pytest.approx(right / 40)


def test_the_kernel_head_sees_what_no_line_separates() -> None:
    g = torch.Generator().manual_seed(0)
    corner = torch.randint(0, 2, (400, 2), generator=g).float() * 2 - 1
    x = torch.cat([corner + 0.3 * torch.randn(400, 2, generator=g), torch.ones(400, 1)], 1)
    y = (corner.prod(1) > 0).long()  # exclusive or
    linear, kernel = (fit_head(name, [([x[:200]], y[:200])], 2) for name in ("ridge", "kernel"))
    right = [float((head([x[200:]]).argmax(1) == y[200:]).float().mean()) for head in (linear, kernel)]
    assert right[0] < 0.7 and right[1] > 0.95


def test_the_kernel_head_takes_so_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "KERNEL_ROWS", 30)
    maps, y = data(40, 3, 12)
    fitter = HeadFitter("kernel", 3)
    fitter.add(batched([m[:30] for m in maps], y[:30], 7))
    other = copy.deepcopy(fitter)
    with pytest.raises(InputError, match=r"at most 30 images; got 31.*Use the head 'ridge'"):
        fitter.add([([m[:1] for m in maps], y[:1])])
    with pytest.raises(InputError, match="at most 30 images; got 60"):
        fitter.merge(other)
    assert fitter.fit().info["images"] == 30


def test_the_kernel_head_and_features_far_from_zero_or_too_large() -> None:
    (x, _), y = data(60, 3, 12)
    near, far = (fit_head("kernel", [(x + offset, y)], 3) for offset in (0.0, 1e4))
    assert far.expected_accuracy == pytest.approx(near.expected_accuracy, abs=0.02)
    with pytest.raises(InputError, match=r"features must be of a size below 65,504.*Divide the features"):
        fit_head("kernel", [(1e5 * x, y)], 3)


def test_the_kernel_head_looks_for_lambda_on_some_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    maps, y = data(300, 3, 12, noise=2.0)
    whole = fit_head("kernel", [(maps, y)], 3)
    monkeypatch.setattr(heads, "KERNEL_SEARCH", 150)
    some = fit_head("kernel", [(maps, y)], 3)
    assert some.info["images"] == some.info["loo_images"] == 300
    assert abs(math.log10(some.info["lambda"] / whole.info["lambda"])) < 1.1
    assert some.expected_accuracy == pytest.approx(whole.expected_accuracy, abs=0.03)


@pytest.mark.parametrize("way", ["autocast", "bfloat16"])
def test_the_kernel_head_computes_distances_in_float32(way: str) -> None:
    maps, y = data(200, 3, 12)
    head, test = fit_head("kernel", [(maps, y)], 3), data(50, 3, 12, seed=1)[0]
    exact = torch.softmax(head(test), 1)
    atol = 1e-5
    if way == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            found = torch.softmax(head(test), 1)
    else:  # what remains is the rounding of features and rows: 0.6 and more with distances in bfloat16
        found, atol = torch.softmax(head.to(torch.bfloat16)([m.bfloat16() for m in test]).float(), 1), 0.2
    torch.testing.assert_close(found, exact, rtol=0, atol=atol)


def test_the_choice_of_a_head() -> None:
    assert choose_head(5120, 9312) == "kernel" and choose_head(5121, 9312) == "ridge"
    assert choose_head(4415, 15200) == "kernel" and choose_head(4416, 15200) == "ridge"  # of 2^26 values
    with pytest.raises(InputError, match="head must be one of 'kernel'"):
        HeadFitter("auto", 3)


def test_dual_and_primal_agree_on_scale_and_solution() -> None:
    maps, y = data(60, 4, 50)
    dual, dual_scale = _dual_solver(maps[0], y, torch.bincount(y))
    primal, primal_scale = _primal_solver(accumulated(maps[0], y, 4), maps[0], y)
    assert dual_scale == pytest.approx(primal_scale, rel=1e-5)
    a, b = _best_lambda(dual, dual_scale), _best_lambda(primal, primal_scale)
    assert a.exponent == b.exponent
    torch.testing.assert_close(a.weights()[0], b.weights()[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("noise", [0.05, 1.0, 5.0])
def test_lambda_is_the_best_of_the_whole_grid(noise: float) -> None:
    maps, y = data(80, 4, 60, noise)
    solve, scale = _dual_solver(maps[0], y, torch.bincount(y))
    grid = [solve(e, scale * 10 ** (e / 2)) for e in range(-8, 7)]
    best = min((s for s in grid if s is not None), key=lambda s: s.error)
    assert _best_lambda(solve, scale).exponent == best.exponent


@pytest.mark.parametrize("sloped", [True, False])
@pytest.mark.parametrize("minimum", [-20.0, -8.0, -6.6, -6.1, -5.4, -4.0, -2.6, -2.0, 0.3, 2.8, 5.5, 20.0])
def test_the_search_for_lambda_walks_to_the_minimum(minimum: float, sloped: bool) -> None:
    seen: list[int] = []

    def solve(exponent: int, lam: float) -> _Solution:
        seen.append(exponent)
        assert lam == pytest.approx(10 ** (exponent / 2))
        slope = exponent - minimum if sloped else None
        return _Solution(abs(exponent - minimum), slope, exponent, lam, lambda: None, torch.empty(0))  # type: ignore[arg-type, return-value]

    assert _best_lambda(solve, 1.0, -2).exponent == min(range(-8, 7), key=lambda e: abs(e - minimum))
    assert len(seen) == len(set(seen)) and all(-8 <= exponent <= 6 for exponent in seen)
    if sloped and minimum == -20:
        assert seen == [-2, -3, -4, -6, -8]


def test_slope_is_the_derivative_of_the_error() -> None:
    maps, y = data(80, 4, 60)
    solve, scale = _dual_solver(maps[0].double(), y, torch.bincount(y))
    slopes, expected = [], []
    for exponent in (-3, 0, 2):
        lam, step = scale * 10 ** (exponent / 2), 1e-3
        here, below, above = (solve(exponent, lam * factor) for factor in (1.0, 1 - step, 1 + step))
        assert here is not None and below is not None and above is not None and here.slope is not None
        slopes.append(here.slope)
        expected.append((above.error - below.error) / (2 * step * lam))
    # Up to one positive factor.
    torch.testing.assert_close(
        torch.tensor(slopes) / slopes[0], torch.tensor(expected) / expected[0], rtol=0.02, atol=0
    )
    assert slopes[0] < 0 < slopes[2]


def test_fit_head_takes_the_same_model_from_kept_rows_and_from_an_accumulated_matrix() -> None:
    maps, y = data(300, 3, 10)
    features = Reading().pool(maps)
    kept = fit_head("ridge", [(maps, y)], 3)
    streamed = fit_head("ridge", batched(maps, y, 7), 3, loo_rows=299)
    assert kept.info["form"] == streamed.info["form"] == "primal"
    assert (kept.info["loo_images"], streamed.info["loo_images"]) == (300, 299)
    torch.testing.assert_close(kept.state["weight"], streamed.state["weight"], rtol=1e-3, atol=1e-4)
    weight, bias = refit(features, y, 3, kept.info["lambda"])
    expected = kept.info["temperature"] * (features.double() @ weight.T + bias)
    torch.testing.assert_close(kept(maps).double(), expected, rtol=1e-3, atol=1e-3)


def test_ridge_last_reads_the_last_map_only() -> None:
    maps, y = data(60, 3, 10)
    head = fit_head("ridge-last", [(maps, y)], 3)
    assert head.info["features"] == 10 and fit_head("ridge", [(maps, y)], 3).info["features"] == 20
    assert torch.equal(head(maps), head([maps[0] * 0, maps[1]]))


def test_feature_maps_are_pooled() -> None:
    maps = [torch.rand(30, 4, 9, 9), torch.rand(30, 6, 2, 2)]
    head = fit_head("ridge", [(maps, torch.arange(30) % 3)], 3)
    assert head.info["features"] == 4 * 16 + 4 + 6 * 4 + 6 and head.info["form"] == "dual"
    assert head(maps).shape == (30, 3)


# ---- accumulator ------------------------------------------------------------------------------------------------


def test_accumulator_batches_and_shards_equal_one_pass() -> None:
    maps, y = data(200, 5, 30)
    x = maps[0] + 100.0  # cancellation would show
    whole = accumulated(x, y, 5)
    left, right, empty = (RidgeAccumulator(30, 5) for _ in range(3))
    for i in range(0, 90, 13):
        left.update(x[i : min(i + 13, 90)], y[i : min(i + 13, 90)])
    right.update(x[90:], y[90:])
    left.merge(empty)
    empty.merge(right)
    left.merge(empty)
    assert torch.equal(left.counts, whole.counts) and left.images == 200
    expected = refit(x, y, 5, 0.5)
    for accumulator in (whole, left):
        for got, want in zip(accumulator.solve(0.5), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert right.images == 110  # the merged one is left as it was


def test_accumulator_stays_accurate_over_many_rows() -> None:
    g = torch.Generator().manual_seed(0)
    whole, x64 = RidgeAccumulator(4, 2), []
    for _ in range(100):
        x = torch.randn(1000, 4, generator=g) * 0.01 + 10
        whole.update(x, (x[:, 0] > 10).long())
        x64.append(x.double())
    exact = torch.cat(x64)
    scatter = (exact - exact.mean(0)).T @ (exact - exact.mean(0))
    torch.testing.assert_close(whole.scatter.tril(), scatter.tril(), rtol=1e-5, atol=1e-5)


def test_accumulator_takes_new_classes() -> None:
    maps, y = data(60, 4, 8)
    old = y < 3
    grown = accumulated(maps[0][old], y[old], 3)
    grown.add_classes(1)
    grown.update(maps[0][~old], y[~old])
    for got, want in zip(grown.solve(1.0), accumulated(maps[0], y, 4).solve(1.0), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_accumulator_errors() -> None:
    accumulator = RidgeAccumulator(3, 2)
    with pytest.raises(InputError, match="images"):
        accumulator.solve(1.0)
    with pytest.raises(ShapeError):
        accumulator.update(torch.rand(4, 5), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ShapeError):
        accumulator.merge(RidgeAccumulator(3, 4))
    with pytest.raises(InputError, match=r"0\.\.1"):
        accumulator.update(torch.rand(4, 3), torch.full((4,), 2))
    accumulator.update(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(InputError, match="lam"):
        accumulator.solve(0.0)


# ---- cosine -----------------------------------------------------------------------------------------------------


def test_cosine_leave_one_out_equals_refitting() -> None:
    maps, y = data(31, 4, 12, noise=2.0)
    head = fit_head("cosine", [(maps, y)], 4)
    x = Reading("last").pool(maps)
    scores = []
    for i in range(31):
        rest = torch.arange(31) != i
        means = torch.stack([x[rest & (y == k)].mean(0) for k in range(4)])
        scores.append(F.normalize(means, dim=1) @ x[i])
    loo = torch.stack(scores)
    assert head.expected_accuracy == pytest.approx((loo.argmax(1) == y).double().mean().item())
    assert head.info["temperature"] == pytest.approx(fit_temperature(loo, y)[0], rel=1e-4)
    means = F.normalize(torch.stack([x[y == k].mean(0) for k in range(4)]), dim=1)
    torch.testing.assert_close(head(maps), head.info["temperature"] * x @ means.T, rtol=1e-4, atol=1e-4)


# ---- all heads --------------------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("n", [90, 900])
def test_expected_accuracy_and_probabilities_hold_on_new_images(name: str, n: int) -> None:
    maps, y = data(n, 3, 25, noise=4.0)
    test_maps, test_y = data(3000, 3, 25, noise=4.0, seed=1)
    head = fit_head(name, batched(maps, y, 64), 3)
    logits = head(test_maps)
    accuracy = (logits.argmax(1) == test_y).float().mean().item()
    assert 0.5 < accuracy < 0.97
    assert head.expected_accuracy == pytest.approx(accuracy, abs=0.03 if n == 900 else 0.12)
    if n == 900:
        confidence = logits.softmax(1).amax(1).mean().item()
        assert confidence == pytest.approx(accuracy, abs=0.04)
        nll = F.cross_entropy(logits, test_y).item()
        for factor in (0.5, 2.0):
            assert nll < F.cross_entropy(factor * logits, test_y).item()
        assert nll < F.cross_entropy(logits / head.temperature, test_y).item()


@ALL
def test_results_do_not_depend_on_batches(name: str) -> None:
    maps, y = data(100, 4, 30)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    one = fit_head(name, [(maps, y)], 4)
    many = fit_head(name, batched([m[order] for m in maps], y[order], 9), 4)
    torch.testing.assert_close(one(maps), many(maps), rtol=1e-3, atol=1e-3)
    assert one.expected_accuracy == pytest.approx(many.expected_accuracy, abs=0.011)


@ALL
def test_two_classes(name: str) -> None:
    maps, y = data(20, 2, 8, noise=0.3)
    head = fit_head(name, [(maps, y)], 2)
    assert (head(maps).argmax(1) == y).all() and head.expected_accuracy > 0.9
    assert math.isfinite(head.info["temperature"])


@ALL
def test_three_hundred_classes(name: str) -> None:
    maps, y = data(900, 300, 40, noise=0.2)
    head = fit_head(name, batched(maps, y, 100), 300)
    assert head(maps).shape == (900, 300)
    assert head.expected_accuracy > 0.9


@ALL
def test_a_class_of_one_image(name: str) -> None:
    maps, y = data(41, 2, 8, noise=0.3)
    y[40] = 2
    maps = [m.clone() for m in maps]
    for m in maps:
        m[40] = 5 * torch.randn(8, generator=torch.Generator().manual_seed(3))
    head = fit_head(name, [(maps, y)], 3)
    logits = head(maps)
    assert torch.isfinite(logits).all() and logits[40].argmax() == 2
    assert head.info["single_image_classes"] == 1
    assert head.expected_accuracy == pytest.approx(40 / 41)  # left out, the one cannot be right


@ALL
def test_one_image_in_every_class(name: str) -> None:
    maps, y = data(4, 4, 8, noise=0.0)
    head = fit_head(name, [(maps, y)], 4)
    assert torch.equal(head(maps).argmax(1), y)
    assert head.expected_accuracy == 0.0 and head.info["temperature"] == 10.0


@ALL
def test_unbalanced(name: str) -> None:
    maps, y = data(600, 2, 20, noise=2.0)
    keep = (y == 0) | (torch.arange(600) < 30)
    maps, y = [m[keep] for m in maps], y[keep]
    head = fit_head(name, [(maps, y)], 2)
    assert torch.isfinite(head(maps)).all() and head.expected_accuracy > 0.8


@ALL
@pytest.mark.parametrize("n", [5, 50])
@pytest.mark.parametrize("value", [0.0, 0.1])
def test_constant_features(name: str, n: int, value: float) -> None:
    maps = [torch.full((n, 7), value)] * 2
    y = torch.arange(n) % 2
    head = fit_head(name, [(maps, y)], 2)
    logits = head(maps)
    assert torch.isfinite(logits).all()
    assert 0.0 <= head.expected_accuracy <= 1.0


@ALL
def test_duplicate_images_and_more_features_than_images(name: str) -> None:
    maps, _ = data(3, 3, 200)
    head = fit_head(name, [([m.repeat(4, 1) for m in maps], torch.arange(12) % 3)], 3)
    assert head.expected_accuracy == 1.0 and torch.isfinite(head(maps)).all()


@ALL
def test_state_and_config_rebuild_the_head(name: str) -> None:
    maps, y = data(50, 3, 12)
    head = fit_head(name, [(maps, y)], 3)
    config = json.loads(json.dumps(head.config()))
    rebuilt = head_from_config(config, head.state)
    assert torch.equal(rebuilt(maps), head(maps))
    assert rebuilt.config() == head.config()
    assert set(head.state_dict()) == set(head.state)
    halves = {"rows"} if name == "kernel" else set()  # in a file
    assert {key for key, tensor in head.state.items() if tensor.dtype != torch.float32} == halves


@ALL
def test_inputs_are_not_changed_and_the_global_rng_not_used(name: str) -> None:
    maps, y = data(200, 3, 12)
    copies, state = [m.clone() for m in maps], torch.get_rng_state()
    fit_head(name, batched(maps, y, 50), 3, loo_rows=20)
    assert all(torch.equal(m, c) for m, c in zip(maps, copies, strict=True))
    assert torch.equal(state, torch.get_rng_state())


@ALL
def test_fitting_in_inference_mode_gives_a_usable_module(name: str) -> None:
    with torch.inference_mode():
        maps, y = data(30, 3, 12)
        head = fit_head(name, [(maps, y)], 3)
    x = [torch.rand(4, 12, requires_grad=True) for _ in range(2)]
    head(x).sum().backward()
    assert x[-1].grad is not None


@ALL
def test_exports_with_a_dynamic_batch(name: str) -> None:
    maps = [torch.rand(30, 4, 8, 8), torch.rand(30, 6, 2, 2)]
    head = fit_head(name, [(maps, torch.arange(30) % 3)], 3)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(head, (maps,), dynamic_shapes=([{0: batch}, {0: batch}],)).module()
    few = [m[:5] for m in maps]
    torch.testing.assert_close(exported(few), head(few))


@ALL
def test_bad_input(name: str) -> None:
    maps, y = data(20, 2, 8)

    def fit(maps: list[Tensor] = maps, y: Tensor = y, classes: int = 2) -> Head:
        return fit_head(name, [(maps, y)], classes)

    with pytest.raises(InputError, match=r"0\.\.1.*0\.\.2"):
        fit(y=torch.arange(20) % 3)
    with pytest.raises(InputError, match="labels"):
        fit(y=y - 1)
    with pytest.raises(InputError, match="at least 2"):
        fit(y=y * 0, classes=1)
    with pytest.raises(InputError, match="every class"):
        fit(y=y * 0)
    with pytest.raises(InputError, match="every class"):
        fit(classes=3)
    with pytest.raises(InputError, match="finite"):
        fit(maps=[maps[0], torch.where(torch.arange(20)[:, None] == 3, torch.nan, maps[1])])
    with pytest.raises(DtypeError):
        fit(y=y.float())
    with pytest.raises(ShapeError):
        fit(y=y[:-1])
    with pytest.raises(InputError, match="at least one image"):
        fit_head(name, [], 2)
    with pytest.raises(InputError, match="at least one image"):
        fit([m[:0] for m in maps], y[:0])
    with pytest.raises(ShapeError, match="earlier"):
        fit_head(name, [(maps, y), ([maps[0], maps[1][:, :3]], y)], 2)


def test_unknown_head_lists_the_known() -> None:
    with pytest.raises(InputError, match="'kernel', 'ridge', 'ridge-last', 'cosine'"):
        fit_head("svm", [], 2)


def test_bad_config() -> None:
    maps, y = data(20, 2, 8)
    head = fit_head("ridge", [(maps, y)], 2)
    config = head.config()
    with pytest.raises(CheckpointError, match="features"):
        head_from_config({k: v for k, v in config.items() if k != "features"}, head.state)
    with pytest.raises(CheckpointError, match="svm"):
        head_from_config({**config, "name": "svm"}, head.state)
    with pytest.raises(CheckpointError, match="shapes"):
        head_from_config(config, {"weight": head.state["weight"]})
    with pytest.raises(CheckpointError, match="shapes"):
        head_from_config({**config, "num_classes": 3}, head.state)


# ---- parts ------------------------------------------------------------------------------------------------------


def test_temperature_minimises_the_nll() -> None:
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5000, 4, generator=g)
    y = torch.multinomial(logits.softmax(1), 1, generator=g)[:, 0]
    for scale in (1e-3, 1.0, 1e3):
        t, nll = fit_temperature(logits * scale, y)
        assert t * scale == pytest.approx(1.0, abs=0.1)
        assert nll == pytest.approx(F.cross_entropy(logits, y).item(), abs=0.01)


def test_temperature_stays_finite_and_positive() -> None:
    eye, y = torch.eye(3), torch.arange(3)
    assert 1.0 < fit_temperature(eye, y)[0] < 100.0  # perfectly separated
    assert fit_temperature(eye, (y + 1) % 3)[0] > 0.0  # worse than chance
    assert fit_temperature(torch.ones(3, 3), y)[0] == 10.0  # says nothing


def test_reservoir_is_uniform_over_ordered_batches() -> None:
    counts = torch.zeros(60)
    for seed in range(400):
        reservoir = _Reservoir(12, seed)
        rows = torch.arange(60)
        for part in rows.split([5, 20, 1, 30, 4]):
            reservoir.add(part[:, None].float(), part)
        x, y = reservoir.rows()
        assert len(y) == 12 == len(set(y.tolist())) and torch.equal(x[:, 0].long(), y)
        counts[y] += 1
    expected = 400 * 12 / 60
    assert ((counts - expected).square() / expected).sum() < 105  # chi-square, 59 degrees: 1 in 5,000 above 105


# ---- images and classes added later ------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("rows", [2, 2048])  # a sample of the images, or all of them
def test_a_head_that_grows_is_the_head_of_all_images_at_once(name: str, rows: int) -> None:
    maps, y = data(240, 4, 20)
    order = torch.argsort(y, stable=True)  # the last classes come last
    maps, y = [m[order] for m in maps], y[order]
    fitter = HeadFitter(name, 2, loo_rows=rows)
    fitter.add([([m[:70] for m in maps], y[:70])])
    fitter.fit()
    fitter.add([([m[70:120] for m in maps], y[70:120])])
    config, tensors = fitter.state()
    again = HeadFitter.from_state(name, 2, json.loads(json.dumps(config)), tensors)
    for grown in (fitter, again):
        grown.add_classes(2)
        grown.add(batched([m[120:] for m in maps], y[120:], 50))
    wanted = fit_head(name, [(maps, y)], 4, loo_rows=rows)
    for head in (fitter.fit(), again.fit()):
        assert head.info["images"] == 240 and head.num_classes == 4
        torch.testing.assert_close(head.weight, wanted.weight, rtol=1e-4, atol=1e-6)
        assert head.expected_accuracy == pytest.approx(wanted.expected_accuracy, abs=1e-12)
        assert head.info["temperature"] == pytest.approx(wanted.info["temperature"], rel=1e-4)


def test_a_head_that_grows_keeps_what_it_had_when_something_is_refused() -> None:
    maps, y = data(30, 3, 5)
    fitter = HeadFitter("ridge", 3)
    with pytest.raises(InputError, match="at least one image"):
        fitter.fit()
    with pytest.raises(InputError, match="before saving"):
        fitter.state()
    fitter.add([(maps, y)])
    with pytest.raises(ShapeError, match="as wide as"):
        fitter.add([([m[:, :3] for m in maps], y)])
    with pytest.raises(InputError, match=r"within 0\.\.2"):
        fitter.add([(maps, y + 1)])
    fitter.add_classes(1)
    with pytest.raises(InputError, match="label 3"):
        fitter.fit()


def test_a_damaged_state_is_a_checkpoint_error() -> None:
    maps, y = data(30, 3, 5)
    fitter = HeadFitter("ridge", 3)
    fitter.add([(maps, y)])
    config, tensors = fitter.state()
    for wrong_config, wrong_tensors in (
        ({}, tensors),
        ({**config, "seen": 7}, tensors),
        ({**config, "seen": "all"}, tensors),
        ({**config, "seed": "x"}, tensors),
        (config, {}),
        (config, {**tensors, "rows": tensors["rows"][0]}),
        (config, {**tensors, "rows": tensors["rows"] / 0}),
        (config, {**tensors, "labels": tensors["labels"] + 1}),
        (config, {**tensors, "random": tensors["random"][:9]}),
        (config, {**tensors, "random": torch.zeros_like(tensors["random"])}),
        (config, {**tensors, "scatter": torch.zeros(2, 2)}),
    ):
        with pytest.raises(CheckpointError):
            HeadFitter.from_state("ridge", 3, wrong_config, wrong_tensors)
