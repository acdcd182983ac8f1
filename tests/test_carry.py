"""What a replacement keeps of the norm it replaces, besides the mathematics."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import weight_norm

from normswap import convert, plan_convert
from tests.support import DOUBLE, check_copies, distance, only, randomise, sample

KINDS = ["group", "layer", "instance", "sync", "frozen", "switchable", "rms"]
TRAINED = [kind for kind in KINDS if kind != "frozen"]


def model_of(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 1), norm)


def batch_norm() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(8, eps=1e-3, momentum=0.3)
    randomise(norm)
    return norm


@pytest.mark.parametrize("kind", TRAINED)
def test_affine_objects_and_eps(kind: str) -> None:
    norm = batch_norm()
    weight, bias = norm.weight, norm.bias
    new = convert(model_of(norm), kind, inplace=True)[1]
    assert new.weight is weight
    assert getattr(new, "bias", bias) is bias
    assert new.eps == 1e-3


@pytest.mark.parametrize("kind", ["sync", "switchable", "frozen"])
def test_statistics_objects_and_momentum(kind: str) -> None:
    norm = batch_norm()
    tensors = {name: getattr(norm, name).clone() for name in ("running_mean", "running_var")}
    new = convert(model_of(norm), kind, inplace=True)[1]
    for name, tensor in tensors.items():
        assert torch.equal(getattr(new, name), tensor)
    if kind != "frozen":
        assert new.momentum == 0.3
        assert new.running_mean is norm.running_mean


def test_a_norm_that_stopped_tracking_goes_on_so() -> None:
    norm = batch_norm()
    norm.track_running_stats = False
    new = convert(model_of(norm), "sync")
    new(torch.randn(2, 3, 4, 4))
    assert torch.equal(new[1].running_mean, norm.running_mean)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_train_and_eval_flags(kind: str, training: bool) -> None:
    model = nn.Sequential(model_of(batch_norm()), nn.Dropout())
    model.train(training)
    model[1].train(not training)
    new = convert(model, kind)
    assert (new.training, new[0].training, new[0][1].training, new[1].training) == (
        training,
        training,
        training,
        not training,
    )
    model[0][1].train(not training)
    assert convert(model, kind)[0][1].training is not training


@pytest.mark.parametrize("kind", TRAINED)
def test_requires_grad(kind: str) -> None:
    norm = batch_norm()
    norm.weight.requires_grad_(False)
    new = convert(model_of(norm), kind)[1]
    assert not new.weight.requires_grad
    assert getattr(new, "bias", torch.ones(1, requires_grad=True)).requires_grad
    norm.bias.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in convert(model_of(norm), kind)[1].parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtype(kind: str, dtype: torch.dtype) -> None:
    new = convert(model_of(batch_norm()).to(dtype), kind)[1]
    assert {t.dtype for t in new.state_dict().values() if t.is_floating_point()} == {dtype}


@pytest.mark.parametrize("kind", KINDS)
def test_meta_device(kind: str) -> None:
    with torch.device("meta"):
        model = model_of(nn.BatchNorm2d(8))
    plan = plan_convert(model, kind)
    assert {t.device.type for t in plan.apply().state_dict().values()} == {"meta"}
    assert len(plan.changes) == 1
    plan.apply().to_empty(device="cpu")


def test_memory_format_and_other_layers_are_untouched() -> None:
    model = model_of(batch_norm()).to(memory_format=torch.channels_last)
    conv, weight = model[0], model[0].weight
    convert(model, "group", inplace=True)
    assert model[0] is conv
    assert conv.weight is weight
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert model(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["group", "frozen", "switchable"])
class TestHooks:
    """Hooks fire on the new module, see it, and their handles still remove them."""

    def converted(self, kind: str, register: Callable[[nn.Module], Any]) -> tuple[nn.Module, Any]:
        model = model_of(batch_norm())
        handle = register(model[1])
        return convert(model, kind, inplace=True), handle

    def check(
        self, kind: str, register: Callable[[nn.Module, list[Any]], Any], run: Callable[[nn.Module], Any]
    ) -> None:
        seen: list[Any] = []
        model, handle = self.converted(kind, lambda norm: register(norm, seen))
        gc.collect()
        run(model)
        assert seen == [model[1]]
        handle.remove()
        run(model)
        assert len(seen) == 1

    def forward(self, model: nn.Module) -> None:
        model(torch.randn(2, 3, 4, 4))

    def backward(self, model: nn.Module) -> None:
        model(torch.randn(2, 3, 4, 4)).square().sum().backward()

    def test_forward(self, kind: str) -> None:
        self.check(kind, lambda n, seen: n.register_forward_hook(lambda m, i, o: seen.append(m)), self.forward)

    def test_forward_with_kwargs_first_and_always(self, kind: str) -> None:
        self.check(
            kind,
            lambda n, seen: n.register_forward_hook(
                lambda m, a, k, o: seen.append(m), with_kwargs=True, prepend=True, always_call=True
            ),
            self.forward,
        )

    def test_forward_pre(self, kind: str) -> None:
        self.check(kind, lambda n, seen: n.register_forward_pre_hook(lambda m, i: seen.append(m)), self.forward)

    def test_forward_pre_with_kwargs(self, kind: str) -> None:
        self.check(
            kind,
            lambda n, seen: n.register_forward_pre_hook(lambda m, a, k: seen.append(m), with_kwargs=True),
            self.forward,
        )

    def test_full_backward(self, kind: str) -> None:
        self.check(kind, lambda n, seen: n.register_full_backward_hook(lambda m, gi, go: seen.append(m)), self.backward)

    def test_full_backward_pre(self, kind: str) -> None:
        self.check(kind, lambda n, seen: n.register_full_backward_pre_hook(lambda m, go: seen.append(m)), self.backward)

    def test_state_dict(self, kind: str) -> None:
        def state(model: nn.Module) -> None:
            model.state_dict()

        def quiet(seen: list[Any]) -> Callable[..., None]:
            return lambda m, *_: seen.append(m)

        self.check(kind, lambda n, seen: n._register_state_dict_hook(quiet(seen)), state)
        self.check(kind, lambda n, seen: n.register_state_dict_pre_hook(quiet(seen)), state)
        self.check(kind, lambda n, seen: n.register_state_dict_post_hook(quiet(seen)), state)

    def test_load_state_dict(self, kind: str) -> None:
        def load(model: nn.Module) -> None:
            model.load_state_dict(model.state_dict())

        def quiet(seen: list[Any]) -> Callable[..., None]:
            return lambda m, *_: seen.append(m)

        self.check(kind, lambda n, seen: n.register_load_state_dict_pre_hook(quiet(seen)), load)
        self.check(kind, lambda n, seen: n.register_load_state_dict_post_hook(quiet(seen)), load)

    def test_hooks_that_change_what_passes(self, kind: str) -> None:
        model, _ = self.converted(kind, lambda n: n.register_forward_hook(lambda m, i, o: o * 0 + 7))
        assert bool((model(torch.randn(2, 3, 4, 4)) == 7).all())

    def test_a_copy_has_hooks_of_its_own(self, kind: str) -> None:
        seen: list[nn.Module] = []
        model = model_of(batch_norm())
        handle = model[1].register_forward_hook(lambda m, i, o: seen.append(m))
        new = convert(model, kind)
        self.forward(new)
        self.forward(model)
        assert seen == [new[1], model[1]]
        handle.remove()
        self.forward(model)
        assert len(seen) == 2


class Absolute(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


@pytest.mark.parametrize("kind", KINDS)
def test_parametrizations(kind: str) -> None:
    norm = batch_norm()
    x = torch.randn(2, 8, 4, 4)
    wanted = convert(nn.Sequential(norm), kind)(x)
    with torch.no_grad():
        norm.weight.neg_()
    parametrize.register_parametrization(norm, "weight", Absolute())
    original = norm.parametrizations.weight.original
    new = convert(nn.Sequential(norm), kind, inplace=True)
    assert distance(new(x), wanted) < 1e-6
    assert new[0].parametrizations.weight.original is original
    assert "0.parametrizations.weight.original" in new.state_dict()
    assert distance(copy.deepcopy(new)(x), wanted) < 1e-6
    assert "already is" in only(plan_convert(new, kind).skips).reason
    parametrize.remove_parametrizations(new[0], "weight")
    assert distance(new(x), wanted) < 1e-6
    assert "Parametrized" not in type(new[0]).__name__


def test_parametrization_of_a_norm_with_activation() -> None:
    import tests.zoo.schemas  # noqa: F401  (before timm)

    timm_layers = pytest.importorskip("timm.layers")
    norm = randomise(timm_layers.BatchNormAct2d(8).double())
    parametrize.register_parametrization(norm, "weight", Absolute())
    x = sample(2, 8, 4, 4)
    new = convert(nn.Sequential(norm), "group")
    wanted = torch.relu(nn.functional.group_norm(x, 4, norm.weight, norm.bias, norm.eps))
    assert distance(new(x), wanted) < DOUBLE
    parametrize.remove_parametrizations(new[0], "weight")
    assert distance(new(x), wanted) < DOUBLE
    check_copies(new, x)


@pytest.mark.parametrize("kind", TRAINED)
def test_pruning_goes_on(kind: str) -> None:
    norm = batch_norm()
    prune.random_unstructured(norm, "weight", 0.5)
    mask, original = norm.weight_mask, norm.weight_orig
    model = convert(nn.Sequential(norm), kind, inplace=True)
    new = model[0]
    assert new.weight_orig is original
    assert "weight" not in dict(new.named_parameters())
    x = torch.randn(2, 8, 4, 4)
    model(x).square().sum().backward()
    assert bool((original.grad[mask == 0] == 0).all())
    with torch.no_grad():
        original.mul_(2)
    model(x)
    assert torch.equal(new.weight, original * mask)
    prune.remove(new, "weight")
    assert isinstance(new.weight, nn.Parameter)


def test_weight_norm_elsewhere_does_not_matter() -> None:
    model = nn.Sequential(weight_norm(nn.Conv2d(3, 8, 1)), batch_norm())
    new = convert(model, "sync").eval()
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(new(x), model.eval()(x))


def test_attributes_that_were_set_on_the_norm() -> None:
    norm = batch_norm()
    norm.tag, norm._is_hf_initialized = {"a": 1}, True
    new = convert(model_of(norm), "group", inplace=True)[1]
    assert new.tag is norm.tag
    assert new._is_hf_initialized
    assert not {"momentum", "num_features", "track_running_stats"} & vars(new).keys()


def test_attributes_of_parameters() -> None:
    norm = batch_norm()
    norm.weight.no_decay = True  # type: ignore[attr-defined]
    assert convert(model_of(norm), "group", inplace=True)[1].weight.no_decay


def test_tensors_and_children_that_were_added() -> None:
    norm = batch_norm()
    norm.register_buffer("extra", torch.arange(3.0), persistent=False)
    norm.scale = nn.Parameter(torch.ones(2))
    norm.observer = nn.Linear(2, 2)
    extra, scale, observer = norm.extra, norm.scale, norm.observer
    new = convert(model_of(norm), "group", inplace=True)[1]
    assert new.extra is extra
    assert new.scale is scale
    assert new.observer is observer
    assert "extra" not in new.state_dict()


def test_statistics_that_are_not_saved_stay_so() -> None:
    norm = batch_norm()
    norm.register_buffer("running_mean", norm.running_mean, persistent=False)
    model = model_of(norm)
    assert list(convert(model, "sync").state_dict()) == list(model.state_dict())


def test_position_in_the_tree() -> None:
    model = nn.Sequential()
    for index in range(3):
        model.add_module(f"norm{index}", batch_norm())
    new = convert(model, "group", where="norm1")
    assert [name for name, _ in new.named_children()] == ["norm0", "norm1", "norm2"]
    assert [type(child).__name__ for child in new] == ["BatchNorm2d", "GroupNorm", "BatchNorm2d"]


def test_ties_between_norms_and_with_other_layers() -> None:
    first, second, conv = batch_norm(), batch_norm(), nn.Conv2d(8, 8, 1)
    second.weight, conv.bias = first.weight, first.bias
    new = convert(nn.Sequential(first, conv, second), "group")
    assert new[0].weight is new[2].weight
    assert new[1].bias is new[0].bias


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow(kind: str) -> None:
    model = convert(model_of(batch_norm()), kind)
    model(torch.randn(4, 3, 5, 5)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name


def test_an_accumulated_gradient_is_kept() -> None:
    model = model_of(batch_norm())
    model(torch.randn(2, 3, 4, 4)).square().sum().backward()
    gradient = model[1].weight.grad
    assert convert(model, "group", inplace=True)[1].weight.grad is gradient
