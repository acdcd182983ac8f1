"""Surgery on .pt2 files: what folds and what stays, that the program stays itself, and the command line on it."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F
from typer.testing import CliRunner, Result

import normswap
from normswap import programs
from normswap.cli import app
from normswap.fold import layers as fold_layers
from normswap.programs.plan import ProgramPlan
from tests.support import DOUBLE, distance, randomise

X = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Convolutions of both kinds, a residual sum, a concatenation, a linear layer behind a flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.left = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.BatchNorm2d(4))
        self.right = nn.Sequential(nn.ConvTranspose2d(4, 4, 1, groups=2), nn.Dropout(0.1))
        self.joined = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4, bias=False)
        self.bn = nn.BatchNorm1d(4)
        self.group = nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.stem(x)
        y = y + self.left(y)
        y = F.relu(self.joined(torch.cat([F.max_pool2d(self.left[0](y), 2), F.avg_pool2d(self.right(y), 2)], 1)))
        return {"logits": self.group(self.bn(self.fc(y.mean((2, 3)))))}


def exported(model: nn.Module, path: Path, *inputs: Any, core: bool = False, dynamic: bool = True) -> ExportedProgram:
    """The program of a model with random values, saved at ``path``."""
    model.double().eval()
    randomise(model)
    shapes = tuple({0: Dim("batch")} if dynamic else None for _ in inputs)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, inputs, dynamic_shapes=shapes)
        if core:
            program = program.run_decompositions()
    torch.export.save(program, path, extra_files={"labels.txt": "cat dog"})
    return program


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> tuple[Net, dict[bool, Path]]:
    """A network and its program, as it is exported and with the core operators alone."""
    folder, model = tmp_path_factory.mktemp("programs"), Net()
    paths = {core: folder / f"{core}.pt2" for core in (False, True)}
    for core, path in paths.items():
        exported(model, path, X, core=core)
    return model, paths


def output(path: Path, *inputs: Tensor) -> Tensor:
    found: Any = torch.export.load(path).module()(*inputs)
    return found["logits"] if isinstance(found, dict) else found  # type: ignore[no-any-return]


def folded(model: nn.Module, tmp_path: Path, *inputs: Any, **options: Any) -> ProgramPlan:
    """The plan of a fold, which was made and computes the same."""
    source, out = tmp_path / "a.pt2", tmp_path / "b.pt2"
    exported(model, source, *inputs, **options)
    plan = programs.fold(source, out) if programs.plan_fold(source).changes else programs.plan_fold(source)
    if plan.changes:
        assert distance(output(out, *inputs), output(source, *inputs)) < DOUBLE
    return plan


def reason(plan: ProgramPlan, name: str) -> str:
    return next(skip.reason for skip in plan.skips if skip.name == name)


@pytest.mark.parametrize("core", [False, True], ids=["training", "core"])
def test_a_fold_of_a_whole_network(net: tuple[Net, dict[bool, Path]], tmp_path: Path, core: bool) -> None:
    source, out = net[1][core], tmp_path / "b.pt2"
    before = torch.export.load(source)
    names = [site.name for site in programs.inspect(source)]
    assert names == ["stem.1", "left.1", "joined", "bn", "group"]
    plan = programs.fold(source, out)
    assert {change.name: change.into for change in plan.changes} == {"stem.1": ("stem.0",), "bn": ("fc",)}
    assert reason(plan, "left.1").startswith("backward: left.0 is called at 2 sites and only 1 of them lead to this")
    assert "unshare" not in reason(plan, "left.1")
    assert reason(plan, "group") == "group computes its statistics from each input"
    after = torch.export.load(out)
    batch = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    assert distance(after.module()(batch)["logits"], output(source, batch)) < DOUBLE
    assert after.graph_signature.user_inputs == before.graph_signature.user_inputs
    assert after.graph_signature.user_outputs == before.graph_signature.user_outputs
    assert str(after.range_constraints) == str(before.range_constraints)
    assert [str(after.call_spec.in_spec), str(after.call_spec.out_spec)] == [
        str(before.call_spec.in_spec), str(before.call_spec.out_spec)
    ]  # fmt: skip
    gone = {f"{name}.{last}" for name in ("stem.1", "bn") for last in ("weight", "bias", "running_mean", "running_var")}
    gone |= {"stem.1.num_batches_tracked", "bn.num_batches_tracked"}
    assert set(after.state_dict) == set(before.state_dict) - gone | {"stem.0.bias", "fc.bias"}
    assert all(isinstance(after.state_dict[name], nn.Parameter) for name in ("stem.0.bias", "fc.bias", "fc.weight"))
    assert after.example_inputs is not None
    extra = {"labels.txt": ""}
    torch.export.load(out, extra_files=extra)
    assert extra["labels.txt"] == "cat dog"


def test_the_recipe_is_the_model_s_own_and_what_else_the_file_holds_stays(tmp_path: Path) -> None:
    model = randomise(Pieces(FOLDS["forward"]).double()).eval()
    normswap.export(model, tmp_path / "a.pt2", (X,), metadata={"dataset": "digits"}, recipe={"format": 1, "steps": []})
    programs.fold(tmp_path / "a.pt2", tmp_path / "b.pt2")
    metadata = normswap.read_metadata(tmp_path / "b.pt2")
    assert metadata["dataset"] == "digits"
    first, recipe = json.loads(metadata["normswap.recipe"])
    assert first == {"format": 1, "steps": []}
    replayed = normswap.apply_recipe(model, recipe)
    loaded = normswap.load_exported(tmp_path / "b.pt2")
    assert {k: v.shape for k, v in loaded.state_dict.items()} == {k: v.shape for k, v in replayed.state_dict().items()}
    assert normswap.verify(replayed, loaded, (X,), backend="eager")


class Pieces(nn.Module):
    """One convolution, one norm, and what ``between`` does."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor], **options: Any) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, **options), nn.BatchNorm2d(4)
        self.other = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 2, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self, x)


FOLDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "norm last": lambda m, x: m.bn(m.conv(x)),
    "forward": lambda m, x: m.last(F.avg_pool2d(m.bn(F.relu(m.conv(x))), 2)),
    "views": lambda m, x: m.bn(m.conv(x).flatten(2).unflatten(2, (4, 4))),
    "functional": lambda m, x: F.batch_norm(F.conv2d(x, m.conv.weight), m.bn.running_mean, m.bn.running_var, m.bn.bias),
    "no gradients": lambda m, x: _without_gradients(m, x),
}


def _without_gradients(m: Any, x: Tensor) -> Tensor:
    y = m.bn(m.conv(x))
    with torch.no_grad():
        z = m.last(y) * 1
    return z + y.sum()  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", FOLDS)
def test_folds(tmp_path: Path, case: str) -> None:
    plan = folded(Pieces(FOLDS[case]), tmp_path, X)
    assert [change.name for change in plan.changes] == ["bn"]
    assert not plan.skips


def _trained(m: Any, x: Tensor) -> Tensor:
    return F.batch_norm(m.conv(x), m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias, True)


def _moving(m: Any, x: Tensor) -> Tensor:
    y = m.bn(m.conv(x))
    m.bn.running_mean.mul_(0.5)
    return y  # type: ignore[no-any-return]


def _branch(m: Any, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda y: m.bn(y).clone(), lambda y: y.clone(), (m.conv(x),))


def _overwritten(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.conv(x))
    z = m.bn(y)
    y.add_(1)
    return m.last(z)  # type: ignore[no-any-return]


STAY: dict[str, tuple[Callable[[Any, Tensor], Tensor], str, str]] = {
    "two norms on one convolution": (lambda m, x: m.bn(m.conv(x)) + m.other(m.conv(x)), "bn", "conv"),
    "nothing beside it": (lambda m, x: F.relu(m.bn(F.relu(m.conv(x)))), "bn", "relu"),
    "weight computed": (lambda m, x: F.batch_norm(x, m.bn.running_mean[:3], m.bn.running_var[:3]), "batch_norm",
                        "its running_mean is computed, or written to, by the program"),
    "statistics written to": (_moving, "batch_norm", "its running_mean is computed, or written to, by the program"),
    "train mode": (_trained, "batch_norm", "its running_mean is computed, or written to, by the program"),
    "inside a branch": (_branch, "batch_norm", "it is in a part of the program that is called by another"),
    "input overwritten": (_overwritten, "bn", "changes its input in place"),
    "convolution of a computed weight": (lambda m, x: m.bn(F.conv2d(x, m.conv.weight * 2)), "bn", "conv2d"),
    "without a batch axis": (lambda m, x: m.bn(m.conv(x[0])[None]), "bn", "stands between"),
    "read twice": (lambda m, x: m.bn(m.conv(x)) + m.conv.weight.sum(), "bn", "conv"),
}  # fmt: skip


@pytest.mark.parametrize("case", STAY)
def test_what_cannot_fold_stays_with_a_reason(tmp_path: Path, case: str) -> None:
    forward, name, words = STAY[case]
    plan = folded(Pieces(forward), tmp_path, X, dynamic=False)
    assert not plan.changes
    skip = next(skip for skip in plan.skips if name in skip.name)
    assert words in skip.reason
    assert len({skip.name for skip in plan.skips}) == len(plan.skips)


