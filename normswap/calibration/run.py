"""Trials run side by side over the batches, in step with the reference.

Each batch in flight is one forward pass of the reference and one of the model for each trial. All of them wait at each
site; its sums are taken, its affine is fitted, and all go on with what the fit gives. So the whole data is gone through
once, and what comes behind a site sees it as it will be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from normswap.calibration import processes
from normswap.calibration.agreement import Agreement
from normswap.calibration.batches import Forward, run, windows
from normswap.calibration.fit import Sums, Values, sums
from normswap.calibration.heads import Correction
from normswap.calibration.lockstep import Pass, current
from normswap.calibration.overlay import Base, Overlay
from normswap.calibration.sites import LinearSite, NormSite
from normswap.calibration.taps import tapped, watched
from normswap.calibration.trial import Trial
from normswap.errors import NormswapError
from normswap.graph.observe import eval_mode
from normswap.graph.trace import Reads

Waits = tuple[Hashable, int]


class Session:
    """Runs trials of a model on batches; models and tensors are left as they were."""

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module | None,
        sites: Sequence[NormSite],
        linear: Sequence[LinearSite],
        forward: Forward | None,
        in_flight: int,
        *,
        biases: bool = True,
        refit_heads: bool = False,
    ) -> None:
        self.model, self.reference = model, reference
        self.sites, self.linear = sites, linear
        self.forward, self.in_flight = forward, in_flight
        self.order: dict[int, None] = {}
        """Indexes of the sites in the order in which they were first reached."""
        self.batches = 0
        """The number of batches of all processes in the last pass over the data."""
        self.biases = biases
        self.refit_heads = refit_heads
        self.keep: list[Any] = []
        """Batches, some of those to come, of which the outputs are kept."""
        self.kept: list[tuple[Any, Any]] = []
        """Of each of ``keep`` the output of the reference, and that of the first trial."""
        self.heads: frozenset[int] | None = None
        """Indexes of the layers behind all fitted norms, once they are known."""
        self.read_elsewhere: frozenset[int] = frozenset()
        """Indexes of the layers that stay as they are, for what reads their tensors too would change."""

    def go_through(self, batches: Iterable[Any], trials: Sequence[Trial]) -> None:
        """One pass over the data. Raises :class:`NormswapError` for data without a batch; what a ``forward`` raises
        comes through."""
        with ExitStack() as stack:
            stack.enter_context(eval_mode(self.model))
            parts = windows(batches, self.in_flight)
            window = next(parts, [])
            if self.reference is not None:
                stack.enter_context(eval_mode(self.reference))
                self._find_heads(window)
                stack.enter_context(watched(self.sites, self.linear, _watch))
            affine = None if self.reference is None else _affine
            stack.enter_context(tapped(self.sites, self.linear, _statistics, affine, _correct))
            self.batches = 0
            while count := sum(processes.gathered(len(window))):
                self.batches += count
                self._window(window, trials)
                window = next(parts, [])
            for trial in trials:
                trial.finish()
        if not self.batches:
            raise NormswapError("batches is empty: calibration needs at least one")

    def _find_heads(self, window: Sequence[Any]) -> None:
        """Run the reference once to see which layers run once and behind all fitted norms, and which have tensors that
        code other than their own reads. In all processes the same."""
        if self.heads is not None:
            return
        here: tuple[list[int], list[int]] | None = None
        if self.linear and window and self.reference is not None:
            ran: list[tuple[str, int]] = []
            seen = watched(self.sites, self.linear, lambda kind, index, value: ran.append((kind, index)))
            reads = Reads()
            try:
                with seen, reads:
                    run(self.reference, window[0], self.forward)
            except Exception:  # it comes again in the pass, where all processes hear of it
                ran.clear()
            calls = Counter(index for kind, index in ran if kind == "linear")
            read = [
                index
                for index, layer in enumerate(self.linear)
                if any(reads.found[id(tensor)] > calls[index] for tensor in layer.originals)
            ]
            last = max((place for place, (kind, _) in enumerate(ran) if kind == "norm"), default=len(ran))
            behind = [index for _, index in ran[last + 1 :] if calls[index] == 1 and index not in read]
            here = [index for index in behind if self.linear[index].weight is not None], read
        told = [found for found in processes.gathered(here) if found is not None]
        heads, read = told[0] if told else ([], [])
        self.heads = frozenset(heads if self.refit_heads else ())
        self.read_elsewhere = frozenset(read)

    def _window(self, batches: Sequence[Any], trials: Sequence[Trial]) -> None:
        own = [tensor for site in self.sites for tensor in site.norm.tensors.values()]
        base = Base(self.model, own)
        originals = [] if self.reference is None else self._passes(Base(self.reference), "reference", batches)
        tried = {trial.name: self._passes(base, trial.name, batches) for trial in trials}
        passes = [one for each in tried.values() for one in each]
        kept: dict[tuple[int, Waits], Tensor] = {}
        try:
            _advance([(one, None) for one in passes])
            while (waits := _next(passes)) is not None:
                self._meet(waits, trials, tried, originals, kept)
            _advance([(one, None) for one in originals], to_the_end=True)
        finally:
            for one in (*passes, *originals):
                one.abandon()
        for trial in trials:
            if self.heads and trial.fits_heads_now:
                trial.agreement = Agreement()  # what it gave with heads of fewer inputs says little
            trial.window += 1
            for one, original in zip(tried[trial.name], originals, strict=bool(originals)):
                trial.agreement.add(one.result, original.result)
        for batch, one, original in zip(batches, tried[trials[0].name], originals, strict=bool(originals)):
            if any(batch is each for each in self.keep[len(self.kept) :]):
                self.kept.append((original.result, one.result))

    def _passes(self, base: Base, name: str, batches: Sequence[Any]) -> list[Pass]:
        return [
            Pass(lambda batch=batch: run(base.model, batch, self.forward), name, index, Overlay(base))  # type: ignore[misc]
            for index, batch in enumerate(batches)
        ]

    def _meet(
        self,
        waits: Waits,
        trials: Sequence[Trial],
        tried: dict[str, list[Pass]],
        originals: Sequence[Pass],
        kept: dict[tuple[int, Waits], Tensor],
    ) -> None:
        key: Any = waits[0]
        kind, index = key
        if kind != "linear":
            self.order[index] = None
        here = {name: [one for one in each if one.waits == waits] for name, each in tried.items()}
        head = kind == "linear" and index in (self.heads or ())
        if head or kind != "linear" or (self.biases and index not in self.read_elsewhere):
            present = sorted({one.batch for each in here.values() for one in each})
            theirs = {
                batch: None if kind == "statistics" else _original(originals[batch], waits, kept) for batch in present
            }
            if head:
                self._meet_head(index, trials, here, theirs)
            else:
                self._meet_sums(waits, trials, here, theirs)
        _advance([(one, trial.answer(kind, index)) for trial in trials for one in here[trial.name]])

    def _meet_head(
        self, index: int, trials: Sequence[Trial], here: dict[str, list[Pass]], theirs: dict[int, Tensor | None]
    ) -> None:
        for trial in trials:
            if trial.refits:
                met = [
                    (*one.value, original) for one in here[trial.name] if (original := theirs[one.batch]) is not None
                ]
                trial.solve_head(index, met)

    def _meet_sums(
        self, waits: Waits, trials: Sequence[Trial], here: dict[str, list[Pass]], theirs: dict[int, Tensor | None]
    ) -> None:
        key: Any = waits[0]
        kind, index = key
        layout = (self.linear if kind == "linear" else self.sites)[index].layout
        met: dict[str, list[Sums]] = {name: [] for name in here}
        for batch, original in theirs.items():
            if kind == "statistics" or original is not None:
                there = [one for each in here.values() for one in each if one.batch == batch]
                values = [one.value[1] if kind == "linear" else one.value for one in there]
                for one, found in zip(there, sums(layout, values, original), strict=True):
                    met[one.name].append(found)
        for trial in trials:
            trial.solve(kind, index, waits[1], met[trial.name])


def _advance(passes: Sequence[tuple[Pass, Any]], to_the_end: bool = False) -> None:
    """Resume passes with their answers. With several processes, one that fails makes all raise."""
    error: BaseException | None = None
    try:
        for one, answer in passes:
            one.resume(answer)
            while to_the_end and not one.done:
                one.resume()
    except BaseException as raised:
        if not processes.several():
            raise
        error = raised
    processes.fail_together(error)


def _next(passes: Sequence[Pass]) -> Waits | None:
    """Where the passes that have met the fewest sites stand, in all processes the same; ``None`` once all ended."""
    standing = [(sum(one.calls.values()), one.waits) for one in passes if one.waits is not None]
    first = min(standing, key=lambda item: item[0], default=None)
    everywhere = [item for item in processes.gathered(first) if item is not None]
    return min(everywhere, key=lambda item: item[0])[1] if everywhere else None


def _original(one: Pass, waits: Waits, kept: dict[tuple[int, Waits], Tensor]) -> Tensor | None:
    """The reference's output there; what it computes before is kept until it is asked for."""
    if (one.batch, waits) in kept:
        return kept.pop((one.batch, waits))
    while not one.done and one.waits != waits:
        if one.waits is not None and one.value is not None:
            kept[(one.batch, one.waits)] = one.value.clone()  # later code may write over it
        one.resume()
    if one.done:
        return None
    value: Tensor = one.value
    one.value = None
    return value


def _meeting() -> Pass:
    one = current()
    if one is None:
        raise NormswapError("a norm ran in a thread that the model started itself; calibrate the model inside it")
    return one


def _behind_a_norm(one: Pass) -> bool:
    return any(key[0] == "norm" for key in one.calls)  # type: ignore[index]


def _statistics(index: int, x: Tensor) -> Values | None:
    values: Values = _meeting().meet(("statistics", index), x.detach())
    return values


def _affine(index: int, z: Tensor) -> tuple[Tensor, Tensor]:
    values: Values = _meeting().meet(("norm", index), z)
    return values.weight, values.bias


def _correct(index: int, x: Tensor, output: Tensor) -> Tensor:
    one = _meeting()
    if not _behind_a_norm(one):
        return output
    correction: Correction = one.meet(("linear", index), (x, output))
    return correction.applied(x, output)


def _watch(kind: str, index: int, value: Any) -> None:
    one = _meeting()
    if kind == "norm" or _behind_a_norm(one):
        one.meet((kind, index), value().detach())
