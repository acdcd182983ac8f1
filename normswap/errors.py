"""The exceptions of the package."""

from __future__ import annotations

from typing import Any


class NormswapError(ValueError):
    """Misuse: what went wrong, where (dotted name, file or key), and how to mend it."""


def check_whole(name: str, value: object, least: int = 1) -> None:
    """Raise :class:`NormswapError` for an option that is no whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise NormswapError(f"{name}={value!r}: it must be a whole number of at least {least}")


class Refusal(Exception):
    """Raised by a reader or a builder that cannot serve one norm; the engine turns it into a ``Skip`` with this
    reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class VerificationFailed(NormswapError):
    """A changed model does not compute what the original does; ``verification`` has the figures, a
    :class:`normswap.Verification`."""

    def __init__(self, message: str, verification: Any) -> None:
        super().__init__(message)
        self.verification = verification


class FixedArgument(NormswapError):
    """A generated ``forward`` was called with another value of an optional argument than the one it holds for."""
