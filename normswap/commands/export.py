"""``normswap export``: as a program."""

from __future__ import annotations

from typing import Annotated

import typer

from normswap import engine
from normswap.arguments import parse_dynamic, parse_texts
from normswap.commands.parameters import (
    CheckpointFile,
    Force,
    Inputs,
    Key,
    ModelArgs,
    ModelName,
    Output,
    Partial,
    Replay,
    TrustPickle,
)
from normswap.commands.shared import load, required
from normswap.console import say, working
from normswap.errors import NormswapError
from normswap.files import check_output
from normswap.onnx.export import SUFFIXES as EXPORTS
from normswap.onnx.export import export as export_model


def export(
    model: ModelName,
    checkpoint: CheckpointFile = None,
    output: Output = None,
    inputs: Inputs = None,
    model_arg: ModelArgs = None,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="Leave the first axis open.")] = False,
    dynamic: Annotated[
        list[str] | None,
        typer.Option(
            "--dynamic",
            metavar="ARG:AXIS=NAME,...",
            help="Leave axes of an argument of forward open, x:0=batch,2=height,3=width; repeatable.",
        ),
    ] = None,
    fold: Annotated[bool, typer.Option("--fold", help="Fold norms into the neighbouring layers first.")] = False,
    opset: Annotated[int | None, typer.Option("--opset", help="ONNX opset version.")] = None,
    optimize: Annotated[bool, typer.Option("--optimize/--no-optimize", help="Let the ONNX exporter simplify.")] = True,
    external_data: Annotated[
        bool, typer.Option("--external-data", help="Weights in FILE.onnx.data beside it, as always above 2 GiB.")
    ] = False,
    metadata: Annotated[
        list[str] | None, typer.Option("--metadata", metavar="K=V", help="Text to keep in the file, repeatable.")
    ] = None,
    key: Key = None,
    partial: Partial = False,
    replay: Replay = True,
    trust_pickle: TrustPickle = False,
    force: Force = False,
) -> None:
    """Write a model as ONNX (.onnx), or as a program of torch.export (.pt2)."""
    if output is None or output.suffix not in EXPORTS:
        raise NormswapError("where to? Pass -o FILE.onnx or -o FILE.pt2")
    if dynamic_batch and dynamic:
        raise NormswapError("--dynamic-batch and --dynamic are given both; name the batch as well: --dynamic x:0=batch")
    axes = parse_dynamic(dynamic or ()) or dynamic_batch or None
    notes = parse_texts(metadata or (), "--metadata")
    check_output(output, force=force, inputs=() if checkpoint is None else (checkpoint,))
    source = load(model, model_arg, checkpoint, key=key, partial=partial, replay=replay, trust_pickle=trust_pickle)
    example = required(inputs, source, "export")
    exported, recipes = source.model, list(source.recipes)
    if fold:
        with working("folding"):
            plan = engine.plan_fold(exported, example_inputs=example)
            exported = plan.apply(inplace=True)
        if plan.changes:
            recipes.append(plan.recipe)
    with working(f"exporting to {output}"):
        export_model(
            exported,
            output,
            example,
            opset=opset,
            optimize=optimize,
            dynamic=axes,
            external_data=external_data,
            recipe=recipes,
            metadata=notes,
            force=force,
        )
    say(f"wrote {output}")
