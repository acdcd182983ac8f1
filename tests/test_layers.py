"""The layers that torch lacks, each against its paper's formula written out in float64, and what all must be able to:
inputs far from zero, ONNX, empty batches, torch's constructor."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normswap import NormswapError, convert, layers, plan_convert, plan_fold
from normswap.layers import (
    AdaptiveBatchNorm2d,
    BatchInstanceNorm2d,
    BatchRenorm2d,
    ChannelLayerNorm,
    ChannelRMSNorm,
    ChannelsFirstRMSNorm,
    ConditionalNorm2d,
    DomainBatchNorm2d,
    EvoNormB02d,
    EvoNormS0,
    EvoNormS02d,
    FilterResponseNorm,
    FilterResponseNorm2d,
    GhostBatchNorm2d,
    LearnedGroupNorm,
    LearnedGroupNorm2d,
    MultiscaleNorm,
    MultiscaleNorm2d,
    PositionalNorm,
    PositionalNorm2d,
    SwitchableNorm2d,
    SyncBatchNorm,
    VirtualBatchNorm,
    VirtualBatchNorm2d,
    Warmup,
    batch_average,
    reference_batch,
)
from normswap.onnx.export import export
from tests.support import distance, randomise, sample
from tests.test_export import run

EPS = 1e-5
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "switchable": lambda: SwitchableNorm2d(8),
    "switchable without batch": lambda: SwitchableNorm2d(8, batch=False),
    "renorm": lambda: BatchRenorm2d(8, start=0, r_end=0, d_end=0),
    "ghost": lambda: GhostBatchNorm2d(8, virtual_batch=2),
    "batch_instance": lambda: BatchInstanceNorm2d(8),
    "frn": lambda: FilterResponseNorm2d(8),
    "adaptive_momentum": lambda: AdaptiveBatchNorm2d(8, momentum=Warmup(0.1)),
    "multiscale": lambda: MultiscaleNorm2d(8),
    "positional": lambda: PositionalNorm2d(8),
    "learned_groups": lambda: LearnedGroupNorm2d(8, groups=2),
    "virtual": lambda: VirtualBatchNorm2d(8),
    "evonorm_b0": lambda: EvoNormB02d(8),
    "evonorm_s0": lambda: EvoNormS02d(8, groups=2),
}
FAMILIES = (
    "SwitchableNorm", "BatchRenorm", "GhostBatchNorm", "BatchInstanceNorm", "FilterResponseNorm", "EvoNormB0",
    "EvoNormS0", "VirtualBatchNorm", "AdaptiveBatchNorm", "PositionalNorm", "LearnedGroupNorm", "MultiscaleNorm",
)  # fmt: skip
CLASSES = {rank: tuple(getattr(layers, f"{family}{rank}d") for family in FAMILIES) for rank in (1, 2, 3)}
ANY_RANK = tuple(getattr(layers, family) for family in FAMILIES[:8])
OVER_CHANNELS = (ChannelLayerNorm, ChannelRMSNorm, ChannelsFirstRMSNorm)
TIMELESS = (FilterResponseNorm, EvoNormS0, PositionalNorm, LearnedGroupNorm, MultiscaleNorm)
"""Without statistics that training leaves behind."""


def channel(values: Tensor, x: Tensor) -> Tensor:
    return values.detach().reshape(1, -1, *[1] * (x.dim() - 2))


def whitened(x: Tensor, axes: tuple[int, ...], eps: float = EPS) -> Tensor:
    return (x - x.mean(axes, keepdim=True)) / torch.sqrt(x.var(axes, keepdim=True, correction=0) + eps)


def affine(x: Tensor, module: Any) -> Tensor:
    return x * channel(module.weight, x) + channel(module.bias, x)


def large_mean(module: nn.Module, x: Tensor) -> Tensor:
    """The module on float32 values with mean 1e4 and deviation 1e-2, its running moments the batch's."""
    subject: Any = copy.deepcopy(module).float()
    for name, values in (("running_mean", x.mean((0, 2, 3))), ("running_var", x.var((0, 2, 3)))):
        if getattr(subject, name, None) is not None:
            getattr(subject, name).copy_(values)
    return subject, copy.deepcopy(subject).double()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_mean_of_ten_thousand_and_a_deviation_of_a_hundredth(name: str, layout: torch.memory_format) -> None:
    x = (torch.randn(8, 8, 40, 40, generator=torch.Generator().manual_seed(0)) * 1e-2 + 1e4).to(memory_format=layout)
    module = LAYERS[name]()
    module.eps = 1e-8
    subject, precise = large_mean(module, x)
    with torch.no_grad():
        out, wanted = subject(x), precise(x.double())
    assert distance(out, wanted) < 1e-4
    assert float(wanted.abs().max()) > 2 or name in ("frn", "evonorm_b0")  # which leave the mean in


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_at_a_mean_of_ten_thousand_and_a_deviation_of_a_hundredth(name: str) -> None:
    x = torch.randn(6, 8, 20, 20, generator=torch.Generator().manual_seed(0)) * 1e-2 + 1e4
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    module = LAYERS[name]()
    module.eps = 1e-8
    found = []
    for subject, given in zip(large_mean(randomise(module), x), (x, x.double()), strict=True):
        leaf = given.clone().requires_grad_()
        tensors = (leaf, *subject.parameters())
        found.append(torch.autograd.grad((subject(leaf) * cotangent).sum(), tensors))
    for ours, wanted in zip(*found, strict=True):
        assert float((ours - wanted).abs().max()) < 2e-3 * max(1e-3, float(wanted.abs().max()))


