"""Random networks for folding: one seed, one network, exactly.

Branches, sums, concatenations, splits, shared modules, aliases, tied weights, hooks, functional reads, mixed train and
eval modes, in-place activations, one to three spatial axes, token layouts, and roots that FX cannot trace."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
import tests.zoo.schemas  # noqa: F401  before timm
from normswap.norms.frozen import FrozenBatchNorm

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
AVERAGES = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
MAXIMA = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
ADAPTIVE = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
TOLERANCE = 1e-9


class Program(nn.Module):
    """Runs a list of steps over a list of values; a step names an operation, its inputs and its arguments."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dims = dims
        self.parts = nn.ModuleList()
        self.steps: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = []
        self.results: list[int] = []

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for name, inputs, arguments in self.steps:
            values.append(getattr(self, f"do_{name}")(*(values[i] for i in inputs), *arguments))
        return tuple(values[i] for i in self.results)

    def do_module(self, x: Tensor, index: int) -> Tensor:
        return self.parts[index](x)

    def do_relu(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def do_relu_in_place(self, x: Tensor) -> Tensor:
        F.relu_(x)
        return x

    def do_add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def do_subtract(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.sub(a, b)

    def do_cat(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b], dim=1)

    def do_piece(self, x: Tensor, index: int) -> Tensor:
        return x.chunk(2, dim=1)[index]

    def do_scale(self, x: Tensor, factor: float) -> Tensor:
        return x * factor

    def do_shift(self, x: Tensor, amount: float) -> Tensor:
        return x + amount

    def do_pad(self, x: Tensor, mode: str) -> Tensor:
        out = F.pad(x, [1, 1] * self.dims, mode=mode)
        return out[(slice(None), slice(None), *[slice(0, -2)] * self.dims)]

    def do_tokens(self, x: Tensor, index: int) -> Tensor:
        tokens = self.parts[index](x.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).reshape(x.shape[0], tokens.shape[2], *x.shape[2:])

    def do_flat_tokens(self, x: Tensor, linear: int, norm: int) -> Tensor:
        tokens = self.parts[linear](x.flatten(2).transpose(1, 2))
        tokens = self.parts[norm](tokens.flatten(0, 1)).reshape_as(tokens)
        return tokens.permute(0, 2, 1).reshape(x.shape[0], tokens.shape[2], *x.shape[2:])

    def do_weight_read(self, x: Tensor, index: int) -> Tensor:
        return x + self.parts[index].weight.mean()

    def do_functional_norm(self, x: Tensor, index: int) -> Tensor:
        n = self.parts[index]
        return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, False, 0.0, n.eps)

    def do_head(self, x: Tensor, pool: int, norm: int, linear: int) -> Tensor:
        return self.parts[linear](self.parts[norm](self.parts[pool](x).flatten(1)))


class Untraceable(nn.Module):
    """A root whose control flow depends on values; optionally reaches into what it calls."""

    def __init__(self, body: Program, reaches: int | None) -> None:
        super().__init__()
        self.body = body
        self.reaches = reaches

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if x.sum() > 1e30:
            return (x,)
        out = self.body(x)
        if self.reaches is not None:
            out = (*out, self.body.parts[self.reaches](x))
        return out


