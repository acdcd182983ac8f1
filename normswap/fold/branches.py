r"""Branches: a weighted sum of convolutions of one value, and of the value itself, is one convolution.

On each spatial axis a convolution with kernel size K, stride S, dilation D, zero padding p in front and q behind gives
at position i

.. math:: y_i = b + \sum_{k<K} W_k\, x_{i S + D k - p}, \qquad x = 0 \text{ outside},

so it is a set of weights at the *offsets* :math:`D k - p`, and of n positions it makes :math:`\lfloor (n + c) / S
\rfloor + 1`, where :math:`c = p + q - D (K - 1) - 1`. The value itself is the weight 1 at offset 0, S = 1, c = -1.
Hence

.. math:: \sum_j s_j\, (W_j x + b_j) + t = \Big( \sum_j s_j W_j \Big)\, x + \sum_j s_j b_j + t

for scales :math:`s_j` and a shift t per output channel, wherever S and c agree on every axis (then the sizes agree for
every input) and all offsets lie on one grid of step D. The sum has the paddings :math:`\max p_j` and :math:`\max q_j`;
where these differ, weights of zero make them equal. A kernel in g groups is one in any number of groups that divides g,
with zeros between; the greatest common divisor is taken.

A norm or a bias *in front of* a padded convolution is no such sum, for the padding does not pass through it; nor are
other paddings than by zeros. A sum that costs much more than its parts (a pointwise dense and a large depthwise kernel)
is refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from normswap.fold import layers

DEARER = 2.0
"""How many times the multiplications of its branches a merged convolution may take."""


@dataclass(frozen=True)
class Taps:
    """Where a convolution reads its input, and between which channels it has weights."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    before: tuple[int, ...]
    """Zero padding in front, on each axis."""
    behind: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    inputs: int
    outputs: int

    @property
    def spatial(self) -> int:
        return len(self.kernel)

    @property
    def reach(self) -> tuple[int, ...]:
        """The constant c of the number of positions, on each axis."""
        axes = zip(self.kernel, self.before, self.behind, self.dilation, strict=True)
        return tuple(p + q - d * (k - 1) - 1 for k, p, q, d in axes)

    @property
    def cost(self) -> int:
        """Multiplications for each value of the output."""
        return prod(self.kernel) * self.inputs // self.groups


def taps_of(module: nn.Module) -> Taps | str:
    """The taps of a convolution, or the reason why it cannot take part in a sum."""
    layer = layers.describe(module)
    if isinstance(layer, str):
        return layer
    if not isinstance(module, _ConvNd) or isinstance(module, _ConvTransposeNd):
        return f"{type(module).__name__} is no convolution that could be part of a sum"
    if layers.pads_itself(module):
        return f"{type(module).__name__} pads its input by itself"
    before, behind = _padding(module)
    if module.padding_mode != "zeros" and any((*before, *behind)):
        return f"its padding is {module.padding_mode}, not zeros"
    return Taps(
        tuple(module.kernel_size), tuple(module.stride), before, behind, tuple(module.dilation),
        module.groups, module.in_channels, module.out_channels,
    )  # fmt: skip


def _padding(module: _ConvNd) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if not isinstance(module.padding, str):
        return tuple(module.padding), tuple(module.padding)
    if module.padding == "valid":
        return (0,) * len(module.kernel_size), (0,) * len(module.kernel_size)
    total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    return tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)


def itself(like: Taps) -> Taps:
    """The taps of the value itself, as a convolution beside ``like``."""
    ones, zeros = (1,) * like.spatial, (0,) * like.spatial
    return Taps(ones, ones, zeros, zeros, ones, like.inputs, like.inputs, like.inputs)


