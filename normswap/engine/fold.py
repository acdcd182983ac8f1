"""Fold: every norm with fixed statistics vanishes into the layers around it, or becomes one multiply-add."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from normswap.engine.plan import Plan
from normswap.engine.planning import Request, planned
from normswap.engine.search import Options
from normswap.engine.select import Selector
from normswap.engine.sites import check_model, survey
from normswap.errors import NormswapError, Refusal
from normswap.fold import bake
from normswap.fold.layers import Layer, describe
from normswap.graph.references import references
from normswap.graph.separate import Unsharing, separate


def plan_fold(
    model: nn.Module,
    *,
    where: Selector = None,
    skip: Selector = None,
    example_inputs: tuple[Any, ...] | None = None,
    keep_batchnorm: bool = False,
    affine: bool = False,
    unshare: bool = False,
    merge_branches: bool = False,
) -> Plan:
    """Plan how the norms with fixed statistics vanish into the layers around them; nothing is changed.

    ``where``, ``skip`` and ``example_inputs`` are as in :func:`normswap.plan_convert`. What no layer absorbs becomes a
    :class:`normswap.norms.affine.ChannelAffine`, with the reason in its notes; with ``keep_batchnorm`` it stays and is
    a ``Skip``. A layer that absorbs a norm and computes its weight (weight norm, spectral norm, pruning masks, weight
    standardization) becomes a plain one, which the notes say.

    ``affine``: norms that compute their statistics from each input (layer, RMS, group, instance) give their weight and
    bias to the layers that read them, where all of those can take it, and stay without: as the same objects, with
    ``None`` for weight and bias where their class takes that and nothing asks for them, else with values that do
    nothing. No statistics are involved, so eval and train mode stay the same function, except where a dropout stands
    between the norm and a layer and the norm has a bias, which the notes say.

    ``unshare``: a layer that is called at several places, or whose weight another module has too, gets a copy for each
    of the norms that it would have to absorb; the plan's notes say which, and what memory that costs
    (``plan.new_bytes``).

    ``merge_branches``: parallel convolutions of one value that are added up, with their norms and scales and with the
    value itself, become one convolution first (``plan.merges``); a note says of others why not.

    Raises :class:`NormswapError` for misuse."""
    check_model(model)
    if unshare and merge_branches:
        raise NormswapError("unshare and merge_branches go one after the other: fold with one, then the result")
    options = Options(keep_batchnorm, affine, unshare, merge_branches)
    return planned(Request(model, where, skip, example_inputs, options))


def replay(
    model: nn.Module,
    steps: Sequence[Mapping[str, Any]],
    unsharing: Unsharing | None = None,
    merges: Sequence[Mapping[str, Any]] = (),
) -> nn.Module:
    """Fold a fresh model as a recipe's steps say, in place: the same layers get copies, the same branches are merged,
    the same norms vanish, the same layers get a bias.

    Raises :class:`NormswapError`, with the model unchanged, when a norm that vanished then cannot vanish here, or
    branches that were merged cannot be merged.
    """
    undo = separate(model, unsharing or Unsharing())
    try:
        return replay_folds(model, steps, merges)[0]
    except BaseException:
        undo()
        raise


def replay_folds(
    model: nn.Module, steps: Sequence[Mapping[str, Any]], merges: Sequence[Mapping[str, Any]] = ()
) -> tuple[nn.Module, Callable[[], None]]:
    """:func:`replay` of folds that share no layers; the model, and what undoes them."""
    outcomes = {step["name"]: step["to"] for step in steps}
    sites = survey(references(model))
    known = {site.name for site in sites}
    if missing := [name for name in outcomes if name not in known]:
        raise NormswapError(
            f"the recipe folds {missing[0]!r}, but the model has no norm there; is it the same architecture?"
        )
    left = {name for name, to in outcomes.items() if to == "affine"}
    recorded = {step["name"]: step for step in steps if step["to"] == "bare"}
    baked = {layer["name"] for step in steps for layer in step["layers"] if layer.get("baked")}
    options = Options(affine=bool(recorded), merge_branches=bool(merges), bakes=baked)
    plan = planned(Request(model, lambda name, _norm: name in outcomes, None, None, options, left, recorded, merges))
    made = [merge.step() for merge in plan.merges]
    if lacking := [merge for merge in merges if merge not in made]:
        host, why = lacking[0]["host"], f" ({plan.notes[0]})" if plan.notes else ""
        raise NormswapError(f"the recipe merges branches into {host!r}, but here they are not found{why}")
    for change in plan.changes:
        if change.to != outcomes[change.name]:
            raise NormswapError(f"the recipe folds {change.name!r} away, but here it stays: {'; '.join(change.notes)}")
    if lost := outcomes.keys() - {change.name for change in plan.changes}:
        reasons = {skip.name: skip.reason for skip in plan.skips}
        name = sorted(lost)[0]
        raise NormswapError(f"the recipe folds {name!r}, but here it stays: {reasons[name]}")
    result = plan.apply(inplace=True)
    undo: list[Callable[[], object]] = [plan.undo]

    def back() -> None:
        while undo:
            undo.pop()()

    for name in baked:  # a layer that took in another norm there than here
        try:
            undo.append(bake.bake(result.get_submodule(name)))
        except (NormswapError, Refusal, AttributeError) as error:
            back()
            raise NormswapError(f"the recipe bakes {name!r}, but here that cannot be done: {error}") from error
    for layer in (layer for step in steps for layer in step["layers"] if layer["bias"]):
        module: Any = result.get_submodule(layer["name"])
        if module.bias is None:
            described = describe(module)
            assert isinstance(described, Layer)
            outputs = described.outputs
            zeros = module.weight.new_zeros(outputs)
            module.bias = nn.Parameter(zeros, requires_grad=module.weight.requires_grad)
            undo.append(partial(setattr, module, "bias", None))
    return result, back
