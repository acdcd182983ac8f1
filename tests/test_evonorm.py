"""EvoNorm B0 and S0, and the core for norms that are no multiple of their input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from normswap import NormswapError, convert, plan_convert, plan_fold, read
from normswap.norms import passes
from normswap.norms.evonorm import BatchPointwise, EvoNormB02d, EvoNormS02d, SamplePointwise
from normswap.norms.frn import FilterResponseNorm2d
from normswap.norms.moments import Moments
from normswap.norms.pointwise import Factors, Pointwise, plain, transform
from tests.support import distance, randomise, sample
from tests.test_layers import EPS, affine, channel
from tests.test_moments import LAYOUTS, SHAPES, arrange, saved_bytes


def deviation(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return torch.sqrt(x.var(axes, keepdim=True, correction=0) + EPS)


class TestB0:
    """arXiv 2004.02967, table 1 (B0)."""

    def test_formula_and_statistics(self) -> None:
        module = randomise(EvoNormB02d(8, momentum=0.2).double())
        old = module.running_mean.clone(), module.running_var.clone()
        x = sample(3, 8, 4, 5)
        right = channel(module.slope, x) * x + deviation(x, (2, 3))
        left = deviation(x, (0, 2, 3))
        assert 0.1 < float((right > left).double().mean()) < 0.9, "both sides of the maximum matter"
        assert distance(module(x), affine(x / torch.maximum(left, right), module)) < 1e-10
        var = 0.8 * old[1] + 0.2 * x.var((0, 2, 3), correction=0)
        assert distance(module.running_mean, 0.8 * old[0] + 0.2 * x.mean((0, 2, 3))) < 1e-10
        assert distance(module.running_var, var) < 1e-10
        left = torch.sqrt(channel(var, x) + EPS)
        assert distance(module.eval()(x), affine(x / torch.maximum(left, right), module)) < 1e-10

    def test_large_means_where_the_deviations_decide(self) -> None:
        module = EvoNormB02d(8, eps=1e-8)
        module.slope.data.zero_()
        x = (sample(4, 8, 20, 20) * 1e-2 + 1e4).float()
        assert distance(module(x), copy.deepcopy(module).double()(x.double())) < 1e-5
        assert float(module(x).detach().abs().min()) > 1e5

    def test_there_and_back_keeps_affine_and_statistics(self) -> None:
        batch = randomise(nn.BatchNorm2d(8)).eval()
        model = convert(nn.Sequential(batch), "evonorm_b0")
        back = convert(model, "batch")[0]
        assert all(
            torch.equal(a, b) for a, b in zip(back.state_dict().values(), batch.state_dict().values(), strict=True)
        )
        assert plan_convert(model, "batch").changes[0].lost == ("slope of the activation",)
        assert plan_convert(model, "batch").changes[0].exactness == "approximate"
        assert "no fixed affine" in plan_convert(model, "frozen").skips[0].reason


class TestS0:
    """arXiv 2004.02967, table 1 (S0)."""

    @pytest.mark.parametrize("groups", [1, 2, 4])
    def test_formula(self, groups: int) -> None:
        module = randomise(EvoNormS02d(8, groups=groups).double())
        x = sample(3, 8, 4, 5)
        spread = deviation(x.unflatten(1, (groups, -1)), (2, 3, 4)).expand(-1, -1, 8 // groups, -1, -1).flatten(1, 2)
        wanted = affine(x * torch.sigmoid(channel(module.slope, x) * x) / spread, module)
        for training in (True, False):
            assert distance(module.train(training)(x), wanted) < 1e-10
        assert set(module.state_dict()) == {"weight", "bias", "slope"}

    def test_groups(self) -> None:
        assert EvoNormS02d(64).groups == 32
        assert read(convert(nn.Sequential(nn.BatchNorm2d(24)), "evonorm_s0")[0]).groups == 12
        with pytest.raises(NormswapError, match="groups=3 does not divide 8 channels"):
            convert(nn.Sequential(nn.BatchNorm2d(8)), "evonorm_s0", groups=3)
        plan = plan_convert(
            nn.Sequential(nn.BatchNorm1d(8)), "evonorm_s0", groups=8, example_inputs=(torch.rand(4, 8),)
        )
        assert "single elements" in plan.skips[0].reason

    def test_its_affine_folds_forward(self) -> None:
        model = randomise(nn.Sequential(EvoNormS02d(8, groups=2), nn.Conv2d(8, 4, 1)).double()).eval()
        x = sample(3, 8, 4, 5)
        folded = plan_fold(model, affine=True).apply()
        assert distance(folded(x), model(x)) < 1e-10
        assert folded[0].weight is None


@pytest.mark.parametrize("kind", ["evonorm_b0", "evonorm_s0"])
def test_an_activation_that_follows_stays_and_the_plan_says_so(kind: str) -> None:
    plan = plan_convert(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()), kind)
    assert any("both act" in note for note in plan.changes[0].notes)
    made = plan.apply()
    assert type(made[1]) is nn.ReLU
    assert bool((made(sample(3, 8, 4, 5).float()) >= 0).all())


def test_another_evonorm_keeps_the_slope() -> None:
    source = randomise(EvoNormB02d(8))
    made = convert(nn.Sequential(source), "evonorm_s0", inplace=True)[0]
    assert made.slope is source.slope
    again = convert(nn.Sequential(made), "evonorm_s0", groups=2)
    assert (
        plan_convert(again, "evonorm_s0", groups=2).skips[0].reason.startswith("it already is evonorm_s0(8, groups=2")
    )


def small(moments: Moments, weight: Tensor) -> Factors:
    layer = moments.over_channels()
    return Factors((layer[0] + moments.mean, moments.var + weight), moments.over_batch())


class Bent(Pointwise):
    """``tanh(x - level) spread``."""

    def __call__(self, x: Tensor, *factors: Tensor) -> Tensor:
        level, spread = factors
        return torch.tanh(x - level) * spread

    def forward(self, x: Tensor, factors: tuple[Tensor, ...], out: Tensor) -> None:
        out.copy_(self(x, *factors))

    def backward(
        self, x: Tensor, grad: Tensor, factors: tuple[Tensor, ...], out: Tensor, room: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        level, spread = factors
        torch.sub(x, level, out=room[0]).tanh_()
        by_spread = (grad * room[0]).sum(1, keepdim=True)
        torch.mul(grad, spread, out=out).mul_(1 - room[0].square())
        return -out.sum(1, keepdim=True), by_spread


bent = Bent()


@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize(
    "function",
    [BatchPointwise(), *(SamplePointwise(torch.full((2,), slope)) for slope in (0.0, 1.0)), bent],
    ids=lambda f: type(f).__name__,
)
def test_derivatives_by_hand(function: Pointwise, inner: int) -> None:
    """As autograd's; with slopes of 0 among them, and both sides of the maximum."""
    x, grad = sample(4, 5, inner).requires_grad_(), sample(4, 5, inner, seed=2)
    count = {BatchPointwise: 4, SamplePointwise: 3, Bent: 2}[type(function)]
    factors = tuple(sample(4, 1, inner, seed=3 + index).requires_grad_() for index in range(count))
    if not getattr(function, "steep", False):
        factors[0].data[0] = 0
    wanted = function(x, *factors)
    if type(function) is BatchPointwise:
        assert 0.1 < float((factors[0] * x + factors[1] > 1).double().mean()) < 0.9
    held = tuple(each.detach() for each in factors)
    out, direct, *room = torch.empty(2 + function.buffers, *x.shape).double().fill_(float("nan"))
    function.forward(x.detach(), held, out)
    assert distance(out, wanted) < 1e-12
    found = function.backward(x.detach(), grad, held, direct, tuple(room))
    by_x, *others = torch.autograd.grad((wanted * grad).sum(), (x, *factors))
    assert distance(direct if function.times is None else direct * held[function.times], by_x) < 1e-12
    assert all(distance(*pair) < 1e-12 for pair in zip(found, others, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("kind", [EvoNormB02d, EvoNormS02d, FilterResponseNorm2d], ids=lambda k: k.__name__)
class TestWholeLayers:
    def test_gradcheck_twice(self, kind: type[nn.Module], layout: str) -> None:
        module = randomise(kind(3).double())
        x = arrange(sample(2, 3, 2, 2), layout).clone(memory_format=torch.preserve_format).requires_grad_()
        call = lambda x, *_: module(x)  # noqa: E731
        assert gradcheck(call, (x, *module.parameters()))
        assert gradgradcheck(call, (x, *module.parameters()))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_low_precision_and_what_is_kept(self, kind: type[nn.Module], layout: str, dtype: torch.dtype) -> None:
        module = randomise(kind(8))
        exact = copy.deepcopy(module).double()
        x = arrange(sample(4, 8, 30, 30), layout).to(dtype).requires_grad_()
        given = x.detach().double().requires_grad_()
        out, wanted = module(x), exact(given)
        assert out.dtype == dtype
        assert out.stride() == x.stride()
        bound = max(4 * torch.finfo(dtype).eps, 1e-5)
        assert distance(out, wanted) < bound
        gradients = [torch.autograd.grad(each.double().sin().sum(), at) for each, at in ((out, x), (wanted, given))]
        assert distance(gradients[0][0], gradients[1][0]) < 4 * bound
        assert saved_bytes(module, x) < 1.1 * x.nbytes

    def test_only_parameters_are_asked_for(self, kind: type[nn.Module], layout: str) -> None:
        module, x = randomise(kind(3).double()), arrange(sample(2, 3, 4, 4), layout)
        ours = torch.autograd.grad(module(x).sin().sum(), tuple(module.parameters()))
        x.requires_grad_()
        theirs = torch.autograd.grad(module(x).sin().sum(), tuple(module.parameters()))
        assert all(distance(*pair) < 1e-12 for pair in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", [7, 1 << 16])
def test_value_and_gradients(shape: tuple[int, ...], layout: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "BLOCK", block)
    monkeypatch.setattr(passes, "SAMPLE", block)
    x = arrange(sample(*shape), layout)
    cotangent = torch.linspace(-1, 2, x.numel(), dtype=torch.float64).reshape(shape)
    results = []
    for call in (transform, plain):
        given, weight = x.detach().requires_grad_(), sample(1, shape[1])[0].requires_grad_()
        out, seen = call(given, small, bent, weight)
        results.append((out, *seen, *torch.autograd.grad((out * cotangent).sum(), (given, weight))))
    space = tuple(range(2, x.dim()))
    given, weight = x.detach().requires_grad_(), sample(1, shape[1])[0].requires_grad_()
    own = given.mean(space, keepdim=True) if space else given
    var = given.var(space, keepdim=True, correction=0) if space else torch.zeros_like(given)
    factor = weight.reshape(1, -1, *[1] * len(space))
    out = torch.tanh(given - given.mean((1, *space), keepdim=True) - own) * (var + factor)
    wanted = out, *torch.autograd.grad((out * cotangent).sum(), (given, weight))
    for made in results:
        assert distance(made[1], x.mean((0, *space))) < 1e-10
        for ours, theirs in zip((made[0], *made[3:]), wanted, strict=True):
            assert float((ours - theirs).detach().abs().max()) < 1e-10 * max(1.0, float(theirs.detach().abs().max()))


def test_gradcheck_twice_and_what_is_kept() -> None:
    x, weight = sample(2, 3, 2, 2).requires_grad_(), sample(1, 3)[0].requires_grad_()
    call = lambda x, weight: transform(x, small, bent, weight)[0]  # noqa: E731
    assert gradcheck(call, (x, weight))
    assert gradgradcheck(call, (x, weight))
    module, large = EvoNormS02d(64), torch.randn(4, 64, 32, 32, requires_grad=True)
    assert saved_bytes(module, large) < 1.1 * large.nbytes
    with torch.no_grad():
        assert not module(large).requires_grad
