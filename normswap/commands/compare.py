"""``normswap compare``: what each kind costs on the user's model and input."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from normswap.advice import compare as measure
from normswap.advice.compare import COLUMNS
from normswap.arguments import parse_pairs
from normswap.commands.parameters import AsJson, CheckpointFile, Inputs, Key, ModelArgs, ModelName, Partial, Replay
from normswap.commands.shared import load, required
from normswap.console import show, working
from normswap.errors import NormswapError
from normswap.report import Report, Section


def compare(
    model: ModelName,
    checkpoint: CheckpointFile = None,
    model_arg: ModelArgs = None,
    inputs: Inputs = None,
    to: Annotated[
        list[str] | None, typer.Option("--to", metavar="KIND", help="Only these kinds, repeatable; else the usual.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="KIND.K=V", help="An option of a kind, repeatable.")
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", help="Runs of each.")] = 9,
    backward: Annotated[bool, typer.Option("--backward/--no-backward", help="Measure the backward pass too.")] = True,
    key: Key = None,
    partial: Partial = False,
    replay: Replay = True,
    as_json: AsJson = False,
) -> None:
    """Measure time, memory and parameters of the model with each kind of norm, on an example input."""
    options = _options(option)
    source = load(model, model_arg, checkpoint, key=key, partial=partial, replay=replay)
    example = required(inputs, source, "compare")
    with working("measuring"):
        found = measure(source.model, example, to, repeats=repeats, backward=backward, options=options)
    section = Section("Kinds", COLUMNS, tuple(found.cells()))
    show(Report((section,), (found.conditions,), text=str(found)), found.to_dict(), as_json)


def _options(texts: list[str] | None) -> dict[str, dict[str, Any]]:
    """``["group.groups=8"]`` as options by kind. Raises :class:`NormswapError` for another form."""
    found: dict[str, list[str]] = {}
    for text in texts or ():
        kind, dot, pair = text.partition(".")
        if not dot or "=" in kind:
            raise NormswapError(f"--option {text!r}: write KIND.NAME=VALUE, such as group.groups=8")
        found.setdefault(kind, []).append(pair)
    return {kind: parse_pairs(pairs, f"--option {kind}.") for kind, pairs in found.items()}
