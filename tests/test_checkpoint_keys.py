"""Converting by keys and shapes gives what converting the model gives; the recipe leads the model there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

import normswap
import tests.zoo.schemas  # noqa: F401  (before torchvision)
from normswap.checkpoint import Checkpoint, read, write
from normswap.checkpoints.surgery import plan_keys
from normswap.cli import app
from tests.support import distance, randomise
from tests.test_checkpoint import refused

import timm  # isort: skip
import torchvision  # isort: skip

KINDS = ["batch", "frozen", "group", "identity", "instance", "layer", "rms", "switchable", "sync"]
MODELS: dict[str, Callable[[], nn.Module]] = {
    "torchvision resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "torchvision mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=5),
    "timm BatchNormAct2d": lambda: timm.create_model("mobilenetv3_small_050", num_classes=5),
    "timm BatchNorm1d": lambda: timm.create_model("levit_128s", num_classes=5),
}


SMALL = "torchvision mobilenet_v3_small"
"""Becomes every kind; the others, which name their norms otherwise, every second one."""


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> nn.Module:
    return randomise(MODELS[request.param]()).eval()


def memory(state: dict[str, Tensor]) -> Checkpoint:
    return Checkpoint(state, Path("memory.pt"), "torch")


def in_file(model: nn.Module, path: Path) -> Path:
    write(path, model)
    return path


def run(*words: object, status: int = 0) -> Result:
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == status, (result.stdout, result.stderr, result.exception)
    return result


@pytest.mark.parametrize(
    ("model", "kind"),
    [(name, kind) for i, name in enumerate(MODELS) for j, kind in enumerate(KINDS) if name == SMALL or (i + j) % 2],
    indirect=["model"],
)
def test_the_same_as_on_the_model(model: nn.Module, kind: str) -> None:
    surgery = plan_keys(memory(model.state_dict()), kind)
    real = normswap.plan_convert(model, kind)
    wanted = real.apply().state_dict()
    found = surgery.apply()
    if any("may be (N, C)" in skip.reason for skip in real.skips):
        assert any("cannot take" in note for note in surgery.plan.notes)
        with refused("may be (N, C)"):
            normswap.apply_recipe(model, surgery.plan.recipe)
        return
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in wanted.items())
    assert {change.name for change in surgery.plan.changes} == {change.name for change in real.changes}
    assert len(real.changes) > 15 or kind == "batch"
    assert any("without the model's code" in note for note in surgery.plan.notes)
    if real.changes:
        replayed = normswap.apply_recipe(model, json.loads(json.dumps(surgery.plan.recipe)))
        replayed.load_state_dict(dict(found), strict=True)


OWN_LAYERS: dict[str, dict[str, Any]] = {
    "adaptive_instance": {},
    "adaptive_momentum": {"momentum": "warmup:0.1"},
    "conditional": {"classes": 3},
    "domain": {"domains": 3},
    "evonorm_b0": {},
    "evonorm_s0": {"groups": 2},
    "learned_groups": {"groups": 2},
    "multiscale": {"scales": [1, 2]},
    "positional": {},
    "virtual": {"reference_size": 16},
}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.norm = nn.BatchNorm2d(8)


@pytest.mark.parametrize("kind", OWN_LAYERS)
def test_own_layers_by_keys_and_back_by_their_reason(kind: str) -> None:
    model, options = randomise(Small()).eval(), OWN_LAYERS[kind]
    surgery = plan_keys(memory(model.state_dict()), kind, **options)
    wanted = normswap.convert(model, kind, **options).state_dict()
    found = surgery.apply()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in wanted.items())
    replayed = normswap.apply_recipe(model, json.loads(json.dumps(surgery.plan.recipe)))
    replayed.load_state_dict(dict(found), strict=True)
    assert any("(N, C)" in note for note in surgery.plan.notes) == (kind in ("adaptive_instance", "multiscale"))
    wanted = {name: value for name, value in wanted.items() if not name.startswith("stem.0")}
    if kind == "adaptive_momentum":
        assert len(plan_keys(memory(wanted), "batch").plan.skips) == 2, "its keys are a batch norm's"
    elif kind != "adaptive_instance":  # of which nothing is left
        with refused("has no batch norm"):
            plan_keys(memory(wanted), "group")


def test_own_layers_and_their_options_by_command(tmp_path: Path) -> None:
    path = in_file(randomise(Small()), tmp_path / "small.safetensors")
    for kind, options in (("conditional", ["classes=3"]), ("multiscale", ["scales=1,3"]), ("domain", [])):
        words = [word for option in options for word in ("--option", option)]
        run("convert", path, "--to", kind, *words, "-o", tmp_path / f"{kind}.safetensors")
        loaded = normswap.load(Small(), tmp_path / f"{kind}.safetensors")
        assert normswap.read(loaded.norm).kind == kind  # type: ignore[arg-type]
    assert load_file(tmp_path / "conditional.safetensors")["norm.weight"].shape == (3, 8)
    assert load_file(tmp_path / "multiscale.safetensors")["norm.mean_gate"].shape == (2,)
    words = "convert", path, "--to", "adaptive_momentum", "--option", "momentum=seldom", "-o", tmp_path / "no.pt"
    assert "momentum='seldom': it is a number, cumulative" in run(*words, status=2).stderr.replace("\n", " ")
    assert not (tmp_path / "no.pt").exists()


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)
        self.layer = nn.LayerNorm(4)
        self.group = nn.GroupNorm(2, 4)
        self.rms = nn.RMSNorm(4)
        self.plain = nn.BatchNorm1d(4, affine=False)
        self.gated = normswap.convert(nn.BatchNorm2d(4), "switchable")
        self.twice = self.bn
        self.head = nn.Linear(4, 4)


def test_what_keys_do_not_tell_is_skipped_with_the_reason() -> None:
    model = randomise(Mixed())
    surgery = plan_keys(memory(model.state_dict()), "frozen")
    reasons = {skip.name: skip.reason for skip in surgery.plan.skips}
    assert "layer, group or instance norm" in reasons["layer"]
    assert "layer, group or instance norm" in reasons["group"]
    assert "RMS norm" in reasons["rms"]
    assert "mean_gate, var_gate too" in reasons["gated"]
    assert [(change.name, change.aliases) for change in surgery.plan.changes] == [("bn", ("twice",)), ("plain", ())]
    found = surgery.apply()
    assert "twice.num_batches_tracked" not in found
    assert all(torch.equal(found[f"bn.{name}"], found[f"twice.{name}"]) for name in ("weight", "running_var"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bn.running_var": None}, "without running_var"),
        ({"bn.weight": torch.ones(3)}, "not all of one size"),
        ({"bn.parametrizations.weight.original": torch.ones(4), "bn.weight": None}, "parametrization"),
    ],
)
def test_odd_norms_are_skipped(change: dict[str, Tensor | None], reason: str) -> None:
    state = {**nn.Sequential(nn.BatchNorm2d(4)).state_dict(prefix="x"), **nn.BatchNorm2d(4).state_dict(prefix="bn.")}
    state.update({name: value for name, value in change.items() if value is not None})
    state = {name: value for name, value in state.items() if change.get(name, 0) is not None}
    surgery = plan_keys(memory(state), "group")
    assert reason in {skip.name: skip.reason for skip in surgery.plan.skips}["bn"]
    assert [change.name for change in surgery.plan.changes] == ["x0"]


def test_where_and_skip_and_options() -> None:
    model = randomise(MODELS["torchvision resnet18"]())
    surgery = plan_keys(memory(model.state_dict()), "group", where="layer1.*", skip="*.bn2", groups=4)
    assert [change.name for change in surgery.plan.changes] == ["layer1.0.bn1", "layer1.1.bn1"]
    assert surgery.plan.recipe["steps"][0]["options"] == {"groups": 4}
    with refused("nowhere"):
        plan_keys(memory(model.state_dict()), "group", where="nowhere")


def test_without_norms_that_can_be_told() -> None:
    with refused("no batch norm", "--model"):
        plan_keys(memory(nn.LayerNorm(4).state_dict()), "group")
    negative = nn.BatchNorm1d(3).state_dict(prefix="stem.bn.")
    negative["stem.bn.running_var"][0] = -1
    with refused("negative running variance in stem.bn"):
        plan_keys(memory(negative), "group")


@pytest.mark.parametrize(
    ("source", "ending"),
    [
        (".safetensors", ".safetensors"), (".pth", ".safetensors"), (".pth", ".pt"), (".safetensors", ".bin"),
        (".safetensors", "/"),
    ],
)  # fmt: skip
def test_the_command_without_a_model(tmp_path: Path, source: str, ending: str) -> None:
    model = randomise(MODELS["torchvision resnet18"]()).eval()
    path = in_file(model, tmp_path / f"resnet18{source}")
    (tmp_path / "notes.txt").write_text("of somebody else")
    before = path.read_bytes()
    out = tmp_path / f"out{ending}"
    shards = ["--max-shard-size", "20MB"] if ending == "/" else []
    done = run("convert", path, "--to", "group", "-o", f"{tmp_path}/out{ending}", *shards)
    assert "20 changes, 0 skipped" in done.stdout
    assert path.read_bytes() == before
    fresh = torchvision.models.resnet18(num_classes=5)
    fresh.train()
    loaded = normswap.load(fresh, out)
    assert loaded is fresh
    assert all(module.training for module in loaded.modules())
    assert isinstance(fresh.layer1[0].bn1, nn.GroupNorm)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert distance(loaded.eval()(x), normswap.convert(model, "group").eval()(x)) < 1e-5
    if ending == "/":
        assert len(list(out.glob("*.safetensors"))) > 1
        assert not (out / "notes.txt").exists(), "what lies beside a single file is none of its own"
    if ending == ".safetensors":
        recipe = json.loads(read(out).metadata["normswap.recipe"])[-1]
        assert recipe["source"]["file"] == path.name
        assert len(recipe["source"]["sha256"]) == 64
        assert read(out).metadata["normswap.version"] == normswap.__version__


def test_the_command_says_what_needs_the_model(tmp_path: Path) -> None:
    path = in_file(nn.Sequential(nn.BatchNorm2d(3)), tmp_path / "a.pt")
    for words in (["--input", "1x3x4x4"], ["--partial"], ["--verify"]):
        stderr = run("convert", path, "--to", "group", "-o", tmp_path / "b.pt", *words, status=2).stderr
        assert words[0] in stderr
        assert "--model" in stderr
    words = "convert", path, "--to", "group", "-o", tmp_path / "b.pt", "--max-shard-size", "1GB"
    assert "one file" in run(*words, status=2).stderr
    assert not (tmp_path / "b.pt").exists()
    assert not (tmp_path / "b.pt.normswap.json").exists()
    record = json.loads(run("convert", path, "--to", "group", "--dry-run", "--json").stdout)
    assert record["plan"]["changes"][0]["name"] == "0"


NET = """
from torch import nn
def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
"""


def test_apply_and_diff(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    path = in_file(model, tmp_path / "a.safetensors")
    run("convert", path, "--to", "frozen", "-o", tmp_path / "keys.safetensors")
    run("apply", tmp_path / "keys.safetensors", path, "-m", f"{tmp_path}/net.py:net", "-o", tmp_path / "b.safetensors")
    assert "0 not" in run("diff", tmp_path / "keys.safetensors", tmp_path / "b.safetensors").stdout
    (tmp_path / "recipe.json").write_text(read(tmp_path / "keys.safetensors").metadata["normswap.recipe"])
    run("apply", tmp_path / "recipe.json", path, "-m", f"{tmp_path}/net.py:net", "-o", tmp_path / "c.pt")
    assert (tmp_path / "c.pt.normswap.json").exists()
    (tmp_path / "none.json").write_text("[]")
    words = "apply", tmp_path / "none.json", path, "-m", f"{tmp_path}/net.py:net", "-o", tmp_path / "d.pt"
    assert "has no recipe" in run(*words, status=2).stderr

    state = load_file(path)
    state["0.weight"] = state["0.weight"].half()
    state["0.bias"] = state["0.bias"] + 0.5
    state["1.weight"] = torch.ones(5)
    state["new"] = torch.ones(1)
    del state["1.bias"]
    write(tmp_path / "other.pt", state)
    found = json.loads(run("diff", path, tmp_path / "other.pt", "--json").stdout)
    kinds = {each["name"]: each["what"] for each in found["differences"]}
    assert kinds == {"0.weight": "dtype", "0.bias": "value", "1.weight": "shape", "new": "added", "1.bias": "removed"}
    assert found["same"] == 3
    assert abs(next(e for e in found["differences"] if e["name"] == "0.bias")["largest_difference"] - 0.5) < 1e-6


@pytest.mark.parametrize("prefix", ["module.", "model.", "model._orig_mod.", "module.model."])
def test_prefixes_are_kept_and_the_recipe_fits_with_or_without(tmp_path: Path, prefix: str) -> None:
    net: Any = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    torch.save({prefix + name: value for name, value in net.state_dict().items()}, tmp_path / "a.pt")
    (tmp_path / "net.py").write_text(NET)
    for name, words in (("keys.pt", []), ("model.pt", ["-m", f"{tmp_path}/net.py:net"])):
        run("convert", tmp_path / "a.pt", "--to", "group", "-o", tmp_path / name, *words)
        written = torch.load(tmp_path / name, weights_only=True)
        assert list(written) == [prefix + key for key in ("0.weight", "0.bias", "1.weight", "1.bias")]
        fresh = normswap.load(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), tmp_path / name)
        assert isinstance(fresh[1], nn.GroupNorm)  # type: ignore[index]
        assert torch.equal(fresh[1].weight, net[1].weight)  # type: ignore[index]
