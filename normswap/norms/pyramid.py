r"""Moments of a pyramid of cells from those of the finest, mixed over its scales; and its gradient by hand.

With means :math:`m` and biased variances :math:`v` of the finest cells, shares :math:`\lambda, \lambda'` of the scales,
and for each scale but the finest the matrices :math:`A_s`, which takes means over the cells of that scale (by how many
positions each of the finest has), and :math:`I_s`, which gives each of the finest the cell that it is in,

.. math::  c_s = A_s m,\quad d_s = m - I_s c_s,\quad u_s = A_s (v + d_s^2),\quad
           M = \lambda_K m + \sum_s \lambda_s I_s c_s,\quad V = \lambda'_K v + \sum_s \lambda'_s I_s u_s,

from which scale and shift are made. For gradients :math:`\dot M, \dot V` (:mod:`normswap.norms.gradient` has them),

.. math::  \dot v = \lambda'_K \dot V + \sum_s e_s,\quad
           \dot m = \lambda_K \dot M + \sum_s (\lambda_s A_s^T I_s^T \dot M + 2 d_s e_s),\quad
           e_s = \lambda'_s A_s^T I_s^T \dot V .

(Through :math:`c_s` in :math:`d_s` nothing comes back: :math:`A_s d_s = 0`.)

The tensors are small, but there are many operations on them. So the cells come first in memory, channels last, where
factors of channels stand side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from normswap.norms.arithmetic import fine
from normswap.norms.gradient import affine_with_gradient


def part_of(length: int, parts: int, device: torch.device) -> Tensor:
    """Which part each position of an axis is in, ``(length,)``."""
    return torch.arange(length, device=device) * parts // length


def members(length: int, parts: int, like: Tensor) -> Tensor:
    """The same as ``(length, parts)`` of zeros and ones."""
    part = part_of(length, parts, like.device)
    return (part.unsqueeze(1) == torch.arange(parts, device=like.device)).to(like.dtype)


def along(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """``x`` of shape ``(N, C, *S)`` times a matrix on each spatial axis."""
    for axis, matrix in enumerate(matrices, 2):
        x = (x.movedim(axis, -1) @ matrix).movedim(-1, axis)
    return x


def positions(space: Sequence[int], parts: int, like: Tensor) -> Tensor:
    """How many positions each cell has, ``(1, 1, *cells)`` in the dtype of ``like``."""
    whole = like.new_ones((1, 1, *space))
    return along(whole, [members(length, parts, like) for length in space])


class Scale(NamedTuple):
    """A scale of the pyramid but the finest, of ``s`` cells on each axis where that has ``S``; ``D`` axes."""

    average: Tensor
    """Means over its cells, from those of the finest: ``(s^D, S^D)``."""
    spread: Tensor
    """For each of the finest cells the cell that it is in: ``(S^D, s^D)`` of zeros and ones."""


def pyramid(space: Sequence[int], scales: Sequence[int], like: Tensor) -> list[Scale]:
    """All scales but the finest of a map of shape ``space``, in the dtype of ``like``. An empty cell weighs nothing."""
    count = positions(space, scales[-1], like).reshape(1, -1)
    found = []
    for scale in scales[:-1]:
        inside, own = like.new_ones((1, 1)), members(scales[-1], scale, like)
        for _ in space:
            inside = torch.kron(inside, own)
        weights = inside.t() * count
        found.append(Scale(weights / weights.sum(1, keepdim=True).clamp(min=1), inside))
    return found


@lru_cache(maxsize=32)
def kept_pyramid(
    space: tuple[int, ...], scales: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Scale, ...]:
    """:func:`pyramid` of a known shape, made once; for what is not traced."""
    with torch.inference_mode(False):
        return tuple(pyramid(space, scales, torch.empty(0, dtype=dtype, device=device)))


def mixed(mean: Tensor, var: Tensor, shares: Tensor, others: Sequence[Scale]) -> tuple[Tensor, Tensor]:
    """Mean and variance for each of the finest cells, mixed over all scales, with ``shares``, ``(2, K)``.

    ``mean``, ``var``: of the finest cells, ``(cells, N C)``."""
    total, spread = mean * shares[0, -1], var * shares[1, -1]
    for index, (average, back) in enumerate(others):
        centre = average @ mean
        around = average @ (var + (mean - back @ centre).square())
        total = total + back @ (centre * shares[0, index])
        spread = spread + back @ (around * shares[1, index])
    return total, spread


ByEach = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
"""Gradients by mean, variance, shares, weight and bias."""


def factors(
    mean: Tensor,
    var: Tensor,
    shares: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    others: Sequence[Scale],
    eps: float,
) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor], ByEach]]:
    """Scale and shift, each ``(cells, N, C)``, and their gradient by hand; see the module's text.

    ``mean``, ``var``: ``(cells, N, C)``; ``shares``: ``(2, K)``; ``weight``, ``bias``: ``(C,)`` or ``None``; none with
    a graph. The gradient is by each of these."""
    given, rows = mean.shape, (mean.shape[0], prod(mean.shape[1:]))
    # The shares make 1, so a constant passes through, and without it less is lost to rounding.
    level = mean.mean(0).nan_to_num(0.0, 0.0, 0.0)
    mean, var = (mean - level).reshape(rows), var.reshape(rows)
    total, spread = mean * shares[0, -1], var * shares[1, -1]
    levels = []
    for index, (average, back) in enumerate(others):
        centre = average @ mean
        apart = torch.addmm(mean, back, centre, alpha=-1)
        around = average @ torch.addcmul(var, apart, apart)
        total.addmm_(back * shares[0, index], centre)
        spread.addmm_(back * shares[1, index], around)
        levels.append((centre, apart, around))
    total, spread = total.view(given).add_(level), spread.view(given)
    scale, shift, behind = affine_with_gradient(total, spread, weight, bias, eps)

    def gradient(by_scale: Tensor, by_shift: Tensor) -> ByEach:
        by_total, by_spread, by_weight, by_bias = behind(by_scale.contiguous(), by_shift.contiguous())
        by_total, by_spread = by_total.view(rows), by_spread.view(rows)
        by_mean, by_var = by_total * shares[0, -1], by_spread * shares[1, -1]
        gates = []
        for index, ((average, back), (centre, apart, around)) in enumerate(zip(others, levels, strict=True)):
            upper, lower = back.t() @ by_total, back.t() @ by_spread
            gates += [_dot(centre, upper), _dot(around, lower)]
            from_spread = (average.t() * shares[1, index]) @ lower
            by_var.add_(from_spread)
            by_mean.addcmul_(apart, from_spread, value=2).addmm_(average.t() * shares[0, index], upper)
        gates += [_dot(mean, by_total), _dot(var, by_spread)]
        by_shares = torch.stack(gates).view(-1, 2).t()
        return by_mean.view(given), by_var.view(given), by_shares, by_weight, by_bias

    return scale, shift, gradient


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Of tensors of many values, whose products may cancel."""
    return (one * other).sum(dtype=fine(one.device)).to(one.dtype)
