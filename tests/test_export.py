"""Export: what the file holds, that the model stays as it was, and what is refused in which words."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import normswap
from normswap.errors import NormswapError
from normswap.onnx.export import export, isolated, quiet, training_modules
from tests.support import picture, randomise

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
onnxscript = pytest.importorskip("onnxscript")


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

    def test_sizes_by_name(self, tmp_path: Path) -> None:
        model, x = net(), torch.randn(2, 3, 8, 8)
        names = {"x": {0: "batch", 2: "height", -1: "width"}}
        path = export(model, tmp_path / "a.onnx", (x, 2.0), dynamic=names, optimize=False)
        assert axes(path) == [["batch", 3, "height", "width"]]
        for shape in ((1, 3, 8, 8), (3, 3, 5, 11)):
            x = torch.randn(shape)
            with torch.no_grad():
                expected = model(x)["map"]
            torch.testing.assert_close(torch.from_numpy(run(path, x)[0]), expected, rtol=1e-4, atol=1e-4)

    def test_nested_arguments_and_shared_names(self, tmp_path: Path) -> None:
        class Nested(nn.Module):
            def forward(self, pair: tuple[Tensor, Tensor], named: dict[str, Tensor], *more: Tensor) -> Tensor:
                return pair[0] + named["a"] + more[0].sum() + pair[1].mean()

        inputs = ((torch.ones(2, 3), torch.ones(4)), {"a": torch.ones(2, 1), "b": torch.ones(5)}, torch.ones(6))
        asked = {"pair": ({0: "n"}, None), "named": {"a": ["n", None], "b": {0: "free"}}, "more": [{0: "m"}]}
        path = export(Nested().eval(), tmp_path / "a.onnx", inputs, dynamic=asked)
        assert axes(path) == [["n", 3], [4], ["n", 1], ["free"], ["m"]]
        values = (torch.ones(7, 3), torch.ones(4), torch.ones(7, 1), torch.ones(2), torch.ones(9))
        assert run(path, *values)[0].shape == (7, 3)

    @pytest.mark.parametrize(
        ("dynamic", "words"),
        [
            ({"images": {0: "n"}}, r"'images', which is no argument .* Net\.forward; those are: x, scale$"),
            ({"more": {0: "n"}}, r"'more', which is no argument"),
            ({"x": {4: "n"}}, r"dynamic\[x\] names axis 4; the tensor has 4 axes"),
            ({"x": {"0": "n"}}, r"names axis '0'"),
            ({"x": "batch"}, r"must be a mapping of axes, such as \{0: 'batch'\}: 'batch'"),
            ({"x": {0: "my axis"}}, r"'my axis' cannot name an axis"),
            ({"x": {0: "class"}}, r"'class' cannot name an axis"),
            ({"scale": {0: "n"}}, r"dynamic\[scale\]: the argument is a float, which has no axes"),
            ("batch", r"dynamic is a str; it must be True or a mapping"),
        ],
    )
    def test_what_is_no_axis(self, tmp_path: Path, dynamic: Any, words: str) -> None:
        with pytest.raises(NormswapError, match=words):
            export(net(), tmp_path / "a.onnx", (torch.randn(2, 3, 6, 6), 2.0), dynamic=dynamic)
        with pytest.raises(NormswapError, match=r"do not fit Net\.forward: too many"):
            export(net(), tmp_path / "a.onnx", (torch.randn(2, 3, 6, 6), 1, 2, 3), dynamic={"x": {0: "n"}})
        assert list(tmp_path.iterdir()) == []

    def test_fixed_axes_beside_open_ones(self, tmp_path: Path) -> None:
        shapes = {"input": {0: None, 1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.STATIC}}
        path = export(nn.ReLU().eval(), tmp_path / "a.onnx", (torch.randn(2, 3, 4, 5),), dynamic=shapes)
        first, second, _, fourth = axes(path)[0]
        assert (first, type(second), fourth) == (2, str, 5)

    def test_an_axis_that_the_code_fixes_is_refused(self, tmp_path: Path) -> None:
        x = torch.randn(2, 3, 4)
        for dynamic in (True, {"x": {0: "batch", 2: "length"}}):
            with pytest.raises(NormswapError, match=r"fix(es|ed) .*batch.* at 2.* leave that axis out") as caught:
                export(FixedBatch().eval(), tmp_path / "a.onnx", (x,), dynamic=dynamic)
            assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []
        assert axes(export(FixedBatch().eval(), tmp_path / "a.onnx", (x,))) == [[2, 3, 4]]

    def test_an_axis_that_the_exporter_fixes_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = torch.onnx.export
        monkeypatch.setattr(
            torch.onnx, "export", lambda *args, **options: plain(*args, **{**options, "dynamic_shapes": None})
        )
        with pytest.raises(NormswapError, match=r"fixed axis 0 \(batch\) of input 'input' at 2"):
            export(nn.ReLU().eval(), tmp_path / "a.onnx", (torch.randn(2, 3),), dynamic=True)
        with pytest.raises(NormswapError, match=r"fixed axis 1 \(length\) of input 'input' at 3"):
            export(nn.ReLU().eval(), tmp_path / "a.onnx", (torch.randn(2, 3),), dynamic={"input": {1: "length"}})
        assert list(tmp_path.iterdir()) == []


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


class TestExternalData:
    def test_on_request(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model, x = net(), torch.randn(2, 3, 6, 6)
        folder = tmp_path / "there"
        folder.mkdir()
        path = export(model, folder / "a.onnx", (x,), external_data=True, dynamic=True)
        assert names(folder) == ["a.onnx", "a.onnx.data"]
        large = [i for i in onnx.load(path, load_external_data=False).graph.initializer if i.external_data]
        assert [i.name for i in large] == ["conv.weight"]
        assert {entry.key: entry.value for entry in large[0].external_data}["location"] == "a.onnx.data"
        assert axes(path) == [["batch", 3, 6, 6]]
        with torch.no_grad():
            expected = model(x)["map"]
        folder.rename(tmp_path / "elsewhere")
        (tmp_path / "other").mkdir()
        monkeypatch.chdir(tmp_path / "other")
        for place in (tmp_path / "elsewhere" / "a.onnx", Path("../elsewhere/a.onnx")):
            torch.testing.assert_close(torch.from_numpy(run(place, x)[0]), expected, rtol=1e-4, atol=1e-4)
            onnx.checker.check_model(place, full_check=True)

    def test_where_one_file_is_too_small(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys.modules[export.__module__], "LARGEST", 400)
        export(nn.Linear(9, 10).eval(), tmp_path / "a.onnx", (torch.ones(1, 9),))
        assert names(tmp_path) == ["a.onnx"]
        export(nn.Linear(10, 10).eval(), tmp_path / "b.onnx", (torch.ones(1, 10),))
        assert names(tmp_path) == ["a.onnx", "b.onnx", "b.onnx.data"]

    def test_existing_files(self, tmp_path: Path) -> None:
        model, x = nn.Linear(20, 20).eval(), torch.randn(2, 20)
        (tmp_path / "a.onnx.data").write_text("old")
        with pytest.raises(NormswapError, match=r"a\.onnx\.data exists.*--force"):
            export(model, tmp_path / "a.onnx", (x,), external_data=True)
        assert names(tmp_path) == ["a.onnx.data"]
        path = export(model, tmp_path / "a.onnx", (x,), external_data=True, force=True)
        torch.testing.assert_close(torch.from_numpy(run(path, x)[0]), model(x))
        (tmp_path / "b.onnx").symlink_to("a.onnx")
        with pytest.raises(NormswapError, match=r"b\.onnx is a symbolic link"):
            export(model, tmp_path / "b.onnx", (x,), external_data=True, force=True)

    @pytest.mark.parametrize("broken", ["check", "write"])
    def test_both_files_or_neither(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
        model, x = nn.Linear(20, 20).eval(), torch.randn(2, 20)
        export(model, tmp_path / "a.onnx", (x,), external_data=True)
        before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}

        def refuse(*args: Any, **options: Any) -> None:
            raise onnx.checker.ValidationError("no")

        plain = Path.replace

        def full(path: Path, target: Path) -> Path:
            if ".tmp" in str(path.parent.name) and target.suffix == ".onnx":
                raise OSError(28, "No space left on device")
            return plain(path, target)

        if broken == "check":
            monkeypatch.setattr(onnx.checker, "check_model", refuse)
        else:
            monkeypatch.setattr(Path, "replace", full)
        other = randomise(nn.Linear(20, 20)).eval()
        with pytest.raises(NormswapError, match=r"checker refuses|No space left on device. No partial file"):
            export(other, tmp_path / "a.onnx", (x,), external_data=True, force=True)
        assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


class TestMetadata:
    def test_what_the_file_was_made_of(self, tmp_path: Path) -> None:
        model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))).eval()
        first = normswap.plan_fold(model)
        folded = first.apply()
        second = normswap.plan_convert(folded, "layer")
        final, x = second.apply(), torch.randn(1, 3, 4, 4)
        recipes = [first.recipe, second.recipe]
        for external in (False, True):
            path = tmp_path / f"{external}.onnx"
            export(final, path, (x,), opset=21, external_data=external, recipe=recipes, metadata={"author": "me"})
            found = normswap.read_metadata(path)
            assert found == {entry.key: entry.value for entry in onnx.load(path).metadata_props}
            assert found.pop("author") == "me"
            assert json.loads(found.pop("normswap.recipe")) == json.loads(json.dumps(recipes))
            assert found == {
                "normswap.version": normswap.__version__,
                "normswap.torch": torch.__version__,
                "normswap.onnxscript": onnxscript.__version__,
                "normswap.opset": "21",
                "normswap.weights.sha256": normswap.state_digest(final),
            }

    def test_the_recipes_lead_to_the_model(self, tmp_path: Path) -> None:
        model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).eval()
        plan = normswap.plan_fold(model)
        path = export(plan.apply(), tmp_path / "a.onnx", (torch.randn(1, 3, 4, 4),), recipe=plan.recipe)
        (recipe,) = json.loads(normswap.read_metadata(path)["normswap.recipe"])
        replayed = normswap.apply_recipe(model, recipe)
        assert [type(module) for module in replayed] == [type(module) for module in plan.apply()]

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"recipe": {"steps": []}}, "neither a plan's recipe"),
            ({"recipe": "fold"}, "neither a plan's recipe"),
            ({"recipe": {"format": 1, "steps": [{1, 2}]}}, "cannot be written as JSON"),
            ({"metadata": {"a": 1}}, "metadata maps text to text; 'a': 1 does not"),
            ({"metadata": {"normswap.opset": "3"}}, "kept for normswap"),
            ({"metadata": ["a"]}, "metadata is a list"),
        ],
    )
    @pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
    def test_misuse(self, tmp_path: Path, options: Any, words: str, suffix: str) -> None:
        with pytest.raises(NormswapError, match=words):
            export(nn.ReLU().eval(), tmp_path / f"a{suffix}", (torch.ones(1),), **options)
        assert list(tmp_path.iterdir()) == []

    def test_reading(self, tmp_path: Path) -> None:
        for name, content in {"a.onnx": b"", "b.onnx": b"text", "a.pt2": b"text", "c.onnx": None, "a.pt": b""}.items():
            if content is not None:
                (tmp_path / name).write_bytes(content)
            with pytest.raises(NormswapError, match=r"damaged or no|does not exist|are read|is read") as caught:
                normswap.read_metadata(tmp_path / name)
            assert "\n" not in str(caught.value)
        for content in (b"[1]", b"{", b'{"a": 1}'):
            with zipfile.ZipFile(tmp_path / "b.pt2", "w") as file:
                file.writestr("b/extra/normswap.json", content)
            with pytest.raises(NormswapError, match="damaged"):
                normswap.read_metadata(tmp_path / "b.pt2")


class TestStateDigest:
    def test_what_counts(self) -> None:
        model = net()
        digest = normswap.state_digest(model)
        assert digest == normswap.state_digest(model.state_dict())
        assert digest == normswap.state_digest(dict(reversed(model.state_dict().items())))
        assert digest == normswap.state_digest(model.to(memory_format=torch.channels_last))
        for change in (
            lambda state: state.update({"more": torch.ones(1)}),
            lambda state: state.update({"conv.bias": state["conv.bias"].double()}),
            lambda state: state.update({"conv.bias": state["conv.bias"][:, None]}),
            lambda state: state.update({"conv.bias": -state["conv.bias"]}),
            lambda state: state.update({"conv.b": state.pop("conv.bias")}),
        ):
            state = dict(model.state_dict())
            change(state)
            assert normswap.state_digest(state) != digest

    def test_by_hand(self) -> None:
        text = b'["a", "bfloat16", [1, 2]]\n' + bytes([0x80, 0x3F, 0, 0xC0]) + b'["b", "bool", []]\n\x01'
        state = {"b": torch.tensor(True), "a": torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16), "c": "text"}
        assert normswap.state_digest(state) == hashlib.sha256(text).hexdigest()

    def test_all_kinds_of_tensors(self) -> None:
        dense = torch.tensor([[0.0, 2.0]])
        assert normswap.state_digest({"a": dense.to_sparse()}) == normswap.state_digest({"a": dense})
        for value in (torch.ones(2, dtype=torch.complex64), torch.empty(0), torch.ones(3, 2).T):
            assert len(normswap.state_digest({"a": value})) == 64
        with pytest.raises(NormswapError, match="a has no values"):
            normswap.state_digest({"a": torch.ones(1, device="meta")})
        with pytest.raises(NormswapError, match=r"bias has no values.*lazy"):
            normswap.state_digest(nn.LazyConv2d(4, 1))


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
        for name, words in (("a.pb", r"\*\.onnx.*\*\.pt2"), ("no_folder/a.onnx", "does not exist")):
            with pytest.raises(NormswapError, match=words):
                export(nn.ReLU().eval(), tmp_path / name, (torch.ones(1),))

    @pytest.mark.parametrize("name", ["onnx", "onnxscript"])
    def test_missing_packages(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(NormswapError, match=r"pip install normswap\[onnx\]"):
            export(nn.ReLU().eval(), tmp_path / "a.onnx", (torch.ones(1),))

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
