"""Small ONNX graphs from text, run in float64 by ONNX's reference implementation."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from normswap.onnx.plan import FilePlan
from normswap.onnx.surgery import plan_fold

TOLERANCE: dict[Any, float] = {np.float64: 1e-10, np.float32: 3e-6}
Array = NDArray[Any]


def values(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng((seed, *shape)).standard_normal(shape)


def norm(name: str, channels: int, *, positive: bool = True, shift: bool = True) -> dict[str, Array]:
    """The parameters of a batch normalization: ``name_s``, ``name_t``, ``name_m``, ``name_v``."""
    seed = sum(map(ord, name))
    scale = np.abs(values(channels, seed=seed)) + 0.5
    if not positive:
        scale[::2] *= -1
    mean, bias = values(channels, seed=seed + 1), values(channels, seed=seed + 2)
    var = np.abs(values(channels, seed=seed + 3)) + 0.5
    if not shift:
        bias = mean * scale / np.sqrt(var + 1e-5)
        mean, bias = np.zeros(channels), np.zeros(channels)
    return {f"{name}_s": scale, f"{name}_t": bias, f"{name}_m": mean, f"{name}_v": var}


def bn(name: str, source: str, attributes: str = "") -> str:
    return f"BatchNormalization{attributes} ({source}, {name}_s, {name}_t, {name}_m, {name}_v)"


def build(
    body: str,
    constants: dict[str, Array],
    *,
    x: str = "double[2,4,6,6]",
    outputs: str = "double y",
    opset: int = 20,
    ir_version: int = 9,
    overridable: tuple[str, ...] = (),
) -> onnx.ModelProto:
    """A model with input ``x``, the given nodes and constants; ``overridable`` ones are inputs of the graph too."""
    graph = parser.parse_graph(f"g ({x} x) => ({outputs}) {{ {body} }}")
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    for name in overridable:
        kind = helper.np_dtype_to_tensor_dtype(constants[name].dtype)
        graph.input.append(helper.make_tensor_value_info(name, kind, constants[name].shape))
    for output in graph.output if "[" not in outputs else ():  # which the parser takes for one of rank 0
        output.type.tensor_type.ClearField("shape")
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    for output, known in zip(model.graph.output, inferred.graph.output, strict=True):
        output.CopyFrom(known)
    return model


def save(model: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    path = folder / name
    onnx.save(model, str(path))
    return path


def run(model: onnx.ModelProto | Path, x: Array) -> list[Array]:
    """By the reference implementation, or in float32 by ONNX Runtime without optimizations."""
    proto = onnx.load(str(model)) if isinstance(model, Path) else model
    feeds = {proto.graph.input[0].name: x}
    if x.dtype == np.float32:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        return list(onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, feeds))
    return list(ReferenceEvaluator(proto).run(None, feeds))


def input_of(model: onnx.ModelProto) -> Array:
    """A sample for the first input."""
    kind = model.graph.input[0].type.tensor_type
    shape = [dim.dim_value or 2 for dim in kind.shape.dim]
    return values(*shape, seed=7).astype(helper.tensor_dtype_to_np_dtype(kind.elem_type))


def operators(model: onnx.ModelProto | Path) -> Counter[str]:
    proto = onnx.load(str(model)) if isinstance(model, Path) else model
    return Counter(node.op_type for node in proto.graph.node)


def distance(ours: list[Array], theirs: list[Array]) -> float:
    pairs = list(zip(ours, theirs, strict=True))
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)
    return max(float(np.abs(a.astype(float) - b).max() / max(np.abs(b.astype(float)).max(), 1e-30)) for a, b in pairs)


def fold(model: onnx.ModelProto, folder: Path, **options: Any) -> tuple[FilePlan, onnx.ModelProto]:
    """The plan and the folded model, which computes the same to the last digits."""
    onnx.checker.check_model(model)
    path = save(model, folder)
    before = path.read_bytes()
    plan = plan_fold(path, **options)
    plan.apply(folder / "out.onnx")
    assert path.read_bytes() == before
    result = onnx.load(str(folder / "out.onnx"))
    onnx.checker.check_model(result, full_check=True)
    x = input_of(model)
    assert distance(run(result, x), run(model, x)) < TOLERANCE[x.dtype.type]
    return plan, result


def only_reason(plan: FilePlan) -> str:
    assert not plan.changes
    assert len(plan.skips) == 1, plan.skips
    return plan.skips[0].reason