@pytest.mark.parametrize("make", [*LAYERS.values(), *(partial(each, 8) for each in OVER_CHANNELS)])
def test_many_gradients_at_once(make: Callable[[], nn.Module]) -> None:
    module, x = randomise(make()).double(), sample(3, 8, 4, 5).requires_grad_()
    out, tensors = module(x), (x, *module.parameters())
    cotangents = torch.stack([sample(3, 8, 4, 5, seed=seed) for seed in (2, 3)])
    batched = torch.autograd.grad(out, tensors, cotangents, is_grads_batched=True, retain_graph=True)
    for index, one in enumerate(cotangents):
        wanted = torch.autograd.grad(out, tensors, one, retain_graph=True)
        assert all(distance(ours[index], theirs) < 1e-10 for ours, theirs in zip(batched, wanted, strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_a_batch_between_an_eval_pass_and_its_gradient(name: str) -> None:
    module = randomise(LAYERS[name]()).double().eval()
    x = sample(3, 8, 4, 5).requires_grad_()
    wanted = torch.autograd.grad(module(x).pow(3).sum(), x)[0]
    out, reference = module(x), sample(3, 8, 4, 5, seed=2)
    if name == "virtual":
        with reference_batch(module):
            module(reference)
    else:
        module.train()(reference)
    assert distance(torch.autograd.grad(out.pow(3).sum(), x)[0], wanted) < 1e-12


class All(nn.Module):
    """Every layer on the same input."""

    def __init__(self, names: Iterable[str] = LAYERS) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: LAYERS[name]() for name in names})

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers.values()]


