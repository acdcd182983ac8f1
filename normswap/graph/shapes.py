"""Shapes of a region's values: seen in a run, or inferred from the operations without one.

An inferred dimension is a number where an operation fixes it and a :class:`Symbol` otherwise; equal symbols are equal
sizes. A shape is ``None`` where not even the rank is known. What an operation does not prove is not assumed."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules import pooling
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from normswap import registry
from normswap.errors import Refusal
from normswap.graph.trace import Region


class Symbol:
    """A size that is not known; equal only to itself."""

    def __repr__(self) -> str:
        return "?"


Dim = int | Symbol
Shape = tuple[Dim, ...]
Value = Any
"""What is known of a node: a Shape, a Dim (a size), a list of values (a tuple result), or ``None``."""

STATED = "normswap_shape"
"""In a node's ``meta``: its Value, where whoever made the graph knows it."""


def known(values: dict[fx.Node, Value], node: Any) -> Shape | None:
    """The shape of a node's value where it is one tensor of known rank."""
    value = values.get(node) if isinstance(node, fx.Node) else None
    return value if isinstance(value, tuple) else None


def product(dims: Iterable[Dim]) -> tuple[int, Counter[Symbol]]:
    number, symbols = 1, Counter[Symbol]()
    for dim in dims:
        if isinstance(dim, int):
            number *= dim
        else:
            symbols[dim] += 1
    return number, symbols


def same_size(ours: Iterable[Dim], theirs: Iterable[Dim]) -> bool:
    """Whether two runs of dimensions have provably the same number of elements."""
    return product(ours) == product(theirs)


def position(axis: int, shape: Shape | None) -> int | None:
    """An axis counted from the left, where that is known."""
    if axis >= 0:
        return axis
    return None if shape is None else axis + len(shape)


class _Recorder(fx.Interpreter):
    def __init__(self, region: Region) -> None:
        super().__init__(region.module, graph=region.graph)
        self.constants = region.constants
        self.values: dict[fx.Node, Value] = {}

    def fetch_attr(self, target: str) -> Any:
        return self.constants[target] if target in self.constants else super().fetch_attr(target)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.values[n] = _of_result(result)
        return result


def _of_result(result: Any) -> Value:
    if isinstance(result, Tensor):
        return tuple(int(size) for size in result.shape)
    if isinstance(result, torch.Size):
        return [int(size) for size in result]
    if isinstance(result, (list, tuple)):
        return [_of_result(item) for item in result]
    return result if isinstance(result, int) else None


def seen(region: Region, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[fx.Node, Value], Any]:
    """The shapes of all values in one run of the region's graph on real inputs, and its output."""
    recorder = _Recorder(region)
    names = [str(node.target) for node in region.graph.nodes if node.op == "placeholder"]
    positional = list(args)
    for name in names[len(args) :]:
        if name not in kwargs:
            break
        positional.append(kwargs[name])
    output = recorder.run(*positional, enable_io_processing=False)
    return recorder.values, output


def inferred(region: Region) -> dict[fx.Node, Value]:
    """What the operations alone prove about the shapes of all values."""
    values: dict[fx.Node, Value] = {}
    for node in region.graph.nodes:
        try:
            values[node] = _infer(region, node, values)
        except (TypeError, ValueError, IndexError, KeyError, AttributeError):
            values[node] = None
    return values


