r"""EvoNorm B0 and S0 (Liu, Brock, Simonyan and Le, arXiv 2004.02967): normalization and activation in one.

With the standard deviations :math:`\sigma = \sqrt{v + \varepsilon}` of the batch, of an instance and of the channels of
a group with space, and a slope :math:`v_1` for each channel, 1 at first,

.. math::  \text{B0: } y = \frac{x}{\max(\sigma_B,\; v_1 x + \sigma_I)} \; w + b, \quad
           \text{S0: } y = \frac{x\,\operatorname{sigmoid}(v_1 x)}{\sigma_G} \; w + b .

Neither subtracts a mean. In eval mode B0 takes :math:`\sigma_B` from a moving average of the biased variance. Its
running mean computes nothing; it is kept for the way back to a batch norm.

**The activation.** Either layer stands for a norm and the activation behind it. A conversion replaces norms and leaves
that activation where it is, as for ``frn``, inside a module that holds both too: then both act, and behind S0 a ReLU
cuts off what is below 0. The plan says so; for the layer of the paper, take the activation out of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from normswap.norms.adopt import like
from normswap.norms.gradient import Gradient
from normswap.norms.group import group_count
from normswap.norms.moments import Moments
from normswap.norms.momentum import Momentum
from normswap.norms.passes import scaled
from normswap.norms.pointwise import Factors, Pointwise, transform
from normswap.norms.tracked import TrackedNorm, assemble, fields
from normswap.registry import builds, reads
from normswap.spec import BATCH, MAP, Form, Norm

NOTE = "it is an activation too: one that follows in the model stays, and both act; take it out"


def _affine(moments: Moments, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    one, zero = moments.mean.new_ones(1), moments.mean.new_zeros(1)
    return one if weight is None else weight.to(one.dtype), zero if bias is None else bias.to(zero.dtype)


def batch_factors(
    moments: Moments,
    slope: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_var: Tensor | None,
    *,
    eps: float,
) -> Factors:
    """Slope, deviation of the instance and weight, each over that of the batch, and the bias."""
    seen: tuple[Tensor, ...] = ()
    if running_var is None:
        seen = moments.over_batch()
        var = seen[1]
    else:
        var = running_var.to(moments.var.dtype)
    unit, own = torch.rsqrt(var + eps), torch.sqrt(moments.var + eps)
    scale, shift = _affine(moments, weight, bias)
    return Factors((slope.to(var.dtype) * unit, own * unit, scale * unit, shift), seen)


class BatchPointwise(Pointwise):
    r""":math:`y = n a + b` with :math:`n = x / d`, :math:`d = \max(u, 1)`, :math:`u = s x + o`: all but :math:`b`
    in units of :math:`\sigma_B`.

    By hand, with :math:`e = g n / d` where :math:`u > 1`, else 0: the gradient by :math:`a` is :math:`g n`, by
    :math:`o` it is :math:`-a e`, by :math:`s` it is :math:`-a e x`, and by :math:`x` it is :math:`a (g / d - s e)`."""

    buffers = 2
    times = 2

    def __call__(self, x: Tensor, *factors: Tensor) -> Tensor:
        slope, own, scale, shift = factors
        return x / (slope * x + own).clamp(min=1) * scale + shift

    def forward(self, x: Tensor, factors: tuple[Tensor, ...], out: Tensor) -> None:
        slope, own, scale, shift = factors
        scaled(x, slope, own, out).clamp_(min=1)
        scaled(torch.div(x, out, out=out), scale, shift, out)

    def backward(
        self, x: Tensor, grad: Tensor, factors: tuple[Tensor, ...], out: Tensor, room: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        slope, own, scale, _ = factors
        divisor, product = room
        scaled(x, slope, own, divisor).clamp_(min=1)
        torch.div(grad, divisor, out=out)
        torch.mul(out, x, out=product)
        by_scale = product.sum(1, keepdim=True)
        torch.ops.aten.threshold_backward.grad_input(product.div_(divisor), divisor, 1, grad_input=product)
        by_own = product.sum(1, keepdim=True)
        out.addcmul_(product, slope, value=-1)
        by_slope = product.mul_(x).sum(1, keepdim=True)
        return -by_slope * scale, -by_own * scale, by_scale, grad.sum(1, keepdim=True)


@dataclass(frozen=True)
class SampleFactors:
    """The slope, the scale behind the sigmoid and the shift."""

    eps: float
    groups: int

    def __call__(self, moments: Moments, slope: Tensor, weight: Tensor | None, bias: Tensor | None) -> Factors:
        _, var = moments.over_channels(self.groups)
        inverse = torch.rsqrt(var + self.eps).unsqueeze(2).expand(-1, -1, moments.mean.shape[1] // self.groups)
        scale, shift = _affine(moments, weight, bias)
        return Factors((slope.to(var.dtype), inverse.flatten(1) * scale, shift))

    def by_hand(
        self, moments: Moments, slope: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Factors, Gradient]:
        r"""For :math:`r = (V + \varepsilon)^{-1/2}`, :math:`V = \frac1K \sum_c (v_c + d_c^2)`, :math:`d_c = m_c - M` of
        the :math:`K` channels of a group, gradients :math:`g` by the scales :math:`r w_c` and
        :math:`e = -\frac{r^3}{2K} \sum_c g_c w_c`, those by :math:`w_c, v_c, m_c` are :math:`\sum_n g_c r`, :math:`e`
        and :math:`2 e d_c`."""
        scale, shift = _affine(moments, weight, bias)
        cut = (self.groups, moments.mean.shape[1] // self.groups)
        apart = moments.mean.unflatten(1, cut)
        apart = apart - apart.mean(2, keepdim=True)
        var = torch.addcmul(moments.var.unflatten(1, cut), apart, apart).mean(2, keepdim=True)
        inverse, each = var.add_(self.eps).rsqrt_(), scale.expand(moments.mean.shape[1]).view(cut)

        def gradient(by_slope: Tensor, by_scale: Tensor, by_shift: Tensor) -> tuple[Tensor | None, ...]:
            grad = by_scale.unflatten(1, cut)
            by_weight = None if weight is None else (grad * inverse).sum(0).flatten().to(weight.dtype)
            by_var = (grad * each).sum(2, keepdim=True).mul_(inverse.pow(3)).mul_(-0.5 / cut[1])
            by_mean = (by_var * apart).mul_(2).flatten(1)
            by_bias = None if bias is None else by_shift.sum(0).to(bias.dtype)
            spread = by_var.expand_as(apart).flatten(1)
            return by_mean, spread, by_slope.sum(0).to(slope.dtype), by_weight, by_bias

        return Factors((slope.to(shift.dtype), (inverse * each).flatten(1), shift)), gradient


FLAT = 1e-6
"""Slopes smaller than that are not divided by."""


class SamplePointwise(Pointwise):
    r""":math:`y = x s a + b` with :math:`s = \operatorname{sigmoid}(v_1 x)`.

    By hand, with :math:`p = g x s` and :math:`q = p\,(1 - s)`: the gradient by :math:`a` is :math:`p`, by :math:`v_1`
    it is :math:`a q x`, and by :math:`x` it is :math:`a (g s + v_1 q)`."""

    buffers = 2
    times = 1

    def __init__(self, slope: Tensor) -> None:
        self.slope = slope

    @cached_property
    def steep(self) -> bool:
        """Whether every slope can be divided by: silu is one operation where a sigmoid times its input is two."""
        return bool(self.slope.detach().abs().min() > FLAT)

    def __call__(self, x: Tensor, *factors: Tensor) -> Tensor:
        slope, scale, shift = factors
        return x * torch.sigmoid(slope * x) * scale + shift

    def forward(self, x: Tensor, factors: tuple[Tensor, ...], out: Tensor) -> None:
        slope, scale, shift = factors
        torch.mul(x, slope, out=out)
        if self.steep:
            scaled(torch.ops.aten.silu_(out), scale / slope, shift, out)
        else:
            scaled(out.sigmoid_().mul_(x), scale, shift, out)

    def backward(
        self, x: Tensor, grad: Tensor, factors: tuple[Tensor, ...], out: Tensor, room: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        slope, scale, _ = factors
        share, product = room
        torch.mul(x, slope, out=share).sigmoid_()
        torch.mul(grad, share, out=out)
        torch.mul(out, x, out=product)
        by_scale = product.sum(1, keepdim=True)
        product.addcmul_(product, share, value=-1)
        out.addcmul_(product, slope)
        by_slope = product.mul_(x).sum(1, keepdim=True)
        return by_slope * scale, by_scale, grad.sum(1, keepdim=True)


class _EvoNorm(TrackedNorm):
    initial = TrackedNorm.initial | {"slope": 1.0}
    slope: Tensor

    def _more_parameters(self, where: dict[str, Any]) -> None:
        self.slope = nn.Parameter(torch.ones(self.num_features, **where))


class EvoNormB0(_EvoNorm):
    """EvoNorm B0 of ``(N, C, *S)``, any rank of at least 2.

    Arguments and state as of ``nn.BatchNorm2d``, and a parameter ``slope`` of shape ``(num_features,)``."""

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        function = partial(batch_factors, eps=self.eps)
        out, seen = transform(x, function, BatchPointwise(), self.slope, self.weight, self.bias, self.running[1])
        if seen:
            self.track(*seen)
        return out


class EvoNormB01d(EvoNormB0):
    """EvoNorm B0 of ``(N, C)`` or ``(N, C, L)``."""

    dims = frozenset({2, 3})


class EvoNormB02d(EvoNormB0):
    """EvoNorm B0 of ``(N, C, H, W)``."""

    dims = frozenset({4})


class EvoNormB03d(EvoNormB0):
    """EvoNorm B0 of ``(N, C, D, H, W)``."""

    dims = frozenset({5})


class EvoNormS0(_EvoNorm):
    """EvoNorm S0 of ``(N, C, *S)``, any rank of at least 2.

    The arguments are those of ``nn.BatchNorm2d``; ``momentum`` and ``track_running_stats`` are taken for its sake and
    do nothing, since there are no running statistics. ``groups`` must divide the channels; by default it is the
    divisor nearest to 32, as for group norm. Parameters ``weight``, ``bias``, ``slope`` of shape ``(num_features,)``.
    Raises :class:`NormswapError` for a number of groups that does not divide."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Momentum = None,
        affine: bool = True,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        groups: int | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, False, device, dtype, bias=bias)
        self.groups = group_count(num_features, groups)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        function = SampleFactors(self.eps, self.groups)
        return transform(x, function, SamplePointwise(self.slope), self.slope, self.weight, self.bias)[0]

    def extra_repr(self) -> str:
        return f"{self.num_features}, groups={self.groups}, eps={self.eps}, affine={self.affine}"


