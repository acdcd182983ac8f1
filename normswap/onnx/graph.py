"""What is known of an ONNX graph: shapes, constants, who reads what; and the edits that surgery makes in one.

A *constant* is an initializer, the output of a ``Constant`` node, or what some plain operations compute from those. An
initializer that is also an input of the graph may be given another value by whoever runs the model, so it is none; but
before IR version 4 every initializer had to be listed as an input, and runtimes take it for a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx.helper import make_graph, make_model, make_opsetid, make_tensor_value_info
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import ShapeInferencePass

from normswap.graph.shapes import Shape, Symbol
from normswap.onnx.export import quiet

Array = NDArray[Any]
Tensor = ir.Tensor[Any]
DEFAULT = ("", "ai.onnx")
FLOATS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE)
_SHAPE_ONLY = {"Shape": 0, "Size": 0, "CastLike": 1}
_MOVES = frozenset({"Identity", "Transpose"})
_COMPUTED = frozenset(
    {
        "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Expand", "ConstantOfShape", "Shape", "Concat", "Gather", "Slice",
        "Add", "Sub", "Mul", "Div", "Neg", "Sqrt", "Reciprocal", "Range", "Tile",
    }
)  # fmt: skip


class View:
    """A model with what is inferred of its values."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.opset: int = max((model.opset_imports.get(domain) or 0) for domain in DEFAULT)
        self.inputs_are_constants = model.ir_version < 4
        self._shapes: dict[int, Shape] = {}
        self._dtypes: dict[int, ir.DataType] = {}
        self.names = {value.name for graph in model.graphs() for value in values_of(graph)}
        self._infer()

    def _infer(self) -> None:
        symbols: dict[str, Symbol] = {}
        inferred = self.model.clone()
        with suppress(Exception), quiet():  # shapes that cannot be inferred stay unknown
            ShapeInferencePass(check_type=False, strict_mode=False)(inferred)
        for graph, twin in zip(self.model.graphs(), inferred.graphs(), strict=True):
            known = {value.name: value for value in values_of(twin)}
            for value in values_of(graph):
                other = known.get(value.name, value)
                if other.shape is not None:
                    self._shapes[id(value)] = tuple(_dim(dim, symbols) for dim in other.shape)
                if other.dtype is not None:
                    self._dtypes[id(value)] = other.dtype

    def shape(self, value: ir.Value | None) -> Shape | None:
        """The shape of a value where its rank is known."""
        if value is None:
            return None
        if value.const_value is not None:
            return tuple(int(size) for size in value.const_value.shape.numpy())
        return self._shapes.get(id(value))

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        if value is None:
            return None
        if value.const_value is not None:
            return value.const_value.dtype
        return self._dtypes.get(id(value), value.dtype)

    def same(self, new: ir.Value, old: ir.Value) -> None:
        """A new value has the shape and type of an old one."""
        new.shape, new.type = old.shape, old.type
        if (shape := self.shape(old)) is not None:
            self._shapes[id(new)] = shape
        if (dtype := self.dtype(old)) is not None:
            self._dtypes[id(new)] = dtype

    # --- constants ---------------------------------------------------------------------------------------------------

    def tensor(self, value: ir.Value | None) -> ir.TensorProtocol | None:
        """The tensor of an initializer or of a ``Constant`` node."""
        if value is None:
            return None
        if value.is_initializer():
            return value.const_value if self.fixed(value) else None
        node = value.producer()
        if node is None or node.op_type != "Constant" or node.domain not in DEFAULT:
            return None
        return ir.convenience.get_const_tensor(value)

    def fixed(self, value: ir.Value) -> bool:
        """Whether whoever runs the model cannot give an initializer another value."""
        return self.inputs_are_constants or not value.is_graph_input()

    def constant(self, value: ir.Value | None) -> Array | None:
        """The values of a constant."""
        tensor = self.tensor(value)
        if tensor is not None:
            array: Array = tensor.numpy()
            return array
        node = None if value is None else value.producer()
        if node is None or node.domain not in DEFAULT or not node.inputs:
            return None
        if node.op_type in _MOVES | {"Cast", "CastLike"}:
            source = self.constant(node.inputs[0])
            if source is None or source.dtype.kind == "c" or node.op_type == "Identity":
                return source
            if node.op_type == "Transpose":
                axes = permutation(node, source.ndim)
                return source.transpose(axes) if sorted(axes) == list(range(source.ndim)) else None
            dtype = ir.DataType(attribute(node, "to")) if node.op_type == "Cast" else self.dtype(node.inputs[1])
            return None if dtype is None else source.astype(dtype.numpy())
        return self._computed(node) if node.op_type in _COMPUTED and len(node.outputs) == 1 else None

    def _computed(self, node: ir.Node) -> Array | None:
        """The result of an operation on constants, by ONNX's reference implementation of it."""
        arrays = [self.constant(value) for value in node.inputs]
        given = [value is not None for value in node.inputs]
        if any(array is None for array, there in zip(arrays, given, strict=True) if there):
            return None
        proto = ir.serde.serialize_node(node)
        del proto.input[:], proto.output[:]
        proto.input.extend(f"input_{index}" if there else "" for index, there in enumerate(given))
        proto.output.append("output")
        inputs = [make_tensor_value_info(name, 0, None) for name in proto.input if name]
        graph = make_graph([proto], "constant", inputs, [make_tensor_value_info("output", 0, None)])
        evaluator = ReferenceEvaluator(make_model(graph, opset_imports=[make_opsetid("", self.opset)]))
        feeds = {f"input_{index}": array for index, array in enumerate(arrays) if array is not None}
        with suppress(Exception), quiet(), np.errstate(all="ignore"):  # no constant then
            results: Any = evaluator.run(None, feeds)
            return np.asarray(results[0])
        return None

    def integers(self, node: ir.Node, name: str, index: int) -> list[int] | None:
        """Whole numbers that are an attribute in old operator sets and an input in new ones."""
        given = attribute(node, name)
        if given is None and len(node.inputs) > index:
            given = self.constant(node.inputs[index])
        return None if given is None else [int(number) for number in np.asarray(given).reshape(-1)]

    # --- edits -------------------------------------------------------------------------------------------------------

    def fresh(self, wanted: str) -> str:
        """A name that no value has."""
        name, number = wanted, 0
        while name in self.names:
            number += 1
            name = f"{wanted}_{number}"
        self.names.add(name)
        return name

    def add_initializer(self, graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(name=self.fresh(name), shape=shape_of(tensor), type=ir.TensorType(tensor.dtype))
        value.const_value = tensor
        graph.register_initializer(value)
        if self.inputs_are_constants:
            graph.inputs.append(value)
        return value

    def prune(self, value: ir.Value | None) -> None:
        """Remove a constant that nothing reads any more, and what it was computed from."""
        if value is None or value.uses() or value.is_graph_output():
            return
        if value.is_initializer():
            graph = value.graph
            if graph is not None and value.name is not None and self.fixed(value):
                if value.is_graph_input():
                    graph.inputs.remove(value)
                graph.initializers.pop(value.name)
            return
        node = value.producer()
        if node is None or node.graph is None or len(node.outputs) != 1 or self.constant(value) is None:
            return
        inputs = list(node.inputs)
        node.graph.remove(node, safe=True)
        for source in inputs:
            self.prune(source)

    def set_constant(self, node: ir.Node, index: int, tensor: ir.TensorProtocol, name: str) -> None:
        """Give an input of a node another constant: in place where it alone reads it, else under a new name."""
        value = node.inputs[index] if index < len(node.inputs) else None
        root, axes = self.root(value)
        direct = root is not None and root.const_value is not None and not axes
        if direct and root is not None and value is not None and (alone(value, root) or same_shape(root, tensor)):
            old = root.const_value
            tensor.name, tensor.doc_string = root.name or "", None if old is None else old.doc_string
            root.const_value = tensor
            for changed in (root, value):
                changed.shape = shape_of(tensor)
                changed.type = ir.TensorType(tensor.dtype)
                self._shapes.pop(id(changed), None)
            return
        assert isinstance(node.graph, ir.Graph)
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        node.replace_input_with(index, self.add_initializer(node.graph, name, tensor))
        self.prune(value)

    def root(self, value: ir.Value | None) -> tuple[ir.Value | None, list[list[int]]]:
        """The initializer that a value is made of, through identities and transpositions, and the permutations applied.

        No initializer where anything else reads it, or what is made of it."""
        axes: list[list[int]] = []
        while value is not None and self.sole(value):
            if value.is_initializer():
                return (value, axes) if self.tensor(value) is not None else (None, axes)
            node = value.producer()
            if node is None or node.op_type not in _MOVES or node.domain not in DEFAULT:
                break
            if node.op_type == "Transpose":
                rank = len(self.shape(node.inputs[0]) or ())
                axes.append(permutation(node, rank))
            value = node.inputs[0]
        return None, axes

    def sole(self, value: ir.Value) -> bool:
        """Whether one input of one node is all that reads a value's elements."""
        return len(value_uses(value)) == 1 and not value.is_graph_output()


def values_of(graph: ir.Graph) -> Iterator[ir.Value]:
    """Every value of a graph that has a name, once."""
    seen: set[int] = set()
    everything = (*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs))
    for value in everything:
        if id(value) not in seen and value.name:
            seen.add(id(value))
            yield value


