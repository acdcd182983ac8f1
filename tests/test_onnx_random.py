"""Random ONNX graphs: whatever folds, the function stays the same in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")

from onnx import helper, numpy_helper  # noqa: E402

from normswap.onnx.surgery import plan_fold  # noqa: E402
from tests.onnx_support import distance, run, save, values  # noqa: E402


class Maker:
    """Grows a graph from its input, one operation at a time; every shape is known by construction."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}
        self.shapes: dict[str, tuple[int, ...]] = {"x": (2, 4, 5, 6)}
        self.norms = 0

    def pick(self, items: Any) -> Any:
        return items[int(self.random.integers(len(items)))]

    def maybe(self, share: float = 0.5) -> bool:
        return bool(self.random.random() < share)

    def constant(self, *shape: int, positive: bool = False) -> str:
        """A constant; now and then one that is there already."""
        same = [name for name, array in self.constants.items() if array.shape == shape and array.dtype.kind == "f"]
        if same and self.maybe(0.15) and not positive:
            return str(self.pick(same))
        name = f"k{len(self.constants)}"
        array = values(*shape, seed=int(self.random.integers(1 << 30)))
        self.constants[name] = np.abs(array) + 0.3 if positive else array
        return name

    def whole(self, *numbers: int) -> str:
        name = f"k{len(self.constants)}"
        self.constants[name] = np.array(numbers, dtype=np.int64)
        return name

    def add(self, operator: str, inputs: list[str], shape: tuple[int, ...], **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=f"n_{name}", **attributes))
        self.shapes[name] = shape
        return name

    # --- operations --------------------------------------------------------------------------------------------------

    def batch_norm(self, value: str) -> str:
        channels = self.shapes[value][1]
        scale = self.constant(channels, positive=self.maybe())
        if self.maybe(0.3):  # without a shift
            bias = mean = f"k{len(self.constants)}"
            self.constants[bias] = np.zeros(channels)
        else:
            bias, mean = self.constant(channels), self.constant(channels)
        inputs = [value, scale, bias, mean, self.constant(channels, positive=True)]
        self.norms += 1
        return self.add("BatchNormalization", inputs, self.shapes[value])

    def conv(self, value: str) -> str:
        batch, channels, *space = self.shapes[value]
        groups = self.pick([1, 1, 2]) if channels % 2 == 0 else 1
        outputs, kernel, pad = self.pick([2, 4, 6]), self.pick([1, 3]), self.pick([0, 0, 1])
        if min(space) + 2 * pad < kernel:
            kernel, pad = 1, 0
        sizes = [size + 2 * pad - kernel + 1 for size in space]
        inputs = [value, self.constant(outputs, channels // groups, *[kernel] * len(space))]
        inputs += [self.constant(outputs)] if self.maybe() else []
        return self.add("Conv", inputs, (batch, outputs, *sizes), group=groups, pads=[pad] * (2 * len(space)))

    def matmul(self, value: str) -> str:
        shape = self.shapes[value]
        outputs = self.pick([3, 4])
        weight = self.constant(shape[-1], outputs)
        if self.maybe(0.3):
            weight = self.constant(outputs, shape[-1])
            weight = self.add("Transpose", [weight], (shape[-1], outputs), perm=[1, 0])
        product = self.add("MatMul", [value, weight], (*shape[:-1], outputs))
        if self.maybe():
            inputs = [product, self.constant(*[1] * self.pick([0, 1]), outputs)]
            return self.add("Add", inputs if self.maybe() else inputs[::-1], (*shape[:-1], outputs))
        return product

    def transpose(self, value: str) -> str:
        shape = self.shapes[value]
        order = [0, *(1 + self.random.permutation(len(shape) - 1))]
        return self.add("Transpose", [value], tuple(shape[i] for i in order), perm=[int(i) for i in order])

    def reshape(self, value: str) -> str:
        shape = self.shapes[value]
        new = self.pick([(*shape[:2], int(np.prod(shape[2:]))), (shape[0] * shape[1], *shape[2:]), (*shape, 1)])
        if len(new) > 5 or len(new) < 2:
            return value
        return self.add("Reshape", [value, self.whole(*new)], tuple(new))

    def arithmetic(self, value: str) -> str:
        shape = self.shapes[value]
        inner = [size if self.maybe() else 1 for size in shape[int(self.random.integers(len(shape))) :]]
        operator = self.pick(["Add", "Sub", "Mul", "Div"])
        k = self.constant(*inner, positive=operator == "Div")
        inputs = [value, k] if operator == "Div" or self.maybe() else [k, value]
        return self.add(operator, inputs, shape)

    def join(self, value: str) -> str:
        shape = self.shapes[value]
        other = self.pick([name for name, theirs in self.shapes.items() if theirs == shape])
        if self.maybe():
            return self.add(self.pick(["Add", "Sub"]), [value, other], shape)
        axis = self.pick([1, len(shape) - 1])
        joined = tuple(size * (2 if i == axis else 1) for i, size in enumerate(shape))
        return self.add("Concat", [other, value], joined, axis=axis)

    def pool(self, value: str) -> str:
        batch, channels, *space = self.shapes[value]
        if len(space) != 2 or min(space) < 2:
            return value
        if self.maybe(0.4):
            return self.add("ReduceMean", [value, self.whole(2)], (batch, channels, space[1]), keepdims=0)
        shape = (batch, channels, *(size - 1 for size in space))
        return self.add(self.pick(["MaxPool", "AveragePool"]), [value], shape, kernel_shape=[2, 2])

    def pad(self, value: str) -> str:
        shape = self.shapes[value]
        axis = int(self.random.integers(1, len(shape)))
        amounts = [int(i == axis) for i in range(len(shape))]
        padded = tuple(size + amount for size, amount in zip(shape, amounts, strict=True))
        mode = self.pick(["constant", "edge"])
        return self.add("Pad", [value, self.whole(*[0] * len(shape), *amounts)], padded, mode=mode)

    def step(self, value: str) -> str:
        rank = len(self.shapes[value])
        spatial = [self.conv, self.conv, self.pool] if 3 <= rank <= 4 else []
        others: list[Callable[[str], str]] = [
            self.matmul,
            self.transpose,
            self.reshape,
            self.arithmetic,
            self.join,
            self.pad,
        ]
        if self.maybe(0.4):
            return self.batch_norm(value)
        if self.maybe(0.05):
            return self.add("Relu", [value], self.shapes[value])
        return str(self.pick([*spatial, *spatial, *others])(value))

    def model(self) -> Any:
        value = "x"
        for _ in range(int(self.random.integers(3, 12))):
            if self.maybe(0.12):  # another branch
                value = str(
                    self.pick([name for name, shape in self.shapes.items() if len(shape) > 1 and name[0] in "vx"])
                )
            value = self.step(value)
        used = {name for node in self.nodes for name in node.input}
        outputs = [name for node in self.nodes for name in node.output if name not in used or self.maybe(0.04)]
        graph = helper.make_graph(
            self.nodes,
            "random",
            [helper.make_tensor_value_info("x", onnx.TensorProto.DOUBLE, self.shapes["x"])],
            [helper.make_tensor_value_info(name, onnx.TensorProto.DOUBLE, self.shapes[name]) for name in outputs],
            [numpy_helper.from_array(array, name) for name, array in self.constants.items() if name in used],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def check(seed: int, folder: Path) -> tuple[int, int]:
    """Folds one random graph and compares; the norms that folded, and those there were."""
    maker = Maker(seed)
    made = maker.model()
    onnx.checker.check_model(made, full_check=True)
    path = save(made, folder)
    plan = plan_fold(path, unshare=seed % 2 == 1)
    plan.apply(folder / "out.onnx", force=True)
    after = onnx.load(str(folder / "out.onnx"))
    onnx.checker.check_model(after, full_check=True)
    left = sum(node.op_type == "BatchNormalization" for node in after.graph.node)
    assert (len(plan.changes), len(plan.skips)) == (maker.norms - left, left)
    x = values(*maker.shapes["x"], seed=seed)
    wanted = run(made, x)
    assert distance(run(after, x), wanted) < 1e-8, f"seed {seed}"
    return len(plan.changes), maker.norms


def test_random_graphs(tmp_path: Path) -> None:
    counts = [check(seed, tmp_path) for seed in range(60)]
    folded, norms = map(sum, zip(*counts, strict=True))
    assert folded > 0.4 * norms
