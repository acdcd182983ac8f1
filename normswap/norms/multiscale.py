r"""Multiscale normalization: moments of the map, of its quarters, of their quarters, mixed by learned weights.

At scale :math:`s` each spatial axis of length :math:`L` is cut into :math:`s` parts, position :math:`i` being in part
:math:`\lfloor i s / L \rfloor`, as in a spatial pyramid (He et al., arXiv 1406.4729); a position :math:`p` takes the
mean :math:`m_s(p)` and biased variance :math:`v_s(p)` of its own channel over its cell. These are mixed as in
switchable normalization (Luo et al., arXiv 1806.10779), with softmax weights :math:`\lambda` for means and
:math:`\lambda'` for variances:

.. math::  y_p = \frac{x_p - \sum_s \lambda_s m_s(p)}{\sqrt{\sum_s \lambda'_s v_s(p) + \varepsilon}} \; w + b .

Scale 1 alone is instance normalization. There are no statistics of batches. No paper has this very layer; it joins
these two. Each scale divides the next, so that a cell is made of whole cells of the next scale, and only the finest
are measured on the map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normswap.errors import NormswapError, Refusal
from normswap.norms.adopt import has_space, is_instance, like
from normswap.norms.cells import Cells
from normswap.norms.gradient import Gradient
from normswap.norms.inputs import check_input
from normswap.norms.moments import Coefficients, Moments, affine, normalize
from normswap.norms.momentum import Momentum
from normswap.norms.pyramid import factors, kept_pyramid, mixed, pyramid
from normswap.norms.tracked import TrackedNorm, assemble, fields
from normswap.registry import builds, reads
from normswap.spec import GATE_TOLERANCE, SPACE, Form, Norm

SCALES = (1, 2, 4)
SHUT = 40.0
"""A gate so far above the others leaves them nothing in float64."""


def check_scales(scales: Sequence[int] | str) -> tuple[int, ...]:
    """``(1, 2, 4)`` from that or from ``"1,2,4"``. Raises :class:`NormswapError` for no chain of divisors."""
    given: Any = scales.split(",") if isinstance(scales, str) else scales
    try:
        found = tuple(int(each) for each in given)
    except (TypeError, ValueError):
        found = ()
    chain = all(0 < a < b and b % a == 0 for a, b in pairwise(found))
    if not found or found[0] < 1 or not chain or (not isinstance(scales, str) and list(scales) != list(found)):
        raise NormswapError(f"scales={scales!r}: they are whole numbers that each divide the next, as in 1,2,4")
    return found


@dataclass(frozen=True)
class Mixture:
    """Scale and shift of each of the finest cells of maps of shape ``space``."""

    eps: float
    scales: tuple[int, ...]
    space: Sequence[int]

    def __call__(
        self, moments: Moments, mean_gate: Tensor, var_gate: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Coefficients:
        mean, var, shares = self._given(moments, mean_gate, var_gate)
        others = pyramid(self.space, self.scales, mean)
        rows = (mean.flatten(1), var.flatten(1), shares)
        total, spread = (each.reshape(mean.shape) for each in mixed(*rows, others))
        scale, shift, _ = affine(total, spread, weight, bias, self.eps)
        return self._made(moments, scale, shift)

    def by_hand(
        self, moments: Moments, mean_gate: Tensor, var_gate: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Coefficients, Gradient]:
        mean, var, shares = self._given(moments, mean_gate, var_gate)
        others = kept_pyramid(tuple(self.space), self.scales, mean.dtype, mean.device)
        scale, shift, behind = factors(mean, var, shares, weight, bias, others, self.eps)

        def gradient(by_scale: Tensor, by_shift: Tensor) -> tuple[Tensor | None, ...]:
            by_mean, by_var, by_shares, *rest = behind(self._cells(by_scale), self._cells(by_shift))
            gates = torch.ops.aten._softmax_backward_data(by_shares, shares, 1, shares.dtype)
            return *self._made(moments, by_mean, by_var).values, *gates, *rest

        return self._made(moments, scale, shift), gradient

    @staticmethod
    def _given(moments: Moments, mean_gate: Tensor, var_gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Moments as ``(cells, N, C)`` and the shares of the scales."""
        mean, var = (Mixture._cells(moment) for moment in (moments.mean, moments.var))
        shares = torch.stack((mean_gate, var_gate)).to(mean.dtype).softmax(1)
        return mean, var, shares

    @staticmethod
    def _cells(values: Tensor) -> Tensor:
        return values.flatten(2).permute(2, 0, 1)

    @staticmethod
    def _made(moments: Moments, *factors: Tensor) -> Coefficients:
        scale, shift = (each.permute(1, 2, 0).reshape(moments.mean.shape) for each in factors)
        return Coefficients(scale, shift)


