r"""Layers whose weight is computed before each call, made plain: the weight becomes a parameter that holds the value.

=======================  ===============================================================================================
what computes it         value in eval mode
=======================  ===============================================================================================
weight norm              :math:`g\,v / \lVert v \rVert`, the norm over all axes but one
spectral norm            :math:`W / (u^\top W v)` with the stored u and v; in train mode they change with each call
orthogonal               as torch's parametrization computes it (matrix exponential, Cayley map, Householder)
pruning                  mask times weight; of the bias too
weight standardization   per output channel :math:`g\,(w - \mathrm{mean}) / \sqrt{\mathrm{var} + \epsilon}`, timm's too
=======================  ===============================================================================================

The first three are known as parametrizations, and the first two and pruning as hooks that run before ``forward``; the
last is the ``forward`` of a class. Values are computed in float64, from copies: no tensor of the layer is written to.
What is not known here is a reason to leave the layer alone."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _Orthogonal, _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from normswap.errors import NormswapError, Refusal
from normswap.norms.weight_standardized import FORMS
from normswap.registry import dotted

_PARAMETRIZATIONS: dict[type, str] = {
    _WeightNorm: "weight norm",
    _SpectralNorm: "spectral norm",
    _Orthogonal: "orthogonal parametrization",
}
_HOOK_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
_LOADING = ("_state_dict_hooks", "_load_state_dict_pre_hooks")
_NAMES = ("weight", "bias")
_PLAIN_STD = "torch.nn.modules.conv.Conv2d"
_SAME_STD = "timm.layers.conv2d_same.Conv2dSame"
STANDARDIZED: dict[str, str] = {
    "timm.layers.std_conv.StdConv2d": _PLAIN_STD,
    "timm.layers.std_conv.StdConv2dSame": _SAME_STD,
    "timm.layers.std_conv.ScaledStdConv2d": _PLAIN_STD,
    "timm.layers.std_conv.ScaledStdConv2dSame": _SAME_STD,
    **{dotted(form): dotted(plain) for plain, form in FORMS.items()},
}
"""Classes that standardize their weight in ``forward``, and the class that does without."""


@dataclass(frozen=True)
class Source:
    """What computes one tensor of a layer."""

    words: tuple[str, ...]
    inputs: tuple[Tensor, ...]
    """The parameters and buffers that it is computed from."""
    like: Tensor
    """The one among them with its type, place and memory format."""
    value: Callable[[], Tensor]
    """It, in float64."""

    def parameter(self) -> nn.Parameter:
        with torch.no_grad():
            baked = torch.empty_like(self.like, requires_grad=False).copy_(self.value())
        if not baked.isfinite().all():
            raise NormswapError(f"the {' and '.join(self.words)} gives values that are not finite")
        return nn.Parameter(baked, requires_grad=any(tensor.requires_grad for tensor in self.inputs))


@dataclass(frozen=True)
class Computed:
    """A layer that computes its weight, its bias, or both."""

    sources: Mapping[str, Source]
    becomes: type[nn.Module]
    """The class of the plain layer."""
    gone: frozenset[str] = frozenset()
    """Attributes that the plain layer does not have."""
    hooks: tuple[tuple[str, int], ...] = field(default=(), repr=False)
    """The hooks that go: table and key."""

    @property
    def words(self) -> str:
        return " and ".join(dict.fromkeys(word for source in self.sources.values() for word in source.words))

    @property
    def inputs(self) -> Iterator[Tensor]:
        for source in self.sources.values():
            yield from source.inputs


def computed(module: Any) -> Computed | None:
    """How a layer computes its weight and bias; ``None`` where they are plain parameters.

    Raises :class:`Refusal` when something that is not known here has a part in it."""
    if not isinstance(module, nn.Module):
        return None
    sources: dict[str, Source] = {}
    gone: set[str] = set()
    hooks: list[tuple[str, int]] = []
    cls = type(module)
    if is_parametrized(module):
        stacks: Any = module.parametrizations
        if not stacks.keys() <= vars(cls).keys():
            raise Refusal(f"it is parametrized, but {cls.__name__} is not the class that torch makes for that")
        cls = cls.__bases__[0]
        gone.add("parametrizations")
        for name, stack in stacks.items():
            sources[name] = _parametrized(name, stack)
        hooks += _loading(module, lambda hook: _origin(hook) == _COMPATIBLE)
    for key, hook in module._forward_pre_hooks.items():
        if (known := _known(hook)) is None:
            continue
        words, name = known
        if name in sources or name not in _NAMES:
            raise Refusal(f"its {name} has a {words} hook" + (" besides others" if name in sources else ""))
        sources[name] = _hooked(module, hook, words, name)
        gone |= {f"{name}{suffix}" for suffix in _SUFFIXES[words]}
        hooks += [("_forward_pre_hooks", key)]
        hooks += _loading(module, partial(_serves, hook))
    path = next((path for path in map(_path_of, cls.__mro__) if path in STANDARDIZED), None)
    if path is not None:
        weight = sources.get("weight") or _plain(module)
        sources["weight"] = _standardized(module, weight)
        gone.add("gain")
        cls = _without_standardization(module, path)
    return Computed(sources, cls, frozenset(gone), tuple(hooks)) if sources else None


def bake(module: Any) -> Callable[[], None]:
    """Make a layer plain, in place, where it is not; returns what undoes that, bit for bit.

    The object stays, as do all its other hooks. Raises :class:`NormswapError` or :class:`Refusal`, with the layer as it
    was, when a value is not finite or not known how to compute."""
    how = computed(module)
    if how is None:
        return lambda: None
    baked = {name: source.parameter() for name, source in how.sources.items()}
    cls, state = type(module), vars(module)
    tables = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    saved = {name: copy.copy(state[name]) for name in (*tables, *{table for table, _ in how.hooks})}
    stale = {name: state.pop(name) for name in how.sources if name in state}  # what a hook computed last

    parameters = module._parameters
    rest = {name: parameter for name, parameter in parameters.items() if name not in how.gone}
    ordered = {**{name: None for name in _NAMES if name in rest or name in baked}, **rest, **baked}
    parameters.clear()
    parameters.update(ordered)
    for name in how.gone | baked.keys():
        module._buffers.pop(name, None)
        module._non_persistent_buffers_set.discard(name)
        module._modules.pop(name, None)
    for table, key in how.hooks:
        del state[table][key]
    module.__class__ = how.becomes

    def restore() -> None:
        module.__class__ = cls
        for name in tables:
            state[name].clear()
            state[name].update(saved[name])
        for table in {table for table, _ in how.hooks}:
            current, returning = dict(state[table]), {key for name, key in how.hooks if name == table}
            before = {key: hook for key, hook in saved[table].items() if key in current or key in returning}
            state[table].clear()
            state[table].update({**before, **current})
        state.update(stale)

    return restore


def weight_of(module: Any) -> Tensor:
    """The weight a layer computes with: the parameter, or what :func:`bake` would make one."""
    how = computed(module)
    if how is None or "weight" not in how.sources:
        weight: Tensor = module.weight
        return weight
    return how.sources["weight"].parameter()


def dtype_of(module: Any) -> torch.dtype:
    """The type of a layer's weight; a hook may have left a weight of another."""
    how = computed(module)
    like = module.weight if how is None or "weight" not in how.sources else how.sources["weight"].like
    dtype: torch.dtype = like.dtype
    return dtype


