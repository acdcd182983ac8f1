r"""The measure: a candidate's error against the reference's own rounding error, instead of a guessed tolerance.

Two programs for one function differ by rounding: they sum in another order, fuse a multiply with an add, approximate an
exponential by another polynomial. No fixed tolerance fits every depth and dtype. So with :math:`t` the reference run in
float64 (the *truth*), :math:`r` the reference in its own dtype, :math:`c` the candidate, and :math:`|\cdot|_S` an error
relative to the truth's own size, the reference's error :math:`|r - t|_S` is its **noise floor**, and the candidate is
equivalent when for every output and every set of inputs

.. math::  |c - t|_S \;\le\; F \cdot |r - t|_S + U \cdot \epsilon

by each of three measures, :math:`\epsilon` being the machine epsilon of the output's dtype:

=========  ==============================  =====================================  =================
measure    error                           relative to                            sees best
=========  ==============================  =====================================  =================
largest    greatest absolute difference    greatest absolute value                one wrong value
mean       root of the mean square         root of the mean square                a small change of all values
channel    root of the mean square         the same, of that channel (axis 1)     one wrong channel among large ones
=========  ==============================  =====================================  =================

- Luck can make a floor low or a value near zero. A floor or a scale below its median over all inputs is lifted to
  that median, that of a channel also to the median over the channels; the floor of an output with fewer than ``FEW``
  values is twice the largest one. Channels with fewer than ``FEW`` values are not judged one by one.
- One run is one sample of rounding. Where the candidate is above its floor, the reference runs three times more with
  every weight and buffer off by up to one :math:`\epsilon`, and the floor is that of the run that is furthest off.
- A floor above :math:`\epsilon^{1/3}` (0.5 % of the scale in float32) can prove nothing: random or chaotic outputs are
  *inconclusive*, which is not equivalent. Here :math:`\epsilon` is that of the reference's coarsest parameters if that
  is larger: half precision is not random when its output is cast to float32.
- For a float64 output the floor is that of the same model in float32, scaled by the ratio of the epsilons: to first
  order, rounding error is proportional to epsilon. Where its own error is larger, it was cast to float64 too late.
- Integer and boolean outputs: the error is the share of values that differ, with no :math:`U \epsilon`.
- Non-finite values must stand where the reference has them.
- Where a float64 run is impossible, :math:`r` stands for :math:`t`, and the largest error must be at most
  :math:`\epsilon^{2/3}` (2.4e-5 in float32): a wider criterion, and the report says so.

With tolerances of one's own, :math:`|c - r| \le a + b\,|r|` must hold for every value instead.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from normswap.errors import NormswapError

FACTOR = 4.0
"""How many noise floors the largest error may reach.

Two correct programs stay below 2: see ``docs/verification.md`` for the models, dtypes and runtimes it was measured on.
"""
MEAN_FACTOR = 6.0
"""The same for the root of the mean square; the most seen is 3.1, of a network that magnifies rounding."""
CHANNEL_FACTOR = 16.0
"""The same for that of one channel, the worst of many."""
FEW = 64
"""Below this many values the largest error of an output varies too much from one input to the next to be a measure."""
ULPS = 4.0
"""Machine epsilons of the output's scale that are allowed beside, for outputs whose own floor is zero."""
MEAN_ULPS = 1.0
"""The same for the root of the mean square."""

Verdict = Literal["equivalent", "different", "inconclusive"]


