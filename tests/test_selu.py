"""Self-normalizing networks: which activations and dropouts change, which stay and why, what layers are drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
import tests.zoo.schemas  # noqa: F401  before torchvision and timm
from normswap import convert, plan_convert
from tests.support import distance, randomise, sample
from tests.test_weights import check, names, reasons

# isort: split
import timm
import torchvision


class Block(nn.Module):
    """A residual block whose activation is one object called twice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(out)) + x)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.PReLU(), nn.Dropout2d(0.1),
        Block(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3),
        nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.4), nn.Linear(4, 2), nn.Softmax(1),
    ).double()  # fmt: skip


X = sample(2, 3, 10, 10)


def test_norms_go_and_what_stands_behind_them_changes() -> None:
    model = randomise(network()).eval()
    plan, new = check(model, "selu", X)
    norms, layers = ["1", "5.bn1", "5.bn2"], ["0", "5.conv1", "5.conv2"]
    swapped = {"3": "retrain", "5.act": "retrain", "4": "exact", "8": "exact"}
    assert names(plan) == dict.fromkeys(norms, "retrain") | dict.fromkeys(layers, "exact") | swapped
    assert reasons(plan) == {
        "10": "it does not stand behind a norm that goes",
        "11": "it does not stand behind an activation that becomes SELU",
    }
    assert [type(new[i]) for i in (3, 4, 8, 10, 11)] == [
        nn.SELU, nn.FeatureAlphaDropout, nn.AlphaDropout, nn.ReLU, nn.Dropout,
    ]  # fmt: skip
    assert (new[4].p, new[8].p) == (0.1, 0.3)
    assert new[5].act.inplace
    lost = {change.name: change.lost for change in plan.changes}
    assert (lost["3"], lost["5.act"]) == (("weight",), ())
    for name in layers:
        assert torch.equal(new.get_submodule(name).weight, model.get_submodule(name).weight)
        assert bool((new.get_submodule(name).bias == 0).all())
    inner = new[5]
    first = F.selu(F.max_pool2d(F.conv2d(X, model[0].weight), 2))
    hidden = F.selu(F.conv2d(first, inner.conv1.weight, padding=1))
    out = F.selu(F.conv2d(hidden, inner.conv2.weight, padding=1) + first)
    assert distance(new[:6](X), out) < 1e-10
    assert bool(new.train()(X).isfinite().all())


def test_reset_draws_lecun_weights_for_the_layers_in_front() -> None:
    wide = nn.Sequential(nn.Linear(400, 300), nn.BatchNorm1d(300), nn.ReLU(), nn.Linear(300, 200)).double()
    model = nn.Sequential(wide, nn.ConvTranspose2d(64, 30, 4, stride=2, groups=2), nn.BatchNorm2d(30)).double()
    plan = plan_convert(model, "selu", init="reset", seed=3)
    state = torch.get_rng_state()
    new = plan.apply()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(new[0][0].weight, convert(model, "selu", init="reset", seed=3)[0][0].weight)
    assert not torch.equal(new[0][0].weight, convert(model, "selu", init="reset")[0][0].weight)
    assert bool((new[0][0].bias == 0).all())
    assert abs(float(new[0][0].weight.detach().var()) * 400 - 1) < 0.02
    assert abs(float(new[1].weight.detach().var()) * (32 * 16 / 4) - 1) < 0.05
    assert torch.equal(new[0][3].weight, model[0][3].weight), "a layer with no norm behind it keeps its weights"
    x = torch.randn(2000, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = new[0][:3](x).detach()
    assert abs(float(out.mean())) < 0.05
    assert abs(float(out.var()) - 1) < 0.1


class Uses(nn.Module):
    """A conv, a norm and what a function of them and more makes of it."""

    def __init__(self, use: Callable[..., Tensor], act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.norm, self.use = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), use
        self.act = nn.ReLU() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


STAYING: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "called elsewhere too": (
        lambda: Uses(lambda m, x: m.act(m.norm(m.conv(m.act(x))))),
        "act",
        "it is called elsewhere too, where it does not stand behind a norm",
    ),
    "a gate": (lambda: Uses(lambda m, x: m.act(m.norm(m.conv(x))) * x, nn.Sigmoid()), "act", "Sigmoid bounds"),
    "a function": (lambda: Uses(lambda m, x: F.relu(m.norm(m.conv(x)))), "relu", "relu: it is a function"),
    "a method": (lambda: Uses(lambda m, x: (m.norm(m.conv(x)) + x).relu()), "relu", "relu: it is a function"),
    "not reached": (lambda: Uses(lambda m, x: m.norm(m.conv(m.act(x)))), "act", "does not stand behind a norm"),
}


