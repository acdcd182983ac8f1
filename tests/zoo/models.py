"""Real model classes of torchvision and timm that hold a normalization, for sweeps.

An :class:`Entry` builds its model with random weights, in float64 and eval mode, on the CPU; ``inputs`` gives a seeded
batch of two at the smallest size the model takes, and ``outputs`` runs it. Most entries call the model. Detection
models end in operators without a kernel beside a CPU torch (non-maximum suppression, region pooling), so ``outputs``
runs their backbone and heads, which is where the norms are.

:func:`randomise` makes errors visible. A fresh model hides them: means are 0, variances 1, the last norm of a residual
branch is multiplied by 0 and a layer scale is 1e-6. Here, in units of the mean and the deviation of what reaches the
norm, running means are N(0, 0.5) and running variances U(0.5, 2); so signals neither die nor grow from layer to layer.
Weights are U(0.5, 1.5), biases N(0, 0.3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import tests.zoo.schemas  # noqa: F401  (before torchvision)

import timm  # isort: skip
import torchvision  # isort: skip

Inputs = tuple[Any, ...]
Outputs = Callable[[nn.Module, Inputs], Any]


def call(model: nn.Module, inputs: Inputs) -> Any:
    return model(*inputs)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One model of the zoo."""

    name: str
    """``library/model``."""
    family: str
    """The library's module or section it comes from."""
    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of the inputs; a list of images where ``listed``."""
    run: Outputs = call
    listed: bool = False

    @property
    def runs_whole(self) -> bool:
        """Whether ``outputs`` is one plain call of the model."""
        return self.run is call

    def build(self, seed: int = 0) -> nn.Module:
        """The model with random weights, float64, eval mode; not yet randomised."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            return self.make().double().eval()

    def inputs(self, seed: int = 0) -> Inputs:
        """Seeded inputs in float64."""
        generator = torch.Generator().manual_seed(seed)
        tensors = [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in self.shapes]
        return (tensors,) if self.listed else tuple(tensors)

    @torch.no_grad()
    def outputs(self, model: nn.Module, inputs: Inputs) -> list[Tensor]:
        """Every tensor the model returns."""
        return list(flatten(self.run(model, inputs)))


