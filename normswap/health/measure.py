r"""What data does to a norm: its input's moments against the running ones, the activation behind it, one forward pass
a batch.

With batch moments m, v, running moments M, V and :math:`\sigma = \sqrt{v + \varepsilon}`,
:math:`\Sigma = \sqrt{V + \varepsilon}`, the outputs of train and eval mode before weight and bias differ over a batch
by

.. math::  d^2 = E\left[\left(\tfrac{x - m}{\sigma} - \tfrac{x - M}{\Sigma}\right)^2\right]
               = v \left(\tfrac1\sigma - \tfrac1\Sigma\right)^2 + \left(\tfrac{m - M}{\Sigma}\right)^2

in units of a deviation of the normalized value. *Discrepancy* is d for each batch, *staleness* d for the moments of
all batches pooled, *noise* that of each batch against the pooled ones; each a quadratic mean over channels (and
batches). The model runs in eval mode, so that every norm gets the input that it gets when the model is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from normswap.calibration.batches import Forward, run
from normswap.calibration.taps import first_tensor
from normswap.engine.sites import Site
from normswap.errors import NormswapError
from normswap.graph.observe import eval_mode
from normswap.graph.trace import retold
from normswap.health.checks import HALF_LARGEST, MANY, NOISY, SATURATED, STALE, Finding, finding
from normswap.spec import Norm, epsilon

FLAT: dict[str, tuple[float, float]] = {
    "relu": (0.0, math.inf),
    "relu6": (0.0, 6.0),
    "hardswish": (-3.0, math.inf),
    "hardsigmoid": (-3.0, 3.0),
    "hardtanh": (-1.0, 1.0),
    "sigmoid": (-4.0, 4.0),
    "tanh": (-2.0, 2.0),
}
"""Where an activation is flat, below and above: exactly so or, of the last two, with a slope below 0.07 of its
steepest."""
SILENT = frozenset({"relu", "relu6", "hardswish"})
"""Those that give 0 below."""


@dataclass
class Moments:
    """Mean and variance pooled exactly over batches (Chan et al.), in float64."""

    count: float = 0.0
    mean: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    var: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, count: float, mean: Tensor, var: Tensor) -> None:
        total = self.count + count
        share = count / total
        moved = mean - self.mean
        self.var = self.var * (1 - share) + var * share + moved.square() * share * (1 - share)
        self.mean = self.mean + moved * share
        self.count = total


@dataclass(frozen=True)
class Measured:
    """What the batches showed of one norm. Discrepancy, staleness and noise are in deviations, ``None`` for a norm
    whose eval mode does not use running statistics of batches."""

    calls: int
    shapes: tuple[tuple[int, ...], ...]
    input_mean: float
    input_std: float
    output_mean: float
    output_std: float
    largest: float
    """Of the absolute values of input and output."""
    discrepancy: float | None = None
    staleness: float | None = None
    noise: float | None = None
    worst: float | None = None
    """Staleness of the channel where it is greatest."""
    dead: float | None = None
    """Share of the channels whose activation gave 0 throughout; ``None`` without an activation that can."""
    saturated: float | None = None
    """Share of the values where the activation is flat; ``None`` without one that is."""
    below_eps: float | None = None
    """Share of the variances taken from the input itself that are below eps."""
    finite: bool = True
    gradient: float | None = None
    """Root mean square of the gradient at the output, on the first batch."""
    gain: float | None = None
    """Root mean square of the gradient at the input, as a multiple of that at the output."""

    def to_dict(self) -> dict[str, Any]:
        kept = {name: value for name, value in vars(self).items() if name != "shapes"}
        numbers = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in kept.items()}
        return {**numbers, "shapes": [list(shape) for shape in self.shapes]}


class Watch:
    """Gathers what one norm takes and gives."""

    def __init__(self, norm: Norm, activation: str | None) -> None:
        self.norm, self.flat = norm, FLAT.get(activation or "")
        self.silent = activation in SILENT
        self.input, self.output, self.channels = Moments(), Moments(), Moments()
        self.batches: list[tuple[Tensor, Tensor]] = []
        self.shapes: list[tuple[int, ...]] = []
        self.alive: Tensor | None = None
        self.flat_count = self.flat_total = self.below = self.groups = 0
        self.largest, self.finite, self.calls = 0.0, True, 0

    def take(self, x: Tensor) -> None:
        """An input of the norm."""
        self.calls += 1
        if not x.numel():
            return
        self.shapes.append(tuple(x.shape))
        x = _exact(x)
        self._whole(self.input, x)
        norm = self.norm
        if not norm.has_statistics and "batch" not in norm.pools and not norm.mixes:
            var = _spread(x, norm)
            self.below += int((var < epsilon(norm, x.dtype)).sum())
            self.groups += var.numel()
        elif norm.has_statistics and "batch" in norm.pools and not norm.fixed and not norm.mixes:
            first = x if norm.channel_axis == 1 else x.movedim(-1, 1)
            dims = [axis for axis in range(first.dim()) if axis != 1]
            var, mean = torch.var_mean(first, dims, correction=0)
            self.channels.add(first.numel() / norm.channels, mean.double(), var.double())
            self.batches.append((mean.double(), var.double()))

    def give(self, y: Tensor) -> None:
        """The norm's output, in front of the activation."""
        y = _exact(y)
        self.finite = self.finite and bool(y.isfinite().all())
        self._whole(self.output, y)
        if self.flat is None or y.dim() < 2 or not y.numel():
            return
        low, high = self.flat
        first = y if self.norm.channel_axis == 1 else y.movedim(-1, 1)
        alive = (first > low).movedim(1, 0).flatten(1).any(1)
        self.alive = alive if self.alive is None else self.alive | alive
        self.flat_total += y.numel()
        self.flat_count += int((y >= high).sum()) + (0 if self.silent else int((y <= low).sum()))

    def _whole(self, moments: Moments, value: Tensor) -> None:
        if value.numel():
            var, mean = torch.var_mean(value, correction=0)
            moments.add(value.numel(), mean.double().cpu(), var.double().cpu())
            self.largest = max(self.largest, float(value.abs().max()))

    def result(self) -> Measured:
        norm, silent = self.norm, self.silent
        distances: dict[str, float] = {}
        if self.batches:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            eps = epsilon(norm, norm.running_var.dtype)
            own = norm.running_mean.detach().double(), norm.running_var.detach().double()
            pooled = self.channels.mean, self.channels.var
            stale = _distance(*pooled, *own, eps)
            distances = {
                "discrepancy": _rms([_distance(*batch, *own, eps) for batch in self.batches]),
                "staleness": _rms([stale]),
                "noise": _rms([_distance(*batch, *pooled, eps) for batch in self.batches]),
                "worst": float(stale.max().sqrt()),
            }
        return Measured(
            self.calls,
            tuple(dict.fromkeys(self.shapes)),
            float(self.input.mean),
            float(self.input.var.sqrt()),
            float(self.output.mean),
            float(self.output.var.sqrt()),
            self.largest,
            **distances,
            dead=None if self.alive is None or not silent or not self.finite else float((~self.alive).double().mean()),
            saturated=None if not self.flat_total or self.flat == FLAT["relu"] else self.flat_count / self.flat_total,
            below_eps=None if not self.groups else self.below / self.groups,
            finite=self.finite,
        )


