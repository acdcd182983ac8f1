"""The ``verify`` command of ``scripts/zoo.py``: whether correct programs of real models are taken for equivalent.

A cell is ``ok``, ``wrong`` (a false alarm), ``inconclusive`` (the reference's own output says nothing: it is not finite
in 16 bits), ``exporter`` (torch's exporter or the runtime itself failed, whose error
it carries) or ``crash``. The columns are programs that are right:

- ``kernels``: the unmodified model in float32, run without oneDNN, whose kernels add in another order; six sets of
  inputs, as in all float32 columns;
- ``float16``, ``bfloat16``: the unmodified model, its weights with channels last where they can be, on the given
  inputs;
- ``onnxruntime``: the folded model in float32, eager and exported, graph optimizations off and on; for models of at
  most ``SMALL`` parameters.

``excess`` is the largest error of a column in units of what is allowed."""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import normswap
from scripts import zoo
from tests.zoo.models import Entry, randomise

SMALL = 30_000_000
STATUSES = (*zoo.STATUSES, "inconclusive", "exporter")
EXPORTER = ("the ONNX exporter cannot translate", "ONNX Runtime cannot load", "the ONNX checker refuses")
COLUMNS = ("kernels", "float16", "bfloat16", "onnxruntime")


class OtherKernels(nn.Module):
    """A model run without oneDNN."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> Any:
        with torch.backends.mkldnn.flags(enabled=False):
            return self.model(*inputs)


def cast(inputs: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(value.to(dtype) if isinstance(value, Tensor) else value for value in inputs)


def cell(compare: Callable[[], normswap.Verification]) -> dict[str, Any]:
    try:
        found = compare()
    except normswap.NormswapError as error:
        if any(words in str(error) for words in EXPORTER):
            return {"status": "exporter", "detail": str(error)[:160]}
        raise
    excess = max((row.excess for row in found.rows), default=0.0)
    detail = "" if found else "; ".join(found.remarks())[:200]
    if "[ONNXRuntimeError]" in detail:
        return {"status": "exporter", "detail": detail[:160]}
    different = any(row.verdict == "different" for row in found.rows)
    return {"status": "ok" if found else "wrong" if different else "inconclusive", "detail": detail, "error": excess}


def verify_row(entry: Entry, wanted: Collection[str], cells: dict[str, Any]) -> dict[str, Any]:
    """The wanted cells of one model, beside those known."""
    if not entry.runs_whole:
        return {"skipped": "it is not one plain call"}
    model = randomise(entry.build(), entry)
    inputs = entry.inputs()
    single, given = copy.deepcopy(model).float(), cast(inputs, torch.float32)
    missing = [column for column in COLUMNS if column in wanted and column not in cells]
    for column in missing:
        if column == "kernels":
            compare = partial(eager, single, OtherKernels(single).eval(), given)
        elif column == "onnxruntime":
            if sum(parameter.numel() for parameter in model.parameters()) > SMALL:
                cells[column] = None
                continue
            compare = partial(normswap.verify, single, normswap.fold(single), given)
        else:
            low = copy.deepcopy(model).to(getattr(torch, column))
            last = copy.deepcopy(low)
            with contextlib.suppress(RuntimeError):  # a parameter of another rank
                last.to(memory_format=torch.channels_last)
            compare = partial(eager, low, last, cast(inputs, getattr(torch, column)), vary=False)
        cells[column] = zoo.guarded(lambda compare=compare: cell(compare))  # type: ignore[misc]
    return {"cells": cells}


def eager(model: nn.Module, other: nn.Module, inputs: tuple[Any, ...], **options: Any) -> normswap.Verification:
    return normswap.verify(model, other, inputs, backend="eager", **options)


def text(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    if found["status"] == "ok":
        return f"{found['error']:.2f}"
    return f"**{found['status']}**: {found['detail']}".replace("|", "\\|")


def page(rows: list[dict[str, Any]], command: str) -> str:
    """The section of a verifying sweep."""
    broken = [row for row in rows if "cells" not in row and "skipped" not in row]
    rows = [row for row in rows if "cells" in row]
    summary = []
    for name in COLUMNS:
        known = [row["cells"][name] for row in rows if row["cells"].get(name) is not None]
        counts = Counter(found["status"] for found in known)
        worst = max((found["error"] for found in known if found["status"] == "ok"), default=0.0)
        summary.append([name, *(str(counts[status]) for status in STATUSES), f"{worst:.2f}"])
    paragraphs = [
        "# Verification of the model zoo",
        f"Written by `{command}`. `scripts/zoo_verify.py` says what each column is; every program in it is right, so "
        "`wrong` is a false alarm.",
        f"{zoo.versions()}. CPU, eval mode, random weights, randomised statistics and affine; {len(rows)} models.",
        "\n".join(zoo.table(["", *STATUSES, "largest excess of an ok"], summary)),
        "The numbers below are the largest error in units of what is allowed.",
    ]
    if broken:
        paragraphs.append("Not measured:\n\n" + "\n".join(f"- {row['name']}: {row['detail']}" for row in broken))
    body = [[row["name"], *(text(row["cells"].get(name)) for name in COLUMNS)] for row in rows]
    paragraphs.append("\n".join(zoo.table(["model", *COLUMNS], body)))
    return "\n\n".join(paragraphs) + "\n"


def verify(options: argparse.Namespace, entries: list[Entry]) -> bool:
    """The ``verify`` command; whether there is no false alarm and no crash."""
    wanted = COLUMNS if options.columns is None else options.columns.split(",")
    if unknown := set(wanted) - set(COLUMNS):
        sys.exit(f"--columns: {', '.join(sorted(unknown))} is not one of {', '.join(COLUMNS)}")
    known = zoo.read_rows(options.results, "verify", zoo.digest())

    def measure(entry: Entry) -> dict[str, Any]:
        return verify_row(entry, wanted, dict(known.get(entry.name, {}).get("cells", {})))

    rows = list(zoo.sweep("verify", entries, options.results, measure, wanted))
    zoo.write_section(options.out, page(rows, zoo.command_line(options)))
    found = Counter(each["status"] for row in rows for each in row.get("cells", {}).values() if each)
    print(f"{len(rows)} models: {dict(found)}; {options.out}")
    return set(found) <= {"ok", "inconclusive", "exporter"}
