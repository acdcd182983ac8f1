"""Where the bytes of a tensor lie in the file it was read from, so that they are copied from file to file.

In a ``.safetensors`` file the header says it. A zip file of torch's is mapped into memory as a whole, and every storage
is a part of the map. So their addresses, in order, belong to the entries of the archive, in order, and each address is
the place in the file plus the same base. Where all sizes and all differences agree the base is known; else nothing is.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import sys
import zipfile
from bisect import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import _TYPES as DTYPES
from torch import Tensor

from normswap.checkpoints.lazy import LazyTensors
from normswap.checkpoints.reading import Checkpoint
from normswap.checkpoints.safety import safetensors_header
from normswap.errors import NormswapError

LOCAL_HEADER = 30
"""Bytes of a zip entry's own header, before its name and its extra field."""


@dataclass(frozen=True)
class Span:
    """``size`` bytes of a file, from ``start`` on."""

    path: Path
    start: int
    size: int
    crc: int | None = None
    """The CRC-32 that an archive holds for exactly these bytes."""


@dataclass(frozen=True)
class Region:
    """A file that is mapped into memory at ``base``."""

    path: Path
    base: int
    size: int
    crcs: Mapping[tuple[int, int], int] = field(default_factory=dict, repr=False)
    """CRC-32 of the entries, by place and size."""
    owner: Any = field(default=None, repr=False)
    """Keeps the map, without which other tensors might come to lie at its addresses."""


@dataclass
class Origin:
    """The files that a state dict was read from, in the order in which their digest is taken."""

    files: tuple[Path, ...] = ()
    regions: Sequence[Region] = ()

    def __post_init__(self) -> None:
        self.regions = sorted(self.regions, key=lambda region: region.base)
        self._bases = [region.base for region in self.regions]
        self._headers: dict[Path, dict[str, Span]] = {}

    @classmethod
    def of(cls, read: Checkpoint | None) -> Origin:
        if read is None:
            return cls()
        found = [mapped_at(part.path, part.whole) for part in read.parts or (read,) if part.format == "torch"]
        return cls(read.files, [region for region in found if region is not None])

    def of_memory(self, address: int, size: int) -> Span | None:
        """The part of a file that lies at these addresses."""
        index = bisect(self._bases, address) - 1
        if index < 0 or not size:
            return None
        region = self.regions[index]
        start = address - region.base
        if start + size > region.size:
            return None
        return Span(region.path, start, size, region.crcs.get((start, size)))

    def of_tensor(self, tensors: Mapping[str, Any], name: str) -> Span | None:
        """Where the values of a tensor lie, row by row; ``None`` where no file has them so."""
        if not isinstance(tensors, LazyTensors):
            place = tensors[name]
        elif tensors.whole_in_files:
            place = tensors.places[name]
        else:
            return None
        if isinstance(place, Path):
            if place not in self._headers:
                self._headers[place] = safetensors_spans(place)
            return self._headers[place][name]
        plain = place.device.type == "cpu" and place.layout == torch.strided and place.is_contiguous()
        if not self.regions or not plain or place.is_conj() or place.is_neg():
            return None
        return self.of_memory(place.data_ptr(), place.numel() * place.element_size())


def safetensors_spans(path: Path) -> dict[str, Span]:
    """Where each tensor of a ``.safetensors`` file is; raises :class:`NormswapError` for a damaged one."""
    types: Mapping[str, Any] = DTYPES
    header = safetensors_header(path)
    sizes = {name: math.prod(shape) * types[dtype].itemsize for name, (dtype, shape) in header.items()}
    spans, start = {}, path.stat().st_size - sum(sizes.values())  # One lies behind the other, to the end of the file.
    for name, size in sizes.items():
        spans[name] = Span(path, start, size)
        start += size
    return spans


