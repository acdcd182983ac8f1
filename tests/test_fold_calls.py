"""Functional layers: ``F.conv1d`` to ``F.conv_transpose3d`` and ``F.linear`` whose parameters belong to a module."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from normswap.errors import NormswapError
from normswap.fold.affine import Affine
from tests.support import picture
from tests.test_fold import image, randomised, same

FUNCTIONS: dict[tuple[str, int], Any] = {
    ("conv", 1): F.conv1d,
    ("conv", 2): F.conv2d,
    ("conv", 3): F.conv3d,
    ("transposed", 1): F.conv_transpose1d,
    ("transposed", 2): F.conv_transpose2d,
    ("transposed", 3): F.conv_transpose3d,
}
NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"padding": 1, "groups": 2},
    {"stride": 2, "dilation": 2, "groups": 2},
]


class Functional(nn.Module):
    """A function with parameters of its own."""

    def __init__(self, function: Any, *shape: int, outputs: int, bias: bool = True, **arguments: Any) -> None:
        super().__init__()
        self.function, self.arguments = function, arguments
        self.weight = nn.Parameter(image(*shape).float())
        self.bias = nn.Parameter(image(outputs).float()) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias, **self.arguments)


def convolution(kind: str, spatial: int, kernel: int = 3, *, bias: bool = True, **arguments: Any) -> Functional:
    """From 4 channels to 6."""
    groups = arguments.get("groups", 1)
    channels = (4, 6 // groups) if kind == "transposed" else (6, 4 // groups)
    shape = (*channels, *[kernel] * spatial)
    return Functional(FUNCTIONS[kind, spatial], *shape, outputs=6, bias=bias, **arguments)


@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize(("kind", "spatial"), FUNCTIONS)
def test_output_side(kind: str, spatial: int, observed: bool) -> None:
    for arguments in (*ARGUMENTS, *([{"padding": "same"}] if kind == "conv" else [])):
        model = randomised(nn.Sequential(convolution(kind, spatial, **arguments), NORMS[spatial](6), nn.ReLU()))
        x = image(2, 4, *[7] * spatial)
        before = picture(model)
        plan = normswap.plan_fold(model, example_inputs=(x,) if observed else None)
        assert plan.changes[0].into == ("0.weight",)
        same(model, folded := plan.apply(), x)
        assert list(folded.state_dict()) == ["0.weight", "0.bias"]
        plan.apply(inplace=True)
        assert not torch.equal(model[0].weight, before.tensors["0.weight"])
        plan.undo()
        assert before.differences(model) == []
        fresh = normswap.apply_recipe(copy.deepcopy(model), plan.recipe)
        fresh.load_state_dict(folded.state_dict(), strict=True)
        same(model, fresh, x)


@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize(("kind", "spatial"), FUNCTIONS)
def test_input_side(kind: str, spatial: int, observed: bool) -> None:
    """With a shift only where nothing is padded, without one always."""
    cases = [
        ({"kernel": 1, "groups": 2}, True),
        ({"kernel": 3, "padding": 1}, False),
        ({"kernel": 1, "padding": 1}, False),
    ]
    if kind == "conv":
        cases += [
            ({"padding": "same"}, False),
            ({"padding": "valid", "stride": 2}, True),
            ({"padding": "same", "kernel": 1}, True),
        ]
    else:
        cases += [
            ({}, False),
            ({"kernel": 1, "stride": 2}, False),
            ({"kernel": 1, "stride": 2, "output_padding": 1}, False),
        ]
    for (arguments, even), shift in product(cases, (True, False)):
        model = nn.Sequential(nn.ReLU(), NORMS[spatial](4), convolution(kind, spatial, **arguments))
        model, x = randomised(model, shift=shift), image(2, 4, *[7] * spatial)
        plan = normswap.plan_fold(model, example_inputs=(x,) if observed else None)
        folds = even or not shift
        assert plan.changes[0].into == (("2.weight",) if folds else ()), (arguments, shift)
        assert folds or "pads with zeros (or is transposed), and the shift is not zero" in plan.changes[0].notes[0]
        same(model, plan.apply(), x)


@pytest.mark.parametrize("order", ["output", "input"])
def test_linear(order: str) -> None:
    layer = Functional(F.linear, 5, 4, outputs=5)
    parts = [layer, nn.BatchNorm1d(5)] if order == "output" else [nn.ReLU(), nn.BatchNorm1d(4), layer]
    model, x = randomised(nn.Sequential(*parts)), image(3, 4)
    plan = normswap.plan_fold(model, example_inputs=(x,))
    assert plan.changes[0].into == (f"{parts.index(layer)}.weight",)
    same(model, plan.apply(), image(6, 4))
    assert normswap.plan_fold(model).changes[0].to == "affine"  # the rank is not known


def test_a_norm_on_both_sides() -> None:
    model = randomised(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), convolution("conv", 2), nn.BatchNorm2d(6)))
    plan = normswap.plan_fold(model)
    assert [change.into for change in plan.changes] == [("2.weight",), ("2.weight",)]
    same(model, plan.apply(), image(2, 4, 6, 6))


@pytest.mark.parametrize("order", ["output", "input"])
def test_a_call_without_bias_takes_no_shift(order: str) -> None:
    for shift in (True, False):
        layer = convolution("conv", 2, bias=False)
        parts = [layer, nn.BatchNorm2d(6)] if order == "output" else [nn.ReLU(), nn.BatchNorm2d(4), layer]
        model = randomised(nn.Sequential(*parts), shift=shift)
        plan = normswap.plan_fold(model)
        assert bool(plan.changes[0].into) == (not shift)
        name = f"{parts.index(layer)}.weight"
        assert not shift or f"the call that uses {name} has no bias" in plan.changes[0].notes[0]
        same(model, plan.apply(), image(2, 4, 6, 6))


def test_overflow() -> None:
    model = nn.Sequential(convolution("conv", 2, 1), nn.BatchNorm2d(6)).eval()
    model[0].weight.data.fill_(1000.0)
    model[1].running_var.fill_(1e-6)
    plan = normswap.plan_fold(model.half())
    assert "the folded weights of 0.weight may not be finite in float16" in plan.changes[0].notes[0]
    model.double()
    plan = normswap.plan_fold(model)
    steps = plan.changes[0].fold.steps
    object.__setattr__(steps[0], "affine", Affine(steps[0].affine.scale * float("inf"), steps[0].affine.shift))
    before = picture(model)
    with pytest.raises(NormswapError, match=r"1 into 0.weight: the folded values are not finite"):
        plan.apply(inplace=True)
    assert before.differences(model) == []


class Own(nn.Module):
    """A convolution and a norm; subclasses read the weight in other ways too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(image(3, 3, 1, 1).float()), nn.Parameter(image(3).float())
        self.norm = nn.BatchNorm2d(3)
        self.held: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.weight, self.bias)) + self.extra(x)

    def extra(self, x: Tensor) -> Any:
        return 0


