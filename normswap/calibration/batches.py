"""What a batch is, and how a model is run on it.

=========================  ==========================
a batch                    the call
=========================  ==========================
a tensor                   ``model(batch)``
a tuple or list            ``model(*batch)``
a mapping                  ``model(**batch)``
anything else, dataclass   ``model(batch)``
=========================  ==========================

``forward=f`` replaces the rule by ``f(model, batch)``: ``lambda model, batch: model(batch[0])`` drops the labels of
``(images, labels)``. Tensors go to the device of the model first."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from normswap.errors import NormswapError
from normswap.graph.reach import is_compiled_wrapper

Forward = Callable[[nn.Module, Any], Any]


def check_batches(batches: Any, again: str | None = None) -> None:
    """Raise :class:`NormswapError` for what is no iterable of batches; or for one that can be gone over only once,
    where ``again`` says what needs more."""
    if isinstance(batches, (Tensor, Mapping, str, bytes)) or not isinstance(batches, Iterable):
        raise NormswapError(
            f"batches is {type(batches).__name__}; it must be an iterable of batches (a list, a DataLoader, a "
            "generator): write [batch] for one batch"
        )
    if again is not None and isinstance(batches, Iterator):
        raise NormswapError(f"batches can be gone over only once, but {again}: pass a list or a DataLoader")


def check_runs(model: nn.Module) -> None:
    """Raise :class:`NormswapError` for a model whose norms cannot be watched while it runs."""
    if is_compiled_wrapper(model):
        raise NormswapError("this is a compiled model: pass the one it was compiled from (model._orig_mod)")
    meta = next((name for name, tensor in model.named_parameters() if tensor.is_meta), None)
    if meta is not None:
        raise NormswapError(f"{meta} is on the meta device and has no values: load the weights first")


def windows(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Consecutive lists of at most ``size`` batches."""
    iterator = iter(batches)
    while window := list(islice(iterator, size)):
        yield window


def run(model: nn.Module, batch: Any, forward: Forward | None) -> Any:
    """The model's output for a batch by the rule above.

    Raises :class:`NormswapError` when the batch does not fit the model's ``forward``."""
    batch = _on(_device(model), batch)
    if forward is not None:
        return forward(model, batch)
    args: tuple[Any, ...] = (batch,)
    kwargs: dict[str, Any] = {}
    if isinstance(batch, (tuple, list)):
        args = tuple(batch)
    elif isinstance(batch, Mapping):
        args, kwargs = (), dict(batch)
    _check_fit(model, args, kwargs)
    return model(*args, **kwargs)


def _check_fit(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = f"the keyword arguments {', '.join(kwargs)}" if kwargs else f"{len(args)} positional arguments"
        raise NormswapError(
            f"a batch was given as {given}, which {type(model).__name__}.forward{signature} does not take ({error}); "
            "say how to run it, for instance forward=lambda model, batch: model(batch[0])"
        ) from None


def _device(model: nn.Module) -> torch.device | None:
    """The device of all the model's parameters; ``None`` where there are several, or none."""
    devices = {parameter.device for parameter in model.parameters()}
    return next(iter(devices)) if len(devices) == 1 else None


def _on(device: torch.device | None, batch: Any) -> Any:
    if device is None:
        return batch
    if callable(getattr(batch, "to", None)) and not isinstance(batch, Tensor):
        return batch.to(device)
    return _pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)


def floats(output: Any) -> list[Tensor]:
    """The floating tensors of a model's output, in order: of a tensor, containers, mappings and dataclasses."""
    if isinstance(output, Mapping):
        output = dict(output)
    elif dataclasses.is_dataclass(output):
        output = dict(vars(output))
    leaves = _pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
