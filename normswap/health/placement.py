"""Where a norm sits, from the dataflow: what computes its input, what reads its output."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import pooling
from torch.nn.modules.dropout import _DropoutNd

from normswap import registry
from normswap.fold.passages import Flow, value_users
from normswap.graph.trace import LINEAR_LAYERS
from normswap.spec import SPACE, Norm

STEPS = 16
_ADDS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
_CONCATENATES: tuple[Any, ...] = (torch.cat, torch.concat, torch.concatenate, torch.stack)
_PASSES: tuple[Any, ...] = (
    operator.getitem, getattr, torch.flatten, torch.permute, torch.transpose, torch.reshape, "flatten", "permute",
    "transpose", "reshape", "view", "contiguous", "clone", "to", "float", "type", "unsqueeze", "squeeze", "movedim",
)  # fmt: skip
_ACTIVATIONS = re.compile(
    r"([lpr]?relu6?|leaky_?relu|[cs]?elu|gelu|silu|swish|mish|hardswish|hardsigmoid|hardtanh|sigmoid|tanh"
    r"|softmax|softplus|softsign|softshrink|logsigmoid|glu|quick_?gelu|hard_?mish)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Placement:
    """One place where a norm is called."""

    before: str
    """What computes its input: a layer's class, ``add``, ``cat``, ``input``, or an operation."""
    then: tuple[str, ...]
    """What follows it one by one: the activation behind it."""
    readers: tuple[str, ...]
    """What reads the outcome, side by side."""
    role: str
    """``after a layer``, ``pre-activation``, ``pre-norm``, ``after a sum``, ``after concat``, ``at the input``, or
    empty."""
    activation: str | None = None
    """The activation behind it, in lower case without underscores."""
    bias: str | None = None
    """The layer in front whose bias the norm takes away again."""
    dropout: str | None = None
    """A dropout in front, at most one layer away."""

    def __str__(self) -> str:
        chain = " → ".join([self.before, "norm", *self.then, ", ".join(self.readers)])
        return f"{chain} ({self.role})" if self.role and self.role != "after a layer" else chain


@dataclass
class Places:
    """The calls of every norm in the traced code, by its name."""

    found: dict[str, list[tuple[Flow, fx.Node]]] = field(default_factory=dict)
    order: dict[str, int] = field(default_factory=dict)
    """When a norm is first called, in the order of the graphs."""

    @classmethod
    def of(cls, flows: Iterable[Flow]) -> Places:
        places, seen = cls(), set()
        for flow in flows:
            if flow.region.when:
                continue
            for node in flow.region.graph.nodes:
                module = flow.module(node)
                if module is None or not registry.registered(module) or (key := (flow.region.name, node.name)) in seen:
                    continue
                seen.add(key)
                name = flow.region.qualified(str(node.target))
                places.found.setdefault(name, []).append((flow, node))
                places.order.setdefault(name, len(places.order))
        return places

    def at(self, names: Iterable[str]) -> list[tuple[Flow, fx.Node]]:
        return [place for name in names for place in self.found.get(name, ())]


def placement(flow: Flow, node: fx.Node, norm: Norm) -> Placement:
    """Where the norm that ``node`` calls sits."""
    source, dropout = _back(flow, node)
    layer = source is not None and _is_layer(flow, source)
    then = [_name(module) for module in norm.then if not isinstance(module, nn.Identity)]
    acts = [_activation(name) for name in then if _activation(name)]
    readers = _readers(flow, node)
    if not acts and len(readers) == 1 and (told := _activation(_label(flow, readers[0]))):
        acts.append(told)
        then.append(_label(flow, readers[0]))
        readers = _readers(flow, readers[0])
    labels = tuple(dict.fromkeys(_label(flow, reader) for reader in readers))
    to_layer = any(_is_layer(flow, reader) for reader in readers)
    before = "input" if source is None else _label(flow, source)
    bias = None
    if layer and source is not None:
        bias = _biased(flow, source, norm)
        if dropout is None:
            dropout = _back(flow, source)[1]
    passed_by = source is not None and len(value_users(source)) > 1
    role = "at the input" if source is None and not flow.region.name else ""
    role = role or _role(before, layer, bool(acts), to_layer, passed_by)
    return Placement(before, tuple(then), labels or ("nothing",), role, acts[0] if acts else None, bias, dropout)


