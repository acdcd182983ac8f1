"""Weight standardization: the layers against the formula and timm's, the conversion, folding, export."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.nn import functional as F

import normswap
import tests.zoo.schemas  # noqa: F401  before timm
from normswap import convert, fold, plan_convert
from normswap.fold import bake
from normswap.norms.weight_standardized import (
    FORMS,
    StandardizedConv1d,
    StandardizedConv2d,
    StandardizedConv3d,
    standardized,
)
from tests.support import DOUBLE, check_copies, distance, randomise, sample
from tests.test_weights import X, check, names, network, reasons

# isort: split
from timm.layers import ScaledStdConv2d, StdConv2d

LAYERS = {
    "1d": (lambda **o: StandardizedConv1d(4, 6, 3, groups=2, **o), (2, 4, 7), F.conv1d),
    "2d": (lambda **o: StandardizedConv2d(4, 6, 3, **o), (2, 4, 5, 5), F.conv2d),
    "3d": (lambda **o: StandardizedConv3d(4, 2, 2, bias=False, **o), (2, 4, 3, 3, 3), F.conv3d),
}


def formula(weight: Tensor, eps: float, gain: Tensor | None) -> Tensor:
    """Kernel by kernel, by Python's sums."""
    out = torch.empty_like(weight)
    for channel, kernel in enumerate(weight.detach()):
        values = kernel.flatten().tolist()
        mean = sum(values) / len(values)
        deviation = (sum((v - mean) ** 2 for v in values) / len(values) + eps) ** 0.5
        factor = 1.0 if gain is None else float(gain.detach()[channel])
        out[channel] = out.new_tensor([factor * (v - mean) / deviation for v in values]).reshape(kernel.shape)
    return out


def test_reset_parameters_resets_the_gain() -> None:
    with torch.device("meta"):
        layer = StandardizedConv2d(3, 4, 3, gain=True)
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(7)
    layer.reset_parameters()
    assert torch.equal(layer.gain, torch.ones(4))
    assert layer.weight.std() > 0


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_compute_the_formula(name: str, gain: bool) -> None:
    make, shape, function = LAYERS[name]
    layer, x = randomise(make(eps=1e-3, gain=gain).double()), sample(*shape)
    weight = formula(layer.weight, 1e-3, layer.gain if gain else None)
    assert distance(layer(x), function(x, weight, layer.bias, groups=layer.groups)) < 1e-10
    parameters = dict(layer.named_parameters())
    assert ("gain" in parameters) == gain

    def call(x: Tensor, *tensors: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(parameters, tensors, strict=True)), (x,))

    assert gradcheck(call, (x.requires_grad_(), *parameters.values()))
    check_copies(layer, x.detach())
    assert "eps=0.001" in str(layer)


def test_a_large_mean_does_not_cancel() -> None:
    weight = 1e4 + 1e-2 * sample(3, 50)
    exact = standardized(weight, 1e-5)
    assert distance(standardized(weight.float().double(), 1e-5), formula(weight.float().double(), 1e-5, None)) < 1e-10
    assert abs(float(exact.mean())) < 1e-9
    low = standardized(sample(3, 50).bfloat16(), 1e-5)
    assert low.dtype == torch.bfloat16
    assert distance(low, formula(sample(3, 50).bfloat16().double(), 1e-5, None)) < 1e-2


def test_it_is_what_timm_computes() -> None:
    x = sample(2, 3, 6, 6)
    for theirs in (StdConv2d(3, 4, 3, padding=1, bias=True), ScaledStdConv2d(3, 4, 3, padding=1)):
        randomise(theirs.double())
        ours = StandardizedConv2d(3, 4, 3, padding=1, eps=theirs.eps, gain=hasattr(theirs, "gain")).double()
        state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
        if "gain" in state:
            state["gain"] = state["gain"].flatten() * theirs.scale
        ours.load_state_dict(state, strict=True)
        assert distance(ours(x), theirs(x)) < DOUBLE


