r"""Linear layers of an ONNX graph, and how they absorb a channel affine: the arithmetic is that of ``fold/layers.py``.

==================  ============================================  ==============================================
operator            its weight, as that of a layer                its bias
==================  ============================================  ==============================================
``Conv``            the same                                      the third input
``ConvTranspose``   the same                                      the third input
``Gemm``            :math:`\alpha B`, transposed unless transB    :math:`\beta C`; both factors become 1
``MatMul``          its second input, a constant matrix,          an ``Add`` of a constant behind it; put there where
                    transposed                                    there is none
==================  ============================================  ==============================================

A weight may stand behind identities and transpositions. It is changed where it is stored, under its name, if nothing
else reads it; otherwise the layer is left, or with ``unshare`` it gets a copy. A bias is small and is copied.
Arithmetic is in float64, by one layer at a time, and cast once; weights in external files are folded again while they
are written, so that no more than one of them is in memory.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from normswap.errors import NormswapError
from normswap.fold.affine import Affine
from normswap.fold.layers import Layer, Side, absorb
from normswap.onnx.graph import (
    FLOATS,
    Array,
    Edit,
    Tensor,
    View,
    attribute,
    cast,
    double,
    is_op,
    label,
    name_of,
    shape_of,
)

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class _Kernel(nn.Module):
    """The weight and bias of a layer, for ``fold/layers.py``."""

    def __init__(self, weight: Array, bias: NDArray[np.float64] | None) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # memory that is mapped from a file cannot be written; nor is it here
            self.weight = nn.Parameter(torch.from_numpy(weight), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(torch.from_numpy(bias), requires_grad=False)


@dataclass(frozen=True)
class Linear:
    """A node that is a linear layer with a constant weight."""

    node: ir.Node
    layer: Layer
    dtype: ir.DataType
    transposed: bool
    """Whether the weight is stored as ``(inputs, outputs)``."""
    alpha: float = 1.0
    beta: float = 1.0
    adder: ir.Node | None = None
    """Behind a ``MatMul``: the ``Add`` of a constant that is its bias."""

    @property
    def bias_at(self) -> tuple[ir.Node, int]:
        if self.adder is None:
            return self.node, 2
        return self.adder, 1 if self.adder.inputs[0] is self.node.outputs[0] else 0

    def channel_axis(self, rank: int | None) -> int | None:
        """The axis of its input and output that holds the channels."""
        if self.node.op_type != "MatMul":
            return 1
        return None if rank is None else rank - 1


def describe(view: View, node: ir.Node) -> Linear | str:
    """The layer that a node is, or why it cannot absorb an affine."""
    value = node.inputs[1]
    weight = view.constant(value)
    if weight is None:
        return f"{label(node)}: {_why_no_constant(view, value)}"
    tensor_type = next((kind for kind in FLOATS if kind.numpy() == weight.dtype), None)
    if tensor_type is None:
        return f"{label(node)}: its weight is of type {weight.dtype}"
    shape = weight.shape
    if node.op_type in ("Gemm", "MatMul"):
        if len(shape) != 2:
            return f"{label(node)}: its weight has {len(shape)} axes"
        stored = not attribute(node, "transB", 0)
        inputs, outputs = shape if stored else shape[::-1]
        layer = Layer("linear", 0, inputs, outputs, 1, True)
        if node.op_type == "MatMul":
            return Linear(node, layer, tensor_type, True, adder=_adder(view, node, outputs))
        if attribute(node, "transA", 0):
            return f"{label(node)} transposes its input"
        if (reason := _bad_bias(view, node, outputs, spread=True)) is not None:
            return reason
        alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
        return Linear(node, layer, tensor_type, stored, alpha, beta)
    if len(shape) < 3:
        return f"{label(node)}: its weight has {len(shape)} axes"
    groups = attribute(node, "group", 1)
    kind: Literal["conv", "transposed"] = "transposed" if node.op_type == "ConvTranspose" else "conv"
    inputs, outputs = (shape[1] * groups, shape[0]) if kind == "conv" else (shape[0], shape[1] * groups)
    if (reason := _bad_bias(view, node, outputs)) is not None:
        return reason
    return Linear(node, Layer(kind, len(shape) - 2, inputs, outputs, groups, _even(node, shape)), tensor_type, False)


def _why_no_constant(view: View, value: ir.Value | None) -> str:
    if value is None:
        return "it has no weight"
    if value.is_graph_input():
        return f"its weight {value.name!r} is an input of the graph, which may be given another value"
    producer = value.producer()
    return f"its weight {value.name!r} is {'no constant' if producer is None else 'computed by ' + label(producer)}"


def _bad_bias(view: View, node: ir.Node, outputs: int, *, spread: bool = False) -> str | None:
    """Why a bias is not one number an output channel; ``spread`` where it is broadcast to that."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return None
    array = view.constant(bias)
    if array is None:
        return f"{label(node)}: its bias {bias.name!r} is no constant"
    fits = array.size == 1 or (array.size == outputs and array.shape[-1] == outputs)
    if not (fits if spread else array.shape == (outputs,)):
        return f"{label(node)}: its bias has shape {array.shape}, for {outputs} channels"
    return None


