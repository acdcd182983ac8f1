"""Checkpoints: read without running code, loaded with a count of what does not fit, written whole or not at all.

Reads ``.pt`` and ``.pth`` (zip and legacy; ``weights_only=True`` always) and ``.safetensors``. A state dict may be
nested in a training checkpoint, and its keys may carry the prefix of a wrapper."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from normswap.errors import NormswapError
from normswap.files import whole_file

NESTED = ("state_dict", "model_state_dict", "model", "module", "net", "network", "params", "weights")
"""Keys under which training scripts keep the state dict, in the order they are tried."""

PREFIXES = ("module.", "_orig_mod.", "model.")
"""Prefixes that wrappers put before every key, alone or one after another."""

_SHOWN = 5


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file under their names in the file."""

    tensors: dict[str, Tensor]
    path: Path
    format: str
    key: str | None = None
    """Where the state dict was nested; ``None`` where it was the whole file."""
    metadata: dict[str, str] = field(default_factory=dict)


def read(path: str | Path) -> Checkpoint:
    """Read a checkpoint to the CPU. No code in it is run.

    Raises :class:`NormswapError` for a path that is no file, another format, a damaged file, a file that needs code to
    be read (naming the blocked types), and one that holds no tensors."""
    path = Path(path)
    if path.is_dir():
        raise NormswapError(f"{path} is a folder; name a .pt, .pth or .safetensors file in it")
    if not path.exists():
        raise NormswapError(f"{path} does not exist")
    if path.stat().st_size == 0:
        raise NormswapError(f"{path} is empty (0 bytes)")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".pt", ".pth"):
        return _read_torch(path)
    raise NormswapError(f"{path}: cannot tell its format from {path.suffix!r}; it must be .pt, .pth or .safetensors")


def _read_safetensors(path: Path) -> Checkpoint:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise NormswapError(f"{path} is no readable .safetensors file: {_line(error)}") from error
    if not tensors:
        raise NormswapError(f"{path} holds no tensors")
    return Checkpoint(tensors, path, "safetensors", metadata=metadata)


def _read_torch(path: Path) -> Checkpoint:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise NormswapError(_blocked(path, error)) from error
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        zipfile.BadZipFile,
    ) as error:
        raise NormswapError(f"{path} is damaged or no PyTorch checkpoint: {_line(error)}") from error
    key, tensors = _state_dict(path, loaded)
    return Checkpoint(tensors, path, "torch", key)


def _blocked(path: Path, error: Exception) -> str:
    names = re.findall(r"(?:GLOBAL|global|class) ([\w.]+\.[\w.]+)", str(error))
    if not names:
        return f"{path} is damaged or no PyTorch checkpoint: {_line(error)}"
    return (
        f"{path} holds more than tensors ({', '.join(dict.fromkeys(names))}) and would run code when read. "
        "Save the state dict alone: torch.save(model.state_dict(), path)"
    )


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _state_dict(path: Path, loaded: Any) -> tuple[str | None, dict[str, Tensor]]:
    for key in (None, *NESTED):
        found = loaded if key is None else loaded.get(key) if isinstance(loaded, Mapping) else None
        if isinstance(found, Mapping):
            tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
            if tensors and (key is not None or not any(isinstance(loaded.get(k), Mapping) for k in NESTED)):
                return key, tensors
    held = ", ".join(map(str, list(loaded)[:_SHOWN])) if isinstance(loaded, Mapping) else type(loaded).__name__
    raise NormswapError(f"{path} holds no state dict; it has: {held}")


def load(model: nn.Module, checkpoint: Checkpoint, *, partial: bool = False) -> list[str]:
    """Load a checkpoint's tensors into ``model``, in place, and return notes on what was done beyond that.

    Keys may lack or carry one of :data:`PREFIXES`. Raises :class:`NormswapError`, with nothing loaded, when keys or
    shapes do not fit, with counts and the first names; ``partial=True`` loads those that fit instead."""
    wanted = model.state_dict()
    tensors, notes = _fit_prefix(checkpoint.tensors, wanted)
    counters = [name for name in wanted if name not in tensors and name.endswith("num_batches_tracked")]
    if counters:
        notes.append(f"{len(counters)} batch counters are not in the file and keep their value")
    missing = [name for name in wanted if name not in tensors and name not in counters]
    unexpected = [name for name in tensors if name not in wanted]
    misshapen = [
        f"{name} {tuple(tensors[name].shape)} for {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in tensors and isinstance(value, Tensor) and tensors[name].shape != value.shape
    ]
    problems = [
        f"{len(names)} {what}: {_first(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems and not partial:
        raise NormswapError(
            f"{checkpoint.path} does not fit the model: {'; '.join(problems)}. "
            "Build the model as it was saved, or load what fits with partial=True (--partial)"
        )
    notes += [f"partly loaded, {problem}" for problem in problems]
    bad = {entry.split(" ")[0] for entry in misshapen}
    fitting = {name: value for name, value in tensors.items() if name in wanted and name not in bad}
    if not fitting:
        raise NormswapError(f"{checkpoint.path} has no tensor that fits the model: {'; '.join(problems)}")
    model.load_state_dict(fitting, strict=False)
    return notes


def _fit_prefix(tensors: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under the names of the model, with a prefix dropped or added where more of them fit then."""
    best, note, most = dict(tensors), [], sum(name in wanted for name in tensors)
    prefix = ""
    while True:
        step = next((p for p in PREFIXES if all(name.startswith(prefix + p) for name in tensors)), None)
        if step is None:
            break
        prefix += step
        stripped = {name[len(prefix) :]: value for name, value in tensors.items()}
        if (fits := sum(name in wanted for name in stripped)) > most:
            best, note, most = stripped, [f"dropped the prefix {prefix!r} of all keys"], fits
    for added in PREFIXES:
        longer = {added + name: value for name, value in tensors.items()}
        if (fits := sum(name in wanted for name in longer)) > most:
            best, note, most = longer, [f"added the prefix {added!r} to all keys"], fits
    return best, note


def _first(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")


def write(
    path: str | Path,
    tensors: Mapping[str, Tensor] | nn.Module,
    *,
    force: bool = False,
    metadata: Mapping[str, str] | None = None,
    inputs: Iterable[str | Path] = (),
) -> None:
    """Write a state dict (or a model's) to ``path``, whole or not at all; dtypes are kept.

    The suffix chooses the format: ``.safetensors``, which also takes ``metadata``, ``.pt`` or ``.pth``. Tensors that
    share memory are written each in full to ``.safetensors``. Raises :class:`NormswapError` for an existing file
    without ``force``, for one of ``inputs``, a folder, another suffix, and a disk that is full."""
    path = Path(path)
    state = tensors.state_dict() if isinstance(tensors, nn.Module) else dict(tensors)
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise NormswapError(f"{path}: the name must end in .safetensors, .pt or .pth")
    with whole_file(path, force=force, inputs=inputs) as file:
        try:
            if path.suffix == ".safetensors":
                save_file(_separate(state), file, metadata={"format": "pt", **(metadata or {})})
            else:
                torch.save(state, file)
        except (RuntimeError, SafetensorError) as error:  # torch and safetensors wrap the operating system's error
            raise NormswapError(f"cannot write {path}: {_line(error)}. No partial file was left") from error


def _separate(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Contiguous tensors, no two in one storage; what is no tensor is left out (extra state)."""
    seen: set[int] = set()
    separate = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue
        tensor = value.detach().contiguous()
        if tensor.untyped_storage().data_ptr() in seen and tensor.numel():
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        separate[name] = tensor
    return separate
