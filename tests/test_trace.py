"""Tracing: regions, what they leave to others, and that they leave no mark on the model or on random numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from normswap import NormswapError, plan_convert
from normswap.errors import Refusal
from normswap.graph.state import unmarked
from normswap.graph.trace import regions, trace
from tests.support import picture


def functions(graph: fx.Graph) -> list[Any]:
    return [node.target for node in graph.nodes if node.op in ("call_function", "call_method")]


def modules(graph: fx.Graph) -> list[Any]:
    return [node.target for node in graph.nodes if node.op == "call_module"]


class ConvSubclass(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[0] > 0 else x


class NormSubclass(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Branches(nn.Module):
    """Cannot be traced: it looks at the values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if x.sum() > 0 else self.conv(x)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(ConvSubclass(3, 4, 1), NormSubclass(4), nn.ReLU())
        self.branches = Branches()
        self.last = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.branches(self.first(x)))


def test_leaves_are_norms_and_linear_layers_and_their_subclasses() -> None:
    assert modules(trace(Whole().first).graph) == ["0", "1", "2"]


def test_one_branch_costs_one_module_its_dataflow() -> None:
    found, failed = regions(Whole())
    assert [region.name for region in found] == ["", "branches.block"]
    assert modules(found[0].graph) == ["first.0", "first.1", "first.2", "branches", "last.0", "last.1"]
    assert "control flow" in failed["branches"]
    assert found[0].qualified("last.0") == "last.0"
    assert found[1].qualified("0") == "branches.block.0"


def test_nothing_is_left_in_the_graph_of_a_child_that_failed() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = Branches()

        def forward(self, x: Tensor) -> Tensor:
            return self.branches(x * 2) + 1

    graph = regions(Half())[0][0].graph
    graph.lint()
    assert [node.op for node in graph.nodes] == [
        "placeholder",
        "call_function",
        "call_module",
        "call_function",
        "output",
    ]


class Marks(nn.Module):
    """Does everything a forward should not do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.count = 0
        self.cache: dict[str, Any] = {}
        self.features: list[Any] = []
        self.seen: set[int] = set()
        self.child = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.last = x
        self.cache["x"] = x
        self.features.append(x)
        self.seen.add(self.count)
        self.child.feature = x
        torch.rand(1)
        random.random()
        numpy.random.rand()
        return self.norm(x) + torch.arange(4).reshape(-1, 1, 1)


def states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()


@pytest.mark.parametrize("training", [True, False])
def test_planning_leaves_no_mark(training: bool) -> None:
    model = nn.Sequential(Marks()).train(training)
    before, random_states = picture(model), states()
    plan_convert(model, "instance")
    assert len(regions(model)[0]) == 1
    assert before.differences(model) == []
    assert states() == random_states


def test_an_observed_run_leaves_no_mark() -> None:
    model = nn.Sequential(Marks(), nn.Dropout(0.5)).train()
    x = torch.randn(2, 4, 3, 3)
    before, random_states = picture(model), torch.get_rng_state()
    plan_convert(model, "group", example_inputs=(x,))
    assert before.differences(model) == []
    assert torch.equal(torch.get_rng_state(), random_states)


def test_what_was_done_is_told() -> None:
    effects = trace(Marks()).effects
    for words in (
        "sets count",
        "sets last",
        "sets feature",
        "changes a dict",
        "changes a list",
        "changes a set",
        "draws random",
    ):
        assert any(words in effect for effect in effects), words
    assert trace(nn.Sequential(nn.ReLU())).effects == []


def test_marks_are_taken_back_after_an_error_too() -> None:
    module = Marks()
    before = picture(module)

    with pytest.raises(ZeroDivisionError), unmarked(module):  # noqa: PT012
        module.extra = 1
        module.features.append(1)
        del module.count
        raise ZeroDivisionError
    assert before.differences(module) == []


def test_constants_are_kept_beside_the_graph() -> None:
    traced = trace(Marks())
    assert [torch.equal(c, torch.arange(4).reshape(-1, 1, 1)) for c in traced.constants.values()] == [True]
    assert not [name for name in vars(Marks()) if name.startswith("_tensor_constant")]


def test_hooks_of_containers_do_not_run() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.ReLU())
    seen: list[Any] = []
    model[0].register_forward_hook(lambda _m, _i, out: seen.append(out))
    model[0].register_forward_pre_hook(lambda _m, args: seen.append(args))
    model.register_forward_hook(lambda _m, _i, out: seen.append(out))
    found, failed = regions(model)
    assert not seen
    assert "hooks" in failed["0"]
    assert [region.name for region in found] == ["", "0"]


class Optional(nn.Module):
    def forward(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        dims: tuple[int, ...] = (2, 3),
        *,
        times: float = 1.0,
        act: Any = F.relu,
    ) -> Tensor:
        if scale is not None:
            x = x * scale
        return act(x.mean(dims) * times)


def test_optional_arguments_are_traced_at_their_defaults() -> None:
    traced = trace(Optional())
    module = fx.GraphModule(nn.Module(), traced.graph)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(module(x), Optional()(x))
    assert torch.equal(module(x, None, times=1.0), Optional()(x))
    for arguments in ({"times": 2.0}, {"dims": (2,)}, {"scale": x}):
        with pytest.raises(NormswapError, match=f"{next(iter(arguments))}="):
            module(x, **arguments)
    with pytest.raises(TypeError, match="act"):
        module(x, act=torch.tanh)


class Asks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor):
            x = x * 2
        if isinstance(x, (list, tuple)):
            x = x[0] * 3
        if isinstance(x.shape[0], Tensor):
            x = x * 5
        return x


def test_isinstance_tensor_is_true_of_what_stands_in_for_one() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.asks = Asks()

        def forward(self, x: Tensor) -> Tensor:
            return self.asks(x)

    for model in (Asks(), Nested()):
        constants = [a for node in trace(model).graph.nodes for a in node.args if isinstance(a, int)]
        assert [c for c in constants if c > 1] == [2]
    assert "isinstance" not in globals()


def test_gradient_and_autocast_switches_are_told() -> None:
    class NoGrad(nn.Module):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    class Autocast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return x * 2

    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    assert trace(NoGrad()).effects == trace(Autocast()).effects == ["switches gradients or autocast"]
    assert trace(Same()).effects == []
    with torch.no_grad():
        assert trace(Same()).effects == []


def test_what_is_not_traced() -> None:
    module = nn.Sequential(nn.ReLU())
    module.forward = lambda x: x  # type: ignore[method-assign, assignment]
    with pytest.raises(Refusal, match="replaced on the instance"):
        trace(module)

    class Unregistered(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.Linear(2, 2)(x)

    with pytest.raises(Refusal, match="calls a Linear that is not registered"):
        trace(Unregistered())


def test_variable_arguments() -> None:
    class Variable(nn.Module):
        def forward(self, *xs: Tensor, **named: Tensor) -> Tensor:
            return xs[0] + xs[1] + named["z"]

    x = torch.randn(3)
    module = fx.GraphModule(nn.Module(), trace(Variable()).graph)
    assert torch.equal(module(x, x, z=x), 3 * x)
