"""The plan: every norm as a ``Change`` or as a ``Skip`` with a reason; printed, written as JSON, applied, replayed.

Applying is all or nothing: everything is built first, then swapped, and an error puts every swapped reference back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normswap.engine.copying import copy_model
from normswap.engine.optimizer import Remapped, remap
from normswap.errors import NormswapError
from normswap.fold.affine import Affine
from normswap.fold.branches import Taps
from normswap.fold.layers import Layer, Side
from normswap.graph.separate import Unsharing
from normswap.norms.bare import Bare
from normswap.spec import Exactness, Norm
from normswap.version import __version__

RECIPE_VERSION = 1


@dataclass(frozen=True)
class Skip:
    """A norm that stays as it is, and why."""

    name: str
    reason: str
    norm: Norm | None = None
    was: str = ""
    """The norm in words, or the class of a module that has no reader."""
    aliases: tuple[str, ...] = ()
    evidence: str = "static"

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "aliases": list(self.aliases), "was": self.was, "reason": self.reason}


@dataclass(frozen=True)
class Step:
    """What one layer absorbs of a norm."""

    name: str
    """The layer's name."""
    side: Side
    layer: Layer | None
    """``None`` for a norm in front that takes the affine into its own."""
    affine: Affine
    parameters: tuple[str, ...] = ()
    """Of a layer that a function computes: the names of its weight and, if it has one, of its bias."""


@dataclass
class Fold:
    """How a norm vanishes: what its layers absorb, or the affine that is left of it."""

    steps: list[Step] = field(default_factory=list)
    left: Affine | None = None
    biased: dict[str, bool] = field(default_factory=dict)
    """Layers by name, and whether each has a bias afterwards."""
    baked: dict[str, str] = field(default_factory=dict)
    """Layers that are made plain first, by name, and what computed their weight."""
    rounding: float = 0.0
    """The largest relative error that a layer's weight gets by rounding to 16 bits."""
    order: int = 0
    """When it is made: a layer that takes in several norms takes in the nearest first."""
    bare: Bare | None = None
    """How the norm stands without its affine, where it gave away that alone."""


@dataclass(frozen=True)
class Change:
    """One norm and what becomes of it."""

    name: str
    source: Norm
    target: Norm
    exactness: Exactness
    to: str
    """The kind it becomes."""
    aliases: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    """What the old norm had and the new one has not."""
    notes: tuple[str, ...] = ()
    evidence: str = "static"
    functional: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    """The builder's options, functions of the channels already evaluated."""
    init: str = "copy"
    classes: tuple[str, str] = ("", "")
    """Class of the module before and after."""
    into: tuple[str, ...] = ()
    """Names of the layers that absorb it, in a fold."""
    fold: Fold | None = field(default=None, repr=False)

    @property
    def becomes(self) -> str:
        """The outcome in words."""
        if self.to == "bare":
            return f"{self.target}, affine folded into {', '.join(self.into)}"
        return f"folded into {', '.join(self.into)}" if self.into else str(self.target)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "aliases": list(self.aliases),
            "was": str(self.source),
            "becomes": self.becomes,
            "exactness": self.exactness,
            "lost": list(self.lost),
            "notes": list(self.notes),
            "evidence": self.evidence,
        }

    def step(self) -> dict[str, Any]:
        """The change as a step of a recipe: enough to make it again on a fresh model."""
        common = {
            "name": self.name,
            "source": {"kind": self.source.kind, "channels": self.source.channels},
            "to": self.to,
        }
        if self.fold is not None and self.fold.bare is not None:
            parts = {(s.name, "" if s.layer is None else s.layer.part): None for s in self.fold.steps}
            given = [{"name": name, "part": part, "bias": self.fold.biased.get(name, False)} for name, part in parts]
            return {**common, "bare": asdict(self.fold.bare), "layers": given}
        if self.fold is not None:
            baked = self.fold.baked
            biased = {**dict.fromkeys(baked, False), **self.fold.biased}
            layers = [
                {"name": name, "bias": bias, **({"baked": True} if name in baked else {})}
                for name, bias in biased.items()
            ]
            return {**common, "layers": layers}
        return {
            **common,
            "options": {name: _listed(value) for name, value in self.options.items() if _plain(value)},
            "init": self.init,
            "ranks": None if self.source.ranks is None else sorted(self.source.ranks),
        }


