"""The search of a fold: which layers absorb each norm with fixed statistics.

Backward first: the affine of a norm moves against the dataflow until linear layers absorb it on their output side. Then
forward: along the dataflow, until all that read it absorb it on their input side. The affine of a norm that stays goes
forward only, after those. The guards are here, once: eval mode, single use, every call site of a layer, every user of
its parameters, hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from normswap import registry
from normswap.engine import lifting
from normswap.engine.affine_part import Part, part_of, read_besides
from normswap.engine.calls import Calls
from normswap.engine.dataflow import Dataflow
from normswap.engine.plan import Change, Fold, Skip, Step
from normswap.engine.sites import Site
from normswap.errors import FixedArgument, NormswapError, Refusal
from normswap.fold import attention, bake, layers, passages
from normswap.fold.affine import Affine
from normswap.fold.calls import Call, is_layer
from normswap.fold.layers import Layer, Side
from normswap.fold.passages import Flow, Need
from normswap.graph.layouts import sensitive_reader
from normswap.graph.overwrites import Overwrites
from normswap.graph.reach import reach
from normswap.graph.references import Reference
from normswap.graph.shapes import argument, position
from normswap.graph.sharded import is_spread
from normswap.graph.trace import LINEAR_LAYERS, brief, has_plain_forward
from normswap.norms.bare import Bare
from normswap.spec import Norm, scale_shift


@dataclass(frozen=True)
class Options:
    """What is asked of a fold."""

    keep_batchnorm: bool = False
    """A norm that no layer absorbs stays as it is."""
    affine: bool = False
    """The affine of norms that compute their statistics from each input moves into the layers that read them."""
    unshare: bool = False
    """Layers that several places call get a copy for each need."""
    merge_branches: bool = False
    """Sums of parallel branches become one convolution first."""
    bakes: Set[str] | None = None
    """The names of the layers that may be made plain, if not all."""


@dataclass
class Trial:
    """What one norm's disappearance asks of other modules; kept only if all of it is possible."""

    stays: bool = False
    """Whether the norm stays and gives away its affine only."""
    absorbs: dict[tuple[int, Side, str], tuple[nn.Module | Call, Layer, Affine]] = field(default_factory=dict)
    """By the ``id`` of the layer's module, the side, and the part of the layer."""
    reached: dict[tuple[int, str], set[fx.Node]] = field(default_factory=dict)
    """Call sites by the ``id`` of the layer's module and the part of the layer."""
    notes: dict[str, None] = field(default_factory=dict)
    """What it rests on besides; kept of norms that stay."""
    rounding: float = 0.0
    """The largest relative error of a weight in 16 bits."""
    composes: dict[int, Affine] = field(default_factory=dict)
    """What norms in front take in, by ``id`` of their module."""


