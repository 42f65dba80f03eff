"""The fast path of a production program: a frozen copy of a PudNet with its weights prepared once.

On the CPU, with ``pudnet._C``, the generator rows are packed for the vector code (float32 or bfloat16) and the results'
memory is used again, because a first touch of 45 MB costs more than generating them. On CUDA the whole pass, from uint8
images to weights, is one CUDA graph per sketch sizes. Without either, the reference runs.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet import _extension, ops
from pudnet.errors import DtypeError, InputError, ShapeError, message
from pudnet.models.pudnet import PudNet
from pudnet.ops import _native_embedding
from pudnet.ops import _native_generation as native
from pudnet.sketch import Sketch

GRAPHS = 8  # captured at most; the one unused for longest goes first
SPARE_BUFFERS = 2
WARM_UPS = 2  # runs before a capture: kernels get compiled and libraries take their workspaces


class BufferPool:
    """Memory of results, used again as soon as the last tensor on it is gone; safe in several threads."""

    def __init__(self, spare: int = SPARE_BUFFERS) -> None:
        self._spare: deque[np.ndarray[Any, Any]] = deque(maxlen=spare)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An unfilled tensor. No other living tensor shares its memory."""
        size = dtype.itemsize * torch.Size(shape).numel()
        memory = self._find(size)
        # The tensor keeps `lease` alive and so do its views; when the last one is gone the memory is back.
        lease = memory[:]
        weakref.finalize(lease, self._spare.append, memory).atexit = False
        return torch.from_numpy(lease).view(dtype).view(shape)

    def _find(self, size: int) -> np.ndarray[Any, Any]:
        for _ in range(len(self._spare)):
            try:
                memory = self._spare.popleft()
            except IndexError:  # another thread was faster
                break
            if memory.nbytes == size:
                return memory
            self._spare.append(memory)
        return native.aligned_memory(size)


class _Graph(NamedTuple):
    """A captured pass: write ``images``, replay, read ``flat``; ``idle`` is recorded when ``flat`` has been read."""

    graph: Any
    images: Tensor  # [sum of counts, H, W, 3] uint8
    flat: Tensor  # [B, P]
    idle: Any


