r"""One core for the norms that torch lacks: a scale and a shift for each sample and channel, made from their moments.

For ``x`` of shape ``(N, C, *S)`` with :math:`L = \prod S` values behind each sample and channel,

.. math::  m = \tfrac1L \sum_s x_s,\quad v = \tfrac1L \sum_s (x_s - m)^2,\quad
           (a, b) = f(m, v, \theta),\quad y = a\,x + b,

with :math:`m, v, a, b` of shape ``(N, C)``. A layer is its *coefficients* :math:`f`: a differentiable function of small
tensors. Moments pooled over the batch or over channels follow from :math:`m, v` by the law of total variance,
:math:`V = \overline{v} + \overline{(m - M)^2}`.

**Rounding.** Nothing here subtracts numbers that are large against the spread of the data. With the shift :math:`k`,
the mean as the working precision has it, :math:`d = x - k` is small; :math:`m = k + \bar d`, :math:`v =
\overline{d^2} - \bar d^2` where :math:`\bar d` is no more than a rounding error (the corrected two-pass algorithm:
Chan, Golub and LeVeque, *Algorithms for computing the sample variance*, 1983). The ``(N, C)`` part is computed in
float64, and :math:`y = a\,d + (b + a k)`. Inputs of 16 bits are accumulated in float32.

**Gradient.** For :math:`g = \partial E / \partial y`: :math:`\partial E / \partial b = \sum g`,
:math:`\partial E / \partial a = \sum g x = \sum g d + k \sum g`; ordinary autograd takes these through :math:`f` to
:math:`\theta`, :math:`m` and :math:`v`, and

.. math::  \frac{\partial E}{\partial x} = a\,g + \tfrac1L \frac{\partial E}{\partial m}
           + \tfrac2L \frac{\partial E}{\partial v} (x - m) .

Of large tensors, only ``x`` is kept for it. On a CPU both directions go through ``x`` in blocks that stay in its cache.
Under ``torch.compile``, ``torch.export``, ``torch.func`` and forward-mode differentiation, and to be differentiated
twice, the same is written in plain operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normswap.norms.arithmetic import fine, unrounded, wide
from normswap.norms.gradient import Made, with_gradient
from normswap.norms.passes import Passes, passes
from normswap.norms.processes import Across


@dataclass(frozen=True)
class Moments:
    """Mean and biased variance over space, each ``(N, C)``, in float64 where the device has it."""

    mean: Tensor
    var: Tensor
    count: int
    """Values behind each of them: the product of the spatial sizes."""
    across: Across | None = None
    """The processes whose batches belong to this one."""

    def over_batch(self) -> tuple[Tensor, Tensor]:
        """Moments over batch and space, and over the processes of ``across``, each ``(C,)``."""
        if self.across is None:
            mean = self.mean.mean(0)
            return mean, (self.var + (self.mean - mean).square()).mean(0)
        samples = max(len(self.mean), 1)  # Of none, sums are zero where means are not a number.
        mean = self.mean.sum(0) / samples
        var = (self.var + (self.mean - mean).square()).sum(0) / samples
        return self.across(mean, var, len(self.mean) * self.count)

    def over_channels(self, groups: int = 1) -> tuple[Tensor, Tensor]:
        """Moments over the channels of each group and space, each ``(N, groups)``."""
        if groups == 1:
            mean = self.mean.mean(1, keepdim=True)
            return mean, (self.var + (self.mean - mean).square()).mean(1, keepdim=True)
        own, var = (moment.unflatten(1, (groups, -1)) for moment in (self.mean, self.var))
        mean = own.mean(2, keepdim=True)
        return mean.squeeze(2), (var + (own - mean).square()).mean(2)


class Coefficients(NamedTuple):
    """``y = scale * x + shift``, each ``(N, C)`` or broadcast to it, in the dtype of the moments."""

    scale: Tensor
    shift: Tensor
    seen: tuple[Tensor, ...] = ()
    """What the layer wants back, detached: the moments for its running statistics."""

    @property
    def values(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.shift


def affine(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, seen: tuple[Tensor, ...] = ()
) -> Coefficients:
    """The coefficients of ``(x - mean) / sqrt(var + eps) * weight + bias``; moments ``(N, C)`` or broadcast to it."""
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight.to(scale.dtype)
    shift = -mean * scale if bias is None else torch.addcmul(bias.to(scale.dtype), mean, scale, value=-1)
    return Coefficients(scale, shift, seen)


Function = Callable[..., Coefficients]
"""``f(moments, *tensors)``; pure, and all that it differentiates is in its arguments. With a method ``by_hand`` it
brings its gradient: see :mod:`normswap.norms.gradient`."""


class Parts(Protocol):
    """Other parts of a tensor than its samples and channels, with moments of their own."""

    def passes(self, x: Tensor) -> Passes:
        """Passes whose moments and factors are those of the parts."""

    def plain(self, x: Tensor, function: Function, *tensors: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """:func:`plain` with these moments and factors."""


def normalize(
    x: Tensor,
    function: Function,
    *tensors: Tensor | None,
    across: Across | None = None,
    parts: Parts | None = None,
    floor: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``(y, seen)`` with ``y = a x + b`` in the shape, dtype and memory format of ``x``.

    ``x`` has shape ``(N, C, *S)``, any floating dtype; ``(a, b, seen) = function(moments, *tensors)``. Gradients flow
    to ``x`` and to ``tensors``, not to ``seen``. An empty ``x`` has no moments: ``seen`` is empty too. With ``across``
    the moments of the batch are those of all its processes, of which one whose ``x`` is empty takes part. With
    ``parts`` moments, scale and shift are those of the parts instead. With ``floor``, ``(C,)``, it is
    ``max(a x + b, floor)``, whose gradient where they are equal is that of ``floor``."""
    if across is not None:
        out, seen = _normalize(x, partial(_pooled, function, across), parts, floor, *tensors)
        return out, seen if x.numel() or across.found() else ()
    if x.numel() == 0:
        return _empty(x, (*tensors, floor)), ()
    return _normalize(x, function, parts, floor, *tensors)


