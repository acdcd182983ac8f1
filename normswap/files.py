"""Writing files so that they appear whole or not at all.

What is being written is called ``.NAME.XXXXXXXX.normswap.tmp`` (a folder with ``--resume``:
``.NAME.unfinished.normswap.tmp``), beside the place where it will be, and is locked by who writes it. One that was
killed leaves it behind; the next that writes ``NAME`` finds it unlocked and removes it.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from normswap.errors import NormswapError

TEMPORARY = ".normswap.tmp"
logger = logging.getLogger("normswap")


def check_output(path: Path, *, force: bool = False, inputs: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Raise :class:`NormswapError` when ``path`` cannot or must not be written.

    That is: a folder, a device, a name in a folder that does not exist or must not be written to, an existing file
    without ``force`` or that is read-only, and, whatever ``force`` says, one of the files ``inputs``.
    """
    try:
        target = path.resolve()
        is_folder, exists = path.is_dir(), os.path.lexists(target)
    except (OSError, RuntimeError, ValueError) as error:  # A loop of links, a name too long or with a zero byte.
        raise NormswapError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    if is_folder:
        raise NormswapError(f"{path} is a folder; name a file in it")
    folder = target.parent
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist; create it first"
        raise NormswapError(f"{path}: the folder {folder if path.is_symlink() else path.parent} {what}")
    for source in map(Path, inputs):
        if target == source.resolve() or (exists and source.exists() and path.samefile(source)):
            raise NormswapError(f"{path} is an input of this run and is never overwritten; choose another output")
    if exists and not target.is_file():
        raise NormswapError(f"{path} is no regular file; choose another output")
    if exists and not force:
        raise NormswapError(f"{path} exists; pass force=True (--force) to overwrite it")
    if exists and not target.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH):
        raise NormswapError(f"{path} is read-only and is not overwritten; choose another output, or make it writable")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise NormswapError(f"{path}: the folder {folder} must not be written to; choose another output")


def is_directory(path: Path) -> bool:
    """``path.is_dir()``, and ``False`` for a name that cannot be one."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


@contextmanager
def whole_file(
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    inputs: Iterable[str | os.PathLike[str]] = (),
    need: int | None = None,
) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to, and rename it to ``path`` when the block ends well.

    The file, empty at first, is flushed to disk before it is renamed. When the block raises (a full disk, Ctrl-C) the
    temporary file is removed, and a file that was at ``path`` stays as it was. A symbolic link is followed and kept.
    Raises :class:`NormswapError` as :func:`check_output` does, and for an ``OSError`` of the block; where the disk is
    full, with the ``need``, a number of bytes.
    """
    path = Path(path)
    check_output(path, force=force, inputs=inputs)
    target = path.resolve()
    try:
        clear(target)
        temporary, handle = _claimed(target)
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        yield temporary
        flush(temporary)
        if target.exists():
            shutil.copymode(target, temporary)
        temporary.replace(target)
        flush_name(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        _closed(handle)
        handle = None
        raise unwritable(path, error, need) from error
    finally:
        temporary.unlink(missing_ok=True)
        _closed(handle)


@contextmanager
def whole_files(paths: Sequence[Path], *, force: bool = False) -> Iterator[Path]:
    """Give a temporary folder for files of the names of ``paths``, and move all of them there when the block ends well.

    ``paths`` are in one folder, and the last is the one that refers to the others: it is put in place last, and an old
    one is taken away first, so that it never stands beside files that are not its own. When the block or a move fails,
    all paths are as they were. Raises :class:`NormswapError` as :func:`check_output` does, for a symbolic link (what
    it refers to would be looked for beside the link or beside its target), and for an ``OSError`` of the block.
    """
    for path in paths:
        check_output(path, force=force)
        if path.is_symlink():
            raise NormswapError(f"{path} is a symbolic link; files that belong together are not written through one")
    last = paths[-1].resolve()
    try:
        clear(last)
        folder, handle = _claimed(last, folder=True)
        try:
            yield folder
            for path in paths:
                flush(folder / path.name)
                if path.exists():
                    shutil.copymode(path, folder / path.name)
            _move(folder, paths)
            flush_name(last)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if handle is not None:
                os.close(handle)
    except OSError as error:
        raise unwritable(paths[-1], error) from error


def _move(folder: Path, paths: Sequence[Path]) -> None:
    aside = folder / "old"
    aside.mkdir()
    placed = []
    try:
        for path in reversed(paths):
            if path.exists():
                path.replace(aside / path.name)
        for path in paths:
            placed.append(path)
            (folder / path.name).replace(path)
    except BaseException:
        for path in reversed(placed):
            path.unlink(missing_ok=True)
        for path in paths:
            if (aside / path.name).exists():
                (aside / path.name).replace(path)
        raise


def flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_name(path: Path) -> None:
    """Let the name of a new file survive a loss of power, where the system can; the file is there in any case."""
    if os.name == "posix":
        with suppress(OSError):
            flush(path.parent)


def unwritable(
    path: Path, error: OSError, need: int | None = None, kept: str = "No partial file was left"
) -> NormswapError:
    """What to raise for an error of the operating system while ``path`` was written."""
    room = ""
    if need is not None and error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)):
        with suppress(OSError):
            folder = path.resolve().parent
            room = f"; it takes {size_in_words(need)}, and {folder} has {size_in_words(shutil.disk_usage(folder).free)}"
    return NormswapError(f"cannot write {path}: {error.strerror or error}{room}. {kept}")


