"""Where a comparison fails: the place is named, values that a fold moved are not, and the right one is blamed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from normswap.verification import Location, Verification, verify
from normswap.verification.graph import Graph
from normswap.verification.locate import related
from normswap.verification.tracing import trace
from tests.support import randomise


class Block(nn.Module):
    """Functions between and behind its modules, and a branch."""

    def __init__(self, width: int = 6, lost: str = "") -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)
        self.lost = lost

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        out = out if self.lost == "between" else F.silu(out)
        out = self.act(self.bn2(self.conv2(out)) + x)
        return out if self.lost == "behind" else out * torch.sigmoid(out)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.pool = nn.AvgPool2d(2)
        self.late = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.forwards = nn.Sequential(nn.BatchNorm2d(6), nn.AvgPool2d(2), nn.Conv2d(6, 5, 1))
        self.head = nn.Linear(5, 70)

    def forward(self, x: Tensor) -> dict[str, Any]:
        maps = self.blocks(self.stem(x))
        maps = self.drop(self.late(self.pool(self.blocks[0].conv2(maps))))
        maps = self.forwards(maps.relu())
        return {"logits": self.head(maps.mean((2, 3))), "maps": maps}


def network() -> Net:
    torch.manual_seed(0)
    net = Net()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            randomise(module)
    return net.eval()


IMAGE = (torch.randn(2, 3, 14, 14, generator=torch.Generator().manual_seed(3)),)


def faulty(model: nn.Module, change: Callable[[Any], object]) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        change(other)
    return other.eval()


def place(found: Verification) -> Location:
    assert not found
    (location,) = found.locations
    assert str(location) in str(found)
    return location


def negate(tensor: Tensor) -> None:
    tensor[1].neg_()


def replaced(holder: str, name: str, module: nn.Module) -> Callable[[Any], None]:
    return lambda model: setattr(model.get_submodule(holder), name, module)


MODULES = {
    "stem.0": lambda m: negate(m.stem[0].weight),
    "blocks.0.conv1": lambda m: m.blocks[0].conv1.bias.zero_(),
    "blocks.1.conv2": lambda m: m.blocks[1].conv2.weight.mul_(1.001),
    "blocks.0.conv2": lambda m: negate(m.blocks[0].conv2.weight),  # called at two places
    "blocks.1.act": replaced("blocks.1", "act", nn.Identity()),
    "stem.2": replaced("stem", "2", nn.Identity()),
    "pool": replaced("", "pool", nn.MaxPool2d(2)),
    "forwards.2": lambda m: m.forwards[2].bias.add_(0.1),  # behind an affine that a fold moved into it
    "forwards.1": replaced("forwards", "1", nn.MaxPool2d(2)),
    "head": lambda m: m.head.weight[3].mul_(1.01),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("folded", [False, True], ids=["as it is", "folded"])
def test_a_module_is_named(name: str, folded: bool) -> None:
    model = network()
    base = normswap.fold(model) if folded else model
    found = place(verify(model, faulty(base, MODULES[name]), IMAGE, backend="eager"))
    assert (found.name, found.cause, found.run, found.detail) == (name, "model", "eager", "")
    assert any(layer.name == name and (layer.excess is None or layer.excess > 1) for layer in found.around)


def test_nothing_is_named_where_nothing_is_wrong() -> None:
    model = network()
    for base in (model, normswap.fold(model)):
        assert not verify(model, base, IMAGE, backend="eager").locations


NORM_FAULTS: dict[str, Callable[[Any], object]] = {
    "mean": lambda norm: norm.running_mean.mul_(0.9),
    "sign": lambda norm: negate(norm.weight),
    "eps": lambda norm: setattr(norm, "eps", 0.1),
}


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("stem.1", "mean"), ("stem.1", "lost"), ("blocks.2.bn2", "sign"), ("blocks.2.bn2", "mean"),
        ("late", "eps"), ("late", "sign"), ("forwards.0", "lost"), ("forwards.0", "eps"),
    ],
)  # fmt: skip
def test_a_norm_is_named(name: str, fault: str) -> None:
    model = network()

    def change(other: nn.Module) -> None:
        if fault == "lost":
            other.set_submodule(name, nn.Identity())
        else:
            NORM_FAULTS[fault](other.get_submodule(name))

    assert place(verify(model, faulty(model, change), IMAGE, backend="eager")).name == name


@pytest.mark.parametrize("folded", [False, True], ids=["as it is", "folded"])
def test_code_is_named(folded: bool) -> None:
    model = network()
    base = normswap.fold(model) if folded else model
    found = place(
        verify(model, faulty(base, lambda m: setattr(m.blocks[1], "lost", "between")), IMAGE, backend="eager")
    )
    assert (found.name, found.kind) == ("blocks.1", "Block")
    assert found.detail == "in its own code, in front of blocks.1.conv2"
    behind = faulty(base, lambda m: setattr(m.blocks[1], "lost", "behind"))
    found = place(verify(model, behind, IMAGE, backend="eager"))
    assert (found.name, found.kind) == ("blocks.1", "Block")
    assert found.detail == "in its own code, behind the modules in it"


def test_of_several_the_first_is_named() -> None:
    model = network()

    def change(m: Any) -> None:
        m.blocks[2].conv1.weight.mul_(1.1)
        m.head.bias.add_(1)
        m.blocks[1].bn2.running_var.mul_(2)

    assert place(verify(model, faulty(model, change), IMAGE, backend="eager")).name == "blocks.1.bn2"


def test_without_a_float64_run() -> None:
    class Single(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype != torch.float32:
                raise TypeError("float32 only")
            return x.exp()

    model = nn.Sequential(nn.Linear(4, 70), Single(), nn.Linear(70, 70)).eval()
    x = (torch.randn(3, 4),)
    found = verify(model, faulty(model, lambda m: m[2].weight.mul_(1.01)), x, backend="eager")
    assert place(found).name == "2"


def test_other_structure_is_no_obstacle() -> None:
    """The candidate's modules have other names; values are compared with those of any place."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 70), nn.Tanh(), nn.Linear(70, 70)).eval()
    other = nn.ModuleDict({"a": model[0], "c": model[2]})

    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = copy.deepcopy(other)

        def forward(self, x: Tensor) -> Tensor:
            return self.parts["c"](torch.tanh(self.parts["a"](x)))

    x = (torch.randn(3, 4),)
    assert verify(model, Renamed().eval(), x, backend="eager")
    found = verify(model, faulty(Renamed(), lambda m: m.parts["c"].bias.add_(1)), x, backend="eager")
    assert place(found).name == "parts.c"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The network and its fold as files."""
    pytest.importorskip("onnxruntime")
    folder, model = tmp_path_factory.mktemp("files"), network()
    return {
        name: normswap.export(each, folder / f"{name}.onnx", IMAGE, optimize=False, dynamic=True)
        for name, each in (("plain", model), ("folded", normswap.fold(model)))
    }


def edited(source: Path, path: Path, change: Callable[[Any], object]) -> Path:
    import onnx

    proto = onnx.load(source)
    change(proto)
    onnx.save(proto, path)
    return path


def multiplied(name: str, factor: float, rows: slice = slice(None)) -> Callable[[Any], None]:
    """Changes a weight of a file; as :func:`negate` with -1 and one row."""
    from onnx import numpy_helper

    def change(proto: Any) -> None:
        (value,) = (value for value in proto.graph.initializer if value.name == name)
        array = numpy_helper.to_array(value).copy()
        array[rows] *= factor
        value.CopyFrom(numpy_helper.from_array(array, name))

    return change


class TestFiles:
    """An ``.onnx`` file, run by ONNX Runtime."""

    def test_a_weight(self, files: dict[str, Path], tmp_path: Path) -> None:
        model = network()
        assert verify(model, files["folded"], IMAGE)
        path = edited(files["folded"], tmp_path / "wrong.onnx", multiplied("blocks.2.conv1.weight", 1.01))
        found = place(verify(model, path, IMAGE))
        assert (found.name, found.kind, found.cause) == ("blocks.2.conv1", "Conv2d", "model")
        assert found.run == "onnxruntime, graph optimizations off"
        assert found.detail.endswith("(Conv)")
        between_files = place(verify(files["folded"], path, IMAGE))
        assert between_files.name == "blocks.2.conv1"

    def test_a_node_that_is_gone(self, files: dict[str, Path], tmp_path: Path) -> None:
        """Nothing in the file bears its name: what reads it has another value of the reference for input."""

        def change(proto: Any) -> None:
            node = next(node for node in proto.graph.node if node.op_type == "Relu")
            for other in proto.graph.node:
                other.input[:] = [node.input[0] if name == node.output[0] else name for name in other.input]
            proto.graph.node.remove(node)

        for name, source in files.items():
            found = place(verify(network(), edited(source, tmp_path / f"{name}.onnx", change), IMAGE))
            assert (found.name, found.kind) == ("stem.2", "ReLU")
            assert found.detail.startswith("left out in front of")

    def test_a_weight_that_nodes_make(self, tmp_path: Path) -> None:
        """A linear layer on more than two axes is Transpose (of the weight), MatMul, Add in the file."""
        pytest.importorskip("onnxruntime")
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 70)).eval(), (torch.randn(2, 5, 6),)
        source = normswap.export(model, tmp_path / "right.onnx", x, optimize=False)
        for name in ("0", "2"):
            for field in ("weight", "bias"):
                change = multiplied(f"{name}.{field}", -1, slice(1, 2))
                found = place(verify(model, edited(source, tmp_path / f"{name}{field}.onnx", change), x))
                assert (found.name, found.kind) == (name, "Linear")
                assert found.detail.startswith("node ")

    def test_behind_a_sequence(self, tmp_path: Path) -> None:
        """``chunk`` becomes a sequence in the file, whose value is no tensor: it is right if what reads it is."""

        class Halves(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.left, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 70, 1)

            def forward(self, x: Tensor) -> Tensor:
                left, right = self.first(x).chunk(2, dim=1)
                out: Tensor = self.last(torch.cat([self.left(left), right], 1))
                return out

        pytest.importorskip("onnxruntime")
        torch.manual_seed(0)
        model = Halves().eval()
        source = normswap.export(model, tmp_path / "right.onnx", IMAGE, optimize=False, dynamic=True)
        for name in ("first", "left", "last"):
            path = edited(source, tmp_path / f"{name}.onnx", multiplied(f"{name}.weight", -1, slice(1, 2)))
            assert place(verify(model, path, IMAGE)).name == name

    def test_a_loop_between_files(self, tmp_path: Path) -> None:
        """What runs inside a node reads values around it, so the node alone proves nothing against the runtime."""
        onnx = pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
        make, kinds = onnx.helper, onnx.TensorProto

        def loop(factor: float) -> Path:
            def value(name: str, kind: int = kinds.FLOAT, shape: tuple[Any, ...] | None = ("batch", 4)) -> Any:
                return make.make_tensor_value_info(name, kind, shape)

            nodes = [make.make_node("Mul", ["v", "factor"], ["w"]), make.make_node("Identity", ["go"], ["on"])]
            given = [value("i", kinds.INT64, ()), value("go", kinds.BOOL, ()), value("v")]
            body = make.make_graph(nodes, "body", given, [value("on", kinds.BOOL, ()), value("w")])
            nodes = [make.make_node("Relu", ["x"], ["r"])]
            nodes += [make.make_node("Loop", ["times", "", "r"], ["y"], name="loop", body=body)]
            constants = [make.make_tensor("times", kinds.INT64, (), [3])]
            constants += [make.make_tensor("factor", kinds.FLOAT, (), [factor])]
            graph = make.make_graph(nodes, "graph", [value("x")], [value("y")], constants)
            model = make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=9)
            path = tmp_path / f"{factor}.onnx"
            onnx.save(model, path)
            return path

        x = (torch.randn(2, 4),)
        assert verify(loop(1.5), loop(1.5), x)
        found = place(verify(loop(1.5), loop(1.6), x))
        assert (found.name, found.kind, found.cause, found.detail) == ("", "Loop", "model", "node loop (Loop)")

    def test_the_exporter(self, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
        """An exporter that writes another graph than the module computes."""
        from normswap.verification import compare

        def change(proto: Any) -> None:
            pool = next(node for node in proto.graph.node if node.op_type == "AveragePool")
            pool.op_type = "MaxPool"
            for attribute in [a for a in pool.attribute if a.name == "count_include_pad"]:
                pool.attribute.remove(attribute)

        model = network()
        monkeypatch.setattr(compare, "export", lambda module, path, *_, **__: edited(files["plain"], path, change))
        found = place(verify(model, copy.deepcopy(model), IMAGE))
        assert (found.name, found.cause) == ("pool", "exporter")
        assert found.run == "onnxruntime, graph optimizations off"

    def test_the_runtime(self, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A kernel that computes something else than ONNX says: its value is wrong, and so is the output."""
        right = files["plain"]
        wrong = edited(right, tmp_path / "wrong.onnx", multiplied("head.weight", -1, slice(1, 2)))
        run = Graph._run

        def broken(self: Graph, wanted: Any, *, optimized: bool) -> dict[str, Any]:
            values = run(self, wanted, optimized=optimized)
            if self.path == wrong:
                self.model.graph.CopyFrom(__import__("onnx").load(right).graph)
            return values

        monkeypatch.setattr(Graph, "_run", broken)
        found = place(verify(network(), wrong, IMAGE))
        assert (found.name, found.cause) == ("head", "runtime")

    def test_graph_optimizations(self) -> None:
        pytest.importorskip("onnxruntime")
        from tests.test_peers_folding import MatMulTransposeNorm

        torch.manual_seed(0)
        wrong = MatMulTransposeNorm()
        randomise(wrong.norm)
        found = verify(wrong.eval(), copy.deepcopy(wrong), (torch.randn(6, 5),))
        location = place(found)
        assert (location.run, location.cause, location.name) == ("onnxruntime", "runtime optimizations", "norm")
        assert "MatMul → Transpose → BatchNormalization" in location.detail
        assert "without them the same file is right" in str(found)


