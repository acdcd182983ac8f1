r"""How ``nn.MultiheadAttention`` absorbs a channel affine on its input side: in the projections of query, key, value.

Each is a linear layer, :math:`W_q q + b_q` and so on, and takes in what a linear layer does. They stand in the rows of
one ``in_proj_weight``, or in weights of their own where key or value have other widths; their biases are the rows of
``in_proj_bias``. The learned ``bias_k`` and ``bias_v``, and the zeros of ``add_zero_attn``, join behind the projections
and do not see the affine. A shift needs biases: an attention without any gets none, because its fused path would then
ask for the output's bias too."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx, nn

from normswap.fold import layers
from normswap.fold.affine import Affine
from normswap.fold.layers import Layer
from normswap.graph.shapes import argument

PARTS = ("query", "key", "value")


def read_by(node: fx.Node, source: fx.Node) -> list[str]:
    """Which of query, key and value a call takes from ``source``."""
    return [part for index, part in enumerate(PARTS) if argument(node, index, part) is source]


def describe(module: nn.MultiheadAttention, part: str) -> Layer | str:
    """One projection as a linear layer, or the reason why it cannot absorb an affine."""
    if "forward" in vars(module) or type(module).forward is not nn.MultiheadAttention.forward:
        return f"{type(module).__name__} has a forward of its own"
    width = {"query": module.embed_dim, "key": module.kdim, "value": module.vdim}[part]
    return Layer("linear", 0, width, module.embed_dim, 1, module.in_proj_bias is not None, part)


def projection(module: Any, layer: Layer) -> Any:
    """A stand-in with copies of one projection's ``weight`` and ``bias``."""
    weight, rows = _place(module, layer.part)
    bias = module.in_proj_bias
    return SimpleNamespace(
        weight=nn.Parameter(weight.detach()[rows]),
        bias=None if bias is None else nn.Parameter(bias.detach()[_rows(module, layer.part)]),
    )


def _rows(module: Any, part: str) -> slice:
    at = PARTS.index(part) * module.embed_dim
    return slice(at, at + module.embed_dim)


def _place(module: Any, part: str) -> tuple[nn.Parameter, slice]:
    if module.in_proj_weight is not None:
        return module.in_proj_weight, _rows(module, part)
    return getattr(module, f"{part[0]}_proj_weight"), slice(None)


def absorb(module: Any, layer: Layer, affine: Affine) -> Callable[[], None]:
    """Fold an affine into one projection, in place; returns what restores it, bit for bit.

    Raises :class:`normswap.NormswapError` as :func:`normswap.fold.layers.absorb` does."""
    stand_in = projection(module, layer)
    layers.absorb(stand_in, layer, affine, "input")
    weight, rows = _place(module, layer.part)
    written = [(weight, rows, stand_in.weight)]
    if module.in_proj_bias is not None:
        written.append((module.in_proj_bias, _rows(module, layer.part), stand_in.bias))
    saved = [(parameter, parameter.data) for parameter, _, _ in written]
    with torch.no_grad():
        for parameter, place, values in written:
            whole = parameter.data.clone()
            whole[place] = values.data
            parameter.data = whole

    def restore() -> None:
        for parameter, values in saved:
            parameter.data = values

    return restore