@dataclass(frozen=True)
class Tolerance:
    """A user's ``atol`` and ``rtol``, for all outputs or by the name of the output."""

    atol: float | Mapping[str, float] | None = None
    rtol: float | Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for name, value in (("atol", self.atol), ("rtol", self.rtol)):
            for number in value.values() if isinstance(value, Mapping) else () if value is None else (value,):
                if not isinstance(number, int | float) or isinstance(number, bool) or not 0 <= number < math.inf:
                    raise NormswapError(f"{name} is {number!r}; it must be a number of at least 0")

    def of(self, output: str) -> tuple[float, float] | None:
        """``atol`` and ``rtol`` of an output, or ``None`` where none is given for it."""
        found = [value.get(output) if isinstance(value, Mapping) else value for value in (self.atol, self.rtol)]
        if found == [None, None]:
            return None
        return found[0] or 0.0, found[1] or 0.0

    def check(self, outputs: Sequence[str]) -> None:
        """Raise :class:`NormswapError` for a name that is no output's."""
        for argument, value in (("atol", self.atol), ("rtol", self.rtol)):
            for name in value if isinstance(value, Mapping) else ():
                if name not in outputs:
                    raise NormswapError(f"{argument} names the output {name!r}; there is: {', '.join(outputs)}")

    def __bool__(self) -> bool:
        return self.atol is not None or self.rtol is not None


@dataclass(frozen=True)
class Row:
    """One output of one run on one set of inputs."""

    run: str
    output: str
    inputs: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    max_abs: float = 0.0
    """Largest absolute error against the truth, over finite values."""
    mean_abs: float = 0.0
    """Mean absolute error, likewise."""
    noise: float | None = None
    """``max_abs`` of the reference in its own dtype; ``None`` where it does not run in float64."""
    scale: float = 0.0
    """The truth's largest absolute value, or the median of those over all inputs where that is larger."""
    relative: float = 0.0
    """``max_abs / scale``; for integer and boolean outputs the share of values that differ."""
    floor: float | None = None
    """The reference's own relative error; ``None`` where it does not run in float64."""
    allowed: float | None = None
    """What ``relative`` may be at most; ``None`` under tolerances of the user's."""
    excess: float = 0.0
    """The error in units of what is allowed, by the measure where that is most."""
    measure: str = "largest"
    """That measure: ``largest``, ``mean``, ``channel N``, ``share`` (of integers) or ``tolerance``."""
    sqnr: float = math.inf
    """Signal to noise ratio in dB; infinite for no error."""
    agreement: float | None = None
    """For an output of shape (N, classes): share of rows with the truth's arg-max."""
    non_finite: int = 0
    """Values that are not finite where the reference's are, or the other way round."""
    verdict: Verdict = "different"
    problem: str | None = None
    """Why there is nothing to measure, or why the measure proves nothing."""


@dataclass(frozen=True)
class Measured:
    """A row and what :func:`judge` needs beside it, in units of the epsilon-free relative error."""

    row: Row
    mean: float = 0.0
    mean_floor: float | None = None
    mean_scale: float = 0.0
    channel: int | None = None
    """The channel whose error stands out most from its floor."""
    channel_error: float = 0.0
    """That error in units of its lifted floor."""
    coarsest: float = 0.0
    """Epsilon of the coarsest dtype that the reference computes in."""
    outside: float | None = None
    """Under tolerances: the largest error in units of what they allow."""


def epsilon_of(dtype: torch.dtype | str) -> float:
    """Machine epsilon; 0 for integers, booleans and what is no tensor."""
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(kind, torch.dtype) or not (kind.is_floating_point or kind.is_complex):
        return 0.0
    return torch.finfo(kind).eps