def _pooled(function: Function, across: Across, moments: Moments, *tensors: Tensor | None) -> Coefficients:
    return function(Moments(moments.mean, moments.var, moments.count, across), *tensors)


def _normalize(
    x: Tensor, function: Function, parts: Parts | None, floor: Tensor | None, *tensors: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """:func:`normalize` with the function as it is."""
    if _plainly(x, (floor, *tensors)):
        return _plain(x, function, parts, floor, *tensors)
    if not torch.is_grad_enabled():
        out, _, _, small = _run(x, function, parts, floor, tensors, [False] * (1 + len(tensors)))
        return out, small.seen
    out, *seen = _Normalize.apply(x, function, parts, floor, *tensors)  # type: ignore[no-untyped-call]
    return out, tuple(seen)


def _plain(
    x: Tensor, function: Function, parts: Parts | None, floor: Tensor | None, *tensors: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """:func:`plain`, of parts and with a floor where they are given."""
    out, seen = (plain if parts is None else parts.plain)(x, function, *tensors)
    if floor is None:
        return out, seen
    floor = _each(floor, out)
    return torch.relu(out - floor) + floor, seen


def _each(values: Tensor, x: Tensor) -> Tensor:
    """``(C,)`` to go with ``x``, in its dtype."""
    return values.to(x.dtype).reshape(-1, *[1] * (x.dim() - 2))


def _empty(x: Tensor, tensors: tuple[Tensor | None, ...]) -> Tensor:
    """No values, of which every gradient is zero."""
    return x + sum(t.to(x.dtype).sum() for t in tensors if t is not None)


def _plainly(x: Tensor, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether something looks into the operations, or nothing is to be computed."""
    return (
        torch.compiler.is_compiling()
        or x.is_meta
        or type(x) not in (Tensor, torch.nn.Parameter)
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in (x, *tensors))
    )


def measured(x: Tensor) -> tuple[Tensor, Tensor, Moments]:
    """``(centred, base, moments)`` in plain operations: ``x`` as ``(N, C, L)`` in the working precision less its mean
    ``base``, ``(N, C)``."""
    small = fine(x.device)
    flat = (x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)).to(wide(x.dtype))  # (N, C, L)
    values = flat if flat.shape[2] else torch.nn.functional.pad(flat, (0, 1))  # Means of none are not a number.
    shift = values.detach().mean(2, keepdim=True)
    centred = values - shift
    rest, square = centred.mean(2).to(small), centred.square().mean(2).to(small)
    base = shift.squeeze(2).to(small)
    return (
        centred[..., : flat.shape[2]],
        base,
        Moments(base + rest, (square - rest.square()).clamp(min=0), flat.shape[2]),
    )


def plain(x: Tensor, function: Function, *tensors: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """:func:`normalize` in operations that torch differentiates, compiles and exports by itself."""
    centred, base, moments = measured(x)
    scale, offset, seen = function(moments, *tensors)
    offset = offset + scale * base
    scale, offset = (each.expand_as(base).to(centred.dtype).unsqueeze(2) for each in (scale, offset))
    return (centred * scale + offset).to(x.dtype).reshape(x.shape), tuple(each.detach() for each in seen)


def _run(
    x: Tensor,
    function: Function,
    parts: Parts | None,
    floor: Tensor | None,
    tensors: tuple[Tensor | None, ...],
    needed: Sequence[bool],
) -> tuple[Tensor, Passes, Moments, Made]:
    over = passes(x) if parts is None else parts.passes(x)
    dense = over.dense(x)
    with unrounded(x.device):
        moments = Moments(*over.measure(dense), over.count)
        small = with_gradient(function, moments, tensors, needed)
    out = over.affine(dense, *small.values)
    if floor is not None:
        torch.maximum(out, _each(floor.detach(), out), out=out)
    return out, over, moments, small


class _Normalize(torch.autograd.Function):
    """:func:`normalize`, by hand: see the module's text."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, function: Function, parts: Parts | None, floor: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        asked = ctx.needs_input_grad
        out, over, moments, small = _run(x.detach(), function, parts, floor, tensors, (asked[0], *asked[4:]))
        ctx.mark_non_differentiable(*small.seen)
        ctx.save_for_backward(x, floor, *tensors)
        ctx.how, ctx.small = (function, parts), (over, moments.mean, small)
        return (out, *small.seen)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with unrounded(gradients[0].device):
            return _Normalize._backward(ctx, *gradients)

    @staticmethod
    def _backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, floor, *tensors = ctx.saved_tensors
        if looked_into(gradients[0]):
            return again(ctx, lambda: _plain(x, *ctx.how, floor, *tensors)[0], x, (floor, *tensors), gradients[0])
        over, mean, small = ctx.small
        scale, shift = small.values
        dense, grad = over.dense(x), over.dense(gradients[0])
        own = whole = None
        if floor is not None:
            own = over.affine(dense, scale, shift - floor.to(shift.dtype))
            whole = grad.sum((0, *range(2, x.dim())), dtype=over.wide)
            grad = torch.ops.aten.threshold_backward.grad_input(grad, own, 0, grad_input=own)
        total, product = over.sums(dense, grad)
        by_floor = None if whole is None else (whole - total.sum(0)).to(floor.dtype)
        by_mean, by_var, *others = small.gradient(product, total)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = over.combine(dense, grad, scale, *over.passed_on(mean, by_mean, by_var), own)
        return dx, None, None, by_floor, *others


def looked_into(gradient: Tensor) -> bool:
    """Whether a backward pass is differentiated itself, or given many gradients at once (``is_grads_batched``)."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    return torch._C._functorch.is_legacy_batchedtensor(gradient) or _plainly(gradient, ())


def again(
    ctx: Any, make: Callable[[], Tensor], x: Tensor, tensors: Sequence[Tensor | None], gradient: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of what ``make`` makes of ``x`` and ``tensors`` in plain operations; to be differentiated again
    where they are wanted so.

    Between ``x`` and ``tensors`` stand arguments that are no tensors."""
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        out = make()
    others = len(ctx.needs_input_grad) - 1 - len(tensors)
    inputs = zip((x, *[None] * others, *tensors), ctx.needs_input_grad, strict=True)
    wanted = [t for t, needed in inputs if needed and t is not None]
    grads = iter(torch.autograd.grad(out, wanted, gradient, create_graph=further, allow_unused=True))
    return tuple(next(grads) if needed else None for needed in ctx.needs_input_grad)
