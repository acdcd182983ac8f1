r"""Whether a candidate computes what a reference does, judged against rounding noise instead of a guessed tolerance.

Two programs for one function differ by rounding: they sum in another order, fuse a multiply with an add, approximate an
exponential by another polynomial. Rounding order differs between any two runtimes, so bit equality is not asked for,
and no fixed tolerance fits every depth and dtype. Instead, with :math:`t` the reference run in float64 (the *truth*),
:math:`r` the reference in its own dtype, :math:`c` the candidate and :math:`S = \max |t|` the scale of an output, the
reference's own relative error :math:`\max|r - t| / S` is its **noise floor**. The candidate is equivalent when, for
every output and every set of inputs,

.. math::  \max|c - t| / S \;\le\; F \cdot \text{floor} + U \cdot \epsilon

with :math:`F` = ``FACTOR``, :math:`U` = ``ULPS`` and :math:`\epsilon` the machine epsilon of the output's dtype.

- Luck can make a floor low or a value near zero. A floor or a scale below its median over all inputs is lifted to
  that median, and the floor of an output with fewer than ``FEW`` values to twice the largest one.
- A floor above :math:`\epsilon^{1/3}` (0.5 % of the scale in float32) can prove nothing: random or chaotic outputs are
  reported as *inconclusive*, which is not equivalent.
- For a float64 output the floor is that of the same model in float32, scaled by the ratio of the epsilons: to first
  order, rounding error is proportional to epsilon.
- Integer and boolean outputs: the error is the share of values that differ, with no :math:`U \epsilon`.
- Non-finite values must stand where the reference has them.
- Where a float64 run is impossible, :math:`r` stands for :math:`t` and the error must be at most
  :math:`\epsilon^{2/3}` (2.4e-5 in float32): a wider criterion, and the report says so.

The scale is that of a whole output tensor: an error confined to a channel much smaller than the others in the same
tensor is measured against the largest.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from normswap.errors import NormswapError
from normswap.onnx.export import check_eval, check_inputs, check_model, export, isolated, one_line, training_modules

FACTOR = 4.0
"""How many noise floors the candidate's error may reach.

Two correct programs stay below 2: measured on 14 torchvision and timm networks in float32, as they are and folded, in
eager mode and in ONNX Runtime with and without optimization, the largest was 1.94."""
FEW = 64
"""Below this many values the largest error of an output varies too much from one input to the next to be a measure."""
ULPS = 4.0
"""Machine epsilons of the output's scale that are allowed beside, for outputs whose own floor is zero."""

Outputs = dict[str, Any]


@dataclass(frozen=True)
class Variation:
    """One set of inputs: the given ones, or random ones of the same shapes (but for the batch) and dtypes."""

    name: str
    seed: int | None = None
    """Of the generator that drew them; ``None`` for the given inputs."""
    magnitude: float | None = None
    """Factor on normal values with the mean and deviation of the given ones."""
    batch: int | None = None
    """Size of the first axis where it is not the given one."""


@dataclass(frozen=True)
class Row:
    """One output of one run on one set of inputs."""

    run: str
    output: str
    inputs: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    max_abs: float = 0.0
    """Largest absolute error against the truth, over finite values."""
    noise: float | None = None
    """The same for the reference in its own dtype; ``None`` where it does not run in float64."""
    scale: float = 0.0
    """The truth's largest absolute value, or the median of those over all inputs where that is larger."""
    relative: float = 0.0
    """``max_abs / scale``; for integer and boolean outputs the share of values that differ."""
    floor: float | None = None
    """The reference's own relative error; ``None`` where it does not run in float64."""
    allowed: float = 0.0
    """What ``relative`` may be at most."""
    sqnr: float = math.inf
    """Signal to noise ratio in dB; infinite for no error."""
    agreement: float | None = None
    """For an output of shape (N, classes): share of rows with the truth's arg-max."""
    non_finite: int = 0
    """Values that are not finite where the reference's are, or the other way round."""
    verdict: Literal["equivalent", "different", "inconclusive"] = "different"
    problem: str | None = None
    """Why there is nothing to measure, or why the measure proves nothing."""


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found. Truthy when equivalent; ``str()`` is a report; :meth:`to_dict` goes to JSON."""

    equivalent: bool
    backend: str
    criterion: str
    rows: tuple[Row, ...]
    inputs: tuple[Variation, ...]
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.equivalent

    def to_dict(self) -> dict[str, Any]:
        """Everything in types that JSON has; a number that is not finite becomes ``None``."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    def __str__(self) -> str:
        verdict = "equivalent" if self.equivalent else "NOT equivalent"
        lines = [f"{verdict} on {len(self.inputs)} sets of inputs", f"criterion: {self.criterion}"]
        groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
        for row in self.rows:
            groups[row.run, row.output].append(row)
        table: list[tuple[str, ...]] = [
            ("run", "output", "max abs", "relative", "allowed", "floor", "SQNR dB", "top-1", "verdict")
        ]
        remarks = []
        for (run, output), rows in groups.items():
            worst = max(rows, key=_severity)
            table.append((run, output, *_cells(worst, rows)))
            count = sum(row.verdict == worst.verdict for row in rows)
            if worst.verdict != "equivalent":
                reason = worst.problem or f"{_excess(worst):.3g} times the allowed error"
                sets = f"{count} of {len(rows)} sets of inputs"
                remarks.append(f"{run}, {output}: {worst.verdict} on {sets}; on {worst.inputs}: {reason}")
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for cells in table:
            lines.append("  " + "  ".join(map(str.ljust, cells, widths)).rstrip())
        lines.extend(remarks)
        lines.append("inputs: " + "; ".join(variation.name for variation in self.inputs))
        lines.extend(f"note: {note}" for note in self.notes)
        return "\n".join(lines)


