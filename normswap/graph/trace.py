"""Regions: the largest parts of a model that FX can trace on their own, with norms and linear layers as leaves.

A module whose ``forward`` cannot be traced inside a traceable parent becomes an opaque leaf there and is tried as a
region of its own; its parent's graph goes on. So one control-flow statement costs one module its dataflow, not the
model."""

from __future__ import annotations

import builtins
import inspect
import operator
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.overrides import TorchFunctionMode

from normswap import registry
from normswap.errors import FixedArgument, NormswapError, Refusal
from normswap.graph.state import unmarked

LINEAR_LAYERS = (_ConvNd, nn.Linear, nn.Bilinear, nn.Embedding)
_DIM_CHECKS = ("_check_input_dim", "_check_non_zero_input_channels")


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one node in a graph: norms and linear layers (subclasses too), and torch's own modules."""
    if isinstance(module, LINEAR_LAYERS) or registry.registered(module):
        return True
    if has_plain_forward(module):
        return False
    inside_torch = type(module).__module__.startswith(("torch.nn.", "torch.ao.nn"))
    return inside_torch and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict, fx.GraphModule))


def _encoder_layer(
    self: Any, src: Any, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool = False
) -> Any:
    if self.norm_first:
        x = src + self._sa_block(self.norm1(src), src_mask, src_key_padding_mask, is_causal=is_causal)
        return x + self._ff_block(self.norm2(x))
    x = self.norm1(src + self._sa_block(src, src_mask, src_key_padding_mask, is_causal=is_causal))
    return self.norm2(x + self._ff_block(x))


def _encoder(
    self: Any, src: Any, mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool | None = None
) -> Any:
    for layer in self.layers:
        src = layer(src, mask, src_key_padding_mask, False if is_causal is None else is_causal)
    return src if self.norm is None else self.norm(src)


_PLAIN_FORWARDS: dict[Any, Callable[..., Any]] = {
    nn.TransformerEncoderLayer.forward: _encoder_layer,
    nn.TransformerEncoder.forward: _encoder,
    nn.TransformerDecoderLayer.forward: nn.TransformerDecoderLayer.forward,
}
"""What stands for a ``forward`` of torch in a trace: the same function, without the choice of a fused kernel."""


def has_plain_forward(module: nn.Module) -> bool:
    """Whether a module's ``forward`` is one of torch's whose meaning is known, and is traced instead of its code."""
    classes = (nn.TransformerEncoderLayer, nn.TransformerEncoder, nn.TransformerDecoderLayer)
    return isinstance(module, classes) and "forward" not in vars(module) and type(module).forward in _PLAIN_FORWARDS


@dataclass
class Region:
    """A traced submodule: its dotted name in the model, its graph, and the modules of the graph's nodes by target."""

    name: str
    module: nn.Module
    graph: fx.Graph
    opaque: dict[str, str] = field(default_factory=dict)
    """Submodules (by name inside the region) that could not be traced, with the reason."""
    constants: dict[str, Tensor] = field(default_factory=dict)
    """Tensors made in the ``forward`` by Python alone, by the name the graph gives them."""
    kept: frozenset[fx.Node] = frozenset()
    """Values that the ``forward`` stores in attributes, where other code may read them."""
    doubt: str | None = None
    """Why another call may take another path."""
    assumes_tensors: bool = False
    """Whether it asked if an argument is a tensor; the trace took it for one."""
    reads: frozenset[int] = frozenset()
    """``id`` of tensors whose values the ``forward`` read while it was traced."""
    when: str = ""
    """The circumstances of a trace that is not the usual one."""
    called: dict[str, nn.Module] = field(default_factory=dict, repr=False)
    """Modules by target, as they were looked up."""

    @classmethod
    def of(cls, name: str, module: nn.Module, traced: Trace, when: str = "") -> Region:
        region = cls(name, module, traced.graph, traced.opaque, traced.constants, traced.kept, traced.doubt)
        region.assumes_tensors, region.reads, region.when = traced.assumes_tensors, traced.reads, when
        return region

    def qualified(self, target: str) -> str:
        return f"{self.name}.{target}" if self.name else target

    def module_of(self, node: fx.Node) -> nn.Module | None:
        if node.op != "call_module" or not isinstance(node.target, str):
            return None
        module = self.called.get(node.target)
        if module is None:
            module = self.called[node.target] = self.module.get_submodule(node.target)
        return module


