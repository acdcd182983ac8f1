r"""Batch-instance normalization (Nam and Kim, arXiv 1805.07925): each channel chooses between batch and instance.

With a share :math:`\rho \in [0, 1]` for each channel, learned,

.. math::  y = \Bigl(\rho \frac{x - m_B}{\sqrt{v_B + \varepsilon}}
               + (1 - \rho) \frac{x - m_I}{\sqrt{v_I + \varepsilon}}\Bigr) w + b .

The paper clips :math:`\rho` after every step of the optimizer. Here it is clipped where it is used, and the gradient of
one that lies outside is let through only if it leads back, so that no optimizer needs to know. In eval mode the batch
moments are moving averages, of biased variances."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normswap.errors import Refusal
from normswap.norms.adopt import is_instance, like
from normswap.norms.moments import Coefficients, Moments, affine, normalize
from normswap.norms.momentum import Momentum
from normswap.norms.tracked import TrackedNorm, assemble, fields, pooled, together
from normswap.registry import builds, reads
from normswap.spec import Norm, scale_shift


class _Share(torch.autograd.Function):
    """A share clipped to [0, 1]; the gradient passes where a step against it leads inside, or stays there."""

    generate_vmap_rule = True

    @staticmethod
    def forward(share: Tensor) -> Tensor:
        return share.clamp(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (share,), (gradient,) = ctx.saved_tensors, gradients
        away = ((share > 1) & (gradient < 0)) | ((share < 0) & (gradient > 0))
        return gradient.masked_fill(away, 0)


class _DualShare(_Share):
    """The same with a forward derivative, that of clipping: ``torch.compile`` takes no function that has one."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        (share,) = ctx.saved_tensors
        return tangents[0].masked_fill((share < 0) | (share > 1), 0)


def shared(
    moments: Moments,
    share: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    eps: float,
    instance: bool,
) -> Coefficients:
    """Scale and shift of the mixture; of the batch part alone where an instance is one value."""
    dtype = moments.mean.dtype
    seen: tuple[Tensor, ...] = ()
    if running_mean is not None and running_var is not None:
        mean, var = running_mean.to(dtype), running_var.to(dtype)
    else:
        mean, var = seen = moments.over_batch()
    batch = affine(mean, var, None, None, eps)
    scale, shift = batch.scale, batch.shift
    if instance:
        own, share = affine(moments.mean, moments.var, None, None, eps), share.to(dtype)
        scale, shift = torch.lerp(own.scale, scale, share), torch.lerp(own.shift, shift, share)
    if weight is not None:
        weight = weight.to(dtype)  # Once: where means are large, the gradients by both cancel before they are rounded.
        scale, shift = scale * weight, shift * weight
    return Coefficients(scale, shift if bias is None else shift + bias.to(dtype), seen)


class BatchInstanceNorm(TrackedNorm):
    """Batch-instance normalization of ``(N, C, *S)``, any rank of at least 2.

    Arguments and state as of ``nn.BatchNorm2d``, and a parameter ``share`` of shape ``(num_features,)``, the part of
    the batch, 1 at first. On ``(N, C)`` an instance is a single value, and it is batch normalization. With
    ``synchronised=True`` the batch is that of all processes of ``process_group``."""

    initial = TrackedNorm.initial | {"share": 1.0}
    share: Tensor

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
        synchronised: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.synchronise(synchronised, process_group)

    def _more_parameters(self, where: dict[str, Any]) -> None:
        self.share = nn.Parameter(torch.ones(self.num_features, **where))

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        function = partial(shared, eps=self.eps, instance=x.dim() > 2)
        clipped = _Share if torch.compiler.is_compiling() else _DualShare
        share: Tensor = clipped.apply(self.share)  # type: ignore[no-untyped-call]
        out, seen = normalize(x, function, share, self.weight, self.bias, *self.running, across=self.across())
        if seen:
            self.track(*seen)
        return out


class BatchInstanceNorm1d(BatchInstanceNorm):
    """Batch-instance normalization of ``(N, C)`` or ``(N, C, L)``."""

    dims = frozenset({2, 3})


class BatchInstanceNorm2d(BatchInstanceNorm):
    """Batch-instance normalization of ``(N, C, H, W)``."""

    dims = frozenset({4})


class BatchInstanceNorm3d(BatchInstanceNorm):
    """Batch-instance normalization of ``(N, C, D, H, W)``."""

    dims = frozenset({5})


CLASSES = (BatchInstanceNorm, BatchInstanceNorm1d, BatchInstanceNorm2d, BatchInstanceNorm3d)


@reads(*CLASSES)
def read(module: BatchInstanceNorm) -> Norm:
    return Norm("batch_instance", pools=pooled(module), share=module.share, **fields(module))


@builds("batch_instance")
def build(
    norm: Norm,
    *,
    synchronised: bool | None = None,
    process_group: Any = None,
    init: Literal["copy", "preserve", "reset"] = "copy",
) -> BatchInstanceNorm:
    """``init="preserve"``: of an instance norm the share is 0, of one with running statistics 1."""
    module = assemble(norm, "batch_instance", CLASSES, **together(norm, synchronised, process_group))
    share = torch.ones(norm.channels, **like(norm))
    if init == "preserve" and scale_shift(norm) is None:
        if not is_instance(norm):
            raise Refusal("a batch-instance norm cannot compute the same (init='preserve'); use init='copy'")
        share.zero_()
    module.share = nn.Parameter(share)
    return module
