"""Which values of a ``forward`` are sums of branches of an earlier value, and what stands in the way of others.

The graph of the forward (every child a leaf) is read in order; a call of a child that is no single layer is read
through the child's own graph. Every value is the identity of itself; a convolution, a norm, a scale, a sum make from
operators on a source another one on it. What looks like a branch but may not become part of one carries its reason."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from normswap import registry
from normswap.fold.affine import Affine
from normswap.fold.branches import Sum, Taps
from normswap.graph.shapes import argument
from normswap.graph.trace import is_leaf


@dataclass(frozen=True, eq=False)
class Operator:
    """A value as a sum of branches of a source."""

    sum: Sum
    nodes: frozenset[fx.Node]
    """What computes it, the source left out."""
    norms: tuple[nn.Module, ...] = ()
    tensors: tuple[tuple[nn.Module, str], ...] = ()
    """Parameters that scale or shift it: the module that holds each, and its name there."""
    axes: frozenset[int] = frozenset()
    """Numbers of spatial axes that those parameters assume."""
    shifts: bool = False
    """Whether it has a shift, apart from the biases of convolutions; so by its structure, not by its values."""
    plain: bool = False
    """Whether it is the source itself."""
    reason: str | None = None
    """Why it cannot be merged."""

    def at(self, node: fx.Node, reason: str | None = None, **changes: Any) -> Operator:
        """What an operation makes of it."""
        changes = {"plain": False, **changes}
        return replace(self, nodes=self.nodes | {node}, reason=self.reason or reason, **changes)


@dataclass(frozen=True, eq=False)
class Constant:
    """A parameter, or a view of one."""

    tensor: Tensor
    holders: tuple[tuple[nn.Module, str], ...]
    nodes: frozenset[fx.Node]
    reason: str | None


class Rules(Protocol):
    """What an expression asks about the model around it."""

    def name(self, module: nn.Module) -> str: ...
    def graph(self, module: nn.Module) -> fx.Graph | None:
        """The graph of a module's own ``forward``; ``None`` where it has none that may be read."""

    def layer(self, module: nn.Module) -> str | None:
        """Why a convolution must stay as it is."""

    def norm(self, module: nn.Module) -> Affine | str:
        """What a norm computes, or why it must stay as it is."""

    def passes(self, module: nn.Module) -> str | None:
        """Why a module that hands on its input, or holds the others, must still be called."""

    def tensor(self, owner: nn.Module, attribute: str) -> str | None:
        """Why a parameter must stay as it is."""

    def taps(self, total: Sum) -> Taps | str | None:
        """The taps of a sum, or why it is no convolution; ``None`` where it has no convolution yet."""


Values = dict[fx.Node, Operator]
"""A value as an operator on several sources."""


