"""Checkpoints, written whole or not at all: one file, or a folder of shards with their index."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normswap.checkpoints.lazy import LazyTensors
from normswap.checkpoints.places import INDEX, WEIGHTS
from normswap.checkpoints.spans import Origin, mapped_tensors, storages_of
from normswap.checkpoints.streaming import BLANK, Metadata, sizes_of, write_tensors
from normswap.checkpoints.torchfile import write_archive
from normswap.checkpoints.transfer import Progress, silent
from normswap.checkpoints.unfinished import plan_of, unfinished
from normswap.checkpoints.words import first, line
from normswap.errors import NormswapError
from normswap.files import check_output, is_directory, whole_file
from normswap.graph.sharded import is_spread

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
"""Of the files that can be written."""

NAME = "model.safetensors"
LARGEST_COPY = 2**26
"""Bytes of the files that are copied beside the weights of a folder: configurations, tokenizers."""


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether an output names a folder: it ends in a slash, is one, or has no suffix."""
    return str(path).endswith(("/", os.sep)) or is_directory(Path(path)) or not Path(path).suffix


def parse_size(text: str) -> int:
    """Bytes in ``"5GB"``, ``"200MB"`` or ``"1GiB"``; raises :class:`NormswapError` for any other text."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    size = 0
    if found is not None:
        base = 1024 if found[3] else 1000
        size = int(float(found[1]) * base ** " kmgt".index(found[2].lower() or " "))
    if size < 1:
        raise NormswapError(f"size {text!r}: write a number and a unit, such as 5GB or 500MiB")
    return size


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor] | nn.Module,
    *,
    force: bool = False,
    metadata: Mapping[str, str] | None = None,
    inputs: Iterable[str | os.PathLike[str]] = (),
    whole: Any = None,
) -> None:
    """Write a state dict (or a model's) to ``path``, whole or not at all; dtypes are kept.

    The suffix chooses the format: ``.pt``, ``.pth``, ``.bin`` and ``.ckpt`` for ``torch.save``, of the plain state dict
    or of ``whole`` that holds it; or ``.safetensors``, which alone has a place for ``metadata``. There tensors that
    share memory are each written in full, and memory formats (channels last) become contiguous; both come back on
    loading, which copies into the model's own tensors.

    Raises :class:`NormswapError` for another suffix, an existing file without ``force``, one of ``inputs``, a folder,
    tensors without memory (meta device), ``metadata`` or entries that are no tensors where the format cannot take them,
    and a disk that is full; nothing is left behind then.
    """
    path = Path(path)
    state: Mapping[str, Any] = tensors.state_dict() if isinstance(tensors, nn.Module) else tensors
    write_file(path, state, force=force, metadata=metadata, inputs=inputs, whole=whole)


def write_file(
    path: Path,
    state: Mapping[str, Any],
    *,
    force: bool = False,
    metadata: Mapping[str, str] | Metadata | None = None,
    inputs: Iterable[str | os.PathLike[str]] = (),
    whole: Any = None,
    origin: Origin | None = None,
    progress: Progress = silent,
    beside: Callable[[str, Path], None] = lambda digest, file: None,
) -> None:
    """:func:`write`, with what is known of the files that ``state`` comes from.

    ``metadata`` may be a function of their digest; ``beside`` is called with it, and with the file,
    just before that is put in place.
    """
    origin = Origin() if origin is None else origin
    if path.suffix not in SUFFIXES:
        raise NormswapError(f"{path}: the name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if path.suffix == ".safetensors":
        check_values(path, state)
        texts = _late(path, metadata)
        with whole_file(path, force=force, inputs=inputs, need=sum(sizes_of(state, path).values())) as file:
            beside(write_tensors([file], [list(state)], state, texts, origin, progress=progress), file)
        return
    if metadata:
        raise NormswapError(f"{path}: a {path.suffix} file has no place for metadata; write .safetensors")
    plain = state if isinstance(state, dict) else dict(state)
    if isinstance(state, LazyTensors) and state.whole_in_files:
        plain, regions = mapped_tensors(state)
        origin = Origin(origin.files, [*origin.regions, *regions])
    _no_meta(path, plain)
    value = plain if whole is None else whole
    need = sum(storage.nbytes() for storage in storages_of(value))
    with whole_file(path, force=force, inputs=inputs, need=need) as file:
        try:
            beside(write_archive(file, value, origin, progress=progress), file)
        except RuntimeError as error:
            raise NormswapError(f"cannot write {path}: {line(error)}. No partial file was left") from error


def write_folder(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | Metadata | None = None,
    max_shard_size: int | None = None,
    inputs: Iterable[Path] = (),
    beside: Path | None = None,
    origin: Origin | None = None,
    progress: Progress = silent,
    resume: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> list[Path]:
    """Write a new folder in the Hugging Face layout, whole or not at all, and return the paths of its weights.

    It holds ``model.safetensors``, or shards of at most ``max_shard_size`` bytes (a larger tensor is alone in one) and
    their index, and copies of the small files of the folder ``beside``. With ``resume`` the shards that an interrupted
    run completed are taken over, and an interrupt leaves those that are complete. Raises :class:`NormswapError` like
    :func:`write`, for a folder that exists, and where there is something else to resume.
    """
    origin = Origin() if origin is None else origin
    check_folder(path, inputs)
    check_values(path, tensors)
    texts = _late(path, metadata)
    sizes = sizes_of(tensors, path)
    shards = _split(sizes, max_shard_size)
    stem, ending = NAME.split(".")
    names = [f"{stem}-{i:05}-of-{len(shards):05}.{ending}" for i in range(1, len(shards) + 1)]
    names = [NAME] if len(shards) == 1 else names
    plan = plan_of(tensors, dict(zip(names, shards, strict=True)), sizes, texts(BLANK), origin.files)
    with unfinished(path, plan, resume=resume, need=sum(sizes.values()), note=note) as work:
        kept = frozenset(index for index, name in enumerate(names) if name in work.complete)
        places = work.places(names)
        digest = write_tensors(
            places, shards, tensors, texts, origin,
            progress=progress, complete=lambda index: work.completed(names[index]), kept=kept,
        )  # fmt: skip
        if len(shards) > 1:
            where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            texts_kept = {key: value for key, value in texts(digest).items() if key != "format"}
            index = {"metadata": {"total_size": sum(sizes.values()), **texts_kept}, "weight_map": where}
            (work.folder / (NAME + INDEX)).write_text(json.dumps(index, indent=2), encoding="utf-8")
            names.append(NAME + INDEX)
        for file in [] if beside is None else _companions(beside):
            shutil.copyfile(file, work.folder / file.name)
    return [path / name for name in names]


def check_folder(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Raise :class:`NormswapError` where a folder cannot or must not be written."""
    if not is_directory(path):
        if os.path.lexists(path):
            raise NormswapError(f"{path} exists and is no folder; choose another output, or name a file")
        check_output(path, inputs=inputs)
        return
    try:
        empty = not any(path.iterdir())
    except OSError as error:
        raise NormswapError(f"{path} cannot be read: {error.strerror or error}") from error
    if not empty:
        raise NormswapError(f"{path} exists and is not empty; a folder of shards is only written as a new one")
    if not os.access(path.resolve().parent, os.W_OK | os.X_OK):
        raise NormswapError(f"{path}: the folder {path.resolve().parent} must not be written to; choose another output")


def _split(sizes: Mapping[str, int], limit: int | None) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if limit is not None and filled and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _companions(folder: Path) -> list[Path]:
    files = [file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")]
    weights = (*WEIGHTS, INDEX, ".h5", ".msgpack", ".onnx", ".onnx.data", ".gguf", ".pkl", ".normswap.json")
    return [f for f in files if not f.name.endswith(weights) and f.stat().st_size <= LARGEST_COPY]


def _late(path: Path, metadata: Mapping[str, str] | Metadata | None) -> Metadata:
    """As a function of the digest, with the format that every file names; raises for what is no text."""

    def texts(digest: str) -> dict[str, str]:
        given = metadata(digest) if callable(metadata) else metadata
        return {"format": "pt", **(given or {})}

    wrong = [name for name, value in texts(BLANK).items() if not isinstance(name, str) or not isinstance(value, str)]
    if wrong:
        raise NormswapError(f"{path}: metadata maps text to text; {first([str(name) for name in wrong])} does not")
    return texts


def _no_meta(path: Path, state: Mapping[str, Any]) -> None:
    if spread := [name for name, value in state.items() if is_spread(value)]:
        raise NormswapError(
            f"{path}: {first(spread)} are DTensors, of which this process has a part: save with "
            "torch.distributed.checkpoint, or gather them first (get_model_state_dict with full_state_dict=True)"
        )
    if empty := [name for name, value in state.items() if isinstance(value, Tensor) and value.is_meta]:
        raise NormswapError(f"{path}: {first(empty)} have no values to write (meta device); load the weights first")


def check_values(path: Path, state: Mapping[str, Any]) -> None:
    held = {name: value for name, value in getattr(state, "places", state).items() if not isinstance(value, Path)}
    _no_meta(path, held)
    if others := [name for name, value in held.items() if not isinstance(value, Tensor)]:
        raise NormswapError(f"{path}: {first(others)} are no tensors, which .safetensors cannot hold; write .pt")
    if sparse := [name for name, value in held.items() if value.layout != torch.strided or value.is_quantized]:
        raise NormswapError(
            f"{path}: {first(sparse)} are sparse or quantized, which .safetensors cannot hold; write .pt"
        )
