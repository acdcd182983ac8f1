"""The layers with a weight, as sites beside the norms: what each is, and why it may have to stay as it is.

A layer stands in a plan where a norm does, so it is described by a :class:`~normswap.spec.Norm` that pools over
nothing. What is changed of it is the layer itself, in place: its names, hooks and call sites stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from normswap import registry
from normswap.engine.sites import Site
from normswap.errors import Refusal
from normswap.fold import bake, layers
from normswap.graph.references import Reference
from normswap.spec import Norm

LAYERS = (_ConvNd, nn.Linear, nn.Bilinear)
_PLAIN = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
    nn.Bilinear,
)  # fmt: skip
_KINDS = {"weight standardization": "weight_standardized"}
_STATE_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
                "_load_state_dict_post_hooks")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Weighted(Norm):
    """A layer, activation or dropout in a plan: its kind, its outputs, and itself in words."""

    words: str = ""
    inputs: tuple[Tensor, ...] = ()
    """The parameters that it has, or that its weight is computed from."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {str(index): tensor for index, tensor in enumerate(self.inputs)}

    def __str__(self) -> str:
        return self.words

    def become(self, kind: str, words: str) -> Weighted:
        """What it is afterwards."""
        return replace(self, kind=kind, words=words)


def weighted(kind: str, words: str, channels: int = 0, inputs: tuple[Tensor, ...] = ()) -> Weighted:
    return Weighted(kind, channels, frozenset(), eps=None, momentum=None, words=words, inputs=inputs)


def describe(module: nn.Module) -> Weighted:
    """A convolution or linear layer as it is now.

    Its kind is the class in lower case, or what computes its weight: ``conv2d``, ``linear``, ``weight_norm`` ..."""
    base = next((plain for plain in _PLAIN if isinstance(module, plain)), type(module))
    kind = base.__name__.lower()
    shape = _size(module)
    kernel = ["x".join(map(str, module.kernel_size))] if isinstance(module, _ConvNd) else []
    words = f"{base.__name__}({', '.join([*map(str, shape), *kernel])})"
    inputs = [*module.parameters(recurse=True)]
    try:
        how = bake.computed(module)
    except Refusal:
        kind = "computed"
    else:
        if how is not None:
            kind = _KINDS.get(how.words, how.words.replace(" ", "_"))
            words = f"{how.words} of {words}"
    return weighted(kind, words, shape[-1] if shape else 0, tuple(inputs))


def _size(module: Any) -> tuple[int, ...]:
    if isinstance(module, _ConvNd):
        return module.in_channels, module.out_channels
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Bilinear):
        return module.in1_features, module.in2_features, module.out_features
    return ()


def layer_sites(found: Mapping[int, Reference]) -> list[Site]:
    """The convolutions and linear layers among ``references(model)``, each with the reason why it must stay, if any;
    and what else has a weight, which always stays."""
    users = _users(found)
    sites = []
    for reference in found.values():
        module = reference.module
        if isinstance(module, torch.jit.ScriptModule):
            continue
        if isinstance(module, LAYERS):
            reason = _stays(module) or _tied(module, users)
        elif _other(module):
            reason = f"it is a {type(module).__name__}: only convolutions and linear layers change"
        else:
            continue
        sites.append(Site(reference.name, describe(module), module, reason, tuple(reference.names[1:])))
        sites[-1].parents = tuple(reference.parents)
    return sites


def _other(module: nn.Module) -> bool:
    """Whether a module that is no norm and none of the layers has a weight of its own, plain or computed."""
    if isinstance(module, (ParametrizationList, nn.ParameterList, nn.ParameterDict)) or registry.registered(module):
        return False
    own = (p for p in module.parameters(recurse=False) if not isinstance(p, UninitializedParameter))
    return is_parametrized(module) or any(parameter.dim() > 1 for parameter in own)


def _users(found: Mapping[int, Reference]) -> dict[int, list[str]]:
    """By ``id`` of a tensor, the modules that have it: as a parameter, or in a plain attribute, list, tuple or dict."""
    users: dict[int, list[str]] = {}
    for reference in found.values():
        for tensor in _own(reference.module):
            users.setdefault(id(tensor), []).append(reference.name or type(reference.module).__name__)
    return users


def _own(module: nn.Module) -> Iterator[Tensor]:
    for name, value in vars(module).items():
        if name in ("_modules", "_buffers"):
            continue
        items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
        yield from (item for item in items if isinstance(item, Tensor))


def _stays(module: Any) -> str | None:
    if any(isinstance(p, UninitializedParameter) for p in module.parameters(recurse=False)):
        return "its parameters get their shapes at its first call: run the model once"
    kind = layers.describe(module)
    return kind if isinstance(kind, str) else None


def _tied(module: nn.Module, users: Mapping[int, list[str]]) -> str | None:
    """Why a change of its weight would part it from, or change, another user of the same tensor."""
    for name, parameter in module.named_parameters():
        if name != "bias" and len(names := users.get(id(parameter), [])) > 1:
            return f"its weight is shared by {' and '.join(names)}"
    return None


def plain_weight(module: Any) -> str | None:
    """Why a layer's weight is no plain parameter that could be computed from others; or ``None``."""
    try:
        how = bake.computed(module)
    except Refusal as refusal:
        return refusal.reason
    if how is not None and "weight" in how.sources:
        return f"its weight is computed already, by {how.sources['weight'].words[-1]}; to='plain' makes it a parameter"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is no parameter"
    if not weight.is_floating_point():
        return f"its weight is of {str(weight.dtype).removeprefix('torch.')}"
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, no ordinary tensor"
    if any(vars(module).get(table) for table in _STATE_HOOKS):
        return "it has hooks on its state_dict, whose keys change"
    return None


def output_axis(module: nn.Module) -> int:
    """The axis of a weight that its output channels run along."""
    return 1 if isinstance(module, _ConvTransposeNd) else 0
