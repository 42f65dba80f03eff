"""The operations that ``trace`` understands: which nodes each makes, and which parameters those own."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pudnet.graphs.graph import Shape4
from pudnet.graphs.stand_ins import Function, Module, Several, Tracer, Value, function_name, listed, to_meta, values

# Functions.


def _pass(tracer: Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    return tracer.nodeless(record, args, kwargs)


def _several(tracer: Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    return tracer.nodeless((Several(record[0]), args, kwargs), args, kwargs)


def _ask(tracer: Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A question about shape or dtype, asked as a function."""
    return record[0](*(value.evaluate() if isinstance(value, Value) else value for value in args), **kwargs)


def _nothing(tracer: Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    return None


def _getitem(tracer: Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    value = tracer.nodeless(record, args, kwargs)
    owner = args[0]
    if value.parameters and not _keeps_all(args[1]) and not isinstance(owner.record[0], Several):
        tracer.unsupported.append((f"indexing of parameter {listed(value.parameters)}", tracer.path))
    return value


def _keeps_all(index: Any) -> bool:
    """Whether an index only adds dimensions."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or part == slice(None) for part in parts)


def _flip(tracer: Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
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


def _activation(tracer: Tracer, record: tuple[Any, ...], node: int) -> Value:
    return Value(tracer, record, frozenset({node}))


def _sources(*operands: Any) -> frozenset[int]:
    return frozenset().union(*(value.sources for value in values(operands)))


def _parameter_of(tracer: Tracer, operand: Any) -> str | None:
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
    tracer: Tracer,
    record: tuple[Any, ...],
    x: Any,
    weight: Any,
    bias: Any,
    groups: int = 1,
    dilation: Any = 1,
    upward: bool = False,
) -> Value:
    """A convolution or linear map, and its bias; ``upward``: a transposed convolution."""
    name, bias_name = _parameter_of(tracer, weight), _parameter_of(tracer, bias)
    stored = tracer.shapes[name] if name else ()
    flipped = name is not None and weight.transposed
    known = name is not None and (bias is None or bias_name is not None) and 2 <= len(stored) <= 4
    if not known or (flipped and len(stored) > 2) or not _sources(x):
        _refuse(tracer, record, "whose weight or bias is not one parameter")
        return tracer.nodeless(record, (x,), {})
    assert name is not None
    dilated = any(step > 1 for step in (dilation if isinstance(dilation, (tuple, list)) else (dilation,)))
    primitive = "conv" if groups == 1 else "dil_conv" if dilated else "sep_conv"
    # (O, I / groups, ...), however it is stored; a transposed convolution's is (I, O / groups, ...).
    shape = (stored[1] * groups, stored[0] // groups, *stored[2:]) if flipped or upward else stored
    node = tracer.add(primitive, _sources(x), name, _weight_shape(shape))
    tracer.own(name, node, "weight", flipped or upward)
    if bias_name is not None:
        node = _added_bias(tracer, frozenset({node}), bias_name)
    return _activation(tracer, record, node)


def _refuse(tracer: Tracer, record: tuple[Any, ...], why: str) -> None:
    tracer.unsupported.append((f"{function_name(record[0])} {why}", tracer.path))


def _added_bias(tracer: Tracer, sources: frozenset[int], name: str) -> int:
    node = tracer.add("bias", sources, name, _vector_shape(tracer.shapes[name]))
    tracer.own(name, node, "bias")
    return node


def _normalised(tracer: Tracer, record: tuple[Any, ...], primitive: str, x: Any, weight: Any, bias: Any) -> Value:
    """A normalisation: a node where it has parameters; its bias is part of it."""
    name, bias_name = _parameter_of(tracer, weight), _parameter_of(tracer, bias)
    if (weight is not None and name is None) or (bias is not None and bias_name is None):
        tracer.unsupported.append(
            (f"{function_name(record[0])} whose weight or bias is not one parameter", tracer.path)
        )
    owner = name or bias_name
    if owner is None:
        return tracer.nodeless(record, (x,), {})
    if not all(_is_vector(tracer.shapes[each]) for each in (name, bias_name) if each):
        _refuse(tracer, record, "over more than one dimension")
    node = tracer.add(primitive, _sources(x), owner, _vector_shape(tracer.shapes[owner]))
    for each, kind in ((name, "scale"), (bias_name, "bias")):
        if each:
            tracer.own(each, node, kind)
    return _activation(tracer, record, node)


def _add(tracer: Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    operands = list(values((args, kwargs)))
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
    tracer: Tracer, record: tuple[Any, ...], primitive: str, operands: list[Value], args: Any, kwargs: Any
) -> Value:
    """A node where branches meet; none where all operands come from the same place."""
    if len({value.sources for value in operands if value.sources}) < 2:
        return tracer.nodeless(record, args, kwargs)
    return _activation(tracer, record, tracer.add(primitive, _sources(operands), tracer.path, None))


def _multiply(tracer: Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    operands = list(values((args, kwargs)))
    active = [value for value in operands if value.sources]
    name = next((_parameter_of(tracer, value) for value in operands if value.parameters), None)
    if len(active) == 1 and name is not None and _is_vector(tracer.shapes[name]):
        node = tracer.add("ln", active[0].sources, name, _vector_shape(tracer.shapes[name]))
        tracer.own(name, node, "scale")
        return _activation(tracer, record, node)
    return _joined(tracer, record, "cse", operands, args, kwargs)


def _matmul(tracer: Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    operands = list(values((args, kwargs)))
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


def _attended(tracer: Tracer, record: tuple[Any, ...], operands: Any) -> Value:
    """A product of activations: attention. Two in a row (scores, then values) are one node."""
    return _activation(tracer, record, tracer.add("msa", _sources(operands), tracer.path, None, product=True))


def _attention(tracer: Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    return _activation(tracer, record, tracer.add("msa", _sources(args, kwargs), tracer.path, None))


def _concatenate(tracer: Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    parts = list(values((args, kwargs)))
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
    def handler(tracer: Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
        bound = _bind("x kernel_size", args, kwargs)
        return _pooled(tracer, record, primitive, bound["x"], bound["kernel_size"])

    return handler


def _pooled(tracer: Tracer, record: tuple[Any, ...], primitive: str, x: Any, kernel: Any) -> Value:
    sizes = tuple(kernel) if isinstance(kernel, (tuple, list)) else (kernel, kernel)
    height, width = sizes if len(sizes) == 2 else (1, sizes[0])
    node = tracer.add(primitive, _sources(x), tracer.path, (1, 1, int(height), int(width)))
    return _activation(tracer, record, node)


def _global_average(tracer: Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    return _activation(tracer, record, tracer.add("glob_avg", _sources(args, kwargs), tracer.path, None))


def _adaptive_max(tracer: Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    bound = _bind("x output_size", args, kwargs)
    size = bound["output_size"]
    out = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    into = bound["x"].evaluate().shape[-2:]
    kernel = tuple(-(-a // (b or a)) for a, b in zip(into, out, strict=True))
    return _pooled(tracer, record, "max_pool", bound["x"], kernel)


def _mean(tracer: Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
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


def _conv(tracer: Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    b = _bind("x weight bias stride padding dilation groups", args, kwargs)
    return _weighted(tracer, record, b["x"], b["weight"], b["bias"], b["groups"] or 1, b["dilation"] or 1)


def _conv_transpose(tracer: Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    b = _bind("x weight bias stride padding output_padding groups dilation", args, kwargs)
    groups, dilation = b["groups"] or 1, b["dilation"] or 1
    return _weighted(tracer, record, b["x"], b["weight"], b["bias"], groups, dilation, upward=True)


def _prelu(tracer: Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    b = _bind("x weight", args, kwargs)
    return _sloped(tracer, record, b["x"], b["weight"])


def _sloped(tracer: Tracer, record: tuple[Any, ...], x: Any, slope: Any) -> Value:
    """A leaky activation with learned slopes; they are decoded as a bias is, near 0: close to a ReLU."""
    name = _parameter_of(tracer, slope)
    if name is None:
        return tracer.nodeless(record, (x, slope), {})
    return _activation(tracer, record, _added_bias(tracer, _sources(x), name))


def _linear(tracer: Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    b = _bind("x weight bias", args, kwargs)
    return _weighted(tracer, record, b["x"], b["weight"], b["bias"])


def _norm(primitive: str, names: str) -> Function:
    def handler(tracer: Tracer, record: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
        b = _bind(names, args, kwargs)
        return _normalised(tracer, record, primitive, b["x"], b["weight"], b["bias"])

    return handler


NODELESS = [
    "abs", "add_scalar", "alpha_dropout", "bernoulli", "broadcast_to", "celu", "clamp", "clip", "clone",
    "constant_pad_nd", "contiguous", "cos", "data", "detach", "div", "dropout", "dropout1d", "dropout2d", "dropout3d",
    "elu", "exp", "expand", "expand_as", "feature_alpha_dropout", "feature_dropout", "flatten", "flip", "float", "fill",
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
    **dict.fromkeys(["transpose", "permute", "t", "T", "mT", "swapaxes", "swapdims", "adjoint"], _flip),
    **dict.fromkeys(["is_floating_point", "is_complex", "numel", "is_tensor"], _ask),
    **dict.fromkeys(["add", "sub", "iadd", "isub", "radd", "rsub", "subtract"], _add),
    **dict.fromkeys(["mul", "imul", "rmul", "multiply"], _multiply),
    **dict.fromkeys(["matmul", "bmm", "mm", "imatmul", "rmatmul", "einsum", "baddbmm"], _matmul),
    **dict.fromkeys(["cat", "concat", "concatenate", "stack", "hstack"], _concatenate),
    **dict.fromkeys(["conv1d", "conv2d"], _conv),
    **dict.fromkeys(["conv_transpose1d", "conv_transpose2d"], _conv_transpose),
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
    "prelu": _prelu,
    "scaled_dot_product_attention": _attention,
}


# Modules. They stand for themselves, whatever their forward does inside.


def _run_module(module: nn.Module) -> Callable[..., Any]:
    """Run ``module`` on meta tensors, with meta copies of all it holds."""

    def run(*args: Any, **kwargs: Any) -> Any:
        held = {name: to_meta(tensor) for name, tensor in (*module.named_parameters(), *module.named_buffers())}
        return torch.func.functional_call(module, held, args, kwargs)

    run.__name__ = type(module).__name__
    return run


def _first(*args: Any, **kwargs: Any) -> Any:
    """The shape of the result of a module that keeps shapes; saves running it, which is slow on the meta device."""
    return next(iter((*args, *kwargs.values())))


def _held(tracer: Tracer, module: nn.Module, attribute: str) -> Any:
    """A parameter of a leaf module as a Value; what is there instead, where it is none."""
    tensor = module._parameters.get(attribute)
    if tensor is not None:
        return tracer.parameter(tensor)
    return module.__dict__.get(attribute) or (torch.empty(0) if hasattr(type(module), attribute) else None)


def _conv_module(tracer: Tracer, m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    record = (_run_module(m), args, kwargs)
    weight, bias = _held(tracer, m, "weight"), _held(tracer, m, "bias")
    return _weighted(tracer, record, (args, kwargs), weight, bias, m.groups, m.dilation, upward=m.transposed)


def _prelu_module(tracer: Tracer, m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    return _sloped(tracer, (_first, args, kwargs), (args, kwargs), _held(tracer, m, "weight"))


def _linear_module(tracer: Tracer, m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    record = (_run_module(m), args, kwargs)
    return _weighted(tracer, record, (args, kwargs), _held(tracer, m, "weight"), _held(tracer, m, "bias"))


def _norm_module(primitive: str) -> Module:
    def handler(tracer: Tracer, m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
        record = (_first, args, kwargs)
        weight, bias = _held(tracer, m, "weight"), _held(tracer, m, "bias")
        return _normalised(tracer, record, primitive, (args, kwargs), weight, bias)

    return handler


def _pool_module(primitive: str) -> Module:
    def handler(tracer: Tracer, m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
        return _pooled(tracer, (_run_module(m), args, kwargs), primitive, (args, kwargs), m.kernel_size)

    return handler


def _global_average_module(tracer: Tracer, m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    return _global_average(tracer, (_run_module(m), args, kwargs), args, kwargs)


def _adaptive_max_module(tracer: Tracer, m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    x = next(values((args, kwargs)))
    return _adaptive_max(tracer, (_run_module(m), args, kwargs), (x, m.output_size), {})


def _nodeless_module(tracer: Tracer, m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    return tracer.nodeless((_run_module(m), args, kwargs), args, kwargs)


def _attention_module(tracer: Tracer, m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
    **dict.fromkeys([nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d], _conv_module),
    nn.PReLU: _prelu_module,
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
def module_handler(kind: type[nn.Module]) -> Module | None:
    """How a module is understood as a whole; None to look inside. A subclass with its own forward is looked into."""
    for base in kind.__mro__:
        if base in MODULES:
            return MODULES[base] if kind.forward is base.forward else None
    if kind.__name__ in NODELESS_MODULES:
        return _nodeless_module
    return None
