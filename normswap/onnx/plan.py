"""The plan of surgery on an ``.onnx`` file: every normalization as a change or as a skip with a reason."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from normswap.engine.plan import Change, Plan, Skip
from normswap.errors import NormswapError
from normswap.onnx import file
from normswap.onnx.graph import FLOATS
from normswap.version import __version__

OPERATION = "normswap.operation"
"""The metadata in a file that says what was done to it, oldest first."""


@dataclass
class FilePlan:
    """What becomes of the normalizations of an ``.onnx`` file. The file is only read; :meth:`apply` writes another."""

    source: Path
    operation: str
    changes: list[Change]
    skips: list[Skip]
    model: ir.Model = field(repr=False)
    """The model with the changes made, in memory; what was in external files is changed while it is written."""
    notes: tuple[str, ...] = ()

    @property
    def table(self) -> Plan:
        """The same rows as those of a module, to be printed and written as JSON likewise."""
        return Plan(nn.Identity(), self.operation, self.changes, self.skips, self.notes)

    def apply(self, out: str | os.PathLike[str], *, force: bool = False) -> list[Path]:
        """Write the model with the changes made to the ``.onnx`` file ``out``, whole or not at all; the paths written.

        Tensors that were in external files go to ``out`` with ``.data`` behind. Raises :class:`NormswapError` for an
        output that exists (without ``force``), that is an input or cannot be written, and for a result that the ONNX
        checker refuses."""
        metadata = self.model.metadata_props
        before, step = dict(metadata), f"{self.operation} ({__version__})"
        metadata[OPERATION] = f"{before[OPERATION]}; {step}" if before.get(OPERATION) else step
        try:
            return file.write(self.model, Path(out), force=force)
        finally:
            metadata.clear()
            metadata.update(before)

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Seeded inputs of the shapes that the file declares, to compare it with what is written; an open first axis
        is 2.

        Raises :class:`NormswapError` where another axis is open, and for an input that is not of a float type."""
        generator = torch.Generator().manual_seed(0)
        tensors = []
        for value in self.model.graph.inputs:
            if value.is_initializer():
                continue
            sizes = () if value.shape is None else value.shape.numpy() if value.shape.is_static() else value.shape
            shape = [2 if index == 0 and not isinstance(size, int) else size for index, size in enumerate(sizes)]
            fixed = [size for size in shape if isinstance(size, int)]
            if value.shape is None or len(fixed) != len(shape) or value.dtype not in FLOATS:
                raise NormswapError(
                    f"{self.source}: input {value.name!r} is {value.dtype} of shape {value.shape}; pass --input"
                )
            dtype = ir.tensor_adapters.to_torch_dtype(value.dtype)
            tensors.append(torch.randn(fixed, generator=generator, dtype=torch.float64).to(dtype))
        return tuple(tensors)

    def to_dict(self) -> dict[str, Any]:
        return {
            "operation": self.operation,
            "source": str(self.source),
            "changes": [change.to_dict() for change in self.changes],
            "skips": [skip.to_dict() for skip in self.skips],
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        return str(self.table)
