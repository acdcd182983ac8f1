"""The side that is right: its outputs in its own dtype, in float64, and those of the run whose error is the floor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from normswap.errors import NormswapError
from normswap.onnx.export import isolated, one_line
from normswap.verification.criterion import FACTOR, MEAN_FACTOR, MEAN_ULPS, ULPS
from normswap.verification.inputs import Arguments, Variation
from normswap.verification.measures import FEW, epsilon_of
from normswap.verification.outputs import Outputs, same
from normswap.verification.precision import call, call_in, cast

SAMPLES = 3
"""Runs beside the reference's own that say what rounding does to it, where one is not enough."""
WIDER = "error relative to the reference in its own dtype at most eps^(2/3): "


@dataclass(frozen=True)
class Answers:
    """What the reference gives on one set of inputs."""

    own: Outputs
    wide: Outputs
    """In float64; empty where there is no such run."""
    noise: Outputs
    """Of the run whose error is the noise floor: ``own``, or float32 for outputs in float64; empty likewise."""
    coarsest: float = 0.0
    """The largest machine epsilon among the dtypes of the reference's parameters."""
    others: tuple[Outputs, ...] = ()
    """Of runs like that of ``noise``, with weights a rounding away."""


class Reference:
    """A model, or a program that runs in its own dtype alone."""

    def __init__(
        self, model: nn.Module | None, own: Callable[[Arguments], Outputs] | None = None, path: Path | None = None
    ) -> None:
        self.model = model
        self.path = path
        self.name = type(model).__name__ if path is None else path.name
        self.copies: dict[torch.dtype | None, nn.Module] = {}
        self.own = own if own is not None else lambda inputs: call(self.copy_in(None), inputs)
        self.notes: list[str] = []
        self.failure: str | None = None
        """Why there is no float64 run."""
        self.given: Answers | None = None

    @property
    def criterion(self) -> str:
        if self.failure is not None:
            return f"{WIDER}{self.failure}"
        return (
            f"error relative to the reference in float64 at most {FACTOR:g} noise floors (the reference's own error; "
            f"{2 * FACTOR:g} for outputs of fewer than {FEW} values) + {ULPS:g} eps, and its root mean square at most "
            f"{MEAN_FACTOR:g} + {MEAN_ULPS:g} eps"
        )

    def first(self, inputs: Arguments) -> None:
        """Run on the given inputs; this decides which criterion holds.

        Raises :class:`NormswapError` when the reference does not run."""
        try:
            own = self.own(inputs)
        except Exception as error:
            raise NormswapError(f"the reference {self.name} fails on example_inputs: {one_line(error)}") from error
        if self.model is None:
            self.failure = f"{self.name} is a file that runs in its own dtype only"
            self.given = Answers(own, {}, {})
            return
        try:
            self.given = self._with_wide(own, inputs)
        except Exception as error:
            self.failure = "the reference does not run in float64, so its noise floor is not known"
            self.notes.append(f"the reference does not run in float64 ({one_line(error)}); the wider criterion is used")
            self.given = Answers(own, {}, {})

    def __call__(self, variation: Variation, inputs: Arguments) -> Answers:
        if variation.name == "given" and self.given is not None:
            return self.given
        own = self.own(inputs)
        return Answers(own, {}, {}) if self.failure is not None else self._with_wide(own, inputs)

    def _with_wide(self, own: Outputs, inputs: Arguments) -> Answers:
        wide = self._in(torch.float64, inputs)
        doubles = any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in own.values())
        return Answers(own, wide, self._in(torch.float32, inputs) if doubles else own, self._coarsest())

    def nearby(self, answers: Answers, inputs: Arguments) -> Answers:
        """``answers`` with :data:`SAMPLES` more runs, each with every weight and buffer off by up to one epsilon.

        Values that are whole numbers stay: they may be positions. Without more runs where a fresh copy of the model
        does not give the same again, as one with a state."""
        assert self.model is not None
        fresh = call(isolated(self.model, share=False), inputs)
        if not all(same(value, fresh.get(name)) for name, value in answers.own.items()):
            return answers
        dtype = None if answers.noise is answers.own else torch.float32
        found = []
        for seed in range(SAMPLES):
            model = isolated(self.model, share=False)
            model = moved(model if dtype is None else cast(model, dtype), seed)
            found.append(call(model, inputs) if dtype is None else call_in(model, inputs, dtype))
        return replace(answers, others=tuple(found))

    def _coarsest(self) -> float:
        parameters = () if self.model is None else self.model.parameters()
        return max((epsilon_of(parameter.dtype) for parameter in parameters), default=0.0)

    def _in(self, dtype: torch.dtype, inputs: Arguments) -> Outputs:
        return call_in(self.copy_in(dtype), inputs, dtype)

    def copy_in(self, dtype: torch.dtype | None) -> nn.Module:
        """A copy of the model in another dtype, or in its own."""
        assert self.model is not None
        if dtype not in self.copies:
            copied = isolated(self.model, share=False)
            self.copies[dtype] = copied if dtype is None else cast(copied, dtype)
        return self.copies[dtype]


@torch.no_grad()
def moved(model: nn.Module, seed: int) -> nn.Module:
    """``model`` with its floating-point parameters and buffers off by up to one epsilon each, in place."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.layout == torch.strided:
            share = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 2 - 1
            off = tensor.double() * (1 + epsilon_of(tensor.dtype) * share.to(tensor.device))
            tensor.copy_(torch.where(tensor == tensor.round(), tensor.double(), off))
    return model
