r"""Passage rules: how a channel affine crosses an operation.

*Backward*: the affine stands behind an operation; what must stand in front of it instead. *Forward*: it stands in
front; what stands behind.

==========================================  =====================================================================
operation                                   rule
==========================================  =====================================================================
identity, dropout in eval mode              unchanged; a scale alone passes dropout in train mode too
permute, transpose, flatten, reshape ...    the channel axis moves, where operations or seen shapes prove where to
concatenation along channels                cut (backward); extended by the identity (forward)
split, chunk along channels                 extended by the identity (backward); cut (forward)
average pooling, mean, interpolation        commute: weights sum to 1. Zero padding that is counted: only where t = 0
max pooling                                 commutes where s ≥ 0
zero padding                                only where t = 0; reflect, replicate, circular: always
a + b                                       backward: (s, t) to a and (s, 0) to b
k·x, x + k                                  backward (s, t/k), (s, t + s·k - k); forward (s, k·t), (s, t + k - s·k)
another channel affine                      they compose
==========================================  =====================================================================

A rule returns what is needed, or the reason why the affine cannot pass.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules import padding, pooling

from normswap.fold.affine import Affine
from normswap.graph.shapes import Shape, argument, first, known, permutation, position, same_size
from normswap.graph.trace import Region


@dataclass(frozen=True)
class Need:
    """An affine on one axis of a node's value."""

    node: fx.Node
    affine: Affine
    axis: int


@dataclass
class Flow:
    """A region with what is known of its values."""

    region: Region
    values: dict[fx.Node, Any]

    def shape(self, node: Any) -> Shape | None:
        return known(self.values, node)

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.region.module_of(node)

    def is_axis(self, node: fx.Node, axis: int, wanted: int) -> bool:
        """Whether ``axis`` of a node's value is provably its axis ``wanted`` (either may count from the right)."""
        if axis == wanted:
            return True
        shape = self.shape(node)
        return shape is not None and axis % len(shape) == wanted % len(shape)


Outcome = list[Need] | str
_SHAPE_ATTRIBUTES = frozenset({"shape", "ndim", "device", "dtype", "is_cuda", "layout"})
_SHAPE_METHODS = frozenset(
    {"size", "dim", "numel", "new_zeros", "new_ones", "new_empty", "stride", "ndimension", "is_contiguous", "nelement"}
)
_SECOND_FOR_SHAPE = frozenset({"reshape_as", "view_as", "expand_as", "type_as"})


def reads_values(user: fx.Node, node: fx.Node) -> bool:
    """Whether a user of a node reads its values, not only its shape, type or place."""
    if user.target is getattr:
        return user.args[1] not in _SHAPE_ATTRIBUTES
    if user.op == "call_method":
        if user.target in _SHAPE_METHODS:
            return False
        if user.target in _SECOND_FOR_SHAPE:
            return user.args[0] is node
    return True


def value_users(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if reads_values(user, node)]


def other_piece(pieces: fx.Node, user: fx.Node, other: fx.Node) -> bool:
    """Whether two users of ``split(x)`` take different pieces of it, by their numbers."""
    if pieces.target not in _SPLITS or {user.target, other.target} != {operator.getitem}:
        return False
    ours, theirs = user.args[1], other.args[1]
    return isinstance(ours, int) and isinstance(theirs, int) and min(ours, theirs) >= 0 and ours != theirs


def label(flow: Flow, node: fx.Node) -> str:
    """An operation in words, for a reason."""
    module = flow.module(node)
    if module is not None:
        return f"{flow.region.qualified(str(node.target))} ({type(module).__name__})"
    return str(getattr(node.target, "__name__", node.target))


def backward(flow: Flow, node: fx.Node, affine: Affine, axis: int) -> Outcome:
    """What must stand in front of ``node`` for the affine behind it to vanish."""
    module = flow.module(node)
    rule: Any
    if module is not None:
        rule = next((r for cls, r in _BACKWARD_MODULES if isinstance(module, cls)), None)
        return f"{label(flow, node)} stands between" if rule is None else rule(flow, node, affine, axis, module)
    rule = _BACKWARD.get(node.target) if node.op in ("call_function", "call_method") else None
    if rule is None:
        return f"{_what(node)} stands between"
    outcome: Outcome = rule(flow, node, affine, axis)
    return outcome


