"""Norms over the channels at each position: in every layout the formula, its gradients, and what torch would do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from normswap.norms import positions
from normswap.norms.layer import ChannelLayerNorm
from normswap.norms.positional import PositionalNorm2d
from normswap.norms.positions import over_channels
from normswap.norms.rms import ChannelRMSNorm, ChannelsFirstRMSNorm
from tests.support import distance, randomise, sample
from tests.test_moments import LAYOUTS, arrange, saved_bytes

SHAPES = [(5, 6), (4, 6, 7), (3, 6, 4, 5), (2, 6, 3, 2, 4), (1, 1, 4, 4), (3, 6, 1, 1)]


def torchs(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool) -> Tensor:
    moved = x.movedim(1, -1)
    if centred:
        return F.layer_norm(moved, moved.shape[-1:], weight, bias, eps).movedim(-1, 1)
    return F.rms_norm(moved, moved.shape[-1:], weight, eps).movedim(-1, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", [3, 1 << 16])
def test_value_and_gradients(shape: tuple[int, ...], layout: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positions, "BLOCK", block)
    cotangent = torch.linspace(-1, 2, sample(*shape).numel(), dtype=torch.float64).reshape(shape)
    for centred in (True, False):
        results = []
        for call in (over_channels, torchs):
            x = arrange(sample(*shape) + 1, layout).detach().requires_grad_()
            weight = sample(1, shape[1], seed=2)[0].requires_grad_()
            bias = sample(1, shape[1], seed=3)[0].requires_grad_() if centred else None
            out = call(x, weight, bias, 1e-3, centred)
            wanted = [t for t in (x, weight, bias) if t is not None]
            results.append((out, *torch.autograd.grad((out * cotangent).sum(), wanted)))
        for ours, theirs in zip(*results, strict=True):
            assert float((ours - theirs).detach().abs().max()) < 1e-10 * max(1.0, float(theirs.detach().abs().max()))


@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("centred", [True, False])
def test_gradcheck_twice(layout: str, centred: bool) -> None:
    x = arrange(sample(2, 3, 2, 2), layout).clone(memory_format=torch.preserve_format).requires_grad_()
    tensors = [sample(1, 3, seed=seed)[0].requires_grad_() for seed in (2, 3)]
    call = lambda x, *t: over_channels(x, *t, 1e-3, centred)  # noqa: E731
    assert gradcheck(call, (x, *tensors))
    assert gradgradcheck(call, (x, *tensors))


@pytest.mark.parametrize("layout", ["contiguous", "last"])
def test_the_memory_format_and_what_is_kept(layout: str) -> None:
    x = arrange(torch.randn(4, 64, 16, 16), layout).requires_grad_()
    for module in (PositionalNorm2d(64), ChannelLayerNorm(64), ChannelRMSNorm(64), ChannelsFirstRMSNorm(64)):
        out = module(x)
        assert out.stride() == x.stride()
        assert torch.autograd.grad(out.square().sum(), x)[0].stride() == x.stride()
        assert saved_bytes(module, x) < 1.1 * x.nbytes


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "last"])
def test_low_precision_with_parameters_of_either(layout: str, kind: torch.dtype) -> None:
    for centred, own in ((True, torch.float32), (True, kind), (False, torch.float32), (False, kind)):
        x = arrange(sample(3, 8, 6, 5), layout).to(kind).requires_grad_()
        weight = sample(1, 8, seed=2)[0].to(own).requires_grad_()
        out = over_channels(x, weight, weight if centred else None, 1e-3, centred)
        assert out.dtype == kind
        given, exact = (t.detach().double().requires_grad_() for t in (x, weight))
        wanted = torchs(given, exact, exact if centred else None, 1e-3, centred)
        bound = 4 * torch.finfo(kind).eps
        assert distance(out, wanted) < bound
        ours = torch.autograd.grad(out.double().sin().sum(), (x, weight))
        theirs = torch.autograd.grad(wanted.sin().sum(), (given, exact))
        assert all(distance(*pair) < 4 * bound for pair in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "last"])
def test_gradients_where_means_are_large(layout: str) -> None:
    x = arrange((sample(2, 64, 6, 6) * 1e-2 + 1e4).float(), layout).requires_grad_()
    module = randomise(PositionalNorm2d(64, eps=1e-9))
    exact, given = copy.deepcopy(module).double(), x.detach().double().requires_grad_()
    ours = torch.autograd.grad(module(x).sin().sum(), (x, *module.parameters()))
    theirs = torch.autograd.grad(exact(given).sin().sum(), (given, *exact.parameters()))
    assert all(distance(*pair) < 1e-4 for pair in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "last"])
def test_rms_over_the_map(layout: str) -> None:
    module = randomise(ChannelsFirstRMSNorm(6, eps=1e-3).double())
    x = arrange(sample(3, 6, 4, 5), layout).requires_grad_()
    weight = module.weight.detach()[:, None, None]
    wanted = x / torch.sqrt(x.square().mean((1, 2, 3), keepdim=True) + 1e-3) * weight
    assert distance(module(x), wanted) < 1e-12
    pair = (torch.autograd.grad(each.sin().sum(), x)[0] for each in (module(x), wanted))
    assert distance(*pair) < 1e-10
    assert float(module((x * 0 + 1e4).float()).detach().abs().max()) < 10


def test_autocast_as_of_torchs_norms() -> None:
    x = torch.randn(2, 8, 3, 3).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert ChannelLayerNorm(8)(x.bfloat16()).dtype == nn.LayerNorm(3)(x.bfloat16()).dtype
        half = randomise(ChannelRMSNorm(8).bfloat16())
        assert distance(half(x.bfloat16()), torchs(x.bfloat16(), half.weight, None, 2**-23, False)) < 0.02
        module = randomise(PositionalNorm2d(8))
        ours = torch.autograd.grad(module(x).sin().sum(), x)[0]
    assert distance(ours, torch.autograd.grad(module(x).sin().sum(), x)[0]) < 1e-6


def test_compiled_and_empty() -> None:
    x = torch.randn(2, 8, 3, 3)
    model = randomise(nn.Sequential(ChannelLayerNorm(8), ChannelRMSNorm(8), ChannelsFirstRMSNorm(8)))
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    assert distance(compiled(x), model(x)) < 1e-5
    torch.compiler.reset()
    assert model(x[:0]).shape == (0, 8, 3, 3)


def test_squares_of_16_bits_do_not_overflow() -> None:
    """Also where something looks into the operations."""
    layer, x = ChannelsFirstRMSNorm(8).half(), torch.full((2, 8, 3, 3), 300.0, dtype=torch.float16)
    for found in (layer(x), torch.func.vmap(layer)(x[None])[0]):
        assert torch.equal(found, torch.ones_like(x))
