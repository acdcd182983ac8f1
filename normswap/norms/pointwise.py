r"""The core for norms whose output is no multiple of their input: any function of each value and a few factors.

As in :mod:`normswap.norms.moments`, small tensors are made from the moments of each sample and channel; here

.. math::  y = h(x;\, c_1, \dots, c_k), \quad (c_1, \dots, c_k) = f(m, v, \theta),

with :math:`c_i` of shape ``(N, C)`` and :math:`h` applied to each value by itself. Of large tensors, only ``x`` is
kept; the backward pass computes :math:`h` again and its derivatives by hand, block by block in a CPU's cache: the
sums :math:`\sum g\, \partial h / \partial c_i`, which the gradient of :math:`f` takes on, and
:math:`g\, \partial h / \partial x`. A second pass adds what :math:`m` and :math:`v` pass on to ``x``, as in the other
core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from normswap.norms.gradient import with_gradient
from normswap.norms.moments import Moments, _empty, _plainly, again, looked_into, measured
from normswap.norms.passes import NativePasses, Passes, passes, portion


class Factors(NamedTuple):
    """What ``h`` takes beside ``x``, each ``(N, C)`` or broadcast to it, in the dtype of the moments."""

    values: tuple[Tensor, ...]
    seen: tuple[Tensor, ...] = ()
    """What the layer wants back, detached: the moments for its running statistics."""


Small = Callable[..., Factors]
"""``f(moments, *tensors)``; pure, and all that it differentiates is in its arguments. With a method ``by_hand`` it
brings its gradient: see :mod:`normswap.norms.gradient`."""


class Pointwise:
    """``h(x, *factors)`` of tensors that broadcast, each value by itself, and the same block by block.

    A block has shape ``(P, L, Q)`` and its factors ``(P, 1, Q)``, in the working precision; ``room`` is memory for so
    many blocks as ``buffers`` says, whose contents mean nothing."""

    buffers: ClassVar[int] = 1
    times: ClassVar[int | None] = None
    """Which factor :meth:`backward` leaves out of the gradient by ``x``; all of it is a multiple of that one."""

    def __call__(self, x: Tensor, *factors: Tensor) -> Tensor:
        """In operations that torch differentiates."""
        raise NotImplementedError

    def forward(self, x: Tensor, factors: tuple[Tensor, ...], out: Tensor) -> None:
        """``h`` into ``out``, which is not ``x``."""
        raise NotImplementedError

    def backward(
        self, x: Tensor, grad: Tensor, factors: tuple[Tensor, ...], out: Tensor, room: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """The gradient by ``x`` with the factors held into ``out``; for each factor its own, summed over ``L``."""
        raise NotImplementedError


def transform(
    x: Tensor, function: Small, pointwise: Pointwise, *tensors: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``(y, seen)`` with ``y = h(x; c)`` in the shape, dtype and memory format of ``x``.

    ``x`` has shape ``(N, C, *S)``, any floating dtype; ``(c, seen) = function(moments, *tensors)``. Gradients flow to
    ``x`` and to ``tensors``, not to ``seen``. An empty ``x`` has no moments: ``seen`` is empty too."""
    if x.numel() == 0:
        return _empty(x, tensors), ()
    if _plainly(x, tensors):
        return plain(x, function, pointwise, *tensors)
    out, *seen = _Transform.apply(x, function, pointwise, *tensors)  # type: ignore[no-untyped-call]
    return out, tuple(seen)


def plain(
    x: Tensor, function: Small, pointwise: Pointwise, *tensors: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """:func:`transform` in operations that torch differentiates, compiles and exports by itself."""
    centred, base, moments = measured(x)
    values, seen = function(moments, *tensors)
    factors = [each.expand_as(base).to(centred.dtype).unsqueeze(2) for each in values]
    flat = (x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)).to(centred.dtype)
    return pointwise(flat, *factors).to(x.dtype).reshape(x.shape), tuple(each.detach() for each in seen)


