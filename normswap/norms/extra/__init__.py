"""Norms of other libraries, keyed by dotted class path and never imported."""

from normswap.norms.extra import detectron2, timm, torchvision, transformers

__all__ = ["detectron2", "timm", "torchvision", "transformers"]
