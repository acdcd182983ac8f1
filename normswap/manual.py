"""The manual of the command line, made from the commands themselves: ``python -m normswap.manual``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import typer

HEAD = """# The command line

    normswap COMMAND [OPTIONS] [FILE]

This page is made from the commands (`make docs`). `normswap COMMAND --help` says the same at a terminal.

Results go to standard output, everything else to standard error. At a terminal they are tables, in a pipe aligned plain
text, with `--json` JSON. `NO_COLOR=1` leaves colours out, `COLUMNS=60` sets the width. `normswap --install-completion`
teaches the shell the commands, their options and the kinds.

## Exit status

| status | meaning |
|---|---|
| 0 | done; `diff`: whether or not there are differences |
| 1 | a check failed: the result is not equivalent, and is not written |
| 2 | bad input: one message says what, where and how to mend it |
| 130 | interrupted; nothing is left behind |

Under `torchrun`, several processes convert one checkpoint of `torch.distributed.checkpoint` together, each its own
files; the first one is heard.
"""

Keys = Mapping[str, str]
"""Keys of a JSON object and what they hold; ``a.b`` is in ``a``, ``a[].b`` in each entry of the list ``a``."""

_PLAN: Keys = {
    "plan.operation": "text",
    "plan.changes[].name": "the norm; `aliases`: its other names",
    "plan.changes[].was": "the norm in words",
    "plan.changes[].becomes": "what becomes of it, in words",
    "plan.changes[].exactness": "`exact`, `approximate` or `retrain`",
    "plan.changes[].lost": "what the old norm had and the new one has not",
    "plan.changes[].notes": "list of text",
    "plan.skips[].name": "a norm that stays",
    "plan.skips[].was": "that norm in words",
    "plan.skips[].reason": "why it stays",
    "plan.notes": "list of text",
    "calibration": "what `--data` did, or null",
    "verification": "as `verify --json` prints it, or null",
    "written": "list of paths",
}
SCHEMAS: dict[str, Keys] = {
    "inspect": {
        "sites[].name": "the norm; `aliases`: its other names",
        "sites[].kind": "its kind, or null where it is not known",
        "sites[].computes": "the norm in words, or null",
        "sites[].channels": "count, or null",
        "sites[].reason": "why it cannot be changed, or null",
        "sites[].evidence": "`static` or `observed`",
        "sites[].shapes": "shapes of its input where `--input` was given, or null",
        "health.healthy": "whether no finding is an error",
        "health.counts": "how many findings there are of each severity",
        "health.findings": "list: what is wrong, and where",
        "health.norms[].name": "a norm; where it sits and what was seen of it are beside it",
        "health.notes": "list of text",
    },
    "convert": _PLAN,
    "fold": _PLAN,
    "recommend": {
        "recommended": "a kind, or null",
        "runner_up": "a kind, or null",
        "unchanged": "whether the norms are best left as they are",
        "command": "what converts the model so, or null",
        "situation": "what was said of it",
        "model": "what was seen of it",
        "rules[].name": "a rule that holds",
        "rules[].when": "its condition, in words",
        "rules[].take": "kinds that it is for",
        "rules[].avoid": "kinds that it is against",
        "rules[].strength": "how much it weighs: `must`, `should` or `may`",
        "rules[].reason": "why, in words",
        "rules[].source": "the paper or measurement behind it",
        "candidates[].kind": "a kind that a rule is for",
        "candidates[].score": "the sum of its rules",
        "candidates[].rules": "their names",
        "candidates[].norms": "how many norms would become it",
        "candidates[].obstacle": "why it cannot be taken, or null",
        "conflicts": "list of text",
    },
    "compare": {
        "repeats": "runs of each",
        "threads": "threads of the processor",
        "device": "where it was measured",
        "shapes": "of the inputs",
        "rows[].kind": "a kind; the first row is the model as it is",
        "rows[].changed": "norms that became it; `left`: those that did not",
        "rows[].parameters": "count",
        "rows[].forward": "`median` and `spread` of a forward pass in seconds, or null",
        "rows[].training": "the same of a forward and a backward pass, or null",
        "rows[].peak": "most bytes held at once, without the model's own, or null",
        "rows[].saved": "bytes kept for the backward pass, or null",
        "rows[].reason": "why a figure is missing, or null",
    },
    "diff": {
        "same": "count",
        "differences[].name": "the tensor",
        "differences[].what": "`added`, `removed`, `shape`, `dtype` or `value`",
        "differences[].before": "its dtype and shape there, or empty",
        "differences[].after": "likewise",
        "differences[].largest_difference": "of the values, or null",
    },
    "verify": {
        "equivalent": "whether all rows are",
        "backend": "what ran the candidate",
        "criterion": "the measure, in words",
        "rows[].run": "a way to run the candidate",
        "rows[].output": "the output",
        "rows[].inputs": "the set of inputs",
        "rows[].verdict": "`equivalent`, `inconclusive` or `different`",
        "rows[].max_abs": "the largest error, or null; the other measures are beside it",
        "inputs[].name": "a set of inputs",
        "notes": "list of text",
        "locations": "where runs first go wrong",
    },
}
"""What ``--json`` prints, by command."""


def manual(app: typer.Typer) -> str:
    """The manual as Markdown."""
    root: Any = typer.main.get_command(app)
    parts = [HEAD, "## Options of `normswap` itself\n", *_options(root)]
    for name, command in root.commands.items():
        parts += [f"## `normswap {name}`\n", _text(command.help), ""]
        parts += [f"    normswap {name} {_usage(command)}\n"]
        parts += _options(command)
        if name in SCHEMAS:
            parts += [
                "`--json` prints an object; `[]` stands for each entry of a list.\n",
                "| key | holds |",
                "|---|---|",
            ]
            parts += [f"| `{key}` | {_cell(what)} |" for key, what in SCHEMAS[name].items()]
            parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _usage(command: Any) -> str:
    found = []
    for each in command.params:
        if each.param_type_name == "argument":
            found.append(each.name.upper() if each.required else f"[{each.name.upper()}]")
    return " ".join(["[OPTIONS]", *found])


def _options(command: Any) -> Iterator[str]:
    for panel, options in _panels(command).items():
        yield f"**{panel}**\n"
        yield "| | |"
        yield "|---|---|"
        for each in options:
            yield f"| {_names(each)} | {_cell(_text(getattr(each, 'help', None)))} |"
        yield ""


def _panels(command: Any) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {"Arguments": []}
    for each in command.params:
        if getattr(each, "hidden", False) or each.name in ("install_completion", "show_completion"):
            continue
        usual = "Arguments" if each.param_type_name == "argument" else "Options"
        found.setdefault(getattr(each, "rich_help_panel", None) or usual, []).append(each)
    return {panel: options for panel, options in found.items() if options}


def _names(option: Any) -> str:
    if option.param_type_name == "argument":
        return f"`{option.name.upper()}`" + ("" if option.required else " (optional)")
    names = ", ".join(f"`{name}`" for name in option.opts)
    if option.secondary_opts:
        return f"{names} / " + ", ".join(f"`{name}`" for name in option.secondary_opts)
    return names if option.is_flag else f"{names} {_cell(option.metavar or _values(option.type_descriptor.annotation))}"


def _values(annotation: Any) -> str:
    """What an option takes: choices, or the name of a type."""
    inside = [each for each in get_args(annotation) if each is not type(None)]
    if inside and all(isinstance(each, str) for each in inside):
        return "|".join(inside)
    return _values(inside[0]) if inside else _TYPES[annotation]


_TYPES: dict[Any, str] = {str: "TEXT", int: "NUMBER", float: "NUMBER", Path: "PATH"}


def _text(text: str | None) -> str:
    return " ".join((text or "").split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    from normswap.cli import app

    typer.echo(manual(app), nl=False)
