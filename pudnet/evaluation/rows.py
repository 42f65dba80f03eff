"""The rows of every table: ways to a classifier for one task, each measured on the same test images.

Rows with the kernel head use the head ``"auto"``: where the images are too many for it, the ridge head.

A row is one line of ``ROWS``; adding one means adding a line there. Predicted weights and all untrained ones share the
code that makes a classifier of a network (``pudnet.predicted.finish``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pudnet.data import Preprocess
from pudnet.data.source import open_images
from pudnet.descent import accuracy
from pudnet.directions import HELPS, SHRINKAGE
from pudnet.evaluation.baselines import pca_weights, random_weights
from pudnet.evaluation.peers import ITERATIONS, TREES, fit_pixels
from pudnet.evaluation.scratch import FINE_TUNING_LR, fine_tune, scratch_settings, train_from_scratch
from pudnet.evaluation.tasks import Images, Task, draw
from pudnet.features import COVARIANCE_CHANNELS, COVARIANCE_MAPS, VIEWS, Reading
from pudnet.finetuning import finetune, finetuning_settings
from pudnet.heads import KERNEL_ROWS, KERNEL_VALUES, KERNEL_WIDTH, choose_head, fit_head
from pudnet.predicted import VIEW_GAIN, finish
from pudnet.predictor import Predictor
from pudnet.sketch import Sketch

PROBE_BATCH = 512
# Epochs of training from scratch, and by how many pixels images are moved at random meanwhile: on training classes that
# brought 1.5 points to 20 epochs and cost 0.9 in 5.
SCRATCH = {5: 0, 20: 2}
FINE_TUNING_EPOCHS = 5
# What else decides a row: with views, the kernel head on pixels and on a network, directions, and both of these.
VIEWED = f"views={len(VIEWS)} {VIEW_GAIN}"
PIXELS = f"width={KERNEL_WIDTH} most={KERNEL_ROWS} {KERNEL_VALUES}"
KERNEL = f"{PIXELS} covariances={COVARIANCE_MAPS} {COVARIANCE_CHANNELS} {VIEWED}"
DIRECTED = f"shrinkage={SHRINKAGE} helps={HELPS}"
BOTH, RIDGE = f"{KERNEL} {DIRECTED}", f"{VIEWED} {DIRECTED}"


@dataclass(frozen=True)
class Outcome:
    """One row on one task.

    Attributes:
        top1: accuracy on the test images, 0..1.
        seconds: of the parts ``weights``, ``finish``, ``training`` (those that apply) and the ``total``.
        expected: leave-one-out accuracy that the head reports, where there is one.
        curve: (epoch, seconds of training, top1) of a training run.
    """

    top1: float
    seconds: dict[str, float]
    expected: float | None = None
    curve: list[tuple[float, float, float]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        seconds = {part: round(value, 4) for part, value in self.seconds.items()}
        curve = [[epoch, round(at, 3), top1] for epoch, at, top1 in self.curve]
        return {"top1": self.top1, "expected": self.expected, "seconds": seconds, "curve": curve}


@dataclass(frozen=True)
class Bench:
    """What rows work with: the predictor, its preprocessing, and its target network as an architecture.

    ``unconditioned`` is a predictor of the same target that was trained on blank sketches, where there is one.
    """

    predictor: Predictor
    architecture: nn.Module
    unconditioned: Predictor | None = None

    @classmethod
    def open(cls, checkpoint: str, unconditioned: Path | None = None) -> Bench:
        """Load what ``Predictor.from_pretrained`` takes, and the other's file where it exists and fits."""
        predictor, blank = Predictor.from_pretrained(checkpoint), None
        net = predictor.net
        if unconditioned is not None and unconditioned.is_file():
            blank = Predictor.from_pretrained(unconditioned)
            if blank.net.target_name != net.target_name or blank.net.preprocess != net.preprocess:
                blank = None
        return cls(predictor, net.materialise(net.layout.views(torch.zeros(net.layout.size))), blank)

    @property
    def preprocess(self) -> Preprocess:
        return self.predictor.net.preprocess

    @cached_property
    def half_predictor(self) -> Predictor:
        """The same with the generators' parameters in bfloat16, which only the fast path has."""
        return Predictor(self.predictor.net, optimize=True, dtype=torch.bfloat16, origin=self.predictor.origin)

    @property
    def digest(self) -> str:
        """sha256 of the checkpoint file."""
        return str(self.predictor.origin["sha256"])

    def weights(self, row: Row) -> str:
        """Digest of the weights that a row reads; empty where it reads none."""
        if row.needs_unconditioned:
            return "" if self.unconditioned is None else str(self.unconditioned.origin["sha256"])
        return self.digest if row.uses_checkpoint else ""

    def can_run(self, row: Row, task: Task) -> bool:
        """Whether there is everything that a row needs on a task."""
        known = not row.needs_familiarity or "familiarity" in self.predictor.net.card
        blank = not row.needs_unconditioned or self.unconditioned is not None
        return known and blank and not (row.needs_other and task.other is None)

    @property
    def held_out(self) -> tuple[str, ...]:
        """The classes the checkpoint was not trained on: its card has one list of them, or one for each dataset."""
        listed = self.predictor.net.card.get("held_out", [])
        return tuple(name for entry in listed for name in ([entry] if isinstance(entry, str) else entry))

    def describe(self) -> str:
        """All that a row without predicted weights still takes from the checkpoint: architecture and preprocessing."""
        return f"{self.architecture} {self.preprocess.to_dict()}"


