"""A converted state dict, written in the form of the checkpoint it came from, with the recipes that lead to it.

The recipes travel in the metadata of ``.safetensors`` files (``normswap.recipe``, of a folder: in every shard and in
the index), else in ``NAME.normswap.json`` beside the file. The newest one tells the file it was made of (``source``:
name and SHA-256, and the key of the state dict where it was nested: the recipe is not that of others in the file).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normswap.checkpoints.distributed import Stored, opened
from normswap.checkpoints.distributed_writing import write_distributed
from normswap.checkpoints.lazy import LazyTensors, shape_of
from normswap.checkpoints.processes import together
from normswap.checkpoints.reading import RECIPE_FILE, Checkpoint
from normswap.checkpoints.spans import Origin
from normswap.checkpoints.training import Parameters, with_state
from normswap.checkpoints.transfer import Progress, silent
from normswap.checkpoints.words import first
from normswap.checkpoints.writing import SUFFIXES, check_folder, is_folder, write, write_file, write_folder
from normswap.errors import NormswapError
from normswap.files import check_output, clear, whole_file
from normswap.provenance import RECIPE, VERSION
from normswap.version import __version__

Recipe = dict[str, Any]
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def recipe_path(path: Path) -> Path:
    return path.with_name(path.name + ".normswap.json")


def check_destination(path: Path, *, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Raise :class:`NormswapError` now for an output that could not be written after long work."""
    if is_folder(path):
        check_folder(path, inputs)
        return
    if path.suffix not in SUFFIXES:
        raise NormswapError(f"output {path}: the name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    check_output(path, force=force, inputs=inputs)
    if path.suffix != ".safetensors":
        check_output(recipe_path(path), force=force or _orphan(path))


def parameters_of(tensors: Mapping[str, Any], fixed: Sequence[str] = ()) -> Parameters:
    """Shapes of what keys alone show as parameters; ``fixed`` are owners whose tensors are all buffers."""
    found: dict[str, tuple[int, ...]] = {}
    seen = set()
    for name, value in getattr(tensors, "places", tensors).items():
        owner, _, last = name.rpartition(".")
        if last in BUFFERS or owner in fixed or not isinstance(value, (Tensor, Path)):
            continue
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.numel():
            place = value.data_ptr(), tuple(value.shape)
            if place in seen:  # tied: an optimizer has it once
                continue
            seen.add(place)
        found[name] = shape_of(tensors, name).shape
    return found


def deliver(
    output: Path,
    state: Mapping[str, Any],
    recipes: Sequence[Recipe],
    read: Checkpoint | None,
    *,
    before: Parameters,
    after: Parameters,
    force: bool = False,
    max_shard_size: int | None = None,
    resume: bool = False,
    progress: Progress = silent,
    untouched: bool = False,
) -> tuple[list[Path], list[str]]:
    """Write ``state`` and its ``recipes``; the paths written, and notes on what became of the rest of ``read``.

    ``before`` and ``after`` are the parameters, for the state of an optimizer. ``untouched`` promises that no tensor of
    ``read`` was changed in memory, so that its bytes may be taken from the file. The files appear all or none: after a
    failure or an interrupt a recipe beside ``output`` is as it was. ``resume`` is for a folder, see
    :func:`normswap.checkpoints.writing.write_folder`. Raises :class:`NormswapError` as
    :func:`normswap.checkpoint.write` does, and for ``max_shard_size`` or ``resume`` with a single file.
    """
    if read is not None and read.stored is not None:
        return _deliver_distributed(
            output, state, recipes, read, read.stored, before, after, force, max_shard_size, resume
        )
    if together():
        raise NormswapError(f"{output}: several processes write only a distributed checkpoint that was one; start one")
    files = () if read is None else read.files
    origin = Origin.of(read) if untouched else Origin(files)

    def text(digest: str) -> str:
        return json.dumps([*recipes[:-1], _signed(recipes[-1], read, digest)], indent=1)

    def metadata(digest: str) -> dict[str, str]:
        kept = {} if read is None else {name: value for name, value in read.metadata.items() if name != "format"}
        return {**kept, RECIPE: text(digest), VERSION: __version__}

    notes: list[str] = []
    if read is not None and read.left_out and (is_folder(output) or output.suffix == ".safetensors"):
        notes.append(f"not in {output}: {first(read.left_out)}, for .safetensors holds tensors alone; .pt keeps them")
    if is_folder(output):
        beside = None if read is None else read.folder
        tensors = state if isinstance(state, LazyTensors) else {k: v for k, v in state.items() if isinstance(v, Tensor)}
        paths = write_folder(
            output, tensors, metadata=metadata, max_shard_size=max_shard_size, inputs=files, beside=beside,
            origin=origin, progress=progress, resume=resume, note=notes.append,
        )  # fmt: skip
        return paths, notes
    for given, what in ((max_shard_size is not None, "a size of shards"), (resume, "to resume")):
        if given:
            raise NormswapError(f"{output} is one file: {what} needs a folder as output, such as {output.stem}/")
    notes += [f"removed {path}, left by an interrupted run" for path in clear(output.resolve())]
    if output.suffix == ".safetensors":
        if read is not None and read.whole is not None:
            state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        write_file(output, state, force=force, metadata=metadata, inputs=files, origin=origin, progress=progress)
        return [output], notes
    whole = None
    if read is not None and read.key is not None:
        whole, more = with_state(read.whole, read.key, state, before, after)
        notes += more
    recipe = _Recipe(recipe_path(output), force or _orphan(output))
    try:
        write_file(
            output, state, force=force, inputs=files, whole=whole, origin=origin, progress=progress,
            beside=lambda digest, file: recipe.write(text(digest), file),
        )  # fmt: skip
    except BaseException:
        recipe.undo(output)
        raise
    return [output, recipe.path], notes


class _Recipe:
    """The file beside a checkpoint, written just before that is put in place."""

    def __init__(self, path: Path, force: bool) -> None:
        check_output(path, force=force)
        self.path, self.force, self.written = path, force, False
        self.old = path.read_bytes() if path.exists() else None
        self.checkpoint: os.stat_result

    def write(self, text: str, checkpoint: Path) -> None:
        self.checkpoint = checkpoint.stat()
        with whole_file(self.path, force=self.force) as file:
            file.write_text(text, encoding="utf-8")
            self.written = True

    def undo(self, output: Path) -> None:
        """Unless the interrupt came when the checkpoint was already in place."""
        if not self.written or (output.exists() and os.path.samestat(output.stat(), self.checkpoint)):
            return
        if self.old is None:
            self.path.unlink(missing_ok=True)
            return
        with whole_file(self.path, force=True) as file:
            file.write_bytes(self.old)


def _orphan(output: Path) -> bool:
    """Whether a recipe of ours is there and its checkpoint is not: a run was killed just when it put both in place."""
    if os.path.lexists(output):
        return False
    try:
        recipes = json.loads(recipe_path(output).read_bytes())
        return isinstance(recipes, list) and {"steps", "source"} <= recipes[-1].keys()
    except (OSError, ValueError, RecursionError, IndexError, AttributeError):
        return False


def _deliver_distributed(
    output: Path,
    state: Mapping[str, Any],
    recipes: Sequence[Recipe],
    read: Checkpoint,
    stored: Stored,
    before: Parameters,
    after: Parameters,
    force: bool,
    max_shard_size: int | None,
    resume: bool,
) -> tuple[list[Path], list[str]]:
    """What came from a distributed checkpoint: as a folder it stays one."""
    if max_shard_size is not None:
        raise NormswapError(f"{output}: the files of a distributed checkpoint stay as they are; leave --max-shard-size")
    if resume:
        raise NormswapError(f"{output}: a distributed checkpoint cannot be resumed; leave --resume")
    if together() and not is_folder(output):
        raise NormswapError(f"{output}: several processes write only a folder of a distributed checkpoint; start one")

    def text() -> str:
        return json.dumps([*recipes[:-1], _signed(recipes[-1], read, _digest(read.files))], indent=1)

    if output.suffix == ".safetensors" and not is_folder(output):
        tensors = state if isinstance(state, LazyTensors) else {k: v for k, v in state.items() if isinstance(v, Tensor)}
        write(output, tensors, force=force, metadata={RECIPE: text(), VERSION: __version__}, inputs=read.files)
        lost = f"not in {output}: {first(read.left_out)}, for .safetensors holds tensors alone"
        return [output], [lost] if read.left_out else []
    nested, notes = with_state(stored.nested, read.key, _leaves(state, read, stored), before, after)
    if is_folder(output):
        check_folder(output, read.files)
        write_distributed(output, stored, nested, {RECIPE_FILE: text})
        return [output], notes
    beside = recipe_path(output)
    check_output(beside, force=force)
    write(output, state, force=force, inputs=read.files, whole=opened(stored, nested))
    with whole_file(beside, force=force) as file:
        file.write_text(text(), encoding="utf-8")
    return [output, beside], notes


def _leaves(state: Mapping[str, Any], read: Checkpoint, stored: Stored) -> dict[str, Any]:
    """A new state dict of new tensors, and of the leaves of the old one for what stays."""
    old: Any = stored.nested
    for part in _parts(stored.nested, read.key):
        old = old[part]
    places = getattr(state, "places", state)
    found = {name: old[name] if isinstance(value, Path) else value for name, value in places.items()}
    return {**found, **{name: value for name, value in old.items() if not isinstance(value, Tensor)}}


def _digest(paths: Sequence[Path]) -> str:
    """Of the bytes of all files in turn, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(2**22):
                digest.update(chunk)
    return digest.hexdigest()


def _signed(recipe: Recipe, read: Checkpoint | None, digest: str) -> Recipe:
    if read is None:
        return recipe
    key = {} if read.key is None else {"key": read.key}
    return {**recipe, "source": {"file": read.path.name, "sha256": digest, **key}}


def as_in_file(read: Checkpoint, tensors: Mapping[str, Any], versions: Mapping[str, Any]) -> Mapping[str, Any]:
    """A new state dict for a file of torch's: entries that are no tensors where they were, versions beside it."""
    if read.whole is None:
        return tensors
    old = read.whole
    for part in _parts(read.whole, read.key):
        old = old[part]
    state: Any = OrderedDict(tensors)
    state.update({name: value for name, value in old.items() if not isinstance(value, Tensor)})
    if versions:
        state._metadata = OrderedDict(versions)
    return state  # type: ignore[no-any-return]


def _parts(whole: Any, key: str | None) -> list[str]:
    """The dotted ``key`` as names, each the longest that is there: a name may have dots itself."""
    parts, left = [], [] if key is None else key.split(".")
    while left:
        size = next((n for n in range(len(left), 0, -1) if ".".join(left[:n]) in whole), len(left))
        parts.append(".".join(left[:size]))
        whole, left = whole[parts[-1]], left[size:]
    return parts
