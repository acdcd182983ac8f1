"""The application that the commands belong to."""

from __future__ import annotations

from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from normswap import __version__
from normswap.console import BAD_INPUT, INTERRUPTED, say
from normswap.errors import NormswapError


class Commands(TyperGroup):
    """Turns the library's exceptions into one message and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except NormswapError as error:
            _fail(str(error))
        except BrokenPipeError:
            raise
        except OSError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Find, replace, fold and verify the normalization layers of a PyTorch model.",
)


def _fail(message: str) -> NoReturn:
    say(f"normswap: {message}")
    raise typer.Exit(BAD_INPUT) from None


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"normswap {__version__}")
        raise typer.Exit


@app.callback()
def normswap_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
