"""Schedules of the momentum, and the batch norm that has one."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normswap import NormswapError, apply_recipe, convert, plan_convert
from normswap.norms.adaptive_momentum import AdaptiveBatchNorm2d
from normswap.norms.domain import DomainBatchNorm2d
from normswap.norms.momentum import Linear, Polynomial, Warmup, parse, share_of
from normswap.norms.renorm import BatchRenorm2d
from normswap.norms.tracked import batch_average
from tests.support import distance, randomise, sample

X = [sample(3, 8, 4, 5, seed=seed) for seed in range(6)]


def shares(text: str, *seen: int) -> list[float]:
    return share_of(parse(text), torch.tensor(seen), torch.float64).tolist()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0.1", [0.1, 0.1, 0.1, 0.1]),
        ("cumulative", [1, 1 / 2, 1 / 5, 1 / 20]),
        ("warmup:0.1", [1, 1 / 2, 1 / 5, 0.1]),
        ("polynomial:3", [1, 4 / 5, 4 / 8, 4 / 23]),
        ("polynomial:0", [1, 1 / 2, 1 / 5, 1 / 20]),
        ("linear:0.5:0.1:4", [0.5, 0.4, 0.1, 0.1]),
    ],
)
def test_shares(text: str, wanted: list[float]) -> None:
    assert shares(text, 1, 2, 5, 20) == pytest.approx(wanted)
    assert text in ("0.1", "cumulative") or str(parse(text)) == text


@pytest.mark.parametrize(
    "bad",
    ["", "often", "warmup", "warmup:0", "warmup:1.5", "warmup:0.1:2", "polynomial:-1", "linear:0.1:0.2", "linear:1:1:0",
     "nan", "warmup:nan", 0, 2.0, True, [0.1]],
    ids=str,
)  # fmt: skip
def test_no_momentum(bad: Any) -> None:
    with pytest.raises(NormswapError, match="it is a number, cumulative, warmup:MOMENTUM"):
        parse(bad)


@pytest.mark.parametrize(
    "make",
    [lambda: Warmup(2.0), lambda: Warmup(float("nan")), lambda: Polynomial(-1), lambda: Linear(0.1, 0, 9),
     lambda: Linear(0.1, 0.2, 0)],
)  # fmt: skip
def test_no_schedule(make: Any) -> None:
    with pytest.raises(NormswapError, match="weights are above 0 and at most 1"):
        make()


def test_at_a_constant_momentum_it_is_torchs() -> None:
    for momentum in (0.3, None):
        ours, theirs = AdaptiveBatchNorm2d(8, momentum=momentum).double(), nn.BatchNorm2d(8, momentum=momentum).double()
        for x in X:
            assert distance(ours(x), theirs(x)) < 1e-10
        assert all(
            distance(a.double(), b.double()) < 1e-12 for a, b in zip(ours.buffers(), theirs.buffers(), strict=True)
        )


def follow(schedule: Any, old: Tensor, values: list[Tensor]) -> Tensor:
    for index, value in enumerate(values, 1):
        old = old + float(share_of(schedule, torch.tensor(index), torch.float64)) * (value - old)
    return old


@pytest.mark.parametrize("schedule", [Warmup(0.3), Polynomial(2), Linear(0.5, 0.1, 3)], ids=str)
def test_statistics_follow_the_schedule(schedule: Any) -> None:
    module = randomise(AdaptiveBatchNorm2d(8, momentum=schedule).double())
    old = module.running_mean.clone(), module.running_var.clone()
    for x in X:
        module(x)
    assert distance(module.running_mean, follow(schedule, old[0], [x.mean((0, 2, 3)) for x in X])) < 1e-12
    assert distance(module.running_var, follow(schedule, old[1], [x.var((0, 2, 3)) for x in X])) < 1e-12
    assert str(schedule) in repr(module)


def test_other_layers_take_a_schedule_too() -> None:
    schedule = Warmup(0.3)
    module = BatchRenorm2d(8, momentum=schedule).double()
    for x in X:
        module(x)
    assert (
        distance(
            module.running_mean, follow(schedule, torch.zeros(8, dtype=torch.float64), [x.mean((0, 2, 3)) for x in X])
        )
        < 1e-12
    )
    domain = DomainBatchNorm2d(8, momentum=schedule).double()
    for index, x in enumerate(X):
        domain.given = None
        members = nn.functional.one_hot(torch.tensor(index % 2), 2)
        domain.track_domains(
            x.mean((0, 2, 3)).expand(2, -1), torch.ones(2, 8, dtype=torch.float64), members.bool().unsqueeze(1)
        )
    for index in (0, 1):
        wanted = follow(schedule, torch.zeros(8, dtype=torch.float64), [x.mean((0, 2, 3)) for x in X[index::2]])
        assert distance(domain.running_mean[index], wanted) < 1e-12
    with batch_average(module):
        module(X[0])
    assert module.momentum is schedule


def test_conversions_hand_it_on() -> None:
    model = nn.Sequential(randomise(nn.BatchNorm2d(8).double())).eval()
    plan = plan_convert(model, "adaptive_momentum", momentum="polynomial:2")
    assert plan.changes[0].exactness == "exact"
    made = plan.apply()
    assert made[0].momentum == Polynomial(2)
    assert torch.equal(made(X[0]), model(X[0]))
    again = apply_recipe(model, json.loads(json.dumps(plan.recipe)))
    assert again[0].momentum == Polynomial(2)
    again.load_state_dict(made.state_dict(), strict=True)
    assert convert(made, "ghost")[0].momentum == Polynomial(2)
    assert convert(convert(made, "domain"), "adaptive_momentum")[0].momentum == Polynomial(2)
    back = plan_convert(made, "batch")
    assert back.changes[0].lost == ("schedule of the momentum",)
    assert back.apply()[0].momentum is None, "a mean that forgets goes on as a mean"
    assert convert(convert(model, "adaptive_momentum"), "batch")[0].momentum == 0.1
    skip = plan_convert(made, "adaptive_momentum", momentum=0.2).skips[0]
    assert skip.reason.startswith("it already is"), "the same function: set its momentum"
    with pytest.raises(NormswapError, match=r"write it as 'warmup:0\.2', which a recipe can hold"):
        plan_convert(model, "adaptive_momentum", momentum=Warmup(0.2))
    with pytest.raises(NormswapError, match=r"^0: momentum='sometimes': it is"):
        plan_convert(model, "adaptive_momentum", momentum="sometimes")
