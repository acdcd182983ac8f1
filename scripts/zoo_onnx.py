"""Fold and convert real models as ``.onnx`` files, beside other tools, and write what happened to a page.

    python scripts/zoo_onnx.py [--only GLOB] [--results FILE] [--out FILE]

Every model has random weights and randomised statistics, is exported in float32 and eval mode by torch's two exporters
without optimization, and is folded, and converted, as a file. The truth is the torch model in float64. What is asked:

- the folded file's error, in ONNX Runtime without graph optimizations, is at most four times that of the original file
  there (plus four machine epsilons), as ``normswap.verify`` asks it;
- no more batch normalizations are left than ``normswap.fold`` leaves in the torch model, nor than the other tools;
- a converted file computes what ``normswap.convert`` makes of the torch model, within the same bounds: of the error of
  that model in float32, or of its own export in ONNX Runtime, whose sums over a whole map are less accurate.

Other tools: ONNX Runtime's graph optimizations (``ORT_ENABLE_EXTENDED``: one level more changes the layout, and writes
what is left as convolutions of single channels), and onnxscript's optimizer with its rules for
batch normalizations."""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import logging
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import onnxruntime  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import normswap  # noqa: E402
import normswap.onnx as files  # noqa: E402
from normswap.norms.affine import ChannelAffine  # noqa: E402
from normswap.onnx.export import quiet  # noqa: E402
from normswap.verification.criterion import FACTOR, ULPS  # noqa: E402
from tests.zoo.models import MODELS, Entry, randomise  # noqa: E402

NAMES = (
    "torchvision/resnet18", "torchvision/mobilenet_v2", "torchvision/densenet121", "torchvision/shufflenet_v2_x1_0",
    "torchvision/efficientnet_b0", "torchvision/googlenet", "torchvision/inception_v3", "torchvision/r3d_18",
    "torchvision/regnet_y_400mf", "timm/levit_128s", "timm/convmixer_768_32", "timm/repvgg_a0",
)  # fmt: skip
EXPORTERS = {"dynamo": {"dynamo": True, "optimize": False}, "TorchScript": {"dynamo": False}}
KINDS = ("group", "instance", "layer")


def export(model: nn.Module, inputs: tuple[Any, ...], path: Path, exporter: str) -> None:
    """One file, as translated."""
    options: dict[str, Any] = dict(EXPORTERS[exporter])
    if not options["dynamo"]:
        options |= {"do_constant_folding": False, "training": torch.onnx.TrainingMode.PRESERVE}
    with quiet(), torch.no_grad():
        torch.onnx.export(model, inputs, str(path), external_data=False, **options)


def run(path: Path, inputs: tuple[Any, ...]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return list(session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True))))


def batch_norms(model: onnx.ModelProto) -> int:
    return sum(node.op_type == "BatchNormalization" for node in model.graph.node)


def left_by_runtime(path: Path, out: Path) -> int:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(out)
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return batch_norms(onnx.load(str(out)))


def left_by_onnxscript(path: Path) -> int:
    import onnxscript.optimizer
    import onnxscript.rewriter

    with quiet():
        model = onnxscript.rewriter.rewrite(onnxscript.optimizer.optimize(onnx.load(str(path))))
        return batch_norms(onnxscript.optimizer.optimize(model))


def error(outputs: list[np.ndarray], truth: list[torch.Tensor]) -> float:
    """The greatest difference, relative to the greatest value, over all outputs."""
    worst = 0.0
    for ours, theirs in zip(outputs, truth, strict=True):
        assert tuple(ours.shape) == tuple(theirs.shape), (ours.shape, theirs.shape)
        scale = float(theirs.abs().max()) or 1.0
        worst = max(worst, float((torch.from_numpy(ours).double() - theirs).abs().max()) / scale)
    return worst


def within(got: float, noise: float) -> bool:
    return got <= FACTOR * noise + ULPS * float(np.finfo(np.float32).eps)


