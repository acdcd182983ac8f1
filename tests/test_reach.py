"""What the code of a forward can reach: norm functions however they are called, and what it reads from its children."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import layer_norm as ln
from torch.utils.checkpoint import checkpoint

from normswap.graph.reach import reach


def helper(x: Tensor) -> Tensor:
    return F.group_norm(x, 2)


def far(x: Tensor) -> Tensor:
    return helper(x)


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


TABLE = {"group": F.group_norm}


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)
        self.inner = nn.Sequential(nn.GroupNorm(2, 4))
        self.held = F.group_norm
        self.bound = partial(F.group_norm, num_groups=2)

    held_by_class = staticmethod(F.group_norm)

    def method(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 2)

    @property
    def function(self) -> Callable[..., Tensor]:
        return F.group_norm

    @staticmethod
    def static(x: Tensor) -> Tensor:
        return F.group_norm(x, 2)

    @classmethod
    def of_class(cls, x: Tensor) -> Tensor:
        return F.group_norm(x, 2)


class Direct(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 2)


class FullPath(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.group_norm(x, 2)


class Torch(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, 2)


class Operator(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.native_group_norm(x, None, None, 1, 4, 9, 2, 1e-5)[0]


class Imported(Base):
    def forward(self, x: Tensor) -> Tensor:
        return ln(x, (4,))


class ImportedInside(Base):
    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.functional import group_norm

        return group_norm(x, 2)


class ModuleImportedInside(Base):
    def forward(self, x: Tensor) -> Tensor:
        import torch.nn.functional as functions

        return functions.group_norm(x, 2)


class Method(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.method(x)


class InComprehension(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.method(part) for part in (x, x)])


class BesideComprehension(Base):
    def forward(self, x: Tensor) -> Tensor:
        pieces = [self.norm(part) for part in (x, x)]
        return self.method(pieces[0])


class InnerFunction(Base):
    def forward(self, x: Tensor) -> Tensor:
        def inner(part: Tensor) -> Tensor:
            return self.method(part)

        return inner(x)


class Lambda(Base):
    def forward(self, x: Tensor) -> Tensor:
        return (lambda part: F.group_norm(part, 2))(x)


class Checkpointed(Base):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.method, x, use_reentrant=False)


class Property(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, 2)


class Static(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.static(x)


class OfClass(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.of_class(x)


class HeldByClass(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.held_by_class(x, 2)


class Far(Base):
    def forward(self, x: Tensor) -> Tensor:
        return far(x)


class Table(Base):
    def forward(self, x: Tensor) -> Tensor:
        return TABLE["group"](x, 2)


class Decorated(Base):
    @decorated
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 2)


class NoGrad(Base):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 2)


class Super(Direct):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Inherited(Direct):
    pass


class SuperOfNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


REACHING = [
    Direct, FullPath, Torch, Operator, Imported, ImportedInside, ModuleImportedInside, Method, InComprehension,
    BesideComprehension, InnerFunction, Lambda, Checkpointed, Property, Static, OfClass, HeldByClass, Far, Table,
    Decorated, NoGrad, Super, Inherited, partial(SuperOfNorm, 4),
]  # fmt: skip


@pytest.mark.parametrize("make", REACHING, ids=lambda cls: getattr(cls, "__name__", "SuperOfNorm"))
def test_a_norm_function_is_reached(make: Callable[[], nn.Module]) -> None:
    assert reach(make()).functions


class Calls(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.inner(self.norm(x)))


class Unused(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x

    def other(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 2)


def plain(cls: type[Base]) -> Base:
    module = cls()
    del module.held, module.bound
    return module


@pytest.mark.parametrize("cls", [Calls, Unused])
def test_children_and_methods_that_do_not_run_are_not_reached(cls: type[Base]) -> None:
    assert not reach(plain(cls)).functions


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(2, 2), lambda: nn.Sequential(nn.ReLU()), lambda: nn.MultiheadAttention(4, 1)]
)
def test_torchs_own_layers_call_no_norm(make: Callable[[], nn.Module]) -> None:
    assert not reach(make()).functions


def test_functions_held_by_the_instance_count() -> None:
    module = plain(Calls)
    module.anything = F.layer_norm
    assert reach(module).functions


class ReadsWeight(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.norm.weight


class ReadsInHelper(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x)

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.norm.weight


class ReadsInComprehension(Base):
    def forward(self, x: Tensor) -> Tensor:
        return sum(x * self.norm.weight for _ in range(2))


class ReadsDtype(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.to(self.norm.weight.dtype))


@pytest.mark.parametrize("cls", [ReadsWeight, ReadsInHelper, ReadsInComprehension])
def test_attributes_read_from_a_child(cls: type[Base]) -> None:
    assert ("norm", "weight") in reach(cls()).child_reads


@pytest.mark.parametrize("cls", [Calls, ReadsDtype])
def test_calling_a_child_and_asking_its_dtype_read_nothing(cls: type[Base]) -> None:
    assert not reach(cls()).child_reads


class ByName(Base):
    def norm_of(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 2)


class ByPartOfTheName(ByName):
    def forward(self, x: Tensor, kind: str = "of") -> Tensor:
        return getattr(self, f"norm_{kind}")(x)


class ByOldFormat(ByName):
    def forward(self, x: Tensor, kind: str = "of") -> Tensor:
        return getattr(self, "norm_%s" % kind)(x)  # noqa: UP031


class ByFormat(ByName):
    def forward(self, x: Tensor, kind: str = "of") -> Tensor:
        return getattr(self, "{}_of".format(kind))(x)  # noqa: UP032


class ByJoin(ByName):
    def forward(self, x: Tensor, kinds: tuple[str, ...] = ("norm", "of")) -> Tensor:
        return getattr(self, "_".join(kinds))(x)


class OfItsClass(ByName):
    def forward(self, x: Tensor, name: str = "norm_of") -> Tensor:
        return getattr(self.__class__, name)(self, x)


@pytest.mark.parametrize("cls", [ByPartOfTheName, ByOldFormat, ByFormat, ByJoin, OfItsClass])
def test_a_method_chosen_by_name_is_reached(cls: type[ByName]) -> None:
    assert reach(plain(cls)).functions


class OtherName(ByName):
    def forward(self, x: Tensor, index: int = 0) -> Tensor:
        return getattr(self, f"inner{index or ''}")(x)


class OfAChild(ByName):
    def forward(self, x: Tensor) -> Tensor:
        return getattr(getattr(self.inner, "0"), "forward")(x)  # noqa: B009


@pytest.mark.parametrize("cls", [OtherName, OfAChild])
def test_a_name_that_no_method_has_reaches_none(cls: type[ByName]) -> None:
    found = reach(plain(cls))
    assert not found.functions
    assert "0" not in found.asked
