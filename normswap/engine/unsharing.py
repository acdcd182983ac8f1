"""Which layers get a copy of their own for each of the norms that they would have to absorb.

A layer that is called at several places, or whose weight another module has too, can absorb only what all of them
need. To find what is to be copied, everything that stands in the way is taken apart at once, in the model itself and
for the time of a look: every place gets its own copy (in the memory of the original), and the fold is searched. Places
that absorb the same of the same norms are then put together again. What is left is the :class:`Unsharing` that the plan
is made on, after which the model is as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from torch import fx, nn
from torch.nn.utils import parametrize

from normswap.engine.plan import Plan
from normswap.engine.search import Search
from normswap.errors import FixedArgument, Refusal
from normswap.graph.reach import reach
from normswap.graph.references import references
from normswap.graph.rewrite import Before, traced_forward
from normswap.graph.separate import Calls, Copied, Unsharing, calls, inside, joined, take, untie

Need = tuple[Any, ...]
"""What a layer absorbs: the names of norms, and on which side."""
_PLAIN = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass
class Split:
    """The calls of one module's ``forward`` taken apart."""

    module: str
    total: int
    """How many calls there are."""
    copies: dict[str, dict[int, Copied]]
    """For each child that is called several times, the copies by the number of the call, the first call excepted."""

    @property
    def made(self) -> list[Copied]:
        return [copied for copies in self.copies.values() for copied in copies.values()]


@dataclass
class Apart:
    """A model in which every place of some layers has a layer of its own."""

    steps: list[Copied | Split] = field(default_factory=list)
    layers: dict[str, int] = field(default_factory=dict)
    """Places by name, and the ``id`` of the layer that was there."""
    untied: list[str] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    """Why places of a layer, by its ``id``, could not be taken apart."""

    def within(self, name: str) -> dict[str, str]:
        """The places in a module: path inside it -> name."""
        return {path[len(name) :].lstrip("."): path for path in self.layers if inside(path, name)}


@contextmanager
def apart(model: nn.Module, layers: Iterable[nn.Module], fixed: Mapping[str, str]) -> Iterator[Apart]:
    """Within it, every place of ``layers`` has a layer of its own; ``fixed``: modules whose ``forward`` must stay, by
    name, and why."""
    before = Before(model)
    try:
        yield _Taking(model, {id(layer): layer for layer in layers}, fixed).run()
    finally:
        before.restore()


