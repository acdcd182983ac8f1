"""Writing files so that they appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
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


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
