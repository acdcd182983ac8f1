"""Distillation that moves the weights of linear layers and 1 x 1 convolutions: which, to what, told and taken back."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normswap import NormswapError, calibrate, convert, recalibrate
from normswap.calibration.layers import movable, stepping
from tests.support import distance, picture, sample


class Mixed(nn.Module):
    """Pointwise layers between norms, others beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.mix = nn.Conv2d(8, 8, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.strided = nn.Conv2d(8, 8, 1, stride=2)
        self.tied = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.tied.weight
        self.middle = nn.Linear(8, 8)
        self.norm3 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.stem(x)))
        x = F.relu(self.norm2(self.mix(x)))
        x = self.again(self.tied(F.relu(self.strided(x)).movedim(1, -1)))
        x = F.relu(self.norm3(self.middle(x).movedim(-1, 1)))
        out: Tensor = self.head(x.movedim(1, -1))
        return out


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(48, 3, 8, 8, dtype=torch.float64, generator=generator).split(6))


def pair() -> tuple[Any, Any]:
    torch.manual_seed(0)
    original = Mixed().double().eval()
    for norm in (original.norm1, original.norm2, original.norm3):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    recalibrate(original, batches())
    return original, convert(original, "group", groups=2)


def left(original: nn.Module, model: nn.Module) -> float:
    with torch.no_grad():
        wanted, got = (torch.cat([network(x) for x in batches()]) for network in (original, model))
    return float((got - wanted).square().sum() / (wanted - wanted.mean((0, 1, 2))).square().sum())


def test_the_layers_that_see_one_position_are_moved_and_told() -> None:
    original, model = pair()
    plain = convert(original, "group", groups=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options: dict[str, Any] = {"refine": 60, "correct_biases": False, "in_flight": 8}
    report = calibrate(model, original, batches(), refine_layers=True, **options)
    alone = calibrate(plain, original, batches(), **options)
    assert (report.fit, report.layers) == ("refined", ("mix", "middle"))
    assert report.scores["refined"] > alone.scores["refined"] + 0.002
    assert report.scores["refined"] == pytest.approx(1 - left(original, model), abs=1e-9)
    after = model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    affines = {f"norm{i}.{part}" for i in (1, 2, 3) for part in ("weight", "bias")}
    assert changed - {"head.weight"} == {"mix.weight", "middle.weight", "head.bias", *affines}
    assert "weight moved by distillation: mix, middle" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["layers"] == ["mix", "middle"]
    assert alone.layers == ()
    assert torch.equal(plain.mix.weight, original.mix.weight)


def test_without_refitted_heads_they_move_too() -> None:
    original, model = pair()
    report = calibrate(model, original, batches(), refine=30, refine_layers=True, refit_heads=False)
    assert report.layers == ("mix", "middle", "head")


def test_what_made_it_worse_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["normswap.calibration.calibrate"]
    fitted = module._writes  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "_writes", lambda *given: [(tensor, value + 10) for tensor, value in fitted(*given)])
    original, model = pair()
    before = picture(model)
    report = calibrate(model, original, batches(), refine=30, refine_layers=True)
    assert report.check is not None
    assert (report.check.put_back, report.check.fit) == (True, "refined")
    assert before.differences(model) == []
    assert (report.fit, report.layers) == ("unchanged", ())


def test_an_error_leaves_the_model() -> None:
    original, model = pair()
    before, calls = picture(model), []

    def forward(network: nn.Module, x: Tensor) -> Any:
        calls.append(0)
        if len(calls) > 60:
            raise RuntimeError("enough")
        return network(x)

    with pytest.raises(RuntimeError, match="enough"):
        calibrate(model, original, batches(), refine=40, refine_layers=True, forward=forward)
    assert before.differences(model) == []


def test_a_weight_that_is_the_references_own_stays() -> None:
    original, model = pair()
    model.mix.weight = original.mix.weight
    assert [layer.name for layer in movable(model, original, ())] == ["middle", "head"]


@pytest.mark.parametrize("axis", ["channels first", "channels last"])
def test_stepping_is_what_the_moved_weight_gives(axis: str) -> None:
    module: nn.Module = nn.Conv2d(5, 3, 1) if axis == "channels first" else nn.Linear(5, 3)
    model = nn.Sequential(module.double())
    x = sample(2, 5, 4, 4) if axis == "channels first" else sample(2, 4, 5)
    (layer,) = movable(model, nn.Sequential(), ())
    step = sample(*layer.value.shape, seed=1)
    with torch.no_grad(), stepping([layer], [step]):
        stepped = model(x)
    moved = layer.by(step)
    assert moved.changes
    assert not layer.changes
    with torch.no_grad():
        for tensor, value in moved.writes():
            tensor.copy_(value)
        assert distance(model(x), stepped) < 1e-12


def test_it_needs_steps() -> None:
    original, model = pair()
    with pytest.raises(NormswapError, match="say how many steps"):
        calibrate(model, original, batches(), refine_layers=True)
