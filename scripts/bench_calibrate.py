"""Calibrated conversion on digits: the accuracy that a conversion keeps without training, and the cost of calibrating.

Called by ``scripts/bench.py calibrate``; ``--out docs/calibration.md`` writes the section. Networks, splits and the
unlabelled inputs are fixed by their seeds. The test images are never used to calibrate."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import digits
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from normswap.calibration import plan_groups
from scripts.digits_networks import NETWORKS, trained

CONVERSIONS: dict[str, dict[str, Any]] = {
    "group, 8 channels each": {"to": "group", "channels_per_group": 8},
    "layer": {"to": "layer"},
    "group, default (near 32)": {"to": "group"},
    "group, chosen on 256": {"to": "group", "groups": "auto"},
    "instance": {"to": "instance"},
}
TRANSFORMER: dict[str, dict[str, Any]] = {"layer to rms": {"to": "rms"}}
CLOSED = (64, 256, 1024)
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    **{f"{size}": (size, {}) for size in CLOSED},
    "256, norms alone": (256, {"refit_heads": False}),
    "256, refined": (256, {"refine": 200}),
    "1024, layers refined": (1024, {"refine": 500, "refine_layers": True}),
}
"""Column to the number of unlabelled images and the options."""
ONLY = {"group, chosen on 256": ("256", "256, norms alone")}
"""Rows of which not all columns are measured."""
LAYERS = ("group, default (near 32)",)
"""Rows of which the last column is measured."""
FINE_TUNE = ("group, 8 channels each", "layer")
STEPS, EVERY = 120, 5
LOG = Path("build/bench_calibrate.jsonl")
"""What was measured, a line for each seed, network and conversion, the last one counts. It is not measured
again, so that a run that was cut off goes on; remove the file after a change of the code."""


def conversions(network: str) -> dict[str, dict[str, Any]]:
    return TRANSFORMER if network == "transformer" else CONVERSIONS


def inputs(images: digits.Data, count: int, seed: int) -> list[Tensor]:
    """``count`` training images in batches of 64."""
    order = torch.randperm(len(images.train_images), generator=torch.Generator().manual_seed(seed))
    return list(images.train_images[order[:count]].split(64))


def keeping(
    model: nn.Module, title: str, options: dict[str, Any], images: digits.Data, seed: int, known: dict[str, float]
) -> dict[str, float]:
    """Accuracy in percent: original, reset, copied, and calibrated in each of the :data:`WAYS`, added to ``known``."""

    def percent(network: nn.Module) -> float:
        return 100 * digits.accuracy(network.eval(), images)

    example = (images.train_images[:2],)

    def converted(init: str = "copy") -> nn.Module:
        if options.get("groups") == "auto":
            return plan_groups(model, inputs(images, 256, seed), init=init).apply()
        return normswap.convert(model, example_inputs=example, init=init, **options)

    if not known:
        known = {"original": percent(model), "reset": percent(converted("reset")), "copied": percent(converted())}
    row = dict(known)
    for name in missing(title, known):
        size, given = WAYS[name]
        network = converted()
        normswap.calibrate(network, model, inputs(images, size, seed), **given)
        row[name] = percent(network)
    return row


def missing(title: str, known: dict[str, float]) -> list[str]:
    """Of the :data:`WAYS` those that are to be measured yet."""
    wanted = (name for name in ONLY.get(title, WAYS) if title in LAYERS or "refine_layers" not in WAYS[name][1])
    return [name for name in wanted if name not in known]


def steps_back(model: nn.Module, images: digits.Data, target: float, seed: int) -> int:
    """Training steps until the test accuracy is within 0.5 points of ``target``; ``STEPS`` where it is not."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), 0.002)
    for step in range(STEPS):
        if step % EVERY == 0 and 100 * digits.accuracy(model.eval(), images) >= target - 0.5:
            return step
        chosen = torch.randint(len(images.train_images), (64,), generator=generator)
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(images.train_images[chosen]), images.train_labels[chosen]).backward()
        optimizer.step()
    return STEPS


def _mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}" if values else "–"


def _table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    yield from ("| " + " | ".join(row) + " |" for row in rows)


