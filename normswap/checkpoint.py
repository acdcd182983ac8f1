"""Checkpoints: read without running code, loaded with a count of what does not fit, written whole or not at all.

Reads ``.pt`` and ``.pth`` (zip and legacy, always with ``weights_only=True``) and ``.safetensors``; the first bytes
tell the format, not the name. A state dict may be nested in a training checkpoint, and wrappers (data parallel,
``torch.compile``, Lightning) may have put prefixes before its keys. Neither format detects a flipped bit in the values.
"""

from __future__ import annotations

import copy
import io
import os
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normswap.errors import NormswapError
from normswap.files import whole_file

NESTED = ("state_dict", "model_state_dict", "model", "module", "net", "network", "params", "weights")
"""Keys under which training scripts keep the state dict, in the order they are tried."""

PREFIXES = ("module.", "model.")
"""Prefixes of wrappers, alone or one after another. A model may also have a submodule of that name."""

MARKERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of a key that torch's wrappers put in, anywhere in it. No model has them by itself."""

SUFFIXES = (".pt", ".pth", ".safetensors")
_SHOWN = 5


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file, on the CPU, under their names in the file."""

    tensors: dict[str, Tensor] = field(repr=False)
    path: Path
    format: str
    """``torch`` (zip), ``torch-legacy`` or ``safetensors``."""
    key: str | None = None
    """Where the state dict was nested, parts joined by dots; ``None`` where it was the whole file."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Of a ``.safetensors`` file."""
    left_out: tuple[str, ...] = ()
    """What else the file holds: optimizer state, epoch, extra state that is no tensor."""
    versions: dict[str, Any] = field(default_factory=dict, repr=False)
    """By module name, what torch keeps beside a state dict to load older ones; empty where the file has none."""


def read(path: str | os.PathLike[str], *, key: str | None = None) -> Checkpoint:
    """Read a checkpoint to the CPU. No code in it is run.

    ``key`` names the state dict to take where the file nests several (``generator``, ``model.encoder``); otherwise the
    file itself, then the names in :data:`NESTED`, then the only entry that holds tensors.

    Raises :class:`NormswapError` for a path that is no file, another format, a damaged file, one that needs code to be
    read (naming the types that were blocked), and one without tensors or with several state dicts of unknown name.
    """
    path = Path(path)
    head = _head(path)
    if head.startswith(b"PK"):
        return _read_torch(path, "torch", key)
    if _is_safetensors(head) or path.suffix == ".safetensors":
        return _read_safetensors(path, head, key)
    if head.startswith(b"\x80"):
        return _read_torch(path, "torch-legacy", key)
    raise NormswapError(f"{path} is no checkpoint of PyTorch or safetensors{_looks_like(head)}")


def _head(path: Path) -> bytes:
    if path.is_dir():
        raise NormswapError(f"{path} is a folder; name a .pt, .pth or .safetensors file in it")
    if not path.exists():
        raise NormswapError(f"{path} does not exist")
    if not path.is_file():
        raise NormswapError(f"{path} is not a regular file")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise NormswapError(f"{path} cannot be read: {error.strerror or error}") from error
    if not head:
        raise NormswapError(f"{path} is empty (0 bytes); write or download it again")
    return head


