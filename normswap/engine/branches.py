"""Which sums of branches become one convolution: the largest in each ``forward``, and the guards.

From the outermost module in: a sum belongs to the smallest module whose own ``forward`` adds it up. What is inside must
be called there alone, and be read by nothing else."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from normswap import registry
from normswap.engine.expressions import Expressions, Operator
from normswap.engine.plan import Merge
from normswap.engine.search import Search, follows, watched
from normswap.engine.sites import Site
from normswap.errors import Refusal
from normswap.fold import bake
from normswap.fold.affine import Affine
from normswap.fold.branches import Sum, Taps, itself, joined, taps_of
from normswap.fold.passages import Flow, label
from normswap.graph.overwrites import Overwrites
from normswap.graph.reach import reach
from normswap.graph.references import Reference
from normswap.graph.rewrite import TracedForward, traced_forward
from normswap.graph.trace import Region, check_default, is_leaf, trace
from normswap.spec import scale_shift

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def find_merges(search: Search, sites: Mapping[int, Site], stays: Mapping[int, str]) -> tuple[list[Merge], list[str]]:
    """The sums of branches that can be merged, and what stands against the others.

    ``sites``: the norms that may be folded, by ``id`` of their module; ``stays``: why others may not."""
    holding = next((r for r in search.references.values() if r.captured is not None), None)
    if holding is not None:
        return [], [
            f"no branches are merged: {holding.captured} holds {holding.name or 'the model'} in a closure, method or "
            "object, which a merge would not reach"
        ]
    finder = _Finder(search, sites, stays)
    for reference in search.references.values():
        finder.look_at(reference)
    return finder.merges, finder.notes


class _Finder:
    """Collects merges; answers what an expression asks about the model around it."""

    def __init__(self, search: Search, sites: Mapping[int, Site], stays: Mapping[int, str]) -> None:
        self.search = search
        self.flow = search.flow
        self.references: dict[int, Reference] = search.references
        self.sites = sites
        self.stays = stays
        self.merges: list[Merge] = []
        self.notes: list[str] = []
        self.used: set[int] = set()
        """The ``id`` of modules that are part of a merge."""
        self._graphs: dict[int, fx.Graph | None] = {}
        self._layers: dict[int, str | None] = {}

    # --- what an expression asks -------------------------------------------------------------------------------------

    def name(self, module: nn.Module) -> str:
        reference = self.references.get(id(module))
        return type(module).__name__ if reference is None else reference.name

    def graph(self, module: nn.Module) -> fx.Graph | None:
        if id(module) not in self._graphs:
            self._graphs[id(module)] = _graph(module)
        return self._graphs[id(module)]

    def layer(self, module: nn.Module) -> str | None:
        if id(module) not in self._layers:
            taps = taps_of(module)
            reason = f"{self.name(module)}: {taps}" if isinstance(taps, str) else None
            reason = reason or self.search.unfit(module) or self._without_weight(module)
            self._layers[id(module)] = reason or self._not_alone(module)
        return self._layers[id(module)]

    def _without_weight(self, module: nn.Module) -> str | None:
        if (how := bake.computed(module)) is not None:
            return f"{self.name(module)} computes its weight ({how.words}): fold without merge_branches first"
        weight = module._parameters.get("weight")
        if weight is None or nn.parameter.is_lazy(weight) or "bias" not in module._parameters:
            return f"the weight and bias of {self.name(module)} are no parameters with values"
        if not weight.is_floating_point():
            return f"the weight of {self.name(module)} is of {weight.dtype}"
        return None

    def norm(self, module: nn.Module) -> Affine | str:
        site = self.sites.get(id(module))
        if site is None or site.norm is None:
            return self.stays.get(id(module), "it is no norm with fixed statistics")
        if follows(module):
            return "it ends in an activation"
        if site.norm.channel_axis != 1:
            return "its channels are the last axis"
        if (reason := self.flow.unsettled(module) or self._not_alone(module)) is not None:
            return reason
        pair = scale_shift(site.norm)
        assert pair is not None
        return Affine(*pair)

    def passes(self, module: nn.Module) -> str | None:
        return f"{self.name(module)} has hooks" if watched(module) else None

    def tensor(self, owner: nn.Module, attribute: str) -> str | None:
        name = f"{self.name(owner)}.{attribute}".lstrip(".")
        tensor = getattr(owner, attribute)
        if len(self.search.owners.get(id(tensor), [])) > 1:
            return f"{name} is shared"
        places = self.flow.tensor_reads.get(id(tensor), [])
        alone = self._once(places) and all(len(node.users) == 1 for _, node in places)
        if id(tensor) in self.flow.read_elsewhere or not alone:
            return f"{name} is also read elsewhere"
        if (reason := self.flow.unsettled(owner, places)) is not None:
            return reason
        if not tensor.is_floating_point() or tensor.is_meta:
            return f"{name} has no values to multiply with"
        return None

    def taps(self, total: Sum) -> Taps | str | None:
        convolutions = total.layers
        if not convolutions:
            return None
        found = [taps_of(module) for module in convolutions]
        parts = [taps for taps in found if isinstance(taps, Taps)]
        if any(branch.layer is None for branch in total.branches):
            parts.append(itself(parts[0]))
        if total.channels - {parts[0].outputs}:
            return "its norms or scales have other numbers of channels"
        weights = [module.weight for module in convolutions if isinstance(module, _ConvNd)]
        if len({(weight.dtype, weight.device) for weight in weights}) > 1:
            return "its convolutions differ in dtype or device"
        return joined(parts)

    # --- where a module is called ------------------------------------------------------------------------------------

    def _once(self, places: list[tuple[Flow, fx.Node]]) -> bool:
        """Whether there is one usual place, and at most one on every other traced path."""
        flows = [id(flow) for flow, _ in places]
        return len(set(flows)) == len(flows) and sum(not flow.region.when for flow, _ in places) == 1

    def _not_alone(self, module: nn.Module) -> str | None:
        """Why a module that is to vanish, or to compute something else, may be missed."""
        reference = self.references[id(module)]
        if not self._once(self.flow.sites(module)):
            return f"{reference.name} is called at several sites"
        for parent in reference.parents:
            for child, attribute in sorted(reach(parent).child_reads):
                if parent._modules.get(child) is module and hasattr(module, attribute):
                    return f"{type(parent).__name__}.forward reads the {attribute!r} of {reference.name}"
        return self.flow.asked_for(module)

    # --- sums --------------------------------------------------------------------------------------------------------

    def look_at(self, reference: Reference) -> None:
        module = reference.module
        graph = None if is_leaf(module) or isinstance(module, _CONTAINERS) else self.graph(module)
        if graph is None:
            return
        read = Expressions(module, graph, self)
        taken: set[fx.Node] = set()
        noted: set[fx.Node] = set()
        forward: TracedForward | None = None
        for node in reversed(graph.nodes):
            if node in taken or node in read.passes:
                continue
            reasons: dict[str, frozenset[fx.Node]] = {}
            for source, op in sorted(read.values.get(node, {}).items(), key=lambda item: -len(item[1].nodes)):
                if source.op == "get_attr" or not _is_sum(op) or not self._belongs(graph, read, op):
                    continue
                if any(id(module) in self.used for module in (*op.sum.layers, *op.norms)):
                    continue
                reason = self._against(reference, graph, read, op, source, node)
                if reason is None:
                    try:
                        forward = forward or traced_forward(module, "its forward adds up branches")
                        reason = _differs(forward, op, source, node)
                    except Refusal as refusal:
                        reason = refusal.reason
                if reason is None:
                    self.merges.append(self._merge(reference, graph, read, op, source))
                    self.used.update(id(module) for module in (*op.sum.layers, *op.norms))
                    taken |= op.nodes
                    break
                reasons[reason] = op.nodes
            else:
                if reasons and node not in noted:
                    told = "; ".join(reasons)
                    self.notes.append(f"{reference.name or 'the model'}: branches are not merged: {told}")
                    noted = noted.union(*reasons.values())

    def _belongs(self, graph: fx.Graph, read: Expressions, op: Operator) -> bool:
        """Whether the sum is of this ``forward``: not of a child's alone, but for norms, which fold without it."""
        own = [n for n in op.nodes if n.graph is graph and n not in read.passes]
        rest = [n for n in own if not (n in read.modules and registry.registered(read.modules[n]))]
        return len(rest) != 1 or rest[0] not in read.modules or is_leaf(read.modules[rest[0]])

    def _against(
        self, reference: Reference, graph: fx.Graph, read: Expressions, op: Operator, source: fx.Node, root: fx.Node
    ) -> str | None:
        """Why a sum stays as it is, the generated ``forward`` apart; or ``None``."""
        if op.reason is not None:
            return op.reason
        taps = self.taps(op.sum)
        if not isinstance(taps, Taps):
            return taps or "it has no convolution"
        region = Region(reference.name, reference.module, graph)
        flow = Flow(region, {})
        for node in op.nodes - {root}:
            for user in node.users:
                if user not in op.nodes:
                    shown = label(flow, node) if node.graph is graph else f"a value inside {reference.name}"
                    return f"{shown} is also read by {label(flow, user) if user.graph is graph else 'other code'}"
        if op.axes - {taps.spatial}:
            return "a scale or shift is not one for each channel"
        dtype = {module.weight.dtype for module in op.sum.layers}
        if any(getattr(owner, attribute).dtype not in dtype for owner, attribute in op.tensors):
            return "a scale or shift is of another dtype than the convolutions"
        for module in op.norms:
            ranks = self.sites[id(module)].norm.ranks  # type: ignore[union-attr]
            if ranks is not None and taps.spatial + 2 not in ranks:
                return f"{self.name(module)} takes inputs of another rank"
        host = self._host(op, taps)
        if host.bias is None and self._bias(op) and (reason := self.flow.asks_for_bias(host)) is not None:
            return reason
        return (
            self._misplaced(reference, op) or self._fixed(reference, graph) or self._written(region, op, source, root)
        )

    def _misplaced(self, reference: Reference, op: Operator) -> str | None:
        """Why the calls in the graphs may not be those of this ``forward``."""
        regions = {
            id(flow.region): flow.region
            for module in (*op.sum.layers, *op.norms)
            for flow, _ in self.flow.sites(module)
            if not flow.region.when
        }
        names = [region.name for region in regions.values()]
        inside = len(names) == 1 and any(
            not names[0] or own == names[0] or own.startswith(f"{names[0]}.") for own in reference.names
        )
        if not inside or (reference.name in self.flow.failed and names != [reference.name]):
            return f"{reference.name or 'the model'} cannot be traced as one with what it calls"
        return None

    def _fixed(self, reference: Reference, graph: fx.Graph) -> str | None:
        """Why the module cannot get another ``forward``."""
        if reference.module.training:
            return "it is in train mode; call eval() on it"
        if any(node.target is check_default for node in graph.nodes):
            return f"{type(reference.module).__name__}.forward has optional arguments"
        return None

    def _written(self, region: Region, op: Operator, source: fx.Node, root: fx.Node) -> str | None:
        """Who changes the source before the last branch has read it."""
        own = set(_own(op, source))
        first = next(node for node in region.graph.nodes if node in own and source in node.all_input_nodes)
        writer = Overwrites(region, lambda _: False).between(first, {root}, own)
        return None if writer is None else f"{label(Flow(region, {}), writer)} changes their source in place"

    def _host(self, op: Operator, taps: Taps) -> _ConvNd:
        """The convolution with the largest kernel, best the one that has the taps already."""
        convolutions = [module for module in op.sum.layers if isinstance(module, _ConvNd)]

        def fit(module: _ConvNd) -> tuple[Any, ...]:
            plain = module.padding_mode == "zeros"
            return plain, taps_of(module) == taps, prod(module.kernel_size), module.weight.numel()

        return max(convolutions, key=fit)

    def _bias(self, op: Operator) -> bool:
        return op.shifts or any(module.bias is not None for module in op.sum.layers)

    def _merge(self, reference: Reference, graph: fx.Graph, read: Expressions, op: Operator, source: fx.Node) -> Merge:
        taps = self.taps(op.sum)
        assert isinstance(taps, Taps)
        host = self._host(op, taps)
        others = tuple(self.name(module) for module in op.sum.layers if module is not host)
        tensors = tuple((self.name(owner), attribute) for owner, attribute in op.tensors)
        return Merge(
            holder=reference.name,
            host=self.name(host),
            absorbs=(
                *others,
                *(self.name(module) for module in op.norms),
                *(f"{owner}.{attribute}".lstrip(".") for owner, attribute in tensors),
            ),
            adds_itself=any(branch.layer is None for branch in op.sum.branches),
            path=read.paths[id(host)],
            nodes=tuple(node.name for node in graph.nodes if node in op.nodes),
            source=source.name,
            taps=taps,
            parts=tuple((None if b.layer is None else self.name(b.layer), b.scale) for b in op.sum.branches),
            shift=op.sum.shift,
            bias=self._bias(op),
            convolutions=others,
            tensors=tensors,
        )


