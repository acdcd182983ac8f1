"""Which layers of an ONNX graph absorb each batch normalization, and the guards: who else reads a value.

Backward first: the affine of a norm moves against the dataflow until layers absorb it on their output side. Then
forward: along the dataflow, until all that read it absorb it on their input side. Every fold that is found is made at
once, in the model in memory, so that the next norm sees the graph without it. A norm that no layer absorbs stays: one
batch normalization costs less than the multiplication and the addition that could replace it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from normswap.engine.plan import Change, Skip
from normswap.fold.affine import Affine
from normswap.fold.layers import Side
from normswap.onnx import layers, passages
from normswap.onnx.arithmetic import Need, Passage
from normswap.onnx.graph import Edit, Tensor, View, cast, is_op, label, name_of, value_uses
from normswap.onnx.norms import NodeSite, is_batch, scale_and_bias
from normswap.spec import Norm, scale_shift


@dataclass
class Trial:
    """What one norm's disappearance asks of the graph; made only if all of it is possible."""

    edits: list[Edit] = field(default_factory=list)
    into: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reached: set[int] = field(default_factory=set)
    """Nodes that take something in, by ``id``."""

    def once(self, node: ir.Node) -> str | None:
        """Why a node cannot take in something for a second time."""
        if id(node) in self.reached:
            return f"{label(node)} is reached on two ways"
        self.reached.add(id(node))
        return None


