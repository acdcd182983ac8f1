"""Writes in place: what may share memory with a value, and who writes to it later.

A norm that vanishes gives back its input itself, not a new tensor. Then a write in place to that input, or to a view of
it, changes what the norm's readers see. Operations that are not known to make a new tensor are taken for views, and
modules that are not known for writers.
"""

from __future__ import annotations

import operator
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Set
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules import pooling

from normswap import registry
from normswap.graph.shapes import first
from normswap.graph.trace import LINEAR_LAYERS, Region

_NEW_FUNCTIONS: tuple[Any, ...] = (
    operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.pow, operator.matmul,
    operator.neg, torch.add, torch.sub, torch.mul, torch.div, torch.cat, torch.concat, torch.stack, torch.matmul,
    torch.bmm, torch.exp, torch.abs, torch.sqrt, torch.sigmoid, torch.tanh, torch.relu, torch.softmax, torch.mean,
    torch.sum, torch.clone, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    F.linear, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d, F.gelu, F.softmax,
    F.sigmoid, F.tanh,
)  # fmt: skip
_NEW_METHODS = frozenset(
    {
        "add",
        "sub",
        "mul",
        "div",
        "pow",
        "matmul",
        "neg",
        "mean",
        "sum",
        "exp",
        "abs",
        "sqrt",
        "rsqrt",
        "relu",
        "sigmoid",
        "tanh",
        "softmax",
        "clamp",
        "clone",
        "size",
        "dim",
    }
)
_SWITCHED: tuple[Any, ...] = (
    F.relu, F.relu6, F.silu, F.hardswish, F.hardsigmoid, F.leaky_relu, F.elu, F.mish, F.selu, F.celu, F.hardtanh,
)  # fmt: skip
"""Functions that make a new tensor unless told ``inplace``."""
_IN_PLACE_OPERATORS = (
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.ipow, operator.imod,
    operator.iand, operator.ior, operator.ixor, operator.setitem,
)  # fmt: skip


class Overwrites:
    """The writes in place in a region; ``vanished`` tells which norms give back their input itself."""

    def __init__(self, region: Region, vanished: Callable[[nn.Module], bool]) -> None:
        self.region = region
        self.vanished = vanished
        self.order = {node: index for index, node in enumerate(region.graph.nodes)}
        self.writers = [node for node in region.graph.nodes if written(region, node)]
        self.places = [self.order[node] for node in self.writers]

    def between(self, node: fx.Node, readers: set[fx.Node], known: Set[fx.Node] = frozenset()) -> fx.Node | None:
        """Who may write to what ``node`` takes, or what shares its memory, after it and before all ``readers`` ran.

        ``known`` are writers that do no harm."""
        until = max((self.order[reader] for reader in readers if reader in self.order), default=-1)
        span = self.writers[bisect_right(self.places, self.order[node]) : bisect_left(self.places, until)]
        near = [writer for writer in span if writer not in known]
        if not near:
            return None
        shared = _shared(self.region, node, self.vanished)
        return next((writer for writer in near if shared & set(written(self.region, writer))), None)


def _shared(region: Region, node: fx.Node, vanished: Callable[[nn.Module], bool]) -> set[fx.Node]:
    """The values that may share memory with the input of ``node``."""
    shared: set[fx.Node] = set()
    pending = list(node.all_input_nodes)
    while pending:
        value = pending.pop()
        if value in shared:
            continue
        shared.add(value)
        if not _is_new(region, value, vanished):
            pending.extend(value.all_input_nodes)
        pending.extend(user for user in value.users if user is not node and not _is_new(region, user, vanished))
    return shared


def _is_new(region: Region, node: fx.Node, vanished: Callable[[nn.Module], bool]) -> bool:
    """Whether a node's value shares no memory with its inputs."""
    module = region.module_of(node)
    if module is not None:
        if vanished(module) or getattr(module, "inplace", False):
            return False
        fresh = (*LINEAR_LAYERS, pooling._AvgPoolNd, pooling._MaxPoolNd)
        inside = type(module).__module__
        return isinstance(module, fresh) or inside == "torch.nn.modules.activation" or registry.registered(module)
    if node.op == "call_method":
        return node.target in _NEW_METHODS
    if node.op == "call_function":
        if node.target in _SWITCHED:
            return not node.kwargs.get("inplace", False) and True not in node.args
        return node.target in _NEW_FUNCTIONS
    return node.op in ("placeholder", "get_attr")


def written(region: Region, node: fx.Node) -> list[fx.Node]:
    """The inputs that a node may write to."""
    module = region.module_of(node)
    if module is not None:
        writes = str(node.target) in region.opaque or any(getattr(each, "inplace", False) for each in module.modules())
        return list(node.all_input_nodes) if writes else []
    name = str(getattr(node.target, "__name__", node.target))
    writes = node.target in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
    writes = writes or bool(node.kwargs.get("inplace")) or (node.target in _SWITCHED and True in node.args)
    written = [first(node)] if writes else []
    return [value for value in (*written, node.kwargs.get("out")) if isinstance(value, fx.Node)]
