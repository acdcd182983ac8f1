r"""The passes over a large tensor that :mod:`normswap.norms.moments` is made of, without autograd.

For a dense ``x`` of shape ``(N, C, *S)``: its moments, ``a x + b``, the sums ``sum(g)`` and ``sum(g x)`` over space,
and ``a g + p x + q``, with ``(N, C)`` factors in float64. :class:`Passes` shifts ``x`` by its mean first, so that
nothing is lost to cancellation, and goes through it in blocks that stay in a CPU's cache. :class:`NativePasses` borrows
torch's kernels of group and batch normalization, which read ``x`` once and do not shift: for data whose means are not
large against their spread. :class:`KernelPasses` are for GPUs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import Tensor

from normswap.norms.arithmetic import fine, wide

BLOCK = 1 << 16
"""Values in a block for each thread of a CPU: 256 KiB of float32, half of a common second-level cache."""

OFF_CENTRE = {False: 64.0, True: 4.0}
"""Means of more than so many standard deviations are shifted away first. A mean of r deviations costs torch's
kernels a factor r in rounding; those for channels last in memory also add up the mean one value after another."""

SAMPLE = 1 << 14
"""Values in a sample from which one call for each sample pays."""

NEAR = 2.0
"""Means of at most so many standard deviations: of others, sums of squares lose too much."""

SHORT = 1 << 14
"""Rows of more values are too long for torch's norms, which add up one value after another."""


