"""Frozen batch normalization: the running statistics in train mode too, affine and statistics as buffers.

It is the channel affine ``y = s·x + t`` at all times, as in torchvision's and detectron2's ``FrozenBatchNorm2d``, for
an input of any rank; computed by the same kernel as eval-mode BatchNorm, so that freezing changes no bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normswap.errors import Refusal
from normswap.norms.adopt import channels_first
from normswap.norms.batch import eps_of
from normswap.registry import builds, reads
from normswap.spec import BATCH, Norm, scale_shift


class FrozenBatchNorm(nn.Module):
    """Channel affine of a frozen BatchNorm on ``(N, C, *S)``.

    Buffers ``weight``, ``bias``, ``running_mean``, ``running_var``, each ``(num_features,)``. Its ``state_dict`` loads
    from a BatchNorm's (the batch counter is ignored).
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


@reads(FrozenBatchNorm)
def read(module: Any) -> Norm:
    """A class with buffers ``weight``, ``bias``, ``running_mean``, ``running_var`` and an ``eps``."""
    return Norm(
        kind="frozen",
        channels=module.running_mean.shape[0],
        pools=BATCH,
        eps=module.eps,
        weight=module.weight,
        bias=module.bias,
        running_mean=module.running_mean,
        running_var=module.running_var,
        fixed=True,
    )


@builds("frozen")
def build(norm: Norm) -> nn.Module:
    channels_first(norm, "frozen")
    if norm.gates is None and not norm.has_statistics:
        raise Refusal("it has no running statistics to freeze")
    if scale_shift(norm) is None:
        if norm.form is not None:
            raise Refusal(f"{norm.kind} is no fixed affine, whatever its running statistics")
        raise Refusal("its gates mix in the input's own moments: it is no fixed affine")
    module = FrozenBatchNorm(0, eps_of(norm))
    module.num_features = norm.channels
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(norm, name)
        module.register_buffer(name, None if tensor is None else tensor.detach())
    return module
