"""What today's tools do wrong when they replace norms: each check passes here and fails on the tool named."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

import normswap
import tests.zoo.schemas  # noqa: F401  before timm
from normswap.norms.frozen import FrozenBatchNorm

timm = pytest.importorskip("timm")
Tool = Callable[[nn.Module], nn.Module]


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), Tensor) and module.running_mean.numel():
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
    return model.eval()


def fails(check: Callable[[Tool], None], tool: Tool) -> None:
    """The check notices what the tool does."""
    with pytest.raises((AssertionError, RuntimeError, ValueError, AttributeError)):
        check(tool)


def torch_sync(model: nn.Module) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def our_sync(model: nn.Module) -> nn.Module:
    return normswap.convert(model, "sync", inplace=True)


def opacus_fix(model: nn.Module) -> nn.Module:
    validators = pytest.importorskip("opacus.validators")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return validators.ModuleValidator.fix(model)


def our_group(model: nn.Module) -> nn.Module:
    return normswap.convert(model, "group")


def timm_freeze(model: nn.Module) -> nn.Module:
    return timm.utils.freeze_batch_norm_2d(model) if hasattr(timm.utils, "freeze_batch_norm_2d") else _freeze(model)


def _freeze(model: nn.Module) -> nn.Module:
    from timm.layers.norm_act import freeze_batch_norm_2d

    return freeze_batch_norm_2d(model)


def our_frozen(model: nn.Module) -> nn.Module:
    return normswap.convert(model, "frozen")


def forum(model: nn.Module) -> nn.Module:
    """``setattr`` with the dotted name, as pasted from forums (vision 2391)."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            group = nn.GroupNorm(1, module.num_features)
            try:
                setattr(model, name, group)
            except KeyError:  # add_module refuses dots; __setattr__ does not
                model.__dict__[name] = group
    return model


# --- convert_sync_batchnorm ------------------------------------------------------------------------------------------


def keeps_activations(tool: Tool) -> None:
    """pytorch 187298."""
    model = randomised(timm.create_model("semnasnet_075"))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, out = model(x), tool(copy.deepcopy(model))(x)
    assert float((out - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_sync_keeps_activations() -> None:
    keeps_activations(our_sync)
    fails(keeps_activations, torch_sync)


class Aliased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.BatchNorm2d(4)
        self.list = [self.a]
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.list[0](self.b(self.a(x)))


def follows_aliases(tool: Tool) -> None:
    model = tool(randomised(Aliased()))
    assert type(model.a) is not nn.BatchNorm2d
    assert model.a is model.b
    assert model.list[0] is model.a


def test_sync_follows_aliases() -> None:
    follows_aliases(our_sync)
    fails(follows_aliases, torch_sync)


def says_lazy_norms_are_not_ready(tool: Tool) -> None:
    model = tool(nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d()))
    assert isinstance(model[1], nn.LazyBatchNorm2d)


def test_lazy_norms_are_a_clear_skip() -> None:
    with pytest.warns(UserWarning, match="lazy and not initialised"):
        says_lazy_norms_are_not_ready(our_sync)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fails(says_lazy_norms_are_not_ready, torch_sync)


def test_there_is_a_way_back_from_sync() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    back = normswap.convert(normswap.convert(model, "sync"), "batch")
    assert type(back[1]) is nn.BatchNorm2d
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(back(x), model(x))
    assert not hasattr(nn.SyncBatchNorm, "revert_sync_batchnorm")


def trains_on_the_cpu(tool: Tool) -> None:
    """Under gloo; ``test_sync.py`` compares two processes with one."""
    model = tool(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).train()
    model(torch.randn(2, 3, 4, 4)).square().sum().backward()


def test_sync_trains_on_the_cpu(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        trains_on_the_cpu(our_sync)
        fails(trains_on_the_cpu, torch_sync)
    finally:
        dist.destroy_process_group()


# --- Opacus ----------------------------------------------------------------------------------------------------------


def keeps_settings(tool: Tool) -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 48, 1), nn.BatchNorm2d(48, eps=1e-3))).double()
    model[1].weight.requires_grad_(False)
    norm = tool(copy.deepcopy(model))[1]
    assert norm.eps == 1e-3
    assert norm.weight.dtype == torch.float64
    assert not norm.training
    assert not norm.weight.requires_grad
    assert torch.equal(norm.weight, model[1].weight)
    assert torch.equal(norm.bias, model[1].bias)


