"""``unshare=True``: layers that several places share get a copy for each norm they meet, and nothing else changes."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import normswap
import tests.zoo.schemas  # noqa: F401  before torchvision
from normswap.engine import folding
from normswap.graph.separate import Copied, Unsharing, separate
from tests.support import DOUBLE, batch_norms_run, check_copies, check_fold, distance, only, picture, randomise, sample

IMAGE = (2, 4, 5, 5)


def made(model: nn.Module) -> nn.Module:
    return randomise(model.double()).eval()


def checked(model: nn.Module, *inputs: Any, **options: Any) -> tuple[normswap.Plan, nn.Module]:
    return check_fold(model, *(inputs or (sample(*IMAGE),)), unshare=True, **options)


def into(plan: normswap.Plan) -> dict[str, tuple[str, ...]]:
    return {change.name: change.into for change in plan.changes}


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 1, **options)


class Calls(nn.Module):
    """One convolution called once for each letter, which names the norm behind it; ``-`` stands for none."""

    def __init__(self, norms: str, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = conv(bias=False) if layer is None else layer
        self.order = norms
        for name in sorted(set(norms) - {"-"}):
            self.add_module(name, nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = self.conv(x)
            x = F.relu(x if name == "-" else getattr(self, name)(x)) - 0.3
        return x


@pytest.mark.parametrize(
    ("norms", "names"),
    [
        ("AB", ["conv", "conv_1"]),
        ("ABC", ["conv", "conv_1", "conv_2"]),
        ("ABA", ["conv", "conv_1", "conv"]),
        ("AAB", ["conv", "conv", "conv_2"]),
        ("A-", ["conv", "conv_1"]),
        ("-A-A", ["conv", "conv_1", "conv", "conv_1"]),
    ],
)
@pytest.mark.parametrize("observed", [False, True])
def test_one_name_called_several_times(norms: str, names: list[str], observed: bool) -> None:
    model = made(Calls(norms))
    plan, folded = checked(model, example_inputs=(sample(*IMAGE),) if observed else None)
    assert into(plan) == {norm: (name,) for norm, name in zip(norms, names, strict=True) if norm != "-"}
    assert batch_norms_run(folded, sample(*IMAGE)) == 0
    copies = sorted({*names} - {"conv"})
    assert [name for name, _ in folded.named_children() if name.startswith("conv_")] == copies
    assert plan.new_bytes == 16 * 8 * len(copies)
    assert plan.to_dict()["new_bytes"] == plan.new_bytes
    assert f"{plan.new_bytes} bytes of new parameters: {', '.join(copies)}" in str(plan)
    assert any("Python branches" in note for note in plan.notes)
    assert isinstance(folded, Calls)
    assert type(folded).__name__ == "Calls"
    parameters = [folded.get_submodule(name).weight for name in ("conv", *copies)]
    assert len({parameter.data_ptr() for parameter in parameters}) == len(parameters)


def test_without_it_the_reason_names_it() -> None:
    plan = normswap.plan_fold(made(Calls("AB")))
    assert all("called at 2 sites" in change.notes[0] for change in plan.changes)
    assert all("unshare=True gives it a copy for each need" in change.notes[0] for change in plan.changes)
    assert plan.unsharing is None
    assert "unshare" not in plan.recipe
    assert "new_bytes" not in plan.to_dict()


def test_nothing_is_copied_where_all_places_need_the_same() -> None:
    plan, folded = checked(made(Calls("AA")))
    assert into(plan) == {"A": ("conv",)}
    assert (plan.unsharing, plan.new_bytes, plan.notes) == (None, 0, ())
    assert type(folded) is Calls


def test_only_selected_norms_ask_for_copies() -> None:
    plan, folded = checked(made(Calls("ABC")), skip="B")
    assert into(plan) == {"A": ("conv",), "C": ("conv_2",)}
    assert [skip.name for skip in plan.skips] == ["B"]
    assert batch_norms_run(folded, sample(*IMAGE)) == 1
    kept, folded = checked(made(Calls("ABC")), skip=["A", "B", "C"])
    assert (kept.changes, kept.unsharing) == ([], None)


def test_a_norm_in_train_mode_leaves_its_place_alone() -> None:
    model = made(Calls("ABC"))
    model.B.train()
    plan = normswap.plan_fold(model, unshare=True)
    assert into(plan) == {"A": ("conv",), "C": ("conv_2",)}
    assert "train mode" in only(plan.skips).reason
    folded, twin = plan.apply(), copy.deepcopy(model)
    assert distance(folded(sample(*IMAGE)), twin(sample(*IMAGE))) < DOUBLE
    assert distance(folded.B.running_mean, twin.B.running_mean) < DOUBLE
    assert torch.equal(folded.conv_1.weight, model.conv.weight)


def test_the_input_side() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.conv = nn.BatchNorm2d(4), nn.BatchNorm2d(4), conv()

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.second(F.relu(self.conv(self.first(x)))))

    plan, folded = checked(made(Model()))
    assert into(plan) == {"first": ("conv",), "second": ("conv_1",)}
    assert batch_norms_run(folded, sample(*IMAGE)) == 0


# --- several names --------------------------------------------------------------------------------------------------


def test_one_object_in_two_slots() -> None:
    layer = conv()
    model = made(nn.Sequential(layer, nn.BatchNorm2d(4), nn.ReLU(), layer, nn.BatchNorm2d(4)))
    plan, folded = checked(model)
    assert into(plan) == {"1": ("0",), "4": ("3",)}
    assert type(folded) is nn.Sequential
    assert folded[0] is not folded[3]
    assert plan.new_bytes == (16 + 4) * 8
    assert batch_norms_run(folded, sample(*IMAGE)) == 0


def test_slots_with_the_same_norm_share_one_copy() -> None:
    layer, first, second = conv(), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    parts = [layer, first, nn.ReLU(), layer, second, nn.ReLU(), layer, second, nn.ReLU(), layer, first]
    plan, folded = checked(made(nn.Sequential(*parts)))
    assert into(plan) == {"1": ("0",), "4": ("3",)}
    assert folded[0] is folded[9]
    assert folded[3] is folded[6]
    assert folded[0] is not folded[3]


class Around(nn.Module):
    """A layer between other modules."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU(), layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2


