"""The layout in docs/architecture.md is the package's, and imports go up in it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYOUT = ROOT / "docs" / "architecture.md"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted((ROOT / "normswap").rglob("*.py"))
}


def listed() -> list[str]:
    """Modules by dotted name in the order of the layout: its lines start with a path below ``normswap/``."""
    block = re.search(r"^```text\nnormswap/\n(.*?)^```", LAYOUT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert block is not None
    paths = re.findall(r"^  (\S+)\.py\b", block.group(1), re.MULTILINE)
    return ["normswap." + path.replace("/", ".") for path in paths]


def named(module: str) -> str:
    """The key in ``MODULES`` for an imported name; a package is its ``__init__``."""
    return module if module in MODULES else f"{module}.__init__"


def imported(name: str, tree: ast.AST) -> Iterator[str]:
    """Modules of the package that ``name`` imports anywhere: at the top, in a function, by ``import_module``."""
    package = name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (named(alias.name) for alias in node.names if alias.name.split(".")[0] == "normswap")
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*parts, *([node.module] if node.module else [])])
            if module.split(".")[0] != "normswap":
                continue
            for alias in node.names:
                below = named(f"{module}.{alias.name}")
                yield below if below in MODULES else named(module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}:
            constants = (arg.value for arg in node.args if isinstance(arg, ast.Constant))
            yield from (named(value) for value in constants if str(value).split(".")[0] == "normswap")


def test_every_module_is_in_the_layout_once() -> None:
    names = listed()
    assert len(names) == len(set(names))
    assert set(names) == set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_up(name: str) -> None:
    order = {module: position for position, module in enumerate(listed())}
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    wrong = {other for other in imported(name, tree) if order.get(other, len(order)) >= order.get(name, -1)}
    assert not wrong, f"{name} imports {', '.join(sorted(wrong))}, which the layout lists at or below it"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import normswap", ["normswap.__init__"]),
        ("from normswap import spec", ["normswap.spec"]),
        ("from normswap.spec import Norm", ["normswap.spec"]),
        ("from normswap import __version__", ["normswap.__init__"]),
        ("def f():\n    from normswap import cli", ["normswap.cli"]),
        ("from . import sync", ["normswap.norms.sync"]),
        ("from ..spec import Norm", ["normswap.spec"]),
        ("import importlib\nimportlib.import_module('normswap.cli')", ["normswap.cli"]),
        ("import torch\nfrom torch import nn", []),
    ],
)
def test_imports_are_seen(source: str, found: list[str]) -> None:
    assert list(imported("normswap.norms.batch", ast.parse(source))) == found
