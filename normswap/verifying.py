"""What the command line compares, on what, and how near it must come: from arguments to values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from normswap.arguments import parse_inputs
from normswap.engine import Plan
from normswap.errors import NormswapError
from normswap.surgery import check_exact, inexact

PROGRAMS = (".onnx", ".pt2")
"""Files that hold a whole program: they need no model to be compared."""


def parse_tolerance(texts: Sequence[str] | None, flag: str) -> float | dict[str, float] | None:
    """``["1e-4"]`` as a number for all outputs, ``["logits=1e-4", ...]`` as one for each output so named.

    Raises :class:`NormswapError` that names ``flag`` for another form, for both forms at once, and for a number or an
    output given twice."""
    found: dict[str, float] = {}
    for text in texts or ():
        output, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            raise NormswapError(f"{flag} {text!r}: write a number, or OUTPUT=NUMBER") from None
        if output in found:
            raise NormswapError(f"{flag} {text!r}: {output or 'the number for all outputs'} is given twice")
        found[output] = value
    if "" in found and len(found) > 1:
        raise NormswapError(f"{flag}: give one number for all outputs, or OUTPUT=NUMBER for each, not both")
    return found.get("", found or None)


def example_of(texts: Sequence[str] | None, data: Path | None, *sides: nn.Module | Path) -> tuple[Tensor, ...] | None:
    """The inputs that ``--input`` asks for, in the dtype of the first side that has parameters.

    Raises :class:`NormswapError` when there is nothing to run on: neither that nor ``--data``."""
    models = [side for side in sides if isinstance(side, nn.Module)]
    example = parse_inputs(texts or (), models[0] if models else nn.Module())
    if example is None and data is None:
        raise NormswapError("verify needs an example input: pass --input, such as --input 1x3x224x224, or --data FILE")
    return example


def provable(plan: Plan, wanted: bool | None, example: tuple[Tensor, ...] | None) -> tuple[bool, str]:
    """Whether the result of a plan is to be compared with the original, and if not though it could run, why not.

    ``wanted`` is the user's word, ``None`` for none. Raises :class:`NormswapError` when it asks for what cannot be."""
    if wanted is False or example is None:
        return False, ""
    if wanted:
        check_exact(plan)
    elif found := inexact(plan):
        counts = f"{len(found)} of {len(plan.changes)} changes give another function"
        return False, f"nothing to verify: {counts}, {found[0]} first"
    return True, ""
