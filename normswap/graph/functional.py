"""The functions that normalize, with the meaning of their arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

_aten = torch.ops.aten
_MISSING = object()


@dataclass(frozen=True)
class Signature:
    """A norm function: its family and the names of its positional arguments, with defaults."""

    family: str
    names: tuple[str, ...]
    defaults: Mapping[str, Any]

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        bound = dict(self.defaults)
        bound.update(zip(self.names, args, strict=False))
        bound.update(kwargs)
        return bound


_BATCH_DEFAULTS = {
    "weight": None, "bias": None, "running_mean": None, "running_var": None, "training": False, "momentum": 0.1,
    "eps": 1e-5,
}  # fmt: skip
_INSTANCE_DEFAULTS = {**_BATCH_DEFAULTS, "training": True}
_AFFINE_DEFAULTS = {"weight": None, "bias": None, "eps": 1e-5}

_f_batch = Signature(
    "batch",
    ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    _BATCH_DEFAULTS,
)
_aten_batch = Signature(
    "batch",
    ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled"),
    _BATCH_DEFAULTS,
)
_aten_instance = Signature("instance", _aten_batch.names, _INSTANCE_DEFAULTS)
_f_instance = Signature("instance", _f_batch.names, _INSTANCE_DEFAULTS)
_group = Signature("group", ("input", "groups", "weight", "bias", "eps", "cudnn_enabled"), _AFFINE_DEFAULTS)
_layer = Signature("layer", ("input", "shape", "weight", "bias", "eps", "cudnn_enabled"), _AFFINE_DEFAULTS)
_rms = Signature("rms", ("input", "shape", "weight", "eps"), {"weight": None, "bias": None, "eps": None})

SIGNATURES: dict[Callable[..., Any], Signature] = {
    F.batch_norm: _f_batch,
    F.instance_norm: _f_instance,
    F.group_norm: _group,
    F.layer_norm: _layer,
    F.rms_norm: _rms,
    torch.batch_norm: _aten_batch,
    torch.instance_norm: _aten_instance,
    torch.group_norm: _group,
    torch.layer_norm: _layer,
    torch.rms_norm: _rms,
    _aten.batch_norm.default: _aten_batch,
    _aten.instance_norm.default: _aten_instance,
    _aten.group_norm.default: _group,
    _aten.layer_norm.default: _layer,
    _aten.rms_norm.default: _rms,
}
"""Function -> signature, for those whose result is one tensor."""

_RENAMED = {"use_input_stats": "training", "num_groups": "groups", "normalized_shape": "shape"}

OTHER_FUNCTIONS: frozenset[Any] = frozenset(
    getattr(torch, name)
    for name in ("native_batch_norm", "native_layer_norm", "native_group_norm", "_native_batch_norm_legit")
    if hasattr(torch, name)
)
"""Norm functions with several results: seen and reported, not replaced."""

OTHER_OPERATORS: frozenset[str] = frozenset(
    "aten::" + name
    for name in (
        "native_batch_norm", "native_layer_norm", "native_group_norm", "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training", "_batch_norm_with_update", "_batch_norm_no_update", "_fused_rms_norm",
        "cudnn_batch_norm", "miopen_batch_norm",
    )
)  # fmt: skip

NAMES: frozenset[str] = frozenset(
    [f"{family}_norm" for family in ("batch", "instance", "group", "layer", "rms")]
    + [operator.removeprefix("aten::") for operator in OTHER_OPERATORS]
)
"""The names such a function goes by in source code."""


def is_norm_function(target: Any) -> bool:
    try:
        return target in SIGNATURES or target in OTHER_FUNCTIONS or is_other(target)
    except TypeError:  # unhashable
        return False


def is_other(target: Any) -> bool:
    """Whether a call target is a norm function with several results."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name in OTHER_OPERATORS
    return target in OTHER_FUNCTIONS


def arguments(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Signature, dict[str, Any]]:
    """The signature of a norm function and its arguments by canonical name."""
    signature = SIGNATURES[target]
    return signature, signature.bind(args, {_RENAMED.get(name, name): value for name, value in kwargs.items()})
