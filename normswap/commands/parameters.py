"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normswap import registry


def kind_name(name: str) -> str:
    registry.builder(name)
    return name


def kind_names(incomplete: str) -> list[str]:
    """The kinds for the completion of a shell."""
    return [kind for kind in registry.kinds() if kind.startswith(incomplete)]


def options_help() -> str:
    listed = [f"{kind}: {', '.join(registry.options(kind))}" for kind in registry.kinds() if registry.options(kind)]
    return f"An option of the kind, repeatable ({'; '.join(listed)})."


MODEL = "Model and checkpoint"
NORMS = "Which norms"
CHECKS = "Checks"
OUTPUT = "Output"
"""Headings of the options in --help."""

ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="WHERE:CALLABLE",
        rich_help_panel=MODEL,
        help="package.module:callable or file.py:callable.",
    ),
]
OptionalModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="WHERE:CALLABLE",
        rich_help_panel=MODEL,
        help="package.module:callable or file.py:callable; not for an .onnx or .pt2 file, which holds its graph, and "
        "not needed to convert a checkpoint by its keys.",
    ),
]
To = Annotated[
    str,
    typer.Option(
        "--to",
        metavar="KIND",
        callback=kind_name,
        autocompletion=kind_names,
        help=f"One of: {', '.join(registry.kinds())}.",
    ),
]
ModelArgs = Annotated[
    list[str] | None,
    typer.Option("--model-arg", metavar="K=V", rich_help_panel=MODEL, help="An argument of the callable, repeatable."),
]
CheckpointFile = Annotated[
    Path | None,
    typer.Argument(help="A checkpoint, or a folder with one; without it, the model's own weights."),
]
GraphFile = Annotated[
    Path | None,
    typer.Argument(help="A checkpoint, a folder with one, an .onnx or .pt2 file; without it, the model's own weights."),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--key", rich_help_panel=MODEL, help="Which state dict of the checkpoint, where it holds several, such as ema."
    ),
]
Partial = Annotated[
    bool, typer.Option("--partial", rich_help_panel=MODEL, help="Load what fits when keys are missing or left over.")
]
Replay = Annotated[
    bool,
    typer.Option("--recipe/--no-recipe", rich_help_panel=MODEL, help="Replay the recipe that came with a checkpoint."),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        "-i",
        metavar="SHAPE",
        rich_help_panel=CHECKS,
        help="An example input, 1x3x224x224 or 1x16:int64, repeatable.",
    ),
]
Where = Annotated[
    list[str] | None,
    typer.Option("--where", metavar="GLOB", rich_help_panel=NORMS, help="Only norms so named, repeatable."),
]
Skip = Annotated[
    list[str] | None,
    typer.Option("--skip", metavar="GLOB", rich_help_panel=NORMS, help="Not norms so named, repeatable."),
]
From = Annotated[
    list[str] | None,
    typer.Option(
        "--from",
        metavar="KIND",
        autocompletion=kind_names,
        rich_help_panel=NORMS,
        help="Only norms of this kind, repeatable.",
    ),
]
ImageSize = Annotated[
    str | None, typer.Option("--image-size", metavar="H[xW]", help="Crop of the images of a --data folder [224].")
]
ImageResize = Annotated[
    int | None, typer.Option("--image-resize", help="Their shorter side before it; else the size divided by 0.875.")
]
ImageMean = Annotated[
    str | None, typer.Option("--image-mean", metavar="R,G,B", help="Subtracted from values in [0, 1] [ImageNet's].")
]
ImageStd = Annotated[str | None, typer.Option("--image-std", metavar="R,G,B", help="Divided by [ImageNet's].")]
DryRun = Annotated[bool, typer.Option("--dry-run", rich_help_panel=OUTPUT, help="Print the plan and stop.")]
AsJson = Annotated[bool, typer.Option("--json", rich_help_panel=OUTPUT, help="Print JSON instead of a table.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", rich_help_panel=OUTPUT, help="The file to write; for a checkpoint also a folder/."),
]
ShardSize = Annotated[
    str | None,
    typer.Option(
        "--max-shard-size", metavar="SIZE", rich_help_panel=OUTPUT, help="Of an output folder's files, such as 5GB."
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Of an output folder: keep shards that an interrupted run completed, of this one too."
    ),
]
TrustPickle = Annotated[
    bool,
    typer.Option(
        "--trust-pickle", rich_help_panel=MODEL, help="Let the checkpoint run code, if you trust who wrote it."
    ),
]
Verify = Annotated[
    bool | None,
    typer.Option(
        "--verify/--no-verify",
        rich_help_panel=CHECKS,
        help="Compare with the original first; on when --input is given and all changes are exact.",
    ),
]
ReportFile = Annotated[
    Path | None,
    typer.Option(
        "--report", metavar="FILE", rich_help_panel=CHECKS, help="Write a report too, as .html or, to paste, .md."
    ),
]
Force = Annotated[bool, typer.Option("--force", rich_help_panel=OUTPUT, help="Replace the output if it exists.")]
