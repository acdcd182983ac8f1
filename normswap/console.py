"""What the commands say while they work, and how they end."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.text import Text

from normswap import report

CHECK_FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130


def say(message: str) -> None:
    Console(stderr=True, highlight=False).print(Text(message), soft_wrap=True)


@contextlib.contextmanager
def working(message: str) -> Iterator[None]:
    """Show that work goes on, and keep what the model's code prints out of the results."""
    status = Console(stderr=True).status(message) if sys.stderr.isatty() else contextlib.nullcontext()
    with status, contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def writing(message: str) -> Iterator[Callable[[int, int], None]]:
    """Show how much is done, at what rate, and how long the rest takes; nothing where no one watches."""
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), DownloadColumn(),
        TransferSpeedColumn(), TimeRemainingColumn(compact=True),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(message, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show(result: report.Report, record: dict[str, object], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(record, indent=1))
    else:
        report.show(result, Console())
