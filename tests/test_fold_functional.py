"""Functional norms with fixed statistics fold like modules, and nothing of the call is left in the forward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import normswap
from normswap.engine import folding, lifting
from normswap.norms.affine import ChannelAffine
from tests.support import (
    DOUBLE,
    batch_norms_run,
    check_copies,
    check_fold,
    distance,
    only,
    operators,
    picture,
    randomise,
    sample,
)

aten = torch.ops.aten


class Tensors(nn.Module):
    """The tensors of a norm of 6 channels, and a convolution on either side."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.after = nn.Conv2d(6, 5, 1)
        self.weight = nn.Parameter(torch.zeros(6))
        self.bias = nn.Parameter(torch.zeros(6))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("running_var", torch.ones(6))
        self.register_buffer("num_batches_tracked", torch.tensor(0))


def made(forward: Callable[[Any, Tensor], Tensor], cls: type[nn.Module] = Tensors) -> nn.Module:
    model = type("Model", (cls,), {"forward": forward})()
    return randomise(model.double()).eval()


def norm(m: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, m.mean, m.running_var, m.weight, m.bias, m.training, 0.2, 1e-3)


CALLS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "F.batch_norm": norm,
    "by name, no affine": lambda m, x: F.batch_norm(input=x, running_var=m.running_var, running_mean=m.mean),
    "frozen by hand": lambda m, x: F.batch_norm(x, m.mean, m.running_var, m.weight, m.bias),
    "torch.batch_norm": lambda m, x: torch.batch_norm(
        x, m.weight, m.bias, m.mean, m.running_var, m.training, 0.1, 1e-5, False
    ),
    "aten.batch_norm": lambda m, x: aten.batch_norm.default(
        x, m.weight, m.bias, m.mean, m.running_var, m.training, 0.1, 1e-5, False
    ),
    "F.instance_norm with statistics": lambda m, x: F.instance_norm(
        x, m.mean, m.running_var, m.weight, m.bias, use_input_stats=m.training
    ),
}
IMAGE = (2, 4, 5, 5)


def checked(model: nn.Module, **options: Any) -> tuple[normswap.Plan, nn.Module]:
    return check_fold(model, sample(*IMAGE), **options)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("observed", [False, True])
def test_backward_into_the_layer_in_front(name: str, observed: bool) -> None:
    call = CALLS[name]
    model = made(lambda self, x: F.relu(call(self, self.before(x))) + 1)
    plan, folded = checked(model, example_inputs=(sample(*IMAGE),) if observed else None)
    change = only(plan.changes)
    assert (change.to, change.into, change.functional) == ("identity", ("before",), True)
    assert change.evidence == ("observed" if observed else "static")
    assert plan.skips == []
    assert "Python branches" in only(list(change.notes))
    assert batch_norms_run(folded, sample(*IMAGE)) == 0
    assert isinstance(folded, type(model))
    assert [key for key, _ in folded.named_children()] == ["before", "after"]
    assert {"mean", "running_var"} & set(folded.state_dict()) == set()
    assert not any(isinstance(module, nn.Identity) for module in folded.modules())


def test_forward_into_the_layer_behind() -> None:
    plan, folded = checked(made(lambda self, x: self.after(norm(self, F.relu(self.before(x))))))
    assert only(plan.changes).into == ("after",)
    assert operators(lambda: folded(sample(*IMAGE)))["convolution"] == 2
    assert batch_norms_run(folded, sample(*IMAGE)) == 0


def test_between_two_activations_a_multiply_add_is_left() -> None:
    model = made(lambda self, x: F.relu(norm(self, F.relu(self.before(x)))))
    plan, folded = checked(model)
    change = only(plan.changes)
    assert (change.name, change.to) == ("batch_norm", "affine")
    assert "relu stands between" in change.notes[0]
    assert isinstance(folded.batch_norm, ChannelAffine)
    assert batch_norms_run(folded, sample(*IMAGE)) == 0
    kept, same = checked(model, keep_batchnorm=True)
    assert kept.changes == []
    assert "relu stands between" in only(kept.skips).reason
    assert type(same) is type(model)


def test_kept_norms_stay_functional_beside_folded_ones() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return norm(self, F.relu(norm(self, self.before(x))))

    model = made(forward)
    plan, folded = checked(model, keep_batchnorm=True)
    assert [change.name for change in plan.changes] == ["batch_norm"]
    assert [skip.name for skip in plan.skips] == ["batch_norm_1"]
    assert batch_norms_run(folded, sample(*IMAGE)) == 1
    assert torch.equal(folded.mean, model.mean)  # both norms use the same tensors
    both, folded = checked(model)
    assert [(change.name, change.to) for change in both.changes] == [
        ("batch_norm", "identity"),
        ("batch_norm_1", "affine"),
    ]
    assert "mean" not in folded.state_dict()


def test_a_chain_of_norms_composes() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return norm(self, self.module_norm(norm(self, self.before(x))))

    class WithModule(Tensors):
        def __init__(self) -> None:
            super().__init__()
            self.module_norm = nn.BatchNorm2d(6)

    plan, folded = checked(made(forward, WithModule))
    assert [change.into for change in plan.changes] == [("before",)] * 3
    assert batch_norms_run(folded, sample(*IMAGE)) == 0


