"""Reading and writing .onnx files: what is kept, what is refused, and that no output is partial."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")

import normswap.onnx as files  # noqa: E402
from normswap.errors import NormswapError  # noqa: E402
from normswap.onnx import file  # noqa: E402
from tests.onnx_support import bn, build, distance, input_of, norm, operators, run, save, values  # noqa: E402

BODY = f"c = Conv(x, w) d = Relu(c) e = Conv(d, own.weight) f = {bn('a', 'e')} y = Identity(f)"
CONSTANTS = {"w": values(5, 4, 1, 1), "own.weight": values(5, 5, 3, 3), **norm("a", 5)}


def model() -> Any:
    made = build(BODY.replace("own.weight", "own"), {}, outputs="double[2,5,4,4] y")
    made.graph.ClearField("initializer")
    for name, array in CONSTANTS.items():
        made.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    made.graph.node[2].input[1] = "own.weight"
    made.graph.node[0].name = "first"
    made.graph.node[0].doc_string = "the first"
    made.graph.doc_string, made.doc_string = "a graph", "a model"
    made.graph.initializer[1].doc_string = "a weight"
    made.producer_name, made.domain, made.model_version = "someone", "some.domain", 3
    made.graph.node[3].name = "norm"
    made.graph.node[1].metadata_props.add(key="stage", value="1")
    made.metadata_props.add(key="author", value="a")
    made.opset_import.add(domain="custom", version=2)
    return made


def external(folder: Path, name: str = "model.onnx", size: int = 0) -> Path:
    path = folder / name
    onnx.save(model(), str(path), save_as_external_data=True, location=name + ".data", size_threshold=size)
    return path


def test_names_metadata_and_documentation_are_kept(tmp_path: Path) -> None:
    path = save(model(), tmp_path)
    plan = files.fold(path, tmp_path / "out.onnx")
    assert [change.name for change in plan.changes] == ["norm"]
    before, after = onnx.load(str(path)), onnx.load(str(tmp_path / "out.onnx"))
    for name in ("producer_name", "domain", "model_version", "doc_string", "ir_version"):
        assert getattr(before, name) == getattr(after, name)
    assert list(before.opset_import) == list(after.opset_import)
    assert before.graph.doc_string == after.graph.doc_string
    assert list(before.graph.input) == list(after.graph.input)
    assert list(before.graph.output) == list(after.graph.output)
    kept = [node for node in before.graph.node if node.op_type != "BatchNormalization"]
    assert [(node.name, node.doc_string, list(node.metadata_props)) for node in kept] == [
        (node.name, node.doc_string, list(node.metadata_props)) for node in after.graph.node
    ]
    assert {value.name for value in after.graph.initializer} == {"w", "own.weight", "own.bias"}
    assert [value.doc_string for value in after.graph.initializer if value.name == "own.weight"] == ["a weight"]
    metadata = {entry.key: entry.value for entry in after.metadata_props}
    assert metadata["author"] == "a"
    assert metadata["normswap.operation"].startswith("fold (")


def test_an_output_of_the_graph_keeps_its_name(tmp_path: Path) -> None:
    proto = build(f"c = Conv(x, w) y = {bn('a', 'c')}", {"w": values(5, 4, 1, 1), **norm("a", 5)})
    files.fold(save(proto, tmp_path), tmp_path / "out.onnx")
    after = onnx.load(str(tmp_path / "out.onnx"))
    assert list(after.graph.output) == list(proto.graph.output)


@pytest.mark.parametrize("operation", ["fold", "group"])
def test_external_data_stays_external(operation: str, tmp_path: Path) -> None:
    path = external(tmp_path, size=200)
    (tmp_path / "other").mkdir()
    out = tmp_path / "other" / "out.onnx"
    plan = files.plan_fold(path) if operation == "fold" else files.plan_convert(path, operation)
    assert plan.apply(out) == [out, out.with_name("out.onnx.data")]
    bare = onnx.load(str(out), load_external_data=False)
    where = {value.name: [entry.value for entry in value.external_data[:1]] for value in bare.graph.initializer}
    assert where["own.weight"] == ["out.onnx.data"]
    assert not where.get("own.bias")
    x = input_of(model())
    if operation == "fold":
        assert distance(run(out, x), run(path, x)) < 1e-10
    else:
        run(out, x)
    assert sorted(entry.name for entry in out.parent.iterdir()) == ["out.onnx", "out.onnx.data"]


def test_external_tensors_are_folded_while_they_are_written(tmp_path: Path) -> None:
    """Weights in external files are not held folded in memory."""
    import onnx_ir as ir

    plan = files.plan_fold(external(tmp_path))
    kinds = {value.name: type(value.const_value) for value in plan.model.graph.initializers.values()}
    assert kinds["own.weight"] is ir.LazyTensor
    assert kinds["w"] is ir.ExternalTensor


def test_the_input_and_other_files_are_never_overwritten(tmp_path: Path) -> None:
    path = external(tmp_path)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    plan = files.plan_fold(path)
    with pytest.raises(NormswapError, match="is an input of this run"):
        plan.apply(path, force=True)
    (tmp_path / "link.onnx").symlink_to(path)
    with pytest.raises(NormswapError, match="is an input of this run"):
        plan.apply(tmp_path / "link.onnx", force=True)
    (tmp_path / "link.onnx").unlink()
    (tmp_path / "out.onnx.data").write_text("mine")
    with pytest.raises(NormswapError, match=r"out\.onnx\.data exists"):
        plan.apply(tmp_path / "out.onnx")
    (tmp_path / "out.onnx.data").unlink()
    with pytest.raises(NormswapError, match=r"name it \*\.onnx"):
        plan.apply(tmp_path / "out.pt")
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before
    plan.apply(tmp_path / "out.onnx")
    plan.apply(tmp_path / "more.onnx")
    assert (tmp_path / "more.onnx.data").read_bytes() == (tmp_path / "out.onnx.data").read_bytes()
    with pytest.raises(NormswapError, match=r"out\.onnx exists"):
        files.fold(path, tmp_path / "out.onnx")
    files.fold(path, tmp_path / "out.onnx", force=True)


def test_data_that_is_folded_is_an_input_too(tmp_path: Path) -> None:
    """All of the external tensors are changed, and the output's data would be where the input's is."""
    made = build(f"c = Conv(x, w) y = {bn('a', 'c')}", {"w": values(5, 4, 3, 3), **norm("a", 5)})
    path = tmp_path / "model.onnx"
    onnx.save(made, str(path), save_as_external_data=True, location="out.onnx.data", size_threshold=1000)
    before = (tmp_path / "out.onnx.data").read_bytes()
    with pytest.raises(NormswapError, match="is an input of this run"):
        files.fold(path, tmp_path / "out.onnx", force=True)
    assert (tmp_path / "out.onnx.data").read_bytes() == before
    assert not (tmp_path / "out.onnx").exists()


def test_nothing_is_left_behind_by_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = external(tmp_path)
    names = sorted(entry.name for entry in tmp_path.iterdir())

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(NormswapError, match="No space left on device"):
        files.fold(path, tmp_path / "out.onnx")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == names


@pytest.mark.parametrize("location", ["/etc/hosts", "../secret", "a/../../secret", "link"])
def test_data_outside_of_the_folder_is_refused(location: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(10_000))
    folder = tmp_path / "models"
    (folder / "a").mkdir(parents=True)
    (folder / "link").symlink_to(tmp_path / "secret")
    path = external(folder)
    proto = onnx.load(str(path), load_external_data=False)
    proto.graph.initializer[0].external_data[0].value = location
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(NormswapError, match="outside the folder of the model"):
        files.inspect(path)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: (path.parent / "model.onnx.data").unlink(), "which is missing"),
        (lambda path: os.truncate(path.parent / "model.onnx.data", 100), "is truncated, or of another size"),
        (lambda path: os.truncate(path, path.stat().st_size // 2), "truncated"),
        (lambda path: path.write_bytes(b""), "is not an ONNX model"),
        (lambda path: path.write_bytes(b"\x80\x02}q\x00." * 40), "is not an ONNX model"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)), "is not an ONNX model"),
        (lambda path: path.unlink(), "there is no such file"),
    ],
    ids=["missing data", "short data", "truncated", "empty", "pickle", "zip", "missing"],
)
def test_damaged_files(damage: Any, told: str, tmp_path: Path) -> None:
    path = external(tmp_path)
    damage(path)
    with pytest.raises(NormswapError, match=told) as caught:
        files.inspect(path)
    assert len(str(caught.value).splitlines()) == 1


def test_every_truncation_gets_one_message(tmp_path: Path) -> None:
    path = save(model(), tmp_path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(NormswapError):
            files.plan_fold(path)


def test_flipped_bits_never_end_in_another_error(tmp_path: Path) -> None:
    path = save(model(), tmp_path)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[int(generator.integers(len(whole)))] ^= 1 << int(generator.integers(8))
        path.write_bytes(bytes(damaged))
        try:
            files.plan_fold(path).apply(tmp_path / "out.onnx", force=True)
        except NormswapError:
            continue


def test_what_would_be_lost_is_refused(tmp_path: Path) -> None:
    proto = model()
    proto.training_info.add()
    with pytest.raises(NormswapError, match="training information"):
        files.inspect(save(proto, tmp_path))


def test_a_result_that_the_checker_refuses_is_not_written(tmp_path: Path) -> None:
    path = save(model(), tmp_path)
    read = file.read(path)
    read.graph.node(0).op_type = "NoSuchOperator"
    with pytest.raises(NormswapError, match="the ONNX checker refuses the result"):
        file.write(read, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_inspect(tmp_path: Path) -> None:
    made = files.inspect(save(model(), tmp_path))
    assert [(site.name, str(site.norm), site.shapes) for site in made] == [
        ("norm", "batch(5, eps=1e-05)", ((2, 5, 4, 4),))
    ]
    assert operators(model())["BatchNormalization"] == 1