def test_onnx_runtime_computes_the_same(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model = randomise(All()).eval()
    x = sample(3, 8, 5, 6).float()
    path = export(model, tmp_path / "layers.onnx", (x,), dynamic=True)
    for each in (x, sample(1, 8, 5, 6, seed=2).float()):
        for name, ours, wanted in zip(LAYERS, run(path, each), model(each), strict=True):
            assert distance(torch.from_numpy(ours), wanted) < 1e-5, name


def test_compiled_without_a_graph_break() -> None:
    names = ("evonorm_b0", "evonorm_s0", "virtual", "adaptive_momentum", "positional", "learned_groups", "multiscale")
    model = randomise(All(names).double())
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    x, y = (sample(3, 8, 4, 5).requires_grad_() for _ in range(2))
    ours, theirs = compiled(x), model(y)
    assert all(distance(*pair) < 1e-12 for pair in zip(ours, theirs, strict=True))
    gradients = [torch.autograd.grad(sum(o.pow(3).sum() for o in os), i)[0] for os, i in ((ours, x), (theirs, y))]
    assert distance(*gradients) < 1e-10
    buffers = zip(other.buffers(), model.buffers(), strict=True)
    assert all(distance(a.double(), b.double()) < 1e-12 for a, b in buffers)
    torch.compiler.reset()


def test_reset_parameters_behind_the_meta_device() -> None:
    """As deferred initialisation has it: made on the meta device, given memory, reset."""
    more = {
        "conditional": lambda: ConditionalNorm2d(8, classes=3), "domain": lambda: DomainBatchNorm2d(8),
        "one group": lambda: LearnedGroupNorm2d(8, groups=4, gap=2.0),
    }  # fmt: skip
    for name, make in {**LAYERS, **more}.items():
        wanted = make().state_dict()
        with torch.device("meta"):
            module: Any = make()
        randomise(module.to_empty(device="cpu"), seed=3)
        for buffer in module.buffers():
            buffer.fill_(7)
        module.reset_parameters()
        state = module.state_dict()
        assert list(state) == list(wanted)
        assert all(torch.equal(state[key], wanted[key]) for key in wanted), name
        assert all(p.requires_grad for p in module.parameters())


def test_on_the_meta_device() -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.empty(3, 8, 4, 5, device="meta").to(memory_format=layout).requires_grad_()
        for module in (*(make() for make in LAYERS.values()), *(each(8) for each in OVER_CHANNELS)):
            for training in (True, False):
                out = module.to("meta").train(training)(x)
                assert out.is_meta
                assert out.stride() == x.stride() or isinstance(module, OVER_CHANNELS)
                assert torch.autograd.grad(out.sum(), x)[0].is_meta


@pytest.mark.parametrize("name", LAYERS)
def test_empty_batches_leave_the_statistics_alone(name: str) -> None:
    module = randomise(LAYERS[name]()).train()
    before = copy.deepcopy(module.state_dict())
    x = torch.empty(0, 8, 4, 4, requires_grad=True)
    module(x).sum().backward()
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())
    assert all(p.grad is not None and bool((p.grad == 0).all()) for p in module.parameters())


