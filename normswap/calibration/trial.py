"""One way to set the affines of a model, and the sums gathered while it is tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from normswap.calibration import processes
from normswap.calibration.agreement import Agreement
from normswap.calibration.fit import Layout, Method, Sums, Values, explained, fitted
from normswap.calibration.heads import Correction, Gram, regressed
from normswap.calibration.layers import Moved
from normswap.calibration.sites import LinearSite, NormSite
from normswap.errors import NormswapError

Kind = str
"""``"statistics"`` (a norm's input), ``"norm"`` (its normalized value) or ``"linear"`` (a layer's output)."""

Part = tuple[int, int]
"""A window and the number of the call in it."""


class Trial:
    """Values of all sites and corrections of all layers: fitted by ``method`` as the sums grow, or fixed without one;
    with ``refits`` heads are fitted in any case."""

    def __init__(
        self,
        name: str,
        method: Method | None,
        sites: Sequence[NormSite],
        linear: Sequence[LinearSite],
        values: Sequence[Values] | None = None,
        corrections: Sequence[Correction] | None = None,
        refits: bool = False,
    ) -> None:
        self.name, self.method = name, method
        self.sites, self.linear = sites, linear
        self.values = [site.values() for site in sites] if values is None else list(values)
        self.initial = list(self.values)
        if corrections is None:
            corrections = [
                Correction(layer.layout, torch.zeros_like(layer.bias, dtype=torch.float64)) for layer in linear
            ]
        self.corrections = list(corrections)
        self.refits = refits or method is not None
        self.moved: Sequence[Moved] = ()
        """Layers that get another weight."""
        self.agreement = Agreement()
        self.window = 0
        """The number of batches gone through in this pass, in windows."""
        self.seen: dict[tuple[Kind, int], Sums] = {}
        """The sums over this process's batches, in this pass over the data."""
        self.parts: dict[tuple[Kind, int], dict[Part, Sums]] = {}
        """The same cut by window and call."""
        self.rest: dict[tuple[Kind, int], dict[Part, Sums]] = {}
        """Of the previous pass, what this one has not come to yet."""
        self.totals: dict[tuple[Kind, int], Sums] = {}
        """The sums over all processes that the present values come from."""
        self.grams: dict[int, Gram] = {}
        """Of the heads, over this process's batches, in this pass over the data."""
        self._due: set[int] = set()

    def next_pass(self) -> None:
        self.rest, self.parts, self.seen = self.parts, {}, {}
        self.grams = {}
        self.window = 0
        self.agreement = Agreement()

    def solve(self, kind: Kind, index: int, call: int, met: Sequence[Sums]) -> None:
        """Take up the sums of the batches at a site and fit anew. All processes call it in step."""
        layout, device = self._place(kind, index)
        key = (kind, index)
        here = sum(met, start=Sums.zero(layout.size, device))
        seen = self.seen[key] = self.seen[key] + here if key in self.seen else here
        self.parts.setdefault(key, {})[self.window, call] = here
        rest = self.rest.get(key, {})
        rest.pop((self.window, call), None)
        whole = sum(rest.values(), start=seen)
        packed = processes.total(torch.cat([whole.count.reshape(1), whole.values.flatten()]))
        total = self.totals[key] = Sums(packed[0], packed[1:].reshape(5, -1))
        if self.method is not None and total.count > 0:
            self._fit(kind, index, total)

    @property
    def fits_heads_now(self) -> bool:
        """Whether this window is the first, fourth, sixteenth ..."""
        windows = self.window + 1
        return windows & (windows - 1) == 0 and windows.bit_length() % 2 == 1

    def solve_head(self, index: int, met: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Take up input, output and original output of the batches at a head. Heads are fitted anew in the first,
        fourth, sixteenth ... window and at the end, for it takes time. All processes call it in step."""
        layer = self.linear[index]
        assert layer.weight is not None
        if index not in self.grams:
            outputs, features = layer.weight.shape[:2]
            self.grams[index] = Gram.zero(features, outputs, layer.bias.device)
        for each in met:
            self.grams[index].add(layer.layout, *each)
        self._due.add(index)
        if self.fits_heads_now:
            self._regress(index)

    def finish(self) -> None:
        """What is left to be done once all batches are through. All processes call it in step."""
        for index in sorted(self._due):
            self._regress(index)

    def _regress(self, index: int) -> None:
        self._due.discard(index)
        total = self.grams[index].everywhere()
        if total.counts[1]:
            self.corrections[index] = regressed(total, self.linear[index].layout)

    def corrected(self, index: int, x: Tensor, output: Tensor) -> Tensor:
        """The output of a layer as it shall be."""
        return self.corrections[index].applied(x, output)

    def corrects(self, index: int) -> bool:
        """Whether the correction of a layer comes from the data."""
        return index in self.grams or ("linear", index) in self.totals

    def _place(self, kind: Kind, index: int) -> tuple[Layout, torch.device]:
        if kind == "linear":
            return self.linear[index].layout, self.linear[index].bias.device
        values = self.values[index]
        return self.sites[index].layout, values.weight.device

    def _fit(self, kind: Kind, index: int, total: Sums) -> None:
        assert self.method is not None
        if kind == "linear":
            mean, original = total.means
            self.corrections[index] = Correction(self.linear[index].layout, original - mean)
            return
        site, values = self.sites[index], self.values[index]
        if kind == "statistics":
            if total.count < 2:  # no variance yet
                return
            unbiased = total.variances[0] * (total.count / (total.count - 1).clamp(min=1))
            self.values[index] = replace(values, mean=total.means[0], var=unbiased)
        else:
            has = site.norm.weight is not None, site.norm.bias is not None
            affine = fitted(total, self.method, self.initial[index], *has)
            self.values[index] = replace(affine, mean=values.mean, var=values.var)

    def answer(self, kind: Kind, index: int) -> Values | Correction:
        return self.corrections[index] if kind == "linear" else self.values[index]

    def reached(self, index: int) -> bool:
        total = self.totals.get(("norm", index))
        return total is not None and bool(total.count > 0)

    def check_statistics(self, index: int) -> None:
        """Raise :class:`NormswapError` where there are too few values for running statistics."""
        total = self.totals.get(("statistics", index))
        if total is not None and total.count < 2:
            seen = "one value" if total.count else "no value"
            raise NormswapError(
                f"{self.sites[index].name or 'the model'}: the batches have {seen} of each channel, and a "
                "variance needs two: pass more samples"
            )

    def r2(self, index: int) -> float:
        """Of the original's output, by the values as they are now."""
        return explained(self.totals[("norm", index)], self.values[index])
