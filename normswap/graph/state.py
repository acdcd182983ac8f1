"""Running or tracing a model without leaving a mark on it.

A ``forward`` may store what it computes (a cache of attention biases, a counter): traced, it would store proxies in the
user's model. It may draw random numbers. Attributes, the contents of plain containers and the random states are put
back, and what was done is told: a ``forward`` generated from the trace would not do it."""

from __future__ import annotations

import pickle
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import nn

_GENERATORS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_rng_state, torch.set_rng_state),
    (random.getstate, random.setstate),
    (numpy.random.get_state, numpy.random.set_state),
)


@contextmanager
def unmarked(model: nn.Module) -> Iterator[list[str]]:
    """Restore the attributes of all modules of ``model`` and the random states at the end, also on an error.

    The list given is filled then with what had been done, in words.
    """
    effects: list[str] = []
    saved = []
    for module in model.modules():
        own: dict[str, Any] = dict(vars(module))
        containers = (
            value for value in own.values() if type(value) not in _HOLDS_NOTHING and isinstance(value, _HOLDS)
        )
        saved.append((module, own, [(value, _items(value)) for value in containers]))
    states = [get() for get, _ in _GENERATORS]
    try:
        yield effects
    finally:
        for module, own, contents in saved:
            effects.extend(_put_back(vars(module), own))
            for container, items in contents:
                if (container or items) and _differ(_items(container), items):
                    number = ", by a number" if _counted(_items(container), items) else ""
                    effects.append(f"changes a {type(container).__name__} it holds{number}")
                    _refill(container, items)
        for before, (get, put) in zip(states, _GENERATORS, strict=True):
            if _drawn(before, get()):
                effects.append("draws random numbers in Python")
                put(before)


def _put_back(now: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """What was done to attributes: set, deleted or replaced; they are restored."""
    changed = [k for k in {**own, **now} if k not in own or k not in now or now[k] is not own[k]]
    told = [f"sets {k}{', a number' if _counted([now.get(k)], [own.get(k)]) else ''}" for k in changed]
    if changed:
        now.clear()
        now.update(own)
    return told


def _counted(now: list[Any], before: list[Any]) -> bool:
    """Whether a number became another number, on which the next call may depend."""
    numbers = (bool, int, float)
    return any(type(a) in numbers and type(b) in numbers and a != b for a, b in zip(now, before, strict=False))


_HOLDS = (dict, list, set, deque)
_HOLDS_NOTHING = frozenset({bool, int, float, str, tuple, type(None)})


def _items(container: Any) -> list[Any]:
    if not container:
        return []
    return [part for pair in container.items() for part in pair] if isinstance(container, dict) else list(container)


def _differ(now: list[Any], before: list[Any]) -> bool:
    return len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True))


def _refill(container: Any, items: list[Any]) -> None:
    container.clear()
    if isinstance(container, dict):
        container.update(zip(items[::2], items[1::2], strict=True))
    elif isinstance(container, set):
        container.update(items)
    else:
        container.extend(items)


def _drawn(before: Any, now: Any) -> bool:
    if isinstance(before, torch.Tensor):
        return not torch.equal(before, now)
    return pickle.dumps(before) != pickle.dumps(now)
