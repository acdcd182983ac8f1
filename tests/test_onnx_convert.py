"""Batch norms of .onnx files become others: the result is held against the definition of the new norm, in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")

import normswap.onnx as files  # noqa: E402
from normswap import Norm, reference  # noqa: E402
from normswap.errors import NormswapError  # noqa: E402
from normswap.spec import MAP, SPACE  # noqa: E402
from tests.onnx_support import bn, build, distance, input_of, norm, operators, run, save  # noqa: E402

A = norm("a", 6, positive=False)
SHAPES = {"map": "double[2,6,5,4]", "volume": "double[2,6,3,2,2]", "sequence": "double[2,6,5]", "flat": "double[3,6]"}
OUT = "double[2,6,5,4] y"


def convert(folder: Path, to: str, *, x: str = SHAPES["map"], opset: int = 21, **options: Any) -> tuple[Any, Any, Any]:
    body = f"c = Relu(x) d = {bn('a', 'c', '<epsilon=0.01>')} y = Relu(d)"
    made = build(body, A, x=x, opset=opset)
    made.graph.node[1].name = "norm"
    path = save(made, folder)
    plan = files.convert(path, folder / "out.onnx", to, **options)
    result = onnx.load(str(folder / "out.onnx"))
    onnx.checker.check_model(result, full_check=True)
    return plan, made, result


def wanted(made: Any, norm: Norm) -> list[np.ndarray]:
    x = torch.from_numpy(input_of(made)).relu()
    return [reference(x, norm).relu().numpy()]


def norm_of(kind: str, groups: int) -> Norm:
    weight, bias = torch.from_numpy(A["a_s"]), torch.from_numpy(A["a_t"])
    pools = SPACE if kind == "instance" else MAP
    return Norm(kind, 6, pools, groups=groups, eps=float(np.float32(0.01)), weight=weight, bias=bias)


@pytest.mark.parametrize("opset", [9, 14, 17, 20, 21])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("to", "groups"), [("group", 3), ("layer", 1), ("instance", 1)])
def test_computes_what_the_new_norm_is(to: str, groups: int, shape: str, opset: int, tmp_path: Path) -> None:
    if to == "instance" and shape == "flat":
        return
    options = {"groups": groups} if to == "group" else {}
    plan, made, result = convert(tmp_path, to, x=SHAPES[shape], opset=opset, **options)
    (change,) = plan.changes
    assert (change.to, change.lost) == (to, ("running statistics",))
    target = norm_of(to, groups)
    assert str(change.target) == str(replace(target, kind=to))
    assert distance(run(result, input_of(made)), wanted(made, target)) < 1e-6  # eps is a float32
    native = to == "instance" or (opset >= 21 and shape != "flat")
    names = operators(result)
    assert names["BatchNormalization"] == 0
    assert ("Reshape" in names) is not native
    assert {value.name for value in result.graph.initializer} >= {"a_s", "a_t"}
    assert not {value.name for value in result.graph.initializer} & {"a_m", "a_v"}
    assert sum(node.name == "norm" for node in result.graph.node) == 1


def test_the_number_of_groups(tmp_path: Path) -> None:
    plan, _, _ = convert(tmp_path, "group")
    assert plan.changes[0].target.groups == 3
    (tmp_path / "b").mkdir()
    plan, _, _ = convert(tmp_path / "b", "group", channels_per_group=3)
    assert plan.changes[0].target.groups == 2
    (tmp_path / "c").mkdir()
    plan, _, _ = convert(tmp_path / "c", "group", x=SHAPES["flat"])
    assert plan.changes[0].target.groups == 1
    with pytest.raises(NormswapError, match="groups=4 does not divide 6 channels"):
        files.plan_convert(tmp_path / "model.onnx", "group", groups=4)
    with pytest.raises(NormswapError, match="cannot become 'switchable'; the kinds are: group, instance, layer"):
        files.plan_convert(tmp_path / "model.onnx", "switchable")
    with pytest.raises(NormswapError, match="'groups' is no option of 'layer' here"):
        files.plan_convert(tmp_path / "model.onnx", "layer", groups=2)


@pytest.mark.parametrize(
    ("body", "options", "to", "reason"),
    [
        (f"y, m, v = {bn('a', 'x', '<training_mode=1>')}", {}, "group", "it is in training mode"),
        (f"y = {bn('a', 'x')}", {"x": SHAPES["flat"]}, "instance", "every instance would be a single element"),
        (f"y = {bn('a', 'x')}", {"overridable": ("a_s",)}, "group", "its scale 'a_s' is no constant"),
        ("y = InstanceNormalization(x, a_s, a_t)", {}, "group", "it is instance; of a file only batch"),
    ],
)
def test_left(body: str, options: dict[str, Any], to: str, reason: str, tmp_path: Path) -> None:
    path = save(build(body, A, **{"x": SHAPES["map"], **options}), tmp_path)
    (skip,) = files.plan_convert(path, to).skips
    assert reason in skip.reason


def test_parameters_that_two_norms_share(tmp_path: Path) -> None:
    """Each of two norms gets its own in the new shape; nothing that is read is taken away."""
    body = f"c = {bn('a', 'x')} d = Relu(c) e = {bn('a', 'd')} y = Mul(e, a_v4)"
    made = build(body, {**A, "a_v4": A["a_v"].reshape(6, 1, 1)}, x=SHAPES["map"], opset=17)
    path = save(made, tmp_path)
    files.convert(path, tmp_path / "out.onnx", "layer")
    first = norm_of("layer", 1)
    x = reference(torch.from_numpy(input_of(made)), replace(first, eps=1e-5)).relu()
    x = reference(x, replace(first, eps=1e-5)) * torch.from_numpy(A["a_v"].reshape(6, 1, 1))
    assert distance(run(tmp_path / "out.onnx", input_of(made)), [x.numpy()]) < 1e-6


def test_group_norms_as_exporters_write_them_are_read(tmp_path: Path) -> None:
    _, _, result = convert(tmp_path, "group", opset=17)
    (site,) = files.inspect(save(result, tmp_path, "again.onnx"))
    assert str(site.norm) == "group(6, groups=3, eps=0.01, no affine)"
    _, _, result = convert(tmp_path, "group", opset=21, force=True)
    (site,) = files.inspect(save(result, tmp_path, "again.onnx"))
    assert str(site.norm) == "group(6, groups=3, eps=0.01)"


def test_other_readers(tmp_path: Path) -> None:
    body = "c = GroupNormalization<num_groups=3>(x, g, g) d = LayerNormalization<axis=-2>(c, q) y = Relu(d)"
    made = build(body, {"g": np.ones(6), "q": np.ones((5, 4))}, x=SHAPES["map"], opset=21, outputs=OUT)
    assert [str(site.norm) for site in files.inspect(save(made, tmp_path))] == [
        "group(6, groups=3, eps=1e-05)",
        "layer(5x4, eps=1e-05)",
    ]
    made = build(
        "y = RMSNormalization(x, q)",
        {"q": np.ones(4)},
        x=SHAPES["map"],
        opset=23,
        ir_version=11,
        outputs=f"{SHAPES['map']} y",
    )
    assert [str(site.norm) for site in files.inspect(save(made, tmp_path))] == ["rms(4, eps=1e-05)"]
