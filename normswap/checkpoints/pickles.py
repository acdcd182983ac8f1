"""Pickles read with the few classes that they may name; whatever else one names is refused, not imported."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

import numpy
import torch

from normswap.checkpoints.words import first, line
from normswap.errors import NormswapError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

Names = Mapping[tuple[str, str], Any]
"""Module and name as the pickle has them -> what stands for it."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], allowed: Names) -> None:
        super().__init__(file, encoding="latin1")  # what NumPy's arrays of Python 2 need
        self.allowed = allowed
        self.blocked: list[str] = []

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            self.blocked.append(f"{module}.{name}")
            raise pickle.UnpicklingError(f"{module}.{name}")
        return self.allowed[module, name]


def unpickled(path: Path, allowed: Names, what: str) -> Any:
    """What a pickle holds. Raises :class:`NormswapError` for one that names anything but ``allowed``, or is damaged."""
    with path.open("rb") as file:
        reader = _Unpickler(file, allowed)
        try:
            return reader.load()
        except Exception as error:
            if reader.blocked:
                raise NormswapError(
                    f"{path} holds more than {what} and was not read, because that would run code: "
                    f"{first(reader.blocked)}. If you trust it, pass trust_pickle=True (--trust-pickle)"
                ) from error
            raise NormswapError(f"{path} is damaged or no {what}: {line(error)}") from error


# --- arrays ----------------------------------------------------------------------------------------------------------

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How a file of torch's older format begins; a plain pickle begins otherwise."""


def _dtype(text: Any, *rest: Any) -> Any:
    return numpy.dtype(text, *rest)


def _reconstruct(cls: Any, shape: Any, dtype: Any) -> Any:
    return numpy.ndarray.__new__(numpy.ndarray, (0,), dtype)  # its state brings the shape


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode(encoding)


def _scalar(dtype: Any, data: Any = b"") -> Any:
    return numpy.frombuffer(data.encode("latin1") if isinstance(data, str) else data, dtype)[0].item()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> Any:
    return numpy.frombuffer(data, dtype).reshape(shape, order=order)


_ARRAYS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): numpy.ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): OrderedDict,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


def arrays(path: Path, *, trust_pickle: bool = False) -> Any:
    """What a pickle of arrays holds, as model zoos write it, with a tensor for each array of numbers.

    Raises :class:`NormswapError` for one that holds more, unless ``trust_pickle``."""
    if trust_pickle:
        with path.open("rb") as file:
            try:
                found = pickle.load(file, encoding="latin1")
            except Exception as error:
                raise NormswapError(f"{path} is damaged: {line(error)}") from error
    else:
        found = unpickled(path, _ARRAYS, "arrays")
    try:
        return _as_tensors(found)
    except RecursionError:
        raise NormswapError(f"{path} was not read: it is nested too deeply, or holds itself") from None


def _as_tensors(value: Any) -> Any:
    if isinstance(value, numpy.ndarray) and value.dtype.kind in "biufc":
        native = value.astype(value.dtype.newbyteorder("="), copy=True)
        return torch.from_numpy(numpy.ascontiguousarray(native).reshape(value.shape))
    if isinstance(value, dict):
        return {name: _as_tensors(entry) for name, entry in value.items()}
    return [_as_tensors(entry) for entry in value] if type(value) is list else value


# --- torch.distributed.checkpoint ------------------------------------------------------------------------------------

_CLASSES = (
    "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
    "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
)  # fmt: skip
_PATHS = ("Path", "PosixPath", "PurePath", "PurePosixPath", "WindowsPath", "PureWindowsPath")


def metadata(path: Path) -> Metadata:
    """The ``.metadata`` of a distributed checkpoint: which tensors it holds, and which part is in which file."""
    from torch.distributed.checkpoint import filesystem  # takes a while
    from torch.distributed.checkpoint import metadata as classes

    dtypes = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
    allowed: dict[tuple[str, str], Any] = {
        **{(classes.__name__, name): getattr(classes, name) for name in _CLASSES},
        (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
        ("torch", "Size"): torch.Size,
        **{("torch", name): value for name, value in dtypes.items()},
        ("torch.serialization", "_get_layout"): lambda name: torch.strided,
        **{(module, name): PurePosixPath for module in ("pathlib", "pathlib._local") for name in _PATHS},
        ("collections", "OrderedDict"): OrderedDict,
    }
    found = unpickled(path, allowed, "metadata of torch.distributed.checkpoint")
    if not isinstance(found, classes.Metadata) or not isinstance(found.state_dict_metadata, dict):
        raise NormswapError(f"{path} is no metadata of torch.distributed.checkpoint")
    return found
