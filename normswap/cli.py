"""The command line: ``normswap inspect``, ``recommend``, ``compare``, ``convert``, ``fold``, ``apply``, ``diff``,
``verify``, ``export``.

Results go to standard output, everything else to standard error. Exit status: 0 done, 1 a check failed, 2 bad input,
130 interrupted. Choices come from the registry, so a kind that a package registers is offered like any other.
"""

from __future__ import annotations

from normswap.commands.app import app
from normswap.commands.apply import apply
from normswap.commands.compare import compare
from normswap.commands.convert import convert
from normswap.commands.diff import diff
from normswap.commands.export import export
from normswap.commands.fold import fold
from normswap.commands.inspect import inspect
from normswap.commands.recommend import recommend
from normswap.commands.verify import verify

__all__ = ["app", "main"]

for command in (inspect, recommend, compare, convert, fold, apply, diff, verify, export):  # in the order of --help
    app.command()(command)


def main() -> None:
    app(prog_name="normswap")