def portion(whole: int, each: int, limit: int) -> int:
    """How many of ``whole`` things of ``each`` values make a block of about ``limit``, all blocks alike: a small one at
    the end would take as many calls as the others."""
    return max(1, -(-whole // max(1, round(whole * each / limit))))


def scaled(block: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> Tensor:
    """``scale block + shift`` into ``out``, which may be ``block``; torch is faster in two steps where each row has a
    factor: where the last axis of the factors is 1."""
    if scale.shape[-1] == 1:
        return torch.mul(block, scale, out=out).add_(shift)
    return torch.addcmul(shift, block, scale, out=out)


class Room:
    """Memory for a block in the working precision, the same again and again."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.memory: Tensor | None = None

    def like(self, block: Tensor) -> Tensor:
        if self.memory is None or self.memory.numel() < block.numel():
            self.memory = block.new_empty(block.numel(), dtype=self.dtype)
        return self.memory[: block.numel()].view(block.shape)


class Passes:
    """Passes over tensors of the shape and memory layout of ``x``, of any floating dtype."""

    larger: ClassVar[int] = 1
    """Blocks are so many times larger, where calls for smaller ones take longer than the way to a higher cache."""

    def __init__(self, x: Tensor) -> None:
        self.samples, self.channels = x.shape[:2]
        self.count = x.numel() // (self.samples * self.channels)
        self.last = x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
        self.wide, self.fine = wide(x.dtype), fine(x.device)
        self.limit = self.larger * BLOCK * torch.get_num_threads() if x.device.type == "cpu" else x.numel()
        self.shift: Tensor

    def dense(self, tensor: Tensor) -> Tensor:
        """The tensor in this layout; itself, if it is."""
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if self.last else tensor.contiguous()

    def rows(self, tensor: Tensor) -> Tensor:
        """A dense tensor as ``(P, L, Q)``, moments running over ``L``: ``P`` is ``N`` and ``Q`` is ``C`` where channels
        are last in memory; otherwise ``P`` is ``N C`` and ``Q`` is 1."""
        if self.last:
            return tensor.movedim(1, -1).reshape(self.samples, self.count, self.channels)
        return tensor.view(-1, self.count, 1)

    def spread(self, values: Tensor) -> Tensor:
        """Factors ``(N, C)`` as ``(P, 1, Q)`` in the working precision."""
        return values.to(self.wide).reshape((self.samples, 1, self.channels) if self.last else (-1, 1, 1))

    def small(self, values: Tensor) -> Tensor:
        """``(P, 1, Q)`` as ``(N, C)``."""
        return values.reshape(self.samples, self.channels)

    def zeros(self, tensor: Tensor) -> Tensor:
        rows = self.rows(tensor)
        return torch.zeros((rows.shape[0], 1, rows.shape[2]), dtype=self.fine, device=tensor.device)

    def base(self) -> Tensor:
        """The shift, ``(N, C)``."""
        return self.small(self.shift).to(self.fine)

    def blocks(self, rows: Tensor) -> Iterator[tuple[slice, slice]]:
        """Slices of ``P`` and of ``L``."""
        outer, length, inner = rows.shape
        step = portion(outer, length * inner, self.limit)
        within = length if length * inner <= self.limit else portion(length, inner, self.limit)
        for i in range(0, outer, step):
            for j in range(0, length, within):
                yield slice(i, i + step), slice(j, j + within)

    def centred(self, block: Tensor, part: slice, out: Tensor | None = None) -> Tensor:
        """``x - shift`` of a block, in the working precision."""
        return torch.sub(block, self.shift[part], out=out)

    def measure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance over space, each ``(N, C)``."""
        rows = self.rows(x)
        self.shift = rows.mean(1, keepdim=True, dtype=self.wide)
        rest, square = self.zeros(x), self.zeros(x)
        for part, piece in self.blocks(rows):
            value = self.centred(rows[part, piece], part)
            rest[part].add_(value.sum(1, keepdim=True))
            square[part].add_(value.square_().sum(1, keepdim=True))
        rest, square = (self.small(total / self.count) for total in (rest, square))
        return self.base() + rest, (square - rest.square()).clamp_(min=0)

    def affine(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """``scale x + shift``."""
        out = torch.empty_like(x)
        rows, target = self.rows(x), self.rows(out)
        shift = self.spread(shift + scale * self.base())
        scale = self.spread(scale)
        for part, piece in self.blocks(rows):
            result = target[part, piece]
            value = self.centred(rows[part, piece], part, result if out.dtype == self.wide else None)
            value.mul_(scale[part]).add_(shift[part])
            if value is not result:
                result.copy_(value)
        return out

    def sums(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """``sum(grad)`` and ``sum(grad x)`` over space, each ``(N, C)``."""
        rows, grads = self.rows(x), self.rows(grad)
        total, product = self.zeros(x), self.zeros(x)
        for part, piece in self.blocks(rows):
            given = grads[part, piece]
            total[part].add_(given.sum(1, keepdim=True, dtype=self.wide))
            product[part].add_(self.centred(rows[part, piece], part).mul_(given).sum(1, keepdim=True))
        total, product = self.small(total), self.small(product)
        return total, product + total * self.base()

    def behind(self) -> int | Tensor:
        """Values behind each moment, at least 1."""
        return max(self.count, 1)

    def passed_on(self, mean: Tensor, by_mean: Tensor | None, by_var: Tensor | None) -> tuple[Tensor, Tensor]:
        """``(slope, level)``: what gradients by mean and variance give to each value, ``slope x + level``."""
        zero, count = torch.zeros_like(mean), self.behind()
        slope = (zero if by_var is None else by_var) * (2 / count)
        return slope, (zero if by_mean is None else by_mean) / count - slope * mean.detach()

    def combine(
        self, x: Tensor, grad: Tensor, scale: Tensor, slope: Tensor, level: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """``scale grad + slope x + level``, in ``out`` where it is given, which may be ``grad``."""
        out = torch.empty_like(grad) if out is None else out
        rows, grads, target = self.rows(x), self.rows(grad), self.rows(out)
        level = self.spread(level + slope * self.base())
        scale, slope = self.spread(scale), self.spread(slope)
        for part, piece in self.blocks(rows):
            value = self.centred(rows[part, piece], part).mul_(slope[part]).add_(level[part])
            value.addcmul_(grads[part, piece].to(self.wide), scale[part])
            target[part, piece].copy_(value)
        return out


def as_map(row: Tensor) -> Tensor:
    """``(L, C)`` as one map ``(1, C, L, 1)`` with channels last in memory."""
    return row.t()[None, :, :, None]


class NativePasses(Passes):
    """The same with fewer readings of ``x``, on a CPU, in float32 or float64, where the data allow it.

    ``measure`` finds out whether they do; where not, all is done as in :class:`Passes`."""

    def __init__(self, x: Tensor) -> None:
        super().__init__(x)
        self.plainly = True
        self.normalized: Tensor | None = None

    def measure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = self._by_sample(x) if self.last else self._by_sums(x) or self._by_row(x)
        self.plainly = bool((mean.square() <= OFF_CENTRE[self.last] ** 2 * var).all())
        if not self.plainly:
            self.normalized = None
            return super().measure(x)
        return mean, var

    def _by_sample(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.rows(x)
        moments = [torch.batch_norm_update_stats(as_map(row), None, None, 0.0) for row in rows]
        mean, var = (torch.stack(each).to(self.fine) for each in zip(*moments, strict=True))
        return mean, var

    def _by_sums(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Plain sums, of squares too, and with care for the few rows that lose by it; ``None`` where they are many."""
        if self.count > SHORT:
            return None
        rows = x.view(-1, self.count)
        mean = rows.sum(1).to(self.fine) / self.count
        square = torch.linalg.vector_norm(rows, dim=1).to(self.fine).square_() / self.count
        var = torch.addcmul(square, mean, mean, value=-1)
        lost = (square <= (NEAR**2 + 1) * var).logical_not_().nonzero().squeeze(1)  # Not a number, too.
        if 4 * len(lost) > len(rows):
            return None
        if len(lost):
            some = rows[lost]
            rest = some - some.mean(1, keepdim=True)
            left = rest.mean(1).to(self.fine)
            mean[lost] = some.mean(1).to(self.fine) + left
            var[lost] = rest.square_().mean(1).to(self.fine) - left.square()
        return self.small(mean), self.small(var.clamp_(min=0))

    def _by_row(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tiny = 1e-20  # Finite for a constant channel, and nothing beside the variance of any other.
        sizes = (self.samples, self.channels, self.count)
        self.normalized, mean, rstd = torch.native_group_norm(x, None, None, *sizes, self.channels, tiny)
        self.mean, self.rstd = mean.to(self.fine), rstd.to(self.fine)
        return self.mean, (self.rstd.pow(-2) - tiny).clamp_(min=0)

    def affine(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        if not self.plainly:
            return super().affine(x, scale, shift)
        if self.normalized is None:
            out = torch.empty_like(x)
            self._affine(x, scale, shift, out)
            return out
        out, self.normalized = self.normalized, None
        self._affine(out, scale / self.rstd, shift + scale * self.mean, out)
        return out

    def _affine(self, x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
        rows, target = self.rows(x), self.rows(out)
        scale, shift = self.spread(scale), self.spread(shift)
        if self.last:
            torch.addcmul(shift, rows, scale, out=target)
            return
        zero, one = torch.zeros_like(shift.view(-1)), torch.ones_like(shift.view(-1))
        torch.ops.aten.native_batch_norm.out(
            rows.view(1, *rows.shape[:2]), scale.view(-1), shift.view(-1), zero, one, False, 0.0, 0.0,
            out=target.view(1, *rows.shape[:2]), save_mean=zero.new_empty(0), save_invstd=zero.new_empty(0),
        )  # fmt: skip

    def sums(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        if not self.plainly:
            return super().sums(x, grad)
        rows, grads = self.rows(x), self.rows(grad)
        if self.last:
            zero, one = rows.new_zeros(self.channels), rows.new_ones(self.channels)
            found = [
                torch.ops.aten.native_batch_norm_backward(
                    as_map(given), as_map(row), one, None, None, zero, one, True, 0.0, [False, True, True]
                )
                for row, given in zip(rows, grads, strict=True)
            ]
            product, total = (torch.stack([each[index] for each in found]) for index in (1, 2))
        else:
            count = len(rows)
            zero, one = rows.new_zeros(1, count), rows.new_ones(1, count)
            _, product, total = torch.ops.aten.native_group_norm_backward(
                grads.view(1, count, -1), rows.view(1, count, -1), zero, one, one.view(-1), 1, count, self.count,
                count, [False, True, True],
            )  # fmt: skip
        return self.small(total).to(self.fine), self.small(product).to(self.fine)

    def combine(
        self, x: Tensor, grad: Tensor, scale: Tensor, slope: Tensor, level: Tensor, out: Tensor | None = None
    ) -> Tensor:
        if not self.plainly:
            return super().combine(x, grad, scale, slope, level, out)
        out = torch.empty_like(grad) if out is None else out
        self._affine(grad, scale, level, out)
        self.rows(out).addcmul_(self.rows(x), self.spread(slope))
        return out


class KernelPasses(Passes):
    """The same by the Triton kernels of :mod:`normswap.norms.kernels`, each reading every large tensor once."""

    def __init__(self, x: Tensor) -> None:
        super().__init__(x)
        from normswap.norms import kernels

        self.kernels = kernels
        self.layout = kernels.Layout.of(self.samples, self.channels, self.count, self.last)

    def measure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.mean, var = self.kernels.moments(self.layout, x)
        return self.small(self.mean), self.small(var)

    def affine(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.kernels.affine(self.layout, x, self.mean, scale, shift)

    def sums(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        total, product = self.kernels.sums(self.layout, x, grad, self.mean)
        return self.small(total), self.small(product)

    def combine(
        self, x: Tensor, grad: Tensor, scale: Tensor, slope: Tensor, level: Tensor, out: Tensor | None = None
    ) -> Tensor:
        return self.kernels.combine(self.layout, x, grad, self.mean, scale, slope, level, out)


KERNEL_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def has_kernels(x: Tensor) -> bool:
    """Whether the Triton kernels run on ``x``: on a GPU that Triton serves, or anywhere under its interpreter."""
    if x.dim() < 3 or x.dtype not in KERNEL_DTYPES:
        return False
    return (os.environ.get("TRITON_INTERPRET") == "1" or _serves(x.device)) and _installed()


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


@cache
def _serves(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)


class EmptyPasses(Passes):
    """Of a tensor without values: sums of zero, and moments of 0 and 1 that stand for none."""

    def __init__(self, x: Tensor) -> None:
        self.samples, self.channels, self.count = *x.shape[:2], 0

    def dense(self, tensor: Tensor) -> Tensor:
        return tensor

    def measure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.new_zeros((self.samples, self.channels), dtype=fine(x.device))
        return mean, torch.ones_like(mean)

    def affine(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return torch.empty_like(x)

    def sums(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros((self.samples, self.channels), dtype=fine(x.device))
        return total, total

    def combine(
        self, x: Tensor, grad: Tensor, scale: Tensor, slope: Tensor, level: Tensor, out: Tensor | None = None
    ) -> Tensor:
        return torch.empty_like(grad) if out is None else out


def passes(x: Tensor) -> Passes:
    """The passes for ``x``, which must be dense: ``x = passes(x).dense(x)``."""
    if x.numel() == 0:
        return EmptyPasses(x)
    if has_kernels(x):
        return KernelPasses(x)
    native = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.dim() > 2
    chosen = NativePasses(x) if native else Passes(x)
    if native and (chosen.count == 1 or (chosen.last and x[0].numel() < SAMPLE)):
        return Passes(x)
    return chosen
