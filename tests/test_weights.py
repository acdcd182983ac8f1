"""Weight norm and spectral norm across a model, and back to plain weights: what changes, what stays and why, undone bit
for bit, replayed, loaded."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from typer.testing import CliRunner

import normswap
from normswap import NormswapError, Plan, apply_recipe, convert, plan_convert
from normswap.cli import app
from normswap.engine.forms import leading
from normswap.source import fitted_recipe
from tests.support import DOUBLE, check_copies, distance, only, picture, randomise, sample


class Network(nn.Module):
    """Convolutions with and without bias, groups, transposed; a linear layer; norms that fold and one that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=4), nn.BatchNorm2d(8), nn.ReLU(),
            nn.ConvTranspose2d(8, 6, 2, groups=2), nn.BatchNorm2d(6), nn.GroupNorm(2, 6),
        )  # fmt: skip
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


LAYERS = ["features.0", "features.3", "features.6", "head"]
FOLDED = ["features.1", "features.4", "features.7"]
X = sample(4, 3, 8, 8)


def network() -> nn.Module:
    return randomise(Network().double()).eval()


def check(model: nn.Module, to: str, x: Tensor, **options: Any) -> tuple[Plan, nn.Module]:
    """The plan and its result: planning touches nothing, applying is undone bit for bit, in place and after an error,
    and replayed on the model; the state loads strictly."""
    before = picture(model)
    plan = plan_convert(model, to, **options)
    new = plan.apply()
    assert before.differences(model) == []
    assert plan.apply(inplace=True) is model
    assert list(model.state_dict()) == list(new.state_dict())
    with torch.no_grad():
        assert torch.equal(model(x), new(x))
    plan.undo()
    assert before.differences(model) == []
    replayed = apply_recipe(model, json.loads(json.dumps(plan.recipe)))
    with torch.no_grad():
        assert torch.equal(replayed(x), new(x))
    replayed.load_state_dict(new.state_dict(), strict=True)
    return plan, new


def names(plan: Plan) -> dict[str, str]:
    return {change.name: change.exactness for change in plan.changes}


def reasons(plan: Plan) -> dict[str, str]:
    return {skip.name: skip.reason for skip in plan.skips}


