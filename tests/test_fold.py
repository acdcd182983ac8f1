"""Folding: every layer rule, every passage with a case that folds and one that is left, every guard."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import normswap
import tests.zoo.schemas  # noqa: F401  before timm
from normswap.errors import NormswapError
from normswap.fold import layers
from normswap.fold.affine import Affine
from normswap.norms.affine import ChannelAffine
from normswap.norms.frozen import FrozenBatchNorm

with warnings.catch_warnings():  # torch.jit's, at import
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.fx.experimental.optimization import fuse

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def randomised(model: nn.Module, *, shift: bool = True, positive: bool = False) -> nn.Module:
    """Random statistics and affine in float64, in eval mode."""
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), Tensor):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)
            if isinstance(module.weight, Tensor):
                module.weight.data.normal_()
                module.bias.data.normal_()
            if positive:
                module.weight.data.abs_()
            if not shift:
                module.running_mean.zero_()
                module.bias.data.zero_()
    return model.double().eval()


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def same(model: nn.Module, folded: nn.Module, *inputs: Tensor) -> None:
    with torch.no_grad():
        ours, theirs = (m(*(x.clone() for x in inputs)) for m in (folded, model))
    assert float((ours - theirs).abs().max()) <= 1e-11 * max(1.0, float(theirs.abs().max()))


def batch_norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


# --- layer rules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("table", [CONVS, TRANSPOSED], ids=["conv", "transposed"])
@pytest.mark.parametrize("chunk", [7, layers._CHUNK])
def test_layers_absorb_on_both_sides(
    monkeypatch: pytest.MonkeyPatch, table: dict[int, Any], dims: int, groups: int, bias: bool, chunk: int
) -> None:
    monkeypatch.setattr(layers, "_CHUNK", chunk)
    module = table[dims](8, 12, 3, groups=groups, bias=bias, stride=2, dilation=2).double()
    layer = layers.describe(module)
    assert isinstance(layer, layers.Layer)
    shape = (-1, *[1] * dims)
    x = image(2, 8, *[9] * dims)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    scale, shift = image(12), image(12).neg()
    expected = module(x) * scale.reshape(shape) + shift.reshape(shape)
    restore = layers.absorb(module, layer, Affine(scale, shift), "output")
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)
    restore()
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())
    scale = image(8)
    shift = image(8).neg() if layer.shift_reaches_evenly else torch.zeros(8, dtype=torch.float64)
    expected = module(x * scale.reshape(shape) + shift.reshape(shape))
    layers.absorb(module, layer, Affine(scale, shift), "input")
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


def test_linear_absorbs_on_both_sides() -> None:
    module = nn.Linear(6, 4, bias=False).double()
    layer = layers.describe(module)
    assert isinstance(layer, layers.Layer)
    x, into, out = image(5, 6), Affine(image(6), image(6)), Affine(image(4), image(4).neg())
    expected = module(x * into.scale + into.shift) * out.scale + out.shift
    layers.absorb(module, layer, into, "input")
    layers.absorb(module, layer, out, "output")
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


def test_overflow_in_half_precision_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)).eval()
    model[0].weight.data.fill_(1000.0)
    model[1].running_var.fill_(1e-6)
    model = model.half()
    plan = normswap.plan_fold(model)
    assert "may not be finite in float16" in plan.changes[0].notes[0]
    assert torch.equal(plan.apply()[0].weight, model[0].weight)


def test_overflow_while_applying_puts_everything_back() -> None:
    model = pair()
    plan = normswap.plan_fold(model)
    steps = plan.changes[1].fold.steps
    affine = steps[0].affine
    steps[0] = replace(steps[0], affine=Affine(affine.scale * float("inf"), affine.shift))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NormswapError, match=r"4 into 3: the folded values are not finite in float64"):
        plan.apply(inplace=True)
    assert batch_norms(model) == 2
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_bias_is_made_like_the_weight_and_layout_is_kept() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)))
    model = model.to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    folded = normswap.fold(model)
    assert folded[0].bias is not None
    assert not folded[0].bias.requires_grad
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert isinstance(folded[1], nn.Identity)


# --- passages: a case that folds, a case that is left ----------------------------------------------------------------


class Through(nn.Module):
    """conv -> f -> norm (-> linear layer behind)."""

    def __init__(self, f: Callable[[Tensor], Tensor], norm: nn.Module, channels: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.f = f
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.f(self.conv(x)))


PASSAGES: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, bool]]] = {
    "average pool": (lambda x: F.avg_pool2d(x, 2), {}),
    "average pool, padding not counted": (lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), {}),
    "adaptive pool": (lambda x: F.adaptive_avg_pool2d(x, 2), {}),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), {}),
    "max pool, positive scale": (lambda x: F.max_pool2d(x, 2), {"positive": True}),
    "zero padding, no shift": (lambda x: F.pad(x, (1, 1)), {"shift": False}),
    "reflect padding": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), {}),
    "there and back": (lambda x: x.permute(0, 2, 3, 1).transpose(1, 3).transpose(2, 3).contiguous(), {}),
    "slice of space": (lambda x: x[:, :, ::2, 1:], {}),
    "number": (lambda x: (x * -2.0 + 3.0) / 4.0 - 1.0, {}),
    "dropout": (lambda x: F.dropout(x, 0.5, False), {}),
    "mean over rows": (lambda x: x.mean(2, keepdim=True), {}),
    "token layout": (lambda x: x.flatten(2).transpose(1, 2).permute(0, 2, 1).unflatten(2, (6, 6)), {}),
}
LEFT: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "relu": (lambda x: F.relu(x), "relu stands between"),
    "average pool, padding counted": (lambda x: F.avg_pool2d(x, 3, 1, 1), "counts its zero padding"),
    "max pool": (lambda x: F.max_pool2d(x, 2), "negative channels"),
    "zero padding": (lambda x: F.pad(x, (1, 1)), "pads with a constant"),
    "channels to space": (lambda x: x.transpose(1, 2).reshape(x.shape).contiguous(), "not proved"),
    "product": (lambda x: x * x, "stands between"),
    "twice the same": (lambda x: x + x, "adds a tensor to itself"),
    "joined with itself": (lambda x: torch.cat([x, x], 1)[:, :4], "stands between"),
}


@pytest.mark.parametrize("name", [n for n in PASSAGES if n != "token layout"])
def test_passes(name: str) -> None:
    f, options = PASSAGES[name]
    model = randomised(Through(f, nn.BatchNorm2d(4)), **options)
    for example in (None, (image(1, 3, 6, 6),)):
        plan = normswap.plan_fold(model, example_inputs=example)
        assert [change.into for change in plan.changes] == [("conv",)], plan
        same(model, plan.apply(), image(2, 3, 6, 6))


@pytest.mark.parametrize("name", LEFT)
def test_is_left(name: str) -> None:
    f, reason = LEFT[name]
    model = randomised(Through(f, nn.BatchNorm2d(4)))
    plan = normswap.plan_fold(model, example_inputs=(image(2, 3, 6, 6),))
    assert [change.to for change in plan.changes] == ["affine"]
    assert reason in plan.changes[0].notes[0]
    folded = plan.apply()
    assert isinstance(folded.norm, ChannelAffine)
    same(model, folded, image(2, 3, 6, 6))
    kept = normswap.plan_fold(model, keep_batchnorm=True)
    assert kept.skips[0].name == "norm"


class Branches(nn.Module):
    def __init__(self, join: str) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8 if join == "cat" else 4)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        return self.norm(torch.cat([a, b], 1) if self.join == "cat" else a - b if self.join == "subtract" else a + b)


@pytest.mark.parametrize("join", ["cat", "add", "subtract"])
def test_norm_behind_branches_splits_over_them(join: str) -> None:
    model = randomised(Branches(join))
    plan = normswap.plan_fold(model)
    assert set(plan.changes[0].into) == {"a", "b"}
    same(model, plan.apply(), image(2, 3, 5, 5))


def test_forward_into_reflect_padding_but_not_into_zeros() -> None:
    for mode, into in (("reflect", ("1",)), ("zeros", ())):
        model = randomised(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode)))
        plan = normswap.plan_fold(model)
        assert plan.changes[0].into == into
        same(model, plan.apply(), image(2, 3, 6, 6))


def test_forward_through_flatten_into_linear() -> None:
    model = randomised(nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 5)))
    plan = normswap.plan_fold(model)
    assert plan.changes[0].into == ("3",)
    same(model, plan.apply(), image(2, 3, 6, 6))


def test_two_norms_in_a_row_compose() -> None:
    model = randomised(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)))
    plan = normswap.plan_fold(model)
    assert plan.changes[0].into == ("3",)
    same(model, plan.apply(), image(2, 3, 6, 6))


def test_linear_to_batch_norm_folds_only_on_the_right_axis() -> None:
    """(N, C, L) with L == C: torchao 4116."""
    model = randomised(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    unproved = normswap.plan_fold(model)
    assert unproved.changes[0].to == "affine"
    assert "example_inputs" in unproved.changes[0].notes[0]
    same(model, unproved.apply(), image(3, 4, 4))
    proved = normswap.plan_fold(model, example_inputs=(image(3, 4),))
    assert proved.changes[0].into == ("0",)
    same(model, proved.apply(), image(5, 4))
    other = normswap.plan_fold(model, example_inputs=(image(3, 4, 4),))
    assert other.changes[0].to == "affine"
    same(model, other.apply(), image(3, 4, 4))
    wrong = fuse(model)
    with pytest.raises(AssertionError):
        same(model, wrong, image(3, 4, 4))


# --- guards ----------------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One convolution at two sites, with one norm or two."""

    def __init__(self, *, two: bool) -> None:
        super().__init__()
        self.conv, self.first = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.second = nn.BatchNorm2d(3) if two else self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.conv(F.relu(self.first(self.conv(x)))))


