"""A folder of shards that is being written, and what a run that was interrupted left of it.

Until it is whole it is ``folder`` in ``.NAME.unfinished.normswap.tmp``, beside the place where it will be. With it is a
journal: what is written there (``plan``), and which shards have all their values on the disk, with size and time of the
last change. Their headers come last, for all of them, when the digest of the input is known. So a shard of the journal
is kept if it is as it was left, and if the plan is the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from normswap.checkpoints.lazy import shape_of
from normswap.checkpoints.spans import states
from normswap.errors import NormswapError
from normswap.files import flush, flush_name, hidden_name, locked, unwritable

JOURNAL = "journal.json"
REASONS = {
    "input": "the input is another, or was changed since",
    "metadata": "the recipe, or what else the metadata says, is another",
    "shards": "the tensors or the size of the shards are others",
}
Plan = dict[str, Any]


def plan_of(
    tensors: Mapping[str, Any],
    shards: Mapping[str, Sequence[str]],
    sizes: Mapping[str, int],
    metadata: Mapping[str, str],
    files: Sequence[Path],
) -> Plan:
    """What must be the same for a shard to be the same, as JSON; digests of what is long."""
    shapes = {name: (str((known := shape_of(tensors, name)).dtype), list(known.shape)) for name in sizes}
    content = {name: [(key, *shapes[key]) for key in keys] for name, keys in shards.items()}
    return {
        "input": [[str(path.resolve()), *state] for path, state in states(files).items()],
        "metadata": _digest(dict(metadata)),
        "shards": _digest(content),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass
class Work:
    """The folder as far as it is written."""

    home: Path
    plan: Plan
    complete: dict[str, list[int]] = field(default_factory=dict)
    """By name of a shard with all its values: size and time of the last change."""

    @property
    def folder(self) -> Path:
        return self.home / "folder"

    def places(self, names: Sequence[str]) -> list[Path]:
        """The files to write, which exist; those that are not complete are empty."""
        self.folder.mkdir(exist_ok=True)
        for name in names:
            if name not in self.complete:
                with (self.folder / name).open("wb"):
                    pass
        return [self.folder / name for name in names]

    def completed(self, name: str) -> None:
        state = (self.folder / name).stat()
        self.complete[name] = [state.st_size, state.st_mtime_ns]
        self.save()

    def save(self) -> None:
        new = self.home / (JOURNAL + ".new")
        new.write_text(json.dumps({"plan": self.plan, "complete": self.complete}), encoding="utf-8")
        flush(new)
        new.replace(self.home / JOURNAL)

    def finish(self, target: Path) -> None:
        for file in self.folder.iterdir():
            flush(file)
        self.folder.rename(target)
        flush_name(target)


@contextmanager
def unfinished(path: Path, plan: Plan, *, resume: bool, need: int, note: Callable[[str], None]) -> Iterator[Work]:
    """Give the folder to write to, and put it at ``path`` when the block ends well.

    When the block raises, nothing is left; with ``resume``, the shards that are complete, and a ``KeyboardInterrupt``
    says so. Raises :class:`NormswapError` where another run is at work, where what there is to resume is something
    else, and for an ``OSError`` of the block.
    """
    target = path.resolve()
    home = hidden_name(target, "unfinished")
    handle = _entered(path, home)
    work = None
    try:
        work = _taken_over(path, home, plan, resume, note)
        yield work
        work.finish(target)
    except BaseException as error:
        if work is None and isinstance(error, NormswapError):
            raise
        left = len(work.complete) if work is not None and resume else 0
        said = f"{_count(left)} complete and kept for --resume" if left else "No partial folder was left"
        if not left:
            shutil.rmtree(home, ignore_errors=True)
        if isinstance(error, OSError):
            raise unwritable(path, error, need, said) from error
        if isinstance(error, KeyboardInterrupt) and left:
            raise KeyboardInterrupt(said) from error
        raise
    else:
        shutil.rmtree(home, ignore_errors=True)
    finally:
        if handle is not None:
            os.close(handle)


def _entered(path: Path, home: Path) -> int | None:
    """Make ``home`` where it is not there, and lock it."""
    try:
        while True:
            home.mkdir(exist_ok=True)
            with suppress(FileNotFoundError):  # Another run ended in between, and took it away.
                return locked(home)
    except BlockingIOError as error:
        raise NormswapError(f"{path} is being written by another run, in {home}; wait for it, or end it") from error
    except OSError as error:
        raise unwritable(path, error) from error


def _taken_over(path: Path, home: Path, plan: Plan, resume: bool, note: Callable[[str], None]) -> Work:
    """What to go on with: nothing, or the complete shards that are there."""
    work, found = Work(home, plan), any(home.iterdir())
    if found and resume and (home / JOURNAL).exists():
        old = _read(path, home)
        if different := [reason for name, reason in REASONS.items() if old["plan"].get(name) != plan[name]]:
            raise NormswapError(
                f"{path}: what an interrupted run left in {home} cannot be resumed: {'; '.join(different)}. "
                "Without --resume it is removed, and all is written anew"
            )
        for name, (size, time) in old["complete"].items():
            with suppress(OSError):
                state = (work.folder / name).stat()
                if (state.st_size, state.st_mtime_ns) == (size, time):
                    work.complete[name] = [size, time]
        note(f"{_count(len(work.complete))} taken over from the interrupted run")
    elif found:
        for entry in home.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        note(f"removed {home}, left by an interrupted run")
    elif resume:
        note("no interrupted run was found to resume; beginning anew")
    work.save()
    return work


def _read(path: Path, home: Path) -> dict[str, Any]:
    try:
        found = json.loads((home / JOURNAL).read_bytes())
        complete = {str(name): (int(size), int(time)) for name, (size, time) in found["complete"].items()}
        return {"plan": dict(found["plan"]), "complete": complete}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NormswapError(
            f"{path}: the journal in {home} is damaged, so nothing can be resumed; without --resume it is removed"
        ) from error


def _count(shards: int) -> str:
    return f"{shards} shards are" if shards != 1 else "1 shard is"
