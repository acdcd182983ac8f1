"""A report as one HTML page: nothing outside the file is asked for, nothing in it runs, every name is escaped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from normswap.health.result import named
from normswap.report import LAYER_COLUMNS, Section, layer_cells
from normswap.reporting.content import Content, figure
from normswap.reporting.depth import Drawn, calibration_drawing, health_drawings
from normswap.reporting.plot import plot
from normswap.verification import Layer, Profile, Verification


@dataclass(frozen=True)
class Drawing:
    """One plot and the tables of its figures."""

    inputs: str
    svg: Markup
    tables: tuple[Section, ...]


def html(content: Content) -> str:
    """The page as text, to be written in UTF-8."""
    environment = _environment()
    style = Markup(environment.loader.get_source(environment, "page.css")[0]) if environment.loader else ""
    page = environment.get_template("page.html.jinja")
    drawings = [] if content.verification is None else list(_drawings(content.verification))
    return page.render(
        content=content, drawings=drawings, figures=list(_figures(content)), figure=figure, named=named, style=style
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("normswap.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _figures(content: Content) -> Iterator[Drawn]:
    """Drawings of the norms along the depth."""
    if content.calibration is not None and content.calibration.sites:
        yield calibration_drawing(content.calibration)
    if content.health is not None:
        yield from health_drawings(content.health)


def _drawings(found: Verification) -> Iterator[Drawing]:
    """One for each set of inputs that there are profiles on, all runs on it together."""
    groups: dict[str, list[Profile]] = {}
    for profile in found.profiles:
        if profile.layers:
            groups.setdefault(profile.inputs, []).append(profile)
    for inputs, seen in groups.items():
        profiles = list(_with_outputs(found, seen, inputs))
        located = [place.name for place in found.locations]
        tables = (
            Section(each.run, LAYER_COLUMNS, tuple(layer_cells(layer) for layer in each.layers)) for each in profiles
        )
        yield Drawing(inputs, Markup(plot(profiles, located)), tuple(tables))


def _with_outputs(found: Verification, profiles: list[Profile], inputs: str) -> Iterator[Profile]:
    """Profiles that end in the outputs of the model, also of the runs whose inside cannot be seen."""
    inside = {profile.run: profile.layers for profile in profiles}
    for run in dict.fromkeys([*inside, *(row.run for row in found.rows)]):
        rows = [row for row in found.rows if (row.run, row.inputs, row.problem) == (run, inputs, None)]
        ends = [Layer(f"→ {row.output}", "output", row.relative, row.floor, row.excess) for row in rows]
        if run in inside or ends:
            yield Profile(run, inputs, (*inside.get(run, ()), *ends))
