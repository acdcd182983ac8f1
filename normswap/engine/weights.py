"""Kinds that change the layers around the norms: weight norm, spectral norm, weight standardization; and back.

Each layer is a ``Change`` or a ``Skip``, and so is each norm, of which ``companion`` says what it becomes:

- ``fold``: what has fixed statistics goes into the layers first, so that eval mode stays as it was. Weight norm and
  spectral norm are made to replace a batch norm, which would undo what the weight is divided by. With the batch's
  statistics, a folded batch norm is the data-dependent initialization of weight norm (arXiv 1602.07868, section 3).
- ``keep``: it stays.
- a kind of norm: it becomes that one. Weight standardization goes with ``group`` (arXiv 1903.10520); ``identity`` takes
  the norms away."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from normswap import registry
from normswap.engine.network import Network, change
from normswap.engine.plan import Change, Plan
from normswap.engine.sites import Site
from normswap.engine.weighted import LAYERS, output_axis, plain_weight
from normswap.errors import NormswapError, Refusal, check_whole
from normswap.fold import bake
from normswap.graph.trace import regions
from normswap.norms.weight_standardized import EPS, FORMS, preserving_gain

MEAN_PART = 1e-9
"""Kernels whose mean is a smaller part of them than this lose nothing by standardization with a gain."""


def _check(companion: str, to: str) -> None:
    kinds = [kind for kind in registry.kinds() if registry.planner(kind) is None]
    if companion not in ("fold", "keep", *kinds):
        raise NormswapError(
            f"companion={companion!r} of {to}; it is 'fold', 'keep', or a kind of norm: {', '.join(kinds)}"
        )


def _baked(plan: Plan) -> dict[str, str]:
    """Layers that a fold makes plain, and what computed their weight."""
    folds = [change.fold for change in plan.changes if change.fold is not None]
    return {name: words for fold in folds for name, words in fold.baked.items()}


def _zeroed(plan: Plan) -> set[str]:
    """Layers that take in a norm which multiplies all channels by zero."""
    steps = [step for change in plan.changes if change.fold is not None for step in change.fold.steps]
    return {step.name for step in steps if not bool(step.affine.scale.any())}


@registry.plans("weight_norm")
def plan_weight_norm(model: nn.Module, *, companion: str = "fold", **selection: Any) -> Plan:
    """Every convolution and linear layer gets torch's weight norm, which leaves its function; see above."""
    _check(companion, "weight_norm")
    network = Network.of(model, "weight_norm", selection, lambda site: True)
    norms = network.companions(companion)
    baked, reset = _baked(norms), network.init == "reset"

    def how(site: Site) -> Change | str:
        if site.name not in baked and (reason := plain_weight(site.module)) is not None:
            return reason
        words = f"weight norm of {_bare(site)}"
        notes = ["its gains start at 1"] if reset else []
        if not reset and _has_zeros(site.module):
            notes.append("kernels of zeros have no direction: theirs becomes ones, with a gain of zero")
        exactness = "retrain" if reset else "exact"
        return change(site, "weight_norm", words, exactness, notes=tuple(notes), init=network.init)

    changes, skips = network.decide(how)
    return network.plan([*norms.changes, *changes], [*norms.skips, *skips], norms.notes)


@registry.plans("spectral_norm")
def plan_spectral_norm(
    model: nn.Module, *, companion: str = "fold", iterations: int = 1, seed: int = 0, **selection: Any
) -> Plan:
    """Every convolution and linear layer gets torch's spectral norm: its weight is divided by its largest singular
    value, of which ``iterations`` power iterations in each call of train mode keep track. ``seed`` is for the first
    estimate."""
    _check(companion, "spectral_norm")
    check_whole("iterations", iterations, 1)
    check_whole("seed", seed, 0)
    network = Network.of(model, "spectral_norm", selection, lambda site: True)
    preserve = network.init == "preserve"
    norms = (
        network.companions("keep", "the layers stay too (init='preserve')")
        if preserve
        else network.companions(companion)
    )
    baked, zeroed = _baked(norms), _zeroed(norms)

    def how(site: Site) -> Change | str:
        if site.name not in baked and (reason := plain_weight(site.module)) is not None:
            return reason
        if preserve:
            return "divided by its largest singular value it computes another function (init='preserve')"
        if site.name in zeroed or _has_zeros(site.module, every=True):
            return "its weight is all zeros, or becomes so by a fold: its largest singular value is 0"
        options = {"iterations": iterations, "seed": seed}
        words = f"spectral norm of {_bare(site)}"
        return change(site, "spectral_norm", words, "retrain", options=options, init=network.init)

    changes, skips = network.decide(how)
    return network.plan([*norms.changes, *changes], [*norms.skips, *skips], norms.notes)


