"""Running a model in another floating-point dtype than its own, whatever its code asks for."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from normswap.verification.outputs import Outputs, flatten


class Precision(TorchDispatchMode):
    """Every cast and creation of a floating-point tensor goes to one dtype, whatever a ``forward`` asks for."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.view.dtype:  # Reads bits: no cast.
            return func(*args, **(kwargs or {}))
        out = func(*tree_map(self._dtype, args), **tree_map(self._dtype, kwargs or {}))
        return self.cast(out) if func in (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift.default) else out

    def _dtype(self, value: Any) -> Any:
        if not isinstance(value, torch.dtype):
            return value
        return self.dtype if value.is_floating_point else self.dtype.to_complex() if value.is_complex else value

    def cast(self, value: Any) -> Any:
        return _cast(value, self.dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """A floating-point tensor in ``dtype``, a complex one in the complex dtype of that width; else as it is."""
    if not isinstance(value, Tensor):
        return value
    if value.is_complex():
        return value.to(dtype.to_complex())
    return value.to(dtype) if value.is_floating_point() else value


@contextmanager
def precision(dtype: torch.dtype) -> Iterator[Precision]:
    """Within it, floating-point tensors are made in ``dtype``."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with Precision(dtype) as mode:
            yield mode
    finally:
        torch.set_default_dtype(previous)


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``model`` with parameters, buffers and other tensors in its modules' attributes in ``dtype``, in place."""

    def convert(leaf: Any) -> Any:
        return _cast(leaf, dtype)

    model._apply(convert)  # Module.to would make complex tensors real.
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if name in ("_parameters", "_buffers", "_modules") or not isinstance(value, Tensor | dict | list | tuple):
                continue
            if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
                setattr(module, name, tree_map(convert, value))
    return model


@contextmanager
def fixed_random(inputs: Any) -> Iterator[None]:
    """Within it, torch (also on the devices of ``inputs``), Python and numpy draw the same numbers each time; their
    states are put back at the end."""
    leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    devices = sorted({leaf.get_device() for leaf in leaves if leaf.is_cuda})
    states = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            _seed_torch(0)
            random.seed(0)
            numpy.random.seed(0)
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


def _seed_torch(seed: int) -> None:
    """As ``torch.manual_seed``, which also keeps a traceback for each kind of device that there is not: that takes
    longer than a call of a small model."""
    (torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed)(seed)


def call(model: nn.Module, inputs: tuple[Any, ...]) -> Outputs:
    """One call without gradients and with a fixed random state; the caller's inputs and random state stay."""
    given = tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, inputs)
    with fixed_random(inputs), torch.no_grad():
        return flatten(model(*given))


def call_in(model: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype) -> Outputs:
    """As :func:`call`, of a ``model`` that :func:`cast` has put in ``dtype``, on inputs cast likewise."""
    with precision(dtype) as mode:
        return call(model, tree_map(mode.cast, inputs))
