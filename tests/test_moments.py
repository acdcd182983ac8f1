"""The core of the layers that torch lacks: by hand and in plain operations the same, precise, and usable wherever
torch's own norms are."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from normswap.norms import passes
from normswap.norms.moments import Coefficients, Moments, affine, normalize, plain
from normswap.norms.switchable import SwitchableNorm2d
from tests.support import distance, randomise, sample

SHAPES = [(5, 6), (4, 6, 7), (3, 6, 4, 5), (2, 6, 3, 2, 4), (1, 6, 4, 4), (3, 6, 1, 1), (4, 1, 3, 3)]
AFFINE = [torch.linspace(0.5, 1.5, 6, dtype=torch.float64), torch.linspace(-1, 1, 6, dtype=torch.float64)]


def mixed(moments: Moments, weight: Tensor | None, bias: Tensor | None, *, eps: float = 1e-3) -> Coefficients:
    """Every moment at once."""
    layer, batch = moments.over_channels(), moments.over_batch()
    mean = (moments.mean + 2 * layer[0] + batch[0]) / 4
    var = (moments.var + layer[1] + 2 * batch[1]) / 4
    return affine(mean, var, weight, bias, eps, batch)


def written_out(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-3) -> Tensor:
    x = x.double()
    flat = x.flatten(2) if x.dim() > 2 else x[..., None]
    axes: tuple[Any, ...] = ((2,), (1, 2), (0, 2))
    means = [flat.mean(a, keepdim=True) for a in axes]
    variances = [flat.var(a, keepdim=True, correction=0) for a in axes]
    mean = (means[0] + 2 * means[1] + means[2]) / 4
    var = (variances[0] + variances[1] + 2 * variances[2]) / 4
    out = (flat - mean) / torch.sqrt(var + eps) * weight.double()[:, None] + bias.double()[:, None]
    return out.reshape(x.shape)


def tensors(channels: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [t[:channels].to(dtype).clone().requires_grad_() for t in AFFINE]


LAYOUTS = ["contiguous", "last", "transposed", "expanded"]


def arrange(x: Tensor, layout: str) -> Tensor:
    if layout == "last" and x.dim() > 2:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed" and x.dim() > 3:
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    return x


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", [7, 1 << 16])
def test_value_and_gradients(shape: tuple[int, ...], layout: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "BLOCK", block)
    monkeypatch.setattr(passes, "SAMPLE", block)
    x = arrange(sample(*shape), layout)
    weights = torch.linspace(-1, 2, x.numel(), dtype=torch.float64).reshape(shape)
    results = []
    for call in (lambda x, *t: normalize(x, mixed, *t)[0], lambda x, *t: plain(x, mixed, *t)[0], written_out):
        given = x.detach().requires_grad_()
        own = tensors(shape[1])
        out = call(given, *own)
        gradients = torch.autograd.grad((out * weights).sum(), (given, *own))
        results.append((out, *gradients))
    for ours, plainly, wanted in zip(*results, strict=True):
        for each in (ours, plainly):
            assert float((each - wanted).detach().abs().max()) < 1e-10 * max(1.0, float(wanted.detach().abs().max()))


@pytest.mark.parametrize("layout", ["contiguous", "last"])
def test_the_memory_format_is_kept_both_ways(layout: str) -> None:
    x = arrange(sample(3, 6, 40, 50), layout).requires_grad_()
    own = tensors(6)
    out, _ = normalize(x, mixed, *own)
    assert out.stride() == x.stride()
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    assert gradient.stride() == x.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck_twice(layout: str) -> None:
    x = arrange(sample(2, 3, 2, 2), layout).clone(memory_format=torch.preserve_format).requires_grad_()
    own = tensors(3)
    call = lambda x, *t: normalize(x, mixed, *t)[0]  # noqa: E731
    assert gradcheck(call, (x, *own))
    assert gradgradcheck(call, (x, *own))


@pytest.mark.parametrize("needed", [(0,), (1,), (0, 2), (1, 2), ()], ids=str)
def test_only_what_is_asked_for(needed: tuple[int, ...]) -> None:
    inputs = [sample(3, 6, 4, 5), *(t.detach() for t in tensors(6))]
    for index in needed:
        inputs[index].requires_grad_()
    out, seen = normalize(inputs[0], mixed, *inputs[1:])
    assert out.requires_grad == bool(needed)
    assert not any(each.requires_grad for each in seen)
    if needed:
        wanted = torch.autograd.grad(written_out(*inputs).square().sum(), [inputs[i] for i in needed])
        for ours, theirs in zip(
            torch.autograd.grad(out.square().sum(), [inputs[i] for i in needed]), wanted, strict=True
        ):
            assert distance(ours, theirs) < 1e-10


def test_no_affine_and_a_graph_that_is_used_twice() -> None:
    x = sample(3, 6, 4, 5).requires_grad_()
    out, _ = normalize(x, mixed, None, None)
    first = torch.autograd.grad(out.pow(3).sum(), x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out.pow(3).sum(), x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "last"])
def test_low_precision_is_accumulated_in_float32(dtype: torch.dtype, layout: str) -> None:
    x = arrange(sample(4, 6, 30, 30), layout).to(dtype).requires_grad_()
    own = tensors(6, torch.float32)
    out, seen = normalize(x, mixed, *own)
    assert out.dtype == dtype
    wanted = written_out(x.detach(), *own)
    bound = torch.finfo(dtype).eps
    assert distance(out, wanted) < max(bound, 2e-6)
    assert distance(seen[0], x.double().mean((0, 2, 3))) < 1e-6
    gradient = torch.autograd.grad(out.float().pow(3).sum(), x)[0]
    assert gradient.dtype == dtype
    given = x.detach().double().requires_grad_()
    wanted_gradient = torch.autograd.grad(written_out(given, *own).pow(3).sum(), given)[0]
    assert distance(gradient, wanted_gradient) < max(8 * bound, 2e-5)


@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("mean", [0.0, 1.0, 1e2, 1e4])
def test_large_means_do_not_cancel(mean: float, layout: str) -> None:
    x = arrange((sample(3, 6, 80, 80) * 1e-2 + mean).float(), layout).requires_grad_()
    own = tensors(6, torch.float32)
    for call in (normalize, plain):
        out, seen = call(x, partial(mixed, eps=1e-8), *own)
        wanted = written_out(x.detach(), *own, eps=1e-8)
        assert distance(out, wanted) < 1e-5
        assert distance(seen[1], x.double().var((0, 2, 3), correction=0)) < 1e-5
        given = x.detach().double().requires_grad_()
        ours = torch.autograd.grad((out * wanted.float().sin()).sum(), x)[0]
        theirs = torch.autograd.grad((written_out(given, *own, eps=1e-8) * wanted.sin()).sum(), given)[0]
        assert distance(ours, theirs) < 1e-4


def test_a_constant_channel_and_values_that_are_not_finite() -> None:
    x = sample(3, 6, 8, 8).float()
    x[:, 0] = 3.7
    x[:, 1] = 0.0
    own = tensors(6, torch.float32)
    assert distance(normalize(x, mixed, *own)[0], written_out(x, *own)) < 1e-5
    for bad in (float("nan"), float("inf")):
        x[1, 2, 3, 3] = bad
        assert normalize(x, mixed, *own)[0][1, 2].isnan().all()


def test_only_the_input_is_kept_for_backward() -> None:
    x = torch.randn(4, 64, 32, 32, requires_grad=True)
    module = SwitchableNorm2d(64)
    assert saved_bytes(module, x) < 1.1 * x.nbytes
    assert saved_bytes(nn.Sequential(module, nn.ReLU()), x) > 1.9 * x.nbytes


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps, parameters left out."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(x)
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("shape", [(0, 6), (0, 6, 4, 4), (2, 6, 0, 4)], ids=str)
def test_an_empty_batch(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, requires_grad=True)
    own = tensors(6, torch.float32)
    out, _ = normalize(x, mixed, *own)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad is not None
    assert all(bool((t.grad == 0).all()) for t in own)


def test_checkpointing() -> None:
    module = randomise(SwitchableNorm2d(6)).eval().double()
    x = sample(3, 6, 4, 5).requires_grad_()
    wanted = torch.autograd.grad(module(x).pow(3).sum(), (x, *module.parameters()))
    for reentrant in (False, True):
        out = checkpoint(lambda x: module(x * 1).pow(3), x, use_reentrant=reentrant)
        out.sum().backward()
        for tensor, gradient in zip((x, *module.parameters()), wanted, strict=True):
            assert distance(tensor.grad, gradient) < 1e-12
            tensor.grad = None


def test_autocast() -> None:
    model = nn.Sequential(nn.Conv2d(6, 6, 1), SwitchableNorm2d(6), nn.Conv2d(6, 6, 1))
    x = torch.randn(2, 6, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        half = model[0](x)
        out = model[1](half)
    assert half.dtype == out.dtype == torch.bfloat16
    assert distance(out, model[1](half.double())) < 0.02
    with torch.autocast("cpu", torch.bfloat16):
        model(x).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_compiled_without_a_graph_break() -> None:
    module, other = (randomise(SwitchableNorm2d(6, momentum=None)).double() for _ in range(2))
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    x, y = (sample(3, 6, 4, 5).requires_grad_() for _ in range(2))
    out, wanted = compiled(x), module(y)
    assert distance(out, wanted) < 1e-12
    ours = torch.autograd.grad(out.pow(3).sum(), (x, *other.parameters()))
    theirs = torch.autograd.grad(wanted.pow(3).sum(), (y, *module.parameters()))
    assert all(distance(a, b) < 1e-10 for a, b in zip(ours, theirs, strict=True))
    assert all(distance(a.double(), b.double()) < 1e-12 for a, b in zip(module.buffers(), other.buffers(), strict=True))
    torch.compiler.reset()


def test_torch_export_with_a_dynamic_batch() -> None:
    module = randomise(SwitchableNorm2d(6)).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, (torch.randn(3, 6, 4, 5),), dynamic_shapes=({0: batch},))
    x = torch.randn(7, 6, 4, 5)
    assert distance(program.module()(x), module(x)) < 1e-6


class TestFunctionTransforms:
    module = randomise(SwitchableNorm2d(3)).double().eval()

    def call(self, x: Tensor) -> Tensor:
        return self.module(x[None] if x.dim() == 3 else x).pow(3).sum()

    def test_grad_and_vmap(self) -> None:
        x = sample(4, 3, 2, 2)
        gradients = torch.func.vmap(torch.func.grad(self.call))(x)
        for one, gradient in zip(x, gradients, strict=True):
            leaf = one.clone().requires_grad_()
            assert distance(gradient, torch.autograd.grad(self.call(leaf), leaf)[0]) < 1e-12

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own decompositions
    def test_forward_mode(self) -> None:
        x, tangent = sample(4, 3, 2, 2), sample(4, 3, 2, 2, seed=5)
        leaf = x.clone().requires_grad_()
        wanted = (torch.autograd.grad(self.call(leaf), leaf)[0] * tangent).sum()
        assert distance(torch.func.jvp(self.call, (x,), (tangent,))[1], wanted) < 1e-12
        with forward_ad.dual_level():
            out = forward_ad.unpack_dual(self.call(forward_ad.make_dual(x, tangent)))
        assert distance(out.tangent, wanted) < 1e-12


class TestMoments:
    def test_pooling(self) -> None:
        x = sample(3, 6, 4, 5)
        moments = Moments(x.mean((2, 3)), x.var((2, 3), correction=0), 20)
        mean, var = moments.over_batch()
        assert distance(mean, x.mean((0, 2, 3))) < 1e-12
        assert distance(var, x.var((0, 2, 3), correction=0)) < 1e-12
        grouped = x.unflatten(1, (2, 3))
        mean, var = moments.over_channels(2)
        assert distance(mean, grouped.mean((2, 3, 4))) < 1e-12
        assert distance(var, grouped.var((2, 3, 4), correction=0)) < 1e-12


@pytest.mark.parametrize("share", [1, 4])
def test_rows_that_plain_sums_would_lose(share: int) -> None:
    """Rows of large means, constant rows and infinite ones, few among others and most of all."""
    x = sample(4, 8, 10, 10).float()
    x[:share, 1] = x[:share, 1] * 1e-2 + 0.5
    x[:share, 3] = 7.0
    x[:share, 5, 0, 0] = float("inf")
    over = passes.passes(x)
    assert type(over) is passes.NativePasses
    mean, var = over.measure(x)
    exact = x.double().flatten(2)
    lost = exact.isinf().any(2)
    assert bool(var[lost].isnan().all() or var[lost].isinf().all())
    assert distance(mean[~lost], exact.mean(2)[~lost]) < 1e-6
    assert float((var / exact.var(2, correction=0) - 1).abs()[~lost & (exact.var(2) > 0)].max()) < 2e-6
    assert float(var[:share, 3].max()) < 1e-12
