"""Folding as algebra: channel affines, the layers that absorb them, the operations they pass."""