def test_a_block_in_two_slots_is_copied_around_the_layer_alone() -> None:
    block = Around(conv())
    model = made(nn.Sequential(block, nn.BatchNorm2d(4), nn.ReLU(), block, nn.BatchNorm2d(4)))
    plan, folded = checked(model)
    assert into(plan) == {"1": ("0.inner.2",), "4": ("3.inner.2",)}
    assert folded[0].inner[0] is folded[3].inner[0]
    assert folded[0].inner[2] is not folded[3].inner[2]
    assert type(folded[3]) is Around
    assert plan.new_bytes == (16 + 4) * 8


def test_layers_inside_copies_of_a_block_share_what_they_can() -> None:
    """A block with two convolutions, called three times: the first conv needs another norm in the third call only."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(), conv()

        def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
            return self.b(F.relu(norm(self.a(x))))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()
            self.p, self.q = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.x, self.y = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.x(self.block(x, self.p)))
            x = F.relu(self.y(self.block(x, self.p)))
            return F.relu(self.y(self.block(x, self.q)))

    plan, folded = checked(made(Model()))
    assert batch_norms_run(folded, sample(*IMAGE)) == 0
    first, second, third = folded.block, folded.block_1, folded.block_2
    assert first.a is second.a
    assert first.a is not third.a
    assert second.b is third.b
    assert first.b is not second.b
    assert plan.new_bytes == 2 * (16 + 4) * 8


def test_a_block_that_calls_its_layer_twice_and_is_called_twice() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.other = Calls("AB"), nn.BatchNorm2d(4)
            self.block.last = conv()

        def forward(self, x: Tensor) -> Tensor:
            x = self.other(self.block.last(self.block(x)))
            return self.block.last(self.block(F.relu(x)))

    plan, folded = checked(made(Model()))
    assert into(plan) == {"block.A": ("block.conv",), "block.B": ("block.conv_1",), "other": ("block.last",)}
    assert isinstance(folded.block_last_1, nn.Conv2d)
    assert batch_norms_run(folded, sample(*IMAGE)) == 0


def test_shared_across_regions() -> None:
    """The model cannot be traced, its two parts can."""

    class Part(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.conv, self.norm = layer, nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.norm(self.conv(x)))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = conv()
            self.one, self.two = Part(layer), Part(layer)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x)) if float(x.sum()) < 1e9 else x

    plan, folded = checked(made(Model()))
    assert into(plan) == {"one.norm": ("one.conv",), "two.norm": ("two.conv",)}
    assert type(folded) is Model
    assert batch_norms_run(folded, sample(*IMAGE)) == 0


# --- detection heads ------------------------------------------------------------------------------------------------


class Separable(nn.Module):
    def __init__(self, outputs: int = 4) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.conv_pw = nn.Conv2d(4, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_pw(self.conv_dw(x))


class Head(nn.Module):
    """As in EfficientDet: the convolutions are shared by all levels, each level has its own norms."""

    def __init__(self, levels: int = 3, repeats: int = 2) -> None:
        super().__init__()
        self.levels = levels
        self.conv_rep = nn.ModuleList([Separable() for _ in range(repeats)])
        self.bn_rep = nn.ModuleList([nn.ModuleList([nn.BatchNorm2d(4) for _ in range(repeats)]) for _ in range(levels)])
        self.predict = Separable(6)

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        outputs = []
        for index in range(self.levels):
            x = levels[index]
            for layer, norm in zip(self.conv_rep, self.bn_rep[index], strict=True):
                x = F.silu(norm(layer(x)))
            outputs.append(self.predict(x))
        return outputs


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.classes, self.boxes = Head(), Head()

    def forward(self, x: Tensor) -> Tensor:
        levels = [self.stem(x)]
        for _ in range(2):
            levels.append(F.max_pool2d(levels[-1], 2))
        outputs = [*self.classes(levels), *self.boxes(levels)]
        return torch.cat([each.flatten(2) for each in outputs], 2)


class Untraceable(Detector):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.sum()) < 1e9 else -x)


@pytest.mark.parametrize("cls", [Detector, Untraceable])
@pytest.mark.parametrize("observed", [False, True])
def test_efficientdet_head(cls: type[nn.Module], observed: bool) -> None:
    x = sample(2, 4, 18, 18)
    plan, folded = checked(made(cls()), x, example_inputs=(x,) if observed else None)
    assert batch_norms_run(folded, x) == 0
    assert all(change.to == "identity" for change in plan.changes)
    assert len(plan.changes) == 13
    for head in (folded.classes, folded.boxes):
        assert isinstance(head, Head)
        assert [name for name, _ in head.named_children() if name.startswith("conv_rep_")] == [
            "conv_rep_0_1", "conv_rep_0_2", "conv_rep_1_1", "conv_rep_1_2",
        ]  # fmt: skip
        assert head.conv_rep[0].conv_dw is head.conv_rep_0_2.conv_dw
        assert len({id(m) for m in head.modules() if isinstance(m, nn.Conv2d)}) == 6 + 4
    assert plan.new_bytes == 2 * 4 * (16 + 4) * 8


def test_a_head_in_a_loop_over_a_list_cannot_be_traced() -> None:
    class Loop(Head):
        def forward(self, levels: list[Tensor]) -> Tensor:
            outputs = []
            for x, norms in zip(levels, self.bn_rep, strict=True):
                for layer, norm in zip(self.conv_rep, norms, strict=True):
                    x = F.silu(norm(layer(x)))
                outputs.append(self.predict(x).flatten(2))
            return torch.cat(outputs, 2)

    levels = [sample(2, 4, size, size) for size in (8, 4, 2)]
    plan, _ = checked(made(Loop()), levels)
    assert plan.unsharing is None
    assert all("cannot be traced" in change.notes[0] for change in plan.changes)


def test_a_torchvision_head_shares_its_norms_too_and_needs_no_copies() -> None:
    from torchvision.models.detection.retinanet import RetinaNetClassificationHead

    model = made(RetinaNetClassificationHead(4, 1, 2, norm_layer=nn.BatchNorm2d))
    plan, _ = checked(model, [sample(1, 4, size, size) for size in (8, 4)])
    assert [change.into for change in plan.changes] == [(f"conv.{index}.0",) for index in range(4)]
    assert plan.unsharing is None


# --- kinds of modules -----------------------------------------------------------------------------------------------


def test_a_graph_module() -> None:
    model = fx.symbolic_trace(made(Calls("AB")))
    plan, folded = checked(model)
    assert into(plan) == {"A": ("conv",), "B": ("conv_1",)}
    assert isinstance(folded, fx.GraphModule)
    assert batch_norms_run(folded, sample(*IMAGE)) == 0


def test_a_graph_module_inside_a_model() -> None:
    model = nn.Sequential(fx.symbolic_trace(made(Calls("AB"))), nn.ReLU()).eval()
    code = model[0].code
    _, folded = checked(model)
    assert batch_norms_run(folded, sample(*IMAGE)) == 0
    assert model[0].code == code


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's copy of an exported program
def test_an_exported_program_has_no_layers_to_share() -> None:
    model = torch.export.export(made(Calls("AB")), (sample(*IMAGE),)).module()
    plan, _ = checked(model)
    assert plan.unsharing is None
    assert [change.to for change in plan.changes] == ["affine", "affine"]


def test_with_functional_norms() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(bias=False)
            for name in ("one", "two"):
                self.register_buffer(f"mean_{name}", torch.zeros(4))
                self.register_buffer(f"{name}.running_var".replace(".", "_"), torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(F.batch_norm(self.conv(x), self.mean_one, self.one_running_var))
            return F.relu(F.batch_norm(self.conv(x), self.mean_two, self.two_running_var))

    model = made(Model())
    for variance in (model.one_running_var, model.two_running_var):
        variance.abs_().add_(0.5)
    plan, folded = checked(model)
    assert into(plan) == {"batch_norm": ("conv",), "batch_norm_1": ("conv_1",)}
    assert sorted(folded.state_dict()) == ["conv.bias", "conv.weight", "conv_1.bias", "conv_1.weight"]
    assert batch_norms_run(folded, sample(*IMAGE)) == 0


def test_results_copy_and_pickle() -> None:
    folded = normswap.fold(made(Detector()), unshare=True)
    x = sample(2, 4, 18, 18)
    assert batch_norms_run(folded, x) == 0
    again = copy.deepcopy(folded)
    assert distance(again(x), folded(x)) < DOUBLE
    folded = normswap.fold(made(Calls("ABA")), unshare=True)
    check_copies(folded, sample(*IMAGE))


def test_inplace_is_the_model_itself() -> None:
    model = made(Calls("AB"))
    wanted, layer = model(sample(*IMAGE)), model.conv
    assert normswap.fold(model, unshare=True, inplace=True) is model
    assert model.conv is layer
    assert distance(model(sample(*IMAGE)), wanted) < DOUBLE
    assert model.conv_1.weight.requires_grad


def test_what_a_layer_is_carried_to_its_copy() -> None:
    model = made(Calls("AB"))
    model.conv.tag, model.conv.weight.requires_grad = ["mine"], False
    folded = normswap.fold(model.to(memory_format=torch.channels_last), unshare=True)
    assert folded.conv_1.tag == ["mine"]
    assert folded.conv_1.weight.requires_grad is False
    assert folded.conv_1.weight.stride() == folded.conv.weight.stride()
    assert folded.conv_1.training is False


def test_a_copy_has_memory_of_its_own_and_one_for_a_look_has_not() -> None:
    layer = conv()
    model = nn.Sequential(layer, layer)
    before = picture(model)
    for own_memory in (True, False):
        undo = separate(model, Unsharing((Copied("1", "0", {"": "1"}),)), own_memory=own_memory)
        assert model[1] is not layer
        assert model[1].weight is not layer.weight
        assert (model[1].weight.data_ptr() == layer.weight.data_ptr()) is not own_memory
        undo()
        assert before.differences(model) == []


# --- ties -----------------------------------------------------------------------------------------------------------


def tied() -> nn.Sequential:
    model = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(), nn.BatchNorm2d(4))
    model[3].weight = model[0].weight
    return model


def test_two_layers_with_one_weight() -> None:
    model = made(tied())
    plain = normswap.plan_fold(model)
    assert all("shares its weight with" in change.notes[0] for change in plain.changes)
    assert all("unshare=True" in change.notes[0] for change in plain.changes)
    plan, folded = checked(model)
    assert into(plan) == {"1": ("0",), "4": ("3",)}
    assert folded[0].weight is not folded[3].weight
    assert model[0].weight is model[3].weight
    assert plan.new_bytes == 16 * 8  # the last one keeps the original
    assert "0.weight" in plan.notes[0]


def test_a_tied_layer_that_does_not_fold_stays_tied_to_nothing_new() -> None:
    model = made(nn.Sequential(*tied()[:4]))
    plan, folded = checked(model)
    assert into(plan) == {"1": ("0",)}
    assert torch.equal(folded[3].weight, model[3].weight)
    assert plan.new_bytes == 16 * 8


def test_an_embedding_and_the_layer_that_reads_it_out() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 6)
            self.head, self.norm = nn.Linear(6, 10, bias=False), nn.BatchNorm1d(10)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.norm(self.head(self.embedding(tokens).mean(1)))

    model, tokens = made(Model()), torch.tensor([[1, 2, 3], [4, 5, 9]])
    plan = normswap.plan_fold(model, unshare=True, example_inputs=(tokens,))
    assert into(plan) == {"norm": ("head",)}
    folded = plan.apply()
    assert distance(folded(tokens), model(tokens)) < DOUBLE
    assert torch.equal(folded.embedding.weight, model.embedding.weight)
    assert plan.new_bytes == 60 * 8


# --- left alone -----------------------------------------------------------------------------------------------------


def left(model: nn.Module, reason: str) -> None:
    before = picture(model)
    plan = normswap.plan_fold(model, unshare=True)
    assert before.differences(model) == []
    assert plan.unsharing is None
    x = sample(*IMAGE)
    assert distance(plan.apply()(x), model(x)) < DOUBLE
    told = [*(note for change in plan.changes for note in change.notes), *(skip.reason for skip in plan.skips)]
    assert told
    assert all(reason in text for text in told), plan


def test_a_forward_that_cannot_be_traced() -> None:
    class Model(Calls):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.sum()) < 1e9 else x

    left(made(Model("AB")), "cannot be traced")


def test_a_traceable_forward_with_a_state() -> None:
    class Model(Calls):
        def forward(self, x: Tensor) -> Tensor:
            self.last_input = x
            return super().forward(x)

    left(made(Model("AB")), "(unshare: the model: its forward calls a module several times, and a generated one")


def test_a_block_with_a_state_between() -> None:
    class Keeps(Around):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = True
            return super().forward(x)

    left(made(Calls("AB", Keeps(conv()))), "conv may keep something between calls")


def test_a_block_with_hooks_between() -> None:
    block = Around(conv())
    block.register_full_backward_hook(lambda *_: None)
    left(made(Calls("AB", block)), "(unshare: conv has hooks)")


def test_a_layer_with_hooks() -> None:
    model = made(Calls("AB"))
    model.conv.register_forward_hook(lambda _module, _inputs, output: output)
    left(model, "conv has forward or backward hooks")
    model = made(Calls("AB"))
    model.conv.register_state_dict_pre_hook(lambda *_: None)
    left(model, "(unshare: conv has hooks)")


def test_a_layer_held_elsewhere_too() -> None:
    model = made(Calls("AB"))
    model.convs = [model.conv]
    left(model, "(unshare: conv is also held in a plain attribute)")
    model = made(Calls("AB"))
    layer = model.conv
    model.shortcut = lambda x: layer(x)
    left(model, "conv in a closure, method or object")


def test_a_parametrized_layer() -> None:
    left(made(Calls("AB", parametrizations.weight_norm(conv()))), "conv is parametrized")


def test_a_layer_whose_weight_the_forward_reads_keeps_its_own() -> None:
    class Model(Calls):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.conv.weight.sum()

    model = made(Model("AB"))
    plan, folded = checked(model)
    assert into(plan) == {"A": (), "B": ("conv_1",)}
    assert torch.equal(folded.conv.weight, model.conv.weight)


def test_other_calls_in_train_mode() -> None:
    class Model(Calls):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.conv(x) if self.training else x)

    left(made(Model("AB")), "its forward calls other modules in train mode than in eval mode")


def test_a_forward_that_is_called_with_an_optional_argument() -> None:
    class Block(Calls):
        def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
            x = super().forward(x)
            return x if shift is None else x + shift

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block("AB")

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x, x.mean())

    model = made(Model())
    for example in (None, (sample(*IMAGE),)):
        plan, _ = checked(model, example_inputs=example)
        assert plan.unsharing is None, example


def test_an_error_while_it_is_made_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(Detector())
    before = picture(model)
    plan = normswap.plan_fold(model, unshare=True)

    def broken(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(folding.layers, "absorb", broken)
        with pytest.raises(RuntimeError):
            plan.apply(inplace=True)
    assert before.differences(model) == []


def spoilt(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    recipe = copy.deepcopy(normswap.plan_fold(made(Calls("AB")), unshare=True).recipe)
    change(recipe["unshare"])
    return recipe


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data.pop("steps"), "malformed"),
        (lambda data: data["steps"].append(3), "malformed"),
        (lambda data: data["steps"][0].update(of="nowhere"), "no such module"),
        (lambda data: data["steps"][1].update(total=3), "calls 4 modules, not 3"),
        (lambda data: data["steps"][1].update(calls=[[4, "conv_1"]]), "no call number 4"),
        (lambda data: data.update(untied=["conv.scale"]), "no parameter 'conv.scale'"),
        (lambda data: data.update(steps=[]), "conv is called at 2 sites"),
    ],
)
def test_a_recipe_that_does_not_fit(change: Callable[[dict[str, Any]], Any], reason: str) -> None:
    model = made(Calls("AB"))
    before = picture(model)
    with pytest.raises(normswap.NormswapError, match=reason):
        normswap.apply_recipe(model, spoilt(change), inplace=True)
    assert before.differences(model) == []


# --- random networks ------------------------------------------------------------------------------------------------


class Program(nn.Module):
    """Runs a list of steps over its children, some of which stand in several blocks and slots."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[str, str]] = []

    def forward(self, x: Tensor) -> Tensor:
        for operation, name in self.steps:
            if operation == "call":
                x = self.get_submodule(name)(x)
            elif operation == "add":
                x = x + self.get_submodule(name)(x)
            elif operation == "functional":
                x = F.batch_norm(x, self.own_mean, self.own_running_var)
            elif operation == "read":
                x = x * (1 + self.get_submodule(name).weight.mean())
            else:
                x = F.relu(x) - 0.2
        return x


