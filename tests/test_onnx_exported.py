"""Files from torch's two exporters: as many norms fold as in the torch model, and the file computes the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
pytest.importorskip("onnxscript")

import normswap  # noqa: E402
import normswap.onnx as files  # noqa: E402
from normswap.norms.affine import ChannelAffine  # noqa: E402
from normswap.onnx.export import quiet  # noqa: E402
from tests.onnx_support import operators, run  # noqa: E402
from tests.support import randomise  # noqa: E402


class Net(nn.Module):
    """A residual block, a dense block, flattened linear layers as in LeViT, and a norm in front of a padded layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.left = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(8))
        self.dense = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 6, 1), nn.BatchNorm2d(6))
        self.up = nn.Sequential(nn.ConvTranspose2d(6, 6, 2, stride=2), nn.BatchNorm2d(6))
        self.mix = nn.Linear(6, 10, bias=False)
        self.mixed = nn.BatchNorm1d(10)
        self.head = nn.Sequential(nn.BatchNorm1d(10), nn.Linear(10, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, torch.relu(self.left(x) + x)], 1)
        x = self.up(self.dense(x))
        x = self.mix(x.flatten(2).transpose(1, 2))
        x = self.mixed(x.flatten(0, 1)).reshape_as(x)
        return self.head(x.mean(1))


INPUT = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return randomise(Net()).float().double().eval()


@pytest.fixture(scope="module", params=["dynamo", "TorchScript"])
def exported(request: Any, model: nn.Module, tmp_path_factory: Any) -> Path:
    path: Path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    options: dict[str, Any] = {"dynamo": True, "optimize": False}
    if request.param == "TorchScript":
        options = {"dynamo": False, "do_constant_folding": False, "training": torch.onnx.TrainingMode.PRESERVE}
    with quiet():
        torch.onnx.export(copy.deepcopy(model).float(), (INPUT.float(),), str(path), **options)
    return path


def error(path: Path, truth: Tensor) -> float:
    (got,) = run(path, INPUT.float().numpy())
    return float(np.abs(got - truth.numpy()).max() / truth.abs().max())


def test_fold(exported: Path, model: nn.Module, tmp_path: Path) -> None:
    assert operators(exported)["BatchNormalization"] == 7
    plan = files.fold(exported, tmp_path / "out.onnx")
    of_torch = normswap.fold(model, example_inputs=(INPUT,))
    left = sum(isinstance(module, ChannelAffine) for module in of_torch.modules())
    assert operators(tmp_path / "out.onnx")["BatchNormalization"] == len(plan.skips) == left == 1
    with torch.no_grad():
        truth = model(INPUT)
    assert error(tmp_path / "out.onnx", truth) < 4 * error(exported, truth) + 1e-6


@pytest.mark.parametrize("kind", ["group", "layer"])
def test_convert(kind: str, exported: Path, model: nn.Module, tmp_path: Path) -> None:
    files.convert(exported, tmp_path / "out.onnx", kind)
    assert operators(tmp_path / "out.onnx")["BatchNormalization"] == 0
    with torch.no_grad():
        truth = normswap.convert(model, kind, example_inputs=(INPUT,))(INPUT)
    assert error(tmp_path / "out.onnx", truth) < 2e-5
