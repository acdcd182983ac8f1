"""Root-mean-square normalization (arXiv 1910.07467): ``nn.RMSNorm``, and its forms for channels-first maps.

``y = x / sqrt(mean(x²) + eps) · w``: not centred, no bias. A source's bias is lost, and the plan says so.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normswap.norms.adopt import adopt_affine
from normswap.norms.arithmetic import wide
from normswap.norms.inputs import check_input
from normswap.norms.layer import Over, pooling
from normswap.norms.moments import Coefficients, Moments, normalize
from normswap.norms.positions import can, over_channels
from normswap.registry import builds, reads
from normswap.spec import MAP, POSITION, Norm


def mean_squares(moments: Moments, weight: Tensor | None, *, eps: float) -> Coefficients:
    """The scale by the mean square of all channels; a sum of squares loses nothing."""
    square = (moments.var + moments.mean.square()).mean(1, keepdim=True)
    scale = torch.rsqrt(square + eps)
    scale = scale.expand_as(moments.mean) if weight is None else scale * weight.to(scale.dtype)
    return Coefficients(scale, torch.zeros_like(moments.mean))


class ChannelRMSNorm(nn.RMSNorm):
    """RMS normalization of ``(N, C, *S)`` over C at every position."""

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.normalized_shape[0], None)
        same = self.weight is None or self.weight.dtype == x.dtype
        if same and can(x, self.weight):
            eps = torch.finfo(wide(x.dtype)).eps if self.eps is None else self.eps
            return over_channels(x, self.weight, None, eps, centred=False)
        return F.rms_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.eps).movedim(-1, 1)


class ChannelsFirstRMSNorm(nn.RMSNorm):
    """RMS normalization of ``(N, C, *S)`` over ``(C, *S)`` with a per-channel weight, for any spatial size."""

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.normalized_shape[0], None)
        eps = torch.finfo(wide(x.dtype)).eps if self.eps is None else self.eps
        if can(x, self.weight) and (self.weight is None or self.weight.dtype == x.dtype):
            return normalize(x, partial(mean_squares, eps=eps), self.weight)[0]
        values = x.to(wide(x.dtype))  # Squares of 16 bits overflow.
        square = values.square().mean(tuple(range(1, x.dim())), keepdim=True)
        out = (values * torch.rsqrt(square + eps)).to(x.dtype)
        return out if self.weight is None else (out * self.weight.reshape(-1, *[1] * (x.dim() - 2))).to(x.dtype)


@reads(nn.RMSNorm)
def read(module: nn.RMSNorm) -> Norm:
    shape = tuple(module.normalized_shape)
    return Norm(
        kind="rms",
        channels=shape[-1],
        pools=POSITION,
        channel_axis=-1,
        shape=shape if len(shape) > 1 else None,
        centred=False,
        spread="square",
        eps=module.eps,
        momentum=None,
        weight=module.weight,
    )


def _channels_first(module: nn.RMSNorm, pools: frozenset[str]) -> Norm:
    return Norm(
        kind="rms",
        channels=module.normalized_shape[0],
        pools=pools,
        centred=False,
        spread="square",
        eps=module.eps,
        momentum=None,
        weight=module.weight,
    )


@reads(ChannelRMSNorm)
def read_position(module: nn.RMSNorm) -> Norm:
    """An ``RMSNorm`` class that works over the channels of a channels-first map."""
    return _channels_first(module, POSITION)


@reads(ChannelsFirstRMSNorm)
def read_map(module: nn.RMSNorm) -> Norm:
    return _channels_first(module, MAP)


@builds("rms")
def build(norm: Norm, *, over: Over | None = None) -> nn.Module:
    cls: type[nn.RMSNorm]
    where = pooling(norm, over)
    if norm.channel_axis == -1:
        cls = nn.RMSNorm
    else:
        cls = ChannelRMSNorm if where == "channels" else ChannelsFirstRMSNorm
    module = cls(list(norm.shape or (norm.channels,)), norm.eps, elementwise_affine=False)
    module.elementwise_affine = norm.weight is not None
    return adopt_affine(module, norm, "weight")