def _adder(view: View, node: ir.Node, outputs: int) -> ir.Node | None:
    """The ``Add`` of a bias to the product of a ``MatMul``, where that is all that reads it."""
    output = node.outputs[0]
    if not view.sole(output):
        return None
    reader = next(iter(output.uses())).node
    if not is_op(reader, "Add") or reader.graph is not node.graph:
        return None
    other = reader.inputs[1] if reader.inputs[0] is output else reader.inputs[0]
    array = view.constant(other)
    fits = array is not None and array.size == outputs and array.shape[-1:] == (outputs,)
    rank = len(view.shape(output) or ())
    return reader if fits and array is not None and array.ndim <= max(rank, 1) else None


def _even(node: ir.Node, shape: tuple[int, ...]) -> bool:
    """Whether a constant on an input channel gives a constant on every output channel."""
    automatic = attribute(node, "auto_pad", "NOTSET")
    pads = any(attribute(node, "pads") or ())
    point = all(size == 1 for size in shape[2:])
    if node.op_type == "ConvTranspose":
        steps = all(step == 1 for step in attribute(node, "strides") or ())
        extra = any(attribute(node, "output_padding") or ()) or attribute(node, "output_shape") is not None
        return point and steps and not extra and not pads and automatic in ("NOTSET", "VALID")
    return automatic == "VALID" or (automatic == "NOTSET" and not pads)


def take_in(view: View, linear: Linear, affine: Affine, side: Side, *, unshare: bool = False) -> tuple[Edit, str] | str:
    """The edit by which a layer absorbs an affine, and a remark; or why it cannot. Nothing is changed yet."""
    node, layer = linear.node, linear.layer
    channels = layer.outputs if side == "output" else layer.inputs
    if affine.channels != channels:
        return f"{label(node)} has {channels} channels there, the norm {affine.channels}"
    if side == "input" and not layer.shift_reaches_evenly and not affine.no_shift:
        return f"{label(node)} pads with zeros (or is transposed), and the shift is not zero"
    value = node.inputs[1]
    assert value is not None
    root, axes = view.root(value)
    direct = view.tensor(value) if view.sole(value) else None
    if root is None and direct is None and not unshare:
        return f"{label(node)} shares its weight {value.name!r}; unshare gives it a copy"
    stored = view.constant(value)
    assert stored is not None
    holder, index = linear.bias_at
    old = view.constant(holder.inputs[index]) if index < len(holder.inputs) else None
    weight, bias = _folded(linear, affine, side, stored, old)
    del stored
    _release(None if root is None else root.const_value)
    tensor = cast(weight, linear.dtype, value.name or "")
    if isinstance(tensor, str):
        return f"{label(node)}: {tensor}"
    bias_tensor = None if bias is None else cast(bias, linear.dtype)
    if isinstance(bias_tensor, str):
        return f"{label(node)}: {bias_tensor}"
    remark = "" if root is not None or direct is not None else f"{name_of(node)} gets a copy of {value.name}"

    def edit() -> None:
        new: ir.TensorProtocol = tensor
        if root is not None:
            base = root.const_value
            assert base is not None
            if isinstance(base, ir.ExternalTensor | ir.LazyTensor):
                new = _lazy(linear, affine, side, base, axes)
            else:
                new = ir.Tensor(_moved(tensor.numpy(), _inverse(axes)), dtype=linear.dtype, name=root.name)
            new.doc_string = base.doc_string
            root.const_value = new
        else:
            view.set_constant(node, 1, new, f"{value.name}_folded")
        _set_bias(view, linear, bias_tensor)

    return edit, remark


