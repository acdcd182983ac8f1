"""The layers that torch lacks against ``nn.BatchNorm2d``, and Switchable against the reference implementation of its
paper: time of forward and backward, and what is kept for backward."""

from __future__ import annotations

import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normswap.norms.adaptive_instance import AdaptiveInstanceNorm2d
from normswap.norms.adaptive_momentum import AdaptiveBatchNorm2d
from normswap.norms.batch_instance import BatchInstanceNorm2d
from normswap.norms.condition import condition
from normswap.norms.conditional import ConditionalNorm2d
from normswap.norms.domain import DomainBatchNorm2d
from normswap.norms.evonorm import EvoNormB02d, EvoNormS02d
from normswap.norms.frn import FilterResponseNorm2d
from normswap.norms.ghost import GhostBatchNorm2d
from normswap.norms.layer import ChannelLayerNorm, ChannelsFirstLayerNorm
from normswap.norms.learned_groups import LearnedGroupNorm2d
from normswap.norms.momentum import Warmup
from normswap.norms.multiscale import MultiscaleNorm2d
from normswap.norms.positional import PositionalNorm2d
from normswap.norms.renorm import BatchRenorm2d
from normswap.norms.rms import ChannelRMSNorm, ChannelsFirstRMSNorm
from normswap.norms.switchable import SwitchableNorm2d
from normswap.norms.virtual import VirtualBatchNorm2d

SHAPES = ((16, 64, 56, 56), (8, 256, 28, 28), (2, 64, 112, 112))


class Reference(nn.Module):
    """Switchable normalization as the paper's own code has it (github.com/switchablenorms), written anew from its
    operations: unbiased instance variances, the others from second moments, everything by autograd."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.mean_weight = nn.Parameter(torch.ones(3))
        self.var_weight = nn.Parameter(torch.ones(3))
        self.register_buffer("running_mean", torch.zeros(1, channels, 1))
        self.register_buffer("running_var", torch.zeros(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        samples, channels, height, width = x.size()
        x = x.view(samples, channels, -1)
        mean_in, var_in = x.mean(-1, keepdim=True), x.var(-1, keepdim=True)
        second = var_in + mean_in**2
        mean_ln = mean_in.mean(1, keepdim=True)
        var_ln = second.mean(1, keepdim=True) - mean_ln**2
        mean_bn = mean_in.mean(0, keepdim=True)
        var_bn = second.mean(0, keepdim=True) - mean_bn**2
        with torch.no_grad():
            self.running_mean.mul_(0.9).add_(0.1 * mean_bn)
            self.running_var.mul_(0.9).add_(0.1 * var_bn)
        mean_weight, var_weight = self.mean_weight.softmax(0), self.var_weight.softmax(0)
        mean = mean_weight[0] * mean_in + mean_weight[1] * mean_ln + mean_weight[2] * mean_bn
        var = var_weight[0] * var_in + var_weight[1] * var_ln + var_weight[2] * var_bn
        x = (x - mean) / (var + 1e-5).sqrt()
        return x.view(samples, channels, height, width) * self.weight + self.bias


def style(channels: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(channels), torch.ones(channels)


class Sigmoids(torch.autograd.Function):
    """Nothing but a sigmoid in each direction: what EvoNorm S0 does besides normalizing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sigmoid()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return ctx.saved_tensors[0].sigmoid()


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Sigmoids.apply(x)
        return out


class Given(nn.Module):
    """A layer with the same condition each time."""

    def __init__(self, layer: nn.Module, **values: Any) -> None:
        super().__init__()
        self.layer, self.values = layer, values

    def forward(self, x: Tensor) -> Tensor:
        with condition(self.layer, **self.values):
            return self.layer(x)


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "nn.BatchNorm2d": nn.BatchNorm2d,
    "nn.BatchNorm2d, nn.ReLU": lambda channels: nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU()),
    "reference Switchable": Reference,
    "switchable": SwitchableNorm2d,
    "switchable, batch=False": lambda channels: SwitchableNorm2d(channels, batch=False),
    "renorm": BatchRenorm2d,
    "ghost, virtual_batch=4": lambda channels: GhostBatchNorm2d(channels, virtual_batch=4),
    "batch_instance": BatchInstanceNorm2d,
    "frn": lambda channels: FilterResponseNorm2d(channels, threshold=False),
    "frn with its unit": FilterResponseNorm2d,
    "nn.BatchNorm2d, nn.SiLU": lambda channels: nn.Sequential(nn.BatchNorm2d(channels), nn.SiLU()),
    "`torch.sigmoid` twice": lambda channels: Twice(),
    "evonorm_b0": EvoNormB02d,
    "evonorm_s0": EvoNormS02d,
    "adaptive_instance": lambda channels: Given(AdaptiveInstanceNorm2d(channels), style=style(channels)),
    "conditional": lambda channels: Given(ConditionalNorm2d(channels), label=1),
    "domain": lambda channels: Given(DomainBatchNorm2d(channels), domain=1),
    "virtual": VirtualBatchNorm2d,
    "adaptive_momentum": lambda channels: AdaptiveBatchNorm2d(channels, momentum=Warmup(0.1)),
    "multiscale": MultiscaleNorm2d,
    "positional": PositionalNorm2d,
    "layer over channels": ChannelLayerNorm,
    "layer over the map": ChannelsFirstLayerNorm,
    "rms over channels": ChannelRMSNorm,
    "rms over the map": ChannelsFirstRMSNorm,
    "learned_groups": LearnedGroupNorm2d,
}

