"""Names in a file and names in a model: the prefixes that wrappers put before them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

PREFIXES = ("module.", "model.")
"""Prefixes of wrappers, alone or one after another. A model may also have a submodule of that name."""


MARKERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of a key that torch's wrappers put in, anywhere in it. No model has them by itself."""


def canonical(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in MARKERS)


@dataclass(frozen=True)
class Fit:
    """For each name in the file the model's, where there is one, and the prefixes dropped and added on the way."""

    names: dict[str, str]
    drop: str = ""
    add: str = ""
    notes: tuple[str, ...] = ()


def fit_names(tensors: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> Fit:
    """The renaming by the fewest prefixes that matches the most names."""
    ours = {canonical(name): name for name in wanted}
    theirs = {name: canonical(name) for name in tensors}
    best, most = Fit({name: name for name in tensors}), sum(name in wanted for name in tensors)
    pairs = [(drop, add) for drop in prefixes_of(theirs.values()) for add in prefixes_of(ours)]
    for drop, add in sorted(pairs, key=lambda pair: (len(pair[0]) + len(pair[1]), pair)):
        names = {}
        for name, plain in theirs.items():
            bare = plain.removeprefix(drop)
            names[name] = ours.get(add + bare) or ours.get(bare) or (bare if drop else name)
        count = sum(name in wanted for name in names.values())
        if count > most and len(set(names.values())) == len(names):
            steps = [f"dropped the prefix {drop!r}"] if drop else []
            steps += [f"added the prefix {add!r}"] if add else []
            text = " and ".join(steps) or "left out the marks of wrappers"
            best, most = Fit(names, drop, add, (f"{text} ({count} of {len(names)} keys match)",)), count
    return best


def prefixes_of(names: Iterable[str]) -> set[str]:
    """Every run of :data:`PREFIXES` that some name begins with, and the empty one."""
    found = {""}
    for name in names:
        run = ""
        while (step := next((prefix for prefix in PREFIXES if name.startswith(run + prefix)), None)) is not None:
            run += step
            found.add(run)
    return found


def names_in_file(fit: Fit, names: Iterable[str]) -> dict[str, str]:
    """For each name in the model, after its norms changed, the one it gets in a file with the prefixes of the first."""
    homes = {own.rpartition(".")[0]: theirs.rpartition(".")[0] for theirs, own in fit.names.items()}
    found = {}
    for name in names:
        owner, last = name.rpartition(".")[0], [name.rpartition(".")[2]]
        while owner and owner not in homes:
            owner, _, part = owner.rpartition(".")
            last.insert(0, part)
        if owner in homes:
            found[name] = ".".join([*([homes[owner]] if homes[owner] else []), *last])
        else:
            found[name] = fit.drop + name.removeprefix(fit.add)
    return found


def renamed_for(names: Iterable[str], present: Iterable[str]) -> dict[str, str] | None:
    """The names with other prefixes, so that all of them are ``present``; ``None`` where no prefix does that."""
    wanted, there = list(names), set(present)
    pairs = [(drop, add) for drop in prefixes_of(f"{name}." for name in wanted) for add in prefixes_of(there)]
    for drop, add in sorted(pairs, key=lambda pair: (len(pair[0]) + len(pair[1]), pair)):
        renamed = {name: add + name.removeprefix(drop) for name in wanted}
        if there.issuperset(renamed.values()) and len(set(renamed.values())) == len(wanted):
            return renamed
    return None
