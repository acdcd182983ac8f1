"""One output of one run on one set of inputs: its error against the truth, and that of the reference.

What the figures mean is told in :mod:`normswap.verification.criterion`, which judges by them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from normswap.graph.magnitudes import boundless, levels

CHANNEL_FACTOR = 16.0
"""The same for that of one channel, the worst of many."""
FEW = 64
"""Below this many values the largest error of an output varies too much from one input to the next to be a measure."""

Verdict = Literal["equivalent", "different", "inconclusive"]


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
    raised: bool = False
    """Whether the floor is that of another sample of rounding than the reference's own run."""
    inner: tuple[Measured, ...] = ()
    """The same of the values below each gap in the magnitudes."""


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
    if known and own.is_floating_point() and wide.is_floating_point():
        beyond = wide.isfinite() & (wide.abs() > torch.finfo(own.dtype).max)
        if beyond.any():
            own, noise, got = (boundless(each, beyond) for each in (own, noise, got))
            wide = torch.where(beyond, wide.sign() * torch.inf, wide)
    alike = [other for other in others if isinstance(other, Tensor) and other.shape == own.shape]
    found = _measured(row, own, wide, noise, got, tolerance, coarsest, alike)
    if not known or not epsilon_of(own.dtype) or found.row.problem is not None or tolerance is not None:
        return found
    inner = []
    for inside in islice(levels(wide), 1, None):
        small, more = replace(row, shape=(int(inside.sum()),)), [other[inside] for other in alike]
        inner.append(_measured(small, own[inside], wide[inside], noise[inside], got[inside], None, coarsest, more))
    return replace(found, inner=tuple(inner))


def _measured(
    row: Row,
    own: Tensor,
    wide: Any,
    noise: Any,
    got: Tensor,
    tolerance: tuple[float, float] | None,
    coarsest: float,
    others: Sequence[Tensor],
) -> Measured:
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
        if others and epsilon and own_error.any():
            own_error = max(own_error, *(_difference(other, truth)[0] for other in others), key=_mean)
            found = replace(found, raised=True)
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
    most = _largest(error)
    return most * float(torch.linalg.vector_norm(error / most)) / math.sqrt(error.numel()) if most else 0.0


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
