r"""What a normalization computes, as one value.

For an input ``x`` of shape ``(N, C, *S)`` (channels first) or ``(*, C)`` (channels last), every norm here is

.. math::  y = \frac{x - m\,[\text{centred}]}{\sqrt{v + \varepsilon}} \; w + b

where ``m`` and ``v`` are moments of ``x`` pooled over a set of axes:

===========  =========================================  ==========================================
kind         pools over                                 source
===========  =========================================  ==========================================
batch, sync  batch, space (and processes)               Ioffe and Szegedy, arXiv 1502.03167
group        channels of one group, space               Wu and He, arXiv 1803.08494
layer        channels (and space, or trailing axes)     Ba et al., arXiv 1607.06450
instance     space                                      Ulyanov et al., arXiv 1607.08022
rms          as layer; not centred, mean square for v   Zhang and Sennrich, arXiv 1910.07467
switchable   a learned mixture of instance, layer and   Luo et al., arXiv 1806.10779
             batch moments
renorm       as batch, moved towards the running ones   Ioffe, arXiv 1702.03275
ghost        parts of the batch, space                  Hoffer et al., arXiv 1705.08741
batch_       batch, space and space alone: the outputs  Nam and Kim, arXiv 1805.07925
instance     are mixed
frn          as instance; not centred, mean square      Singh and Krishnan, arXiv 1911.09737
===========  =========================================  ==========================================

A norm with a formula of its own (an EvoNorm, say, or one whose affine depends on a class) has a :class:`Form`.

A norm whose moments are *running statistics* in eval mode is there a **channel affine**,
:math:`y = s\,x + t` with :math:`s = w / \sqrt{v + \varepsilon}` and :math:`t = b - m\,s`.

``reference`` evaluates this definition in float64. It is the one oracle: readers, builders and layers are judged by it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from normswap.errors import NormswapError

BATCH: frozenset[str] = frozenset({"batch", "space"})
SYNC: frozenset[str] = frozenset({"batch", "space", "processes"})
MAP: frozenset[str] = frozenset({"channel", "space"})
POSITION: frozenset[str] = frozenset({"channel"})
SPACE: frozenset[str] = frozenset({"space"})

Exactness = Literal["exact", "approximate", "retrain"]


@dataclass(frozen=True, eq=False)
class Form:
    """What a norm computes beyond the formula above: its tensors, and its output in float64.

    A kind has a subclass, which is a frozen dataclass. The norm that holds it describes the nearest one without: its
    affine and statistics are what another kind takes over."""

    loses: ClassVar[str] = ""
    """What another kind has no place for."""
    note: ClassVar[str] = ""
    """What a plan says of a norm that becomes one of this form."""
    affine: ClassVar[bool] = True
    """Whether weight and bias of the norm act on its output, as in a norm without form."""
    neutral: ClassVar[dict[str, float]] = {}
    """The values of its tensors in a new layer; 0 where nothing is said."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.compare}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def fresh(self) -> Form:
        """The form of a new layer."""
        made = {}
        for name, old in self.tensors.items():
            new = torch.full_like(old.detach(), self.neutral.get(name, 0.0))
            made[name] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
        return replace(self, **made)

    def output(self, x: Tensor, norm: Norm, eps: float, training: bool) -> Tensor:
        """The output of ``norm`` for ``x`` of shape ``(N, C, *S)`` in float64."""
        raise NotImplementedError

    def plain(self, norm: Norm) -> Norm | None:
        """The norm without form that computes the same as ``norm`` in eval mode, where there is one."""
        return None


