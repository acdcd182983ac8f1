r"""Positional normalization (Li, Wu, Weinberger and Belongie, arXiv 1907.04312): over the channels, at each position.

.. math::  \mu_p = \tfrac1C \sum_c x_{cp}, \quad \sigma_p = \sqrt{\tfrac1C \sum_c (x_{cp} - \mu_p)^2 + \varepsilon},
           \quad y_{cp} = \frac{x_{cp} - \mu_p}{\sigma_p} \; w_c + b_c .

It is layer normalization over the channels of a map (``layer`` with ``over="channels"``), with its moments at hand: the
map of :math:`\mu` and of :math:`\sigma` show the structure that an encoder takes away, and a *moment shortcut* gives
them to a layer of the decoder, :math:`\sigma_p\,x_{cp} + \mu_p`::

    y, mean, deviation = self.norm.extract(x)
    ...
    z = inject(z, mean, deviation)

Which layer gets them is for the model's code to say; a conversion gives the norm alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from normswap.norms.moments import Coefficients, Moments, affine, measured, normalize
from normswap.norms.momentum import Momentum
from normswap.norms.positions import can, over_channels
from normswap.norms.tracked import TrackedNorm, assemble, fields
from normswap.registry import builds, reads
from normswap.spec import POSITION, Norm


def own(moments: Moments, *, eps: float) -> Coefficients:
    """Scale and shift by the moments as they are."""
    return affine(moments.mean, moments.var, None, None, eps)


def _positions(x: Tensor) -> Tensor:
    """``(N, C, *S)`` as ``(N, L, C)``."""
    return (x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)).transpose(1, 2)


class PositionalNorm(TrackedNorm):
    """Positional normalization of ``(N, C, *S)``, any rank of at least 2.

    The arguments are those of ``nn.BatchNorm2d``; ``momentum`` and ``track_running_stats`` are taken for its sake and
    do nothing, since there are no running statistics. Parameters ``weight``, ``bias`` of shape ``(num_features,)``."""

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
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, False, device, dtype, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        if can(x, self.weight, self.bias):
            return over_channels(x, self.weight, self.bias, self.eps)
        out, _ = normalize(_positions(x), partial(own, eps=self.eps))
        return self._affine(out.transpose(1, 2).reshape(x.shape))

    def extract(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The output, and the mean and deviation of each position, ``(N, 1, *S)``, in the dtype of ``x``; gradients
        flow through all three."""
        self.check(x)
        centred, base, moments = measured(_positions(x))
        deviation = torch.sqrt(moments.var + self.eps)
        rest = (moments.mean - base).unsqueeze(2).to(centred.dtype)
        out = ((centred - rest) / deviation.unsqueeze(2).to(centred.dtype)).to(x.dtype)
        shape = (x.shape[0], 1, *x.shape[2:])
        mean, deviation = (each.to(x.dtype).reshape(shape) for each in (moments.mean, deviation))
        return self._affine(out.transpose(1, 2).reshape(x.shape)), mean, deviation

    def _affine(self, x: Tensor) -> Tensor:
        each = (-1, *[1] * (x.dim() - 2))
        weight, bias = (None if t is None else t.to(x.dtype).reshape(each) for t in (self.weight, self.bias))
        if weight is not None and bias is not None:
            return torch.addcmul(bias, x, weight)
        return x * weight if weight is not None else x if bias is None else x + bias

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}"


class PositionalNorm1d(PositionalNorm):
    """Positional normalization of ``(N, C)`` or ``(N, C, L)``."""

    dims = frozenset({2, 3})


class PositionalNorm2d(PositionalNorm):
    """Positional normalization of ``(N, C, H, W)``."""

    dims = frozenset({4})


class PositionalNorm3d(PositionalNorm):
    """Positional normalization of ``(N, C, D, H, W)``."""

    dims = frozenset({5})


CLASSES = (PositionalNorm, PositionalNorm1d, PositionalNorm2d, PositionalNorm3d)


def inject(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """The moment shortcut: ``x`` of shape ``(N, C, *S)`` with the moments of :meth:`PositionalNorm.extract`."""
    return x * deviation + mean


@reads(*CLASSES)
def read(module: PositionalNorm) -> Norm:
    return Norm("positional", pools=POSITION, **fields(module))


@builds("positional")
def build(norm: Norm) -> PositionalNorm:
    return assemble(norm, "positional", CLASSES, tracked=False)
