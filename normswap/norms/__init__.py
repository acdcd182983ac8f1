"""One room a family: its reader, its builder, and the layer where torch has none."""

from normswap.norms import (
    adaptive_instance,
    adaptive_momentum,
    affine,
    batch,
    batch_instance,
    condition,
    conditional,
    domain,
    evonorm,
    extra,
    frn,
    frozen,
    ghost,
    group,
    identity,
    instance,
    layer,
    learned_groups,
    momentum,
    multiscale,
    positional,
    renorm,
    rms,
    switchable,
    sync,
    virtual,
)

__all__ = [
    "adaptive_instance", "adaptive_momentum", "affine", "batch", "batch_instance", "condition", "conditional",
    "domain", "evonorm", "extra", "frn", "frozen", "ghost", "group", "identity", "instance", "layer",
    "learned_groups", "momentum", "multiscale", "positional", "renorm", "rms", "switchable", "sync", "virtual",
]  # fmt: skip
