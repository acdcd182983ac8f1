"""Parallel branches: sums that become one convolution, sums that are left alone, and why."""

from __future__ import annotations

import copy
import json
import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import normswap
import tests.zoo.schemas  # noqa: F401  before timm
from normswap.errors import NormswapError
from normswap.fold import branches
from normswap.fold.branches import Taps, itself, joined, merged_kernel, taps_of
from tests.support import operators, picture
from tests.zoo import models as zoo

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def randomised(model: nn.Module) -> nn.Module:
    """Random parameters and statistics in float64, in eval mode."""
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), Tensor):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or "gamma" in name:
            parameter.data.normal_()
    return model.double().eval()


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def running(model: nn.Module, x: Tensor) -> dict[str, int]:
    """Convolutions, norms and arithmetic that a call runs."""
    counts = operators(lambda: model(x.clone()))
    names = ("convolution", "native_batch_norm", "add", "add_", "sub", "mul", "mul_", "neg", "div", "copy_")
    return {name: counts[name] for name in names if counts[name]}


def same(model: nn.Module, folded: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        theirs, ours = model(x.clone()), folded(x.clone())
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= 1e-12 * max(1.0, float(theirs.abs().max()))


def merged(
    model: nn.Module, x: Tensor, *, convolutions: int = 1, rest: int = 0, pickles: bool = True, **arguments: Any
) -> normswap.Plan:
    """Merge, compare, count, undo, replay; the plan."""
    before = picture(model)
    plan = normswap.plan_fold(model, merge_branches=True, **arguments)
    folded = plan.apply()
    assert not before.differences(model)
    assert type(folded).__name__ == type(model).__name__
    assert isinstance(folded, type(model))
    same(model, folded, x)
    ran = running(folded, x)
    assert ran.pop("convolution") == convolutions
    assert sum(ran.values()) == rest, ran
    for other in (copy.deepcopy(folded), *([pickle.loads(pickle.dumps(folded))] if pickles else [])):
        assert torch.equal(other(x.clone()), folded(x.clone()))
    if "example_inputs" not in arguments and not plan.skips:
        fresh = normswap.apply_recipe(copy.deepcopy(model), json.loads(json.dumps(plan.recipe)))
        fresh.load_state_dict({name: tensor.clone() for name, tensor in folded.state_dict().items()}, strict=True)
        assert torch.equal(fresh(x.clone()), folded(x.clone()))
    restored = plan.undo()
    assert torch.equal(restored(x.clone()), model(x.clone()))
    assert restored.state_dict().keys() == model.state_dict().keys()
    assert plan.apply(inplace=True) is model
    same(restored, model, x)
    plan.undo()
    assert not before.differences(model)
    return plan


def left(model: nn.Module, x: Tensor, reason: str, **arguments: Any) -> normswap.Plan:
    """Nothing is merged, a note says why, and what the ordinary fold does is right."""
    plan = normswap.plan_fold(model, merge_branches=True, **arguments)
    assert not plan.merges
    assert any(reason in note for note in plan.notes), plan.notes
    same(model, plan.apply(), x)
    return plan


class Block(nn.Module):
    """Branches, a function that adds them up, and an activation."""

    def __init__(self, add: Callable[[Any, Tensor], Tensor], **children: nn.Module) -> None:
        super().__init__()
        self.add = add
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.add(self, x))


