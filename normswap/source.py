"""A model with its checkpoint and the recipes that lead to it, as the commands read and write them.

A converted checkpoint no longer fits the model it came from. So the recipes of its changes travel with it, oldest
first: in the metadata of a ``.safetensors`` file (key ``normswap.recipe``), else in ``NAME.normswap.json`` beside it.
When such a checkpoint is read, they are replayed on a fresh model before its tensors are loaded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from normswap import checkpoint, engine
from normswap.errors import NormswapError
from normswap.files import check_output, whole_file

KEY = "normswap.recipe"
SUFFIXES = (".pt", ".pth", ".safetensors")
Recipe = dict[str, Any]


@dataclass
class Source:
    """A model in eval mode, the recipes replayed on it, and what is worth saying about how it was read."""

    model: nn.Module
    path: Path | None = None
    recipes: list[Recipe] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def load_source(
    model: nn.Module, path: Path | None, *, key: str | None = None, partial: bool = False, replay: bool = True
) -> Source:
    """``model`` with the tensors of the checkpoint at ``path``, after the recipes that came with it; in place.

    ``key`` names the state dict in a checkpoint that holds several.

    Raises :class:`NormswapError` for a file that cannot be read, and for a recipe or keys that do not fit the model.
    """
    model.eval()
    if path is None:
        return Source(model, notes=["no checkpoint given: the weights are those the model was built with"])
    read = checkpoint.read(path, key=key)
    source = Source(model, path, metadata=dict(read.metadata))
    source.recipes = read_recipes(path, source.metadata) if replay else []
    for recipe in source.recipes:
        source.model = engine.apply_recipe(source.model, recipe, inplace=True)
    if source.recipes:
        source.notes.append(f"{path}: replayed {_count(len(source.recipes), 'recipe')} on the model")
    try:
        source.notes += checkpoint.load(source.model, read, partial=partial)
    except NormswapError as error:
        if not source.recipes:
            raise
        raise NormswapError(f"{error}. Its recipe was replayed first; --no-recipe leaves that aside") from error
    source.model.eval()
    return source


def recipe_path(path: Path) -> Path:
    return path.with_name(path.name + ".normswap.json")


def read_recipes(path: Path, metadata: dict[str, str]) -> list[Recipe]:
    """The recipes that belong to the checkpoint at ``path``, oldest first; none for a checkpoint of another origin."""
    text = metadata.get(KEY)
    where = f"metadata {KEY!r} of {path}"
    if text is None:
        beside = recipe_path(path)
        if path.suffix == ".safetensors" or not beside.exists():
            return []
        text, where = beside.read_text(encoding="utf-8"), str(beside)
    try:
        recipes = json.loads(text)
    except json.JSONDecodeError as error:
        raise NormswapError(f"{where} is not JSON ({error}); mend it, or pass --no-recipe to leave it aside") from error
    if not isinstance(recipes, list) or not all(isinstance(recipe, dict) for recipe in recipes):
        raise NormswapError(f"{where} is not a list of recipes; mend it, or pass --no-recipe to leave it aside")
    return recipes


def check_destination(path: Path, *, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Raise :class:`NormswapError` now for an output that could not be written after long work."""
    if path.suffix not in SUFFIXES:
        raise NormswapError(f"output {path}: the name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    check_output(path, force=force, inputs=inputs)
    if path.suffix != ".safetensors":
        check_output(recipe_path(path), force=force)


def save_source(source: Source, model: nn.Module, recipe: Recipe, output: Path, *, force: bool = False) -> list[Path]:
    """Write ``model`` and the recipes that lead to it; the paths written.

    Both files appear or neither: after a failure or an interrupt the recipe beside ``output`` is as it was.
    """
    inputs = () if source.path is None else (source.path,)
    recipes = json.dumps([*source.recipes, recipe], indent=1)
    if output.suffix == ".safetensors":
        metadata = {**source.metadata, KEY: recipes}
        checkpoint.write(output, model, force=force, metadata=metadata, inputs=inputs)
        return [output]
    beside = recipe_path(output)
    before = beside.read_bytes() if beside.exists() else None
    with whole_file(beside, force=force) as file:
        file.write_text(recipes, encoding="utf-8")
    try:
        checkpoint.write(output, model, force=force, inputs=inputs)
    except BaseException:
        beside.unlink()
        if before is not None:
            with whole_file(beside) as file:
                file.write_bytes(before)
        raise
    return [output, beside]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
