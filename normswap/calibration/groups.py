"""Group counts by measurement: each norm gets as many groups as keep what it computed.

For every count, the original norm's output is regressed on the group-normalized input, channel by channel, over the
batches; R² says how much of it such a norm can explain with the best affine. Taken is the largest count (nearest to the
usual 32) that comes within :data:`SLACK` of the best."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normswap.calibration import processes
from normswap.calibration.batches import Forward, check_batches, check_runs, run
from normswap.calibration.fit import Sums, Values, explained, fitted, sums
from normswap.calibration.sites import NormSite, device_of
from normswap.calibration.taps import first_tensor
from normswap.engine.convert import Init, plan_convert
from normswap.engine.plan import Change, Plan
from normswap.engine.select import Selector
from normswap.engine.sites import check_model
from normswap.errors import NormswapError
from normswap.graph.observe import eval_mode
from normswap.norms.batch import eps_of
from normswap.norms.group import nearest_count

SLACK = 0.01
COUNTS = (1, 2, 4, 8, 16, 32, 64)


def plan_groups(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    where: Selector = None,
    skip: Selector = None,
    example_inputs: tuple[Any, ...] | None = None,
    init: Init = "copy",
    forward: Forward | None = None,
) -> Plan:
    """Plan the conversion of every norm to ``group`` with a count of its own, chosen on ``batches`` (see
    :func:`normswap.calibrate`; gone through once); the notes say what each count explains. A norm that is a function
    call, or does not run on the batches, gets the usual count.

    The model runs in eval mode and is left as it was. Raises what :func:`normswap.plan_convert` and
    :func:`normswap.calibrate` raise."""
    check_model(model)
    check_runs(model)
    check_batches(batches)
    base = plan_convert(model, "group", where=where, skip=skip, example_inputs=example_inputs, init=init)
    shares = _measured(model, [change for change in base.changes if not change.functional], batches, forward)
    chosen = {name: _chosen(by_count) for name, by_count in shares.items() if by_count}
    settled: dict[str, Change] = {}
    for count in sorted(set(chosen.values())):
        names = {name for name, taken in chosen.items() if taken == count}
        plan = plan_convert(
            model,
            "group",
            where=lambda name, norm, names=names: name in names,  # type: ignore[misc]
            example_inputs=example_inputs,
            init=init,
            groups=count,
        )
        settled.update((change.name, change) for change in plan.changes)
    base.changes[:] = [
        replace(change, notes=(*change.notes, _note(shares[change.name])))
        if (change := settled.get(old.name, old)) is not old
        else old
        for old in base.changes
    ]
    return base


def _counts(channels: int) -> list[int]:
    usual = {count for count in COUNTS if channels % count == 0 and channels // count >= 2}
    return sorted(usual | {nearest_count(channels, 2)})


def _chosen(shares: dict[int, float]) -> int:
    best = max(shares.values())
    return max(count for count, share in shares.items() if share >= best - SLACK)


def _note(shares: dict[int, float]) -> str:
    return "R² by groups: " + ", ".join(f"{count}: {share:.3f}" for count, share in shares.items())


def _measured(
    model: nn.Module, changes: Sequence[Change], batches: Iterable[Any], forward: Forward | None
) -> dict[str, dict[int, float]]:
    """R² by group count, for every norm that ran."""
    sites = [NormSite(c.name, model.get_submodule(c.name), c.target, None, c.source) for c in changes]
    totals = {
        site.name: {count: Sums.zero(site.layout.size, device_of(site.norm)) for count in _counts(site.norm.channels)}
        for site in sites
    }
    ran = 0
    handles = [
        site.module.register_forward_hook(_measuring(site, totals[site.name]), with_kwargs=True, prepend=True)
        for site in sites
    ]
    try:
        with eval_mode(model):
            for batch in batches:
                run(model, batch, forward)
                ran += 1
    finally:
        for handle in handles:
            handle.remove()
    if not sum(processes.gathered(ran)):
        raise NormswapError("batches is empty: choosing the groups needs at least one")
    return {
        name: shares
        for name, by_count in totals.items()
        if (shares := {count: share for count, total in by_count.items() if (share := _share(total)) is not None})
    }


def _measuring(site: NormSite, totals: dict[int, Sums]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        x = first_tensor(args, kwargs)
        original = site.original_output(x, output)
        several = [F.group_norm(x, count, eps=eps_of(site.norm)) for count in totals]
        for count, found in zip(totals, sums(site.layout, several, original), strict=True):
            totals[count] += found

    return hook


def _share(total: Sums) -> float | None:
    packed = processes.total(torch.cat([total.count.reshape(1), total.values.flatten()]))
    whole = Sums(packed[0], packed[1:].reshape(5, -1))
    if not whole.count:
        return None
    neutral = Values(torch.ones_like(whole.values[0]), torch.zeros_like(whole.values[0]))
    share = explained(whole, fitted(whole, "least_squares", neutral, True, True))
    return None if share != share else share