class TestWeightNorm:
    def test_norms_fold_into_layers_that_keep_the_function(self) -> None:
        model = network()
        plan, new = check(model, "weight_norm", X)
        assert names(plan) == dict.fromkeys([*LAYERS, *FOLDED], "exact")
        assert list(reasons(plan)) == ["features.8"]
        with torch.no_grad():
            assert distance(new(X), model(X)) < DOUBLE
        for name in LAYERS:
            old, layer = model.get_submodule(name), new.get_submodule(name)
            assert isinstance(layer, type(old))
            gain, direction = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
            axis = 1 if isinstance(old, nn.ConvTranspose2d) else 0
            assert gain.numel() == gain.shape[axis] == direction.shape[axis]
            assert distance(layer.weight, gain * direction / torch.norm_except_dim(direction, 2, axis)) < DOUBLE

    @pytest.mark.parametrize(
        ("companion", "kinds"),
        [("keep", ["batch"] * 3 + ["group"]), ("identity", []), ("group", ["group"] * 4)],
    )
    def test_norms_have_the_companion_that_is_asked_for(self, companion: str, kinds: list[str]) -> None:
        model = network()
        plan, new = check(model, "weight_norm", X, companion=companion)
        assert [str(site.norm.kind) for site in normswap.find(new) if site.norm] == kinds
        assert {name: names(plan)[name] for name in LAYERS} == dict.fromkeys(LAYERS, "exact")
        if companion == "keep":
            with torch.no_grad():
                assert distance(new(X), model(X)) < DOUBLE
            assert "companion='keep'" in reasons(plan)["features.1"]

    def test_in_train_mode_norms_stay_and_layers_keep_the_function(self) -> None:
        model = network().train()
        plan = plan_convert(model, "weight_norm", where=["features.0", "head", "features.1"])
        new = plan.apply()
        assert names(plan) == {"features.0": "exact", "head": "exact"}
        assert "train mode" in reasons(plan)["features.1"]
        assert reasons(plan)["features.3"] == "not selected by where"
        assert distance(new(X), copy.deepcopy(model)(X)) < DOUBLE

    def test_a_kernel_of_zeros_stays_zero_and_finite(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double().eval()
        randomise(model)
        with torch.no_grad():
            model[1].weight[:2] = 0
            model[0].weight[3] = 0
        plan, new = check(model, "weight_norm", X)
        assert "kernels of zeros" in plan.changes[0].notes[0]
        out = new(X)
        assert distance(out, model(X)) < DOUBLE
        out.sum().backward()
        assert all(bool(p.grad.isfinite().all()) for p in new.parameters())
        assert bool((new[0].parametrizations.weight.original0.grad[3] != 0).all()), "it can be trained away from zero"

    def test_reset_sets_the_gains_to_one_and_drops_the_norms(self) -> None:
        plan, new = check(network(), "weight_norm", X, init="reset")
        assert set(names(plan).values()) == {"retrain"}
        assert bool((new.head.parametrizations.weight.original0 == 1).all())
        assert bool((new.head.weight.norm(dim=1) - 1).abs().max() < 1e-12)
        assert [site.name for site in normswap.find(new)] == []

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_dtype_flags_and_memory_format_are_kept(self, dtype: torch.dtype) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(6, 2)).to(dtype=dtype, memory_format=torch.channels_last)
        model[0].weight.requires_grad_(False)
        model.eval()[1].train()
        new = convert(model, "weight_norm")
        assert {tensor.dtype for tensor in new.state_dict().values()} == {dtype}
        assert new[0].parametrizations.weight.original1.is_contiguous(memory_format=torch.channels_last)
        assert [p.requires_grad for p in new[0].parametrizations.parameters()] == [False, False]
        assert all(p.requires_grad for p in new[1].parameters())
        assert {m.training for m in new[0].modules()} == {False}
        assert {m.training for m in new[1].modules()} == {True}
        bound = {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
        assert distance(new[0].weight, model[0].weight) < bound


def test_a_layer_that_is_not_selected_absorbs_nothing() -> None:
    plan, new = check(network(), "weight_norm", X, skip="features.0")
    assert names(plan).keys() == {"features.3", "features.4", "features.6", "features.7", "head"}
    assert reasons(plan)["features.1"] == "features.0, which would absorb it, is not selected"
    assert type(new.features[0]) is nn.Conv2d
    only_norms = plan_convert(network(), "weight_norm", where=lambda _name, norm: norm.kind == "batch")
    assert not only_norms.changes


def test_the_result_shares_no_memory_with_the_input() -> None:
    model = network()
    for to in ("weight_norm", "spectral_norm"):
        new = plan_convert(model, to).apply(undoable=False)
        assert not {t.data_ptr() for t in new.state_dict().values()} & {
            t.data_ptr() for t in model.state_dict().values()
        }
    old = model.head.weight
    convert(model, "weight_norm", inplace=True, companion="keep")
    with torch.no_grad():
        model.head.parametrizations.weight.original1.zero_()
    assert bool(old.any()), "what undoes a change keeps the old weight as it was"


class TestSpectralNorm:
    def test_the_largest_singular_value_becomes_one(self) -> None:
        model = network()
        state = torch.get_rng_state()
        plan, new = check(model, "spectral_norm", X, iterations=2)
        assert torch.equal(torch.get_rng_state(), state)
        assert {name: names(plan)[name] for name in LAYERS} == dict.fromkeys(LAYERS, "retrain")
        for name in LAYERS:
            layer = new.get_submodule(name)
            axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
            matrix = layer.weight.detach().movedim(axis, 0).flatten(1)
            assert abs(float(torch.linalg.svdvals(matrix)[0]) - 1) < 1e-6
            assert layer.parametrizations.weight[0].n_power_iterations == 2
            if name not in ("features.0", "features.3", "features.6"):
                assert layer.parametrizations.weight.original is not model.get_submodule(name).weight
        new.train()(X).sum().backward()
        assert new.head.parametrizations.weight.original.grad is not None

    def test_the_weight_is_the_same_parameter(self) -> None:
        model = nn.Sequential(nn.Linear(4, 3))
        weight = model[0].weight
        assert convert(model, "spectral_norm", inplace=True)[0].parametrizations.weight.original is weight

    def test_zeros_and_preserve_are_refused(self) -> None:
        model = nn.Sequential(nn.Linear(4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
        with torch.no_grad():
            model[0].weight.zero_()
            model[2].weight.zero_()
        plan = plan_convert(model, "spectral_norm")
        assert list(names(plan)) == ["2"]
        assert all("all zeros" in reasons(plan)[name] for name in ("0", "1"))
        plan = plan_convert(network(), "spectral_norm", init="preserve")
        assert not plan.changes
        assert "largest singular value" in reasons(plan)["head"]
        assert "preserve" in reasons(plan)["features.1"]

    def test_first_estimate(self) -> None:
        weight = sample(5, 7)
        u, v = leading(weight, torch.ones(7).double())
        assert abs(float(u @ weight @ v - torch.linalg.svdvals(weight)[0])) < 1e-8

    def test_no_values_on_the_meta_device(self) -> None:
        new = convert(nn.Sequential(nn.Linear(4, 3, device="meta")), "spectral_norm")
        assert {t.device.type for t in new.state_dict().values()} == {"meta"}
        new = convert(nn.Sequential(nn.Linear(4, 3, device="meta")), "weight_norm")
        assert {t.device.type for t in new.state_dict().values()} == {"meta"}


class Own(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Reads(nn.Module):
    """Code that looks into the tables of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.layer._parameters["weight"]


def lists_weight() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3))
    model.kept = [model[0].weight]
    return model


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


def replaced_forward() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].forward = lambda x: x
    return model


def hooked_state() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3))
    model[0]._register_state_dict_hook(lambda *_: None)
    return model


STAYING: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "tied": (tied, "1", "its weight is shared by 0 and 1"),
    "held in a list": (lists_weight, "0", "its weight is shared by Sequential and 0"),
    "own forward": (lambda: nn.Sequential(Own(3, 3, 1)), "0", "Own has a forward of its own"),
    "forward on the instance": (replaced_forward, "0", "was replaced on the instance"),
    "code reads its tables": (lambda: nn.Sequential(Reads()), "0.layer", "Reads.forward reads its '_parameters'"),
    "hooks on the state": (hooked_state, "0", "hooks on its state_dict"),
    "uninitialised": (lambda: nn.Sequential(nn.LazyLinear(3)), "0", "run the model once"),
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3))), "0", "by weight norm"),
    "pruned": (lambda: nn.Sequential(prune.l1_unstructured(nn.Linear(3, 3), "weight", 1)), "0", "by pruning mask"),
    "an embedding": (lambda: nn.Sequential(nn.Embedding(3, 2)), "0", "it is a Embedding: only convolutions"),
    "recurrent": (lambda: nn.Sequential(nn.LSTM(3, 2)), "0", "it is a LSTM: only convolutions"),
    "complex": (lambda: nn.Sequential(nn.Linear(3, 3, dtype=torch.complex64)), "0", "is of complex64"),
}


@pytest.mark.parametrize("name", STAYING)
@pytest.mark.parametrize("to", ["weight_norm", "spectral_norm"])
def test_what_stays_has_a_reason(name: str, to: str) -> None:
    make, layer, words = STAYING[name]
    plan = plan_convert(make(), to)
    assert words in reasons(plan)[layer]
    assert not plan.changes


def test_an_unknown_parametrization_stays() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    parametrize.register_parametrization(model[0], "weight", nn.ReLU())
    for to in ("weight_norm", "plain"):
        assert "parametrized by ReLU, which is not known" in reasons(plan_convert(model, to))["0"]


def test_a_shared_layer_and_hooks_stay_as_they_are() -> None:
    layer = nn.Linear(3, 3).double()
    model = nn.Sequential(layer, nn.ReLU(), layer)
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda _module, _args, out: seen.append(out))
    plan, new = check(model, "weight_norm", sample(2, 3))
    assert only(plan.changes).aliases == ("2",)
    assert new[0] is new[2]
    seen.clear()
    assert distance(new(sample(2, 3)), model(sample(2, 3))) < DOUBLE
    assert len(seen) == 4


def test_a_baked_layer_is_parametrized_again() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)).double().eval()
    randomise(model)
    plan, new = check(model, "weight_norm", X)
    assert names(plan) == {"0": "exact", "1": "exact"}
    assert parametrize.is_parametrized(new[0])
    assert distance(new(X), model(X)) < DOUBLE


class TestPlain:
    @pytest.mark.parametrize("to", ["weight_norm", "spectral_norm", "weight_standardized"])
    def test_back_to_a_plain_model(self, to: str) -> None:
        model = network()
        new = convert(model, to, companion="keep")
        plan, back = check(new, "plain", X)
        assert set(names(plan).values()) == {"exact"}
        assert distance(back(X), new(X)) < DOUBLE
        assert list(back.state_dict()) == list(model.state_dict())
        assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
        if to == "weight_norm":
            assert distance(back(X), model(X)) < DOUBLE
        check_copies(back, X)

    def test_what_is_no_layer_stays(self) -> None:
        model = nn.Sequential(parametrizations.weight_norm(nn.Embedding(3, 2)), nn.Linear(2, 2))
        assert "only convolutions" in reasons(plan_convert(model, "plain"))["0"]

    def test_what_stays(self) -> None:
        model = convert(network(), "spectral_norm").train()
        plan = plan_convert(model, "plain", skip="features.3")
        assert "is in train mode" in reasons(plan)["head"]
        assert reasons(plan)["features.3"] == "excluded by skip"
        assert "to='plain' changes layers" in reasons(plan)["features.8"]
        assert "features.1" not in reasons(plan)


class TestOptimizer:
    @pytest.mark.parametrize("to", ["weight_norm", "spectral_norm"])
    def test_it_follows(self, to: str) -> None:
        model = network()
        optimizer = torch.optim.Adam([
            {"params": list(model.features.parameters()), "lr": 0.1},
            {"params": list(model.head.parameters()), "lr": 0.2},
        ])  # fmt: skip
        model(X).sum().backward()
        optimizer.step()
        plan = plan_convert(model, to)
        new = plan.apply()
        plan.remap_optimizer(optimizer)
        groups = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
        assert groups[1] == {id(p) for p in new.head.parameters()}
        assert groups[0] == {id(p) for p in new.features.parameters()}, "a bias that a fold made is among them"
        kept = new.head.bias if to == "weight_norm" else new.head.parametrizations.weight.original
        assert kept in optimizer.state
        new(X).sum().backward()
        optimizer.step()


class TestMisuse:
    @pytest.mark.parametrize(
        ("to", "options", "words"),
        [
            ("weight_norm", {"companion": "weight_norm"}, "companion='weight_norm' of weight_norm; it is 'fold'"),
            ("weight_norm", {"dim": 1}, "has no option 'dim'; its options: companion"),
            ("spectral_norm", {"iterations": 0}, "iterations=0: it must be a whole number of at least 1"),
            ("weight_standardized", {"eps": -1.0}, "eps a number of at least 0"),
            ("selu", {"seed": "a"}, "seed='a'"),
            ("weight_norm", {"where": "nothing"}, "where: no norm is called 'nothing'"),
        ],
    )
    def test_it_raises(self, to: str, options: dict[str, Any], words: str) -> None:
        with pytest.raises(NormswapError, match=words):
            plan_convert(network(), to, **options)

    def test_one_norm_alone_is_refused_by_the_builder(self) -> None:
        with pytest.raises(normswap.Refusal, match="convert the model"):
            normswap.registry.builder("weight_norm")(normswap.read(nn.BatchNorm2d(2)))

    def test_a_kind_is_planned_once(self) -> None:
        for register in (normswap.registry.plans, normswap.registry.builds):
            with pytest.raises(NormswapError, match="kind 'weight_norm' already has a planner"):
                register("weight_norm")(lambda *_: None)  # type: ignore[arg-type]


class TestRecipes:
    def test_a_recipe_that_does_not_fit_changes_nothing(self) -> None:
        plan = plan_convert(network(), "weight_norm")
        for spoil, words in (
            (lambda m: setattr(m, "head", nn.Linear(6, 7)), "but the recipe was made for linear of 5"),
            (lambda m: setattr(m, "head", nn.Identity()), "changes 'head', but the model has no such layer"),
            (lambda m: parametrizations.weight_norm(m.features[0]), "the recipe was made for conv2d"),
            (lambda m: m.features.train(), "train mode"),
        ):
            other = network()
            spoil(other)
            before = picture(other)
            with pytest.raises(NormswapError, match=words):
                apply_recipe(other, plan.recipe, inplace=True)
            assert before.differences(other) == []

    def test_an_error_in_the_middle_puts_all_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from normswap.engine import forms
        from normswap.engine import network as module

        def fails(*_: Any) -> Any:
            raise RuntimeError("no")

        model = network()
        plan = plan_convert(model, "weight_norm")
        before = picture(model)
        made: list[str] = []

        def last_fails(layer: Any, name: str, *rest: Any) -> Any:
            made.append(name)
            return fails() if name == "head" else forms.weight_norm(layer, name, *rest)

        monkeypatch.setitem(module.LAYER_FORMS, "weight_norm", last_fails)
        for call in (lambda: plan.apply(inplace=True), lambda: apply_recipe(model, plan.recipe, inplace=True)):
            with pytest.raises(RuntimeError):
                call()
            assert before.differences(model) == []
        assert made[-1] == "head"
        assert len(made) == 8

    def test_a_recipe_of_a_wrapped_model_fits_the_model_alone(self) -> None:
        recipe = plan_convert(nn.DataParallel(network()), "weight_norm").recipe
        new = apply_recipe(network(), fitted_recipe(recipe, network()))
        assert list(new.state_dict()) == list(convert(network(), "weight_norm").state_dict())

    @pytest.mark.parametrize("spoiled", [{"seed": 0}, {"seed": "a", "iterations": 1}, {}])
    def test_malformed_options(self, spoiled: dict[str, Any]) -> None:
        recipe = plan_convert(network(), "spectral_norm").recipe
        recipe["steps"][-1]["options"] = spoiled
        with pytest.raises(NormswapError, match="step for 'head' is malformed"):
            apply_recipe(network(), recipe)


def test_command_line_writes_what_loads_strictly(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), "
        "nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))\n",
        encoding="utf-8",
    )
    make = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    model = randomise(make).eval()
    torch.save(model.state_dict(), tmp_path / "in.pt")
    where = f"{tmp_path / 'net.py'}:make"
    command = ["convert", str(tmp_path / "in.pt"), "--model", where, "--to", "weight_norm", "--input", "2x3x4x4"]
    for out in ("out.pt", "out.safetensors"):
        result = CliRunner().invoke(app, [*command, "-o", str(tmp_path / out)])
        assert result.exit_code == 0, result.output
        assert "equivalent" in result.output
        fresh = normswap.load(copy.deepcopy(make), tmp_path / out)
        x = torch.randn(2, 3, 4, 4)
        assert parametrize.is_parametrized(fresh[0])
        assert distance(fresh.eval()(x), model(x)) < 1e-5
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "in.pt"), "--to", "weight_norm", "-o", "x.pt"])
    assert result.exit_code == 2
    assert "pass --model" in result.output
    result = CliRunner().invoke(app, [*command[:4], "--to", "weight_norm", "--dry-run", "--from", "linear"])
    assert result.exit_code == 0, result.output
    assert "weight norm of Linear(16, 2)" in result.output
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "out.pt"), "--model", where, "--to", "plain",
                                      "--input", "2x3x4x4", "-o", str(tmp_path / "plain.pt")])  # fmt: skip
    assert result.exit_code == 0, result.output
    assert not parametrize.is_parametrized(normswap.load(copy.deepcopy(make), tmp_path / "plain.pt")[0])
