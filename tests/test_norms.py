"""Every reader and builder of torch's norms and of our own layers: one line a class, and the checks that run over all
lines.

The oracle judges readers and built modules. Any norm becomes any kind or is refused with a reason; what is called exact
is equal when measured, and what is not, is not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck

from normswap import NormswapError, Plan, exactness, kinds, norms, plan_convert, read, registry
from normswap.engine.carry import fresh
from normswap.norms import (
    adaptive_instance,
    adaptive_momentum,
    batch_instance,
    conditional,
    domain,
    evonorm,
    frn,
    ghost,
    learned_groups,
    multiscale,
    positional,
    renorm,
    virtual,
)
from normswap.norms.group import DEFAULT_GROUPS, group_count
from normswap.norms.momentum import Warmup
from normswap.norms.switchable import GATE_GAP, SwitchableNorm, SwitchableNorm1d, SwitchableNorm2d, SwitchableNorm3d
from tests.support import (
    DOUBLE,
    FEWER_SOURCES,
    SINGLE,
    check_copies,
    check_reader,
    check_state_dict,
    distance,
    expected,
    only,
    plan_of,
    randomise,
    sample,
    tolerance,
)

MAP = (3, 8, 4, 5)


@dataclass(frozen=True)
class Line:
    """A norm class as it is built, and an input for it."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = MAP
    seed: int = 0

    def module(self) -> nn.Module:
        return randomise(self.make().double(), self.seed)

    def input(self) -> Tensor:
        return sample(*self.shape)

    def plan(self, kind: str, **arguments: Any) -> Plan:
        """The plan for the norm beside a layer that shows the dtype; the inputs of (N, C) norms settle their rank."""
        model = nn.Sequential(self.module())
        model.register_buffer("neighbour", torch.zeros(1, dtype=torch.float64))
        if len(self.shape) == 2:
            arguments["example_inputs"] = (self.input(),)
        return plan_convert(model, kind, **arguments)


def mixed(cls: type[nn.Module]) -> nn.Module:
    """A switchable norm with open gates."""
    return cls(8)


def stopped(module: Any) -> nn.Module:
    """A norm that has statistics and updates them no more, as some training schemes set it for a while."""
    module.track_running_stats = False
    return module


def referred(module: Any) -> nn.Module:
    """A virtual batch norm that has seen a reference batch."""
    module.reference_size.fill_(3)
    return module  # type: ignore[no-any-return]


