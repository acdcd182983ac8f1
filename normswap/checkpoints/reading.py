"""Checkpoints, read without running code.

Reads ``.pt``, ``.pth``, ``.bin`` and ``.ckpt`` (zip and legacy, with ``weights_only=True``), ``.safetensors``, pickles
of arrays (``.pkl``), shards that an index names, folders in the Hugging Face layout and of
``torch.distributed.checkpoint``; the first bytes tell the format of a file, not its name.
Files are mapped into memory, except legacy ones. Neither format detects a flipped bit in the values.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import _TYPES as DTYPES
from torch import Tensor

from normswap.checkpoints.distributed import NAME as METADATA
from normswap.checkpoints.distributed import DistributedTensors, Stored, is_distributed, open_distributed
from normswap.checkpoints.formats import first_bytes, is_safetensors, looks_like
from normswap.checkpoints.lazy import LazyTensors, Shape
from normswap.checkpoints.nested import state_dict_in
from normswap.checkpoints.pickles import LEGACY, arrays
from normswap.checkpoints.places import INDEX, located, read_index
from normswap.checkpoints.safety import check_archive, check_storages, safetensors_header, unreadable
from normswap.checkpoints.words import first, line
from normswap.errors import NormswapError
from normswap.provenance import RECIPE

RECIPE_FILE = "normswap.json"
"""In a folder of a distributed checkpoint: the recipes, a JSON list, oldest first."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file or of shards, on the CPU, under their names there."""

    tensors: Mapping[str, Tensor] = field(repr=False)
    """Those of ``.safetensors`` files are read each time they are asked for."""
    path: Path
    format: str
    """``torch`` (zip), ``torch-legacy``, ``arrays``, ``safetensors`` or ``distributed``."""
    key: str | None = None
    """Where the state dict was nested, parts joined by dots; ``None`` where it was the whole file."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Of a ``.safetensors`` file, or of an index."""
    left_out: tuple[str, ...] = ()
    """What else the file holds: optimizer state, epoch, extra state that is no tensor."""
    versions: dict[str, Any] = field(default_factory=dict, repr=False)
    """By module name, what torch keeps beside a state dict to load older ones; empty where the file has none."""
    whole: Any = field(default=None, repr=False)
    """All that a file of torch's holds, with the state dict in it; ``None`` for other formats."""
    files: tuple[Path, ...] = ()
    """The files it was read from, an index first."""
    folder: Path | None = None
    """The folder that was named instead of a file, whose other files belong to the weights."""
    parts: tuple[Checkpoint, ...] = field(default=(), repr=False)
    """The shards, where an index names them."""
    stored: Stored | None = field(default=None, repr=False)
    """All of a distributed checkpoint."""


def read(path: str | os.PathLike[str], *, key: str | None = None, trust_pickle: bool = False) -> Checkpoint:
    """Read a checkpoint to the CPU. No code in it is run, unless ``trust_pickle``.

    ``path`` is a file, an index of shards, or a folder with one of these. ``key`` names the state dict to take where
    the file nests several (``generator``, ``model.encoder``); otherwise the file itself, then the names in
    :data:`NESTED`, then the only entry that holds tensors.

    Raises :class:`NormswapError` for a path that is no file, another format, a damaged file, one that needs code to be
    read (naming the types that were blocked), and one without tensors or with several state dicts of unknown name.
    """
    if is_distributed(Path(path)):
        return _read_distributed(Path(path), key)
    if Path(path).is_dir():
        return replace(read(located(Path(path)), key=key, trust_pickle=trust_pickle), folder=Path(path))
    path = Path(path)
    head = first_bytes(path)
    if path.name.endswith(INDEX):
        return _read_shards(path, key)
    if head.startswith(b"PK"):
        return _read_torch(path, "torch", key, trust_pickle)
    if is_safetensors(head) or path.suffix == ".safetensors":
        return _read_safetensors(path, head, key)
    if head.startswith(b"\x80") and not head.startswith(LEGACY):
        return _of_nested(path, "arrays", arrays(path, trust_pickle=trust_pickle), key)
    if head.startswith(b"\x80"):
        return _read_torch(path, "torch-legacy", key, trust_pickle)
    raise NormswapError(f"{path} is no checkpoint of PyTorch or safetensors{looks_like(head)}")


