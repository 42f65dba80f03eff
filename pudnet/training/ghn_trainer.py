"""Training of a GHN (arXiv 2110.13100): each step, the same images for a few random architectures."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pudnet.batchnorm import set_policy
from pudnet.data.episodes import augmented
from pudnet.data.preprocess import Preprocess
from pudnet.data.source import open_images
from pudnet.errors import InputError, message
from pudnet.graphs import DeepNet, deepnets
from pudnet.models.ghn import GHN, GHNConfig
from pudnet.training.config import GHNTrainingConfig
from pudnet.training.loop import BaseTrainer

NETWORKS_KEPT = 4096  # drawn networks that each process remembers
VALIDATION_BATCH = 250


class GHNTrainer(BaseTrainer):
    """Holds the GHN and the optimiser; a step's groups are architectures.

    The loss is the mean cross-entropy of the architectures with their predicted parameters, BatchNorm on the statistics
    of the batch. An architecture whose loss or gradient is not finite is left out of the step.

    Args:
        config: the run.
        device: where to train.

    Raises:
        InputError: the data cannot be read or does not fit the settings.
    """

    kind = "ghn training"

    def __init__(self, config: GHNTrainingConfig, device: str = "cpu") -> None:
        super().__init__(config, device)
        self.config = config
        self._check_groups("networks.batch", config.networks.batch)
        shape = tuple(config.model.get("input_shape", GHNConfig.input_shape))
        if len(shape) != 3 or shape[0] != 3 or shape[1] != shape[2]:
            raise InputError(message("GHNTrainer", "model.input_shape", "[3, S, S]", list(shape)))
        self.image_size = shape[2]
        images, labels, self.classes = self._read()
        options = {**config.model, "num_classes": len(self.classes)}
        self.ghn = GHN(config.ghn, seed=config.seed, **options)
        self._start_from(config.start, self.ghn)
        self.ghn.to(self.device).train()
        self.preprocess = self._normalisation()
        order = torch.from_numpy(np.random.default_rng(config.seed).permutation(len(images)))
        held_out, kept = order[: config.images.validation], order[config.images.validation :]
        self.images, self.labels = images[kept], labels[kept]
        unused = np.random.default_rng(0)  # nothing random happens to these images
        self.held_out = augmented(images[held_out], unused, self.preprocess, crop=0, flip=False, colour=0.0)
        self.held_out_labels = labels[held_out]
        self._networks("train", config.networks.choose, 0)  # refuses limits that leave no network
        self.network = lru_cache(NETWORKS_KEPT)(partial(self._draw, "train"))
        self.unseen = [self._draw("val", index) for index in range(config.networks.validation)]
        self._start({"ghn": self.ghn}, buffers=[])

    def _read(self) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """Images of the chosen classes uint8 ``[N, S, S, 3]``, their labels ``[N]``, and the classes."""
        wanted = self.config.images
        opened = open_images(wanted.path, size=self.image_size)
        images, labels = opened.tensors()
        names = tuple(opened.classes)
        if wanted.classes:
            if unknown := sorted(set(wanted.classes) - set(names)):
                raise InputError(message("GHNTrainer", "images.classes", "names of classes", unknown[:3]))
            chosen = torch.tensor([names.index(name) for name in wanted.classes])
            matches = labels[:, None] == chosen  # [N, K]
            keep = matches.any(dim=1)
            images, labels, names = images[keep], matches[keep].int().argmax(dim=1), wanted.classes
        if wanted.validation + wanted.batch > len(images):
            rule = f"at most {len(images)}, the images there are"
            got = wanted.validation + wanted.batch
            raise InputError(message("GHNTrainer", "images.validation + batch", rule, got))
        if self.config.augment.crop >= self.image_size:
            rule = f"less than the image size, {self.image_size}"
            raise InputError(message("GHNTrainer", "augment.crop", rule, self.config.augment.crop))
        return images, labels, names

    def _normalisation(self) -> Preprocess:
        mean, std = self.ghn.config.mean, self.ghn.config.std
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            rule = "three numbers each, those of std positive"
            raise InputError(message("GHNTrainer", "model.mean and std", rule, (mean, std)))
        return Preprocess(self.image_size, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))

    def _networks(self, split: str, n: int, start: int) -> Iterator[DeepNet]:
        wanted = self.config.networks
        return deepnets(
            split,
            n,
            self.config.seed,
            start=start,
            classes=len(self.classes),
            image_size=self.image_size,
            widths=wanted.widths,
            most_parameters=wanted.most_parameters,
            most_cells=wanted.most_cells,
            stems=wanted.stems,
        )

    def _draw(self, split: str, index: int) -> DeepNet:
        """Network ``index``, its graph made and its BatchNorm on batch statistics; without numbers of its own."""
        drawn = next(self._networks(split, 1, index))
        assert drawn.graph.num_parameters  # traced before the network is changed
        set_policy(drawn.module, "batch")
        return drawn

    def _batch(self) -> tuple[Tensor, Tensor]:
        """The images ``[n, 3, S, S]`` and labels of the current step, the same in every process."""
        config = self.config
        rng = np.random.default_rng([config.seed, self.steps_done])
        index = torch.from_numpy(rng.choice(len(self.images), config.images.batch, replace=False))
        augment = config.augment
        images = augmented(
            self.images[index], rng, self.preprocess, crop=augment.crop, flip=augment.flip, colour=augment.colour
        )
        return images.to(self.device), self.labels[index].to(self.device)

    def _group(self, number: int) -> DeepNet:
        """Architecture ``number`` of the current step, a function of (seed, step, number)."""
        rng = np.random.default_rng([self.config.seed, self.steps_done, 1 + number])
        return self.network(int(rng.integers(self.config.networks.choose)))

    def _backward(self) -> Tensor:
        images, labels = self._batch()
        count = self.config.networks.batch
        networks = [self._group(number) for number in range(self.rank, count, self.world)]
        predicted = self.ghn([network.graph for network in networks])
        totals = torch.zeros(3, device=self.device)
        outputs: list[Tensor] = []
        gradients: list[Tensor] = []
        for network, parameters in zip(networks, predicted, strict=True):
            # One network at a time back to its parameters, so that the activations of one are in memory.
            leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
            logits = self._call(network, leaves, images)
            loss = F.cross_entropy(logits, labels)
            found = torch.autograd.grad(loss / count, list(leaves.values()))
            finite = torch.stack([loss.detach(), *(gradient.sum() for gradient in found)]).isfinite().all()
            if not finite:
                continue
            outputs += parameters.values()
            gradients += found
            accuracy = (logits.argmax(dim=1) == labels).float().mean()
            totals += torch.stack([loss.detach(), accuracy, torch.ones_like(accuracy)])
        if outputs:
            torch.autograd.backward(outputs, gradients)
        return totals

    def _call(self, network: DeepNet, parameters: dict[str, Tensor], images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.run.amp):
            logits: Tensor = torch.func.functional_call(network.module, parameters, (images,))
        return logits.float()

    def _metrics(self, totals: list[float]) -> dict[str, float]:
        loss, accuracy, used = totals
        count = self.config.networks.batch
        return {"loss": loss / max(used, 1), "accuracy": accuracy / max(used, 1), "left_out": count - used}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean and best accuracy of unseen architectures on the held-out images."""
        if not self.unseen:
            return {}
        self.ghn.eval()
        found = []
        for network in self.unseen:
            parameters = self.ghn.generate(network.graph)
            logits = [self._call(network, parameters, part.to(self.device)) for part in self._parts()]
            right = torch.cat(logits).argmax(dim=1).cpu() == self.held_out_labels
            found.append(float(right.float().mean()))
        self.ghn.train()
        return {"unseen_accuracy": sum(found) / len(found), "best_accuracy": max(found)}

    def _parts(self) -> tuple[Tensor, ...]:
        """The held-out images in batches of nearly equal size: BatchNorm needs more than a few in each."""
        return self.held_out.tensor_split(-(-len(self.held_out) // VALIDATION_BATCH))

    def write_result(self, path: Path) -> None:
        self.ghn.save(path, card={"classes": list(self.classes), "training": self.config.to_dict()})
