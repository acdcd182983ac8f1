"""detectron2 (and fvcore): the frozen BatchNorm of its backbones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from normswap.norms.frozen import read as read_frozen
from normswap.registry import reads
from normswap.spec import Norm


@reads("detectron2.layers.batch_norm.FrozenBatchNorm2d")
def frozen(module: Any) -> Norm:
    return replace(read_frozen(module), ranks=frozenset({4}))
