"""What the command line's arguments mean: a model by name, a shape, a value.

A model is ``package.module:callable`` or ``path/file.py:callable``; the callable returns an ``nn.Module`` (or is one).
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from normswap.errors import NormswapError


def parse_value(text: str) -> object:
    """``text`` as a Python literal where it is one, else as it stands."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def parse_pairs(pairs: Iterable[str], flag: str) -> dict[str, object]:
    """``["k=v", ...]`` as a dict.

    Raises :class:`NormswapError` that names ``flag`` for another form and for a name given twice.
    """
    return {name: parse_value(value) for name, value in _pairs(pairs, flag, str.isidentifier)}


def parse_texts(pairs: Iterable[str], flag: str) -> dict[str, str]:
    """``["k=v", ...]`` as text by any name; raises like :func:`parse_pairs`."""
    return dict(_pairs(pairs, flag, bool))


def _pairs(pairs: Iterable[str], flag: str, is_name: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    names = set()
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not is_name(name):
            raise NormswapError(f"{flag} {pair!r}: write it as name=value")
        if name in names:
            raise NormswapError(f"{flag} {pair!r}: {name} is given twice")
        names.add(name)
        yield name, value


def parse_input(text: str, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> Tensor:
    """A random tensor for ``"1x3x224x224"`` or ``"1x16:int64"``, on the CPU.

    Floating values are standard normal, in ``dtype`` unless the text names one; integers and booleans are 0 or 1.
    Raises :class:`NormswapError` for any other text, and for a tensor that does not fit into memory.
    """
    shape_text, colon, dtype_text = text.partition(":")
    sizes = shape_text.split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise NormswapError(f"--input {text!r}: write sizes of at least 1 with x between them, such as 1x3x224x224")
    if colon:
        named = getattr(torch, dtype_text, None)
        if not isinstance(named, torch.dtype) or named.is_complex:
            raise NormswapError(f"--input {text!r}: no dtype {dtype_text!r}; write one such as float32 or int64")
        dtype = named
    generator = torch.Generator().manual_seed(seed)
    shape = [int(size) for size in sizes]
    try:
        if dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(dtype)
        return torch.randint(0, 2, shape, generator=generator).to(dtype)
    except (RuntimeError, OverflowError, TypeError) as error:  # more than memory, or than 64 bits
        raise NormswapError(f"--input {text!r}: there is no memory for a tensor of this shape") from error


def parse_inputs(texts: Iterable[str], model: nn.Module) -> tuple[Tensor, ...] | None:
    """One tensor for each text, floating ones in the dtype of the model's parameters; ``None`` for no text."""
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    dtype = next(floating, torch.float32)
    return tuple(parse_input(text, dtype, seed=seed) for seed, text in enumerate(texts)) or None


def parse_dynamic(texts: Iterable[str]) -> dict[str, dict[int, str]]:
    """Names of open axes by argument, for texts like ``"x:0=batch,2=height"``; axes of one name have one size.

    Raises :class:`NormswapError` for any other text, and for an axis that is named twice.
    """
    found: dict[str, dict[int, str]] = {}
    for text in texts:
        argument, colon, axes = text.partition(":")
        if not colon or not argument.isidentifier():
            raise NormswapError(f"--dynamic {text!r}: write ARGUMENT:AXIS=NAME,..., such as x:0=batch,2=height")
        named = found.setdefault(argument, {})
        for pair in axes.split(","):
            axis, equals, name = pair.partition("=")
            if not equals or not axis.removeprefix("-").isdecimal() or not name.isidentifier():
                raise NormswapError(f"--dynamic {text!r}: {pair!r} is not AXIS=NAME, such as 0=batch")
            if int(axis) in named:
                raise NormswapError(f"--dynamic {text!r}: axis {axis} of {argument} is named twice")
            named[int(axis)] = name
    return found


def build_model(name: str, arguments: Mapping[str, object]) -> nn.Module:
    """Import the model called ``name`` and call it with ``arguments``.

    Raises :class:`NormswapError` when the module cannot be imported, the callable is not there (the message lists what
    is), the call fails, or what it returns is no ``nn.Module``.
    """
    path, target = named_object(name, "--model")
    if isinstance(target, nn.Module):
        if arguments:
            raise NormswapError(f"--model {name!r} is a module, not a callable: --model-arg has no use")
        return target
    if not callable(target):
        raise NormswapError(f"--model {name!r} is a {type(target).__name__}, not a callable that returns a model")
    try:
        model = target(**arguments)
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise NormswapError(f"--model {name!r}: {path}({given}) raised {_described(error)}") from error
    if not isinstance(model, nn.Module):
        raise NormswapError(f"--model {name!r}: {path}() returned a {type(model).__name__}, not an nn.Module")
    return model


def named_object(name: str, flag: str) -> tuple[str, object]:
    """What ``package.module:path`` or ``file.py:path`` names, after the path. Raises :class:`NormswapError`."""
    source, colon, path = name.rpartition(":")
    if not colon or not source or not path:
        raise NormswapError(f"{flag} {name!r}: write package.module:callable or path/file.py:callable")
    return path, _attribute(_import(source, flag), source, path, flag)


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _import(source: str, flag: str) -> ModuleType:
    try:
        return _import_file(Path(source), flag) if source.endswith(".py") else _import_dotted(source, flag)
    except NormswapError:
        raise
    except Exception as error:
        raise NormswapError(f"{flag}: importing {source!r} raised {_described(error)}") from error


def _import_dotted(source: str, flag: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name is not None and (source == error.name or source.startswith(error.name + ".")):
            raise NormswapError(
                f"{flag}: no module {error.name!r}; is it installed, or a file? Write files as path/file.py:callable"
            ) from error
        raise


def _import_file(path: Path, flag: str) -> ModuleType:
    if not path.is_file():
        raise NormswapError(f"{flag}: no file {str(path)!r}")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = path.stem if path.stem not in sys.modules else f"normswap_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _attribute(module: ModuleType, source: str, path: str, flag: str) -> object:
    target: object = module
    for part in path.split("."):
        if not hasattr(target, part):
            raise NormswapError(f"{flag}: {source} has no {path!r}; {_offer(module, path)}")
        target = getattr(target, part)
    return target


def _offer(module: ModuleType, wanted: str) -> str:
    public = {name: value for name, value in vars(module).items() if callable(value) and not name.startswith("_")}
    own = [name for name, value in public.items() if getattr(value, "__module__", None) == module.__name__]
    names = own or list(public)
    if not names:
        return "it holds no callables"
    close = difflib.get_close_matches(wanted, names, n=8, cutoff=0.4)
    shown = (close + [name for name in names if name not in close])[:8]
    rest = len(names) - len(shown)
    return f"its callables: {', '.join(shown)}" + (f" and {rest} more" if rest else "")
