"""Running a network's forward on stand-ins for tensors (torch.fx), to see what follows what.

Every module, function and operator that a ``Value`` meets is looked up in the tables of ``operations.py``; what is in
none is collected and reported. A ``Value`` knows the nodes its number depends on directly; operations without a node
(activations, reshapes) pass them on. Shapes are worked out only where the network asks for one, on the meta device.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedParameter

from pudnet.errors import DtypeError, InputError, message
from pudnet.graphs.graph import ArchGraph, GraphNode, GraphParameter, Shape4, assemble

WHERE = "graphs.trace"
BATCH = 2  # images in the stand-in batch


class Value(fx.Proxy):
    """A stand-in for one tensor (or tuple of tensors) of the traced forward.

    Attributes:
        sources: nodes it depends on directly; empty for parameters and constants.
        parameters: names of the parameters it is made of, where it has no sources.
        transposed: the parameter was transposed on the way.
        record: (run, args, kwargs) to work out its shape.
    """

    tracer: Tracer

    def __init__(
        self,
        tracer: Tracer,
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
            handler = self.tracer.functions[name]
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
        tracer = next(value.tracer for value in values((args, kwargs)))
        return tracer.create_proxy("call_function", function, args, kwargs)


class Traced(Exception):
    """Control flow that depends on numbers; carries the message."""


# Methods that ask for numbers, and those whose answer follows from shape and dtype.
NUMBERS = frozenset({"item", "tolist", "numpy", "nonzero", "unique"})
QUESTIONS = frozenset(
    {"size", "dim", "ndimension", "numel", "nelement", "stride", "is_floating_point", "is_complex", "is_contiguous",
     "element_size", "get_device", "__len__"}
)  # fmt: skip


def values(nested: Any) -> Iterator[Value]:
    """Every Value in nested tuples, lists, dictionaries and slices."""
    if isinstance(nested, Value):
        yield nested
    elif isinstance(nested, (tuple, list)):
        for item in nested:
            yield from values(item)
    elif isinstance(nested, dict):
        for item in nested.values():
            yield from values(item)
    elif isinstance(nested, slice):
        yield from values((nested.start, nested.stop, nested.step))


class Tracer(fx.Tracer):
    """One run of ``trace``.

    Args:
        module: the network.
        input_shape: of one input, without the batch.
        functions: what to do with a function, method or operator, by its name.
        module_handler: what to do with a module of a type; None to look inside.
    """

    def __init__(
        self,
        module: nn.Module,
        input_shape: tuple[int, ...],
        functions: Mapping[str, Function],
        module_handler: Callable[[type[nn.Module]], Module | None],
    ) -> None:
        super().__init__(autowrap_modules=(math,))
        self.module, self.input_shape = module, input_shape
        self.functions, self.module_handler = functions, module_handler
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
            hint = "pudnet.graphs.operations lists what is known (MODULES, FUNCTIONS)."
            raise InputError(message(WHERE, "module", "made of known operations", f"{listed}", hint))
        if problem is not None:
            raise InputError(message(WHERE, "module", "traceable with one input tensor", problem))
        if not isinstance(self.output, Value) or isinstance(self.output.record[0], Several):
            kind = "a tuple" if isinstance(self.output, Value) else type(self.output).__name__
            hint = "Wrap it in a module that returns one tensor; a network with auxiliary outputs may need .eval()."
            raise InputError(message(WHERE, "module", "a network that returns one tensor", kind, hint))
        unused = [name for name in self.shapes if name not in self.owners]
        parameters = [self.owners[name] for name in self.shapes if name in self.owners]
        found = assemble(self.nodes, self.predecessors, parameters, unused, sorted(self.output.sources))
        # Values hold the tracer that holds them: so they go at once, not in a garbage collection.
        self.output, self.known = None, {}
        return found

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
        handler = self.functions.get(name)
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
        return Value(self, (lambda: to_meta(tensor), (), {}), parameters=frozenset({self.names[id(tensor)]}))

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.evaluating or next(values((args, kwargs)), None) is None:
            return forward(*args, **kwargs)
        self.stack.append(self.path_of_module(m))
        handler = self.module_handler(type(m))
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
        for value in values((args, kwargs)):
            sources, parameters = sources | value.sources, parameters | value.parameters
            flips += value.transposed
        if sources and parameters:
            self.unsupported.append((f"{function_name(record[0])} with parameter {listed(parameters)}", self.path))
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
                    missing = [each for each in values((args, kwargs)) if id(each) not in self.known]
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
            return to_meta(nested)
        if isinstance(nested, (tuple, list)) and not isinstance(nested, torch.Size):
            return type(nested)(self._known(item) for item in nested)
        if isinstance(nested, dict):
            return {key: self._known(item) for key, item in nested.items()}
        return nested


def to_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def function_name(function: Any) -> str:
    return getattr(function, "__name__", str(function))


def listed(names: frozenset[str]) -> str:
    return ", ".join(map(repr, sorted(names)))


class Several:
    """Marks the record of an operation that returns several tensors."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run
        self.__name__ = function_name(run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


# What the tables hold: (tracer, record, args, kwargs) -> result, and (tracer, module, args, kwargs) -> result.
Function = Callable[[Tracer, tuple[Any, ...], tuple[Any, ...], dict[str, Any]], Any]
Module = Callable[[Tracer, Any, tuple[Any, ...], dict[str, Any]], Any]
