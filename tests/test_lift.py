"""Functional norms of every family become modules in the smallest region, and the rest of the forward stays."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from normswap import convert, find, plan_convert
from tests.support import DOUBLE, check_copies, distance, only, picture, randomise, sample

aten = torch.ops.aten


class Tensors(nn.Module):
    """Parameters and statistics of a norm of 6 channels, and of one of 5 on the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6))
        self.bias = nn.Parameter(torch.zeros(6))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("running_var", torch.zeros(6))
        self.last_weight = nn.Parameter(torch.zeros(5))
        self.last_bias = nn.Parameter(torch.zeros(5))
        self.other = nn.Parameter(torch.zeros(1))
        self.conv = nn.Conv2d(6, 6, 1)


def family(call: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    """A model that computes with a functional norm between other things; ``call(self, x)``."""

    class Model(Tensors):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(call(self, self.conv(x) * self.other)) + x

    return randomise(Model().double())


def affine(m: Any) -> dict[str, Tensor]:
    return {"weight": m.weight, "bias": m.bias}


FAMILIES: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "F.batch_norm": (
        lambda m, x: F.batch_norm(x, m.mean, m.running_var, m.weight, m.bias, m.training, 0.2, 1e-3),
        "batch",
    ),
    "F.batch_norm by name": (
        lambda m, x: F.batch_norm(
            input=x, running_mean=m.mean, running_var=m.running_var, training=m.training, **affine(m)
        ),
        "batch",
    ),
    "F.batch_norm, frozen": (lambda m, x: F.batch_norm(x, m.mean, m.running_var, **affine(m)), "frozen"),
    "F.batch_norm, of the batch": (lambda m, x: F.batch_norm(x, None, None, m.weight, m.bias, True), "batch"),
    "torch.batch_norm": (
        lambda m, x: torch.batch_norm(x, m.weight, m.bias, m.mean, m.running_var, m.training, 0.1, 1e-5, False),
        "batch",
    ),
    "aten.batch_norm": (
        lambda m, x: aten.batch_norm.default(x, m.weight, m.bias, m.mean, m.running_var, m.training, 0.1, 1e-5, False),
        "batch",
    ),
    "F.instance_norm": (lambda m, x: F.instance_norm(x, **affine(m)), "instance"),
    "F.instance_norm with statistics": (
        lambda m, x: F.instance_norm(x, m.mean, m.running_var, m.weight, m.bias, use_input_stats=m.training),
        "instance",
    ),
    "torch.instance_norm": (
        lambda m, x: torch.instance_norm(x, m.weight, m.bias, None, None, True, 0.1, 1e-5, False),
        "instance",
    ),
    "F.group_norm": (lambda m, x: F.group_norm(x, 2, m.weight, m.bias, 1e-3), "group"),
    "F.group_norm by name": (lambda m, x: F.group_norm(x, num_groups=3, **affine(m)), "group"),
    "torch.group_norm": (lambda m, x: torch.group_norm(x, 2, m.weight, m.bias), "group"),
    "F.layer_norm": (lambda m, x: F.layer_norm(x, (5,), m.last_weight, m.last_bias), "layer"),
    "F.layer_norm by name": (lambda m, x: F.layer_norm(x, normalized_shape=[5], weight=m.last_weight), "layer"),
    "torch.layer_norm": (lambda m, x: torch.layer_norm(x, [5], m.last_weight, m.last_bias), "layer"),
    "F.rms_norm": (lambda m, x: F.rms_norm(x, (5,), m.last_weight), "rms"),
    "torch.rms_norm": (lambda m, x: torch.rms_norm(x, (5,), m.last_weight, 1e-3), "rms"),
}
EXACT = {"batch": "sync", "frozen": "batch", "group": None, "instance": None, "layer": None, "rms": None}


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str) -> None:
    call, kind = FAMILIES[name]
    model, x = family(call), sample(3, 6, 4, 5)
    site = only(find(model))
    assert site.reason is None
    assert site.functional
    assert site.norm is not None
    assert site.norm.kind == kind
    target = {"layer": "rms", "rms": "layer"}.get(kind, "layer" if kind == "group" else "group")
    plan = plan_convert(model, target)
    change = only(plan.changes)
    new = plan.apply()
    assert only(find(new)).norm.kind == target
    assert isinstance(new, type(model))
    assert type(new).__name__ == "Model"
    module = new.get_submodule(change.name)
    for training in (True, False):
        new.train(training)
        wanted = torch.relu(module(new.conv(x) * new.other)) + x
        assert distance(new(x), wanted) < DOUBLE


