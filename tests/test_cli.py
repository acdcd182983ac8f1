"""The command line: what it writes, what it prints, its exit status, and one clear message for every bad input."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner, Result

import normswap
from normswap import outcome, registry
from normswap.cli import app

NET = """
import sys
import time
from pathlib import Path

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=12, norms=True):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.first = nn.BatchNorm2d(width) if norms else nn.Identity()
        self.body = nn.Sequential(nn.Conv2d(width, 8, 1), nn.BatchNorm2d(8) if norms else nn.Identity(), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.body(self.first(self.conv(x))).mean((2, 3)))


def net(width=12):
    return Net(width)


def bare():
    return Net(norms=False)


def mixed():
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.GroupNorm(2, 8))


def lonely():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    for norm in (model[0], model[3]):
        nn.init.normal_(norm.running_mean)
    return model


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.b(self.conv(torch.relu(self.a(self.conv(x)))))


def shared():
    torch.manual_seed(0)
    model = Shared().eval()
    for norm in (model.a, model.b):
        nn.init.normal_(norm.running_mean)
    return model


class Rep(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.point, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.wide(x) + self.norm(self.point(x)) + x


def chatty():
    print("building")
    return Net()


def words():
    return nn.Sequential(nn.Embedding(2, 6), nn.LayerNorm(6))


def layered():
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3, bias=False))
    nn.init.normal_(model[1].weight)
    nn.init.normal_(model[1].bias)
    return model


def broken():
    raise RuntimeError("out of cheese")


def slow(flag):
    Path(flag).touch()
    time.sleep(60)


def number():
    return 7


