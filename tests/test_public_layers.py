"""normswap.layers has every layer of the package, and docs/layers.md speaks of each."""

from __future__ import annotations

import importlib
import pickle
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import normswap
from normswap import layers, norms
from normswap.norms.condition import NeedsCondition
from normswap.norms.tracked import BatchTrained, TrackedNorm

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "layers.md").read_text(encoding="utf-8")
BASES = {TrackedNorm, BatchTrained, NeedsCondition}
"""What layers derive from; they compute nothing."""
NAMED = {"LinearSchedule": "Linear"}
"""Names that differ from what they are defined as."""


def defined() -> set[type]:
    """Modules of torch that the rooms of the families define."""
    rooms = (importlib.import_module(f"normswap.norms.{each.name}") for each in pkgutil.iter_modules(norms.__path__))
    found = {(room, value) for room in rooms for value in vars(room).values() if isinstance(value, type)}
    return {
        value
        for room, value in found
        if issubclass(value, nn.Module) and value.__module__ == room.__name__ and not value.__name__.startswith("_")
    }


def test_every_layer_is_named() -> None:
    named = {value for name in layers.__all__ if isinstance(value := getattr(layers, name), type)}
    assert defined() - named == BASES
    assert len(defined()) > 70


@pytest.mark.parametrize("kind", normswap.kinds())
def test_what_a_kind_makes_is_named(kind: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()).eval()
    for module in normswap.plan_convert(model, kind).apply().modules():
        ours = type(module).__module__.startswith("normswap.")
        assert not ours or getattr(layers, type(module).__name__) is type(module)


def test_names_are_sorted_and_what_is_pickled_does_not_know_them() -> None:
    assert list(layers.__all__) == sorted(set(layers.__all__))
    for name in layers.__all__:
        value = getattr(layers, name)
        assert value.__name__ == NAMED.get(name, name)
        assert value.__module__.startswith("normswap.norms.")
        assert pickle.loads(pickle.dumps(value)) is value


def test_the_page_has_them_all() -> None:
    text = PAGE.split("## On the weights")[0]
    bases = {re.sub(r"[123]d$", "", name) for name in layers.__all__}
    missing = [base for base in bases if not re.search(rf"\b{base}(?![a-zA-Z_])", text)]
    assert not missing


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_the_output_has_the_dtype_and_the_memory_format_of_the_input() -> None:
    x = torch.randn(3, 8, 4, 5).bfloat16().to(memory_format=torch.channels_last)
    names = [name for name in layers.__all__ if name.endswith("2d") and name != "StandardizedConv2d"]
    ranked = ("ChannelAffine", "ChannelLayerNorm", "ChannelRMSNorm", "ChannelsFirstLayerNorm", "ChannelsFirstRMSNorm")
    for name in (*names, *ranked, "FrozenBatchNorm", "SyncBatchNorm"):
        layer = getattr(layers, name)(8)
        given = {"style": x, "label": 0, "domain": 1}
        model = layers.Conditioned(layer, layer.needs) if isinstance(layer, NeedsCondition) else layer
        for training in (True, False):
            out = model.train(training)(*((x, given[layer.needs]) if model is not layer else (x,)))
            assert out.dtype == x.dtype, name
            assert out.shape == x.shape
            assert out.is_contiguous(memory_format=torch.channels_last), name


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_by_torch_jit_with_its_own_check() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), layers.SwitchableNorm2d(8), layers.GhostBatchNorm2d(8)).double().eval()
    x, other = (torch.randn(n, 3, 4, 5, dtype=torch.float64) for n in (2, 3))
    assert torch.allclose(torch.jit.trace(model, x)(other), model(other), rtol=0, atol=1e-12)