@dataclass(frozen=True, eq=False)
class Norm:
    """One frozen description of what a normalization computes.

    Tensors are those of the module it was read from (no copies), each of shape ``(channels,)`` unless ``shape`` says
    otherwise. Two ``Norm`` are compared by :func:`exactness`, not by ``==``.
    """

    kind: str
    channels: int
    pools: frozenset[str] = BATCH
    """Axes the moments run over: of ``batch``, ``channel`` (those of one group), ``space``, ``processes``."""
    groups: int = 1
    """Groups the channels are cut into; meaningful when ``channel`` is pooled."""
    channel_axis: Literal[1, -1] = 1
    shape: tuple[int, ...] | None = None
    """Trailing axes normalized together when there are several, as in ``nn.LayerNorm((L, C))``; affine has this
    shape."""
    ranks: frozenset[int] | None = None
    """Numbers of input dimensions the norm accepts; ``None`` for any."""
    centred: bool = True
    """Whether the mean is subtracted."""
    spread: Literal["variance", "square"] = "variance"
    """What is divided by: the variance about the mean, or the mean square."""
    correction: int = 0
    """Bessel's correction of the variance (1 in timm's SimpleNorm)."""
    eps: float | None = 1e-5
    """Added to the variance; ``None`` for the machine epsilon of the input's dtype (``nn.RMSNorm``)."""
    momentum: float | None = 0.1
    """Weight of the new batch in the running statistics; ``None`` for a cumulative mean."""
    schedule: Any = None
    """How that weight changes with the batches seen, before it is ``momentum``."""
    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    fixed: bool = False
    """Running statistics also in train mode, affine not trained: a frozen norm."""
    gates: tuple[Tensor, Tensor] | None = None
    """Switchable only: logits of shape ``(3,)`` for means and for variances, in the order instance, layer, batch; of
    shape ``(2,)`` without batch."""
    share: Tensor | None = None
    """Batch-instance only: the part of the batch-normalized value, the rest being instance-normalized; in [0, 1]."""
    threshold: Tensor | None = None
    """Frn only: what lies below it is raised to it."""
    limits: tuple[Tensor, Tensor] | None = None
    """Renorm only: how far train mode may stretch (at least 1) and move (at least 0) from the batch's moments to the
    running ones, in deviations."""
    virtual_batch: int | None = None
    """Ghost only: train mode normalizes so many samples together."""
    form: Form | None = None
    """How it is computed, where not by the formula that all others share."""
    then: tuple[nn.Module, ...] = ()
    """What runs after the norm inside the same module: drop, activation."""
    upcast: bool = False
    """The norm computes in float32 whatever the dtype of its input."""
    process_group: Any = None
    """Whose batches are pooled where ``processes`` are; ``None`` for all processes."""

    @property
    def channels_per_group(self) -> int:
        return self.channels // self.groups

    @property
    def has_statistics(self) -> bool:
        """Whether eval mode uses running statistics."""
        return self.running_mean is not None and self.running_var is not None

    @property
    def mixes(self) -> bool:
        """Whether it is a learned mixture of several norms."""
        return self.gates is not None or self.share is not None

    @property
    def follows(self) -> bool:
        """Whether something runs behind the norm inside the same module that changes its output."""
        return any(not isinstance(module, nn.Identity) for module in self.then)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The norm's tensors by field name, absent ones left out."""
        names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "share", "threshold")
        found = {name: tensor for name in names if (tensor := getattr(self, name)) is not None}
        if self.gates is not None:
            found["mean_gate"], found["var_gate"] = self.gates
        return found if self.form is None else {**found, **self.form.tensors}

    def __str__(self) -> str:
        parts = [str(self.channels) if self.shape is None else "x".join(map(str, self.shape))]
        if "channel" in self.pools and self.groups != 1:
            parts.append(f"groups={self.groups}")
        if self.pools == POSITION and self.channel_axis == 1:
            parts.append("over=channels")
        parts.append("eps=None" if self.eps is None else f"eps={self.eps:g}")
        if "processes" in self.pools and self.kind != "sync":
            parts.append("synchronised")
        if self.weight is None:
            parts.append("no affine")
        parts.extend(type(module).__name__ for module in self.then if not isinstance(module, nn.Identity))
        return f"{self.kind}({', '.join(parts)})"


