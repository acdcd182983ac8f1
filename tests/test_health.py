"""Health of norms: every check has a model that shows it and one that must not; what is measured is what it says."""

from __future__ import annotations

import tests.zoo.schemas  # noqa: F401  (before torchvision, which timm imports)

# isort: split
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

import normswap
from normswap import Health, NormswapError, examine
from normswap.health import CHECKS, Measured
from normswap.health.checks import SEVERITIES
from tests.support import only, randomise, sample

X = (sample(8, 3, 6, 6),)


def batch(cls: type = nn.BatchNorm2d, channels: int = 4, **options: Any) -> Any:
    """A batch norm with live statistics and affine; ``options`` of the constructor, or tensors to be set in part."""
    tensors = {name: options.pop(name) for name in ("mean", "var", "weight", "bias") if name in options}
    norm: Any = randomise(cls(channels, **options), seed=2)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.fill_(10)
    with torch.no_grad():
        for name, values in tensors.items():
            tensor = getattr(norm, name if name in ("weight", "bias") else f"running_{name}")
            tensor[: len(values)] = torch.tensor(values)
    return norm


def net(norm: nn.Module, *behind: nn.Module, bias: bool = False) -> nn.Sequential:
    """``norm`` is called ``1``."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), norm, *(behind or (nn.ReLU(),))).double().eval()


def trained(model: nn.Module, *frozen: str) -> nn.Module:
    model.train()
    for name in frozen:
        model.get_submodule(name).eval()
    return model


def settled(model: nn.Module, batches: list[Any]) -> nn.Module:
    """With running statistics that are those of the data."""
    normswap.recalibrate(model, batches)
    return model


class Nameless(nn.Module):
    """It has no reader."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().mean() * self.weight.reshape(1, -1, 1, 1)


Nameless.__name__ = "OddNorm"


class Unused(nn.Module):
    def __init__(self, used: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.used = nn.Conv2d(3, 4, 3), batch(), used

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.norm(x) if self.used else x


class Twice(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 4, 1), norm, nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.two(self.norm(self.one(x))))


