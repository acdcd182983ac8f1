"""What a calibration did: of every norm, how much of the original's output it explains, and what to do about the
worst."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from normswap.calibration.sites import Left
from normswap.spec import MAP, SPACE, Norm

WORST = 5
LOW = 0.5
"""Below this R² a norm is worth a word of advice."""
ROUNDING = 1e-6
"""A difference of R² below this is none."""


@dataclass(frozen=True)
class SiteFit:
    """One fitted norm. R² is the share of the variance of the original norm's output that its own explains, over
    samples, positions and channels: 1 at best, below 0 where the mean would do better."""

    name: str
    source: Norm
    target: Norm
    before: float
    """R² with the affine it had, all other norms as they were."""
    after: float
    """R² with the affine it got, the norms before it calibrated."""

    @property
    def advice(self) -> str | None:
        """What would keep more; ``None`` for a norm that keeps most."""
        if not self.after < LOW:
            return None
        keep = f"or keep it as {self.source.kind}: skip={self.name!r}"
        if self.target.pools == MAP and self.target.groups > 1:
            size = self.target.channels_per_group
            return f"fewer groups (now {self.target.groups} of {size} channels), {keep}"
        if self.target.pools == SPACE:
            return f"instance drops each sample's mean and scale of a channel: take group or layer, {keep}"
        return keep.removeprefix("or ")

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "was": str(self.source),
            "is": str(self.target),
            "r2_before": _number(self.before),
            "r2_after": _number(self.after),
            "advice": self.advice,
        }


@dataclass(frozen=True)
class Check:
    """Of the model's output, R² with respect to the reference's, before and after calibration."""

    fit: str
    """What had been taken."""
    before: float
    after: float
    batches: int
    """The number of batches run again that it was measured on; 0: on those of the scores, as they were fitted, which
    was worse already or is all that could be measured."""

    @property
    def put_back(self) -> bool:
        """Whether it was worse, or could not be measured, so that the model is as it was."""
        return not self.after >= self.before - ROUNDING

    def to_dict(self) -> dict[str, Any]:
        numbers = {"r2_before": _number(self.before), "r2_after": _number(self.after)}
        return {"fit": self.fit, **numbers, "batches": self.batches, "put_back": self.put_back}

    def __str__(self) -> str:
        where = f"on {self.batches} batches run again" if self.batches else "on the batches that were fitted"
        told = f"check {where}: R² of the model's output {_text(self.before)} before, {_text(self.after)} after"
        if math.isnan(self.before):
            return f"{told}; no output varies, so that nothing can be measured: the model is as it was"
        return f"{told}; {self.fit} made it worse: the model is put back as it was" if self.put_back else told


@dataclass(frozen=True)
class Calibration:
    """The outcome of :func:`normswap.calibrate`; ``str()`` is a table in execution order."""

    sites: tuple[SiteFit, ...]
    skips: tuple[Left, ...]
    fit: str
    """What was taken: ``"moments"``, ``"least_squares"``, ``"refined"``, or ``"unchanged"`` where nothing did better
    than the affines as they were."""
    scores: dict[str, float]
    """Of each way that was tried: R² of the model's output with respect to the reference's, on the batches of the last
    pass since heads were fitted while it went on (of the first, fourth, sixteenth ... window of those in flight)."""
    batches: int
    biases: tuple[str, ...] = ()
    """Layers whose bias took up a shift of the mean."""
    heads: tuple[str, ...] = ()
    """Layers behind the last fitted norm whose weight and bias were fitted."""
    check: Check | None = None
    """Whether the output came nearer; ``None`` where nothing was to be written, or with ``check=False``."""
    layers: tuple[str, ...] = ()
    """Layers whose weight the distillation moved."""

    @property
    def worst(self) -> tuple[SiteFit, ...]:
        """The norms that lose most, the worst first; at most five."""
        return tuple(sorted(self.sites, key=lambda site: site.after)[:WORST])

    def to_dict(self) -> dict[str, Any]:
        return {
            "fit": self.fit,
            "scores": {name: _number(score) for name, score in self.scores.items()},
            "batches": self.batches,
            "sites": [site.to_dict() for site in self.sites],
            "skips": [{"name": left.name, "reason": left.reason} for left in self.skips],
            "biases": list(self.biases),
            "heads": list(self.heads),
            "layers": list(self.layers),
            "check": None if self.check is None else self.check.to_dict(),
            "worst": [site.name for site in self.worst],
        }

    def __str__(self) -> str:
        counts = f"{len(self.sites)} norms fitted on {self.batches} batches, {len(self.skips)} left as they are"
        tried = ", ".join(f"{name} {_text(score)}" for name, score in self.scores.items())
        lines = [f"calibration: {counts}", f"taken: {self.fit}; R² of the model's output: {tried or 'not measured'}"]
        if self.check is not None:
            lines.append(str(self.check))
        if self.biases:
            lines.append(f"bias corrected: {', '.join(self.biases)}")
        if self.heads:
            lines.append(f"refitted: {', '.join(self.heads)}")
        if self.layers:
            lines.append(f"weight moved by distillation: {', '.join(self.layers)}")
        if self.sites:
            head = ("name", "was", "is", "R² before", "after", "advice")
            rows = (
                (s.name or "(root)", str(s.source), str(s.target), _text(s.before), _text(s.after), s.advice or "")
                for s in self.sites
            )
            lines += ["", *aligned([head, *rows])]
        if self.skips:
            lines += ["", *aligned([("left", "reason"), *((s.name or "(root)", s.reason) for s in self.skips)])]
        return "\n".join(lines)


@dataclass(frozen=True)
class Estimate:
    """New running statistics of one norm."""

    name: str
    norm: Norm
    shift: float
    """The root mean square over channels of the change of the mean, in new standard deviations."""
    ratio: float
    """The geometric mean over channels of new variance divided by old."""


@dataclass(frozen=True)
class Recalibration:
    """The outcome of :func:`normswap.recalibrate`; ``str()`` is a table in execution order."""

    sites: tuple[Estimate, ...]
    skips: tuple[Left, ...]
    batches: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "batches": self.batches,
            "sites": [
                {"name": s.name, "is": str(s.norm), "shift": _number(s.shift), "ratio": _number(s.ratio)}
                for s in self.sites
            ],
            "skips": [{"name": left.name, "reason": left.reason} for left in self.skips],
        }

    def __str__(self) -> str:
        counts = f"{len(self.sites)} norms from {self.batches} batches, {len(self.skips)} left as they are"
        lines = [f"recalibration: {counts}"]
        if self.sites:
            head = ("name", "is", "mean moved by (std)", "variance times")
            rows = ((s.name or "(root)", str(s.norm), _text(s.shift), _text(s.ratio)) for s in self.sites)
            lines += ["", *aligned([head, *rows])]
        if self.skips:
            lines += ["", *aligned([("left", "reason"), *((s.name or "(root)", s.reason) for s in self.skips)])]
        return "\n".join(lines)


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _text(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"


def aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Rows as lines with aligned columns, a rule under the first."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]
