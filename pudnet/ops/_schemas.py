"""Every operator ``torch.ops.pudnet.*``: its signature and its fake kernel, on one screen.

They exist whether the extension is there or not; the implementations are beside the public functions, in
``pudnet/ops/<op>.py``. Outputs are contiguous, in the fakes as in the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

torch.library.define(
    "pudnet::image_stats",
    "(Tensor images, Tensor labels, SymInt num_classes, float[] mean, float[] std) -> "
    "(Tensor sketch, Tensor channel_mean, Tensor channel_var, Tensor means, Tensor variances, Tensor counts)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "pudnet::class_stats",
    "(Tensor features, Tensor labels, SymInt num_classes) -> (Tensor means, Tensor variances, Tensor counts)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "pudnet::patch_covariance",
    "(Tensor images, Tensor labels, SymInt num_classes, int kernel_size, int padding) -> "
    "(Tensor means, Tensor covariances, Tensor counts)",
    tags=torch.Tag.pt2_compliant_tag,
)


def empty_image_stats(
    images: Tensor, labels: Tensor, num_classes: int, mean: list[float], std: list[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs of ``image_stats``, not filled."""
    n, height, width, channels = images.shape
    return (
        images.new_empty((n, channels, height, width), dtype=torch.float32),
        images.new_empty(channels, dtype=torch.float32),
        images.new_empty(channels, dtype=torch.float32),
        images.new_empty((num_classes, height * width * channels), dtype=torch.float32),
        images.new_empty((num_classes, height * width * channels), dtype=torch.float32),
        images.new_empty(num_classes, dtype=torch.int64),
    )


