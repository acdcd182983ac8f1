"""Training goes on: the optimizer's groups and state follow the parameters to the converted model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from normswap import NormswapError, plan_convert
from tests.support import randomise, sample

X = sample(6, 3, 5, 5)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.weight = nn.Parameter(torch.ones(8))
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(F.group_norm(self.bn(self.conv(x)), 2, self.weight)))


def network() -> Network:
    model = Network().double()
    randomise(model)
    return model


def step(model: nn.Module, optimizer: Optimizer, times: int = 1) -> None:
    for _ in range(times):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD with momentum": lambda parameters: SGD(parameters, lr=1e-3, momentum=0.9),
    "Adam": lambda parameters: Adam(parameters, lr=1e-3),
    "AdamW": lambda parameters: AdamW(parameters, lr=1e-3, amsgrad=True),
    "RMSprop": lambda parameters: RMSprop(parameters, lr=1e-3),
}


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_moves_with_the_parameters(name: str, inplace: bool) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer, 3)
    names = {id(p): n for n, p in model.named_parameters()}
    before = {names[id(p)]: copy.deepcopy(state) for p, state in optimizer.state.items()}
    plan = plan_convert(model, "layer")
    new = plan.apply(inplace=inplace)
    moved = plan.remap_optimizer(optimizer)
    assert (moved.kept, moved.dropped, moved.added) == (7, 0, 0)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in new.parameters()}
    after = {n: optimizer.state[p] for n, p in new.named_parameters()}
    renamed = {"weight": "group_norm.weight"}
    for old, state in before.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(after[renamed.get(old, old)][key]), torch.as_tensor(value)), (old, key)
    assert len(optimizer.state) == len(before)
    step(new, optimizer, 2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_continues_as_if_nothing_had_happened(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer, 3)
    plan = plan_convert(model, "sync")
    new = plan.apply()
    reference_optimizer = OPTIMIZERS[name](model.parameters())
    reference_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    plan.remap_optimizer(optimizer)
    step(new, optimizer, 3)
    step(model, reference_optimizer, 3)
    for (_, ours), (_, theirs) in zip(new.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("inplace", [True, False])
def test_gates_join_the_group_of_their_norm(inplace: bool) -> None:
    model = network()
    groups = [
        {"params": [model.conv.weight, model.conv.bias, *model.last.parameters()], "weight_decay": 0.1},
        {"params": [*model.bn.parameters(), model.weight], "weight_decay": 0.0, "lr": 0.5},
    ]
    optimizer = Adam(groups, lr=1e-3)
    step(model, optimizer)
    plan = plan_convert(model, "switchable")
    new = plan.apply(inplace=inplace)
    moved = plan.remap_optimizer(optimizer)
    assert (moved.kept, moved.dropped, moved.added) == (7, 0, 4)
    second = optimizer.param_groups[1]
    assert (second["weight_decay"], second["lr"]) == (0.0, 0.5)
    wanted = [*new.bn.parameters(), *new.group_norm.parameters()]
    assert {id(p) for p in second["params"]} == {id(p) for p in wanted}
    assert new.bn.mean_gate not in optimizer.state
    before = new.bn.mean_gate.detach().clone()
    step(new, optimizer)
    assert not torch.equal(new.bn.mean_gate, before)


def test_parameters_that_vanish_leave() -> None:
    model = network()
    optimizer = Adam(model.parameters())
    step(model, optimizer)
    plan = plan_convert(model, "rms")
    new = plan.apply()
    moved = plan.remap_optimizer(optimizer)
    assert (moved.kept, moved.dropped, moved.added) == (6, 1, 0)
    assert {id(p) for p in optimizer.state} == {id(p) for p in new.parameters()}
    frozen = plan_convert(new, "identity")
    frozen.apply()
    assert frozen.remap_optimizer(optimizer).dropped == 2
    step(frozen.applied.model, optimizer)  # type: ignore[union-attr]


def test_frozen_norms_leave_and_the_rest_trains() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    plan = plan_convert(model, "frozen")
    new = plan.apply()
    assert plan.remap_optimizer(optimizer).dropped == 2
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    step(new, optimizer)
    changed = {name for name, tensor in new.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"conv.weight", "conv.bias", "last.weight", "last.bias", "weight"}


def test_names_of_parameters_follow() -> None:
    model = network()
    optimizer = Adam(model.named_parameters())
    plan = plan_convert(model, "switchable")
    new = plan.apply()
    plan.remap_optimizer(optimizer)
    names = {id(p): n for n, p in new.named_parameters()}
    for group in optimizer.param_groups:
        assert group["param_names"] == [names[id(p)] for p in group["params"]]
    assert "group_norm.mean_gate" in optimizer.param_groups[0]["param_names"]


def test_an_optimizer_of_some_parameters_stays_one_of_these() -> None:
    model = network()
    optimizer = SGD(model.last.parameters(), lr=0.1)
    plan = plan_convert(model, "switchable")
    new = plan.apply()
    moved = plan.remap_optimizer(optimizer)
    assert (moved.kept, moved.added) == (2, 0)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in new.last.parameters()}


def test_the_optimizers_state_can_be_saved_and_loaded() -> None:
    model = network()
    optimizer = Adam(model.parameters())
    step(model, optimizer)
    plan = plan_convert(model, "switchable")
    new = plan.apply()
    plan.remap_optimizer(optimizer)
    step(new, optimizer)
    other = Adam([p for group in optimizer.param_groups for p in group["params"]])
    other.load_state_dict(optimizer.state_dict())
    assert len(other.state) == len(optimizer.state) == 11


def test_schedulers_go_on() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    plan = plan_convert(model, "layer")
    new = plan.apply()
    plan.remap_optimizer(optimizer)
    step(new, optimizer)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_before_apply_there_is_nothing_to_move_to() -> None:
    model = network()
    with pytest.raises(NormswapError, match="apply the plan first"):
        plan_convert(model, "group").remap_optimizer(SGD(model.parameters(), lr=0.1))
