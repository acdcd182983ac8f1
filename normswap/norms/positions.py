r"""Normalization over the channels of a map, at each position by itself, on a CPU.

.. math::  y_c = (x_c - \mu)\, r\, w_c + b_c, \quad \mu = \tfrac1C \sum_c x_c, \quad
           r = \bigl(\tfrac1C \sum_c (x_c - \mu)^2 + \varepsilon\bigr)^{-1/2},

or, not centred, the same with :math:`\mu = 0`. With :math:`n = (x - \mu) r` and :math:`g` the gradient by :math:`y`,
those by :math:`w` and :math:`b` are :math:`\sum g n` and :math:`\sum g` over positions, and

.. math::  \frac{\partial E}{\partial x_c} = r \bigl(w_c g_c - \tfrac1C \sum_k w_k g_k
           - \tfrac{n_c}C \sum_k w_k g_k n_k\bigr)

(Ba, Kiros and Hinton, arXiv 1607.06450), without the second term where :math:`\mu = 0`. torch's kernel wants the
channels side by side in memory and is taken where they are; where they are not, it would copy every map twice. Here a
map is gone through in blocks that stay in a cache. Of means that are large against the spread, which torch's kernel
subtracts as the working precision has them, what rounding left is subtracted too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from normswap.norms.arithmetic import unrounded, whole_products, wide
from normswap.norms.moments import _plainly, again, looked_into
from normswap.norms.passes import BLOCK, Room, portion

OFF_CENTRE = 64.0
"""Means of more than so many standard deviations are subtracted twice: as the working precision has them, and then what
is left of them."""

LARGER = 6
"""A block is so many times larger than in the passes, to have fewer of them."""


def can(x: Tensor, *tensors: Tensor | None) -> bool:
    """Whether :func:`over_channels` is for ``x``: dense on a CPU, and nothing looks into the operations."""
    return not _plainly(x, tensors) and x.device.type == "cpu" and x.numel() > 0 and x.dim() > 1


def over_channels(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool = True) -> Tensor:
    """``x`` of shape ``(N, C, *S)``, any floating dtype, normalized; in its shape, dtype and memory format.

    ``weight`` and ``bias`` have shape ``(C,)``. For an ``x`` that :func:`can` is true of."""
    last = x.movedim(1, -1)
    if centred and last.is_contiguous() and (x.dim() == 2 or not x.is_contiguous()):
        times, plus = (t if t is None or t.dtype == wide(x.dtype) else t.to(x.dtype) for t in (weight, bias))
        found, mean, inverse = torch.native_layer_norm(last, last.shape[-1:], times, plus, eps)
        if _near(mean.detach(), inverse.detach()):
            return found.movedim(-1, 1)
    out: Tensor = _OverChannels.apply(x, eps, centred, weight, bias)  # type: ignore[no-untyped-call]
    return out


def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool) -> Tensor:
    """:func:`over_channels` in operations that torch differentiates by itself."""
    values = x.to(wide(x.dtype))
    for _ in range(2 if centred else 0):  # Once more for what rounding left.
        values = values - values.mean(1, keepdim=True)
    values = values * torch.rsqrt(values.square().mean(1, keepdim=True) + eps)
    each = (-1, *[1] * (x.dim() - 2))
    values = values if weight is None else values * weight.to(values.dtype).reshape(each)
    return (values if bias is None else values + bias.to(values.dtype).reshape(each)).to(x.dtype)


class _View:
    """``x`` as ``(N, C, L)``, or as ``(1, N L, C)`` where the channels are last in memory, cut into blocks."""

    def __init__(self, x: Tensor) -> None:
        moved = x.movedim(1, -1)
        self.last = moved.is_contiguous() and not (x.dim() > 2 and x.is_contiguous())
        self.axis = 2 if self.last else 1
        self.channels, self.wide = x.shape[1], wide(x.dtype)

    def rows(self, tensor: Tensor) -> Tensor:
        if self.last:
            return tensor.movedim(1, -1).reshape(1, -1, self.channels)
        return tensor.reshape(tensor.shape[0], self.channels, -1)

    def dense(self, tensor: Tensor) -> Tensor:
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if self.last else tensor.contiguous()

    def each(self, values: Tensor | None, default: float) -> Tensor:
        """``(C,)`` to go with a block."""
        found = torch.full((self.channels,), default, dtype=self.wide) if values is None else values.to(self.wide)
        return found if self.last else found.unsqueeze(1)

    def blocks(self, rows: Tensor) -> Iterator[tuple[slice, ...]]:
        """Places of all values, of ``first``, then of positions."""
        limit = LARGER * BLOCK * torch.get_num_threads()
        first, second, third = rows.shape
        length = second if self.last else third
        within = portion(length, self.channels, limit)
        step = 1 if within * self.channels >= BLOCK else portion(first, within * self.channels, limit)
        for start in range(0, first, step):
            for begin in range(0, length, within):
                piece = slice(begin, begin + within)
                yield (slice(start, start + step), *((piece,) if self.last else (slice(None), piece)))

    def each_position(self, rows: Tensor) -> Tensor:
        """Room for a value of every position."""
        return rows.new_empty(
            (rows.shape[0], 1, rows.shape[2]) if not self.last else (*rows.shape[:2], 1), dtype=self.wide
        )

    def position(self, place: tuple[slice, ...]) -> tuple[slice, ...]:
        """Where :meth:`each_position` has the positions of a block."""
        return place if self.last else (place[0], slice(None), place[2])

    def mean(self, block: Tensor, weights: Tensor | None = None) -> Tensor:
        """Over the channels, of the block, or of its products with ``weights``."""
        if weights is None:
            return block.mean(self.axis, keepdim=True)
        if not whole_products():
            return (block * weights).mean(self.axis, keepdim=True)
        found = block @ weights.unsqueeze(1) if self.last else weights.t() @ block
        return found.div_(self.channels)


class _OverChannels(torch.autograd.Function):
    """:func:`over_channels`, by hand: see the module's text."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, centred: bool, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        view = _View(x)
        dense = view.dense(x)
        out = torch.empty_like(dense)
        rows, target = view.rows(dense), view.rows(out)
        times, plus, room = view.each(weight, 1.0), view.each(bias, 0.0), (Room(view.wide), Room(view.wide))
        means, inverses = view.each_position(rows) if centred else None, view.each_position(rows)
        near = True
        for place in view.blocks(rows):
            result = target[place]
            made = result if out.dtype == view.wide else room[0].like(result)
            mean, inverse, good = _whiten(view, rows[place].to(view.wide), eps, centred, made, room[1])
            near = near and good
            if means is not None and mean is not None:
                means[view.position(place)] = mean
            inverses[view.position(place)] = inverse
            if weight is not None:
                made.mul_(times)
            if bias is not None:
                made.add_(plus)
            if made is not result:
                result.copy_(made)
        ctx.save_for_backward(x, weight, bias, *((means, inverses) if near else ()))
        ctx.options = eps, centred
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *kept = ctx.saved_tensors
        eps, centred = ctx.options
        if looked_into(gradients[0]):
            return again(ctx, lambda: plain(x, weight, bias, eps, centred), x, (weight, bias), gradients[0])
        view = _View(x)
        dense, grad = view.dense(x), view.dense(gradients[0])
        out = torch.empty_like(dense)
        rows, grads, target, times = view.rows(dense), view.rows(grad), view.rows(out), view.each(weight, 1.0)
        over = tuple(axis for axis in range(3) if axis != view.axis)
        by_weight, by_bias = torch.zeros(2, view.channels, dtype=torch.float64)
        room = [Room(view.wide) for _ in range(3)]
        with unrounded(x.device):
            for place in view.blocks(rows):
                given, result, block = grads[place].to(view.wide), target[place], rows[place].to(view.wide)
                normal = room[0].like(given)
                if kept:
                    means, inverse = kept[0], kept[1][view.position(place)]
                    value = block if means is None else torch.sub(block, means[view.position(place)], out=normal)
                    torch.mul(value, inverse, out=normal)
                else:
                    inverse = _whiten(view, block, eps, centred, normal, room[1])[1]
                made = result if out.dtype == view.wide else room[2].like(given)
                torch.mul(given, normal, out=made)
                by_weight += made.sum(over)
                by_bias += given.sum(over)
                along = view.mean(made, times)
                torch.mul(given, times, out=made).addcmul_(normal, along, value=-1)
                if centred:
                    made.sub_(view.mean(given, times))
                made.mul_(inverse)
                if made is not result:
                    result.copy_(made)
        needed = ctx.needs_input_grad
        return (
            out if needed[0] else None, None, None,
            by_weight.to(weight.dtype) if needed[3] else None, by_bias.to(bias.dtype) if needed[4] else None,
        )  # fmt: skip


def _whiten(
    view: _View, block: Tensor, eps: float, centred: bool, out: Tensor, room: Room
) -> tuple[Tensor | None, Tensor, bool]:
    """``n`` into ``out``; the mean and the inverse deviation of each position, and whether that mean is all that was
    subtracted."""
    squares = room.like(block)
    if not centred:
        inverse = torch.rsqrt(view.mean(torch.mul(block, block, out=squares)) + eps)
        torch.mul(block, inverse, out=out)
        return None, inverse, True
    mean = view.mean(block)
    value = torch.sub(block, mean, out=out)
    inverse = torch.rsqrt(view.mean(torch.mul(value, value, out=squares)) + eps)
    near = _near(mean, inverse)
    if not near:
        value.sub_(view.mean(value))
        inverse = torch.rsqrt(view.mean(torch.mul(value, value, out=squares)) + eps)
    value.mul_(inverse)
    return mean, inverse, near


def _near(mean: Tensor, inverse: Tensor) -> bool:
    """Whether no mean is so large that its rounding shows in the result."""
    return bool((mean.abs() * inverse <= OFF_CENTRE).all())
