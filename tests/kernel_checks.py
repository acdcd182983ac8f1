"""The Triton kernels against the plain passes: run by ``test_kernels.py``, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from normswap.norms import kernels, passes
from normswap.norms.evonorm import EvoNormB02d, EvoNormS02d
from normswap.norms.frn import FilterResponseNorm2d
from normswap.norms.moments import normalize, plain
from normswap.norms.multiscale import MultiscaleNorm2d
from normswap.norms.passes import EmptyPasses, KernelPasses, Passes
from normswap.norms.switchable import SwitchableNorm2d
from tests.support import distance, randomise, sample
from tests.test_moments import arrange, mixed, tensors

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SHAPES = {
    "rows share a tile": (2, 5, 3),
    "several chunks": (1, 2, 4, 2, 5),
    "one place": (2, 5, 1, 1),
    "one row": (1, 1, 13, 5),
    "more channels than a tile has rows": (1, 20, 3),
}
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def everything(over: Passes, x: Tensor, grad: Tensor) -> list[Tensor]:
    x, grad = over.dense(x), over.dense(grad)
    factors = sample(3, *x.shape[:2], seed=3).to(x.device)
    mean, var = over.measure(x)
    out = over.affine(x, factors[0], factors[1])
    found = [mean, var, out, *over.sums(x, grad), over.combine(x, grad, *factors)]
    assert [each.stride() for each in (out, found[-1])] == [x.stride(), grad.stride()]
    assert out.dtype == found[-1].dtype == x.dtype
    return found


@pytest.mark.parametrize("programs", [1, 1024])
@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_passes(name: str, layout: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one program for a row, and with the row in parts."""
    monkeypatch.setattr(kernels, "TILE", 16)
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    x, grad = (arrange(sample(*SHAPES[name], seed=seed).to(DEVICE), layout) for seed in (1, 2))
    for ours, wanted in zip(everything(KernelPasses(x), x, grad), everything(Passes(x), x, grad), strict=True):
        assert float((ours - wanted).abs().max()) < 1e-13 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "last"])
def test_every_precision(layout: str, dtype: torch.dtype) -> None:
    x, grad = (arrange(sample(1, 2, 5, 7, seed=seed).to(DEVICE), layout).to(dtype) for seed in (1, 2))
    wanted = everything(Passes(x.double()), x.double(), grad.double())
    for index, (ours, exact) in enumerate(zip(everything(KernelPasses(x), x, grad), wanted, strict=True)):
        assert distance(ours, exact) < (ROUNDING[dtype] if index in (2, 5) else min(ROUNDING[dtype], 1e-6))


@pytest.mark.parametrize("start", [1e4, 0.0])
@pytest.mark.parametrize("layout", ["contiguous", "last"])
def test_large_means_do_not_cancel(layout: str, start: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the first chunk, whose mean is subtracted, is unlike the others."""
    monkeypatch.setattr(kernels, "TILE", 128)
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    x = arrange((sample(1, 2, 16, 20) * 1e-2 + 1e4).float().to(DEVICE), layout)
    x[:, :, :4] += start - 1e4
    over, exact = KernelPasses(x), x.double()
    mean, var = over.measure(over.dense(x))
    wanted = exact.mean((2, 3)), exact.var((2, 3), correction=0)
    assert float(((mean - wanted[0]) / wanted[1].sqrt()).abs().max()) < 1e-5
    assert distance(var, wanted[1]) < 1e-5
    scale = wanted[1].rsqrt()
    out = over.affine(over.dense(x), scale, -wanted[0] * scale)
    assert distance(out, (exact - wanted[0][..., None, None]) * scale[..., None, None]) < 1e-5


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
def test_what_is_not_finite_stays_in_its_row() -> None:
    for bad in (float("nan"), float("inf")):
        x = sample(2, 3, 4, 5).to(DEVICE)
        x[1, 2, 3, 3] = bad
        mean, var = KernelPasses(x).measure(x)
        for each in (mean, var):
            assert not bool(each[1, 2].isfinite())
            assert int(each.isfinite().sum()) == 5


@pytest.mark.parametrize("layout", ["contiguous", "last", "transposed"])
def test_the_core_uses_them(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Any] = []
    choose = passes.passes
    monkeypatch.setattr("normswap.norms.moments.passes", lambda x: used.append(choose(x)) or used[-1])
    x = arrange(sample(2, 6, 4, 5).to(DEVICE), layout)
    results = []
    for call in (normalize, plain):
        given, own = x.detach().requires_grad_(), [t.detach().to(DEVICE).requires_grad_() for t in tensors(6)]
        out, seen = call(given, mixed, *own)
        results.append((out, *seen, *torch.autograd.grad(out.pow(3).sum(), (given, *own))))
    assert [type(each) for each in used] == [KernelPasses]
    for ours, wanted in zip(*results, strict=True):
        assert distance(ours, wanted) < 1e-10


def test_a_layer_in_half_precision() -> None:
    layer = randomise(SwitchableNorm2d(4)).to(DEVICE)
    x = sample(2, 4, 3, 3).to(DEVICE).bfloat16().requires_grad_()
    out = layer(x)
    out.float().pow(3).sum().backward()
    exact, given = randomise(SwitchableNorm2d(4)).double().to(DEVICE), x.detach().double().requires_grad_()
    wanted = plain_call(exact, given)
    wanted.pow(3).sum().backward()
    assert distance(out, wanted) < 1e-2
    assert distance(x.grad, given.grad) < 2e-2


@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("kind", [EvoNormB02d, EvoNormS02d, FilterResponseNorm2d, MultiscaleNorm2d])
def test_layers_with_passes_of_their_own(kind: Any, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they do beside the kernels' passes, and in their place."""
    layer = randomise(kind(4).double()).to(DEVICE)
    x = arrange(sample(2, 4, 4, 6).to(DEVICE), layout).requires_grad_()
    assert type(passes.passes(x)) is KernelPasses
    results = []
    for plainly in (False, True):
        if plainly:
            monkeypatch.setattr("normswap.norms.moments._plainly", lambda *_: True)
            monkeypatch.setattr("normswap.norms.pointwise._plainly", lambda *_: True)
        out = layer(x)
        results.append((out, *torch.autograd.grad(out.sin().sum(), (x, *layer.parameters()))))
    for ours, wanted in zip(*results, strict=True):
        assert distance(ours, wanted) < 1e-10


def plain_call(layer: torch.nn.Module, x: Tensor) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("normswap.norms.switchable.normalize", lambda x, f, *t, **_: plain(x, f, *t))
        out: Tensor = layer(x)
    return out


def test_what_has_no_kernels() -> None:
    x = torch.zeros(2, 3, 4, device=DEVICE)
    assert type(passes.passes(x)) is KernelPasses
    assert type(passes.passes(x[..., 0])) is not KernelPasses  # vectors: nothing to sum
    assert type(passes.passes(x[:0])) is EmptyPasses
    assert not passes.has_kernels(x.to(torch.float8_e5m2))