def _is_safetensors(head: bytes) -> bool:
    """Eight bytes of length, then JSON."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32


def _looks_like(head: bytes) -> str:
    if head.startswith(b"version https://git-lfs"):
        return "; it is a Git LFS pointer to the file: run git lfs pull"
    if head.lstrip()[:5].lower() in (b"<html", b"<!doc"):
        return "; it is a web page, as a failed download leaves it: download it again"
    if head.startswith(b"\x89HDF"):
        return "; it is an HDF5 file (Keras)"
    if head.startswith(b"GGUF"):
        return "; it is a GGUF file"
    return ""


def _read_safetensors(path: Path, head: bytes, key: str | None) -> Checkpoint:
    if key is not None:
        raise NormswapError(f"{path}: a safetensors file nests nothing, so there is no {key!r} in it")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
            metadata = dict(file.metadata() or {})
    except Exception as error:
        like = _looks_like(head)
        raise NormswapError(f"{path} is damaged or no safetensors file{like or f': {_line(error)}'}") from error
    if not tensors:
        raise NormswapError(f"{path} holds no tensors")
    return Checkpoint(tensors, path, "safetensors", metadata=metadata)


def _read_torch(path: Path, kind: str, key: str | None) -> Checkpoint:
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise NormswapError(f"{path} {_unreadable(path, error)}") from error
    found, state = _state_dict(path, loaded, key)
    tensors = {str(name): value.detach() for name, value in state.items() if isinstance(value, Tensor)}
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if found is not None:
        others += [str(name) for name in loaded if str(name) != found.split(".")[0]]
    versions = dict(getattr(state, "_metadata", None) or {})
    return Checkpoint(tensors, path, kind, found, left_out=tuple(others), versions=versions)


def _unreadable(path: Path, error: Exception) -> str:
    if (blocked := _blocked(path, error)) != []:
        return (
            f"holds more than tensors and was not read, because that would run code: {_first(blocked)}. "
            "If you trust it, load it once with torch.load(..., weights_only=False) and save model.state_dict() alone; "
            "or allow these types with torch.serialization.add_safe_globals"
        )
    if "constants.pkl" in {name.rpartition("/")[2] for name in _archived(path)}:
        return "is a TorchScript archive; save its tensors with torch.save(torch.jit.load(path).state_dict(), ...)"
    return f"is damaged or no PyTorch checkpoint: {_line(error)}"


def _blocked(path: Path, error: Exception) -> list[str]:
    """Dotted names of the types in the file that ``weights_only`` does not allow."""
    found = re.findall(r"GLOBAL ([\w.]+)", str(error))
    if found:
        try:
            found += torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception:  # A legacy file, or opcodes it does not know: the first name is all there is.
            return found[:1]
    return list(dict.fromkeys(found))


def _archived(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return []


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f", ... ({len(names)} in all)" if len(names) > _SHOWN else "")


def _state_dict(path: Path, loaded: Any, key: str | None) -> tuple[str | None, Mapping[Any, Any]]:
    """The dotted key of the state dict in what a file holds (``None`` for all of it), and the state dict."""
    if not isinstance(loaded, Mapping):
        raise NormswapError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    nested = dict(_nested(loaded))
    if key is not None:
        if key not in nested:
            raise NormswapError(f"{path} has no state dict {key!r}; it has: {_first(list(nested)) or 'none'}")
        return key, nested[key]
    for name in NESTED:
        for found in (name, *(f"{name}.{inner}" for inner in NESTED)):
            if found in nested:
                return found, nested[found]
    if _holds_tensors(loaded):
        return None, loaded
    if len(nested) == 1:
        return next(iter(nested.items()))
    if nested:
        raise NormswapError(
            f"{path} holds several state dicts: {_first(list(nested))}; name one with read(path, key=...)"
        )
    raise NormswapError(f"{path} holds no state dict; it has: {_first([str(name) for name in loaded]) or 'nothing'}")


def _holds_tensors(value: object) -> bool:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return False
    return any(isinstance(entry, Tensor) for entry in value.values())


def _nested(loaded: Mapping[Any, Any], depth: int = 3, prefix: str = "") -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Mappings from names to tensors, the outermost only; not the state of an optimizer, which is keyed by number."""
    if not all(isinstance(name, str) for name in loaded):
        return
    for name, value in loaded.items():
        if _holds_tensors(value):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping) and depth > 1:
            yield from _nested(value, depth - 1, f"{prefix}{name}.")


# ---- loading


def load(model: nn.Module, checkpoint: Checkpoint, *, partial: bool = False) -> list[str]:
    """Load a checkpoint's tensors into ``model``, in place, and return notes on what was done beyond that.

    Keys may carry or lack :data:`PREFIXES` and :data:`MARKERS`; values are cast to the model's dtypes. A missing
    ``num_batches_tracked`` (files older than torch 0.4.1) and a missing name of a tied parameter are noted and left.
    Where the names differ, the model's own loading hooks, which know older names, decide.

    Raises :class:`NormswapError`, with nothing loaded, when keys or shapes do not fit, with counts and the first names;
    ``partial=True`` loads those that fit instead, and raises when none does. Also for a model on the meta device.
    """
    wanted = model.state_dict(keep_vars=True)
    if meta := [name for name, value in wanted.items() if isinstance(value, Tensor) and value.is_meta]:
        raise NormswapError(
            f"{type(model).__name__} has no memory for {_first(meta)} (meta device): "
            "call model.to_empty(device='cpu') first"
        )
    fit = _fit(checkpoint.tensors, wanted)
    state = OrderedDict((fit.names[name], value) for name, value in checkpoint.tensors.items())
    notes = [*fit.notes, *_supplied(state, wanted)]
    if checkpoint.left_out:
        notes.append(f"the file also holds {_first(checkpoint.left_out)}, which was not used")
    missing = [name for name, value in wanted.items() if name not in state and isinstance(value, Tensor)]
    unexpected = [name for name in state if name not in wanted]
    misshapen = [name for name, value in wanted.items() if name in state and not _fits(state[name], value)]
    versions = _versions(checkpoint, fit, model)
    problems = _problems(missing, unexpected, misshapen, state, wanted)
    if problems and (hooked := _by_hooks(model, state, versions)) is not None:
        versions = hooked
        notes.append("the model's own loading hooks translated older names")
    elif problems:
        if not partial:
            raise NormswapError(
                f"{checkpoint.path} does not fit {type(model).__name__}: {'; '.join(problems)}. "
                "Build the model as it was saved, or load what fits with partial=True (--partial)"
            )
        for name in (*unexpected, *misshapen):
            del state[name]
        if not any(name in state for name in fit.names.values()):
            raise NormswapError(
                f"{checkpoint.path} has no tensor that fits {type(model).__name__}: {'; '.join(problems)}"
            )
        notes += [f"partly loaded, {problem}" for problem in problems]
    notes += _casts(state, wanted)
    _load(model, state, versions)
    return notes


