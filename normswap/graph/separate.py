"""One module that is called at several places becomes several, each with parameters of its own.

Where its places have different names, a copy goes into the slot of that name. Where one name is called several times,
the module whose own ``forward`` makes the calls gets copies under new names and a ``forward`` generated from its trace
that calls them. A module between the two is copied around the layers that differ: the copy is another object of the
same class and holds the same other modules and tensors. Tied parameters are untied by a copy in the layer that asks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from normswap.errors import NormswapError, Refusal
from normswap.graph.rewrite import Before, copied_graphs, install, traced_forward

WHY = "its forward calls a module several times"


@dataclass(frozen=True)
class Copied:
    """The module at ``name`` becomes a copy of the one at ``of``; with no ``layers``, the very same object."""

    name: str
    of: str
    layers: Mapping[str, str]
    """By path inside it (``""`` for itself), the layers that are not those of the original: the name of the layer that
    is used, which is the place's own name for a new one."""

    @property
    def new(self) -> list[str]:
        """The names of the layers that are made for it."""
        return [path for inner, path in self.layers.items() if path == joined(self.name, inner)]


@dataclass(frozen=True)
class Calls:
    """A ``forward`` some of whose calls go to other modules."""

    module: str
    total: int
    """How many calls of modules its trace shows."""
    names: Mapping[int, str]
    """Which of them, by number, is a call of what instead. (By number: in a trace a module has one name only, however
    many slots it stands in.)"""


@dataclass(frozen=True)
class Unsharing:
    """Steps that give modules copies, in order, and then the parameters (by name) that are untied."""

    steps: tuple[Copied | Calls, ...] = ()
    untied: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.steps or self.untied)

    @property
    def rewritten(self) -> list[str]:
        """The modules that get a generated ``forward``."""
        return [step.module for step in self.steps if isinstance(step, Calls)]

    @property
    def made(self) -> list[str]:
        """The layers that are new."""
        return [name for step in self.steps if isinstance(step, Copied) for name in step.new]

    def to_dict(self) -> dict[str, Any]:
        steps = [
            {"name": step.name, "of": step.of, "layers": dict(step.layers)}
            if isinstance(step, Copied)
            else {"module": step.module, "total": step.total, "calls": [[i, n] for i, n in step.names.items()]}
            for step in self.steps
        ]
        return {"steps": steps, "untied": list(self.untied)}

    @classmethod
    def from_dict(cls, data: Any) -> Unsharing:
        """Raises :class:`NormswapError` for what :meth:`to_dict` did not write."""
        try:
            steps: list[Copied | Calls] = []
            for step in data["steps"]:
                if "of" in step:
                    steps.append(Copied(str(step["name"]), str(step["of"]), dict(step["layers"])))
                else:
                    names = {int(number): str(name) for number, name in step["calls"]}
                    steps.append(Calls(str(step["module"]), int(step["total"]), names))
            return cls(tuple(steps), tuple(map(str, data["untied"])))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise NormswapError("the recipe's 'unshare' is malformed: it needs steps and untied") from error


def joined(name: str, inner: str) -> str:
    return f"{name}.{inner}" if name and inner else name or inner


def inside(path: str, name: str) -> bool:
    """Whether a dotted name is that of a module or of something in it."""
    return not name or path == name or path.startswith(f"{name}.")


def separate(model: nn.Module, unsharing: Unsharing, *, own_memory: bool = True) -> Callable[[], None]:
    """Make the copies in place; returns what undoes it, bit for bit.

    Without ``own_memory`` new parameters lie in the memory of the old ones, for a look at the result. Raises
    :class:`NormswapError`, with the model unchanged, when the steps do not fit the model."""
    before = Before(model)
    try:
        for step in unsharing.steps:
            try:
                take(model, step, own_memory)
            except (Refusal, AttributeError, KeyError) as error:
                place = step.name if isinstance(step, Copied) else step.module
                reason = error.reason if isinstance(error, Refusal) else "the model has no such module"
                raise NormswapError(f"{place or 'the model'} cannot be unshared: {reason}") from error
        for name in unsharing.untied:
            untie(model, name, own_memory)
    except BaseException:
        before.restore()
        raise
    return before.restore


def take(model: nn.Module, step: Copied | Calls, own_memory: bool) -> None:
    """Make one step, in place."""
    if isinstance(step, Calls):
        _call_apart(model.get_submodule(step.module), step)
        return
    source = model.get_submodule(step.of)
    parent, _, key = step.name.rpartition(".")
    put = _copy(model, source, step, "", own_memory) if step.layers else source
    model.get_submodule(parent)._modules[key] = put


def _copy(model: nn.Module, module: nn.Module, step: Copied, path: str, own_memory: bool) -> nn.Module:
    if path in step.layers:
        name = step.layers[path]
        if name != joined(step.name, path):
            return model.get_submodule(name)
        layer = _shallow(module)
        for key, parameter in layer._parameters.items():
            if parameter is not None:
                layer._parameters[key] = _twin(parameter, own_memory)
        return layer
    if not any(inside(inner, path) for inner in step.layers):
        return module
    copied = _shallow(module)
    for key, child in module._modules.items():
        if child is not None:
            copied._modules[key] = _copy(model, child, step, joined(path, key), own_memory)
    return copied


def _shallow(module: nn.Module) -> nn.Module:
    """Another object of the same class with the same children and tensors, in tables of its own."""
    cls: Any = type(module)
    copied: nn.Module = cls.__new__(cls)
    for name, value in vars(module).items():
        if name != "_compiled_call_impl":
            vars(copied)[name] = copy.copy(value) if isinstance(value, (dict, list, set)) else value
    return copied


def _twin(parameter: nn.Parameter, own_memory: bool) -> nn.Parameter:
    data = parameter.detach()
    return nn.Parameter(data.clone() if own_memory else data, requires_grad=parameter.requires_grad)


def untie(model: nn.Module, name: str, own_memory: bool) -> None:
    """Give one layer its own copy of a parameter that other modules have too; nothing is done where it is the last."""
    parent, _, key = name.rpartition(".")
    try:
        layer = model.get_submodule(parent)
        parameter = layer._parameters[key]
    except (AttributeError, KeyError) as error:
        raise NormswapError(f"the model has no parameter {name!r}, which was untied") from error
    owners = [m for m in model.modules() if any(each is parameter for each in m._parameters.values())]
    if parameter is not None and len(owners) > 1:
        layer._parameters[key] = _twin(parameter, own_memory)


def calls(module: nn.Module) -> list[str]:
    """The children that a module's own ``forward`` calls, in order.

    Raises :class:`Refusal` when it cannot be traced, or does what a generated forward would not do."""
    forward = traced_forward(module, WHY)
    called = [[str(node.target) for node in _calls(graph)] for graph in forward.graphs.values()]
    if called[0] != called[-1]:
        raise Refusal("its forward calls other modules in train mode than in eval mode")
    return called[0]


def _calls(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_module"]


def _call_apart(module: nn.Module, step: Calls) -> None:
    graphs = copied_graphs(traced_forward(module, WHY))
    for graph in graphs.values():
        nodes = _calls(graph)
        if len(nodes) != step.total:
            raise Refusal(f"its forward calls {len(nodes)} modules, not {step.total}")
        for number, name in step.names.items():
            if not 0 <= number < step.total:
                raise Refusal(f"its forward has no call number {number}")
            nodes[number].target = name
    install(module, graphs, type(module))


def parameter_bytes(model: nn.Module) -> int:
    """The memory of all parameters, each counted once."""
    with torch.no_grad():
        return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
