"""Every place that refers to a module is found, and written to."""

from __future__ import annotations

import time
import weakref
from collections import OrderedDict, defaultdict, deque, namedtuple
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor, nn

from normswap import convert, find, plan_convert
from normswap.graph.references import references
from tests.support import only

Pair = namedtuple("Pair", "first second")


class Holder(nn.Module):
    """Holds one norm as a child and once more in an attribute."""

    def __init__(self, hold: Any) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.other = hold(self.norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


WRITTEN: dict[str, tuple[Any, Any, str]] = {
    "list": (lambda m: [None, m], lambda o: o[1], "other.1"),
    "nested lists": (lambda m: [[0, [m]]], lambda o: o[0][1][0], "other.0.1.0"),
    "dict": (lambda m: {"a": m}, lambda o: o["a"], "other.a"),
    "ordered dict": (lambda m: OrderedDict(a=m), lambda o: o["a"], "other.a"),
    "default dict": (lambda m: defaultdict(list, a=[m]), lambda o: o["a"][0], "other.a.0"),
    "deque": (lambda m: deque([m]), lambda o: o[0], "other.0"),
    "tuple": (lambda m: (1, m, 2), lambda o: o[1], "other.1"),
    "tuple in a dict in a list": (lambda m: [{"k": (m, "x")}], lambda o: o[0]["k"][0], "other.0.k.0"),
    "named tuple": (lambda m: Pair(0, m), lambda o: o.second, "other.1"),
    "child under a second name": (lambda m: m, lambda o: o, "other"),
    "child of another child": (lambda m: nn.Sequential(nn.ReLU(), m), lambda o: o[1], "other.1"),
    "module dict": (lambda m: nn.ModuleDict({"a": m}), lambda o: o["a"], "other.a"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_module_is_replaced_at_all_of_its_places(name: str) -> None:
    hold, get, alias = WRITTEN[name]
    model = Holder(hold)
    site = only(find(model))
    assert (site.name, site.aliases) == ("norm", (alias,))
    original = model.norm
    new = convert(model, "group")
    assert type(new.norm) is nn.GroupNorm
    assert get(new.other) is new.norm
    assert get(model.other) is original, "the input is not touched"
    convert(model, "group", inplace=True)
    assert get(model.other) is model.norm is not original
    if not isinstance(model.other, nn.Module):
        assert type(new.other) is type(model.other) is type(hold(None))


def closure(module: nn.Module) -> Any:
    return lambda x: module(x)


def default(module: nn.Module) -> Any:
    def function(x: Tensor, norm: nn.Module = module) -> Tensor:
        return norm(x)

    return function


CAPTURED: dict[str, Any] = {
    "closure": closure,
    "default argument": default,
    "partial": lambda m: partial(lambda f, x: f(x), m),
    "bound method": lambda m: m.forward,
    "bound method in a list": lambda m: [m.forward],
    "closure in a dict": lambda m: {"f": closure(m)},
    "set": lambda m: {m},
    "object": lambda m: SimpleNamespace(norm=m),
    "list in an object": lambda m: SimpleNamespace(norms=[m]),
    "weak reference": lambda m: weakref.ref(m),
}


@pytest.mark.parametrize("name", CAPTURED)
def test_a_module_held_out_of_reach_is_left_alone(name: str) -> None:
    plan = plan_convert(Holder(CAPTURED[name]), "group")
    assert not plan.changes
    skip = only(plan.skips)
    assert skip.name == "norm"
    assert skip.reason.startswith("Holder also holds it in a closure")
    assert "a replacement would not be seen" in skip.reason


def test_what_only_names_the_module_by_the_model_is_no_obstacle() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4)
            self.function = lambda x: self.norm(x)
            self.method = self.helper
            self.itself = weakref.ref(self)

        def helper(self, x: Tensor) -> Tensor:
            return self.norm(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.function(x)

    assert only(plan_convert(Model(), "group").changes).name == "norm"


def test_names_are_those_of_state_dict() -> None:
    model = nn.Module()
    model.head = nn.Module()
    model.norm = nn.BatchNorm2d(4)
    model.head.features = [model.norm]
    site = only(find(model))
    assert (site.name, site.aliases) == ("norm", ("head.features.0",))
    assert list(references(model)[id(model.norm)].names) == ["norm", "head.features.0"]


def test_a_shared_block_has_all_its_names() -> None:
    block = nn.Sequential(nn.BatchNorm2d(4))
    site = only(find(nn.Sequential(block, nn.ReLU(), block)))
    assert (site.name, site.aliases) == ("0.0", ("2.0",))


def test_modules_in_plain_lists_only() -> None:
    model = nn.Module()
    model.blocks = [nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))]
    assert only(find(model)).name == "blocks.0.1"
    convert(model, "group", inplace=True)
    assert type(model.blocks[0][1]) is nn.GroupNorm


def test_loops_and_webs_of_references_end() -> None:
    blocks = [nn.Sequential(nn.BatchNorm2d(4)) for _ in range(24)]
    for block in blocks:
        block.siblings = blocks
        block.parent = [None]
    model = nn.Sequential(*blocks)
    for block in blocks:
        block.parent[0] = model
    start = time.perf_counter()
    assert len(find(model)) == 24
    assert time.perf_counter() - start < 5


def test_the_root_has_the_empty_name() -> None:
    norm = nn.BatchNorm2d(4)
    assert only(find(norm)).name == ""
    assert type(convert(norm, "group")) is nn.GroupNorm
    assert type(convert(norm, "group", inplace=True)) is nn.GroupNorm
