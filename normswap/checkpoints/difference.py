"""What differs between two checkpoints: names, shapes, dtypes, values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normswap.checkpoints.lazy import shape_of
from normswap.checkpoints.reading import Checkpoint


@dataclass(frozen=True)
class Difference:
    """One tensor that is not the same in both."""

    name: str
    what: str
    """``added``, ``removed``, ``shape``, ``dtype`` or ``value``."""
    before: str = ""
    after: str = ""
    largest: float | None = None
    """The largest absolute difference of the values, in float64; ``nan`` where only one side is a number."""

    def to_dict(self) -> dict[str, Any]:
        # JSON has no nan and no inf.
        largest = self.largest if self.largest is None or abs(self.largest) < float("inf") else str(self.largest)
        found = {"name": self.name, "what": self.what, "before": self.before, "after": self.after}
        return {**found, "largest_difference": largest}


def differences(before: Checkpoint, after: Checkpoint) -> list[Difference]:
    """Every tensor that is in one alone, or not the same in both, in the order of ``before``; NaN equals NaN.

    Values of different dtypes are said to differ by dtype, with the largest difference beside it. One pair of tensors
    is in memory at a time where files are read when asked for.
    """
    found = []
    for name in before.tensors:
        if name not in after.tensors:
            found.append(Difference(name, "removed", before=_described(before, name)))
            continue
        was, now = shape_of(before.tensors, name), shape_of(after.tensors, name)
        words = _described(before, name), _described(after, name)
        if was.shape != now.shape:
            found.append(Difference(name, "shape", *words))
            continue
        largest = _distance(before.tensors[name], after.tensors[name])
        if was.dtype != now.dtype:
            found.append(Difference(name, "dtype", *words, largest))
        elif largest != 0:
            found.append(Difference(name, "value", *words, largest))
    added = [name for name in after.tensors if name not in before.tensors]
    return found + [Difference(name, "added", after=_described(after, name)) for name in added]


def _described(checkpoint: Checkpoint, name: str) -> str:
    known = shape_of(checkpoint.tensors, name)
    return f"{str(known.dtype).removeprefix('torch.')} {'x'.join(map(str, known.shape)) or 'scalar'}"


def _distance(a: Tensor, b: Tensor) -> float:
    if a.dtype == b.dtype and torch.equal(a, b):
        return 0.0
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    x, y = (value.detach().to(wide) for value in (a, b))
    gap = (x - y).abs()
    gap[(x == y) | (x.isnan() & y.isnan())] = 0
    return float(gap.max()) if gap.numel() else 0.0
