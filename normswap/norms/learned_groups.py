r"""Group normalization (Wu and He, arXiv 1803.08494) that learns which channels form a group.

Each channel :math:`c` belongs to group :math:`g` with a share :math:`A_{cg} = \operatorname{softmax}_g(\ell_{cg} / T)`:
the continuous relaxation of a choice at temperature :math:`T`, as the Concrete distribution has it (Maddison, Mnih and
Teh, arXiv 1611.00712; Jang, Gu and Poole, arXiv 1611.01144), without its noise. From the mean and variance :math:`m_c,
v_c` of each channel over space,

.. math::  M_g = \frac{\sum_c A_{cg} m_c}{\sum_c A_{cg}}, \quad
           V_g = \frac{\sum_c A_{cg} \bigl(v_c + (m_c - M_g)^2\bigr)}{\sum_c A_{cg}}, \quad
           y_c = \frac{x_c - \sum_g A_{cg} M_g}{\sqrt{\sum_g A_{cg} V_g + \varepsilon}} \; w_c + b_c ,

which is group normalization where all shares are 0 or 1. The paper of group normalization cuts the channels in order;
so do the logits at first, by ``gap`` above the others: 4 leaves a channel's own group most of its share and moves. As
:math:`T` falls, shares harden; :func:`harden` makes each channel's greatest share 1 for good. Groups are then of any
size, and one may be empty."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normswap.errors import NormswapError, Refusal
from normswap.norms.adopt import is_instance, like
from normswap.norms.group import group_count
from normswap.norms.moments import Coefficients, Moments, affine, normalize
from normswap.norms.momentum import Momentum
from normswap.norms.tracked import TrackedNorm, assemble, fields
from normswap.registry import builds, reads
from normswap.spec import GATE_TOLERANCE, MAP, Form, Norm

GAP = 4.0
HARD = 40.0
"""A logit so far above the others leaves them nothing in float64."""
NONE = 1e-12
"""The channels of an empty group."""


def assigned(
    moments: Moments, logits: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, temperature: float
) -> Coefficients:
    """Scale and shift by the formulas above."""
    shares = (logits.to(moments.mean.dtype) / temperature).softmax(1)
    within = shares / shares.sum(0).clamp(min=NONE)
    means = moments.mean @ within
    apart = (moments.mean.unsqueeze(2) - means.unsqueeze(1)).square()  # (N, C, G)
    variances = moments.var @ within + (apart * within).sum(1)
    return affine(means @ shares.t(), variances @ shares.t(), weight, bias, eps)


def check_positive(name: str, value: object) -> None:
    """Raise :class:`NormswapError` for what is no number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise NormswapError(f"{name}={value!r}: it must be a number above 0")


def in_order(channels: int, groups: int, gap: float) -> Tensor:
    """Logits of groups of channels in order, ``(channels, groups)``."""
    group = torch.arange(channels) * groups // channels
    return nn.functional.one_hot(group, groups).double() * gap


