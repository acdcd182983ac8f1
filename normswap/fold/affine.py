r"""The channel affine :math:`y = s\,x + t`, on one axis of a tensor, in float64.

Affines compose: :math:`(s_2, t_2) \circ (s_1, t_1) = (s_2 s_1,\; s_2 t_1 + t_2)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Affine:
    """``scale`` and ``shift``, each ``(channels,)`` in float64, on the CPU or where the model is."""

    scale: Tensor
    shift: Tensor

    @property
    def channels(self) -> int:
        return self.scale.shape[0]

    @cached_property
    def no_shift(self) -> bool:
        return not bool(self.shift.any())

    @cached_property
    def non_negative(self) -> bool:
        return bool((self.scale >= 0).all())

    @cached_property
    def finite(self) -> bool:
        return math.isfinite(float(self.scale.sum())) and math.isfinite(float(self.shift.sum()))

    def after(self, first: Affine) -> Affine:
        """This affine applied to the result of ``first``."""
        return Affine(self.scale * first.scale, self.scale * first.shift + self.shift)

    def slice(self, start: int, length: int) -> Affine:
        return Affine(self.scale[start : start + length], self.shift[start : start + length])

    def padded(self, before: int, behind: int) -> Affine:
        """With channels in front and behind that stay as they are."""
        return Affine(
            torch.cat([self.scale.new_ones(before), self.scale, self.scale.new_ones(behind)]),
            torch.cat([self.shift.new_zeros(before), self.shift, self.shift.new_zeros(behind)]),
        )

    def repeated(self, times: int) -> Affine:
        """Every channel ``times`` times in a row."""
        return Affine(self.scale.repeat_interleave(times), self.shift.repeat_interleave(times))

    def scale_only(self) -> Affine:
        return Affine(self.scale, torch.zeros_like(self.shift))

    def same(self, other: Affine) -> bool:
        return self is other or (torch.equal(self.scale, other.scale) and torch.equal(self.shift, other.shift))