SOURCES: dict[str, Line] = {
    "BatchNorm1d (N, C)": Line(lambda: nn.BatchNorm1d(8), (5, 8)),
    "BatchNorm1d (N, C, L)": Line(lambda: nn.BatchNorm1d(8, eps=1e-3), (5, 8, 6)),
    "BatchNorm2d": Line(lambda: nn.BatchNorm2d(8)),
    "BatchNorm2d without affine": Line(lambda: nn.BatchNorm2d(8, affine=False)),
    "BatchNorm2d without statistics": Line(lambda: nn.BatchNorm2d(8, track_running_stats=False)),
    "BatchNorm2d with a cumulative mean": Line(lambda: nn.BatchNorm2d(8, momentum=None)),
    "BatchNorm2d that stopped tracking": Line(lambda: stopped(nn.BatchNorm2d(8))),
    "BatchNorm3d": Line(lambda: nn.BatchNorm3d(8, momentum=0.3), (3, 8, 2, 3, 4)),
    "BatchNorm of any rank": Line(lambda: norms.batch.BatchNorm(8)),
    "SyncBatchNorm of torch": Line(lambda: nn.SyncBatchNorm(8)),
    "SyncBatchNorm": Line(lambda: norms.sync.SyncBatchNorm(8)),
    "FrozenBatchNorm": Line(lambda: norms.frozen.FrozenBatchNorm(8)),
    "FrozenBatchNorm (N, C)": Line(lambda: norms.frozen.FrozenBatchNorm(8, 1e-3), (5, 8)),
    "ChannelAffine": Line(lambda: norms.affine.ChannelAffine(8)),
    "GroupNorm": Line(lambda: nn.GroupNorm(4, 8, eps=1e-3)),
    "GroupNorm of one group": Line(lambda: nn.GroupNorm(1, 8)),
    "GroupNorm of single channels": Line(lambda: nn.GroupNorm(8, 8)),
    "GroupNorm without affine": Line(lambda: nn.GroupNorm(2, 8, affine=False)),
    "GroupNorm (N, C)": Line(lambda: nn.GroupNorm(2, 8), (5, 8)),
    "LayerNorm": Line(lambda: nn.LayerNorm(8), (3, 4, 5, 8)),
    "LayerNorm without bias": Line(lambda: nn.LayerNorm(8, bias=False), (3, 4, 8)),
    "LayerNorm without affine": Line(lambda: nn.LayerNorm(8, elementwise_affine=False), (3, 4, 8)),
    "LayerNorm over two axes": Line(lambda: nn.LayerNorm((4, 8)), (3, 4, 8)),
    "LayerNorm over the map": Line(lambda: norms.layer.ChannelsFirstLayerNorm(8)),
    "LayerNorm over channels": Line(lambda: norms.layer.ChannelLayerNorm(8)),
    "InstanceNorm1d": Line(lambda: nn.InstanceNorm1d(8), (3, 8, 7)),
    "InstanceNorm2d": Line(lambda: nn.InstanceNorm2d(8)),
    "InstanceNorm2d with affine": Line(lambda: nn.InstanceNorm2d(8, affine=True, eps=1e-3)),
    "InstanceNorm2d with statistics": Line(lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
    "InstanceNorm2d that stopped tracking": Line(lambda: stopped(nn.InstanceNorm2d(8, track_running_stats=True))),
    "InstanceNorm3d": Line(lambda: nn.InstanceNorm3d(8, affine=True), (3, 8, 2, 3, 4)),
    "InstanceNorm of any rank": Line(lambda: norms.instance.InstanceNorm(8)),
    "RMSNorm": Line(lambda: nn.RMSNorm(8), (3, 4, 8)),
    "RMSNorm with eps": Line(lambda: nn.RMSNorm(8, eps=1e-3), (3, 4, 8)),
    "RMSNorm without affine": Line(lambda: nn.RMSNorm(8, elementwise_affine=False), (3, 4, 8)),
    "RMSNorm over two axes": Line(lambda: nn.RMSNorm((4, 8)), (3, 4, 8)),
    "RMSNorm over the map": Line(lambda: norms.rms.ChannelsFirstRMSNorm(8)),
    "RMSNorm over channels": Line(lambda: norms.rms.ChannelRMSNorm(8, eps=1e-3)),
    "SwitchableNorm1d (N, C)": Line(lambda: mixed(SwitchableNorm1d), (5, 8)),
    "SwitchableNorm1d (N, C, L)": Line(lambda: mixed(SwitchableNorm1d), (3, 8, 6)),
    "SwitchableNorm2d": Line(lambda: mixed(SwitchableNorm2d)),
    "SwitchableNorm3d": Line(lambda: mixed(SwitchableNorm3d), (3, 8, 2, 3, 4)),
    "SwitchableNorm without affine": Line(lambda: SwitchableNorm(8, affine=False)),
    "SwitchableNorm2d without batch": Line(lambda: SwitchableNorm2d(8, batch=False)),
    "SwitchableNorm2d without statistics": Line(lambda: SwitchableNorm2d(8, track_running_stats=False)),
    "BatchRenorm2d": Line(lambda: renorm.BatchRenorm2d(8, start=0, r_end=0, d_end=0, r_max=1.2, d_max=0.4)),
    "BatchRenorm1d (N, C)": Line(lambda: renorm.BatchRenorm1d(8), (5, 8)),
    "BatchRenorm3d without statistics": Line(
        lambda: renorm.BatchRenorm3d(8, track_running_stats=False), (3, 8, 2, 3, 4)
    ),
    "GhostBatchNorm2d": Line(lambda: ghost.GhostBatchNorm2d(8, virtual_batch=2)),
    "GhostBatchNorm1d (N, C)": Line(lambda: ghost.GhostBatchNorm1d(8, virtual_batch=3), (7, 8)),
    "GhostBatchNorm of any rank, without affine": Line(lambda: ghost.GhostBatchNorm(8, affine=False, virtual_batch=1)),
    "BatchInstanceNorm2d": Line(lambda: batch_instance.BatchInstanceNorm2d(8)),
    "BatchInstanceNorm1d (N, C)": Line(lambda: batch_instance.BatchInstanceNorm1d(8), (5, 8)),
    "FilterResponseNorm2d": Line(lambda: frn.FilterResponseNorm2d(8)),
    "FilterResponseNorm3d without threshold": Line(
        lambda: frn.FilterResponseNorm3d(8, threshold=False), (3, 8, 2, 3, 4)
    ),
    "EvoNormB02d": Line(lambda: evonorm.EvoNormB02d(8)),
    "EvoNormB01d (N, C)": Line(lambda: evonorm.EvoNormB01d(8, affine=False), (5, 8)),
    "EvoNormS02d": Line(lambda: evonorm.EvoNormS02d(8, groups=2)),
    "EvoNormS0 without affine": Line(lambda: evonorm.EvoNormS0(8, affine=False), (3, 8, 2, 3, 4)),
    "AdaptiveInstanceNorm2d": Line(lambda: adaptive_instance.AdaptiveInstanceNorm2d(8)),
    "ConditionalNorm2d": Line(lambda: conditional.ConditionalNorm2d(8, classes=3)),
    "ConditionalNorm over instances": Line(lambda: conditional.ConditionalNorm(8, bias=False, over="instance")),
    "DomainBatchNorm2d": Line(lambda: domain.DomainBatchNorm2d(8)),
    "DomainBatchNorm1d (N, C)": Line(lambda: domain.DomainBatchNorm1d(8, affine=False, domains=3), (5, 8)),
    "VirtualBatchNorm2d": Line(lambda: referred(virtual.VirtualBatchNorm2d(8))),
    "VirtualBatchNorm without a reference batch": Line(lambda: virtual.VirtualBatchNorm(8)),
    "VirtualBatchNorm1d (N, C)": Line(lambda: referred(virtual.VirtualBatchNorm1d(8)), (5, 8)),
    "AdaptiveBatchNorm2d": Line(lambda: adaptive_momentum.AdaptiveBatchNorm2d(8, momentum=Warmup(0.2))),
    "PositionalNorm2d": Line(lambda: positional.PositionalNorm2d(8)),
    "PositionalNorm1d (N, C)": Line(lambda: positional.PositionalNorm1d(8, bias=False), (5, 8)),
    "MultiscaleNorm2d": Line(lambda: multiscale.MultiscaleNorm2d(8, scales=(1, 2))),
    "LearnedGroupNorm2d": Line(lambda: learned_groups.LearnedGroupNorm2d(8, groups=2, temperature=0.5)),
    "LearnedGroupNorm1d (N, C)": Line(lambda: learned_groups.LearnedGroupNorm1d(8, affine=False, groups=4), (5, 8)),
    "RMSNorm over channels, eps of the dtype": Line(lambda: norms.rms.ChannelRMSNorm(8)),
}
KINDS = [kind for kind in kinds() if registry.planner(kind) is None]
ONE_OF_EACH = {
    "BatchNorm1d (N, C)", "BatchNorm2d", "BatchNorm2d without statistics", "GroupNorm", "LayerNorm over channels",
    "InstanceNorm2d with affine", "SwitchableNorm2d", "ConditionalNorm2d", "DomainBatchNorm2d", "EvoNormS02d",
}  # fmt: skip
PAIRS = [(name, kind) for name in SOURCES for kind in KINDS if kind not in FEWER_SOURCES or name in ONE_OF_EACH]
FEWER_PAIRS = [pair for pair in PAIRS if pair[0] in ONE_OF_EACH or pair[1] in ("batch", "group", "switchable")]
"""Where source and target have nothing to do with each other."""
pytestmark = pytest.mark.usefixtures("ambient_condition")
NEUTRAL_ONE = ("weight", "weights", "running_var", "variances", "share", "slope")
COPIED = ("BatchNorm2d", "LayerNorm", "SwitchableNorm2d", "BatchNorm1d (N, C)")
OWN_LAYERS = [name for name, line in SOURCES.items() if type(line.make()).__module__.startswith("normswap.")]


@pytest.mark.parametrize("name", SOURCES)
def test_reader(name: str) -> None:
    check_reader(SOURCES[name].module(), SOURCES[name].input())


@pytest.mark.parametrize("name", sorted(SOURCES.keys() - {"InstanceNorm2d that stopped tracking"}))
def test_reader_carries_the_tensors_themselves(name: str) -> None:
    module = SOURCES[name].module()
    given = {id(t) for t in (*module.parameters(), *module.buffers())}
    told = {id(t) for t in read(module).tensors.values()}
    assert given <= told


STOPPED_GRADIENT = {"BatchRenorm2d"}
"""What these compute is not the integral of their gradient, by design; tests/test_layers.py has them."""


@pytest.mark.parametrize("name", [name for name in OWN_LAYERS if name not in STOPPED_GRADIENT])
def test_own_layers_by_gradcheck(name: str) -> None:
    line = SOURCES[name]
    module = line.module()
    x = line.input()[(slice(2), slice(None), *(slice(2), slice(2), slice(1))[: len(line.shape) - 2])]
    x = x.clone().requires_grad_()
    for training in (True, False):
        subject = copy.deepcopy(module).train(training)
        parameters = dict(subject.named_parameters())

        def call(x: Tensor, *tensors: Tensor, subject: nn.Module = subject, names: Any = tuple(parameters)) -> Tensor:
            buffers = {name: buffer.clone() for name, buffer in subject.named_buffers()}  # which the call may update
            return torch.func.functional_call(subject, buffers | dict(zip(names, tensors, strict=True)), (x,))

        assert gradcheck(call, (x, *parameters.values()))


@pytest.mark.parametrize("name", OWN_LAYERS)
def test_own_layers_copy_pickle_and_print(name: str) -> None:
    line = SOURCES[name]
    check_copies(line.module().eval(), line.input())
    assert str(line.module()).startswith(type(line.module()).__name__)
    assert "8" in str(line.module())


@pytest.mark.parametrize("name", OWN_LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_own_layers_keep_low_precision(name: str, dtype: torch.dtype) -> None:
    line = SOURCES[name]
    module, x = line.module().to(dtype), line.input().to(dtype)
    bound = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    for training in (True, False):
        subject = copy.deepcopy(module).train(training)
        wanted = expected(x, read(subject), training=training)
        out = subject(x)
        assert out.dtype == dtype
        assert distance(out, wanted) < bound


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_any_norm_becomes_any_kind_or_is_refused_with_a_reason(name: str, kind: str) -> None:
    line = SOURCES[name]
    module, x = line.module(), line.input()
    plan = line.plan(kind)
    assert len(plan.changes) + len(plan.skips) == 1, "every norm is listed once"
    if plan.skips:
        reason = only(plan.skips).reason
        assert reason.strip()
        assert "Error" not in reason
        assert reason == f"it already is {read(module)}" or read(module).kind != kind
        return
    change = only(plan.changes)
    source, built = change.source, plan.apply()[0]
    old, new = copy.deepcopy(module).eval()(x), copy.deepcopy(built).eval()(x)
    if kind == "identity":
        assert torch.equal(new, x)
        assert change.exactness == "retrain"
        return
    target = read(built)
    assert target.kind == kind
    for training in (True, False):
        subject = copy.deepcopy(built).train(training)
        assert distance(subject(x), expected(x, target, training=training)) < tolerance(target)
    assert (change.exactness == "exact") == (distance(new, old) < 1e-8), f"{change.exactness}, {distance(new, old)}"
    assert change.exactness == exactness(source, target)
    gone = {name for name in ("weight", "bias") if getattr(source, name) is not None and getattr(target, name) is None}
    assert gone == {name for name in ("weight", "bias") if name in change.lost}
    assert ("running statistics" in change.lost) == (source.has_statistics and not target.has_statistics)
    assert ("gates" in change.lost) == (source.gates is not None and target.gates is None)


@pytest.mark.parametrize(("name", "kind"), FEWER_PAIRS)
def test_built_modules_survive_state_dict_and_copies(name: str, kind: str) -> None:
    line = SOURCES[name]
    plan = line.plan(kind)
    if plan.changes:
        norm, built, x = only(plan.changes).source, plan.apply()[0], line.input()
        check_state_dict(built, norm, kind, x, **only(plan.changes).options)
        if name in COPIED:
            check_copies(built.eval(), x)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_preserve_computes_the_same_or_is_refused(name: str, kind: str) -> None:
    line = SOURCES[name]
    module, x = line.module(), line.input()
    plan = line.plan(kind, init="preserve")
    if plan.changes:
        built = plan.apply()[0].eval()
        assert distance(built(x), module.eval()(x)) < (1e-5 if kind == "switchable" else DOUBLE)
        assert only(plan.changes).exactness == "exact"
    else:
        reason = only(plan.skips).reason
        assert any(
            words in reason
            for words in (
                "already is",
                "preserve",
                "axis",
                "axes",
                "no running",
                "N, C",
                "gates",
                "batch",
                "fixed affine",
            )
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*COPIED, "SyncBatchNorm", "RMSNorm over channels"])
def test_reset_starts_afresh(name: str, kind: str) -> None:
    line = SOURCES[name]
    plan = line.plan(kind, init="reset")
    for change in plan.changes:
        assert change.exactness == "retrain"
        assert "affine and statistics start afresh" in change.notes
        built = plan.apply()[0]
        for field, tensor in () if kind == "identity" else read(built).tensors.items():
            if field == "logits":  # which must not be alike, or no channel would leave the others
                continue
            neutral = 1.0 if field in NEUTRAL_ONE else 0.0
            assert bool((tensor == neutral).all()), field
            assert all(tensor is not old for old in change.source.tensors.values())


@pytest.mark.parametrize(("name", "kind"), FEWER_PAIRS)
def test_dtype_and_device_are_kept(name: str, kind: str) -> None:
    line, dtype = SOURCES[name], torch.bfloat16
    for device in ("cpu", "meta"):
        x = line.input().to(device=device, dtype=dtype)
        arguments = {"example_inputs": (x,)} if len(line.shape) == 2 else {}
        module = line.module().to(device=device, dtype=dtype)
        if not module.state_dict():
            continue
        plan = plan_of(module, kind, **arguments)
        for _ in plan.changes:
            built = plan.apply()[0]
            floating = [t for t in built.state_dict().values() if t.is_floating_point()]
            assert {t.dtype for t in floating} <= {dtype}
            assert {t.device.type for t in built.state_dict().values()} <= {device}
            if device == "cpu":
                out = built.eval()(x)
                assert out.dtype == dtype
                assert bool(out.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["BatchNorm2d without affine", "GroupNorm without affine", "InstanceNorm2d"])
def test_a_norm_without_tensors_takes_its_neighbours_dtype(name: str, kind: str) -> None:
    conv = nn.Conv2d(3, 8, 1).to(torch.bfloat16)
    module = SOURCES[name].make().to(torch.bfloat16)
    plan = plan_of(nn.Sequential(conv, module), kind)
    if plan.changes:
        tensors = plan.apply()[0].state_dict().values()
        assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.bfloat16}


