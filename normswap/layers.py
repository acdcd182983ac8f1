"""The layers that torch lacks and what goes with them, under one name: docs/layers.md is about their use.

A class that is named here stays where it is defined, and what is pickled names that place. ``LinearSchedule`` is
:class:`normswap.norms.momentum.Linear`, which beside ``torch.nn`` would be taken for another."""

from __future__ import annotations

from normswap.norms.adaptive_instance import (
    AdaptiveInstanceNorm,
    AdaptiveInstanceNorm1d,
    AdaptiveInstanceNorm2d,
    AdaptiveInstanceNorm3d,
)
from normswap.norms.adaptive_momentum import (
    AdaptiveBatchNorm,
    AdaptiveBatchNorm1d,
    AdaptiveBatchNorm2d,
    AdaptiveBatchNorm3d,
)
from normswap.norms.affine import ChannelAffine
from normswap.norms.batch import BatchNorm
from normswap.norms.batch_instance import (
    BatchInstanceNorm,
    BatchInstanceNorm1d,
    BatchInstanceNorm2d,
    BatchInstanceNorm3d,
)
from normswap.norms.condition import Conditioned, condition
from normswap.norms.conditional import ConditionalNorm, ConditionalNorm1d, ConditionalNorm2d, ConditionalNorm3d
from normswap.norms.domain import DomainBatchNorm, DomainBatchNorm1d, DomainBatchNorm2d, DomainBatchNorm3d
from normswap.norms.evonorm import (
    EvoNormB0,
    EvoNormB01d,
    EvoNormB02d,
    EvoNormB03d,
    EvoNormS0,
    EvoNormS01d,
    EvoNormS02d,
    EvoNormS03d,
)
from normswap.norms.frn import FilterResponseNorm, FilterResponseNorm1d, FilterResponseNorm2d, FilterResponseNorm3d
from normswap.norms.frozen import FrozenBatchNorm
from normswap.norms.ghost import GhostBatchNorm, GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from normswap.norms.instance import InstanceNorm
from normswap.norms.layer import ChannelLayerNorm, ChannelsFirstLayerNorm
from normswap.norms.learned_groups import (
    LearnedGroupNorm,
    LearnedGroupNorm1d,
    LearnedGroupNorm2d,
    LearnedGroupNorm3d,
    harden,
)
from normswap.norms.momentum import Linear as LinearSchedule
from normswap.norms.momentum import Polynomial, Warmup
from normswap.norms.multiscale import MultiscaleNorm, MultiscaleNorm1d, MultiscaleNorm2d, MultiscaleNorm3d
from normswap.norms.positional import PositionalNorm, PositionalNorm1d, PositionalNorm2d, PositionalNorm3d, inject
from normswap.norms.renorm import BatchRenorm, BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from normswap.norms.rms import ChannelRMSNorm, ChannelsFirstRMSNorm
from normswap.norms.switchable import SwitchableNorm, SwitchableNorm1d, SwitchableNorm2d, SwitchableNorm3d
from normswap.norms.sync import SyncBatchNorm
from normswap.norms.tracked import batch_average
from normswap.norms.virtual import (
    VirtualBatchNorm,
    VirtualBatchNorm1d,
    VirtualBatchNorm2d,
    VirtualBatchNorm3d,
    reference_batch,
)
from normswap.norms.weight_standardized import StandardizedConv1d, StandardizedConv2d, StandardizedConv3d

__all__ = [
    "AdaptiveBatchNorm",
    "AdaptiveBatchNorm1d",
    "AdaptiveBatchNorm2d",
    "AdaptiveBatchNorm3d",
    "AdaptiveInstanceNorm",
    "AdaptiveInstanceNorm1d",
    "AdaptiveInstanceNorm2d",
    "AdaptiveInstanceNorm3d",
    "BatchInstanceNorm",
    "BatchInstanceNorm1d",
    "BatchInstanceNorm2d",
    "BatchInstanceNorm3d",
    "BatchNorm",
    "BatchRenorm",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "ChannelAffine",
    "ChannelLayerNorm",
    "ChannelRMSNorm",
    "ChannelsFirstLayerNorm",
    "ChannelsFirstRMSNorm",
    "ConditionalNorm",
    "ConditionalNorm1d",
    "ConditionalNorm2d",
    "ConditionalNorm3d",
    "Conditioned",
    "DomainBatchNorm",
    "DomainBatchNorm1d",
    "DomainBatchNorm2d",
    "DomainBatchNorm3d",
    "EvoNormB0",
    "EvoNormB01d",
    "EvoNormB02d",
    "EvoNormB03d",
    "EvoNormS0",
    "EvoNormS01d",
    "EvoNormS02d",
    "EvoNormS03d",
    "FilterResponseNorm",
    "FilterResponseNorm1d",
    "FilterResponseNorm2d",
    "FilterResponseNorm3d",
    "FrozenBatchNorm",
    "GhostBatchNorm",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "InstanceNorm",
    "LearnedGroupNorm",
    "LearnedGroupNorm1d",
    "LearnedGroupNorm2d",
    "LearnedGroupNorm3d",
    "LinearSchedule",
    "MultiscaleNorm",
    "MultiscaleNorm1d",
    "MultiscaleNorm2d",
    "MultiscaleNorm3d",
    "Polynomial",
    "PositionalNorm",
    "PositionalNorm1d",
    "PositionalNorm2d",
    "PositionalNorm3d",
    "StandardizedConv1d",
    "StandardizedConv2d",
    "StandardizedConv3d",
    "SwitchableNorm",
    "SwitchableNorm1d",
    "SwitchableNorm2d",
    "SwitchableNorm3d",
    "SyncBatchNorm",
    "VirtualBatchNorm",
    "VirtualBatchNorm1d",
    "VirtualBatchNorm2d",
    "VirtualBatchNorm3d",
    "Warmup",
    "batch_average",
    "condition",
    "harden",
    "inject",
    "reference_batch",
]