def flatten(output: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from flatten(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from flatten(value)
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from flatten(getattr(output, field.name))


TORCH_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def is_norm(module: nn.Module) -> bool:
    """Whether a module looks like a norm.

    It is one of torch's, or keeps running statistics, or has "Norm" in its class name and a weight or bias of its own.
    """
    if isinstance(module, TORCH_NORMS) or "running_mean" in module._buffers:
        return True
    own = [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]
    return "norm" in type(module).__name__.lower() and all(tensor.dim() <= 1 for tensor in own) and bool(own)


@torch.no_grad()
def randomise(model: nn.Module, entry: Entry, seed: int = 0) -> nn.Module:
    """Give every norm of ``model`` random statistics and affine, in place, and every other constant parameter."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) * (high - low) + low)

    def normal(tensor: Tensor, deviation: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * deviation)

    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or not tensor.is_floating_point():
                continue
            if name in ("running_mean", "running_var"):
                normal(tensor, 0.5) if name == "running_mean" else uniform(tensor, 0.5, 2.0)
            elif is_norm(module) or name in module._parameters:
                _scatter(tensor, name, uniform, normal, always=is_norm(module))

    seen: set[nn.Module] = set()

    def settle(module: nn.Module, args: tuple[Any, ...]) -> None:
        if module in seen or not args or not isinstance(args[0], Tensor) or args[0].dim() < 2:
            return
        seen.add(module)
        mean, var = module._buffers["running_mean"], module._buffers["running_var"]
        assert mean is not None
        assert var is not None
        spread, centre = torch.var_mean(args[0], correction=0)
        mean.mul_(spread.sqrt()).add_(centre)
        var.mul_(spread + 1e-12)

    statistics = [module for module in model.modules() if module._buffers.get("running_mean") is not None]
    handles = [module.register_forward_pre_hook(settle) for module in statistics]
    try:
        entry.outputs(model, entry.inputs(seed))
    finally:
        for handle in handles:
            handle.remove()
    return model


def _scatter(
    tensor: Tensor,
    name: str,
    uniform: Callable[[Tensor, float, float], None],
    normal: Callable[[Tensor, float], None],
    *,
    always: bool,
) -> None:
    """Random values for a norm's affine, and for any parameter that is constant: zero-initialised, or a layer scale."""
    first = float(tensor.flatten()[0]) if tensor.numel() else 0.0
    constant = tensor.numel() > 1 and bool((tensor == first).all())
    if not (always or constant):
        return
    if name.endswith("bias") or (first == 0.0 and not always):
        normal(tensor, 0.3 if tensor.dim() <= 1 else 0.02)
    else:
        uniform(tensor, 0.5, 1.5)


def _detector(model: nn.Module, inputs: Inputs) -> Any:
    """Backbone, proposal head and box heads, with the regions pooled to a fixed grid."""
    images, _ = model.transform(inputs[0])
    features = model.backbone(images.tensors)
    maps = list(features.values())
    if not hasattr(model, "rpn"):
        return model.head(maps)
    heads = model.roi_heads
    out = [model.rpn.head(maps), heads.box_predictor(heads.box_head(_pool(maps[0], 7)))]
    for kind in ("mask", "keypoint"):
        if getattr(heads, f"{kind}_head", None) is not None:
            predictor = getattr(heads, f"{kind}_predictor")
            out.append(predictor(getattr(heads, f"{kind}_head")(_pool(maps[0], 14))))
    return out


def _pool(features: Tensor, size: int) -> Tensor:
    return nn.functional.adaptive_avg_pool2d(features, size)


def _raft(model: nn.Module, inputs: Inputs) -> Any:
    """Two refinements instead of twelve, with a coordinate grid in float64 (torchvision's is float32 always)."""
    from torchvision.models.optical_flow import raft

    grid = raft.make_coords_grid
    with mock.patch.object(raft, "make_coords_grid", lambda *args, **kwargs: grid(*args, **kwargs).double()):
        return model(*inputs, num_flow_updates=2)


def _s3d(model: nn.Module, inputs: Inputs) -> Any:
    """Features and classifier, without the average pooling that needs 224x224 maps."""
    return model.classifier(model.features(*inputs))


def _mvit() -> nn.Module:
    """MViT v2 with four blocks on 8 frames of 64x64; the published ones take 16 frames of 224x224."""
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    blocks = [
        MSBlockConfig(1, 32, 64, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 4, 4]),
        MSBlockConfig(2, 64, 128, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 2, 2]),
        MSBlockConfig(4, 128, 128, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 1, 1]),
        MSBlockConfig(4, 128, 128, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 1, 1]),
    ]
    options = {"residual_pool": True, "residual_with_cls_embed": False, "rel_pos_embed": True, "proj_after_attn": True}
    return MViT((64, 64), 8, blocks, **options)


def _vision(family: str, names: str, shape: tuple[int, ...], **options: Any) -> list[Entry]:
    return [
        Entry(
            f"torchvision/{name}",
            f"torchvision {family}",
            partial(torchvision.models.get_model, name, weights=None, **options),
            ((2, *shape),),
        )
        for name in names.split()
    ]


def _detection(names: str, size: int = 64, **options: Any) -> list[Entry]:
    return [
        Entry(
            f"torchvision/{name}",
            "torchvision detection",
            partial(torchvision.models.get_model, name, weights=None, weights_backbone=None, num_classes=5, **options),
            ((3, size, size), (3, size, size)),
            _detector,
            listed=True,
        )
        for name in names.split()
    ]


