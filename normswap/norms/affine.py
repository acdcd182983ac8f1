"""What is left of a norm with fixed statistics that no layer absorbs: ``y = s·x + t`` per channel, one multiply-add.

The form is the fastest measured (``scripts/bench.py fold``): one fused ``addcmul`` where the channels are the fastest
axis in memory, a multiply and an in-place add elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normswap.registry import reads
from normswap.spec import Norm


class ChannelAffine(nn.Module):
    """Scale and shift of the channels of ``(N, C, *S)``; parameters ``scale`` and ``shift`` of shape ``(C,)``."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.scale = nn.Parameter(torch.ones(num_features))
        self.shift = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.dim() - 2))
        scale, shift = self.scale.reshape(shape), self.shift.reshape(shape)
        if x.dim() == 2 or not x.is_contiguous():
            return torch.addcmul(shift, x, scale)
        return (x * scale).add_(shift)

    def extra_repr(self) -> str:
        return str(self.num_features)


@reads(ChannelAffine)
def read(module: ChannelAffine) -> Norm:
    """A channel affine as a norm with the statistics of mean 0 and variance 1, and no eps."""
    return Norm(
        kind="affine",
        channels=module.num_features,
        eps=0.0,
        momentum=None,
        weight=module.scale,
        bias=module.shift,
        running_mean=torch.zeros_like(module.scale, requires_grad=False),
        running_var=torch.ones_like(module.scale, requires_grad=False),
        fixed=True,
    )
