"""Health on the command line and in reports: of models, checkpoints and .onnx files; exit status, JSON, page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

import normswap
from normswap import Norm
from normswap.calibration import Calibration
from normswap.calibration.report import SiteFit
from normswap.cli import app
from normswap.reporting.content import Content
from normswap.reporting.html import html
from normswap.reporting.markdown import markdown
from tests.support import randomise
from tests.test_reporting import HOSTILE, Page

NET = """
from torch import nn


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.GroupNorm(2, 4))


def loss(output, batch):
    return output.square().mean()
"""


def network() -> nn.Sequential:
    norms = nn.BatchNorm2d(4), nn.ReLU(), nn.GroupNorm(2, 4)
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), *norms))
    model[1].num_batches_tracked.fill_(3)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``net.py``, a sound checkpoint, one whose variance is negative, and inputs."""
    path = tmp_path_factory.mktemp("health")
    (path / "net.py").write_text(NET)
    model = network()
    torch.save(model.state_dict(), path / "sound.pt")
    save_file(model.state_dict(), path / "sound.safetensors")
    assert isinstance(model[1].running_var, torch.Tensor)
    model[1].running_var[0] = -1
    torch.save(model.state_dict(), path / "ill.pt")
    save_file(model.state_dict(), path / "ill.safetensors")
    numpy.save(path / "data.npy", torch.randn(20, 3, 6, 6).numpy())
    return path


@pytest.fixture
def run(folder: Path) -> Callable[..., Result]:
    def run(*arguments: object, model: bool = True, status: int = 0) -> Result:
        words = ["inspect", *(["--model", f"{folder}/net.py:net"] if model else []), *map(str, arguments)]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == status, (result.stdout, result.stderr, result.exception)
        return result

    return run