def mapped_tensors(tensors: LazyTensors) -> tuple[dict[str, Tensor], list[Region]]:
    """All of ``tensors``, those in a file as parts of its map: nothing is read until a value is used."""
    found: dict[str, Tensor] = {}
    maps: dict[Path, tuple[Any, dict[str, Span]]] = {}
    for name, place in tensors.places.items():
        if isinstance(place, Tensor):
            found[name] = place
            continue
        if place not in maps:
            storage = torch.UntypedStorage.from_file(str(place), False, place.stat().st_size)
            maps[place] = storage, safetensors_spans(place)
        storage, spans = maps[place]
        known, span = tensors.shapes[name], spans[name]
        values = torch.empty(0, dtype=known.dtype)
        if span.size:
            values.set_(storage[span.start : span.start + span.size])
        found[name] = values.view(known.shape)
    return found, [Region(path, s.data_ptr(), s.nbytes(), owner=s) for path, (s, _) in maps.items()]


def storages_of(value: Any) -> list[torch.UntypedStorage]:
    """The storages in ``value``, in the order in which ``torch.save`` numbers them."""
    found: dict[int, torch.UntypedStorage] = {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, each: Any) -> Any:
            if isinstance(each, torch.storage.TypedStorage):
                each = each._untyped_storage
            elif not torch.is_storage(each):
                return None
            found.setdefault(each._cdata, each)
            return ("storage", "", "", "", 0)

    Pickler(io.BytesIO(), protocol=2).dump(value)
    return list(found.values())


@dataclass(frozen=True)
class Entry:
    """An entry of an archive that is stored, not compressed."""

    name: str
    header: int
    start: int
    size: int
    crc: int


def entries_of(path: Path) -> list[Entry]:
    """The entries of a zip file, in the order of its directory."""
    found = []
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            file.seek(info.header_offset + LOCAL_HEADER - 4)
            lengths = file.read(4)
            start = (
                info.header_offset + LOCAL_HEADER + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
            )
            found.append(Entry(info.filename, info.header_offset, start, info.file_size, info.CRC))
    return found


def number(entry: Entry) -> int | None:
    """Of a storage: what ``torch.save`` calls it."""
    match = re.fullmatch(r"[^/]+/data/(\d+)", entry.name)
    return None if match is None else int(match[1])


def mapped_at(path: Path, loaded: Any) -> Region | None:
    """Where the file that ``torch.load`` mapped to give ``loaded`` is in memory, if that is certain."""
    try:
        entries, storages = entries_of(path), [s for s in storages_of(loaded) if s.nbytes() and s.device.type == "cpu"]
    except Exception:  # What cannot be pickled, or an archive that changed: the values are taken from memory.
        return None
    order = [entry for entry in entries if entry.name.endswith("/byteorder")]
    with path.open("rb") as file:
        for entry in order:
            file.seek(entry.start)
            if file.read(entry.size).decode(errors="replace") != sys.byteorder:  # The values were turned in memory.
                return None
    held = sorted((entry for entry in entries if number(entry) is not None and entry.size), key=lambda e: e.start)
    there = sorted(storages, key=lambda storage: storage.data_ptr())
    bases = {storage.data_ptr() - entry.start for storage, entry in zip(there, held, strict=False)}
    same = [storage.nbytes() for storage in there] == [entry.size for entry in held]
    if len(bases) != 1 or not same:
        return None
    crcs = {(entry.start, entry.size): entry.crc for entry in held}
    return Region(path, bases.pop(), path.stat().st_size, crcs, there[0])


def check_unchanged(before: Mapping[Path, tuple[int, int]]) -> None:
    """Raise :class:`NormswapError` for a file that is no longer what :func:`states` said."""
    for path, state in states(before).items():
        if state != before[path]:
            raise NormswapError(f"{path} was changed while it was read; run the command again when it is complete")


def states(paths: Iterable[Path]) -> dict[Path, tuple[int, int]]:
    """Size and time of the last change in nanoseconds, by path."""
    try:
        found = {path: path.stat() for path in paths}
    except OSError as error:
        raise NormswapError(f"{error.filename} cannot be read: {error.strerror}") from error
    return {path: (state.st_size, state.st_mtime_ns) for path, state in found.items()}
