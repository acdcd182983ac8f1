"""How torch computes: in which dtypes values and moments are kept, and whether products of matrices are whole."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that values of ``dtype`` are accumulated in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fine(device: torch.device) -> torch.dtype:
    """The dtype of factors and moments: float64, but on Apple's GPUs, which have none."""
    return torch.float32 if device.type == "mps" else torch.float64


def rounded(device: torch.device) -> bool:
    """Whether autocast would round the products of float32 matrices to 16 bits."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def whole_products() -> bool:
    """Whether torch multiplies float32 matrices on a CPU as they are."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:  # Before torch 2.9; since then it refuses to be asked so where its newer names are set.
        return torch.get_float32_matmul_precision() == "highest"
    return matmul.fp32_precision in ("none", "ieee")


def unrounded(device: torch.device) -> AbstractContextManager[object]:
    """Where autocast is on, without it."""
    return torch.autocast(device.type, enabled=False) if rounded(device) else nullcontext()
