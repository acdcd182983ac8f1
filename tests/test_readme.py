"""What README.md and CONTRIBUTING.md say is true: their Python runs, their commands and kinds exist. The Python of
docs/layers.md runs too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from normswap import registry
from normswap.cli import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
LAYERS = (ROOT / "docs" / "layers.md").read_text(encoding="utf-8")
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
"""What torchrun tells a process, of one that has no other."""


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", [README, CONTRIBUTING, LAYERS], ids=["README", "CONTRIBUTING", "layers"])
def test_python_runs(text: str, tmp_path: Path) -> None:
    """All blocks of a file in one process of its own, for some of them register classes; warnings are errors."""
    source = "\n".join(["import torch", "torch.set_num_threads(1)", *blocks(text, "python")])
    assert source.count("\n") > 10
    command = [sys.executable, "-W", "error::UserWarning", "-c", source]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, **ALONE}
    )
    assert result.returncode == 0, result.stderr


def test_kinds_table_is_complete() -> None:
    section = README.split("## Kinds", 1)[1].split("\n## ", 1)[0]
    assert sorted(re.findall(r"^\| `(\w+)`", section, re.MULTILINE)) == list(registry.kinds())


def test_options_of_kinds_are_named() -> None:
    section = README.split("## Kinds", 1)[1].split("\n## ", 1)[0]
    for kind in registry.kinds():
        (row,) = (line for line in section.splitlines() if line.startswith(f"| `{kind}`"))
        for option in registry.options(kind):
            assert f"`{option}`" in row


def test_commands_and_flags_exist() -> None:
    command = get_command(app)
    lines = [line for block in blocks(README, "(?:sh|text)") for line in block.replace("\\\n", " ").splitlines()]
    calls = [line.split("normswap ", 1)[1].split() for line in lines if re.match(r"(\$ )?normswap ", line)]
    assert {words[0] for words in calls if not words[0].startswith("-")} == set(command.commands)
    for name, *words in calls:
        flags = {flag for parameter in command.commands[name].params for flag in parameter.opts}
        assert {word for word in words if re.match(r"--?[a-z]", word)} <= flags


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)\b`", README + CONTRIBUTING)) | {
        line.split()[1] for block in blocks(README, "sh") for line in block.splitlines() if line.startswith("make ")
    }
    assert named
    assert named <= targets


def test_links_lead_somewhere() -> None:
    for text, folder in ((README, ROOT), (CONTRIBUTING, ROOT), (LAYERS, ROOT / "docs")):
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (folder / target).exists(), target