def measure(
    row: Row,
    own: Tensor,
    wide: Any,
    noise: Any,
    got: Tensor,
    tolerance: tuple[float, float] | None = None,
    coarsest: float = 0.0,
    others: Sequence[Any] = (),
) -> Measured:
    """``row`` with the errors of ``got`` filled in; what depends on the other inputs is left to :func:`judge`.

    ``own`` is the reference in its own dtype, ``wide`` in float64 and ``noise`` the run whose error is the floor, both
    ``None`` where there is no float64 run; ``others`` are more runs like ``noise``; all of one shape.
    """
    known = isinstance(wide, Tensor) and isinstance(noise, Tensor) and wide.shape == noise.shape == own.shape
    truth = wide if known else own
    mismatched = truth.isfinite() & ~(got.isfinite() & own.isfinite()) & ~_alike(got, own)
    mismatched |= ~truth.isfinite() & ~_alike(got, truth) & ~_alike(got, own)
    epsilon = epsilon_of(own.dtype)
    error, clean = _difference(got, truth)
    found = Measured(row, mean=_mean(error), mean_scale=_mean(clean), coarsest=coarsest)
    floor = share = None
    if known:
        own_error, _ = _difference(noise, truth)
        alike = [other for other in others if isinstance(other, Tensor) and other.shape == truth.shape]
        if alike:
            own_error = max(own_error, *(_difference(other, truth)[0] for other in alike), key=_mean)
        own_error *= epsilon / epsilon_of(noise.dtype) if epsilon else 1.0
        if noise is not own:  # A float64 output need not have been computed in float64.
            own_error = torch.maximum(own_error, _difference(own, truth)[0])
        floor, share = _largest(own_error), _share(own_error)
        found = replace(found, mean_floor=_mean(own_error))
        if epsilon and own.dim() > 2 and own.numel() // max(1, own.shape[1]) >= FEW:
            channel, channel_error = _worst_channel(error, own_error, epsilon * found.mean_scale)
            found = replace(found, channel=channel, channel_error=channel_error)
    power, power_of_error = found.mean_scale, found.mean
    agreement = None
    if own.dim() == 2 and own.shape[1] > 1 and own.numel() and own.is_floating_point():
        agreement = float((got.argmax(1) == truth.argmax(1)).double().mean())
    if tolerance is not None:
        found = replace(found, outside=_outside(got, own, *tolerance))
    row = replace(
        row,
        max_abs=_largest(error),
        mean_abs=float(error.mean()) if error.numel() else 0.0,
        scale=_largest(clean),
        noise=floor,
        floor=share,
        relative=_share(error),
        sqnr=_decibels(power, power_of_error),
        agreement=agreement,
        non_finite=int(mismatched.sum()),
        problem=f"{int(mismatched.sum())} non-finite values differ" if mismatched.any() else None,
    )
    if own.numel() and row.problem is None and not own.isfinite().any():
        row = replace(row, verdict="inconclusive", problem="no value of the reference is finite, which says nothing")
    return replace(found, row=row)