def epsilon(norm: Norm, dtype: torch.dtype) -> float:
    """The eps in force for an input of ``dtype``."""
    return torch.finfo(dtype).eps if norm.eps is None else norm.eps


def plain(norm: Norm) -> Norm | None:
    """``norm`` itself, or the one without form that computes the same in eval mode; ``None`` where there is none."""
    return norm if norm.form is None else norm.form.plain(norm)


def scale_shift(norm: Norm) -> tuple[Tensor, Tensor] | None:
    """``(s, t)`` in float64, each ``(channels,)``, of a norm that is a channel affine in eval mode; ``None`` for
    others."""
    found = plain(norm)
    if found is None:
        return None
    norm = found
    if not norm.has_statistics or (norm.mixes and not batch_gated(norm)):
        return None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    var = norm.running_var.detach().double()
    scale = (var + epsilon(norm, norm.running_var.dtype)).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.detach().double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift


GATE_TOLERANCE = 1e-6
"""A mixture with less than this weight outside one source counts as that source: below float32 rounding of a layer."""


def gate_weights(norm: Norm) -> tuple[Tensor, Tensor]:
    """Softmax of the two gates in float64, each ``(3,)``: instance, layer, batch; or ``(2,)``."""
    if norm.gates is None:
        raise NormswapError(f"{norm} has no gates; only a switchable norm does")
    mean, var = (gate.detach().double().softmax(0) for gate in norm.gates)
    return mean, var


def _gated(norm: Norm) -> int | None:
    """The one source (0 instance, 1 layer, 2 batch) that both gates, or all shares, select, if there is one."""
    if norm.share is not None:
        if norm.ranks == frozenset({2}):  # On (N, C) an instance is one value: it is all batch.
            return 2
        if norm.share.is_meta or bool(((norm.share > 0) & (norm.share < 1)).any()):
            return None
        chosen = norm.share.detach() >= 1
        return 2 if bool(chosen.all()) else None if bool(chosen.any()) else 0
    mean, var = gate_weights(norm)
    if mean.is_meta:
        return None
    source = int(mean.argmax())
    if min(float(mean[source]), float(var[source])) >= 1 - GATE_TOLERANCE:
        return source
    return None


def batch_gated(norm: Norm) -> bool:
    return norm.mixes and _gated(norm) == 2


def reference(x: Tensor, norm: Norm, *, training: bool = False) -> Tensor:
    """The norm's output by its definition, in float64, without ``then``.

    ``x`` has shape ``(N, C, *S)``, or ``(*, C)`` for a channels-last norm; any floating dtype and device.
    Raises :class:`NormswapError` when ``x`` does not have the norm's channels.
    """
    if x.dim() < 1 or x.shape[norm.channel_axis] != norm.channels:
        raise NormswapError(f"input of shape {tuple(x.shape)} does not have {norm.channels} channels for {norm}")
    eps = epsilon(norm, x.dtype)
    x = x.double()
    if norm.shape is not None:
        mean, var = _moments(x, tuple(range(-len(norm.shape), 0)), norm)
        return _affine(x, mean, var, eps, norm, norm.shape)
    first = x if norm.channel_axis == 1 else x.movedim(-1, 1)
    if norm.form is not None:
        return norm.form.output(first, norm, eps, training)
    running = norm.has_statistics and (norm.fixed or not training)
    if norm.gates is not None:
        mean, var = _mixture(first, norm, running)
    elif running:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, var = (_per_channel(s.double(), first) for s in (norm.running_mean, norm.running_var))
    elif training and norm.virtual_batch is not None:
        parts = first.split(virtual_batches(len(first), norm.virtual_batch))
        mean, var = (torch.cat(each) for each in zip(*(_pooled(part, norm) for part in parts), strict=True))
    else:
        mean, var = _pooled(first, norm)
        if training and norm.limits is not None:
            mean, var = _renormalized(first, mean, var, eps, norm)
    each = (norm.channels, *[1] * (first.dim() - 2))
    out = _affine(first, mean, var, eps, norm, each)
    if norm.share is not None and first.dim() > 2:
        alone = _affine(first, *_moments(first, tuple(range(2, first.dim())), norm), eps, norm, each)
        out = torch.lerp(alone, out, norm.share.detach().to(out).clamp(0, 1).reshape(each))
    if norm.threshold is not None:
        out = torch.maximum(out, norm.threshold.detach().to(out).reshape(each))
    return out if norm.channel_axis == 1 else out.movedim(1, -1)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.detach().to(x.device).reshape(1, -1, *[1] * (x.dim() - 2))