@dataclass(frozen=True)
class Row:
    """A way to a classifier.

    Attributes:
        key: its name in the JSON file and on the command line.
        title: its name in tables.
        run: from a task to its outcome.
        uses_checkpoint: whether the hypernetwork's weights matter.
        needs_other: whether it needs images of another dataset.
        needs_familiarity: whether it needs a checkpoint that knows embeddings of its training's datasets.
        needs_unconditioned: whether it reads, in place of the checkpoint, the one trained on blank sketches.
        settings: what else determines the result, for the lookup of finished rows.
    """

    key: str
    title: str
    run: Callable[[Bench, Task], Outcome]
    uses_checkpoint: bool = False
    needs_other: bool = False
    needs_familiarity: bool = False
    needs_unconditioned: bool = False
    settings: str = ""


# ---- a network in, a classifier out -----------------------------------------------------------------------------

Weights = Callable[[Bench, Task, Sketch], nn.Module]


def _predicted(head: str, half: bool = False) -> Callable[[Bench, Task], Outcome]:
    def run(bench: Bench, task: Task) -> Outcome:
        predictor = bench.half_predictor if half else bench.predictor
        model = predictor.predict(task.train.images, task.train.labels, head=head, seed=task.seed)
        spent = model.report["seconds"]
        weights = spent["sketch"] + spent["weights"] + spent["directions"]
        seconds = {"weights": weights, "finish": spent["calibration"] + spent["head"], "total": spent["total"]}
        return Outcome(_top1(bench, model, task), seconds, model.report["expected_accuracy"])

    return run


def _finished(weights: Weights, head: str, **options: Any) -> Callable[[Bench, Task], Outcome]:
    """The row of a network whose weights come from ``weights``; everything after them is as for predicted ones.

    Args:
        options: of ``finish``.
    """

    def run(bench: Bench, task: Task) -> Outcome:
        start = time.perf_counter()
        train = task.train
        source = open_images(train.images, train.labels, size=bench.preprocess.size)
        sketch = bench.predictor.sketch(train.images, train.labels, seed=task.seed)
        network = weights(bench, task, sketch)
        made = time.perf_counter()
        model = finish(network, source, sketch, bench.preprocess, head=head, seed=task.seed, **options)
        total = time.perf_counter() - start
        seconds = {"weights": made - start, "finish": total - (made - start), "total": total}
        return Outcome(_top1(bench, model, task), seconds, model.report["expected_accuracy"])

    return run


def _random(bench: Bench, task: Task, sketch: Sketch) -> nn.Module:
    return random_weights(bench.architecture, task.seed + task.number)


def _pca(bench: Bench, task: Task, sketch: Sketch) -> nn.Module:
    return pca_weights(bench.architecture, bench.preprocess(sketch.images), seed=task.seed + task.number)


def _pca_of_other(bench: Bench, task: Task, sketch: Sketch) -> nn.Module:
    return _pca(bench, task, _other_sketch(bench, task))


def _network(predictor: Predictor, sketch: Sketch) -> nn.Module:
    with torch.no_grad():
        return predictor.net.network(sketch)


