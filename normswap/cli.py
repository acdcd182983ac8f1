"""The command line: ``normswap inspect``, ``convert``, ``fold``, ``apply``, ``diff``, ``verify``,
``export``.

Results go to standard output, everything else to standard error. Exit status: 0 done, 1 a check failed, 2 bad input,
130 interrupted. Choices come from the registry, so a kind that a package registers is offered like any other.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial as partial_of
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeGuard

import typer
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn
from typer.core import TyperGroup

from normswap import __version__, engine, registry, report, surgery
from normswap.arguments import build_model, parse_dynamic, parse_inputs, parse_pairs, parse_texts, parse_value
from normswap.calibration import Calibration, calibrate
from normswap.checkpoint import read
from normswap.checkpoints.difference import differences
from normswap.checkpoints.writing import parse_size
from normswap.data import load_batches
from normswap.delivery import check_destination
from normswap.errors import NormswapError
from normswap.files import check_output
from normswap.onnx import surgery as onnx_files
from normswap.onnx.export import SUFFIXES as EXPORTS
from normswap.onnx.export import export as export_model
from normswap.reporting import check_report, write_report
from normswap.source import Source, fitted_recipe, load_keys, load_source, recipes_in, save_source
from normswap.spec import Norm
from normswap.verification import Verification
from normswap.verification import verify as compare
from normswap.verification.runners import opened
from normswap.verifying import PROGRAMS, example_of, parse_tolerance, provable

if TYPE_CHECKING:
    from normswap.onnx.plan import FilePlan

Backend = Literal["onnxruntime", "eager"]
CHECK_FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130


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
            _say("interrupted")
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


def _say(message: str) -> None:
    Console(stderr=True, highlight=False).print(Text(message), soft_wrap=True)


def _fail(message: str) -> NoReturn:
    _say(f"normswap: {message}")
    raise typer.Exit(BAD_INPUT) from None


@contextlib.contextmanager
def _working(message: str) -> Iterator[None]:
    """Show that work goes on, and keep what the model's code prints out of the results."""
    status = Console(stderr=True).status(message) if sys.stderr.isatty() else contextlib.nullcontext()
    with status, contextlib.redirect_stdout(sys.stderr):
        yield


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
    with _working("reading the model"):
        built = build_model(model, parse_pairs(model_args or (), "--model-arg"))
        source = load_source(built, path, key=key, partial=partial, replay=replay, trust_pickle=trust_pickle)
    for note in source.notes:
        _say(note)
    return source


def _show(result: report.Report, record: dict[str, object], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(record, indent=1))
    else:
        report.show(result, Console())


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


def _check_kinds(plan: engine.Plan, kinds: list[str] | None) -> None:
    norms = [change.source for change in plan.changes] + [skip.norm for skip in plan.skips if skip.norm is not None]
    present = sorted({norm.kind for norm in norms})
    for kind in kinds or ():
        if kind not in present:
            raise NormswapError(f"--from {kind}: the model has no such norm; it has: {', '.join(present) or 'none'}")


def _nothing_to_do(plan: engine.Plan) -> NormswapError:
    if not plan.skips:
        return NormswapError("no normalization found in the model")
    first, count = plan.skips[0], len(plan.skips)
    return NormswapError(f"nothing to change: {count} of {count} skipped; {first.name or '(root)'}: {first.reason}")


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
        with _working(f"reading {checkpoint}"):
            found = onnx_files.inspect(checkpoint)
        _show(report.sites_report(found), {"sites": [report.site_record(site) for site in found]}, as_json)
        return
    source = _load(model, model_arg, checkpoint, key=key, partial=partial, replay=replay)
    with _working("looking for normalizations"):
        sites = engine.find(source.model, parse_inputs(inputs or (), source.model))
    _show(report.sites_report(sites), {"sites": [report.site_record(site) for site in sites]}, as_json)


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
        _carry_out_onnx(
            lambda: onnx_files.plan_convert(checkpoint, to, **selectors, **options), checkpoint, output, kind,
            _Check(False, None, report_to), [], dry_run=dry_run, as_json=as_json, force=force,
        )  # fmt: skip
        return
    _check_destination(output, checkpoint, dry_run, force, report_to)
    size = None if max_shard_size is None else parse_size(max_shard_size)
    if model is None and checkpoint is not None:
        given = {"--model-arg": model_arg, "--input": inputs, "--verify": verify, "--partial": partial, "--data": data}
        _need_model(**given)
        selectors = _selectors(where, skip, kind)
        with _working("planning"):
            source = load_keys(
                checkpoint, to, key=key, trust_pickle=trust_pickle, replay=replay, init=init, **selectors, **options
            )
        assert source.surgery is not None
        plan, check = source.surgery.plan, _Check(False, None, report_to)
        _check_kinds(plan, kind)
        _carry_out(plan, source, output, check, dry_run=dry_run, as_json=as_json, force=force, shard_size=size)
        return
    source = _load(model, model_arg, checkpoint, key=key, partial=partial, replay=replay, trust_pickle=trust_pickle)
    example = _required(inputs, source, "--verify") if verify else parse_inputs(inputs or (), source.model)
    batches = None if data is None else load_batches(data, batch_size)
    with _working("planning"):
        plan = surgery.plan_convert(
            source.model,
            to,
            example_inputs=example,
            init=init,
            calibration=batches if options.get("groups") == "auto" else None,
            **_selectors(where, skip, kind),
            **options,
        )
    _check_kinds(plan, kind)
    fitted = None if batches is None else partial_of(calibrate, batches=batches, refine=refine)
    check = _Check(verify, example, report_to)
    _carry_out(plan, source, output, check, fitted, dry_run=dry_run, as_json=as_json, force=force, shard_size=size)


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
        _carry_out_onnx(
            lambda: onnx_files.plan_fold(checkpoint, unshare=unshare, **selectors), checkpoint, output, kind,
            _Check(wanted, None, report_to), inputs or [], dry_run=dry_run, as_json=as_json, force=force,
        )  # fmt: skip
        return
    _check_destination(output, checkpoint, dry_run, force, report_to)
    source = _load(model, model_arg, checkpoint, key=key, partial=partial, replay=replay)
    example = _required(inputs, source, "--verify") if verify else parse_inputs(inputs or (), source.model)
    with _working("planning"):
        plan = engine.plan_fold(
            source.model,
            example_inputs=example,
            keep_batchnorm=keep_batchnorm,
            unshare=unshare,
            affine=affine,
            merge_branches=merge_branches,
            **_selectors(where, skip, kind),
        )
    _check_kinds(plan, kind)
    check = _Check(verify, example, report_to)
    _carry_out(plan, source, output, check, dry_run=dry_run, as_json=as_json, force=force)


