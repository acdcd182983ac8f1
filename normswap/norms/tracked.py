"""What the layers on :mod:`normswap.norms.moments` share: torch's constructor, running statistics, building.

Running statistics follow ``nn.BatchNorm2d``: ``momentum`` is the weight of the new batch, ``None`` makes a cumulative
mean, and it may be a schedule of :mod:`normswap.norms.momentum`; without ``track_running_stats`` there are none, and
eval mode takes the moments of the batch too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normswap.errors import NormswapError
from normswap.norms.adopt import adopt_affine, adopt_statistics, channels_first, dimensions
from normswap.norms.batch import eps_of
from normswap.norms.inputs import check_input
from normswap.norms.moments import Coefficients, Moments, affine
from normswap.norms.momentum import Momentum, Schedule, share_of
from normswap.norms.processes import Across, check_group, several
from normswap.spec import BATCH, Norm


def check_flag(name: str, value: object) -> None:
    """Raise :class:`NormswapError` for an option that is neither ``True`` nor ``False``."""
    if not isinstance(value, bool):
        raise NormswapError(f"{name}={value!r}: it is True or False")


def kept(buffer: Tensor | None) -> Tensor | None:
    """A buffer as it is now: the backward pass may come when a batch has written it over."""
    looked_into = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    apart = buffer is not None and torch.is_grad_enabled() and not looked_into
    return buffer.clone() if apart and buffer is not None else buffer


def next_share(counter: Tensor, momentum: Momentum, like: Tensor) -> Tensor:
    """Count one more batch; its weight in the running statistics, in the dtype of ``like``."""
    counter.add_(1)
    return share_of(momentum, counter, like.dtype)


class TrackedNorm(nn.Module):
    """A normalization of ``(N, C, *S)`` with a per-channel affine and running statistics of the batch.

    Parameters ``weight``, ``bias`` and buffers ``running_mean``, ``running_var`` of shape ``(num_features,)``, and
    ``num_batches_tracked``; each ``None`` where it is switched off. Raises ``ValueError`` for an input of another
    rank."""

    dims: ClassVar[frozenset[int] | None] = None
    """Numbers of input dimensions; ``None`` for any of at least 2."""
    averages: ClassVar[Literal["variance", "deviation"]] = "variance"
    """What the running average is of: the biased variance, or its root with eps inside."""
    statistics: ClassVar[tuple[str, ...]] = ("running_mean", "running_var", "num_batches_tracked")
    initial: ClassVar[dict[str, float]] = {"weight": 1.0, "bias": 0.0}
    """Parameters that are the same number everywhere at first."""
    synchronised: bool = False
    """Whether train mode takes the batches of all processes of ``process_group`` (``None``: of all) as one."""
    process_group: Any = None

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Momentum = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_parameter("weight", nn.Parameter(torch.ones(num_features, **where)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_features, **where)) if affine and bias else None)
        self._more_parameters(where)
        tracked = track_running_stats
        self.register_buffer("running_mean", torch.zeros(num_features, **where) if tracked else None)
        self.register_buffer("running_var", torch.ones(num_features, **where) if tracked else None)
        count = torch.tensor(0, dtype=torch.long, device=device) if tracked else None
        self.register_buffer("num_batches_tracked", count)

    def _more_parameters(self, where: dict[str, Any]) -> None:
        """Register a layer's own parameters, between the affine and the statistics."""

    @torch.no_grad()
    def reset_running_stats(self) -> None:
        """Make the statistics, in place, those of a new layer: mean 0, variance 1, no batches."""
        for name, value in zip(self.statistics, (0, 1, 0), strict=True):
            if (buffer := getattr(self, name)) is not None:
                buffer.fill_(value)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make parameters and statistics, in place, those of a new layer, as behind ``to_empty``."""
        self.reset_running_stats()
        for name, value in self.initial.items():
            if (parameter := getattr(self, name)) is not None:
                parameter.fill_(value)

    def synchronise(self, synchronised: bool, process_group: Any) -> None:
        """Take the options of the layers that can pool the batches of several processes."""
        check_flag("synchronised", synchronised)
        check_group(process_group)
        if process_group is not None and not synchronised:
            raise NormswapError(f"process_group={process_group!r} without synchronised=True: only then it is used")
        self.synchronised, self.process_group = synchronised, process_group

    def across(self) -> Across | None:
        """The processes that this one's batch belongs to, where there are others."""
        if self.training and self.synchronised and several(self.process_group):
            return Across(self.process_group)
        return None

    def check(self, x: Tensor) -> None:
        """Raise ``ValueError`` for an input that the layer is not for."""
        check_input(x, self.num_features, self.dims)

    @property
    def running(self) -> tuple[Tensor | None, Tensor | None]:
        """The running statistics where they are used: in eval mode."""
        return (None, None) if self.training else (kept(self.running_mean), kept(self.running_var))

    @torch.no_grad()
    def track(self, mean: Tensor, var: Tensor) -> None:
        """Move the running statistics towards those of a batch, each ``(C,)``."""
        if not (self.training and self.track_running_stats) or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        share = next_share(self.num_batches_tracked, self.momentum, mean)
        self.running_mean.copy_(torch.lerp(self.running_mean.to(mean.dtype), mean, share))
        old = self.running_var.to(var.dtype)
        if self.averages == "variance":
            self.running_var.copy_(torch.lerp(old, var, share))
        else:
            deviation = torch.lerp((old + self.eps).sqrt(), (var + self.eps).sqrt(), share)
            self.running_var.copy_((deviation.square() - self.eps).clamp_(min=0))

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}{', synchronised=True' * self.synchronised}"
        )


