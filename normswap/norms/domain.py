r"""Domain-specific batch normalization (Chang et al., arXiv 1906.03950): statistics and an affine for each domain.

.. math::  y = \frac{x - m_d}{\sqrt{v_d + \varepsilon}} \; w_d + b_d

where in train mode :math:`m_d, v_d` are the moments of those samples of the batch that are of domain :math:`d`, and in
eval mode the domain's moving averages, of biased variances. The paper's batches are of one domain; here each sample may
have its own. A domain that a batch has no samples of keeps its statistics and its count of batches. The domain is given
by :func:`normswap.norms.condition.condition`.

Another kind has one affine and one set of statistics: those of all domains, where they are the same, otherwise the mean
affine and the moments of a mixture of all in equal parts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from normswap.errors import check_whole
from normswap.norms.adopt import channels_first, dimensions, like
from normswap.norms.batch import eps_of
from normswap.norms.condition import Need, NeedsCondition, indices, per_sample
from normswap.norms.moments import Coefficients, Moments, affine, normalize
from normswap.norms.momentum import Momentum, share_of
from normswap.norms.rows import (
    adopt_rows,
    alike,
    chosen,
    nearest,
    repeat_affine,
    repeated,
)
from normswap.norms.tracked import TrackedNorm, fields, momentum_of
from normswap.registry import builds, reads
from normswap.spec import BATCH, Form, Norm


def separated(
    moments: Moments,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    members: Tensor,
    *,
    eps: float,
) -> Coefficients:
    """Scale and shift of each sample; statistics ``(N, C)`` where they are given.

    ``members``, ``(N, D)``, is 1 where a sample is of a domain. ``seen`` has means and variances, ``(D, C)``, and
    which domains have samples, ``(D, 1)``."""
    if running_mean is not None and running_var is not None:
        dtype = moments.mean.dtype
        return affine(running_mean.to(dtype), running_var.to(dtype), weight, bias, eps)
    members = members.to(moments.mean.dtype)
    count = members.sum(0).unsqueeze(1)
    mean = members.t() @ moments.mean / count.clamp(min=1)
    own = members @ mean
    var = members.t() @ (moments.var + (moments.mean - own).square()) / count.clamp(min=1)
    return affine(own, members @ var, weight, bias, eps, (mean, var, count > 0))


class DomainBatchNorm(TrackedNorm, NeedsCondition):
    """Domain-specific batch normalization of ``(N, C, *S)``, any rank of at least 2.

    Arguments as of ``nn.BatchNorm2d``; parameters ``weight``, ``bias`` and buffers ``running_mean``, ``running_var``
    of shape ``(domains, num_features)``, ``num_batches_tracked`` of shape ``(domains,)``. Raises
    :class:`NormswapError` without a domain."""

    needs: ClassVar[Need] = "domain"

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
        domains: int = 2,
    ) -> None:
        check_whole("domains", domains)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.domains = domains
        repeat_affine(self, domains)
        for name in self.statistics:
            if (buffer := getattr(self, name)) is not None:
                self.register_buffer(name, repeated(buffer, domains))

    def accept(self, value: Any) -> Tensor:
        """Indices, ``(1 or N,)``."""
        return indices(value, self.domains, "domain", "domains")

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        domain = per_sample(self.condition(), x.shape[0], self.needs).to(x.device)
        members = F.one_hot(domain, self.domains).expand(x.shape[0], -1)
        given = [chosen(rows, domain) for rows in (self.weight, self.bias, *self.running)]
        out, seen = normalize(x, partial(separated, eps=self.eps), *given, members)
        if seen:
            self.track_domains(*seen)
        return out

    @torch.no_grad()
    def track_domains(self, mean: Tensor, var: Tensor, present: Tensor) -> None:
        """Move the running statistics of the domains that are ``present``."""
        if not (self.training and self.track_running_stats) or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(present.squeeze(1))
        share = present * share_of(self.momentum, self.num_batches_tracked, mean.dtype).unsqueeze(1)
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            running.copy_(torch.lerp(running.to(new.dtype), new, share))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, domains={self.domains}"


class DomainBatchNorm1d(DomainBatchNorm):
    """Domain-specific batch normalization of ``(N, C)`` or ``(N, C, L)``."""

    dims = frozenset({2, 3})


class DomainBatchNorm2d(DomainBatchNorm):
    """Domain-specific batch normalization of ``(N, C, H, W)``."""

    dims = frozenset({4})


class DomainBatchNorm3d(DomainBatchNorm):
    """Domain-specific batch normalization of ``(N, C, D, H, W)``."""

    dims = frozenset({5})


CLASSES = (DomainBatchNorm, DomainBatchNorm1d, DomainBatchNorm2d, DomainBatchNorm3d)


@dataclass(frozen=True, eq=False)
class DomainForm(Form):
    weights: Tensor | None
    biases: Tensor | None
    means: Tensor | None
    variances: Tensor | None
    batches: Tensor | None
    module: DomainBatchNorm = field(compare=False)

    loses = "an affine and statistics for each domain"
    note = "it needs a domain for each call: run the model inside normswap.layers.condition"
    affine = False
    neutral = {"weights": 1.0, "variances": 1.0}  # noqa: RUF012

    def output(self, x: Tensor, norm: Norm, eps: float, training: bool) -> Tensor:
        domain = self.module.condition().expand(x.shape[0])
        space = tuple(range(2, x.dim()))
        out = torch.empty_like(x)
        for index in domain.unique().tolist():
            part = x[domain == index]
            if self.means is not None and self.variances is not None and not training:
                mean, var = (rows[index].detach().to(x) for rows in (self.means, self.variances))
            else:
                mean, var = part.mean((0, *space)), part.var((0, *space), correction=0)
            scale = (var + eps).rsqrt() * (1.0 if self.weights is None else self.weights[index].detach().to(x))
            shift = 0.0 if self.biases is None else self.biases[index].detach().to(x)
            moved = (part - mean.reshape(-1, *[1] * len(space))).movedim(1, -1) * scale + shift
            out[domain == index] = moved.movedim(-1, 1)
        return out

    def plain(self, norm: Norm) -> Norm | None:
        same = alike(self.weights, self.biases, self.means, self.variances)
        return replace(norm, form=None) if same and norm.has_statistics else None


@reads(*CLASSES)
def read(module: DomainBatchNorm) -> Norm:
    form = DomainForm(
        module.weight, module.bias, module.running_mean, module.running_var, module.num_batches_tracked, module
    )
    found = fields(module)
    for name in ("weight", "bias", "running_mean", "running_var"):
        found[name] = nearest(found[name])
    if module.running_mean is not None and module.running_var is not None:
        if not alike(module.running_mean, module.running_var):
            means = module.running_mean.double()
            spread = module.running_var.double().mean(0) + (means - means.mean(0)).square().mean(0)
            found["running_var"] = spread.to(module.running_var.dtype)
        assert module.num_batches_tracked is not None
        found["num_batches_tracked"] = module.num_batches_tracked.amax()
    return Norm("domain", pools=BATCH, form=form, **found)


@builds("domain")
def build(norm: Norm, *, domains: int | None = None) -> DomainBatchNorm:
    """``domains``: 2, or as many as the norm has."""
    channels_first(norm, "domain")
    form = norm.form if isinstance(norm.form, DomainForm) else None
    if domains is None:
        domains = 2 if form is None else form.module.domains
    check_whole("domains", domains)
    cls = CLASSES[dimensions(norm) or 0]
    module = cls(norm.channels, eps_of(norm), momentum_of(norm), False, **like(norm), domains=domains)
    kept = form is not None and form.module.domains == domains
    module.affine = norm.weight is not None or norm.bias is not None
    adopt_rows(module, norm, form if kept else None, domains)
    for name, field_name in (
        ("running_mean", "means"),
        ("running_var", "variances"),
        ("num_batches_tracked", "batches"),
    ):
        rows = getattr(form, field_name) if kept else repeated(getattr(norm, name), domains)
        if rows is not None:
            module.register_buffer(name, rows)
    return module