def _is_onnx(checkpoint: Path | None) -> TypeGuard[Path]:
    return checkpoint is not None and checkpoint.suffix == ".onnx"


def _refuse_with_onnx(**options: object) -> None:
    """Raise for an option that says nothing of an .onnx file."""
    given = [name for name, value in options.items() if value]
    if given:
        raise NormswapError(f"{', '.join(given)}: not for an .onnx file, which holds its own graph and weights")


def _carry_out_onnx(
    planned: Callable[[], FilePlan],
    checkpoint: Path,
    output: Path | None,
    kinds: list[str] | None,
    check: _Check,
    inputs: list[str],
    *,
    dry_run: bool,
    as_json: bool,
    force: bool,
) -> None:
    """Show the plan of an .onnx file; unless dry, compare where asked, and write the new one."""
    if not dry_run:
        if output is None:
            raise NormswapError("where to? Pass -o FILE.onnx to write the result, or --dry-run to see the plan alone")
        check_output(output, force=force, inputs=(checkpoint,))
    if check.report_to is not None:
        check_report(check.report_to, force=force)
    with _working("planning"):
        plan = planned()
    table, title = plan.table, f"{checkpoint.name}: {plan.table.operation}"
    _check_kinds(table, kinds)
    record: dict[str, object] = {"plan": plan.to_dict(), "calibration": None, "verification": None, "written": []}
    if not as_json:
        report.show(report.plan_report(table), Console())
    try:
        if not plan.changes:
            raise _nothing_to_do(table)
        if dry_run or output is None:
            check.report(None, title, force, table)
            return
        verification = _compare_files(plan, output, inputs) if check.verify else None
        _judge(verification, check, record, title, output, table, as_json=as_json, force=force)
        with _working(f"writing {output}"):
            written = plan.apply(output, force=force)
        record["written"] = [str(path) for path in written]
        for path in written:
            _say(f"wrote {path}")
    finally:
        if as_json:
            typer.echo(json.dumps(record, indent=1))


def _compare_files(plan: FilePlan, output: Path, texts: list[str]) -> Verification:
    """Write the result into a folder beside the output, for as long as it takes to run it."""
    inputs = parse_inputs(texts, nn.Identity()) or plan.example_inputs()
    with tempfile.TemporaryDirectory(dir=output.resolve().parent, prefix=".normswap-") as folder:
        candidate = Path(folder) / output.name
        plan.apply(candidate)
        return _compare(plan.source, candidate, inputs, backend="onnxruntime")


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


@dataclass(frozen=True)
class _Check:
    """What the user wants to be proven, on what, and where the report goes."""

    verify: bool | None
    example: tuple[Tensor, ...] | None
    report_to: Path | None

    @property
    def layers(self) -> bool:
        """Whether the report shows the inside of runs that are equivalent too."""
        return self.report_to is not None and self.report_to.suffix == ".html"

    def report(self, verification: Verification | None, title: str, force: bool, plan: engine.Plan | None) -> None:
        if self.report_to is not None:
            with _working(f"writing {self.report_to}"):
                write_report(self.report_to, verification, plan=plan, title=title, force=force)
            _say(f"wrote {self.report_to}")