def branch(kernel: Any, channels: int = 6, *, dims: int = 2, norm: bool = True, **arguments: Any) -> nn.Module:
    """A convolution that keeps the size at stride 1, with its norm."""
    sizes = (kernel,) * dims if isinstance(kernel, int) else kernel
    arguments.setdefault("padding", tuple(size // 2 for size in sizes))
    conv = CONVS[dims](channels, arguments.pop("out", channels), sizes, **arguments)
    return nn.Sequential(conv, NORMS[dims](conv.out_channels)) if norm else conv


def add_all(self: Any, x: Tensor) -> Tensor:
    first, *others = self.children()
    total = first(x)
    for child in others:
        total = total + child(x)
    return total


class RepVGG(nn.Module):
    def __init__(self, channels: int = 6, groups: int = 1) -> None:
        super().__init__()
        self.dense = branch(3, channels, groups=groups, bias=False)
        self.point = branch(1, channels, groups=groups, bias=False)
        self.skip = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.dense(x) + self.point(x) + self.skip(x))


class ACNet(nn.Module):
    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.square, self.tall, self.wide = (branch(k, channels, bias=False) for k in (3, (3, 1), (1, 3)))

    def forward(self, x: Tensor) -> Tensor:
        out = self.square(x)
        out += self.tall(x)
        out += self.wide(x)
        return F.relu(out)


class Net(nn.Module):
    """Blocks in a row, a layer before and a norm behind."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


# --- the arithmetic --------------------------------------------------------------------------------------------------


def random_conv(rng: random.Random, dims: int, inputs: int, outputs: int, stride: int) -> nn.Module:
    sizes = tuple(rng.choice([1, 2, 3, 5]) for _ in range(dims))
    groups = rng.choice([g for g in (1, 2, 4) if inputs % g == 0 and outputs % g == 0])
    dilation = rng.choice([1, 1, 2])
    padding: Any = tuple(rng.choice([0, dilation * (size - 1) // 2]) for size in sizes)
    if stride == 1 and rng.random() < 0.3:
        padding = "same"
    return CONVS[dims](inputs, outputs, sizes, stride, padding, dilation, groups, bias=rng.random() < 0.5).double()


def test_a_sum_of_random_convolutions_is_one_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches, "DEARER", 1e9)
    rng, made, refused = random.Random(0), 0, 0
    torch.manual_seed(0)
    for _ in range(400):
        dims, inputs, stride = rng.choice([1, 2]), rng.choice([4, 8]), rng.choice([1, 1, 2])
        outputs = rng.choice([inputs, 8])
        convs = [random_conv(rng, dims, inputs, outputs, stride) for _ in range(rng.choice([1, 2, 3]))]
        parts: list[Any] = [taps_of(conv) for conv in convs]
        values = [(taps, conv.weight, torch.rand(outputs).double()) for taps, conv in zip(parts, convs, strict=True)]
        if rng.random() < 0.5:
            parts.append(itself(parts[0]))
            values.append((parts[-1], None, torch.rand(outputs).double()))
        taps = joined(parts)
        if isinstance(taps, str):
            refused += 1
            continue
        made += 1
        kernel = merged_kernel(taps, values, torch.device("cpu"))
        function = getattr(F, f"conv{dims}d")
        for size in (12, 13):
            x = image(2, inputs, *[size] * dims)
            pads = [p for pair in zip(reversed(taps.before), reversed(taps.behind), strict=True) for p in pair]
            ours = function(F.pad(x, pads), kernel, None, taps.stride, 0, taps.dilation, taps.groups)
            shape = (1, -1, *[1] * dims)
            theirs: Any = 0
            for conv, (_, _, scale) in zip(convs, values, strict=False):
                bias = 0 if conv.bias is None else conv.bias.reshape(shape)
                theirs = theirs + (conv(x) - bias) * scale.reshape(shape)
            if len(values) > len(convs):
                theirs = theirs + x * values[-1][2].reshape(shape)
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert made > 100
    assert refused > 50


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ({}, {"stride": 2}, "different strides"),
        ({"dilation": 2, "padding": 2}, {}, "different dilations"),
        ({}, {"padding": 0}, "different sizes"),
        ({}, {"out_channels": 3}, "output channels"),
        ({"kernel_size": 7, "padding": 3, "groups": 6}, {"kernel_size": 1, "padding": 0}, "294"),
        ({"kernel_size": (1, 7), "padding": (0, 3)}, {"kernel_size": (7, 1), "padding": (3, 0)}, "multiplications"),
        ({"dilation": 2, "padding": (2, 2)}, {"kernel_size": 1, "padding": (0, 0)}, ""),
        ({"dilation": 2, "padding": (1, 1)}, {"kernel_size": (3, 1), "padding": (1, 0), "dilation": 2}, "sizes"),
    ],
)
def test_taps_that_do_not_join(first: dict[str, Any], second: dict[str, Any], reason: str) -> None:
    common: dict[str, Any] = {"in_channels": 6, "out_channels": 6, "kernel_size": 3, "padding": 1}
    parts: list[Any] = [taps_of(nn.Conv2d(**{**common, **each})) for each in (first, second)]
    outcome = joined(parts)
    assert isinstance(outcome, str) == bool(reason), outcome
    assert reason in str(outcome)


def test_asymmetrical_padding_is_made_symmetrical_with_zeros() -> None:
    own = taps_of(nn.Conv1d(4, 4, 4, padding="same"))
    assert isinstance(own, Taps)
    assert (own.before, own.behind) == ((1,), (2,))
    assert joined([own, itself(own)]) == own  # the module has it already
    wider = joined([own, taps_of(nn.Conv1d(4, 4, 3, padding=1))])  # type: ignore[list-item]
    assert wider == own
    other = Taps((2,), (1,), (1,), (0,), (1,), 1, 4, 4)
    even = joined([other, Taps((2,), (1,), (1,), (0,), (1,), 2, 4, 4), itself(other)])
    assert even == other
    wide: Any = taps_of(nn.Conv2d(4, 4, (1, 3), padding=(0, 1)))
    uneven = joined([Taps((2, 1), (1, 1), (1, 0), (0, 0), (1, 1), 1, 4, 4), wide])
    assert uneven == Taps((3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 1, 4, 4)


# --- what is merged --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_repvgg(groups: int, observed: bool) -> None:
    model, x = randomised(RepVGG(groups=groups)), image(2, 6, 9, 8)
    arguments = {"example_inputs": (x,)} if observed else {}
    plan = merged(model, x, **arguments)
    assert [change.becomes for change in plan.changes] == ["folded into dense.0"] * 3
    assert not plan.skips
    (merge,) = plan.merges
    assert (merge.holder, merge.host, merge.adds_itself) == ("", "dense.0", True)
    assert set(merge.absorbs) == {"point.0", "dense.1", "point.1", "skip"}
    assert "dense.0 takes in point.0, identity (3x3, in the model)" in str(plan)
    assert json.loads(plan.to_json())["merges"][0]["host"] == "dense.0"
    folded = plan.apply()
    assert set(folded.state_dict()) == {"dense.0.weight", "dense.0.bias"}
    assert isinstance(folded.point[0], nn.Identity)
    assert folded.dense[0].weight.requires_grad


@pytest.mark.parametrize("observed", [False, True])
def test_acnet_in_a_network(observed: bool) -> None:
    model, x = randomised(Net(ACNet(), RepVGG(), nn.BatchNorm2d(6))), image(2, 3, 9, 9)
    plan = merged(model, x, convolutions=3, **({"example_inputs": (x,)} if observed else {}), rest=0)
    assert [merge.host for merge in plan.merges] == ["blocks.0.square.0", "blocks.1.dense.0"]
    assert [merge.holder for merge in plan.merges] == ["blocks.0", "blocks.1"]
    assert len(plan.changes) == 7
    by_name = {change.name: change.into for change in plan.changes}
    assert by_name["blocks.2"] == ("head",)


def test_a_norm_behind_the_block_folds_into_the_merged_convolution() -> None:
    model, x = randomised(nn.Sequential(Sum(branch(3), branch(1, norm=False)), nn.BatchNorm2d(6))), image(2, 6, 7, 7)
    plan = merged(model, x)
    assert plan.changes[-1].name == "1"
    assert plan.changes[-1].into == ("0.0.0",)
    assert plan.changes[0].notes == ("its branch is merged",)


class Sum(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        for index, part in enumerate(parts):
            self.add_module(str(index), part)

    def forward(self, x: Tensor) -> Tensor:
        return add_all(self, x)


SUMS: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, Callable[[], nn.Module]]]] = {
    "difference": (lambda s, x: s.a(x) - s.b(x), {"a": lambda: branch(3), "b": lambda: branch(1)}),
    "identity": (lambda s, x: x + s.a(x), {"a": lambda: branch(3)}),
    "identity minus": (lambda s, x: x - s.a(x), {"a": lambda: branch(3, groups=6)}),
    "negated": (lambda s, x: -(s.a(x) - x), {"a": lambda: branch(1)}),
    "number": (lambda s, x: 2 - s.a(x) / 4 + 0.5 * x, {"a": lambda: branch(3)}),
    "in place": (lambda s, x: s.a(x).add_(s.b(x)).mul_(2), {"a": lambda: branch(3), "b": lambda: branch(5)}),
    "in place, itself": (lambda s, x: s.a(x).add_(x).sub_(s.b(x)), {"a": lambda: branch(3), "b": lambda: branch(1)}),
    "norm of the sum": (
        lambda s, x: s.norm(s.a(x) + s.b(x) + x),
        {"a": lambda: branch(3), "b": lambda: branch(1, norm=False), "norm": lambda: nn.BatchNorm2d(6)},
    ),
    "twice the same": (lambda s, x: (y := s.a(x)) + y + x, {"a": lambda: branch(3)}),
    "dropout": (
        lambda s, x: s.drop(s.a(x)) + s.same(x),
        {"a": lambda: branch(3), "drop": lambda: nn.Dropout(0.5), "same": nn.Identity},
    ),
    "one branch and zeros": (lambda s, x: 0 + s.a(x) + 0, {"a": lambda: branch(3)}),
    "tall and wide": (add_all, {"a": lambda: branch((3, 1)), "b": lambda: branch((1, 3))}),
    "no norm, no bias": (add_all, {"a": lambda: branch(3, norm=False, bias=False), "b": nn.Identity}),
    "depthwise and groups": (add_all, {"a": lambda: branch(3, groups=2), "b": lambda: branch(1, groups=3)}),
    "stride": (add_all, {"a": lambda: branch(3, stride=2), "b": lambda: branch(1, stride=2)}),
    "dilation": (add_all, {"a": lambda: branch(3, dilation=2, padding=2), "b": lambda: branch(1), "c": nn.Identity}),
    "more channels": (add_all, {"a": lambda: branch(3, out=8), "b": lambda: branch(1, out=8)}),
    "same": (add_all, {"a": lambda: branch(5, padding="same"), "b": lambda: branch(3), "c": nn.Identity}),
    "even kernel": (add_all, {"a": lambda: branch(4, padding="same"), "b": lambda: branch(1), "c": nn.Identity}),
    "valid": (add_all, {"a": lambda: branch(3, padding="valid"), "b": lambda: branch(3, padding=0)}),
    "circular, not padded": (
        add_all, {"a": lambda: branch(1, padding=0, padding_mode="circular"), "b": lambda: branch(1)},
    ),
    "one dimension": (add_all, {"a": lambda: branch(3, dims=1), "b": lambda: branch(1, dims=1), "c": nn.Identity}),
    "three dimensions": (add_all, {"a": lambda: branch(3, dims=3), "b": lambda: nn.BatchNorm3d(6)}),
}  # fmt: skip


@pytest.mark.parametrize("name", SUMS)
def test_sums(name: str) -> None:
    add, children = SUMS[name]
    model = randomised(Block(add, **{key: make() for key, make in children.items()}))
    dims = {"one dimension": 1, "three dimensions": 3}.get(name, 2)
    plan = merged(model, image(2, 6, *[6] * dims), pickles=False)
    same(model, plan.apply(), image(2, 6, *[7] * dims))
    assert len(plan.merges) == 1
    assert not plan.notes


class Scaled(nn.Module):
    """A layer scale around a difference of nested blocks, as in FastViT."""

    def __init__(self, shape: tuple[int, ...], *, inplace: bool = False) -> None:
        super().__init__()
        self.scale = LayerScale(shape, inplace)
        self.mixer, self.norm = RepPlain(), nn.Sequential(nn.BatchNorm2d(6), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale(self.mixer(x) - self.norm(x))


class LayerScale(nn.Module):
    def __init__(self, shape: tuple[int, ...], inplace: bool) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(shape))
        self.inplace, self.flat = inplace, len(shape) == 1

    def forward(self, x: Tensor) -> Tensor:
        gamma = self.gamma.view(1, -1, 1, 1) if self.flat else self.gamma
        return x.mul_(gamma) if self.inplace else x * gamma


class RepPlain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.point = branch(3, groups=6), branch(1, groups=6)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x) + self.point(x)


@pytest.mark.parametrize(
    ("shape", "inplace"),
    [((6, 1, 1), False), ((1, 6, 1, 1), True), ((6,), True), ((1,), False), ((1,), True), ((1, 1, 1), False)],
)
def test_nested_blocks_merge_at_the_outermost_sum(shape: tuple[int, ...], inplace: bool) -> None:
    model, x = randomised(nn.Sequential(Scaled(shape, inplace=inplace), nn.ReLU())), image(2, 6, 8, 8)
    if shape == (1,) and not inplace:
        model[0].scale.gamma.data.fill_(-0.3)
    plan = merged(model, x)
    (merge,) = plan.merges
    assert (merge.holder, merge.host) == ("0", "0.mixer.dense.0")
    assert "0.scale.gamma" in merge.absorbs
    assert set(plan.apply().state_dict()) == {"0.mixer.dense.0.weight", "0.mixer.dense.0.bias"}


class OwnScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = branch(3), branch(1)
        self.gamma = nn.Parameter(torch.ones(6, 1, 1))
        self.beta = nn.Parameter(torch.zeros(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.gamma * (self.a(x) + self.b(x)) + self.beta)


def test_scale_and_shift_of_the_module_itself() -> None:
    model = randomised(OwnScale())
    folded = merged(model, image(2, 6, 5, 5)).apply()
    assert folded.gamma is None
    assert set(folded.state_dict()) == {"a.0.weight", "a.0.bias"}


def test_a_sum_inside_a_child_is_the_childs_although_a_norm_follows() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm = RepPlain(), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.norm(self.inner(x)))

    plan = merged(randomised(Outer()), image(2, 6, 5, 5), pickles=False)
    assert [merge.holder for merge in plan.merges] == ["inner"]


def test_two_sums_in_one_forward_one_of_the_other() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = branch(3), branch(1), branch(3), branch(1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x) + self.b(x)
            return self.c(y) + self.d(y) + y

    plan = merged(randomised(Two()), image(2, 6, 5, 5), convolutions=2, pickles=False)
    assert sorted(merge.host for merge in plan.merges) == ["a.0", "c.0"]


def test_numbered_branches_and_a_norm_beside_them() -> None:
    class Numbered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), branch(3), branch(1)])

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.parts[1](self.parts[0](x)))
            return self.parts[2](y) + self.parts[3](y)

    plan = merged(randomised(Numbered()), image(2, 6, 5, 5), convolutions=2, pickles=False)
    assert {change.name: change.into for change in plan.changes}["parts.1"] == ("parts.0",)


def test_a_graph_module() -> None:
    model, x = torch.fx.symbolic_trace(randomised(RepVGG())), image(2, 6, 5, 5)
    plan = normswap.plan_fold(model, merge_branches=True)
    folded = plan.apply()
    same(model, folded, x)
    assert running(folded, x) == {"convolution": 1}
    same(model, plan.undo(), x)


def test_half_precision_is_rounded_once_and_overflow_is_left() -> None:
    model = randomised(RepVGG()).float().bfloat16()
    folded = normswap.fold(model, merge_branches=True)
    double = normswap.fold(copy.deepcopy(model).double(), merge_branches=True)
    assert torch.equal(folded.dense[0].weight, double.dense[0].weight.bfloat16())
    half = randomised(RepVGG()).half()
    half.dense[0].weight.data.fill_(6e4)
    half.dense[1].running_var.fill_(1e-3)
    plan = normswap.plan_fold(half, merge_branches=True)
    assert not plan.merges
    assert any("not finite in torch.float16" in note for note in plan.notes)


def test_a_sum_without_norms_is_a_plan_too() -> None:
    model = nn.Sequential(Sum(branch(3, norm=False), branch(1, norm=False))).double().eval()
    x = image(2, 6, 5, 5)
    plan = merged(model, x)
    assert not plan.changes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folded = normswap.fold(model, merge_branches=True)
    assert running(folded, x) == {"convolution": 1}


def test_optimizer_follows() -> None:
    model = randomised(RepVGG())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plan = normswap.plan_fold(model, merge_branches=True)
    folded = plan.apply(inplace=True)
    plan.remap_optimizer(optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(folded.dense[0].weight) in held


# --- without being asked, and when asked for other norms -------------------------------------------------------------


def test_nothing_is_merged_unasked() -> None:
    model, x = randomised(RepVGG()), image(2, 6, 5, 5)
    plan = normswap.plan_fold(model)
    assert not plan.merges
    assert "merges" not in plan.recipe
    assert "merges" not in plan.to_dict()
    assert running(plan.apply(), x)["convolution"] == 2


def test_a_norm_that_is_skipped_keeps_its_branch() -> None:
    model, x = randomised(RepVGG()), image(2, 6, 5, 5)
    plan = merged(model, x, rest=2, skip="skip")
    assert [skip.reason for skip in plan.skips] == ["excluded by skip"]
    assert any("skip: excluded by skip" in note for note in plan.notes)
    plan = left(model, x, "point.1: not selected by where", where=["dense.*", "skip"])
    assert len(plan.changes) == 2
    net = randomised(nn.Sequential(RepVGG(), RepVGG()))
    plan = merged(net, x, convolutions=3, rest=4, skip="1.point.1")
    assert [merge.holder for merge in plan.merges] == ["0"]
    assert [skip.name for skip in plan.skips] == ["1.point.1"]


# --- what is left alone ----------------------------------------------------------------------------------------------

LEFT: dict[str, tuple[dict[str, Callable[[], nn.Module]], Callable[[Any, Tensor], Tensor], str]] = {
    "dilation": (
        {"a": lambda: branch(3, dilation=2, padding=2), "b": lambda: branch(3)}, add_all, "different dilations",
    ),
    "stride": (
        {"a": lambda: branch(3, stride=2), "b": lambda: branch(1)},
        lambda s, x: s.a(x) + s.b(x)[:, :, ::2, ::2] if x.shape[2] < 0 else s.a(x) + s.b(x), "",
    ),
    "padding that is not zeros": (
        {"a": lambda: branch(3, padding_mode="circular"), "b": lambda: branch(1)}, add_all, "its padding is circular",
    ),
    "transposed": (
        {"a": lambda: nn.ConvTranspose2d(6, 6, 3, padding=1), "b": lambda: branch(1)}, add_all, "ConvTranspose2d",
    ),
    "norm in front": (
        {"a": lambda: nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)), "b": lambda: branch(1)},
        add_all, "stands in front of a.1",
    ),
    "shift in front": (
        {"a": lambda: branch(3), "b": lambda: branch(1)}, lambda s, x: s.a(x + 1) + s.b(x), "stands in front of a.0",
    ),
    "sizes that differ": (
        {"a": lambda: branch(3, padding=0), "b": lambda: branch(1)},
        lambda s, x: s.a(x) + s.b(x), "outputs of different sizes",
    ),
    "too dear": (
        {"a": lambda: branch(3, groups=6), "b": lambda: branch(1, norm=False)},
        lambda s, x: s.a(x) + s.b(x), "multiplications",
    ),
    "norm of another kind": (
        {"a": lambda: branch(3), "b": lambda: nn.GroupNorm(2, 6)}, add_all, "b: group computes its statistics",
    ),
    "scale of another axis": (
        {"a": lambda: branch(3), "b": lambda: WithScale((6,))}, add_all, "not one for each channel",
    ),
    "written in place over the source": (
        {"a": lambda: branch(3), "b": lambda: branch(1)},
        lambda s, x: (y := x * x.sigmoid()).add_(s.a(y)) + s.b(x), "",
    ),
}  # fmt: skip


class WithScale(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    children, add, reason = LEFT[name]
    model = randomised(Block(add, **{key: make() for key, make in children.items()}))
    x = image(2, 6, 6, 6)
    if name == "sizes that differ":
        x = image(2, 6, 3, 3)  # of which one is broadcast
    if name == "stride":
        x = image(2, 6, 1, 1)  # the only size at which it runs
    left(model, x, reason or " ") if reason else same(model, normswap.fold(model, merge_branches=True), x)
    if not reason:
        assert not normswap.plan_fold(model, merge_branches=True).merges


def value_is_read(s: Any, x: Tensor) -> Tensor:
    y = s.a(x)
    return (y + s.b(x)) * y.mean()


def source_is_written(s: Any, x: Tensor) -> Tensor:
    y = x * 2
    out = s.a(y)
    y.mul_(3)
    return out + s.b(y)


def source_is_written_by_a_view(s: Any, x: Tensor) -> Tensor:
    y = x * 2
    view = y.view(y.shape)
    out = s.a(y)
    view.relu_()
    return out + s.b(y)


def sum_into_the_source(s: Any, x: Tensor) -> Tensor:
    y = x * 2
    out = s.a(y)
    y += out
    return y


def sum_into_a_value_with_another_name(s: Any, x: Tensor) -> Tensor:
    y = s.a(x)
    other = s.same(y)
    y += x
    return y + other + s.b(x)


@pytest.mark.parametrize(
    ("add", "reason"),
    [
        (value_is_read, "also read by"),
        (source_is_written, "changes their source in place"),
        (source_is_written_by_a_view, "changes their source in place"),
        (sum_into_the_source, "writes in place"),
        (sum_into_a_value_with_another_name, "writes in place"),
    ],
)
def test_values_in_use_elsewhere(add: Any, reason: str) -> None:
    model = randomised(Block(add, a=branch(3), b=branch(1), same=nn.Identity()))
    left(model, image(2, 6, 6, 6), reason)


def test_writes_that_do_no_harm() -> None:
    def add(s: Any, x: Tensor) -> Tensor:
        y = F.relu_(x * 2)
        out = s.a(y) + s.b(y)
        return F.relu_(out).add_(y)

    model, x = randomised(Block(add, a=branch(3), b=branch(1))), image(2, 6, 6, 6)
    plan = normswap.plan_fold(model, merge_branches=True)
    assert len(plan.merges) == 1
    same(model, plan.apply(), x)


def test_a_hook_on_a_branch() -> None:
    for name in ("dense.0", "point", "dense.1", "skip"):
        model = randomised(RepVGG())
        seen: list[str] = []
        model.get_submodule(name).register_forward_hook(lambda *_: seen.append("called"))  # noqa: B023
        plan = normswap.plan_fold(model, merge_branches=True)
        assert any("hooks" in note for note in plan.notes)
        assert len(plan.merges) == (name == "skip")  # the others are merged without it
        folded = plan.apply()
        seen.clear()
        same(model, folded, image(2, 6, 5, 5))
        assert len(seen) == 2


def test_a_hook_on_the_block_still_runs() -> None:
    model = randomised(nn.Sequential(RepVGG()))
    seen: list[Any] = []
    model[0].register_forward_hook(lambda _module, _args, out: seen.append(out))
    x = image(2, 6, 5, 5)
    plan = normswap.plan_fold(model, merge_branches=True)
    folded = plan.apply()
    same(model, folded, x)
    assert len(plan.merges) == 1
    assert len(seen) >= 2


def test_tied_weights_and_shared_modules() -> None:
    tied = randomised(Sum(branch(3), branch(3), branch(1)))
    tied.get_submodule("1.0").weight = tied.get_submodule("0.0").weight
    left(tied, image(2, 6, 5, 5), "shares its weight")
    shared = randomised(nn.Sequential(RepVGG(), nn.ReLU()))
    shared.append(shared[0].dense[0])
    left(shared, image(2, 6, 5, 5), "called at several sites")
    block = randomised(RepVGG())
    left(nn.Sequential(block, block).eval(), image(2, 6, 5, 5), "called at several sites")
    gamma = nn.Parameter(torch.randn(6, 1, 1))
    scales = [WithScale((6, 1, 1)), WithScale((6, 1, 1))]
    for scale in scales:
        scale.gamma = gamma
    left(randomised(Sum(branch(3), *scales)), image(2, 6, 5, 5), "is shared")


def test_weights_that_are_no_parameters() -> None:
    model = randomised(RepPlain())
    weight = model.point[0].weight.detach()
    del model.point[0].weight
    model.point[0].register_buffer("weight", weight)
    left(model, image(2, 6, 5, 5), "no parameters with values")
    lazy = Sum(nn.LazyConv2d(6, 3, padding=1), nn.Conv2d(6, 6, 1)).eval()
    assert not normswap.plan_fold(lazy, merge_branches=True).merges


def test_a_scale_that_raises_the_dtype() -> None:
    model = randomised(nn.Sequential(Scaled((6, 1, 1)))).float()
    model[0].scale.gamma.data = model[0].scale.gamma.data.double()
    plan = normswap.plan_fold(model, merge_branches=True)
    assert not any("gamma" in name for merge in plan.merges for name in merge.absorbs)
    assert any("another dtype" in note for note in plan.notes)
    assert plan.apply()(image(2, 6, 5, 5).float()).dtype == torch.float64


def test_the_memory_format_is_kept() -> None:
    model = randomised(RepVGG()).to(memory_format=torch.channels_last)
    x = image(2, 6, 5, 5).to(memory_format=torch.channels_last)
    folded = normswap.fold(model, merge_branches=True)
    assert folded.dense[0].weight.is_contiguous(memory_format=torch.channels_last)
    same(model, folded, x)


class ScaleTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = branch(3), branch(1), LayerScale((6, 1, 1), False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(F.relu(x + self.scale(self.a(x) + self.b(x))))


class ScaleOutside(nn.Module):
    """A root that cannot be traced and uses the scale of a block, too."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Scaled((6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 1e9 else self.block.scale(self.block(x))


class ScaleRead(ScaleOutside):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 1e9 else self.block(x) * self.block.scale.gamma


@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize("cls", [ScaleTwice, ScaleOutside, ScaleRead])
def test_a_scale_that_is_used_again(cls: Any, observed: bool) -> None:
    model, x = randomised(cls()), image(2, 6, 5, 5)
    plan = normswap.plan_fold(model, merge_branches=True, example_inputs=(x,) if observed else None)
    folded = plan.apply()
    same(model, folded, x)
    assert not any("gamma" in name for merge in plan.merges for name in merge.absorbs)
    assert [name for name in folded.state_dict() if name.endswith("gamma")]
    assert plan.notes


def test_parametrized_and_train_mode() -> None:
    model = randomised(RepVGG())
    parametrizations.weight_norm(model.dense[0])
    left(model, image(2, 6, 5, 5), "dense.0 computes its weight (weight norm)")
    model = randomised(RepVGG())
    model.skip.train()
    plan = normswap.plan_fold(model, merge_branches=True)
    assert [merge.adds_itself for merge in plan.merges] == [False]
    assert any("skip: it is in train mode" in note for note in plan.notes)
    assert [skip.name for skip in plan.skips] == ["skip"]
    model = randomised(Sum(branch(3, norm=False), branch(1, norm=False))).train()
    assert any("train mode" in note for note in normswap.plan_fold(model, merge_branches=True).notes)


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = branch(3), branch(1)

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        out = self.a(x) + self.b(x)
        return out * 2 if twice else out


class Modes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = branch(3), branch(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) if not self.training else self.a(x)


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = branch(3, norm=False), branch(1, norm=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x) + self.b(x)) * self.b.kernel_size[0]


