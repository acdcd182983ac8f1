"""Checkpoints, written whole or not at all: one file, or a folder of shards with their index."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normswap.checkpoints.lazy import replaced
from normswap.checkpoints.places import INDEX, WEIGHTS
from normswap.checkpoints.streaming import sizes_of, write_tensors
from normswap.checkpoints.words import first, line
from normswap.errors import NormswapError
from normswap.files import check_output, whole_file

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
"""Of the files that can be written."""

NAME = "model.safetensors"
LARGEST_COPY = 2**26
"""Bytes of the files that are copied beside the weights of a folder: configurations, tokenizers."""


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether an output names a folder: it ends in a slash, is one, or has no suffix."""
    return str(path).endswith(("/", os.sep)) or Path(path).is_dir() or not Path(path).suffix


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
    if path.suffix not in SUFFIXES:
        raise NormswapError(f"{path}: the name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if path.suffix == ".safetensors":
        _check_values(path, state)
        texts = _strings(path, metadata)
        with whole_file(path, force=force, inputs=inputs) as file:
            write_tensors(file, state, texts)
        return
    if metadata:
        raise NormswapError(f"{path}: a {path.suffix} file has no place for metadata; write .safetensors")
    plain = state if isinstance(state, dict) else dict(state)
    _no_meta(path, plain)
    with whole_file(path, force=force, inputs=inputs) as file, _Sink(file) as sink:
        try:
            torch.save(plain if whole is None else whole, sink)
        except RuntimeError as error:  # torch's zip writer hides the error of the operating system.
            if sink.error is not None:
                raise sink.error from error
            raise NormswapError(f"cannot write {path}: {line(error)}. No partial file was left") from error


class _Sink(io.BufferedWriter):
    """A file that remembers why a write failed."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "x"))
        self.error: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


def write_folder(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_size: int | None = None,
    inputs: Iterable[Path] = (),
    beside: Path | None = None,
) -> list[Path]:
    """Write a new folder in the Hugging Face layout, whole or not at all, and return the paths of its weights.

    It holds ``model.safetensors``, or shards of at most ``max_shard_size`` bytes (a larger tensor is alone in one) and
    their index, and copies of the small files of the folder ``beside``. Raises :class:`NormswapError` like
    :func:`write`, and for a folder that exists.
    """
    check_folder(path, inputs)
    _check_values(path, tensors)
    texts = _strings(path, metadata)
    sizes = sizes_of(tensors, path)
    shards = _split(sizes, max_shard_size)
    stem, ending = NAME.split(".")
    names = [f"{stem}-{i:05}-of-{len(shards):05}.{ending}" for i in range(1, len(shards) + 1)]
    names = [NAME] if len(shards) == 1 else names
    temporary: Path | None = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name[:200]}.", suffix=".tmp", dir=path.resolve().parent))
        for name, shard in zip(names, shards, strict=True):
            write_tensors(temporary / name, replaced(tensors, {key: key for key in shard}), texts)
        if len(shards) > 1:
            places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            kept = {key: value for key, value in texts.items() if key != "format"}
            index = {"metadata": {"total_size": sum(sizes.values()), **kept}, "weight_map": places}
            (temporary / (NAME + INDEX)).write_text(json.dumps(index, indent=2), encoding="utf-8")
            names.append(NAME + INDEX)
        for file in [] if beside is None else _companions(beside):
            shutil.copyfile(file, temporary / file.name)
        for file in temporary.iterdir():
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        temporary.chmod(0o777 & ~_umask())
        temporary.rename(path.resolve())
    except OSError as error:
        raise NormswapError(f"cannot write {path}: {error.strerror or error}. No partial folder was left") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return [path / name for name in names]


def check_folder(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Raise :class:`NormswapError` where a folder cannot or must not be written."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise NormswapError(f"{path} exists and is not empty; a folder of shards is only written as a new one")
    if not path.exists():
        check_output(path, inputs=inputs)


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _strings(path: Path, metadata: Mapping[str, str] | None) -> dict[str, str]:
    given = {"format": "pt", **(metadata or {})}
    if wrong := [name for name, value in given.items() if not isinstance(name, str) or not isinstance(value, str)]:
        raise NormswapError(f"{path}: metadata maps text to text; {first([str(name) for name in wrong])} does not")
    return given


def _no_meta(path: Path, state: Mapping[str, Any]) -> None:
    if empty := [name for name, value in state.items() if isinstance(value, Tensor) and value.is_meta]:
        raise NormswapError(f"{path}: {first(empty)} have no values to write (meta device); load the weights first")


def _check_values(path: Path, state: Mapping[str, Any]) -> None:
    held = {name: value for name, value in getattr(state, "places", state).items() if not isinstance(value, Path)}
    _no_meta(path, held)
    if others := [name for name, value in held.items() if not isinstance(value, Tensor)]:
        raise NormswapError(f"{path}: {first(others)} are no tensors, which .safetensors cannot hold; write .pt")
    if sparse := [name for name, value in held.items() if value.layout != torch.strided or value.is_quantized]:
        raise NormswapError(
            f"{path}: {first(sparse)} are sparse or quantized, which .safetensors cannot hold; write .pt"
        )
