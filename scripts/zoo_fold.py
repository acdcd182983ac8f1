"""The ``fold`` command of ``scripts/zoo.py``: what is left of the norms of real models, beside other tools.

A cell is ``ok``, ``wrong`` or ``crash``. What is asked of a fold:

- the outputs are the same to 1e-9 of their largest value, in float64;
- every norm that ran in the original is in the plan; the model keeps its class, and so does every other module but
  those that hold a merged sum of branches;
- the model that was passed in has the same modules, attributes and tensors, and computes the same, bit for bit;
- no correct peer leaves fewer norms running.

``left`` counts batch norms that still run, as function, operator or frozen module, and the multiply-adds
(``ChannelAffine``) that stand for one. Peers run on copies of the same model: ``torch.fx``'s ``fuse``, and for timm's
models ``timm.utils.reparameterize_model``, which is compared with ``merge_branches=True``."""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

import normswap
from normswap.norms.affine import ChannelAffine
from scripts import zoo
from tests.zoo.models import Entry
from tests.zoo.watch import Run, relative_error, watch

TOLERANCE = 1e-9
CELLS: dict[str, dict[str, Any]] = {"fold": {}, "with inputs": {}, "merged": {"merge_branches": True}}
"""Columns, and the options of ``plan_fold``; the last two are given the example inputs where they can gain by it."""


def remaining(run: Run) -> tuple[int, int]:
    """Batch norms, and multiply-adds that stand for one, that ran."""
    affines = {id(module) for module in run.modules.values() if isinstance(module, ChannelAffine)}
    batch = sum(id(call.owner) not in affines for call in run.batch_calls())
    return batch + zoo.frozen_modules(run), len(affines)


def convolutions(run: Run) -> int:
    return sum(isinstance(module, _ConvNd) for module in run.modules.values())


def fold_cell(subject: zoo.Subject, options: Mapping[str, Any]) -> dict[str, Any]:
    """Fold and judge the result."""
    plan = normswap.plan_fold(subject.model, **options)
    model = plan.apply()
    run = watch(subject.entry, model, subject.inputs)
    batch, affines = remaining(run)
    error = relative_error(subject.run.outputs, run.outputs)
    faults = [] if error <= TOLERANCE else [f"relative error {error:.1e}"]
    if missing := zoo.uncovered(subject, plan):
        faults.append(f"{len(missing)} not in the plan: {missing[0]}")
    if type(model) is not type(subject.model) and not options.get("merge_branches"):
        faults.append(f"the class became {type(model).__name__}")
    reasons = [note for change in plan.changes if not change.into for note in change.notes[:1]]
    reasons += [skip.reason for skip in plan.skips if skip.norm is None or skip.norm.has_statistics]
    return {
        "status": "wrong" if faults else "ok",
        "detail": "; ".join(faults),
        "error": error,
        "left": batch + affines,
        "affines": affines,
        "convolutions": convolutions(run),
        "merges": len(getattr(plan, "merges", ())),
        "reasons": dict(Counter(map(general, reasons)).most_common(4)),
    }


def general(reason: str) -> str:
    """A reason without the names of the layers in it."""
    words = reason.replace("backward: ", "").split("; forward: ")[0].split()
    return " ".join("..." if "." in word.strip(".,:;()") else word for word in words)[:100]


def peer_cell(subject: zoo.Subject, model: nn.Module) -> dict[str, Any]:
    """What a peer made of a copy."""
    run = watch(subject.entry, model, subject.inputs)
    error = relative_error(subject.run.outputs, run.outputs)
    wrong = not error <= TOLERANCE
    return {
        "status": "wrong" if wrong else "ok",
        "detail": f"relative error {error:.1e}" if wrong else "",
        "left": sum(remaining(run)),
        "convolutions": convolutions(run),
    }


def fx_cell(subject: zoo.Subject) -> dict[str, Any]:
    from torch.fx.experimental.optimization import fuse

    return peer_cell(subject, fuse(copy.deepcopy(subject.model)))


def timm_cell(subject: zoo.Subject) -> dict[str, Any]:
    from timm.utils import reparameterize_model

    return peer_cell(subject, reparameterize_model(copy.deepcopy(subject.model)))


