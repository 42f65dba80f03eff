"""The plain-PyTorch meaning of every op: the oracle of the tests, the CPU path, and the input of torch.compile."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pudnet.errors import InputError, ShapeError, message


def layer_recurrence(
    state: Tensor,  # [B, G, D] H_0, the dataset embedding
    start: Tensor,  # [D] e_0
    weight_ih: Tensor,  # [G, 3D, D] gates r, z, n as in torch.nn.GRU
    weight_hh: Tensor,  # [G, 3D, D]
    bias_ih: Tensor,  # [G, 3D]
    bias_hh: Tensor,  # [G, 3D]
    out_weight: Tensor,  # [D, D]
    out_bias: Tensor,  # [D]
    state_norm_weight: Tensor,  # [D]
    state_norm_bias: Tensor,  # [D]
    code_norm_weight: Tensor,  # [L, D]
    code_norm_bias: Tensor,  # [L, D]
    alpha: float,
    normalise_state: bool,
) -> Tensor:  # codes [B, L, D]
    """Walk the layers of the target network: the adaptive hyper-recurrent unit (PudNet, section on AHRU).

    For t = 1..L: (o_t, H_t) = GRU(e_{t-1}, H_{t-1}); e_t = ReLU(W o_t + b); H_t <- LayerNorm(H_t) where
    ``normalise_state``; c_t = LayerNorm_t((1 - alpha) e_t + alpha mean_G(H_0)).
    """
    batch, layers, width = state.shape
    pooled = state.mean(dim=1)  # [B, D]
    hidden = list(state.unbind(dim=1))  # G x [B, D]
    e = start.expand(batch, width)  # [B, D]
    codes = []
    for t in range(code_norm_weight.shape[0]):
        x = e
        for g in range(layers):
            gates_x = F.linear(x, weight_ih[g], bias_ih[g])  # [B, 3D]
            gates_h = F.linear(hidden[g], weight_hh[g], bias_hh[g])  # [B, 3D]
            rx, zx, nx = gates_x.chunk(3, dim=-1)
            rh, zh, nh = gates_h.chunk(3, dim=-1)
            r, z = torch.sigmoid(rx + rh), torch.sigmoid(zx + zh)
            candidate = torch.tanh(nx + r * nh)
            x = (1 - z) * candidate + z * hidden[g]
            hidden[g] = x
        e = F.relu(F.linear(x, out_weight, out_bias))
        if normalise_state:
            hidden = [F.layer_norm(part, (width,), state_norm_weight, state_norm_bias) for part in hidden]
        mixed = (1 - alpha) * e + alpha * pooled
        codes.append(F.layer_norm(mixed, (width,), code_norm_weight[t], code_norm_bias[t]))
    return torch.stack(codes, dim=1)


def generate_weights(
    codes: Tensor,  # [B, L, D]
    fc_weight: Tensor,  # [sum over layers of h * kH * kW, D]
    fc_bias: Tensor,  # [the same]
    mix_weight: Tensor,  # [L, 2h, h]
    mix_bias: Tensor,  # [L, 2h]
    row_weight: Tensor,  # [R, 2h]
    row_bias: Tensor,  # [R]
    shapes: list[int],  # O, I, kH, kW of each layer
    dtype: torch.dtype | None = None,  # of the result, by default that of the codes
) -> Tensor:  # [B, P], each layer in channels-last order [O, kH, kW, I]
    """Turn each layer's code into its kernel (PudNet, weight generator).

    Layer t: Linear D -> h * kH * kW, GELU; 1x1 h -> 2h, GELU; 1x1 2h -> O * I, where a 1x1 map acts at every position
    of the kernel alike. The parameters are taken in the dtype of the codes.
    """
    fc_weight, fc_bias, mix_weight, mix_bias, row_weight, row_bias = (
        x.to(codes.dtype) for x in (fc_weight, fc_bias, mix_weight, mix_bias, row_weight, row_bias)
    )
    batch = codes.shape[0]
    hidden = mix_weight.shape[2]
    parts = []
    fc_start = row_start = 0
    for t in range(codes.shape[1]):
        o, i, kh, kw = shapes[4 * t : 4 * t + 4]
        fc_size, rows = hidden * kh * kw, o * i
        fc = slice(fc_start, fc_start + fc_size)
        feature = F.gelu(F.linear(codes[:, t], fc_weight[fc], fc_bias[fc]))  # [B, h * kH * kW]
        feature = feature.view(batch, hidden, kh * kw)
        feature = F.gelu(mix_weight[t] @ feature + mix_bias[t, :, None])  # [B, 2h, kH * kW]
        row = slice(row_start, row_start + rows)
        kernel = feature.transpose(1, 2) @ row_weight[row].t() + row_bias[row]  # [B, kH * kW, O * I]
        kernel = kernel.view(batch, kh * kw, o, i).transpose(1, 2)  # [B, O, kH * kW, I]
        parts.append(kernel.reshape(batch, rows * kh * kw))
        fc_start += fc_size
        row_start += rows
    return torch.cat(parts, dim=1).to(dtype or codes.dtype)


def graph_recurrence(
    states: Tensor,  # [N, D] nodes level by level: every edge leads from an earlier level to a later one
    edges: Tensor,  # [V, N, N] weight of the edge into row from column, for each of V kinds of edge; 0 for none
    level_sizes: list[int],  # nodes of each level
    message_in_weight: Tensor,  # [V, M, D] one two-layer MLP for each kind of edge
    message_in_bias: Tensor,  # [V, M]
    message_out_weight: Tensor,  # [V, D, M]
    message_out_bias: Tensor,  # [V, D]
    weight_ih: Tensor,  # [3D, D] gates r, z, n as in torch.nn.GRUCell
    weight_hh: Tensor,  # [3D, D]
    bias_ih: Tensor,  # [3D]
    bias_hh: Tensor,  # [3D]
) -> Tensor:  # [N, D]
    """Gated message passing in topological order (GHN-2, gated graph network): one traversal.

    Level by level: m_v = sum over kinds k and nodes u of edges[k, v, u] MLP_k(h_u), with the new states of earlier
    levels; h_v <- GRUCell(m_v, h_v). A node without predecessors passes the cell with m = 0. MLP: ReLU after both.
    """
    kinds, _, width = message_in_weight.shape
    sent = states.new_zeros(kinds, 0, width)  # [V, p, D] messages of the p nodes visited so far
    visited = []
    start = 0
    for size in level_sizes:
        stop = start + size
        incoming = torch.bmm(edges[:, start:stop, :start], sent).sum(dim=0)  # [size, D]
        hidden = states[start:stop]
        rx, zx, nx = F.linear(incoming, weight_ih, bias_ih).chunk(3, dim=-1)
        rh, zh, nh = F.linear(hidden, weight_hh, bias_hh).chunk(3, dim=-1)
        r, z = torch.sigmoid(rx + rh), torch.sigmoid(zx + zh)
        candidate = torch.tanh(nx + r * nh)
        hidden = (1 - z) * candidate + z * hidden
        visited.append(hidden)
        if stop < len(states):
            inner = F.relu(hidden @ message_in_weight.transpose(1, 2) + message_in_bias[:, None])  # [V, size, M]
            outer = F.relu(inner @ message_out_weight.transpose(1, 2) + message_out_bias[:, None])  # [V, size, D]
            sent = torch.cat([sent, outer], dim=1)
        start = stop
    return torch.cat(visited)


def tile_weights(
    blocks: list[Tensor],  # each [kH * kW, o, i]
    scales: list[float],
    sizes: list[tuple[int, int]],  # O, I of each target
    targets: list[Tensor] | None = None,  # where to write; each of O * I * kH * kW elements
) -> list[Tensor]:  # targets, or each [O, I, kH * kW]
    """Fill targets with repeated blocks (GHN-2, decoder): target[a, b, k] = scale * block[k, a mod o, b mod i]."""
    tiles = []
    for k, (block, scale, (out, inputs)) in enumerate(zip(blocks, scales, sizes, strict=True)):
        _, rows, columns = block.shape
        kernel = (block * scale).permute(1, 2, 0)[:out, :inputs]  # [o, i, kH * kW]
        repeats = (-(-out // rows), -(-inputs // columns), 1)
        tile = kernel.repeat(repeats)[:out, :inputs]
        if targets is not None and targets[k].numel() != tile.numel():
            rule = f"{out} x {inputs} x {block.shape[0]} elements"
            raise ShapeError(message("tile_weights", "targets", rule, list(targets[k].shape)))
        tiles.append(tile if targets is None else targets[k].copy_(tile.reshape(targets[k].shape)))
    return tiles


def _index_by_class(op: str, labels: Tensor, num_classes: int) -> Tensor:
    """Labels with -1 replaced by ``num_classes``, the row that gathers what belongs to no class: ``[n] -> [n]``."""
    # On a GPU looking would wait for it, and index_add_ asserts by itself; a compiler cannot look at all.
    if labels.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling():
        outside = ((labels < -1) | (labels >= num_classes)).nonzero()
        if len(outside):
            row = int(outside[0])
            rule = f"in 0..{num_classes - 1}, or -1 for a row of no class"
            raise InputError(message(op, "labels", rule, f"{int(labels[row])} in row {row}"))
    return torch.where(labels < 0, num_classes, labels)


def image_stats(
    images: Tensor,  # [n, H, W, C] uint8
    labels: Tensor,  # [n] int64, -1 or 0..K-1
    num_classes: int,
    mean: list[float],  # [C]
    std: list[float],  # [C]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sketch [n, C, H, W], channel mean and variance [C], class means and variances [K, H * W * C], class counts [K].

    Sums of bytes and of their squares are whole numbers, which float64 adds exactly; variances are the population's.
    """
    n, height, width, channels = images.shape
    index = _index_by_class("image_stats", labels, num_classes)
    pixels = images.reshape(n, height * width * channels)
    sums = torch.zeros(num_classes + 1, pixels.shape[1], dtype=torch.float64, device=images.device)
    squares = torch.zeros_like(sums)
    # In pieces, which bounds the memory of the float64 copies.
    for rows, classes in zip(torch.split(pixels, 1024), torch.split(index, 1024), strict=True):
        values = rows.to(torch.float64)
        sums.index_add_(0, classes, values)
        squares.index_add_(0, classes, values.square())
    counts = torch.zeros(num_classes + 1, dtype=torch.int64, device=images.device)
    counts.index_add_(0, index, torch.ones_like(index))

    def moments(count: Tensor | int, total: Tensor, total_squares: Tensor) -> tuple[Tensor, Tensor]:
        average = total / count
        variance = (total_squares / count - average.square()).clamp(min=0)
        return (average / 255).to(torch.float32), (variance / 255**2).to(torch.float32)

    means, variances = moments(counts[:num_classes, None].clamp(min=1), sums[:num_classes], squares[:num_classes])
    by_channel = [x.view(-1, channels).sum(dim=0) for x in (sums, squares)]
    channel_mean, channel_var = moments(max(n * height * width, 1), *by_channel)
    shift, scale = (torch.tensor(x, dtype=torch.float32, device=images.device) for x in (mean, std))
    sketch = ((images.to(torch.float32) / 255 - shift) / scale).permute(0, 3, 1, 2).contiguous()
    return sketch, channel_mean, channel_var, means, variances, counts[:num_classes]