def test_frozen_loads_a_batch_norms_state() -> None:
    source = randomise(nn.BatchNorm2d(8).double()).eval()
    target = norms.frozen.FrozenBatchNorm(8).double()
    target.load_state_dict(source.state_dict(), strict=True)
    x = sample(*MAP)
    assert torch.equal(target.train()(x), source(x))
    assert "num_batches_tracked" in source.state_dict(), "loading must not change the state that was given"


def test_frozen_stays_frozen_after_train() -> None:
    source = randomise(nn.BatchNorm2d(8).double()).eval()
    x = sample(*MAP)
    wanted = source(x)
    frozen = plan_of(source, "frozen").apply().train()
    assert torch.equal(frozen(x), wanted)
    assert torch.equal(frozen(x), wanted)
    assert not list(frozen.parameters())


def test_layers_that_take_any_rank_check_the_least() -> None:
    for module, low, words in (
        (norms.batch.BatchNorm(4), torch.zeros(4), "at least 2D"),
        (norms.instance.InstanceNorm(4), torch.zeros(3, 4), "at least 3D"),
        (SwitchableNorm2d(4), torch.zeros(3, 4), r"expected 4D input \(got 2D input\)"),
        (SwitchableNorm1d(4), torch.zeros(3, 4, 5, 6), r"expected 2D or 3D input \(got 4D input\)"),
    ):
        with pytest.raises(ValueError, match=words):
            module(low)


