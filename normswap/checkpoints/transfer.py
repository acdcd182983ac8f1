"""Bytes from files and from memory into new files, while the digest of the files is taken.

What goes from file to file does not pass through this process where the system can copy it (``copy_file_range``). The
SHA-256 of the files is taken beside that, in another thread, and the CRC-32 of what needs one in a third. They keep
within :data:`APART` bytes of each other, so that what one has read is still in the system's memory for the next. A file
is flushed to the disk as soon as the last of its bytes is written. Memory holds a few blocks, whatever the sizes are.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from normswap.checkpoints.spans import Span, check_unchanged, states
from normswap.errors import NormswapError

BLOCK = 2**20
"""Bytes read or written at once. Larger writes are slower: the system then looks for larger pages."""
STEP = 2**24
"""Bytes that the system is asked to copy at once, and after which the threads say how far they are."""
APART = 2**29
EARLY = 2**28
"""Bytes after which a file is flushed for the first time, so that the disk has work while the rest is read."""

REFUSED = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY}
"""Errors of ``copy_file_range`` between files or systems that it does not serve."""

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all, from several threads, one at a time."""


@dataclass
class Piece:
    """Bytes that go to one place in one of the files written."""

    file: int
    offset: int
    size: int
    source: Span | Callable[[], Any]
    """What gives the bytes where they are in memory: a buffer of ``size`` bytes."""
    summed: bool = False
    """Whether their CRC-32 is wanted."""
    crc: int = 0

    @property
    def span(self) -> Span:
        assert isinstance(self.source, Span)
        return self.source


class Stopped(Exception):
    """Another thread failed."""


def silent(done: int, total: int) -> None:
    pass


def transfer(
    paths: Sequence[Path],
    pieces: Sequence[Piece],
    read: Sequence[Path] = (),
    *,
    progress: Progress = silent,
    complete: Callable[[int], None] = lambda file: None,
) -> str:
    """Write ``pieces`` into ``paths``, which exist; the SHA-256, in hexadecimal, of the files ``read``, one after the
    other.

    ``complete`` is called, from another thread, with the index of a file of which all pieces are on the disk.
    Raises :class:`NormswapError` for a file that cannot be read or is changed meanwhile, ``OSError`` for one that
    cannot be written.
    """
    held = [piece for piece in pieces if not isinstance(piece.source, Span)]
    inside = [piece for piece in pieces if isinstance(piece.source, Span) and piece.size]
    sources = list(dict.fromkeys([*read, *(piece.span.path for piece in inside)]))
    before = states(sources)
    starts, end = {}, 0
    for path in sources:
        starts[path] = end
        end += before[path][0]
    inside.sort(key=lambda piece: starts[piece.span.path] + piece.span.start)
    with ExitStack() as stack:
        pools = [ThreadPoolExecutor(1) for _ in range(4)]
        for pool in pools:
            stack.callback(pool.shutdown, cancel_futures=True)
        work = _Work(paths, pieces, starts, end + sum(piece.size for piece in held), pools[0], progress, complete)
        stack.callback(work.stop)
        others: list[Future[Any]] = [
            pools[1].submit(work.digest, read),
            pools[2].submit(work.sums, [piece for piece in inside if piece.summed]),
            pools[3].submit(work.from_memory, held),
        ]
        work.others = others
        work.from_files(inside)
        digest: str = others[0].result()
        for future in others:
            future.result()
        for future in work.flushes:  # Complete only now: what is written last starts the last of them.
            future.result()
    check_unchanged(before)
    progress(work.total, work.total)
    return digest