@registry.plans("weight_standardized")
def plan_weight_standardized(
    model: nn.Module, *, companion: str = "group", gain: bool | None = None, eps: float = EPS, **selection: Any
) -> Plan:
    """Every convolution standardizes its kernels; ``gain`` gives each a learned factor (as ``init="preserve"`` needs,
    and does by default, to keep all but the kernels' means). Linear layers stay, as in the paper."""
    _check(companion, "weight_standardized")
    if gain not in (None, True, False) or not isinstance(eps, (int, float)) or isinstance(eps, bool) or eps < 0:
        raise NormswapError(f"gain={gain!r}, eps={eps!r}: gain is True or False, and eps a number of at least 0")
    network = Network.of(model, "weight_standardized", selection, lambda site: isinstance(site.module, _ConvNd))
    preserve = network.init == "preserve"
    learned = preserve if gain is None else gain
    norms = network.companions(companion)
    baked, followed = _baked(norms), set() if learned else _followed(network, norms)

    def how(site: Site) -> Change | str:
        module: Any = site.module
        if site.name not in baked and (reason := plain_weight(module)) is not None:
            return reason
        if output_axis(module) == 1:
            return "it is a transposed convolution, whose kernels are not those of its outputs"
        computed = bake.computed(module)
        kind: Any = type(module) if computed is None else computed.becomes
        if kind not in FORMS:
            return f"{kind.__name__} is a class of its own, of which there is no standardized form"
        if prod(module.kernel_size) * module.in_channels == module.groups:
            return "its kernels have one element, which standardization makes zero"
        exactness, notes = _standardization(bake.weight_of(module), eps, preserve and learned)
        if exactness == "retrain" and (learned or id(module) in followed):
            exactness = "approximate"
        words = f"weight standardization of {_bare(site)}" + ", gain" * learned
        options = {"eps": eps, "gain": learned}
        return change(site, "weight_standardized", words, exactness, notes=notes, options=options, init=network.init)

    changes, skips = network.decide(how)
    return network.plan([*norms.changes, *changes], [*norms.skips, *skips], norms.notes)


def _followed(network: Network, norms: Plan) -> set[int]:
    """``id`` of the layers whose outputs only norms read that have a weight afterwards."""
    weights = {change.name: change.target.weight for change in norms.changes}
    weights |= {skip.name: None if skip.norm is None else skip.norm.weight for skip in norms.skips}
    scaled = {id(site.module) for site in network.norms if site.call is None and weights.get(site.name) is not None}
    if not scaled:
        return set()
    readers: dict[int, list[bool]] = {}
    for region in regions(network.model)[0]:
        for node in region.graph.nodes:
            module = region.module_of(node)
            if isinstance(module, LAYERS):
                found = readers.setdefault(id(module), [])
                found += [id(region.module_of(user)) in scaled for user in node.users] or [False]
    return {key for key, found in readers.items() if all(found)}


def _standardization(weight: Any, eps: float, kept: bool) -> tuple[str, tuple[str, ...]]:
    """Exactness of a standardization, and what to say of it."""
    if not kept:
        return "retrain", ()
    part = preserving_gain(weight, eps)[1]
    if part <= MEAN_PART and not weight.is_meta:
        return "exact", ()
    return "approximate", (f"the mean of each kernel is lost, at most {part:.0%} of a kernel",)


@registry.plans("plain")
def plan_plain(model: nn.Module, **selection: Any) -> Plan:
    """Every layer that computes its weight (weight norm, spectral norm, orthogonal, pruning masks, weight
    standardization) gets the value as a parameter; norms stay, and layers that are plain are not listed."""
    network = Network.of(model, "plain", selection, lambda site: not _is_plain(site.module))
    norms = network.companions("keep", "it is a norm; to='plain' changes layers")

    def how(site: Site) -> Change | str:
        try:
            found = bake.computed(site.module)
            assert found is not None
        except Refusal as refusal:
            return refusal.reason
        return change(site, "plain", _bare(site), "exact", init=network.init)

    changes, skips = network.decide(how)
    return network.plan(changes, [*norms.skips, *skips])


def _is_plain(module: nn.Module) -> bool:
    try:
        return bake.computed(module) is None
    except Refusal:
        return False


def _bare(site: Site) -> str:
    """The layer in words, without what computes its weight."""
    return site.label.rpartition(" of ")[2]


def _has_zeros(module: Any, *, every: bool = False) -> bool:
    """Whether some kernel of a layer, or ``every`` one, is all zeros."""
    try:
        weight = bake.weight_of(module).detach()
    except Refusal:
        return False
    if weight.is_meta:
        return False
    zero = (weight.movedim(output_axis(module), 0).flatten(1) == 0).all(1)
    return bool(zero.all() if every else zero.any())
