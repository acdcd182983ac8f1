"""Random networks written as Python source: one seed, the same classes, weights and hooks, exactly.

Where ``tests.fuzzing`` interprets a list of steps, here each network is a few classes with a ``forward`` of their own:
nested, called in several ways, with arguments by name, optional arguments, methods, control flow, views, writes in
place, values kept in attributes, weights that are read, plain lists, aliases, hooks and ties. ``source(seed)`` shows
the code of a counter-example.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree

import normswap
import tests.zoo.schemas  # noqa: F401  before timm and torchvision
from normswap.norms.frozen import FrozenBatchNorm
from tests.fuzzing import TOLERANCE, Tally
from tests.support import picture

CHANNELS = (4, 6, 8)
SIZE = 6
"""Spatial size of the example input; no number of channels, no batch."""


class PlainSubclass(nn.BatchNorm2d):
    """A subclass that changes nothing."""


class DoubledNorm(nn.BatchNorm2d):
    """A subclass that is not what its parent is."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class OwnConv(nn.Conv2d):
    """A convolution with a ``forward`` of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).abs()


class RenamedConv(nn.Conv2d):
    """A convolution by another name."""


def helper(module: nn.Module, x: Tensor) -> Tensor:
    """Calls a module from a function."""
    return module(x)


@dataclass(frozen=True)
class Value:
    """A variable of a ``forward``: layout, channels, spatial axes, and a tag that is equal for equal spatial sizes."""

    name: str
    layout: str
    """``map`` (N, C, *S), ``pooled`` (N, C, 1, ...), ``last`` (N, *S, C), ``tokens`` (N, L, C) or ``flat`` (N, C)."""
    channels: int
    dims: int
    tag: str
    origin: str = ""
    """A map with the spatial axes of these tokens."""


@dataclass
class Block:
    """One class in the making."""

    writer: Writer
    name: str
    depth: int
    dims: int
    channels: int
    setup: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    layers: list[tuple[str, str, int, int]] = field(default_factory=list)
    """Attributes that take and give maps: name, kind, channels in and out."""
    optional: bool = False
    made: int = 0

    @property
    def rng(self) -> random.Random:
        return self.writer.rng

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def new(self, prefix: str = "m") -> str:
        self.made += 1
        return f"{prefix}{self.made}"

    def attribute(self, expression: str, prefix: str = "m") -> str:
        name = self.new(prefix)
        self.setup.append(f"self.{name} = {expression}")
        return name

    def put(self, expression: str, like: Value, **changes: Any) -> Value:
        value = replace(like, name=self.new("v"), **changes)
        self.body.append(f"{value.name} = {expression}")
        self.values.append(value)
        return value

    def pick(self, *layouts: str, **wanted: Any) -> Value | None:
        fitting = [
            v
            for v in self.values
            if (not layouts or v.layout in layouts) and all(getattr(v, name) == value for name, value in wanted.items())
        ]
        if not fitting:
            return None
        return fitting[-1] if self.chance(0.7) else self.rng.choice(fitting)

    # --- layers ------------------------------------------------------------------------------------------------------

    def conv(self, inputs: int, outputs: int) -> str:
        d, rng = self.dims, self.rng
        groups = rng.choice([g for g in (1, 1, 2, inputs) if inputs % g == 0 and outputs % g == 0])
        common = f"{inputs}, {outputs}, groups={groups}, bias={self.chance(0.5)}"
        draw = rng.random()
        if draw < 0.15:
            kernel = rng.choice(["1", "3, padding=1"])
            return f"nn.ConvTranspose{d}d({common}, kernel_size={kernel})"
        if draw < 0.22 and d == 2:
            return f"Conv2dSame({common}, kernel_size=3)"
        if draw < 0.3 and d == 2:
            return f"{rng.choice(['OwnConv', 'RenamedConv'])}({common}, kernel_size=1)"
        mode = rng.choice(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"])
        kernel = rng.choice(
            ["1", "1", "3, padding=1", "3, padding='same'", "3, padding=2, dilation=2"][: 5 if mode == "zeros" else 4]
        )
        return f"nn.Conv{d}d({common}, kernel_size={kernel}, padding_mode={mode!r})"

    def norm(self, channels: int) -> str:
        d, draw = self.dims, self.rng.random()
        if draw < 0.1:
            return f"FrozenBatchNorm({channels}, eps={self.rng.choice([1e-5, 0.1])})"
        if draw < 0.3 and d == 2:
            return self.rng.choice(
                [
                    f"BatchNormAct2d({channels}, inplace={self.chance(0.5)})",
                    f"BatchNormAct2d({channels}, apply_act=False)",
                    f"FrozenBatchNorm2d({channels})",
                    f"PlainSubclass({channels})",
                    f"DoubledNorm({channels})",
                ]
            )
        if draw < 0.34:
            return f"nn.BatchNorm{d}d({channels}, track_running_stats=False)"
        if draw < 0.4:
            return f"nn.GroupNorm({2 - channels % 2}, {channels})"
        if draw < 0.45:
            return f"nn.SyncBatchNorm({channels})"
        affine = self.chance(0.9)
        return f"nn.BatchNorm{d}d({channels}, eps={self.rng.choice([1e-5, 1e-3])}, affine={affine})"

    def call(self, attribute: str, x: str) -> str:
        """One of the ways to call a module."""
        return self.rng.choices(
            [f"self.{attribute}({x})", f"helper(self.{attribute}, {x})", f"self.{attribute}.forward({x})"], [20, 1, 0.3]
        )[0]

    # --- statements: each gives whether it applied -------------------------------------------------------------------

    def do_conv(self) -> bool:
        v = self.pick("map", dims=self.dims)
        if v is None:
            return False
        outputs = self.rng.choice(CHANNELS)
        name = self.attribute(self.conv(v.channels, outputs), "conv")
        self.layers.append((name, "conv", v.channels, outputs))
        out = self.put(self.call(name, v.name), v, channels=outputs)
        if self.chance(0.75):
            self.passing(out)
            self.do_norm()
        return True

    def passing(self, v: Value) -> None:
        """Now and then something between a layer and its norm."""
        while self.chance(0.35):
            self.rng.choice([self.do_pass, self.do_number, self.do_pool, self.do_pad, self.do_read])()

    def do_norm(self) -> bool:
        v = self.pick("map", dims=self.dims)
        if v is None:
            return False
        name = self.attribute(self.norm(v.channels), "norm")
        self.layers.append((name, "norm", v.channels, v.channels))
        self.put(self.call(name, v.name), v)
        return True

    def do_again(self) -> bool:
        """A module a second time."""
        v = self.pick("map", dims=self.dims)
        fitting = [layer for layer in self.layers if v is not None and layer[2] == v.channels]
        if v is None or not fitting:
            return False
        name, _, _, outputs = self.rng.choice(fitting)
        self.put(self.call(name, v.name), v, channels=outputs)
        return True

    def do_act(self) -> bool:
        v = self.pick()
        if v is None:
            return False
        kind = self.rng.randrange(6)
        if kind == 0:
            self.put(f"self.{self.attribute(f'nn.ReLU(inplace={self.chance(0.5)})')}({v.name})", v)
        elif kind == 1:
            self.put(f"F.relu({v.name}, inplace={self.chance(0.3)})", v)
        else:
            choices = ["F.leaky_relu({})", "{}.sigmoid()", "torch.tanh({})", "F.silu({})"]
            self.put(self.rng.choice(choices).format(v.name), v)
        return True

    def do_number(self) -> bool:
        v = self.pick()
        if v is None:
            return False
        k = self.rng.choice([0.5, -2.0, 3, 1])
        forms = [
            "{v} * {k}",
            "{k} * {v}",
            "{v} + {k}",
            "{k} + {v}",
            "{v} - {k}",
            "{k} - {v}",
            "{v} / {k}",
            "torch.add({v}, {k})",
            "torch.mul(input={v}, other={k})",
            "{v}.sub({k})",
            "torch.add({v}, {k}, alpha=2)",
            "torch.sub({v}, {k}, alpha=3)",
            "{v}.div({k})",
            "-{v}",
            "{v}.mul_({k})",
            "{v}.add_({k})",
            "torch.div({v}, {k}, rounding_mode='floor')",
            "{k} / ({v} + 9)",
        ]
        self.put(self.rng.choice(forms).format(v=v.name, k=k), v)
        return True

    def do_augment(self) -> bool:
        """``x += 1``: the same name, written over."""
        v = self.pick()
        if v is None or v.name == "x":
            return False
        self.body.append(f"{v.name} {self.rng.choice(['+=', '*=', '-='])} {self.rng.choice([2, 0.5])}")
        return True

    def do_write(self) -> bool:
        """A write in place to a value or a view of it, whose result nobody takes."""
        v = self.pick()
        if v is None or v.name == "x":
            return False
        forms = ["F.relu_({})", "{}.flatten(1).mul_(2)", "{}[:1].add_(1)", "{}.detach().neg_()", "{}.clamp_(min=-0.5)"]
        self.body.append(self.rng.choice(forms).format(v.name))
        return True

    def do_sum(self) -> bool:
        v = self.pick()
        others = (
            []
            if v is None
            else [o for o in self.values if replace(o, name="", origin="") == replace(v, name="", origin="")]
        )
        if v is None or not others:
            return False
        o = self.rng.choice(others)
        forms = [
            "{a} + {b}",
            "{a} - {b}",
            "torch.add({a}, {b})",
            "torch.add({a}, {b}, alpha=2)",
            "{a} * {b}",
            "{a}.add({b})",
            "torch.sub(input={a}, other={b})",
            "{a}.add_({b})",
            "torch.maximum({a}, {b})",
        ]
        self.put(self.rng.choice(forms).format(a=v.name, b=o.name), v)
        return True

    def do_broadcast(self) -> bool:
        """A map and what is pooled from a map, with broadcasting."""
        v = self.pick("map")
        if v is None:
            return False
        axes = tuple(range(2, 2 + v.dims))
        keep = self.rng.choice(["keepdim", "keepdims"])
        pooled = self.put(f"{v.name}.mean({axes}, {keep}=True)", v, layout="pooled")
        other = self.pick("map", channels=v.channels, dims=v.dims)
        assert other is not None
        self.put(f"{other.name} {self.rng.choice('+-*')} {pooled.name}", other)
        return True

    def do_cat(self) -> bool:
        v = self.pick("map", "flat")
        if v is None:
            return False
        others = [o for o in self.values if (o.layout, o.dims, o.tag) == (v.layout, v.dims, v.tag) and o.channels <= 8]
        others = [o for o in others if v.channels + o.channels <= 16]
        if not others:
            return False
        o = self.rng.choice(others)
        form = self.rng.choice(
            [
                "torch.cat([{}, {}], 1)",
                "torch.cat(({}, {}), dim=1)",
                "torch.cat(tensors=[{}, {}], axis=1)",
                f"torch.concat([{{}}, {{}}], dim={-1 - v.dims if v.layout == 'map' else -1})",
            ]
        )
        self.put(form.format(v.name, o.name), v, channels=v.channels + o.channels)
        return True

    def do_split(self) -> bool:
        v = self.pick("map", "flat")
        if v is None or v.channels < 4:
            return False
        half = v.channels // 2
        kind = self.rng.randrange(5)
        if kind < 2:
            a, b = self.new("v"), self.new("v")
            form = [f"{v.name}.chunk(2, dim=1)", f"torch.split({v.name}, {half}, 1)"][kind]
            self.body.append(f"{a}, {b} = {form}")
            self.values += [replace(v, name=a, channels=half), replace(v, name=b, channels=half)]
        elif kind == 2:
            self.put(
                f"{v.name}.split([2, {v.channels - 2}], 1)[{self.rng.choice([1, -1])}]", v, channels=v.channels - 2
            )
        elif kind == 3:
            self.put(f"{v.name}[:, {half}:]", v, channels=v.channels - half)
        else:
            self.put(f"torch.chunk({v.name}, chunks=2, axis=1)[0]", v, channels=half)
        return True

    def do_shuffle(self) -> bool:
        """The channels in another order, or mixed."""
        v = self.pick("map", dims=2)
        if v is None:
            return False
        c = v.channels
        forms = [
            f"{{v}}.view({{v}}.size(0), 2, {c // 2}, {{v}}.size(2), {{v}}.size(3))"
            ".transpose(1, 2).reshape({v}.shape)",
            "torch.roll({v}, 1, dims=1)",
            "{v}.flip(1)",
            f"{{v}}[:, {[*reversed(range(c))]}]",
            "F.pixel_unshuffle(F.pixel_shuffle({v}, 2), 2)" if c % 4 == 0 else "{v}.flip(1)",
            "F.pad({v}, (0, 0, 0, 0, 1, -1))",
            "{v}.transpose(1, 2).reshape({v}.shape)",
        ]
        self.put(self.rng.choice(forms).format(v=v.name), v)
        return True

    def do_pool(self) -> bool:
        v = self.pick("map")
        if v is None:
            return False
        d = v.dims
        counted = self.chance(0.5)
        same = [
            f"F.max_pool{d}d({{}}, 3, 1, 1)",
            f"F.avg_pool{d}d({{}}, 3, 1, 1, count_include_pad={counted})",
            f"F.avg_pool{d}d({{}}, kernel_size=3, stride=1, padding=1, count_include_pad={counted})",
            "self.{m}({})",
        ]
        form = self.rng.choice(same)
        if "{m}" in form:
            made = self.rng.choice(
                [
                    f"nn.MaxPool{d}d(3, 1, 1)",
                    f"nn.AvgPool{d}d(3, 1, 1, count_include_pad={counted})",
                    f"nn.AvgPool{d}d(1, 1, divisor_override=3)" if d > 1 else "nn.AvgPool1d(1)",
                ]
            )
            form = form.replace("{m}", self.attribute(made))
        self.put(form.format(v.name), v)
        return True

    def do_resize(self) -> bool:
        v = self.pick("map")
        if v is None or v.tag.count("/") > 1:
            return False
        d = v.dims
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[d]
        down = self.rng.choice(
            [
                f"F.avg_pool{d}d({{}}, 2, ceil_mode=True)",
                f"F.max_pool{d}d({{}}, 2, ceil_mode=True)",
                f"self.{self.attribute(f'nn.AvgPool{d}d(2, ceil_mode=True)')}({{}})",
            ]
        )
        up = self.rng.choice([f"F.interpolate({{}}, size={{v}}.shape[2:], mode={m!r})" for m in ("nearest", mode)])
        low = self.put(down.format(v.name), v, tag=f"{v.tag}/2")
        if self.chance(0.5):
            self.do_conv()
            low = self.pick("map", dims=v.dims, tag=f"{v.tag}/2") or low
        self.put(up.format(low.name, v=v.name), low, tag=v.tag)
        return True

    def do_pad(self) -> bool:
        v = self.pick("map")
        if v is None:
            return False
        d = v.dims
        zeros = ", ".join(["1", "-1"] * d)
        forms = [f"F.pad({{}}, ({zeros}))", f"F.pad({{}}, ({zeros}), value=0.5)", f"F.pad(input={{}}, pad=({zeros}))"]
        if d == 2:
            forms += [
                f"self.{self.attribute('nn.ZeroPad2d(1)')}({{}})[:, :, 1:-1, 1:-1]",
                f"self.{self.attribute('nn.ReflectionPad2d(1)')}({{}})[:, :, 1:-1, 1:-1]",
                "F.pad({}, (1, 1, 1, 1), mode='circular')[..., 2:, 2:]",
            ]
        self.put(self.rng.choice(forms).format(v.name), v)
        return True

    def do_pass(self) -> bool:
        v = self.pick()
        if v is None:
            return False
        made = self.rng.choice(["nn.Identity()", "nn.Dropout(0.3)", "DropPath(0.3)", "nn.Sequential()"])
        forms = [
            f"self.{self.attribute(made)}({{}})",
            "{}.contiguous()",
            "{}.clone()",
            "F.dropout({}, 0.2, self.training)",
            "{}.double()",
            "{}.view_as({})",
            "torch.squeeze(torch.unsqueeze({}, -1), -1)",
            "{}.unsqueeze(1).squeeze(1)",
        ]
        self.put(self.rng.choice(forms).replace("{}", v.name), v)
        return True

    def do_read(self) -> bool:
        """A value that is read for its shape only, or for its numbers."""
        v, o = self.pick(), self.pick()
        if v is None or o is None:
            return False
        forms = [
            "{o} * {v}.shape[0]",
            "{o} + {v}.new_zeros(1)",
            "{o} + {v}.mean()",
            "{o} * {v}.dim()",
            "{o}.to({v}.dtype)",
            "{o}.type_as({v})",
            "{o} + torch.zeros_like({v}).sum()",
        ]
        self.put(self.rng.choice(forms).format(o=o.name, v=v.name), o)
        return True

    def do_tokens(self) -> bool:
        v = self.pick("map")
        if v is None or v.dims == 0:
            return False
        form = self.rng.choice(
            [
                "{}.flatten(2).transpose(1, 2)",
                "torch.flatten({}, start_dim=2).permute(0, 2, 1)",
                "{}.flatten(2).swapaxes(axis0=1, axis1=2)",
                "{}.reshape({}.shape[0], {}.shape[1], -1).movedim(1, 2)",
            ]
        )
        t = self.put(form.replace("{}", v.name), v, layout="tokens", origin=v.name)
        if self.chance(0.8):
            outputs = self.rng.choice(CHANNELS)
            name = self.attribute(f"nn.Linear({t.channels}, {outputs}, bias={self.chance(0.5)})", "linear")
            t = self.put(f"self.{name}({t.name})", t, channels=outputs)
        draw = self.rng.randrange(4)
        if draw == 0:
            norm = self.attribute(f"nn.BatchNorm1d({t.channels})", "norm")
            t = self.put(f"self.{norm}({t.name}.transpose(1, 2)).transpose(1, 2)", t)
        elif draw == 1:
            norm = self.attribute(f"nn.BatchNorm1d({t.channels})", "norm")
            t = self.put(f"self.{norm}({t.name}.flatten(0, 1)).reshape_as({t.name})", t)
        elif draw == 2:
            norm = self.attribute(f"nn.BatchNorm1d({t.channels})", "norm")
            t = self.put(f"self.{norm}({t.name}.reshape(-1, {t.channels})).view({t.name}.shape)", t)
        if self.chance(0.8):
            self.put(
                f"{t.name}.transpose(1, 2).reshape({v.name}.shape[0], {t.channels}, *{v.name}.shape[2:])"
                if self.chance(0.7)
                else f"{t.name}.permute(0, 2, 1).unflatten(2, {v.name}.shape[2:])",
                v,
                channels=t.channels,
            )
        return True

    def do_square(self) -> bool:
        """(N, L, C) with L == C in front of a BatchNorm1d, which takes axis 1."""
        v = self.pick("map", dims=1)
        if v is None:
            return False
        c = v.channels
        t = self.put(f"F.adaptive_avg_pool1d({v.name}, {c})", v, tag=f"={c}")
        linear, norm = self.attribute(f"nn.Linear({c}, {c})", "linear"), self.attribute(f"nn.BatchNorm1d({c})", "norm")
        way = self.rng.choice(
            ["{}", "{}.transpose(1, 2)", "F.avg_pool2d({}, (3, 1), 1, (1, 0), count_include_pad=False)"]
        )
        self.put(f"self.{norm}({way.format(f'self.{linear}({t.name})')})", t)
        return True

    def do_last(self) -> bool:
        v = self.pick("map", dims=2)
        if v is None:
            return False
        t = self.put(self.rng.choice(["{}.permute(0, 2, 3, 1)", "{}.movedim(1, -1)"]).format(v.name), v, layout="last")
        outputs = self.rng.choice(CHANNELS)
        name = self.attribute(f"nn.Linear({t.channels}, {outputs})", "linear")
        t = self.put(f"self.{name}({t.name})", t, channels=outputs)
        self.put(self.rng.choice(["{}.permute(0, 3, 1, 2)", "{}.movedim(-1, 1)"]).format(t.name), v, channels=outputs)
        return self.do_norm()

    def do_flat(self) -> bool:
        v = self.pick("map")
        if v is None:
            return False
        d, c = v.dims, v.channels
        form, channels = self.rng.choice(
            [
                (f"F.adaptive_avg_pool{d}d({v.name}, 1).flatten(1)", c),
                (f"F.adaptive_avg_pool{d}d({v.name}, 2).flatten(1)", c * 2**d),
                (f"{v.name}.mean({tuple(range(2, 2 + d))})", c),
                (f"{v.name}.amax({tuple(range(2, 2 + d))})", c),
                (f"self.{self.attribute(f'nn.AdaptiveAvgPool{d}d(1)')}({v.name}).view({v.name}.size(0), -1)", c),
            ]
        )
        t = self.put(form, v, layout="flat", channels=channels, tag="flat", dims=0)
        for _ in range(self.rng.randrange(4)):
            if self.chance(0.5):
                name = self.attribute(f"nn.BatchNorm1d({t.channels})", "norm")
                t = self.put(f"self.{name}({t.name})", t)
            else:
                outputs = self.rng.choice(CHANNELS)
                name = self.attribute(f"nn.Linear({t.channels}, {outputs})", "linear")
                t = self.put(f"self.{name}({t.name})", t, channels=outputs)
        if t.channels == c and self.chance(0.5):
            ones = ", None" * d
            self.put(f"{v.name} * {t.name}[:, :{ones}]", v)
        return True

    def do_functional(self) -> bool:
        v = self.pick("map", dims=self.dims)
        if v is None:
            return False
        kind = self.rng.randrange(3)
        norms = [name for name, k, inputs, _ in self.layers if k == "norm" and inputs == v.channels]
        convs = [layer for layer in self.layers if layer[1] == "conv" and layer[2] == v.channels]
        if kind == 0 and norms:
            n = f"self.{self.rng.choice(norms)}"
            if f"{n} = nn.BatchNorm" not in "\n".join(self.setup) or "track" in "\n".join(self.setup):
                return False
            self.put(f"F.batch_norm({v.name}, {n}.running_mean, {n}.running_var, {n}.weight, {n}.bias)", v)
        elif kind == 1 and convs:
            name, *_ = self.rng.choice(convs)
            self.put(f"{v.name} + self.{name}.weight.mean()", v)
        else:
            name = self.attribute(f"nn.BatchNorm{self.dims}d({v.channels})", "norm")
            self.put(f"F.batch_norm({v.name}, self.{name}.running_mean, self.{name}.running_var)", v)
        return True

    def do_keep(self) -> bool:
        v = self.pick()
        if v is None:
            return False
        self.setup.append("self.kept = None")
        self.body.append(f"self.kept = {v.name}")
        return True

    def do_doubt(self) -> bool:
        """Python that looks at something."""
        v = self.pick("map", dims=self.dims)
        if v is None:
            return False
        other = self.new("v")
        conditions = [
            (f"{v.name}.sum() > 1e30", 3),
            (f"{v.name}.shape[0] > 1000", 1),
            (f"{v.name}.dim() == {v.dims + 2}", 1),
            ("self.training", 1),
            (f"isinstance({v.name}, torch.Tensor)", 2),
            ("extra is not None", 3 if self.optional else 0),
            ("self.number % 2 == 0", 1),
            (f"torch.is_grad_enabled() and {v.name}.requires_grad", 1),
        ]
        condition = self.rng.choices([c for c, _ in conditions], [w for _, w in conditions])[0]
        if "number" in condition:
            self.setup.append("self.number = 0")
            self.body.append("self.number += 1")
        yes = self.rng.choice(["{}.relu()", "{} + 1", "{} * 2", "-{}"]).format(v.name)
        if "extra" in condition:
            yes = f"{v.name} + extra" if v.channels == self.channels and v.tag == "" else f"{v.name} + extra.mean()"
        self.body.append(f"{other} = {yes} if {condition} else {v.name}")
        self.values.append(replace(v, name=other))
        return True

    def do_list(self) -> bool:
        """Modules in a list, some of them asked what they are."""
        v = self.pick("map", dims=self.dims)
        if v is None:
            return False
        outputs = self.rng.choice(CHANNELS)
        items = [
            self.conv(v.channels, outputs),
            self.norm(outputs),
            "nn.ReLU()",
            self.conv(outputs, outputs),
            self.norm(outputs),
        ]
        items = items[: self.rng.choice([2, 3, 5])]
        kind = self.rng.choice(["nn.ModuleList([{}])", "nn.Sequential({})", "nn.Sequential({})"])
        name = self.attribute(kind.format(", ".join(items)), "list")
        out = self.new("v")
        if "Sequential" in kind and self.chance(0.6):
            way = self.rng.choices(
                [
                    f"{out} = self.{name}({v.name})",
                    f"{out} = self.{name}[1:](self.{name}[:1]({v.name}))",
                    f"{out} = self.{name}({v.name}) + self.{name}[0]({v.name})",
                ],
                [6, 1, 1],
            )[0]
            self.body.append(way)
        else:
            question = self.rng.choices(
                [
                    "",
                    "    if isinstance(m, nn.BatchNorm2d): {o} = {o} * 2",
                    "    if hasattr(m, 'running_mean'): {o} = {o}.abs()",
                    "    if type(m).__name__ == 'Conv2d' and m.bias is None: {o} = {o} + 1",
                    "    if getattr(m, 'bias', None) is None: {o} = {o} + 1",
                ],
                [8, 1, 1, 1, 1],
            )[0]
            self.body += [f"{out} = {v.name}", f"for m in self.{name}:", f"    {out} = m({out})"]
            self.body += [question.format(o=out)] if question else []
        self.values.append(replace(v, name=out, channels=outputs))
        return True

    def do_child(self) -> bool:
        v = self.pick("map", dims=self.dims)
        if v is None or self.depth >= 2:
            return False
        child = self.writer.block(self.depth + 1, self.dims, v.channels)
        name = self.attribute(f"{child.name}()", "child")
        result = child.values[-1]
        given = v.name
        if child.optional and self.chance(0.5):
            same = self.pick("map", dims=v.dims, tag=v.tag, channels=v.channels)
            assert same is not None
            given += self.rng.choice([f", {same.name}", f", extra={same.name}"])
        tag = f"{v.tag}{result.tag}"
        out = self.put(f"self.{name}({given})", result, tag=tag, origin="")
        if out.layout == "map" and out.dims == self.dims:
            self.layers.append((name, "child", v.channels, out.channels)) if not result.tag else None
        draw = self.rng.random()
        convs = [layer for layer in child.layers if layer[1] != "child" and layer[2] == v.channels]
        if draw < 0.12 and convs:
            inner, _, _, outputs = self.rng.choice(convs)
            way = self.rng.choice(
                [
                    "self.{c}.{i}({v})",
                    "self.{c}._modules['{i}']({v})",
                    "getattr(self.{c}, '{i}')({v})",
                    "self.{c}.{i}.forward({v})",
                    "dict(self.{c}.named_children())['{i}']({v})",
                    "self.get_submodule('{c}.{i}')({v})",
                ]
            )
            self.put(way.format(c=name, i=inner, v=v.name), v, channels=outputs)
        elif draw < 0.2 and convs:
            inner, _, _, outputs = self.rng.choice(convs)
            method = self.new("way")
            child.methods.append(f"def {method}(self, x):\n        return self.{inner}(x)")
            self.put(f"self.{name}.{method}({v.name})", v, channels=outputs)
        elif draw < 0.25:
            self.put(f"{v.name} * sum(p.abs().mean() for p in self.{name}.parameters())", v)
        elif draw < 0.32:
            self.setup.append(
                self.rng.choice([f"self.{self.new('alias')} = self.{name}", f"self.plain = [self.{name}]"])
            )
            if self.setup[-1].startswith("self.plain"):
                self.put(f"self.plain[-1]({v.name})", result, tag=tag, origin="")
        return True

    def fill(self, statements: int) -> None:
        weights = {
            "conv": 10,
            "norm": 4,
            "again": 1.5,
            "act": 3,
            "number": 2.5,
            "augment": 0.7,
            "write": 0.8,
            "sum": 2.5,
            "broadcast": 1,
            "cat": 2,
            "split": 1.2,
            "shuffle": 0.8,
            "pool": 1.5,
            "resize": 0.7,
            "pad": 1,
            "pass": 1.5,
            "read": 1,
            "tokens": 1.5,
            "square": 0.4,
            "last": 0.7,
            "flat": 0.8,
            "functional": 0.6,
            "keep": 0.4,
            "doubt": 0.8,
            "list": 1.5,
            "child": 3,
        }
        for _ in range(statements):
            getattr(self, f"do_{self.rng.choices(list(weights), list(weights.values()))[0]}")()

    def code(self) -> str:
        signature = "self, x, extra=None" if self.optional else "self, x"
        lines = [f"class {self.name}(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {line}" for line in self.setup]
        lines += [f"    {method}" for method in self.methods]
        lines += [f"    def forward({signature}):", *(f"        {line}" for line in self.body)]
        return "\n".join(lines)


@dataclass
class Writer:
    """All classes of one network, the root last."""

    seed: int
    blocks: list[Block] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(f"source {self.seed}")

    def block(self, depth: int, dims: int, channels: int) -> Block:
        made = Block(self, f"Block{len(self.blocks)}", depth, dims, channels)
        self.blocks.append(made)
        made.optional = depth > 0 and self.rng.random() < 0.25
        made.values.append(Value("x", "map", channels, dims, ""))
        if made.chance(0.2):
            made.put("torch.tanh(x)", made.values[0])
        made.fill(self.rng.randrange(2, 7 if depth else 10))
        maps = [v for v in made.values[1:] if v.layout == "map" and v.dims == dims]
        if depth and not maps:
            maps = [made.put("x * 2", made.values[0])]
        if depth:
            chosen = maps[-1]
            made.values.append(chosen)
            made.body.append(f"return {chosen.name}")
        else:
            last = made.values[-1].name
            others = [made.rng.choice(made.values).name] if made.chance(0.3) else []
            made.body.append(f"return {', '.join([last, *others])}")
        return made

    def write(self) -> str:
        root = self.block(0, self.rng.choice([1, 2, 2, 2, 3]), 4)
        others = [block for block in self.blocks if block is not root]
        return "\n\n".join(block.code() for block in (*reversed(others), root)) + f"\n\nNetwork = {root.name}\n"


def source(seed: int) -> str:
    """The code of a seed's network."""
    return Writer(seed).write()


