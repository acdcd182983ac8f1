"""Values of one tensor that are of another order than the rest: masks, and what stands for infinity.

A model that masks with -1e9 has outputs next to which any other difference is small. So a tensor is looked at in
*levels*: all values, and then those below a gap in the magnitudes, as long as there is one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

OCTAVES = 5
"""Empty powers of two between two magnitudes that make a gap: a continuous density has none above a few values."""
LEAST = 8
"""Values that must lie below a gap: fewer may be near zero by chance."""


def levels(values: Tensor) -> Iterator[Tensor]:
    """Masks over ``values`` (any shape, real or complex): the finite ones, then those below each gap, downwards.

    Zeros belong to every level."""
    size = values.abs()
    inside = size.isfinite()
    yield inside
    some = inside & (size > 0)
    if int(some.sum()) <= LEAST:
        return
    powers = torch.frexp(size[some].double()).exponent.long()
    lowest = int(powers.min())
    below = torch.bincount(powers - lowest).tolist()
    total, empty, bounds = 0, 0, []
    for power, count in enumerate(below):
        if count and empty >= OCTAVES and total >= LEAST:
            bounds.append(power - empty + lowest)  # Below the gap the magnitudes are less than 2 ** this.
        empty = 0 if count else empty + 1
        total += count
    for bound in reversed(bounds):
        yield inside & (size.double() < 2.0**bound)


def boundless(values: Tensor, where: Tensor) -> Tensor:
    """Floating-point ``values`` with those at or beyond the largest numbers of their dtype as infinities, at places
    ``where``.

    ``masked_fill`` with ``torch.finfo(x.dtype).min`` means minus infinity, and another number in every dtype: there a
    wider dtype has a value beyond the range of a narrower one."""
    extreme = where & (values.abs() >= 0.5 * torch.finfo(values.dtype).max)
    return torch.where(extreme, values.sign() * torch.inf, values)
