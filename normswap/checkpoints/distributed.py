"""Checkpoints of ``torch.distributed.checkpoint``: a folder with ``.metadata`` and the files of every process.

The metadata names every tensor with its size, and for each of its parts (*chunks*) the file, the offset there and the
length; a chunk is a file of ``torch.save`` by itself. Values that are no tensors are stored likewise, whole. A nested
state dict is stored flat, with the path to each value. Nothing here runs code: the metadata is a pickle of which only
the classes of such metadata are read, the rest is read with ``weights_only=True``.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normswap.checkpoints.lazy import LazyTensors, Shape
from normswap.checkpoints.pickles import metadata
from normswap.checkpoints.words import line
from normswap.errors import NormswapError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

NAME = ".metadata"
LARGEST = 2**28
"""Bytes read of a metadata file at most."""


@dataclass(frozen=True)
class Item:
    """Where a chunk or a value lies."""

    file: str
    offset: int
    length: int
    start: tuple[int, ...] | None = None
    """Of a chunk: its first element in the tensor."""
    sizes: tuple[int, ...] = ()


@dataclass
class Stored:
    """A distributed checkpoint, of which no tensor is read yet."""

    folder: Path
    metadata: Metadata
    items: dict[str, list[Item]]
    """The chunks of every tensor, or the one item of a value, by the flat name."""
    values: dict[str, Any] = field(repr=False)
    """What is no tensor, by the flat name."""
    nested: dict[Any, Any] = field(repr=False)
    """The state dict as it was saved, with tensors on the meta device that know their flat name."""

    @property
    def files(self) -> list[str]:
        return sorted({item.file for items in self.items.values() for item in items})

    def tensor(self, name: str) -> Tensor:
        """A tensor put together from its chunks."""
        known: Any = self.metadata.state_dict_metadata[name]
        size, dtype = tuple(known.size), known.properties.dtype
        items = self.items[name]
        pieces = [self._chunk(name, item, dtype) for item in items]
        if len(items) == 1 and items[0].sizes == size:
            return pieces[0]
        whole, seen = torch.empty(size, dtype=dtype), torch.zeros(size, dtype=torch.bool)
        for item, piece in zip(items, pieces, strict=True):
            place = tuple(slice(a, a + n) for a, n in zip(item.start or (), item.sizes, strict=True))
            whole[place], seen[place] = piece, True
        if not bool(seen.all()):
            raise NormswapError(f"{self.folder}: parts of {name} are missing")
        return whole

    def _chunk(self, name: str, item: Item, dtype: torch.dtype) -> Tensor:
        value = self.value(name, item)
        if not isinstance(value, Tensor) or tuple(value.shape) != item.sizes or value.dtype != dtype:
            raise NormswapError(f"{self.folder / item.file} is damaged: a part of {name} is not what the metadata says")
        return value.detach()

    def value(self, name: str, item: Item) -> Any:
        """What an item holds."""
        data = self.bytes(item)
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                packed = any(e.compress_type != zipfile.ZIP_STORED for e in archive.infolist())
                if packed or sum(e.file_size for e in archive.infolist()) > len(data):
                    raise NormswapError(f"{self.folder / item.file} was not read: {name} is compressed (a zip bomb?)")
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except NormswapError:
            raise
        except Exception as error:
            raise NormswapError(
                f"{self.folder / item.file} is damaged, or {name} in it is more than tensors and plain values, which "
                f"would run code: {line(error)}"
            ) from error

    def bytes(self, item: Item) -> bytes:
        with (self.folder / item.file).open("rb") as file:
            file.seek(item.offset)
            return file.read(item.length)


class DistributedTensors(LazyTensors):
    """The tensors under one key of a distributed checkpoint, put together when they are asked for."""

    whole_in_files = False

    def __init__(
        self, stored: Stored, names: Mapping[str, str], places: Mapping[str, Tensor | Path], shapes: Mapping[str, Shape]
    ) -> None:
        super().__init__(places, shapes)
        self.stored = stored
        self.names = names
        """The flat name of each."""

    @classmethod
    def of(cls, stored: Stored, state: Mapping[Any, Any]) -> DistributedTensors:
        tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
        names = {name: flat_name(value) for name, value in tensors.items()}
        shapes = {name: Shape(value.dtype, tuple(value.shape)) for name, value in tensors.items()}
        return cls(stored, names, dict.fromkeys(tensors, stored.folder), shapes)

    def __getitem__(self, name: str) -> Tensor:
        place = self.places[name]
        return place if isinstance(place, Tensor) else self.stored.tensor(self.names[name])

    def like(self, places: Mapping[str, Tensor | Path], shapes: Mapping[str, Shape]) -> DistributedTensors:
        return DistributedTensors(self.stored, self.names, places, shapes)


def is_distributed(path: Path) -> bool:
    return path.is_dir() and (path / NAME).is_file()


def flat_name(value: Tensor) -> str:
    """The flat name of a tensor in :attr:`Stored.nested`."""
    return value.normswap_name  # type: ignore[attr-defined, no-any-return]


def open_distributed(folder: Path) -> Stored:
    """Read the metadata of a distributed checkpoint and what is no tensor in it.

    Raises :class:`NormswapError` for metadata that is damaged, names a file outside the folder, or does not fit."""
    path = folder / NAME
    if path.stat().st_size > LARGEST:
        raise NormswapError(f"{path} was not read: {path.stat().st_size} bytes are too large for metadata")
    found = metadata(path)
    try:
        items = _items(folder, found)
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise NormswapError(f"{path} is damaged: it does not say where everything is ({line(error)})") from error
    stored = Stored(folder, found, items, {}, {})
    leaves: dict[str, Any] = {}
    known: Any
    for name, known in found.state_dict_metadata.items():
        if hasattr(known, "chunks"):
            leaf = torch.empty(known.size, dtype=known.properties.dtype, device="meta")
            leaf.normswap_name = name  # type: ignore[attr-defined]
            leaves[name] = leaf
        else:
            leaves[name] = stored.values[name] = stored.value(name, items[name][0])
    paths = found.planner_data if isinstance(found.planner_data, dict) else {}
    try:
        for name, leaf in leaves.items():
            _put(stored.nested, tuple(paths.get(name) or (name,)), leaf)
        stored.nested = _listed(stored.nested)
    except (TypeError, RecursionError) as error:
        raise NormswapError(f"{path} is damaged: its paths make no sense ({line(error)})") from error
    return stored


def _items(folder: Path, found: Metadata) -> dict[str, list[Item]]:
    places: dict[Any, Any] = {}
    for index, info in found.storage_data.items():
        places[index.fqn, None if index.offset is None else tuple(index.offset)] = info
    sizes: dict[str, int] = {}
    items: dict[str, list[Item]] = {}
    known: Any
    keyed: list[tuple[Any, Any, Any]]
    for name, known in found.state_dict_metadata.items():
        if hasattr(known, "chunks"):
            chunks = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in known.chunks]
            keyed = [(places.get((name, start), places.get((name, None))), start, size) for start, size in chunks]
        else:
            keyed = [(places[name, None], None, ())]
        items[name] = [_item(folder, name, info, start, size, sizes) for info, start, size in keyed]
        if hasattr(known, "chunks"):
            _check_chunks(folder, name, tuple(known.size), known.properties.dtype, items[name])
    return items


def _item(folder: Path, name: str, info: Any, start: Any, size: Any, sizes: dict[str, int]) -> Item:
    file, offset, length = info.relative_path, info.offset, info.length
    if getattr(info, "transform_descriptors", None):
        raise NormswapError(f"{folder}: {name} went through an extension ({info.transform_descriptors}) when saved")
    if not isinstance(file, str) or "/" in file or "\\" in file or "\0" in file or file in ("", ".", ".."):
        raise NormswapError(f"{folder} was not read: its metadata names {file!r}, which is no file in it")
    if file not in sizes:
        if not (folder / file).is_file():
            raise NormswapError(f"{folder} names {file}, which is not there; copy it again")
        sizes[file] = (folder / file).stat().st_size
    if not (type(offset) is int and type(length) is int and offset >= 0 and 0 < length <= sizes[file] - offset):
        raise NormswapError(f"{folder / file} is truncated or damaged: {name} does not lie in it")
    return Item(file, offset, length, start, size)


def _check_chunks(folder: Path, name: str, size: tuple[int, ...], dtype: torch.dtype, items: list[Item]) -> None:
    whole = all(type(n) is int and n >= 0 for n in size) and isinstance(dtype, torch.dtype)
    inside = all(
        item.start is not None
        and len(item.start) == len(item.sizes) == len(size)
        and all(min(a, n) >= 0 and a + n <= total for a, n, total in zip(item.start, item.sizes, size, strict=True))
        and math.prod(item.sizes) * dtype.itemsize <= item.length
        for item in items
    )
    if not whole or not inside or sum(math.prod(item.sizes) for item in items) != math.prod(size):
        raise NormswapError(f"{folder / NAME} is damaged: what it says of the parts of {name} makes no sense")


# --- nesting ---------------------------------------------------------------------------------------------------------


def _put(nested: dict[Any, Any], path: tuple[Any, ...], leaf: Any) -> None:
    for part in path[:-1]:
        nested = nested.setdefault(part, {})
        if not isinstance(nested, dict):
            raise NormswapError(f"the metadata puts something into the value at {'.'.join(map(str, path))}")
    nested[path[-1]] = leaf


def _listed(value: Any) -> Any:
    """Lists are keyed by number; the numbers of an optimizer's parameters are stored as text."""
    if not isinstance(value, dict):
        return value
    if value and all(type(key) is int for key in value) and sorted(value) == list(range(len(value))):
        return [_listed(value[index]) for index in range(len(value))]
    made = {key: _listed(entry) for key, entry in value.items()}
    groups, state = made.get("param_groups"), made.get("state")
    if isinstance(groups, list) and isinstance(state, dict) and all(str(key).isdecimal() for key in state):
        numbers = [n for group in groups if isinstance(group, dict) for n in group.get("params") or ()]
        if all(type(n) is int for n in numbers):
            made["state"] = {int(key): entry for key, entry in state.items()}
    return made


def opened(stored: Stored, value: Any) -> Any:
    """A nested value with the tensors themselves."""
    if isinstance(value, Tensor) and hasattr(value, "normswap_name"):
        return stored.tensor(flat_name(value))
    if isinstance(value, Mapping):
        return {name: opened(stored, entry) for name, entry in value.items()}
    return [opened(stored, entry) for entry in value] if type(value) is list else value
