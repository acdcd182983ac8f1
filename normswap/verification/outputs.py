"""What a model returns, as named leaves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import SUPPORTED_NODES

Outputs = dict[str, Any]


def flatten(output: Any) -> Outputs:
    """Leaves of a model's output by name: ``output`` for a lone tensor, ``output[0]``, keys, field names.

    Tensors are detached, on the CPU and dense, quantized and 8-bit floating-point ones in float32; a float and an array
    of numbers become one. What else holds tensors (a cache, a distribution) is opened."""
    return {name: _leaf(value) for name, value in leaves(output).items()}


def leaves(output: Any, name: str = "", inside: tuple[int, ...] = ()) -> Outputs:
    """As :func:`flatten`, the very objects. ``inside``: the objects, by ``id``, that hold this one."""
    if isinstance(output, Mapping):
        parts = [(f"{name}.{key}" if name else str(key), value) for key, value in output.items()]
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        parts = [(f"{name}.{key}" if name else key, getattr(output, key)) for key in output._fields]
    elif isinstance(output, list | tuple):
        parts = [(f"{name or 'output'}[{index}]", value) for index, value in enumerate(output)]
    elif is_dataclass(output) and not isinstance(output, type):
        parts = [(f"{name}.{f.name}" if name else f.name, getattr(output, f.name)) for f in fields(output)]
    elif type(output) in SUPPORTED_NODES:
        children, _ = SUPPORTED_NODES[type(output)].flatten_fn(output)
        parts = [(f"{name or 'output'}[{index}]", value) for index, value in enumerate(children)]
    elif _holds_tensors(output) and id(output) not in inside:
        held = ((key, value) for key, value in vars(output).items() if _tells(value))
        parts = [(f"{name or 'output'}.{key}", value) for key, value in held]
    else:
        return {name or "output": output}
    inside = (*inside, id(output))
    return {key: leaf for part, value in parts for key, leaf in leaves(value, part, inside).items()}


def _tells(value: Any) -> bool:
    return plain(value) or isinstance(value, Tensor | float) or _holds_tensors(value)


def _holds_tensors(value: Any, depth: int = 3) -> bool:
    """Whether an object has a tensor among its attributes, or in lists, mappings and objects in them."""
    if isinstance(value, Tensor | nn.Module | type) or callable(value):
        return False
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else None
    if parts is None:
        parts = vars(value).values() if hasattr(value, "__dict__") else ()
    return any(isinstance(each, Tensor) or (depth > 0 and _holds_tensors(each, depth - 1)) for each in parts)


def plain(value: Any) -> bool:
    """Whether ``==`` tells all about a value."""
    return isinstance(value, type(None) | bool | int | str | bytes)


def same(a: Any, b: Any) -> bool:
    """Whether two leaves are alike to the last bit; what cannot be compared is."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and (not plain(a) or a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _leaf(value: Any) -> Any:
    if isinstance(value, float):
        return torch.tensor(value)
    if isinstance(value, numpy.ndarray | numpy.generic) and value.dtype.kind in "biufc":
        return torch.from_numpy(numpy.array(value))
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    if value.is_nested:
        value = torch.cat([part.flatten() for part in value.unbind()])
    if value.is_quantized:
        value = value.dequantize()
    if value.is_floating_point() and value.element_size() == 1:  # Such have no arithmetic.
        value = value.float()
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
