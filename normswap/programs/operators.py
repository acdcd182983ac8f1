"""Operators of an exported program, as the functions of PyTorch that mean the same.

The rules of a fold (:mod:`normswap.fold.passages`) speak of ``F.max_pool2d``, ``torch.cat`` and their like; a program
of ``torch.export`` calls ``aten.max_pool2d.default``, ``aten.cat.default``. What has no function here keeps its
operator, through which no rule leads an affine. An operator that writes to its first argument and has none here becomes
a function whose name ends in an underscore, as such functions are called.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from normswap.errors import NormswapError

Given = dict[str, Any]
"""The arguments of a call by the names in the operator's schema, defaults too."""
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""What is called instead: a function or the name of a method, its arguments, its named arguments."""

_WHOLE = 2**63 - 1
"""The end of a slice that has none."""


def given(node: fx.Node) -> Given:
    """The arguments of an operator's call by name."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    found = {each.name: each.default_value for each in schema.arguments if each.has_default_value()}
    found |= {each.name: value for each, value in zip(schema.arguments, node.args, strict=False)}
    return found | dict(node.kwargs)


def name_of(target: Any) -> str:
    """``aten::add.Tensor`` for an operator; nothing for what is none."""
    if not isinstance(target, torch._ops.OpOverload):
        return ""
    return f"{target._schema.name}.{target._overloadname}"


def writes(target: Any) -> list[str]:
    """The names of the arguments that an operator writes to."""
    if not isinstance(target, torch._ops.OpOverload):
        return []
    return [each.name for each in target._schema.arguments if each.alias_info is not None and each.alias_info.is_write]


def meant(node: fx.Node) -> Call:
    """What stands for an operator's call.

    Raises :class:`NormswapError` for an operator that writes to another argument than its first."""
    rule = _RULES.get(name_of(node.target))
    found = None if rule is None else rule(given(node))
    if found is not None:
        return found
    written = writes(node.target)
    if not written:
        return node.target, node.args, dict(node.kwargs)
    if written != [node.target._schema.arguments[0].name]:  # type: ignore[union-attr]
        raise NormswapError(f"{node.name}: what {node.target} writes to is not followed; export without it")
    return _as_function(node.target, "_"), node.args, dict(node.kwargs)


def hidden(target: Any) -> Callable[..., Any]:
    """A function that does what an operator does, and is not known for it: so no norm is seen where none is read."""
    return _as_function(target, "")


