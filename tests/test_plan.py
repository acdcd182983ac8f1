"""The plan: printed, written, replayed; applied whole or not at all."""

from __future__ import annotations

import gc
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normswap import NormswapError, Plan, apply_recipe, convert, kinds, plan_convert
from tests.support import DOUBLE, distance, only, picture, randomise, sample

engine = importlib.import_module("normswap.engine.convert")


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.first = nn.BatchNorm2d(8)
        self.second = self.first
        self.blocks = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.LayerNorm(5))
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(self.conv(x)))
        return self.blocks(F.group_norm(x, 2, self.scale))


def network() -> Network:
    model = Network().double()
    randomise(model)
    return model


X = sample(3, 3, 4, 5)


class TestText:
    def test_table(self) -> None:
        lines = str(plan_convert(network(), "instance", skip="blocks.0")).splitlines()
        assert lines[0] == "plan to convert to instance: 2 changes, 2 skipped"
        assert lines[1].split() == ["name", "was", "becomes", "exactness", "notes"]
        assert lines[3].startswith("group_norm ")
        assert lines[4].startswith("first = second  batch(8, eps=1e-05)")
        assert "loses running statistics" in lines[4]
        assert lines[6].split() == ["skipped", "is", "reason"]
        assert lines[8].startswith("blocks.0  batch(8, eps=1e-05)  excluded by skip")
        assert "its channels are on the last axis; instance has them on axis 1" in lines[9]
        columns = lines[1].index("becomes")
        assert all(line[columns - 2 : columns] == "  " for line in lines[3:5])

    def test_nothing_to_change(self) -> None:
        assert str(plan_convert(nn.Linear(2, 2))) == "plan to convert to group: 0 changes, 0 skipped"
        assert "(root)" in str(plan_convert(nn.BatchNorm2d(4)))

    def test_evidence_and_notes_are_printed(self) -> None:
        plan = plan_convert(nn.DataParallel(network()), "layer", init="reset", skip="*group_norm")
        assert "note: wrapped in DataParallel" in str(plan)
        assert "affine and statistics start afresh" in str(plan)
        assert "observed" in str(plan_convert(network(), "layer", example_inputs=(X,)))


