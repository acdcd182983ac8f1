"""A norm without its affine, as the same object.

A norm whose weight and bias went into the layers that read it stays in the model's own class, so that the way it
computes (its eps, what it does in float32, its attributes) cannot change. Two manners:

- ``dropped``: weight and bias become ``None``, as in ``nn.LayerNorm(..., elementwise_affine=False)``;
- ``ones`` and ``zeros``: they keep their places at the values that do nothing: a weight of ones, or of zeros where the
  class scales by ``1 + weight``. For a class whose code needs a weight (most RMSNorm of transformers), and for a norm
  whose weight other code asks for.

Which of them a class takes is measured: a copy without affine runs on a small input and is compared with the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from normswap.spec import Norm, reference

Manner = Literal["dropped", "ones", "zeros"]


@dataclass(frozen=True)
class Bare:
    """How a norm gave its affine away."""

    manner: Manner
    """How it stands without."""
    axis: int
    """The axis of its output that the affine ran along."""
    direct: bool
    """Whether every layer took the affine as the norm had it."""


_NAMES = ("weight", "bias")
_FLAGS = ("affine", "elementwise_affine")
_TOLERANCE = 1e-4


def manner(module: nn.Module, norm: Norm, *, keep: bool = False) -> Manner | None:
    """How ``module`` can stand without its affine, by preference dropped; ``None`` where it cannot.

    ``keep``: its parameters must stay in their places.
    """
    candidates: tuple[Manner, ...] = ("ones", "zeros") if keep else ("dropped", "ones", "zeros")
    x = _input(norm)
    wanted = reference(x, replace(norm, weight=None, bias=None))
    return next((each for each in candidates if _computes(module, each, x, wanted)), None)


def _input(norm: Norm) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if norm.channel_axis == -1:
        shape = (3, *(norm.shape or (norm.channels,)))
    else:
        rank = 3 if norm.ranks is None else max(norm.ranks)
        shape = (3, norm.channels, *[2] * (rank - 2))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _computes(module: nn.Module, how: Manner, x: torch.Tensor, wanted: torch.Tensor) -> bool:
    try:
        probe = copy.deepcopy(module).cpu().double()
        strip(probe, how)
        with torch.no_grad():
            out = probe(x.clone())
    except Exception:  # a class that needs its weight, or does not run on the CPU
        return False
    return out.shape == wanted.shape and torch.allclose(out.double(), wanted, rtol=_TOLERANCE, atol=_TOLERANCE)


def strip(module: nn.Module, how: Manner) -> Callable[[], None]:
    """Take the affine out of a norm, in place; returns what puts it back, bit for bit."""
    parameters = {name: p for name in _NAMES if (p := module._parameters.get(name)) is not None}
    if how != "dropped":
        values = {name: parameter.data for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            neutral = 1.0 if name == "weight" and how == "ones" else 0.0
            parameter.data = torch.full_like(parameter.data, neutral)

        def refill() -> None:
            for name, parameter in parameters.items():
                parameter.data = values[name]

        return refill
    flags = {name: value for name in _FLAGS if isinstance(value := vars(module).get(name), bool)}
    module._parameters.update(dict.fromkeys(parameters))
    vars(module).update(dict.fromkeys(flags, False))

    def put_back() -> None:
        module._parameters.update(parameters)
        vars(module).update(flags)

    return put_back
