r"""The passes over a large tensor as Triton kernels, which :class:`normswap.norms.passes.KernelPasses` launches.

A tensor is seen as ``(outer, kept, length)``: sums run over ``length``, factors belong to ``outer`` and ``kept``. With
channels first in memory ``kept`` is ``N C`` with the values of a row side by side; with channels last ``outer`` is
``N`` and the values of all channels at one place stand side by side. One source serves both, by strides.

A program goes through a part of the length in chunks, with one sum for each place of a chunk. It subtracts first the
mean :math:`k` of its first chunk, as the working precision has it: with :math:`d = x - k`, :math:`m = k + \bar d` and
:math:`\sum (x - m)^2 = \sum d^2 - n \bar d^2` (shifted sums: Chan, Golub and LeVeque, *Algorithms for computing the
sample variance*, 1983). Of :math:`q` chunks no data make :math:`\bar d^2` more than :math:`q` variances, so at most a
factor of :math:`q` is lost. Parts are put together by Chan's formula, in float64, as is everything that belongs to a
row; values are accumulated in float32, float64 ones in float64.

This module imports triton, and is imported only where a kernel is to run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048
"""Values that a program holds at once."""
PROGRAMS = 1024
"""So many keep a large GPU busy: a length is cut into parts until there are as many, if it is long enough."""


@triton.jit
def _place(index, kept, length, part, ROWS: tl.constexpr):
    """Rows, part of the length and outer index of a program; all on one axis of the grid, for the others are short."""
    blocks = tl.cdiv(kept, ROWS)
    parts = tl.cdiv(length, part)
    rows = (index % blocks) * ROWS + tl.arange(0, ROWS)
    return rows, index // blocks % parts, (index // (blocks * parts)).to(tl.int64)


@triton.jit
def _moments(
    x, mean, square, outers, kept, length, part, kept_stride, step, outer_stride,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    rows, number, outer = _place(tl.program_id(0), kept, length, part, ROWS)
    start = number * part
    stop = tl.minimum(start + part, length)
    inside = rows[:, None] < kept
    x += outer * outer_stride + rows.to(tl.int64)[:, None] * kept_stride
    places = start + tl.arange(0, CHUNK)[None, :]
    mask = inside & (places < stop)
    value = tl.load(x + places.to(tl.int64) * step, mask=mask, other=0.0).to(WIDE)
    shift = tl.sum(value, 1) / tl.minimum(CHUNK, stop - start).to(WIDE)
    value = tl.where(mask, value - shift[:, None], 0.0)
    total = value
    squares = value * value
    for first in range(start + CHUNK, stop, CHUNK):
        places = first + tl.arange(0, CHUNK)[None, :]
        mask = inside & (places < stop)
        value = tl.load(x + places.to(tl.int64) * step, mask=mask, other=0.0).to(WIDE)
        value = tl.where(mask, value - shift[:, None], 0.0)
        total += value
        squares += value * value
    count = (stop - start).to(tl.float64)
    rest = tl.sum(total, 1).to(tl.float64) / count
    result = (number * outers + outer) * kept + rows
    tl.store(mean + result, shift.to(tl.float64) + rest, mask=rows < kept)
    tl.store(square + result, tl.sum(squares, 1).to(tl.float64) - count * rest * rest, mask=rows < kept)


@triton.jit
def _sums(
    x, grad, mean, totals, products, outers, kept, length, part, kept_stride, step, outer_stride,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    rows, number, outer = _place(tl.program_id(0), kept, length, part, ROWS)
    start = number * part
    stop = tl.minimum(start + part, length)
    inside = rows[:, None] < kept
    offset = outer * outer_stride + rows.to(tl.int64)[:, None] * kept_stride
    shift = tl.load(mean + outer * kept + rows, mask=rows < kept, other=0.0).to(WIDE)
    total = tl.zeros((ROWS, CHUNK), WIDE)
    product = tl.zeros((ROWS, CHUNK), WIDE)
    for first in range(start, stop, CHUNK):
        places = first + tl.arange(0, CHUNK)[None, :]
        mask = inside & (places < stop)
        here = offset + places.to(tl.int64) * step
        given = tl.load(grad + here, mask=mask, other=0.0).to(WIDE)
        value = tl.load(x + here, mask=mask, other=0.0).to(WIDE)
        total += given
        product += tl.where(mask, given * (value - shift[:, None]), 0.0)
    all_given = tl.sum(total, 1).to(tl.float64)
    result = (number * outers + outer) * kept + rows
    tl.store(totals + result, all_given, mask=rows < kept)
    moved = tl.sum(product, 1).to(tl.float64) + all_given * shift.to(tl.float64)
    tl.store(products + result, moved, mask=rows < kept)


@triton.jit
def _combine(
    x, grad, mean, slope, factor, level, out, outers, kept, length, part, kept_stride, step, outer_stride,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    # From the end: what was read last, for the sums, is still in the cache.
    rows, number, outer = _place(tl.num_programs(0) - 1 - tl.program_id(0), kept, length, part, ROWS)
    start = number * part
    chunks = tl.cdiv(tl.minimum(part, length - start), CHUNK)
    row = outer * kept + rows
    shift = tl.load(mean + row, mask=rows < kept, other=0.0).to(WIDE)
    each = tl.load(slope + row, mask=rows < kept, other=0.0)
    constant = (tl.load(level + row, mask=rows < kept, other=0.0) + each * shift.to(tl.float64)).to(WIDE)
    times = each.to(WIDE)
    if GRADIENT:
        given_times = tl.load(factor + row, mask=rows < kept, other=0.0).to(WIDE)
    offset = outer * outer_stride + rows.to(tl.int64)[:, None] * kept_stride
    for chunk in range(0, chunks):
        places = start + (chunks - 1 - chunk) * CHUNK + tl.arange(0, CHUNK)[None, :]
        mask = (rows[:, None] < kept) & (places < length)
        here = offset + places.to(tl.int64) * step
        value = tl.load(x + here, mask=mask, other=0.0).to(WIDE) - shift[:, None]
        value = value * times[:, None] + constant[:, None]
        if GRADIENT:
            value += tl.load(grad + here, mask=mask, other=0.0).to(WIDE) * given_times[:, None]
        tl.store(out + here, value.to(out.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Layout:
    """Where the values of a dense tensor ``(N, C, *S)`` stand, and the tiles that a program takes of them."""

    outer: int
    kept: int
    length: int
    kept_stride: int
    step: int

    @staticmethod
    def of(samples: int, channels: int, count: int, last: bool) -> Layout:
        """``last``: with channels last in memory."""
        if last:
            return Layout(samples, channels, count, 1, channels)
        return Layout(1, samples * channels, count, count, 1)

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and places of a tile, powers of two: long on the axis along which values stand side by side."""
        rows, places = (int(triton.next_power_of_2(n)) for n in (self.kept, self.length))
        if self.kept_stride == 1 and self.step != 1:
            rows = min(rows, 64, TILE)
            return rows, min(places, TILE // rows)
        places = min(places, TILE)
        return min(rows, TILE // places), places

    @property
    def part(self) -> int:
        """Length of the part that a program goes through: whole chunks."""
        rows, places = self.tile
        programs = self.outer * triton.cdiv(self.kept, rows)
        chunks = triton.cdiv(self.length, places)
        return int(triton.cdiv(chunks, min(chunks, triton.cdiv(PROGRAMS, programs))) * places)


def _launch(kernel: Any, layout: Layout, x: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel over the rows, the parts of the length, and the outer axis."""
    (rows, chunk), part = layout.tile, layout.part
    grid = (triton.cdiv(layout.kept, rows) * triton.cdiv(layout.length, part) * layout.outer,)
    sizes = (layout.outer, layout.kept, layout.length, part)
    strides = (layout.kept_stride, layout.step, layout.kept * layout.length)
    wide = tl.float64 if x.dtype == torch.float64 else tl.float32
    with torch.cuda.device_of(x):
        kernel[grid](x, *arguments, *sizes, *strides, ROWS=rows, CHUNK=chunk, WIDE=wide, **constants)


def _partial(layout: Layout, x: Tensor) -> Tensor:
    """Room for two results of every part of every row: ``(2, parts, rows)`` in float64."""
    parts = triton.cdiv(layout.length, layout.part)
    return torch.empty((2, parts, layout.outer * layout.kept), dtype=torch.float64, device=x.device)


def moments(layout: Layout, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every row, flat, in float64."""
    part, found = layout.part, _partial(layout, x)
    _launch(_moments, layout, x, *found)
    means, squares = found
    if len(means) == 1:
        return means[0], (squares[0] / layout.length).clamp_(min=0)
    shares = means.new_full((len(means), 1), part / layout.length)
    shares[-1:].fill_(1 - part * (len(means) - 1) / layout.length)
    mean = (means * shares).sum(0)
    var = squares.sum(0) / layout.length + ((means - mean).square() * shares).sum(0)
    return mean, var.clamp_(min=0)


def sums(layout: Layout, x: Tensor, grad: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """``sum(grad)`` and ``sum(grad x)`` of every row, flat, in float64."""
    found = _partial(layout, x)
    _launch(_sums, layout, x, grad, mean, *found)
    total, product = found[:, 0] if found.shape[1] == 1 else found.sum(1)
    return total, product


def affine(layout: Layout, x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``scale x + shift``, in the dtype of ``x``."""
    out = torch.empty_like(x)
    scale, shift = scale.contiguous(), shift.contiguous()
    _launch(_combine, layout, x, x, mean, scale, scale, shift, out, GRADIENT=False)
    return out


def combine(
    layout: Layout,
    x: Tensor,
    grad: Tensor,
    mean: Tensor,
    scale: Tensor,
    slope: Tensor,
    level: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """``scale grad + slope x + level``, in the dtype of ``grad``; ``out`` may be ``grad``."""
    out = torch.empty_like(grad) if out is None else out
    scale, slope, level = scale.contiguous(), slope.contiguous(), level.contiguous()
    _launch(_combine, layout, x, grad, mean, slope, scale, level, out, GRADIENT=True)
    return out
