"""What decides between the ways to calibrate, and takes a calibration back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normswap import calibrate, convert
from normswap.calibration.agreement import Agreement
from tests.support import picture, randomise, sample


def score(*pairs: tuple[Any, Any]) -> float:
    agreement = Agreement()
    for output, original in pairs:
        agreement.add(output, original)
    return agreement.score()


def wanted(a: Tensor, b: Tensor) -> float:
    """About the means of the columns, ``(N, C)``."""
    return 1 - float((a - b).square().sum() / (b - b.mean(0)).square().sum())


B = sample(12, 5, seed=1)
A = B + 0.3 * sample(12, 5, seed=2)


def test_means_of_columns_are_not_explained() -> None:
    apart = torch.linspace(0, 1e6, 5, dtype=torch.float64)
    assert score((A, B)) == pytest.approx(wanted(A, B))
    assert score((A + apart, B + apart)) == pytest.approx(wanted(A, B), abs=1e-6)
    assert score((B.mean(0).expand_as(B), B)) == pytest.approx(0, abs=1e-12)
    parts = [(A[:1] + apart, B[:1] + apart), (A[1:7] + apart, B[1:7] + apart), (A[7:] + apart, B[7:] + apart)]
    assert score(*parts) == pytest.approx(wanted(A, B), abs=1e-6)


FILLS = [-1e4, -1e9, math.inf, -math.inf, math.nan, torch.finfo(torch.float64).min]


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("columns", [True, False])
def test_filled_positions_tell_nothing(fill: float, columns: bool) -> None:
    mask = (torch.arange(5) < 2).expand(12, 5) if columns else torch.arange(60).reshape(12, 5) % 7 == 0
    a, b = A.masked_fill(mask, fill), B.masked_fill(mask, fill)
    kept = ~mask
    means = B.where(kept, 0).sum(0) / kept.sum(0).clamp(min=1)
    expected = 1 - float((A - B)[kept].square().sum() / (B - means)[kept].square().sum())
    assert score((a, b)) == pytest.approx(expected)
    assert score((A, b)) < -10
    if not math.isfinite(fill):
        assert score((A, b)) == score((a, B)) == -math.inf


def test_large_values_are_no_fill() -> None:
    for scale in (1e4, 1e9):
        assert score((A * scale, B * scale)) == pytest.approx(wanted(A, B))
    ends = torch.tensor([[0.0], [1e5], [0.0], [1e5]])
    assert score((ends / 2, ends)) == pytest.approx(1 - 0.125 / 0.25)


def test_axes() -> None:
    """Of (N, C, S) and (N, T, C), the axis whose means explain more; not one whose length changes."""
    a, b = A.reshape(4, 3, 5), B.reshape(4, 3, 5)
    apart = 100 * torch.arange(5.0).double()
    last = wanted(A, B)
    assert score((a + apart, b + apart)) == pytest.approx(last)
    assert score(((a + apart).mT, (b + apart).mT)) == pytest.approx(last)
    assert score(
        (A[:8].reshape(4, 2, 5), B[:8].reshape(4, 2, 5)), (A[8:].reshape(4, 1, 5), B[8:].reshape(4, 1, 5))
    ) == (pytest.approx(last))


def test_what_cannot_be_measured() -> None:
    ones = torch.ones(4, 3)
    assert math.isnan(score((ones, ones)))
    assert math.isnan(score((ones[:0], ones[:0])))
    assert math.isnan(score((ones * 3, ones * 0.1 * 10)))
    flat = torch.cat([B, torch.full((12, 1), 1 / 3, dtype=torch.float64)], 1)
    assert score((flat * (1 + 1e-16), flat)) == pytest.approx(1)
    one = 1 - float((A[:1] - B[:1]).square().sum() / (B[:1] - B[:1].mean()).square().sum())
    assert score((A[:1], B[:1])) == pytest.approx(one)  # one value in each column


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Linear(16, 16)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Constant(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).masked_fill(torch.ones(16, dtype=torch.bool), -math.inf)


class Tied(Network):
    """What decodes reads the weight of the layer that encodes."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(super().forward(x)), self.head.weight.T)


def converted(network: nn.Module) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    original = randomise(network.double()).eval()
    return original, convert(original, "group", groups=4)


BATCHES = [sample(8, 3, 4, 4, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("fit", ["auto", "moments"])
def test_without_a_measure_the_model_stays(fit: Any) -> None:
    original, model = converted(Constant())
    before = picture(model)
    report = calibrate(model, original, BATCHES, fit=fit)
    assert report.fit == "unchanged"
    assert "nothing can be measured" in str(report)
    assert before.differences(model) == []
    assert calibrate(model, original, BATCHES, fit=fit, check=False).fit == "moments"


def test_a_layer_whose_weight_other_code_reads_stays() -> None:
    original, model = converted(Tied())
    weight, bias = model.head.weight.clone(), model.head.bias.clone()
    report = calibrate(model, original, BATCHES)
    assert (report.heads, report.biases) == ((), ())
    assert torch.equal(model.head.weight, weight)
    assert torch.equal(model.head.bias, bias)
    with torch.no_grad():
        again = score(*((model(batch), original(batch)) for batch in BATCHES))
    assert again == pytest.approx(report.scores[report.fit], abs=1e-9)
    original, model = converted(Network())
    assert calibrate(model, original, BATCHES).heads == ("head",)


class Aliased(Network):
    """Another tensor in the same memory as the head's weight, which no look at the calls shows."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(super().forward(x)), self.alias.T)


def test_the_written_model_is_run_again() -> None:
    original, model = converted(Aliased())
    for each in (original, model):
        each.alias = each.head.weight.detach()
    before = picture(model)
    report = calibrate(model, original, BATCHES)
    assert report.check is not None
    assert report.check.batches == 3
    assert report.check.put_back
    assert report.check.after < report.check.before < max(report.scores.values())
    assert before.differences(model) == []


class Masked(Network):
    def __init__(self, fill: float) -> None:
        super().__init__()
        self.fill = fill

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).masked_fill(torch.arange(16) % 2 == 0, self.fill)


@pytest.mark.parametrize("fill", [-math.inf, -1e9])
def test_masked_outputs_are_distilled(fill: float) -> None:
    """As without the mask."""
    original, model = converted(Masked(fill))
    closed = calibrate(convert(original, "group", groups=4), original, BATCHES, refit_heads=False)
    refined = calibrate(model, original, BATCHES, refit_heads=False, refine=30)
    assert refined.fit == "refined"
    assert refined.check is not None
    assert closed.check is not None
    assert refined.check.after > closed.check.after
