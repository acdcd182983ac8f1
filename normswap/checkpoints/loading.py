"""A checkpoint into a model, with a count of what does not fit."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normswap.checkpoints.keys import Fit, canonical, fit_names
from normswap.checkpoints.reading import Checkpoint
from normswap.checkpoints.words import first
from normswap.errors import NormswapError


def load(model: nn.Module, checkpoint: Checkpoint, *, partial: bool = False) -> list[str]:
    """Load a checkpoint's tensors into ``model``, in place, and return notes on what was done beyond that.

    Keys may carry or lack :data:`PREFIXES` and :data:`MARKERS`; values are cast to the model's dtypes. A missing
    ``num_batches_tracked`` (files older than torch 0.4.1) and a missing name of a tied parameter are noted and left.
    Where the names differ, the model's own loading hooks, which know older names, decide.

    Raises :class:`NormswapError`, with nothing loaded, when keys or shapes do not fit, with counts and the first names;
    ``partial=True`` loads those that fit instead, and raises when none does. Also for a model on the meta device.
    """
    wanted = model.state_dict(keep_vars=True)
    if meta := [name for name, value in wanted.items() if isinstance(value, Tensor) and value.is_meta]:
        raise NormswapError(
            f"{type(model).__name__} has no memory for {first(meta)} (meta device): "
            "call model.to_empty(device='cpu') first"
        )
    fit = fit_names(checkpoint.tensors, wanted)
    state = OrderedDict((fit.names[name], value) for name, value in checkpoint.tensors.items())
    notes = [*fit.notes, *_supplied(state, wanted)]
    if checkpoint.left_out:
        notes.append(f"the file also holds {first(checkpoint.left_out)}, which was not used")
    missing = [name for name, value in wanted.items() if name not in state and isinstance(value, Tensor)]
    unexpected = [name for name in state if name not in wanted]
    misshapen = [name for name, value in wanted.items() if name in state and not _fits(state[name], value)]
    versions = _versions(checkpoint, fit, model)
    problems = _problems(missing, unexpected, misshapen, state, wanted)
    if problems and (hooked := _by_hooks(model, state, versions)) is not None:
        versions = hooked
        notes.append("the model's own loading hooks translated older names")
    elif problems:
        if not partial:
            raise NormswapError(
                f"{checkpoint.path} does not fit {type(model).__name__}: {'; '.join(problems)}. "
                "Build the model as it was saved, or load what fits with partial=True (--partial)"
            )
        for name in (*unexpected, *misshapen):
            del state[name]
        if not any(name in state for name in fit.names.values()):
            raise NormswapError(
                f"{checkpoint.path} has no tensor that fits {type(model).__name__}: {'; '.join(problems)}"
            )
        notes += [f"partly loaded, {problem}" for problem in problems]
    notes += _casts(state, wanted)
    _load(model, state, versions)
    return notes


def _fits(value: Tensor, own: Any) -> bool:
    return not isinstance(own, Tensor) or is_lazy(own) or value.shape == own.shape


def _problems(
    missing: list[str],
    unexpected: list[str],
    misshapen: list[str],
    state: Mapping[str, Tensor],
    wanted: Mapping[str, Any],
) -> list[str]:
    shapes = [f"{name} ({tuple(state[name].shape)}, model {tuple(wanted[name].shape)})" for name in misshapen]
    named = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    return [f"{len(names)} {what}: {first(names)}" for what, names in named if names]


def _supplied(state: dict[str, Tensor], wanted: Mapping[str, Any]) -> Iterator[str]:
    """Give ``state`` what it may lack, from the model or from itself, and say so."""
    counters = [name for name in wanted if name not in state and name.endswith("num_batches_tracked")]
    state.update({name: wanted[name].detach() for name in counters})
    if counters:
        yield f"{len(counters)} num_batches_tracked are not in the file and stay as they are"
    known = {id(wanted[name]): name for name in state if isinstance(wanted.get(name), Tensor)}
    for name, value in wanted.items():
        if name not in state and id(value) in known:
            state[name] = state[known[id(value)]]
            yield f"{name} is not in the file; it is tied to {known[id(value)]}"
    extra = [name for name, value in wanted.items() if name not in state and not isinstance(value, Tensor)]
    if extra:
        yield f"extra state is not in the file and stays as it is: {first(extra)}"


def _casts(state: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> list[str]:
    """A note for each pair of dtypes, in the file and in the model, that differ."""
    counts: dict[tuple[torch.dtype, torch.dtype], int] = {}
    for name, value in state.items():
        own = wanted.get(name)
        if isinstance(own, Tensor) and own.dtype != value.dtype:
            pair = value.dtype, own.dtype
            counts[pair] = counts.get(pair, 0) + 1
    return [f"{count} tensors cast from {a} in the file to the model's {b}" for (a, b), count in counts.items()]


def _versions(checkpoint: Checkpoint, fit: Fit, model: nn.Module) -> dict[str, Any]:
    """torch's version of each module by its name in the model; the model's own where the file has none."""
    if not checkpoint.versions:
        return dict(getattr(model.state_dict(), "_metadata", {}))
    moved = {}
    for name, version in checkpoint.versions.items():  # A wrapper's own entry comes before that of the model in it.
        moved[(fit.add + canonical(f"{name}.").removeprefix(fit.drop)).rstrip(".")] = version
    return moved


def _load(model: nn.Module, state: Mapping[str, Tensor], versions: Mapping[str, Any], *, strict: bool = False) -> None:
    values: Any = OrderedDict(state)
    values._metadata = OrderedDict(versions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.load_state_dict(values, strict=strict)


def _by_hooks(model: nn.Module, state: Mapping[str, Tensor], versions: dict[str, Any]) -> dict[str, Any] | None:
    """The versions with which torch's strict loading takes ``state``, tried on a twin without memory; or ``None``."""
    for attempt in (versions, {}):
        try:
            _load(_twin(model), state, attempt, strict=True)
        except Exception:
            continue
        return attempt
    return None


def _twin(model: nn.Module) -> nn.Module:
    """A copy with parameters and buffers on the meta device."""
    memo: dict[int, Any] = {}
    for own in model.parameters():
        if not is_lazy(own):
            memo[id(own)] = nn.Parameter(torch.empty_like(own, device="meta"), requires_grad=own.requires_grad)
    for buffer in model.buffers():
        if not is_lazy(buffer):
            memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)
