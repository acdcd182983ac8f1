"""The application that the commands belong to."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from normswap import __version__
from normswap.checkpoints.processes import joined
from normswap.console import BAD_INPUT, INTERRUPTED, say
from normswap.errors import NormswapError


class Commands(TyperGroup):
    """Turns the library's exceptions into one message and an exit status."""

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            with _ended_by_signals():
                return super().main(*args, **options)
        except SystemExit as end:
            if isinstance(end.__context__, typer.Abort):  # Interrupted before or after the command itself.
                raise SystemExit(INTERRUPTED) from None
            raise

    def invoke(self, ctx: Any) -> Any:
        with joined():
            return self._invoke(ctx)

    def _invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (NormswapError, OSError) as error:
            if _signalled.is_set():  # Native code may make another error of an interrupt.
                say("interrupted")
                raise typer.Exit(INTERRUPTED) from None
            _fail(str(error))
        except KeyboardInterrupt as interrupt:
            say(f"interrupted{f'; {interrupt}' if interrupt.args else ''}")
            raise typer.Exit(INTERRUPTED) from None


_signalled = threading.Event()


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let a request to end, or the end of the terminal, do what Ctrl-C does: nothing is left half done.

    A signal that is handled or ignored already (``nohup``) stays so.
    """

    def interrupt(number: int, frame: object) -> None:
        _signalled.set()
        raise KeyboardInterrupt

    taken = {}
    _signalled.clear()
    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                taken[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, before in taken.items():
            signal.signal(number, before)


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