def _frozen_backbone() -> nn.Module:
    """Faster R-CNN as it is fine-tuned: on a backbone whose norms are torchvision's FrozenBatchNorm2d."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=torchvision.ops.FrozenBatchNorm2d)
    return FasterRCNN(backbone, num_classes=5, min_size=64, max_size=64)


TORCHVISION: list[Entry] = [
    *_vision(
        "classification",
        "resnet18 resnet50 resnet152 resnext50_32x4d wide_resnet50_2 densenet121 densenet201 efficientnet_b0 "
        "efficientnet_v2_s mnasnet0_5 mnasnet1_0 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large regnet_x_400mf "
        "regnet_y_400mf shufflenet_v2_x0_5 shufflenet_v2_x1_0 convnext_tiny swin_t swin_v2_t",
        (3, 64, 64),
    ),
    *_vision("classification", "vgg11_bn", (3, 32, 32), num_classes=10, init_weights=False),
    *_vision("classification", "googlenet", (3, 64, 64), init_weights=False),
    *_vision("classification", "inception_v3", (3, 96, 96), init_weights=False),
    *_vision("classification", "maxvit_t", (3, 224, 224)),
    *_vision("classification", "vit_b_32", (3, 64, 64), image_size=64),
    *_vision(
        "segmentation",
        "fcn_resnet50 deeplabv3_resnet50 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large",
        (3, 64, 64),
        weights_backbone=None,
        num_classes=5,
    ),
    *_vision("segmentation", "fcn_resnet101", (3, 64, 64), weights_backbone=None, aux_loss=True),
    *_vision("video", "r3d_18 mc3_18 r2plus1d_18", (3, 8, 32, 32)),
    dataclasses.replace(*_vision("video", "s3d", (3, 16, 64, 64)), run=_s3d),
    Entry("torchvision/mvit_v2", "torchvision video", _mvit, ((2, 3, 8, 64, 64),)),
    *_vision("video", "swin3d_t", (3, 8, 64, 64)),
    *_detection(
        "fasterrcnn_resnet50_fpn fasterrcnn_resnet50_fpn_v2 fasterrcnn_mobilenet_v3_large_fpn maskrcnn_resnet50_fpn "
        "maskrcnn_resnet50_fpn_v2 keypointrcnn_resnet50_fpn retinanet_resnet50_fpn retinanet_resnet50_fpn_v2 "
        "fcos_resnet50_fpn",
        min_size=64,
        max_size=64,
    ),
    *_detection("ssdlite320_mobilenet_v3_large"),
    Entry(
        "torchvision/fasterrcnn_resnet18_fpn_frozen",
        "torchvision detection",
        _frozen_backbone,
        ((3, 64, 64), (3, 64, 64)),
        _detector,
        listed=True,
    ),
    *(
        Entry(
            f"torchvision/{name}",
            "torchvision optical flow",
            partial(torchvision.models.get_model, name, weights=None),
            ((2, 3, 128, 128), (2, 3, 128, 128)),
            _raft,
        )
        for name in ("raft_small", "raft_large")
    ),
]

TIMM_FAMILIES: dict[str, str] = {
    "beit": "beit_base_patch16_224",
    "byoanet": "botnet26t_256 sebotnet33ts_256 halonet26t haloregnetz_b lambda_resnet26t lamhalobotnet50ts_256",
    "byobnet": "gernet_s repvgg_a0 resnet51q resnext26ts gcresnext26ts seresnext26ts eca_resnext26ts bat_resnext26ts "
    "resnet32ts regnetz_b16 regnetz_b16_evos mobileone_s0 mobileone_s1 resnet50_clip resnet50_clip_gap "
    "test_byobnet",
    "cait": "cait_xxs24_224",
    "coat": "coat_lite_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "convnext_atto convnext_zepto_rms convnextv2_atto",
    "cpubone": "cpubone_nano cpubone_b1_dwnorm",
    "crossvit": "crossvit_9_240",
    "csatv2": "csatv2",
    "cspnet": "cspresnet50 cspresnext50 cspdarknet53 darknet17 sedarknet21 cs3darknet_focus_s cs3sedarknet_xdw "
    "cs3edgenet_x",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121 densenetblur121d densenet169",
    "dla": "dla34 dla46_c dla60_res2net dla60_res2next dla60x",
    "dpn": "dpn48b dpn68 dpn68b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "mnasnet_050 semnasnet_075 mobilenetv1_100 mobilenetv2_050 fbnetc_100 spnasnet_100 "
    "efficientnet_b0 efficientnet_b3 efficientnet_b0_gn efficientnet_blur_b0 efficientnet_es "
    "efficientnet_cc_b0_4e efficientnet_lite0 efficientnet_b1_pruned efficientnetv2_rw_t "
    "gc_efficientnetv2_rw_t tf_efficientnet_b0 tf_efficientnet_es tf_efficientnet_cc_b0_4e "
    "tf_efficientnet_lite0 tf_efficientnetv2_b0 efficientnet_x_b3 mixnet_s tf_mixnet_s tinynet_a "
    "mobilenet_edgetpu_100 mobilenet_edgetpu_v2_xs",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0 efficientvit_b1 efficientvit_l1",
    "efficientvit_msra": "efficientvit_m0 efficientvit_m3",
    "eva": "eva02_tiny_patch14_224",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8 fastvit_sa12 fastvit_mci0",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "ghostnet": "ghostnet_050 ghostnetv2_100 ghostnetv3_050",
    "hardcorenas": "hardcorenas_a hardcorenas_f",
    "hgnet": "hgnet_tiny hgnetv2_b0 hgnetv2_b4",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "hieradet_small",
    "hrnet": "hrnet_w18_small hrnet_w18_ssld",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3 tf_inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s levit_192 levit_conv_128s levit_256d",
    "lowformer": "lowformer_b0 lowformer_e1",
    "mambaout": "mambaout_femto",
    "maxxvit": "coatnet_pico_rw_224 coatnet_bn_0_rw_224 coatnet_rmlp_nano_rw_224 coatnext_nano_rw_224 coatnet_0_224 "
    "maxvit_pico_rw_256 maxvit_rmlp_pico_rw_256 maxxvit_rmlp_nano_rw_256 maxvit_tiny_pm_256 "
    "maxvit_tiny_tf_224",
    "metaformer": "poolformer_s12 poolformerv2_s12 convformer_s18 caformer_s18",
    "mlp_mixer": "mixer_s32_224",
    "mobilenetv3": "mobilenetv3_small_050 mobilenetv3_large_100 mobilenetv3_rw tf_mobilenetv3_small_100 "
    "tf_mobilenetv3_large_minimal_100 fbnetv3_b lcnet_050 mobilenetv4_conv_small "
    "mobilenetv4_conv_medium mobilenetv4_hybrid_medium mobilenetv4_conv_blur_medium",
    "mobilevit": "mobilevit_xxs mobilevit_s mobilevitv2_050",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "nf_resnet26 nfnet_l0",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002 regnety_002 regnetv_040 regnetz_005",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m0_9 repvit_m1",
    "res2net": "res2net50_26w_4s res2next50 res2net50d",
    "resnest": "resnest14d resnest26d resnest50d_1s4x24d",
    "resnet": "resnet10t resnet14t resnet18d resnet26t resnet50 resnet50_gn resnext50_32x4d ecaresnet26t "
    "ecaresnet50d_pruned seresnet18 seresnext26d_32x4d resnetblur18 resnetaa34d seresnetaa50d resnetrs50",
    "resnetv2": "resnetv2_50x1_bit resnetv2_18 resnetv2_50d resnetv2_50d_gn resnetv2_50d_frn resnetv2_50d_evos",
    "rexnet": "rexnet_100 rexnetr_100",
    "selecsls": "selecsls42 selecsls60b",
    "senet": "legacy_seresnet18 legacy_senet154 legacy_seresnext26_32x4d",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18 skresnext50_32x4d",
    "starnet": "starnet_s1 starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_ns_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_patch16_224",
    "tresnet": "tresnet_m tresnet_v2_l",
    "twins": "twins_svt_small twins_pcpvt_small",
    "vgg": "vgg11_bn",
    "visformer": "visformer_tiny visformer_small",
    "vision_transformer": "vit_tiny_patch16_224",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224 vit_small_resnet26d_224",
    "vision_transformer_relpos": "test_vit_relpos",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "vovnet39a ese_vovnet19b_dw ese_vovnet39b eca_vovnet39b ese_vovnet39b_evos",
    "xception": "xception legacy_xception",
    "xception_aligned": "xception41 xception65p",
    "xcit": "xcit_nano_12_p16_224 xcit_tiny_12_p8_224",
}
"""Models by the module of ``timm.models`` they stand in: every one with a norm, at least one model each."""

SIZES: dict[str, int] = {
    "halonet26t": 256,
    "haloregnetz_b": 224,
    "bat_resnext26ts": 256,
    "efficientformer_l1": 224,
    "inception_resnet_v2": 96,
    "inception_v3": 96,
    "tf_inception_v3": 96,
    "inception_v4": 96,
}
"""Side of the square image for models that do not take 64."""

_RESIZED = (
    "botnet26t_256 sebotnet33ts_256 coat_lite_tiny convit_tiny deit_tiny_patch16_224 efficientformerv2_s0 "
    "eva02_tiny_patch14_224 gcvit_xxtiny hiera_tiny_224 levit_128s levit_192 levit_conv_128s levit_256d "
    "coatnet_pico_rw_224 coatnet_bn_0_rw_224 coatnet_rmlp_nano_rw_224 coatnext_nano_rw_224 coatnet_0_224 "
    "maxvit_pico_rw_256 maxvit_rmlp_pico_rw_256 maxxvit_rmlp_nano_rw_256 maxvit_tiny_pm_256 maxvit_tiny_tf_224 "
    "mixer_s32_224 nest_tiny pit_ti_224 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_ns_224 "
    "tnt_s_patch16_224 visformer_tiny visformer_small vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 "
    "vit_small_resnet26d_224 test_vit_relpos vitamin_small_224 volo_d1_224 beit_base_patch16_224 cait_xxs24_224"
)

RESIZED: dict[str, int] = dict.fromkeys(_RESIZED.split(), 64) | {"lamhalobotnet50ts_256": 128}
"""Models that are built for one size of image, and the size they are built for here."""

EXCLUDED: dict[str, str] = {
    "timm/deepseek_vit": "its smallest model has 412 million parameters; its norms are those of other entries",
    "timm/gemma4_vit": "its smallest model has 167 million parameters and takes a list of patches",
    "timm/mobilenetv5": "its smallest model has 294 million parameters; its RMS norms are those of other entries",
    "torchvision/quantized_*": "quantized kernels: its float norms are those of the float model",
    "torchvision/ssd300_vgg16": "no norm",
    "torchvision/alexnet": "no norm",
    "torchvision/squeezenet*": "no norm",
}
"""Families that are left out, and why."""


def _timm(name: str, module: str) -> Entry:
    size = RESIZED.get(name) or SIZES.get(name, 64)
    options = {"img_size": size} if name in RESIZED else {}
    return Entry(
        f"timm/{name}",
        f"timm {module}",
        partial(timm.create_model, name, pretrained=False, **options),
        ((2, 3, size, size),),
    )


TIMM: list[Entry] = [_timm(name, module) for module, names in TIMM_FAMILIES.items() for name in names.split()]
MODELS: list[Entry] = [*TORCHVISION, *TIMM]
"""Every entry; names are unique."""
