"""Norms of other libraries: one line a class, judged by the oracle; what they become keeps their followers."""

from __future__ import annotations

import tests.zoo.schemas  # noqa: F401  (before torchvision, which timm and transformers import)

# isort: split
import copy
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import timm
import timm.layers.norm
import timm.layers.norm_act
import torch
import torchvision
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, InplaceAbn, SplitBatchNorm2d
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from transformers import LlamaConfig, LlamaModel
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from normswap import Refusal, convert, find, kinds, plan_convert, read, registry
from tests.support import (
    DOUBLE,
    FEWER_SOURCES,
    check_copies,
    check_reader,
    distance,
    expected,
    only,
    plan_of,
    randomise,
    sample,
    tolerance,
)

MAP, LAST = (3, 8, 4, 5), (3, 4, 5, 8)
TIMM_BASES = {
    cls.__name__: cls
    for module in (timm.layers.norm, timm.layers.norm_act)
    for cls in vars(module).values()
    if isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__ == module.__name__
}


def timm_line(name: str) -> tuple[Callable[[], nn.Module], tuple[int, ...]]:
    cls: Any = TIMM_BASES[name]
    if name == "SyncBatchNormAct":  # timm makes it from the other only
        return lambda: timm.layers.convert_sync_batchnorm(BatchNormAct2d(8, act_layer=nn.SiLU)), MAP
    options: dict[str, Any] = {"num_groups": 4} if name in ("GroupNorm", "GroupNormAct") else {}
    if "Act" in name:
        options["act_layer"] = nn.SiLU
    first = "2d" in name or name.startswith("Group")
    return lambda: cls(8, **options), MAP if first else LAST


OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "torchvision FrozenBatchNorm2d": (lambda: torchvision.ops.FrozenBatchNorm2d(8), MAP),
    "torchvision FrozenBatchNorm2d, eps 0": (lambda: torchvision.ops.FrozenBatchNorm2d(8, eps=0.0), MAP),
    "torchvision LayerNorm2d": (lambda: LayerNorm2d(8), MAP),
    "timm BatchNormAct2d without activation": (lambda: BatchNormAct2d(8, apply_act=False), MAP),
    "timm BatchNormAct2d with drop": (lambda: BatchNormAct2d(8, drop_layer=nn.Dropout2d), MAP),
    "transformers Llama": (lambda: LlamaRMSNorm(8), LAST),
    "transformers Qwen2": (lambda: Qwen2RMSNorm(8, eps=1e-3), LAST),
    "transformers Gemma, 1 + weight": (lambda: GemmaRMSNorm(8), LAST),
    "transformers T5": (lambda: T5LayerNorm(8), LAST),
}
SOURCES = {**{f"timm {name}": timm_line(name) for name in TIMM_BASES}, **OTHERS}


