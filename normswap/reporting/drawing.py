"""What all drawings of a report share: placeholder colours, names along the depth of a network, the way into a page.

Matplotlib draws in placeholder colours, which become ``var(--name)``: so one drawing serves light, dark and paper.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

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
SIZE = (10.5, 4.4)
"""In inches of 72 points."""
MOST_GROUPS = 20
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


@contextmanager
def settings(salt: str) -> Iterator[None]:
    """Within it, matplotlib draws as reports do; ``salt`` makes the names in one drawing unlike those in another."""
    with warnings.catch_warnings(), matplotlib.rc_context({**SETTINGS, "svg.hashsalt": salt}):
        warnings.simplefilter("ignore", UserWarning)  # Names in scripts that the font for measuring has not.
        yield


def svg_of(drawing: Figure, label: str, hover: Callable[[], str] = str) -> str:
    """The drawing as a part of a page: no prologue, no style of its own for other elements, the page's colours.

    ``hover``: what lies above it, asked for once all is in place."""
    file = io.StringIO()
    drawing.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style\b.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\b(font: [^;\"]*?[\d.]+px) [^;\"]*", r"\1 var(--sans)", svg)
    svg = re.sub("|".join(COLOURS), lambda match: COLOURS[match[0]], svg)
    svg = re.sub(r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{label}">', svg)
    return svg.replace("xlink:href", "href").replace("</svg>", f"{hover()}</svg>")


def circles(axes: Axes, height: float, points: Iterable[tuple[float, float, str]]) -> str:
    """Invisible circles at (x, y), in units of the axes, that tell a text when they are pointed at; ``height``: of the
    drawing, in inches."""
    found = []
    for x, y, told in points:
        right, up = axes.transData.transform((x, y))
        found.append(
            f'<circle cx="{right:.1f}" cy="{height * 72 - up:.1f}" r="5"><title>{html.escape(told)}</title></circle>'
        )
    return f'<g class="hover">{"".join(found)}</g>'


def plain(axes: Axes) -> None:
    """Grid lines for reading values, no box."""
    axes.grid(axis="y", color=LINE, linewidth=0.6, alpha=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def name_depth(axes: Axes, names: Sequence[str]) -> None:
    """Label stretches of the depth by the modules that they are in, as finely as there is room for."""
    groups = _stretches(names, 1)
    for level in range(2, 1 + max((name.count(".") + 1 for name in names), default=1)):
        finer = _stretches(names, level)
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


def _stretches(names: Sequence[str], level: int) -> list[tuple[int, int, str]]:
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
