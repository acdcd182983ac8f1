"""Sweep the real models of torchvision and timm, and write what happened to a page.

    python scripts/zoo.py convert [--only GLOB] [--kinds KINDS] [--limit N] [--results FILE] [--out FILE]
    python scripts/zoo.py fold    [--only GLOB] [--limit N] [--results FILE] [--out FILE]
    python scripts/zoo.py health  [--only GLOB] [--limit N] [--results FILE] [--out FILE]
    python scripts/zoo.py verify  [--only GLOB] [--columns COLUMNS] [--limit N] [--results FILE] [--out FILE]

``convert`` turns every norm of every model into each kind, without example inputs, and judges the result with means
that share nothing with the package: a watched run records every call of a norm function or operator and every module
that ran. A cell is ``ok``, ``wrong`` or ``crash``; all but ``ok`` carry their reason. What is asked of a cell:

- ``group``, ``layer``, ``switchable``: no batch norm runs any more, as a function, an operator or a module with running
  statistics;
- ``frozen``, ``sync``: the batch norms that run are those of the new modules alone, and the output is the same to 1e-9
  of its largest value; ``switchable`` with ``init="preserve"`` to 1e-5;
- every norm that ran in the original, module or function, is in the plan as a change, an alias of one, or a skip;
- the model keeps its class, and so does every module that is no norm; other tensors keep their names and values;
- the model that was passed in has the same modules, attributes and tensors, and computes the same, bit for bit.

For contrast, ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` and Opacus' ``ModuleValidator.fix`` run on copies of the
same models.

Rows go to a JSON-lines file as they come, under a digest of the sources, so that a sweep that was cut off goes on where
it was.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import gc
import hashlib
import json
import platform
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.modules.batchnorm import _BatchNorm  # noqa: E402

import normswap  # noqa: E402
from normswap.norms.switchable import SwitchableNorm  # noqa: E402
from normswap.norms.sync import SyncBatchNorm  # noqa: E402
from tests.zoo.models import MODELS, Entry, Inputs, is_norm, randomise  # noqa: E402
from tests.zoo.watch import Call, Run, relative_error, watch  # noqa: E402


def names_of(model: nn.Module) -> dict[int, list[str]]:
    """Every name of every module."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


@dataclass
class Subject:
    """A model of the zoo with its watched reference run and a copy of its state."""

    entry: Entry
    model: nn.Module
    inputs: Inputs
    run: Run
    state: dict[str, Tensor]
    modules: list[tuple[str, int, type, dict[str, Any]]]

    @classmethod
    def of(cls, entry: Entry) -> Subject:
        model = randomise(entry.build(), entry)
        inputs = entry.inputs()
        run = watch(entry, model, inputs)
        if not all(bool(tensor.isfinite().all()) for tensor in run.outputs):
            raise RuntimeError("the original's output is not finite")
        return cls(entry, model, inputs, run, clone_state(model), census(model))

    def untouched(self) -> str | None:
        """Why the model is not what it was, or ``None``: its modules, its tensors, and bit for bit what it computes."""
        now = census(self.model)
        if len(now) != len(self.modules):
            return "the input model has other modules"
        if changed := [a[0] or "root" for a, b in zip(self.modules, now, strict=True) if a != b]:
            return f"the input model's modules or their attributes changed: {', '.join(changed[:3])}"
        if changed := different(self.state, self.model.state_dict(keep_vars=True)):
            return f"the input model's tensors changed: {changed[0]}"
        try:
            again = watch(self.entry, self.model, self.inputs).outputs
        except Exception as error:
            return f"the input model no longer runs: {brief(error)}"
        equal = len(again) == len(self.run.outputs) and all(map(torch.equal, again, self.run.outputs))
        return None if equal else "the input model computes something else"

    def norms(self) -> tuple[list[nn.Module], list[Call]]:
        """The norms that ran: modules, and functional calls outside of them."""
        modules = [module for module in self.run.modules.values() if is_norm(module)]
        known = {id(module) for module in modules}
        return modules, [call for call in self.run.calls if id(call.owner) not in known]