def _cells(worst: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    agreements = [row.agreement for row in rows if row.agreement is not None]
    numbers = (worst.max_abs, worst.relative, worst.allowed, worst.floor)
    top = f"{min(agreements):.1%}" if agreements else ""
    cells = ("" if number is None else f"{number:.2e}" for number in numbers)
    return (*cells, f"{worst.sqnr:.1f}", top, worst.verdict)


def _excess(row: Row) -> float:
    return row.relative / row.allowed if row.allowed else math.inf if row.relative else 0.0


def _plain(value: Any) -> Any:
    if isinstance(value, Row | Variation):
        return {key: _plain(entry) for key, entry in asdict(value).items()}
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _severity(row: Row) -> tuple[int, bool, float]:
    rank = {"equivalent": 0, "inconclusive": 1, "different": 2}[row.verdict]
    return rank, row.problem is not None, _excess(row)


def verify(
    reference: nn.Module,
    candidate: nn.Module | str | os.PathLike[str],
    example_inputs: tuple[Any, ...],
    *,
    backend: Literal["onnxruntime", "eager"] = "onnxruntime",
) -> Verification:
    """Compare ``candidate`` with ``reference`` by the criterion of this module.

    ``candidate`` is a module, or the path of an ``.onnx`` file that takes the tensors of ``example_inputs`` in their
    order. With ``backend="onnxruntime"`` a module is run as it is, then exported without optimization and run in ONNX
    Runtime (on the CPU) twice, with graph optimizations off and on; ``"eager"`` only runs it as it is.
    ``example_inputs`` are the positional arguments of one call; seeded random ones of other magnitudes and batch sizes
    are tried beside them, as far as the reference takes them. Both models are copied first, and neither is changed;
    ``"eager"`` compares them in the mode they are in.

    Raises :class:`NormswapError` for misuse: wrong types, a reference that fails on ``example_inputs``, and for
    ``"onnxruntime"`` a model in train mode, one that cannot be exported, and a file that ONNX Runtime cannot load or
    that takes other inputs. A candidate that fails where the reference runs is not equivalent; the report says why.
    """
    if backend not in ("onnxruntime", "eager"):
        raise NormswapError(f"unknown backend {backend!r}; the backends are: onnxruntime, eager")
    check_inputs(example_inputs)
    check_model(reference)
    notes = list(_mode_notes(reference, candidate, backend))
    truth = _Truth(reference)
    truth.first(example_inputs)
    with tempfile.TemporaryDirectory() as folder:
        runs, any_batch = _runs(candidate, example_inputs, backend, Path(folder), notes)
        variations = _Variations(example_inputs, any_batch)
        rows, kept = _compare(truth, runs, variations, notes)
    notes.extend(variations.notes)
    notes.extend(truth.notes)
    rows = _without_zeros(_judge(rows), notes)
    if not rows:
        notes.append("the reference returns no tensor, so nothing was compared")
    given = [row for row in rows if row.inputs == kept[0].name]
    equivalent = bool(given) and all(row.verdict == "equivalent" for row in given)
    equivalent = equivalent and all(row.verdict != "different" for row in rows)
    return Verification(equivalent, backend, truth.criterion, tuple(rows), tuple(kept), tuple(dict.fromkeys(notes)))


def _mode_notes(reference: nn.Module, candidate: object, backend: str) -> Iterator[str]:
    models = {"reference": reference}
    if isinstance(candidate, str | os.PathLike):
        if backend == "eager":
            raise NormswapError(f"{os.fspath(candidate)}: a file is run by ONNX Runtime; use backend='onnxruntime'")
    else:
        check_model(candidate)
        assert isinstance(candidate, nn.Module)
        models["candidate"] = candidate
    for role, model in models.items():
        if backend == "onnxruntime":
            check_eval(model, f"verify with ONNX Runtime (the {role})")
        elif training := training_modules(model):
            first = training[0] or "the model itself"
            yield f"the {role} is compared in train mode ({first}; {len(training)} modules in all)"


def _compare(
    truth: _Truth, runs: Sequence[_Run], variations: _Variations, notes: list[str]
) -> tuple[list[Row], list[Variation]]:
    rows: list[Row] = []
    kept: list[Variation] = []
    for variation, inputs in variations:
        try:
            own, wide, noise = truth(variation, inputs)
        except Exception as error:
            notes.append(f"{variation.name}: left out, the reference does not take them ({one_line(error)})")
            continue
        if kept and not _finite(wide):
            notes.append(f"{variation.name}: left out, the reference is not finite on them")
            continue
        kept.append(variation)
        for run in runs:
            blank = Row(run.name, "", variation.name)
            try:
                got = run(inputs, own)
            except Exception as error:
                rows.append(replace(blank, output="(all)", problem=f"failed: {one_line(error)}"))
                continue
            rows.extend(_rows(blank, own, wide, noise, got, notes))
    return rows, kept


def _finite(outputs: Outputs) -> bool:
    return all(bool(value.isfinite().all()) for value in outputs.values() if isinstance(value, Tensor))


# ---- what is compared


def flatten(output: Any, name: str = "") -> Outputs:
    """Leaves of a model's output by name: ``output`` for a lone tensor, ``output[0]``, keys, field names."""
    if isinstance(output, Mapping):
        parts = [(f"{name}.{key}" if name else str(key), value) for key, value in output.items()]
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        parts = [(f"{name}.{key}" if name else key, getattr(output, key)) for key in output._fields]
    elif isinstance(output, list | tuple):
        parts = [(f"{name or 'output'}[{index}]", value) for index, value in enumerate(output)]
    elif is_dataclass(output) and not isinstance(output, type):
        parts = [(f"{name}.{f.name}" if name else f.name, getattr(output, f.name)) for f in fields(output)]
    else:
        return {name or "output": _leaf(output)}
    return {key: leaf for part, value in parts for key, leaf in flatten(value, part).items()}


def _leaf(value: Any) -> Any:
    if isinstance(value, float):
        return torch.tensor(value)
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return value if value.layout == torch.strided else value.to_dense()


def _rows(blank: Row, own: Outputs, wide: Outputs, noise: Outputs, got: Outputs, notes: list[str]) -> Iterator[Row]:
    for name in [name for name in own if name not in got]:
        yield replace(blank, output=name, problem="the candidate does not have this output")
    for name, value in got.items():
        row = replace(blank, output=name)
        if name not in own:
            yield replace(row, problem="the reference does not have this output")
            continue
        expected = own[name]
        if not isinstance(expected, Tensor) or not isinstance(value, Tensor):
            if type(expected) is type(value) and not isinstance(value, _PLAIN):
                notes.append(f"{name} is a {type(value).__name__}, which is not compared")
            elif type(expected) is not type(value) or expected != value:
                problem = f"{_short(value)} instead of {_short(expected)}"
                yield replace(row, dtype=type(value).__name__, problem=problem)
            continue
        row = replace(row, shape=tuple(value.shape), dtype=str(value.dtype).removeprefix("torch."))
        if value.shape != expected.shape:
            yield replace(row, problem=f"shape {tuple(value.shape)} instead of {tuple(expected.shape)}")
        elif value.dtype != expected.dtype:
            yield replace(row, problem=f"{value.dtype} instead of {expected.dtype}")
        else:
            yield _measured(row, expected, wide.get(name), noise.get(name), value)


_PLAIN = (type(None), bool, int, str, bytes)


def _short(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:60]


def _measured(row: Row, own: Tensor, wide: Any, noise: Any, got: Tensor) -> Row:
    """``row`` with the errors filled in; what depends on the other inputs is left to :func:`_judge`."""
    known = isinstance(wide, Tensor) and isinstance(noise, Tensor) and wide.shape == noise.shape == own.shape
    truth = wide if known else own
    mismatched = (got.isfinite() != own.isfinite()) & truth.isfinite()
    mismatched |= ~truth.isfinite() & ~_alike(got, truth) & ~_alike(got, own)
    max_abs, share, sqnr = _error(got, truth)
    if known:
        noise_abs, noise_share, _ = _error(noise, truth)
        noise_abs *= _epsilon(own.dtype) / _epsilon(noise.dtype) if _epsilon(own.dtype) else 1.0
        row = replace(row, noise=noise_abs, floor=noise_share)
    agreement = None
    if own.dim() == 2 and own.shape[1] > 1 and own.numel() and own.is_floating_point():
        agreement = float((got.argmax(1) == truth.argmax(1)).double().mean())
    return replace(
        row,
        max_abs=max_abs,
        scale=float(torch.where(truth.isfinite(), truth, 0).abs().max()) if truth.numel() else 0.0,
        relative=share,
        sqnr=sqnr,
        agreement=agreement,
        non_finite=int(mismatched.sum()),
        problem=f"{int(mismatched.sum())} non-finite values differ" if mismatched.any() else None,
    )


def _alike(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def _error(got: Tensor, truth: Tensor) -> tuple[float, float, float]:
    """Over values finite in both: the largest absolute error, the share of values that differ, and the SQNR in dB."""
    if not truth.numel():
        return 0.0, 0.0, math.inf
    wide = torch.complex128 if truth.is_complex() else torch.float64
    finite = got.isfinite() & truth.isfinite()
    truth = torch.where(finite, truth.to(wide), 0)
    difference = (torch.where(finite, got.to(wide), 0) - truth).abs()
    power, noise = float(truth.abs().square().sum()), float(difference.square().sum())
    sqnr = math.inf if noise == 0 else 10 * math.log10(power / noise) if power else -math.inf
    return float(difference.max()), float((difference > 0).double().mean()), sqnr


def _epsilon(dtype: torch.dtype | str) -> float:
    """Machine epsilon; 0 for integers, booleans and what is no tensor."""
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(kind, torch.dtype) or not (kind.is_floating_point or kind.is_complex):
        return 0.0
    return torch.finfo(kind).eps


def _judge(rows: Sequence[Row]) -> list[Row]:
    """Complete what needs the same output on all inputs: scale, relative error, floor, what is allowed, verdict."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.run, row.output].append(row)
    return [_judged(row, groups[row.run, row.output]) for row in rows]


def _judged(row: Row, group: Sequence[Row]) -> Row:
    if row.problem is not None:
        return row
    epsilon = _epsilon(row.dtype)
    if epsilon:
        row = _relative(row, group)
    if row.floor is None:
        allowed = epsilon ** (2 / 3)
    else:
        floors = [_relative(other, group).floor if epsilon else other.floor for other in group]
        known = [floor for floor in floors if floor is not None]
        usual = 2 * max(known) if math.prod(row.shape) < FEW else statistics.median(known)
        allowed = FACTOR * max(row.floor, usual) + ULPS * epsilon
    row = replace(row, allowed=allowed, verdict="equivalent" if row.relative <= allowed else "different")
    if row.floor is not None and row.floor > (epsilon ** (1 / 3) if epsilon else 0.1):
        problem = f"the reference's own error is {row.floor:.2g} of the output's scale: it is random or chaotic"
        return replace(row, verdict="inconclusive", problem=problem)
    return row


def _relative(row: Row, group: Sequence[Row]) -> Row:
    scale = max(row.scale, statistics.median(other.scale for other in group))
    floor = None if row.noise is None else row.noise / (scale or 1.0)
    return replace(row, scale=scale, relative=row.max_abs / (scale or 1.0), floor=floor)


def _without_zeros(rows: Sequence[Row], notes: list[str]) -> list[Row]:
    """``rows``, inconclusive where the reference's floating-point outputs are zero throughout."""
    inexact = [row for row in rows if _epsilon(row.dtype) and row.problem is None]
    zero = list(dict.fromkeys(row.output for row in inexact if row.scale == 0))
    if zero and all(row.scale == 0 for row in inexact):
        problem = "the reference's outputs are all zero, which says nothing"
        return [replace(row, verdict="inconclusive", problem=problem) if row in inexact else row for row in rows]
    notes.extend(f"{name} is all zero on some or all inputs, which says little" for name in zero)
    return list(rows)


# ---- the reference


class _Precision(TorchDispatchMode):
    """Every cast and creation of a floating-point tensor goes to one dtype, whatever a ``forward`` asks for."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.view.dtype:  # Reads bits: no cast.
            return func(*args, **(kwargs or {}))
        out = func(*tree_map(self._dtype, args), **tree_map(self._dtype, kwargs or {}))
        return self.cast(out) if func in (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift.default) else out

    def _dtype(self, value: Any) -> Any:
        return self.dtype if isinstance(value, torch.dtype) and value.is_floating_point else value

    def cast(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@contextmanager
def _precision(dtype: torch.dtype) -> Iterator[_Precision]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _Precision(dtype) as mode:
            yield mode
    finally:
        torch.set_default_dtype(previous)


class _Truth:
    """The reference's outputs: in its own dtype, in float64, and those of the run whose error is the noise floor."""

    def __init__(self, reference: nn.Module) -> None:
        self.reference = reference
        self.own = isolated(reference, share=False)
        self.copies: dict[torch.dtype, nn.Module] = {}
        self.notes: list[str] = []
        self.failure: str | None = None
        self.given: tuple[Outputs, Outputs, Outputs] = ({}, {}, {})

    @property
    def criterion(self) -> str:
        if self.failure is not None:
            return (
                "error relative to the reference in its own dtype at most eps^(2/3): "
                "the reference does not run in float64, so its noise floor is not known"
            )
        return (
            f"error relative to the reference in float64 at most {FACTOR:g} noise floors (the reference's own error; "
            f"{2 * FACTOR:g} for outputs of fewer than {FEW} values) + {ULPS:g} eps"
        )

    def first(self, inputs: tuple[Any, ...]) -> None:
        """Run on the given inputs; this decides which criterion holds."""
        try:
            own = _call(self.own, inputs)
        except Exception as error:
            name = type(self.reference).__name__
            raise NormswapError(f"the reference {name} fails on example_inputs: {one_line(error)}") from error
        try:
            self.given = (own, *self._wide(own, inputs))
        except Exception as error:
            self.failure = one_line(error)
            self.notes.append(f"the reference does not run in float64 ({self.failure}); the wider criterion is used")
            self.given = (own, {}, {})

    def __call__(self, variation: Variation, inputs: tuple[Any, ...]) -> tuple[Outputs, Outputs, Outputs]:
        if variation.seed is None:
            return self.given
        own = _call(self.own, inputs)
        return (own, {}, {}) if self.failure is not None else (own, *self._wide(own, inputs))

    def _wide(self, own: Outputs, inputs: tuple[Any, ...]) -> tuple[Outputs, Outputs]:
        wide = self._in(torch.float64, inputs)
        doubles = any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in own.values())
        return wide, self._in(torch.float32, inputs) if doubles else own

    def _in(self, dtype: torch.dtype, inputs: tuple[Any, ...]) -> Outputs:
        if dtype not in self.copies:
            self.copies[dtype] = _cast(isolated(self.reference, share=False), dtype)
        with _precision(dtype) as mode:
            return _call(self.copies[dtype], tree_map(mode.cast, inputs))


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``model`` with parameters, buffers and other tensors in its modules' attributes in ``dtype``, in place."""
    model.to(dtype)

    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    for module in model.modules():
        for name, value in list(vars(module).items()):
            if name in ("_parameters", "_buffers", "_modules") or not isinstance(value, Tensor | dict | list | tuple):
                continue
            if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
                setattr(module, name, tree_map(cast, value))
    return model


def _call(model: nn.Module, inputs: tuple[Any, ...]) -> Outputs:
    """One call without gradients and with a fixed random state; the caller's inputs and random state stay."""
    leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    devices = sorted({leaf.get_device() for leaf in leaves if leaf.is_cuda})
    inputs = tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, inputs)
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(0)
        return flatten(model(*inputs))


