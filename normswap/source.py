"""A model with its checkpoint and the recipes that lead to it, as the commands read and write them.

A converted checkpoint no longer fits the model it came from. So the recipes of its changes travel with it, oldest
first: in the metadata of a ``.safetensors`` file (key ``normswap.recipe``), else in ``NAME.normswap.json`` beside it.
When such a checkpoint is read, they are replayed on a fresh model before its tensors are loaded.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from normswap import checkpoint, engine, registry
from normswap.checkpoints.keys import Fit, fit_names, names_in_file, renamed_for
from normswap.checkpoints.reading import Checkpoint
from normswap.checkpoints.safety import check_statistics
from normswap.checkpoints.surgery import Surgery, plan_keys
from normswap.checkpoints.transfer import Progress, silent
from normswap.delivery import Recipe, as_in_file, deliver, parameters_of, recipe_path
from normswap.errors import NormswapError
from normswap.provenance import RECIPE as KEY


@dataclass
class Source:
    """A model in eval mode, the recipes replayed on it, and what is worth saying about how it was read."""

    model: nn.Module
    path: Path | None = None
    recipes: list[Recipe] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    read: Checkpoint | None = None
    fit: Fit | None = None
    """From the names in the file to those in the model."""
    parameters: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes by name, before any change."""
    surgery: Surgery | None = None
    """Where the model's code is not there, and ``model`` is but a skeleton of its norms."""


def load_source(
    model: nn.Module,
    path: Path | None,
    *,
    key: str | None = None,
    partial: bool = False,
    replay: bool = True,
    trust_pickle: bool = False,
    sound: bool = True,
) -> Source:
    """``model`` with the tensors of the checkpoint at ``path``, after the recipes that came with it; in place.

    ``key`` names the state dict in a checkpoint that holds several; ``trust_pickle`` lets code in the file run; running
    statistics that no training could have left are refused unless ``sound`` is off.

    Raises :class:`NormswapError` for a file that cannot be read, and for a recipe or keys that do not fit the model.
    """
    model.eval()
    if path is None:
        return Source(model, notes=["no checkpoint given: the weights are those the model was built with"])
    read = checkpoint.read(path, key=key, trust_pickle=trust_pickle)
    if sound:
        check_statistics(read.tensors, read.tensors, str(path))
    source = Source(model, path, metadata=dict(read.metadata), read=read)
    source.recipes = own_recipes(read) if replay else []
    for recipe in source.recipes:
        source.model = engine.apply_recipe(source.model, fitted_recipe(recipe, source.model), inplace=True)
    if source.recipes:
        source.notes.append(f"{path}: replayed {_count(len(source.recipes), 'recipe')} on the model")
    try:
        source.notes += checkpoint.load(source.model, read, partial=partial)
    except NormswapError as error:
        if not source.recipes:
            raise
        raise NormswapError(f"{error}. Its recipe was replayed first; --no-recipe leaves that aside") from error
    source.fit = fit_names(read.tensors, source.model.state_dict(keep_vars=True))
    source.parameters = {name: tuple(value.shape) for name, value in source.model.named_parameters()}
    source.model.eval()
    return source


def load(model: nn.Module, path: str | os.PathLike[str], *, key: str | None = None) -> nn.Module:
    """A fresh ``model`` with a checkpoint in it, after the surgery whose recipe travels with the checkpoint; in place.

    Returns the model (another object only where its root is a norm that the recipe replaces), in the mode it was in.
    Loading is strict: every key must be there and fit. ``key`` names the state dict in a file that holds several.
    Where the tensors do not fit after the surgery, none is loaded and the surgery stays: build the model afresh.

    Raises :class:`NormswapError` for a file that cannot be read without running code, and for a recipe or keys that do
    not fit the model.
    """
    modes = {id(module): module.training for module in model.modules()}
    training = model.training
    try:
        result = load_source(model, Path(path), key=key).model
    except BaseException:
        result = model
        raise
    finally:
        for module in result.modules():
            module.training = modes.get(id(module), training)
    return result


def read_recipes(path: Path, metadata: dict[str, str]) -> list[Recipe]:
    """The recipes that belong to the checkpoint at ``path``, oldest first; none for a checkpoint of another origin."""
    text = metadata.get(KEY)
    where = f"metadata {KEY!r} of {path}"
    if text is None:
        beside = recipe_path(path)
        if path.suffix == ".safetensors" or not beside.exists():
            return []
        text, where = beside.read_text(encoding="utf-8"), str(beside)
    return _recipes(text, where, "; mend it, or pass --no-recipe to leave it aside")


def own_recipes(read: Checkpoint) -> list[Recipe]:
    """Those that were made for the state dict that was read, where the file nests several."""
    sources = [(recipe, recipe.get("source")) for recipe in read_recipes(read.path, read.metadata)]
    return [r for r, source in sources if not isinstance(source, dict) or source.get("key", read.key) == read.key]


def converted_norms(read: Checkpoint) -> dict[str, str]:
    """By name, the kinds that the recipes of a checkpoint made of its norms, without those folded away."""
    kinds: dict[str, str] = {}
    for step in (step for recipe in own_recipes(read) for step in recipe.get("steps", ())):
        kind = str(step.get("to"))
        if "layers" in step or kind == "identity":
            kinds.pop(str(step.get("name")), None)
        elif registry.planner(kind) is None:
            kinds[str(step.get("name"))] = kind
    return kinds


