"""The dataflow of one real call, as a graph: for a model whose ``forward`` cannot be traced.

Every torch function with a tensor, and every call of a leaf (as in :mod:`normswap.graph.trace`), becomes a node;
tensors are followed by identity. Operators that run below torch functions (in C++ extensions, scripted code) are seen
where they are dispatched, so that no use of a tensor goes unnoticed; compiled code, which would, is refused.

The graph speaks for the path of this call alone: sizes and Python values are baked in. Where that path was chosen by
the values of a tensor, the region says so."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from normswap.errors import Refusal
from normswap.graph.observe import eval_mode
from normswap.graph.reach import is_compiled_wrapper
from normswap.graph.state import unmarked
from normswap.graph.trace import Region, Trace, is_leaf, values_read

_DEPTH = 4
_INTERNAL = frozenset(vars(nn.Module()))
_PLAIN = (int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format)
_TELLS_A_FACT = frozenset(
    (
        "size", "dim", "numel", "nelement", "stride", "is_contiguous", "is_floating_point", "is_complex", "is_signed",
        "get_device", "element_size", "__len__", "__hash__", "__repr__", "__format__", "storage_offset", "ndimension",
        "type", "is_inference", "is_conj", "is_neg", "is_pinned",
    )
)  # fmt: skip
"""Functions that return no tensor and tell nothing of values."""
_OPERATORS: dict[str, Callable[..., Any]] = {
    f"__{sign}{name}__": getattr(operator, f"{sign}{name}")
    for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "mod", "matmul")
    for sign in ("", "i")
} | {"__getitem__": operator.getitem, "__setitem__": operator.setitem}


def record(model: nn.Module, example_inputs: tuple[Any, ...]) -> tuple[Region, dict[fx.Node, Any]]:
    """Run ``model(*example_inputs)`` once in eval mode; its calls as a region, and the shapes of the region's values.

    The model is left as it was. Raises :class:`Refusal` where the run could not be seen whole, and what the run raises.
    """
    if any(is_compiled_wrapper(module) for module in model.modules()):
        raise Refusal("part of it is compiled")
    recording = _Recording(model)
    handles: list[Any] = []
    try:
        for module in recording.names:
            if is_leaf(module) and module is not model:
                handles.append(module.register_forward_pre_hook(recording.enter, with_kwargs=True))
                handles.append(module.register_forward_hook(recording.leave, with_kwargs=True, always_call=True))
        for index, value in enumerate(example_inputs):
            recording.follow(value, recording.graph.placeholder(f"input_{index}"))
        with eval_mode(model), unmarked(model) as effects:
            with _Operators(recording), _Functions(recording):
                output = model(*example_inputs)
            kept = frozenset(recording.kept())
    finally:
        for handle in handles:
            handle.remove()
    if recording.covered:
        raise Refusal("a call in it did not return")
    recording.graph.output(tuple(recording.node(tensor) for tensor in _tensors(output)))
    told = [recording.doubt, Trace(recording.graph, effects=effects).doubt]
    doubt = next((each for each in told if each is not None), None)
    region = Region("", model, recording.graph, constants=recording.constants, kept=kept, doubt=doubt)
    return region, recording.values


def _tensors(value: Any, depth: int = _DEPTH) -> Iterator[Tensor]:
    """The tensors in containers and plain objects."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (*_PLAIN, type(None), nn.Module, type)) or not depth:
        return
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _tensors(item, depth - 1)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item, depth - 1)
    elif isinstance(getattr(value, "__dict__", None), dict):
        for item in vars(value).values():
            yield from _tensors(item, depth - 1)


def _random(name: Any) -> bool:
    words = ("rand", "normal", "bernoulli", "uniform", "multinomial", "exponential", "dropout")
    return any(word in str(name) for word in words)


def _shape(result: Any) -> Any:
    if isinstance(result, Tensor):
        return tuple(int(size) for size in result.shape)
    return [_shape(item) for item in result] if isinstance(result, (list, tuple)) else None


