"""Fold: every norm with fixed statistics vanishes into the layers around it, or becomes one multiply-add.

Backward first: the affine of a norm moves against the dataflow until linear layers absorb it on their output side. Then
forward: along the dataflow, until all that read it absorb it on their input side. The guards are here, once: eval mode,
single use, every call site of a layer, every user of its parameters, hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import fx, nn
from torch.nn.utils import parametrize

from normswap import registry
from normswap.engine.carry import carry
from normswap.engine.copying import copy_model
from normswap.engine.dataflow import Dataflow
from normswap.engine.plan import Change, Fold, Plan, Skip
from normswap.engine.report import report
from normswap.engine.select import Selector, check_globs, excluded
from normswap.engine.sites import Site, check_model, survey
from normswap.errors import NormswapError
from normswap.fold import layers, passages
from normswap.fold.affine import Affine
from normswap.fold.layers import Layer, Side
from normswap.fold.passages import Flow, Need
from normswap.graph.overwrites import Overwrites
from normswap.graph.reach import reach
from normswap.graph.references import Reference, references
from normswap.graph.shapes import argument
from normswap.norms.affine import ChannelAffine
from normswap.spec import Norm, scale_shift


def plan_fold(
    model: nn.Module,
    *,
    where: Selector = None,
    skip: Selector = None,
    example_inputs: tuple[Any, ...] | None = None,
    keep_batchnorm: bool = False,
) -> Plan:
    """Plan how the norms with fixed statistics vanish into the layers around them; nothing is changed.

    ``where``, ``skip`` and ``example_inputs`` are as in :func:`normswap.plan_convert`. What no layer absorbs becomes a
    :class:`normswap.norms.affine.ChannelAffine`, with the reason in its notes; with ``keep_batchnorm`` it stays and is
    a ``Skip``. Raises :class:`NormswapError` for misuse."""
    check_model(model)
    return _plan(model, where, skip, example_inputs, keep_batchnorm)


def _plan(
    model: nn.Module,
    where: Selector,
    skip: Selector = None,
    example_inputs: tuple[Any, ...] | None = None,
    keep_batchnorm: bool = False,
    left: Set[str] = frozenset(),
) -> Plan:
    """``left``: names of norms that are to become a channel affine, whether or not a layer could absorb them."""
    found = references(model)
    flow = Dataflow(model, found, example_inputs)
    sites = survey(found, flow.observation)
    check_globs(sites, where=where, skip=skip)
    plan = Plan(model, "fold", [], [], (), apply_fold)
    search = _Search(flow, found, composes=not keep_batchnorm)
    chosen: list[Site] = []
    for site in sites:
        reason = excluded(site, where, skip) or search.refuses(site)
        if reason is None:
            chosen.append(site)
        else:
            plan.skips.append(Skip(site.name, reason, site.norm, site.label, site.aliases, site.evidence))
    search.run(chosen, left)
    for site in chosen:
        change = search.outcome(site, keep_batchnorm, flow.evidence)
        if isinstance(change, Change):
            plan.changes.append(change)
        else:
            plan.skips.append(change)
    if any(module.training for module in model.modules()) and not plan.changes:
        plan.notes = ("the model is in train mode: call model.eval() before folding",)
    plan.notes = (*plan.notes, *flow.notes)
    return plan


def fold(
    model: nn.Module,
    *,
    where: Selector = None,
    skip: Selector = None,
    example_inputs: tuple[Any, ...] | None = None,
    inplace: bool = False,
    keep_batchnorm: bool = False,
) -> nn.Module:
    """Fold every norm with fixed statistics into the layers around it and return the model; see :func:`plan_fold`.

    The function in eval mode stays the same up to rounding. Without ``inplace`` the input is not touched.
    """
    check_model(model)
    target = model if inplace else copy_model(model)
    plan = plan_fold(target, where=where, skip=skip, example_inputs=example_inputs, keep_batchnorm=keep_batchnorm)
    report(plan)
    return plan.apply(inplace=True, undoable=False)


@dataclass
class _Trial:
    """What one norm's disappearance asks of other modules; kept only if all of it is possible."""

    absorbs: dict[tuple[int, Side], tuple[nn.Module, Layer, Affine]] = field(default_factory=dict)
    reached: dict[int, set[fx.Node]] = field(default_factory=dict)
    composes: dict[int, Affine] = field(default_factory=dict)
    """What norms in front take in, by ``id`` of their module."""


