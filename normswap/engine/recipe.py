"""Replaying a plan's recipe on a fresh model of the same architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from torch import nn

from normswap import registry
from normswap.engine.carry import build
from normswap.engine.convert import INITS, apply_changes, describe
from normswap.engine.copying import copy_model
from normswap.engine.fold import replay, replay_folds
from normswap.engine.network import apply_weights, described, replayed_change
from normswap.engine.plan import RECIPE_VERSION, Change
from normswap.engine.sites import Site, check_model, survey
from normswap.errors import NormswapError, Refusal
from normswap.graph.references import references
from normswap.graph.separate import Unsharing
from normswap.norms.bare import Manner
from normswap.spec import exactness


def apply_recipe(model: nn.Module, recipe: Mapping[str, Any], *, inplace: bool = False) -> nn.Module:
    """Make the changes of ``plan.recipe`` on a model and return it (a deep copy unless ``inplace``).

    Every step must find its norm, of the kind and channels it was written for; if one does not, nothing is changed.
    Raises :class:`NormswapError` then, and for a recipe that is malformed or of a newer format."""
    check_model(model)
    steps = _steps(recipe)
    target = model if inplace else copy_model(model)
    if recipe.get("operation") == "fold":
        unshare = recipe.get("unshare")
        unsharing = None if unshare is None else Unsharing.from_dict(unshare)
        return replay(target, steps, unsharing, _merges(recipe))
    if _of_layers(recipe):
        return _replay_layers(target, steps)
    sites = {name: site for site in survey(references(target)) for name in (site.name, *site.aliases)}
    changes = [_change(step, sites) for step in steps]
    return apply_changes(target, changes)[0]


def _of_layers(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe is that of a kind which changes the layers around the norms."""
    return registry.planner(str(recipe.get("operation")).removeprefix("convert to ")) is not None


def _replay_layers(model: nn.Module, steps: Sequence[Mapping[str, Any]]) -> nn.Module:
    """Folds, other norms and layers, in this order; on an error all is put back."""
    folds = [step for step in steps if "layers" in step]
    layers = [step for step in steps if registry.planner(str(step["to"])) is not None]
    norms = [step for step in steps if step not in folds and step not in layers]
    known = described(references(model))
    changes = [replayed_change(step, known) for step in layers]
    result, undo = replay_folds(model, folds) if folds else (model, lambda: None)
    try:
        sites = {name: site for site in survey(references(result)) for name in (site.name, *site.aliases)}
        changes += [_change(step, sites) for step in norms]
        return apply_weights(result, changes)[0]
    except BaseException:
        undo()
        raise


def _steps(recipe: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if not isinstance(recipe, Mapping) or "steps" not in recipe or "format" not in recipe:
        raise NormswapError("this is no recipe: it has no 'format' and 'steps' (take plan.recipe)")
    if recipe["format"] != RECIPE_VERSION:
        raise NormswapError(
            f"recipe format {recipe['format']!r} is not {RECIPE_VERSION}: it was written by another version"
        )
    steps = recipe["steps"]
    if not isinstance(steps, (list, tuple)):
        raise NormswapError(f"the recipe's 'steps' must be a list, not {type(steps).__name__}")
    names = set()
    for index, step in enumerate(steps):
        both = isinstance(step, Mapping) and "layers" in step and _of_layers(recipe)
        folds = recipe.get("operation") == "fold" or both
        if not (_well_formed_fold(step) if folds else _well_formed(step)):
            fields = "layers (name, bias)" if folds else "options, init, ranks"
            raise NormswapError(
                f"step {index} of the recipe is malformed: it needs name, source (kind, channels), to, {fields}"
            )
        if step["name"] in names:
            raise NormswapError(f"step {index} of the recipe changes {step['name']!r} a second time")
        names.add(step["name"])
    return list(steps)


def _merges(recipe: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    merges = recipe.get("merges", [])
    if not isinstance(merges, (list, tuple)) or not all(_well_formed_merge(merge) for merge in merges):
        raise NormswapError("the recipe's 'merges' are malformed: each needs holder, host and absorbs (names)")
    return [{**merge, "absorbs": list(merge["absorbs"])} for merge in merges]


def _well_formed_merge(merge: Any) -> bool:
    if not isinstance(merge, Mapping) or merge.keys() != {"holder", "host", "absorbs"}:
        return False
    absorbs = merge["absorbs"]
    named = isinstance(absorbs, (list, tuple)) and all(isinstance(name, str) for name in absorbs)
    return named and isinstance(merge["holder"], str) and isinstance(merge["host"], str)


def _well_formed_fold(step: Any) -> bool:
    if not isinstance(step, Mapping) or not {"name", "source", "to", "layers"} <= step.keys():
        return False
    layers = step["layers"]
    if step["to"] == "bare" and not _well_formed_bare(step.get("bare")):
        return False
    return (
        step["to"] in ("identity", "affine", "bare")
        and isinstance(layers, list)
        and all(
            isinstance(layer, Mapping) and isinstance(layer.get("name"), str) and isinstance(layer.get("bias"), bool)
            for layer in layers
        )
    )


def _well_formed_bare(bare: Any) -> bool:
    return (
        isinstance(bare, Mapping)
        and bare.get("manner") in get_args(Manner)
        and isinstance(bare.get("axis"), int)
        and isinstance(bare.get("direct"), bool)
    )


def _well_formed(step: Any) -> bool:
    if not isinstance(step, Mapping) or not {"name", "source", "to", "options", "init"} <= step.keys():
        return False
    source, ranks = step["source"], step.get("ranks")
    return (
        isinstance(source, Mapping)
        and {"kind", "channels"} <= source.keys()
        and isinstance(step["name"], str)
        and isinstance(step["options"], Mapping)
        and step["init"] in INITS
        and (ranks is None or (isinstance(ranks, (list, tuple)) and all(isinstance(rank, int) for rank in ranks)))
    )


def _change(step: Mapping[str, Any], sites: Mapping[str, Site]) -> Change:
    name = step["name"]
    site = sites.get(name)
    if site is None or site.norm is None:
        raise NormswapError(
            f"the recipe changes {name!r}, but the model has no norm there; is it the same architecture?"
        )
    if (site.norm.kind, site.norm.channels) != (step["source"]["kind"], step["source"]["channels"]):
        raise NormswapError(
            f"{name} is {site.norm}, "
            f"but the recipe was made for {step['source']['kind']} of {step['source']['channels']} channels"
        )
    registry.check_options(step["to"], step["options"])
    ranks = step.get("ranks")
    norm = site.norm if ranks is None else replace(site.norm, ranks=frozenset(ranks))
    try:
        built = build(norm, step["to"], step["options"], step["init"])
    except Refusal as refusal:
        raise NormswapError(f"{name}: {refusal.reason}") from refusal
    target = describe(built, norm, step["to"])
    return Change(
        name=site.name,
        source=norm,
        target=target,
        exactness="retrain" if step["init"] == "reset" else exactness(norm, target),
        to=step["to"],
        aliases=site.aliases,
        functional=site.functional,
        options=dict(step["options"]),
        init=step["init"],
    )
