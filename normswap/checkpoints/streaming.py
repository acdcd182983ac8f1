"""A ``.safetensors`` file: where everything goes in it.

The file is eight bytes of length (little endian), a JSON header padded with spaces to a multiple of eight, and the
values, row by row, in the order of the header. As in the safetensors library, wider dtypes come first, so that every
tensor is aligned; ``__metadata__`` maps text to text. The values are written first, for the metadata may tell the
digest of the files they come from, which is known when these have been read: it has as many characters whatever it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import _TYPES as DTYPES
from torch import Tensor

from normswap.checkpoints.lazy import shape_of
from normswap.checkpoints.spans import Origin
from normswap.checkpoints.transfer import Piece, Progress, silent, transfer
from normswap.errors import NormswapError

NAMES = {dtype: name for name, dtype in DTYPES.items()}
BLANK = "0" * 64
"""Stands for the digest as long as it is not known."""

Metadata = Callable[[str], Mapping[str, str]]
"""The metadata, given the digest of the files that were read."""


def sizes_of(tensors: Mapping[str, Tensor], path: Path) -> dict[str, int]:
    """Bytes of every tensor; raises :class:`NormswapError` for a dtype that the format does not have."""
    found = {}
    for name in tensors:
        known = shape_of(tensors, name)
        if known.dtype is None or known.dtype not in NAMES:
            raise NormswapError(f"{path}: {name} is {known.dtype}, which .safetensors cannot hold; write .pt")
        found[name] = math.prod(known.shape) * known.dtype.itemsize
    return found


def header_of(
    tensors: Mapping[str, Tensor], spans: Mapping[str, tuple[int, int]], metadata: Mapping[str, str]
) -> bytes:
    """All that comes before the values; ``spans`` are places in these."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, span in spans.items():
        known = shape_of(tensors, name)
        assert known.dtype is not None
        header[name] = {"dtype": NAMES[known.dtype], "shape": list(known.shape), "data_offsets": list(span)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def places_of(
    tensors: Mapping[str, Tensor], names: Iterable[str], sizes: Mapping[str, int]
) -> dict[str, tuple[int, int]]:
    """Where the values of each tensor begin and end, behind the header."""
    found, end = {}, 0
    for name in sorted(names, key=lambda name: (-(shape_of(tensors, name).dtype or torch.uint8).itemsize, name)):
        found[name] = end, end + sizes[name]
        end += sizes[name]
    return found


def write_tensors(
    paths: Sequence[Path],
    parts: Sequence[Sequence[str]],
    tensors: Mapping[str, Tensor],
    metadata: Metadata,
    origin: Origin,
    *,
    progress: Progress = silent,
    complete: Callable[[int], None] = lambda file: None,
    kept: frozenset[int] = frozenset(),
) -> str:
    """Write the ``parts`` of ``tensors``, contiguous, to the files ``paths``, which exist; the digest of the origin.

    Of the files ``kept``, which have their values, only the headers are written.
    """
    sizes = sizes_of(tensors, paths[0])
    layouts = [places_of(tensors, part, sizes) for part in parts]
    blank = [header_of(tensors, layout, metadata(BLANK)) for layout in layouts]
    pieces = []
    for file, layout in enumerate(layouts):
        for name, (begin, end) in layout.items() if file not in kept else ():
            span = origin.of_tensor(tensors, name)
            if span is not None and span.size != end - begin:
                raise NormswapError(f"{span.path} was changed while it was read; run the command again")
            source = partial(_bytes, tensors, name) if span is None else span
            pieces.append(Piece(file, len(blank[file]) + begin, end - begin, source))
    digest = transfer(paths, pieces, origin.files, progress=progress, complete=complete)
    for path, layout, before in zip(paths, layouts, blank, strict=True):
        head = header_of(tensors, layout, metadata(digest))
        assert len(head) == len(before)
        with path.open("rb+") as handle:
            handle.write(head)
    return digest


def _bytes(tensors: Mapping[str, Tensor], name: str) -> Any:
    flat = tensors[name].detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else b""