@pytest.mark.parametrize("name", STAYING)
def test_what_stays_has_a_reason(name: str) -> None:
    make, part, words = STAYING[name]
    plan = plan_convert(make(), "selu")
    assert list(names(plan)) == ["norm"]
    assert words in reasons(plan)[part]


def test_a_norm_that_stays_keeps_its_activation() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    plan = plan_convert(model, "selu", skip="1")
    assert not plan.changes
    assert reasons(plan) == {"1": "excluded by skip", "2": "it does not stand behind a norm that goes"}
    plan = plan_convert(model, "selu", init="preserve")
    assert not plan.changes
    assert "preserve" in reasons(plan)["1"]


def test_parts_are_left_out_by_name_alone() -> None:
    model = network()
    plan = plan_convert(model, "selu", skip=["3", "8", "0"])
    assert [reasons(plan)[name] for name in ("3", "8", "0")] == ["excluded by skip"] * 3
    plan = plan_convert(model, "selu", where="5.*")
    assert set(names(plan)) == {"5.bn1", "5.bn2", "5.act", "5.conv1", "5.conv2", "8"}
    assert set(names(plan_convert(model, "selu", where=lambda _name, norm: norm.kind == "batch"))) >= {
        "3",
        "5.act",
        "8",
    }


def test_an_activation_that_a_norm_that_stays_has_too_stays() -> None:
    act = nn.ReLU()
    model = nn.Sequential(*(timm.layers.BatchNormAct2d(3, act_layer=lambda inplace: act) for _ in range(2)))
    assert model[0].act is model[1].act
    plan = plan_convert(model, "selu", skip="1")
    assert "a norm that stays has it too" in reasons(plan)["0.act"]
    assert set(names(plan_convert(model, "selu"))) == {"0", "1", "0.act"}


def test_hooks_of_an_activation_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    seen: list[Any] = []
    model[2].register_forward_hook(lambda module, _args, _out: seen.append(type(module)))
    new = convert(model, "selu")
    new(torch.randn(1, 3, 2, 2))
    assert seen == [nn.SELU]


def test_a_layer_that_computes_its_weight_is_not_drawn() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1))
    plan = plan_convert(nn.Sequential(layer, nn.BatchNorm2d(3), nn.ReLU()), "selu", init="reset")
    assert "by weight norm" in reasons(plan)["0"]
    assert set(names(plan)) == {"1", "2"}


def test_activations_inside_norms() -> None:
    model = randomise(timm.create_model("regnetx_002").double()).eval()
    plan, new = check(model, "selu", sample(1, 3, 32, 32), init="reset")
    assert not plan.skips
    assert isinstance(new.stem.bn.act, nn.SELU)
    assert not normswap.find(new)
    assert not any(isinstance(module, nn.ReLU) for module in new.modules())


@pytest.mark.parametrize("to", ["weight_norm", "spectral_norm", "weight_standardized", "selu"])
@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_real_models_end_to_end(name: str, to: str) -> None:
    made = torchvision.models.resnet18() if name == "torchvision" else timm.create_model("mobilenetv3_small_050")
    model = randomise(made.double()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(parameter[0].numel() ** -0.5)
    x = sample(1, 3, 32, 32)
    plan = plan_convert(model, to)
    assert not [skip for skip in plan.skips if skip.norm is not None and skip.norm.kind == "batch"]
    new = plan.apply()
    assert type(new) is type(model)
    with torch.no_grad():
        out = new(x)
        assert bool(out.isfinite().all())
        if to == "weight_norm":
            assert {change.exactness for change in plan.changes} == {"exact"}
            assert distance(out, model(x)) < 1e-9
        back = convert(new, "plain") if to != "selu" else new
        assert distance(back(x), out) < 1e-9
    if to == "selu" and name == "torchvision":
        assert not plan.skips