class Search:
    """Finds, norm by norm in dataflow order, which layers absorb it."""

    def __init__(
        self,
        flow: Dataflow,
        found: dict[int, Any],
        options: Options,
        path: Callable[[], Dataflow] | None = None,
        recorded: Mapping[str, Mapping[str, Any]] | None = None,
        joined: Mapping[int, str] | None = None,
    ) -> None:
        self.flow = flow
        self.path = path
        """Gives the dataflow of one real call."""
        self.recorded = recorded or {}
        """Steps of a recipe, by the name of a norm that gave its affine away."""
        self.options = options
        self.joined = joined or {}
        """Why places of a layer, by its ``id``, could not be taken apart."""
        self.unlifted = ""
        """Why a functional norm that is none of a module's may not be taken for one."""
        self.shared: set[int] = set()
        """Layers that the attempt at hand found shared."""
        self.blocked: dict[int, set[int]] = {}
        """Layers whose being shared is in the way of a norm, by its key."""
        self.references = dict(found)
        self.owners: dict[int, list[nn.Module]] = {}
        for reference in found.values():
            for parameter in reference.module._parameters.values():
                if parameter is not None:
                    self.owners.setdefault(id(parameter), []).append(reference.module)
        self.calls = Calls(flow, self.references, self.owners)
        self.affines: dict[int, Affine] = {}
        """What each norm still to be placed computes, by ``id`` of its module or functional node."""
        self.parts: dict[int, Part] = {}
        """What each norm that stays may give away, likewise."""
        self.given: dict[int, tuple[str, ...]] = {}
        """The norms that gave it away, with notes."""
        self.gone: set[int] = set()
        self.folds: dict[int, Fold] = {}
        self.reasons: dict[int, str] = {}
        self.layer_reasons: dict[int, str | None] = {}
        self.tied: set[int] = set()
        self.overwrites: dict[int, Overwrites] = {}
        self.biased: set[int] = set()
        """Layers without a bias that get one."""
        self.baked: set[int] = set()
        """Layers that computed their weight and are plain now."""

    def key(self, site: Site) -> int:
        return id(site.module)

    def refuses(self, site: Site) -> str | None:
        """Why a norm is out of the question, whatever stands around it."""
        if (reason := refused_outright(site)) is not None:
            stays = site.norm is not None and reason == _own_statistics(site.norm)
            return self._keeps(site) if stays else reason
        norm = site.norm
        assert norm is not None
        if site.call is not None:
            if site.owner is None:
                return self.unlifted
            if (reason := self._needed_by_others(site)) is not None:
                return reason
        if watched(site.module):
            return "it has forward or backward hooks, which fold would take away"
        if parametrize.is_parametrized(site.module):
            return "it is parametrized"
        for parent in site.parents:
            keys = {key for key, child in parent._modules.items() if child is site.module}
            for child, attribute in reach(parent).child_reads:
                if child in keys and hasattr(site.module, attribute) and attribute not in ("num_features",):
                    return f"{type(parent).__name__}.forward reads its {attribute!r}"
        for field_name, tensor in norm.tensors.items():
            if id(tensor) in self.flow.tensor_reads:
                return f"the code around it also reads its {field_name} directly"
        if (reason := self.flow.read_in_doubt(site.module) or self.flow.asked_for(site.module)) is not None:
            return reason
        pair = scale_shift(norm)
        own = None if pair is None else Affine(*pair)
        if own is None or not own.finite:
            return "its statistics are not finite, or a variance is negative"
        self.affines[self.key(site)] = own
        return None

    def _needed_by_others(self, site: Site) -> str | None:
        """Why a functional norm's tensors, or the class of the module that calls it, must stay."""
        assert site.owner is not None
        if (reason := lifting.tensors_needed(site)) is not None:
            return reason
        was = site.owner_class
        own_norm = was is not None and registry.reader_of(was) is not None
        if own_norm and (reason := self.flow.asked_for(site.owner, was)) is not None:
            return reason
        if any(id(buffer) in self.flow.tensor_reads for buffer in site.module.buffers()):
            return "the code around it also reads its tensors directly"
        failed = self.flow.failed.get(self.references[id(site.owner)].name, "")
        if failed.startswith(FixedArgument.__name__):
            return f"it is called with optional arguments, which a generated forward does not take ({failed})"
        for flow in self.flow.flows:
            doubt = self.flow.untrusted.get(id(flow.region)) or ""
            if flow.region.module is site.owner and FixedArgument.__name__ in doubt:
                return "code that cannot be traced calls its forward, whose optional arguments would be fixed"
        return self.flow.read_in_doubt(site.owner, lifting.attributes(site))

    def own(self, sites: Iterable[Site]) -> None:
        """Functional norms that stay keep reading their tensors, which then are shared with a layer that has them."""
        for site in sites:
            if site.owner is not None and site.norm is not None:
                for tensor in site.norm.tensors.values():
                    self.owners.setdefault(id(tensor), []).append(site.module)

    def _keeps(self, site: Site) -> str | None:
        """Why a norm that stays gives nothing away."""
        assert site.norm is not None
        if not self.options.affine:
            return _own_statistics(site.norm)
        if watched(site.module):
            return "it has forward or backward hooks, which would see other values"
        step = self.recorded.get(site.name)
        part = part_of(site, self.flow, self.owners, None if step is None else step["bare"])
        if isinstance(part, str):
            return part
        self.parts[self.key(site)] = part
        return None

    def run(self, chosen: Sequence[Site], left: Set[str] = frozenset()) -> None:
        staying = [site for site in self._in_order(chosen) if self.key(site) in self.parts]
        ordered = [site for site in self._in_order(chosen) if self.key(site) not in self.parts]
        free = [site for site in ordered if site.name not in left]
        self.reasons.update({self.key(site): "the recipe leaves it" for site in ordered if site.name in left})
        for site in free:
            self._attempt(site, self._backward)
        for site in free:
            if self.key(site) not in self.gone:
                self._attempt(site, self._forward)
        self._give_away(staying)

    def _give_away(self, staying: Sequence[Site]) -> None:
        """First by what the code proves; for what is left then, by the path of ``example_inputs``."""
        for site in staying:
            self._attempt(site, self._given_away)
        for site in staying:
            key = self.key(site)
            if key not in self.given and site.name in self.recorded:
                self.reasons[key] = self._as_recorded(site, self.recorded[site.name]) or ""
        left = [site for site in staying if self.key(site) not in self.given]
        if not left or not self.flow.failed:
            return
        if self.path is None:
            for site in left:
                if "cannot be traced" in (reason := self.reasons[self.key(site)]) and "example_inputs" not in reason:
                    self.reasons[self.key(site)] = f"{reason}; pass example_inputs"
            return
        traced, calls = self.flow, self.calls
        try:
            self.flow = self.path()
            self.calls = Calls(self.flow, self.references, self.owners)
        except Exception as error:
            self.reasons.update({self.key(s): f"{self.reasons[self.key(s)]}; {brief(error)}" for s in left})
            return
        self.layer_reasons = {}
        name, reason = next(iter(traced.failed.items()))
        note = f"rests on the path that example_inputs take: {name or 'the model'} cannot be traced ({reason})"
        for site in left:
            self._attempt(site, self._given_away)
            if self.key(site) in self.given:
                self.given[self.key(site)] += (note,)
        self.flow, self.calls, self.layer_reasons = traced, calls, {}

    def _in_order(self, chosen: Sequence[Site]) -> list[Site]:
        order: dict[int, int] = {}
        for flow in self.flow.flows:
            for node in flow.region.graph.nodes:
                module = flow.module(node)
                if module is not None:
                    order.setdefault(id(module), len(order))
        return sorted(chosen, key=lambda site: order.get(id(site.module), len(order)))

    def _attempt(self, site: Site, direction: Callable[[Site, Trial], str | None]) -> None:
        trial = Trial(stays=self.key(site) in self.parts)
        self.shared = self.blocked.setdefault(self.key(site), set())
        reason = self.flow.unsettled(site.module) or direction(site, trial) or self._incomplete(trial)
        if reason is None and not trial.stays:
            reason = self._relaid(site)
        key = self.key(site)
        if reason is not None:
            before = self.reasons.get(key)
            same = before is None or before == reason or trial.stays
            self.reasons[key] = reason if same else f"backward: {before}; forward: {reason}"
            return
        self._accept(key, trial)

    def _accept(self, key: int, trial: Trial) -> None:
        if key in self.parts:
            self.given[key] = tuple(trial.notes)
        else:
            self.gone.add(key)
        record = self.folds.setdefault(key, Fold(order=len(self.folds)))
        record.rounding = trial.rounding
        for (_, side, _), (module, layer, affine) in trial.absorbs.items():
            name = self.references[id(module)].name
            record.steps.append(Step(name, side, layer, affine, module.names if isinstance(module, Call) else ()))
            if layer.part or isinstance(module, Call):  # of an attention, which gets no bias
                continue
            if id(module) not in self.baked and (how := bake.computed(module)) is not None:
                self.baked.add(id(module))
                record.baked[name] = how.words
            if not layer.has_bias:
                continue
            bias = getattr(module, "bias", None) is not None or id(module) in self.biased or not affine.no_shift
            if bias:
                self.biased.add(id(module))
            record.biased[name] = bias
        if key in self.parts:
            part = self.parts[key]
            direct = all(affine.same(part.affine) for _, _, affine in trial.absorbs.values())
            record.bare = Bare(part.manner, part.axis, direct)
        for other, affine in trial.composes.items():
            self.affines[other] = affine.after(self.affines[other])
            record.steps.append(Step(self.references[other].name, "output", None, affine))

    def _relaid(self, site: Site) -> str | None:
        """Without the norm its readers get its input's memory layout."""
        for flow, node in self.flow.sites(site.module):
            reader = sensitive_reader(flow.region, node, lambda module: id(module) in self.gone)
            if reader is not None:
                return f"{passages.label(flow, reader)} behind it depends on the memory layout, which the norm settles"
        return None

    def _incomplete(self, trial: Trial) -> str | None:
        """A layer called at several sites must be reached at all of them, by the same affine."""
        for (identity, _), nodes in trial.reached.items():
            sites = self.flow.calls.get(identity, [])
            if len(nodes) != len(sites):
                name = self.references[identity].name
                self.shared.add(identity)
                when = next(flow.region.when for flow, node in sites if node not in nodes)
                if when:
                    return f"{when}, {name} does not lead to this norm alone"
                told = f"{name} is called at {len(sites)} sites and only {len(nodes)} of them lead to this norm"
                return f"{told}{self._way_out(identity)}"
        return None

    def _way_out(self, identity: int) -> str:
        """What ``unshare`` could do about a shared layer, or why it could not."""
        if not isinstance(layers.describe(self.references[identity].module), Layer):
            return ""
        if self.options.unshare:
            reason = self.joined.get(identity)
            return "" if reason is None else f" (unshare: {reason})"
        return "; unshare=True gives it a copy for each need"

    def blocking(self) -> dict[int, nn.Module]:
        """The layers, by ``id``, whose being shared is in the way of a norm that was not folded."""
        stay = (shared for key, shared in self.blocked.items() if key not in self.gone)
        found = {identity: self.references[identity].module for identity in set().union(*stay)}
        return {identity: m for identity, m in found.items() if isinstance(layers.describe(m), Layer)}

    # --- backward ----------------------------------------------------------------------------------------------------

    def _backward(self, site: Site, trial: Trial) -> str | None:
        for flow, node in self.flow.sites(site.module):
            source = argument(node, 0, "input")
            if not isinstance(source, fx.Node):
                return "its input is not a tensor of the graph"
            need = Need(source, self.affines[self.key(site)], 1)
            if (reason := self._output_side(flow, need, node, trial)) is not None:
                return reason
        return None

    def _output_side(self, flow: Flow, need: Need, user: fx.Node, trial: Trial) -> str | None:
        pending = [(need, user)]
        while pending:
            need, user = pending.pop()
            node = need.node
            users = [other for other in passages.value_users(node) if not passages.other_piece(node, user, other)]
            if users != [user] or list(user.all_input_nodes).count(node) != 1 or _uses(user, node) != 1:
                others = [passages.label(flow, other) for other in users if other is not user] or ["the same operation"]
                return f"{passages.label(flow, node)} is also read by {others[0]}"
            if node in flow.region.kept:
                return f"{passages.label(flow, node)} is also kept in an attribute"
            module = flow.module(node)
            if module is not None:
                reason = self._absorb_or_pass(flow, need, module, node, trial, pending)
                if reason is not None:
                    return reason
                continue
            if is_layer(node):
                if (reason := self._absorb_in_call(flow, need, node, trial)) is not None:
                    return reason
                continue
            outcome = passages.backward(flow, node, need.affine, need.axis)
            if isinstance(outcome, str):
                return outcome
            pending.extend((inner, node) for inner in outcome)
        return None

    def _absorb_in_call(self, flow: Flow, need: Need, node: fx.Node, trial: Trial) -> str | None:
        found = self._call(flow, node)
        if isinstance(found, str):
            return found
        call, layer = found
        if not _channels_at(flow, node, need.axis, layer):
            return f"{passages.label(flow, node)}: {_not_there(flow, node)}"
        return self._absorb(call, layer, need.affine, "output", node, trial)

    def _call(self, flow: Flow, node: fx.Node) -> tuple[Call, Layer] | str:
        """The functional layer at a node, listed as the modules are."""
        found = self.calls.at(flow, node)
        if not isinstance(found, str) and id(found[0]) not in self.references:
            call: Any = found[0]
            self.references[id(call)] = Reference(call, [call.names[0]])
            self.flow.calls[id(call)] = self.calls.places(call)
        return found

    def _absorb_or_pass(
        self,
        flow: Flow,
        need: Need,
        module: nn.Module,
        node: fx.Node,
        trial: Trial,
        pending: list[tuple[Need, fx.Node]],
    ) -> str | None:
        if id(module) in self.affines or id(module) in self.gone:
            return self._through_norm(flow, need, module, node, trial, pending)
        layer = layers.describe(module)
        if isinstance(layer, Layer):
            if not _channels_at(flow, node, need.axis, layer):
                return f"{passages.label(flow, node)}: {_not_there(flow, node)}"
            return self._absorb(module, layer, need.affine, "output", node, trial)
        if isinstance(module, _LAYERS):
            return f"{passages.label(flow, node)}: {layer}"
        if watched(module):
            return f"{passages.label(flow, node)} has hooks"
        outcome = passages.backward(flow, node, need.affine, need.axis)
        if isinstance(outcome, str):
            return outcome
        pending.extend((inner, node) for inner in outcome)
        return None

    def _through_norm(
        self,
        flow: Flow,
        need: Need,
        module: nn.Module,
        node: fx.Node,
        trial: Trial,
        pending: list[tuple[Need, fx.Node]],
    ) -> str | None:
        if follows(module):
            return f"{passages.label(flow, node)} ends in an activation"
        if not flow.is_axis(node, need.axis, 1):
            return f"{passages.label(flow, node)}: the norm's channels are another axis"
        if id(module) in self.gone:
            source = argument(node, 0, "input")
            pending.append((Need(source, need.affine, need.axis), node))
            return None
        if self.options.keep_batchnorm:  # then a norm that is left is left as it is
            return f"{passages.label(flow, node)} stands between"
        if (reason := self.flow.unsettled(module)) is not None:
            return reason
        if not trial.composes.setdefault(id(module), need.affine).same(need.affine):
            return f"{passages.label(flow, node)} is called at several sites with different norms behind"
        trial.reached.setdefault((id(module), ""), set()).add(node)
        return None

    # --- forward -----------------------------------------------------------------------------------------------------

    def _forward(self, site: Site, trial: Trial) -> str | None:
        if follows(site.module):
            return "an activation follows inside it"
        for flow, node in self.flow.sites(site.module):
            if (reason := self._input_side(flow, Need(node, self.affines[self.key(site)], 1), trial)) is not None:
                return reason
            if (reason := self._overwritten(flow, node, trial)) is not None:
                return reason
        return None

    def _given_away(self, site: Site, trial: Trial) -> str | None:
        """As :meth:`_forward`, of the affine alone: the norm still makes a tensor of its own."""
        part = self.parts[self.key(site)]
        if (reason := read_besides(site, self.flow)) is not None:
            return reason
        for flow, node in self.flow.sites(site.module):
            shape = flow.shape(node)
            if site.norm is not None and site.norm.ranks and shape is not None and len(shape) not in site.norm.ranks:
                return "its input has no batch axis"
            axis = position(part.axis, shape)
            need = Need(node, part.affine, part.axis if axis is None else axis)
            if (reason := self._input_side(flow, need, trial)) is not None:
                return reason
        return None

    def _as_recorded(self, site: Site, step: Mapping[str, Any]) -> str | None:
        """What a recipe says of a norm where the code does not prove it: it was seen with ``example_inputs`` then."""
        key = self.key(site)
        if not step["bare"]["direct"]:
            return self.reasons[key]
        trial, own = Trial(stays=True), self.parts[key].affine
        for entry in step["layers"]:
            reference, part = self.flow.by_name.get(entry["name"]), entry.get("part", "")
            if reference is None:
                return f"the model has no module {entry['name']!r}"
            module: Any = reference.module
            if part in attention.PARTS and isinstance(module, nn.MultiheadAttention):
                layer = attention.describe(module, part)
            else:
                layer = layers.describe(module)
            if isinstance(layer, str):
                return layer
            if layer.inputs != own.channels:
                return f"{entry['name']} has {layer.inputs} channels there, the norm {own.channels}"
            if not layer.shift_reaches_evenly and not own.no_shift:
                return f"{entry['name']} cannot take its shift"
            if (reason := self._bound(module)) is not None:
                return reason
            trial.absorbs[id(module), "input", layer.part] = (module, layer, own)
        self._accept(key, trial)
        return None

    def _overwritten(self, flow: Flow, node: fx.Node, trial: Trial) -> str | None:
        """Without the norm its readers get its input itself, which nothing may change before they have read it."""
        if id(flow) not in self.overwrites:
            self.overwrites[id(flow)] = Overwrites(flow.region, lambda module: id(module) in self.gone)
        writer = self.overwrites[id(flow)].between(node, set().union(*trial.reached.values()))
        return None if writer is None else f"{passages.label(flow, writer)} changes its input in place"

    def _input_side(self, flow: Flow, need: Need, trial: Trial) -> str | None:
        pending = [need]
        while pending:
            need = pending.pop()
            users = passages.value_users(need.node)
            if not users:
                return "nothing reads it"
            if need.node in flow.region.kept:
                return "it is also kept in an attribute"
            for user in users:
                module = flow.module(user)
                if isinstance(module, nn.MultiheadAttention):
                    if (reason := self._read_by_attention(flow, need, module, user, trial)) is not None:
                        return reason
                    continue
                if _uses(user, need.node) != 1:
                    return f"{passages.label(flow, user)} reads it twice"
                layer = None if module is None else layers.describe(module)
                if is_layer(user):
                    found = self._call(flow, user)
                    if isinstance(found, str):
                        return found
                    if (reason := self._read_by_layer(flow, need, *found, user, trial)) is not None:
                        return reason
                    continue
                if module is not None and isinstance(layer, Layer):
                    if (reason := self._read_by_layer(flow, need, module, layer, user, trial)) is not None:
                        return reason
                    continue
                if module is not None and (id(module) in self.gone and not follows(module)):
                    pending.append(Need(user, need.affine, need.axis))
                    continue
                if module is not None and (watched(module) or isinstance(module, _LAYERS)):
                    return f"{passages.label(flow, user)}: {'it has hooks' if watched(module) else layer}"
                outcome = passages.forward(flow, user, need.node, need.affine, need.axis)
                if isinstance(outcome, str) and trial.stays and passages.pads_nothing(flow, user, need.node):
                    outcome = Need(user, need.affine, need.axis)
                    trial.notes["holds where pad adds nothing, as on example_inputs"] = None
                if isinstance(outcome, str):
                    return outcome
                if passages.may_drop(flow, user, need.affine):
                    trial.notes[f"not in train mode, where {passages.label(flow, user)} drops the shift too"] = None
                pending.append(outcome)
        return None

    def _read_by_layer(
        self, flow: Flow, need: Need, module: nn.Module | Call, layer: Layer, user: fx.Node, trial: Trial
    ) -> str | None:
        if argument(user, 0, "input") is not need.node and isinstance(module, Call):
            return f"{passages.label(flow, user)} reads it as a weight or a bias"
        if (reason := layer.refuses(need.affine, "input")) is not None:
            return f"{passages.label(flow, user)} {reason}"
        if not _channels_at(flow, need.node, need.axis, layer):
            return _elsewhere(flow, need, user)
        if not layer.shift_reaches_evenly and not need.affine.no_shift:
            return f"{passages.label(flow, user)} pads with zeros (or is transposed), and the shift is not zero"
        return self._absorb(module, layer, need.affine, "input", user, trial)

    def _read_by_attention(
        self, flow: Flow, need: Need, module: nn.MultiheadAttention, user: fx.Node, trial: Trial
    ) -> str | None:
        parts = attention.read_by(user, need.node)
        if _uses(user, need.node) != len(parts):
            return f"{passages.label(flow, user)} reads it as more than query, key and value"
        for part in parts:
            layer = attention.describe(module, part)
            if isinstance(layer, str):
                return f"{passages.label(flow, user)}: {layer}"
            if not layer.shift_reaches_evenly and not need.affine.no_shift:
                return f"{passages.label(flow, user)} has no bias that could take the shift"
            if not _channels_at(flow, need.node, need.axis, layer):
                return _elsewhere(flow, need, user)
            if (reason := self._absorb(module, layer, need.affine, "input", user, trial)) is not None:
                return reason
        return None

    # --- layers ------------------------------------------------------------------------------------------------------

    def _absorb(
        self, module: nn.Module | Call, layer: Layer, affine: Affine, side: Side, node: fx.Node, trial: Trial
    ) -> str | None:
        name = self.references[id(module)].name
        channels = layer.outputs if side == "output" else layer.inputs
        if affine.channels != channels:
            return f"{type(module).__name__} has {channels} channels there, the norm {affine.channels}"
        if (reason := layer.refuses(affine, side)) is not None:
            return f"{name} {reason}"
        if (reason := self.unfit(module)) is not None:
            if id(module) in self.tied or self._shared(module):
                self.shared.add(id(module))
            return reason
        whole: Any = attention.projection(module, layer) if layer.part else module
        if layers.may_overflow(whole, affine):
            dtype = str(bake.dtype_of(whole)).removeprefix("torch.")
            return f"the folded weights of {name} may not be finite in {dtype}"
        lost = layers.rounding(whole, layer, affine, side)
        if lost > torch.finfo(bake.dtype_of(whole)).eps:
            dtype = str(bake.dtype_of(whole)).removeprefix("torch.")
            return f"the folded weights of {name} would lose {lost:.1e} of themselves to rounding in {dtype}"
        trial.rounding = max(trial.rounding, lost)
        if layer.has_bias and getattr(whole, "bias", None) is None and not affine.no_shift:
            if isinstance(module, Call):
                return f"the call that uses {name} has no bias, which the shift needs"
            if (reason := self.flow.asks_for_bias(module)) is not None:
                return reason
        key: tuple[int, Side, str] = (id(module), side, layer.part)
        if key in trial.absorbs:
            if not trial.absorbs[key][2].same(affine):
                self.shared.add(id(module))
                name = self.references[id(module)].name
                return f"{name} is called at several sites with different norms{self._way_out(id(module))}"
        else:
            trial.absorbs[key] = (module, layer, affine)
        trial.reached.setdefault((id(module), layer.part), set()).add(node)
        return None

    def _shared(self, module: nn.Module | Call) -> bool:
        """Whether a module is called at several places."""
        if isinstance(module, Call):
            return False
        return max(len(self.references[id(module)].names), len(self.flow.sites(module))) > 1

    def unfit(self, module: nn.Module | Call) -> str | None:
        """Why the weights of a layer must stay as they are, or ``None``."""
        if id(module) not in self.layer_reasons:
            reason = self.calls.why_unfit(module) if isinstance(module, Call) else self._why_unfit(module)
            self.layer_reasons[id(module)] = reason
        return self.layer_reasons[id(module)]

    def _bound(self, module: nn.Module) -> str | None:
        """Why the weights of a layer must stay as they are, whatever calls it."""
        name = self.references[id(module)].name
        if hooks := bake.other_hooks(module):
            return f"{name} has forward or backward hooks ({', '.join(hooks)}), which would see other values"
        try:
            how = bake.computed(module)
        except Refusal as refusal:
            return f"{name} is left: {refusal.reason}"
        inside = {id(part) for part in module.modules()}
        for tensor in _tensors(module, how):
            owners = self.owners.get(id(tensor), [])
            if len(owners) > 1:
                others = [self.references[id(o)].name for o in owners if id(o) not in inside] or [name]
                if how is not None:
                    return f"{name} shares its weight with {others[0]}"
                self.tied.add(id(module))
                return f"{name} shares its weight with {others[0]}{self._way_out(id(module))}"
            if tensor.is_meta:
                return f"{name} is on the meta device"
            if is_spread(tensor):
                return f"{name} is a DTensor, of which this process has a part"
        return None

    def _why_unfit(self, module: nn.Module) -> str | None:
        if (reason := self._bound(module)) is not None:
            return reason
        name, how = self.references[id(module)].name, bake.computed(module)
        gone = set() if how is None else how.gone
        if any(id(tensor) in self.flow.tensor_reads for tensor in _tensors(module, how)):
            return f"the weight of {name} is also read directly"
        reads = {
            attribute
            for parent in self.references[id(module)].parents
            if not has_plain_forward(parent)  # which only computes the same by a fused kernel
            for child, attribute in reach(parent).child_reads
            if parent._modules.get(child) is module
            and (attribute in {*module._parameters, "weight", "bias", *gone} or _vanishes(module, how, attribute))
        }
        if reads:
            return f"the code around {name} reads its {sorted(reads)[0]}"
        reason = self.flow.read_in_doubt(module, gone) or self.flow.unsettled(module)
        return reason if reason is not None or how is None else self._why_not_baked(module, name, how)

    def _why_not_baked(self, module: nn.Module, name: str, how: bake.Computed) -> str | None:
        if self.options.bakes is not None and name not in self.options.bakes:
            return f"the recipe leaves the {how.words} of {name}"
        if (reason := self.flow.asked_for_baked(module, how.becomes, how.gone)) is not None:
            return reason
        try:
            for source in how.sources.values():
                source.parameter()
        except NormswapError as error:
            return f"{name}: {error}"
        return None

    def outcome(self, site: Site) -> Change | Skip:
        key = self.key(site)
        norm = site.norm
        assert norm is not None
        common: dict[str, Any] = {"aliases": site.aliases, "evidence": self.flow.evidence}
        if key in self.gone:
            record = self.folds[key]
            into = tuple(dict.fromkeys(step.name for step in record.steps))
            target = Norm(kind="identity", channels=norm.channels, pools=frozenset(), momentum=None, then=norm.then)
            common |= {"notes": (*_made(record), *lifting.notes(site)), "functional": site.functional}
            return Change(site.name, norm, target, "exact", "identity", into=into, fold=record, **common)
        if key in self.given:
            record = self.folds[key]
            into = tuple(dict.fromkeys(step.name for step in record.steps))
            target = replace(norm, weight=None, bias=None)
            notes = (*_made(record), *self.given[key])
            return Change(site.name, norm, target, "exact", "bare", notes=notes, into=into, fold=record, **common)
        reason = self.reasons[key]
        if key in self.parts:
            return Skip(site.name, reason, norm, site.label, **common)
        if self.options.keep_batchnorm:
            return Skip(site.name, reason, norm, site.label, **common)
        common["functional"] = site.functional
        affine = self.affines[key]
        target = Norm(kind="affine", channels=norm.channels, eps=None, momentum=None, then=norm.then)
        return Change(
            site.name,
            norm,
            target,
            "exact",
            "affine",
            notes=(reason, *lifting.notes(site)),
            fold=Fold(left=affine, order=len(self.affines)),
            **common,
        )


