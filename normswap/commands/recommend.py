"""``normswap recommend``: which norm, and why."""

from __future__ import annotations

from typing import Annotated

import typer

from normswap.advice import Recommendation, Situation
from normswap.advice import recommend as advise
from normswap.advice.situation import Batches, Deployment, Task
from normswap.arguments import parse_inputs
from normswap.commands.parameters import AsJson, CheckpointFile, Inputs, Key, ModelArgs, ModelName, Partial, Replay
from normswap.commands.shared import load
from normswap.console import show, working
from normswap.report import Report, Section


def recommend(
    model: ModelName,
    checkpoint: CheckpointFile = None,
    model_arg: ModelArgs = None,
    inputs: Inputs = None,
    task: Annotated[Task | None, typer.Option("--task", help="What the model is for.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Samples on each device in training.")] = None,
    devices: Annotated[int, typer.Option("--devices", help="Devices that it is trained on.")] = 1,
    batches: Annotated[
        Batches, typer.Option("--batches", help="Whether they are alike; online: in no random order.")
    ] = "fixed",
    deployment: Annotated[Deployment | None, typer.Option("--deployment", help="Where it runs in the end.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Trained with differential privacy.")] = False,
    federated: Annotated[bool, typer.Option("--federated", help="Trained on clients that keep their data.")] = False,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Its trained weights shall be kept.")] = False,
    key: Key = None,
    partial: Partial = False,
    replay: Replay = True,
    as_json: AsJson = False,
) -> None:
    """Say which kind of norm suits the model and what is done with it: every rule that holds, with its source."""
    situation = Situation(task, batch_size, devices, batches, deployment, private, federated, pretrained)
    source = load(model, model_arg, checkpoint, key=key, partial=partial, replay=replay)
    example = parse_inputs(inputs or (), source.model)
    with working("looking at the model"):
        found = advise(source.model, situation, example_inputs=example)
    command = found.command(model, None if checkpoint is None else str(checkpoint), _options(model_arg, inputs))
    show(_report(found, command), {**found.to_dict(), "command": command}, as_json)


def _options(model_arg: list[str] | None, inputs: list[str] | None) -> list[str]:
    pairs = [("--model-arg", text) for text in model_arg or ()] + [("--input", text) for text in inputs or ()]
    return [word for pair in pairs for word in pair]


def _report(found: Recommendation, command: str | None) -> Report:
    rules = tuple(
        (r.name, r.condition, ", else ".join(r.take), ", ".join(r.avoid), r.strength, r.reason, r.source)
        for r in found.rules
    )
    candidates = tuple(
        (c.kind, str(c.score), str(c.norms), ", ".join(c.rules), c.obstacle or "") for c in found.candidates
    )
    lines = [f"conflict: {conflict}" for conflict in found.conflicts]
    return Report(
        (
            Section("Rules that hold", ("rule", "because", "take", "avoid", "it", "reason", "source"), rules),
            Section("Kinds", ("kind", "score", "norms", "for it", "against it"), candidates),
        ),
        (*lines, found.verdict, *([] if command is None else [f"run: {command}"])),
        text=found.text(command),
    )
