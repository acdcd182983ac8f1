"""``verify`` of convert and fold: a claim that holds, one that does not, one that is not made, and no claim to test."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import normswap
from normswap import NormswapError, VerificationFailed, surgery

from .support import picture, randomise

Surgery = Callable[..., nn.Module]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


INPUTS = (torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)),)


@pytest.fixture
def net() -> nn.Module:
    return randomise(Net()).eval()


def frozen(model: nn.Module, **options: Any) -> nn.Module:
    return normswap.convert(model, "frozen", **options)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons see a changed model whose head is off."""
    real = surgery.compare

    def shifted(reference: nn.Module, candidate: nn.Module, *rest: Any, **options: Any) -> Any:
        candidate = copy.deepcopy(candidate)
        candidate.get_parameter("head.bias").data += 0.1
        return real(reference, candidate, *rest, **options)

    monkeypatch.setattr(surgery, "compare", shifted)


@pytest.mark.parametrize("operation", [frozen, normswap.fold])
@pytest.mark.parametrize("inplace", [True, False])
def test_a_claim_that_holds(net: nn.Module, operation: Surgery, inplace: bool) -> None:
    expected = operation(copy.deepcopy(net))
    result = operation(net, example_inputs=INPUTS, verify=True, inplace=inplace)
    assert (result is net) == inplace
    assert not isinstance(result.norm, nn.BatchNorm2d)
    assert str(result) == str(expected)
    torch.testing.assert_close(result.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("operation", [frozen, normswap.fold])
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.usefixtures("broken")
def test_a_claim_that_does_not(net: nn.Module, operation: Surgery, inplace: bool) -> None:
    before = picture(net)
    with pytest.raises(VerificationFailed, match="not equivalent to the original, so the model is left") as caught:
        operation(net, example_inputs=INPUTS, verify=True, inplace=inplace)
    assert before.differences(net) == []
    assert isinstance(net.norm, nn.BatchNorm2d)
    verification = caught.value.verification
    assert isinstance(verification, normswap.Verification)
    assert not verification
    assert verification.remarks()[0] in str(caught.value)
    assert isinstance(caught.value, NormswapError)


@pytest.mark.parametrize("inplace", [True, False])
def test_a_fault_of_the_change_itself_is_found(net: nn.Module, inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the comparison: a builder that forgets the statistics."""
    from normswap import registry

    def forgetful(norm: normswap.Norm) -> nn.Module:
        built = nn.BatchNorm2d(norm.channels).eval()
        with torch.no_grad():
            built.weight.copy_(norm.weight)
            built.bias.copy_(norm.bias)
        return built

    monkeypatch.setattr(surgery, "inexact", lambda plan: [])  # It does not even claim to be exact.
    monkeypatch.setitem(registry._builders, "frozen", forgetful)
    before = picture(net)
    with pytest.raises(VerificationFailed, match="convert to frozen"):
        frozen(net, example_inputs=INPUTS, verify=True, inplace=inplace)
    assert before.differences(net) == []


@pytest.mark.parametrize("operation", [frozen, normswap.fold])
def test_nothing_to_compare_on(net: nn.Module, operation: Surgery) -> None:
    with pytest.raises(NormswapError, match="pass them, a tuple"):
        operation(net, verify=True)


@pytest.mark.parametrize("verify", ["onnx", None, 1])
def test_no_such_backend(net: nn.Module, verify: Any) -> None:
    with pytest.raises(NormswapError, match="one of: onnxruntime, eager"):
        frozen(net, example_inputs=INPUTS, verify=verify)


@pytest.mark.parametrize("inplace", [True, False])
def test_no_claim_to_test(net: nn.Module, inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normswap.Plan, "apply", None)
    before = picture(net)
    with pytest.raises(NormswapError, match=r"1 of 1 changes give another function: norm \(approximate\)"):
        normswap.convert(net, "group", example_inputs=INPUTS, verify=True, inplace=inplace)
    assert before.differences(net) == []


def test_without_the_inexact_ones(net: nn.Module) -> None:
    model = nn.Sequential(net.conv, net.norm, nn.GroupNorm(8, 8)).eval()
    with pytest.raises(NormswapError, match=r"1 of 2 changes .*: 1 \(approximate\)\."):
        normswap.convert(model, "instance", example_inputs=INPUTS, verify=True)
    result = normswap.convert(model, "instance", where="2", example_inputs=INPUTS, verify=True)
    assert [type(module) for module in result[1:]] == [nn.BatchNorm2d, nn.InstanceNorm2d]


@pytest.mark.parametrize("inplace", [True, False])
def test_the_claim_is_about_eval_mode(net: nn.Module, inplace: bool) -> None:
    net.train()
    statistics = net.norm.running_mean.clone()
    result = frozen(net, example_inputs=INPUTS, verify=True, inplace=inplace)
    assert result.training
    assert net.training
    assert torch.equal(result.norm.running_mean, statistics)


def test_in_onnxruntime(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = surgery.compare, []

    def watched(*arguments: Any, **options: Any) -> Any:
        seen.append(real(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(surgery, "compare", watched)
    normswap.fold(net, example_inputs=INPUTS, verify="onnxruntime")
    (verification,) = seen
    assert verification.backend == "onnxruntime"
    assert verification


def test_nothing_changed_is_not_compared(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surgery, "compare", None)
    with pytest.warns(UserWarning, match="nothing changed") as warned:
        result = normswap.convert(net, "batch", example_inputs=INPUTS, verify=True)
    assert warned[0].filename == __file__
    assert result is not net


@pytest.mark.parametrize("inplace", [True, False])
def test_an_error_of_the_comparison_undoes_too(net: nn.Module, inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(surgery, "compare", failing)
    before = picture(net)
    with pytest.raises(KeyboardInterrupt):
        normswap.fold(net, example_inputs=INPUTS, verify=True, inplace=inplace)
    assert before.differences(net) == []


def test_not_verified_unless_asked(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surgery, "compare", None)
    frozen(net, example_inputs=INPUTS)
    normswap.fold(net, example_inputs=INPUTS)
