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
- Masks are no scale: where magnitudes have a gap (:mod:`normswap.graph.magnitudes`), the values below it are measured
  by themselves too, unless their own floor says that they are noise. The extremes of a dtype count as infinities.
- One run is one sample of rounding. Where the candidate is above its floor, the reference runs three times more with
  every weight and buffer off by up to one :math:`\epsilon`, and the floor is that of the run that is furthest off; not
  where the reference makes no error, nor of integers, nor where a fresh copy of it does not give the same again.
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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from normswap.errors import NormswapError
from normswap.verification.measures import CHANNEL_FACTOR, FEW, Measured, Row, epsilon_of

FACTOR = 4.0
"""How many noise floors the largest error may reach.

Two correct programs stay below 2: see ``docs/verification.md`` for the models, dtypes and runtimes it was measured on.
"""
MEAN_FACTOR = 6.0
"""The same for the root of the mean square; the most seen is 3.1, of a network that magnifies rounding."""
ULPS = 4.0
"""Machine epsilons of the output's scale that are allowed beside, for outputs whose own floor is zero."""
MEAN_ULPS = 1.0
"""The same for the root of the mean square."""


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
        usual = [other for other in group if other is found or not other.raised]
        floors = [_relative(other.row, group).floor if epsilon else other.row.floor for other in usual]
        allowed = FACTOR * _lifted(row.floor, floors, row) + ULPS * epsilon
    excess, measure = _times(row.relative, allowed), "largest" if epsilon else "share"
    if row.floor is not None and epsilon:
        for other, name in (*_other_measures(found, group, epsilon), *_inner_measures(found, group)):
            if other > excess and (excess <= 1 or other > 1):
                excess, measure = other, name
    if not all(map(math.isfinite, (row.scale, row.relative, allowed))):
        return replace(row, verdict="inconclusive", problem="the outputs are too large to be compared")
    row = replace(row, allowed=allowed, excess=excess, measure=measure)
    row = replace(row, verdict="equivalent" if excess <= 1 else "different")
    if _chaotic(row, found.coarsest):
        problem = f"the reference's own error is {row.floor:.2g} of the output's scale: it is random or chaotic"
        return replace(row, verdict="inconclusive", problem=problem)
    return row


def _chaotic(row: Row, coarsest: float) -> bool:
    epsilon = epsilon_of(row.dtype)
    return row.floor is not None and row.floor > (max(epsilon, coarsest) ** (1 / 3) if epsilon else 0.1)


def _inner_measures(found: Measured, group: Sequence[Measured]) -> list[tuple[float, str]]:
    """Those of the values below each gap, where these are not noise."""
    measures = []
    for index, each in enumerate(found.inner):
        row = _judged(each, [other.inner[index] for other in group if len(other.inner) > index])
        if row.verdict != "inconclusive":
            measures.append((row.excess, f"{row.measure} of the values below {row.scale:.1e}"))
    return measures


def _other_measures(found: Measured, group: Sequence[Measured], epsilon: float) -> list[tuple[float, str]]:
    scale = max(found.mean_scale, _middle(each.mean_scale for each in group)) or 1.0
    usual = (each for each in group if each is found or not each.raised)
    floors = [each.mean_floor / scale if each.mean_floor is not None else None for each in usual]
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


def _middle(values: Iterable[float]) -> float:
    """The median, without overflow."""
    return statistics.median(value / 2 for value in values) * 2


def _times(error: float, allowed: float) -> float:
    return error / allowed if allowed else math.inf if error else 0.0


def _relative(row: Row, group: Sequence[Measured]) -> Row:
    scale = max(row.scale, _middle(other.row.scale for other in group))
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