AGAINST = (
    ("switchable", "reference Switchable"),
    ("evonorm_b0", "nn.BatchNorm2d, nn.SiLU"),
    ("evonorm_s0", "nn.BatchNorm2d, nn.SiLU"),
    ("frn with its unit", "nn.BatchNorm2d, nn.ReLU"),
)
"""Layers, and what else does their work: EvoNorm and the unit are activations too."""

NOTES = [
    "EvoNorm takes a sigmoid (S0) or a quotient (B0) of every value in both directions, since only x is kept; torch",
    "has no kernel that does this along with the sums. With channels last, batch normalization is about as fast as",
    "two sigmoids (`torch.sigmoid` twice above); a batch normalization and SiLU, too, take more than twice its time.",
    "Multiscale with cells of unequal sizes (where 4 does not divide a side) takes longer: 3.3 to 4.1 times batch",
    "normalization at (16, 64, 30, 30), 4.4 to 5.2 at (16, 256, 14, 14), 13 to 15 at (16, 512, 7, 7), where a cell has",
    "one to four values and the cells are a third of them; with channels last 5 to 16. Cells whose means are far from",
    "zero against their spread are shifted first, which takes half as long again.",
]


def keep_memory() -> None:
    """Have glibc keep what is freed: otherwise it gives memory back to the system at a threshold that one layer just
    reaches and another does not, and who asks for it again pays for every page."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 1 << 30)
        mallopt(mmap_threshold, 1 << 25)


def kept(module: nn.Module, x: Tensor) -> float:
    """Bytes that autograd keeps for backward, in units of the input's; parameters left out."""
    sizes: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(x)
    del out
    return sum(sizes.values()) / x.nbytes


def step(module: nn.Module, x: Tensor, gradient: Tensor) -> None:
    x.grad = None
    module(x).backward(gradient)


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, taken in turns of random order: who runs after another that gives much memory back to the
    system pays for it. Of processor time on one thread, which neighbours on the machine disturb less."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
        run()
    gc.collect()
    gc.disable()
    order = random.Random(0)
    for _ in range(repeats):
        for name in order.sample(list(runs), len(runs)):
            start = clock()
            runs[name]()
            times[name].append(clock() - start)
    gc.enable()
    return {name: statistics.median(taken) for name, taken in times.items()}


def bench_layers(repeats: int) -> list[str]:
    keep_memory()
    lines = [
        f"Forward and backward in float32, median of {5 * repeats} taken in turns of random order"
        f"{', processor time' if torch.get_num_threads() == 1 else ''}. First the milliseconds of `nn.BatchNorm2d`,",
        "then the ratio of each layer's time to it. Kept: bytes held for backward, in units of the input's, at the",
        "first shape. Freed memory stays with the process: none pays for pages that another gave back.",
        "",
    ]
    for name, layout in (("contiguous", torch.contiguous_format), ("channels last", torch.channels_last)):
        heads = [str(shape) for shape in SHAPES]
        lines += [f"| {name} | {' | '.join(heads)} | kept |", "|---" * (len(heads) + 2) + "|"]
        ratios: dict[str, list[float]] = {each: [] for each in LAYERS}
        memory: dict[str, float] = {}
        against: dict[tuple[str, str], list[float]] = {pair: [] for pair in AGAINST}
        for shape in SHAPES:
            x = torch.randn(shape).to(memory_format=layout).requires_grad_()
            gradient = torch.randn(shape).to(memory_format=layout)
            modules = {each: make(shape[1]) for each, make in LAYERS.items()}
            if layout is not torch.contiguous_format:
                modules.pop("reference Switchable")  # which views its input, and cannot
            runs = {each: partial(step, m, x, gradient) for each, m in modules.items()}
            medians = interleaved(runs, 5 * repeats)
            batch = medians["nn.BatchNorm2d"]
            for each, median in medians.items():
                ratios[each].append(1e3 * median if each == "nn.BatchNorm2d" else median / batch)
                memory.setdefault(each, kept(modules[each], x))
            for one, other in against:
                if other in medians:
                    against[one, other].append(medians[one] / medians[other])
        for each, row in ratios.items():
            if row:
                unit = " ms" if each == "nn.BatchNorm2d" else ""
                lines.append(f"| {each} | {' | '.join(f'{r:.2f}{unit}' for r in row)} | {memory[each]:.2f} |")
        lines.append("")
        for (one, other), found in against.items():
            if found:
                lines.append(f"`{one}` to `{other}`: {', '.join(f'{ratio:.2f}' for ratio in found)}.")
        lines.append("")
    return [*lines, *NOTES]
