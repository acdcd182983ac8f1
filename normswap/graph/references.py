"""Every place that refers to a module: child slots under any name, and plain lists, tuples and dicts.

``setattr`` on one parent misses the second name of a shared module and the Python list that a ``forward`` iterates. Here a module
is replaced at all of its slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

_INTERNAL = frozenset(vars(nn.Module()))
_DEPTH = 3


@dataclass(frozen=True)
class Slot:
    """One reference: ``container[key]``, or an element of a tuple that itself sits in ``outer``."""

    container: Any
    key: Any
    outer: Slot | None = None

    def put(self, value: object) -> None:
        if self.outer is None:
            self.container[self.key] = value
            return
        current = self.outer.container[self.outer.key] if self.outer.outer is None else self.outer.get()
        self.outer.put((*current[: self.key], value, *current[self.key + 1 :]))

    def get(self) -> Any:
        return self.container[self.key] if self.outer is None else self.outer.get()[self.key]


@dataclass
class Reference:
    """A module, its dotted names (the first is the one it is known by) and its slots."""

    module: nn.Module
    names: list[str] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    parents: list[nn.Module] = field(default_factory=list)
    captured: str | None = None
    """The name of a module that keeps a bound method or a partial of this one: such a reference cannot be replaced."""

    @property
    def name(self) -> str:
        return self.names[0]


def references(model: nn.Module) -> dict[int, Reference]:
    """All modules reachable from ``model``, by ``id``, in the order of ``named_modules``; the root's name is ``""``."""
    found: dict[int, Reference] = {}
    captured: list[tuple[nn.Module, str]] = []

    def visit(module: nn.Module, name: str, above: frozenset[int]) -> None:
        known = found.get(id(module))
        if known is not None:
            known.names.append(name)
        else:
            found[id(module)] = Reference(module, [name])
        if id(module) in above:
            return
        inside = above | {id(module)}
        for key, slot, child in _children(module):
            visit(child, f"{name}.{key}" if name else key, inside)
            if known is None:
                found[id(child)].slots.append(slot)
                found[id(child)].parents.append(module)
        if known is None:
            captured.extend((held, name or type(module).__name__) for held in _captured(module))

    visit(model, "", frozenset())
    for module, holder in captured:
        if id(module) in found:
            found[id(module)].captured = holder
    return found


def _children(module: nn.Module) -> Iterator[tuple[str, Slot, nn.Module]]:
    modules = module._modules
    for key, child in modules.items():
        if child is not None:
            yield key, Slot(modules, key), child
    for key, value in vars(module).items():
        if key not in _INTERNAL:
            yield from _nested(key, Slot(vars(module), key), value, _DEPTH)


def _nested(name: str, slot: Slot, value: Any, depth: int) -> Iterator[tuple[str, Slot, nn.Module]]:
    if isinstance(value, nn.Module):
        yield name, slot, value
    elif depth and type(value) in (list, dict, tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            inner = Slot(None, key, slot) if isinstance(value, tuple) else Slot(value, key)
            yield from _nested(f"{name}.{key}", inner, item, depth - 1)


def _captured(module: nn.Module) -> Iterator[nn.Module]:
    for key, value in vars(module).items():
        if key in _INTERNAL:
            continue
        held = [value.func, *value.args, *value.keywords.values()] if isinstance(value, partial) else [value]
        for item in held:
            if isinstance(item, MethodType) and isinstance(item.__self__, nn.Module) and item.__self__ is not module:
                yield item.__self__
            elif isinstance(value, partial) and isinstance(item, nn.Module):
                yield item
