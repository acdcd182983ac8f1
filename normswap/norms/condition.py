"""How layers are told what they need beside their input: a style, a label, a domain.

    with condition(model, label=labels):
        out = model(x)

sets it on every layer of ``model`` that needs one, and takes it away afterwards. :class:`Conditioned` is a model with
the condition as its last input, for what calls a model by itself: export, ``torch.compile``, verification.

A condition belongs to the thread that gave it. A second thread that runs the same model gets an error, not the first
one's condition; give each thread a copy of the model. A copy made inside has the condition while it lasts. The backward
pass, which may run a layer again for checkpointing, is to be inside too."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from normswap.errors import NormswapError

Need = Literal["style", "label", "domain"]
_lock = threading.Lock()
_caller: ContextVar[int | None] = ContextVar("caller", default=None)
"""The thread for which this one works, in a context that was copied there."""


@contextmanager
def as_caller() -> Iterator[None]:
    """A context that is copied inside speaks for this thread: what runs in it elsewhere has the conditions given here.
    For a caller that waits while it runs."""
    token = _caller.set(_thread())
    try:
        yield
    finally:
        _caller.reset(token)


def _thread() -> int:
    caller = _caller.get()
    return threading.get_ident() if caller is None else caller


class Given:
    """A condition of one layer, as long as it lasts; the same object in every copy of the layer."""

    def __init__(self, value: Any, thread: int | None) -> None:
        self.value, self.thread, self.lasts = value, thread, True

    def __deepcopy__(self, memo: Any) -> Given:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def _nothing() -> None:
    """A saved layer has no condition."""


class NeedsCondition(nn.Module):
    """A layer that needs a condition."""

    needs: ClassVar[Need]
    given: Given | None = None

    def accept(self, value: Any) -> Any:
        """The condition as the layer uses it. Raises :class:`NormswapError` for one that it cannot use."""
        raise NotImplementedError

    def condition(self) -> Any:
        """What was given. Raises :class:`NormswapError` when nothing was, or by another thread."""
        given = self.given
        if given is None or not given.lasts:
            raise NormswapError(
                f"{type(self).__name__} needs a {self.needs} and was given none: run the model inside "
                f"`with normswap.layers.condition(model, {self.needs}=...)`"
            )
        if not torch.compiler.is_compiling() and given.thread != _thread() and not _in_backward():
            raise NormswapError(
                f"another thread gave {type(self).__name__} its {self.needs}: give each thread a copy of the model"
            )
        return given.value


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def per_sample(value: Tensor, samples: int, what: str) -> Tensor:
    """``value`` for one sample or for each of ``samples``. Raises :class:`NormswapError` for another number."""
    if value.shape[0] not in (1, samples):
        raise NormswapError(
            f"the {what} is for {value.shape[0]} samples, the input has {samples}: give one for each, or one for all"
        )
    return value


def indices(value: Any, count: int, what: str, option: str) -> Tensor:
    """Whole numbers below ``count``, ``(1,)`` or ``(N,)``, int64. Raises :class:`NormswapError` for anything else."""
    index = torch.as_tensor(value)
    if index.dtype == torch.bool or index.is_floating_point() or index.is_complex() or index.dim() > 1:
        raise NormswapError(f"{what}={value!r}: it is a whole number, or a tensor of them, one for each sample")
    index = index.long().reshape(-1)
    if not torch.compiler.is_compiling() and index.numel() and not index.is_meta:
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= count:
            wrong = low if low < 0 else high
            raise NormswapError(
                f"{what} {wrong} of {count}, counted from 0: build the layers with {option}={wrong + 1}"
            )
    return index


@contextmanager
def condition(model: nn.Module, *, style: Any = None, label: Any = None, domain: Any = None) -> Iterator[None]:
    """Run ``model`` inside with a condition for its layers that need one.

    ``style``: for ``adaptive_instance``, a map ``(1 or N, C, *S)`` whose moments the output takes, or a pair of mean
    and deviation, each ``(C,)``, ``(1, C)`` or ``(N, C)``. ``label``: for ``conditional``, a whole number or ``(N,)``
    of them; or weights of the classes, floating, ``(classes,)`` or ``(N, classes)``. ``domain``: for ``domain``, a
    whole number or ``(N,)`` of them. Each may be a mapping from dotted names of layers to what they get.

    Raises :class:`NormswapError` when nothing is given, when no layer needs what is given, for values that a layer
    cannot use, and when another thread runs the model with a condition."""
    values: dict[str, Any] = {"style": style, "label": label, "domain": domain}
    values = {need: value for need, value in values.items() if value is not None}
    if not values:
        raise NormswapError("no condition: give style=, label= or domain=")
    new = _chosen(model, values)
    before: list[tuple[NeedsCondition, Given | None]] = []
    with _lock:
        for layer, given in new:
            old = layer.given
            if old is not None and old.lasts and old.thread != given.thread:
                raise NormswapError("another thread runs this model with a condition: give each thread a copy of it")
        for layer, given in new:
            before.append((layer, layer.given))
            layer.given = given
    try:
        yield
    finally:
        with _lock:
            for layer, old in before:
                layer.given = old
            for _, given in new:
                given.lasts = False


def _chosen(model: nn.Module, values: Mapping[str, Any]) -> list[tuple[NeedsCondition, Given]]:
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, NeedsCondition)]
    thread = None if torch.compiler.is_compiling() else _thread()
    found = []
    for need, value in values.items():
        named = {name: layer for name, layer in layers if layer.needs == need}
        if not named:
            raise NormswapError(f"no layer of the model needs a {need}")
        if isinstance(value, Mapping):
            if unknown := [name for name in value if name not in named]:
                raise NormswapError(f"no layer {unknown[0]!r} needs a {need}; those that do: {', '.join(named)}")
            given = {name: value[name] for name in named if name in value}
        else:
            given = dict.fromkeys(named, value)
        for name, each in given.items():
            try:
                found.append((named[name], Given(named[name].accept(each), thread)))
            except NormswapError as error:
                raise NormswapError(f"{name or 'the model'}: {error}") from error
    return found


class Conditioned(nn.Module):
    """``model`` with the condition ``need`` as its last input: ``Conditioned(model, "label")(x, labels)``."""

    def __init__(self, model: nn.Module, need: Need) -> None:
        super().__init__()
        self.model = model
        self.need = need
        self.training = model.training

    def forward(self, *inputs: Any) -> Any:
        values: dict[str, Any] = {self.need: inputs[-1]}
        if not torch.compiler.is_compiling():
            with condition(self.model, **values):
                return self.model(*inputs[:-1])
        new = _chosen(self.model, values)
        before = [layer.given for layer, _ in new]
        for layer, given in new:
            layer.given = given
        out = self.model(*inputs[:-1])
        for (layer, _), old in zip(new, before, strict=True):
            layer.given = old
        return out
