"""One run of a module, seen from inside: what every call of a submodule took and gave, and what it was made of.

Tensors are followed by identity through every torch function, so that of each call it is known which calls its inputs
come from. Values are copied when they are seen: later code may write over them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from normswap.verification.inputs import Arguments
from normswap.verification.outputs import leaves
from normswap.verification.precision import fixed_random, precision


@dataclass
class Entry:
    """One call of a module, or one operator of a graph."""

    name: str
    """Dotted name of the module; of an operator, that of the module it belongs to."""
    kind: str
    """Class of the module, or the operator."""
    call: int
    """How many calls of the same module went before."""
    outputs: tuple[Tensor, ...]
    """Floating-point tensors only, like ``inputs``."""
    inputs: tuple[Tensor, ...] = ()
    sources: frozenset[int] = frozenset()
    """Positions of the innermost calls that the inputs were computed from."""
    made_of: frozenset[int] = frozenset()
    """Of a call with others inside: positions of the innermost calls its outputs were computed from."""
    innermost: bool = True
    """Whether no other module was called inside."""
    given: tuple[Any, Any] | None = None
    """Copies of its arguments and keyword arguments."""
    operator: str = ""
    """Name of an operator in its file."""
    placed: bool = False
    """Whether ``name`` and ``call`` say which call of which module it is."""


@dataclass
class Trace:
    """The calls of one run in the order in which they ended."""

    entries: list[Entry] = field(default_factory=list)
    between: list[Entry] = field(default_factory=list)
    """Results of torch functions, named after the module whose code called them."""
    final: dict[str, frozenset[int]] = field(default_factory=dict)
    """By output of the model, the innermost calls that it was computed from."""


def trace(model: nn.Module, inputs: Arguments, dtype: torch.dtype | None = None) -> Trace:
    """Run ``model(*inputs)`` without gradients and with a fixed random state, and see what is inside.

    The model must be the caller's own: it carries hooks meanwhile. With ``dtype`` it must have been cast already, and
    the inputs are cast here."""
    tracer = _Tracer(model)
    handles: list[Any] = []
    context: Any = nullcontext() if dtype is None else precision(dtype)
    try:
        for module in tracer.names:
            handles.append(module.register_forward_pre_hook(tracer.enter, with_kwargs=True))
            handles.append(module.register_forward_hook(tracer.leave, with_kwargs=True, always_call=True))
        with fixed_random(inputs), torch.no_grad(), context as mode:
            given = tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, inputs)
            given = given if mode is None else tree_map(mode.cast, given)
            with tracer:
                output = model(*given)
            tracer.finish(output)
    finally:
        for handle in handles:
            handle.remove()
    return tracer.trace


@dataclass
class _Open:
    inputs: tuple[Tensor, ...]
    sources: frozenset[int]
    given: tuple[Any, Any]
    calls: int = 0
    """Calls of other modules inside it, so far."""


class _Tracer(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {module: name for name, module in model.named_modules()}
        self.trace = Trace()
        self.counts: dict[nn.Module, int] = {}
        self.stack: list[_Open] = []
        self.running: list[str] = [""]
        self.sources: Any = WeakTensorKeyDictionary()
        self.copies: Any = WeakTensorKeyDictionary()
        self.busy = False

    # ---- values

    def copied(self, tensor: Tensor) -> Tensor:
        """A copy of what a tensor holds now, on the CPU; one for all that ask before it is written over."""
        known: tuple[int, Tensor] | None = self.copies.get(tensor)
        if known is not None and known[0] == tensor._version:
            return known[1]
        copy = tensor.detach().to("cpu", copy=True)
        self.copies[tensor] = (tensor._version, copy)
        return copy

    def values(self, value: Any) -> tuple[Tensor, ...]:
        found = (leaf for leaf in tensors(value) if leaf.is_floating_point() and leaf.layout == torch.strided)
        return tuple(self.copied(leaf) for leaf in found)

    def made_from(self, value: Any) -> frozenset[int]:
        found: Iterable[frozenset[int]] = (self.sources.get(leaf, frozenset()) for leaf in tensors(value))
        return frozenset().union(*found)

    # ---- calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.busy:
            return result
        self.busy = True
        try:
            made_of = self.made_from((args, kwargs))
            changed = result if result is not None else args[:1]
            for leaf in tensors(changed):
                self.sources[leaf] = made_of
            if values := self.values(changed):
                name = getattr(func, "__name__", str(func))
                self.trace.between.append(Entry(self.running[-1], name, 0, values, made_of=made_of))
        finally:
            self.busy = False
        return result

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.busy = True
        try:
            for above in self.stack[-1:]:
                above.calls += 1
            given = tree_map(lambda leaf: self.copied(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
            self.stack.append(_Open(self.values((args, kwargs)), self.made_from((args, kwargs)), given))
            self.running.append(self.names[module])
        finally:
            self.busy = False

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.busy = True
        try:
            opened = self.stack.pop()
            self.running.pop()
            if output is None:  # It raised, and what it raised may be caught.
                return
            call = self.counts[module] = self.counts.get(module, -1) + 1
            entry = Entry(self.names[module], type(module).__name__, call, self.values(output), opened.inputs)
            entry.placed = True
            entry.sources, entry.innermost, entry.given = opened.sources, not opened.calls, opened.given
            if entry.innermost:
                for leaf in tensors(output):
                    self.sources[leaf] = frozenset({len(self.trace.entries)})
            entry.made_of = self.made_from(output)
            self.trace.entries.append(entry)
        finally:
            self.busy = False

    def finish(self, output: Any) -> None:
        for name, leaf in leaves(output).items():
            self.trace.final[name] = self.made_from(leaf)


def tensors(value: Any) -> list[Tensor]:
    """The tensors in a value, the very objects."""
    return [leaf for leaf in leaves(value).values() if isinstance(leaf, Tensor)]
