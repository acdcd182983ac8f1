"""``normswap convert``: into another kind."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial as partial_of
from typing import Annotated, Any, Literal

import typer

from normswap import registry, surgery
from normswap.arguments import parse_inputs, parse_pairs, parse_value
from normswap.calibration import calibrate, check_batches
from normswap.checkpoints.writing import parse_size
from normswap.commands.parameters import (
    AsJson,
    DryRun,
    Force,
    From,
    GraphFile,
    ImageMean,
    ImageResize,
    ImageSize,
    ImageStd,
    Inputs,
    Key,
    ModelArgs,
    OptionalModel,
    Output,
    Partial,
    Replay,
    ReportFile,
    Resume,
    ShardSize,
    Skip,
    To,
    TrustPickle,
    Verify,
    Where,
    options_help,
)
from normswap.commands.shared import (
    check_outputs,
    is_graph,
    load,
    need_model,
    refuse_with_graph,
    required,
    selectors,
    surgery_of,
)
from normswap.console import say, working
from normswap.data import Counted, check_takes, load_batches, parse_preparation
from normswap.errors import NormswapError
from normswap.images import ImageFolder
from normswap.outcome import Check, carry_out, carry_out_file, check_kinds
from normswap.source import load_keys


def convert(
    to: To,
    model: OptionalModel = None,
    checkpoint: GraphFile = None,
    model_arg: ModelArgs = None,
    groups: Annotated[
        str | None, typer.Option("--groups", metavar="N", help="Number of groups (group); auto: chosen on --data.")
    ] = None,
    channels_per_group: Annotated[
        int | None, typer.Option("--channels-per-group", help="Size of a group (group).")
    ] = None,
    option: Annotated[list[str] | None, typer.Option("--option", metavar="K=V", help=options_help())] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Calibrate on these inputs: .npy, .npz, .pt, a folder of images, or package.module:callable.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Samples in a batch of a --data file.")] = 64,
    image_size: ImageSize = None,
    image_resize: ImageResize = None,
    image_mean: ImageMean = None,
    image_std: ImageStd = None,
    refine: Annotated[int, typer.Option("--refine", help="Steps of distillation after the calibration.")] = 0,
    refine_layers: Annotated[
        bool, typer.Option("--refine-layers", help="Distil the weights of linear layers and 1 x 1 convolutions too.")
    ] = False,
    init: Annotated[
        Literal["copy", "preserve", "reset"],
        typer.Option("--init", help="Carry affine and statistics over, keep the function, or start afresh."),
    ] = "copy",
    kind: From = None,
    where: Where = None,
    skip: Skip = None,
    inputs: Inputs = None,
    verify: Verify = None,
    key: Key = None,
    partial: Partial = False,
    replay: Replay = True,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    output: Output = None,
    max_shard_size: ShardSize = None,
    resume: Resume = False,
    trust_pickle: TrustPickle = False,
    report_to: ReportFile = None,
    force: Force = False,
) -> None:
    """Turn the normalizations of a model, checkpoint, .onnx or .pt2 file into another kind, and write the result.

    Without --model the norms of a checkpoint are found by its keys and shapes.
    """
    options: dict[str, Any] = parse_pairs(option or (), "--option")
    count = None if groups is None else parse_value(groups)
    for name, value in (("groups", count), ("channels_per_group", channels_per_group)):
        if value is not None:
            if name in options:
                raise NormswapError(f"{name} is given twice: by --{name.replace('_', '-')} and by --option")
            options[name] = value
    registry.check_options(to, options)
    if refine and data is None:
        raise NormswapError("--refine needs inputs: pass --data FILE")
    if refine_layers and not refine:
        raise NormswapError("--refine-layers is for a distillation: pass --refine STEPS")
    preparation = parse_preparation(image_size, image_resize, image_mean, image_std)
    if preparation is not None and data is None:
        raise NormswapError("--image-size and the like are for the images of --data: pass --data FOLDER")
    if is_graph(checkpoint):
        refuse_with_graph(checkpoint, **{
            "--model": model, "--model-arg": model_arg, "--input": inputs, "--key": key, "--partial": partial,
            "--init": init != "copy", "--verify": verify, "--data": data,
        })  # fmt: skip
        chosen = selectors(where, skip, kind)
        carry_out_file(
            lambda: surgery_of(checkpoint).plan_convert(checkpoint, to, **chosen, **options), checkpoint, output, kind,
            Check(False, None, report_to), [], dry_run=dry_run, as_json=as_json, force=force,
        )  # fmt: skip
        return
    check_outputs(output, checkpoint, dry_run, force, report_to)
    size = None if max_shard_size is None else parse_size(max_shard_size)
    if resume and (model is not None or checkpoint is None):
        raise NormswapError("--resume is for a checkpoint converted by its keys; with --model all is computed anew")
    if model is None and checkpoint is not None:
        given = {"--model-arg": model_arg, "--input": inputs, "--verify": verify, "--partial": partial, "--data": data}
        need_model(**given)
        chosen = selectors(where, skip, kind)
        with working("planning"):
            source = load_keys(
                checkpoint, to, key=key, trust_pickle=trust_pickle, replay=replay, init=init, **chosen, **options
            )
        assert source.surgery is not None
        plan, check = source.surgery.plan, Check(False, None, report_to)
        check_kinds(plan, kind)
        carry_out(
            plan, source, output, check,
            dry_run=dry_run, as_json=as_json, force=force, shard_size=size, resume=resume,
        )  # fmt: skip
        return
    source = load(model, model_arg, checkpoint, key=key, partial=partial, replay=replay, trust_pickle=trust_pickle)
    example = required(inputs, source, "--verify") if verify else parse_inputs(inputs or (), source.model)
    batches = None if data is None else load_batches(data, batch_size, preparation)
    if isinstance(batches, ImageFolder):
        say(f"calibrating on {batches}")
    counted = None
    if data is not None and batches is not None:
        again = "--groups auto" if options.get("groups") == "auto" else "--refine" if refine else None
        check_batches(batches, again and f"{again} goes over them again")
        counted = Counted(check_takes(source.model, batches, data), data)
    measured = counted if options.get("groups") == "auto" else None
    with working("planning"), nullcontext() if measured is None else measured.one_by_one():
        plan = surgery.plan_convert(
            source.model,
            to,
            example_inputs=example,
            init=init,
            calibration=measured,
            **selectors(where, skip, kind),
            **options,
        )
    check_kinds(plan, kind)
    distilling = partial_of(calibrate, refine=refine, refine_layers=refine_layers)
    fitted = None if counted is None else partial_of(distilling, batches=counted, forward=counted.run)
    check = Check(verify, example, report_to)
    carry_out(plan, source, output, check, fitted, dry_run=dry_run, as_json=as_json, force=force, shard_size=size)
