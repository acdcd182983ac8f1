"""Registration, dispatch and plug-ins."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap import Norm, NormswapError, Refusal, builds, convert, plan_convert, read, reads, registry
from normswap.norms import batch
from tests.support import check_copies, distance, only, plan_of, randomise, sample


@pytest.fixture(autouse=True)
def _registry_as_it_was() -> Iterator[None]:
    tables = (registry._readers, registry._patterns, registry._builders)
    saved = [dict(table) for table in tables]
    yield
    for table, before in zip(tables, saved, strict=True):
        table.clear()
        table.update(before)  # type: ignore[arg-type]
    registry._lookup.cache_clear()
    registry._load.cache_clear()


class Own(nn.BatchNorm2d):
    """A subclass with nothing but a name."""


class Doubled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Hidden(nn.BatchNorm2d):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


def test_dispatch_goes_to_the_nearest_class() -> None:
    assert read(Own(4)).kind == "batch"

    @reads(Own)
    def mine(module: nn.BatchNorm2d) -> Norm:
        return replace(batch.read(module), kind="mine")

    assert read(Own(4)).kind == "mine"
    assert read(nn.BatchNorm2d(4)).kind == "batch"


@pytest.mark.parametrize("cls", [Doubled, Hidden])
def test_a_forward_of_its_own_is_not_taken_for_the_parent(cls: type[nn.BatchNorm2d]) -> None:
    with pytest.raises(Refusal, match="of its own, so it is not taken for BatchNorm2d"):
        read(cls(4))


def test_a_forward_replaced_on_the_instance_is_not_taken_for_the_class() -> None:
    norm = nn.BatchNorm2d(4)
    norm.forward = lambda x: x  # type: ignore[method-assign, assignment]
    with pytest.raises(Refusal, match="replaced on the instance"):
        read(norm)
    assert "replaced on the instance" in only(plan_of(norm, "group").skips).reason


def test_an_unknown_class_is_refused_by_name() -> None:
    with pytest.raises(Refusal, match=r"no reader for torch\.nn\.modules\.linear\.Linear"):
        read(nn.Linear(2, 2))


def test_registering_a_reader_twice_names_the_first() -> None:
    with pytest.raises(NormswapError, match=r"BatchNorm2d already has a reader: normswap\.norms\.batch\.read"):
        reads(nn.BatchNorm2d)(batch.read)
    with pytest.raises(NormswapError, match="already has a reader"):
        reads("transformers.models.*RMSNorm")(batch.read)


def test_registering_a_kind_twice_names_the_first() -> None:
    with pytest.raises(NormswapError, match=r"kind 'group' already has a builder: normswap\.norms\.group\.build"):
        builds("group")(lambda norm: nn.Identity())


def test_an_unknown_kind_lists_the_kinds() -> None:
    listed = ", ".join(normswap.kinds())
    assert ", batch, " in listed
    with pytest.raises(NormswapError, match=f"unknown kind 'gruop'; the kinds are: {listed}"):
        registry.builder("gruop")
    with pytest.raises(NormswapError, match="unknown kind"):
        plan_convert(nn.BatchNorm2d(4), ["group"])  # type: ignore[arg-type]


def test_options_of_a_kind() -> None:
    assert list(registry.options("group")) == ["groups", "channels_per_group"]
    assert list(registry.options("switchable")) == ["gate_gap", "batch", "synchronised", "process_group"]
    assert not registry.options("batch")
    with pytest.raises(
        NormswapError, match="kind 'group' has no option 'over'; its options: groups, channels_per_group"
    ):
        registry.check_options("group", {"over": "map"})
    with pytest.raises(NormswapError, match="kind 'batch' has no option 'groups'; its options: none"):
        plan_convert(nn.BatchNorm2d(4), "batch", groups=2)


def test_a_class_in_a_library_that_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    reads("norm_library.layers.SpecialNorm")(batch.read)
    assert "norm_library" not in sys.modules

    class SpecialNorm(nn.BatchNorm2d):
        __module__ = "norm_library.layers"
        __qualname__ = "SpecialNorm"

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    assert read(SpecialNorm(4)).kind == "batch"
    monkeypatch.setattr(SpecialNorm, "__module__", "other_library.layers")
    registry._lookup.cache_clear()
    with pytest.raises(Refusal):
        read(SpecialNorm(4))


def test_a_strangers_target_in_one_place() -> None:
    class Scale(nn.Module):
        def __init__(self, channels: int, times: float) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((channels,), times))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight.reshape(-1, 1, 1)

    @builds("scale")
    def scale(norm: Norm, *, times: float = 3.0) -> nn.Module:
        return Scale(norm.channels, times)

    assert "scale" in normswap.kinds()
    model = convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), "scale", times=5.0)
    assert torch.equal(model[1].weight, torch.full((4,), 5.0))
    with pytest.raises(NormswapError, match="its options: times"):
        convert(model, "scale", groups=2)


def test_a_reader_that_fails_is_a_reason() -> None:
    @reads(Doubled)
    def old(module: Any) -> Norm:
        return Norm("batch", module.number_of_features)

    skip = only(plan_of(Doubled(4), "group").skips)
    assert skip.reason.startswith("the reader of Doubled failed: AttributeError")


class ConvBeforeRelu(nn.BatchNorm2d):
    """Followers in another order than they are registered in, and one that is no submodule at all."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.Tanh()
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.act(self.mix(super().forward(x))))


