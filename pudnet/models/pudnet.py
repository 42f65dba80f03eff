"""PudNet: a dataset in, all convolution weights of a network out (arXiv 2310.11862).

``PudNet.forward`` is the data path; each line is one stage, in the file of its name.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet import bind, checkpoint, hub
from pudnet.checkpoint import HubOptions
from pudnet.data.preprocess import Preprocess, uint8_batch
from pudnet.directions import Trial, fisher_directions, insert_directions, require_plain, try_directions
from pudnet.errors import CheckpointError, InputError, message, one_line
from pudnet.nn.embedding import DatasetEmbedding
from pudnet.nn.generators import WeightGenerators
from pudnet.nn.recurrence import LayerRecurrence
from pudnet.sketch import Sketch
from pudnet.specs import WeightLayout
from pudnet.targets import build_target

T = TypeVar("T")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, the field's usual constants
LARGEST_SKETCH_SIDE = 64  # by default
DIRECTION_IMAGES, CLASS_IMAGES = 500, 4  # of a sketch, directions come from so many images, or so many of each class
LIMITS = {"sketch_size": 256, "layers": 64, "width": 2**16, "generator_width": 2**16}  # of what a checkpoint may ask


@dataclass(frozen=True)
class PudNetConfig:
    """Everything that determines a PudNet but its target: saved with every checkpoint.

    Attributes:
        image_size: side of the target network's square input images.
        sketch_size: side at which the embedding sees them.
        recurrence: ``"ahru"`` or ``"gru"``.
        embedding_norm: ``"batch"`` (the published core) or ``"layer"``.
        layers: G, GRU layers.
        width: D, hidden and code width.
        generator_width: h.
        alpha: share of the dataset embedding mixed into every code.
        directions: for the last convolutions, which read each other and the very last one last, how many pairs of
            kernels give way to Fisher directions of what the convolution reads (``pudnet.directions``), where a sketch
            has labels and they help.
        conditioned: False: the embedding sees blank images, so that the generated weights are the same for all
            datasets; what conditioning is compared with.
        mean, std: normalisation of images in 0..1, for sketch, network and baselines alike.
    """

    image_size: int
    sketch_size: int
    recurrence: str = "ahru"
    embedding_norm: str = "layer"
    layers: int = 2
    width: int = 128
    generator_width: int = 8
    alpha: float = 0.1
    directions: tuple[int, ...] = ()
    conditioned: bool = True
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD

    def __post_init__(self) -> None:
        for name in ("image_size", "sketch_size", "layers", "width", "generator_width"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(message("PudNet", name, "an integer of at least 1", repr(value)))
        for name, most in LIMITS.items():
            if getattr(self, name) > most:
                raise InputError(message("PudNet", name, f"at most {most}", getattr(self, name)))
        if not isinstance(self.alpha, (int, float)) or not 0 <= self.alpha <= 1:
            raise InputError(message("PudNet", "alpha", "a number from 0 to 1", repr(self.alpha)))
        if not isinstance(self.conditioned, bool):
            raise InputError(message("PudNet", "conditioned", "true or false", repr(self.conditioned)))
        counts = self.directions
        if not isinstance(counts, (list, tuple)) or not all(type(count) is int and count >= 0 for count in counts):
            raise InputError(message("PudNet", "directions", "a list of integers of at least 0", repr(counts)))
        object.__setattr__(self, "directions", tuple(counts))
        usual = Preprocess(
            self.image_size, self.mean, self.std
        )  # checks them, and makes tuples of a checkpoint's lists
        object.__setattr__(self, "mean", usual.mean)
        object.__setattr__(self, "std", usual.std)


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"embedding_norm": "batch"},
}

Images = Any  # uint8 NHWC array or tensor, or Sketch


class PudNet(hub.Shared, nn.Module):
    """A hypernetwork for one target network.

    Args:
        target: a name (``pudnet.targets.TARGETS``) or any ``nn.Module`` with 2-D convolutions; it is copied, never
            edited. Its convolution weights are generated; everything else is learned and shared by all datasets.
        preset: ``"default"``, or ``"paper"``: the released core.
        image_size: side of the target's input images; needed where ``target`` is a module.
        seed: of the initial parameters.
        options: other fields of ``PudNetConfig``.

    Raises:
        InputError: an unknown name, preset or option, or a target without convolutions.
    """

    def __init__(
        self,
        target: str | nn.Module,
        preset: str = "default",
        *,
        image_size: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        if preset not in PRESETS:
            raise InputError(message("PudNet", "preset", f"one of {sorted(PRESETS)}", repr(preset)))
        known = {field.name for field in dataclasses.fields(PudNetConfig)}
        if unknown := sorted(set(options) - known):
            raise InputError(message("PudNet", "options", f"among {sorted(known)}", unknown))
        self.target_name = target if isinstance(target, str) else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if isinstance(target, str):
                module, usual_size = build_target(target)
                image_size = image_size or usual_size
            elif isinstance(target, nn.Module):
                module = target
            else:
                raise InputError(message("PudNet", "target", "a name or an nn.Module", repr(target)))
            if image_size is None:
                raise InputError(message("PudNet", "image_size", "given for a target that is a module", None))
            settings = {"sketch_size": min(image_size, LARGEST_SKETCH_SIDE), **PRESETS[preset], **options}
            config = PudNetConfig(image_size=image_size, **settings)
            self.config = config
            self.preprocess = Preprocess(config.image_size, config.mean, config.std)
            self.layout = WeightLayout.from_module(module)
            self._check_directions(module)
            self.embedding = DatasetEmbedding(
                config.sketch_size, config.layers, config.width, config.embedding_norm, config.conditioned
            )
            self.recurrence = LayerRecurrence(
                len(self.layout.entries), config.layers, config.width, config.recurrence, config.alpha
            )
            self.generators = WeightGenerators(self.layout, config.width, config.generator_width)
            if not self.generators.row_weight.is_meta:  # a checkpoint that is being loaded has its scale
                self._scale_generators()
        self.target = bind.strip(module, self.layout)
        self.temperature = nn.Parameter(torch.tensor(10.0))  # of the cosine classifier
        self.card: dict[str, Any] = {}  # how the checkpoint was made, where it came from one

    def _directed(self, module: nn.Module) -> dict[str, nn.Module]:
        """The convolutions that take directions, by the names of their weights."""
        counts = self.config.directions
        names = [entry.name for entry in self.layout.entries][-len(counts) :] if counts else []
        return {name: module.get_submodule(name.rpartition(".")[0]) for name in names}

    def _check_directions(self, module: nn.Module) -> None:
        found, counts = self._directed(module), self.config.directions
        if len(found) < len(counts):
            raise InputError(message("PudNet", "directions", f"at most {len(found)} long, as layers", len(counts)))
        for conv, count in zip(found.values(), counts, strict=True):
            require_plain("PudNet", conv, count)

    @torch.no_grad()
    def _scale_generators(self) -> None:
        """Set the initial variance of the weights for codes as noise makes them.

        Before training a layer's codes are nearly the same for every dataset, one draw each: scaled for standard-normal
        codes, some layers would start at a twentieth of the variance they should have.
        """
        sketches, side = [4] * 64, self.config.sketch_size
        noise = torch.randn(sum(sketches), 3, side, side)
        embedding = copy.deepcopy(self.embedding)(noise, sketches)  # a copy: BatchNorm would remember the noise
        self.generators.scale_to_fan_in(self.recurrence(embedding))

    def forward(self, images: Tensor, counts: Sequence[int]) -> Tensor:
        """Images of B sketches to flat weights: ``[sum(counts), 3, H, W]``, normalised -> ``[B, P]``."""
        embedding = self.embedding(self._to_sketch_size(images), list(counts))  # [B, G, D]
        codes = self.recurrence(embedding)  # [B, L, D]
        return self.generators(codes)  # [B, P]

    def _to_sketch_size(self, images: Tensor) -> Tensor:
        side = self.config.sketch_size
        if images.shape[-1] == side:
            return images
        return F.interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)

    def generate(self, images: Images | Sequence[Images]) -> dict[str, Tensor]:
        """Predict the weights for one dataset or several; differentiable in the hypernetwork's parameters.

        Args:
            images: uint8 ``[S, H, W, C]`` (array or tensor, any size, one, three or four channels), a ``Sketch``, or a
                list of these.

        Returns:
            ``{parameter name: [O, I, kH, kW]}``; for a list of B, ``{parameter name: [B, O, I, kH, kW]}``.

        Raises:
            InputError: no image, or a single one where the embedding's BatchNorm is in training mode.
            ShapeError, DtypeError: the images are not as said above.
        """
        flat = self(*self._prepared(images))  # [B, P]
        return self.layout.views(flat if isinstance(images, (list, tuple)) else flat[0])

    def embed(self, images: Images | Sequence[Images]) -> Tensor:
        """Embed one dataset or several, given as to ``generate``: ``[G, D]``; for a list of B ``[B, G, D]``."""
        pixels, counts = self._prepared(images)
        found: Tensor = self.embedding(self._to_sketch_size(pixels), counts)
        return found if isinstance(images, (list, tuple)) else found[0]

    def image_embeddings(self, images: Tensor) -> Tensor:
        """Embeddings of single images, whose mean is their dataset's: normalised ``[n, 3, H, W] -> [n, G * D]``."""
        found: Tensor = self.embedding.image_features(self._to_sketch_size(images))
        return found

    def _prepared(self, images: Images | Sequence[Images]) -> tuple[Tensor, list[int]]:
        """Normalised images of all sketches ``[n, 3, H, W]``, and how many each sketch has."""
        sketches = list(images) if isinstance(images, (list, tuple)) else [images]
        if not sketches:
            raise InputError(message("PudNet.generate", "images", "at least one sketch", "an empty list"))
        where, device = "PudNet.generate", self.temperature.device
        prepared = [self.preprocess(self._sketch_images(one)).to(device) for one in sketches]
        counts = [len(part) for part in prepared]
        if self.training and self.config.embedding_norm == "batch" and sum(counts) < 2:
            hint = "Call net.eval() first, or give more images."
            raise InputError(message(where, "images", "two or more while the net is in training mode", 1, hint))
        return torch.cat(prepared), counts

    @staticmethod
    def _sketch_images(images: Images) -> Tensor:
        found = images.images if isinstance(images, Sketch) else uint8_batch(images, "PudNet.generate")
        if len(found) == 0:
            raise InputError(message("PudNet.generate", "images", "at least one image a sketch", "an empty one"))
        return found

    @torch.no_grad()
    def try_target(self, run: Callable[[nn.Module, Tensor], T]) -> T:
        """Run the target network on blank images, to refuse now what could not read any.

        Args:
            run: called with the target, its generated weights zero, in eval mode, and images ``[2, 3, H, W]``.

        Returns:
            What ``run`` returns.

        Raises:
            InputError: the target cannot read RGB images of ``image_size``.
        """
        device, side = self.temperature.device, self.config.image_size
        network = self.materialise(self.layout.views(torch.zeros(self.layout.size, device=device))).eval()
        try:
            return run(network, torch.zeros(2, 3, side, side, device=device))
        except InputError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            got = f"{type(self.target).__name__} ({' '.join(str(error).split())})"
            rule = f"a network that reads float32 images [n, 3, {side}, {side}]"
            hint = "Grey images become three equal channels."
            raise InputError(message("PudNet", "target", rule, got, hint)) from error

    def call(self, weights: Mapping[str, Tensor], x: Tensor, method: bind.Method = "forward") -> Any:
        """Run the target network with ``weights`` on normalised images ``x [n, 3, H, W]``."""
        return bind.call(self.target, self.layout, weights, x, method)

    def materialise(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """The target network as an ordinary module that holds ``weights``."""
        return bind.materialise(self.target, self.layout, weights)

    def network(self, sketch: Sketch) -> nn.Module:
        """The target network for a dataset, as a plain module: generated weights, and directions where they help."""
        network = self.materialise(self.generate(sketch))
        self.insert_directions(network, sketch)
        return network

    @torch.no_grad()
    def insert_directions(self, network: nn.Module, sketch: Sketch) -> Trial:
        """Put the dataset's own directions into a network that has its generated weights, in place, where they help.

        The directions of one half of the sketch are tried on the other (``pudnet.directions.try_directions``). Nothing
        happens where the sketch has no labels, or those of one class only.

        Returns:
            The trial: whether directions were put in, and how they flatter the images that they were made from.
        """
        classes = 0 if sketch.labels is None else len(sketch.labels.unique())
        if not any(self.config.directions) or sketch.labels is None or classes < 2:
            return Trial(False)
        device = self.temperature.device
        order = torch.randperm(len(sketch.images), generator=torch.Generator().manual_seed(0))
        some = order[: max(DIRECTION_IMAGES, CLASS_IMAGES * classes)]
        images = self.preprocess(sketch.images[some]).to(device).contiguous(memory_format=torch.channels_last)
        labels = sketch.labels[some].to(device)
        trial = try_directions(network, images, labels, self._insert)
        if trial.helps:
            self._insert(network, images, labels)
        return trial

    def with_directions(self, weights: Mapping[str, Tensor], images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Weights of one dataset with its directions put in, whether they help or not; differentiable in the others.

        Args:
            images: normalised ``[n, 3, H, W]``.
            labels: int64 ``[n]``, of two classes or more.
        """
        network = self.materialise({name: weight.detach() for name, weight in weights.items()})
        made = dict(weights)
        for name, (kept, read) in self._insert(network, images, labels).items():
            inserted = network.get_parameter(name).detach()
            ignored = inserted.shape[1] - read
            made[name] = torch.cat([F.pad(weights[name][:kept, :read], (0, 0, 0, 0, 0, ignored)), inserted[kept:]])
        return made

    def _insert(self, network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, tuple[int, int]]:
        """Insert into ``network``; what ``pudnet.directions.insert_directions`` returns, by the names of weights."""
        counts = self.config.directions
        if not any(counts):
            return {}
        convs = self._directed(network)
        pairs = dict(zip(convs.values(), counts, strict=True))
        made = insert_directions(
            network, images, pairs, lambda x, count, size: fisher_directions(x, labels, count, size)
        )
        return {name: made[conv] for name, conv in convs.items() if conv in made}

    def save(self, path: str | os.PathLike[str], *, card: Mapping[str, Any] | None = None, half: bool = False) -> None:
        """Write a checkpoint that ``PudNet.load`` reads.

        Args:
            card: anything JSON-able about how it was made.
            half: store float16 (half the size; about three decimal digits).
        """
        config = {
            "target": self.target_name,
            "pudnet": dataclasses.asdict(self.config),
            "card": dict(self.card if card is None else card),
        }
        tensors = {
            name: tensor.half() if half and tensor.is_floating_point() else tensor
            for name, tensor in self.state_dict().items()
        }
        checkpoint.save(path, "predictor", config, tensors)

    def card_parts(self, name: str) -> dict[str, Any]:
        """See ``pudnet.hub.Shared``."""
        kind = "A hypernetwork: a sample of a dataset in, the convolution weights of a network for it out."
        usage = 'predictor = pudnet.Predictor.from_pretrained({name})\nmodel = predictor.predict("flowers/")'
        config = {"target": self.target_name or "a module of the author's", **dataclasses.asdict(self.config)}
        return hub.hypernetwork_card(name, kind, usage, config, self.card)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        target: nn.Module | None = None,
        device: str | torch.device | None = None,
        **options: Unpack[HubOptions],
    ) -> PudNet:
        """Load a trained hypernetwork: a file or folder, a bundled name, or a Hub id, in this order.

        Args:
            target: see ``load``.
            device: where it goes; None for the CPU.
            options: of huggingface_hub, for a repository: revision, cache_dir, local_files_only, force_download, token.

        Raises:
            InputError: there is no such file, name or repository. CheckpointError: it is not a PudNet that fits.
        """
        net = cls.load(checkpoint.find(name, "PudNet.from_pretrained", **options), target=target)
        return net if device is None else net.to(device)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, target: nn.Module | None = None) -> PudNet:
        """Read a checkpoint written by ``save``, in evaluation mode.

        Args:
            target: the target network, where it was a module and not a name.

        Raises:
            CheckpointError: the file is not a checkpoint of this version, or does not fit ``target``.
        """
        config, tensors = checkpoint.load(path, "predictor")
        where = "PudNet.load"
        name = config.get("target")
        if name is None and target is None:
            raise CheckpointError(message(where, "target", "the module the checkpoint was made for", None))
        try:
            with checkpoint.without_memory():
                net = cls(str(name) if target is None else target, **config["pudnet"])
            net.target_name = name
            checkpoint.fill(net, tensors)
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            hint = "It was made for another target network or another version."
            raise CheckpointError(
                message(where, "path", "a checkpoint that fits", f"{str(path)!r} ({one_line(error)})", hint)
            ) from error
        net.card = config.get("card", {})
        return net.eval()
