r"""Filter response normalization (Singh and Krishnan, arXiv 1911.09737), which needs no batch and no mean.

Each sample and channel is divided by the root of its mean square over space; a thresholded linear unit may follow,
with a learned threshold :math:`\tau` for each channel,

.. math::  z = \frac{x}{\sqrt{\overline{x^2} + \varepsilon}} \; w + b, \quad y = \max(z, \tau) .

Where :math:`z = \tau` the gradient is that of :math:`\tau`. The unit takes the place of a
ReLU, which it is at first. A conversion replaces norms and leaves the ReLU that stands behind one; with
``threshold=True`` both act, and outputs stay at least 0 until the ReLU is taken out."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normswap.norms.adopt import adopt_affine, channels_first, dimensions, has_space, like
from normswap.norms.inputs import check_input
from normswap.norms.moments import Coefficients, Moments, normalize
from normswap.norms.tracked import check_flag
from normswap.registry import builds, reads
from normswap.spec import SPACE, Norm

EPS = 1e-6


def responses(moments: Moments, weight: Tensor | None, bias: Tensor | None, *, eps: float) -> Coefficients:
    """Scale and shift to ``z``; a sum of squares loses nothing."""
    scale = torch.rsqrt(moments.var + moments.mean.square() + eps)
    if weight is not None:
        scale = scale * weight.to(scale.dtype)
    shift = torch.zeros_like(scale)
    if bias is not None:
        shift = shift + bias.to(scale.dtype)
    return Coefficients(scale, shift)


class FilterResponseNorm(nn.Module):
    """Filter response normalization of ``(N, C, *S)``, any rank of at least 3.

    The arguments are those of ``nn.BatchNorm2d``; ``momentum`` and ``track_running_stats`` are taken for its sake and
    do nothing, since there are no running statistics. Parameters ``weight``, ``bias`` and, with ``threshold``, the
    ``threshold`` of the linear unit, each of shape ``(num_features,)``. Raises ``ValueError`` for an input of another
    rank."""

    dims: ClassVar[frozenset[int] | None] = None
    weight: Tensor | None
    bias: Tensor | None
    threshold: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = EPS,
        momentum: float | None = None,
        affine: bool = True,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        threshold: bool = True,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        for name, wanted, value in (
            ("weight", affine, 1.0),
            ("bias", affine and bias, 0.0),
            ("threshold", threshold, 0.0),
        ):
            parameter = nn.Parameter(torch.full((num_features,), value, **where)) if wanted else None
            self.register_parameter(name, parameter)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make parameters, in place, those of a new layer."""
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0), (self.threshold, 0.0)):
            if parameter is not None:
                parameter.fill_(value)

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.num_features, self.dims, least=3)
        function = partial(responses, eps=self.eps)
        return normalize(x, function, self.weight, self.bias, floor=self.threshold)[0]

    def extra_repr(self) -> str:
        absent = [name for name in ("weight", "bias", "threshold") if getattr(self, name) is None]
        return ", ".join([str(self.num_features), f"eps={self.eps}", *(f"no {name}" for name in absent)])


class FilterResponseNorm1d(FilterResponseNorm):
    """Filter response normalization of ``(N, C, L)``."""

    dims = frozenset({3})


class FilterResponseNorm2d(FilterResponseNorm):
    """Filter response normalization of ``(N, C, H, W)``."""

    dims = frozenset({4})


class FilterResponseNorm3d(FilterResponseNorm):
    """Filter response normalization of ``(N, C, D, H, W)``."""

    dims = frozenset({5})


CLASSES = (FilterResponseNorm, FilterResponseNorm1d, FilterResponseNorm2d, FilterResponseNorm3d)


@reads(*CLASSES)
def read(module: FilterResponseNorm) -> Norm:
    return Norm(
        kind="frn",
        channels=module.num_features,
        pools=SPACE,
        ranks=module.dims,
        centred=False,
        spread="square",
        eps=module.eps,
        momentum=None,
        weight=module.weight,
        bias=module.bias,
        threshold=module.threshold,
    )


@builds("frn")
def build(norm: Norm, *, threshold: bool = False) -> FilterResponseNorm:
    check_flag("threshold", threshold)
    channels_first(norm, "frn")
    has_space(norm, "a response")
    cls = CLASSES[dimensions(norm) or 0]
    module = cls(norm.channels, EPS if norm.eps is None else norm.eps, affine=False, threshold=False)
    if threshold:
        module.threshold = nn.Parameter(torch.zeros(norm.channels, **like(norm)))
    return adopt_affine(module, norm)