def forward(flow: Flow, node: fx.Node, source: fx.Node, affine: Affine, axis: int) -> Need | str:
    """What stands behind ``node``, a user of ``source``, when the affine in front of it vanishes."""
    module = flow.module(node)
    rule: Any
    if module is not None:
        rule = next((r for cls, r in _FORWARD_MODULES if isinstance(module, cls)), None)
        return f"{label(flow, node)} reads it" if rule is None else rule(flow, node, source, affine, axis, module)
    rule = _FORWARD.get(node.target) if node.op in ("call_function", "call_method") else None
    if rule is None:
        return f"{_what(node)} reads it"
    outcome: Need | str = rule(flow, node, source, affine, axis)
    return outcome


def _what(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "an input"
    if node.op == "output":
        return "the output"
    if node.op == "get_attr":
        return f"the tensor {node.target}"
    return str(getattr(node.target, "__name__", node.target))


def _first(node: fx.Node) -> fx.Node | None:
    source = first(node)
    return source if isinstance(source, fx.Node) else None


# --- unchanged -------------------------------------------------------------------------------------------------------


def _pass(flow: Flow, node: fx.Node, affine: Affine, axis: int, *_: Any) -> Outcome:
    source = _first(node)
    return f"{label(flow, node)} has no tensor input" if source is None else [Need(source, affine, axis)]


def _pass_forward(flow: Flow, node: fx.Node, source: fx.Node, affine: Affine, axis: int, *_: Any) -> Need | str:
    if _first(node) is not source:
        return f"{label(flow, node)} reads it"
    return Need(node, affine, axis)


def _dropout_active(node: fx.Node, module: nn.Module | None, affine: Affine) -> bool:
    """Whether a dropout does not let an affine pass: in train mode it multiplies, which leaves only a scale alone."""
    scales = not isinstance(module, (nn.AlphaDropout, nn.FeatureAlphaDropout))
    if affine.no_shift and scales:
        return False
    if module is not None:
        rate = getattr(module, "p", getattr(module, "drop_prob", 0.0))
        return module.training and bool(rate)
    return bool(argument(node, 2, "training", True)) and argument(node, 1, "p", 0.5) != 0


def pads_nothing(flow: Flow, node: fx.Node, source: fx.Node) -> bool:
    """Whether a padding adds nothing to the ``source`` seen in a run; it may to one of another size."""
    shape = flow.shape(source)
    return node.target is F.pad and first(node) is source and shape is not None and shape == flow.shape(node)


def may_drop(flow: Flow, node: fx.Node, affine: Affine) -> bool:
    """Whether an operation is a dropout which does not let the affine pass in train mode."""
    module = flow.module(node)
    if isinstance(module, nn.modules.dropout._DropoutNd):
        alpha = isinstance(module, (nn.AlphaDropout, nn.FeatureAlphaDropout))
        return module.p != 0 and (alpha or not affine.no_shift)
    return node.target is F.dropout and argument(node, 1, "p", 0.5) != 0 and not affine.no_shift


def _dropout(flow: Flow, node: fx.Node, affine: Affine, axis: int, module: nn.Module | None = None) -> Outcome:
    if _dropout_active(node, module, affine):
        return f"{label(flow, node)} is in train mode"
    return _pass(flow, node, affine, axis)


def _dropout_forward(
    flow: Flow, node: fx.Node, source: fx.Node, affine: Affine, axis: int, module: nn.Module | None = None
) -> Need | str:
    if _dropout_active(node, module, affine):
        return f"{label(flow, node)} is in train mode"
    return _pass_forward(flow, node, source, affine, axis)


# --- the channel axis moves ------------------------------------------------------------------------------------------

Axis = Callable[[Flow, fx.Node, int], int | None]


def _moves(inward: Axis, outward: Axis) -> tuple[Any, Any]:
    def back(flow: Flow, node: fx.Node, affine: Affine, axis: int, *_: Any) -> Outcome:
        source = _first(node)
        inner = None if source is None else inward(flow, node, axis)
        if source is None or inner is None:
            return f"{label(flow, node)}: where the channels come from is not proved (example_inputs may settle it)"
        return [Need(source, affine, inner)]

    def ahead(flow: Flow, node: fx.Node, source: fx.Node, affine: Affine, axis: int, *_: Any) -> Need | str:
        outer = outward(flow, node, axis) if _first(node) is source else None
        if outer is None:
            return f"{label(flow, node)}: where the channels go is not proved (example_inputs may settle it)"
        return Need(node, affine, outer)

    return back, ahead


def _order(flow: Flow, node: fx.Node) -> list[int] | None:
    shape = flow.shape(first(node)) or flow.shape(node)
    return permutation(node, None if shape is None else len(shape))


def _permute_in(flow: Flow, node: fx.Node, axis: int) -> int | None:
    order = _order(flow, node)
    return None if order is None else order[axis]


def _permute_out(flow: Flow, node: fx.Node, axis: int) -> int | None:
    order = _order(flow, node)
    return None if order is None else order.index(axis % len(order))


def _reshape_in(flow: Flow, node: fx.Node, axis: int) -> int | None:
    return matching(flow.shape(node), flow.shape(first(node)), axis)


def _reshape_out(flow: Flow, node: fx.Node, axis: int) -> int | None:
    return matching(flow.shape(first(node)), flow.shape(node), axis)


def matching(ours: Shape | None, theirs: Shape | None, axis: int) -> int | None:
    """The axis of ``theirs`` that holds what ``axis`` of ``ours`` holds, after a reshape."""
    if ours is None or theirs is None:
        return None
    at = axis % len(ours)
    for candidate, size in enumerate(theirs):
        if size == ours[at] and same_size(ours[:at], theirs[:candidate]):
            return candidate
        if size == ours[at] and same_size(ours[at + 1 :], theirs[candidate + 1 :]):
            return candidate
    return None


def _bounds(flow: Flow, node: fx.Node) -> tuple[int, int | None]:
    module = flow.module(node)
    if isinstance(module, nn.Flatten):
        start, end = module.start_dim, module.end_dim
    else:
        start, end = argument(node, 1, "start_dim", 0), argument(node, 2, "end_dim", -1)
    shape = flow.shape(first(node))
    if shape is not None:
        return start % len(shape), end % len(shape)
    return start, end if end >= 0 else None


def _flatten_in(flow: Flow, node: fx.Node, axis: int) -> int | None:
    start, end = _bounds(flow, node)
    if start < 0:
        return None
    if 0 <= axis < start:
        return axis
    if end is not None and axis > start:
        return axis + end - start
    return _reshape_in(flow, node, axis)


def _flatten_out(flow: Flow, node: fx.Node, axis: int) -> int | None:
    start, end = _bounds(flow, node)
    if start < 0:
        return None
    if 0 <= axis < start:
        return axis
    if end is not None and axis > end:
        return axis - end + start
    return _reshape_out(flow, node, axis)


def _dropped_axis(flow: Flow, node: fx.Node, shape: Shape | None) -> int | None:
    dim = argument(node, 1, "dim")
    return position(dim, shape) if isinstance(dim, int) else None


def _squeezed(flow: Flow, node: fx.Node, axis: int) -> tuple[int, int] | None:
    """The squeezed axis and how many axes vanish, as far as it matters to ``axis``: a size other than 1 stays."""
    shape = flow.shape(first(node))
    gone = _dropped_axis(flow, node, shape)
    if gone is None or axis < 0:
        return None
    size = None if shape is None else shape[gone]
    if axis >= gone and not isinstance(size, int):
        return None
    return gone, int(size == 1)


def _squeeze_in(flow: Flow, node: fx.Node, axis: int) -> int | None:
    found = _squeezed(flow, node, axis)
    return None if found is None else axis + found[1] * (axis >= found[0])


def _squeeze_out(flow: Flow, node: fx.Node, axis: int) -> int | None:
    found = _squeezed(flow, node, axis)
    if found is None or (axis == found[0] and found[1]):
        return None
    return axis - found[1] * (axis > found[0])


def _unsqueeze_in(flow: Flow, node: fx.Node, axis: int) -> int | None:
    new = _dropped_axis(flow, node, flow.shape(node))
    return None if new is None or axis < 0 or axis == new else axis - (axis > new)


def _unsqueeze_out(flow: Flow, node: fx.Node, axis: int) -> int | None:
    new = _dropped_axis(flow, node, flow.shape(node))
    return None if new is None or axis < 0 else axis + (axis >= new)


def _flatten_repeating(flow: Flow, node: fx.Node, source: fx.Node, affine: Affine, axis: int, *_: Any) -> Need | str:
    """Flattening from the channel axis on: every channel is repeated over the positions behind it."""
    start, end = _bounds(flow, node)
    inner, outer = flow.shape(source), flow.shape(node)
    if _first(node) is source and inner is not None and outer is not None and end is not None and end > start >= 0:
        size = outer[start]
        if axis % len(inner) == start and inner[start] == affine.channels and isinstance(size, int):
            return Need(node, affine.repeated(size // affine.channels), start)
    ahead: Need | str = _flatten_ahead(flow, node, source, affine, axis)
    return ahead


# --- weights that sum to one -----------------------------------------------------------------------------------------


def _averages(flow: Flow, node: fx.Node, axis: int, affine: Affine, module: nn.Module | None) -> str | None:
    """Why an average pooling does not commute with the affine, or ``None``."""
    if module is not None:
        pads, counted, divisor = module.padding, module.count_include_pad, getattr(module, "divisor_override", None)
    else:
        pads = argument(node, 3, "padding", 0)
        counted, divisor = argument(node, 5, "count_include_pad", True), argument(node, 6, "divisor_override")
    padded = any(pads) if isinstance(pads, (tuple, list)) else bool(pads)
    if (divisor is not None or (padded and counted)) and not affine.no_shift:
        return f"{label(flow, node)} counts its zero padding, and the shift is not zero"
    return None


def _spatial_axis(flow: Flow, node: fx.Node, axis: int) -> bool:
    """Whether the channels are on axis 1 and the operation works behind it; not so where the batch axis is missing."""
    shape = flow.shape(first(node)) or flow.shape(node)
    module = flow.module(node)
    if isinstance(module, _PADDINGS):
        spatial = len(module.padding) // 2
    else:
        spatial = _SPATIAL_AXES.get(node.target if module is None else _pooling(module), 0)
    if spatial and (shape is None or len(shape) != spatial + 2):
        return False
    return flow.is_axis(node, axis, 1)


_ELSEWHERE = "is not known to have the channels on axis 1 of (N, C, ...)"


def _pooling(module: nn.Module) -> Any:
    return next((cls for cls in type(module).__mro__ if cls in _SPATIAL_AXES), None)


def _guarded(check: Callable[..., str | None]) -> tuple[Any, Any]:
    """Passages that leave the affine as it is where ``check`` has no objection."""

    def back(flow: Flow, node: fx.Node, affine: Affine, axis: int, module: nn.Module | None = None) -> Outcome:
        reason = check(flow, node, axis, affine, module)
        return _pass(flow, node, affine, axis) if reason is None else reason

    def ahead(
        flow: Flow, node: fx.Node, source: fx.Node, affine: Affine, axis: int, module: nn.Module | None = None
    ) -> Need | str:
        reason = check(flow, node, axis, affine, module)
        return _pass_forward(flow, node, source, affine, axis) if reason is None else reason

    return back, ahead


def _check_average(flow: Flow, node: fx.Node, axis: int, affine: Affine, module: nn.Module | None) -> str | None:
    if not _spatial_axis(flow, node, axis):
        return f"{label(flow, node)} {_ELSEWHERE}"
    return _averages(flow, node, axis, affine, module)


def _check_spatial(flow: Flow, node: fx.Node, axis: int, affine: Affine, module: nn.Module | None) -> str | None:
    return None if _spatial_axis(flow, node, axis) else f"{label(flow, node)} {_ELSEWHERE}"


def _check_max(flow: Flow, node: fx.Node, axis: int, affine: Affine, module: nn.Module | None) -> str | None:
    indices = module.return_indices if module is not None else argument(node, 6, "return_indices", False)
    if indices:
        return f"{label(flow, node)} returns indices"
    if not affine.non_negative:
        return f"{label(flow, node)} is a maximum, and the scale has negative channels"
    return _check_spatial(flow, node, axis, affine, module)


def _check_pad(flow: Flow, node: fx.Node, axis: int, affine: Affine, module: nn.Module | None) -> str | None:
    if not _spatial_axis(flow, node, axis):
        return f"{label(flow, node)} {_ELSEWHERE}"
    if isinstance(module, (padding._ReflectionPadNd, padding._ReplicationPadNd, padding._CircularPadNd)):
        return None
    if module is not None:
        value, mode = getattr(module, "value", 0.0), "constant"
    else:
        value, mode = argument(node, 3, "value"), argument(node, 2, "mode", "constant")
        pad, shape = argument(node, 1, "pad"), flow.shape(node)
        if not isinstance(pad, (tuple, list)) or shape is None or len(pad) // 2 > len(shape) - 2:
            return f"{label(flow, node)} may pad the channels"
    if mode != "constant" or (not value and affine.no_shift):
        return None
    return f"{label(flow, node)} pads with a constant, and the shift is not zero"


def _mean_axes(flow: Flow, node: fx.Node) -> tuple[set[int], bool, int] | None:
    shape = flow.shape(first(node))
    dims = argument(node, 1, "dim")
    if shape is None or dims is None:
        return None
    listed = dims if isinstance(dims, (tuple, list)) else (dims,)
    return {int(d) % len(shape) for d in listed}, bool(argument(node, 2, "keepdim", False)), len(shape)


def _mean_in(flow: Flow, node: fx.Node, axis: int) -> int | None:
    found = _mean_axes(flow, node)
    if found is None:
        return None
    over, keeps, rank = found
    kept = list(range(rank)) if keeps else [d for d in range(rank) if d not in over]
    inner = kept[axis]
    return None if inner in over else inner


def _mean_out(flow: Flow, node: fx.Node, axis: int) -> int | None:
    found = _mean_axes(flow, node)
    if found is None:
        return None
    over, keeps, rank = found
    at = axis % rank
    if at in over:
        return None
    return at if keeps else [d for d in range(rank) if d not in over].index(at)


def _slice_in(flow: Flow, node: fx.Node, axis: int) -> int | None:
    """Indexing by slices of other axes than the channels'."""
    index = argument(node, 1, "index")
    items = index if isinstance(index, tuple) else (index,)
    at = position(axis, flow.shape(node))
    if at is None or not all(isinstance(item, slice) for item in items):
        return None
    return at if at >= len(items) or items[at] == slice(None) else None


# --- several inputs or outputs ---------------------------------------------------------------------------------------


def _cat(flow: Flow, node: fx.Node, affine: Affine, axis: int) -> Outcome:
    parts = argument(node, 0, "tensors")
    if not isinstance(parts, (tuple, list)) or not all(isinstance(part, fx.Node) for part in parts):
        return f"{label(flow, node)} joins a list that is not known"
    if len(set(parts)) != len(parts):
        return f"{label(flow, node)} joins a tensor with itself"
    if not flow.is_axis(node, int(argument(node, 1, "dim", 0)), axis):
        shape = flow.shape(node)
        if shape is None:
            return f"{label(flow, node)}: the rank of its input is not known"
        return [Need(part, affine, axis) for part in parts]
    sizes = _sizes(flow, parts, axis)
    if sizes is None or sum(sizes) != affine.channels:
        return f"{label(flow, node)}: the channels of its branches are not known"
    needs, start = [], 0
    for part, size in zip(parts, sizes, strict=True):
        needs.append(Need(part, affine.slice(start, size), axis))
        start += size
    return needs


def _sizes(flow: Flow, parts: Any, axis: int) -> list[int] | None:
    sizes = []
    for part in parts:
        shape = flow.shape(part)
        size = None if shape is None else shape[axis]
        if not isinstance(size, int):
            return None
        sizes.append(size)
    return sizes


def _cat_forward(flow: Flow, node: fx.Node, source: fx.Node, affine: Affine, axis: int) -> Need | str:
    parts = argument(node, 0, "tensors")
    if not isinstance(parts, (tuple, list)) or list(parts).count(source) != 1:
        return f"{label(flow, node)} reads it"
    if not flow.is_axis(node, int(argument(node, 1, "dim", 0)), axis):
        return f"{label(flow, node)} joins it with others along another axis"
    sizes = _sizes(flow, parts, axis)
    if sizes is None:
        return f"{label(flow, node)}: the channels of its branches are not known"
    at = list(parts).index(source)
    return Need(node, affine.padded(sum(sizes[:at]), sum(sizes[at + 1 :])), axis)


def _piece(flow: Flow, node: fx.Node, affine: Affine, axis: int) -> Outcome:
    """``split(x)[i]``: the other pieces keep their values."""
    pieces, index = node.args[:2]
    if isinstance(pieces, fx.Node) and pieces.target in _SPLITS and isinstance(index, int):
        values = flow.values.get(pieces)
        source = _first(pieces)
        dim = int(argument(pieces, 2, "dim", 0))
        if not isinstance(values, list) or source is None:
            return f"{label(flow, pieces)}: its pieces are not known"
        if not flow.is_axis(node, dim, axis):
            return f"{label(flow, pieces)} cuts along another axis than the channels"
        sizes: list[Any] = [shape[dim] if isinstance(shape, tuple) else None for shape in values]
        if not all(isinstance(size, int) for size in sizes):
            return f"{label(flow, pieces)}: its pieces are not known"
        before, behind = sum(sizes[:index]), sum(sizes[index + 1 :]) if index != -1 else 0
        return [Need(pieces, affine.padded(before, behind), axis)]
    inner = _slice_in(flow, node, axis)
    source = _first(node)
    if source is None or inner is None:
        return f"{label(flow, node)} stands between"
    return [Need(source, affine, inner)]


def _split(flow: Flow, node: fx.Node, affine: Affine, axis: int) -> Outcome:
    return _pass(flow, node, affine, axis)


def _slice_out(flow: Flow, node: fx.Node, axis: int) -> int | None:
    """Where an axis goes when others are indexed by slices and whole numbers."""
    shape, index = flow.shape(first(node)), argument(node, 1, "index")
    items = list(index) if isinstance(index, tuple) else [index]
    if not all(type(item) in (slice, int) or item is Ellipsis for item in items) or items.count(Ellipsis) > 1:
        return None
    if shape is not None:
        at = items.index(Ellipsis) if Ellipsis in items else len(items)
        items[at : at + 1] = [slice(None)] * (len(shape) - len([item for item in items if item is not Ellipsis]))
    inner = position(axis, shape)
    if inner is None or Ellipsis in items:
        return None
    if inner < len(items) and items[inner] != slice(None):
        return None
    return inner - sum(isinstance(item, int) for item in items[:inner])


def _piece_forward(flow: Flow, node: fx.Node, source: fx.Node, affine: Affine, axis: int) -> Need | str:
    outer = _slice_out(flow, node, axis)
    return f"{label(flow, node)} reads it" if outer is None else Need(node, affine, outer)


def _rolled(flow: Flow, node: fx.Node, axis: int) -> int | None:
    """Rolling along other axes than the channels'."""
    shape, dims = flow.shape(first(node)), argument(node, 2, "dims")
    listed = dims if isinstance(dims, (tuple, list)) else (dims,)
    if shape is None or not listed or not all(isinstance(dim, int) for dim in listed):
        return None
    at = axis % len(shape)
    return None if at in {dim % len(shape) for dim in listed} else at


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _operands(node: fx.Node) -> tuple[Any, Any] | None:
    """The two operands, or ``None`` where there is more: ``alpha``, ``rounding_mode``, ``out``."""
    if len(node.args) + len(node.kwargs) != 2 or node.kwargs.keys() - {"input", "other"}:
        return None
    return first(node), argument(node, 1, "other")


def _same_layout(flow: Flow, node: fx.Node, axis: int, *operands: Any) -> bool:
    """Whether every operand has the channels of the result, on the same axis: nothing is broadcast along them."""
    shape = flow.shape(node)
    for operand in operands:
        theirs = flow.shape(operand)
        if shape is None or theirs is None or len(theirs) != len(shape):
            return False
        if not -len(shape) <= axis < len(shape) or theirs[axis] != shape[axis]:
            return False
        if not isinstance(shape[axis], int):
            return False
    return True


def _sum(sign: float) -> Any:
    def rule(flow: Flow, node: fx.Node, affine: Affine, axis: int) -> Outcome:
        operands = _operands(node)
        if operands is None:
            return f"{label(flow, node)} stands between"
        a, b = operands
        for term, constant, in_front in ((a, _number(b), True), (b, _number(a), False)):
            if constant is not None and isinstance(term, fx.Node):
                if not in_front and sign < 0:
                    return f"{label(flow, node)} stands between"
                shift = affine.shift + (affine.scale - 1) * constant * sign
                return [Need(term, Affine(affine.scale, shift), axis)]
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or a is b:
            return f"{label(flow, node)} adds a tensor to itself"
        if not _same_layout(flow, node, axis, a, b):
            return f"{label(flow, node)}: it is not proved that both branches have these channels"
        return [Need(a, affine, axis), Need(b, affine.scale_only(), axis)]

    return rule


def _sum_forward(sign: float) -> Any:
    def rule(flow: Flow, node: fx.Node, source: fx.Node, affine: Affine, axis: int) -> Need | str:
        operands = _operands(node)
        constant = None if operands is None else _number(operands[1])
        if constant is None or operands is None or operands[0] is not source:
            return f"{label(flow, node)} adds it to something else"
        k = constant * sign
        return Need(node, Affine(affine.scale, affine.shift + k - affine.scale * k), axis)

    return rule


def _factor(node: fx.Node, divides: bool) -> tuple[fx.Node, float] | None:
    operands = _operands(node)
    if operands is None:
        return None
    a, b = operands
    k = _number(b)
    if k is not None and isinstance(a, fx.Node):
        return (a, 1 / k if divides else k) if k else None
    k = _number(a)
    if k and not divides and isinstance(b, fx.Node):
        return b, k
    return None


def _product(divides: bool) -> Any:
    def rule(flow: Flow, node: fx.Node, affine: Affine, axis: int) -> Outcome:
        found = _factor(node, divides)
        if found is None:
            return f"{label(flow, node)} stands between"
        source, k = found
        return [Need(source, Affine(affine.scale, affine.shift / k), axis)]

    return rule


def _product_forward(divides: bool) -> Any:
    def rule(flow: Flow, node: fx.Node, source: fx.Node, affine: Affine, axis: int) -> Need | str:
        found = _factor(node, divides)
        if found is None or found[0] is not source:
            return f"{label(flow, node)} multiplies it with something else"
        return Need(node, Affine(affine.scale, affine.shift * found[1]), axis)

    return rule


_permute_back, _permute_ahead = _moves(_permute_in, _permute_out)
_reshape_back, _reshape_ahead = _moves(_reshape_in, _reshape_out)
_flatten_back, _flatten_ahead = _moves(_flatten_in, _flatten_out)
_squeeze_back, _squeeze_ahead = _moves(_squeeze_in, _squeeze_out)
_unsqueeze_back, _unsqueeze_ahead = _moves(_unsqueeze_in, _unsqueeze_out)
_roll_back, _roll_ahead = _moves(_rolled, _rolled)
_mean_back, _mean_ahead = _moves(_mean_in, _mean_out)
_average_back, _average_ahead = _guarded(_check_average)
_spatial_back, _spatial_ahead = _guarded(_check_spatial)
_max_back, _max_ahead = _guarded(_check_max)
_pad_back, _pad_ahead = _guarded(_check_pad)

_SPATIAL_AXES: dict[Any, int] = {
    getattr(space, name.format(spatial)): spatial
    for spatial in (1, 2, 3)
    for space, names in (
        (F, ("avg_pool{}d", "max_pool{}d", "adaptive_avg_pool{}d")),
        (nn, ("AvgPool{}d", "MaxPool{}d", "AdaptiveAvgPool{}d")),
    )
    for name in names
}
_SPLITS: tuple[Any, ...] = (torch.chunk, "chunk", torch.split, "split", torch.functional.split)
_UNCHANGED: tuple[Any, ...] = ("contiguous", "clone", torch.clone)
_PERMUTES: tuple[Any, ...] = (
    "permute", torch.permute, "transpose", torch.transpose, "swapaxes", torch.swapaxes, "movedim", torch.movedim, "t",
)  # fmt: skip
_RESHAPES: tuple[Any, ...] = ("reshape", "view", "reshape_as", "view_as", torch.reshape)
_AVERAGES: tuple[Any, ...] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_SPATIAL: tuple[Any, ...] = (
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.interpolate, F.upsample,
)  # fmt: skip
_MAXIMA: tuple[Any, ...] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)

_BACKWARD: dict[Any, Any] = {
    **dict.fromkeys(_UNCHANGED, _pass),
    F.dropout: _dropout,
    **dict.fromkeys(_PERMUTES, _permute_back),
    **dict.fromkeys(_RESHAPES, _reshape_back),
    **dict.fromkeys(("flatten", torch.flatten), _flatten_back),
    **dict.fromkeys(("squeeze", torch.squeeze), _squeeze_back),
    **dict.fromkeys(("unsqueeze", torch.unsqueeze), _unsqueeze_back),
    **dict.fromkeys(("roll", torch.roll), _roll_back),
    **dict.fromkeys(("mean", torch.mean), _mean_back),
    **dict.fromkeys(_AVERAGES, _average_back),
    **dict.fromkeys(_SPATIAL, _spatial_back),
    **dict.fromkeys(_MAXIMA, _max_back),
    F.pad: _pad_back,
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _cat),
    operator.getitem: _piece,
    **dict.fromkeys(_SPLITS, _split),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), _sum(1.0)),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), _sum(-1.0)),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), _product(False)),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, "div", "div_"), _product(True)),
}