def test_layer_called_twice() -> None:
    """pytorch 197539, 104593."""
    model = randomised(Twice(two=True))
    plan = normswap.plan_fold(model)
    assert all("called at 2 sites" in change.notes[0] for change in plan.changes)
    same(model, plan.apply(), image(2, 3, 4, 4))
    with pytest.raises(AssertionError):
        same(model, fuse(model), image(2, 3, 4, 4))
    shared = randomised(Twice(two=False))
    plan = normswap.plan_fold(shared)
    assert plan.changes[0].into == ("conv",)
    assert plan.changes[0].aliases == ("second",)
    same(shared, plan.apply(), image(2, 3, 4, 4))


class ReadTwice(nn.Module):
    def __init__(self, other: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), other

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        extra = self.other(y)
        return self.norm(y) + extra


@pytest.mark.parametrize(
    "other",
    [lambda y: y, lambda y: F.relu_(y), lambda y: y.flatten(1).relu_().view_as(y), lambda y: y.mean()],
    ids=["value", "in place", "in place on a view", "statistic"],
)
def test_output_that_is_read_elsewhere_is_left(other: Callable[[Tensor], Tensor]) -> None:
    model = randomised(ReadTwice(other))
    plan = normswap.plan_fold(model)
    assert plan.changes[0].to == "affine"
    assert "also read by" in plan.changes[0].notes[0]
    same(model, plan.apply(), image(2, 3, 4, 4))