def cost(count: int = 256, size: int = 112) -> Iterator[str]:
    """CPU time of a calibration of ResNet-50 in forward passes over the same images."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50().eval()
    batches = list(torch.randn(count, 3, size, size).split(16))
    with torch.no_grad():
        model(batches[0])
        start = time.process_time()
        for batch in batches:
            model(batch)
        forward = time.process_time() - start
    rows = []
    for title, options in (("moments and least squares (default)", {}), ("moments alone", {"fit": "moments"})):
        network = normswap.convert(model, "group")
        start = time.process_time()
        normswap.calibrate(network, model, batches, in_flight=2, **options)
        rows.append([title, f"{(time.process_time() - start) / forward:.1f}"])
    yield f"ResNet-50 to group, {count} images of {size} x {size} in batches of 16, two in flight; one forward pass of"
    yield f"the original over them took {forward:.0f} s; CPU time."
    yield ""
    yield from _table(["closed form", "forward passes' time"], rows)


def fine_tuning(model: nn.Module, options: dict[str, Any], images: digits.Data, seed: int) -> dict[str, int]:
    """Steps from copied and from calibrated on 256 images, see :func:`steps_back`."""
    target = 100 * digits.accuracy(model, images)
    example = (images.train_images[:2],)
    copied, calibrated = (normswap.convert(model, example_inputs=example, **options) for _ in range(2))
    normswap.calibrate(calibrated, model, inputs(images, 256, seed))
    return {
        "from copied": steps_back(copied, images, target, seed),
        "from calibrated (256)": steps_back(calibrated, images, target, seed),
    }


def measured(seeds: int, train: Callable[[str, int, digits.Data], nn.Module]) -> list[dict[str, Any]]:
    """Rows by ``seed``, ``network`` and ``to``, of which :data:`LOG` has those that were measured before."""
    LOG.parent.mkdir(exist_ok=True)
    rows: dict[tuple[int, str, str], dict[str, Any]] = {}
    for line in LOG.read_text().splitlines() if LOG.exists() else ():
        row = json.loads(line)
        rows[row["seed"], row["network"], row["to"]] = row
    images = digits.data()
    for seed in range(seeds):
        for network in NETWORKS:
            model = None
            for title, options in conversions(network).items():
                row = rows.get((seed, network, title), {"seed": seed, "network": network, "to": title, "kept": {}})
                if row["kept"] and not missing(title, row["kept"]):
                    continue
                model = train(network, seed, images) if model is None else model
                if not row["kept"]:
                    row["steps"] = fine_tuning(model, options, images, seed) if title in FINE_TUNE else {}
                row["kept"] = keeping(model, title, options, images, seed, row["kept"])
                rows[seed, network, title] = row
                with LOG.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(seed, network, title, row["kept"], row["steps"], file=sys.stderr, flush=True)
    return [rows[s, n, to] for s in range(seeds) for n in NETWORKS for to in conversions(n)]


def _told(rows: list[dict[str, Any]], part: str) -> Iterator[str]:
    """A table of the means over seeds, of what ``part`` of each row holds."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for row in rows:
        if row[part]:
            found.setdefault((row["network"], row["to"]), []).append(row[part])
    columns = ["original", "reset", "copied", *WAYS] if part == "kept" else ["from copied", "from calibrated (256)"]
    lines = [[*key, *(_mean([each[c] for each in of if c in each]) for c in columns)] for key, of in found.items()]
    yield from _table(["network", "to", *columns], lines)


def bench(seeds: int, train: Callable[[str, int, digits.Data], nn.Module] = trained) -> Iterator[str]:
    rows = measured(seeds, train)
    yield f"Test accuracy in percent, mean ± spread of {seeds} seeds (450 test images: one is 0.22). Calibrated on 64,"
    yield "256, 1024 unlabelled training images; refined: 200 steps of the affines, 500 with the layers, batches of 64."
    yield ""
    yield from _told(rows, "kept")
    yield ""
    yield "Fine-tuning with labels (Adam, rate 0.002, batches of 64): steps until the accuracy is back within 0.5"
    yield f"points of the original's, looked at every {EVERY} steps, {STEPS} at most."
    yield ""
    yield from _told(rows, "steps")
