"""The error along the depth of a network as an SVG drawing, with the colours left to the page's style sheet.

Matplotlib draws in placeholder colours, which become ``var(--name)``: so one drawing serves light, dark and paper.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from normswap.report import LAYER_COLUMNS, layer_cells
from normswap.verification import Layer, Profile

COLOURS = {
    "#010a01": "var(--ink)",
    "#010a02": "var(--muted)",
    "#010a03": "var(--line)",
    "#010a04": "var(--band)",
    "#010a05": "var(--alarm)",
    "#010a06": "var(--run-0)",
    "#010a07": "var(--run-1)",
    "#010a08": "var(--run-2)",
    "#010a09": "var(--run-3)",
}
INK, MUTED, LINE, BAND, ALARM, *RUNS = COLOURS
STYLES = (("-", "o", 4.5), ((0, (4, 2)), "s", 2.4), ((0, (1, 1.4)), "^", 1.3), ("-", "D", 1.0))
"""Dashes, marker and width of each run: the later ones are seen on top of the earlier where they coincide."""
ALONE = ("-", "o", 1.8)
THINNER = 0.6
"""Where there are too many values for markers."""
SIZE = (10.5, 4.4)
"""In inches of 72 points."""
MOST_GROUPS = 20
MOST_MARKERS = 150
FEW = 10
"""Values of a run that a line alone would not show."""
LONGEST = 48
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
}


@dataclass
class Depth:
    """The values of all runs on one axis: what they have in common at one place, the rest in between in order."""

    keys: list[tuple[str, int]] = field(default_factory=list)
    layers: list[dict[tuple[str, int], Layer]] = field(default_factory=list)

    @classmethod
    def of(cls, profiles: Sequence[Profile]) -> Depth:
        found = cls()
        for profile in profiles:
            seen: dict[str, int] = {}
            known, here, own = set(found.keys), 0, {}
            for layer in profile.layers:
                key = (layer.name, seen.get(layer.name, 0))
                seen[layer.name] = key[1] + 1
                own[key] = layer
                if key in known:
                    here = found.keys.index(key) + 1
                else:
                    found.keys.insert(here, key)
                    here += 1
            found.layers.append(own)
        return found

    def series(self, run: int) -> list[float]:
        """The errors of a run, each by the measure that says most against it: so what is wrong is above the band."""
        own, allowed = self.layers[run], between(self.allowed()) or [1.0] * len(self.keys)
        told = (_number(own[key].excess) if key in own else math.nan for key in self.keys)
        return [excess * most for excess, most in zip(told, allowed, strict=True)]

    def floor(self) -> list[float]:
        return [max((_number(x.floor) for x in self.at(key)), default=math.nan) for key in self.keys]

    def allowed(self) -> list[float]:
        return [max(map(_allowed, self.at(key)), default=math.nan) for key in self.keys]

    def at(self, key: tuple[str, int]) -> list[Layer]:
        return [own[key] for own in self.layers if key in own]


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _allowed(layer: Layer) -> float:
    """The largest error that is allowed; where that is not told, by what the error exceeds it."""
    if layer.allowed is not None:
        return layer.allowed
    error, excess = _number(layer.error), _number(layer.excess)
    return error / excess if 0 < error < math.inf and 0 < excess < math.inf else -math.inf


def plot(profiles: Sequence[Profile], located: Sequence[str]) -> str:
    """An ``<svg>`` of the errors in ``profiles``, all on one set of inputs; ``located`` are the names to mark."""
    depth = Depth.of(profiles)
    with warnings.catch_warnings(), matplotlib.rc_context({**SETTINGS, "svg.hashsalt": profiles[0].inputs}):
        warnings.simplefilter("ignore", UserWarning)  # Names in scripts that the font for measuring has not.
        drawing = Figure(figsize=SIZE, dpi=72, layout="constrained")
        axes = drawing.add_subplot()
        low, high = _limits(axes, depth, profiles)
        _draw(axes, depth, profiles, low, high)
        legend = drawing.legend(loc="outside lower left", ncols=3, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
        _mark(axes, depth, located)
        _name(axes, [name for name, _ in depth.keys])
        file = io.StringIO()
        drawing.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        return _inline(file.getvalue(), _hover(axes, depth, profiles, low, high))


def _limits(axes: Axes, depth: Depth, profiles: Sequence[Profile]) -> tuple[float, float]:
    values = [*depth.floor(), *depth.allowed(), *(x for run in range(len(profiles)) for x in depth.series(run))]
    positive = [value for value in values if 0 < value < math.inf] or [1e-8, 1.0]
    low, high = min(positive) / 3, max(positive) * 3
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.set_xlim(-0.5, max(len(depth.keys), 1) - 0.5)
    return low, high


def _draw(axes: Axes, depth: Depth, profiles: Sequence[Profile], low: float, high: float) -> None:
    places = numpy.arange(len(depth.keys))
    allowed, floor = between(depth.allowed()), between(depth.floor())
    if allowed is not None:
        axes.fill_between(places, low, allowed, color=BAND, linewidth=0, label="allowed", step="mid")
    if floor is not None:
        axes.plot(
            places,
            numpy.clip(floor, low, high),
            color=MUTED,
            linewidth=1.2,
            label="noise floor (the reference's own rounding)",
        )
    for run, profile in enumerate(profiles):
        dashes, marker, width = STYLES[run % len(STYLES)] if len(profiles) > 1 else ALONE
        colour = RUNS[run % len(RUNS)] if len(profiles) > 1 else RUNS[2]
        width *= 1 if len(places) <= MOST_MARKERS else THINNER
        series = numpy.array(depth.series(run))
        seen = ~numpy.isnan(series)
        axes.plot(
            places[seen],
            numpy.clip(series[seen], low, high),
            color=colour,
            linestyle=dashes,
            linewidth=width,
            marker=marker if len(places) <= MOST_MARKERS or seen.sum() <= FEW else "",
            markersize=3 + width * 0.7,
            alpha=0.75 if run == 0 and len(profiles) > 1 else 1.0,
            label=profile.run,
        )
    axes.set_ylabel("error, relative to the value's scale")
    axes.grid(axis="y", color=LINE, linewidth=0.6, alpha=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def between(values: Sequence[float]) -> list[float] | None:
    """``values`` with those that are not known taken from their neighbours, on the logarithmic scale."""
    known = [place for place, value in enumerate(values) if 0 < value < math.inf]
    if not known:
        return None
    logarithms = numpy.interp(range(len(values)), known, [math.log(values[place]) for place in known])
    return [math.exp(value) for value in logarithms]


def _mark(axes: Axes, depth: Depth, located: Sequence[str]) -> None:
    for name in dict.fromkeys(located):
        place = next((index for index, (known, _) in enumerate(depth.keys) if known == name), None)
        if place is None:
            continue
        axes.axvline(place, color=ALARM, linewidth=1.4, linestyle=(0, (5, 3)), zorder=1.5)
        side = place / max(len(depth.keys) - 1, 1)
        axes.annotate(
            f"first differs: {shortened(name or 'the model itself')}",
            (place, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 5),
            textcoords="offset points",
            horizontalalignment="left" if side < 0.2 else "right" if side > 0.8 else "center",
            color=ALARM,
            fontweight="bold",
            annotation_clip=False,
            parse_math=False,
        )


def _name(axes: Axes, names: Sequence[str]) -> None:
    """Label stretches of the depth by the modules that they are in, as finely as there is room for."""
    groups = _groups(names, 1)
    for level in range(2, 1 + max((name.count(".") + 1 for name in names), default=1)):
        finer = _groups(names, level)
        if len(finer) > MOST_GROUPS:
            break
        groups = finer
    room = len(names) / MOST_GROUPS / 1.6
    shown: list[tuple[int, int, str]] = []
    for start, end, name in groups:
        if not shown or (start + end) / 2 - sum(shown[-1][:2]) / 2 >= room:
            shown.append((start, end, name))
    labels = [shortened(name, 24) for _, _, name in shown]
    axes.set_xticks(
        [(start + end) / 2 for start, end, _ in shown],
        labels,
        rotation=30,
        horizontalalignment="right",
        rotation_mode="anchor",
        parse_math=False,
    )
    axes.tick_params(axis="both", length=0)
    axes.yaxis.set_minor_locator(NullLocator())
    if len(groups) <= MOST_GROUPS and len(groups) < len(names):
        for start, _, _ in groups[1:]:
            axes.axvline(start - 0.5, color=LINE, linewidth=0.6, zorder=0.5)


def _groups(names: Sequence[str], level: int) -> list[tuple[int, int, str]]:
    """Stretches (first, last, name) of layers below one module of the given level."""
    groups: list[tuple[int, int, str]] = []
    for place, name in enumerate(names):
        prefix = ".".join(name.split(".")[:level]) or "(model)"
        if groups and groups[-1][2] == prefix:
            groups[-1] = (groups[-1][0], place, prefix)
        else:
            groups.append((place, place, prefix))
    return groups


def shortened(name: str, longest: int = LONGEST) -> str:
    half = (longest - 1) // 2
    return name if len(name) <= longest else f"{name[:half]}…{name[-half:]}"


def _hover(axes: Axes, depth: Depth, profiles: Sequence[Profile], low: float, high: float) -> str:
    """Invisible circles that tell, when pointed at, what is below them."""
    height = SIZE[1] * 72
    circles = []
    for run, profile in enumerate(profiles):
        for place, (key, error) in enumerate(zip(depth.keys, depth.series(run), strict=True)):
            if math.isnan(error):
                continue
            x, y = axes.transData.transform((place, min(max(error, low), high)))
            name, kind, *figures = layer_cells(depth.layers[run][key])
            named = (f"{title} {text}" for title, text in zip(LAYER_COLUMNS[2:], figures, strict=True) if text)
            told = f"{name} ({kind})\n{profile.run}\n{', '.join(named)}"
            circles.append(
                f'<circle cx="{x:.1f}" cy="{height - y:.1f}" r="5"><title>{html.escape(told)}</title></circle>'
            )
    return f'<g class="hover">{"".join(circles)}</g>'


def _inline(svg: str, hover: str) -> str:
    """The drawing as a part of a page: no prologue, no style of its own for other elements, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style\b.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\b(font: [^;\"]*?[\d.]+px) [^;\"]*", r"\1 var(--sans)", svg)
    svg = re.sub("|".join(COLOURS), lambda match: COLOURS[match[0]], svg)
    svg = re.sub(
        r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>',
        r'<svg viewBox="\1" role="img" aria-label="Error along the depth of the network">',
        svg,
    )
    return svg.replace("xlink:href", "href").replace("</svg>", f"{hover}</svg>")
