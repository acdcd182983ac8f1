"""Conversion of whole models: what is chosen, what is refused and why, wrappers, evidence, and the input left alone."""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

import normswap
from normswap import Norm, NormswapError, convert, find, kinds, plan_convert, registry
from normswap.engine import guards
from tests.support import (
    DOUBLE,
    batch_norms_run,
    check_copies,
    distance,
    only,
    operators,
    picture,
    plan_of,
    randomise,
    sample,
)


class Block(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Network(nn.Module):
    """Modules, an alias, a functional norm, a channels-last norm and a class of another name."""

    def __init__(self) -> None:
        super().__init__()
        self.block1 = Block(3, 8)
        self.block2 = Block(8, 16)
        self.again = self.block1.bn1
        self.scale = nn.Parameter(torch.ones(16))
        self.head = nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.LayerNorm(12))

    def forward(self, x: Tensor) -> Tensor:
        x = F.instance_norm(self.block2(self.block1(x)), weight=self.scale)
        return self.head(x.mean((2, 3)))


def network() -> Network:
    model = Network().double()
    randomise(model)
    return model


X = sample(4, 3, 8, 8)
NAMES = [f"block{i}.{name}" for i in (1, 2) for name in ("bn1", "bn2", "shortcut.1")]
CHANGING = [kind for kind in kinds() if kind != "plain"]
"""Those that change something of a model that has no computed weights."""


@pytest.mark.usefixtures("ambient_condition")
@pytest.mark.parametrize("kind", [kind for kind in kinds() if registry.planner(kind) is None])
def test_every_norm_is_in_the_plan_and_the_model_runs(kind: str) -> None:
    model = network()
    plan = plan_convert(model, kind)
    listed = {part.name for part in (*plan.changes, *plan.skips)}
    assert listed == {*NAMES, "instance_norm", "head.1", "head.2"}
    new = plan.apply()
    assert isinstance(new, Network)
    assert bool(new(X).isfinite().all())
    skipped = {skip.name for skip in plan.skips}
    left = len(skipped & {*NAMES, "head.1", "instance_norm"})
    computed_by_batch_norm = ("batch", "sync", "frozen", "instance", "renorm", "ghost", "adaptive_momentum")
    assert batch_norms_run(new.eval(), X) == (8 if kind in computed_by_batch_norm else left)


@pytest.mark.parametrize("kind", ["sync", "frozen", "switchable"])
def test_exact_kinds_compute_the_same_in_eval_mode(kind: str) -> None:
    model = network().eval()
    wanted = model(X)
    plan = plan_convert(model, kind, init="preserve")
    assert {change.exactness for change in plan.changes} == {"exact"}
    assert len(plan.changes) >= 7
    assert distance(plan.apply()(X), wanted) < (1e-5 if kind == "switchable" else DOUBLE)


