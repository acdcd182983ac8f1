"""Examine what is in a file: the graph of an ``.onnx`` or ``.pt2`` one, or a checkpoint's keys without the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from normswap.checkpoints.reading import Checkpoint
from normswap.checkpoints.skeleton import skeleton_of
from normswap.engine.sites import Site, survey
from normswap.graph.references import references
from normswap.health.examine import examine_sites
from normswap.health.result import Health
from normswap.onnx import surgery as onnx_files
from normswap.programs import surgery as program_files

EPS = "eps and momentum are not in a checkpoint: variances are compared with an eps of 1e-5"


def examine_onnx(path: Path) -> Health:
    """The health of the norms in an ``.onnx`` file. Raises :class:`~normswap.NormswapError` as
    :func:`normswap.onnx.surgery.inspect` does."""
    return examine_sites(onnx_files.inspect(path))


def examine_program(path: Path) -> Health:
    """The health of the norms in a ``.pt2`` file. Raises :class:`~normswap.NormswapError` as
    :func:`normswap.programs.surgery.inspect` does."""
    return examine_sites(program_files.inspect(path))


def examine_keys(checkpoint: Checkpoint, converted: Mapping[str, str] | None = None) -> Health:
    """The health of the norms that the keys and shapes of a checkpoint tell; what may be one is listed too.

    ``converted`` are those that its recipes changed and the kinds they are now, which keys alone do not always tell."""
    skeleton = skeleton_of(checkpoint.tensors)
    sites = survey(references(skeleton.model))
    known = {name for site in sites for name in (site.name, *site.aliases)}
    told = {
        name: f"it was converted to {kind}, says the checkpoint's recipe: pass --model"
        for name, kind in (converted or {}).items()
        if name not in known
    }
    sites += [Site(name, None, nn.Identity(), reason) for name, reason in (skeleton.unknown | told).items()]
    return examine_sites(sites, options=False, notes=(*skeleton.notes, EPS))