def namespace() -> dict[str, Any]:
    from timm.layers import BatchNormAct2d, Conv2dSame, DropPath
    from torchvision.ops import FrozenBatchNorm2d

    known = (nn, F, torch, FrozenBatchNorm, FrozenBatchNorm2d, BatchNormAct2d, Conv2dSame, DropPath)
    own = (PlainSubclass, DoubledNorm, OwnConv, RenamedConv, helper)
    names = {each.__name__.rpartition(".")[2]: each for each in (*known, *own)}
    return {**names, "F": F, "__name__": "tests.fuzzing_source.network"}


def network(seed: int) -> nn.Module:
    """The network of a seed, in float64, with random weights and statistics, modes, hooks and ties."""
    scope = namespace()
    exec(compile(source(seed), f"<network {seed}>", "exec"), scope)
    torch.manual_seed(seed)
    model = scope["Network"]().double().eval()
    _finish(model, random.Random(f"finish {seed}"))
    return model


def _finish(model: nn.Module, rng: random.Random) -> None:
    modules = [
        m for m in model.modules() if not list(m.children()) or isinstance(getattr(m, "running_mean", None), Tensor)
    ]
    norms = [m for m in modules if isinstance(getattr(m, "running_mean", None), Tensor)]
    for norm in norms:
        norm.running_mean.normal_(0, 0.5)
        norm.running_var.uniform_(0.5, 2)
        plain = rng.random() < 0.15
        for name, low, high in (("weight", 0.5, 1.5), ("bias", 0.1, 0.6)):
            tensor = getattr(norm, name, None)
            if tensor is not None:
                tensor.data.uniform_(low, high)
                if not plain:
                    tensor.data.mul_(torch.randn(tensor.shape).sign())
        if rng.random() < 0.12 and getattr(norm, "bias", None) is not None:
            norm.running_mean.zero_()
            norm.bias.data.zero_()
        if rng.random() < 0.05:
            norm.train()
    for module in modules:
        if rng.random() < 0.03:
            hook = rng.choice([remember, doubled, pushed])
            (module.register_forward_pre_hook if hook is pushed else module.register_forward_hook)(hook)
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            twins = [
                m
                for m in modules
                if type(m) is type(module) and m is not module and m.weight.shape == module.weight.shape
            ]
            draw = rng.random()
            if draw < 0.03 and twins:
                module.weight = rng.choice(twins).weight
            elif draw < 0.05 and twins and module.bias is not None:
                module.bias = rng.choice(twins).bias
            elif draw < 0.07:
                torch.nn.utils.parametrizations.weight_norm(module)
    if rng.random() < 0.1:
        model.training = True


