"""Putting a ``Norm``'s tensors into a new module: the same ``Parameter`` objects wherever their meaning stays.

Keeping the objects keeps optimizer state, ties between layers and memory as they were.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from normswap.errors import Refusal
from normswap.spec import SPACE, Norm

_M = TypeVar("_M", bound=nn.Module)


def parameter(tensor: Tensor, norm: Norm) -> nn.Parameter:
    """``tensor`` as a parameter: itself when it is one; trainable when it was a frozen norm's buffer."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.detach(), requires_grad=norm.fixed or tensor.requires_grad)


def adopt_affine(module: _M, norm: Norm, *names: str) -> _M:
    """Give ``module`` the weight and bias of ``norm`` (``None`` where it has none)."""
    for name in names or ("weight", "bias"):
        tensor = getattr(norm, name)
        module.register_parameter(name, None if tensor is None else parameter(tensor, norm))
    return module


def like(norm: Norm) -> dict[str, Any]:
    """Device and floating dtype of the norm's tensors, as keyword arguments; empty when it has none."""
    for tensor in norm.tensors.values():
        if tensor.is_floating_point():
            return {"device": tensor.device, "dtype": tensor.dtype}
    return {}


def adopt_statistics(module: _M, norm: Norm) -> _M:
    """Give ``module`` the running statistics of ``norm``, fresh ones (mean 0, variance 1) where it has none."""
    where = like(norm)
    mean, var, count = norm.running_mean, norm.running_var, norm.num_batches_tracked
    module.register_buffer("running_mean", torch.zeros(norm.channels, **where) if mean is None else mean)
    module.register_buffer("running_var", torch.ones(norm.channels, **where) if var is None else var)
    if count is None:
        count = torch.tensor(0, dtype=torch.long, device=where.get("device"))
    module.register_buffer("num_batches_tracked", count)
    return module


def channels_first(norm: Norm, kind: str) -> None:
    """Refuse a norm that does not have its channels on axis 1."""
    if norm.shape is not None:
        shape = ", ".join(map(str, norm.shape))
        raise Refusal(f"it normalizes the trailing axes ({shape}) together; {kind} works per channel of axis 1")
    if norm.channel_axis != 1:
        raise Refusal(f"its channels are on the last axis; {kind} has them on axis 1")


def has_space(norm: Norm, what: str) -> None:
    """Refuse a norm whose input may be ``(N, C)``, where ``what`` is normalized by itself."""
    if norm.ranks is not None and 2 in norm.ranks:
        raise Refusal(f"its input is or may be (N, C), where {what} is a single value; example_inputs settle it")


def is_instance(norm: Norm) -> bool:
    """Whether it normalizes every sample and channel by its own mean and biased variance."""
    own = norm.pools == SPACE or ("channel" in norm.pools and norm.groups == norm.channels)
    own = own and not norm.mixes and not norm.has_statistics
    return own and norm.centred and norm.spread == "variance" and norm.correction == 0


def single_rank(norm: Norm) -> int | None:
    """The number of input dimensions where only one is possible; ``None`` otherwise."""
    return next(iter(norm.ranks)) if norm.ranks is not None and len(norm.ranks) == 1 else None


def dimensions(norm: Norm) -> int | None:
    """1, 2 or 3 for torch's ``...1d``, ``...2d``, ``...3d`` classes; ``None`` when the rank is not known."""
    if norm.ranks is not None:
        for dims, ranks in ((1, {2, 3}), (2, {4}), (3, {5})):
            if norm.ranks <= ranks:
                return dims
    return None
