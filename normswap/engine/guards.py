"""What forbids, or changes, the replacement of one norm by another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from normswap.engine.sites import Site
from normswap.graph.evidence import Evidence
from normswap.graph.reach import reach
from normswap.spec import Norm

FEW = 8
"""Moments over fewer elements than this leave little of the data: of two elements, only which one is greater."""


def elements(target: Norm, shapes: tuple[tuple[int, ...], ...] | None, evidence: Evidence) -> int | None:
    """The fewest elements that the new norm's moments run over; ``None`` where that is not known or does not matter."""
    if target.has_statistics or target.mixes or not target.pools or target.shape is not None:
        return None
    if "batch" in target.pools:
        return None
    inside = target.channels_per_group if "channel" in target.pools else 1
    if "space" not in target.pools:
        return inside
    seen = [inside * prod(shape[2:]) for shape in shapes or () if len(shape) > 1]
    if seen:
        return min(seen)
    return inside if evidence.single or evidence.rank == 2 else None


def single_element(target: Norm, fewest: int | None) -> str | None:
    """Why the new norm would map its input to zero, or to its sign: its moments run over one element; or ``None``."""
    if fewest != 1:
        return None
    return f"{target.kind} would normalize single elements here, which wipes the data"


def child_reads(site: Site, built: nn.Module, same: bool) -> str | None:
    """Why the code around a norm, which reads its attributes, cannot live with the replacement; or ``None``.

    ``same``: the replacement computes the same function, so that attributes of the same name mean the same.
    """
    if site.call is not None:
        return _tensor_reads(site)
    for parent in site.parents:
        if isinstance(parent, nn.TransformerEncoderLayer):
            continue  # its fast path is switched off instead, see fast_paths_off
        keys = {key for key, child in parent._modules.items() if child is site.module}
        for child, attribute in sorted(reach(parent).child_reads):
            if child not in keys:
                continue
            if not hasattr(built, attribute):
                reader = f"{type(parent).__name__}.forward"
                return f"{reader} reads its {attribute!r}, which {type(built).__name__} does not have"
            if (
                not same
                and attribute not in ("eps", "num_features", "normalized_shape")
                and hasattr(site.module, attribute)
            ):
                return (
                    f"{type(parent).__name__}.forward reads its {attribute!r} and may compute with it what the norm did"
                )
    return None


def _tensor_reads(site: Site) -> str | None:
    """Why the code around a module needs the tensors that leave it for a norm of their own; or ``None``."""
    gone = set() if site.call is None else set(site.call.paths.values())
    for parent in site.parents:
        keys = {key for key, child in parent._modules.items() if child is site.module}
        for child, attribute in sorted(reach(parent).child_reads):
            if child in keys and attribute in gone:
                return f"{type(parent).__name__}.forward reads the {attribute!r} that its norm uses"
    return None


def fast_paths_off(model: nn.Module, parents: Iterable[nn.Module]) -> Callable[[], None]:
    """Switch off the fused inference kernel of ``nn.TransformerEncoderLayer``, which computes LayerNorm whatever its
    children are, and the nested tensors that ``nn.TransformerEncoder`` makes for it. Returns what switches them on
    again."""
    layers = {id(p): p for p in parents if isinstance(p, nn.TransformerEncoderLayer)}
    switches: list[tuple[nn.Module, str]] = [(layer, "activation_relu_or_gelu") for layer in layers.values()]
    if layers:
        encoders = (module for module in model.modules() if isinstance(module, nn.TransformerEncoder))
        switches += [(e, "use_nested_tensor") for e in encoders if any(id(layer) in layers for layer in e.layers)]
    saved = [(module, name, vars(module)[name]) for module, name in switches if name in vars(module)]
    for module, name, value in saved:
        setattr(module, name, type(value)())

    def restore() -> None:
        for module, name, value in saved:
            setattr(module, name, value)

    return restore


FAST_PATH_NOTE = "switches off the fused path of nn.TransformerEncoderLayer, which would still compute LayerNorm"


def has_fast_path(site: Site) -> bool:
    return any(isinstance(p, nn.TransformerEncoderLayer) and p.activation_relu_or_gelu for p in site.parents)


def wrapper_notes(model: nn.Module) -> tuple[str, ...]:
    """Advice for models that are wrapped."""
    notes = []
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            notes.append("wrapped in DistributedDataParallel: its reducer holds the old parameters; convert first")
        elif isinstance(module, DataParallel):
            notes.append("wrapped in DataParallel: looked through; replicas are made from the converted module")
        elif type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod"):
            notes.append("compiled by torch.compile: looked through; it compiles again at the next call")
    return tuple(dict.fromkeys(notes))
