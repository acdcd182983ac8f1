"""The ``verify`` bench of ``scripts/bench.py``: seeded faults in real models, who sees them, and where.

A model of the zoo in float32 is folded, or converted to frozen norms, which both leave its function as it is; then one
fault is put into the result. A fault's *effect* is measured apart from :func:`normswap.verify`: the largest difference
that it makes to the outputs in float64, in units of the reference's own rounding error. Some candidates are compared
as the ``.onnx`` file they export to. The other criteria judge the same outputs on the same inputs: ``numpy.allclose``
with both tolerances alike, and the thresholds of ``torch.onnx.export(verify=True)`` on the figures of
``torch.onnx.verification``. Every candidate is judged once without a fault too: what is said against it then is a
false alarm.
"""

from __future__ import annotations

import copy
import json
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.onnx.verification import VerificationInfo

import normswap
from normswap.verification.inputs import Freedom, Variations
from normswap.verification.runners import OnnxRunner
from tests.zoo.models import MODELS, Entry, flatten, randomise

NAMES = (
    "torchvision/resnet18", "torchvision/resnet50", "torchvision/mobilenet_v2", "torchvision/mobilenet_v3_small",
    "torchvision/densenet121", "torchvision/efficientnet_b0", "torchvision/shufflenet_v2_x1_0",
    "torchvision/googlenet", "torchvision/regnet_y_400mf", "torchvision/mnasnet0_5", "torchvision/vgg11_bn",
    "torchvision/fcn_resnet50", "torchvision/lraspp_mobilenet_v3_large", "torchvision/r3d_18", "timm/levit_128s",
    "timm/repvgg_a0", "timm/resnet26t", "timm/ghostnet_050",
)  # fmt: skip
LIMIT = 10.0
"""Noise floors from which on an effect must be seen."""
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.Hardsigmoid, nn.GELU, nn.LeakyReLU)
LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
Fault = Callable[[nn.Module, random.Random], "set[str] | None"]
"""Changes a model in place; the names that a report may give to the place, or ``None`` where it has no such place."""


def layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LAYERS)]


def norms(model: nn.Module) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(getattr(m, "running_var", None), Tensor)]


def channel_sign(model: nn.Module, rng: random.Random) -> set[str] | None:
    """The sign of one channel's weights, as of a flipped gamma."""
    name, layer = rng.choice(layers(model))
    channel = rng.randrange(layer.weight.shape[0])
    layer.weight[channel].neg_()
    return {name}


def bias_dropped(model: nn.Module, rng: random.Random) -> set[str] | None:
    found = [(name, layer) for name, layer in layers(model) if layer.bias is not None]
    if not found:
        return None
    name, layer = rng.choice(found)
    layer.bias.zero_()
    return {name}


def bias_stale(model: nn.Module, rng: random.Random) -> set[str] | None:
    """One element of a bias, off by a tenth of their deviation."""
    found = [(name, layer) for name, layer in layers(model) if layer.bias is not None and layer.bias.numel() > 1]
    if not found:
        return None
    name, layer = rng.choice(found)
    layer.bias[rng.randrange(layer.bias.numel())] += 0.1 * layer.bias.std()
    return {name}


def eight_bits(model: nn.Module, rng: random.Random) -> set[str] | None:
    """One layer's weights rounded to 8 bits."""
    name, layer = rng.choice(layers(model))
    step = layer.weight.abs().max() / 127
    layer.weight.copy_((layer.weight / step).round() * step)
    return {name}


def one_weight(model: nn.Module, rng: random.Random) -> set[str] | None:
    """A single weight rounded to 8 bits."""
    name, layer = rng.choice(layers(model))
    flat = layer.weight.view(-1)
    index = rng.randrange(flat.numel())
    step = layer.weight.abs().max() / 127
    flat[index] = (flat[index] / step).round() * step
    return {name}


def activation_lost(model: nn.Module, rng: random.Random) -> set[str] | None:
    found = [name for name, module in model.named_modules() if isinstance(module, ACTIVATIONS)]
    if not found:
        return None
    name = rng.choice(found)
    holder, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(holder), attribute, nn.Identity().eval())
    return {name, holder}  # In a file nothing bears its name any more; the code of its holder is the place.


