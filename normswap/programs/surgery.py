"""``.pt2`` files as models: list their normalizations, fold or convert them, and write another file.

No code of the model is needed, none is run (see :mod:`normswap.exported`), and the file that is read is never written.
The plan is made by the same rules as for a module, on the program's stand-in (:mod:`normswap.programs.standin`); its
recipe is that of a model whose modules have the names in the file.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from normswap import engine, registry
from normswap.engine.plan import Plan
from normswap.engine.report import report
from normswap.engine.select import Selector
from normswap.engine.sites import Site
from normswap.errors import NormswapError
from normswap.exported import load_exported
from normswap.programs.edit import KINDS
from normswap.programs.plan import ProgramPlan
from normswap.programs.standin import StandIn, stand_in

StrPath = str | os.PathLike[str]
ADVICE = re.compile(r"; unshare=True gives [^;]*| \(example_inputs [^)]*\)")
"""What a reason advises that a file has no use for."""


def inspect(path: StrPath) -> list[Site]:
    """Every normalization in the ``.pt2`` file ``path``, by the name of the module that held its tensors.

    Raises :class:`NormswapError` as :func:`normswap.load_exported` does, and for a program that cannot be followed."""
    stood = stand_in(load_exported(path))
    found = engine.find(stood.module)
    return found + [Site(skip.name, None, stood.module, f"{skip.reason} ({skip.was})") for skip in stood.skips]


def plan_fold(path: StrPath, *, where: Selector = None, skip: Selector = None) -> ProgramPlan:
    """Plan to fold the norms with fixed statistics of a ``.pt2`` file into the layers beside them.

    ``where`` and ``skip`` select norms by name; what no layer absorbs stays, with the reason. Raises
    :class:`NormswapError` as :func:`inspect` does, and for a glob that matches no norm."""
    stood = stand_in(load_exported(path))
    plan = engine.plan_fold(stood.module, where=where, skip=skip, keep_batchnorm=True)
    return _planned(path, stood, plan)


def plan_convert(
    path: StrPath, to: str = "group", *, where: Selector = None, skip: Selector = None, **options: Any
) -> ProgramPlan:
    """Plan to turn the norms of a ``.pt2`` file into ``group``, ``instance`` or ``layer`` norms.

    ``options`` are those of :func:`normswap.plan_convert`. Scale and bias are copied, the running statistics dropped:
    the program computes something else until it is trained. Raises :class:`NormswapError` as :func:`plan_fold` does,
    and for another kind or an option that does not fit."""
    registry.builder(to)
    if to not in KINDS or options.get("over") == "channels":
        raise NormswapError(
            f"the norms of a .pt2 file cannot become {to!r}{' over channels' if to in KINDS else ''}, which is no one "
            f"operator; they become {', '.join(KINDS)}: convert the model itself, then export it"
        )
    stood = stand_in(load_exported(path))
    return _planned(path, stood, engine.plan_convert(stood.module, to, where=where, skip=skip, **options))


def fold(
    path: StrPath, out: StrPath, *, where: Selector = None, skip: Selector = None, force: bool = False
) -> ProgramPlan:
    """:func:`plan_fold`, written to ``out``; the plan. Raises :class:`NormswapError` as :meth:`ProgramPlan.apply` does,
    too."""
    return _written(plan_fold(path, where=where, skip=skip), out, force)


def convert(
    path: StrPath,
    out: StrPath,
    to: str = "group",
    *,
    where: Selector = None,
    skip: Selector = None,
    force: bool = False,
    **options: Any,
) -> ProgramPlan:
    """:func:`plan_convert`, written to ``out``; the plan. Raises :class:`NormswapError` as :meth:`ProgramPlan.apply`
    does, too."""
    return _written(plan_convert(path, to, where=where, skip=skip, **options), out, force)


def _planned(path: StrPath, stood: StandIn, plan: Plan) -> ProgramPlan:
    plan.skips = [replace(skip, reason=ADVICE.sub("", skip.reason)) for skip in plan.skips] + stood.skips
    return ProgramPlan(Path(path), plan, stood)


def _written(plan: ProgramPlan, out: StrPath, force: bool) -> ProgramPlan:
    report(plan.table)
    plan.apply(out, force=force)
    return plan