def test_shape_reads_do_not_count() -> None:
    model = randomised(ReadTwice(lambda y: torch.zeros(1, dtype=y.dtype) * y.shape[0]))
    assert normswap.plan_fold(model).changes[0].into == ("conv",)


def pair() -> nn.Module:
    conv, norm = nn.Conv2d, nn.BatchNorm2d
    return randomised(nn.Sequential(conv(3, 3, 1), norm(3), nn.ReLU(), conv(3, 3, 1), norm(3)))


def guarded(model: nn.Module) -> normswap.Plan:
    """Only the second pair folds, the first is listed, and nothing changes."""
    plan = normswap.plan_fold(model)
    assert [c.name for c in plan.changes if c.into] == ["4"], plan
    folded = plan.apply()
    same(copy.deepcopy(model), copy.deepcopy(folded), image(2, 3, 4, 4))
    return plan


def test_train_mode_skips_that_pair_only() -> None:
    model = pair()
    model[1].train()
    assert "train mode" in guarded(model).skips[0].reason


@pytest.mark.parametrize("index", [0, 1])
def test_hooks_are_never_folded_away(index: int) -> None:
    model = pair()
    model[index].register_forward_hook(lambda _m, _i, out: out + 1)
    plan = guarded(model)
    assert "hooks" in (plan.skips[0].reason if plan.skips else plan.changes[0].notes[0])


def test_layers_with_an_unknown_parametrization_are_left() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = pair()
    parametrize.register_parametrization(model[0], "weight", Doubled())
    assert "its weight is parametrized by Doubled" in guarded(model).changes[0].notes[0]


def test_tied_weights_are_left() -> None:
    model = pair()
    model[0].weight = model.add_module("tied", nn.Conv2d(3, 3, 1).double()) or model.tied.weight
    assert "shares its weight with tied" in guarded(model).changes[0].notes[0]


def test_statistics_that_are_not_finite_are_left() -> None:
    model = pair()
    model[1].running_var.fill_(-1.0)
    plan = normswap.plan_fold(model)
    assert "negative" in plan.skips[0].reason


def test_layer_with_its_own_forward_is_left() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) ** 2

    class Renamed(nn.Conv2d):
        pass

    model = randomised(
        nn.Sequential(Doubled(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), Renamed(3, 3, 1), nn.BatchNorm2d(3))
    )
    assert "forward of its own" in guarded(model).changes[0].notes[0]


