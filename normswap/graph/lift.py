"""Functional norms become modules, in the one module whose own ``forward`` calls them.

That ``forward`` is traced with every child as a leaf, once in train and once in eval mode; the norm calls are read from
the graphs. Lifting puts a module, or nothing, where each call was and gives the object a ``forward`` generated from the
two graphs. The object itself stays: its children, other parameters, hooks and aliases are untouched, and its class
becomes a subclass of the user's (of ``nn.Module`` where the user's class is itself a norm, which it no longer
computes). A ``GraphModule`` has its graph edited."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from normswap import registry
from normswap.errors import Refusal
from normswap.graph.functional import arguments, is_norm_function, is_other
from normswap.graph.rewrite import Before, TracedForward, copied_graphs, install, traced_forward
from normswap.spec import BATCH, MAP, POSITION, SPACE, Norm, exactness

_TENSORS = ("weight", "bias", "running_mean", "running_var")


@dataclass
class Call:
    """One functional norm in a ``forward``: the name its module would get, and its ``Norm`` or the reason there is
    none."""

    name: str
    norm: Norm | None
    reason: str | None
    paths: dict[str, str]
    """Where its tensors are: field of ``Norm`` -> attribute path in the module."""
    nodes: dict[bool, fx.Node]
    """Its node in the train-mode (``True``) and the eval-mode (``False``) graph."""
    holder: nn.Module | None = None
    """The submodule called ``name`` that only holds this norm's tensors, if there is one: the new module takes its
    place."""


@dataclass
class Forward(TracedForward):
    """A module's own ``forward``, traced, with the functional norms in it."""

    calls: list[Call] = field(default_factory=list)


def functional_norms(module: nn.Module) -> Forward:
    """The functional norms in a module's own ``forward``.

    Raises :class:`Refusal` when it cannot be traced, or does what a forward generated from the trace would not do.
    """
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        raise Refusal("its forward calls a norm function, and a new module would join the ones it is a container of")
    traced = traced_forward(module, "its forward calls a norm function")
    nodes = {mode: [n for n in graph.nodes if _is_norm(n)] for mode, graph in traced.graphs.items()}
    if [n.target for n in nodes[True]] != [n.target for n in nodes[False]]:
        raise Refusal("its forward runs other norms in train mode than in eval mode")
    forward = Forward(module, traced.graphs, traced.constants)
    taken: set[str] = set()
    for train, evaluation in zip(nodes[True], nodes[False], strict=True):
        forward.calls.append(_call(module, {True: train, False: evaluation}, taken))
    return forward


def _is_norm(node: fx.Node) -> bool:
    return node.op == "call_function" and is_norm_function(node.target)


def _call(module: nn.Module, nodes: dict[bool, fx.Node], taken: set[str]) -> Call:
    paths: dict[str, str] = {}
    norm, reason = None, None
    try:
        norm = _read(module, nodes, paths)
    except Refusal as refusal:
        reason = refusal.reason
    holder = _holder(module, norm, nodes, paths, taken)
    name = _name(module, nodes[False], taken) if holder is None else holder
    taken.add(name)
    return Call(name, norm, reason, paths, nodes, None if holder is None else module.get_submodule(holder))


def _holder(
    module: nn.Module, norm: Norm | None, nodes: dict[bool, fx.Node], paths: dict[str, str], taken: set[str]
) -> str | None:
    """The submodule that only holds a norm's tensors, as an exported program has it; called, it is the same norm."""
    parents = {path.rpartition(".")[0] for path in paths.values()}
    parent = next(iter(parents), "")
    if len(parents) != 1 or not parent or parent in taken or not _only_holds(module, parent, paths):
        return None
    if any(n.op == "call_module" and n.target == parent for node in nodes.values() for n in node.graph.nodes):
        return parent if norm is not None and _computes(module.get_submodule(parent), norm, module.training) else None
    return parent


def _computes(holder: nn.Module, norm: Norm, training: bool) -> bool:
    """Whether a module is a norm, in train and in eval mode, and in the mode that it is in."""
    try:
        own = registry.read(holder)
    except Refusal:
        return False
    same_mode = norm.fixed or holder.training == training
    return own.fixed == norm.fixed and same_mode and exactness(own, norm) == "exact"