@dataclass(frozen=True, eq=False)
class Merge:
    """Parallel branches that become one convolution, in the ``forward`` of one module."""

    holder: str
    """The module whose ``forward`` adds the branches up, and gets another."""
    host: str
    """The convolution that takes them all in."""
    absorbs: tuple[str, ...]
    """The other convolutions, the norms and the scales, which go."""
    adds_itself: bool
    """Whether the source itself is a branch."""
    path: str
    """The host's name inside the holder."""
    nodes: tuple[str, ...]
    """The operations in the holder's graph that go, in order; the last gives the sum."""
    source: str
    """What the branches read, in the holder's graph."""
    taps: Taps
    parts: tuple[tuple[str | None, Tensor], ...]
    """Convolutions by name, or the source itself (``None``), with their scales."""
    shift: Tensor
    bias: bool
    """Whether the host has a bias afterwards."""
    convolutions: tuple[str, ...]
    """Those among ``absorbs``."""
    tensors: tuple[tuple[str, str], ...]
    """Scales and shifts among ``absorbs``: the module that holds each, and its name there."""

    def step(self) -> dict[str, Any]:
        """The merge as part of a recipe."""
        return {"holder": self.holder, "host": self.host, "absorbs": list(self.absorbs)}

    def __str__(self) -> str:
        size = "x".join(map(str, self.taps.kernel))
        others = [*(name for name, _ in self.parts if name not in (None, self.host)), *["identity"] * self.adds_itself]
        branches = ", ".join(dict.fromkeys(str(name) for name in others)) or "what is done to it alone"
        return f"{self.host} takes in {branches} ({size}, in {self.holder or 'the model'})"


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _listed(value: Any) -> Any:
    """``value`` as JSON gives it back."""
    return [_listed(each) for each in value] if isinstance(value, (list, tuple)) else value


@dataclass
class Applied:
    """The outcome of applying changes: the model, what undoes it, and where each parameter went."""

    model: nn.Module
    before: nn.Module
    """The model that was changed: the same object unless its root is a norm."""
    undo: Callable[[], None] | None
    twins: dict[int, nn.Parameter]
    """``id`` of a parameter of the input model -> the same one in the resulting model's tree before the swap."""


Apply = Callable[[nn.Module, Sequence[Change], bool], tuple[nn.Module, Callable[[], None]]]
"""Makes changes in a model; the flag asks for an undo. Returns the model and what undoes them."""


