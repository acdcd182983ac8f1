r"""Switchable normalization (Luo et al., arXiv 1806.10779): a learned mixture of instance, layer and batch moments.

With softmax weights :math:`\lambda` for means and :math:`\lambda'` for variances, over the sources
:math:`k \in \{\text{instance}, \text{layer}, \text{batch}\}`,

.. math::  y = \frac{x - \sum_k \lambda_k m_k}{\sqrt{\sum_k \lambda'_k v_k + \varepsilon}} \; w + b .

All variances are biased. Instance moments of shape (N, C) are taken from the input once; by the law of total variance
the others follow from them, without cancellation: :math:`m_L = \overline{m_I}`, :math:`v_L = \overline{v_I} +
\overline{(m_I - m_L)^2}`, the mean being over channels; for batch it is over samples. In eval mode the batch moments
are moving averages.

**Preserve.** To compute what a BatchNorm computed, its source's gate is set ``gate_gap`` above the others, which leaves
:math:`2 e^{-g}` of weight outside. A gate that is fully shut has no gradient: the gradient of the other gates shrinks
with the same :math:`e^{-g}`. The default 16 leaves 2.3e-7, the rounding of float32, and a gradient of about 1e-7 times
the open one, which Adam-like optimizers (scale-free) still follow and plain SGD hardly does; 8 moves the function by
some 7e-4 and trains with SGD."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from normswap.errors import NormswapError, Refusal
from normswap.norms.adopt import adopt_affine, adopt_statistics, channels_first, dimensions, like
from normswap.norms.batch import eps_of
from normswap.registry import builds, reads
from normswap.spec import MAP, SPACE, Norm, scale_shift

GATE_GAP = 16.0


class SwitchableNorm(nn.Module):
    """Switchable normalization of ``(N, C, *S)``, any rank of at least 2.

    Parameters ``weight``, ``bias`` of shape ``(num_features,)`` and the logits ``mean_gate``, ``var_gate`` of shape
    ``(3,)`` in the order instance, layer, batch; buffers as in ``nn.BatchNorm2d``. On ``(N, C)`` an instance is a
    single value, so the mixture is of layer and batch alone. ``momentum`` is torch's: the weight of the new batch;
    ``None`` for a cumulative mean."""

    dims: frozenset[int] | None = None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.register_parameter("weight", nn.Parameter(torch.ones(num_features)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_features)) if affine else None)
        self.mean_gate = nn.Parameter(torch.zeros(3))
        self.var_gate = nn.Parameter(torch.zeros(3))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.dims is not None and x.dim() not in self.dims:
            expected = " or ".join(f"{d}D" for d in sorted(self.dims))
            raise ValueError(f"expected {expected} input (got {x.dim()}D input)")
        wide = x if x.dtype == torch.float64 else x.float()
        spatial = tuple(range(2, x.dim()))
        if spatial:
            var_in, mean_in = torch.var_mean(wide, spatial, correction=0)  # (N, C)
        else:
            mean_in, var_in = wide, torch.zeros_like(wide)
        mean_ln = mean_in.mean(1, keepdim=True)  # (N, 1)
        var_ln = var_in.mean(1, keepdim=True) + (mean_in - mean_ln).square().mean(1, keepdim=True)
        mean_bn, var_bn = self._batch_moments(mean_in, var_in)  # (C,)
        gates = [gate.to(wide.dtype) for gate in (self.mean_gate, self.var_gate)]
        if spatial:
            lam, lam_var = (gate.softmax(0) for gate in gates)
            mean = lam[0] * mean_in + lam[1] * mean_ln + lam[2] * mean_bn
            var = lam_var[0] * var_in + lam_var[1] * var_ln + lam_var[2] * var_bn
        else:
            lam, lam_var = (gate[1:].softmax(0) for gate in gates)
            mean = lam[0] * mean_ln + lam[1] * mean_bn
            var = lam_var[0] * var_ln + lam_var[1] * var_bn
        scale = torch.rsqrt(var + self.eps)  # (N, C)
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale
        if self.bias is not None:
            shift = shift + self.bias
        shape = (*scale.shape, *[1] * len(spatial))
        return (wide * scale.reshape(shape) + shift.reshape(shape)).to(x.dtype)

    def _batch_moments(self, mean_in: Tensor, var_in: Tensor) -> tuple[Tensor, Tensor]:
        if not self.training:
            return self.running_mean.to(mean_in.dtype), self.running_var.to(mean_in.dtype)
        mean = mean_in.mean(0)
        var = var_in.mean(0) + (mean_in - mean).square().mean(0)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean), momentum)
            self.running_var.lerp_(var.to(self.running_var), momentum)
        return mean, var

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.weight is not None}"


class SwitchableNorm1d(SwitchableNorm):
    """Switchable normalization of ``(N, C)`` or ``(N, C, L)``."""

    dims = frozenset({2, 3})


class SwitchableNorm2d(SwitchableNorm):
    """Switchable normalization of ``(N, C, H, W)``."""

    dims = frozenset({4})


class SwitchableNorm3d(SwitchableNorm):
    """Switchable normalization of ``(N, C, D, H, W)``."""

    dims = frozenset({5})


@reads(SwitchableNorm, SwitchableNorm1d, SwitchableNorm2d, SwitchableNorm3d)
def read(module: SwitchableNorm) -> Norm:
    return Norm(
        kind="switchable",
        channels=module.num_features,
        pools=frozenset({"batch", "channel", "space"}),
        ranks=module.dims,
        eps=module.eps,
        momentum=module.momentum,
        weight=module.weight,
        bias=module.bias,
        running_mean=module.running_mean,
        running_var=module.running_var,
        num_batches_tracked=module.num_batches_tracked,
        gates=(module.mean_gate, module.var_gate),
    )


def _source(norm: Norm) -> int:
    """Which of instance (0), layer (1), batch (2) computes what ``norm`` does."""
    if scale_shift(norm) is not None:
        return 2
    if norm.spread == "variance" and norm.correction == 0 and norm.centred:
        if norm.pools == SPACE or (norm.pools == MAP and norm.groups == norm.channels):
            return 0
        if norm.pools == MAP and norm.groups == 1:
            return 1
    raise Refusal("a switchable norm cannot compute the same (init='preserve'); use init='copy'")


@builds("switchable")
def build(norm: Norm, *, gate_gap: float = GATE_GAP, init: Literal["copy", "preserve", "reset"] = "copy") -> nn.Module:
    channels_first(norm, "switchable")
    if not isinstance(gate_gap, (int, float)) or not gate_gap >= 0:
        raise NormswapError(f"gate_gap={gate_gap!r}: it must be a number of at least 0")
    classes: dict[int, type[SwitchableNorm]] = {1: SwitchableNorm1d, 2: SwitchableNorm2d, 3: SwitchableNorm3d}
    cls = classes.get(dimensions(norm) or 0, SwitchableNorm)
    module = cls(0, eps_of(norm), norm.momentum if "batch" in norm.pools else 0.1)
    module.num_features = norm.channels
    gates = torch.zeros(2, 3, **like(norm))
    if init == "preserve":
        gates[:, _source(norm)] = gate_gap
    module.mean_gate, module.var_gate = (nn.Parameter(gate.clone()) for gate in gates)
    return adopt_statistics(adopt_affine(module, norm), norm)
