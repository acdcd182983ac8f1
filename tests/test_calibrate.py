"""Calibration: what a converted norm is fitted to, what is left alone and why, and that nothing else changes."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tests.zoo.schemas  # noqa: F401  before torchvision, which timm imports
from normswap import Calibration, NormswapError, apply_recipe, calibrate, convert, plan_convert, read, reference
from normswap.calibration import apply_calibrated, plan_groups
from normswap.calibration.fit import Layout, Sums, Values, explained, fitted, sums
from tests.support import distance, picture, randomise, sample


class Network(nn.Module):
    """Convolution, norm, shortcut; depthwise, norm; a linear head."""

    def __init__(self, dims: int = 2, norm: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__()
        convolution: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        batch: Any = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
        norm = norm or batch
        self.conv1 = convolution(3, 16, 3, padding=1)
        self.norm1 = norm(16)
        self.conv2 = convolution(16, 16, 3, padding=1, groups=16, bias=False)
        self.norm2 = norm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = x + F.relu(self.norm2(self.conv2(x)))
        return self.head(x.flatten(2).mean(2))


def settled(model: nn.Module, batches: list[Tensor]) -> nn.Module:
    """Random weights, then running statistics that fit them, as after training."""
    torch.manual_seed(0)
    model = model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand_like(parameter) + (0.5 if name.endswith("weight") else -0.5))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    model.train()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return model.eval()


def data(dims: int = 2, count: int = 4, size: int = 8) -> list[Tensor]:
    return [sample(size, 3, *[(12, 6, 4)[dims - 1]] * dims, seed=seed) for seed in range(count)]


def outputs(model: nn.Module, name: str, batches: list[Tensor]) -> Tensor:
    """What a module of the model gives over all batches."""
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, out: found.append(out.detach()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat(found)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel, ``(C,)``."""
    rows = x.movedim(1, -1).reshape(-1, x.shape[1])
    return rows.mean(0), rows.var(0, correction=0)


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("group", {"channels_per_group": 4}),
    ("layer", {}),
    ("layer", {"over": "channels"}),
    ("instance", {}),
    ("switchable", {}),
]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("kind", "options"), KINDS, ids=[f"{k}{o or ''}" for k, o in KINDS])
def test_each_norm_has_the_moments_of_the_one_it_replaced(kind: str, options: dict[str, Any], dims: int) -> None:
    batches = data(dims)
    original = settled(Network(dims), batches)
    model = convert(original, kind, example_inputs=(batches[0],), **options)
    report = calibrate(model, original, batches, fit="moments", correct_biases=False, refit_heads=False, check=False)
    assert [site.name for site in report.sites] == ["norm1", "norm2"]
    for name in ("norm1", "norm2"):
        for ours, theirs in zip(
            moments(outputs(model, name, batches)), moments(outputs(original, name, batches)), strict=True
        ):
            assert distance(ours, theirs) < 1e-9, name


@pytest.mark.parametrize("kind", ["group", "layer", "instance"])
def test_least_squares_explains_most(kind: str) -> None:
    batches = data()
    original = settled(Network(), batches)
    copied = convert(original, kind, example_inputs=(batches[0],))
    model = copy.deepcopy(copied)
    report = calibrate(model, original, batches, fit="least_squares", correct_biases=False, refit_heads=False)
    wanted = outputs(original, "norm1", batches)
    mean = wanted.mean((0, 2, 3), keepdim=True)

    def r2(network: nn.Module) -> float:
        got = outputs(network, "norm1", batches)
        return 1 - float((got - wanted).square().sum() / (wanted - mean).square().sum())

    assert report.sites[0].after == pytest.approx(r2(model), abs=1e-9)
    assert report.sites[0].before == pytest.approx(r2(copied), abs=1e-9)
    for name in ("weight", "bias"):  # any other affine explains less
        moved = copy.deepcopy(model)
        with torch.no_grad():
            moved.get_parameter(f"norm1.{name}").add_(0.01)
        assert r2(moved) < r2(model)


def test_a_site_sees_those_before_it_fitted() -> None:
    """Fitted one by one, a whole pass each, gives the same."""
    batches = data()
    original = settled(Network(), batches)
    model = convert(original, "group", channels_per_group=4)
    expected = copy.deepcopy(model)
    calibrate(model, original, batches, fit="moments", correct_biases=False, refit_heads=False)
    for name in ("norm1", "norm2"):
        site = expected.get_submodule(name)
        with torch.no_grad():
            site.weight.fill_(1.0)
            site.bias.fill_(0.0)
            z, y = (outputs(network, name, batches) for network in (expected, original))
            (mean_z, var_z), (mean_y, var_y) = moments(z), moments(y)
            sign = ((z - mean_z.reshape(-1, 1, 1)) * y).sum((0, 2, 3)).sign()
            site.weight.copy_(sign * (var_y / var_z).sqrt())
            site.bias.copy_(mean_y - site.weight * mean_z)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert distance(ours, theirs) < 1e-9


