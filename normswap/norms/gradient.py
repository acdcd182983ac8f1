r"""A function of moments and other small tensors, together with its gradient.

A function that brings a method ``by_hand`` writes its gradient itself; of any other it is taken by autograd. Autograd
goes through many small operations, each of which costs more than its few numbers; by hand they are few.

Such functions end alike: with :math:`r = (V + \varepsilon)^{-1/2}`, the scale is :math:`a = r w` and the shift
:math:`b = \beta - M a`. For gradients :math:`\dot a, \dot b`, :math:`\dot\beta = \dot b` and
:math:`\dot w = r\,(\dot a - M \dot b)`, summed over all axes but that of the channels, and

.. math::  \dot M = -a \dot b, \quad \dot V = -\tfrac12 r^2 a\,(\dot a - M \dot b) ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

Gradient = Callable[..., Sequence[Tensor | None]]
"""From the gradients by each value, those by mean, variance and each of the tensors, ``None`` where there is none."""


class Made(NamedTuple):
    """What a function made, without a graph."""

    values: tuple[Tensor, ...]
    """Each like the moments."""
    seen: tuple[Tensor, ...]
    gradient: Gradient


def with_gradient(function: Any, moments: Any, tensors: Sequence[Tensor | None], needed: Sequence[bool]) -> Made:
    """``function(moments, *tensors)``, which has ``values`` and ``seen``, or ``function.by_hand`` of the same, which
    returns that and its gradient; ``needed`` says of the moments, then of each tensor, whether a gradient is asked
    for. ``moments`` is a dataclass with ``mean`` and ``var``."""
    by_hand = getattr(function, "by_hand", None)
    if by_hand is not None:
        with torch.no_grad():
            made, gradient = by_hand(moments, *tensors)
            return Made(tuple(value.expand_as(moments.mean) for value in made.values), made.seen, gradient)
    inputs = [
        None if t is None else t.detach().requires_grad_(asked)
        for t, asked in zip((moments.mean, moments.var, *tensors), (needed[0], *needed), strict=True)
    ]
    with torch.set_grad_enabled(any(needed)):
        made = function(replace(moments, mean=inputs[0], var=inputs[1]), *inputs[2:])
        values = tuple(value.expand_as(moments.mean) for value in made.values)
    seen = tuple(each.detach().clone() for each in made.seen)
    return Made(tuple(value.detach() for value in values), seen, _Traced(values, inputs))


class _Traced:
    """The gradient by autograd."""

    def __init__(self, values: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> None:
        self.values, self.inputs = values, inputs

    def __call__(self, *gradients: Tensor) -> list[Tensor | None]:
        wanted = {index: t for index, t in enumerate(self.inputs) if t is not None and t.requires_grad}
        outputs = [pair for pair in zip(self.values, gradients, strict=True) if pair[0].requires_grad]
        if not outputs or not wanted:
            return [None] * len(self.inputs)
        made, given = zip(*outputs, strict=True)
        grads = torch.autograd.grad(made, list(wanted.values()), given, retain_graph=True, allow_unused=True)
        found = dict(zip(wanted, grads, strict=True))
        return [found.get(index) for index in range(len(self.inputs))]


ByEach = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Gradients by mean, variance, weight and bias."""


def affine_with_gradient(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor], ByEach]]:
    """Scale and shift of ``(x - mean) / sqrt(var + eps) * weight + bias``, and their gradient; see the module's text.

    ``mean``, ``var``: ``(..., C)`` or broadcast to it; ``weight``, ``bias``: ``(C,)`` or ``None``; none with a
    graph."""
    inverse = torch.rsqrt(var + eps)
    scale = inverse if weight is None else inverse * weight.to(inverse.dtype)
    shift = (mean * scale).neg_() if bias is None else torch.addcmul(bias.to(scale.dtype), mean, scale, value=-1)
    over = tuple(range(mean.dim() - 1))

    def gradient(by_scale: Tensor, by_shift: Tensor) -> ByEach:
        along = torch.addcmul(by_scale, mean, by_shift, value=-1)
        by_weight = None if weight is None else (along * inverse).sum(over)
        by_bias = None if bias is None else by_shift.sum(over)
        by_mean = (scale * by_shift).neg_()
        return by_mean, along.mul_(scale).mul_(inverse).mul_(inverse).mul_(-0.5), by_weight, by_bias

    return scale, shift, gradient