class TestSwitchable:
    """arXiv 1806.10779, written out."""

    def test_statistics_are_moving_averages_of_biased_moments(self) -> None:
        module = randomise(SwitchableNorm2d(8, momentum=0.25).double())
        mean, var = module.running_mean.clone(), module.running_var.clone()
        for seed in range(3):
            x = sample(*MAP, seed=seed)
            mean = 0.75 * mean + 0.25 * x.mean((0, 2, 3))
            var = 0.75 * var + 0.25 * x.var((0, 2, 3), correction=0)
            module(x)
        assert distance(module.running_mean, mean) < DOUBLE
        assert distance(module.running_var, var) < DOUBLE
        assert int(module.num_batches_tracked) == 3
        module.eval()(sample(*MAP))
        assert int(module.num_batches_tracked) == 3

    def test_a_cumulative_mean(self) -> None:
        module = SwitchableNorm2d(8, momentum=None).double()
        xs = [sample(*MAP, seed=seed) for seed in range(4)]
        for x in xs:
            module(x)
        assert distance(module.running_mean, torch.stack([x.mean((0, 2, 3)) for x in xs]).mean(0)) < DOUBLE

    def test_large_means_do_not_cancel(self) -> None:
        module = SwitchableNorm2d(8).float()
        x = (sample(*MAP) + 1e3).float()
        assert distance(module(x), expected(x, read(module), training=True)) < 5e-3

    def test_memory_format_and_non_contiguous_inputs(self) -> None:
        module = randomise(SwitchableNorm2d(8).double()).eval()
        x = sample(*MAP)
        assert distance(module(x.to(memory_format=torch.channels_last)), module(x)) < DOUBLE
        assert distance(module(x.transpose(2, 3)), module(x.transpose(2, 3).contiguous())) < DOUBLE

    @pytest.mark.parametrize("name", ["BatchNorm2d", "GroupNorm of one group", "InstanceNorm2d with affine"])
    def test_preserve_and_the_gates_still_learn(self, name: str) -> None:
        line = SOURCES[name]
        module, x = line.module(), line.input()
        built = plan_of(module, "switchable", init="preserve").apply()[0]
        assert distance(built.eval()(x), module.eval()(x)) < 1e-6
        built.train()(x).square().mul(sample(*MAP, seed=5)).sum().backward()
        for gate in (built.mean_gate, built.var_gate):
            assert bool((gate.grad != 0).all())
        before = copy.deepcopy(built.mean_gate.data)
        torch.optim.Adam(built.parameters(), lr=0.1).step()
        assert bool(((built.mean_gate - before).abs() > 0.05).all()), "a scale-free optimizer moves a shut gate"

    def test_the_gap_trades_equality_for_gradient(self) -> None:
        line = SOURCES["BatchNorm2d"]
        module, x = line.module(), line.input()
        errors, gradients = [], []
        for gap in (8.0, 12.0, GATE_GAP):
            plan = plan_of(module, "switchable", init="preserve", gate_gap=gap)
            change = only(plan.changes)
            assert change.exactness == ("exact" if gap == GATE_GAP else "approximate")
            built = plan.apply()[0].eval()
            out = built(x)
            errors.append(distance(out, module.eval()(x)))
            out.square().mul(sample(*MAP, seed=5)).sum().backward()
            gradients.append(float(built.mean_gate.grad.abs().min()))
        assert errors == sorted(errors, reverse=True)
        assert gradients == sorted(gradients, reverse=True)
        assert errors[0] < 5e-3
        assert errors[-1] < 1e-6

    @pytest.mark.parametrize("gap", [-1.0, float("nan"), "a"])
    def test_a_gap_that_is_no_gap(self, gap: Any) -> None:
        with pytest.raises(NormswapError, match=r"gate_gap=.*at least 0"):
            plan_of(nn.BatchNorm2d(4), "switchable", gate_gap=gap)

    def test_trained_gates_are_not_reset_by_a_second_conversion(self) -> None:
        module = randomise(SwitchableNorm2d(8))
        assert "already is" in only(plan_of(module, "switchable").skips).reason

    def test_low_precision_statistics_keep_their_dtype(self) -> None:
        module = SwitchableNorm2d(8).bfloat16()
        module(sample(*MAP).bfloat16())
        assert module.running_mean.dtype == torch.bfloat16


