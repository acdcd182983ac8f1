"""Whether a candidate computes what a reference does; the measure is that of :mod:`normswap.verification.criterion`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from normswap.errors import NormswapError
from normswap.graph.reach import is_compiled_wrapper
from normswap.onnx.export import check_eval, check_inputs, export, isolated, one_line, training_modules
from normswap.verification.criterion import Tolerance, judge, without_zeros
from normswap.verification.diagnose import Diagnosis
from normswap.verification.inputs import Arguments, Freedom, Variation, Variations, load_inputs
from normswap.verification.measures import Measured, Row, measure
from normswap.verification.outputs import Outputs, finite, named_like, plain
from normswap.verification.reference import Answers, Reference
from normswap.verification.result import Verification
from normswap.verification.runners import EagerRunner, OnnxRunner, Program, Runner, batch_is_open, freedom_of, opened

Backend = Literal["onnxruntime", "eager"]
Data = str | os.PathLike[str] | Iterable[Arguments]


def verify(
    reference: Program,
    candidate: Program,
    example_inputs: Arguments | None = None,
    *,
    backend: Backend = "onnxruntime",
    data: Data = (),
    atol: float | Mapping[str, float] | None = None,
    rtol: float | Mapping[str, float] | None = None,
    vary: bool = True,
    layers: bool = False,
) -> Verification:
    """Compare ``candidate`` with ``reference``.

    Each is a module, a program of ``torch.export``, or the path of an ``.onnx`` or a ``.pt2`` file that takes the
    tensors of ``example_inputs`` in their order. A candidate that is a module is run as it is and, with
    ``backend="onnxruntime"``, exported without optimization and run in ONNX Runtime (on the CPU) twice, with graph
    optimizations off and on, like an ``.onnx`` file; ``"eager"`` only runs it as it is. A program of ``torch.export``
    is run as its module.

    ``example_inputs`` are the positional arguments of one call; seeded random ones of other magnitudes and batch sizes
    are tried beside them, and of other spatial sizes where an ``.onnx`` file leaves those open, as far as the
    reference takes them; ``vary=False`` leaves those out. ``data`` are further sets of inputs, or the path of a
    ``.npy``, ``.npz`` or ``.pt`` file of them (:func:`load_inputs`); without ``example_inputs`` its first set is taken
    for those. Models are copied first, and none is changed; ``"eager"`` compares them in the mode they are in.

    ``atol`` and ``rtol``, one for all outputs or a mapping by output name, replace the criterion by
    ``|candidate - reference| <= atol + rtol * |reference|`` for every value, one that is not given being 0.

    Where a run differs, its ``locations`` say where it first does, and its ``profiles`` hold the error along the depth;
    ``layers=True`` asks for the profiles of equivalent runs too. Seeing into a run keeps all of its values in memory.

    Raises :class:`NormswapError` for misuse: wrong types, a reference that fails on ``example_inputs`` or ``data``, a
    tolerance for an output that is not there, and for ``"onnxruntime"`` a model in train mode, one that cannot be
    exported, and a file that ONNX Runtime cannot load or that takes other inputs. A candidate that fails where the
    reference runs is not equivalent; the report says why.
    """
    if backend not in ("onnxruntime", "eager"):
        raise NormswapError(f"unknown backend {backend!r}; the backends are: onnxruntime, eager")
    if example_inputs is not None:
        check_inputs(example_inputs)
    more = _sets(data)
    if example_inputs is None:
        if not more:
            raise NormswapError("there is nothing to run on: pass example_inputs, or data")
        (_, example_inputs), *more = more
    tolerance = Tolerance(atol, rtol)
    with tempfile.TemporaryDirectory() as folder:
        comparison = _Comparison(opened(reference), opened(candidate), example_inputs, backend, Path(folder))
        comparison.check_modes(candidate)
        return comparison.run(more, tolerance, vary=vary, layers=layers)


def _sets(data: Data) -> list[tuple[str, Arguments]]:
    if isinstance(data, str | os.PathLike):
        return load_inputs(data)
    sets = list(data)
    for inputs in sets:
        check_inputs(inputs)
    return [(f"data [{index}]", inputs) for index, inputs in enumerate(sets)]


@dataclass
class _Comparison:
    reference: nn.Module | Path
    candidate: nn.Module | Path
    example_inputs: Arguments
    backend: Backend
    folder: Path

    def __post_init__(self) -> None:
        self.notes: list[str] = []
        self.sets: dict[str, Arguments] = {}
        """The sets of inputs that were compared, by name."""

    def check_modes(self, given: object) -> None:
        """Refuse, or note, what is compared in train mode."""
        if isinstance(self.candidate, Path) and self.backend == "eager":
            raise NormswapError(f"{given}: a file is run by ONNX Runtime; use backend='onnxruntime'")
        for role, model in (("reference", self.reference), ("candidate", self.candidate)):
            if isinstance(model, Path):
                continue
            if is_compiled_wrapper(model) or any(vars(m).get("_compiled_call_impl") for m in model.modules()):
                self.notes.append(f"the {role} is compiled; the code it was compiled from is what is compared")
            if self.backend == "onnxruntime":
                check_eval(model, f"verify with ONNX Runtime (the {role})")
            elif training := training_modules(model):
                first = training[0] or "the model itself"
                self.notes.append(f"the {role} is compared in train mode ({first}; {len(training)} modules in all)")

    def run(
        self, more: Sequence[tuple[str, Arguments]], tolerance: Tolerance, *, vary: bool, layers: bool
    ) -> Verification:
        truth = self._truth()
        truth.first(self.example_inputs)
        assert truth.given is not None
        tolerance.check(list(truth.given.own))
        runners = self._runners()
        variations = Variations(self.example_inputs, more, self._freedom(runners), vary=vary)
        found, kept = self._measured(truth, runners, variations, tolerance)
        self.notes += [*variations.notes, *truth.notes]
        rows = self._settled(truth, runners, found, {each.name: each for each in kept}, tolerance)
        rows = without_zeros(rows, self.notes)
        if not rows:
            self.notes.append("the reference returns no tensor, so nothing was compared")
        own = {variation.name for variation in kept if variation.seed is None}
        given = [row for row in rows if row.inputs in own]
        equivalent = bool(given) and all(row.verdict == "equivalent" for row in given)
        equivalent = equivalent and all(row.verdict != "different" for row in rows)
        tensors = [name for name, value in truth.given.own.items() if isinstance(value, Tensor)]
        diagnosis = Diagnosis(truth, rows, self.sets, tensors)
        if layers or not equivalent:
            diagnosis.look(runners, layers=layers)
        notes = tuple(dict.fromkeys([*self.notes, *diagnosis.notes]))
        places, profiles = tuple(diagnosis.locations), tuple(diagnosis.profiles)
        criterion = _criterion(truth, tolerance)
        return Verification(equivalent, self.backend, criterion, tuple(rows), tuple(kept), notes, places, profiles)

    def _truth(self) -> Reference:
        if isinstance(self.reference, nn.Module):
            return Reference(self.reference)
        runner = OnnxRunner(self.reference, optimized=False)
        runner.check(self.example_inputs)
        return Reference(None, runner.named, self.reference)

    def _runners(self) -> list[Runner]:
        runners: list[Runner] = []
        if isinstance(self.candidate, nn.Module):
            runners.append(
                EagerRunner(isolated(self.candidate, share=False), freedom=Freedom(batch_is_open(self.candidate)))
            )
            if self.backend == "eager":
                return runners
            path = self.folder / "candidate.onnx"
            try:
                export(self.candidate, path, self.example_inputs, optimize=False, dynamic=True)
            except NormswapError as error:
                export(self.candidate, path, self.example_inputs, optimize=False)
                reason = str(error).replace(f"{path}: ", "")
                self.notes.append(f"only the given batch size is tried: {reason}")
        else:
            path = self.candidate
        for optimized in (False, True):
            runner = OnnxRunner(path, optimized=optimized)
            runner.check(self.example_inputs)
            runners.append(runner)
        return runners

    def _freedom(self, runners: Sequence[Runner]) -> Freedom:
        free = freedom_of(runners)
        known = isinstance(self.reference, Path) or batch_is_open(self.reference)
        return free if known else replace(free, batch=False)

    def _measured(
        self, truth: Reference, runners: Sequence[Runner], variations: Variations, tolerance: Tolerance
    ) -> tuple[list[Measured], list[Variation]]:
        found: list[Measured] = []
        kept: list[Variation] = []
        for variation, inputs in variations:
            try:
                answers = truth(variation, inputs)
            except Exception as error:
                if variation.seed is None:
                    raise NormswapError(
                        f"the reference {truth.name} fails on {variation.name}: {one_line(error)}"
                    ) from error
                told = f"{variation.name}: left out, the reference does not take them ({one_line(error)})"
                self.notes.append(told)
                continue
            if (
                variation.seed is not None
                and not finite(answers.wide)
                and (truth.given is None or finite(truth.given.wide))
            ):
                self.notes.append(f"{variation.name}: left out, the reference is not finite on them")
                continue
            kept.append(variation)
            self.sets[variation.name] = inputs
            found += self._compared(truth, answers, runners, variation, tolerance)
        return found, kept

    def _compared(
        self, truth: Reference, answers: Answers, runners: Sequence[Runner], variation: Variation, tolerance: Tolerance
    ) -> list[Measured]:
        found: list[Measured] = []
        for runner in runners:
            blank = Row(runner.name, "", variation.name)
            try:
                got = runner(self.sets[variation.name], answers.own)
                if truth.path is not None:  # A file has names of its own for its outputs.
                    got = named_like((v for v in got.values() if isinstance(v, Tensor)), answers.own)
            except Exception as error:
                found.append(Measured(replace(blank, output="(all)", problem=f"failed: {one_line(error)}")))
                continue
            found.extend(_outputs(blank, answers, got, tolerance, self.notes))
        return found

    def _settled(
        self,
        truth: Reference,
        runners: Sequence[Runner],
        found: list[Measured],
        kept: Mapping[str, Variation],
        tolerance: Tolerance,
    ) -> list[Row]:
        """The rows, after more samples of rounding for what is over its floor, until one set is so even then."""
        rows, order = judge(found), list(kept)
        while True:
            different = [row for row in rows if row.verdict == "different"]
            if not different or any(row.floor is None or row.allowed is None or row.problem for row in different):
                return rows  # Nothing that more samples could change.
            worst = max(different, key=lambda row: row.excess).inputs
            try:
                answers = truth.nearby(truth(kept[worst], self.sets[worst]), self.sets[worst])
            except Exception as error:
                self.notes.append(f"there is one sample of rounding only: {one_line(error)}")
                return rows
            again = self._compared(truth, answers, runners, kept[worst], tolerance)
            others = [each for each in found if each.row.inputs != worst]
            found = sorted([*others, *again], key=lambda each: order.index(each.row.inputs))
            before, rows = rows, judge(found)
            if any(row.verdict == "different" for row in rows if row.inputs == worst):
                return before
            self.notes.append(
                f"{worst}: the reference's own error there is low by luck; the floor is that of the reference with its "
                "weights and buffers a rounding away"
            )


def _criterion(truth: Reference, tolerance: Tolerance) -> str:
    if not tolerance:
        return truth.criterion
    told = f"|candidate - reference| at most atol ({tolerance.atol}) + rtol ({tolerance.rtol}) * |reference|"
    partial = any(tolerance.of(name) is None for name in (truth.given.own if truth.given else ()))
    return f"{told}; where neither is given: {truth.criterion}" if partial else told


def _outputs(blank: Row, answers: Answers, got: Outputs, tolerance: Tolerance, notes: list[str]) -> Iterator[Measured]:
    """One row for every output that either side has."""
    own = answers.own
    for name in [name for name in own if name not in got]:
        yield Measured(replace(blank, output=name, problem="the candidate does not have this output"))
    for name, value in got.items():
        row = replace(blank, output=name)
        if name not in own:
            yield Measured(replace(row, problem="the reference does not have this output"))
            continue
        expected = own[name]
        if not isinstance(expected, Tensor) or not isinstance(value, Tensor):
            if type(expected) is type(value) and not plain(value):
                notes.append(f"{name} is a {type(value).__name__}, which is not compared")
            elif type(expected) is not type(value) or expected != value:
                problem = f"{_short(value)} instead of {_short(expected)}"
                yield Measured(replace(row, dtype=type(value).__name__, problem=problem))
            continue
        row = replace(row, shape=tuple(value.shape), dtype=str(value.dtype).removeprefix("torch."))
        if value.shape != expected.shape:
            yield Measured(replace(row, problem=f"shape {tuple(value.shape)} instead of {tuple(expected.shape)}"))
        elif value.dtype != expected.dtype:
            yield Measured(replace(row, problem=f"{value.dtype} instead of {expected.dtype}"))
        else:
            wide, noise = answers.wide.get(name), answers.noise.get(name)
            others = [other.get(name) for other in answers.others]
            yield measure(row, expected, wide, noise, value, tolerance.of(name), answers.coarsest, others)


def _short(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:60]