def _is_sum(op: Operator) -> bool:
    """Whether there are several branches, or one to which a loop that starts from 0 adds it."""
    if not op.sum.layers:
        return False
    return len({id(branch.layer) for branch in op.sum.branches}) > 1 or any(map(_adds_zero, op.nodes))


def _adds_zero(node: fx.Node) -> bool:
    return node.target in (operator.add, operator.iadd) and any(type(a) is int and a == 0 for a in node.args)


def _graph(module: nn.Module) -> fx.Graph | None:
    if isinstance(module, torch.jit.ScriptModule):
        return None
    try:
        traced = trace(module, leaf=lambda _: True)
    except Exception:  # a forward may do anything
        return None
    return None if traced.effects or traced.kept or traced.assumes_tensors else traced.graph


def _differs(forward: TracedForward, op: Operator, source: fx.Node, root: fx.Node) -> str | None:
    """Whether the ``forward`` adds up other branches in train mode."""
    for graph in forward.graphs.values():
        named = {node.name: node for node in graph.nodes}
        for node in (*_own(op, source), source):
            twin = named.get(node.name)
            if twin is None or twin.op != node.op or twin.target != node.target or _inputs(twin) != _inputs(node):
                return "its forward adds up other branches in train mode"
            if node is not root and node is not source and len(twin.users) != len(node.users):
                return "its forward adds up other branches in train mode"
    return None


def _own(op: Operator, source: fx.Node) -> Iterator[fx.Node]:
    """The operations of a sum in the graph of its source."""
    return (node for node in op.nodes if node.graph is source.graph)


def _inputs(node: fx.Node) -> list[str]:
    return [each.name for each in node.all_input_nodes]