class _Search:
    """Finds, norm by norm in dataflow order, which layers absorb it."""

    def __init__(self, flow: Dataflow, found: dict[int, Any], composes: bool = True) -> None:
        self.flow = flow
        self.composes = composes
        """Whether a norm that is left may take in another: not where it is to stay as it is."""
        self.references = found
        self.owners: dict[int, list[nn.Module]] = {}
        for reference in found.values():
            for parameter in reference.module._parameters.values():
                if parameter is not None:
                    self.owners.setdefault(id(parameter), []).append(reference.module)
        self.affines: dict[int, Affine] = {}
        """What each norm still to be placed computes, by ``id`` of its module or functional node."""
        self.gone: set[int] = set()
        self.folds: dict[int, Fold] = {}
        self.reasons: dict[int, str] = {}
        self.layer_reasons: dict[int, str | None] = {}
        self.overwrites: dict[int, Overwrites] = {}
        self.biased: set[int] = set()
        """Layers without a bias that get one."""

    def key(self, site: Site) -> int:
        return id(site.module) if site.call is None else id(site.call)

    def refuses(self, site: Site) -> str | None:
        """Why a norm is out of the question, whatever stands around it."""
        norm = site.norm
        if site.reason is not None or norm is None:
            return site.reason
        if norm.has_statistics and site.module.training and not norm.fixed:
            return "it is in train mode, where it uses the batch's statistics; call eval() on it"
        affine = scale_shift(norm)
        if affine is None:
            return f"{norm.kind} computes its statistics from each input"
        if affine[0].is_meta:
            return "it is on the meta device: there are no values to fold"
        if site.call is not None:
            return "functional norm: convert it to frozen first (convert(model, 'frozen')), then fold"
        if _watched(site.module):
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
        if not Affine(*affine).finite:
            return "its statistics are not finite, or a variance is negative"
        return None

    def run(self, chosen: Sequence[Site], left: Set[str] = frozenset()) -> None:
        ordered = self._in_order(chosen)
        for site in ordered:
            assert site.norm is not None
            pair = scale_shift(site.norm)
            assert pair is not None
            self.affines[self.key(site)] = Affine(*pair)
        free = [site for site in ordered if site.name not in left]
        self.reasons.update({self.key(site): "the recipe leaves it" for site in ordered if site.name in left})
        for site in free:
            self._attempt(site, self._backward)
        for site in free:
            if self.key(site) not in self.gone:
                self._attempt(site, self._forward)

    def _in_order(self, chosen: Sequence[Site]) -> list[Site]:
        order: dict[int, int] = {}
        for flow in self.flow.flows:
            for node in flow.region.graph.nodes:
                module = flow.module(node)
                if module is not None:
                    order.setdefault(id(module), len(order))
        return sorted(chosen, key=lambda site: order.get(id(site.module), len(order)))

    def _attempt(self, site: Site, direction: Callable[[Site, _Trial], str | None]) -> None:
        trial = _Trial()
        reason = self.flow.unsettled(site.module) or direction(site, trial) or self._incomplete(trial)
        key = self.key(site)
        if reason is not None:
            before = self.reasons.get(key)
            same = before is None or before == reason
            self.reasons[key] = reason if same else f"backward: {before}; forward: {reason}"
            return
        self.gone.add(key)
        record = self.folds.setdefault(key, Fold(order=len(self.folds)))
        for (_, side), (module, layer, affine) in trial.absorbs.items():
            name = self.references[id(module)].name
            record.steps.append((name, side, layer, affine))
            bias = getattr(module, "bias", None) is not None or id(module) in self.biased or not affine.no_shift
            if bias:
                self.biased.add(id(module))
            record.biased[name] = bias
        for other, affine in trial.composes.items():
            self.affines[other] = affine.after(self.affines[other])
            record.steps.append((self.references[other].name, "output", None, affine))

    def _incomplete(self, trial: _Trial) -> str | None:
        """A layer called at several sites must be reached at all of them, by the same affine."""
        for identity, nodes in trial.reached.items():
            sites = self.flow.calls.get(identity, [])
            if len(nodes) != len(sites):
                name = self.references[identity].name
                when = next(flow.region.when for flow, node in sites if node not in nodes)
                if when:
                    return f"{when}, {name} does not lead to this norm alone"
                return f"{name} is called at {len(sites)} sites and only {len(nodes)} of them lead to this norm"
        return None

    # --- backward ----------------------------------------------------------------------------------------------------

    def _backward(self, site: Site, trial: _Trial) -> str | None:
        for flow, node in self.flow.sites(site.module):
            source = argument(node, 0, "input")
            if not isinstance(source, fx.Node):
                return "its input is not a tensor of the graph"
            need = Need(source, self.affines[self.key(site)], 1)
            if (reason := self._output_side(flow, need, node, trial)) is not None:
                return reason
        return None

    def _output_side(self, flow: Flow, need: Need, user: fx.Node, trial: _Trial) -> str | None:
        pending = [(need, user)]
        while pending:
            need, user = pending.pop()
            node = need.node
            users = passages.value_users(node)
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
            outcome = passages.backward(flow, node, need.affine, need.axis)
            if isinstance(outcome, str):
                return outcome
            pending.extend((inner, node) for inner in outcome)
        return None

    def _absorb_or_pass(
        self,
        flow: Flow,
        need: Need,
        module: nn.Module,
        node: fx.Node,
        trial: _Trial,
        pending: list[tuple[Need, fx.Node]],
    ) -> str | None:
        if id(module) in self.affines or id(module) in self.gone:
            return self._through_norm(flow, need, module, node, trial, pending)
        layer = layers.describe(module)
        if isinstance(layer, Layer):
            if not _channels_at(flow, node, need.axis, layer):
                hint = (
                    "the rank of its output is not known, pass example_inputs"
                    if flow.shape(node) is None
                    else "the norm's channels are another axis"
                )
                return f"{passages.label(flow, node)}: {hint}"
            return self._absorb(module, layer, need.affine, "output", node, trial)
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            return f"{passages.label(flow, node)}: {layer}"
        if _watched(module):
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
        trial: _Trial,
        pending: list[tuple[Need, fx.Node]],
    ) -> str | None:
        if _follows(module):
            return f"{passages.label(flow, node)} ends in an activation"
        if not flow.is_axis(node, need.axis, 1):
            return f"{passages.label(flow, node)}: the norm's channels are another axis"
        if id(module) in self.gone:
            source = argument(node, 0, "input")
            pending.append((Need(source, need.affine, need.axis), node))
            return None
        if not self.composes:
            return f"{passages.label(flow, node)} stands between"
        if (reason := self.flow.unsettled(module)) is not None:
            return reason
        if not trial.composes.setdefault(id(module), need.affine).same(need.affine):
            return f"{passages.label(flow, node)} is called at several sites with different norms behind"
        trial.reached.setdefault(id(module), set()).add(node)
        return None

    # --- forward -----------------------------------------------------------------------------------------------------

    def _forward(self, site: Site, trial: _Trial) -> str | None:
        if _follows(site.module):
            return "an activation follows inside it"
        for flow, node in self.flow.sites(site.module):
            if (reason := self._input_side(flow, Need(node, self.affines[self.key(site)], 1), trial)) is not None:
                return reason
            if (reason := self._overwritten(flow, node, trial)) is not None:
                return reason
        return None

    def _overwritten(self, flow: Flow, node: fx.Node, trial: _Trial) -> str | None:
        """Without the norm its readers get its input itself, which nothing may change before they have read it."""
        if id(flow) not in self.overwrites:
            self.overwrites[id(flow)] = Overwrites(flow.region, lambda module: id(module) in self.gone)
        writer = self.overwrites[id(flow)].between(node, set().union(*trial.reached.values()))
        return None if writer is None else f"{passages.label(flow, writer)} changes its input in place"

    def _input_side(self, flow: Flow, need: Need, trial: _Trial) -> str | None:
        pending = [need]
        while pending:
            need = pending.pop()
            users = passages.value_users(need.node)
            if not users:
                return "nothing reads it"
            if need.node in flow.region.kept:
                return "it is also kept in an attribute"
            for user in users:
                if _uses(user, need.node) != 1:
                    return f"{passages.label(flow, user)} reads it twice"
                module = flow.module(user)
                layer = None if module is None else layers.describe(module)
                if module is not None and isinstance(layer, Layer):
                    if (reason := self._read_by_layer(flow, need, module, layer, user, trial)) is not None:
                        return reason
                    continue
                if module is not None and (id(module) in self.gone and not _follows(module)):
                    pending.append(Need(user, need.affine, need.axis))
                    continue
                if module is not None and (_watched(module) or isinstance(module, nn.modules.conv._ConvNd | nn.Linear)):
                    return f"{passages.label(flow, user)}: {'it has hooks' if _watched(module) else layer}"
                outcome = passages.forward(flow, user, need.node, need.affine, need.axis)
                if isinstance(outcome, str):
                    return outcome
                pending.append(outcome)
        return None

    def _read_by_layer(
        self, flow: Flow, need: Need, module: nn.Module, layer: Layer, user: fx.Node, trial: _Trial
    ) -> str | None:
        if not _channels_at(flow, need.node, need.axis, layer):
            return (
                f"{passages.label(flow, user)}: it is not proved that it reads the norm's channels (example_inputs may)"
            )
        if not layer.shift_reaches_evenly and not need.affine.no_shift:
            return f"{passages.label(flow, user)} pads with zeros (or is transposed), and the shift is not zero"
        return self._absorb(module, layer, need.affine, "input", user, trial)

    # --- layers ------------------------------------------------------------------------------------------------------

    def _absorb(
        self, module: nn.Module, layer: Layer, affine: Affine, side: Side, node: fx.Node, trial: _Trial
    ) -> str | None:
        channels = layer.outputs if side == "output" else layer.inputs
        if affine.channels != channels:
            return f"{type(module).__name__} has {channels} channels there, the norm {affine.channels}"
        if (reason := self._unfit(module)) is not None:
            return reason
        if layers.may_overflow(module, affine):
            dtype = str(module.weight.dtype).removeprefix("torch.")
            return f"the folded weights of {self.references[id(module)].name} may not be finite in {dtype}"
        if (
            getattr(module, "bias", None) is None
            and not affine.no_shift
            and (reason := self.flow.asks_for_bias(module))
        ):
            return reason
        key: tuple[int, Side] = (id(module), side)
        if key in trial.absorbs:
            if not trial.absorbs[key][2].same(affine):
                return f"{self.references[id(module)].name} is called at several sites with different norms"
        else:
            trial.absorbs[key] = (module, layer, affine)
        trial.reached.setdefault(id(module), set()).add(node)
        return None

    def _unfit(self, module: nn.Module) -> str | None:
        if id(module) not in self.layer_reasons:
            self.layer_reasons[id(module)] = self._why_unfit(module)
        return self.layer_reasons[id(module)]

    def _why_unfit(self, module: nn.Module) -> str | None:
        name = self.references[id(module)].name
        if _watched(module):
            return f"{name} has forward or backward hooks, which would see other values"
        if parametrize.is_parametrized(module):
            return f"{name} is parametrized"
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            owners = self.owners.get(id(parameter), [])
            if len(owners) > 1:
                others = [self.references[id(o)].name for o in owners if o is not module] or [name]
                return f"{name} shares its weight with {others[0]}"
            if id(parameter) in self.flow.tensor_reads:
                return f"the weight of {name} is also read directly"
            if parameter.is_meta:
                return f"{name} is on the meta device"
        reads = {
            attribute
            for parent in self.references[id(module)].parents
            for child, attribute in reach(parent).child_reads
            if parent._modules.get(child) is module and attribute in ("weight", "bias")
        }
        if reads:
            return f"the code around {name} reads its {sorted(reads)[0]}"
        return self.flow.read_in_doubt(module) or self.flow.unsettled(module)

    def outcome(self, site: Site, keep_batchnorm: bool, evidence: str) -> Change | Skip:
        key = self.key(site)
        norm = site.norm
        assert norm is not None
        common: dict[str, Any] = {"aliases": site.aliases, "evidence": evidence}
        if key in self.gone:
            record = self.folds[key]
            into = tuple(dict.fromkeys(name for name, *_ in record.steps))
            target = Norm(kind="identity", channels=norm.channels, pools=frozenset(), momentum=None, then=norm.then)
            return Change(site.name, norm, target, "exact", "identity", into=into, fold=record, **common)
        reason = self.reasons[key]
        if keep_batchnorm:
            return Skip(site.name, reason, norm, site.label, **common)
        affine = self.affines[key]
        target = Norm(kind="affine", channels=norm.channels, eps=None, momentum=None, then=norm.then)
        return Change(
            site.name,
            norm,
            target,
            "exact",
            "affine",
            notes=(reason,),
            fold=Fold(left=affine, order=len(self.affines)),
            **common,
        )


_HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _watched(module: nn.Module) -> bool:
    """Whether hooks see the module's values."""
    return any(vars(module).get(name) for name in _HOOK_TABLES)


def _follows(module: nn.Module) -> bool:
    norm = registry.read(module)
    return any(not isinstance(follower, nn.Identity) for follower in norm.then)


def _channels_at(flow: Flow, node: fx.Node, axis: int, layer: Layer) -> bool:
    """Whether ``axis`` of a value is where a layer has its channels; of a convolution it is axis 1, if not shown
    otherwise."""
    shape = flow.shape(node)
    if shape is None:
        return axis == 1 and layer.kind != "linear"
    return axis % len(shape) == len(shape) - 1 - layer.spatial


def _uses(user: fx.Node, node: fx.Node) -> int:
    count = 0

    def visit(argument: fx.Node) -> fx.Node:
        nonlocal count
        count += argument is node
        return argument

    fx.node.map_arg((user.args, user.kwargs), visit)
    return count


# --- applying --------------------------------------------------------------------------------------------------------


def apply_fold(
    model: nn.Module, changes: Sequence[Change], undoable: bool = True
) -> tuple[nn.Module, Callable[[], None]]:
    """Make the folds in place; returns the model and what undoes them, bit for bit.

    An error undoes what was done: all of it, or, with ``undoable=False``, which keeps no old weights, the norm at hand.
    Either way the model computes what it did."""
    found = references(model)
    by_name = {name: reference for reference in found.values() for name in reference.names}
    undo: list[Callable[[], None]] = []

    def back() -> None:
        while undo:
            undo.pop()()

    root = model
    try:
        awaited: set[str] = set()  # norms that must change too before the model computes what it did
        for change in sorted(changes, key=lambda change: 0 if change.fold is None else change.fold.order):
            if not undoable and not awaited:
                undo.clear()
            built = _apply_one(change, by_name, undo)
            steps = [] if change.fold is None else change.fold.steps
            awaited = (awaited | {name for name, _, layer, _ in steps if layer is None}) - {change.name}
            if by_name[change.name].module is model:
                root = built
    except BaseException:
        back()
        raise
    return root, back