def _name(module: nn.Module, node: fx.Node, taken: set[str]) -> str:
    base = _label(node)
    return next(
        name for i in count() if (name := f"{base}_{i}" if i else base) not in taken and not hasattr(module, name)
    )


def _label(node: fx.Node) -> str:
    target = node.target
    name = target._schema.name if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", "norm")
    return str(name).rpartition("::")[2]


def _only_holds(module: nn.Module, parent: str, paths: dict[str, str]) -> bool:
    holder = module.get_submodule(parent)
    owned = {f"{parent}.{name}" for name in (*holder._parameters, *holder._buffers)}
    return not holder._modules and owned - set(paths.values()) <= {f"{parent}.num_batches_tracked"}


def _read(module: nn.Module, nodes: dict[bool, fx.Node], paths: dict[str, str]) -> Norm:
    node = nodes[False]
    if is_other(node.target):
        raise Refusal(f"{_label(node)} returns its statistics too, which the code around it uses")
    signature, given = arguments(node.target, node.args, node.kwargs)
    if signature.family in ("batch", "instance", "group") and _is_weight(given["input"]):
        raise Refusal("it normalizes a weight, not an activation")
    _, train = arguments(node.target, nodes[True].args, nodes[True].kwargs)
    tensors: dict[str, Tensor | None] = {}
    for name in _TENSORS:
        value = given.get(name)
        tensors[name] = None if value is None else _tensor(module, value, name, paths)
        in_train = train.get(name)
        if name in ("weight", "bias") and str(in_train) != str(value):
            raise Refusal(f"its {name} differs between train and eval mode")
    for name in ("eps", "momentum", "shape", "groups", "training"):
        value = given.get(name)
        if any(isinstance(part, fx.Node) for part in (value if isinstance(value, (tuple, list)) else (value,))):
            raise Refusal(f"its {name} is computed in the forward")
    if isinstance(train.get("momentum"), fx.Node):
        raise Refusal("its momentum is computed in the forward")
    return _norm(signature.family, given, train, tensors)


def _is_weight(value: Any) -> bool:
    """Whether a value is computed from the module's own tensors alone, as a weight-standardising layer does."""
    pending, seen = [value], set()
    while pending:
        node = pending.pop()
        if not isinstance(node, fx.Node) or node.op in ("placeholder", "call_module"):
            return False
        seen.add(node)
        pending.extend(source for source in node.all_input_nodes if source not in seen)
    return any(node.op == "get_attr" for node in seen)


def _norm(family: str, given: dict[str, Any], train: dict[str, Any], tensors: dict[str, Tensor | None]) -> Norm:
    common: dict[str, Any] = {"eps": given["eps"], "weight": tensors["weight"], "bias": tensors["bias"]}
    if family in ("layer", "rms"):
        shape = tuple(given["shape"])
        common |= {"pools": POSITION, "channel_axis": -1, "channels": shape[-1], "momentum": None}
        common |= {"shape": shape if len(shape) > 1 else None}
        if family == "rms":
            common |= {"centred": False, "spread": "square"}
        return Norm(kind=family, **common)
    present = next((t for t in tensors.values() if t is not None), None)
    if present is None:
        raise Refusal("it has neither affine nor statistics, so its channels are not known")
    common["channels"] = present.shape[0]
    if family == "group":
        common |= {"groups": given["groups"], "momentum": None}
        return Norm(kind="group", pools=MAP, **common)
    statistics: dict[str, Any] = {name: tensors[name] for name in ("running_mean", "running_var")}
    if given["training"]:  # the input's own moments in eval mode too
        statistics = dict.fromkeys(statistics)
    elif not train["training"]:
        common["fixed"] = True
    if not given["training"] and None in statistics.values():
        raise Refusal("it has no running statistics and does not use the batch's")
    pools = BATCH if family == "batch" else SPACE
    kind = "frozen" if common.get("fixed") else family
    momentum = train["momentum"] if isinstance(train["momentum"], (int, float)) else 0.1
    return Norm(kind=kind, pools=pools, momentum=momentum, **common, **statistics)


