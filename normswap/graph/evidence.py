"""What a region's graph says about the input of a norm, without running it: its rank, and whether it has one position
only.

Walks back from the norm through operations with one input to one that settles the question: a convolution fixes the
rank, pooling to size 1 leaves one position, a linear layer whose outputs are the norm's channels means ``(N, C)``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules import pooling
from torch.nn.modules.conv import _ConvNd

from normswap.graph.trace import Region

_STEPS = 64
_RANK = {"1d": 3, "2d": 4, "3d": 5}
_ADAPTIVE = (pooling._AdaptiveAvgPoolNd, pooling._AdaptiveMaxPoolNd)
_ADAPTIVE_FUNCTIONS = {
    F.adaptive_avg_pool1d: 3, F.adaptive_avg_pool2d: 4, F.adaptive_avg_pool3d: 5, F.adaptive_max_pool1d: 3,
    F.adaptive_max_pool2d: 4, F.adaptive_max_pool3d: 5,
}  # fmt: skip
_FLATTEN: tuple[Any, ...] = (torch.flatten, "flatten")
_KEEPS_SHAPE: tuple[Any, ...] = (
    F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.hardsigmoid, F.dropout, F.leaky_relu, F.elu, torch.relu,
    torch.sigmoid, torch.tanh, "relu", "sigmoid", "contiguous", "clone", "clamp",
)  # fmt: skip


@dataclass(frozen=True)
class Evidence:
    """The rank of an input, if known, and whether its spatial size is known to be 1."""

    rank: int | None = None
    single: bool = False


def input_evidence(region: Region, node: fx.Node, channels: int) -> Evidence:
    """What is known about the first input of ``node``."""
    rank: int | None = None
    source = _source(node)
    for _ in range(_STEPS):
        if source is None:
            return Evidence(rank)
        module = region.module_of(source)
        if isinstance(module, _ADAPTIVE):
            size: Any = module.output_size
            return Evidence(rank or _of_name(module), _is_one(size))
        if source.op == "call_function" and source.target in _ADAPTIVE_FUNCTIONS:
            size = source.args[1] if len(source.args) > 1 else source.kwargs.get("output_size")
            return Evidence(rank or _ADAPTIVE_FUNCTIONS[source.target], _is_one(size))
        if source.target in _FLATTEN and _flattens_all(source):
            return Evidence(rank or 2, single=True)
        if (source.op == "call_method" and source.target == "mean") or source.target is torch.mean:
            if not _spatial(source):
                return Evidence(rank)
            return Evidence(rank if source.kwargs.get("keepdim") else 2, single=True)
        if isinstance(module, nn.Linear):
            return Evidence(2, single=True) if rank is None and module.out_features == channels else Evidence(rank)
        if isinstance(module, _ConvNd):
            rank = rank or _of_name(module)
            if any(size != 1 for size in module.kernel_size):
                return Evidence(rank)
        elif not _keeps_shape(source, module):
            return Evidence(rank)
        source = _source(source)
    return Evidence(rank)


def _source(node: fx.Node) -> fx.Node | None:
    return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None


def _of_name(module: nn.Module) -> int | None:
    for cls in type(module).__mro__:
        if (rank := _RANK.get(cls.__name__[-2:])) is not None:
            return rank
    return None


def _is_one(size: Any) -> bool:
    return bool(size == 1 or (isinstance(size, (tuple, list)) and set(size) == {1}))


def _flattens_all(node: fx.Node) -> bool:
    start: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)
    end: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("end_dim", -1)
    return bool(start == 1 and end == -1)


def _spatial(node: fx.Node) -> bool:
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return isinstance(dims, (tuple, list)) and set(dims) in ({2, 3}, {-1, -2}, {2}, {2, 3, 4})


def _keeps_shape(node: fx.Node, module: nn.Module | None) -> bool:
    if node.op in ("call_function", "call_method"):
        return node.target in _KEEPS_SHAPE
    if module is None:
        return False
    name = type(module).__module__
    if name.startswith(("torch.nn.modules.activation", "torch.nn.modules.dropout", "torch.nn.modules.batchnorm")):
        return True
    return isinstance(module, (nn.Identity, nn.GroupNorm))
