"""The error along the depth of a network as an SVG drawing, with the colours left to the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from normswap.report import LAYER_COLUMNS, layer_cells
from normswap.reporting.drawing import (
    ALARM,
    BAND,
    MUTED,
    RUNS,
    SIZE,
    circles,
    name_depth,
    plain,
    settings,
    shortened,
    svg_of,
)
from normswap.verification import Layer, Profile

STYLES = (("-", "o", 4.5), ((0, (4, 2)), "s", 2.4), ((0, (1, 1.4)), "^", 1.3), ("-", "D", 1.0))
"""Dashes, marker and width of each run: the later ones are seen on top of the earlier where they coincide."""
ALONE = ("-", "o", 1.8)
THINNER = 0.6
"""Where there are too many values for markers."""
MOST_MARKERS = 150
FEW = 10
"""Values of a run that a line alone would not show."""


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
    with settings(profiles[0].inputs):
        drawing = Figure(figsize=SIZE, dpi=72, layout="constrained")
        axes = drawing.add_subplot()
        low, high = _limits(axes, depth, profiles)
        _draw(axes, depth, profiles, low, high)
        legend = drawing.legend(loc="outside lower left", ncols=3, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
        _mark(axes, depth, located)
        name_depth(axes, [name for name, _ in depth.keys])
        return svg_of(drawing, "Error along the depth of the network", lambda: _hover(axes, depth, profiles, low, high))


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
    plain(axes)


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


def _hover(axes: Axes, depth: Depth, profiles: Sequence[Profile], low: float, high: float) -> str:
    """Invisible circles that tell, when pointed at, what is below them."""
    points = []
    for run, profile in enumerate(profiles):
        for place, (key, error) in enumerate(zip(depth.keys, depth.series(run), strict=True)):
            if math.isnan(error):
                continue
            name, kind, *figures = layer_cells(depth.layers[run][key])
            named = (f"{title} {text}" for title, text in zip(LAYER_COLUMNS[2:], figures, strict=True) if text)
            told = f"{name} ({kind})\n{profile.run}\n{', '.join(named)}"
            points.append((place, min(max(error, low), high), told))
    return circles(axes, SIZE[1], points)