def built(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = SOURCES[name]
    module = randomise(make().double())
    for child in module.modules():
        if isinstance(child, nn.Dropout2d):
            child.p = 0.0
    return module, sample(*shape)


def test_every_norm_class_of_timm_is_here() -> None:
    assert {"GroupNorm1", "RmsNorm2dFp32", "SimpleNorm", "LayerNormAct2dFp32", "SyncBatchNormAct"} <= TIMM_BASES.keys()


@pytest.mark.parametrize("name", SOURCES)
def test_reader(name: str) -> None:
    check_reader(*built(name))


PAIRS = [
    (name, kind)
    for name in SOURCES
    for kind in kinds()
    if registry.planner(kind) is None
    and (kind not in FEWER_SOURCES or name in ("timm BatchNormAct2d", "timm GroupNorm"))
]


@pytest.mark.usefixtures("ambient_condition")
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_any_norm_becomes_any_kind_or_is_refused_with_a_reason(name: str, kind: str) -> None:
    module, x = built(name)
    plan = plan_of(module, kind)
    assert len(plan.changes) + len(plan.skips) == 1
    if plan.skips:
        assert "Error" not in only(plan.skips).reason
        return
    change, new = only(plan.changes), plan.apply()[0]
    assert dict(new.named_children()).keys() == dict(module.named_children()).keys(), "followers keep their names"
    if kind == "identity":
        wanted = x
        for follower in change.source.then:
            wanted = follower(wanted)
        assert distance(new(x), wanted) < DOUBLE
        return
    target = read(new)
    assert [type(m) for m in target.then] == [type(m) for m in change.source.then]
    for training in (True, False):
        subject = copy.deepcopy(new).train(training)
        assert distance(subject(x), expected(x, target, training=training)) < tolerance(target)
    gap = distance(new.eval()(x), module.eval()(x))
    assert (change.exactness == "exact") == (gap < max(tolerance(change.source), 1e-8)), f"{change.exactness}, {gap}"
    if kind in ("group", "frozen"):
        check_copies(new.eval(), x)


def test_batch_norm_act_keeps_state_dict_keys() -> None:
    module, x = built("timm BatchNormAct2d")
    for kind in ("sync", "batch", "frozen"):
        new = plan_of(module, kind).apply()[0]
        wanted = [k for k in module.state_dict() if kind != "frozen" or k != "num_batches_tracked"]
        assert list(new.state_dict()) == wanted
        assert distance(new.eval()(x), module.eval()(x)) < DOUBLE
    assert type(plan_of(module, "group").apply()[0].act) is nn.SiLU


def test_the_activation_after_identity_is_no_norm() -> None:
    module, _ = built("timm BatchNormAct2d")
    assert find(plan_of(module, "identity").apply()) == []


def test_frozen_act_becomes_trainable_again() -> None:
    module = randomise(FrozenBatchNormAct2d(8).double())
    plan = plan_of(module, "batch")
    assert only(plan.changes).exactness == "exact"
    assert "trainable again" in only(plan.changes).notes
    new = plan.apply()[0]
    assert new.weight.requires_grad
    assert isinstance(new.weight, nn.Parameter)
    x = sample(*MAP)
    assert distance(new.eval()(x), module(x)) < DOUBLE


def test_a_frozen_norm_without_eps_trains_as_batch() -> None:
    module, x = built("torchvision FrozenBatchNorm2d, eps 0")
    for kind in ("batch", "sync"):
        plan = plan_of(module, kind)
        assert only(plan.changes).exactness == "exact"
        plan.apply().train()(x).sum().backward()


@pytest.mark.parametrize("make", [lambda: SplitBatchNorm2d(8), lambda: InplaceAbn(8)], ids=["split", "inplace"])
def test_timm_norms_that_are_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(Refusal, match=r"separate statistics|kernel of its own"):
        read(make())


def test_a_gated_rms_norm_is_refused() -> None:
    plan = plan_of(MambaRMSNormGated(8, 4), "layer")
    assert not plan.changes
    assert "MambaRMSNormGated" in only(plan.skips).was + only(plan.skips).reason


def test_an_rms_norm_that_computes_something_else_is_refused() -> None:
    class OddRMSNorm(LlamaRMSNorm):
        __module__ = "transformers.models.odd.modeling_odd"

        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) * 1.5

    with pytest.raises(Refusal, match="computes neither"):
        read(OddRMSNorm(8))
    with pytest.raises(Refusal, match="not a plain RMSNorm"):
        read(Gemma3nRMSNorm(8, with_scale=False))


