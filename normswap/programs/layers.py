"""Linear layers and norms of an exported program, as modules that share its tensors.

A call is a layer where its weight and bias, a norm where its affine and statistics, are tensors that the program holds;
not where it computes them, or writes to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from normswap.programs.operators import Given, name_of


class Tensors:
    """The tensors that a program holds, by the node that stands for each; the same object for the same memory."""

    def __init__(self, found: Mapping[fx.Node, Tensor], overwritten: Set[fx.Node]) -> None:
        self.overwritten = overwritten
        self._tensors: dict[fx.Node, Tensor] = {}
        self._parameters: dict[int, nn.Parameter] = {}
        same: dict[Any, Tensor] = {}
        for node, value in found.items():
            place = value.data_ptr(), tuple(value.shape), value.stride(), value.dtype, type(value)
            self._tensors[node] = same.setdefault(place, value) if value.numel() else value

    def of(self, node: Any) -> Tensor | None:
        """The tensor; ``None`` for a value that is computed, or written to."""
        if not isinstance(node, fx.Node) or node in self.overwritten:
            return None
        return self._tensors.get(node)

    def any_of(self, node: fx.Node) -> Tensor:
        return self._tensors[node]

    def parameter(self, value: Tensor) -> nn.Parameter:
        """The tensor as a parameter: itself where it is one, else always the same for the same tensor."""
        if isinstance(value, nn.Parameter):
            return value
        return self._parameters.setdefault(id(value), nn.Parameter(value, requires_grad=False))

    def fill(self, module: nn.Module, weight: Tensor | None, bias: Tensor | None) -> nn.Module:
        for name, value in (("weight", weight), ("bias", bias)):
            module.register_parameter(name, None if value is None else self.parameter(value))
        return module


RESULTS = frozenset(
    {
        "aten::_native_batch_norm_legit_no_training.default", "aten::_native_batch_norm_legit.default",
        "aten::native_batch_norm.default", "aten::native_group_norm.default", "aten::native_layer_norm.default",
    }
)  # fmt: skip
"""Norms of several results, of which the first is the normalized input."""


def source(node: fx.Node, a: Given) -> Any:
    """What a layer or norm works on."""
    name = name_of(node.target)
    return a["mat1"] if name == "aten::addmm.default" else a["self"] if name == "aten::mm.default" else a["input"]


def layer(node: fx.Node, a: Given, held: Tensors) -> nn.Module | None:
    """A convolution or linear layer as a module, or ``None``."""
    rule = _LAYERS.get(name_of(node.target))
    return None if rule is None else rule(node, a, held)


def tensors_of(node: fx.Node, a: Given) -> dict[str, Any]:
    """What gives a layer or norm its ``weight`` and ``bias``, where it has them: nodes, or ``None``."""
    name = name_of(node.target)
    if name in ("aten::addmm.default", "aten::mm.default"):
        return {"weight": transposed(a["mat2"]), "bias": a["self"] if name == "aten::addmm.default" else None}
    return {"weight": a.get("weight"), "bias": a.get("bias")}


def transposed(node: Any) -> Any:
    """The matrix of which ``node`` is the transpose, as decompositions write a linear layer; ``None`` for others."""
    if not isinstance(node, fx.Node):
        return None
    name = name_of(node.target)
    if name == "aten::t.default" or (name == "aten::permute.default" and list(node.args[1]) == [1, 0]):  # type: ignore[arg-type]
        return node.args[0]
    return None


def rank_of(node: Any) -> int | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, Tensor) else None


def _many(value: Any, size: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * size if len(values) == 1 else values


def _convolution(node: fx.Node, a: Given, held: Tensors) -> nn.Module | None:
    weight, bias = held.of(a["weight"]), held.of(a["bias"])
    if weight is None or (bias is None and a["bias"] is not None) or rank_of(a["input"]) != weight.dim():
        return None
    size = weight.dim() - 2
    turned = bool(a.get("transposed", "transpose" in name_of(node.target)))
    padding = a["padding"] if isinstance(a["padding"], str) else _many(a["padding"], size)
    options: dict[str, Any] = {
        "kernel_size": tuple(weight.shape[2:]), "stride": _many(a["stride"], size), "padding": padding,
        "dilation": _many(a["dilation"], size), "groups": a["groups"], "bias": False, "device": "meta",
    }  # fmt: skip
    if not all(isinstance(each, int) for name in ("stride", "dilation") for each in options[name]):
        return None
    if turned:
        classes = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
        options["output_padding"] = _many(a["output_padding"], size)
        channels = weight.shape[0], weight.shape[1] * a["groups"]
    else:
        classes = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}  # type: ignore[dict-item]
        channels = weight.shape[1] * a["groups"], weight.shape[0]
    return None if size not in classes else held.fill(classes[size](*channels, **options), weight, bias)


def _linear(node: fx.Node, a: Given, held: Tensors) -> nn.Module | None:
    given = tensors_of(node, a)
    weight, bias = held.of(given["weight"]), held.of(given["bias"])
    if weight is None or weight.dim() != 2 or (bias is None and given["bias"] is not None):
        return None
    if bias is not None and (bias.shape != weight.shape[:1] or a.get("alpha", 1) != 1 or a.get("beta", 1) != 1):
        return None
    return held.fill(nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta"), weight, bias)


# --- norms -----------------------------------------------------------------------------------------------------------


def norm(node: fx.Node, a: Given, held: Tensors) -> nn.Module | str | None:
    """A norm as a module, the reason why it is none, or ``None`` for what is no norm."""
    name = name_of(node.target)
    family = next((family for part, family in FAMILIES.items() if part in name), None)
    if family is None or not name.startswith("aten::"):
        return None
    rule = _NORMS.get(name)
    if rule is None:
        return f"{name.removeprefix('aten::')} is not among the norms that are read here"
    tensors = {}
    for field in ("weight", "bias", "running_mean", "running_var"):
        tensors[field] = held.of(a.get(field))
        if tensors[field] is None and a.get(field) is not None:
            return f"its {field} is computed, or written to, by the program"
    module = rule(a, tensors, held)
    return f"its input has {rank_of(a['input'])} axes" if module is None else module


def _batch(a: Given, tensors: dict[str, Any], held: Tensors) -> nn.Module | None:
    training = bool(a.get("training", a.get("use_input_stats", False)))
    instance = "use_input_stats" in a
    cls = (_INSTANCES if instance else _BATCHES).get(rank_of(a["input"]) or 0)
    present = next((value for value in tensors.values() if value is not None), None)
    channels = a["input"].meta["val"].shape[1] if present is None else present.shape[0]
    if cls is None or not isinstance(channels, int):
        return None
    module = cls(channels, a["eps"], a["momentum"], affine=False, track_running_stats=False)
    for field in ("running_mean", "running_var"):
        module.register_buffer(field, tensors[field])
    module.track_running_stats = tensors["running_mean"] is not None
    module.affine = tensors["weight"] is not None or tensors["bias"] is not None
    return held.fill(module, tensors["weight"], tensors["bias"]).train(training and module.track_running_stats)


def _group(a: Given, tensors: dict[str, Any], held: Tensors) -> nn.Module | None:
    shape = a["input"].meta["val"].shape
    if len(shape) < 2 or not isinstance(shape[1], int):
        return None
    module = nn.GroupNorm(a["num_groups"] if "num_groups" in a else a["group"], shape[1], a["eps"], affine=False)
    module.affine = tensors["weight"] is not None
    return held.fill(module, tensors["weight"], tensors["bias"])


def _layer(a: Given, tensors: dict[str, Any], held: Tensors) -> nn.Module | None:
    module = nn.LayerNorm(list(a["normalized_shape"]), a["eps"], elementwise_affine=False)
    module.elementwise_affine = tensors["weight"] is not None
    return held.fill(module, tensors["weight"], tensors["bias"])


def _rms(a: Given, tensors: dict[str, Any], held: Tensors) -> nn.Module | None:
    module = nn.RMSNorm(list(a["normalized_shape"]), a["eps"], elementwise_affine=False)
    module.elementwise_affine = tensors["weight"] is not None
    module.register_parameter("weight", None if tensors["weight"] is None else held.parameter(tensors["weight"]))
    return module


NORMS = (_BatchNorm, _InstanceNorm)
"""Those whose mode says what they compute."""

_BATCHES: dict[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_INSTANCES: dict[int, Any] = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
FAMILIES = {
    "batch_norm": "batch", "instance_norm": "instance", "group_norm": "group", "layer_norm": "layer", "rms_norm": "rms",
}  # fmt: skip
_NORMS: dict[str, Any] = {
    "aten::batch_norm.default": _batch,
    "aten::_native_batch_norm_legit_no_training.default": _batch,
    "aten::_native_batch_norm_legit.default": _batch,
    "aten::native_batch_norm.default": _batch,
    "aten::instance_norm.default": _batch,
    "aten::group_norm.default": _group,
    "aten::native_group_norm.default": _group,
    "aten::layer_norm.default": _layer,
    "aten::native_layer_norm.default": _layer,
    "aten::rms_norm.default": _rms,
}
_LAYERS: dict[str, Any] = {
    **{f"aten::conv{size}d.{kind}": _convolution for size in (1, 2, 3) for kind in ("default", "padding")},
    "aten::conv_transpose1d.default": _convolution,
    "aten::conv_transpose2d.input": _convolution,
    "aten::conv_transpose3d.input": _convolution,
    "aten::convolution.default": _convolution,
    "aten::linear.default": _linear,
    "aten::addmm.default": _linear,
    "aten::mm.default": _linear,
}