def test_activation_inside_the_norm_stays() -> None:
    from timm.layers import BatchNormAct2d

    model = randomised(nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4)))
    folded = normswap.fold(model)
    assert batch_norms(folded) == 0
    assert float(folded(image(2, 3, 4, 4)).detach().min()) >= 0
    same(model, folded, image(2, 3, 4, 4))
    assert any(node.target is F.batch_norm for node in fuse(model).graph.nodes)  # subclasses never match there


def test_frozen_norms_fold_with_their_own_eps_in_train_mode_too() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm(4, eps=0.1)))
    model.train()
    folded = normswap.fold(model)
    assert isinstance(folded[1], nn.Identity)
    same(model, folded, image(2, 3, 4, 4))


def test_switchable_with_batch_gates_folds_and_mixed_gates_do_not() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    preserved = normswap.convert(model, "switchable", init="preserve", gate_gap=40.0)
    same(model, normswap.fold(preserved), image(2, 3, 4, 4))
    mixed = normswap.convert(model, "switchable")
    assert "from each input" in normswap.plan_fold(mixed).skips[0].reason


class Reaches(nn.Module):
    """A root that FX cannot trace and that may use the inside of its block."""

    def __init__(self, reaches: str | None) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.reaches = reaches

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e30:
            return x
        out = self.block(x)
        if self.reaches == "index":
            out = out + self.block[0](x)
        elif self.reaches == "iterate":
            for part in self.block:
                x = part(x)
            out = out + x
        return out


@pytest.mark.parametrize("reaches", [None, "index", "iterate"])
def test_code_that_reaches_in(reaches: str | None) -> None:
    model = randomised(Reaches(reaches))
    static = normswap.plan_fold(model)
    assert static.changes[0].to == "affine"
    assert "example_inputs" in static.changes[0].notes[0]
    same(model, static.apply(), image(2, 3, 4, 4))
    observed = normswap.plan_fold(model, example_inputs=(image(1, 3, 4, 4),))
    assert bool(observed.changes[0].into) == (reaches is None)
    same(model, observed.apply(), image(2, 3, 4, 4))


def test_untraceable_root_folds_where_nothing_reaches_in() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 1e30 else self.block(x)

    model = randomised(Root())
    assert normswap.plan_fold(model).changes[0].into == ("block.0",)


def test_a_trace_that_computes_something_else_is_not_trusted() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            if isinstance(x, Tensor):  # a proxy is none
                return self.norm(F.relu(self.conv(x)))
            return self.norm(self.other(x))

    model = randomised(Branch())
    plan = normswap.plan_fold(model, example_inputs=(image(1, 3, 4, 4),))
    assert plan.changes[0].to == "affine"
    same(model, plan.apply(), image(2, 3, 4, 4))


def test_tracing_leaves_no_mark() -> None:
    class Caches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.cache = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), {}

        def forward(self, x: Tensor) -> Tensor:
            self.cache["x"] = self.last = x
            return self.norm(self.conv(x))

    model = randomised(Caches())
    normswap.fold(model)
    assert model.cache == {}
    assert not hasattr(model, "last")


# --- the result ------------------------------------------------------------------------------------------------------


def test_undo_restores_every_bit() -> None:
    model = pair()
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    plan = normswap.plan_fold(model)
    plan.apply(inplace=True)
    assert batch_norms(model) == 0
    assert plan.undo() is model
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(NormswapError, match="nothing to undo"):
        plan.undo()


def test_recipe_lets_a_folded_checkpoint_load_again() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).double()

    model = randomised(network())
    plan = normswap.plan_fold(model)
    folded = plan.apply()
    fresh = normswap.apply_recipe(network().eval(), plan.recipe)
    fresh.load_state_dict(folded.state_dict(), strict=True)
    same(folded, fresh, image(2, 3, 6, 6))
    with pytest.raises(NormswapError, match="same architecture"):
        normswap.apply_recipe(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), plan.recipe)


def test_inplace_keeps_class_and_frees_old_weights() -> None:
    model = pair()
    weight = model[0].weight
    assert normswap.fold(model, inplace=True) is model
    assert model[0].weight is weight


def test_conv_subclass_and_transposed_groups() -> None:
    """r3d_18's Conv3DSimple; pytorch 180995."""
    from torchvision.models.video.resnet import Conv3DSimple

    model = randomised(nn.Sequential(Conv3DSimple(3, 4), nn.BatchNorm3d(4)))
    same(model, folded := normswap.fold(model), image(1, 3, 4, 6, 6))
    assert batch_norms(folded) == 0
    model = randomised(nn.Sequential(nn.ConvTranspose2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)))
    same(model, folded := normswap.fold(model), image(1, 4, 5, 5))
    assert batch_norms(folded) == 0


