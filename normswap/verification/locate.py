"""Where a run first leaves the noise floor: the first call in it whose input is right and whose output is wrong.

The two sides need not hold the same values inside. A fold moves a norm's affine, so that a convolution gives what the
norm behind it gave, or a pooling layer what it gave but for a scale that the next convolution makes good. So a value
is *right* when it is within what the criterion allows of the reference's value of the same name, or of any other value
in the reference. A call whose output is not right is *cleared* when everything that reads it gives right outputs again,
or is cleared. Of those that are left, the first in execution order is asked:

- Does the reference's module of that name compute the same on the candidate's input? Then it is innocent, and the
  search goes on behind it.
- Is its input right? Then it is the place. Otherwise code between two calls is, in the module that holds both."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from normswap.verification.criterion import judge
from normswap.verification.inputs import Arguments
from normswap.verification.measures import Row, measure
from normswap.verification.outputs import flatten
from normswap.verification.precision import Precision, fixed_random, precision
from normswap.verification.reference import Reference
from normswap.verification.result import Layer
from normswap.verification.tracing import Entry, Trace, tensors, trace

AROUND = 3
"""How many values before and behind a place are shown with it."""
MOST = 10.0
"""The most that a value inside may exceed what is allowed there and still be taken for right."""
_RELATED = 0.01
"""Share of a channel's deviation that may be left for two values to be related."""
_PROBE = 256
"""Values that are looked at first when two tensors are compared."""


@dataclass(frozen=True)
class Truth:
    """One value in the reference: in its own dtype, and in float64 where there is such a run."""

    name: str
    own: Tensor
    wide: Tensor | None
    call: bool = False
    """Whether a module gave it, and not a function in the code of one."""


@dataclass(frozen=True)
class Match:
    """How a value of the candidate compares with the reference."""

    error: float | None = None
    floor: float | None = None
    excess: float | None = None
    """``None`` where the reference has nothing to compare it with."""
    like: str = ""
    allowed: float | None = None
    """What ``error`` may be at most; ``excess`` may come from another measure."""
    moved: bool = False
    """Whether it agrees with a value of another place than its own."""

    limit: float = 1.0
    """The excess up to which it is taken for right."""

    @property
    def right(self) -> bool:
        return self.excess is not None and self.excess <= self.limit

    @property
    def in_place(self) -> bool:
        return self.right and not self.moved


@dataclass(frozen=True)
class Place:
    """What the search found."""

    entry: Entry
    name: str
    kind: str
    detail: str
    position: int
    """Of the entry in the trace."""


def excess(got: Tensor, own: Tensor, wide: Tensor | None, limit: float = 1.0) -> Match:
    """``got`` against one value of the reference, by the criterion of one set of inputs."""
    row = Row("", "", "", shape=tuple(got.shape), dtype=str(got.dtype).removeprefix("torch."))
    judged = judge([measure(row, own, wide, None if wide is None else own, got)])[0]
    if judged.non_finite:
        return Match(math.inf, judged.floor, math.inf, allowed=judged.allowed)
    return Match(judged.relative, judged.floor, judged.excess, allowed=judged.allowed, limit=limit)