class MultiscaleNorm(TrackedNorm):
    """Multiscale normalization of ``(N, C, *S)``, any rank of at least 3.

    The arguments are those of ``nn.BatchNorm2d``; ``momentum`` and ``track_running_stats`` are taken for its sake and
    do nothing, since there are no running statistics. Parameters ``weight``, ``bias`` of shape ``(num_features,)`` and
    the logits ``mean_gate``, ``var_gate``, one for each of ``scales``. Raises :class:`NormswapError` for scales of
    which one does not divide the next, ``ValueError`` for an input of another rank."""

    initial = TrackedNorm.initial | {"mean_gate": 0.0, "var_gate": 0.0}
    mean_gate: Tensor
    var_gate: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Momentum = None,
        affine: bool = True,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        scales: Sequence[int] | str = SCALES,
    ) -> None:
        self.scales = check_scales(scales)
        super().__init__(num_features, eps, momentum, affine, False, device, dtype, bias=bias)

    def _more_parameters(self, where: dict[str, Any]) -> None:
        self.mean_gate = nn.Parameter(torch.zeros(len(self.scales), **where))
        self.var_gate = nn.Parameter(torch.zeros(len(self.scales), **where))

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.num_features, self.dims, least=3)
        function = Mixture(self.eps, self.scales, x.shape[2:])
        tensors = self.mean_gate, self.var_gate, self.weight, self.bias
        return normalize(x, function, *tensors, parts=Cells(self.scales[-1]))[0]

    def extra_repr(self) -> str:
        return f"{self.num_features}, scales={self.scales}, eps={self.eps}, affine={self.affine}"


class MultiscaleNorm1d(MultiscaleNorm):
    """Multiscale normalization of ``(N, C, L)``."""

    dims = frozenset({3})


class MultiscaleNorm2d(MultiscaleNorm):
    """Multiscale normalization of ``(N, C, H, W)``."""

    dims = frozenset({4})


class MultiscaleNorm3d(MultiscaleNorm):
    """Multiscale normalization of ``(N, C, D, H, W)``."""

    dims = frozenset({5})


CLASSES = (MultiscaleNorm, MultiscaleNorm1d, MultiscaleNorm2d, MultiscaleNorm3d)


@dataclass(frozen=True, eq=False)
class ScalesForm(Form):
    mean_gate: Tensor
    var_gate: Tensor
    scales: tuple[int, ...]

    loses = "weights of the scales"

    def output(self, x: Tensor, norm: Norm, eps: float, training: bool) -> Tensor:
        mean, var = torch.zeros_like(x), torch.zeros_like(x)
        gates = [gate.detach().to(x).softmax(0) for gate in (self.mean_gate, self.var_gate)]
        for of_mean, of_var, scale in zip(*gates, self.scales, strict=True):
            parts = [[torch.arange(n) * scale // n == part for part in range(scale)] for n in x.shape[2:]]
            for chosen in product(*parts):
                if not all(bool(axis.any()) for axis in chosen):
                    continue
                place = torch.ones((), dtype=torch.bool)
                for axis in chosen:
                    place = place.unsqueeze(-1) & axis
                cell = x[:, :, place]
                mean[:, :, place] += of_mean * cell.mean(2, keepdim=True)
                var[:, :, place] += of_var * cell.var(2, correction=0, keepdim=True)
        out = (x - mean) / (var + eps).sqrt()
        each = (1, -1, *[1] * (x.dim() - 2))
        out = out if norm.weight is None else out * norm.weight.detach().to(x).reshape(each)
        return out if norm.bias is None else out + norm.bias.detach().to(x).reshape(each)

    def plain(self, norm: Norm) -> Norm | None:
        """Of scale 1 alone, an instance norm."""
        if self.scales[0] != 1 or self.mean_gate.is_meta:
            return None
        first = min(float(gate.detach().double().softmax(0)[0]) for gate in (self.mean_gate, self.var_gate))
        return replace(norm, form=None) if first >= 1 - GATE_TOLERANCE else None


@reads(*CLASSES)
def read(module: MultiscaleNorm) -> Norm:
    form = ScalesForm(module.mean_gate, module.var_gate, module.scales)
    return Norm("multiscale", pools=SPACE, form=form, **fields(module))


@builds("multiscale")
def build(
    norm: Norm,
    *,
    scales: Sequence[int] | str | None = None,
    init: Literal["copy", "preserve", "reset"] = "copy",
) -> MultiscaleNorm:
    """``scales``: 1, 2 and 4, or those that the norm has. ``init="preserve"``, for an instance norm: scale 1 alone; the
    gradient of the gates is then nothing."""
    form = norm.form if isinstance(norm.form, ScalesForm) else None
    chosen = check_scales((SCALES if form is None else form.scales) if scales is None else scales)
    has_space(norm, "a cell")
    if init == "preserve" and (chosen[0] != 1 or not is_instance(norm)):
        raise Refusal("a multiscale norm cannot compute the same (init='preserve'); use init='copy'")
    module = assemble(norm, "multiscale", CLASSES, tracked=False, scales=chosen)
    kept = form is not None and form.scales == chosen and init != "preserve"
    for name in ("mean_gate", "var_gate"):
        gate = getattr(form, name) if kept else torch.zeros(len(chosen), **like(norm))
        if init == "preserve":
            gate[0] = SHUT
        setattr(module, name, gate if isinstance(gate, nn.Parameter) else nn.Parameter(gate))
    return module
