r"""Conditional normalization: a label chooses the affine, of a batch norm or of an instance norm.

.. math::  y = \frac{x - m}{\sqrt{v + \varepsilon}} \; w_k + b_k

with a row of weights and biases for each class :math:`k`. Over instances, a class is a style (Dumoulin, Shlens and
Kudlur, arXiv 1610.07629); styles are blended by weights of the classes in place of a label. Over batches, it is
conditional batch normalization (de Vries et al., arXiv 1707.00683) with a table in place of a network, as class
conditional generators have it (Miyato and Koyama, arXiv 1802.05637); statistics are those of all classes together, and
behave as in batch normalization. The label is given by :func:`normswap.norms.condition.condition`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from normswap.errors import NormswapError, check_whole
from normswap.norms.adopt import has_space
from normswap.norms.condition import Need, NeedsCondition, indices, per_sample
from normswap.norms.moments import Coefficients, Moments, affine, normalize
from normswap.norms.momentum import Momentum
from normswap.norms.rows import adopt_rows, alike, chosen, nearest, repeat_affine
from normswap.norms.tracked import TrackedNorm, assemble, batch_normalized, fields
from normswap.registry import builds, reads
from normswap.spec import BATCH, SPACE, Form, Norm, reference

Over = Literal["batch", "instance"]


def conditioned(
    moments: Moments,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    eps: float,
    over: Over,
) -> Coefficients:
    """Scale and shift with an affine for each sample, ``(1 or N, C)``."""
    if over == "instance":
        return affine(moments.mean, moments.var, weight, bias, eps)
    if running_mean is not None and running_var is not None:
        dtype = moments.mean.dtype
        return affine(running_mean.to(dtype), running_var.to(dtype), weight, bias, eps)
    return batch_normalized(moments, weight, bias, eps=eps)


def check_over(over: object) -> None:
    if over not in ("batch", "instance"):
        raise NormswapError(f"over={over!r}: it is 'batch' or 'instance'")


class ConditionalNorm(TrackedNorm, NeedsCondition):
    """Conditional normalization of ``(N, C, *S)``, any rank of at least 2; over instances, at least 3.

    Arguments and buffers as of ``nn.BatchNorm2d``; parameters ``weight``, ``bias`` of shape ``(classes,
    num_features)``. With ``over="instance"`` there are no running statistics. Raises :class:`NormswapError` without a
    label."""

    needs: ClassVar[Need] = "label"

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
        classes: int = 2,
        over: Over = "batch",
    ) -> None:
        check_whole("classes", classes)
        check_over(over)
        self.classes, self.over = classes, over
        tracked = track_running_stats and over == "batch"
        super().__init__(num_features, eps, momentum, affine, tracked, device, dtype, bias=bias)

    def _more_parameters(self, where: dict[str, Any]) -> None:
        repeat_affine(self, self.classes)

    def accept(self, value: Any) -> Tensor:
        """Indices ``(1 or N,)`` or weights ``(1 or N, classes)``."""
        if isinstance(value, Tensor) and value.is_floating_point():
            if value.dim() not in (1, 2) or value.shape[-1] != self.classes:
                raise NormswapError(f"weights of shape {tuple(value.shape)}: they are (N, {self.classes})")
            return value.reshape(-1, self.classes)
        return indices(value, self.classes, "label", "classes")

    def check(self, x: Tensor) -> None:
        super().check(x)
        if self.over == "instance" and x.dim() < 3:
            raise ValueError(f"expected at least 3D input (got {x.dim()}D input)")

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        weight, bias = self.weight, self.bias
        if weight is not None or bias is not None:
            label = per_sample(self.condition(), x.shape[0], self.needs)
            weight, bias = chosen(weight, label), chosen(bias, label)
        function = partial(conditioned, eps=self.eps, over=self.over)
        out, seen = normalize(x, function, weight, bias, *self.running)
        if seen:
            self.track(*seen)
        return out

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, classes={self.classes}, over={self.over!r}"


class ConditionalNorm1d(ConditionalNorm):
    """Conditional normalization of ``(N, C)`` or ``(N, C, L)``."""

    dims = frozenset({2, 3})


class ConditionalNorm2d(ConditionalNorm):
    """Conditional normalization of ``(N, C, H, W)``."""

    dims = frozenset({4})


class ConditionalNorm3d(ConditionalNorm):
    """Conditional normalization of ``(N, C, D, H, W)``."""

    dims = frozenset({5})


CLASSES = (ConditionalNorm, ConditionalNorm1d, ConditionalNorm2d, ConditionalNorm3d)


@dataclass(frozen=True, eq=False)
class ConditionalForm(Form):
    weights: Tensor | None
    biases: Tensor | None
    module: ConditionalNorm = field(compare=False)

    loses = "an affine for each label"
    note = "it needs a label for each call: run the model inside normswap.layers.condition"
    affine = False
    neutral = {"weights": 1.0}  # noqa: RUF012

    def output(self, x: Tensor, norm: Norm, eps: float, training: bool) -> Tensor:
        out = reference(x, replace(norm, form=None, weight=None, bias=None, eps=eps), training=training)
        if self.weights is None and self.biases is None:
            return out
        label = self.module.condition()
        for rows, act in ((self.weights, torch.mul), (self.biases, torch.add)):
            row = chosen(None if rows is None else rows.detach().double(), label)
            if row is not None:
                out = act(out, row.reshape(*row.shape, *[1] * (x.dim() - 2)))
        return out

    def plain(self, norm: Norm) -> Norm | None:
        return replace(norm, form=None) if alike(self.weights, self.biases) else None


@reads(*CLASSES)
def read(module: ConditionalNorm) -> Norm:
    form = ConditionalForm(module.weight, module.bias, module)
    found = {**fields(module), "weight": nearest(module.weight), "bias": nearest(module.bias)}
    return Norm("conditional", pools=BATCH if module.over == "batch" else SPACE, form=form, **found)


@builds("conditional")
def build(norm: Norm, *, classes: int | None = None, over: Over | None = None) -> ConditionalNorm:
    """``classes``: 2, or as many as the norm has. ``over``: what the norm pools over where it is an instance norm,
    otherwise ``"batch"``."""
    form = norm.form if isinstance(norm.form, ConditionalForm) else None
    if classes is None:
        rows = None if form is None else next(iter(form.tensors.values()), None)
        classes = 2 if rows is None else len(rows)
    check_whole("classes", classes)
    if over is None:
        over = "instance" if norm.pools == SPACE and not norm.has_statistics else "batch"
    check_over(over)
    if over == "instance":
        has_space(norm, "an instance")
    kept = form is not None and all(len(rows) == classes for rows in form.tensors.values())
    module = assemble(norm, "conditional", CLASSES, tracked=over == "batch", classes=classes, over=over)
    adopt_rows(module, norm, form if kept else None, classes)
    return module