class ReadsTheShape(Own):
    def extra(self, x: Tensor) -> Any:
        return self.weight.shape[0]


class Twice(Own):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(self.norm(F.conv2d(x, self.weight, self.bias)), self.weight, self.bias))


class Holds(Own):
    """The parameters are those of a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        del self.weight, self.bias
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.conv.weight, bias=self.conv.bias)) + self.extra(x)


class InAList(Own):
    def __init__(self) -> None:
        super().__init__()
        del self.weight, self.bias
        self.parts = nn.ParameterList([image(3, 3, 1, 1).float(), image(3).float()])

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(input=x, weight=self.parts[0], bias=self.parts[1]))


@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize(
    ("cls", "into"),
    [(Own, "weight"), (ReadsTheShape, "weight"), (Twice, "weight"), (Holds, "conv.weight"), (InAList, "parts.0")],
)
def test_folds(cls: type[Own], into: str, observed: bool) -> None:
    model, x = randomised(cls()), image(2, 3, 4, 4)
    plan = normswap.plan_fold(model, example_inputs=(x,) if observed else None)
    if observed and cls in (Holds, InAList):
        assert "is also read elsewhere" in plan.changes[0].notes[0]  # by another module than the one that has it
    else:
        assert plan.changes[0].into == (into,)
    same(model, plan.apply(), x)


class ReadsTheWeight(Own):
    def extra(self, x: Tensor) -> Any:
        return self.weight.sum()


class ReadsTheBias(Own):
    def extra(self, x: Tensor) -> Any:
        return self.bias.sum()


class CallsAgain(Own):
    def extra(self, x: Tensor) -> Any:
        return F.conv2d(x, self.weight, self.bias)


class OtherBias(Own):
    def extra(self, x: Tensor) -> Any:
        return F.conv2d(x, self.weight)


class TwoBiases(Own):
    """Both calls lead to the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Parameter(image(3).float().neg())

    def forward(self, x: Tensor) -> Tensor:
        first = self.norm(F.conv2d(x, self.weight, self.bias))
        return first + self.norm(F.conv2d(x.relu(), self.weight, self.second))