class EvoNormS01d(EvoNormS0):
    """EvoNorm S0 of ``(N, C)`` or ``(N, C, L)``."""

    dims = frozenset({2, 3})


class EvoNormS02d(EvoNormS0):
    """EvoNorm S0 of ``(N, C, H, W)``."""

    dims = frozenset({4})


class EvoNormS03d(EvoNormS0):
    """EvoNorm S0 of ``(N, C, D, H, W)``."""

    dims = frozenset({5})


BATCH_CLASSES = (EvoNormB0, EvoNormB01d, EvoNormB02d, EvoNormB03d)
SAMPLE_CLASSES = (EvoNormS0, EvoNormS01d, EvoNormS02d, EvoNormS03d)


@dataclass(frozen=True, eq=False)
class _Evolved(Form):
    slope: Tensor

    loses = "slope of the activation"
    note = NOTE
    neutral = {"slope": 1.0}  # noqa: RUF012

    def each(self, x: Tensor, norm: Norm) -> tuple[Tensor, ...]:
        """Slope, weight and bias for ``x``."""
        one = torch.ones_like(self.slope)
        found = (self.slope, one if norm.weight is None else norm.weight, 0 * one if norm.bias is None else norm.bias)
        return tuple(tensor.detach().to(x).reshape(1, -1, *[1] * (x.dim() - 2)) for tensor in found)