def _predicted_weights(bench: Bench, task: Task, sketch: Sketch) -> nn.Module:
    return _network(bench.predictor, sketch)


def _predicted_from_other(bench: Bench, task: Task, sketch: Sketch) -> nn.Module:
    """The other dataset's sketch decides the convolution weights and nothing else: BatchNorm and head see the task."""
    return _network(bench.predictor, _other_sketch(bench, task))


def _predicted_from_noise(bench: Bench, task: Task, sketch: Sketch) -> nn.Module:
    """Pixels drawn at random under the sketch's labels: what the hypernetwork makes of no data at all."""
    noise = torch.randint(0, 256, sketch.images.shape, generator=draw(task.seed, "noise"), dtype=torch.uint8)
    return _network(bench.predictor, bench.predictor.sketch(noise, sketch.labels, seed=task.seed))


def _predicted_from_mean(bench: Bench, task: Task, sketch: Sketch) -> nn.Module:
    """The mean embedding of the training datasets decides the generated weights; directions are of the task."""
    net = bench.predictor.net
    known = torch.tensor(net.card["familiarity"]["embeddings"]).mean(0)
    with torch.no_grad():
        embedding = known.view_as(net.embed(sketch))
        flat = net.generators(net.recurrence(embedding[None]))[0]
        network = net.materialise(net.layout.views(flat))
    net.insert_directions(network, sketch)
    return network


def _undirected(bench: Bench, task: Task, sketch: Sketch) -> nn.Module:
    """Generated weights alone, also where the checkpoint was trained with directions in their place."""
    return _generated(bench.predictor, sketch)


def _unconditioned(bench: Bench, task: Task, sketch: Sketch) -> nn.Module:
    """Weights that are the same for every dataset, learned in the same way."""
    assert bench.unconditioned is not None  # rows that need one are left out without
    return _generated(bench.unconditioned, sketch)


def _generated(predictor: Predictor, sketch: Sketch) -> nn.Module:
    with torch.no_grad():
        return predictor.net.materialise(predictor.net.generate(sketch))


def _unconditioned_with_directions(bench: Bench, task: Task, sketch: Sketch) -> nn.Module:
    assert bench.unconditioned is not None
    return _network(bench.unconditioned, sketch)


def _random_with_directions(bench: Bench, task: Task, sketch: Sketch) -> nn.Module:
    network = _random(bench, task, sketch)
    bench.predictor.net.insert_directions(network, sketch)
    return network


def _other_sketch(bench: Bench, task: Task) -> Sketch:
    assert task.other is not None  # rows that need one are left out without
    return bench.predictor.sketch(task.other.images, task.other.labels, seed=task.seed)


# ---- the others -------------------------------------------------------------------------------------------------


def _pixels(name: str) -> Callable[[Bench, Task], Outcome]:
    """A head on the raw pixels."""

    def run(bench: Bench, task: Task) -> Outcome:
        def batches(part: Images) -> list[tuple[list[Tensor], Tensor]]:
            pairs = zip(part.images.split(PROBE_BATCH), part.labels.split(PROBE_BATCH), strict=True)
            return [([bench.preprocess(images).flatten(1)], labels) for images, labels in pairs]

        start = time.perf_counter()
        count, width = len(task.train.labels), 3 * bench.preprocess.size**2
        kind = choose_head(count, width) if name == "auto" else name
        head = fit_head(kind, batches(task.train), len(task.train.classes), seed=task.seed)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            right = sum(int((head(maps).argmax(1) == labels).sum()) for maps, labels in batches(task.test))
        return Outcome(right / len(task.test.labels), {"finish": seconds, "total": seconds}, head.expected_accuracy)

    return run


def _pixel_classifier(name: str) -> Callable[[Bench, Task], Outcome]:
    """One of scikit-learn's classifiers on the raw pixels."""

    def run(bench: Bench, task: Task) -> Outcome:
        start = time.perf_counter()
        classify = fit_pixels(name, bench.preprocess(task.train.images).flatten(1), task.train.labels, seed=task.seed)
        seconds = time.perf_counter() - start
        answers = classify(bench.preprocess(task.test.images).flatten(1))
        top1 = float((answers == task.test.labels).double().mean())
        return Outcome(top1, {"training": seconds, "total": seconds})

    return run


