r"""Ghost batch normalization (Hoffer et al., arXiv 1705.08741): a batch in parts, each normalized by its own moments.

A batch of ``N`` samples is cut, in order, into :math:`\lceil N / B \rceil` virtual batches of at most ``B``, as even in
size as can be. The running statistics are averaged over them one after another, as if they had been batches;
:math:`\sigma = \sqrt{v + \varepsilon}` is averaged, not its square, and the buffer ``running_var`` holds
:math:`\sigma^2 - \varepsilon`. Eval mode is that of batch normalization."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from normswap.errors import check_whole
from normswap.norms.moments import Coefficients, Moments, affine, normalize
from normswap.norms.momentum import Momentum
from normswap.norms.tracked import BatchTrained, assemble, fields
from normswap.registry import builds, reads
from normswap.spec import BATCH, Norm, virtual_batches

VIRTUAL_BATCH = 32


def parted(
    moments: Moments, weight: Tensor | None, bias: Tensor | None, *, eps: float, virtual_batch: int
) -> Coefficients:
    """Scale and shift of each sample by the moments of its virtual batch; ``seen`` has those of each, ``(K, C)``."""
    sizes = virtual_batches(len(moments.mean), virtual_batch)
    parts = zip(moments.mean.split(sizes), moments.var.split(sizes), strict=True)
    pooled = [Moments(mean, var, moments.count).over_batch() for mean, var in parts]
    means, variances = (torch.stack(each) for each in zip(*pooled, strict=True))
    mean, var = (
        torch.cat([row.expand(size, -1) for row, size in zip(rows, sizes, strict=True)]) for rows in (means, variances)
    )
    return affine(mean, var, weight, bias, eps, (means, variances))


class GhostBatchNorm(BatchTrained):
    """Ghost batch normalization of ``(N, C, *S)``, any rank of at least 2.

    Arguments and state as of ``nn.BatchNorm2d``; ``virtual_batch`` is the number of samples that are normalized
    together, and ``num_batches_tracked`` counts virtual batches. Raises :class:`NormswapError` for a
    ``virtual_batch`` below 1."""

    averages = "deviation"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Momentum = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        virtual_batch: int = VIRTUAL_BATCH,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        check_whole("virtual_batch", virtual_batch)
        self.virtual_batch = virtual_batch

    def train_forward(self, x: Tensor) -> Tensor:
        # In eval mode without statistics, samples must not depend on how a batch is cut.
        together = self.virtual_batch if self.training else max(len(x), 1)
        function = partial(parted, eps=self.eps, virtual_batch=together)
        out, seen = normalize(x, function, self.weight, self.bias)
        for mean, var in zip(*seen, strict=True):
            self.track(mean, var)
        return out

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, virtual_batch={self.virtual_batch}"


class GhostBatchNorm1d(GhostBatchNorm):
    """Ghost batch normalization of ``(N, C)`` or ``(N, C, L)``."""

    dims = frozenset({2, 3})


class GhostBatchNorm2d(GhostBatchNorm):
    """Ghost batch normalization of ``(N, C, H, W)``."""

    dims = frozenset({4})


class GhostBatchNorm3d(GhostBatchNorm):
    """Ghost batch normalization of ``(N, C, D, H, W)``."""

    dims = frozenset({5})


CLASSES = (GhostBatchNorm, GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d)


@reads(*CLASSES)
def read(module: GhostBatchNorm) -> Norm:
    return Norm("ghost", pools=BATCH, virtual_batch=module.virtual_batch, **fields(module))


@builds("ghost")
def build(norm: Norm, *, virtual_batch: int = VIRTUAL_BATCH) -> GhostBatchNorm:
    return assemble(norm, "ghost", CLASSES, virtual_batch=virtual_batch)
