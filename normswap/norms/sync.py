r"""Synchronised batch normalization: ``nn.SyncBatchNorm``, which here also trains without a GPU.

torch's class accepts only accelerator tensors when it synchronises. The subclass leaves those to torch and, for every
other device and backend (gloo), pools the moments with differentiable all-reduces, in two steps so that the variance
suffers no cancellation: first :math:`m = \sum x / n`, then :math:`v = \sum (x - m)^2 / n`, both sums over all
processes. Batches may differ in size; a process may have none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from normswap.errors import Refusal
from normswap.norms.adopt import channels_first
from normswap.norms.batch import fill, positive_eps
from normswap.registry import builds, reads
from normswap.spec import SYNC, Norm


class SyncBatchNorm(nn.SyncBatchNorm):
    """``nn.SyncBatchNorm`` that trains on any torch.distributed backend and device."""

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and _initialized() and input.device.type == "cpu"):
            return super().forward(input)
        self._check_input_dim(input)
        return self._synchronised(input)

    def _synchronised(self, x: Tensor) -> Tensor:
        group = self.process_group
        wide = x.double() if x.dtype == torch.float64 else x.float()
        dims = (0, *range(2, x.dim()))
        shape = (1, -1, *[1] * (x.dim() - 2))
        count = torch.tensor([x.numel() // x.shape[1]], dtype=wide.dtype)
        total = _sum(torch.cat([wide.sum(dims), count]), group)
        count = total[-1].detach()
        mean = total[:-1] / count
        centred = wide - mean.reshape(shape)
        var = _sum(centred.square().sum(dims), group) / count
        self._track(mean.detach(), var.detach(), count)
        out = centred * torch.rsqrt(var + self.eps).reshape(shape)
        if self.weight is not None:
            out = out * self.weight.reshape(shape)
        if self.bias is not None:
            out = out + self.bias.reshape(shape)
        result: Tensor = out.to(x.dtype)
        return result

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        unbiased = var * (count / (count - 1).clamp(min=1))
        self.running_var.lerp_(unbiased.to(self.running_var), momentum)


class _Sum(torch.autograd.Function):
    """The sum over all processes of a group; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def _sum(tensor: Tensor, group: Any) -> Tensor:
    total: Tensor = _Sum.apply(tensor, group)  # type: ignore[no-untyped-call]
    return total


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


@reads(nn.SyncBatchNorm)
def read(module: nn.SyncBatchNorm) -> Norm:
    return Norm(
        kind="sync",
        channels=module.num_features,
        pools=SYNC,
        eps=module.eps,
        momentum=module.momentum,
        weight=module.weight,
        bias=module.bias,
        running_mean=module.running_mean,
        running_var=module.running_var,
        num_batches_tracked=module.num_batches_tracked,
        process_group=module.process_group,
    )


reads(SyncBatchNorm)(read)


@builds("sync")
def build(norm: Norm, *, process_group: Any = None) -> nn.Module:
    channels_first(norm, "sync")
    if "batch" not in norm.pools:
        raise Refusal(
            f"{norm.kind} does not pool over the batch, so there is nothing to synchronise; convert it to batch"
        )
    group = norm.process_group if process_group is None else process_group
    return fill(
        SyncBatchNorm(norm.channels, positive_eps(norm), norm.momentum, False, False, process_group=group),
        norm,
    )
