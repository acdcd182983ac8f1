"""The ``health`` command of ``scripts/zoo.py``: what :func:`normswap.examine` says of models with nothing wrong.

Without example inputs or data, each model is examined as it comes from its constructor (``fresh``), and with randomised
statistics and affine (``randomised``). A cell is ``ok``, ``wrong`` or ``crash``. What is asked of it:

- no finding is an error, unless it is shown to be true: a norm that is said to take its moments over one value (the
  norms over a single channel in CSATv2's spatial attention) gives the same for random inputs, bit for bit;
- every norm that :func:`normswap.find` lists is examined, once;
- ``fresh``: every module norm with running statistics of its own is said to be never updated; ``randomised``: none is;
- the model that was passed in has the same modules, attributes and tensors, bit for bit."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import normswap
from scripts import zoo
from tests.zoo.models import MODELS, Entry, randomise

CELLS = ("fresh", "randomised")


def health_cell(model: nn.Module, *, fresh: bool) -> dict[str, Any]:
    """Examine and judge the result."""
    modules, state = zoo.census(model), zoo.clone_state(model)
    started = time.perf_counter()
    health = normswap.examine(model)
    seconds = time.perf_counter() - started
    true = [each for each in health.errors if each.check == "one-element-groups" and wiped(model, each.site)]
    faults = [f"{each.check} at {each.site}: {each.what}" for each in health.errors if each not in true][:3]
    if [norm.name for norm in health.norms] != [site.name for site in normswap.find(model)]:
        faults.append("other norms are examined than found")
    tracked = [norm.name for norm in health.norms if norm.site.norm is not None and norm.site.norm.has_statistics]
    never = [each.site for each in health.findings if each.check == "never-updated"]
    if never != (tracked if fresh else []):
        faults.append(f"{len(never)} of {len(tracked)} norms with running statistics are said to be never updated")
    if zoo.census(model) != modules:
        faults.append("the input model's modules or their attributes changed")
    if changed := zoo.different(state, model.state_dict(keep_vars=True)):
        faults.append(f"the input model's tensors changed: {changed[0]}")
    return {
        "status": "wrong" if faults else "ok",
        "detail": "; ".join(faults),
        "seconds": round(seconds, 2),
        "norms": len(health.norms),
        "placed": sum(bool(norm.places) for norm in health.norms),
        "folds": sum(bool(norm.into) for norm in health.norms),
        "true": len(true),
        "findings": dict(Counter(f"{each.severity} {each.check}" for each in health.findings)),
        "roles": dict(Counter(place.role for norm in health.norms for place in norm.places[:1])),
    }


def wiped(model: nn.Module, name: str) -> bool:
    """Whether a norm over a single channel gives the same whatever its input."""
    norm = model.get_submodule(name)
    one, other = (torch.randn(3, 7, 1, dtype=torch.float64) for _ in range(2))
    return torch.equal(norm(one), norm(other))


def health_row(entry: Entry) -> dict[str, Any]:
    """Every cell of one model."""
    model = entry.build()
    cells = {"fresh": zoo.guarded(lambda: health_cell(model, fresh=True))}
    randomise(model, entry)
    cells["randomised"] = zoo.guarded(lambda: health_cell(model, fresh=False))
    return {"cells": cells}


def text(cell: Mapping[str, Any]) -> str:
    """What was found, or what is wrong."""
    if cell["status"] != "ok":
        return f"**{cell['status']}**: {cell['detail']}".replace("|", "\\|")
    return ", ".join(f"{count} {name.partition(' ')[2]}" for name, count in cell["findings"].items()) or "nothing"


def page(rows: list[dict[str, Any]], command: str) -> str:
    """The section of an examining sweep."""
    broken = [row for row in rows if "cells" not in row]
    rows = [row for row in rows if "cells" in row]
    summary, kinds, roles = [], [], Counter[str]()
    for name in CELLS:
        cells = [row["cells"][name] for row in rows]
        counts = Counter(cell["status"] for cell in cells)
        fine = [cell for cell in cells if cell["status"] != "crash"]
        found: Counter[str] = Counter()
        models: Counter[str] = Counter()
        for cell in fine:
            found.update(cell["findings"])
            models.update(dict.fromkeys(cell["findings"], 1))
        true = sum(cell["true"] for cell in fine)
        errors = sum(count for finding, count in found.items() if finding.startswith("error")) - true
        seconds = [cell["seconds"] for cell in fine]
        summary.append([
            name, *(str(counts[status]) for status in zoo.STATUSES), str(errors), str(true),
            f"{sorted(seconds)[len(seconds) // 2]:.1f} s, {max(seconds):.1f} s",
        ])  # fmt: skip
        kinds += [[name, finding, str(count), str(models[finding])] for finding, count in found.most_common()]
        if name == "randomised":
            for cell in fine:
                roles.update(cell["roles"])
    cells = [row["cells"]["randomised"] for row in rows if row["cells"]["randomised"]["status"] != "crash"]
    norms, placed, folds = (sum(cell[key] for cell in cells) for key in ("norms", "placed", "folds"))
    told = ", ".join(f"{count} {role or 'elsewhere'}" for role, count in roles.most_common())
    paragraphs = [
        "# Health of the model zoo",
        f"Written by `{command}`. `scripts/zoo_health.py` says what each cell asks. An error is a false alarm unless "
        "it is shown to be true. What each check means: [health.md](health.md).",
        f"{zoo.versions()}. CPU, float64, eval mode, random weights, no example inputs; {len(rows)} of the "
        f"{len(MODELS)} models.",
        "\n".join(
            zoo.table(
                ["", *zoo.STATUSES, "false alarms at error level", "true ones", "time, median and largest"], summary
            )
        ),
        f"{norms} norms; where {placed} of them sit is known: {told}. {folds} fold into a layer.",
        "\n".join(zoo.table(["", "finding", "norms", "models"], kinds)),
    ]
    if broken:
        paragraphs.append("Not measured:\n\n" + "\n".join(f"- {row['name']}: {row['detail']}" for row in broken))
    body = [
        [row["name"], str(row["cells"]["fresh"].get("norms", "")), *(text(row["cells"][name]) for name in CELLS)]
        for row in rows
    ]
    paragraphs.append("\n".join(zoo.table(["model", "norms", *CELLS], body)))
    return "\n\n".join(paragraphs) + "\n"


def health(options: argparse.Namespace, entries: list[Entry]) -> bool:
    """The ``health`` command; whether every cell is ok."""
    return zoo.every_cell("health", options, entries, health_row, page, CELLS)
