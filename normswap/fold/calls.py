"""Calls of functions that are linear layers: ``F.conv1d`` to ``F.conv_transpose3d`` and ``F.linear``.

The call's arguments say what a module's attributes would; the same rules of :mod:`normswap.fold.layers` hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional as F

from normswap.fold.layers import Layer
from normswap.graph.shapes import argument

_CONVOLUTIONS: dict[Any, int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
_TRANSPOSED: dict[Any, int] = {F.conv_transpose1d: 1, F.conv_transpose2d: 2, F.conv_transpose3d: 3}


@dataclass(frozen=True, eq=False)
class Call:
    """A functional layer: its parameters, as attributes that a module would have, and their dotted names."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    names: tuple[str, ...]
    """Of the weight and, if it has one, of the bias."""


def is_layer(node: fx.Node) -> bool:
    """Whether a node calls such a function."""
    return node.op == "call_function" and (
        node.target in _CONVOLUTIONS or node.target in _TRANSPOSED or node.target is F.linear
    )


def describe(node: fx.Node, weight: Tensor) -> Layer | str:
    """The layer that a call with this weight computes, or why it is not one that can absorb an affine."""
    if node.target is F.linear:
        if weight.dim() != 2:
            return "its weight has other axes than a linear layer's"
        return Layer("linear", 0, weight.shape[1], weight.shape[0], 1, True)
    transposed = node.target in _TRANSPOSED
    spatial = _TRANSPOSED[node.target] if transposed else _CONVOLUTIONS[node.target]
    groups = argument(node, 6, "groups", 1)
    padding = argument(node, 4, "padding", 0)
    if type(groups) is not int or weight.dim() != spatial + 2:
        return "its groups, or the axes of its weight, are not known"
    pointwise = all(size == 1 for size in weight.shape[2:])
    unpadded = padding == "valid" or (padding == "same" and pointwise) or _all(padding, 0)
    if not transposed:
        return Layer("conv", spatial, weight.shape[1] * groups, weight.shape[0], groups, unpadded)
    even = pointwise and unpadded and _all(argument(node, 3, "stride", 1), 1)
    even = even and _all(argument(node, 5, "output_padding", 0), 0)
    return Layer("transposed", spatial, weight.shape[0], weight.shape[1] * groups, groups, even)


def _all(given: Any, number: int) -> bool:
    """Whether an argument, a number or one for each axis, is this number throughout."""
    return all(
        type(item) is int and item == number for item in (given if isinstance(given, (tuple, list)) else [given])
    )