class Stores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = branch(3), branch(1)

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.a(x)
        return self.last + self.b(x)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [(Optional, "optional arguments"), (Modes, "in train mode"), (Reads, "reads the 'kernel_size'"), (Stores, None)],
)
def test_forwards_that_cannot_be_given_another(cls: Any, reason: str | None) -> None:
    model, x = randomised(cls()), image(2, 6, 5, 5)
    plan = normswap.plan_fold(model, merge_branches=True)
    assert not plan.merges
    same(model, plan.apply(), x)
    if reason is not None:
        assert any(reason in note for note in plan.notes), plan.notes


def test_a_module_held_in_a_closure() -> None:
    model = randomised(RepVGG())
    inner = model.point
    model.also = lambda x: inner(x)
    left(model, image(2, 6, 5, 5), "closure")


class Outside(nn.Module):
    """A root that cannot be traced and calls a branch besides."""

    def __init__(self) -> None:
        super().__init__()
        self.block = RepVGG()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return self.block(x) + self.block.point(x)


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = RepVGG()

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 1e9 else self.block(x)


@pytest.mark.parametrize("observed", [False, True])
def test_a_root_that_cannot_be_traced(observed: bool) -> None:
    x = image(2, 6, 5, 5)
    arguments: dict[str, Any] = {"example_inputs": (x,)} if observed else {}
    merged(randomised(Around()), x, **arguments)
    left(randomised(Outside()), x, "it ran 2 times" if observed else "pass example_inputs", **arguments)


