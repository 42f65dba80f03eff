"""Classification heads, fitted in closed form on the features of a finished network.

n images, F pooled features, K classes, m images of the leave-one-out estimate.

Every head reports the accuracy to expect on new images: each image is classified by the head that would have been
fitted without it (leave-one-out, in closed form, no refitting). The same outputs give the temperature that turns the
head's outputs into calibrated probabilities.

Every image counts once: there is no class weighting, so that the expected accuracy and the probabilities hold for new
images in the same mix of classes as the given ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet.errors import CheckpointError, DtypeError, InputError, ShapeError, message, one_line
from pudnet.features import Reading

Batch = tuple[Sequence[Tensor] | Tensor, Tensor]  # feature maps or what Head.reading made of them, labels [b]

# Released PudNet's initial temperature; kept where nothing can be left out to measure a better one.
INITIAL_TEMPERATURE = 10.0
# Above this many images the leave-one-out estimate of an accumulated head uses a random sample of so many (its
# standard error is then at most 1.1 points).
LOO_ROWS = 2048
# Images that the kernel head takes at most: its cost grows with their cube, and it keeps their features.
KERNEL_ROWS = 5120
KERNEL_VALUES = 2**26  # of all their features, where it is the choice: 128 MB in a file
# Width of its kernel, in units of the images' mean squared distance: on the validation classes and families 2 to 4 are
# equally good, less does worse with directions, and much more is the linear head.
KERNEL_WIDTH = 4.0
SCALE = "Divide the features by their standard deviation."
KERNEL_SEARCH = 2048  # images at most that its lambda is looked for on
KERNEL_START = -2  # half-decades: where its lambda is looked for first
# Gram matrices are updated with at least so many rows at once: adding F x F numbers costs as much as 500 rows.
CHUNK_ROWS = 1024
# Half-decades of lambda, in units of the mean squared norm of the centred features.
LAMBDA_EXPONENTS = range(-8, 7)
# float32 factorisations are used up to this condition number (bound), float64 above.
FLOAT32_CONDITION = 1e6


class Head(nn.Module):
    """A fitted classifier: feature maps -> logits whose softmax are calibrated probabilities.

    Attributes:
        name: one of ``HEADS``.
        num_classes: K.
        expected_accuracy: leave-one-out accuracy, 0 to 1.
        info: how it was fitted (JSON-able): ``images``, ``features``, ``loo_images``, ``temperature``, ``loo_nll``,
            ``single_image_classes``; for ridge also ``lambda``, ``lambda_relative``, ``loo_squared_error``, ``form``.
        reading: what it reads of feature maps; of the class, what one that is yet to be fitted reads.
    """

    reading: Reading = Reading()
    weight: Tensor  # [K, F]
    temperature: Tensor  # []

    def __init__(
        self, name: str, tensors: Mapping[str, Tensor], expected_accuracy: float, info: dict[str, Any]
    ) -> None:
        super().__init__()
        self.name = name
        self.num_classes = tensors["weight"].shape[0]
        self.expected_accuracy = expected_accuracy
        self.info = info
        for key, tensor in tensors.items():
            self.register_buffer(key, tensor.detach().to(torch.float32, copy=True))

    @staticmethod
    def shapes(num_classes: int, features: int, rows: int) -> dict[str, list[int]]:
        """Name and shape of every tensor of such a head; ``rows``: images that it keeps."""
        return {"weight": [num_classes, features], "temperature": []}

    @property
    def state(self) -> dict[str, Tensor]:
        """The fitted tensors by name; with :meth:`config` all that :func:`head_from_config` needs."""
        return dict(self.named_buffers())

    def config(self) -> dict[str, Any]:
        """A JSON-able description."""
        return {
            "name": self.name,
            "num_classes": self.num_classes,
            "features": self.info["features"],
            "expected_accuracy": self.expected_accuracy,
            "info": dict(self.info),
            "reading": asdict(self.reading),
        }

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Feature maps ``[n, C, h, w]`` or ``[n, F]`` each -> logits ``[n, K]``."""
        return self.logits(self.reading.pool(maps))

    def logits(self, features: Tensor) -> Tensor:
        """What ``reading`` gives, ``[n, F]`` -> logits ``[n, K]``."""
        return self.temperature * self.scores(features.to(self.weight.dtype))

    def scores(self, features: Tensor) -> Tensor:
        """Pooled features ``[n, F]`` -> scores before calibration ``[n, K]``."""
        raise NotImplementedError


class CosineHead(Head):
    """Cosine of the last layer's features with each class mean (the papers' head); ``weight`` holds the unit means."""

    reading = Reading("last", spread=False)

    def scores(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight)


class RidgeHead(Head):
    """Ridge regression of one-hot targets on the features of all layers."""

    bias: Tensor  # [K]

    @staticmethod
    def shapes(num_classes: int, features: int, rows: int) -> dict[str, list[int]]:
        return {"weight": [num_classes, features], "bias": [num_classes], "temperature": []}

    def scores(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)


class RidgeLastHead(RidgeHead):
    """Ridge regression of one-hot targets on the features of the last layer."""

    reading = Reading("last")


