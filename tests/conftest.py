"""What holds for every test: one thread, the same random numbers each time, and one table of ONNX operators."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch.fx import _symbolic_trace

from normswap.norms.condition import NeedsCondition


def pytest_collection_finish() -> None:
    """What was imported stays, and no search for garbage needs to go through it."""
    gc.freeze()


def pytest_runtest_setup() -> None:
    """``torch.onnx.export`` makes its table of some 500 operators anew at every call, for most of the time of a small
    export. Once it is imported, each opset's is made once, and every export gets a copy."""
    module = sys.modules.get("torch.onnx._internal.exporter._registration")  # No public name: it may go.
    registry: Any = getattr(module, "ONNXRegistry", None)
    if registry is None or registry in _COPYING:
        return
    made = cache(registry.from_torchlib)

    def copied(*arguments: Any, **options: Any) -> Any:
        table, own = made(*arguments, **options), registry()
        vars(own).update(vars(table))
        own.functions = {name: [*translations] for name, translations in table.functions.items()}
        return own

    registry.from_torchlib = staticmethod(copied)
    _COPYING.add(registry)


_COPYING: set[type] = set()


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.default_generator.manual_seed(0)  # torch.manual_seed also leaves a traceback for each missing kind of device
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def _one_wrapper_of_each_function() -> Iterator[None]:
    """A trace of FX puts a wrapper around each function of ``math``, and around some of other libraries, and makes all
    of them anew: a sixth of the time of a small trace. They hold nothing but the function; here each is made once."""
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(_symbolic_trace, "_create_wrapped_func"):
            patch.setattr(_symbolic_trace, "_create_wrapped_func", cache(_symbolic_trace._create_wrapped_func))
        yield


@pytest.fixture
def ambient_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that were given no style, label or domain take one that is not the first."""
    own = NeedsCondition.condition

    def condition(self: NeedsCondition) -> object:
        if self.given is not None and self.given.lasts:
            return own(self)
        if self.needs == "style":
            return tuple(torch.linspace(low, 2, int(self.num_features)).reshape(1, -1) for low in (-1.0, 0.5))
        return torch.tensor([1])

    monkeypatch.setattr(NeedsCondition, "condition", condition)