# --- random forwards -------------------------------------------------------------------------------------------------


class Script(nn.Module):
    """A random forward: layers, sums, scales and writes in place on the values so far, most often on the input."""

    def __init__(self, rng: random.Random, depth: int = 2, channels: int = 4) -> None:
        super().__init__()
        self.steps: list[tuple[str, int, int]] = []
        self.parts = nn.ModuleList()
        self.gamma = nn.Parameter(torch.randn(channels, 1, 1))
        for count in range(1, rng.randrange(4, 10)):
            kind = rng.choice(["part", "part", "part", "add", "add", "sub", "iadd", "isub", "gamma", "number", "relu_"])
            first = rng.choice([0, 0, count - 1, rng.randrange(count)])
            second = rng.choice([count - 1, count - 1, rng.randrange(count)])
            if kind == "part":
                self.parts.append(self.part(rng, depth, channels))
                second = rng.randrange(len(self.parts)) if rng.random() < 0.1 else len(self.parts) - 1
            self.steps.append((kind, first, second))
        self.ends = rng.choice(["last", "sum", "relu"])

    def part(self, rng: random.Random, depth: int, channels: int) -> nn.Module:
        kind = rng.choice(["conv", "conv", "conv", "norm", "identity", "script", "plain"])
        if kind == "script" and depth:
            return Script(rng, depth - 1, channels)
        if kind == "norm":
            return nn.BatchNorm2d(channels)
        if kind == "identity":
            return rng.choice([nn.Identity(), nn.Dropout(0.3), nn.ReLU()])
        sizes = rng.choice([(3, 3), (1, 1), (3, 1), (1, 3), (5, 5)])
        mode = rng.choice(["zeros"] * 9 + ["circular"])
        groups = rng.choice([1, 1, 2, channels])
        conv = branch(sizes, channels, groups=groups, padding_mode=mode, bias=rng.random() < 0.5)
        return conv if kind == "conv" else conv[0]  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        values = [x * 1.5]
        for kind, first, second in self.steps:
            a = values[first]
            if kind == "part":
                values.append(self.parts[second](a))
            elif kind in ("add", "sub"):
                values.append(a + values[second] if kind == "add" else a - values[second])
            elif kind in ("iadd", "isub"):
                values.append(values[second].add_(a) if kind == "iadd" else values[second].sub_(a))
            elif kind == "gamma":
                values.append(a * self.gamma)
            elif kind == "number":
                values.append(0.5 * a - 1)
            else:
                values.append(values[second].relu_())
        if self.ends == "sum":
            return values[-1] + values[-2]
        return F.relu(values[-1]) if self.ends == "relu" else values[-1]