def size_in_words(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def hidden_name(target: Path, word: str) -> Path:
    """Where what will be ``target`` is while it is written."""
    return target.with_name(f".{target.name.encode()[:200].decode(errors='ignore')}.{word}{TEMPORARY}")


def _claimed(target: Path, *, folder: bool = False) -> tuple[Path, int | None]:
    """A new temporary file or folder for ``target``, and the handle that keeps it locked."""
    while True:
        temporary = hidden_name(target, secrets.token_hex(4))
        if folder:
            temporary.mkdir()
        else:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))
        try:
            return temporary, locked(temporary)
        except (FileNotFoundError, BlockingIOError):  # Another run took it for a leftover before it was locked.
            continue


def locked(path: Path) -> int | None:
    """A handle that holds a lock on ``path``, a file or a folder; ``None`` where the system has no such locks.

    Raises ``BlockingIOError`` when another has it, ``FileNotFoundError`` when ``path`` went away meanwhile.
    """
    if sys.platform == "win32":  # There no leftover is removed.
        return None
    import fcntl

    handle = os.open(path, (os.O_RDONLY if path.is_dir() else os.O_RDWR) | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine, there = os.fstat(handle), path.stat()
        if (mine.st_dev, mine.st_ino) != (there.st_dev, there.st_ino):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    except (BlockingIOError, FileNotFoundError):
        os.close(handle)
        raise
    except OSError:  # A file system without locks: then nobody removes it either.
        os.close(handle)
        return None
    return handle


def _closed(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def leftovers(target: Path) -> list[Path]:
    """Temporary files and folders for ``target``, of runs that were killed or are still at work."""
    begin = hidden_name(target, "").name.removesuffix(TEMPORARY)
    names = re.compile(re.escape(begin) + "[0-9a-f]{8}" + re.escape(TEMPORARY))
    with suppress(OSError):
        return [Path(entry.path) for entry in os.scandir(target.parent) if names.fullmatch(entry.name)]
    return []


def clear(target: Path) -> list[Path]:
    """Remove what killed runs left of ``target``, and return it; what a run at work holds stays."""
    removed = []
    for path in leftovers(target):
        with suppress(OSError):
            handle = locked(path)
            if handle is None:
                continue
            try:
                if path.is_dir() and (path / "old").is_dir() and any((path / "old").iterdir()):
                    logger.warning("%s was left by an interrupted run and holds the files it was to replace", path)
                    continue
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed.append(path)
            finally:
                os.close(handle)
    for path in removed:
        logger.info("removed %s, left by an interrupted run", path)
    return removed