class Search:
    """Folds the norms of a model, one by one."""

    def __init__(self, view: View, *, unshare: bool = False) -> None:
        self.view = view
        self.unshare = unshare

    def run(self, sites: list[NodeSite]) -> dict[int, Change | Skip]:
        """What becomes of each site, by the ``id`` of its node."""
        outcomes: dict[int, Change | Skip] = {}
        reasons: dict[int, str] = {}
        for site in sites:
            if (reason := _refused(site)) is not None:
                outcomes[id(site.node)] = skipped(site, reason)
        for direction in (self._backward, self._forward):
            for site in sites:
                key = id(site.node)
                if key in outcomes:
                    continue
                result = self._attempt(site, direction)
                if isinstance(result, Change):
                    outcomes[key] = result
                else:
                    before = reasons.setdefault(key, result)
                    if direction == self._forward:
                        told = before if before == result else f"backward: {before}; forward: {result}"
                        outcomes[key] = skipped(site, told)
        return outcomes

    def _attempt(self, site: NodeSite, direction: Callable[[NodeSite, Affine, Trial], str | None]) -> Change | str:
        assert site.norm is not None
        norm = _current(self.view, site)
        pair = None if isinstance(norm, str) else scale_shift(norm)
        affine = None if pair is None else Affine(*pair)
        if affine is None or not affine.finite:
            return norm if isinstance(norm, str) else "its statistics are not finite, or a variance is negative"
        trial = Trial()
        if (reason := direction(site, affine, trial)) is not None:
            return reason
        for edit in trial.edits:
            edit()
        self._remove(site.node)
        channels = site.norm.channels
        target = Norm(kind="identity", channels=channels, pools=frozenset(), momentum=None)
        return Change(
            site.name, site.norm, target, "exact", "identity", aliases=site.aliases, into=tuple(trial.into),
            notes=tuple(filter(None, trial.notes)),
        )  # fmt: skip

    def _remove(self, node: ir.Node) -> None:
        """Take a norm out of the graph; what it gave keeps its name where it is an output of the graph."""
        source, output, graph = node.inputs[0], node.outputs[0], node.graph
        assert source is not None
        assert isinstance(graph, ir.Graph)
        parameters = list(node.inputs[1:])
        if output.is_graph_output():
            name, output.name = output.name, self.view.fresh(f"{output.name}_norm")
            source.name = name
            source.type, source.shape = output.type, output.shape
        output.replace_all_uses_with(source, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        for value in parameters:
            self.view.prune(value)

    # --- backward ----------------------------------------------------------------------------------------------------

    def _backward(self, site: NodeSite, affine: Affine, trial: Trial) -> str | None:
        source = site.node.inputs[0]
        if source is None:
            return "it has no input"
        pending = [(Need(source, affine, 1), site.node)]
        while pending:
            need, reader = pending.pop()
            value, node = need.value, need.value.producer()
            if (reason := self._other_reader(value, reader)) is not None:
                return reason
            if node is None:
                return f"{value.name!r} is {'a constant' if value.is_initializer() else 'an input of the graph'}"
            if node.graph is not reader.graph:
                return f"{label(node)} is outside the subgraph"
            if is_batch(node):
                reason = self._into_norm(node, need, trial)
            elif is_op(node, *layers.LAYERS):
                reason = self._into_layer(node, need, "output", trial)
            else:
                outcome = passages.backward(self.view, node, need)
                reason = outcome if isinstance(outcome, str) else self._pass(node, outcome, trial)
                if not isinstance(outcome, str):
                    pending.extend((inner, node) for inner in outcome.needs)
            if reason is not None:
                return reason
        return None

    def _other_reader(self, value: ir.Value, reader: ir.Node) -> str | None:
        producer = value.producer()
        name = label(producer) if producer is not None else repr(value.name)
        if value.is_graph_output():
            return f"{name} is also an output of the graph"
        others = [node for node, _ in value_uses(value) if node is not reader]
        if others:
            inside = " in a subgraph" if others[0].graph is not reader.graph else ""
            return f"{name} is also read by {label(others[0])}{inside}"
        return None if len(value_uses(value)) == 1 else f"{label(reader)} reads {name} twice"

    def _pass(self, node: ir.Node, passage: Passage, trial: Trial) -> str | None:
        if passage.edits and (reason := trial.once(node)) is not None:
            return reason
        trial.edits.extend(passage.edits)
        if passage.edits:
            trial.into.append(name_of(node))
        return None

    def _into_norm(self, node: ir.Node, need: Need, trial: Trial) -> str | None:
        """A batch normalization in front takes the affine into its own."""
        if need.axis != 1:
            return f"{label(node)}: the norm's channels are another axis"
        own = scale_and_bias(self.view, node)
        if isinstance(own, str):
            return f"{label(node)}: {own}"
        scale, bias = own
        if scale.shape != need.affine.scale.shape:
            return f"{label(node)} has {scale.shape[0]} channels there, the norm {need.affine.channels}"
        for index, new in ((1, need.affine.scale * scale), (2, need.affine.scale * bias + need.affine.shift)):
            old = self.view.constant(node.inputs[index])
            assert old is not None
            tensor = cast(new.numpy(), ir.DataType.from_numpy(old.dtype))
            if isinstance(tensor, str):
                return f"{label(node)}: {tensor}"
            trial.edits.append(self._setter(node, index, tensor))
        trial.into.append(name_of(node))
        return trial.once(node)

    def _setter(self, node: ir.Node, index: int, tensor: Tensor) -> Edit:
        name = f"{name_of(node)}_{'scale' if index == 1 else 'bias'}"
        return lambda: self.view.set_constant(node, index, tensor, name)

    def _into_layer(self, node: ir.Node, need: Need, side: Side, trial: Trial) -> str | None:
        linear = layers.describe(self.view, node)
        if isinstance(linear, str):
            return linear
        if side == "output":  # an addition behind has taken its part in already
            linear = replace(linear, adder=None)
        shape = self.view.shape(need.value)
        axis = linear.channel_axis(None if shape is None else len(shape))
        if axis is None:
            return f"{label(node)}: the rank of its values is not known"
        if axis != need.axis:
            return f"{label(node)}: the norm's channels are another axis"
        taken = layers.take_in(self.view, linear, need.affine, side, unshare=self.unshare)
        if isinstance(taken, str):
            return taken
        edit, remark = taken
        trial.edits.append(edit)
        trial.notes.append(remark)
        trial.into.append(name_of(node))
        return trial.once(node) or (None if linear.adder is None else trial.once(linear.adder))

    # --- forward -----------------------------------------------------------------------------------------------------

    def _forward(self, site: NodeSite, affine: Affine, trial: Trial) -> str | None:
        pending = [Need(site.node.outputs[0], affine, 1)]
        while pending:
            need = pending.pop()
            value = need.value
            if value.is_graph_output():
                return f"{value.name!r} is an output of the graph"
            uses = value_uses(value)
            if not uses:
                return "nothing reads it"
            for user, index in uses:
                if sum(node is user for node, _ in uses) != 1:
                    return f"{label(user)} reads it twice"
                if user.graph is not site.node.graph:
                    return f"{label(user)} in a subgraph reads it"
                if is_op(user, *layers.LAYERS):
                    if index != 0:
                        return f"{label(user)} reads it as a weight or a bias"
                    if (reason := self._into_layer(user, need, "input", trial)) is not None:
                        return reason
                    continue
                outcome = passages.forward(self.view, user, need)
                if isinstance(outcome, str):
                    return outcome
                pending.extend(outcome.needs)
        return None


def _current(view: View, site: NodeSite) -> Norm | str:
    """A norm's description now: norms in front may have taken others into their scale and bias."""
    norm, own = site.norm, scale_and_bias(view, site.node)
    if norm is None or isinstance(own, str):
        return own if isinstance(own, str) else "it is not known what it computes"
    return replace(norm, weight=own[0], bias=own[1])


def _refused(site: NodeSite) -> str | None:
    """Why a norm is out of the question by itself."""
    if site.reason is not None or site.norm is None:
        return site.reason or "it is not known what it computes"
    if site.norm.kind != "batch":
        return f"{site.norm.kind} computes its statistics from each input"
    return None


def skipped(site: NodeSite, reason: str) -> Skip:
    return Skip(site.name, reason, site.norm, site.label, aliases=site.aliases)
