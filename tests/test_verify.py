"""Verification: equivalent programs pass, small mistakes do not, and the report says what was seen."""

from __future__ import annotations

import copy
import json
import math
import random
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from normswap.errors import NormswapError
from normswap.onnx.export import export
from normswap.verification import Verification, load_inputs, verify
from normswap.verification.criterion import FACTOR, ULPS
from normswap.verification.outputs import flatten
from normswap.verification.reference import Reference, moved
from tests.support import picture, randomise


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        maps = self.bn(self.conv(x)).relu()
        logits = self.head(maps.mean((2, 3)))
        return {"logits": logits, "more": (maps, None), "index": logits.argmax(1)}


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Conv, norm, activation, twice, and a map as output: many values."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6))
    return with_statistics(nn.Sequential(*layers)).to(dtype)


def with_statistics(model: Any) -> Any:
    """``model`` in eval mode, its norms with random statistics and affine; the other layers keep their scale."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            randomise(module)
    return model.eval()


def folded(model: nn.Sequential) -> nn.Sequential:
    first, second = fuse_conv_bn_eval(model[0], model[1]), fuse_conv_bn_eval(model[3], model[4])
    return nn.Sequential(first, nn.ReLU(), second).eval()


def changed(model: nn.Module, change: Callable[[Any], None]) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        change(other)
    return other


def image(dtype: torch.dtype = torch.float32, batch: int = 2) -> tuple[Tensor]:
    return (torch.randn(batch, 3, 9, 9, generator=torch.Generator().manual_seed(3)).to(dtype),)


def eager(reference: nn.Module, candidate: nn.Module, *inputs: Any) -> Verification:
    return verify(reference, candidate, inputs, backend="eager")


class Returns(nn.Module):
    """A model from a function."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


