"""How checkpoints are spoken of in messages."""

from __future__ import annotations

from collections.abc import Sequence

_SHOWN = 5


def line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def first(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f", ... ({len(names)} in all)" if len(names) > _SHOWN else "")
