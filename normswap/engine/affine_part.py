r"""The affine part of a norm that computes its statistics from each input, and whether it can leave the norm.

Such a norm is :math:`y = w \cdot \hat x + b` with :math:`\hat x` normalized. The layers that read y may absorb
:math:`(w, b)`, if all of them can; the norm then gives :math:`\hat x`. Running statistics are not involved, so that
this holds in train mode too.

A weight with several axes, as of ``nn.LayerNorm((L, C))``, is a channel affine only where it varies along one of
them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normswap.engine.dataflow import Dataflow
from normswap.engine.sites import Site
from normswap.fold.affine import Affine
from normswap.graph.reach import reach
from normswap.graph.trace import has_plain_forward
from normswap.norms import bare
from normswap.norms.bare import Manner
from normswap.spec import Norm

_NAMES = frozenset({"weight", "bias"})
_ASKED = _NAMES | {"affine", "elementwise_affine"}


@dataclass(frozen=True)
class Part:
    """What a norm gives away, on which axis of its output, and how it then stands without."""

    affine: Affine
    axis: int
    manner: Manner


def part_of(
    site: Site, flow: Dataflow, owners: dict[int, list[nn.Module]], recorded: Mapping[str, Any] | None = None
) -> Part | str:
    """The affine that a norm can give away, or the reason why it must keep it.

    ``owners``: the modules of each parameter by its ``id``. ``recorded``: how a recipe says that the norm gave it away,
    which then holds for a weight of one and a bias of zero too, as a fresh model has them."""
    norm, module = site.norm, site.module
    assert norm is not None
    if norm.has_statistics:
        return f"{norm.kind} computes its statistics from each input, and has running ones besides"
    if norm.weight is None and norm.bias is None:
        return "it has no affine to fold"
    if site.call is not None:
        return "functional norm: fold takes the affine out of modules only"
    if norm.follows or norm.threshold is not None:
        return "an activation follows inside it"
    if norm.form is not None and not norm.form.affine:
        return f"the affine of {norm.kind} is not the same for every sample"
    if (reason := _guarded(site, flow, owners)) is not None:
        return reason
    found = _along_one_axis(norm, module, -1 if recorded is None else recorded["axis"])
    if isinstance(found, str):
        return found
    affine, axis = found
    if not affine.finite:
        return "its weight or bias is not finite"
    if recorded is None and affine.no_shift and bool((affine.scale == 1).all()):
        return "its weight is one and its bias zero: there is nothing to fold"
    manner: Manner | None = None if recorded is None else recorded["manner"]
    if manner is None:
        manner = bare.manner(module, norm, keep=_asked_for(site, flow))
    if manner is None:
        return f"no state of {type(module).__name__} is known in which it only normalizes"
    return Part(affine, axis, manner)


def _guarded(site: Site, flow: Dataflow, owners: dict[int, list[nn.Module]]) -> str | None:
    module, norm = site.module, site.norm
    assert norm is not None
    if parametrize.is_parametrized(module):
        return "it is parametrized"
    for name in ("weight", "bias"):
        parameter = module._parameters.get(name)
        if getattr(norm, name) is None:
            continue
        if parameter is None:
            return f"its {name} is not a parameter of its own"
        if parameter.is_meta:
            return "it is on the meta device: there are no values to fold"
        others = [owner for owner in owners.get(id(parameter), []) if owner is not module]
        if others:
            return f"it shares its {name} with {flow.references[id(others[0])].name}"
    for parent in site.parents:
        if has_plain_forward(parent):
            continue  # it reads them for a fused kernel, which computes with them what the norm does
        keys = {key for key, child in parent._modules.items() if child is module}
        for child, attribute in sorted(reach(parent).child_reads):
            if child in keys and attribute in _NAMES and getattr(norm, attribute) is not None:
                return f"{type(parent).__name__}.forward reads its {attribute!r}"
    return None


def read_besides(site: Site, flow: Dataflow) -> str | None:
    """Why other code than the norm's may read its weight or bias."""
    for name in ("weight", "bias"):
        if id(site.module._parameters.get(name)) in flow.value_reads:
            return f"the code around it also reads its {name} directly"
    return flow.read_in_doubt(site.module)


def _asked_for(site: Site, flow: Dataflow) -> bool:
    """Whether code around a norm may ask for its parameters' type or place, or whether they are there."""
    for parent in site.parents:
        keys = {key for key, child in parent._modules.items() if child is site.module}
        found = reach(parent)
        if any(child in keys and name in _ASKED for child, name in (*found.described, *found.child_reads)):
            return True
    return any(_ASKED & (found.asked | found.foreign) for _, found in flow.above(site.module))


def _along_one_axis(norm: Norm, module: nn.Module, first: int) -> tuple[Affine, int] | str:
    """The affine in float64, and the axis of the norm's output that it runs along; where several fit, ``first``."""
    pair = _values(norm, module)
    if isinstance(pair, str):
        return pair
    if norm.shape is None:
        return Affine(*pair), norm.channel_axis
    for axis in sorted(range(-len(norm.shape), 0), key=lambda axis: (axis != first, -axis)):
        lines = [values.movedim(axis, 0).flatten(1) for values in pair]
        if all(torch.equal(line, line[:, :1].expand_as(line)) for line in lines):
            scale, shift = (line[:, 0] for line in lines)
            return Affine(scale, shift), axis
    return f"its affine is of shape {tuple(norm.shape)}, one value for each element: no layer takes that"


def _values(norm: Norm, module: nn.Module) -> tuple[Tensor, Tensor] | str:
    """Weight and bias in float64 from the module's own parameters, which a ``1 + weight`` must not round."""
    found = []
    for name, neutral in (("weight", 1.0), ("bias", 0.0)):
        effective, own = getattr(norm, name), module._parameters.get(name)
        if effective is None or own is None:
            some = norm.weight if norm.weight is not None else norm.bias
            assert some is not None
            found.append(torch.full_like(some.detach(), neutral, dtype=torch.float64))
            continue
        value = own.detach().double()
        if effective is not own and not torch.equal(effective.detach(), own.detach()):
            value = value + 1
            if not torch.allclose(value, effective.detach().double(), rtol=1e-2, atol=1e-2):
                return f"it does not scale by its {name} or by one more than it"
        found.append(value)
    return found[0], found[1]