class Values:
    """The values of the reference, by place and by shape."""

    def __init__(self, own: Trace, wide: Trace | None, inputs: Arguments) -> None:
        self.by_place: dict[tuple[str, int, int], Truth] = {}
        self.by_shape: dict[tuple[int, ...], list[Truth]] = defaultdict(list)
        self.inputs: dict[tuple[str, int, int], Truth] = {}
        self.kinds: dict[str, str] = {}
        self.limit = 1.0
        if wide is not None and _shape_of(wide) != _shape_of(own):
            wide = None
        for entry, exact in _pairs(own, wide):
            self.kinds.setdefault(entry.name, entry.kind)
            for index, value in enumerate(entry.outputs):
                truth = Truth(entry.name, value, None if exact is None else exact.outputs[index], entry.placed)
                if entry.placed:
                    self.by_place[entry.name, entry.call, index] = truth
                self.by_shape[tuple(value.shape)].append(truth)
            for index, value in enumerate(entry.inputs if entry.placed else ()):
                wide_input = None if exact is None else exact.inputs[index]
                self.inputs[entry.name, entry.call, index] = Truth(entry.name, value, wide_input)
        for value in tensors(inputs):
            if value.is_floating_point():
                value = value.detach().cpu()
                self.by_shape[tuple(value.shape)].append(Truth("the input", value, value.double()))

    @classmethod
    def of(cls, reference: Reference, inputs: Arguments) -> Values:
        """Those of a model."""
        own = trace(reference.copy_in(None), inputs)
        wide = None
        if reference.failure is None:
            wide = trace(reference.copy_in(torch.float64), inputs, torch.float64)
        return cls(own, wide, inputs)

    def maker(self, wanted: Truth) -> str | None:
        """The module whose output a value of the reference is; ``None`` where a function made it."""
        for truth in self.by_shape[tuple(wanted.own.shape)]:
            if torch.equal(truth.own, wanted.own):
                return truth.name if truth.call else None
        return None

    def match(self, got: Tensor, same: Truth | None) -> Match:
        """The reference's value of the same place, or else any that ``got`` agrees with."""
        first = Match()
        if same is not None and same.own.shape == got.shape:
            first = excess(got, _as(same.own, got), same.wide, self.limit)
            if first.right:
                return first
        for truth in self.by_shape[tuple(got.shape)]:
            if truth is not same and _alike(got, truth.own):
                found = excess(got, _as(truth.own, got), truth.wide, self.limit)
                if found.right:
                    return replace(found, like=truth.name, moved=same is not None)
        return first


def _pairs(own: Trace, wide: Trace | None) -> Iterator[tuple[Entry, Entry | None]]:
    """Calls first: a value is better named after a module than after a function in its code."""
    calls = [*own.entries, *own.between]
    exact: list[Entry] | list[None] = [None] * len(calls) if wide is None else [*wide.entries, *wide.between]
    yield from zip(calls, exact, strict=True)


def limit_of(worst: float) -> float:
    """How far a value inside may exceed what is allowed, where an output exceeds it ``worst`` times.

    Rounding that is magnified on the way may exceed it a little at many places; it is not what to look for then."""
    return min(MOST, max(1.0, math.sqrt(worst)))


def _as(own: Tensor, got: Tensor) -> Tensor:
    return own if own.dtype == got.dtype else own.to(got.dtype)


def _shape_of(found: Trace) -> list[tuple[str, int]]:
    return [(entry.name, len(entry.outputs)) for entry in (*found.entries, *found.between)]


