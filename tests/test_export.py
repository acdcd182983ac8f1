"""Export: what the file holds, that the model stays as it was, and what is refused in which words."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from normswap.errors import NormswapError
from normswap.onnx.export import export, isolated, quiet, training_modules
from tests.support import picture, randomise

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Net(nn.Module):
    """With a cache that a forward in eval mode fills, as timm's LeViT has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor, scale: float = 2.0, more: Tensor | None = None) -> dict[str, Any]:
        if "bias" not in self.cache:
            self.cache["bias"] = self.conv.bias * 2
        y = self.bn(self.conv(x)) * scale + self.cache["bias"][:, None, None]
        if more is not None:
            y = y + more.mean()
        return {"map": y, "nested": (y.mean((2, 3)), None)}


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(2.0)[:, None, None]


def net() -> nn.Module:
    return randomise(Net()).eval()


def run(path: Path, *values: Tensor) -> list[Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return list(session.run(None, dict(zip(names, (value.numpy() for value in values), strict=True))))


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def axes(path: Path) -> list[list[int | str]]:
    graph = onnx.load(path).graph
    return [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.input]


def test_the_file_computes_what_the_model_does_and_the_model_stays(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = net()
    handle = model.bn.register_forward_hook(lambda module, args, out: out + 1)
    model.conv.weight.requires_grad_(False)
    x, more = torch.randn(2, 3, 6, 6), torch.randn(5)
    before, state = picture(model), torch.get_rng_state()
    path = export(model, tmp_path / "a.onnx", (x, 3.0, more), optimize=False)
    assert before.differences(model) == []
    assert model.cache == {}
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []

    assert path == tmp_path / "a.onnx"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.onnx"]
    assert operators(path).count("BatchNormalization") == 1
    with torch.no_grad():
        expected = model(x, 3.0, more)
    first, second = run(path, x, more)
    torch.testing.assert_close(torch.from_numpy(first), expected["map"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(second), expected["nested"][0], rtol=1e-4, atol=1e-4)
    handle.remove()


def test_existing_file_and_opset(tmp_path: Path) -> None:
    path, x = tmp_path / "a.onnx", torch.randn(2, 3)
    path.write_text("old")
    with pytest.raises(NormswapError, match=r"a\.onnx exists.*--force"):
        export(nn.Linear(3, 2).eval(), path, (x,))
    assert path.read_text() == "old"
    export(nn.Linear(3, 2).eval(), path, (x,), opset=21, force=True)
    assert {entry.domain: entry.version for entry in onnx.load(path).opset_import}[""] == 21


def test_an_opset_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(NormswapError, match=r"opset|exporter") as caught:
        export(nn.Linear(3, 2).eval(), tmp_path / "a.onnx", (torch.randn(2, 3),), opset=3)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


class TestDynamic:
    def test_one_batch_axis_by_name(self, tmp_path: Path) -> None:
        class Two(nn.Module):
            def forward(self, x: Tensor, *more: Tensor) -> Tensor:
                return x + more[0].sum(1)

        path = export(Two().eval(), tmp_path / "a.onnx", (torch.randn(1, 3), torch.randn(1, 4, 3)), dynamic=True)
        assert axes(path) == [["batch", 3], ["batch", 4, 3]]
        x, y = torch.randn(5, 3), torch.randn(5, 4, 3)
        torch.testing.assert_close(torch.from_numpy(run(path, x, y)[0]), x + y.sum(1))

    def test_constants_unused_inputs_and_a_dict_in_last_place(self, tmp_path: Path) -> None:
        class Options(nn.Module):
            def forward(self, x: Tensor, times: int, unused: Tensor, options: dict[str, Tensor]) -> Tensor:
                return x * times * options["scale"]

        inputs = (torch.randn(2, 3), 3, torch.randn(2, 5), {"scale": torch.randn(2, 1)})
        path = export(Options().eval(), tmp_path / "a.onnx", inputs, dynamic=True)
        assert axes(path) == [["batch", 3], ["batch", 5], ["batch", 1]]
        assert [d.dim_param or d.dim_value for d in onnx.load(path).graph.output[0].type.tensor_type.shape.dim] == [
            "batch",
            3,
        ]

    def test_shapes_as_torch_names_them(self, tmp_path: Path) -> None:
        shapes = {"input": {1: torch.export.Dim("length", max=64)}}
        path = export(nn.ReLU().eval(), tmp_path / "a.onnx", (torch.randn(2, 3),), dynamic=shapes)
        assert axes(path) == [[2, "length"]]

    def test_an_axis_that_the_code_fixes_is_refused(self, tmp_path: Path) -> None:
        x = torch.randn(2, 3, 4)
        with pytest.raises(NormswapError, match=r"batch|exporter") as caught:
            export(FixedBatch().eval(), tmp_path / "a.onnx", (x,), dynamic=True)
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []
        assert axes(export(FixedBatch().eval(), tmp_path / "a.onnx", (x,))) == [[2, 3, 4]]

    def test_an_axis_that_the_exporter_fixes_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = torch.onnx.export
        monkeypatch.setattr(
            torch.onnx, "export", lambda *args, **options: plain(*args, **{**options, "dynamic_shapes": None})
        )
        with pytest.raises(NormswapError, match="fixed the batch axis of input 'input' at 2"):
            export(nn.ReLU().eval(), tmp_path / "a.onnx", (torch.randn(2, 3),), dynamic=True)
        assert list(tmp_path.iterdir()) == []


class TestTrainMode:
    def test_names_the_modules(self, tmp_path: Path) -> None:
        model = net()
        model.bn.train()
        with pytest.raises(NormswapError, match=r"train mode \(bn\).*model\.eval\(\)"):
            export(model, tmp_path / "a.onnx", (torch.randn(2, 3, 6, 6),))
        with pytest.raises(NormswapError, match=r"the model itself \(Net\), conv, bn"):
            export(model.train(), tmp_path / "a.onnx", (torch.randn(2, 3, 6, 6),))
        assert list(tmp_path.iterdir()) == []

    def test_flags_that_say_nothing(self) -> None:
        model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
        assert training_modules(torch.export.export(model, (torch.randn(2, 3),)).module()) == []
        outer = nn.Sequential(nn.Module(), model).eval()
        outer[0].train()
        assert training_modules(outer) == []
        model[1].train()
        assert training_modules(outer) == ["1.1"]


class TestRefused:
    @pytest.mark.parametrize(
        ("model", "inputs", "words"),
        [
            (nn.ReLU().eval(), [torch.ones(1)], "example_inputs is a list"),
            (nn.ReLU().eval(), torch.ones(1), "example_inputs is a Tensor"),
            (torch.relu, (torch.ones(1),), "expected an nn.Module"),
            (Branching().eval(), (torch.ones(2),), "cannot translate Branching: .*data-dependent"),
            (nn.Linear(3, 2).eval(), (torch.ones(2, 5),), "cannot translate Linear: "),
        ],
    )
    def test_in_one_line(self, tmp_path: Path, model: Any, inputs: Any, words: str) -> None:
        with pytest.raises(NormswapError, match=words) as caught:
            export(model, tmp_path / "a.onnx", inputs)
        assert "\n" not in str(caught.value)
        assert "\x1b" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    def test_torchscript(self, tmp_path: Path) -> None:
        with pytest.raises(NormswapError, match="TorchScript"):
            export(torch.jit.script(nn.ReLU()), tmp_path / "a.onnx", (torch.ones(1),))

    def test_places(self, tmp_path: Path) -> None:
        for name, words in (("a.pb", r"\*\.onnx"), ("no_folder/a.onnx", "does not exist")):
            with pytest.raises(NormswapError, match=words):
                export(nn.ReLU().eval(), tmp_path / name, (torch.ones(1),))

    @pytest.mark.parametrize("name", ["onnx", "onnxscript"])
    def test_missing_packages(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(NormswapError, match=r"pip install normswap\[onnx\]"):
            export(nn.ReLU().eval(), tmp_path / "a.onnx", (torch.ones(1),))

    def test_more_than_one_file_holds(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys.modules[export.__module__], "LARGEST", 100)
        with pytest.raises(NormswapError, match="weights take"):
            export(nn.Linear(10, 10).eval(), tmp_path / "a.onnx", (torch.ones(1, 10),))
        assert list(tmp_path.iterdir()) == []

    def test_a_graph_that_the_checker_refuses(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*args: Any, **options: Any) -> None:
            raise onnx.checker.ValidationError("no such operator\nand more")

        monkeypatch.setattr(onnx.checker, "check_model", broken)
        with pytest.raises(NormswapError, match=r"checker refuses.*no such operator$"):
            export(nn.ReLU().eval(), tmp_path / "a.onnx", (torch.ones(1),))
        assert list(tmp_path.iterdir()) == []


class TestIsolated:
    def test_shares_or_copies(self) -> None:
        model = net()
        model.table = torch.ones(3)
        for share in (True, False):
            other = isolated(model, share=share)
            for own, its in ((model.conv.weight, other.conv.weight), (model.bn.running_mean, other.bn.running_mean)):
                assert (own is its) == share
                assert torch.equal(own, its)
            assert (other.table is model.table) == share
            other(torch.randn(2, 3, 6, 6))
            assert model.cache == {}

    @pytest.mark.parametrize("share", [True, False])
    def test_tensors_that_autograd_made(self, share: bool) -> None:
        model = net()
        model(torch.randn(2, 3, 6, 6))
        assert not model.cache["bias"].is_leaf
        other = isolated(model, share=share)
        assert torch.equal(other.cache["bias"], model.cache["bias"])
        assert model.cache["bias"].grad_fn is not None

    @pytest.mark.parametrize("share", [True, False])
    def test_parametrizations_and_ties(self, share: bool) -> None:
        model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3)).eval()
        model[1].bias = model[0].bias
        other = isolated(model, share=share)
        x = torch.randn(2, 3)
        assert torch.equal(other(x), model(x))
        assert other[1].bias is other[0].bias

    def test_wrappers_are_left_off(self) -> None:
        model = net()
        wrapped = nn.DataParallel(model)
        assert type(isolated(wrapped, share=True)) is Net

    def test_what_cannot_be_copied(self) -> None:
        model = net()
        model.lock = open  # A function is copied by reference; a generator is not.
        isolated(model, share=True)
        model.lock = (value for value in ())
        with pytest.raises(NormswapError, match=r"Net cannot be copied.*generator"):
            isolated(model, share=True)


def test_quiet_keeps_back_output_and_passes_errors(capsys: pytest.CaptureFixture[str]) -> None:
    level = logging.root.manager.disable

    def noisy() -> None:
        print("out")
        print("err", file=sys.stderr)
        warnings.warn("warned", stacklevel=1)
        logging.getLogger("torch.onnx").error("logged")
        raise RuntimeError("this one")

    with pytest.raises(RuntimeError, match="this one"), quiet():
        noisy()
    assert capsys.readouterr() == ("", "")
    assert logging.root.manager.disable == level
