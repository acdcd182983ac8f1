"""One fold planned: the survey of a model, the search, and what is done to the model or a copy of it meanwhile.

Functional norms are modules while the search goes on. With ``unshare``, the plan is made on a model whose shared layers
are apart; with ``merge_branches``, on a copy that has the merges made and shares the model's tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from normswap import registry
from normswap.engine.branches import find_merges
from normswap.engine.copying import copy_structure
from normswap.engine.dataflow import Dataflow
from normswap.engine.folding import apply_fold
from normswap.engine.lifting import GENERATED, standing_in
from normswap.engine.merging import apply_merged, apply_merges, merged_tensors
from normswap.engine.plan import Change, Fold, Merge, Plan, Skip
from normswap.engine.search import Options, Search, refused_outright
from normswap.engine.select import Selector, check_globs, excluded
from normswap.engine.sites import Site, survey
from normswap.engine.unsharing import find_unsharing
from normswap.errors import FixedArgument, NormswapError
from normswap.graph.references import Reference, references
from normswap.graph.separate import parameter_bytes, separate
from normswap.graph.trace import LINEAR_LAYERS
from normswap.spec import Norm


@dataclass(frozen=True)
class Known:
    """What is known of a model before its branches are merged, by the names of its modules."""

    skipped: Mapping[str, str]
    """Norms that stay, and why."""
    doubts: Mapping[str, str]
    """Modules whose calls are not all known."""


@dataclass
class Request:
    """A model, and what is asked of its fold."""

    model: nn.Module
    where: Selector
    skip: Selector
    example_inputs: tuple[Any, ...] | None
    options: Options
    left: Set[str] = frozenset()
    """Names of norms that are to become a channel affine, whether or not a layer could absorb them."""
    recorded: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Steps of a recipe by the name of a norm that gave its affine away."""
    wanted: Sequence[Mapping[str, Any]] | None = None
    """The merges of a recipe, and no others; ``None`` for all that are found."""
    known: Known | None = None
    chosen: list[Site] = field(default_factory=list, init=False)
    """The norms that are looked at in the end."""

    def plan(self, joined: Mapping[int, str] | None = None) -> tuple[Plan, Search]:
        """The plan for the model as it is now; ``joined``: why places of layers could not be taken apart."""
        found = references(self.model)
        try:
            with standing_in(found, refused_outright) as lifted:
                return self._search(references(self.model) if lifted else found, lifted, joined)
        except FixedArgument as error:
            return self._search(found, {}, joined, f"example_inputs call its forward with optional arguments: {error}")

    def _search(
        self,
        found: dict[int, Reference],
        lifted: Mapping[str, Site],
        joined: Mapping[int, str] | None,
        unlifted: str = "the module that holds its tensors has hooks or other names",
    ) -> tuple[Plan, Search]:
        model = self.model
        flow = Dataflow(model, found, self.example_inputs)
        sites = [
            replace(lifted[site.name], evidence=site.evidence) if site.name in lifted else site
            for site in survey(found, flow.observation)
        ]
        skipped: Mapping[str, str] = {}
        if self.known is None:
            check_globs(sites, where=self.where, skip=self.skip)
        else:
            skipped, doubts = self.known.skipped, self.known.doubts
            flow.doubts = {id(flow.by_name[name].module): why for name, why in doubts.items() if name in flow.by_name}
        plan = Plan(model, "fold", [], [], (), apply_fold)
        path = None if self.example_inputs is None else partial(flow.along, model, self.example_inputs)
        search = Search(flow, found, self.options, path, self.recorded, joined)
        search.own(sites)
        search.unlifted = unlifted
        self.chosen = []
        for site in sites:
            reason = skipped.get(site.name) or excluded(site, self.where, self.skip) or search.refuses(site)
            if reason is None:
                self.chosen.append(site)
            else:
                plan.skips.append(Skip(site.name, reason, site.norm, site.label, site.aliases, site.evidence))
        if self.options.merge_branches:  # what else folds is found later
            return plan, search
        search.run(self.chosen, self.left)
        for site in self.chosen:
            change = search.outcome(site)
            if isinstance(change, Change):
                plan.changes.append(change)
            else:
                plan.skips.append(change)
        if any(module.training for module in model.modules()) and not plan.changes:
            plan.notes = ("the model is in train mode: call model.eval() before folding",)
        plan.notes = (*plan.notes, *flow.notes)
        return plan, search