def _judge(
    verification: Verification | None,
    check: _Check,
    record: dict[str, object],
    title: str,
    output: Path,
    plan: engine.Plan,
    *,
    as_json: bool,
    force: bool,
) -> None:
    """Show what a check found, write the report, and end with the exit status of a failure."""
    if verification is not None:
        record["verification"] = verification.to_dict()
        if not as_json:
            report.show(report.verification_report(verification), Console())
    check.report(verification, title, force, plan)
    if verification is not None and not verification:
        _say(f"the check failed; {output} is not written")
        raise typer.Exit(CHECK_FAILED)


def _carry_out(
    plan: engine.Plan,
    source: Source,
    output: Path | None,
    check: _Check,
    fit: Callable[..., Calibration] | None = None,
    *,
    dry_run: bool,
    as_json: bool,
    force: bool,
    shard_size: int | None = None,
) -> None:
    """Show the plan; unless dry, apply it, calibrate and compare where asked, and write."""
    record: dict[str, object] = {
        "plan": json.loads(plan.to_json()),
        "calibration": None,
        "verification": None,
        "written": [],
    }
    title = f"{'the model' if source.path is None else source.path.name}: {plan.operation}"
    if not as_json:
        report.show(report.plan_report(plan), Console())
    try:
        if not plan.changes and not plan.merges:
            raise _nothing_to_do(plan)
        if dry_run:
            check.report(None, title, force, plan)
            return
        assert output is not None
        compared, reason = provable(plan, check.verify, check.example)
        if reason:
            _say(reason)
        with _working("applying"):
            changed = plan.apply(inplace=not compared and fit is None)
        if fit is not None:
            with _working("calibrating"):
                calibration = fit(changed, source.model)
            record["calibration"] = calibration.to_dict()
            if not as_json:
                Console().print(Text(str(calibration)), soft_wrap=True)
        verification = None
        if compared:
            verification = _compare(source.model, changed, check.example, backend="eager", layers=check.layers)
        _judge(verification, check, record, title, output, plan, as_json=as_json, force=force)
        with _working(f"writing {output}"):
            said = len(source.notes)
            written = save_source(source, changed, plan.recipe, output, force=force, max_shard_size=shard_size)
        record["written"] = [str(path) for path in written]
        for note in source.notes[said:]:
            _say(note)
        for path in written:
            _say(f"wrote {path}")
    finally:
        if as_json:
            typer.echo(json.dumps(record, indent=1))


def _compare(
    reference: nn.Module | Path, candidate: nn.Module | Path, inputs: tuple[Tensor, ...] | None, **options: Any
) -> Verification:
    with _working("comparing"):
        return compare(reference, candidate, inputs, **options)


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
            with _working(f"reading {path}"):
                return opened(path)
        if model is None:
            raise NormswapError(f"{path} is a checkpoint: pass --model WHERE:CALLABLE, the model that it belongs to")
        return _load(model, model_arg, path, key=key, partial=partial, replay=replay).model

    sides = program(reference, model, key), program(candidate, candidate_model or model)
    runtime = backend or ("onnxruntime" if candidate.suffix == ".onnx" else "eager")
    example = example_of(inputs, data, *sides)
    check = _Check(True, example, report_to)
    options = {"data": () if data is None else data, "layers": check.layers, **tolerances}
    verification = _compare(*sides, example, backend=runtime, **options)
    _show(report.verification_report(verification), verification.to_dict(), as_json)
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
    with _working("applying"):
        changed = source.model
        for each in recipes:
            changed = engine.apply_recipe(changed, fitted_recipe(each, changed), inplace=True)
    source.recipes += recipes[:-1]
    with _working(f"writing {output}"):
        said = len(source.notes)
        written = save_source(source, changed, recipes[-1], output, force=force, max_shard_size=size)
    for note in [*source.notes[said:], *(f"wrote {path}" for path in written)]:
        _say(note)


@app.command()
def diff(
    before: Annotated[Path, typer.Argument(help="A checkpoint.")],
    after: Annotated[Path, typer.Argument(help="Another.")],
    key: Key = None,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """Tell which tensors of two checkpoints are not the same; the exit status is 0 either way."""
    with _working("comparing"):
        pair = [read(path, key=key, trust_pickle=trust_pickle) for path in (before, after)]
        found = differences(*pair)
    same = len(pair[0].tensors) - sum(each.what != "added" for each in found)
    record = {"same": same, "differences": [each.to_dict() for each in found]}
    _show(report.differences_report(found, same), record, as_json)


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
        with _working("folding"):
            plan = engine.plan_fold(exported, example_inputs=example)
            exported = plan.apply(inplace=True)
        if plan.changes:
            recipes.append(plan.recipe)
    with _working(f"exporting to {output}"):
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
    _say(f"wrote {output}")
