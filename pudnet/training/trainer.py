"""Training of PudNet: episodes of small datasets, three losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet.data import families
from pudnet.data.episodes import ClassPool, Episode, sample_episode
from pudnet.data.source import ImageSource, open_images
from pudnet.directions import normalising_by_batch
from pudnet.errors import InputError, message
from pudnet.familiarity import describe
from pudnet.features import Reading, feature_maps, last_features
from pudnet.models.pudnet import PudNet
from pudnet.training.config import DataSource, TrainingConfig
from pudnet.training.loop import BaseTrainer
from pudnet.training.losses import class_means, cosine_logits, group_losses, ridge_logits

VALIDATION_TASKS, VALIDATION_WAYS, VALIDATION_IMAGES = 20, 5, 35
FAMILIAR = 192  # datasets from which a checkpoint knows what is familiar to it
TERMS = ("cosine", "auxiliary", "agreement", "ridge")
MEASURES = ("loss", *TERMS, "accuracy", "ridge_accuracy")


class Trainer(BaseTrainer):
    """Holds the hypernetwork, the auxiliary classifier and the optimiser; a step's groups are small datasets.

    Args:
        config: the run.
        device: where to train.

    Raises:
        InputError: the data cannot be read or does not fit the settings.
    """

    kind = "training"

    def __init__(self, config: TrainingConfig, device: str = "cpu") -> None:
        super().__init__(config, device)
        self.config = config
        self._check_groups("episodes.groups", config.episodes.groups)
        self.net = PudNet(config.target, config.preset, seed=config.seed, **config.model)
        self._start_from(config.start, self.net)
        self.net.to(self.device).train()
        self.pools, self.held_out = self._read(config.data)
        weights = np.array([source.weight for source in config.data])
        self.shares = weights / weights.sum()
        self.first_class = np.cumsum([0, *(len(pool.classes) for pool in self.pools)])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.auxiliary = nn.Linear(self._feature_width(), int(self.first_class[-1])).to(self.device)
        buffers = [value for value in self.net.buffers() if value.is_floating_point()]
        self._start({"net": self.net, "auxiliary": self.auxiliary}, buffers)

    def _read(self, sources: tuple[DataSource, ...]) -> tuple[list[ClassPool], list[ClassPool]]:
        train, held_out = [], []
        for source in sources:
            images, labels = [], []
            names: list[str] = []
            for opened in self._open(source):
                part_images, part_labels = opened.tensors()
                images.append(part_images)
                labels.append(part_labels + len(names))
                names += list(opened.classes)
            if len(set(names)) < len(names):
                raise InputError(message("Trainer", "data.paths", "files of different classes", "a name twice"))
            if unknown := sorted(set(source.held_out) - set(names)):
                raise InputError(message("Trainer", "data.held_out", "names of classes", unknown[:3]))
            joined = torch.cat(images), torch.cat(labels)
            pool = ClassPool.build(*joined, names, [name for name in names if name not in set(source.held_out)])
            self._check_episodes(pool)
            train.append(pool)
            unseen = ClassPool.build(*joined, names, source.held_out)
            if len(unseen.classes) >= VALIDATION_WAYS and unseen.smallest > 1:
                held_out.append(unseen)
        return train, held_out

    def _open(self, source: DataSource) -> Iterator[ImageSource]:
        size = self.net.config.image_size
        if source.family:
            drawn = families.draw(source.family, source.classes, source.images, source.seed)
            yield open_images(drawn.images, drawn.labels, size=size, classes=drawn.classes)
        for path in source.paths:
            yield open_images(path, size=size)

    def _check_episodes(self, pool: ClassPool) -> None:
        """Refuse now what would fail at some later step."""
        wanted = self.config.episodes
        if wanted.classes > len(pool.classes):
            rule = f"at most {len(pool.classes)}, the training classes of every [[data]]"
            raise InputError(message("Trainer", "episodes.classes", rule, wanted.classes))
        if pool.smallest < wanted.support + wanted.query:
            rule = f"at most {pool.smallest}, the images of the smallest class"
            raise InputError(message("Trainer", "episodes.support + query", rule, wanted.support + wanted.query))
        side, crop = self.net.config.image_size, self.config.augment.crop
        if crop >= side:
            raise InputError(message("Trainer", "augment.crop", f"less than the image size, {side}", crop))

    def _feature_width(self) -> int:
        maps = self.net.try_target(feature_maps)
        return int(last_features(maps).shape[1])

    def _group(self, number: int) -> dict[str, Tensor]:
        """Loss of group ``number`` of the current step; all randomness comes from (seed, step, group)."""
        config, wanted = self.config, self.config.episodes
        rng = np.random.default_rng([config.seed, self.steps_done, number])
        source = int(rng.choice(len(self.pools), p=self.shares))
        episode = self._episode(source, rng, wanted.classes, wanted.support, wanted.query)
        images, labels = episode.images.to(self.device), episode.labels.to(self.device)
        directed = any(self.net.config.directions) and rng.random() < config.episodes.directions
        weights = self._weights(images[: episode.support], labels[: episode.support], directed)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.run.amp):
            maps = self.net.call(weights, images, feature_maps)
        maps = [one.float() for one in maps]
        features = last_features(maps)
        classes = (episode.classes + int(self.first_class[source])).to(self.device)
        losses = group_losses(
            features, labels, episode.support, self.net.temperature, self.auxiliary(features), classes
        )
        if config.loss.ridge:
            support, query = Reading().pool(maps).split([episode.support, len(images) - episode.support])
            answers = ridge_logits(
                support, labels[: episode.support], query, len(episode.classes), config.loss.ridge_lambda
            )
            losses["ridge"] = F.cross_entropy(self.net.temperature * answers, labels[episode.support :])
            losses["ridge_accuracy"] = (answers.argmax(dim=1) == labels[episode.support :]).float().mean()
        return losses

    def _episode(self, source: int, rng: np.random.Generator, classes: int, support: int, query: int) -> Episode:
        """A small dataset of one source, augmented as in training."""
        return sample_episode(
            self.pools[source],
            rng,
            self.net.preprocess,
            classes=classes,
            support=support,
            query=query,
            **dataclasses.asdict(self.config.augment),
        )

    def _weights(self, support: Tensor, labels: Tensor, directed: bool) -> dict[str, Tensor]:
        """Weights for a small dataset: normalised images ``[S, 3, H, W]`` and their labels ``[S]``."""
        generated = self.net.layout.views(self.net(support, [len(support)])[0])
        return self.net.with_directions(generated, support, labels) if directed else generated

    def _backward(self) -> Tensor:
        config = self.config
        groups = config.episodes.groups
        before = [value.clone() for value in self.buffers]
        after = [torch.zeros_like(value) for value in self.buffers]
        totals = torch.zeros(len(MEASURES), device=self.device)
        for number in range(self.rank, groups, self.world):
            # Every group starts from the same running statistics, so that their mean is independent of who ran which.
            for value, start in zip(self.buffers, before, strict=True):
                value.copy_(start)
            terms = self._group(number)
            zero = torch.zeros((), device=self.device)
            terms["loss"] = sum((getattr(config.loss, name) * terms[name] for name in TERMS if name in terms), zero)
            (terms["loss"] / groups).backward()
            totals += torch.stack([terms.get(name, zero) for name in MEASURES]).detach() / groups
            for total, value in zip(after, self.buffers, strict=True):
                total += value / groups
        for value, mean in zip(self.buffers, after, strict=True):
            value.copy_(mean)
        return totals

    def _metrics(self, totals: list[float]) -> dict[str, float]:
        metrics = dict(zip(MEASURES, totals, strict=True))
        unused = () if self.config.loss.ridge else ("ridge", "ridge_accuracy")
        return {name: value for name, value in metrics.items() if name not in unused}

    def validate(self) -> dict[str, float]:
        return self.unseen_accuracy() if self.held_out else {}

    def write_result(self, path: Path) -> None:
        held_out = [list(source.held_out) for source in self.config.data]
        card = {"held_out": held_out, "training": self.config.to_dict(), "familiarity": self.familiarity()}
        self.net.save(path, card=card)

    @torch.no_grad()
    def familiarity(self) -> dict[str, Any]:
        """What ``pudnet.familiarity`` has to know of the training data: small datasets of two classes and more."""
        self.net.eval()
        wanted, features = self.config.episodes, []
        for number in range(FAMILIAR):
            rng = np.random.default_rng([self.config.seed, self.config.optimiser.steps, number])
            source = int(rng.choice(len(self.pools), p=self.shares))
            classes = int(rng.integers(2, wanted.classes + 1))
            images = self._episode(source, rng, classes, wanted.support + wanted.query, 0).images
            features.append(self.net.image_embeddings(images.to(self.device)))
        self.net.train()
        return describe(features)

    @torch.no_grad()
    def unseen_accuracy(self) -> dict[str, float]:
        """Accuracy of the cosine classifier, and of the ridge head, on tasks of held-out classes, always the same.

        Without directions, which want more images than these tasks have.
        """
        self.net.eval()
        cosine, ridge = [], []
        for number in range(VALIDATION_TASKS):
            rng = np.random.default_rng([VALIDATION_TASKS, number])
            pool = self.held_out[number % len(self.held_out)]
            images_a_class = min(VALIDATION_IMAGES, pool.smallest)
            query = max(1, images_a_class * 3 // 7)
            support = images_a_class - query
            episode = sample_episode(
                pool, rng, self.net.preprocess, classes=VALIDATION_WAYS, support=support, query=query
            )
            images, labels = episode.images.to(self.device), episode.labels.to(self.device)
            sizes = [episode.support, len(images) - episode.support]
            known, asked = labels.split(sizes)
            network = self.net.materialise(self._weights(images[: episode.support], known, directed=False))
            with normalising_by_batch(network):
                network(images[: episode.support])
            maps = feature_maps(network, images)
            features, queries = last_features(maps).split(sizes)
            logits = cosine_logits(queries, class_means(features, known, VALIDATION_WAYS), self.net.temperature)
            cosine.append((logits.argmax(dim=1) == asked).float().mean())
            features, queries = Reading().pool(maps).split(sizes)
            answers = ridge_logits(features, known, queries, VALIDATION_WAYS, self.config.loss.ridge_lambda)
            ridge.append((answers.argmax(dim=1) == asked).float().mean())
        self.net.train()
        return {"unseen_accuracy": float(torch.stack(cosine).mean()), "unseen_ridge": float(torch.stack(ridge).mean())}
