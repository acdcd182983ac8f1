"""Conversions to a folder of shards that were interrupted, and gone on with."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from normswap import NormswapError
from normswap.checkpoint import read, write
from normswap.checkpoints import transfer as transferring
from normswap.checkpoints.unfinished import JOURNAL
from normswap.cli import app
from normswap.console import writing
from normswap.files import hidden_name, locked
from normswap.source import load_keys, save_source

SIZE = 4000


@pytest.fixture
def source(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    state = {f"{index}.weight": torch.randn(900, generator=generator) for index in range(8)}
    for name in ("weight", "bias", "running_mean", "running_var"):
        state[f"8.{name}"] = torch.rand(8, generator=generator) + 0.5
    write(tmp_path / "in.safetensors", state)
    return tmp_path / "in.safetensors"


def convert(source: Path, target: Path, *, groups: int = 4, size: int | None = SIZE, **options: Any) -> list[str]:
    loaded = load_keys(source, "group", groups=groups)
    assert loaded.surgery is not None
    save_source(loaded, loaded.model, loaded.surgery.plan.recipe, target, max_shard_size=size, **options)
    return loaded.notes


def home(target: Path) -> Path:
    return hidden_name(target, "unfinished")


def interrupted(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch, resume: bool = True) -> str:
    """A run that ends when half of the input is read and what was written until then is flushed."""
    complete = transferring._Work._finish

    def finish(self: Any, file: int) -> None:
        if file > 3:
            raise KeyboardInterrupt
        complete(self, file)

    with monkeypatch.context() as patch:
        patch.setattr(transferring._Work, "_finish", finish)
        with pytest.raises(KeyboardInterrupt) as caught:
            convert(source, target, resume=resume)
    return str(caught.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_what_is_complete_is_kept(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(source, tmp_path / "right")
    target = tmp_path / "out"
    assert interrupted(source, target, monkeypatch) == "4 shards are complete and kept for --resume"
    assert not target.exists()
    kept = json.loads((home(target) / JOURNAL).read_text())["complete"]
    numbers = {name: (home(target) / "folder" / name).stat().st_ino for name in kept}
    assert len(kept) == 4
    assert convert(source, target, resume=True)[-1] == "4 shards are taken over from the interrupted run"
    assert contents(target) == contents(tmp_path / "right")
    assert {name: (target / name).stat().st_ino for name in kept} == numbers
    assert not home(target).exists()


def test_a_shard_that_is_not_as_it_was_left_is_written_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, tmp_path / "right")
    interrupted(source, tmp_path / "out", monkeypatch)
    shards = sorted((home(tmp_path / "out") / "folder").iterdir())
    shards[0].write_bytes(b"\1" * shards[0].stat().st_size)
    shards[1].unlink()
    assert "2 shards are taken over" in convert(source, tmp_path / "out", resume=True)[-1]
    assert contents(tmp_path / "out") == contents(tmp_path / "right")


def test_without_resume_nothing_is_left_and_what_is_left_is_removed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert interrupted(source, tmp_path / "out", monkeypatch, resume=False) == ""
    assert list(tmp_path.iterdir()) == [source]
    interrupted(source, tmp_path / "out", monkeypatch)
    assert convert(source, tmp_path / "out")[-1] == f"removed {home(tmp_path / 'out')}, left by an interrupted run"
    assert not home(tmp_path / "out").exists()
    assert len(read(tmp_path / "out").tensors) == 10


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("groups", "the recipe, or what else the metadata says, is another"),
        ("size", "the tensors or the size of the shards are others"),
        ("time", "the input is another, or was changed since"),
        ("input", "the input is another, or was changed since"),
        ("journal", "is damaged, so nothing can be resumed"),
    ],
)
def test_anything_else_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, reason: str
) -> None:
    target = tmp_path / "out"
    interrupted(source, target, monkeypatch)
    options: dict[str, Any] = {"groups": {"groups": 2}, "size": {"size": 8000}}.get(change, {})
    if change == "time":
        os.utime(source, (1, 1))
    elif change == "input":
        source = source.rename(tmp_path / "other.safetensors")
    elif change == "journal":
        (home(target) / JOURNAL).write_text('{"plan": 3}')
    before = contents(home(target) / "folder")
    with pytest.raises(NormswapError, match=reason):
        convert(source, target, resume=True, **options)
    assert contents(home(target) / "folder") == before
    convert(source, target, **options)
    assert not home(target).exists()


def test_one_run_at_a_time(source: Path, tmp_path: Path) -> None:
    home(tmp_path / "out").mkdir()
    handle = locked(home(tmp_path / "out"))
    assert handle is not None
    with pytest.raises(NormswapError, match="being written by another run"):
        convert(source, tmp_path / "out")
    os.close(handle)
    convert(source, tmp_path / "out")


def test_nothing_to_resume_is_said(source: Path, tmp_path: Path) -> None:
    assert "no interrupted run was found" in convert(source, tmp_path / "out", resume=True)[-1]
    with pytest.raises(NormswapError, match="not empty"):
        convert(source, tmp_path / "out", resume=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "out.safetensors"], "to resume needs a folder"),
        (["-o", "out/", "--model", "x:y"], "--resume is for a checkpoint converted by its keys"),
    ],
)
def test_the_command_says_what_it_cannot_resume(source: Path, tmp_path: Path, words: list[str], message: str) -> None:
    output = [str(tmp_path / word) if word.startswith("out") else word for word in words]
    result = CliRunner().invoke(app, ["convert", str(source), "--to", "group", "--resume", *output])
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (".", "is not empty"),
        ("in.safetensors", "an input of this run"),
        ("in.safetensors/x.pt", "is a file, not a folder"),
        ("nowhere/x.pt", "does not exist; create it first"),
        ("x" * 300 + ".pt", "File name too long"),
        ("loop.pt", "loop"),
        ("locked.pt", "read-only"),
    ],
)
def test_places_that_cannot_be_written_are_one_message(source: Path, tmp_path: Path, output: str, words: str) -> None:
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    (tmp_path / "locked.pt").touch(mode=0o444)
    before = sorted(tmp_path.iterdir())
    command = ["convert", str(source), "--to", "group", "--force", "-o", str(tmp_path / output)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2, result.exception
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("terminal", [True, False])
def test_the_progress_is_shown_to_a_terminal_alone(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    shown = io.StringIO()
    shown.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with writing("writing out.pt") as progress:
        for done in range(0, 10_000_001, 1_000_000):
            progress(done, 10_000_000)
            time.sleep(0.02)
    assert ("writing out.pt" in shown.getvalue()) == terminal
    assert ("/10.0" in shown.getvalue()) == terminal
    assert ("MB/s" in shown.getvalue()) == terminal
    assert ("00:0" in shown.getvalue()) == terminal
    assert terminal or shown.getvalue() == ""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_killed_at_random_moments() -> None:
    """A small part of ``scripts/crash_files.py``: the input intact, the output absent or complete."""
    script = Path(__file__).parent.parent / "scripts" / "crash_files.py"
    command = [sys.executable, "-W", "ignore", str(script), "--count", "5", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 conversions" in done.stdout


def test_a_recipe_without_its_checkpoint_is_replaced_if_it_is_one(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out.pt", size=None)
    recipe = tmp_path / "out.pt.normswap.json"
    before = recipe.read_text()
    (tmp_path / "out.pt").unlink()
    convert(source, tmp_path / "out.pt", size=None, groups=2)
    assert json.loads(recipe.read_text())[-1]["source"]["file"] == source.name
    assert recipe.read_text() != before
    (tmp_path / "out.pt").unlink()
    for text in ("mine", "[]", "[3]", "{}", '[{"steps": []}]'):
        recipe.write_text(text)
        with pytest.raises(NormswapError, match=r"out\.pt\.normswap\.json exists"):
            convert(source, tmp_path / "out.pt", size=None)
        assert recipe.read_text() == text


def test_an_interrupt_when_all_is_in_place_leaves_it_there(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(path: Path) -> None:
        if path.name == "out.pt":
            raise KeyboardInterrupt

    monkeypatch.setattr("normswap.files.flush_name", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out.pt", size=None)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [source.name, "out.pt", "out.pt.normswap.json"]
