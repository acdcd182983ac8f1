r"""The last linear layers, fitted by ridge regression to what they gave in the original model.

A norm of another kind loses, sample by sample, what no affine brings back: the mean and scale of a group of channels.
Other features tell much of it, and the layer that reads them all can make up for it. With its input ``x`` in the
converted model, ``y`` its output there and ``t`` its output in the original, the correction ``D x + d`` of the output,
which its weight and bias take up, minimises

.. math:: \sum \lVert t - y - D x - d \rVert^2 + \lambda n \lVert D \rVert^2.

So the ridge draws towards the weight as it was. :math:`\lambda` minimises generalized cross-validation (Golub, Heath
and Wahba 1979), each degree of freedom counted 1.4 times against overfitting (Cummins, Filloon and Nychka 2001),
over :data:`GRID`; where no :math:`\lambda` promises to do better than ``d`` alone, ``D`` is zero. Positions of one
sample are alike, so the number of samples counts, not that of rows. All comes from sums in float64 that add up over
batches and processes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from normswap.calibration import processes
from normswap.calibration.fit import CHUNK, Layout

GRID = tuple(10 ** (power / 2) for power in range(-6, 5))
"""Ridges that are tried, in units of the mean variance of the features."""
PENALTY = 1.4
SMALLEST = 1e-12
"""Features whose mean variance is below this, in units of their mean square, are constant."""
LARGEST = 2048
"""Features of a layer that is fitted; the sums have their square."""


@dataclass(frozen=True)
class Correction:
    """What a linear layer takes up: ``x @ weight.T + bias`` is added to its output, in float64."""

    layout: Layout
    bias: Tensor
    """``(outputs,)``."""
    weight: Tensor | None = None
    """``(outputs, features)``; ``None`` for a bias alone."""

    def applied(self, x: Tensor, output: Tensor) -> Tensor:
        """The corrected output of the layer, of which ``x`` is the input."""
        output = output + self.layout.broadcast(self.bias, output)
        return output if self.weight is None else output + product(self.weight, x, self.layout.axis).to(output)


def product(weight: Tensor, x: Tensor, axis: int) -> Tensor:
    """``weight @ x``, ``(outputs, features)`` by features in the axis of the channels, in the dtype of ``x``."""
    return (x.movedim(axis, -1) @ weight.to(x).T).movedim(-1, axis)


@dataclass
class Gram:
    """Sums over rows, of features ``x`` and residuals ``r = t - y``, in float64."""

    counts: Tensor
    """``(2,)``: samples, rows."""
    x: Tensor
    r: Tensor
    xx: Tensor
    """``(features, features)``."""
    xr: Tensor
    """``(features, outputs)``."""
    rr: Tensor
    """Of squares, of all outputs: one number."""
    rows: list[tuple[Tensor, Tensor]] | None = field(default_factory=list)
    """All rows of both, as long as they are fewer than the features; then ``None``."""

    @classmethod
    def zero(cls, features: int, outputs: int, device: torch.device) -> Gram:
        shapes = ((2,), (features,), (outputs,), (features, features), (features, outputs), (1,))
        counts, x, r, xx, xr, rr = (torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes)
        return cls(counts, x, r, xx, xr, rr)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.counts, self.x, self.r, self.xx, self.xr, self.rr)

    def add(self, layout: Layout, x: Tensor, output: Tensor, original: Tensor) -> None:
        """Take up one batch: the layer's input, its output, and its output in the original model."""
        rows = x.detach().movedim(layout.axis, -1).reshape(-1, len(self.x))
        pairs = (each.detach().movedim(layout.axis, -1).reshape(-1, len(self.r)) for each in (original, output))
        wanted, given = (each.to(self.x.device) for each in pairs)
        self.counts += torch.tensor([len(x) if x.dim() > 1 else 1, len(rows)]).to(self.counts)
        if self.rows is not None and self.counts[1] > len(self.x):
            self.rows = None
        step = max(1, CHUNK // (len(self.x) + len(self.r)))
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            a, r = rows[part].double(), wanted[part].double() - given[part].double()
            self.x += a.sum(0)
            self.r += r.sum(0)
            self.xx.addmm_(a.T, a)
            self.xr.addmm_(a.T, r)
            self.rr += r.square().sum()
            if self.rows is not None:
                self.rows.append((a, r))

    def everywhere(self) -> Gram:
        """The sums over all processes."""
        if not processes.several():
            return self
        packed = processes.total(torch.cat([tensor.flatten() for tensor in self.tensors]))
        parts = packed.split([tensor.numel() for tensor in self.tensors])
        counts, x, r, xx, xr, rr = (p.reshape(t.shape) for p, t in zip(parts, self.tensors, strict=True))
        return Gram(counts, x, r, xx, xr, rr, None)

    def spectrum(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the covariance of the features: eigenvalues ``(k,)``, eigenvectors ``(features, k)``, and what each
        eigenvector has in common with the residuals, ``(k, outputs)``. Of few rows by those of their products, which
        are fewer."""
        count = self.counts[1]
        mean_x, mean_r = self.x / count, self.r / count
        if self.rows:
            x, r = (torch.cat(parts) for parts in zip(*self.rows, strict=True))
            x = x - mean_x
            values, vectors = torch.linalg.eigh(x @ x.T / count)
            kept = values > values[-1] * 1e-12
            values, vectors = values[kept], vectors[:, kept]
            vectors = x.T @ vectors / (values * count).sqrt()
            return values, vectors, vectors.T @ (x.T @ (r - mean_r)) / count
        covariance = self.xx / count - torch.outer(mean_x, mean_x)
        values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
        return values.clamp(min=0), vectors, vectors.T @ (self.xr / count - torch.outer(mean_x, mean_r))


def regressed(total: Gram, layout: Layout) -> Correction:
    """The correction by the formulas above; of no rows, nothing."""
    samples, rows = (float(count) for count in total.counts)
    if not rows:
        return Correction(layout, total.r)
    mean_x, mean_r = total.x / rows, total.r / rows
    alone = Correction(layout, mean_r)
    if not all(tensor.sum().isfinite() for tensor in total.tensors):
        return alone
    unit = float(total.xx.diagonal().sum() / rows - mean_x.square().sum()) / len(mean_x)
    if samples <= PENALTY or not unit > SMALLEST * float(mean_x.square().mean()):
        return alone
    values, vectors, cross = total.spectrum()
    squares = cross.square().sum(1)
    spread = float(total.rr / rows - mean_r.square().sum())
    best, ridge = spread / (samples - PENALTY) ** 2, None
    for candidate in GRID:
        shrunk = 1 / (values + candidate * unit)
        freedom = PENALTY * (1 + float((values * shrunk).sum()))
        if freedom >= samples:
            continue
        left = spread - float((squares * (2 * shrunk - shrunk.square() * values)).sum())
        score = max(left, 0.0) / (samples - freedom) ** 2
        if score < best:
            best, ridge = score, candidate
    if ridge is None:
        return alone
    weight = (vectors @ (cross / (values + ridge * unit).unsqueeze(1))).T
    return Correction(layout, mean_r - weight @ mean_x, weight)