def _exact(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _distance(mean: Tensor, var: Tensor, other_mean: Tensor, other_var: Tensor, eps: float) -> Tensor:
    """The square of d, channel by channel; all ``(channels,)``."""
    ours, theirs = (var + eps).rsqrt(), (other_var.to(var) + eps).rsqrt()
    return var * (ours - theirs).square() + ((mean - other_mean.to(mean)) * theirs).square()


def _rms(squares: Sequence[Tensor]) -> float:
    return float(torch.stack(list(squares)).mean().sqrt())


def _spread(x: Tensor, norm: Norm) -> Tensor:
    """What the norm divides by the root of, of each sample and group, without eps."""
    if norm.shape is not None:
        dims = tuple(range(-len(norm.shape), 0))
    else:
        x = x if norm.channel_axis == 1 else x.movedim(-1, 1)
        x = x.unflatten(1, (norm.groups if "channel" in norm.pools else norm.channels, -1))
        dims = ((2,) if "channel" in norm.pools else ()) + (tuple(range(3, x.dim())) if "space" in norm.pools else ())
    if not dims:
        return x.square()
    return x.square().mean(dims) if norm.spread == "square" else x.var(dims, correction=0)


def measure(
    model: nn.Module,
    sites: Sequence[Site],
    activations: dict[str, str | None],
    batches: Iterable[Any],
    forward: Forward | None,
) -> tuple[dict[str, Measured], dict[str, str], list[Any], int]:
    """What every norm module showed, by name in the order they ran; why others showed nothing; the first batch that has
    samples, if there is one; and the number of batches. Raises :class:`NormswapError` when the model does not run on a
    batch."""
    watches: dict[str, Watch] = {}
    left: dict[str, str] = {}
    first: list[Any] = []
    count = 0
    with ExitStack() as stack:
        for site in sites:
            if site.norm is None or site.functional:
                left[site.name] = "what it computes is not known" if site.norm is None else "it is a function call"
                continue
            watch = Watch(site.norm, activations.get(site.name))
            for handle in _hooks(site, watch, watches):
                stack.callback(handle.remove)
        stack.enter_context(eval_mode(model))
        for batch in batches:
            if not first and all(leaf.numel() for leaf in _pytree.tree_leaves(batch) if isinstance(leaf, Tensor)):
                first = [batch]
            with retold(f"the model does not run on batch {count}"):
                run(model, batch, forward)
            count += 1
    if not count:
        raise NormswapError("batches is empty: pass at least one batch")
    return {name: watch.result() for name, watch in watches.items()}, left, first, count


def _hooks(site: Site, watch: Watch, watches: dict[str, Watch]) -> list[Any]:
    assert site.norm is not None
    inner = next((module for module in site.norm.then if type(module).__name__.lower() in FLAT), None)

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        watches.setdefault(site.name, watch)
        watch.take(first_tensor(args, kwargs))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            watch.give(output)

    def inside(module: nn.Module, args: Any) -> None:
        watch.give(args[0])

    handles: list[Any] = [site.module.register_forward_pre_hook(before, with_kwargs=True)]
    if inner is None:
        return [*handles, site.module.register_forward_hook(after, prepend=True)]
    return [*handles, inner.register_forward_pre_hook(inside)]


def check_measured(name: str, norm: Norm, seen: Measured) -> Iterable[Finding]:
    """What is wrong with what the batches showed."""
    share = {"share": 1.0}
    if seen.staleness is not None and seen.staleness > STALE:
        yield finding("stale-statistics", name, f"{seen.staleness:.2f} deviations between running and pooled moments")
    if seen.noise is not None and seen.noise > NOISY:
        yield finding("noisy-batches", name, f"{seen.noise:.2f} deviations between the moments of batches")
    if seen.dead:
        share["share"] = seen.dead
        what = f"{round(seen.dead * norm.channels)} of {norm.channels} channels are 0 behind the activation"
        yield finding("dead-activations", name, what, **share)
    if seen.saturated is not None and seen.saturated > SATURATED:
        yield finding("saturated", name, f"{seen.saturated:.0%} of the values lie where the activation is flat")
    if seen.below_eps is not None and seen.below_eps >= MANY:
        yield finding("eps-dominated", name, f"{seen.below_eps:.0%} of the variances of its inputs are below eps")
    if seen.finite and seen.largest > HALF_LARGEST:
        yield finding("overflows-float16", name, f"values up to {seen.largest:.3g} on the batches")
