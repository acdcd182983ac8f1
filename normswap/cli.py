"""The command line: ``normswap inspect``, ``convert``, ``fold``, ``apply``, ``diff``, ``verify``,
``export``.

Results go to standard output, everything else to standard error. Exit status: 0 done, 1 a check failed, 2 bad input,
130 interrupted. Choices come from the registry, so a kind that a package registers is offered like any other.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import partial as partial_of
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeGuard

import typer
from torch import Tensor, nn
from typer.core import TyperGroup

from normswap import __version__, engine, registry, report, surgery
from normswap.arguments import build_model, parse_dynamic, parse_inputs, parse_pairs, parse_texts, parse_value
from normswap.calibration import calibrate
from normswap.checkpoint import read
from normswap.checkpoints.difference import differences
from normswap.checkpoints.writing import parse_size
from normswap.console import BAD_INPUT, CHECK_FAILED, INTERRUPTED, say, show, working
from normswap.data import load_batches
from normswap.delivery import check_destination
from normswap.errors import NormswapError
from normswap.files import check_output
from normswap.onnx import surgery as onnx_files
from normswap.onnx.export import SUFFIXES as EXPORTS
from normswap.onnx.export import export as export_model
from normswap.outcome import Check, carry_out, carry_out_file, check_kinds, compared_with
from normswap.reporting import check_report
from normswap.source import Source, fitted_recipe, load_keys, load_source, recipes_in, save_source
from normswap.spec import Norm
from normswap.verification.runners import opened
from normswap.verifying import PROGRAMS, example_of, parse_tolerance

if TYPE_CHECKING:
    pass

Backend = Literal["onnxruntime", "eager"]


class Commands(TyperGroup):
    """Turns the library's exceptions into one message and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except NormswapError as error:
            _fail(str(error))
        except BrokenPipeError:
            raise
        except OSError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Find, replace, fold and verify the normalization layers of a PyTorch model.",
)


def main() -> None:
    app(prog_name="normswap")


def _fail(message: str) -> NoReturn:
    say(f"normswap: {message}")
    raise typer.Exit(BAD_INPUT) from None


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"normswap {__version__}")
        raise typer.Exit


def _kind(name: str) -> str:
    registry.builder(name)
    return name


def _options_help() -> str:
    listed = [f"{kind}: {', '.join(registry.options(kind))}" for kind in registry.kinds() if registry.options(kind)]
    return f"An option of the kind, repeatable ({'; '.join(listed)})."


@app.callback()
def normswap_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


