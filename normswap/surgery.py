"""Convert and fold in one call: plan, apply and, on request, calibrate and prove.

The proof is a measurement: the result is compared with the original as :func:`normswap.verify` does. It is for changes
that claim to be ``exact``, a claim about eval mode, so both are compared in eval mode whatever mode they are in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn

from normswap.calibration import apply_calibrated, check_batches, plan_groups
from normswap.engine import Plan, plan_fold
from normswap.engine.convert import Init
from normswap.engine.convert import plan_convert as plan_kind
from normswap.engine.copying import copy_model
from normswap.engine.report import logger, report
from normswap.engine.select import Selector
from normswap.engine.sites import check_model
from normswap.errors import NormswapError, VerificationFailed
from normswap.verification import verify as compare
from normswap.verification.compare import Backend

SHOWN = 5
"""How many norms a message names."""


def plan_convert(
    model: nn.Module,
    to: str = "group",
    *,
    where: Selector = None,
    skip: Selector = None,
    example_inputs: tuple[Any, ...] | None = None,
    init: Init = "copy",
    calibration: Iterable[Any] | None = None,
    **options: Any,
) -> Plan:
    """Plan the conversion of every norm of ``model`` to the kind ``to``; nothing is changed.

    ``where`` and ``skip`` take a glob over dotted names, a list of globs, or ``f(name, norm) -> bool``.
    ``example_inputs``, a tuple of the model's positional arguments, allows one observed run. ``init``: ``"copy"``
    carries affine and statistics where the target has them, ``"preserve"`` also chooses new parameters so that eval
    mode computes the same function (norms whose target cannot are skipped), ``"reset"`` starts afresh. ``options`` are
    the kind's own (``groups=``, ``channels_per_group=``, ``over=``, ``gate_gap=`` ...). ``groups="auto"`` gives each
    norm a count of its own, the largest that explains nearly as much of its output as the best does on the batches
    ``calibration`` (see :func:`normswap.calibrate`), which are gone through once.

    Raises :class:`NormswapError` for misuse: an unknown kind or option, a group count that does not divide, a
    ScriptModule, inputs that the model does not run on, a glob that matches no norm."""
    common: dict[str, Any] = {"where": where, "skip": skip, "example_inputs": example_inputs, "init": init}
    if options.get("groups") != "auto":
        if calibration is not None:
            raise NormswapError("a plan needs calibration only for groups='auto'; calibrate the converted model")
        return plan_kind(model, to, **common, **options)
    if calibration is None:
        raise NormswapError("groups='auto' chooses the groups by measurement: pass calibration=batches")
    if to != "group" or len(options) > 1:
        others = ", ".join(name for name in options if name != "groups") or f"to={to!r}"
        raise NormswapError(f"groups='auto' is for to='group' and goes with no other option, given {others}")
    return plan_groups(model, calibration, **common)


def convert(
    model: nn.Module,
    to: str = "group",
    *,
    where: Selector = None,
    skip: Selector = None,
    example_inputs: tuple[Any, ...] | None = None,
    init: Init = "copy",
    inplace: bool = False,
    calibration: Iterable[Any] | None = None,
    verify: bool | Backend = False,
    **options: Any,
) -> nn.Module:
    """Convert every norm of ``model`` to the kind ``to`` and return the model; see :func:`plan_convert` for the
    arguments.

    Without ``inplace`` the input is not touched and a deep copy is returned. A norm that cannot be converted stays; the
    plan has the reasons, the logger ``normswap`` has them at level INFO, and a warning is given when nothing changed at
    all.

    ``calibration``: batches, on which :func:`normswap.calibrate` fits the new norms to the old; its report is logged.
    With ``groups="auto"``, which chooses the groups on them first, they are gone through twice. An error leaves the
    model as it was.

    ``verify``: compare the result with the original on ``example_inputs``, in eval mode; a backend of
    :func:`normswap.verify`, or ``True`` for ``"eager"``. Raises :class:`VerificationFailed` when they differ, which
    has the figures, and :class:`NormswapError` when ``example_inputs`` are missing and, before anything is changed,
    when a change does not claim to be exact. The model is then as it was, with ``inplace`` too."""
    proof = _Proof.asked(verify, example_inputs)
    check_model(model)
    automatic = options.get("groups") == "auto"
    if calibration is not None:
        check_batches(calibration, "groups='auto' goes over them again" if automatic else None)
    target = model if inplace else copy_model(model)
    plan = plan_convert(
        target,
        to,
        where=where,
        skip=skip,
        example_inputs=example_inputs,
        init=init,
        calibration=calibration if automatic else None,
        **options,
    )
    report(plan)
    if proof is not None:
        check_exact(plan)
    if proof is None and calibration is None:
        return plan.apply(inplace=True)
    reference = copy_model(model) if inplace else model
    if calibration is None:
        changed = plan.apply(inplace=True)
    else:
        changed, told = apply_calibrated(plan, calibration, inplace=True, reference=reference)
        logger.info("%s", told)
    return changed if proof is None else proof.of(reference, plan, changed)


def fold(
    model: nn.Module,
    *,
    where: Selector = None,
    skip: Selector = None,
    example_inputs: tuple[Any, ...] | None = None,
    inplace: bool = False,
    keep_batchnorm: bool = False,
    affine: bool = False,
    unshare: bool = False,
    merge_branches: bool = False,
    verify: bool | Backend = False,
) -> nn.Module:
    """Fold every norm with fixed statistics into the layers around it and return the model; see :func:`plan_fold`.

    The function in eval mode stays the same up to rounding. Without ``inplace`` the input is not touched. ``verify`` is
    as in :func:`convert`; in place it keeps a copy of the model until the comparison is done."""
    proof = _Proof.asked(verify, example_inputs)
    plan = plan_fold(
        model,
        where=where,
        skip=skip,
        example_inputs=example_inputs,
        keep_batchnorm=keep_batchnorm,
        affine=affine,
        unshare=unshare,
        merge_branches=merge_branches,
    )
    report(plan)
    if proof is None:
        return plan.apply(inplace=inplace, undoable=False)
    check_exact(plan)
    reference = copy_model(model) if inplace else model
    return proof.of(reference, plan, plan.apply(inplace=inplace, undoable=inplace), undo=inplace)


def inexact(plan: Plan) -> list[str]:
    """What of a plan does not claim to be exact, as ``name (exactness)``."""
    return [f"{c.name or '(root)'} ({c.exactness})" for c in plan.changes if c.exactness != "exact"]


def check_exact(plan: Plan) -> None:
    """Raise :class:`NormswapError` for a plan with changes that a verification cannot hold for."""
    if found := inexact(plan):
        named = ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
        raise NormswapError(
            f"{plan.operation}: there is nothing to verify, for {len(found)} of {len(plan.changes)} changes give "
            f"another function: {named}. Do without verify, or leave these out with where or skip"
        )


@dataclass(frozen=True)
class _Proof:
    example_inputs: tuple[Any, ...]
    backend: Backend

    @classmethod
    def asked(cls, verify: bool | Backend, example_inputs: tuple[Any, ...] | None) -> _Proof | None:
        if verify is False:
            return None
        backend = "eager" if verify is True else verify
        if backend not in get_args(Backend):
            raise NormswapError(f"verify={verify!r}; it is False, True, or one of: {', '.join(get_args(Backend))}")
        if example_inputs is None:
            raise NormswapError("verify compares on example_inputs: pass them, a tuple of the model's arguments")
        return cls(example_inputs, backend)

    def of(self, reference: nn.Module, plan: Plan, changed: nn.Module, *, undo: bool = True) -> nn.Module:
        """``changed``, if it is proven to be what ``reference`` is; otherwise the plan is undone."""
        if not plan.changes and not plan.merges:
            return changed
        try:
            self._check(reference, plan, changed)
        except BaseException:
            if undo:
                plan.undo()
            raise
        return changed

    def _check(self, reference: nn.Module, plan: Plan, changed: nn.Module) -> None:
        sides = (_in_eval(reference), _in_eval(changed))
        verification = compare(*sides, self.example_inputs, backend=self.backend)
        if not verification:
            remarks = "; ".join(verification.remarks()[:2])
            raise VerificationFailed(
                f"{plan.operation}: the result is not equivalent to the original, so the model is left as it was "
                f"({remarks}). The attribute verification of this error has all figures",
                verification,
            )


def _in_eval(model: nn.Module) -> nn.Module:
    if not any(module.training for module in model.modules()):
        return model
    copied = copy_model(model)
    copied.eval()
    return copied
