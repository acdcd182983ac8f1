"""Convert: every norm of a model becomes another kind, or is skipped with a reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, Literal

from torch import fx, nn

from normswap import registry
from normswap.engine import guards
from normswap.engine.carry import build, carry
from normswap.engine.plan import Change, Plan, Skip
from normswap.engine.select import Selector, check_globs, excluded
from normswap.engine.sites import Site, check_model, survey
from normswap.errors import NormswapError, Refusal
from normswap.graph.evidence import Evidence, input_evidence
from normswap.graph.lift import lift
from normswap.graph.observe import observe
from normswap.graph.references import Reference, Slot, references
from normswap.graph.trace import regions
from normswap.norms.group import SINGLE_POSITION_CHANNELS, nearest_count
from normswap.spec import Norm, exactness

Init = Literal["copy", "preserve", "reset"]
ONE_POSITION = "larger groups: its input has one position"
INITS: tuple[Init, ...] = ("copy", "preserve", "reset")


class _Dataflow:
    """Static evidence about norms' inputs; the model is traced only when it is asked for."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @cached_property
    def _nodes(self) -> dict[int, list[Any]]:
        nodes: dict[int, list[Any]] = {}
        for region in regions(self.model)[0]:
            for node in region.graph.nodes:
                module = region.module_of(node)
                if module is not None:
                    nodes.setdefault(id(module), []).append((region, node))
        return nodes

    def of(self, site: Site, channels: int) -> Evidence:
        if site.call is not None:
            return Evidence()
        seen = [input_evidence(region, node, channels) for region, node in self._nodes.get(id(site.module), [])]
        if not seen:
            return Evidence()
        rank = seen[0].rank if all(e.rank == seen[0].rank for e in seen) else None
        return Evidence(rank, any(e.single for e in seen))


def plan_convert(
    model: nn.Module,
    to: str = "group",
    *,
    where: Selector = None,
    skip: Selector = None,
    example_inputs: tuple[Any, ...] | None = None,
    init: Init = "copy",
    **options: Any,
) -> Plan:
    """Plan the conversion of every norm of ``model`` to the kind ``to``; nothing is changed.

    ``where`` and ``skip`` take a glob over dotted names, a list of globs, or ``f(name, norm) -> bool``.
    ``example_inputs``, a tuple of the model's positional arguments, allows one observed run. ``init``: ``"copy"``
    carries affine and statistics where the target has them, ``"preserve"`` also chooses new parameters so that eval
    mode computes the same function (norms whose target cannot are skipped), ``"reset"`` starts afresh. ``options`` are
    the kind's own (``groups=``, ``channels_per_group=``, ``over=``, ``gate_gap=`` ...).

    Raises :class:`NormswapError` for misuse: an unknown kind or option, a group count that does not divide, a
    ScriptModule, inputs that the model does not run on, a glob that matches no norm."""
    check_model(model)
    registry.builder(to)
    registry.check_options(to, options)
    if init not in INITS:
        raise NormswapError(f"init={init!r}; it is one of: {', '.join(INITS)}")
    if (planner := registry.planner(to)) is not None:
        planned: Plan = planner(model, where=where, skip=skip, example_inputs=example_inputs, init=init, **options)
        return planned
    observation = None if example_inputs is None else observe(model, example_inputs)
    sites = survey(references(model), observation)
    check_globs(sites, where=where, skip=skip)
    dataflow = _Dataflow(model)
    plan = Plan(model, f"convert to {to}", [], [], guards.wrapper_notes(model), apply_changes)
    for site in sites:
        reason = site.reason or excluded(site, where, skip)
        decision: Change | str = reason if reason is not None else _decide(site, to, options, init, dataflow)
        if isinstance(decision, Change):
            plan.changes.append(decision)
        else:
            plan.skips.append(Skip(site.name, decision, site.norm, site.label, site.aliases, site.evidence))
    return plan