def _lazy(linear: Linear, affine: Affine, side: Side, base: ir.TensorProtocol, axes: list[list[int]]) -> ir.LazyTensor:
    """The folded weight, computed when it is written."""

    def compute() -> ir.TensorProtocol:
        weight, _ = _folded(linear, affine, side, _moved(base.numpy(), axes[::-1]), None)
        tensor = cast(weight, linear.dtype)
        assert isinstance(tensor, ir.Tensor)
        _release(base)
        return ir.Tensor(_moved(tensor.numpy(), _inverse(axes)), dtype=linear.dtype)

    return ir.LazyTensor(compute, dtype=base.dtype, shape=shape_of(base), name=base.name)


def _release(tensor: ir.TensorProtocol | None) -> None:
    """Give the memory back that an external file is mapped into; it is mapped again when it is needed."""
    if isinstance(tensor, ir.ExternalTensor):
        with suppress(BufferError):  # still in use
            tensor.release()


def _moved(array: Array, permutations: list[list[int]]) -> Array:
    for axes in permutations:
        array = array.transpose(axes)
    return np.ascontiguousarray(array)


def _inverse(permutations: list[list[int]]) -> list[list[int]]:
    """What puts the axes of a weight back to where they are stored; the permutations are in order from the layer."""
    return [list(np.argsort(axes)) for axes in permutations]


def _folded(linear: Linear, affine: Affine, side: Side, stored: Array, old: Array | None) -> tuple[Array, Array | None]:
    """The weight as the layer reads it, and the bias, with the affine in them; not finite where they are too large."""
    bias = None
    if old is not None:
        bias = np.broadcast_to(double(old).reshape(-1) * linear.beta, (linear.layer.outputs,)).copy()
    weight = stored.T if linear.transposed else stored
    single = linear.dtype == ir.DataType.FLOAT and linear.alpha == 1.0  # cast once, by parts
    kernel = _Kernel(weight if single else double(weight) * linear.alpha, bias)
    try:
        absorb(kernel, linear.layer, affine, side)
    except NormswapError:
        return np.full((), np.inf), None
    new = kernel.weight.detach().numpy()
    return new.T if linear.transposed else new, None if kernel.bias is None else kernel.bias.detach().numpy()


def _set_bias(view: View, linear: Linear, tensor: Tensor | None) -> None:
    node = linear.node
    for factor in ("alpha", "beta"):
        if factor in node.attributes:
            node.attributes[factor] = ir.AttrFloat32(factor, 1.0)
    if tensor is None:
        return
    weight = node.inputs[1]
    stem, dot, last = ((weight.name or "") if weight is not None else "").rpartition(".")
    name = f"{stem}.bias" if dot and last == "weight" else f"{name_of(node)}_bias"
    if node.op_type == "MatMul" and linear.adder is None:
        add_behind(view, node, tensor, name)
        return
    holder, index = linear.bias_at
    view.set_constant(holder, index, tensor, name)


def add_behind(view: View, node: ir.Node, tensor: Tensor, name: str) -> None:
    """Add a constant to the result of a node; what it gives keeps its name."""
    output, graph = node.outputs[0], node.graph
    assert isinstance(graph, ir.Graph)
    readers = list(output.uses())
    adder = ir.node("Add", [output, view.add_initializer(graph, name, tensor)], name=f"{name_of(node)}_add")
    new = adder.outputs[0]
    view.same(new, output)
    for reader, index in readers:
        reader.replace_input_with(index, new)
    for index, value in enumerate(graph.outputs):
        if value is output:
            graph.outputs[index] = new
    kept, output.name = output.name, view.fresh(f"{output.name}_product")
    new.name = kept
    graph.insert_after(node, adder)