def test_group_keeps_affine_eps_dtype_and_mode() -> None:
    keeps_settings(our_group)
    fails(keeps_settings, opacus_fix)


class Subclass(nn.BatchNorm2d):
    pass


KINDS_LEFT: dict[str, Callable[[], nn.Module]] = {
    "with activation": lambda: timm.layers.BatchNormAct2d(8),
    "subclass": lambda: Subclass(8),
    "frozen": lambda: FrozenBatchNorm(8),
}


@pytest.mark.parametrize("name", KINDS_LEFT)
def test_group_reaches_subclasses_and_frozen_norms(name: str) -> None:
    def leaves_no_batch_norm(tool: Tool) -> None:
        model = tool(randomised(nn.Sequential(nn.Conv2d(3, 8, 1), KINDS_LEFT[name]())))
        assert not any(isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm)) for m in model.modules())

    leaves_no_batch_norm(our_group)
    fails(leaves_no_batch_norm, opacus_fix)
    validators = pytest.importorskip("opacus.validators")
    assert validators.ModuleValidator.is_valid(nn.Sequential(nn.Conv2d(3, 8, 1), KINDS_LEFT[name]()))


def keeps_the_data(tool: Tool) -> None:
    """opacus 567: gcd(32, C) groups of 32 channels are single channels, over one position single values."""
    model = randomised(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 32, 1), nn.BatchNorm2d(32)))
    out = tool(model)(torch.randn(4, 3, 6, 6))
    assert float(out.std(0).detach().min()) > 1e-3


def test_no_group_of_one_element() -> None:
    keeps_the_data(our_group)
    fails(keeps_the_data, opacus_fix)


def survives_hooks(tool: Tool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    seen = []
    model[1].register_forward_hook(lambda _m, _i, out: seen.append(float(out.detach().min())))
    tool(model)(torch.randn(2, 3, 4, 4))
    assert len(seen) == 1


def test_hooks_stay_on_the_new_norm() -> None:
    survives_hooks(our_group)
    fails(survives_hooks, opacus_fix)


@pytest.mark.parametrize("convert", [lambda model: model, our_group, opacus_fix], ids=["batch norm", "ours", "opacus"])
def test_an_inplace_activation_breaks_full_backward_hooks_before_and_after(convert: Tool) -> None:
    """opacus 828 is no matter of conversion: torch forbids it on any layer (pytorch 61519), the batch norm included."""
    for inplace in (True, False):
        model = convert(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=inplace)))
        model[1].register_full_backward_hook(lambda *_: None)
        if inplace:
            with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
                model(torch.randn(2, 3, 4, 4))
        else:
            model(torch.randn(2, 3, 4, 4)).sum().backward()


def test_what_is_left_is_told() -> None:
    """Opacus' validator calls a model valid whose frozen norms it does not know; here each is in the plan."""
    validators = pytest.importorskip("opacus.validators")

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.batch_norm(x, None, None, self.inner, training=True)

    model = nn.Sequential(nn.Conv2d(3, 8, 1), Own(), FrozenBatchNorm(8))
    assert validators.ModuleValidator.is_valid(model)
    assert [change.name for change in normswap.plan_convert(model, "group").changes] == ["1.batch_norm", "2"]


# --- freezing, and the forum -----------------------------------------------------------------------------------------


class Doubled(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def keeps_subclasses(tool: Tool) -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 4, 1), Doubled(4)))
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(tool(copy.deepcopy(model))(x), model(x))


def test_freezing_keeps_what_a_subclass_adds() -> None:
    keeps_subclasses(our_frozen)
    fails(keeps_subclasses, _freeze)


def freezes_aliases(tool: Tool) -> None:
    model = tool(randomised(Aliased()))
    model.train()
    before = model.a.running_mean.clone()
    model(torch.randn(4, 4, 3, 3))
    assert torch.equal(model.list[0].running_mean, before)
    assert model.b is model.a is model.list[0]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in (model.a, model.b, model.list[0]))


def test_freezing_follows_aliases_and_lasts_in_train_mode() -> None:
    freezes_aliases(our_frozen)
    fails(freezes_aliases, _freeze)


def changes_the_model(tool: Tool) -> None:
    model = randomised(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))))
    keys = set(model.state_dict())
    changed = tool(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in changed.modules())
    assert {k for k in changed.state_dict() if "." in k} <= keys


def test_nested_norms_are_replaced() -> None:
    changes_the_model(our_group)
    fails(changes_the_model, forum)