def test_a_program_that_is_nothing_but_a_norm_keeps_its_output_s_name(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3))
    before = exported(model, tmp_path / "a.pt2", X[:, :, 0])
    programs.fold(tmp_path / "a.pt2", tmp_path / "b.pt2")
    after = torch.export.load(tmp_path / "b.pt2")
    assert after.graph_signature.user_outputs == before.graph_signature.user_outputs == ("batch_norm",)
    assert distance(output(tmp_path / "b.pt2", X[:, :, 0]), model(X[:, :, 0])) < DOUBLE


@pytest.mark.parametrize(
    ("kind", "options", "core"), [("group", {"groups": 2}, False), ("instance", {}, True), ("layer", {}, True)]
)
def test_convert(
    net: tuple[Net, dict[bool, Path]], tmp_path: Path, kind: str, options: dict[str, int], core: bool
) -> None:
    model, paths = net
    plan = programs.convert(paths[core], tmp_path / "b.pt2", kind, skip=["bn", "group"], **options)
    assert [change.name for change in plan.changes] == ["stem.1", "left.1", "joined"]
    wanted = normswap.convert(model, kind, skip=["bn", "group"], **options)(X)["logits"]
    assert distance(output(tmp_path / "b.pt2", X), wanted) < DOUBLE
    assert "joined.running_mean" not in torch.export.load(tmp_path / "b.pt2").state_dict


@pytest.mark.parametrize("options", [{"to": "switchable"}, {"to": "layer", "over": "channels"}])
def test_what_is_no_one_operator_is_refused(net: tuple[Net, dict[bool, Path]], options: dict[str, Any]) -> None:
    with pytest.raises(normswap.NormswapError, match="convert the model itself, then export it"):
        programs.plan_convert(net[1][False], **options)


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pieces") / "a.pt2"
    exported(Pieces(FOLDS["forward"]), path, X)
    return path


class TestCommands:
    @pytest.fixture
    def path(self, pieces: Path, tmp_path: Path) -> Path:
        return Path(shutil.copy(pieces, tmp_path / "a.pt2"))

    def test_inspect(self, path: Path) -> None:
        record = json.loads(command("inspect", path, "--json").stdout)
        assert [(site["name"], site["kind"]) for site in record["sites"]] == [("bn", "batch")]

    def test_a_fold_is_compared_on_the_inputs_in_the_file(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        out = path.with_name("b.pt2")
        result = command("fold", path, "-o", out, "--json")
        assert result.exit_code == 0, result.output
        record = json.loads(result.stdout)
        assert record["verification"]["equivalent"]
        assert record["plan"]["changes"][0]["becomes"] == "folded into last"
        assert command("verify", path, out, "--input", "2x3x6x6:float64").exit_code == 0
        monkeypatch.setattr(fold_layers, "_reached", lambda *a: 0 * a[3].new_zeros(2))
        result = command("fold", path, "-o", path.with_name("c.pt2"))
        assert result.exit_code == 1
        assert sorted(entry.name for entry in path.parent.iterdir()) == ["a.pt2", "b.pt2"]
        assert command("fold", path, "-o", path.with_name("c.pt2"), "--no-verify").exit_code == 0

    def test_convert(self, path: Path) -> None:
        out = path.with_name("b.pt2")
        assert command("convert", path, "--to", "group", "--groups", 2, "-o", out).exit_code == 0
        assert [str(site.norm) for site in programs.inspect(out)] == ["group(4, groups=2, eps=1e-05)"]

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (("fold", "{path}", "-o", "{path}"), "is an input of this run"),
            (("fold", "{path}", "-o", "{folder}/out.pt", "--no-verify"), "name it *.pt2"),
            (("fold", "{path}", "--unshare", "--dry-run"), "--unshare: not for a .pt2 file"),
            (("fold", "{path}"), "where to? Pass -o FILE.pt2"),
            (("convert", "{path}", "--to", "frozen", "--dry-run"), "cannot become 'frozen'"),
            (("inspect", "{path}", "--key", "ema"), "--key: not for a .pt2 file"),
            (("inspect", "{folder}/none.pt2"), "does not exist"),
        ],
    )
    def test_bad_input(self, path: Path, arguments: tuple[str, ...], told: str) -> None:
        result = command(*(argument.format(path=path, folder=path.parent) for argument in arguments))
        assert result.exit_code == 2
        assert told in result.output
