"""One room a family: its reader, its builder, and the layer where torch has none."""

from normswap.norms import (
    affine,
    batch,
    batch_instance,
    extra,
    frn,
    frozen,
    ghost,
    group,
    identity,
    instance,
    layer,
    renorm,
    rms,
    switchable,
    sync,
)

__all__ = [
    "affine", "batch", "batch_instance", "extra", "frn", "frozen", "ghost", "group", "identity", "instance", "layer",
    "renorm", "rms", "switchable", "sync",
]  # fmt: skip