ready = net()
answer = 42
"""


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.3)
        elif tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.4)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``net.py`` and checkpoints of ``net()``: ``net.pt``, ``net.safetensors``."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("cli")
    (path / "cli_net.py").write_text(NET)
    state = randomise(fresh(path)).state_dict()
    torch.save(state, path / "net.pt")
    save_file(state, path / "net.safetensors", metadata={"author": "me"})
    return path


def fresh(folder: Path, name: str = "net") -> nn.Module:
    from normswap.arguments import build_model

    return build_model(f"{folder}/cli_net.py:{name}", {})


def loaded(folder: Path) -> nn.Module:
    model = fresh(folder).eval()
    model.load_state_dict(torch.load(folder / "net.pt", weights_only=True))
    return model


def loaded_with(folder: Path, path: Path, recipes: list[Any]) -> nn.Module:
    """The model of a checkpoint whose first recipe came with it, after the others."""
    model = normswap.apply_recipe(fresh(folder).eval(), recipes[0])
    model.load_state_dict(load_file(path))
    for recipe in recipes[1:]:
        folded = normswap.plan_fold(model).apply()
        model = normswap.apply_recipe(model, recipe)
        model.load_state_dict(folded.state_dict())
    return model


@pytest.fixture
def run(folder: Path) -> Callable[..., Result]:
    """Run the command line; ``callable`` in ``cli_net.py`` is the model."""

    def run(command: str, *arguments: object, model: str = "net", status: int = 0) -> Result:
        words = [command, "--model", f"{folder}/cli_net.py:{model}", *map(str, arguments)]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == status, (result.stdout, result.stderr, result.exception)
        assert "Traceback" not in result.output
        return result

    return run


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"normswap {normswap.__version__}\n")


def test_help_lists_the_kinds_of_the_registry() -> None:
    result = CliRunner().invoke(app, ["convert", "--help"], env={"COLUMNS": "300"})
    assert ", ".join(registry.kinds()) in " ".join(re.sub("[│\n]", " ", result.stdout).split())


class TestInspect:
    def test_table(self, run: Callable[..., Result], folder: Path) -> None:
        result = run("inspect", folder / "net.pt")
        assert "first" in result.stdout
        assert "body.1" in result.stdout
        assert "2 found: 2 batch" in result.stdout

    def test_json(self, run: Callable[..., Result], folder: Path) -> None:
        sites = json.loads(run("inspect", folder / "net.pt", "--json", "--input", "2x3x6x6").stdout)["sites"]
        assert [site["name"] for site in sites] == ["first", "body.1"]
        assert sites[0] == {
            "name": "first",
            "aliases": [],
            "kind": "batch",
            "computes": "batch(12, eps=1e-05)",
            "channels": 12,
            "reason": None,
            "evidence": "observed",
            "shapes": [[2, 12, 6, 6]],
        }

    def test_without_a_checkpoint_says_whose_weights(self, run: Callable[..., Result]) -> None:
        assert "no checkpoint given" in run("inspect").stderr

    def test_no_norm(self, run: Callable[..., Result]) -> None:
        assert run("inspect", model="bare").stdout == "no normalization found\n"

    def test_what_the_model_prints_stays_out_of_the_json(self, run: Callable[..., Result]) -> None:
        result = run("inspect", "--json", model="chatty")
        assert len(json.loads(result.stdout)["sites"]) == 2
        assert "building" in result.stderr

    def test_integer_input(self, run: Callable[..., Result]) -> None:
        (site,) = json.loads(run("inspect", "--json", "--input", "1x16:int64", model="words").stdout)["sites"]
        assert site["shapes"] == [[1, 16, 6]]

    def test_an_input_larger_than_memory(self, run: Callable[..., Result]) -> None:
        for shape in ("1x3x9999999x9999999", "1x3x999999999999x999999999999999999999"):
            assert "there is no memory for a tensor" in run("inspect", "--input", shape, status=2).stderr

    def test_model_arguments_are_literals(self, run: Callable[..., Result]) -> None:
        (first, _) = json.loads(run("inspect", "--json", "--model-arg", "width=20").stdout)["sites"]
        assert first["channels"] == 20


class TestConvert:
    def test_writes_what_the_api_makes(self, run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "group.pt"
        result = run("convert", folder / "net.pt", "--to", "group", "--groups", 4, "-o", out)
        assert f"wrote {out}\n" in result.stderr
        assert sorted(tmp_path.iterdir()) == [out, tmp_path / "group.pt.normswap.json"]
        expected = normswap.convert(loaded(folder), "group", groups=4)
        written = torch.load(out, weights_only=True)
        assert written.keys() == expected.state_dict().keys()
        torch.testing.assert_close(written, dict(expected.state_dict()), rtol=0, atol=0)

    def test_recipe_rebuilds_the_model_in_python(
        self, run: Callable[..., Result], folder: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "group.pt"
        run("convert", folder / "net.pt", "--to", "group", "--groups", 2, "-o", out)
        model = fresh(folder)
        for recipe in json.loads(Path(f"{out}.normswap.json").read_text()):
            model = normswap.apply_recipe(model, recipe)
        model.load_state_dict(torch.load(out, weights_only=True))
        expected = normswap.convert(loaded(folder), "group", groups=2)
        x = torch.randn(2, 3, 6, 6)
        torch.testing.assert_close(model.double().eval()(x.double()), expected.double()(x.double()), rtol=0, atol=0)

    def test_a_converted_checkpoint_is_a_checkpoint(
        self, run: Callable[..., Result], folder: Path, tmp_path: Path
    ) -> None:
        first, second = tmp_path / "switchable.pt", tmp_path / "group.safetensors"
        run("convert", folder / "net.pt", "--to", "switchable", "--init", "preserve", "-o", first)
        result = run("convert", first, "--to", "layer", "-o", second)
        assert "replayed 1 recipe" in result.stderr
        kinds = [site["kind"] for site in json.loads(run("inspect", second, "--json").stdout)["sites"]]
        assert kinds == ["layer", "layer"]

    def test_safetensors_keeps_metadata_and_holds_the_recipe(
        self, run: Callable[..., Result], folder: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "frozen.safetensors"
        run("convert", folder / "net.safetensors", "--to", "frozen", "-o", out)
        assert list(tmp_path.iterdir()) == [out]
        with safe_open(out, "pt") as file:
            metadata = file.metadata()
        assert metadata["author"] == "me"
        assert len(json.loads(metadata["normswap.recipe"])) == 1

    def test_dry_run_writes_nothing(self, run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
        result = run("convert", folder / "net.pt", "--to", "group", "--dry-run", "-o", tmp_path / "out.pt")
        assert "first" in result.stdout
        assert not list(tmp_path.iterdir())

    def test_json(self, run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "out.pt"
        record = json.loads(run("convert", folder / "net.pt", "--to", "frozen", "--json", "-o", out).stdout)
        assert [change["name"] for change in record["plan"]["changes"]] == ["first", "body.1"]
        assert {change["exactness"] for change in record["plan"]["changes"]} == {"exact"}
        assert record["plan"]["recipe"]
        assert record["written"] == [str(out), f"{out}.normswap.json"]
        assert record["verification"] is None

    @pytest.mark.parametrize(
        ("arguments", "changed"),
        [
            (["--where", "1*"], ["1"]),
            (["--where", "2", "--where", "1"], ["1", "2"]),
            (["--skip", "2"], ["1"]),
            (["--from", "group"], ["2"]),
            (["--from", "group", "--from", "batch", "--skip", "1"], ["2"]),
            (["--from", "batch", "--where", "*"], ["1"]),
            (["--from", "batch", "--where", "*", "--skip", "2"], ["1"]),
        ],
    )
    def test_selection(self, run: Callable[..., Result], arguments: list[str], changed: list[str]) -> None:
        result = run("convert", "--to", "instance", "--dry-run", "--json", *arguments, model="mixed")
        plan = json.loads(result.stdout)["plan"]
        assert [change["name"] for change in plan["changes"]] == changed
        assert len(plan["changes"]) + len(plan["skips"]) == 2

    def test_option(self, run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "out.pt"
        run(
            "convert",
            folder / "net.pt",
            "--to",
            "switchable",
            "--init",
            "preserve",
            "--option",
            "gate_gap=20",
            "-o",
            out,
        )
        assert torch.load(out, weights_only=True)["first.mean_gate"].tolist() == [0.0, 0.0, 20.0]

    def test_force_replaces(self, run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "out.pt"
        out.write_text("old")
        run("convert", folder / "net.pt", "--to", "group", "-o", out, "--force")
        assert "first.weight" in torch.load(out, weights_only=True)

    def test_partial(self, run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
        state = torch.load(folder / "net.pt", weights_only=True)
        state["extra"] = state.pop("head.bias")
        torch.save(state, tmp_path / "odd.pt")
        out = tmp_path / "out.pt"
        refused = run("convert", tmp_path / "odd.pt", "--to", "group", "-o", out, status=2)
        assert "head.bias" in refused.stderr
        assert "extra" in refused.stderr
        assert not out.exists()
        accepted = run("convert", tmp_path / "odd.pt", "--to", "group", "-o", out, "--partial")
        assert "head.bias" in accepted.stderr
        assert out.exists()

    def test_key_chooses_among_state_dicts(self, run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
        state = torch.load(folder / "net.pt", weights_only=True)
        zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        torch.save({"model": zeros, "ema": state}, tmp_path / "both.pt")
        out = tmp_path / "out.pt"
        assert "also holds ema" in run("inspect", tmp_path / "both.pt").stderr
        assert "'best'" in run("inspect", tmp_path / "both.pt", "--key", "best", status=2).stderr
        run("convert", tmp_path / "both.pt", "--key", "ema", "--to", "frozen", "-o", out)
        written = torch.load(out, weights_only=True)
        assert torch.equal(written["ema"]["head.weight"], state["head.weight"])
        assert all(torch.equal(written["model"][name], value) for name, value in zeros.items())


BAD_CONVERSIONS: dict[str, tuple[list[str], list[str]]] = {
    "unknown kind": (["--to", "gruop"], ["'gruop'", *registry.kinds()]),
    "groups that do not divide": (["--to", "group", "--groups", "5", "--dry-run"], ["5", "12 channels", "first"]),
    "option of another kind": (["--to", "frozen", "--groups", "4", "--dry-run"], ["frozen", "groups"]),
    "option twice": (["--to", "group", "--groups", "4", "--option", "groups=2"], ["groups is given twice"]),
    "option without a value": (["--to", "group", "--option", "groups"], ["'groups'", "name=value"]),
    "no output": (["--to", "group"], ["-o FILE", "--dry-run"]),
    "output of unknown format": (["--to", "group", "-o", "{tmp}/out.h5"], ["out.h5", ".safetensors"]),
    "output in no folder": (["--to", "group", "-o", "{tmp}/none/out.pt"], ["none does not exist"]),
    "output exists": (["--to", "group", "-o", "{tmp}/taken.pt"], ["taken.pt", "--force"]),
    "recipe exists": (["--to", "group", "-o", "{tmp}/half.pt"], ["half.pt.normswap.json", "--force"]),
    "output is the input": (["--to", "group", "-o", "{folder}/net.pt", "--force"], ["is an input"]),
    "nothing selected": (["--to", "group", "--where", "nowhere", "--dry-run"], ["nowhere"]),
    "no such source kind": (["--to", "group", "--from", "rms", "--dry-run"], ["rms", "it has: batch"]),
    "input that is no shape": (["--to", "group", "--dry-run", "--input", "1,3,6,6"], ["1,3,6,6", "1x3x224x224"]),
    "input of unknown dtype": (["--to", "group", "--dry-run", "--input", "1x3:floaty"], ["'floaty'", "int64"]),
    "input the model cannot take": (["--to", "group", "--dry-run", "--input", "1x4x6x6"], ["4"]),
    "unknown init": (["--to", "group", "--init", "warm", "--dry-run"], ["warm", "preserve"]),
}


class TestCalibrate:
    """``convert --data``: the new norms are fitted on unlabelled inputs."""

    @pytest.fixture
    def images(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp("data") / "images.npy"
        numpy.save(path, torch.randn(20, 3, 6, 6, generator=torch.Generator().manual_seed(0)).numpy())
        return path

    def test_writes_what_the_api_makes(
        self, run: Callable[..., Result], folder: Path, tmp_path: Path, images: Path
    ) -> None:
        flags = ("convert", folder / "net.pt", "--to", "group", "--groups", 2, "--data", images, "--batch-size", 8)
        result = run(*flags, "-o", tmp_path / "a.pt")
        assert "calibration: 2 norms fitted on 3 batches" in result.stdout
        values = torch.from_numpy(numpy.load(images))
        expected = normswap.convert(loaded(folder), "group", groups=2, calibration=list(values.split(8)))
        written = torch.load(tmp_path / "a.pt", weights_only=True)
        torch.testing.assert_close(written, dict(expected.state_dict()), rtol=1e-6, atol=1e-6)
        copied = normswap.convert(loaded(folder), "group", groups=2).state_dict()
        assert not torch.equal(written["first.weight"], copied["first.weight"])
        record = json.loads(run(*flags, "-o", tmp_path / "b.pt", "--json", "--refine", 3).stdout)
        assert set(record["calibration"]["scores"]) == {"unchanged", "moments", "least_squares", "refined"}
        assert record["calibration"]["layers"] == []

    def test_groups_are_chosen(self, run: Callable[..., Result], folder: Path, tmp_path: Path, images: Path) -> None:
        flags = ("convert", folder / "net.pt", "--to", "group", "--groups", "auto")
        record = json.loads(run(*flags, "--data", images, "-o", tmp_path / "a.pt", "--json").stdout)
        assert len(record["plan"]["changes"]) == 2
        assert "pass calibration=batches" in run(*flags, "--dry-run", status=2).stderr

    def test_a_callable_gives_batches(self, run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
        (folder / "cli_data.py").write_text(
            "import torch\ndef batches():\n    return [torch.ones(4, 3, 6, 6), torch.randn(4, 3, 6, 6)]\nnothing = 3\n"
        )
        flags = ("convert", folder / "net.pt", "--to", "group", "--groups", 2, "-o", tmp_path / "a.pt", "--data")
        assert "on 2 batches" in run(*flags, f"{folder}/cli_data.py:batches").stdout
        for name, words in (
            (f"{folder}/cli_data.py:nothing", "it must be an iterable of batches"),
            (f"{folder}/cli_data.py:absent", "--data: "),
            ("absent.npy", "cannot be read as inputs"),
            ("images.jpg", "write package.module:callable"),
        ):
            assert words in run(*flags, name, "--force", status=2).stderr

    @pytest.mark.parametrize("groups", ["2", "auto"])
    def test_data_that_the_model_does_not_take(
        self, run: Callable[..., Result], folder: Path, tmp_path: Path, groups: str
    ) -> None:
        numpy.save(tmp_path / "x.npy", numpy.zeros((4, 5, 6, 6), dtype="f"))
        flags = ("--to", "group", "--groups", groups, "--data", tmp_path / "x.npy", "-o", tmp_path / "a.pt")
        said = run("convert", folder / "net.pt", *flags, status=2).stderr
        assert "the model does not run on batch 0: RuntimeError" in said
        assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]

    def test_a_generator_loses_no_batch(self, run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
        (folder / "cli_generator.py").write_text(
            "import torch\ndef batches():\n    yield torch.ones(4, 3, 6, 6)\n    yield torch.randn(4, 3, 6, 6)\n"
        )
        flags = ("convert", folder / "net.pt", "--to", "group", "-o", tmp_path / "a.pt")
        flags = (*flags, "--data", f"{folder}/cli_generator.py:batches", "--groups")
        assert "on 2 batches" in run(*flags, 2).stdout
        assert "gone over only once, but --groups auto" in run(*flags, "auto", "--force", status=2).stderr
        assert "gone over only once, but --refine" in run(*flags, 2, "--refine", 2, "--force", status=2).stderr

    @pytest.mark.parametrize(
        ("last", "words"),
        [
            ("torch.randn(4, 5, 6, 6)", "does not run on batch 1: RuntimeError"),
            ("1 / 0", "no batch 1: ZeroDivisionError"),
        ],
    )
    def test_a_later_batch_fails(
        self, run: Callable[..., Result], folder: Path, tmp_path: Path, last: str, words: str
    ) -> None:
        (folder / "cli_later.py").write_text(
            "import torch\nclass Batches:\n    def __iter__(self):\n        yield torch.randn(4, 3, 6, 6)\n"
            f"        yield {last}\n"
        )
        flags = ("--data", f"{folder}/cli_later.py:Batches")
        for groups in (2, "auto"):
            converted = ("convert", folder / "net.pt", "--to", "group", "--groups", groups, "-o", tmp_path / "a.pt")
            assert words in run(*converted, *flags, status=2).stderr
        assert words in run("inspect", folder / "net.pt", *flags, status=2).stderr
        assert list(tmp_path.iterdir()) == []

    def test_refine_needs_data(self, run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
        result = run("convert", folder / "net.pt", "--to", "group", "--refine", 5, "-o", tmp_path / "a.pt", status=2)
        assert "--refine needs inputs: pass --data FILE" in result.stderr
        result = run(
            "convert", folder / "net.pt", "--to", "group", "--refine-layers", "-o", tmp_path / "a.pt", status=2
        )
        assert "--refine-layers is for a distillation: pass --refine STEPS" in result.stderr
        assert list(tmp_path.iterdir()) == []


class TestBadInput:
    @pytest.mark.parametrize("case", BAD_CONVERSIONS)
    def test_convert(self, run: Callable[..., Result], folder: Path, tmp_path: Path, case: str) -> None:
        (tmp_path / "taken.pt").write_text("mine")
        (tmp_path / "half.pt.normswap.json").write_text("mine")
        arguments, expected = BAD_CONVERSIONS[case]
        filled = [argument.format(tmp=tmp_path, folder=folder) for argument in arguments]
        result = run("convert", folder / "net.pt", *filled, status=2)
        for text in expected:
            assert text in result.stderr
        assert {path.read_text() for path in tmp_path.iterdir()} == {"mine"}
        assert len(list(tmp_path.iterdir())) == 2

    @pytest.mark.parametrize(
        ("model", "expected"),
        [
            ("net.py", ["write package.module:callable or path/file.py:callable"]),
            ("no_such_module:net", ["no module 'no_such_module'"]),
            ("torch.no_such_part:net", ["no module 'torch.no_such_part'"]),
            ("no_such_file.py:net", ["no file 'no_such_file.py'"]),
            ("{folder}/cli_net.py:nett", ["has no 'nett'", "net", "mixed"]),
            ("{folder}/cli_net.py:broken", ["broken()", "RuntimeError: out of cheese"]),
            ("{folder}/cli_net.py:number", ["returned a int"]),
            ("{folder}/cli_net.py:answer", ["is a int, not a callable"]),
            ("{folder}/syntax.py:net", ["importing", "SyntaxError"]),
        ],
    )
    def test_model(self, folder: Path, model: str, expected: list[str]) -> None:
        (folder / "syntax.py").write_text("def net(:")
        result = CliRunner().invoke(app, ["inspect", "--model", model.format(folder=folder)])
        assert result.exit_code == 2
        for text in expected:
            assert text in result.stderr

    def test_model_argument_the_callable_does_not_take(self, run: Callable[..., Result]) -> None:
        assert "height=3" in run("inspect", "--model-arg", "height=3", status=2).stderr

    def test_module_instance_is_a_model_but_takes_no_arguments(self, run: Callable[..., Result]) -> None:
        assert "2 found" in run("inspect", model="ready").stdout
        assert "--model-arg has no use" in run("inspect", "--model-arg", "a=1", model="ready", status=2).stderr

    def test_no_model(self) -> None:
        result = CliRunner().invoke(app, ["inspect"])
        assert result.exit_code == 2
        assert "--model" in result.stderr

    def test_no_such_checkpoint(self, run: Callable[..., Result]) -> None:
        assert "absent.pt" in run("inspect", "absent.pt", status=2).stderr

    @pytest.mark.parametrize("name", ["text.pt", "text.safetensors"])
    def test_not_a_checkpoint(self, run: Callable[..., Result], tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("hello")
        assert name in run("inspect", tmp_path / name, status=2).stderr

    def test_checkpoint_of_another_model(self, run: Callable[..., Result], folder: Path) -> None:
        result = run("inspect", folder / "net.pt", "--model-arg", "width=20", status=2)
        assert "conv.weight" in result.stderr

    def test_recipe_that_is_no_json(self, run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
        (tmp_path / "net.pt").write_bytes((folder / "net.pt").read_bytes())
        (tmp_path / "net.pt.normswap.json").write_text("{")
        assert "--no-recipe" in run("inspect", tmp_path / "net.pt", status=2).stderr
        run("inspect", tmp_path / "net.pt", "--no-recipe")

    def test_checkpoint_replaced_under_its_recipe(
        self, run: Callable[..., Result], folder: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out.pt"
        run("convert", folder / "net.pt", "--to", "switchable", "-o", out)
        out.write_bytes((folder / "net.pt").read_bytes())
        message = run("inspect", out, status=2).stderr
        assert "mean_gate" in message
        assert "--no-recipe" in message
        run("inspect", out, "--no-recipe")

    def test_no_norm_found(self, run: Callable[..., Result]) -> None:
        result = run("convert", "--to", "group", "--dry-run", model="bare", status=2)
        assert "no normalization found" in result.stderr

    def test_json_is_whole_when_there_is_nothing_to_change(self, run: Callable[..., Result]) -> None:
        result = run("convert", "--to", "group", "--dry-run", "--json", model="bare", status=2)
        assert json.loads(result.stdout)["plan"]["changes"] == []

    def test_unknown_command(self) -> None:
        assert CliRunner().invoke(app, ["swap"]).exit_code == 2


class TestFold:
    def test_verified_and_loads_again(self, run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "folded.pt"
        record = json.loads(run("fold", folder / "net.pt", "--input", "2x3x6x6", "--json", "-o", out).stdout)
        assert record["verification"]
        assert len(record["plan"]["changes"]) == 2
        assert run("inspect", out).stdout == "no normalization found\n"
        run("verify", folder / "net.pt", out, "--input", "2x3x6x6")

    def test_without_input_it_is_not_verified(self, run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
        result = run("fold", folder / "net.pt", "--json", "-o", tmp_path / "folded.pt")
        assert json.loads(result.stdout)["verification"] is None

    def test_verify_needs_input(self, run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
        result = run("fold", folder / "net.pt", "--verify", "-o", tmp_path / "folded.pt", status=2)
        assert "--input" in result.stderr
        assert not list(tmp_path.iterdir())

    def test_a_failed_check_writes_nothing(
        self, run: Callable[..., Result], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = outcome.compare

        def shifted(reference: nn.Module, candidate: nn.Module, *rest: Any, **options: Any) -> Any:
            candidate.get_parameter("head.bias").data += 0.1
            return real(reference, candidate, *rest, **options)

        monkeypatch.setattr(outcome, "compare", shifted)
        result = run("fold", folder / "net.pt", "--input", "2x3x6x6", "-o", tmp_path / "folded.pt", status=1)
        assert "is not written" in result.stderr
        assert not list(tmp_path.iterdir())

    def test_merged_branches(self, run: Callable[..., Result], tmp_path: Path) -> None:
        torch.manual_seed(0)
        out = tmp_path / "merged.safetensors"
        shown = run("fold", "--merge-branches", "--input", "2x3x6x6", "-o", out, model="Rep").stdout
        assert "merged: wide takes in point, identity (3x3, in the model)" in shown
        assert set(load_file(out)) == {"wide.weight", "wide.bias"}
        run("verify", out, out, "--input", "2x3x6x6", model="Rep")

    @pytest.mark.parametrize(("flags", "left"), [([], "affine"), (["--keep-batchnorm"], "batch")])
    def test_what_no_layer_absorbs(
        self, run: Callable[..., Result], tmp_path: Path, flags: list[str], left: str
    ) -> None:
        torch.manual_seed(0)
        out = tmp_path / "folded.pt"
        run("fold", "--input", "2x3x6x6", "-o", out, *flags, model="lonely")
        (site,) = json.loads(run("inspect", out, "--json", model="lonely").stdout)["sites"]
        assert (site["name"], site["kind"]) == ("0", left)

    def test_unshared_layers_load_again(self, run: Callable[..., Result], tmp_path: Path) -> None:
        out = tmp_path / "folded.pt"
        flags = ("fold", "--input", "2x3x6x6", "--json", "-o", out, "--unshare")
        record = json.loads(run(*flags, model="shared").stdout)
        assert record["verification"]
        assert record["plan"]["new_bytes"] == (9 + 3) * 4
        assert run("inspect", out, model="shared").stdout == "no normalization found\n"
        assert "conv_1.weight" in torch.load(out, weights_only=True)

    def test_affine(self, run: Callable[..., Result], tmp_path: Path) -> None:
        torch.manual_seed(0)
        out = tmp_path / "folded.pt"
        record = json.loads(run("fold", "--affine", "--input", "2x6", "--json", "-o", out, model="layered").stdout)
        assert record["verification"]
        (change,) = record["plan"]["changes"]
        assert change["becomes"] == "layer(6, eps=1e-05, no affine), affine folded into 2"
        (site,) = json.loads(run("inspect", out, "--json", model="layered").stdout)["sites"]
        assert site["kind"] == "layer"
        assert "1.weight" not in torch.load(out)


class TestProof:
    """``--verify`` and ``--report`` of the commands that change a model."""

    def test_an_exact_conversion_is_checked(self, run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "frozen.pt"
        flags = ("convert", folder / "net.pt", "--to", "frozen", "--json", "-o", out)
        assert json.loads(run(*flags, "--input", "2x3x6x6").stdout)["verification"]["equivalent"] is True
        assert json.loads(run(*flags, "--force").stdout)["verification"] is None
        unchecked = run(*flags, "--force", "--input", "2x3x6x6", "--no-verify")
        assert json.loads(unchecked.stdout)["verification"] is None
        assert "nothing to verify" not in unchecked.stderr

    def test_another_function_is_not(self, run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "group.pt"
        flags = ("convert", folder / "net.pt", "--to", "group", "--input", "2x3x6x6", "-o", out)
        result = run(*flags)
        assert "nothing to verify: 2 of 2 changes give another function, first (approximate) first" in result.stderr
        assert out.exists()
        refused = run(*flags, "--verify", "--force", status=2)
        assert "first (approximate), body.1 (approximate)" in refused.stderr

    def test_verify_needs_an_input(self, run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
        flags = ("convert", folder / "net.pt", "--to", "frozen", "--verify", "-o", tmp_path / "out.pt")
        assert "--input" in run(*flags, status=2).stderr

    @pytest.mark.parametrize("command", [("fold",), ("convert", "--to", "frozen")])
    def test_a_failure_writes_the_report_alone(
        self,
        run: Callable[..., Result],
        folder: Path,
        tmp_path: Path,
        command: tuple[str, ...],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        real = outcome.compare

        def shifted(reference: nn.Module, candidate: nn.Module, *rest: Any, **options: Any) -> Any:
            candidate.get_parameter("head.bias").data += 0.1
            return real(reference, candidate, *rest, **options)

        monkeypatch.setattr(outcome, "compare", shifted)
        name, *flags = command
        page = tmp_path / "report.html"
        arguments = (folder / "net.pt", *flags, "--input", "2x3x6x6", "-o", tmp_path / "out.pt", "--report", page)
        result = run(name, *arguments, status=1)
        assert list(tmp_path.iterdir()) == [page]
        assert f"wrote {page}" in result.stderr
        text = page.read_text(encoding="utf-8")
        assert "Not equivalent</h1>" in text
        assert "first differs: head" in text
        assert "Changes (2)" in text

    def test_report_of_a_plan(self, run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
        page = tmp_path / "plan.md"
        run("convert", folder / "net.pt", "--to", "group", "--dry-run", "--report", page)
        assert page.read_text(encoding="utf-8").startswith("## ➖ Not verified: net.pt: convert to group\n")

    @pytest.mark.parametrize(
        ("report", "message"), [("report.pdf", ".html or .md"), ("taken.md", "--force"), ("no/report.md", "does not")]
    )
    def test_bad_report(
        self, run: Callable[..., Result], folder: Path, tmp_path: Path, report: str, message: str
    ) -> None:
        (tmp_path / "taken.md").write_text("mine")
        path, out = tmp_path / report, tmp_path / "out.pt"
        for command in (("fold", folder / "net.pt", "-o", out), ("verify", folder / "net.pt", folder / "net.pt")):
            result = run(*command, "--input", "2x3x6x6", "--report", path, status=2)
            assert message in result.stderr
        assert [each.read_text() for each in tmp_path.iterdir()] == ["mine"]


@pytest.fixture(scope="module")
def exported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``net.onnx`` and ``net.pt2`` of ``net.pt``, inputs in ``x.npy``, and ``other.pt2``."""
    path = tmp_path_factory.mktemp("exported")
    x = torch.randn(2, 3, 6, 6)
    model = loaded(folder)
    normswap.export(model, path / "net.onnx", (x,))
    torch.export.save(torch.export.export(model, (x,), strict=False), path / "net.pt2")
    model.get_parameter("head.bias").data += 0.1
    torch.export.save(torch.export.export(model, (x,), strict=False), path / "other.pt2")
    numpy.save(path / "x.npy", x.numpy())
    return path


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's copy of an exported program
class TestVerify:
    def verify(self, *arguments: object, status: int = 0) -> Result:
        result = CliRunner().invoke(app, ["verify", *map(str, arguments)])
        assert result.exit_code == status, (result.stdout, result.stderr, result.exception)
        return result

    @pytest.mark.parametrize("names", [("net.pt2", "net.onnx"), ("net.onnx", "net.onnx")])
    def test_files_need_no_model(self, exported: Path, names: tuple[str, str]) -> None:
        reference, candidate = (exported / name for name in names)
        result = self.verify(reference, candidate, "--input", "2x3x6x6")
        assert result.stdout.startswith("equivalent")

    def test_files_that_differ(self, exported: Path) -> None:
        result = self.verify(exported / "net.pt2", exported / "other.pt2", "--input", "2x3x6x6", status=1)
        assert result.stdout.startswith("NOT equivalent")

    def test_checkpoint_against_a_file(self, run: Callable[..., Result], folder: Path, exported: Path) -> None:
        run("verify", folder / "net.pt", exported / "net.pt2", "--input", "2x3x6x6")
        run("verify", exported / "net.pt2", folder / "net.pt", "--input", "2x3x6x6")
        missing = self.verify(folder / "net.pt", exported / "net.pt2", "--input", "2x3x6x6", status=2)
        assert "net.pt is a checkpoint: pass --model" in missing.stderr

    def test_data(self, exported: Path) -> None:
        pair = (exported / "net.pt2", exported / "net.pt2", "--json", "--data", exported / "x.npy")
        alone = json.loads(self.verify(*pair).stdout)
        assert [each["name"] for each in alone["inputs"]][:2] == ["given", "seed 0, magnitude 1"]
        beside = json.loads(self.verify(*pair, "--input", "2x3x6x6").stdout)
        assert [each["name"] for each in beside["inputs"]][:2] == ["given", "x.npy"]
        assert "absent.npy" in self.verify(*pair[:2], "--data", "absent.npy", status=2).stderr
        assert "--data FILE" in self.verify(*pair[:2], status=2).stderr

    @pytest.mark.parametrize(
        ("flags", "status"),
        [
            (["--atol", "0.2"], 0),
            (["--atol", "0.01"], 1),
            (["--atol", "output=0.2", "--rtol", "output=1e-6"], 0),
            (["--rtol", "1e-6"], 1),
        ],
    )
    def test_tolerances(self, exported: Path, flags: list[str], status: int) -> None:
        pair = (exported / "net.pt2", exported / "other.pt2", "--input", "2x3x6x6")
        assert "criterion: |candidate - reference|" in self.verify(*pair, *flags, status=status).stdout

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--atol", "small"], "--atol 'small': write a number, or OUTPUT=NUMBER"),
            (["--rtol", "output="], "--rtol 'output=': write a number"),
            (["--atol", "1", "--atol", "2"], "the number for all outputs is given twice"),
            (["--atol", "a=1", "--atol", "a=2"], "a is given twice"),
            (["--atol", "1", "--atol", "a=2"], "not both"),
            (["--atol=-1"], "at least 0"),
            (["--atol", "logits=1"], "there is: output"),
        ],
    )
    def test_bad_tolerances(self, exported: Path, flags: list[str], message: str) -> None:
        result = self.verify(exported / "net.pt2", exported / "net.pt2", "--input", "2x3x6x6", *flags, status=2)
        assert message in result.stderr

    @pytest.mark.parametrize(
        ("candidate", "status", "word"), [("net", 0, "Equivalent"), ("other", 1, "Not equivalent")]
    )
    def test_reports(self, exported: Path, tmp_path: Path, candidate: str, status: int, word: str) -> None:
        pair = (exported / "net.pt2", exported / f"{candidate}.pt2", "--input", "2x3x6x6")
        for path in (tmp_path / "report.html", tmp_path / "report.md"):
            self.verify(*pair, "--report", path, status=status)
            assert word in path.read_text(encoding="utf-8")
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert f"{candidate}.pt2 compared with net.pt2" in page
        assert page.count("<svg ") == 1
        self.verify(*pair, "--report", tmp_path / "report.md", status=2)
        self.verify(*pair, "--report", tmp_path / "report.md", "--force", status=status)


