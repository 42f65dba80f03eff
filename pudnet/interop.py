"""Reading parameters that other code saved: the released PudNet and GHN-2."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from pudnet.errors import CheckpointError, DtypeError, InputError, ShapeError, message
from pudnet.models.ghn import GHN
from pudnet.models.pudnet import PudNet
from pudnet.nn.embedding import CHANNELS
from pudnet.targets.unet import UNet

WHERE = "import_released_pudnet"
SHOWN = 5  # names listed in an error


class ReleasedPudNet:
    """The released PudNet for denoising: a hypernetwork and a U-Net.

    Attributes:
        net: the hypernetwork, in evaluation mode; ``net.target`` is the U-Net with its shared BatchNorms.
    """

    def __init__(self, net: PudNet) -> None:
        self.net = net

    @torch.no_grad()
    def run(self, images: Tensor | np.ndarray) -> dict[str, Any]:
        """Predict the U-Net's kernels from ``images`` and denoise the same images with it.

        Args:
            images: float ``[S, 3, H, W]`` of the imported image size, used as they are (no normalisation).

        Returns:
            ``embedding`` ``[G * D]`` (H_0 flattened), ``codes`` ``[L, D]``, ``kernels`` (a list of L tensors, each of
            the shape its layer stores: ``[O, I, kH, kW]``, ``[I, O, kH, kW]`` for transposed convolutions) and
            ``output`` ``[S, 3, H, W]``.

        Raises:
            ShapeError: the images have another shape, or there is none.
            DtypeError: the images are not of a floating dtype.
        """
        where, side = "ReleasedPudNet.run", self.net.config.image_size
        x = torch.as_tensor(images)
        if x.ndim != 4 or len(x) == 0 or tuple(x.shape[1:]) != (3, side, side):
            raise ShapeError(message(where, "images", f"[S, 3, {side}, {side}] with S > 0", list(x.shape)))
        if not x.is_floating_point():
            raise DtypeError(message(where, "images", "of a floating dtype", x.dtype))
        x = x.to(self.net.temperature)
        embedding = self.net.embedding(x, [len(x)])  # [1, G, D]
        codes = self.net.recurrence(embedding)  # [1, L, D]
        weights = self.net.layout.views(self.net.generators(codes)[0])
        return {
            "embedding": embedding.flatten(),
            "codes": codes[0],
            "kernels": list(weights.values()),
            "output": self.net.call(weights, x),
        }


@torch.no_grad()
def import_released_pudnet(state_dict: Mapping[str, Tensor | np.ndarray], *, alpha: float = 0.1) -> ReleasedPudNet:
    """Import parameters saved by the released PudNet code (image denoising) into this package's core.

    Widths, depths and the image size are read off the shapes, so any network of that format can be imported.

    Args:
        state_dict: tensors or arrays under the released names; the start vector is ``dec_in_for0`` ``[1, D]``.
        alpha: the share of the sketch mixed into every code, which the released code does not store.

    Raises:
        CheckpointError: names are missing or unknown, or shapes do not fit together; the message names them.
    """
    found = _as_tensors(state_dict)
    net = _build(found, alpha)
    _fill(_slots(net), found, WHERE, "a released PudNet")
    return ReleasedPudNet(net.eval())


def _as_tensors(state_dict: Mapping[str, Tensor | np.ndarray], where: str = WHERE) -> dict[str, Tensor]:
    found = {}
    for name, value in state_dict.items():
        try:
            found[name] = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        except (TypeError, ValueError) as error:
            got = f"{type(value).__name__} under {name!r}"
            raise CheckpointError(message(where, "state_dict", "of tensors or arrays of numbers", got)) from error
    return found


def _fill(slots: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str, what: str) -> None:
    """Copy every tensor of ``found`` into the slot of its name; refuse other names and shapes."""
    missing, unknown = sorted(slots.keys() - found.keys()), sorted(found.keys() - slots.keys())
    if missing or unknown:
        got = f"{len(missing)} missing [{_some(missing)}] and {len(unknown)} unknown [{_some(unknown)}]"
        raise CheckpointError(message(where, "state_dict", f"exactly the names of {what}", got))
    misfits = [
        f"{name} {list(found[name].shape)} instead of {list(slot.shape)}"
        for name, slot in slots.items()
        if found[name].shape != slot.shape
    ]
    if misfits:
        raise CheckpointError(message(where, "state_dict", "of shapes that fit together", _some(misfits)))
    for name, slot in slots.items():
        slot.copy_(found[name])


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _build(found: Mapping[str, Tensor], alpha: float) -> PudNet:
    """An untrained PudNet of the sizes that ``found`` shows."""

    def shape(name: str, ndim: int) -> list[int]:
        if name not in found:
            raise CheckpointError(message(WHERE, "state_dict", "a released PudNet", f"no {name!r}"))
        if found[name].ndim != ndim:
            rule = f"of {ndim} dimensions at {name!r}"
            raise CheckpointError(message(WHERE, "state_dict", rule, list(found[name].shape)))
        return list(found[name].shape)

    def last(pattern: str) -> int:
        return max((int(match[1]) for name in found if (match := re.fullmatch(pattern, name))), default=0)

    unet_width = shape("unet_enc.0.bn.norm.weight", 1)[0]
    unet_depth = last(r"unet_(?:enc|dec)\.(\d+)\.bn\.norm\.weight") // 2
    bottom = shape(f"unet_enc.{2 * unet_depth}.bn.norm.weight", 1)[0]
    layers = last(r"ahru\.rnn\.weight_ih_l(\d+)") + 1
    width = shape("ahru.rnn.weight_ih_l0", 2)[1]
    generator_width = shape("hyper_unet.0.conv1.0.weight", 4)[1]
    inputs = shape("denotmp.0.weight", 2)[1]
    side = math.isqrt(inputs // CHANNELS[-1])  # of the maps behind the sketch's three convolutions of stride 2
    image_size = 8 * side  # the only size of those with such maps that the U-Net can halve often enough
    if CHANNELS[-1] * side**2 != inputs or image_size % 2**unet_depth:
        rule = f"[.., {CHANNELS[-1]} * (H / 8)^2] at 'denotmp.0.weight', for an H that is a multiple of {2**unet_depth}"
        raise CheckpointError(message(WHERE, "state_dict", rule, f"[.., {inputs}]"))
    if bottom != unet_width * 2**unet_depth or not (unet_width and width and generator_width and side):
        rule = f"doubling from unet_enc.0 to unet_enc.{2 * unet_depth} and nowhere empty"
        raise CheckpointError(message(WHERE, "widths", rule, [unet_width, bottom, width, generator_width, inputs]))
    return PudNet(
        UNet(unet_width, unet_depth),
        preset="paper",
        image_size=image_size,
        sketch_size=image_size,
        layers=layers,
        width=width,
        generator_width=generator_width,
        alpha=alpha,
        mean=(0.0, 0.0, 0.0),  # the released network reads images as they are
        std=(1.0, 1.0, 1.0),
    )


def _slots(net: PudNet) -> dict[str, Tensor]:
    """Views of all parameters and buffers of ``net``, each under its released name and in its released shape."""
    unet, recurrence, generators = cast(UNet, net.target), net.recurrence, net.generators
    slots = {"temp": net.temperature, "dec_in_for0": recurrence.start[None]}

    def add(prefix: str, module: nn.Module) -> None:
        slots.update({f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()})

    for k, conv in enumerate(net.embedding.convs):
        add(f"denoise.{2 * k}", conv)
    add("denotmp.0", net.embedding.linear)
    add("denotmp.1", net.embedding.norm)
    for g in range(net.config.layers):
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            slots[f"ahru.rnn.{name}_l{g}"] = getattr(recurrence, name)[g]
    slots["ahru.fc_out.0.weight"], slots["ahru.fc_out.0.bias"] = recurrence.out_weight, recurrence.out_bias
    slots["ahru.ln_hid.weight"], slots["ahru.ln_hid.bias"] = recurrence.state_norm_weight, recurrence.state_norm_bias
    for part, norms in (("unet_enc", unet.encoder_norms), ("unet_dec", unet.decoder_norms)):
        for k, norm in enumerate(norms):
            add(f"{part}.{k}.bn.norm", norm)
    fc_start = row_start = 0
    for t, entry in enumerate(net.layout.entries):
        fc = slice(fc_start, fc_start + net.config.generator_width * entry.spatial)
        rows = slice(row_start, row_start + entry.rows)
        slots |= {
            f"lns.{t}.weight": recurrence.code_norm_weight[t],
            f"lns.{t}.bias": recurrence.code_norm_bias[t],
            f"hyper_unet.{t}.fc.0.weight": generators.fc_weight[fc],
            f"hyper_unet.{t}.fc.0.bias": generators.fc_bias[fc],
            f"hyper_unet.{t}.conv1.0.weight": generators.mix_weight[t, :, :, None, None],
            f"hyper_unet.{t}.conv1.0.bias": generators.mix_bias[t],
            f"hyper_unet.{t}.conv2.weight": generators.row_weight[rows, :, None, None],
            f"hyper_unet.{t}.conv2.bias": generators.row_bias[rows],
        }
        fc_start, row_start = fc.stop, rows.stop
    return slots


WHERE_GHN = "import_released_ghn2"


@torch.no_grad()
def import_released_ghn2(
    state_dict: Mapping[str, Tensor | np.ndarray],
    *,
    max_shape: tuple[int, int, int, int] = (64, 64, 11, 11),
    num_classes: int = 10,
) -> GHN:
    """Import parameters saved by the released GHN-2 code, in any of its variants (GHN-2, GHN-1, MLP).

    Which variant it is follows from the names: without ``gnn.mlp_ve`` there are no virtual edges, without ``ln`` no
    LayerNorm (and then, as released, no normalisation of weights).

    Args:
        state_dict: tensors or arrays under the released names.
        max_shape: largest block the decoder makes, (2D, 2D, s, s); for CIFAR-10 the released s is 11, for
            ImageNet 16.
        num_classes: of the dataset it was trained for.

    Returns:
        In evaluation mode, for inputs of 32x32 (s = 11) or 224x224.

    Raises:
        CheckpointError: names are missing or unknown, or shapes do not fit ``max_shape`` and ``num_classes``.
        InputError: ``max_shape`` is not of that form.
    """
    found = _as_tensors(state_dict, WHERE_GHN)
    double, same, largest, also = max_shape
    if double != same or largest != also or double % 8 or largest not in (11, 16):
        raise InputError(message(WHERE_GHN, "max_shape", "(2D, 2D, s, s) with s 11 or 16", max_shape))
    side = 32 if largest == 11 else 224
    ghn = GHN(
        width=double // 2,
        largest=largest,
        num_classes=num_classes,
        encoder="gnn" if any(name.startswith("gnn.gru.") for name in found) else "mlp",
        virtual_edges=50 if "gnn.mlp_ve.fc.0.weight" in found else 1,
        layer_norm="ln.weight" in found,
        normalise="ln.weight" in found,
        input_shape=(3, side, side),
    )
    _fill(_ghn_slots(ghn), found, WHERE_GHN, "a released GHN of this max_shape and num_classes")
    return ghn.eval()


def _ghn_slots(ghn: GHN) -> dict[str, Tensor]:
    """Views of all parameters of ``ghn``, each under its released name and in its released shape."""
    encoder, decoder = ghn.encoder, ghn.decoder
    slots = {
        "embed.weight": encoder.primitive_embedding,
        "shape_enc.embed_spatial.weight": encoder.kernel_embedding,
        "shape_enc.embed_channel.weight": encoder.channel_embedding,
        "decoder.fc.0.weight": decoder.fc_weight.view(-1, decoder.width),
        "decoder.fc.0.bias": decoder.fc_bias.view(-1),
        "decoder.conv.0.weight": decoder.mix_weight[:, :, None, None],
        "decoder.conv.0.bias": decoder.mix_bias,
        "decoder.conv.2.weight": decoder.block_weight.view(-1, 8 * decoder.width, 1, 1),
        "decoder.conv.2.bias": decoder.block_bias.view(-1),
        "decoder.class_layer_predictor.1.weight": decoder.class_weight[:, :, None, None],
        "decoder.class_layer_predictor.1.bias": decoder.class_bias,
        "decoder_1d.fc.0.weight": decoder.vector_in_weight,
        "decoder_1d.fc.0.bias": decoder.vector_in_bias,
        "decoder_1d.fc.2.weight": decoder.vector_out_weight.view(-1, 2 * decoder.width),
        "decoder_1d.fc.2.bias": decoder.vector_out_bias.view(-1),
        "bias_class.1.weight": decoder.class_vector_weight,
        "bias_class.1.bias": decoder.class_vector_bias,
    }
    if encoder.norm is not None:
        slots |= {"ln.weight": encoder.norm.weight, "ln.bias": encoder.norm.bias}
    if encoder.mlp is not None:
        slots |= {f"gnn.fc.{name}": tensor for name, tensor in encoder.mlp.named_parameters()}
    if (walk := encoder.walk) is not None:
        for kind, name in enumerate(("mlp", "mlp_ve")[: len(walk.message_in_weight)]):
            slots[f"gnn.{name}.fc.0.weight"] = walk.message_in_weight[kind]
            slots[f"gnn.{name}.fc.0.bias"] = walk.message_in_bias[kind]
            slots[f"gnn.{name}.fc.2.weight"] = walk.message_out_weight[kind]
            slots[f"gnn.{name}.fc.2.bias"] = walk.message_out_bias[kind]
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            slots[f"gnn.gru.{name}"] = getattr(walk, name)
    return slots
