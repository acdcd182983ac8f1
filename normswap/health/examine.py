"""Examine a model: every norm, where it sits, whether it folds, and what looks wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from normswap.calibration.batches import Forward, check_batches, check_runs
from normswap.engine.plan import Change, Plan, Skip
from normswap.engine.planning import Request
from normswap.engine.search import Options
from normswap.engine.sites import Site, check_model, survey
from normswap.errors import NormswapError
from normswap.graph.observe import eval_mode
from normswap.graph.references import references
from normswap.health.checks import Finding, finding
from normswap.health.gradients import PROJECTION, check_gradients, gradients
from normswap.health.measure import Measured, check_measured, measure
from normswap.health.modules import check_calls, check_mode, check_shapes, check_sharing
from normswap.health.placement import Placement, Places, check_placement, placement
from normswap.health.result import Health, NormHealth, ordered
from normswap.health.tensors import check_options, check_tensors

BROKEN = ("not-finite", "negative-variance", "zero-division")
"""Checks that say already why an output is not finite."""


def examine(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | None = None,
    batches: Iterable[Any] | None = None,
    *,
    forward: Forward | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
) -> Health:
    """Look at every norm of ``model`` and say where it sits, whether it folds, and what is wrong with it.

    ``example_inputs``, a tuple of the model's positional arguments, allow one run, which shows shapes and settles how
    often a norm is called. ``batches``, gone over once, are what the model is trained on or used for; they show
    how far train and eval mode differ, what the activations behind the norms do and, on the first batch, how much
    gradient reaches each norm: of ``loss(output, batch)``, or of a random projection of the output. What a batch is and
    what ``forward`` does is as in :func:`normswap.calibrate`.

    The result is truthy when no finding is an error. The model is as it was afterwards, its flags and buffers too.
    Raises :class:`NormswapError` for misuse, and when the model does not run on what was given."""
    check_model(model)
    if loss is not None and batches is None:
        raise NormswapError("loss is for the gradient on batches: pass batches=[...] too")
    if batches is not None:
        check_batches(batches)
        check_runs(model)
    training = any(module.training for module in model.modules())
    with eval_mode(model) if training else nullcontext():
        plan, search = Request(model, None, None, example_inputs, Options()).plan()
    sites = survey(references(model), search.flow.observation)
    places = Places.of(search.flow.flows)
    norms = [_one(site, places, plan) for site in sites]
    findings = [each for norm in norms for each in _static(norm, model, len(places.at(_names(norm.site))))]
    findings += check_sharing(sites)
    notes = list(dict.fromkeys(note for note in plan.notes if "train mode" not in note))
    order = sorted(sites, key=lambda site: min((places.order.get(n, len(sites)) for n in _names(site)), default=0))
    health = Health(tuple(norms), ordered(findings), tuple(notes), depth=tuple(site.name for site in order))
    if batches is None:
        return health
    return _with_data(health, model, batches, forward, loss)


def examine_sites(sites: Iterable[Site], *, options: bool = True, notes: Iterable[str] = ()) -> Health:
    """The same for norms without their model's code: of an ``.onnx`` file, or by the keys of a checkpoint, which does
    not tell ``options`` such as eps."""
    norms = tuple(NormHealth(site) for site in sites)
    findings: list[Finding] = []
    for site in (norm.site for norm in norms):
        if site.norm is not None:
            findings += check_tensors(site.name, site.norm)
            findings += check_options(site.name, site.norm, trains=False) if options else ()
            findings += check_shapes(site.name, site.norm, site.shapes or (), trains=False)
        elif options:
            findings.append(finding("unknown", site.name, site.reason or "there is no reader for it"))
    depth = tuple(norm.name for norm in norms)
    return Health(norms, ordered(findings), tuple(notes), depth=depth)


def _one(site: Site, places: Places, plan: Plan) -> NormHealth:
    found: tuple[Placement, ...] = ()
    if (norm := site.norm) is not None:
        found = tuple(placement(flow, node, norm) for flow, node in places.at(_names(site)))
    outcomes: list[Change | Skip] = [*plan.changes, *plan.skips]
    into, stays = _fold(next((each for each in outcomes if each.name == site.name), None))
    return NormHealth(site, found, into, stays)


def _fold(outcome: Change | Skip | None) -> tuple[tuple[str, ...], str | None]:
    if outcome is None:
        return (), "it is not in the plan of a fold"
    if isinstance(outcome, Skip):
        return (), outcome.reason
    return outcome.into, None if outcome.into else "; ".join(outcome.notes) or f"it becomes {outcome.target}"


def _names(site: Site) -> tuple[str, ...]:
    return site.name, *site.aliases


def _static(health: NormHealth, model: nn.Module, places: int) -> Iterator[Finding]:
    site, norm = health.site, health.site.norm
    if norm is None:
        yield finding("unknown", site.name, site.reason or "there is no reader for it")
        return
    yield from check_tensors(site.name, norm)
    yield from check_options(site.name, norm, trains=True)
    yield from check_mode(site, model)
    yield from check_calls(site, places)
    yield from check_shapes(site.name, norm, site.shapes or (), trains=site.module.training)
    for check, name, what in check_placement(site.name, health.places):
        if check != "dropout-before-norm" or (norm.has_statistics and not norm.fixed):
            yield finding(check, name, what)


def _with_data(
    health: Health,
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None,
    loss: Callable[[Any, Any], Tensor] | None,
) -> Health:
    sites = [norm.site for norm in health.norms]
    activations = {
        norm.name: next((place.activation for place in norm.places if place.activation), None) for norm in health.norms
    }
    seen, left, (first, *_), count = measure(model, sites, activations, batches, forward)
    findings, notes = list(health.findings), list(health.notes)
    notes += [f"{name or 'the model'} was not measured: {reason}" for name, reason in left.items()]
    told = None
    try:
        flow, mode = gradients(model, sites, first, forward, loss)
    except NormswapError as error:
        notes.append(f"no gradients were measured: {error}")
    else:
        told = f"{PROJECTION if loss is None else 'the given loss'}, {mode}"
        findings += check_gradients(flow)
        seen = {name: _with_gradient(each, flow.get(name)) for name, each in seen.items()}
    by_name = {site.name: site for site in sites}
    known = {(each.check, each.site) for each in findings}
    findings += [
        each
        for name, measured in seen.items()
        for each in _of_batches(by_name[name], measured)
        if (each.check, each.site) not in known
    ]
    broken = next((name for name, measured in seen.items() if not measured.finite), None)
    if broken is not None and not any((check, broken) in known for check in BROKEN):
        findings.append(finding("output-not-finite", broken, "the first norm with an output that is not finite"))
    norms = tuple(replace(norm, measured=seen.get(norm.name)) for norm in health.norms)
    depth = (*seen, *(name for name in health.depth if name not in seen))
    return Health(norms, ordered(findings), tuple(notes), count, told, depth)


def _of_batches(site: Site, measured: Measured) -> Iterator[Finding]:
    assert site.norm is not None
    yield from check_measured(site.name, site.norm, measured)
    yield from check_shapes(site.name, site.norm, measured.shapes, trains=True)


def _with_gradient(measured: Measured, flow: tuple[float, float] | None) -> Measured:
    if flow is None:
        return measured
    given, taken = flow
    return replace(measured, gradient=given, gain=taken / given if given else None)
