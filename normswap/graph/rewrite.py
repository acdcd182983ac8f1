"""A module's own ``forward``, traced with every child as a leaf, edited as graphs and given back to the same object.

It is traced in train and in eval mode. The object's class becomes a subclass of the user's with a ``forward`` generated
from the two graphs; its children, other parameters, hooks and aliases are untouched. A ``GraphModule`` has its graph
edited."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from itertools import count
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.graph_module import _format_import_block, _forward_from_src
from torch.package.importer import sys_importer

from normswap.errors import Refusal
from normswap.graph.trace import brief, trace


@dataclass
class TracedForward:
    """A module's own ``forward``: its graphs, and the tensors made in it by Python alone, in train and eval mode."""

    module: nn.Module
    graphs: dict[bool, fx.Graph]
    constants: dict[bool, dict[str, Tensor]] = field(default_factory=dict)


def traced_forward(module: nn.Module, why: str) -> TracedForward:
    """Trace a module's ``forward`` in both modes; ``why`` begins the reason when that fails.

    Raises :class:`Refusal` when it cannot be traced, or does what a forward generated from the trace would not do.
    """
    forward = TracedForward(module, {})
    own = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    was_training = module.training
    try:
        for training in (True, False):
            if isinstance(module, fx.GraphModule):
                forward.graphs[training] = module.graph
                continue
            module.training = training
            try:
                traced = trace(module, leaf=lambda _child: True)
            except Exception as error:
                mode = "train" if training else "eval"
                raise Refusal(f"{why} and cannot be traced in {mode} mode ({brief(error)})") from error
            if any(node.op == "get_attr" and _written(node, traced.constants) for node in traced.graph.nodes):
                traced.effects.append("writes into a tensor that it makes itself")
            if traced.reads & own:
                traced.effects.append("computes in Python with the values of its tensors, which the trace would freeze")
            if traced.effects:
                told = ", ".join(traced.effects)
                raise Refusal(f"{why}, and a generated one would not do what it does besides: it {told}")
            forward.graphs[training], forward.constants[training] = traced.graph, traced.constants
    finally:
        if module.training != was_training:
            module.training = was_training
    return forward


def _written(node: fx.Node, constants: dict[str, Tensor]) -> bool:
    """Whether a tensor made in Python is changed in place, which would last from one call to the next."""
    return node.target in constants and any(
        user.args[:1] == (node,) and (user.target is operator.setitem or str(user.target).endswith("_"))
        for user in node.users
    )


def copied_graphs(forward: TracedForward) -> dict[bool, fx.Graph]:
    """The graphs to edit, by mode (a ``GraphModule`` has that of eval mode only); the module gets the constants."""
    if isinstance(forward.module, fx.GraphModule):
        return {False: copy.deepcopy(forward.module.graph)}
    graphs = {mode: copy.deepcopy(graph) for mode, graph in forward.graphs.items()}
    _keep_constants(forward.module, graphs, forward.constants)
    return graphs


def _keep_constants(module: nn.Module, graphs: dict[bool, fx.Graph], constants: dict[bool, dict[str, Tensor]]) -> None:
    """Give the module the tensors that its ``forward`` made in Python, as plain attributes."""
    for mode, graph in graphs.items():
        names: dict[Any, str] = {}
        for old, tensor in constants[mode].items():
            names[old] = next(name for i in count() if not hasattr(module, name := f"_tensor_constant{i}"))
            setattr(module, names[old], tensor)
        for node in graph.nodes:
            if node.op == "get_attr":
                node.target = names.get(node.target, node.target)


def install(module: nn.Module, graphs: dict[bool, fx.Graph], base: type[nn.Module]) -> None:
    """Make ``module`` run edited graphs, as an object of a subclass of ``base``."""
    if isinstance(module, fx.GraphModule):
        module.graph = graphs[False]
        return
    module.__class__ = _lifted_class(base, tuple(_source(graphs[mode]) for mode in (True, False)))


class Before:
    """The class, tables and graph of a module and of its submodules."""

    def __init__(self, module: nn.Module) -> None:
        self.graphs = [(m, m.graph) for m in module.modules() if isinstance(m, fx.GraphModule)]
        tables = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
        self.saved = [
            (m, m.__class__, dict(vars(m)), {t: copy.copy(vars(m)[t]) for t in tables}) for m in module.modules()
        ]

    def restore(self) -> None:
        for edited, graph in self.graphs:
            if edited.graph is not graph:
                edited.graph = graph  # compiles the forward anew
        for module, cls, attributes, tables in self.saved:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)
            for name, table in tables.items():
                current = vars(module)[name]
                current.clear()
                current.update(table)


Source = tuple[str, str]
"""Generated code of a forward, and the imports that it needs."""


def _source(graph: fx.Graph) -> Source:
    code = graph.python_code("self")
    return code.src, _format_import_block(code.globals, sys_importer)


def _function(source: Source) -> Callable[..., Any]:
    code, imports = source
    names: dict[str, Any] = {}
    exec(imports, names)
    return _forward_from_src(code, names)


class Lifted:
    """Mix-in of a class whose ``forward`` was generated; copied and pickled by its base and code."""

    lifted_base: type[nn.Module]
    lifted_sources: tuple[Source, ...]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty, (self.lifted_base, self.lifted_sources), self.__getstate__()


def _lifted_class(base: type[nn.Module], sources: tuple[Source, ...]) -> type[nn.Module]:
    if issubclass(base, Lifted):
        base = base.lifted_base
    train, evaluation = (_function(source) for source in sources)
    members: dict[str, Any] = {
        "lifted_base": base,
        "lifted_sources": sources,
        "__module__": __name__,
        "__doc__": base.__doc__,
    }
    if sources[0] == sources[1]:
        members["forward"] = evaluation
    else:

        @wraps(evaluation)  # its signature, without which the forward could not be traced again
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return (train if self.training else evaluation)(self, *args, **kwargs)

        members["forward"] = forward
    name = "Lifted" if base is nn.Module else base.__name__
    return type(name, (Lifted, base), members)


def _empty(base: type[nn.Module], sources: tuple[Source, ...]) -> nn.Module:
    cls = _lifted_class(base, sources)
    return cls.__new__(cls)
