r"""The affine that makes a normalized value like the original norm's output, in closed form, channel by channel.

Let ``z`` be the new norm's output before its affine and ``y`` the original norm's output, with means, variances and
covariance :math:`m_z, m_y, v_z, v_y, c` over samples and positions. The new affine ``w z + b`` is

* least squares: :math:`w = (c + \lambda w_0) / (v_z + \lambda)`, which explains most of ``y``, and shrinks where ``z``
  explains little of it;
* moments: :math:`w = \mathrm{sign}(c) \sqrt{v_y / v_z}`, which keeps the mean and variance that later layers expect;

both with :math:`b = m_y - w m_z`. The small ridge :math:`\lambda` draws towards the weight before, :math:`w_0`, which
a dead channel (:math:`v_z \approx 0`) so keeps; such a channel is never fitted by its moments. A norm without bias is
fitted by least squares through zero, one without weight by its mean alone.

All of it comes from five sums a channel, in float64. They add up over batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Method = Literal["moments", "least_squares"]

RIDGE = 1e-6
"""In units of ``z``, whose variance is near 1."""
DEAD = 1e-4
"""Below this variance of ``z`` its moments are noise."""
CHUNK = 1 << 17
"""Elements that are cast to float64 at once: a MiB stays in the cache, with eight the sums take twice as long."""


@dataclass(frozen=True)
class Layout:
    """Where the affine of a norm lies in its output."""

    axis: int
    """1 for ``(N, C, *S)``, -1 for ``(*, C)`` or ``(*, *shape)``."""
    shape: tuple[int, ...]
    """The shape of weight and bias."""

    @property
    def size(self) -> int:
        size = 1
        for length in self.shape:
            size *= length
        return size

    def broadcast(self, values: Tensor, like: Tensor) -> Tensor:
        """``values`` of ``size`` in a shape that multiplies ``like``, with its dtype and device."""
        values = values.to(device=like.device, dtype=like.dtype)
        if self.axis == 1:
            return values.reshape(-1, *[1] * (like.dim() - 2))
        return values.reshape(self.shape)

    def channels_last(self, x: Tensor) -> bool:
        """Whether the values of one position lie together in memory."""
        return self.axis == -1 or (x.dim() > 2 and x.movedim(1, -1).is_contiguous())

    def rows(self, x: Tensor, last: bool) -> Tensor:
        """``x`` as ``(N, size, positions)``, or with ``last`` as ``(N·positions, size, 1)``."""
        if self.axis == -1 or not last:
            return x.reshape(-1, self.size, 1) if self.axis == -1 else x.reshape(x.shape[0], self.size, -1)
        return x.movedim(1, -1).reshape(-1, self.size, 1)


@dataclass
class Sums:
    """Of ``z`` and ``y``: the count, and ``(5, size)`` sums of z, y, z², y², zy in float64."""

    count: Tensor
    values: Tensor

    @classmethod
    def zero(cls, size: int, device: torch.device) -> Sums:
        return cls(*(torch.zeros(n, dtype=torch.float64, device=device) for n in ((), (5, size))))

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.count + other.count, self.values + other.values)

    def scaled(self, factor: Tensor) -> Sums:
        return Sums(self.count * factor, self.values * factor)

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        total = self.count.clamp(min=1)
        return self.values[0] / total, self.values[1] / total

    @property
    def variances(self) -> tuple[Tensor, Tensor, Tensor]:
        """Variances of z and y and their covariance, ``(size,)`` each."""
        total = self.count.clamp(min=1)
        z, y = self.means
        zz, yy, zy = self.values[2:] / total
        return (zz - z * z).clamp(min=0), (yy - y * y).clamp(min=0), zy - z * y


def sums(layout: Layout, several: Sequence[Tensor], y: Tensor | None = None) -> list[Sums]:
    """The sums over one batch, for each of ``several`` z with the same ``y``.

    All have the same shape, any floating dtype; without ``y`` its sums are zero, and all are for a batch without
    samples."""
    totals = [Sums.zero(layout.size, z.device) for z in several]
    if not several[0].numel():
        return totals
    last = layout.channels_last(several[0])
    rows = [layout.rows(z.detach(), last) for z in several]
    others = None if y is None else layout.rows(y.detach(), last)
    step = max(1, CHUNK // max(1, rows[0][:1].numel()))
    for first in range(0, rows[0].shape[0], step):
        part = slice(first, first + step)
        b = None if others is None else others[part].to(rows[0].device, torch.float64)
        of_y = None if b is None else (b.sum((0, 2)), _dot(b, b))
        for total, z in zip(totals, rows, strict=True):
            a = z[part].double()
            total.count += a.shape[0] * a.shape[2]
            total.values[0] += a.sum((0, 2))
            total.values[2] += _dot(a, a)
            if b is not None and of_y is not None:
                total.values[1] += of_y[0]
                total.values[3] += of_y[1]
                total.values[4] += _dot(a, b)
    return totals


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sums of products over samples and positions, ``(size,)``."""
    products: Tensor = a.mul(b).squeeze(-1) if a.shape[2] == 1 else torch.linalg.vecdot(a, b)
    total: Tensor = products.sum(0)
    return total


@dataclass(frozen=True)
class Values:
    """Of one norm, ``(size,)`` each in float64: the affine, 1 and 0 where it has none, and running statistics."""

    weight: Tensor
    bias: Tensor
    mean: Tensor | None = None
    var: Tensor | None = None


def fitted(total: Sums, method: Method, before: Values, has_weight: bool, has_bias: bool) -> Values:
    """The affine by the formulas above; ``before`` is the present one. Its statistics are kept."""
    (mean_z, mean_y), (var_z, var_y, cov) = total.means, total.variances
    weight, bias = before.weight, before.bias
    if has_weight and has_bias:
        weight = (cov + RIDGE * weight) / (var_z + RIDGE)
        if method == "moments":
            weight = torch.where(var_z > DEAD, cov.sign() * (var_y / var_z.clamp(min=DEAD)).sqrt(), weight)
    elif has_weight:
        square, product = total.values[2] / total.count.clamp(min=1), total.values[4] / total.count.clamp(min=1)
        weight = (product + RIDGE * weight) / (square + RIDGE)
    if has_bias:
        bias = mean_y - weight * mean_z
    return Values(weight, bias, before.mean, before.var)


def unexplained(total: Sums, values: Values) -> Tensor:
    """Sum of squares of ``y - (w z + b)``, ``(size,)``."""
    z, y, zz, yy, zy = total.values
    w, b = values.weight, values.bias
    left: Tensor = yy - 2 * (w * zy + b * y) + w * w * zz + 2 * w * b * z + total.count * b * b
    return left.clamp(min=0)


def explained(total: Sums, values: Values) -> float:
    """R²: the share of the variance of ``y`` that ``w z + b`` explains, over all channels; ``nan`` for a constant
    ``y``."""
    spread = float((total.variances[1] * total.count).sum())
    return 1 - float(unexplained(total, values).sum()) / spread if spread > 0 else float("nan")
