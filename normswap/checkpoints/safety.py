"""What is looked at before a file is believed, and why a file is not read.

An archive of torch's holds every entry once and stored, not compressed, so the entries are together no larger than the
archive, and each storage is an entry of exactly its size. The header of a safetensors file names every tensor once,
and the tensors lie one behind the other to the end of the file. What differs is damaged, or was made to deceive.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normswap.checkpoints.words import first, line
from normswap.errors import NormswapError

LARGEST_HEADER = 100_000_000
"""Bytes, as in the safetensors library."""

SLACK = 2**26
"""Bytes that a tensor may take beyond the size of its file: one value can be stretched over any shape."""


def unreadable(path: Path, error: Exception) -> str:
    if (blocked := _blocked(path, error)) != []:
        return (
            f"holds more than tensors and was not read, because that would run code: {first(blocked)}. "
            "If you trust it, pass trust_pickle=True (--trust-pickle); or load it once with "
            "torch.load(..., weights_only=False) and save model.state_dict() alone"
        )
    return f"is damaged or no PyTorch checkpoint: {line(error)}"


def _blocked(path: Path, error: Exception) -> list[str]:
    """Dotted names of the types in the file that ``weights_only`` does not allow."""
    found = re.findall(r"GLOBAL ([\w.]+)", str(error))
    if found:
        try:
            found += torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception:  # A legacy file, or opcodes it does not know: the first name is all there is.
            return found[:1]
    return [name for name in dict.fromkeys(found) if name != "argparse.Namespace"]


def check_archive(path: Path) -> Counter[int]:
    """How many entries of a zip file have each size; raises :class:`NormswapError` for one that torch would not
    write."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:
        raise NormswapError(f"{path} is damaged or no PyTorch checkpoint: {line(error)}") from error
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise NormswapError(
            f"{path} is a TorchScript archive; save its tensors with torch.save(torch.jit.load(path).state_dict(), ...)"
        )
    twice = [name for name, count in Counter(entry.filename for entry in entries).items() if count > 1]
    packed = [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED or e.compress_size != e.file_size]
    if twice:
        raise NormswapError(f"{path} is damaged: its archive holds {first(twice)} twice")
    if packed:
        raise NormswapError(
            f"{path} was not read: {first(packed)} are compressed, which torch never does (a zip bomb?)"
        )
    if (claimed := sum(entry.file_size for entry in entries)) > path.stat().st_size:
        raise NormswapError(f"{path} was not read: its entries claim {claimed} bytes, more than the file has")
    return Counter(entry.file_size for entry in entries)


def check_storages(path: Path, loaded: object, sizes: Counter[int] | None) -> None:
    """Raise for tensors that are larger than what the file holds for them; ``sizes`` are those of its entries."""
    storages: dict[int, int] = {}
    limit = path.stat().st_size + SLACK
    for value in _tensors(loaded):
        if value.is_meta:
            raise NormswapError(f"{path} holds a tensor without values (meta device) of shape {tuple(value.shape)}")
        if value.layout != torch.strided:
            continue
        if value.numel() * value.element_size() > limit:
            raise NormswapError(f"{path} was not read: a tensor in it claims the shape {tuple(value.shape)}, too large")
        storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    if sizes is not None and (wrong := Counter(s for s in storages.values() if s) - sizes):
        raise NormswapError(f"{path} is damaged: no entry of its archive has the {next(iter(wrong))} bytes of a tensor")


def _tensors(value: object, depth: int = 12) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (Mapping, list, tuple, set)):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(entry, depth - 1)


def parse_json(text: bytes | str, where: str) -> Any:
    """JSON in which no name stands twice; raises :class:`NormswapError`."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = Counter(name for name, _ in pairs)
            raise NormswapError(f"{where} names {first([n for n, count in names.items() if count > 1])} twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise NormswapError(f"{where} is damaged: it is not JSON ({line(error)})") from error


def safetensors_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name of the dtype and shape by tensor, in the file's order; raises for a header that does not fit the file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if length > min(size - 8, LARGEST_HEADER):
            raise NormswapError(f"{path} is damaged: its header claims {length} bytes, the file has {size}")
        header = parse_json(file.read(length), f"the header of {path}")
    if not isinstance(header, dict):
        raise NormswapError(f"{path} is damaged: its header is no JSON object")
    spans: dict[str, tuple[int, int]] = {}
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        spans[name], found[name] = _span(path, name, entry)
    end = 0
    for name in sorted(spans, key=lambda name: spans[name]):
        begin, stop = spans[name]
        if begin != end:
            what = "overlaps another tensor" if begin < end else "does not follow the tensor before it"
            raise NormswapError(f"{path} is damaged: {name} {what}")
        end = stop
    if end != size - 8 - length:
        raise NormswapError(f"{path} is truncated or damaged: its tensors take {end} bytes, not {size - 8 - length}")
    return {name: found[name] for name in sorted(found, key=lambda name: spans[name])}


def _span(path: Path, name: str, entry: Any) -> tuple[tuple[int, int], tuple[str, tuple[int, ...]]]:
    try:
        begin, stop = entry["data_offsets"]
        shape, dtype = tuple(entry["shape"]), entry["dtype"]
        whole = all(type(number) is int and number >= 0 for number in (begin, stop, *shape))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole or not isinstance(dtype, str) or begin > stop or math.prod(shape) > 8 * (stop - begin):
        raise NormswapError(f"{path} is damaged: what its header says of {name!r} makes no sense")
    return (begin, stop), (dtype, shape)


def check_statistics(names: Iterable[str], tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise :class:`NormswapError` that names the modules whose running statistics no training could have left."""
    negative, broken = [], []
    for name in names:
        owner, _, field = name.rpartition(".")
        if field not in ("running_mean", "running_var"):
            continue
        value = tensors[name]
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            broken.append(f"{owner or '(root)'} ({field})")
        elif field == "running_var" and bool((value < 0).any()):
            negative.append(owner or "(root)")
    if negative:
        raise NormswapError(f"{where}: negative running variance in {first(negative)}: the file is damaged")
    if broken:
        raise NormswapError(
            f"{where}: running statistics that are not finite in {first(broken)}: the training diverged or the file is "
            "damaged; take an earlier checkpoint"
        )
