"""Five small networks for the digits of ``examples/digits.py``: what ``scripts/bench_calibrate.py`` converts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import digits
import torch
from torch import Tensor, nn


def unit(channels_in: int, channels: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU."""
    convolution = nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU())


class Pooled(nn.Module):
    """Maps, their mean over space, a linear head."""

    def __init__(self, maps: nn.Module, channels: int) -> None:
        super().__init__()
        self.maps = maps
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.maps(x).mean((2, 3)))


def plain() -> nn.Module:
    """As in VGG (arXiv 1409.1556)."""
    widths = [(1, 24, 1), (24, 24, 1), (24, 48, 2), (48, 48, 1), (48, 48, 1)]
    return Pooled(nn.Sequential(*(unit(i, o, stride=s) for i, o, s in widths)), 48)


class Inverted(nn.Module):
    """Expand, convolve each channel alone, project; with a shortcut where the shapes allow (arXiv 1801.04381)."""

    def __init__(self, channels_in: int, channels: int, stride: int, expand: int = 3) -> None:
        super().__init__()
        inner = expand * channels_in
        project = nn.Sequential(nn.Conv2d(inner, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.body = nn.Sequential(unit(channels_in, inner, 1), unit(inner, inner, 3, stride, inner), project)
        self.shortcut = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return x + out if self.shortcut else out


def mobile() -> nn.Module:
    """As MobileNetV2: depthwise convolutions and linear bottlenecks."""
    blocks = [Inverted(16, 16, 1), Inverted(16, 32, 2), Inverted(32, 32, 1), Inverted(32, 32, 1)]
    return Pooled(nn.Sequential(unit(1, 16), *blocks, unit(32, 96, 1)), 96)


class Dense(nn.Module):
    """Norm, ReLU, convolution, whose output is appended to the input (arXiv 1608.06993)."""

    def __init__(self, channels_in: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels_in)
        self.convolution = nn.Conv2d(channels_in, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.convolution(self.norm(x).relu())], 1)


def dense() -> nn.Module:
    """As DenseNet: norms before the convolutions, behind concatenations."""
    first = [nn.Conv2d(1, 16, 3, padding=1, bias=False), *(Dense(16 + 16 * i, 16) for i in range(3))]
    middle = [nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 32, 1, bias=False), nn.AvgPool2d(2)]
    last = [*(Dense(32 + 16 * i, 16) for i in range(3)), nn.BatchNorm2d(80), nn.ReLU()]
    return Pooled(nn.Sequential(*first, *middle, *last), 80)


class Attention(nn.Module):
    """Pre-norm transformer block (arXiv 2010.11929) on ``(N, tokens, width)``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.project(mixed)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Transformer(nn.Module):
    """Patches of 2 x 2, four blocks, the mean over tokens, a head."""

    def __init__(self, width: int = 48, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.position = nn.Parameter(torch.randn(16, width) * 0.02)
        self.blocks = nn.Sequential(*(Attention(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def transformer() -> nn.Module:
    return Transformer()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "residual": digits.resnet,
    "plain": plain,
    "mobile": mobile,
    "dense": dense,
    "transformer": transformer,
}


def trained(name: str, seed: int, images: digits.Data) -> nn.Module:
    """The network of that name, initialised and trained with ``seed``, in eval mode."""
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    if name == "transformer":
        return digits.train(model, images, epochs=20, rate=0.003)
    return digits.train(model, images, epochs=6)
