"""Calibrated conversion on digits: the accuracy that a conversion keeps without training, and the cost of calibrating.

Called by ``scripts/bench.py calibrate``; ``--out docs/calibration.md`` writes the section. Networks, splits and the
unlabelled inputs are fixed by their seeds. The test images are never used to calibrate."""

from __future__ import annotations

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
SIZES = (64, 256, 1024)
REFINE, REFINED = 200, (256,)
FINE_TUNE = ("group, 8 channels each", "layer")
STEPS, EVERY = 120, 5


def conversions(network: str) -> dict[str, dict[str, Any]]:
    return TRANSFORMER if network == "transformer" else CONVERSIONS


def inputs(images: digits.Data, count: int, seed: int) -> list[Tensor]:
    """``count`` training images in batches of 64."""
    order = torch.randperm(len(images.train_images), generator=torch.Generator().manual_seed(seed))
    return list(images.train_images[order[:count]].split(64))


def keeping(model: nn.Module, options: dict[str, Any], images: digits.Data, seed: int) -> dict[str, float]:
    """Accuracy in percent: original, reset, copied, calibrated on 256 inputs without the heads, calibrated whole on 64,
    256 and 1024, and refined."""

    def percent(network: nn.Module) -> float:
        return 100 * digits.accuracy(network.eval(), images)

    example = (images.train_images[:2],)

    def converted(init: str = "copy") -> nn.Module:
        if options.get("groups") == "auto":
            return plan_groups(model, inputs(images, 256, seed), init=init).apply()
        return normswap.convert(model, example_inputs=example, init=init, **options)

    row = {"original": percent(model), "reset": percent(converted("reset")), "copied": percent(converted())}
    ways: dict[str, tuple[int, dict[str, Any]]] = {"256, norms alone": (256, {"refit_heads": False})}
    ways |= {f"{size}": (size, {}) for size in SIZES}
    ways |= {f"{size}, refined": (size, {"refine": REFINE}) for size in REFINED}
    for name, (size, given) in ways.items():
        network = converted()
        normswap.calibrate(network, model, inputs(images, size, seed), **given)
        row[name] = percent(network)
    return row


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
    return f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}"


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


def bench(seeds: int, train: Callable[[str, int, digits.Data], nn.Module] = trained) -> Iterator[str]:
    images = digits.data()
    kept: dict[tuple[str, str], list[dict[str, float]]] = {}
    steps: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for seed in range(seeds):
        for network in NETWORKS:
            model = train(network, seed, images)
            for title, options in conversions(network).items():
                row = keeping(model, options, images, seed)
                kept.setdefault((network, title), []).append(row)
                print(seed, network, title, {k: round(v, 1) for k, v in row.items()}, file=sys.stderr, flush=True)
                if title in FINE_TUNE:
                    example = (images.train_images[:2],)
                    copied, calibrated = (normswap.convert(model, example_inputs=example, **options) for _ in range(2))
                    normswap.calibrate(calibrated, model, inputs(images, 256, seed))
                    pair = tuple(steps_back(m, images, row["original"], seed) for m in (copied, calibrated))
                    steps.setdefault((network, title), []).append((pair[0], pair[1]))
    yield f"Test accuracy in percent, mean ± spread of {seeds} seeds (450 test images: one is 0.22). Calibrated on 64,"
    yield f"256, 1024 unlabelled training images; refined: {REFINE} steps on batches of 64."
    yield ""
    head = list(next(iter(kept.values()))[0])
    rows = [[*key, *(_mean([row[name] for row in found]) for name in head)] for key, found in kept.items()]
    yield from _table(["network", "to", *head], rows)
    yield ""
    yield "Fine-tuning with labels (Adam, rate 0.002, batches of 64): steps until the accuracy is back within 0.5"
    yield f"points of the original's, looked at every {EVERY} steps, {STEPS} at most."
    yield ""
    rows = [[*key, *(_mean([float(pair[i]) for pair in found]) for i in (0, 1))] for key, found in steps.items()]
    yield from _table(["network", "to", "from copied", "from calibrated (256)"], rows)