def check_script(seed: int) -> int:
    rng = random.Random(seed)
    model = randomised(nn.Sequential(*(Script(rng) for _ in range(rng.choice([1, 2])))))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(1.5)
    x = image(2, 4, 6, 5)
    for example in (None, (x,)):
        plan = normswap.plan_fold(model, merge_branches=True, example_inputs=example)
        before = picture(model)
        folded = plan.apply()
        with torch.no_grad():
            ours, theirs = folded(x.clone()), model(x.clone())
        scale = max(1.0, float(theirs.abs().max()))
        assert float((ours - theirs).abs().max()) <= 1e-10 * scale, f"seed {seed}: {plan}"
        assert running(folded, x).get("convolution", 0) <= running(model, x).get("convolution", 0)
        inplace = normswap.plan_fold(model, merge_branches=True, example_inputs=example)
        inplace.apply(inplace=True)
        inplace.undo()
        assert not before.differences(model)
        if example is None:
            fresh = normswap.apply_recipe(model, plan.recipe)
            fresh.load_state_dict(folded.state_dict(), strict=True)
    return len(plan.merges)


def test_random_forwards() -> None:
    assert sum(check_script(seed) for seed in (*range(10), 218)) > 1


# --- recipes and errors ----------------------------------------------------------------------------------------------