@dataclass
class Trace:
    """What a trace of one ``forward`` gave."""

    graph: fx.Graph
    opaque: dict[str, str] = field(default_factory=dict)
    """Submodules that could not be traced, with the reason."""
    constants: dict[str, Tensor] = field(default_factory=dict)
    """Tensors made in the ``forward`` by Python alone, by the name the graph gives them."""
    effects: list[str] = field(default_factory=list)
    """What the ``forward`` does that the graph does not hold."""
    kept: frozenset[fx.Node] = frozenset()
    """Values that the ``forward`` stores in attributes."""
    assumes_tensors: bool = False
    """Whether it asked if an argument is a tensor."""
    reads: frozenset[int] = frozenset()
    """``id`` of tensors, no proxies, whose values it read."""

    @property
    def doubt(self) -> str | None:
        told = [effect for effect in self.effects if effect.startswith("draws") or effect.endswith("number")]
        return f"its forward {told[0]}, on which its path may depend" if told else None


class Value(fx.Proxy):
    """A proxy whose ``x += y`` is a node that writes to ``x``; in ``fx.Proxy`` it looks like ``x + y``."""


def _in_place(operation: Callable[..., Any]) -> Callable[[Value, Any], Any]:
    def method(self: Value, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul"):
    setattr(Value, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))


