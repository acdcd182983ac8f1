"""Fold: every norm with fixed statistics vanishes into the layers around it, or becomes one multiply-add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from normswap.engine.dataflow import Dataflow
from normswap.engine.folding import apply_fold
from normswap.engine.lifting import GENERATED, standing_in
from normswap.engine.plan import Change, Plan, Skip
from normswap.engine.report import report
from normswap.engine.search import Options, Search, refused_outright
from normswap.engine.select import Selector, check_globs, excluded
from normswap.engine.sites import Site, check_model, survey
from normswap.engine.unsharing import find_unsharing
from normswap.errors import FixedArgument, NormswapError
from normswap.graph.references import Reference, references
from normswap.graph.separate import Unsharing, parameter_bytes, separate


def plan_fold(
    model: nn.Module,
    *,
    where: Selector = None,
    skip: Selector = None,
    example_inputs: tuple[Any, ...] | None = None,
    keep_batchnorm: bool = False,
    affine: bool = False,
    unshare: bool = False,
) -> Plan:
    """Plan how the norms with fixed statistics vanish into the layers around them; nothing is changed.

    ``where``, ``skip`` and ``example_inputs`` are as in :func:`normswap.plan_convert`. What no layer absorbs becomes a
    :class:`normswap.norms.affine.ChannelAffine`, with the reason in its notes; with ``keep_batchnorm`` it stays and is
    a ``Skip``.

    ``affine``: norms that compute their statistics from each input (layer, RMS, group, instance) give their weight and
    bias to the layers that read them, where all of those can take it, and stay without: as the same objects, with
    ``None`` for weight and bias where their class takes that and nothing asks for them, else with values that do
    nothing. No statistics are involved, so eval and train mode stay the same function, except where a dropout stands
    between the norm and a layer and the norm has a bias, which the notes say.

    ``unshare``: a layer that is called at several places, or whose weight another module has too, gets a copy for each
    of the norms that it would have to absorb; the plan's notes say which, and what memory that costs
    (``plan.new_bytes``).

    Raises :class:`NormswapError` for misuse."""
    check_model(model)
    options = Options(keep_batchnorm, affine, unshare)
    request = _Request(model, where, skip, example_inputs, options)
    return _plan_unshared(request) if unshare else request.plan()[0]


@dataclass
class _Request:
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
        check_globs(sites, where=self.where, skip=self.skip)
        plan = Plan(model, "fold", [], [], (), apply_fold)
        path = None if self.example_inputs is None else partial(flow.along, model, self.example_inputs)
        search = Search(flow, found, self.options, path, self.recorded, joined)
        search.own(sites)
        search.unlifted = unlifted
        chosen: list[Site] = []
        for site in sites:
            reason = excluded(site, self.where, self.skip) or search.refuses(site)
            if reason is None:
                chosen.append(site)
            else:
                plan.skips.append(Skip(site.name, reason, site.norm, site.label, site.aliases, site.evidence))
        search.run(chosen, self.left)
        for site in chosen:
            change = search.outcome(site)
            if isinstance(change, Change):
                plan.changes.append(change)
            else:
                plan.skips.append(change)
        if any(module.training for module in model.modules()) and not plan.changes:
            plan.notes = ("the model is in train mode: call model.eval() before folding",)
        plan.notes = (*plan.notes, *flow.notes)
        return plan, search


def _plan_unshared(request: _Request) -> Plan:
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


def fold(
    model: nn.Module,
    *,
    where: Selector = None,
    skip: Selector = None,
    example_inputs: tuple[Any, ...] | None = None,
    inplace: bool = False,
    keep_batchnorm: bool = False,
    affine: bool = False,
    unshare: bool = False,
) -> nn.Module:
    """Fold every norm with fixed statistics into the layers around it and return the model; see :func:`plan_fold`.

    ``affine``: of the other norms, weight and bias. The function in eval mode stays the same up to rounding. Without
    ``inplace`` the input is not touched.
    """
    plan = plan_fold(
        model,
        where=where,
        skip=skip,
        example_inputs=example_inputs,
        keep_batchnorm=keep_batchnorm,
        affine=affine,
        unshare=unshare,
    )
    report(plan)
    return plan.apply(inplace=inplace, undoable=False)


def replay(model: nn.Module, steps: Sequence[Mapping[str, Any]], unsharing: Unsharing | None = None) -> nn.Module:
    """Fold a fresh model as a recipe's steps say, in place: the same layers get copies, the same norms vanish, the same
    layers get a bias.

    Raises :class:`NormswapError`, with the model unchanged, when a norm that vanished then cannot vanish here.
    """
    undo = separate(model, unsharing or Unsharing())
    try:
        return _replay(model, steps)
    except BaseException:
        undo()
        raise


def _replay(model: nn.Module, steps: Sequence[Mapping[str, Any]]) -> nn.Module:
    outcomes = {step["name"]: step["to"] for step in steps}
    sites = survey(references(model))
    known = {site.name for site in sites}
    if missing := [name for name in outcomes if name not in known]:
        raise NormswapError(
            f"the recipe folds {missing[0]!r}, but the model has no norm there; is it the same architecture?"
        )
    left = {name for name, to in outcomes.items() if to == "affine"}
    recorded = {step["name"]: step for step in steps if step["to"] == "bare"}
    options = Options(affine=bool(recorded))
    plan, _ = _Request(model, lambda name, _norm: name in outcomes, None, None, options, left, recorded).plan()
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