class LearnedGroupNorm(TrackedNorm):
    """Group normalization of ``(N, C, *S)`` with learned groups, any rank of at least 2.

    The arguments are those of ``nn.BatchNorm2d``; ``momentum`` and ``track_running_stats`` are taken for its sake and
    do nothing, since there are no running statistics. Parameters ``weight``, ``bias`` of shape ``(num_features,)`` and
    ``logits`` of shape ``(num_features, groups)``; ``temperature`` may be set at any time. Raises
    :class:`NormswapError` for groups that do not divide the channels, a temperature or a gap that is not above 0."""

    logits: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Momentum = None,
        affine: bool = True,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        groups: int | None = None,
        temperature: float = 1.0,
        gap: float = GAP,
    ) -> None:
        check_positive("temperature", temperature)
        check_positive("gap", gap)
        super().__init__(num_features, eps, momentum, affine, False, device, dtype, bias=bias)
        self.temperature, self.gap = temperature, gap
        logits = in_order(num_features, group_count(num_features, groups), gap)
        where = dtype if dtype is not None else torch.get_default_dtype()
        self.logits = nn.Parameter(logits.to(device=device, dtype=where))

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        function = partial(assigned, eps=self.eps, temperature=self.temperature)
        return normalize(x, function, self.logits, self.weight, self.bias)[0]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make parameters, in place, those of a new layer: groups of channels in order, by ``gap``."""
        super().reset_parameters()
        channels, groups = self.logits.shape
        self.logits.copy_(in_order(channels, groups, self.gap))

    @torch.no_grad()
    def harden(self) -> None:
        """Give each channel to the group of its greatest share, in place, and stop learning it.

        The choice is in the logits, for any temperature up to 1 or that of now: a state dict has no temperature."""
        chosen = nn.functional.one_hot(self.logits.argmax(1), self.logits.shape[1])
        self.logits.copy_(chosen.to(self.logits.dtype) * HARD * max(self.temperature, 1.0))
        self.logits.requires_grad_(False)

    def extra_repr(self) -> str:
        groups = self.logits.shape[1]
        return f"{self.num_features}, groups={groups}, temperature={self.temperature:g}, eps={self.eps}"


class LearnedGroupNorm1d(LearnedGroupNorm):
    """Group normalization of ``(N, C)`` or ``(N, C, L)`` with learned groups."""

    dims = frozenset({2, 3})


class LearnedGroupNorm2d(LearnedGroupNorm):
    """Group normalization of ``(N, C, H, W)`` with learned groups."""

    dims = frozenset({4})


class LearnedGroupNorm3d(LearnedGroupNorm):
    """Group normalization of ``(N, C, D, H, W)`` with learned groups."""

    dims = frozenset({5})


CLASSES = (LearnedGroupNorm, LearnedGroupNorm1d, LearnedGroupNorm2d, LearnedGroupNorm3d)


def harden(model: nn.Module) -> int:
    """Harden the learned groups of every layer of ``model``, in place; returns how many layers there are."""
    layers = [module for module in model.modules() if isinstance(module, LearnedGroupNorm)]
    for layer in layers:
        layer.harden()
    return len(layers)


@dataclass(frozen=True, eq=False)
class GroupsForm(Form):
    logits: Tensor
    temperature: float

    loses = "learned groups"

    def output(self, x: Tensor, norm: Norm, eps: float, training: bool) -> Tensor:
        shares = (self.logits.detach().to(x) / self.temperature).softmax(1)
        flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
        mean, var = torch.zeros_like(flat[:, :, :1]), torch.zeros_like(flat[:, :, :1])
        for share in shares.unbind(1):
            weights = (share / (share.sum().clamp(min=NONE) * flat.shape[2])).reshape(1, -1, 1)
            centre = (flat * weights).sum((1, 2), keepdim=True)
            spread = ((flat - centre).square() * weights).sum((1, 2), keepdim=True)
            mean, var = mean + share.reshape(1, -1, 1) * centre, var + share.reshape(1, -1, 1) * spread
        out = ((flat - mean) / (var + eps).sqrt()).reshape(x.shape)
        each = (1, -1, *[1] * (x.dim() - 2))
        weight, bias = (None if t is None else t.detach().to(x).reshape(each) for t in (norm.weight, norm.bias))
        out = out if weight is None else out * weight
        return out if bias is None else out + bias

    def plain(self, norm: Norm) -> Norm | None:
        """Hard groups of channels in order, each of the same size, are those of group normalization."""
        if self.logits.is_meta or norm.channels % norm.groups:
            return None
        shares = (self.logits.detach().double() / self.temperature).softmax(1)
        wanted = in_order(norm.channels, norm.groups, 1.0).to(shares.device)
        return replace(norm, form=None) if bool(((shares - wanted).abs() <= GATE_TOLERANCE).all()) else None


@reads(*CLASSES)
def read(module: LearnedGroupNorm) -> Norm:
    form = GroupsForm(module.logits, module.temperature)
    return Norm("learned_groups", pools=MAP, groups=module.logits.shape[1], form=form, **fields(module))


@builds("learned_groups")
def build(
    norm: Norm,
    *,
    groups: int | Callable[[int], int] | None = None,
    gap: float = GAP,
    temperature: float = 1.0,
    init: Literal["copy", "preserve", "reset"] = "copy",
) -> LearnedGroupNorm:
    """``groups``: as many as the norm has, or as for group norm. ``init="preserve"``: the groups of a norm that has
    some, hard at first; their gradient is then nothing."""
    check_positive("gap", gap)
    check_positive("temperature", temperature)
    if init == "preserve":
        plain = norm.pools == MAP and norm.centred and norm.spread == "variance" and norm.correction == 0
        if (norm.mixes or not plain) and not is_instance(norm):
            raise Refusal("learned groups cannot compute the same (init='preserve'); use init='copy'")
        groups, gap = (norm.groups if norm.pools == MAP else norm.channels), HARD * temperature
    grouped = norm.pools == MAP and norm.channels % norm.groups == 0 and norm.groups > 1
    count = norm.groups if groups is None and grouped else group_count(norm.channels, groups)
    module = assemble(norm, "learned_groups", CLASSES, tracked=False, groups=count, temperature=temperature, gap=gap)
    form = norm.form
    if isinstance(form, GroupsForm) and form.logits.shape[1] == count and init != "reset":
        module.temperature = form.temperature
        module.logits = form.logits if isinstance(form.logits, nn.Parameter) else nn.Parameter(form.logits)
    else:
        module.logits = nn.Parameter(module.logits.detach().to(**like(norm)))
    return module
