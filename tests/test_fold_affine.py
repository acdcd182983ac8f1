"""The affine of norms that compute their own statistics, folded into the layers that read them: every kind of norm,
every reader, and what is left alone."""

from __future__ import annotations

import copy
import json
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import normswap
import tests.zoo.schemas  # noqa: F401  before timm
from normswap.errors import NormswapError, Refusal
from normswap.graph.record import record
from normswap.norms.layer import ChannelLayerNorm, ChannelsFirstLayerNorm
from normswap.norms.rms import ChannelRMSNorm, ChannelsFirstRMSNorm
from tests.support import distance, only, picture, sample

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import timm  # isort: skip
    import transformers  # isort: skip
    from timm.layers import norm as timm_norms
    from torchvision.models.convnext import LayerNorm2d
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm


def randomised(model: nn.Module, *, shift: bool = True) -> nn.Module:
    """Random parameters in float64, biases of norms zero without ``shift``; in eval mode."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                values = torch.randn(parameter.shape, generator=generator)
                norm = normswap.registry.registered(module)
                parameter.copy_(torch.zeros_like(values) if norm and name == "bias" and not shift else values)
            if isinstance(getattr(module, "running_mean", None), Tensor):
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
    return model.double().eval()


def close(model: nn.Module, folded: nn.Module, *inputs: Any, tolerance: float = 1e-11) -> None:
    """The same function: with and without gradients, in eval and in train mode."""
    for training in (False, True):
        ours, theirs = (copy.deepcopy(m).train(training) for m in (folded, model))
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert distance(ours(*inputs), theirs(*inputs)) < tolerance, (training, grad)


def folds(model: nn.Module, *inputs: Tensor, names: list[str], into: set[str], observed: bool = False) -> nn.Module:
    """The affine of ``names`` goes into the layers ``into``, in a copy, exactly, undone bit for bit, replayed."""
    before = picture(model)
    plan = normswap.plan_fold(model, affine=True, example_inputs=inputs if observed else None)
    assert [change.name for change in plan.changes] == names, str(plan)
    assert {name for change in plan.changes for name in change.into} == into
    for change in plan.changes:
        assert (change.to, change.exactness) == ("bare", "exact")
        assert change.target.kind == change.source.kind
        assert change.target.weight is None
        assert "affine folded into" in change.becomes
    folded = plan.apply()
    assert not before.differences(model)
    for name in names:
        norm = folded.get_submodule(name)
        assert type(norm) is type(model.get_submodule(name))
        read = normswap.read(norm)
        assert read.weight is None or bool((read.weight == 1).all())
        assert read.bias is None or not read.bias.any()
    close(model, folded, *inputs)

    plan = normswap.plan_fold(model, affine=True, example_inputs=inputs if observed else None)
    plan.apply(inplace=True)
    assert before.differences(model)
    plan.undo()
    assert not before.differences(model)

    recipe = json.loads(json.dumps(plan.recipe))
    replayed = normswap.apply_recipe(model, recipe)
    assert all(torch.equal(replayed.state_dict()[name], value) for name, value in folded.state_dict().items())
    assert list(replayed.state_dict()) == list(folded.state_dict())
    with torch.no_grad():
        fresh = copy.deepcopy(model)
        for module in fresh.modules():
            if normswap.registry.registered(module) and hasattr(module, "reset_parameters"):
                module.reset_parameters()
    normswap.apply_recipe(fresh, recipe, inplace=True).load_state_dict(folded.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(*inputs), folded(*inputs))
    again = normswap.plan_fold(folded, affine=True, example_inputs=inputs if observed else None)
    assert not set(names) & {change.name for change in again.changes}
    return folded


def reason(model: nn.Module, *inputs: Tensor, name: str = "norm", **options: Any) -> str:
    """Why a norm is left; nothing else changes."""
    plan = normswap.plan_fold(model, affine=True, example_inputs=inputs or None, **options)
    assert name not in [change.name for change in plan.changes], str(plan)
    return str(only([skip.reason for skip in plan.skips if skip.name == name]))


class Pair(nn.Module):
    """``after(between(norm(x)))``."""

    def __init__(
        self, norm: nn.Module, after: nn.Module, between: Callable[[Any], Any] = lambda x: x, inner: Any = None
    ) -> None:
        super().__init__()
        self.norm = norm
        self.inner = inner
        self.after = after
        self.between = [between]

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.inner is not None:
            x = self.inner(x)
        return self.after(self.between[0](x))


# --- every norm with every reader ------------------------------------------------------------------------------------

LAST: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(6),
    "layer without bias": lambda: nn.LayerNorm(6, bias=False),
    "rms": lambda: nn.RMSNorm(6),
    "timm layer": lambda: timm_norms.LayerNorm(6),
    "timm rms": lambda: timm_norms.RmsNorm(6),
    "timm simple": lambda: timm_norms.SimpleNorm(6),
}
FIRST: dict[str, Callable[[], nn.Module]] = {
    "group": lambda: nn.GroupNorm(3, 6),
    "group of one": lambda: nn.GroupNorm(1, 6),
    "instance": lambda: nn.InstanceNorm2d(6, affine=True),
    "layer over the map": lambda: ChannelsFirstLayerNorm(6),
    "layer over channels": lambda: ChannelLayerNorm(6),
    "torchvision": lambda: LayerNorm2d(6),
    "timm layer": lambda: timm_norms.LayerNorm2d(6),
    "timm rms": lambda: timm_norms.RmsNorm2d(6),
    "timm simple": lambda: timm_norms.SimpleNorm2d(6),
    "rms over channels": lambda: ChannelRMSNorm(6),
    "rms over the map": lambda: ChannelsFirstRMSNorm(6),
    "batch without statistics": lambda: nn.BatchNorm2d(6, track_running_stats=False),
}


def channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def flattened(x: Tensor) -> Tensor:
    return x.mean((2, 3)).flatten(1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", LAST.values(), ids=LAST)
def test_last_axis(make: Callable[[], nn.Module], bias: bool) -> None:
    model = randomised(Pair(make(), nn.Linear(6, 4, bias=bias)))
    shift = normswap.read(model.norm).bias is not None
    folded = folds(model, sample(2, 5, 6), names=["norm"], into={"after"})
    assert (folded.after.bias is not None) == (bias or shift)
    assert "norm.weight" not in folded.state_dict()


@pytest.mark.parametrize("make", LAST.values(), ids=LAST)
def test_last_axis_into_a_convolution(make: Callable[[], nn.Module]) -> None:
    model = randomised(Pair(make(), nn.Conv2d(6, 4, (2, 1)), channels_first))
    folds(model, sample(2, 3, 3, 6), names=["norm"], into={"after"})


@pytest.mark.parametrize(
    "after",
    [
        lambda: nn.Conv2d(6, 4, 1),
        lambda: nn.Conv2d(6, 4, 2, stride=2, bias=False),
        lambda: nn.Conv2d(6, 12, 3, groups=6, padding=1, padding_mode="reflect"),
        lambda: nn.ConvTranspose2d(6, 4, 1, groups=2),
    ],
    ids=["1x1", "downsampling", "reflect", "transposed"],
)
@pytest.mark.parametrize("make", FIRST.values(), ids=FIRST)
def test_channels_first(make: Callable[[], nn.Module], after: Callable[[], nn.Module]) -> None:
    folded = folds(randomised(Pair(make(), after())), sample(3, 6, 4, 4), names=["norm"], into={"after"})
    assert "norm.weight" not in folded.state_dict()


@pytest.mark.parametrize("make", FIRST.values(), ids=FIRST)
@pytest.mark.parametrize("between", [channels_last, flattened])
def test_channels_first_into_linear(make: Callable[[], nn.Module], between: Any) -> None:
    model = randomised(Pair(make(), nn.Linear(6, 4), between))
    folds(model, sample(3, 6, 4, 4), names=["norm"], into={"after"}, observed=True)


@pytest.mark.parametrize("make", FIRST.values(), ids=FIRST)
def test_zero_padding_is_left_unless_the_shift_is_zero(make: Callable[[], nn.Module]) -> None:
    model = randomised(Pair(make(), nn.Conv2d(6, 4, 3, padding=1)))
    if normswap.read(model.norm).bias is not None:
        assert "pads with zeros" in reason(model)
        randomised(model, shift=False)
    folds(model, sample(3, 6, 4, 4), names=["norm"], into={"after"})


@pytest.mark.parametrize(
    ("make", "manner"), [(LlamaRMSNorm, "ones"), (GemmaRMSNorm, "zeros")], ids=["weight", "1 + weight"]
)
def test_classes_that_need_their_weight_keep_it_neutral(make: Any, manner: str) -> None:
    model = randomised(Pair(make(6), nn.Linear(6, 4)))
    plan = normswap.plan_fold(model, affine=True)
    assert only(plan.changes).fold.bare.manner == manner
    folded = plan.apply()
    assert bool((folded.norm.weight == (manner == "ones")).all())
    close(model, folded, sample(2, 5, 6), tolerance=1e-6)  # these classes compute in float32
    weight = model.norm.weight
    plan.apply(inplace=False)
    assert model.norm.weight is weight
    assert not normswap.plan_fold(folded, affine=True).changes


def test_one_plus_weight_is_not_rounded() -> None:
    """1 + w in bfloat16 has 8 bits; the layer gets it from w, in float64."""
    norm = GemmaRMSNorm(4).bfloat16()
    norm.weight.data = torch.tensor([2**-9, 2**-10, -(2**-9), 2**-12]).bfloat16()
    model = Pair(norm, nn.Linear(4, 4, bias=False)).eval()
    model.after.weight.data = torch.eye(4)
    folded = normswap.fold(model, affine=True)
    assert torch.equal(folded.after.weight.diag(), 1 + model.norm.weight.float())


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("cls", [nn.LayerNorm, nn.RMSNorm])
def test_weight_of_several_axes(cls: Any, axis: int) -> None:
    model = randomised(Pair(cls((5, 6)), nn.Linear(6, 4) if axis == -1 else nn.Conv1d(5, 4, 1)))
    x = sample(2, 5, 6)
    assert "one value for each element" in reason(model, x)
    for parameter in model.norm.parameters():  # varies along one axis only
        first = parameter.data.select(-1 if axis == -2 else 0, 0)
        parameter.data.copy_(first.unsqueeze(-1 if axis == -2 else 0).expand(5, 6))
    folds(model, x, names=["norm"], into={"after"}, observed=True)


def test_weight_of_several_axes_read_along_another() -> None:
    model = randomised(Pair(nn.LayerNorm((6, 6)), nn.Conv1d(6, 4, 1)))
    for parameter in model.norm.parameters():
        parameter.data.copy_(parameter.data[0].expand(6, 6))
    assert "another axis" in reason(model, sample(2, 6, 6))


def test_instance_norm_without_a_batch_axis() -> None:
    model = randomised(Pair(nn.InstanceNorm1d(6, affine=True), nn.Linear(6, 4)))
    x = sample(6, 6)
    with torch.no_grad():
        model(x)
    assert "no batch axis" in reason(model, x)


# --- readers ---------------------------------------------------------------------------------------------------------


class Fan(nn.Module):
    """Several readers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.first = nn.Linear(6, 4)
        self.second = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        shape = x.shape
        return self.first(x) * self.second(x[:, 0]).unsqueeze(1) + shape[0]


