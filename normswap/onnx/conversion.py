"""Batch normalizations of an ONNX graph become group, instance or layer norms, of ONNX's own operators.

=========  =============================================  =========================================================
kind       opset 21 and later                             before
=========  =============================================  =========================================================
instance   ``InstanceNormalization``                      the same
group      ``GroupNormalization``                         ``Reshape`` to (N, groups, -1), ``InstanceNormalization``,
                                                          ``Reshape`` back, ``Mul``, ``Add``
layer      as group, with one group: over (C, *S)         as group
=========  =============================================  =========================================================

Scale and bias are carried over, the running statistics are dropped. The node keeps its name, its result too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from normswap.engine.convert import lost
from normswap.engine.plan import Change, Skip
from normswap.errors import NormswapError
from normswap.norms.group import SINGLE_POSITION_CHANNELS, group_count, nearest_count
from normswap.onnx.graph import Tensor, View, cast, name_of
from normswap.onnx.norms import NodeSite
from normswap.onnx.search import skipped
from normswap.spec import MAP, SPACE, Norm, exactness

KINDS: Mapping[str, tuple[str, ...]] = {"group": ("groups", "channels_per_group"), "instance": (), "layer": ()}
"""The kinds that a file's batch norms can become, and their options."""
_NATIVE = 21


def check_options(to: str, options: Mapping[str, object]) -> None:
    """Raise :class:`NormswapError` for a kind or an option that there is not."""
    if to not in KINDS:
        raise NormswapError(f"an .onnx file's norms cannot become {to!r}; the kinds are: {', '.join(KINDS)}")
    for name in options:
        if name not in KINDS[to]:
            raise NormswapError(f"{name!r} is no option of {to!r} here; its options: {', '.join(KINDS[to]) or 'none'}")


def convert(view: View, site: NodeSite, to: str, options: Mapping[str, Any]) -> Change | Skip:
    """Change one norm in the model in memory; an option that does not fit its channels raises."""
    norm, node = site.norm, site.node
    if site.reason is not None or norm is None:
        return skipped(site, site.reason or "it is not known what it computes")
    if norm.kind != "batch":
        return skipped(site, f"it is {norm.kind}; of a file only batch normalizations are converted")
    shape, dtype = view.shape(node.inputs[0]) or view.shape(node.outputs[0]), view.dtype(node.inputs[0])
    if shape is None or dtype is None:
        return skipped(site, "the rank or the type of its input is not known")
    positions = shape[2:]
    if to == "instance" and (not positions or all(size == 1 for size in positions)):
        return skipped(site, "every instance would be a single element")
    target = _target(norm, to, options, single=all(size == 1 for size in positions))
    if isinstance(target, str):
        return skipped(site, target)
    tensors = [cast(tensor.numpy(), dtype) for tensor in (norm.weight, norm.bias) if tensor is not None]
    if isinstance(tensors[0], str) or isinstance(tensors[1], str):
        return skipped(site, next(tensor for tensor in tensors if isinstance(tensor, str)))
    native = to == "instance" or (view.opset >= _NATIVE and len(shape) > 2)
    new = _own_operator if native else _decomposed
    new(view, node, target, [tensor for tensor in tensors if isinstance(tensor, ir.Tensor)], dtype, len(shape))
    return Change(site.name, norm, target, exactness(norm, target), to, aliases=site.aliases, lost=lost(norm, target))


def _target(norm: Norm, to: str, options: Mapping[str, Any], *, single: bool) -> Norm | str:
    plain = replace(norm, kind=to, running_mean=None, running_var=None, momentum=None)
    if to == "instance":
        return replace(plain, pools=SPACE)
    if to == "layer":
        groups = 1
    elif single and not any(options.values()):
        groups = nearest_count(norm.channels, SINGLE_POSITION_CHANNELS)
    else:
        groups = group_count(norm.channels, **options)
    if single and groups == norm.channels:
        return "every group would be a single element"
    return replace(plain, pools=MAP, groups=groups)


