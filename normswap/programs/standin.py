"""A program of ``torch.export`` as a tree of modules, so that what is planned for a model is planned for it.

The stand-in has one graph, a layer or norm for each call whose tensors the program holds, under the name of the module
that held them, and functions for the rest (:mod:`normswap.programs.operators`). It shares the program's tensors and
knows the shapes that the program states, open sizes as symbols. It is planned on, not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.node import map_arg

from normswap.engine.plan import Skip
from normswap.graph.shapes import STATED, Symbol, Value
from normswap.programs import layers
from normswap.programs.operators import FIRST, Given, given, hidden, meant, name_of, writes

LIFTED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


@dataclass
class StandIn:
    """The modules of a program, and the calls in it that each stands for."""

    program: ExportedProgram
    module: fx.GraphModule
    calls: dict[str, list[fx.Node]]
    """The program's nodes by the name of the module."""
    skips: list[Skip] = field(default_factory=list)
    """Norms that are no modules, and why."""


def stand_in(program: ExportedProgram) -> StandIn:
    """The program's stand-in. Raises :class:`NormswapError` for one that cannot be followed."""
    return _Builder(program).build()


def targets(program: ExportedProgram) -> dict[str, str]:
    """The name of each tensor that a program holds, by the name of its placeholder."""
    specs = program.graph_signature.input_specs
    return {spec.arg.name: str(spec.target) for spec in specs if spec.kind in LIFTED}


