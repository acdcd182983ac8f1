"""What a model returns, as named leaves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

Outputs = dict[str, Any]


def flatten(output: Any) -> Outputs:
    """Leaves of a model's output by name: ``output`` for a lone tensor, ``output[0]``, keys, field names.

    Tensors are detached, on the CPU and dense; a float and an array of numbers become one."""
    return {name: _leaf(value) for name, value in leaves(output).items()}


def leaves(output: Any, name: str = "") -> Outputs:
    """As :func:`flatten`, the very objects."""
    if isinstance(output, Mapping):
        parts = [(f"{name}.{key}" if name else str(key), value) for key, value in output.items()]
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        parts = [(f"{name}.{key}" if name else key, getattr(output, key)) for key in output._fields]
    elif isinstance(output, list | tuple):
        parts = [(f"{name or 'output'}[{index}]", value) for index, value in enumerate(output)]
    elif is_dataclass(output) and not isinstance(output, type):
        parts = [(f"{name}.{f.name}" if name else f.name, getattr(output, f.name)) for f in fields(output)]
    else:
        return {name or "output": output}
    return {key: leaf for part, value in parts for key, leaf in leaves(value, part).items()}


def _leaf(value: Any) -> Any:
    if isinstance(value, float):
        return torch.tensor(value)
    if isinstance(value, numpy.ndarray | numpy.generic) and value.dtype.kind in "biufc":
        return torch.from_numpy(numpy.array(value))
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return value if value.layout == torch.strided else value.to_dense()


def named_like(values: Iterable[Tensor], own: Outputs) -> Outputs:
    """Tensors by the names of the tensors in ``own``, in order; what is no tensor there is taken from it."""
    values = list(values)
    names = [name for name, value in own.items() if isinstance(value, Tensor)]
    names += [f"output {index}" for index in range(len(names), len(values))]
    rest = {name: value for name, value in own.items() if not isinstance(value, Tensor)}
    return {**rest, **dict(zip(names, values, strict=False))}


def finite(outputs: Outputs) -> bool:
    """Whether every value of every tensor is finite."""
    return all(bool(value.isfinite().all()) for value in outputs.values() if isinstance(value, Tensor))
