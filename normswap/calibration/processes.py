"""Sums over the processes of ``torch.distributed``, where it is initialised; of one process, the values themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from normswap.errors import NormswapError


def several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def total(tensor: Tensor) -> Tensor:
    """The sum over processes, on the tensor's device."""
    if not several():
        return tensor
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    summed = tensor.detach().to(device, copy=True)
    dist.all_reduce(summed)
    return summed.to(tensor.device)


def fail_together(error: BaseException | None) -> None:
    """Raise ``error``; where it is another process's, a :class:`NormswapError` that tells it."""
    told = [text for text in gathered(None if error is None else repr(error)) if text is not None]
    if error is not None:
        raise error
    if told:
        raise NormswapError(f"another process failed: {told[0]}")


def gathered(value: Any) -> list[Any]:
    """The value of every process, in their order."""
    if not several():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
