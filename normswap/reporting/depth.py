"""The norms of a network along its depth, drawn: their statistics and weights, what data shows, how well they were
calibrated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from normswap.calibration import Calibration
from normswap.health import Health, NormHealth, Summary
from normswap.health.checks import NOISY, STALE
from normswap.reporting.drawing import (
    ALARM,
    BAND,
    INK,
    LINE,
    MUTED,
    RUNS,
    SIZE,
    circles,
    name_depth,
    plain,
    settings,
    svg_of,
)

TALL = (SIZE[0], 6.0)
BINS = 48
Point = tuple[float, float, str]
Values = numpy.ndarray[Any, Any]
FEW = 150
"""Up to so many norms, each has a marker."""


@dataclass(frozen=True)
class Drawn:
    """One drawing with its title and what it shows."""

    title: str
    caption: str
    svg: str


def health_drawings(health: Health) -> Iterator[Drawn]:
    """Those that there are values for."""
    by_name = {norm.name: norm for norm in health.norms}
    norms = [by_name[name] for name in health.depth if name in by_name]
    if kept := [norm for norm in norms if norm.summary("running_var") and norm.summary("running_mean")]:
        yield Drawn(
            "Running statistics along the depth",
            "Of every norm, from input (left) to output (right): the median over its channels, the range in which "
            "eight tenths of them lie, and the whole range.",
            _statistics(kept),
        )
    if kept := [norm for norm in norms if norm.summary("weight")]:
        yield Drawn(
            "Weights along the depth",
            "The weights (γ) of every norm, as above, and how often each value occurs in all of them together.",
            _weights(kept),
        )
    measured = [norm for norm in norms if norm.measured is not None]
    if kept := [norm for norm in measured if norm.measured and norm.measured.discrepancy is not None]:
        yield Drawn(
            "Train mode against eval mode",
            "How far apart the norm's outputs with the batch's statistics and with the running ones are, in deviations "
            "of the normalized value. Stale: all batches together against the running statistics. Noise: single "
            "batches against all together.",
            _discrepancy(kept),
        )
    if measured:
        yield Drawn(
            "Activations",
            "What every norm gave: the mean over all values, and one deviation to each side. Below, the share of "
            "channels that are 0 throughout behind the activation, and of values where it is flat.",
            _activations(measured),
        )
    if kept := [norm for norm in measured if norm.measured and norm.measured.gradient]:
        yield Drawn(
            "Gradient flow",
            f"Root mean square of the gradient at the output of every norm, of {health.loss}.",
            _gradients(kept),
        )


def calibration_drawing(found: Calibration) -> Drawn:
    """The explained variance before and after."""
    names = [site.name for site in found.sites]
    before, after = ([getattr(site, field) for site in found.sites] for field in ("before", "after"))

    def draw(axes: Axes) -> list[Point]:
        low = max(-1.0, min([0.0, *(value for value in (*before, *after) if math.isfinite(value))]) - 0.05)
        axes.set_ylim(low, 1.03)
        for values, colour, label, dashes in ((before, RUNS[1], "before", (0, (4, 2))), (after, RUNS[2], "after", "-")):
            _line(axes, numpy.clip(values, low, 1.0), colour, label, dashes)
        axes.axhline(0, color=LINE, linewidth=0.8)
        axes.set_ylabel("explained variance (R²)")
        return [
            (place, min(max(site.after, low), 1.0), f"{site.name}\n{site.before:.3f} before, {site.after:.3f} after")
            for place, site in enumerate(found.sites)
            if math.isfinite(site.after)
        ]

    return Drawn(
        "Explained variance of every norm",
        "How much of the original norm's output its successor explains, over samples, positions and channels: 1 at "
        "best; what would be below the drawing is at its edge.",
        _one(names, draw, "Explained variance along the depth of the network"),
    )


def _one(names: Sequence[str], draw: Callable[[Axes], list[Point]], label: str) -> str:
    with settings(label):
        drawing = Figure(figsize=SIZE, dpi=72, layout="constrained")
        axes = drawing.add_subplot()
        axes.set_xlim(-0.5, max(len(names), 1) - 0.5)
        points = draw(axes)
        plain(axes)
        drawing.legend(loc="outside lower left", ncols=4, frameon=False)
        name_depth(axes, names)
        return svg_of(drawing, label, lambda: circles(axes, SIZE[1], points))


def _statistics(norms: Sequence[NormHealth]) -> str:
    label = "Running statistics along the depth of the network"
    with settings(label):
        drawing = Figure(figsize=TALL, dpi=72, layout="constrained")
        upper, lower = drawing.subplots(2, 1, sharex=True)
        means, variances = ([_known(norm, field) for norm in norms] for field in ("running_mean", "running_var"))
        _bands(upper, means, RUNS[2], "running mean")
        _bands(lower, variances, RUNS[3], "running variance", floor=_floor(variances))
        upper.axhline(0, color=MUTED, linewidth=0.8, zorder=1.5)
        lower.axhline(1, color=MUTED, linewidth=0.8, zorder=1.5)
        for axes in (upper, lower):
            plain(axes)
        name_depth(lower, [norm.name for norm in norms])
        upper.tick_params(axis="both", length=0)
        points = _points(norms, variances, _floor(variances))
        more = _points(norms, means)
        return svg_of(drawing, label, lambda: circles(lower, TALL[1], points) + circles(upper, TALL[1], more))


def _weights(norms: Sequence[NormHealth]) -> str:
    label = "Weights along the depth of the network"
    with settings(label):
        drawing = Figure(figsize=SIZE, dpi=72, layout="constrained")
        axes, side = drawing.subplots(1, 2, sharey=True, width_ratios=(5, 1))
        summaries = [_known(norm, "weight") for norm in norms]
        _bands(axes, summaries, RUNS[0], "weight (γ)")
        axes.axhline(1, color=MUTED, linewidth=0.8, zorder=1.5)
        values = [norm.site.norm.weight.detach().double().cpu().flatten() for norm in norms if _weight(norm)]  # type: ignore[union-attr]
        together = numpy.concatenate([value[value.isfinite()].numpy() for value in values])
        scale = axes.yaxis.get_transform()
        ends = scale.transform(numpy.array([together.min(), together.max()]))
        bins = scale.inverted().transform(numpy.linspace(ends[0] - 1e-3, ends[1] + 1e-3, BINS))
        side.hist(together, bins=bins, orientation="horizontal", color=RUNS[0], alpha=0.8)
        side.set_xlabel("channels")
        side.tick_params(axis="both", length=0)
        side.locator_params(axis="x", nbins=2)
        for each in (axes, side):
            plain(each)
        name_depth(axes, [norm.name for norm in norms])
        points = _points(norms, summaries)
        return svg_of(drawing, label, lambda: circles(axes, SIZE[1], points))


def _discrepancy(norms: Sequence[NormHealth]) -> str:
    def draw(axes: Axes) -> list[Point]:
        seen = [norm.measured for norm in norms if norm.measured is not None]
        series = {field: [getattr(each, field) for each in seen] for field in ("discrepancy", "staleness", "noise")}
        _line(axes, series["discrepancy"], INK, "train against eval")
        _line(axes, series["staleness"], RUNS[1], "stale", (0, (4, 2)))
        _line(axes, series["noise"], RUNS[0], "noise", (0, (1, 1.4)))
        top = max(x for values in series.values() for x in values if math.isfinite(x))
        far = top > 4 * STALE
        axes.axhline(min(STALE, NOISY), color=ALARM, linewidth=1.2, linestyle=(0, (5, 3)), label="warning")
        if far:
            axes.set_yscale("symlog", linthresh=1.0)
        axes.set_ylim(0, max(top, STALE) * 1.1)
        axes.set_ylabel("deviations")
        return [
            (x, each.discrepancy or 0, f"{norm.name}\ntrain against eval {each.discrepancy:.2f}, stale "
             f"{each.staleness:.2f} (worst channel {each.worst:.2f}), noise {each.noise:.2f}")
            for x, (norm, each) in enumerate(zip(norms, seen, strict=True))
        ]  # fmt: skip

    return _one([norm.name for norm in norms], draw, "Train mode against eval mode along the depth of the network")


def _activations(norms: Sequence[NormHealth]) -> str:
    label = "Activations along the depth of the network"
    seen = [norm.measured for norm in norms if norm.measured is not None]
    with settings(label):
        drawing = Figure(figsize=TALL, dpi=72, layout="constrained")
        upper, lower = drawing.subplots(2, 1, sharex=True, height_ratios=(3, 1.4))
        mean, std = (numpy.array([getattr(m, field) for m in seen]) for field in ("output_mean", "output_std"))
        _blocks(upper, mean - std, mean + std, color=BAND, label="one deviation")
        _squeezed(upper, numpy.concatenate([mean - std, mean + std]))
        _line(upper, mean, RUNS[2], "mean")
        upper.set_ylabel("output")
        for field, colour, told in (("dead", RUNS[1], "channels always 0"), ("saturated", RUNS[0], "flat")):
            values = [math.nan if (v := getattr(m, field)) is None else 100 * v for m in seen]
            if not all(map(math.isnan, values)):
                _line(lower, values, colour, told, "none" if field == "dead" else "-", always=True)
        lower.set_ylabel("percent")
        lower.set_ylim(-4, 104)
        upper.set_xlim(-0.5, len(seen) - 0.5)
        for axes in (upper, lower):
            plain(axes)
        drawing.legend(loc="outside lower left", ncols=4, frameon=False)
        name_depth(lower, [norm.name for norm in norms])
        upper.tick_params(axis="both", length=0)
        points = [
            (x, m.output_mean, f"{norm.name}\n{m.output_mean:.3g} ± {m.output_std:.3g}, largest {m.largest:.3g}")
            for x, (norm, m) in enumerate(zip(norms, seen, strict=True))
            if math.isfinite(m.output_mean)
        ]
        return svg_of(drawing, label, lambda: circles(upper, TALL[1], points))


def _gradients(norms: Sequence[NormHealth]) -> str:
    def draw(axes: Axes) -> list[Point]:
        seen = [(norm, norm.measured.gradient or 0.0) for norm in norms if norm.measured is not None]
        sizes = [size for _, size in seen]
        axes.set_yscale("log")
        decades = [math.log10(size) for size in sizes if 0 < size < math.inf]
        axes.set_ylim(10.0 ** math.floor(min(decades)), 10.0 ** math.ceil(max(decades) + 1e-9))
        _line(axes, sizes, RUNS[2], "at the output of the norm")
        axes.set_ylabel("gradient")
        return [(x, size, f"{norm.name}\n{size:.3g}") for x, (norm, size) in enumerate(seen) if math.isfinite(size)]

    return _one([norm.name for norm in norms], draw, "Gradient along the depth of the network")


def _weight(norm: NormHealth) -> bool:
    return norm.site.norm is not None and norm.site.norm.weight is not None


def _known(norm: NormHealth, field: str) -> Summary:
    found = norm.summary(field)
    assert found is not None
    return found


def _points(norms: Sequence[NormHealth], summaries: Sequence[Summary], least: float = -math.inf) -> list[Point]:
    """The medians, as far as they are drawn."""
    return [
        (place, max(each.median, least), _told(norm, each))
        for place, (norm, each) in enumerate(zip(norms, summaries, strict=True))
    ]


def _told(norm: NormHealth, each: Summary) -> str:
    return f"{norm.name}\nmedian {each.median:.3g}, from {each.least:.3g} to {each.largest:.3g}"


def _floor(summaries: Sequence[Summary]) -> float:
    """The smallest value that a logarithmic axis shows: what is below it is at the edge."""
    return max(min((s.least for s in summaries if s.least > 0), default=1e-12), 1e-12) / 2


def _bands(axes: Axes, summaries: Sequence[Summary], colour: str, label: str, *, floor: float | None = None) -> None:
    places = numpy.arange(len(summaries))
    series = {name: numpy.array([getattr(each, name) for each in summaries]) for name in vars(summaries[0])}
    if floor is not None:
        axes.set_yscale("log")
        series = {name: numpy.maximum(values, floor) for name, values in series.items()}
    for low, high, alpha in (("least", "largest", 0.18), ("low", "high", 0.32)):
        _blocks(axes, series[low], series[high], color=colour, alpha=alpha)
    if floor is None:
        _squeezed(axes, numpy.concatenate([series["least"], series["largest"]]))
    _line(axes, series["median"], colour, label)
    axes.set_ylabel(label)
    axes.set_xlim(-0.5, max(len(places), 1) - 0.5)


def _blocks(axes: Axes, low: Values, high: Values, **options: Any) -> None:
    """A range at every place, as wide as there is room."""
    edges = numpy.arange(len(low)).repeat(2) + numpy.tile([-0.5, 0.5], len(low))
    axes.fill_between(edges, numpy.repeat(low, 2), numpy.repeat(high, 2), linewidth=0, **options)


def _squeezed(axes: Axes, values: Values) -> None:
    """A logarithmic axis beyond ten times what is usual, where a few values would flatten all others."""
    sizes = numpy.abs(values[numpy.isfinite(values)])
    usual = float(numpy.quantile(sizes, 0.75)) if len(sizes) else 0.0
    if usual and sizes.max() > 10 * usual:
        axes.set_yscale("symlog", linthresh=10.0 ** math.floor(math.log10(2 * usual)))


def _line(
    axes: Axes,
    values: Sequence[float] | Values,
    colour: str,
    label: str,
    dashes: Any = "-",
    *,
    always: bool = False,
) -> None:
    axes.plot(
        numpy.arange(len(values)),
        values,
        color=colour,
        linestyle=dashes,
        linewidth=1.6,
        marker="o" if always or len(values) <= FEW else "",
        markersize=3.2,
        label=label,
    )
