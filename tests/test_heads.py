"""Layers behind the last fitted norm: which are fitted, to what, and where the old weight is the better guess."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normswap import NormswapError, calibrate, convert, recalibrate
from normswap.calibration.fit import Layout
from normswap.calibration.heads import Correction, Gram, regressed
from tests.support import distance, randomise, sample

LAST = Layout(-1, (3,))


def gram(x: Tensor, residual: Tensor, parts: int = 1) -> Gram:
    total = Gram.zero(x.shape[-1], residual.shape[-1], torch.device("cpu"))
    for features, wanted in zip(x.chunk(parts), residual.chunk(parts), strict=True):
        total.add(LAST, features, torch.zeros_like(wanted), wanted)
    return total


def correction(x: Tensor, residual: Tensor, parts: int = 1) -> Correction:
    return regressed(gram(x, residual, parts), LAST)


def test_what_features_tell_is_found() -> None:
    x = torch.randn(200, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = sample(3, 8)
    found = correction(x, x @ weight.T + 2.0)
    assert found.weight is not None
    assert distance(found.weight, weight) < 0.01
    assert distance(found.applied(x, torch.zeros(200, 3).double()), x @ weight.T + 2.0) < 0.01
    assert distance(correction(x, x @ weight.T + 2.0, parts=7).weight, found.weight) < 1e-9


def test_what_they_do_not_tell_is_left() -> None:
    generator = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(40, size, dtype=torch.float64, generator=generator) for size in (30, 3))
    found = correction(x, noise + 1.0)
    assert found.weight is None
    assert distance(found.bias, (noise + 1.0).mean(0)) < 1e-12


def test_positions_of_one_sample_are_no_new_samples() -> None:
    x, residual = sample(3, 50, 8), sample(3, 50, 3)
    residual += x[..., :3]
    assert correction(x, residual).weight is None  # three samples, whatever the number of positions
    assert correction(x.flatten(0, 1), residual.flatten(0, 1)).weight is not None


@pytest.mark.parametrize("x", [torch.ones(1, 8), torch.full((50, 8), 2.0)], ids=["one sample", "constant"])
def test_nothing_to_learn_from(x: Tensor) -> None:
    found = correction(x.double(), torch.ones(len(x), 3).double())
    assert found.weight is None
    assert torch.equal(found.bias, torch.ones(3).double())


class Headed(nn.Module):
    """A norm, and a head to be given."""

    def __init__(self, head: nn.Module, pooled: bool = True, times: int = 1) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), head
        self.pooled, self.times = pooled, times

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        x = x.mean((2, 3)) if self.pooled else x
        for _ in range(self.times):
            x = self.head(x)
        return x


def batches() -> list[Tensor]:
    return [sample(64, 3, 6, 6, seed=seed) for seed in range(4)]


def trained(model: nn.Module) -> nn.Module:
    model = randomise(model.double()).eval()
    recalibrate(model, batches())
    return model


FITTED: dict[str, tuple[nn.Module, bool, tuple[str, ...]]] = {
    "linear": (nn.Linear(8, 5), True, ("head",)),
    "two": (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)), True, ("head.0", "head.2")),
    "pointwise": (nn.Conv2d(8, 5, 1), False, ("head",)),
    "over positions": (nn.Conv2d(8, 5, 3), False, ()),
    "each channel alone": (nn.Conv2d(8, 8, 1, groups=8), False, ()),
    "no bias": (nn.Linear(8, 5, bias=False), True, ()),
}


@pytest.mark.parametrize("name", FITTED)
def test_which_layers_are_heads(name: str) -> None:
    head, pooled, expected = FITTED[name]
    original = trained(Headed(head, pooled))
    model, without = (convert(original, "group", groups=4) for _ in range(2))
    report = calibrate(model, original, batches())
    assert report.heads == expected
    assert ("refitted: " + ", ".join(expected) in str(report)) is bool(expected)
    plain = calibrate(without, original, batches(), refit_heads=False)
    assert plain.heads == ()
    if expected:
        assert report.scores[report.fit] > plain.scores[plain.fit]
        assert not set(expected) & set(report.biases)
        assert set(expected) <= set(plain.biases)


def test_the_score_is_that_of_the_model_that_is_left() -> None:
    original = trained(Headed(nn.Linear(8, 5)))
    model = convert(original, "group", groups=4)
    report = calibrate(model, original, batches())
    with torch.no_grad():
        wanted, got = (torch.cat([network(x) for x in batches()]) for network in (original, model))
    left = (got - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert report.scores[report.fit] == pytest.approx(1 - float(left), abs=1e-9)


def test_what_heads_of_fewer_inputs_gave_does_not_count() -> None:
    """Of eight windows the heads are fitted in the first and the fourth."""
    original = trained(Headed(nn.Linear(8, 5)))
    model, copied = (convert(original, "group", groups=4) for _ in range(2))
    inputs = [sample(6, 3, 6, 6, seed=seed) for seed in range(8)]
    report = calibrate(model, original, inputs, in_flight=1)
    with torch.no_grad():
        wanted, got = (torch.cat([network(x) for x in inputs[3:]]) for network in (original, copied))
    left = (got - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert report.scores["unchanged"] == pytest.approx(1 - float(left), abs=1e-9)


def test_heads_see_all_batches_however_few_are_in_flight() -> None:
    original = trained(Headed(nn.Linear(8, 5)))
    weights = []
    for in_flight in (1, 4):
        model = convert(original, "group", groups=4)
        calibrate(model, original, batches(), in_flight=in_flight, fit="moments", passes=2)
        weights.append(model.head.weight)
    assert distance(*weights) < 1e-9


@pytest.mark.parametrize("case", ["called twice", "shared"])
def test_a_head_with_other_uses_stays(case: str) -> None:
    model = Headed(nn.Linear(8, 8), times=2 if case == "called twice" else 1)
    if case == "shared":
        model.other = nn.Linear(8, 8)
        model.other.weight = model.head.weight
    original = trained(model)
    converted = convert(original, "group", groups=4)
    assert calibrate(converted, original, batches()).heads == ()
    assert torch.equal(converted.head.weight, original.head.weight)


def test_refined_with_the_heads() -> None:
    original = trained(Headed(nn.Linear(8, 5)))
    options: dict[str, Any] = {"in_flight": 2, "refine": 10}
    model = convert(original, "group", groups=4)
    report = calibrate(model, original, batches(), **options)
    assert report.heads == ("head",)
    assert report.scores["refined"] >= report.scores["moments"] - 0.01


def test_values_that_are_not_finite() -> None:
    original = trained(Headed(nn.Linear(8, 5)))
    with pytest.raises(NormswapError, match="not finite"):
        calibrate(convert(original, "group"), original, [torch.full((4, 3, 6, 6), float("nan")).double()])


def test_few_rows_give_what_many_would() -> None:
    """Of fewer rows than features the products of rows are decomposed, which is the same and quicker."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(60, 100, dtype=torch.float64, generator=generator) * torch.logspace(1, -3, 100).double()
    total = gram(x, x[:, :3] + 0.1 * sample(60, 3), parts=3)
    assert total.rows is not None
    few = regressed(total, LAST)
    total.rows = None
    whole = regressed(total, LAST)
    assert few.weight is not None
    assert whole.weight is not None
    assert distance(few.weight, whole.weight) < 1e-9
    assert distance(few.bias, whole.bias) < 1e-9
    total.add(LAST, *(torch.zeros(60, size).double() for size in (100, 3, 3)))
    assert total.rows is None
