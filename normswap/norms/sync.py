"""Synchronised batch normalization: ``nn.SyncBatchNorm`` where torch has it, and the same for everything else.

torch's class synchronises on accelerators only. Where a norm's tensors are on one, it is built. Anywhere else (a CPU
under gloo) :class:`SyncBatchNorm` is, which pools the moments of :mod:`normswap.norms.moments` over the processes, and
is torch's again on inputs that torch's accepts. It does not derive from ``nn.SyncBatchNorm``, for
``DistributedDataParallel`` refuses every instance of that on a CPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normswap.errors import Refusal
from normswap.norms.adopt import channels_first, like
from normswap.norms.batch import fill, positive_eps
from normswap.norms.inputs import check_input
from normswap.norms.moments import Coefficients, Moments, affine, normalize
from normswap.norms.processes import Across, check_group, several
from normswap.norms.tracked import next_share
from normswap.registry import builds, reads
from normswap.spec import SYNC, Norm


def torchs(device: str) -> bool:
    """Whether ``nn.SyncBatchNorm`` synchronises on a type of device."""
    return device in ("cuda", "hpu", "xpu", torch._C._get_privateuse1_backend_name())


def pooled(moments: Moments, weight: Tensor | None, bias: Tensor | None, *, eps: float) -> Coefficients:
    """Scale and shift of batch normalization."""
    mean, var = moments.over_batch()
    return affine(mean, var, weight, bias, eps, (mean, var))


class SyncBatchNorm(_BatchNorm):
    """``nn.SyncBatchNorm`` that trains on any device and torch.distributed backend.

    Takes ``(N, C, *S)`` of any rank of at least 2 and any floating dtype. In train mode the moments are those of the
    batches of all processes of ``process_group`` (``None``: of all), whose sizes may differ, 0 among them. In eval
    mode, and where a process is alone, it is batch normalization. Arguments and state are those of
    ``nn.SyncBatchNorm``. Raises ``ValueError`` for an input of fewer dimensions or other channels, and
    :class:`NormswapError` for a ``process_group`` that is none."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **where)
        if not bias:
            self.register_parameter("bias", None)
        check_group(process_group)
        self.process_group = process_group
        self._ranks: frozenset[int] | None = None  # Of the norm it was made from, to be that again.

    def _check_input_dim(self, input: Tensor) -> None:
        check_input(input, self.num_features, None)

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not (self.training and several(self.process_group)):
            return super().forward(input)
        if torchs(input.device.type):
            theirs: Any = nn.SyncBatchNorm.forward
            result: Tensor = theirs(self, input)
            return result
        across = Across(self.process_group)
        function = partial(pooled, eps=self.eps)
        out, seen = normalize(input, function, self.weight, self.bias, across=across)
        if seen and across.total is not None:
            mean, var = seen
            self._track(mean, var * (across.total / (across.total - 1).clamp(min=1)))
        return out

    def _check_non_zero_input_channels(self, input: Tensor) -> None:
        """What ``nn.SyncBatchNorm.forward`` asks for beside this class."""

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        share = next_share(self.num_batches_tracked, self.momentum, mean)
        self.running_mean.copy_(torch.lerp(self.running_mean.to(mean.dtype), mean, share))
        self.running_var.copy_(torch.lerp(self.running_var.to(var.dtype), var, share))


@reads(nn.SyncBatchNorm, SyncBatchNorm)
def read(module: nn.SyncBatchNorm | SyncBatchNorm) -> Norm:
    return Norm(
        kind="sync",
        channels=module.num_features,
        pools=SYNC,
        ranks=vars(module).get("_ranks"),
        eps=module.eps,
        momentum=module.momentum,
        weight=module.weight,
        bias=module.bias,
        running_mean=module.running_mean,
        running_var=module.running_var,
        num_batches_tracked=module.num_batches_tracked,
        process_group=module.process_group,
    )


@builds("sync")
def build(norm: Norm, *, process_group: Any = None) -> nn.Module:
    channels_first(norm, "sync")
    if "batch" not in norm.pools:
        raise Refusal(
            f"{norm.kind} does not pool over the batch, so there is nothing to synchronise; convert it to batch"
        )
    group = norm.process_group if process_group is None else process_group
    options = (norm.channels, positive_eps(norm), norm.momentum, False, False)
    where = like(norm).get("device")
    if where is not None and torchs(where.type):
        return fill(nn.SyncBatchNorm(*options, process_group=group), norm)
    module = SyncBatchNorm(*options, process_group=group)
    module._ranks = norm.ranks
    return fill(module, norm)
