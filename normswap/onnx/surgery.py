"""``.onnx`` files as models: list their normalizations, fold or convert them, and write another file.

No code of the model is needed, none is run, and the file that is read is never written. The extra ``normswap[onnx]`` is
needed when a function is called.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from normswap.engine.plan import Change, Skip
from normswap.engine.report import report
from normswap.engine.select import Selector, check_globs, excluded
from normswap.engine.sites import Site
from normswap.errors import NormswapError

if TYPE_CHECKING:
    from normswap.onnx.graph import View
    from normswap.onnx.norms import NodeSite
    from normswap.onnx.plan import FilePlan

StrPath = str | os.PathLike[str]


def inspect(path: StrPath) -> list[Site]:
    """Every normalization in the ``.onnx`` file ``path``, with what it computes and, where they are fixed, the input's
    shapes.

    Raises :class:`NormswapError` for a file that cannot be read: see :func:`normswap.onnx.file.read`."""
    return list(_read(path)[1])


def plan_fold(path: StrPath, *, where: Selector = None, skip: Selector = None, unshare: bool = False) -> FilePlan:
    """Plan to fold the batch normalizations of an ``.onnx`` file into the layers beside them.

    ``where`` and ``skip`` select norms by the names of their nodes, or of the modules whose tensors they have. With
    ``unshare``, a layer whose weight others read too gets a copy of it. What no layer absorbs stays, with the reason.
    Raises :class:`NormswapError` as :func:`inspect` does, and for a glob that matches no norm."""
    from normswap.onnx.search import Search

    view, sites = _read(path)

    def outcomes(chosen: list[NodeSite]) -> dict[int, Change | Skip]:
        return Search(view, unshare=unshare).run(chosen)

    return _plan(path, "fold", view, sites, where, skip, outcomes)


def plan_convert(
    path: StrPath, to: str = "group", *, where: Selector = None, skip: Selector = None, **options: Any
) -> FilePlan:
    """Plan to turn the batch normalizations of an ``.onnx`` file into ``group``, ``instance`` or ``layer`` norms.

    ``options`` are ``groups`` or ``channels_per_group`` for ``group``: a number, or a function of the channels. Scale
    and bias are copied, the running statistics dropped: the model computes something else until it is trained.
    Raises :class:`NormswapError` as :func:`plan_fold` does, and for an option that does not fit."""
    from normswap.onnx.conversion import check_options, convert

    check_options(to, options)
    view, sites = _read(path)

    def outcomes(chosen: list[NodeSite]) -> dict[int, Change | Skip]:
        return {id(site.node): convert(view, site, to, options) for site in chosen}

    return _plan(path, f"convert to {to}", view, sites, where, skip, outcomes)


def fold(
    path: StrPath,
    out: StrPath,
    *,
    where: Selector = None,
    skip: Selector = None,
    unshare: bool = False,
    force: bool = False,
) -> FilePlan:
    """:func:`plan_fold`, written to ``out``; the plan. Raises :class:`NormswapError` as
    :meth:`~normswap.onnx.plan.FilePlan.apply` does, too."""
    return _written(plan_fold(path, where=where, skip=skip, unshare=unshare), out, force)


def convert(
    path: StrPath,
    out: StrPath,
    to: str = "group",
    *,
    where: Selector = None,
    skip: Selector = None,
    force: bool = False,
    **options: Any,
) -> FilePlan:
    """:func:`plan_convert`, written to ``out``; the plan. Raises :class:`NormswapError` as
    :meth:`~normswap.onnx.plan.FilePlan.apply` does, too."""
    return _written(plan_convert(path, to, where=where, skip=skip, **options), out, force)


def _read(path: StrPath) -> tuple[View, list[NodeSite]]:
    try:
        from normswap.onnx import file, graph, norms
    except ImportError as error:
        raise NormswapError(
            f"{path}: an .onnx file needs onnx and onnx-ir ({error}): pip install normswap[onnx]"
        ) from error
    view = graph.View(file.read(path))
    return view, norms.find(view)


def _plan(
    path: StrPath,
    operation: str,
    view: View,
    sites: list[NodeSite],
    where: Selector,
    skip: Selector,
    outcomes: Callable[[list[NodeSite]], Mapping[int, Change | Skip]],
) -> FilePlan:
    from normswap.onnx.plan import FilePlan
    from normswap.onnx.search import skipped

    check_globs(sites, where=where, skip=skip)
    left = {id(site.node): reason for site in sites if (reason := excluded(site, where, skip)) is not None}
    with np.errstate(all="ignore"):  # what is not finite is refused
        made = outcomes([site for site in sites if id(site.node) not in left])
    results = [made[id(site.node)] if id(site.node) in made else skipped(site, left[id(site.node)]) for site in sites]
    changes = [result for result in results if isinstance(result, Change)]
    skips = [result for result in results if isinstance(result, Skip)]
    notes: tuple[str, ...] = ()
    if view.inputs_are_constants and any(value.is_graph_input() for value in view.model.graph.initializers.values()):
        version = view.model.ir_version
        notes = (
            f"IR version {version} lists initializers as inputs too; they are taken for constants, as runtimes do",
        )
    return FilePlan(Path(path), operation, changes, skips, view.model, notes)


def _written(plan: FilePlan, out: StrPath, force: bool) -> FilePlan:
    report(plan.table)
    plan.apply(out, force=force)
    return plan
