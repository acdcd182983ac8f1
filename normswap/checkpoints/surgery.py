"""Converting a checkpoint without the model's code: which keys stay, go, or are new.

The plan is made and applied on the skeleton of the norms (:mod:`normswap.checkpoints.skeleton`), by the same readers
and builders as on a model. All other keys stay as they are, in their order; the keys of a converted norm stand where
those of the old one stood, in the order of the new norm's ``state_dict``. This is the state dict that the converted
model has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from normswap import registry
from normswap.checkpoints.lazy import replaced
from normswap.checkpoints.reading import Checkpoint
from normswap.checkpoints.safety import check_statistics
from normswap.checkpoints.skeleton import Skeleton, skeleton_of
from normswap.engine import Change, Plan, Skip, plan_convert
from normswap.engine.select import Selector
from normswap.errors import NormswapError

ALONE = ("instance", "frn", "adaptive_instance", "multiscale")
INSTANCE = "keys do not tell whether an input is (N, C), which such a norm cannot take; the recipe then refuses"
ONE_POSITION = "keys do not tell an input of one position, for which a model's own plan takes larger groups"


@dataclass
class Surgery:
    """A plan for a checkpoint; :meth:`apply` gives the new state dict."""

    checkpoint: Checkpoint
    skeleton: Skeleton
    plan: Plan

    @property
    def changed(self) -> dict[str, str]:
        """What the keys of each changed norm begin with in the file, and its name."""
        names = {alias for change in self.plan.changes for alias in (change.name, *change.aliases)}
        return {self.skeleton.prefixes[name]: name for name in names}

    def module(self, name: str) -> nn.Module:
        """The norm of that name: the old one, or after :meth:`apply` the new one."""
        model = self.skeleton.model if self.plan.applied is None else self.plan.applied.model
        return model.get_submodule(name)

    @property
    def versions(self) -> dict[str, Any]:
        """What torch keeps beside the state dict, for the changed norms too; as :meth:`apply` left them."""
        known = dict(self.checkpoint.versions)
        changed = {owner: {"version": self.module(name)._version} for owner, name in self.changed.items()}
        return {**known, **changed} if known else known

    def apply(self) -> Mapping[str, Tensor]:
        """The state dict after the changes; the tensors that stay are those of the checkpoint, read when asked for."""
        tensors = self.checkpoint.tensors
        if self.plan.applied is None:
            self.plan.apply(inplace=True)
        owners = self.changed
        names: dict[str, Tensor | str] = {}
        for key in tensors:
            owner = key.rpartition(".")[0]
            if owner not in owners:
                names[key] = key
                continue
            for last, value in _own(self.module(owners[owner])).items():
                new = f"{owner}.{last}" if owner else last
                names[new] = value
        return replaced(tensors, names)


def _own(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module without that of its children, which is in the file under its own keys."""
    buffers = {name: b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set}
    both = {**module._parameters, **buffers}
    return {name: value.detach() for name, value in both.items() if value is not None}


def _unknowing(change: Change) -> Change:
    """Without what the skeleton made up: eps, and what the norm's input looks like."""
    source = replace(change.source, ranks=None, eps=None)
    return replace(change, source=source, target=replace(change.target, eps=None))


def plan_keys(
    checkpoint: Checkpoint,
    to: str = "group",
    *,
    where: Selector = None,
    skip: Selector = None,
    init: Any = "copy",
    **options: Any,
) -> Surgery:
    """Plan the conversion of the norms in a checkpoint, found by keys and shapes, to the kind ``to``.

    Arguments are those of :func:`normswap.plan_convert`. The plan's recipe is for the model that the checkpoint
    belongs to. What may be a norm, but cannot be told from keys, is a skip with its reason.

    Raises :class:`NormswapError` as that function does, for statistics that are not finite or a negative variance, and
    for a checkpoint without norms that can be told from keys.
    """
    if registry.planner(to) is not None:
        raise NormswapError(f"{to} changes layers, which keys alone do not tell: pass --model WHERE:CALLABLE")
    check_statistics(checkpoint.tensors, checkpoint.tensors, str(checkpoint.path))
    skeleton = skeleton_of(checkpoint.tensors)
    if not skeleton.prefixes:
        found = f"; {len(skeleton.unknown)} modules may be others, which keys do not tell" if skeleton.unknown else ""
        raise NormswapError(
            f"{checkpoint.path} has no batch norm (running_mean and running_var){found}: pass --model WHERE:CALLABLE"
        )
    plan = plan_convert(skeleton.model, to, where=where, skip=skip, init=init, **options)
    plan.skips += [Skip(name, reason, was="unknown") for name, reason in skeleton.unknown.items()]
    notes = list(skeleton.notes)
    if any(change.to in ALONE for change in plan.changes):
        notes.append(INSTANCE)
    if not options and any(change.to == "group" for change in plan.changes):
        notes.append(ONE_POSITION)
    plan.changes = [_unknowing(change) for change in plan.changes]
    plan.notes = (*plan.notes, *notes)
    return Surgery(checkpoint, skeleton, plan)