class _Taking:
    def __init__(self, model: nn.Module, layers: Mapping[int, nn.Module], fixed: Mapping[str, str]) -> None:
        self.model = model
        self.originals = layers
        self.fixed = fixed
        self.found = references(model)
        self.made = Apart()
        self.bare: dict[int, str | None] = {}

    def run(self) -> Apart:
        for identity in self.originals:
            self.made.layers[self.found[identity].name] = identity
        self._slots(self.model, "", self._carriers(), {id(self.model): ""})
        owners: dict[int, int] = {}
        for module in self.model.modules():
            for parameter in module._parameters.values():
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        for identity, layer in self.originals.items():
            for key, parameter in layer._parameters.items():
                if parameter is not None and owners[id(parameter)] > 1:
                    self.made.untied.append(joined(self.found[identity].name, key))
                    untie(self.model, self.made.untied[-1], own_memory=False)
        carriers = self._carriers()
        for name, module in reversed(list(self.model.named_modules())):  # children before parents
            if id(module) in carriers and not isinstance(module, _PLAIN) and name not in self.made.layers:
                self._calls(module, name, carriers)
        return self.made

    def _carriers(self) -> set[int]:
        """The modules that are, or hold, a layer."""
        found: set[int] = set()
        names = [*self.made.layers, *(name for identity in self.originals for name in self.found[identity].names)]
        for name in names:
            module = self.model
            found.add(id(module))
            for part in name.split("."):
                child = module._modules.get(part)
                if child is None:  # a name by a plain attribute
                    break
                module = child
                found.add(id(module))
        return found

    def _slots(self, module: nn.Module, name: str, carriers: set[int], first: dict[int, str]) -> None:
        for key, child in list(module._modules.items()):
            if child is None or id(child) not in carriers:
                continue
            path = joined(name, key)
            if id(child) not in first:
                first[id(child)] = path
                self._slots(child, path, carriers, first)
                continue
            original = first[id(child)]
            if inside(path, original) or not self._may_copy(child, original):
                continue
            step = self._copied(path, original)
            take(self.model, step, own_memory=False)
            self.made.steps.append(step)

    def _copied(self, path: str, original: str) -> Copied:
        places = self.made.within(original)
        step = Copied(path, original, {inner: joined(path, inner) for inner in places})
        self.made.layers.update({joined(path, inner): self.made.layers[place] for inner, place in places.items()})
        return step

    def _calls(self, module: nn.Module, name: str, carriers: set[int]) -> None:
        try:
            if name in self.fixed:
                raise Refusal(self.fixed[name])
            called = calls(module)
        except Refusal as refusal:
            self._note(name, f"{name or 'the model'}: {refusal.reason}")
            return
        names: dict[int, str] = {}
        split = Split(name, len(called), {})
        for target in [target for target, times in Counter(called).items() if times > 1]:
            child = module.get_submodule(target)
            original = joined(name, target)
            if id(child) not in carriers or not self.made.within(original) or not self._may_copy(child, original):
                continue
            numbers = [number for number, each in enumerate(called) if each == target][1:]
            split.copies[target] = {}
            for number, new in zip(numbers, _free(module, target.replace(".", "_"), len(numbers)), strict=True):
                names[number] = new
                split.copies[target][number] = step = self._copied(joined(name, new), original)
                take(self.model, step, own_memory=False)
        if names:
            take(self.model, Calls(name, len(called), names), own_memory=False)
            self.made.steps.append(split)

    def _note(self, name: str, reason: str, *, sure: bool = False) -> None:
        for path, identity in self.made.layers.items():
            if inside(path, name) and (sure or identity not in self.made.reasons):
                self.made.reasons[identity] = reason

    def _may_copy(self, module: nn.Module, name: str) -> bool:
        places = self.made.within(name)
        between = {path.rpartition(".")[0] for path in places.values() if inside(path.rpartition(".")[0], name)}
        for path in sorted({*places.values(), *between, name}):
            part = self.model.get_submodule(path)
            if id(part) not in self.bare:
                self.bare[id(part)] = self._why_not(part, layer=path in self.made.layers)
            if (reason := self.bare[id(part)]) is not None:
                self._note(name, f"{path} {reason}", sure=True)
                return False
        return True

    def _why_not(self, module: nn.Module, layer: bool) -> str | None:
        """Why a second object like this one would not do the same."""
        if any(value for key, value in vars(module).items() if "hook" in key and isinstance(value, dict)):
            return "is parametrized" if parametrize.is_parametrized(module) else "has hooks"
        reference = self.found.get(id(module))
        if reference is not None:
            if reference.captured is not None:
                return f"is also held by {reference.captured} in a closure, method or object"
            tables = [id(parent._modules) for parent in reference.parents]
            if any(slot.outer is not None or id(slot.container) not in tables for slot in reference.slots):
                return "is also held in a plain attribute"
        if layer or isinstance(module, _PLAIN):
            return None
        if isinstance(module, fx.GraphModule):
            return "is a GraphModule"
        if reach(module).functions:
            return "calls a norm function"
        try:
            traced_forward(module, "its forward would run in several objects")
        except Refusal as refusal:
            return f"may keep something between calls: {refusal.reason}"
        return None


def find_unsharing(
    model: nn.Module, plan: Callable[[Mapping[int, str] | None], tuple[Plan, Search]], search: Search
) -> tuple[Unsharing, dict[int, str]]:
    """What must be unshared for the norms that a ``search`` left, and why layers, by ``id``, cannot be.

    ``plan`` plans and searches the model as it is at the time."""
    layers: dict[int, nn.Module] = {}
    fixed: dict[str, str] = {}
    latest, needs = Apart(), dict[str, Need | None]()
    new = search.blocking()
    again = bool(new)
    while again:
        layers |= new
        with apart(model, layers.values(), fixed) as taken:
            result, search = plan(taken.reasons)
            places = {path: model.get_submodule(path) for path in taken.layers}
            original = {id(place): taken.layers[path] for path, place in places.items()}
            new = {i: m for i, m in search.blocking().items() if original.get(i, i) not in layers}
            needs = _needs(result, search, places)
            failed = {
                step.module: search.flow.failed.get(step.module, "") for step in taken.steps if isinstance(step, Split)
            }
        called = {name: why for name, why in failed.items() if why.startswith(FixedArgument.__name__)}
        fixed |= called
        again = bool(new or called)
        latest = taken
    return together(latest, needs), latest.reasons


def _needs(plan: Plan, search: Search, places: Mapping[str, nn.Module]) -> dict[str, Need | None]:
    absorbed: dict[str, list[tuple[str, str]]] = {}
    for change in sorted(plan.changes, key=lambda change: 0 if change.fold is None else change.fold.order):
        for step in [] if change.fold is None else change.fold.steps:
            absorbed.setdefault(step.name, []).append((change.name, step.side))
    needs: dict[str, Need | None] = {}
    for path, place in places.items():
        need = tuple(absorbed.get(search.references[id(place)].name, ()))
        needs[path] = need if need or search.flow.may_run(place) else None
    return needs


