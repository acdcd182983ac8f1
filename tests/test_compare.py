"""What kinds cost: figures that cannot be otherwise, reasons where there are none, nothing left behind."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from normswap import NormswapError, compare
from normswap.advice import memory
from normswap.advice.compare import AS_IT_IS, Times
from tests.support import picture

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8))


def test_rows() -> None:
    model = network()
    before, state = picture(model), torch.get_rng_state()
    found = compare(model, (X,), ["group", "batch", "identity"], repeats=2, options={"group": {"groups": 4}})
    assert before.differences(model) == []
    assert torch.equal(torch.get_rng_state(), state)
    rows = {row.kind: row for row in found.rows}
    assert list(rows) == [AS_IT_IS, "group", "batch", "identity"]
    own, group, same, none = rows.values()
    assert (own.changed, group.changed, none.changed) == (0, 2, 2)
    assert own.parameters == group.parameters == none.parameters + 2 * (16 + 8)
    assert same.forward is None
    assert same.reason == "1: it already is batch(16, eps=1e-05)"
    for row in (own, group, none):
        assert row.reason is None
        assert row.forward is not None
        assert row.training is not None
        assert row.forward.median > 0
        assert row.peak is not None
        assert row.saved is not None
        assert row.peak > row.saved > 0
    assert (own.saved or 0) > (none.saved or 0)
    assert (found.repeats, found.device, found.shapes) == (2, "cpu", ((4, 3, 8, 8),))
    text, record = str(found), json.loads(json.dumps(found.to_dict()))
    assert "it already is batch" in text
    assert "input 4x3x8x8; cpu, 1 thread; medians of 2 runs taken in turns" in text
    assert record["rows"][1]["kind"] == "group"
    assert record["rows"][1]["forward"]["median"] == pytest.approx(group.forward.median if group.forward else 0)


def test_without_the_backward_pass() -> None:
    (own, group) = compare(network(), (X,), ["group"], repeats=1, backward=False).rows
    assert (own.training, own.saved, group.training) == (None, None, None)
    assert (own.peak or 0) > 0
    frozen = network().requires_grad_(False)
    (own,) = compare(frozen, (X,), [], repeats=1).rows
    assert (own.training, own.reason) == (None, "no output has a gradient")


def test_a_kind_that_does_not_run_says_why() -> None:
    class Fussy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.conv(x))
            if x.mean((2, 3)).abs().max() < 1e-4:
                raise ValueError("nothing there")
            return x

    own, instance, group = compare(Fussy(), (X,), ["instance", "group"], repeats=1).rows
    assert instance.reason == "ValueError: nothing there"
    assert instance.forward is None
    assert own.forward is not None
    assert group.forward is not None


def test_misuse_and_inputs_that_the_model_does_not_take() -> None:
    with pytest.raises(NormswapError, match="must be a tuple"):
        compare(network(), X)  # type: ignore[arg-type]
    with pytest.raises(NormswapError, match="unknown kind 'grup'"):
        compare(network(), (X,), ["grup"])
    with pytest.raises(NormswapError, match="repeats=0"):
        compare(network(), (X,), repeats=0)
    with pytest.raises(NormswapError, match=r"does not run on example_inputs .*: RuntimeError: .*channels"):
        compare(network(), (X[:, :2],), ["group"])


def test_memory_of_known_tensors() -> None:
    model = nn.Linear(64, 64, bias=False)
    x = torch.randn(32, 64)
    size = 32 * 64 * 4
    assert memory.saved(model, lambda: model(x).square()) == 2 * size  # the input, and what is squared
    assert memory.peak(model, lambda: model(x)) == size
    assert memory.peak(model, lambda: model(model(x)).sum()) == 2 * size

    def freed() -> Tensor:
        kept = model(x)
        for _ in range(3):
            kept = model(kept)
        return kept

    with torch.no_grad():
        assert memory.peak(model, freed) == 2 * size  # what went before is let go
    assert memory.peak(model, lambda: model.weight.view(-1)) == 0


def test_median_and_spread() -> None:
    assert Times.of([1.0]) == Times(1.0, 0.0)
    times = Times.of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert times.median == 3.0
    assert times.spread > 1


def test_what_this_tool_refuses_is_told_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    (_, row) = compare(model, (torch.randn(2, 3, 8, 8),), ["conditional"], repeats=1).rows
    assert row.reason is not None
    assert row.reason.startswith("ConditionalNorm2d needs a label")
