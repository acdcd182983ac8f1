r"""Virtual batch normalization (Salimans et al., arXiv 1606.03498): each sample with a fixed reference batch.

A reference batch of :math:`B` samples, chosen once, is normalized by its own moments :math:`M, V`. Any other sample is
normalized by those of the reference batch and itself, as if it were the batch's last sample: with its own moments
:math:`m, v` over space and :math:`c = 1 / (B + 1)`,

.. math::  \mu = c\,m + (1 - c) M, \quad
           \sigma^2 = c\,v + (1 - c) V + c (1 - c) (m - M)^2, \quad
           y = \frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}} \; w + b ,

in train mode and in eval mode alike: no sample depends on another of its batch. The reference batch goes through the
whole model, so that each layer sees what the layers before it make of it; as these learn, it has to go through again,
before each step in the paper, with ::

    with reference_batch(model):
        model(reference)

Its moments are constants to the gradient. They are kept in the buffers of a batch norm, so that the running
statistics of one, taken over by a conversion, stand for a reference batch of ``reference_size`` samples until there is
one. A layer that never saw any (:math:`B = 0`) is instance normalization; on ``(N, C)`` that leaves zeros."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normswap.errors import NormswapError, Refusal, check_whole
from normswap.norms.adopt import is_instance, like
from normswap.norms.moments import Coefficients, Moments, affine, normalize
from normswap.norms.momentum import Momentum
from normswap.norms.tracked import TrackedNorm, assemble, batch_normalized, fields, kept
from normswap.registry import builds, reads
from normswap.spec import BATCH, SPACE, Form, Norm

REFERENCE_SIZE = 64


def joined(
    moments: Moments,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    reference_size: Tensor,
    *,
    eps: float,
) -> Coefficients:
    """Scale and shift by the formula above."""
    dtype = moments.mean.dtype
    share = 1 / (reference_size.to(dtype) + 1)
    mean, var = running_mean.to(dtype), running_var.to(dtype)
    apart = (moments.mean - mean).square()
    var = torch.lerp(var, moments.var, share) + share * (1 - share) * apart
    return affine(torch.lerp(mean, moments.mean, share), var, weight, bias, eps)


class VirtualBatchNorm(TrackedNorm):
    """Virtual batch normalization of ``(N, C, *S)``, any rank of at least 2.

    Arguments as of ``nn.BatchNorm2d``; ``momentum`` and ``track_running_stats`` are taken for its sake and do nothing:
    there always is a reference batch, and its moments are no averages. Parameters ``weight``, ``bias`` and buffers
    ``running_mean``, ``running_var`` of shape ``(num_features,)``, ``reference_size``, the samples of the reference
    batch, and ``num_batches_tracked``, how often it went through."""

    reference_size: Tensor
    collecting: bool = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Momentum = None,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, True, device, dtype, bias=bias)
        self.register_buffer("reference_size", torch.tensor(0, dtype=torch.long, device=device))

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        if self.collecting:
            out, seen = normalize(x, partial(batch_normalized, eps=self.eps), self.weight, self.bias)
            if seen:
                self.collect(seen[0], seen[1], x.shape[0])
            return out
        buffers = (kept(each) for each in (self.running_mean, self.running_var, self.reference_size))
        given = self.weight, self.bias, *buffers
        return normalize(x, partial(joined, eps=self.eps), *given)[0]

    @torch.no_grad()
    def reset_running_stats(self) -> None:
        """Make it, in place, a layer that never saw a reference batch."""
        super().reset_running_stats()
        self.reference_size.zero_()

    @torch.no_grad()
    def collect(self, mean: Tensor, var: Tensor, samples: int) -> None:
        """Keep the moments of a reference batch, each ``(C,)``."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.running_mean.copy_(mean)
        self.running_var.copy_(var)
        self.reference_size.fill_(samples)
        self.num_batches_tracked.add_(1)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}"


class VirtualBatchNorm1d(VirtualBatchNorm):
    """Virtual batch normalization of ``(N, C)`` or ``(N, C, L)``."""

    dims = frozenset({2, 3})


