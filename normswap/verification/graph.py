"""Inside an ``.onnx`` file as ONNX Runtime runs it: the value of every node, and which of them its optimizations spoil.

A node is named after the module it was exported from, where the exporter wrote that down."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normswap.onnx.export import quiet
from normswap.verification.inputs import Arguments
from normswap.verification.runners import feeds, session
from normswap.verification.tracing import Entry, Trace

SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata of a node in which torch's exporter lists the names of the modules around it, then that of the node."""
_SHOWN = 4


class Graph:
    """The main graph of a file, and its values on one set of inputs, graph optimizations off."""

    def __init__(self, path: Path, inputs: Arguments) -> None:
        import onnx

        self.path = path
        self.inputs = inputs
        self.model = onnx.load(path, load_external_data=False)
        self.nodes: list[Any] = list(self.model.graph.node)
        self.outputs = [value.name for value in self.model.graph.output]
        self.producer = {name: index for index, node in enumerate(self.nodes) for name in node.output if name}
        self.values = self._run([name for node in self.nodes for name in node.output if name], optimized=False)

    def _run(self, wanted: Sequence[str], *, optimized: bool) -> dict[str, Any]:
        """The values of those names, as numpy arrays."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        if len(wanted) == 1:  # What stands behind it would still be taken into account by optimizations.
            needed = self._above(self.producer[wanted[0]])
            del model.graph.node[:]
            model.graph.node.extend(self.nodes[index] for index in sorted(needed))
        del model.graph.output[:]
        known = {value.name: value for value in (*self.model.graph.output, *self.model.graph.value_info)}
        for name in wanted:
            if name in known:
                model.graph.output.append(known[name])
            else:
                model.graph.output.add().name = name
        opened = session(model.SerializeToString(), optimized=optimized, folder=self.path.parent)
        return dict(zip(wanted, opened.run(None, feeds(opened, self.inputs)), strict=True))

    def trace(self, names: Sequence[str]) -> Trace:
        """Every node as an entry; ``names`` are what the reference calls the outputs, in order.

        Only what depends on the inputs has outputs: a wrong constant shows in the node that reads it."""
        found = Trace()
        varying = {value.name for value in self.model.graph.input} - {v.name for v in self.model.graph.initializer}
        for index, node in enumerate(self.nodes):
            sources = frozenset(self.producer[name] for name in node.input if name in self.producer)
            inputs = self._tensors([name for name in node.input if name in varying])  # not weights that nodes make
            entry = Entry(module_of(node), node.op_type, 0, (), inputs, sources)
            if not varying.isdisjoint(node.input) or (node.attribute and _has_graph(node)):
                varying.update(node.output)
                entry.outputs = self._tensors(node.output)
            entry.made_of, entry.operator = frozenset({index}), node.name or node.output[0]
            found.entries.append(entry)
        _place(found.entries)
        for name, output in zip(names, self.outputs, strict=False):
            if output in self.producer:
                found.final[name] = frozenset({self.producer[output]})
        return found

    def _tensors(self, names: Sequence[str]) -> tuple[Tensor, ...]:
        found = (torch.from_numpy(self.values[name].copy()) for name in names if _is_array(self.values.get(name)))
        return tuple(value for value in found if value.is_floating_point())

    def spoiled(self, output: str, allowed: float) -> int | None:
        """The first node in front of ``output`` whose value graph optimizations change by more than ``allowed`` of its
        scale, found by bisection; ``None`` where none does alone."""
        last = self.producer.get(output)
        if last is None or not self._changed(last, allowed):
            return None
        above = [index for index in sorted(self._above(last)) if self._measurable(index)]
        low, high = -1, len(above) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._changed(above[middle], allowed) else (middle, high)
        return above[high]

    def _measurable(self, index: int) -> bool:
        return bool(self._tensors(self.nodes[index].output[:1]))

    def _above(self, index: int) -> set[int]:
        """A node and all that it is computed from."""
        found, pending = set(), [index]
        while pending:
            each = pending.pop()
            if each not in found:
                found.add(each)
                pending.extend(self.producer[name] for name in self.nodes[each].input if name in self.producer)
        return found

    def _changed(self, index: int, allowed: float) -> bool:
        name = self.nodes[index].output[0]
        off = torch.from_numpy(self.values[name].copy()).double()
        on = torch.from_numpy(self._run([name], optimized=True)[name].copy()).double()
        if on.shape != off.shape:
            return True
        scale = float(off.abs().max()) if off.numel() else 0.0
        return not bool(((on - off).abs() <= allowed * (scale or 1.0)).all())

    def chain(self, index: int) -> str:
        """The operators that lead to a node, the last of them at the end."""
        kinds = [self.nodes[index].op_type]
        while len(kinds) < _SHOWN:
            sources = [self.producer[name] for name in self.nodes[index].input if name in self.producer]
            if not sources:
                break
            index = max(sources)
            kinds.append(self.nodes[index].op_type)
        return " → ".join(reversed(kinds))

    def computes(self, index: int) -> bool | None:
        """Whether ONNX's own reference implementation of a node agrees with the runtime; ``None`` where it has none."""
        import onnx
        from onnx.reference import ReferenceEvaluator

        node = self.nodes[index]
        if _has_graph(node):  # It reads values beside its inputs.
            return None
        folder = str(self.path.parent)
        weights = {value.name: value for value in self.model.graph.initializer}
        try:
            with quiet():
                arrays = {name: self._array(name, weights, folder) for name in node.input if name}
                makes = [onnx.helper.make_tensor_value_info(name, 0, None) for name in (*arrays, *node.output) if name]
                inside = onnx.helper.make_graph([node], "node", makes[: len(arrays)], makes[len(arrays) :])
                model = onnx.helper.make_model(inside, opset_imports=self.model.opset_import)
                own: Any = list(ReferenceEvaluator(model).run(None, arrays))[0]  # noqa: RUF015
        except Exception:
            return None
        mine = torch.from_numpy(own.copy()).double()
        theirs = torch.from_numpy(self.values[node.output[0]].copy())
        if mine.shape != theirs.shape:
            return False
        epsilon = torch.finfo(theirs.dtype).eps if theirs.is_floating_point() else 0.0
        scale = float(mine.abs().max()) if mine.numel() else 0.0
        return bool(((mine - theirs.double()).abs() <= epsilon ** (2 / 3) * scale).all())

    def _array(self, name: str, weights: Mapping[str, Any], folder: str) -> Any:
        import onnx.numpy_helper

        if name in self.values:
            return self.values[name]
        if name in weights:
            return onnx.numpy_helper.to_array(weights[name], folder)
        opened = session(self.path, optimized=False)
        return feeds(opened, self.inputs)[name]


def _place(entries: Sequence[Entry]) -> None:
    """Say which call of which module a node is, where it is the only one of that call."""
    varying = [entry for entry in entries if entry.outputs]
    counts: dict[str, int] = {}
    for name, group in groupby(varying, key=lambda entry: entry.name):
        nodes = list(group)
        call = counts[name] = counts.get(name, -1) + 1
        if name and len(nodes) == 1:
            nodes[0].call, nodes[0].placed = call, True


def _has_graph(node: Any) -> bool:
    return any(attribute.HasField("g") for attribute in node.attribute)


def _is_array(value: Any) -> bool:
    return hasattr(value, "dtype") and value.dtype.kind in "fiub"


def module_of(node: Any) -> str:
    """The dotted name of the module that a node was exported from; empty where that is not known."""
    for entry in node.metadata_props:
        if entry.key == SCOPES:
            try:
                names = ast.literal_eval(entry.value)
            except (ValueError, SyntaxError):
                return ""
            return str(names[-2]) if isinstance(names, list) and len(names) > 1 else ""
    return ""
