"""The state dict in what a training script saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normswap.checkpoints.words import first
from normswap.errors import NormswapError

NESTED = ("state_dict", "model_state_dict", "model", "module", "net", "network", "params", "weights")
"""Keys under which training scripts keep the state dict, in the order they are tried."""


def state_dict_in(path: Path, loaded: Any, key: str | None) -> tuple[str | None, Mapping[Any, Any]]:
    """The dotted key of the state dict in what a file holds (``None`` for all of it), and the state dict."""
    if not isinstance(loaded, Mapping):
        raise NormswapError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    nested = dict(nested_in(loaded))
    if key is not None:
        if key not in nested:
            raise NormswapError(f"{path} has no state dict {key!r}; it has: {first(list(nested)) or 'none'}")
        return key, nested[key]
    for name in NESTED:
        for found in (name, *(f"{name}.{inner}" for inner in NESTED)):
            if found in nested:
                return found, nested[found]
    if holds_tensors(loaded):
        return None, loaded
    if len(nested) == 1:
        return next(iter(nested.items()))
    if nested:
        raise NormswapError(
            f"{path} holds several state dicts: {first(list(nested))}; name one with read(path, key=...)"
        )
    if models := [f"{name} ({type(value).__name__})" for name, value in loaded.items() if isinstance(value, nn.Module)]:
        raise NormswapError(
            f"{path} holds a whole model, {first(models)}, not a state dict: load it with torch.load and give it to "
            "normswap.convert or normswap.fold"
        )
    raise NormswapError(f"{path} holds no state dict; it has: {first([str(name) for name in loaded]) or 'nothing'}")


def holds_tensors(value: object) -> bool:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return False
    return any(isinstance(entry, Tensor) for entry in value.values())


def nested_in(loaded: Mapping[Any, Any], depth: int = 3, prefix: str = "") -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Mappings from names to tensors, the outermost only; not the state of an optimizer, which is keyed by number."""
    if not all(isinstance(name, str) for name in loaded):
        return
    for name, value in loaded.items():
        if holds_tensors(value):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping) and depth > 1:
            yield from nested_in(value, depth - 1, f"{prefix}{name}.")