class Parallel(nn.Module):
    """Norms side by side, one of which counts ``scale`` times as much as the others."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.norms, self.scale = nn.ModuleList([batch(channels=3) for _ in range(3)]), scale

    def forward(self, x: Tensor) -> Tensor:
        one, two, three = (norm(x) for norm in self.norms)
        return self.scale * one + two + three


def tied(**shared: bool) -> nn.Module:
    first, second = batch(), batch()
    if shared["buffers"]:
        second.running_mean, second.running_var = first.running_mean, first.running_var
    second.weight = first.weight
    return nn.Sequential(first, second).eval()


def aliased(norm: nn.Module) -> nn.Module:
    model = nn.Module()
    model.one, model.other = norm, norm
    return model


def broken(value: float) -> nn.Module:
    model = net(batch())
    nn.init.constant_(model[0].weight[1], value)
    return model


def silent(value: float) -> nn.Module:
    """The layer behind the norm has the weight ``value`` throughout."""
    model = net(batch(), nn.ReLU(), nn.Conv2d(4, 2, 1))
    nn.init.constant_(model[3].weight, value)
    return model


BATCHES = [sample(8, 3, 6, 6, seed=seed) for seed in (1, 2)]
APART = [BATCHES[0], BATCHES[0] + 40]


def data(model: nn.Module, batches: list[Any] = BATCHES, **options: Any) -> Health:
    return examine(model, batches=batches, **options)


CASES: dict[str, tuple[Callable[[], Health], Callable[[], Health]]] = {
    "not-finite": (
        lambda: examine(net(batch(weight=[float("nan")]))),
        lambda: examine(net(batch(weight=[1.0]))),
    ),
    "negative-variance": (lambda: examine(net(batch(var=[-1e-9]))), lambda: examine(net(batch(var=[0.0])))),
    "zero-division": (
        lambda: examine(net(batch(var=[0.0], eps=0.0))),
        lambda: examine(net(batch(var=[0.0]))),
    ),
    "never-updated": (lambda: examine(net(nn.BatchNorm2d(4))), lambda: examine(net(batch()))),
    "dead-channels": (lambda: examine(net(batch(var=[9e-9]))), lambda: examine(net(batch(var=[1.1e-8])))),
    "eps-dominated": (lambda: examine(net(batch(var=[9e-6]))), lambda: examine(net(batch(var=[1.1e-5])))),
    "large-scale": (lambda: examine(net(batch(weight=[-101.0]))), lambda: examine(net(batch(weight=[99.0])))),
    "dead-scale": (
        lambda: examine(net(batch(weight=[10.0, 0.009]))),
        lambda: examine(net(batch(weight=[10.0, 0.011]))),
    ),
    "zero-scale": (
        lambda: examine(net(batch(weight=[0.0] * 4))),
        lambda: examine(net(batch(weight=[0.0] * 3 + [0.1]))),
    ),
    "overflows-float16": (lambda: examine(net(batch(mean=[-7e4]))), lambda: examine(net(batch(mean=[6e4])))),
    "half-statistics": (lambda: examine(net(batch()).bfloat16()), lambda: examine(net(batch()).float())),
    "bad-eps": (lambda: examine(net(batch(eps=-1e-5))), lambda: examine(net(batch(eps=1e-5)))),
    "zero-eps": (lambda: examine(net(batch(eps=0.0))), lambda: examine(net(batch(eps=1e-12)))),
    "large-eps": (lambda: examine(net(batch(eps=0.1))), lambda: examine(net(batch(eps=1e-3)))),
    "small-eps": (lambda: examine(net(batch(eps=1e-8)).half()), lambda: examine(net(batch(eps=1e-8)))),
    "bad-momentum": (lambda: examine(net(batch(momentum=1.5))), lambda: examine(net(batch(momentum=0.5)))),
    "zero-momentum": (lambda: examine(net(batch(momentum=0.0))), lambda: examine(net(batch(momentum=3e-4)))),
    "large-momentum": (lambda: examine(net(batch(momentum=0.99))), lambda: examine(net(batch(momentum=0.1)))),
    "cumulative-momentum": (lambda: examine(net(batch(momentum=None))), lambda: examine(net(batch()))),
    "no-running-statistics": (
        lambda: examine(net(nn.BatchNorm2d(4, track_running_stats=False))),
        lambda: examine(net(nn.InstanceNorm2d(4))),
    ),
    "one-element-groups": (
        lambda: examine(net(nn.GroupNorm(4, 4)), (X[0][..., :3, :3],)),
        lambda: examine(net(nn.GroupNorm(4, 4)), X),
    ),
    "few-values": (
        lambda: examine(net(nn.GroupNorm(4, 4)), (X[0][..., :4, :4],)),
        lambda: examine(net(nn.GroupNorm(2, 4)), (X[0][..., :4, :4],)),
    ),
    "tiny-batch": (
        lambda: examine(trained(net(batch())), (X[0][:7],)),
        lambda: examine(net(batch()), (X[0][:7],)),
    ),
    "single-value-batch": (
        lambda: examine(trained(net(batch())), (X[0][:1, :, :3, :3],)),
        lambda: examine(trained(net(batch())), (X[0][..., :3, :3],)),
    ),
    "trains-in-eval": (
        lambda: examine(nn.Sequential(trained(net(batch()))).train(False).append(batch().train())),
        lambda: examine(trained(net(batch()))),
    ),
    "frozen-in-train": (
        lambda: examine(trained(net(batch()), "1")),
        lambda: examine(trained(normswap.convert(net(batch()), "frozen"))),
    ),
    "half-frozen": (
        lambda: examine(trained(net(batch()).requires_grad_(False))),
        lambda: examine(net(batch()).requires_grad_(False)),
    ),
    "unknown": (lambda: examine(net(Nameless())), lambda: examine(net(batch()))),
    "never-ran": (lambda: examine(Unused(False).double().eval(), X), lambda: examine(Unused(True).double().eval(), X)),
    "called-often": (
        lambda: examine(Twice(batch()).double().eval(), X),
        lambda: examine(Twice(nn.GroupNorm(2, 4)).double().eval(), X),
    ),
    "alias": (lambda: examine(aliased(batch())), lambda: examine(tied(buffers=False))),
    "tied-tensors": (lambda: examine(tied(buffers=True)), lambda: examine(tied(buffers=False))),
    "bias-before-norm": (
        lambda: examine(net(batch(), bias=True)),
        lambda: examine(net(nn.GroupNorm(2, 4), bias=True)),
    ),
    "dropout-before-norm": (
        lambda: examine(nn.Sequential(nn.Dropout(), net(batch()))),
        lambda: examine(nn.Sequential(nn.Dropout(), net(nn.GroupNorm(2, 4)))),
    ),
    "output-not-finite": (lambda: data(broken(float("inf"))), lambda: data(broken(3.0))),
    "stale-statistics": (
        lambda: data(settled(net(batch()), APART)),
        lambda: data(settled(net(batch()), BATCHES)),
    ),
    "noisy-batches": (
        lambda: data(settled(net(batch()), APART), APART),
        lambda: data(settled(net(batch()), BATCHES)),
    ),
    "dead-activations": (
        lambda: data(settled(net(batch(bias=[-20.0, -20.0])), BATCHES)),
        lambda: data(settled(net(batch(bias=[-20.0, -20.0]), nn.LeakyReLU()), BATCHES)),
    ),
    "saturated": (
        lambda: data(settled(net(batch(weight=[40.0] * 4), nn.Sigmoid()), BATCHES)),
        lambda: data(settled(net(batch(weight=[40.0] * 4), nn.GELU()), BATCHES)),
    ),
    "gradient-not-finite": (
        lambda: data(net(batch(), nn.Tanh()), loss=lambda output, batch: (output * 0).sqrt().sum()),
        lambda: data(net(batch(), nn.Tanh()), loss=lambda output, batch: output.square().sum()),
    ),
    "no-gradient": (lambda: data(silent(0.0)), lambda: data(silent(1e-3))),
    "vanishing-gradient": (
        lambda: data(Parallel(1e-5).double().eval()),
        lambda: data(Parallel(1e-3).double().eval()),
    ),
    "exploding-gradient": (
        lambda: data(Parallel(1e5).double().eval()),
        lambda: data(Parallel(1e3).double().eval()),
    ),
}


def test_every_check_has_a_case() -> None:
    assert set(CASES) == set(CHECKS)


@pytest.mark.parametrize("check", CASES)
def test_check(check: str) -> None:
    shows, clean = (case() for case in CASES[check])
    found = [each for each in shows.findings if each.check == check]
    assert found, shows.findings
    assert {each.severity for each in found} <= {CHECKS[check].severity}
    assert all(each.why and each.mend and each.what for each in found)
    assert check not in {each.check for each in clean.findings}
    if CHECKS[check].severity == "error":
        assert not shows
    assert bool(clean), clean.errors


def test_nothing_is_wrong_with_a_sound_model() -> None:
    health = data(settled(net(batch(bias=[1.0] * 4)), BATCHES))
    assert health.findings == ()
    assert str(health).endswith("health: nothing found")
    assert examine(nn.Linear(2, 2)).norms == ()


def test_few_channels_are_a_note() -> None:
    few, many = (examine(nn.Sequential(batch(channels=10, var=[0.0] * count)).eval()) for count in (2, 3))
    assert [each.severity for each in few.findings] == ["note"]
    assert [each.severity for each in many.findings] == ["warning"]
    assert only(list(many.warnings)).what == "3 of 10 channels with a variance below 0.001 eps, least 0"


def test_the_cause_alone_is_told_of_an_output_that_is_not_finite() -> None:
    assert [each.check for each in data(net(batch(var=[-5.0]))).errors] == ["negative-variance"]


def test_errors_come_first() -> None:
    health = examine(net(batch(var=[1e-12, float("nan")], momentum=0.0, eps=-1.0)))
    severities = [SEVERITIES.index(each.severity) for each in health.findings]
    assert severities == sorted(severities)
    assert health.counts == {"error": 2, "warning": 1, "note": 0}
    assert health.verdict == "health: 2 errors, 1 warning"


@pytest.mark.parametrize(
    ("kind", "norm"),
    [("layer", nn.LayerNorm(1)), ("group", nn.GroupNorm(4, 4))],
)
def test_data_is_wiped_by_moments_of_one_value(kind: str, norm: nn.Module) -> None:
    """What the check claims: the output is the bias, whatever the input."""
    x = sample(5, 1) if kind == "layer" else sample(5, 4, 1)
    randomise(norm).double()
    torch.testing.assert_close(norm(x), norm(x + 7), rtol=0, atol=1e-9)
    health = examine(nn.Sequential(norm).eval(), (x,))
    assert "one-element-groups" in {each.check for each in health.errors}


class TestPlacement:
    class Block(nn.Module):
        """A transformer block with the norms in front, a pre-activation, a concatenation, a sum, in one."""

        def __init__(self) -> None:
            super().__init__()
            self.pre, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)
            self.act, self.next = nn.LayerNorm(4), nn.Linear(4, 4)
            self.post, self.cat, self.head = nn.LayerNorm(4), nn.LayerNorm(8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(x)
            x = x + self.linear(self.pre(x))
            x = x + self.next(torch.relu(self.act(x)))
            x = self.post(x + 1)
            return self.head(self.cat(torch.cat([x, x.flip(-1)], -1)))

    def test_roles(self) -> None:
        health = examine(self.Block())
        assert {norm.name: norm.place for norm in health.norms} == {
            "pre": "tanh → norm → Linear (pre-norm)",
            "act": "add → norm → relu → Linear (pre-activation)",
            "post": "add → norm → flip, cat (after a sum)",
            "cat": "cat → norm → Linear (after concat)",
        }
        assert health.depth == ("pre", "act", "post", "cat")

    def test_after_a_layer_and_at_the_input(self) -> None:
        model = nn.Sequential(batch(channels=3), *net(batch(), nn.ReLU(), nn.Conv2d(4, 2, 1))).eval()
        assert [norm.place for norm in examine(model).norms] == [
            "input → norm → Conv2d (at the input)",
            "Conv2d → norm → ReLU → Conv2d",
        ]

    def test_what_no_code_shows_has_no_place(self) -> None:
        class Odd(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm = batch()

            def forward(self, x: Tensor) -> Tensor:
                return self.norm(x) if x.sum() > 0 else x

        (norm,) = examine(Odd().eval()).norms
        assert norm.places == ()
        assert norm.place == ""
        assert norm.stays is not None


def test_folds_as_plan_fold_says() -> None:
    model = net(batch(), nn.ReLU(), batch())
    first, second = examine(model).norms
    assert (first.into, first.folds) == (("0",), "into 0")
    change = normswap.plan_fold(model).changes[1]
    assert second.into == ()
    assert second.stays == "; ".join(change.notes)
    (layer,) = examine(net(nn.GroupNorm(2, 4))).norms
    assert layer.stays == only(normswap.plan_fold(net(nn.GroupNorm(2, 4))).skips).reason


def test_a_model_in_train_mode_is_planned_as_in_eval_mode() -> None:
    (norm,) = examine(trained(net(batch()))).norms
    assert norm.into == ("0",)


class TestMeasured:
    def of(self, model: nn.Module, batches: list[Any] = BATCHES, name: str = "1", **options: Any) -> Measured:
        health = data(model, batches, **options)
        found = {norm.name: norm.measured for norm in health.norms}[name]
        assert found is not None
        return found

    def test_discrepancy_is_that_of_the_outputs(self) -> None:
        model = net(batch(nn.BatchNorm2d, affine=False))
        seen = self.of(model, BATCHES)
        norm, squares = model[1], []
        for x in BATCHES:
            value = model[0](x).detach()
            running = norm(value).detach()
            moments = torch.nn.functional.batch_norm(value, None, None, training=True)
            squares.append((moments - running).square().mean())
        assert seen.discrepancy == pytest.approx(float(torch.stack(squares).mean().sqrt()), rel=1e-12)

    def test_staleness_and_noise_are_those_of_pooled_moments(self) -> None:
        model = settled(net(batch()), BATCHES)
        seen = self.of(model, BATCHES)
        assert seen.staleness == pytest.approx(0, abs=2e-3)  # torch keeps the unbiased variance: 256 / 255
        assert seen.noise == pytest.approx(seen.discrepancy, rel=1e-2)
        assert seen.noise is not None
        assert seen.noise > 0.01
        assert self.of(net(batch()), BATCHES[:1]).noise == 0

    def test_activations_behind_and_inside(self) -> None:
        outside = settled(net(batch(bias=[-20.0])), BATCHES)
        fused = BatchNormAct2d(4).double()
        fused.load_state_dict(outside[1].state_dict())
        inside = nn.Sequential(outside[0], fused).eval()
        assert self.of(inside).dead == self.of(outside).dead == 0.25
        assert self.of(inside).output_mean == self.of(outside).output_mean
        clipped = self.of(settled(net(batch(weight=[40.0] * 4, bias=[3.0] * 4), nn.ReLU6()), BATCHES))
        assert clipped.saturated == pytest.approx(0.45, abs=0.1)
        assert clipped.dead == 0

    def test_output_is_that_in_front_of_the_activation(self) -> None:
        model = settled(net(batch(weight=[1.0] * 4, bias=[0.0] * 4), nn.ReLU(inplace=True)), BATCHES)
        seen = self.of(model)
        assert seen.output_mean == pytest.approx(0, abs=1e-9)
        assert seen.output_std == pytest.approx((255 / 256) ** 0.5, rel=1e-4)

    def test_gradients_are_those_of_autograd(self) -> None:
        model = net(batch(), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 2)).double()
        seen = self.of(model, loss=lambda output, batch: output.square().sum() + batch.sum())
        model[1].train()
        value = model[0](BATCHES[0]).detach().requires_grad_()
        given = model[1](value)
        given.retain_grad()
        (model[4](given.relu().flatten(1)).square().sum()).backward()
        assert given.grad is not None
        assert value.grad is not None
        assert seen.gradient == pytest.approx(float(given.grad.square().mean().sqrt()), rel=1e-12)
        assert seen.gain == pytest.approx(float(value.grad.norm() / given.grad.norm()), rel=1e-12)

    def test_variances_below_eps_of_a_norm_without_statistics(self) -> None:
        health = data(net(nn.GroupNorm(2, 4, eps=1e3)))
        assert "eps-dominated" in {each.check for each in health.warnings}
        assert "eps-dominated" not in {each.check for each in data(net(nn.GroupNorm(2, 4))).findings}

    def test_where_train_mode_does_not_run(self) -> None:
        health = data(net(batch()), [sample(1, 3, 3, 3)])
        assert "single-value-batch" in {each.check for each in health.errors}
        assert health.loss is not None
        assert "eval mode" in health.loss

    def test_gradients_that_cannot_be_taken_are_told(self) -> None:
        health = data(nn.Sequential(batch(channels=3), nn.Flatten(), Integers()).double().eval())
        assert health.loss is None
        assert any("no gradients were measured" in note for note in health.notes)

    def test_frozen_and_half_the_dtypes(self) -> None:
        model = normswap.convert(net(batch()), "frozen").bfloat16()
        seen = self.of(model, [BATCHES[0].bfloat16()])
        assert seen.discrepancy is None
        assert seen.gradient is not None


class Integers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(-1)


def test_the_model_is_as_it_was() -> None:
    model = trained(net(batch(), nn.ReLU(inplace=True), nn.Dropout(), batch()), "3")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    examine(model, X, BATCHES)
    assert flags == [module.training for module in model.modules()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())
    assert torch.is_grad_enabled()


def test_json_is_stable() -> None:
    record = json.loads(json.dumps(data(net(batch(var=[float("nan")]))).to_dict(), allow_nan=False))
    assert list(record) == ["healthy", "counts", "findings", "norms", "notes", "batches", "loss"]
    assert list(record["findings"][0]) == ["severity", "check", "site", "what", "why", "mend"]
    (norm,) = record["norms"]
    assert norm["places"] == [{"before": "Conv2d", "then": ["ReLU"], "readers": ["output"], "role": "after a layer"}]
    assert set(norm["running_var"]) == {"least", "low", "median", "high", "largest"}
    assert norm["measured"]["discrepancy"] is None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"model": None}, "expected a torch.nn.Module"),
        ({"loss": lambda output, batch: output}, "pass batches"),
        ({"batches": X[0]}, r"write \[batch\]"),
        ({"batches": []}, "batches is empty"),
        ({"batches": [torch.zeros(2, 5)]}, "does not run on batch 0"),
        ({"example_inputs": X[0]}, "must be a tuple"),
    ],
)
def test_misuse(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(NormswapError, match=told):
        examine(**{"model": net(batch()), **arguments})


def test_the_documents_list_every_check() -> None:
    text = (Path(__file__).parent.parent / "docs" / "health.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `") and " inspect " not in line]
    told: dict[str, str] = {}
    for _, names, severities, *_ in rows:
        severity = severities.replace("°", "").strip().split(", ")
        for place, name in enumerate(names.split(",")):
            told[name.strip(" `")] = severity[min(place, len(severity) - 1)]
    assert {name: severity for name, severity in told.items() if name in CHECKS or severity in SEVERITIES} == {
        name: check.severity for name, check in CHECKS.items()
    }
