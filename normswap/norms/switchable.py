r"""Switchable normalization (Luo et al., arXiv 1806.10779): a learned mixture of instance, layer and batch moments.

With softmax weights :math:`\lambda` for means and :math:`\lambda'` for variances, over the sources
:math:`k \in \{\text{instance}, \text{layer}, \text{batch}\}`,

.. math::  y = \frac{x - \sum_k \lambda_k m_k}{\sqrt{\sum_k \lambda'_k v_k + \varepsilon}} \; w + b .

All variances are biased; layer and batch moments follow from those of the instances. In eval mode the batch moments
are moving averages (:func:`normswap.norms.tracked.batch_average` makes them the mean over batches). Without its batch
part, for batches of one, the mixture is of instance and layer. Synchronised, the batch is that of all processes.

**Preserve.** To compute what a BatchNorm computed, its source's gate is set ``gate_gap`` above the others, which leaves
:math:`2 e^{-g}` of weight outside. A gate that is fully shut has no gradient: the gradient of the other gates shrinks
with the same :math:`e^{-g}`. The default 16 leaves 2.3e-7, the rounding of float32, and a gradient of about 1e-7 times
the open one, which Adam-like optimizers (scale-free) still follow and plain SGD hardly does; 8 moves the function by
some 7e-4 and trains with SGD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normswap.errors import NormswapError, Refusal
from normswap.norms.adopt import like
from normswap.norms.gradient import Gradient, affine_with_gradient
from normswap.norms.moments import Coefficients, Moments, affine, normalize
from normswap.norms.momentum import Momentum
from normswap.norms.tracked import TrackedNorm, assemble, check_flag, fields, pooled, together
from normswap.registry import builds, reads
from normswap.spec import MAP, SPACE, Norm, scale_shift

GATE_GAP = 16.0


@dataclass(frozen=True)
class Mixture:
    """Scale and shift of a mixture of instance (unless an instance is one value), layer and, with three gates, batch
    moments; the running ones where they are given."""

    eps: float
    instance: bool

    def __call__(
        self, moments: Moments, mean_gate: Tensor, var_gate: Tensor, weight: Tensor | None, bias: Tensor | None,
        *running: Tensor | None,
    ) -> Coefficients:  # fmt: skip
        sources, seen = self._sources(moments, len(mean_gate), *running)
        mean, var = _mixed(sources, self._shares(mean_gate, var_gate, moments.mean.dtype))
        return affine(mean, var, weight, bias, self.eps, seen)

    def _sources(
        self, moments: Moments, gates: int, running_mean: Tensor | None, running_var: Tensor | None
    ) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, ...]]:
        """The means and variances that are mixed; what is seen of the batch."""
        sources = [(moments.mean, moments.var)] if self.instance else []
        sources.append(moments.over_channels())
        if gates == 3 and running_mean is not None and running_var is not None:
            sources.append((running_mean.to(moments.mean.dtype), running_var.to(moments.mean.dtype)))
        elif gates == 3:
            batch = moments.over_batch()
            return [*sources, (batch[0], batch[1])], batch
        return sources, ()

    def _shares(self, mean_gate: Tensor, var_gate: Tensor, dtype: torch.dtype) -> Tensor:
        """``(2, K)``, of means and of variances."""
        gates = torch.stack((mean_gate, var_gate)).to(dtype)
        return (gates if self.instance else gates[:, 1:]).softmax(1)

    def by_hand(
        self, moments: Moments, mean_gate: Tensor, var_gate: Tensor, weight: Tensor | None, bias: Tensor | None,
        *running: Tensor | None,
    ) -> tuple[Coefficients, Gradient]:  # fmt: skip
        r"""For gradients :math:`\dot M, \dot V` by the mixed moments: their sums over the :math:`P` instances that a
        source :math:`k` pools are the gradients by :math:`\lambda_k m_k, \lambda'_k v_k`, and with :math:`p, q` for
        :math:`\lambda_k, \lambda'_k` times these over :math:`P`, :math:`p + 2 q (m - m_k)` is passed on to :math:`m`
        and :math:`q` to :math:`v`."""
        sources, seen = self._sources(moments, len(mean_gate), *running)
        shares = self._shares(mean_gate, var_gate, moments.mean.dtype)
        mean, var = _mixed(sources, shares)
        scale, shift, behind = affine_with_gradient(mean, var, weight, bias, self.eps)

        def gradient(by_scale: Tensor, by_shift: Tensor) -> tuple[Tensor | None, ...]:
            by_mean, by_var, by_weight, by_bias = behind(by_scale, by_shift)
            given = torch.stack((by_mean, by_var))
            found = torch.zeros_like(given)  # By mean and by variance of each instance.
            by_shares = []
            axes = [None, 2, 1] if self.instance else [2, 1]  # Over which instances are pooled.
            for own, share, axis in zip(sources, shares.unbind(1), axes, strict=False):
                pooled = given if axis is None else given.sum(axis, keepdim=True)
                by_shares.append((torch.stack(own).view_as(pooled) * pooled).sum((1, 2)))
                if axis == 1 and not seen:  # Running moments are constants.
                    continue
                passed = pooled * (share / (1 if axis is None else given.shape[axis])).view(2, 1, 1)
                found += passed
                if axis is not None:
                    found[0].addcmul_(moments.mean - own[0], passed[1], value=2)
            gates = torch.ops.aten._softmax_backward_data(torch.stack(by_shares, 1), shares, 1, shares.dtype)
            by_gates = (gates if self.instance else nn.functional.pad(gates, (1, 0))).unbind()
            return *found.unbind(), *by_gates, by_weight, by_bias, None, None

        return Coefficients(scale, shift, seen), gradient


def _mixed(sources: list[tuple[Tensor, Tensor]], shares: Tensor) -> tuple[Tensor, Tensor]:
    of_mean, of_var = (row.unbind() for row in shares.unbind())
    mean, var = sources[0][0] * of_mean[0], sources[0][1] * of_var[0]
    for (other_mean, other_var), one, other in zip(sources[1:], of_mean[1:], of_var[1:], strict=True):
        mean, var = torch.addcmul(mean, other_mean, one), torch.addcmul(var, other_var, other)
    return mean, var


class SwitchableNorm(TrackedNorm):
    """Switchable normalization of ``(N, C, *S)``, any rank of at least 2.

    Arguments as of ``nn.BatchNorm2d``. Parameters ``weight``, ``bias`` of shape ``(num_features,)`` and the logits
    ``mean_gate``, ``var_gate`` of shape ``(3,)`` in the order instance, layer, batch; buffers as in
    ``nn.BatchNorm2d``. With ``batch=False`` there is no batch part: the logits are two, and nothing is tracked. On
    ``(N, C)`` an instance is a single value, so the mixture is of the others alone. With ``synchronised=True`` the
    batch moments are those of all processes of ``process_group``."""

    initial = TrackedNorm.initial | {"mean_gate": 0.0, "var_gate": 0.0}
    mean_gate: Tensor
    var_gate: Tensor

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
        batch: bool = True,
        synchronised: bool = False,
        process_group: Any = None,
    ) -> None:
        self._sources = 3 if batch else 2
        super().__init__(num_features, eps, momentum, affine, track_running_stats and batch, device, dtype, bias=bias)
        if synchronised and not batch:
            raise NormswapError("synchronised=True with batch=False: without its batch part nothing is pooled")
        self.synchronise(synchronised, process_group)

    def _more_parameters(self, where: dict[str, Any]) -> None:
        self.mean_gate = nn.Parameter(torch.zeros(self._sources, **where))
        self.var_gate = nn.Parameter(torch.zeros(self._sources, **where))

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        function = Mixture(self.eps, instance=x.dim() > 2)
        tensors = (self.mean_gate, self.var_gate, self.weight, self.bias, *self.running)
        out, seen = normalize(x, function, *tensors, across=self.across())
        if seen:
            self.track(*seen)
        return out

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if len(self.mean_gate) == 3 else ", batch=False")


class SwitchableNorm1d(SwitchableNorm):
    """Switchable normalization of ``(N, C)`` or ``(N, C, L)``."""

    dims = frozenset({2, 3})


class SwitchableNorm2d(SwitchableNorm):
    """Switchable normalization of ``(N, C, H, W)``."""

    dims = frozenset({4})


class SwitchableNorm3d(SwitchableNorm):
    """Switchable normalization of ``(N, C, D, H, W)``."""

    dims = frozenset({5})


CLASSES = (SwitchableNorm, SwitchableNorm1d, SwitchableNorm2d, SwitchableNorm3d)


@reads(*CLASSES)
def read(module: SwitchableNorm) -> Norm:
    pools = frozenset({"channel", "space"} | ({"batch"} if len(module.mean_gate) == 3 else set()))
    return Norm("switchable", pools=pooled(module, pools), gates=(module.mean_gate, module.var_gate), **fields(module))


def _source(norm: Norm, batch: bool) -> int:
    """Which of instance (0), layer (1), batch (2) computes what ``norm`` does."""
    if batch and scale_shift(norm) is not None:
        return 2
    if norm.spread == "variance" and norm.correction == 0 and norm.centred and not norm.has_statistics:
        if norm.pools == SPACE or (norm.pools == MAP and norm.groups == norm.channels):
            return 0
        if norm.pools == MAP and norm.groups == 1:
            return 1
    raise Refusal("a switchable norm cannot compute the same (init='preserve'); use init='copy'")


@builds("switchable")
def build(
    norm: Norm,
    *,
    gate_gap: float = GATE_GAP,
    batch: bool = True,
    synchronised: bool | None = None,
    process_group: Any = None,
    init: Literal["copy", "preserve", "reset"] = "copy",
) -> nn.Module:
    if not isinstance(gate_gap, (int, float)) or not gate_gap >= 0:
        raise NormswapError(f"gate_gap={gate_gap!r}: it must be a number of at least 0")
    check_flag("batch", batch)
    shared = together(norm, synchronised, process_group) if batch or synchronised else {}
    module = assemble(norm, "switchable", CLASSES, tracked=batch, batch=batch, **shared)
    gates = torch.zeros(2, 3 if batch else 2, **like(norm))
    if init == "preserve":
        gates[:, _source(norm, batch)] = gate_gap
    module.mean_gate, module.var_gate = (nn.Parameter(gate.clone()) for gate in gates)
    return module