def empty_class_stats(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of ``class_stats``, not filled."""
    return (
        features.new_empty((num_classes, features.shape[1])),
        features.new_empty((num_classes, features.shape[1])),
        features.new_empty(num_classes, dtype=torch.int64),
    )


def empty_patch_covariance(
    images: Tensor, labels: Tensor, num_classes: int, kernel_size: int, padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of ``patch_covariance``, not filled."""
    batch, patch = images.shape[0], images.shape[2] * kernel_size**2
    return (
        images.new_empty((batch, num_classes, patch)),
        images.new_empty((batch, num_classes, patch, patch)),
        images.new_empty((batch, num_classes), dtype=torch.int64),
    )


torch.library.register_fake("pudnet::image_stats", empty_image_stats)
torch.library.register_fake("pudnet::class_stats", empty_class_stats)
torch.library.register_fake("pudnet::patch_covariance", empty_patch_covariance)

_GENERATOR_TENSORS = (
    "Tensor codes, Tensor fc_weight, Tensor fc_bias, Tensor mix_weight, Tensor mix_bias, "
    "Tensor row_weight, Tensor row_bias"
)
_RECURRENCE_TENSORS = (
    "Tensor state, Tensor start, Tensor weight_ih, Tensor weight_hh, Tensor bias_ih, Tensor bias_hh, "
    "Tensor out_weight, Tensor out_bias, Tensor state_norm_weight, Tensor state_norm_bias, "
    "Tensor code_norm_weight, Tensor code_norm_bias"
)
torch.library.define(
    "pudnet::generate_weights",
    f"({_GENERATOR_TENSORS}, int[] shapes, ScalarType dtype, str backend) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "pudnet::generate_weights_backward",
    f"(Tensor d_weights, {_GENERATOR_TENSORS}, int[] shapes, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
# What the gradient needs is kept only where `save` asks for it; the two tensors are empty otherwise.
torch.library.define(
    "pudnet::layer_recurrence",
    f"({_RECURRENCE_TENSORS}, float alpha, bool normalise_state, bool save) -> "
    "(Tensor codes, Tensor saved, Tensor saved_e)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "pudnet::layer_recurrence_native",  # forward only
    f"({_RECURRENCE_TENSORS}, float alpha, bool normalise_state) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "pudnet::layer_recurrence_backward",
    f"(Tensor d_codes, Tensor saved, Tensor saved_e, {_RECURRENCE_TENSORS}, float alpha, bool normalise_state) -> "
    f"({', '.join(['Tensor'] * 12)})",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("pudnet::generate_weights")
def empty_weights(
    codes: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    mix_weight: Tensor,
    mix_bias: Tensor,
    row_weight: Tensor,
    row_bias: Tensor,
    shapes: list[int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Output of ``generate_weights``, not filled."""
    size = sum(shapes[i] * shapes[i + 1] * shapes[i + 2] * shapes[i + 3] for i in range(0, len(shapes), 4))
    return codes.new_empty((codes.shape[0], size), dtype=dtype)


def _empty_gradients(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)


@torch.library.register_fake("pudnet::generate_weights_backward")
def _empty_generator_gradients(
    d_weights: Tensor,
    codes: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    mix_weight: Tensor,
    mix_bias: Tensor,
    row_weight: Tensor,
    row_bias: Tensor,
    shapes: list[int],
    backend: str,
) -> tuple[Tensor, ...]:
    return _empty_gradients((codes, fc_weight, fc_bias, mix_weight, mix_bias, row_weight, row_bias))


@torch.library.register_fake("pudnet::layer_recurrence")
def _empty_codes(
    state: Tensor,
    start: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    state_norm_weight: Tensor,
    state_norm_bias: Tensor,
    code_norm_weight: Tensor,
    code_norm_bias: Tensor,
    alpha: float,
    normalise_state: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, layers, width = state.shape
    steps = code_norm_weight.shape[0]
    kept = batch if save else 0
    return (
        state.new_empty((batch, steps, width)),
        state.new_empty((kept, steps, layers, 5, width), dtype=torch.float32),
        state.new_empty((kept, steps, width), dtype=torch.float32),
    )


@torch.library.register_fake("pudnet::layer_recurrence_backward")
def _empty_recurrence_gradients(
    d_codes: Tensor,
    saved: Tensor,
    saved_e: Tensor,
    state: Tensor,
    start: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    state_norm_weight: Tensor,
    state_norm_bias: Tensor,
    code_norm_weight: Tensor,
    code_norm_bias: Tensor,
    alpha: float,
    normalise_state: bool,
) -> tuple[Tensor, ...]:
    parameters = (start, weight_ih, weight_hh, bias_ih, bias_hh, out_weight, out_bias, state_norm_weight)
    return _empty_gradients((state, *parameters, state_norm_bias, code_norm_weight, code_norm_bias))


@torch.library.register_fake("pudnet::layer_recurrence_native")
def _empty_native_codes(*arguments: Any) -> Tensor:
    state, code_norm_weight = arguments[0], arguments[10]
    codes: Tensor = state.new_empty((state.shape[0], code_norm_weight.shape[0], state.shape[2]))
    return codes


_GRAPH_PARAMETERS = (
    "Tensor message_in_weight, Tensor message_in_bias, Tensor message_out_weight, Tensor message_out_bias, "
    "Tensor weight_ih, Tensor weight_hh"
)
_GRAPH = f"Tensor states, Tensor edges, int[] level_sizes, {_GRAPH_PARAMETERS}"
# As for layer_recurrence: `saved` is empty without `save`.
torch.library.define(
    "pudnet::graph_recurrence",
    f"({_GRAPH}, Tensor bias_ih, Tensor bias_hh, bool save) -> (Tensor states, Tensor saved)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "pudnet::graph_recurrence_native",  # forward only
    f"({_GRAPH}, Tensor bias_ih, Tensor bias_hh) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "pudnet::graph_recurrence_backward",
    f"(Tensor d_out, Tensor out, Tensor saved, {_GRAPH}) -> ({', '.join(['Tensor'] * 9)})",
    tags=torch.Tag.pt2_compliant_tag,
)
# `sizes`: O, I of each target; `shapes`: S, o, i, O, I of each.
torch.library.define(
    "pudnet::tile_weights",
    "(Tensor[] blocks, float[] scales, SymInt[] sizes, str backend) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "pudnet::tile_weights_out",
    "(Tensor[] blocks, float[] scales, SymInt[] sizes, Tensor(a!)[] targets, str backend) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "pudnet::tile_weights_backward",
    "(Tensor d_out, float[] scales, SymInt[] shapes, str backend) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("pudnet::graph_recurrence")
def _empty_states(states: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    nodes, width = states.shape
    return states.new_empty((nodes, width)), states.new_empty((nodes if rest[-1] else 0, 5, width))


@torch.library.register_fake("pudnet::graph_recurrence_native")
def _empty_native_states(states: Tensor, *rest: Any) -> Tensor:
    return states.new_empty(states.shape)


@torch.library.register_fake("pudnet::graph_recurrence_backward")
def _empty_graph_gradients(
    d_out: Tensor, out: Tensor, saved: Tensor, states: Tensor, edges: Tensor, level_sizes: list[int], *maps: Tensor
) -> tuple[Tensor, ...]:
    weight_ih, weight_hh = maps[4:]
    return _empty_gradients((states, *maps, weight_ih[:, 0], weight_hh[:, 0]))


@torch.library.register_fake("pudnet::tile_weights")
def empty_tiles(blocks: list[Tensor], scales: list[float], sizes: list[int], backend: str) -> Tensor:
    """Output of ``tile_weights``, not filled."""
    outs, inputs = sizes[::2], sizes[1::2]
    return blocks[0].new_empty(sum(o * i * block.shape[0] for o, i, block in zip(outs, inputs, blocks, strict=True)))


@torch.library.register_fake("pudnet::tile_weights_out")
def _write_nothing(*arguments: Any) -> None:
    pass


@torch.library.register_fake("pudnet::tile_weights_backward")
def _empty_block_gradients(d_out: Tensor, scales: list[float], shapes: list[int], backend: str) -> Tensor:
    return d_out.new_empty(sum(shapes[k] * shapes[k + 1] * shapes[k + 2] for k in range(0, len(shapes), 5)))