class TestOver:
    """``over`` chooses between the whole map and the channels at each position."""

    @pytest.mark.parametrize("kind", ["layer", "rms"])
    def test_both_forms(self, kind: str) -> None:
        x = sample(*MAP)
        source = SOURCES["BatchNorm2d"].module()
        whole, each = (plan_of(source, kind, over=over).apply()[0] for over in ("map", "channels"))
        assert torch.equal(plan_of(source, kind).apply()[0](x), whole(x))
        assert distance(whole(x), expected(x, read(whole))) < DOUBLE
        assert distance(each(x), expected(x, read(each))) < DOUBLE
        assert distance(each(x), whole(x)) > 1e-2

    def test_a_norm_over_channels_stays_one(self) -> None:
        assert type(plan_of(norms.layer.ChannelLayerNorm(8), "rms").apply()[0]) is norms.rms.ChannelRMSNorm

    def test_layer_over_the_map_is_group_norm_of_one_group(self) -> None:
        source, x = SOURCES["BatchNorm2d"].module(), sample(*MAP)
        layer, group = plan_of(source, "layer").apply(), plan_of(source, "group", groups=1).apply()
        assert torch.equal(layer(x), group(x))
        assert torch.equal(layer(sample(2, 8, 3, 7)), group(sample(2, 8, 3, 7)))

    def test_bad_values(self) -> None:
        with pytest.raises(NormswapError, match="over='space': it is 'map' or 'channels'"):
            plan_of(nn.BatchNorm2d(8), "layer", over="space")
        assert "last axis" in only(plan_of(nn.LayerNorm(8), "layer", over="map").skips).reason


