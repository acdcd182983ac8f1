"""``normswap verify``: whether two programs compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from torch import nn

from normswap import report
from normswap.commands.parameters import AsJson, Inputs, Key, ModelArgs, Partial, Replay, ReportFile, TrustPickle
from normswap.commands.shared import load
from normswap.console import CHECK_FAILED, show, working
from normswap.errors import NormswapError
from normswap.outcome import Check, compared_with
from normswap.reporting import check_report
from normswap.verification.runners import opened
from normswap.verifying import PROGRAMS, example_of, parse_tolerance

Backend = Literal["onnxruntime", "eager"]


def verify(
    reference: Annotated[Path, typer.Argument(help="What is right: a checkpoint, or an .onnx or .pt2 file.")],
    candidate: Annotated[Path, typer.Argument(help="What to compare with it: the same kinds of file.")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="WHERE:CALLABLE", help="The model of the checkpoints, if there are any."),
    ] = None,
    inputs: Inputs = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Inputs to compare on, .npy, .npz or .pt; with it --input can be left out."),
    ] = None,
    model_arg: ModelArgs = None,
    backend: Annotated[
        Backend | None,
        typer.Option("--backend", help="What runs the candidate; for an .onnx file onnxruntime, else eager."),
    ] = None,
    atol: Annotated[
        list[str] | None,
        typer.Option("--atol", metavar="NUMBER", help="Instead of the noise floor; OUTPUT=NUMBER for one, repeatable."),
    ] = None,
    rtol: Annotated[
        list[str] | None, typer.Option("--rtol", metavar="NUMBER", help="Likewise, times the reference's value.")
    ] = None,
    candidate_model: Annotated[
        str | None,
        typer.Option("--candidate-model", metavar="WHERE:CALLABLE", help="If it has another model."),
    ] = None,
    key: Key = None,
    partial: Partial = False,
    replay: Replay = True,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
    report_to: ReportFile = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the report if it exists.")] = False,
) -> None:
    """Compare two checkpoints, .onnx or .pt2 files; ONNX Runtime runs the .onnx ones."""
    tolerances: dict[str, Any] = {"atol": parse_tolerance(atol, "--atol"), "rtol": parse_tolerance(rtol, "--rtol")}
    if report_to is not None:
        check_report(report_to, force=force)

    def program(path: Path, model: str | None, key: str | None = None) -> nn.Module | Path:
        if path.suffix in PROGRAMS:
            with working(f"reading {path}"):
                return opened(path)
        if model is None:
            raise NormswapError(f"{path} is a checkpoint: pass --model WHERE:CALLABLE, the model that it belongs to")
        options: dict[str, Any] = {"key": key, "partial": partial, "replay": replay, "trust_pickle": trust_pickle}
        return load(model, model_arg, path, **options).model

    sides = program(reference, model, key), program(candidate, candidate_model or model)
    runtime = backend or ("onnxruntime" if candidate.suffix == ".onnx" else "eager")
    example = example_of(inputs, data, *sides)
    check = Check(True, example, report_to)
    options = {"data": () if data is None else data, "layers": check.layers, **tolerances}
    verification = compared_with(*sides, example, backend=runtime, **options)
    show(report.verification_report(verification), verification.to_dict(), as_json)
    check.report(verification, f"{candidate.name} compared with {reference.name}", force, None)
    if not verification:
        raise typer.Exit(CHECK_FAILED)