def _decide(site: Site, to: str, options: Mapping[str, Any], init: Init, dataflow: _Dataflow) -> Change | str:
    assert site.norm is not None
    norm = site.norm
    if norm.kind == to and not options and init != "reset":
        return f"it already is {norm}"
    ranks = {len(shape) for shape in site.shapes or () if shape}
    evidence = Evidence()
    if ranks:
        if norm.channel_axis == 1 and any(shape[1] != norm.channels for shape in site.shapes or () if len(shape) > 1):
            return f"its input {site.shapes and site.shapes[0]} does not have its {norm.channels} channels on axis 1"
        if norm.ranks is not None and not ranks <= norm.ranks:
            return f"its input {site.shapes and site.shapes[0]} has no batch axis, or more axes than the norm takes"
        norm = replace(norm, ranks=frozenset(ranks))
    elif norm.channel_axis == 1 and (norm.ranks is None or len(norm.ranks) > 1 or to == "instance"):
        evidence = dataflow.of(site, norm.channels)
        if evidence.rank is not None and (norm.ranks is None or evidence.rank in norm.ranks):
            norm = replace(norm, ranks=frozenset({evidence.rank}))
    elif to == "group" and not options:
        evidence = dataflow.of(site, norm.channels)
    settled = {name: value(norm.channels) if callable(value) else value for name, value in options.items()}
    try:
        regrouped = to == "group" and not options and _one_position(site, norm, evidence)
        if regrouped:
            settled["groups"] = nearest_count(norm.channels, SINGLE_POSITION_CHANNELS)
        built = build(norm, to, settled, init)
        target = describe(built, norm, to)
    except Refusal as refusal:
        return refusal.reason
    except NormswapError as error:
        raise NormswapError(f"{site.name or 'the model'}: {error}") from error
    outcome = "retrain" if init == "reset" else exactness(norm, target)
    if norm.kind == target.kind and outcome == "exact":
        return f"it already is {target}"
    if init == "preserve" and outcome != "exact" and not registry.takes_init(to):
        return f"{to} cannot compute the same as {norm} (init='preserve')"
    if not any(site.shapes or ()) and guards.elements(target, None, Evidence(single=True)) == 1:
        evidence = dataflow.of(site, norm.channels)
    fewest = guards.elements(target, site.shapes, evidence)
    reason = guards.single_element(target, fewest) or guards.child_reads(site, built, outcome == "exact")
    if reason is not None:
        return reason
    return Change(
        name=site.name,
        source=norm,
        target=target,
        exactness=outcome,
        to=to,
        aliases=site.aliases,
        lost=lost(norm, target),
        notes=(*_notes(site, norm, target, init, fewest), *([ONE_POSITION] if regrouped else [])),
        evidence=site.evidence,
        functional=site.functional,
        options=settled,
        init=init,
        classes=(registry.dotted(type(site.module)), registry.dotted(type(built))),
    )


def _one_position(site: Site, norm: Norm, evidence: Evidence) -> bool:
    """Whether a channel of the norm's input is known to be a single value for every sample."""
    if site.shapes:
        return any(prod(shape[2:]) == 1 for shape in site.shapes)
    return evidence.single or norm.ranks == frozenset({2})


def describe(built: nn.Module, norm: Norm, kind: str) -> Norm:
    """The ``Norm`` of a built replacement, followers included; an ``identity`` is one that pools over nothing."""
    if not registry.registered(built):
        return Norm(kind=kind, channels=norm.channels, pools=frozenset(), momentum=None, eps=None, then=norm.then)
    return replace(registry.read(built), then=norm.then)


def lost(norm: Norm, target: Norm) -> tuple[str, ...]:
    """What the source computes with and the target has no place for."""
    gone = []
    if norm.weight is not None and target.weight is None:
        gone.append("weight")
    if norm.bias is not None and target.bias is None:
        gone.append("bias")
    if norm.has_statistics and not target.has_statistics:
        gone.append("running statistics")
    if norm.schedule is not None and target.has_statistics and target.schedule is None:
        gone.append("schedule of the momentum")
    if norm.gates is not None and target.gates is None:
        gone.append("gates")
    if norm.share is not None and target.share is None:
        gone.append("share")
    if norm.threshold is not None and target.threshold is None:
        gone.append("threshold")
    if norm.form is not None and norm.form.loses and not _has_place(target, norm):
        gone.append(norm.form.loses)
    if target.fixed and not norm.fixed:
        gone.append("training of affine and statistics")
    if norm.upcast and not target.upcast:
        gone.append("float32 computation whatever the input's dtype")
    return tuple(gone)


def _has_place(target: Norm, norm: Norm) -> bool:
    """Whether the tensors that the form of ``norm`` adds are in ``target`` too."""
    ours, theirs = (form.tensors if form is not None else {} for form in (norm.form, target.form))
    return all(name in theirs and theirs[name].shape == tensor.shape for name, tensor in ours.items())


def _notes(site: Site, norm: Norm, target: Norm, init: Init, fewest: int | None) -> tuple[str, ...]:
    notes = []
    if fewest is not None and fewest < guards.FEW:
        notes.append(f"its moments run over only {fewest} elements, which keep little of the data: take fewer groups")
    if init == "reset":
        notes.append("affine and statistics start afresh")
    elif target.has_statistics and not norm.has_statistics:
        notes.append("running statistics start at mean 0, variance 1: train, or estimate them from data")
    if norm.fixed and not target.fixed:
        notes.append("trainable again")
    if target.form is not None and target.form.note:
        notes.append(target.form.note)
    if not site.functional and guards.has_fast_path(site) and target.kind != "layer":
        notes.append(guards.FAST_PATH_NOTE)
    if site.functional and not isinstance(site.module, fx.GraphModule):
        notes.append("its forward is generated from a trace: Python branches and optional arguments are fixed")
    if site.shapes == ():
        notes.append("did not run on example_inputs")
    if target.process_group is not None:
        notes.append("a recipe cannot hold its process group: replayed, it pools over all processes")
    return tuple(notes)


