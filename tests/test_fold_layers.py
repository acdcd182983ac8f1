"""Layer rules: ``absorb`` against the definition, for every layer, side and setting; what it keeps; when it refuses."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import normswap
import tests.zoo.schemas  # noqa: F401  before timm
from normswap.errors import NormswapError
from normswap.fold import layers
from normswap.fold.affine import Affine
from normswap.fold.layers import Layer, absorb, describe
from tests.test_fold import randomised, same

CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
SIZE = {1: (9,), 2: (7, 8), 3: (5, 6, 5)}
GROUPS = {"dense": (4, 6, 1), "grouped": (4, 6, 2), "depthwise": (4, 4, 4), "multiplier": (4, 12, 4), "one": (1, 3, 1)}
"""Channels in, channels out, groups."""
WINDOWS: list[dict[str, Any]] = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2},
    {"kernel_size": 2, "stride": 2},
]
MODES = ["zeros", "reflect", "replicate", "circular"]


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def affine(channels: int, *, shift: bool = True, seed: int = 5) -> Affine:
    """A scale with negative, positive and one zero channel."""
    scale = values(channels, seed=seed)
    if channels > 2:
        scale[1] = 0
    return Affine(scale, values(channels, seed=seed + 1) if shift else torch.zeros(channels, dtype=torch.float64))


def applied(affine: Affine, x: Tensor, axis: int = 1) -> Tensor:
    shape = [1] * x.dim()
    shape[axis] = -1
    return x * affine.scale.reshape(shape) + affine.shift.reshape(shape)


def known(module: nn.Module) -> Layer:
    layer = describe(module)
    assert isinstance(layer, Layer), layer
    return layer


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def check_both_sides(module: nn.Module, x: Tensor, axis: int = 1) -> None:
    """Each side alone, both in either order, and each taken back bit for bit."""
    module, layer, before = module.double(), known(module), state(module)
    behind = affine(layer.outputs)
    front = affine(layer.inputs, shift=layer.shift_reaches_evenly, seed=9)
    with torch.no_grad():
        plain, scaled = module(x), module(applied(front, x, axis))
        wanted = applied(behind, plain, axis), scaled, applied(behind, scaled, axis)
        for sides in (["output"], ["input"], ["output", "input"], ["input", "output"]):
            undo = [absorb(module, layer, behind if side == "output" else front, side) for side in sides]  # type: ignore[arg-type]
            expected = wanted[2] if len(sides) == 2 else wanted[sides == ["input"]]
            torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)
            for restore in reversed(undo):
                restore()
            after = state(module)
            assert after.keys() == before.keys()
            assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(("dims", "chunk"), [(1, 1 << 18), (2, 1 << 18), (3, 1 << 18), (1, 5)])
def test_convolutions(monkeypatch: pytest.MonkeyPatch, dims: int, groups: str, bias: bool, chunk: int) -> None:
    monkeypatch.setattr(layers, "_CHUNK", chunk)
    inputs, outputs, number = GROUPS[groups]
    x = values(2, inputs, *SIZE[dims])
    for window, mode in product(WINDOWS, MODES):
        if mode != "zeros" and "padding" not in window:
            continue
        module = CONVS[dims](inputs, outputs, groups=number, bias=bias, padding_mode=mode, **window)
        check_both_sides(module, x)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(("dims", "chunk"), [(1, 1 << 18), (2, 1 << 18), (3, 1 << 18), (1, 5)])
def test_transposed_convolutions(
    monkeypatch: pytest.MonkeyPatch, dims: int, groups: str, bias: bool, chunk: int
) -> None:
    """pytorch 180995: grouped ones; and in == out, where the two axes of the kernel look alike."""
    monkeypatch.setattr(layers, "_CHUNK", chunk)
    inputs, outputs, number = GROUPS[groups]
    x = values(2, inputs, *SIZE[dims])
    for window in ({"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1}, *WINDOWS):
        check_both_sides(TRANSPOSED[dims](inputs, outputs, groups=number, bias=bias, **window), x)
    check_both_sides(TRANSPOSED[dims](4, 4, 3, bias=bias, groups=2), values(2, 4, *SIZE[dims]))


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding: str) -> None:
    for kernel, mode in product((1, 3), MODES):
        module = nn.Conv2d(3, 4, kernel, padding=padding, padding_mode=mode)
        check_both_sides(module, values(2, 3, 6, 7))
        assert known(module).shift_reaches_evenly == (padding == "valid" or kernel == 1 or mode != "zeros")


def test_uneven_windows() -> None:
    check_both_sides(nn.Conv2d(4, 6, (3, 1), stride=(1, 2), padding=(0, 2), dilation=(2, 1)), values(2, 4, 8, 7))
    check_both_sides(nn.ConvTranspose2d(4, 6, (1, 4), stride=(2, 3), padding=(0, 1), groups=2), values(2, 4, 5, 6))


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    check_both_sides(nn.Linear(5, 3, bias=bias), values(4, 5))
    check_both_sides(nn.Linear(5, 3, bias=bias), values(2, 6, 5), axis=-1)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=(0, 1)),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.ConvTranspose2d(4, 4, 3),
        nn.ConvTranspose1d(4, 4, 1, stride=2),
        nn.ConvTranspose2d(4, 4, 1, stride=2, output_padding=1),
    ],
    ids=repr,
)
def test_where_a_shift_does_not_reach_evenly_it_truly_does_not(module: nn.Module) -> None:
    """What ``describe`` warns of is real: absorbed all the same, the shift gives another function."""
    module, layer = module.double(), known(module)
    assert not layer.shift_reaches_evenly
    x, front = values(2, 4, *SIZE[layer.spatial]), affine(4)
    with torch.no_grad():
        wanted = module(applied(front, x))
        absorb(module, layer, front, "input")
        assert float((module(x) - wanted).abs().max()) > 1e-3


@pytest.mark.parametrize("cls", ["Conv2dSame", "Subclass"])
def test_a_layer_that_pads_itself_does_not_take_a_shift_on_its_input(cls: str) -> None:
    from timm.layers import Conv2dSame

    class Subclass(Conv2dSame):
        pass

    module = {"Conv2dSame": Conv2dSame, "Subclass": Subclass}[cls](3, 4, 3, stride=2).double()
    assert not known(module).shift_reaches_evenly
    check_both_sides(module, values(2, 3, 7, 7))


def test_layers_that_are_known() -> None:
    from timm.layers import Linear
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

    class Renamed(nn.Conv3d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels, channels, (1, 3, 3), padding=(0, 1, 1))

    check_both_sides(Renamed(3), values(1, 3, 4, 5, 5))
    check_both_sides(Linear(3, 4), values(2, 3))
    check_both_sides(NonDynamicallyQuantizableLinear(3, 4), values(2, 3))


# --- tables and products ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("chunk", [layers._CHUNK, 7])
def test_embedding(monkeypatch: pytest.MonkeyPatch, padding_idx: int | None, chunk: int) -> None:
    """The row of the padding index too: a norm behind it moves it away from zero."""
    monkeypatch.setattr(layers, "_CHUNK", chunk)
    module = nn.Embedding(5, 4, padding_idx=padding_idx).double()
    ids, given, before = torch.tensor([[0, 2, 4], [2, 2, 1]]), affine(4), state(module)
    wanted = applied(given, module(ids), -1).detach()
    restore = absorb(module, known(module), given, "output")
    torch.testing.assert_close(module(ids).detach(), wanted, rtol=1e-12, atol=1e-12)
    assert not hasattr(module, "bias")
    restore()
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert not hasattr(module, "bias")


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_take_a_scale_but_no_shift(mode: str) -> None:
    """The second bag is empty, and gives zeros whatever the rows are."""
    module = nn.EmbeddingBag(5, 4, mode=mode).double()
    layer, ids, offsets = known(module), torch.tensor([0, 2, 4, 1]), torch.tensor([0, 3, 3])
    given = affine(4, shift=False)
    if mode == "max":
        assert layer.refuses(given, "output") == "takes a maximum, and the scale has negative channels"
        given = Affine(given.scale.abs(), given.shift)
    assert layer.refuses(given, "output") is None
    assert "empty bag" in str(layer.refuses(affine(4), "output"))
    wanted = applied(given, module(ids, offsets)).detach()
    absorb(module, layer, given, "output")
    torch.testing.assert_close(module(ids, offsets).detach(), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_bilinear(bias: bool) -> None:
    module = nn.Bilinear(3, 4, 5, bias=bias).double()
    a, b, given, before = values(6, 2, 3), values(6, 2, 4, seed=1), affine(5), state(module)
    wanted = applied(given, module(a, b), -1).detach()
    restore = absorb(module, known(module), given, "output")
    torch.testing.assert_close(module(a, b).detach(), wanted, rtol=1e-12, atol=1e-12)
    restore()
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert (module.bias is not None) == bias
    assert "another input" in str(known(module).refuses(affine(3, shift=False), "input"))


class Lookup(nn.Module):
    """A table in front of a norm."""

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.layer(ids))


class Product(Lookup):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.norm(self.layer(a, b))


class Tokens(Lookup):
    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.layer(ids).transpose(1, 2))


IDS = torch.tensor([[0, 2, 4], [2, 2, 1]])
TABLES: dict[str, tuple[Any, Any, tuple[Tensor, ...], bool, str | None]] = {
    "rows": (Lookup, lambda: nn.Embedding(5, 4, padding_idx=2), (IDS[0],), True, None),
    "tokens": (Tokens, lambda: nn.Embedding(5, 4), (IDS,), True, None),
    "another axis": (Lookup, lambda: nn.Embedding(5, 3), (IDS,), True, "the norm's channels are another axis"),
    "rescaled": (Lookup, lambda: nn.Embedding(5, 4, max_norm=1.0), (IDS[0],), True, "max_norm rescales its rows"),
    "bag": (Lookup, lambda: nn.EmbeddingBag(5, 4), (IDS,), False, None),
    "bag with a shift": (Lookup, lambda: nn.EmbeddingBag(5, 4), (IDS,), True, "gives zeros for an empty bag"),
    "rescaled bag": (Lookup, lambda: nn.EmbeddingBag(5, 4, max_norm=1.0), (IDS,), False, "max_norm rescales"),
    "product": (Product, lambda: nn.Bilinear(3, 2, 4), (values(5, 3), values(5, 2)), True, None),
    "product without bias": (
        Product,
        lambda: nn.Bilinear(3, 2, 4, bias=False),
        (values(5, 3), values(5, 2)),
        True,
        None,
    ),
    "product on another axis": (
        Product,
        lambda: nn.Bilinear(3, 2, 4),
        (values(5, 4, 3), values(5, 4, 2)),
        True,
        "the norm's channels are another axis",
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_norms_behind_tables_and_products(name: str) -> None:
    cls, make, inputs, shift, reason = TABLES[name]
    torch.manual_seed(0)
    layer = make()
    channels = 3 if name == "another axis" else 4
    model = randomised(cls(layer, nn.BatchNorm1d(channels)), shift=shift)
    model(*inputs)
    before = state(model)
    plan = normswap.plan_fold(model, example_inputs=inputs)
    assert plan.changes[0].into == (("layer",) if reason is None else ()), plan
    assert reason is None or reason in plan.changes[0].notes[0]
    folded = plan.apply()
    same(model, folded, *inputs)
    plan.apply(inplace=True)
    plan.undo()
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    if name == "bag":  # which needs no example_inputs
        fresh = normswap.apply_recipe(copy.deepcopy(model), plan.recipe)
        fresh.load_state_dict(folded.state_dict(), strict=True)


def test_norms_in_front_of_tables_and_products_stay() -> None:
    class Behind(Lookup):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.norm(x.relu()), x)

    model, x = randomised(Behind(nn.Bilinear(3, 3, 4), nn.BatchNorm1d(3)), shift=False), values(5, 3)
    plan = normswap.plan_fold(model, example_inputs=(x,))
    assert "multiplies it with another input" in plan.changes[0].notes[0]
    same(model, plan.apply(), x)


def test_tables_in_half_precision() -> None:
    module = nn.Embedding(3, 2).half()
    module.weight.data.fill_(40000.0)
    ones = torch.ones(2).double()
    assert not layers.may_overflow(module, Affine(ones, ones))
    assert layers.may_overflow(module, Affine(ones, 30000 * ones))
    with pytest.raises(NormswapError, match="not finite in float16"):
        absorb(module, known(module), Affine(ones, 30000 * ones), "output")
    assert float(module.weight.detach().min()) == 40000.0


def _own_forward() -> nn.Module:
    class Squared(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) ** 2

    return Squared(3, 3, 1)


def _own_conv_forward() -> nn.Module:
    class Standardized(nn.Conv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(input, weight / weight.std(), bias)

    return Standardized(3, 3, 1)


def _own_call() -> nn.Module:
    class Doubled(nn.Linear):
        def __call__(self, input: Tensor) -> Tensor:
            return 2 * super().__call__(input)

    return Doubled(3, 3)


def _patched() -> nn.Module:
    module = nn.Linear(3, 3)
    module.forward = lambda input: input  # type: ignore[method-assign]
    return module


def _quantization_aware() -> nn.Module:
    class Rounded(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, torch.fake_quantize_per_tensor_affine(self.weight, 0.1, 0, -128, 127), self.bias)

    return Rounded(3, 3)


@pytest.mark.parametrize("make", [_own_forward, _own_conv_forward, _own_call, _patched, _quantization_aware])
def test_layers_with_their_own_way_are_not_described(make: Any) -> None:
    reason = describe(make())
    assert isinstance(reason, str)
    assert "of its own" in reason or "replaced on the instance" in reason


def test_other_modules_are_not_described() -> None:
    assert describe(nn.ReLU()) == "ReLU is not a layer that can absorb an affine"


# --- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [True, False])
def test_bias_is_made_only_for_a_shift_and_trains_as_the_weight_does(trained: bool) -> None:
    module = nn.Conv2d(3, 4, 1, bias=False).requires_grad_(trained)
    absorb(module, known(module), affine(4, shift=False), "output")
    assert module.bias is None
    restore = absorb(module, known(module), affine(4), "output")
    assert isinstance(module.bias, nn.Parameter)
    assert module.bias.requires_grad == module.weight.requires_grad == trained
    assert module.bias.dtype == module.weight.dtype
    restore()
    assert module.bias is None
    assert list(module.state_dict()) == ["weight"]


def test_parameters_stay_the_same_objects() -> None:
    module = nn.Conv2d(3, 4, 1)
    weight, bias = module.weight, module.bias
    restore = absorb(module, known(module), affine(4), "output")
    assert module.weight is weight
    assert module.bias is bias
    restore()
    assert module.weight is weight
    assert module.bias is bias


@pytest.mark.parametrize(
    ("module", "layout"),
    [
        (nn.Conv2d(3, 4, 3), torch.channels_last),
        (nn.ConvTranspose2d(3, 4, 3), torch.channels_last),
        (nn.Conv3d(3, 4, 3), torch.channels_last_3d),
    ],
    ids=["conv", "transposed", "3d"],
)
def test_memory_format_is_kept(module: nn.Module, layout: torch.memory_format) -> None:
    module = module.to(memory_format=layout)
    for side in ("output", "input"):
        layer = known(module)
        absorb(module, layer, affine(layer.outputs if side == "output" else layer.inputs), side)  # type: ignore[arg-type]
        assert module.weight.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_arithmetic_is_in_float64_and_cast_once(dtype: torch.dtype) -> None:
    module = nn.Conv1d(4, 6, 3, groups=2).to(dtype)
    weight, bias = module.weight.detach().double(), module.bias.detach().double()
    given = affine(6)
    absorb(module, known(module), given, "output")
    assert module.weight.dtype == module.bias.dtype == dtype
    assert torch.equal(module.weight, (weight * given.scale.reshape(-1, 1, 1)).to(dtype))
    assert torch.equal(module.bias, (bias * given.scale + given.shift).to(dtype))


def test_a_bias_of_another_dtype_keeps_it() -> None:
    module = nn.Linear(3, 4).to(torch.bfloat16)
    module.bias = nn.Parameter(module.bias.float())
    absorb(module, known(module), affine(4), "output")
    assert (module.weight.dtype, module.bias.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("where", ["weight", "bias", "new bias"])
@pytest.mark.parametrize("chunk", [layers._CHUNK, 3])
def test_overflow_is_refused_and_nothing_is_changed(monkeypatch: pytest.MonkeyPatch, where: str, chunk: int) -> None:
    monkeypatch.setattr(layers, "_CHUNK", chunk)
    module = nn.Conv2d(3, 4, 1, bias=where != "new bias").half()
    before, had = state(module), module.bias
    given = affine(4)
    huge = torch.zeros(4, dtype=torch.float64)
    huge[3] = 1e6
    given = Affine(given.scale + huge, given.shift) if where == "weight" else Affine(given.scale, given.shift + huge)
    with pytest.raises(NormswapError, match="not finite in float16"):
        absorb(module, known(module), given, "output")
    assert module.bias is had
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_a_layer_that_was_not_finite_before_is_not_refused() -> None:
    module = nn.Linear(2, 2)
    module.weight.data[0, 0] = float("inf")
    absorb(module, known(module), Affine(torch.ones(2).double() * 2, torch.zeros(2).double()), "output")
    assert module.weight[0, 0] == float("inf")


def test_gradients_are_those_of_the_composition() -> None:
    module, x, given = nn.Conv2d(3, 4, 3).double(), values(2, 3, 5, 5).requires_grad_(), affine(4)
    (wanted,) = torch.autograd.grad(applied(given, module(x)).square().sum(), x)
    absorb(module, known(module), given, "output")
    (ours,) = torch.autograd.grad(module(x).square().sum(), x)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


def test_a_buffer_for_a_weight_is_folded_too() -> None:
    module = nn.Conv2d(3, 4, 1, bias=False).double()
    weight = module.weight.data
    del module.weight
    module.register_buffer("weight", weight)
    x, given = values(2, 3, 4, 4), affine(4)
    wanted = applied(given, module(x))
    absorb(module, known(module), given, "output")
    torch.testing.assert_close(module(x).detach(), wanted, rtol=1e-12, atol=1e-12)


def test_a_parametrized_layer_is_made_plain_first() -> None:
    """Its weight is computed anew at each call: what is written to it would be lost."""
    module = parametrizations.weight_norm(nn.Linear(3, 4)).double()
    x, given, before = values(2, 3), affine(4), state(module)
    wanted = applied(given, module(x)).detach()
    restore = absorb(module, known(module), given, "output")
    assert type(module) is nn.Linear
    torch.testing.assert_close(module(x).detach(), wanted, rtol=1e-12, atol=1e-12)
    restore()
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


# --- the affine itself -----------------------------------------------------------------------------------------------


def test_affines_compose_cut_and_repeat() -> None:
    first, second, x = affine(4), affine(4, seed=20), values(3, 4)
    torch.testing.assert_close(applied(second.after(first), x), applied(second, applied(first, x)))
    torch.testing.assert_close(applied(first.slice(1, 2), x[:, 1:3]), applied(first, x)[:, 1:3])
    wide = applied(first.padded(2, 1), values(3, 7))
    torch.testing.assert_close(wide[:, 2:6], applied(first, values(3, 7)[:, 2:6]))
    assert torch.equal(wide[:, :2], values(3, 7)[:, :2])
    assert torch.equal(wide[:, 6:], values(3, 7)[:, 6:])
    y = values(3, 4, 5)
    torch.testing.assert_close(applied(first.repeated(5), y.flatten(1)), applied(first, y).flatten(1))


def test_affines_know_what_they_are() -> None:
    one, zero = torch.ones(2).double(), torch.zeros(2).double()
    assert Affine(one, zero).no_shift
    assert not Affine(one, one).no_shift
    assert Affine(zero, one).non_negative
    assert not Affine(-one, one).non_negative
    assert Affine(one, one).scale_only().no_shift
    assert not Affine(one / zero, one).finite
    assert Affine(one, zero).same(Affine(one.clone(), zero.clone()))
    assert not Affine(one, zero).same(Affine(one, one))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_16_bits_is_told(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16)).eval()
    model[1].weight.data.uniform_(0.5, 2)
    exact = normswap.fold(copy.deepcopy(model).to(dtype).double())[0].weight
    model = model.to(dtype)
    plan = normswap.plan_fold(model)
    folded = plan.apply()[0].weight.detach()
    lost = float((folded.double() - exact.detach()).norm() / exact.detach().norm())
    assert plan.changes[0].notes == (f"rounding adds {lost:.1e} of the weight",)
    assert torch.finfo(dtype).eps / 8 < lost < torch.finfo(dtype).eps / 2
    assert not normswap.plan_fold(model.float()).changes[0].notes


def test_a_weight_that_would_underflow_is_left() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    model[1].running_var.fill_(1e9)
    model = model.half()
    model[1].running_var = torch.full((4,), 1e9)
    plan = normswap.plan_fold(model)
    assert "of themselves to rounding in float16" in plan.changes[0].notes[0]
    assert torch.equal(plan.apply()[0].weight, model[0].weight)