def test_reading_an_rms_norm_runs_no_hooks_and_leaves_no_mark() -> None:
    module = LlamaRMSNorm(8)
    calls: list[str] = []
    module.register_forward_hook(lambda *_: calls.append("forward"))
    module.register_forward_pre_hook(lambda *_: calls.append("pre"))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = torch.get_rng_state()
    read(module)
    assert not calls
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_one_plus_weight_becomes_the_weight_itself() -> None:
    module, x = built("transformers Gemma, 1 + weight")
    new = plan_of(module, "rms").apply()
    assert "already is" in only(plan_of(module, "rms").skips).reason
    assert new[0] is not module
    layer = plan_of(module, "layer").apply()[0]
    assert distance(layer.weight, module.weight + 1) < DOUBLE
    assert layer.weight.requires_grad
    assert distance(layer(x), nn.functional.layer_norm(x, (8,), module.weight + 1, eps=module.eps)) < DOUBLE


class FrozenBatchNorm2d(nn.Module):
    """As in detectron2/layers/batch_norm.py: buffers, statistics with eps already in the variance, no counter."""

    __module__ = "detectron2.layers.batch_norm"

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features) - eps)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)


def test_detectron2_by_its_dotted_path(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = ModuleType("detectron2.layers.batch_norm")
    stand_in.FrozenBatchNorm2d = FrozenBatchNorm2d  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "detectron2.layers.batch_norm", stand_in)
    module = randomise(FrozenBatchNorm2d(8).double())
    check_reader(module, sample(*MAP))
    plan = plan_of(module, "batch")
    assert (only(plan.changes).exactness, only(plan.changes).source.kind) == ("exact", "frozen")
    assert only(plan_of(module, "frozen").skips).reason.startswith("it already is frozen")
    x = sample(*MAP)
    assert distance(plan.apply().eval()(x), module(x)) < DOUBLE


def test_no_library_is_imported_to_be_known() -> None:
    code = (
        "import normswap, sys; print(sorted({'timm', 'torchvision', 'transformers', 'detectron2'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def inputs(size: int) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", ["resnetv2_18", "test_byobnet", "lcnet_050", "test_convnext", "test_vit"])
def test_whole_timm_models(name: str) -> None:
    model = timm.create_model(name, pretrained=False, num_classes=4).double().eval()
    randomise_norms(model)
    size = model.default_cfg.get("input_size", (3, 64, 64))[-1] if "vit" in name else 64
    x = inputs(size)
    wanted = model(x)
    for kind in ("frozen", "sync"):
        plan = plan_convert(model, kind)
        new = plan.apply()
        assert type(new) is type(model)
        assert distance(new(x), wanted) < DOUBLE
    plan = plan_convert(model, "layer")
    listed = {name for part in (*plan.changes, *plan.skips) for name in (part.name, *part.aliases)}
    norms = {n for n, m in model.named_modules() if "norm" in type(m).__name__.lower() and not list(m.children())}
    assert norms - {n for n in norms if n.endswith((".drop", ".act"))} <= listed
    assert bool(plan.apply()(x).isfinite().all())


def randomise_norms(model: nn.Module) -> None:
    for site in find(model):
        randomise(site.module)


def test_llama_as_a_whole() -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaModel(config).eval()
    plan = plan_convert(model, "layer")
    assert [change.name for change in plan.changes] == [
        *(f"layers.{i}.{name}" for i in range(2) for name in ("input_layernorm", "post_attention_layernorm")),
        "norm",
    ]
    new = plan.apply()
    tokens = torch.arange(6)[None]
    assert type(new) is type(model)
    assert distance(new(tokens).last_hidden_state, model(tokens).last_hidden_state) > 1e-3
    assert [type(m).__name__ for m in new.modules()].count("LayerNorm") == 5


def test_torchvision_detection_backbone_unfrozen() -> None:
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=torchvision.ops.FrozenBatchNorm2d, trainable_layers=5
    )
    model = backbone.double().eval()
    randomise_norms(model)
    with torch.no_grad():
        new = convert(model, "batch").eval()
        x = inputs(64)
        assert all(distance(a, b) < 1e-7 for a, b in zip(new(x).values(), model(x).values(), strict=True))
    assert not [site for site in find(new) if site.norm is not None and site.norm.kind == "frozen"]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in new.modules()) == 20
