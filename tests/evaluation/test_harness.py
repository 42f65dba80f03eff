"""The harness from end to end, on made-up image sets and an untrained hypernetwork."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pudnet import PudNet
from pudnet.errors import InputError
from pudnet.evaluation import harness, tables
from pudnet.evaluation.__main__ import _command, _parser, _settle, main
from pudnet.evaluation.budgets import leads
from pudnet.evaluation.rows import ROWS, Bench
from pudnet.evaluation.tasks import GROUPS, Material, available, per_class, unseen_classes, validation_classes

CLASSES = 8  # in each half
HELD_OUT = [f"a{label}" for label in range(3)], [f"b{label}" for label in range(2, 6)]
CHEAP = ("predicted-ridge", "predicted-ridge-bfloat16", "predicted-cosine", "predicted-ridge-other", "random-ridge")
CHEAP += ("pca-ridge", "pixels-ridge", "pixels-mean", "finetune-5", "predicted-finetune-1", "adam-5")


def write_npz(path: Path, prefix: str, side: int, channels: int, train: int, seed: int) -> None:
    """Classes differ in their mean colour and one stripe."""
    rng = np.random.default_rng(seed)
    arrays = {"class_names": np.array([f"{prefix}{label}" for label in range(CLASSES)])}
    for split, count in (("train", train), ("test", 4)):
        labels = np.repeat(np.arange(CLASSES), count)
        x = rng.integers(0, 100, (len(labels), side, side, channels))
        x += rng.permutation(CLASSES)[0] + 15 * labels[:, None, None, None]
        x[np.arange(len(labels)), labels % side] += 40
        arrays |= {f"x_{split}": x.astype(np.uint8), f"y_{split}": labels.astype(np.uint8)}
    np.savez(path, **arrays)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_npz(folder / "tinyimagenet32_a.npz", "a", 12, 3, 14, 0)
    write_npz(folder / "tinyimagenet32_b.npz", "b", 12, 3, 14, 1)
    write_npz(folder / "fashion_mnist.npz", "f", 9, 1, 10, 2)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("checkpoint") / "untrained.safetensors"
    net = PudNet("convnet3", image_size=16, width=16, generator_width=2)
    net.save(path, card={"held_out": [list(part) for part in HELD_OUT]})
    return str(path)


@pytest.fixture
def settings(data: Path, checkpoint: str) -> harness.Settings:
    return harness.Settings(checkpoint, data, ("unseen", "fashion", "omniglot"), CHEAP, repeats=2, ways=3)


def test_every_row_of_every_task_and_nothing_twice(settings: harness.Settings) -> None:
    seen: list[tuple[int, int]] = []
    records, skipped = harness.run(settings, progress=lambda found, done, of: seen.append((done, of)))
    assert [(record["group"], record["number"], record["row"]) for record in records] == [
        (group, number, row) for group, number in (("unseen", 0), ("unseen", 1), ("fashion", 0)) for row in CHEAP
    ]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert list(skipped) == ["omniglot"] and "omniglot28_8alphabets.npz" in skipped["omniglot"]
    assert all(0 <= record["top1"] <= 1 and record["seconds"]["total"] > 0 for record in records)
    no_estimate = ("adam-5", "finetune-5", "predicted-finetune-1", "pixels-mean")
    assert all((record["expected"] is None) == (record["row"] in no_estimate) for record in records)
    assert {record["n_train"] for record in records if record["group"] == "unseen"} == {3 * 14}
    best = [record["top1"] for record in records if record["row"] == "pixels-ridge"]
    assert min(best) > 0.6  # the classes are easy: rows are not measured on shuffled labels

    # What is known is not computed again, whether it was right or not; the same run gives the same numbers.
    marked = [{**record, "top1": 0.123} for record in records]
    assert [record["top1"] for record in harness.run(settings, known=marked)[0]] == [0.123] * len(records)
    again, _ = harness.run(settings)
    assert [record["top1"] for record in again] == [record["top1"] for record in records]


def test_another_process_computes_the_same(settings: harness.Settings) -> None:

    small = replace(settings, groups=("fashion",), rows=("random-cosine", "pixels-ridge"))
    here, there = (harness.run(small, workers=workers)[0] for workers in (0, 1))
    assert [(r["row"], r["top1"], r["key"]) for r in there] == [(r["row"], r["top1"], r["key"]) for r in here]


def test_tasks_are_of_held_out_classes_and_parts_do_not_mix(data: Path) -> None:
    names = tuple(HELD_OUT[0] + HELD_OUT[1])
    material = Material(data, 12, names, ways=3)
    tasks = [unseen_classes(material, number, seed=0) for number in range(6)]
    assert {name for task in tasks for name in task.train.classes} <= set(names)
    assert len({task.train.classes for task in tasks}) > 1
    assert len({task.fingerprint for task in tasks}) == 6
    for task in tasks:
        assert task.train.labels.bincount().tolist() == [14] * 3
        assert task.test.labels.bincount().tolist() == [4] * 3
        # The test images of a class are those of the file, under the task's own label.
        name = task.test.classes[1]
        with np.load(data / f"tinyimagenet32_{name[0]}.npz") as file:
            expected = file["x_test"][file["y_test"] == int(name[1:])]
        assert np.array_equal(task.test.images[task.test.labels == 1].numpy(), expected)
    with pytest.raises(InputError, match="held_out"):
        unseen_classes(Material(data, 12, ("a0", "nobody")), 0, 0)


def test_validation_is_all_held_out_classes(data: Path) -> None:
    names = HELD_OUT[0] + HELD_OUT[1]
    task = validation_classes(Material(data, 12, tuple(names), ways=3), 0, seed=0)
    assert sorted(task.train.classes) == sorted(names) and task.other is not None
    assert task.train.labels.bincount().tolist() == [14] * len(names)
    assert task.test.labels.bincount().tolist() == [4] * len(names)


def test_per_class_draws_at_most_so_many_of_each() -> None:
    labels = torch.tensor([0] * 9 + [1] * 2 + [2] * 5)
    rows = per_class(labels, 4, torch.Generator().manual_seed(0))
    assert labels[rows].bincount().tolist() == [4, 2, 4]
    assert len(rows.unique()) == 10
    assert not torch.equal(labels[rows], labels[rows].sort().values)


def test_too_few_held_out_classes_leave_the_group_out(settings: harness.Settings) -> None:

    records, skipped = harness.run(replace(settings, groups=("unseen",), held_out=("a0", "a1")))
    assert records == [] and "3 classes" in skipped["unseen"]
    with pytest.raises(InputError, match="rows"):
        harness.run(replace(settings, rows=("predicted", "adam-5")))


@pytest.mark.parametrize(
    ("flags", "groups", "rows", "tasks"),
    [
        ([], len(GROUPS) - 1, len(ROWS) - 6, 4),
        (["--full"], len(GROUPS), len(ROWS), 12),
        (["--quick"], 2, len(ROWS) - 6, 2),
        (["--full", "--tasks", "3", "--rows", "adam-20"], len(GROUPS), 1, 3),
    ],
)
def test_what_is_run_by_default(flags: list[str], groups: int, rows: int, tasks: int) -> None:
    options = _parser().parse_args(flags)
    assert _command(options).endswith(" ".join(flags))
    _settle(options)
    assert (len(options.groups), len(options.rows), options.tasks) == (groups, rows, tasks)


def test_baselines_do_not_depend_on_the_hypernetworks_weights(checkpoint: str, tmp_path: Path) -> None:
    """A new checkpoint must not make an hour of training from scratch run again."""
    net = PudNet("convnet3", image_size=16, width=16, generator_width=2, seed=1)
    net.save(tmp_path / "other.safetensors")
    one, two = Bench.open(checkpoint), Bench.open(str(tmp_path / "other.safetensors"))
    for key in ("adam-20", "pca-ridge", "predicted-ridge", "predicted-ridge-other"):
        same = harness._identity("task", ROWS[key], one) == harness._identity("task", ROWS[key], two)
        assert same == (not key.startswith("predicted"))


def test_the_unconditioned_network_has_rows_of_its_own(settings: harness.Settings, tmp_path: Path) -> None:
    rows = "unconditioned-kernel", "unconditioned-directions-kernel", "random-kernel"
    small = replace(settings, groups=("fashion",), rows=rows)
    assert [record["row"] for record in harness.run(small)[0]] == ["random-kernel"]
    blank = tmp_path / "blank.safetensors"
    PudNet("convnet3", image_size=16, width=16, generator_width=2, conditioned=False, directions=[4, 4]).save(blank)
    found, _ = harness.run(replace(small, unconditioned=blank))
    assert [record["row"] for record in found] == list(rows)
    one = Bench.open(settings.checkpoint, blank)
    PudNet("convnet3", image_size=16, width=16, generator_width=2, conditioned=False, seed=1).save(blank)
    two = Bench.open(settings.checkpoint, blank)
    for key in rows:
        same = harness._identity("task", ROWS[key], one) == harness._identity("task", ROWS[key], two)
        assert same == (key == "random-kernel")
    PudNet("convnet3", image_size=12, width=16, generator_width=2, conditioned=False).save(blank)
    assert Bench.open(settings.checkpoint, blank).unconditioned is None  # of another size


def test_command_renders_resumes_and_reports_errors(
    data: Path, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, numbers = tmp_path / "docs" / "results.md", tmp_path / "bench" / "evaluation.json"
    rows = ["predicted-ridge", "adam-5", "random-ridge"]
    common = ["--data", str(data), "-o", str(page), "--json", str(numbers), "--workers", "0"]
    command = ["--checkpoint", checkpoint, *common, "--groups", "unseen", "mnist", "--tasks", "2", "--ways", "3"]
    command += ["--rows", *rows]
    assert main(command) == 0
    text = page.read_text()
    assert "## 3 unseen classes of Tiny-ImageNet" in text and "| Adam from scratch, 5 epochs |" in text
    assert "../bench/accuracy.svg" in text and "Left out: needs mnist.npz" in text
    document = json.loads(numbers.read_text())
    assert len(document["records"]) == 6 and document["environment"]["torch"] == torch.__version__
    for picture in ("accuracy.svg", "accuracy_seconds.svg"):
        assert (numbers.parent / picture).read_text().lstrip().startswith("<?xml")
    assert main(command) == 0  # taken from the file: even the seconds are the same
    assert json.loads(numbers.read_text())["records"] == document["records"]
    fewer = [*command[: command.index("--rows")], "--rows", "random-ridge"]
    assert main(fewer) == 0  # the page has what was asked for, the file keeps the rest
    assert "| Adam from scratch, 5 epochs |" not in page.read_text()
    assert {record["row"] for record in json.loads(numbers.read_text())["records"]} == set(rows)
    assert main(command) == 0 and page.read_text() == text

    capsys.readouterr()
    assert main(["--checkpoint", str(tmp_path / "none.safetensors"), *common]) == 2
    assert "none.safetensors" in capsys.readouterr().err
    page.write_text("the old page")
    in_a_file, short = str(numbers / "page.md"), command[: command.index("-o")]
    for wrong, word in (
        (["-o", in_a_file], "evaluation.json"),
        (["-o", str(tmp_path)], "folder"),
        (["--tasks", "0"], "--tasks"),
    ):
        assert main([*short, "--json", str(tmp_path / "other.json"), "--workers", "0", "-o", str(page), *wrong]) == 2
        assert word in capsys.readouterr().err
    assert page.read_text() == "the old page"


def test_tables_state_means_and_errors_by_hand() -> None:
    def record(row: str, number: int, top1: float) -> harness.Record:
        return {"key": f"{row}{number}", "group": "unseen", "number": number, "row": row, "n_train": 10, "n_test": 100,
                "top1": top1, "expected": 0.5, "seconds": {"total": 2.0, "training": 0.5}, "curve": []}  # fmt: skip

    records = [record("predicted-ridge", n, top1) for n, top1 in enumerate((0.7, 0.8, 0.9))]
    records += [record("adam-20", n, top1) for n, top1 in enumerate((0.6, 0.8, 0.7))]
    assert tables.accuracy_cell(records[:3]) == "80.0 ± 5.8"  # 10 / sqrt(3)
    assert tables.accuracy_cell(records[:1]) == "70.0 ± 4.6"  # sqrt(0.7 * 0.3 / 100)
    environment = harness.environment(1)
    document = {"format": 1, "command": "made up", "checkpoint": "x", "checkpoint_sha256": "y", "seed": 0, "ways": 5,
                "processes": 1, "environment": environment, "skipped": {}, "records": records}  # fmt: skip
    page = tables.markdown(document, {})
    assert "| Adam from scratch, 20 epochs | 70.0 ± 5.8 | 50.0 |  |  | 0.500 | 2.0 |" in page
    assert "| predicted, ridge, minus Adam 20 epochs | +10.0 ± 5.8 |" in page  # differences 10, 0, 20


def test_leads_at_every_budget_by_hand() -> None:
    def record(row: str, number: int, *curve: tuple[float, float, float]) -> harness.Record:
        return {"row": row, "number": number, "curve": [list(point) for point in curve]}

    records = [
        record("predicted-finetune-1", 0, (0.0, 2.0, 0.7), (1.0, 5.0, 0.8)),
        record("predicted-finetune-1", 1, (0.0, 3.0, 0.5)),
        record("predicted-finetune-5", 1, (0.0, 4.0, 0.5), (1.0, 6.0, 0.4)),  # the other schedule is the better one
        record("adam-5", 0, (1.0, 1.0, 0.6), (2.0, 3.5, 0.75), (3.0, 7.0, 0.7)),
        record("sgd-5", 0, (1.0, 8.0, 0.9)),
        record("adam-5", 1, (1.0, 9.0, 0.6)),
        record("adam-5", 2, (1.0, 0.5, 0.9)),  # a task that was not predicted
        record("pixels-ridge", 0),
    ]
    expected = [(3.0, 0.3), (3.5, 0.225), (4.0, 0.225), (5.0, 0.275), (6.0, 0.275), (7.0, 0.3), (8.0, 0.2), (9.0, -0.1)]
    assert leads(records) == [(seconds, pytest.approx(ahead)) for seconds, ahead in expected]
    assert leads(records[3:]) == [] and leads([]) == []


def test_a_group_that_cannot_be_drawn_says_why() -> None:
    material = Material(None, 32, ())
    assert available(GROUPS["digits"], material) == ""
    assert "mnist.npz" in available(GROUPS["mnist"], material)


@pytest.mark.parametrize("name", [key for key, group in GROUPS.items() if group.family])
def test_tasks_of_made_up_families(name: str) -> None:
    group, material = GROUPS[name], Material(None, 32, ())
    assert available(group, material) == ""
    assert "trained on this family" in available(group, replace(material, families=(name,)))
    task = group.build(material, 0, 0)
    assert task.train.images.shape == (2000, 32, 32, 3)
    assert task.test.images.shape == (1000, 32, 32, 3)
    assert task.train.classes == task.test.classes
    together = torch.cat([task.train.images, task.test.images]).flatten(1)
    assert len({row.numpy().tobytes() for row in together}) == 3000
    assert task.other is not None and len(task.other.labels) == 1000
    assert task.fingerprint == group.build(material, 0, 0).fingerprint
    assert task.fingerprint != group.build(material, 0, 1).fingerprint
