"""A ``.pt2`` archive: a model as the program that ``torch.export`` traces, saved by ``torch.export.save``.

The exporter comes in two manners. Tracing by calling the model (``strict=False``) takes most models, and is tried
first; analysing its bytecode (``strict=True``) takes a few that depend on the values of inputs they were not given.

By default it treats sizes 0 and 1 as special: a batch or an image that may be that small then fails a guard, or the
whole export does. Its setting ``backed_size_oblivious`` makes it treat sizes alike, as ``torch.onnx`` has it too.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes
from torch.fx.experimental import _config

from normswap.dynamic import Sizes
from normswap.provenance import EXTRA_FILE

DEFERRED = "prefer_deferred_runtime_asserts_over_guards"
"""Option of newer versions of torch."""


def translate(model: nn.Module, example_inputs: tuple[Any, ...], shapes: Any) -> ExportedProgram:
    """The program of one call, with the error of the first attempt where all fail.

    The attempts: as it is; with sizes narrowed as the exporter asks (a multiple of 8, two that are equal); with what
    the code assumes of sizes checked by the program when it runs; and from bytecode.
    """
    try:
        return _traced(model, example_inputs, shapes)
    except Exception as error:
        for again in _attempts(str(error), shapes):
            with suppress(Exception):
                return _traced(model, example_inputs, **again)
        raise


def _attempts(message: str, shapes: Any) -> Iterator[dict[str, Any]]:
    with suppress(Exception):
        yield {"shapes": refine_dynamic_shapes_from_suggested_fixes(message, shapes)}
    if DEFERRED in inspect.signature(torch.export.export).parameters:
        yield {"shapes": shapes, DEFERRED: True}
    yield {"shapes": shapes, "strict": True}


def _traced(model: nn.Module, example_inputs: tuple[Any, ...], shapes: Any, **options: Any) -> ExportedProgram:
    with _sizes_alike():
        return torch.export.export(model, example_inputs, dynamic_shapes=shapes, **{"strict": False, **options})


def _sizes_alike() -> AbstractContextManager[Any]:
    patch: Any = getattr(_config, "patch", None)
    return patch(backed_size_oblivious=True) if hasattr(_config, "backed_size_oblivious") else nullcontext()


def sizes(program: ExportedProgram) -> Sizes:
    """The axes of the program's tensor inputs, in their order."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    inputs = {name: values.get(name) for name in program.graph_signature.user_inputs if isinstance(name, str)}
    return [
        (name, [size if isinstance(size, int) else str(size) for size in value.shape])
        for name, value in inputs.items()
        if isinstance(value, Tensor)
    ]


def save(
    program: ExportedProgram, path: Path, metadata: Mapping[str, str], extra: Mapping[str, str] | None = None
) -> None:
    """Write the archive, with ``metadata`` as JSON in its extra file, and other extra files by name.

    ``path`` may have any name."""
    files = {**(extra or {}), EXTRA_FILE: json.dumps(metadata, indent=1)}
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files=files)