class TestConversion:
    def test_convolutions_standardize_and_norms_become_group_norms(self) -> None:
        model = network()
        plan, new = check(model, "weight_standardized", X)
        assert {name: names(plan)[name] for name in ("features.0", "features.3")} == {
            "features.0": "approximate",
            "features.3": "approximate",
        }
        assert "transposed" in reasons(plan)["features.6"]
        assert "head" not in names(plan) | reasons(plan)
        assert [site.norm.kind for site in normswap.find(new) if site.norm] == ["group"] * 4
        assert type(new.features[0]) is StandardizedConv2d
        assert list(new.features[0].state_dict()) == ["weight"]
        x = X[:, :, :6, :6]
        wanted = F.conv2d(x, formula(model.features[0].weight, 1e-5, None))
        assert distance(new.features[0](x), wanted) < 1e-10

    def test_a_plain_checkpoint_loads(self) -> None:
        model = network()
        new = convert(model, "weight_standardized", companion="keep")
        new.load_state_dict(model.state_dict(), strict=True)

    def test_preserve_loses_the_means_alone(self) -> None:
        model = network()
        plan, new = check(model, "weight_standardized", X, init="preserve", companion="keep")
        kernel = model.features[0].weight.detach()
        kept = standardized(new.features[0].weight, 1e-5, new.features[0].gain).detach()
        assert distance(kept, kernel - kernel.mean((1, 2, 3), keepdim=True)) < DOUBLE
        assert "the mean of each kernel is lost" in plan.changes[0].notes[0]
        with torch.no_grad():
            for name in ("features.0", "features.3"):
                weight = model.get_submodule(name).weight
                weight -= weight.mean((1, 2, 3), keepdim=True)
        plan, new = check(model, "weight_standardized", X, init="preserve", companion="keep")
        assert set(names(plan).values()) == {"exact"}
        assert distance(new(X), model(X)) < DOUBLE

    def test_what_no_norm_or_gain_scales_must_be_trained_again(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        assert names(plan_convert(model, "weight_standardized")) == dict.fromkeys("0", "retrain") | dict.fromkeys(
            "23", "approximate"
        )
        assert names(plan_convert(model, "weight_standardized", gain=True))["0"] == "approximate"
        plan = plan_convert(model.eval(), "weight_standardized", companion="identity")
        assert set(names(plan).values()) == {"retrain"}

    def test_what_stays_has_a_reason(self) -> None:
        class Named(nn.Conv2d):
            pass

        plan = plan_convert(
            nn.Sequential(
                nn.Conv2d(4, 4, 1, groups=4), Named(4, 4, 3), StdConv2d(4, 4, 3), StandardizedConv2d(4, 4, 3)
            ),
            "weight_standardized",
        )
        assert not plan.changes
        assert "one element" in reasons(plan)["0"]
        assert "Named is a class of its own" in reasons(plan)["1"]
        assert "by weight standardization" in reasons(plan)["2"]
        assert "by weight standardization" in reasons(plan)["3"]
        words = {skip.name: skip.was for skip in plan.skips}
        assert words["2"] == words["3"] == "weight standardization of Conv2d(4, 4, 3x3)"

    def test_timms_layers_become_plain(self) -> None:
        model = randomise(nn.Sequential(ScaledStdConv2d(3, 4, 3), nn.GroupNorm(2, 4)).double())
        plan, new = check(model, "plain", X)
        assert names(plan) == {"0": "exact"}
        assert type(new[0]) is nn.Conv2d
        assert distance(new(X), model(X)) < DOUBLE

    def test_flags_of_the_gain_follow_the_weight(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3)).to(torch.bfloat16)
        model[0].weight.requires_grad_(False)
        layer = convert(model, "weight_standardized", gain=True)[0]
        assert layer.gain.dtype == torch.bfloat16
        assert not layer.gain.requires_grad


@pytest.mark.parametrize("name", LAYERS)
def test_folding_bakes_the_weight(name: str) -> None:
    make, shape, _ = LAYERS[name]
    layer = make(gain=True)
    norm = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)](layer.out_channels)
    model = randomise(nn.Sequential(layer, norm).double()).eval()
    folded = fold(model)
    assert type(folded[0]) is next(plain for plain, form in FORMS.items() if form is type(layer))
    assert distance(folded(sample(*shape)), model(sample(*shape))) < DOUBLE
    assert bake.computed(folded[0]) is None


def test_onnx_runtime_computes_the_same(tmp_path: Path) -> None:
    """All four kinds in one export."""
    parts = {
        "weight_standardized": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
        "weight_norm": nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
        "selu": nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten()),
        "spectral_norm": nn.Sequential(nn.Linear(16, 2)),
    }
    gain = {"weight_standardized": {"gain": True}}
    new = nn.Sequential(*(convert(randomise(part).eval(), to, **gain.get(to, {})) for to, part in parts.items())).eval()
    x = torch.randn(2, 3, 6, 6)
    normswap.export(new, tmp_path / "model.onnx", (x,))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert distance(torch.from_numpy(out), new(x)) < 1e-5


@pytest.mark.skipif(sys.platform == "win32", reason="the compiler is not there")
def test_compiles_without_a_graph_break() -> None:
    layer = randomise(StandardizedConv2d(3, 4, 3, gain=True))
    compiled = torch.compile(copy.deepcopy(layer), backend="eager", fullgraph=True)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(compiled(x), layer(x))