class TestProfiles:
    def test_of_all_runs_on_request(self) -> None:
        pytest.importorskip("onnxruntime")
        model = network()
        assert verify(model, copy.deepcopy(model), IMAGE, backend="eager").profiles == ()
        found = verify(model, normswap.fold(model), IMAGE, layers=True)
        assert found
        assert [profile.run for profile in found.profiles] == ["eager", "onnxruntime, graph optimizations off"]
        for profile in found.profiles:
            names = [layer.name for layer in profile.layers]
            assert names.index("blocks.0.conv1") < names.index("blocks.1.conv1") < names.index("head")
            last = profile.layers[-1]
            assert last.excess is not None
            assert 0 < last.excess <= 1
            assert last.floor is not None
            assert 0 < last.floor < 1e-5
        moved = next(layer for layer in found.profiles[0].layers if layer.name == "stem.0")
        assert moved.like == "stem.1"

    def test_nothing_is_left_on_the_models(self) -> None:
        model = network()
        other = faulty(model, MODULES["head"])
        verify(model, other, IMAGE, backend="eager")
        for each in (model, other):
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in each.modules())


class TestTracing:
    def test_values_are_those_at_the_time(self) -> None:
        """Writes in place behind a module do not change what was seen of it."""
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
        x = torch.randn(5, 3)
        linear, relu, last, whole = trace(model, (x,)).entries
        with torch.no_grad():
            wanted = model[0](x)
        torch.testing.assert_close(linear.outputs[0], wanted)
        torch.testing.assert_close(relu.outputs[0], wanted.relu())
        assert (relu.sources, last.sources, whole.made_of) == (frozenset({0}), frozenset({1}), frozenset({2}))
        assert (linear.innermost, whole.innermost) == (True, False)

    def test_a_call_that_raised_and_was_caught(self) -> None:
        class Tries(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 5))
                self.second = nn.Linear(3, 4)

            def forward(self, x: Tensor) -> Tensor:
                try:
                    out: Tensor = self.first(x)
                except RuntimeError:
                    out = self.second(x)
                return out.sin()

        x = torch.randn(2, 3)
        found = trace(Tries(), (x,))
        assert [(entry.name, entry.innermost) for entry in found.entries][1:] == [("second", True), ("", False)]
        assert torch.equal(found.entries[-1].inputs[0], x)
        assert found.between[-1].name == ""

    def test_sources_pass_functions_and_nested_values(self) -> None:
        class Splits(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, pair: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
                left, right = self.a(pair["x"]).chunk(2, 1)
                return torch.cat([left, pair["y"]], 1), self.b(torch.cat([right, left], 1).sin()) + left.sum()

        found = trace(Splits(), ({"x": torch.randn(3, 4), "y": torch.randn(3, 2)},))
        assert found.final == {"output[0]": frozenset({0}), "output[1]": frozenset({0, 1})}
        assert found.entries[1].sources == frozenset({0})


def test_related() -> None:
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    scale, shift = torch.tensor([2.0, -1.0, 0.5]).view(3, 1, 1), torch.tensor([0.0, 1.0, 7.0]).view(3, 1, 1)
    assert related(x, x * scale + shift)
    assert related(x.movedim(1, -1), (x * scale + shift).movedim(1, -1))
    assert not related(x, x.relu())
    assert not related(x, x.transpose(2, 3))
    assert not related(x, x[:2])


@pytest.mark.parametrize("batch", [1, 2])
def test_related_on_few_values(batch: int) -> None:
    x = torch.randn(batch, 8, 1, 1, generator=torch.Generator().manual_seed(0))
    assert related(x, x * 0.7 + 0.3)
    assert related(x, x)
    assert not related(x, x.relu())


class Excited(nn.Module):
    """Squeeze and excitation: inside it, one value of each channel and sample."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.act, self.expand = nn.Conv2d(6, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1)
        self.project, self.norm = nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.expand(self.act(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()
        found: Tensor = self.norm(self.project(x * weight))
        return found


@pytest.mark.parametrize("batch", [1, 2])
def test_a_lost_activation_on_few_values_is_named(batch: int) -> None:
    torch.manual_seed(0)
    reference = randomise(Excited()).eval()
    candidate = normswap.fold(reference)
    candidate.act = nn.Identity().eval()
    found = verify(reference, candidate, (torch.randn(batch, 6, 4, 4),), backend="eager")
    assert [location.name for location in found.locations] == ["act"]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()
        self.side = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.act(self.norm(self.conv(x)) + self.side(x))
        return found


def test_a_lost_activation_behind_a_sum_is_named_in_a_file(tmp_path: Path) -> None:
    """The sum has the inputs of the code of its module, not those of the module."""
    torch.manual_seed(0)
    reference = randomise(nn.Sequential(Residual(), Residual(), Residual())).eval()
    candidate = normswap.fold(reference)
    candidate[1].act = nn.Identity().eval()
    x = torch.randn(2, 6, 8, 8)
    path = normswap.export(candidate, tmp_path / "candidate.onnx", (x,), optimize=False)
    found = verify(reference, path, (x,))
    assert {location.name for location in found.locations} == {"1.act"}
