"""The oracle against torch's own functions, and exactness against measured equality of functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normswap import Norm, NormswapError, exactness, reference, scale_shift
from normswap.spec import BATCH, MAP, POSITION, SPACE, SYNC, batch_gated, epsilon, gate_weights
from tests.support import DOUBLE, distance, sample

C = 6


def values(seed: int, low: float = -1.0) -> Tensor:
    return torch.rand(C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + low


WEIGHT, BIAS, MEAN, VAR = values(1, 0.5), values(2), values(3), values(4, 0.5)
AFFINE = {"weight": WEIGHT, "bias": BIAS}
STATISTICS = {"running_mean": MEAN, "running_var": VAR}

TORCH: dict[str, tuple[Norm, bool, Callable[[Tensor], Tensor]]] = {
    "batch, train": (
        Norm("batch", C, **AFFINE, **STATISTICS),
        True,
        lambda x: F.batch_norm(x, None, None, WEIGHT, BIAS, training=True),
    ),
    "batch, eval": (
        Norm("batch", C, eps=1e-3, **AFFINE, **STATISTICS),
        False,
        lambda x: F.batch_norm(x, MEAN, VAR, WEIGHT, BIAS, eps=1e-3),
    ),
    "batch without statistics, eval": (
        Norm("batch", C),
        False,
        lambda x: F.batch_norm(x, None, None, training=True),
    ),
    "sync, eval": (
        Norm("sync", C, pools=SYNC, **AFFINE, **STATISTICS),
        False,
        lambda x: F.batch_norm(x, MEAN, VAR, WEIGHT, BIAS),
    ),
    "frozen, train": (
        Norm("frozen", C, fixed=True, **AFFINE, **STATISTICS),
        True,
        lambda x: F.batch_norm(x, MEAN, VAR, WEIGHT, BIAS),
    ),
    "group": (
        Norm("group", C, pools=MAP, groups=3, **AFFINE),
        False,
        lambda x: F.group_norm(x, 3, WEIGHT, BIAS),
    ),
    "instance": (
        Norm("instance", C, pools=SPACE, weight=WEIGHT),
        True,
        lambda x: F.instance_norm(x, weight=WEIGHT, bias=torch.zeros_like(WEIGHT)),
    ),
    "instance with statistics, eval": (
        Norm("instance", C, pools=SPACE, **STATISTICS),
        False,
        lambda x: F.instance_norm(x, MEAN, VAR, use_input_stats=False),
    ),
    "layer over the map": (
        Norm("layer", C, pools=MAP, bias=BIAS),
        False,
        lambda x: F.group_norm(x, 1, torch.ones_like(BIAS), BIAS),
    ),
    "layer over channels": (
        Norm("layer", C, pools=POSITION, **AFFINE),
        False,
        lambda x: F.layer_norm(x.movedim(1, -1), (C,), WEIGHT, BIAS).movedim(-1, 1),
    ),
    "rms over channels": (
        Norm("rms", C, pools=POSITION, centred=False, spread="square", eps=None, weight=WEIGHT),
        False,
        lambda x: F.rms_norm(x.movedim(1, -1), (C,), WEIGHT).movedim(-1, 1),
    ),
}


@pytest.mark.parametrize("shape", [(3, C), (3, C, 5), (3, C, 4, 5), (2, C, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("name", TORCH)
def test_reference_is_torch(name: str, shape: tuple[int, ...]) -> None:
    norm, training, function = TORCH[name]
    if norm.kind == "instance" and len(shape) == 2:
        pytest.skip("torch has no instance norm of (N, C)")
    x = sample(*shape)
    assert distance(reference(x, norm, training=training), function(x)) < DOUBLE


def test_reference_channels_last() -> None:
    x, affine = sample(2, 3, 4, C), {"weight": WEIGHT, "bias": BIAS}
    norm = Norm("layer", C, pools=POSITION, channel_axis=-1, **affine)
    assert distance(reference(x, norm), F.layer_norm(x, (C,), WEIGHT, BIAS)) < DOUBLE
    rms = replace(norm, kind="rms", centred=False, spread="square", bias=None, eps=1e-6)
    assert distance(reference(x, rms), F.rms_norm(x, (C,), WEIGHT, 1e-6)) < DOUBLE


def test_reference_over_trailing_axes() -> None:
    x, weight = sample(2, 4, C), sample(4, C)
    norm = Norm("layer", C, pools=POSITION, channel_axis=-1, shape=(4, C), weight=weight)
    assert distance(reference(x, norm), F.layer_norm(x, (4, C), weight)) < DOUBLE


def test_reference_with_unbiased_deviation() -> None:
    x = sample(2, 3, C)
    norm = Norm("simple", C, pools=POSITION, channel_axis=-1, centred=False, correction=1, eps=1e-6)
    assert distance(reference(x, norm), x / torch.sqrt(x.var(-1, keepdim=True) + 1e-6)) < DOUBLE


def test_reference_mixes_the_three_sources() -> None:
    x = sample(3, C, 4, 5)
    gates = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64), torch.tensor([-0.5, 0.1, 0.4], dtype=torch.float64)
    norm = Norm("switchable", C, pools=BATCH | MAP, gates=gates, **AFFINE, **STATISTICS)
    m, v = gates[0].softmax(0), gates[1].softmax(0)
    for training in (True, False):
        batch = (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)) if training else (MEAN, VAR)
        mean = m[0] * x.mean((2, 3), keepdim=True) + m[1] * x.mean((1, 2, 3), keepdim=True)
        mean = mean + m[2] * batch[0].reshape(1, -1, 1, 1)
        var = v[0] * x.var((2, 3), correction=0, keepdim=True) + v[1] * x.var((1, 2, 3), correction=0, keepdim=True)
        var = var + v[2] * batch[1].reshape(1, -1, 1, 1)
        wanted = (x - mean) / torch.sqrt(var + 1e-5) * WEIGHT.reshape(-1, 1, 1) + BIAS.reshape(-1, 1, 1)
        assert distance(reference(x, norm, training=training), wanted) < DOUBLE


def test_reference_is_in_float64_whatever_the_input() -> None:
    norm = Norm("group", C, pools=MAP, groups=2)
    assert reference(sample(2, C, 3).bfloat16(), norm).dtype == torch.float64


def test_eps_of_the_dtype() -> None:
    norm = Norm("rms", C, pools=POSITION, channel_axis=-1, centred=False, spread="square", eps=None)
    assert epsilon(norm, torch.float16) == torch.finfo(torch.float16).eps
    assert epsilon(replace(norm, eps=1e-3), torch.float16) == 1e-3
    tiny = torch.full((1, C), 1e-4)
    assert distance(reference(tiny, norm), F.rms_norm(tiny.double(), (C,), eps=torch.finfo(torch.float32).eps)) < DOUBLE


def test_wrong_channels_are_named() -> None:
    with pytest.raises(NormswapError, match=r"\(2, 5, 3\) does not have 6 channels"):
        reference(torch.zeros(2, 5, 3), Norm("batch", C))


def test_scale_shift_is_the_eval_function() -> None:
    x = sample(2, C, 3, 3)
    for norm in (
        Norm("batch", C, **AFFINE, **STATISTICS),
        Norm("batch", C, **STATISTICS),
        Norm("instance", C, pools=SPACE, weight=WEIGHT, **STATISTICS),
        Norm("frozen", C, fixed=True, eps=0.0, **AFFINE, **STATISTICS),
    ):
        affine = scale_shift(norm)
        assert affine is not None
        s, t = (part.reshape(-1, 1, 1) for part in affine)
        assert affine[0].dtype == torch.float64
        assert distance(x * s + t, reference(x, norm)) < DOUBLE


def test_scale_shift_is_none_without_fixed_statistics() -> None:
    mixed = torch.zeros(3, dtype=torch.float64)
    shut = torch.tensor([0.0, 0.0, 40.0], dtype=torch.float64)
    assert scale_shift(Norm("batch", C, **AFFINE)) is None
    assert scale_shift(Norm("group", C, pools=MAP, **AFFINE)) is None
    switchable = Norm("switchable", C, gates=(mixed, mixed), **AFFINE, **STATISTICS)
    assert scale_shift(switchable) is None
    assert not batch_gated(switchable)
    assert not batch_gated(replace(switchable, gates=(shut, mixed)))
    closed = replace(switchable, gates=(shut, shut))
    assert batch_gated(closed)
    assert scale_shift(closed) is not None


def test_gate_weights_only_of_a_switchable_norm() -> None:
    with pytest.raises(NormswapError, match="has no gates"):
        gate_weights(Norm("batch", C))


def test_a_norm_in_words() -> None:
    norm = Norm("group", C, pools=MAP, groups=3, eps=1e-3, then=(nn.Identity(), nn.ReLU()))
    assert str(norm) == "group(6, groups=3, eps=0.001, no affine, ReLU)"
    assert str(Norm("rms", C, channel_axis=-1, shape=(4, C), eps=None, weight=WEIGHT)) == "rms(4x6, eps=None)"
    assert str(Norm("layer", C, pools=POSITION, weight=WEIGHT)) == "layer(6, over=channels, eps=1e-05)"


PLAIN = Norm("batch", C, **AFFINE, **STATISTICS)
GROUP = Norm("group", C, pools=MAP, groups=2, **AFFINE)
ONES, ZEROS = torch.ones(C, dtype=torch.float64), torch.zeros(C, dtype=torch.float64)
SHUT = torch.tensor([0.0, 0.0, 40.0], dtype=torch.float64)

PAIRS: dict[str, tuple[Norm, Norm, str]] = {
    "itself": (PLAIN, replace(PLAIN), "exact"),
    "frozen": (PLAIN, replace(PLAIN, kind="frozen", fixed=True), "exact"),
    "sync": (PLAIN, replace(PLAIN, kind="sync", pools=SYNC), "exact"),
    "another momentum": (PLAIN, replace(PLAIN, momentum=None), "exact"),
    "the same affine in other numbers": (
        replace(PLAIN, eps=0.0),
        replace(PLAIN, eps=0.0, weight=2 * WEIGHT, running_var=4 * VAR),
        "exact",
    ),
    "another eps": (PLAIN, replace(PLAIN, eps=1e-2), "approximate"),
    "other statistics": (PLAIN, replace(PLAIN, running_mean=MEAN + 1), "approximate"),
    "no statistics": (PLAIN, replace(PLAIN, running_mean=None, running_var=None), "approximate"),
    "no affine": (PLAIN, Norm("batch", C, **STATISTICS), "retrain"),
    "a neutral affine": (Norm("batch", C, weight=ONES, bias=ZEROS), Norm("batch", C), "exact"),
    "batch to group": (PLAIN, GROUP, "approximate"),
    "group to batch": (GROUP, PLAIN, "approximate"),
    "other groups": (GROUP, replace(GROUP, groups=3), "approximate"),
    "one group is layer": (replace(GROUP, groups=1), replace(GROUP, kind="layer", groups=1), "exact"),
    "groups of one channel are instances": (
        replace(GROUP, groups=C),
        replace(GROUP, kind="instance", pools=SPACE, groups=1),
        "exact",
    ),
    "layer to rms": (
        replace(GROUP, kind="layer", groups=1),
        replace(GROUP, kind="rms", groups=1, centred=False, spread="square", bias=None),
        "approximate",
    ),
    "over channels instead of the map": (
        replace(GROUP, groups=1, kind="layer"),
        replace(GROUP, groups=1, kind="layer", pools=POSITION),
        "approximate",
    ),
    "over channels, of inputs that may have a map": (
        replace(GROUP, groups=1, kind="layer", ranks=frozenset({2, 3, 4})),
        replace(GROUP, groups=1, kind="positional", pools=POSITION),
        "approximate",
    ),
    "a shut gate": (PLAIN, replace(PLAIN, kind="switchable", gates=(SHUT, SHUT)), "exact"),
    "a gate shut on layer": (
        replace(GROUP, groups=1, kind="layer"),
        replace(PLAIN, kind="switchable", gates=(SHUT.roll(-1), SHUT.roll(-1))),
        "exact",
    ),
    "open gates": (PLAIN, replace(PLAIN, kind="switchable", gates=(ZEROS[:3], ZEROS[:3])), "approximate"),
    "identity": (PLAIN, Norm("identity", C, pools=frozenset(), eps=None), "retrain"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_exactness_is_measured_equality(name: str) -> None:
    source, target, outcome = PAIRS[name]
    assert exactness(source, target) == outcome
    x = sample(3, C, 4, 5)
    ours = reference(x, source)
    theirs = x if target.kind == "identity" else reference(x, target)
    assert (distance(theirs, ours) < DOUBLE) == (outcome == "exact")


def test_without_space_a_map_is_its_channels() -> None:
    layer = replace(GROUP, groups=1, kind="layer", ranks=frozenset({2}))
    position = replace(GROUP, groups=1, kind="positional", pools=POSITION)
    assert exactness(layer, position) == "exact"
    assert exactness(replace(layer, groups=2), position) == "approximate"
    x = sample(5, C)
    assert distance(reference(x, position), reference(x, layer)) < DOUBLE


def test_other_channels_are_never_the_same() -> None:
    assert exactness(Norm("batch", 4), Norm("batch", 5)) == "retrain"


def test_meta_tensors_compare_by_shape() -> None:
    meta = {name: tensor.to("meta") for name, tensor in {**AFFINE, **STATISTICS}.items()}
    source = Norm("batch", C, **meta)
    assert exactness(source, replace(source, kind="sync", pools=SYNC)) == "exact"
    assert exactness(source, Norm("group", C, pools=MAP, weight=meta["weight"])) == "approximate"