def test_followers_keep_their_order_and_those_made_by_the_reader_count() -> None:
    @reads(ConvBeforeRelu)
    def mine(module: ConvBeforeRelu) -> Norm:
        return replace(batch.read(module), then=(module.mix, module.act, nn.ReLU()))

    norm = randomise(ConvBeforeRelu(4).double())
    x = sample(3, 4, 5, 5)
    frozen = convert(nn.Sequential(norm), "frozen").eval()
    assert distance(frozen(x), norm.eval()(x)) < 1e-12
    assert [name for name, _ in frozen.named_parameters()] == ["0.mix.weight", "0.mix.bias"]
    assert list(frozen.state_dict()) == [
        *(f"0.{name}" for name in ("weight", "bias", "running_mean", "running_var", "mix.weight", "mix.bias")),
    ]
    check_copies(frozen, x)


class _Entry:
    """A stand-in for an installed entry point."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self.name, self.value, self.load = "plug", "plug_in.norms", load


def entry_points(monkeypatch: pytest.MonkeyPatch, load: Callable[[], Any]) -> None:
    asked = []

    def found(*, group: str) -> list[_Entry]:
        asked.append(group)
        return [_Entry(load)] if group == "normswap.norms" else []

    monkeypatch.setattr(metadata, "entry_points", found)
    registry._load.cache_clear()
    registry._lookup.cache_clear()


def test_entry_points_register_readers_and_builders(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> types.ModuleType:
        builds("plugged")(lambda norm: nn.Identity())
        reads("plug_in.PluggedNorm")(batch.read)
        return types.ModuleType("plug_in")

    entry_points(monkeypatch, load)
    assert "plugged" in normswap.kinds()

    class PluggedNorm(Doubled):
        __module__ = "plug_in"
        __qualname__ = "PluggedNorm"

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    assert read(PluggedNorm(4)).kind == "batch"
    assert only(plan_of(PluggedNorm(4), "plugged").changes).to == "plugged"


def test_a_broken_entry_point_is_named_and_the_rest_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        raise ImportError("no such thing")

    entry_points(monkeypatch, load)
    with pytest.warns(
        UserWarning, match=r"entry point 'plug' \(plug_in\.norms\) failed: ImportError\('no such thing'\)"
    ):
        assert "group" in normswap.kinds()
    assert read(nn.BatchNorm2d(4)).kind == "batch"