class _Work:
    """What the threads share, and what each of them does."""

    def __init__(
        self,
        paths: Sequence[Path],
        pieces: Sequence[Piece],
        starts: Mapping[Path, int],
        total: int,
        flushing: ThreadPoolExecutor,
        progress: Progress,
        complete: Callable[[int], None],
    ) -> None:
        self.paths, self.starts, self.total, self.flushing = paths, starts, total, flushing
        self.progress, self.complete = progress, complete
        self.others: list[Future[Any]] = []
        self.changed = threading.Condition()
        self.stopped = False
        self.places = {"digest": 0, "sums": 0, "copies": 0}
        """How far each is in the files read, which are counted as one."""
        self.from_here = 0
        self.pending = [0] * len(paths)
        self.unflushed = [0] * len(paths)
        for piece in pieces:
            self.pending[piece.file] += piece.size
        self.flushes = [flushing.submit(self._finish, file) for file, size in enumerate(self.pending) if not size]

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()

    def _reached(self, who: str, place: int) -> None:
        """Say how far one is, and wait for those that are far behind."""
        with self.changed:
            self.places[who] = place
            self._show()
            self.changed.notify_all()
            while not self.stopped and place - min(self.places.values()) > APART and not self._failure():
                self.changed.wait(1)
            if self.stopped:
                raise Stopped

    def _show(self) -> None:
        self.progress(min(min(self.places.values()) + self.from_here, self.total), self.total)

    def _ended(self, who: str) -> None:
        with self.changed:
            self.places[who] = self.total
            self.changed.notify_all()

    def _failure(self) -> bool:
        return any(future.done() and future.exception() is not None for future in (*self.others, *self.flushes))

    def digest(self, read: Sequence[Path]) -> str:
        digest = hashlib.sha256()
        for path in read:
            for start, block in _blocks(path, 0, None):
                digest.update(block)
                if not start % STEP:
                    self._reached("digest", self.starts[path] + start)
        self._ended("digest")
        return digest.hexdigest()

    def sums(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            for start, block in _blocks(piece.span.path, piece.span.start, piece.size):
                piece.crc = zlib.crc32(block, piece.crc)
                if not (start - piece.span.start) % STEP:
                    self._reached("sums", self.starts[piece.span.path] + start)
        self._ended("sums")

    def from_files(self, pieces: Sequence[Piece]) -> None:
        with _Copier(self.paths) as copier:
            for file, offset, span in _joined(pieces):
                for done in range(0, span.size, STEP):
                    size = min(STEP, span.size - done)
                    copier.copy(span.path, span.start + done, file, offset + done, size)
                    self._wrote(file, size)
                    self._reached("copies", self.starts[span.path] + span.start + done)
                    for future in (*self.others, *self.flushes):
                        if future.done():
                            future.result()
        self._ended("copies")

    def from_memory(self, pieces: Sequence[Piece]) -> None:
        with _Copier(self.paths) as copier:
            for piece in pieces:
                assert callable(piece.source)
                values = memoryview(piece.source())
                for start in range(0, piece.size, BLOCK):
                    part = values[start : start + BLOCK]
                    if piece.summed:
                        piece.crc = zlib.crc32(part, piece.crc)
                    copier.write(piece.file, piece.offset + start, part)
                    self._wrote(piece.file, len(part))
                    with self.changed:
                        self.from_here += len(part)
                        self._show()
                        if self.stopped:
                            raise Stopped
                del values

    def _wrote(self, file: int, size: int) -> None:
        with self.changed:
            self.pending[file] -= size
            self.unflushed[file] += size
            if not self.pending[file]:
                self.flushes.append(self.flushing.submit(self._finish, file))
            elif self.unflushed[file] >= EARLY:
                self.unflushed[file] = 0
                self.flushes.append(self.flushing.submit(self._flush, file))

    def _flush(self, file: int) -> None:
        with self.paths[file].open("rb+") as handle:
            os.fsync(handle.fileno())

    def _finish(self, file: int) -> None:
        self._flush(file)
        if not self.stopped:
            self.complete(file)


def _joined(pieces: Sequence[Piece]) -> Iterator[tuple[int, int, Span]]:
    """File, place in it, and where the bytes come from; neighbours that stay neighbours are one."""
    last: tuple[int, int, Span] | None = None
    for piece in pieces:
        span = piece.span
        if last is not None:
            file, offset, before = last
            follows = before.path == span.path and before.start + before.size == span.start
            if follows and (file, offset + before.size) == (piece.file, piece.offset):
                last = file, offset, Span(span.path, before.start, before.size + span.size)
                continue
            yield last
        last = piece.file, piece.offset, span
    if last is not None:
        yield last


def _blocks(path: Path, start: int, size: int | None) -> Iterator[tuple[int, memoryview]]:
    """Place and content; ``size`` bytes, or all there are. A block is overwritten by the next."""
    buffer = memoryview(bytearray(BLOCK))
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while size is None or size:
                count = file.readinto(buffer if size is None else buffer[:size])
                if not count:
                    break
                yield start, buffer[:count]
                start += count
                size = None if size is None else size - count
    except OSError as error:
        raise NormswapError(f"{path} cannot be read: {error.strerror or error}") from error
    if size:
        raise NormswapError(f"{path} was changed while it was read: it is shorter now")


class _Copier:
    """Writes at places in files; each thread has its own."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.file = -1
        self.target: FileIO | None = None
        self.path: Path | None = None
        self.source: FileIO | None = None
        self.by_system = hasattr(os, "copy_file_range")

    def __enter__(self) -> _Copier:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in (self.source, self.target):
            if handle is not None:
                handle.close()

    def _opened(self, file: int) -> FileIO:
        if self.target is None or self.file != file:
            if self.target is not None:
                self.target.close()
            self.file, self.target = file, FileIO(self.paths[file], "r+")
        return self.target

    def write(self, file: int, offset: int, part: memoryview) -> None:
        target = self._opened(file)
        target.seek(offset)
        written = 0
        while written < len(part):
            written += target.write(part[written:])

    def copy(self, path: Path, start: int, file: int, offset: int, size: int) -> None:
        """``size`` bytes of ``path``, by the system or, where it refuses, through memory."""
        if self.source is None or self.path != path:
            if self.source is not None:
                self.source.close()
            try:
                self.path, self.source = path, FileIO(path, "r")
            except OSError as error:
                raise NormswapError(f"{path} cannot be read: {error.strerror or error}") from error
        if self.by_system:
            handles = self.source.fileno(), self._opened(file).fileno()
            while size:
                try:
                    count = os.copy_file_range(*handles, size, start, offset)
                except OSError as error:
                    if error.errno not in REFUSED:
                        raise
                    self.by_system = False
                    break
                if not count:
                    break
                start, offset, size = start + count, offset + count, size - count
        for place, block in _blocks(path, start, size):
            self.write(file, offset + place - start, block)
