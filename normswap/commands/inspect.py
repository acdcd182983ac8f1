"""``normswap inspect``: what is there."""

from __future__ import annotations

from normswap import engine, report
from normswap.arguments import parse_inputs
from normswap.commands.parameters import AsJson, GraphFile, Inputs, Key, ModelArgs, OptionalModel, Partial, Replay
from normswap.commands.shared import is_onnx, load, refuse_with_onnx
from normswap.console import show, working
from normswap.onnx import surgery as onnx_files


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
    if is_onnx(checkpoint):
        refuse_with_onnx(**{"--model": model, "--model-arg": model_arg, "--input": inputs, "--key": key})
        with working(f"reading {checkpoint}"):
            found = onnx_files.inspect(checkpoint)
        show(report.sites_report(found), {"sites": [report.site_record(site) for site in found]}, as_json)
        return
    source = load(model, model_arg, checkpoint, key=key, partial=partial, replay=replay)
    with working("looking for normalizations"):
        sites = engine.find(source.model, parse_inputs(inputs or (), source.model))
    show(report.sites_report(sites), {"sites": [report.site_record(site) for site in sites]}, as_json)