class Expressions:
    """All values of one module's ``forward``."""

    def __init__(self, module: nn.Module, graph: fx.Graph, rules: Rules) -> None:
        self.rules = rules
        self.values: dict[fx.Node, Values] = {}
        self.passes: set[fx.Node] = set()
        """Nodes that hand on their input."""
        self.paths: dict[int, str] = {}
        """Modules by ``id``: the path from the module whose forward it is."""
        self.modules: dict[fx.Node, nn.Module] = {}
        self._constants: dict[fx.Node, Constant] = {}
        self._same_memory: dict[fx.Node, fx.Node] = {}
        self._new: set[fx.Node] = set()
        self._entered = {id(module)}
        self._read(module, graph, "", None)

    def _read(self, module: nn.Module, graph: fx.Graph, path: str, given: tuple[fx.Node, fx.Node] | None) -> None:
        """``given``: the placeholder that gets a value, and the value's node in the graph around."""
        for node in graph.nodes:
            try:
                found = self._found(module, node, path, given)
            except (RuntimeError, IndexError):  # sizes that do not fit: code that never runs so
                found = {}
            self.values[node] = {node: Operator(Sum.of(None), frozenset(), plain=True), **found}

    def _found(self, module: nn.Module, node: fx.Node, path: str, given: tuple[fx.Node, fx.Node] | None) -> Values:
        if given is not None and node is given[0]:
            return self._handed_on(node, given[1])
        if node.op == "get_attr":
            self._attribute(module, node)
        elif node.op == "call_module":
            return self._call(module, node, path)
        elif node.op in ("call_function", "call_method") and not self._view(node):
            return self._arithmetic(node)
        return {}

    def _handed_on(self, node: fx.Node, source: fx.Node, reason: str | None = None) -> Values:
        self.passes.add(node)
        self._same_memory[node] = source
        return {key: op.at(node, reason, plain=op.plain) for key, op in self.values[source].items()}

    # --- modules -----------------------------------------------------------------------------------------------------

    def _call(self, module: nn.Module, node: fx.Node, path: str) -> Values:
        child = module.get_submodule(str(node.target))
        source = _only_input(node)
        if source is None:
            return {}
        self.modules[node] = child
        self.paths[id(child)] = f"{path}{node.target}"
        if isinstance(child, _ConvNd):
            self._new.add(node)
            return dict(self._convolved(child, node, source))
        if registry.registered(child):
            self._new.add(node)
            return self._normalized(child, node, source)
        if isinstance(child, nn.Identity) or _silent_dropout(child):
            return self._handed_on(node, source, self.rules.passes(child))
        return {} if is_leaf(child) else self._inside(child, node, source, path)

    def _convolved(self, child: nn.Module, node: fx.Node, source: fx.Node) -> Iterator[tuple[fx.Node, Operator]]:
        for key, op in self.values[source].items():
            if op.plain:
                yield key, op.at(node, self.rules.layer(child), sum=Sum.of(child))
            elif not op.sum.layers:
                reason = f"a norm, scale or shift stands in front of {self.rules.name(child)}"
                yield key, op.at(node, reason, sum=Sum.of(child))

    def _normalized(self, child: nn.Module, node: fx.Node, source: fx.Node) -> Values:
        affine = self.rules.norm(child)
        if isinstance(affine, str):
            return {key: op.at(node, f"{self.rules.name(child)}: {affine}") for key, op in self.values[source].items()}
        return {
            key: op.at(
                node,
                sum=op.sum.scaled(affine.scale).shifted(affine.shift),
                norms=(*op.norms, child),
                shifts=True,
            )
            for key, op in self.values[source].items()
        }

    def _inside(self, child: nn.Module, node: fx.Node, source: fx.Node, path: str) -> Values:
        graph = self.rules.graph(child)
        if graph is None or id(child) in self._entered:
            return {}
        self._entered.add(id(child))
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        required = [n for n in placeholders if not n.args]
        result = next(n for n in graph.nodes if n.op == "output")
        value = result.args[0]
        if len(required) != 1 or str(required[0].target).startswith("*") or not isinstance(value, fx.Node):
            return {}
        if node.kwargs and next(iter(node.kwargs)) != required[0].target:
            return {}
        self._read(child, graph, f"{path}{node.target}.", (required[0], source))
        self._same_memory[node] = value
        if source in self.values[value] and self.values[value][source].plain:
            self.passes.add(node)
        reason = self.rules.passes(child)
        return {
            key: op.at(result, plain=op.plain).at(node, reason, plain=op.plain)
            for key, op in self.values[value].items()
            if key in self.values[source]
        }

    # --- parameters --------------------------------------------------------------------------------------------------

    def _attribute(self, module: nn.Module, node: fx.Node) -> None:
        holder, _, name = str(node.target).rpartition(".")
        try:
            owner = module.get_submodule(holder)
        except AttributeError:
            return
        tensor = owner._parameters.get(name)
        if tensor is not None:
            reason = self.rules.tensor(owner, name)
            self._constants[node] = Constant(tensor.detach(), ((owner, name),), frozenset({node}), reason)

    def _view(self, node: fx.Node) -> bool:
        """Whether a node only gives another shape to a parameter."""
        known = self._constants.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if known is None or len(node.all_input_nodes) != 1:
            return False
        if node.op == "call_method" and node.target in _VIEWS:
            tensor = getattr(known.tensor, str(node.target))(*node.args[1:], **node.kwargs)
        elif node.target is operator.getitem:
            tensor = known.tensor[node.args[1]]  # type: ignore[index]
        else:
            return False
        self._constants[node] = replace(known, tensor=tensor, nodes=known.nodes | {node})
        return True

    # --- arithmetic --------------------------------------------------------------------------------------------------

    def _arithmetic(self, node: fx.Node) -> Values:
        kind = _KINDS.get(node.target)
        if kind is None or node.kwargs.keys() - {"input", "other"}:
            return {}
        left, right = argument(node, 0, "input"), argument(node, 1, "other")
        if len(node.args) + len(node.kwargs) != (1 if kind == "neg" else 2):
            return {}
        reason = None
        if node.target in _IN_PLACE:
            if not self._alone(left):
                reason = f"{_shown(node)} writes in place over a value that is also read elsewhere"
            self._same_memory[node] = left
        else:
            self._new.add(node)
        if kind == "neg":
            return self._scaled(node, left, -1.0, reason)
        if kind in ("add", "sub"):
            return self._summed(node, left, right, -1.0 if kind == "sub" else 1.0, reason)
        if kind == "div":
            return self._scaled(node, left, right, reason, divides=True)
        return self._scaled(node, left, right, reason) or self._scaled(node, right, left, reason)

    def _summed(self, node: fx.Node, left: Any, right: Any, sign: float, reason: str | None) -> Values:
        ours, theirs = self._operators(left), self._operators(right)
        if ours and theirs:
            return {key: self._joined(node, op, theirs[key], sign, reason) for key, op in ours.items() if key in theirs}
        if ours and (given := self._per_channel(right)) is not None:
            return self._shifted(node, ours, given, 1.0, sign, reason)
        if theirs and (given := self._per_channel(left)) is not None:
            return self._shifted(node, theirs, given, sign, 1.0, reason)
        return {}

    def _joined(self, node: fx.Node, ours: Operator, theirs: Operator, sign: float, reason: str | None) -> Operator:
        total = ours.sum.plus(theirs.sum.scaled(torch.tensor(sign, dtype=torch.float64)))
        reason = ours.reason or theirs.reason or reason
        if reason is None and isinstance(taps := self.rules.taps(total), str):
            reason = taps
        return Operator(
            total,
            ours.nodes | theirs.nodes | {node},
            tuple(dict.fromkeys((*ours.norms, *theirs.norms))),
            tuple(dict.fromkeys((*ours.tensors, *theirs.tensors))),
            ours.axes | theirs.axes,
            ours.shifts or theirs.shifts,
            reason=reason,
        )

    def _shifted(
        self, node: fx.Node, values: Values, given: _Given, scale: float, sign: float, reason: str | None
    ) -> Values:
        """``scale`` times the values plus ``sign`` times what is given."""
        factor = torch.tensor(scale, dtype=torch.float64)
        return {
            key: given.on(
                op,
                node,
                reason,
                sum=op.sum.scaled(factor).shifted(given.values * sign),
                shifts=op.shifts or not given.nothing,
            )
            for key, op in values.items()
        }

    def _scaled(self, node: fx.Node, value: Any, factor: Any, reason: str | None, *, divides: bool = False) -> Values:
        given = self._per_channel(factor)
        if given is None:
            return {}
        scale = given.values.reciprocal() if divides else given.values
        return {key: given.on(op, node, reason, sum=op.sum.scaled(scale)) for key, op in self._operators(value).items()}

    def _operators(self, value: Any) -> Values:
        if not isinstance(value, fx.Node) or value in self._constants:
            return {}
        return self.values.get(value, {})

    def _per_channel(self, value: Any) -> _Given | None:
        """A number, or a parameter with one element or with one for each channel."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return _Given(torch.tensor(float(value), dtype=torch.float64))
        known = self._constants.get(value) if isinstance(value, fx.Node) else None
        if known is None or known.tensor.is_meta or known.tensor.is_complex():
            return None
        shape = known.tensor.shape
        at = [axis for axis, size in enumerate(shape) if size != 1]
        if len(at) > 1 or (at and at[0] > 1):
            return None
        if at:
            return _Given(known.tensor.double().flatten(), known, frozenset({len(shape) - at[0] - 1}))
        axes = frozenset({len(shape) - 2} if len(shape) > 3 else ())
        return _Given(known.tensor.double().reshape(()), known, axes)

    def _alone(self, value: Any) -> bool:
        """Whether only the node at hand reads a value, under all its names, and the value is made in the expression."""
        while isinstance(value, fx.Node) and len(value.users) == 1:
            if value not in self._same_memory:
                return value in self._new
            value = self._same_memory[value]
        return False


@dataclass(frozen=True, eq=False)
class _Given:
    """What values are multiplied with, or what is added to them."""

    values: Tensor
    constant: Constant | None = None
    axes: frozenset[int] = frozenset()

    @property
    def nothing(self) -> bool:
        return self.constant is None and not self.values.any()

    def on(self, op: Operator, node: fx.Node, reason: str | None, **changes: Any) -> Operator:
        result = op.at(node, reason, **changes)
        if self.constant is None:
            return result
        return replace(
            result,
            nodes=result.nodes | self.constant.nodes,
            tensors=tuple(dict.fromkeys((*op.tensors, *self.constant.holders))),
            axes=op.axes | self.axes,
            reason=result.reason or self.constant.reason,
        )


def _only_input(node: fx.Node) -> fx.Node | None:
    """The one argument of a call, where it has one and that is a value."""
    values = (*node.args, *node.kwargs.values())
    return values[0] if len(values) == 1 and isinstance(values[0], fx.Node) else None


def _silent_dropout(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd) and not (module.training and module.p)


def _shown(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


_VIEWS = frozenset({"view", "reshape", "unsqueeze", "squeeze", "contiguous", "detach"})
_IN_PLACE: tuple[Any, ...] = (
    operator.iadd, operator.isub, operator.imul, operator.itruediv, "add_", "sub_", "mul_", "div_",
)  # fmt: skip
_KINDS: dict[Any, str] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), "add"),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), "sub"),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), "mul"),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, "div", "div_"), "div"),
    **dict.fromkeys((operator.neg, torch.neg, "neg"), "neg"),
}
