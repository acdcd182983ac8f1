"""A file as ``torch.save`` writes it, its storages copied from where they are.

``torch.save`` writes the archive without the bytes of the storages (:class:`torch.serialization.skip_data`); these are
put into it afterwards, and the CRC-32 of each, which stands behind the entry and in the directory at the end of the
archive. That of an entry copied from another archive is the one it had there, so that a bit that was flipped before is
not signed as right.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from normswap.checkpoints.spans import Entry, Origin, entries_of, number, storages_of
from normswap.checkpoints.transfer import Piece, Progress, silent, transfer

DESCRIPTOR = b"PK\x07\x08"
DIRECTORY_HEADER = 46
IDENTITY = ".data/serialization_id"


class _Sink(io.BufferedRandom):
    """A file that remembers why a write failed, for torch's zip writer hides it."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "r+"))
        self.error: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


def write_archive(path: Path, value: Any, origin: Origin, *, progress: Progress = silent) -> str:
    """Write ``value`` to ``path``, an empty file, and return the digest of the origin.

    Raises what ``torch.save`` raises, and ``OSError`` as such.
    """
    storages = storages_of(value)
    with torch.serialization.skip_data():
        _save(path, value)
    entries = entries_of(path)
    held = sorted((entry for entry in entries if number(entry) is not None), key=lambda entry: number(entry) or 0)
    if [entry.size for entry in held] != [storage.nbytes() for storage in storages]:
        with path.open("wb"):
            pass
        _save(path, value)
        return transfer([path], [], origin.files, progress=progress)
    pieces = [_piece(entry, storage, origin) for entry, storage in zip(held, storages, strict=True)]
    digest = transfer([path], pieces, origin.files, progress=progress)
    sums = {entry.name: piece.crc for entry, piece in zip(held, pieces, strict=True) if entry.size}
    _sign(path, entries, sums)
    return digest


def _save(path: Path, value: Any) -> None:
    with _Sink(path) as sink:
        try:
            torch.save(value, sink)
        except RuntimeError as error:
            if sink.error is not None:
                raise sink.error from error
            raise


def _piece(entry: Entry, storage: torch.UntypedStorage, origin: Origin) -> Piece:
    known = storage.device.type == "cpu"
    span = origin.of_memory(storage.data_ptr(), storage.nbytes()) if known else None
    if span is None:
        return Piece(0, entry.start, entry.size, partial(_bytes, storage), summed=True)
    return Piece(0, entry.start, entry.size, span, summed=span.crc is None, crc=span.crc or 0)


def _bytes(storage: torch.UntypedStorage) -> Any:
    return torch.empty(0, dtype=torch.uint8).set_(storage.cpu()).numpy() if storage.nbytes() else b""


def _sign(path: Path, entries: list[Entry], sums: Mapping[str, int]) -> None:
    """Put the CRC-32 of the entries where they belong; and into torch's identity of the file, which is made of them."""
    sums = dict(sums)
    with path.open("rb+") as file:
        for entry in entries:
            if entry.name.endswith(IDENTITY) and entry.size == 40:
                file.seek(entry.start)
                made_of = f"{file.read(40).decode()}{sorted(sums.items())}"
                text = str(int.from_bytes(hashlib.sha256(made_of.encode()).digest(), "big"))[-40:].encode()
                file.seek(entry.start)
                file.write(text)
                sums[entry.name] = zlib.crc32(text)
        for entry in entries:
            if entry.name in sums:
                file.seek(entry.start + entry.size)
                described = file.read(len(DESCRIPTOR)) == DESCRIPTOR
                file.seek(entry.start + entry.size + len(DESCRIPTOR) if described else entry.header + 14)
                file.write(sums[entry.name].to_bytes(4, "little"))
        with zipfile.ZipFile(path) as archive:
            place = archive.start_dir
        for entry in entries:
            file.seek(place)
            header = bytearray(file.read(DIRECTORY_HEADER))
            if entry.name in sums:
                header[16:20] = sums[entry.name].to_bytes(4, "little")
                file.seek(place)
                file.write(header)
            # Behind it stand a name, an extra field and a comment, of these lengths.
            place += DIRECTORY_HEADER + sum(int.from_bytes(header[at : at + 2], "little") for at in (28, 30, 32))
