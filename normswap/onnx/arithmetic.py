r"""How a channel affine crosses sums and products of an ONNX graph, whose constants may take a part of it in.

=============================  =========================================================================
operation                      rule
=============================  =========================================================================
a + b, a - b                   backward: (s, t) to a and (s, 0) to b
x + k, x - k, k - x, with a    backward: :math:`k \leftarrow s k + t`, and (s, 0) to x.
constant k                     forward: (s, t + k - s·k)
k·x, x / k, with a constant k  backward: (s, t/k); :math:`k \leftarrow s k` and nothing in front where
                               t = 0. forward: (s, k·t)
=============================  =========================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from normswap.fold.affine import Affine
from normswap.onnx.graph import FLOATS, Edit, View, cast, double, label, name_of


@dataclass(frozen=True)
class Need:
    """An affine on one axis, counted from the left, of a value."""

    value: ir.Value
    affine: Affine
    axis: int


@dataclass
class Passage:
    """What is needed instead, and what constants take in."""

    needs: list[Need] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)


Outcome = Passage | str
Rule = Callable[[View, ir.Node, Need], Outcome]
"""Backward the need is of an output of the node, forward of an input of it."""


@dataclass(frozen=True)
class Operand:
    """A binary operation of a value and a constant."""

    value: ir.Value
    index: int
    """Which input the constant is."""
    constant: NDArray[np.float64]
    """With as many axes as the result."""
    axes: int
    """How many the constant itself has."""
    dtype: ir.DataType

    def along(self, vector: torch.Tensor, axis: int) -> NDArray[np.float64]:
        shape = [1] * self.constant.ndim
        shape[axis] = -1
        reshaped: NDArray[np.float64] = vector.cpu().numpy().reshape(shape)
        return reshaped

    def per_channel(self, axis: int, channels: int) -> torch.Tensor | None:
        """The constant as one number a channel, where it is that."""
        if self.constant.size not in (1, self.constant.shape[axis]):
            return None
        return torch.from_numpy(np.broadcast_to(self.constant.reshape(-1), (channels,)).copy())


def _operand(view: View, node: ir.Node, axis: int, channels: int) -> Operand | str | None:
    """The constant operand; ``None`` where neither is constant, or why the other has no such channels."""
    shape = view.shape(node.outputs[0])
    for index in (0, 1):
        array, value = view.constant(node.inputs[index]), node.inputs[1 - index]
        if array is None or value is None:
            continue
        dtype = next((kind for kind in FLOATS if kind.numpy() == array.dtype), None)
        theirs = view.shape(value)
        if shape is None or theirs is None or len(theirs) != len(shape) or theirs[axis] != channels or dtype is None:
            return f"{label(node)}: it is not proved that the channels are on the same axis of what it reads"
        full = double(array).reshape([1] * (len(shape) - array.ndim) + list(array.shape))
        return Operand(value, index, full, array.ndim, dtype)
    return None


def _keep(view: View, node: ir.Node, operand: Operand, new: NDArray[np.float64]) -> Edit | str:
    """The edit that gives the operation another constant."""
    while new.ndim > max(operand.axes, 1) and new.shape[0] == 1:
        new = new[0]
    tensor = cast(new, operand.dtype)
    if isinstance(tensor, str):
        return f"{label(node)}: {tensor}"
    return lambda: view.set_constant(node, operand.index, tensor, f"{name_of(node)}_folded")


def addition(sign: int) -> tuple[Rule, Rule]:
    def back(view: View, node: ir.Node, need: Need) -> Outcome:
        affine, axis = need.affine, need.axis
        operand = _operand(view, node, axis, affine.channels)
        if isinstance(operand, str):
            return operand
        if operand is None:
            return _both(view, node, need)
        shift = operand.along(affine.shift, axis) * (sign if operand.index else 1)
        edit = _keep(view, node, operand, operand.along(affine.scale, axis) * operand.constant + shift)
        return edit if isinstance(edit, str) else Passage([Need(operand.value, affine.scale_only(), axis)], [edit])

    def ahead(view: View, node: ir.Node, need: Need) -> Outcome:
        affine, axis = need.affine, need.axis
        operand = _operand(view, node, axis, affine.channels)
        if operand is None or isinstance(operand, str) or operand.value is not need.value:
            return operand if isinstance(operand, str) else f"{label(node)} adds it to something else"
        k = operand.per_channel(axis, affine.channels)
        if k is None:
            return f"{label(node)} adds a constant that differs between positions"
        if operand.index:  # x + k, x - k
            k = k * sign
            return Passage([Need(node.outputs[0], Affine(affine.scale, affine.shift + k - affine.scale * k), axis)])
        shift = affine.shift * sign + k - affine.scale * k  # k + x, k - x
        return Passage([Need(node.outputs[0], Affine(affine.scale, shift), axis)])

    return back, ahead


def _both(view: View, node: ir.Node, need: Need) -> Outcome:
    first, second = node.inputs
    if first is None or second is None or first is second:
        return f"{label(node)} adds a tensor to itself"
    shape = view.shape(node.outputs[0])
    for value in (first, second):
        theirs = view.shape(value)
        same = shape is not None and theirs is not None and len(theirs) == len(shape)
        if not same or theirs is None or theirs[need.axis] != need.affine.channels:
            return f"{label(node)}: it is not proved that both branches have these channels"
    return Passage([replace(need, value=first), Need(second, need.affine.scale_only(), need.axis)])


def product(divides: bool) -> tuple[Rule, Rule]:
    def operand_of(view: View, node: ir.Node, need: Need) -> Operand | str:
        operand = _operand(view, node, need.axis, need.affine.channels)
        if operand is None:
            return f"{label(node)} combines it with something else"
        return f"{label(node)} divides by it" if divides and operand.index == 0 else operand

    def back(view: View, node: ir.Node, need: Need) -> Outcome:
        affine, axis = need.affine, need.axis
        operand = operand_of(view, node, need)
        if isinstance(operand, str):
            return operand
        if affine.no_shift and not divides:
            edit = _keep(view, node, operand, operand.along(affine.scale, axis) * operand.constant)
            return edit if isinstance(edit, str) else Passage([], [edit])
        k = operand.per_channel(axis, affine.channels)
        if k is None or not bool((k != 0).all()):
            return f"{label(node)}: its constant differs between positions, or is zero"
        shift = affine.shift * k if divides else affine.shift / k
        return Passage([Need(operand.value, Affine(affine.scale, shift), axis)])

    def ahead(view: View, node: ir.Node, need: Need) -> Outcome:
        operand = operand_of(view, node, need)
        if isinstance(operand, str) or operand.value is not need.value:
            return operand if isinstance(operand, str) else f"{label(node)} reads it"
        k = operand.per_channel(need.axis, need.affine.channels)
        if k is None or (divides and not bool((k != 0).all())):
            return f"{label(node)}: its constant differs between positions, or is zero"
        shift = need.affine.shift / k if divides else need.affine.shift * k
        return Passage([Need(node.outputs[0], Affine(need.affine.scale, shift), need.axis)])

    return back, ahead
