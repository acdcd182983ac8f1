"""A small residual network for scikit-learn's digits: 1797 grey images of 8 x 8, ten classes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3 x 3 convolutions around a shortcut, as in ResNet (arXiv 1512.03385)."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """Images ``(N, 1, 8, 8)`` to logits ``(N, classes)``."""

    def __init__(self, width: int = 24, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(Block(width, width), Block(width, 2 * width, 2), Block(2 * width, 2 * width))
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def resnet(width: int = 24) -> ResNet:
    return ResNet(width)


class Data(NamedTuple):
    """Images ``(N, 1, 8, 8)`` float32 with mean 0 and variance 1, labels ``(N,)`` int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def data() -> Data:
    """A fixed split: three quarters to train, one quarter to test, equal class shares in both."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    train, test, train_labels, test_labels = (torch.from_numpy(part) for part in parts)
    mean, std = train.mean(), train.std()
    train, test = (((part - mean) / std).float().reshape(-1, 1, 8, 8) for part in (train, test))
    return Data(train, train_labels.long(), test, test_labels.long())


def train(model: nn.Module, digits: Data, *, epochs: int = 4, rate: float = 0.01, batch: int = 64) -> nn.Module:
    """Train in place with Adam and a falling rate; returns the model in eval mode."""
    model.train()
    steps = epochs * (len(digits.train_images) // batch)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(len(digits.train_images))
        for chosen in order[: len(order) // batch * batch].split(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(digits.train_images[chosen]), digits.train_labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, digits: Data) -> float:
    """The share of test images classified correctly."""
    return float((model(digits.test_images).argmax(1) == digits.test_labels).float().mean())
