"""Outputs with values of another order than the rest: nothing hides behind a mask."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normswap import plan_fold, verify
from normswap.engine.dataflow import _same
from normswap.graph.magnitudes import levels
from tests.support import randomise

FILLS = [-math.inf, torch.finfo(torch.float32).min, "finfo", -1e9, -1e4, -1e3]


class Masked(nn.Module):
    """A linear layer whose every other output is masked."""

    def __init__(self, fill: float | str, added: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 100)
        self.fill, self.added = fill, added

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x) + self.added
        fill = torch.finfo(out.dtype).min if isinstance(self.fill, str) else self.fill
        return out.masked_fill(torch.arange(100) % 2 == 0, fill)


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), 100)


@pytest.mark.parametrize("fill", FILLS)
def test_a_fault_beside_masked_values(fill: float | str) -> None:
    torch.manual_seed(0)
    model, x = Masked(fill).eval(), torch.randn(4, 8)
    assert verify(model, copy.deepcopy(model), (x,), backend="eager")
    faulty = copy.deepcopy(model)
    faulty.added = 1e-5
    assert not verify(model, faulty, (x,), backend="eager")
    assert not verify(model, Zero().eval(), (x,), backend="eager")


def test_a_mask_that_is_another_number() -> None:
    x = torch.randn(4, 8)
    for fill, other in ((-1e9, -1.001e9), (-math.inf, torch.finfo(torch.float32).min), ("finfo", -1e9)):
        model, faulty = Masked(fill).eval(), Masked(other).eval()
        faulty.linear = model.linear
        assert not verify(model, faulty, (x,), backend="eager")


def test_levels() -> None:
    torch.manual_seed(0)
    plain = torch.randn(4, 100)
    assert [int(each.sum()) for each in levels(plain)] == [400]
    assert [int(each.sum()) for each in levels(plain.relu())] == [400], "zeros are no level of their own"
    assert len(list(levels((plain * 3).exp()))) == 1
    masked = torch.rand(4, 100) + 0.5
    masked[:, ::2] = -1e9
    masked[0, 1:20:2] *= 1e-7
    masked[1, 0] = math.nan
    assert [int(each.sum()) for each in levels(masked)] == [399, 200, 10]
    masked = torch.full((10,), -1e9)
    masked[:7] = torch.randn(7)
    assert len(list(levels(masked))) == 1, "too few values to be sure of a gap"
    assert [int(each.sum()) for each in levels(torch.zeros(0))] == [0]


def test_data_of_ones_own_must_be_equivalent() -> None:
    class Chaos(nn.Module):
        def __init__(self, fault: float = 0.0) -> None:
            super().__init__()
            self.fault = fault

        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x.abs() > 1e3, (x * 1e6).sin() + self.fault, x)

    x, wild = torch.randn(4, 100), torch.randn(4, 100) * 10 + 5000
    assert verify(Chaos(), Chaos(5.0), (x,), backend="eager")
    found = verify(Chaos(), Chaos(5.0), (x,), backend="eager", data=[(wild,)])
    assert not found
    gaps = torch.randn(4, 100).index_fill(1, torch.tensor([3]), -math.inf)
    assert not verify(Chaos(), nn.ReLU(), (x.abs(),), backend="eager", data=[(gaps,)], vary=False)


def test_a_state_has_no_samples_of_rounding() -> None:
    """Fresh copies of such a model are somewhere else, which is not rounding."""

    class State(nn.Module):
        ema: Tensor

        def __init__(self, fault: float = 0.0) -> None:
            super().__init__()
            self.linear, self.fault = nn.Linear(8, 100), fault
            self.register_buffer("ema", torch.zeros(100))

        def forward(self, x: Tensor) -> Tensor:
            out = self.linear(x)
            self.ema.mul_(0.9).add_(out.mean(0) * 0.1)
            return out - 0.01 * self.ema + self.fault

    model = State().eval()
    faulty = copy.deepcopy(model)
    faulty.fault = 3e-3
    assert not verify(model, faulty, (torch.randn(4, 8),), backend="eager")


def test_integers_have_no_samples_of_rounding() -> None:
    """Ties between equal weights break otherwise when the weights move: nothing that excuses another index."""

    class Indices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(200, 16), nn.Linear(16, 50, bias=False)
            with torch.no_grad():
                self.head.weight[1::2] = self.head.weight[::2]
            self.wrong = False

        def forward(self, index: Tensor) -> Tensor:
            found: Tensor = self.head(self.table(index)).argmax(-1)
            return torch.where(index < 20, found + 1, found) if self.wrong else found

    model = Indices().eval()
    faulty = copy.deepcopy(model)
    faulty.wrong = True
    assert not verify(model, faulty, (torch.arange(200)[None],), backend="eager")


def test_what_holds_tensors_is_opened() -> None:
    class Held(nn.Module):
        def __init__(self, added: float = 0.0) -> None:
            super().__init__()
            self.added = added

        def forward(self, x: Tensor) -> Any:
            cache = SimpleNamespace(layers=[SimpleNamespace(keys=x + self.added, device="cpu", make=dict)], length=3)
            cache.itself = cache
            return x * 2, cache

    x = torch.randn(4, 100)
    assert verify(Held(), Held(), (x,), backend="eager")
    found = verify(Held(), Held(3.0), (x,), backend="eager")
    assert not found
    assert {row.output for row in found.rows if row.verdict == "different"} == {"output[1].layers[0].keys"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["quantized", "float8", "nested"])
def test_tensors_without_arithmetic(kind: str) -> None:
    class Low(nn.Module):
        def __init__(self, added: float = 0.0) -> None:
            super().__init__()
            self.added = added

        def forward(self, x: Tensor) -> Tensor:
            x = x.float() + self.added
            if kind == "quantized":
                return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
            if kind == "float8":
                return x.to(torch.float8_e4m3fn)
            return torch.nested.as_nested_tensor([x[:1].flatten(), x[1:].flatten()], layout=torch.jagged)

    x = torch.randn(4, 100)
    (row,) = verify(Low(), Low(), (x,), backend="eager", vary=False).rows
    assert row.verdict == ("inconclusive" if kind == "float8" else "equivalent")
    assert row.problem is None or "the reference's own error" in row.problem
    assert not verify(Low(), Low(1.0), (x,), backend="eager", vary=False)


@pytest.mark.parametrize("fill", [-math.inf, -1e9])
def test_a_trace_is_checked_beside_masked_values(fill: float) -> None:
    """The forward of the model asks whether it is traced; what it then computes is another function."""
    assert not _same(torch.tensor([1.0, fill]).repeat(10), torch.tensor([500.0, fill]).repeat(10))
    assert _same(torch.tensor([1.0, fill]), torch.tensor([1.0 + 1e-6, fill]))
    assert not _same(torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0]))
    assert _same(torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.nan]))
    assert not _same(torch.zeros(3, device="meta"), torch.zeros(3, device="meta")), "nothing is known of them"


def test_a_model_that_gives_nan_can_be_planned() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    with torch.no_grad():
        model[0].weight[0] = math.nan
    assert len(plan_fold(model, example_inputs=(torch.randn(1, 3, 8, 8),)).changes) == 1
