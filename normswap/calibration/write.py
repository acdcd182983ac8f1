"""Fitted values into the tensors of a model, all or none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from normswap.calibration.fit import Values
from normswap.calibration.heads import Correction
from normswap.calibration.sites import LinearSite, NormSite
from normswap.errors import NormswapError

Writes = list[tuple[Tensor, Tensor]]


def of_norm(site: NormSite, values: Values, batches: int) -> Writes:
    """The norm's tensors and what they get, cast once. ``batches``: of how many its statistics are, if it has any.

    Raises :class:`NormswapError` for a value that is not finite in the tensor's dtype."""
    norm = site.norm
    pairs: list[tuple[Tensor | None, Tensor | None]]
    pairs = [] if site.original is None else [(norm.weight, values.weight), (norm.bias, values.bias)]
    writes: Writes = []
    if site.statistics:
        pairs += [(norm.running_mean, values.mean), (norm.running_var, values.var)]
        if norm.num_batches_tracked is not None:
            writes.append((norm.num_batches_tracked, torch.full_like(norm.num_batches_tracked, batches)))
    for tensor, value in pairs:
        if tensor is not None and value is not None:
            writes.append((tensor, cast(site.name, tensor, value)))
    return writes


def of_layer(layer: LinearSite, correction: Correction) -> Writes:
    """The layer's bias, and its weight if that is fitted, and what they get."""
    writes = [(layer.bias, cast(layer.name, layer.bias, layer.bias.detach().double() + correction.bias))]
    if correction.weight is not None:
        assert layer.weight is not None
        weight = layer.weight.detach().double() + correction.weight.reshape(layer.weight.shape)
        writes.append((layer.weight, cast(layer.name, layer.weight, weight)))
    return writes


def cast(name: str, tensor: Tensor, value: Tensor) -> Tensor:
    """``value`` as ``tensor`` holds it. Raises :class:`NormswapError` where it is not finite then."""
    cast = value.detach().reshape(tensor.shape).to(device=tensor.device, dtype=tensor.dtype)
    if not cast.isfinite().all():
        raise NormswapError(
            f"{name or 'the model'}: what the batches give is not finite in {tensor.dtype}; are all inputs finite, and "
            "is the output of the reference?"
        )
    return cast


@contextmanager
def written(writes: Writes) -> Iterator[None]:
    """Within it the tensors have these values."""
    saved = [(tensor, tensor.detach().clone()) for tensor, _ in writes]
    try:
        write(writes)
        yield
    finally:
        write(saved)


@torch.no_grad()
def write(writes: Sequence[tuple[Tensor, Tensor]]) -> None:
    for tensor, value in writes:
        tensor.copy_(value)