def _apply_one(change: Change, by_name: dict[str, Reference], undo: list[Callable[[], None]]) -> nn.Module:
    reference = by_name.get(change.name)
    if reference is None or change.fold is None:
        raise NormswapError(f"the model has no module {change.name!r}, which the plan folds")
    for name, side, layer, affine in change.fold.steps:
        if layer is None:
            continue
        try:
            undo.append(layers.absorb(by_name[name].module, layer, affine, side))
        except NormswapError as error:
            raise NormswapError(
                f"{change.name} into {name}: {error}; leave it out with skip={change.name!r}"
            ) from error
    old = reference.module
    built = _left(change, old)
    hand_over = carry(old, built, registry.read(old))
    for slot in reference.slots:
        slot.put(built)
        undo.append(partial(slot.put, old))
    undo.append(hand_over())
    return built


def _left(change: Change, old: nn.Module) -> nn.Module:
    """What stands where the norm stood: nothing, or a multiply-add."""
    assert change.fold is not None
    affine = change.fold.left
    if affine is None:
        identity: Any = nn.Identity()
        identity.num_features = change.source.channels  # which the code around it may read
        return identity  # type: ignore[no-any-return]
    tensor = change.source.running_var
    assert tensor is not None
    module = ChannelAffine(0)
    module.num_features = affine.channels
    like = change.source.weight if change.source.weight is not None else tensor
    scale, shift = (v.to(device=like.device, dtype=like.dtype) for v in (affine.scale, affine.shift))
    if not bool(scale.isfinite().all() and shift.isfinite().all()):
        raise NormswapError(f"{change.name}: its scale and shift are not finite in {like.dtype}")
    for name, value in (("scale", scale), ("shift", shift)):
        delattr(module, name)
        if isinstance(like, nn.Parameter):
            module.register_parameter(name, nn.Parameter(value, requires_grad=like.requires_grad))
        else:  # code that goes through all parameters finds as many as before
            module.register_buffer(name, value)
    return module