def _own_operator(
    view: View, node: ir.Node, target: Norm, tensors: list[Tensor], dtype: ir.DataType, rank: int
) -> None:
    """The operator that computes the norm, in place of the old one."""
    values = [_parameter(view, node, index, tensor) for index, tensor in enumerate(tensors, 1)]
    attributes: dict[str, Any] = {"epsilon": float(target.eps or 0.0)}
    if target.kind != "instance":
        attributes["num_groups"] = target.groups
    operator = "InstanceNormalization" if target.kind == "instance" else "GroupNormalization"
    _replace(view, node, [ir.node(operator, [node.inputs[0], *values], attributes, name=node.name)])


def _decomposed(view: View, node: ir.Node, target: Norm, tensors: list[Tensor], dtype: ir.DataType, rank: int) -> None:
    """A group normalization as an instance normalization of its groups."""
    stem = name_of(node)
    broadcast = (target.channels, *[1] * (rank - 2))
    affine = [ir.Tensor(tensor.numpy().reshape(broadcast), dtype=dtype) for tensor in tensors]
    weight, bias = (_parameter(view, node, index, tensor) for index, tensor in enumerate(affine, 1))
    assert isinstance(node.graph, ir.Graph)
    graph, source = node.graph, node.inputs[0]

    def stored(name: str, array: Any) -> ir.Value:
        return view.add_initializer(graph, f"{stem}_{name}", ir.Tensor(array))

    ones = stored("ones", np.ones(target.groups, dtype.numpy()))
    zeros = stored("zeros", np.zeros(target.groups, dtype.numpy()))
    shape = ir.node("Shape", [source], name=f"{stem}_shape")
    grouped = ir.node("Reshape", [source, stored("groups", np.array([0, target.groups, -1]))], name=f"{stem}_grouped")
    normed = ir.node(
        "InstanceNormalization", [grouped.outputs[0], ones, zeros], {"epsilon": float(target.eps or 0.0)}, name=stem
    )
    whole = ir.node("Reshape", [normed.outputs[0], shape.outputs[0]], name=f"{stem}_whole")
    scaled = ir.node("Mul", [whole.outputs[0], weight], name=f"{stem}_scaled")
    shifted = ir.node("Add", [scaled.outputs[0], bias], name=f"{stem}_shifted")
    for new in (shape, grouped, normed, whole, scaled):
        new.outputs[0].name = view.fresh(f"{new.name}_output")
    _replace(view, node, [shape, grouped, normed, whole, scaled, shifted])


def _parameter(view: View, node: ir.Node, index: int, tensor: Tensor) -> ir.Value:
    """The norm's own scale or bias where its values are those wanted, else with these under its name if it is free."""
    value = node.inputs[index]
    assert value is not None
    old = view.constant(value)
    assert old is not None
    if old.shape != tuple(tensor.shape) or old.dtype != tensor.numpy().dtype:
        view.set_constant(node, index, tensor, f"{name_of(node)}_{'scale' if index == 1 else 'bias'}")
    value = node.inputs[index]
    assert value is not None
    return value


def _replace(view: View, node: ir.Node, new: list[ir.Node]) -> None:
    """Put new nodes where a norm was; the last gives what it gave, under its name."""
    graph, parameters, output = node.graph, list(node.inputs[1:]), node.outputs[0]
    assert isinstance(graph, ir.Graph)
    last = new[-1].outputs[0]
    view.same(last, output)
    for part in new:
        part.metadata_props.update(
            {key: text for key, text in node.metadata_props.items() if key not in part.metadata_props}
        )
    new[-1].doc_string = node.doc_string
    name, output.name = output.name, view.fresh(f"{output.name}_norm")
    last.name = name
    output.replace_all_uses_with(last, replace_graph_outputs=True)
    graph.insert_after(node, new)
    graph.remove(node, safe=True)
    for value in parameters:
        view.prune(value)
