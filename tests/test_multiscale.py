"""Multiscale normalization: cells of a pyramid, mixed by learned weights."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from normswap import NormswapError, apply_recipe, plan_convert
from normswap.norms import cells, moments, passes
from normswap.norms.multiscale import MultiscaleNorm, MultiscaleNorm1d, MultiscaleNorm2d
from normswap.norms.positional import PositionalNorm2d
from tests.support import distance, randomise, sample
from tests.test_layers import EPS, affine, whitened
from tests.test_moments import arrange, saved_bytes


def formula(x: Tensor, module: Any) -> Tensor:
    """Of maps, position by position."""
    out = torch.empty_like(x)
    means, variances = module.mean_gate.softmax(0), module.var_gate.softmax(0)
    height, width = x.shape[2:]
    for i in range(height):
        for j in range(width):
            mean, var = torch.zeros(x.shape[:2]).double(), torch.zeros(x.shape[:2]).double()
            for index, scale in enumerate(module.scales):
                rows = [r for r in range(height) if r * scale // height == i * scale // height]
                columns = [c for c in range(width) if c * scale // width == j * scale // width]
                cell = x[:, :, rows][..., columns]
                mean = mean + means[index] * cell.mean((2, 3))
                var = var + variances[index] * cell.var((2, 3), correction=0)
            out[:, :, i, j] = (x[:, :, i, j] - mean) / torch.sqrt(var + EPS)
    return affine(out, module)


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (3, 6), (1, 2)], ids=str)
@pytest.mark.parametrize("scales", [(1, 2, 4), (2, 6), (1,)], ids=str)
def test_formula(size: tuple[int, int], scales: tuple[int, ...]) -> None:
    module = randomise(MultiscaleNorm2d(4, scales=scales).double())
    x = sample(2, 4, *size)
    for training in (True, False):
        assert distance(module.train(training)(x), formula(x, module)) < 1e-10
    assert set(module.state_dict()) == {"weight", "bias", "mean_gate", "var_gate"}


@pytest.mark.parametrize("layout", ["contiguous", "last", "transposed"])
@pytest.mark.parametrize(
    "shape", [(3, 4, 8), (2, 4, 7), (2, 3, 8, 4), (2, 3, 5, 7), (1, 2, 4, 3, 4), (1, 2, 3, 5, 2)], ids=str
)
@pytest.mark.parametrize(("limit", "small"), [(9, 0), (9, 1024), (1 << 16, 0), (1 << 16, 1024)])
def test_gradients_of_even_and_uneven_cells(
    shape: tuple[int, ...], layout: str, limit: int, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand those of the plain operations; the second time with means that are shifted away."""
    monkeypatch.setattr(passes, "BLOCK", limit)
    monkeypatch.setattr(cells, "SMALL", small)
    monkeypatch.setattr(cells.CellPasses, "larger", 1)
    module = randomise(MultiscaleNorm(shape[1], scales=(1, 2, 4)).double())
    for mean in (0.0, 100.0):
        x = arrange(sample(*shape) + mean, layout).detach().requires_grad_()
        out = module(x)
        assert out.stride() == (x.stride() if layout != "transposed" else x.contiguous().stride())
        with monkeypatch.context() as patch:
            patch.setattr(moments, "_plainly", lambda *_: True)
            wanted = module(x)
        assert distance(out, wanted) < 1e-10
        inputs = (x, *module.parameters())
        ours, theirs = (torch.autograd.grad(each.pow(3).sum(), inputs) for each in (out, wanted))
        assert all(
            float((a - b).abs().max()) < 1e-9 * max(1.0, float(b.abs().max()))
            for a, b in zip(ours, theirs, strict=True)
        )


@pytest.mark.parametrize("size", [(4, 2), (3, 2)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "last"])
def test_gradcheck_twice(size: tuple[int, int], layout: str) -> None:
    module = randomise(MultiscaleNorm2d(2, scales=(1, 2)).double())
    x = arrange(sample(2, 2, *size), layout).clone(memory_format=torch.preserve_format).requires_grad_()
    call = lambda x, *_: module(x)  # noqa: E731
    assert gradcheck(call, (x, *module.parameters()))
    assert gradgradcheck(call, (x, *module.parameters()))


@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("size", [(40, 40), (41, 39), (48, 52), (30, 31)], ids=str)
def test_cells_with_means_of_their_own(size: tuple[int, int], layout: str) -> None:
    """A ramp of large steps: every cell has another mean, far larger than its spread."""
    step = torch.arange(size[0]).mul(4).div(size[0], rounding_mode="floor")[:, None] * 1e3
    x = arrange(sample(2, 3, *size) * 1e-1 + step, layout).float().requires_grad_()
    module = MultiscaleNorm2d(3, scales=(4,), eps=1e-9)
    given = x.detach().double().requires_grad_()
    exact = MultiscaleNorm2d(3, scales=(4,), eps=1e-9).double()
    assert distance(module(x), exact(given)) < 1e-4
    ours, theirs = (torch.autograd.grad(m(at).sin().sum(), at)[0] for m, at in ((module, x), (exact, given)))
    assert distance(ours, theirs) < 1e-3


def test_what_is_kept_and_sixteen_bits() -> None:
    module = randomise(MultiscaleNorm2d(8))
    x = torch.randn(4, 8, 60, 64, requires_grad=True)
    assert saved_bytes(module, x) < 1.1 * x.nbytes
    for layout in ("contiguous", "last"):
        half = arrange(x.detach(), layout).bfloat16().requires_grad_()
        out = module(half)
        assert out.dtype == torch.bfloat16
        assert distance(out, module(half.detach().float())) < 0.02
        exact = half.detach().float().requires_grad_()
        pairs = ((out.float(), half), (module(exact), exact))
        ours, theirs = (torch.autograd.grad(each.sin().sum(), at)[0] for each, at in pairs)
        assert distance(ours, theirs) < 0.05


