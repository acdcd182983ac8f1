r"""Adaptive instance normalization (Huang and Belongie, arXiv 1703.06868): the output takes the moments of a style.

For a style with mean :math:`\mu` and deviation :math:`\sigma` of each channel,

.. math::  y = \sigma \, \frac{x - m}{\sqrt{v + \varepsilon}} + \mu ,

with the instance's own :math:`m, v`. A style that is given as a map has :math:`\sigma = \sqrt{v_s + \varepsilon}` by
its biased variance; otherwise mean and deviation are given, as a network makes them in later work. There are no
parameters: a conversion loses the norm's affine, and says so. The style is given by
:func:`normswap.norms.condition.condition`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from normswap.errors import NormswapError
from normswap.norms.adopt import channels_first, dimensions, has_space
from normswap.norms.batch import eps_of
from normswap.norms.condition import Need, NeedsCondition, per_sample
from normswap.norms.inputs import check_input
from normswap.norms.moments import Coefficients, Moments, affine, measured, normalize
from normswap.registry import builds, reads
from normswap.spec import SPACE, Form, Norm


def styled(moments: Moments, mean: Tensor, deviation: Tensor, *, eps: float) -> Coefficients:
    """Scale and shift by the formula above; the style's moments ``(1 or N, C)``."""
    return affine(moments.mean, moments.var, deviation, mean, eps)


class AdaptiveInstanceNorm(NeedsCondition):
    """Adaptive instance normalization of ``(N, C, *S)``, any rank of at least 3.

    The arguments are those of ``nn.BatchNorm2d``; all but ``num_features`` and ``eps`` are taken for its sake and do
    nothing, since the style is the affine and there are no statistics. Raises :class:`NormswapError` without a style,
    ``ValueError`` for an input of another rank."""

    needs: ClassVar[Need] = "style"
    dims: ClassVar[frozenset[int] | None] = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = None,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps

    def accept(self, value: Any) -> tuple[Tensor, Tensor]:
        """Mean and deviation, each ``(1 or N, C)``."""
        if isinstance(value, Tensor):
            if value.dim() < 3 or value.shape[1] != self.num_features or value.numel() == 0:
                raise NormswapError(
                    f"a style of shape {tuple(value.shape)}: a map is (1 or N, {self.num_features}, *S), and moments "
                    f"are a pair of (N, {self.num_features})"
                )
            _, _, moments = measured(value)
            return moments.mean, torch.sqrt(moments.var + self.eps)
        if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(isinstance(v, Tensor) for v in value):
            raise NormswapError(f"a style is a map, or a pair of mean and deviation, not {type(value).__name__}")
        mean, deviation = (v.reshape(1, -1) if v.dim() == 1 else v for v in value)
        for name, each in (("mean", mean), ("deviation", deviation)):
            if each.dim() != 2 or each.shape[1] != self.num_features:
                raise NormswapError(f"a style's {name} of shape {tuple(each.shape)}: it is (N, {self.num_features})")
        return mean, deviation

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.num_features, self.dims, least=3)
        mean, deviation = (per_sample(each, x.shape[0], "style") for each in self.condition())
        return normalize(x, partial(styled, eps=self.eps), mean, deviation)[0]

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


class AdaptiveInstanceNorm1d(AdaptiveInstanceNorm):
    """Adaptive instance normalization of ``(N, C, L)``."""

    dims = frozenset({3})


class AdaptiveInstanceNorm2d(AdaptiveInstanceNorm):
    """Adaptive instance normalization of ``(N, C, H, W)``."""

    dims = frozenset({4})


class AdaptiveInstanceNorm3d(AdaptiveInstanceNorm):
    """Adaptive instance normalization of ``(N, C, D, H, W)``."""

    dims = frozenset({5})


CLASSES = (AdaptiveInstanceNorm, AdaptiveInstanceNorm1d, AdaptiveInstanceNorm2d, AdaptiveInstanceNorm3d)


@dataclass(frozen=True, eq=False)
class AdaptiveForm(Form):
    module: AdaptiveInstanceNorm = field(compare=False)

    affine = False
    note = "it needs a style for each call: run the model inside normswap.layers.condition"

    def output(self, x: Tensor, norm: Norm, eps: float, training: bool) -> Tensor:
        space = tuple(range(2, x.dim()))
        mean, deviation = (
            v.detach().to(x).reshape(-1, norm.channels, *[1] * len(space)) for v in self.module.condition()
        )
        own, var = x.mean(space, keepdim=True), x.var(space, correction=0, keepdim=True)
        out: Tensor = (x - own) / (var + eps).sqrt() * deviation + mean
        return out


@reads(*CLASSES)
def read(module: AdaptiveInstanceNorm) -> Norm:
    return Norm(
        "adaptive_instance", module.num_features, SPACE, ranks=module.dims, eps=module.eps, momentum=None,
        form=AdaptiveForm(module),
    )  # fmt: skip


@builds("adaptive_instance")
def build(norm: Norm) -> AdaptiveInstanceNorm:
    channels_first(norm, "adaptive_instance")
    has_space(norm, "an instance")
    return CLASSES[dimensions(norm) or 0](norm.channels, eps_of(norm))
