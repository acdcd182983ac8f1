"""``normswap inspect``: what is there, and how it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from normswap import checkpoint as checkpoints
from normswap import report
from normswap.arguments import named_object, parse_inputs
from normswap.commands.parameters import (
    AsJson,
    GraphFile,
    Inputs,
    Key,
    ModelArgs,
    OptionalModel,
    Partial,
    Replay,
    ReportFile,
    TrustPickle,
)
from normswap.commands.shared import is_graph, load, need_model, refuse_with_graph
from normswap.console import CHECK_FAILED, say, show, working
from normswap.data import Counted, load_batches
from normswap.errors import NormswapError
from normswap.health import Health, examine
from normswap.health.files import examine_keys, examine_onnx, examine_program
from normswap.reporting import check_report, write_report
from normswap.source import converted_norms


def inspect(
    model: OptionalModel = None,
    checkpoint: GraphFile = None,
    model_arg: ModelArgs = None,
    inputs: Inputs = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Measure on these inputs: .npy, .npz, .pt, a folder of images, or package.module:callable.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Samples in a batch of a --data file.")] = 64,
    loss: Annotated[
        str | None,
        typer.Option("--loss", metavar="WHERE:CALLABLE", help="loss(output, batch), for the gradients on --data."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 where a norm has an error.")] = False,
    key: Key = None,
    partial: Partial = False,
    replay: Replay = True,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
    report_to: ReportFile = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the report if it exists.")] = False,
) -> None:
    """List every normalization of a model, checkpoint, .onnx or .pt2 file: where it sits, and what is wrong with it.

    Without --model the norms of a checkpoint are found by its keys and shapes.
    """
    if report_to is not None:
        check_report(report_to, force=force)
    if loss is not None and data is None:
        raise NormswapError("--loss is for the gradients on data: pass --data FILE")
    given = {"--model-arg": model_arg, "--input": inputs, "--data": data}
    if is_graph(checkpoint):
        refuse_with_graph(checkpoint, **{"--model": model, "--key": key, **given})
        with working(f"reading {checkpoint}"):
            health = examine_program(checkpoint) if checkpoint.suffix == ".pt2" else examine_onnx(checkpoint)
    elif model is None and checkpoint is not None:
        need_model(**given, **{"--partial": partial})
        with working(f"reading {checkpoint}"):
            read = checkpoints.read(checkpoint, key=key, trust_pickle=trust_pickle)
            health = examine_keys(read, converted_norms(read) if replay else None)
    else:
        source = load(
            model, model_arg, checkpoint, key=key, partial=partial, replay=replay, trust_pickle=trust_pickle,
            sound=False,
        )  # fmt: skip
        batches = None if data is None else Counted(load_batches(data, batch_size), data)
        with working("examining the normalizations"):
            example = parse_inputs(inputs or (), source.model)
            health = examine(source.model, example, batches, loss=_loss(loss))
    _deliver(health, checkpoint, report_to, as_json=as_json, force=force)
    if strict and not health:
        raise typer.Exit(CHECK_FAILED)


def _loss(name: str | None) -> Any:
    if name is None:
        return None
    path, found = named_object(name, "--loss")
    if not callable(found):
        raise NormswapError(f"--loss {name!r}: {path} is a {type(found).__name__}, not a callable")
    return found


def _deliver(health: Health, path: Path | None, report_to: Path | None, *, as_json: bool, force: bool) -> None:
    sites = [norm.site for norm in health.norms]
    record: dict[str, object] = {"sites": [report.site_record(site) for site in sites], "health": health.to_dict()}
    show(report.health_report(health), record, as_json)
    if report_to is not None:
        title = f"{'the model' if path is None else path.name}: health of its norms"
        with working(f"writing {report_to}"):
            write_report(report_to, health=health, title=title, force=force)
        say(f"wrote {report_to}")
