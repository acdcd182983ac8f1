"""``compare``: what each kind of norm costs on the user's own model and input: time, memory, parameters.

The variants run in turns, so that whatever else the machine does falls on all of them; a time is the median of its
runs, the spread half of the distance between their quartiles."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normswap import registry
from normswap.advice import memory
from normswap.calibration.batches import check_runs, floats
from normswap.engine.convert import plan_convert
from normswap.engine.copying import copy_model
from normswap.engine.sites import check_model
from normswap.errors import NormswapError, check_whole
from normswap.graph.state import unmarked

USUAL = ("batch", "group", "layer", "instance", "rms", "switchable", "frozen", "identity")
"""What is compared unless asked otherwise; sync needs several processes."""
AS_IT_IS = "as it is"


@dataclass(frozen=True)
class Times:
    """Of the runs of one variant, in seconds."""

    median: float
    spread: float

    @classmethod
    def of(cls, seconds: list[float]) -> Times:
        first, _, third = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (seconds[0],) * 3
        return cls(statistics.median(seconds), (third - first) / 2)

    def __str__(self) -> str:
        return f"{self.median * 1e3:.2f} ± {self.spread * 1e3:.2f}"


@dataclass(frozen=True)
class Row:
    """One variant of the model, in train mode but for ``forward``, which is in eval mode without gradients."""

    kind: str
    changed: int
    """Norms that became this kind."""
    left: int
    """Norms that could not, or need not."""
    parameters: int
    forward: Times | None = None
    training: Times | None = None
    """A forward and a backward pass."""
    peak: int | None = None
    """Most bytes held at once in a forward and backward pass, without the model's own; of a forward pass alone where
    there is no other."""
    saved: int | None = None
    """Bytes that the forward pass keeps for the backward pass."""
    reason: str | None = None
    """Why a figure, or all of it, is missing."""


@dataclass(frozen=True)
class Comparison:
    """The outcome of :func:`compare`; ``str()`` is a table. The first row is the model as it is."""

    rows: tuple[Row, ...]
    repeats: int
    threads: int
    device: str
    shapes: tuple[tuple[int, ...], ...]

    @property
    def conditions(self) -> str:
        """What was measured, on what."""
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.shapes)
        threads = f"{self.threads} thread" + ("" if self.threads == 1 else "s")
        return f"input {shapes}; {self.device}, {threads}; medians of {self.repeats} runs taken in turns"

    def cells(self) -> list[tuple[str, ...]]:
        """A row of texts for each row, for :data:`COLUMNS`."""
        return [
            (
                row.kind,
                str(row.changed),
                "" if row.forward is None else str(row.forward),
                "" if row.training is None else str(row.training),
                _mebibytes(row.peak),
                _mebibytes(row.saved),
                f"{row.parameters:,}",
                row.reason or "",
            )
            for row in self.rows
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "repeats": self.repeats,
            "threads": self.threads,
            "device": self.device,
            "shapes": [list(shape) for shape in self.shapes],
            "rows": [asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        table = [COLUMNS, *self.cells()]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
        return "\n".join([*(line.rstrip() for line in lines), self.conditions])


COLUMNS = ("kind", "norms", "forward, ms", "and backward, ms", "peak, MiB", "saved, MiB", "parameters", "because")


def _mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f}"


def compare(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    kinds: Iterable[str] | None = None,
    *,
    repeats: int = 9,
    backward: bool = True,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Comparison:
    """Convert copies of ``model`` to each of ``kinds`` (by default the usual ones) and measure them on
    ``example_inputs``, a tuple of the model's positional arguments, on the device where they are.

    Without ``backward`` only the forward pass is measured. ``options`` are the builders' own by kind,
    ``{"group": {"groups": 8}}``. A kind that no norm can become, or that does not run, has its reason instead of
    figures. The model and its random state are left as they were. Raises :class:`NormswapError` for misuse, and where
    the model itself does not run on the inputs."""
    check_model(model)
    check_runs(model)
    if not isinstance(example_inputs, tuple):
        raise NormswapError(f"example_inputs is {type(example_inputs).__name__}; it must be a tuple: (x,)")
    check_whole("repeats", repeats)
    wanted = tuple(USUAL if kinds is None else dict.fromkeys(kinds))
    for kind in (*wanted, *(options or ())):
        registry.builder(kind)
    with torch.random.fork_rng(), unmarked(model):
        own = _Variant(AS_IT_IS, copy_model(model), example_inputs, backward)
        try:
            own.try_out()
        except Exception as error:
            shapes = ", ".join(str(tuple(value.shape)) for value in example_inputs if isinstance(value, Tensor))
            raise NormswapError(
                f"the model does not run on example_inputs ({shapes}): {type(error).__name__}: {error}"
            ) from error
        variants = [own]
        refused: dict[str, Row] = {}
        for kind in wanted:
            made = _made(model, kind, example_inputs, backward, dict((options or {}).get(kind, {})))
            if isinstance(made, Row):
                refused[kind] = made
            else:
                variants.append(made)
        for _ in range(repeats):
            for variant in variants:
                variant.take_times()
        rows = {variant.kind: variant.row() for variant in variants}
    order = (AS_IT_IS, *wanted)
    tensors = [value for value in example_inputs if isinstance(value, Tensor)]
    device = str(tensors[0].device) if tensors else "cpu"
    return Comparison(
        tuple((rows | refused)[kind] for kind in order),
        repeats,
        torch.get_num_threads(),
        device,
        tuple(tuple(tensor.shape) for tensor in tensors),
    )


def _made(
    model: nn.Module, kind: str, inputs: tuple[Any, ...], backward: bool, options: dict[str, Any]
) -> _Variant | Row:
    """The model converted to ``kind``, tried out; or why there is none."""
    plan = plan_convert(model, kind, example_inputs=inputs, **options)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if not plan.changes:
        skip = plan.skips[0] if plan.skips else None
        reason = "the model has no norms" if skip is None else f"{skip.name or '(root)'}: {skip.reason}"
        return Row(kind, 0, len(plan.skips), parameters, reason=reason)
    variant = _Variant(kind, plan.apply(inplace=False), inputs, backward)
    variant.changed, variant.left = len(plan.changes), len(plan.skips)
    try:
        variant.try_out()
    except Exception as error:
        reason = str(error) if isinstance(error, NormswapError) else f"{type(error).__name__}: {error}"
        return Row(kind, len(plan.changes), len(plan.skips), parameters, reason=reason)
    return variant


class _Variant:
    def __init__(self, kind: str, model: nn.Module, inputs: tuple[Any, ...], backward: bool) -> None:
        self.kind, self.model, self.inputs, self.backward = kind, model, inputs, backward
        self.changed = self.left = 0
        self.seconds: dict[str, list[float]] = {"forward": [], "training": []}
        self.peak: int | None = None
        self.saved: int | None = None
        self.reason: str | None = None

    def try_out(self) -> None:
        """Run once of each, which warms up, and take the memory."""
        self.forward()
        if self.backward:
            self.model.train()
            if not any(output.requires_grad for output in floats(self.model(*self.inputs))):
                self.backward, self.reason = False, "no output has a gradient"
        if self.backward:
            self.training()
            self.saved = memory.saved(self.model, lambda: self.model(*self.inputs))
        self.peak = memory.peak(self.model, self.training if self.backward else self.forward)

    def forward(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self.model(*self.inputs)

    def training(self) -> None:
        """Gradients are made and let go, so that their memory counts in every run."""
        self.model.train()
        outputs = [output for output in floats(self.model(*self.inputs)) if output.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        for parameter in self.model.parameters():
            parameter.grad = None

    def take_times(self) -> None:
        for name, run in (("forward", self.forward), *((("training", self.training),) if self.backward else ())):
            self.seconds[name].append(_seconds(run))

    def row(self) -> Row:
        forward, training = (Times.of(taken) if taken else None for taken in self.seconds.values())
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return Row(
            self.kind, self.changed, self.left, parameters, forward, training, self.peak, self.saved, self.reason
        )


def _seconds(run: Callable[[], Any]) -> float:
    collects = gc.isenabled()
    gc.disable()
    try:
        _wait()
        start = time.perf_counter()
        run()
        _wait()
        return time.perf_counter() - start
    finally:
        if collects:
            gc.enable()


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
