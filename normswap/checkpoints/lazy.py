"""Tensors that are read from their file when they are asked for, and kept by nobody here.

A tensor of a ``.safetensors`` file is a view of the mapped file; the memory goes when the tensor and the open file go.
So the file is opened anew after :data:`HELD` bytes: who looks at one tensor after the other never holds much more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor

from normswap.checkpoints.words import line
from normswap.errors import NormswapError

HELD = 2**26
"""Bytes read from an open file before it is closed."""


@dataclass(frozen=True)
class Shape:
    """What is known of a tensor without reading it."""

    dtype: torch.dtype | None
    """``None`` for one that torch does not know by that name."""
    shape: tuple[int, ...]


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name: a tensor, or the ``.safetensors`` file it is in."""

    whole_in_files: ClassVar[bool] = True
    """Whether each tensor is in one piece in the ``.safetensors`` file that is its place."""

    def __init__(self, places: Mapping[str, Tensor | Path], shapes: Mapping[str, Shape]) -> None:
        self.places = dict(places)
        self.shapes = dict(shapes)
        self._file: Any = None
        self._path: Path | None = None
        self._read = 0

    def __getitem__(self, name: str) -> Tensor:
        place = self.places[name]
        if isinstance(place, Tensor):
            return place
        try:
            if self._path != place or self._read > HELD:
                self._file, self._path, self._read = safe_open(place, framework="pt"), place, 0
            value: Tensor = self._file.get_tensor(name)
        except Exception as error:
            raise NormswapError(f"{place}: {name} cannot be read: {line(error)}") from error
        self._read += value.numel() * value.element_size()
        return value

    def like(self, places: Mapping[str, Tensor | Path], shapes: Mapping[str, Shape]) -> LazyTensors:
        """Others from the same files."""
        return LazyTensors(places, shapes)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def close(self) -> None:
        self._file, self._path, self._read = None, None, 0


def shape_of(tensors: Mapping[str, Any], name: str) -> Shape:
    """Dtype and shape, without reading the tensor where that can be avoided."""
    if isinstance(tensors, LazyTensors) and name in tensors.shapes:
        return tensors.shapes[name]
    value = tensors[name]
    return Shape(value.dtype, tuple(value.shape))


def replaced(tensors: Mapping[str, Any], names: Mapping[str, Tensor | str]) -> Mapping[str, Any]:
    """The mapping with these names in this order, each a new tensor, or one of ``tensors`` by its name there."""
    if not isinstance(tensors, LazyTensors):
        return {name: tensors[value] if isinstance(value, str) else value for name, value in names.items()}
    places = {name: tensors.places[v] if isinstance(v, str) else v for name, v in names.items()}
    shapes = {n: tensors.shapes[v] for n, v in names.items() if isinstance(v, str) and v in tensors.shapes}
    return tensors.like(places, shapes)