@pytest.mark.parametrize("kind", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_values_that_are_not_floating_are_refused(kind: torch.dtype) -> None:
    x = (sample(3, 8, 4, 4) * 10).abs().to(kind)
    others = *(each(8) for each in OVER_CHANNELS), SyncBatchNorm(8)
    for module in (*(make() for make in LAYERS.values()), *others):
        for training in (True, False):
            with pytest.raises(ValueError, match=rf"expected a floating input \(got {kind}\)"):
                module.train(training)(x)


def test_channels_without_an_affine_are_checked_too() -> None:
    for cls in OVER_CHANNELS:
        for given in (True, False):
            with pytest.raises(ValueError, match=r"expected 8 channels on axis 1 \(got 7\)"):
                cls(8, elementwise_affine=given)(torch.randn(2, 7, 3, 3))
            with pytest.raises(ValueError, match=r"expected at least 2D input \(got 1D input\)"):
                cls(8, elementwise_affine=given)(torch.randn(8))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_constructor_is_batch_norms(dims: int) -> None:
    torchs = getattr(nn, f"BatchNorm{dims}d")
    wanted = ["num_features", "eps", "momentum", "affine", "track_running_stats", "device", "dtype"]
    assert list(inspect.signature(torchs).parameters)[:7] == wanted
    for cls in CLASSES[dims]:
        signature = inspect.signature(cls)
        assert list(signature.parameters)[: len(wanted)] == wanted
        more = list(signature.parameters.values())[len(wanted) :]
        assert all(p.kind is inspect.Parameter.KEYWORD_ONLY and p.default is not p.empty for p in more)
        module = cls(6, 1e-3, 0.2, True, True, "cpu", torch.float64)
        assert {t.dtype for t in module.state_dict().values() if t.is_floating_point()} == {torch.float64}
        assert {"weight", "bias"} <= set(module.state_dict())
        assert set(torchs(6).state_dict()) <= set(module.state_dict()) or issubclass(cls, TIMELESS)
        bare = cls(6, affine=False, track_running_stats=False).state_dict()
        assert not bare.keys() & torchs(6).state_dict().keys() or issubclass(cls, VirtualBatchNorm)
        assert "bias" not in cls(6, bias=False).state_dict()
        x = torch.randn(4, 6, *[3] * dims, dtype=torch.float64)
        assert module(x).shape == x.shape
        with pytest.raises(ValueError, match="expected"):
            module(x[0, 0])
        with pytest.raises(ValueError, match="expected 6 channels on axis 1"):
            module(x[:, :5])
    for cls in ANY_RANK:
        assert cls(6).double()(torch.randn(4, 6, *[3] * dims, dtype=torch.float64)).dim() == dims + 2


class TestSwitchable:
    """arXiv 1806.10779, equations 3 to 5."""

    def wanted(self, x: Tensor, module: Any, *, batch: bool) -> Tensor:
        axes: list[tuple[int, ...]] = [(2, 3), (1, 2, 3), (0, 2, 3)]
        means, variances = [], []
        for axis in axes[: 3 if batch else 2]:
            means.append(x.mean(axis, keepdim=True))
            variances.append(x.var(axis, keepdim=True, correction=0))
        mean = sum(w * m for w, m in zip(module.mean_gate.softmax(0), means, strict=True))
        var = sum(w * v for w, v in zip(module.var_gate.softmax(0), variances, strict=True))
        return affine((x - mean) / torch.sqrt(var + EPS), module)

    @pytest.mark.parametrize("batch", [True, False])
    def test_formula(self, batch: bool) -> None:
        module = randomise(SwitchableNorm2d(8, batch=batch).double())
        x = sample(3, 8, 4, 5)
        assert distance(module(x), self.wanted(x, module, batch=batch)) < 1e-10

    def test_without_batch_every_sample_is_alone(self) -> None:
        module = randomise(SwitchableNorm2d(8, batch=False).double())
        assert set(module.state_dict()) == {"weight", "bias", "mean_gate", "var_gate"}
        x = sample(3, 8, 4, 5)
        assert distance(torch.cat([module(one[None]) for one in x]), module(x)) < 1e-12
        assert distance(module.eval()(x), module.train()(x)) == 0

    def test_conversion_without_batch(self) -> None:
        model = convert(nn.Sequential(nn.BatchNorm2d(8)), "switchable", batch=False)
        assert list(model.state_dict()) == ["0.weight", "0.bias", "0.mean_gate", "0.var_gate"]
        layer = convert(nn.Sequential(nn.GroupNorm(1, 8)), "switchable", batch=False, init="preserve")
        x = sample(3, 8, 4, 5).float()
        assert distance(layer(x), nn.GroupNorm(1, 8)(x)) < 1e-5
        with pytest.raises(NormswapError, match="batch='no': it is True or False"):
            convert(nn.Sequential(nn.BatchNorm2d(8)), "switchable", batch="no")

    def test_batch_average(self) -> None:
        model = nn.Sequential(SwitchableNorm2d(8, momentum=0.3), nn.Dropout(0.5), nn.BatchNorm2d(8)).double().eval()
        randomise(model)
        xs = [sample(3, 8, 4, 5, seed=seed) for seed in range(3)]
        with batch_average(model):
            for x in xs:
                model(x)
            assert not model[1].training
        assert not model[0].training
        assert model[0].momentum == 0.3
        assert distance(model[0].running_mean, torch.stack([x.mean((0, 2, 3)) for x in xs]).mean(0)) < 1e-12
        variances = torch.stack([x.var((0, 2, 3), correction=0) for x in xs])
        assert distance(model[0].running_var, variances.mean(0)) < 1e-12
        assert int(model[2].num_batches_tracked) == 3
        before = copy.deepcopy(model.state_dict())
        with batch_average(model):
            pass
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


class TestRenorm:
    """arXiv 1702.03275, algorithm 1."""

    def test_formula_statistics_and_gradient(self) -> None:
        module = randomise(BatchRenorm2d(8, momentum=0.2, start=0, r_end=0, d_end=0, r_max=1.3, d_max=0.5).double())
        x = (sample(3, 8, 4, 5) * 1.2).requires_grad_()
        mean, sigma = x.mean((0, 2, 3), keepdim=True), torch.sqrt(x.var((0, 2, 3), correction=0, keepdim=True) + EPS)
        past, moved = torch.sqrt(channel(module.running_var, x) + EPS), channel(module.running_mean, x)
        r = (sigma / past).clamp(1 / 1.3, 1.3).detach()
        d = ((mean - moved) / past).clamp(-0.5, 0.5).detach()
        clipped = ((r == 1.3) | (r == 1 / 1.3)).sum()
        assert 0 < int(clipped) < 8
        wanted = affine((x - mean) / sigma * r + d, module)
        statistics = (0.8 * moved + 0.2 * mean).flatten(), ((0.8 * past + 0.2 * sigma).square() - EPS).flatten()
        out = module(x)
        assert distance(out, wanted) < 1e-10
        ours, theirs = (torch.autograd.grad(each.pow(3).sum(), x)[0] for each in (out, wanted))
        assert distance(ours, theirs) < 1e-10
        assert distance(module.running_mean, statistics[0]) < 1e-10
        assert distance(module.running_var, statistics[1]) < 1e-10
        assert int(module.num_batches_tracked) == 1

    def test_within_the_limits_training_computes_what_eval_does(self) -> None:
        module = randomise(BatchRenorm2d(8, start=0, r_end=0, d_end=0, r_max=1e3, d_max=1e3).double())
        x = sample(3, 8, 4, 5)
        wanted = copy.deepcopy(module).eval()(x)
        assert distance(module(x), wanted) < 1e-10
        assert distance(wanted, affine(whitened(x, (0, 2, 3)), module)) > 0.1

    @pytest.mark.parametrize(
        ("seen", "limits"),
        [(0, (1, 0)), (5000, (1, 0)), (15000, (1 + 4 / 7, 2.5)), (25000, (1 + 8 / 7, 5)), (40000, (3, 5))],
    )
    def test_schedule(self, seen: int, limits: tuple[float, float]) -> None:
        module = BatchRenorm2d(8)
        module.num_batches_tracked.fill_(seen)
        assert [float(limit) for limit in module.limits()] == pytest.approx(limits)

    def test_compiled_its_gradient_takes_the_statistics_from_before(self) -> None:
        module = randomise(BatchRenorm2d(8, start=0, r_end=0, d_end=0).double())
        other = copy.deepcopy(module)
        compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
        x, y = (sample(3, 8, 4, 5).requires_grad_() for _ in range(2))
        ours = torch.autograd.grad(compiled(x).pow(3).sum(), (x, *other.parameters()))
        theirs = torch.autograd.grad(module(y).pow(3).sum(), (y, *module.parameters()))
        assert all(distance(a, b) < 1e-10 for a, b in zip(ours, theirs, strict=True))
        assert distance(other.running_var, module.running_var) < 1e-12
        torch.compiler.reset()

    def test_at_first_it_is_batch_normalization(self) -> None:
        module = randomise(BatchRenorm2d(8).double())
        x = sample(3, 8, 4, 5)
        assert distance(module(x), affine(whitened(x, (0, 2, 3)), module)) < 1e-10

    @pytest.mark.parametrize("bad", [{"r_max": 0.5}, {"d_max": -1.0}, {"start": 9, "d_end": 8}, {"start": -1}], ids=str)
    def test_misuse(self, bad: dict[str, Any]) -> None:
        with pytest.raises(NormswapError, match=r"r_max=|r_end="):
            BatchRenorm2d(8, **bad)


class TestGhost:
    """arXiv 1705.08741, algorithm 1."""

    @pytest.mark.parametrize(
        ("samples", "sizes"), [(6, [2, 2, 2]), (7, [2, 2, 2, 1]), (5, [2, 2, 1]), (2, [2]), (1, [1])]
    )
    def test_formula_and_statistics(self, samples: int, sizes: list[int]) -> None:
        module = randomise(GhostBatchNorm2d(8, momentum=0.2, virtual_batch=2).double())
        x = sample(samples, 8, 4, 5)
        mean, sigma = module.running_mean, torch.sqrt(module.running_var + EPS)
        parts = x.split(sizes)
        for part in parts:
            mean = 0.8 * mean + 0.2 * part.mean((0, 2, 3))
            sigma = 0.8 * sigma + 0.2 * torch.sqrt(part.var((0, 2, 3), correction=0) + EPS)
        wanted = torch.cat([affine(whitened(part, (0, 2, 3)), module) for part in parts])
        assert distance(module(x), wanted) < 1e-10
        assert distance(module.running_mean, mean) < 1e-10
        assert distance(module.running_var, sigma.square() - EPS) < 1e-10
        assert int(module.num_batches_tracked) == len(sizes)

    def test_a_virtual_batch_of_all_is_batch_normalization(self) -> None:
        module = randomise(GhostBatchNorm2d(8, virtual_batch=3).double())
        x = sample(3, 8, 4, 5)
        assert distance(module(x), affine(whitened(x, (0, 2, 3)), module)) < 1e-10

    @pytest.mark.parametrize("bad", [0, -1, 2.0, True])
    def test_misuse(self, bad: Any) -> None:
        with pytest.raises(NormswapError, match=r"virtual_batch=.*at least 1"):
            GhostBatchNorm2d(8, virtual_batch=bad)


class TestBatchInstance:
    """arXiv 1805.07925, equation 3."""

    def test_formula_and_statistics(self) -> None:
        module = randomise(BatchInstanceNorm2d(8, momentum=0.2).double())
        module.share.data[:2] = torch.tensor([-0.5, 1.5])
        mean, var = module.running_mean.clone(), module.running_var.clone()
        x = sample(3, 8, 4, 5)
        share = channel(module.share.clamp(0, 1), x)
        mixed = share * whitened(x, (0, 2, 3)) + (1 - share) * whitened(x, (2, 3))
        assert distance(module(x), affine(mixed, module)) < 1e-10
        mean = 0.8 * mean + 0.2 * x.mean((0, 2, 3))
        var = 0.8 * var + 0.2 * x.var((0, 2, 3), correction=0)
        assert distance(module.running_mean, mean) < 1e-10
        assert distance(module.running_var, var) < 1e-10
        past = (x - channel(mean, x)) / torch.sqrt(channel(var, x) + EPS)
        mixed = share * past + (1 - share) * whitened(x, (2, 3))
        assert distance(module.eval()(x), affine(mixed, module)) < 1e-10

    def test_a_share_that_left_can_come_back_and_goes_no_further(self) -> None:
        module = BatchInstanceNorm2d(4).double()
        module.share.data = torch.tensor([1.5, 1.5, -0.5, -0.5], dtype=torch.float64)
        x = sample(3, 4, 4, 5)
        difference = whitened(x, (0, 2, 3)) - whitened(x, (2, 3))  # the derivative of the output by the share
        sign = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)[:, None, None]
        (module(x) * difference * sign).sum().backward()
        assert module.share.grad is not None
        assert [float(each) != 0 for each in module.share.grad] == [True, False, False, True]
        torch.optim.SGD([module.share], lr=1e-3).step()
        assert module.share[0] < 1.5
        assert module.share[3] > -0.5

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own decompositions
    def test_forward_mode_by_the_share(self) -> None:
        module = randomise(BatchInstanceNorm2d(3).double()).eval()
        x, tangent = sample(2, 3, 4, 4), torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)

        def loss(share: Tensor) -> Tensor:
            out: Tensor = torch.func.functional_call(module, {"share": share}, (x,))
            return out.pow(3).sum()

        share = module.share.detach()
        gradient, (_, along) = torch.func.grad(loss)(share), torch.func.jvp(loss, (share,), (tangent,))
        assert distance(along, (gradient * tangent).sum()) < 1e-10
        hessian = torch.func.hessian(loss)(share)  # forward over reverse
        assert distance(hessian, torch.autograd.functional.hessian(loss, share)) < 1e-9
        beyond = torch.tensor([-0.5, 0.5, 1.5], dtype=torch.float64)
        assert torch.func.jacfwd(loss)(beyond).ne(0).tolist() == [False, True, False]

    def test_conversion(self) -> None:
        x = sample(3, 8, 4, 5)
        batch = randomise(nn.BatchNorm2d(8).double()).eval()
        assert distance(convert(nn.Sequential(batch), "batch_instance")(x), batch(x)) < 1e-12
        instance = randomise(nn.InstanceNorm2d(8, affine=True).double()).eval()
        made = convert(nn.Sequential(instance), "batch_instance", init="preserve")
        assert distance(made(x), instance(x)) < 1e-12
        assert bool((made[0].share == 0).all())


