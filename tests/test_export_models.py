"""Small real architectures with random statistics, exported with an open batch: ONNX Runtime and the saved program
compute what eager mode does, by the criterion of ``verify``, at batch sizes that the example did not have."""

from __future__ import annotations

import tests.zoo.schemas  # noqa: F401  (before torchvision, which timm and transformers import)

# isort: split
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models import DenseNet, MobileNetV3, ResNet, ShuffleNetV2
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.resnet import BasicBlock
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

import normswap

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

WORDS = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
Block = partial(InvertedResidualConfig, dilation=1, width_mult=1.0)


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32)


def words() -> Tensor:
    return torch.randint(0, 50, (2, 7))


def mobile() -> nn.Module:
    blocks = [Block(8, 3, 16, 8, True, "HS", stride=1)]
    return MobileNetV3(blocks, last_channel=16, num_classes=5)


def bert() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    return BertModel(BertConfig(**sizes, vocab_size=50, max_position_embeddings=16))


def gpt2() -> nn.Module:
    return GPT2Model(GPT2Config(**WORDS, n_embd=32, n_layer=1, n_head=4, n_positions=16, use_cache=False))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], Any]] = {
    "resnet": (partial(ResNet, BasicBlock, [1, 1, 1, 1], num_classes=5), images, {"x": {0: "n", 2: "h", 3: "w"}}),
    "mobilenet": (mobile, images, True),
    "shufflenet": (partial(ShuffleNetV2, [1, 1, 1], [8, 16, 32, 64, 64], num_classes=5), images, True),
    "densenet": (partial(DenseNet, 4, (1, 1), 8, num_classes=5), images, True),
    "vit": (
        partial(timm.create_model, "vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=48, num_classes=5),
        images,
        True,
    ),
    "bert": (bert, words, {"input_ids": {0: "batch", 1: "length"}}),
    "gpt2": (gpt2, words, True),
}


def perturbed(model: nn.Module) -> nn.Module:
    """Statistics and affine away from 0 and 1, which hide errors, and near enough to them for depth to do no harm."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                for name, value in (*module.named_parameters(), *module.named_buffers()):
                    if value.is_floating_point():
                        positive = name in ("weight", "running_var")
                        value.copy_(torch.rand(value.shape, generator=generator) + (0.5 if positive else -0.5))
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_onnx_computes_what_the_model_does(name: str, tmp_path: Path) -> None:
    build, make, dynamic = MODELS[name]
    model, inputs = perturbed(build()), (make(),)
    path = normswap.export(model, tmp_path / "a.onnx", inputs, optimize=False, dynamic=dynamic)
    verification = normswap.verify(model, path, inputs)
    assert verification, str(verification)
    assert {row.run for row in verification.rows} == {"onnxruntime, graph optimizations off", "onnxruntime"}
    assert {1, 3} <= {variation.batch for variation in verification.inputs}
    assert normswap.read_metadata(path)["normswap.weights.sha256"] == normswap.state_digest(model)


@pytest.mark.parametrize("name", ["mobilenet", "resnet", "vit", "bert"])
def test_programs_compute_what_the_model_does(name: str, tmp_path: Path) -> None:
    build, make, dynamic = MODELS[name]
    model, inputs = perturbed(build()), (make(),)
    path = normswap.export(model, tmp_path / "a.pt2", inputs, dynamic=dynamic)
    verification = normswap.verify(model, normswap.load_exported(path).module(), inputs, backend="eager")
    assert verification, str(verification)
    assert {1, 3} <= {variation.batch for variation in verification.inputs}


def test_a_size_that_takes_another_way_through_the_code_is_refused_when_it_runs(tmp_path: Path) -> None:
    model = perturbed(gpt2())
    path = normswap.export(model, tmp_path / "a.pt2", (words(),), dynamic=True)
    module = normswap.load_exported(path).module()
    more = torch.randint(0, 50, (5, 7))
    torch.testing.assert_close(module(more).last_hidden_state, model(more).last_hidden_state)
    with pytest.raises(RuntimeError, match=r"assertion failed.*Ne\(s\d+, 1\)"):
        module(more[:1])
