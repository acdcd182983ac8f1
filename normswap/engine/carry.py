"""From a norm to its replacement: built, and given all that the old module carried besides its mathematics."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _WrappedHook
from torch.nn.utils import parametrize

from normswap import registry
from normswap.errors import Refusal
from normswap.norms.then import follow
from normswap.spec import Norm, plain

_HOOKS = (
    "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
_TENSOR_NAMES = frozenset({"weight", "bias", "running_mean", "running_var", "num_batches_tracked"})
_INTERNAL = frozenset(vars(nn.Module()))
_OWN = frozenset({"followers", "lifted_norms", "synchronised", "process_group"})


def fresh(norm: Norm) -> Norm:
    """``norm`` with the affine and statistics of a new layer."""
    values: dict[str, Tensor] = {}
    for name, neutral in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
        old = getattr(norm, name)
        if old is not None:
            new = torch.full_like(old.detach(), neutral)
            values[name] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
    if norm.num_batches_tracked is not None:
        values["num_batches_tracked"] = torch.zeros_like(norm.num_batches_tracked)
    form = None if norm.form is None else norm.form.fresh()
    return replace(norm, form=form, **values)  # type: ignore[arg-type]


def build(norm: Norm, kind: str, options: dict[str, Any], init: str) -> nn.Module:
    """The bare replacement of a norm. Raises what the builder raises: ``Refusal`` or ``NormswapError``."""
    if init == "preserve" and kind != norm.kind and plain(norm) is None:
        raise Refusal(f"{kind} cannot compute the same as {norm} (init='preserve')")
    extra = {"init": init} if registry.takes_init(kind) else {}
    return registry.builder(kind)(fresh(norm) if init == "reset" else norm, **options, **extra)


def carry(
    source: nn.Module, built: nn.Module, norm: Norm, homes: Iterable[nn.Module] = ()
) -> Callable[[], Callable[[], None]]:
    """Give ``built`` what ``source`` had: flags, followers, parametrizations, other children and attributes; in place.

    ``homes``, modules around it from near to far, lend device and dtype to a replacement of a norm without tensors.
    Returns what hands the hooks over at the swap, which returns what hands them back."""
    _place(built, norm, (source, *homes))
    _flags(built, norm)
    built.training = source.training
    if norm.has_statistics and vars(built).get("track_running_stats") and hasattr(source, "track_running_stats"):
        built.track_running_stats = source.track_running_stats
    children = {name: child for name, child in source._modules.items() if child is not None}
    names = {id(child): name for name, child in children.items()}
    followers = {names.get(id(module), f"then_{index}"): module for index, module in enumerate(norm.then)}
    for name, child in children.items():
        if name not in followers and name != "parametrizations" and not hasattr(built, name):
            built.add_module(name, child)
    _other_tensors(source, built, norm)
    built._non_persistent_buffers_set |= source._non_persistent_buffers_set & built._buffers.keys()
    _computed(source, built)
    _attributes(source, built)
    follow(built, followers)
    _parametrizations(source, built)

    def hand_over_hooks() -> Callable[[], None]:
        wrapped: list[tuple[_WrappedHook, Any]] = []
        for name in _HOOKS:
            vars(built)[name] = hooks = vars(source)[name]
            for hook in hooks.values() if isinstance(hooks, dict) else ():
                if isinstance(hook, _WrappedHook) and hook.with_module:
                    wrapped.append((hook, hook.module))
                    hook.module = weakref.ref(built)

        def hand_back() -> None:
            for hook, module in wrapped:
                hook.module = module

        return hand_back

    return hand_over_hooks


def _place(built: nn.Module, norm: Norm, homes: Iterable[nn.Module]) -> None:
    if norm.tensors:
        return
    tensors = (tensor for home in homes for tensor in chain(home.parameters(), home.buffers()))
    for tensor in tensors:
        if tensor.is_floating_point():
            built.to(device=tensor.device, dtype=tensor.dtype)
            return


def _flags(built: nn.Module, norm: Norm) -> None:
    """New parameters are trained if any of the old ones was."""
    old = [t for t in norm.tensors.values() if isinstance(t, nn.Parameter)]
    if old and not any(parameter.requires_grad for parameter in old):
        known = {id(parameter) for parameter in old}
        for parameter in built.parameters():
            if id(parameter) not in known:
                parameter.requires_grad_(False)


def _parametrizations(source: nn.Module, built: nn.Module) -> None:
    if not parametrize.is_parametrized(source):
        return
    stacks: Any = source.parametrizations
    for name, stack in stacks.items():
        if getattr(built, name, None) is not None:
            parametrize.register_parametrization(built, name, nn.Identity(), unsafe=True)
            target: Any = built.parametrizations
            target[name] = stack


def _other_tensors(source: nn.Module, built: nn.Module, norm: Norm) -> None:
    """Parameters and buffers that somebody else put on the norm."""
    used = {id(tensor) for tensor in norm.tensors.values()}
    for name, parameter in source._parameters.items():
        if name not in _TENSOR_NAMES and id(parameter) not in used and not hasattr(built, name):
            built.register_parameter(name, parameter)
    for name, buffer in source._buffers.items():
        if name not in _TENSOR_NAMES and id(buffer) not in used and not hasattr(built, name):
            built.register_buffer(name, buffer, persistent=name not in source._non_persistent_buffers_set)


def _computed(source: nn.Module, built: nn.Module) -> None:
    """A plain tensor attribute in a parameter's place, which a hook computes before each call (pruning), stays one."""
    for name in _TENSOR_NAMES & vars(source).keys():
        if isinstance(vars(source)[name], Tensor) and getattr(built, name, None) is not None:
            built._parameters.pop(name, None)
            built._buffers.pop(name, None)
            setattr(built, name, vars(source)[name])


def _attributes(source: nn.Module, built: nn.Module) -> None:
    """Plain attributes that somebody set on the norm (a quantization config, a tag), not those of its class."""
    classes = type(source).__mro__
    constants = {name for cls in classes for name in getattr(cls, "__constants__", ())}
    private = {name for cls in classes if "__init__" in vars(cls) for name in _names_in(vars(cls)["__init__"])}
    for name, value in vars(source).items():
        known = name in _INTERNAL or name in constants or name in _TENSOR_NAMES or name in _OWN
        known = known or (name.startswith("_") and name in private)
        if not known and not hasattr(built, name) and name != "forward":
            setattr(built, name, value)


def _names_in(function: Any) -> tuple[str, ...]:
    code = getattr(function, "__code__", None)
    return () if code is None else code.co_names