def _role(before: str, layer: bool, acts: bool, to_layer: bool, passed_by: bool) -> str:
    """``passed_by``: others read the norm's input too, as a shortcut around it does."""
    if before == "cat":
        return "after concat"
    if layer:
        return "after a layer"
    if to_layer and acts:
        return "pre-activation"
    if to_layer and passed_by:
        return "pre-norm"
    return "after a sum" if before == "add" else ""


def _is_layer(flow: Flow, node: fx.Node) -> bool:
    return isinstance(flow.module(node), (*LINEAR_LAYERS, nn.MultiheadAttention))


def _back(flow: Flow, node: fx.Node) -> tuple[fx.Node | None, str | None]:
    """What computes the input of ``node``, through operations that move values only; and a dropout on the way."""
    dropout, source = None, node
    for _ in range(STEPS):
        inputs = source.all_input_nodes
        if not inputs:
            return None, dropout
        source = inputs[0]
        module = flow.module(source)
        if isinstance(module, _DropoutNd):
            dropout = flow.region.qualified(str(source.target)) if module.p > 0 else dropout
        elif source.op == "placeholder":
            return None, dropout
        elif not _passes(source, module):
            return source, dropout
    return source, dropout


def _passes(node: fx.Node, module: nn.Module | None) -> bool:
    return isinstance(module, (nn.Identity, nn.Flatten, _DropoutNd)) or (module is None and node.target in _PASSES)


def _readers(flow: Flow, node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    for user in value_users(node):
        found += _readers(flow, user) if _passes(user, flow.module(user)) else [user]
    return found


def _label(flow: Flow, node: fx.Node) -> str:
    module = flow.module(node)
    if module is not None:
        pool = isinstance(module, (pooling._AdaptiveAvgPoolNd, pooling._AvgPoolNd, pooling._MaxPoolNd))
        return "pool" if pool else _name(module)
    if node.op in ("placeholder", "output", "get_attr"):
        return {"placeholder": "input", "get_attr": "parameter"}.get(node.op, node.op)
    if node.target in _ADDS:
        return "add"
    if node.target in _CONCATENATES:
        return "cat"
    return str(getattr(node.target, "__name__", node.target))


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _activation(name: str) -> str | None:
    plain = name.rstrip("_")
    return plain.replace("_", "").lower() if _ACTIVATIONS.fullmatch(plain) else None


def _biased(flow: Flow, source: fx.Node, norm: Norm) -> str | None:
    """The layer whose bias shifts whole channels of what the norm centres channel by channel, and nothing else."""
    per_channel = norm.centred and "channel" not in norm.pools and not norm.fixed and not norm.mixes
    if not per_channel or (norm.pools == SPACE and norm.has_statistics) or norm.threshold is not None:
        return None
    layer: Any = flow.module(source)
    alone = len(value_users(source)) == 1
    if getattr(layer, "bias", None) is None or not isinstance(layer.bias, nn.Parameter) or not alone:
        return None
    return flow.region.qualified(str(source.target))


def check_placement(name: str, places: Iterable[Placement]) -> Iterator[tuple[str, str, str]]:
    """``(check, name, what)`` of what its neighbours make of a norm."""
    biases = list(dict.fromkeys(place.bias for place in places if place.bias))
    if biases:
        yield "bias-before-norm", name, f"{', '.join(biases)} in front has a bias"
    dropouts = list(dict.fromkeys(place.dropout for place in places if place.dropout))
    if dropouts:
        yield "dropout-before-norm", name, f"{', '.join(dropouts)} is in front"
