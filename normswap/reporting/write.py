"""A report into a file; the form goes by its suffix."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path

from normswap.calibration import Calibration
from normswap.engine import Plan
from normswap.errors import NormswapError
from normswap.files import check_output, whole_file
from normswap.health import Health
from normswap.reporting.content import Content
from normswap.reporting.markdown import markdown
from normswap.verification import Verification

SUFFIXES = (".html", ".md")
NEEDED = ("jinja2", "matplotlib")


def check_report(
    path: str | os.PathLike[str], *, force: bool = False, inputs: Iterable[str | os.PathLike[str]] = ()
) -> None:
    """Raise :class:`NormswapError` now for a report that could not be written after long work: another suffix than
    ``.html`` or ``.md``, what :func:`normswap.files.check_output` refuses, and packages that are not installed."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise NormswapError(f"report {path}: the name must end in {' or '.join(SUFFIXES)}")
    check_output(path, force=force, inputs=inputs)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if path.suffix == ".html" and missing:
        raise NormswapError(f"an HTML report needs {' and '.join(missing)}: pip install normswap[report]")


def write_report(
    path: str | os.PathLike[str],
    verification: Verification | None = None,
    *,
    plan: Plan | None = None,
    title: str = "normswap",
    calibration: Calibration | None = None,
    health: Health | None = None,
    force: bool = False,
) -> None:
    """Write what a verification found, a plan, a calibration, any of them, or the health of a model's norms, as an
    ``.html`` page or as an ``.md`` file.

    The page is one file that needs no other, no network and no script. Raises :class:`NormswapError` as
    :func:`check_report` does."""
    check_report(path, force=force)
    content = Content(verification, plan, title, calibration, health)
    if Path(path).suffix == ".md":
        text = markdown(content)
    else:
        from normswap.reporting.html import html  # The packages that it needs are an extra.

        text = html(content)
    with whole_file(path, force=force) as file:
        file.write_text(text, encoding="utf-8")
