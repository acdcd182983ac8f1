"""Which axes of a model's inputs stay open in an exported graph, and whether they came out so.

A request is ``True`` (the first axis of every tensor is one axis named ``batch``) or a mapping from the arguments of
``forward`` to axes, ``{"x": {0: "batch", 2: "height", 3: "width"}}``. Axes of one name have one size. It is turned into
what ``torch.export`` calls ``dynamic_shapes``; the exporters may fix an axis all the same, some in silence, so their
result is held against the request.
"""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves

from normswap.errors import NormswapError

Sizes = Sequence[tuple[str, Sequence[int | str | None]]]
"""The tensor inputs of a graph: name and axes, each a size or the name of an open one (``None`` where it has none)."""

_STATIC = (Dim.STATIC, Dim.AUTO)


@dataclass(frozen=True)
class Request:
    """``shapes`` for ``torch.export``; ``axes`` that must come out open, with their names, for each tensor in order."""

    shapes: Any
    axes: tuple[dict[int, str | None], ...]

    def problem(self, sizes: Sizes) -> str | None:
        """In words, the first axis that should be open and has a size; or ``None``."""
        if not any(self.axes):
            return None
        if len(sizes) != len(self.axes):
            return (
                f"the graph takes {len(sizes)} tensors and example_inputs have {len(self.axes)}; export without dynamic"
            )
        for axes, (given, found) in zip(self.axes, sizes, strict=True):
            for axis, name in axes.items():
                if isinstance(found[axis], int):
                    return (
                        f"the exporter fixed axis {axis}{f' ({name})' if name else ''} of input {given!r} at "
                        f"{found[axis]}, because the model's code depends on it; leave that axis out of dynamic"
                    )
        return None

    def renamed(self, sizes: Sizes) -> dict[str, str]:
        """The exporter's symbols to the names asked for, where each name has one symbol and each symbol one name."""
        pairs = {
            (str(found[axis]), name)
            for axes, (_, found) in zip(self.axes, sizes, strict=False)
            for axis, name in axes.items()
            if name is not None and found[axis] is not None
        }
        symbols, names = [symbol for symbol, _ in pairs], [name for _, name in pairs]
        return {a: b for a, b in pairs if a != b and a.isidentifier() and symbols.count(a) == 1 == names.count(b)}


def request(model: nn.Module, example_inputs: tuple[Any, ...], dynamic: Mapping[str, Any] | bool | None) -> Request:
    """What ``dynamic`` asks for in a call of ``model`` with ``example_inputs``.

    A mapping's values are, for a tensor, ``{axis: what}`` or a list with one entry for each axis, where what is a name,
    a ``torch.export.Dim`` or one of its hints, or ``None`` for a fixed size; negative axes count from the end. For a
    list, tuple or dict of tensors they are nested alike. Arguments that are left out are fixed.

    Raises :class:`NormswapError` for a name that ``forward`` does not have, and for axes that its tensors do not have.
    """
    leaves = tree_leaves(example_inputs)
    if dynamic is None or dynamic is False:
        return Request(None, tuple({} for leaf in leaves if _is_tensor(leaf)))
    if dynamic is True:
        batch = Dim("batch")
        collection: Any = torch.export.ShapesCollection()
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.dim() > 0:
                collection[leaf] = {0: batch}
        axes: list[dict[int, str | None]] = [{0: "batch"} if leaf.dim() else {} for leaf in leaves if _is_tensor(leaf)]
        return Request(collection.dynamic_shapes(model, example_inputs), tuple(axes))
    if not isinstance(dynamic, Mapping):
        raise NormswapError(f"dynamic is a {type(dynamic).__name__}; it must be True or a mapping of argument names")
    arguments = _arguments(model, example_inputs)
    for name in dynamic:
        if name not in arguments:
            given = ", ".join(map(str, arguments)) or "none"
            raise NormswapError(
                f"dynamic names {name!r}, which is no argument that example_inputs give to "
                f"{type(model).__name__}.forward; those are: {given}"
            )
    made: dict[str, Any] = {}
    shapes, axes_of = {}, []
    for name, value in arguments.items():
        reading = _Reading(made, [])
        shapes[name] = reading.of(value, dynamic.get(name), str(name))
        axes_of += reading.axes
    return Request(shapes, tuple(axes_of))


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, Tensor)


def _arguments(model: nn.Module, example_inputs: tuple[Any, ...]) -> dict[str, Any]:
    """The parameters of ``forward`` that ``example_inputs`` fill, with their values; ``*args`` as one tuple."""
    try:
        return dict(inspect.signature(model.forward).bind(*example_inputs).arguments)
    except TypeError as error:
        raise NormswapError(f"example_inputs do not fit {type(model).__name__}.forward: {error}") from error


@dataclass
class _Reading:
    """Reads the request for one argument; ``made`` are the axes by name, ``axes`` collects those of each tensor."""

    made: dict[str, Any]
    axes: list[dict[int, str | None]]

    def of(self, value: Any, wanted: Any, where: str) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value, wanted, where)
        if wanted is not None and isinstance(value, list | tuple):
            if not isinstance(wanted, list | tuple) or len(wanted) != len(value):
                raise NormswapError(f"dynamic[{where}] must be a list of {len(value)}, as the argument is: {wanted!r}")
            pairs = enumerate(zip(value, wanted, strict=True))
            parts = [self.of(part, asked, f"{where}[{index}]") for index, (part, asked) in pairs]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if wanted is not None and isinstance(value, dict):
            if not isinstance(wanted, Mapping) or not wanted.keys() <= value.keys():
                raise NormswapError(f"dynamic[{where}] must be a mapping with keys of the argument: {wanted!r}")
            return {key: self.of(part, wanted.get(key), f"{where}[{key!r}]") for key, part in value.items()}
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        if wanted is not None and not tensors:
            raise NormswapError(f"dynamic[{where}]: the argument is a {type(value).__name__}, which has no axes")
        self.axes.extend({} for _ in tensors)  # What is asked of a container of another type is torch's to judge.
        return wanted

    def _tensor(self, value: Tensor, wanted: Any, where: str) -> Any:
        if wanted is None:
            self.axes.append({})
            return None
        if isinstance(wanted, str) or not isinstance(wanted, Mapping | Sequence):
            raise NormswapError(f"dynamic[{where}] must be a mapping of axes, such as {{0: 'batch'}}: {wanted!r}")
        items = wanted.items() if isinstance(wanted, Mapping) else enumerate(wanted)
        rank, shapes, open_axes = value.dim(), {}, {}
        for axis, asked in items:
            if isinstance(axis, bool) or not isinstance(axis, int) or not -rank <= axis < rank:
                raise NormswapError(f"dynamic[{where}] names axis {axis!r}; the tensor has {rank} axes")
            shapes[axis % rank] = self._dim(asked, where)
            if asked is not None and not isinstance(asked, int) and asked not in _STATIC:
                name = asked if isinstance(asked, str) else getattr(asked, "__name__", None)
                open_axes[axis % rank] = name if name is not None and name.isidentifier() else None
        self.axes.append(open_axes)
        return shapes

    def _dim(self, asked: Any, where: str) -> Any:
        if not isinstance(asked, str):
            return asked
        if not asked.isidentifier() or keyword.iskeyword(asked):
            raise NormswapError(f"dynamic[{where}]: {asked!r} cannot name an axis; write a word such as 'batch'")
        return self.made.setdefault(asked, Dim(asked))
