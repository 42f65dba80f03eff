"""A model on labelled images: everything the page shows of its answers, in one pass over the images.

n images, K classes.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pudnet.data import ImageSource
from pudnet.predicted import PredictedModel, ordered

SAMPLES = 24
MISTAKES = 12
BINS = 10  # of confidence


class Sample(NamedTuple):
    """One image uint8 ``[size, size, 3]``, its class, the model's answer, and how probable the model finds it."""

    image: Tensor
    truth: str
    answer: str
    probability: float

    @property
    def right(self) -> bool:
        return self.truth == self.answer


class ClassRow(NamedTuple):
    """One class: its images, and the share of them that is classified correctly."""

    name: str
    n: int
    top1: float


class Confusion(NamedTuple):
    """How many images of the class ``truth`` are taken for ``answer``."""

    truth: str
    answer: str
    n: int


class Bin(NamedTuple):
    """Images whose answer is about equally probable: how many, mean probability, and share that is correct."""

    n: int
    probability: float
    top1: float


@dataclass(frozen=True)
class Measurement:
    """A model's answers.

    Attributes:
        confusion: int64 ``[K, K]``, true class by answer.
        classes: K names.
        samples: drawn at random.
        mistakes: wrong answers, the most confident first.
        bins: of confidence, the empty ones left out.
        nll: mean negative log-probability of the right class.
    """

    confusion: Tensor
    classes: tuple[str, ...]
    samples: list[Sample]
    mistakes: list[Sample]
    bins: list[Bin]
    nll: float

    @property
    def n(self) -> int:
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        return float(self.confusion.trace()) / self.n

    @property
    def error(self) -> float:
        """Standard error of ``top1``: of the choice of images."""
        return math.sqrt(self.top1 * (1 - self.top1) / self.n)

    @property
    def per_class(self) -> list[ClassRow]:
        """Classes that have images, in label order."""
        counts, right = self.confusion.sum(1).tolist(), self.confusion.diagonal().tolist()
        return [ClassRow(name, n, hits / n) for name, n, hits in zip(self.classes, counts, right, strict=True) if n]

    def confusions(self, most: int) -> list[Confusion]:
        """The most frequent ones, the first the most frequent."""
        wrong = self.confusion - torch.diag(self.confusion.diagonal())
        counts, places = wrong.flatten().topk(min(most, wrong.numel()))
        k = len(self.classes)
        pairs = zip(counts.tolist(), places.tolist(), strict=True)
        return [Confusion(self.classes[place // k], self.classes[place % k], n) for n, place in pairs if n]


def measure(model: PredictedModel, source: ImageSource, *, seed: int = 0) -> Measurement:
    """Classify every image of ``source``, whose classes are the model's.

    Args:
        seed: of the sample that is shown.
    """
    k = len(model.classes)
    generator = torch.Generator().manual_seed(seed)
    confusion = torch.zeros(k, k, dtype=torch.int64)
    counts, probabilities, hits = (torch.zeros(BINS, dtype=torch.float64) for _ in range(3))
    nll = 0.0
    shown, mistakes = _Best(SAMPLES), _Best(MISTAKES)
    for images, truth in ordered(source, model.batchnorm, seed):
        found = model.classify(images).probabilities  # [b, K]
        confidence, answers = found.max(1)
        confusion += torch.bincount(truth * k + answers, minlength=k * k).view(k, k)
        own = found.gather(1, truth[:, None]).double()
        nll -= float(own.clamp_min(torch.finfo(torch.float32).tiny).log().sum())
        places = (confidence * BINS).long().clamp(max=BINS - 1)
        for total, values in ((counts, torch.ones(len(truth))), (probabilities, confidence), (hits, answers == truth)):
            total.index_add_(0, places, values.double())
        draws = torch.rand(len(truth), generator=generator).tolist()
        for index, draw in enumerate(draws):
            label, answer, probability = int(truth[index]), int(answers[index]), float(confidence[index])
            sample = Sample(images[index], model.classes[label], model.classes[answer], probability)
            shown.offer(draw, sample)
            if label != answer:
                mistakes.offer(probability, sample)
    bins = [
        Bin(int(n), probability / n, right / n)
        for n, probability, right in zip(counts.tolist(), probabilities.tolist(), hits.tolist(), strict=True)
        if n
    ]
    return Measurement(confusion, model.classes, shown.items, mistakes.items, bins, nll / int(confusion.sum()))


class _Best:
    """The items of the highest scores, at most so many of them; copies of their images."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._heap: list[tuple[float, int, Sample]] = []
        self._offered = 0

    def offer(self, score: float, sample: Sample) -> None:
        self._offered += 1  # tells equal scores apart: samples cannot be compared
        if len(self._heap) < self._most or score > self._heap[0][0]:
            entry = (score, -self._offered, sample._replace(image=sample.image.clone()))
            push = heapq.heappush if len(self._heap) < self._most else heapq.heapreplace
            push(self._heap, entry)

    @property
    def items(self) -> list[Sample]:
        return [sample for _, _, sample in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)]