# ---- the inputs


class _Variations:
    """The given inputs, then seeded random ones: three magnitudes, and two other batch sizes where allowed."""

    def __init__(self, given: tuple[Any, ...], any_batch: bool) -> None:
        self.given = given
        self.notes: list[str] = []
        tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        sizes = {leaf.shape[0] if leaf.dim() else 0 for leaf in tensors}
        size = sizes.pop() if any_batch and len(sizes) == 1 else 0
        self.batches = [batch for batch in (1, size + 1 if size > 1 else 3) if size > 0 and batch != size]
        self.random = any(leaf.is_floating_point() for leaf in tensors)
        if not self.random:
            self.notes.append("no input is floating-point, so only the given values are tried")

    def __iter__(self) -> Iterator[tuple[Variation, tuple[Any, ...]]]:
        yield Variation("given"), self.given
        plans: list[tuple[float, int | None]] = [(1.0, batch) for batch in self.batches]
        if self.random:
            plans = [(1.0, None), (0.1, None), (10.0, None), *plans]
        for seed, (magnitude, batch) in enumerate(plans):
            name = f"seed {seed}, magnitude {magnitude:g}" + ("" if batch is None else f", batch {batch}")
            variation = Variation(name, seed, magnitude, batch)
            generator = torch.Generator().manual_seed(seed)
            yield variation, tree_map(lambda leaf, v=variation, g=generator: _drawn(leaf, v, g), self.given)