@pytest.mark.parametrize("fit", ["auto", "moments", "least_squares"])
def test_the_same_however_the_data_is_cut(fit: Any) -> None:
    whole = torch.cat(data())
    original = settled(Network(), [whole])
    results = []
    for size, memory_format in ((8, torch.contiguous_format), (5, torch.channels_last), (32, torch.channels_last)):
        model = convert(original, "group", channels_per_group=4)
        batches = [part.to(memory_format=memory_format) for part in whole.split(size)]
        calibrate(model, original, batches, fit=fit, in_flight=len(batches))
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert distance(results[1], results[0]) < 1e-9
    assert distance(results[2], results[0]) < 1e-9


def test_memory_of_one_batch_and_a_second_pass() -> None:
    """One batch in flight comes near the fit of all at once, and exactly to it in further passes."""
    batches = data()
    original = settled(Network(), batches)

    def fitted_with(**options: Any) -> Tensor:
        model = convert(original, "group", channels_per_group=4)
        calibrate(model, original, batches, fit="moments", correct_biases=False, refit_heads=False, **options)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    whole = fitted_with(in_flight=4)
    errors = [distance(fitted_with(in_flight=1, passes=passes), whole) for passes in (1, 2, 3)]
    assert 1e-6 < errors[0] < 0.05
    assert max(errors[1:]) < 1e-9  # two norms: the second pass has the first as it stays


def test_batches_in_flight_bound_the_memory() -> None:
    alive: list[int] = []
    running = [0]

    class Counted(Network):
        def forward(self, x: Tensor) -> Tensor:
            running[0] += 1
            alive.append(running[0])
            out = super().forward(x)
            running[0] -= 1
            return out

    batches = data(count=6)
    original = settled(Counted(), batches)
    model = convert(original, "layer")
    for in_flight in (1, 3):
        alive.clear()
        calibrate(model, original, iter(batches), in_flight=in_flight, fit="moments")
        assert max(alive) == 3 * in_flight  # the reference, the affine as it was, the one fitted


