r"""Weight standardization (Qiao et al., arXiv 1903.10520): convolutions whose kernels have mean 0 and variance 1.

For each output channel c, over its I elements (input channels of its group, and space),

.. math::  \hat w_c = g_c \frac{w_c - \mu_c}{\sqrt{\sigma_c^2 + \varepsilon}}, \quad
           \mu_c = \frac1I \sum w_c, \quad \sigma_c^2 = \frac1I \sum (w_c - \mu_c)^2 .

The paper has no gain g, for a norm behind the layer scales its channels; without such a norm a gain is learned (Brock
et al., arXiv 2101.08692). Parameters keep the names of the plain convolution, so its checkpoint loads. With
:math:`g_c = \sqrt{\sigma_c^2 + \varepsilon}` only the mean of each kernel is lost. Half precision computes in float32.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

EPS = 1e-5


def standardized(weight: Tensor, eps: float, gain: Tensor | None = None) -> Tensor:
    """The formula for a kernel of shape ``(out, in / groups, *size)`` and a gain of shape ``(out,)``."""
    rows = weight.flatten(1)
    if weight.dtype in (torch.float16, torch.bfloat16):
        rows = rows.float()
    centred = rows - rows.mean(1, keepdim=True)
    scale = (centred.square().mean(1, keepdim=True) + eps).rsqrt()
    if gain is not None:
        scale = scale * gain.reshape(-1, 1).to(scale.dtype)
    return (centred * scale).to(weight.dtype).reshape(weight.shape)


def preserving_gain(weight: Tensor, eps: float) -> tuple[Tensor, float]:
    """The gain, ``(out,)`` in float64, that keeps each kernel but for its mean, and the largest part that the mean is
    of a kernel's norm."""
    rows = weight.detach().double().flatten(1)
    variance, mean = torch.var_mean(rows, 1, correction=0)
    part = mean.abs() / (variance + mean.square()).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    return (variance + eps).sqrt(), 0.0 if weight.is_meta or not part.numel() else float(part.max())


class Standardized:
    """Mix-in before a convolution class: it convolves with its weight standardized."""

    scale: ClassVar[float] = 1.0
    """What timm's classes multiply the gain by."""
    weight: Tensor
    bias: Tensor | None
    eps: float
    gain: Tensor | None

    def __init__(self, *args: Any, eps: float = EPS, gain: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.equip(eps, torch.ones(len(self.weight), dtype=torch.float64) if gain else None)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weight and bias anew, in place, as the plain convolution does; the gain becomes 1."""
        super().reset_parameters()  # type: ignore[misc]
        if (gain := getattr(self, "gain", None)) is not None:  # The plain constructor calls this before there is one.
            gain.fill_(1.0)

    def equip(self, eps: float, gain: Tensor | None) -> None:
        """Set eps, and the gain as a parameter on the weight's device, of its dtype, trained as it is; in place."""
        self.eps = eps
        parameter = None
        if gain is not None:
            values = gain.to(device=self.weight.device, dtype=self.weight.dtype)
            parameter = nn.Parameter(values, requires_grad=self.weight.requires_grad)
        self.register_parameter("gain", parameter)  # type: ignore[attr-defined]

    def forward(self, input: Tensor) -> Tensor:
        weight = standardized(self.weight, self.eps, self.gain)
        return self._conv_forward(input, weight, self.bias)  # type: ignore[attr-defined, no-any-return]

    def extra_repr(self) -> str:
        told = super().extra_repr()  # type: ignore[misc]
        return f"{told}, eps={self.eps:g}" + ("" if self.gain is None else ", gain=True")


class StandardizedConv1d(Standardized, nn.Conv1d):
    """``nn.Conv1d`` with its weight standardized; ``eps`` and ``gain=True`` besides its arguments."""


class StandardizedConv2d(Standardized, nn.Conv2d):
    """``nn.Conv2d`` with its weight standardized; ``eps`` and ``gain=True`` besides its arguments."""


class StandardizedConv3d(Standardized, nn.Conv3d):
    """``nn.Conv3d`` with its weight standardized; ``eps`` and ``gain=True`` besides its arguments."""


FORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: StandardizedConv1d,
    nn.Conv2d: StandardizedConv2d,
    nn.Conv3d: StandardizedConv3d,
}
"""Plain classes and theirs that standardize."""
