"""Writing files so that they appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from normswap.errors import NormswapError


def check_output(path: Path, *, force: bool = False, inputs: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Raise :class:`NormswapError` when ``path`` cannot or must not be written.

    That is: a folder, a name in a folder that does not exist, an existing file without ``force``, and, whatever
    ``force`` says, one of the files ``inputs``.
    """
    if path.is_dir():
        raise NormswapError(f"{path} is a folder; name a file in it")
    if not path.resolve().parent.is_dir():
        raise NormswapError(f"{path}: the folder {path.parent} does not exist; create it first")
    for source in map(Path, inputs):
        if path.resolve() == source.resolve() or (path.exists() and source.exists() and path.samefile(source)):
            raise NormswapError(f"{path} is an input of this run and is never overwritten; choose another output")
    if path.exists() and not force:
        raise NormswapError(f"{path} exists; pass force=True (--force) to overwrite it")


@contextmanager
def whole_file(
    path: str | os.PathLike[str], *, force: bool = False, inputs: Iterable[str | os.PathLike[str]] = ()
) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to, and rename it to ``path`` when the block ends well.

    The file is flushed to disk before it is renamed. When the block raises (a full disk, Ctrl-C) the temporary file is
    removed, and a file that was at ``path`` stays as it was. A symbolic link is followed and kept. Raises
    :class:`NormswapError` as :func:`check_output` does, and for an ``OSError`` of the block.
    """
    path = Path(path)
    check_output(path, force=force, inputs=inputs)
    target = path.resolve()
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        _flush(temporary)
        if target.exists():
            shutil.copymode(target, temporary)
        temporary.replace(target)
        if os.name == "posix":
            _flush(target.parent)
    except OSError as error:
        raise NormswapError(f"cannot write {path}: {error.strerror or error}. No partial file was left") from error
    finally:
        temporary.unlink(missing_ok=True)


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
    last = paths[-1]
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{last.name[:200]}.", suffix=".tmp", dir=last.resolve().parent))
        try:
            yield folder
            for path in paths:
                _flush(folder / path.name)
                if path.exists():
                    shutil.copymode(path, folder / path.name)
            _move(folder, paths)
            if os.name == "posix":
                _flush(last.resolve().parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise NormswapError(f"cannot write {last}: {error.strerror or error}. No partial file was left") from error


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


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
