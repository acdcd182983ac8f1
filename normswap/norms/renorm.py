r"""Batch renormalization (Ioffe, arXiv 1702.03275): training sees, up to a limit, what eval mode will compute.

With the moments of the batch, :math:`\sigma_B = \sqrt{v_B + \varepsilon}`, and the running ones :math:`\mu, \sigma`,

.. math::  y = \Bigl(\frac{x - \mu_B}{\sigma_B} r + d\Bigr) w + b,\quad
           r = \operatorname{clip}_{[1/r_{max}, r_{max}]} \frac{\sigma_B}{\sigma},\quad
           d = \operatorname{clip}_{[-d_{max}, d_{max}]} \frac{\mu_B - \mu}{\sigma},

where ``r`` and ``d`` are constants to the gradient. :math:`r_{max}` and :math:`d_{max}` grow linearly from 1 and 0 with
the number of batches seen. :math:`\sigma` itself is averaged, not its square; the buffer ``running_var`` holds
:math:`\sigma^2 - \varepsilon`, so that the state is a batch norm's. Eval mode is that of batch normalization.

Under activation checkpointing the forward pass runs twice, the second time with running statistics that the first has
moved: ``r`` and ``d``, and with them the gradient, are then those of the next step (and as in every batch norm the
statistics move twice). Keep these layers out of checkpointed parts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from normswap.errors import NormswapError
from normswap.norms.moments import Coefficients, Moments, affine, normalize
from normswap.norms.momentum import Momentum
from normswap.norms.tracked import BatchTrained, assemble, fields, pooled, together
from normswap.registry import builds, reads
from normswap.spec import Norm


@torch.library.custom_op("normswap::snapshot", mutates_args=())
def snapshot(buffer: Tensor) -> Tensor:
    """A copy that ``torch.compile`` cannot put off. A plain clone of a buffer it may make anew for the backward pass,
    when the buffer has been written over (pytorch pull request 197039)."""
    return buffer.clone()


@snapshot.register_fake
def _(buffer: Tensor) -> Tensor:
    return torch.empty_like(buffer)


def _now(buffer: Tensor) -> Tensor:
    copied: Tensor = snapshot(buffer) if torch.compiler.is_compiling() else buffer.clone()
    return copied


def renormalized(
    moments: Moments,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    r_max: Tensor | None,
    d_max: Tensor | None,
    *,
    eps: float,
) -> Coefficients:
    """Scale and shift by the formula above; those of batch normalization without running statistics."""
    mean, var = moments.over_batch()
    if running_mean is None or running_var is None or r_max is None or d_max is None:
        return affine(mean, var, weight, bias, eps, (mean, var))
    deviation = torch.sqrt(var + eps)
    past = torch.sqrt(running_var.to(var.dtype) + eps)
    r = (deviation.detach() / past).clamp(1 / r_max, r_max)
    d = ((mean.detach() - running_mean.to(mean.dtype)) / past).clamp(-d_max, d_max)
    plain = affine(mean, var, None, None, eps)
    scale, shift = plain.scale * r, plain.shift * r + d
    if weight is not None:
        weight = weight.to(scale.dtype)  # Once: where means are large, both gradients cancel before they are rounded.
        scale, shift = scale * weight, shift * weight
    return Coefficients(scale, shift if bias is None else shift + bias.to(shift.dtype), (mean, var))


class BatchRenorm(BatchTrained):
    """Batch renormalization of ``(N, C, *S)``, any rank of at least 2.

    Arguments and state as of ``nn.BatchNorm2d``. ``r_max`` grows from 1 between the batches ``start`` and ``r_end``,
    ``d_max`` from 0 between ``start`` and ``d_end``; the defaults, and a momentum of 0.01, are the paper's. With
    ``synchronised=True`` the batch is that of all processes of ``process_group``. Raises
    :class:`NormswapError` for limits that clip everything away or a schedule that runs backwards."""

    averages = "deviation"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Momentum = 0.01,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        r_max: float = 3.0,
        d_max: float = 5.0,
        start: int = 5000,
        r_end: int = 40000,
        d_end: int = 25000,
        synchronised: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.synchronise(synchronised, process_group)
        if not (r_max >= 1 and d_max >= 0):
            raise NormswapError(f"r_max={r_max!r}, d_max={d_max!r}: they must be at least 1 and 0")
        if not 0 <= start <= min(r_end, d_end):
            raise NormswapError(f"start={start!r}, r_end={r_end!r}, d_end={d_end!r}: 0 <= start <= both ends")
        self.r_max, self.d_max = float(r_max), float(d_max)
        self.start, self.r_end, self.d_end = start, r_end, d_end

    def limits(self) -> tuple[Tensor, Tensor]:
        """``r_max`` and ``d_max`` for the next batch, float64 scalars."""
        assert self.num_batches_tracked is not None
        seen = _now(self.num_batches_tracked).double()
        grown = [
            torch.where(seen >= end, 1.0, (seen - self.start).clamp(min=0) / max(end - self.start, 1))
            for end in (self.r_end, self.d_end)
        ]
        return 1 + (self.r_max - 1) * grown[0], self.d_max * grown[1]

    def train_forward(self, x: Tensor) -> Tensor:
        given: tuple[Tensor | None, ...] = (None,) * 4
        if self.training and self.running_mean is not None and self.running_var is not None:
            given = (_now(self.running_mean), _now(self.running_var), *self.limits())
        function = partial(renormalized, eps=self.eps)
        out, seen = normalize(x, function, self.weight, self.bias, *given, across=self.across())
        if seen:
            self.track(*seen)
        return out

    def extra_repr(self) -> str:
        schedule = f"start={self.start}, r_end={self.r_end}, d_end={self.d_end}"
        return f"{super().extra_repr()}, r_max={self.r_max:g}, d_max={self.d_max:g}, {schedule}"


class BatchRenorm1d(BatchRenorm):
    """Batch renormalization of ``(N, C)`` or ``(N, C, L)``."""

    dims = frozenset({2, 3})


class BatchRenorm2d(BatchRenorm):
    """Batch renormalization of ``(N, C, H, W)``."""

    dims = frozenset({4})


class BatchRenorm3d(BatchRenorm):
    """Batch renormalization of ``(N, C, D, H, W)``."""

    dims = frozenset({5})


CLASSES = (BatchRenorm, BatchRenorm1d, BatchRenorm2d, BatchRenorm3d)


@reads(*CLASSES)
def read(module: BatchRenorm) -> Norm:
    limits = module.limits() if module.running_mean is not None else None
    return Norm("renorm", pools=pooled(module), limits=limits, **fields(module))


@builds("renorm")
def build(
    norm: Norm,
    *,
    r_max: float = 3.0,
    d_max: float = 5.0,
    start: int = 5000,
    r_end: int = 40000,
    d_end: int = 25000,
    synchronised: bool | None = None,
    process_group: Any = None,
) -> BatchRenorm:
    options: dict[str, Any] = {"r_max": r_max, "d_max": d_max, "start": start, "r_end": r_end, "d_end": d_end}
    return assemble(norm, "renorm", CLASSES, **options, **together(norm, synchronised, process_group))