@pytest.fixture(scope="module")
def found() -> Verification:
    """The same model on both sides, by way of ONNX Runtime."""
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = with_statistics(Net())
    return verify(model, copy.deepcopy(model), image())


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network as a file."""
    pytest.importorskip("onnxruntime")
    return export(network(), tmp_path_factory.mktemp("good") / "good.onnx", image(), dynamic=True)


class TestOnnxRuntime:
    def test_the_same_model_is_equivalent_in_every_run(self, found: Verification) -> None:
        assert found, str(found)
        runs = {row.run for row in found.rows}
        assert runs == {"eager", "onnxruntime, graph optimizations off", "onnxruntime"}
        assert {row.output for row in found.rows} == {"logits", "more[0]", "index"}
        assert {(row.run, row.inputs) for row in found.rows} == {(r, v.name) for r in runs for v in found.inputs}
        assert [variation.batch for variation in found.inputs] == [None, None, None, None, 1, 3]

    def test_it_was_not_the_same_arithmetic(self, found: Verification) -> None:
        """The runtime rounds in another order, so a pass is not bit equality in disguise."""
        errors = {run: [] for run in ("eager", "onnxruntime")}  # type: dict[str, list[float]]
        for row in found.rows:
            if row.run in errors and row.output == "more[0]":
                errors[row.run].append(row.relative)
        assert errors["eager"] != errors["onnxruntime"]
        assert 0 < max(errors["onnxruntime"]) < 1e-5

    def test_a_wrong_file_is_not(self, good: Path) -> None:
        model = network()
        assert verify(model, good, image())
        other = changed(model, lambda m: m[4].running_mean.mul_(1.001))
        found = verify(other, str(good), image())
        assert not found
        assert {row.verdict for row in found.rows} == {"different"}
        assert {row.run for row in found.rows} == {"onnxruntime, graph optimizations off", "onnxruntime"}

    def test_a_file_of_one_batch_size(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        onnxruntime = pytest.importorskip("onnxruntime")
        levels: list[Any] = []
        plain = onnxruntime.InferenceSession

        def session(path: str, options: Any, **rest: Any) -> Any:
            levels.append(options.graph_optimization_level)
            return plain(path, options, **rest)

        monkeypatch.setattr(onnxruntime, "InferenceSession", session)
        model = network()
        path = export(model, tmp_path / "a.onnx", image())
        found = verify(model, path, image())
        assert found
        assert {variation.batch for variation in found.inputs} == {None}
        level = onnxruntime.GraphOptimizationLevel
        assert levels == [level.ORT_DISABLE_ALL, level.ORT_ENABLE_ALL]
        with pytest.raises(NormswapError, match=r"takes 1 inputs \(input\) and example_inputs hold 2"):
            verify(nn.Bilinear(9, 9, 2).eval(), path, (torch.ones(1, 9), torch.ones(1, 9)))

    def test_a_candidate_that_fixes_the_batch(self) -> None:
        pytest.importorskip("onnxruntime")
        fixed = Returns(lambda x: x.reshape(2, 3, 9, 9) * 2).eval()
        found = verify(fixed, copy.deepcopy(fixed), image())
        assert found
        assert any("only the given batch size" in note for note in found.notes)
        assert any("batch" in note for note in found.notes)

    def test_files_that_cannot_be_run(self, tmp_path: Path) -> None:
        pytest.importorskip("onnxruntime")
        (tmp_path / "a.onnx").write_text("not one")
        with pytest.raises(NormswapError, match=r"cannot load a\.onnx"):
            verify(network(), tmp_path / "a.onnx", image())
        with pytest.raises(NormswapError, match="does not exist"):
            verify(network(), tmp_path / "absent.onnx", image())
        with pytest.raises(NormswapError, match="backend='onnxruntime'"):
            verify(network(), tmp_path / "a.onnx", image(), backend="eager")

    @pytest.mark.parametrize("role", ["reference", "candidate"])
    def test_train_mode_is_refused(self, role: str) -> None:
        models = {"reference": network(), "candidate": network()}
        models[role][1].train()
        with pytest.raises(NormswapError, match=rf"the {role}.*train mode \(1\)"):
            verify(models["reference"], models["candidate"], image())


class TestCriterion:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_folding_is_equivalent(self, dtype: torch.dtype) -> None:
        model = network(dtype)
        found = eager(model, folded(model), *image(dtype))
        assert found, str(found)
        assert 0 < max(row.relative for row in found.rows) < 64 * torch.finfo(dtype).eps

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        "change",
        [
            lambda m, share: m[1].running_mean[0].add_(share),
            lambda m, share: m[4].weight.mul_(1 + share),
            lambda m, share: m[4].running_var[2].mul_(1 + 2 * share),
            lambda m, share: m[3].bias[1].add_(share * 4),
            lambda m, share: m[0].weight[1].mul_(1 - share),
        ],
    )
    def test_mistakes_of_a_hundred_epsilons_are_seen(self, dtype: torch.dtype, change: Any) -> None:
        model = network(dtype)
        assert not eager(model, changed(model, lambda m: change(m, 300 * torch.finfo(dtype).eps)), *image(dtype))

    def test_the_mistakes_of_other_tools(self) -> None:
        model = network()

        def without_eps(m: Any) -> None:
            m[1].eps = m[4].eps = 0.0

        def shifted(m: Any) -> None:
            m[4].running_var.copy_(m[4].running_var.roll(1))

        def fresh(m: Any) -> None:
            m[1].running_mean.zero_()

        for mistake in (without_eps, shifted, fresh):
            assert not eager(model, changed(model, mistake), *image()), mistake.__name__
        assert not eager(model, nn.Sequential(*folded(model)[:2], model[3]), *image())

    def test_numbers(self) -> None:
        """One linear layer whose error is known."""
        model = nn.Linear(3, 200, bias=False).eval()
        other = changed(model, lambda m: m.weight.mul_(1.5))
        x = torch.randn(4, 3)
        (row, *_) = eager(model, other, x).rows
        with torch.no_grad():
            truth = x.double() @ model.weight.double().t()
            got = other(x).double()
            noise = float((model(x).double() - truth).abs().max())
        scale = float(truth.abs().max())
        assert row.inputs == "given"
        assert row.shape == (4, 200)
        assert row.dtype == "float32"
        assert row.max_abs == pytest.approx(float((got - truth).abs().max()))
        assert row.noise == pytest.approx(noise, rel=0.5)  # One addition may round otherwise for other shapes.
        assert row.scale >= scale
        assert row.relative == pytest.approx(row.max_abs / row.scale)
        assert row.sqnr == pytest.approx(-20 * math.log10(0.5), abs=1e-3)
        assert row.agreement == 1.0
        assert row.floor is not None
        assert row.allowed >= FACTOR * row.floor + ULPS * 2**-23 > 0

    def test_float64_floor_is_that_of_float32_scaled(self) -> None:
        single = eager(network(), network(), *image()).rows[0]
        double = eager(network(torch.float64), network(torch.float64), *image(torch.float64)).rows[0]
        assert single.floor is not None
        assert double.floor == pytest.approx(single.floor * 2**-29, rel=0.5)

    def test_few_values_do_not_fail_by_luck(self) -> None:
        """With one value, the reference's error may be zero, or the value itself near zero."""
        x = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
        x -= x.mean()
        assert abs(float(x.sum())) < 1e-4
        assert eager(Returns(lambda x: x.sum(1)), Returns(lambda x: x.flip(1).sum(1)), x)
        for seed in range(30):
            torch.manual_seed(seed)
            model = with_statistics(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 1)))
            other = nn.Sequential(fuse_conv_bn_eval(model[0], model[1]), *model[2:]).eval()
            found = eager(model, other, torch.randn(1, 3, 3, 3))
            assert found, f"seed {seed}: {found}"

    def test_a_floor_that_is_low_by_luck_is_lifted(self) -> None:
        """The sum is exact on the given values alone; its error on all others is magnified by the sine."""
        x = torch.tensor([[0.5, 0.25, 0.75, 0.125]])
        found = eager(
            Returns(lambda x: ((x + 3.9 - 3.9) * 1000).sin()), Returns(lambda x: ((x + 7.9 - 7.9) * 1000).sin()), x
        )
        given = found.rows[0]
        assert given.floor is not None
        assert FACTOR * given.floor + ULPS * 2**-23 < given.relative
        assert found

    def test_one_lucky_run_is_not_the_floor(self) -> None:
        """The reference's sums are exact by the last bits of its weights; one rounding away they are not."""

        class Sum(nn.Module):
            def __init__(self, weight: float) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.full((100,), weight))

            def forward(self, x: Tensor) -> Tensor:
                return ((x + self.weight - self.weight) * 1000).sin()

        lucky = float(torch.tensor(3.9).view(torch.int32).bitwise_and(-2).view(torch.float32))
        x = (torch.rand(4, 100) * 8).round() / 8
        found = verify(Sum(lucky), Sum(7.9), (x,), backend="eager", vary=False)
        assert found, str(found)
        (row,) = found.rows
        assert row.floor is not None
        assert 1e-5 < row.floor < 1e-3
        assert any("given: the reference's own error there is low by luck" in note for note in found.notes)
        (row,) = verify(Sum(lucky), Sum(lucky), (x,), backend="eager", vary=False).rows
        assert (row.floor or 0) < 1e-6, "only what is over its floor is looked at"
        assert not verify(Sum(lucky), Returns(lambda x: (x * 1000.1).sin()), (x,), backend="eager", vary=False)

    def test_the_samples_of_rounding(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
        given = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for name, tensor in moved(copy.deepcopy(model), 0).state_dict().items():
            if name == "0.weight":
                off = (tensor - given[name]).abs()
                assert 0 < float((off > 0).double().mean()) < 1
                assert bool((off <= 2**-22 * given[name].abs()).all())
            elif name.startswith("1."):
                assert torch.equal(tensor, given[name]), "whole numbers may be positions"
        seen: list[int] = []
        monkeypatch.setattr(Reference, "nearby", lambda self, answers, inputs: (seen.append(1), answers)[1])
        faulty = changed(model, lambda m: m[0].weight.mul_(1.01))
        assert not eager(model, faulty, torch.randn(2, 3, 9, 9))
        assert len(seen) == 1, "one set of inputs that stays different is enough"
        assert not verify(model, faulty, (torch.randn(2, 3, 9, 9),), backend="eager", atol=1e-9)
        assert eager(model, copy.deepcopy(model), torch.randn(2, 3, 9, 9))
        assert len(seen) == 1

    def test_random_outputs_prove_nothing(self) -> None:
        model = Returns(lambda x: x + torch.rand(x.shape, dtype=x.dtype))
        found = eager(model, model, torch.randn(4, 100))
        assert not found
        assert "random or chaotic" in str(found)
        assert {row.verdict for row in found.rows} == {"inconclusive"}

    def test_zeros_prove_nothing(self) -> None:
        found = eager(Returns(lambda x: x * 0), Returns(lambda x: x * 0), torch.randn(4, 100))
        assert not found
        assert "all zero" in str(found)
        found = eager(Returns(lambda x: (x, x * 0)), Returns(lambda x: (x, x * 0)), torch.randn(4, 100))
        assert found
        assert any("output[1] is all zero" in note for note in found.notes)

    def test_overflow_everywhere_proves_nothing(self) -> None:
        found = eager(Returns(lambda x: x / 0), Returns(lambda x: x / 0), torch.rand(4, 100) + 1)
        assert not found
        assert {row.verdict for row in found.rows if row.inputs == "given"} == {"inconclusive"}
        assert "no value of the reference is finite" in str(found)

    def test_a_small_change_of_all_values(self) -> None:
        """The largest error hides it: it is not far from the largest rounding error, but everywhere."""
        x = torch.randn(8, 4000, generator=torch.Generator().manual_seed(0))
        found = eager(Returns(torch.sin), Returns(lambda x: x.sin() * (1 + 3.5 * 2**-23)), x)
        assert not found
        assert {row.measure for row in found.rows if row.verdict == "different"} == {"mean"}

    def test_one_wrong_channel_among_large_ones(self) -> None:
        model = nn.Conv2d(3, 40, 1, bias=False).eval()
        with torch.no_grad():
            model.weight[17].mul_(1e-5)
        other = changed(model, lambda m: m.weight[17].neg_())
        floors = eager(model, copy.deepcopy(model), torch.randn(2, 3, 9, 9))
        assert floors
        found = eager(model, other, torch.randn(2, 3, 9, 9))
        assert not found
        assert {row.measure for row in found.rows if row.verdict == "different"} == {"channel 17"}
        assert "(channel 17)" in str(found)

    def test_integers_and_booleans(self) -> None:
        model = Returns(lambda x: (x > 0, x.argsort(1)))
        x = torch.randn(4, 100)
        assert eager(model, model, x)
        found = eager(model, Returns(lambda x: (x > 0.1, x.argsort(1))), x)
        assert not found
        assert {row.output for row in found.rows if row.verdict == "different"} == {"output[0]"}

    def test_values_that_are_not_finite(self) -> None:
        def logarithm(x: Tensor) -> Tensor:
            return torch.where(x > 1, x.log(), -math.inf)

        x = torch.arange(-50.0, 50.0)
        assert eager(Returns(logarithm), Returns(logarithm), x)
        for wrong in (lambda x: logarithm(x).nan_to_num(), lambda x: torch.where(x > 40, math.nan, logarithm(x))):
            found = eager(Returns(logarithm), Returns(wrong), x)
            assert not found
            assert "non-finite values differ" in str(found)
            assert found.rows[0].non_finite > 0

    def test_overflow_of_the_dtype_is_not_a_difference(self) -> None:
        model = Returns(lambda x: x * 1000)
        x = torch.linspace(-100, 100, 80).half()
        assert eager(model, model, x)
        for wrong in (math.nan, -math.inf):
            found = eager(model, Returns(lambda x, wrong=wrong: (x * 1000).where(x * 1000 < math.inf, wrong)), x)
            assert not found
            assert found.rows[0].non_finite > 0

    def test_other_shapes_dtypes_and_outputs(self) -> None:
        x = torch.randn(4, 100)
        model = Returns(lambda x: {"a": x, "b": x + 1})
        for wrong, words in (
            (lambda x: {"a": x[:, :50], "b": x + 1}, "shape (4, 50) instead of (4, 100)"),
            (lambda x: {"a": x.double(), "b": x + 1}, "torch.float64 instead of torch.float32"),
            (lambda x: {"a": x}, "candidate does not have this output"),
            (lambda x: {"a": x, "b": x + 1, "c": x}, "reference does not have this output"),
            (lambda x: {"a": None, "b": x + 1}, "None instead of a tensor of shape (4, 100)"),
            (lambda x: {"a": x, "b": x.reshape(3, -1)}, "failed: RuntimeError"),
        ):
            found = eager(model, Returns(wrong), x)
            assert not found
            assert words in str(found)

    def test_a_candidate_that_fails_for_another_batch_is_different(self) -> None:
        found = eager(Returns(lambda x: x * 2), Returns(lambda x: x.reshape(4, 100) * 2), torch.randn(4, 100))
        assert not found
        assert all(("batch" in row.inputs) == (row.problem is not None) for row in found.rows)


class TestTolerances:
    def test_replace_the_criterion(self) -> None:
        model = nn.Linear(50, 100).eval()
        other, x = changed(model, lambda m: m.bias.add_(1e-3)), torch.randn(4, 50)
        assert not eager(model, other, x)
        found = verify(model, other, (x,), backend="eager", atol=2e-3)
        assert found
        assert {row.measure for row in found.rows} == {"tolerance"}
        assert max(row.excess for row in found.rows) == pytest.approx(0.5, rel=0.1)
        assert found.rows[0].allowed is None
        assert "atol (0.002)" in found.criterion
        assert not verify(model, other, (x,), backend="eager", atol=5e-4)
        scaled = changed(model, lambda m: (m.weight.mul_(1.01), m.bias.mul_(1.01)))
        assert verify(model, scaled, (x,), backend="eager", rtol=0.011, atol=1e-5)
        assert not verify(model, scaled, (x,), backend="eager", rtol=0.009, atol=1e-5)

    def test_by_output(self) -> None:
        model = Returns(lambda x: {"a": x.sin(), "b": x.cos()})
        other = Returns(lambda x: {"a": x.sin() + 1e-3, "b": x.cos()})
        x = torch.randn(4, 100)
        found = verify(model, other, (x,), backend="eager", atol={"a": 2e-3})
        assert found
        assert {row.output: row.measure for row in found.rows}["a"] == "tolerance"
        assert {row.output: row.measure for row in found.rows}["b"] != "tolerance"
        assert "where neither is given" in found.criterion
        assert not verify(model, other, (x,), backend="eager", atol={"b": 2e-3})

    @pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf, "1", True, {"output": -1}])
    def test_misuse(self, wrong: Any) -> None:
        with pytest.raises(NormswapError, match=r"atol is .*at least 0"):
            verify(nn.ReLU(), nn.ReLU(), (torch.ones(1),), backend="eager", atol=wrong)
        with pytest.raises(NormswapError, match="rtol names the output 'logits'; there is: output"):
            verify(nn.ReLU(), nn.ReLU(), (torch.ones(1),), backend="eager", rtol={"logits": 1.0})


