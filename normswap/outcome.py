"""From a plan to what is written: shown, applied, calibrated, compared, reported; for models and files with graphs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn

from normswap import engine, report
from normswap.arguments import parse_inputs
from normswap.calibration import Calibration
from normswap.console import CHECK_FAILED, say, working, writing
from normswap.errors import NormswapError
from normswap.files import check_output
from normswap.programs.plan import ProgramPlan
from normswap.reporting import check_report, write_report
from normswap.source import Source, save_source
from normswap.verification import Verification
from normswap.verification import verify as compare
from normswap.verifying import provable

if TYPE_CHECKING:
    from normswap.onnx.plan import FilePlan

    AnyPlan = FilePlan | ProgramPlan


@dataclass(frozen=True)
class Check:
    """What the user wants to be proven, on what, and where the report goes."""

    verify: bool | None
    example: tuple[Tensor, ...] | None
    report_to: Path | None

    @property
    def layers(self) -> bool:
        """Whether the report shows the inside of runs that are equivalent too."""
        return self.report_to is not None and self.report_to.suffix == ".html"

    def report(
        self,
        verification: Verification | None,
        title: str,
        force: bool,
        plan: engine.Plan | None,
        calibration: Calibration | None = None,
    ) -> None:
        if self.report_to is not None:
            with working(f"writing {self.report_to}"):
                write_report(self.report_to, verification, plan=plan, calibration=calibration, title=title, force=force)
            say(f"wrote {self.report_to}")


def judge(
    verification: Verification | None,
    check: Check,
    record: dict[str, object],
    title: str,
    output: Path,
    plan: engine.Plan,
    *,
    as_json: bool,
    force: bool,
    calibration: Calibration | None = None,
) -> None:
    """Show what a check found, write the report, and end with the exit status of a failure."""
    if verification is not None:
        record["verification"] = verification.to_dict()
        if not as_json:
            report.show(report.verification_report(verification), Console())
    check.report(verification, title, force, plan, calibration)
    if verification is not None and not verification:
        say(f"the check failed; {output} is not written")
        raise typer.Exit(CHECK_FAILED)


def carry_out(
    plan: engine.Plan,
    source: Source,
    output: Path | None,
    check: Check,
    fit: Callable[..., Calibration] | None = None,
    *,
    dry_run: bool,
    as_json: bool,
    force: bool,
    shard_size: int | None = None,
    resume: bool = False,
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
            raise nothing_to_do(plan)
        if dry_run:
            check.report(None, title, force, plan)
            return
        assert output is not None
        compared, reason = provable(plan, check.verify, check.example)
        if reason:
            say(reason)
        with working("applying"):
            changed = plan.apply(inplace=not compared and fit is None)
        calibration = None
        if fit is not None:
            with working("calibrating"):
                calibration = fit(changed, source.model)
            record["calibration"] = calibration.to_dict()
            if not as_json:
                Console().print(Text(str(calibration)), soft_wrap=True)
        verification = None
        if compared:
            verification = compared_with(source.model, changed, check.example, backend="eager", layers=check.layers)
        judge(verification, check, record, title, output, plan, as_json=as_json, force=force, calibration=calibration)
        said = len(source.notes)
        with writing(f"writing {output}") as progress:
            written = save_source(
                source, changed, plan.recipe, output,
                force=force, max_shard_size=shard_size, resume=resume, progress=progress,
            )  # fmt: skip
        record["written"] = [str(path) for path in written]
        for note in source.notes[said:]:
            say(note)
        for path in written:
            say(f"wrote {path}")
    finally:
        if as_json:
            typer.echo(json.dumps(record, indent=1))


def compared_with(
    reference: nn.Module | Path, candidate: nn.Module | Path, inputs: tuple[Tensor, ...] | None, **options: Any
) -> Verification:
    with working("comparing"):
        return compare(reference, candidate, inputs, **options)


def carry_out_file(
    planned: Callable[[], AnyPlan],
    checkpoint: Path,
    output: Path | None,
    kinds: list[str] | None,
    check: Check,
    inputs: list[str],
    *,
    dry_run: bool,
    as_json: bool,
    force: bool,
) -> None:
    """Show the plan of an .onnx or .pt2 file; unless dry, compare where asked, and write the new one.

    Where it was not said whether to compare, a .pt2 file is compared on the inputs that it carries, if any."""
    if not dry_run:
        if output is None:
            raise NormswapError(
                f"where to? Pass -o FILE{checkpoint.suffix} to write the result, or --dry-run to see the plan alone"
            )
        check_output(output, force=force, inputs=(checkpoint,))
    if check.report_to is not None:
        check_report(check.report_to, force=force)
    with working("planning"):
        plan = planned()
    table, title = plan.table, f"{checkpoint.name}: {plan.table.operation}"
    check_kinds(table, kinds)
    record: dict[str, object] = {"plan": plan.to_dict(), "calibration": None, "verification": None, "written": []}
    if not as_json:
        report.show(report.plan_report(table), Console())
    try:
        if not plan.changes:
            raise nothing_to_do(table)
        if dry_run or output is None:
            check.report(None, title, force, table)
            return
        wanted = check.verify
        if wanted is None:
            wanted = bool(inputs) or (isinstance(plan, ProgramPlan) and plan.carried() is not None)
        verification = compare_files(plan, output, inputs) if wanted else None
        judge(verification, check, record, title, output, table, as_json=as_json, force=force)
        with working(f"writing {output}"):
            written = plan.apply(output, force=force)
        record["written"] = [str(path) for path in written]
        for path in written:
            say(f"wrote {path}")
    finally:
        if as_json:
            typer.echo(json.dumps(record, indent=1))


def compare_files(plan: AnyPlan, output: Path, texts: list[str]) -> Verification:
    """Write the result into a folder beside the output, for as long as it takes to run it."""
    program = isinstance(plan, ProgramPlan)
    inputs = parse_inputs(texts, plan.stood.module if isinstance(plan, ProgramPlan) else nn.Identity())
    inputs = inputs or plan.example_inputs()
    with tempfile.TemporaryDirectory(dir=output.resolve().parent, prefix=".normswap-") as folder:
        candidate = Path(folder) / output.name
        plan.apply(candidate)
        return compared_with(plan.source, candidate, inputs, backend="eager" if program else "onnxruntime")


def check_kinds(plan: engine.Plan, kinds: list[str] | None) -> None:
    norms = [change.source for change in plan.changes] + [skip.norm for skip in plan.skips if skip.norm is not None]
    present = sorted({norm.kind for norm in norms})
    for kind in kinds or ():
        if kind not in present:
            raise NormswapError(f"--from {kind}: the model has no such norm; it has: {', '.join(present) or 'none'}")


def nothing_to_do(plan: engine.Plan) -> NormswapError:
    if not plan.skips:
        return NormswapError("no normalization found in the model")
    first, count = plan.skips[0], len(plan.skips)
    return NormswapError(f"nothing to change: {count} of {count} skipped; {first.name or '(root)'}: {first.reason}")
