r"""How near the outputs of one model are to those of another.

R² here is about the means of columns, not about one mean: what the mean of a column tells, a constant model knows too.
With errors e and the reference's values b in columns c,

.. math::  R^2 = 1 - \frac{\sum e^2}{\sum_c \sum (b - \bar b_c)^2} .

Columns are the indexes of axis 1, ``(N, C, *S)``, or of the last axis, ``(N, T, C)``: of the axis whose means leave the
smaller variance; where there is but one value in each, all are one column. Left out is what tells nothing: positions
that are not finite in the reference, or its dtype's largest numbers, or a fill (:func:`_fill`), and the same in both;
and columns that are constant in the reference up to rounding, where the other's error is rounding too. Sums are in
float64 about the mean of each batch and are joined as by Chan et al., so that large constants cost no digits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from normswap.calibration import processes
from normswap.calibration.batches import floats

FILL = 1e4
"""A fill is at least this large."""
CHUNK = 1 << 20
"""Elements that are compared at once."""
ROUNDINGS = 8
"""Columns that vary by fewer roundings of their mean are constant."""


@dataclass
class Columns:
    """Of each column, ``(columns,)`` each in float64 on the CPU: the count of compared values, the reference's mean and
    sum of squares about it, the sum of squared errors, and the largest rounding of a value."""

    count: Tensor
    mean: Tensor
    squares: Tensor
    error: Tensor
    rounding: Tensor

    @classmethod
    def of(cls, error: Tensor, original: Tensor, kept: Tensor, rounding: float) -> Columns:
        """From ``(columns, values)`` each, of which those ``kept`` are compared."""
        count = kept.sum(1).double()
        mean = original.where(kept, 0).sum(1) / count.clamp(min=1)
        squares = (original - mean.unsqueeze(1)).where(kept, 0).square().sum(1)
        parts = (count, mean, squares, error.sum(1), mean.abs() * rounding)
        return cls(*(part.cpu() for part in parts))

    def __add__(self, other: Columns) -> Columns:
        count = self.count + other.count
        share = other.count / count.clamp(min=1)
        moved = other.mean - self.mean
        squares = self.squares + other.squares + moved.square() * share * self.count
        rounding = torch.maximum(self.rounding, other.rounding)
        return Columns(count, self.mean + moved * share, squares, self.error + other.error, rounding)

    @property
    def spread(self) -> float:
        """The sum of squares about the means of the columns that vary."""
        return float(self.squares[self._varies()].sum())

    @property
    def variance(self) -> float:
        """``spread`` for each degree of freedom; infinite without one."""
        free = float((self.count - 1).clamp(min=0).sum())
        return self.spread / free if free else math.inf

    @property
    def share(self) -> float:
        """R²; ``nan`` where no column varies."""
        spread = self.spread
        constant = ~self._varies() & (self.error <= self.count * self.rounding.square())
        return 1 - float(self.error[~constant].sum()) / spread if spread > 0 else math.nan

    def _varies(self) -> Tensor:
        return self.squares > self.count * self.rounding.square()


@dataclass
class Agreement:
    """Of a model's outputs with the reference's, tensor by tensor and by the axis of the columns."""

    tensors: dict[tuple[int, int | None], Columns] = field(default_factory=dict)
    sizes: dict[tuple[int, int | None], set[int]] = field(default_factory=dict)
    """How many columns there were; an axis whose length changes has none."""

    def add(self, output: object, original: object) -> None:
        for index, (a, b) in enumerate(zip(floats(output), floats(original), strict=False)):
            if a.shape == b.shape and a.numel():
                self._add(index, a.detach().to(b.device), b.detach())

    def _add(self, index: int, a: Tensor, original: Tensor) -> None:
        fill = _fill(original)
        step = max(1, CHUNK // max(1, original[:1].numel())) if original.dim() else 1
        for first in range(0, len(original) if original.dim() else 1, step):
            part = slice(first, first + step) if original.dim() else ...
            for axis, columns in _compared(a[part], original[part], fill).items():
                key = index, axis
                sizes = self.sizes.setdefault(key, set())
                sizes.add(len(columns.count))
                if len(sizes) == 1:
                    self.tensors[key] = self.tensors[key] + columns if key in self.tensors else columns

    def score(self) -> float:
        """R² over all processes, averaged over tensors; ``nan`` where there is nothing to compare."""
        everywhere = processes.gathered((self.tensors, self.sizes))
        shares = []
        for index in sorted({index for tensors, _ in everywhere for index, _ in tensors}):
            whole = {}
            for axis in sorted({axis for tensors, _ in everywhere for i, axis in tensors if i == index}, key=str):
                key = index, axis
                if len(set().union(*(sizes.get(key, ()) for _, sizes in everywhere))) == 1:
                    whole[axis] = _joined(tensors[key] for tensors, _ in everywhere if key in tensors)
            one = whole.pop(None)
            best = min(whole.values(), key=lambda columns: columns.variance, default=one)
            share = (one if math.isinf(best.variance) else best).share
            if not math.isnan(share):
                shares.append(share)
        return sum(shares) / len(shares) if shares else math.nan


def telling(original: Tensor) -> Tensor:
    """Where the reference has a value that tells something: finite, and no mask."""
    return ~_blank(original, _fill(original))


def _joined(parts: Iterable[Columns]) -> Columns:
    first, *rest = parts
    return sum(rest, start=first)


def _compared(a: Tensor, original: Tensor, fill: float | None) -> dict[int | None, Columns]:
    """By the axis of the columns; ``None`` for all in one."""
    b, limits = original.double(), torch.finfo(original.dtype)
    a = a.double()
    empty = _blank(original, fill)
    same = empty & ((a == b) | (a.isnan() & b.isnan()))
    error = (a - b).square().where(~same, 0).nan_to_num(nan=math.inf, posinf=math.inf)
    kept = ~empty
    b = b.where(kept, 0)
    axes = {1, b.dim() - 1} if b.dim() > 1 else set()
    return {
        axis: Columns.of(_cut(error, axis), _cut(b, axis), _cut(kept, axis), ROUNDINGS * limits.eps)
        for axis in (None, *axes)
    }


def _cut(values: Tensor, axis: int | None) -> Tensor:
    """``(columns, values)``."""
    return values.reshape(1, -1) if axis is None else values.movedim(axis, 0).flatten(1)


def _empty(original: Tensor) -> Tensor:
    """Where there is no number, or the largest."""
    return ~original.isfinite() | (original.abs() >= torch.finfo(original.dtype).max)


def _blank(original: Tensor, fill: float | None) -> Tensor:
    """Where there is no value."""
    return _empty(original) if fill is None else _empty(original) | (original == fill)


def _fill(original: Tensor) -> float | None:
    """The number that stands where there is no value: the least or greatest one, if it is there more than once, large,
    and further from all others than they are from each other."""
    values = original[~_empty(original)]
    if not values.numel():
        return None
    low, high = (float(end) for end in values.aminmax())
    for fill in (low, high):
        if abs(fill) < FILL:
            continue
        there = values == fill
        others = values[~there]
        if others.numel() > 1 and int(there.sum()) > 1:
            least, greatest = (float(end) for end in others.aminmax())
            if 0 < greatest - least < min(abs(fill - least), abs(fill - greatest)):
                return fill
    return None