class KernelHead(Head):
    """Kernel ridge regression of one-hot targets: an image is compared with every one that the head was fitted to.

    Two images are alike by ``exp(-rate * d)``, d the squared distance of their features of all layers. The head keeps
    the features of its images, in half precision in a file, and reading them takes n F multiplications for each image.
    """

    reading = Reading(covariances=True)
    centre: Tensor  # [F], mean of the images' features
    rows: Tensor  # [n, F], less that
    norms: Tensor  # [n], their squared norms
    rate: Tensor  # []
    bias: Tensor  # [K]

    @staticmethod
    def shapes(num_classes: int, features: int, rows: int) -> dict[str, list[int]]:
        kept = {"centre": [features], "rows": [rows, features], "norms": [rows], "rate": []}
        return {"weight": [num_classes, rows], "bias": [num_classes], **kept, "temperature": []}

    @property
    def state(self) -> dict[str, Tensor]:
        return {**super().state, "rows": self.rows.half()}  # exactly: they were fitted as such

    def scores(self, features: Tensor) -> Tensor:
        # Distances are differences of nearly equal numbers: in bfloat16 nothing would be left of them.
        device = features.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            squared = _squared_distances(features.float() - self.centre.float(), self.rows.float(), self.norms.float())
            near = torch.exp(-self.rate.float() * squared).to(self.weight.dtype)
            return F.linear(near, self.weight, self.bias)


def _squared_distances(a: Tensor, b: Tensor, b_norms: Tensor) -> Tensor:
    """Between every row of ``a [n, F]`` and of ``b [m, F]``, whose squared norms are ``b_norms [m]``: ``[n, m]``."""
    return torch.addmm(a.square().sum(1)[:, None] + b_norms, a, b.T, alpha=-2).clamp_min(0)


def _own_distances(x: Tensor, norms: Tensor) -> Tensor:
    """``_squared_distances`` between the rows of ``x [n, F]``: half the work, as they are symmetric."""
    found = x.new_empty(len(x), len(x))
    for i, j in _row_blocks(len(x)):
        found[i:j, :j] = _squared_distances(x[i:j], x[:j], norms[:j])
        found[:i, i:j] = found[i:j, :i].T
    return found


HEADS: dict[str, type[Head]] = {
    "kernel": KernelHead, "ridge": RidgeHead, "ridge-last": RidgeLastHead, "cosine": CosineHead
}  # fmt: skip