class VirtualBatchNorm2d(VirtualBatchNorm):
    """Virtual batch normalization of ``(N, C, H, W)``."""

    dims = frozenset({4})


class VirtualBatchNorm3d(VirtualBatchNorm):
    """Virtual batch normalization of ``(N, C, D, H, W)``."""

    dims = frozenset({5})


CLASSES = (VirtualBatchNorm, VirtualBatchNorm1d, VirtualBatchNorm2d, VirtualBatchNorm3d)


@contextmanager
def reference_batch(model: nn.Module) -> Iterator[None]:
    """Within it, a batch that ``model`` is run on becomes the reference batch of its virtual batch norms.

    Each of them normalizes it by its own moments and keeps these. Nothing but their buffers changes: run it under
    ``torch.no_grad()`` where no gradient is wanted. A batch of one call; a layer that is called several times keeps
    the last. Raises :class:`NormswapError` for a model without such norms, and when one of them was not run."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, VirtualBatchNorm)}
    if not layers:
        raise NormswapError("the model has no virtual batch norm: convert it to 'virtual' first")
    before = {name: int(layer.num_batches_tracked or 0) for name, layer in layers.items()}
    for layer in layers.values():
        layer.collecting = True
    try:
        yield
    finally:
        for layer in layers.values():
            layer.collecting = False
    if missed := [name for name, layer in layers.items() if int(layer.num_batches_tracked or 0) == before[name]]:
        raise NormswapError(f"no reference batch ran through {missed[0] or 'the model'}: call model(reference) inside")


@dataclass(frozen=True, eq=False)
class VirtualForm(Form):
    reference_size: Tensor

    loses = "size of the reference batch"
    note = "its statistics stand for a reference batch: run one inside normswap.layers.reference_batch"

    def output(self, x: Tensor, norm: Norm, eps: float, training: bool) -> Tensor:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        space, each = tuple(range(2, x.dim())), (1, -1, *[1] * (x.dim() - 2))
        size = int(self.reference_size)
        mean, var = (buffer.detach().to(x).reshape(each) for buffer in (norm.running_mean, norm.running_var))
        own, square = (value.mean(space, keepdim=True) if space else value for value in (x, x.square()))
        mean, square = (own + size * mean) / (size + 1), (square + size * (var + mean.square())) / (size + 1)
        out = (x - mean) / (square - mean.square() + eps).sqrt()
        weight, bias = (None if t is None else t.detach().to(x).reshape(each) for t in (norm.weight, norm.bias))
        out = out if weight is None else out * weight
        return out if bias is None else out + bias

    def plain(self, norm: Norm) -> Norm | None:
        if self.reference_size.is_meta or int(self.reference_size) > 0:
            return None
        nothing = dict.fromkeys(TrackedNorm.statistics)
        return replace(norm, form=None, pools=SPACE, **nothing)  # type: ignore[arg-type]


@reads(*CLASSES)
def read(module: VirtualBatchNorm) -> Norm:
    return Norm("virtual", pools=BATCH, form=VirtualForm(module.reference_size), **fields(module))


@builds("virtual")
def build(
    norm: Norm, *, reference_size: int = REFERENCE_SIZE, init: Literal["copy", "preserve", "reset"] = "copy"
) -> VirtualBatchNorm:
    """``reference_size``: the samples that running statistics of ``norm`` stand for."""
    check_whole("reference_size", reference_size)
    if not norm.has_statistics and norm.ranks is not None and 2 in norm.ranks:
        raise Refusal("its input is or may be (N, C), and it has no running statistics: nothing to normalize by")
    if init == "preserve" and not is_instance(norm):
        raise Refusal("a virtual batch norm cannot compute the same (init='preserve'); use init='copy'")
    module = assemble(norm, "virtual", CLASSES)
    if isinstance(norm.form, VirtualForm):
        module.reference_size = norm.form.reference_size
    else:
        size = reference_size if norm.has_statistics and init != "reset" else 0
        module.reference_size = torch.tensor(size, dtype=torch.long, device=like(norm).get("device"))
    return module