class TestCommand:
    def test_strict_fails_on_errors_alone(self, run: Callable[..., Result], folder: Path) -> None:
        run("--strict")  # fresh from the constructor: warnings
        text = run(folder / "ill.pt").stdout
        assert "error negative-variance: 1" in text
        assert run(folder / "ill.pt", "--strict", status=1).stdout == text
        assert "health: nothing found" in run(folder / "sound.pt", "--strict").stdout

    @pytest.mark.parametrize("suffix", ["pt", "safetensors"])
    def test_a_checkpoint_without_its_model(self, run: Callable[..., Result], folder: Path, suffix: str) -> None:
        text = run(folder / f"ill.{suffix}", "--strict", model=False, status=1).stdout
        assert "error negative-variance: 1\n  what: running_var: 1 of 4 channels, least -1" in text
        assert "2 found: 1 batch, 1 unknown" in text
        assert "eps and momentum are not in a checkpoint" in text
        record = json.loads(run(folder / f"sound.{suffix}", "--json", model=False).stdout)
        assert record["health"]["findings"] == []
        assert [norm["unknown"] is None for norm in record["health"]["norms"]] == [True, False]

    def test_json(self, run: Callable[..., Result], folder: Path) -> None:
        arguments = (folder / "sound.pt", "--json", "--data", folder / "data.npy", "--batch-size", 10)
        record = json.loads(run(*arguments).stdout)
        assert list(record) == ["sites", "health"]
        assert [site["name"] for site in record["sites"]] == ["1", "3"]
        assert record["health"]["batches"] == 2
        assert record["health"]["norms"][0]["measured"]["shapes"] == [[10, 4, 4, 4]]
        assert record == json.loads(run(*arguments).stdout)
        assert "random projection" in record["health"]["loss"]
        other = json.loads(run(*arguments, "--loss", f"{folder}/net.py:loss").stdout)["health"]
        assert other["loss"].startswith("the given loss")
        gradients = [each["norms"][0]["measured"]["gradient"] for each in (record["health"], other)]
        assert gradients[0] != gradients[1]

    def test_table(self, run: Callable[..., Result], folder: Path) -> None:
        text = run(folder / "sound.pt", "--data", folder / "data.npy").stdout
        assert "Conv2d → norm → ReLU → GroupNorm  into 0" in " ".join(text.split()).replace(
            "GroupNorm into", "GroupNorm  into"
        )
        assert "On 1 batch; gradients of a random projection" in text
        assert "warning stale-statistics: 1" in text

    @pytest.mark.parametrize("suffix", ["html", "md"])
    def test_report(self, run: Callable[..., Result], folder: Path, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"health.{suffix}"
        run(folder / "ill.pt", "--report", path)
        text = path.read_text(encoding="utf-8")
        assert "negative-variance" in text
        assert text.count("<svg ") == (2 if suffix == "html" else 0)
        run(folder / "ill.pt", "--report", path, status=2)
        assert path.read_text(encoding="utf-8") == text

    @pytest.mark.parametrize(
        ("arguments", "model", "told"),
        [
            (("--loss", "net:loss"), True, "pass --data FILE"),
            (("--data", "{folder}/data.npy", "--loss", "{folder}/net.py:nn"), True, "not a callable"),
            (("--data", "{folder}/data.npy", "--batch-size", "0"), True, "must be at least 1"),
            (("{folder}/sound.pt", "--data", "{folder}/data.npy"), False, "--data: needs the model"),
            (("{folder}/sound.pt", "--partial"), False, "--partial: needs the model"),
        ],
    )
    def test_misuse(
        self, run: Callable[..., Result], folder: Path, arguments: tuple[str, ...], model: bool, told: str
    ) -> None:
        result = run(*(each.format(folder=folder) for each in arguments), model=model, status=2)
        assert told in result.stderr

    def test_other_commands_still_refuse_what_no_training_left(self, folder: Path, tmp_path: Path) -> None:
        words = ["fold", "--model", f"{folder}/net.py:net", f"{folder}/ill.pt", "-o", f"{tmp_path}/out.pt"]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 2
        assert "negative running variance" in result.stderr


def test_onnx_file(run: Callable[..., Result], tmp_path: Path) -> None:
    pytest.importorskip("onnx_ir")
    from tests.onnx_support import bn, build, norm, save

    constants = {**norm("a", 4), **norm("b", 4)}
    constants["b_v"][2] = numpy.inf
    path = save(build(f"c = {bn('a', 'x')} d = Sigmoid(c) y = {bn('b', 'd')}", constants), tmp_path)
    text = run(path, "--strict", model=False, status=1).stdout
    assert "error not-finite" in text
    assert "running_var: 1 of 4 channels" in text
    record = json.loads(run(path, "--json", model=False).stdout)
    assert [each["check"] for each in record["health"]["findings"]] == ["not-finite"]
    assert record["health"]["findings"][0]["site"] == record["sites"][1]["name"]


class TestPage:
    def test_says_what_was_found(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.99)).eval()
        health = normswap.examine(model, batches=[torch.randn(8, 3, 5, 5)])
        page = Page(html(Content(health=health, title="mine")))
        assert not page.open
        assert any("Warnings" in text for text in page.text("h1"))
        text = " ".join(data for _, data in page.parts)
        for expected in ("large-momentum", "never-updated", "momentum 0.99", "set momentum to 0.1", "Gradient flow"):
            assert expected in text
        assert sum(tag == "svg" for tag, _ in page.tags) == 5
        assert "1\nmedian 1, from 1 to 1" in page.text("title")

    @pytest.mark.parametrize("found", [normswap.examine(nn.GroupNorm(2, 4, affine=False)), normswap.examine(nn.ReLU())])
    def test_healthy(self, found: Any) -> None:
        assert Content(health=found).outcome == "healthy"
        assert "Healthy" in html(Content(health=found))
        assert "✅ Healthy" in markdown(Content(health=found))

    def test_a_name_is_only_a_name(self) -> None:
        model = nn.Sequential()
        model.add_module(HOSTILE.replace(".", ""), nn.BatchNorm2d(4, momentum=0.99))
        found = normswap.examine(model.eval())
        page = Page(html(Content(health=found)))
        assert not page.open
        assert "script" not in {tag for tag, _ in page.tags}
        assert "<script" not in markdown(Content(health=found))

    def test_values_that_are_not_finite(self) -> None:
        model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).eval()
        nn.init.constant_(model[0].running_var, float("nan"))
        nn.init.constant_(model[2].weight, float("inf"))
        page = Page(html(Content(health=normswap.examine(model, batches=[torch.randn(8, 4, 5, 5)]))))
        assert not page.open

    def test_explained_variance(self) -> None:
        norm = Norm(kind="batch", channels=4)
        sites = tuple(SiteFit(name, norm, norm, before, 0.9) for name, before in (("a.b", -7.0), ("c", float("nan"))))
        found = Calibration(sites, (), "moments", {"moments": 0.9}, 2)
        page = Page(html(Content(calibration=found)))
        assert "a.b\n-7.000 before, 0.900 after" in page.text("title")
        assert any("Calibrated: moments" in text for text in page.text("h2"))
        assert "| a.b |" in markdown(Content(calibration=found))


def test_convert_reports_its_calibration(folder: Path, tmp_path: Path) -> None:
    words = [
        "convert", "--model", f"{folder}/net.py:net", f"{folder}/sound.pt", "--to", "layer", "-o", tmp_path / "out.pt",
        "--data", folder / "data.npy", "--report", tmp_path / "report.html",
    ]  # fmt: skip
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Explained variance of every norm" in text
    assert text.count("<svg ") == 1


def test_norms_that_keys_do_not_tell_are_known_from_the_recipe(folder: Path, tmp_path: Path) -> None:
    """EvoNorm's three vectors are no norm's keys, and a folded norm is no norm any more."""

    def ran(*words: object) -> str:
        done = CliRunner().invoke(app, [*map(str, words)])
        assert done.exit_code == 0, done.output
        return done.stdout

    def reasons(*words: object) -> dict[str, str]:
        return {site["name"]: site["reason"] for site in json.loads(ran("inspect", *words, "--json"))["sites"]}

    converted, folded = tmp_path / "converted.pt", tmp_path / "folded.pt"
    ran("convert", folder / "sound.pt", "--to", "evonorm_s0", "-o", converted)
    ran("fold", folder / "sound.pt", "--model", f"{folder / 'net.py'}:net", "-o", folded)
    assert reasons(converted)["1"] == "it was converted to evonorm_s0, says the checkpoint's recipe: pass --model"
    assert "1" not in reasons(converted, "--no-recipe")
    assert "1" not in reasons(folded)
