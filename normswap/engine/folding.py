"""Making the folds of a plan in a model, and undoing them bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from normswap import registry
from normswap.engine.carry import carry
from normswap.engine.lifting import Lifts
from normswap.engine.plan import Change, Step
from normswap.errors import NormswapError, Refusal
from normswap.fold import attention, layers
from normswap.fold.calls import Call
from normswap.graph.references import Reference, references
from normswap.graph.separate import Unsharing, separate
from normswap.norms.affine import ChannelAffine
from normswap.norms.bare import strip


def apply_fold(
    model: nn.Module, changes: Sequence[Change], undoable: bool = True, unsharing: Unsharing | None = None
) -> tuple[nn.Module, Callable[[], None]]:
    """Make the folds in place; returns the model and what undoes them, bit for bit.

    An error undoes what was done: all of it, or, with ``undoable=False``, which keeps no old weights, the norm at hand.
    Either way the model computes what it did. Where functional norms are among the changes, old weights are kept until
    the end: the calls leave their forwards together. ``unsharing`` is made first."""
    functional = any(change.functional for change in changes)
    undo: list[Callable[[], None]] = [separate(model, unsharing)] if unsharing else []

    def back() -> None:
        while undo:
            undo.pop()()

    root = model
    try:
        lifts = Lifts(model, functional)
        by_name = {name: reference for reference in references(model).values() for name in reference.names}
        awaited: set[str] = set()  # norms that must change too before the model computes what it did
        for change in sorted(changes, key=lambda change: 0 if change.fold is None else change.fold.order):
            if not undoable and not awaited and not functional:
                undo.clear()
            built = _apply_one(change, by_name, lifts, undo)
            steps = [] if change.fold is None else change.fold.steps
            awaited = (awaited | {step.name for step in steps if step.layer is None}) - {change.name}
            if built is not None and by_name[change.name].module is model:
                root = built
        lifts.make(undo)
    except BaseException:
        back()
        raise
    return root, back


def _apply_one(
    change: Change, by_name: dict[str, Reference], lifts: Lifts, undo: list[Callable[[], None]]
) -> nn.Module | None:
    """The module that stands where the norm stood; ``None`` for a functional norm."""
    reference = by_name.get(change.name)
    if change.fold is None or (reference is None and not change.functional):
        raise NormswapError(f"the model has no module {change.name!r}, which the plan folds")
    for step in change.fold.steps:
        if step.layer is None:
            continue
        try:
            undo.append(_absorb(step, by_name))
        except (NormswapError, Refusal) as error:
            raise NormswapError(
                f"{change.name} into {step.name}: {error}; leave it out with skip={change.name!r}"
            ) from error
    if change.functional:
        lifts.put(change, None if change.fold.left is None else _left(change))
        return None
    assert reference is not None
    old = reference.module
    if change.fold.bare is not None:
        undo.append(strip(old, change.fold.bare.manner))
        return old
    built = _left(change)
    hand_over = carry(old, built, registry.read(old))
    for slot in reference.slots:
        slot.put(built)
        undo.append(partial(slot.put, old))
    undo.append(hand_over())
    return built


def _absorb(step: Step, by_name: dict[str, Reference]) -> Callable[[], None]:
    assert step.layer is not None
    if step.layer.part:
        return attention.absorb(by_name[step.name].module, step.layer, step.affine)
    return layers.absorb(_layer(step, by_name), step.layer, step.affine, step.side)


def _layer(step: Step, by_name: dict[str, Reference]) -> Any:
    """The module of a layer, or the parameters that a function takes."""
    if not step.parameters:
        return by_name[step.name].module
    parameters = []
    for name in step.parameters:
        holder, _, attribute = name.rpartition(".")
        parameters.append(by_name[holder].module.get_parameter(attribute))
    return Call(parameters[0], parameters[1] if len(parameters) > 1 else None, step.parameters)


def _left(change: Change) -> nn.Module:
    """What stands where the norm stood: nothing, or a multiply-add."""
    assert change.fold is not None
    affine = change.fold.left
    if affine is None:
        identity: Any = nn.Identity()
        identity.num_features = change.source.channels  # which the code around it may read
        return identity  # type: ignore[no-any-return]
    tensor = change.source.running_var
    assert tensor is not None
    like = change.source.weight if change.source.weight is not None else tensor
    scale, shift = (v.to(device=like.device, dtype=like.dtype) for v in (affine.scale, affine.shift))
    if not bool(scale.isfinite().all() and shift.isfinite().all()):
        raise NormswapError(f"{change.name}: its scale and shift are not finite in {like.dtype}")
    module = ChannelAffine(affine.channels).to(device=like.device, dtype=like.dtype)
    for name, value in (("scale", scale), ("shift", shift)):
        delattr(module, name)
        if isinstance(like, nn.Parameter):
            module.register_parameter(name, nn.Parameter(value, requires_grad=like.requires_grad))
        else:  # code that goes through all parameters finds as many as before
            module.register_buffer(name, value)
    return module
