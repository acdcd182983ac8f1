r"""The passes over a map that is cut into cells, each with moments and factors of its own.

Every spatial axis of length :math:`L` is cut into :math:`s` parts, position :math:`i` being in part
:math:`\lfloor i s / L \rfloor`; where :math:`s` does not divide :math:`L` they are not all as long, and some may be
empty. Moments, scale and shift have shape ``(N, C, *cells)`` with ``s`` cells on each axis, and otherwise all is as in
:mod:`normswap.norms.moments`.

All axes but the last are cut by slicing. Along the last, values stand side by side and its parts may be short: there
factors are spread out to one for each position, and sums are taken over the other axes first, then over the parts of
what is left; of maps too narrow for that, by a product with a matrix of zeros and ones. Of a cell whose mean is large
against its spread, values are shifted by that mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import isfinite, prod

import torch
from torch import Tensor

from normswap.norms.arithmetic import fine, rounded, unrounded, whole_products, wide
from normswap.norms.moments import Function, Moments
from normswap.norms.passes import Passes, Room, portion, scaled
from normswap.norms.pyramid import along, members, part_of, positions

OFF_CENTRE = 4.0
"""Cells whose means are of more than so many standard deviations are shifted: sums of squares lose the square of it."""


def slices(length: int, parts: int) -> list[slice]:
    starts = [-(-part * length // parts) for part in range(parts + 1)]
    return [slice(*pair) for pair in pairwise(starts)]


NARROW = 48
"""Rows of fewer values are too short for torch's sums over the other axes."""