class RegionTracer(fx.Tracer):
    """Traces into everything but leaves; a child that fails is rolled back and becomes a leaf, as is one with hooks.

    Optional arguments are traced at their defaults, of which :func:`check_default` takes care.
    """

    def __init__(
        self, leaf: Callable[[nn.Module], bool] = is_leaf, *, given: bool = False, tensors: bool = True
    ) -> None:
        super().__init__()
        self.given = given
        """Trace with optional arguments given: something for ``None``, the other truth value."""
        self.tensors = tensors
        """What to answer when code asks whether an argument is a tensor."""
        self.assumes_tensors = False
        self.proxy_buffer_attributes = True
        self.leaf = leaf
        self.opaque: dict[str, str] = {}
        self.constants: dict[str, Tensor] = {}
        self.modes = _modes()
        self.switches_modes = False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Value(node, self)

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
        if m._forward_hooks or m._forward_pre_hooks:
            self.opaque[name] = "it has forward hooks, which may change what it takes and gives"
            return self.create_proxy("call_module", name, args, kwargs)
        last = next(reversed(self.graph.nodes), None)
        stack = self.module_stack.copy()
        try:
            if has_plain_forward(m):
                forward = partial(_PLAIN_FORWARDS[type(m).forward], m)
            with _tensors_for(type(m).forward):
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

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        if has_plain_forward(self.root):
            root_fn = _PLAIN_FORWARDS[root_fn]
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        values: dict[str, Any] = {}
        given: dict[str, fx.Proxy] = {}
        for p in sorted(parameters, key=lambda p: p.default is not p.empty):
            if p.default is p.empty or (self.given and p.default is None):
                values[p.name] = self.create_proxy("placeholder", p.name, (), {})
            elif self.given and type(p.default) is bool:
                values[p.name] = not p.default
            else:
                values[p.name] = p.default
                if _literal(p.default):
                    given[p.name] = self.create_proxy("placeholder", p.name, (p.default,), {})
        for name, proxy in given.items():
            self.create_proxy("call_function", check_default, (proxy, values[name], name), {})
        named = {p.name: values[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY}
        positional = [values[p.name] for p in parameters if p.kind is not p.KEYWORD_ONLY]

        return (lambda *args: root_fn(*args, **named)), [self.root, *positional]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and a not in self.tensor_attrs:
            name = f"_tensor_constant{len(self.constants)}"
            self.tensor_attrs[a] = name
            self.constants[name] = a
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        self.switches_modes = self.switches_modes or _modes() != self.modes
        return super().create_node(*args, **kwargs)


def _modes() -> tuple[bool, int]:
    """Whether gradients are on, and how many autocast blocks are open, those that switch it off too."""
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return torch.is_grad_enabled(), depth


def _literal(value: Any) -> bool:
    """Whether a default can be written in generated code."""
    if isinstance(value, (tuple, list)):
        return all(map(_literal, value))
    return value is None or type(value) in (bool, int, float, str)


def check_default(given: Any, default: Any, name: str) -> None:
    """Called in a generated ``forward``, which holds for the default of an optional argument only."""
    if isinstance(given, (Tensor, fx.Proxy)) or given != default:
        shown = f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else repr(given)
        shown = "a value" if isinstance(given, fx.Proxy) else shown
        raise FixedArgument(
            f"{name}={shown}: a functional norm or a shared layer was replaced here, and the forward holds for "
            f"{name}={default!r} only; convert or fold the model with skip= for that norm"
        )


@contextmanager
def _tensors_for(function: Any) -> Iterator[None]:
    """Let ``isinstance(x, Tensor)`` in a function's module be true of what stands in for a tensor."""
    names = getattr(inspect.unwrap(function), "__globals__", {})
    if "isinstance" in names:
        yield
        return
    names["isinstance"] = _isinstance
    try:
        yield
    finally:
        names.pop("isinstance", None)


def _isinstance(value: Any, classes: Any) -> bool:
    if builtins.isinstance(value, fx.Proxy) and not _is_size(value.node, 8) and issubclass(Tensor, classes):
        tracer: Any = value.tracer
        if value.node.op == "placeholder" or value.node.target in tracer.opaque:
            tracer.assumes_tensors = True
            return bool(tracer.tensors)
        return True
    return builtins.isinstance(value, classes)


def _is_size(node: fx.Node, depth: int) -> bool:
    """Whether a node is a number or a shape: read off a tensor, or computed from such alone."""
    if node.op == "call_method" and node.target in ("size", "dim", "numel", "ndimension", "item", "tolist", "stride"):
        return True
    if node.op != "call_function" or not depth:
        return False
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad")
    return bool(node.all_input_nodes) and all(_is_size(source, depth - 1) for source in node.all_input_nodes)


def brief(error: BaseException) -> str:
    """The first line of an error, for a reason."""
    text = error.reason if isinstance(error, Refusal) else f"{type(error).__name__}: {error}"
    return text.strip().splitlines()[0].split(". ")[0][:120]


@contextmanager
def retold(told: str, passing: tuple[type[Exception], ...] = (NormswapError,)) -> Iterator[None]:
    """Within it an error, unless it is ``passing``, is a :class:`NormswapError` that begins with ``told``."""
    try:
        yield
    except passing:
        raise
    except Exception as error:
        raise NormswapError(f"{told}: {brief(error)}") from error


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


def trace(
    module: nn.Module,
    leaf: Callable[[nn.Module], bool] = is_leaf,
    *,
    given: bool = False,
    tensors: bool = True,
) -> Trace:
    """Trace a module's ``forward`` with optional arguments at their defaults; the module is left as it was.

    ``given`` traces it with optional arguments instead, ``tensors=False`` as if no argument was a tensor. Placeholders
    keep the names of the arguments. Raises whatever the trace raised."""
    if isinstance(module, fx.GraphModule):
        return Trace(module.graph)
    if isinstance(module, torch.jit.ScriptModule):
        raise Refusal("it is a ScriptModule")
    if "forward" in vars(module):
        raise Refusal("its forward was replaced on the instance")
    with torch.enable_grad(), warnings.catch_warnings(), unmarked(module) as effects, quiet_checks(module):
        warnings.simplefilter("ignore")
        tracer = RegionTracer(leaf, given=given, tensors=tensors)
        with _tensors_for(type(module).forward), Reads() as reads:
            graph = tracer.trace(module)
        kept = frozenset(_kept(module))
    if tracer.switches_modes:
        effects.append("switches gradients or autocast")
    return Trace(graph, tracer.opaque, tracer.constants, effects, kept, tracer.assumes_tensors, frozenset(reads.found))


_INTERNAL = frozenset(vars(nn.Module()))


_GETTERS = ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_meta", "is_leaf")
_TELLS_NO_VALUES = {getattr(Tensor, name).__get__ for name in _GETTERS} | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_contiguous, Tensor.stride,
    Tensor.requires_grad_,
}  # fmt: skip
_SECOND_TELLS_NO_VALUES = (Tensor.to, Tensor.type_as, Tensor.reshape_as, Tensor.view_as, Tensor.expand_as)


