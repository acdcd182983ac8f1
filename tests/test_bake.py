"""Layers that compute their weight: made plain where they absorb a norm, left with a reason where something is not
known, and put back bit for bit."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm

import normswap
import tests.zoo.schemas  # noqa: F401  before timm
from normswap.engine.dataflow import Dataflow
from normswap.engine.search import Options, Search
from normswap.errors import NormswapError, Refusal
from normswap.fold import bake
from normswap.fold.affine import Affine
from normswap.graph.references import references
from tests.support import picture
from tests.test_fold import image, randomised, same

# isort: split
from timm.layers import Conv2dSame, ScaledStdConv2d, std_conv

Style = Callable[[nn.Module], nn.Module]


def old_weight_norm(module: nn.Module, dim: int | None = 0) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        WeightNorm.apply(module, "weight", dim)  # type: ignore[arg-type]
    with torch.no_grad():
        module.weight_g.mul_(torch.linspace(0.5, 2, module.weight_g.numel()).reshape(module.weight_g.shape))
    return module


def weight_norm(module: nn.Module, dim: int | None = 0) -> nn.Module:
    parametrizations.weight_norm(module, dim=dim)
    gain: Any = module.parametrizations.weight.original0
    with torch.no_grad():
        gain.mul_(torch.linspace(0.5, 2, gain.numel()).reshape(gain.shape))
    return module


def scaled(style: Style) -> Style:
    """Spectral norms give a weight of norm one, however the original is scaled."""

    def make(module: nn.Module) -> nn.Module:
        with torch.no_grad():
            module.weight.mul_(7)
        return style(module)

    return make


def pruned(module: nn.Module) -> nn.Module:
    return prune.l1_unstructured(module, "weight", amount=0.3)


def pruned_twice(module: nn.Module) -> nn.Module:
    prune.random_unstructured(module, "weight", amount=0.2)
    prune.ln_structured(module, "weight", amount=1, n=2, dim=1)
    if getattr(module, "bias", None) is not None:
        prune.random_unstructured(module, "bias", amount=1)
    return module


def stacked(module: nn.Module) -> nn.Module:
    return parametrizations.spectral_norm(weight_norm(module))


STYLES: dict[str, tuple[Style, str]] = {
    "weight norm": (weight_norm, "weight norm"),
    "weight norm over inputs": (lambda m: weight_norm(m, 1), "weight norm"),
    "weight norm over all": (lambda m: weight_norm(m, None), "weight norm"),
    "spectral norm": (scaled(parametrizations.spectral_norm), "spectral norm"),
    "orthogonal": (parametrizations.orthogonal, "orthogonal parametrization"),
    "cayley": (lambda m: parametrizations.orthogonal(m, orthogonal_map="cayley"), "orthogonal parametrization"),
    "stacked": (stacked, "weight norm and spectral norm"),
    "old weight norm": (old_weight_norm, "weight norm"),
    "old weight norm over all": (lambda m: old_weight_norm(m, None), "weight norm"),
    "old spectral norm": (scaled(old_spectral_norm), "spectral norm"),
    "pruned": (pruned, "pruning mask"),
    "pruned twice": (pruned_twice, "pruning mask"),
}
PLAIN: dict[str, tuple[Callable[[bool], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda bias: nn.Conv1d(4, 6, 3, bias=bias), lambda: nn.BatchNorm1d(6), (2, 4, 7)),
    "conv2d": (
        lambda bias: nn.Conv2d(4, 6, 3, groups=2, padding=1, bias=bias),
        lambda: nn.BatchNorm2d(6),
        (2, 4, 6, 5),
    ),
    "transposed": (
        lambda bias: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=bias),
        lambda: nn.BatchNorm2d(6),
        (2, 4, 5, 4),
    ),
    "linear": (lambda bias: nn.Linear(4, 6, bias=bias), lambda: nn.BatchNorm1d(6), (5, 4)),
}


def network(style: str, layer: str = "conv2d", *, bias: bool = True) -> tuple[nn.Module, Tensor]:
    """Layer, norm, activation; and an input."""
    torch.manual_seed(0)
    make, norm, shape = PLAIN[layer]
    model = randomised(nn.Sequential(STYLES[style][0](make(bias)), norm(), nn.ReLU()))
    x = image(*shape)
    model(x)  # hooks compute the weight in float64 now
    return model, x


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("layer", PLAIN)
@pytest.mark.parametrize("style", STYLES)
def test_a_layer_is_made_plain_and_folds(style: str, layer: str, bias: bool) -> None:
    model, x = network(style, layer, bias=bias)
    plain = type(PLAIN[layer][0](bias))
    before = picture(model)
    plan = normswap.plan_fold(model, example_inputs=(x,))
    assert before.differences(model) == []
    (change,) = plan.changes
    assert change.into == ("0",)
    assert change.notes == (f"bakes the {STYLES[style][1]} of 0",)
    folded = plan.apply()
    same(model, folded, x)
    assert type(folded[0]) is plain
    assert list(folded.state_dict()) == ["0.weight", "0.bias"]
    assert isinstance(folded[0].weight, nn.Parameter)
    assert folded[0].weight.requires_grad
    assert not folded[0]._forward_pre_hooks
    for other in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        assert torch.equal(other(x), folded(x))


@pytest.mark.parametrize("layer", PLAIN)
@pytest.mark.parametrize("style", STYLES)
def test_undo_restores_every_bit(style: str, layer: str) -> None:
    model, x = network(style, layer)
    expected, before = model(x), picture(model)
    plan = normswap.plan_fold(model, example_inputs=(x,))
    plan.apply(inplace=True)
    assert type(model[0]) is type(PLAIN[layer][0](True))
    plan.undo()
    assert before.differences(model) == []
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("style", STYLES)
def test_recipe_lets_a_folded_checkpoint_load_again(style: str) -> None:
    model, x = network(style)
    plan = normswap.plan_fold(model)
    folded = plan.apply()
    fresh = normswap.apply_recipe(network(style)[0], plan.recipe)
    assert list(fresh.state_dict()) == list(folded.state_dict())
    fresh.load_state_dict(folded.state_dict(), strict=True)
    assert torch.equal(fresh(x), folded(x))


def test_recipe_bakes_the_layers_that_the_plan_baked_and_no_others() -> None:
    """A fresh norm has no shift, which folds into more layers than one that was trained."""

    def model() -> nn.Module:
        first, last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 3, padding=1)
        middle = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4))
        return nn.Sequential(pruned(first), middle, weight_norm(last)).double().eval()

    trained, x = randomised(model(), shift=False), image(2, 3, 5, 5)
    plan = normswap.plan_fold(trained)
    assert plan.changes[0].into == ("2",)
    recipe = plan.recipe
    assert recipe["steps"][0]["layers"] == [{"name": "2", "bias": True, "baked": True}]
    fresh = normswap.apply_recipe(model(), recipe)
    fresh.load_state_dict(plan.apply().state_dict(), strict=True)
    same(trained, fresh, x)
    assert "weight_orig" in dict(fresh[0].named_parameters())
    recipe["steps"][0]["layers"] = [{"name": "0", "bias": True, "baked": True}]
    with pytest.raises(NormswapError, match="weight norm of 2"):
        normswap.apply_recipe(model(), recipe)


@pytest.mark.parametrize("style", STYLES)
def test_nothing_is_baked_where_nothing_folds(style: str) -> None:
    model, x = network(style)
    model.insert(1, nn.ReLU())
    plan = normswap.plan_fold(model)
    assert plan.changes[0].to == "affine"
    folded = plan.apply()
    assert type(folded[0]).__name__ == type(model[0]).__name__
    assert list(folded[0].state_dict()) == list(model[0].state_dict())
    same(model, folded, x)


def test_a_layer_between_two_norms_is_baked_once() -> None:
    torch.manual_seed(0)
    layer = weight_norm(nn.Conv2d(3, 4, 3))
    model = randomised(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), layer, nn.BatchNorm2d(4)))
    plan = normswap.plan_fold(model)
    assert [change.into for change in plan.changes] == [("2",), ("2",)]
    assert sorted(change.notes for change in plan.changes) == [(), ("bakes the weight norm of 2",)]
    x, before = image(2, 3, 6, 6), picture(model)
    same(model, plan.apply(), x)
    plan = normswap.plan_fold(model)
    plan.apply(inplace=True)
    plan.undo()
    assert before.differences(model) == []


# --- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("style", ["weight norm", "old weight norm", "pruned"])
def test_type_memory_format_and_flag_are_kept(style: str, dtype: torch.dtype) -> None:
    model, _ = network(style)
    model = model.to(dtype).to(memory_format=torch.channels_last).requires_grad_(False)
    folded = normswap.fold(model)
    assert folded[0].weight.dtype == dtype
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not folded[0].weight.requires_grad


@pytest.mark.parametrize("style", STYLES)
def test_the_baked_value_is_the_one_the_layer_computes(style: str) -> None:
    model, _ = network(style)
    wanted = model[0].weight.detach().clone()
    restore = bake.bake(model[0])
    torch.testing.assert_close(model[0].weight.detach(), wanted, rtol=1e-13, atol=1e-13)
    restore()
    torch.testing.assert_close(model[0].weight.detach(), wanted, rtol=0, atol=0)


def test_hooks_that_do_not_compute_stay_and_can_be_removed() -> None:
    model, _ = network("old spectral norm")
    saved: list[str] = []
    handle = model[0].register_state_dict_post_hook(lambda *_: saved.append("saved"))
    pruning = prune.random_unstructured(model[0], "bias", amount=1)._forward_pre_hooks
    plan = normswap.plan_fold(model)
    assert plan.changes[0].notes == ("bakes the spectral norm and pruning mask of 0",)
    plan.apply(inplace=True)
    model[0].state_dict()
    assert saved == ["saved"]
    late = model[0].register_forward_pre_hook(lambda *_: None)
    plan.undo()
    assert model[0]._forward_pre_hooks is pruning
    assert len(pruning) == 3
    late.remove()
    handle.remove()
    assert len(pruning) == 2
    prune.remove(model[0], "bias")
    assert len(pruning) == 1


def test_a_plan_copies_a_layer_whose_hook_left_a_computed_weight() -> None:
    """torch does not copy a tensor with a history."""
    model, x = network("pruned")
    assert model[0].weight.grad_fn is not None
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model[0])
    same(model, normswap.fold(model), x)


def test_spectral_vectors_are_not_iterated() -> None:
    for style in ("spectral norm", "old spectral norm"):
        model, x = network(style)
        before = picture(model)
        for plan in (normswap.plan_fold(model), normswap.plan_fold(model, example_inputs=(x,))):
            plan.apply()
        normswap.plan_fold(model.train())
        model.eval()
        assert before.differences(model) == []


def test_overflow_is_judged_by_the_weight_that_the_layer_computes() -> None:
    layer = parametrizations.weight_norm(nn.Conv2d(2, 2, 1))
    model = nn.Sequential(layer, nn.BatchNorm2d(2)).eval().half()
    stored: Any = model[0].parametrizations.weight
    stored.original0.data.fill_(60000.0)
    stored.original1.data.fill_(0.01)
    model[1].weight.data.fill_(2.0)
    plan = normswap.plan_fold(model)
    assert plan.changes[0].notes[0].startswith("backward: the folded weights of 0 may not be finite in float16")
    stored.original0.data.fill_(0.01)
    stored.original1.data.fill_(60000.0)
    assert normswap.plan_fold(model).changes[0].into == ("0",)


def test_an_error_while_applying_leaves_the_model_as_it_was() -> None:
    for style in ("weight norm", "old weight norm", "pruned twice"):
        model, _ = network(style)
        plan = normswap.plan_fold(model)
        steps = plan.changes[0].fold.steps
        infinite = Affine(steps[0].affine.scale * float("inf"), steps[0].affine.shift)
        object.__setattr__(steps[0], "affine", infinite)
        before = picture(model)
        with pytest.raises(NormswapError, match="not finite in float64"):
            plan.apply(inplace=True)
        assert before.differences(model) == []


def test_a_layer_that_changed_since_the_plan_is_an_error() -> None:
    model, _ = network("weight norm")
    plan = normswap.plan_fold(model)
    parametrize.register_parametrization(model[0], "weight", Doubled())
    before = picture(model)
    with pytest.raises(NormswapError, match="1 into 0: its weight is parametrized by Doubled, which is not known"):
        plan.apply(inplace=True)
    assert before.differences(model) == []


# --- left alone ------------------------------------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class OwnMask(prune.RandomUnstructured):
    def apply_mask(self, module: nn.Module) -> Tensor:
        return super().apply_mask(module) * 2


def watching(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
    return None


def _unknown(conv: nn.Module) -> None:
    parametrize.register_parametrization(conv, "weight", Doubled())


def _unknown_on_top(conv: nn.Module) -> None:
    weight_norm(conv)
    parametrize.register_parametrization(conv, "weight", Doubled())


def _unknown_bias(conv: nn.Module) -> None:
    weight_norm(conv)
    parametrize.register_parametrization(conv, "bias", Doubled())


def _own_mask(conv: nn.Module) -> None:
    OwnMask.apply(conv, "weight", amount=0.2)


def _another_hook(conv: nn.Module) -> None:
    pruned(conv)
    conv.register_forward_hook(watching)


def _hook_inside(conv: nn.Module) -> None:
    weight_norm(conv)
    conv.parametrizations.weight.register_forward_hook(watching)


def _pruned_direction(conv: nn.Module) -> None:
    old_weight_norm(conv)
    prune.random_unstructured(conv, "weight_v", amount=0.2)


def _zero_direction(conv: nn.Module) -> None:
    weight_norm(conv)
    conv.parametrizations.weight.original1.data[0] = 0


def _training(conv: nn.Module) -> None:
    parametrizations.spectral_norm(conv).train()


def _old_training(conv: nn.Module) -> None:
    old_spectral_norm(conv).train()


LEFT: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "unknown": (_unknown, "its weight is parametrized by Doubled, which is not known"),
    "unknown on top": (_unknown_on_top, "its weight is parametrized by Doubled, which is not known"),
    "unknown bias": (_unknown_bias, "its bias is parametrized by Doubled, which is not known"),
    "own mask": (_own_mask, "hooks (OwnMask)"),
    "another hook": (_another_hook, "hooks (watching)"),
    "hook inside": (_hook_inside, "the parametrization of its weight has hooks"),
    "pruned direction": (_pruned_direction, "its weight_v is no parameter, which its weight norm needs"),
    "zero direction": (_zero_direction, "the weight norm gives values that are not finite"),
    "spectral norm in train mode": (_training, "the spectral norm of its weight is in train mode"),
    "old spectral norm in train mode": (_old_training, "the spectral norm of its weight is in train mode"),
}


@pytest.mark.parametrize("name", LEFT)
def test_is_left(name: str) -> None:
    change, reason = LEFT[name]
    torch.manual_seed(0)
    model = randomised(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    change(model[0])
    before = picture(model)
    plan = normswap.plan_fold(model)
    assert plan.changes[0].to == "affine"
    assert reason in plan.changes[0].notes[0]
    plan.apply(inplace=True)
    plan.undo()
    assert before.differences(model) == []


class Pair(nn.Module):
    """Two layers of the same style, one before a norm."""

    def __init__(self, style: Style) -> None:
        super().__init__()
        self.conv, self.norm, self.other = style(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3), style(nn.Conv2d(3, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.other(torch.relu(self.norm(self.conv(x)))) + self.extra()

    def extra(self) -> Any:
        return 0


def _shares_direction(pair: Any) -> None:
    pair.other.parametrizations.weight.original1 = pair.conv.parametrizations.weight.original1


def _shares_old_direction(pair: Any) -> None:
    pair.other.weight_v = pair.conv.weight_v


def _shares_original(pair: Any) -> None:
    pair.other.weight_orig = pair.conv.weight_orig


def _shares_std(pair: Any) -> None:
    pair.other.gain = pair.conv.gain


def scaled_std(module: nn.Module) -> nn.Module:
    return ScaledStdConv2d(module.in_channels, module.out_channels, 3)


@pytest.mark.parametrize(
    ("style", "share"),
    [
        (weight_norm, _shares_direction),
        (old_weight_norm, _shares_old_direction),
        (pruned, _shares_original),
        (old_spectral_norm, _shares_original),
        (scaled_std, _shares_std),
    ],
)
def test_shared_tensors_are_left(style: Style, share: Callable[[Any], None]) -> None:
    model = randomised(Pair(style))
    share(model)
    for example in (None, (image(1, 3, 4, 4),)):
        notes = normswap.plan_fold(model, example_inputs=example).changes[0].notes
        assert "conv shares its weight with other" in notes[0]


class ReadsGain(Pair):
    def extra(self) -> Any:
        return self.conv.weight_g.sum()


class ReadsOriginal(Pair):
    def extra(self) -> Any:
        return self.conv.parametrizations.weight.original0.sum()


class ReadsWeight(Pair):
    def extra(self) -> Any:
        return self.conv.weight.sum()


class ReadsMask(Pair):
    def extra(self) -> Any:
        return self.conv.weight_mask.sum()


class ReadsInALoop(Pair):
    def extra(self) -> Any:
        return sum(layer.weight_g.sum() for layer in (self.conv, self.other))


class Asks(Pair):
    def extra(self) -> Any:
        return 0 if hasattr(self.conv, "weight_v") else 1


class AsksForTheClass(Pair):
    def extra(self) -> Any:
        return int(isinstance(self.conv, ScaledStdConv2d))


@pytest.mark.parametrize(
    ("cls", "style"),
    [
        (ReadsGain, old_weight_norm),
        (ReadsOriginal, weight_norm),
        (ReadsWeight, weight_norm),
        (ReadsWeight, pruned),
        (ReadsMask, pruned),
        (ReadsInALoop, old_weight_norm),
        (Asks, old_weight_norm),
    ],
)
@pytest.mark.parametrize("observed", [False, True])
def test_tensors_that_are_read_are_left(cls: type[Pair], style: Style, observed: bool) -> None:
    torch.manual_seed(0)
    model, x = randomised(cls(style)), image(2, 3, 4, 4)
    with torch.no_grad():
        model(x)
    plan = normswap.plan_fold(model, example_inputs=(x,) if observed else None)
    assert plan.changes[0].to == "affine"
    assert any(word in plan.changes[0].notes[0] for word in ("read directly", "reads its", "asks for"))
    same(model, plan.apply(), x)


class Untraceable(nn.Module):
    """A root that reads what computes a weight of its block, in code that no graph shows."""

    def __init__(self, style: Style, name: str) -> None:
        super().__init__()
        self.conv, self.norm, self.style = style(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3), name
        self.block = nn.Sequential(self.conv, self.norm)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e30:
            return x
        out = self.block(x)
        if self.style == "gain":
            return out + self.conv.weight_g.sum()
        if self.style == "stack":
            return out + self.conv.parametrizations.weight.original0.sum()
        return out


@pytest.mark.parametrize(("style", "name"), [(old_weight_norm, "gain"), (weight_norm, "stack")])
def test_reads_by_code_that_cannot_be_traced(style: Style, name: str) -> None:
    model, x = randomised(Untraceable(style, name)), image(2, 3, 4, 4)
    for example in (None, (x,)):
        plan = normswap.plan_fold(model, example_inputs=example)
        assert not any(change.into for change in plan.changes)
        with torch.no_grad():
            same(model, plan.apply(), x)
    search = Search(Dataflow(model, found := references(model)), found, Options())
    reason = search._why_unfit(model.conv)
    assert reason in ("the code around conv reads its weight_g", "the code around conv reads its parametrizations")


# --- weight standardization ------------------------------------------------------------------------------------------


STANDARDIZING = ["StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"]


def std_network(name: str, **settings: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = getattr(std_conv, name)(4, 6, 3, **settings)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return randomised(nn.Sequential(layer, nn.BatchNorm2d(6), nn.ReLU())), image(2, 4, 8, 7)


@pytest.mark.parametrize("settings", [{}, {"stride": 2, "groups": 2}, {"bias": True}, {"bias": False, "dilation": 2}])
@pytest.mark.parametrize("name", STANDARDIZING)
def test_standardizing_layers_become_plain(name: str, settings: dict[str, Any]) -> None:
    model, x = std_network(name, **settings)
    before = picture(model)
    plan = normswap.plan_fold(model)
    assert plan.changes[0].notes == ("bakes the weight standardization of 0",)
    folded = plan.apply()
    same(model, folded, x)
    pads = "Same" in name and model[0].same_pad
    assert type(folded[0]) is (Conv2dSame if pads else nn.Conv2d)
    assert list(folded.state_dict()) == ["0.weight", "0.bias"]
    same(folded, pickle.loads(pickle.dumps(folded)), x)
    fresh = normswap.apply_recipe(std_network(name, **settings)[0], plan.recipe)
    fresh.load_state_dict(folded.state_dict(), strict=True)
    same(model, fresh, x)
    plan = normswap.plan_fold(model, example_inputs=(x,))
    plan.apply(inplace=True)
    same(folded, model, x)
    plan.undo()
    assert before.differences(model) == []


def test_same_padding_that_is_static_becomes_a_plain_convolution() -> None:
    model, x = std_network("StdConv2dSame")
    assert not model[0].same_pad
    assert type(normswap.fold(model)[0]) is nn.Conv2d
    dynamic, x = std_network("StdConv2dSame", stride=2)
    assert dynamic[0].same_pad
    front = randomised(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), dynamic[0]))
    assert "pads with zeros" in normswap.plan_fold(front).changes[0].notes[0]
    without = randomised(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), dynamic[0]), shift=False)
    assert normswap.plan_fold(without).changes[0].into == ("2",)
    same(without, normswap.fold(without), x)


def test_a_plain_subclass_is_baked_and_one_with_its_own_forward_is_left() -> None:
    class Renamed(ScaledStdConv2d):
        def __init__(self) -> None:
            super().__init__(4, 6, 3, gamma=1.7)

    class Own(Renamed):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) ** 2

    for cls, folds in ((Renamed, True), (Own, False)):
        model, x = randomised(nn.Sequential(cls(), nn.BatchNorm2d(6))), image(2, 4, 6, 6)
        plan = normswap.plan_fold(model)
        assert bool(plan.changes[0].into) == folds
        assert folds or "forward of its own" in plan.changes[0].notes[0]
        same(model, plan.apply(), x)


def test_code_that_asks_for_the_standardizing_class_is_heeded() -> None:
    model = randomised(AsksForTheClass(scaled_std))
    x = image(2, 3, 6, 6)
    plan = normswap.plan_fold(model)
    assert "asks for" in plan.changes[0].notes[0]
    same(model, plan.apply(), x)


def test_a_parametrized_standardizing_layer_is_baked_of_both() -> None:
    model, x = std_network("ScaledStdConv2d")
    parametrizations.weight_norm(model[0], dim=1)
    before = picture(model)
    plan = normswap.plan_fold(model)
    assert plan.changes[0].notes == ("bakes the weight norm and weight standardization of 0",)
    same(model, plan.apply(), x)
    plan.apply(inplace=True)
    assert type(model[0]) is nn.Conv2d
    plan.undo()
    assert before.differences(model) == []


@pytest.mark.parametrize(("attribute", "value"), [("padding_mode", "circular"), ("padding", (1, 1))])
def test_settings_that_the_plain_class_takes_otherwise_are_left(attribute: str, value: Any) -> None:
    model, _ = std_network("StdConv2dSame", stride=2)
    setattr(model[0], attribute, value)
    with pytest.raises(Refusal):
        bake.computed(model[0])
    assert normswap.plan_fold(model).changes[0].to == "affine"