class TestFilterResponse:
    """arXiv 1911.09737, equations 1 to 4."""

    @pytest.mark.parametrize("threshold", [True, False])
    def test_formula(self, threshold: bool) -> None:
        module = randomise(FilterResponseNorm2d(8, eps=1e-3, threshold=threshold).double())
        x = sample(3, 8, 4, 5)
        wanted = affine(x / torch.sqrt(x.square().mean((2, 3), keepdim=True) + 1e-3), module)
        if threshold:
            wanted = torch.maximum(wanted, channel(module.threshold, x))
        for training in (True, False):
            assert distance(module.train(training)(x), wanted) < 1e-10

    def test_at_first_the_unit_is_a_relu(self) -> None:
        x = sample(3, 8, 4, 5)
        plain = FilterResponseNorm2d(8, threshold=False)
        assert torch.equal(FilterResponseNorm2d(8)(x), plain(x).relu())

    def test_its_affine_folds_forward_unless_a_threshold_follows(self) -> None:
        x = sample(3, 8, 4, 5)
        for threshold in (False, True):
            norm = FilterResponseNorm2d(8, threshold=threshold)
            model = randomise(nn.Sequential(norm, nn.Conv2d(8, 4, 1)).double()).eval()
            plan = plan_fold(model, affine=True)
            if threshold:
                assert [skip.reason for skip in plan.skips] == ["an activation follows inside it"]
            else:
                assert distance(plan.apply()(x), model(x)) < 1e-10
                assert plan.apply()[0].weight is None

    def test_conversion(self) -> None:
        model = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())
        assert list(convert(model, "frn").state_dict()) == ["0.weight", "0.bias"]
        assert list(convert(model, "frn", threshold=True).state_dict()) == ["0.weight", "0.bias", "0.threshold"]
        plan = plan_convert(nn.Sequential(nn.BatchNorm1d(8)), "frn", example_inputs=(torch.randn(4, 8),))
        assert not plan.changes
        assert "a response is a single value" in plan.skips[0].reason
        with pytest.raises(NormswapError, match="threshold='true': it is True or False"):
            convert(model, "frn", threshold="true")
