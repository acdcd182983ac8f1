"""The command line on .onnx files: no model is named, and the original is what a fold is verified against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")

from normswap.cli import app  # noqa: E402
from normswap.onnx import layers  # noqa: E402
from tests.onnx_support import bn, build, norm, operators, save, values  # noqa: E402


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    body = f"c = Conv(x, net.conv.weight) d = {bn('net.bn', 'c')} e = Relu(d) f = {bn('z', 'e')} y = Sigmoid(f)"
    constants = {"net.conv.weight": values(5, 3, 3, 3), **norm("net.bn", 5), **norm("z", 5)}
    renamed = body.replace("net.conv.weight", "w").replace("net.bn", "a")
    made = build(renamed, {}, x="float[N,3,8,8]", outputs="float[N,5,6,6] y")
    names = {"a_s": "net.bn.weight", "w": "net.conv.weight"}
    for node in made.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)
    for name, array in constants.items():
        short = name.replace("net.bn", "a")
        made.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), names.get(short, short)))
    made.graph.node[1].name = "first"
    return save(made, tmp_path)


def test_inspect(path: Path) -> None:
    result = command("inspect", path)
    assert result.exit_code == 0
    assert "first = net.bn" in result.stdout
    assert "2 found: 2 batch" in result.stdout
    record = json.loads(command("inspect", path, "--json").stdout)
    assert [site["kind"] for site in record["sites"]] == ["batch", "batch"]


def test_fold_with_a_check(path: Path) -> None:
    out = path.with_name("out.onnx")
    result = command("fold", path, "-o", out, "--verify")
    assert result.exit_code == 0, result.output
    assert "equivalent on" in result.stdout
    assert operators(out)["BatchNormalization"] == 1
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["model.onnx", "out.onnx"]
    record = json.loads(command("fold", path, "-o", out, "--force", "--input", "3x3x8x8", "--json").stdout)
    assert record["verification"]["equivalent"]
    assert record["written"] == [str(out)]
    assert record["plan"]["changes"][0]["name"] == "first"
    assert [skip["reason"] for skip in record["plan"]["skips"]] == [
        "backward: e (Relu) stands between; forward: y (Sigmoid) reads it"
    ]


def test_a_wrong_fold_is_not_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = layers._folded

    def wrong(*arguments: Any) -> Any:
        weight, bias = honest(*arguments)
        return weight * 1.001, bias

    monkeypatch.setattr(layers, "_folded", wrong)
    out = path.with_name("out.onnx")
    result = command("fold", path, "-o", out, "--verify")
    assert result.exit_code == 1
    assert "the check failed" in result.output
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["model.onnx"]


def test_convert(path: Path) -> None:
    out = path.with_name("out.onnx")
    result = command("convert", path, "--to", "group", "--groups", 5, "--where", "net.*", "-o", out)
    assert result.exit_code == 0, result.output
    assert operators(out)["BatchNormalization"] == 1
    assert operators(out)["InstanceNormalization"] == 1
    assert command("convert", path, "--to", "layer", "--dry-run").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("fold", "{path}", "-o", "{path}"), "is an input of this run"),
        (("fold", "{path}"), "where to? Pass -o FILE.onnx"),
        (("fold", "{path}", "-o", "{folder}/out.pt"), "name it *.onnx"),
        (("fold", "{path}", "--affine", "--dry-run"), "--affine: not for an .onnx file"),
        (("fold", "{path}", "--model", "a:b", "--dry-run"), "--model: not for an .onnx file"),
        (("fold", "{path}", "--from", "group", "--dry-run"), "the model has no such norm; it has: batch"),
        (("fold", "{path}", "--where", "no", "--dry-run"), "no norm is called 'no'"),
        (("fold", "{path}", "--skip", "*", "--dry-run"), "nothing to change: 2 of 2 skipped; first: excluded by skip"),
        (("fold", "{folder}/no.onnx", "--dry-run"), "there is no such file"),
        (("convert", "{path}", "--to", "switchable", "--dry-run"), "cannot become 'switchable'"),
        (("convert", "{path}", "--to", "group", "--init", "preserve", "--dry-run"), "--init: not for an .onnx file"),
        (("inspect", "a.pt"), "a.pt does not exist"),
        (("inspect",), "which model? Pass --model"),
        (("inspect", "{path}", "--data", "a.npy"), "--data: not for an .onnx file"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], told: str, path: Path) -> None:
    result = command(*(argument.format(path=path, folder=path.parent) for argument in arguments))
    assert result.exit_code == 2
    assert told in " ".join(result.output.split())
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["model.onnx"]