@pytest.mark.parametrize(
    ("selectors", "folds"),
    [
        ({"where": "*.batch_norm"}, ["0.batch_norm", "1.batch_norm"]),
        ({"skip": "0.batch_norm"}, ["1.batch_norm"]),
        ({"where": lambda name, norm: name.startswith("0") and norm.channels == 6}, ["0.batch_norm"]),
    ],
)
def test_selectors_know_the_call_by_its_name(selectors: dict[str, Any], folds: list[str]) -> None:
    class Block(Tensors):
        def forward(self, x: Tensor) -> Tensor:
            return self.after(F.relu(norm(self, self.before(x))))[:, :4]

    model = randomise(nn.Sequential(Block(), Block()).double()).eval()
    plan, folded = checked(model, **selectors)
    assert [change.name for change in plan.changes] == folds
    assert batch_norms_run(folded, sample(*IMAGE)) == 2 - len(folds)
    assert all("skip" in skip.reason or "where" in skip.reason for skip in plan.skips)
    with pytest.raises(normswap.NormswapError, match="no norm is called"):
        normswap.plan_fold(model, where="2.batch_norm")


class OwnForward(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )


def test_a_norm_class_with_a_forward_of_its_own() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(4, 6, 3), OwnForward(6), nn.ReLU()).double()).eval()
    plan, folded = checked(model)
    assert only(plan.changes).into == ("0",)
    assert list(folded.state_dict()) == ["0.weight", "0.bias"]
    assert batch_norms_run(folded, sample(*IMAGE)) == 0


def test_a_graph_module() -> None:
    model = fx.symbolic_trace(made(lambda self, x: F.relu(norm(self, self.before(x)))))
    plan, folded = checked(model)
    assert only(plan.changes).into == ("before",)
    assert only(plan.changes).notes == ()
    assert batch_norms_run(folded, sample(*IMAGE)) == 0
    assert isinstance(folded, fx.GraphModule)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's copy of an exported program
def test_an_exported_program() -> None:
    body = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6))
    source = randomise(body.double()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.export.export(source, (sample(*IMAGE),)).module()
    plan, folded = checked(model)
    assert [change.name for change in plan.changes] == ["1", "3"]
    assert batch_norms_run(folded, sample(*IMAGE)) == 0
    assert not any("running_mean" in key for key in folded.state_dict())


def test_in_the_traceable_part_of_an_untraceable_model() -> None:
    class Block(Tensors):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(norm(self, self.before(x)))

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) if float(x.sum()) > 1e9 else self.block(x) * 2

    plan, folded = checked(randomise(Root().double()).eval())
    assert only(plan.changes).into == ("block.before",)
    assert batch_norms_run(folded, sample(*IMAGE)) == 0


def test_a_block_that_is_called_twice() -> None:
    class Block(Tensors):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(norm(self, self.before(x)))[:, :4]

    block = Block()
    model = randomise(nn.Sequential(block, nn.ReLU(), block).double()).eval()
    plan, folded = checked(model)
    assert only(plan.changes).into == ("0.before",)
    assert only(plan.changes).aliases == ("2.batch_norm",)
    assert folded[0] is folded[2]
    assert batch_norms_run(folded, sample(*IMAGE)) == 0


def test_results_copy_and_pickle() -> None:
    folded = normswap.fold(randomise(AtModuleScope().double()).eval())
    assert batch_norms_run(folded, sample(*IMAGE)) == 0
    check_copies(folded, sample(*IMAGE))


class AtModuleScope(Tensors):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(norm(self, F.relu(norm(self, self.before(x)))))


def test_inplace_is_the_model_itself() -> None:
    model = randomise(AtModuleScope().double()).eval()
    wanted = model(sample(*IMAGE))
    assert normswap.fold(model, inplace=True) is model
    assert distance(model(sample(*IMAGE)), wanted) < DOUBLE
    assert batch_norms_run(model, sample(*IMAGE)) == 0


# --- left alone -----------------------------------------------------------------------------------------------------


def left(model: nn.Module, reason: str, **options: Any) -> None:
    before = picture(model)
    plan = normswap.plan_fold(model, **options)
    assert before.differences(model) == []
    assert plan.changes == []
    assert reason in only(plan.skips).reason, plan


def test_train_mode() -> None:
    left(made(lambda self, x: norm(self, self.before(x))).train(), "train mode")


def test_the_flag_of_the_module_that_calls_it_counts() -> None:
    class Block(Tensors):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(norm(self, self.before(x)))[:, :4]

    model = randomise(nn.Sequential(Block(), Block()).double()).eval()
    model[0].train()
    plan = normswap.plan_fold(model)
    assert [change.name for change in plan.changes] == ["1.batch_norm"]
    assert "train mode" in only(plan.skips).reason


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: F.batch_norm(x, None, None, m.weight, m.bias, True),
        lambda m, x: F.instance_norm(x, weight=m.weight, bias=m.bias),
        lambda m, x: F.batch_norm(x, m.mean, m.running_var, m.weight, m.bias, True),
    ],
)
def test_statistics_of_the_input(call: Callable[[Any, Tensor], Tensor]) -> None:
    left(made(lambda self, x: call(self, self.before(x))), "computes its statistics from each input")