@dataclass
class _Prepared:
    """A replacement, and the references to put it in."""

    change: Change
    reference: Reference
    built: nn.Module
    hand_over: Callable[[], Callable[[], None]]


def apply_changes(
    model: nn.Module, changes: Sequence[Change], undoable: bool = True
) -> tuple[nn.Module, Callable[[], None]]:
    """Make the changes in place; returns the model (the replacement, if the root is a norm) and what undoes them.

    Everything is built before anything is swapped; an error puts all back and is raised. Nothing is lost by keeping the
    undo, so ``undoable`` makes no difference here.
    """
    found = references(model)
    by_name = {name: reference for reference in found.values() for name in reference.names}
    prepared = [_prepare(change, by_name, model) for change in changes if not change.functional]
    lifts = list(_lifts([change for change in changes if change.functional], found, model))
    undo: list[Callable[[], None]] = []
    root = model
    try:
        for item in prepared:
            undo.append(_swap(item))
            if item.reference.module is model:
                root = item.built
        for make in lifts:
            undo.append(make())
        other_than_layer = [i for i in prepared if (i.change.target.kind, i.change.exactness) != ("layer", "exact")]
        undo.append(guards.fast_paths_off(model, [p for item in other_than_layer for p in item.reference.parents]))
    except BaseException:
        _run_reversed(undo)
        raise
    return root, lambda: _run_reversed(undo)


def _run_reversed(undo: list[Callable[[], None]]) -> None:
    while undo:
        undo.pop()()


def _prepare(change: Change, by_name: Mapping[str, Reference], model: nn.Module) -> _Prepared:
    reference = by_name.get(change.name)
    if reference is None:
        raise NormswapError(f"the model has no module {change.name!r}, which the plan changes to {change.to}")
    try:
        norm = registry.read(reference.module)
        norm = _fitting(norm, change)
        built = build(norm, change.to, change.options, change.init)
    except Refusal as refusal:
        raise NormswapError(f"{change.name}: {refusal.reason}; the plan does not fit this model") from refusal
    hand_over = carry(reference.module, built, norm, (*reference.parents, model))
    return _Prepared(change, reference, built, hand_over)


def _fitting(norm: Norm, change: Change) -> Norm:
    if (norm.kind, norm.channels) != (change.source.kind, change.source.channels):
        raise NormswapError(
            f"{change.name} is {norm}, "
            f"but the plan was made for {change.source.kind} of {change.source.channels} channels"
        )
    return replace(norm, ranks=change.source.ranks)


def _swap(item: _Prepared) -> Callable[[], None]:
    old, slots = item.reference.module, item.reference.slots
    done: list[Slot] = []
    others: list[Callable[[], None]] = []

    def undo() -> None:
        for slot in reversed(done):
            slot.put(old)
        for restore in others:
            restore()

    try:
        for slot in slots:
            slot.put(item.built)
            done.append(slot)
        others.append(item.hand_over())
    except BaseException:
        undo()
        raise
    return undo


def _lifts(
    changes: Sequence[Change], found: Mapping[int, Reference], model: nn.Module
) -> Iterable[Callable[[], Callable[[], None]]]:
    if not changes:
        return
    sites = {site.name: site for site in survey(dict(found)) if site.call is not None}
    owners: dict[int, tuple[Site, dict[str, nn.Module]]] = {}
    for change in changes:
        site = sites.get(change.name)
        if site is None or site.norm is None or site.call is None:
            raise NormswapError(
                f"the model has no functional norm {change.name!r}, which the plan changes to {change.to}"
            )
        norm = _fitting(site.norm, change)
        try:
            built = build(norm, change.to, change.options, change.init)
        except Refusal as refusal:
            raise NormswapError(f"{change.name}: {refusal.reason}") from refusal
        carry(_bare(site.module, norm), built, norm, (site.module, model))
        owners.setdefault(id(site.module), (site, {}))[1][site.call.name] = built
    for site, replacements in owners.values():
        forward = site.forward
        assert forward is not None

        def make(forward: Any = forward, replacements: dict[str, nn.Module] = replacements) -> Callable[[], None]:
            return lift(forward, replacements)

        yield make


def _bare(owner: nn.Module, norm: Norm) -> nn.Module:
    """A stand-in source for a functional norm: only its owner's train/eval flag is carried.

    In a graph exported in eval mode the norm is fixed, whatever the flag of the ``GraphModule`` says.
    """
    bare = nn.Module()
    bare.training = owner.training and not (norm.fixed and isinstance(owner, fx.GraphModule))
    return bare