@dataclass
class Builder:
    """Draws the steps of one network."""

    seed: int
    rng: random.Random = field(init=False)
    channels: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.program = Program(self.rng.choice([1, 2, 2, 2, 3]))
        self.channels = [4]

    @property
    def dims(self) -> int:
        return self.program.dims

    def part(self, module: nn.Module) -> int:
        self.program.parts.append(module)
        return len(self.program.parts) - 1

    def step(self, name: str, inputs: tuple[int, ...], arguments: tuple[Any, ...], channels: int) -> int:
        self.program.steps.append((name, inputs, arguments))
        self.channels.append(channels)
        return len(self.channels) - 1

    def value(self) -> int:
        """Mostly the newest value, so that chains form."""
        return len(self.channels) - 1 if self.rng.random() < 0.75 else self.rng.randrange(len(self.channels))

    def conv(self, inputs: int, outputs: int) -> nn.Module:
        groups = self.rng.choice([g for g in (1, 2, 4) if inputs % g == 0 and outputs % g == 0])
        kernel = self.rng.choice([1, 3])
        bias = self.rng.random() < 0.5
        if self.rng.random() < 0.2:
            return TRANSPOSED[self.dims](inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=bias)
        mode = self.rng.choice(["zeros", "zeros", "replicate", "circular"])
        dilation = self.rng.choice([1, 2]) if kernel == 3 else 1
        padding = dilation * (kernel // 2)
        return CONVS[self.dims](
            inputs, outputs, kernel, padding=padding, dilation=dilation, groups=groups, bias=bias, padding_mode=mode
        )

    def norm(self, channels: int) -> nn.Module:
        draw = self.rng.random()
        if draw < 0.15:
            return FrozenBatchNorm(channels, eps=self.rng.choice([1e-5, 1e-2]))
        if draw < 0.3 and self.dims == 2:
            from timm.layers import BatchNormAct2d

            return BatchNormAct2d(channels, apply_act=self.rng.random() < 0.7)
        return NORMS[self.dims](channels, eps=self.rng.choice([1e-5, 1e-3]), affine=self.rng.random() < 0.9)

    def draw(self) -> None:
        at = self.value()
        width = self.channels[at]
        parts = list(self.program.parts)
        name = self.rng.choices(
            ["conv", "norm", "conv_norm", "again", "act", "sum", "cat", "piece", "number", "pool", "pad", "linear",
             "flat", "passing", "read", "functional"],
            [5, 5, 12, 2, 3, 3, 3, 2, 2, 3, 2, 2, 2, 3, 0.5, 1],
        )[0]  # fmt: skip
        if name in ("conv", "conv_norm"):
            outputs = self.rng.choice([4, 8])
            at = self.step("module", (at,), (self.part(self.conv(width, outputs)),), outputs)
            if name == "conv_norm":
                self.step("module", (at,), (self.part(self.norm(outputs)),), outputs)
        elif name == "norm":
            self.step("module", (at,), (self.part(self.norm(width)),), width)
        elif name == "again":  # a module a second time
            fitting = [i for i, m in enumerate(parts) if self.widths(m)[0] == width]
            if fitting:
                index = self.rng.choice(fitting)
                self.step("module", (at,), (index,), self.widths(parts[index])[1] or width)
        elif name == "act":
            kind = self.rng.choice(["relu", "relu_in_place", "module"])
            arguments = (self.part(nn.ReLU(inplace=self.rng.random() < 0.5)),) if kind == "module" else ()
            self.step(kind, (at,), arguments, width)
        elif name == "sum":
            others = [i for i, c in enumerate(self.channels) if c == width]
            self.step(self.rng.choice(["add", "add", "subtract"]), (at, self.rng.choice(others)), (), width)
        elif name == "cat":
            other = self.rng.randrange(len(self.channels))
            if width + self.channels[other] <= 16:
                self.step("cat", (at, other), (), width + self.channels[other])
        elif name == "piece" and width % 4 == 0:
            self.step("piece", (at,), (self.rng.randrange(2),), width // 2)
        elif name == "number":
            number = self.rng.choice([0.5, -2.0, 3.0])
            self.step(self.rng.choice(["scale", "shift"]), (at,), (number,), width)
        elif name == "pool":
            pool = self.rng.choice([AVERAGES, MAXIMA])[self.dims]
            extra = {"count_include_pad": self.rng.random() < 0.5} if pool in AVERAGES.values() else {}
            self.step("module", (at,), (self.part(pool(3, 1, 1, **extra)),), width)
        elif name == "pad":
            self.step("pad", (at,), (self.rng.choice(["constant", "replicate", "reflect"]),), width)
        elif name == "linear":
            self.step("tokens", (at,), (self.part(nn.Linear(width, 4)),), 4)
        elif name == "flat":
            self.step("flat_tokens", (at,), (self.part(nn.Linear(width, 8)), self.part(nn.BatchNorm1d(8))), 8)
        elif name == "passing":
            module = self.rng.choice([nn.Identity(), nn.Dropout(0.3)])
            self.step("module", (at,), (self.part(module),), width)
        elif name == "read":
            weighted = [i for i, m in enumerate(parts) if getattr(m, "weight", None) is not None]
            if weighted:
                self.step("weight_read", (at,), (self.rng.choice(weighted),), width)
        elif name == "functional":
            self.step("functional_norm", (at,), (self.part(NORMS[self.dims](width)),), width)

    def widths(self, module: nn.Module) -> tuple[int | None, int | None]:
        """Channels in and out of a layer or norm that acts on channels-first maps."""
        if isinstance(module, nn.modules.conv._ConvNd):
            return module.in_channels, module.out_channels
        if hasattr(module, "num_features") and not (isinstance(module, nn.BatchNorm1d) and self.dims != 1):
            return module.num_features, module.num_features
        return None, None

    def build(self) -> nn.Module:
        for _ in range(self.rng.randrange(3, 16)):
            self.draw()
        last = len(self.channels) - 1
        if self.rng.random() < 0.3:
            width = self.channels[last]
            pool = self.part(ADAPTIVE[self.dims](self.rng.choice([1, 2])))
            flat = width * self.program.parts[pool].output_size ** self.dims
            self.step("head", (last,), (pool, self.part(nn.BatchNorm1d(flat)), self.part(nn.Linear(flat, 5))), 5)
            last += 1
        self.program.results = [last]
        if self.rng.random() < 0.15:
            self.program.results.append(self.rng.randrange(len(self.channels)))
        self.finish()
        if self.rng.random() < 0.15:
            first = [i for i, m in enumerate(self.program.parts) if self.widths(m)[0] == 4]
            reaches = self.rng.choice(first) if first and self.rng.random() < 0.5 else None
            return Untraceable(self.program, reaches)
        return self.program

    def finish(self) -> None:
        """Statistics that are never the fresh ones, modes, ties and hooks."""
        torch.manual_seed(self.seed)
        self.program.double().eval()
        convs = [m for m in self.program.parts if isinstance(m, nn.modules.conv._ConvNd)]
        norms = [m for m in self.program.modules() if isinstance(getattr(m, "running_mean", None), Tensor)]
        for norm in norms:
            norm.running_mean.normal_(0, 0.5)
            norm.running_var.uniform_(0.5, 2)
            for tensor, spread in ((norm.weight, 1.0), (norm.bias, 0.3)):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 1.5).mul_(torch.randn(tensor.shape).sign()).mul_(spread)
            if norm.bias is not None and self.rng.random() < 0.2:
                norm.running_mean.zero_()
                norm.bias.data.zero_()
            if norm.weight is not None and self.rng.random() < 0.4:
                norm.weight.data.abs_()
            if self.rng.random() < 0.08:
                norm.train()
        for module in (*convs, *norms):
            if self.rng.random() < 0.05:
                module.register_forward_hook(remember)
        for conv in convs:
            twins = [c for c in convs if c is not conv and c.weight.shape == conv.weight.shape]
            if twins and self.rng.random() < 0.08:
                conv.weight = self.rng.choice(twins).weight


def remember(module: nn.Module, _inputs: Any, output: Tensor) -> None:
    module.remembered = output.detach().clone()


def network(seed: int) -> nn.Module:
    """The network of a seed."""
    return Builder(seed).build()


def inputs(model: nn.Module, seed: int, batch: int) -> Tensor:
    program = model.body if isinstance(model, Untraceable) else model
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, *[5] * program.dims, generator=generator, dtype=torch.float64)


