"""Archives of ``torch.export``: what they hold, what is refused when they are written, and what when they are read."""

from __future__ import annotations

import json
import logging
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._export.serde.schema import SCHEMA_VERSION

import normswap
from normswap.errors import NormswapError
from normswap.exported import load_exported
from normswap.onnx.export import export, quiet
from tests.support import picture, randomise
from tests.test_export import Branching, FixedBatch, net

PROGRAM = "archive/models/model.json"
WEIGHTS = "archive/data/weights/model_weights_config.json"
SAMPLES = "archive/data/sample_inputs/model.pt"


class Pooling(nn.Module):
    """Sizes that are expressions of the input's, in the program and in its guards."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return (y.reshape(y.shape[0], 4, -1).softmax(-1) * y.shape[-1]).mean(-1)


class Padded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :4] + torch.arange(4.0)  # At least 4 values, which only a check at run time can say.


def pooling(path: Path, **options: Any) -> tuple[nn.Module, Path]:
    model = randomise(Pooling()).eval()
    dynamic = {"x": {0: "batch", 2: "height", 3: "width"}}
    return model, export(model, path / "a.pt2", (torch.randn(2, 3, 16, 16),), dynamic=dynamic, **options)


class TestWritten:
    def test_it_computes_what_the_model_does_and_the_model_stays(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        model = net()
        handle = model.bn.register_forward_hook(lambda module, args, out: out + 1)
        model.conv.weight.requires_grad_(False)
        x, more = torch.randn(2, 3, 6, 6), torch.randn(5)
        before, state = picture(model), torch.get_rng_state()
        path = export(model, tmp_path / "a.pt2", (x, 3.0, more))
        assert before.differences(model) == []
        assert model.cache == {}
        assert torch.equal(torch.get_rng_state(), state)
        program = load_exported(path)
        assert capfd.readouterr() == ("", "")
        assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []
        assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt2"]
        with torch.no_grad():
            expected, found = model(x, 3.0, more), program.module()(x, 3.0, more)
        torch.testing.assert_close(found, expected)
        handle.remove()

    def test_existing_files_and_what_is_for_onnx(self, tmp_path: Path) -> None:
        path = tmp_path / "a.pt2"
        path.write_text("old")
        with pytest.raises(NormswapError, match=r"a\.pt2 exists.*--force"):
            export(nn.ReLU().eval(), path, (torch.ones(1),))
        assert path.read_text() == "old"
        for options in ({"opset": 18}, {"external_data": True}):
            with pytest.raises(NormswapError, match=r"opset and external_data are for \.onnx"):
                export(nn.ReLU().eval(), path, (torch.ones(1),), force=True, **options)

    def test_train_mode_is_refused(self, tmp_path: Path) -> None:
        model = net()
        model.bn.train()
        with pytest.raises(NormswapError, match=r"train mode \(bn\).*model\.eval\(\)"):
            export(model, tmp_path / "a.pt2", (torch.randn(2, 3, 6, 6),))
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("model", "inputs", "words"),
        [
            (Branching(), (torch.ones(2),), r"torch\.export cannot translate Branching: .*data-dependent"),
            (nn.Linear(3, 2), (torch.ones(2, 5),), r"torch\.export cannot translate Linear: "),
        ],
    )
    def test_failures_are_the_exporter_s(self, tmp_path: Path, model: nn.Module, inputs: Any, words: str) -> None:
        with pytest.raises(NormswapError, match=words) as caught:
            export(model.eval(), tmp_path / "a.pt2", inputs)
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    def test_what_cannot_be_saved_leaves_no_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*args: Any, **options: Any) -> None:
            raise RuntimeError("PytorchStreamWriter failed writing file\nand more")

        monkeypatch.setattr(torch.export, "save", full)
        with pytest.raises(NormswapError, match=r"a\.pt2: torch\.export cannot save the graph: .*writing file$"):
            export(nn.ReLU().eval(), tmp_path / "a.pt2", (torch.ones(1),))
        assert list(tmp_path.iterdir()) == []

    def test_metadata(self, tmp_path: Path) -> None:
        model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).eval()
        plan = normswap.plan_fold(model)
        folded = plan.apply()
        path = export(folded, tmp_path / "a.pt2", (torch.ones(1, 3, 2, 2),), recipe=plan.recipe, metadata={"a": "é"})
        found = normswap.read_metadata(path)
        assert json.loads(found["normswap.recipe"]) == [json.loads(json.dumps(plan.recipe))]
        assert found["a"] == "é"
        assert found["normswap.weights.sha256"] == normswap.state_digest(folded)
        assert found["normswap.version"] == normswap.__version__
        assert found["normswap.torch"] == str(torch.__version__)


class TestDynamic:
    def test_batch_and_spatial_sizes(self, tmp_path: Path) -> None:
        model, path = pooling(tmp_path)
        module = load_exported(path).module()
        for shape in ((1, 3, 16, 16), (5, 3, 16, 16), (2, 3, 9, 31), (1, 3, 33, 8)):
            x = torch.randn(shape)
            torch.testing.assert_close(module(x), model(x))

    @pytest.mark.parametrize("dynamic", [True, {"x": {0: "batch"}}, {"x": {-3: torch.export.Dim("n")}}])
    def test_an_axis_that_the_code_fixes_is_refused(self, tmp_path: Path, dynamic: Any) -> None:
        x = torch.randn(2, 3, 4)
        with pytest.raises(NormswapError, match=r"its code fixes the dynamic axis (batch|n) at 2; leave that axis"):
            export(FixedBatch().eval(), tmp_path / "a.pt2", (x,), dynamic=dynamic)
        assert list(tmp_path.iterdir()) == []
        path = export(FixedBatch().eval(), tmp_path / "a.pt2", (x,), dynamic={"x": {2: "length"}})
        assert load_exported(path).module()(torch.zeros(2, 3, 9)).shape == (2, 3, 9)

    def test_an_axis_that_the_exporter_fixes_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = torch.export.export
        monkeypatch.setattr(
            torch.export, "export", lambda *args, **options: plain(*args, **{**options, "dynamic_shapes": None})
        )
        with pytest.raises(NormswapError, match=r"fixed axis 1 \(length\) of input 'input' at 3"):
            export(nn.ReLU().eval(), tmp_path / "a.pt2", (torch.randn(2, 3),), dynamic={"input": {1: "length"}})
        assert list(tmp_path.iterdir()) == []

    def test_what_the_code_assumes_of_a_size_is_checked_when_it_runs(self, tmp_path: Path) -> None:
        path = export(Padded().eval(), tmp_path / "a.pt2", (torch.randn(2, 6),), dynamic={"x": {0: "n", 1: "length"}})
        module = load_exported(path).module()
        for shape in ((1, 4), (3, 9)):
            x = torch.randn(shape)
            assert torch.equal(module(x), Padded()(x))
        with pytest.raises((RuntimeError, AssertionError), match=r"size|Guard|assert"):
            module(torch.randn(2, 3))


def rewritten(path: Path, changes: dict[str, Callable[[bytes], bytes]], more: dict[str, bytes] | None = None) -> Path:
    """A copy of the archive with some records changed and others added."""
    copy = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w") as target:
        for name in source.namelist():
            target.writestr(name, changes.get(name, bytes)(source.read(name)))
        for name, content in (more or {}).items():
            target.writestr(name, content)
    return copy


def edited(change: Callable[[dict[str, Any]], None]) -> dict[str, Callable[[bytes], bytes]]:
    def edit(content: bytes) -> bytes:
        program = json.loads(content)
        change(program)
        return json.dumps(program).encode()

    return {PROGRAM: edit}


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pooling(tmp_path_factory.mktemp("archive"))[1]


class TestRead:
    def test_no_such_file_and_no_archive(self, tmp_path: Path) -> None:
        with pytest.raises(NormswapError, match="does not exist"):
            load_exported(tmp_path / "a.pt2")
        (tmp_path / "a.pt2").write_bytes(b"\x80\x02 pickle")
        with pytest.raises(NormswapError, match="not a zip file"):
            load_exported(tmp_path / "a.pt2")

    @pytest.mark.parametrize("trusted", [False, True])
    def test_other_zip_files(self, tmp_path: Path, trusted: bool) -> None:
        torch.save({"a": torch.ones(1)}, tmp_path / "a.pt2")
        with zipfile.ZipFile(tmp_path / "b.pt2", "w") as file:
            file.writestr("b/notes.txt", "text")
        for name in ("a.pt2", "b.pt2"):
            with pytest.raises(NormswapError, match=r"no \.pt2 archive") as caught:
                load_exported(tmp_path / name, trusted=trusted)
            assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("trusted", [False, True])
    def test_damage(self, archive: Path, tmp_path: Path, trusted: bool) -> None:
        content = archive.read_bytes()
        for part in (content[: len(content) // 2], content[:100]):
            (tmp_path / "cut.pt2").write_bytes(part)
            with pytest.raises(NormswapError, match=r"damaged"):
                load_exported(tmp_path / "cut.pt2", trusted=trusted)
        changed = rewritten(archive, {PROGRAM: lambda text: text[:-20]})
        with pytest.raises(NormswapError, match=r"cannot be read; it is damaged"):
            load_exported(changed, trusted=trusted)
        changed = rewritten(archive, {"archive/archive_version": lambda text: b"99"})
        with pytest.raises(NormswapError, match=r"of another version of torch"):
            load_exported(changed, trusted=trusted)

    def test_a_flipped_bit_in_the_weights(self, archive: Path) -> None:
        name = "archive/data/weights/weight_0"
        with pytest.raises(NormswapError, match="weights are not those that were exported"):
            load_exported(rewritten(archive, {name: lambda values: bytes([values[0] ^ 1]) + values[1:]}), trusted=True)

    def test_programs_of_torch_itself(self, tmp_path: Path) -> None:
        torch.export.save(torch.export.export(nn.ReLU(), (torch.ones(2),)), tmp_path / "a.pt2", extra_files={"b": "c"})
        assert torch.equal(load_exported(tmp_path / "a.pt2").module()(-torch.ones(2)), torch.zeros(2))
        assert normswap.read_metadata(tmp_path / "a.pt2") == {}


class TestHostile:
    """An archive that could run code while it is read is refused, and has not run it."""

    def refused(self, path: Path, words: str) -> None:
        with pytest.raises(NormswapError, match=words) as caught:
            load_exported(path)
        assert "trusted=True" in str(caught.value)

    def test_pickles(self, archive: Path, tmp_path: Path) -> None:
        flag = tmp_path / "flag"

        def samples(content: bytes) -> bytes:
            torch.save(((Touch(flag),), {}), tmp_path / "samples")
            return (tmp_path / "samples").read_bytes()

        def pickled(content: bytes) -> bytes:
            config = json.loads(content)
            next(iter(config["config"].values()))["use_pickle"] = True
            return json.dumps(config).encode()

        evil = {"archive/data/weights/weight_0": lambda content: pickle.dumps(Touch(flag))}
        self.refused(rewritten(archive, {SAMPLES: samples}), "its sample inputs are more than tensors")
        self.refused(rewritten(archive, {WEIGHTS: pickled, **evil}), "a tensor in it is pickled")
        legacy = {"archive/data/weights/model.pt": pickle.dumps(Touch(flag))}
        self.refused(rewritten(archive, {}, legacy), "it holds 'data/weights/model.pt'")
        assert not flag.exists()

    def test_an_archive_of_the_older_format_in_it(self, archive: Path, tmp_path: Path) -> None:
        """Torch falls back on it when the newer one cannot be read, and unpickles it."""
        flag = tmp_path / "flag"
        torch.save({"a": Touch(flag)}, tmp_path / "state")
        with zipfile.ZipFile(archive) as file:
            program = file.read(PROGRAM)
        version = ".".join(map(str, SCHEMA_VERSION))
        older = {"version": version.encode(), "serialized_exported_program.json": program}
        older |= {
            f"serialized_{part}.pt": (tmp_path / "state").read_bytes()
            for part in ("state_dict", "constants", "example_inputs")
        }
        changed = rewritten(archive, {"archive/data/weights/weight_0": lambda values: values[:16]}, older)
        for trusted in (False, True):
            with pytest.raises(NormswapError, match=r"no \.pt2 archive|cannot be read"):
                load_exported(changed, trusted=trusted)
            assert not flag.exists()
        with pytest.raises(Exception), quiet():  # noqa: B017, PT011
            torch.export.load(changed)
        assert flag.exists()

    def test_libraries(self, archive: Path) -> None:
        more = {"archive/data/aotinductor/model/a.so": b""}
        self.refused(rewritten(archive, {}, more), "it holds 'data/aotinductor")

    @pytest.mark.parametrize(
        "text",
        [
            "__import__('os').system('touch /tmp/x')",
            "Symbol('s0').__class__",
            "(lambda: 0)()",
            "[x for x in ()]",
            "torch.load(s0)",
            "Integer(1) #",
            "Symbol('a\" + evil + \"')",
            "f'{s0}'",
            "(",
        ],
    )
    def test_text_that_is_evaluated(self, archive: Path, text: str) -> None:
        def size(program: dict[str, Any]) -> None:
            values = program["graph_module"]["graph"]["tensor_values"].values()
            next(iter(s for v in values for s in v["sizes"] if "as_expr" in s))["as_expr"]["expr_str"] = text

        def hidden(program: dict[str, Any]) -> None:
            values = program["graph_module"]["graph"]["tensor_values"]
            values["custom"] = {**next(iter(values.values())), "sizes": [{"as_expr": {"expr_str": text}}]}

        for change in (size, hidden, lambda program: program["guards_code"].append(text)):
            self.refused(rewritten(archive, edited(change)), "a size or guard in it is")

    @pytest.mark.parametrize(
        "target",
        ["torch.load", "torch.os.system", "_operator.call", "_operator.attrgetter", "torch.ops.__class__.load_library"],
    )
    def test_calls(self, archive: Path, target: str) -> None:
        def call(program: dict[str, Any]) -> None:
            program["graph_module"]["graph"]["nodes"][0]["target"] = target

        self.refused(rewritten(archive, edited(call)), f"it calls '{target}'")

    def test_names(self, archive: Path, tmp_path: Path) -> None:
        def name(program: dict[str, Any]) -> None:
            program["graph_module"]["signature"]["input_specs"][0]["parameter"]["parameter_name"] = "a=evil()"

        self.refused(rewritten(archive, edited(name)), r"it names something 'a=evil\(\)'")

    @pytest.mark.parametrize(
        ("context", "words"),
        [
            ({"__enum__": True, "fqn": "x:y"}, "names a class to import"),
            ({"default_factory_module": "antigravity"}, "names a class to import"),
            (["x'] + evil() + ['"], r"it names something .*evil\(\)"),
            ("x'] + evil() + ['", r"it names something .*evil\(\)"),
        ],
    )
    def test_structures(self, archive: Path, context: Any, words: str) -> None:
        def structure(program: dict[str, Any]) -> None:
            signature = program["graph_module"]["module_call_graph"][0]["signature"]
            protocol, spec = json.loads(signature["in_spec"])
            text = json.dumps(context).replace("_", "\\u005f")
            spec["children_spec"][0]["context"] = text
            signature["in_spec"] = json.dumps([protocol, spec])

        self.refused(rewritten(archive, edited(structure)), words)

    def test_texts_among_the_inputs(self, tmp_path: Path) -> None:
        """Torch puts them between quotes, as they are, into the guards that it compiles."""

        class Modes(nn.Module):
            def forward(self, x: Tensor, mode: str) -> Tensor:
                return x + 1 if mode == "plain" else x

        path = export(Modes().eval(), tmp_path / "a.pt2", (torch.ones(2), "plain"))
        assert torch.equal(load_exported(path).module()(torch.ones(2), "plain"), torch.full((2,), 2.0))
        changed = rewritten(path, {PROGRAM: lambda text: text.replace(b'"plain"', b"\"' or evil() or '\"")})
        self.refused(changed, r"it names something \"' or evil\(\) or '\"")

    def test_names_and_arguments_that_are_harmless(self, tmp_path: Path) -> None:
        class Odd(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.parts = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("a-b", "c/d", "é")})

            def forward(self, x: Tensor, mode: str = "x y", none: None = None) -> dict[str, Any]:
                y = self.parts["a-b"](self.parts["é"](self.parts["a-b"](x))) + torch.tensor([1.0, 2.0, 3.0, 4.0])
                y = torch.einsum("bi,ij->bj", y, self.parts["c/d"].weight)
                return {"y": y, "none": none}

        model, x = randomise(Odd()).eval(), torch.randn(2, 4)
        path = export(model, tmp_path / "a.pt2", (x, "x y"), dynamic={"x": {0: "n"}})
        torch.testing.assert_close(load_exported(path).module()(x, "x y"), model(x))

    def test_a_trusted_one_is_read_as_torch_does(self, archive: Path) -> None:
        changed = rewritten(archive, {}, {"archive/data/notes": b""})
        self.refused(changed, "it holds 'data/notes'")
        assert load_exported(changed, trusted=True).module()(torch.zeros(1, 3, 8, 8)).shape == (1, 4)

    def test_torch_itself_would_run_it(self, archive: Path, tmp_path: Path) -> None:
        """What the tests above guard against is real; where this fails, torch has become safer."""
        flag = tmp_path / "flag"

        def size(program: dict[str, Any]) -> None:
            values = program["graph_module"]["graph"]["tensor_values"].values()
            entry = next(iter(s for v in values for s in v["sizes"] if "as_expr" in s))["as_expr"]
            entry["expr_str"] = f"__import__('pathlib').Path('{flag}').touch() or Integer(2)"

        changed = rewritten(archive, edited(size))
        self.refused(changed, "a size or guard in it is")
        assert not flag.exists()
        load_exported(changed, trusted=True)
        assert flag.exists()


def test_an_old_torch_is_named(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.export.pt2_archive", None)
    with pytest.raises(NormswapError, match=r"needs torch 2\.8"):
        load_exported(archive)