class TestExportAndVerify:
    @pytest.mark.parametrize("fold", [[], ["--fold"]])
    def test_onnx_agrees(self, run: Callable[..., Result], folder: Path, tmp_path: Path, fold: list[str]) -> None:
        out = tmp_path / "net.onnx"
        run("export", folder / "net.pt", "--input", "2x3x6x6", "-o", out, *fold)
        run("verify", folder / "net.pt", out, "--input", "2x3x6x6")
        refused = run("export", folder / "net.pt", "--input", "2x3x6x6", "-o", out, status=2)
        assert "--force" in refused.stderr

    def test_what_leads_to_the_weights_is_in_the_file(
        self, run: Callable[..., Result], folder: Path, tmp_path: Path
    ) -> None:
        converted, out = tmp_path / "group.safetensors", tmp_path / "net.onnx"
        run("convert", folder / "net.pt", "--to", "group", "--groups", "2", "--where", "first", "-o", converted)
        shape = ("--input", "2x3x6x6")
        run("export", converted, *shape, "--fold", "-o", out, "--external-data", "--metadata", "made by=me=you")
        assert out.with_name("net.onnx.data").stat().st_size > 0
        found = normswap.read_metadata(out)
        assert found["made by"] == "me=you"
        recipes = json.loads(found["normswap.recipe"])
        assert [[step["name"] for step in recipe["steps"]] for recipe in recipes] == [["first"], ["body.1"]]
        model = loaded_with(folder, converted, recipes)
        assert found["normswap.weights.sha256"] == normswap.state_digest(model)

    def test_pt2_with_open_axes(self, run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
        out, shape = tmp_path / "net.pt2", ("--input", "2x3x6x6")
        run(
            "export", folder / "net.pt", *shape, "-o", out, "--dynamic", "x:0=batch,2=height", "--dynamic", "x:-1=width"
        )
        x = torch.randn(1, 3, 9, 7)
        torch.testing.assert_close(normswap.load_exported(out).module()(x), loaded(folder)(x))
        assert "normswap.recipe" not in normswap.read_metadata(out)
        out = tmp_path / "batch.pt2"
        run("export", folder / "net.pt", *shape, "-o", out, "--dynamic-batch")
        assert normswap.load_exported(out).module()(x[:, :, :6, :6].expand(5, 3, 6, 6)[..., [0] * 6]).shape == (5, 5)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--dynamic", "0=batch"], "write ARGUMENT:AXIS=NAME"),
            (["--dynamic", "x:batch"], "'batch' is not AXIS=NAME"),
            (["--dynamic", "x:0=a", "--dynamic", "x:0=b"], "axis 0 of x is named twice"),
            (["--dynamic", "y:0=a"], "'y', which is no argument that example_inputs give to Net.forward; those are: x"),
            (["--dynamic", "x:0=a", "--dynamic-batch"], "are given both"),
            (["--metadata", "text"], "write it as name=value"),
            (["--opset", "18"], "are for .onnx files"),
        ],
    )
    def test_bad_input(
        self, run: Callable[..., Result], folder: Path, tmp_path: Path, arguments: list[str], words: str
    ) -> None:
        out = tmp_path / "net.pt2"
        refused = run("export", folder / "net.pt", "--input", "2x3x6x6", "-o", out, *arguments, status=2)
        assert words in refused.stderr
        assert not out.exists()

    def test_onnx_of_another_model_fails(self, run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
        torch.save(randomise(fresh(folder), seed=1).state_dict(), tmp_path / "other.pt")
        run("export", tmp_path / "other.pt", "--input", "2x3x6x6", "-o", tmp_path / "other.onnx")
        run("verify", folder / "net.pt", tmp_path / "other.onnx", "--input", "2x3x6x6", status=1)

    def test_checkpoints_that_differ_fail(self, run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
        state = torch.load(folder / "net.pt", weights_only=True)
        state["first.running_mean"] += 0.01
        torch.save(state, tmp_path / "shifted.pt")
        result = run("verify", folder / "net.pt", tmp_path / "shifted.pt", "--input", "2x3x6x6", status=1)
        assert result.stdout

    def test_json(self, run: Callable[..., Result], folder: Path) -> None:
        result = run("verify", folder / "net.pt", folder / "net.safetensors", "--input", "2x3x6x6", "--json")
        assert json.loads(result.stdout)

    def test_verify_needs_an_input(self, run: Callable[..., Result], folder: Path) -> None:
        assert "--input" in run("verify", folder / "net.pt", folder / "net.pt", status=2).stderr

    @pytest.mark.parametrize("output", [[], ["-o", "net.pb"]])
    def test_export_needs_an_onnx_name(self, run: Callable[..., Result], folder: Path, output: list[str]) -> None:
        assert ".onnx" in run("export", folder / "net.pt", "--input", "2x3x6x6", *output, status=2).stderr


class TestAdvice:
    """``recommend`` and ``compare``."""

    def test_recommend(self, run: Callable[..., Result], folder: Path) -> None:
        flags = ("--task", "classification", "--batch-size", 4, "--pretrained", "--input", "2x3x6x6")
        result = run("recommend", folder / "net.pt", *flags)
        assert result.stdout.startswith("recommended: group; then ")
        assert "arXiv 1803.08494" in result.stdout
        line = next(line for line in result.stdout.splitlines() if line.startswith("run: normswap convert "))
        assert f"--model {folder}/cli_net.py:net" in line
        assert "--input 2x3x6x6 --to group --groups auto --data DATA -o group.pt" in line
        record = json.loads(run("recommend", folder / "net.pt", *flags, "--json").stdout)
        assert (record["recommended"], record["situation"]["batch_size"]) == ("group", 4)
        assert f"run: {record['command']}" == line

    def test_the_command_that_is_printed_runs(
        self, run: Callable[..., Result], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        printed = json.loads(run("recommend", folder / "net.pt", "--batch-size", 2, "--json").stdout)["command"]
        monkeypatch.chdir(tmp_path)
        result = CliRunner().invoke(app, shlex.split(printed)[1:])
        assert result.exit_code == 0, result.output
        assert (tmp_path / "group.pt").exists()

    def test_compare(self, run: Callable[..., Result], folder: Path) -> None:
        flags = ("--input", "2x3x6x6", "--to", "group", "--to", "batch", "--repeats", 1, "--option", "group.groups=2")
        result = run("compare", folder / "net.pt", *flags)
        assert "medians of 1 runs taken in turns" in result.stdout
        assert "it already is batch" in result.stdout
        record = json.loads(run("compare", folder / "net.pt", *flags, "--no-backward", "--json").stdout)
        assert [row["kind"] for row in record["rows"]] == ["as it is", "group", "batch"]
        assert record["rows"][1]["training"] is None

    @pytest.mark.parametrize(
        ("flags", "told"),
        [
            (("recommend", "--batch-size", 0), "batch_size=0"),
            (("recommend", "--task", "driving"), "--task"),
            (("compare",), "pass --input"),
            (("compare", "--input", "2x3x6x6", "--to", "grup"), "unknown kind 'grup'"),
            (("compare", "--input", "2x3x6x6", "--option", "groups=2"), "KIND.NAME=VALUE"),
        ],
    )
    def test_misuse(self, run: Callable[..., Result], flags: tuple[Any, ...], told: str) -> None:
        assert told in run(*flags, status=2).stderr


class TestImages:
    """``convert --data FOLDER``."""

    def test_calibrated_on_a_folder(self, run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
        image = pytest.importorskip("PIL.Image")
        (tmp_path / "images").mkdir()
        for index in range(5):
            values = numpy.random.default_rng(index).integers(0, 256, (9, 12, 3), dtype=numpy.uint8)
            image.fromarray(values).save(tmp_path / "images" / f"{index}.png")
        flags = ("convert", folder / "net.pt", "--to", "group", "--groups", 2, "--data", tmp_path / "images")
        result = run(*flags, "--batch-size", 2, "--image-size", 6, "--image-resize", 8, "-o", tmp_path / "a.pt")
        assert "calibrating on 5 images of" in result.stderr
        assert "cropped to 6x6" in result.stderr
        assert "norms fitted on 3 batches" in result.stdout

    def test_misuse(self, run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
        flags = ("convert", folder / "net.pt", "--to", "group", "-o", tmp_path / "a.pt")
        assert "no images in it" in run(*flags, "--data", tmp_path, status=2).stderr
        assert "pass --data FOLDER" in run(*flags, "--image-size", 6, status=2).stderr


def test_failed_write_leaves_nothing_new(
    run: Callable[..., Result], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from normswap import delivery

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(delivery, "write_file", full)
    (tmp_path / "out.pt").write_text("old")
    (tmp_path / "out.pt.normswap.json").write_text("old recipe")
    for name, force in (("out.pt", ["--force"]), ("new.pt", [])):
        result = run("convert", folder / "net.pt", "--to", "group", "-o", tmp_path / name, *force, status=2)
        assert "No space left on device" in result.stderr
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "out.pt": "old",
        "out.pt.normswap.json": "old recipe",
    }


def test_as_a_process(folder: Path, tmp_path: Path) -> None:
    """``python -m normswap`` from another folder, with the model named by module and no terminal."""
    command = [sys.executable, "-m", "normswap", "convert", "net.pt", "--model", "cli_net:net", "--to", "group"]
    result = subprocess.run(
        [*command, "-o", str(tmp_path / "out.pt")], cwd=folder, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out.pt").exists()
    assert "\x1b" not in result.stdout + result.stderr


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_interrupt_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    started, out = tmp_path / "started", tmp_path / "out.pt"
    words = ["convert", "--model", f"{folder}/cli_net.py:slow", "--model-arg", f"flag={started}", "--to", "group"]
    command = [sys.executable, "-m", "normswap", *words, "-o", str(out)]
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  (a background shell ignores it)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heard) as process:
        while not started.exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert message.splitlines()[-1] == "interrupted"
    assert "Traceback" not in message
    assert list(tmp_path.iterdir()) == [started]
