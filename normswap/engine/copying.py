"""A deep copy of a model, as ``copy.deepcopy`` makes it, several times faster.

``copy.deepcopy`` spends most of its time on the dozen hook tables that every module has, nearly always empty. Modules
that do not define how they are copied are copied here attribute by attribute; everything else goes through
``copy.deepcopy``, with one memo. A process group, which cannot be copied, is shared."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch import distributed as dist

from normswap.errors import NormswapError
from normswap.fold.bake import hooked_names

_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), type})
_TABLES = (OrderedDict, dict, set, list)
_CUSTOM = ("__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__", "__setstate__", "__new__", "__slots__")


def copy_model(model: nn.Module, replaced: Iterable[nn.Parameter] = ()) -> nn.Module:
    """A deep copy; :class:`NormswapError` with advice where the model cannot be copied.

    ``replaced``: parameters whose values the caller replaces in the copy by others right away, never in place. They
    are not copied: until then the copy's share their memory."""
    return _copied(
        model, {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in replaced if type(p) is nn.Parameter}
    )


def copy_structure(model: nn.Module) -> nn.Module:
    """A deep copy that has the model's own parameters and buffers; :class:`NormswapError` as in :func:`copy_model`."""
    return _copied(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        copied = _copy(model, memo)
    except Exception as error:
        raise NormswapError(
            f"the model cannot be copied ({type(error).__name__}: {error}); use inplace=True to change the model itself"
        ) from error
    assert isinstance(copied, nn.Module)
    return copied


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    if type(value) in _PLAIN:
        return value
    if type(value) is tuple and all(type(item) in _PLAIN for item in value):
        return value
    known = memo.get(id(value))
    if known is not None:
        return known
    if type(value) in _TABLES and not value:
        empty = memo[id(value)] = type(value)()
        return empty
    if isinstance(value, nn.Module) and not _own_way(type(value)):
        return _copy_module(value, memo)
    if type(value) in (dict, OrderedDict):
        table = memo[id(value)] = type(value)()
        for key, item in value.items():
            table[_copy(key, memo)] = _copy(item, memo)
        return table
    if dist.is_available() and isinstance(value, dist.ProcessGroup):
        return value
    return copy.deepcopy(value, memo)


def _copy_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    cls: Any = type(module)
    copied: nn.Module = cls.__new__(cls)
    memo[id(module)] = copied
    state = vars(copied)
    for name, value in vars(module).items():
        if isinstance(value, Tensor) and value.grad_fn is not None and name in hooked_names(module):
            state[name] = value.detach().clone()  # torch does not copy it, and a hook computes it before each call
        elif name != "_compiled_call_impl":  # of module.compile(): it would run the original
            state[name] = _copy(value, memo)
    return copied


_ways: dict[type, bool] = {}


def _own_way(cls: type) -> bool:
    """Whether a class, other than by torch's own methods, which only mend old pickles, says how it is copied."""
    if cls not in _ways:
        _ways[cls] = any(
            name in vars(base) and not (name == "__setstate__" and base.__module__.startswith("torch.nn.modules."))
            for base in cls.__mro__
            if base not in (nn.Module, object)
            for name in _CUSTOM
        )
    return _ways[cls]