def recipes_in(path: Path) -> list[Recipe]:
    """The recipes in a JSON file (one, a list, or a plan with one) or in a converted checkpoint, oldest first.

    Raises :class:`NormswapError` for a file that cannot be read, and one without a recipe.
    """
    if path.suffix == ".json" and not path.name.endswith(".index.json"):
        check_size(path)
        found = _recipes(path.read_text(encoding="utf-8", errors="replace"), str(path), "")
    else:
        read = checkpoint.read(path)
        found = read_recipes(read.path, read.metadata)
    if not found:
        raise NormswapError(f"{path} has no recipe")
    return found


def check_size(path: Path, largest: int = 2**26) -> None:
    """Raise :class:`NormswapError` for a text that is not there, or too large to be what it should be."""
    if not path.is_file() or path.stat().st_size > largest:
        raise NormswapError(f"{path} {'is too large' if path.is_file() else 'does not exist or is not a file'}")


def _recipes(text: str, where: str, advice: str) -> list[Recipe]:
    try:
        recipes = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NormswapError(f"{where} is not JSON ({error}){advice}") from error
    if isinstance(recipes, dict):
        recipes = recipes.get("plan", recipes)
        recipes = [recipes.get("recipe", recipes)] if isinstance(recipes, dict) else recipes
    if not isinstance(recipes, list) or not all(isinstance(recipe, dict) for recipe in recipes):
        raise NormswapError(f"{where} is not a list of recipes{advice}")
    return recipes


def save_source(
    source: Source,
    model: nn.Module,
    recipe: Recipe,
    output: Path,
    *,
    force: bool = False,
    max_shard_size: int | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> list[Path]:
    """Write ``model`` and the recipes that lead to it; the paths written. Adds to ``source.notes``.

    The names and all else of the checkpoint stay as they were in it. All files appear or none.
    """
    options: dict[str, Any] = {
        "force": force, "max_shard_size": max_shard_size, "resume": resume, "progress": progress,
    }  # fmt: skip
    if source.surgery is not None:
        return _save_keys(source, source.surgery, recipe, output, options)
    state: Any = model.state_dict()
    before, after = dict(source.parameters), {name: tuple(value.shape) for name, value in model.named_parameters()}
    if source.read is not None:
        names = names_in_file(source.fit, state) if source.fit is not None else {name: name for name in state}
        renamed = OrderedDict((names[name], value) for name, value in state.items())
        old = getattr(state, "_metadata", {})
        homes = {name.rpartition(".")[0]: new.rpartition(".")[0] for name, new in names.items()}
        renamed._metadata = OrderedDict((homes.get(name, name), version) for name, version in old.items())  # type: ignore[attr-defined]
        state = renamed
    written, notes = deliver(
        output, state, [*source.recipes, recipe], source.read,
        before=before, after=after, **options,
    )  # fmt: skip
    source.notes += notes
    return written


def _save_keys(source: Source, surgery: Surgery, recipe: Recipe, output: Path, options: dict[str, Any]) -> list[Path]:
    read = surgery.checkpoint
    before, new = parameters_of(read.tensors), surgery.apply()
    fixed = [
        owner for owner, name in surgery.changed.items() if next(surgery.module(name).parameters(False), None) is None
    ]
    written, notes = deliver(
        output, as_in_file(read, new, surgery.versions), [*source.recipes, recipe], read,
        before=before, after=parameters_of(new, fixed), untouched=True, **options,
    )  # fmt: skip
    source.notes += notes
    return written


def load_keys(
    path: Path,
    to: str,
    *,
    key: str | None = None,
    trust_pickle: bool = False,
    replay: bool = True,
    **options: Any,
) -> Source:
    """The checkpoint at ``path`` with the plan of its conversion to the kind ``to``, by its keys alone.

    ``options`` are those of :func:`normswap.checkpoints.surgery.plan_keys`; raises :class:`NormswapError` as it does.
    """
    read = checkpoint.read(path, key=key, trust_pickle=trust_pickle)
    surgery = plan_keys(read, to, **options)
    recipes = own_recipes(read) if replay else []
    return Source(surgery.skeleton.model, path, recipes, dict(read.metadata), read=read, surgery=surgery)


def fitted_recipe(recipe: Recipe, model: nn.Module) -> Recipe:
    """The recipe of a conversion with its names as they are in ``model``, which may be in a wrapper or out of it."""
    steps = recipe.get("steps")
    if recipe.get("operation") == "fold" or not isinstance(steps, list):
        return recipe
    absorb = [layer for step in steps if isinstance(step, dict) for layer in step.get("layers") or ()]
    names = [item.get("name") if isinstance(item, dict) else None for item in (*steps, *absorb)]
    texts = [name for name in names if isinstance(name, str)]
    present = [name for name, _ in model.named_modules(remove_duplicate=False)]
    renamed = renamed_for(dict.fromkeys(texts), present) if len(texts) == len(names) and texts else None
    if renamed is None:
        return recipe
    return {**recipe, "steps": [_renamed(step, renamed) for step in steps]}


def _renamed(step: Recipe, names: dict[str, str]) -> Recipe:
    """A step for a model whose modules have other names, the layers that absorb a norm among them."""
    layers = [{**layer, "name": names[layer["name"]]} for layer in step.get("layers") or ()]
    return {**step, "name": names[step["name"]], **({"layers": layers} if layers else {})}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