def other_hooks(module: nn.Module) -> list[str]:
    """The names of the hooks that see a module's values, those that compute its weight not counted."""
    tables = (vars(module).get(table) or {} for table in _HOOK_TABLES)
    hooks = [hook for table in tables for hook in table.values() if _known(hook) is None]
    return [str(getattr(hook, "__name__", type(hook).__name__)) for hook in hooks]


def hooked_names(module: nn.Module) -> set[str]:
    """The plain attributes of a module that known hooks compute before each call."""
    hooks = vars(module).get("_forward_pre_hooks") or {}
    return {known[1] for hook in hooks.values() if (known := _known(hook)) is not None}


# --- parametrizations ------------------------------------------------------------------------------------------------


def _parametrized(name: str, stack: Any) -> Source:
    if name not in _NAMES:
        raise Refusal(f"its {name} is parametrized")
    if type(stack) is not ParametrizationList:
        raise Refusal(f"its {name} is parametrized by a {type(stack).__name__}")
    for step in stack:
        if type(step) not in _PARAMETRIZATIONS or "forward" in vars(step):
            raise Refusal(f"its {name} is parametrized by {type(step).__name__}, which is not known")
        if isinstance(step, _SpectralNorm) and step.training and stack.original.dim() > 1:
            raise Refusal(f"the spectral norm of its {name} is in train mode, where it changes with each call")
    for each in stack.modules():
        if any(vars(each).get(table) for table in _HOOK_TABLES):
            raise Refusal(f"the parametrization of its {name} has hooks")
    originals = [stack.original] if stack.is_tensor else [getattr(stack, f"original{i}") for i in range(stack.ntensors)]

    def value() -> Tensor:
        twin: Any = copy.deepcopy(stack).double().eval()
        with torch.no_grad():
            result: Tensor = twin()
        return result

    words = tuple(_PARAMETRIZATIONS[type(step)] for step in stack)
    inputs = (*originals, *stack.buffers())
    return Source(words, inputs, originals[-1], value)


