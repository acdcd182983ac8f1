"""Checks of a norm as a module of a model: its mode, its sharing with others, and the shapes that it ran on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from normswap.engine.sites import Site
from normswap.health.checks import FEW_SAMPLES, FEW_VALUES, Finding, finding
from normswap.spec import Norm

Shapes = Iterable[tuple[int, ...]]


def check_mode(site: Site, model: nn.Module) -> Iterator[Finding]:
    """Whether train and eval mode, and what is trained, fit together."""
    norm, module = site.norm, site.module
    if norm is None or norm.fixed or site.functional or not (norm.has_statistics or "batch" in norm.pools):
        return
    if module.training and not model.training:
        yield finding("trains-in-eval", site.name, "it is in train mode, the model is in eval mode")
    elif model.training and not module.training and norm.has_statistics:
        yield finding("frozen-in-train", site.name, "it is in eval mode, the model is in train mode")
    affine = [tensor for tensor in (norm.weight, norm.bias) if tensor is not None]
    if module.training and norm.has_statistics and affine and not any(tensor.requires_grad for tensor in affine):
        yield finding("half-frozen", site.name, "it is in train mode, its weight and bias do not require gradients")


def check_sharing(sites: Sequence[Site]) -> Iterator[Finding]:
    """Norms under several names, and running statistics that two norms have in common."""
    owners: dict[int, Site] = {}
    for site in sites:
        if site.aliases and not site.functional:
            yield finding("alias", site.name, f"it is {', '.join(site.aliases)} too")
        if site.norm is None or site.norm.fixed:
            continue
        for field in ("running_mean", "running_var"):
            tensor: Tensor | None = getattr(site.norm, field)
            if tensor is None or tensor.is_meta or not tensor.numel():
                continue
            other = owners.setdefault(tensor.data_ptr(), site)
            if other is not site and other.module is not site.module:
                yield finding("tied-tensors", site.name, f"its {field} is that of {other.name} too")
                break


def check_calls(site: Site, places: int) -> Iterator[Finding]:
    """Whether a norm with running statistics has one place; ``places``: its calls in traced code."""
    norm = site.norm
    if norm is None:
        return
    ran = None if site.shapes is None else len(site.shapes)
    if ran == 0:
        yield finding("never-ran", site.name, "it did not run on example_inputs")
    calls = places if ran is None else ran
    if calls > 1 and norm.has_statistics and not norm.fixed:
        where = "in the code" if ran is None else "on example_inputs"
        yield finding("called-often", site.name, f"{calls} calls {where}")


def check_shapes(name: str, norm: Norm, shapes: Shapes, *, trains: bool) -> Iterator[Finding]:
    """Whether moments run over enough values, by the shapes of the norm's inputs; ``trains``: as in training."""
    shapes = [shape for shape in dict.fromkeys(shapes) if len(shape) > 1]
    if not shapes or norm.fixed or norm.mixes:
        return
    counts = {shape: values(norm, shape) for shape in shapes}
    shape = min(shapes, key=lambda shape: counts[shape])
    told = f"on an input of {'x'.join(map(str, shape))}"
    if "batch" not in norm.pools:
        if norm.has_statistics and not trains:
            return
        if counts[shape] == 1:
            yield finding("one-element-groups", name, f"moments over 1 value {told}")
        elif counts[shape] < FEW_VALUES:
            yield finding("few-values", name, f"moments over {counts[shape]} values {told}")
        return
    if not trains:
        return
    samples = min(shape[0] for shape in shapes)
    if counts[shape] == 1:
        yield finding("single-value-batch", name, f"1 value for each channel {told}")
    elif samples < FEW_SAMPLES:
        yield finding("tiny-batch", name, f"{samples} samples, {counts[shape]} values for each channel")


def values(norm: Norm, shape: tuple[int, ...]) -> int:
    """How many values of an input of ``shape`` each moment is taken over."""
    if norm.shape is not None:
        return math.prod(norm.shape)
    space = shape[1:-1] if norm.channel_axis == -1 else shape[2:]
    samples = shape[0] if norm.virtual_batch is None else min(norm.virtual_batch, shape[0])
    parts = {
        "batch": samples,
        "channel": norm.channels_per_group,
        "space": math.prod(space),
        "processes": 1,
    }
    return math.prod(parts[axis] for axis in norm.pools)
