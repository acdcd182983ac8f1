"""ChannelAffine: the same numbers in every form, through moves, copies and files."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.norms.affine import ChannelAffine


def affine(channels: int = 6, dtype: torch.dtype = torch.float64) -> ChannelAffine:
    module = ChannelAffine(channels)
    nn.init.normal_(module.scale)
    nn.init.normal_(module.shift)
    return module.to(dtype)


def expected(module: ChannelAffine, x: Tensor) -> Tensor:
    shape = (-1, *[1] * (x.dim() - 2))
    return x * module.scale.reshape(shape) + module.shift.reshape(shape)


INPUTS = {
    "(N, C)": torch.randn(3, 6, dtype=torch.float64),
    "(N, C, L)": torch.randn(3, 6, 5, dtype=torch.float64),
    "(N, C, H, W)": torch.randn(3, 6, 5, 4, dtype=torch.float64),
    "channels last": torch.randn(3, 6, 5, 4, dtype=torch.float64).to(memory_format=torch.channels_last),
    "(N, C, D, H, W)": torch.randn(2, 6, 3, 5, 4, dtype=torch.float64),
    "a strided view": torch.randn(3, 12, 5, 4, dtype=torch.float64)[:, ::2],
    "an empty batch": torch.randn(0, 6, 5, 4, dtype=torch.float64),
}


@pytest.mark.parametrize("name", INPUTS)
def test_the_numbers(name: str) -> None:
    module, x = affine(), INPUTS[name]
    torch.testing.assert_close(module(x), expected(module, x), rtol=1e-14, atol=1e-14)
    assert module.train()(x).shape == x.shape


def test_gradients() -> None:
    module = affine()

    def function(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(module, {"scale": scale, "shift": shift}, x)
        return result

    for x in (INPUTS["(N, C, H, W)"], INPUTS["channels last"]):
        assert torch.autograd.gradcheck(function, (x.clone().requires_grad_(), module.scale, module.shift))


def test_it_outlives_moves() -> None:
    module, x = affine(), INPUTS["(N, C, H, W)"]
    wanted = module(x)
    state = copy.deepcopy(module.state_dict())
    assert list(state) == ["scale", "shift"]
    for moved in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.to("meta").to_empty(device="cpu")):
        moved.load_state_dict(state)
        assert torch.equal(moved(x), wanted)
    assert module.half()(x.half()).dtype == torch.float16
    assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_a_low_precision_input_keeps_its_dtype() -> None:
    module = affine(dtype=torch.float32)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 6, 4, 4).bfloat16().to(memory_format=memory_format)
        assert module(x).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 4, 4)])
def test_one_operator_in_onnx(shape: tuple[int, ...], tmp_path: Path) -> None:
    module = affine(dtype=torch.float32).eval()
    x = torch.randn(shape)
    if len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    path = normswap.export(nn.Sequential(module).eval(), tmp_path / "affine.onnx", (x,), optimize=False)
    assert [node.op_type for node in onnx.load(path).graph.node] == ["BatchNormalization"]
    assert normswap.verify(module, path, (x,))
