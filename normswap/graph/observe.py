"""An observed run: one real call that counts how often each module runs and on what shapes.

The run is in eval mode, without gradients, on the model itself; buffers, train/eval flags and the random state are put
back. It speaks for the path that these inputs take, so what rests on it is marked ``observed``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from normswap.errors import NormswapError
from normswap.graph.functional import SIGNATURES, arguments, is_norm_function
from normswap.graph.state import unmarked
from normswap.graph.trace import values_read


@dataclass
class Calls:
    """The shapes of the first tensor input at each call, in order."""

    shapes: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.shapes)


@dataclass
class Observation:
    """What one run showed: calls by module ``id``, and functional norm calls by the ``id`` of the module they stand
    in."""

    modules: dict[int, Calls] = field(default_factory=dict)
    functions: dict[int, list[tuple[str, tuple[int, ...]]]] = field(default_factory=dict)
    objects: dict[int, nn.Module] = field(default_factory=dict)
    """The modules that ran, by ``id``."""
    runs: dict[int, list[Run]] = field(default_factory=dict)
    """Of the calls of watched modules, by ``id``, the first with each kind of arguments."""
    reads: dict[int, str] = field(default_factory=dict)
    """``id`` of tensors of a module that other code read, and the class whose code it was."""


@dataclass
class Run:
    """One call of a module, with copies of what it took and gave: later code may change them in place."""

    kind: str
    """The structure of its arguments: ranks, dtypes, and what is no tensor."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """All modules in eval mode; flags, buffers and random state are restored, also on an error."""
    flags = [(module, module.training) for module in model.modules()]
    buffers = [
        (each, each.detach().clone()) for each in model.buffers() if not each.is_meta and not each.is_inference()
    ]
    try:
        for module, _ in flags:
            module.training = False
        with unmarked(model), torch.no_grad(), torch.random.fork_rng():
            yield
    finally:
        for module, training in flags:
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _kind(args: Any, kwargs: Any) -> str:
    leaves, structure = _pytree.tree_flatten((args, kwargs))
    told = [
        f"{leaf.dim()}{leaf.dtype}" if isinstance(leaf, Tensor)
        else repr(leaf) if leaf is None or isinstance(leaf, (bool, str))
        else type(leaf).__name__
        for leaf in leaves
    ]  # fmt: skip
    return f"{structure} {told}"


def _copied(value: Any) -> Any:
    return _pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), value)


class _Functions(TorchFunctionMode):
    def __init__(self, observation: Observation, stack: list[nn.Module]) -> None:
        super().__init__()
        self.observation = observation
        self.stack = stack
        self.inside = False
        self.owners: dict[int, set[int]] = {}
        self.computing: set[int] = set()
        for module in stack[0].modules():
            own = [*module._parameters.values(), *module._buffers.values()]
            if is_parametrized(module):
                computes: Any = module.parametrizations
                self.computing.update(id(inner) for inner in computes.modules())
                own += [*computes.parameters(), *computes.buffers()]
            for tensor in own:
                if tensor is not None:
                    self.owners.setdefault(id(tensor), set()).add(id(module))

    def note_reads(self, func: Any, args: Any, kwargs: Any) -> None:
        """Tensors of modules that a function takes while another module's code runs."""
        running = next(module for module in reversed(self.stack) if id(module) not in self.computing)
        for tensor in values_read(func, args, kwargs):
            owners = self.owners.get(id(tensor))
            if owners is not None and id(running) not in owners:
                self.observation.reads.setdefault(id(tensor), type(running).__name__)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.note_reads(func, args, kwargs)
        if self.inside or not is_norm_function(func):
            return func(*args, **kwargs)
        if func in SIGNATURES:
            given = arguments(func, args, kwargs)[1]["input"]
        else:
            given = args[0]
        name = getattr(func, "__name__", str(func))
        self.observation.functions.setdefault(id(self.stack[-1]), []).append((name, tuple(given.shape)))
        self.inside = True  # F.batch_norm calls torch.batch_norm
        try:
            return func(*args, **kwargs)
        finally:
            self.inside = False


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def observe(model: nn.Module, example_inputs: tuple[Any, ...], watched: Iterable[nn.Module] = ()) -> Observation:
    """Run ``model(*example_inputs)`` once and record its calls, and what ``watched`` modules took and gave.

    Raises :class:`NormswapError` when ``example_inputs`` is no tuple or the run fails.
    """
    if not isinstance(example_inputs, tuple):
        raise NormswapError(
            f"example_inputs must be a tuple, not {type(example_inputs).__name__}: write (x,) for one input"
        )
    observation = Observation(objects={id(model): model})
    stack: list[nn.Module] = [model]

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        stack.append(module)
        observation.objects[id(module)] = module
        first = next((a for a in args if isinstance(a, Tensor)), None)
        shape = () if first is None else tuple(first.shape)
        observation.modules.setdefault(id(module), Calls()).shapes.append(shape)

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        stack.pop()

    open_runs: list[Run | None] = []

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kind = _kind(args, kwargs)
        known = {run.kind for run in observation.runs.get(id(module), [])}
        open_runs.append(None if kind in known else Run(kind, _copied(args), _copied(kwargs)))

    def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        run = open_runs.pop()
        if run is not None:
            run.output = _copied(output)
            observation.runs.setdefault(id(module), []).append(run)

    handles: list[Any] = []
    for module in watched:
        handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
        handles.append(module.register_forward_hook(end, with_kwargs=True, prepend=True))
    handles += [
        register_module_forward_pre_hook(enter),
        torch.nn.modules.module.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        with eval_mode(model), _Functions(observation, stack):
            model(*example_inputs)
    except NormswapError:
        raise
    except Exception as error:
        shapes = ", ".join(str(tuple(a.shape)) for a in example_inputs if isinstance(a, Tensor))
        raise NormswapError(f"the model does not run on example_inputs ({shapes}): {_first_line(error)}") from error
    finally:
        for handle in handles:
            handle.remove()
    return observation