class BatchTrained(TrackedNorm):
    """A layer that in eval mode is batch normalization with its running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        mean, var = self.running
        if mean is not None:
            return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)
        return self.train_forward(x)

    def train_forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def batch_normalized(moments: Moments, weight: Tensor | None, bias: Tensor | None, *, eps: float) -> Coefficients:
    """Scale and shift by the moments of the batch, which are wanted back."""
    seen = moments.over_batch()
    return affine(*seen, weight, bias, eps, seen)


_T = TypeVar("_T", bound=TrackedNorm)


def fields(module: TrackedNorm) -> dict[str, Any]:
    """The fields of a ``Norm`` that every such layer has."""
    momentum = module.momentum
    schedule = momentum if isinstance(momentum, Schedule) else None
    return {
        "channels": module.num_features,
        "ranks": module.dims,
        "eps": module.eps,
        "momentum": momentum if schedule is None else schedule.last,
        "schedule": schedule,
        "weight": module.weight,
        "bias": module.bias,
        "running_mean": module.running_mean,
        "running_var": module.running_var,
        "num_batches_tracked": module.num_batches_tracked,
        "process_group": module.process_group,
    }


def pooled(module: TrackedNorm, pools: frozenset[str] = BATCH) -> frozenset[str]:
    """``pools``, with the processes where the layer is synchronised."""
    return pools | {"processes"} if module.synchronised else pools


def together(norm: Norm, synchronised: bool | None, process_group: Any) -> dict[str, Any]:
    """The options of :meth:`TrackedNorm.synchronise` for a layer in the place of ``norm``: as that is, unless given."""
    if synchronised is None:
        synchronised = "processes" in norm.pools
    if synchronised and process_group is None:
        process_group = norm.process_group
    return {"synchronised": synchronised, "process_group": process_group}


def momentum_of(norm: Norm) -> Momentum:
    """The momentum of a layer that takes over from ``norm``: its schedule, where it has one."""
    if "batch" not in norm.pools:
        return 0.1
    return norm.momentum if norm.schedule is None else norm.schedule


def assemble(norm: Norm, kind: str, classes: tuple[type[_T], ...], /, *, tracked: bool = True, **options: Any) -> _T:
    """A layer with the affine of ``norm``, and its statistics where ``tracked``.

    ``classes``: that for any rank, then those for 1, 2 and 3 spatial dimensions."""
    channels_first(norm, kind)
    momentum = momentum_of(norm)
    cls = classes[dimensions(norm) or 0]
    module = cls(norm.channels, eps_of(norm), momentum, affine=False, track_running_stats=False, **options)
    module.affine = norm.weight is not None or norm.bias is not None
    module.track_running_stats = tracked
    adopt_affine(module, norm)
    return adopt_statistics(module, norm) if tracked else module


@contextmanager
def batch_average(model: nn.Module) -> Iterator[None]:
    """Statistics of trained norms as the mean over batches, instead of a moving average.

    Inside, every norm of ``model`` that keeps running statistics starts afresh and averages those of the batches that
    are run, all with equal weight and with the parameters as they are ("batch average" in arXiv 1806.10779). Only these
    norms are put in train mode; afterwards modes and momenta are as before. The count of batches is that of these: what
    goes by it, as the schedules of batch renormalization and of a momentum do, begins again when training goes on.
    Without a batch the statistics stay as they were."""
    norms = [m for m in model.modules() if all(isinstance(getattr(m, n, None), Tensor) for n in TrackedNorm.statistics)]
    modes: list[tuple[Any, bool, Any, dict[str, Tensor]]] = []
    for norm in norms:
        buffers = {name: getattr(norm, name) for name in TrackedNorm.statistics}
        modes.append((norm, norm.training, norm.momentum, {name: b.clone() for name, b in buffers.items()}))
        buffers["num_batches_tracked"].zero_()
        norm.training, norm.momentum = True, None  # type: ignore[assignment]
    try:
        yield
    finally:
        for norm, training, momentum, before in modes:
            norm.training, norm.momentum = training, momentum
            idle = norm.num_batches_tracked == 0
            for name, values in before.items():
                now = getattr(norm, name)
                now.copy_(torch.where(idle.reshape((*idle.shape, *[1] * (now.dim() - idle.dim()))), values, now))
