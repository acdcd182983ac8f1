"""Folding in .onnx files: what folds, what is left and why; every result is compared in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")

from onnx import helper, parser  # noqa: E402

from normswap.onnx.surgery import plan_fold  # noqa: E402
from tests.onnx_support import bn, build, fold, norm, only_reason, operators, save, values  # noqa: E402

W = {"w": values(5, 4, 3, 3), "b": values(5)}
A = norm("a", 5, positive=False)
SINGLE = {"x": "float[2,4,6,6]", "outputs": "float y"}
"""For what the reference implementation cannot run."""
SMALL = "double[3,4]"
SEQUENCE = "double[2,7,4]"


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


CHANGES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "conv": (f"c = Conv<pads=[1,1,1,1]>(x, w, b) y = {bn('a', 'c')}", {**W, **A}, {}),
    "conv without a bias": (f"c = Conv<strides=[2,2]>(x, w) y = {bn('a', 'c')}", {"w": W["w"], **A}, {}),
    "empty bias": (f"c = Conv(x, w, ) y = {bn('a', 'c')}", {"w": W["w"], **A}, {}),
    "eps": (f"c = Conv(x, w, b) y = {bn('a', 'c', '<epsilon=0.5>')}", {**W, **A}, {}),
    "groups": (
        f"c = Conv<group=2>(x, w, b) y = {bn('a', 'c')}",
        {"w": values(6, 2, 3, 3), "b": values(6), **norm("a", 6)},
        {},
    ),
    "transposed, groups": (
        f"c = ConvTranspose<group=2, strides=[2,2]>(x, w) y = {bn('a', 'c')}",
        {"w": values(4, 3, 2, 2), **norm("a", 6)},
        SINGLE,
    ),
    "gemm": (f"c = Gemm(x, w) y = {bn('a', 'c')}", {"w": values(4, 5), **A}, {"x": SMALL}),
    "gemm, factors": (
        f"c = Gemm<alpha=0.5, beta=3.0, transB=1>(x, w, b) y = {bn('a', 'c')}",
        {"w": values(5, 4), "b": values(1, 5), **A},
        {"x": SMALL},
    ),
    "gemm, one number as bias": (
        f"c = Gemm<beta=2.0>(x, w, b) y = {bn('a', 'c')}",
        {"w": values(4, 5), "b": np.array(2.5), **A},
        {"x": SMALL},
    ),
    "gemm, transposed input": (
        f"c = Gemm<transA=1>(x, w) y = {bn('a', 'c')}",
        {"w": values(4, 5), **A},
        {"x": "double[4,3]", "left": "transposes its input"},
    ),
    "matmul": (f"c = MatMul(x, w) y = {bn('a', 'c')}", {"w": values(4, 5), **A}, {"x": SMALL, "Add": 1}),
    "matmul and add": (
        f"c = MatMul(x, w) d = Add(b, c) y = {bn('a', 'd')}",
        {"w": values(4, 5), "b": values(1, 5), **A},
        {"x": SMALL, "Add": 1},
    ),
    "matmul, transpose": (
        f"c = MatMul(x, w) d = Transpose<perm=[0,2,1]>(c) y = {bn('a', 'd')}",
        {"w": values(4, 5), **A},
        {"x": SEQUENCE},
    ),
    "matmul, the rows are transposed": (
        f"c = MatMul(x, w) d = Transpose<perm=[0,2,1]>(c) e = Transpose<perm=[0,2,1]>(d) y = {bn('a', 'e')}",
        {"w": values(4, 7), **norm("a", 7)},
        {"x": SEQUENCE, "left": "the norm's channels are another axis"},
    ),
    "matmul, reshape": (
        f"c = MatMul(x, w) d = Reshape(c, rows) e = {bn('a', 'd')} y = Reshape(e, back)",
        {"w": values(4, 5), "rows": ints(-1, 5), "back": ints(2, 7, 5), **A},
        {"x": SEQUENCE},
    ),
    "transposed weight": (
        f"t = Transpose<perm=[1,0]>(w) u = Identity(t) c = MatMul(x, u) y = {bn('a', 'c')}",
        {"w": values(5, 4), **A},
        {"x": SMALL, "Transpose": 1},
    ),
    "weight of four axes, moved": (
        f"t = Transpose<perm=[1,2,3,0]>(w) u = Transpose<perm=[3,0,2,1]>(t) c = Conv(x, u) y = {bn('a', 'c')}",
        {"w": values(5, 4, 3, 2), **A},
        {"Transpose": 2},
    ),
    "concatenation": (
        f"c = Conv(x, w, b) d = Conv(x, w2) e = Concat<axis=1>(c, d) y = {bn('a', 'e')}",
        {**W, "w2": values(3, 4, 3, 3), **norm("a", 8)},
        {},
    ),
    "sum of branches": (
        f"c = Conv(x, w, b) d = Conv(x, w2) e = Add(c, d) y = {bn('a', 'e')}",
        {**W, "w2": values(5, 4, 3, 3), **A},
        {},
    ),
    "maximum": (f"c = Conv(x, w, b) d = MaxPool<kernel_shape=[2,2]>(c) y = {bn('a', 'd')}", {**W, **norm("a", 5)}, {}),
    "average": (
        f"c = Conv(x, w, b) d = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(c) y = {bn('a', 'd')}",
        {**W, **A},
        {},
    ),
    "mean and reshape": (
        f"c = Conv(x, w, b) d = ReduceMean<keepdims=1>(c, axes) e = Flatten(d) y = {bn('a', 'e')}",
        {**W, "axes": ints(2, 3), **A},
        {},
    ),
    "greatest": (
        f"c = Conv(x, w, b) d = ReduceMax<keepdims=0>(c, axes) y = {bn('a', 'd')}",
        {**W, "axes": ints(2), **norm("a", 5)},
        {},
    ),
    "resize": (
        f'c = Conv(x, w, b) d = Resize<mode="linear">(c, , scales) y = {bn("a", "d")}',
        {**W, "scales": np.array([1, 1, 2, 2], dtype=np.float32), **A},
        {},
    ),
    "edge padding": (
        f'c = Conv(x, w, b) d = Pad<mode="edge">(c, pads) y = {bn("a", "d")}',
        {**W, "pads": ints(0, 0, 1, 0, 0, 0, 1, 2), **A},
        {},
    ),
    "constant per position": (
        f"c = Conv(x, w) d = Add(k, c) y = {bn('a', 'd')}",
        {"w": W["w"], "k": values(1, 4, 1), **A},
        {},
    ),
    "subtracted from a constant": (
        f"c = Conv(x, w) d = Sub(k, c) y = {bn('a', 'd')}",
        {"w": W["w"], "k": values(5, 1, 1), **A},
        {},
    ),
    "minus a constant": (f"c = Conv(x, w) d = Sub(c, k) y = {bn('a', 'd')}", {"w": W["w"], "k": values(1), **A}, {}),
    "times a constant": (
        f"c = Conv(x, w) d = Mul(k, c) y = {bn('a', 'd')}",
        {"w": W["w"], "k": values(5, 1, 1), **A},
        {},
    ),
    "divided": (
        f"c = Conv(x, w) d = Div(c, k) y = {bn('a', 'd')}",
        {"w": W["w"], "k": values(1, 5, 1, 1), **A},
        {},
    ),
    "two norms": (f"c = Conv(x, w, b) d = {bn('a', 'c')} y = {bn('e', 'd')}", {**W, **A, **norm("e", 5)}, {}),
    "a norm that stays takes another": (
        f"d = {bn('a', 'x')} e = {bn('e', 'd')} y = Relu(e)",
        {**norm("a", 4), **norm("e", 4)},
        {"BatchNormalization": 1},
    ),
    "forward": (f"d = {bn('a', 'x')} y = Conv(d, w, b)", {**W, **norm("a", 4)}, {}),
    "forward, groups": (
        f"d = {bn('a', 'x')} y = Conv<group=2>(d, w)",
        {"w": values(6, 2, 3, 3), **norm("a", 4)},
        {},
    ),
    "forward, padded, no shift": (
        f'd = {bn("a", "x")} y = Conv<auto_pad="SAME_UPPER">(d, w, b)',
        {**W, **norm("a", 4, shift=False)},
        {},
    ),
    "forward, two readers": (
        f"d = {bn('a', 'x')} e = Conv(d, w, b) f = Conv(d, w2) y = Add(e, f)",
        {**W, "w2": values(5, 4, 3, 3), **norm("a", 4)},
        {},
    ),
    "forward, transposed": (
        f"d = {bn('a', 'x')} y = ConvTranspose<group=2>(d, w)",
        {"w": values(4, 3, 1, 1), **norm("a", 4)},
        SINGLE,
    ),
    "forward, flattened": (
        f"d = {bn('a', 'x')} e = Flatten(d) y = Gemm<transB=1, alpha=0.5, beta=2.0>(e, w, b)",
        {"w": values(5, 144), "b": values(5), **norm("a", 4)},
        {},
    ),
    "forward, matmul and add": (
        f"d = {bn('a', 'x')} e = Transpose<perm=[0,2,3,1]>(d) f = MatMul(e, w) y = Add(f, b)",
        {"w": values(4, 5), "b": values(5), **norm("a", 4)},
        {"Add": 1},
    ),
    "forward, matmul": (
        f"d = {bn('a', 'x')} e = Transpose<perm=[0,2,3,1]>(d) y = MatMul(e, w)",
        {"w": values(4, 5), **norm("a", 4)},
        {"Add": 1},
    ),
    "forward, concatenated": (
        f"d = {bn('a', 'x')} e = Relu(x) f = Concat<axis=1>(e, d) y = Conv(f, w)",
        {"w": values(5, 8, 3, 3), **norm("a", 4)},
        {},
    ),
    "forward, split": (
        f"d = {bn('a', 'x')} e, f = Split<axis=1, num_outputs=2>(d) g = Conv(e, w) h = Conv(f, w2) y = Add(g, h)",
        {"w": values(5, 2, 3, 3), "w2": values(5, 2, 3, 3), **norm("a", 4)},
        {},
    ),
    "forward, constants": (
        f"d = {bn('a', 'x')} e = Sub(k, d) f = Mul(e, m) g = Sub(f, m) h = Div(g, m) y = Conv(h, w)",
        {"w": W["w"], "k": values(4, 1, 1), "m": values(1, 4, 1, 1) + 3, **norm("a", 4)},
        {},
    ),
    "computed bias": (
        f"z = Constant<value = double {{0.0}}>() n = Shape<start=0, end=1>(w) k = Expand(z, n) "
        f"c = Conv(x, w, k) y = {bn('a', 'c')}",
        {"w": W["w"], **A},
        {"Expand": 0, "Shape": 0, "Constant": 0},
    ),
    "constant node": (
        f"w = Constant<value = double[1,4] {{1.5, 2.0, -3.0, 0.5}}>() c = Gemm<transB=1>(x, w) y = {bn('a', 'c')}",
        norm("a", 1),
        {"x": SMALL},
    ),
    "old operators": (
        f"c = Conv(x, w, b) y = {bn('a', 'c')}",
        {**W, **A},
        {"opset": 7, "ir_version": 3, "overridable": ("w", "b", *A), **SINGLE},
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes(name: str, tmp_path: Path) -> None:
    body, constants, options = CHANGES[name]
    build_options = {
        key: options[key] for key in ("x", "outputs", "opset", "ir_version", "overridable") if key in options
    }
    if options.get("outputs") == "float y":
        constants = {key: array.astype(np.float32) for key, array in constants.items()}
    plan, result = fold(build(body, constants, **build_options), tmp_path)
    if "left" in options:
        assert options["left"] in only_reason(plan)
        return
    counts = operators(result)
    assert counts["BatchNormalization"] == options.get("BatchNormalization", 0)
    for operator in ("Add", "Transpose", "Expand", "Shape", "Constant"):
        if operator in options:
            assert counts[operator] == options[operator]
    assert all(change.into for change in plan.changes)
    assert not [value.name for value in result.graph.initializer if value.name.startswith(("a_m", "a_v"))] or plan.skips


def stored(model: Any) -> dict[str, bytes]:
    return {value.name: onnx.numpy_helper.to_array(value).tobytes() for value in model.graph.initializer}


LEFT: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "read twice": (
        f"c = Conv(x, w, b) y = {bn('a', 'c')} z = Relu(c)",
        {**W, **A},
        {"outputs": "double y, double z"},
        "c (Conv) is also read by z (Relu)",
    ),
    "an output too": (
        f"c = Conv(x, w, b) y = {bn('a', 'c')}",
        {**W, **A},
        {"outputs": "double y, double c"},
        "c (Conv) is also an output of the graph",
    ),
    "training": (
        f"c = Conv(x, w, b) y, m, v = {bn('a', 'c', '<training_mode=1>')}",
        {**W, **A},
        {},
        "it is in training mode",
    ),
    "outputs of training": (
        f"c = Conv(x, w, b) y, m, v, p, q = {bn('a', 'c')}",
        {**W, **A},
        {"opset": 13},
        "it has the outputs of training mode",
    ),
    "overridable weight": (
        f"c = Conv(x, w, b) y = {bn('a', 'c')}",
        {**W, **A},
        {"overridable": ("w",)},
        "its weight 'w' is an input of the graph",
    ),
    "overridable mean": (
        f"c = Conv(x, w, b) y = {bn('a', 'c')}",
        {**W, **A},
        {"overridable": ("a_m",)},
        "its mean 'a_m' is no constant",
    ),
    "quantized weight": (
        f"w = DequantizeLinear(q, f) c = Conv(x, w) y = {bn('a', 'c')}",
        {"q": np.arange(45, dtype=np.int8).reshape(5, 1, 3, 3), "f": np.array(0.5, dtype=np.float32)}
        | {key: array.astype(np.float32) for key, array in A.items()},
        {"x": "float[2,1,6,6]", "outputs": "float y"},
        "its weight 'w' is computed by w (DequantizeLinear)",
    ),
    "a bias of another size": (
        f"c = Conv(x, w, b) y = {bn('a', 'c')}",
        {**W, **A, "b": values(2, 5)},
        {},
        "c (Conv): its bias has shape (2, 5), for 5 channels",
    ),
    "a bias per row": (
        f"c = Gemm(x, w, b) y = {bn('a', 'c')}",
        {"w": values(4, 5), "b": values(3, 1), **A},
        {"x": SMALL},
        "c (Gemm): its bias has shape (3, 1), for 5 channels",
    ),
    "activation": (f"c = Conv(x, w, b) d = Relu(c) y = {bn('a', 'd')}", {**W, **A}, {}, "d (Relu) stands between"),
    "maximum, negative": (
        f"c = Conv(x, w, b) d = MaxPool<kernel_shape=[2,2]>(c) y = {bn('a', 'd')}",
        {**W, **A},
        {},
        "the scale has negative channels",
    ),
    "greatest, negative": (
        f"c = Conv(x, w, b) d = ReduceMax<keepdims=0>(c, axes) y = {bn('a', 'd')}",
        {**W, "axes": ints(2), **A},
        {},
        "d (ReduceMax) is a maximum, and the scale has negative channels",
    ),
    "counted padding": (
        f"c = Conv(x, w, b) d = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(c) "
        f"y = {bn('a', 'd')}",
        {**W, **A},
        {},
        "counts its zero padding",
    ),
    "zero padding": (
        f"c = Conv(x, w, b) d = Pad(c, pads) y = {bn('a', 'd')}",
        {**W, "pads": ints(0, 0, 1, 1, 0, 0, 1, 1), **A},
        {},
        "pads with a constant, and the shift is not zero",
    ),
    "padded channels": (
        f'c = Conv(x, w, b) d = Pad<mode="edge">(c, pads) y = {bn("a", "d")}',
        {**W, "pads": ints(0, 1, 0, 0, 0, 0, 0, 0), **norm("a", 6)},
        {},
        "pads the channels",
    ),
    "forward, padded": (
        f"d = {bn('a', 'x')} y = Conv<pads=[1,1,1,1]>(d, w, b)",
        {**W, **norm("a", 4)},
        {},
        "pads with zeros (or is transposed), and the shift is not zero",
    ),
    "forward, padded by name": (
        f'd = {bn("a", "x")} y = Conv<auto_pad="SAME_LOWER">(d, w, b)',
        {**W, **norm("a", 4)},
        {},
        "pads with zeros",
    ),
    "forward, an output": (
        f"y = {bn('a', 'x')} z = Conv(y, w, b)",
        {**W, **norm("a", 4)},
        {"outputs": "double y, double z"},
        "'y' is an output of the graph",
    ),
    "variance below zero": (
        f"c = Conv(x, w, b) y = {bn('a', 'c')}",
        {**W, **A, "a_v": -A["a_v"]},
        {},
        "a variance is negative",
    ),
    "a single axis": (
        f"c = Mul(x, k) y = {bn('a', 'c')}",
        {"k": values(1), **norm("a", 1)},
        {"x": "double[4]", "outputs": "double[4] y"},
        "its input has a single axis",
    ),
    "added to itself": (
        f"c = Conv(x, w, b) d = Add(c, c) y = {bn('a', 'd')}",
        {**W, **A},
        {},
        "d (Add) adds a tensor to itself",
    ),
    "broadcast branch": (
        f"c = Conv(x, w, b) e = Conv(x, w2) d = Add(c, e) y = {bn('a', 'd')}",
        {**W, "w2": values(1, 4, 3, 3), **A},
        {},
        "it is not proved that both branches have these channels",
    ),
    "the weight is the input": (
        f"c = Conv(k, x) y = {bn('a', 'c')}",
        {"k": values(1, 4, 8, 8), **norm("a", 2)},
        {},
        "x",
    ),
    "shared weight": (
        f"c = Conv(x, w, b) d = Conv<pads=[1,1,1,1]>(x, w, b) y = {bn('a', 'c')} z = Relu(d)",
        {**W, **A},
        {"outputs": "double y, double z"},
        "c (Conv) shares its weight 'w'; unshare gives it a copy",
    ),
    "large values": (
        f"c = Conv(x, w) y = {bn('a', 'c')}",
        {"w": np.full((1, 1, 3, 3), 6e4, dtype=np.float16)}
        | {key: (array * 50 if key == "a_s" else array).astype(np.float16) for key, array in norm("a", 1).items()},
        {"x": "float16[1,1,3,3]", "outputs": "float16 y"},
        "would not be finite in float16",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_left(name: str, tmp_path: Path) -> None:
    body, constants, options, reason = LEFT[name]
    path = save(build(body, constants, **options), tmp_path)
    plan = plan_fold(path)
    assert reason in only_reason(plan)
    plan.apply(tmp_path / "out.onnx")
    before, after = onnx.load(str(path)), onnx.load(str(tmp_path / "out.onnx"))
    assert operators(before) == operators(after)
    assert stored(before) == stored(after)


def test_a_shared_weight_is_copied_when_asked(tmp_path: Path) -> None:
    body, constants, options, _ = LEFT["shared weight"]
    plan, result = fold(build(body, constants, **options), tmp_path, unshare=True)
    assert operators(result)["BatchNormalization"] == 0
    assert plan.changes[0].notes == ("c gets a copy of w",)
    assert {"w", "b"} < {value.name for value in result.graph.initializer}


def test_inside_a_branch(tmp_path: Path) -> None:
    """A subgraph is folded like a graph; what stands outside of it is left."""
    inner = f"c = Conv(x, w, b) d = {bn('a', 'c')}"
    other = f"e = {bn('f', 'k')}"
    body = (
        "s = ReduceSum<keepdims=0>(x) z = Constant<value = double {0.0}>() p = Greater(s, z) k = Conv(x, w2) "
        f"y = If(p) <then_branch = t () => (double[2,5,4,4] d) {{ {inner} }}, "
        f"else_branch = f () => (double[2,5,4,4] e) {{ {other} }}>"
    )
    model = build(body, {**W, "w2": values(5, 4, 3, 3), **A, **norm("f", 5)}, opset=20)
    plan, _ = fold(model, tmp_path)
    assert [change.into for change in plan.changes] == [("c",)]
    assert "outside the subgraph" in only_reason_of_skip(plan)


def only_reason_of_skip(plan: Any) -> str:
    assert len(plan.skips) == 1
    return str(plan.skips[0].reason)


def test_inside_a_function(tmp_path: Path) -> None:
    model = parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 20, "own" : 1]>
        g (float[2,4] x) => (float[2,4] y) { y = own.block (x) }
        <domain: "own", opset_import: ["" : 20]>
        block (x) => (y) {
            s = Constant<value = float[4] {1.0, 1.0, 1.0, 1.0}>()
            y = BatchNormalization (x, s, s, s, s)
        }"""
    )
    assert "it is in the function own::block" in only_reason(plan_fold(save(model, tmp_path)))


