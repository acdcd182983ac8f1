"""One room a family: its reader, its builder, and the layer where torch has none."""

from normswap.norms import affine, batch, extra, frozen, group, identity, instance, layer, rms, switchable, sync

__all__ = ["affine", "batch", "extra", "frozen", "group", "identity", "instance", "layer", "rms", "switchable", "sync"]
