"""Batches for calibration, from what the command line is given.

``--data`` is a ``.npy``, ``.npz`` or ``.pt`` file, as :func:`normswap.verification.load_inputs` reads it, cut along its
first axis; or ``package.module:callable``, which gives an iterable of batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from normswap.arguments import named_object
from normswap.calibration import check_batches
from normswap.errors import NormswapError
from normswap.verification import load_inputs
from normswap.verification.inputs import SUFFIXES


def load_batches(text: str, size: int) -> Iterable[Any]:
    """The batches that ``text`` names, those of a file with at most ``size`` samples each.

    Raises :class:`NormswapError` for a file that cannot be read or whose tensors differ in their first axis, a callable
    that fails or gives no batches, and a size below 1."""
    if size < 1:
        raise NormswapError(f"--batch-size {size}: it must be at least 1")
    if Path(text).suffix in SUFFIXES:
        return [batch for name, inputs in load_inputs(text) for batch in _cut(name, inputs, size)]
    path, target = named_object(text, "--data")
    try:
        batches = target() if callable(target) else target
    except Exception as error:
        raise NormswapError(f"--data {text!r}: {path}() raised {type(error).__name__}: {error}") from error
    try:
        check_batches(batches)
    except NormswapError as error:
        raise NormswapError(f"--data {text!r}: {error}") from error
    return batches  # type: ignore[return-value]


def _cut(name: str, inputs: tuple[Any, ...], size: int) -> Iterator[tuple[Any, ...]]:
    counts = {value.shape[0] if value.dim() else 0 for value in inputs if isinstance(value, Tensor)}
    if len(counts) != 1 or not (count := counts.pop()):
        raise NormswapError(f"--data {name}: its tensors must have one number of samples, along their first axis")
    for start in range(0, count, size):
        yield tuple(value[start : start + size] if isinstance(value, Tensor) else value for value in inputs)