def test_a_recipe_that_does_not_fit() -> None:
    recipe = normswap.plan_fold(randomised(RepVGG()), merge_branches=True).recipe
    other = randomised(RepVGG())
    other.point[0].register_forward_hook(lambda *_: None)
    before = picture(other)
    with pytest.raises(NormswapError, match=r"merges branches into 'dense\.0', but here they are not found \(.*hooks"):
        normswap.apply_recipe(other, recipe, inplace=True)
    assert not before.differences(other)
    with pytest.raises(NormswapError, match="'merges' are malformed"):
        normswap.apply_recipe(RepVGG(), {**recipe, "merges": [{"host": 3}]})


def test_an_error_while_applying_puts_everything_back() -> None:
    model = randomised(nn.Sequential(RepVGG(), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.fill_(3)
    for spoilt in ("0.dense.0", "1"):
        plan = normswap.plan_fold(model, merge_branches=True)
        with torch.no_grad():
            kept = model.get_submodule(spoilt).weight.clone()
            model.get_submodule(spoilt).weight.fill_(1.7e308)
        before = picture(model)
        with pytest.raises(NormswapError, match="not finite"):
            plan.apply(inplace=True)
        assert not before.differences(model)
        with torch.no_grad():
            model.get_submodule(spoilt).weight.copy_(kept)
    plan = normswap.plan_fold(model, merge_branches=True)
    model[0].forward = lambda x: x
    with pytest.raises(NormswapError, match="no longer fits the plan"):
        plan.apply(inplace=True)


# --- real models -----------------------------------------------------------------------------------------------------

REAL = ["repvgg_a0"]  # of the others `make zoo` knows


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_models_reach_what_their_own_code_reaches(name: str) -> None:
    timm = pytest.importorskip("timm")
    entry = zoo.Entry(name, "", lambda: timm.create_model(name), ((1, 3, 64, 64),))
    model = zoo.randomise(entry.build(), entry)
    (x,) = entry.inputs()
    plan = normswap.plan_fold(model, merge_branches=True)
    folded = plan.apply()
    with torch.no_grad():
        theirs, ours = model(x), folded(x)
    assert float((ours - theirs).abs().max()) <= 1e-12 * float(theirs.abs().max())
    own = running(timm.utils.reparameterize_model(model).double(), x)
    ran = running(folded, x)
    assert ran["convolution"] <= own["convolution"]
    assert not {"native_batch_norm", "add_"} & ran.keys() or name == "repghostnet_050"
    assert not plan.notes
    assert not plan.skips
    fresh = normswap.apply_recipe(entry.build(seed=1), json.loads(plan.to_json())["recipe"])
    fresh.load_state_dict(folded.state_dict(), strict=True)
    assert torch.equal(fresh(x), ours)
