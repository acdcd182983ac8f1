"""A distributed checkpoint, written as the folder of another.

What did not change keeps its bytes and its file: each item is copied from the file it was in to the file of that name.
What is new goes to the file that held what it replaces, or else its neighbours. So every file can be made alone, and
several processes (:mod:`normswap.checkpoints.processes`) each make theirs; the bytes do not depend on how many there
are. The metadata comes last, by the first process, and then the folder gets its name.
"""

from __future__ import annotations

import io
import os
import pickle
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normswap.checkpoints import processes
from normswap.checkpoints.distributed import NAME, Item, Stored, flat_name
from normswap.errors import NormswapError

CHUNK = 2**24


@dataclass
class _Piece:
    """An item of a new file: one of the old file, or a value to be saved."""

    name: str
    old: Item | None
    value: Any = None

    @property
    def start(self) -> tuple[int, ...] | None:
        if self.old is not None:
            return self.old.start
        return (0,) * self.value.dim() if isinstance(self.value, Tensor) else None


def write_distributed(
    path: Path, stored: Stored, nested: Mapping[Any, Any], texts: Mapping[str, Callable[[], str]]
) -> None:
    """Write ``nested`` as a new folder ``path``, whole or not at all.

    Its leaves are those of ``stored.nested``, which are copied, or new ones; ``texts`` are further files, made by the
    first process. Where several processes work together, all of them call this. Raises :class:`NormswapError`, in all
    of them, where one cannot write."""
    leaves, paths = _flat(nested)
    files = _files(stored, leaves)
    folder = Path(processes.shared(str(path.resolve().parent / f".{path.name[:200]}.{secrets.token_hex(4)}.tmp")))
    lengths: dict[str, list[int]] = {}
    try:
        _together(folder, lambda: folder.mkdir() if processes.rank() == 0 else None)
        own = sorted(files)[processes.rank() :: processes.world()]
        _together(folder, lambda: lengths.update({name: _write(stored, folder, name, files[name]) for name in own}))
        for each in processes.gathered(lengths):
            lengths.update(each)
        _together(folder, lambda: _finish(path, folder, stored, leaves, paths, files, lengths, texts))
    finally:
        if processes.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _together(folder: Path, step: Callable[[], object]) -> None:
    failed: BaseException | None = None
    try:
        step()
    except OSError as error:
        failed = NormswapError(f"cannot write {folder.parent}: {error.strerror or error}. No partial folder was left")
    except BaseException as error:
        failed = error
    processes.agree(failed)


def _flat(nested: Mapping[Any, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values by flat name, and the path of each, as torch does it."""
    from torch.distributed.checkpoint._nested_dict import flatten_state_dict

    leaves, paths = flatten_state_dict(dict(nested))
    return leaves, paths


def _files(stored: Stored, leaves: Mapping[str, Any]) -> dict[str, list[_Piece]]:
    """The items of every file in their order there."""
    files: dict[str, list[tuple[int, int, _Piece]]] = {}
    owners: dict[str, str] = {}
    for name, items in stored.items.items():
        owners.setdefault(name.rpartition(".")[0], items[0].file)
    for number, (name, leaf) in enumerate(leaves.items()):
        before = _kept(stored, name, leaf)
        if before is not None:
            for item in stored.items[before]:
                files.setdefault(item.file, []).append((item.offset, number, _Piece(name, item)))
            continue
        place = stored.items[name][0] if name in stored.items else None
        file = place.file if place is not None else owners.get(name.rpartition(".")[0], stored.files[0])
        value = leaf.detach().cpu().contiguous().clone() if isinstance(leaf, Tensor) else leaf
        order = place.offset if place is not None else 2**63
        files.setdefault(file, []).append((order, number, _Piece(name, None, value)))
    return {file: [piece for *_, piece in sorted(found, key=lambda each: each[:2])] for file, found in files.items()}


def _kept(stored: Stored, name: str, leaf: Any) -> str | None:
    """The flat name under which a leaf is stored."""
    if isinstance(leaf, Tensor):
        return flat_name(leaf) if hasattr(leaf, "normswap_name") else None
    return name if name in stored.values and stored.values[name] is leaf else None


def _write(stored: Stored, folder: Path, name: str, pieces: list[_Piece]) -> list[int]:
    """Write one file; the lengths of its items."""
    lengths = []
    with (folder / name).open("wb") as file:
        for piece in pieces:
            start = file.tell()
            if piece.old is None:
                buffer = io.BytesIO()
                torch.save(piece.value, buffer)
                file.write(buffer.getbuffer())
            else:
                _copy(stored.folder / piece.old.file, piece.old, file)
            lengths.append(file.tell() - start)
        file.flush()
        os.fsync(file.fileno())
    return lengths


def _copy(source: Path, item: Item, file: Any) -> None:
    with source.open("rb") as old:
        old.seek(item.offset)
        left = item.length
        while left:
            data = old.read(min(CHUNK, left))
            if not data:
                raise NormswapError(f"{source} became shorter while it was read")
            file.write(data)
            left -= len(data)


def _finish(
    path: Path,
    folder: Path,
    stored: Stored,
    leaves: Mapping[str, Any],
    paths: Mapping[str, Any],
    files: Mapping[str, list[_Piece]],
    lengths: Mapping[str, list[int]],
    texts: Mapping[str, Callable[[], str]],
) -> None:
    if processes.rank() != 0:
        return
    with (folder / NAME).open("wb") as file:
        pickle.dump(_metadata(stored, leaves, paths, files, lengths), file)
        file.flush()
        os.fsync(file.fileno())
    for name, text in texts.items():
        (folder / name).write_text(text(), encoding="utf-8")
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    folder.rename(path.resolve())


def _metadata(
    stored: Stored,
    leaves: Mapping[str, Any],
    paths: Mapping[str, Any],
    files: Mapping[str, list[_Piece]],
    lengths: Mapping[str, list[int]],
) -> Any:
    from torch.distributed.checkpoint import metadata as classes
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    entries: dict[str, Any] = {}
    for name, leaf in leaves.items():
        before = _kept(stored, name, leaf)
        if before is not None:
            entries[name] = stored.metadata.state_dict_metadata[before]
        elif isinstance(leaf, Tensor):
            chunk = classes.ChunkStorageMetadata(torch.Size([0] * leaf.dim()), leaf.size())
            entries[name] = classes.TensorStorageMetadata(
                classes.TensorProperties(dtype=leaf.dtype), leaf.size(), [chunk]
            )
        else:
            entries[name] = classes.BytesStorageMetadata()
    places = {}
    for file in sorted(files):
        offset = 0
        for piece, length in zip(files[file], lengths[file], strict=True):
            places[classes.MetadataIndex(piece.name, piece.start)] = _StorageInfo(file, offset, length)
            offset += length
    made = classes.Metadata(entries, dict(paths), places)
    if (version := getattr(stored.metadata, "version", None)) is not None:
        made.version = version
    return made