def _alike(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def _difference(got: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """The absolute error and the absolute truth in float64, both 0 where either is not finite."""
    wide = torch.complex128 if truth.is_complex() else torch.float64
    finite = got.isfinite() & truth.isfinite()
    truth = torch.where(finite, truth.to(wide), 0)
    return (torch.where(finite, got.to(wide), 0) - truth).abs(), truth.abs()


def _largest(error: Tensor) -> float:
    return float(error.max()) if error.numel() else 0.0


def _share(error: Tensor) -> float:
    return float((error > 0).double().mean()) if error.numel() else 0.0


def _mean(error: Tensor) -> float:
    """Root of the mean square, without overflow on the way."""
    return float(torch.linalg.vector_norm(error)) / math.sqrt(error.numel()) if error.numel() else 0.0


def _decibels(signal: float, noise: float) -> float:
    return math.inf if noise == 0 else 20 * math.log10(signal / noise) if signal else -math.inf


def _worst_channel(error: Tensor, floor: Tensor, least: float) -> tuple[int, float]:
    """The channel (axis 1) with the largest error in units of its floor, which is lifted to the median of all."""
    axes = [axis for axis in range(error.dim()) if axis != 1]
    floors = floor.square().mean(axes).sqrt()
    floors = torch.maximum(floors, floors.median()) + least / CHANNEL_FACTOR
    ratio = torch.where(floors > 0, error.square().mean(axes).sqrt() / floors, 0.0)
    worst = int(ratio.argmax())
    return worst, float(ratio[worst])


def _outside(got: Tensor, own: Tensor, atol: float, rtol: float) -> float:
    error, size = _difference(got, own)
    allowed = atol + rtol * size
    ratio = torch.where(error == 0, 0.0, error / allowed)
    return _largest(ratio)


def judge(found: Sequence[Measured]) -> list[Row]:
    """Complete what needs the same output on all inputs: scale, relative error, floor, what is allowed, verdict."""
    groups: dict[tuple[str, str], list[Measured]] = defaultdict(list)
    for each in found:
        groups[each.row.run, each.row.output].append(each)
    return [_judged(each, groups[each.row.run, each.row.output]) for each in found]


def _judged(found: Measured, group: Sequence[Measured]) -> Row:
    row = found.row
    if row.problem is not None:
        return row
    epsilon = epsilon_of(row.dtype)
    if epsilon:
        row = _relative(row, group)
    if found.outside is not None:
        within = found.outside <= 1
        return replace(row, excess=found.outside, measure="tolerance", verdict="equivalent" if within else "different")
    if row.floor is None:
        allowed = epsilon ** (2 / 3)
    else:
        floors = [_relative(other.row, group).floor if epsilon else other.row.floor for other in group]
        allowed = FACTOR * _lifted(row.floor, floors, row) + ULPS * epsilon
    excess, measure = _times(row.relative, allowed), "largest" if epsilon else "share"
    if row.floor is not None and epsilon:
        for other, name in _other_measures(found, group, epsilon):
            if other > excess and (excess <= 1 or other > 1):
                excess, measure = other, name
    row = replace(row, allowed=allowed, excess=excess, measure=measure)
    row = replace(row, verdict="equivalent" if excess <= 1 else "different")
    if row.floor is not None and row.floor > (max(epsilon, found.coarsest) ** (1 / 3) if epsilon else 0.1):
        problem = f"the reference's own error is {row.floor:.2g} of the output's scale: it is random or chaotic"
        return replace(row, verdict="inconclusive", problem=problem)
    return row


def _other_measures(found: Measured, group: Sequence[Measured], epsilon: float) -> list[tuple[float, str]]:
    scale = max(found.mean_scale, statistics.median(each.mean_scale for each in group)) or 1.0
    floors = [each.mean_floor / scale if each.mean_floor is not None else None for each in group]
    assert found.mean_floor is not None
    allowed = MEAN_FACTOR * _lifted(found.mean_floor / scale, floors, found.row) + MEAN_ULPS * epsilon
    measures = [(_times(found.mean / scale, allowed), "mean")]
    if found.channel is not None:
        measures.append((found.channel_error / CHANNEL_FACTOR, f"channel {found.channel}"))
    return measures


def _lifted(floor: float, floors: Sequence[float | None], row: Row) -> float:
    """A floor that is low by luck, lifted to the usual one."""
    known = [each for each in floors if each is not None]
    return max(floor, 2 * max(known) if math.prod(row.shape) < FEW else statistics.median(known))


def _times(error: float, allowed: float) -> float:
    return error / allowed if allowed else math.inf if error else 0.0


def _relative(row: Row, group: Sequence[Measured]) -> Row:
    scale = max(row.scale, statistics.median(other.row.scale for other in group))
    floor = None if row.noise is None else row.noise / (scale or 1.0)
    return replace(row, scale=scale, relative=row.max_abs / (scale or 1.0), floor=floor)


def without_zeros(rows: Sequence[Row], notes: list[str]) -> list[Row]:
    """``rows``, inconclusive where the reference's floating-point outputs are zero throughout."""
    inexact = [row for row in rows if epsilon_of(row.dtype) and row.problem is None]
    zero = list(dict.fromkeys(row.output for row in inexact if row.scale == 0))
    if zero and all(row.scale == 0 for row in inexact):
        problem = "the reference's outputs are all zero, which says nothing"
        return [replace(row, verdict="inconclusive", problem=problem) if row in inexact else row for row in rows]
    notes.extend(f"{name} is all zero on some or all inputs, which says little" for name in zero)
    return list(rows)