def remember(module: nn.Module, _inputs: Any, output: Any) -> None:
    module.kept = _pytree.tree_leaves(output)[0].detach().clone()


def doubled(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output * 2


def pushed(_module: nn.Module, inputs: Any) -> Any:
    return (inputs[0] + 1, *inputs[1:])


def inputs(model: nn.Module, seed: int, batch: int, size: int = SIZE) -> Tensor:
    """An input of the network: the spatial axes are those of the first class's dims."""
    dims = Writer(seed).rng.choice([1, 2, 2, 2, 3])
    generator = torch.Generator().manual_seed(seed + 1000 * batch)
    return torch.randn(batch, 4, *[size] * dims, generator=generator, dtype=torch.float64)


def run(model: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """Outputs on one batch after another, and what is kept in attributes after each."""
    results: list[Tensor] = []
    for index, batch in enumerate(batches):
        torch.manual_seed(index)
        with torch.no_grad():
            out = model(batch.clone())
        kept = [m.kept for m in model.modules() if isinstance(getattr(m, "kept", None), Tensor)]
        results += [leaf.clone() for leaf in _pytree.tree_leaves((out, kept)) if isinstance(leaf, Tensor)]
    return results


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest error of an output relative to its largest value; infinite where shapes or finiteness differ."""
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return float("inf")
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if not b.isfinite().all():
            if not torch.equal(a.isfinite(), b.isfinite()):
                return float("inf")
            continue
        error = float((a - b).abs().max() / b.abs().max().clamp(min=1e-100)) if b.numel() else 0.0
        worst = max(worst, error if error == error else float("inf"))
    return worst


def is_noise(model: nn.Module, batches: list[Tensor]) -> bool:
    """Whether the last digits of weights and inputs decide the outputs: rounding divided by rounding."""
    generator = torch.Generator().manual_seed(0)

    def nudged(tensor: Tensor) -> Tensor:
        return tensor * (1 + 1e-14 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))

    other = copy.deepcopy(model)
    for tensor in (*other.parameters(), *other.buffers()):
        if tensor.is_floating_point():
            tensor.data = nudged(tensor.data)
    wanted = run(copy.deepcopy(model), batches)
    return difference(run(other, [nudged(batch) for batch in batches]), wanted) > TOLERANCE


def foldable(model: nn.Module) -> int:
    """Norm modules with statistics that are fixed in the mode they are in."""
    return sum(
        isinstance(getattr(m, "running_mean", None), Tensor) and (not m.training or "Frozen" in type(m).__name__)
        for m in model.modules()
    )


OPTIONS: tuple[dict[str, bool], ...] = ({"affine": True}, {"unshare": True}, {"merge_branches": True})


def check(seed: int) -> Tally:
    """Fold the network of a seed in every way, and compare; ``AssertionError`` says what is wrong."""
    model = network(seed)
    batches = [inputs(model, seed, 2), inputs(model, seed, 5), inputs(model, seed, 3, SIZE + 3)]
    eval_model = copy.deepcopy(model)
    if eval_model.training:
        eval_model.training = False
    wanted, wanted_in_eval = run(copy.deepcopy(model), batches), run(eval_model, batches)
    tally = Tally()
    image = picture(model)
    norms = {name for name, m in model.named_modules() if isinstance(getattr(m, "running_mean", None), Tensor)}
    option = OPTIONS[seed % len(OPTIONS)]
    given = (inputs(model, seed, 3),)
    for example, options in ((None, {}), (given, {}), (None, option), (given, option)):
        seen = f"{'with' if example else 'without'} example_inputs{''.join(f', {name}' for name in options)}"
        plan = normswap.plan_fold(model, example_inputs=example, **options)
        assert not image.differences(model), f"planning {seen} changed the model: {image.differences(model)[:3]}"
        folded = plan.apply()
        assert isinstance(folded, type(model))  # a subclass where a functional norm was folded
        assert not image.differences(model), f"folding {seen} changed the model: {image.differences(model)[:3]}"
        listed = {n for entry in (*plan.changes, *plan.skips) for n in (entry.name, *entry.aliases)}
        missing = {name for name in norms - listed if not any(each.startswith(f"{name}.") for each in listed)}
        assert not missing, f"not in the plan: {sorted(missing)}"
        same_size = batches[:2] if example else batches
        count = len(run(copy.deepcopy(model), same_size))
        error = difference(run(copy.deepcopy(folded), same_size), wanted[:count])
        told = f"{seen}\n{plan}\n{source(seed)}"
        assert error <= TOLERANCE or is_noise(model, same_size), f"relative error {error:.2e} {told}"
        if error > TOLERANCE:
            tally.noise += 1
        else:
            tally.error = max(tally.error, error)
        if model.training:
            in_eval = copy.deepcopy(folded)
            in_eval.training = False
            error = difference(run(in_eval, same_size), wanted_in_eval[:count])
            settled = error <= TOLERANCE or is_noise(eval_model, same_size)
            assert settled, f"relative error {error:.2e} in eval mode {told}"
        if not options:
            tally.foldable += foldable(model)
            tally.folded += sum(bool(change.into) for change in plan.changes)
    for options in ({}, option):
        _check_undo_and_recipe(model, options)
    return tally


def _check_undo_and_recipe(model: nn.Module, options: dict[str, bool]) -> None:
    again = normswap.plan_fold(model, **options)
    image = picture(model)
    again.apply(inplace=True)
    folded = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again.undo()
    assert not image.differences(model), f"undo left {image.differences(model)[:3]}"
    replayed = normswap.apply_recipe(copy.deepcopy(model), again.recipe).state_dict()
    assert replayed.keys() == folded.keys(), (
        f"the recipe gives other keys: {sorted(replayed.keys() ^ folded.keys())[:3]}"
    )
    assert all(torch.equal(replayed[name], tensor) for name, tensor in folded.items())