def row(entry: Entry, exporter: str, folder: Path) -> dict[str, Any]:
    model = randomise(entry.build(), entry).float().double()
    inputs = tuple(x.float().double() for x in entry.inputs())
    single = copy.deepcopy(model).float()
    narrow = tuple(x.float() for x in inputs)
    truth = entry.outputs(model, inputs)
    path, folded, other = folder / "model.onnx", folder / "folded.onnx", folder / "other.onnx"
    export(single, narrow, path, exporter)
    plan = files.plan_fold(path)
    plan.apply(folded, force=True)
    of_torch = normswap.plan_fold(model, example_inputs=inputs)
    own, ours = error(run(path, narrow), truth), error(run(folded, narrow), truth)
    made = {
        "model": entry.name,
        "exporter": exporter,
        "norms": batch_norms(onnx.load(str(path))),
        "left": batch_norms(onnx.load(str(folded))),
        "torch": sum(isinstance(m, ChannelAffine) for m in of_torch.apply().modules()) + len(of_torch.skips),
        "runtime": left_by_runtime(path, other),
        "onnxscript": left_by_onnxscript(path),
        "error": own,
        "folded": ours,
        "reasons": dict(Counter(skip.reason for skip in plan.skips).most_common(4)),
        "faults": [] if within(ours, own) else [f"fold: {ours:.1e}"],
    }
    for kind in KINDS:
        try:
            twin = normswap.convert(model, kind, example_inputs=inputs)
        except normswap.NormswapError:
            continue
        files.convert(path, other, kind, force=True)
        twin_truth = entry.outputs(twin, inputs)
        twin = copy.deepcopy(twin).float()
        noise = error([x.numpy() for x in entry.outputs(twin, narrow)], twin_truth)
        got = error(run(other, narrow), twin_truth)
        made[kind] = got
        if not within(got, noise):
            export(twin, narrow, folder / "twin.onnx", exporter)
            noise = error(run(folder / "twin.onnx", narrow), twin_truth)
        if not within(got, noise):
            made["faults"].append(f"{kind}: {got:.1e}, noise {noise:.1e}")
    if any(made["left"] > made[tool] for tool in ("torch", "runtime", "onnxscript")):
        made["faults"].append("more batch norms left")
    return made


def page(rows: list[dict[str, Any]]) -> str:
    head = (
        "model",
        "exporter",
        "norms",
        "left",
        "torch",
        "ONNX Runtime",
        "onnxscript",
        "error",
        "error folded",
        *KINDS,
    )
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for r in rows:
        if "failed" in r:
            cells = [r["model"], r["exporter"], r["failed"]]
        else:
            cells = [
                r["model"],
                r["exporter"],
                *(str(r[k]) for k in ("norms", "left", "torch", "runtime", "onnxscript")),
            ]
            cells += [f"{r[k]:.1e}" if k in r else "" for k in ("error", "folded", *KINDS)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*")
    parser.add_argument("--results", type=Path, default=Path("zoo_onnx.jsonl"), help="goes on where it was cut off")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    entries = {entry.name: entry for entry in MODELS}
    stored = arguments.results.read_text(encoding="utf-8").splitlines() if arguments.results.exists() else []
    done = {(r["model"], r["exporter"]): r for r in map(json.loads, stored)}
    rows: list[dict[str, Any]] = []
    for name in (name for name in NAMES if fnmatch.fnmatch(name, arguments.only)):
        for exporter in EXPORTERS:
            start, key = time.time(), (name, exporter)
            if key not in done:
                with tempfile.TemporaryDirectory() as folder:
                    try:
                        done[key] = row(entries[name], exporter, Path(folder))
                    except Exception as problem:
                        told = f"{type(problem).__name__}: {problem}"[:200]
                        done[key] = {"model": name, "exporter": exporter, "failed": told}
                with arguments.results.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(done[key]) + "\n")
                print(f"{time.time() - start:.0f} s", json.dumps(done[key]), flush=True)
            rows.append(done[key])
    text = page(rows)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    return int(any(r.get("faults") or "failed" in r for r in rows))


if __name__ == "__main__":
    sys.exit(main())