def _alike(got: Tensor, own: Tensor) -> bool:
    """A quick look at a few values."""
    step = max(1, got.numel() // _PROBE)
    a, b = got.reshape(-1)[::step].double(), own.reshape(-1)[::step].double()
    size = float(b.abs().max()) if b.numel() else 0.0
    return bool(((a - b).abs() <= 0.05 * size).all())


def related(got: Tensor, own: Tensor) -> bool:
    """Whether each channel (axis 1, or the last) of ``own`` is a multiple of that of ``got`` plus a constant."""
    if got.shape != own.shape or got.dim() < 2:
        return False
    return any(_related(got.double(), own.double(), axis) for axis in {1, got.dim() - 1})


def _related(got: Tensor, own: Tensor, axis: int) -> bool:
    x, y = (value.movedim(axis, 0).flatten(1) for value in (got, own))
    # On few or nearly equal values all is a line. A norm changes all channels, an activation leaves some alone.
    same = ((x - y).abs() <= 1e-6 * y.abs().max()).all(1) & (y != 0).any(1)
    if same.any() and not same.all():
        return False
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    slope = (x * y).sum(1, keepdim=True) / x.square().sum(1, keepdim=True).clamp_min(1e-300)
    left, whole = float((y - slope * x).square().sum()), float(y.square().sum())
    return left <= _RELATED**2 * whole


@dataclass
class Search:
    """The candidate's trace beside the reference's values."""

    values: Values
    found: Trace
    wrong_outputs: frozenset[str]
    """The outputs of the model that differ."""
    reference: Reference | None = None
    """Where its modules can be run on the candidate's inputs."""
    matches: dict[int, tuple[Match, ...]] = field(default_factory=dict)
    readers: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    """By position, the innermost calls that read a call's output; -1 for a wrong output of the model."""
    cleared: set[int] = field(default_factory=set)
    innocent: set[int] = field(default_factory=set)

    def run(self) -> Place | None:
        """The first place, or ``None`` where everything inside is right."""
        for index, entry in enumerate(self.found.entries):
            self.matches[index] = tuple(map(self.values.match, entry.outputs, self._same_outputs(entry)))
        self._clear()
        for index, entry in enumerate(self.found.entries):
            if not entry.outputs or self.settled(index):
                continue
            place = self._inner(index) if entry.innermost else self._outer(index)
            if place is not None:
                self._show(place.position)
                return place
        return None

    def _show(self, position: int) -> None:
        """Give the figures of a place against the reference's value of that place, not one that it agrees with."""
        entry = self.found.entries[position]
        for number, (got, same) in enumerate(zip(entry.outputs, self._same_outputs(entry), strict=True)):
            if same is not None and same.own.shape == got.shape:
                matches = list(self.matches[position])
                matches[number] = excess(got, _as(same.own, got), same.wide, self.values.limit)
                self.matches[position] = tuple(matches)

    def _same_outputs(self, entry: Entry) -> list[Truth | None]:
        return [self.values.by_place.get((entry.name, entry.call, n)) for n in range(len(entry.outputs))]

    def _same_input(self, entry: Entry, number: int) -> Truth | None:
        """The reference's value of an input; of an operator that of its module, unless it works on what that made."""
        inside = f"{entry.name}."
        made = entry.operator and any(self.found.entries[each].name.startswith(inside) for each in entry.sources)
        if made or not entry.placed:
            return None
        return self.values.inputs.get((entry.name, entry.call, number))

    def settled(self, index: int) -> bool:
        """Whether the outputs of a call are the reference's of the same place, or everything that reads them is."""
        matches = self.matches[index]  # None of a call that gives no tensor: what reads that decides.
        return index in self.cleared or (bool(matches) and all(match.in_place for match in matches))

    def right(self, index: int) -> bool:
        """Whether the outputs of a call are right, be it in another place."""
        return all(match.right for match in self.matches[index])

    def _clear(self) -> None:
        for index, entry in enumerate(self.found.entries):
            for source in entry.sources if entry.innermost else ():
                self.readers[source].add(index)
        for output, sources in self.found.final.items():
            for source in sources if output in self.wrong_outputs else ():
                self.readers[source].add(-1)
        for index in reversed(range(len(self.found.entries))):
            readers = self.readers[index]
            if readers and all(reader >= 0 and self.settled(reader) for reader in readers):
                self.cleared.add(index)

    def _inner(self, index: int) -> Place | None:
        """The place if a call of an innermost module, or the code in front of it, is to blame."""
        entry = self.found.entries[index]
        same = self._computes_the_same(entry)
        explained = bool(entry.sources & self.innocent) or self._right_inputs(entry)
        if same:
            self.innocent.add(index)
        if not explained:
            return self._between(index)
        if same:
            return None
        if self.right(index) and self.reference is None:
            return None
        if self.right(index) and self._moved_on(index):
            self.innocent.add(index)
            return None
        return Place(entry, entry.name, entry.kind, "", index)

    def _moved_on(self, index: int) -> bool:
        """Whether a channel affine that is gone here may be in what reads it, which then is not the same either.

        What computes the same, such as a pooling layer, passes it on."""
        entry = self.found.entries[index]
        pairs = zip(entry.outputs, self._same_outputs(entry), strict=True)
        if not all(same is None or related(got, same.own) for got, same in pairs):
            return False
        readers = self.readers[index]
        return -1 not in readers and all(
            not self._computes_the_same(self.found.entries[reader]) or self._moved_on(reader) for reader in readers
        )

    def _outer(self, index: int) -> Place | None:
        """The place if a module gives a wrong output from right outputs of the modules in it."""
        entry = self.found.entries[index]
        if not all(map(self.settled, entry.made_of)) or not self._right_inputs(entry):
            return None
        if self.right(index) and self._moved_on(index):
            return None
        if self._computes_the_same(entry):
            return None
        return Place(entry, entry.name, entry.kind, "in its own code, behind the modules in it", index)

    def _right_inputs(self, entry: Entry) -> bool:
        for number, value in enumerate(entry.inputs):
            same = self._same_input(entry, number)
            match = self.values.match(value, same)
            if not match.right:
                return False
            if match.moved and same is not None and not related(value, same.own):
                return False
        return True

    def _between(self, index: int) -> Place:
        """What is to blame for the wrong input of a call when all that it was made of is right.

        Where the input is another value of the reference, the module is missing that makes the one there should be."""
        entry = self.found.entries[index]
        kinds = {each.name: each.kind for each in self.found.entries} | self.values.kinds
        for number, value in enumerate(entry.inputs):
            same = self._same_input(entry, number)
            match = self.values.match(value, same)
            maker = self.values.maker(same) if same is not None and match.right and match.moved else None
            if maker is not None and maker != match.like:
                return Place(entry, maker, kinds.get(maker, "module"), f"left out in front of {entry.name}", index)
        holder = entry.name.rpartition(".")[0]
        detail = f"in its own code, in front of {entry.name}"
        return Place(entry, holder, kinds.get(holder, "module"), detail, index)

    def _computes_the_same(self, entry: Entry) -> bool:
        """Whether the reference's module of the same name gives this output on this input."""
        reference = self.reference
        if reference is None or reference.model is None or entry.given is None:
            return False
        args, kwargs = entry.given
        try:
            own_module = reference.copy_in(None).get_submodule(entry.name)
            own = _called(own_module, args, kwargs, None)
            wide: tuple[Tensor, ...] | None = None
            if reference.failure is None:
                wide = _called(reference.copy_in(torch.float64).get_submodule(entry.name), args, kwargs, torch.float64)
        except Exception:
            return False
        if [value.shape for value in own] != [value.shape for value in entry.outputs]:
            return False
        pairs = zip(entry.outputs, own, wide or (None,) * len(own), strict=True)
        return all(excess(got, _as(mine, got), exact, self.values.limit).right for got, mine, exact in pairs)

    def layers(self) -> tuple[Layer, ...]:
        """The innermost calls in execution order."""
        found = []
        for index, entry in enumerate(self.found.entries):
            if entry.innermost and self.matches.get(index):
                match = max(self.matches[index], key=lambda each: -1.0 if each.excess is None else each.excess)
                figures = (match.error, match.floor, match.excess, match.like, match.allowed)
                found.append(Layer(entry.name, entry.kind, *figures))
        return tuple(found)

    def around(self, position: int) -> tuple[Layer, ...]:
        """The figures of the calls at a place, and of those just before and behind it."""
        indices = [i for i, entry in enumerate(self.found.entries) if entry.innermost and self.matches.get(i)]
        nearest = min(range(len(indices)), key=lambda i: abs(indices[i] - position), default=0)
        return self.layers()[max(0, nearest - AROUND) : nearest + AROUND + 1]


def _called(module: nn.Module, args: Any, kwargs: Any, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    def run(mode: Precision | None) -> tuple[Tensor, ...]:
        def given(leaf: object) -> object:
            leaf = leaf.clone() if isinstance(leaf, Tensor) else leaf
            return leaf if mode is None else mode.cast(leaf)

        output = module(*tree_map(given, args), **tree_map(given, kwargs))
        found = (value for value in flatten(output).values() if isinstance(value, Tensor))
        return tuple(value for value in found if value.is_floating_point())

    with fixed_random((args, kwargs)), torch.no_grad():
        if dtype is None:
            return run(None)
        with precision(dtype) as mode:
            return run(mode)