def wrong_axis(model: nn.Module, rng: random.Random) -> set[str] | None:
    """Input and output channels of a square weight exchanged."""
    found = [
        (name, layer) for name, layer in layers(model)
        if layer.weight.shape[0] == layer.weight.shape[1] and getattr(layer, "groups", 1) == 1
    ]  # fmt: skip
    if not found:
        return None
    name, layer = rng.choice(found)
    layer.weight.copy_(layer.weight.transpose(0, 1).clone())
    return {name}


def weights_swapped(model: nn.Module, rng: random.Random) -> set[str] | None:
    return _swapped(layers(model), ("weight",), rng)


def padding(model: nn.Module, rng: random.Random) -> set[str] | None:
    """A border that is repeated where it should be zero."""
    found = [
        (name, layer) for name, layer in layers(model)
        if isinstance(layer, nn.Conv2d) and type(layer).forward is nn.Conv2d.forward
        and not isinstance(layer.padding, str) and max(layer.padding) > 0
    ]  # fmt: skip
    if not found:
        return None
    name, layer = rng.choice(found)
    layer.padding_mode = "replicate"
    return {name}


def gamma_sign(model: nn.Module, rng: random.Random) -> set[str] | None:
    name, norm = rng.choice(norms(model))
    norm.weight[rng.randrange(norm.weight.numel())].neg_()
    return {name}


def eps(model: nn.Module, rng: random.Random) -> set[str] | None:
    """1e-3 where it was 1e-5."""
    name, norm = rng.choice(norms(model))
    norm.eps = 1e-3 if norm.eps < 1e-3 else 1e-5
    return {name}


def stale_mean(model: nn.Module, rng: random.Random) -> set[str] | None:
    """One layer's running mean, a tenth short."""
    name, norm = rng.choice(norms(model))
    norm.running_mean.mul_(0.9)
    return {name}


def statistics_swapped(model: nn.Module, rng: random.Random) -> set[str] | None:
    return _swapped(norms(model), ("running_mean", "running_var"), rng)


def norm_lost(model: nn.Module, rng: random.Random) -> set[str] | None:
    name, norm = rng.choice(norms(model))
    norm.running_mean.zero_()
    norm.running_var.fill_(1.0)
    return {name}


def _swapped(found: list[tuple[str, Any]], fields: tuple[str, ...], rng: random.Random) -> set[str] | None:
    shapes = defaultdict(list)
    for name, module in found:
        shapes[tuple(getattr(module, fields[0]).shape)].append((name, module))
    pairs = [group for group in shapes.values() if len(group) > 1]
    if not pairs:
        return None
    (first, one), (second, other) = rng.sample(rng.choice(pairs), 2)
    for field in fields:
        kept = getattr(one, field).clone()
        getattr(one, field).copy_(getattr(other, field))
        getattr(other, field).copy_(kept)
    return {first, second}


FOLDED: tuple[Fault, ...] = (
    channel_sign, bias_dropped, bias_stale, eight_bits, one_weight, activation_lost, wrong_axis, weights_swapped,
    padding,
)  # fmt: skip
CONVERTED: tuple[Fault, ...] = (gamma_sign, eps, stale_mean, statistics_swapped, norm_lost, activation_lost)


