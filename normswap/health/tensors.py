r"""Checks of a norm's tensors and options, which need nothing else: no code of the model, no data.

With running variance v the normalized deviation of a channel is :math:`\sqrt{v / (v + \varepsilon)}`, 1 for a live one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from normswap.health.checks import (
    DEAD_SCALE,
    DEAD_VARIANCE,
    EPS_VARIANCE,
    HALF_LARGEST,
    HALF_SMALLEST,
    LARGE_EPS,
    LARGE_MOMENTUM,
    LARGE_SCALE,
    Finding,
    finding,
)
from normswap.spec import Norm, epsilon

HALF = (torch.float16, torch.bfloat16)


def check_tensors(name: str, norm: Norm) -> Iterator[Finding]:
    """What is wrong with the values of a norm; tensors without values (meta device) are passed over."""
    broken = [(field, tensor) for field, tensor in norm.tensors.items() if not _finite(tensor)]
    for field, tensor in broken:
        yield finding("not-finite", name, f"{field}: {_counted(~tensor.detach().isfinite())}")
    fields = {field for field, _ in broken}
    if "running_var" not in fields:
        yield from _variance(name, norm)
    if not fields & {"running_mean", "running_var"}:
        yield from _statistics(name, norm)
    if norm.weight is not None and "weight" not in fields and not norm.weight.is_meta:
        yield from _scale(name, norm, norm.weight.detach().double().flatten())


def check_options(name: str, norm: Norm, *, trains: bool) -> Iterator[Finding]:
    """What is wrong with eps and, where the norm ``trains``, with momentum."""
    yield from _eps(name, norm)
    if norm.channels == 1 and "channel" in norm.pools and "space" not in norm.pools and norm.shape is None:
        yield finding("one-element-groups", name, f"{norm.kind} over a single channel")
    if "batch" in norm.pools and not norm.has_statistics:
        yield finding("no-running-statistics", name, f"{norm.kind} without running_mean and running_var")
    if not norm.has_statistics or norm.fixed or not trains:
        return
    momentum = norm.momentum
    if momentum is None:
        yield finding("cumulative-momentum", name, "momentum None")
    elif not 0 <= momentum <= 1:
        yield finding("bad-momentum", name, f"momentum {momentum:g}")
    elif momentum == 0:
        yield finding("zero-momentum", name, "momentum 0")
    elif momentum >= LARGE_MOMENTUM:
        yield finding("large-momentum", name, f"momentum {momentum:g}")


def _eps(name: str, norm: Norm) -> Iterator[Finding]:
    if norm.eps is None:
        return
    if norm.eps < 0:
        yield finding("bad-eps", name, f"eps {norm.eps:g}")
    elif norm.eps == 0:
        yield finding("zero-eps", name, "eps 0")
    elif norm.eps > LARGE_EPS:
        yield finding("large-eps", name, f"eps {norm.eps:g}")
    elif norm.eps < HALF_SMALLEST and any(tensor.dtype == torch.float16 for tensor in norm.tensors.values()):
        yield finding("small-eps", name, f"eps {norm.eps:g} with tensors in float16")


def _variance(name: str, norm: Norm) -> Iterator[Finding]:
    if norm.running_var is None or norm.running_var.is_meta:
        return
    var = norm.running_var.detach().double().flatten()
    negative = var < 0
    if bool(negative.any()):
        yield finding("negative-variance", name, f"running_var: {_counted(negative)}, least {float(var.min()):.3g}")
        return
    eps = epsilon(norm, norm.running_var.dtype)
    if eps == 0 and bool((var == 0).any()):
        yield finding("zero-division", name, f"eps 0 and variance 0: {_counted(var == 0)}")
        return
    dead = var < DEAD_VARIANCE * eps
    if bool(dead.any()):
        what = f"{_counted(dead)} with a variance below {DEAD_VARIANCE:g} eps, least {float(var.min()):.3g}"
        yield finding("dead-channels", name, what, share=_share(dead))
    small = (var < EPS_VARIANCE * eps) & ~dead
    if bool(small.any()):
        what = f"{_counted(small)} with a variance below eps {eps:g}, median {float(var[small].median()):.3g}"
        yield finding("eps-dominated", name, what, share=_share(small))


def _statistics(name: str, norm: Norm) -> Iterator[Finding]:
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None or mean.is_meta or var.is_meta:
        return
    if bool((mean == 0).all()) and bool((var == 1).all()):
        counter = norm.num_batches_tracked
        count = "" if counter is None or counter.is_meta else f", num_batches_tracked {int(counter)}"
        yield finding("never-updated", name, f"mean 0 and variance 1 in all {mean.numel()} channels{count}")
        return
    for field, tensor in (("running_mean", mean), ("running_var", var)):
        if tensor.dtype in HALF and not norm.fixed:
            yield finding("half-statistics", name, f"{field} in {str(tensor.dtype).removeprefix('torch.')}")
        far = tensor.detach().abs() > HALF_LARGEST
        if tensor.dtype != torch.float16 and bool(far.any()):
            largest = float(tensor.detach().abs().max())
            yield finding("overflows-float16", name, f"{field}: {_counted(far)}, up to {largest:.3g}")


def _scale(name: str, norm: Norm, weight: Tensor) -> Iterator[Finding]:
    size = weight.abs()
    largest = float(size.max()) if len(size) else 0.0
    if largest == 0:
        if len(size):
            yield finding("zero-scale", name, f"weight is 0 in all {len(size)} channels")
        return
    large = size > LARGE_SCALE
    if bool(large.any()):
        yield finding("large-scale", name, f"weight: {_counted(large)} above {LARGE_SCALE:g}, largest {largest:.3g}")
    dead = size < DEAD_SCALE * largest
    if bool(dead.any()):
        what = f"weight: {_counted(dead)} below {DEAD_SCALE:g} of the largest ({largest:.3g})"
        yield finding("dead-scale", name, what, share=_share(dead))


def _finite(tensor: Tensor) -> bool:
    return tensor.is_meta or not tensor.is_floating_point() or bool(tensor.detach().isfinite().all())


def _counted(which: Tensor) -> str:
    return f"{int(which.sum())} of {which.numel()} channels"


def _share(which: Tensor) -> float:
    return float(which.double().mean())