@dataclass
class Plan:
    """Every norm of a model: what changes, what is skipped and why. Nothing is done until :meth:`apply`."""

    model: nn.Module = field(repr=False)
    operation: str
    changes: list[Change]
    skips: list[Skip]
    notes: tuple[str, ...] = ()
    apply_changes: Apply | None = field(default=None, repr=False)
    merges: tuple[Merge, ...] = ()
    """Branches that become one convolution, in a fold."""
    applied: Applied | None = field(default=None, repr=False)
    unsharing: Unsharing | None = None
    """The copies of shared layers that a fold makes first."""
    new_bytes: int = 0
    """The memory of their parameters."""

    def apply(self, inplace: bool = False, *, undoable: bool = True) -> nn.Module:
        """Make the changes and return the model: a deep copy, or the model itself with ``inplace=True``.

        All or nothing: on an error the model is as it was. When the model's root is itself a norm, its replacement is
        returned. Raises :class:`NormswapError` when the model cannot be copied or no longer fits the plan. A fold
        applied with ``undoable=False`` frees the old weights as it goes; an error then leaves a model that computes the
        same and is folded in part."""
        if self.apply_changes is None:
            raise NormswapError("this plan was read from JSON and has no model: use apply_recipe(model, recipe)")
        if self.applied is not None and self.applied.model is self.model:
            raise NormswapError("this plan was already applied in place")
        rescaled = [] if inplace or undoable else self._rescaled()
        target = self.model if inplace else copy_model(self.model, rescaled)
        twins = _twins(self.model, target)
        model, undo = self.apply_changes(target, self.changes, undoable)
        for weight in rescaled:
            if twins[id(weight)].data_ptr() == weight.data_ptr():
                twins[id(weight)].data = weight.detach().clone()
        self.applied = Applied(model, target, undo if undoable else None, twins)
        return model

    def _rescaled(self) -> list[nn.Parameter]:
        """The weights that a fold gives new values."""
        steps = [step for change in self.changes if change.fold is not None for step in change.fold.steps]
        modules = dict(self.model.named_modules())
        layers = [modules[name] for name in {step.name for step in steps if step.layer is not None} if name in modules]
        weights = [layer._parameters.get("weight") for layer in layers]
        return [weight for weight in weights if weight is not None]

    def undo(self) -> nn.Module:
        """Put back all that :meth:`apply` changed, bit for bit, and return the model it was applied to.

        Raises :class:`NormswapError` when the plan was not applied, or with ``undoable=False``.
        """
        if self.applied is None or self.applied.undo is None:
            raise NormswapError("there is nothing to undo: the plan was not applied, or with undoable=False")
        self.applied.undo()
        before, self.applied = self.applied.before, None
        return before

    @property
    def recipe(self) -> dict[str, Any]:
        """The changes as JSON-able data, for :func:`normswap.apply_recipe` on a fresh model."""
        unshare = {"unshare": self.unsharing.to_dict()} if self.unsharing else {}
        recipe = {
            "format": RECIPE_VERSION,
            "normswap": __version__,
            "torch": str(torch.__version__),
            "operation": self.operation,
            **unshare,
            "steps": [change.step() for change in self.changes],
        }
        return {**recipe, "merges": [merge.step() for merge in self.merges]} if self.merges else recipe

    def to_dict(self) -> dict[str, Any]:
        return {
            "operation": self.operation,
            "changes": [change.to_dict() for change in self.changes],
            "skips": [skip.to_dict() for skip in self.skips],
            "notes": list(self.notes),
            **({"new_bytes": self.new_bytes} if self.unsharing else {}),
            **({"merges": [merge.step() for merge in self.merges]} if self.merges else {}),
            "recipe": self.recipe,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def remap_optimizer(self, optimizer: torch.optim.Optimizer) -> Remapped:
        """Point an optimizer of the input model at the result: groups and state move with the parameters, in place.

        Parameters that survive keep their state; those that are gone leave their group; new ones join the group of the
        norm they replace, without state. Raises :class:`NormswapError` before :meth:`apply`.
        """
        if self.applied is None:
            raise NormswapError("apply the plan first: there is no result yet to move the optimizer to")
        norms = [(change.name, change.source) for change in self.changes]
        return remap(optimizer, self.applied.model, self.applied.twins, norms)

    def __str__(self) -> str:
        counts = f"{len(self.changes)} changes, {len(self.skips)} skipped"
        rows: list[tuple[str, ...]] = [("name", "was", "becomes", "exactness", "notes")] if self.changes else []
        for c in self.changes:
            remarks = [
                *(f"loses {item}" for item in c.lost),
                *c.notes,
                *([c.evidence] if c.evidence != "static" else []),
            ]
            rows.append((_names(c.name, c.aliases), str(c.source), c.becomes, c.exactness, "; ".join(remarks)))
        counts += f", {len(self.merges)} sums of branches merged" if self.merges else ""
        lines = [f"plan to {self.operation}: {counts}", *_table(rows)]
        lines += ["", *(f"merged: {merge}" for merge in self.merges)] if self.merges else []
        if self.skips:
            skipped = [(_names(s.name, s.aliases), s.was, s.reason) for s in self.skips]
            lines += ["", *_table([("skipped", "is", "reason"), *skipped])]
        lines += ["", *(f"note: {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines)


def _names(name: str, aliases: Iterable[str]) -> str:
    return " = ".join([name or "(root)", *aliases])


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _twins(before: nn.Module, after: nn.Module) -> dict[int, nn.Parameter]:
    ours, theirs = (dict(model.named_parameters(remove_duplicate=False)) for model in (before, after))
    return {id(parameter): theirs[name] for name, parameter in ours.items() if name in theirs}