def test_the_output_decides_between_the_fits() -> None:
    batches = data()
    original = settled(Network(), batches)
    model = convert(original, "group", channels_per_group=2)
    report = calibrate(model, original, batches)
    assert set(report.scores) == {"unchanged", "moments", "least_squares"}
    assert report.fit == max(report.scores, key=lambda name: report.scores[name])
    with torch.no_grad():
        wanted, got = (torch.cat([network(batch) for batch in batches]) for network in (original, model))
    left = (got - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert report.scores[report.fit] == pytest.approx(1 - float(left), abs=1e-9)
    assert report.scores[report.fit] > report.scores["unchanged"]


def test_what_made_the_model_worse_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = sys.modules["normswap.calibration.calibrate"]._writes
    monkeypatch.setattr(
        sys.modules["normswap.calibration.calibrate"],
        "_writes",
        lambda *given: [(tensor, value + 10) for tensor, value in fitted(*given)],
    )
    batches = data(count=8)
    original = settled(Network(), batches)
    model = convert(original, "group", channels_per_group=4)
    before = picture(model)
    report = calibrate(model, original, batches)
    assert before.differences(model) == []
    assert report.check is not None
    assert report.check.put_back
    assert report.check.batches == 1
    assert report.check.after < report.check.before
    assert (report.fit, report.biases, report.heads) == ("unchanged", (), ())
    assert "the model is put back as it was" in str(report)
    assert report.to_dict()["check"]["r2_after"] == report.check.after
    assert report.to_dict()["check"]["put_back"] is True


def test_the_check_runs_only_the_model_and_only_what_it_holds() -> None:
    batches = data(count=8)
    original = settled(Network(), batches)
    model = convert(original, "group", channels_per_group=4)
    runs: list[nn.Module] = []

    def forward(network: nn.Module, batch: Tensor) -> Tensor:
        runs.append(network)
        return network(batch)

    report = calibrate(model, original, batches, forward=forward)
    assert report.check is not None
    assert report.check.batches == 1
    assert runs.count(original) == 8 + 1  # once more to see which layers are heads
    assert runs.count(model) == 3 * 8 + 1
    with torch.no_grad():
        wanted, got = original(batches[0]), model(batches[0])
        copied = convert(original, "group", channels_per_group=4)(batches[0])
    for output, r2 in ((copied, report.check.before), (got, report.check.after)):
        left = (output - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
        assert r2 == pytest.approx(1 - float(left), abs=1e-9)


def test_what_made_the_model_better_stays() -> None:
    batches = data(count=8)
    original = settled(Network(), batches)
    model = convert(original, "group", channels_per_group=4)
    report = calibrate(model, original, iter(batches))
    assert report.check is not None
    assert not report.check.put_back
    assert report.check.after > report.check.before
    assert (report.batches, report.check.batches) == (8, 1)
    with torch.no_grad():
        wanted, got = (network(batches[0]) for network in (original, model))
    left = (got - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert report.check.after == pytest.approx(1 - float(left), abs=1e-9)


def test_what_is_better_already_stays() -> None:
    """A norm over values whose mean is zero loses nothing as rms: no fit can do better."""

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x - x.mean(-1, keepdim=True))

    original = randomise(Centred().double())
    with torch.no_grad():
        original.norm.bias.zero_()
    model = convert(original, "rms")
    before = picture(model)
    report = calibrate(model, original, [sample(20, 8)])
    assert report.fit == "unchanged"
    assert report.biases == ()
    assert before.differences(model) == []


def test_attention_without_its_fast_path() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True, dropout=0.5)
    original = randomise(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()).eval()
    model = convert(original, "rms")
    report = calibrate(model, original, sequences(), fit="least_squares")
    assert len(report.sites) == 4
    assert report.scores["least_squares"] > report.scores["unchanged"]


class Tokens(nn.Module):
    """Pre-norm blocks on ``(N, L, C)``."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(12), norm(12)
        self.up, self.down, self.head = nn.Linear(12, 24), nn.Linear(24, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        x = x + self.down(F.gelu(self.up(self.norm1(x)))) * scale
        return self.head(self.norm2(x).mean(1))


def sequences(count: int = 3) -> list[Tensor]:
    return [sample(6, 5, 12, seed=seed) + torch.linspace(-1, 1, 12) for seed in range(count)]


def test_a_bias_that_both_models_hold_stays() -> None:
    original = randomise(Tokens().double()).eval()
    model = convert(original, "rms")
    model.up, model.head.bias = original.up, original.head.bias
    before = picture(original)
    report = calibrate(model, original, sequences(), fit="least_squares")
    assert report.biases == ("down",)
    assert before.differences(original) == []


def test_layer_to_rms_and_the_bias_of_the_next_layer() -> None:
    original = randomise(Tokens().double()).eval()
    copied = convert(original, "rms")
    model, without = copy.deepcopy(copied), copy.deepcopy(copied)
    report = calibrate(model, original, sequences(), fit="least_squares")
    assert (report.biases, report.heads) == (("up", "down"), ("head",))
    bare = calibrate(without, original, sequences(), fit="least_squares", correct_biases=False, refit_heads=False)
    assert bare.biases == ()
    assert torch.equal(without.up.bias, original.up.bias)
    for name in ("up", "down", "head"):
        ours, theirs = (outputs(network, name, sequences()) for network in (model, original))
        assert distance(*(out.flatten(0, -2).mean(0) for out in (ours, theirs))) < 1e-9
    assert report.scores["least_squares"] > bare.scores["least_squares"] > report.scores["unchanged"]


def test_rms_to_layer_and_layer_over_several_axes() -> None:
    original = randomise(Tokens(nn.RMSNorm).double()).eval()
    model = convert(original, "layer")
    report = calibrate(model, original, sequences())
    assert [site.target.kind for site in report.sites] == ["layer", "layer"]
    assert report.scores[report.fit] > report.scores["unchanged"]
    several = nn.Sequential(randomise(nn.LayerNorm((5, 12)).double()), nn.Tanh())
    model = convert(several, "rms")
    report = calibrate(model, several, sequences(), fit="least_squares")
    wanted, z = (torch.cat([network(x) for x in sequences()]) for network in (several[0], nn.RMSNorm((5, 12)).double()))
    assert distance(model[0].weight, (wanted * z).sum(0) / z.square().sum(0)) < 1e-4  # the ridge


def test_to_batch_estimates_statistics() -> None:
    """Running statistics are those of all data, pooled; group, layer and switchable go there and back."""
    batches = [*data(count=2), *data(count=1, size=3)]
    original = randomise(Network(norm=lambda c: nn.GroupNorm(4, c)).double()).eval()
    for kind in ("batch", "switchable"):
        model = convert(original, kind)
        report = calibrate(model, original, batches, fit="moments", correct_biases=False, refit_heads=False)
        for name in ("norm1", "norm2"):
            x = outputs(model, name.replace("norm", "conv"), batches)
            rows = x.movedim(1, -1).flatten(0, -2)
            site = model.get_submodule(name)
            assert distance(site.running_mean, rows.mean(0)) < 1e-9
            assert distance(site.running_var, rows.var(0)) < 1e-9
            assert int(site.num_batches_tracked) == len(batches)
            ours, theirs = (moments(outputs(network, name, batches)) for network in (model, original))
            assert distance(ours[0], theirs[0]) < 1e-9
            assert distance(ours[1], theirs[1]) < 1e-9
        assert report.scores["moments"] > report.scores["unchanged"]


def test_followed_norms_are_fitted_before_their_activation() -> None:
    from timm.layers import BatchNormAct2d

    batches = data()
    original = settled(Network(norm=lambda c: BatchNormAct2d(c, act_layer=nn.SiLU)), batches)
    for name, parameter in original.named_parameters():
        assert parameter.dtype == torch.float64, name
    model = convert(original, "group", channels_per_group=4)
    calibrate(model, original, batches, fit="moments", correct_biases=False, refit_heads=False)
    with torch.no_grad():
        first = [
            torch.cat([reference(network.conv1(x), read(network.norm1)) for x in batches])
            for network in (model, original)
        ]
    assert distance(moments(first[0])[0], moments(first[1])[0]) < 1e-9
    assert distance(moments(first[0])[1], moments(first[1])[1]) < 1e-9
    assert distance(outputs(model, "norm1", batches), F.silu(first[0])) < 1e-9


def test_functional_norms_of_the_reference() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 3)
            self.bn_weight, self.bn_bias = nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16))
            self.register_buffer("mean", torch.zeros(16))
            self.register_buffer("var", torch.ones(16))

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return F.relu(F.batch_norm(y, self.mean, self.var, self.bn_weight, self.bn_bias, self.training))

    original = randomise(Functional().double()).eval()
    original.var.abs_().add_(0.5)
    before = picture(original)
    model = convert(original, "group", channels_per_group=4)
    report = calibrate(model, original, data(), fit="moments")
    assert [site.name for site in report.sites] == ["batch_norm"]
    assert before.differences(original) == []
    wanted = moments(torch.cat([reference(original.conv(x), report.sites[0].source) for x in data()]))
    got = moments(outputs(model, "batch_norm", data()))
    assert distance(got[0], wanted[0]) < 1e-9
    assert distance(got[1], wanted[1]) < 1e-9


class Inside(nn.Module):
    """A block that calls its norm as a function, one that does it by a name it computes, and tokens."""

    def __init__(self, traceable: bool = True) -> None:
        super().__init__()
        self.conv, self.block = nn.Conv2d(3, 16, 3), Block(traceable)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.conv(x))


class Block(nn.Module):
    def __init__(self, traceable: bool) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16))
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("var", torch.ones(16))
        self.traceable = traceable

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable and float(x.detach().mean()) > 1e9:
            return x
        return F.relu(F.batch_norm(x, self.mean, self.var, self.weight, self.bias))


def test_functional_norms_of_a_block_and_of_tokens() -> None:
    original = randomise(Inside().double()).eval()
    original.block.var.abs_().add_(0.5)
    model = convert(original, "group", channels_per_group=4)
    report = calibrate(model, original, data())
    assert [site.name for site in report.sites] == ["block.batch_norm"]
    assert report.scores[report.fit] > report.scores["unchanged"]

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.head = nn.Linear(12, 12), nn.Linear(12, 4)
            self.scale, self.shift = nn.Parameter(torch.ones(12)), nn.Parameter(torch.zeros(12))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.layer_norm(self.up(x), (12,), self.scale, self.shift).tanh())

    tokens = randomise(Functional().double()).eval()
    before = picture(tokens)
    model = convert(tokens, "rms")
    report = calibrate(model, tokens, sequences())
    assert [(site.name, site.target.kind) for site in report.sites] == [("layer_norm", "rms")]
    assert report.scores[report.fit] > report.scores["unchanged"]
    assert before.differences(tokens) == []


def test_a_functional_norm_that_cannot_be_lifted_is_left_with_its_reason() -> None:
    original = randomise(Inside(traceable=False).double()).eval()
    plan = plan_convert(original, "group")
    assert plan.changes == []
    (reason,) = (skip.reason for skip in plan.skips)
    report = calibrate(copy.deepcopy(original), original, data())
    assert report.sites == ()
    assert [(left.name, left.reason) for left in report.skips] == [
        ("block.batch_norm", f"what it computes in the model is not known: {reason}")
    ]


def test_a_functional_norm_of_the_model_is_left_with_its_reason() -> None:
    original = randomise(Inside().double()).eval()
    model = copy.deepcopy(original)
    model.block.mean += 1.0
    converted = convert(original, "group")
    assert _skips(model, original)["block.batch_norm"].startswith("it is a fixed affine here and in the reference")
    assert _skips(model, converted)["block.batch_norm"] == "it is a function call; only modules are fitted"


def test_one_norm_called_twice_fits_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
            self.stem = nn.Conv2d(3, 16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(F.relu(self.norm(self.stem(x)))))

    batches = data()
    original = settled(Twice(), batches)
    model = convert(original, "group", channels_per_group=4)
    calibrate(model, original, batches, fit="moments", correct_biases=False, refit_heads=False, passes=8)
    ours, theirs = (moments(outputs(network, "norm", batches)) for network in (model, original))
    assert distance(ours[0], theirs[0]) < 1e-4
    assert distance(ours[1], theirs[1]) < 1e-4


LEFT: list[tuple[str, Callable[[nn.Module], nn.Module], str]] = [
    ("not converted", lambda m: convert(m, "group", where="norm1"), "norm2: it normalizes as in the reference"),
    ("exact", lambda m: convert(m, "frozen", where="norm2"), "norm2: it normalizes as in the reference"),
]


@pytest.mark.parametrize(("make", "told"), [case[1:] for case in LEFT], ids=[case[0] for case in LEFT])
def test_left_alone(make: Callable[[nn.Module], nn.Module], told: str) -> None:
    original = settled(Network(), data())
    model = make(original)
    before = copy.deepcopy(model.norm2.state_dict())
    report = calibrate(model, original, data())
    assert told in [f"{left.name}: {left.reason}" for left in report.skips]
    for name, value in before.items():
        assert torch.equal(model.norm2.state_dict()[name], value)


def _skips(model: nn.Module, original: nn.Module) -> dict[str, str]:
    return {left.name: left.reason for left in calibrate(model, original, data()).skips}


def test_left_alone_with_a_reason() -> None:
    original = settled(Network(), data())
    model = convert(original, "group")
    model.norm2.weight = model.norm1.weight
    assert _skips(model, original)["norm2"] == "its weight is shared with another module, which would change too"
    model = convert(original, "group")
    nn.utils.parametrize.register_parametrization(model.norm2, "weight", nn.Softplus())
    assert _skips(model, original)["norm2"] == "its weight is computed from other tensors, not stored"
    model = convert(original, "group")
    model.norm2 = nn.Identity()
    assert _skips(model, original)["norm2"] == "the model has no norm of this name"
    model = convert(original, "group")
    model.extra = nn.GroupNorm(1, 4)
    assert _skips(model, original)["extra"] == "the reference has no norm of this name"
    model = convert(original, "group")
    bare = copy.deepcopy(original)
    bare.norm2 = nn.BatchNorm2d(16, affine=False).double()
    model.norm2 = nn.GroupNorm(4, 16, affine=False).double()
    assert _skips(model, bare)["norm2"] == "it has neither weight nor bias to set"
    model = copy.deepcopy(original)
    randomise(model.norm2)
    assert _skips(model, original)["norm2"].startswith("it is a fixed affine here and in the reference")
    model = convert(original, "group")
    model.norm2 = nn.GroupNorm(2, 16).double()
    model.aside, original.aside = nn.GroupNorm(2, 16), nn.BatchNorm2d(16)
    assert _skips(model, original)["aside"] == "it did not run on the batches"


def test_dead_channels_keep_their_weight() -> None:
    layout, before = Layout(1, (3,)), Values(torch.full((3,), 0.7, dtype=torch.float64), torch.zeros(3).double())
    z, y = sample(6, 3, 4, 4, seed=1), sample(6, 3, 4, 4, seed=2)
    z[:, 0] = 2.0  # the new norm gives a constant
    y[:, 1] = -1.0  # the original gave one
    for method in ("moments", "least_squares"):
        values = fitted(sums(layout, [z], y)[0], method, before, True, True)  # type: ignore[arg-type]
        out = z * values.weight.reshape(-1, 1, 1) + values.bias.reshape(-1, 1, 1)
        assert float(values.weight[0]) == pytest.approx(0.7, abs=1e-6)
        assert distance(moments(out)[0], moments(y)[0]) < 1e-9
        assert float(values.weight[1]) == pytest.approx(0.0, abs=1e-5)
        assert values.weight.isfinite().all()


def test_sums_add_up_and_explain() -> None:
    layout = Layout(-1, (4,))
    z, y = sample(30, 4), sample(30, 4, seed=2)
    values = Values(torch.rand(4).double(), torch.rand(4).double())
    parts = Sums.zero(4, torch.device("cpu"))
    for a, b in zip(z.split(7), y.split(7), strict=True):
        parts = parts + sums(layout, [a], b)[0]
    assert distance(parts.values, sums(layout, [z], y)[0].values) < 1e-12
    left = (z * values.weight + values.bias - y).square().sum() / (y - y.mean(0)).square().sum()
    assert explained(parts, values) == pytest.approx(1 - float(left), abs=1e-9)


@dataclass
class Record:
    images: Tensor
    label: int = 0


class Named(Network):
    def forward(self, images: Tensor | Record, *, scale: float = 1.0) -> Tensor:
        return super().forward(images.images if isinstance(images, Record) else images) * scale


STRUCTURES: dict[str, tuple[Callable[[Tensor], Any], Any]] = {
    "tensor": (lambda x: x, None),
    "tuple": (lambda x: (x,), None),
    "list": (lambda x: [x], None),
    "mapping": (lambda x: {"images": x, "scale": 2.0}, None),
    "dataclass": (lambda x: Record(x), None),
    "images and labels": (lambda x: (x, torch.zeros(len(x))), lambda model, batch: model(batch[0])),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_batches_of_any_structure(name: str) -> None:
    wrap, forward = STRUCTURES[name]
    original = settled(Named(), data())
    model, expected = convert(original, "layer"), convert(original, "layer")
    calibrate(expected, original, data())
    calibrate(model, original, (wrap(x) for x in data()), forward=forward)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert distance(ours, theirs) < 1e-9


MISUSE: list[tuple[str, dict[str, Any], str]] = [
    ("a tensor as batches", {"batches": data()[0]}, r"write \[batch\] for one batch"),
    (
        "images and labels",
        {"batches": [(data()[0], torch.zeros(8))]},
        r"forward=lambda model, batch: model\(batch\[0\]",
    ),
    ("a wrong keyword", {"batches": [{"pixels": data()[0]}]}, "the keyword arguments pixels"),
    ("nothing", {"batches": []}, "batches is empty"),
    ("an iterator twice", {"batches": iter(data()), "passes": 2}, "passes=2 goes over them again"),
    ("an iterator refined", {"batches": iter(data()), "refine": 3}, "refine=3 goes over them again"),
    ("a fit", {"fit": "best"}, "fit='best'; it is one of: auto, moments, least_squares"),
    ("no batch in flight", {"in_flight": 0}, "in_flight=0: it must be a whole number of at least 1"),
]


@pytest.mark.parametrize(("arguments", "told"), [case[1:] for case in MISUSE], ids=[case[0] for case in MISUSE])
def test_misuse(arguments: dict[str, Any], told: str) -> None:
    original = settled(Network(), data())
    model = convert(original, "layer")
    before = picture(model)
    with pytest.raises(NormswapError, match=told):
        calibrate(model, original, **{"batches": data(), **arguments})
    assert before.differences(model) == []


def test_models_that_cannot_be_watched() -> None:
    original = settled(Network(), data())
    model = convert(original, "layer")
    with pytest.raises(NormswapError, match="a compiled model"):
        calibrate(torch.compile(model, backend="eager"), original, data())
    with pytest.raises(NormswapError, match="on the meta device"):
        calibrate(copy.deepcopy(model).to("meta"), original, data())


def test_the_reference_must_be_another_model() -> None:
    original = settled(Network(), data())
    with pytest.raises(NormswapError, match="the same object"):
        calibrate(original, original, data())
    shallow = copy.copy(original)
    shallow._modules = dict(original._modules)
    model = convert(shallow, "group", inplace=True)
    with pytest.raises(NormswapError, match="norm1: its weight is the reference's own"):
        calibrate(model, original, data())


@pytest.mark.parametrize("fails", ["reference", "model", "data"])
def test_an_error_leaves_both_models_as_they_were(fails: str) -> None:
    original = settled(Network(), data())
    model = convert(original, "switchable").train()
    model.norm2.eval()
    model.norm1.weight.requires_grad_(False)
    seen: list[int] = []
    model.norm1.register_forward_hook(lambda m, a, out: seen.append(1))
    pictures = picture(original), picture(model)
    state = torch.get_rng_state()

    def stumble(module: nn.Module, args: Any) -> None:
        torch.rand(1)
        raise RuntimeError("no more")

    def broken() -> Iterator[Tensor]:
        yield data()[0]
        raise RuntimeError("no more")

    handles = (
        [{"reference": original, "model": model}[fails].head.register_forward_pre_hook(stumble)]
        if fails != "data"
        else []
    )
    with pytest.raises(RuntimeError, match="no more"):
        calibrate(model, original, broken() if fails == "data" else data(), in_flight=1)
    for handle in handles:
        handle.remove()
    assert pictures[0].differences(original) == []
    assert pictures[1].differences(model) == []
    assert torch.equal(torch.get_rng_state(), state)
    calibrate(model, original, data(), in_flight=1)
    assert pictures[0].differences(original) == []
    changed = {name for name in pictures[1].differences(model) if not name.startswith("tensor norm")}
    assert changed <= {"tensor conv1.bias", "tensor head.weight", "tensor head.bias"}
    assert not model.norm1.weight.requires_grad
    assert model.training
    assert not model.norm2.training
    assert torch.equal(torch.get_rng_state(), state)
    assert seen


def test_deterministic_and_without_gradients() -> None:
    original = settled(Network(), data())
    results = []
    for _ in range(2):
        model = convert(original, "group", channels_per_group=4)
        calibrate(model, original, data(), refine=3)
        assert all(parameter.grad is None for parameter in (*model.parameters(), *original.parameters()))
        results.append([p.detach() for p in model.parameters()])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_refine_brings_the_output_nearer_by_the_affines_alone() -> None:
    original = settled(Network(), data())
    model = convert(original, "group", channels_per_group=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = calibrate(model, original, data(), refine=40, correct_biases=False, refit_heads=False)
    assert report.fit == "refined"
    assert report.scores["refined"] > max(report.scores["moments"], report.scores["least_squares"]) + 0.01
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {f"norm{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
    with torch.no_grad():
        wanted, got = (torch.cat([network(x) for x in data()]) for network in (original, model))
    left = (got - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert report.scores["refined"] == pytest.approx(1 - float(left), abs=1e-9)


def test_mixed_dtypes() -> None:
    original = settled(Network(), data())
    wanted = convert(original, "group", channels_per_group=4)
    calibrate(wanted, original, data(), fit="moments")
    half = copy.deepcopy(original).bfloat16()
    half.norm2.float()
    half.norm2.register_forward_pre_hook(lambda m, args: (args[0].float(),))
    half.norm2.register_forward_hook(lambda m, args, out: out.bfloat16())
    model = convert(half, "group", channels_per_group=4)
    calibrate(model, half, [x.bfloat16() for x in data()], fit="moments")
    assert [model.norm1.weight.dtype, model.norm2.weight.dtype] == [torch.bfloat16, torch.float32]
    for name in ("norm1.weight", "norm2.weight"):
        assert distance(model.get_parameter(name), wanted.get_parameter(name)) < 0.05


def test_autocast_reaches_the_passes_and_gradients_do_not() -> None:
    seen: set[tuple[torch.dtype, bool]] = set()
    original = settled(Network(), data()).float()
    original.conv2.register_forward_hook(lambda m, args, out: seen.add((out.dtype, out.requires_grad)))
    model = convert(original, "group")
    with torch.autocast("cpu", torch.bfloat16):
        calibrate(model, original, [x.float() for x in data()])
    assert seen == {(torch.bfloat16, False)}


def test_values_that_are_not_finite() -> None:
    original = settled(Network(), data())
    model = convert(original, "group")
    before = picture(model)
    broken = data()
    broken[1][0, 0, 0, 0] = float("nan")
    with pytest.raises(NormswapError, match="norm1: what the batches give is not finite in"):
        calibrate(model, original, broken)
    assert before.differences(model) == []


def test_report() -> None:
    original = settled(Network(), data())
    model = convert(original, "group", groups=4, where="norm2")
    report = calibrate(model, original, data(), fit="moments")
    assert isinstance(report, Calibration)
    low = replace(report.sites[0], after=0.2)
    assert low.advice == "fewer groups (now 4 of 4 channels), or keep it as batch: skip='norm2'"
    whole = replace(low, target=replace(low.target, groups=1))
    assert whole.advice == "keep it as batch: skip='norm2'"
    assert replace(low, after=0.9).advice is None
    instance = replace(low, target=replace(low.target, kind="instance", pools=frozenset({"space"})))
    assert "take group or layer" in str(instance.advice)
    text = str(replace(report, sites=(low,)))
    assert "norm2" in text
    assert "0.200" in text
    assert "skip='norm2'" in text
    assert "norm1  it normalizes as in the reference" in text
    record = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert record["sites"][0]["name"] == "norm2"
    assert record["skips"] == [{"name": "norm1", "reason": "it normalizes as in the reference"}]
    nothing = calibrate(copy.deepcopy(original), original, data())
    assert nothing.sites == ()
    assert len(nothing.skips) == 2


def test_a_plan_applied_and_calibrated() -> None:
    original = settled(Network(), data())
    expected = convert(original, "layer")
    wanted = calibrate(expected, original, data())
    for inplace in (False, True):
        before = picture(original)
        model, report = apply_calibrated(plan_convert(original, "layer"), data(), inplace=inplace)
        assert (model is original) == inplace
        assert report.to_dict() == wanted.to_dict()
        assert (before.differences(original) == []) != inplace
        for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_a_plan_that_cannot_be_calibrated_is_taken_back() -> None:
    original = settled(Network(), data())
    before = picture(original)
    with pytest.raises(NormswapError, match="batches is empty"):
        apply_calibrated(plan_convert(original, "layer"), [], inplace=True)
    assert before.differences(original) == []


class Scaled(nn.Module):
    """Norms of one input; for ``apart`` half of its channels are nine times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.together, self.unused, self.apart, self.left = (nn.BatchNorm2d(16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.together(x) + self.apart(x * torch.tensor([1.0] * 8 + [9.0] * 8).reshape(-1, 1, 1)) + self.left(x)


def _shares(notes: tuple[str, ...]) -> dict[int, float]:
    told = next(note for note in notes if note.startswith("R² by groups: ")).removeprefix("R² by groups: ")
    return {int(count): float(share) for count, share in (part.split(": ") for part in told.split(", "))}


def test_group_counts_by_measurement() -> None:
    model = settled(Scaled(), [])
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(16, 16, 5, 5, generator=generator).double() for _ in range(2)]
    before = picture(model)
    plan = plan_groups(model, iter(batches), skip="left")
    assert before.differences(model) == []
    assert [(skip.name, skip.reason) for skip in plan.skips] == [("left", "excluded by skip")]
    changes = {change.name: change for change in plan.changes}
    assert list(changes) == ["together", "unused", "apart"]
    assert (changes["unused"].target.groups, changes["unused"].notes) == (8, ())  # it did not run: the usual count
    together, apart = (_shares(changes[name].notes) for name in ("together", "apart"))
    assert [count for count in together if together[count] >= max(together.values()) - 0.01] == [1, 2]
    assert (changes["together"].target.groups, changes["apart"].target.groups) == (2, 2)
    assert changes["apart"].options == {"groups": 2}
    with torch.no_grad():
        x = torch.cat(batches) * torch.tensor([1.0] * 8 + [9.0] * 8).reshape(-1, 1, 1)
        y = model.apart(x).transpose(0, 1).flatten(1)
    y = y - y.mean(1, keepdim=True)
    for count, share in apart.items():
        z = F.group_norm(x, count).transpose(0, 1).flatten(1)
        z = z - z.mean(1, keepdim=True)
        left = y - z * (z * y).sum(1, keepdim=True) / z.square().sum(1, keepdim=True)
        assert share == pytest.approx(1 - float(left.square().sum() / y.square().sum()), abs=2e-3)
    replayed = apply_recipe(model, plan.recipe)
    assert read(replayed.apart).groups == 2
    with pytest.raises(NormswapError, match="batches is empty"):
        plan_groups(model, [])


@pytest.mark.parametrize("inplace", [False, True])
def test_convert_and_calibrate(inplace: bool, caplog: Any) -> None:
    original = settled(Network(), data())
    expected = convert(original, "layer")
    report = calibrate(expected, original, data())
    before = picture(original)
    with caplog.at_level("INFO", "normswap"):
        model = convert(original, "layer", calibration=iter(data()), inplace=inplace)
    assert str(report) in caplog.messages
    assert (model is original) == inplace
    assert (before.differences(original) == []) != inplace
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_convert_takes_all_back_when_calibration_fails() -> None:
    original = settled(Network(), data())
    before = picture(original)
    with pytest.raises(NormswapError, match="batches is empty"):
        convert(original, "layer", calibration=[], inplace=True)
    assert before.differences(original) == []


def test_convert_with_groups_by_measurement() -> None:
    original = settled(Network(), data())
    plan = plan_convert(original, groups="auto", calibration=iter(data()))
    assert [change.target.groups for change in plan.changes] == [
        change.target.groups for change in plan_groups(original, data()).changes
    ]
    model = convert(original, groups="auto", calibration=data())
    assert [read(model.norm1).groups, read(model.norm2).groups] == [c.target.groups for c in plan.changes]
    expected, _ = apply_calibrated(plan, data())
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


AUTO: list[tuple[dict[str, Any], str]] = [
    ({"groups": "auto"}, "pass calibration=batches"),
    ({"groups": "auto", "calibration": iter([])}, "groups='auto' goes over them again"),
    ({"to": "layer", "groups": "auto", "calibration": []}, "goes with no other option, given to='layer'"),
    ({"channels_per_group": 4, "groups": "auto", "calibration": []}, "given channels_per_group"),
]


@pytest.mark.parametrize(("arguments", "told"), AUTO, ids=[case[1] for case in AUTO])
def test_misuse_of_groups_by_measurement(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(NormswapError, match=told):
        convert(settled(Network(), data()), **arguments)


def test_a_plan_alone_is_not_calibrated() -> None:
    with pytest.raises(NormswapError, match="calibrate the converted model"):
        plan_convert(Network(), calibration=data())