def joined(parts: Sequence[Taps]) -> Taps | str:
    """The taps of the sum of convolutions of one value, or the reason why it is none or would cost too much."""
    first = parts[0]
    for name in ("spatial", "inputs", "outputs", "stride"):
        if len(values := {getattr(part, name) for part in parts}) > 1:
            words = {"spatial": "spatial axes", "inputs": "input channels", "outputs": "output channels"}
            return f"its branches have different {words.get(name, 'strides')} ({', '.join(map(str, sorted(values)))})"
    if len({part.reach for part in parts}) > 1:
        return "its branches may have outputs of different sizes"
    dilation = []
    for axis in range(first.spatial):
        steps = {part.dilation[axis] for part in parts if part.kernel[axis] > 1}
        if len(steps) > 1:
            return f"its branches have different dilations ({', '.join(map(str, sorted(steps)))})"
        dilation.append(steps.pop() if steps else 1)
    before = tuple(max(part.before[axis] for part in parts) for axis in range(first.spatial))
    for part in parts:
        if any((wide - own) % step for wide, own, step in zip(before, part.before, dilation, strict=True)):
            return "the offsets of its branches lie on different grids"
    behind = tuple(max(part.behind[axis] for part in parts) for axis in range(first.spatial))
    groups = gcd(*(part.groups for part in parts))
    kernel = tuple((p + q - c - 1) // d + 1 for p, q, c, d in zip(before, behind, first.reach, dilation, strict=True))
    taps = Taps(kernel, first.stride, before, behind, tuple(dilation), groups, first.inputs, first.outputs)
    if taps not in parts:
        even = _even(taps)
        if isinstance(even, str):
            return even
        taps = even
    together = sum(part.cost for part in parts)
    if taps.cost > DEARER * together:
        return f"one convolution would take {taps.cost} multiplications a value, its branches take {together}"
    return taps


def _even(taps: Taps) -> Taps | str:
    """With the same padding in front and behind, as a module has it, by weights of zero."""
    wide = tuple(max(pair) for pair in zip(taps.before, taps.behind, strict=True))
    missing = [2 * w - p - q for w, p, q in zip(wide, taps.before, taps.behind, strict=True)]
    if any(m % d for m, d in zip(missing, taps.dilation, strict=True)):
        return "its padding in front and behind cannot be made equal"
    kernel = tuple(k + m // d for k, m, d in zip(taps.kernel, missing, taps.dilation, strict=True))
    return replace(taps, kernel=kernel, before=wide, behind=wide)


def merged_kernel(taps: Taps, parts: Iterable[tuple[Taps, Tensor | None, Tensor]], device: torch.device) -> Tensor:
    """The kernel of a sum in float64: of every part its own taps, its kernel (``None``: the value itself) and scale."""
    result = torch.zeros(taps.outputs, taps.inputs // taps.groups, *taps.kernel, dtype=torch.float64, device=device)
    rows = torch.arange(taps.outputs, device=device)
    for own, weight, scale in parts:
        at = [(p - q) // d for p, q, d in zip(taps.before, own.before, taps.dilation, strict=True)]
        where = tuple(slice(start, start + size) for start, size in zip(at, own.kernel, strict=True))
        if weight is None:
            weight = torch.ones(own.outputs, 1, *own.kernel, dtype=torch.float64, device=device)
        columns = own.inputs // own.groups
        group = rows // (own.outputs // own.groups) % (own.groups // taps.groups)
        inputs = group[:, None] * columns + torch.arange(columns, device=device)  # (outputs, own inputs of a group)
        factor = scale.to(device).reshape(-1, *[1] * (weight.dim() - 1))
        index: Any = (rows[:, None], inputs, *where)
        result[index] += weight.detach().double() * factor
    return result


@dataclass(frozen=True, eq=False)
class Branch:
    """A convolution of the source, or the source itself (``None``), times a scale: a number or one for each output."""

    layer: nn.Module | None
    scale: Tensor


@dataclass(frozen=True, eq=False)
class Sum:
    """Branches of one source, and a shift: a number or one for each output. Biases of the branches come on top."""

    branches: tuple[Branch, ...]
    shift: Tensor

    @staticmethod
    def of(layer: nn.Module | None) -> Sum:
        return Sum((Branch(layer, torch.ones((), dtype=torch.float64)),), torch.zeros((), dtype=torch.float64))

    def scaled(self, scale: Tensor) -> Sum:
        return Sum(tuple(Branch(b.layer, b.scale * scale) for b in self.branches), self.shift * scale)

    def shifted(self, shift: Tensor) -> Sum:
        return Sum(self.branches, self.shift + shift)

    def plus(self, other: Sum) -> Sum:
        return Sum((*self.branches, *other.branches), self.shift + other.shift)

    @property
    def layers(self) -> list[nn.Module]:
        """Its convolutions, each once."""
        return list({id(b.layer): b.layer for b in self.branches if b.layer is not None}.values())

    @property
    def channels(self) -> set[int]:
        """Numbers of channels that scales and shift have."""
        tensors = (*(branch.scale for branch in self.branches), self.shift)
        return {tensor.shape[0] for tensor in tensors if tensor.dim()}
