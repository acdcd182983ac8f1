r"""Moments pooled over the processes of torch.distributed, with one small exchange in each direction.

Process :math:`r` has :math:`n_r` values a channel, of mean :math:`m_r` and biased variance :math:`v_r`. Forward, each
sends these to all; each then computes, in the same order and so to the last bit the same,

.. math::  n = \sum_r n_r,\quad m = \sum_r \tfrac{n_r}{n} m_r,\quad
           v = \sum_r \tfrac{n_r}{n} \bigl(v_r + (m_r - m)^2\bigr)

(Chan, Golub and LeVeque, *Algorithms for computing the sample variance*, 1983; sums of squares would cancel). The
objective is the sum of those of all processes. Backward, :math:`\partial E / \partial m` and :math:`\partial E /
\partial v` are summed over the processes in one all-reduce; then, as :math:`\sum_r n_r (m_r - m) = 0`,

.. math::  \frac{\partial E}{\partial m_r} = \tfrac{n_r}{n} \Bigl(\frac{\partial E}{\partial m}
           + 2 (m_r - m) \frac{\partial E}{\partial v}\Bigr),\quad
           \frac{\partial E}{\partial v_r} = \tfrac{n_r}{n} \frac{\partial E}{\partial v} .

Batches may differ in size, and a process may have none: it takes part with :math:`n_r = 0`. All processes of a group
must run the layer equally often and in the same order, forward and backward, as with ``nn.SyncBatchNorm``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from normswap.errors import NormswapError


def check_group(group: Any) -> None:
    """Raise :class:`NormswapError` for what is neither ``None`` nor what ``torch.distributed.new_group`` returns."""
    known = group is None or (dist.is_available() and isinstance(group, dist.ProcessGroup))
    if not known and not (dist.is_available() and group == dist.GroupMember.NON_GROUP_MEMBER):
        raise NormswapError(f"process_group={group!r}: it is a group of torch.distributed, or None for all processes")


def several(group: Any) -> bool:
    """Whether ``group`` (``None``: all processes) has others beside this one; ``False`` where this one is not in it."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


class Across:
    """``(mean, var) = across(mean, var, count)``: from the moments of one process, each ``(C,)``, to those of all of
    ``group``. One object serves one call of a layer."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.total: Tensor | None = None
        """Values a channel of all processes, a scalar; ``None`` before the exchange."""

    def __call__(self, mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor]:
        mean, var, self.total = _Pool.apply(mean, var, count, self.group)  # type: ignore[no-untyped-call]
        return mean, var

    def found(self) -> bool:
        """Whether any process had values."""
        return self.total is None or bool(self.total > 0)


class _Pool(torch.autograd.Function):
    """The formulas above. Differentiable any number of times: each backward pass adds one all-reduce."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
        own = torch.cat((mean, var, mean.new_full((1,), float(count))))
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, own, group=group)
        means, variances, counts = torch.stack(gathered).split((len(mean), len(var), 1), 1)
        total = counts.sum()
        shares = counts / total.clamp(min=1)
        pooled = (means * shares).sum(0)
        spread = ((variances + (means - pooled).square()) * shares).sum(0)
        ctx.save_for_backward(mean, pooled, count / total.clamp(min=1))
        ctx.group = group
        ctx.mark_non_differentiable(total)
        return pooled, spread, total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        mean, pooled, share = ctx.saved_tensors
        summed: Tensor = _Sum.apply(torch.cat(gradients[:2]), ctx.group)  # type: ignore[no-untyped-call]
        of_mean, of_var = summed.chunk(2)
        return share * (of_mean + 2 * (mean - pooled) * of_var), share * of_var, None, None


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
        total: Tensor = _Sum.apply(gradients[0].contiguous(), ctx.group)  # type: ignore[no-untyped-call]
        return total, None