@dataclass(frozen=True, eq=False)
class BatchForm(_Evolved):
    def output(self, x: Tensor, norm: Norm, eps: float, training: bool) -> Tensor:
        slope, weight, bias = self.each(x, norm)
        space = tuple(range(2, x.dim()))
        own = x.var(space, correction=0, keepdim=True) if space else torch.zeros_like(x)
        if norm.running_var is not None and not training:
            var = norm.running_var.detach().to(x).reshape(slope.shape)
        else:
            var = x.var((0, *space), correction=0, keepdim=True)
        return x / torch.maximum((var + eps).sqrt(), slope * x + (own + eps).sqrt()) * weight + bias


@dataclass(frozen=True, eq=False)
class SampleForm(_Evolved):
    def output(self, x: Tensor, norm: Norm, eps: float, training: bool) -> Tensor:
        slope, weight, bias = self.each(x, norm)
        cut = x.unflatten(1, (norm.groups, -1))
        var = cut.var(tuple(range(2, cut.dim())), correction=0, keepdim=True)
        return (x * torch.sigmoid(slope * x)).reshape(cut.shape).div((var + eps).sqrt()).reshape(
            x.shape
        ) * weight + bias


@reads(*BATCH_CLASSES)
def read_batch(module: EvoNormB0) -> Norm:
    return Norm("evonorm_b0", pools=BATCH, centred=False, form=BatchForm(module.slope), **fields(module))


@reads(*SAMPLE_CLASSES)
def read_sample(module: EvoNormS0) -> Norm:
    form = SampleForm(module.slope)
    return Norm("evonorm_s0", pools=MAP, groups=module.groups, centred=False, form=form, **fields(module))


@builds("evonorm_b0")
def build_batch(norm: Norm) -> EvoNormB0:
    return _with_slope(assemble(norm, "evonorm_b0", BATCH_CLASSES), norm)


@builds("evonorm_s0")
def build_sample(norm: Norm, *, groups: int | Callable[[int], int] | None = None) -> EvoNormS0:
    count = group_count(norm.channels, groups)
    return _with_slope(assemble(norm, "evonorm_s0", SAMPLE_CLASSES, tracked=False, groups=count), norm)


_E = TypeVar("_E", bound=_EvoNorm)


def _with_slope(module: _E, norm: Norm) -> _E:
    """The slope of another EvoNorm is kept."""
    kept = norm.form.slope if isinstance(norm.form, _Evolved) else torch.ones(norm.channels, **like(norm))
    module.slope = kept if isinstance(kept, nn.Parameter) else nn.Parameter(kept)
    return module