def _fits(value: Tensor, own: Any) -> bool:
    return not isinstance(own, Tensor) or is_lazy(own) or value.shape == own.shape


def _problems(
    missing: list[str],
    unexpected: list[str],
    misshapen: list[str],
    state: Mapping[str, Tensor],
    wanted: Mapping[str, Any],
) -> list[str]:
    shapes = [f"{name} ({tuple(state[name].shape)}, model {tuple(wanted[name].shape)})" for name in misshapen]
    named = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    return [f"{len(names)} {what}: {_first(names)}" for what, names in named if names]


def _canonical(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in MARKERS)


@dataclass(frozen=True)
class _Fit:
    """For each name in the file the model's, where there is one, and the prefixes dropped and added on the way."""

    names: dict[str, str]
    drop: str = ""
    add: str = ""
    notes: tuple[str, ...] = ()


def _fit(tensors: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> _Fit:
    """The renaming by the fewest prefixes that matches the most names."""
    ours = {_canonical(name): name for name in wanted}
    theirs = {name: _canonical(name) for name in tensors}
    best, most = _Fit({name: name for name in tensors}), sum(name in wanted for name in tensors)
    pairs = [(drop, add) for drop in _prefixes(theirs.values()) for add in _prefixes(ours)]
    for drop, add in sorted(pairs, key=lambda pair: (len(pair[0]) + len(pair[1]), pair)):
        names = {}
        for name, plain in theirs.items():
            bare = plain.removeprefix(drop)
            names[name] = ours.get(add + bare) or ours.get(bare) or (bare if drop else name)
        count = sum(name in wanted for name in names.values())
        if count > most and len(set(names.values())) == len(names):
            steps = [f"dropped the prefix {drop!r}"] if drop else []
            steps += [f"added the prefix {add!r}"] if add else []
            text = " and ".join(steps) or "left out the marks of wrappers"
            best, most = _Fit(names, drop, add, (f"{text} ({count} of {len(names)} keys match)",)), count
    return best


def _prefixes(names: Iterable[str]) -> set[str]:
    """Every run of :data:`PREFIXES` that some name begins with, and the empty one."""
    found = {""}
    for name in names:
        run = ""
        while (step := next((prefix for prefix in PREFIXES if name.startswith(run + prefix)), None)) is not None:
            run += step
            found.add(run)
    return found


def _supplied(state: dict[str, Tensor], wanted: Mapping[str, Any]) -> Iterator[str]:
    """Give ``state`` what it may lack, from the model or from itself, and say so."""
    counters = [name for name in wanted if name not in state and name.endswith("num_batches_tracked")]
    state.update({name: wanted[name].detach() for name in counters})
    if counters:
        yield f"{len(counters)} num_batches_tracked are not in the file and stay as they are"
    known = {id(wanted[name]): name for name in state if isinstance(wanted.get(name), Tensor)}
    for name, value in wanted.items():
        if name not in state and id(value) in known:
            state[name] = state[known[id(value)]]
            yield f"{name} is not in the file; it is tied to {known[id(value)]}"
    extra = [name for name, value in wanted.items() if name not in state and not isinstance(value, Tensor)]
    if extra:
        yield f"extra state is not in the file and stays as it is: {_first(extra)}"


def _casts(state: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> list[str]:
    """A note for each pair of dtypes, in the file and in the model, that differ."""
    counts: dict[tuple[torch.dtype, torch.dtype], int] = {}
    for name, value in state.items():
        own = wanted.get(name)
        if isinstance(own, Tensor) and own.dtype != value.dtype:
            pair = value.dtype, own.dtype
            counts[pair] = counts.get(pair, 0) + 1
    return [f"{count} tensors cast from {a} in the file to the model's {b}" for (a, b), count in counts.items()]


def _versions(checkpoint: Checkpoint, fit: _Fit, model: nn.Module) -> dict[str, Any]:
    """torch's version of each module by its name in the model; the model's own where the file has none."""
    if not checkpoint.versions:
        return dict(getattr(model.state_dict(), "_metadata", {}))
    moved = {}
    for name, version in checkpoint.versions.items():  # A wrapper's own entry comes before that of the model in it.
        moved[(fit.add + _canonical(f"{name}.").removeprefix(fit.drop)).rstrip(".")] = version
    return moved


def _load(model: nn.Module, state: Mapping[str, Tensor], versions: Mapping[str, Any], *, strict: bool = False) -> None:
    values: Any = OrderedDict(state)
    values._metadata = OrderedDict(versions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.load_state_dict(values, strict=strict)


def _by_hooks(model: nn.Module, state: Mapping[str, Tensor], versions: dict[str, Any]) -> dict[str, Any] | None:
    """The versions with which torch's strict loading takes ``state``, tried on a twin without memory; or ``None``."""
    for attempt in (versions, {}):
        try:
            _load(_twin(model), state, attempt, strict=True)
        except Exception:
            continue
        return attempt
    return None


def _twin(model: nn.Module) -> nn.Module:
    """A copy with parameters and buffers on the meta device."""
    memo: dict[int, Any] = {}
    for own in model.parameters():
        if not is_lazy(own):
            memo[id(own)] = nn.Parameter(torch.empty_like(own, device="meta"), requires_grad=own.requires_grad)
    for buffer in model.buffers():
        if not is_lazy(buffer):
            memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


# ---- writing


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor] | nn.Module,
    *,
    force: bool = False,
    metadata: Mapping[str, str] | None = None,
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> None:
    """Write a state dict (or a model's) to ``path``, whole or not at all; dtypes are kept.

    The suffix chooses the format: ``.pt`` and ``.pth`` for a plain state dict by ``torch.save``, or ``.safetensors``,
    which alone has a place for ``metadata``. There tensors that share memory are each written in full, and memory
    formats (channels last) become contiguous; both come back on loading, which copies into the model's own tensors.

    Raises :class:`NormswapError` for another suffix, an existing file without ``force``, one of ``inputs``, a folder,
    tensors without memory (meta device), ``metadata`` or entries that are no tensors where the format cannot take them,
    and a disk that is full; nothing is left behind then.
    """
    path = Path(path)
    state: Mapping[str, Any] = tensors.state_dict() if isinstance(tensors, nn.Module) else tensors
    if path.suffix not in SUFFIXES:
        raise NormswapError(f"{path}: the name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if empty := [name for name, value in state.items() if isinstance(value, Tensor) and value.is_meta]:
        raise NormswapError(f"{path}: {_first(empty)} have no values to write (meta device); load the weights first")
    if path.suffix == ".safetensors":
        tensors, metadata = _separate(path, state), _strings(path, metadata)
        with whole_file(path, force=force, inputs=inputs) as file:
            file.touch()
            mode = file.stat().st_mode
            try:
                save_file(tensors, file, metadata=metadata)
                file.chmod(mode)  # safetensors writes files that only their owner may read.
            except (SafetensorError, RuntimeError, ValueError) as error:
                raise NormswapError(f"cannot write {path}: {_line(error)}. No partial file was left") from error
        return
    if metadata:
        raise NormswapError(f"{path}: a {path.suffix} file has no place for metadata; write .safetensors")
    with whole_file(path, force=force, inputs=inputs) as file, _Sink(file) as sink:
        try:
            torch.save(state if isinstance(state, dict) else dict(state), sink)
        except RuntimeError as error:  # torch's zip writer hides the error of the operating system.
            if sink.error is not None:
                raise sink.error from error
            raise NormswapError(f"cannot write {path}: {_line(error)}. No partial file was left") from error


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


def _strings(path: Path, metadata: Mapping[str, str] | None) -> dict[str, str]:
    given = {"format": "pt", **(metadata or {})}
    if wrong := [name for name, value in given.items() if not isinstance(name, str) or not isinstance(value, str)]:
        raise NormswapError(f"{path}: metadata maps text to text; {_first([str(name) for name in wrong])} does not")
    return given


def _separate(path: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors, contiguous, no two overlapping in memory."""
    if others := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise NormswapError(f"{path}: {_first(others)} are no tensors, which .safetensors cannot hold; write .pt")
    if sparse := [name for name, value in state.items() if value.layout != torch.strided]:
        raise NormswapError(f"{path}: {_first(sparse)} are sparse, which .safetensors cannot hold; write .pt")
    dense = {name: value.detach().contiguous() for name, value in state.items()}
    end: dict[torch.device, int] = {}
    for name in sorted(dense, key=lambda name: dense[name].data_ptr()):
        value = dense[name]
        start, stop = value.data_ptr(), value.data_ptr() + value.numel() * value.element_size()
        if value.numel() and start < end.get(value.device, 0):
            dense[name] = value.clone()
        end[value.device] = max(stop, end.get(value.device, 0))
    return dense