def tensors(entry: Entry, model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    with torch.no_grad():
        return list(flatten(model(*inputs)))


def effect(own: list[Tensor], wide: list[Tensor], faulty: list[Tensor]) -> float:
    """The largest difference in units of the reference's own."""
    found = 0.0
    for mine, exact, wrong in zip(own, wide, faulty, strict=True):
        floor = float((mine.double() - exact).abs().max())
        found = max(found, float((wrong - exact).abs().max()) / max(floor, 1e-300))
    return found


def other_verdicts(own: list[Tensor], got: list[Tensor]) -> dict[str, bool]:
    """Whether each of the other criteria takes the outputs for equal."""
    pairs = [(a.numpy(), b.numpy()) for a, b in zip(own, got, strict=True)]
    found = {
        f"allclose {tol:g}": all(numpy.allclose(b, a, rtol=tol, atol=tol) for a, b in pairs) for tol in (1e-5, 1e-3)
    }
    figures = [VerificationInfo.from_tensors(name="", expected=a, actual=b) for a, b in zip(own, got, strict=True)]
    found["torch.onnx"] = all(each.max_abs_diff < 5e-3 and each.max_rel_diff < 1e-1 for each in figures)
    return found


def judged(reference: nn.Module, candidate: Any, inputs: tuple[Any, ...], folder: Path, as_file: bool) -> Any:
    if not as_file:
        return normswap.verify(reference, candidate, inputs, backend="eager")
    path = normswap.export(candidate, folder / "candidate.onnx", inputs, optimize=False, force=True)
    return normswap.verify(reference, path, inputs)


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[Fault, ...], bool]]:
    """How the candidate was made, the candidate, the faults to put into it, and whether it is compared as a file."""
    folded = normswap.fold(model)
    yield "folded", folded, FOLDED, False
    yield "folded, .onnx", folded, (channel_sign, bias_dropped, eight_bits, activation_lost, weights_swapped), True
    yield "frozen", normswap.convert(model, to="frozen"), CONVERTED, False