class CellPasses(Passes):
    """Passes over tensors like ``x``, of shape ``(N, C, *S)``, in ``parts`` parts on each spatial axis.

    With ``P`` for ``N`` where channels are last in memory and else for ``N C``, and ``R`` for the last axis (and the
    channels behind it), a tensor is seen as ``(P, parts, L / parts, ..., R)`` if ``parts`` divides the other axes, and
    else as ``(P, L, ..., R)``, of which slabs are cut. A place is a slab's number, where its values are, and where
    its factors and sums."""

    larger = 4

    def __init__(self, x: Tensor, parts: int) -> None:
        super().__init__(x)
        self.space = space = x.shape[2:]
        self.none = x.new_empty(0, dtype=self.fine)
        self.parts = parts
        self.lead = space[:-1] or space
        self.tail = space[-1] if len(space) > 1 else 0
        self.inner = self.channels if self.last else 1
        self.even = all(length % parts == 0 for length in self.lead)
        self.slabs = 1 if self.even else parts ** len(self.lead)
        self.cells = (parts,) * len(space)
        self.centre: Tensor | None = None
        narrow = len(space) == 2 and self.tail < NARROW and self.even and not self.last
        self.by_product = narrow and x.device.type == "cpu" and whole_products()
        self.inside: Tensor
        if self.by_product:
            self.inside = members(self.tail, parts, x.new_empty(0, dtype=self.wide)).t().contiguous()
        # Of narrow maps there are so many cells that float64 would cost more than the passes. Of cells whose means are
        # not large against their spread, nothing is lost.
        self.exact = self.wide if self.by_product else self.fine

    def behind(self) -> int | Tensor:
        """Values behind each moment, at least 1; one number where cells are alike."""
        if self.even and self.tail % self.parts == 0:
            return int(self.count // self.parts ** len(self.cells))
        return positions(self.space, self.parts, self.none).clamp_(min=1)

    def rows(self, tensor: Tensor) -> Tensor:
        flat = tensor.movedim(1, -1) if self.last else tensor
        lead = [n for length in self.lead for n in (self.parts, length // self.parts)] if self.even else self.lead
        return flat.reshape(self.samples if self.last else -1, *lead, max(self.tail, 1) * self.inner)

    def spread(self, values: Tensor) -> Tensor:
        """Factors ``(N, C, *cells)`` as ``(slabs, P, ..., R)``, in the working precision."""
        values = values.to(self.wide)
        if self.last:
            values = values.movedim(1, -1)
        lead, axes = self.parts ** len(self.lead), range(len(self.lead))
        if self.by_product and isfinite(values.sum()):
            with unrounded(values.device):
                values = values.reshape(-1, self.parts) @ self.inside
        elif self.tail and self.tail % self.parts == 0:
            values = values.reshape(-1, lead, self.parts, 1, self.inner)
            values = values.expand(-1, -1, -1, self.tail // self.parts, -1)
        elif self.tail:
            part = part_of(self.tail, self.parts, values.device)
            values = values.reshape(-1, lead, self.parts, self.inner).index_select(2, part)
        values = values.reshape(-1, lead, max(self.tail, 1) * self.inner)
        if self.even:
            return values.reshape(1, len(values), *(n for _ in axes for n in (self.parts, 1)), values.shape[2])
        return values.movedim(1, 0).reshape(lead, len(values), *(1 for _ in axes), values.shape[2])

    def gathered(self, totals: Tensor) -> Tensor:
        """Sums as :meth:`spread` has factors, of all positions of a cell, ``(N, C, *cells)``."""
        values = totals if self.even else totals.movedim(0, 1)
        if self.tail:
            values = values.reshape(-1, self.parts ** len(self.lead), self.tail, self.inner)
            if self.tail % self.parts == 0:
                values = values.unflatten(2, (self.parts, -1)).sum(3, dtype=self.fine)
            else:
                values = members(self.tail, self.parts, self.none).t() @ values.to(self.fine)
        if self.last:
            return values.reshape(self.samples, *self.cells, self.channels).movedim(-1, 1).to(self.fine)
        return values.reshape(self.samples, self.channels, *self.cells).to(self.fine)

    def places(self, rows: Tensor) -> Iterator[tuple[int, tuple[slice, ...], tuple[slice, ...]]]:
        """Every value once; none that is empty."""
        outer, inner = rows.shape[0], rows.shape[-1]
        if self.even:
            within = portion(self.parts, rows[0, 0].numel(), self.limit)
            step = portion(outer, rows[0].numel(), self.limit)
            for start, begin in product(range(0, outer, step), range(0, self.parts, within)):
                place = slice(start, start + step), slice(begin, begin + within)
                yield 0, place, place
            return
        step = portion(outer, prod(self.lead) * inner, self.limit)
        cuts = list(product(*(slices(length, self.parts) for length in self.lead)))
        for start, (number, (first, *others)) in product(range(0, outer, step), enumerate(cuts)):
            each = prod(cut.stop - cut.start for cut in others) * inner
            within = max(1, self.limit // max(each, 1))
            for begin in range(first.start, first.stop, within) if each else ():
                piece = slice(begin, min(begin + within, first.stop))
                yield number, (slice(start, start + step), piece, *others), (slice(start, start + step),)

    def summed(self, rows: Tensor, terms: Callable[..., Sequence[Tensor]]) -> list[Tensor]:
        """In cells, the two sums of what ``terms`` makes of each place."""
        if self.by_product:
            found = self._products(rows, terms)
            if all(isfinite(each.sum()) for each in found):  # Else cells beside an infinite one are lost too.
                return [each.to(self.exact) for each in found]
        axes = tuple(range(2, rows.dim() - 1, 2)) if self.even else tuple(range(1, rows.dim() - 1))
        shape = [1 if axis in axes else length for axis, length in enumerate(rows.shape)]
        totals = [rows.new_zeros((self.slabs, *shape), dtype=self.wide) for _ in range(2)]
        for number, place, own in self.places(rows):
            for total, term in zip(totals, terms(number, place, own), strict=True):
                total[number][own].add_(term.sum(axes, keepdim=True, dtype=self.wide))
        return [self.gathered(total).to(self.exact) for total in totals]

    def _products(self, rows: Tensor, terms: Callable[..., Sequence[Tensor]]) -> list[Tensor]:
        """:meth:`summed` of maps ``(P, parts, L / parts, R)``; the cells come first in memory."""
        outer, parts, height, width = rows.shape
        inside = self.inside.repeat(1, height)
        totals = [rows.new_empty((parts, outer * parts), dtype=self.wide) for _ in range(2)]
        for _, place, (first, second) in self.places(rows):
            for total, term in zip(totals, terms(0, place, (first, second)), strict=True):
                values = term.to(self.wide).reshape(-1, height * width).t()
                start = first.start * parts + second.start
                torch.mm(inside, values, out=total[:, start : start + values.shape[1]])
        shape = (parts, self.samples, self.channels, parts)
        return [total.view(shape).permute(3, 0, 1, 2).contiguous().permute(2, 3, 0, 1) for total in totals]

    def shifts(self) -> Tensor | None:
        return None if self.centre is None else self.spread(self.centre)

    def here(self, factors: Tensor, number: int, own: tuple[slice, ...]) -> Tensor:
        """Those of a place, to go with its values."""
        return factors[number][own]

    def centred_by(self, shift: Tensor | None, block: Tensor, number: int, own: tuple[slice, ...]) -> Tensor:
        """A block less its shift, in the working precision; itself, where nothing is to be done."""
        return block.to(self.wide) if shift is None else block - self.here(shift, number, own)

    def measure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of each cell, ``(N, C, *cells)``."""
        rows, shift, room = self.rows(x), self.shifts(), Room(self.wide)

        def terms(number: int, place: tuple[slice, ...], own: tuple[slice, ...]) -> tuple[Tensor, Tensor]:
            value = self.centred_by(shift, rows[place], number, own)
            return value, torch.mul(value, value, out=room.like(value))

        count = self.behind()
        mean, square = (each.div_(count) for each in self.summed(rows, terms))
        var = torch.addcmul(square, mean, mean, value=-1)
        if not bool((square <= (OFF_CENTRE**2 + 1) * var).all()):
            self.centre, self.exact = mean.to(self.wide).to(self.fine), self.fine
            shift = self.shifts()
            mean, square = (each.div_(count) for each in self.summed(rows, terms))
            var = torch.addcmul(square, mean, mean, value=-1)
            mean = mean + self.centre
        return mean, var.clamp_(min=0)

    def moved(self, values: Tensor, times: Tensor) -> Tensor:
        """``values + times * shift``."""
        return values if self.centre is None else values + times * self.centre

    def affine(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        out = torch.empty_like(x)
        rows, target = self.rows(x), self.rows(out)
        shift, scale, away = self.spread(self.moved(shift, scale)), self.spread(scale), self.shifts()
        for number, place, own in self.places(rows):
            result, value = target[place], self.centred_by(away, rows[place], number, own)
            made = result if out.dtype == self.wide else value
            scaled(value, self.here(scale, number, own), self.here(shift, number, own), made)
            if made is not result:
                result.copy_(made)
        return out

    def sums(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        rows, grads, shift, room = self.rows(x), self.rows(grad), self.shifts(), Room(self.wide)

        def terms(number: int, place: tuple[slice, ...], own: tuple[slice, ...]) -> tuple[Tensor, Tensor]:
            given = grads[place]
            value = self.centred_by(shift, rows[place], number, own)
            return given, torch.mul(value, given, out=room.like(value))

        total, product = self.summed(rows, terms)
        return total, self.moved(product, total)

    def combine(
        self, x: Tensor, grad: Tensor, scale: Tensor, slope: Tensor, level: Tensor, out: Tensor | None = None
    ) -> Tensor:
        out = torch.empty_like(grad) if out is None else out
        rows, grads, target = self.rows(x), self.rows(grad), self.rows(out)
        level = self.spread(self.moved(level, slope))
        scale, slope, shift = self.spread(scale), self.spread(slope), self.shifts()
        for number, place, own in self.places(rows):
            result, given = target[place], grads[place].to(self.wide)
            made = result if out.dtype == self.wide else given
            scaled(given, self.here(scale, number, own), self.here(level, number, own), made)
            made.addcmul_(self.centred_by(shift, rows[place], number, own), self.here(slope, number, own))
            if made is not result:
                result.copy_(made)
        return out


class SmallMapPasses(CellPasses):
    """The same for small maps and uneven cells, as ``(P, L)``, or ``(N, L, C)`` with channels last, of ``L`` positions
    each: sums of cells are products with a matrix of zeros and ones, factors are picked for each position."""

    def __init__(self, x: Tensor, parts: int) -> None:
        super().__init__(x, parts)
        self.by_product, self.exact, self.even = False, self.wide, False
        part = torch.zeros((), dtype=torch.long)
        for length in self.space:
            part = part.unsqueeze(-1) * parts + part_of(length, parts, x.device)
        self.part = part.flatten()
        self.inside = torch.nn.functional.one_hot(self.part, prod(self.cells)).t().to(self.wide)

    def rows(self, tensor: Tensor) -> Tensor:
        if self.last:
            return tensor.movedim(1, -1).reshape(self.samples, self.count, self.channels)
        return tensor.reshape(-1, self.count)

    def spread(self, values: Tensor) -> Tensor:
        flat = values.to(self.wide).flatten(2)
        return flat.transpose(1, 2).unsqueeze(0) if self.last else flat.reshape(1, -1, flat.shape[2])

    def here(self, factors: Tensor, number: int, own: tuple[slice, ...]) -> Tensor:
        return factors[number][own].index_select(1, self.part)

    def places(self, rows: Tensor) -> Iterator[tuple[int, tuple[slice, ...], tuple[slice, ...]]]:
        step = portion(len(rows), rows[0].numel(), self.limit)
        for start in range(0, len(rows), step):
            place = (slice(start, start + step),)
            yield 0, place, place

    def summed(self, rows: Tensor, terms: Callable[..., Sequence[Tensor]]) -> list[Tensor]:
        found: list[list[Tensor]] = [[], []]
        for number, place, own in self.places(rows):
            for parts, term in zip(found, terms(number, place, own), strict=True):
                parts.append(self._cells(term.to(self.wide)))
        totals = [
            torch.cat(parts).reshape(self.samples, -1, *self.inside.shape[:1]) for parts in found if not self.last
        ]
        totals = totals or [torch.cat(parts).transpose(1, 2) for parts in found]
        return [total.reshape(self.samples, self.channels, *self.cells).to(self.exact) for total in totals]

    def _cells(self, values: Tensor) -> Tensor:
        """``(P, cells)`` or ``(N, cells, C)``."""
        if whole_products():
            found = self.inside @ values if self.last else (self.inside @ values.t()).t()
            if isfinite(found.sum()):  # Else cells beside an infinite one are lost too.
                return found
        empty = values.new_zeros((len(values), len(self.inside), *values.shape[2:]))
        return empty.index_add_(1, self.part, values)


SMALL = 1024
"""Positions of a map that is small: cutting it into uneven slabs takes longer than the sums."""

FEW = 64
"""Cells of a map that are few: the product with their matrix is."""


@dataclass(frozen=True)
class Cells:
    """The cells of a map, as :func:`normswap.norms.moments.normalize` takes them."""

    parts: int

    def passes(self, x: Tensor) -> Passes:
        uneven = any(length % self.parts for length in x.shape[2:])
        small = x[0, 0].numel() <= SMALL and self.parts ** (x.dim() - 2) <= FEW
        cls = SmallMapPasses if uneven and small and x.device.type == "cpu" else CellPasses
        return cls(x, self.parts)

    def plain(self, x: Tensor, function: Function, *tensors: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """In operations that torch differentiates, compiles and exports by itself."""
        # Autocast rounds the products of float32 in the backward pass too, even where it was off for the forward one.
        values = x.to(fine(x.device) if rounded(x.device) else wide(x.dtype))
        space = tuple(range(2, x.dim()))
        shift = values.detach().mean(space, keepdim=True)
        values, base = values - shift, shift.to(fine(x.device))
        inside = [members(x.shape[axis], self.parts, values) for axis in space]
        outside = [matrix.t() for matrix in inside]
        count = along(torch.ones_like(values[:1, :1]), inside).clamp(min=1)
        mean = along(values, inside) / count
        var = along((values - along(mean, outside)).square(), inside) / count
        mean, var = mean.to(base.dtype), var.to(base.dtype)
        moments = Moments(mean + base, var, values[0, 0].numel())
        scale, offset, seen = function(moments, *tensors)
        offset = (offset + scale * base).expand_as(mean).to(values.dtype)
        scale = scale.expand_as(mean).to(values.dtype)
        out = values * along(scale, outside) + along(offset, outside)  # In the memory format of its first factor.
        return out.to(x.dtype), tuple(each.detach() for each in seen)