def _drawn(leaf: Any, variation: Variation, generator: torch.Generator) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if variation.batch is not None:
        leaf = leaf[torch.arange(variation.batch, device=leaf.device) % leaf.shape[0]]
    if not leaf.is_floating_point() or not leaf.numel():
        return leaf
    values = leaf.detach().double()
    mean, deviation = values.mean(), values.std(correction=0)
    noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.device)
    spread = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    drawn = torch.empty_like(leaf)  # Keeps the memory format.
    return drawn.copy_((mean + spread * noise) * (variation.magnitude or 1.0))


# ---- the candidate


@dataclass(frozen=True)
class _Run:
    name: str
    call: Callable[[tuple[Any, ...], Outputs], Outputs]

    def __call__(self, inputs: tuple[Any, ...], own: Outputs) -> Outputs:
        return self.call(inputs, own)


def _runs(
    candidate: nn.Module | str | os.PathLike[str],
    example_inputs: tuple[Any, ...],
    backend: str,
    folder: Path,
    notes: list[str],
) -> tuple[list[_Run], bool]:
    """The ways to run the candidate, and whether all of them take other batch sizes."""
    runs = []
    if isinstance(candidate, nn.Module):
        model = isolated(candidate, share=False)
        runs.append(_Run("eager", lambda inputs, own: _call(model, inputs)))
        if backend == "eager":
            return runs, True
        path = folder / "candidate.onnx"
        try:
            export(candidate, path, example_inputs, optimize=False, dynamic=True)
        except NormswapError as error:
            export(candidate, path, example_inputs, optimize=False)
            notes.append(f"only the given batch size is tried: {error}")
    else:
        path = Path(candidate)
    off, on = _session(path, optimized=False), _session(path, optimized=True)
    tensors = [leaf for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor)]
    names = [entry.name for entry in off.get_inputs()]
    if len(names) != len(tensors):
        raise NormswapError(
            f"{path.name} takes {len(names)} inputs ({', '.join(names)}) and example_inputs hold {len(tensors)} tensors"
        )
    for leaf in tensors:
        if leaf.dtype == torch.bfloat16 or leaf.is_complex():
            raise NormswapError(f"ONNX Runtime is not given {leaf.dtype} inputs here; use backend='eager'")
    runs.append(_Run("onnxruntime, graph optimizations off", lambda inputs, own: _run_session(off, inputs, own)))
    runs.append(_Run("onnxruntime", lambda inputs, own: _run_session(on, inputs, own)))
    return runs, all(entry.shape and isinstance(entry.shape[0], str) for entry in off.get_inputs())


def _session(path: Path, *, optimized: bool) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise NormswapError(f"verification needs onnxruntime ({error}): pip install normswap[onnx]") from error
    if not path.is_file():
        raise NormswapError(f"{path} does not exist or is not a file")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise NormswapError(
            f"ONNX Runtime cannot load {path.name}: {one_line(error)}; backend='eager' compares without it"
        ) from error


def _run_session(session: Any, inputs: tuple[Any, ...], own: Outputs) -> Outputs:
    leaves = [leaf.detach().cpu().numpy() for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    names = [entry.name for entry in session.get_inputs()]
    values = [torch.from_numpy(value) for value in session.run(None, dict(zip(names, leaves, strict=True)))]
    expected = [name for name, value in own.items() if isinstance(value, Tensor)]
    extra = [f"output {index}" for index in range(len(expected), len(values))]
    got = dict(zip([*expected, *extra], values, strict=False))
    return {**{name: value for name, value in own.items() if not isinstance(value, Tensor)}, **got}
