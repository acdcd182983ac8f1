"""The rest of a training checkpoint: carried through as it is, but for the state of an optimizer.

An optimizer's state numbers its parameters, group after group, in the order they were given to it. It names them only
where it was made from ``named_parameters()``, or was saved by name (``torch.distributed.checkpoint.state_dict``).
Otherwise the names are those of the model's parameters in their order,
for one group, or with those of one axis first or last, for two (weight decay for the others alone); the shapes in the
state must then agree with every one of them. Where they do not, who is who is not known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from normswap.checkpoints.words import first

Parameters = Mapping[str, tuple[int, ...]]
"""Shapes by name, in the order of ``named_parameters()``."""


def with_state(
    whole: Any, key: str | None, state: Mapping[str, Any], before: Parameters, after: Parameters
) -> tuple[Any, list[str]]:
    """What a file held, with ``state`` in the place of the state dict at ``key``, and notes on the rest.

    Optimizer states are numbered anew where parameters came or went: those that survive keep theirs, new ones have
    none. One whose parameters cannot be told apart is left out, for it would be loaded for others than its own.
    """
    notes: list[str] = []
    if key is None:
        return state, notes
    changed = list(before) != list(after)
    rebuilt = _put(whole, key.split("."), state)
    if not isinstance(rebuilt, dict):
        return rebuilt, notes
    for name, value in list(rebuilt.items()):
        if _is_optimizer(value):
            if changed:
                rebuilt[name], note = _remapped(value, before, after)
                notes.append(f"{name}: {note}")
                if rebuilt[name] is None:
                    del rebuilt[name]
            else:
                notes.append(f"{name}: unchanged, for the model has the same parameters")
        elif _are_optimizers(value) and not changed:
            notes.append(f"{name}: unchanged, for the model has the same parameters")
        elif _are_optimizers(value):
            pairs = [_remapped(each, before, after) for each in value]
            notes += [f"{name}[{index}]: {note}" for index, (_, note) in enumerate(pairs)]
            rebuilt[name] = [each for each, _ in pairs if each is not None]
    own = key.split(".")[0]
    others = [str(n) for n, v in rebuilt.items() if n != own and not _is_optimizer(v) and not _are_optimizers(v)]
    if others:
        notes.append(f"carried through unchanged: {first(others)}")
    return rebuilt, notes


def _put(whole: Any, path: Sequence[str], state: Mapping[str, Any]) -> Any:
    if not path:
        return state
    copy = whole.copy() if hasattr(whole, "copy") else dict(whole)
    # A name may have dots itself: the longest that is there is taken.
    for size in range(len(path), 0, -1):
        name = ".".join(path[:size])
        if name in copy:
            copy[name] = _put(copy[name], path[size:], state)
            return copy
    return copy


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, Mapping) and {"state", "param_groups"} <= value.keys() and isinstance(value["state"], dict)


def _are_optimizers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_optimizer, value))


def _remapped(optimizer: Mapping[str, Any], before: Parameters, after: Parameters) -> tuple[Any, str]:
    groups = optimizer["param_groups"]
    if _by_name(groups):
        return _selected(optimizer, before, after)
    try:
        numbers = [list(group["params"]) for group in groups]
        named = _names(optimizer["state"], groups, numbers, before)
    except (TypeError, KeyError, AttributeError):
        named = None
    if named is None:
        return None, "left out, for its parameters cannot be told apart once some came or went: start it afresh"
    homes = {_owner(name): index for index, names in enumerate(named) for name in names}
    known = {name for names in named for name in names}
    added = [name for name in after if name not in known and name not in before and _owner(name) in homes]
    order = {name: position for position, name in enumerate(after)}
    state: dict[Any, Any] = {}
    fresh_groups, number, kept = [], 0, 0
    old_number = {name: n for names, ns in zip(named, numbers, strict=True) for name, n in zip(names, ns, strict=True)}
    for index, (group, names) in enumerate(zip(groups, named, strict=True)):
        new = [name for name in names if name in order] + [name for name in added if homes[_owner(name)] == index]
        if names == sorted(names, key=list(before).index):
            new.sort(key=order.__getitem__)
        for name in new:
            if old_number.get(name) in optimizer["state"]:
                state[number + new.index(name)] = optimizer["state"][old_number[name]]
        kept += sum(name in old_number for name in new)
        fresh = {**group, "params": list(range(number, number + len(new)))}
        fresh_groups.append({**fresh, "param_names": new} if "param_names" in group else fresh)
        number += len(new)
    dropped = sum(map(len, named)) - kept
    text = f"{kept} parameters keep their state, {dropped} dropped, {len(added)} new without one"
    return {**optimizer, "state": state, "param_groups": fresh_groups}, text


def _by_name(groups: Any) -> bool:
    """Whether parameters are named, not numbered, as ``torch.distributed.checkpoint`` has them."""
    try:
        return all(isinstance(name, str) for group in groups for name in group["params"])
    except (TypeError, KeyError):
        return False


def _selected(optimizer: Mapping[str, Any], before: Parameters, after: Parameters) -> tuple[Any, str]:
    groups, fresh, new = optimizer["param_groups"], [], 0
    known = {name for group in groups for name in group["params"]}
    gone = before.keys() - after.keys()
    owners = {_owner(name): index for index, group in enumerate(groups) for name in group["params"]}
    added = [name for name in after if name not in known and name not in before and _owner(name) in owners]
    for index, group in enumerate(groups):
        own = [name for name in added if owners[_owner(name)] == index]
        fresh.append({**group, "params": [name for name in group["params"] if name not in gone] + own})
        new += len(own)
    state = {name: entry for name, entry in optimizer["state"].items() if name not in gone}
    dropped = len(known & gone)
    text = f"{len(known) - dropped} parameters keep their state, {dropped} dropped, {new} new without one"
    return {**optimizer, "state": state, "param_groups": fresh}, text


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _names(
    state: Mapping[Any, Any], groups: Sequence[Mapping[str, Any]], numbers: list[list[Any]], before: Parameters
) -> list[list[str]] | None:
    """The names of the parameters of each group; ``None`` where they are not known for sure."""
    if all("param_names" in group for group in groups):
        given = [list(group["param_names"]) for group in groups]
        fits = all(len(a) == len(b) and set(a) <= before.keys() for a, b in zip(given, numbers, strict=True))
        return given if fits else None
    names = list(before)
    flat = [name for name in names if len(before[name]) <= 1]
    deep = [name for name in names if len(before[name]) > 1]
    candidates = [[names]] if len(groups) == 1 else [[flat, deep], [deep, flat]]
    for candidate in candidates:
        if [len(part) for part in candidate] == [len(part) for part in numbers] and all(
            _agrees(state.get(number), before[name])
            for part, ns in zip(candidate, numbers, strict=True)
            for name, number in zip(part, ns, strict=True)
        ):
            return candidate
    return None


def _agrees(entry: Any, shape: tuple[int, ...]) -> bool:
    """Whether an optimizer's state for a parameter has its shape; a step count or nothing agrees with any."""
    values = entry.values() if isinstance(entry, Mapping) else ()
    return all(tuple(value.shape) == tuple(shape) for value in values if isinstance(value, Tensor) and value.dim())
