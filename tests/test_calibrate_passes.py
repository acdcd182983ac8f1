"""What passes that take turns in one model leave in it, and what they find there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normswap import calibrate, convert, recalibrate
from normswap.norms.condition import Conditioned, condition
from tests.support import picture, randomise, sample


class Keeps(nn.Module):
    """``b(a(x) * x)``, where ``x`` is kept somewhere until the first norm has run."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.a, self.b = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.register_buffer("held", torch.zeros(16, 4, dtype=torch.float64))
        self.box: dict[str, list[Tensor]] = {"x": []}

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "attribute":
            self.x = x
        elif self.where == "container":
            self.box["x"].append(x)
        elif self.where == "buffer":
            self.held = x
        elif self.where == "in place":
            self.held.copy_(x)
        z = self.a(x)
        kept = {
            "local": lambda: x,
            "attribute": lambda: self.x,
            "container": lambda: self.box["x"].pop(),
            "buffer": lambda: self.held,
            "in place": lambda: self.held.clone(),
        }
        return self.b(z * kept[self.where]())


@pytest.mark.parametrize("where", ["attribute", "container", "buffer", "in place"])
def test_what_a_forward_keeps_is_of_its_own_batch(where: str) -> None:
    batches = [sample(16, 4, seed=seed) + seed for seed in range(4)]
    plain, model = (randomise(Keeps(each).double()).eval() for each in ("local", where))
    model.load_state_dict(plain.state_dict())
    held, before = model.held, model.held.clone()
    recalibrate(plain, batches)
    recalibrate(model, batches)
    torch.testing.assert_close(model.b.running_mean, plain.b.running_mean)
    torch.testing.assert_close(model.b.running_var, plain.b.running_var)
    assert model.held is held
    assert torch.equal(held, before)
    assert model.box == {"x": []}
    assert not hasattr(model, "x")


def test_reference_and_model_keep_apart() -> None:
    batches = [sample(16, 4, seed=seed) + seed for seed in range(2)]
    scores = []
    for where in ("local", "attribute"):
        torch.manual_seed(0)
        original = randomise(Keeps(where).double()).eval()
        model = convert(original, "layer")
        scores.append(calibrate(model, original, batches).scores)
    assert scores[0] == pytest.approx(scores[1])


def network(kind: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    original = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)).double()).eval()
    return original, convert(original, kind, where=["1"])


def within(model: nn.Module, batches: list[Tensor]) -> Any:
    with condition(model, domain=0):
        return recalibrate(model, batches)


def by_forward(model: nn.Module, batches: list[Tensor]) -> Any:
    def forward(model: nn.Module, batch: Tensor) -> Any:
        with condition(model, domain=0):
            return model(batch)

    return recalibrate(model, batches, forward=forward)


def wrapped(model: nn.Module, batches: list[Tensor]) -> Any:
    return recalibrate(Conditioned(model, "domain"), [(batch, torch.tensor([0])) for batch in batches])


@pytest.mark.parametrize("run", [within, by_forward, wrapped])
def test_passes_have_the_condition_of_their_caller(run: Any) -> None:
    batches = [sample(4, 3, 2, 2, seed=seed) for seed in range(3)]
    _, model = network("domain")
    report = run(model, batches)
    assert [site.name.removeprefix("model.") for site in report.sites][-1] == "2"
    with condition(model, domain=0), torch.no_grad():
        seen = model[:2](torch.cat(batches))
    torch.testing.assert_close(model[2].running_mean, seen.mean((0, 2, 3)))


def test_calibrated_with_a_condition() -> None:
    original = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).double()
    original = randomise(original).eval()
    model = convert(convert(original, "conditional", where=["1"]), "group", where=["3"])
    before = picture(original)
    with condition(model, label=0):
        report = calibrate(model, original, [sample(4, 3, 2, 2, seed=seed) for seed in range(3)])
    assert "3" in [site.name for site in report.sites]
    assert before.differences(original) == []