class Sharing:
    """A random network of blocks that share convolutions, norms and each other."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        sizes = [rng.choice([1, 3]) for _ in range(rng.randrange(1, 4))]
        self.convs = [nn.Conv2d(4, 4, size, padding="same", bias=rng.random() < 0.5) for size in sizes]
        self.norms = [nn.BatchNorm2d(4) for _ in range(rng.randrange(2, 6))]
        if rng.random() < 0.2 and sizes[0] == sizes[-1]:
            self.convs[0].weight = self.convs[-1].weight
        self.blocks: list[nn.Module] = []
        self.network: nn.Module = self.block(rng.randrange(0, 3))
        if rng.random() < 0.3:
            parts = [*self.blocks, *self.blocks, *self.norms, *self.convs]
            self.network = nn.Sequential(*(rng.choice(parts) for _ in range(3)))
        randomise(self.network.double(), seed).eval()
        with torch.no_grad():
            for conv in self.convs:
                conv.weight.mul_(0.3)
        for module in self.network.modules():
            if isinstance(module, nn.BatchNorm2d) and rng.random() < 0.05:
                module.train()
            if isinstance(module, (nn.Conv2d, Program)) and rng.random() < 0.03:
                module.register_forward_hook(lambda _module, _inputs, _output: None)

    def block(self, depth: int) -> nn.Module:
        rng, block, children = self.rng, Program(), []
        for index in range(rng.randrange(1, 4)):
            part: nn.Module = rng.choice(self.convs)
            if depth and rng.random() < 0.5:
                part = rng.choice(self.blocks) if self.blocks and rng.random() < 0.4 else self.block(depth - 1)
            name = f"part_{index}"
            listed = rng.random() < 0.3
            block.add_module(name, nn.ModuleList([part]) if listed else part)
            children.append(f"{name}.0" if listed else name)
        norms = [f"norm_{index}" for index in range(rng.randrange(0, 3))]
        for name in norms:
            block.add_module(name, rng.choice(self.norms))
        functional = rng.random() < 0.2
        if functional:
            block.register_buffer("own_mean", torch.zeros(4))
            block.register_buffer("own_running_var", torch.ones(4))
        for _ in range(rng.randrange(2, 7)):
            block.steps.append((rng.choice(["call", "call", "call", "add"]), rng.choice(children)))
            if norms and rng.random() < 0.75:
                block.steps.append(("call", rng.choice(norms)))
            elif functional:
                block.steps.append(("functional", ""))
            if rng.random() < 0.6:
                block.steps.append(("relu", ""))
            convs = [name for name in children if isinstance(block.get_submodule(name), nn.Conv2d)]
            if convs and rng.random() < 0.04:
                block.steps.append(("read", rng.choice(convs)))
        self.blocks.append(block)
        return block


def check_network(seed: int) -> tuple[int, int]:
    """Fold a network with ``unshare``; how many norms vanish with it, and without."""
    model, x = Sharing(seed).network, sample(*IMAGE, seed=seed)
    for module in model.modules():
        if isinstance(getattr(module, "own_running_var", None), Tensor):
            module.own_running_var.abs_().add_(0.5)
    before, wanted = picture(model), copy.deepcopy(model)(x)
    plain = normswap.plan_fold(model)
    plan = normswap.plan_fold(model, unshare=True)
    assert before.differences(model) == []
    folded = plan.apply()
    assert distance(copy.deepcopy(folded)(x), wanted) < DOUBLE
    assert bool(plan.unsharing) == (plan.new_bytes > 0)
    assert list(plan.apply(inplace=True).state_dict()) == list(folded.state_dict())
    plan.undo()
    assert before.differences(model) == []
    replayed = normswap.apply_recipe(model, plan.recipe)
    replayed.load_state_dict(folded.state_dict(), strict=True)
    assert distance(replayed(x), wanted) < DOUBLE
    vanished = [sum(change.to == "identity" for change in each.changes) for each in (plan, plain)]
    assert vanished[0] >= vanished[1]
    return vanished[0], vanished[1]


def test_random_networks() -> None:
    counts = [check_network(seed) for seed in range(16)]
    with_copies, without = (sum(column) for column in zip(*counts, strict=True))
    assert with_copies > without
