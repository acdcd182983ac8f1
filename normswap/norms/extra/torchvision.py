"""torchvision: the frozen BatchNorm of its detection models, and ConvNeXt's channels-first LayerNorm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from normswap.norms.frozen import read as read_frozen
from normswap.norms.layer import read_position
from normswap.registry import reads
from normswap.spec import Norm


@reads("torchvision.ops.misc.FrozenBatchNorm2d")
def frozen(module: Any) -> Norm:
    return replace(read_frozen(module), ranks=frozenset({4}))


@reads("torchvision.models.convnext.LayerNorm2d")
def layer_norm_2d(module: Any) -> Norm:
    return replace(read_position(module), ranks=frozenset({4}))
