"""What is left of a norm with fixed statistics that no layer absorbs: ``y = s·x + t`` per channel, in one pass.

The form is the fastest measured (``scripts/bench.py fold``). Eager, where the channels are the fastest axis in memory:
one ``addcmul``. Elsewhere, and in an exported graph: the batch norm kernel with mean 0, variance 1 and no eps, which
gives the same numbers; a multiply and an add are two passes over the data there, in ONNX Runtime too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normswap.registry import reads
from normswap.spec import Norm


class ChannelAffine(nn.Module):
    """Scale and shift of the channels of ``(N, C, *S)``; parameters ``scale`` and ``shift`` of shape ``(C,)``."""

    scale: Tensor
    shift: Tensor
    standard: tuple[Tensor, Tensor]
    """Mean 0 and variance 1, ``(C,)``; no buffers, which other code may save, average or leave empty."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.scale = nn.Parameter(torch.ones(num_features))
        self.shift = nn.Parameter(torch.zeros(num_features))
        self.standard = _standard(self.shift)

    def forward(self, x: Tensor) -> Tensor:
        if _channels_last(x) and x.dtype == self.scale.dtype and not torch.compiler.is_exporting():
            shape = (-1, *[1] * (x.dim() - 2))
            return torch.addcmul(self.shift.reshape(shape), x, self.scale.reshape(shape))
        mean, variance = self.standard
        if mean.device != self.shift.device or mean.dtype != self.shift.dtype:  # a replica on another device
            mean, variance = _standard(self.shift)
        return F.batch_norm(x, mean, variance, self.scale, self.shift, False, 0.0, 0.0)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.standard = _standard(self.shift)
        return self

    def extra_repr(self) -> str:
        return str(self.num_features)


def _channels_last(x: Tensor) -> bool:
    """Whether the channels are the fastest axis; other strides than these a batch norm would not keep."""
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if x.dim() == 5:
        return x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    return x.dim() == 2 and x.is_contiguous()


def _standard(like: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(like, requires_grad=False), torch.ones_like(like, requires_grad=False)


@reads(ChannelAffine)
def read(module: ChannelAffine) -> Norm:
    """A channel affine as a norm with the statistics of mean 0 and variance 1, and no eps."""
    mean, variance = _standard(module.shift)
    return Norm(
        kind="affine",
        channels=module.num_features,
        eps=0.0,
        momentum=None,
        weight=module.scale,
        bias=module.shift,
        running_mean=mean,
        running_var=variance,
        fixed=True,
    )
