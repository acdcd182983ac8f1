"""What a report says, whatever its form: a verdict in words, the places where runs differ, the versions."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from normswap.calibration import Calibration
from normswap.engine import Plan
from normswap.health import Health
from normswap.report import (
    Section,
    around_section,
    calibration_section,
    findings_section,
    measured_sections,
    norms_section,
    outputs_section,
    plan_report,
    problems_section,
    tally,
)
from normswap.verification import Location, Verification
from normswap.verification.result import CAUSES
from normswap.version import __version__

Outcome = Literal["equivalent", "different", "inconclusive", "unverified", "healthy", "doubtful", "ill"]

HEADINGS: dict[Outcome, str] = {
    "equivalent": "Equivalent",
    "different": "Not equivalent",
    "inconclusive": "Inconclusive",
    "unverified": "Not verified",
    "healthy": "Healthy",
    "doubtful": "Warnings",
    "ill": "Errors",
}

FLOOR = (
    "Equivalent means that every output is as near to the float64 truth as the reference itself is, "
    "within a small factor: the rounding error that the reference makes anyway is the noise floor."
)
TOLERANCE = "Equivalent means that every value is within the tolerances that were asked for."
WIDER = (
    "Equivalent means that every output is near to that of the reference in its own dtype: "
    "the reference does not run in float64, so how much of the distance is rounding is not known."
)

PACKAGES = ("torch", "onnx", "onnxruntime", "onnxscript", "numpy")


@dataclass(frozen=True)
class Place:
    """One place where runs first differ, and which."""

    first: Location
    runs: tuple[str, ...]
    detail: str = ""

    @property
    def name(self) -> str:
        return self.first.name or "the model itself"

    @property
    def cause(self) -> str:
        told = CAUSES[self.first.cause]
        return f"{told[0].upper()}{told[1:]}."

    @property
    def excess(self) -> float | None:
        """The error there in units of what is allowed."""
        found = [layer.excess for layer in self.first.around if layer.name == self.first.name and layer.excess]
        return max(found, default=None)


@dataclass(frozen=True)
class Content:
    """What is reported: a verification, a plan and a calibration, any of them, or the health of norms."""

    verification: Verification | None = None
    plan: Plan | None = None
    title: str = "normswap"
    calibration: Calibration | None = None
    health: Health | None = None

    @property
    def outcome(self) -> Outcome:
        if self.health is not None:
            return "ill" if self.health.errors else "doubtful" if self.health.warnings else "healthy"
        if self.verification is None:
            return "unverified"
        if self.verification:
            return "equivalent"
        different = any(row.verdict == "different" for row in self.verification.rows)
        return "different" if different else "inconclusive"

    @property
    def heading(self) -> str:
        return HEADINGS[self.outcome]

    @property
    def summary(self) -> str:
        """What was compared and what came out, in one sentence."""
        if self.health is not None:
            norms = tally([norm.site for norm in self.health.norms]) if self.health.norms else "No norm found"
            return f"{norms}. {self.health.verdict[0].upper()}{self.health.verdict[1:]}."
        verification = self.verification
        if verification is None:
            return f"{self._fitted}Nothing was compared with the original."
        worst = verification.worst()
        runs, outputs = ({key[part] for key in worst} for part in (0, 1))
        counts = [
            _count(len(runs), "run"),
            _count(len(outputs), "output"),
            f"{_count(len(verification.inputs), 'set')} of inputs",
        ]
        told = f"Compared: {', '.join(counts)}"
        most = max((row.excess for row in worst.values() if row.problem is None), default=0.0)
        if verification:
            return f"{told}. The error is at most {most:.0%} of what is allowed."
        return f"{told}. The error reaches {figure(most)} times what is allowed." if most > 1 else f"{told}."

    @property
    def _fitted(self) -> str:
        found = self.calibration
        if found is None or found.fit not in found.scores:
            return ""
        norms, batches = _count(len(found.sites), "norm"), f"{found.batches} batch{'' if found.batches == 1 else 'es'}"
        return f"Calibrated: {norms} on {batches}; R² of the model's output: {found.scores[found.fit]:.3f}. "

    @property
    def criterion(self) -> str:
        """The criterion in one plain sentence."""
        rows = () if self.verification is None else self.verification.rows
        measured = [row for row in rows if row.problem is None]
        if any(row.allowed is None for row in measured):
            return TOLERANCE
        return FLOOR if not measured or any(row.floor is not None for row in measured) else WIDER

    @property
    def places(self) -> list[Place]:
        """Where runs first differ, those that differ at one place for one cause taken together."""
        groups: dict[tuple[str, str, str], list[Location]] = {}
        for each in () if self.verification is None else self.verification.locations:
            groups.setdefault((each.name, each.kind, each.cause), []).append(each)
        return [
            Place(
                group[0],
                tuple(dict.fromkeys(each.run for each in group)),
                ", ".join(dict.fromkeys(each.detail for each in group if each.detail)),
            )
            for group in groups.values()
        ]

    def tables(self) -> Iterator[Section]:
        """The tables that say what was found, the most telling first."""
        if self.calibration is not None:
            yield calibration_section(self.calibration)
        if self.verification is not None:
            for section in (problems_section, outputs_section, around_section):
                yield section(self.verification)

    def inputs(self) -> Section:
        """The sets of inputs, and how to draw those that are random again."""
        rows = tuple(
            tuple("" if value is None else f"{value:g}" if isinstance(value, float) else str(value) for value in values)
            for values in (
                (each.name, each.seed, each.magnitude, each.batch, each.size)
                for each in (() if self.verification is None else self.verification.inputs)
            )
        )
        return Section("Inputs", ("set", "seed", "magnitude", "batch", "size"), rows)

    def plan_tables(self) -> tuple[Section, ...]:
        return () if self.plan is None else tuple(each for each in plan_report(self.plan).sections if each.rows)

    def health_tables(self) -> tuple[Section, ...]:
        """Findings one by one, norms, and what was measured of them."""
        if self.health is None:
            return ()
        sections = (
            findings_section(self.health), norms_section(self.health.norms), *measured_sections(self.health)
        )  # fmt: skip
        return tuple(section for section in sections if section.rows)

    def notes(self) -> list[str]:
        parts = (self.verification, self.plan, self.health)
        return [note for part in parts if part is not None for note in part.notes]

    @property
    def versions(self) -> str:
        return ", ".join(f"{name} {version}" for name, version in versions())


def versions() -> Iterator[tuple[str, str]]:
    """This package, Python, and what else is installed of the packages that matter to a result."""
    yield "normswap", __version__
    yield "Python", platform.python_version()
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def figure(number: float) -> str:
    """A number for reading: three digits, thousands apart."""
    return f"{number:,.0f}" if 100 <= number < 1e6 else f"{number:.3g}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