def _free(module: nn.Module, base: str, number: int) -> Iterator[str]:
    """New names for children: ``base_1``, ``base_2`` ..."""
    names = (name for i in count(1) if not hasattr(module, name := f"{base}_{i}"))
    return (next(names) for _ in range(number))


def together(taken: Apart, needs: Mapping[str, Need | None]) -> Unsharing:
    """Put together what need not be apart; ``needs``: what each place absorbs, ``None`` for a place that nothing
    calls."""
    return _Together(taken, needs).run()


class _Together:
    def __init__(self, taken: Apart, needs: Mapping[str, Need | None]) -> None:
        self.taken = taken
        self.needs: dict[str, Need] = {path: need for path, need in needs.items() if need is not None}
        self.made = [
            (copied.name, copied.of)
            for step in taken.steps
            for copied in ([step] if isinstance(step, Copied) else step.made)
        ]
        for name, of in self.made:  # a place that nothing calls needs what its original does
            for inner, path in taken.within(name).items():
                self.needs.setdefault(path, self.needs.get(joined(of, inner), ()))
        self.users: dict[tuple[int, Need], str] = {}
        """The first place where a layer absorbs something."""
        self.dropped: set[str] = set()
        """Copies for calls that are not made."""
        self.merged: dict[str, str] = {}
        """Slots that get, or keep, the object of another."""
        self.steps: list[Copied | Calls] = []

    def run(self) -> Unsharing:
        copies = {joined(copied, inner) for copied, _ in self.made for inner in self.taken.within(copied)}
        for path, identity in self.taken.layers.items():
            if path not in copies:
                self.users.setdefault((identity, self.needs.get(path, ())), path)
        siblings: dict[str, list[str]] = {}
        for step in self.taken.steps:
            if isinstance(step, Copied):
                self._slot(step, siblings.setdefault(step.of, [step.of]))
            elif self._kept(step.module) == step.module:
                self._split(step)
        untied = [name for name in self.taken.untied if self.needs.get(name.rpartition(".")[0])]
        return Unsharing(tuple(self.steps), tuple(untied))

    def _kept(self, path: str) -> str | None:
        """The name by which a place is known once slots are merged; ``None`` for one in a copy that is not made."""
        while (slot := next((name for name in self.merged if inside(path, name)), None)) is not None:
            path = self.merged[slot] + path[len(slot) :]
        return None if any(inside(path, name) for name in self.dropped) else path

    def _within(self, name: str) -> dict[str, Need]:
        return {inner: self.needs.get(path, ()) for inner, path in self.taken.within(name).items()}

    def _slot(self, step: Copied, siblings: list[str]) -> None:
        same = next((name for name in siblings if self._within(name) == self._within(step.name)), None)
        if same is None:
            siblings.append(step.name)
            self.steps.append(self._made(step))
            return
        self.merged[step.name] = same
        if same != step.of:
            self.steps.append(Copied(step.name, same, {}))

    def _split(self, step: Split) -> None:
        objects = self._copies_of(step)
        names: dict[int, str] = {}
        for target, copies in step.copies.items():
            kept = [target]
            for number, copied in copies.items():
                name = copied.name[len(step.module) :].lstrip(".")
                same = next((other for other in kept if self._alike(objects, name, other)), None)
                if same is None:
                    kept.append(name)
                    self.steps.append(self._made(copied))
                else:
                    self.dropped.add(copied.name)
                if same != target:
                    names[number] = same or name
        if names:
            self.steps.append(Calls(step.module, step.total, names))

    def _copies_of(self, step: Split) -> list[str]:
        """The module, and the copies that are made of it after its calls were taken apart."""
        later = {copied.name for copied in step.made}
        start = max((i + 1 for i, (name, _) in enumerate(self.made) if name in later), default=0)
        names = [step.module]
        for copied, of in self.made[start:]:
            source = self._kept(of)
            names += [copied + name[len(source) :] for name in list(names) if source and inside(name, source)]
        return names

    def _alike(self, objects: Iterable[str], name: str, other: str) -> bool:
        return all(self._within(joined(each, name)) == self._within(joined(each, other)) for each in objects)

    def _made(self, step: Copied) -> Copied:
        """The copy with the layers that it needs for itself, and those that others have already."""
        layers: dict[str, str] = {}
        for inner in step.layers:
            if self._kept(joined(step.of, inner)) is None:
                continue
            path = joined(step.name, inner)
            user = self.users.setdefault((self.taken.layers[path], self.needs.get(path, ())), path)
            layers[inner] = user
        return Copied(step.name, step.of, layers)
