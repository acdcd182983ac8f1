"""Batch normalization (arXiv 1502.03167) whose momentum follows a schedule of :mod:`normswap.norms.momentum`.

Moments, affine, eval mode and state are those of ``nn.BatchNorm2d``, which takes a constant or ``None``; so are the
running variances, which are unbiased ones. The other layers with running statistics (``switchable``, ``renorm``,
``ghost``, ``batch_instance``, ``conditional``, ``domain``, ``evonorm_b0``) take a schedule as their ``momentum`` too,
and a norm that has one hands it on to them in a conversion."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor

from normswap.errors import NormswapError
from normswap.norms.moments import normalize
from normswap.norms.momentum import Schedule, parse
from normswap.norms.tracked import BatchTrained, assemble, batch_normalized, fields
from normswap.registry import builds, reads
from normswap.spec import BATCH, Norm

WARMUP = "warmup:0.1"


class AdaptiveBatchNorm(BatchTrained):
    """Batch normalization of ``(N, C, *S)``, any rank of at least 2, whose ``momentum`` may be a schedule.

    Arguments and state as of ``nn.BatchNorm2d``. Raises ``ValueError`` for an input of another rank."""

    def train_forward(self, x: Tensor) -> Tensor:
        out, seen = normalize(x, partial(batch_normalized, eps=self.eps), self.weight, self.bias)
        if seen:
            count = x.numel() // x.shape[1]
            self.track(seen[0], seen[1] * (count / max(count - 1, 1)))
        return out


class AdaptiveBatchNorm1d(AdaptiveBatchNorm):
    """The same for ``(N, C)`` or ``(N, C, L)``."""

    dims = frozenset({2, 3})


class AdaptiveBatchNorm2d(AdaptiveBatchNorm):
    """The same for ``(N, C, H, W)``."""

    dims = frozenset({4})


class AdaptiveBatchNorm3d(AdaptiveBatchNorm):
    """The same for ``(N, C, D, H, W)``."""

    dims = frozenset({5})


CLASSES = (AdaptiveBatchNorm, AdaptiveBatchNorm1d, AdaptiveBatchNorm2d, AdaptiveBatchNorm3d)


@reads(*CLASSES)
def read(module: AdaptiveBatchNorm) -> Norm:
    return Norm("adaptive_momentum", pools=BATCH, **fields(module))


@builds("adaptive_momentum")
def build(norm: Norm, *, momentum: float | str | None = WARMUP) -> AdaptiveBatchNorm:
    """``momentum``: as in the table of :mod:`normswap.norms.momentum`."""
    if isinstance(momentum, Schedule):
        raise NormswapError(f"momentum={momentum!r}: write it as {str(momentum)!r}, which a recipe can hold")
    module = assemble(replace(norm, schedule=None), "adaptive_momentum", CLASSES)
    found = parse(momentum)
    keeps = momentum == WARMUP and isinstance(norm.schedule, Schedule)
    module.momentum = norm.schedule if keeps else found
    return module