def values_read(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors whose values a function reads, not only their shape, type or place."""
    if func in _TELLS_NO_VALUES:
        return
    for value in args[:1] if func in _SECOND_TELLS_NO_VALUES else (*args, *kwargs.values()):
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, Tensor):
                yield item


class Reads(TorchFunctionMode):
    """Notes the tensors that functions read, by ``id``, and how often."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[int] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.update(id(tensor) for tensor in values_read(func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _kept(module: nn.Module) -> Iterator[fx.Node]:
    """The nodes of what a trace left in attributes of modules."""
    for each in module.modules():
        for name, value in vars(each).items():
            if name not in _INTERNAL:
                yield from _proxies(value, 3)


def _proxies(value: Any, depth: int) -> Iterator[fx.Node]:
    if isinstance(value, fx.Proxy):
        yield value.node
    elif depth and isinstance(value, (list, tuple, dict, set, deque)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _proxies(item, depth - 1)


def otherwise(region: Region) -> Iterator[tuple[str, Callable[[], Trace]]]:
    """Other circumstances under which a region's ``forward`` may take another path, in words, and what traces it so."""
    module = region.module
    if isinstance(module, fx.GraphModule):
        return
    if any(inner.training for inner in module.modules()):
        yield "in eval mode", partial(_trace_in_eval_mode, module)
    optional = [p for p in inspect.signature(type(module).forward).parameters.values() if _is_switch(p)]
    if optional:
        yield f"with {' and '.join(p.name for p in optional)} given", partial(trace, module, given=True)
    if region.assumes_tensors:
        yield "with an argument that is no tensor", partial(trace, module, tensors=False)


def _is_switch(parameter: inspect.Parameter) -> bool:
    return parameter.default is None or type(parameter.default) is bool


def _trace_in_eval_mode(module: nn.Module) -> Trace:
    flags = [(inner, inner.training) for inner in module.modules()]
    try:
        for inner, _ in flags:
            inner.training = False
        return trace(module)
    finally:
        for inner, training in flags:
            inner.training = training


def regions(model: nn.Module, *, bare: bool = True) -> tuple[list[Region], dict[str, str]]:
    """All regions of a model, outermost first, and the modules that could not be traced, by name with the reason.

    ``bare``: also those of modules without any tensor or submodule that no other region walked through."""
    found: list[Region] = []
    failed: dict[str, str] = {}
    seen: set[int] = set()  # inside a region
    visited: set[int] = set()

    def descend(module: nn.Module, name: str) -> None:
        wrapper = isinstance(module, (DataParallel, DistributedDataParallel))
        if id(module) in visited or (is_leaf(module) and not wrapper):
            return
        if not bare and not module._modules and id(module) not in seen and _is_bare(module):
            return
        visited.add(id(module))
        prefix = f"{name}." if name else ""
        if id(module) not in seen and not isinstance(module, (nn.ModuleList, nn.ModuleDict)) and not wrapper:
            try:
                traced = trace(module)
            except Exception as error:
                failed[name] = brief(error)
            else:
                region = Region.of(name, module, traced)
                found.append(region)
                for inner, reason in traced.opaque.items():
                    failed[f"{prefix}{inner}"] = reason
                _mark(region, seen)
        for key, child in module.named_children():
            descend(child, f"{prefix}{key}")

    descend(model, "")
    return found, failed


def _is_bare(module: nn.Module) -> bool:
    """Whether a module holds only numbers and the like: its graph says nothing of any tensor or module."""
    return all(
        not value if name in _INTERNAL else type(value) in _NUMBERS
        for name, value in vars(module).items()
        if name != "training"
    )


_NUMBERS = frozenset({bool, int, float, str, type(None)})


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