@pytest.mark.parametrize("affine", [False, True])
def test_a_norm_of_a_weight(affine: bool) -> None:
    class Standardised(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(4, 6, 3)
            self.gain = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            gain = self.gain if affine else None
            weight = F.batch_norm(self.weight.reshape(1, 6, -1), None, None, weight=gain, training=True)
            return F.conv2d(x, weight.reshape_as(self.weight), self.bias)

    left(randomise(nn.Sequential(Standardised()).double()).eval(), "it normalizes a weight, not an activation")


def test_tensors_with_another_reader_in_the_forward() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return norm(self, self.before(x)) * self.mean.sum()

    left(made(forward), "also reads its running_mean directly")


def test_tensors_with_another_reader_above() -> None:
    class Block(Tensors):
        def forward(self, x: Tensor) -> Tensor:
            return norm(self, self.before(x))

    class Above(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) + self.block.mean.sum()

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block()])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x) + block.mean.sum() if float(x.sum()) < 1e9 else x
            return x

    left(randomise(Above().double()).eval(), "reads the 'mean' that its norm uses")
    for example in (None, (sample(*IMAGE),)):
        left(randomise(Loop().double()).eval(), "reads the mean of some module", example_inputs=example)


def test_a_forward_that_cannot_be_traced() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return norm(self, self.before(x)) if float(x.sum()) < 1e9 else x

    left(made(forward), "cannot be traced")


class Shifted(Tensors):
    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        x = norm(self, self.before(x))
        return x if shift is None else x + shift


class CallsShifted(nn.Module):
    def __init__(self, given: bool) -> None:
        super().__init__()
        self.block, self.given = Shifted(), given

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, x.mean()) if self.given else self.block(x)


def test_a_forward_that_is_called_with_an_optional_argument() -> None:
    model = randomise(CallsShifted(given=True).double()).eval()
    left(model, "called with optional arguments, which a generated forward does not take")
    left(model, "call its forward with optional arguments", example_inputs=(sample(*IMAGE),))
    plan, _ = checked(randomise(CallsShifted(given=False).double()).eval())
    assert only(plan.changes).into == ("block.before",)


def test_holders_of_tensors_with_hooks() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.norm = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            norm = self.norm
            return F.batch_norm(self.before(x), norm.running_mean, norm.running_var, norm.weight, norm.bias)

    model = randomise(Holder().double()).eval()
    plan, folded = checked(model)
    assert only(plan.changes).into == ("before",)
    assert isinstance(folded.norm, nn.Identity)
    model.norm.register_forward_hook(lambda *_: None)
    left(model, "the module that holds its tensors has hooks")


def test_not_finite() -> None:
    model = made(lambda self, x: norm(self, self.before(x)))
    model.running_var[2] = -1
    left(model, "not finite")


def test_a_layer_whose_bias_a_kept_norm_uses() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.relu(self.module_norm(self.layer(x)))
        return F.batch_norm(x, self.mean, self.running_var, self.weight, self.layer.bias)

    class Model(Tensors):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.module_norm = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)

    plan, _ = checked(made(forward, Model), keep_batchnorm=True)
    reasons = {skip.name: skip.reason for skip in plan.skips}
    assert "layer shares its weight with batch_norm" in reasons["module_norm"]
    assert "relu stands between" in reasons["batch_norm"]


def test_an_error_while_it_is_made_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(nn.Sequential(AtModuleScope(), nn.Conv2d(6, 3, 1), nn.BatchNorm2d(3)).double()).eval()
    before = picture(model)
    plan = normswap.plan_fold(model)
    assert len(plan.changes) == 3

    def broken(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(lifting, "lift", broken)
        for undoable in (True, False):
            with pytest.raises(RuntimeError):
                plan.apply(inplace=True, undoable=undoable)
            assert before.differences(model) == []
    with monkeypatch.context() as patch:
        patch.setattr(folding.layers, "absorb", broken)
        with pytest.raises(RuntimeError):
            plan.apply(inplace=True)
    assert before.differences(model) == []


def test_an_error_while_it_is_planned_leaves_the_model_as_it_was() -> None:
    model = randomise(AtModuleScope().double()).eval()
    before = picture(model)
    with pytest.raises(normswap.NormswapError, match="does not run"):
        normswap.plan_fold(model, example_inputs=(sample(2, 3, 5, 5),))
    assert before.differences(model) == []


def test_a_recipe_for_another_model() -> None:
    recipe = normswap.plan_fold(randomise(AtModuleScope().double()).eval()).recipe
    with pytest.raises(normswap.NormswapError, match="no norm there"):
        normswap.apply_recipe(nn.Sequential(nn.Conv2d(3, 3, 1)).eval(), recipe)