_FORWARD: dict[Any, Any] = {
    **dict.fromkeys(_UNCHANGED, _pass_forward),
    F.dropout: _dropout_forward,
    **dict.fromkeys(_PERMUTES, _permute_ahead),
    **dict.fromkeys(_RESHAPES, _reshape_ahead),
    **dict.fromkeys(("flatten", torch.flatten), _flatten_repeating),
    **dict.fromkeys(("squeeze", torch.squeeze), _squeeze_ahead),
    **dict.fromkeys(("unsqueeze", torch.unsqueeze), _unsqueeze_ahead),
    **dict.fromkeys(("roll", torch.roll), _roll_ahead),
    **dict.fromkeys(("mean", torch.mean), _mean_ahead),
    **dict.fromkeys(_AVERAGES, _average_ahead),
    **dict.fromkeys(_SPATIAL, _spatial_ahead),
    **dict.fromkeys(_MAXIMA, _max_ahead),
    F.pad: _pad_ahead,
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _cat_forward),
    operator.getitem: _piece_forward,
    **dict.fromkeys((operator.add, torch.add, "add"), _sum_forward(1.0)),
    **dict.fromkeys((operator.sub, torch.sub, "sub"), _sum_forward(-1.0)),
    **dict.fromkeys((operator.mul, torch.mul, "mul"), _product_forward(False)),
    **dict.fromkeys((operator.truediv, torch.div, "div"), _product_forward(True)),
}

_PADDINGS = (padding._ConstantPadNd, padding._ReflectionPadNd, padding._ReplicationPadNd, padding._CircularPadNd)
_AVERAGE_MODULES = (pooling.AvgPool1d, pooling.AvgPool2d, pooling.AvgPool3d)
_SPATIAL_MODULES = (pooling._AdaptiveAvgPoolNd, nn.Upsample)

_BACKWARD_MODULES: list[tuple[Any, Any]] = [
    (nn.Identity, _pass),
    (nn.modules.dropout._DropoutNd, _dropout),
    (nn.Flatten, _flatten_back),
    (_AVERAGE_MODULES, _average_back),
    (_SPATIAL_MODULES, _spatial_back),
    (pooling._MaxPoolNd, _max_back),
    (_PADDINGS, _pad_back),
]
_FORWARD_MODULES: list[tuple[Any, Any]] = [
    (nn.Identity, _pass_forward),
    (nn.modules.dropout._DropoutNd, _dropout_forward),
    (nn.Flatten, _flatten_repeating),
    (_AVERAGE_MODULES, _average_ahead),
    (_SPATIAL_MODULES, _spatial_ahead),
    (pooling._MaxPoolNd, _max_ahead),
    (_PADDINGS, _pad_ahead),
]