class TestPrograms:
    def test_exported_programs(self, tmp_path: Path) -> None:
        model = network()
        program = torch.export.export(model, image(), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.export.save(program, tmp_path / "a.pt2")
        for candidate in (program, tmp_path / "a.pt2", str(tmp_path / "a.pt2")):
            assert verify(model, candidate, image(), backend="eager")
        other = changed(model, lambda m: m[4].running_mean.mul_(1.01))
        assert not verify(other, program, image(), backend="eager")
        found = verify(tmp_path / "a.pt2", other, image(), backend="eager")
        assert not found
        assert "noise floors" in found.criterion  # a program runs in float64 too

    @pytest.mark.parametrize("swapped", [False, True])
    def test_a_program_of_one_batch_size(self, swapped: bool) -> None:
        class Grid(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.reshape(x.shape[0], 5, 10)

        x = torch.randn(4, 50)
        program = torch.export.export(Grid().eval(), (x,))
        sides = (program, Grid().eval()) if swapped else (Grid().eval(), program)
        found = verify(*sides, (x,), backend="eager")
        assert found, str(found)
        assert [variation.batch for variation in found.inputs] == [None] * 4

    def test_only_what_is_compiled_is_unwrapped(self) -> None:
        class Wrapper(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self._orig_mod = inner

            def forward(self, x: Tensor) -> Tensor:
                out: Tensor = self._orig_mod(x)
                return out + 1

        model = network()
        assert not eager(model, Wrapper(model).eval(), *image())
        compiled = copy.deepcopy(model)
        compiled.compile(backend="eager")
        for other in (torch.compile(model, backend="eager"), compiled):
            found = eager(model, other, *image())
            assert found
            assert any("the candidate is compiled; the code it was compiled from is" in note for note in found.notes)
        assert not any("compiled" in note for note in eager(model, model, *image()).notes)

    def test_damaged_and_absent_programs(self, tmp_path: Path) -> None:
        (tmp_path / "a.pt2").write_text("not one")
        with pytest.raises(NormswapError, match=r"a\.pt2"):
            verify(network(), tmp_path / "a.pt2", image(), backend="eager")
        with pytest.raises(NormswapError, match="does not exist"):
            verify(network(), tmp_path / "absent.pt2", image(), backend="eager")

    def test_two_files(self, good: Path, tmp_path: Path) -> None:
        onnx = pytest.importorskip("onnx")
        model = network()
        second = export(model, tmp_path / "b.onnx", image(), dynamic=True, optimize=False)
        found = verify(good, second, image())
        assert found
        assert "good.onnx is a file that runs in its own dtype only" in found.criterion
        wrong = changed(model, lambda m: m[4].running_mean.mul_(1.01))
        assert verify(good, model, image(), backend="eager")
        assert not verify(good, wrong, image(), backend="eager")
        proto = onnx.load(second)
        (mean,) = (value for value in proto.graph.initializer if value.name == "4.running_mean")
        mean.CopyFrom(onnx.numpy_helper.from_array(wrong[4].running_mean.numpy(), mean.name))
        onnx.save(proto, tmp_path / "c.onnx")
        assert not verify(good, tmp_path / "c.onnx", image())

    def test_open_sizes_are_tried(self, tmp_path: Path) -> None:
        pytest.importorskip("onnxruntime")
        model, dim = network(), torch.export.Dim
        shapes = {"input": {0: dim("batch"), 2: dim("height", min=6), 3: dim("width", min=6)}}
        path = export(model, tmp_path / "a.onnx", image(), dynamic=shapes)
        found = verify(model, path, image())
        assert found
        assert [variation.size for variation in found.inputs] == [None] * 6 + [0.75, 1.25]
        assert {row.shape[2:] for row in found.rows} == {(5, 5), (3, 3), (7, 7)}


class Upcasting(nn.Module):
    """A norm that works in float32 whatever it is given, with tensors that are no buffers and one reading of bits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 200)
        self.table = {"mix": torch.randn(width, width)}
        self.register_buffer("bits", torch.tensor([1.5]).view(torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        wide = (x @ self.table["mix"]).to(torch.float32)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        out: Tensor = self.inner(wide.to(x.dtype)) * self.bits.view(torch.float32)
        return out + torch.mv(out, torch.tensor([0.5] * 200, dtype=torch.float32)).unsqueeze(1)


class TestTruth:
    def test_casts_in_the_forward_do_not_lower_it(self) -> None:
        """The float64 run keeps to float64 where the code asks for float32, or its error would hide in the floor."""
        model, x = Upcasting(16).eval(), torch.randn(4, 16)
        (row, *_) = eager(model, changed(model, lambda m: m.inner.weight.mul_(2)), x).rows
        with torch.no_grad():
            wide = x.double() @ model.table["mix"].double()
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
            truth = (wide @ model.inner.weight.double().t() + model.inner.bias.double()) * 1.5
            truth = truth + truth.sum(1, keepdim=True) / 2
            noise = float((model(x).double() - truth).abs().max())
        assert row.noise == pytest.approx(noise, rel=1e-3)

    def test_half_precision_is_not_random_when_cast_to_float32(self) -> None:
        class Deep(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(40))

            def forward(self, x: Tensor) -> Tensor:
                for layer in self.layers:
                    x = x + layer(x).relu()
                return x.float()

        torch.manual_seed(0)
        model, x = Deep().eval().bfloat16(), torch.randn(8, 64).bfloat16()
        found = eager(model, copy.deepcopy(model), x)
        assert max(row.floor or 0.0 for row in found.rows) > 2 ** (-23 / 3)
        assert {row.verdict for row in found.rows} == {"equivalent"}, str(found)
        assert not eager(model, changed(model, lambda m: m.layers[-1].weight.mul_(1.3)), x)

    def test_complex_parameters_and_inputs(self) -> None:
        """They stay complex in the float64 run, and are as wide as it."""

        class Spectral(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(51, 51, dtype=torch.complex64))

            def forward(self, x: Tensor, shift: Tensor) -> Tensor:
                return torch.fft.irfft((torch.fft.rfft(x) + shift).to(torch.complex64) @ self.weight, n=100)

        model, x = Spectral().eval(), (torch.randn(4, 100), torch.randn(51, dtype=torch.complex64))
        found = eager(model, copy.deepcopy(model), *x)
        assert found, str(found)
        assert all(0 < (row.floor or 0.0) < 1e-5 for row in found.rows)
        assert not eager(model, changed(model, lambda m: m.weight.imag.mul_(1.0001)), *x)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_an_output_cast_to_float64_keeps_its_noise(self, dtype: torch.dtype) -> None:
        """Its floor is the error that the reference makes in float32, not that of a computation in float64."""

        class Late(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: Tensor) -> Tensor:
                out: Tensor = self.inner(x)
                return out.float().double() * 2

        model = network(dtype)
        found = eager(Late(model).eval(), Late(folded(model)).eval(), *image(dtype))
        assert found, str(found)
        assert {row.dtype for row in found.rows} == {"float64"}
        other = changed(model, lambda m: m[4].running_mean[0].add_(1e-4))
        assert not eager(Late(model).eval(), Late(other).eval(), *image(dtype))

    def test_without_a_float64_run(self) -> None:
        def single(x: Tensor) -> Tensor:
            if x.dtype != torch.float32:
                raise TypeError("float32 only")
            return x.exp()

        x = torch.randn(4, 100)
        found = eager(Returns(single), Returns(single), x)
        assert found
        assert "eps^(2/3)" in found.criterion
        assert any("does not run in float64 (TypeError: float32 only)" in note for note in found.notes)
        assert [row.allowed for row in found.rows] == pytest.approx([2 ** (-23 * 2 / 3)] * 6)
        assert {row.floor for row in found.rows} == {None}
        assert eager(Returns(single), Returns(lambda x: single(x) * (1 + 1e-5)), x)
        assert not eager(Returns(single), Returns(lambda x: single(x) * (1 + 1e-4)), x)

    def test_inputs_the_reference_does_not_take_are_left_out(self) -> None:
        def positive(x: Tensor) -> Tensor:
            if x.min() < 0:
                raise ValueError("negative")
            return x.sqrt()

        found = eager(Returns(positive), Returns(positive), torch.rand(4, 100))
        assert found
        assert found.inputs[0].name == "given"
        assert len(found.inputs) < 6
        assert any("left out, the reference does not take them (ValueError: negative)" in note for note in found.notes)
        with pytest.raises(NormswapError, match="reference Returns fails on example_inputs: ValueError: negative"):
            eager(Returns(positive), Returns(positive), -torch.rand(4, 100))
        data = [(torch.rand(4, 100),), (-torch.rand(4, 100),)]
        with pytest.raises(NormswapError, match=r"reference Returns fails on data \[1\]: ValueError: negative"):
            verify(Returns(positive), Returns(positive), data[0], backend="eager", data=data)

    def test_outputs_that_are_never_finite_everywhere(self) -> None:
        """A mask of infinities is no reason to try nothing but the given inputs."""

        def masked(x: Tensor) -> Tensor:
            return x.masked_fill(torch.arange(100) < 3, -math.inf)

        x = torch.randn(4, 100)
        assert len(eager(Returns(masked), Returns(masked), x).inputs) == 6
        assert not eager(Returns(masked), Returns(lambda x: masked(x.clamp(max=8.0))), x)


class TestInputs:
    def test_are_varied_and_recorded(self) -> None:
        seen: list[Tensor] = []

        def watch(x: Tensor) -> Tensor:
            seen.append(x.clone())
            return x * 2

        x = torch.randn(2, 50) * 3 + 5
        found = eager(Returns(lambda x: x * 2), Returns(watch), x)
        assert torch.equal(seen[0], x)
        assert [tuple(value.shape) for value in seen] == [(2, 50)] * 4 + [(1, 50), (3, 50)]
        assert [variation.seed for variation in found.inputs] == [None, 0, 1, 2, 3, 4]
        ratios = [float(value.std() / x.std()) for value in seen[1:4]]
        assert ratios == pytest.approx([1, 0.1, 10], rel=0.3)
        assert float(seen[1].mean()) == pytest.approx(float(x.mean()), rel=0.3)
        first = [value.clone() for value in seen]
        seen.clear()
        eager(Returns(lambda x: x * 2), Returns(watch), x)
        assert all(torch.equal(a, b) for a, b in zip(first, seen, strict=True))

    def test_constant_inputs_are_replaced_by_random_ones(self) -> None:
        """Zeros, the laziest example input, hide every scale."""
        model = nn.Linear(3, 100).eval()
        assert not eager(model, changed(model, lambda m: m.weight.mul_(2)), torch.zeros(2, 3))

    def test_integers_keep_their_values(self) -> None:
        model = nn.Embedding(4, 50).eval()
        found = eager(model, copy.deepcopy(model), torch.tensor([[0, 3], [1, 2]]))
        assert found
        assert [variation.batch for variation in found.inputs] == [None, 1, 3]
        assert any("no input is floating-point" in note for note in found.notes)

    def test_nested_inputs_and_constants(self) -> None:
        class Several(nn.Module):
            def forward(self, x: Tensor, options: dict[str, Any], pair: list[Tensor]) -> Tensor:
                return x * options["scale"] + pair[0] - pair[1]

        inputs = (torch.randn(2, 50), {"scale": 3, "name": "a"}, [torch.randn(2, 50), torch.randn(2, 1)])
        assert eager(Several(), Several(), *inputs)


class TestData:
    @pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
    def test_files(self, suffix: str, tmp_path: Path) -> None:
        x, y = torch.randn(3, 50), torch.randn(3, 50)
        path = tmp_path / f"data{suffix}"
        if suffix == ".npy":
            numpy.save(path, x.numpy())
            wanted = [(x,)]
        elif suffix == ".npz":
            numpy.savez(path, second=x.numpy(), first=y.numpy())
            wanted = [(x, y)]
        else:
            torch.save([(x, y), (y, x)], path)
            wanted = [(x, y), (y, x)]
        found = load_inputs(path)
        assert [name.startswith(f"data{suffix}") for name, _ in found] == [True] * len(wanted)
        for (_, got), expected in zip(found, wanted, strict=True):
            assert isinstance(got, tuple)
            assert all(map(torch.equal, got, expected))

    def test_is_compared_beside_the_example(self, tmp_path: Path) -> None:
        """A fault that only real data show."""
        model = Returns(lambda x: x.clamp(max=50.0))
        x = torch.randn(4, 100)
        numpy.save(tmp_path / "a.npy", (x * 100).numpy())
        other = Returns(lambda x: x)
        assert eager(model, other, x)
        found = verify(model, other, (x,), backend="eager", data=tmp_path / "a.npy")
        assert not found
        assert {row.inputs for row in found.rows if row.verdict == "different"} == {"a.npy"}
        assert not verify(model, other, (x,), backend="eager", data=[(x * 100,)])
        alone = verify(model, other, data=tmp_path / "a.npy", backend="eager", vary=False)
        assert [variation.name for variation in alone.inputs] == ["given"]
        assert not alone

    def test_misuse(self, tmp_path: Path) -> None:
        (tmp_path / "a.npz").write_bytes(b"PK not one")
        numpy.save(tmp_path / "o.npy", numpy.array([{}], dtype=object))
        torch.save([], tmp_path / "empty.pt")
        for name, words in (
            ("a.txt", "inputs are read from"),
            ("a.npz", r"a\.npz cannot be read as inputs"),
            ("absent.npy", r"absent\.npy cannot be read"),
            ("o.npy", r"o\.npy cannot be read"),
            ("empty.pt", r"empty\.pt holds no inputs"),
        ):
            with pytest.raises(NormswapError, match=words):
                load_inputs(tmp_path / name)
        with pytest.raises(NormswapError, match="nothing to run on"):
            verify(nn.ReLU(), nn.ReLU(), backend="eager")


class TestNothingChanges:
    def test_models_inputs_and_random_state(self) -> None:
        class Caching(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.bn = nn.BatchNorm1d(50)
                self.cache: dict[str, Tensor] = {}

            def forward(self, x: Tensor) -> Tensor:
                x.mul_(2)
                self.cache["x"] = x
                out: Tensor = self.bn(x)
                return nn.functional.dropout(out, 0.5, self.training)

        reference, candidate = randomise(Caching()), randomise(Caching())
        before = picture(reference), picture(candidate)
        x = torch.randn(4, 50)
        kept, state = x.clone(), torch.get_rng_state()
        verify(reference.train(), candidate.train(), (x,), backend="eager")
        assert before[0].differences(reference) == before[1].differences(candidate) == []
        assert reference.cache == candidate.cache == {}
        assert torch.equal(x, kept)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.get_default_dtype() == torch.float32

    def test_random_states_of_python_and_numpy(self) -> None:
        """They are put back, and both sides draw the same."""

        def drawing(x: Tensor) -> Tensor:
            return x * random.random() + float(numpy.random.rand())

        def state() -> str:
            return repr((random.getstate(), numpy.random.get_state()))

        before = state()
        assert eager(Returns(drawing), Returns(drawing), torch.randn(4, 100))
        assert not eager(Returns(drawing), Returns(lambda x: drawing(x) * 2), torch.randn(4, 100))
        assert state() == before

    def test_draws_do_not_depend_on_the_callers_seed(self) -> None:
        drawn = []

        def draw(x: Tensor) -> Tensor:
            drawn.append(float(torch.rand(())))
            return x

        for seed in (1, 2):
            torch.manual_seed(seed)
            eager(Returns(lambda x: x), Returns(draw), torch.randn(4, 100))
        assert len(drawn) == 12
        assert len(set(drawn)) == 1

    def test_train_mode_is_compared_and_noted(self) -> None:
        model = network().train()
        found = eager(model, copy.deepcopy(model), *image(batch=4))
        assert found, str(found)
        assert any("the reference is compared in train mode (the model itself; 6 modules" in n for n in found.notes)
        assert not eager(model, copy.deepcopy(model).eval(), *image(batch=4))


class TestReport:
    def test_text_and_json(self) -> None:
        model = network()
        for candidate, verdict in ((folded(model), "equivalent"), (changed(model, lambda m: m[4].bias.add_(1)), "NOT")):
            found = eager(model, candidate, *image())
            text = str(found)
            assert text.startswith(verdict)
            assert found.criterion in text
            assert "seed 2, magnitude 10" in text
            assert ("times the allowed error" in text) == (not found)
            record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
            assert record["equivalent"] is bool(found)
            assert len(record["rows"]) == len(found.rows) == 6
            named = {"name": "seed 0, magnitude 1", "seed": 0, "magnitude": 1.0, "batch": None, "size": None}
            assert record["inputs"][1] == named
            assert record["rows"][0]["output"] == "output"

    def test_numbers_that_json_lacks(self) -> None:
        found = eager(Returns(lambda x: x), Returns(lambda x: x), torch.randn(2, 50))
        assert found.rows[0].sqnr == math.inf
        assert found.to_dict()["rows"][0]["sqnr"] is None


@dataclass
class Box:
    size: Tensor
    label: str


Point = namedtuple("Point", "x y")


class TestFlatten:
    def test_names(self) -> None:
        t = torch.ones(1)
        assert list(flatten(t)) == ["output"]
        assert list(flatten((t, [t, None]))) == ["output[0]", "output[1][0]", "output[1][1]"]
        nested = {"a": t, "b": {"c": [t]}, "box": Box(t, "cat"), "point": Point(t, t)}
        assert list(flatten(nested)) == ["a", "b.c[0]", "box.size", "box.label", "point.x", "point.y"]
        assert flatten(nested)["box.label"] == "cat"
        assert list(flatten([{"boxes": t}, {"boxes": t}])) == ["output[0].boxes", "output[1].boxes"]

    def test_leaves(self) -> None:
        assert torch.equal(flatten(0.5)["output"], torch.tensor(0.5))
        assert torch.equal(flatten(numpy.arange(3))["output"], torch.arange(3))
        assert flatten(None) == {"output": None}
        assert flatten(torch.eye(2).to_sparse())["output"].layout == torch.strided

    def test_other_leaves_are_compared_or_named(self) -> None:
        x = torch.randn(2, 50)
        found = eager(Returns(lambda x: (x, 3, "a", {1})), Returns(lambda x: (x, 3, "a", {2})), x)
        assert found
        assert "output[3] is a set, which is not compared" in found.notes
        assert not eager(Returns(lambda x: (x, x.numpy() * 2)), Returns(lambda x: (x, x.numpy() * 3)), x)
        found = eager(Returns(lambda x: (x, 3)), Returns(lambda x: (x, 4)), x)
        assert "4 instead of 3" in str(found)
        assert not eager(Returns(lambda x: None), Returns(lambda x: None), x)


class TestMisuse:
    @pytest.mark.parametrize(
        ("arguments", "options", "words"),
        [
            ((nn.ReLU(), nn.ReLU(), (torch.ones(1),)), {"backend": "tensorrt"}, "onnxruntime, eager"),
            ((nn.ReLU(), nn.ReLU(), torch.ones(1)), {}, "example_inputs is a Tensor"),
            ((torch.relu, nn.ReLU(), (torch.ones(1),)), {}, "expected an nn.Module"),
            ((nn.ReLU(), torch.relu, (torch.ones(1),)), {}, "expected an nn.Module"),
            ((nn.Linear(3, 2), nn.Linear(3, 2), (torch.ones(1),)), {"backend": "eager"}, "reference Linear fails"),
        ],
    )
    def test_says_what(self, arguments: Any, options: Any, words: str) -> None:
        with pytest.raises(NormswapError, match=words):
            verify(*arguments, **options)