ModelName = Annotated[
    str,
    typer.Option("--model", "-m", metavar="WHERE:CALLABLE", help="package.module:callable or file.py:callable."),
]
OptionalModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="WHERE:CALLABLE",
        help="package.module:callable or file.py:callable; not for an .onnx file, which holds its graph, and not "
        "needed to convert a checkpoint by its keys.",
    ),
]
To = Annotated[
    str, typer.Option("--to", metavar="KIND", callback=_kind, help=f"One of: {', '.join(registry.kinds())}.")
]
ModelArgs = Annotated[
    list[str] | None, typer.Option("--model-arg", metavar="K=V", help="An argument of the callable, repeatable.")
]
CheckpointFile = Annotated[
    Path | None,
    typer.Argument(help="A checkpoint, or a folder with one; without it, the model's own weights."),
]
GraphFile = Annotated[
    Path | None,
    typer.Argument(help="A checkpoint, a folder with one, or an .onnx file; without it, the model's own weights."),
]
Key = Annotated[
    str | None, typer.Option("--key", help="Which state dict of the checkpoint, where it holds several, such as ema.")
]
Partial = Annotated[bool, typer.Option("--partial", help="Load what fits when keys are missing or left over.")]
Replay = Annotated[bool, typer.Option("--recipe/--no-recipe", help="Replay the recipe that came with a checkpoint.")]
Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", "-i", metavar="SHAPE", help="An example input, 1x3x224x224 or 1x16:int64, repeatable."),
]
Where = Annotated[list[str] | None, typer.Option("--where", metavar="GLOB", help="Only norms so named, repeatable.")]
Skip = Annotated[list[str] | None, typer.Option("--skip", metavar="GLOB", help="Not norms so named, repeatable.")]
From = Annotated[list[str] | None, typer.Option("--from", metavar="KIND", help="Only norms of this kind, repeatable.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="The file to write; for a checkpoint also a folder/.")
]
ShardSize = Annotated[
    str | None, typer.Option("--max-shard-size", metavar="SIZE", help="Of an output folder's files, such as 5GB.")
]
TrustPickle = Annotated[
    bool, typer.Option("--trust-pickle", help="Let the checkpoint run code, if you trust who wrote it.")
]
Verify = Annotated[
    bool | None,
    typer.Option(
        "--verify/--no-verify",
        help="Compare with the original first; on when --input is given and all changes are exact.",
    ),
]
ReportFile = Annotated[
    Path | None, typer.Option("--report", metavar="FILE", help="Write a report too, as .html or, to paste, .md.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]


def _need_model(**options: object) -> None:
    """Raise for an option that needs the model's code."""
    if given := [name for name, value in options.items() if value]:
        raise NormswapError(f"{', '.join(given)}: needs the model: pass --model WHERE:CALLABLE")


def _load(
    model: str | None,
    model_args: list[str] | None,
    path: Path | None,
    *,
    key: str | None = None,
    partial: bool = False,
    replay: bool = True,
    trust_pickle: bool = False,
) -> Source:
    if model is None:
        raise NormswapError(
            "which model? Pass --model WHERE:CALLABLE; only an .onnx file, or convert of a checkpoint, needs none"
        )
    with working("reading the model"):
        built = build_model(model, parse_pairs(model_args or (), "--model-arg"))
        source = load_source(built, path, key=key, partial=partial, replay=replay, trust_pickle=trust_pickle)
    for note in source.notes:
        say(note)
    return source


def _required(inputs: list[str] | None, source: Source, reason: str) -> tuple[Tensor, ...]:
    parsed = parse_inputs(inputs or (), source.model)
    if parsed is None:
        raise NormswapError(f"{reason} needs an example input: pass --input, such as --input 1x3x224x224")
    return parsed


def _selectors(where: list[str] | None, skip: list[str] | None, kinds: list[str] | None) -> dict[str, Any]:
    """``where`` and ``skip`` of the API; ``--from`` goes into whichever is free, so that globs still see aliases."""

    def wanted(name: str, norm: Norm) -> bool:
        return norm.kind in (kinds or ())

    def unwanted(name: str, norm: Norm) -> bool:
        return not wanted(name, norm) or any(fnmatchcase(name, glob) for glob in skip or ())

    if not kinds:
        return {"where": where or None, "skip": skip or None}
    return {"where": where, "skip": unwanted} if where else {"where": wanted, "skip": skip or None}


@app.command()
def inspect(
    model: OptionalModel = None,
    checkpoint: GraphFile = None,
    model_arg: ModelArgs = None,
    inputs: Inputs = None,
    key: Key = None,
    partial: Partial = False,
    replay: Replay = True,
    as_json: AsJson = False,
) -> None:
    """List every normalization of a model, or of an .onnx file."""
    if _is_onnx(checkpoint):
        _refuse_with_onnx(**{"--model": model, "--model-arg": model_arg, "--input": inputs, "--key": key})
        with working(f"reading {checkpoint}"):
            found = onnx_files.inspect(checkpoint)
        show(report.sites_report(found), {"sites": [report.site_record(site) for site in found]}, as_json)
        return
    source = _load(model, model_arg, checkpoint, key=key, partial=partial, replay=replay)
    with working("looking for normalizations"):
        sites = engine.find(source.model, parse_inputs(inputs or (), source.model))
    show(report.sites_report(sites), {"sites": [report.site_record(site) for site in sites]}, as_json)


@app.command()
def convert(
    to: Annotated[
        str, typer.Option("--to", metavar="KIND", callback=_kind, help=f"One of: {', '.join(registry.kinds())}.")
    ],
    model: OptionalModel = None,
    checkpoint: GraphFile = None,
    model_arg: ModelArgs = None,
    groups: Annotated[
        str | None, typer.Option("--groups", metavar="N", help="Number of groups (group); auto: chosen on --data.")
    ] = None,
    channels_per_group: Annotated[
        int | None, typer.Option("--channels-per-group", help="Size of a group (group).")
    ] = None,
    option: Annotated[list[str] | None, typer.Option("--option", metavar="K=V", help=_options_help())] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="FILE", help="Calibrate on these inputs: .npy, .npz, .pt, or package.module:callable."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Samples in a batch of a --data file.")] = 64,
    refine: Annotated[int, typer.Option("--refine", help="Steps of distillation after the calibration.")] = 0,
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
    trust_pickle: TrustPickle = False,
    report_to: ReportFile = None,
    force: Force = False,
) -> None:
    """Turn the normalizations of a model, a checkpoint or an .onnx file into another kind, and write the result.

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
    if _is_onnx(checkpoint):
        _refuse_with_onnx(**{
            "--model": model, "--model-arg": model_arg, "--input": inputs, "--key": key, "--partial": partial,
            "--init": init != "copy", "--verify": verify, "--data": data,
        })  # fmt: skip
        selectors = _selectors(where, skip, kind)
        carry_out_file(
            lambda: onnx_files.plan_convert(checkpoint, to, **selectors, **options), checkpoint, output, kind,
            Check(False, None, report_to), [], dry_run=dry_run, as_json=as_json, force=force,
        )  # fmt: skip
        return
    _check_destination(output, checkpoint, dry_run, force, report_to)
    size = None if max_shard_size is None else parse_size(max_shard_size)
    if model is None and checkpoint is not None:
        given = {"--model-arg": model_arg, "--input": inputs, "--verify": verify, "--partial": partial, "--data": data}
        _need_model(**given)
        selectors = _selectors(where, skip, kind)
        with working("planning"):
            source = load_keys(
                checkpoint, to, key=key, trust_pickle=trust_pickle, replay=replay, init=init, **selectors, **options
            )
        assert source.surgery is not None
        plan, check = source.surgery.plan, Check(False, None, report_to)
        check_kinds(plan, kind)
        carry_out(plan, source, output, check, dry_run=dry_run, as_json=as_json, force=force, shard_size=size)
        return
    source = _load(model, model_arg, checkpoint, key=key, partial=partial, replay=replay, trust_pickle=trust_pickle)
    example = _required(inputs, source, "--verify") if verify else parse_inputs(inputs or (), source.model)
    batches = None if data is None else load_batches(data, batch_size)
    with working("planning"):
        plan = surgery.plan_convert(
            source.model,
            to,
            example_inputs=example,
            init=init,
            calibration=batches if options.get("groups") == "auto" else None,
            **_selectors(where, skip, kind),
            **options,
        )
    check_kinds(plan, kind)
    fitted = None if batches is None else partial_of(calibrate, batches=batches, refine=refine)
    check = Check(verify, example, report_to)
    carry_out(plan, source, output, check, fitted, dry_run=dry_run, as_json=as_json, force=force, shard_size=size)


@app.command()
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
    report_to: ReportFile = None,
    force: Force = False,
) -> None:
    """Fold norms with fixed statistics into the neighbouring layers, and write the new checkpoint or .onnx file."""
    if _is_onnx(checkpoint):
        _refuse_with_onnx(**{
            "--model": model, "--model-arg": model_arg, "--key": key, "--partial": partial,
            "--merge-branches": merge_branches, "--affine": affine,
        })  # fmt: skip
        selectors = _selectors(where, skip, kind)
        wanted = verify or (verify is None and bool(inputs))
        carry_out_file(
            lambda: onnx_files.plan_fold(checkpoint, unshare=unshare, **selectors), checkpoint, output, kind,
            Check(wanted, None, report_to), inputs or [], dry_run=dry_run, as_json=as_json, force=force,
        )  # fmt: skip
        return
    _check_destination(output, checkpoint, dry_run, force, report_to)
    source = _load(model, model_arg, checkpoint, key=key, partial=partial, replay=replay)
    example = _required(inputs, source, "--verify") if verify else parse_inputs(inputs or (), source.model)
    with working("planning"):
        plan = engine.plan_fold(
            source.model,
            example_inputs=example,
            keep_batchnorm=keep_batchnorm,
            unshare=unshare,
            affine=affine,
            merge_branches=merge_branches,
            **_selectors(where, skip, kind),
        )
    check_kinds(plan, kind)
    check = Check(verify, example, report_to)
    carry_out(plan, source, output, check, dry_run=dry_run, as_json=as_json, force=force)


def _is_onnx(checkpoint: Path | None) -> TypeGuard[Path]:
    return checkpoint is not None and checkpoint.suffix == ".onnx"


def _refuse_with_onnx(**options: object) -> None:
    """Raise for an option that says nothing of an .onnx file."""
    given = [name for name, value in options.items() if value]
    if given:
        raise NormswapError(f"{', '.join(given)}: not for an .onnx file, which holds its own graph and weights")


def _check_destination(
    output: Path | None, checkpoint: Path | None, dry_run: bool, force: bool, report_to: Path | None
) -> None:
    if report_to is not None:
        check_report(report_to, force=force)
    if dry_run:
        return
    if output is None:
        raise NormswapError("where to? Pass -o FILE to write the result, or --dry-run to see the plan alone")
    check_destination(output, force=force, inputs=() if checkpoint is None else (checkpoint,))


@app.command()
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
        return _load(model, model_arg, path, key=key, partial=partial, replay=replay).model

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


@app.command()
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
    _check_destination(output, checkpoint, False, force, None)
    assert output is not None
    size = None if max_shard_size is None else parse_size(max_shard_size)
    recipes = recipes_in(recipe)
    source = _load(model, model_arg, checkpoint, key=key, partial=partial, replay=replay, trust_pickle=trust_pickle)
    with working("applying"):
        changed = source.model
        for each in recipes:
            changed = engine.apply_recipe(changed, fitted_recipe(each, changed), inplace=True)
    source.recipes += recipes[:-1]
    with working(f"writing {output}"):
        said = len(source.notes)
        written = save_source(source, changed, recipes[-1], output, force=force, max_shard_size=size)
    for note in [*source.notes[said:], *(f"wrote {path}" for path in written)]:
        say(note)


@app.command()
def diff(
    before: Annotated[Path, typer.Argument(help="A checkpoint.")],
    after: Annotated[Path, typer.Argument(help="Another.")],
    key: Key = None,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """Tell which tensors of two checkpoints are not the same; the exit status is 0 either way."""
    with working("comparing"):
        pair = [read(path, key=key, trust_pickle=trust_pickle) for path in (before, after)]
        found = differences(*pair)
    same = len(pair[0].tensors) - sum(each.what != "added" for each in found)
    record = {"same": same, "differences": [each.to_dict() for each in found]}
    show(report.differences_report(found, same), record, as_json)


@app.command()
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
    source = _load(model, model_arg, checkpoint, key=key, partial=partial, replay=replay)
    example = _required(inputs, source, "export")
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