@pytest.mark.parametrize("name", [name for name, (_, kind) in FAMILIES.items() if EXACT[kind]])
def test_an_exact_change_computes_the_same_in_train_and_eval(name: str) -> None:
    call, kind = FAMILIES[name]
    model, x = family(call), sample(3, 6, 4, 5)
    if name == "F.batch_norm, of the batch":
        pytest.skip("a batch norm is what it stays")
    plan = plan_convert(model, str(EXACT[kind]))
    assert only(plan.changes).exactness == "exact"
    new = plan.apply()
    assert distance(new.eval()(x), model.eval()(x)) < DOUBLE
    if kind == "batch":
        assert distance(new.train()(x), model.train()(x)) < DOUBLE
        module = new.get_submodule(only(plan.changes).name)
        assert distance(module.running_mean, model.mean) < DOUBLE
        assert distance(module.running_var, model.running_var) < DOUBLE


def test_only_the_norms_keys_change() -> None:
    model = family(FAMILIES["F.batch_norm"][0])
    new = convert(model, "sync")
    gone, come = set(model.state_dict()) - set(new.state_dict()), set(new.state_dict()) - set(model.state_dict())
    assert gone == {"weight", "bias", "mean", "running_var"}
    assert come == {
        f"batch_norm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    assert new.batch_norm.weight is not model.weight
    inplace = convert(model, "sync", inplace=True)
    assert inplace is model


def test_the_parameters_are_the_same_objects() -> None:
    model = family(FAMILIES["F.batch_norm"][0])
    weight, conv = model.weight, model.conv
    convert(model, "group", inplace=True)
    assert model.batch_norm.weight is weight
    assert model.conv is conv


def test_results_copy_and_pickle() -> None:
    new = convert(family_of_module_scope(), "layer")
    check_copies(new, sample(2, 6, 3, 3))


class AtModuleScope(Tensors):
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 2, self.weight, self.bias) + torch.arange(3)


def family_of_module_scope() -> nn.Module:
    return randomise(AtModuleScope().double())


def test_a_module_is_itself_after_a_lift() -> None:
    model = nn.Sequential(family_of_module_scope())
    calls: list[str] = []
    inner = model[0]
    inner.tag = "kept"
    inner.register_forward_hook(lambda *_: calls.append("hook"))
    convert(model, "layer", inplace=True)
    model(sample(2, 6, 3, 3))
    assert model[0] is inner
    assert (inner.tag, calls) == ("kept", ["hook"])
    assert isinstance(inner, AtModuleScope)


def test_constants_of_the_forward_live_on() -> None:
    model = family_of_module_scope()
    x = sample(2, 6, 3, 3)
    new = convert(model, "layer")
    assert distance(new(x), F.group_norm(x, 1, model.weight, model.bias) + torch.arange(3)) < DOUBLE
    assert not [name for name in vars(model) if name.startswith("_tensor_constant")]