class OptimisedPudNet:
    """A PudNet for production: images in, weights out, as fast as this machine can.

    It holds a copy of the hypernetwork, in evaluation mode, as it is now; later changes of ``net`` do not reach it. Its
    numbers are those of ``net.generate`` on the reference backend within 1e-5 relative (float32). Several threads may
    share it. Results are ordinary tensors outside autograd, and belong to the caller: no later call overwrites them
    unless they are passed as ``out``.

    Args:
        net: the hypernetwork; its device decides where everything runs.
        dtype: of the generator rows, nearly all of the parameters: float32 or bfloat16 (half the memory to read; the
            weights differ by about 0.2 %).
        out_dtype: of the generated weights, float32 or bfloat16.

    Attributes:
        backend: ``"native"``, ``"reference"`` or ``"cuda graph"``.

    Raises:
        DtypeError: another dtype.
    """

    def __init__(
        self, net: PudNet, *, dtype: torch.dtype = torch.float32, out_dtype: torch.dtype = torch.float32
    ) -> None:
        for name, value in (("dtype", dtype), ("out_dtype", out_dtype)):
            if value not in native.DTYPES:
                raise DtypeError(message("OptimisedPudNet", name, "torch.float32 or torch.bfloat16", value))
        self.layout, self.preprocess = net.layout, net.preprocess
        self._sketch_size = net.config.sketch_size
        self.dtype, self.out_dtype = dtype, out_dtype
        self.device = net.temperature.device
        self._shapes = net.layout.shapes
        self._embedding = copy.deepcopy(net.embedding).eval().requires_grad_(False)
        self._recurrence = copy.deepcopy(net.recurrence).eval().requires_grad_(False)
        generators = net.generators
        maps = (generators.fc_weight, generators.fc_bias, generators.mix_weight, generators.mix_bias)
        fc_weight, fc_bias, mix_weight, mix_bias = (x.detach().clone() for x in maps)
        self._maps = (fc_weight, fc_bias, mix_weight, mix_bias)
        row_weight, row_bias = generators.row_weight.detach(), generators.row_bias.detach()
        if self.device.type == "cuda":
            self.backend = "cuda graph"
        else:
            self.backend = "reference" if self.device.type != "cpu" or _extension.why_not() else "native"
        if self.backend == "native":
            self._rows = native.pack_rows(row_weight, row_bias, self._shapes, dtype)
            self._pool = BufferPool()
        else:
            self._rows = native.Rows(row_weight.to(dtype, copy=True), row_bias.to(dtype, copy=True), packed=False)
        self._lock = threading.Lock()  # of the graphs: their buffers are shared by all calls
        self._graphs: OrderedDict[tuple[int, ...], _Graph] = OrderedDict()
        # On the device beforehand: copying constants there would wait for it.
        std = torch.tensor(self.preprocess.std, dtype=torch.float64)
        shift = -torch.tensor(self.preprocess.mean, dtype=torch.float64) / std
        self._scale = (1 / (255 * std)).to(self.device, torch.float32).view(3, 1, 1)
        self._shift = shift.to(self.device, torch.float32).view(3, 1, 1)
        self._encoder = self._packed_encoder() if self.backend == "native" else None

    def generate(self, images: Any, *, out: Tensor | None = None, stream: Any = None) -> dict[str, Tensor]:
        """Predict the weights for one dataset.

        Args:
            images: uint8 ``[S, H, W, C]`` of any size, or a ``Sketch``; on CUDA best on the device already.
            out: where to write, contiguous ``[P]`` of ``out_dtype``; new memory by default.
            stream: the ``torch.cuda.Stream`` to run on, by default the current one. Nothing waits for the GPU.

        Returns:
            ``{parameter name: [O, I, kH, kW]}``, views of one flat tensor.

        Raises:
            InputError: images that ``PudNet.generate`` refuses, or an ``out`` that does not fit.
        """
        flat = self._flat([images], None if out is None else self._checked(out, (self.layout.size,))[None], stream)
        return self.layout.views(flat[0])

    def generate_batch(
        self, images: Sequence[Any], *, out: Tensor | None = None, stream: Any = None
    ) -> dict[str, Tensor]:
        """Predict the weights for B datasets in one pass: as ``generate``, with ``[B, ...]`` throughout."""
        if not isinstance(images, (list, tuple)) or not images:
            rule = "a list of at least one sketch"
            raise InputError(message("OptimisedPudNet.generate_batch", "images", rule, type(images).__name__))
        checked = None if out is None else self._checked(out, (len(images), self.layout.size))
        return self.layout.views(self._flat(images, checked, stream))

    def _checked(self, out: Tensor, shape: tuple[int, ...]) -> Tensor:
        where = "OptimisedPudNet"
        if tuple(out.shape) != shape or not out.is_contiguous():
            raise ShapeError(message(where, "out", f"contiguous {list(shape)}", list(out.shape)))
        if out.dtype != self.out_dtype or out.device != self.device:
            rule = f"{self.out_dtype} on {self.device}"
            raise DtypeError(message(where, "out", rule, f"{out.dtype} on {out.device}"))
        return out

    def _flat(self, sketches: Sequence[Any], out: Tensor | None, stream: Any) -> Tensor:
        """Flat weights ``[B, P]``."""
        if self.device.type != "cuda":
            if stream is not None:
                got = type(stream).__name__
                raise InputError(message("OptimisedPudNet", "stream", "None for a net on the CPU", got))
            return self._on_cpu(sketches, out)
        with torch.cuda.device(self.device), torch.cuda.stream(stream):
            return self._replay(sketches, out)

    @torch.no_grad()
    def _on_cpu(self, sketches: Sequence[Any], out: Tensor | None) -> Tensor:
        pixels, counts = self._pixels(sketches)
        with torch.inference_mode():  # saves bookkeeping; what leaves it is not an inference tensor
            codes = self._codes(pixels, counts)
            if self.backend != "native":
                flat = self._generate(codes, "reference")
        if out is None and self.backend == "native":
            out = self._pool.take((len(counts), self.layout.size), self.out_dtype)
        elif out is None:
            out = torch.empty(len(counts), self.layout.size, dtype=self.out_dtype, device=self.device)
        if self.backend == "native":
            return native.generate(codes, *self._maps, self._rows, self._shapes, out)
        return out.copy_(flat)

    def _pixels(self, sketches: Sequence[Any]) -> tuple[Tensor, list[int]]:
        """The images of all sketches, resized, uint8 ``[n, H, W, 3]``, and how many each sketch has."""
        parts = [self.preprocess.resize(one.images if isinstance(one, Sketch) else one) for one in sketches]
        if any(len(part) == 0 for part in parts):
            raise InputError(message("OptimisedPudNet", "images", "at least one image a sketch", "an empty one"))
        pixels = parts[0] if len(parts) == 1 else torch.cat([part.to(self.device) for part in parts])
        return pixels.to(self.device, non_blocking=True), [len(part) for part in parts]

    def _packed_encoder(self) -> _native_embedding.PackedEncoder | None:
        """The encoder as native code reads it, where that can run it on images of the target's size."""
        convs = [conv for conv in self._embedding.convs if isinstance(conv, nn.Conv2d)]
        layers = (convs, self._embedding.linear, self._embedding.norm)
        other = self._sketch_size != self.preprocess.size or not self._embedding.conditioned
        if other or _native_embedding.why_not(*layers):
            return None
        return _native_embedding.pack(*layers, self._scale.flatten().tolist(), self._shift.flatten().tolist())

    def _codes(self, pixels: Tensor, counts: list[int]) -> Tensor:
        """uint8 ``[n, H, W, 3]`` -> codes ``[B, L, D]``."""
        codes: Tensor
        if self._encoder is not None:
            features = _native_embedding.image_features(pixels, self._encoder)
            codes = self._recurrence(self._embedding.pool(features, counts))
            return codes
        planes = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        images = planes.mul_(self._scale).add_(self._shift)  # as Preprocess.normalise
        side = self._sketch_size
        if images.shape[-1] != side:
            images = F.interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)
        codes = self._recurrence(self._embedding(images, counts))
        return codes

    def _generate(self, codes: Tensor, backend: str | None) -> Tensor:
        """Codes ``[B, L, D]`` -> flat weights ``[B, P]``, through the op."""
        rows, shapes = self._rows, self._shapes
        return ops.generate_weights(
            codes, *self._maps, rows.weight, rows.bias, shapes, dtype=self.out_dtype, backend=backend
        )

    def _replay(self, sketches: Sequence[Any], out: Tensor | None) -> Tensor:
        """Run the captured graph of these sketch sizes; every wait is the GPU's, none the host's."""
        pixels, counts = self._pixels(sketches)
        with self._lock:
            captured = self._graphs.pop(tuple(counts), None) or self._capture(counts)
            self._graphs[tuple(counts)] = captured  # the last one is the one used most recently
            if len(self._graphs) > GRAPHS:
                _, oldest = self._graphs.popitem(last=False)
                oldest.idle.synchronize()  # its memory must not go while the GPU works on it
            stream = torch.cuda.current_stream()
            stream.wait_event(captured.idle)  # another stream may still use the graph's buffers
            captured.images.copy_(pixels, non_blocking=True)
            captured.graph.replay()
            flat = captured.flat.clone() if out is None else out.copy_(captured.flat)
            captured.idle.record(stream)
        return flat

    @torch.no_grad()
    def _capture(self, counts: list[int]) -> _Graph:
        size = self.preprocess.size
        images = torch.zeros(sum(counts), size, size, 3, dtype=torch.uint8, device=self.device)

        def run() -> Tensor:
            return self._generate(self._codes(images, counts), None)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            flat = run()
        idle = torch.cuda.Event()
        idle.record()
        return _Graph(graph, images, flat, idle)