def _infer(region: Region, node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    if node.meta.get(STATED) is not None:
        return node.meta[STATED]
    if node.op == "get_attr":
        value: Any = region.constants.get(str(node.target), region.module)
        for part in () if value is not region.module else str(node.target).split("."):
            value = getattr(value, part)
        return tuple(value.shape) if isinstance(value, Tensor) else None
    if node.op == "call_module":
        module = region.module_of(node)
        assert module is not None
        return _of_module(module, known(values, first(node)))
    if node.op in ("call_function", "call_method"):
        rule = _RULES.get(node.target)
        return None if rule is None else rule(node, values)
    return None


def _of_module(module: nn.Module, shape: Shape | None) -> Value:
    if isinstance(module, _ConvNd):
        spatial = len(module.kernel_size)
        batch = shape[0] if shape is not None and len(shape) == spatial + 2 else Symbol()
        keeps = shape is not None and not isinstance(module, _ConvTransposeNd) and _keeps_size(module)
        sizes = shape[2:] if keeps and shape is not None else [Symbol() for _ in range(spatial)]
        return (batch, module.out_channels, *sizes)
    if isinstance(module, (nn.Linear, nn.Bilinear)):
        return None if shape is None else (*shape[:-1], module.out_features)
    if isinstance(module, nn.Embedding):
        return None if shape is None else (*shape, module.embedding_dim)
    if isinstance(module, nn.EmbeddingBag):
        return (Symbol(), module.embedding_dim)
    if registry.registered(module):
        return shape if shape is not None else _of_norm(module)
    if isinstance(module, (pooling._AvgPoolNd, pooling._MaxPoolNd, nn.Upsample)):
        return None if shape is None else (*shape[:2], *(Symbol() for _ in shape[2:]))
    if isinstance(module, (pooling._AdaptiveAvgPoolNd, pooling._AdaptiveMaxPoolNd)):
        return _adaptive(shape, module.output_size)
    if isinstance(module, nn.Flatten):
        return _flattened(shape, module.start_dim, module.end_dim)
    elementwise = type(module).__module__.startswith(("torch.nn.modules.activation", "torch.nn.modules.dropout"))
    if (elementwise and not isinstance(module, (nn.MultiheadAttention, nn.GLU))) or isinstance(module, nn.Identity):
        return shape
    return None


def _keeps_size(module: _ConvNd) -> bool:
    if isinstance(module.padding, str):
        return module.padding == "same"
    return all(
        stride == 1 and 2 * padding == dilation * (kernel - 1)
        for stride, padding, dilation, kernel in zip(
            module.stride, module.padding, module.dilation, module.kernel_size, strict=True
        )
    )


def _of_norm(module: nn.Module) -> Value:
    try:
        norm = registry.read(module)
    except Refusal:
        return None
    if norm.channel_axis != 1 or norm.ranks is None or len(norm.ranks) != 1:
        return None
    return (Symbol(), norm.channels, *(Symbol() for _ in range(next(iter(norm.ranks)) - 2)))


def _adaptive(shape: Shape | None, size: Any) -> Value:
    if shape is None:
        return None
    sizes = size if isinstance(size, (tuple, list)) else [size] * (len(shape) - 2)
    return (*shape[:2], *(Symbol() if s is None else s for s in sizes))


def _flattened(shape: Shape | None, start: int, end: int) -> Value:
    if shape is None:
        return None
    start, end = start % len(shape), end % len(shape)
    number, symbols = product(shape[start : end + 1])
    merged: Dim = number if not symbols else Symbol()
    if number == 1 and sum(symbols.values()) == 1:
        merged = next(iter(symbols))
    return (*shape[:start], merged, *shape[end + 1 :])


Rule = Callable[[fx.Node, dict[fx.Node, Value]], Value]


_OTHER_NAMES = {
    "dim": "axis", "keepdim": "keepdims", "dim0": "axis0", "dim1": "axis1", "input": "tensor",
    "split_size": "split_size_or_sections",
}  # fmt: skip


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument of a call by position or by name, or by the other name that torch takes for it."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, node.kwargs.get(_OTHER_NAMES.get(name, name), default))


def first(node: fx.Node) -> Any:
    """The tensor that a call works on."""
    return argument(node, 0, "input")


def _same(node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    return known(values, first(node))


def _binary(node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    operands = [a for a in _operands(node) if isinstance(a, fx.Node)]
    if all(isinstance(values.get(a), (int, Symbol)) for a in operands):
        return Symbol()  # arithmetic of sizes
    shapes = [known(values, a) for a in operands if not isinstance(values.get(a), (int, Symbol))]
    if len(shapes) == 1:
        return shapes[0]
    ours, theirs = shapes
    if ours is None or theirs is None:
        return None
    longer, shorter = sorted((ours, theirs), key=len, reverse=True)
    padded: Shape = (*[1] * (len(longer) - len(shorter)), *shorter)
    return tuple(map(_broadcast, longer, padded))


def _operands(node: fx.Node) -> tuple[Any, Any]:
    return first(node), argument(node, 1, "other")


def _broadcast(a: Dim, b: Dim) -> Dim:
    if a == 1 or a == b:
        return b
    if b == 1 or isinstance(a, int):
        return a
    return b if isinstance(b, int) else Symbol()  # either may turn out to be 1


def _arithmetic(node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    a, b = (values.get(v) if isinstance(v, fx.Node) else v for v in _operands(node))
    if isinstance(a, int) and isinstance(b, int):
        return node.target(a, b) if callable(node.target) else None
    return _binary(node, values)


def _permute(node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    shape = known(values, first(node))
    order = permutation(node, None if shape is None else len(shape))
    return None if shape is None or order is None else tuple(shape[index] for index in order)


def permutation(node: fx.Node, rank: int | None) -> list[int] | None:
    """The order of axes of a permute, transpose or movedim: output axis -> input axis."""
    if node.target in ("permute", torch.permute):
        given: Any = node.args[1:] or (node.kwargs.get("dims", ()),)
        dims = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
        return [d % len(dims) for d in dims] if dims and all(isinstance(d, int) for d in dims) else None
    if rank is None:
        return None
    if node.target in ("t", torch.t):
        return [1, 0] if rank == 2 else list(range(rank))
    if node.target in ("movedim", torch.movedim):
        sources, destinations = _axes(argument(node, 1, "source"), rank), _axes(argument(node, 2, "destination"), rank)
    else:
        pair = argument(node, 1, "dim0"), argument(node, 2, "dim1")
        sources, destinations = _axes(pair, rank), _axes(pair[::-1], rank)
    if sources is None or destinations is None:
        return None
    moved = dict(zip(destinations, sources, strict=True))
    others = iter(axis for axis in range(rank) if axis not in sources)
    return [moved[axis] if axis in moved else next(others) for axis in range(rank)]


def _axes(given: Any, rank: int) -> list[int] | None:
    axes = given if isinstance(given, (tuple, list)) else (given,)
    return [axis % rank for axis in axes] if all(isinstance(axis, int) for axis in axes) else None


def _flatten(node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    start, end = argument(node, 1, "start_dim", 0), argument(node, 2, "end_dim", -1)
    return _flattened(known(values, first(node)), start, end)


def _reshape(node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    shape = known(values, first(node))
    if node.target in ("reshape_as", "view_as"):
        return known(values, argument(node, 1, "other"))
    given: Any = node.args[1:] if len(node.args) > 1 else (node.kwargs.get("shape", node.kwargs.get("size")),)
    if len(given) == 1 and isinstance(given[0], (tuple, list)):
        given = given[0]
    elif len(given) == 1 and isinstance(values.get(given[0]), list):
        given = values[given[0]]
    elif len(given) == 1 and isinstance(given[0], fx.Node) and not isinstance(values.get(given[0]), (int, Symbol)):
        return None  # it may be a whole shape
    if not all(isinstance(d, (int, Symbol, fx.Node)) for d in given):
        return None  # view(dtype)
    dims: list[Any] = [values.get(d) if isinstance(d, fx.Node) else d for d in given]
    dims = [d if isinstance(d, (int, Symbol)) else Symbol() for d in dims]
    if -1 in dims:
        at = dims.index(-1)
        dims[at] = Symbol()
        if shape is not None:
            number, symbols = product(shape)
            others, other_symbols = product(dims[:at] + dims[at + 1 :])
            left = symbols - other_symbols
            if not other_symbols - symbols and others and number % others == 0:
                if not left:
                    dims[at] = number // others
                elif number == others and sum(left.values()) == 1:
                    dims[at] = next(iter(left))
    return tuple(dims)


def _size(node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    shape = known(values, first(node))
    dim = argument(node, 1, "dim")
    if dim is None:
        return None if shape is None else list(shape)
    return shape[dim] if shape is not None and isinstance(dim, int) else Symbol()


def _getattr(node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    if node.args[1] == "shape":
        shape = known(values, first(node))
        return None if shape is None else list(shape)
    return None


def _getitem(node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    source, index = node.args[:2]
    value = values.get(source) if isinstance(source, fx.Node) else None
    if isinstance(value, list):
        return value[index]  # type: ignore[index]
    if not isinstance(value, tuple):
        return Symbol() if _is_shape(source) else None
    out: list[Dim] = []
    rest = list(value)
    for item in index if isinstance(index, tuple) else (index,):
        if item is None:
            out.append(1)
        elif item is Ellipsis or not isinstance(item, (slice, int)):
            return None
        elif isinstance(item, slice):
            size = rest.pop(0)
            out.append(size if item == slice(None) else Symbol())
        else:
            rest.pop(0)
    return (*out, *rest)


def _is_shape(source: Any) -> bool:
    return isinstance(source, fx.Node) and (source.target == "size" or source.args[1:2] == ("shape",))


def _squeeze(node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    shape = known(values, first(node))
    dim = argument(node, 1, "dim")
    if shape is None or not isinstance(dim, int):
        return None
    at = dim % len(shape)
    return (*shape[:at], *shape[at + 1 :]) if shape[at] == 1 else None


def _unsqueeze(node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    shape = known(values, first(node))
    if shape is None:
        return None
    at = int(argument(node, 1, "dim")) % (len(shape) + 1)
    return (*shape[:at], 1, *shape[at:])


def _cat(node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    parts = argument(node, 0, "tensors")
    if not isinstance(parts, (tuple, list)):
        return None
    shapes = [known(values, part) for part in parts]
    if any(shape is None for shape in shapes):
        return None
    first = shapes[0]
    assert first is not None
    at = int(argument(node, 1, "dim", 0)) % len(first)
    sizes = [shape[at] for shape in shapes if shape is not None]
    total: Dim = sum(s for s in sizes if isinstance(s, int)) if all(isinstance(s, int) for s in sizes) else Symbol()
    return (*first[:at], total, *first[at + 1 :])


def _pieces(node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    shape = known(values, first(node))
    if shape is None:
        return None
    at = int(argument(node, 2, "dim", 0)) % len(shape)
    size, given = shape[at], argument(node, 1, "split_size" if "split" in str(node.target) else "chunks")
    if isinstance(given, (tuple, list)):
        sizes = list(given)
    elif not isinstance(size, int):
        return None
    else:
        step = given if "split" in str(node.target) else -(-size // given)
        sizes = [min(step, size - start) for start in range(0, size, step)]
    return [(*shape[:at], s, *shape[at + 1 :]) for s in sizes]


def _pooled(node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    shape = known(values, first(node))
    return None if shape is None else (*shape[:2], *(Symbol() for _ in shape[2:]))


def _adaptive_function(node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    return _adaptive(known(values, first(node)), argument(node, 1, "output_size"))


def _mean(node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    shape = known(values, first(node))
    dims = argument(node, 1, "dim")
    if shape is None or dims is None:
        return None
    over = {int(d) % len(shape) for d in (dims if isinstance(dims, (tuple, list)) else (dims,))}
    if argument(node, 2, "keepdim", False):
        return tuple(1 if i in over else d for i, d in enumerate(shape))
    return tuple(d for i, d in enumerate(shape) if i not in over)


def _padded(node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    shape, pad = known(values, first(node)), argument(node, 1, "pad")
    if shape is None or not isinstance(pad, (tuple, list)):
        return None
    keep = len(shape) - len(pad) // 2
    return (*shape[:keep], *(Symbol() for _ in shape[keep:]))


def _linear(node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    shape, weight = known(values, first(node)), known(values, argument(node, 1, "weight"))
    return None if shape is None or weight is None else (*shape[:-1], weight[0])


def _conv(node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    weight = known(values, argument(node, 1, "weight"))
    return None if weight is None else (Symbol(), weight[0], *(Symbol() for _ in weight[2:]))


def _conv_transpose(node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    weight, groups = known(values, argument(node, 1, "weight")), argument(node, 6, "groups", 1)
    if weight is None or not isinstance(weight[1], int) or not isinstance(groups, int):
        return None
    return (Symbol(), weight[1] * groups, *(Symbol() for _ in weight[2:]))


def _matmul(node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    ours, theirs = (known(values, operand) for operand in _operands(node))
    if ours is None or theirs is None or len(ours) < 2 or ours[:-2] != theirs[:-2]:
        return None
    return (*ours[:-1], theirs[-1])


ELEMENTWISE: tuple[Any, ...] = (
    F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.hardsigmoid, F.hardtanh, F.leaky_relu, F.elu, F.dropout, F.mish,
    F.sigmoid, F.tanh, F.softmax, F.log_softmax, torch.relu, torch.relu_, torch.sigmoid, torch.tanh, torch.softmax,
    torch.clamp, torch.neg, torch.exp, torch.abs, torch.sqrt, torch.rsqrt, torch.clone,
    "relu", "relu_", "sigmoid", "tanh", "softmax", "clamp", "clamp_", "contiguous", "clone", "detach", "neg", "exp",
    "abs", "sqrt", "rsqrt", "float", "double", "half", "to", "type_as", "mul_", "add_", "sub_", "div_", "roll",
    torch.roll,
)  # fmt: skip


_RULES: dict[Any, Rule] = dict.fromkeys(ELEMENTWISE, _same)
_RULES |= dict.fromkeys((operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv), _arithmetic)
_RULES |= dict.fromkeys(
    (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv), _arithmetic
)
_RULES |= dict.fromkeys((torch.add, torch.sub, torch.mul, torch.div, "add", "sub", "mul", "div"), _binary)
_RULES |= dict.fromkeys(
    ("permute", torch.permute, "transpose", torch.transpose, "swapaxes", torch.swapaxes, "movedim", torch.movedim, "t"),
    _permute,
)
_RULES |= dict.fromkeys(("flatten", torch.flatten), _flatten)
_RULES |= dict.fromkeys(("reshape", "view", "reshape_as", "view_as", torch.reshape), _reshape)
_RULES |= {"size": _size, getattr: _getattr, operator.getitem: _getitem}
_RULES |= dict.fromkeys(("squeeze", torch.squeeze), _squeeze) | dict.fromkeys(
    ("unsqueeze", torch.unsqueeze), _unsqueeze
)
_RULES |= dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _cat)
_RULES |= dict.fromkeys((torch.chunk, "chunk", torch.split, "split", torch.functional.split), _pieces)
_RULES |= dict.fromkeys(
    (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d, F.interpolate), _pooled
)
_RULES |= dict.fromkeys((F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d), _adaptive_function)
_RULES |= dict.fromkeys((torch.matmul, operator.matmul, torch.bmm, "matmul", "bmm"), _matmul)
_RULES |= dict.fromkeys(("mean", torch.mean), _mean)
_RULES |= {F.pad: _padded, F.linear: _linear, F.conv1d: _conv, F.conv2d: _conv, F.conv3d: _conv}
_RULES |= dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _conv_transpose)
