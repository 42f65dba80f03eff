import json

import numpy as np
import pytest
import torch
from torch import Tensor

from pudnet.errors import CheckpointError, DtypeError, InputError, ShapeError
from pudnet.sketch import Sketch, SketchBuilder, sketch


def coded(values: Tensor) -> Tensor:
    """Images [n, 2, 2, 3] that spell their number, so that a kept image can be traced back."""
    digits = torch.stack([values % 256, values // 256 % 256, values // 65536], -1).to(torch.uint8)
    return digits[:, None, None, :].expand(-1, 2, 2, 3).contiguous()


def decoded(images: Tensor) -> Tensor:
    pixel = images[:, 1, 0].long()
    return pixel[:, 0] + 256 * pixel[:, 1] + 65536 * pixel[:, 2]


def sketch_of(labels: Tensor, capacity: int, batch: int = 256, start: int = 0, **options: int) -> Sketch:
    images = coded(torch.arange(start, start + len(labels)))
    return sketch(zip(images.split(batch), labels.split(batch), strict=True), capacity, **options)


def same(a: Sketch, b: Sketch) -> bool:
    (tensors_a, meta_a), (tensors_b, meta_b) = a.to_tensors(), b.to_tensors()
    return meta_a == meta_b and tensors_a.keys() == tensors_b.keys() and all(
        torch.equal(tensors_a[name], tensors_b[name]) for name in tensors_a
    )  # fmt: skip


def balanced(sizes: list[int], capacity: int) -> list[int]:
    """The largest equal shares that fit, by taking one from the fullest class at a time."""
    sizes = list(sizes)
    while sum(sizes) > capacity:
        sizes[max(range(len(sizes)), key=sizes.__getitem__)] -= 1
    return sorted(sizes)


UNEVEN = [3000, 900, 40, 7, 1]
UNEVEN_LABELS = torch.repeat_interleave(torch.arange(5), torch.tensor(UNEVEN))


def shuffled(labels: Tensor, seed: int = 0) -> Tensor:
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize("order", ["sorted", "reversed", "shuffled"])
@pytest.mark.parametrize("capacity", [3, 20, 101, 500])
def test_classes_are_balanced_in_any_order(order: str, capacity: int) -> None:
    labels = {"sorted": UNEVEN_LABELS, "reversed": UNEVEN_LABELS.flip(0), "shuffled": shuffled(UNEVEN_LABELS)}[order]
    result = sketch_of(labels, capacity)
    counts = torch.bincount(result.labels, minlength=5).tolist()
    assert len(result) == capacity == sum(counts)
    assert sorted(counts) == balanced(UNEVEN, capacity)
    assert result.seen.tolist() == UNEVEN
    # Provenance: image, index and label belong together, and nothing is kept twice.
    assert torch.equal(decoded(result.images), result.indices)
    assert torch.equal(labels[result.indices], result.labels)
    assert len(result.indices.unique()) == capacity


def test_threshold_says_exactly_what_is_kept() -> None:
    labels = shuffled(UNEVEN_LABELS)
    result = sketch_of(labels, 60)
    everything = sketch_of(labels, len(labels))
    keys = torch.empty(len(labels), dtype=torch.float64)
    keys[everything.indices] = everything.keys
    below = (keys < result.thresholds[labels]).nonzero().flatten()
    assert torch.equal(below, result.indices.sort().values)


@pytest.mark.parametrize("batch", [1, 7, 64, 3948])
def test_batch_size_does_not_matter(batch: int) -> None:
    assert same(sketch_of(shuffled(UNEVEN_LABELS), 50, batch=batch), sketch_of(shuffled(UNEVEN_LABELS), 50, batch=999))


def test_reproducible_and_seeds_differ() -> None:
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, two, other = (sketch_of(UNEVEN_LABELS, 50, seed=seed) for seed in (3, 3, 4))
    stream = sketch_of(UNEVEN_LABELS, 50, seed=3, stream=1)
    assert same(one, two)
    assert not torch.equal(one.keys, other.keys) and not torch.equal(one.keys, stream.keys)
    assert torch.equal(state[0], torch.get_rng_state()) and (state[1] == np.random.get_state()[1]).all()


def chi_square(hits: Tensor, draws: int, per_draw: float) -> float:
    """How far, in standard deviations, the hits of equally likely items are from equal."""
    expected = draws * per_draw / len(hits)
    # Drawing without replacement: each hit count is binomial with variance e (1 - p), p = per_draw / items.
    statistic = ((hits - expected) ** 2).sum() / (expected * (1 - per_draw / len(hits)))
    return float((statistic - len(hits)) / (2 * len(hits)) ** 0.5)


@pytest.mark.parametrize("way", ["one pass", "two parts", "five parts", "capacities"])
def test_every_image_of_a_class_is_equally_likely(way: str) -> None:
    # Class 0 comes first and class 1 last, so that thresholds and evictions are at work; 40 of 250 kept of each.
    labels = torch.cat([torch.zeros(250, dtype=torch.int64), torch.ones(250, dtype=torch.int64)])
    labels[240:260] = torch.tensor([0, 1]).repeat(10)
    hits = torch.zeros(500)
    draws = 150
    cuts = {"one pass": [500], "two parts": [60, 440], "five parts": [5, 300, 95, 80, 20], "capacities": [250, 250]}[
        way
    ]
    for seed in range(draws):
        parts, start = [], 0
        for stream, part in enumerate(labels.split(cuts)):
            capacity = 80 + 40 * stream if way == "capacities" else 80
            parts.append(sketch_of(part, capacity, seed=seed, stream=stream, start=start))
            start += len(part)
        result = Sketch.merge(*parts)
        assert torch.bincount(result.labels).tolist() == [40, 40]
        hits[decoded(result.images)] += 1
    for label in (0, 1):
        assert abs(chi_square(hits[labels == label], draws, 40)) < 4


def test_merging_is_exactly_the_sketch_of_the_union() -> None:
    labels = shuffled(UNEVEN_LABELS, 1)
    parts = labels.split([1500, 10, 1000, len(labels) - 2510])
    options = [{"seed": 5, "stream": stream} for stream in (4, 0, 9, 2)]
    sketches = [sketch_of(part, 37, **option) for part, option in zip(parts, options, strict=True)]
    whole = [sketch_of(part, 10_000, **option) for part, option in zip(parts, options, strict=True)]
    merged = Sketch.merge(*sketches)
    # Independent of the code under test: peel the largest key off the fullest class until 37 are left.
    pools = {label: sorted((float(k), int(s), int(i)) for w in whole for k, s, i, y in
                           zip(w.keys, w.stream_ids, w.indices, w.labels, strict=True) if y == label)
             for label in range(5)}  # fmt: skip
    dropped = dict.fromkeys(range(5), 1.0)
    while sum(map(len, pools.values())) > 37:
        most = max(map(len, pools.values()))
        fullest = max((label for label in pools if len(pools[label]) == most), key=lambda label: pools[label][-1])
        dropped[fullest] = pools[fullest].pop()[0]
    want = {(s, i) for pool in pools.values() for _, s, i in pool}
    assert set(zip(merged.stream_ids.tolist(), merged.indices.tolist(), strict=True)) == want
    assert merged.thresholds.tolist() == list(dropped.values())
    assert merged.seen.tolist() == UNEVEN and merged.streams == (0, 2, 4, 9) and len(merged) == 37
    # Any order and any grouping give the same sketch, down to the order of its images.
    a, b, c, d = sketches
    assert same(merged, Sketch.merge(d, b, a, c))
    assert same(merged, Sketch.merge(Sketch.merge(a, c), Sketch.merge(d, b)))
    assert same(merged, Sketch.merge(*(Sketch.from_tensors(*part.to_tensors()) for part in sketches)))


def test_merge_knows_classes_only_some_parts_have() -> None:
    first = sketch_of(torch.zeros(100, dtype=torch.int64), 10, stream=0)
    second = sketch_of(torch.full((3,), 4), 10, stream=1)
    merged = Sketch.merge(first, second)
    assert merged.seen.tolist() == [100, 0, 0, 0, 3]
    assert torch.bincount(merged.labels).tolist() == [7, 0, 0, 0, 3]


def test_images_are_in_random_order() -> None:
    # Correlation of position with label and with index, over seeds: none.
    positions = torch.arange(100).double()
    for merge in (False, True):
        by_label, by_index = [], []
        for seed in range(40):
            parts = [sketch_of(UNEVEN_LABELS, 100, 4000, seed=seed, stream=stream) for stream in range(1 + merge)]
            result = Sketch.merge(*parts)
            by_label.append(torch.corrcoef(torch.stack([positions, result.labels.double()]))[0, 1])
            by_index.append(torch.corrcoef(torch.stack([positions, result.indices.double()]))[0, 1])
        for values in (by_label, by_index):
            assert abs(torch.stack(values).mean()) < 4 * 0.1 / 40**0.5
            assert torch.stack(values).std() < 0.2


def test_without_labels() -> None:
    result = sketch(coded(torch.arange(3000)).split(100), 64)
    assert result.labels is None and result.seen.tolist() == [3000] and len(result) == 64
    assert torch.equal(decoded(result.images), result.indices)
    assert 1200 < result.indices.double().mean() < 1800
    other = sketch([coded(torch.arange(3000, 3010))], 64, stream=1)
    merged = Sketch.merge(result, other)
    assert merged.labels is None and len(merged) == 64 and merged.seen.tolist() == [3010]


def test_fewer_images_than_capacity() -> None:
    result = sketch_of(torch.tensor([1, 0, 1]), 500)
    assert len(result) == 3 and result.indices.sort().values.tolist() == [0, 1, 2]
    assert result.thresholds.tolist() == [1, 1]


def test_more_classes_than_capacity() -> None:
    result = sketch_of(torch.arange(300).repeat(4), 20)
    assert len(result.labels.unique()) == len(result) == 20
    assert len(result.seen) == 300


def test_empty_batches_numpy_and_continuing_after_finish() -> None:
    builder = SketchBuilder(5)
    builder.update(torch.empty(0, 4, 4, 3, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))
    with pytest.raises(InputError, match="at least one image"):
        builder.finish()
    images = np.arange(10 * 48, dtype=np.int64).astype(np.uint8).reshape(10, 4, 4, 3)
    builder.update(images[:6], np.array([0, 1, 0, 1, 2, 2], dtype=np.uint8))
    early = builder.finish()
    kept = early.images.clone(), early.seen.clone(), early.keys.clone()
    builder.update(images[6:], np.array([3, 3, 0, 1]))
    assert all(torch.equal(a, b) for a, b in zip(kept, (early.images, early.seen, early.keys), strict=True))
    whole = sketch([(torch.from_numpy(images), torch.tensor([0, 1, 0, 1, 2, 2, 3, 3, 0, 1]))], 5)
    assert same(builder.finish(), whole)


def test_the_sketch_does_not_share_memory_with_the_batches() -> None:
    images = coded(torch.arange(4))
    builder = SketchBuilder(10)
    builder.update(images)
    images.zero_()
    assert decoded(builder.finish().images).sort().values.tolist() == [0, 1, 2, 3]


def test_memory_is_bounded_by_capacity_and_classes() -> None:
    import tracemalloc

    image = np.zeros((500, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(500) % 50
    builder = SketchBuilder(100)
    builder.update(image, labels)
    tracemalloc.start()
    for _ in range(200):  # 100,000 images, 19 MB of pixels
        builder.update(image, labels)
    peak = tracemalloc.get_traced_memory()[1]  # numpy memory: keys, labels and indices
    tracemalloc.stop()
    assert peak < 500_000
    assert builder._images.numel() <= 100 * 8 * 8 * 3


def test_tensors_and_files(tmp_path) -> None:
    pytest.importorskip("safetensors")
    for labels in (UNEVEN_LABELS, None):
        images = coded(torch.arange(len(UNEVEN_LABELS)))
        result = sketch([(images, labels)], 30, seed=7, stream=3)
        tensors, meta = result.to_tensors()
        assert same(result, Sketch.from_tensors(tensors, json.loads(json.dumps(meta))))
        result.save(tmp_path / "s.safetensors")
        assert same(result, Sketch.load(tmp_path / "s.safetensors"))
    with pytest.raises(CheckpointError, match="version"):
        Sketch.from_tensors(tensors, {**meta, "version": 99})
    with pytest.raises(CheckpointError, match="keys"):
        Sketch.from_tensors({name: tensors[name] for name in tensors if name != "keys"}, meta)
    with pytest.raises(CheckpointError, match="30 rows"):
        Sketch.from_tensors({**tensors, "indices": tensors["indices"][:4]}, meta)


def test_bad_files(tmp_path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    with pytest.raises(InputError, match="existing"):
        Sketch.load(tmp_path / "none")
    save_file({"a": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(CheckpointError, match="written by pudnet"):
        Sketch.load(tmp_path / "other")
    sketch_of(UNEVEN_LABELS, 30).save(tmp_path / "whole")
    (tmp_path / "half").write_bytes((tmp_path / "whole").read_bytes()[:900])
    with pytest.raises(CheckpointError, match="half"):
        Sketch.load(tmp_path / "half")
    with pytest.raises(InputError, match="folder"):
        sketch_of(UNEVEN_LABELS, 30).save(tmp_path / "missing" / "s")


def test_merge_errors() -> None:
    labels = torch.tensor([0, 1])
    part = sketch_of(labels, 5)
    with pytest.raises(InputError, match=r"stream=1"):
        Sketch.merge(part, sketch_of(labels, 5))
    with pytest.raises(InputError, match=r"one seed.*\[0, 1\]"):
        Sketch.merge(part, sketch_of(labels, 5, seed=1, stream=1))
    with pytest.raises(InputError, match="labelled"):
        Sketch.merge(part, sketch([coded(labels)], 5, stream=1))
    with pytest.raises(ShapeError, match="one size"):
        Sketch.merge(part, sketch([(torch.zeros(1, 3, 2, 3, dtype=torch.uint8), labels[:1])], 5, stream=1))
    with pytest.raises(InputError, match="at least one"):
        Sketch.merge()


@pytest.mark.parametrize(
    ("images", "labels", "error"),
    [
        (torch.zeros(2, 2, 2, 3), torch.tensor([0, 1]), DtypeError),
        (np.zeros((2, 2, 2, 3)), torch.tensor([0, 1]), DtypeError),
        ("ab", torch.tensor([0, 1]), DtypeError),
        (torch.zeros(2, 2, 3, dtype=torch.uint8), torch.tensor([0, 1]), ShapeError),
        (torch.zeros(2, 3, 2, 2, dtype=torch.uint8), torch.tensor([0, 1]), ShapeError),
        (torch.zeros(2, 5, 2, 3, dtype=torch.uint8), torch.tensor([0, 1]), ShapeError),
        (coded(torch.arange(2)), torch.tensor([0, 1, 2]), ShapeError),
        (coded(torch.arange(2)), torch.tensor([0.0, 1.0]), DtypeError),
        (coded(torch.arange(2)), torch.tensor([0, -1]), InputError),
        (coded(torch.arange(2)), torch.tensor([0, 2**40]), InputError),
        (coded(torch.arange(2)), None, InputError),
    ],
)
def test_a_bad_batch_changes_nothing(images: object, labels: object, error: type[Exception]) -> None:
    builder, twin = SketchBuilder(3), SketchBuilder(3)
    good = coded(torch.arange(9)), torch.arange(9) % 3
    for each in (builder, twin):
        each.update(*good)
    with pytest.raises(error):
        builder.update(images, labels)
    for each in (builder, twin):
        each.update(*good)
    assert same(builder.finish(), twin.finish())


@pytest.mark.parametrize(
    "options", [{"capacity": 0}, {"capacity": 2.5}, {"seed": -1}, {"stream": -1}, {"capacity": True}]
)
def test_bad_options(options: dict) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        SketchBuilder(**options)
