"""Every place that refers to a module: child slots under any name, and plain lists, tuples and dicts.

``setattr`` on one parent misses the second name of a shared module and the Python list that a ``forward`` iterates.
Here a module is replaced at all of its slots. What holds a module in another way (a closure, a bound method, a set) is
found too, so that such a module is left alone. Registered children come first: a module is known by the name it has in
``state_dict``."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from normswap.graph.reach import is_compiled_wrapper

_INTERNAL = frozenset(vars(nn.Module()))
_DEPTH = 3
_HOLDS_NOTHING = frozenset({bool, int, float, complex, str, bytes, type(None), type})


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
        current = self.outer.get()
        items = (*current[: self.key], value, *current[self.key + 1 :])
        cls: Any = type(current)
        self.outer.put(cls._make(items) if hasattr(cls, "_make") else cls(items))

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
    """The name of a module that holds this one where it cannot be replaced: in a closure, a bound method, a set, an
    object."""

    @property
    def name(self) -> str:
        return self.names[0]


def references(model: nn.Module) -> dict[int, Reference]:
    """All modules reachable from ``model``, by ``id``; the root's name is ``""``.

    Those in the module tree come in the order of ``named_modules``, after them those that only plain attributes hold.
    """
    found: dict[int, Reference] = {}
    holders: list[nn.Module] = []

    def visit(module: nn.Module, name: str, above: frozenset[int]) -> None:
        new = id(module) not in found
        if new:
            found[id(module)] = Reference(module)
            holders.append(module)
        found[id(module)].names.append(name)
        if id(module) in above:
            return
        inside = above | {id(module)}
        for key, child in module._modules.items():
            if child is None:
                continue
            visit(child, f"{name}.{key}" if name else key, inside)
            if new:
                found[id(child)].slots.append(Slot(module._modules, key))
                found[id(child)].parents.append(module)

    visit(model, "", frozenset())
    for holder in holders:  # grows on the way
        prefix = f"{found[id(holder)].name}." if found[id(holder)].name else ""
        for key, slot, module in _plain(holder):
            if id(module) in found:
                found[id(module)].names.append(f"{prefix}{key}")
            else:
                visit(module, f"{prefix}{key}", frozenset())
            found[id(module)].slots.append(slot)
            found[id(module)].parents.append(holder)
    for holder in holders:
        for module in _captured(holder):
            if id(module) in found:
                found[id(module)].captured = found[id(holder)].name or type(holder).__name__
    return found


def _plain(module: nn.Module) -> Iterator[tuple[str, Slot, nn.Module]]:
    for key, value in vars(module).items():
        if key not in _INTERNAL and type(value) not in _HOLDS_NOTHING:
            yield from _nested(key, Slot(vars(module), key), value, _DEPTH)


def _nested(name: str, slot: Slot, value: Any, depth: int) -> Iterator[tuple[str, Slot, nn.Module]]:
    if isinstance(value, nn.Module):
        yield name, slot, value
    elif depth and isinstance(value, (list, dict, tuple, deque)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            if type(item) in _HOLDS_NOTHING:
                continue
            inner = Slot(None, key, slot) if isinstance(value, tuple) else Slot(value, key)
            yield from _nested(f"{name}.{key}", inner, item, depth - 1)


def _captured(module: nn.Module) -> Iterator[nn.Module]:
    if is_compiled_wrapper(module):
        yield from module.children()
    for key, value in vars(module).items():
        if key not in _INTERNAL and type(value) not in _HOLDS_NOTHING and not isinstance(value, nn.Module):
            yield from (held for held in _held(value, _DEPTH) if held is not module)


def _held(value: Any, depth: int, fixed: bool = False) -> Iterator[nn.Module]:
    """Modules in ``value`` that sit in no slot; ``fixed`` once something on the way cannot be written to."""
    if isinstance(value, nn.Module):
        if fixed:
            yield value
        return
    if not depth or type(value) in _HOLDS_NOTHING or isinstance(value, (type, Tensor)):
        return
    if isinstance(value, (list, tuple, deque)):
        items = list(value)
    elif isinstance(value, dict):
        items = list(value.values())
    else:
        items, fixed = list(_inside(value)), True
    for item in items:
        yield from _held(item, depth - 1, fixed)


def _inside(value: Any) -> Iterator[Any]:
    """What an object refers to that is no list, tuple or dict."""
    if isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        yield value.__self__
    elif isinstance(value, FunctionType):
        yield from value.__defaults__ or ()
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not filled yet
                continue
    elif isinstance(value, weakref.ref):
        yield value()
    elif isinstance(value, (set, frozenset)):
        yield from value
    elif isinstance(getattr(value, "__dict__", None), dict):
        yield from vars(value).values()
