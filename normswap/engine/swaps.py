"""Activations and dropouts of a self-normalizing network (Klambauer et al., arXiv 1706.02515), in place of others.

SELU takes the place of what is zero at zero and grows with its input, alpha dropout that of dropout: it keeps mean and
variance where dropout would move them. A dropout of whole channels becomes one of whole channels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from normswap.engine.carry import carry
from normswap.engine.weighted import Weighted, weighted
from normswap.errors import NormswapError
from normswap.graph.references import Reference

ACTIVATIONS = frozenset({
    "ReLU", "ReLU6", "LeakyReLU", "PReLU", "RReLU", "ELU", "CELU", "GELU", "GELUTanh", "QuickGELU", "SiLU", "Swish",
    "Mish", "Hardswish", "HardSwish", "HardMish", "Softplus",
})  # fmt: skip
"""Names of classes of torch and timm."""
BOUNDED = frozenset({"Sigmoid", "Hardsigmoid", "HardSigmoid", "Tanh", "Hardtanh", "Softsign", "Softmax", "LogSigmoid"})
_HOMES = ("torch.nn.modules.activation", "timm.layers.")
_CHANNELS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
DROPOUTS = (nn.Dropout, *_CHANNELS)


def activation(module: nn.Module) -> bool:
    """Whether SELU may take a module's place."""
    return _named(module, ACTIVATIONS)


def bounded(module: nn.Module) -> bool:
    """Whether a module is an activation that keeps its output within bounds, as gates need it."""
    return _named(module, BOUNDED)


def _named(module: nn.Module, names: frozenset[str]) -> bool:
    cls = type(module)
    return cls.__name__ in names and cls.__module__.startswith(_HOMES) and "forward" not in vars(module)


def dropout(module: nn.Module) -> bool:
    return type(module) in DROPOUTS and "forward" not in vars(module)


def describe(module: nn.Module) -> Weighted:
    """An activation or dropout as a plan names it."""
    rate = f"p={module.p:g}" if isinstance(module, _DropoutNd) else ""
    return weighted(type(module).__name__.lower(), f"{type(module).__name__}({rate})", inputs=(*module.parameters(),))


def replacement(module: Any) -> nn.Module:
    """What takes the place of an activation or dropout."""
    if isinstance(module, _DropoutNd):
        kind = nn.FeatureAlphaDropout if isinstance(module, _CHANNELS) else nn.AlphaDropout
        return kind(module.p, module.inplace)
    return nn.SELU(bool(getattr(module, "inplace", False)))


def swap(reference: Reference) -> Callable[[], None]:
    """Put the replacement in all places of a module, in place; returns what undoes that."""
    old = reference.module
    if not (activation(old) or dropout(old)):
        raise NormswapError(f"{reference.name} is a {type(old).__name__}, no activation or dropout that can change")
    new = replacement(old)
    hand_over = carry(old, new, describe(old))
    undo: list[Callable[[], None]] = []
    for slot in reference.slots:
        slot.put(new)
        undo.append(partial(slot.put, old))
    undo.append(hand_over())

    def back() -> None:
        while undo:
            undo.pop()()

    return back
