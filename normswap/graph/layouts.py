"""Memory layout: what a norm's output has and its input may not.

A norm gives a tensor that is contiguous (or channels last, where its input is). Where it vanishes behind a transpose or
a slice, its readers get a strided view instead. ``view`` raises on one, and whether ``flatten`` gives a view or a copy,
to which a write in place does or does not go through, depends on it. Operations that are not known to make a compact
tensor are taken to keep the strides of their input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from normswap import registry
from normswap.graph.overwrites import written
from normswap.graph.shapes import first
from normswap.graph.trace import LINEAR_LAYERS, Region

_COMPACT: tuple[Any, ...] = (
    torch.cat, torch.concat, torch.concatenate, torch.stack, F.conv1d, F.conv2d, F.conv3d, F.linear, F.conv_transpose1d,
    F.conv_transpose2d, F.conv_transpose3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.max_pool1d, F.max_pool2d,
    F.max_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.embedding, "contiguous",
)  # fmt: skip
_COMPACT_MODULES = (*LINEAR_LAYERS, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._MaxPoolNd)
_RESHAPES: tuple[Any, ...] = (
    "reshape", "reshape_as", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "view", "view_as",
    torch.reshape, torch.flatten, torch.unflatten, torch.ravel, torch.squeeze, torch.unsqueeze,
)  # fmt: skip
"""Of a compact tensor they give a compact one."""
_ASKS = frozenset(
    {"view", "view_as", "as_strided", "stride", "is_contiguous", "data_ptr", "storage", "untyped_storage"}
)


def sensitive_reader(region: Region, node: fx.Node, vanished: Callable[[nn.Module], bool]) -> fx.Node | None:
    """An operation behind a norm that does, or may do, something else on the strides of the norm's input; if any."""
    if _compact(region, first(node), vanished):
        return None
    seen: set[fx.Node] = set()
    reshaped: set[fx.Node] = set()
    """Values that are a view of the norm's output or a copy of it, by its layout."""
    pending = list(node.users)
    while pending:
        user = pending.pop()
        if user in seen:
            continue
        seen.add(user)
        if user.op == "call_method" and user.target in _ASKS:
            return user
        compact = _makes_compact(region, user, vanished)
        if not compact and reshaped.intersection(written(region, user)):
            return user
        if user.target in _RESHAPES or reshaped.intersection(user.all_input_nodes):
            reshaped.add(user)
        if not compact:
            pending.extend(user.users)
    return None


def _compact(region: Region, value: Any, vanished: Callable[[nn.Module], bool]) -> bool:
    while isinstance(value, fx.Node):
        if _makes_compact(region, value, vanished):
            return True
        module = region.module_of(value)
        same = module is not None and (isinstance(module, (nn.Identity, nn.Flatten)) or vanished(module))
        if not same and value.target not in _RESHAPES:
            return False
        value = first(value)
    return False


def _makes_compact(region: Region, node: fx.Node, vanished: Callable[[nn.Module], bool]) -> bool:
    module = region.module_of(node)
    if module is None:
        return node.op in ("call_function", "call_method") and node.target in _COMPACT
    return isinstance(module, _COMPACT_MODULES) or (registry.registered(module) and not vanished(module))
