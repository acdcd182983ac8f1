"""What an exported file says of its origin: versions, the weights it was made of, the recipes that led to them.

The entries stand in the ``metadata_props`` of an ``.onnx`` file, and as a JSON object in the extra file
``normswap.json`` of a ``.pt2`` archive. All are text:

- ``normswap.version``, ``normswap.torch``, ``normswap.onnxscript``: versions of what wrote the file
- ``normswap.opset``: the version of the ONNX operator set
- ``normswap.weights.sha256``: :func:`state_digest` of the exported model
- ``normswap.recipe``: a JSON list of recipes, oldest first, as in a checkpoint's metadata; absent where there are none

and the caller's own, under any name that does not begin with ``normswap.``.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normswap.errors import NormswapError
from normswap.version import __version__

PREFIX = "normswap."
VERSION = "normswap.version"
TORCH = "normswap.torch"
ONNXSCRIPT = "normswap.onnxscript"
OPSET = "normswap.opset"
WEIGHTS = "normswap.weights.sha256"
RECIPE = "normswap.recipe"

EXTRA_FILE = "normswap.json"
"""The extra file of a ``.pt2`` archive that holds the entries."""

LARGEST_EXTRA = 2**26
"""Bytes read of that file at most: a few kilobytes are usual, and an archive may claim any size."""

Recipe = Mapping[str, Any]


def state_digest(model: nn.Module | Mapping[str, Any]) -> str:
    """SHA-256 of a model's ``state_dict()`` or of a state dict, in hexadecimal.

    It is the same for the same names, dtypes, shapes and values. For each tensor, sorted by name, the line
    ``["name", "float32", [4, 3]]`` (JSON, ASCII, ending in a newline) counts and then the values, row by row, each as
    its bytes in memory. Order of registration, device, memory format and ``requires_grad`` do not matter; sparse and
    quantized tensors count as their dense values; entries that are no tensors, and buffers that are not persistent, do
    not count.

    Raises :class:`NormswapError` for a tensor without values (meta device, lazy modules).
    """
    digest = hashlib.sha256()
    state = model.state_dict() if isinstance(model, nn.Module) else model
    for name, value in sorted(state.items()):
        if not isinstance(value, Tensor):
            continue
        if value.is_meta or is_lazy(value):
            raise NormswapError(f"{name} has no values (meta device, or a lazy module); load the weights first")
        dtype = str(value.dtype).removeprefix("torch.")
        digest.update(f"{json.dumps([name, dtype, list(value.shape)])}\n".encode("ascii"))
        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Tensor) -> Any:
    dense = value.detach().cpu()
    if dense.is_quantized:
        dense = dense.dequantize()
    if dense.layout != torch.strided:
        dense = dense.to_dense()
    return dense.contiguous().reshape(-1).view(torch.uint8).numpy()


def origin(
    model: nn.Module, recipe: Recipe | Sequence[Recipe] | None, metadata: Mapping[str, str] | None
) -> dict[str, str]:
    """The entries for a file made of ``model``: those every format has, and the caller's own.

    Raises :class:`NormswapError` for a ``recipe`` that is none, and for ``metadata`` that does not map text to text
    or uses the names kept for normswap.
    """
    given = {} if metadata is None else metadata
    if not isinstance(given, Mapping):
        raise NormswapError(f"metadata is a {type(given).__name__}; it must be a mapping of text to text")
    for name, value in given.items():
        if not isinstance(name, str) or not isinstance(value, str) or not name:
            raise NormswapError(f"metadata maps text to text; {name!r}: {value!r} does not")
        if name.startswith(PREFIX):
            raise NormswapError(f"metadata {name!r}: names that begin with {PREFIX!r} are kept for normswap")
    entries = {VERSION: __version__, TORCH: str(torch.__version__), WEIGHTS: state_digest(model)}
    if recipes := _recipes(recipe):
        entries[RECIPE] = recipes
    return {**given, **entries}


def _recipes(recipe: object) -> str | None:
    if recipe is None:
        return None
    recipes = [recipe] if isinstance(recipe, Mapping) else recipe
    if not isinstance(recipes, Sequence) or not all(
        isinstance(entry, Mapping) and {"format", "steps"} <= entry.keys() for entry in recipes
    ):
        raise NormswapError("recipe is neither a plan's recipe (plan.recipe) nor a list of them")
    try:
        return json.dumps(list(recipes)) if recipes else None
    except (TypeError, ValueError) as error:
        raise NormswapError(f"the recipe cannot be written as JSON: {error}") from error


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of an ``.onnx`` or ``.pt2`` file, normswap's and any other; runs no code of the file.

    Weights in files beside an ``.onnx`` file are not read. Of a ``.pt2`` archive only what
    :func:`normswap.export` put in is found: empty for one that something else wrote.

    Raises :class:`NormswapError` for another suffix, a file that is not there or is damaged, and, for ``.onnx``, when
    ``onnx`` is missing.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2"):
        raise NormswapError(f"{path}: metadata is read from .onnx and .pt2 files")
    if not path.is_file():
        raise NormswapError(f"{path} does not exist or is not a file")
    return _of_onnx(path) if path.suffix == ".onnx" else _of_archive(path)


def _of_onnx(path: Path) -> dict[str, str]:
    try:
        import onnx
    except ImportError as error:
        raise NormswapError(f"reading {path} needs onnx ({error}): pip install normswap[onnx]") from error
    try:
        proto = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise NormswapError(f"{path} is damaged or no ONNX file ({type(error).__name__})") from error
    if not proto.ir_version:  # An empty file is a valid message of another kind.
        raise NormswapError(f"{path} is damaged or no ONNX file (it has no IR version)")
    return {entry.key: entry.value for entry in proto.metadata_props}


def extra_files(path: Path) -> dict[str, str]:
    """The other extra files of a ``.pt2`` archive: text by name.

    Raises :class:`NormswapError` for one that is damaged, too large or no text."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = {entry.filename.partition("/extra/")[2]: entry for entry in archive.infolist()}
            if any(entry.file_size > LARGEST_EXTRA for name, entry in found.items() if name):
                raise ValueError("an extra file is too large")
            names = {name: entry for name, entry in found.items() if name and name != EXTRA_FILE}
            return {name: archive.read(entry).decode() for name, entry in names.items()}
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise NormswapError(f"{path}: its extra files cannot be read: {error}") from error


def _of_archive(path: Path) -> dict[str, str]:
    try:
        with zipfile.ZipFile(path) as archive:
            found = [entry for entry in archive.infolist() if entry.filename.endswith(f"/extra/{EXTRA_FILE}")]
            if not found:
                return {}
            if len(found) > 1 or found[0].file_size > LARGEST_EXTRA:
                raise ValueError(f"{EXTRA_FILE} is there more than once, or too large")
            entries = json.loads(archive.read(found[0]))
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise NormswapError(f"{path} is damaged or no .pt2 archive: {error}") from error
    if not isinstance(entries, dict) or not all(isinstance(value, str) for value in entries.values()):
        raise NormswapError(f"{path} is damaged: its {EXTRA_FILE} is no JSON object of text")
    return entries