@dataclass
class Tally:
    """What folding did to one network."""

    foldable: int = 0
    folded: int = 0
    error: float = 0.0
    """The largest, but for outputs that are rounding noise alone."""
    noise: int = 0
    """Networks whose output is that."""


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs, and what hooks saw, of a copy: train-mode norms change their statistics."""
    copied = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        out = list(copied(x.clone()))
    return out + [m.remembered for m in copied.modules() if hasattr(m, "remembered")]


def check(seed: int) -> Tally:
    """Fold the network of a seed, without and with an observed run, and compare; ``AssertionError`` says what is
    wrong."""
    model = network(seed)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tally = Tally()
    for example in (None, (inputs(model, seed + 1, 3),)):
        plan = normswap.plan_fold(model, example_inputs=example)
        folded = plan.apply()
        assert isinstance(folded, type(model))
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()), "input changed"
        listed = {n for entry in (*plan.changes, *plan.skips) for n in (entry.name, *entry.aliases)}
        norms = {name for name, m in model.named_modules() if isinstance(getattr(m, "running_mean", None), Tensor)}
        assert norms <= listed, f"not in the plan: {sorted(norms - listed)}"
        for batch in (2, 5):
            x = inputs(model, seed + 10 + batch, batch)
            for ours, theirs in zip(run(folded, x), run(model, x), strict=True):
                assert ours.shape == theirs.shape
                error = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-300))
                tally.error = max(tally.error, error)
                evidence = "observed" if example else "static"
                assert error <= TOLERANCE, f"relative error {error:.2e}, {evidence}\n{plan}"
        again = normswap.apply_recipe(model, plan.recipe) if example is None else folded
        assert again.state_dict().keys() == folded.state_dict().keys()
        tally.foldable += sum(
            m.running_mean is not None and (not m.training or isinstance(m, FrozenBatchNorm))
            for m in model.modules()
            if hasattr(m, "running_mean")
        )
        tally.folded += sum(bool(change.into) for change in plan.changes)
    return tally
