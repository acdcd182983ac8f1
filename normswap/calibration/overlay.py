"""What a forward pass leaves in the model, kept apart for each of the passes that take turns in it.

A ``forward`` may put a value into an attribute, a list, a dict or a buffer and read it again behind a norm. Passes that
wait at the norm for each other would read each other's. So what a pass changed is taken away when it stops, and put
back before it goes on; between, the model is as it was before all of them. Seen are the attributes of modules, plain
containers and objects that they hold, and tensors written in place, not parameters; not what lies outside of the
model, such as a global variable."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_CONTAINERS = (dict, list, set, deque)
_NO_STATE = (nn.Module, Tensor, type, FunctionType, MethodType, BuiltinFunctionType, ModuleType, str, int, float, tuple)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_DEPTH = 3

Marks = tuple[list[tuple[Any, Any]], list[tuple[Tensor, Tensor]]]
"""Containers and tensors, and what they hold."""


class Base:
    """A model as it is before the passes. ``own``: tensors that the passes' caller writes himself."""

    def __init__(self, model: nn.Module, own: Iterable[Tensor] = ()) -> None:
        self.model = model
        found: dict[int, Any] = {}
        for module in model.modules():
            attributes = vars(module)
            for container in (attributes, module._buffers):
                found[id(container)] = container
            for name, value in attributes.items():
                if name not in _OF_EVERY_MODULE:
                    _collect(value, found, _DEPTH)
        self._held = [(container, container.copy(), _identities(container)) for container in found.values()]
        writers = {id(tensor) for tensor in own}
        values = (value for container in found.values() for value in _values(container))
        tensors = {id(value): value for value in values if isinstance(value, Tensor)}
        self._tensors = [
            (tensor, tensor.detach().clone())
            for tensor in tensors.values()
            if id(tensor) not in writers and not tensor.is_meta and not tensor.is_inference()
        ]
        self._versions = [tensor._version for tensor, _ in self._tensors]

    def taken(self) -> Marks:
        """What differs from before; it is put back."""
        containers: list[tuple[Any, Any]] = []
        tensors: list[tuple[Tensor, Tensor]] = []
        for container, before, identities in self._held:
            if _identities(container) != identities:
                containers.append((container, container.copy()))
                _refill(container, before)
        for index, (tensor, kept) in enumerate(self._tensors):
            if tensor._version != self._versions[index]:
                tensors.append((tensor, tensor.detach().clone()))
                with torch.no_grad():
                    tensor.copy_(kept)
                self._versions[index] = tensor._version
        return containers, tensors

    def given(self, marks: Marks) -> None:
        """Make the differences again."""
        containers, tensors = marks
        for container, items in containers:
            _refill(container, items)
        with torch.no_grad():
            for tensor, value in tensors:
                tensor.copy_(value)


class Overlay:
    """What one pass changed."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._marks: Marks = ([], [])

    def enter(self) -> None:
        self._base.given(self._marks)

    def leave(self) -> None:
        self._marks = self._base.taken()


def _collect(value: Any, found: dict[int, Any], depth: int) -> None:
    if not isinstance(value, _CONTAINERS):
        if isinstance(value, _NO_STATE) or not isinstance(getattr(value, "__dict__", None), dict):
            return
        value = vars(value)
    if id(value) in found or not depth:
        return
    found[id(value)] = value
    for each in _values(value):
        _collect(each, found, depth - 1)


def _values(container: Any) -> Iterator[Any]:
    return iter(container.values() if isinstance(container, dict) else container)


def _identities(container: Any) -> tuple[int, ...]:
    if isinstance(container, dict):
        return (*map(id, container), *map(id, container.values()))
    return tuple(map(id, container))


def _refill(container: Any, items: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(items)