def alone(*values: ir.Value) -> bool:
    """Whether each of some values is read once, be it for its shape."""
    return all(len(value.uses()) == 1 for value in values)


def same_shape(value: ir.Value, tensor: ir.TensorProtocol) -> bool:
    return value.const_value is not None and value.const_value.shape == tensor.shape


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The value of an attribute."""
    found = node.attributes.get(name)
    return default if found is None or found.is_ref() else found.value


def permutation(node: ir.Node, rank: int) -> list[int]:
    """Of a ``Transpose``: the axis of its input that each axis of its output is."""
    given = attribute(node, "perm")
    return list(range(rank))[::-1] if given is None else list(given)


def value_uses(value: ir.Value) -> list[tuple[ir.Node, int]]:
    """The inputs of nodes that read a value's elements, not only its shape or type."""
    return [(node, index) for node, index in value.uses() if _SHAPE_ONLY.get(node.op_type) != index]


def is_op(node: ir.Node | None, *names: str) -> bool:
    """Whether a node is one of ONNX's own operators."""
    return node is not None and node.domain in DEFAULT and node.op_type in names


def name_of(node: ir.Node) -> str:
    return node.name or (node.outputs[0].name if node.outputs else "") or node.op_type


def label(node: ir.Node) -> str:
    """A node in words, for a reason."""
    return f"{name_of(node)} ({node.op_type})"