@pytest.mark.parametrize("traced", [False, True])
def test_autocast_rounds_nothing(traced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of matrices stay in float32, backward too."""
    if traced:
        monkeypatch.setattr(moments, "_plainly", lambda *_: True)
    module = randomise(MultiscaleNorm2d(3))
    results = []
    for on in (False, True):
        x = sample(2, 3, 8, 8).float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            out = module(x)
            results.append((out, *torch.autograd.grad(out.pow(3).sum(), (x, *module.parameters()))))
    assert all(distance(a, b) < 1e-5 * traced or torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "last"])
def test_an_infinite_value_stays_in_its_cell(layout: str) -> None:
    uneven = arrange(sample(1, 2, 7, 6).float(), layout).clone()
    uneven[0, 0, 0, 0] = float("inf")
    assert MultiscaleNorm2d(2, scales=(3,))(uneven).isfinite().logical_not().sum() == 6
    x = sample(1, 2, 8, 8).float()
    x[0, 0, 0, 0] = float("inf")
    lost = MultiscaleNorm2d(2, scales=(4,))(x).isfinite().logical_not()
    assert lost[0, 0, :2, :2].all()
    assert lost.sum() == 4


def test_compiled_under_autocast_gradients_are_not_rounded_either() -> None:
    module = randomise(MultiscaleNorm2d(4, scales=(1, 3)))
    x = sample(3, 4, 6, 5).float().to(memory_format=torch.channels_last).requires_grad_()
    cotangent = sample(3, 4, 6, 5, seed=5).float()
    wanted = torch.autograd.grad((module(x) * cotangent).sum(), (x, *module.parameters()))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = compiled(x)
    assert out.stride() == x.stride()
    ours = torch.autograd.grad((out * cotangent).sum(), (x, *module.parameters()))
    assert all(distance(*pair) < 1e-5 for pair in zip(ours, wanted, strict=True))
    torch.compiler.reset()


@pytest.mark.parametrize("make", [MultiscaleNorm2d, PositionalNorm2d])
def test_where_the_precision_of_products_was_set_by_the_newer_names(make: Any) -> None:
    """torch.get_float32_matmul_precision raises there."""
    module, x = make(4), sample(3, 4, 8, 8).float().requires_grad_()
    wanted = torch.autograd.grad(module(x).sin().sum(), x)[0]
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert torch.equal(torch.autograd.grad(module(x).sin().sum(), x)[0], wanted)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_scale_one_is_instance_normalization_in_any_rank() -> None:
    for shape in ((3, 4, 7), (3, 4, 5, 6), (2, 4, 3, 4, 5)):
        module = randomise(MultiscaleNorm(4, scales="1").double())
        x = sample(*shape)
        assert distance(module(x), affine(whitened(x, tuple(range(2, x.dim()))), module)) < 1e-10


def test_gates_learn_the_scale() -> None:
    x = sample(2, 4, 8, 8)
    wanted = torch.cat([torch.cat([whitened(q, (2, 3)) for q in half.split(4, 3)], 3) for half in x.split(4, 2)], 2)
    module = MultiscaleNorm2d(4, scales=(1, 2)).double()
    optimizer = torch.optim.Adam([module.mean_gate, module.var_gate], lr=1.0)
    before = float((module(x) - wanted).detach().square().mean())
    for _ in range(15):
        optimizer.zero_grad()
        (module(x) - wanted).square().mean().backward()
        optimizer.step()
    assert module.mean_gate[1] - module.mean_gate[0] > 3
    assert float((module(x) - wanted).detach().square().mean()) < 1e-2 * before


def test_conversion() -> None:
    x = sample(2, 8, 5, 6)
    instance = nn.Sequential(randomise(nn.InstanceNorm2d(8, affine=True).double()))
    plan = plan_convert(instance, "multiscale")
    assert plan.changes[0].exactness == "approximate"
    preserved = plan_convert(instance, "multiscale", init="preserve")
    assert preserved.changes[0].exactness == "exact"
    assert distance(preserved.apply()(x), instance(x)) < 1e-10
    back = plan_convert(preserved.apply(), "instance")
    assert (back.changes[0].exactness, back.changes[0].lost) == ("exact", ("weights of the scales",))
    assert torch.equal(back.apply()(x), instance(x))
    batch = nn.Sequential(nn.BatchNorm2d(8))
    assert "cannot compute the same" in plan_convert(batch, "multiscale", init="preserve").skips[0].reason
    assert "may be (N, C)" in plan_convert(nn.Sequential(nn.BatchNorm1d(8)), "multiscale").skips[0].reason
    for scales in ("1,3", [1, 3], (1, 3)):
        plan = plan_convert(batch, "multiscale", scales=scales)
        made, again = plan.apply(), apply_recipe(batch, json.loads(json.dumps(plan.recipe)))
        again.load_state_dict(made.state_dict(), strict=True)
        assert again[0].scales == made[0].scales == (1, 3)
    randomise(made)
    assert plan_convert(made, "multiscale", scales=(1, 3)).skips[0].reason.startswith("it already is")
    assert plan_convert(made, "multiscale", scales=(1, 2)).changes[0].exactness == "approximate"


@pytest.mark.parametrize("bad", [(), (0,), (2, 3), (4, 2), (1, 1), "1,a", 2, (1.5,), "x"], ids=str)
def test_no_scales(bad: Any) -> None:
    with pytest.raises(NormswapError, match=r"scales=.*each divide the next"):
        MultiscaleNorm1d(8, scales=bad)
