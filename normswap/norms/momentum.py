r"""How much a batch weighs in running statistics: constant, cumulative, or a schedule over the batches seen.

The statistics :math:`r` follow those of batch :math:`t = 1, 2, \dots` by :math:`r \leftarrow r + s_t (b_t - r)`.

==========================  ==========================================  =============================================
written                     :math:`s_t`                                 which is
==========================  ==========================================  =============================================
``0.1``                     0.1                                         a moving average, as in torch
``cumulative``              :math:`1 / t`                               the mean of all batches; ``None`` in torch
``warmup:0.1``              :math:`\max(0.1,\; 1 / t)`                  that mean at first, so that nothing is left of
                                                                        the initial 0 and 1; then the moving average
``polynomial:3``            :math:`(3 + 1) / (t + 3)`                   a mean that forgets the early batches (Shamir
                                                                        and Zhang, arXiv 1212.1824, section 4)
``linear:0.3:0.01:1000``    from 0.3 to 0.01 over 1000 batches          step-dependent, then constant
==========================  ==========================================  =============================================
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from normswap.errors import NormswapError

FORMS = "a number, cumulative, warmup:MOMENTUM, polynomial:POWER, or linear:FIRST:LAST:BATCHES"


@dataclass(frozen=True)
class Schedule:
    """A weight that changes with the batches seen."""

    @property
    def last(self) -> float | None:
        """The weight far on, for a layer that has no schedules: ``None`` for a cumulative mean."""
        raise NotImplementedError

    def share(self, seen: Tensor) -> Tensor:
        """The weight, of the dtype of ``seen``, of batch number ``seen`` (from 1), of any shape."""
        raise NotImplementedError


def _check(schedule: Schedule, right: bool) -> None:
    if not right:
        raise NormswapError(
            f"{schedule!r}: weights are above 0 and at most 1, a power is at least 0, and batches are at least 1"
        )


@dataclass(frozen=True)
class Warmup(Schedule):
    """The mean of all batches until one weighs no more than ``momentum``, then the moving average. Raises
    :class:`NormswapError` for a momentum that is not above 0 and at most 1."""

    momentum: float

    def __post_init__(self) -> None:
        _check(self, 0 < self.momentum <= 1)

    @property
    def last(self) -> float:
        return self.momentum

    def share(self, seen: Tensor) -> Tensor:
        return (1 / seen).clamp(min=self.momentum)

    def __str__(self) -> str:
        return f"warmup:{self.momentum:g}"


@dataclass(frozen=True)
class Polynomial(Schedule):
    """A mean that forgets the early batches, faster with a larger ``power``; with 0 it is the mean of all. Raises
    :class:`NormswapError` for a negative power."""

    power: float

    def __post_init__(self) -> None:
        _check(self, 0 <= self.power < float("inf"))

    @property
    def last(self) -> None:
        return None

    def share(self, seen: Tensor) -> Tensor:
        return (self.power + 1) / (seen + self.power)

    def __str__(self) -> str:
        return f"polynomial:{self.power:g}"


@dataclass(frozen=True)
class Linear(Schedule):
    """From ``first`` for the first batch to ``final`` after ``batches`` more, in equal steps; then that. Raises
    :class:`NormswapError` for weights that are not above 0 and at most 1, and for less than one batch."""

    first: float
    final: float
    batches: float

    def __post_init__(self) -> None:
        _check(self, 0 < self.first <= 1 and 0 < self.final <= 1 and 1 <= self.batches < float("inf"))

    @property
    def last(self) -> float:
        return self.final

    def share(self, seen: Tensor) -> Tensor:
        return self.first + (self.final - self.first) * ((seen - 1) / self.batches).clamp(max=1)

    def __str__(self) -> str:
        return f"linear:{self.first:g}:{self.final:g}:{self.batches:g}"


Momentum = float | Schedule | None


def parse(given: object) -> Momentum:
    """A momentum from what the table above has. Raises :class:`NormswapError` for anything else."""
    if given is None or given == "cumulative":
        return None
    if isinstance(given, Schedule):
        return given
    name, *rest = str(given).split(":") if isinstance(given, str) else ("", given)
    if not rest:
        name, rest = "", [name]
    try:
        numbers = [float(each) for each in rest]  # type: ignore[arg-type]
    except (TypeError, ValueError):
        numbers = []
    share = all(0 < number <= 1 for number in numbers[:2])
    if isinstance(given, bool) or not all(map(isfinite, numbers)):
        numbers = []
    if len(numbers) == 1 and share and name in ("", "warmup"):
        return Warmup(numbers[0]) if name else numbers[0]
    if len(numbers) == 1 and numbers[0] >= 0 and name == "polynomial":
        return Polynomial(numbers[0])
    if len(numbers) == 3 and share and numbers[2] >= 1 and name == "linear":
        return Linear(*numbers)
    raise NormswapError(f"momentum={given!r}: it is {FORMS}; weights are above 0 and at most 1")


def share_of(momentum: Momentum, seen: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight of batch number ``seen``, in ``dtype`` and the shape of ``seen``; 1 at most before the first."""
    seen = seen.clamp(min=1).to(dtype)
    if momentum is None:
        return 1 / seen
    return momentum.share(seen) if isinstance(momentum, Schedule) else torch.full_like(seen, momentum)
