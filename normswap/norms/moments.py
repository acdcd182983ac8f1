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

from normswap.norms.passes import Passes, fine, passes, unrounded, wide
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
"""``f(moments, *tensors)``; pure, and all that it differentiates is in its arguments. It may have a method ``by_hand``
for the same where it is differentiated at most once and nothing looks into it."""


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
        return _run(x, function, parts, floor, tensors, graph=False)[:2]
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


@dataclass(frozen=True)
class _Small:
    """The ``(N, C)`` part of one call, and the graph that autograd made of it."""

    over: Passes
    mean: Tensor
    var: Tensor
    leaves: list[Tensor | None]
    scale: Tensor
    shift: Tensor


def _run(
    x: Tensor,
    function: Function,
    parts: Parts | None,
    floor: Tensor | None,
    tensors: tuple[Tensor | None, ...],
    graph: bool,
) -> tuple[Tensor, tuple[Tensor, ...], _Small]:
    over = passes(x) if parts is None else parts.passes(x)
    dense = over.dense(x)
    with unrounded(x.device):
        mean, var = (moment.requires_grad_(graph and x.requires_grad) for moment in over.measure(dense))
    leaves = [t if t is None else t.detach().requires_grad_(graph and t.requires_grad) for t in tensors]
    with unrounded(x.device), torch.set_grad_enabled(graph):
        scale, shift, seen = getattr(function, "by_hand", function)(Moments(mean, var, over.count), *leaves)
        scale, shift = scale.expand_as(mean), shift.expand_as(mean)
    out = over.affine(dense, scale.detach(), shift.detach())
    if floor is not None:
        torch.maximum(out, _each(floor.detach(), out), out=out)
    return out, tuple(each.detach().clone() for each in seen), _Small(over, mean, var, leaves, scale, shift)


class _Normalize(torch.autograd.Function):
    """:func:`normalize`, by hand: see the module's text."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, function: Function, parts: Parts | None, floor: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_(x.requires_grad)
        out, seen, small = _run(leaf, function, parts, floor, tensors, graph=True)
        ctx.mark_non_differentiable(*seen)
        ctx.save_for_backward(x, floor, *tensors)
        ctx.how, ctx.small = (function, parts), small
        return (out, *seen)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with unrounded(gradients[0].device):
            return _Normalize._backward(ctx, *gradients)

    @staticmethod
    def _backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, floor, *tensors = ctx.saved_tensors
        if looked_into(gradients[0]):
            return again(ctx, lambda: _plain(x, *ctx.how, floor, *tensors)[0], x, (floor, *tensors), gradients[0])
        small: _Small = ctx.small
        over, mean, var = small.over, small.mean, small.var
        scale, shift = small.scale.detach(), small.shift.detach()
        dense, grad = over.dense(x), over.dense(gradients[0])
        own = whole = None
        if floor is not None:
            own = over.affine(dense, scale, shift - floor.to(shift.dtype))
            whole = grad.sum((0, *range(2, x.dim())), dtype=over.wide)
            grad = torch.ops.aten.threshold_backward.grad_input(grad, own, 0, grad_input=own)
        total, product = over.sums(dense, grad)
        by_floor = None if whole is None else (whole - total.sum(0)).to(floor.dtype)
        outputs = [(out, g) for out, g in ((small.scale, product), (small.shift, total)) if out.requires_grad]
        found = small_gradients(outputs, (mean, var, *small.leaves))
        dx = None
        if ctx.needs_input_grad[0]:
            slope, level = over.passed_on(mean, found.get(id(mean)), found.get(id(var)))
            dx = over.combine(dense, grad, scale, slope, level, own)
        return dx, None, None, by_floor, *(None if t is None else found.get(id(t)) for t in small.leaves)


def small_gradients(outputs: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[Tensor | None]) -> dict[int, Tensor]:
    """By ``id``, the gradients of those of ``inputs`` that have one, from those of ``outputs``."""
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    if not outputs or not wanted:
        return {}
    made, given = zip(*outputs, strict=True)
    grads = torch.autograd.grad(made, wanted, given, retain_graph=True, allow_unused=True)
    return {id(t): g for t, g in zip(wanted, grads, strict=True) if g is not None}


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