def measure(name: str, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Every case of one model."""
    entry = next(entry for entry in MODELS if entry.name == name)
    model = randomise(entry.build(), entry).float()
    inputs = tuple(value.float() for value in entry.inputs())
    own, wide = tensors(entry, model, inputs), tensors(entry, copy.deepcopy(model).double(), entry_doubles(inputs))
    rng = random.Random(f"{name} {seed}")
    with tempfile.TemporaryDirectory() as folder:
        for made, base, faults, as_file in candidates(model):
            for fault in (None, *faults):
                candidate = copy.deepcopy(base)
                with torch.no_grad():
                    places = set() if fault is None else fault(candidate, rng)
                if places is None:
                    continue
                started = time.perf_counter()
                try:
                    found = judged(model, candidate, inputs, Path(folder), as_file)
                except normswap.NormswapError as error:
                    yield {"model": name, "made": made, "fault": fault and fault.__name__, "failed": str(error)[:200]}
                    continue
                double = tensors(entry, copy.deepcopy(candidate).double(), entry_doubles(inputs))
                location = found.locations[0] if found.locations else None
                yield {
                    "model": name,
                    "made": made,
                    "fault": None if fault is None else fault.__name__,
                    "effect": effect(own, wide, double),
                    "seen": not found,
                    "place": None if location is None else location.name,
                    "expected": sorted(places),
                    "right": location is not None and location.name in places,
                    "excess": max((row.excess for row in found.rows), default=0.0),
                    "others": other_verdicts(own, tensors(entry, candidate, inputs)),
                    "seconds": time.perf_counter() - started,
                }


def entry_doubles(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.double() for value in inputs)


LOG = Path("build/bench_verify.jsonl")
"""Cases that were measured are kept here, one line each; a model that is in it is not measured again."""


def bench(repeats: int) -> list[str]:
    """The cost on ResNet-50, then the faults."""
    LOG.parent.mkdir(exist_ok=True)
    rows = [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []
    done = {row["model"] for row in rows}
    for name in NAMES:
        if name not in done:
            new = list(measure(name))
            with LOG.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in new)
            rows += new
            print(f"{name}: {len(new)} cases", file=sys.stderr, flush=True)
    return [*told(rows), "", *cost(repeats)]


def cost(repeats: int) -> list[str]:
    """Time to verify a folded ResNet-50 beside that of the model runs alone which that needs."""
    entry = next(entry for entry in MODELS if entry.name == "torchvision/resnet50")
    model = randomise(entry.build(), entry).float()
    folded, double = normswap.fold(model), copy.deepcopy(model).double()
    inputs = (torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)),)
    lines = ["| ResNet-50, 2x3x224x224 | model runs alone, s | verify, s | ratio |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        path = normswap.export(folded, Path(folder) / "folded.onnx", inputs, optimize=False, dynamic=True)
        sessions = [OnnxRunner(path, optimized=optimized) for optimized in (False, True)]
        for label, candidate, runners in (
            ("eager", folded, (lambda x: folded(*x),)),
            ("as .onnx file", path, tuple(lambda x, each=each: each(x, {}) for each in sessions)),
        ):
            alone, whole = [], []
            for _ in range(repeats):
                alone.append(_timed(lambda runners=runners: _runs(model, double, runners, inputs)))
                backend = "onnxruntime" if candidate is path else "eager"
                whole.append(_timed(lambda c=candidate, b=backend: normswap.verify(model, c, inputs, backend=b)))
            a, w = statistics.median(alone), statistics.median(whole)
            lines.append(f"| {label} | {a:.2f} | {w:.2f} | {w / a:.2f} |")
    return lines


def _timed(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


@torch.no_grad()
def _runs(model: nn.Module, double: nn.Module, runners: Any, inputs: tuple[Any, ...]) -> None:
    for _, given in Variations(inputs, (), Freedom(batch=True)):
        model(*given)
        double(*entry_doubles(given))
        for run in runners:
            run(given)


def told(rows: list[dict[str, Any]]) -> list[str]:
    failed = [row for row in rows if "failed" in row]
    rows = [row for row in rows if "failed" not in row]
    clean, faulty = [r for r in rows if r["fault"] is None], [r for r in rows if r["fault"] is not None]
    large = [row for row in faulty if row["effect"] > LIMIT]
    seen = [row for row in large if row["seen"]]
    right = [row for row in seen if row["right"]]
    small = [row for row in faulty if row["effect"] <= LIMIT]
    lines = [
        f"{len(faulty)} faults in {len({row['model'] for row in rows})} models; {len(large)} with an effect of more "
        f"than {LIMIT:g} noise floors: {len(seen)} seen, of which the place is named right in {len(right)} "
        f"({len(right) / max(1, len(seen)):.1%}). Of the {len(small)} smaller ones {sum(r['seen'] for r in small)} are "
        f"seen. Candidates without a fault: {len(clean)}, {sum(r['seen'] for r in clean)} false alarms."
        + (f" {len(failed)} cases could not be exported." if failed else ""),
        "",
        "| criterion | faults above 10 floors missed | false alarms without a fault |",
        "|---|---|---|",
        f"| `normswap.verify` | {len(large) - len(seen)} of {len(large)} | "
        f"{sum(r['seen'] for r in clean)} of {len(clean)} |",
    ]
    names = {"allclose 1e-05": "`numpy.allclose`, 1e-5", "allclose 0.001": "`numpy.allclose`, 1e-3"}
    for key in ("allclose 1e-05", "allclose 0.001", "torch.onnx"):
        missed = sum(row["others"][key] for row in large)
        alarms = sum(not row["others"][key] for row in clean)
        label = names.get(key, "`torch.onnx.export(verify=True)`'s thresholds")
        lines.append(f"| {label} | {missed} of {len(large)} | {alarms} of {len(clean)} |")
    lines += [
        "",
        "| fault | cases | above 10 floors | seen | place right | smallest effect seen, floors |",
        "|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(row["fault"] for row in faulty):
        mine = [row for row in faulty if row["fault"] == kind]
        big = [row for row in mine if row["effect"] > LIMIT]
        hit = [row for row in big if row["seen"]]
        least = min((row["effect"] for row in mine if row["seen"]), default=None)
        lines.append(
            f"| {kind.replace('_', ' ')} | {len(mine)} | {len(big)} | {len(hit)} | {sum(r['right'] for r in hit)} | "
            f"{'' if least is None else f'{least:.2g}'} |"
        )
    wrong = [row for row in seen if not row["right"]]
    if wrong:
        lines += ["", "Places named wrong:", ""]
        lines += [
            f"- {r['model']}, {r['made']}, {r['fault']}: {r['place']}, not {' or '.join(r['expected'])}" for r in wrong
        ]
    return lines
