"""What an examination found, as values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from normswap.calibration.report import aligned
from normswap.engine.sites import Site
from normswap.health.checks import SEVERITIES, Finding, Severity
from normswap.health.measure import Measured
from normswap.health.placement import Placement

SHOWN = 3
"""Names that a summary of findings gives."""


@dataclass(frozen=True)
class Summary:
    """A tensor of a norm over its channels."""

    least: float
    low: float
    """A tenth of the channels lies below."""
    median: float
    high: float
    """A tenth lies above."""
    largest: float

    @classmethod
    def of(cls, tensor: Tensor | None) -> Summary | None:
        """``None`` for a tensor that is not there, has no values, or none that are finite."""
        if tensor is None or tensor.is_meta or not tensor.is_floating_point():
            return None
        values = tensor.detach().double().cpu().flatten()
        values = values[values.isfinite()]
        if not values.numel():
            return None
        points = torch.tensor([0, 0.1, 0.5, 0.9, 1], dtype=torch.float64)
        return cls(*torch.quantile(values[: 1 << 20], points).tolist())


@dataclass(frozen=True)
class NormHealth:
    """One norm: what it is, where it sits, whether it folds, and what was seen of it."""

    site: Site = field(repr=False)
    places: tuple[Placement, ...] = ()
    """Empty where no traced code calls it, or where there is no code."""
    into: tuple[str, ...] = ()
    """The layers that would absorb it in a fold."""
    stays: str | None = None
    """Why no layer absorbs it; ``None`` where one does, or where there is no code to tell."""
    measured: Measured | None = None

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def folds(self) -> str:
        """In words; empty where that is not known."""
        return f"into {', '.join(self.into)}" if self.into else f"no: {self.stays}" if self.stays else ""

    @property
    def place(self) -> str:
        """Where it sits, in words."""
        told = list(dict.fromkeys(map(str, self.places)))
        return f"{told[0]}, and {len(told) - 1} others" if len(told) > 1 else "".join(told)

    def summary(self, field: str) -> Summary | None:
        """Of ``weight``, ``bias``, ``running_mean`` or ``running_var``."""
        return None if self.site.norm is None else Summary.of(getattr(self.site.norm, field))

    def to_dict(self) -> dict[str, Any]:
        norm = self.site.norm
        tensors = {name: self.summary(name) for name in ("weight", "bias", "running_mean", "running_var")}
        return {
            "name": self.name,
            "aliases": list(self.site.aliases),
            "kind": None if norm is None else norm.kind,
            "channels": None if norm is None else norm.channels,
            "computes": None if norm is None else str(norm),
            "unknown": self.site.reason if norm is None else None,
            "places": [
                {"before": p.before, "then": list(p.then), "readers": list(p.readers), "role": p.role}
                for p in self.places
            ],
            "folds_into": list(self.into),
            "stays": self.stays,
            **{name: None if found is None else vars(found) for name, found in tensors.items()},
            "measured": None if self.measured is None else self.measured.to_dict(),
        }


@dataclass(frozen=True)
class Health:
    """The outcome of :func:`normswap.examine`: truthy when no finding is an error. ``str()`` is a summary."""

    norms: tuple[NormHealth, ...]
    """In the order of the modules."""
    findings: tuple[Finding, ...]
    """Errors first, then warnings, then notes."""
    notes: tuple[str, ...] = ()
    """What the findings rest on, and what was not looked at."""
    batches: int = 0
    loss: str | None = None
    """Of which the gradients are, and in which mode; ``None`` without."""
    depth: tuple[str, ...] = ()
    """The names of the norms in the order they run in, as far as it is known."""

    def __bool__(self) -> bool:
        return not self.errors

    @property
    def errors(self) -> tuple[Finding, ...]:
        return self.of("error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        return self.of("warning")

    def of(self, severity: Severity) -> tuple[Finding, ...]:
        return tuple(each for each in self.findings if each.severity == severity)

    @property
    def counts(self) -> dict[str, int]:
        """How many findings there are of each severity."""
        counter = Counter(each.severity for each in self.findings)
        return {severity: counter[severity] for severity in SEVERITIES}

    @property
    def verdict(self) -> str:
        """The counts in words."""
        told = [f"{n} {name}{'' if n == 1 else 's'}" for name, n in self.counts.items() if n]
        return f"health: {', '.join(told)}" if told else "health: nothing found"

    def grouped(self) -> Iterator[tuple[Severity, str, list[Finding]]]:
        """Findings of one severity and check together, in order."""
        groups: dict[tuple[Severity, str], list[Finding]] = {}
        for each in self.findings:
            groups.setdefault((each.severity, each.check), []).append(each)
        for (severity, check), found in groups.items():
            yield severity, check, found

    def to_dict(self) -> dict[str, Any]:
        return {
            "healthy": bool(self),
            "counts": self.counts,
            "findings": [each.to_dict() for each in self.findings],
            "norms": [norm.to_dict() for norm in self.norms],
            "notes": list(self.notes),
            "batches": self.batches,
            "loss": self.loss,
        }

    def lines(self) -> Iterator[str]:
        """The findings in words, one check after the other."""
        for severity, check, found in self.grouped():
            yield f"{severity} {check}: {named([each.site for each in found])}"
            more = "" if len(found) == 1 or all(each.what == found[0].what for each in found) else f" ({found[0].site})"
            yield f"  what: {found[0].what}{more}"
            yield f"  why:  {found[0].why}"
            yield f"  mend: {found[0].mend}"
        yield from (f"note: {note}" for note in self.notes)
        yield self.verdict

    def __str__(self) -> str:
        head = ("name", "computes", "where", "folds")
        rows = ((n.name or "(root)", n.site.label, n.place, n.folds) for n in self.norms)
        table = aligned([head, *rows]) if self.norms else ["no normalization found"]
        return "\n".join([*table, "", *self.lines()])


def named(names: Sequence[str]) -> str:
    """A few of many names."""
    names = [name or "(root)" for name in dict.fromkeys(names)]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def ordered(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Errors first; within a severity as they came, those of one check together."""
    checks = {each.check: place for place, each in reversed(list(enumerate(findings)))}
    return tuple(sorted(findings, key=lambda each: (SEVERITIES.index(each.severity), checks[each.check])))