class TestGroupCount:
    @given(st.integers(1, 4096))
    @settings(deadline=None, max_examples=60)
    def test_default_is_the_nearest_divisor_that_leaves_two_channels(self, channels: int) -> None:
        count = group_count(channels)
        assert channels % count == 0
        assert channels // count >= 2 or channels == 1
        for other in range(1, channels // 2 + 1):
            if channels % other == 0:
                ours, theirs = abs(count - DEFAULT_GROUPS), abs(other - DEFAULT_GROUPS)
                assert ours < theirs or (ours == theirs and count <= other)

    @given(st.integers(1, 512), st.integers(1, 512))
    @settings(deadline=None, max_examples=60)
    def test_a_given_count_is_exact_or_an_error(self, channels: int, given_count: int) -> None:
        for name in ("groups", "channels_per_group"):
            if channels % given_count:
                with pytest.raises(NormswapError, match=f"{name}={given_count} does not divide {channels} channels"):
                    group_count(channels, **{name: given_count})
            else:
                count = group_count(channels, **{name: given_count})
                assert count == (given_count if name == "groups" else channels // given_count)

    @pytest.mark.parametrize(
        ("channels", "count"), [(64, 32), (72, 36), (24, 12), (48, 24), (7, 1), (2, 1), (1, 1), (96, 32), (40, 20)]
    )
    def test_stated_examples(self, channels: int, count: int) -> None:
        assert group_count(channels) == count

    def test_functions_of_the_channels(self) -> None:
        assert group_count(24, groups=lambda c: c // 4) == 6
        assert group_count(24, channels_per_group=lambda c: c // 4) == 4
        model = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(12))
        plan = plan_of(model, "group", groups=lambda c: c // 4)
        assert [change.target.groups for change in plan.changes] == [2, 3]
        assert [step["options"] for step in plan.recipe["steps"]] == [{"groups": 2}, {"groups": 3}]

    @pytest.mark.parametrize("bad", [0, -2, 1.0, True, "4"])
    def test_no_count(self, bad: Any) -> None:
        with pytest.raises(NormswapError, match="must be a whole number of at least 1"):
            group_count(8, groups=bad)

    def test_both_at_once(self) -> None:
        with pytest.raises(NormswapError, match="not both"):
            group_count(8, 2, 4)

    def test_the_error_names_the_layer_and_the_nearest_counts(self) -> None:
        words = r"^0\.1: groups=32 does not divide 72 channels; nearest that do: 24, 36\."
        with pytest.raises(NormswapError, match=words):
            plan_of(nn.Sequential(nn.BatchNorm2d(64), nn.BatchNorm2d(72)), "group", groups=32)


def test_momentum_and_counter_are_kept() -> None:
    for momentum in (0.01, None):
        source = nn.BatchNorm2d(8, momentum=momentum)
        source(sample(*MAP).float())
        for kind in ("sync", "switchable"):
            built = plan_of(source, kind).apply()[0]
            assert built.momentum == momentum
            assert int(built.num_batches_tracked) == 1
        assert plan_of(norms.sync.SyncBatchNorm(8, momentum=momentum), "batch").apply()[0].momentum == momentum


def test_ranks_choose_the_class() -> None:
    for make, cls in (
        (lambda: nn.BatchNorm1d(8), SwitchableNorm1d),
        (lambda: nn.BatchNorm2d(8), SwitchableNorm2d),
        (lambda: nn.BatchNorm3d(8), SwitchableNorm3d),
        (lambda: nn.GroupNorm(2, 8), SwitchableNorm),
    ):
        assert type(plan_of(make(), "switchable").apply()[0]) is cls


def test_builders_do_not_touch_their_norm() -> None:
    for name in (*COPIED, "InstanceNorm2d with statistics"):
        module = SOURCES[name].module()
        before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
        for kind in KINDS:
            plan_of(module, kind).apply()
        assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items()), name


def test_every_kind_is_built_from_a_batch_norm_or_is_one() -> None:
    line = SOURCES["BatchNorm2d"]
    assert {kind for kind in KINDS if line.plan(kind).changes} == set(KINDS) - {"batch"}
    assert SOURCES["FrozenBatchNorm"].plan("batch").changes


def test_fresh_keeps_the_shape_of_a_norm() -> None:
    norm = read(SOURCES["BatchNorm2d"].module())
    new = fresh(norm)
    assert new.tensors.keys() == norm.tensors.keys()
    assert all(
        a.shape == b.shape and a.dtype == b.dtype
        for a, b in zip(new.tensors.values(), norm.tensors.values(), strict=True)
    )
    assert registry.builder("batch")(new).weight is new.weight


def test_the_tolerances_mean_something() -> None:
    module, x = SOURCES["BatchNorm2d"].module().eval(), sample(*MAP)
    assert distance(module(x), module(x * 1.001)) > SINGLE > DOUBLE