def double(array: Array) -> NDArray[np.float64]:
    return np.array(array, dtype=np.float64, order="C")


def shape_of(tensor: ir.TensorProtocol) -> ir.Shape:
    return ir.Shape(tensor.shape.numpy())


def cast(array: Array, dtype: ir.DataType, name: str = "") -> Tensor | str:
    """Values in ``dtype``, or the reason why they do not fit in it."""
    with np.errstate(over="ignore"):
        rounded = np.ascontiguousarray(array.astype(dtype.numpy(), copy=False))
    if not np.isfinite(rounded).all():
        return f"the folded values would not be finite in {dtype.name.lower()}"
    if (lost := rounding(array, rounded)) > epsilon(dtype):
        return f"the folded values would lose {lost:.1e} of themselves to rounding in {dtype.name.lower()}"
    return ir.Tensor(rounded, dtype=dtype, name=name or None)


def rounding(array: Array, rounded: Array) -> float:
    """What a cast to 16 bits adds to an array, relative to its norm; 0 for a wider type."""
    largest = 0.0 if rounded.dtype.itemsize > 2 else float(np.abs(array).max(initial=0.0))
    if not largest:
        return 0.0
    lost = np.linalg.norm((rounded.astype(np.float64) - array) / largest)
    return float(lost / np.linalg.norm(array / largest))


def epsilon(dtype: ir.DataType) -> float:
    return float(torch.finfo(ir.tensor_adapters.to_torch_dtype(dtype)).eps)


def _dim(dim: Any, symbols: dict[str, Symbol]) -> int | Symbol:
    if isinstance(dim, int):
        return dim
    name = getattr(dim, "value", None)
    return Symbol() if name is None else symbols.setdefault(str(name), Symbol())


Edit = Callable[[], None]
"""A change of the graph that is made when all that a norm needs is known to be possible."""
