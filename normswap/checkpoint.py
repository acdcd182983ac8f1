"""Checkpoints: read without running code, loaded with a count of what does not fit, written whole or not at all."""

from normswap.checkpoints.keys import MARKERS, PREFIXES
from normswap.checkpoints.loading import load
from normswap.checkpoints.nested import NESTED
from normswap.checkpoints.reading import Checkpoint, read
from normswap.checkpoints.writing import SUFFIXES, write

__all__ = ["MARKERS", "NESTED", "PREFIXES", "SUFFIXES", "Checkpoint", "load", "read", "write"]