class TestJson:
    @pytest.mark.usefixtures("ambient_condition")
    @pytest.mark.parametrize("kind", kinds())
    def test_written_and_replayed_on_a_fresh_model(self, kind: str) -> None:
        model = network()
        plan = plan_convert(model, kind)
        text = plan.to_json()
        data = json.loads(text)
        assert data["operation"] == f"convert to {kind}"
        assert [c["name"] for c in data["changes"]] == [change.name for change in plan.changes]
        assert {c["exactness"] for c in data["changes"]} <= {"exact", "approximate", "retrain"}
        assert [s["reason"] for s in data["skips"]] == [skip.reason for skip in plan.skips]
        replayed = apply_recipe(network(), data["recipe"]).eval()
        wanted = plan.apply().eval()
        assert list(replayed.state_dict()) == list(wanted.state_dict())
        assert torch.equal(replayed(X), wanted(X))

    def test_everything_that_was_decided_is_replayed(self) -> None:
        arguments: list[dict[str, Any]] = [
            {"to": "group", "groups": lambda c: c // 4, "where": "first"},
            {"to": "group", "channels_per_group": 2},
            {"to": "layer", "over": "channels"},
            {"to": "switchable", "init": "preserve", "gate_gap": 10.0},
            {"to": "sync", "init": "reset"},
            {"to": "instance", "example_inputs": (X,)},
        ]
        for given in arguments:
            plan = plan_convert(network(), **given)
            replayed = apply_recipe(network(), json.loads(json.dumps(plan.recipe)))
            assert torch.equal(replayed.eval()(X), plan.apply().eval()(X)), given

    def test_a_recipe_names_its_versions(self) -> None:
        recipe = plan_convert(network()).recipe
        assert recipe["format"] == 1
        assert recipe["torch"] == str(torch.__version__)
        assert recipe["normswap"]

    def test_replaying_in_place(self) -> None:
        model, recipe = network(), plan_convert(network(), "sync").recipe
        assert apply_recipe(model, recipe, inplace=True) is model
        before = picture(other := network())
        apply_recipe(other, recipe)
        assert before.differences(other) == []

    def test_by_any_of_its_names(self) -> None:
        recipe = plan_convert(network(), "sync", where="first").recipe
        recipe["steps"][0]["name"] = "second"
        assert type(apply_recipe(network(), recipe).first).__name__ == "SyncBatchNorm"

    def test_a_plan_read_back_has_no_model(self) -> None:
        plan = plan_convert(network())
        bare = Plan(plan.model, plan.operation, plan.changes, plan.skips)
        with pytest.raises(NormswapError, match="use apply_recipe"):
            bare.apply()


def step(**changed: Any) -> dict[str, Any]:
    recipe = plan_convert(network(), "group", where="blocks.0", groups=2).recipe
    return {**recipe, "steps": [{**recipe["steps"][0], **changed}]}


BAD_RECIPES: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing": (lambda: None, "this is no recipe"),
    "text": (lambda: plan_convert(network()).to_json(), "this is no recipe"),
    "a whole plan": (lambda: plan_convert(network()).to_dict(), "this is no recipe"),
    "another format": (lambda: {**step(), "format": 99}, "recipe format 99 is not 1"),
    "steps that are no list": (lambda: {**step(), "steps": 5}, "'steps' must be a list, not int"),
    "a step that is no step": (lambda: {**step(), "steps": [5]}, "step 0 of the recipe is malformed"),
    "a source without kind": (lambda: step(source={}), "step 0 of the recipe is malformed"),
    "options that are none": (lambda: step(options=5), "step 0 of the recipe is malformed"),
    "ranks that are none": (lambda: step(ranks=7), "step 0 of the recipe is malformed"),
    "an unknown init": (lambda: step(init="zero"), "step 0 of the recipe is malformed"),
    "an unknown kind": (lambda: step(to="nope"), "unknown kind 'nope'; the kinds are"),
    "an unknown option": (lambda: step(options={"over": 1}), "kind 'group' has no option 'over'"),
    "groups that do not divide": (lambda: step(options={"groups": 3}), "groups=3 does not divide 8 channels"),
    "another layer": (lambda: step(name="blocks.1"), "changes 'blocks.1', but the model has no norm there"),
    "another kind of norm": (lambda: step(source={"kind": "group", "channels": 8}), "made for group of 8 channels"),
    "other channels": (lambda: step(source={"kind": "batch", "channels": 9}), "made for batch of 9 channels"),
    "the same layer twice": (lambda: {**step(), "steps": step()["steps"] * 2}, "changes 'blocks.0' a second time"),
    "what the layer cannot be": (
        lambda: step(name="blocks.2", source={"kind": "layer", "channels": 5}, options={}),
        "blocks.2: its channels are on the last axis",
    ),
}


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_a_bad_recipe_is_one_message_and_changes_nothing(name: str) -> None:
    make, words = BAD_RECIPES[name]
    model = network()
    before = picture(model)
    with pytest.raises(NormswapError) as error:
        apply_recipe(model, make(), inplace=True)
    assert words in str(error.value)
    assert before.differences(model) == []


@dataclass
class Fault:
    """Stands for a function and fails at one of its calls."""

    function: Callable[..., Any]
    at: int = 0
    calls: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise ZeroDivisionError
        return self.function(*args, **kwargs)