class _Builder:
    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.names = targets(program)
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.nodes: dict[fx.Node, fx.Node] = {}
        self.firsts: set[fx.Node] = set()
        """Calls of several results that stand for their first."""
        self.deferred: set[fx.Node] = set()
        """Transposed weights, which a linear layer does not read as such."""
        self.symbols: dict[str, Symbol] = {}
        self.made: dict[Any, str] = {}
        self.calls: dict[str, list[fx.Node]] = {}
        self.training: set[str] = set()
        self.skips: list[Skip] = []
        placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
        found = {placeholders[name]: self._tensor(target) for name, target in self.names.items()}
        self.tensors = layers.Tensors(found, _overwritten(program, placeholders))

    def _tensor(self, target: str) -> Tensor:
        value: Any = self.program.state_dict.get(target)
        found: Tensor = self.program.constants[target] if value is None else value
        return found

    def build(self) -> StandIn:
        for node in self.program.graph.nodes:
            self._add(node)
        self._inside_branches()
        module = fx.GraphModule(self.root, self.graph).eval()
        for name in self.calls:
            module.get_submodule(name).train(name in self.training)
        return StandIn(self.program, module, self.calls, self.skips)

    def _add(self, node: fx.Node) -> None:
        if node.op == "output":
            self.graph.output(map_arg(node.args[0], self._node))
        elif node.op == "placeholder":
            if node.name not in self.names:
                self._keep(node, self.graph.placeholder(node.name))
        elif node.op == "call_function":
            self._call(node)

    def _node(self, node: fx.Node) -> Any:
        """What stands for a node; tensors of the program are looked up where they are first read."""
        if node not in self.nodes and node.name in self.names:
            flat = self._free(self.names[node.name].replace(".", "_"))
            value = self.tensors.any_of(node)
            if value.is_floating_point():
                self.root.register_parameter(flat, self.tensors.parameter(value))
            else:
                self.root.register_buffer(flat, value)
            self._keep(node, self.graph.get_attr(flat))
        elif node in self.deferred and node not in self.nodes:
            self._function(node, meant(node))
        return self.nodes.get(node)  # ``None`` for the graph of a branch

    def _keep(self, node: fx.Node, made: fx.Node) -> None:
        self.nodes[node] = made
        made.meta[STATED] = self._stated(node.meta.get("val"))

    def _stated(self, value: Any) -> Value:
        if isinstance(value, Tensor):
            return tuple(self._size(size) for size in value.shape)
        if isinstance(value, (list, tuple)):
            return [self._stated(each) for each in value]
        return self._size(value) if isinstance(value, (int, torch.SymInt)) else None

    def _size(self, size: Any) -> int | Symbol:
        return size if isinstance(size, int) else self.symbols.setdefault(str(size), Symbol())

    # --- calls -------------------------------------------------------------------------------------------------------

    def _call(self, node: fx.Node) -> None:
        if not isinstance(node.target, torch._ops.OpOverload):
            first = node.args[0] if node.args else None
            if first in self.firsts:
                if node.users:  # the others are not asked for
                    self.nodes[node] = self.nodes[first]  # type: ignore[index]
                return
            self._function(node, (node.target, node.args, dict(node.kwargs)))
            return
        if self.tensors.of(layers.transposed(node)) is not None:
            self.deferred.add(node)
            return
        a = given(node)
        several = name_of(node.target) in layers.RESULTS | FIRST
        alone = not several or all(user.args[1] == 0 for user in node.users if user.users)
        built = reason = layers.norm(node, a, self.tensors)
        if isinstance(built, nn.Module) and not alone:
            built = reason = "its statistics are used too"
        if isinstance(reason, str):
            self.skips.append(Skip(node.name, reason, was=str(node.target)))
        if not isinstance(built, nn.Module):
            built = layers.layer(node, a, self.tensors)
        if isinstance(built, nn.Module):
            self._module(node, built, a)
        elif isinstance(reason, str) or (several and not alone):
            self._function(node, (hidden(node.target), node.args, dict(node.kwargs)))
        else:
            self._function(node, meant(node))
        if several and alone and not isinstance(reason, str):
            self.firsts.add(node)

    def _function(self, node: fx.Node, call: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> None:
        target, args, kwargs = call
        if not node.users and not _may_write(node):  # a check of sizes
            return
        args, kwargs = map_arg(args, self._node), map_arg(kwargs, self._node)
        create = self.graph.call_method if isinstance(target, str) else self.graph.call_function
        self._keep(node, create(target, args, kwargs))

    def _module(self, node: fx.Node, module: nn.Module, a: Given) -> None:
        key = (type(module), str(module), module.training, *map(id, (*module.parameters(), *module.buffers())))
        name = self.made.get(key)
        if name is None:
            name = self.made[key] = self._place(node, module, a)
            if module.training and isinstance(module, layers.NORMS):
                self.training.add(name)
        self.calls.setdefault(name, []).append(node)
        made = self.graph.call_module(name, (self._node(layers.source(node, a)),))
        self._keep(node, made)
        value = node.meta.get("val")
        if isinstance(value, (list, tuple)):
            made.meta[STATED] = self._stated(value[0])

    def _place(self, node: fx.Node, module: nn.Module, a: Given) -> str:
        """Put a module where the one was whose tensors it has, where there is room; the name it gets."""
        given = [*layers.tensors_of(node, a).values(), a.get("running_mean")]
        held = [self.names[each.name] for each in given if isinstance(each, fx.Node) and each.name in self.names]
        owner = held[0].rpartition(".")[0] if held else ""
        taken = owner in self.calls or any(
            name.startswith(f"{owner}.") or owner.startswith(f"{name}.") for name in self.calls
        )
        if not owner or taken or (hasattr(self.root, owner.partition(".")[0]) and not _is_holder(self.root, owner)):
            owner = self._free(node.name)
        *path, last = owner.split(".")
        home = self.root
        for part in path:
            if part not in home._modules:
                home.add_module(part, nn.Module())
            home = home._modules[part]  # type: ignore[assignment]
        home.add_module(last, module)
        return owner

    def _free(self, name: str) -> str:
        while hasattr(self.root, name):
            name += "_"
        return name

    def _inside_branches(self) -> None:
        for name, inner in self.program.graph_module.named_modules():
            if not name or not isinstance(inner, fx.GraphModule):
                continue
            for node in inner.graph.nodes:
                if any(part in name_of(node.target) for part in layers.FAMILIES):
                    reason = "it is in a part of the program that is called by another, and is not looked into"
                    self.skips.append(Skip(f"{name}.{node.name}", reason, was=str(node.target)))


def _is_holder(root: nn.Module, name: str) -> bool:
    """Whether the modules on the way to ``name`` are there or free, and are nothing else."""
    home: Any = root
    for part in name.split("."):
        if not hasattr(home, part):
            return True
        home = getattr(home, part)
        if type(home) is not nn.Module:
            return False
    return False


def _may_write(node: fx.Node) -> bool:
    return bool(writes(node.target)) or node.is_impure()


def _overwritten(program: ExportedProgram, placeholders: Mapping[str, fx.Node]) -> set[fx.Node]:
    """The tensors of a program that it changes when it runs, and what shares their memory by way of an operator."""
    kinds = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)
    mutated = {str(spec.target) for spec in program.graph_signature.output_specs if spec.kind in kinds}
    found = {placeholders[name] for name, target in targets(program).items() if target in mutated}
    lifted = {placeholders[name] for name in targets(program)}
    for node in program.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        a, written = given(node), writes(node.target)
        trains = a.get("training", False) or name_of(node.target) == "aten::_native_batch_norm_legit.default"
        if trains and "running_mean" in a:
            written = [*written, "running_mean", "running_var"]
        for name in written:
            pending = [a.get(name)]
            while pending:
                value = pending.pop()
                if not isinstance(value, fx.Node):
                    continue
                if value in lifted:
                    found.add(value)
                elif value.op == "call_function":
                    pending += [each for each in value.all_input_nodes if _may_alias(value)]
    return found


def _may_alias(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(each.alias_info is not None for each in schema.arguments)