def sensitivity(subject: Subject) -> float | None:
    """Relative change of the output when the first batch norm that ran divides by 1 % more; ``None`` without one.

    It says that the comparison can see an error: a model that damps its norms would hide a wrong one.
    """
    first = next((m for m in subject.run.modules.values() if m._buffers.get("running_var") is not None), None)
    if first is None:
        return None
    variance = first._buffers["running_var"]
    assert variance is not None
    before = variance.clone()
    variance.mul_(1.01**2)
    try:
        return relative_error(subject.run.outputs, subject.entry.outputs(subject.model, subject.inputs))
    finally:
        variance.copy_(before)


def clone_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def census(model: nn.Module) -> list[tuple[str, int, type, dict[str, Any]]]:
    """Every module: name, identity, class, and type and length of each attribute (a cache that grew shows there)."""

    def shape(value: Any) -> tuple[type, int | None]:
        return type(value), len(value) if isinstance(value, (dict, list, tuple, set)) else None

    return [
        (name, id(module), type(module), {key: shape(value) for key, value in vars(module).items()})
        for name, module in model.named_modules(remove_duplicate=False)
    ]


def different(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], skip: Callable[[str], bool] | None = None
) -> list[str]:
    """Names that are gone or whose tensors differ in any bit."""
    return [
        name
        for name, tensor in before.items()
        if not (skip is not None and skip(name)) and not (name in after and same(tensor, after[name]))
    ]


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b.detach())


def uncovered(subject: Subject, plan: normswap.Plan) -> list[str]:
    """Norms that ran and that the plan does not name."""
    listed = {name for item in (*plan.changes, *plan.skips) for name in (item.name, *item.aliases)}
    names = names_of(subject.model)
    modules, calls = subject.norms()
    missing = []
    for module in modules:
        found = names[id(module)]
        if not any(entry == name or entry.startswith(f"{name}.") for name in found for entry in listed):
            missing.append(f"{found[0]} ({type(module).__name__})")
    calls_in = Counter((id(call.owner), call.family) for call in calls)
    runs_in = {id(call.owner): call.owner for call in calls}
    for (owner, family), _ in calls_in.items():
        module = runs_in[owner]
        inner = {id(child) for child in module.modules()} - {owner} if module is not None else set()
        own = names.get(owner, [""])
        inside = {name for child in inner for name in names.get(child, ())}
        if not any(entry not in inside and entry.rpartition(".")[0] == name for name in own for entry in listed):
            missing.append(f"{own[0]} ({type(module).__name__} calls {family}_norm)")
    return missing


def disturbed(subject: Subject, plan: normswap.Plan, model: nn.Module) -> str | None:
    """What changed beside the norms of the plan, or ``None``."""
    changed = {name for item in plan.changes for name in (item.name, *item.aliases)}
    owners = {
        name.rpartition(".")[0] for item in plan.changes if item.functional for name in (item.name, *item.aliases)
    }

    def touched(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:end]) in changed for end in range(1, len(parts) + 1)) or name in owners

    if type(model) is not type(subject.model):
        return f"the class became {type(model).__name__}"
    after = dict(model.named_modules(remove_duplicate=False))
    for name, _, cls, _ in subject.modules:
        if not touched(name) and type(after.get(name)) is not cls:
            return f"{name} became {type(after.get(name)).__name__}"
    gone = different(
        subject.state, model.state_dict(keep_vars=True), lambda name: touched(name) or name.rpartition(".")[0] in owners
    )
    return f"other tensors changed: {gone[0]}" if gone else None


REPLACED: dict[str, Callable[[nn.Module], bool]] = {
    "group": lambda module: False,
    "layer": lambda module: False,
    "switchable": lambda module: isinstance(module, SwitchableNorm),
    "frozen": lambda module: not isinstance(module, _BatchNorm) and not module._parameters,
    "sync": lambda module: isinstance(module, (nn.SyncBatchNorm, SyncBatchNorm)),
}
"""Which modules with running statistics may run after a conversion."""

TOLERANCE = {"frozen": 1e-9, "sync": 1e-9, "switchable": 1e-5}
"""Largest relative error in eval mode of the kinds that must keep the function."""


