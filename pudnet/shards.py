"""One model from a dataset in shards, on as many processes: two map-reduce passes on torch.distributed.

Pass one sketches every shard and merges the sketches; from the merged one each process predicts the same weights. Pass
two sums, over every shard, what the head needs to know of the images, and merges that. Images never travel, but for the
few in the sketches. docs/scale.md says what does travel, and has the same recipe without torch.distributed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pudnet.data import open_images
from pudnet.errors import InputError, message
from pudnet.heads import HeadFitter
from pudnet.predicted import PredictedModel
from pudnet.predictor import SKETCH_SIZE, Predictor
from pudnet.serving import Token
from pudnet.sketch import Sketch
from pudnet.sketch import sketch as draw_sketch
from pudnet.stages import StageClock

T = TypeVar("T")
State = tuple[dict[str, Any], dict[str, Tensor]]  # JSON-able, and tensors


def predict(
    predictor: Predictor,
    images: Any,
    labels: Any = None,
    *,
    classes: Sequence[str],
    head: str = "auto",
    batchnorm: str = "calibrated",
    sketch_size: int = SKETCH_SIZE,
    seed: int = 0,
    split: str = "train",
    cancel: Token | None = None,
) -> PredictedModel:
    """Predict a classifier for a dataset of which every process holds a shard; all call this together.

    Started by ``torchrun``, on the default process group, which must carry CPU tensors (gloo). In a single process it
    is ``Predictor.predict``. A process that fails must end, so that the others do not wait for it: ``torchrun`` sees to
    that.

    Args:
        predictor: the same in every process.
        images, labels, split: this process's shard, in any form ``Predictor.predict`` takes.
        classes: the names of all classes in label order, the same in every process; a shard may lack some.
        head, batchnorm, sketch_size, seed, cancel: as for ``Predictor.predict``, the same in every process.

    Returns:
        The same model in every process. Its report counts all images; ``skipped`` and ``warnings`` are of this shard.

    Raises:
        InputError: bad images or labels, a class without images, or BatchNorm ``"batch"``, whose answers depend on
            which images are together.
    """
    if batchnorm == "batch":
        raise InputError(message("shards.predict", "batchnorm", "'calibrated' or 'shared'", "'batch'"))
    clock = StageClock(predictor.device, cancel)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    with clock.stage("reading"):
        images = clock.watched(images, labels)
        source = open_images(images, labels, size=predictor.net.config.image_size, split=split, classes=classes)
    with clock.stage("sketch"):
        sketch = reduce_sketch(draw_sketch(source, sketch_size, seed=seed, stream=rank))
    with clock.stage("weights"), torch.no_grad(), predictor._recording() as ran:
        network = predictor.net.materialise(predictor.generate(sketch))
    settings = {
        "head": head,
        "batchnorm": batchnorm,
        "sketch_size": sketch_size,
        "seed": seed,
        "split": split,
        "classes": list(classes),
        "growable": False,
        "views": None,
        "quick": False,
        "together": 1,
        "shards": world,
        "backends": ran,
    }
    model = predictor._finish(network, source, sketch, sketch, settings, clock, reduce_fitter)
    seen = [*sketch.seen.tolist(), *[0] * len(classes)][: len(classes)]
    model.report |= {"n": sum(seen), "class_counts": dict(zip(model.classes, seen, strict=True))}
    return model


def reduce_sketch(own: Sketch) -> Sketch:
    """The merged sketch of all processes, in every process; each has drawn its own as a stream of its own."""

    def pack(sketch: Sketch) -> State:
        tensors, meta = sketch.to_tensors()
        return meta, tensors

    return _reduce(own, Sketch.merge, pack, lambda state: Sketch.from_tensors(state[1], state[0]))


def reduce_fitter(own: HeadFitter) -> HeadFitter:
    """What all processes' heads remember together, in every process."""

    def merge(first: HeadFitter, second: HeadFitter) -> HeadFitter:
        first.merge(second)
        return first

    def unpack(state: State) -> HeadFitter:
        return HeadFitter.from_state(own.name, own.num_classes, *state).to(own.device)

    return _reduce(own, merge, HeadFitter.state, unpack)


def _reduce(own: T, merge: Callable[[T, T], T], pack: Callable[[T], State], unpack: Callable[[State], T]) -> T:
    """Merge the processes' values pairwise, in log2(world) rounds, and give every process the result."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return own
    rank, world, step = dist.get_rank(), dist.get_world_size(), 1
    while step < world and rank % (2 * step) == 0:
        if rank + step < world:
            own = merge(own, unpack(_travel(None, partial(dist.recv, src=rank + step))))
        step *= 2
    if rank:
        _travel(pack(own), partial(dist.send, dst=rank - step))
    whole = _travel(pack(own) if rank == 0 else None, partial(dist.broadcast, src=0))
    return own if rank == 0 else unpack(whole)


def _travel(state: State | None, move: Callable[[Tensor], object]) -> State:
    """Send ``state`` by ``move``, or receive one where it is None: sizes, then the JSON part, then every tensor."""
    if state is not None:
        shapes = [[name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
                  for name, tensor in state[1].items()]  # fmt: skip
        text = json.dumps([state[0], shapes]).encode()
        header = torch.tensor(list(text), dtype=torch.uint8)
        move(torch.tensor([len(text)]))
        move(header)
        for tensor in state[1].values():
            move(tensor.detach().cpu().contiguous())
        return state
    size = torch.zeros(1, dtype=torch.long)
    move(size)
    header = torch.empty(int(size), dtype=torch.uint8)
    move(header)
    config, shapes = json.loads(bytes(header.tolist()))
    tensors = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, dtype, shape in shapes}
    for tensor in tensors.values():
        move(tensor)
    return config, tensors