class HeadFitter:
    """A head in the making: it remembers of the images what it needs to take more of them, and more classes.

    Up to max(F, ``loo_rows``) images the pooled features are kept and every image takes part in the leave-one-out
    estimate. Beyond that the Gram matrix is accumulated, and a random sample of that many images, kept on the way,
    takes part; memory is O(F^2 + F K) however many images there are. (The cosine head only ever needs class sums and
    ``loo_rows`` images. The kernel head keeps the features of all its images, and takes ``KERNEL_ROWS`` at most.)

    Args:
        name: one of ``HEADS``: ``"kernel"``, ``"ridge"``, ``"ridge-last"``, ``"cosine"``.
        num_classes: K, at least 2 when it is fitted.
        seed: of the sample for the leave-one-out estimate.
        loo_rows: size of that sample.
        reading: what the head reads of feature maps; None for what heads of its kind do.

    Raises:
        InputError: an unknown name, fewer than two classes, or ``loo_rows`` below 2.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        *,
        seed: int = 0,
        loo_rows: int = LOO_ROWS,
        reading: Reading | None = None,
    ) -> None:
        check_head(name)
        if num_classes < 2:
            raise InputError(message("fit_head", "num_classes", "at least 2", num_classes))
        if loo_rows < 2:
            raise InputError(message("fit_head", "loo_rows", "at least 2", loo_rows))
        self.name, self.num_classes, self.seed, self.loo_rows = name, num_classes, seed, loo_rows
        self.reading = reading or HEADS[name].reading
        self._sample: _Reservoir | None = None
        self._whole: ClassSums | None = None  # of the ridge heads: once there are more images than are kept

    # Heads are used with autograd after they are fitted, so their tensors must not be inference tensors.
    @torch.inference_mode(False)
    @torch.no_grad()
    def add(self, batches: Iterable[Batch]) -> None:
        """Add images: (feature maps, integer labels ``[b]``), in any order and batches of any size; read once.

        In place of maps may be what ``Head.reading`` made of them, ``[b, F]``.

        Raises:
            InputError: a label outside 0..K-1, features that are not finite, too many images for the kernel head.
            ShapeError, DtypeError: labels or maps of a wrong shape or type.
        """
        width = None if self._sample is None else self._sample.width
        for features, labels in _pooled_chunks(batches, self.reading, self.num_classes, width):
            if self._sample is None:
                self._sample = _Reservoir(self._capacity(features.shape[1]), self.seed)
                if self.name == "cosine":
                    self._whole = ClassSums(features.shape[1], self.num_classes, features.device)
            self._require_room(self._sample.seen + len(labels))
            if self._whole is None and self._sample.seen + len(labels) > self._sample.capacity:
                self._whole = _accumulate(self._sample, features.shape[1], self.num_classes, features.device)
            if self._whole is not None:
                self._whole.update(features, labels)
            self._sample.add(features, labels)

    def _capacity(self, width: int) -> int:
        """How many rows of ``width`` features are kept."""
        if self.name == "kernel":
            return KERNEL_ROWS
        return self.loo_rows if self.name == "cosine" else max(width, self.loo_rows)

    def _require_room(self, images: int) -> None:
        if self.name == "kernel" and images > KERNEL_ROWS:
            hint = "Use the head 'ridge', which takes any number."
            raise InputError(message("fit_head", "batches", f"at most {KERNEL_ROWS} images", images, hint))

    def add_classes(self, count: int) -> None:
        """Make room for ``count`` more classes, labelled after the present ones."""
        self.num_classes += count
        if self._whole is not None:
            self._whole.add_classes(count)

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, other: HeadFitter) -> None:
        """Take the images of another fitter, which stays as it is, as if they had been added here.

        The sample for the leave-one-out estimate is again uniform; it is another one than without the merge.

        Raises:
            InputError: another head, other classes, another ``loo_rows``, features of another width, or too many images
                for the kernel head.
        """
        if other._sample is None:
            return
        ours, theirs = (
            (one.name, one.num_classes, one.loo_rows, other._sample.width if one._sample is None else one._sample.width)
            for one in (self, other)
        )
        if ours != theirs:
            rule = f"of the same (head, classes, loo_rows, features) as this one, {ours}"
            raise InputError(message("HeadFitter.merge", "other", rule, theirs))
        if self._sample is None:
            self._sample, self._whole = copy.deepcopy((other._sample, other._whole))
            return
        self._require_room(self._sample.seen + other._sample.seen)
        many = self._sample.seen + other._sample.seen > self._sample.capacity
        if many or self._whole is not None or other._whole is not None:
            self._whole = self._sums()
            self._whole.merge(other._sums())
        self._sample.merge(other._sample)

    def _sums(self) -> ClassSums:
        """The sums there are, or those of the rows where those are all the images."""
        if self._whole is not None:
            return self._whole
        assert self._sample is not None
        return _accumulate(self._sample, self._sample.width, self.num_classes, self._sample.rows()[0].device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def fit(self) -> Head:
        """The head of all images so far; more may be added afterwards.

        An image that is alone in its class cannot be classified right when it is left out. It counts as an error in
        the expected accuracy, and not at all in the temperature.

        Raises:
            InputError: there are no images, or none of some class.
        """
        if self._sample is None:
            raise InputError(message("fit_head", "batches", "at least one image", "none"))
        x, y = self._sample.rows()
        if self.name == "cosine":
            assert self._whole is not None
            fitted = _fit_cosine(self._whole, x, y)
        elif self.name == "kernel":
            fitted = _fit_kernel(x, y, self.num_classes)
        else:
            if self._whole is None and self._sample.seen > x.shape[1]:
                self._whole = _accumulate(self._sample, x.shape[1], self.num_classes, x.device)
            assert self._whole is None or isinstance(self._whole, RidgeAccumulator)
            fitted = _fit_ridge(self._whole, x, y, self.num_classes, self.seed, self.loo_rows)
        head = _calibrated(self.name, fitted)
        head.reading = self.reading
        return head

    @property
    def device(self) -> torch.device:
        """Where the images' features are; the CPU while there are none."""
        return torch.device("cpu") if self._sample is None else self._sample.rows()[0].device

    def to(self, device: torch.device) -> HeadFitter:
        """Move to ``device``; returns itself."""
        if self._sample is not None:
            x, y = self._sample.rows()
            self._sample.replace(x.to(device), y.to(device))
        if self._whole is not None:
            vars(self._whole).update({name: tensor.to(device) for name, tensor in vars(self._whole).items()})
        return self

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What :meth:`from_state` needs: a JSON-able part and tensors (copies).

        Raises:
            InputError: there are no images yet.
        """
        if self._sample is None:
            raise InputError(message("HeadFitter.state", "images", "added before saving", "none"))
        x, y = self._sample.rows()
        config: dict[str, Any] = {"seed": self.seed, "loo_rows": self.loo_rows, "seen": self._sample.seen}
        config["reading"] = asdict(self.reading)
        tensors = {"rows": x, "labels": y, "random": self._sample.random}
        tensors |= vars(self._whole) if self._whole is not None else {}
        return config, {name: tensor.clone() for name, tensor in tensors.items()}

    @classmethod
    def from_state(cls, name: str, num_classes: int, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The fitter that :meth:`state` described.

        Raises:
            CheckpointError: an entry or tensor is missing, unknown, or does not fit.
        """
        where = "HeadFitter.from_state"
        try:
            fitter = cls(name, num_classes, seed=config["seed"], loo_rows=config["loo_rows"])
            fitter.reading = _reading_from(config, fitter.reading)
            rows, labels = tensors["rows"], tensors["labels"]
            m, width = rows.shape
            kind = ClassSums if name == "cosine" else RidgeAccumulator
            whole = kind(width, num_classes) if "counts" in tensors else None
            likes = {"rows": rows.float(), "labels": torch.empty(m).long(), "random": torch.Generator().get_state()}
            likes |= vars(whole) if whole is not None else {}
            shapes = {key: (list(like.shape), like.dtype) for key, like in likes.items()}
            got = {key: (list(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
            if shapes != got:
                raise CheckpointError(message(where, "tensors", f"of the shapes {shapes}", got))
            _check_rows(where, rows, labels, num_classes)
            fitter._sample = sample = _Reservoir(fitter._capacity(width), fitter.seed)
            sample.replace(rows, labels)
            sample.seen, sample.random = config["seen"], tensors["random"]
            torch.Generator().set_state(sample.random)
            if not isinstance(sample.seen, int) or min(sample.seen, sample.capacity) != m:
                raise CheckpointError(message(where, "seen", f"at least the {m} rows kept", sample.seen))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(message(where, "state", "one that HeadFitter.state made", one_line(error))) from error
        if whole is not None:
            vars(whole).update({key: tensors[key] for key in vars(whole)})
            fitter._whole = whole
        return fitter


def fit_head(name: str, batches: Iterable[Batch], num_classes: int, *, seed: int = 0, loo_rows: int = LOO_ROWS) -> Head:
    """Fit a head in one pass over ``batches``: :class:`HeadFitter`, which says more, in one call."""
    fitter = HeadFitter(name, num_classes, seed=seed, loo_rows=loo_rows)
    fitter.add(batches)
    return fitter.fit()


def _calibrated(name: str, fitted: _Fit) -> Head:
    """The head of a fit, its temperature and expected accuracy taken from the leave-one-out scores."""
    counts = fitted.counts
    repeated = counts[fitted.loo_labels] > 1  # [m]
    temperature, nll = fit_temperature(fitted.loo_scores[repeated], fitted.loo_labels[repeated])
    correct = (fitted.loo_scores.argmax(1) == fitted.loo_labels) & repeated
    info = {
        "images": int(counts.sum()),
        "features": fitted.features,
        "loo_images": len(correct),
        "single_image_classes": int((counts == 1).sum()),
        "temperature": temperature,
        "loo_nll": nll,
        **fitted.info,
    }
    tensors = {**fitted.tensors, "temperature": torch.tensor(temperature, device=counts.device)}
    return HEADS[name](name, tensors, correct.double().mean().item(), info)


def choose_head(images: int, features: int) -> str:
    """What the head ``"auto"`` stands for: the kernel head where the features that it keeps are few, else ridge."""
    return "kernel" if images <= KERNEL_ROWS and images * features <= KERNEL_VALUES else "ridge"


def check_head(name: str, *others: str) -> None:
    """Raise InputError, listing the heads there are, unless ``name`` is one of them or of ``others``."""
    if name not in (*others, *HEADS):
        known = ", ".join(repr(known) for known in (*others, *HEADS))
        raise InputError(message("fit_head", "head", f"one of {known}", repr(name)))


def head_from_config(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Head:
    """Rebuild a head from ``head.config()`` and ``head.state``.

    Raises:
        CheckpointError: an entry or tensor is missing, unknown or of the wrong shape.
    """
    where = "head_from_config"
    missing = [key for key in ("name", "num_classes", "features", "expected_accuracy", "info") if key not in config]
    if missing:
        raise CheckpointError(message(where, "config", "complete", f"one without {', '.join(missing)}"))
    if config["name"] not in HEADS:
        raise CheckpointError(message(where, "config name", f"one of {', '.join(HEADS)}", repr(config["name"])))
    head = HEADS[config["name"]]
    shapes = head.shapes(config["num_classes"], config["features"], len(tensors.get("rows", ())))
    got = {key: list(tensor.shape) for key, tensor in tensors.items()}
    if got != shapes:
        raise CheckpointError(message(where, "tensors", f"of the shapes {shapes}", got))
    made = head(config["name"], tensors, config["expected_accuracy"], dict(config["info"]))
    made.reading = _reading_from(config, head.reading)
    return made


def _reading_from(config: Mapping[str, Any], usual: Reading) -> Reading:
    """What a head or fitter reads; ``usual`` without covariances in files of before it was stored."""
    found = config.get("reading", asdict(replace(usual, covariances=False)))
    try:
        return Reading(**found)
    except (InputError, TypeError) as error:
        raise CheckpointError(message("head_from_config", "reading", "one of this version", repr(found))) from error


@dataclass
class _Fit:
    """What a fit yields before calibration; the leave-one-out scores [m, K] are those of ``loo_labels`` [m]."""

    tensors: dict[str, Tensor]
    features: int  # F
    counts: Tensor  # [K] images per class
    loo_scores: Tensor
    loo_labels: Tensor
    info: dict[str, Any]


# ---- reading ----------------------------------------------------------------------------------------------------


def _pooled_chunks(
    batches: Iterable[Batch], reading: Reading, num_classes: int, width: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Checked batches, pooled to float32 features [c, F] and labels [c], joined to chunks of CHUNK_ROWS or more.

    ``width`` is the F there has to be; None for that of the first batch.
    """
    pending: list[tuple[Tensor, Tensor]] = []
    rows = 0
    for maps, labels in batches:
        features = (maps if isinstance(maps, Tensor) else reading.pool(maps)).to(torch.float32)
        _check_rows("fit_head", features, labels, num_classes)
        width = width or features.shape[1]
        if features.shape[1] != width:
            rule = f"as wide as the earlier batches' ({width} features)"
            raise ShapeError(message("fit_head", "batches", rule, features.shape[1]))
        pending.append((features, labels.to(features.device, torch.long)))
        rows += len(features)
        if rows >= CHUNK_ROWS:
            yield _join(pending)
            pending, rows = [], 0
    if rows:
        yield _join(pending)


def _join(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([features for features, _ in pairs]), torch.cat([labels for _, labels in pairs])


def _check_rows(where: str, features: Tensor, labels: Tensor, num_classes: int) -> None:
    if labels.dim() != 1 or len(labels) != len(features):
        raise ShapeError(message(where, "labels", f"[{len(features)}], one per image", list(labels.shape)))
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DtypeError(message(where, "labels", "of an integer dtype", labels.dtype))
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        got = f"{int(labels.min())}..{int(labels.max())}"
        raise InputError(message(where, "labels", f"within 0..{num_classes - 1}", got))
    if not math.isfinite(features.sum(dtype=torch.float64).item()):
        hint = "Look for NaN or infinity in the images."
        raise InputError(message(where, "features", "finite", "NaN or infinity", hint))


class _Reservoir:
    """A uniform random sample of at most ``capacity`` rows of a stream; all of them while they fit."""

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity = capacity
        self.seen = 0
        self.random = torch.Generator().manual_seed(seed).get_state()
        self._parts: list[tuple[Tensor, Tensor]] = []

    @property
    def width(self) -> int:
        """F, of the rows so far."""
        return self._parts[0][0].shape[1]

    def replace(self, features: Tensor, labels: Tensor) -> None:
        """Exchange the rows that are kept: features ``[m, F]``, labels ``[m]``."""
        self._parts = [(features, labels)]

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add rows: features ``[b, F]``, labels ``[b]``."""
        before = self.seen
        self.seen += len(labels)
        if before < self.capacity:
            room = self.capacity - before
            self._parts.append((features[:room], labels[:room]))
        if self.seen <= self.capacity:
            return
        if before <= self.capacity:  # the first time: own the rows before writing to them
            self._parts = [(torch.cat([f for f, _ in self._parts]), torch.cat([y for _, y in self._parts]))]
        kept_features, kept_labels = self._parts[0]
        # Row number t (from 0) replaces a random one of t + 1 places, if that place is among those kept.
        late = torch.arange(max(before, self.capacity), self.seen)
        generator = torch.Generator()
        generator.set_state(self.random)
        draws = torch.rand(len(late), generator=generator, dtype=torch.float64)
        self.random = generator.get_state()
        places = (draws * (late + 1)).long().tolist()
        taken = {place: row - before for place, row in zip(places, late.tolist(), strict=True) if place < self.capacity}
        if taken:  # of two rows for one place the later stays
            to = torch.tensor(list(taken), device=features.device)
            source = torch.tensor(list(taken.values()), device=features.device)
            kept_features[to], kept_labels[to] = features[source], labels[source]

    def merge(self, other: _Reservoir) -> None:
        """A sample of both streams together, as uniform as each of them is of its own."""
        generator = torch.Generator()
        generator.set_state(self.random)
        seen = self.seen + other.seen
        if seen > self.capacity:
            # Of a uniform sample of the union so many are of the first stream.
            seed = int(torch.randint(2**62, (), generator=generator))
            ours = int(np.random.default_rng(seed).hypergeometric(self.seen, other.seen, self.capacity))
            parts = [
                (x[chosen], y[chosen])
                for (x, y), count in ((self.rows(), ours), (other.rows(), self.capacity - ours))
                for chosen in [torch.randperm(len(y), generator=generator)[:count].to(y.device)]
            ]
        else:
            parts = [self.rows(), other.rows()]
        self._parts, self.seen, self.random = parts, seen, generator.get_state()
        self._parts = [self.rows()]  # one part, as later rows are written into it

    def rows(self) -> tuple[Tensor, Tensor]:
        """Features ``[m, F]`` and labels ``[m]``."""
        self._parts = [_join(self._parts)]
        return self._parts[0]


def _require_every_class(counts: Tensor) -> None:
    empty = torch.nonzero(counts == 0).flatten().tolist()
    if empty:
        got = f"none for {len(empty)} of {len(counts)} (the first is label {empty[0]})"
        raise InputError(message("fit_head", "batches", "images of every class", got))


# ---- cosine -----------------------------------------------------------------------------------------------------


class ClassSums:
    """Images per class ``counts [K]`` and sums of their features ``sums [K, F]``, in float64."""

    def __init__(self, features: int, num_classes: int, device: torch.device | str | None = None) -> None:
        self.counts = torch.zeros(num_classes, dtype=torch.float64, device=device)
        self.sums = torch.zeros(num_classes, features, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add images: features ``[b, F]``, labels ``[b]``."""
        self.counts += torch.bincount(labels, minlength=len(self.counts))
        self.sums.index_add_(0, labels, features.double())

    @torch.no_grad()
    def merge(self, other: Self) -> None:
        """Add another shard's images, of as many classes and features."""
        self.counts += other.counts
        self.sums += other.sums

    def add_classes(self, count: int) -> None:
        """Make room for ``count`` more classes, labelled after the present ones."""
        if count < 0:
            raise InputError(message(type(self).__name__, "count", "at least 0", count))
        self.counts = torch.cat([self.counts, self.counts.new_zeros(count)])
        self.sums = torch.cat([self.sums, self.sums.new_zeros(count, self.sums.shape[1])])


def _fit_cosine(whole: ClassSums, x: Tensor, y: Tensor) -> _Fit:
    """Class means of unit features; each row of ``x [m, F]`` is left out by taking it off its class's sum."""
    counts, sums = whole.counts.long(), whole.sums
    _require_every_class(counts)
    means = F.normalize(sums, dim=1)  # [K, F]
    x = x.double()
    scores = x @ means.T  # [m, K]
    own_score = (x * F.normalize(sums[y] - x, dim=1)).sum(1)
    # Nothing is left of a class of one image: the lowest cosine there is.
    own_score[counts[y] == 1] = -1.0
    scores.scatter_(1, y[:, None], own_score[:, None])
    return _Fit({"weight": means}, x.shape[1], counts, scores, y, {})


# ---- ridge ------------------------------------------------------------------------------------------------------


class RidgeAccumulator(ClassSums):
    """Everything ridge regression needs to know of a set of images: class counts, class sums and scatter matrix.

    Images can be added batch by batch, classes can be added, and accumulators of different shards merge into that of
    the whole. Sums are kept in float64 about the running mean, so nothing is lost to cancellation.

    Attributes:
        counts: ``[K]`` images per class. sums: ``[K, F]`` sums of features. scatter: ``[F, F]`` centred X'X, of which
        only the lower triangle is meaningful.
    """

    def __init__(self, features: int, num_classes: int, device: torch.device | str | None = None) -> None:
        super().__init__(features, num_classes, device)
        self.scatter = torch.zeros(features, features, dtype=torch.float64, device=device)

    @property
    def images(self) -> int:
        return int(self.counts.sum())

    @property
    def mean(self) -> Tensor:
        """Mean of the features ``[F]``."""
        return self.sums.sum(0) / self.counts.sum().clamp_min(1.0)

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add images: features ``[b, F]``, labels ``[b]``. Best in batches of about 1000.

        Raises:
            ShapeError, DtypeError, InputError: wrong width, labels out of range, features that are not finite.
        """
        num_classes, width = self.sums.shape
        if features.dim() != 2 or features.shape[1] != width:
            raise ShapeError(message("RidgeAccumulator", "features", f"[b, {width}]", list(features.shape)))
        _check_rows("RidgeAccumulator", features, labels, num_classes)
        if len(labels) == 0:
            return
        labels = labels.to(features.device, torch.long)
        total = features.sum(0, dtype=torch.float64)  # [F]
        centred = features - (total / len(labels)).to(features.dtype)
        self._add_scatter(len(labels), total, lambda i, j: centred[:, i:j].T @ centred[:, :j])
        super().update(features, labels)

    @torch.no_grad()
    def merge(self, other: Self) -> None:
        """Add another accumulator's images, as if they had been given to :meth:`update`."""
        if self.sums.shape != other.sums.shape:
            rule = f"of {self.sums.shape[0]} classes and {self.sums.shape[1]} features"
            got = f"{other.sums.shape[0]} and {other.sums.shape[1]}"
            raise ShapeError(message("RidgeAccumulator", "other", rule, got))
        if other.images:
            self._add_scatter(other.images, other.sums.sum(0), lambda i, j: other.scatter[i:j, :j])
            super().merge(other)

    @torch.no_grad()
    def solve(self, lam: float) -> tuple[Tensor, Tensor]:
        """Weight ``[K, F]`` and bias ``[K]`` (float64) of the regression of one-hot targets with penalty ``lam``.

        Raises:
            InputError: there are no images, or the penalised matrix is not positive definite (raise ``lam``).
        """
        if not self.images:
            raise InputError(message("RidgeAccumulator", "images", "added before solving", "none"))
        factor, failed = torch.linalg.cholesky_ex(self.penalised(lam, torch.float64))
        if int(failed):
            raise InputError(message("RidgeAccumulator", "lam", "large enough for a positive definite matrix", lam))
        return self.weights(factor)

    def penalised(self, lam: float, dtype: torch.dtype) -> Tensor:
        """Scatter + ``lam`` I ``[F, F]``, lower triangle."""
        matrix = self.scatter.to(dtype, copy=True)
        matrix.diagonal().add_(lam)
        return matrix

    def weights(self, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Weight ``[K, F]`` and bias ``[K]`` from a factor of the penalised scatter."""
        mean = self.mean
        cross = self.sums - self.counts[:, None] * mean  # [K, F] centred Y'X: the targets are one-hot
        weight = torch.cholesky_solve(cross.T.to(factor.dtype), factor).T.double()
        bias = self.counts / self.counts.sum() - weight @ mean
        return weight, bias

    def _add_scatter(self, theirs: int, total: Tensor, scatter: Callable[[int, int], Tensor]) -> None:
        """Add the scatter of ``theirs`` images more, whose features sum to ``total [F]``, before those are counted.

        ``scatter(i, j)`` gives rows i:j, columns :j of their scatter about their own mean.
        """
        ours = self.counts.sum()
        # The scatter of a union is the sum of both and of the two means about the common one.
        shift = (total / theirs - self.mean) * torch.sqrt(ours * theirs / (ours + theirs))  # [F]
        for i, j in _row_blocks(len(shift)):
            block = self.scatter[i:j, :j]
            block += scatter(i, j)
            block.addr_(shift[i:j], shift[:j])


def _row_blocks(rows: int, size: int = 256) -> Iterator[tuple[int, int]]:
    """Row ranges of a symmetric matrix: computing each only up to its diagonal block saves nearly half of the work."""
    return ((i, min(i + size, rows)) for i in range(0, rows, size))


@dataclass
class _Solution:
    """A ridge fit at one lambda: model and leave-one-out scores ``[m, K]``.

    ``slope`` has the sign of the derivative of the error by lambda; None where it would cost as much as the fit.
    """

    error: float
    slope: float | None
    exponent: int
    lam: float
    weights: Callable[[], tuple[Tensor, Tensor]]  # -> weight [K, F], or [K, n] of a kernel, and bias [K]
    loo_scores: Tensor

    def info(self, form: str) -> dict[str, Any]:
        """What a head tells of its fit."""
        relative = 10.0 ** (self.exponent / 2)
        return {"lambda": self.lam, "lambda_relative": relative, "loo_squared_error": self.error, "form": form}


def _fit_ridge(
    whole: RidgeAccumulator | None, x: Tensor, y: Tensor, num_classes: int, seed: int, loo_rows: int
) -> _Fit:
    """Few images: n x n kernel, exact leave-one-out of all. Many: F x F scatter, leave-one-out of a sample of ``x``."""
    counts = torch.bincount(y, minlength=num_classes) if whole is None else whole.counts.long()
    _require_every_class(counts)

    if whole is None:
        solve, scale = _dual_solver(x, y, counts)
    else:
        if len(y) > loo_rows:
            some = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:loo_rows].to(y.device)
            x, y = x[some], y[some]
        solve, scale = _primal_solver(whole, x, y)
    best = _best_lambda(solve, scale)
    weight, bias = best.weights()
    info = best.info("dual" if whole is None else "primal")
    return _Fit({"weight": weight, "bias": bias}, x.shape[1], counts, best.loo_scores, y, info)


def _fit_kernel(x: Tensor, y: Tensor, num_classes: int) -> _Fit:
    """Ridge regression in the space of the similarities' kernel; exact leave-one-out of all images."""
    counts = torch.bincount(y, minlength=num_classes)
    _require_every_class(counts)
    centre = x.mean(0, dtype=torch.float64).to(x.dtype)
    x = (x - centre).half().to(x.dtype)  # as a file keeps them
    norms = x.square().sum(1)
    if not math.isfinite(norms.sum(dtype=torch.float64).item()):
        raise InputError(message("fit_head", "features", "of a size below 65,504 for the kernel head", "others", SCALE))
    kernel = _own_distances(x, norms)  # [n, n], at first of distances
    unit = kernel.mean(dtype=torch.float64).item()
    rate = 1 / (KERNEL_WIDTH * unit) if unit > 0 else 1.0
    kernel.mul_(-rate).exp_()
    grid = LAMBDA_EXPONENTS
    if len(y) > KERNEL_SEARCH:  # lambda from some of the images: it hardly depends on their number
        some = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:KERNEL_SEARCH].to(y.device)
        found = _best_of_kernel(kernel[some][:, some], y[some], num_classes, grid)
        grid = range(found.exponent, found.exponent + 1)
    best = _best_of_kernel(kernel, y, num_classes, grid)
    weight, bias = best.weights()
    tensors = {"weight": weight, "bias": bias, "centre": centre, "rows": x, "norms": norms}
    tensors["rate"] = torch.tensor(rate, device=x.device)
    return _Fit(tensors, x.shape[1], counts, best.loo_scores, y, best.info("kernel"))


def _best_of_kernel(kernel: Tensor, y: Tensor, num_classes: int, grid: range) -> _Solution:
    """The best fit of a grid of lambdas to similarities ``[n, n]``, which become centred."""
    means = kernel.mean(0, dtype=torch.float64)  # [n]
    # Centred, so that the mean of the targets is not penalised.
    half = (means - means.mean() / 2).to(kernel.dtype)
    kernel.sub_(half).sub_(half[:, None])
    share = torch.bincount(y, minlength=num_classes).double() / len(y)

    def weights(dual: Tensor) -> tuple[Tensor, Tensor]:
        weight = dual.double().T  # [K, n]
        return weight, share - weight @ means

    scale = _lambda_scale(kernel.diagonal().mean(dtype=torch.float64).item(), means)
    start = min(max(KERNEL_START, grid[0]), grid[-1])
    return _best_lambda(_kernel_solver(kernel, y, share, scale, weights), scale, start, grid)


def _accumulate(sample: _Reservoir, width: int, num_classes: int, device: torch.device) -> RidgeAccumulator:
    """An accumulator of the rows in ``sample``, while those are all there have been."""
    whole = RidgeAccumulator(width, num_classes, device)
    if sample.seen:
        x, y = sample.rows()
        for i in range(0, len(y), CHUNK_ROWS):
            whole.update(x[i : i + CHUNK_ROWS], y[i : i + CHUNK_ROWS])
    return whole


Solver = Callable[[int, float], _Solution | None]  # exponent, lambda -> solution, if there is one in float64


def _best_lambda(solve: Solver, scale: float, start: int = 0, grid: range = LAMBDA_EXPONENTS) -> _Solution:
    """The grid's lambda with the least leave-one-out squared error: downhill from the exponent ``start``.

    The error is smooth and, but for odd cases, has one minimum, so walking from near where image features have theirs
    (lambda = scale, less for a kernel) until it rises finds it in two or three steps instead of the whole grid. Slopes
    tell which way to begin, and whether the minimum lies between the last two; where there are some, a long walk takes
    larger and larger steps, and goes back where it went too far.
    """

    def solve_at(exponent: int) -> _Solution | None:
        return solve(exponent, scale * 10.0 ** (exponent / 2))

    def walk(best: _Solution, way: int, longest: int = 8, limit: int | None = None) -> _Solution:
        """Downhill from ``best`` in the direction ``way``, up to before ``limit``."""
        steps = 0
        while True:
            step = 1 if best.slope is None else min(longest, max(1, 2 ** (steps - 1)))  # 1, 1, 2, 4
            exponent = min(max(best.exponent + way * step, grid[0]), grid[-1])
            if exponent in (best.exponent, limit):
                return best
            found = solve_at(exponent)
            passed = (
                found is None or not found.error < best.error or (found.slope is not None and found.slope * way > 0)
            )
            if passed and abs(exponent - best.exponent) > 1:
                best = walk(best, way, 1, exponent)
            if found is not None and found.error < best.error:
                best = found
            if passed:
                return best
            steps += 1

    middle = solve_at(start)
    if middle is None:  # of a kernel that is not positive semidefinite, by rounding of distances
        raise InputError(
            message("fit_head", "features", "of a size that leaves their distances exact", "others", SCALE)
        )
    if middle.slope is not None:
        return walk(middle, -1 if middle.slope > 0 else 1)
    up = walk(middle, 1)
    return up if up is not middle else walk(middle, -1)


def _cholesky(build: Callable[[torch.dtype], Tensor], condition: float) -> Tensor | None:
    """Cholesky factor of ``build(dtype)``, in float32 where ``condition`` allows it; None if not positive definite."""
    factor: Tensor
    for dtype in (torch.float32, torch.float64):
        if dtype == torch.float64 or condition <= FLOAT32_CONDITION:
            factor, failed = torch.linalg.cholesky_ex(build(dtype))
            if not int(failed):
                return factor
    return None


def _loo_scores(labels: Tensor, num_classes: int, residuals: Tensor, slack: Tensor) -> tuple[Tensor, float]:
    """Scores y - residual / (1 - h) and their squared error, for residuals ``[m, K]`` and slack = 1 - h ``[m]``."""
    loo = residuals / slack.clamp_min(1e-6)[:, None]
    error = loo.square().mean().item()
    return F.one_hot(labels, num_classes).to(loo.dtype) - loo, error


def _dual_solver(x: Tensor, labels: Tensor, counts: Tensor) -> tuple[Solver, float]:
    """Ridge by the n x n kernel of the centred rows ``x [n, F]``; also the unit of lambda (mean squared norm)."""
    n = len(x)
    mean = x.mean(0, dtype=torch.float64)  # [F]
    centred = x - mean.to(x.dtype)
    kernel = x.new_empty(n, n)  # lower triangle
    for i, j in _row_blocks(n):
        torch.mm(centred[i:j], centred[:j].T, out=kernel[i:j, :j])
    share = counts.double() / n  # [K]
    scale = _lambda_scale(kernel.diagonal().mean(dtype=torch.float64).item(), mean)

    def weights(dual: Tensor) -> tuple[Tensor, Tensor]:
        weight = (dual.to(centred.dtype).T @ centred).double()  # [K, F]
        return weight, share - weight @ mean

    return _kernel_solver(kernel, labels, share, scale, weights), scale


def _kernel_solver(
    kernel: Tensor, labels: Tensor, share: Tensor, scale: float, weights: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Solver:
    """Ridge by a centred kernel ``[n, n]`` (lower triangle); ``weights``: dual coefficients ``[n, K]`` -> the model."""
    n = len(kernel)
    targets = F.one_hot(labels, len(share)) - share  # [n, K]
    # The centred kernel K has the eigenvector 1 with eigenvalue 0, and 1 - h_i = lam [(K + lam I)^-1]_ii - 1/n. Adding
    # `lift` to that eigenvalue takes most of 1/n off before it is computed; what remains to subtract is lam / (lift n).
    lift = kernel.diagonal().sum(dtype=torch.float64).item() + scale

    def solve(exponent: int, lam: float) -> _Solution | None:
        def penalised(dtype: torch.dtype) -> Tensor:
            matrix = kernel.to(dtype) + lift / n
            matrix.diagonal().add_(lam)
            return matrix

        factor = _cholesky(penalised, lift / lam)
        if factor is None:
            return None
        inverse = torch.cholesky_inverse(factor)  # [n, n]
        slack = lam * inverse.diagonal() - lam / (n * (lift + lam))
        # The inverse is symmetric, with columns side by side in memory: from the left it is read several times faster.
        dual = (targets.T.to(inverse.dtype) @ inverse).T  # [n, K]
        scores, error = _loo_scores(labels, len(share), lam * dual, slack)
        # The error is the mean square of dual / gap, gap = slack / lam; A' = -A A for the inverse A.
        gap = slack / lam
        gap_slope = 1 / (n * (lift + lam) ** 2) - torch.linalg.vector_norm(inverse, dim=0).square()
        dual_slope = -(dual.T @ inverse).T
        slope = (dual * (dual_slope - dual * (gap_slope / gap)[:, None]) / gap[:, None].square()).sum().item()

        return _Solution(error, slope, exponent, lam, lambda: weights(dual), scores)

    return solve


def _primal_solver(whole: RidgeAccumulator, x: Tensor, labels: Tensor) -> tuple[Solver, float]:
    """Ridge by the F x F scatter; leave-one-out of the rows ``x [m, F]``, which are among the accumulated ones."""
    num_classes = len(whole.counts)
    mean, images = whole.mean, whole.images
    trace = whole.scatter.diagonal().sum().item()
    scale = _lambda_scale(trace / images, mean)
    centred = x - mean.to(x.dtype)  # [m, F]

    def solve(exponent: int, lam: float) -> _Solution | None:
        factor = _cholesky(lambda dtype: whole.penalised(lam, dtype), trace / lam)
        if factor is None:
            return None
        weight, bias = whole.weights(factor)
        half = torch.linalg.solve_triangular(factor, centred.T.to(factor.dtype), upper=False)  # [F, m]
        slack = 1.0 - 1.0 / images - half.square().sum(0).double()
        residuals = F.one_hot(labels, num_classes) - F.linear(x.double(), weight, bias)
        scores, error = _loo_scores(labels, num_classes, residuals, slack)
        return _Solution(error, None, exponent, lam, lambda: (weight, bias), scores)

    return solve, scale


def _lambda_scale(mean_square: float, mean: Tensor) -> float:
    """Mean squared norm of the centred features; 1 where they are constant but for rounding."""
    return mean_square if mean_square > 1e-12 * mean.square().sum().item() else 1.0


# ---- calibration ------------------------------------------------------------------------------------------------


def fit_temperature(scores: Tensor, labels: Tensor) -> tuple[float, float]:
    """The factor t > 0 for which softmax(t * scores) fits the labels best, and the NLL per image there.

    The negative log-likelihood is convex in t: Newton's method within a bracket. The targets are smoothed by 1/(m + 2),
    which changes nothing for many images and keeps t finite where the scores separate a few images perfectly.

    Args:
        scores: ``[m, K]``. labels: ``[m]``.
    """
    if len(labels) == 0:
        return INITIAL_TEMPERATURE, math.log(scores.shape[1])
    z = scores.double()
    z = z - z.mean(1, keepdim=True)  # [m, K]
    spread = z.square().mean().sqrt().item()
    if spread < 1e-12:
        return INITIAL_TEMPERATURE, math.log(scores.shape[1])
    z = z / spread
    own = z.gather(1, labels[:, None])[:, 0]  # [m]
    target = own.mean().item() * (1.0 - 1.0 / (len(labels) + 2))  # the mean score, 0, has the smoothing weight
    low, high, t = 1e-3, 1e3, 2.0
    for _ in range(50):
        p = torch.softmax(t * z, dim=1)
        first = (p * z).sum(1)  # [m]
        slope = first.mean().item() - target
        curvature = ((p * z.square()).sum(1) - first.square()).mean().item()
        low, high = (low, t) if slope > 0 else (t, high)
        step = t - slope / curvature if curvature > 0 else math.inf
        if not low < step < high:
            step = math.sqrt(low * high)
        converged = abs(step - t) < 1e-5 * t
        t = step
        if converged:
            break
    nll = (torch.logsumexp(t * z, dim=1) - t * own).mean().item()
    return t / spread, nll
