"""Fold: every norm with fixed statistics vanishes into the layers around it, or becomes one multiply-add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

from torch import nn

from normswap.engine.copying import copy_model
from normswap.engine.dataflow import Dataflow
from normswap.engine.folding import apply_fold
from normswap.engine.lifting import standing_in
from normswap.engine.plan import Change, Plan, Skip
from normswap.engine.report import report
from normswap.engine.search import Options, Search, refused_outright
from normswap.engine.select import Selector, check_globs, excluded
from normswap.engine.sites import Site, check_model, survey
from normswap.errors import NormswapError
from normswap.graph.references import references


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
    return _plan(model, where, skip, example_inputs, Options(keep_batchnorm))


def _plan(
    model: nn.Module,
    where: Selector,
    skip: Selector,
    example_inputs: tuple[Any, ...] | None,
    options: Options,
    left: Set[str] = frozenset(),
) -> Plan:
    """``left``: names of norms that are to become a channel affine, whether or not a layer could absorb them."""
    with standing_in(model, refused_outright) as lifted:
        return _search(model, where, skip, example_inputs, options, left, lifted)


def _search(
    model: nn.Module,
    where: Selector,
    skip: Selector,
    example_inputs: tuple[Any, ...] | None,
    options: Options,
    left: Set[str],
    lifted: Mapping[str, Site],
) -> Plan:
    found = references(model)
    flow = Dataflow(model, found, example_inputs)
    sites = [
        replace(lifted[site.name], evidence=site.evidence) if site.name in lifted else site
        for site in survey(found, flow.observation)
    ]
    check_globs(sites, where=where, skip=skip)
    plan = Plan(model, "fold", [], [], (), apply_fold)
    search = Search(flow, found, options)
    search.own(sites)
    chosen: list[Site] = []
    for site in sites:
        reason = excluded(site, where, skip) or search.refuses(site)
        if reason is None:
            chosen.append(site)
        else:
            plan.skips.append(Skip(site.name, reason, site.norm, site.label, site.aliases, site.evidence))
    search.run(chosen, left)
    for site in chosen:
        change = search.outcome(site)
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
    left = {name for name, to in outcomes.items() if to == "affine"}
    plan = _plan(model, lambda name, _norm: name in outcomes, None, None, Options(), left)
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