def _moments(x: Tensor, dims: tuple[int, ...], norm: Norm) -> tuple[Tensor, Tensor]:
    if not dims:
        return x, x.square() if norm.spread == "square" else torch.zeros_like(x)
    mean = x.mean(dims, keepdim=True)
    if norm.spread == "square":
        return mean, x.square().mean(dims, keepdim=True)
    return mean, x.var(dims, keepdim=True, correction=norm.correction)


def _pooled(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    split = x.unflatten(1, (norm.groups if "channel" in norm.pools else norm.channels, -1))
    dims = tuple(range(3, split.dim())) if "space" in norm.pools else ()
    dims += ((0,) if "batch" in norm.pools else ()) + ((2,) if "channel" in norm.pools else ())
    mean, var = _moments(split, dims, norm)
    shape = (*split.shape[:1], *split.shape[1:3], *split.shape[3:])
    return (m.expand(shape).reshape(x.shape) for m in (mean, var))  # type: ignore[return-value]


def _mixture(x: Tensor, norm: Norm, running: bool) -> tuple[Tensor, Tensor]:
    space = tuple(range(2, x.dim()))
    sources = [_moments(x, space, norm), _moments(x, (1, *space), norm)]
    gates = gate_weights(norm)
    if len(gates[0]) == 3 and running:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        sources.append((_per_channel(norm.running_mean.double(), x), _per_channel(norm.running_var.double(), x)))
    elif len(gates[0]) == 3:
        sources.append(_moments(x, (0, *space), norm))
    if not space:  # On (N, C) an instance is one value: its share goes to layer and batch.
        sources = sources[1:]
        gates = tuple(g[1:] / g[1:].sum() for g in gates)  # type: ignore[assignment]
    mean = sum(w * m for w, (m, _) in zip(gates[0], sources, strict=True))
    var = sum(w * v for w, (_, v) in zip(gates[1], sources, strict=True))
    assert isinstance(mean, Tensor)
    assert isinstance(var, Tensor)
    return mean, var


def virtual_batches(samples: int, size: int) -> list[int]:
    """The sizes of the parts, at most ``size`` and as even as can be, that ``samples`` are cut into."""
    count = -(-samples // size)
    return [samples // count + (index < samples % count) for index in range(count)]


def _renormalized(x: Tensor, mean: Tensor, var: Tensor, eps: float, norm: Norm) -> tuple[Tensor, Tensor]:
    """The moments with which ``(x - mean) / deviation`` is the batch's own times r plus d."""
    assert norm.limits is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    furthest, far = (float(limit) for limit in norm.limits)
    past = torch.sqrt(_per_channel(norm.running_var.double(), x) + eps)
    deviation = torch.sqrt(var + eps)
    r = (deviation / past).clamp(1 / furthest, furthest)
    d = ((mean - _per_channel(norm.running_mean.double(), x)) / past).clamp(-far, far)
    return mean - d * deviation / r, (deviation / r).square() - eps


def _affine(x: Tensor, mean: Tensor, var: Tensor, eps: float, norm: Norm, shape: tuple[int, ...]) -> Tensor:
    out = (x - mean if norm.centred else x) / torch.sqrt(var + eps)
    if norm.weight is not None:
        out = out * norm.weight.detach().to(x).reshape(shape)
    if norm.bias is not None:
        out = out + norm.bias.detach().to(x).reshape(shape)
    return out


def _same(a: Tensor | None, b: Tensor | None, neutral: float) -> bool:
    """Whether two per-channel tensors are equal in effect; an absent one equals its neutral value."""
    if a is b:
        return True
    if a is None or b is None:
        present = b if a is None else a
        assert present is not None
        return not present.is_meta and bool((present.detach() == neutral).all())
    if a.is_meta or b.is_meta:
        return a.shape == b.shape
    return a.shape == b.shape and torch.equal(a.detach().double().cpu(), b.detach().double().cpu())


def _structure(norm: Norm, flat: bool = False) -> tuple[object, ...]:
    """What the moments run over, in a form that is equal for equal functions (``group(1)`` and ``layer`` over a
    map). ``flat``: for inputs ``(N, C)``, which have no space."""
    pools, groups = norm.pools, norm.groups
    if norm.mixes:
        source = _gated(norm)
        if source is None:
            return ("mixture",)
        pools, groups = (SPACE, MAP, BATCH)[source], 1
    if "channel" in pools and groups == norm.channels:
        pools, groups = pools - {"channel"}, 1
    if "channel" not in pools:
        groups = 1
    pools -= {"processes", "space"} if flat else {"processes"}
    return (
        pools, groups, norm.channel_axis, norm.shape, norm.centred, norm.spread, norm.correction,
        norm.eps,
    )  # fmt: skip


def exactness(source: Norm, target: Norm) -> Exactness:
    """How the eval-mode function of ``target`` relates to that of ``source``.

    ``exact``: the same function (on one process). ``approximate``: another function, which calibration of the
    per-channel affine can bring near. ``retrain``: another function with no affine to calibrate. Only mathematics
    counts: rounding does not."""
    if source.channels != target.channels:
        return "retrain"
    same = _same_form(source, target) if (given := _plains(source, target)) is None else _same_function(*given)
    if same:
        return "exact"
    return "approximate" if target.weight is not None else "retrain"


def _plains(*norms: Norm) -> tuple[Norm, Norm] | None:
    found = [plain(norm) for norm in norms]
    return None if None in found else (found[0], found[1])  # type: ignore[return-value]


def _same_form(source: Norm, target: Norm) -> bool:
    """Whether two norms, of which one at least computes what no norm without form does, are the same."""
    ours, theirs = source.form, target.form
    if ours is None or theirs is None or type(ours) is not type(theirs) or ours.tensors.keys() != theirs.tensors.keys():
        return False
    settings = [
        [getattr(form, each.name) for each in fields(form) if each.compare and each.name not in form.tensors]
        for form in (ours, theirs)
    ]
    fixed = [_structure(norm) for norm in (source, target)]
    pairs = [(getattr(source, name), getattr(target, name), neutral) for name, neutral in _NEUTRAL.items()]
    pairs += [(tensor, theirs.tensors[name], 0.0) for name, tensor in ours.tensors.items()]
    return settings[0] == settings[1] and fixed[0] == fixed[1] and all(_same(*pair) for pair in pairs)


_NEUTRAL = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}


def _same_function(source: Norm, target: Norm) -> bool:
    ours, theirs = scale_shift(source), scale_shift(target)
    if ours is not None and theirs is not None:
        same = all(
            a.is_meta or b.is_meta or torch.allclose(a.cpu(), b.cpu(), rtol=1e-9, atol=1e-12)
            for a, b in zip(ours, theirs, strict=True)
        )
        return same and source.channel_axis == target.channel_axis
    flat = source.ranks == frozenset({2})
    return (
        (ours is None) == (theirs is None)
        and _structure(source, flat) == _structure(target, flat)
        and _same(source.weight, target.weight, 1.0)
        and _same(source.bias, target.bias, 0.0)
        and ("mixture",) not in (_structure(source),)
        and _same(source.threshold, target.threshold, float("-inf"))
    )