def _read_distributed(folder: Path, key: str | None) -> Checkpoint:
    stored = open_distributed(folder)
    found, state = state_dict_in(folder, stored.nested, key)
    tensors = DistributedTensors.of(stored, state)
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if found is not None:
        others += [str(name) for name in stored.nested if str(name) != found.split(".")[0]]
    recipe = folder / RECIPE_FILE
    metadata = {RECIPE: recipe.read_text(encoding="utf-8")} if recipe.is_file() else {}
    files = tuple(folder / name for name in (METADATA, *stored.files))
    return Checkpoint(
        tensors, folder, "distributed", found, metadata, tuple(others), files=files, folder=folder, stored=stored
    )


def _no_key(path: Path, key: str | None) -> None:
    if key is not None:
        raise NormswapError(f"{path}: a safetensors file nests nothing, so there is no {key!r} in it")


def _read_safetensors(path: Path, head: bytes, key: str | None) -> Checkpoint:
    _no_key(path, key)
    if like := looks_like(head):
        raise NormswapError(f"{path} is damaged or no safetensors file{like}")
    header = safetensors_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
    except Exception as error:
        raise NormswapError(f"{path} is damaged or no safetensors file: {line(error)}") from error
    if not header:
        raise NormswapError(f"{path} holds no tensors")
    shapes = {name: Shape(DTYPES.get(dtype), shape) for name, (dtype, shape) in header.items()}
    if unknown := [f"{name} ({header[name][0]})" for name, known in shapes.items() if known.dtype is None]:
        raise NormswapError(f"{path} holds values of a dtype that torch cannot read: {first(unknown)}")
    return Checkpoint(
        LazyTensors(dict.fromkeys(header, path), shapes), path, "safetensors", metadata=metadata, files=(path,)
    )


def _read_shards(path: Path, key: str | None) -> Checkpoint:
    _no_key(path, key)
    metadata, wanted = read_index(path)
    shards: dict[Path, list[str]] = {}
    for name, shard in wanted.items():
        shards.setdefault(shard, []).append(name)
    read_all = {shard: read(shard) for shard in shards}
    for shard, part in read_all.items():
        absent = [name for name in shards[shard] if name not in part.tensors]
        extra = [name for name in part.tensors if name not in shards[shard]]
        if absent or extra:
            what = f"{shard.name} does not hold {first(absent)}" if absent else f"it does not name {first(extra)}"
            raise NormswapError(f"{path} does not fit its shards: {what}{'' if absent else f' of {shard.name}'}")
    places: dict[str, Tensor | Path] = {}
    shapes: dict[str, Shape] = {}
    for name, shard in wanted.items():
        tensors = read_all[shard].tensors
        if isinstance(tensors, LazyTensors):
            places[name], shapes[name] = tensors.places[name], tensors.shapes[name]
        else:
            places[name] = tensors[name]
    versions = {name: value for part in read_all.values() for name, value in part.versions.items()}
    inner = {k: v for part in read_all.values() for k, v in part.metadata.items() if k != "format"}
    kind = next(iter(read_all.values())).format
    files = (path, *read_all)
    return Checkpoint(
        LazyTensors(places, shapes), path, kind, metadata={**inner, **metadata}, versions=versions, files=files,
        parts=tuple(read_all.values()),
    )  # fmt: skip


def _read_torch(path: Path, kind: str, key: str | None, trust_pickle: bool) -> Checkpoint:
    sizes = check_archive(path) if kind == "torch" else None
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=not trust_pickle, mmap=kind == "torch")
    except Exception as error:
        raise NormswapError(f"{path} {unreadable(path, error)}") from error
    check_storages(path, loaded, sizes)
    return _of_nested(path, kind, loaded, key)


def _of_nested(path: Path, kind: str, loaded: Any, key: str | None) -> Checkpoint:
    found, state = state_dict_in(path, loaded, key)
    tensors = {str(name): value.detach() for name, value in state.items() if isinstance(value, Tensor)}
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if found is not None:
        others += [str(name) for name in loaded if str(name) != found.split(".")[0]]
    versions = getattr(state, "_metadata", None)
    versions = dict(versions) if isinstance(versions, Mapping) else {}
    return Checkpoint(
        tensors, path, kind, found, left_out=tuple(others), versions=versions, whole=loaded, files=(path,)
    )