def left(run: Run, kind: str) -> list[str]:
    """Classes of the batch norms that ran and should not have: that call the function or keep running statistics."""
    calling = {id(call.owner): call.owner for call in run.batch_calls()}
    with_statistics = [m for m in run.modules.values() if m._buffers.get("running_mean") is not None]
    holders = calling | {id(module): module for module in (*with_statistics, *_torch_batch_norms(run))}
    return [type(module).__name__ for module in holders.values() if module is None or not REPLACED[kind](module)]


def _torch_batch_norms(run: Run) -> list[nn.Module]:
    return [module for module in run.modules.values() if isinstance(module, _BatchNorm)]


def convert_cell(subject: Subject, kind: str) -> dict[str, Any]:
    """Convert to one kind and judge the result."""
    options: dict[str, Any] = {"init": "preserve"} if kind == "switchable" else {}
    started = time.perf_counter()
    plan = normswap.plan_convert(subject.model, kind, **options)
    model = plan.apply()
    seconds = time.perf_counter() - started
    cell: dict[str, Any] = {"seconds": round(seconds, 2), "changes": len(plan.changes), "skips": len(plan.skips)}
    cell["skipped"] = dict(Counter(skip.reason for skip in plan.skips).most_common(5))
    faults = []
    if missing := uncovered(subject, plan):
        faults.append(f"{len(missing)} not in the plan: {missing[0]}")
    if (reason := disturbed(subject, plan, model)) is not None:
        faults.append(reason)
    run = watch(subject.entry, model, subject.inputs)
    if remaining := left(run, kind):
        faults.append(f"{len(remaining)} batch norms left ({', '.join(sorted(set(remaining)))})")
        if subject.entry.runs_whole:
            cell["left_with_example_inputs"] = with_inputs(subject, kind, options)
    if not all(bool(tensor.isfinite().all()) for tensor in run.outputs):
        faults.append("the output is not finite")
    cell["error"] = relative_error(subject.run.outputs, run.outputs)
    if kind in TOLERANCE and not cell["error"] <= TOLERANCE[kind]:
        faults.append(f"relative error {cell['error']:.1e}")
    return cell | {"status": "wrong" if faults else "ok", "detail": "; ".join(faults)}


def with_inputs(subject: Subject, kind: str, options: Mapping[str, Any]) -> int:
    """How many batch norms are left when the plan may run the model once."""
    plan = normswap.plan_convert(subject.model, kind, example_inputs=subject.inputs, **options)
    return len(left(watch(subject.entry, plan.apply(), subject.inputs), kind))


def torch_cell(subject: Subject) -> dict[str, Any]:
    """``convert_sync_batchnorm`` on a copy."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(subject.model))
    run = watch(subject.entry, model, subject.inputs)
    error, remaining = relative_error(subject.run.outputs, run.outputs), left(run, "sync")
    faults = [f"relative error {error:.1e}"] if not error <= TOLERANCE["sync"] else []
    faults += [f"{len(remaining)} batch norms left"] if remaining else []
    return {"status": "wrong" if faults else "ok", "detail": "; ".join(faults), "error": error}


def opacus_cell(subject: Subject) -> dict[str, Any]:
    """Opacus' fix on a copy, in train mode as it asks; its float32 layers are cast back to float64 before the run."""
    from opacus.validators import ModuleValidator

    model = ModuleValidator.fix(copy.deepcopy(subject.model).train())
    valid = ModuleValidator.is_valid(model)
    run = watch(subject.entry, model.double().eval(), subject.inputs)
    remaining = left(run, "group")
    after = model.state_dict()
    norms = [name for name, module in subject.model.named_modules() if isinstance(module, _BatchNorm)]
    reset = [
        name
        for name in norms
        if different({k: v for k, v in subject.state.items() if k in (f"{name}.weight", f"{name}.bias")}, after)
    ]
    faults = [f"{len(remaining)} batch norms left" + (", is_valid says True" if valid else "")] if remaining else []
    faults += [f"{len(reset)} affines reset"] if reset else []
    return {
        "status": "wrong" if faults else "ok",
        "detail": "; ".join(faults),
        "left": len(remaining),
        "reset": len(reset),
    }


