"""``normswap fold``: into the neighbouring layers."""

from __future__ import annotations

from typing import Annotated

import typer

from normswap import engine
from normswap.arguments import parse_inputs
from normswap.commands.parameters import (
    AsJson,
    DryRun,
    Force,
    From,
    GraphFile,
    Inputs,
    Key,
    ModelArgs,
    OptionalModel,
    Output,
    Partial,
    Replay,
    ReportFile,
    Skip,
    TrustPickle,
    Verify,
    Where,
)
from normswap.commands.shared import check_outputs, is_graph, load, refuse_with_graph, required, selectors, surgery_of
from normswap.console import working
from normswap.outcome import Check, carry_out, carry_out_file, check_kinds


def fold(
    model: OptionalModel = None,
    checkpoint: GraphFile = None,
    model_arg: ModelArgs = None,
    where: Where = None,
    skip: Skip = None,
    kind: From = None,
    inputs: Inputs = None,
    verify: Verify = None,
    keep_batchnorm: Annotated[
        bool, typer.Option("--keep-batchnorm", help="Leave what no layer absorbs, instead of a multiply-add.")
    ] = False,
    unshare: Annotated[
        bool, typer.Option("--unshare", help="Copy layers that several places share, one for each norm they meet.")
    ] = False,
    merge_branches: Annotated[
        bool, typer.Option("--merge-branches", help="Merge parallel convolutions that are added up into one.")
    ] = False,
    affine: Annotated[
        bool,
        typer.Option(
            "--affine", help="Fold weight and bias of layer, RMS, group and instance norms into their readers."
        ),
    ] = False,
    key: Key = None,
    partial: Partial = False,
    replay: Replay = True,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    output: Output = None,
    trust_pickle: TrustPickle = False,
    report_to: ReportFile = None,
    force: Force = False,
) -> None:
    """Fold norms with fixed statistics into the neighbouring layers, and write the checkpoint, .onnx or .pt2 file."""
    if is_graph(checkpoint):
        program = checkpoint.suffix == ".pt2"
        refuse_with_graph(checkpoint, **{
            "--model": model, "--model-arg": model_arg, "--key": key, "--partial": partial,
            "--merge-branches": merge_branches, "--affine": affine, "--unshare": program and unshare,
        })  # fmt: skip
        chosen = selectors(where, skip, kind) | ({} if program else {"unshare": unshare})
        wanted = verify if program or verify is not None else bool(inputs)
        carry_out_file(
            lambda: surgery_of(checkpoint).plan_fold(checkpoint, **chosen), checkpoint, output, kind,
            Check(wanted, None, report_to), inputs or [], dry_run=dry_run, as_json=as_json, force=force,
        )  # fmt: skip
        return
    check_outputs(output, checkpoint, dry_run, force, report_to)
    source = load(model, model_arg, checkpoint, key=key, partial=partial, replay=replay, trust_pickle=trust_pickle)
    example = required(inputs, source, "--verify") if verify else parse_inputs(inputs or (), source.model)
    with working("planning"):
        plan = engine.plan_fold(
            source.model,
            example_inputs=example,
            keep_batchnorm=keep_batchnorm,
            unshare=unshare,
            affine=affine,
            merge_branches=merge_branches,
            **selectors(where, skip, kind),
        )
    check_kinds(plan, kind)
    check = Check(verify, example, report_to)
    carry_out(plan, source, output, check, dry_run=dry_run, as_json=as_json, force=force)