class _Recording:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.graph = fx.Graph()
        self.names = {module: name for name, module in model.named_modules()}
        self.own = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        self.nodes: dict[int, fx.Node] = {}
        self.alive: list[Any] = []  # an id is reused once its tensor is gone
        self.values: dict[fx.Node, Any] = {}
        self.constants: dict[str, Tensor] = {}
        self.doubt: str | None = None
        self.covered = 0
        """Depth of calls that are one node."""
        self.arguments: list[tuple[Any, Any]] = []

    # --- tensors and nodes -------------------------------------------------------------------------------------------

    def node(self, tensor: Tensor) -> fx.Node:
        """Where a tensor came from."""
        if id(tensor) not in self.nodes:
            name = self.own.get(id(tensor))
            if name is None:
                name = f"_tensor_constant{len(self.constants)}"
                self.constants[name] = tensor
            self.follow(tensor, self.graph.create_node("get_attr", name))
        return self.nodes[id(tensor)]

    def follow(self, value: Any, node: fx.Node) -> None:
        """The tensors in ``value`` are the result of ``node``."""
        self.alive.append(value)
        self.values[node] = _shape(value)
        if isinstance(value, Tensor):
            self.nodes[id(value)] = node
            return
        for index, item in enumerate(value if isinstance(value, (list, tuple)) else ()):
            if any(True for _ in _tensors(item)):
                self.follow(item, self.graph.call_function(operator.getitem, (node, index)))
        if not isinstance(value, (list, tuple)):
            for tensor in _tensors(value):
                self.nodes[id(tensor)] = node

    def argument(self, value: Any) -> Any:
        """A value as an argument of a node."""
        if isinstance(value, Tensor):
            return self.node(value)
        if isinstance(value, (list, tuple)):
            items = [self.argument(item) for item in value]
            return tuple(items) if isinstance(value, tuple) else items
        if isinstance(value, dict):
            return {str(key): self.argument(item) for key, item in value.items()}
        if value is None or value is Ellipsis or isinstance(value, (*_PLAIN, slice)):
            return value
        inside = [self.node(tensor) for tensor in _tensors(value)]
        return inside or type(value).__name__

    def varies(self, tensors: Iterator[Tensor]) -> bool:
        """Whether values may be others in another call on inputs of the same sizes."""
        pending = [self.node(tensor) for tensor in tensors]
        seen: set[fx.Node] = set()
        while pending:
            node = pending.pop()
            if node.op in ("placeholder", "call_module") or _random(getattr(node.target, "__name__", node.target)):
                return True
            if node not in seen:
                seen.add(node)
                pending.extend(node.all_input_nodes)
        return False

    # --- calls -------------------------------------------------------------------------------------------------------

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.covered:
            self.arguments.append((self.argument(args), self.argument(kwargs)))
        self.covered += 1

    def leave(self, module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        self.covered -= 1
        if not self.covered:
            args, kwargs = self.arguments.pop()
            self.follow(output, self.graph.create_node("call_module", self.names[module], args, kwargs))

    def call(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = getattr(func, "__name__", "")
        has_result = any(True for _ in _tensors(result))
        if not has_result:
            if name == "__get__" or name in _TELLS_A_FACT or not any(True for _ in values_read(func, args, kwargs)):
                return
            if result is not None and self.varies(_tensors((args, kwargs))):
                self.doubt = f"its forward asks for the value of a tensor ({name}), on which its path may depend"
        elif not any(True for _ in _tensors((args, kwargs))):
            if _random(name):
                self.follow(result, self.graph.call_function(func))
            self.alive.append(result)  # else made of nothing: a constant where it is used
            return
        given, named = self.argument(tuple(args)), self.argument(dict(kwargs))
        node = self.graph.create_node(*_call(func, name, given, named))
        self.follow(result if has_result else None, node)
        if name in ("__setitem__", "__delitem__") or (isinstance(func, torch._ops.OpOverload) and not has_result):
            self.nodes[id(args[0])] = node

    def kept(self) -> Iterator[fx.Node]:
        """What the run left in attributes of modules, where other code may read it."""
        for module in self.model.modules():
            held = [value for name, value in vars(module).items() if name not in _INTERNAL]
            for tensor in _tensors([*held, *module._buffers.values()]):
                node = self.nodes.get(id(tensor))
                if node is not None and node.op not in ("get_attr", "placeholder"):
                    yield node


def _call(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Op, target and arguments as FX would have them."""
    if name == "__get__":
        return "call_function", getattr, (args[0], getattr(func.__self__, "__name__", "attribute")), {}
    if getattr(Tensor, name, None) is not func:
        return "call_function", func, args, kwargs
    if name in _OPERATORS:
        return "call_function", _OPERATORS[name], args, kwargs
    swapped = f"__{name[3:]}" if name.startswith("__r") else ""
    if swapped in _OPERATORS and len(args) == 2:
        return "call_function", _OPERATORS[swapped], args[::-1], kwargs
    return "call_method", name, args, kwargs


class _Functions(TorchFunctionMode):
    def __init__(self, recording: _Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _covered(self.recording, func, args, kwargs or {})


class _Operators(TorchDispatchMode):
    """What runs without a torch function: operators called from C++."""

    def __init__(self, recording: _Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _covered(self.recording, func, args, kwargs or {})


def _covered(recording: _Recording, func: Any, args: Any, kwargs: Any) -> Any:
    """Run a function; it is one node unless it runs inside of one."""
    recording.covered += 1
    try:
        result = func(*args, **kwargs)
    finally:
        recording.covered -= 1
    if not recording.covered:
        recording.covered += 1  # looking at tensors calls functions too
        try:
            recording.call(func, args, kwargs, result)
        finally:
            recording.covered -= 1
    return result