class _Transform(torch.autograd.Function):
    """:func:`transform`, by hand: see the module's text."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, function: Small, pointwise: Pointwise, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        asked = ctx.needs_input_grad
        over = passes(x)
        dense = over.dense(x.detach())
        cut = _Cut(over, over.rows(dense))
        moments = Moments(*over.measure(dense), over.count)
        small = with_gradient(function, moments, tensors, (asked[0], *asked[3:]))
        out = _made(over, cut, pointwise, dense, small.values)
        ctx.mark_non_differentiable(*small.seen)
        ctx.save_for_backward(x, *tensors)
        ctx.functions = function, pointwise
        if isinstance(over, NativePasses):
            over.normalized = None
        ctx.small = over, cut, moments.mean, small
        return (out, *small.seen)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        if looked_into(gradients[0]):
            return again(ctx, lambda: plain(x, *ctx.functions, *tensors)[0], x, tensors, gradients[0])
        over, cut, mean, small = ctx.small
        pointwise: Pointwise = ctx.functions[1]
        dense, grad = over.dense(x), over.dense(gradients[0])
        dx = torch.empty_like(dense) if ctx.needs_input_grad[0] else None
        sums = _differentiated(over, cut, pointwise, dense, grad, small.values, dx)
        by_mean, by_var, *others = small.gradient(*sums)
        if dx is not None:
            times = torch.ones_like(mean) if pointwise.times is None else small.values[pointwise.times]
            _pass_on(over, cut, dense, dx, times, *over.passed_on(mean, by_mean, by_var))
        return dx, None, None, *others


LARGER = 6
"""A block is so many times larger than the smallest of the passes, with so many operations on each."""


class _Cut:
    """How tensors ``(P, L, Q)`` are cut into blocks, each a part of ``P`` or of one of its rows."""

    def __init__(self, over: Passes, rows: Tensor) -> None:
        outer, length, inner = rows.shape
        limit = over.limit * LARGER
        self.wide, self.fine = over.wide, over.fine
        self.step = portion(outer, length * inner, limit)
        self.within = length if length * inner <= limit else portion(length, inner, limit)
        self.count = -(-length // self.within)
        self.size = self.step * self.within * inner

    def blocks(self, rows: Tensor) -> list[Tensor]:
        parts = torch.split(rows, self.step)
        return [*parts] if self.count == 1 else [block for part in parts for block in torch.split(part, self.within, 1)]

    def factors(self, values: list[Tensor]) -> list[tuple[Tensor, ...]]:
        """For each block its factors, of ``(P, 1, Q)`` each."""
        parts = zip(*(torch.split(each, self.step) for each in values), strict=True)
        return [part for part in parts for _ in range(self.count)]

    def total(self, found: tuple[Tensor, ...]) -> Tensor:
        """``(P, 1, Q)`` from the sums of each block."""
        if self.count == 1:
            return torch.cat(found).to(self.fine)
        rows = [torch.stack(found[i : i + self.count]) for i in range(0, len(found), self.count)]
        return torch.cat([row.sum(0, dtype=self.fine) for row in rows])

    def rooms(self, like: list[Tensor], count: int) -> list[tuple[Tensor, ...]]:
        """For each block memory for ``count`` of them, the same again and again."""
        memory = like[0].new_empty((count, self.size), dtype=self.wide)
        sizes = {each.shape: tuple(row[: each.numel()].view(each.shape) for row in memory) for each in like}
        return [sizes[each.shape] for each in like]

    def working(self, block: Tensor) -> Tensor:
        return block if block.dtype == self.wide else block.to(self.wide)


def _made(over: Passes, cut: _Cut, pointwise: Pointwise, x: Tensor, values: tuple[Tensor, ...]) -> Tensor:
    """``h``."""
    out = torch.empty_like(x)
    targets, factors = cut.blocks(over.rows(out)), cut.factors([over.spread(each) for each in values])
    rooms = targets if out.dtype == over.wide else [room[0] for room in cut.rooms(targets, 1)]
    for block, target, made, own in zip(cut.blocks(over.rows(x)), targets, rooms, factors, strict=True):
        pointwise.forward(cut.working(block), own, made)
        if made is not target:
            target.copy_(made)
    return out


def _differentiated(
    over: Passes,
    cut: _Cut,
    pointwise: Pointwise,
    x: Tensor,
    grad: Tensor,
    values: tuple[Tensor, ...],
    out: Tensor | None,
) -> list[Tensor]:
    """The gradient by ``x`` with the factors held into ``out``, where it is asked for; those by each factor,
    ``(N, C)``."""
    blocks, grads = cut.blocks(over.rows(x)), cut.blocks(over.rows(grad))
    factors = cut.factors([over.spread(each) for each in values])
    rooms = cut.rooms(blocks, pointwise.buffers + (out is None or out.dtype != over.wide))
    targets = [None] * len(blocks) if out is None else cut.blocks(over.rows(out))
    sums = []
    for block, given, target, room, own in zip(blocks, grads, targets, rooms, factors, strict=True):
        made = target if target is not None and len(room) == pointwise.buffers else room[-1]
        sums.append(pointwise.backward(cut.working(block), cut.working(given), own, made, room[: pointwise.buffers]))
        if target is not None and made is not target:
            target.copy_(made)
    return [over.small(cut.total(each)) for each in zip(*sums, strict=True)]


def _pass_on(over: Passes, cut: _Cut, x: Tensor, out: Tensor, times: Tensor, slope: Tensor, level: Tensor) -> None:
    """``times * out + slope * x + level`` into ``out``."""
    if not isinstance(over, NativePasses) or not over.plainly:
        over.combine(x, out, times, slope, level, out)
        return
    targets, blocks = cut.blocks(over.rows(out)), cut.blocks(over.rows(x))
    factors = cut.factors([over.spread(each) for each in (times, slope, level)])
    # From the end, which is in the cache yet.
    for target, block, (scale, own, shift) in reversed(list(zip(targets, blocks, factors, strict=True))):
        target.mul_(scale).addcmul_(block, own).add_(shift)