def test_before_opset_7(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("BatchNormalization", ["c", "a_s", "a_t", "a_m", "a_v"], ["y"], is_test=1),
    ]
    model = build("", {"w": W["w"], **A}, opset=6, ir_version=3, overridable=("w", *A), outputs="double[2,5,4,4] y")
    model.graph.node.extend(nodes)
    assert "operator set 6 is older than 7" in only_reason(plan_fold(save(model, tmp_path)))


def test_where_and_skip(tmp_path: Path) -> None:
    body = f"c = Conv(x, w, b) d = {bn('a', 'c')} e = Relu(d) y = Conv(e, u) z = {bn('e', 'y')}"
    constants = {**W, "u": values(3, 5, 1, 1), **A, **norm("e", 3)}
    model = build(body, constants, outputs="double z")
    plan, result = fold(model, tmp_path, where="z")
    assert [change.name for change in plan.changes] == ["z"]
    assert [skip.reason for skip in plan.skips] == ["not selected by where"]
    assert operators(result)["BatchNormalization"] == 1


def test_other_norms_are_listed(tmp_path: Path) -> None:
    body = (
        "c = InstanceNormalization(x, s, s) d = LayerNormalization<axis=-1>(c, q) e = MeanVarianceNormalization(d) "
        "y = Relu(e)"
    )
    path = save(build(body, {"s": values(4), "q": values(6)}, outputs="double[2,4,6,6] y"), tmp_path)
    plan = plan_fold(path)
    assert [skip.reason for skip in plan.skips] == [
        "instance computes its statistics from each input",
        "layer computes its statistics from each input",
        "MeanVarianceNormalization is not an operator that is known here",
    ]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float"])
