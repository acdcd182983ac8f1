"""Readers (module -> ``Norm``) and builders (``Norm`` + options -> module), found by class and by kind.

A reader is registered under the dotted path of a class (``cls.__module__ + "." + cls.__qualname__``; ``*`` may stand
for a part of it), so that a library is never imported to be known. Dispatch goes to the nearest class in the MRO, and a
subclass with a ``forward`` of its own is *not* taken for its parent. Other packages register by an entry point in the
group ``normswap.norms`` that names a module to import.

A kind that is no norm but a change of the layers around the norms (weight norm, SELU) has a planner in place of a
builder: (model, selection, options) -> ``Plan``.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from importlib import metadata
from typing import Any, TypeVar

from torch import nn

from normswap.errors import NormswapError, Refusal
from normswap.spec import Norm

Reader = Callable[[Any], Norm]
Builder = Callable[..., nn.Module]
Planner = Callable[..., Any]
_R = TypeVar("_R", bound=Reader)
_B = TypeVar("_B", bound=Builder)
_P = TypeVar("_P", bound=Planner)

_readers: dict[str, Reader] = {}
_patterns: dict[str, Reader] = {}
_builders: dict[str, Builder] = {}
_planners: dict[str, Planner] = {}


def dotted(cls: type) -> str:
    """The path a reader of ``cls`` is registered under."""
    return f"{cls.__module__}.{cls.__qualname__}"


def reads(*classes: str | type) -> Callable[[_R], _R]:
    """Register ``f(module) -> Norm`` for classes, given as the class or as its dotted path.

    Raises :class:`NormswapError` when a class has a reader already.
    """

    def register(reader: _R) -> _R:
        for cls in classes:
            path = cls if isinstance(cls, str) else dotted(cls)
            table = _patterns if "*" in path else _readers
            if path in table:
                raise NormswapError(f"{path} already has a reader: {table[path].__module__}.{table[path].__qualname__}")
            table[path] = reader
        _lookup.cache_clear()
        return reader

    return register


def builds(kind: str) -> Callable[[_B], _B]:
    """Register ``f(norm, **options) -> nn.Module`` as the builder of ``kind``.

    The builder's keyword-only parameters are the kind's options, in the API and on the command line. One named
    ``init`` is given ``"copy"``, ``"preserve"`` or ``"reset"``. Raises :class:`NormswapError` when the kind is taken.
    """

    def register(builder: _B) -> _B:
        _check_free(kind)
        _builders[kind] = builder
        return builder

    return register


def plans(kind: str) -> Callable[[_P], _P]:
    """Register the planner of ``kind``, which plans for a whole model what :func:`normswap.plan_convert` is asked for.

    It is called with the model, the four arguments ``where``, ``skip``, ``example_inputs`` and ``init``, and the
    options, which are its other keyword-only parameters. Raises :class:`NormswapError` when the kind is taken.
    """

    def register(planner: _P) -> _P:
        _check_free(kind)
        _planners[kind] = planner
        return planner

    return register


def _check_free(kind: str) -> None:
    if kind in _builders:
        taken = _builders[kind]
        raise NormswapError(f"kind {kind!r} already has a builder: {taken.__module__}.{taken.__qualname__}")
    if kind in _planners:
        raise NormswapError(f"kind {kind!r} already has a planner: {_planners[kind].__module__}")


@cache
def _load() -> None:
    for entry in metadata.entry_points(group="normswap.norms"):
        try:
            entry.load()
        except Exception as error:  # A broken plug-in must not take the package down, nor be silent.
            warnings.warn(f"normswap: entry point {entry.name!r} ({entry.value}) failed: {error!r}", stacklevel=2)


_SELECTION = frozenset({"where", "skip", "example_inputs", "init"})
"""What a kind's options may not be called."""
_RUNS = ("forward", "__call__", "_call_impl", "_wrapped_call_impl", "_slow_forward")


