"""Layer normalization (arXiv 1607.06450).

=====================  ==========================  ======================================================
input                  moments over                class
=====================  ==========================  ======================================================
``(*, C)``             C (or several last axes)    ``nn.LayerNorm``
``(N, C, *S)``         (C, *S), any S              ``ChannelsFirstLayerNorm``; equals ``nn.GroupNorm(1, C)``
``(N, C, *S)``         C, at every position        ``ChannelLayerNorm`` (``over="channels"``, as in ConvNeXt)
=====================  ==========================  ======================================================
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normswap.errors import NormswapError, Refusal
from normswap.norms.adopt import adopt_affine
from normswap.norms.batch import eps_of
from normswap.norms.group import fill
from normswap.norms.inputs import check_input
from normswap.norms.positions import can, over_channels
from normswap.registry import builds, reads
from normswap.spec import MAP, POSITION, Norm

Over = Literal["map", "channels"]


class ChannelsFirstLayerNorm(nn.GroupNorm):
    """Layer normalization of ``(N, C, *S)`` over ``(C, *S)`` with a per-channel affine, for any spatial size."""

    def __init__(self, num_channels: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(1, num_channels, eps, affine)

    def extra_repr(self) -> str:
        return f"{self.num_channels}, eps={self.eps}, affine={self.affine}"


class ChannelLayerNorm(nn.LayerNorm):
    """Layer normalization of ``(N, C, *S)`` over C at every position."""

    def forward(self, input: Tensor) -> Tensor:
        check_input(input, self.normalized_shape[0], None)
        if can(input, self.weight, self.bias):
            return over_channels(input, self.weight, self.bias, self.eps)
        moved = input.movedim(1, -1)
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            # torch rounds means as the input's dtype has them; of large ones that shows. Compiled, this costs no pass.
            moved = moved - moved.detach().mean(-1, keepdim=True)
        return F.layer_norm(moved, self.normalized_shape, self.weight, self.bias, self.eps).movedim(-1, 1)


@reads(nn.LayerNorm)
def read(module: nn.LayerNorm) -> Norm:
    shape = tuple(module.normalized_shape)
    return Norm(
        kind="layer",
        channels=shape[-1],
        pools=POSITION,
        channel_axis=-1,
        shape=shape if len(shape) > 1 else None,
        eps=module.eps,
        momentum=None,
        weight=module.weight,
        bias=module.bias,
    )


@reads(ChannelLayerNorm)
def read_position(module: nn.LayerNorm) -> Norm:
    """A ``LayerNorm`` class that works over the channels of a channels-first map."""
    return Norm(
        kind="layer",
        channels=module.normalized_shape[0],
        pools=POSITION,
        eps=module.eps,
        momentum=None,
        weight=module.weight,
        bias=module.bias,
    )


@reads(ChannelsFirstLayerNorm)
def read_map(module: ChannelsFirstLayerNorm) -> Norm:
    return Norm(
        kind="layer",
        channels=module.num_channels,
        pools=MAP,
        eps=module.eps,
        momentum=None,
        weight=module.weight,
        bias=module.bias,
    )


def pooling(norm: Norm, over: Over | None) -> Over:
    """``over`` as given, else the source's own: channels at each position stay so, all others take the whole map."""
    if over not in (None, "map", "channels"):
        raise NormswapError(f"over={over!r}: it is 'map' or 'channels'")
    if over == "map" and norm.channel_axis == -1:
        raise Refusal("its channels are on the last axis: over='map' needs them on axis 1")
    return over or ("channels" if norm.pools == POSITION else "map")


@builds("layer")
def build(norm: Norm, *, over: Over | None = None) -> nn.Module:
    where = pooling(norm, over)
    if norm.channel_axis == -1:
        return adopt_affine(plain_layer_norm(nn.LayerNorm, norm), norm)
    if where == "channels":
        return adopt_affine(plain_layer_norm(ChannelLayerNorm, norm), norm)
    return fill(ChannelsFirstLayerNorm(norm.channels, eps_of(norm), affine=False), norm)


def plain_layer_norm(cls: type[nn.LayerNorm], norm: Norm) -> nn.LayerNorm:
    module = cls(norm.shape or norm.channels, eps_of(norm), elementwise_affine=False)
    module.elementwise_affine = norm.weight is not None or norm.bias is not None
    return module
