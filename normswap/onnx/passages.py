r"""How a channel affine crosses an ONNX operator: the rules of ``fold/passages.py``.

=========================================  ==========================================================================
operator                                   rule
=========================================  ==========================================================================
Identity, Dropout in inference             unchanged
Transpose, Reshape, Flatten, Squeeze ...   the channel axis moves, where the shapes prove where to
Concat, Split                              cut, or extended by the identity
AveragePool, ReduceMean, Resize ...        commute: weights sum to 1. Zero padding that is counted: only where t = 0
MaxPool, ReduceMax, GlobalMaxPool          commute where s ≥ 0
Pad                                        constant: only where t = 0; others: always; never along the channels
arithmetic                                 ``arithmetic.py``
=========================================  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from normswap.fold.affine import Affine
from normswap.fold.passages import matching
from normswap.onnx import arithmetic
from normswap.onnx.arithmetic import Need, Outcome, Passage, Rule
from normswap.onnx.graph import DEFAULT, View, attribute, label, permutation


def backward(view: View, node: ir.Node, need: Need) -> Outcome:
    """What must stand in front of ``node`` for the affine behind it, on its output ``need.value``, to vanish."""
    rule = _RULES.get(node.op_type) if node.domain in DEFAULT else None
    return f"{label(node)} stands between" if rule is None else rule[0](view, node, need)


def forward(view: View, node: ir.Node, need: Need) -> Outcome:
    """What stands behind ``node`` when the affine in front of it, on ``need.value``, vanishes."""
    rule = _RULES.get(node.op_type) if node.domain in DEFAULT else None
    return f"{label(node)} reads it" if rule is None else rule[1](view, node, need)


# --- one input, one output -------------------------------------------------------------------------------------------

Check = Callable[[View, ir.Node, Affine, int], "str | None"]
Axis = Callable[[View, ir.Node, int], "int | None"]


def _through(check: Check) -> tuple[Rule, Rule]:
    """Rules of an operator that leaves the affine as it is where ``check`` has no objection."""

    def back(view: View, node: ir.Node, need: Need) -> Outcome:
        reason = _other_output(node, need) or check(view, node, need.affine, need.axis)
        return reason or _to(node.inputs[0], need, need.axis)

    def ahead(view: View, node: ir.Node, need: Need) -> Outcome:
        if node.inputs[0] is not need.value:
            return f"{label(node)} reads it"
        reason = check(view, node, need.affine, need.axis)
        return reason or _to(node.outputs[0], need, need.axis)

    return back, ahead


def _moves(inward: Axis, outward: Axis) -> tuple[Rule, Rule]:
    """Rules of an operator that moves the channel axis."""

    def back(view: View, node: ir.Node, need: Need) -> Outcome:
        axis = inward(view, node, need.axis)
        if axis is None:
            return f"{label(node)}: where the channels come from is not proved"
        return _to(node.inputs[0], need, axis)

    def ahead(view: View, node: ir.Node, need: Need) -> Outcome:
        axis = outward(view, node, need.axis) if node.inputs[0] is need.value else None
        if axis is None:
            return f"{label(node)}: where the channels go is not proved"
        return _to(node.outputs[0], need, axis)

    return back, ahead


def _to(value: ir.Value | None, need: Need, axis: int) -> Outcome:
    return "it has no input" if value is None else Passage([replace(need, value=value, axis=axis)])


def _other_output(node: ir.Node, need: Need) -> str | None:
    return None if node.outputs[0] is need.value else f"{label(node)} gives it as another output"


def _nothing(view: View, node: ir.Node, affine: Affine, axis: int) -> str | None:
    return None


def _dropout(view: View, node: ir.Node, affine: Affine, axis: int) -> str | None:
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        training = view.constant(node.inputs[2])
        if training is None or bool(training.any()):
            return f"{label(node)} may be in training mode"
    return None


def _spatial(view: View, node: ir.Node, affine: Affine, axis: int) -> str | None:
    return None if axis == 1 else f"{label(node)} has its channels on another axis"


def _average(view: View, node: ir.Node, affine: Affine, axis: int) -> str | None:
    if axis != 1:
        return _spatial(view, node, affine, axis)
    padded = any(attribute(node, "pads") or ()) or attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    padded = padded or bool(attribute(node, "ceil_mode", 0))
    if padded and attribute(node, "count_include_pad", 0) and not affine.no_shift:
        return f"{label(node)} counts its zero padding, and the shift is not zero"
    return None


def _maximum(view: View, node: ir.Node, affine: Affine, axis: int) -> str | None:
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return f"{label(node)} gives indices too"
    if not affine.non_negative:
        return f"{label(node)} is a maximum, and the scale has negative channels"
    return _spatial(view, node, affine, axis)


def _resize(view: View, node: ir.Node, affine: Affine, axis: int) -> str | None:
    before, behind = view.shape(node.inputs[0]), view.shape(node.outputs[0])
    if before is None or behind is None or not isinstance(before[axis], int) or before[axis] != behind[axis]:
        return f"{label(node)} may resize the channels"
    if attribute(node, "coordinate_transformation_mode") == "tf_crop_and_resize":
        return f"{label(node)} crops, and puts a constant outside"
    return None


def _pad(view: View, node: ir.Node, affine: Affine, axis: int) -> str | None:
    pads, axes, shape = view.integers(node, "pads", 1), view.integers(node, "axes", 3), view.shape(node.inputs[0])
    if pads is None or shape is None or (axes is None and len(node.inputs) > 3 and node.inputs[3] is not None):
        return f"{label(node)} may pad the channels"
    padded = [dim % len(shape) for dim in (range(len(shape)) if axes is None else axes)]
    amounts = {dim: (pads[i], pads[i + len(padded)]) for i, dim in enumerate(padded)}
    if any(amounts.get(axis, (0, 0))):
        return f"{label(node)} pads the channels"
    if attribute(node, "mode", "constant") != "constant" or not any(pads):
        return None
    value = view.constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    missing = len(node.inputs) > 2 and node.inputs[2] is not None and value is None
    constant = attribute(node, "value", 0.0) if value is None else float(value.reshape(-1)[0])
    if missing or constant or not affine.no_shift or min(pads) < 0:
        return f"{label(node)} pads with a constant, and the shift is not zero"
    return None


def _permuted_in(view: View, node: ir.Node, axis: int) -> int | None:
    shape = view.shape(node.outputs[0]) or view.shape(node.inputs[0])
    return None if shape is None else permutation(node, len(shape))[axis]


def _permuted_out(view: View, node: ir.Node, axis: int) -> int | None:
    shape = view.shape(node.outputs[0]) or view.shape(node.inputs[0])
    return None if shape is None else permutation(node, len(shape)).index(axis)


def _reshaped_in(view: View, node: ir.Node, axis: int) -> int | None:
    return matching(view.shape(node.outputs[0]), view.shape(node.inputs[0]), axis)


def _reshaped_out(view: View, node: ir.Node, axis: int) -> int | None:
    return matching(view.shape(node.inputs[0]), view.shape(node.outputs[0]), axis)


def _flattened(view: View, node: ir.Node, need: Need) -> Outcome:
    """Forward through a reshape; where the axes behind the channels join them, every channel is repeated over those."""
    inner, outer, axis = view.shape(node.inputs[0]), view.shape(node.outputs[0]), need.axis
    if _reshaped_out(view, node, axis) is None and inner and outer and node.inputs[0] is need.value:
        size = outer[axis] if len(outer) == axis + 1 else None
        if inner[:axis] == outer[:axis] and isinstance(size, int) and size % need.affine.channels == 0:
            return Passage([Need(node.outputs[0], need.affine.repeated(size // need.affine.channels), axis)])
    return _moves(_reshaped_in, _reshaped_out)[1](view, node, need)


def _kept(view: View, node: ir.Node) -> list[int | None] | None:
    """Of a reduction: the axis of its input that each axis of its output is; ``None`` for a reduced one."""
    shape, axes = view.shape(node.inputs[0]), view.integers(node, "axes", 1)
    if shape is None or (axes is None and len(node.inputs) > 1 and node.inputs[1] is not None):
        return None
    if not axes and attribute(node, "noop_with_empty_axes", 0):
        return list(range(len(shape)))
    over = {axis % len(shape) for axis in (axes or range(len(shape)))}
    if attribute(node, "keepdims", 1):
        return [None if axis in over else axis for axis in range(len(shape))]
    return [axis for axis in range(len(shape)) if axis not in over]


def _reduced_in(view: View, node: ir.Node, axis: int) -> int | None:
    kept = _kept(view, node)
    return None if kept is None else kept[axis]


def _reduced_out(view: View, node: ir.Node, axis: int) -> int | None:
    kept = _kept(view, node)
    return kept.index(axis) if kept is not None and axis in kept else None


def _greatest(rule: Rule) -> Rule:
    def guarded(view: View, node: ir.Node, need: Need) -> Outcome:
        if not need.affine.non_negative:
            return f"{label(node)} is a maximum, and the scale has negative channels"
        return rule(view, node, need)

    return guarded


# --- several inputs or outputs ---------------------------------------------------------------------------------------


def _concat_sizes(view: View, node: ir.Node, need: Need) -> tuple[bool, list[int]] | str:
    """Whether a concatenation is along the channels, and the channels of its parts."""
    shape = view.shape(node.outputs[0])
    if shape is None:
        return f"{label(node)}: the rank of its output is not known"
    if len({id(value) for value in node.inputs}) != len(node.inputs):
        return f"{label(node)} joins a tensor with itself"
    if attribute(node, "axis", 1) % len(shape) != need.axis:
        return False, []
    sizes = [_size(view, value, need.axis) for value in node.inputs]
    known = [size for size in sizes if size is not None]
    return (True, known) if len(known) == len(sizes) else f"{label(node)}: the channels of its parts are not known"


def _size(view: View, value: ir.Value | None, axis: int) -> int | None:
    shape = view.shape(value)
    size = None if shape is None else shape[axis]
    return size if isinstance(size, int) else None


def _concat(view: View, node: ir.Node, need: Need) -> Outcome:
    found = _concat_sizes(view, node, need)
    if isinstance(found, str):
        return found
    along, sizes = found
    passage, start = Passage(), 0
    for index, value in enumerate(node.inputs):
        if value is None:
            return f"{label(node)} has an empty input"
        part = need.affine.slice(start, sizes[index]) if along else need.affine
        start += sizes[index] if along else 0
        passage.needs.append(Need(value, part, need.axis))
    return passage


def _concat_ahead(view: View, node: ir.Node, need: Need) -> Outcome:
    found = _concat_sizes(view, node, need)
    if isinstance(found, str):
        return found
    along, sizes = found
    if not along:
        return f"{label(node)} joins it with others along another axis"
    at = list(node.inputs).index(need.value)
    return Passage([Need(node.outputs[0], need.affine.padded(sum(sizes[:at]), sum(sizes[at + 1 :])), need.axis)])


def _split_sizes(view: View, node: ir.Node, axis: int) -> list[int] | str | None:
    """The channels of the pieces; ``None`` for a split along another axis."""
    shape = view.shape(node.inputs[0])
    if shape is None:
        return f"{label(node)}: the rank of its input is not known"
    if attribute(node, "axis", 0) % len(shape) != axis:
        return None
    sizes = [_size(view, value, axis) for value in node.outputs]
    known = [size for size in sizes if size is not None]
    return known if len(known) == len(sizes) else f"{label(node)}: the channels of its pieces are not known"


def _split(view: View, node: ir.Node, need: Need) -> Outcome:
    """The other pieces keep their values."""
    sizes = _split_sizes(view, node, need.axis)
    if isinstance(sizes, str) or sizes is None:
        return sizes or f"{label(node)} cuts along another axis than the channels"
    at = [value is need.value for value in node.outputs].index(True)
    padded = replace(need, affine=need.affine.padded(sum(sizes[:at]), sum(sizes[at + 1 :])))
    return _to(node.inputs[0], padded, need.axis)


def _split_ahead(view: View, node: ir.Node, need: Need) -> Outcome:
    sizes = _split_sizes(view, node, need.axis)
    if isinstance(sizes, str) or node.inputs[0] is not need.value:
        return sizes if isinstance(sizes, str) else f"{label(node)} reads it"
    passage, start = Passage(), 0
    for index, value in enumerate(node.outputs):
        affine = need.affine if sizes is None else need.affine.slice(start, sizes[index])
        start += 0 if sizes is None else sizes[index]
        if value.uses() or value.is_graph_output():
            passage.needs.append(Need(value, affine, need.axis))
    return passage


_reshape_back, _reshape_ahead = _moves(_reshaped_in, _reshaped_out)
_mean_back, _mean_ahead = _moves(_reduced_in, _reduced_out)
_RULES: dict[str, tuple[Any, Any]] = {
    "Identity": _through(_nothing),
    "Dropout": _through(_dropout),
    "Transpose": _moves(_permuted_in, _permuted_out),
    "Reshape": (_reshape_back, _flattened),
    "Flatten": (_reshape_back, _flattened),
    "Squeeze": (_reshape_back, _reshape_ahead),
    "Unsqueeze": (_reshape_back, _reshape_ahead),
    "Concat": (_concat, _concat_ahead),
    "Split": (_split, _split_ahead),
    "AveragePool": _through(_average),
    "GlobalAveragePool": _through(_spatial),
    "GlobalMaxPool": _through(_maximum),
    "MaxPool": _through(_maximum),
    "ReduceMean": (_mean_back, _mean_ahead),
    "ReduceMax": (_greatest(_mean_back), _greatest(_mean_ahead)),
    "Resize": _through(_resize),
    "Upsample": _through(_resize),
    "Pad": _through(_pad),
    "Add": arithmetic.addition(1),
    "Sub": arithmetic.addition(-1),
    "Mul": arithmetic.product(False),
    "Div": arithmetic.product(True),
}
