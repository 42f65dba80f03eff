"""Capture a network's graph by running its forward on stand-in values (torch.fx).

``trace`` runs ``forward`` once with a ``Value`` for the input. Every module, function and operator a ``Value`` meets is
looked up in a table (``MODULES``, ``FUNCTIONS``) that says which nodes it makes; what is in no table is collected and
reported. A ``Value`` knows the nodes its number depends on directly; operations without a node (activations, reshapes)
pass them on. Shapes are worked out only where the network asks for one, on the meta device.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedParameter

from pudnet.errors import DtypeError, InputError, ShapeError, message
from pudnet.graphs.graph import ArchGraph, GraphNode, GraphParameter, Shape4, assemble

WHERE = "graphs.trace"
BATCH = 2  # images in the stand-in batch


def trace(module: nn.Module, input_shape: Sequence[int] = (3, 32, 32)) -> ArchGraph:
    """Capture the graph of ``module`` for one input; the module is not changed and no number is computed.

    Args:
        module: any module whose forward takes one tensor and returns one; on any device, meta included. It is traced
            in the mode it is in (train or eval).
        input_shape: of one input, without the batch: (C, H, W) for images.

    Raises:
        InputError: operations that are not understood (all of them, with their module paths); control flow that depends
            on numbers; an output that is not one tensor; a tensor held by two modules; an empty parameter.
        DtypeError: a parameter that is not of a real floating type.
        ShapeError: ``input_shape`` is not a sequence of positive integers.
    """
    if not isinstance(module, nn.Module):
        raise DtypeError(message(WHERE, "module", "a torch.nn.Module", type(module).__name__))
    shape = tuple(input_shape)
    if not shape or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ShapeError(message(WHERE, "input_shape", "positive integers, as (3, 32, 32)", shape))
    return _Tracer(module, shape).run()


class Value(fx.Proxy):
    """A stand-in for one tensor (or tuple of tensors) of the traced forward.

    Attributes:
        sources: nodes it depends on directly; empty for parameters and constants.
        parameters: names of the parameters it is made of, where it has no sources.
        transposed: the parameter was transposed on the way.
        record: (run, args, kwargs) to work out its shape.
    """

    tracer: _Tracer

    def __init__(
        self,
        tracer: _Tracer,
        record: tuple[Any, ...],
        sources: frozenset[int] = frozenset(),
        parameters: frozenset[str] = frozenset(),
        transposed: bool = False,
    ) -> None:
        self.tracer = tracer
        self.record = record
        self.sources = sources
        self.parameters = parameters
        self.transposed = transposed
        self.node = None  # type: ignore[assignment]  # there is no fx.Graph behind

    def evaluate(self) -> Any:
        """Its tensor on the meta device (or tuple of tensors)."""
        return self.tracer.evaluate(self)

    def __repr__(self) -> str:
        return f"Value(sources={sorted(self.sources)}, parameters={sorted(self.parameters)})"

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(Tensor, name, None)
        if attribute is None or name.startswith("__"):
            raise AttributeError(f"a tensor has no attribute {name!r}")
        if name in ("T", "mT", "data"):
            handler = _pass if name == "data" else _flip
            return handler(self.tracer, (operator.attrgetter(name), (self,), {}), (self,), {})
        if name in NUMBERS:
            return functools.partial(self.tracer.refuse_number, name)
        if name in QUESTIONS:
            return lambda *args, **kwargs: getattr(self.evaluate(), name)(*args, **kwargs)
        if callable(attribute):
            return lambda *args, **kwargs: self.tracer.create_proxy("call_method", name, (self, *args), kwargs)
        return getattr(self.evaluate(), name)

    def __len__(self) -> int:
        return len(self.evaluate())

    def __iter__(self) -> Iterator[Value]:
        pick = functools.partial(self.tracer.create_proxy, "call_function", operator.getitem)
        return iter([pick((self, i), {}) for i in range(len(self))])

    def __bool__(self) -> bool:
        return self.tracer.refuse_number("bool")

    def __int__(self) -> int:
        return self.tracer.refuse_number("int")

    def __float__(self) -> float:
        return self.tracer.refuse_number("float")

    def __index__(self) -> int:
        return self.tracer.refuse_number("index")

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.unsupported.append(("item assignment", self.tracer.path))

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] | None = None, kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = args or (), kwargs or {}
        tracer = next(value.tracer for value in _values((args, kwargs)))
        return tracer.create_proxy("call_function", function, args, kwargs)


class Traced(Exception):
    """Control flow that depends on numbers; carries the message."""


# Methods that ask for numbers, and those whose answer follows from shape and dtype.
NUMBERS = frozenset({"item", "tolist", "numpy", "nonzero", "unique"})
QUESTIONS = frozenset(
    {"size", "dim", "ndimension", "numel", "nelement", "stride", "is_floating_point", "is_complex", "is_contiguous",
     "element_size", "get_device", "__len__"}
)  # fmt: skip


def _values(nested: Any) -> Iterator[Value]:
    """Every Value in nested tuples, lists, dictionaries and slices."""
    if isinstance(nested, Value):
        yield nested
    elif isinstance(nested, (tuple, list)):
        for item in nested:
            yield from _values(item)
    elif isinstance(nested, dict):
        for item in nested.values():
            yield from _values(item)
    elif isinstance(nested, slice):
        yield from _values((nested.start, nested.stop, nested.step))


class _Tracer(fx.Tracer):
    """One run of ``trace``."""

    def __init__(self, module: nn.Module, input_shape: tuple[int, ...]) -> None:
        super().__init__(autowrap_modules=(math,))
        self.module, self.input_shape = module, input_shape
        self.nodes: list[GraphNode] = []
        self.predecessors: list[frozenset[int]] = []
        self.products: set[int] = set()  # attention nodes that a further product would absorb
        self.owners: dict[str, GraphParameter] = {}
        self.unsupported: list[tuple[str, str]] = []
        self.stack: list[str] = [""]
        self.output: Any = None
        self.evaluating = False
        self.known: dict[int, Any] = {}  # id of a Value -> its meta tensor
        self.paths: dict[int, str] = {}
        self.names: dict[int, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._read_parameters()

    @property
    def path(self) -> str:
        return self.stack[-1]

    def _read_parameters(self) -> None:
        storages: dict[int, str] = {}
        for path, child in self.module.named_modules():
            self.paths[id(child)] = path
            for attribute, parameter in child._parameters.items():
                if parameter is None:
                    continue
                name = f"{path}.{attribute}" if path else attribute
                self._check_parameter(name, parameter)
                address = id(parameter) if parameter.is_meta else parameter.data_ptr()
                if address in storages:
                    got = f"one tensor under {storages[address]!r} and {name!r}"
                    hint = "Call one module twice instead, or give each its own parameter."
                    rule = "a network whose modules hold different tensors"
                    raise InputError(message(WHERE, "module", rule, got, hint))
                storages[address] = name
                self.names[id(parameter)] = name
                self.shapes[name] = tuple(parameter.shape)

    @staticmethod
    def _check_parameter(name: str, parameter: Tensor) -> None:
        if isinstance(parameter, UninitializedParameter):
            hint = "Run the module once on an input to give its lazy layers shapes."
            raise InputError(message(WHERE, name, "of a known shape", "a lazy parameter", hint))
        if not parameter.is_floating_point():
            raise DtypeError(message(WHERE, name, "of a real floating dtype", parameter.dtype))
        if parameter.numel() == 0:
            rule = "a parameter with at least one element"
            raise InputError(message(WHERE, name, rule, f"shape {list(parameter.shape)}"))

    def run(self) -> ArchGraph:
        self._check_signature()
        problem = None
        try:
            self.trace(lambda x: self.module(x))
        except Traced as error:
            problem = str(error)
        except InputError:
            raise
        except Exception as error:
            at = f"in {self.path!r}" if self.path else "in the network itself"
            problem = f"{type(error).__name__} {at}: {' '.join(str(error).split())[:300]}"
        if self.unsupported:
            listed = "; ".join(
                f"{operation} in {path or type(self.module).__name__!r}" for operation, path in self.unsupported
            )
            hint = "pudnet.graphs.tracing lists what is known (MODULES, FUNCTIONS)."
            raise InputError(message(WHERE, "module", "made of known operations", f"{listed}", hint))
        if problem is not None:
            raise InputError(message(WHERE, "module", "traceable with one input tensor", problem))
        if not isinstance(self.output, Value) or isinstance(self.output.record[0], _Several):
            kind = "a tuple" if isinstance(self.output, Value) else type(self.output).__name__
            hint = "Wrap it in a module that returns one tensor; a network with auxiliary outputs may need .eval()."
            raise InputError(message(WHERE, "module", "a network that returns one tensor", kind, hint))
        unused = [name for name in self.shapes if name not in self.owners]
        parameters = [self.owners[name] for name in self.shapes if name in self.owners]
        return assemble(self.nodes, self.predecessors, parameters, unused, sorted(self.output.sources))

    def _check_signature(self) -> None:
        parameters = inspect.signature(self.module.forward).parameters.values()
        required = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY,
                    p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]  # fmt: skip
        takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        if len(required) > 1 or (not required and not takes_any and not parameters):
            got = f"forward({', '.join(p.name for p in parameters)})"
            raise InputError(message(WHERE, "module", "a network whose forward takes one tensor", got))

    # What fx calls.

    def create_proxy(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *_: Any, **__: Any
    ) -> Any:
        if kind == "placeholder":
            node = self.add("input", frozenset(), "input", None)
            return Value(self, (torch.empty, ((BATCH, *self.input_shape),), {"device": "meta"}), frozenset({node}))
        name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        record = (getattr(Tensor, target) if kind == "call_method" else target, args, kwargs)
        name = name if name.startswith("__") else name.strip("_")
        handler = FUNCTIONS.get(name)
        if handler is None:
            self.unsupported.append((name, self.path))
            return self.nodeless(record, args, kwargs)
        return handler(self, record, args, kwargs)

    def create_arg(self, a: Any) -> Any:
        return a

    def create_node(self, kind: str, target: Any, args: tuple[Any, ...], *_: Any, **__: Any) -> Any:
        if kind == "output":
            self.output = args[0]
        return None

    def path_of_module(self, mod: nn.Module) -> str:
        return self.paths.get(id(mod), type(mod).__name__)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self.evaluating or not isinstance(attr_val, nn.Parameter) or id(attr_val) not in self.names:
            return attr_val
        return self.parameter(attr_val)

    def parameter(self, tensor: Tensor) -> Value:
        return Value(self, (lambda: _to_meta(tensor), (), {}), parameters=frozenset({self.names[id(tensor)]}))

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.evaluating or next(_values((args, kwargs)), None) is None:
            return forward(*args, **kwargs)
        self.stack.append(self.path_of_module(m))
        handler = _module_handler(type(m))  # type: ignore[arg-type]  # a type is hashable
        result = forward(*args, **kwargs) if handler is None else handler(self, m, args, kwargs)
        self.stack.pop()  # not after an error: the path is part of its message
        return result

    def to_bool(self, obj: Any) -> bool:
        return self.refuse_number("bool")

    def refuse_number(self, what: str, *_: Any, **__: Any) -> Any:
        at = f"in {self.path!r}" if self.path else "in the network itself"
        raise Traced(f"control flow that depends on numbers ({what} of a tensor) {at}")

    # What the tables call.

    def add(
        self, primitive: str, sources: frozenset[int], label: str, shape: Shape4 | None, product: bool = False
    ) -> int:
        """Append a node; attention that goes straight into another product becomes part of that."""
        if absorbed := (sources & self.products if product else None):
            sources = (sources - absorbed).union(*(self.predecessors[node] for node in absorbed))
        self.nodes.append(GraphNode(primitive, label, shape))
        self.predecessors.append(sources)
        if product:
            self.products.add(len(self.nodes) - 1)
        return len(self.nodes) - 1

    def own(self, name: str, node: int, kind: str, transposed: bool = False) -> None:
        """Parameter ``name`` is decoded from ``node``, unless an earlier call of its module has it already."""
        shape = self.shapes[name]
        known = self.owners.setdefault(name, GraphParameter(name, shape, node, kind, transposed))
        if (known.kind, known.transposed) != (kind, transposed):
            self.unsupported.append((f"parameter {name!r} used both as {known.kind} and as {kind}", self.path))

    def nodeless(self, record: tuple[Any, ...], args: Any, kwargs: Any) -> Value:
        """The result of an operation that is not a node."""
        sources: frozenset[int] = frozenset()
        parameters: frozenset[str] = frozenset()
        flips = 0
        for value in _values((args, kwargs)):
            sources, parameters = sources | value.sources, parameters | value.parameters
            flips += value.transposed
        if sources and parameters:
            self.unsupported.append((f"{_name(record[0])} with parameter {_listed(parameters)}", self.path))
            parameters = frozenset()
        return Value(self, record, sources, parameters, flips % 2 == 1)

    def evaluate(self, value: Value) -> Any:
        """Work out ``value`` on the meta device, with all it depends on, each once."""
        pending = [value]
        evaluating, self.evaluating = self.evaluating, True
        try:
            while pending:  # not by recursion: networks are deep
                current = pending[-1]
                if id(current) not in self.known:
                    run, args, kwargs = current.record
                    missing = [each for each in _values((args, kwargs)) if id(each) not in self.known]
                    if missing:
                        pending.extend(missing)
                        continue
                    # The Value is kept too, so that its id stays taken.
                    self.known[id(current)] = (run(*self._known(args), **self._known(kwargs)), current)
                pending.pop()
        finally:
            self.evaluating = evaluating
        return self.known[id(value)][0]

    def _known(self, nested: Any) -> Any:
        if isinstance(nested, Value):
            return self.known[id(nested)][0]
        if isinstance(nested, Tensor):
            return _to_meta(nested)
        if isinstance(nested, (tuple, list)) and not isinstance(nested, torch.Size):
            return type(nested)(self._known(item) for item in nested)
        if isinstance(nested, dict):
            return {key: self._known(item) for key, item in nested.items()}
        return nested


def _to_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _name(function: Any) -> str:
    return getattr(function, "__name__", str(function))


def _listed(names: frozenset[str]) -> str:
    return ", ".join(map(repr, sorted(names)))


class _Several:
    """Marks the record of an operation that returns several tensors."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run
        self.__name__ = _name(run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


# Functions: (tracer, record, args, kwargs) -> Value.

Function = Callable[[_Tracer, tuple[Any, ...], tuple[Any, ...], dict[str, Any]], Any]


def _pass(tracer: _Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    return tracer.nodeless(record, args, kwargs)


def _several(tracer: _Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    return tracer.nodeless((_Several(record[0]), args, kwargs), args, kwargs)


def _ask(tracer: _Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A question about shape or dtype, asked as a function."""
    return record[0](*(value.evaluate() if isinstance(value, Value) else value for value in args), **kwargs)


def _nothing(tracer: _Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    return None


def _getitem(tracer: _Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    value = tracer.nodeless(record, args, kwargs)
    owner = args[0]
    if value.parameters and not _keeps_all(args[1]) and not isinstance(owner.record[0], _Several):
        tracer.unsupported.append((f"indexing of parameter {_listed(value.parameters)}", tracer.path))
    return value


def _keeps_all(index: Any) -> bool:
    """Whether an index only adds dimensions."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or part == slice(None) for part in parts)


def _flip(tracer: _Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """A transpose: remembered where a parameter is transposed."""
    value = tracer.nodeless(record, args, kwargs)
    value.transposed = bool(value.parameters) != value.transposed and not value.sources
    return value


def _bind(names: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, None for those not given."""
    listed = names.split()
    bound: dict[str, Any] = dict.fromkeys(listed)
    bound.update(zip(listed, args, strict=False))
    bound.update({("x" if name in ("input", "self") else name): value for name, value in kwargs.items()})
    return bound


def _activation(tracer: _Tracer, record: tuple[Any, ...], node: int) -> Value:
    return Value(tracer, record, frozenset({node}))


def _sources(*operands: Any) -> frozenset[int]:
    return frozenset().union(*(value.sources for value in _values(operands)))


def _parameter_of(tracer: _Tracer, operand: Any) -> str | None:
    """The one parameter ``operand`` is made of, or None."""
    if isinstance(operand, Value) and not operand.sources and len(operand.parameters) == 1:
        return next(iter(operand.parameters))
    return None


def _is_vector(shape: tuple[int, ...]) -> bool:
    """One number per channel, whatever the dimensions of size 1 around it."""
    return math.prod(shape) == max(shape, default=1)


def _vector_shape(shape: tuple[int, ...]) -> Shape4:
    return (math.prod(shape), 1, 1, 1)


def _table_shape(shape: tuple[int, ...]) -> Shape4:
    """Node shape of a position table: (1, n, c) and (n, c) count as c channels of a square image."""
    if len(shape) >= 4:
        return (shape[-4], shape[-3], shape[-2], shape[-1])
    if len(shape) == 3 and shape[0] != 1:
        return (1, *shape)
    n, channels = shape[-2:]
    side = math.isqrt(n - 1) + 1  # the smallest square that holds n positions
    return (1, channels, side, side)


def _weight_shape(shape: tuple[int, ...]) -> Shape4:
    out, inputs, *kernel = shape
    kernel = [1] * (2 - len(kernel)) + kernel
    return (out, inputs, kernel[0], kernel[1])


def _weighted(
    tracer: _Tracer, record: tuple[Any, ...], x: Any, weight: Any, bias: Any, groups: int = 1, dilation: Any = 1
) -> Value:
    """A convolution or linear map, and its bias."""
    name = _parameter_of(tracer, weight)
    bias_name = _parameter_of(tracer, bias)
    ndim = len(tracer.shapes[name]) if name else 0
    if name is None or (bias is not None and bias_name is None) or not 2 <= ndim <= 4 or not _sources(x):
        tracer.unsupported.append((f"{_name(record[0])} whose weight or bias is not one parameter", tracer.path))
        return tracer.nodeless(record, (x,), {})
    dilated = any(step > 1 for step in (dilation if isinstance(dilation, (tuple, list)) else (dilation,)))
    primitive = "conv" if groups == 1 else "dil_conv" if dilated else "sep_conv"
    shape = tracer.shapes[name][::-1] if weight.transposed else tracer.shapes[name]
    node = tracer.add(primitive, _sources(x), name, _weight_shape(shape))
    tracer.own(name, node, "weight", weight.transposed)
    if bias_name is not None:
        node = _added_bias(tracer, frozenset({node}), bias_name)
    return _activation(tracer, record, node)


def _added_bias(tracer: _Tracer, sources: frozenset[int], name: str) -> int:
    node = tracer.add("bias", sources, name, _vector_shape(tracer.shapes[name]))
    tracer.own(name, node, "bias")
    return node


def _normalised(tracer: _Tracer, record: tuple[Any, ...], primitive: str, x: Any, weight: Any, bias: Any) -> Value:
    """A normalisation: a node where it has parameters; its bias is part of it."""
    name, bias_name = _parameter_of(tracer, weight), _parameter_of(tracer, bias)
    if (weight is not None and name is None) or (bias is not None and bias_name is None):
        tracer.unsupported.append((f"{_name(record[0])} whose weight or bias is not one parameter", tracer.path))
    owner = name or bias_name
    if owner is None:
        return tracer.nodeless(record, (x,), {})
    if not all(_is_vector(tracer.shapes[each]) for each in (name, bias_name) if each):
        tracer.unsupported.append((f"{_name(record[0])} over more than one dimension", tracer.path))
    node = tracer.add(primitive, _sources(x), owner, _vector_shape(tracer.shapes[owner]))
    for each, kind in ((name, "scale"), (bias_name, "bias")):
        if each:
            tracer.own(each, node, kind)
    return _activation(tracer, record, node)


def _add(tracer: _Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    operands = list(_values((args, kwargs)))
    active = [value for value in operands if value.sources]
    name = next((_parameter_of(tracer, value) for value in operands if value.parameters), None)
    if len(active) == 1 and name is not None:
        shape = tracer.shapes[name]
        if _is_vector(shape):
            return _activation(tracer, record, _added_bias(tracer, active[0].sources, name))
        node = tracer.add("pos_enc", active[0].sources, name, _table_shape(shape))
        tracer.own(name, node, "table")
        return _activation(tracer, record, node)
    return _joined(tracer, record, "sum", operands, args, kwargs)


def _joined(
    tracer: _Tracer, record: tuple[Any, ...], primitive: str, operands: list[Value], args: Any, kwargs: Any
) -> Value:
    """A node where branches meet; none where all operands come from the same place."""
    if len({value.sources for value in operands if value.sources}) < 2:
        return tracer.nodeless(record, args, kwargs)
    return _activation(tracer, record, tracer.add(primitive, _sources(operands), tracer.path, None))


def _multiply(tracer: _Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    operands = list(_values((args, kwargs)))
    active = [value for value in operands if value.sources]
    name = next((_parameter_of(tracer, value) for value in operands if value.parameters), None)
    if len(active) == 1 and name is not None and _is_vector(tracer.shapes[name]):
        node = tracer.add("ln", active[0].sources, name, _vector_shape(tracer.shapes[name]))
        tracer.own(name, node, "scale")
        return _activation(tracer, record, node)
    return _joined(tracer, record, "cse", operands, args, kwargs)


def _matmul(tracer: _Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    operands = list(_values((args, kwargs)))
    name = _parameter_of(tracer, operands[-1])
    if len(operands) == 2 and operands[0].sources and name and len(tracer.shapes[name]) == 2:
        weight = operands[1]
        # x @ W reads W as [I, O]: what is transposed here is a weight stored as layers store theirs.
        flipped = Value(tracer, weight.record, parameters=weight.parameters, transposed=not weight.transposed)
        return _weighted(tracer, record, operands[0], flipped, None)
    active = [value for value in operands if value.sources]
    if len(active) < 2 or len(active) < len(operands):
        return tracer.nodeless(record, args, kwargs)
    return _attended(tracer, record, operands)


def _attended(tracer: _Tracer, record: tuple[Any, ...], operands: Any) -> Value:
    """A product of activations: attention. Two in a row (scores, then values) are one node."""
    return _activation(tracer, record, tracer.add("msa", _sources(operands), tracer.path, None, product=True))


def _attention(tracer: _Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    return _activation(tracer, record, tracer.add("msa", _sources(args, kwargs), tracer.path, None))


def _concatenate(tracer: _Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    parts = list(_values((args, kwargs)))
    operands = []
    for part in parts:
        name = _parameter_of(tracer, part)
        if name is not None:  # a class token or the like: it enters the network here
            node = tracer.add("pos_enc", frozenset(), name, _token_shape(tracer.shapes[name]))
            tracer.own(name, node, "table")
            part = Value(tracer, part.record, frozenset({node}))
        operands.append(part)
    if len(operands) < 2:
        return tracer.nodeless(record, args, kwargs)
    node = tracer.add("concat", _sources(operands), tracer.path, None)
    return _activation(tracer, record, node)


def _token_shape(shape: tuple[int, ...]) -> Shape4:
    return (1, math.prod(shape), 1, 1) if _is_vector(shape) else _table_shape(shape)


def _pool(primitive: str) -> Function:
    def handler(tracer: _Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
        bound = _bind("x kernel_size", args, kwargs)
        return _pooled(tracer, record, primitive, bound["x"], bound["kernel_size"])

    return handler


def _pooled(tracer: _Tracer, record: tuple[Any, ...], primitive: str, x: Any, kernel: Any) -> Value:
    sizes = tuple(kernel) if isinstance(kernel, (tuple, list)) else (kernel, kernel)
    height, width = sizes if len(sizes) == 2 else (1, sizes[0])
    node = tracer.add(primitive, _sources(x), tracer.path, (1, 1, int(height), int(width)))
    return _activation(tracer, record, node)


def _global_average(tracer: _Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    return _activation(tracer, record, tracer.add("glob_avg", _sources(args, kwargs), tracer.path, None))


def _adaptive_max(tracer: _Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    bound = _bind("x output_size", args, kwargs)
    size = bound["output_size"]
    out = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    into = bound["x"].evaluate().shape[-2:]
    kernel = tuple(-(-a // (b or a)) for a, b in zip(into, out, strict=True))
    return _pooled(tracer, record, "max_pool", bound["x"], kernel)


def _mean(tracer: _Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """A mean over positions is a pooling; one over channels (a norm written by hand, say) is no node."""
    bound = _bind("x dim keepdim", args, kwargs)
    x, dims = bound["x"], bound["dim"]
    if not x.sources:
        return tracer.nodeless(record, args, kwargs)
    dims = (dims,) if isinstance(dims, int) else tuple(dims or ())
    if len(dims) == 1:
        ndim = x.evaluate().ndim
        over_positions = ndim == 3 and dims[0] % ndim == 1 and not bound["keepdim"]
    else:
        over_positions = len(dims) == 2
    return _global_average(tracer, record, (x,), {}) if over_positions else tracer.nodeless(record, args, kwargs)


def _conv(tracer: _Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    b = _bind("x weight bias stride padding dilation groups", args, kwargs)
    return _weighted(tracer, record, b["x"], b["weight"], b["bias"], b["groups"] or 1, b["dilation"] or 1)


def _linear(tracer: _Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    b = _bind("x weight bias", args, kwargs)
    return _weighted(tracer, record, b["x"], b["weight"], b["bias"])


def _norm(primitive: str, names: str) -> Function:
    def handler(tracer: _Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
        b = _bind(names, args, kwargs)
        return _normalised(tracer, record, primitive, b["x"], b["weight"], b["bias"])

    return handler


NODELESS = [
    "abs", "add_scalar", "alpha_dropout", "bernoulli", "broadcast_to", "celu", "clamp", "clip", "clone",
    "constant_pad_nd", "contiguous", "cos", "detach", "div", "dropout", "dropout1d", "dropout2d", "dropout3d", "elu",
    "exp", "expand", "expand_as", "feature_alpha_dropout", "feature_dropout", "flatten", "flip", "float", "fill",
    "floordiv", "gelu", "getattr", "glu", "half", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "interpolate",
    "layout", "leaky_relu", "log", "log_sigmoid", "log_softmax", "logsigmoid", "masked_fill", "maximum", "minimum",
    "mish", "movedim", "moveaxis", "neg", "new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "norm",
    "normalize", "ones_like", "pad", "pixel_shuffle", "pixel_unshuffle", "pow", "rand_like", "randn_like",
    "reciprocal", "relu", "relu6", "repeat", "reshape", "reshape_as", "roll", "rot90", "rrelu", "rsqrt", "rtruediv",
    "selu", "sigmoid", "silu", "sin", "softmax", "softmin", "softplus", "softshrink", "softsign", "sqrt", "square",
    "squeeze", "sum", "tanh", "tanhshrink", "tile", "to", "true_divide", "truediv", "type", "type_as", "unflatten",
    "unfold", "unsqueeze", "upsample", "var", "view", "view_as", "where", "zeros_like", "cuda", "cpu", "double",
    "bfloat16", "requires_grad", "vector_norm", "channel_shuffle", "eq", "ne", "lt", "le", "gt", "ge", "and", "or",
    "not", "full_like", "empty_like",
]  # fmt: skip

FUNCTIONS: dict[str, Function] = {
    **dict.fromkeys(NODELESS, _pass),
    **dict.fromkeys(["chunk", "split", "split_with_sizes", "tensor_split", "unbind", "std_mean", "var_mean"], _several),
    **dict.fromkeys(["transpose", "permute", "t", "swapaxes", "swapdims", "adjoint"], _flip),
    **dict.fromkeys(["is_floating_point", "is_complex", "numel", "is_tensor"], _ask),
    **dict.fromkeys(["add", "sub", "iadd", "isub", "radd", "rsub", "subtract"], _add),
    **dict.fromkeys(["mul", "imul", "rmul", "multiply"], _multiply),
    **dict.fromkeys(["matmul", "bmm", "mm", "imatmul", "rmatmul", "einsum", "baddbmm"], _matmul),
    **dict.fromkeys(["cat", "concat", "concatenate", "stack", "hstack"], _concatenate),
    **dict.fromkeys(["conv1d", "conv2d"], _conv),
    **dict.fromkeys(["max_pool1d", "max_pool2d"], _pool("max_pool")),
    **dict.fromkeys(["avg_pool1d", "avg_pool2d"], _pool("avg_pool")),
    **dict.fromkeys(["adaptive_avg_pool1d", "adaptive_avg_pool2d"], _global_average),
    **dict.fromkeys(["adaptive_max_pool1d", "adaptive_max_pool2d"], _adaptive_max),
    "assert": _nothing,
    "batch_norm": _norm("bn", "x running_mean running_var weight bias"),
    "getitem": _getitem,
    "__getitem__": _getitem,
    "group_norm": _norm("ln", "x num_groups weight bias"),
    "instance_norm": _norm("ln", "x running_mean running_var weight bias"),
    "layer_norm": _norm("ln", "x normalized_shape weight bias"),
    "rms_norm": _norm("ln", "x normalized_shape weight"),
    "linear": _linear,
    "mean": _mean,
    "scaled_dot_product_attention": _attention,
}


# Modules: (tracer, module, args, kwargs) -> Value. They stand for themselves, whatever their forward does inside.

Module = Callable[[_Tracer, Any, tuple[Any, ...], dict[str, Any]], Any]


def _run_module(module: nn.Module) -> Callable[..., Any]:
    """Run ``module`` on meta tensors, with meta copies of all it holds."""

    def run(*args: Any, **kwargs: Any) -> Any:
        held = {name: _to_meta(tensor) for name, tensor in (*module.named_parameters(), *module.named_buffers())}
        return torch.func.functional_call(module, held, args, kwargs)

    run.__name__ = type(module).__name__
    return run


def _first(*args: Any, **kwargs: Any) -> Any:
    """The shape of the result of a module that keeps shapes; saves running it, which is slow on the meta device."""
    return next(iter((*args, *kwargs.values())))


def _held(tracer: _Tracer, module: nn.Module, attribute: str) -> Any:
    """A parameter of a leaf module as a Value; what is there instead, where it is none."""
    tensor = module._parameters.get(attribute)
    if tensor is not None:
        return tracer.parameter(tensor)
    return module.__dict__.get(attribute) or (torch.empty(0) if attribute in dir(type(module)) else None)


def _conv_module(tracer: _Tracer, m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    record = (_run_module(m), args, kwargs)
    weight, bias = _held(tracer, m, "weight"), _held(tracer, m, "bias")
    return _weighted(tracer, record, (args, kwargs), weight, bias, m.groups, m.dilation)


def _linear_module(tracer: _Tracer, m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    record = (_run_module(m), args, kwargs)
    return _weighted(tracer, record, (args, kwargs), _held(tracer, m, "weight"), _held(tracer, m, "bias"))


def _norm_module(primitive: str) -> Module:
    def handler(tracer: _Tracer, m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
        record = (_first, args, kwargs)
        weight, bias = _held(tracer, m, "weight"), _held(tracer, m, "bias")
        return _normalised(tracer, record, primitive, (args, kwargs), weight, bias)

    return handler


def _pool_module(primitive: str) -> Module:
    def handler(tracer: _Tracer, m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
        return _pooled(tracer, (_run_module(m), args, kwargs), primitive, (args, kwargs), m.kernel_size)

    return handler


def _global_average_module(tracer: _Tracer, m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    return _global_average(tracer, (_run_module(m), args, kwargs), args, kwargs)


def _adaptive_max_module(tracer: _Tracer, m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    x = next(_values((args, kwargs)))
    return _adaptive_max(tracer, (_run_module(m), args, kwargs), (x, m.output_size), {})


def _nodeless_module(tracer: _Tracer, m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    return tracer.nodeless((_run_module(m), args, kwargs), args, kwargs)


def _attention_module(tracer: _Tracer, m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``nn.MultiheadAttention``: projection, attention, projection; returns (output, None)."""
    record = (lambda *a, **k: _run_module(m)(*a, **k)[0], args, kwargs)
    if m.in_proj_weight is None or m.bias_k is not None or kwargs.get("need_weights", False) is True:
        tracer.unsupported.append(("MultiheadAttention with separate projections or weights", tracer.path))
        return tracer.nodeless(record, args, kwargs), None
    inner = _weighted(
        tracer, record, (args, kwargs), _held(tracer, m, "in_proj_weight"), _held(tracer, m, "in_proj_bias")
    )
    attended = _activation(tracer, record, tracer.add("msa", inner.sources, tracer.path, None))
    out = m.out_proj
    return _weighted(tracer, record, attended, _held(tracer, out, "weight"), _held(tracer, out, "bias")), None


MODULES: dict[type[nn.Module], Module] = {
    nn.Conv1d: _conv_module,
    nn.Conv2d: _conv_module,
    nn.Linear: _linear_module,
    **dict.fromkeys([nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm], _norm_module("bn")),
    **dict.fromkeys([nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm1d, nn.InstanceNorm2d], _norm_module("ln")),
    **dict.fromkeys([nn.MaxPool1d, nn.MaxPool2d], _pool_module("max_pool")),
    **dict.fromkeys([nn.AvgPool1d, nn.AvgPool2d], _pool_module("avg_pool")),
    **dict.fromkeys([nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d], _global_average_module),
    nn.AdaptiveMaxPool2d: _adaptive_max_module,
    nn.MultiheadAttention: _attention_module,
    **dict.fromkeys(
        [
            nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.ReLU,
            nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh,
            nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softmax, nn.LogSoftmax, nn.LogSigmoid,
            nn.Softsign, nn.GLU, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.PixelShuffle,
            nn.PixelUnshuffle, nn.ChannelShuffle, nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d,
            nn.ReplicationPad2d, nn.LocalResponseNorm,
        ],
        _nodeless_module,
    ),
}  # fmt: skip

# Known by name, so that their packages need not be installed: branches dropped at random while training.
NODELESS_MODULES = frozenset({"StochasticDepth", "DropPath"})


@functools.cache
def _module_handler(kind: type[nn.Module]) -> Module | None:
    """How a module is understood as a whole; None to look inside. A subclass with its own forward is looked into."""
    for base in kind.__mro__:
        if base in MODULES:
            return MODULES[base] if kind.forward is base.forward else None
    if kind.__name__ in NODELESS_MODULES:
        return _nodeless_module
    return None