def test_narrow_types(dtype: str, tmp_path: Path) -> None:
    """The fold of a narrow model is that of its values in float64, rounded once."""
    import onnx_ir as ir

    body, constants = f"c = Conv(x, w, b) y = {bn('a', 'c')}", {**W, **A}
    kind = ir.DataType.FLOAT if dtype == "float" else ir.DataType[dtype.upper()]
    narrow = {name: array.astype(kind.numpy()) for name, array in constants.items()}
    wide = {name: array.astype(np.float64) for name, array in narrow.items()}
    _, exact = fold(build(body, wide), tmp_path)
    path = save(build(body, {}, x=f"{dtype}[2,4,6,6]", outputs=f"{dtype}[2,5,4,4] y"), tmp_path)
    model = ir.load(path)
    for name, array in narrow.items():
        value = ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(array.shape))
        value.const_value = ir.Tensor(array, dtype=kind)
        model.graph.initializers[name] = value
        for node in model.graph:
            for index, used in enumerate(node.inputs):
                if used is not None and used.name == name:
                    node.replace_input_with(index, value)
    model.graph.inputs[:] = [value for value in model.graph.inputs if value.name == "x"]
    ir.save(model, path)
    plan_fold(path).apply(tmp_path / "narrow.onnx")
    got = {value.name: value.const_value for value in ir.load(tmp_path / "narrow.onnx").graph.initializers.values()}
    for tensor in exact.graph.initializer:
        wanted = onnx.numpy_helper.to_array(tensor).astype(kind.numpy())
        assert got[tensor.name].dtype == kind
        assert np.array_equal(got[tensor.name].numpy(), wanted)