class TestAllOrNothing:
    """A failure at any point of applying leaves the model bit for bit as it was, hooks and flags included."""

    def model(self) -> nn.Sequential:
        model = nn.Sequential(network(), network(), nn.TransformerEncoderLayer(8, 2, 8, dtype=torch.float64))
        for index, network_ in enumerate(model[:2]):
            network_.first.register_forward_hook(lambda m, i, o: None)
            network_.first.register_load_state_dict_pre_hook(lambda m, *_: seen.append(m))
            network_.first.register_full_backward_hook(lambda m, i, o: None)
            network_.list = [network_.blocks[0], (network_.first,)]
            network_.first.train(bool(index))
            network_.first.bias.requires_grad_(False)
        seen: list[nn.Module] = []
        model.seen = seen  # type: ignore[assignment]
        return model

    @pytest.fixture(params=["build", "carry", "_swap", "lift"])
    def fault(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Fault:
        fault = Fault(getattr(engine, request.param))
        monkeypatch.setattr(engine, request.param, fault)
        return fault

    @pytest.mark.parametrize("kind", ["switchable", "frozen", "rms"])
    def test_a_failure_in_the_middle(self, kind: str, fault: Fault) -> None:
        model = self.model()
        plan = plan_convert(model, kind)
        before = picture(model)
        fault.calls = 0
        plan.apply()
        total = fault.calls
        functional = sum(change.functional for change in plan.changes)
        wanted = {"lift": functional, "_swap": len(plan.changes) - functional}
        assert total == wanted.get(fault.function.__name__, len(plan.changes))
        for fault.at in sorted({1, 2, total // 2, total} & set(range(1, total + 1))):
            fault.calls = 0
            with pytest.raises(ZeroDivisionError):
                plan.apply(inplace=True)
            gc.collect()
            assert before.differences(model) == [], f"{fault.function.__name__}, call {fault.at}"
            model.load_state_dict(model.state_dict())
            assert set(model.seen) == {model[0].first, model[1].first}, "the hooks know their module"
            model.seen.clear()
        fault.at = 0
        plan.apply(inplace=True)
        assert before.differences(model)

    def test_undo_after_success(self) -> None:
        model = self.model()
        before = picture(model)
        plan = plan_convert(model, "rms")
        plan.apply(inplace=True)
        assert before.differences(model)
        assert plan.applied is not None
        plan.applied.undo()
        assert before.differences(model) == []


def test_a_model_that_changed_meanwhile_is_refused_whole() -> None:
    model = network()
    plan = plan_convert(model, "group")
    model.blocks[0] = nn.ReLU()
    before = picture(model)
    with pytest.raises(NormswapError, match=r"blocks\.0.*the plan does not fit this model"):
        plan.apply(inplace=True)
    assert before.differences(model) == []
    del model.blocks[0]
    with pytest.raises(NormswapError, match=r"blocks\.0"):
        plan.apply(inplace=True)


def test_other_channels_meanwhile() -> None:
    model = nn.Sequential(nn.BatchNorm2d(8))
    plan = plan_convert(model, "group")
    model[0] = nn.BatchNorm2d(16)
    with pytest.raises(
        NormswapError, match=r"0 is batch\(16, eps=1e-05\), but the plan was made for batch of 8 channels"
    ):
        plan.apply()


def test_in_place_only_once() -> None:
    plan = plan_convert(network(), "group")
    plan.apply(inplace=True)
    with pytest.raises(NormswapError, match="already applied in place"):
        plan.apply(inplace=True)


def test_copies_as_often_as_wanted() -> None:
    model = network()
    plan = plan_convert(model, "group")
    first, second = plan.apply(), plan.apply()
    assert first is not second
    assert torch.equal(first(X), second(X))
    assert first.first.weight is not second.first.weight
    assert plan.apply(inplace=True) is model


def test_aliases_are_one_change() -> None:
    change = next(c for c in plan_convert(network(), "group").changes if c.name == "first")
    assert change.aliases == ("second",)
    assert change.classes == ("torch.nn.modules.batchnorm.BatchNorm2d", "torch.nn.modules.normalization.GroupNorm")


def test_what_is_lost_and_gained_is_said() -> None:
    model = nn.Sequential(nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.LayerNorm(8))
    lost = {c.name: c.lost for c in plan_convert(model, "rms").changes}
    assert lost == {"0": ("bias", "running statistics"), "1": ("bias",), "2": ("bias",)}
    assert only(plan_convert(model, "frozen").changes).lost == ("training of affine and statistics",)
    notes = {c.name: c.notes for c in plan_convert(model, "batch").changes}
    assert "running statistics start at mean 0, variance 1" in notes["1"][0]
    switchable = convert(model, "switchable")
    assert "gates" in plan_convert(switchable, "group").changes[0].lost


@pytest.mark.usefixtures("ambient_condition")
def test_exactness_in_the_plan_is_measured() -> None:
    model = nn.Sequential(randomise(nn.BatchNorm2d(8).double()), randomise(nn.GroupNorm(1, 8).double())).eval()
    x = sample(3, 8, 4, 5)
    for kind in kinds():
        plan = plan_convert(model, kind)
        exact = all(change.exactness == "exact" for change in plan.changes)
        assert exact == (distance(plan.apply().eval()(x), model(x)) < DOUBLE)