def _fine_tuned(bench: Bench, task: Task) -> Outcome:
    """All weights start as those predicted from another dataset's sketch: a network trained elsewhere, in short."""
    start = time.perf_counter()
    network = _predicted_from_other(bench, task, _other_sketch(bench, task))
    made = time.perf_counter() - start
    result = fine_tune(
        network,
        task.train.images,
        task.train.labels,
        len(task.train.classes),
        bench.preprocess,
        epochs=FINE_TUNING_EPOCHS,
        flip=task.flip,
        seed=task.seed + task.number,
        test=(task.test.images, task.test.labels),
    )
    seconds = {"weights": made, "training": result.seconds, "total": made + result.seconds}
    curve = [(point.epoch, point.seconds, point.top1) for point in result.curve]
    return Outcome(curve[-1][2], seconds, curve=curve)


def _predicted_and_tuned(epochs: int) -> Callable[[Bench, Task], Outcome]:
    """The curve begins with the prediction itself; its seconds count from the images."""

    def run(bench: Bench, task: Task) -> Outcome:
        train, test = task.train, task.test
        model = bench.predictor.predict(train.images, train.labels, seed=task.seed)
        ready = model.report["seconds"]["total"]
        tuned = finetune(
            model,
            train.images,
            train.labels,
            epochs=epochs,
            flip=task.flip,
            seed=task.seed + task.number,
            test=(test.images, test.labels),
        )
        (_, _, first), *later = tuned.report["finetuning"]["curve"]
        curve = [(0.0, ready, first), *((epoch, ready + at, top1) for epoch, at, top1 in later)]
        seconds = {"finish": ready, "training": curve[-1][1] - ready, "total": curve[-1][1]}
        return Outcome(curve[-1][2], seconds, curve=curve)

    return run


def _scratch(optimizer: str, epochs: int, shift: int) -> Callable[[Bench, Task], Outcome]:
    def run(bench: Bench, task: Task) -> Outcome:
        result = train_from_scratch(
            bench.architecture,
            task.train.images,
            task.train.labels,
            len(task.train.classes),
            bench.preprocess,
            optimizer=optimizer,
            epochs=epochs,
            flip=task.flip,
            shift=shift,
            seed=task.seed + task.number,
            test=(task.test.images, task.test.labels),
        )
        curve = [(point.epoch, point.seconds, point.top1) for point in result.curve]
        return Outcome(curve[-1][2], {"training": result.seconds, "total": result.seconds}, curve=curve)

    return run


def _top1(bench: Bench, model: nn.Module, task: Task) -> float:
    return accuracy(model, task.test.images, task.test.labels, bench.preprocess)


