"""What several commands do before they start: load the model, choose norms, refuse what does not fit."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor

from normswap import onnx, programs
from normswap.arguments import build_model, parse_inputs, parse_pairs
from normswap.console import say, working
from normswap.delivery import check_destination
from normswap.errors import NormswapError
from normswap.reporting import check_report
from normswap.source import Source, load_source
from normswap.spec import Norm


def need_model(**options: object) -> None:
    """Raise for an option that needs the model's code."""
    if given := [name for name, value in options.items() if value]:
        raise NormswapError(f"{', '.join(given)}: needs the model: pass --model WHERE:CALLABLE")


def load(
    model: str | None,
    model_args: list[str] | None,
    path: Path | None,
    *,
    key: str | None = None,
    partial: bool = False,
    replay: bool = True,
    trust_pickle: bool = False,
    sound: bool = True,
) -> Source:
    if model is None:
        raise NormswapError(
            "which model? Pass --model WHERE:CALLABLE; an .onnx or .pt2 file needs none, nor does "
            "inspect or convert of a checkpoint"
        )
    with working("reading the model"):
        built = build_model(model, parse_pairs(model_args or (), "--model-arg"))
        source = load_source(
            built, path, key=key, partial=partial, replay=replay, trust_pickle=trust_pickle, sound=sound
        )
    for note in source.notes:
        say(note)
    return source


def required(inputs: list[str] | None, source: Source, reason: str) -> tuple[Tensor, ...]:
    parsed = parse_inputs(inputs or (), source.model)
    if parsed is None:
        raise NormswapError(f"{reason} needs an example input: pass --input, such as --input 1x3x224x224")
    return parsed


def selectors(where: list[str] | None, skip: list[str] | None, kinds: list[str] | None) -> dict[str, Any]:
    """``where`` and ``skip`` of the API; ``--from`` goes into whichever is free, so that globs still see aliases."""

    def wanted(name: str, norm: Norm) -> bool:
        return norm.kind in (kinds or ())

    def unwanted(name: str, norm: Norm) -> bool:
        return not wanted(name, norm) or any(fnmatchcase(name, glob) for glob in skip or ())

    if not kinds:
        return {"where": where or None, "skip": skip or None}
    return {"where": where, "skip": unwanted} if where else {"where": wanted, "skip": skip or None}


def is_graph(checkpoint: Path | None) -> TypeGuard[Path]:
    """Whether it is a file that holds the model's graph."""
    return checkpoint is not None and checkpoint.suffix in (".onnx", ".pt2")


def surgery_of(checkpoint: Path) -> Any:
    """The functions that inspect, fold and convert files of its kind."""
    return programs.surgery if checkpoint.suffix == ".pt2" else onnx.surgery


def refuse_with_graph(checkpoint: Path, **options: object) -> None:
    """Raise for an option that says nothing of an .onnx or .pt2 file."""
    given = [name for name, value in options.items() if value]
    kind = "a .pt2" if checkpoint.suffix == ".pt2" else "an .onnx"
    if given:
        raise NormswapError(f"{', '.join(given)}: not for {kind} file, which holds its own graph and weights")


def check_outputs(
    output: Path | None, checkpoint: Path | None, dry_run: bool, force: bool, report_to: Path | None
) -> None:
    if report_to is not None:
        check_report(report_to, force=force)
    if dry_run:
        return
    if output is None:
        raise NormswapError("where to? Pass -o FILE to write the result, or --dry-run to see the plan alone")
    check_destination(output, force=force, inputs=() if checkpoint is None else (checkpoint,))