def guarded(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A cell; an exception is one too, with its message and where it was raised."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return measure()
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return {"status": "crash", "detail": brief(error), "at": f"{Path(last.filename).name}:{last.lineno}"}


def brief(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def convert_row(entry: Entry, kinds: Iterable[str]) -> dict[str, Any]:
    """Every cell of one model."""
    subject = Subject.of(entry)
    modules, calls = subject.norms()
    row: dict[str, Any] = {
        "norms": len(modules) + len({(id(call.owner), call.family) for call in calls}),
        "batch_calls": len(subject.run.batch_calls()) + frozen_modules(subject.run),
        "standardized_weights": sum(call.of_parameter for call in subject.run.calls),
        "sensitivity": sensitivity(subject),
        "torch": guarded(lambda: torch_cell(subject)),
        "opacus": guarded(lambda: opacus_cell(subject)),
        "cells": {},
    }
    for kind in kinds:
        cell = row["cells"][kind] = guarded(lambda kind=kind, subject=subject: convert_cell(subject, kind))  # type: ignore[misc]
        if (reason := subject.untouched()) is not None:
            cell |= {"status": "wrong" if cell["status"] == "ok" else cell["status"]}
            cell["detail"] = "; ".join(filter(None, [cell["detail"], reason]))
            subject = Subject.of(entry)
    return row


def frozen_modules(run: Run) -> int:
    """Norms with running statistics that call no norm function: frozen ones that compute by themselves."""
    calling = {id(call.owner) for call in run.calls}
    return sum(m._buffers.get("running_mean") is not None and id(m) not in calling for m in run.modules.values())


def digest() -> str:
    """A digest of the sources that a row rests on."""
    files = sorted([*(ROOT / "normswap").rglob("*.py"), *(ROOT / "tests" / "zoo").glob("*.py"), *HERE.glob("zoo*.py")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def read_rows(path: Path, command: str, source: str) -> dict[str, dict[str, Any]]:
    """Rows of an earlier sweep over the same sources, by model."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.strip()]
    return {row["name"]: row for row in rows if (row["command"], row["source"]) == (command, source)}


def sweep(
    command: str, entries: list[Entry], results: Path, measure: Callable[[Entry], dict[str, Any]], wanted: Iterable[str]
) -> Iterator[dict[str, Any]]:
    """Measure each entry, or take its row from ``results`` where it has every wanted cell; print as it goes."""
    source, wanted = digest(), set(wanted)
    known = read_rows(results, command, source)
    results.parent.mkdir(parents=True, exist_ok=True)
    for position, entry in enumerate(entries, 1):
        row = known.get(entry.name)
        started = time.perf_counter()
        if row is None or not wanted <= set(row.get("cells", ())):
            row = {"command": command, "source": source, "name": entry.name, "family": entry.family}
            row |= guarded(lambda entry=entry: measure(entry))  # type: ignore[misc]
            row["seconds"] = round(time.perf_counter() - started, 1)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            gc.collect()
        statuses = {name: cell["status"] for name, cell in row.get("cells", {}).items() if cell} or {
            "model": row.get("status")
        }
        bad = [f"{name} {status}" for name, status in statuses.items() if status != "ok"]
        print(
            f"[{position}/{len(entries)}] {row['seconds']:6.1f} s  {entry.name}  {', '.join(bad) or 'ok'}", flush=True
        )
        yield row


def every_cell(
    command: str,
    options: argparse.Namespace,
    entries: list[Entry],
    measure: Callable[[Entry], dict[str, Any]],
    page: Callable[[list[dict[str, Any]], str], str],
    wanted: Iterable[str],
) -> bool:
    """Sweep without gradients and write the page; whether every cell of every model is ok."""
    torch.set_grad_enabled(False)
    rows = list(sweep(command, entries, options.results, measure, wanted))
    write_section(options.out, page(rows, command_line(options)))
    found = Counter(cell["status"] for row in rows for cell in row.get("cells", {}).values())
    unmeasured = sum("cells" not in row for row in rows)
    print(f"{len(rows)} models: {dict(found)}, {unmeasured} unmeasured; {options.out}")
    return not unmeasured and set(found) <= {"ok"}


def scientific(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}"


STATUSES = ("ok", "wrong", "crash")


def text(cell: Mapping[str, Any], *, error: bool = False) -> str:
    """A cell of the table."""
    if cell["status"] == "ok":
        return f"ok {scientific(cell['error'])}" if error else "ok"
    return f"**{cell['status']}**: {cell['detail']}".replace("|", "\\|")


def versions() -> str:
    packages = ("normswap", "torch", "torchvision", "timm", "opacus")
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)])


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    header = list(header)
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def convert_page(rows: list[dict[str, Any]], kinds: list[str], command: str) -> str:
    """The page of a conversion sweep."""
    broken = [row for row in rows if "cells" not in row]
    rows = [row for row in rows if "cells" in row]
    with_batch = [row for row in rows if row["batch_calls"]]
    columns = {kind: [row["cells"][kind] for row in rows] for kind in kinds}
    columns |= {
        "torch convert_sync_batchnorm": [row["torch"] for row in rows],
        "Opacus fix": [row["opacus"] for row in rows],
    }

    def count(name: str) -> list[str]:
        pairs = list(zip(rows, columns[name], strict=True))
        chosen = (pairs, [pair for pair in pairs if pair[0]["batch_calls"]])
        found = [Counter(cell["status"] for _, cell in part) for part in chosen]
        return [f"`{name}`", *(str(counts[status]) for counts in found for status in STATUSES)]

    worst = {
        kind: max((cell.get("error", 0.0) for cell in columns[kind]), default=0.0)
        for kind in kinds
        if kind in TOLERANCE
    }
    errors = ", ".join(f"`{kind}` {scientific(error)}" for kind, error in worst.items())
    opacus = [row["opacus"] for row in with_batch if "left" in row["opacus"]]
    sensitive = [row["sensitivity"] for row in with_batch if row["sensitivity"] is not None]
    needing = sum("left_with_example_inputs" in cell for kind in kinds for cell in columns[kind])
    families = len({row["family"] for row in rows})
    calls, norms = (sum(row[key] for row in rows) for key in ("batch_calls", "norms"))
    said = sum("is_valid says True" in cell["detail"] for cell in opacus)
    summary = table(["", *STATUSES, *(f"{status}, with batch norms" for status in STATUSES)], map(count, columns))
    paragraphs = [
        "# Conversion of the model zoo",
        f"Written by `{command}`. `scripts/zoo.py` says what each cell asks, `tests/zoo/models.py` lists the models.",
        f"{versions()}. CPU, float64, eval mode, random weights, randomised statistics and affine.",
        f"{len(rows)} models of {families} families, {len(with_batch)} of them with batch norms ({calls} calls of one "
        f"in a run of each); {norms} norms in all. No conversion was given example inputs; {needing} cells left a "
        "batch norm so.",
        "\n".join(summary),
        f"Largest relative error in eval mode: {errors}. A change of 1 % in the first batch norm of a model changes "
        f"its output by at least {scientific(min(sensitive, default=0))}.",
        f"Opacus' fix left batch norms running in {sum(cell['left'] > 0 for cell in opacus)} models, in {said} of "
        f"which its `is_valid` says True, and reset affines in {sum(cell['reset'] > 0 for cell in opacus)}. (Its "
        "layers are float32; they were cast to the model's float64 before the run.)",
        "`convert_sync_batchnorm` is wrong where the output differs by more than 1e-9 or a batch norm is left, Opacus' "
        "fix where a batch norm still runs or an affine was reset.",
        "`norms`: norm modules, and modules that call a norm function, that ran. `calls`: batch norms that ran. A "
        "number after `ok` is the relative error.",
    ]
    if broken:
        paragraphs.append("Not measured:\n\n" + "\n".join(f"- {row['name']}: {row['detail']}" for row in broken))
    body = [
        [
            row["name"],
            str(row["norms"]),
            str(row["batch_calls"]),
            *(text(row["cells"][kind], error=kind in TOLERANCE) for kind in kinds),
            text(row["torch"]),
            text(row["opacus"]),
        ]
        for row in rows
    ]
    paragraphs.append("\n".join(table(["model", "norms", "calls", *columns], body)))
    return "\n\n".join(paragraphs) + "\n"


def convert(options: argparse.Namespace, entries: list[Entry]) -> bool:
    """The ``convert`` command; whether every cell of every kind is ok."""
    kinds = options.kinds.split(",")
    if unknown := [kind for kind in kinds if kind not in REPLACED]:
        sys.exit(f"--kinds: {', '.join(unknown)} is not one of {', '.join(REPLACED)}")
    rows = list(sweep("convert", entries, options.results, lambda entry: convert_row(entry, kinds), kinds))
    write_section(options.out, convert_page(rows, kinds, command_line(options)))
    found = Counter(cell["status"] for row in rows for kind, cell in row.get("cells", {}).items() if kind in kinds)
    unmeasured = sum("cells" not in row for row in rows)
    print(f"{len(rows)} models: {dict(found)}, {unmeasured} unmeasured; {options.out}")
    return not unmeasured and set(found) <= {"ok"}


def write_section(path: Path, section: str) -> None:
    """Replace the section of a page that has the same heading, or append it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.read_text() if path.exists() else ""
    parts = [part for part in re.split(r"^(?=# )", old, flags=re.MULTILINE) if part.strip()]
    heading = section.partition("\n")[0]
    position = next((i for i, part in enumerate(parts) if part.partition("\n")[0] == heading), len(parts))
    parts[position : position + 1] = [section]
    path.write_text("\n".join(part.rstrip() + "\n" for part in parts))


def command_line(options: argparse.Namespace) -> str:
    """The command, with the options that decide what is measured."""
    parts = ["python scripts/zoo.py", options.command]
    parts += [f"--only '{options.only}'"] if options.only != "*" else []
    parts += [f"--kinds {options.kinds}"] if options.kinds != ",".join(REPLACED) else []
    parts += [f"--limit {options.limit}"] if options.limit is not None else []
    return " ".join(parts)


def fold(options: argparse.Namespace, entries: list[Entry]) -> bool:
    """The ``fold`` command; see ``scripts/zoo_fold.py``."""
    from scripts import zoo_fold

    return zoo_fold.fold(options, entries)


def verify(options: argparse.Namespace, entries: list[Entry]) -> bool:
    """The ``verify`` command; see ``scripts/zoo_verify.py``."""
    from scripts import zoo_verify

    return zoo_verify.verify(options, entries)


def health(options: argparse.Namespace, entries: list[Entry]) -> bool:
    """The ``health`` command; see ``scripts/zoo_health.py``."""
    from scripts import zoo_health

    return zoo_health.health(options, entries)


COMMANDS: dict[str, Callable[[argparse.Namespace, list[Entry]], bool]] = {
    "convert": convert,
    "fold": fold,
    "verify": verify,
    "health": health,
}


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", nargs="?", default="convert", choices=COMMANDS)
    parser.add_argument("--only", default="*", help="glob over model names, as in 'timm/levit*'")
    parser.add_argument("--kinds", default=",".join(REPLACED), help="kinds to convert to, separated by commas")
    parser.add_argument("--columns", help="of verify: measure only these, separated by commas; others stay")
    parser.add_argument("--limit", type=int, help="at most this many models, spread over the list")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "zoo.jsonl", help="rows as they come; resumes")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "zoo.md")
    options = parser.parse_args()
    entries = [entry for entry in MODELS if fnmatch.fnmatch(entry.name, options.only)]
    if options.limit is not None and len(entries) > options.limit:
        entries = [entries[position * len(entries) // options.limit] for position in range(options.limit)]
    if not entries:
        sys.exit(f"--only {options.only!r}: no model is called so")
    with one_thread():
        return 0 if COMMANDS[options.command](options, entries) else 1


if __name__ == "__main__":
    sys.exit(main())
