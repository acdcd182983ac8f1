"""What today's tools do wrong when they fold norms: each check passes here and fails on the tool named."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import fusion, parametrizations

import normswap
import tests.zoo.schemas  # noqa: F401  before timm

with warnings.catch_warnings():  # torch.jit's, at import
    warnings.simplefilter("ignore")
    import timm
    import torchvision
    from torch.ao.quantization import fuse_modules
    from torch.fx.experimental.optimization import fuse

Tool = Callable[[nn.Module], nn.Module]


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), Tensor):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            if module.weight is not None:
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(0, 0.3)
    return model.double().eval()


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def same(model: nn.Module, folded: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        ours, theirs = folded(x), model(x)
    assert float((ours - theirs).abs().max()) <= 1e-10 * float(theirs.abs().max())


def batch_norms(model: nn.Module, x: Tensor) -> int:
    """Batch norm calls, whatever class makes them, that a run computes; a multiply-add is none."""
    count = 0
    real = F.batch_norm

    def counted(*args: object, **kwargs: object) -> Tensor:
        nonlocal count
        count += 1
        return real(*args, **kwargs)  # type: ignore[arg-type]

    affines = [m for m in model.modules() if isinstance(m, normswap.norms.affine.ChannelAffine)]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "batch_norm", counted)
        model(x)
    return count - len(affines)


def fails(check: Callable[[Tool], None], tool: Tool) -> None:
    """The check notices what the tool does."""
    with pytest.raises(
        (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError, torch.fx.proxy.TraceError)
    ):
        check(tool)


def torch_fx(model: nn.Module) -> nn.Module:
    return fuse(copy.deepcopy(model))


class Branchy(nn.Module):
    """A root that FX cannot trace: it asks a value."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.sum() < 1e9 else x


def whole_model_or_nothing(tool: Tool) -> None:
    model, x = randomised(Branchy()), image(2, 3, 4, 4)
    folded = tool(model)
    same(model, folded, x)
    assert batch_norms(folded, x) == 0


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.unused = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def method(self) -> str:
        return "mine"


def the_class_stays(tool: Tool) -> None:
    folded = tool(randomised(Named()))
    assert type(folded) is Named
    assert folded.method() == "mine"
    assert isinstance(folded.unused, nn.Linear)


def a_new_bias_is_trained_as_the_weight_is(tool: Tool) -> None:
    folded = tool(randomised(Named()))
    assert folded.conv.bias.requires_grad


class Twice(nn.Module):
    """One convolution, once with a norm behind it and once without."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(self.conv(x)).relu())


def a_layer_that_is_called_twice(tool: Tool) -> None:
    model = randomised(Twice())
    same(model, tool(model), image(2, 3, 4, 4))


def blocks_of_batch_norm_with_activation(tool: Tool) -> None:
    model, x = randomised(timm.create_model("efficientnet_b0")), image(1, 3, 64, 64)
    assert batch_norms(model, x) == 49
    folded = tool(model)
    same(model, folded, x)
    assert batch_norms(folded, x) == 0


class Tokens(nn.Module):
    """``BatchNorm1d`` on (N, C, L) takes axis 1, where ``Linear`` has its outputs on the last."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


def the_axis_of_a_linear_layer(tool: Tool) -> None:
    model = randomised(Tokens())
    same(model, tool(model), image(2, 6, 5))


def flatten_between(tool: Tool) -> None:
    model, x = randomised(timm.create_model("levit_128s")), image(2, 3, 224, 224)
    folded = tool(model)
    assert batch_norms(folded, x) == 0


def subclasses_of_convolutions(tool: Tool) -> None:
    model, x = randomised(torchvision.models.video.r3d_18()), image(1, 3, 4, 32, 32)
    folded = tool(model)
    same(model, folded, x)
    assert batch_norms(folded, x) == 0


@pytest.mark.parametrize(
    "check",
    [
        whole_model_or_nothing,
        the_class_stays,
        a_new_bias_is_trained_as_the_weight_is,
        a_layer_that_is_called_twice,
        blocks_of_batch_norm_with_activation,
        the_axis_of_a_linear_layer,
        flatten_between,
        subclasses_of_convolutions,
    ],
    ids=lambda check: check.__name__,
)
def test_torch_fx_fuse(check: Callable[[Tool], None]) -> None:
    check(normswap.fold)
    fails(check, torch_fx)


def pair(conv: nn.Module, norm: nn.Module) -> nn.Sequential:
    model = nn.Sequential(conv, norm)
    randomised(model)
    return model


