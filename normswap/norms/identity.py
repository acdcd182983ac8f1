"""No normalization at all: ``nn.Identity``. The affine goes too, so the network must be trained again."""

from __future__ import annotations

from torch import nn

from normswap.registry import builds
from normswap.spec import Norm


@builds("identity")
def build(norm: Norm) -> nn.Module:
    return nn.Identity()
