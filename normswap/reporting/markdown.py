"""A report as Markdown, for a pull request: GitHub's dialect, with the long tables folded away."""

from __future__ import annotations

import re
from collections.abc import Iterator

from normswap.health.result import named
from normswap.report import Section
from normswap.reporting.content import Content, Outcome, figure

MOST = 60
"""Rows of a table; a comment on GitHub may have 65,536 characters."""
MARKS: dict[Outcome, str] = {
    "equivalent": "✅",
    "different": "❌",
    "inconclusive": "⚠️",
    "unverified": "➖",
    "healthy": "✅",
    "doubtful": "⚠️",
    "ill": "❌",
}
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;", "#": "&#35;", "|": "&#124;"}


def markdown(content: Content) -> str:
    """The report as text."""
    return "\n\n".join(_parts(content)) + "\n"


def _parts(content: Content) -> Iterator[str]:
    yield f"## {MARKS[content.outcome]} {escape(content.heading)}: {escape(content.title)}"
    yield escape(content.summary)
    for place in content.places:
        times = "" if place.excess is None else f", {figure(place.excess)} times the allowed error"
        detail = f", {escape(place.detail)}" if place.detail else ""
        yield (
            f"**First differs in {escape(place.name)}** ({escape(place.first.kind)}{detail}{times}); "
            f"cause: **the {place.first.cause}**. {escape(place.cause)} "
            f"Runs: {escape('; '.join(place.runs))}."
        )
    if content.health is not None:
        for severity, check, found in content.health.grouped():
            sites, first = named([each.site for each in found]), found[0]
            yield (
                f"**{severity}: {check}** in {escape(sites)}. {escape(first.what)}: {escape(first.why)}. "
                f"To mend it: {escape(first.mend)}."
            )
        yield from map(_folded, content.health_tables())
    for section in content.tables():
        if section.rows:
            yield f"### {section.title}\n\n{table(section)}"
    if content.verification is not None:
        yield f"{content.criterion} In figures: {escape(content.verification.criterion)}."
        yield _folded(content.inputs())
    if content.plan is not None:
        yield f"### {escape(content.plan.operation).capitalize()}"
        yield from map(_folded, content.plan_tables())
    if notes := content.notes():
        yield "\n".join(["### Notes", "", *(f"- {escape(note)}" for note in notes)])
    yield f"<sub>{escape(content.versions)}</sub>"


def table(section: Section) -> str:
    lines = [section.columns, ("---",) * len(section.columns), *(tuple(map(escape, r)) for r in section.rows[:MOST])]
    left = len(section.rows) - MOST
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{text}\n\n… and {left} more" if left > 0 else text


def _folded(section: Section) -> str:
    summary = f"{escape(section.title)} ({len(section.rows)})"
    return f"<details><summary>{summary}</summary>\n\n{table(section)}\n\n</details>"


def escape(text: str) -> str:
    """``text`` so that Markdown shows it as it stands, on one line, and mentions nobody."""
    text = re.sub(r"[&<>@#|]", lambda match: ENTITIES[match[0]], " ".join(text.split()))
    return re.sub(r"[\\`*\[\]~$]|(?<!\w)_|_(?!\w)", lambda match: "\\" + match[0], text)