def _tensor(module: nn.Module, value: Any, name: str, paths: dict[str, str]) -> Tensor:
    if not isinstance(value, fx.Node) or value.op != "get_attr" or not isinstance(value.target, str):
        raise Refusal(f"its {name} is computed in the forward, not a parameter or buffer")
    holder, _, attribute = value.target.rpartition(".")
    owner = module.get_submodule(holder)
    tensor = getattr(owner, attribute, None)
    if tensor is None:
        raise Refusal(f"its {name} is made in the forward")
    if not isinstance(tensor, Tensor):
        raise Refusal(f"its {name} is not a tensor of the module")
    if parametrize.is_parametrized(owner, attribute):
        raise Refusal(f"its {name} is parametrized")
    paths[name] = value.target
    return tensor


def lift(
    forward: Forward, replacements: Mapping[str, nn.Module | None], *, keep_tensors: bool = False
) -> Callable[[], None]:
    """Put modules where functional norms were, by the calls' names; with ``None`` the call vanishes.

    The tensors of the norms leave the module unless something else in the forward reads them, or with ``keep_tensors``.
    Changes the module; returns what undoes it."""
    module = forward.module
    before = Before(module)
    try:
        _lift(forward, replacements, keep_tensors)
    except BaseException:
        before.restore()
        raise
    return before.restore


def _lift(forward: Forward, replacements: Mapping[str, nn.Module | None], keep_tensors: bool) -> None:
    module = forward.module
    calls = [call for call in forward.calls if call.name in replacements]
    graphs = copied_graphs(forward)
    for mode, graph in graphs.items():
        nodes = {node.name: node for node in graph.nodes}
        for call in calls:
            _replace(graph, nodes[call.nodes[mode].name], None if replacements[call.name] is None else call.name)
        _drop_counters(graph, None if not isinstance(module, fx.GraphModule) else {call.name for call in calls})
        for node in reversed(graph.nodes):
            if node.op == "get_attr" and not node.users:
                graph.erase_node(node)
    if not keep_tensors:
        _forget_tensors(module, calls, graphs)
    for call in calls:
        parent, _, attribute = call.name.rpartition(".")
        put = replacements[call.name]
        if put is not None or call.holder is not None:
            module.get_submodule(parent).add_module(attribute, nn.Identity() if put is None else put)
    install(module, graphs, nn.Module if registry.registered(module) else type(module))
    if isinstance(module, fx.GraphModule):
        return
    lifted = tuple(call.name for call in calls if replacements[call.name] is not None)
    module.lifted_norms = lifted  # type: ignore[assignment]


def _forget_tensors(module: nn.Module, calls: Iterable[Call], graphs: dict[bool, fx.Graph]) -> None:
    """Take the norms' tensors off the module, those that its graphs still read excepted."""
    used = {str(node.target) for graph in graphs.values() for node in graph.nodes if node.op == "get_attr"}
    for path in {path for call in calls for path in call.paths.values() if call.holder or "." not in path} - used:
        _forget(module, path)
    if not isinstance(module, fx.GraphModule) and not any("num_batches_tracked" in path for path in used):
        _forget(module, "num_batches_tracked")


def _replace(graph: fx.Graph, node: fx.Node, name: str | None) -> None:
    _, given = arguments(node.target, node.args, node.kwargs)
    if name is None:
        node.replace_all_uses_with(given["input"])
    else:
        with graph.inserting_before(node):
            new = graph.call_module(name, (given["input"],))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
    graph.erase_node(node)


_ADDS: tuple[Any, ...] = ("add_", torch.ops.aten.add_.Tensor)


def _drop_counters(graph: fx.Graph, holders: set[str] | None) -> None:
    """A norm's batch counter, ``num_batches_tracked.add_(1)``, goes: the new module counts itself; only in
    ``holders``."""
    for node in reversed(graph.nodes):
        if node.target in _ADDS and not node.users:
            source = node.args[0]
            holder, _, attribute = str(source.target if isinstance(source, fx.Node) else "").rpartition(".")
            if attribute == "num_batches_tracked" and (holders is None or holder in holders):
                graph.erase_node(node)


def _forget(module: nn.Module, path: str) -> None:
    holder, _, attribute = path.rpartition(".")
    owner = module.get_submodule(holder)
    if attribute in owner._parameters:
        del owner._parameters[attribute]
    elif attribute in owner._buffers:
        del owner._buffers[attribute]
        owner._non_persistent_buffers_set.discard(attribute)


def names(calls: Iterable[Call], prefix: str) -> list[str]:
    """The dotted names of calls in a model where their module is ``prefix``."""
    return [f"{prefix}.{call.name}" if prefix else call.name for call in calls]