def class_stats(
    features: Tensor,  # [n, F]
    labels: Tensor,  # [n] int64, -1 or 0..K-1
    num_classes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Class means and population variances [K, F], accumulated in float64 in two passes, and counts [K]."""
    index = _index_by_class("class_stats", labels, num_classes)
    counts = torch.zeros(num_classes + 1, dtype=torch.int64, device=features.device)
    counts = counts.index_add(0, index, torch.ones_like(index))
    divisor = counts.clamp(min=1)[:, None]  # [K + 1, 1]
    values = features.to(torch.float64)
    zeros = values.new_zeros(num_classes + 1, features.shape[1])
    means = zeros.index_add(0, index, values) / divisor  # [K + 1, F]
    variances = zeros.index_add(0, index, (values - means[index]).square()) / divisor
    return means[:num_classes].to(features.dtype), variances[:num_classes].to(features.dtype), counts[:num_classes]


def group_by_dataset(op: str, labels: Tensor, num_classes: int, nobody: int) -> Tensor:
    """Labels of B datasets as classes of one, 0..B*K-1, with ``nobody`` for -1: ``[B, n] -> [B * n]``."""
    batch = labels.shape[0]
    _index_by_class(op, labels.reshape(-1), num_classes)
    classes = labels + num_classes * torch.arange(batch, device=labels.device)[:, None]
    # Where nothing was checked, a label out of range must not pass for a class of the next dataset.
    classes = torch.where((labels < -1) | (labels >= num_classes), batch * num_classes + 1, classes)
    return torch.where(labels == -1, nobody, classes).reshape(-1)


def patch_covariance(
    images: Tensor,  # [B, n, C, H, W]
    labels: Tensor,  # [B, n] int64, -1 or 0..K-1
    num_classes: int,
    kernel_size: int,
    padding: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Means [B, K, P] and covariances [B, K, P, P] of patches, P = C * k * k, in float64, and counts [B, K]."""
    batch, n, channels, height, width = images.shape
    groups, patch = batch * num_classes, channels * kernel_size**2
    index = group_by_dataset("patch_covariance", labels, num_classes, nobody=groups)  # [B * n]
    positions = (height + 2 * padding - kernel_size + 1) * (width + 2 * padding - kernel_size + 1)
    counts = torch.zeros(groups + 1, dtype=torch.int64, device=images.device)
    counts = counts.index_add(0, index, torch.full_like(index, positions))
    divisor = counts.clamp(min=1)[:, None]  # [B * K + 1, 1]
    sums = torch.zeros(groups + 1, patch, dtype=torch.float64, device=images.device)
    products = torch.zeros(groups + 1, patch, patch, dtype=torch.float64, device=images.device)
    size = max(1, 2**22 // max(patch**2, patch * positions))  # images of a piece, which bounds the memory
    pieces = torch.split(images.reshape(batch * n, channels, height, width), size)
    for piece, classes in zip(pieces, torch.split(index, size), strict=True):
        sums.index_add_(0, classes, F.unfold(piece.to(torch.float64), kernel_size, padding=padding).sum(dim=2))
    means = sums / divisor
    for piece, classes in zip(pieces, torch.split(index, size), strict=True):
        patches = F.unfold(piece.to(torch.float64), kernel_size, padding=padding)  # [m, P, positions]
        patches = patches - means[classes][:, :, None]
        products.index_add_(0, classes, patches @ patches.transpose(1, 2))
    covariances = products / divisor[:, :, None]
    shape = (batch, num_classes)
    return (
        means[:groups].to(images.dtype).view(*shape, patch),
        covariances[:groups].to(images.dtype).view(*shape, patch, patch),
        counts[:groups].view(shape),
    )