def planned(request: Request) -> Plan:
    """The plan that a request asks for."""
    if request.options.merge_branches:
        return _merged(request)
    return _unshared(request) if request.options.unshare else request.plan()[0]


# --- shared layers ---------------------------------------------------------------------------------------------------


def _unshared(request: Request) -> Plan:
    plain, search = request.plan()
    if not search.blocking():
        return plain
    try:
        unsharing, joined = find_unsharing(request.model, request.plan, search)
    except FixedArgument as error:
        plain.notes = (*plain.notes, f"nothing is unshared: {error}")
        return plain
    before = parameter_bytes(request.model)
    undo = separate(request.model, unsharing, own_memory=False)
    try:
        plan, _ = request.plan(joined)
        new_bytes = parameter_bytes(request.model) - before
    finally:
        undo()
    if not unsharing or _folded(plan) <= _folded(plain):
        return plan if not unsharing else plain
    plan.apply_changes = partial(apply_fold, unsharing=unsharing)
    plan.unsharing, plan.new_bytes = unsharing, new_bytes
    made = [*unsharing.made, *unsharing.untied]
    plan.notes = (*plan.notes, f"unshared, with {new_bytes} bytes of new parameters: {', '.join(made)}")
    for name in unsharing.rewritten:
        plan.notes = (*plan.notes, f"{name or 'the model'}: {GENERATED}")
    return plan


def _folded(plan: Plan) -> int:
    return sum(bool(change.into) for change in plan.changes)


# --- merged branches -------------------------------------------------------------------------------------------------


def _merged(request: Request) -> Plan:
    """A plan with merges, if there are any, and with the folds around the merged convolutions.

    These are found in a copy with the merges made, which shares its tensors with the model."""
    plan, search = request.plan()
    chosen, rest = request.chosen, replace(request.options, merge_branches=False)
    names = {skip.name: skip.reason for skip in plan.skips}
    stays = {id(found.module): names[name] for name, found in search.flow.by_name.items() if name in names}
    sites = {id(site.module): site for site in chosen if site.call is None}
    merges, notes = find_merges(search, sites, stays)
    if request.wanted is not None:
        merges = [merge for merge in merges if merge.step() in request.wanted]
    merges = [merge for merge in merges if _finite(merge, search, notes)]
    if not merges:
        plain, _ = replace(request, options=rest).plan()
        plain.notes = (*notes, *plain.notes)
        return plain
    changes = _vanishing(merges, sites.values(), search.flow.evidence)
    twin = copy_structure(request.model)
    apply_merges(twin, merges, own_parameters=True)
    apply_fold(twin, changes, undoable=False)
    layers = (reference for reference in search.references.values() if _is_layer(reference.module))
    doubts = {each.name: reason for each in layers if (reason := search.flow.unsettled(each.module)) is not None}
    inner, _ = replace(request, model=twin, options=rest, known=Known(names, doubts)).plan()
    order = {site.name: position for position, site in enumerate(chosen)}
    plan.merges = tuple(merges)
    plan.changes = sorted((*changes, *inner.changes), key=lambda change: order.get(change.name, len(order)))
    plan.skips = inner.skips
    plan.notes = (*inner.notes, *notes)
    plan.apply_changes = partial(apply_merged, plan.merges)
    return plan


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, LINEAR_LAYERS) or registry.registered(module)


def _finite(merge: Merge, search: Search, notes: list[str]) -> bool:
    """Whether a merge can be made; if not, a note says why."""
    try:
        merged_tensors(merge, search.flow.by_name)
    except NormswapError as error:
        notes.append(f"{merge.holder or 'the model'}: branches are not merged: {error}")
        return False
    return True


def _vanishing(merges: Sequence[Merge], sites: Iterable[Site], evidence: str) -> list[Change]:
    """The norms inside merged branches."""
    hosts = {name: merge for merge in merges for name in merge.absorbs}
    changes = []
    for site in sites:
        merge, norm = hosts.get(site.name), site.norm
        if merge is None or norm is None:
            continue
        target = Norm(kind="identity", channels=norm.channels, pools=frozenset(), momentum=None, then=norm.then)
        record = Fold(biased={merge.host: merge.bias})
        changes.append(
            Change(
                site.name,
                norm,
                target,
                "exact",
                "identity",
                site.aliases,
                into=(merge.host,),
                fold=record,
                notes=("its branch is merged",),
                evidence=evidence,
            )
        )
    return changes
