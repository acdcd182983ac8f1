"""The manual of the command line, and how the commands look: headings, completion, pipes, colours, narrow terminals."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from rich.text import Text
from torch import nn
from typer.testing import CliRunner

import normswap
from normswap import registry, report
from normswap.cli import app
from normswap.manual import SCHEMAS, manual
from tests.support import randomise

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = [str(command.name or getattr(command.callback, "__name__", "")) for command in app.registered_commands]


def network() -> nn.Module:
    return randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))).eval()


def test_the_manual_is_what_the_commands_say() -> None:
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == manual(app), "run: make docs"


def test_it_has_every_option() -> None:
    text = manual(app)
    for name in COMMANDS:
        section = text.split(f"## `normswap {name}`")[1].split("\n## ")[0]
        shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).stdout
        for option in set(re.findall(r"(?<![\w-])--[a-z-]+", shown)) - {"--help"}:
            assert f"`{option}`" in section or option in section, (name, option)


def test_the_terminal_shows_every_help_text_whole() -> None:
    """Brackets around a word are markup there, and would go."""
    for command in typer.main.get_command(app).commands.values():  # type: ignore[attr-defined]
        for parameter in command.params:
            text = getattr(parameter, "help", None) or ""
            assert Text.from_markup(text).plain == text, (command.name, parameter.name)


def reached(value: Any, path: str) -> Iterator[Any]:
    """What is at a documented path: every entry for a list."""
    name, _, rest = path.partition(".")
    inside = value[name.removesuffix("[]")]
    for each in inside if name.endswith("[]") else [inside]:
        yield from reached(each, rest) if rest else [each]


def test_json_has_the_documented_keys(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "a.pt")
    torch.save(randomise(network(), 1).state_dict(), tmp_path / "b.pt")
    model, a, b = ("--model", f"{Path(__file__)}:network"), tmp_path / "a.pt", tmp_path / "b.pt"
    calls: dict[str, tuple[object, ...]] = {
        "inspect": (a, *model, "-i", "1x3x5x5"),
        "convert": (a, "--to", "group", "--skip", "3", "--dry-run"),
        "fold": (a, *model, "--keep-batchnorm", "--dry-run"),
        "recommend": (*model, "--batch-size", 2),
        "compare": (*model, "-i", "1x3x5x5", "--to", "group", "--repeats", 1, "--no-backward"),
        "diff": (a, b),
        "verify": (a, b, *model, "-i", "1x3x5x5"),
    }
    assert calls.keys() == SCHEMAS.keys()
    for name, arguments in calls.items():
        result = CliRunner().invoke(app, [name, *map(str, arguments), "--json"])
        record = json.loads(result.stdout)
        for path in SCHEMAS[name]:
            assert list(reached(record, path)), (name, path)
        documented = {path.partition(".")[0].removesuffix("[]") for path in SCHEMAS[name]}
        assert documented <= record.keys()


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_a_narrow_terminal(name: str) -> None:
    result = CliRunner().invoke(app, [*([name] if name else []), "--help"], env={"COLUMNS": "40", "NO_COLOR": "1"})
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 40
    assert "\x1b" not in result.stdout
    headings = re.findall(r"─ ([A-Z][\w ]+) ─", result.stdout)
    assert {"convert": {"Model and checkpoint", "Which norms", "Checks", "Output"}}.get(name, set()) <= set(headings)


def test_the_shell_completes_kinds() -> None:
    words, offered = "normswap convert --to fr", ["frn", "frozen"]
    assert set(offered) <= set(registry.kinds())
    environment = {**os.environ, "_NORMSWAP_COMPLETE": "complete_bash", "COMP_WORDS": words}
    environment |= {"COMP_CWORD": str(len(words.split()) - 1), "OMP_NUM_THREADS": "1"}
    code = "from normswap.cli import app; app(prog_name='normswap')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == offered


@pytest.mark.parametrize(("width", "looks"), [(40, "becomes: folded into 0"), (100, "folded into 0 ")])
def test_a_narrow_terminal_has_no_table(width: int, looks: str) -> None:
    shown = report.plan_report(normswap.plan_fold(network()))
    console = Console(width=width, force_terminal=True, no_color=True, file=io.StringIO())
    report.show(shown, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert looks in text
    assert max(map(len, re.sub("\x1b[^m]*m", "", text).splitlines())) <= width
    assert not re.search("\x1b\\[3[0-7]m", text)