def _made(record: Fold) -> Iterator[str]:
    """What a fold does to its layers besides."""
    yield from (f"bakes the {words} of {name}" for name, words in record.baked.items())
    if record.rounding:
        yield f"rounding adds {record.rounding:.1e} of the weight"


def _own_statistics(norm: Norm) -> str:
    return f"{norm.kind} computes its statistics from each input"


def refused_outright(site: Site) -> str | None:
    """Why a norm is out of the question by itself."""
    norm = site.norm
    if site.reason is not None or norm is None:
        return site.reason or "it is not known what it computes"
    if norm.has_statistics and site.module.training and not norm.fixed:
        return "it is in train mode, where it uses the batch's statistics; call eval() on it"
    affine = scale_shift(norm)
    if affine is None:
        return _own_statistics(norm)
    if affine[0].is_meta:
        return "it is on the meta device: there are no values to fold"
    return None


_LAYERS = (*LINEAR_LAYERS, nn.EmbeddingBag)
_HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def watched(module: nn.Module) -> bool:
    """Whether hooks see the module's values."""
    return any(vars(module).get(name) for name in _HOOK_TABLES)


def follows(module: nn.Module) -> bool:
    """Whether something behind the norm in the same module changes its output, or sees it by a hook."""
    norm = registry.read(module)
    return norm.follows or any(watched(part) for follower in norm.then for part in follower.modules())


