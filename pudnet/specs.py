"""What is generated: names, shapes and offsets of the weights of a target network.

Dimension letters, used alike in the whole package: B datasets in a batch, S images in a sketch, K classes, L generated
layers, G GRU layers, D hidden width (= code width), P generated parameters, R generator rows (sum of O * I over the
layers), h generator hidden width, n images, F features; O, I, kH, kW for one convolution kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from pudnet.errors import InputError, ShapeError, message

GENERATED_MODULES = (nn.Conv2d, nn.ConvTranspose2d)


@dataclass(frozen=True)
class GeneratedWeight:
    """One generated kernel: ``shape`` is as the module stores it (``[I, O, kH, kW]`` for transposed convolutions)."""

    name: str
    shape: tuple[int, int, int, int]
    offset: int
    fan_in: int
    aliases: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def spatial(self) -> int:
        return self.shape[2] * self.shape[3]

    @property
    def size(self) -> int:
        return self.rows * self.spatial


@dataclass(frozen=True)
class WeightLayout:
    """Where each generated weight lies in a flat row ``[P]``.

    Inside a weight the order is channels-last, ``[O, kH, kW, I]``: the order every backend can store in wide pieces and
    the one channels-last convolutions read. ``views`` gives each weight its usual shape ``[O, I, kH, kW]``, uncopied.
    """

    entries: tuple[GeneratedWeight, ...]

    @property
    def size(self) -> int:
        """P, the number of generated parameters."""
        return sum(entry.size for entry in self.entries)

    @property
    def rows(self) -> int:
        """R, the number of generator rows."""
        return sum(entry.rows for entry in self.entries)

    @property
    def shapes(self) -> list[int]:
        """The four sizes of every layer in one list, the form ops take."""
        return [size for entry in self.entries for size in entry.shape]

    @classmethod
    def from_module(cls, module: nn.Module) -> WeightLayout:
        """Lay out every convolution and transposed-convolution weight of ``module``, in order of its modules.

        A weight held by two modules is generated once; its other names are its ``aliases``.

        Raises:
            InputError: ``module`` has no 2-D convolution, one whose kernel is not a parameter, or lazy parameters.
        """
        where = "WeightLayout.from_module"
        for name, parameter in module.named_parameters():
            if isinstance(parameter, UninitializedParameter):
                rule, hint = "a module whose parameters have shapes", "Run a lazy module once."
                raise InputError(message(where, "module", rule, f"none yet at {name!r}", hint))
        entries: list[GeneratedWeight] = []
        names: dict[int, list[str]] = {}
        found: list[nn.Conv2d | nn.ConvTranspose2d] = []
        for prefix, child in module.named_modules():
            if isinstance(child, GENERATED_MODULES) and child.weight is not None:
                name = f"{prefix}.weight" if prefix else "weight"
                if "weight" not in child._parameters:
                    hint = "Remove the parametrization."
                    rule = "a module whose convolution kernels are plain parameters"
                    raise InputError(message(where, "module", rule, f"another kind at {name!r}", hint))
                if id(child.weight) not in names:
                    found.append(child)
                names.setdefault(id(child.weight), []).append(name)
        offset = 0
        for child in found:
            d0, d1, kh, kw = child.weight.shape
            name, *aliases = names[id(child.weight)]
            inputs = d0 // child.groups if isinstance(child, nn.ConvTranspose2d) else d1
            entries.append(GeneratedWeight(name, (d0, d1, kh, kw), offset, inputs * kh * kw, tuple(aliases)))
            offset += child.weight.numel()
        if not entries:
            rule = "a module with at least one Conv2d or ConvTranspose2d"
            raise InputError(message(where, "module", rule, type(module).__name__))
        return cls(tuple(entries))

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Name the parts of ``flat [P]`` or ``[B, P]``: ``{name: [O, I, kH, kW]}`` or ``{name: [B, O, I, kH, kW]}``."""
        if flat.shape[-1] != self.size:
            raise ShapeError(message("WeightLayout.views", "flat", f"[..., {self.size}]", list(flat.shape)))
        named = {}
        for entry in self.entries:
            o, i, kh, kw = entry.shape
            part = flat.narrow(-1, entry.offset, entry.size)
            named[entry.name] = part.unflatten(-1, (o, kh, kw, i)).movedim(-1, -3)  # [..., O, I, kH, kW]
        return named

    def flatten(self, weights: dict[str, Tensor]) -> Tensor:
        """The inverse of ``views`` (copies): ``{name: [..., O, I, kH, kW]}`` -> ``[..., P]``."""
        return torch.cat([weights[entry.name].movedim(-3, -1).flatten(-4) for entry in self.entries], dim=-1)
