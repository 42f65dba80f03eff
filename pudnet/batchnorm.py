"""BatchNorm, explicit: which statistics a finished network normalises with.

- ``calibrated`` (default): running statistics measured once on a random sample of the dataset's own images.
- ``batch``: the statistics of whatever is in the batch, in eval mode too (as the papers do).
- ``shared``: the running statistics the module came with (learned together with the hypernetwork).

All functions change the module they are given: pass a copy that is yours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pudnet.errors import DtypeError, InputError, ShapeError, message

POLICIES = ("calibrated", "batch", "shared")
BATCH_SIZE = 500  # images that BatchNorm is calibrated on at once, at most


def set_policy(
    module: nn.Module,
    policy: str,
    images: Tensor | None = None,
    *,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    run: Callable[[Tensor], object] | None = None,
) -> None:
    """Give every BatchNorm of ``module`` one policy and put the module in eval mode.

    Args:
        module: changed in place.
        policy: ``"calibrated"``, ``"batch"`` or ``"shared"``.
        images: ``[n, 3, H, W]``, as the network reads them; a random sample of the dataset. Needed by ``calibrated``.
        batch_size, seed, run: see :func:`calibrate`.

    Raises:
        InputError: unknown policy; ``calibrated`` without images; ``shared`` on a module without running statistics;
            what :func:`calibrate` raises.
    """
    if policy not in POLICIES:
        known = ", ".join(repr(name) for name in POLICIES)
        raise InputError(message("set_policy", "policy", f"one of {known}", repr(policy)))
    if policy == "calibrated":
        if images is None:
            raise InputError(message("set_policy", "images", "given for the policy 'calibrated'", "None"))
        calibrate(module, images, batch_size, seed=seed, run=run)
        return
    for norm in _batch_norms(module):
        if policy == "batch":
            # torch normalises with batch statistics in eval mode exactly where there are no running ones.
            norm.track_running_stats = False
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
        elif norm.running_mean is None or norm.running_var is None:
            hint = "Use 'calibrated' or 'batch'."
            rule = "a network whose BatchNorm layers have running statistics for the policy 'shared'"
            raise InputError(message("set_policy", "module", rule, "one without them", hint))
    module.eval()


@torch.no_grad()
def calibrate(
    module: nn.Module,
    images: Tensor,
    batch_size: int = BATCH_SIZE,
    *,
    seed: int = 0,
    run: Callable[[Tensor], object] | None = None,
) -> None:
    """Set the running statistics of every BatchNorm in ``module`` from ``images``; leave the module in eval mode.

    Only the BatchNorm layers run in train mode (dropout stays off), and their momentum is put back. The *population*
    variance is stored (torch stores the unbiased one), so that on the sample itself the eval output equals the
    train-mode output. A sample of up to ``batch_size`` images is one batch, hence exact for every layer. A larger one
    is split at random into batches of nearly equal size and the statistics are pooled: exact for the first BatchNorm,
    and for the later ones up to the noise of normalising the earlier ones per batch.

    Args:
        module: changed in place.
        images: ``[n, 3, H, W]`` floating point, as the network reads them; a random sample of the dataset.
        batch_size: most images per batch.
        seed: of the split into batches.
        run: runs ``module`` on a batch, to make use of what it computes; None to call it. Where some BatchNorm layer
            is not reached by ``run``, the module is called as well.

    Raises:
        ShapeError: ``images`` is not 4-D. DtypeError: it is not floating point.
        InputError: some BatchNorm sees fewer than two values per channel; the statistics are not finite;
            ``batch_size`` is not positive.
    """
    if images.dim() != 4:
        raise ShapeError(message("calibrate", "images", "[n, 3, H, W]", list(images.shape)))
    if not images.is_floating_point():
        raise DtypeError(message("calibrate", "images", "floating point", images.dtype))
    if batch_size < 1:
        raise InputError(message("calibrate", "batch_size", "at least 1", batch_size))
    if len(images) == 0:
        raise InputError(message("calibrate", "images", "at least one image", "none"))
    norms = _batch_norms(module)
    module.eval()
    if not norms:
        return
    moments = {norm: _Moments() for norm in norms}
    momenta = {norm: norm.momentum for norm in norms}
    handles = []
    try:
        for norm in norms:
            _prepare(norm)
            handles.append(norm.register_forward_pre_hook(_require_two_values))
            handles.append(norm.register_forward_hook(moments[norm].add))
        for batch in _batches(images, batch_size, seed):
            (run or module)(batch)
            if run is not None and not all(moments[norm].values for norm in norms):
                module(batch)
    finally:
        for handle in handles:
            handle.remove()
        for norm in norms:
            norm.momentum = momenta[norm]
            norm.train(False)
    for norm in norms:
        moments[norm].write(norm)


def _batch_norms(module: nn.Module) -> list[_BatchNorm]:
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]


def _batches(images: Tensor, batch_size: int, seed: int) -> list[Tensor]:
    if len(images) <= batch_size:
        return [images]
    # Nearly equal batches: a last one of a few images would give poor statistics.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).to(images.device)
    return [images[part] for part in order.tensor_split(-(-len(images) // batch_size))]


def _prepare(norm: _BatchNorm) -> None:
    """Make one train-mode call leave exactly that batch's statistics in the running ones."""
    if norm.running_mean is None or norm.running_var is None:
        reference = norm.weight if norm.weight is not None else torch.empty(0)
        norm.running_mean = torch.zeros(norm.num_features, device=reference.device, dtype=reference.dtype)
        norm.running_var = torch.ones(norm.num_features, device=reference.device, dtype=reference.dtype)
        norm.num_batches_tracked = torch.zeros((), dtype=torch.long, device=reference.device)
    norm.track_running_stats = True
    norm.momentum = 1.0
    norm.train()


def _require_two_values(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
    values = inputs[0].numel() // inputs[0].shape[1]
    if values < 2:
        rule = "enough for two values per channel in every BatchNorm layer"
        raise InputError(message("calibrate", "images", rule, f"{values}", "Give more or larger images."))


class _Moments:
    """Pooled mean and population variance of everything one BatchNorm has read, from its per-batch statistics."""

    def __init__(self) -> None:
        self.values = 0  # per channel
        self.mean: Tensor | float = 0.0  # [C], as are the following
        self.square: Tensor | float = 0.0  # mean of (population variance + mean^2) over values

    def add(self, norm: _BatchNorm, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook: add the batch whose statistics the norm has just stored."""
        assert norm.running_mean is not None and norm.running_var is not None
        values = output.numel() // output.shape[1]
        mean, unbiased = norm.running_mean.double(), norm.running_var.double()
        self.values += values
        share = values / self.values
        square = unbiased * ((values - 1) / values) + mean.square()
        self.mean = self.mean + share * (mean - self.mean)
        self.square = self.square + share * (square - self.square)

    def write(self, norm: _BatchNorm) -> None:
        if self.values == 0:  # a layer the forward pass does not use
            return
        assert isinstance(self.mean, Tensor) and isinstance(self.square, Tensor)
        variance = (self.square - self.mean.square()).clamp_min(0.0)
        if not bool(torch.isfinite(variance).all()):
            got = "statistics with NaN or infinity"
            raise InputError(message("calibrate", "images", "such that all statistics are finite", got))
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(self.mean)
        norm.running_var.copy_(variance)
