"""Readers: which nodes of an ONNX graph are normalizations, and what they compute.

======================================  ==================================================================
operator                                read as
======================================  ==================================================================
``BatchNormalization``                  batch, with the running statistics that its inputs are
``InstanceNormalization``               instance; between two ``Reshape`` as exporters write group norms, group
``GroupNormalization`` (opset 21)       group
``LayerNormalization`` (opset 17)       layer, over the last axes
``RMSNormalization`` (opset 23)         rms, over the last axes
others that normalize                   listed, and left
======================================  ==================================================================

A batch normalization uses the batch's own statistics when ``training_mode`` is set (opset 14), when it has more than
one output (opset 7 to 13), and before opset 7, where ``is_test`` and broadcasting meant something else, so that these
are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from normswap.engine.sites import Site
from normswap.onnx.graph import DEFAULT, FLOATS, View, attribute, double, is_op, name_of
from normswap.spec import MAP, POSITION, SPACE, Norm

UNREAD = frozenset(
    {
        "MeanVarianceNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization", "GroupNorm",
        "SkipSimplifiedLayerNormalization", "EmbedLayerNormalization", "SkipGroupNorm", "FusedBatchNorm",
    }
)  # fmt: skip
OLDEST = 7


@dataclass
class NodeSite(Site):
    """A node that normalizes."""

    node: ir.Node = field(kw_only=True, repr=False)

    @property
    def label(self) -> str:
        return str(self.norm) if self.norm is not None else self.node.op_type


def find(view: View) -> list[NodeSite]:
    """Every normalization of a model, in the order of its graphs; those in functions behind them."""
    sites = [site for graph in view.model.graphs() for node in graph if (site := _site(view, node)) is not None]
    if view.opset < OLDEST:
        for site in sites:
            site.reason = f"operator set {view.opset} is older than {OLDEST}; convert it with onnx.version_converter"
    seen = {id(site.node) for site in sites}
    for function in view.model.functions.values():
        for node in function.all_nodes():
            if (site := _site(view, node)) is not None and id(node) not in seen:
                where = f"{function.domain}::{function.name}"
                site.reason = f"it is in the function {where}, whose calls share it; inline it (onnx.inliner) first"
                sites.append(site)
    return sites


def _site(view: View, node: ir.Node) -> NodeSite | None:
    reader = _READERS.get(node.op_type) if node.domain in DEFAULT else None
    if reader is None and node.op_type not in UNREAD:
        return None
    read = f"{node.op_type} is not an operator that is known here" if reader is None else reader(view, node)
    norm, reason = (None, read) if isinstance(read, str) else (read, None)
    if norm is not None and node.op_type == "BatchNormalization":
        reason = _trains(view, node)
    shape = view.shape(node.inputs[0])
    seen = () if shape is None else tuple(size if isinstance(size, int) else -1 for size in shape)
    known = None if not seen or -1 in seen else (seen,)
    if norm is not None and shape is not None and len(shape) < 2:
        reason = reason or "its input has a single axis"
    return NodeSite(name_of(node), norm, nn.Identity(), reason, _aliases(node), shapes=known, node=node)


def _aliases(node: ir.Node) -> tuple[str, ...]:
    """The name that the norm had as a module, where its tensors are still called after it."""
    for value in node.inputs[1:]:
        prefix, dot, last = ((value.name or "") if value is not None else "").rpartition(".")
        if dot and last in ("running_mean", "weight", "bias", "scale", "gamma") and prefix != node.name:
            return (prefix,)
    return ()


def _trains(view: View, node: ir.Node) -> str | None:
    """Why a batch normalization does not use its running statistics alone."""
    if attribute(node, "training_mode", 0):
        return "it is in training mode, where it uses the batch's statistics"
    if attribute(node, "spatial", 1) == 0:
        return "it has statistics of its own at every position (spatial=0)"
    if any(output.name and (output.uses() or output.is_graph_output()) for output in node.outputs[1:]):
        return "it gives its statistics as outputs, as in training"
    if len(node.outputs) > 1 and view.opset < 14 and any(output.name for output in node.outputs[1:]):
        return "it has the outputs of training mode, where it uses the batch's statistics"
    return None


def _vector(view: View, node: ir.Node, index: int) -> Tensor | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    array = view.constant(value)
    floats = array is not None and any(array.dtype == kind.numpy() for kind in FLOATS)
    return torch.from_numpy(double(array)) if array is not None and floats else None


def _given(node: ir.Node, index: int) -> bool:
    return index < len(node.inputs) and node.inputs[index] is not None


def _batch(view: View, node: ir.Node) -> Norm | str:
    names = ("scale", "bias", "mean", "variance")
    tensors = [_vector(view, node, index) for index in range(1, 5)]
    for name, tensor, value in zip(names, tensors, node.inputs[1:], strict=True):
        if tensor is None:
            whose = value.name if value is not None else ""
            return f"its {name} {whose!r} is no constant"
        if tensor.shape != tensors[0].shape or tensor.dim() != 1:  # type: ignore[union-attr]
            return f"its {name} has shape {tuple(tensor.shape)}"
    weight, bias, mean, var = tensors
    assert weight is not None
    return Norm(
        kind="batch",
        channels=weight.shape[0],
        eps=attribute(node, "epsilon", 1e-5),
        momentum=1 - attribute(node, "momentum", 0.9),
        weight=weight,
        bias=bias,
        running_mean=mean,
        running_var=var,
    )


def _per_channel(view: View, node: ir.Node, **fields: Any) -> Norm | str:
    weight = _vector(view, node, 1)
    if weight is None or (_given(node, 2) and _vector(view, node, 2) is None):
        return "its scale or bias is no constant"
    fields = {"channels": weight.shape[-1], "eps": attribute(node, "epsilon", 1e-5), "momentum": None, **fields}
    return Norm(weight=weight, bias=_vector(view, node, 2), **fields)


def _instance(view: View, node: ir.Node) -> Norm | str:
    norm = _per_channel(view, node, kind="instance", pools=SPACE)
    return norm if isinstance(norm, str) else _as_group(view, node, norm) or norm


def _as_group(view: View, node: ir.Node, norm: Norm) -> Norm | None:
    """A group normalization as exporters write it: its groups in place of the channels, between two ``Reshape``."""
    before = node.inputs[0].producer() if node.inputs[0] is not None else None
    behind = [use.node for use in node.outputs[0].uses()]
    if not is_op(before, "Reshape") or len(behind) != 1 or not is_op(behind[0], "Reshape"):
        return None
    assert before is not None
    shape = view.shape(before.inputs[0]) or view.shape(behind[0].outputs[0])
    if shape is None or len(shape) < 2 or not isinstance(shape[1], int) or shape[1] % norm.channels:
        return None
    neutral = norm.weight is not None and bool((norm.weight == 1).all())
    if not neutral or (norm.bias is not None and bool(norm.bias.any())):
        return None
    groups = norm.channels
    return replace(norm, kind="group", channels=shape[1], groups=groups, pools=MAP, weight=None, bias=None)


def _group(view: View, node: ir.Node) -> Norm | str:
    if view.opset < 21:
        return "before operator set 21 it had one scale for each group, and is deprecated"
    return _per_channel(view, node, kind="group", pools=MAP, groups=attribute(node, "num_groups"))


def _last_axes(view: View, node: ir.Node, kind: str) -> Norm | str:
    norm = _per_channel(view, node, kind=kind, pools=POSITION, channel_axis=-1)
    if isinstance(norm, str) or norm.weight is None:
        return norm
    shape = tuple(norm.weight.shape)
    axis, rank = attribute(node, "axis", -1), len(view.shape(node.inputs[0]) or ())
    over = -axis if axis < 0 else rank - axis
    if over != len(shape):
        return f"its scale has shape {shape}, and it normalizes {over if rank or axis < 0 else 'some'} last axes"
    centred: dict[str, Any] = {} if kind == "layer" else {"centred": False, "spread": "square"}
    return replace(norm, shape=shape if len(shape) > 1 else None, **centred)


_READERS: dict[str, Any] = {
    "BatchNormalization": _batch,
    "InstanceNormalization": _instance,
    "GroupNormalization": _group,
    "LayerNormalization": lambda view, node: _last_axes(view, node, "layer"),
    "RMSNormalization": lambda view, node: _last_axes(view, node, "rms"),
}


def is_batch(node: ir.Node | None) -> bool:
    """Whether a node may take an affine behind it into its scale and bias."""
    return is_op(node, "BatchNormalization")


def scale_and_bias(view: View, node: ir.Node) -> tuple[Tensor, Tensor] | str:
    """Of a batch normalization in inference, in float64; or why they cannot be changed."""
    read = _batch(view, node)
    if isinstance(read, str) or (reason := _trains(view, node)) is not None:
        return read if isinstance(read, str) else str(reason)
    assert read.weight is not None
    return read.weight, torch.zeros_like(read.weight) if read.bias is None else read.bias
