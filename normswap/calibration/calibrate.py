"""``calibrate``: the affines of converted norms set from unlabelled data, so that the model does what it did."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

from torch import nn

from normswap.calibration.batches import Forward, check_batches, check_runs
from normswap.calibration.fit import Method
from normswap.calibration.guard import EVERY, Again, Fitting
from normswap.calibration.layers import movable
from normswap.calibration.refine import refined
from normswap.calibration.report import ROUNDING, Calibration, Check, SiteFit
from normswap.calibration.run import Session
from normswap.calibration.sites import Left, NormSite, functional_as_modules, linear_sites, pairs
from normswap.calibration.trial import Trial
from normswap.calibration.write import Writes, of_layer, of_norm, write
from normswap.engine.sites import check_model
from normswap.errors import NormswapError, check_whole

Fit = Literal["auto", "moments", "least_squares"]
IN_FLIGHT = 4


def calibrate(
    model: nn.Module,
    reference: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    fit: Fit = "auto",
    passes: int = 1,
    in_flight: int = IN_FLIGHT,
    correct_biases: bool = True,
    refit_heads: bool = True,
    refine: int = 0,
    refine_layers: bool = False,
    check: bool = True,
) -> Calibration:
    """Set the affine of every converted norm of ``model``, in place, so that per channel its output is like that of the
    norm it replaced in ``reference``; and its running statistics, if it has any. No labels, no training.

    Norms are paired by name and fitted in the order in which they run, so that each sees the ones before it already
    fitted. ``batches``: any iterable of batches; a tensor or other object is the model's one argument, a tuple or list
    its positional arguments, a mapping its keyword arguments; ``forward(model, batch)`` runs it otherwise. It is gone
    through ``passes`` times; more than one, or ``refine``, needs an iterable that can be gone through again.
    ``in_flight`` batches are held at once: memory is that of their forward passes, about four times (the reference,
    and the model with each affine that is tried). ``fit``: ``"moments"``, ``"least_squares"``, or ``"auto"``, which
    tries both and takes the one whose model output is nearest the reference's, or leaves the affines as they were
    where that is nearer. ``correct_biases``: linear layers behind a fitted norm take up what is left of a shift of
    their mean in their bias. ``refit_heads``: linear layers behind the last fitted norm, weight and bias, are fitted to
    what they gave, see :mod:`normswap.calibration.heads`.

    ``refine``: that many steps of distillation, of the affines, on the output of the reference; then the heads are
    fitted again. With ``refine_layers`` it moves the weights of the other linear layers and 1 x 1 convolutions too,
    those that are the layer's own: the output comes nearer, and more inputs are needed to learn from.

    Under ``torch.distributed`` each process passes its own share of the data, and all get the same values: those of one
    process whose batches are theirs joined.

    Where the model's output is then further from the reference's than before, on every eighth batch run again, of fewer
    than eight on as many as are in flight and on all as they were fitted, or where nothing can be measured, all is put
    back, and the report's ``check`` says so; not with ``check=False``. Layers whose tensors other code reads too stay.

    Both models run in eval mode; flags, hooks, ``requires_grad``, random states, buffers are as before, and on an
    error the parameters too. Raises :class:`NormswapError` for misuse; what a ``forward`` raises comes through."""
    _check(model, reference, batches, fit, passes, in_flight, refine)
    if refine_layers and not refine:
        raise NormswapError("refine_layers=True is for a distillation: say how many steps, refine=500 for instance")
    with functional_as_modules(reference):
        sites, skips = pairs(model, reference)
        if not sites:
            return Calibration((), tuple(skips), "unchanged", {}, 0)
        _check_apart(sites, reference)
        linear = linear_sites(model, reference) if correct_biases or refit_heads else []
        session = Session(
            model, reference, sites, linear, forward, in_flight, biases=correct_biases, refit_heads=refit_heads
        )
        methods = _methods(sites, fit)
        fitting = Fitting(batches, in_flight if check else 0, session.keep, session.kept)
        copied = Trial("unchanged", None, sites, linear)
        fits = [Trial(method, method, sites, linear) for method in methods]
        for _ in range(passes):
            for trial in (copied, *fits):
                trial.next_pass()
            session.go_through(fitting, [copied, *fits])
        scores = {trial.name: trial.agreement.score() for trial in (copied, *fits)}
        if session.order and not any(copied.reached(index) for index in session.order):
            raise NormswapError("batches have no samples: calibration needs at least one")
        _check_finite(session, fits, scores)
        taken = fits[0] if fit != "auto" or math.isnan(scores[copied.name]) else _best([copied, *fits], scores)
        if refine:
            heads = [linear[i] for i in session.heads or ()]
            layers = movable(model, reference, heads) if refine_layers else ()
            better = refined(session, taken, fitting, refine, layers)
            scores["refined"] = better.agreement.score()
            taken = _best([taken, better], scores)
        changed = [] if taken is copied else [i for i in range(len(linear)) if taken.corrects(i)]
        checked = None
        if taken is not copied and not check:
            write(_writes(session, taken, changed))
        elif taken is not copied:
            checked = _write_checked(session, taken, changed, scores, fitting.held)
            if checked.put_back:
                taken, changed = copied, []
        refitted = {i for i in changed if taken.corrections[i].weight is not None}
        biases, refits = (tuple(linear[i].name for i in changed if (i in refitted) is which) for which in (False, True))
        told = _told(session, taken, copied, skips)
        names = tuple(layer.name for layer in taken.moved)
        return Calibration(*told, taken.name, scores, session.batches, biases, refits, checked, names)


def _check(model: Any, reference: Any, batches: Any, fit: Any, passes: int, in_flight: int, refine: int) -> None:
    for each in (model, reference):
        check_model(each)
        check_runs(each)
    if model is reference:
        raise NormswapError("model and reference are the same object: the reference is the model before conversion")
    if fit not in get_args(Fit):
        raise NormswapError(f"fit={fit!r}; it is one of: {', '.join(get_args(Fit))}")
    for name, value, least in (("passes", passes, 1), ("in_flight", in_flight, 1), ("refine", refine, 0)):
        check_whole(name, value, least)
    again = f"passes={passes}" if passes > 1 else f"refine={refine}" if refine else None
    check_batches(batches, None if again is None else f"{again} goes over them again")


def _check_apart(sites: Sequence[NormSite], reference: nn.Module) -> None:
    theirs = {tensor.data_ptr() for tensor in (*reference.parameters(), *reference.buffers()) if tensor.numel()}
    for site in sites:
        for name, tensor in site.norm.tensors.items():
            if not tensor.is_meta and tensor.numel() and tensor.data_ptr() in theirs:
                raise NormswapError(
                    f"{site.name}: its {name} is the reference's own, which calibration would change; "
                    "keep a copy.deepcopy of the model as the reference before converting in place"
                )


def _methods(sites: Sequence[NormSite], fit: Fit) -> tuple[Method, ...]:
    """Those to try; they differ only for a norm with weight and bias."""
    if fit != "auto":
        return (fit,)
    if any(site.norm.weight is not None and site.norm.bias is not None for site in sites):
        return ("moments", "least_squares")
    return ("least_squares",)


def _best(trials: Sequence[Trial], scores: dict[str, float]) -> Trial:
    """The one with the best score; the earlier one where the later is not better by more than rounding, or where
    nothing was measured."""
    best = trials[0]
    for trial in trials[1:]:
        if scores[trial.name] > scores[best.name] + ROUNDING:
            best = trial
    return best


def _write_checked(
    session: Session, taken: Trial, changed: Sequence[int], scores: dict[str, float], held: list[Any]
) -> Check:
    """Write what was fitted, and take it back where the model is further from the reference than before."""
    fitted = Check(taken.name, scores["unchanged"], scores[taken.name], 0)
    if fitted.put_back and (session.batches < EVERY or math.isnan(fitted.before)):
        return fitted
    writes = _writes(session, taken, changed)
    there = Again(session, held)
    saved = [(tensor, tensor.detach().clone()) for tensor, _ in writes]
    kept = False
    try:
        write(writes)
        check = Check(taken.name, there.before(), there.after(), there.count)
        if math.isnan(check.before):
            check = fitted
        kept = not check.put_back
    finally:
        if not kept:
            write(saved)
    return check


def _check_finite(session: Session, fits: Sequence[Trial], scores: dict[str, float]) -> None:
    """Raise :class:`NormswapError` where the output is broken or not measured for values that are not finite."""
    for trial in fits:
        if not math.isfinite(scores[trial.name]):
            _writes(session, trial, ())


def _writes(session: Session, taken: Trial, changed: Sequence[int]) -> Writes:
    writes: Writes = []
    for index, site in enumerate(session.sites):
        if taken.reached(index):
            taken.check_statistics(index)
            writes += of_norm(site, taken.values[index], session.batches)
    for index in changed:
        writes += of_layer(session.linear[index], taken.corrections[index])
    for layer in taken.moved:
        writes += layer.writes()
    return writes


def _told(
    session: Session, taken: Trial, copied: Trial, skips: Sequence[Left]
) -> tuple[tuple[SiteFit, ...], tuple[Left, ...]]:
    """The fitted norms in execution order, and those that were not."""
    fits: list[SiteFit] = []
    for index in session.order:
        site = session.sites[index]
        if taken.reached(index):
            assert site.source is not None
            fits.append(SiteFit(site.name, site.source, site.norm, copied.r2(index), taken.r2(index)))
    done = {fit.name for fit in fits}
    unreached = (Left(site.name, "it did not run on the batches") for site in session.sites if site.name not in done)
    return tuple(fits), (*skips, *unreached)
