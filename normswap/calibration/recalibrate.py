"""``recalibrate``: running statistics from data, pooled exactly, instead of a moving average.

A moving average forgets, weighs the last batches most, and is off after weight averaging, EMA or pruning. Here mean and
variance of each norm's input are those of all samples and positions of all batches, of whatever sizes, as if they were
one batch; the variance is the unbiased one, as in torch. Norms are set in the order in which they run, each on the
output of those already set, as they will run in eval mode."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from normswap.calibration.batches import Forward, check_batches, check_runs
from normswap.calibration.calibrate import IN_FLIGHT
from normswap.calibration.fit import Values
from normswap.calibration.report import Estimate, Recalibration
from normswap.calibration.run import Session
from normswap.calibration.sites import Left, NormSite, parameter_users, unfit
from normswap.calibration.trial import Trial
from normswap.calibration.write import of_norm, write
from normswap.engine.sites import Site, check_model, survey
from normswap.errors import check_whole
from normswap.graph.references import references


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    passes: int = 1,
    in_flight: int = IN_FLIGHT,
) -> Recalibration:
    """Estimate the running statistics of every norm of ``model`` that keeps them anew, in place.

    ``batches``, ``forward``, ``passes``, ``in_flight`` and the processes of ``torch.distributed``: as in
    :func:`normswap.calibrate`. With more batches than ``in_flight``, a norm's statistics of the first ones rest on
    estimates of the norms before it that have not seen all data yet; a second pass mends that. Frozen norms, and those
    put in eval mode in a model that trains, stay as they are. Nothing else changes: not momentum, flags, affine, or
    random states; and on an error nothing at all. ``num_batches_tracked`` becomes the number of batches. Raises
    :class:`NormswapError` for misuse; what a ``forward`` raises comes through."""
    check_model(model)
    check_runs(model)
    check_whole("passes", passes)
    check_whole("in_flight", in_flight)
    check_batches(batches, f"passes={passes} goes over them again" if passes > 1 else None)
    sites: list[NormSite] = []
    skips: list[Left] = []
    users = parameter_users(model)
    for site in survey(references(model)):
        reason = _left(site, model, users)
        if reason is not None:
            skips.append(Left(site.name, reason))
            continue
        assert site.norm is not None
        sites.append(NormSite(site.name, site.module, site.norm, None, None))
    if not sites:
        return Recalibration((), tuple(skips), 0)
    session = Session(model, None, sites, (), forward, in_flight)
    trial = Trial("statistics", "moments", sites, ())
    for _ in range(passes):
        trial.next_pass()
        session.go_through(batches, [trial])
    reached = list(session.order)
    for index in reached:
        trial.check_statistics(index)
    writes = [item for index in reached for item in of_norm(sites[index], trial.values[index], session.batches)]
    estimates = [_estimate(sites[i], trial.initial[i], trial.values[i]) for i in reached]
    write(writes)
    done = {estimate.name for estimate in estimates}
    skips += [Left(site.name, "it did not run on the batches") for site in sites if site.name not in done]
    return Recalibration(tuple(estimates), tuple(skips), session.batches)


def _left(site: Site, model: nn.Module, users: dict[int, int]) -> str | None:
    norm = site.norm
    if norm is None:
        return f"what it computes is not known: {site.reason}"
    if norm.fixed:
        return "it is frozen"
    if not norm.has_statistics:
        return "it has no running statistics"
    if "batch" not in norm.pools:
        return f"the running statistics of {norm.kind} are averages over samples, not moments of the data"
    if site.functional:
        return "it is a function call; only modules are set"
    if not site.module.training and any(module.training for module in model.modules()):
        return "it is in eval mode in a model that trains: frozen"
    return unfit(site, users)


def _estimate(site: NormSite, old: Values, new: Values) -> Estimate:
    assert old.mean is not None
    assert old.var is not None
    assert new.mean is not None
    assert new.var is not None
    tiny = 1e-30
    shift = ((new.mean - old.mean).square() / new.var.clamp(min=tiny)).mean().sqrt()
    ratio = (new.var.clamp(min=tiny).log() - old.var.clamp(min=tiny).log()).mean().exp()
    return Estimate(site.name, site.norm, float(shift), float(ratio))
