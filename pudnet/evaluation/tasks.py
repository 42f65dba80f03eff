"""What is classified: small datasets of classes the hypernetwork has never seen, and whole datasets of other kinds.

A group of tasks is one line of ``GROUPS``; adding a table means adding a line there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pudnet.data import families
from pudnet.data.source import open_images
from pudnet.errors import InputError, message

TRAIN_PER_CLASS = 250  # of the unseen-class tasks; all test images of a class (50) are used
MANY, MANY_TASKS = 20, 3  # classes of the larger tasks of unseen classes, and how many of these tasks there are
DATASET_TRAIN_PER_CLASS = 200
DATASET_TEST = 2000
OTHER_IMAGES_PER_CLASS = 50
FAMILY_CLASSES, FAMILY_TRAIN, FAMILY_TEST = 20, 100, 50  # of a made-up family; images per class

NATURAL = ("tinyimagenet32_a", "tinyimagenet32_b")


@dataclass(frozen=True)
class Images:
    """Labelled images: uint8 ``[n, H, W, 3]``, int64 ``[n]`` in ``0..K-1``, and K class names."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def take(self, rows: Tensor) -> Images:
        return Images(self.images[rows], self.labels[rows], self.classes)


@dataclass(frozen=True)
class Task:
    """A training part, a test part, and images of another dataset for the rows that need a foreign sketch.

    ``flip``: whether a mirrored image keeps its class; training from scratch then mirrors at random.
    """

    group: str
    number: int
    seed: int
    train: Images
    test: Images
    other: Images | None = None
    flip: bool = False

    @property
    def fingerprint(self) -> str:
        """Changes with any image, label or the seed: rows already computed are looked up by it."""
        digest = hashlib.sha256(f"{self.group} {self.number} {self.seed} {self.flip}".encode())
        for part in (self.train, self.test, self.other):
            if part is not None:
                digest.update(part.images.numpy().tobytes())
                digest.update(part.labels.numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Material:
    """What tasks are drawn from.

    Attributes:
        data: folder with the ``.npz`` files of ``GROUPS``; None: only what needs no files.
        size: side of the images, in pixels.
        held_out: class names the hypernetwork was not trained on.
        ways: classes of an unseen-class task.
        families: those that the hypernetwork was trained on.
    """

    data: Path | None
    size: int
    held_out: tuple[str, ...]
    ways: int = 5
    families: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """A kind of task.

    Attributes:
        title: in tables; may hold ``{ways}``.
        build: ``(material, number, seed) -> Task``.
        files: names of the ``.npz`` files it needs.
        repeated: whether several tasks are drawn (else there is one); ``most``: so many, where that is not 0.
        other: name of the dataset, or family, whose sketch is the foreign one.
        family: the made-up family of its images.
        ways: classes of a task of unseen classes, where it is not the material that says how many.
    """

    title: str
    build: Callable[[Material, int, int], Task]
    files: tuple[str, ...] = ()
    repeated: bool = False
    most: int = 0
    other: str = ""
    family: str = ""
    ways: int = 0


def available(group: Group, material: Material) -> str:
    """Why the tasks of ``group`` cannot be drawn; empty if they can."""
    missing = [name for name in group.files if material.data is None or not (material.data / f"{name}.npz").exists()]
    if missing:
        return f"needs {', '.join(f'{name}.npz' for name in missing)}, not found in the data folder"
    if group.family in material.families:
        return "the checkpoint was trained on this family"
    needs_classes, ways = set(group.files) >= set(NATURAL), group.ways or material.ways
    if needs_classes and len(material.held_out) < ways:
        return f"needs {ways} classes the checkpoint was not trained on; {len(material.held_out)} are known"
    return ""


# ---- drawing ----------------------------------------------------------------------------------------------------


def draw(seed: int, *names: object) -> torch.Generator:
    """A generator of its own for each purpose, so that no draw depends on which others were made."""
    digest = hashlib.sha256(" ".join(map(str, (seed, *names))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def per_class(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Row numbers, in random order, of at most ``count`` random images of every class: int64 ``[m]``."""
    order = torch.randperm(len(labels), generator=generator)
    shuffled = labels[order]
    kept = [order[shuffled == label][:count] for label in labels.unique()]
    rows = torch.cat(kept)
    return rows[torch.randperm(len(rows), generator=generator)]


def only(images: Images, chosen: Sequence[int]) -> Images:
    """The images of the classes ``chosen``, labelled anew in that order."""
    new = torch.full((len(images.classes),), -1, dtype=torch.int64)
    new[list(chosen)] = torch.arange(len(chosen))
    labels = new[images.labels]
    rows = torch.nonzero(labels >= 0).flatten()
    return Images(images.images[rows], labels[rows], tuple(images.classes[label] for label in chosen))


# ---- reading ----------------------------------------------------------------------------------------------------


def read(data: Path, name: str, split: str, size: int) -> Images:
    """One part of ``data/name.npz``, resized."""
    return as_images(data / f"{name}.npz", None, size, split)


def as_images(source: Any, labels: Tensor | None, size: int, split: str = "train") -> Images:
    """Anything that ``open_images`` takes, resized."""
    opened = open_images(source, labels, size=size, split=split)
    images, indices = opened.tensors()
    return Images(images, indices, opened.classes)


@lru_cache(maxsize=1)  # drawn from many times
def held_out_parts(data: Path, size: int, held_out: tuple[str, ...]) -> tuple[Images, Images]:
    """Training and test part of the held-out classes of both halves of Tiny-ImageNet.

    Raises:
        InputError: a held-out class is in neither file.
    """
    parts = []
    for split in ("train", "test"):
        found: list[tuple[Tensor, Tensor]] = []
        classes: list[str] = []
        for name in NATURAL:
            whole = read(data, name, split, size)
            half = only(whole, [label for label, known in enumerate(whole.classes) if known in set(held_out)])
            found.append((half.images, half.labels + len(classes)))
            classes += half.classes
        if unknown := sorted(set(held_out) - set(classes)):
            raise InputError(message("evaluation", "held_out", f"names of classes in {NATURAL}", unknown[:3]))
        images, labels = (torch.cat(column) for column in zip(*found, strict=True))
        parts.append(Images(images, labels, tuple(classes)))
    return parts[0], parts[1]


@lru_cache(maxsize=4)
def other_images(data: Path | None, name: str, size: int, held_out: tuple[str, ...], seed: int) -> Images | None:
    """A sample of another dataset, or None where its files are missing; ``natural`` is the held-out Tiny-ImageNet."""
    if name in families.NAMES:
        return _of_family(name, size, OTHER_IMAGES_PER_CLASS, seed)
    natural = name == "natural"
    files = NATURAL if natural else (name,)
    if data is None or not all((data / f"{file}.npz").exists() for file in files) or (natural and not held_out):
        return None
    train = held_out_parts(data, size, held_out)[0] if natural else read(data, name, "train", size)
    return train.take(per_class(train.labels, OTHER_IMAGES_PER_CLASS, draw(seed, "other", name)))


# ---- the groups -------------------------------------------------------------------------------------------------


def _other(material: Material, group: str, seed: int) -> Images | None:
    return other_images(material.data, GROUPS[group].other, material.size, material.held_out, seed)


def unseen_classes(material: Material, number: int, seed: int, name: str = "unseen", ways: int = 0) -> Task:
    """Random held-out classes, ``TRAIN_PER_CLASS`` of their training images and all their test images.

    Args:
        ways: how many classes; 0 for those of the material.
    """
    assert material.data is not None
    train, test = held_out_parts(material.data, material.size, material.held_out)
    generator = draw(seed, name, number)
    chosen = torch.randperm(len(train.classes), generator=generator)[: ways or material.ways].tolist()
    train, test = only(train, chosen), only(test, chosen)
    train = train.take(per_class(train.labels, TRAIN_PER_CLASS, generator))
    return Task(name, number, seed, train, test, _other(material, name, seed), flip=True)


def validation_classes(material: Material, number: int, seed: int) -> Task:
    """All held-out classes at once, ``TRAIN_PER_CLASS`` training images of each and all test images."""
    assert material.data is not None
    name = "validation"
    train, test = held_out_parts(material.data, material.size, material.held_out)
    train = train.take(per_class(train.labels, TRAIN_PER_CLASS, draw(seed, name, number)))
    return Task(name, number, seed, train, test, _other(material, "unseen", seed), flip=True)


def digits_task(material: Material, number: int, seed: int) -> Task:
    """scikit-learn's digits in two halves, split as the demonstration splits them."""
    from pudnet.demo import load_digits

    found = load_digits(seed + number)
    train, test = (as_images(*part, material.size) for part in (found.train, found.test))
    return Task("digits", number, seed, train, test, _other(material, "digits", seed))


def dataset_task(name: str, group: str, flip: bool = False) -> Callable[[Material, int, int], Task]:
    """Tasks of ``name.npz``: up to 200 training images per class, up to 2,000 test images of the test part."""

    def build(material: Material, number: int, seed: int) -> Task:
        assert material.data is not None
        train, test = (read(material.data, name, split, material.size) for split in ("train", "test"))
        generator = draw(seed, group, number)
        train = train.take(per_class(train.labels, DATASET_TRAIN_PER_CLASS, generator))
        test = test.take(torch.randperm(len(test.labels), generator=generator)[:DATASET_TEST])
        return Task(group, number, seed, train, test, _other(material, group, seed), flip)

    return build


def _of_family(name: str, size: int, images: int, seed: int, part: int = 0) -> Images:
    drawn = families.draw(name, FAMILY_CLASSES, images, seed, part)
    opened = open_images(drawn.images, drawn.labels, size=size, classes=drawn.classes)
    return Images(*opened.tensors(), opened.classes)


def family_task(name: str) -> Callable[[Material, int, int], Task]:
    """Tasks of a made-up family: ``FAMILY_CLASSES`` classes of a seed far from those that trainings use."""

    def build(material: Material, number: int, seed: int) -> Task:
        own = int(torch.randint(10**6, 2**31, (), generator=draw(seed, "family", name, number)))
        train = _of_family(name, material.size, FAMILY_TRAIN, own, part=0)
        test = _of_family(name, material.size, FAMILY_TEST, own, part=1)
        return Task(name, number, seed, train, test, _other(material, name, seed))

    return build


GROUPS: dict[str, Group] = {
    "unseen": Group(
        "{ways} unseen classes of Tiny-ImageNet", unseen_classes, NATURAL, repeated=True, other="fashion_mnist"
    ),
    "many": Group(
        f"{MANY} unseen classes of Tiny-ImageNet",
        partial(unseen_classes, name="many", ways=MANY),
        NATURAL,
        repeated=True,
        most=MANY_TASKS,
        ways=MANY,
        other="fashion_mnist",
    ),
    "digits": Group("Digits (scikit-learn)", digits_task, other="natural"),
    "mnist": Group("MNIST", dataset_task("mnist", "mnist"), ("mnist",), other="natural"),
    "fashion": Group(
        "Fashion-MNIST", dataset_task("fashion_mnist", "fashion", flip=True), ("fashion_mnist",), other="natural"
    ),
    "omniglot": Group(
        "Omniglot, 242 characters",
        dataset_task("omniglot28_8alphabets", "omniglot"),
        ("omniglot28_8alphabets",),
        other="natural",
    ),
    "textures": Group(
        f"Textures (made up), {FAMILY_CLASSES} classes", family_task("textures"), other="strokes", family="textures"
    ),
    "strokes": Group(
        f"Invented characters (made up), {FAMILY_CLASSES} classes",
        family_task("strokes"),
        other="textures",
        family="strokes",
    ),
    "glyphs": Group(
        f"Glyphs (made up), {FAMILY_CLASSES} classes", family_task("glyphs"), other="textures", family="glyphs"
    ),
}
