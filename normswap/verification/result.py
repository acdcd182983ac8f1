"""What a comparison found, as values."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, Literal

from normswap.verification.inputs import Variation
from normswap.verification.measures import Row

Cause = Literal["model", "exporter", "runtime", "runtime optimizations"]


CAUSES: dict[Cause, str] = {
    "model": "the candidate itself computes otherwise",
    "exporter": "the exported graph computes something else than the module",
    "runtime": "the runtime computes this node otherwise than ONNX's reference implementation",
    "runtime optimizations": "the runtime's graph optimizations; without them the same file is right",
}


@dataclass(frozen=True)
class Layer:
    """One value inside a network, in execution order, on one set of inputs."""

    name: str
    """Dotted name of the module that computes it; for an operator in between, the module whose code calls it."""
    kind: str
    """Class of the module, or name of the operator."""
    error: float | None
    """Largest error relative to the truth's scale; ``None`` where the reference has no such value."""
    floor: float | None
    """The reference's own."""
    excess: float | None
    """The error in units of what is allowed there, by the measure that says most."""
    like: str = ""
    """The reference's value that it was compared with, where it is another than that of the same name."""
    allowed: float | None = None
    """What ``error`` may be at most."""


@dataclass(frozen=True)
class Location:
    """Where a run first leaves the noise floor."""

    run: str
    name: str
    """Dotted name of the module; the empty name is the model itself."""
    kind: str
    cause: Cause
    inputs: str
    """The set of inputs it was found on."""
    detail: str = ""
    """What more is known: the operator, or the place in the module's code."""
    around: tuple[Layer, ...] = ()
    """The figures at the place, and just before and behind it."""

    def __str__(self) -> str:
        place = f"{self.name or 'the model itself'} ({self.kind})"
        told = f"{self.run}: first differs in {place}"
        told += f", {self.detail}" if self.detail else ""
        return f"{told}; cause: {CAUSES[self.cause]}"


@dataclass(frozen=True)
class Profile:
    """The values inside one run along the depth of the network."""

    run: str
    inputs: str
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found. Truthy when equivalent; ``str()`` is a report; :meth:`to_dict` goes to JSON."""

    equivalent: bool
    backend: str
    criterion: str
    rows: tuple[Row, ...]
    inputs: tuple[Variation, ...]
    notes: tuple[str, ...] = ()
    locations: tuple[Location, ...] = ()
    """For each run that differs, where it first does, as far as that could be found."""
    profiles: tuple[Profile, ...] = ()
    """Errors along the depth: of the runs that differ, or of all with ``layers=True``."""

    def __bool__(self) -> bool:
        return self.equivalent

    def to_dict(self) -> dict[str, Any]:
        """Everything in types that JSON has; a number that is not finite becomes ``None``."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    def worst(self) -> dict[tuple[str, str], Row]:
        """By run and output, the row of the set of inputs that says most against it."""
        return {key: max(rows, key=severity) for key, rows in self.grouped().items()}

    def grouped(self) -> dict[tuple[str, str], list[Row]]:
        """The rows of all sets of inputs by run and output."""
        groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
        for row in self.rows:
            groups[row.run, row.output].append(row)
        return groups

    def remarks(self) -> list[str]:
        """One line for every run and output that is not equivalent, then one for every place found."""
        lines = []
        for (run, output), rows in self.grouped().items():
            worst = max(rows, key=severity)
            if worst.verdict != "equivalent":
                count = sum(row.verdict == worst.verdict for row in rows)
                reason = worst.problem or f"{worst.excess:.3g} times the allowed error ({worst.measure})"
                sets = f"{count} of {len(rows)} sets of inputs"
                lines.append(f"{run}, {output}: {worst.verdict} on {sets}; on {worst.inputs}: {reason}")
        return lines + [str(location) for location in self.locations]

    def __str__(self) -> str:
        verdict = "equivalent" if self.equivalent else "NOT equivalent"
        lines = [f"{verdict} on {len(self.inputs)} sets of inputs", f"criterion: {self.criterion}"]
        table = [COLUMNS, *((run, output, *cells(self, run, output)) for run, output in self.grouped())]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for line in table:
            lines.append("  " + "  ".join(map(str.ljust, line, widths)).rstrip())
        lines.extend(self.remarks())
        lines.append("inputs: " + "; ".join(variation.name for variation in self.inputs))
        lines.extend(f"note: {note}" for note in self.notes)
        return "\n".join(lines)


COLUMNS = ("run", "output", "max abs", "mean abs", "relative", "floor", "of allowed", "SQNR dB", "top-1", "verdict")


def cells(found: Verification, run: str, output: str) -> tuple[str, ...]:
    """What a table says of one output of one run: that of the worst set of inputs, and the worst agreement."""
    rows = found.grouped()[run, output]
    worst = max(rows, key=severity)
    agreements = [row.agreement for row in rows if row.agreement is not None]
    numbers = (worst.max_abs, worst.mean_abs, worst.relative, worst.floor)
    top = f"{min(agreements):.1%}" if agreements else ""
    figures = ("" if number is None else f"{number:.2e}" for number in numbers)
    return (*figures, f"{worst.excess:.3g}", f"{worst.sqnr:.1f}", top, worst.verdict)


def severity(row: Row) -> tuple[int, bool, float]:
    """Orders rows by what they say against equivalence."""
    rank = {"equivalent": 0, "inconclusive": 1, "different": 2}[row.verdict]
    return rank, row.problem is not None, row.excess


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {key: _plain(entry) for key, entry in asdict(value).items()}
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list | Sequence) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