ROWS: dict[str, Row] = {
    row.key: row
    for row in (
        Row("predicted-kernel", "predicted weights, kernel", _predicted("auto"), uses_checkpoint=True,
            settings=BOTH),
        Row("predicted-kernel-other", "predicted from another dataset's sketch, kernel",
            _finished(_predicted_from_other, "auto"), uses_checkpoint=True, needs_other=True, settings=BOTH),
        Row("predicted-kernel-noise", "predicted from a sketch of noise, kernel",
            _finished(_predicted_from_noise, "auto"), uses_checkpoint=True, settings=BOTH),
        Row("predicted-kernel-mean", "predicted from the training datasets' mean embedding, kernel",
            _finished(_predicted_from_mean, "auto"), uses_checkpoint=True, needs_familiarity=True, settings=BOTH),
        Row("predicted-kernel-single", "predicted weights, kernel, every image read once",
            _finished(_predicted_weights, "auto", views="single"), uses_checkpoint=True, settings=BOTH),
        Row("predicted-kernel-plain", "predicted weights, kernel without covariances",
            _finished(_predicted_weights, "auto", reading=Reading()), uses_checkpoint=True, settings=BOTH),
        Row("undirected-kernel", "generated weights without directions, kernel", _finished(_undirected, "auto"),
            uses_checkpoint=True, settings=KERNEL),
        Row("unconditioned-kernel", "unconditioned network trained the same way, kernel",
            _finished(_unconditioned, "auto"), needs_unconditioned=True, settings=KERNEL),
        Row("unconditioned-directions-kernel", "unconditioned network with the dataset's directions, kernel",
            _finished(_unconditioned_with_directions, "auto"), needs_unconditioned=True, settings=BOTH),
        Row("directions-kernel", "random weights with the dataset's directions, kernel",
            _finished(_random_with_directions, "auto"), uses_checkpoint=True, settings=BOTH),
        Row("random-kernel", "random weights, kernel", _finished(_random, "auto"), settings=KERNEL),
        Row("pca-kernel", "PCA kernels of the dataset, kernel", _finished(_pca, "auto"), settings=KERNEL),
        Row("predicted-cosine", "predicted weights, cosine", _predicted("cosine"), uses_checkpoint=True,
            settings=DIRECTED),
        Row("predicted-ridge", "predicted weights, ridge", _predicted("ridge"), uses_checkpoint=True,
            settings=RIDGE),
        Row("predicted-ridge-bfloat16", "predicted weights (bfloat16 parameters), ridge",
            _predicted("ridge", half=True), uses_checkpoint=True, settings=RIDGE),
        Row("predicted-ridge-last", "predicted weights, ridge-last", _predicted("ridge-last"), uses_checkpoint=True,
            settings=DIRECTED),
        Row("predicted-cosine-other", "predicted from another dataset's sketch, cosine",
            _finished(_predicted_from_other, "cosine"), uses_checkpoint=True, needs_other=True, settings=DIRECTED),
        Row("predicted-ridge-other", "predicted from another dataset's sketch, ridge",
            _finished(_predicted_from_other, "ridge"), uses_checkpoint=True, needs_other=True, settings=RIDGE),
        Row("predicted-ridge-noise", "predicted from a sketch of noise, ridge",
            _finished(_predicted_from_noise, "ridge"), uses_checkpoint=True, settings=RIDGE),
        Row("undirected-ridge", "generated weights without directions, ridge", _finished(_undirected, "ridge"),
            uses_checkpoint=True, settings=VIEWED),
        Row("directions-ridge", "random weights with the dataset's directions, ridge",
            _finished(_random_with_directions, "ridge"), uses_checkpoint=True, settings=RIDGE),
        Row("random-cosine", "random weights, cosine", _finished(_random, "cosine")),
        Row("random-ridge", "random weights, ridge", _finished(_random, "ridge"), settings=VIEWED),
        Row("pca-ridge", "PCA kernels of the dataset, ridge", _finished(_pca, "ridge"), settings=VIEWED),
        Row("pca-ridge-other", "PCA kernels of another dataset, ridge", _finished(_pca_of_other, "ridge"),
            needs_other=True, settings=VIEWED),
        Row("pixels-ridge", "raw pixels, ridge", _pixels("ridge")),
        Row("pixels-kernel", "raw pixels, kernel", _pixels("auto"), settings=PIXELS),
        Row("pixels-mean", "raw pixels, nearest class mean", _pixel_classifier("mean")),
        Row("pixels-logistic", "raw pixels, logistic regression (scikit-learn)", _pixel_classifier("logistic"),
            settings=f"iterations={ITERATIONS}"),
        Row("pixels-forest", "raw pixels, random forest (scikit-learn)", _pixel_classifier("forest"),
            settings=f"trees={TREES}"),
        Row("finetune-5", f"predicted from another dataset's sketch, fine-tuned {FINE_TUNING_EPOCHS} epochs (Adam)",
            _fine_tuned, uses_checkpoint=True, needs_other=True,
            settings=f"lr={FINE_TUNING_LR} {scratch_settings('adam', FINE_TUNING_EPOCHS, 0)}"),
        *(
            Row(f"predicted-finetune-{epochs}", f"predicted weights, fine-tuned {count}", _predicted_and_tuned(epochs),
                uses_checkpoint=True, settings=f"{finetuning_settings()} {BOTH}")
            for epochs, count in ((1, "1 epoch"), (5, "5 epochs"))
        ),
        *(
            Row(f"{optimizer}-{epochs}", f"{title} from scratch, {epochs} epochs", _scratch(optimizer, epochs, shift),
                settings=scratch_settings(optimizer, epochs, shift))
            for optimizer, title in (("adam", "Adam"), ("sgd", "SGD"))
            for epochs, shift in SCRATCH.items()
        ),
    )
}  # fmt: skip
