"""What a layer takes: floating values of ``(N, C, *S)``. Integers would be cut off without a word."""

from __future__ import annotations

from torch import Tensor


def check_input(x: Tensor, channels: int, dims: frozenset[int] | None, least: int = 2) -> None:
    """Raise ``ValueError`` for an input of a rank not in ``dims``, or below ``least``, with other channels, or of no
    floating dtype."""
    if x.dim() not in dims if dims is not None else x.dim() < least:
        expected = f"at least {least}D" if dims is None else " or ".join(f"{d}D" for d in sorted(dims))
        raise ValueError(f"expected {expected} input (got {x.dim()}D input)")
    if x.shape[1] != channels:
        raise ValueError(f"expected {channels} channels on axis 1 (got {x.shape[1]})")
    if not x.is_floating_point():
        raise ValueError(f"expected a floating input (got {x.dtype}): convert it first, as by x.float()")