class TwoFunctions(Own):
    """The weight's axes mean different channels."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.norm(F.conv2d(x, self.weight, self.bias))
        return first + self.norm(F.conv_transpose2d(x, self.weight, self.bias))


class Hooked(Own):
    def __init__(self) -> None:
        super().__init__()
        self.register_forward_pre_hook(clip)


def clip(module: nn.Module, _inputs: Any) -> None:
    module.weight.data.clamp_(-1, 1)


class AsInput(Own):
    def extra(self, x: Tensor) -> Any:
        return F.conv2d(self.weight, self.weight, self.bias).sum()


class Indirectly(Own):
    def extra(self, x: Tensor) -> Any:
        return self._parameters["weight"].sum()


class Computes(Own):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, 2 * self.weight, self.bias))


class ComputesBias(Own):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.weight, self.bias.abs()))


class Buffers(Own):
    def __init__(self) -> None:
        super().__init__()
        weight = self.weight.data
        del self.weight
        self.register_buffer("weight", weight)


class Keeps(Own):
    def extra(self, x: Tensor) -> Any:
        self.last = self.weight
        return 0


class CalledToo(Holds):
    def extra(self, x: Tensor) -> Any:
        return self.conv(x)


class Held(Own):
    def __init__(self) -> None:
        super().__init__()
        self.held = [self.weight]


class Tied(Own):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(3, 3, 1)
        self.other.weight = self.weight

    def extra(self, x: Tensor) -> Any:
        return self.other(x)


@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (ReadsTheWeight, "weight is also read elsewhere"),
        (ReadsTheBias, "bias is also read elsewhere"),
        (CallsAgain, "weight is called at 2 sites and only 1 of them lead to this norm"),
        (OtherBias, "different biases|called at 2 sites"),
        (TwoBiases, "weight is used with different biases"),
        (TwoFunctions, "weight is used by different functions"),
        (Hooked, "the module that holds weight has hooks (clip)"),
        (AsInput, "weight is also read elsewhere"),
        (Indirectly, "weight is also read elsewhere"),
        (Computes, "conv2d: its weight is no parameter of a module"),
        (ComputesBias, "conv2d: its bias is no parameter of a module"),
        (Buffers, "conv2d: its weight is no parameter of a module"),
        (Keeps, "weight is also read elsewhere"),
        (CalledToo, "conv is also called|conv.weight is also read elsewhere"),
        (Held, "weight is also read elsewhere"),
        (Tied, "weight is shared with other"),
    ],
)
def test_is_left(cls: type[Own], reason: str, observed: bool) -> None:
    model, x = randomised(cls()), image(2, 3, 4, 4)
    plan = normswap.plan_fold(model, example_inputs=(x,) if observed else None)
    assert plan.changes[0].to == "affine"
    assert any(text in plan.changes[0].notes[0] for text in reason.split("|")), plan.changes[0].notes
    same(model, plan.apply(), x)


class Root(nn.Module):
    """A root that FX cannot trace."""

    def __init__(self, reads: str) -> None:
        super().__init__()
        self.block, self.reads = Own(), reads

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e30:
            return x
        out = self.block(x)
        if self.reads == "weight":
            out = out + self.block.weight.sum()
        elif self.reads == "loop":
            out = out + sum(part.weight.sum() for part in (self.block,))
        return out


class PlainRoot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Own()

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 1e30 else self.block(self.block(x))


@pytest.mark.parametrize("observed", [False, True])
def test_a_root_that_cannot_be_traced(observed: bool) -> None:
    x = image(2, 3, 4, 4)
    for reads in ("weight", "loop"):
        model = randomised(Root(reads))
        plan = normswap.plan_fold(model, example_inputs=(x,) if observed else None)
        assert not any(change.into for change in plan.changes)
        same(model, plan.apply(), x)
    model = randomised(PlainRoot())
    plan = normswap.plan_fold(model, example_inputs=(x,) if observed else None)
    assert plan.changes[0].into == ("block.weight",)
    same(model, plan.apply(), x)


def test_a_norm_does_not_fold_into_what_it_gives_as_a_weight() -> None:
    class Dynamic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.norm(x.relu()))

    model, x = randomised(Dynamic()), image(2, 3, 4, 4)
    plan = normswap.plan_fold(model)
    assert "its weight is no parameter" in plan.changes[0].notes[0]
    same(model, plan.apply(), x)
