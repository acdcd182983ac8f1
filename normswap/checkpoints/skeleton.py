"""The norms of a model whose code is not there, from the keys and shapes of its state dict.

``running_mean`` and ``running_var`` of one size, with or without ``weight``, ``bias`` and ``num_batches_tracked``
beside them, are a batch norm; what else is beside them tells that it is none. The skeleton is a tree of modules with
the names of the model's that holds these norms and nothing else, so that what is done to a model can be done to it.

What keys cannot tell: eps and momentum (a recipe takes them from the model itself), whether an input is ``(N, C)``,
whether a batch norm is a frozen one, a synchronized one, or an instance norm that tracks statistics; and norms without
running statistics, whose ``weight`` and ``bias`` look like those of anything that scales channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from normswap.checkpoints.keys import canonical
from normswap.checkpoints.lazy import LazyTensors, shape_of
from normswap.norms.batch import BatchNorm

FIELDS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
COUNTER = "num_batches_tracked"
LAYER = "keys do not tell a layer, group or instance norm from another scale of channels: pass --model"
RMS = "keys do not tell an RMS norm from a PReLU or another scale of channels: pass --model"


@dataclass(frozen=True)
class Skeleton:
    """Norms found, under names as in the model."""

    model: nn.Module
    prefixes: dict[str, str]
    """By name of a norm, what its keys begin with in the file, without the dot."""
    unknown: dict[str, str] = field(default_factory=dict)
    """By name, why what may be a norm is not taken for one."""
    notes: tuple[str, ...] = ()


def skeleton_of(tensors: Mapping[str, Tensor]) -> Skeleton:
    """The norms in a state dict; only their tensors are read."""
    groups: dict[str, list[str]] = {}
    for name in tensors:
        owner, _, last = name.rpartition(".")
        groups.setdefault(owner, []).append(last)
    root = nn.Module().eval()
    skeleton = Skeleton(root, {}, {})
    shared: dict[tuple[int, ...], nn.Module] = {}
    counters: list[bool] = []
    wrapped = all(name.startswith("module.") for name in tensors)
    for owner, fields in groups.items():
        reason = _refusal(tensors, owner, fields, groups)
        if reason is None:
            continue
        name = canonical(owner).removeprefix("module." if wrapped else "")
        if reason:
            skeleton.unknown[name] = reason
            continue
        counters.append(COUNTER in fields)
        held = {last: tensors[_join(owner, last)] for last in fields}
        # The same memory under two names is one module; a tensor read when asked for has memory of its own each time.
        places = tuple(value.data_ptr() for value in held.values() if value.numel())
        module = None if isinstance(tensors, LazyTensors) else shared.get(places)
        if module is None:
            # Copies, for what is done to the norm must not be done to the file's own values, which may be mapped.
            module = shared.setdefault(places, _norm({last: value.clone() for last, value in held.items()}))
        if not name:
            return Skeleton(module, {"": owner}, {}, _notes(counters))
        _place(root, name, module)
        skeleton.prefixes[name] = owner
    return Skeleton(root, skeleton.prefixes, skeleton.unknown, _notes(counters))


def _notes(counters: list[bool]) -> tuple[str, ...]:
    notes = ["the norms were found by their keys and shapes alone, without the model's code"]
    if counters and not any(counters):
        notes.append(
            "no norm has num_batches_tracked: the file is older than torch 0.4.1, or its norms are frozen; the recipe "
            "then refuses the model"
        )
    return tuple(notes)


def _join(owner: str, last: str) -> str:
    return f"{owner}.{last}" if owner else last


def _refusal(tensors: Mapping[str, Any], owner: str, fields: list[str], groups: Mapping[str, Any]) -> str | None:
    """``None`` for what is no norm, an empty text for a batch norm, else why it is not known to be one."""
    shapes = {last: shape_of(tensors, _join(owner, last)).shape for last in fields}
    if not {"running_mean", "running_var"} & shapes.keys():
        if shapes.keys() == {"weight", "bias"} and len(shapes["weight"]) == 1 and shapes["bias"] == shapes["weight"]:
            return LAYER
        return RMS if shapes.keys() == {"weight"} and len(shapes["weight"]) == 1 else None
    if missing := {"running_mean", "running_var"} - shapes.keys():
        return f"it has running statistics without {', '.join(missing)}, unlike a batch norm"
    if others := sorted(shapes.keys() - set(FIELDS)):
        return f"it has {', '.join(others)} too, which no batch norm has: pass --model"
    if _join(owner, "parametrizations.weight") in groups or _join(owner, "parametrizations.bias") in groups:
        return "its weight is computed by a parametrization: pass --model"
    size = shapes["running_mean"]
    if len(size) != 1 or any(shapes[last] != size for last in shapes if last != COUNTER):
        return f"its tensors are not all of one size {size}, unlike those of a batch norm"
    return ""


def _norm(held: Mapping[str, Tensor]) -> nn.Module:
    """A norm with these parameters and buffers."""
    module = BatchNorm(held["running_mean"].shape[0], affine=False)
    module.affine = "weight" in held or "bias" in held
    for last in ("weight", "bias"):
        module.register_parameter(last, nn.Parameter(held[last]) if last in held else None)
    module.running_mean, module.running_var = held["running_mean"], held["running_var"]
    module.num_batches_tracked = held.get(COUNTER)
    return module.eval()


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    *owners, last = name.split(".")
    home = root
    for part in owners:
        child = home._modules.get(part)
        if child is None:
            child = nn.Module().eval()
            home.add_module(part, child)
        home = child
    inside = home._modules.get(last)
    for inner, child in {} if inside is None else inside._modules.items():
        module.add_module(inner, child)
    home.add_module(last, module)