def test_left_affine_is_trained_like_the_norm_was() -> None:
    model = randomised(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))
    left = normswap.fold(model)[1]
    x = image(2, 3, 4, 4)
    torch.testing.assert_close(left(x.contiguous(memory_format=torch.channels_last)), left(x))
    left(x).sum().backward()
    assert left.scale.grad is not None


@pytest.mark.parametrize("name", ["levit_128s", "efficientnet_b0", "tf_efficientnet_b0"])
def test_real_models_of_timm_fold_fully(name: str) -> None:
    import timm

    model = randomised(timm.create_model(name))
    size = 224 if name == "levit_128s" else 64
    folded = normswap.fold(model)
    assert type(folded) is type(model)
    assert batch_norms(folded) == 0
    assert not any(isinstance(m, ChannelAffine) for m in folded.modules())
    same(model, folded, image(1, 3, size, size))


def test_the_copy_shares_no_memory_with_the_model() -> None:
    model = pair()
    before = copy.deepcopy(model.state_dict())
    folded = normswap.fold(model)
    ours = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    theirs = {tensor.untyped_storage().data_ptr() for tensor in folded.state_dict().values()}
    assert not ours & theirs
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Relaid(nn.Module):
    """A norm on the transposed output of a linear layer, and something behind it."""

    def __init__(self, behind: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.behind = behind

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.norm(self.linear(x).transpose(1, 2)).clamp(-9, 9))


def _doubled_in_place(x: Tensor) -> Tensor:
    x.flatten(1).mul_(2)
    return x


@pytest.mark.parametrize("behind", [lambda x: x.view(x.shape[0], -1), _doubled_in_place], ids=["view", "in place"])
def test_left_where_the_layout_behind_the_norm_matters(behind: Callable[[Tensor], Tensor]) -> None:
    model = randomised(Relaid(behind).double()).eval()
    x = image(2, 5, 4)
    plan = normswap.plan_fold(model, example_inputs=(x,))
    assert "depends on the memory layout, which the norm settles" in plan.changes[0].notes[0]
    folded = plan.apply()
    assert isinstance(folded.norm, ChannelAffine)
    same(model, folded, x)


@pytest.mark.parametrize("behind", [lambda x: x.reshape(x.shape[0], -1), lambda x: x.contiguous().view(2, -1)])
def test_folded_where_it_does_not(behind: Callable[[Tensor], Tensor]) -> None:
    model = randomised(Relaid(behind).double()).eval()
    x = image(2, 5, 4)
    plan = normswap.plan_fold(model, example_inputs=(x,))
    assert plan.changes[0].into == ("linear",)
    same(model, plan.apply(), x)


class Pieces(nn.Module):
    """Norms on some pieces of what one convolution gives."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 9, 1)
        self.first, self.last = nn.BatchNorm2d(2), nn.BatchNorm2d(4)
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        pieces = torch.split(self.conv(x), [2, 3, 4], dim=1)
        out = torch.cat([self.first(pieces[0]).relu(), pieces[1].sigmoid(), self.last(pieces[2])], 1)
        return out + pieces[0].mean() if self.twice else out


def test_norms_on_pieces_of_one_layer() -> None:
    model = randomised(Pieces()).double()
    plan = normswap.plan_fold(model)
    assert [change.into for change in plan.changes] == [("conv",), ("conv",)]
    same(model, plan.apply(), image(2, 3, 5, 5))


def test_a_piece_that_is_read_twice() -> None:
    model = randomised(Pieces(twice=True)).double()
    plan = normswap.plan_fold(model)
    assert [change.into for change in plan.changes] == [(), ("conv",)]
    assert "is also read by" in plan.changes[0].notes[0]
    same(model, plan.apply(), image(2, 3, 5, 5))


class AnotherShape(nn.Module):
    """A difference of a map and its means, in shapes that no graph tells."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2).reshape(x.shape).tanh()
        return self.norm(x - x.mean((2, 3), keepdim=True))


def test_a_shape_that_is_not_known_is_not_taken_for_a_size() -> None:
    model = randomised(AnotherShape()).double()
    plan = normswap.plan_fold(model)
    assert "it is not proved that both branches have these channels" in plan.changes[0].notes[0]
    same(model, plan.apply(), image(2, 4, 4, 5))
