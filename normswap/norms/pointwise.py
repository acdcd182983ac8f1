r"""The core for norms whose output is no multiple of their input: any function of each value and a few factors.

As in :mod:`normswap.norms.moments`, small tensors are made from the moments of each sample and channel; here

.. math::  y = h(x;\, c_1, \dots, c_k), \quad (c_1, \dots, c_k) = f(m, v, \theta),

with :math:`c_i` of shape ``(N, C)`` and :math:`h` applied to each value by itself. Of large tensors, only ``x`` is
kept; the backward pass computes :math:`h` again, block by block in a CPU's cache, and lets autograd differentiate it
there. Its second part is that of the other core: what :math:`m` and :math:`v` pass on to ``x``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normswap.norms.moments import Moments, _empty, _plainly, again, measured, small_gradients
from normswap.norms.passes import NativePasses, Passes, passes


class Factors(NamedTuple):
    """What ``h`` takes beside ``x``, each ``(N, C)`` or broadcast to it, in the dtype of the moments."""

    values: tuple[Tensor, ...]
    seen: tuple[Tensor, ...] = ()
    """What the layer wants back, detached: the moments for its running statistics."""


Small = Callable[..., Factors]
"""``f(moments, *tensors)``; pure, and all that it differentiates is in its arguments."""
Pointwise = Callable[..., Tensor]
"""``h(x, *factors)``, of tensors that broadcast; pure, and each value by itself."""


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
        over = passes(x)
        dense = over.dense(x.detach())
        needed = any(ctx.needs_input_grad)
        mean, var = (each.requires_grad_(ctx.needs_input_grad[0]) for each in over.measure(dense))
        if isinstance(over, NativePasses):
            over.normalized = None  # Large, and of no use here.
        leaves = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in tensors]
        with torch.set_grad_enabled(needed):
            values, seen = function(Moments(mean, var, over.count), *leaves)
            values = tuple(each.expand_as(mean) for each in values)
        out = torch.empty_like(dense)
        rows, target = over.rows(dense), over.rows(out)
        factors = [over.spread(each.detach()) for each in values]
        for part, piece in over.blocks(rows):
            block = rows[part, piece].to(over.wide)
            target[part, piece] = pointwise(block, *(each[part] for each in factors))
        found = tuple(each.detach().clone() for each in seen)
        ctx.mark_non_differentiable(*found)
        ctx.save_for_backward(x, *tensors)
        ctx.functions = function, pointwise
        ctx.small = over, mean, var, leaves, values
        return (out, *found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            return again(ctx, plain(x, *ctx.functions, *tensors)[0], x, tensors, gradients[0])
        over, mean, var, leaves, values = ctx.small
        dense, grad = over.dense(x), over.dense(gradients[0])
        direct, sums = _blockwise(over, ctx.functions[1], dense, grad, values, ctx.needs_input_grad[0])
        outputs = [(out, g) for out, g in zip(values, sums, strict=True) if out.requires_grad]
        found = small_gradients(outputs, (mean, var, *leaves))
        dx = None
        if direct is not None:
            slope = found.get(id(var), torch.zeros_like(var)) * (2 / over.count)
            level = found.get(id(mean), torch.zeros_like(mean)) / over.count - slope * mean.detach()
            dx = over.combine(dense, direct, torch.ones_like(mean), slope, level)
        return dx, None, None, *(None if t is None else found.get(id(t)) for t in leaves)


def _blockwise(
    over: Passes, pointwise: Pointwise, x: Tensor, grad: Tensor, values: tuple[Tensor, ...], direct: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradient by ``x`` with the factors held, where it is asked for, and by each factor, ``(N, C)``."""
    out = torch.empty_like(x) if direct else None
    rows, grads = over.rows(x), over.rows(grad)
    target = None if out is None else over.rows(out)
    factors = [over.spread(each.detach()) for each in values]
    totals = [over.zeros(x) for _ in values]
    for part, piece in over.blocks(rows):
        block = rows[part, piece].to(over.wide).detach().requires_grad_(direct)
        own = [each[part].detach().requires_grad_() for each in factors]
        with torch.enable_grad():
            made = pointwise(block, *own)
        found = torch.autograd.grad(made, [*([block] if direct else []), *own], grads[part, piece].to(over.wide))
        if target is not None:
            target[part, piece] = found[0]
        for total, each in zip(totals, found[-len(own) :], strict=True):
            total[part].add_(each)
    return out, [over.small(total) for total in totals]
