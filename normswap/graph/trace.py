"""Regions: the largest parts of a model that FX can trace on their own, with norms and linear layers as leaves.

A module whose ``forward`` cannot be traced inside a traceable parent becomes an opaque leaf there and is tried as a region of its own; its
parent's graph goes on. So one control-flow statement costs one module its dataflow, not the model.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from normswap import registry
from normswap.errors import Refusal

LINEAR_LAYERS = (_ConvNd, nn.Linear, nn.Bilinear, nn.Embedding)
_DIM_CHECKS = ("_check_input_dim", "_check_non_zero_input_channels")


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one node in a graph: norms and linear layers (subclasses too), and torch's own modules."""
    if isinstance(module, LINEAR_LAYERS) or registry.registered(module):
        return True
    inside_torch = type(module).__module__.startswith(("torch.nn.", "torch.ao.nn"))
    return inside_torch and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict, fx.GraphModule))


@dataclass
class Region:
    """A traced submodule: its dotted name in the model, its graph, and the modules of the graph's nodes by target."""

    name: str
    module: nn.Module
    graph: fx.Graph
    opaque: dict[str, str] = field(default_factory=dict)
    """Submodules (by name inside the region) that could not be traced, with the reason."""

    def qualified(self, target: str) -> str:
        return f"{self.name}.{target}" if self.name else target

    def module_of(self, node: fx.Node) -> nn.Module | None:
        if node.op != "call_module" or not isinstance(node.target, str):
            return None
        return self.module.get_submodule(node.target)


class RegionTracer(fx.Tracer):
    """Traces into everything but leaves; a child that fails is rolled back and becomes a leaf."""

    def __init__(self, leaf: Callable[[nn.Module], bool] = is_leaf) -> None:
        super().__init__()
        self.proxy_buffer_attributes = True
        self.leaf = leaf
        self.opaque: dict[str, str] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.leaf(m)

    def path_of_module(self, mod: nn.Module) -> str:
        try:
            return super().path_of_module(mod)
        except NameError:
            raise Refusal(f"calls a {type(mod).__name__} that is not registered as its submodule") from None

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = self.path_of_module(m)
        if self.leaf(m):
            return self.create_proxy("call_module", name, args, kwargs)
        last = next(reversed(self.graph.nodes), None)
        stack = self.module_stack.copy()
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            for node in list(reversed(self.graph.nodes)):
                if node is last:
                    break
                self.graph.erase_node(node)
            self.module_stack = stack  # FX leaves it torn when a forward raises
            for inner in [key for key in self.opaque if key.startswith(f"{name}.")]:
                del self.opaque[inner]
            self.opaque[name] = brief(error)
            return self.create_proxy("call_module", name, args, kwargs)


def brief(error: BaseException) -> str:
    """The first line of an error, for a reason."""
    text = error.reason if isinstance(error, Refusal) else f"{type(error).__name__}: {error}"
    return text.strip().splitlines()[0][:200]


@contextmanager
def quiet_checks(module: nn.Module) -> Iterator[None]:
    """Switch a norm class's checks of its input's rank off: on a proxy they cannot be decided."""
    shadowed = [name for name in _DIM_CHECKS if hasattr(module, name) and name not in vars(module)]
    for name in shadowed:
        vars(module)[name] = lambda _input: None
    try:
        yield
    finally:
        for name in shadowed:
            del vars(module)[name]


def trace(module: nn.Module, leaf: Callable[[nn.Module], bool] = is_leaf) -> tuple[fx.Graph, dict[str, str]]:
    """The graph of a module's ``forward`` with optional arguments at their defaults, and its opaque submodules.

    Placeholders keep the names of the arguments. Raises whatever the trace raised.
    """
    if isinstance(module, fx.GraphModule):
        return module.graph, {}
    if isinstance(module, torch.jit.ScriptModule):
        raise Refusal("it is a ScriptModule")
    parameters = list(inspect.signature(module.forward).parameters.values())
    optional = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    tracer = RegionTracer(leaf)
    with quiet_checks(module), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        graph = tracer.trace(module, concrete_args=optional or None)
    for node, parameter in zip((n for n in graph.nodes if n.op == "placeholder"), parameters, strict=False):
        if parameter.name in optional:
            node.target = parameter.name
    return graph, tracer.opaque


def regions(model: nn.Module) -> tuple[list[Region], dict[str, str]]:
    """All regions of a model, outermost first, and the modules that could not be traced, by name with the reason."""
    found: list[Region] = []
    failed: dict[str, str] = {}
    seen: set[int] = set()

    def descend(module: nn.Module, name: str) -> None:
        if id(module) in seen or is_leaf(module):
            return
        seen.add(id(module))
        prefix = f"{name}." if name else ""
        if "forward" in vars(type(module)) or not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            try:
                graph, opaque = trace(module)
            except Exception as error:
                failed[name] = brief(error)
            else:
                region = Region(name, module, graph, opaque)
                found.append(region)
                for inner, reason in opaque.items():
                    failed[f"{prefix}{inner}"] = reason
                _mark(region, seen)
        for key, child in module.named_children():
            descend(child, f"{prefix}{key}")

    descend(model, "")
    return found, failed


def _mark(region: Region, seen: set[int]) -> None:
    """Everything the graph walked through is covered by the region; what it did not call is not."""
    covered = {node.target for node in region.graph.nodes if node.op == "call_module"} - set(region.opaque)
    inside: set[str] = set()
    for target in covered:
        parts = str(target).split(".")
        inside.update(".".join(parts[:end]) for end in range(1, len(parts)))
    for node in region.graph.nodes:
        for path in (node.meta.get("nn_module_stack") or {}).values():
            inside.add(path[0] if isinstance(path, tuple) else path)
    opaque = set(region.opaque)
    for name in inside:
        if isinstance(name, str) and name and name not in opaque:
            try:
                seen.add(id(region.module.get_submodule(name)))
            except AttributeError:
                continue
