"""Whose parameters the functional layers take, and who else reads them.

A call of ``F.conv2d`` is a layer like a module where its weight and bias are parameters that nothing else reads: every
read of them, in all graphs, is such a call, the trace read them no other way, and the module that holds them is called
where the graphs show it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from normswap.engine.dataflow import Dataflow, Place
from normswap.fold import bake, calls
from normswap.fold.calls import Call
from normswap.fold.layers import Layer
from normswap.fold.passages import Flow, value_users
from normswap.graph.reach import reach
from normswap.graph.references import Reference
from normswap.graph.shapes import argument


class Calls:
    """The functional layers of a model, one for each weight."""

    def __init__(self, flow: Dataflow, found: dict[int, Reference], owners: dict[int, list[nn.Module]]) -> None:
        self.flow = flow
        self.references = found
        self.owners = owners
        self.known: dict[int, Call] = {}
        self.kinds: dict[int, Layer] = {}

    def at(self, flow: Flow, node: fx.Node) -> tuple[Call, Layer] | str:
        """The functional layer at a node, or why it is none that can absorb an affine."""
        label = str(getattr(node.target, "__name__", node.target))
        weight = self._parameter(flow, argument(node, 1, "weight"))
        given = argument(node, 2, "bias")
        bias = None if given is None else self._parameter(flow, given)
        if weight is None or (bias is None and given is not None):
            return f"{label}: its {'bias' if weight is not None else 'weight'} is no parameter of a module"
        layer = calls.describe(node, weight)
        if isinstance(layer, str):
            return f"{label}: {layer}"
        call = self.known.get(id(weight))
        if call is None:
            names = [self._name(parameter) for parameter in (weight, bias) if parameter is not None]
            call = self.known[id(weight)] = Call(weight, bias, tuple(names))
        if call.bias is not bias:
            return f"{call.names[0]} is used with different biases"
        if self.kinds.setdefault(id(weight), layer) != layer:
            return f"{call.names[0]} is used by different functions, or with different arguments"
        return call, layer

    def places(self, call: Call) -> list[Place]:
        """The calls that read its weight."""
        return [(flow, user) for flow, node in self.flow.tensor_reads[id(call.weight)] for user in value_users(node)]

    def why_unfit(self, call: Call) -> str | None:
        """Why its parameters must stay as they are, or ``None``."""
        for position, parameter in enumerate(p for p in (call.weight, call.bias) if p is not None):
            name = call.names[position]
            owners = self.owners[id(parameter)]
            if len(owners) > 1:
                return f"{name} is shared with {self.references[id(owners[1])].name or 'the model'}"
            if parameter.is_meta:
                return f"{name} is on the meta device"
            if id(parameter) in self.flow.read_elsewhere or any(self._other_reads(parameter, position + 1)):
                return f"{name} is also read elsewhere"
            attribute = name.rpartition(".")[2]
            owner = owners[0]
            if hooks := bake.other_hooks(owner):
                return f"the module that holds {name} has hooks ({', '.join(hooks)})"
            if self.flow.sites(owner):
                return f"{self.references[id(owner)].name} is also called"
            for parent in self.references[id(owner)].parents:
                if self.references[id(parent)].name not in self.flow.failed:
                    continue  # the graphs show what its code reads
                children = {child for child, read in reach(parent).child_reads if read == attribute}
                if any(parent._modules.get(child) is owner for child in children):
                    return f"the code around it reads {name}"
            reason = self.flow.read_in_doubt(owner, {attribute}) or self.flow.unsettled(owner, self._calls(parameter))
            if reason is not None:
                return reason
        return None

    def _parameter(self, flow: Flow, node: Any) -> nn.Parameter | None:
        if not isinstance(node, fx.Node) or node.op != "get_attr" or str(node.target) in flow.region.constants:
            return None
        holder, _, attribute = str(node.target).rpartition(".")
        parameter = flow.region.module.get_submodule(holder)._parameters.get(attribute)
        return parameter if parameter is not None and id(parameter) in self.owners else None

    def _calls(self, parameter: nn.Parameter) -> list[Place]:
        """The reads of a parameter, one for each call of the module whose code reads it."""
        places: dict[tuple[int, str], Place] = {}
        for flow, node in self.flow.tensor_reads[id(parameter)]:
            for user in value_users(node):
                call = next(reversed(user.meta.get("nn_module_stack") or {}), "")
                places.setdefault((id(flow), call), (flow, node))
        return list(places.values())

    def _name(self, parameter: nn.Parameter) -> str:
        owner = self.owners[id(parameter)][0]
        attribute = next(name for name, own in owner._parameters.items() if own is parameter)
        name = self.references[id(owner)].name
        return f"{name}.{attribute}" if name else attribute

    def _other_reads(self, parameter: nn.Parameter, position: int) -> Iterator[bool]:
        """Whether a graph reads a parameter other than as this argument of a layer, or a trace read it where no graph
        shows it."""
        name = ("input", "weight", "bias")[position]
        for flow, node in self.flow.tensor_reads[id(parameter)]:
            yield node in flow.region.kept
            for user in value_users(node):
                yield not calls.is_layer(user) or argument(user, position, name) is not node
                yield list(user.args).count(node) + list(user.kwargs.values()).count(node) != 1
        yield from (id(parameter) in flow.region.reads for flow in self.flow.flows)
