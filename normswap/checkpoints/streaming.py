"""A ``.safetensors`` file, written tensor by tensor: one of them in memory at a time.

The file is eight bytes of length (little endian), a JSON header padded with spaces to a multiple of eight, and the
values, row by row, in the order of the header. As in the safetensors library, wider dtypes come first, so that every
tensor is aligned; ``__metadata__`` maps text to text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import _TYPES as DTYPES
from torch import Tensor

from normswap.checkpoints.lazy import shape_of
from normswap.errors import NormswapError

NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 2**24


def sizes_of(tensors: Mapping[str, Tensor], path: Path) -> dict[str, int]:
    """Bytes of every tensor; raises :class:`NormswapError` for a dtype that the format does not have."""
    found = {}
    for name in tensors:
        known = shape_of(tensors, name)
        if known.dtype is None or known.dtype not in NAMES:
            raise NormswapError(f"{path}: {name} is {known.dtype}, which .safetensors cannot hold; write .pt")
        found[name] = math.prod(known.shape) * known.dtype.itemsize
    return found


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write all of ``tensors``, contiguous, on the CPU, to ``path``."""
    sizes = sizes_of(tensors, path)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    order = sorted(tensors, key=lambda name: (-(shape_of(tensors, name).dtype or torch.uint8).itemsize, name))
    end = 0
    for name in order:
        known = shape_of(tensors, name)
        assert known.dtype is not None
        span = [end, end + sizes[name]]
        header[name] = {"dtype": NAMES[known.dtype], "shape": list(known.shape), "data_offsets": span}
        end += sizes[name]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            values = memoryview(_bytes(tensors[name]))
            for start in range(0, len(values), CHUNK):
                file.write(values[start : start + CHUNK])
            del values


def _bytes(value: Tensor) -> Any:
    flat = value.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else b""