class Doubled(nn.BatchNorm2d):
    """Keeps what surrounds the norm in it."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x + 1)


@pytest.mark.parametrize("kind", ["frozen", "sync", "batch", "group", "switchable"])
def test_a_subclass_with_a_forward_keeps_it(kind: str) -> None:
    model, x = nn.Sequential(randomise(Doubled(6).double())).eval(), sample(3, 6, 4, 5)
    plan = plan_convert(model, kind, init="preserve" if kind == "switchable" else "copy")
    if kind == "batch":
        assert "already is" in only(plan.skips).reason
        return
    change = only(plan.changes)
    assert change.name == "0.batch_norm"
    assert "its forward is generated" in change.notes[-1]
    new = plan.apply()
    assert not isinstance(new[0], nn.BatchNorm2d)
    wanted = 2 * new[0].batch_norm(x + 1)
    assert distance(new(x), wanted) < DOUBLE
    if change.exactness == "exact":
        assert distance(new(x), model(x)) < 1e-6


def test_converting_twice() -> None:
    model, x = nn.Sequential(randomise(Doubled(6).double())).eval(), sample(3, 6, 4, 5)
    frozen = convert(model, "frozen")
    back = convert(frozen, "batch")
    assert distance(back.eval()(x), model(x)) < DOUBLE
    assert back[0].batch_norm.weight.requires_grad
    lifted = convert(convert(family_of_module_scope(), "layer"), "group", groups=3)
    assert lifted.group_norm.num_groups == 3


def test_the_module_whose_tensors_it_uses_takes_the_new_norms_place() -> None:
    class Borrowed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            bn = self.bn
            return F.batch_norm(
                x, bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training, bn.momentum, bn.eps
            )

    model, x = randomise(Borrowed().double()), sample(3, 6, 4, 5)
    plan = plan_convert(model, "sync")
    assert only(plan.changes).name == "bn"
    assert not plan.skips
    new = plan.apply()
    assert distance(new.eval()(x), model.eval()(x)) < DOUBLE
    assert list(new.state_dict()) == list(model.state_dict())


def test_several_calls_and_a_module_called_as_well() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(6)
            self.w = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            x = F.group_norm(self.bn(x), 2, self.w)
            return F.group_norm(x, 3, self.w) + self.w.sum()

    model = randomise(Both().double())
    plan = plan_convert(model, "layer")
    assert sorted(change.name for change in plan.changes) == ["bn", "group_norm", "group_norm_1"]
    new, x = plan.apply(), sample(3, 6, 4, 5)
    wanted = new.group_norm_1(new.group_norm(new.bn(x))) + model.w.sum()
    assert distance(new(x), wanted) < DOUBLE
    assert new.w is new.group_norm.weight is new.group_norm_1.weight, "a shared parameter stays shared"
    assert new.bn.weight is not new.w


def test_several_norms_selected_one_by_one() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(6))
            self.v = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return F.group_norm(F.group_norm(x, 2, self.w), 3, self.v)

    model = randomise(Two().double())
    plan = plan_convert(model, "layer", where="group_norm_1")
    assert [change.name for change in plan.changes] == ["group_norm_1"]
    new, x = plan.apply(), sample(2, 6, 3, 3)
    assert distance(new(x), new.group_norm_1(F.group_norm(x, 2, new.w))) < DOUBLE
    assert {site.name for site in find(new)} == {"group_norm", "group_norm_1"}
    rest = convert(new, "layer")
    assert distance(rest(x), rest.group_norm_1(F.group_norm(x, 1, new.w))) < DOUBLE


def test_a_tensor_that_another_layer_uses_stays_there() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 5)
            self.scale = Scale()

        def forward(self, x: Tensor) -> Tensor:
            x = F.layer_norm(self.linear(x), (5,), self.linear.bias)
            return F.group_norm(self.scale(x), 2, self.scale.weight)

    model, x = randomise(Shares().double()), sample(2, 6, 4, 5)
    plan = plan_convert(model, "rms")
    assert [change.name for change in plan.changes] == ["layer_norm", "group_norm"]
    new = plan.apply()
    assert new.linear.bias is new.layer_norm.weight
    assert new.scale.weight is new.group_norm.weight
    assert distance(new(x), new.group_norm(new.scale(new.layer_norm(new.linear(x))))) < DOUBLE


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.reshape(-1, 1, 1)


def test_a_called_norm_of_another_kind_is_not_mistaken_for_the_function() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(2, 6)

        def forward(self, x: Tensor) -> Tensor:
            return F.instance_norm(self.norm(x), weight=self.norm.weight, bias=self.norm.bias)

    plan = plan_convert(Mixed(), "layer")
    assert {part.name for part in (*plan.changes, *plan.skips)} == {"norm", "instance_norm"}


def test_a_parent_that_reads_the_tensors() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return F.group_norm(x, 2, self.weight)

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.inner.weight.sum()

    skip = only(plan_convert(Parent(), "layer").skips)
    assert (skip.name, skip.reason) == ("inner.group_norm", "Parent.forward reads the 'weight' that its norm uses")


class Counts(Tensors):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return F.group_norm(x, 2, self.weight)


class Draws(Tensors):
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 2, self.weight) if random.random() < 2 else x


class NoGrad(Tensors):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 2, self.weight)


class Branches(Tensors):
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 2, self.weight) if x.sum() > 0 else x


class Computed(Tensors):
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 2, self.weight + 1)


class Other(Tensors):
    def forward(self, x: Tensor) -> Tensor:
        return torch.native_group_norm(x, self.weight, None, x.shape[0], 6, 9, 2, 1e-5)[0]


class Modes(Tensors):
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 2, self.weight) if self.training else F.layer_norm(x, (3,))


class Nameless(Tensors):
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 2)


class Made(Tensors):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, torch.zeros(6), torch.ones(6), self.weight)


class Shaped(Tensors):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.last_weight)


class Writes(Tensors):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(1)
        out[0] = x.sum()
        return F.group_norm(x, 2, self.weight) + out


class Container(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.ReLU())
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(super().forward(x), 2, self.weight)


REFUSED: dict[type[nn.Module], str] = {
    Made: "running_mean is made in the forward",
    Shaped: "shape is computed in the forward",
    Writes: "writes into a tensor that it makes itself",
    Container: "container",
    Counts: "it sets calls",
    Draws: "draws random numbers",
    NoGrad: "switches gradients",
    Branches: "cannot be traced",
    Computed: "weight is computed in the forward",
    Other: "returns its statistics too",
    Modes: "other norms in train mode than in eval mode",
    Nameless: "its channels are not known",
}


@pytest.mark.parametrize("cls", REFUSED, ids=lambda cls: cls.__name__)
def test_what_cannot_be_lifted_is_listed_and_untouched(cls: type[nn.Module]) -> None:
    model = nn.Sequential(cls())
    before = picture(model)
    plan = plan_convert(model, "layer")
    assert not plan.changes
    skip = only(plan.skips)
    assert skip.name.startswith("0.")
    assert REFUSED[cls] in skip.reason
    assert "<built-in" not in skip.reason
    assert before.differences(model) == []


def test_a_forward_replaced_on_the_instance_is_listed() -> None:
    model = AtModuleScope()
    model.forward = lambda x: F.group_norm(x, 3, model.weight)  # type: ignore[method-assign, assignment]
    skip = only(plan_convert(nn.Sequential(model), "layer").skips)
    assert "replaced on the instance" in skip.reason


def test_a_branch_on_training_is_kept() -> None:
    class Drops(Tensors):
        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(F.group_norm(x, 2, self.weight), 0.5, self.training)
            return x * 3 if self.training else x

    model, x = randomise(Drops().double()), sample(2, 6, 3, 3)
    new = convert(model, "layer")
    wanted = new.group_norm(x)
    assert distance(new.eval()(x), wanted) < DOUBLE
    torch.manual_seed(3)
    out = new.train()(x)
    torch.manual_seed(3)
    assert distance(out, F.dropout(wanted, 0.5) * 3) < DOUBLE
    assert distance(copy.deepcopy(new).eval()(x), wanted) < DOUBLE


def test_isinstance_in_a_lifted_forward() -> None:
    class Asks(Tensors):
        def forward(self, x: Tensor | list[Tensor]) -> Tensor:
            if isinstance(x, Tensor):
                x = x * 2 + 1
            return F.group_norm(x, 2, self.weight, eps=1.0)  # type: ignore[arg-type]

    new, x = convert(randomise(Asks().double()), "layer"), sample(2, 6, 3, 3)
    assert distance(new(x), new.group_norm(x * 2 + 1)) < DOUBLE


def test_keyword_and_optional_arguments_of_a_lifted_forward() -> None:
    class Takes(Tensors):
        def forward(self, x: Tensor, mask: Tensor | None = None, *, shift: Tensor) -> Tensor:
            if mask is not None:
                x = x * mask
            return F.group_norm(x, 2, self.weight) + shift

    new, x = convert(randomise(Takes().double()), "layer"), sample(2, 6, 3, 3)
    wanted = new.group_norm(x) + 1
    assert distance(new(x, shift=torch.ones(1)), wanted) < DOUBLE
    assert distance(new(x=x, mask=None, shift=torch.ones(1)), wanted) < DOUBLE
    with pytest.raises(ValueError, match=r"mask=a tensor of shape \(2, 6, 3, 3\).*skip="):
        new(x, mask=x, shift=torch.ones(1))


def test_old_counting_forwards_are_skipped_by_name() -> None:
    class Old(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            self.num_batches_tracked = self.num_batches_tracked + 1
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)

    skip = only(plan_convert(nn.Sequential(Old(4)), "group").skips)
    assert skip.name == "0"
    assert "Old has a forward of its own" in skip.reason


class TestGraphModule:
    def test_modules_and_functions(self) -> None:
        class Inner(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.bn = nn.BatchNorm2d(6)
                self.w = nn.Parameter(torch.ones(6))

            def forward(self, x: Tensor) -> Tensor:
                return F.group_norm(self.bn(x), 2, self.w)

        model, x = fx.symbolic_trace(randomise(Inner().double())), sample(2, 6, 3, 3)
        before = picture(model)
        new = convert(model, "layer")
        assert before.differences(model) == []
        assert isinstance(new, fx.GraphModule)
        new.graph.lint()
        assert distance(new(x), new.group_norm(new.bn(x))) < DOUBLE
        assert set(dict(new.named_parameters())) == {"bn.weight", "bn.bias", "group_norm.weight"}

    @pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's copy of an exported program
    @pytest.mark.parametrize("kind", ["frozen", "sync", "switchable", "group"])
    @pytest.mark.parametrize("training", [True, False])
    def test_exported_programs(self, kind: str, training: bool) -> None:
        model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.LayerNorm(5))
        randomise(model.double()).train(training)
        x = sample(3, 3, 4, 5)
        exported = torch.export.export(model, (x,)).module()
        plan = plan_convert(exported, kind)
        assert {part.name for part in (*plan.changes, *plan.skips)} == {"1", "3"}
        if not plan.changes:
            assert kind == "frozen"
            return
        new = plan.apply()
        assert new.get_submodule("1").training == training
        wanted = model[3](torch.relu(new.get_submodule("1")(model[0](x))))
        assert distance(new(x), wanted) < DOUBLE
        if only(plan.changes).exactness == "exact" and not training:
            assert distance(new(x), model(x)) < DOUBLE
        assert set(new.state_dict()) >= {"0.weight", "1.weight", "3.weight"}