def test_all_readers_absorb() -> None:
    folds(randomised(Fan()), sample(2, 5, 6), names=["norm"], into={"first", "second"}, observed=True)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.after = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + self.after(x)


class Returned(Residual):
    def forward(self, x: Tensor) -> Any:
        x = self.norm(x)
        return self.after(x), x


class Kept(Residual):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.norm(x)
        return self.after(self.last)


class Changed(Residual):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x.add_(1)
        return self.after(x)


class ChangedThroughAView(Residual):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x.view(-1).mul_(2)
        return self.after(x)


class Twice(Residual):
    """Two calls of the norm, one of which nothing can take."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.after(self.norm(x)))


class ReadsWeight(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.norm(x)) * self.norm.weight


class SharedReader(Residual):
    """The layer also reads another value."""

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.after(self.norm(x)))


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (Residual, "add adds it to something else"),
        (Returned, "the output reads it"),
        (Kept, "kept in an attribute"),
        (Changed, "add_ reads it"),
        (ChangedThroughAView, "mul_ multiplies it|mul_ reads it|where the channels go is not proved"),
        (Twice, "the output reads it"),
        (ReadsWeight, "reads its 'weight'"),
        (SharedReader, "after is called at 2 sites and only 1 of them"),
    ],
)
@pytest.mark.parametrize("observed", [False, True])
def test_readers_that_cannot(cls: Any, why: str, observed: bool) -> None:
    found = reason(randomised(cls()), *([sample(2, 5, 6)] if observed else []))
    assert any(part in found for part in why.split("|")), found


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (F.relu, "relu reads it"),
        (lambda x: x * x, "mul reads it twice"),
        (lambda x: x.transpose(1, 2), "another axis"),
        (lambda x: F.pad(x, (1, 1)), "pad"),
        (lambda x: F.pad(x, (0, 0, 1, 1)), "pad"),
        (lambda x: x[..., :6], "getitem"),
        (lambda x: torch.roll(x, 1, dims=-1), "roll"),
        (lambda x: torch.roll(x, 1), "roll"),
        (lambda x: x.reshape(2, 3, 12)[..., ::2], "reshape"),
        (F.alpha_dropout, "alpha_dropout"),
    ],
)
def test_operations_that_do_not_let_it_pass(between: Any, why: str) -> None:
    model = randomised(Pair(nn.LayerNorm(6), nn.Linear(6, 4), between))
    model.after = nn.LazyLinear(4).double()
    with torch.no_grad():
        model(sample(2, 6, 6))
    assert why in reason(model, sample(2, 6, 6))


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x.reshape(2, 2, 2, 6).permute(0, 2, 1, 3).reshape(-1, 2, 6),
        lambda x: torch.roll(x, (1, 2), dims=(0, 1)),
        lambda x: x[:, 0],
        lambda x: x[0, ..., :],
        lambda x: x[:, 1:].mean(1),
        lambda x: x.mean(dim=1),
        lambda x: 2 * x - 1,
        lambda x: F.dropout(x, 0.0, training=False),
        lambda x: F.pad(x, (0, 0, 0, 0)),
    ],
)
def test_operations_it_passes(between: Any) -> None:
    x = sample(2, 4, 6)
    model = randomised(Pair(nn.LayerNorm(6), nn.Linear(between(x).shape[-1], 4), between))
    folds(model, x, names=["norm"], into={"after"}, observed=True)


def test_a_recipe_that_needs_what_was_seen() -> None:
    """A concatenation extends the affine by as many channels as were seen, which code alone does not prove."""
    model = randomised(Pair(nn.LayerNorm(6), nn.Linear(9, 4), lambda x: torch.cat([x, x.new_ones(2, 4, 3)], -1)))
    x = sample(2, 4, 6)
    plan = normswap.plan_fold(model, affine=True, example_inputs=(x,))
    close(model, plan.apply(), x)
    with pytest.raises(NormswapError, match="the channels of its branches are not known"):
        normswap.apply_recipe(model, plan.recipe)


def test_padding_by_zero_rows_is_said() -> None:
    model = randomised(Pair(nn.LayerNorm(6), nn.Linear(6, 4), lambda x: F.pad(x, (0, 0, 0, x.shape[1] % 4))))
    plan = normswap.plan_fold(model, affine=True, example_inputs=(sample(2, 4, 6),))
    assert "pad adds nothing" in only(plan.changes).notes[0]
    assert "pad" in reason(model, sample(2, 5, 6))
    assert "pad" in reason(model)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_dropout(shift: bool, training: bool) -> None:
    """A scale passes dropout in both modes, a shift only in eval mode."""
    model = randomised(Pair(nn.LayerNorm(6), nn.Linear(6, 4), inner=nn.Dropout(0.5)), shift=shift).train(training)
    if shift and training:
        assert "inner (Dropout) is in train mode" in reason(model)
        return
    plan = normswap.plan_fold(model, affine=True)
    assert bool(only(plan.changes).notes) == shift
    folded, x = plan.apply(), sample(2, 5, 6)
    for mode in (False,) if shift else (False, True):
        outputs = []
        for each in (model, folded):
            torch.manual_seed(0)
            outputs.append(each.train(mode)(x))
        assert distance(*outputs) < 1e-12


def test_alpha_dropout_in_train_mode() -> None:
    model = randomised(Pair(nn.RMSNorm(6), nn.Linear(6, 4), inner=nn.AlphaDropout(0.5))).train()
    assert "is in train mode" in reason(model)
    model.eval()
    assert "not in train mode" in only(normswap.plan_fold(model, affine=True).changes).notes[0]


def test_through_a_batch_norm_that_is_gone() -> None:
    model = randomised(nn.Sequential(nn.GroupNorm(2, 6), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)))
    plan = normswap.plan_fold(model, affine=True)
    assert [(change.name, change.to) for change in plan.changes] == [
        ("0", "bare"),
        ("1", "identity"),
        ("3", "identity"),
    ]
    x = sample(2, 6, 3, 3)
    folded = plan.apply()
    assert distance(folded(x), model(x)) < 1e-12
    replayed = normswap.apply_recipe(model, plan.recipe)
    assert all(torch.equal(replayed.state_dict()[name], value) for name, value in folded.state_dict().items())
    without = normswap.plan_fold(model)
    assert [change.name for change in without.changes] == ["1", "3"]
    assert "computes its statistics from each input" in only(without.skips).reason


# --- guards ----------------------------------------------------------------------------------------------------------


def test_followed_by_an_activation_inside() -> None:
    model = randomised(Pair(timm.layers.LayerNormAct(6), nn.Linear(6, 4)))
    assert "activation follows inside" in reason(model)


def test_hooks() -> None:
    model = randomised(Pair(nn.LayerNorm(6), nn.Linear(6, 4)))
    handle = model.norm.register_forward_hook(lambda *_: None)
    assert "hooks" in reason(model)
    handle.remove()
    model.after.register_forward_pre_hook(lambda *_: None)
    assert "after has forward or backward hooks" in reason(model)


def test_parametrized() -> None:
    model = randomised(Pair(nn.LayerNorm(6), parametrizations.weight_norm(nn.Linear(6, 4))))
    plan = normswap.plan_fold(model, affine=True)
    assert plan.changes[0].notes == ("bakes the weight norm of after",)
    x = sample(5, 6)
    torch.testing.assert_close(plan.apply()(x), model(x), rtol=1e-12, atol=1e-12)
    model = randomised(Pair(parametrizations.weight_norm(nn.LayerNorm(6)), nn.Linear(6, 4)))
    assert "parametrized" in reason(model)


def test_tied_to_an_embedding() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 6)
            self.norm = nn.LayerNorm(6)
            self.head = nn.Linear(6, 9, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.embedding(x)))

    model = randomised(Language())
    assert reason(model).startswith("head shares its weight with embedding; unshare=True")
    plan = normswap.plan_fold(model, affine=True, unshare=True, example_inputs=(torch.arange(4)[None],))
    assert [change.into for change in plan.changes] == [("head",)]
    untied = plan.apply()
    assert untied.head.weight is not untied.embedding.weight
    assert model.head.weight is model.embedding.weight
    ids = torch.randint(0, 5, (2, 7))
    torch.testing.assert_close(untied(ids), model(ids), rtol=1e-12, atol=1e-12)


def test_norms_that_share_a_weight() -> None:
    model = randomised(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)))
    model[2].weight = model[0].weight
    assert reason(model, name="0") == "it shares its weight with 2"


def test_nothing_to_fold() -> None:
    model = nn.Sequential(nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    assert reason(model, name="0") == "it has no affine to fold"
    assert "nothing to fold" in reason(model, name="2")


def test_not_finite() -> None:
    model = randomised(Pair(nn.LayerNorm(6), nn.Linear(6, 4)))
    model.norm.weight.data[0] = torch.inf
    assert "not finite" in reason(model)


def test_overflow_in_half_precision() -> None:
    for after in (nn.Linear(6, 6), nn.MultiheadAttention(6, 2)):
        model = Pair(nn.LayerNorm(6), after).half()
        if isinstance(after, nn.MultiheadAttention):
            model = SelfAttention(after).half()
        model.norm.weight.data.fill_(60000.0)
        for name, parameter in model.after.named_parameters():
            if name in ("weight", "in_proj_weight"):
                parameter.data.fill_(100.0)
        assert "may not be finite in float16" in reason(model)


def test_meta_and_statistics_and_functions() -> None:
    assert "meta" in reason(Pair(nn.LayerNorm(6, device="meta"), nn.Linear(6, 4)))
    tracked = randomised(Pair(nn.InstanceNorm2d(6, affine=True, track_running_stats=True), nn.Conv2d(6, 4, 1))).train()
    assert "train mode" in reason(tracked)
    assert only(normswap.plan_fold(tracked.eval(), affine=True).changes).to == "identity"
    switchable = normswap.convert(randomised(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))), "switchable")
    assert "computes its statistics" in reason(switchable, name="0")

    class Function(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(6))
            self.after = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.after(F.layer_norm(x, (6,), self.weight))

    assert "functional norm" in only(normswap.plan_fold(Function(), affine=True).skips).reason


def test_a_class_without_a_neutral_state() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(6))

        def forward(self, x: Tensor) -> Tensor:
            return F.rms_norm(x, (6,), self.weight * 2 + 1)

    path = normswap.registry.dotted(Doubled)
    normswap.reads(path)(
        lambda module: normswap.Norm(
            kind="rms", channels=6, pools=frozenset({"channel"}), channel_axis=-1, centred=False, spread="square",
            eps=None, momentum=None, weight=module.weight.detach() * 2 + 1,
        )
    )  # fmt: skip
    try:
        assert "does not scale by its weight" in reason(Pair(Doubled(), nn.Linear(6, 4)).double())
    finally:
        del normswap.registry._readers[path]
        normswap.registry._lookup.cache_clear()


def test_asked_for_its_type_a_norm_keeps_its_weight() -> None:
    class Typed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(6)
            self.after = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.norm(x.to(self.norm.weight.dtype)))

    model = randomised(Typed())
    plan = normswap.plan_fold(model, affine=True)
    assert only(plan.changes).fold.bare.manner == "ones"
    close(model, plan.apply(), sample(2, 5, 6))


def test_selection_and_inplace() -> None:
    model = randomised(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 4)))
    plan = normswap.plan_fold(model, affine=True, skip="2")
    assert [change.name for change in plan.changes] == ["0"]
    before, x = copy.deepcopy(model), sample(3, 6)
    assert normswap.fold(model, affine=True, inplace=True) is model
    close(before, model, x)
    assert model[0].weight is None
    assert not model[0].elementwise_affine
    copied = copy.deepcopy(model)
    copied[0].reset_parameters()
    assert torch.equal(copied(x), model(x))


def test_optimizer_follows() -> None:
    model = randomised(Pair(nn.LayerNorm(6), nn.Linear(6, 4, bias=False)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    plan = normswap.plan_fold(model, affine=True)
    folded = plan.apply()
    plan.remap_optimizer(optimizer)
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert id(folded.after.weight) in known
    assert len(known) <= len(list(folded.parameters()))


@pytest.mark.parametrize(
    "damage",
    [
        lambda step: step.pop("bare"),
        lambda step: step["bare"].update(manner="halves"),
        lambda step: step["bare"].update(direct=1),
        lambda step: step["bare"].pop("axis"),
        lambda step: step.update(layers=[{"name": "after"}]),
    ],
)
def test_malformed_recipe(damage: Any) -> None:
    recipe = copy.deepcopy(normswap.plan_fold(randomised(Fan()), affine=True, example_inputs=(sample(2, 5, 6),)).recipe)
    damage(recipe["steps"][0])
    with pytest.raises(NormswapError, match="malformed"):
        normswap.apply_recipe(randomised(Fan()), recipe)


def test_recipe_on_another_model() -> None:
    recipe = normswap.plan_fold(randomised(Fan()), affine=True, example_inputs=(sample(2, 5, 6),)).recipe
    other = randomised(Fan())
    other.second = nn.Linear(7, 4).double()
    with pytest.raises(NormswapError, match="second has 7 channels"):
        normswap.apply_recipe(other, recipe)
    tied = randomised(Fan())
    tied.second.weight = tied.first.weight
    before = picture(tied)
    with pytest.raises(NormswapError, match="shares its weight"):
        normswap.apply_recipe(tied, recipe, inplace=True)
    assert not before.differences(tied)


# --- attention -------------------------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    def __init__(self, attention: nn.MultiheadAttention, need_weights: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.after = attention
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        out, weights = self.after(y, y, y, need_weights=self.need_weights)
        return out if weights is None else out + weights.std()


class CrossAttention(nn.Module):
    """Query, key and value by keyword; the memory has other widths where the attention says so."""

    def __init__(self, attention: nn.MultiheadAttention, normed: str) -> None:
        super().__init__()
        widths = {"query": attention.embed_dim, "key": attention.kdim, "value": attention.vdim}
        self.norm = nn.LayerNorm(widths[normed])
        self.attention = attention
        self.normed = normed

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = {"query": query, "key": key, "value": value}
        parts[self.normed] = self.norm(parts[self.normed])
        return self.attention(**parts)[0]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("extras", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=["plain", "extras"])
def test_self_attention(need_weights: bool, batch_first: bool, extras: dict[str, bool]) -> None:
    attention = nn.MultiheadAttention(6, 2, batch_first=batch_first, **extras)
    model = randomised(SelfAttention(attention, need_weights))
    folds(model, sample(3, 4, 6), names=["norm"], into={"after"})


@pytest.mark.parametrize("widths", [{}, {"kdim": 4, "vdim": 3}], ids=["packed", "separate"])
@pytest.mark.parametrize("normed", ["query", "key", "value"])
def test_only_the_part_that_reads_it(normed: str, widths: dict[str, int]) -> None:
    attention = nn.MultiheadAttention(6, 2, **widths)
    model = randomised(CrossAttention(attention, normed))
    inputs = sample(5, 2, 6), sample(4, 2, attention.kdim), sample(4, 2, attention.vdim)
    folded = folds(model, *inputs, names=["norm"], into={"attention"})
    changed = (folded.attention.in_proj_bias != model.attention.in_proj_bias).reshape(3, 6).any(1).tolist()
    assert changed == [normed == part for part in ("query", "key", "value")]


def test_attention_without_bias() -> None:
    model = randomised(SelfAttention(nn.MultiheadAttention(6, 2, bias=False, batch_first=True)))
    assert "no bias that could take the shift" in reason(model)
    folds(randomised(model, shift=False), sample(3, 4, 6), names=["norm"], into={"after"})


def test_attention_called_twice() -> None:
    class Both(nn.Module):
        """One attention at two sites, of which one reads the norm as its query only."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(6)
            self.attention = nn.MultiheadAttention(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            z = self.attention(y, y, y)[0]
            return self.attention(y, z, z)[0]

    assert "attention is called at 2 sites and only 1" in reason(randomised(Both()))


def test_attention_left_alone() -> None:
    class Masked(SelfAttention):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return self.after(y, y, y, attn_mask=y)[0]

    assert "more than query, key and value" in reason(randomised(Masked(nn.MultiheadAttention(6, 2))))

    class Own(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    assert "forward" in reason(randomised(SelfAttention(Own(6, 2))))
    model = randomised(SelfAttention(nn.MultiheadAttention(6, 2)))
    model.after.register_forward_hook(lambda *_: None)
    assert "hooks" in reason(model)


@pytest.fixture(params=[True, False], ids=["batch first", "sequence first"])
def encoder(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    layer = nn.TransformerEncoderLayer(6, 2, 8, 0.0, norm_first=True, batch_first=request.param, activation="gelu")
    return randomised(nn.TransformerEncoder(layer, 2, nn.LayerNorm(6), enable_nested_tensor=False))


def test_transformer_encoder(encoder: nn.Module) -> None:
    names = [f"layers.{i}.{norm}" for i in range(2) for norm in ("norm1", "norm2")]
    into = {f"layers.{i}.{layer}" for i in range(2) for layer in ("self_attn", "linear1")}
    folded = folds(encoder, sample(3, 4, 6), names=names, into=into)
    assert bool((folded.layers[0].norm1.weight == 1).all())  # the fused kernel asks for it
    mask = torch.zeros(4, 4, dtype=torch.bool).triu(1)
    for training in (True, False):
        ours, theirs = folded.train(training), encoder.train(training)
        for context in (torch.no_grad(), torch.enable_grad()):
            with context:
                x = sample(4, 4, 6)
                assert distance(ours(x, mask), theirs(x, mask)) < 1e-11
                assert distance(ours(x, is_causal=True, mask=mask), theirs(x, is_causal=True, mask=mask)) < 1e-11


def test_the_fused_kernel_still_runs(encoder: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    folded = normswap.fold(encoder, affine=True)
    calls = []
    kernel = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: calls.append(1) or kernel(*a))
    x = sample(3, 4, 6)
    with torch.no_grad():
        assert distance(folded(x), encoder(x)) < 1e-11
    assert len(calls) == (4 if encoder.layers[0].self_attn.batch_first else 0)


def test_encoder_that_normalizes_last_is_left() -> None:
    model = randomised(nn.TransformerEncoderLayer(6, 2, 8, 0.0))
    assert "adds it to something else" in reason(model, name="norm1")


def test_transformer_decoder_layer() -> None:
    model = randomised(nn.TransformerDecoderLayer(6, 2, 8, 0.0, norm_first=True))
    inputs = sample(3, 4, 6), sample(5, 4, 6)
    names, into = ["norm1", "norm2", "norm3"], {"self_attn", "multihead_attn", "linear1"}
    folds(model, *inputs, names=names, into=into)


# --- a model that cannot be traced -----------------------------------------------------------------------------------


class Untraceable(nn.Module):
    """Unpacks a shape, which a trace cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.after = nn.Linear(6, 6)

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = x.view(*x.shape[:-1], 1, 6).reshape(x.shape)
        return self.after(self.between(x))


def test_path_of_a_real_call() -> None:
    model = randomised(Untraceable())
    assert "pass example_inputs" in reason(model)
    plan = normswap.plan_fold(model, affine=True, example_inputs=(sample(2, 5, 6),))
    change = only(plan.changes)
    assert "rests on the path that example_inputs take" in change.notes[0]
    assert change.evidence == "observed"
    folds(model, sample(2, 5, 6), names=["norm"], into={"after"}, observed=True)
    folds(randomised(Sized()), sample(2, 5, 6), names=["norm"], into={"after"}, observed=True)


class Branching(Untraceable):
    def between(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Drawing(Untraceable):
    def between(self, x: Tensor) -> Tensor:
        return x if torch.rand(()) < 2 else -x


class DrawingInPython(Untraceable):
    def between(self, x: Tensor) -> Tensor:
        return x if random.random() < 2 else -x


class Counting(Untraceable):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def between(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x if self.calls < 100 else -x


class Sized(Untraceable):
    """Asks a tensor that depends on sizes alone."""

    def between(self, x: Tensor) -> Tensor:
        return x if (torch.arange(x.shape[1]) >= 0).all() else -x


class AlsoReturned(Untraceable):
    def between(self, x: Tensor) -> Tensor:
        self.last = {"value": [x]}
        return x


class Numpy(Untraceable):
    def between(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() + 1)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.abs()


class Custom(Untraceable):
    def between(self, x: Tensor) -> Tensor:
        return x + Square.apply(x)


class Written(Untraceable):
    def between(self, x: Tensor) -> Tensor:
        x[0] = 0
        return x


class Hidden(Untraceable):
    """Calls the layer's function, not the layer."""

    def between(self, x: Tensor) -> Tensor:
        return F.linear(x, self.after.weight)


class Scripted(Untraceable):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.inner = torch.jit.trace(nn.Sequential(nn.ReLU()), torch.zeros(2, 5, 6))

    def between(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Caught(Untraceable):
    def __init__(self) -> None:
        super().__init__()
        self.wrong = nn.Linear(7, 6)

    def between(self, x: Tensor) -> Tensor:
        try:
            return self.wrong(x)
        except RuntimeError:
            return -F.relu(x)


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (Branching, "asks for the value of a tensor"),
        (Drawing, "asks for the value of a tensor"),
        (DrawingInPython, "draws random numbers in Python"),
        (Counting, "a number, on which its path may depend"),
        (AlsoReturned, "kept in an attribute"),
        (Numpy, "detach reads it|numpy|value of a tensor"),
        (Custom, "add adds it|abs reads it"),
        (Written, "setitem reads it"),
        (Hidden, "linear reads it|read elsewhere"),
        (Scripted, "relu|add adds it"),
        (Caught, "relu reads it|Linear has 7 channels there"),
    ],
)
def test_what_a_real_call_shows(cls: Any, why: str) -> None:
    model = randomised(cls())
    found = reason(model, sample(2, 5, 6))
    assert any(part in found for part in why.split("|")), found


def test_a_real_call_speaks_for_eval_mode() -> None:
    assert "call eval()" in reason(randomised(Untraceable()).train(), sample(2, 5, 6))


def test_a_recording_leaves_no_mark() -> None:
    model = randomised(AlsoReturned())
    before = picture(model)
    region, values = record(model, (sample(2, 5, 6),))
    assert not before.differences(model)
    assert not hasattr(model, "last")
    modules = [node.target for node in region.graph.nodes if node.op == "call_module"]
    assert modules == ["norm", "after"]
    assert (2, 5, 6) in values.values()
    model.other = type("OptimizedModule", (nn.Module,), {})()
    model.other.add_module("_orig_mod", nn.Linear(2, 2))
    with pytest.raises(Refusal, match="compiled"):
        record(model, (sample(2, 5, 6),))


CAUSAL = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 32,
}  # fmt: skip


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("family", "tolerance"), [("Llama", 1e-11), ("Qwen2", 1e-11), ("Gemma", 1e-6)])
def test_decoders(family: str, tolerance: float, tied: bool) -> None:
    """Gemma's class multiplies by 1 + weight in float32, which the fold does in float64."""
    config = getattr(transformers, f"{family}Config")(**CAUSAL, tie_word_embeddings=tied)
    model = randomised(Logits(getattr(transformers, f"{family}ForCausalLM")(config)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name or "embed" in name:
                parameter.mul_(0.3)
    tokens = torch.arange(10).reshape(2, 5)
    plan = normswap.plan_fold(model, affine=True, example_inputs=(tokens,))
    names = [f"model.model.layers.{i}.{name}_layernorm" for i in range(2) for name in ("input", "post_attention")]
    assert [change.name for change in plan.changes] == [*names, *([] if tied else ["model.model.norm"])]
    if tied:
        assert "shares its weight" in only(plan.skips).reason
    folded = plan.apply()
    longer = torch.arange(21).reshape(3, 7)
    with torch.no_grad():
        for each in (tokens, longer):
            assert distance(folded(each), model(each)) < tolerance
    replayed = normswap.apply_recipe(model, json.loads(json.dumps(plan.recipe)))
    assert all(torch.equal(replayed.state_dict()[name], value) for name, value in folded.state_dict().items())


VISION: dict[str, tuple[int, int]] = {
    "vit_tiny_patch16_224": (25, 0),
    "deit_tiny_patch16_224": (25, 0),
    "swin_tiny_patch4_window7_224": (24, 5),  # at this size the first two stages pad their windows
    "convnext_atto": (16, 1),
    "mixer_s32_224": (9, 8),
    "resnet50_gn": (0, 53),
}


@pytest.mark.parametrize("name", VISION)
def test_vision_models(name: str) -> None:
    sized = {} if name in ("convnext_atto", "resnet50_gn") else {"img_size": 64}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = timm.create_model(name, **sized)
    with torch.no_grad():
        for module in model.modules():
            if normswap.registry.registered(module):
                for parameter in module.parameters(recurse=False):
                    parameter.uniform_(0.5, 1.5)
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    model = model.double().eval()
    x = sample(1, 3, 64, 64)
    plan = normswap.plan_fold(model, affine=True, example_inputs=(x,))
    assert (len(plan.changes), len(plan.skips)) == VISION[name], str(plan)
    with torch.no_grad():
        assert distance(plan.apply()(x), model(x)) < 1e-11