def _channels_at(flow: Flow, node: fx.Node, axis: int, layer: Layer) -> bool:
    """Whether ``axis`` of a value is where a layer has its channels; of a convolution it is axis 1, if not shown
    otherwise."""
    shape = flow.shape(node)
    if shape is None:
        return axis == (1 if layer.spatial else -1)
    return axis % len(shape) == len(shape) - 1 - layer.spatial


def _elsewhere(flow: Flow, need: Need, user: fx.Node) -> str:
    reader = passages.label(flow, user)
    if flow.shape(need.node) is None:
        return f"{reader}: it is not proved that it reads the norm's channels (example_inputs may)"
    return f"{reader} reads another axis than the norm's channels"


def _not_there(flow: Flow, node: fx.Node) -> str:
    """Why an axis of a layer's output is not, or not known to be, that of its channels."""
    known = flow.shape(node) is not None
    return (
        "the norm's channels are another axis" if known else "the rank of its output is not known, pass example_inputs"
    )


def _tensors(module: nn.Module, how: bake.Computed | None) -> Iterator[Tensor]:
    """What a layer computes with: its parameters, what its weight is computed from, and what a hook left there."""
    sources = () if how is None else how.inputs
    stale = (vars(module).get(attribute) for attribute in ("weight", "bias"))
    yield from (tensor for tensor in (*module._parameters.values(), *sources, *stale) if tensor is not None)


def _vanishes(module: nn.Module, how: bake.Computed | None, attribute: str) -> bool:
    """Whether a class offers what the class of the plain layer does not."""
    return how is not None and hasattr(type(module), attribute) and not hasattr(how.becomes, attribute)


def _uses(user: fx.Node, node: fx.Node) -> int:
    count = 0

    def visit(argument: fx.Node) -> fx.Node:
        nonlocal count
        count += argument is node
        return argument

    fx.node.map_arg((user.args, user.kwargs), visit)
    return count