def grouped_transposed(tool: Tool) -> None:
    for groups in (1, 2):
        model = pair(nn.ConvTranspose2d(4, 6, 3, groups=groups), nn.BatchNorm2d(6))
        same(model, tool(model), image(2, 4, 5, 5))


def without_affine(tool: Tool) -> None:
    model = pair(nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False))
    same(model, tool(model), image(3, 4))


def weight_arithmetic(model: nn.Module) -> nn.Module:
    linear, norm = model  # type: ignore[misc]
    if isinstance(linear, nn.Linear):
        return fusion.fuse_linear_bn_eval(linear, norm)
    return fusion.fuse_conv_bn_eval(linear, norm, transpose=isinstance(linear, nn.ConvTranspose2d))


@pytest.mark.parametrize("check", [grouped_transposed, without_affine], ids=lambda check: check.__name__)
def test_torch_nn_utils_fusion(check: Callable[[Tool], None]) -> None:
    check(normswap.fold)
    fails(check, weight_arithmetic)


class FunctionalBetween(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.relu(self.conv(x)))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


def by_name(model: nn.Module) -> nn.Module:
    return fuse_modules(copy.deepcopy(model), [["conv", "norm"]])


def a_function_between(tool: Tool) -> None:
    model = randomised(FunctionalBetween())
    same(model, tool(model), image(2, 3, 4, 4))


def hooks_still_see_what_they_saw(tool: Tool) -> None:
    model, seen = randomised(Plain()), []
    model.conv.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    x = image(2, 3, 4, 4)
    model(x)
    tool(model)(x)
    torch.testing.assert_close(seen[0], seen[-1])
    assert len(seen) == 2


def parametrized_layers(tool: Tool) -> None:
    model = randomised(Plain())
    parametrizations.weight_norm(model.conv)
    x = image(2, 3, 4, 4)
    folded = tool(model)
    same(model, folded, x)
    assert batch_norms(folded, x) == 0


@pytest.mark.parametrize(
    "check", [a_function_between, hooks_still_see_what_they_saw, parametrized_layers], ids=lambda check: check.__name__
)
def test_torch_ao_fuse_modules(check: Callable[[Tool], None]) -> None:
    check(normswap.fold)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fails(check, by_name)


def by_registration_order(model: nn.Module) -> nn.Module:
    """The rule of mmcv's and mmengine's ``fuse_conv_bn``: a norm goes into the convolution that was registered last."""
    model = copy.deepcopy(model)
    for module in model.modules():
        last = None
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d) and last is not None:
                setattr(module, last[0], fusion.fuse_conv_bn_eval(last[1], child))
                setattr(module, name, nn.Identity())
                last = None
            elif isinstance(child, nn.Conv2d):
                last = (name, child)
    return model


class Registered(nn.Module):
    """Pre-activation order in the ``forward``, the other order in ``__init__``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x).relu())


def dataflow_not_registration(tool: Tool) -> None:
    model = randomised(Registered())
    same(model, tool(model), image(2, 3, 4, 4))


def test_registration_order() -> None:
    dataflow_not_registration(normswap.fold)
    fails(dataflow_not_registration, by_registration_order)


def reparameterized(model: nn.Module) -> nn.Module:
    return timm.utils.reparameterize_model(copy.deepcopy(model))


def any_class(tool: Tool) -> None:
    model, x = randomised(timm.create_model("resnet18")), image(1, 3, 64, 64)
    folded = tool(model)
    same(model, folded, x)
    assert batch_norms(folded, x) == 0


def test_timm_reparameterize_knows_its_own_classes_only() -> None:
    any_class(normswap.fold)
    fails(any_class, reparameterized)
    model = timm.create_model("repvgg_a0")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in reparameterized(model.eval()).modules())


class MatMulTransposeNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(5, 6)), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm((x @ self.weight).transpose(0, 1))


def test_onnxruntime_ignores_a_transpose(tmp_path: Path) -> None:
    """MatMul, Transpose, BatchNormalization: with its optimizations on, the runtime folds along the wrong axis."""
    model = randomised(MatMulTransposeNorm()).float()
    x = image(6, 5).float()
    found = normswap.verify(model, model, (x,))
    by_run = {run: {row.verdict for row in found.rows if row.run == run} for run in {row.run for row in found.rows}}
    assert by_run["onnxruntime, graph optimizations off"] == {"equivalent"}
    assert "different" in by_run["onnxruntime"]
    folded = normswap.fold(model, example_inputs=(x,))
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x))
