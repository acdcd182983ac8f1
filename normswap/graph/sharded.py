"""Models whose parameters are spread over processes, by FSDP or as DTensors.

FSDP gathers the parameters that it knew when it was applied, and reduces their gradients. A parameter that comes later
stays what it is in each process, and a layer's weight is there in part only. So nothing in such a module is replaced or
folded: that is done before, or to a checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

REASON = (
    "its parameters are spread over processes (FSDP, DTensor): convert or fold the model before fully_shard, or its "
    "checkpoint"
)


def is_spread(value: Any) -> bool:
    """Whether a tensor is a ``DTensor``."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def spread(modules: Iterable[nn.Module]) -> set[int]:
    """``id`` of the modules that FSDP manages, and of those with parameters that are DTensors."""
    found: set[int] = set()
    fsdp = sys.modules.get("torch.distributed.fsdp")
    managers = () if fsdp is None else (fsdp.FullyShardedDataParallel, *vars_of(fsdp, "FSDPModule"))
    for module in modules:
        if isinstance(module, managers):
            found.update(map(id, module.modules()))
        elif any(is_spread(value) for value in module._parameters.values()):
            found.add(id(module))
    return found


def vars_of(module: Any, *names: str) -> tuple[Any, ...]:
    """Of a module, those of some names that it has."""
    return tuple(getattr(module, name) for name in names if hasattr(module, name))