def fold_row(entry: Entry) -> dict[str, Any]:
    """Every cell of one model."""
    subject = zoo.Subject.of(entry)
    row: dict[str, Any] = {
        "norms": sum(remaining(subject.run)),
        "convolutions": convolutions(subject.run),
        "fx": zoo.guarded(lambda: fx_cell(subject)),
        "cells": {},
    }
    if entry.name.startswith("timm/"):
        row["timm"] = zoo.guarded(lambda: timm_cell(subject))
    for name, options in CELLS.items():
        first = row["cells"].get("fold")
        if name == "with inputs" and (not entry.runs_whole or (first["status"], first.get("left")) == ("ok", 0)):
            row["cells"][name] = first  # nothing to gain
            continue
        if name != "fold" and entry.runs_whole and first.get("left"):
            options = {**options, "example_inputs": subject.inputs}
        cell = zoo.guarded(lambda options=options, subject=subject: fold_cell(subject, options))  # type: ignore[misc]
        row["cells"][name] = cell
        peers = ["fx"] if name == "with inputs" else ["fx", "timm"] if name == "merged" else []
        best = [row[p]["left"] for p in peers if row.get(p, {}).get("status") == "ok"]
        faults = [cell["detail"]] if cell["detail"] else []
        if best and cell["status"] == "ok" and cell["left"] > min(best):
            faults.append(f"a peer leaves {min(best)}")
        if (reason := subject.untouched()) is not None:
            faults.append(reason)
            subject = zoo.Subject.of(entry)
        if faults:
            cell |= {"status": "wrong" if cell["status"] == "ok" else cell["status"], "detail": "; ".join(faults)}
    return row


def text(cell: Mapping[str, Any] | None) -> str:
    """How many are left, or what went wrong."""
    if cell is None:
        return ""
    if cell["status"] == "ok":
        return str(cell["left"])
    left = f" ({cell['left']} left)" if "left" in cell else ""
    return f"**{cell['status']}**: {cell['detail']}{left}".replace("|", "\\|")[:120]


def peer_text(cell: Mapping[str, Any] | None) -> str:
    if cell is None or cell["status"] == "ok":
        return text(cell)
    return cell["status"] if cell["status"] == "crash" else f"wrong, {cell['left']}"


def page(rows: list[dict[str, Any]], command: str) -> str:
    """The section of a folding sweep."""
    broken = [row for row in rows if "cells" not in row]
    rows = [row for row in rows if "cells" in row and row["norms"]]
    columns: dict[str, list[Any]] = {name: [row["cells"].get(name) for row in rows] for name in CELLS}
    columns |= {"torch.fx fuse": [row["fx"] for row in rows], "timm reparameterize": [row.get("timm") for row in rows]}
    total = sum(row["norms"] for row in rows)
    summary = []
    for name, cells in columns.items():
        known = [cell for cell in cells if cell is not None]
        counts = Counter(cell["status"] for cell in known)
        fine = [
            (row, cell) for row, cell in zip(rows, cells, strict=True) if cell is not None and cell["status"] == "ok"
        ]
        none = sum(cell["left"] == 0 for _, cell in fine)
        gone = sum(row["norms"] - cell["left"] for row, cell in fine)
        summary.append([name, *(str(counts[status]) for status in zoo.STATUSES), str(none), f"{gone} of {total}"])
    header = ["", *zoo.STATUSES, "nothing left", "norms gone"]
    errors = [cell["error"] for name in CELLS for cell in columns[name] if cell is not None and "error" in cell]
    paragraphs = [
        "# Folding of the model zoo",
        f"Written by `{command}`. `scripts/zoo_fold.py` says what each cell asks.",
        f"{zoo.versions()}. CPU, float64, eval mode, random weights, randomised statistics and affine.",
        f"{len(rows)} models with norms that have fixed statistics, {total} of them that run. Largest relative error: "
        f"{zoo.scientific(max(errors, default=0.0))}.",
        "\n".join(zoo.table(header, summary)),
        "The numbers below are the norms left running: batch norms of any kind and, for `fold`, the multiply-adds that "
        "stand for one. `with inputs`: one run of the model was allowed. `merged`: with `merge_branches=True`. "
        "`convs`: convolutions that run, before and merged, and after timm's reparameterize. Norms that follow no "
        "layer, or whose layer others read too, cannot vanish; the most frequent reason stands at the end.",
    ]
    if broken:
        paragraphs.append("Not measured:\n\n" + "\n".join(f"- {row['name']}: {row['detail']}" for row in broken))
    body = []
    for row in rows:
        cells, timm = row["cells"], row.get("timm")
        merged = cells["merged"].get("convolutions", "")
        theirs = "" if timm is None or timm["status"] != "ok" else f" / {timm['convolutions']}"
        convs = f"{row['convolutions']} → {merged}{theirs}"
        best = cells["with inputs"]
        reason = next(iter(best.get("reasons", {})), "") if best.get("left") else ""
        body.append(
            [
                row["name"],
                str(row["norms"]),
                *(text(cells.get(name)) for name in CELLS),
                peer_text(row["fx"]),
                peer_text(timm),
                convs,
                reason.replace("|", "\\|"),
            ]
        )
    head = ["model", "norms", *CELLS, "torch.fx fuse", "timm reparameterize", "convs", "why"]
    paragraphs.append("\n".join(zoo.table(head, body)))
    return "\n\n".join(paragraphs) + "\n"


def fold(options: argparse.Namespace, entries: list[Entry]) -> bool:
    """The ``fold`` command; whether every cell is ok."""
    return zoo.every_cell("fold", options, entries, fold_row, page, CELLS)