@cache
def _lookup(cls: type) -> tuple[Reader | None, type | None]:
    """The reader of the nearest registered class and that class; ``forward`` may not be overridden below it."""
    _load()
    for base in cls.__mro__:
        path = dotted(base)
        reader = _readers.get(path)
        if reader is None:
            reader = next((r for pattern, r in _patterns.items() if fnmatchcase(path, pattern)), None)
        if reader is not None:
            return reader, base
    return None, None


def _found(module: nn.Module) -> tuple[Reader | None, type | None]:
    cls: Any = type(module)
    return _lookup(cls)


def reader_of(cls: type) -> Reader | None:
    """The reader of a class, its own or that of the nearest class it derives from."""
    return _lookup(cls)[0]


def overridden(module: nn.Module) -> str | None:
    """Why a module of a registered class is not taken for it (a ``forward`` of its own), or ``None``."""
    base = _found(module)[1]
    if base is None:
        return None
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    for cls in type(module).__mro__:
        if cls is base:
            return None
        for name in _RUNS:
            if name in vars(cls):
                return f"{cls.__qualname__} has a {name} of its own"
    return None


def registered(module: nn.Module) -> bool:
    """Whether the module's class, or a class it derives from, has a reader (a cheap test: nothing is read)."""
    return _found(module)[0] is not None


def read(module: nn.Module) -> Norm:
    """The ``Norm`` a module computes.

    Raises :class:`Refusal` with the reason when no reader speaks for it: an unknown class, a subclass with its own
    ``forward``, uninitialised parameters, or a state the reader refuses.
    """
    reader, base = _found(module)
    if reader is None or base is None:
        raise Refusal(f"no reader for {dotted(type(module))}; teach one with @normswap.reads")
    if (reason := overridden(module)) is not None:
        raise Refusal(f"{reason}, so it is not taken for {base.__name__}; teach it with @normswap.reads")
    try:
        return reader(module)
    except (Refusal, NormswapError):
        raise
    except Exception as error:  # a class that changed since its reader was written
        raise Refusal(f"the reader of {base.__name__} failed: {type(error).__name__}: {error}") from error


def kinds() -> tuple[str, ...]:
    """The kinds that have a builder or a planner, sorted."""
    _load()
    return tuple(sorted({*_builders, *_planners}))


def planner(kind: str) -> Planner | None:
    """The planner of a kind that changes the layers around the norms; ``None`` for a kind of norm."""
    _load()
    return _planners.get(kind)


def builder(kind: str) -> Builder:
    """The builder of ``kind``; raises :class:`NormswapError` that lists the kinds when there is none.

    That of a kind with a planner refuses every norm: one norm alone cannot become a change of layers.
    """
    _load()
    if not isinstance(kind, str) or kind not in kinds():
        raise NormswapError(f"unknown kind {kind!r}; the kinds are: {', '.join(kinds())}")
    return _builders[kind] if kind in _builders else _refusing(kind)


def _refusing(kind: str) -> Builder:
    def build(norm: Norm, **_options: object) -> nn.Module:
        raise Refusal(f"{kind} changes the layers around the norms: convert the model that holds them")

    return build


@cache
def _signature(function: Builder) -> inspect.Signature:
    return inspect.signature(function)


def options(kind: str) -> Mapping[str, inspect.Parameter]:
    """The options of a kind's builder or planner by name, without ``init``."""
    parameters = _signature(planner(kind) or builder(kind)).parameters
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    return {name: p for name, p in parameters.items() if p.kind is keyword_only and name not in _SELECTION}


def takes_init(kind: str) -> bool:
    return "init" in _signature(builder(kind)).parameters


def check_options(kind: str, given: Mapping[str, object]) -> None:
    """Raise :class:`NormswapError` for an option that the kind's builder does not have."""
    known = options(kind)
    unknown = [name for name in given if name not in known]
    if unknown:
        listed = ", ".join(known) or "none"
        raise NormswapError(f"kind {kind!r} has no option {', '.join(map(repr, unknown))}; its options: {listed}")
