"""``normswap apply``: a recipe on a fresh model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normswap import engine
from normswap.checkpoints.writing import parse_size
from normswap.commands.parameters import (
    CheckpointFile,
    Force,
    Key,
    ModelArgs,
    ModelName,
    Output,
    Partial,
    Replay,
    ShardSize,
    TrustPickle,
)
from normswap.commands.shared import check_outputs, load
from normswap.console import say, working, writing
from normswap.source import fitted_recipe, recipes_in, save_source


def apply(
    recipe: Annotated[Path, typer.Argument(help="A recipe (JSON), or a converted checkpoint that has one.")],
    model: ModelName,
    checkpoint: CheckpointFile = None,
    model_arg: ModelArgs = None,
    key: Key = None,
    partial: Partial = False,
    replay: Replay = True,
    output: Output = None,
    max_shard_size: ShardSize = None,
    trust_pickle: TrustPickle = False,
    force: Force = False,
) -> None:
    """Make the changes of a recipe on a fresh model and its checkpoint, and write the result."""
    check_outputs(output, checkpoint, False, force, None)
    assert output is not None
    size = None if max_shard_size is None else parse_size(max_shard_size)
    recipes = recipes_in(recipe)
    source = load(model, model_arg, checkpoint, key=key, partial=partial, replay=replay, trust_pickle=trust_pickle)
    with working("applying"):
        changed = source.model
        for each in recipes:
            changed = engine.apply_recipe(changed, fitted_recipe(each, changed), inplace=True)
    source.recipes += recipes[:-1]
    said = len(source.notes)
    with writing(f"writing {output}") as progress:
        written = save_source(source, changed, recipes[-1], output, force=force, max_shard_size=size, progress=progress)
    for note in [*source.notes[said:], *(f"wrote {path}" for path in written)]:
        say(note)