_COMPATIBLE = "torch.nn.utils.parametrizations.weight_norm.<locals>._weight_norm_compat_hook"
"""The hook by which a parametrized layer loads an old state of weight norm; it cannot be pickled."""


def _origin(hook: Any) -> str:
    return f"{getattr(hook, '__module__', '')}.{getattr(hook, '__qualname__', '')}"


def _serves(hook: Any, other: Any) -> bool:
    """Whether another hook of a module loads or saves the state for this one."""
    return getattr(other, "fn", None) is hook


def _loading(module: nn.Module, belongs: Callable[[Any], bool]) -> Iterator[tuple[str, int]]:
    for table in _LOADING:
        for key, hook in vars(module)[table].items():
            if belongs(getattr(hook, "hook", hook)):
                yield table, key


# --- hooks -----------------------------------------------------------------------------------------------------------

_SUFFIXES = {
    "weight norm": ("_g", "_v"),
    "spectral norm": ("_orig", "_u", "_v"),
    "pruning mask": ("_orig", "_mask"),
}
"""The tensors from which a hook computes one."""


def _known(hook: Any) -> tuple[str, str] | None:
    """What a hook computes, in words, and the name of the tensor."""
    cls: Any = type(hook)
    if cls is WeightNorm:
        return "weight norm", hook.name
    if cls is SpectralNorm:
        return "spectral norm", hook.name
    if isinstance(hook, BasePruningMethod):
        own = (cls.__call__, cls.apply_mask) != (BasePruningMethod.__call__, BasePruningMethod.apply_mask)
        return None if own else ("pruning mask", hook._tensor_name)
    return None


def _hooked(module: nn.Module, hook: Any, words: str, name: str) -> Source:
    tensors: list[Tensor] = []
    for suffix in _SUFFIXES[words]:
        tensor = module._parameters.get(f"{name}{suffix}", module._buffers.get(f"{name}{suffix}"))
        if tensor is None:
            raise Refusal(f"its {name}{suffix} is no parameter, which its {words} needs")
        tensors.append(tensor)
    if words == "spectral norm" and module.training:
        raise Refusal(f"the spectral norm of its {name} is in train mode, where it changes with each call")
    like = tensors[1] if words == "weight norm" else tensors[0]

    def value() -> Tensor:
        first, *others = (tensor.detach().double() for tensor in tensors)
        if words == "weight norm":
            return others[0] * (first / torch.norm_except_dim(others[0], 2, hook.dim))
        if words == "pruning mask":
            return first * others[0]
        u, v = others
        return first / torch.dot(u, first.movedim(hook.dim, 0).flatten(1) @ v)

    return Source((words,), tuple(tensors), like, value)


# --- classes that standardize ----------------------------------------------------------------------------------------


def _path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _plain(module: nn.Module) -> Source:
    weight = module._parameters.get("weight")
    if weight is None:
        raise Refusal("its weight is no parameter")
    return Source((), (weight,), weight, lambda: weight.detach().double())


def _standardized(module: Any, weight: Source) -> Source:
    gain = module._parameters.get("gain")
    if gain is None and getattr(module, "gain", None) is not None:
        raise Refusal("its gain is no parameter")

    def value() -> Tensor:
        kernel = weight.value()
        rows = kernel.flatten(1)
        variance, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
        rows = (rows - mean) / torch.sqrt(variance + module.eps)
        if gain is not None:
            rows = rows * (gain.detach().double().reshape(-1, 1) * module.scale)
        return rows.reshape_as(kernel)

    inputs = weight.inputs if gain is None else (*weight.inputs, gain)
    return replace(weight, words=(*weight.words, "weight standardization"), inputs=inputs, value=value)


def _without_standardization(module: Any, path: str) -> type[nn.Module]:
    own = next((plain for plain, form in FORMS.items() if isinstance(module, form)), None)
    if own is not None:
        return own
    if module.padding_mode != "zeros":
        raise Refusal(f"it has padding_mode={module.padding_mode!r}, which its class ignores")
    if STANDARDIZED[path] == _PLAIN_STD or not module.same_pad:
        return nn.Conv2d
    same: Any = getattr(sys.modules.get(_SAME_STD.rpartition(".")[0]), _SAME_STD.rpartition(".")[2], None)
    if same is None or module.padding not in (0, (0, 0)):
        raise Refusal("it pads twice, or the class that pads as it does is not loaded")
    return same  # type: ignore[no-any-return]