@cache
def _as_function(target: Any, ending: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    call.__name__ = call.__qualname__ = target._schema.name.partition("::")[2].rstrip("_") + ending
    return call


# --- rules -----------------------------------------------------------------------------------------------------------

Rule = Callable[[Given], "Call | None"]


def _plain(function: Any, *names: str) -> Rule:
    """The arguments so named, in this order."""
    return lambda a: (function, tuple(a[name] for name in names), {})


def _in_place(function: Any, *names: str) -> Rule:
    return lambda a: (function, tuple(a[name] for name in names), {"inplace": True})


def _binary(function: Any) -> Rule:
    def rule(a: Given) -> Call | None:
        if a.get("alpha", 1) != 1 or a.get("rounding_mode") is not None:
            return None
        return function, (a["self"], a["other"]), {}

    return rule


def _pool(function: Any, *names: str) -> Rule:
    """A pooling: an empty stride is that of the kernel."""
    return lambda a: (function, (a["self"], a["kernel_size"], a["stride"] or None, *(a[name] for name in names)), {})


def _mean(a: Given) -> Call | None:
    if not a["dim"] or a["dtype"] is not None:
        return None
    return torch.mean, (a["self"], a["dim"], a["keepdim"]), {}


def _squeeze_dims(a: Given) -> Call | None:
    return (torch.squeeze, (a["self"], a["dim"][0]), {}) if len(a["dim"]) == 1 else None


def _slice(a: Given) -> Call | None:
    dim, start, end, step = a["dim"], a["start"], a["end"], a["step"]
    if dim < 0:
        return None
    end = None if isinstance(end, int) and end >= _WHOLE else end
    part = slice(start or None, end, None if step == 1 else step)
    return operator.getitem, (a["self"], (*[slice(None)] * dim, part)), {}


def _pad(a: Given) -> Call:
    return F.pad, (a["self"], list(a["pad"]), a.get("mode", "constant"), a.get("value")), {}


def _resize(mode: str) -> Rule:
    def rule(a: Given) -> Call:
        options = {"size": a["output_size"], "scale_factor": a["scale_factors"], "mode": mode}
        aligned = {"align_corners": a["align_corners"]} if "align_corners" in a else {}
        return F.interpolate, (a["input"],), {**options, **aligned}

    return rule


_POOLED = ("padding", "dilation", "ceil_mode")
_AVERAGED = ("padding", "ceil_mode", "count_include_pad")
_SLOPES = {
    "relu": (), "relu6": (), "silu": (), "hardswish": (), "hardsigmoid": (), "mish": (), "selu": (),
    "leaky_relu": ("negative_slope",), "hardtanh": ("min_val", "max_val"), "celu": ("alpha",),
}  # fmt: skip
"""Activations that can be done in place, with their arguments."""

_RULES: dict[str, Rule] = {
    **{f"aten::{name}.default": _plain(getattr(F, name), "self", *rest) for name, rest in _SLOPES.items()},
    **{f"aten::{name}_.default": _in_place(getattr(F, name), "self", *rest) for name, rest in _SLOPES.items()},
    **{f"aten::{name}.default": _plain(getattr(torch, name), "self") for name in (
        "sigmoid", "tanh", "exp", "abs", "sqrt", "rsqrt", "neg",
    )},
    "aten::gelu.default": lambda a: (F.gelu, (a["self"],), {"approximate": a["approximate"]}),
    "aten::softmax.int": lambda a: None if a["dtype"] is not None else (torch.softmax, (a["self"], a["dim"]), {}),
    "aten::clamp.default": _plain(torch.clamp, "self", "min", "max"),
    "aten::clone.default": _plain(torch.clone, "self"),
    "aten::contiguous.default": _plain("contiguous", "self"),
    "aten::dropout.default": _plain(F.dropout, "input", "p", "train"),
    "aten::dropout_.default": lambda a: (F.dropout, (a["self"], a["p"], a["train"]), {"inplace": True}),
    **{f"aten::add{end}": _binary(operator.add) for end in (".Tensor", ".Scalar")},
    **{f"aten::sub{end}": _binary(operator.sub) for end in (".Tensor", ".Scalar")},
    **{f"aten::mul{end}": _binary(operator.mul) for end in (".Tensor", ".Scalar")},
    **{f"aten::div{end}": _binary(operator.truediv) for end in (".Tensor", ".Scalar")},
    **{f"aten::add_{end}": _binary(operator.iadd) for end in (".Tensor", ".Scalar")},
    **{f"aten::sub_{end}": _binary(operator.isub) for end in (".Tensor", ".Scalar")},
    **{f"aten::mul_{end}": _binary(operator.imul) for end in (".Tensor", ".Scalar")},
    **{f"aten::div_{end}": _binary(operator.itruediv) for end in (".Tensor", ".Scalar")},
    "aten::matmul.default": _plain(torch.matmul, "self", "other"),
    "aten::bmm.default": _plain(torch.bmm, "self", "mat2"),
    **{f"aten::max_pool{n}d.default": _pool(getattr(F, f"max_pool{n}d"), *_POOLED) for n in (1, 2, 3)},
    **{f"aten::max_pool{n}d_with_indices.default": _pool(getattr(F, f"max_pool{n}d"), *_POOLED) for n in (2, 3)},
    "aten::avg_pool1d.default": _pool(F.avg_pool1d, *_AVERAGED),
    **{f"aten::avg_pool{n}d.default": _pool(getattr(F, f"avg_pool{n}d"), *_AVERAGED, "divisor_override")
       for n in (2, 3)},
    **{f"aten::adaptive_avg_pool{n}d.default": _plain(getattr(F, f"adaptive_avg_pool{n}d"), "self", "output_size")
       for n in (1, 2, 3)},
    **{f"aten::_adaptive_avg_pool{n}d.default": _plain(getattr(F, f"adaptive_avg_pool{n}d"), "self", "output_size")
       for n in (2, 3)},
    "aten::mean.dim": _mean,
    "aten::pad.default": _pad,
    "aten::constant_pad_nd.default": _pad,
    **{f"aten::upsample_{mode}{n}d.vec": _resize(mode) for mode, n in (
        ("nearest", 1), ("nearest", 2), ("nearest", 3), ("linear", 1), ("bilinear", 2), ("bicubic", 2),
        ("trilinear", 3),
    )},
    "aten::flatten.using_ints": _plain(torch.flatten, "self", "start_dim", "end_dim"),
    "aten::view.default": _plain(torch.reshape, "self", "size"),
    "aten::_unsafe_view.default": _plain(torch.reshape, "self", "size"),
    "aten::reshape.default": _plain(torch.reshape, "self", "shape"),
    "aten::unflatten.int": _plain(torch.reshape, "self", "sizes"),  # the shapes of both are stated
    **{f"aten::{name}.default": _plain(name, "self", "other") for name in ("reshape_as", "view_as", "expand_as")},
    "aten::permute.default": _plain(torch.permute, "self", "dims"),
    "aten::transpose.int": _plain(torch.transpose, "self", "dim0", "dim1"),
    "aten::t.default": _plain(torch.t, "self"),
    "aten::squeeze.dim": _plain(torch.squeeze, "self", "dim"),
    "aten::squeeze.dims": _squeeze_dims,
    "aten::unsqueeze.default": _plain(torch.unsqueeze, "self", "dim"),
    "aten::cat.default": _plain(torch.cat, "tensors", "dim"),
    "aten::chunk.default": _plain(torch.chunk, "self", "chunks", "dim"),
    "aten::split.Tensor": _plain(torch.split, "self", "split_size", "dim"),
    "aten::split_with_sizes.default": _plain(torch.split, "self", "split_sizes", "dim"),
    "aten::split.sizes": _plain(torch.split, "self", "split_size", "dim"),
    "aten::slice.Tensor": _slice,
    "aten::roll.default": lambda a: (torch.roll, (a["self"], a["shifts"], a["dims"]), {}) if a["dims"] else None,
    "aten::sym_size.int": _plain("size", "self", "dim"),
}  # fmt: skip

FIRST = frozenset({"aten::max_pool2d_with_indices.default", "aten::max_pool3d_with_indices.default"})
"""Operators of several results whose rule gives the first alone."""
