"""Moving an optimizer from a model to its converted form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from normswap.spec import Norm


@dataclass(frozen=True)
class Remapped:
    """How many parameters kept their place and state, left the optimizer, and joined it."""

    kept: int
    dropped: int
    added: int


def remap(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    twins: dict[int, nn.Parameter],
    norms: Sequence[tuple[str, Norm]],
) -> Remapped:
    """Rewrite ``optimizer.param_groups`` and ``state`` for ``model``; ``twins`` maps old parameters to their copies."""
    alive = {id(parameter) for parameter in model.parameters()}
    known = {id(twin) for twin in twins.values()}
    homes: dict[str, int] = {}
    names = {id(twin): name for name, twin in _norm_parameters(norms, twins)}
    kept = dropped = added = 0
    for index, group in enumerate(optimizer.param_groups):
        parameters = []
        for old in group["params"]:
            new = twins.get(id(old), old)
            if id(old) in twins and id(new) in names:
                homes.setdefault(names[id(new)], index)
            if id(old) in twins and id(new) not in alive:
                optimizer.state.pop(old, None)
                dropped += 1
                continue
            if new is not old and old in optimizer.state:
                optimizer.state[new] = optimizer.state.pop(old)
            parameters.append(new)
            kept += 1
        group["params"] = parameters
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if id(parameter) in known or id(parameter) in held:
            continue
        owner = next((norm for norm, _ in norms if name.startswith(f"{norm}.") or not norm), None)
        if owner is not None and owner in homes:
            optimizer.param_groups[homes[owner]]["params"].append(parameter)
            added += 1
    _rename(optimizer, model)
    return Remapped(kept, dropped, added)


def _rename(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """The names in an optimizer that was made from ``named_parameters()``."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        if "param_names" in group:
            group["param_names"] = [names.get(id(parameter), "") for parameter in group["params"]]


def _norm_parameters(
    norms: Sequence[tuple[str, Norm]], twins: dict[int, nn.Parameter]
) -> list[tuple[str, nn.Parameter]]:
    found = []
    for name, norm in norms:
        for tensor in norm.tensors.values():
            if id(tensor) in twins:
                found.append((name, twins[id(tensor)]))
    return found