def test_there_and_back_again() -> None:
    model = network().eval()
    wanted = model(X)
    for path in (["sync", "batch"], ["frozen", "batch"], ["frozen", "sync", "frozen", "batch"]):
        new: nn.Module = model
        for kind in path:
            new = convert(new, kind, skip=["instance_norm*", "head.2"])
        assert distance(new.eval()(X), wanted) < DOUBLE
        assert [type(m).__name__ for m in new.modules()] == [type(m).__name__ for m in model.modules()]
        assert list(new.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("kind", CHANGING)
def test_the_input_is_never_touched(kind: str) -> None:
    model = network()
    model.block1.bn1.register_forward_hook(lambda *_: None)
    before = picture(model)
    for arguments in ({}, {"example_inputs": (X,)}, {"init": "reset"}):
        plan = plan_convert(model, kind, **arguments)
        assert plan.apply() is not model
    assert before.differences(model) == []


def test_in_place_returns_the_model_itself() -> None:
    model = network()
    conv = model.block1.conv1
    assert convert(model, "group", inplace=True) is model
    assert model.block1.conv1 is conv
    assert model.again is model.block1.bn1
    assert isinstance(model.again, nn.GroupNorm)


def test_results_copy_and_pickle() -> None:
    for kind in ("group", "switchable", "frozen"):
        check_copies(convert(network(), kind).eval(), X)


class TestSelection:
    @pytest.mark.parametrize(
        ("where", "names"),
        [
            ("block1.*", ["block1.bn1", "block1.bn2", "block1.shortcut.1"]),
            ("*.bn2", ["block1.bn2", "block2.bn2"]),
            (["block2.bn1", "head.1"], ["block2.bn1", "head.1"]),
            (("block?.bn1",), ["block1.bn1", "block2.bn1"]),
            ("again", ["block1.bn1"]),
            (lambda name, norm: norm.channels == 12 and norm.kind == "batch", ["head.1"]),
            ([], []),
        ],
    )
    def test_where(self, where: Any, names: list[str]) -> None:
        plan = plan_convert(network(), "group", where=where)
        assert [change.name for change in plan.changes] == names
        others = [skip for skip in plan.skips if skip.name not in names]
        assert len(others) == 9 - len(names)
        assert {skip.reason for skip in others} == {"not selected by where"}

    def test_skip_wins_over_where(self) -> None:
        plan = plan_convert(network(), "group", where="block1.*", skip=lambda name, norm: name.endswith("bn2"))
        assert [change.name for change in plan.changes] == ["block1.bn1", "block1.shortcut.1"]
        assert {s.reason for s in plan.skips if s.name == "block1.bn2"} == {"excluded by skip"}

    def test_functions_are_given_the_norm(self) -> None:
        given: list[tuple[str, Norm]] = []
        plan_convert(network(), "group", where=lambda name, norm: bool(given.append((name, norm))))
        assert ("head.2", "layer") in [(name, norm.kind) for name, norm in given]
        assert all(isinstance(norm, Norm) for _, norm in given)

    @pytest.mark.parametrize("name", ["where", "skip"])
    def test_a_glob_that_matches_nothing_is_a_slip(self, name: str) -> None:
        with pytest.raises(NormswapError, match=rf"{name}: no norm is called 'blok\*'; the first is"):
            plan_convert(network(), "group", **{name: ["block1.*", "blok*"]})

    @pytest.mark.parametrize("bad", [5, ["block1.*", 5], {"a": 1}])
    @pytest.mark.parametrize("name", ["where", "skip"])
    def test_no_selector(self, name: str, bad: Any) -> None:
        with pytest.raises(NormswapError, match="take a glob, a list of globs or f"):
            plan_convert(network(), "group", **{name: bad})


class TestMisuse:
    @pytest.mark.parametrize(
        ("model", "words"),
        [
            (5, "expected a torch.nn.Module, got int"),
            (nn.BatchNorm2d, "expected a torch.nn.Module, got type"),
            ("program", "pass program.module()"),
        ],
    )
    def test_no_model(self, model: Any, words: str) -> None:
        if model == "program":
            model = torch.export.export(nn.Linear(2, 2), (torch.randn(1, 2),))
        for call in (find, plan_convert, convert):
            with pytest.raises(NormswapError) as error:
                call(model)
            assert words in str(error.value)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
    def test_script_modules(self) -> None:
        scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(4)))
        for call in (find, convert):
            with pytest.raises(NormswapError, match="convert the Python module, then script it again"):
                call(scripted)

        class Functional(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = nn.Parameter(torch.ones(4))

            def forward(self, x: Tensor) -> Tensor:
                return F.group_norm(x, 2, self.w)

        traced = torch.jit.trace(Functional(), (torch.randn(1, 4, 2, 2),))
        model = nn.Sequential(scripted, torch.jit.script(Functional()), traced, torch.jit.script(nn.ReLU()))
        plan = plan_convert(model, "layer")
        assert not plan.changes
        assert [skip.name for skip in plan.skips] == ["0.0", "1", "2", "2._actual_script_module"]
        assert {skip.reason for skip in plan.skips} == {"it is inside a ScriptModule, whose code cannot be changed"}

    def test_init(self) -> None:
        with pytest.raises(NormswapError, match="init='zero'; it is one of: copy, preserve, reset"):
            plan_convert(network(), init="zero")  # type: ignore[arg-type]

    def test_example_inputs(self) -> None:
        with pytest.raises(NormswapError, match=r"must be a tuple, not Tensor: write \(x,\)"):
            plan_convert(network(), example_inputs=X)  # type: ignore[arg-type]
        with pytest.raises(NormswapError, match=r"does not run on example_inputs \(\(1, 5, 2, 2\)\): RuntimeError"):
            plan_convert(network(), example_inputs=(torch.randn(1, 5, 2, 2),))

    def test_nothing_to_do_is_said(self) -> None:
        with pytest.warns(UserWarning, match="nothing changed.*has no normalization"):
            convert(nn.Linear(2, 2))
        with pytest.warns(UserWarning, match="nothing changed.*1 norms, none changed; first: 0: it already is group"):
            convert(nn.Sequential(nn.GroupNorm(2, 4)))
        with pytest.warns(UserWarning, match="first: the model: it already is"):
            convert(nn.GroupNorm(2, 4))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            convert(network(), "layer")

    def test_skips_are_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, logger="normswap"):
            convert(network(), "group")
        assert "skipped head.2 (layer(12, eps=1e-05)): its channels are on the last axis" in caplog.text

    def test_a_model_that_cannot_be_copied(self) -> None:
        model = network()
        model.activation = model.scale * 2
        with pytest.raises(NormswapError, match=r"cannot be copied.*use inplace=True"):
            convert(model, "group")
        assert isinstance(convert(model, "group", inplace=True).block1.bn1, nn.GroupNorm)


