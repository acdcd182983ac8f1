"""Running statistics from data: pooled exactly, in execution order, and nothing else changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normswap import NormswapError, calibrate, convert, examine, recalibrate
from tests.support import distance, picture, randomise, sample


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4, momentum=None))
    return randomise(nn.Sequential(*layers).double()).eval()


def batches() -> list[Tensor]:
    """Of unequal sizes and contents."""
    return [sample(size, 3, 8, 8, seed=size) + size for size in (5, 1, 7)]


def pooled(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.movedim(1, -1).flatten(0, -2)
    return rows.mean(0), rows.var(0)


@torch.no_grad()
def test_each_norm_has_the_moments_of_its_input() -> None:
    model = network()
    report = recalibrate(model, batches())
    whole = torch.cat(batches())
    for index in (1, 4):
        mean, var = pooled(model[:index](whole))
        assert distance(model[index].running_mean, mean) < 1e-12
        assert distance(model[index].running_var, var) < 1e-12
        assert int(model[index].num_batches_tracked) == 3
    assert [site.name for site in report.sites] == ["1", "4"]
    assert report.batches == 3
    assert report.skips == ()


@torch.no_grad()
def test_a_moving_average_is_off() -> None:
    """Train mode with a cumulative mean weighs batches, not samples, and forgets what lies between their means."""
    model, averaged = network(), network()
    recalibrate(model, batches())
    averaged[1].momentum = None
    averaged[1].reset_running_stats()
    averaged.train()
    for batch in batches():
        averaged(batch)
    assert distance(averaged[1].running_var, model[1].running_var) > 0.1


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sync", "switchable"])
def test_other_kinds_with_statistics(kind: str) -> None:
    model = convert(network(), kind)
    recalibrate(model, iter(batches()))
    mean, var = pooled(model[0](torch.cat(batches())))
    assert distance(model[1].running_mean, mean) < 1e-12
    assert distance(model[1].running_var, var) < 1e-12


@torch.no_grad()
def test_one_batch_in_flight_needs_a_second_pass() -> None:
    whole, model = network(), network()
    recalibrate(whole, batches())
    recalibrate(model, batches(), in_flight=1)
    assert distance(model[1].running_var, whole[1].running_var) < 1e-12
    assert distance(model[4].running_var, whole[4].running_var) > 1e-3
    recalibrate(model, batches(), in_flight=1, passes=2)
    assert distance(model[4].running_var, whole[4].running_var) < 1e-12


class Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.batch, self.frozen, self.still = (nn.BatchNorm2d(3) for _ in range(3))
        self.group, self.instance = nn.GroupNorm(1, 3), nn.InstanceNorm2d(3, track_running_stats=True)
        self.bare, self.unused = nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        for name in ("batch", "frozen", "still", "group", "instance", "bare"):
            x = self.get_submodule(name)(x)
        return F.batch_norm(x, self.mean, self.var)


LEFT = {
    "frozen": "it is frozen",
    "still": "it is in eval mode in a model that trains: frozen",
    "group": "it has no running statistics",
    "instance": "the running statistics of instance are averages over samples, not moments of the data",
    "bare": "it has no running statistics",
    "unused": "it did not run on the batches",
    "batch_norm": "it is frozen",
}


def test_left_alone_with_a_reason() -> None:
    model = convert(randomise(Many().double()), "frozen", where="frozen", inplace=True).train()
    model.var.abs_()
    model.still.eval()
    before = picture(model)
    report = recalibrate(model, batches())
    assert {left.name: left.reason for left in report.skips} == LEFT
    changed = {"running_mean", "running_var", "num_batches_tracked"}
    assert set(before.differences(model)) == {f"tensor batch.{name}" for name in changed}
    report = recalibrate(model.eval(), batches())
    assert [site.name for site in report.sites] == ["batch", "still"]


@pytest.mark.parametrize("fails", ["forward", "data"])
def test_an_error_leaves_the_model_as_it_was(fails: str) -> None:
    model = network().train()
    model[1].eval()
    before, state = picture(model), torch.get_rng_state()

    def data() -> Iterator[Tensor]:
        torch.rand(1)
        yield batches()[0]
        if fails == "data":
            raise RuntimeError("no more")
        yield batches()[0][:, :2]

    with pytest.raises(RuntimeError, match=r"no more|channels"):
        recalibrate(model, data(), in_flight=1)
    assert before.differences(model) == []
    assert torch.equal(torch.get_rng_state(), state)


WRAPS: list[tuple[Callable[[Tensor], Any], Any]] = [
    (lambda x: {"input": x}, None),
    (lambda x: [x], None),
    (lambda x: (x, torch.zeros(1)), lambda model, batch: model(batch[0])),
]


@pytest.mark.parametrize(("wrap", "forward"), WRAPS, ids=["mapping", "list", "images and labels"])
def test_batches_of_any_structure(wrap: Callable[[Tensor], Any], forward: Any) -> None:
    model, expected = network(), network()
    recalibrate(expected, batches())
    recalibrate(model, [wrap(x) for x in batches()], forward=forward)
    assert torch.equal(model[4].running_var, expected[4].running_var)


def test_misuse() -> None:
    for arguments, told in (
        ({"batches": batches()[0]}, r"write \[batch\] for one batch"),
        ({"batches": iter(batches()), "passes": 2}, "passes=2 goes over them again"),
        ({"batches": [], "in_flight": 1}, "batches is empty"),
        ({"batches": batches(), "in_flight": 0}, "in_flight=0"),
    ):
        with pytest.raises(NormswapError, match=told):
            recalibrate(network(), **arguments)


def test_report() -> None:
    model = network()
    report = recalibrate(model, batches())
    text = str(report)
    assert "recalibration: 2 norms from 3 batches" in text
    assert "mean moved by (std)" in text
    record = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [site["name"] for site in record["sites"]] == ["1", "4"]
    again = recalibrate(model, batches())
    assert all(site.shift < 1e-9 for site in again.sites)
    assert all(site.ratio == pytest.approx(1) for site in again.sites)
    nothing = recalibrate(nn.Sequential(nn.GroupNorm(1, 3)), batches())
    assert nothing.sites == ()
    assert [left.reason for left in nothing.skips] == ["it has no running statistics"]


def test_too_few_values_for_a_variance() -> None:
    model = randomise(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()).eval()
    before = picture(model)
    for count, told in ((1, "1: the batches have one value"), (0, "1: the batches have no value")):
        with pytest.raises(NormswapError, match=told):
            recalibrate(model, [sample(count, 3)])
    assert before.differences(model) == []
    whole = sample(4, 3)
    recalibrate(model, [whole[:1], whole[:0], whole[1:]], in_flight=1)
    torch.testing.assert_close(model[1].running_var, model[0](whole).var(0).detach())


def test_batches_without_samples_are_passed_over() -> None:
    original = randomise(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).double()).eval()
    scores = []
    for empty in ([], [sample(0, 3, 4, 4)]):
        model = convert(original, "group", groups=2)
        scores.append(calibrate(model, original, [sample(6, 3, 4, 4), *empty]).scores)
    assert scores[0] == scores[1]
    before = picture(model)
    with pytest.raises(NormswapError, match="no samples"):
        calibrate(model, original, [sample(0, 3, 4, 4)])
    assert before.differences(model) == []
    seen = examine(original, batches=[sample(0, 3, 4, 4), sample(6, 3, 4, 4)])
    assert [str(each) for each in seen.findings] == [
        str(each) for each in examine(original, batches=[sample(6, 3, 4, 4)]).findings
    ]