def replay(model: nn.Module, steps: Sequence[Mapping[str, Any]]) -> nn.Module:
    """Fold a fresh model as a recipe's steps say, in place: the same norms vanish, the same layers get a bias.

    Raises :class:`NormswapError`, with the model unchanged, when a norm that vanished then cannot vanish here.
    """
    outcomes = {step["name"]: step["to"] for step in steps}
    sites = survey(references(model))
    known = {site.name for site in sites}
    if missing := [name for name in outcomes if name not in known]:
        raise NormswapError(
            f"the recipe folds {missing[0]!r}, but the model has no norm there; is it the same architecture?"
        )
    plan = _plan(model, lambda name, _norm: name in outcomes, left={n for n, to in outcomes.items() if to == "affine"})
    for change in plan.changes:
        if change.to != outcomes[change.name]:
            raise NormswapError(f"the recipe folds {change.name!r} away, but here it stays: {'; '.join(change.notes)}")
    if lost := outcomes.keys() - {change.name for change in plan.changes}:
        reasons = {skip.name: skip.reason for skip in plan.skips}
        name = sorted(lost)[0]
        raise NormswapError(f"the recipe folds {name!r}, but here it stays: {reasons[name]}")
    result, _ = apply_fold(model, plan.changes)
    for layer in (layer for step in steps for layer in step["layers"] if layer["bias"]):
        module: Any = result.get_submodule(layer["name"])
        if module.bias is None:
            outputs = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            zeros = module.weight.new_zeros(outputs)
            module.bias = nn.Parameter(zeros, requires_grad=module.weight.requires_grad)
    return result
