"""Results for a reader at a terminal: a table where there is one, aligned plain text in a pipe or a file.

Nothing is printed here; the command line does that. JSON comes from the values themselves (``Plan.to_json``) and from
:func:`site_record`, for they have no more than that to say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from normswap.calibration import Calibration
from normswap.checkpoints.difference import Difference
from normswap.engine import Plan, Site
from normswap.health import Health, NormHealth
from normswap.verification import Layer, Verification
from normswap.verification.result import COLUMNS, cells

STYLES = {
    "exact": "green",
    "approximate": "yellow",
    "retrain": "magenta",
    "equivalent": "green",
    "inconclusive": "yellow",
    "different": "bold red",
    "NOT": "bold red",
    "error": "bold red",
    "warning": "yellow",
}
"""By a cell's text, or by the first word of a line."""

NARROW = 14
"""Characters that a column of a table needs."""


@dataclass(frozen=True)
class Section:
    """A titled table; every row has one text for each column."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def table(self) -> Table:
        table = Table(title=Text(self.title), title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
        for column in self.columns:
            table.add_column(column, overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
        return table

    def blocks(self) -> Iterator[Text]:
        """The rows one below the other, for a terminal too narrow for a table."""
        yield Text(self.title, style="bold")
        for row in self.rows:
            yield Text(row[0], style="bold")
            for column, cell in zip(self.columns[1:], row[1:], strict=True):
                if cell:
                    yield Text.assemble(f"  {column}: ", (cell, STYLES.get(cell, "")))

    def plain(self) -> Iterator[str]:
        yield self.title
        lines = (self.columns, *self.rows)
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        for line in lines:
            yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


@dataclass(frozen=True)
class Report:
    """Opening lines, sections and closing lines, which a rich console prints as tables; ``str()`` is the plain text."""

    sections: tuple[Section, ...]
    lines: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    text: str | None = None
    """Plain text that says the same, where the value reported has one of its own."""

    def __str__(self) -> str:
        if self.text is not None:
            return self.text
        parts = ["\n".join(section.plain()) for section in self.sections if section.rows]
        ends = ["\n".join(lines) for lines in (self.head, self.lines)]
        return "\n\n".join(part for part in (ends[0], *parts, ends[1]) if part)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from map(_styled, self.head)
        for section in self.sections:
            if section.rows and options.max_width < NARROW * len(section.columns):
                yield from section.blocks()
            elif section.rows:
                yield section.table()
        yield from map(_styled, self.lines)


def _styled(line: str) -> Text:
    return Text(line, style=STYLES.get(line.partition(" ")[0], ""))


def show(report: Report, console: Console) -> None:
    """Print ``report`` to ``console`` in the form that suits it."""
    if console.is_terminal:
        console.print(report)
    else:
        console.out(str(report), highlight=False)


def sites_report(sites: Sequence[Site]) -> Report:
    """Every normalization of a model: name, what it computes (or why that is not known), input shapes seen."""
    if not sites:
        return Report((), ("no normalization found",))
    return Report((norms_section([NormHealth(site) for site in sites]),), (tally(sites),))


def health_report(health: Health) -> Report:
    """Every normalization of a model, with where it sits and what becomes of it in a fold; then the findings."""
    if not health.norms:
        return Report((), ("no normalization found",))
    sections = (norms_section(health.norms), *measured_sections(health))
    *findings, verdict = health.lines()
    return Report(sections, (*findings, tally([norm.site for norm in health.norms]), verdict))


def norms_section(norms: Sequence[NormHealth]) -> Section:
    """One row for every normalization."""
    rows = tuple(
        (_names(s.name, s.aliases), str(s.norm) if s.norm else "?", norm.place, _shapes(s), norm.folds, s.reason or "")
        for norm, s in ((norm, norm.site) for norm in norms)
    )
    return _without_empty("Normalizations", ("name", "computes", "where", "input", "folds", "left as it is, for"), rows)


def tally(sites: Sequence[Site]) -> str:
    """How many there are of each kind."""
    kinds = Counter(site.norm.kind if site.norm else "unknown" for site in sites)
    return f"{len(sites)} found: {_counted(kinds)}"


def measured_sections(health: Health) -> Iterator[Section]:
    """What the batches showed of each norm."""
    seen = [(norm.name or "(root)", norm.measured) for norm in health.norms if norm.measured is not None]
    if not seen:
        return
    columns = ("name", "input", "output", "train-eval", "stale", "noise", "dead", "flat", "gradient", "gain")
    rows = tuple(
        (
            name,
            f"{m.input_mean:.3g} ± {m.input_std:.3g}",
            f"{m.output_mean:.3g} ± {m.output_std:.3g}",
            *("" if value is None else f"{value:.2f}" for value in (m.discrepancy, m.staleness, m.noise)),
            *("" if value is None else f"{value:.0%}" for value in (m.dead, m.saturated)),
            *("" if value is None else f"{value:.2g}" for value in (m.gradient, m.gain)),
        )
        for name, m in seen
    )
    gradients = "" if health.loss is None else f"; gradients of {health.loss}"
    count = f"{health.batches} batch{'' if health.batches == 1 else 'es'}"
    yield _without_empty(f"On {count}{gradients}", columns, rows)


def findings_section(health: Health) -> Section:
    """One row for every finding."""
    rows = tuple((each.severity, each.check, each.site or "(root)", each.what) for each in health.findings)
    return Section("Findings", ("severity", "check", "norm", "what"), rows)


def calibration_section(calibration: Calibration) -> Section:
    """One row for every fitted norm."""
    rows = tuple(
        (s.name or "(root)", str(s.source), str(s.target), f"{s.before:.3f}", f"{s.after:.3f}", s.advice or "")
        for s in calibration.sites
    )
    columns = ("norm", "was", "is", "R² before", "R² after", "advice")
    return _without_empty(f"Calibrated: {calibration.fit}", columns, rows)


def plan_report(plan: Plan) -> Report:
    """What a plan changes and at what price, what it leaves and why."""
    changes = tuple(
        (
            _names(change.name, change.aliases),
            str(change.source),
            change.becomes,
            change.exactness,
            "; ".join([*(f"loses {item}" for item in change.lost), *change.notes]),
        )
        for change in plan.changes
    )
    skips = tuple((_names(skip.name, skip.aliases), skip.was, skip.reason) for skip in plan.skips)
    kinds: Counter[str] = Counter(change.exactness for change in plan.changes)
    summary = f"{len(changes)} to change" + (f" ({_counted(kinds)})" if changes else "") + f", {len(skips)} skipped"
    return Report(
        (
            _without_empty("Changes", ("name", "was", "becomes", "exactness", "notes"), changes),
            Section("Merged", ("branches",), tuple((str(merge),) for merge in plan.merges)),
            Section("Skipped", ("name", "is", "reason"), skips),
        ),
        (*(f"note: {note}" for note in plan.notes), summary),
        text=str(plan),
    )


def differences_report(found: Sequence[Difference], same: int) -> Report:
    """The tensors that two checkpoints do not share."""
    rows = tuple(
        (each.name, each.what, each.before, each.after, "" if each.largest is None else f"{each.largest:.3g}")
        for each in found
    )
    section = _without_empty("Differences", ("name", "what", "before", "after", "largest difference"), rows)
    kinds = Counter(each.what for each in found)
    return Report((section,), (f"{same} the same, {len(found)} not" + (f" ({_counted(kinds)})" if found else ""),))


def verification_report(found: Verification) -> Report:
    """The verdict, what was compared with what outcome, and the first layer that differs."""
    verdict = "equivalent" if found else "NOT equivalent"
    return Report(
        (outputs_section(found), problems_section(found), places_section(found), around_section(found)),
        (f"inputs: {'; '.join(each.name for each in found.inputs)}", *(f"note: {note}" for note in found.notes)),
        (f"{verdict} on {len(found.inputs)} sets of inputs", f"criterion: {found.criterion}"),
        text=str(found),
    )


def outputs_section(found: Verification) -> Section:
    """One row for every output of every run: that of the set of inputs that says most against it."""
    rows = tuple((run, output, *cells(found, run, output)) for run, output in found.grouped())
    return _without_empty("Outputs", COLUMNS, rows)


def problems_section(found: Verification) -> Section:
    """What is wrong with every output that is not equivalent, and on how many sets of inputs."""
    worst, groups = found.worst(), found.grouped()
    rows = tuple(
        (
            *key,
            f"{sum(each.verdict == row.verdict for each in groups[key])} of {len(groups[key])}",
            row.inputs,
            row.problem or f"{row.excess:.3g} times the allowed error ({row.measure})",
        )
        for key, row in worst.items()
        if row.verdict != "equivalent"
    )
    return Section("What differs", ("run", "output", "sets of inputs", "worst on", "because"), rows)


def places_section(found: Verification) -> Section:
    """Where each run first differs."""
    rows = tuple(
        (place.run, place.name or "(the model itself)", place.kind, f"the {place.cause}", place.inputs, place.detail)
        for place in found.locations
    )
    return _without_empty("First differs in", ("run", "layer", "class", "cause", "inputs", "detail"), rows)


def around_section(found: Verification) -> Section:
    """The figures at the places where runs first differ, and just before and behind them."""
    rows = tuple((place.run, *layer_cells(layer)) for place in found.locations for layer in place.around)
    return _without_empty("Around it", ("run", *LAYER_COLUMNS), rows)


LAYER_COLUMNS = ("layer", "class", "error", "floor", "of allowed", "compared with")


def layer_cells(layer: Layer) -> tuple[str, ...]:
    """A value inside a network as texts, one for each of ``LAYER_COLUMNS``."""
    numbers = [("" if each is None else f"{each:.2e}") for each in (layer.error, layer.floor)]
    excess = "" if layer.excess is None else f"{layer.excess:.3g}"
    return (layer.name or "(the model itself)", layer.kind, *numbers, excess, layer.like)


def site_record(site: Site) -> dict[str, object]:
    """A site as JSON-able values; ``shapes`` is null without an observed run."""
    return {
        "name": site.name,
        "aliases": list(site.aliases),
        "kind": site.norm.kind if site.norm else None,
        "computes": str(site.norm) if site.norm else None,
        "channels": site.norm.channels if site.norm else None,
        "reason": site.reason,
        "evidence": site.evidence,
        "shapes": None if site.shapes is None else [list(shape) for shape in site.shapes],
    }


def _without_empty(title: str, columns: tuple[str, ...], rows: tuple[tuple[str, ...], ...]) -> Section:
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    return Section(title, tuple(columns[i] for i in kept), tuple(tuple(row[i] for i in kept) for row in rows))


def _names(name: str, aliases: Iterable[str]) -> str:
    return " = ".join([name or "(root)", *aliases])


def _shapes(site: Site) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in dict.fromkeys(site.shapes or ()))


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.most_common())