def test_a_norm_of_the_kind_stays_as_it_is() -> None:
    model = nn.Sequential(nn.GroupNorm(4, 32), nn.BatchNorm2d(32))
    plan = plan_convert(model, "group")
    assert [change.name for change in plan.changes] == ["1"]
    assert only(plan.skips).reason == "it already is group(32, groups=4, eps=1e-05)"
    regrouped = plan_convert(model, "group", groups=8)
    assert [change.target.groups for change in regrouped.changes] == [8, 8]
    assert [c.name for c in plan_convert(model, "group", init="reset").changes] == ["0", "1"]


def test_lazy_norms_until_they_know_their_channels() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 1), nn.LazyBatchNorm2d(), nn.LazyInstanceNorm2d(affine=True))
    plan = plan_convert(model, "sync")
    assert not plan.changes
    assert [skip.reason.split(":")[0] for skip in plan.skips] == ["it is lazy and not initialised yet"] * 2
    model(torch.randn(2, 3, 4, 4))
    new = convert(model, "sync")
    assert (type(new[1]).__name__, new[1].num_features) == ("SyncBatchNorm", 8)
    assert isinstance(convert(model, "group")[2], nn.GroupNorm)


class TestSingleElements:
    """Moments over one element wipe the data: seen in shapes, or in what stands before the norm."""

    def refused(self, model: nn.Module, kind: str, words: str = "", **arguments: Any) -> None:
        plan = plan_convert(model, kind, **arguments)
        assert not plan.changes, str(plan)
        assert words in only(plan.skips).reason

    def squeeze(self) -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU())

    def test_squeeze_and_excitation_without_inputs(self) -> None:
        self.refused(self.squeeze(), "instance", "single elements")
        self.refused(self.squeeze(), "group", "single elements", groups=8)
        assert plan_convert(self.squeeze(), "group").changes
        assert plan_convert(self.squeeze(), "layer").changes

    def test_squeeze_and_excitation_with_inputs(self) -> None:
        x = torch.randn(2, 3, 6, 6)
        self.refused(self.squeeze(), "instance", "single elements", example_inputs=(x,))
        self.refused(self.squeeze(), "group", "single elements", example_inputs=(x,), groups=8)
        plan = plan_convert(self.squeeze(), "group", example_inputs=(x,))
        assert only(plan.changes).evidence == "observed"
        assert only(plan.changes).target.groups == 1
        assert "one position" in only(plan.changes).notes[0]

    def test_pooling_by_mean(self) -> None:
        class Means(nn.Module):
            def __init__(self, norm: nn.Module, keep: bool) -> None:
                super().__init__()
                self.conv, self.norm, self.keep = nn.Conv2d(3, 8, 1), norm, keep

            def forward(self, x: Tensor) -> Tensor:
                return self.norm(self.conv(x).mean((2, 3), keepdim=self.keep))

        for norm, keep in ((nn.BatchNorm2d(8), True), (nn.BatchNorm1d(8), False)):
            self.refused(Means(norm, keep), "instance")
            self.refused(Means(norm, keep), "group", channels_per_group=1)

    def test_batch_norm_of_vectors(self) -> None:
        model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8))
        self.refused(model, "instance", "(N, C)")
        self.refused(model, "group", "single elements", groups=8)
        assert "one position" in only(plan_convert(model, "group").changes).notes[0]
        assert "only 2 elements" in only(plan_convert(model, "group", groups=4).changes).notes[0]
        self.refused(nn.Sequential(nn.BatchNorm1d(8)), "instance", "pass example_inputs")
        sequence = plan_convert(nn.Sequential(nn.BatchNorm1d(8)), "instance", example_inputs=(torch.randn(2, 8, 5),))
        assert isinstance(sequence.apply()[0], nn.InstanceNorm1d)
        self.refused(nn.Sequential(nn.BatchNorm1d(8)), "instance", "(N, C)", example_inputs=(torch.randn(2, 8),))

    def test_after_a_convolution_there_is_a_map(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8))
        assert isinstance(convert(model, "instance")[2], nn.InstanceNorm2d)
        assert isinstance(convert(model, "group", groups=8)[2], nn.GroupNorm)

    def test_one_channel(self) -> None:
        self.refused(nn.Sequential(nn.BatchNorm2d(1)), "layer", "single elements", over="channels")
        assert plan_convert(nn.Sequential(nn.BatchNorm2d(1)), "layer").changes

    def test_a_small_map_that_is_really_seen(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.refused(model, "instance", "single elements", example_inputs=(torch.randn(1, 3, 3, 3),))
        assert plan_convert(model, "instance", example_inputs=(torch.randn(1, 3, 4, 4),)).changes


class TestEvidence:
    def test_static_and_observed(self) -> None:
        model = network()
        assert {part.evidence for part in plan_convert(model, "group").changes} == {"static"}
        assert {part.evidence for part in plan_convert(model, "group", example_inputs=(X,)).changes} == {"observed"}
        sites = {site.name: site.shapes for site in find(model, (X,))}
        assert sites["block1.bn1"] == ((4, 8, 8, 8),)
        assert sites["instance_norm"] == ((4, 16, 8, 8),)
        assert sites["head.1"] == ((4, 12),)
        assert all(site.shapes is None for site in find(model))

    def test_a_module_called_twice(self) -> None:
        norm = nn.BatchNorm2d(4)
        site = only(find(nn.Sequential(norm, nn.MaxPool2d(2), norm), (torch.randn(2, 4, 8, 8),)))
        assert site.shapes == ((2, 4, 8, 8), (2, 4, 4, 4))

    def test_keyword_calls_have_no_shape_and_are_no_obstacle(self) -> None:
        class Named(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.BatchNorm2d(4)

            def forward(self, x: Tensor) -> Tensor:
                return self.norm(input=x)

        assert plan_convert(Named(), "instance", example_inputs=(torch.randn(2, 4, 3, 3),)).changes

    def test_norms_that_do_not_run(self) -> None:
        model = nn.Sequential(nn.BatchNorm2d(4))
        model[0].unused = nn.BatchNorm2d(4)
        plan = plan_convert(model, "group", example_inputs=(torch.randn(2, 4, 3, 3),))
        assert {c.name: "did not run on example_inputs" in c.notes for c in plan.changes} == {
            "0": False,
            "0.unused": True,
        }

    def test_calls_that_code_analysis_cannot_see(self) -> None:
        class Hidden(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return getattr(F, "group" + "_norm")(x, 2)

        skip = only(plan_convert(nn.Sequential(Hidden()), example_inputs=(torch.randn(2, 4, 3, 3),)).skips)
        assert (skip.name, skip.reason) == ("0.group_norm", "0 calls group_norm where code analysis does not see it")

    def test_norms_that_run_but_are_not_in_the_tree(self) -> None:
        norm = nn.BatchNorm2d(4).eval()

        class Outside(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return norm(x)

        plan = plan_convert(nn.Sequential(Outside()), example_inputs=(torch.randn(2, 4, 3, 3),))
        assert not plan.changes
        assert any(
            "no submodule of the model" in skip.reason or "not a submodule" in skip.reason for skip in plan.skips
        )

    def test_inputs_without_a_batch_axis(self) -> None:
        model = nn.Sequential(nn.InstanceNorm2d(5, affine=True))
        plan = plan_convert(model, "group", example_inputs=(torch.randn(5, 5, 5),))
        assert "has no batch axis" in only(plan.skips).reason
        assert plan_convert(model, "group", example_inputs=(torch.randn(2, 5, 5, 5),)).changes

    def test_channels_on_another_axis(self) -> None:
        model = nn.Sequential(nn.InstanceNorm2d(5))
        with pytest.warns(UserWarning, match="does not match num_features"):
            plan = plan_convert(model, "group", example_inputs=(torch.randn(2, 3, 5, 5),))
        assert "does not have its 5 channels on axis 1" in only(plan.skips).reason


class TestTheCodeAround:
    def test_a_parent_that_computes_with_the_norms_parameters(self) -> None:
        class Fused(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.LayerNorm(8)

            def forward(self, x: Tensor) -> Tensor:
                return self.norm(x) * self.norm.weight

        plan = plan_convert(Fused(), "rms")
        assert "Fused.forward reads its 'weight' and may compute with it" in only(plan.skips).reason

    def test_a_parent_that_reads_what_the_new_norm_lacks(self) -> None:
        class Reads(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.BatchNorm2d(8)

            def forward(self, x: Tensor) -> Tensor:
                return self.norm(x) + self.norm.running_mean.mean()

        assert "which GroupNorm does not have" in only(plan_convert(Reads(), "group").skips).reason
        plan = plan_convert(Reads(), "sync")
        assert only(plan.changes).exactness == "exact"

    def test_a_parent_that_asks_for_the_dtype(self) -> None:
        class Casts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.LayerNorm(8)

            def forward(self, x: Tensor) -> Tensor:
                return self.norm(x.to(self.norm.weight.dtype))

        assert plan_convert(Casts(), "rms").changes


class TestTransformerEncoder:
    """Its fused inference kernel computes LayerNorm whatever its children are."""

    def encoder(self, first: bool) -> nn.Module:
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=first, dropout=0.0)
        return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=not first)

    def written_out(self, model: Any, x: Tensor, first: bool) -> Tensor:
        for layer in model.layers:

            def attend(h: Tensor, layer: Any = layer) -> Tensor:
                return layer.self_attn(h, h, h, need_weights=False)[0]

            def feed(h: Tensor, layer: Any = layer) -> Tensor:
                return layer.linear2(torch.relu(layer.linear1(h)))

            if first:
                x = x + attend(layer.norm1(x))
                x = x + feed(layer.norm2(x))
            else:
                x = layer.norm1(x + attend(x))
                x = layer.norm2(x + feed(x))
        return model.norm(x)

    @pytest.mark.parametrize("first", [False, True])
    @pytest.mark.parametrize("grad", [False, True])
    def test_eval_mode_computes_the_new_norm(self, first: bool, grad: bool) -> None:
        model = randomise(self.encoder(first)).eval()
        x = sample(2, 5, 16).float()
        with torch.set_grad_enabled(grad):
            plan = plan_convert(model, "rms")
            assert len(plan.changes) == 5
            assert all("fused path" in " ".join(c.notes) for c in plan.changes[:4])
            new = plan.apply()
            assert distance(new(x), self.written_out(new, x, first)) < 1e-5
            assert distance(model(x), self.written_out(model, x, first)) < 1e-5
            mask = torch.zeros(2, 5, dtype=torch.bool)
            mask[0, 3:] = True
            masked = new(x, src_key_padding_mask=mask)
            assert distance(masked[1], new(x)[1]) < 1e-5
        assert not operators(lambda: new(x))["_transformer_encoder_layer_fwd"]
        assert not operators(lambda: new(x))["native_layer_norm"]

    def test_what_is_not_converted_stays_fast(self) -> None:
        model = randomise(self.encoder(False)).eval()
        new = convert(model, "rms", where="layers.0.*")
        counts = operators(lambda: new(sample(2, 5, 16).float()))
        assert counts["_transformer_encoder_layer_fwd"] == 1

    def test_it_is_put_back_when_applying_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = nn.Sequential(self.encoder(False), nn.BatchNorm2d(4))
        flags = [layer.activation_relu_or_gelu for layer in model[0].layers]
        plan = plan_convert(model, "rms")
        off = guards.fast_paths_off

        def fail(*arguments: Any) -> Any:
            off(*arguments)()
            raise ZeroDivisionError

        before = picture(model)
        monkeypatch.setattr(guards, "fast_paths_off", fail)
        with pytest.raises(ZeroDivisionError):
            plan.apply(inplace=True)
        assert before.differences(model) == []
        assert [layer.activation_relu_or_gelu for layer in model[0].layers] == flags != [0, 0]
        assert model[0].use_nested_tensor


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        yield
        distributed.destroy_process_group()


class TestWrappers:
    def small(self) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

    def test_distributed(self, one_process: None) -> None:
        model = nn.parallel.DistributedDataParallel(self.small())
        for inplace in (False, True):
            plan = plan_convert(model, "group", where="*.1")
            assert [change.name for change in plan.changes] == ["module.1"]
            assert "convert first" in plan.notes[0]
            new = plan.apply(inplace=inplace)
            assert type(new) is type(model)
            new(torch.randn(2, 3, 4, 4)).sum().backward()
            again = nn.parallel.DistributedDataParallel(new.module)
            again(torch.randn(2, 3, 4, 4)).sum().backward()

    def test_data_parallel(self) -> None:
        model = nn.DataParallel(self.small())
        plan = plan_convert(model, "group")
        assert [change.name for change in plan.changes] == ["module.1", "module.3"]
        assert "looked through" in plan.notes[0]
        new = plan.apply()
        assert isinstance(new, nn.DataParallel)
        assert new(torch.randn(2, 3, 4, 4)).shape == (2, 8, 4, 4)

    def test_compiled_models(self) -> None:
        model = torch.compile(self.small(), backend="eager")
        x = torch.randn(2, 3, 4, 4)
        model(x)
        for inplace in (False, True):
            plan = plan_convert(model, "layer", where="*.1")
            assert [change.name for change in plan.changes] == ["_orig_mod.1"]
            assert "compiles again" in plan.notes[0]
            new = plan.apply(inplace=inplace)
            inner = new._orig_mod
            assert distance(new(x), inner[3](inner[2](F.group_norm(inner[0](x), 1)))) < 1e-5

    def test_compiled_in_place(self) -> None:
        model, x = self.small(), torch.randn(2, 3, 4, 4)
        model.compile(backend="eager")
        model[1].compile(backend="eager")
        model(x)
        for inplace in (False, True):
            new = convert(model, "layer", inplace=inplace)
            out = new(x)
            assert distance(out, F.group_norm(new[2](F.group_norm(new[0](x), 1)), 1)) < 1e-5

    def test_a_norm_that_is_itself_compiled_is_left_alone(self) -> None:
        model = nn.Sequential(torch.compile(nn.BatchNorm2d(4), backend="eager"))
        plan = plan_convert(model, "group")
        assert only(plan.skips).name == "0._orig_mod"
        with pytest.warns(UserWarning, match="nothing changed"):
            assert isinstance(convert(model, "group")[0]._orig_mod, nn.BatchNorm2d)


def test_find_lists_what_looks_like_a_norm_and_is_not_known() -> None:
    class MyNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x / x.std() * self.w

    site = only(find(nn.Sequential(MyNorm())))
    assert (site.name, site.norm) == ("0", None)
    assert "no reader for" in str(site.reason)
    assert "MyNorm; teach one with @normswap.reads" in str(site.reason)


def test_names_that_only_sound_like_a_norm() -> None:
    class Normalize(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    class PreNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    assert [site.name for site in find(nn.Sequential(Normalize(), PreNorm()))] == ["1.norm"]


def test_options_reach_only_their_kind_and_are_checked_first() -> None:
    model = network()
    before = picture(model)
    with pytest.raises(NormswapError, match=r"instance_norm: groups=24 does not divide 16 channels"):
        convert(model, "group", groups=24, inplace=True)
    assert before.differences(model) == []


def test_frozen_weights_do_not_train() -> None:
    model = convert(network(), "frozen")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not {name for name in trained if ".bn" in name or "shortcut.1" in name}


def test_model_wide_double_conversion_has_no_residue() -> None:
    model = network()
    new = convert(convert(model, "switchable"), "group")
    assert not [name for name in new.state_dict() if "gate" in name or "running" in name]
    assert list(convert(model, "group").state_dict()) == list(new.state_dict())


def test_copy_of_the_result_shares_nothing_with_the_input() -> None:
    model = network()
    ours = {t.data_ptr() for t in model.state_dict().values()}
    for kind in CHANGING:
        assert not ours & {t.data_ptr() for t in convert(model, kind).state_dict().values()}
    assert not ours & {t.data_ptr() for t in copy.deepcopy(model).state_dict().values()}


def test_public_names() -> None:
    for name in ("find", "convert", "plan_convert", "apply_recipe", "reads", "builds", "kinds"):
        assert callable(getattr(normswap, name))
    assert plan_of(nn.BatchNorm2d(4), "group").operation == "convert to group"
